"""The numbers of a page: headline, tables over steps, tables over runs."""

from collections.abc import Iterable, Sequence

import numpy as np

from umd.report import series
from umd.report.charts import deviation
from umd.report.markup import Html, breakable, element, join, number, table
from umd.report.read import Run, section

TILES, COLUMNS = 12, 24
OPEN = ("fewshot", "generation", "reconstruction", "probe")  # Evaluators whose tables are unfolded.


def better(name: str, run: Run):
  """`min`, `max` or None; what decides on the best checkpoint counts first."""
  return series.direction(name, str(section(run.config, "checkpoint").get("best", "")))


def _tile(name: str, run: Run) -> Html:
  data = run.metrics[name]
  last, (prefix, _, last_part) = float(data.values[-1]), name.rpartition("/")
  function = better(name, run)
  best = series.best_step(data, function)
  arrow = {min: "lower is better", max: "higher is better"}.get(function)
  note = f"step {data.steps[-1]:,}"
  if best is not None and best != data.steps[-1]:
    value = data.values[data.steps == best][0]
    note = f"{note}; best {number(float(value))} at {best:,}"
  elif best is not None:
    note = f"{note}, the best so far"
  return element(
    "div",
    element(
      "dt",
      element("small", breakable(prefix)),
      " ",
      breakable(last_part),
      title=arrow,
    ),
    element("dd", element("b", number(last)), element("small", note)),
    class_="tile",
  )


def tiles(run: Run) -> Html:
  """The headline: newest values of what the config's `summary` names, or else of the loss."""
  names = [n for n in run.headline if deviation_of(n, run) is None]
  names = names or [n for n in ("loss",) if n in run.metrics]
  return element("dl", *(_tile(n, run) for n in names[:TILES]), class_="tiles") if names else Html()


def deviation_of(name: str, run: Run) -> str | None:
  """The metric whose deviation `name` is, None if it is none."""
  return next((n for n in run.metrics if deviation(n, run.metrics) == name), None)


def evaluators(run: Run) -> dict[str, list[str]]:
  """{evaluator: its metrics, numbers and words}, in the order of the log."""
  found = {}
  for name in (*run.metrics, *run.words):
    first, slash, _ = name.partition("/")
    if slash and first not in ("loss", "goodput"):
      found.setdefault(first, []).append(name)
  return found


def _columns(run: Run, names: Iterable[str], best: Iterable[int | None]) -> list[int]:
  """The steps that a table shows: all, or so many that it can be read, and the best."""
  steps = {int(s) for n in names if n in run.metrics for s in run.metrics[n].steps}
  steps |= {s for n in names if n in run.words for s in run.words[n]}
  return sorted({*series.spread(sorted(steps), COLUMNS), *(s for s in best if s is not None)})


def step_table(run: Run, title: str, names: Sequence[str]) -> Html:
  """Metrics of an evaluator by step, the best of each marked."""
  names = [n for n in names if deviation_of(n, run) is None]
  same = [n for n in names if _is_constant(run, n)]
  names = [n for n in names if n not in same]
  best = {n: series.best_step(run.metrics[n], better(n, run)) for n in names if n in run.metrics}
  steps = _columns(run, names, best.values())
  rows = []
  for name in names:
    cells = [breakable(name.removeprefix(f"{title}/"))]
    for step in steps:
      cells.append(_cell(run, name, step, best.get(name) == step))
    rows.append(cells)
  head = ["metric", *(f"{step:,}" for step in steps)]
  shown = table(head, rows, caption=f"{title} by step, the best of each metric marked")
  constant = ", ".join(f"{n.removeprefix(f'{title}/')} {_newest(run, n)}" for n in same)
  note = element("p", f"The same at every step: {constant}", class_="note") if same else ""
  return join([shown if names else "", note])


def _is_constant(run: Run, name: str) -> bool:
  """Whether a metric has several values, all the same."""
  found = list(run.words[name].values() if name in run.words else run.metrics[name].values)
  return len(found) > 1 and len(set(found)) == 1


def _newest(run: Run, name: str) -> str:
  words = run.words.get(name)
  return words[max(words)] if words else number(float(run.metrics[name].values[-1]))


def _cell(run: Run, name: str, step: int, is_best: bool) -> Html:
  if name in run.words:
    return element("td", run.words[name].get(step), class_="word")
  value = _at(run, name, step)
  if value is None:
    return element("td")
  spread = _at(run, deviation(name, run.metrics), step)
  shown = [number(value), element("small", f" ± {number(spread)}") if spread is not None else ""]
  mark = element("span", " best", class_="mark") if is_best else ""
  return element("td", *shown, mark, class_="best" if is_best else None)


def _at(run: Run, name: str, step: int) -> float | None:
  data = run.metrics.get(name)
  found = data.values[data.steps == step] if data else ()
  return float(found[0]) if len(found) else None


def step_tables(run: Run) -> Html:
  """Every evaluator's table, those of many details folded."""
  parts = []
  for name, metrics in evaluators(run).items():
    heading, unfold = element("summary", element("h3", name)), (run.evaluator(name) or name) in OPEN
    parts.append(element("details", heading, step_table(run, name, metrics), open=unfold))
  return join(parts)


def _last(run: Run, name: str) -> float | None:
  return float(run.metrics[name].values[-1]) if name in run.metrics else None


def _compared(runs: Sequence[Run], name: str) -> list:
  """A row of a table over runs: the name, and the newest value of every run."""
  values = [_last(run, name) for run in runs]
  finite = [v for v in values if v is not None and np.isfinite(v)]
  function = next((f for run in runs if (f := better(name, run))), None)
  best = function(finite) if function and len(set(finite)) > 1 else None
  cells = [breakable(name)]
  for value in values:
    is_best = value is not None and value == best
    mark = element("span", " best", class_="mark") if is_best else ""
    shown = "-" if value is None else number(value)
    cells.append(element("td", shown, mark, class_="best" if is_best else None))
  return cells


def final_table(
  runs: Sequence[Run], names: Sequence[str], caption: str, first: Sequence[list] = ()
) -> Html:
  """The newest values of metrics side by side, the best of each marked, below the `first` rows."""
  rows = [*first, *(_compared(runs, name) for name in names)]
  return table(["metric", *(run.label for run in runs)], rows, caption=caption)
