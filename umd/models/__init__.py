"""Networks by name: what `config.model.name` chooses from. See `umd.models.network`."""

from umd.models.autoencoder import AutoEncoder

MODELS = {"autoencoder": AutoEncoder}


def make(name: str, **attributes):
  """Makes the network of that name.

  Args:
    name: key of MODELS.
    **attributes: of the network, as a config has them. What is left to "auto" suits a forward pass:
      layers run in a loop, which compiles faster, and nothing is rematerialised.

  Raises:
    ValueError: there is no such network, or the network refuses its attributes.
  """
  if name not in MODELS:
    raise ValueError(f"model.name={name!r} is not one of {list(MODELS)}.")
  if isinstance(scan := attributes.get("scan"), str):
    attributes["scan"] = scan != "false"
  if attributes.get("remat") == "auto":
    attributes["remat"] = "none"
  return MODELS[name](**{**attributes, "heads": tuple(attributes["heads"])})
