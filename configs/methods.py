"""THE TABLE: one row per method. Methods differ in these values and in nothing else.

A network sees *streams*, parts of the batch that are noised and masked alike. Each stream has
*terms*: which head is scored on which patches (`umd/objectives.py` defines the words). The four
methods of the UMD paper (Hansen-Estruch et al. 2024) have up to two streams, made by `streams` from
three shares:

  clean   images at t = 0 with most patches masked; x0 is scored on the masked ones, as in MAE.
  noised  images at a random t; eps is scored on the patches that are seen, x0 on those that are
          masked, as in MaskDiT; where none is masked both are scored everywhere, as in DiT.
"""

from typing import NamedTuple


class Method(NamedTuple):
  """A row of the table.

  Attributes:
    network: a name in `umd.models.MODELS`.
    path: from images to noise, a name in `umd.paths.PATHS`.
    no_noise_prob: the share of the batch that stays clean.
    mask_ratio: the share of patches that are masked in the noised part.
    mask_ratio_no_noise: the same of the clean part.
  """

  network: str
  path: str
  no_noise_prob: float
  mask_ratio: float
  mask_ratio_no_noise: float


METHODS = {
  # method       network        path      clean  mask of noised  mask of clean
  "mae": Method("autoencoder", "cosine", 1.0, 0.0, 0.75),
  "umd": Method("autoencoder", "cosine", 0.5, 0.375, 0.75),
  "dit": Method("autoencoder", "cosine", 0.0, 0.0, 0.75),
  "maskdit": Method("autoencoder", "cosine", 0.0, 0.5, 0.75),
}


def streams(no_noise_prob: float, mask_ratio: float, mask_ratio_no_noise: float) -> dict:
  """Makes the streams of a config from the three shares of a row."""
  if not 0 <= no_noise_prob <= 1:
    raise ValueError(f"no_noise_prob={no_noise_prob} must be in [0, 1].")
  seen, unseen = ("visible", "masked") if mask_ratio > 0 else ("all", "all")
  clean = dict(
    rows=(0.0, no_noise_prob),
    timesteps="clean",
    mask_ratio=mask_ratio_no_noise,
    labels=False,
    terms=dict(x0=dict(head="x0", where="masked", weight=1.0)),
  )
  noised = dict(
    rows=(no_noise_prob, 1.0),
    timesteps="uniform",
    mask_ratio=mask_ratio,
    labels=True,
    terms=dict(
      eps=dict(head="eps", where=seen, weight=0.5),
      x0=dict(head="x0", where=unseen, weight=0.5),
    ),
  )
  some = {"clean": no_noise_prob > 0, "noised": no_noise_prob < 1}
  return {name: s for name, s in dict(clean=clean, noised=noised).items() if some[name]}


def streams_of(method: str) -> dict:
  """Makes the streams of a row."""
  row = METHODS[method]
  return streams(row.no_noise_prob, row.mask_ratio, row.mask_ratio_no_noise)
