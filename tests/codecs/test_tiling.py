"""Tiles blend into what a local decoder makes of the whole, without seams and in one program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from umd.codecs.codec import tiled


def nearest(x):
  """A decoder that looks at one pixel of a latent: three channels, twice the sides."""
  x = jnp.stack([x[..., 0] + x[..., 1], x[..., 1] ** 2, jnp.sin(x[..., 0])], axis=-1)
  return x.repeat(2, axis=1).repeat(2, axis=2)


def latents(h, w, count=2):
  return jnp.asarray(np.random.default_rng(h * w).standard_normal((count, h, w, 2)), jnp.float32)


@pytest.mark.parametrize(
  "h, w, tile, overlap",
  [
    (8, 8, 8, 2),  # one tile
    (14, 14, 8, 2),  # tiles that fit
    (11, 17, 8, 2),  # tiles that do not
    (9, 8, 8, 0),  # no overlap asked for, much of it needed; one direction alone
    (16, 16, 8, 0),  # no overlap at all
    (13, 20, 8, 7),  # up to eight tiles on a pixel
    (5, 12, 8, 3),  # one side below the tile's
    (3, 4, 8, 3),  # both
  ],
)
def test_a_local_decoder_decodes_in_tiles_as_it_does_at_once(h, w, tile, overlap):
  x = latents(h, w)
  got = jax.jit(lambda x: tiled(nearest, x, tile, overlap, 2))(x)
  np.testing.assert_allclose(got, nearest(x), atol=2e-6)


def test_tiles_that_disagree_blend_linearly():
  # Every tile is decoded to one number, the first of its latents: 0 here and 1 there.
  decode = lambda x: jnp.broadcast_to(x[:, :1, :1, :1], (1, 8, 8, 1))
  x = jnp.zeros((1, 8, 14, 1)).at[:, :, 6].set(1)  # tiles begin at 0 and 6, and share 6 and 7
  got = tiled(decode, x, 8, 2, 1)
  np.testing.assert_allclose(got[0, 3, :, 0], [0] * 6 + [0.25, 0.75] + [1] * 6, atol=1e-6)
  np.testing.assert_array_equal(got[0, 0], got[0, 7])


def test_an_overlap_hides_what_the_borders_of_tiles_do_not_see():
  # A decoder that sees a pixel's neighbours errs at the borders of tiles, where they weigh least.
  def blur(x):
    padded = jnp.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    return sum(
      padded[:, i : i + x.shape[1], j : j + x.shape[2]] for i in range(3) for j in range(3)
    )

  x = jnp.abs(latents(24, 24))
  error = lambda overlap: float(jnp.abs(tiled(blur, x, 8, overlap, 1) - blur(x))[:, 1:-1].max())
  assert 0 < 3 * error(4) < error(0)


def test_one_program_decodes_all_tiles_and_leaves_the_batch_where_it_is():
  traces = []

  def decode(x):
    traces.append(x.shape)
    return nearest(x)

  mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
  rows = NamedSharding(mesh, PartitionSpec("data"))
  for shape in ((20, 20), (40, 60)):
    traces.clear()
    x = jax.device_put(latents(*shape, count=4), rows)
    compiled = jax.jit(lambda x: tiled(decode, x, 8, 2, 2), out_shardings=rows).lower(x).compile()
    assert set(traces) == {(4, 8, 8, 2)}
    assert len(traces) <= 2  # for its shape and for the program, whatever the number of tiles
    text = compiled.as_text()
    assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute"))
    np.testing.assert_allclose(compiled(x), nearest(x), atol=2e-6)


@pytest.mark.parametrize(
  "tile, overlap, factor, message",
  [
    (0, 0, 2, "tile=0 must be at least 1"),
    (8, 8, 2, r"overlap=8 in \[0, tile\)"),
    (8, -1, 2, r"overlap=-1 in \[0, tile\)"),
    (8, 2, 4, "8 x 8 decode to 16 x 16, which is not factor=4"),
  ],
)
def test_sizes_that_do_not_fit_are_refused(tile, overlap, factor, message):
  with pytest.raises(ValueError, match=message):
    tiled(nearest, latents(16, 16), tile, overlap, factor)
