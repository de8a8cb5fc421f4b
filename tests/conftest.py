"""Four virtual CPU devices, shapes checked at trace time, and tiny models, for every test."""

import atexit
import os
import shutil
import tempfile

from xla_flags import QUICK

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=4",
    QUICK,
  ]
)
os.environ["NPROC"] = "32"  # virtual devices wait for one another: each needs a thread
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  # What one worker or program of this run has compiled the others need not: many tests start the
  # same training in processes of their own. It begins empty, so nothing depends on earlier runs.
  CACHE = tempfile.mkdtemp(prefix="umd_tests_")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
  atexit.register(shutil.rmtree, CACHE, ignore_errors=True)

import jaxtyping
import pytest

CHECKED = ["paths", "masks", "losses", "objectives", "models", "samplers"]
CHECKED += ["metrics.frechet", "metrics.pairwise", "trained.inference"]
# As in PEP 484, an int will do where a float is asked for.
TYPECHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
jaxtyping.install_import_hook([f"umd.{name}" for name in CHECKED], TYPECHECKER)


def random_params(model, seed=0):
  """A random value for every parameter: zero-initialised AdaLN would hide the condition."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from umd.models.network import param_shapes

  shapes = param_shapes(model)
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    values = 0.2 * rng.standard_normal(leaf.shape) + (path[-1].key == "scale")
    return jnp.asarray(values, leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="session")
def nano():
  """`nano(**attributes) -> (model, random parameters)`: 16 px images of 16 tokens by default."""
  from umd.models.autoencoder import AutoEncoder

  def build(variant="nano/4", image_size=(16, 16, 3), **attributes):
    model = AutoEncoder(variant, image_size, **attributes)
    return model, random_params(model)

  return build


@pytest.fixture
def small_inception(monkeypatch):
  """Puts random projections in Inception's place; see `stand_ins.small_inception`."""
  import stand_ins

  return stand_ins.small_inception(monkeypatch.setattr)


@pytest.fixture
def small_vae(monkeypatch):
  """Puts tiny random auto-encoders in the place of published ones; see `stand_ins.small_vae`."""
  import stand_ins

  stand_ins.small_vae(monkeypatch.setattr)
