"""Turns runs into pages: curves become plotly's JSON, tables rows of cells, for the templates."""

import base64
import dataclasses
import functools
import gzip
import importlib.resources
import json
import shlex
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jinja2
import numpy as np

from umd.report import read
from umd.report.read import NOT_STARTED, Run, Series
from umd.runs import workdir
from umd.runs.progress import format_seconds

LOSS, EVALUATION, TRAINING, TIME = "Loss", "Evaluation", "Training", "Time"
SECTIONS = (LOSS, EVALUATION, TRAINING, TIME)
# At least 3:1 against white and against the dark page.
COLORS = ("#2f7de1", "#d9680f", "#0d9488", "#a855f7", "#db2777", "#5f9b12", "#0891b2", "#78808c")
DASHES = ("solid", "dash", "dot", "dashdot")  # for more lines than colors
TERMS = 12  # Up to so many terms of the loss share a chart; beyond, each stream has one of its own.
MARKERS = 40  # A line with fewer points shows them.
TILES = 12
COLUMNS = 24  # of a table by step
BAD_LINES = 20
PICTURES = {
  "generation": ("Samples", "drawn from the same noise at every step"),
  "reconstruction": ("Reconstructions", "original, masked and filled in, of the same images"),
}
UNFOLDED = ("fewshot", "generation", "reconstruction", "probe")  # types of evaluators
FOLDED_CURVES = {"losses/": "Losses by timestep", "goodput/": "Shares of the wall time"}


class Line(NamedTuple):
  """A metric in a chart; `std` holds its error bars if there are any."""

  name: str
  color: int
  series: Series
  std: Series | None


@dataclasses.dataclass(frozen=True)
class Chart:
  """Lines over steps; with `shares` they are stacked and sum to 1."""

  section: str
  title: str
  lines: list[Line]
  checkpoints: Sequence[int] = ()
  shares: bool = False


class Cell(NamedTuple):
  """A number or a word in a table."""

  text: str = ""
  std: str = ""
  is_best: bool = False


def number(value) -> str:
  """Formats a number with four significant digits, whole numbers up to 10^7 in full."""
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return str(value)
  if float(value).is_integer() and abs(value) < 1e7:
    return f"{value:,.0f}"
  return f"{value:.4g}"


# Curves


def rounded(values: np.ndarray) -> list[float | None]:
  """Returns values as JSON, which has no NaN; more than six digits cannot be seen."""
  return [float(f"{v:.6g}") if np.isfinite(v) else None for v in values]


def section_of(metric: str) -> str:
  """Returns the section of the page that shows a metric."""
  first, slash, _ = metric.partition("/")
  if first == "loss":
    return LOSS
  if first in ("goodput", "input_wait", "images_per_second", "teraflops_per_second", "mfu"):
    return TIME
  return EVALUATION if slash else TRAINING


def drawn(run: Run) -> list[str]:
  """Returns the metrics that have a line: those of several steps, without deviations."""
  return [name for name in without_deviations(run, run.metrics) if len(run.metrics[name].steps) > 1]


def without_deviations(run: Run, names: Iterable[str]) -> list[str]:
  """Returns the metrics that are not the deviation of another one."""
  deviations = {read.deviation(name, run.metrics) for name in run.metrics}
  return [name for name in names if name not in deviations]


def _line(run: Run, metric: str, name: str, color: int) -> Line:
  std = run.metrics.get(read.deviation(metric, run.metrics))
  return Line(name, color, run.metrics[metric], std)


def _chart_of(metric: str, run: Run, terms: int) -> str:
  """Returns the title of the chart that a metric shares with others; `terms` counts the losses."""
  prefix, first = metric.rpartition("/")[0], metric.partition("/")[0]
  if metric == "loss":
    return metric
  if first == "loss":
    return "loss by term" if terms <= TERMS else prefix
  shares = metric.count("/") > 1 or first == "goodput" or run.evaluator(metric) == "fewshot"
  return prefix if shares else metric


def charts_of_run(run: Run) -> list[Chart]:
  """Returns the charts of a run; metrics that belong together share one."""
  names, groups = drawn(run), {}
  terms = sum(name.startswith("loss/") for name in names)
  for name in names:
    groups.setdefault(_chart_of(name, run, terms), []).append(name)
  charts = []
  for title, members in groups.items():
    prefix = "loss/" if title == "loss by term" else f"{title}/"
    lines = [_line(run, m, m.removeprefix(prefix), i) for i, m in enumerate(members)]
    shares = title == "goodput"
    charts.append(Chart(section_of(members[0]), title, lines, run.checkpoints, shares))
  return sorted(charts, key=lambda c: (c.section == LOSS and c.title != "loss", c.shares))


def charts_of_comparison(runs: Sequence[Run]) -> list[Chart]:
  """Returns a chart for every metric, with a line for every run that has it."""
  charts = []
  for name in dict.fromkeys(name for run in runs for name in drawn(run)):
    having = [(i, run) for i, run in enumerate(runs) if name in run.metrics]
    lines = [_line(run, name, run.label, color) for color, run in having]
    charts.append(Chart(section_of(name), name, lines))
  return sorted(charts, key=lambda c: (SECTIONS.index(c.section), c.title != "loss"))


def _trace(line: Line, chart: Chart) -> dict:
  """Returns plotly's trace of a line; `meta` holds its means, which the page smooths."""
  # Stacked lines need the same steps, and minima and maxima do not sum to 1.
  series = read.means(line.series) if chart.shares else read.thin(line.series)
  style = {"color": COLORS[line.color % len(COLORS)], "width": 1.8}
  style["dash"] = DASHES[line.color // len(COLORS) % len(DASHES)]
  trace = {
    "type": "scatter",
    "name": line.name,
    "x": series.steps.tolist(),
    "y": rounded(series.values),
    "mode": "lines+markers" if len(series.steps) < MARKERS and not chart.shares else "lines",
    "line": style,
    "hovertemplate": "%{y:.1%}" if chart.shares else "%{y:.5g}",
  }
  if chart.shares:
    trace["stackgroup"] = "shares"
  elif chart.section != EVALUATION:
    means = read.means(line.series)
    trace["meta"] = {"x": means.steps.tolist(), "y": rounded(means.values)}
  if line.std is not None and np.array_equal(line.std.steps, series.steps):
    trace["error_y"] = {"type": "data", "array": rounded(line.std.values), "thickness": 1}
  return trace


def figure(chart: Chart) -> dict:
  """Returns a chart as the JSON that `Plotly.react` takes; its text gets its color from the CSS."""
  axis = {"zeroline": False, "automargin": True, "nticks": 7}
  mark = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "layer": "below"}
  mark["line"] = {"color": "#78808c", "width": 1, "dash": "dot"}
  layout = {
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "font": {"family": "system-ui, sans-serif", "size": 12},
    "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
    "hovermode": "x unified",
    "modebar": {"bgcolor": "rgba(0,0,0,0)"},
    "showlegend": False,  # The page has its own, which wraps on a phone and spans several charts.
    "xaxis": {**axis, "title": {"text": "step"}, "tickformat": "~s", "hoverformat": ",d"},
    "yaxis": {**axis, "tickformat": "~g", "exponentformat": "e"},
    "shapes": [{**mark, "x0": s, "x1": s} for s in read.spread(chart.checkpoints, 100)],
  }
  if chart.shares:
    layout["yaxis"] |= {"tickformat": ".0%", "range": [0, 1]}
  return {"data": [_trace(line, chart) for line in chart.lines], "layout": layout}


def _not_finite(line: Line) -> str:
  steps, values = line.series
  lost = steps[~np.isfinite(values)]
  if not len(lost):
    return ""
  return (
    f"{line.name}: {len(lost):,} of {len(steps):,} values not finite, first at step {lost[0]:,}"
  )


def cards(charts: Iterable[Chart]) -> list[dict]:
  """Returns what the template shows of each chart."""
  shown = []
  for chart in charts:
    newest = (f"{line.name} {number(line.series.last)}" for line in chart.lines[:6])
    card = {"title": chart.title, "newest": ", ".join(newest), "figure": figure(chart)}
    card["notes"] = [note for line in chart.lines if (note := _not_finite(line))]
    card["legend"] = legend([line.name for line in chart.lines])
    shown.append(card)
  return shown


def legend(names: Sequence[str]) -> list[tuple[str, str]]:
  """Returns (name, color) of lines; a single line needs no legend."""
  return [(n, COLORS[i % len(COLORS)]) for i, n in enumerate(names)] if len(names) > 1 else []


# Tables


def tiles(run: Run) -> list[dict]:
  """Returns the newest values of the headline's metrics, or of the loss if there are none."""
  names = without_deviations(run, run.headline) or [n for n in ("loss",) if n in run.metrics]
  shown = []
  for name in names[:TILES]:
    series = run.metrics[name]
    last, best = int(series.steps[-1]), read.best_step(series, run.direction(name))
    note = f"step {last:,}"
    if best is not None:
      at_best = f"; best {number(series.at(best))} at {best:,}"
      note += ", the best so far" if best == last else at_best
    prefix, _, metric = name.rpartition("/")
    shown.append(dict(prefix=prefix, name=metric, value=number(series.last), note=note))
  return shown


def _values(run: Run, name: str) -> dict[int, float | str]:
  """Returns {step: value} of a metric, a number or a word."""
  if name in run.words:
    return run.words[name]
  return dict(zip(run.metrics[name].steps.tolist(), run.metrics[name].values.tolist(), strict=True))


def _cell(run: Run, name: str, step: int, best: int | None) -> Cell:
  value, std = _values(run, name).get(step), run.metrics.get(read.deviation(name, run.metrics))
  spread = std.at(step) if std else None
  text = "" if value is None else number(value)
  return Cell(text, "" if spread is None else number(spread), step == best)


def step_tables(run: Run) -> list[dict]:
  """Returns a table for each evaluator: metrics by step, the best value of each marked."""
  evaluators = {}
  for name in without_deviations(run, (*run.metrics, *run.words)):
    first, slash, _ = name.partition("/")
    if slash and first not in ("loss", "goodput"):
      evaluators.setdefault(first, []).append(name)
  tables = []
  for evaluator, names in evaluators.items():
    best = {n: read.best_step(run.metrics[n], run.direction(n)) for n in names if n in run.metrics}
    every = sorted({step for name in names for step in _values(run, name)})
    steps = sorted({*read.spread(every, COLUMNS), *(s for s in best.values() if s is not None)})
    rows = [
      (name.removeprefix(f"{evaluator}/"), [_cell(run, name, s, best.get(name)) for s in steps])
      for name in names
    ]
    head = ["metric", *(f"{step:,}" for step in steps)]
    is_open = (run.evaluator(evaluator) or evaluator) in UNFOLDED
    tables.append(dict(title=evaluator, head=head, rows=rows, open=is_open))
  return tables


def newest_table(runs: Sequence[Run], names: Iterable[str]) -> list[tuple[str, list[Cell]]]:
  """Returns rows (metric, its newest value for each run), the best of each marked."""
  rows = []
  for name in names:
    values = [run.metrics[name].last if name in run.metrics else None for run in runs]
    finite = [v for v in values if v is not None and np.isfinite(v)]
    better = next((f for run in runs if (f := run.direction(name))), None)
    best = better(finite) if better and len(set(finite)) > 1 else None
    cells = (Cell("-" if v is None else number(v), "", v is not None and v == best) for v in values)
    rows.append((name, list(cells)))
  return rows


def config_differences(runs: Sequence[Run]) -> dict[str, list]:
  """Returns {key: a value for each run} of config values that differ; None for absent."""
  configs = [workdir.flatten(run.config) for run in runs]
  rows = {key: [c.get(key) for c in configs] for key in sorted(set().union(*configs))}
  return {key: values for key, values in rows.items() if any(v != values[0] for v in values)}


def time_table(run: Run) -> list[tuple[str, list[Cell]]]:
  """Returns rows (activity, [wall time, share]), the longest first."""
  total = sum(run.seconds.values())
  order = sorted(run.seconds.items(), key=lambda item: -item[1]) if total else []
  rows = [*order, ("all", total)] if order else []
  return [
    (kind.replace("_", " "), [Cell(format_seconds(s)), Cell(f"{s / total:.1%}")])
    for kind, s in rows
  ]


def command(run: Run) -> str:
  """Returns the command of the newest start, "" if it is not known."""
  words = run.environment.get("command")
  return shlex.join(map(str, words)) if isinstance(words, list) else ""


def environment_table(run: Run) -> list[tuple[str, list[Cell]]]:
  """Returns rows about the machine and the packages of the newest start."""
  about, rows = run.environment, {}
  if isinstance(devices := about.get("devices"), list):
    rows["devices"] = f"{len(devices)} x {about.get('device_kind', 'unknown')}"
  rows |= {
    k: about[k] for k in ("backend", "processes", "started", "python", "platform") if k in about
  }
  rows |= read.section(about, "versions")
  return [(name, [Cell(number(value))]) for name, value in rows.items()]


# Pages


def galleries(runs: Sequence[Run]) -> list[dict]:
  """Returns the pictures of each kind, samples first, with a row for each run that has them."""
  shown = []
  for name in dict.fromkeys(name for run in runs for name in run.pictures):
    having = [run for run in runs if name in run.pictures]
    title, text = PICTURES.get(having[0].evaluator(name), (name, ""))
    rows = [(run.label if len(runs) > 1 else "", run.pictures[name]) for run in having]
    steps = sorted({step for _, pictures in rows for step in pictures})
    shown.append(dict(title=title, name=name, text=text, rows=rows, steps=steps))
  return sorted(shown, key=lambda gallery: gallery["title"] != "Samples")


def about(run: Run) -> dict:
  """Returns what other programs may want to read in the page."""
  return {
    **{name: getattr(run, name) for name in ("label", "state", "step", "steps", "headline")},
    "latest": {name: rounded(series.values[-1:])[0] for name, series in run.metrics.items()},
    "words": {name: texts[max(texts)] for name, texts in run.words.items()},
  }


@functools.cache
def _templates() -> jinja2.Environment:
  # With autoescape no name or text of a run is ever taken for markup.
  templates = jinja2.Environment(
    loader=jinja2.PackageLoader("umd.report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  templates.policies["json.dumps_kwargs"] = {"allow_nan": False}
  templates.filters["code"] = lambda value: "-" if value is None else json.dumps(value)
  templates.filters["pretty"] = lambda value: json.dumps(value, indent=2)
  return templates


@functools.cache
def _plotly() -> str:
  """Returns plotly's script, 4.9 MB, compressed to 2.0 MB that a browser can unpack."""
  script = importlib.resources.files("plotly") / "package_data" / "plotly.min.js"
  return base64.b64encode(gzip.compress(script.read_bytes(), 6, mtime=0)).decode()


def _render(template: str, runs: Sequence[Run], has_curves: bool, **context) -> str:
  page = _templates().get_template(template)
  data = {"runs": [about(run) for run in runs]}
  plotly = _plotly() if has_curves else ""
  return page.render(data=data, plotly=plotly, time=runs[0].time, command=command, **context)


def run_page(run: Run) -> str:
  """Returns the report of a run."""
  charts = charts_of_run(run)
  return _render(
    "run.html",
    [run],
    bool(charts),
    run=run,
    tiles=tiles(run),
    cards={s: cards(c for c in charts if c.section == s) for s in SECTIONS},
    galleries=galleries([run]),
    tables=step_tables(run),
    seconds=time_table(run),
    bad_lines=BAD_LINES,
    changed=workdir.differences(run.default, run.config) if run.default else {},
    environment=environment_table(run),
  )


def overview_page(name: str, stages: Sequence[Run]) -> str:
  """Returns the report of a folder with stages: the headline of each and a link to its report."""
  return _render(
    "overview.html",
    stages,
    False,
    name=name,
    stages=stages,
    tiles=tiles,
    not_started=NOT_STARTED,
  )


def comparison_page(groups: dict[str, list[Run]]) -> str:
  """Returns the comparison of runs.

  Args:
    groups: {stage: its runs}; one group "" for runs that have no stages.
  """
  contents, has_curves = [], False
  for stage, runs in groups.items():
    charts = charts_of_comparison(runs)
    has_curves |= bool(charts)
    folded = {prefix: [c for c in charts if c.title.startswith(prefix)] for prefix in FOLDED_CURVES}
    plain = [c for c in charts if not c.title.startswith(tuple(FOLDED_CURVES))]
    headline = list(dict.fromkeys(name for run in runs for name in run.headline))
    others = dict.fromkeys(n for run in runs for n in run.metrics if n not in headline)
    contents.append(
      dict(
        stage=stage,
        runs=runs,
        legend=legend([run.label for run in runs]),
        headline=newest_table(runs, headline),
        others=newest_table(runs, others),
        cards={s: cards(c for c in plain if c.section == s) for s in SECTIONS},
        folded={FOLDED_CURVES[prefix]: cards(c) for prefix, c in folded.items()},
        galleries=galleries(runs),
        different=config_differences(runs),
      )
    )
  runs = [run for members in groups.values() for run in members]
  return _render("comparison.html", runs, has_curves, groups=contents)
