"""Classifies frozen features by their nearest neighbours (DINO's protocol)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from umd.devices.mesh import BATCH, WHOLE, batch_sharding, replicated

TEMPERATURE = 0.07
BLOCK = 2**26  # The similarities that a device holds at a time (256 MB).


def _unit(x):
  """Scales rows to length 1; a row of zeros stays."""
  return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def nearest(
  train: Float[np.ndarray, "n d"], test: Float[np.ndarray, "m d"], k: int, mesh: Mesh
) -> tuple[Float[np.ndarray, "m k"], Int[np.ndarray, "m k"]]:
  """Finds the k training rows most similar to each test row; returns their similarities and ids.

  The best comes first; similarity is the cosine. Test rows are dealt out to the devices, and
  training rows come by in blocks, so that memory is bounded whatever n is.
  """
  n, m = len(train), len(test)
  share = -(-m // mesh.size)
  rows = batch_sharding(mesh)

  def deal_out(x):
    padded = np.pad(x, ((0, share * mesh.size - m), (0, 0)))
    return jax.make_array_from_callback(padded.shape, rows, lambda at: padded[at])

  def step(query, similarity, ids, block, start):
    at = start + jnp.arange(len(block), dtype=jnp.int32)
    # TPUs and GPUs would round the factors otherwise, and mistake neighbours.
    cosine = jnp.matmul(_unit(query), _unit(block).T, precision=jax.lax.Precision.HIGHEST)
    cosine = jnp.where(at < n, cosine, -jnp.inf)
    ids = jnp.concatenate([ids, jnp.broadcast_to(at, cosine.shape)], axis=1)
    best, where = jax.lax.top_k(jnp.concatenate([similarity, cosine], axis=1), k)
    return best, jnp.take_along_axis(ids, where, axis=1)

  specs = dict(in_specs=(BATCH,) * 3 + (WHOLE, WHOLE), out_specs=BATCH)
  step = jax.shard_map(step, mesh=mesh, **specs)
  step = jax.jit(step, donate_argnums=(1, 2))
  query = deal_out(test)
  similarity = deal_out(np.full((m, k), -np.inf, np.float32))
  ids = deal_out(np.zeros((m, k), np.int32))
  size = min(n, max(BLOCK // share, 256))
  for start in range(0, n, size):
    block = train[start : start + size]
    block = np.pad(block, ((0, size - len(block)), (0, 0)))
    similarity, ids = step(query, similarity, ids, block, np.int32(start))
  everywhere = jax.jit(lambda *x: x, out_shardings=replicated(mesh))
  similarity, ids = everywhere(similarity, ids)
  return np.asarray(similarity)[:m], np.asarray(ids)[:m]


def accuracies(
  train: tuple[Float[np.ndarray, "n d"], Int[np.ndarray, "n"]],
  test: tuple[Float[np.ndarray, "m d"], Int[np.ndarray, "m"]],
  num_classes: int,
  ks: Sequence[int],
  mesh: Mesh,
) -> dict[int, float]:
  """Returns, for every k, the share of test examples that k training examples vote right.

  A neighbour of cosine similarity s votes for its class with exp(s / .07) (Wu et al. 2018; Caron et
  al. 2021).
  """
  (x, y), (x_test, answers) = train, test
  similarity, ids = nearest(x, x_test, max(ks), mesh)
  votes = np.exp(similarity.astype(np.float64) / TEMPERATURE)
  right = dict.fromkeys(ks, 0)
  for rows in np.array_split(np.arange(len(answers)), -(-len(answers) // 4096)):
    for k in ks:
      counts = np.zeros((len(rows), num_classes))
      queries = np.arange(len(rows))[:, None]
      np.add.at(counts, (queries, y[ids[rows, :k]]), votes[rows, :k])
      right[k] += int((counts.argmax(axis=1) == answers[rows]).sum())
  return {k: hits / len(answers) for k, hits in right.items()}
