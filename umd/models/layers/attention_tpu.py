"""Attention over short sequences as one TPU kernel: no matrix of weights ever leaves the chip.

A program of the grid takes some examples and one block of lanes, which holds one head or several
narrow ones, and keeps a head's whole [N, N] logits in VMEM. Nothing but q, k and v is saved for the
backward pass, which computes the weights again.

Everything [N, N] is laid out keys by queries: sums over keys run along sublanes, and what there is
one of per query (maximum, sum) lies along lanes, where it is used. Of the operands, only narrow
ones are transposed.

Tokens are padded to whole tiles inside the kernel, and the lanes of the last block to 128. What
lies there is undefined (NaN, say), so it is overwritten with zeros, and padded keys get no weight.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

LANES = 128
ROWS = 16  # of a tile of bfloat16; two tiles of float32
MAX_TOKENS = 512  # six float32 [N, N] must fit into 16 MiB, next to q, k, v and their gradients
TOKENS_PER_PROGRAM = 1024  # amortises a program's start, some hundred cycles
MASKED = -1e30  # not -inf: a difference of two would be NaN


def supports(tokens: int, head_dim: int) -> bool:
  """Whether the kernel takes sequences and heads of these lengths."""
  fits = head_dim % LANES == 0 or (LANES % head_dim == 0 and head_dim % 8 == 0)
  return fits and 1 <= tokens <= MAX_TOKENS


def _lanes(head_dim: int) -> int:
  """Lanes of a block: whole heads."""
  return max(LANES, head_dim)


def _dot(x, y, contract_x: int, contract_y: int):
  """Product over one axis each, in float32; float32 operands are not rounded to bfloat16."""
  precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  dims = (((contract_x,), (contract_y,)), ((), ()))
  return jax.lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def _iota(shape: tuple[int, int], axis: int):
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _clean(x, tokens: int, lanes):
  """Zeros where a block hangs over the array's end.

  That is in rows from `tokens` on and in lanes from `lanes` on (a scalar, or None for nowhere).
  """
  if tokens == x.shape[0] and lanes is None:
    return x
  inside = _iota(x.shape, 0) < tokens
  if lanes is not None:
    inside &= _iota(x.shape, 1) < lanes
  return jnp.where(inside, x.astype(jnp.float32), 0.0).astype(x.dtype)


def _head(x, h: int, head_dim: int):
  """x with zeros in the lanes of all heads but h: products over lanes then see that head alone."""
  if head_dim >= x.shape[1]:
    return x
  own = _iota(x.shape, 1) // head_dim == h
  return jnp.where(own, x.astype(jnp.float32), 0.0).astype(x.dtype)


def _exp_weights(q, k, tokens: int, scale: float):
  """exp(logits - maximum) [keys, queries] and its sum over keys [1, queries], float32."""
  logits = _dot(k, q, 1, 1)
  if tokens < logits.shape[0]:
    logits = jnp.where(_iota(logits.shape, 0) < tokens, logits, MASKED)
  exp = jnp.exp((logits - logits.max(axis=0, keepdims=True)) * scale)
  return exp, exp.sum(axis=0, keepdims=True)


def _each_example(refs, outs, tokens: int, width: int, work) -> None:
  """`work(*inputs) -> outputs`, all [rows, lanes], for the examples of the block in turn."""
  lanes = refs[0].shape[-1]
  # Only the last block of lanes may hang over; the others have all their lanes inside.
  left = width - pl.program_id(1) * lanes if width % lanes else None

  def example(i, carry):
    found = work(*(_clean(ref[i], tokens, left) for ref in refs))
    for out, x in zip(outs, found, strict=True):
      out[i] = x.astype(out.dtype)
    return carry

  jax.lax.fori_loop(0, refs[0].shape[0], example, 0)


def _forward_kernel(q_ref, k_ref, v_ref, out_ref, *, tokens: int, width: int, head_dim: int):
  def work(q, k, v):
    heads = []
    for h in range(q.shape[1] // head_dim):
      exp, total = _exp_weights(q, _head(k, h, head_dim), tokens, head_dim**-0.5)
      out = _dot(v, exp.astype(v.dtype), 0, 0)  # [lanes, queries]
      heads.append(out[h * head_dim : (h + 1) * head_dim] / total)
    return (jnp.concatenate(heads, axis=0).T,)

  _each_example((q_ref, k_ref, v_ref), (out_ref,), tokens, width, work)


def _backward_kernel(*refs, tokens: int, width: int, head_dim: int):
  def work(q, k, v, d_out):
    scale, dtype = head_dim**-0.5, q.dtype
    dqs, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for h in range(q.shape[1] // head_dim):
      own = _iota(k.shape, 1) // head_dim == h
      exp, total = _exp_weights(q, _head(k, h, head_dim), tokens, scale)
      weights = exp / total
      d_weights = _dot(_head(v, h, head_dim), d_out, 1, 1)
      mean = (weights * d_weights).sum(axis=0, keepdims=True)
      d_logits = (weights * (d_weights - mean) * scale).astype(dtype)
      dqs.append(_dot(k, d_logits, 0, 0)[h * head_dim : (h + 1) * head_dim])
      dk = jnp.where(own, _dot(d_logits, q, 1, 0), dk)
      dv = jnp.where(own, _dot(weights.astype(dtype), d_out, 1, 0), dv)
    return jnp.concatenate(dqs, axis=0).T, dk, dv

  _each_example(refs[:4], refs[4:], tokens, width, work)


def _cost(batch: int, tokens: int, width: int, itemsize: int, head_dim: int, backward: bool):
  """What the compiler's scheduler is told: it cannot look inside."""
  products, arrays = (5, 7) if backward else (2, 4)
  return pl.CostEstimate(
    flops=2 * products * batch * tokens**2 * width,
    transcendentals=batch * tokens**2 * width // head_dim,
    bytes_accessed=arrays * batch * tokens * width * itemsize,
  )


def _call(kernel, inputs, outputs: int, head_dim: int, interpret: bool):
  """Runs `kernel` on arrays [B, N, H * Dh]; its outputs have their shape and dtype."""
  batch, tokens, width = inputs[0].shape
  lanes, rows = _lanes(head_dim), pl.cdiv(tokens, ROWS) * ROWS
  most = max(1, TOKENS_PER_PROGRAM // rows)
  examples = max(n for n in range(1, min(most, batch) + 1) if batch % n == 0)
  block = pl.BlockSpec((examples, rows, lanes), lambda b, group: (b, 0, group))
  like = jax.ShapeDtypeStruct(inputs[0].shape, inputs[0].dtype)
  return pl.pallas_call(
    functools.partial(kernel, tokens=tokens, width=width, head_dim=head_dim),
    grid=(batch // examples, pl.cdiv(width, lanes)),
    in_specs=[block] * len(inputs),
    out_specs=[block] * outputs,
    out_shape=[like] * outputs,
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
    cost_estimate=_cost(batch, tokens, width, like.dtype.itemsize, head_dim, outputs > 1),
    interpret=interpret,
    name="attention_backward" if outputs > 1 else "attention",
  )(*inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attend(q, k, v, head_dim: int, interpret: bool):
  return _call(_forward_kernel, (q, k, v), 1, head_dim, interpret)[0]


def _attend_forward(q, k, v, head_dim: int, interpret: bool):
  return _attend(q, k, v, head_dim, interpret), (q, k, v)


def _attend_backward(head_dim: int, interpret: bool, saved, d_out):
  return tuple(_call(_backward_kernel, (*saved, d_out), 3, head_dim, interpret))


_attend.defvjp(_attend_forward, _attend_backward)


def kernel_attention(
  q: Float[Array, "b n h d"],
  k: Float[Array, "b n h d"],
  v: Float[Array, "b n h d"],
  interpret: bool = False,
) -> Float[Array, "b n h d"]:
  """Softmax attention of every head; what one device holds, for lengths that `supports` takes.

  Args:
    q, k, v: of one dtype. Softmax and sums are float32; products of float32 arrays are exact.
    interpret: runs the kernel's steps as plain JAX, on any device.

  Raises:
    ValueError: more tokens, or another head size, than the kernel takes.
  """
  b, n, heads, head_dim = q.shape
  if not supports(n, head_dim):
    raise ValueError(
      f"The attention kernel takes up to {MAX_TOKENS} tokens and heads of 8 to {LANES} that divide "
      f"{LANES} (or multiples of it), not {n} tokens of {head_dim}. Set model.attention='xla'."
    )
  flat = (x.reshape(b, n, heads * head_dim) for x in (q, k, v))
  return _attend(*flat, head_dim, interpret).reshape(q.shape)
