"""Steps that are not applied: what stays as it was, when the run ends, what is called a spike."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from stand_ins import Function

from trainers.optim import make_optimizer, make_schedule
from umd.devices.mesh import make_mesh, put_batch
from umd.runs.checkpoint import Checkpoints
from umd.state import Guard, ema_decay_at, init_guard, init_state, make_train_step

LEARNT = ("params", "ema_params", "opt_state")
PLACES = {"one device": (1, 1), "four": (4, 1), "four, split": (4, 4)}
GOOD = [{"slope": slope, "root": 1.0} for slope in (1.0, -2.0, 0.5, 3.0)]
BAD = {
  "NaN in the data": {"slope": np.nan, "root": 1.0},
  "infinite loss": {"slope": np.inf, "root": 1.0},
  # The loss is finite, the gradient of sqrt(0) is not.
  "gradient only": {"slope": 1.0, "root": 0.0},
  # Every number is finite, the square of the gradient's norm is not.
  "gradient's norm": {"slope": 1e30, "root": 1.0},
}


def loss(params, batch, key):
  """Linear, but for a root; of rows that are all alike."""
  w = params["kernel"]
  value = batch["slope"].mean() * w.mean() + jnp.sqrt(jnp.square(w[0, 0]) * batch["root"].mean())
  return value, {"stream/term": value}


def rows(batch, mesh):
  return put_batch({k: np.full(mesh.size, v, np.float32) for k, v in batch.items()}, mesh)


class Run:
  """A small run with everything that has a counter of its own: schedule, moments, average."""

  def __init__(self, place, loss=loss, **guard):
    devices, fsdp = PLACES[place]
    self.mesh = make_mesh(jax.devices()[:devices], fsdp)
    schedule = make_schedule(0.1, 50, 0.1)
    tx = make_optimizer(schedule, wd=0.1, beta1=0.9, beta2=0.95, clip_norm=1.0, mu_dtype="bfloat16")
    init = lambda key: {"kernel": jax.random.normal(key, (64, 64)), "bias": jnp.ones(3)}
    self.state = init_state(init, tx, jax.random.key(0), self.mesh)
    self.step = make_train_step(
      Function(loss), tx, schedule, ema_decay=0.9, seed=0, state=self.state, guard=Guard(**guard)
    )

  def train(self, batches):
    """[(state, metrics)] on the host, one for each batch."""
    history = []
    for batch in batches:
      self.state, metrics = self.step(self.state, rows(batch, self.mesh))
      history.append(jax.device_get((self.state, metrics)))
    return history


def assert_same_bits(found, expected):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def learnt(state):
  return [getattr(state, name) for name in LEARNT]


@pytest.fixture(scope="module", params=PLACES)
def run(request):
  return Run(request.param)


@pytest.mark.parametrize("bad", BAD)
def test_a_step_that_is_not_finite_changes_nothing_but_the_counters(run, bad):
  first, skipped, second = run.train([GOOD[0], BAD[bad], GOOD[1]])
  assert [int(m["skipped"]) for _, m in (first, skipped, second)] == [0, 1, 0]
  assert not np.isfinite([skipped[1]["loss"], skipped[1]["grad_norm"]]).all()
  assert_same_bits(learnt(skipped[0]), learnt(first[0]))
  assert skipped[0].step == first[0].step + 1
  assert (skipped[0].guard.row, second[0].guard.row) == (1, 0)
  assert skipped[0].guard.total == first[0].guard.total + 1
  assert np.abs(second[0].params["kernel"] - first[0].params["kernel"]).max() > 1e-4
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(second[0]))


@pytest.mark.parametrize("place", PLACES)
def test_a_run_with_bad_steps_is_the_run_without_them(place):
  """Schedule, bias correction and the average's ramp go on from where they were."""
  run = Run(place)
  start, bad = jax.tree.map(jnp.copy, run.state), list(BAD.values())
  found = run.train([GOOD[0], *bad[:2], GOOD[1], bad[2], GOOD[2], bad[3], GOOD[3]])
  run.state = start
  expected = run.train(GOOD)
  assert_same_bits(learnt(found[-1][0]), learnt(expected[-1][0]))
  assert (found[-1][0].step, found[-1][0].guard.total) == (8, 4)
  applied = [metrics for _, metrics in found if not metrics["skipped"]]
  for a, (_, b) in zip(applied, expected, strict=True):
    assert_same_bits(a, b)


def test_after_a_row_of_them_the_state_waits_as_it_was_before():
  bad = BAD["NaN in the data"]
  run = Run("one device", max_skipped=3)
  history = run.train([GOOD[0], bad, bad, GOOD[1], bad, bad, bad, GOOD[2], bad])
  assert [int(metrics["skipped_row"]) for _, metrics in history] == [0, 1, 2, 0, 1, 2, 3, 4, 5]
  assert_same_bits(learnt(history[-1][0]), learnt(history[3][0]))


def test_a_row_goes_on_where_a_checkpoint_left_it(tmp_path):
  bad = BAD["NaN in the data"]
  batches = [GOOD[0], GOOD[1], bad, bad, bad, GOOD[2]]
  run = Run("one device", max_skipped=3, spike_sigma=2.0, spike_window=2)
  like = jax.tree.map(jnp.zeros_like, run.state)
  history = run.train(batches[:4])
  checkpoints = Checkpoints(str(tmp_path))
  checkpoints.save(run.state, 4, {})
  checkpoints.close()
  expected = run.train(batches[4:])[-1]
  checkpoints = Checkpoints(str(tmp_path))
  run.state, _ = checkpoints.restore(like, 4)
  checkpoints.close()
  assert_same_bits(run.state, history[-1][0])
  assert run.state.guard.row == run.state.guard.seen == 2
  assert_same_bits(run.train(batches[4:])[-1], expected)
  assert expected[0].guard.row == 4  # The last step was fit to be applied, and came too late.


def spikes_by_hand(losses, sigma, window):
  """Which losses are spikes, and (mean, variance) of the others at the end, in float64."""
  seen, mean, var, found = 0, 0.0, 0.0, []
  for x in losses:
    if seen >= window and x > mean + sigma * np.sqrt(var):
      found.append(True)
      continue
    found.append(False)
    seen = seen + 1
    if seen <= window:
      kept = [y for y, spike in zip(losses, found, strict=False) if not spike]
      mean, var = np.mean(kept), np.var(kept)
    else:
      share = 1 / window  # An exponential average of x, and of its squared distance.
      distance = x - mean
      mean += share * distance
      var = (1 - share) * var + share * (1 - share) * distance**2
  return found, mean, var


@pytest.mark.parametrize(("sigma", "window"), [(3.0, 20), (2.0, 5)])
def test_spikes_are_those_that_a_calculation_by_hand_finds(sigma, window):
  rng = np.random.default_rng(0)
  losses = (5.0 * 0.98 ** np.arange(120) + 0.1 * rng.standard_normal(120)).astype(np.float32)
  losses[[2, 40, 41, 90]] += 9  # The first falls into the warm-up and is applied.
  guard, state, found = Guard(1000, sigma, window), init_guard(), []
  judge = jax.jit(guard.judge)
  for x in losses:
    apply, state, metrics = judge(state, x, jnp.float32(1.0))
    assert bool(apply) == (not metrics["spikes"])
    found.append(bool(metrics["spikes"]))
  expected, mean, var = spikes_by_hand(losses.astype(np.float64), sigma, window)
  assert found == expected
  assert not found[2] and all(found[i] for i in (40, 41, 90))
  np.testing.assert_allclose([state.mean, state.var], [mean, var], rtol=1e-4)


def test_a_spike_is_not_applied_and_a_loss_that_is_not_finite_is_none():
  run = Run("one device", spike_sigma=5.0, spike_window=3)
  spike = {"slope": 1.0, "root": 1e12}  # Of finite gradient.
  history = run.train([*GOOD, spike, BAD["NaN in the data"]])
  assert [int(m["spikes"]) for _, m in history] == [0, 0, 0, 0, 1, 0]
  assert [int(m["skipped"]) for _, m in history] == [0, 0, 0, 0, 1, 1]
  assert np.isfinite(history[-2][1]["grad_norm"])
  assert_same_bits(learnt(history[-1][0]), learnt(history[3][0]))


def test_without_spikes_every_finite_loss_is_applied():
  history = Run("one device").train([*GOOD, {"slope": 1.0, "root": 1e12}])
  assert all(not m["skipped"] and "spikes" not in m for _, m in history)


def test_a_guarded_step_is_bit_for_bit_the_plain_one():
  """Numbers that were published before there was a guard stay what they are."""
  tx = optax.adam(0.1)
  init = lambda key: {"kernel": jax.random.normal(key, (64, 64))}

  def plain(params, average, opt_state, step, batch):
    (_, _), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, None)
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    decay = ema_decay_at(step, 0.9)
    return params, optax.incremental_update(params, average, 1.0 - decay), opt_state

  mesh = make_mesh(jax.devices()[:1])
  state = init_state(init, tx, jax.random.key(0), mesh)
  expected = [jax.tree.map(jnp.copy, getattr(state, name)) for name in LEARNT]
  guarded = make_train_step(
    Function(loss), tx, lambda step: 0.1, ema_decay=0.9, seed=0, state=state
  )
  plain = jax.jit(plain, donate_argnums=(0, 1, 2))
  for step, batch in enumerate(GOOD):
    state, _ = guarded(state, rows(batch, mesh))
    expected = plain(*expected, jnp.int32(step), rows(batch, mesh))
  assert_same_bits(learnt(state), list(expected))


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"max_skipped": 0}, r"guard\.max_skipped=0 must be at least 1"),
    ({"spike_sigma": -1.0}, r"guard\.spike_sigma=-1.0 must be 0 \(off\)"),
    ({"spike_sigma": float("nan")}, r"guard\.spike_sigma=nan must be 0 \(off\)"),
    ({"spike_window": 1}, r"guard\.spike_window=1 must be at least 2"),
  ],
)
def test_bad_settings_are_errors_that_name_them(settings, message):
  with pytest.raises(ValueError, match=message):
    Guard(**settings)
