"""Starting one model from the weights of another."""

from collections.abc import Collection, Mapping

import jax
import numpy as np

from umd.state import TrainState

# One vector per patch position: these follow the grid of patches.
POSITIONS = ("pos_embed", "decoder_pos_embed")


def leaves(params) -> dict:
  """{"a/b/c": leaf}."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }


def resample(positions: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
  """Position embeddings [N, D] of a grid of `old` = (rows, columns) patches for one of `new`.

  Bicubic and antialiased, as ViT does for a new resolution (Dosovitskiy et al. 2021, sec. 3.2).
  """
  if old == new:
    return positions
  width = positions.shape[-1]
  grid = jax.image.resize(positions.reshape(*old, width), (*new, width), "bicubic")
  return np.asarray(grid.reshape(-1, width), positions.dtype)


def check(own: Mapping, given: Mapping, fresh: Collection[str]) -> None:
  """Compares the leaves of two models by shape, but for subtrees in `fresh` and the grid's size.

  Args:
    own: {leaf name: anything with a shape} of the model to be started.
    given: the same of the checkpoint.
    fresh: subtrees that start afresh.

  Raises:
    ValueError: leaves are missing, left over or of another shape; the message lists them. Or a
      name in `fresh` is a part of neither.
  """
  parts = {name.split("/")[0] for name in own.keys() | given.keys()}
  if unknown := set(fresh) - parts:
    raise ValueError(
      f"init_fresh={sorted(unknown)} are no parts of a model; known: {sorted(parts)}."
    )

  def shape(tree, name):
    found = getattr(tree.get(name), "shape", "absent")
    return ("N", found[1]) if name in POSITIONS and found != "absent" else found

  wrong = [
    f"{name}: here {shape(own, name)}, there {shape(given, name)}"
    for name in sorted(own.keys() | given.keys())
    if name.split("/")[0] not in fresh and shape(own, name) != shape(given, name)
  ]
  if wrong:
    raise ValueError(
      "init_from: the checkpoint does not fit the model; leaves that differ:\n  "
      + "\n  ".join(wrong)
      + "\nUse the model settings of the checkpoint, or name the subtree in init_fresh."
    )


def adopt(
  state: TrainState,
  loaded: dict,
  fresh: Collection[str] = (),
  grids: tuple[tuple[int, int], tuple[int, int]] | None = None,
) -> TrainState:
  """Starts parameters and their average from `loaded`, but for the subtrees named in `fresh`.

  Step and optimiser stay as they are: new. So does where every leaf is placed.

  Args:
    state: a fresh state.
    loaded: parameters, whole arrays on this host.
    fresh: subtrees to be left as initialised.
    grids: the loaded model's and the state's (rows, columns) of patches, if they may differ.

  Raises:
    ValueError: see `check`.
  """
  given = leaves(loaded)
  check(leaves(state.params), given, fresh)

  def pick(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name.split("/")[0] in fresh:
      return leaf
    value = np.asarray(given[name])
    if name in POSITIONS and grids:
      value = resample(value, *grids)
    return jax.make_array_from_callback(
      leaf.shape, leaf.sharding, lambda part: np.array(value[part], leaf.dtype)
    )

  # The average is built from its own fresh leaves: two donated leaves must not share a buffer.
  take = lambda tree: jax.tree_util.tree_map_with_path(pick, tree)
  return state.replace(params=take(state.params), ema_params=take(state.ema_params))
