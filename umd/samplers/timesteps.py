"""Which timesteps a sampler stops at on its way from T to 0."""

from collections.abc import Callable, Mapping

import numpy as np

from umd.paths import Path

# Half log-SNRs between which steps are spaced where a path goes further: beyond, x_t is noise, or
# image, to three digits, and there is nothing to be found out.
NOISIEST, CLEANEST = -5.0, 5.0
RHO = 7.0  # Karras et al. 2022, eq. 5.


def half_log_snr(path: Path) -> np.ndarray:
  """lambda = log(alpha / sigma) at every timestep, `[T + 1]`; inf at 0, and -inf where alpha = 0.

  It is the time of DPM-Solver (Lu et al. 2022), half the logarithm of the signal-to-noise ratio.
  """
  alpha, sigma = path.table["x_t"].T
  with np.errstate(divide="ignore"):
    return np.log(alpha) - np.log(sigma)


def _by_log_snr(path: Path, steps: int, spread: Callable[[float, float], np.ndarray]) -> np.ndarray:
  """T, then timesteps of the half log-SNRs `spread(first, last)`, [S], but the first, then 0."""
  if steps == 1:  # From T to 0, where log-SNRs may be infinite.
    return uniform(path, steps)
  snr = half_log_snr(path)
  found = np.isfinite(snr)
  first, last = max(snr[found].min(), NOISIEST), min(snr[found].max(), CLEANEST)
  ts = np.interp(-spread(first, last), -snr[found], np.flatnonzero(found))
  return np.concatenate([[path.timesteps], ts[1:], [0]])


def uniform(path: Path, steps: int) -> np.ndarray:
  """Even in t."""
  return np.linspace(path.timesteps, 0, steps + 1)


def quadratic(path: Path, steps: int) -> np.ndarray:
  """Even in the root of t (Song et al. 2021, appendix D.2): denser the cleaner."""
  return path.timesteps * np.linspace(1, 0, steps + 1) ** 2


def log_snr(path: Path, steps: int) -> np.ndarray:
  """Even in the log-SNR but for the last step (Lu et al. 2022)."""
  return _by_log_snr(path, steps, lambda first, last: np.linspace(first, last, steps))


def karras(path: Path, steps: int) -> np.ndarray:
  """Even in (sigma / alpha)^(1/7) but for the last step (Karras et al. 2022, eq. 5)."""

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
  """S + 1 strictly decreasing timesteps from T to 0, int32.

  Args:
    steps: S, 1 <= S <= T.
    path: of the denoiser.
    spacing: key of SPACINGS, whose timesteps are rounded and kept at least 1 apart.

  Raises:
    ValueError: not 1 <= steps <= T.
  """
  if not 1 <= steps <= path.timesteps:
    raise ValueError(f"steps={steps} must be in [1, timesteps={path.timesteps}].")
  places = np.arange(steps + 1)
  # At least as far from 0 as there are steps to come, and at least 1 below the one before.
  ts = np.maximum(np.round(SPACINGS[spacing](path, steps)), places[::-1])
  return (np.minimum.accumulate(ts + places) - places).astype(np.int32)
