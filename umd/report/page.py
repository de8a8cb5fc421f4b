"""The pages of a run, and of a folder whose stages are runs."""

from collections.abc import Sequence

from umd.report import charts, markup, numbers, sections
from umd.report.charts import EVALUATION, LOSS, TIME, TRAINING
from umd.report.layout import (
  Cards,
  footer,
  header,
  page_data,
  pill,
  progress,
  section,
  whole,
)
from umd.report.markup import Html, element, join
from umd.report.read import FINISHED, NOT_STARTED, Run


def _nav(body: Html, names: Sequence[str]) -> list[tuple[str, str]]:
  ids = [(name.lower().replace(" ", "-"), name) for name in names]
  return [(id_, name) for id_, name in ids if f'<section id="{id_}"' in body]


def _unchanging(run: Run) -> Html:
  """The metrics of training that are not drawn since they stay what they are."""
  drawn = charts.shown(run)
  flat = [n for n in run.metrics if n not in drawn and charts.section(n) in (LOSS, TRAINING)]
  values = ", ".join(f"{n} {markup.number(float(run.metrics[n].values[-1]))}" for n in flat)
  return element("p", f"Not drawn, since it does not change: {values}", class_="note") * bool(flat)


def run_page(run: Run) -> str:
  """The report of a run."""
  found, cards = charts.of_run(run), Cards()
  galleries = element(
    "div", *(sections.gallery(run, name) for name in _samples_first(run)), class_="galleries"
  )
  body = join(
    [
      header(run),
      numbers.tiles(run),
      section("Loss", cards.cards(found, LOSS)),
      section("Pictures", galleries if run.pictures else ""),
      section("Evaluation", cards.cards(found, EVALUATION), numbers.step_tables(run)),
      section("Training", cards.cards(found, TRAINING), Html(_unchanging(run))),
      section("Time", cards.cards(found, TIME), sections.time(run)),
      section("Unreadable data", sections.bad_data(run)),
      section("Config", sections.config(run)) if run.config else "",
      section("Environment", sections.environment(run)),
      footer(run.time),
    ]
  )
  names = ("Loss", "Pictures", "Evaluation", "Training", "Time", "Unreadable data", "Config")
  title = f"{run.label}, step {run.step:,}"
  return whole(title, _nav(body, [*names, "Environment"]), body, page_data([run], cards.data))


def _samples_first(run: Run) -> list[str]:
  return sorted(run.pictures, key=lambda name: sections.kind(run, name)[0] != "Samples")


def overview_page(name: str, stages: Sequence[Run]) -> str:
  """The report of a folder of stages: the headline of each, and the way to its report."""
  cards, time = [], max(run.time for run in stages)
  for run in stages:
    newest = [(n, max(run.pictures[n])) for n in _samples_first(run)]
    frames = [
      sections.frame(step, run.pictures[n][step], sections.kind(run, n)[0]) for n, step in newest
    ]
    there = run.state != NOT_STARTED
    title = element("a", run.name, href=f"{run.name}/report.html") if there else run.name
    cards.append(
      element(
        "section",
        element("h2", title, " ", pill(run)),
        *([progress(run)] if there else []),
        element("p", run.note, class_="alert") if run.note else "",
        numbers.tiles(run),
        element("div", *frames, class_="newest") if frames else "",
        id=f"stage-{run.name}",
      )
    )
  done = sum(run.state == FINISHED for run in stages)
  words = f"{done} of {len(stages)} stages finished, as of {time}"
  header = element("header", element("h1", name), element("p", words, class_="note"))
  return whole(name, [], join([header, *cards, footer(time)]), page_data(stages, []))
