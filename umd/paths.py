"""Noise paths: how an image x0 and Gaussian noise eps mix into x_t, as tables of coefficients.

Everything a network may predict (x0, eps, v) and everything it may see (x_t) is linear in the pair
(x0, eps). A path is therefore one table per quantity, `[T + 1, 2]`: row t holds the coefficients of
x0 and of eps. Row 0 is clean on every path, so "no noise" is a timestep and never a branch.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped


def _along(t: Int[Array, "*b"], x: Shaped[Array, "..."]) -> Int[Array, "..."]:
  """Appends axes to t so that it broadcasts over all but the leading axes of x."""
  return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


@dataclasses.dataclass(frozen=True, eq=False)
class Path:
  """A noise path of T timesteps; t = 0 is clean, t = T (almost) pure noise.

  Attributes:
    name: key in PATHS.
    table: for "x_t", "x0", "eps" and "v", the coefficients `[T + 1, 2]` of (x0, eps).
    time: `[T + 1]`, the coordinate in which v is the velocity of x_t: v = d x_t / d time with
      (x0, eps) held fixed.
  """

  name: str
  table: Mapping[str, np.ndarray]
  time: np.ndarray

  @property
  def timesteps(self) -> int:
    return len(self.time) - 1

  def coefs(self, kind: str, t: Int[Array, "*b"]):
    """Coefficients (of x0, of eps) of the quantity `kind` at timesteps t, each of the shape of t.

    Raises:
      ValueError: `kind` is not one of "x_t", "x0", "eps", "v".
    """
    table = jnp.asarray(self._rows(kind), jnp.float32)
    return table[t, 0], table[t, 1]

  def _rows(self, kind: str) -> np.ndarray:
    if kind not in self.table:
      raise ValueError(f"Unknown quantity {kind!r}; a path knows {sorted(self.table)}.")
    return self.table[kind]

  def combine(
    self, kind: str, x0: Float[Array, "b ..."], eps: Float[Array, "b ..."], t: Int[Array, "*b"]
  ) -> Float[Array, "b ..."]:
    """The quantity `kind` of the pair (x0, eps) at t; `combine("x_t", ...)` adds the noise."""
    a, b = self.coefs(kind, _along(t, x0))
    return a * x0 + b * eps

  def invert(
    self, kind: str, pred: Float[Array, "b ..."], x_t: Float[Array, "b ..."], t: Int[Array, "*b"]
  ) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
    """Recovers (x0, eps) from x_t and a prediction of `kind`: a 2x2 linear system per timestep.

    Only meaningful where `singular(kind)` is False; samplers check that before they start.
    """
    t = _along(t, x_t)
    (alpha, sigma), (a, b) = self.coefs("x_t", t), self.coefs(kind, t)
    det = alpha * b - sigma * a
    return (b * x_t - sigma * pred) / det, (alpha * pred - a * x_t) / det

  def singular(self, kind: str) -> np.ndarray:
    """Timesteps, bool `[T + 1]`, at which (x_t, `kind`) does not determine (x0, eps)."""
    (alpha, sigma), (a, b) = self._rows("x_t").T, self._rows(kind).T
    return alpha * b == sigma * a

  def unpredictable(self, kind: str) -> np.ndarray:
    """Timesteps, bool `[T + 1]`, at which `kind` asks for noise that x_t does not contain."""
    return (self._rows("x_t")[:, 1] == 0) & (self._rows(kind)[:, 1] != 0)


def _make(
  name: str,
  alpha: np.ndarray,
  sigma: np.ndarray,
  v: tuple[np.ndarray, np.ndarray],
  time: np.ndarray,
) -> Path:
  ones, zeros = np.ones_like(alpha), np.zeros_like(alpha)
  rows = {"x_t": (alpha, sigma), "x0": (ones, zeros), "eps": (zeros, ones), "v": v}
  return Path(name, {k: np.stack(r, axis=1) for k, r in rows.items()}, time)


def _variance_preserving(name: str, betas: np.ndarray) -> Path:
  """alpha^2 + sigma^2 = 1; v = alpha eps - sigma x0 (Salimans & Ho 2022), the angular velocity."""
  alpha_bar = np.concatenate([[1.0], np.cumprod(1.0 - betas)])
  alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1.0 - alpha_bar)
  return _make(name, alpha, sigma, (-sigma, alpha), np.arctan2(sigma, alpha))


def cosine(timesteps: int) -> Path:
  """VP path with the cosine schedule of Nichol & Dhariwal (2021), eq. 17, betas capped at .999."""
  s = np.arange(timesteps + 1, dtype=np.float64) / timesteps
  alpha_bar = np.cos((s + 0.008) / 1.008 * np.pi / 2) ** 2
  return _variance_preserving("cosine", np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], 0.999))


def linear(timesteps: int) -> Path:
  """VP path with betas linear from 1e-4 to 2e-2 (Ho et al. 2020), scaled to T = 1000."""
  scale = 1000.0 / timesteps
  betas = np.linspace(scale * 1e-4, scale * 2e-2, timesteps, dtype=np.float64)
  return _variance_preserving("linear", np.minimum(betas, 0.999))


def flow(timesteps: int) -> Path:
  """Straight path x_t = (1 - s) x0 + s eps with s = t / T (Lipman et al. 2023); v = eps - x0."""
  s = np.arange(timesteps + 1, dtype=np.float64) / timesteps
  return _make("flow", 1.0 - s, s, (-np.ones_like(s), np.ones_like(s)), s)


PATHS: Mapping[str, Callable[[int], Path]] = {"cosine": cosine, "linear": linear, "flow": flow}


def make_path(name: str, timesteps: int = 1000) -> Path:
  """Builds the path `name` of T = `timesteps`.

  Raises:
    ValueError: the name is unknown, or T < 1.
  """
  if name not in PATHS:
    raise ValueError(f"path.name={name!r} is not one of {sorted(PATHS)}.")
  if timesteps < 1:
    raise ValueError(f"path.timesteps={timesteps} must be at least 1.")
  return PATHS[name](timesteps)
