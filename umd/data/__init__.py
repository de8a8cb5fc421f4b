"""Images in: sources by name, and the resumable pipeline that batches them."""

from umd.data.pipeline import eval_batches, train_batches
from umd.data.sources import Source, load

__all__ = ["Source", "eval_batches", "load", "train_batches"]
