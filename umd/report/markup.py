"""HTML from values: whatever is not markup already is escaped, so that no name can break a page."""

import html
import json


class Html(str):
  """Text that is markup already."""


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
