"""Linear probes: LARS and batch normalisation against plain NumPy, heads that do not meet."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from umd.devices.mesh import batch_sharding, make_mesh, replicated
from umd.metrics import linear_probe

WIDTH, CLASSES, BATCH, WD = 6, 3, 32, 0.02
LRS = np.array([0.3, 3.0, 30.0], np.float32)
train = jax.jit(linear_probe.train_probe, static_argnums=4)


def draw(steps, seed=0):
  """[(features, labels)]: features of many scales and means that hold the label."""
  rng = np.random.default_rng(seed)
  towards, scale = rng.standard_normal((CLASSES, WIDTH)), np.geomspace(0.01, 100, WIDTH)
  batches = []
  for _ in range(steps):
    labels = rng.integers(0, CLASSES, BATCH)
    x = (rng.standard_normal((BATCH, WIDTH)) + towards[labels] + 1.0) * scale
    batches.append((np.float32(x), labels.astype(np.int32)))
  return batches


def lars_in_numpy(params, momenta, gradients, lr, wd):
  """One step of MAE's LARS on {"kernel", "bias"}, in place."""
  for name in ("kernel", "bias"):
    update = gradients[name]
    if name == "kernel":
      update = update + wd * params[name]
      norms = np.linalg.norm(params[name]), np.linalg.norm(update)
      update = update * (1e-3 * norms[0] / norms[1] if min(norms) > 0 else 1.0)
    momenta[name] = 0.9 * momenta[name] + update
    params[name] = params[name] - lr * momenta[name]


def test_a_step_is_maes_lars():
  rng, params = np.random.default_rng(0), {"kernel": np.ones((4, 2)), "bias": np.array([1.0, -2.0])}
  tx, ours = linear_probe.lars(WD), jax.tree.map(jnp.float32, params)
  state, momenta = tx.init(ours), {k: np.zeros_like(v) for k, v in params.items()}
  for lr in (0.5, 3.0, 0.1):  # The momentum sums updates without their learning rates.
    gradients = {k: rng.standard_normal(v.shape) for k, v in params.items()}
    lars_in_numpy(params, momenta, gradients, lr, WD)
    updates, state = tx.update(jax.tree.map(jnp.float32, gradients), state, ours)
    ours = optax.apply_updates(ours, jax.tree.map(lambda u, lr=lr: -lr * u, updates))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, params)


def test_biases_neither_decay_nor_are_scaled_and_a_zero_matrix_can_leave_zero():
  tx = linear_probe.lars(WD)
  params = {"kernel": jnp.zeros((2, 2)), "bias": jnp.full(2, 5.0)}
  gradients = {"kernel": jnp.full((2, 2), 7.0), "bias": jnp.zeros(2)}
  updates, _ = tx.update(gradients, tx.init(params), params)
  np.testing.assert_array_equal(updates["kernel"], gradients["kernel"])
  np.testing.assert_array_equal(updates["bias"], np.zeros(2))


def softmax(logits):
  e = np.exp(logits - logits.max(axis=1, keepdims=True))
  return e / e.sum(axis=1, keepdims=True)


def probe_in_numpy(kernel, batches, lr):
  """Cross-entropy of one head by its analytic gradient; (params, mean, var, losses)."""
  params = {"kernel": np.float64(kernel), "bias": np.zeros(CLASSES)}
  momenta, losses = {k: np.zeros_like(v) for k, v in params.items()}, []
  mean, var = np.zeros(WIDTH), np.ones(WIDTH)
  for features, labels in batches:
    features = np.float64(features)
    x = (features - features.mean(axis=0)) / np.sqrt(features.var(axis=0) + 1e-6)
    probs = softmax(x @ params["kernel"] + params["bias"])
    losses.append(-np.log(probs[np.arange(BATCH), labels]).mean())
    error = (probs - np.eye(CLASSES)[labels]) / BATCH
    lars_in_numpy(params, momenta, {"kernel": x.T @ error, "bias": error.sum(axis=0)}, lr, WD)
    mean = 0.9 * mean + 0.1 * features.mean(axis=0)
    var = 0.9 * var + 0.1 * features.var(axis=0, ddof=1)
  return params, mean, var, losses


@pytest.fixture(scope="module")
def trained():
  """(first state, last state, losses [steps, heads], batches) of a grid of heads."""
  first = linear_probe.init_probe(jax.random.key(0), len(LRS), WIDTH, CLASSES, WD)
  state, batches, losses = first, draw(5), []
  for features, labels in batches:
    state, now = train(state, features, labels, LRS, WD)
    losses.append(np.asarray(now))
  return first, state, np.stack(losses), batches


def test_training_is_the_formula(trained):
  first, state, losses, batches = trained
  assert state.step == len(batches)
  for head, lr in enumerate(LRS):
    params, mean, var, expected = probe_in_numpy(first.params["kernel"][head], batches, lr)
    for name in params:
      np.testing.assert_allclose(state.params[name][head], params[name], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(state.mean, mean, rtol=1e-4)
    np.testing.assert_allclose(state.var, var, rtol=1e-4)
    np.testing.assert_allclose(losses[:, head], expected, rtol=1e-4)
  assert np.ptp(losses[-1]) > 0.01, "the learning rates made no difference"


def test_evaluation_normalises_by_running_statistics(trained):
  _, state, _, batches = trained
  features = batches[0][0]
  x = (features - np.asarray(state.mean)) / np.sqrt(np.asarray(state.var) + 1e-6)
  for head in range(len(LRS)):
    expected = x @ np.asarray(state.params["kernel"][head]) + state.params["bias"][head]
    found = linear_probe.predict(state, features)[head]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
  # One example's logits do not depend on the others, as they would by the batch's statistics.
  alone = linear_probe.predict(state, features[:1])
  np.testing.assert_allclose(
    alone, linear_probe.predict(state, features)[:, :1], rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize("k", [1, 2, 5])
def test_a_hit_is_a_label_among_the_k_largest(k):
  rng = np.random.default_rng(1)
  logits, labels = rng.standard_normal((2, 40, 7)), rng.integers(0, 7, 40)
  found = linear_probe.hits(jnp.float32(logits), jnp.int32(labels), k)
  rank = (logits > np.take_along_axis(logits, labels[None, :, None], axis=2)).sum(axis=2)
  np.testing.assert_array_equal(found, (rank < k).T)
  assert 0 < np.mean(found) < 1


def test_heads_start_equal_and_small():
  state = linear_probe.init_probe(jax.random.key(0), 3, 200, 50, WD)
  kernel = np.asarray(state.params["kernel"])
  np.testing.assert_array_equal(kernel[0], kernel[2])
  assert kernel[0].std() == pytest.approx(0.01, rel=0.03)
  assert not state.params["bias"].any()


def test_a_batch_split_over_devices_is_one_batch(trained):
  first, expected, _, batches = trained
  mesh = make_mesh()
  everywhere, rows = replicated(mesh), batch_sharding(mesh)
  step = jax.jit(
    lambda state, x, y: linear_probe.train_probe(state, x, y, LRS, WD)[0],
    in_shardings=(everywhere, rows, rows),
    out_shardings=everywhere,
  )
  state = jax.device_put(first, everywhere)
  for features, labels in batches:
    state = step(state, features, labels)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
  jax.tree.map(close, jax.device_get(state), jax.device_get(expected))
