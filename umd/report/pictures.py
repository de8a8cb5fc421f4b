"""The pictures of a run, as they go into a page: not too many, not too large."""

import base64
import io
import re
import struct
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

from umd import workdir as folder
from umd.report import series

NAME = re.compile(r"(?P<name>.+)_(?P<step>\d{8,})\.png")
FRAMES = (12, 8, 5, 3, 2, 1)  # Steps of a kind of picture; fewer where they are too large.
BYTES = 6_000_000  # of all pictures of a page, about
AS_IS = 250_000  # Bytes; larger files are compressed with loss,
SIDE = 1200  # and shrunk to so many pixels.
SIGNATURE, END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


class Picture(NamedTuple):
  """A picture in a page: width and height in pixels, and its contents as an address "data:..."."""

  width: int
  height: int
  address: str


def encode(contents: bytes) -> Picture:
  """A PNG file for a page; a large one is shrunk.

  Raises:
    ValueError: it is no PNG file, or not whole.
  """
  if not contents.startswith(SIGNATURE) or not contents.endswith(END):
    raise ValueError("it is no PNG file, or not whole")
  width, height = struct.unpack(">II", contents[16:24])
  kind = "png"
  if len(contents) > AS_IS:
    from PIL import Image

    image = Image.open(io.BytesIO(contents)).convert("RGB")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    out, kind = io.BytesIO(), "webp"
    image.save(out, "webp", quality=85)
    contents, (width, height) = out.getvalue(), image.size
  return Picture(width, height, f"data:image/{kind};base64,{base64.b64encode(contents).decode()}")


def find(workdir: str) -> dict[str, dict[int, str]]:
  """{name: {step: path}} of what is in images/."""
  found, to_look = {}, [""]
  while to_look:
    inside = to_look.pop()
    for entry in folder.names(folder.join(workdir, "images", inside)):
      path = f"{inside}{entry}"
      if match := NAME.fullmatch(path):
        of_name = found.setdefault(match["name"], {})
        of_name[int(match["step"])] = folder.join(workdir, "images", path)
      elif "." not in entry:
        to_look.append(f"{path}/")
  return {name: dict(sorted(found[name].items())) for name in sorted(found)}


def load(
  paths: Mapping[str, Mapping[int, str]], known: MutableMapping[str, Picture], problems: list[str]
) -> dict[str, dict[int, Picture]]:
  """{name: {step: picture}}, spread over the steps, as many as fit into a page.

  Args:
    paths: {name: {step: path}}.
    known: pictures read before, by their paths; new ones are added.
    problems: what cannot be read is added.
  """
  broken = set()

  def picture(path):
    if path not in known and path not in broken:
      try:
        known[path] = encode(folder.read_bytes(path) or b"")
      except Exception as error:  # Whatever the file or the decoder comes up with.
        broken.add(path)
        problems.append(f"{path}: {error}")
    return known.get(path)

  for most in FRAMES:
    chosen = {
      name: {step: picture(steps[step]) for step in series.spread(list(steps), most)}
      for name, steps in paths.items()
    }
    total = sum(len(p.address) for steps in chosen.values() for p in steps.values() if p)
    if total <= BYTES:
      break
  return {name: {s: p for s, p in steps.items() if p} for name, steps in chosen.items()}
