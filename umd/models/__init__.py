"""Networks by name: what `config.model.name` chooses from. See `umd.models.network`."""

from umd.models.autoencoder import AutoEncoder

MODELS = {"autoencoder": AutoEncoder}


def make(name: str, **attributes):
  """The network of that name with these attributes.

  Raises:
    ValueError: there is no such network, or the network refuses its attributes.
  """
  if name not in MODELS:
    raise ValueError(f"model.name={name!r} is not one of {list(MODELS)}.")
  return MODELS[name](**attributes)
