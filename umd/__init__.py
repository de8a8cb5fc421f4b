"""Masked-diffusion auto-encoders; `umd.load` opens a trained one."""

__all__ = ["load"]


def __getattr__(name: str):
  # When it is first asked for: `import umd` alone imports nothing.
  if name == "load":
    from umd.trained.model import load

    return load
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
