"""The auto-encoder: published sizes, what it sees, precision, and what initialisation promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from umd.masks import mask_from_noise, patchify
from umd.models.autoencoder import AutoEncoder
from umd.models.layers.blocks import CONDITIONS, REMAT
from umd.models.network import feature_widths, init_params, num_tokens, param_shapes, predict

BATCH, TOKENS, KEEP = 2, 16, 6
MASK = mask_from_noise(jax.random.uniform(jax.random.key(0), (BATCH, TOKENS)), KEEP)
IMAGES = np.random.default_rng(0).standard_normal((BATCH, 16, 16, 3)).astype(np.float32)
TIMES = jnp.array([3, 700])


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, images, t, labels, mask):
  out = predict(model, params, images, t, labels, mask)
  return jnp.concatenate([patchify(out[head], model.patch) for head in model.heads], axis=-1)


def apply(model, params, images=IMAGES, t=TIMES, labels=None, mask=None):
  """Every head side by side: [B, N, heads * P * P * C]."""
  return forward(model, params, images, t, labels, mask)


def distance(a, b):
  """Root mean square of a - b, in units of that of b."""
  return float(np.sqrt(np.mean(np.square(a - b)) / np.mean(np.square(b))))


@pytest.mark.parametrize(
  "variant, size, attributes, millions",
  [
    ("S/4", (64, 64, 3), {}, 43.7),
    ("B/4", (64, 64, 3), {}, 174.2),
    ("B/4", (64, 64, 3), {"num_classes": 1000}, 177.3),
    ("B/4", (64, 64, 3), {"condition": "token"}, 116.3),
    ("L/2", (32, 32, 4), {}, 611.5),
    ("L/2", (32, 32, 4), {"num_classes": 1000}, 616.7),
    ("L/16", (256, 256, 3), {}, 613.8),
    ("L/16", (256, 256, 3), {"condition": "token"}, 410.2),
  ],
)
def test_parameter_counts_are_the_published_ones(variant, size, attributes, millions):
  model = AutoEncoder(variant, size, **attributes)
  params = param_shapes(model)
  assert round(sum(p.size for p in jax.tree.leaves(params)) / 1e6, 1) == millions
  assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  assert num_tokens(model) == 256


@pytest.mark.parametrize(
  "dtype, heads", [("float32", ("x0", "eps")), ("bfloat16", ("x0", "eps")), ("bfloat16", ("v",))]
)
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
def test_outputs_are_float32_images_of_every_head(nano, dtype, mask, heads):
  model, params = nano(dtype=dtype, heads=heads)
  forward = functools.partial(predict, model)
  out = jax.eval_shape(forward, params, jnp.asarray(IMAGES), TIMES, None, mask)
  assert set(out) == set(heads)
  for p in out.values():
    assert (p.shape, p.dtype) == (IMAGES.shape, jnp.float32)
  assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  represent = functools.partial(model.apply, method="represent")
  features = jax.eval_shape(represent, {"params": params}, jnp.asarray(IMAGES), TIMES)
  assert {x.dtype for x in features.values()} == {jnp.dtype("float32")}
  widths = {name: x.shape[1] for name, x in features.items()}
  assert widths == {"class": 32, "mean": 32, "patches": TOKENS * 32} == feature_widths(model)


def test_bfloat16_is_close_to_float32_but_not_the_same(nano):
  model, params = nano()
  exact, rounded = apply(model, params), apply(model.clone(dtype="bfloat16"), params)
  assert 1e-4 < distance(rounded, exact) < 0.05


@pytest.fixture(scope="module")
def loss_and_gradient(nano):
  """`loss_and_gradient(**how)`: the same function of the same parameters, run in another way."""
  model, params = nano()

  @functools.cache
  def run(**how):
    clone = model.clone(**how)

    def loss(params):
      return jnp.square(apply(clone, params, mask=MASK)).mean()

    traced = jax.jit(jax.value_and_grad(loss)).trace(params)
    return *traced.lower().compile()(params), str(traced.jaxpr)

  return run


@pytest.mark.parametrize("remat", REMAT)
@pytest.mark.parametrize("scan", [False, True])
def test_scan_and_remat_change_neither_loss_nor_gradient(loss_and_gradient, scan, remat):
  want, want_gradient, _ = loss_and_gradient()
  got, gradient, program = loss_and_gradient(scan=scan, remat=remat)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-3, 1e-4), gradient, want_gradient)
  assert ("remat" in program) == (remat != "none")


def test_the_encoder_sees_kept_patches_and_no_others(nano):
  model, params = nano()
  rows, columns = np.divmod(np.arange(TOKENS), 4)
  before = np.asarray(apply(model, params, mask=MASK))
  for kept in (False, True):
    images = IMAGES.copy()
    for b in range(BATCH):
      token = np.flatnonzero(np.asarray(MASK.masked)[b] == (not kept))[0]
      r, c = 4 * rows[token], 4 * columns[token]
      images[b, r : r + 4, c : c + 4] += 1.0
    after = np.asarray(apply(model, params, images, mask=MASK))
    # A kept patch reaches every token through attention, a dropped one none.
    changed = (np.abs(after - before) > 1e-3).any(axis=-1)
    assert changed.all() if kept else np.array_equal(after, before)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_keeping_every_patch_in_any_order_equals_no_mask(nano, condition):
  model, params = nano(condition=condition)
  everything = mask_from_noise(jax.random.uniform(jax.random.key(1), (BATCH, TOKENS)), TOKENS)
  assert not np.array_equal(everything.keep[0], np.arange(TOKENS))
  assert distance(apply(model, params, mask=everything), apply(model, params)) < 1e-4


def test_dropped_patches_are_told_apart_by_their_place(nano):
  model, params = nano()
  first, second = np.flatnonzero(np.asarray(MASK.masked)[0])[:2]
  out = np.asarray(apply(model, params, mask=MASK))[0]
  assert distance(out[first], out[second]) > 0.1


def test_the_order_of_kept_patches_does_not_matter(nano):
  model, params = nano()
  noise = np.asarray(MASK.masked) + np.random.default_rng(2).random((BATCH, TOKENS)) / 2
  same = mask_from_noise(jnp.asarray(noise, jnp.float32), KEEP)
  np.testing.assert_array_equal(same.masked, MASK.masked)
  assert not np.array_equal(same.keep, MASK.keep)
  assert distance(apply(model, params, mask=same), apply(model, params, mask=MASK)) < 1e-4


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_timesteps_999_and_1000_are_told_apart(nano, condition, dtype):
  model, params = nano(condition=condition, dtype=dtype)
  late, later = (apply(model, params, t=jnp.full(BATCH, t)) for t in (999, 1000))
  assert distance(late, later) > 0.02


def test_no_labels_means_the_null_label(nano):
  model, params = nano(num_classes=10)
  no_label, null, first, second = (
    apply(model, params, labels=labels)
    for labels in (None, *(jnp.full(BATCH, label) for label in (10, 3, 4)))
  )
  np.testing.assert_array_equal(no_label, null)
  for a, b in [(first, second), (first, null)]:
    assert distance(a, b) > 0.01


def test_channels_of_a_pixel_are_head_after_head(nano):
  model, params = nano()
  bias = np.arange(4 * 4 * 2 * 3, dtype=np.float32)
  params["head"] = {"kernel": jnp.zeros_like(params["head"]["kernel"]), "bias": jnp.asarray(bias)}
  out = np.asarray(apply(model, params))
  pixels = bias.reshape(16, 6)
  want = np.concatenate([pixels[:, :3].reshape(-1), pixels[:, 3:].reshape(-1)])
  np.testing.assert_array_equal(out, np.broadcast_to(want, out.shape))


@pytest.fixture(scope="module", params=list(CONDITIONS))
def initial(request):
  model = AutoEncoder("nano/4", (16, 16, 3), num_classes=10, condition=request.param, scan=True)
  return model, jax.jit(functools.partial(init_params, model))(jax.random.key(0))


def test_at_initialisation_only_adaln_ignores_the_condition(initial):
  model, params = initial
  first, other_label, other_time = (
    np.asarray(apply(model, params, t=jnp.full(BATCH, t), labels=jnp.full(BATCH, label)))
    for t, label in [(0, 1), (0, 2), (500, 1)]
  )
  assert np.array_equal(first, other_label) == (model.condition != "token")
  assert np.array_equal(first, other_time) == (model.condition != "token")
  assert np.abs(first).mean() > 1e-2


def test_class_tokens_differ_at_initialisation(initial):
  tokens = np.asarray(initial[1]["class_tokens"])
  gaps = np.linalg.norm(tokens[:, None] - tokens[None], axis=-1)
  assert (gaps[~np.eye(4, dtype=bool)] > 0.05).all()


def test_layers_start_xavier_uniform_and_different(initial):
  blocks = initial[1]["encoder"]["blocks"]
  qkv = np.asarray(blocks["attention"]["qkv_kernel"])  # [depth, D, 3, D]
  bound = np.sqrt(6 / (32 + 32))  # of each of the three [D, D] matrices
  assert 0.98 * bound < np.abs(qkv).max() <= bound
  assert qkv.std() == pytest.approx(bound / np.sqrt(3), rel=0.05)
  assert np.abs(qkv[0] - qkv[1]).mean() > 0.1 * bound


@pytest.mark.parametrize("size, side", [((18, 16, 3), "18 x 16"), ((16, 15, 3), "16 x 15")])
def test_patch_that_does_not_divide_is_named(size, side):
  with pytest.raises(ValueError, match=rf"'nano/4'.*4 px.*{side} px\. Choose another patch"):
    AutoEncoder("nano/4", size)


@pytest.mark.parametrize("variant", ["XL/4", "B", "B/", "B/0", "B/x", ":B/4", ""])
def test_unknown_variant_is_named_beside_the_known_sizes(variant):
  with pytest.raises(ValueError, match=rf"model\.variant='{variant}'.*'S', 'B', 'L'.*'B/4'"):
    AutoEncoder(variant, (16, 16, 3))
