"""The page: its tabs, its looks, and how it is served. Needs Gradio."""

import html

import gradio as gr

from tools.demo_page import about, tabs
from tools.demo_page.parts import refuse
from tools.demo_page.session import Session

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
      refuse(reason) if (reason := page.lacks("sample")) else tabs.sample_tab(page)
    with gr.Tab("Fill in") as tab:
      reason = page.lacks("reconstruct")
      refuse(reason) if reason and page.lacks("inpaint") else tabs.fill_tab(page, tab)
    with gr.Tab("Neighbours"):
      refuse(reason) if (reason := page.lacks("neighbours")) else tabs.neighbours_tab(page)
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
