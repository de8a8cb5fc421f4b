"""The parts of a page that are no numbers: pictures, config, time and environment."""

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence

from umd import workdir as folder
from umd.progress import format_seconds
from umd.report.markup import Html, breakable, element, join, number, table
from umd.report.pictures import Picture
from umd.report.read import Run

KINDS = {
  "generation": ("Samples", "drawn from the same noise at every step"),
  "reconstruction": ("Reconstructions", "original, masked and filled in, of the same images"),
}
BAD_LINES = 20


def kind(run: Run, name: str) -> tuple[str, str]:
  """(title, explanation) of the pictures of that name."""
  return KINDS.get(run.evaluator(name), (name, ""))


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
