"""The page of the demo: its tabs, its looks, and how it is served. It needs Gradio."""

import functools
import html
import inspect
import time
from collections.abc import Callable, Iterable

import gradio as gr
import numpy as np
from PIL import Image

from umd.samplers import SOLVERS, SPACINGS
from umd.serve import session
from umd.serve.session import NONE, Picture, Session
from umd.trained.inputs import ALL

# All that asks the model is one queue, served one after the other.
MODEL = dict(concurrency_id="model", concurrency_limit=1)
PRIVATE = dict(api_visibility="private", show_progress="hidden")
SAMPLES, FILLINGS, NEIGHBOURS, STEPS, RESAMPLINGS = 64, 8, 50, 250, 20  # at most
FRAME_SECONDS = 0.08  # Two steps of the denoising that follow faster could not be seen.
CANVAS = 512  # the editor's picture is about so many pixels wide
BRUSH = (230, 30, 120)
KEPT_SECONDS = 3600  # for which the page keeps its files
CSS = """
.gradio-container { max-width: 1100px !important; margin: 0 auto; }
.pixels img { image-rendering: pixelated; width: 100%; height: 100%; object-fit: contain; }
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


def explained(work: Callable) -> Callable:
  """Wraps a handler so that its errors become messages on the page, and none of them markup."""

  @functools.wraps(work)
  def handler(*args):
    try:
      result = work(*args)
      if inspect.isgenerator(result):
        yield from result
      else:
        yield result
    except (ValueError, OSError) as error:
      raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from None

  return handler


def as_rgb(pixels: np.ndarray) -> np.ndarray:
  """Returns pixels [H, W, 1 or 3] with three channels, as Gradio takes them."""
  return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def in_gallery(pictures: Iterable[Picture]) -> list[Picture]:
  return [(as_rgb(pixels), caption) for pixels, caption in pictures]


def fitted(image: Image.Image | None, size: session.Size) -> np.ndarray:
  """Returns an image that was sent, in the model's size; the page says so if it was another one."""
  if image is None:
    raise ValueError("There is no image yet: pick an example or upload one.")
  if image.width * size[0] != image.height * size[1]:
    gr.Info(f"The image was cropped to the middle and resized to {size[0]} x {size[1]}.")
  return session.fit(image, size)


def class_field(page: Session, several: bool) -> gr.Dropdown:
  """Asks for a class by name or number; with `several` also for all, or for some with commas."""
  names, count = page.model.class_names, page.model.num_classes
  choices = [(f"{i}: {names[i]}" if names else str(i), str(i)) for i in range(count)]
  if len(set(names)) == count:
    choices = [(name, name) for name in names]
  several = several and count > 0
  every = [("every class in turn", ALL)] if several else []
  info = f"Or several, with commas: {choices[0][1]},{choices[-1][1]}" if several else ""
  return gr.Dropdown(
    [("no class", NONE), *every, *choices],
    value=ALL if several else NONE,
    label="Class",
    info=info if count else "The model was trained without labels",
    allow_custom_value=True,
    interactive=count > 0,
  )


def seed_field() -> gr.Number:
  return gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1)


def cells(kind: str, **settings) -> gr.Gallery:
  """Shows pictures side by side, as many as there is room for."""
  looks = dict(show_label=False, object_fit="contain", format="png", buttons=[], height="auto")
  return gr.Gallery(elem_classes=["pixels", "cells", kind], **looks, **settings)


def examples_field(page: Session) -> gr.Gallery | None:
  """Shows the images to pick from, if there are any."""
  if page.examples is None:
    return None
  gr.Markdown(f"Examples, of {html.escape(page.examples.name, quote=False)}:")
  images = zip(page.examples.images, page.examples.captions, strict=True)
  return cells("small", value=in_gallery(images), allow_preview=False)


def sample_tab(page: Session) -> None:
  """Draws samples of a class, and shows how they come about."""
  default, guided = page.model.sampling, page.model.num_classes > 0
  low, high = default.guidance_interval
  with gr.Row():
    with gr.Column(scale=2, min_width=300):
      label = class_field(page, several=True)
      num = gr.Slider(1, SAMPLES, 20 if guided else 16, step=1, label="Number of samples")
      seed = seed_field()
      with gr.Accordion("Sampler", open=False):
        scale = gr.Slider(
          0, 10, default.cfg_scale, step=0.1, label="Guidance scale", info="1: none", visible=guided
        )
        low = gr.Slider(0, 1, low, step=0.05, label="Guide from (share of T)", visible=guided)
        high = gr.Slider(0, 1, high, step=0.05, label="Guide to (share of T)", visible=guided)
        sampler = gr.Dropdown(list(SOLVERS), value=default.sampler, label="Sampler")
        most = min(page.timesteps or STEPS, STEPS)
        steps = gr.Slider(1, most, min(default.steps, most), step=1, label="Steps")
        # The steps of a model of latents have to be decoded, which takes long.
        watch = gr.Checkbox(not page.model.description.latents, label="Show the denoising")
      with gr.Accordion("Advanced", open=False):
        spacing = gr.Dropdown(
          list(SPACINGS),
          value=default.spacing,
          label="Spacing of the steps",
          info="Even in t, or denser where the image is clean",
        )
        eta = gr.Slider(0, 1, default.eta, step=0.05, label="Eta", info="Fresh noise, of ddim only")
        head = gr.Dropdown(page.heads, value=default.head, label="Head that is read")
        guided_channels = gr.Slider(
          0,
          page.channels,
          default.cfg_channels,
          step=1,
          label="Guided channels",
          info="The first so many; 0: all",
          visible=guided and page.channels > 1,
        )
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
      status = gr.Markdown("New settings are compiled first, which takes a moment.", label="status")

  @explained
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
    settings = dict(sampler=sampler, steps=steps, spacing=spacing, eta=eta, head=head)
    guidance = dict(cfg_scale=cfg_scale, cfg_channels=cfg_channels, guidance_interval=(low, high))
    for pixels, text in page.sample(label, num, seed, watch, **settings, **guidance):
      start = time.monotonic()
      yield as_rgb(pixels), text
      time.sleep(max(0.0, FRAME_SECONDS - (time.monotonic() - start)) if watch else 0)

  basic = [label, num, seed, scale, low, high, sampler, steps, watch]
  fields = [*basic, spacing, eta, head, guided_channels]
  button.click(sample, fields, [grid, status], api_name="sample", **MODEL)


def on_canvas(image: np.ndarray, mask: np.ndarray | None = None) -> dict:
  """Returns the editor's value: an image, enlarged, and what is painted over."""
  scale = max(1, CANVAS // image.shape[0])
  enlarge = lambda pixels: pixels.repeat(scale, axis=0).repeat(scale, axis=1)
  background = as_rgb(image)
  layer = np.zeros((*image.shape[:2], 4), np.uint8)
  if mask is not None:
    layer[mask] = (*BRUSH, 255)
  composite = np.where(layer[..., 3:] > 0, layer[..., :3], background)
  return {
    "background": enlarge(background),
    "layers": [enlarge(layer)],
    "composite": enlarge(composite),
  }


def fill_tab(page: Session, tab: gr.Tab) -> None:
  """Fills in an image that is painted over, or masked at random."""
  size, diffuses = page.model.image_size, not page.lacks("sample")
  most = min(page.timesteps or STEPS, STEPS)
  with gr.Row():
    with gr.Column(scale=1, min_width=300):
      gallery = examples_field(page)
      editor = gr.ImageEditor(
        type="pil",
        label="Paint over what is to be filled in",
        sources=("upload", "clipboard"),
        transforms=(),
        layers=False,
        brush=gr.Brush(
          default_size=CANVAS // 10,
          colors=["#{:02x}{:02x}{:02x}".format(*BRUSH)],
          color_mode="fixed",
        ),
        canvas_size=(CANVAS, CANVAS),
        format="png",
        elem_id="editor",
      )
    with gr.Column(scale=1, min_width=300):
      ratio = gr.Slider(0.05, 0.95, 0.5, step=0.05, label="Share of patches")
      random = gr.Button("Random mask", elem_id="random")
      with gr.Accordion("Diffusion", open=False, visible=diffuses):
        label = class_field(page, several=False)
        num = gr.Slider(0, FILLINGS, 2 if diffuses else 0, step=1, label="Number of fillings")
        seed = seed_field()
        steps = gr.Slider(1, most, min(page.model.sampling.steps, most), step=1, label="Steps")
        resampling = gr.Slider(
          1,
          RESAMPLINGS,
          session.RESAMPLING,
          step=1,
          label="Resampling",
          info="How often each step is taken: more agrees better with what is known",
        )
      button = gr.Button("Fill in", variant="primary", elem_id="fill")
      filled = cells("large", label="filled", elem_id="filled")
      status = gr.Markdown(label="status")
  shown = gr.State(False)

  def show_first(shown):
    # An editor that was filled while its tab was hidden would be blank.
    return gr.skip() if shown else on_canvas(page.examples.images[0]), True

  def pick(event: gr.SelectData):
    return on_canvas(page.examples.images[event.index])

  @explained
  def mask_at_random(value, ratio):
    image = fitted(value and value["background"], size)
    return on_canvas(image, page.random_mask(ratio, time.time_ns() % 2**32))

  @explained
  def fill_painted(value, *settings):
    image = fitted(value and value["background"], size)
    painted = [layer.convert("RGBA").getchannel("A") for layer in value["layers"]]
    shown, text = page.fill(image, session.to_mask(painted, size), *settings)
    return in_gallery(shown), text

  @explained
  def fill(image, mask, ratio, label, num, seed, steps, resampling):
    if mask is None:
      hidden = page.random_mask(ratio, seed)
    else:
      hidden = session.to_mask([mask.convert("L")], size)
    shown, text = page.fill(fitted(image, size), hidden, label, num, seed, steps, resampling)
    return in_gallery(shown), text

  if gallery:
    gallery.select(pick, None, editor, **PRIVATE)
    tab.select(show_first, shown, [editor, shown], **PRIVATE)
  random.click(mask_at_random, [editor, ratio], editor, **PRIVATE)
  fields, results = [label, num, seed, steps, resampling], [filled, status]
  button.click(fill_painted, [editor, *fields], results, api_visibility="private", **MODEL)
  with gr.Column(visible=False):  # Programs send a mask as a picture of its own.
    image, mask = gr.Image(type="pil", label="image"), gr.Image(type="pil", label="mask")
    inputs = [image, mask, ratio, *fields]
    gr.Button().click(fill, inputs, results, api_name="fill", **MODEL)


def neighbours_tab(page: Session) -> None:
  """Looks for the training images that the model represents most like an image."""
  if page.represented_at:
    noised = f"these are noised to t = {page.represented_at}"
    gr.Markdown(f"The model never saw clean images: {noised}.")
  with gr.Row():
    with gr.Column(scale=1, min_width=300):
      image = gr.Image(
        as_rgb(page.examples.images[0]) if page.examples else None,
        type="pil",
        label="Image",
        sources=["upload", "clipboard"],
        height=280,
        format="png",
        elem_classes="pixels",
        elem_id="query",
      )
      gallery = examples_field(page)
      k = gr.Slider(1, NEIGHBOURS, 12, step=1, label="How many")
      button = gr.Button("Find neighbours", variant="primary", elem_id="find")
    with gr.Column(scale=2, min_width=300):
      gr.Markdown("Nearest training images: label and cosine similarity")
      nearest = cells("nearest", label="nearest", elem_id="nearest")

  def pick(event: gr.SelectData):
    return as_rgb(page.examples.images[event.index])

  @explained
  def neighbours(image, k, progress=gr.Progress()):  # noqa: B008 - Gradio looks for it there.
    tell = lambda done, total: progress((done, total), desc="Looking at training images, once")
    return in_gallery(page.neighbours(fitted(image, page.model.image_size), k, tell))

  if gallery:
    gallery.select(pick, None, image, **PRIVATE)
  button.click(neighbours, [image, k], nearest, api_name="neighbours", **MODEL)


class OnlyFromHere:
  """ASGI middleware: a page may load nothing from other hosts, whatever Gradio puts into it."""

  POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; worker-src 'self' blob:"
  )

  def __init__(self, app):
    self.app = app

  async def __call__(self, scope, receive, send):
    async def add_policy(message):
      if message["type"] == "http.response.start":
        header = (b"content-security-policy", self.POLICY.encode())
        message = {**message, "headers": [*message.get("headers", ()), header]}
      await send(message)

    await self.app(scope, receive, add_policy if scope["type"] == "http" else send)


def build(page: Session) -> gr.Blocks:
  """Returns the page of a session, with the endpoints /sample, /fill and /neighbours."""
  escape = functools.partial(html.escape, quote=False)
  lacks = lambda task: escape(page.lacks(task))
  cannot = "This model cannot do that: "
  kept = (KEPT_SECONDS, KEPT_SECONDS)
  with gr.Blocks(title="umd demo", analytics_enabled=False, delete_cache=kept) as blocks:
    gr.Markdown(f"# umd demo\n{escape(session.describe(page.model))}")
    if page.no_examples:
      gr.Markdown(f"No examples: {escape(page.no_examples)}")
    with gr.Tab("Sample"):
      gr.Markdown(f"{cannot}{reason}.") if (reason := lacks("sample")) else sample_tab(page)
    with gr.Tab("Fill in") as tab:
      if (reason := lacks("reconstruct")) and lacks("sample"):
        gr.Markdown(f"{cannot}{reason}.")
      else:
        fill_tab(page, tab)
    with gr.Tab("Neighbours"):
      reason = lacks("neighbours")
      gr.Markdown(f"{cannot}{reason}.") if reason else neighbours_tab(page)
  return blocks.queue(default_concurrency_limit=4, max_size=32)


def serve(blocks: gr.Blocks, host: str, port: int | None, share: bool, wait: bool = True) -> str:
  """Serves the page until it is interrupted, or returns its address at once.

  Raises:
    ValueError: The port is taken.
  """
  from starlette.middleware import Middleware

  font, mono = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")
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
      theme=gr.themes.Default(font=font, font_mono=mono),
      css=CSS,
      app_kwargs={"middleware": [Middleware(OnlyFromHere)]},
    )
  except OSError:
    raise ValueError(
      f"--host={host} --port={port} cannot be served; perhaps the port is taken. Give another."
    ) from None
  print(f"The demo is at {address}" + (f" and {shared}" if shared else ""), flush=True)
  if wait:
    blocks.block_thread()
  return address
