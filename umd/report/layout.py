"""What all pages have in common: one file each, which asks the network for nothing."""

import base64
import functools
import gzip
import importlib.util
import os
from collections.abc import Sequence

from umd import workdir as folder
from umd.report import charts, markup, read
from umd.report.markup import Html, element
from umd.report.read import Run

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
    markup.script_data(data, "report-data"),
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
    number, wide = len(self.data), chart.title == "loss"
    self.data.append(charts.as_json(chart))
    newest = [
      f"{line.name} {markup.number(float(line.data.values[-1]))}" for line in chart.lines[:6]
    ]
    label = f"Curves of {chart.title} over steps; newest: {', '.join(newest)}"
    return element(
      "div",
      element("h3", chart.title),
      element("div", class_="plot", role="img", aria_label=label, data_chart=number),
      legend([(line.name, line.color) for line in chart.lines]) if self._legends else "",
      element("p", class_="note lost", hidden=True),
      class_="card wide" if wide else "card",
    )


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
