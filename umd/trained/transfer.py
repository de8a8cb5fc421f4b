"""Starts one model from the weights of another."""

from collections.abc import Collection, Mapping

import jax
import numpy as np

# Parameters [N, D] of one vector per patch: these follow the grid of patches.
POSITIONS = ("pos_embed", "decoder_pos_embed")


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves(params) -> dict:
  """Returns {"a/b/c": leaf}."""
  return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def resample(positions: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
  """Resizes position embeddings [N, D] of `old` = (rows, columns) patches to a grid of `new`.

  The resize is bicubic and antialiased, as that of ViT for a new resolution (Dosovitskiy et al.
  2021, sec. 3.2).
  """
  if old == new:
    return positions
  width = positions.shape[-1]
  grid = jax.image.resize(positions.reshape(*old, width), (*new, width), "bicubic")
  return np.asarray(grid.reshape(-1, width), positions.dtype)


def check(model: Mapping, checkpoint: Mapping, fresh: Collection[str]) -> None:
  """Compares the shapes of two models' leaves; the number of patches may differ.

  Args:
    model: {leaf name: anything with a shape} of the model to be started.
    checkpoint: the same of the weights to start from.
    fresh: subtrees that start afresh and are not compared.

  Raises:
    ValueError: leaves are missing, left over or of another shape; the message lists them. Or a
      name in `fresh` belongs to neither model.
  """
  names = model.keys() | checkpoint.keys()
  subtrees = {name.split("/")[0] for name in names}
  if unknown := set(fresh) - subtrees:
    raise ValueError(
      f"init_fresh={sorted(unknown)} are no parts of a model; known: {sorted(subtrees)}."
    )

  def shape(tree, name):
    if name not in tree:
      return "absent"
    return ("N", tree[name].shape[1]) if name in POSITIONS else tree[name].shape

  differences = [
    f"{name}: here {shape(model, name)}, there {shape(checkpoint, name)}"
    for name in sorted(names)
    if name.split("/")[0] not in fresh and shape(model, name) != shape(checkpoint, name)
  ]
  if differences:
    raise ValueError(
      "init_from: the checkpoint does not fit the model; leaves that differ:\n  "
      + "\n  ".join(differences)
      + "\nUse the model settings of the checkpoint, or name the subtree in init_fresh."
    )


def adopt(
  state,
  loaded: Mapping,
  fresh: Collection[str] = (),
  grids: tuple[tuple[int, int], tuple[int, int]] | None = None,
):
  """Returns a state whose parameters and average are those loaded, but for the subtrees `fresh`.

  Step and optimiser stay new, and every leaf stays where it is placed.

  Args:
    state: a fresh `umd.state.TrainState`.
    loaded: parameters, whole arrays on this host.
    fresh: subtrees to be left as initialised.
    grids: (rows, columns) of patches of the loaded model and of the state's, if they may differ.

  Raises:
    ValueError: see `check`.
  """
  values = leaves(loaded)
  check(leaves(state.params), values, fresh)

  def pick(path, leaf):
    name = _name(path)
    if name.split("/")[0] in fresh:
      return leaf
    value = np.asarray(values[name])
    if name in POSITIONS and grids:
      value = resample(value, *grids)
    return jax.make_array_from_callback(
      leaf.shape, leaf.sharding, lambda part: np.array(value[part], leaf.dtype)
    )

  # The average is built from its own fresh leaves: two leaves that a step overwrites must not share
  # a buffer.
  take = lambda tree: jax.tree_util.tree_map_with_path(pick, tree)
  return state.replace(params=take(state.params), ema_params=take(state.ema_params))
