"""From a config's words to the objects that train: streams, and a line that describes them."""

from collections.abc import Mapping

import jax

from umd.objectives import Stream, Term, period, stream_rows


def make_streams(config: Mapping) -> tuple[Stream, ...]:
  """A config's `streams` as dataclasses."""
  streams = []
  for name, settings in config.items():
    settings = dict(settings)
    terms = {k: Term(**dict(term)) for k, term in dict(settings.pop("terms")).items()}
    rows = tuple(settings.pop("rows"))
    streams.append(Stream(name, terms, rows, **settings))
  return tuple(streams)


def describe(params, streams, batch_size: int) -> str:
  """One line per run: parameters, and the rows that each stream really gets."""
  size = period(streams, batch_size)
  shares = []
  for s in streams:
    start, stop = stream_rows(s, size)
    rows = (stop - start) * batch_size // size
    shares.append(f"{s.name} {rows}/{batch_size} rows, mask {s.mask_ratio:g}, {s.timesteps}")
  count = sum(x.size for x in jax.tree.leaves(params))
  return f"{count / 1e6:.2f}M parameters; streams: {'; '.join(shares)}"
