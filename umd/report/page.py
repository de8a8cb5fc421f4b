"""The pages of a run, and of a folder whose stages are runs."""

import base64
import functools
import gzip
import html
import importlib.util
import json
import os
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from umd.report import charts, read
from umd.report.charts import EVALUATION, LOSS, TIME, TRAINING, deviation
from umd.report.read import FINISHED, NOT_STARTED, Picture, Run
from umd.runs import workdir as folder
from umd.runs.progress import format_seconds

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


class Html(str):
  """Text that is markup already."""


class Cards:
  """Charts of a page, numbered as they come."""

  def __init__(self, legends: bool = True):
    """`legends`: whether each has one of its own."""
    self.data, self._legends = [], legends

  def cards(self, found: Sequence[charts.Chart], section: str) -> Html:
    """The charts of a section, side by side."""
    cards = [self._card(chart) for chart in found if chart.section == section]
    return element("div", *cards, class_="charts") if cards else Html()

  def _card(self, chart: charts.Chart) -> Html:
    place, wide = len(self.data), chart.title == "loss"
    self.data.append(charts.as_json(chart))
    newest = [f"{line.name} {number(float(line.data.values[-1]))}" for line in chart.lines[:6]]
    label = f"Curves of {chart.title} over steps; newest: {', '.join(newest)}"
    return element(
      "div",
      element("h3", chart.title),
      element("div", class_="plot", role="img", aria_label=label, data_chart=place),
      legend([(line.name, line.color) for line in chart.lines]) if self._legends else "",
      element("p", class_="note lost", hidden=True),
      class_="card wide" if wide else "card",
    )


def _group(stage: str, runs: Sequence[Run], cards: Cards) -> Html:
  colors = [i % COLORS for i in range(len(runs))]
  pictures = list(dict.fromkeys(name for run in runs for name in run.pictures))
  caption, rows = "Config values that differ", config_differences(runs)
  labels = [run.label for run in runs]
  different = differences(rows, labels, caption)
  part = lambda title, *inside: section(title, *inside, id_=f"{stage}-{title}".replace(" ", "-"))
  commands = [join([element("h3", run.label), found]) for run in runs if (found := command(run))]
  return element(
    "div",
    element("h2", stage, id=f"stage-{stage}", class_="stage") if stage else "",
    legend(list(zip(labels, colors, strict=True))),
    part("Newest numbers", *_numbers(runs)),
    part("Curves", *_curves(charts.of_comparison(runs, colors), cards)),
    part("Pictures", *(side_by_side(runs, name) for name in pictures)),
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
  parts = [final_table(runs, headline, "Newest headline numbers", [states, steps])]
  if others:
    rest = final_table(runs, list(others), "All other numbers")
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


COLORS = 8  # of the style sheet
POLICY = "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src "
POLICY += "'unsafe-inline'"


@functools.lru_cache
def _own(name: str) -> Html:
  """A file of this folder."""
  with open(os.path.join(os.path.dirname(__file__), name), encoding="utf-8") as f:
    return Html(f.read())


@functools.lru_cache
def plotly() -> str:
  """Plotly's script, 4.9 MB: compressed and in base64 it is 2.0 MB, which browsers can undo.

  Raises:
    FileNotFoundError: plotly is not installed.
  """
  found = importlib.util.find_spec("plotly")  # To import it would only take longer.
  if found is None:
    raise FileNotFoundError("plotly is not installed: pip install -r requirements.txt.")
  path = os.path.join(os.path.dirname(found.origin), "package_data", "plotly.min.js")
  with open(path, "rb") as f:
    return base64.b64encode(gzip.compress(f.read(), 6, mtime=0)).decode()


CONTROLS = Html(
  '<form class="controls" aria-label="Curves" hidden>'
  '<label>Smoothing <input type="range" id="smoothing" min="0" max="0.98" step="0.02" value="0">'
  '<output id="smoothing-value">0</output></label>'
  '<label><input type="checkbox" id="log"> Logarithmic</label>'
  '<label><input type="checkbox" id="checkpoints" checked> Checkpoints</label></form>'
)


def whole(title: str, nav: Sequence[tuple[str, str]], body: Html, data: dict) -> str:
  """A page.

  Args:
    title: of the window.
    nav: (id, name) of the sections.
    body: what is in it.
    data: for the script; "charts" is a list, see `charts.as_json`.
  """
  drawn = bool(data["charts"])
  library = element("script", Html(plotly()), type="text/plain", id="plotly") if drawn else ""
  links = [element("a", name, href=f"#{id_}") for id_, name in nav]
  head = element(
    "head",
    element("meta", charset="utf-8"),
    element("meta", http_equiv="Content-Security-Policy", content=POLICY),
    element("meta", name="viewport", content="width=device-width, initial-scale=1"),
    element("meta", name="color-scheme", content="light dark"),
    element("title", title),
    element("link", rel="icon", href="data:,"),
    element("style", _own("page.css")),
  )
  contents = element(
    "body",
    element(
      "div",
      element("nav", *links, aria_label="Sections") if links else "",
      CONTROLS if drawn else "",
      class_="bar",
    )
    if links or drawn
    else "",
    element("noscript", element("p", "The curves need JavaScript; the tables do not.")),
    element("main", body),
    script_data(data, "report-data"),
    library,
    element("script", _own("page.js")),
  )
  return "<!doctype html>\n" + element("html", head, contents, lang="en") + "\n"


def pill(run: Run) -> Html:
  return element("span", run.state, class_=f"pill {run.state.replace(' ', '-')}")


def progress(run: Run) -> Html:
  """How far it has come."""
  if not run.steps:
    return element("p", f"step {run.step:,}", class_="progress")
  share = min(1.0, run.step / run.steps)
  return element(
    "p",
    element("progress", max=run.steps, value=min(run.step, run.steps), aria_label="Progress"),
    f" step {run.step:,} of {run.steps:,} ({share:.0%})",
    class_="progress",
  )


def header(run: Run) -> Html:
  notes = [element("p", run.note, class_="alert")] if run.note else []
  if run.problems:
    items = (element("li", p) for p in run.problems)
    notes.append(element("div", "Could not be read: ", element("ul", *items), class_="alert"))
  return element(
    "header",
    element("h1", run.label, " ", pill(run)),
    progress(run),
    element("p", f"{read.whole(run.folder)}, as of {run.time}", class_="note path"),
    *notes,
  )


def section(name: str, *parts, id_: str = "") -> Html:
  """A section with a heading; nothing if there is nothing in it."""
  if not any(parts):
    return Html()
  heading = element("h2", name)
  return element("section", heading, *parts, id=id_ or name.lower().replace(" ", "-"))


def legend(lines: Sequence[tuple[str, int]]) -> Html:
  """Names of lines beside their colours, each a button that hides its line; none for one line."""
  items = (
    element(
      "li",
      element(
        "button",
        element("span", class_=f"swatch c{color % COLORS}"),
        name,
        type="button",
        aria_pressed="true",
        data_line=name,
      ),
    )
    for name, color in lines
  )
  return element("ul", *items, class_="legend") if len(lines) > 1 else Html()


def footer(time: str) -> Html:
  return element("footer", f"Written by umd, {time}.")


def page_data(runs: Sequence[Run], drawn: list[dict]) -> dict:
  """What the script needs, and what other programs may want to read: all newest numbers."""
  about = [
    {
      "label": run.label,
      "state": run.state,
      "step": run.step,
      "steps": run.steps,
      "headline": run.headline,
      "latest": {n: charts.rounded(s.values[-1:])[0] for n, s in run.metrics.items()},
      "words": {n: values[max(values)] for n, values in run.words.items()},
      "changed": folder.differences(run.default, run.config) if run.default else None,
    }
    for run in runs
  ]
  return {"runs": about, "charts": drawn}


def text(value) -> Html:
  """A value as markup: escaped, unless it is markup; nothing for None."""
  if isinstance(value, Html):
    return value
  return Html("" if value is None else html.escape(str(value)))


def join(parts) -> Html:
  """Values one after the other."""
  return Html("".join(map(text, parts)))


VOID = ("img", "input", "meta", "link")


def element(tag: str, *children, **attributes) -> Html:
  """<tag attribute="value">children</tag>.

  Args:
    tag: name of the element.
    *children: markup, or values that are escaped.
    **attributes: data_step is data-step, class_ is class; True stands alone, None and False are
      left out.
  """
  shown = {k.rstrip("_").replace("_", "-"): v for k, v in attributes.items()}
  given = "".join(
    f" {k}" if v is True else f' {k}="{html.escape(str(v))}"'
    for k, v in shown.items()
    if v is not None and v is not False
  )
  end = "" if tag in VOID else f"{join(children)}</{tag}>"
  return Html(f"<{tag}{given}>{end}")


def table(head, rows, *, caption: str, class_: str | None = None) -> Html:
  """A table that scrolls inside its own box; the first cell of a row is its heading.

  Args:
    head: cells of the first row; left out if they are all empty.
    rows: lists of cells, each a value or a <td> (markup that begins so).
    caption: what it is, for screen readers.
    class_: of the box.
  """

  def cell(value):
    return value if isinstance(value, Html) and value.startswith("<td") else element("td", value)

  heads = (element("th", h, scope="col") for h in head)
  body = (
    element("tr", element("th", row[0], scope="row"), *map(cell, row[1:]))
    for row in map(list, rows)
  )
  whole = element(
    "table",
    element("caption", caption),
    element("thead", element("tr", *heads)) if any(head) else "",
    element("tbody", *body),
  )
  box = f"scroll {class_ or ''}".strip()
  return element("div", whole, class_=box, tabindex="0", role="region", aria_label=caption)


def script_data(value, name: str) -> Html:
  """A value as JSON in a <script>, which no text in it can end; not-finite numbers are an error."""
  contents = json.dumps(value, allow_nan=False, separators=(",", ":"))
  for sign in "<>&\u2028\u2029":
    contents = contents.replace(sign, f"\\u{ord(sign):04x}")
  return Html(f'<script type="application/json" id="{name}">{contents}</script>')


def breakable(name: str) -> Html:
  """A metric's or key's name, which may go on in the next line after "_", "/" and "."."""
  shown = text(name)
  for sign in "_/.":
    shown = shown.replace(sign, f"{sign}<wbr>")
  return Html(shown)


def number(value) -> str:
  """Four digits that count; long whole numbers in full."""
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return str(value)
  if float(value).is_integer() and abs(value) < 1e7:
    return f"{value:,.0f}"
  return f"{value:.4g}"


TILES, COLUMNS = 12, 24
OPEN = ("fewshot", "generation", "reconstruction", "probe")  # Evaluators whose tables are unfolded.


def better(name: str, run: Run):
  """`min`, `max` or None; what decides on the best checkpoint counts first."""
  return read.direction(name, str(read.section(run.config, "checkpoint").get("best", "")))


def _tile(name: str, run: Run) -> Html:
  data = run.metrics[name]
  last, (prefix, _, last_part) = float(data.values[-1]), name.rpartition("/")
  function = better(name, run)
  best = read.best_step(data, function)
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
  return sorted({*read.spread(sorted(steps), COLUMNS), *(s for s in best if s is not None)})


def step_table(run: Run, title: str, names: Sequence[str]) -> Html:
  """Metrics of an evaluator by step, the best of each marked."""
  names = [n for n in names if deviation_of(n, run) is None]
  same = [n for n in names if _is_constant(run, n)]
  names = [n for n in names if n not in same]
  best = {n: read.best_step(run.metrics[n], better(n, run)) for n in names if n in run.metrics}
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


EVALUATORS = {
  "generation": ("Samples", "drawn from the same noise at every step"),
  "reconstruction": ("Reconstructions", "original, masked and filled in, of the same images"),
}
BAD_LINES = 20


def kind(run: Run, name: str) -> tuple[str, str]:
  """(title, explanation) of the pictures of that name."""
  return EVALUATORS.get(run.evaluator(name), (name, ""))


def frame(step: int, picture: Picture, title: str, label: str = "") -> Html:
  """A picture of a step with its caption."""
  caption = f"{label + ', ' if label else ''}step {step:,}"
  alt = f"{title} at {caption}"
  image = element("img", src=picture.address, width=picture.width, height=picture.height, alt=alt)
  return element("figure", image, element("figcaption", caption), data_step=step)


def gallery(run: Run, name: str) -> Html:
  """The pictures of a name; the page's script shows one at a time, with a slider."""
  title, explanation = kind(run, name)
  frames = [frame(step, picture, title) for step, picture in run.pictures[name].items()]
  return element(
    "div",
    element("h3", title, " ", element("small", name)),
    element("p", explanation, class_="note") if explanation else "",
    element("div", *frames, class_="frames", tabindex="0", role="region", aria_label=title),
    class_="gallery card",
    data_gallery=True,
  )


def side_by_side(runs: Sequence[Run], name: str) -> Html:
  """Pictures of runs beside each other; the script shows of each the one nearest to a step."""
  having = [run for run in runs if name in run.pictures]
  title, _ = kind(having[0], name)
  columns = []
  for run in having:
    frames = (frame(s, picture, title, run.label) for s, picture in run.pictures[name].items())
    place = {"tabindex": "0", "role": "region", "aria_label": f"{title}, {run.label}"}
    columns.append(element("div", element("div", *frames, class_="frames", **place)))
  return element(
    "div",
    element("h3", title, " ", element("small", name)),
    element("div", *columns, class_="beside"),
    class_="gallery card",
    data_gallery=True,
  )


def value(found) -> Html:
  """A value of a config."""
  return element("code", "-" if found is None else json.dumps(found, ensure_ascii=False))


def differences(rows: Mapping[str, Sequence], head: Sequence[str], caption: str) -> Html:
  """A table of config values: {key: a value for each column}."""
  cells = [[element("code", breakable(key)), *map(value, values)] for key, values in rows.items()]
  return table(["key", *head], cells, caption=caption, class_="values")


def tree(config: Mapping, changed: Mapping, prefix: str = "") -> Html:
  """A config that folds, with what is not the default marked."""
  items = []
  for key, found in config.items():
    path = f"{prefix}{key}"
    if isinstance(found, dict) and found:
      inside = any(k.startswith(f"{path}.") for k in changed)
      summary = element("summary", element("code", key, class_="changed" if inside else None))
      items.append(element("li", element("details", summary, tree(found, changed, f"{path}."))))
    else:
      mark = "changed" if path in changed else None
      items.append(element("li", element("code", f"{key}: "), value(found), class_=mark))
  return element("ul", *items, class_="tree")


def config(run: Run) -> Html:
  """What the run was told to do: what differs from the file's defaults, changes, and the whole."""
  changed = folder.differences(run.default, run.config) if run.default else {}
  parts = []
  if run.default is None:
    parts.append(element("p", "What the config's file says by itself was not written down."))
  elif changed:
    caption = "Values that differ from the defaults of the config's file"
    parts += [element("h3", caption), differences(changed, ("default", "this run"), caption)]
  else:
    parts.append(element("p", "All values are the defaults of the config's file."))
  if run.changes:
    caption = "Changes between two starts of the run"
    rows = [
      [element("code", c.get("key")), c.get("time"), value(c.get("old")), value(c.get("new"))]
      for c in run.changes
    ]
    parts += [element("h3", caption)]
    parts += [table(["key", "time", "old", "new"], rows, caption=caption, class_="values")]
  summary = element("summary", element("h3", "The whole config"))
  parts.append(element("details", summary, tree(run.config, changed)))
  return join(parts)


def time(run: Run) -> Html:
  """Where the wall time went."""
  total = sum(run.seconds.values())
  if not total:
    return Html()
  order = sorted(run.seconds.items(), key=lambda item: -item[1])
  rows = [
    [name.replace("_", " "), format_seconds(seconds), f"{seconds / total:.1%}"]
    for name, seconds in order
  ]
  rows.append(["all", format_seconds(total), "100%"])
  return table(
    ["", "time", "share"],
    rows,
    caption="Where the wall time went, over all starts",
    class_="narrow",
  )


def bad_data(run: Run) -> Html:
  """Examples that could not be read: how many, and the first of them."""
  parts = []
  for name, lines in run.bad_data.items():
    more = len(lines) - BAD_LINES
    text = "\n".join(lines[:BAD_LINES]) + (f"\n… and {more:,} more" if more > 0 else "")
    parts.append(element("p", f"{len(lines):,} lines in ", element("code", name)))
    parts.append(element("pre", text, tabindex="0"))
  return join(parts)


def command(run: Run) -> Html:
  """The command of the newest start."""
  found = run.environment.get("command")
  shown = shlex.join(map(str, found)) if isinstance(found, list) else ""
  return element("pre", shown, tabindex="0") if shown else Html()


def environment(run: Run) -> Html:
  """Command, devices and versions of the newest start."""
  about, rows = run.environment, []
  devices = about.get("devices")
  if isinstance(devices, list):
    kind_, places = about.get("device_kind", ""), Counter(str(d).split(":")[0] for d in devices)
    rows.append(["devices", f"{len(devices)} x {kind_ or ', '.join(places)}"])
  for key in ("backend", "processes", "started", "python", "platform"):
    if key in about:
      rows.append([key, about[key]])
  versions = about.get("versions")
  rows += list(versions.items()) if isinstance(versions, dict) else []
  parts = [found] if (found := command(run)) else []
  if rows:
    cells = [[k, number(v)] for k, v in rows]
    parts.append(
      table(["", ""], cells, caption="The machine and the packages", class_="values narrow")
    )
  return join(parts)


def _nav(body: Html, names: Sequence[str]) -> list[tuple[str, str]]:
  ids = [(name.lower().replace(" ", "-"), name) for name in names]
  return [(id_, name) for id_, name in ids if f'<section id="{id_}"' in body]


def _unchanging(run: Run) -> Html:
  """The metrics of training that are not drawn since they stay what they are."""
  drawn = charts.shown(run)
  flat = [n for n in run.metrics if n not in drawn and charts.section(n) in (LOSS, TRAINING)]
  values = ", ".join(f"{n} {number(float(run.metrics[n].values[-1]))}" for n in flat)
  return element("p", f"Not drawn, since it does not change: {values}", class_="note") * bool(flat)


def run_page(run: Run) -> str:
  """The report of a run."""
  found, cards = charts.of_run(run), Cards()
  galleries = element(
    "div", *(gallery(run, name) for name in _samples_first(run)), class_="galleries"
  )
  body = join(
    [
      header(run),
      tiles(run),
      section("Loss", cards.cards(found, LOSS)),
      section("Pictures", galleries if run.pictures else ""),
      section("Evaluation", cards.cards(found, EVALUATION), step_tables(run)),
      section("Training", cards.cards(found, TRAINING), Html(_unchanging(run))),
      section("Time", cards.cards(found, TIME), time(run)),
      section("Unreadable data", bad_data(run)),
      section("Config", config(run)) if run.config else "",
      section("Environment", environment(run)),
      footer(run.time),
    ]
  )
  names = ("Loss", "Pictures", "Evaluation", "Training", "Time", "Unreadable data", "Config")
  title = f"{run.label}, step {run.step:,}"
  return whole(title, _nav(body, [*names, "Environment"]), body, page_data([run], cards.data))


def _samples_first(run: Run) -> list[str]:
  return sorted(run.pictures, key=lambda name: kind(run, name)[0] != "Samples")


def overview_page(name: str, stages: Sequence[Run]) -> str:
  """The report of a folder of stages: the headline of each, and the way to its report."""
  cards, time = [], max(run.time for run in stages)
  for run in stages:
    newest = [(n, max(run.pictures[n])) for n in _samples_first(run)]
    frames = [frame(step, run.pictures[n][step], kind(run, n)[0]) for n, step in newest]
    there = run.state != NOT_STARTED
    title = element("a", run.name, href=f"{run.name}/report.html") if there else run.name
    cards.append(
      element(
        "section",
        element("h2", title, " ", pill(run)),
        *([progress(run)] if there else []),
        element("p", run.note, class_="alert") if run.note else "",
        tiles(run),
        element("div", *frames, class_="newest") if frames else "",
        id=f"stage-{run.name}",
      )
    )
  done = sum(run.state == FINISHED for run in stages)
  words = f"{done} of {len(stages)} stages finished, as of {time}"
  header = element("header", element("h1", name), element("p", words, class_="note"))
  return whole(name, [], join([header, *cards, footer(time)]), page_data(stages, []))
