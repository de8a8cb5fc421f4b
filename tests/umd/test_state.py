"""State and optimiser: the average, what decays, clipping, schedules, steps on several devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from stand_ins import Function

from trainers.optim import decay_mask, make_optimizer, make_schedule
from umd.devices.mesh import check_accumulates, make_mesh, put_batch
from umd.models.autoencoder import AutoEncoder
from umd.models.network import init_params
from umd.objectives import Objective, Stream, Term
from umd.paths import make_path
from umd.state import ema_decay_at, init_state, make_train_step

LR, WD, BETA1, BETA2, CLIP = 0.01, 0.1, 0.9, 0.95, 1.0
START = {"kernel": np.array([1.0, -2.0]), "bias": np.array([3.0])}


def toy_run(gradients, tx, schedule=lambda step: LR, ema_decay=0.9):
  """Trains from START on given gradients; [(state, metrics)] on the host, one per step."""
  mesh = make_mesh()

  def loss(params, batch, key):
    linear = sum((params[k] * batch[k].mean(axis=0)).sum() for k in START)
    return linear, {"stream/term": 2.0 * linear}

  init = lambda key: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), START)
  state = init_state(init, tx, jax.random.key(0), mesh)
  step = make_train_step(Function(loss), tx, schedule, ema_decay=ema_decay, seed=0, state=state)
  history = []
  for g in gradients:
    batch = {k: np.tile(np.float32(g[k]), (mesh.size, 1)) for k in START}
    state, metrics = step(state, put_batch(batch, mesh))
    history.append(jax.device_get((state, metrics)))
  return history


def adamw():
  return make_optimizer(lambda step: LR, wd=WD, beta1=BETA1, beta2=BETA2, clip_norm=CLIP)


@pytest.mark.parametrize("ema_decay", [0.9999, 0.25])
def test_average_is_the_weighted_sum_of_all_parameters_so_far(ema_decay):
  steps, slope = 6, {"kernel": np.array([1.0, 2.0]), "bias": np.array([-1.0])}
  (state, metrics) = toy_run([slope] * steps, optax.sgd(0.5), ema_decay=ema_decay)[-1]
  decays = [min(ema_decay, (1 + k) / (10 + k)) for k in range(steps)]
  for name, start in START.items():
    after = [start - 0.5 * k * slope[name] for k in range(steps + 1)]
    expected = np.prod(decays) * start
    for k, decay in enumerate(decays):
      expected = expected + (1 - decay) * np.prod(decays[k + 1 :]) * after[k + 1]
    np.testing.assert_allclose(state.params[name], after[-1], rtol=1e-6)
    np.testing.assert_allclose(state.ema_params[name], expected, rtol=1e-5)
  assert state.step == steps
  assert metrics["loss/stream/term"] == pytest.approx(2 * metrics["loss"])


def test_decay_of_the_average_ramps_up_to_its_value():
  ramp = np.array([ema_decay_at(jnp.int32(k), 0.9999) for k in (0, 8, 90, 10**6)])
  np.testing.assert_allclose(ramp, [0.1, 0.5, 0.91, 0.9999], rtol=1e-6)
  assert ema_decay_at(jnp.int32(50), 0.5) == 0.5


def test_optimizer_is_clipped_adamw_that_decays_kernels_only():
  rng = np.random.default_rng(0)
  # Norms on both sides of CLIP: without clipping the moments would be others.
  gradients = [
    {k: scale * rng.standard_normal(v.shape) for k, v in START.items()} for scale in (30, 0.1, 3)
  ]
  history = toy_run(gradients, adamw())
  params = {k: v.copy() for k, v in START.items()}
  m, v = ({k: np.zeros_like(x) for k, x in START.items()} for _ in range(2))
  for n, (g, (state, metrics)) in enumerate(zip(gradients, history, strict=True), start=1):
    norm = np.sqrt(sum(np.square(x).sum() for x in g.values()))
    for k in START:
      clipped = g[k] * min(1.0, CLIP / norm)
      m[k] = BETA1 * m[k] + (1 - BETA1) * clipped
      v[k] = BETA2 * v[k] + (1 - BETA2) * clipped**2
      update = m[k] / (1 - BETA1**n) / (np.sqrt(v[k] / (1 - BETA2**n)) + 1e-8)
      params[k] -= LR * (update + WD * params[k] * (k == "kernel"))
      np.testing.assert_allclose(state.params[k], params[k], rtol=1e-5)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)  # as it was before clipping
    size = np.sqrt(sum(np.square(x).sum() for x in params.values()))
    assert metrics["param_norm"] == pytest.approx(size, rel=1e-5)
    assert metrics["lr"] == pytest.approx(LR)


def leaf_name(path):
  return path[-1].key


def test_exactly_the_matrices_decay(nano):
  _, params = nano(num_classes=10)
  leaves = jax.tree_util.tree_leaves_with_path(decay_mask(params))
  names = {decays: {leaf_name(p) for p, d in leaves if d is decays} for decays in (True, False)}
  assert names[True] == {"kernel", "qkv_kernel"}
  tokens = {"class_tokens", "mask_token", "pos_embed", "decoder_pos_embed"}
  assert names[False] == tokens | {"scale", "bias", "qkv_bias", "embedding"}


def test_learning_rate_rises_to_its_peak_and_falls_to_zero():
  assert make_schedule(LR, 100, 0)(0) == pytest.approx(LR)
  schedule, warm = make_schedule(LR, 1000, 0.05), 50
  assert schedule(0) == 0
  assert schedule(warm) == pytest.approx(LR)
  assert schedule(warm / 2) == pytest.approx(LR / 2)
  assert schedule((1000 + warm) / 2) == pytest.approx(LR / 2, rel=1e-5)
  assert schedule(1000) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("warmup", [1, 5, -0.1])
def test_a_warm_up_that_is_no_share_of_the_run_is_an_error(warmup):
  with pytest.raises(ValueError, match=rf"optim\.warmup={warmup} must be in \[0, 1\)"):
    make_schedule(LR, 100, warmup)


@pytest.mark.parametrize("fsdp", [1, 4])
def test_parameters_and_average_do_not_share_memory(fsdp):
  """The step is given both to overwrite, and a buffer can be given only once."""
  shapes = {"kernel": (64, 96), "bias": (3,)}
  init = lambda key: {k: jnp.ones(shape) for k, shape in shapes.items()}
  state = init_state(init, adamw(), jax.random.key(0), make_mesh(fsdp=fsdp))
  pointers = [
    shard.data.unsafe_buffer_pointer()
    for leaf in jax.tree.leaves((state.params, state.ema_params))
    for shard in leaf.addressable_shards
  ]
  assert len(pointers) == len(set(pointers)) == 2 * 2 * jax.device_count()
  jax.tree.map(np.testing.assert_array_equal, state.ema_params, state.params)


PLACES = [(1, 1), (4, 1), (4, 2)]  # devices, and how many share a copy of the parameters


@pytest.fixture(scope="module")
def trained():
  """{(devices, fsdp): [(state, metrics)] at the start and after each of three UMD steps}."""
  model = AutoEncoder("nano/4", (8, 8, 1))
  half = {"eps": Term("eps", "visible", 0.5), "x0": Term("x0", "masked", 0.5)}
  streams = (
    Stream("clean", {"x0": Term("x0", "masked")}, (0.0, 0.5), "clean", 0.75, False),
    Stream("noised", half, (0.5, 1.0), "uniform", 0.5),
  )
  loss, tx = Objective(model, make_path("cosine", 10), streams, 16), optax.sgd(0.2, momentum=0.9)
  images = np.random.default_rng(0).uniform(-1, 1, (3, 16, 8, 8, 1)).astype(np.float32)
  params = jax.device_get(jax.jit(functools.partial(init_params, model))(jax.random.key(0)))
  init = lambda key: jax.tree.map(jnp.asarray, params)
  runs = {}
  for devices, fsdp in PLACES:
    mesh = make_mesh(jax.devices()[:devices], fsdp)
    state = init_state(init, tx, jax.random.key(0), mesh)
    step = make_train_step(loss, tx, lambda step: 0.1, ema_decay=0.9, seed=0, state=state)
    history = [jax.device_get((state, {}))]
    for x in images:
      state, metrics = step(state, put_batch({"image": x}, mesh))
      history.append(jax.device_get((state, metrics)))
    split = {leaf.shape for leaf in jax.tree.leaves(state) if not leaf.is_fully_replicated}
    assert bool(split) == (fsdp > 1)
    runs[devices, fsdp] = history
  return runs


@pytest.mark.parametrize("other", PLACES[1:], ids=str)
def test_a_step_on_one_device_is_the_step_on_four(trained, other):
  for one, four in zip(trained[1, 1], trained[other], strict=True):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), one, four)
  # Otherwise the comparison would be of two runs that stood still.
  first, last = trained[1, 1][0][0], trained[1, 1][-1][0]
  assert np.abs(first.params["head"]["kernel"] - last.params["head"]["kernel"]).max() > 0.01


def test_class_tokens_differ_from_one_another_after_training(trained):
  """Drawn equal they would stay equal for ever, and be one token at the price of four."""
  tokens = trained[4, 1][-1][0].params["class_tokens"]
  gaps = [np.abs(a - b).max() for i, a in enumerate(tokens) for b in tokens[:i]]
  assert len(gaps) == 6
  assert min(gaps) > 0.01


def test_every_step_draws_its_own_randomness_from_seed_and_step():
  mesh, tx = make_mesh(), optax.sgd(0.0)
  loss = Function(lambda params, batch, key: (params["w"].sum() + jax.random.normal(key), {}))
  init = lambda key: {"w": jnp.zeros(2)}
  batch = put_batch({"x": np.zeros(mesh.size, np.float32)}, mesh)
  draws = {}
  for seed in (0, 1):
    state = init_state(init, tx, jax.random.key(0), mesh)
    step = make_train_step(loss, tx, lambda step: 0.0, ema_decay=0.9, seed=seed, state=state)
    for n in range(3):
      guard = jax.tree.map(jnp.copy, state.guard)  # What a step takes is gone.
      again = state.replace(step=jnp.int32(n), params={"w": jnp.ones(2)}, guard=guard)
      state, metrics = step(state, batch)
      draws[seed, n] = float(metrics["loss"])
      # A resumed run has the same number of steps, whatever it carried before.
      again, metrics = step(again.replace(ema_params={"w": jnp.ones(2)}), batch)
      assert float(metrics["loss"]) == pytest.approx(2 + draws[seed, n])
  assert len(set(draws.values())) == 6


@pytest.mark.parametrize("devices, fsdp", [pytest.param(1, 1, marks=pytest.mark.slow), (4, 2)])
def test_micro_batches_make_the_gradient_of_the_whole_batch(nano, devices, fsdp):
  """What is random is drawn first: the steps differ by their rounding only."""
  model, params = nano(image_size=(8, 8, 1), num_classes=3)
  half = {"eps": Term("eps", "visible", 0.5), "x0": Term("x0", "masked", 0.5)}
  streams = (
    Stream("clean", {"x0": Term("x0", "masked")}, (0.0, 0.5), "clean", 0.75, False),
    Stream("noised", half, (0.5, 1.0), "uniform", 0.5),
  )
  objective = Objective(model, make_path("cosine", 10), streams, 16, 0.5)
  mesh, tx = make_mesh(jax.devices()[:devices], fsdp), optax.sgd(1.0)
  images = np.random.default_rng(0).uniform(-1, 1, (16, 8, 8, 1)).astype(np.float32)
  batch = put_batch({"image": images, "label": np.arange(16, dtype=np.int32) % 3}, mesh)
  found = []
  for accumulate in (1, 2):
    state = init_state(lambda key: params, tx, jax.random.key(0), mesh)
    step = make_train_step(
      objective,
      tx,
      lambda step: 1.0,
      ema_decay=0.9,
      seed=0,
      state=state,
      accumulate=accumulate,
    )
    state, metrics = step(state, batch)
    found.append(jax.device_get((state.params, metrics)))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), *found)
  assert np.abs(found[0][0]["head"]["kernel"] - params["head"]["kernel"]).max() > 1e-3


def test_micro_batches_that_are_no_whole_patterns_are_refused():
  mesh = make_mesh()  # of four devices
  for accumulate, batch_size, period in [(1, 4, 16), (2, 16, 2), (3, 12, 1)]:
    check_accumulates(accumulate, batch_size, period, mesh)
  for accumulate, batch_size, period in [(2, 8, 2), (3, 32, 1)]:
    rows = rf"accumulate={accumulate}: each device has {batch_size // 4} "
    with pytest.raises(ValueError, match=rows):
      check_accumulates(accumulate, batch_size, period, mesh)
