"""Where arrays live: batches dealt out evenly, states whole or in parts, and back again."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from stand_ins import Function

from umd.devices.mesh import (
  SMALL_LEAF,
  batch_sharding,
  check_divides,
  make_mesh,
  prefetch,
  put_batch,
  state_shardings,
)
from umd.runs.checkpoint import Checkpoints
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
  leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
  split, whole = (state_shardings(leaf, make_mesh(fsdp=fsdp)) for fsdp in (4, 1))
  assert whole.shard_shape(shape) == shape
  expected = tuple(n // 4 if i == axis else n for i, n in enumerate(shape))
  assert split.shard_shape(shape) == expected
  assert split.spec == PartitionSpec() if axis is None else "fsdp" in split.spec


def make_state(fsdp, seed=0):
  """A state of all LEAVES but the scalar; the optimiser's trees have their shapes."""
  shapes = {name.replace(" ", "_"): shape for name, (shape, _) in LEAVES.items() if shape}

  def init(key):
    return {
      name: jax.random.normal(jax.random.fold_in(key, i), shape)
      for i, (name, shape) in enumerate(shapes.items())
    }

  return init_state(init, optax.adam(0.1), jax.random.key(seed), make_mesh(fsdp=fsdp))


def bytes_per_device(tree) -> list[int]:
  held = dict.fromkeys(jax.devices(), 0)
  for leaf in jax.tree.leaves(tree):
    for shard in leaf.addressable_shards:
      held[shard.device] += shard.data.nbytes
  return list(held.values())


def test_a_split_state_is_held_in_quarters_and_stays_so():
  state = make_state(fsdp=4)
  loss = lambda params, batch, key: (sum((x**2).sum() for x in params.values()), {})
  arguments = dict(ema_decay=0.9, seed=0, state=state)
  step = make_train_step(Function(loss), optax.adam(0.1), lambda step: 0.1, **arguments)
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


@pytest.mark.parametrize("saved, restored", [(4, 1), (1, 4), (2, 4)])
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
  assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(found)) == (restored > 1)


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


class Device:
  """As much of a device as a mesh asks for: number, process, slice."""

  platform, device_kind = "tpu", "TPU v4"

  def __init__(self, number, process, in_slice):
    self.id, self.process_index, self.slice_index = number, process, in_slice


def pod(slices, processes, devices):
  """Devices of processes of slices, in no order."""
  numbers = iter(range(10**6))
  every = [
    Device(next(numbers), s * processes + p, s)
    for s in range(slices)
    for p in range(processes)
    for _ in range(devices)
  ]
  return [every[i] for i in np.random.default_rng(0).permutation(len(every))]


def test_a_copy_of_the_state_is_shared_by_neighbours_of_one_slice():
  mesh = make_mesh(pod(slices=2, processes=2, devices=4), fsdp=8)
  assert dict(mesh.shape) == {"data": 2, "fsdp": 8}
  for group in mesh.devices:
    assert len({device.slice_index for device in group}) == 1
  processes = [device.process_index for device in mesh.devices.flat]
  assert processes == sorted(processes)  # Rows stay with the process that read them.


@pytest.mark.parametrize("fsdp, shape", [(1, (16, 1)), (4, (4, 4)), (0, (1, 16))])
def test_the_mesh_has_the_shape_asked_for(fsdp, shape):
  assert make_mesh(pod(1, 2, 8), fsdp).devices.shape == shape


@pytest.mark.parametrize(
  "slices, fsdp, told", [(1, 3, "the 16"), (2, 5, "a slice's 8"), (1, -1, "")]
)
def test_devices_that_cannot_be_grouped_are_told(slices, fsdp, told):
  with pytest.raises(ValueError, match=rf"fsdp={fsdp} must divide {told}.*devices"):
    make_mesh(pod(slices, 2, 8 // slices), fsdp)


EIGHT = """
import json, os, sys
os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace("count=4", "count=8")
import jax, jax.numpy as jnp, numpy as np, optax
from umd.models.autoencoder import AutoEncoder
from umd.models.network import init_params
from umd.objectives import Objective, Stream, Term
from umd.paths import make_path
from umd.devices.mesh import make_mesh, put_batch
from umd.state import init_state, make_train_step

terms = {"eps": Term("eps", "visible", 0.5), "x0": Term("x0", "masked", 0.5)}
streams = (
  Stream("clean", {"x0": Term("x0", "masked")}, (0.0, 0.5), "clean", 0.75, False),
  Stream("noised", terms, (0.5, 1.0), "uniform", 0.5),
)
model = AutoEncoder("nano/4", (8, 8, 1), scan=True)
params = jax.device_get(jax.jit(lambda key: init_params(model, key))(jax.random.key(0)))
images = np.random.default_rng(0).uniform(-1, 1, (3, 16, 8, 8, 1)).astype(np.float32)
tx, losses = optax.sgd(0.2, momentum=0.9), {}
for fsdp in (1, 8, 4):
  mesh = make_mesh(fsdp=fsdp)
  state = init_state(lambda key: jax.tree.map(jnp.asarray, params), tx, jax.random.key(0), mesh)
  objective = Objective(model, make_path("cosine", 10), streams, 16)
  step = make_train_step(objective, tx, lambda n: 0.1, ema_decay=0.9, seed=0, state=state)
  losses[fsdp] = []
  for x in images:
    state, metrics = step(state, put_batch({"image": x}, mesh))
    losses[fsdp].append(float(metrics["loss"]))
print(json.dumps(losses))
"""


def test_losses_on_meshes_of_8_x_1_and_1_x_8_and_2_x_4_are_the_same():
  out = subprocess.run([sys.executable, "-c", EIGHT], capture_output=True, text=True, check=True)
  losses = json.loads(out.stdout.splitlines()[-1])
  assert len(set(losses["1"])) == 3
  for fsdp in ("8", "4"):
    np.testing.assert_allclose(losses[fsdp], losses["1"], rtol=1e-5)
