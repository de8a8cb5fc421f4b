"""Metrics of steps on their way to the logs: what is averaged, counted, told, and ends a run."""

import numpy as np
import pytest

from trainers.logs import INPUT_WAIT, StepMetrics, log


def applied(loss, lr=0.1, **values):
  return {"loss": loss, "lr": lr, "param_norm": 1.0, "skipped": 0, "skipped_row": 0, **values}


def skipped(loss, row, lr=0.1, **values):
  return applied(loss, lr, **values) | {"skipped": 1, "skipped_row": row}


def pending(*steps, first=1, max_skipped=1):
  metrics = StepMetrics(max_skipped)
  for step, values in enumerate(steps, first):
    metrics.add(step, {k: np.asarray(v, np.float32) for k, v in values.items()})
  return metrics


def test_means_are_of_the_steps_that_were_applied():
  steps = [applied(1.0, 0.1), skipped(np.nan, 1), applied(3.0, 0.2), skipped(7.0, 1, 0.9)]
  metrics = pending(*steps, max_skipped=3)
  expected = {"loss": 2.0, "lr": 0.2, "param_norm": 1.0, "skipped": 2}
  assert metrics.drain() == pytest.approx(expected)
  assert metrics.drain() == {}, "a step is counted once"


def test_spikes_are_counted_where_they_are_looked_for():
  steps = [applied(1.0, spikes=0), skipped(9.0, 1, spikes=1), skipped(np.nan, 2, spikes=0)]
  values = pending(*steps, max_skipped=3).drain()
  assert (values["skipped"], values["spikes"]) == (2, 1)
  assert "spikes" not in pending(applied(1.0)).drain()


def test_what_was_not_applied_is_told_with_its_reason():
  lines = []
  bad = {"loss/noised/eps": np.nan, "grad_norm": np.inf}
  fine = {"loss/noised/eps": 1.0, "grad_norm": 1.0}
  steps = [skipped(1.0, 1, **bad), skipped(1.0, 2, **bad), applied(1.0, **fine)]
  steps.append(skipped(8.5, 1, **fine))
  pending(*steps, first=7, max_skipped=3).drain(lines.append)
  assert lines == [
    "not applied: step 7, 8: grad_norm, loss/noised/eps not finite",
    "not applied: step 10: loss 8.5, a spike",
  ]


def test_a_row_of_them_ends_the_run_with_what_was_found_in_its_last_step():
  steps = [skipped(np.nan, 2), skipped(np.nan, 3), skipped(np.nan, 4)]  # It began before the log.
  inspect = lambda step: f"Found: a bad image in step {step}."
  with pytest.raises(FloatingPointError) as error:
    pending(*steps, first=41, max_skipped=3).drain(inspect=inspect)
  expected = "Step 42: loss not finite; 3 steps in a row", "a bad image in step 42.", "optim.lr"
  assert all(words in str(error.value) for words in expected)
  assert pending(*steps, first=41, max_skipped=5).drain()["skipped"] == 3


@pytest.mark.parametrize("guarded", [True, False])
def test_a_step_that_was_applied_must_be_finite(guarded):
  values = applied(1.0) | {"param_norm": np.inf}
  if not guarded:  # A linear probe's.
    values = {k: v for k, v in values.items() if not k.startswith("skipped")}
  with pytest.raises(FloatingPointError, match=r"Step 2: param_norm not finite\. .* lost"):
    pending(applied(1.0), values, max_skipped=3).drain()


class Record(list):
  def write(self, step, values):
    self.append((step, values))


@pytest.mark.parametrize(
  ("values", "pace", "share", "line"),
  [
    ({"loss": 0.25}, {}, 0.0, "loss 0.2500  10 images/s  ETA 0:05"),
    ({"skipped": 1}, {}, 0.04, "loss of no step  10 images/s  ETA 0:05"),
    ({"loss": 1.0}, {"mfu": 0.4123}, 0.0, "loss 1.0000  10 images/s  mfu 41.2 %  ETA 0:05"),
    (
      {"loss": 1.0},
      {"teraflops_per_second": 81.0},
      0.061,
      "loss 1.0000  10 images/s  ETA 0:05  waited for input 6% of the time",
    ),
  ],
)
def test_a_log_writes_everything_and_has_a_line_for_what_matters(values, pace, share, line):
  written, lines = Record(), []
  speed = {"images_per_second": 10.0, **pace}
  shares = {INPUT_WAIT: share}
  log(9, 20, values, speed | {"eta_seconds": 5.0}, shares, written, lines.append)
  assert lines == [f"step 9/20  {line}"]
  assert written == [(9, {**values, **speed, **shares})]
