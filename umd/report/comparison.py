"""The page that puts runs side by side."""

from collections.abc import Mapping, Sequence

from umd import workdir as folder
from umd.report import charts, numbers, sections
from umd.report.charts import EVALUATION, LOSS, TIME, TRAINING
from umd.report.layout import COLORS, Cards, footer, legend, page_data, pill, section, whole
from umd.report.markup import Html, element, join
from umd.report.read import Run

KINDS = {LOSS: "Loss", EVALUATION: "Evaluation", TRAINING: "Training", TIME: "Time"}


def page(groups: Mapping[str, Sequence[Run]]) -> str:
  """The page.

  Args:
    groups: {stage: runs}; one group "" of runs that have no stages.
  """
  cards, runs = Cards(legends=False), [run for group in groups.values() for run in group]
  parts = [_group(stage, group, cards) for stage, group in groups.items()]
  heading = element("header", element("h1", "Comparison"))
  nav = [(f"stage-{stage}", stage) for stage in groups if stage]
  title = "Comparison of " + ", ".join(run.label for run in runs)
  return whole(
    title, nav, join([heading, *parts, footer(runs[0].time)]), page_data(runs, cards.data)
  )


def config_differences(runs: Sequence[Run]) -> dict[str, list]:
  """{key: a value for each run} of the config values that are not the same; None for absent."""
  configs = [folder.flatten(run.config) for run in runs]
  rows = {key: [c.get(key) for c in configs] for key in sorted(set().union(*configs))}
  return {key: values for key, values in rows.items() if any(v != values[0] for v in values)}


def _group(stage: str, runs: Sequence[Run], cards: Cards) -> Html:
  colors = [i % COLORS for i in range(len(runs))]
  pictures = list(dict.fromkeys(name for run in runs for name in run.pictures))
  caption, rows = "Config values that differ", config_differences(runs)
  labels = [run.label for run in runs]
  different = sections.differences(rows, labels, caption)
  part = lambda title, *inside: section(title, *inside, id_=f"{stage}-{title}".replace(" ", "-"))
  commands = [
    join([element("h3", run.label), found]) for run in runs if (found := sections.command(run))
  ]
  return element(
    "div",
    element("h2", stage, id=f"stage-{stage}", class_="stage") if stage else "",
    legend(list(zip(labels, colors, strict=True))),
    part("Newest numbers", *_numbers(runs)),
    part("Curves", *_curves(charts.of_comparison(runs, colors), cards)),
    part("Pictures", *(sections.side_by_side(runs, name) for name in pictures)),
    part(caption, different if rows else element("p", "The configs are the same.")),
    part("Commands", *commands),
    class_="group",
  )


def _numbers(runs: Sequence[Run]) -> list[Html]:
  """The headline numbers, and all others folded."""
  headline = list(dict.fromkeys(name for run in runs for name in run.headline))
  others = dict.fromkeys(n for run in runs for n in run.metrics if n not in headline)
  states = ["state", *(element("td", pill(run)) for run in runs)]
  steps = ["step", *(f"{run.step:,}" for run in runs)]
  parts = [numbers.final_table(runs, headline, "Newest headline numbers", [states, steps])]
  if others:
    rest = numbers.final_table(runs, list(others), "All other numbers")
    parts.append(_fold("All other numbers", rest))
  return parts


def _fold(title: str, *inside: Html) -> Html:
  return element("details", element("summary", element("h3", title)), *inside)


FOLDED = {"losses/": "Losses by timestep", "goodput/": "Shares of the wall time"}


def _curves(found: Sequence[charts.Chart], cards: Cards) -> list[Html]:
  """Charts by section; where there are many of a kind they are folded."""
  many = lambda chart: next((prefix for prefix in FOLDED if chart.title.startswith(prefix)), "")
  parts = []
  for kind, title in KINDS.items():
    few = cards.cards([c for c in found if not many(c)], kind)
    parts += [element("h3", title), few] if few else []
    for prefix, folded in FOLDED.items():
      inside = cards.cards([c for c in found if many(c) == prefix], kind)
      parts += [_fold(folded, inside)] if inside else []
  return parts
