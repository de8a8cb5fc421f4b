"""The page: its tabs, its looks, and how it is served. Needs Gradio."""

import functools
import html
import inspect
import time
from collections.abc import Callable, Mapping, Sequence

import gradio as gr
import numpy as np

from umd.samplers import SOLVERS, SPACINGS
from umd.serve import about, session
from umd.serve import session as canvas
from umd.serve.session import NONE, Session
from umd.trained.inputs import ALL

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
  array, done = session.fit(image, size)
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
    (session.enlarge(image, 128), page.examples.label(i))
    for i, image in enumerate(page.examples.images)
  ]
  gr.Markdown(f"Examples, of {html.escape(page.examples.name, quote=False)}:")
  return cells(value=shown, allow_preview=False, elem_classes=["pixels", "cells", "small"])


def refuse(reason: str) -> None:
  """In the place of what a model cannot do."""
  gr.Markdown(f"This model cannot do that: {html.escape(reason, quote=False)}.")


FRAME = 0.08  # Seconds between two steps of the denoising, or they could not be seen.
MASKED = 0.5  # Share of patches, unless it is said.
STEPS = 250  # At most, on the page.
CANVAS = 512  # Pixels that the editor's picture is wide, about.


def _advanced_fields(page: Session) -> list:
  """What is seldom changed: (spacing, eta, head, cfg_channels)."""
  own, channels = page.model.sampling, page.channels
  with gr.Accordion("Advanced", open=False):
    return [
      gr.Dropdown(
        list(SPACINGS),
        value=own.spacing,
        label="Spacing of the steps",
        info="Even in t, or denser where the image is clean",
      ),
      gr.Slider(0, 1, own.eta, step=0.05, label="Eta", info="Fresh noise, of ddim only"),
      gr.Dropdown(page.heads, value=own.head, label="Head that is read"),
      gr.Slider(
        *(0, channels, own.cfg_channels),
        step=1,
        label="Guided channels",
        info="The first so many; 0: all",
        visible=page.model.num_classes > 0 and channels > 1,
      ),
    ]


def sample_tab(page: Session) -> None:
  """Samples of a class, and how they come about."""
  own, guided = page.model.sampling, page.model.num_classes > 0
  with gr.Row():
    with gr.Column(scale=2, min_width=300):
      label = class_field(page, several=True)
      num = gr.Slider(1, session.SAMPLES, 20 if guided else 16, step=1, label="Number of samples")
      seed = seed_field()
      with gr.Accordion("Sampler", open=False):
        scale = gr.Slider(
          0, 10, own.cfg_scale, step=0.1, label="Guidance scale", info="1: none", visible=guided
        )
        low, high = own.guidance_interval
        low = gr.Slider(0, 1, low, step=0.05, label="Guide from (share of T)", visible=guided)
        high = gr.Slider(0, 1, high, step=0.05, label="Guide to (share of T)", visible=guided)
        sampler = gr.Dropdown(list(SOLVERS), value=own.sampler, label="Sampler")
        steps = gr.Slider(1, min(page.timesteps, STEPS), own.steps, step=1, label="Steps")
        # Frames of a model of latents have to be decoded.
        latents = bool(page.model.description.latents)
        watch = gr.Checkbox(not latents, label="Show the denoising")
      advanced = _advanced_fields(page)
      button = gr.Button("Sample", variant="primary", elem_id="sample")
    with gr.Column(scale=3, min_width=300):
      grid = gr.Image(
        label="grid",
        show_label=False,
        format="png",
        buttons=[],
        elem_classes="pixels",
        elem_id="samples",
      )
      status = gr.Markdown(
        "Settings that are new are compiled first, which takes a moment.", label="status"
      )

  @told
  def sample(
    label,
    num,
    seed,
    cfg_scale,
    low,
    high,
    sampler,
    steps,
    watch,
    spacing,
    eta,
    head,
    cfg_channels,
  ):
    given = (label, num, seed, cfg_scale, low, high, sampler, steps, watch)
    for found in page.sample(*given, spacing, eta, head, cfg_channels):
      start = time.monotonic()
      yield found
      time.sleep(max(0.0, FRAME - (time.monotonic() - start)) if watch else 0)

  fields = [label, num, seed, scale, low, high, sampler, steps, watch, *advanced]
  button.click(sample, fields, [grid, status], api_name="sample", **MODEL)


def _on_canvas(image: np.ndarray, mask: np.ndarray | None = None) -> Mapping:
  """The editor's value: an image, and what is painted over."""
  shown = canvas.enlarge(image, CANVAS)
  mask = np.zeros(image.shape[:2], bool) if mask is None else mask
  layer = canvas.paint(mask, shown.shape[0] // image.shape[0])
  alpha = layer[..., 3:] > 0
  return {
    "background": np.ascontiguousarray(shown),
    "layers": [layer],
    "composite": np.where(alpha, layer[..., :3], shown),
  }


def _editor() -> gr.ImageEditor:
  return gr.ImageEditor(
    type="pil",
    label="Paint over what is to be filled in",
    sources=("upload", "clipboard"),
    transforms=(),
    layers=False,
    brush=gr.Brush(
      default_size=CANVAS // 10,
      colors=["#{:02x}{:02x}{:02x}".format(*canvas.PAINT)],
      color_mode="fixed",
    ),
    canvas_size=(CANVAS, CANVAS),
    format="png",
    elem_id="editor",
  )


def _diffusion_fields(page: Session) -> list:
  """Fields of the diffusion that fills in: (label, num, seed, steps, resampling)."""
  usable, most = not page.lacks("inpaint"), min(page.timesteps, STEPS)
  with gr.Accordion("Diffusion", open=False, visible=usable):
    return [
      class_field(page, several=False),
      gr.Slider(0, session.FILLED, 2 if usable else 0, step=1, label="Number of fillings"),
      seed_field(),
      gr.Slider(1, most, min(page.model.sampling.steps, most), step=1, label="Steps"),
      gr.Slider(
        *(1, session.RESAMPLED, session.RESAMPLING),
        step=1,
        label="Resampling",
        info="How often each step is taken: more agrees better with what is known",
      ),
    ]


def fill_tab(page: Session, tab: gr.Tab) -> None:
  """An image is painted over, or masked at random, and filled in."""
  size = page.model.image_size
  with gr.Row():
    with gr.Column(scale=1, min_width=300):
      gallery, editor = examples_field(page), _editor()
    with gr.Column(scale=1, min_width=300):
      ratio = gr.Slider(0.05, 0.95, MASKED, step=0.05, label="Share of patches")
      random = gr.Button("Random mask", elem_id="random")
      fields = _diffusion_fields(page)
      button = gr.Button("Fill in", variant="primary", elem_id="fill")
      filled = cells(label="filled", elem_classes=["pixels", "cells", "large"], elem_id="filled")
      status = gr.Markdown(label="status")
  shown = gr.State(False)

  def first(shown):
    # An editor that was filled while its tab was hidden would be blank.
    return gr.skip() if shown else _on_canvas(page.examples.images[0]), True

  def pick(event: gr.SelectData):
    return _on_canvas(page.examples.images[event.index])

  @told
  def mask_at_random(value, ratio):
    image = fitted(value and value["background"], size)
    return _on_canvas(image, page.random_mask(ratio, time.time_ns() % 2**32))

  @told
  def fill_painted(value, label, num, seed, steps, resampling):
    image = fitted(value and value["background"], size)
    mask = canvas.painted(value["layers"], size)
    return page.fill(image, mask, label, num, seed, steps, resampling)

  @told
  def fill(image, mask, ratio, label, num, seed, steps, resampling):
    given = fitted(image, size)
    where = page.random_mask(ratio, int(seed)) if mask is None else None
    where = canvas.white(mask, size, image.size) if where is None else where
    return page.fill(given, where, label, num, seed, steps, resampling)

  if gallery:
    gallery.select(pick, None, editor, **PRIVATE)
    tab.select(first, shown, [editor, shown], **PRIVATE)
  random.click(mask_at_random, [editor, ratio], editor, **PRIVATE)
  found = [filled, status]
  button.click(fill_painted, [editor, *fields], found, api_visibility="private", **MODEL)
  with gr.Column(visible=False):  # Programs send a mask as a picture of its own.
    sent, where = gr.Image(type="pil", label="image"), gr.Image(type="pil", label="mask")
    gr.Button().click(fill, [sent, where, ratio, *fields], found, api_name="fill", **MODEL)


def neighbours_tab(page: Session) -> None:
  """Training images that the model represents alike."""
  if page.looks_at:
    gr.Markdown(f"The model never saw clean images: these are noised to t = {page.looks_at}.")
  with gr.Row():
    with gr.Column(scale=1, min_width=300):
      first = canvas.enlarge(page.examples.images[0]) if page.examples else None
      image = gr.Image(
        first,
        type="pil",
        label="Image",
        sources=["upload", "clipboard"],
        height=280,
        format="png",
        elem_classes="pixels",
        elem_id="query",
      )
      gallery = examples_field(page)
      k = gr.Slider(1, session.NEIGHBOURS, 12, step=1, label="How many")
      button = gr.Button("Find neighbours", variant="primary", elem_id="find")
    with gr.Column(scale=2, min_width=300):
      gr.Markdown("Nearest training images: label and cosine similarity")
      nearest = cells(label="nearest", elem_classes=["pixels", "cells"], elem_id="nearest")

  def pick(event: gr.SelectData):
    return canvas.enlarge(page.examples.images[event.index])

  @told
  def neighbours(image, k, progress=gr.Progress()):  # noqa: B008 - Gradio looks for it there.
    def tell(done, total):
      progress((done, total), desc="Looking at training images, once", unit="images")

    return page.neighbours(fitted(image, page.model.image_size), k, tell)

  if gallery:
    gallery.select(pick, None, image, **PRIVATE)
  button.click(neighbours, [image, k], nearest, api_name="neighbours", **MODEL)


KEPT = 3600  # Seconds that a file of the page is kept.
FONT, MONO = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")
CSS = """
.gradio-container { max-width: 1100px !important; margin: 0 auto; }
.pixels img { image-rendering: pixelated; }
.cells .grid-wrap { max-height: none !important; min-height: 0; height: auto; }
.cells .grid-container {
  grid-template-columns: repeat(auto-fill, minmax(84px, 1fr)) !important;
  grid-template-rows: none !important; grid-auto-rows: auto !important; height: auto !important;
}
.cells .thumbnail-item { aspect-ratio: 1; height: auto; }
.cells .caption-label { font-size: 11px; padding: 0 4px; }
.small .grid-container { grid-template-columns: repeat(auto-fill, minmax(56px, 1fr)) !important; }
.large .grid-container { grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)) !important; }
"""
TITLE = "umd demo"


class OnlyFromHere:
  """ASGI middleware: pages may load nothing from other hosts, whatever Gradio puts into them."""

  POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; worker-src 'self' blob:"
  )

  def __init__(self, app):
    self.app = app

  async def __call__(self, scope, receive, send):
    async def add(message):
      if message["type"] == "http.response.start":
        header = (b"content-security-policy", self.POLICY.encode())
        message = {**message, "headers": [*message.get("headers", ()), header]}
      await send(message)

    await self.app(scope, receive, add if scope["type"] == "http" else send)


def build(page: Session) -> gr.Blocks:
  """The page of a session, with the endpoints /sample, /fill and /neighbours."""
  with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(KEPT, KEPT)) as blocks:
    gr.Markdown(f"# {TITLE}\n{html.escape(about.line(page.model), quote=False)}")
    if page.no_examples:
      gr.Markdown(f"No examples: {html.escape(page.no_examples, quote=False)}")
    with gr.Tab("Sample"):
      refuse(reason) if (reason := page.lacks("sample")) else sample_tab(page)
    with gr.Tab("Fill in") as tab:
      reason = page.lacks("reconstruct")
      refuse(reason) if reason and page.lacks("inpaint") else fill_tab(page, tab)
    with gr.Tab("Neighbours"):
      refuse(reason) if (reason := page.lacks("neighbours")) else neighbours_tab(page)
  return blocks.queue(default_concurrency_limit=4, max_size=32)


def serve(blocks: gr.Blocks, host: str, port: int, share: bool, wait: bool = True) -> str:
  """Serves the page until it is interrupted, or returns its address at once.

  Raises:
    ValueError: the port is taken.
  """
  from starlette.middleware import Middleware

  try:
    _, address, shared = blocks.launch(
      server_name=host,
      server_port=port,
      share=share,
      prevent_thread_lock=True,
      quiet=True,
      max_file_size="20mb",
      footer_links=["api"],
      run_history=False,
      ssr_mode=False,
      mcp_server=False,
      theme=gr.themes.Default(font=FONT, font_mono=MONO),
      css=CSS,
      app_kwargs={"middleware": [Middleware(OnlyFromHere)]},
    )
  except OSError:
    text = f"--host={host} --port={port} cannot be served; perhaps the port is taken. Give another."
    raise ValueError(text) from None
  print(f"The demo is at {address}" + (f" and {shared}" if shared else ""), flush=True)
  if wait:
    blocks.block_thread()
  return address
