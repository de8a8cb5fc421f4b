"""Inception against TensorFlow's operations, and against torch-fidelity's network where it is."""

import importlib.util
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from umd.metrics import inception
from umd.metrics.inception import LOGITS, POOL, Inception, Pool, from_torch, resize

SHAPES = jax.eval_shape(Inception().init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]


def random_tensors(seed=0):
  """Random tensors in the published file's names and shapes; activations stay near 1."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.standard_normal(shape, np.float32)
  tensors = {"fc.weight": normal(LOGITS, POOL) / 45, "fc.bias": 10 + normal(LOGITS)}

  def add(path, leaf):
    if (layer := jax.tree_util.keystr(path[:-1], simple=True, separator=".")) == "fc":
      return
    if path[-1].key == "kernel":
      h, w, i, o = leaf.shape
      tensors[f"{layer}.conv.weight"] = normal(o, i, h, w) * np.sqrt(2 / (h * w * i), dtype="f")
      tensors[f"{layer}.bn.num_batches_tracked"] = np.zeros((), np.int64)
      tensors[f"{layer}.bn.weight"] = rng.uniform(0.6, 1.4, o).astype(np.float32)
      tensors[f"{layer}.bn.bias"] = 0.2 * normal(o)
      tensors[f"{layer}.bn.running_mean"] = 0.2 * normal(o)
      tensors[f"{layer}.bn.running_var"] = rng.uniform(0.7, 1.9, o).astype(np.float32)

  jax.tree_util.tree_map_with_path(add, SHAPES)
  return tensors


@pytest.fixture(scope="module")
def tensors():
  return random_tensors()


@pytest.fixture(scope="module")
def outputs(tensors):
  """images [B, H, W, 3] of any type -> outputs, as numpy."""
  params = from_torch(tensors)
  apply = jax.jit(lambda p, x: Inception().apply({"params": p}, x))
  return lambda images: jax.device_get(apply(params, jnp.asarray(images, jnp.float32)))


def images(height, width, count=2):
  """Noise over a gradient: every frequency, and a mean that differs between images."""
  rng = np.random.default_rng(height)
  ramp = np.linspace(0, 200, width)[:, None] * rng.uniform(0, 1, (count, 1, 1, 3))
  return (ramp + rng.uniform(0, 55, (count, height, width, 3))).astype(np.uint8)


def assert_close(found, expected):
  """To 1e-5 of the largest value of each output, and none of them trivial."""
  for name, value in expected.items():
    value = np.asarray(value)
    assert 0.05 < value.std() < 5, name
    assert found[name].shape == value.shape and found[name].dtype == np.float32
    assert np.abs(found[name] - value).max() < 1e-5 * np.abs(value).max(), name


def tensorflow_outputs(tensors, images):
  """The network as its paper and its graph describe it, in TensorFlow's own operations."""
  import tensorflow as tf

  def conv(x, name, stride=1, padding="SAME"):
    kernel = tensors[f"{name}.conv.weight"].transpose(2, 3, 1, 0)
    gain, bias, mean, var = (
      tensors[f"{name}.bn.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
    )
    x = tf.nn.conv2d(x, kernel, stride, padding)
    return tf.nn.relu(tf.nn.batch_normalization(x, mean, var, bias, gain, 1e-3))

  def convs(x, prefix, *names):
    for name in names:
      x = conv(x, prefix + name)
    return x

  halve = lambda x: tf.nn.max_pool2d(x, 3, 2, "VALID")
  average = lambda x: tf.nn.avg_pool2d(x, 3, 1, "SAME")
  join = lambda *parts: tf.concat(parts, -1)
  x = tf.compat.v1.image.resize_bilinear(
    tf.constant(images, tf.float32), (299, 299), align_corners=False, half_pixel_centers=False
  )
  x = conv((x - 128) * 0.0078125, "Conv2d_1a_3x3", 2, "VALID")
  x = conv(conv(x, "Conv2d_2a_3x3", 1, "VALID"), "Conv2d_2b_3x3")
  x = halve(conv(conv(halve(x), "Conv2d_3b_1x1"), "Conv2d_4a_3x3", 1, "VALID"))
  for b in ("Mixed_5b.branch", "Mixed_5c.branch", "Mixed_5d.branch"):
    fives, threes = convs(x, b, "5x5_1", "5x5_2"), convs(x, b, "3x3dbl_1", "3x3dbl_2", "3x3dbl_3")
    x = join(conv(x, b + "1x1"), fives, threes, conv(average(x), b + "_pool"))
  b = "Mixed_6a.branch"
  threes = conv(convs(x, b, "3x3dbl_1", "3x3dbl_2"), b + "3x3dbl_3", 2, "VALID")
  x = join(conv(x, b + "3x3", 2, "VALID"), threes, halve(x))
  for letter in "bcde":
    b = f"Mixed_6{letter}.branch"
    ones = conv(x, b + "1x1")
    if letter == "d":
      spatial = tf.reshape(ones[..., :7], (len(images), -1))
    seven = convs(x, b, "7x7_1", "7x7_2", "7x7_3")
    double = convs(x, b, *(f"7x7dbl_{i}" for i in range(1, 6)))
    x = join(ones, seven, double, conv(average(x), b + "_pool"))
  b = "Mixed_7a.branch"
  threes = conv(conv(x, b + "3x3_1"), b + "3x3_2", 2, "VALID")
  seven = conv(convs(x, b, "7x7x3_1", "7x7x3_2", "7x7x3_3"), b + "7x7x3_4", 2, "VALID")
  x = join(threes, seven, halve(x))
  for b, pool in (
    ("Mixed_7b.branch", average),
    ("Mixed_7c.branch", lambda x: tf.nn.max_pool2d(x, 3, 1, "SAME")),
  ):
    three, double = conv(x, b + "3x3_1"), convs(x, b, "3x3dbl_1", "3x3dbl_2")
    threes = join(conv(three, b + "3x3_2a"), conv(three, b + "3x3_2b"))
    doubles = join(conv(double, b + "3x3dbl_3a"), conv(double, b + "3x3dbl_3b"))
    x = join(conv(x, b + "1x1"), threes, doubles, conv(pool(x), b + "_pool"))
  pool = tf.reduce_mean(x, (1, 2))
  logits = tf.matmul(pool, tensors["fc.weight"].T)
  return {"pool": pool, "spatial": spatial, "logits": logits}


def test_outputs_are_tensorflows(tensors, outputs):
  x = images(48, 80, 3)
  assert_close(outputs(x), tensorflow_outputs(tensors, x))


@pytest.fixture(scope="module")
def network(tensors, tmp_path_factory):
  """torch-fidelity's network with these tensors and a hook for sFID's features, and their file."""
  torch = pytest.importorskip("torch", reason="PyTorch is not a requirement of this project")
  if (spec := importlib.util.find_spec("torch_fidelity")) is None:
    pytest.skip("torch-fidelity is not a requirement of this project")
  # The module of the network alone: the package itself imports torchvision and much else.
  package = types.ModuleType("torch_fidelity")
  package.__path__ = spec.submodule_search_locations
  sys.modules.setdefault("torch_fidelity", package)
  from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

  path = str(tmp_path_factory.mktemp("weights") / "weights.pth")
  torch.save({key: torch.from_numpy(np.array(value)) for key, value in tensors.items()}, path)
  network = FeatureExtractorInceptionV3("", ["2048", "logits_unbiased"], path)
  spatial = []
  network.Mixed_6d.branch1x1.register_forward_hook(lambda *args: spatial.append(args[-1]))

  def run(images):
    pool, logits = network(torch.from_numpy(images).permute(0, 3, 1, 2))
    flat = spatial.pop()[:, :7].permute(0, 2, 3, 1).flatten(1)
    return {"pool": pool, "spatial": flat, "logits": logits}

  return run, path


@pytest.mark.parametrize("height, width", [(32, 32), (64, 64), (299, 299), (90, 40), (400, 301)])
def test_outputs_are_torch_fidelitys(height, width, outputs, network):
  x = images(height, width, 2)
  assert_close(outputs(x), network[0](x))


def test_a_file_of_pytorch_gives_the_same_parameters(tensors, network):
  torch_checkpoint = pytest.importorskip("umd.weights.pytorch")
  read = from_torch(torch_checkpoint.read(network[1]))
  jax.tree.map(np.testing.assert_array_equal, read, from_torch(tensors))


@pytest.mark.parametrize("height, width", [(2, 2), (32, 32), (37, 401), (299, 26), (512, 700)])
def test_resize_is_tensorflow_1s(height, width):
  import tensorflow as tf

  x = np.random.default_rng(1).uniform(0, 255, (2, height, width, 3)).astype(np.float32)
  expected = tf.compat.v1.image.resize_bilinear(x, (299, 299))
  np.testing.assert_allclose(resize(jnp.asarray(x)), expected, rtol=0, atol=255e-5)
  half_pixel = jax.image.resize(x, (2, 299, 299, 3), "bilinear", antialias=False)
  assert np.abs(expected - half_pixel).max() > 1


@pytest.mark.parametrize(
  "pool, size", [(Pool("average"), 8), (Pool("max"), 8), (Pool("max", 2), 17), (Pool("max", 2), 5)]
)
def test_pools_look_at_no_padding(pool, size):
  # Far below zero: a padding of zeros would be every border's maximum, and would raise its mean.
  x = np.random.default_rng(0).standard_normal((2, size, size, 3)) - 100
  starts = range(-1, size - 1) if pool.stride == 1 else range(0, size - 2, 2)
  reduce = np.max if pool.kind == "max" else np.mean
  window = lambda i, j: x[:, max(i, 0) : i + 3, max(j, 0) : j + 3]
  rows = [np.stack([reduce(window(i, j), axis=(1, 2)) for j in starts], 1) for i in starts]
  found = inception._pool(jnp.asarray(x, jnp.float32), pool)
  np.testing.assert_allclose(found, np.stack(rows, 1), rtol=1e-6)


def test_images_without_three_channels_are_an_error():
  grey = jax.ShapeDtypeStruct((1, 32, 32, 1), jnp.float32)
  with pytest.raises(ValueError, match="1 channels, not 3"):
    jax.eval_shape(Inception().apply, {"params": SHAPES}, grey)


def test_every_product_is_computed_in_full_precision():
  x = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)
  jaxpr = jax.make_jaxpr(Inception().apply)({"params": SHAPES}, x)
  found = []

  def walk(jaxpr):
    for equation in jaxpr.eqns:
      if equation.primitive.name in ("conv_general_dilated", "dot_general"):
        found.append(equation.params["precision"])
      for inner in jaxprs_in_params(equation.params):
        walk(inner)

  walk(jaxpr.jaxpr)
  assert len(found) == 94 + 1  # convolutions, logits
  assert set(found) == {(jax.lax.Precision.HIGHEST,) * 2}


@pytest.mark.parametrize("rows", range(1, 10))
def test_chunks_do_not_change_what_is_computed(rows):
  seen = []

  def double(x):
    seen.append(len(x))
    return {"twice": 2 * x, "sum": x.sum(axis=1)}

  x = jnp.arange(rows * 2.0).reshape(rows, 2)
  found = inception._in_chunks(double, x, 4)
  np.testing.assert_array_equal(found["twice"], 2 * x)
  np.testing.assert_array_equal(found["sum"], x.sum(axis=1))
  assert set(seen) == {max(n for n in (1, 2, 3, 4) if rows % n == 0)}


def test_the_published_file_holds_these_tensors(tensors):
  """95,628,359 bytes: the floats, and between 100 and 300 bytes of names and places for each."""
  floats = [value for key, value in tensors.items() if "num_batches" not in key]
  rest = 95_628_359 - 4 * sum(value.size for value in floats)
  assert len(floats) == 94 * 5 + 2 and 100 < rest / len(floats) < 300


def test_parameters_are_those_of_the_module_and_ignore_what_is_unused(tensors):
  found = from_torch(tensors)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(
    lambda x: (x.shape, x.dtype), SHAPES
  )
  unused = lambda key: key == "fc.bias" or key.endswith("num_batches_tracked")
  fewer = from_torch({key: value for key, value in tensors.items() if not unused(key)})
  jax.tree.map(np.testing.assert_array_equal, found, fewer)


@pytest.mark.parametrize(
  "change, message",
  [
    (
      lambda t: t.pop("Mixed_6d.branch1x1.conv.weight"),
      "Mixed_6d.branch1x1.conv.weight is missing",
    ),
    (lambda t: t.update(extra=np.zeros(3)), "extra is unexpected"),
    (
      lambda t: t.update({"fc.weight": np.zeros((1000, 2048))}),
      "fc.weight has shape (1000, 2048), not (1008, 2048)",
    ),
    (lambda t: t.clear(), "and 466 more"),
  ],
)
def test_other_tensors_are_one_clear_error(tensors, change, message):
  changed = dict(tensors)
  change(changed)
  with pytest.raises(ValueError, match=re.escape(message)) as error:
    from_torch(changed)
  assert "pt_inception-2015-12-05-6726825d.pth" in str(error.value)
  assert len(re.findall("missing|unexpected|has shape", str(error.value))) <= 5
