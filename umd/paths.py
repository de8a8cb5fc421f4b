"""Noise paths: how an image x0 and Gaussian noise eps mix into x_t, in continuous time.

A path is a curve x_t = alpha(t) x0 + sigma(t) eps. Time runs from the image, t = 0 with alpha = 1
and sigma = 0, to noise at t = `end`. So "no noise" is a time and never a branch.

Whatever a network may predict is linear in the pair (x0, eps), too, and a quantity is therefore two
coefficients that are functions of t:

  x_t    (alpha, sigma)
  x0     (1, 0)
  eps    (0, 1)
  v      the velocity d x_t / d tau, where tau is the path's own coordinate of time, see below
  score  (0, -1 / sigma): the gradient of log q(x_t | x0), by which score-based models are trained
  F      of EDM alone: what its preconditioned network puts out

A target is a combination of x0 and eps. To invert a prediction is to solve the two equations of
x_t and of what was predicted for x0 and eps.

The published schedules of diffusion models, `cosine` and `linear`, are tables of T steps. Their
times are whole numbers 0..T, and the table is what a method was trained on. Between whole numbers
the noise is added at the rate of the step: log(alpha) is linear in t, as for the stochastic
differential equation whose beta(t) is constant in each step (Song et al. 2021, arXiv:2011.13456).
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

# Coefficients and times are NumPy arrays in float64 for NumPy times, and JAX arrays in float32 for
# JAX's. Schedules are made of the former, once; networks and solvers work with the latter.
Times = Shaped[Array, "..."] | np.ndarray | float
Coefs = tuple[Array | np.ndarray | np.floating, Array | np.ndarray | np.floating]
Truths = np.ndarray | np.bool_


def _setting(default, help: str, within: str):
  return dataclasses.field(default=default, metadata={"help": help, "within": within})


@dataclasses.dataclass(frozen=True)
class Path(abc.ABC):
  """A noise path. A new one states `end`, `mix`, `velocity` and `tau`, each by its equation.

  Attributes:
    name: key in PATHS.
    timesteps: T where times are the whole numbers 0..T, 0 where they are real.
    start_scale: standard deviation of the noise that sampling starts from.
    log_snr_range: half log-SNRs, of the end and of the cleanest, between which steps are spaced
      where the path goes further: beyond, x_t is noise, or image, to three digits.
  """

  name = ""
  timesteps = 0
  start_scale = 1.0
  log_snr_range = (-5.0, 5.0)

  @property
  @abc.abstractmethod
  def end(self) -> float:
    """Returns the time at which x_t is noise."""

  @abc.abstractmethod
  def mix(self, t) -> Coefs:
    """Returns (alpha, sigma) at floats t, or at whole NumPy times."""

  @abc.abstractmethod
  def velocity(self, t) -> Coefs:
    """Returns the coefficients of v = d x_t / d tau, with x0 and eps held fixed."""

  @abc.abstractmethod
  def tau(self, t):
    """Returns the coordinate of time in which v is finite at both ends: 0 at t = 0, increasing."""

  def input_scale(self, t: Times):
    """Returns the factor by which x_t is multiplied before a network sees it."""
    return 1.0

  def time_input(self, t: Times):
    """Returns the number by which a network is told the time."""
    return t

  @property
  def quantities(self) -> Mapping[str, Callable]:
    """Returns {name: coefficients as a function of t}, see the top of this file."""
    return {
      "x_t": self.mix,
      "x0": lambda t: (1.0 + 0.0 * t, 0.0 * t),
      "eps": lambda t: (0.0 * t, 1.0 + 0.0 * t),
      "v": self.velocity,
      "score": lambda t: (0.0 * t, -1.0 / self.mix(t)[1]),
    }

  @property
  def grid(self) -> np.ndarray:
    """Returns all whole times from 0 to the end, or a thousand steps of real ones."""
    return np.arange(self.timesteps + 1) if self.timesteps else np.linspace(0, self.end, 1001)

  def coefs(self, kind: str, t: Times) -> Coefs:
    """Returns the coefficients (of x0, of eps) of `kind` at times t, each of the shape of t.

    Raises:
      ValueError: the path does not know `kind`.
    """
    if kind not in self.quantities:
      raise ValueError(
        f"Unknown quantity {kind!r}; path {self.name!r} knows {sorted(self.quantities)}."
      )
    return self._at(self.quantities[kind], t)

  def progress(self, t: Times):
    """Returns tau at times t."""
    return self._at(self.tau, t)

  def half_log_snr(self, t: Times):
    """Returns log(alpha / sigma), DPM-Solver's lambda (Lu et al. 2022); it is infinite at t = 0."""

    def lam(t):
      alpha, sigma = self.mix(t)
      xp = _module(t)
      return xp.log(alpha) - xp.log(sigma)

    return self._at(lam, t)

  def time_of(self, half_log_snr: np.ndarray) -> np.ndarray:
    """Inverts `half_log_snr`, to real times also where the path's times are whole."""
    lam = self.half_log_snr(self.grid)
    finite = np.isfinite(lam)
    return np.interp(-half_log_snr, -lam[finite], self.grid[finite])

  def combine(
    self, kind: str, x0: Float[Array, "b ..."], eps: Float[Array, "b ..."], t: Times
  ) -> Float[Array, "b ..."]:
    """Combines (x0, eps) to the quantity `kind`; `combine("x_t", ...)` adds the noise.

    t has the leading axes of x0, or all of them (of length 1 or as in x0).
    """
    a, b = self.coefs(kind, _spread(t, x0))
    return a * x0 + b * eps

  def invert(
    self, kind: str, pred: Float[Array, "b ..."], x_t: Float[Array, "b ..."], t: Times
  ) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
    """Recovers (x0, eps) from x_t and a prediction of `kind`: a 2 x 2 linear system per time.

    It has no solution where `kind` is `singular`; samplers check that before they start.
    """
    t = _spread(t, x_t)
    (alpha, sigma), (a, b) = self.coefs("x_t", t), self.coefs(kind, t)
    det = alpha * b - sigma * a
    return (b * x_t - sigma * pred) / det, (alpha * pred - a * x_t) / det

  def singular(self, kind: str, t: Times) -> Truths:
    """Tells at which of the times t (x_t, `kind`) does not determine (x0, eps)."""
    t = np.asarray(t)
    (alpha, sigma), (a, b) = self.coefs("x_t", t), self.coefs(kind, t)
    return ~np.isfinite(b) | (alpha * b == sigma * a)

  def invertible(self, kind: str) -> bool:
    """Tells whether (x_t, `kind`) determines (x0, eps) at all times but 0, as samplers need."""
    return not self.singular(kind, self.grid[1:]).any()

  def unpredictable(self, kind: str, t: Times) -> Truths:
    """Tells at which of the times t `kind` asks for noise that x_t does not contain."""
    t = np.asarray(t)
    return (self.coefs("x_t", t)[1] == 0) & (self.coefs(kind, t)[1] != 0)

  def _at(self, function: Callable, t: Times):
    """Evaluates a function of NumPy or JAX times at t."""
    if not isinstance(t, jax.Array):
      with np.errstate(divide="ignore", invalid="ignore"):
        return function(np.asarray(t))
    if not jnp.issubdtype(t.dtype, jnp.integer):
      return function(t)
    if not self.timesteps:
      return function(t.astype(jnp.float32))
    # Whole times read a table in float64, so that float32 rounds once and at the end.
    values = self._at(function, self.grid)
    if not isinstance(values, tuple):
      return jnp.asarray(values, jnp.float32)[t]
    table = jnp.asarray(np.stack(values, axis=1), jnp.float32)
    return table[t, 0], table[t, 1]


def _module(t):
  """Returns the library that computes with t."""
  return jnp if isinstance(t, jax.Array) else np


def _spread(t: Times, x: Array) -> Times:
  """Appends axes to t, so that it broadcasts over all but the leading axes of x."""
  return jnp.reshape(t, jnp.shape(t) + (1,) * (x.ndim - jnp.ndim(t)))


@dataclasses.dataclass(frozen=True)
class _Schedule(Path):
  """A variance-preserving table of T steps: alpha^2 + sigma^2 = 1.

  v = alpha eps - sigma x0 (Salimans & Ho 2022) is the angular velocity: tau is the angle.
  """

  timesteps: int = _setting(1000, "T; t = 0 is clean, t = T is noise.", "[1, inf)")

  def __post_init__(self):
    if self.timesteps < 1:
      raise ValueError(f"path.timesteps={self.timesteps} must be at least 1.")

  @property
  @abc.abstractmethod
  def betas(self) -> np.ndarray:
    """Returns 1 - alpha_bar(t) / alpha_bar(t - 1) for t = 1..T, [T]."""

  @functools.cached_property
  def alpha_bar(self) -> np.ndarray:
    """Returns alpha^2 at whole times, [T + 1]."""
    return np.concatenate([[1.0], np.cumprod(1.0 - self.betas)])

  @property
  def end(self):
    return self.timesteps

  def mix(self, t):
    if np.issubdtype(t.dtype, np.integer):
      return np.sqrt(self.alpha_bar[t]), np.sqrt(1.0 - self.alpha_bar[t])
    xp = _module(t)
    log_alpha_bar = xp.interp(t, self.grid, np.log(self.alpha_bar))
    return xp.exp(log_alpha_bar / 2), xp.sqrt(-xp.expm1(log_alpha_bar))

  def velocity(self, t):
    alpha, sigma = self.mix(t)
    return -sigma, alpha

  def tau(self, t):
    alpha, sigma = self.mix(t)
    return _module(t).arctan2(sigma, alpha)


@dataclasses.dataclass(frozen=True)
class Cosine(_Schedule):
  """The cosine schedule of Nichol & Dhariwal (2021), eq. 17, betas capped at .999."""

  name = "cosine"

  @property
  def betas(self):
    s = np.arange(self.timesteps + 1, dtype=np.float64) / self.timesteps
    alpha_bar = np.cos((s + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


@dataclasses.dataclass(frozen=True)
class Linear(_Schedule):
  """Betas linear from 1e-4 to 2e-2 (Ho et al. 2020) at T = 1000, scaled for other T."""

  name = "linear"

  @property
  def betas(self):
    scale = 1000.0 / self.timesteps
    betas = np.linspace(scale * 1e-4, scale * 2e-2, self.timesteps, dtype=np.float64)
    return np.minimum(betas, 0.999)


@dataclasses.dataclass(frozen=True)
class Flow(Path):
  """The straight path x_t = (1 - s) x0 + s eps with s = t / end (Lipman et al. 2023).

  v = eps - x0 is constant along it, and tau is s.
  """

  name = "flow"
  timesteps: int = _setting(1000, "T; 0 for real times in [0, 1].", "[0, inf)")

  def __post_init__(self):
    if self.timesteps < 0:
      raise ValueError(f"path.timesteps={self.timesteps} must be at least 1, or 0 for real times.")

  @property
  def end(self):
    return self.timesteps or 1.0

  def mix(self, t):
    s = t / self.end
    return 1.0 - s, s

  def velocity(self, t):
    return 0.0 * t - 1.0, 0.0 * t + 1.0

  def tau(self, t):
    return t / self.end

  def time_of(self, half_log_snr):
    if self.timesteps:
      return super().time_of(half_log_snr)
    return self.end / (1.0 + np.exp(half_log_snr))


@dataclasses.dataclass(frozen=True)
class _Exploding(Path):
  """x_t = x0 + t eps: the standard deviation of the noise is the time, and v = eps."""

  sigma_min: float
  sigma_max: float

  def __post_init__(self):
    if not 0 < self.sigma_min < self.sigma_max < math.inf:
      raise ValueError(
        f"path.sigma_min={self.sigma_min}, path.sigma_max={self.sigma_max} must satisfy 0 < "
        "sigma_min < sigma_max."
      )

  @property
  def end(self):
    return self.sigma_max

  @property
  def start_scale(self):
    return self.sigma_max

  @property
  def log_snr_range(self):
    return -math.log(self.sigma_max), -math.log(self.sigma_min)

  def mix(self, t):
    return 1.0 + 0.0 * t, 1.0 * t

  def velocity(self, t):
    return 0.0 * t, 1.0 + 0.0 * t

  def tau(self, t):
    return 1.0 * t

  def time_of(self, half_log_snr):
    return np.exp(-half_log_snr)

  def _log_sigma(self, t: Times):
    """Returns log(sigma) as a network is told it; anything below sigma_min is told as sigma_min."""
    xp = _module(t)
    return xp.log(xp.maximum(t, self.sigma_min))


@dataclasses.dataclass(frozen=True)
class VE(_Exploding):
  """The variance-exploding path of score-based models (Song et al. 2021, arXiv:2011.13456).

  The network is told log(sigma / 2), as in Karras et al. (2022), table 1. Sigmas are those of
  CIFAR-10; Song & Ermon (2020) set sigma_max to the largest distance between two training images.
  """

  name = "ve"
  sigma_min: float = _setting(0.01, "The smallest noise that a network is told.", "(0, inf)")
  sigma_max: float = _setting(50.0, "The noise that sampling starts from.", "(0, inf)")

  def time_input(self, t):
    return self._log_sigma(t) - math.log(2.0)


@dataclasses.dataclass(frozen=True)
class EDM(_Exploding):
  """The path and the preconditioning of Karras et al. (2022, arXiv:2206.00364), table 1.

  The denoiser is D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), where F is the network and

    c_skip = s_d^2 / (sigma^2 + s_d^2)         c_in = 1 / sqrt(sigma^2 + s_d^2)
    c_out = sigma s_d / sqrt(sigma^2 + s_d^2)  c_noise = log(sigma) / 4

  with s_d the standard deviation of the data. F's target, (x0 - c_skip x_t) / c_out, is linear in
  (x0, eps) with the coefficients

    F = (sigma / s_d) / sqrt(sigma^2 + s_d^2) x0 - s_d / sqrt(sigma^2 + s_d^2) eps

  which are finite at sigma = 0, where c_out is 0; F has unit variance. To invert F is to apply D.
  """

  name = "edm"
  sigma_min: float = _setting(0.002, "The smallest noise that a network is told.", "(0, inf)")
  sigma_max: float = _setting(80.0, "The noise that sampling starts from.", "(0, inf)")
  sigma_data: float = _setting(0.5, "Standard deviation of the data.", "(0, inf)")

  @property
  def quantities(self):
    return {**super().quantities, "F": self.network_output}

  def network_output(self, t) -> Coefs:
    """Returns the coefficients of F."""
    c_in = self.input_scale(t)
    return t / self.sigma_data * c_in, -self.sigma_data * c_in

  def input_scale(self, t):
    """Returns c_in."""
    return 1.0 / _module(t).sqrt(t**2 + self.sigma_data**2)

  def time_input(self, t):
    """Returns c_noise."""
    return self._log_sigma(t) / 4


PATHS: Mapping[str, type[Path]] = {path.name: path for path in (Cosine, Linear, Flow, VE, EDM)}


def make_path(name: str, *args, **settings) -> Path:
  """Makes the path `name` with its settings, which are the fields of its class.

  Raises:
    ValueError: the name is unknown, the path has no such setting, or a value makes no sense.
  """
  if name not in PATHS:
    raise ValueError(f"path.name={name!r} is not one of {sorted(PATHS)}.")
  known = [field.name for field in dataclasses.fields(PATHS[name])]
  if unknown := sorted(settings.keys() - set(known)):
    raise ValueError(f"path: {name!r} takes no {unknown}, but {known}.")
  return PATHS[name](*args, **settings)
