"""Metrics of sets of images that compare examples in pairs, on features of some network.

As in `umd.metrics.frechet`, the caller chooses the network: with Inception's features the kernel
distance is the KID, and precision and recall are those of ADM's evaluator.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# Squared distances below this share of |a|^2 + |b|^2 are rounding (float32: 32 times 2^-23) and
# count as 0, so that equal examples are at distance 0 whatever the order of summation.
ROUNDING = 2.0**-18


def kernel_distance(
  x: Float[np.ndarray, "_ _"],
  y: Float[np.ndarray, "_ _"],
  *,
  subsets: int = 100,
  subset_size: int = 1000,
  seed: int = 2020,
  degree: int = 3,
  gamma: float | None = None,
  coef0: float = 1.0,
) -> tuple[float, float]:
  """Returns mean and deviation over random subsets of the unbiased MMD^2 (Binkowski et al. 2018).

  The kernel is (gamma <a, b> + coef0)^degree, gamma being 1 / d unless it is given. Subsets,
  defaults and the deviation (not its estimate for a population) are those of torch-fidelity.
  Features x [n, d] and y [m, d] of less than 32 bits are taken as float32. Kernels are computed in
  their type and summed in float64, which for float32 is off by about 1e-8 times the mean kernel.

  Raises:
    ValueError: feature sizes differ, or a set is smaller than a subset, or a subset has no pairs.
  """
  if x.shape[1] != y.shape[1]:
    raise ValueError(f"x has {x.shape[1]} features, y {y.shape[1]}: give features of one network.")
  smallest = min(len(x), len(y))
  if subsets < 1 or not 2 <= subset_size <= smallest:
    raise ValueError(
      f"subsets={subsets} of subset_size={subset_size} cannot be drawn from x of {len(x)} and y of "
      f"{len(y)} examples: set subsets >= 1 and 2 <= subset_size <= {smallest}."
    )
  dtype = np.result_type(x.dtype, y.dtype, np.float32)
  gamma = 1.0 / x.shape[1] if gamma is None else float(gamma)
  rng = np.random.RandomState(seed)

  def kernel(a, b):
    return (a @ b.T * gamma + coef0) ** degree

  def pairs(a):
    """Averages over pairs of different examples; with the diagonal the estimate were biased."""
    k = kernel(a, a)
    total = k.sum(dtype=np.float64) - np.trace(k, dtype=np.float64)
    return total / (subset_size * (subset_size - 1))

  distances = np.zeros(subsets)
  for i in range(subsets):
    # The old RandomState draws the subsets that torch-fidelity draws.
    a = x[rng.choice(len(x), subset_size, replace=False)].astype(dtype, copy=False)
    b = y[rng.choice(len(y), subset_size, replace=False)].astype(dtype, copy=False)
    distances[i] = pairs(a) + pairs(b) - 2.0 * kernel(a, b).mean(dtype=np.float64)
  return float(distances.mean()), float(distances.std())


def _squared_distances(
  a: Float[Array, "r d"],
  a_norms: Float[Array, "r"],
  b: Float[Array, "c d"],
  b_norms: Float[Array, "c"],
) -> Float[Array, "r c"]:
  """Computes |a - b|^2 = |a|^2 - 2 <a, b> + |b|^2, which is infinite where a norm is."""
  norms = a_norms[:, None] + b_norms
  squares = norms - 2.0 * jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
  return jnp.where(squares < ROUNDING * norms, 0.0, squares)


@functools.partial(jax.jit, static_argnames="k")
def _radii(rows, columns, *, k: int) -> Float[Array, "r"]:
  """Computes the squared distance of each row to its k-th nearest other among `columns`.

  The columns hold the rows as well, and the nearest to a row is the row itself: the radius is the
  last of the k + 1 smallest distances.
  """

  def step(nearest, block):
    distances = jnp.concatenate([nearest, _squared_distances(*rows, *block)], axis=1)
    return -jax.lax.top_k(-distances, k + 1)[0], None

  start = jnp.full((rows[0].shape[0], k + 1), jnp.inf)
  return jax.lax.scan(step, start, columns)[0][:, -1]


@jax.jit
def _inside(rows, row_radii, columns, column_radii):
  """Says whether each row is in the ball of any column [r], and each column in that of any row."""

  def step(rows_in, block):
    *column, radii = block
    distances = _squared_distances(*rows, *column)
    columns_in = (distances <= row_radii[:, None]).any(axis=0)
    return rows_in | (distances <= radii).any(axis=1), columns_in

  start = jnp.zeros(rows[0].shape[0], bool)
  return jax.lax.scan(step, start, (*columns, column_radii))


def _origin(x: np.ndarray) -> np.ndarray:
  """Chooses a point [d] amid the data, from where squares are small and lose little to rounding.

  The point is a multiple of a power of two about as large as the deviations: whole numbers stay
  whole, so that equal distances stay equal.
  """
  few = x[:1000].astype(np.float64)
  unit = 2.0 ** np.floor(np.log2(max(few.std(axis=0).mean(), np.finfo(np.float32).tiny)))
  return np.round(few.mean(axis=0) / unit) * unit


def _blocks(x: np.ndarray, origin: np.ndarray, block: int) -> tuple[Array, Array]:
  """Cuts x - origin into [blocks, size, d], with squared norms [blocks, size], inf for padding.

  The size is at most `block`, and such that there is little padding.
  """
  blocks = -(-len(x) // block)
  size = -(-len(x) // blocks)
  padded = np.zeros((blocks * size, x.shape[1]), np.float32)
  np.subtract(x, origin, out=padded[: len(x)], casting="same_kind")
  norms = np.full(blocks * size, np.inf, np.float32)
  norms[: len(x)] = np.einsum("nd,nd->n", padded, padded, dtype=np.float64)[: len(x)]
  return jnp.asarray(padded.reshape(blocks, size, -1)), jnp.asarray(norms.reshape(blocks, size))


def precision_recall(
  reference: Float[np.ndarray, "_ _"],
  samples: Float[np.ndarray, "_ _"],
  k: int = 3,
  *,
  block: int = 2048,
) -> tuple[float, float]:
  """Returns the shares of samples near the reference, and of the reference near samples.

  These are precision and recall of Kynkaanniemi et al. 2019: an example is near a set if it is in
  the ball of any of its points, whose radius is the distance to that set's k-th nearest other
  point. Reference [n, d], samples [m, d]; squared distances are float32, on the default device,
  which holds both sets and a few blocks of at most `block` x `block` distances at a time. ADM's
  evaluator rounds to float16 where that does not overflow: its numbers differ in the last digits.

  Raises:
    ValueError: a set has no k others to a point, feature sizes differ, or values are not finite.
  """
  for name, x in (("reference", reference), ("samples", samples)):
    if k < 1 or len(x) <= k:
      raise ValueError(
        f"{name}: {len(x)} examples, but k={k} needs k >= 1 and more than k of them."
      )
    if not np.isfinite(x).all():
      raise ValueError(f"{name}: features are not finite: look for NaN or infinity in them.")
  if reference.shape[1] != samples.shape[1]:
    raise ValueError(
      f"reference has {reference.shape[1]} features, samples {samples.shape[1]}: give features of "
      "one network."
    )
  origin = _origin(reference)
  real, fake = (_blocks(x, origin, block) for x in (reference, samples))

  def radii(x):
    squares = jnp.stack([_radii(rows, x, k=k) for rows in zip(*x, strict=True)])
    return jnp.where(jnp.isinf(x[1]), -1.0, squares)  # No example is in the ball of padding.

  real_radii, fake_radii = radii(real), radii(fake)
  near_fake = np.zeros(real[1].shape, bool)
  near_real = []
  for *rows, rows_radii in zip(*fake, fake_radii, strict=True):
    rows_in, columns_in = _inside(rows, rows_radii, real, real_radii)
    near_real.append(rows_in)
    near_fake |= np.asarray(columns_in)
  precision = np.concatenate(near_real)[: len(samples)].mean()
  return float(precision), float(near_fake.ravel()[: len(reference)].mean())
