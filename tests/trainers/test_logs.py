"""Metrics of steps on their way to the logs: what is averaged, counted, told, and ends a run."""

import numpy as np
import pytest

from trainers.logs import INPUT_WAIT, StepMetrics, log


def applied(loss, lr=0.1, **values):
  return {"loss": loss, "lr": lr, "param_norm": 1.0, "skipped": 0, "skipped_row": 0, **values}


def skipped(loss, row, lr=0.1, **values):
  return applied(loss, lr, **values) | {"skipped": 1, "skipped_row": row}


def pending(*steps, first=1, **arguments):
  metrics = StepMetrics(**arguments)
  for step, values in enumerate(steps, first):
    metrics.add(step, {k: np.asarray(v, np.float32) for k, v in values.items()})
  return metrics


def test_means_are_of_the_steps_that_were_applied():
  steps = [applied(1.0, 0.1), skipped(np.nan, 1), applied(3.0, 0.2), skipped(7.0, 1, 0.9)]
  found = pending(*steps, max_skipped=3).drain()
  assert found == pytest.approx({"loss": 2.0, "lr": 0.2, "param_norm": 1.0, "skipped": 2})


def test_each_step_is_counted_once():
  metrics = pending(applied(1.0), skipped(np.nan, 1), max_skipped=3)
  metrics.drain()
  assert metrics.drain() == {}
  metrics.add(3, applied(5.0))
  assert metrics.drain()["loss"] == 5.0


def test_spikes_are_counted_where_they_are_looked_for():
  steps = [applied(1.0, spikes=0), skipped(9.0, 1, spikes=1), skipped(np.nan, 2, spikes=0)]
  found = pending(*steps, max_skipped=3).drain()
  assert (found["skipped"], found["spikes"]) == (2, 1)
  assert "spikes" not in pending(applied(1.0)).drain()


def test_what_was_not_applied_is_told_with_its_reason():
  told, nan = [], {"loss/noised/eps": np.nan, "grad_norm": np.inf}
  fine = {"loss/noised/eps": 1.0, "grad_norm": 1.0}
  steps = [skipped(1.0, 1, **nan), skipped(1.0, 2, **nan), applied(1.0, **fine)]
  steps.append(skipped(8.5, 1, **fine))
  pending(*steps, first=7, max_skipped=3).drain(told.append)
  assert told == [
    "not applied: step 7, 8: grad_norm, loss/noised/eps not finite",
    "not applied: step 10: loss 8.5, a spike",
  ]


def test_a_row_of_them_ends_the_run_with_what_was_found_in_its_last_step():
  steps = [skipped(np.nan, 2), skipped(np.nan, 3), skipped(np.nan, 4)]  # It began before the log.
  asked = []
  inspect = lambda step: asked.append(step) or "Found: a bad image."
  with pytest.raises(FloatingPointError) as error:
    pending(*steps, first=41, max_skipped=3, inspect=inspect).drain()
  assert asked == [42]
  for words in ("Step 42: loss not finite; 3 steps in a row", "Found: a bad image.", "optim.lr"):
    assert words in str(error.value)


def test_a_shorter_row_does_not():
  steps = [skipped(np.nan, 1), skipped(np.nan, 2), applied(1.0), skipped(np.nan, 1)]
  assert pending(*steps, max_skipped=3).drain()["skipped"] == 3


@pytest.mark.parametrize("guarded", [True, False])
def test_a_step_that_was_applied_must_be_finite(guarded):
  values = applied(1.0) | {"param_norm": np.inf}
  if not guarded:  # A linear probe's.
    values = {k: v for k, v in values.items() if not k.startswith("skipped")}
  with pytest.raises(FloatingPointError, match=r"Step 2: param_norm not finite\. .* lost"):
    pending(applied(1.0), values, max_skipped=3).drain()


class Told(list):
  def __init__(self, **pace):
    super().__init__()
    self.pace = pace

  def write(self, step, values):
    self.append((step, values))

  def tick(self, step):
    return {"images_per_second": 10.0, "eta_seconds": 5.0, **self.pace}


@pytest.mark.parametrize(
  ("steps", "text"), [([applied(0.25)], "loss 0.2500"), ([skipped(np.nan, 1)], "loss of no step")]
)
def test_a_log_has_a_line_whether_or_not_a_step_was_applied(steps, text):
  told, lines = Told(), []
  log(9, 20, pending(*steps, max_skipped=2), told, told, lines.append, {INPUT_WAIT: 0.0})
  assert text in lines[-1] and "step 9/20" in lines[-1]
  ((step, values),) = told
  assert step == 9 and values["skipped"] == len(steps) - ("loss" in values)
  assert all(np.isfinite(v) for v in values.values())


def test_mfu_is_told_and_written_where_it_is_known():
  told, lines = Told(teraflops_per_second=81.0, mfu=0.4123), []
  log(9, 20, pending(applied(0.25)), told, told, lines.append, {INPUT_WAIT: 0.0})
  assert "10 images/s  mfu 41.2 %  ETA" in lines[-1]
  assert (told[0][1]["mfu"], told[0][1]["teraflops_per_second"]) == (0.4123, 81.0)
  assert "eta_seconds" not in told[0][1]
  told = Told(teraflops_per_second=81.0)
  log(9, 20, pending(applied(0.25)), told, told, lines.append, {INPUT_WAIT: 0.0})
  assert "mfu" not in lines[-1] and told[0][1]["teraflops_per_second"] == 81.0


@pytest.mark.parametrize(("share", "told"), [(0.0, False), (0.04, False), (0.061, True)])
def test_a_wait_for_input_is_logged_and_told_if_it_is_long(share, told):
  written, lines = Told(), []
  log(9, 20, pending(applied(0.25)), written, written, lines.append, {INPUT_WAIT: share})
  assert written[0][1][INPUT_WAIT] == share
  assert ("waited for input 6% of the time" in lines[-1]) == told == ("input" in lines[-1])
