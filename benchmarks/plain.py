"""The auto-encoder as the public code of UMD computes it: what ours is measured against.

The same network, parameters and numbers as `umd.models.autoencoder`, written as a straightforward
Big Vision model: layers in a loop that saves nothing but their inputs for the backward pass
(`nothing_saveable`), every patch embedded before the masked ones are dropped, queries, keys and
values from three products, attention by einsum, each stream through the decoder by itself. On its
own, so that it stays what it is when ours changes.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from umd.masks import gather, patchify
from umd.models.autoencoder import AutoEncoder, Condition
from umd.models.network import Input


def _norm(p, x):
  x32 = x.astype(jnp.float32)
  mean = x32.mean(axis=-1, keepdims=True)
  var = jnp.maximum((x32**2).mean(axis=-1, keepdims=True) - mean**2, 0)
  scale = p["norm"]["scale"] * jax.lax.rsqrt(var + 1e-6)
  return ((x32 - mean) * scale + p["norm"]["bias"]).astype(x.dtype)


def _dense(p, x):
  return x @ p["kernel"].astype(x.dtype) + p["bias"].astype(x.dtype)


def _attention(p, x, heads: int):
  b, n, width = x.shape

  def project(i):
    kernel, bias = p["qkv_kernel"][:, i].astype(x.dtype), p["qkv_bias"][i].astype(x.dtype)
    return (x @ kernel + bias).reshape(b, n, heads, width // heads)

  q, k, v = map(project, range(3))
  logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
  weights = jax.nn.softmax(logits * (width // heads) ** -0.5, axis=-1).astype(x.dtype)
  return _dense(p["out"], jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, n, width))


def _mlp(p, x):
  return _dense(p["out"], jax.nn.gelu(_dense(p["hidden"], x)))


def _block(p, x, cond, heads: int):
  if "adaln" not in p:
    x = jnp.concatenate([cond.astype(x.dtype)[:, None], x], axis=1)
    x = x + _attention(p["attention"], _norm(p["norm1"], x), heads)
    return (x + _mlp(p["mlp"], _norm(p["norm2"], x)))[:, 1:]
  parts = jnp.split(_dense(p["adaln"], cond.astype(x.dtype))[:, None], 6, axis=-1)
  shift1, scale1, gate1, shift2, scale2, gate2 = parts
  x = x + gate1 * _attention(p["attention"], _norm(p["norm1"], x) * (1 + scale1) + shift1, heads)
  return x + gate2 * _mlp(p["mlp"], _norm(p["norm2"], x) * (1 + scale2) + shift2)


def _stack(p, x, cond, heads: int):
  policy = jax.checkpoint_policies.nothing_saveable
  block = jax.checkpoint(_block, policy=policy, prevent_cse=False, static_argnums=3)
  x, _ = jax.lax.scan(lambda x, layer: (block(layer, x, cond, heads), None), x, p["blocks"])
  return _norm(p["norm"], x)


class Plain(AutoEncoder):
  """`AutoEncoder` computed the plain way, from the same parameters."""

  def plainly_encode(self, images: Float[Array, "b h w c"], cond: Float[Array, "b d"], mask):
    """See `AutoEncoder.encode`."""
    x = self.embed(patchify(images, self.patch))
    x = x + self.pos_embed.astype(x.dtype)
    x = x if mask is None else gather(x, mask.keep)
    cls = jnp.broadcast_to(self.cls.astype(x.dtype), (x.shape[0], *self.cls.shape))
    x = jnp.concatenate([cls, x], axis=1)
    x = _stack(self.variables["params"]["encoder"], x, cond, self.shape.heads)
    return x[:, : self.class_tokens].astype(jnp.float32).mean(axis=1), x[:, self.class_tokens :]

  def plainly_decode(self, x: Float[Array, "b m d"], cond: Condition):
    """See `AutoEncoder.decode`."""
    x = _stack(self.variables["params"]["decoder"], x, cond.blocks, self.shape.heads)[:, 1:]
    x = x.astype(jnp.float32)
    if self.condition != "token":
      shift, scale = jnp.split(self.head_adaln(cond.head)[:, None], 2, axis=-1)
      x = x * (1 + scale) + shift
    return self.head(x)

  def predict(self, inputs: Sequence[Input], groups: int = 1) -> list[dict]:
    """See `AutoEncoder.predict`; each part goes through the decoder on its own."""
    if self.is_initializing():
      return super().predict(inputs, groups)
    out = []
    for part in inputs:
      null = jnp.full(len(part.t), self.num_classes, jnp.int32)
      cond = self.embed_condition(part.t, null if part.labels is None else part.labels)
      encoded = self.plainly_encode(part.images, cond.blocks, part.mask)
      filled = self.decoder_input(*encoded, part.mask)
      out.append(self.images_by_head(self.plainly_decode(filled, cond)))
    return out
