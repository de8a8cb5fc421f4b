"""What the parts of the page share: errors in words, and fields that come more than once."""

import functools
import html
import inspect
from collections.abc import Callable, Sequence

import gradio as gr
import numpy as np

from tools.demo_page import canvas
from tools.demo_page.session import NONE, Session
from umd.inputs import ALL

# One model: of all that is asked of it one thing at a time is done, and the others queue.
MODEL = dict(concurrency_id="model", concurrency_limit=1)
PRIVATE = dict(api_visibility="private", show_progress="hidden")


def _to_user(error: Exception) -> gr.Error:
  text = html.escape(str(error), quote=False)
  return gr.Error(text, print_exception=False)


def told(work: Callable) -> Callable:
  """`work`, whose ValueErrors become messages on the page."""

  @functools.wraps(work)
  def once(*args, **kwargs):
    try:
      return work(*args, **kwargs)
    except (ValueError, OSError) as error:
      raise _to_user(error) from None

  @functools.wraps(work)
  def several(*args, **kwargs):
    try:
      yield from work(*args, **kwargs)
    except (ValueError, OSError) as error:
      raise _to_user(error) from None

  return several if inspect.isgeneratorfunction(work) else once


def fitted(image, size) -> np.ndarray:
  """An image that was sent, in the model's size; says on the page if that changed it."""
  if image is None:
    raise ValueError("There is no image yet: pick an example or upload one.")
  array, done = canvas.fit(image, size)
  if done:
    gr.Info(f"The image has {done}.")
  return array


def class_choices(names: Sequence[str], count: int) -> list[tuple[str, str]]:
  """(shown, value) for each class: its name if that is its alone, else its number."""
  if len(set(names)) == count:
    return [(name, name) for name in names]
  return [(f"{i}: {names[i]}" if names else str(i), str(i)) for i in range(count)]


def class_field(page: Session, several: bool) -> gr.Dropdown:
  """Class by name or number; with `several` also all of them, or what is typed with commas."""
  choices = class_choices(page.model.class_names, page.model.num_classes)
  has = page.model.num_classes > 0
  info = "" if has else page.lacks("labels")
  if several and has:
    info = f"Or several, with commas: {choices[0][1]},{choices[-1][1]}"
  every = [("every class in turn", ALL)] if several and has else []
  return gr.Dropdown(
    [("no class", NONE), *every, *choices],
    value=ALL if every else NONE,
    label="Class",
    info=info,
    allow_custom_value=True,
    interactive=has,
  )


def seed_field() -> gr.Number:
  """A whole number."""
  return gr.Number(0, label="Seed", precision=0)


def cells(**given) -> gr.Gallery:
  """Pictures side by side, as many as there is room for."""
  return gr.Gallery(
    show_label=False, object_fit="contain", format="png", buttons=[], height="auto", **given
  )


def examples_field(page: Session) -> gr.Gallery | None:
  """Images to pick from, if there are any; goes with `pick`."""
  if page.examples is None:
    return None
  shown = [
    (canvas.enlarge(image, 128), page.examples.label(i))
    for i, image in enumerate(page.examples.images)
  ]
  gr.Markdown(f"Examples, of {html.escape(page.examples.name, quote=False)}:")
  return cells(value=shown, allow_preview=False, elem_classes=["pixels", "cells", "small"])


def refuse(reason: str) -> None:
  """In the place of what a model cannot do."""
  gr.Markdown(f"This model cannot do that: {html.escape(reason, quote=False)}.")
