"""The times at which a sampler stops on its way from the end of a path to 0."""

from collections.abc import Callable, Mapping

import numpy as np

from umd.paths import Path

RHO = 7.0  # Karras et al. 2022, eq. 5.


def _by_log_snr(path: Path, steps: int, spread: Callable[[float, float], np.ndarray]) -> np.ndarray:
  """Spaces times by their half log-SNRs, `spread(first, last)`, [S].

  The first time is the end of the path all the same, and 0 follows after the last. Log-SNRs may be
  infinite at both ends of the path, so the range is cut, see `Path.log_snr_range`.
  """
  if steps == 1:
    return uniform(path, steps)
  lam = path.half_log_snr(path.grid)
  lam = lam[np.isfinite(lam)]
  noisiest, cleanest = path.log_snr_range
  # A grid of real times is too coarse to say how clean the path gets.
  last = min(lam.max(), cleanest) if path.timesteps else cleanest
  times = path.time_of(spread(max(lam.min(), noisiest), last))
  return np.concatenate([[path.end], times[1:], [0]])


def uniform(path: Path, steps: int) -> np.ndarray:
  """Spaces times evenly in t."""
  return np.linspace(path.end, 0, steps + 1)


def quadratic(path: Path, steps: int) -> np.ndarray:
  """Spaces times evenly in the root of t (Song et al. 2021, appendix D.2): denser the cleaner."""
  return path.end * np.linspace(1, 0, steps + 1) ** 2


def log_snr(path: Path, steps: int) -> np.ndarray:
  """Spaces times evenly in the log-SNR but for the last step (Lu et al. 2022)."""
  return _by_log_snr(path, steps, lambda first, last: np.linspace(first, last, steps))


def karras(path: Path, steps: int) -> np.ndarray:
  """Spaces times evenly in (sigma / alpha)^(1/7) but for the last (Karras et al. 2022, eq. 5)."""

  def spread(first, last):
    ends = np.exp(-np.array([first, last]) / RHO)
    return -RHO * np.log(np.linspace(*ends, steps))

  return _by_log_snr(path, steps, spread)


SPACINGS: Mapping[str, Callable[[Path, int], np.ndarray]] = {
  "uniform": uniform,
  "quadratic": quadratic,
  "logsnr": log_snr,
  "karras": karras,
}


def step_schedule(steps: int, path: Path, spacing: str = "uniform") -> np.ndarray:
  """Returns S + 1 strictly decreasing times from the end of the path to 0.

  They are float32, or int32 where the path's times are whole: then they are rounded and kept at
  least 1 apart.

  Args:
    steps: S >= 1, and at most T where times are whole.
    path: the path of the denoiser.
    spacing: key of SPACINGS.

  Raises:
    ValueError: more steps than there are whole times.
  """
  times = SPACINGS[spacing](path, steps)
  if not path.timesteps:
    return times.astype(np.float32)
  if steps > path.timesteps:
    raise ValueError(f"steps={steps} must be in [1, timesteps={path.timesteps}].")
  places = np.arange(steps + 1)
  # At least as far from 0 as there are steps to come, and at least 1 below the one before.
  times = np.maximum(np.round(times), places[::-1])
  return (np.minimum.accumulate(times + places) - places).astype(np.int32)
