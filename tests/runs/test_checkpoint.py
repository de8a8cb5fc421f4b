"""Checkpoints: what comes back is what was saved, on any number of devices."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from umd.devices.mesh import make_mesh, replicated
from umd.runs.checkpoint import Checkpoints, load_params
from umd.state import TrainState, init_state

POSITION = {"seed": 3, "position": 640}


def mesh_of(devices):
  return make_mesh(jax.devices()[:devices])


def make_state(devices, step):
  """A state all of whose leaves, the optimiser's too, are different random numbers."""
  params = {"body": {"kernel": jnp.zeros((3, 5))}, "token": jnp.zeros(7)}
  state = init_state(lambda key: params, optax.adam(0.1), jax.random.key(0), mesh_of(devices))
  rng = np.random.default_rng(step)
  draw = lambda x: (
    rng.integers(1, 99, x.shape).astype(x.dtype)
    if x.dtype == np.int32
    else rng.standard_normal(x.shape).astype(x.dtype)
  )
  drawn = jax.tree.map(draw, state).replace(step=np.int32(step))
  return jax.device_put(drawn, replicated(mesh_of(devices)))


def assert_bitwise_equal(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The workdir of a run on four devices that saved steps 1, 2, 5 and keeps two."""
  workdir = str(tmp_path_factory.mktemp("run"))
  checkpoints = Checkpoints(workdir, keep=2)
  for step in (1, 2, 5):
    checkpoints.save(make_state(4, step), step, POSITION)
  checkpoints.close()
  return workdir


@pytest.mark.parametrize("devices", [4, 1])
def test_restore_is_bitwise_on_any_number_of_devices(run, devices):
  like = make_state(devices, step=0)
  checkpoints = Checkpoints(run)
  state, position = checkpoints.restore(like, 5)
  checkpoints.close()
  assert isinstance(state, TrainState)
  assert_bitwise_equal(state, make_state(4, 5))
  assert position == POSITION
  for leaf in jax.tree.leaves(state):
    assert leaf.sharding.is_equivalent_to(replicated(mesh_of(devices)), leaf.ndim)


def test_a_save_holds_the_values_of_its_moment(tmp_path):
  """Training goes on, and overwrites donated buffers, while the save is under way."""
  checkpoints = Checkpoints(str(tmp_path))
  state = make_state(4, 1)
  expected = jax.device_get(state)
  checkpoints.save(state, 1, POSITION)
  overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
  jax.block_until_ready(overwrite(state))
  checkpoints.close()
  again = Checkpoints(str(tmp_path))
  assert_bitwise_equal(again.restore(make_state(4, 0), 1)[0], expected)
  again.close()


def test_latest_is_the_newest_complete_checkpoint_and_older_ones_go(run):
  # What a killed save leaves behind.
  torn = os.path.join(run, "checkpoints", "9.orbax-checkpoint-tmp")
  os.makedirs(os.path.join(torn, "state"))
  _, step = load_params(run)
  assert step == 5
  checkpoints = Checkpoints(run)
  assert checkpoints.latest() == 5
  checkpoints.close()
  kept = {name for name in os.listdir(os.path.join(run, "checkpoints")) if name.isdigit()}
  assert kept == {"2", "5"}


def test_a_new_run_has_nothing_to_restore(tmp_path):
  checkpoints = Checkpoints(str(tmp_path / "new"))
  assert checkpoints.latest() is None
  assert checkpoints.restore_newest(make_state(4, 0)) is None
  checkpoints.close()


@pytest.mark.parametrize("weights, field", [("ema", "ema_params"), ("raw", "params")])
def test_load_params_gives_the_weights_asked_for_as_numpy(run, weights, field):
  params, step = load_params(run, weights)
  assert step == 5
  assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(params))
  # The two differ in the fixture, so the wrong field cannot pass.
  assert_bitwise_equal(params, jax.device_get(getattr(make_state(4, 5), field)))


@pytest.mark.parametrize("folder", ["absent", "empty"])
def test_without_a_checkpoint_the_error_names_the_folder(tmp_path, folder):
  workdir = str(tmp_path / folder)
  if folder == "empty":
    os.makedirs(os.path.join(workdir, "checkpoints"))
  with pytest.raises(FileNotFoundError) as error:
    load_params(workdir)
  assert os.path.join(workdir, "checkpoints") in str(error.value)


def test_unknown_weights_are_an_error_that_names_the_known(run):
  with pytest.raises(ValueError, match=r"'best'.*'ema'.*'raw'"):
    load_params(run, "best")
