"""Images in: sources by name, preprocessing ops, and the resumable pipeline that batches them."""

from umd.data.pipeline import Source, eval_batches, train_batches
from umd.data.sources import from_arrays, load

__all__ = ["Source", "eval_batches", "from_arrays", "load", "train_batches"]
