"""Distances between sets of images, computed on features of some network.

What the features are is the caller's business, and so is the name: only Inception's features
make a Frechet distance an FID.
"""

import numpy as np
from jaxtyping import Float


def moments(features: Float[np.ndarray, "n d"]) -> tuple[np.ndarray, np.ndarray]:
  """Mean [d] and covariance [d, d] (with n - 1) of features, in float64.

  Raises:
    ValueError: fewer than two examples.
  """
  if len(features) < 2:
    raise ValueError(f"A covariance needs at least 2 examples, got {len(features)}.")
  features = features.astype(np.float64)
  return features.mean(axis=0), np.cov(features, rowvar=False).reshape(features.shape[1], -1)


def frechet_distance(
  mu1: Float[np.ndarray, "d"],
  sigma1: Float[np.ndarray, "d d"],
  mu2: Float[np.ndarray, "d"],
  sigma2: Float[np.ndarray, "d d"],
) -> float:
  """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Frechet 1957; Heusel et al. 2017).

  The trace of the root is the sum of the roots of the eigenvalues of S1^(1/2) S2 S1^(1/2), which
  is symmetric: stable also where a covariance is singular.
  """
  mu1, sigma1, mu2, sigma2 = (np.asarray(x, np.float64) for x in (mu1, sigma1, mu2, sigma2))
  values, vectors = np.linalg.eigh(sigma1)
  root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
  cross = np.linalg.eigvalsh(root @ sigma2 @ root)
  trace = np.trace(sigma1) + np.trace(sigma2) - 2.0 * np.sqrt(np.maximum(cross, 0.0)).sum()
  return float(np.square(mu1 - mu2).sum() + trace)


def inception_score(probs: Float[np.ndarray, "n c"]) -> float:
  """exp(E KL(p(y|x) || p(y))) over one split (Salimans et al. 2016); between 1 and c.

  0 log 0 counts as 0.
  """
  probs = probs.astype(np.float64)
  marginal = probs.mean(axis=0, keepdims=True)
  ratio = np.divide(probs, marginal, out=np.ones_like(probs), where=probs > 0)
  return float(np.exp((probs * np.log(ratio)).sum(axis=1).mean()))
