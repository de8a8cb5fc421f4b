"""Which charts a page has, as data: its script draws them."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from umd.report import read
from umd.report.read import Run, Series

TOGETHER = 12  # Lines of one chart, where there is a choice.
LOSS, EVALUATION, TRAINING, TIME = "loss", "evaluation", "training", "time"


@dataclasses.dataclass(frozen=True)
class Line:
  """A metric of a run: shown as `name`, in colour `color`, with error bars `std` if there are."""

  name: str
  metric: str
  color: int
  data: Series
  std: Series | None = None


@dataclasses.dataclass(frozen=True)
class Chart:
  """Lines over steps in one of the sections; `shares` are stacked and sum to 1."""

  section: str
  title: str
  lines: list[Line]
  checkpoints: Sequence[int] = ()
  shares: bool = False


def section(name: str) -> str:
  """Where the charts of a metric are."""
  first, slash, _ = name.partition("/")
  if first == "loss":
    return LOSS
  paces = ("images_per_second", "teraflops_per_second", "mfu")
  if first in ("goodput", "input_wait", *paces):
    return TIME
  return EVALUATION if slash else TRAINING


def deviation(name: str, metrics) -> str:
  """The metric that is the deviation of `name`: "is_std_10k" of "is_10k", "a_std" of "a_mean"."""
  head, _, last = name.rpartition("/")
  kind, _, number = last.rpartition("_")
  for guess in (f"{last.removesuffix('_mean')}_std", f"{kind}_std_{number}"):
    path = f"{head}/{guess}" if head else guess
    if guess != last and path in metrics:
      return path
  return ""


def shown(run: Run) -> list[str]:
  """The metrics that make a line: values that differ, and no deviations."""
  deviations = {deviation(name, run.metrics) for name in run.metrics}
  varies = lambda s: len(np.unique(s.values[np.isfinite(s.values)])) > 1
  return [name for name, data in run.metrics.items() if name not in deviations and varies(data)]


def _group(name: str, run: Run, losses: int) -> str:
  """The title of the chart in which a metric of a run is drawn, with others."""
  prefix, _, _ = name.rpartition("/")
  first = name.partition("/")[0]
  if first == "loss":
    return "loss" if name == "loss" else "loss by term" if losses <= TOGETHER else prefix
  combined = name.count("/") > 1 or first == "goodput" or run.evaluator(name) == "fewshot"
  return prefix if combined else name


def of_run(run: Run) -> list[Chart]:
  """The charts of a run: what belongs together shares one."""
  names, groups = shown(run), {}
  losses = sum(name.startswith("loss/") for name in names)
  for name in names:
    groups.setdefault((section(name), _group(name, run, losses)), []).append(name)
  charts = []
  for (where, title), members in groups.items():
    cut = 5 if title == "loss by term" else len(title) + 1
    lines = [
      Line(name[cut:] or name, name, i, run.metrics[name], _std(name, run))
      for i, name in enumerate(members)
    ]
    charts.append(Chart(where, title, lines, run.checkpoints, title == "goodput"))
  return sorted(charts, key=lambda c: (c.section == LOSS and c.title != "loss", c.shares))


def _std(name: str, run: Run) -> Series | None:
  of = deviation(name, run.metrics)
  return run.metrics[of] if of else None


def of_comparison(runs: Sequence[Run], colors: Sequence[int]) -> list[Chart]:
  """A chart for every metric, a line for every run that has it."""
  names = dict.fromkeys(name for run in runs for name in shown(run))
  order = [LOSS, EVALUATION, TRAINING, TIME]
  charts = [
    Chart(
      section(name),
      name,
      [
        Line(run.label, name, color, run.metrics[name], _std(name, run))
        for run, color in zip(runs, colors, strict=True)
        if name in run.metrics
      ],
    )
    for name in names
  ]
  return sorted(charts, key=lambda c: (order.index(c.section), c.title != "loss"))


def rounded(values: np.ndarray) -> list[float | None]:
  """JSON has no NaN; six digits are more than can be seen."""
  return [float(f"{v:.6g}") if np.isfinite(v) else None for v in values]


def _line(line: Line, shares: bool) -> dict:
  # What is stacked must have the same steps.
  kept = read.means(line.data) if shares else read.thin(line.data)
  lost = line.data.steps[~np.isfinite(line.data.values)]
  found = {
    "name": line.name,
    "metric": line.metric,
    "color": line.color,
    "x": kept.steps.tolist(),
    "y": rounded(kept.values),
    "points": len(line.data.steps),
  }
  if len(kept.steps) < len(line.data.steps) and not shares:
    typical = read.means(line.data)
    found |= {"mean_x": typical.steps.tolist(), "mean_y": rounded(typical.values)}
  if len(lost):
    found |= {"not_finite": {"count": len(lost), "steps": lost[:5].tolist()}}
  if line.std is not None and np.array_equal(line.std.steps, kept.steps):
    found["std"] = rounded(line.std.values)
  return found


def as_json(chart: Chart) -> dict:
  """What the page's script reads."""
  return {
    "section": chart.section,
    "title": chart.title,
    "lines": [_line(line, chart.shares) for line in chart.lines],
    "checkpoints": list(map(int, read.spread(list(chart.checkpoints), 100))),
    "shares": chart.shares,
  }
