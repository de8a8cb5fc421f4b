"""Attention over short sequences as one TPU kernel: no [N, N] array ever leaves the chip.

Up to 512 tokens, all logits of a head fit into the chip's fast memory (VMEM, 16 MiB). There is
then no need for the running maximum and sum of FlashAttention: the softmax of a head is computed
whole, and once more in the backward pass, for which only q, k and v are saved.

q, k and v are [B, N, H * Dh] arrays. The kernel's grid has two axes: groups of examples, and blocks
of lanes. A TPU holds arrays in tiles of rows (sublanes) by 128 columns (lanes). A block of 128
lanes has one head of 128 channels, or several narrow ones side by side. A product over the lanes of
one head sets those of the others to zero. That costs the matrix unit nothing, as it is 128 wide in
any case.

All [N, N] arrays are laid out keys by queries. Sums over keys then run along sublanes, which is
cheap, and what there is one of per query (maximum, sum) lies along lanes, where it is used.

Blocks may reach beyond the end of an array: tokens are padded to whole tiles, and the last block of
lanes to 128. What lies there is undefined (it may be NaN). It is therefore overwritten with zeros,
and padded keys get no weight.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

LANES = 128
ROWS = 16  # rows of a tile of bfloat16, or of two tiles of float32
MAX_TOKENS = 512  # six float32 [N, N] must fit into VMEM, next to q, k, v and their gradients
TOKENS_PER_PROGRAM = 1024  # enough to make up for the start of a program, some hundred cycles
MASKED = -1e30  # Not -inf, of which the difference of two would be NaN.


def supports(tokens: int, head_dim: int) -> bool:
  """Tells whether the kernel takes sequences and heads of these lengths."""
  fits = head_dim % LANES == 0 or (LANES % head_dim == 0 and head_dim % 8 == 0)
  return fits and 1 <= tokens <= MAX_TOKENS


def _lanes(head_dim: int) -> int:
  """Counts the lanes of a block, which holds whole heads."""
  return max(LANES, head_dim)


def _dot(x, y, contract_x: int, contract_y: int):
  """Sums products over one axis of each, in float32, without rounding float32 to bfloat16."""
  precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  dims = (((contract_x,), (contract_y,)), ((), ()))
  return jax.lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def _iota(shape: tuple[int, int], axis: int):
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _clean(x, tokens: int, lanes):
  """Writes zeros where a block reaches beyond the end of the array.

  That is in rows from `tokens` on and in lanes from `lanes` on (a scalar, or None for no lane).
  """
  if tokens == x.shape[0] and lanes is None:
    return x
  inside = _iota(x.shape, 0) < tokens
  if lanes is not None:
    inside &= _iota(x.shape, 1) < lanes
  return jnp.where(inside, x.astype(jnp.float32), 0.0).astype(x.dtype)


def _head(x, h: int, head_dim: int):
  """Writes zeros into the lanes of all heads but h, so that products over lanes see h alone."""
  if head_dim >= x.shape[1]:
    return x
  of_head = _iota(x.shape, 1) // head_dim == h
  return jnp.where(of_head, x.astype(jnp.float32), 0.0).astype(x.dtype)


def _exp_weights(q, k, tokens: int, scale: float):
  """Computes exp(logits - maximum) [keys, queries] and its sum over keys [1, queries], float32."""
  logits = _dot(k, q, 1, 1)
  if tokens < logits.shape[0]:
    logits = jnp.where(_iota(logits.shape, 0) < tokens, logits, MASKED)
  exp = jnp.exp((logits - logits.max(axis=0, keepdims=True)) * scale)
  return exp, exp.sum(axis=0, keepdims=True)


def _each_example(inputs, outputs, tokens: int, width: int, compute) -> None:
  """Applies `compute`, from arrays [rows, lanes] to such, to the examples of the block in turn."""
  lanes = inputs[0].shape[-1]
  # Only the last block of lanes may reach beyond the end.
  lanes_left = width - pl.program_id(1) * lanes if width % lanes else None

  def example(i, carry):
    results = compute(*(_clean(ref[i], tokens, lanes_left) for ref in inputs))
    for ref, result in zip(outputs, results, strict=True):
      ref[i] = result.astype(ref.dtype)
    return carry

  jax.lax.fori_loop(0, inputs[0].shape[0], example, 0)


def _forward_kernel(q_ref, k_ref, v_ref, out_ref, *, tokens: int, width: int, head_dim: int):
  """Computes out = softmax(q k^T / sqrt(Dh)) v of the block's examples and heads."""

  def compute(q, k, v):
    heads = []
    for h in range(q.shape[1] // head_dim):
      exp, total = _exp_weights(q, _head(k, h, head_dim), tokens, head_dim**-0.5)
      # The sum divides the product, which is narrower than the weights.
      out = _dot(v, exp.astype(v.dtype), 0, 0)  # [lanes, queries]
      heads.append(out[h * head_dim : (h + 1) * head_dim] / total)
    return (jnp.concatenate(heads, axis=0).T,)

  _each_example((q_ref, k_ref, v_ref), (out_ref,), tokens, width, compute)


def _backward_kernel(*refs, tokens: int, width: int, head_dim: int):
  """Computes the gradients of q, k and v.

  With weights P = softmax(L) and G the gradient of the output, the gradient of P is G v^T, that of
  the logits L is P (G v^T - sum_keys P G v^T), and that of v is P^T G.
  """

  def compute(q, k, v, d_out):
    scale, dtype = head_dim**-0.5, q.dtype
    d_q = []
    d_k, d_v = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for h in range(q.shape[1] // head_dim):
      of_head = _iota(k.shape, 1) // head_dim == h
      exp, total = _exp_weights(q, _head(k, h, head_dim), tokens, scale)
      weights = exp / total  # [keys, queries], as all below
      d_weights = _dot(_head(v, h, head_dim), d_out, 1, 1)
      mean = (weights * d_weights).sum(axis=0, keepdims=True)
      d_logits = (weights * (d_weights - mean) * scale).astype(dtype)
      d_q.append(_dot(k, d_logits, 0, 0)[h * head_dim : (h + 1) * head_dim])
      # These products have the lanes of all heads; those of h are the right ones.
      d_k = jnp.where(of_head, _dot(d_logits, q, 1, 0), d_k)
      d_v = jnp.where(of_head, _dot(weights.astype(dtype), d_out, 1, 0), d_v)
    return jnp.concatenate(d_q, axis=0).T, d_k, d_v

  _each_example(refs[:4], refs[4:], tokens, width, compute)


def _cost(batch: int, tokens: int, width: int, itemsize: int, head_dim: int, backward: bool):
  """Estimates the cost for the compiler's scheduler, which cannot look into a kernel."""
  products, arrays = (5, 7) if backward else (2, 4)
  return pl.CostEstimate(
    flops=2 * products * batch * tokens**2 * width,
    transcendentals=batch * tokens**2 * width // head_dim,
    bytes_accessed=arrays * batch * tokens * width * itemsize,
  )


def _call(kernel, inputs, outputs: int, head_dim: int, interpret: bool):
  """Runs `kernel` on arrays [B, N, H * Dh]; the outputs have their shape and dtype."""
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
  """Computes softmax attention of every head on one device, for lengths that `supports` takes.

  Args:
    q, k, v: arrays of one dtype. Softmax and sums are float32, and so are products of float32.
    interpret: whether the kernel's steps run as plain JAX, on any device.

  Raises:
    ValueError: there are more tokens, or heads of another size, than the kernel takes.
  """
  b, n, heads, head_dim = q.shape
  if not supports(n, head_dim):
    raise ValueError(
      f"The attention kernel takes up to {MAX_TOKENS} tokens and heads of 8 to {LANES} that divide "
      f"{LANES} (or multiples of it), not {n} tokens of {head_dim}. Set model.attention='xla'."
    )
  flat = (x.reshape(b, n, heads * head_dim) for x in (q, k, v))
  return _attend(*flat, head_dim, interpret).reshape(q.shape)
