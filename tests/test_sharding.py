"""Where arrays live: batches dealt out evenly, states whole or in parts, and back again."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from umd.checkpoint import Checkpoints
from umd.sharding import (
  SMALL_LEAF,
  batch_sharding,
  check_divides,
  make_mesh,
  prefetch,
  put_batch,
  state_shardings,
)
from umd.state import init_state, make_train_step

# A name: shape, and the axis that four devices split.
LEAVES = {
  "tall": ((256, 64), 0),
  "wide": ((64, 256), 1),
  "stacked": ((3, 50, 512), 2),
  "odd rows": ((255, 64), 1),
  "nothing divides": ((65, 127), None),
  "just large enough": ((SMALL_LEAF,), 0),
  "small": ((SMALL_LEAF - 4,), None),
  "scalar": ((), None),
}


@pytest.mark.parametrize("name", LEAVES)
def test_large_leaves_are_split_along_the_largest_axis_that_divides(name):
  shape, axis = LEAVES[name]
  mesh, leaf = make_mesh(), jax.ShapeDtypeStruct(shape, jnp.float32)
  split, whole = (state_shardings(leaf, mesh, fsdp) for fsdp in (True, False))
  assert whole.shard_shape(shape) == shape
  expected = tuple(n // 4 if i == axis else n for i, n in enumerate(shape))
  assert split.shard_shape(shape) == expected
  assert split.spec == PartitionSpec() if axis is None else "data" in split.spec


def make_state(fsdp, seed=0):
  """A state of all LEAVES but the scalar; the optimiser's trees have their shapes."""
  shapes = {name.replace(" ", "_"): shape for name, (shape, _) in LEAVES.items() if shape}

  def init(key):
    return {
      name: jax.random.normal(jax.random.fold_in(key, i), shape)
      for i, (name, shape) in enumerate(shapes.items())
    }

  return init_state(init, optax.adam(0.1), jax.random.key(seed), make_mesh(), fsdp)


def bytes_per_device(tree) -> list[int]:
  held = dict.fromkeys(jax.devices(), 0)
  for leaf in jax.tree.leaves(tree):
    for shard in leaf.addressable_shards:
      held[shard.device] += shard.data.nbytes
  return list(held.values())


def test_a_split_state_is_held_in_quarters_and_stays_so():
  state = make_state(fsdp=True)
  loss = lambda params, batch, key: (sum((x**2).sum() for x in params.values()), {})
  arguments = dict(ema_decay=0.9, seed=0, state=state)
  step = make_train_step(loss, optax.adam(0.1), lambda step: 0.1, **arguments)
  batch = put_batch({"x": np.zeros(4, np.float32)}, make_mesh())
  sizes = {name.replace(" ", "_"): 4 * np.prod(shape) for name, (shape, _) in LEAVES.items()}
  split = {name.replace(" ", "_") for name, (_, axis) in LEAVES.items() if axis is not None}
  for _ in range(2):
    copies = state.params, state.ema_params, state.opt_state[0].mu, state.opt_state[0].nu
    for tree in copies:
      large = {name: x for name, x in tree.items() if name in split}
      small = {name: x for name, x in tree.items() if name not in split}
      assert bytes_per_device(large) == [sum(sizes[n] for n in large) // 4] * 4
      assert bytes_per_device(small) == [sum(sizes[n] for n in small)] * 4
    state, _ = step(state, batch)


@pytest.mark.parametrize("saved, restored", [(True, False), (False, True)])
def test_a_checkpoint_does_not_remember_how_it_was_split(tmp_path, saved, restored):
  state, like = make_state(saved, seed=1), make_state(restored, seed=2)
  checkpoints = Checkpoints(str(tmp_path))
  checkpoints.save(state, 1, {"position": 0})
  checkpoints.close()
  checkpoints = Checkpoints(str(tmp_path))
  found, _ = checkpoints.restore(like, 1)
  checkpoints.close()
  jax.tree.map(np.testing.assert_array_equal, found, state)
  for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(like), strict=True):
    assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
  assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(found)) == restored


@pytest.mark.parametrize("size, remedy", [(30, 32), (1, 4), (0, 4), (-8, 4), (5, 4)])
def test_a_batch_that_cannot_be_dealt_out_is_an_error_with_a_size_that_can(size, remedy):
  with pytest.raises(ValueError, match=rf"batch_size={size} .* 4 devices\. Set it to {remedy}\."):
    check_divides("batch_size", size, make_mesh())
  check_divides("batch_size", remedy, make_mesh())


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_prefetch_yields_every_batch_in_order_and_splits_its_rows(count, size):
  batches = [{"x": np.arange(8) + 10 * i} for i in range(count)]
  found = list(prefetch(iter(batches), make_mesh(), size))
  assert len(found) == count
  for batch, given in zip(found, batches, strict=True):
    np.testing.assert_array_equal(batch["x"], given["x"])
    assert batch["x"].sharding.is_equivalent_to(batch_sharding(make_mesh()), 1)


def test_prefetch_reads_no_further_ahead_than_it_is_told():
  taken = []
  batches = ({"x": np.zeros(4)} for i in range(9) if not taken.append(i))
  ahead = prefetch(batches, make_mesh(), size=2)
  for used in range(1, 5):
    next(ahead)
    assert len(taken) <= used + 2
