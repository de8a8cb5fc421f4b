"""The training loop never waits for the devices but to log."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from stand_ins import Function

from configs import quickstart
from trainers.config.check import read_stage
from trainers.loop import Training, train
from umd import data
from umd.devices.mesh import make_mesh
from umd.state import init_state, make_train_step

STEPS, LOG_EVERY = 12, 4


def loss(params, batch, key):
  value = jnp.square(batch["image"].mean() - params["w"].mean())
  return value, {"stream/term": value}


def test_nothing_is_fetched_between_logs_and_nothing_sent_but_batches(tmp_path, monkeypatch):
  config = quickstart.get_config(f"steps={STEPS},batch_size=32").pretrain
  config.update_from_flattened_dict({"log_every": LOG_EVERY, "checkpoint.every": 0})
  mesh, tx, fetched, before = make_mesh(), optax.sgd(0.1), [], []
  init = lambda key: {"w": jnp.zeros((64, 64))}
  state = init_state(init, tx, jax.random.key(0), mesh)
  compiled = make_train_step(
    Function(loss), tx, lambda step: 0.1, ema_decay=0.9, seed=0, state=state
  )
  kind = type(state.step)
  value = kind._value.fget
  monkeypatch.setattr(kind, "_value", property(lambda x: (fetched.append(x), value(x))[1]))

  def step(state, batch):
    before.append(len(fetched))
    with jax.transfer_guard("disallow"):  # On CPU it sees what is sent, not what is fetched.
      return compiled(state, batch)

  source = data.load("digits", "train")
  train(
    Training(state, lambda: state, step, source, STEPS, [], mesh),
    read_stage(config),
    str(tmp_path),
    "run",
  )
  assert len(before) == STEPS
  logged = np.flatnonzero(np.diff(before)) + 1
  np.testing.assert_array_equal(logged, np.arange(LOG_EVERY, STEPS, LOG_EVERY))
