"""Multi-head attention: one function, whose implementation is chosen by platform and shape.

- "xla" is a few lines of JAX, which run anywhere. It is the reference, and what float32 gets.
- "cudnn" is NVIDIA's fused attention for 16-bit floats on GPUs from Ampere on.
- "pallas" is our kernel for short sequences on TPU v4 and later: `umd.models.layers.attention_tpu`.

The first two can add a bias to the logits. The kernel cannot, so attention with a bias runs as
"xla" on a TPU.

The platform is that of the mesh in whose context the caller traces (`jax.set_mesh`, or
`jax.sharding.use_abstract_mesh`, which also describes a TPU that is not there), or else JAX's
default. The compiler cannot look into the TPU kernel and would gather the batch for it. In the
context of a mesh the kernel therefore runs on every device's own rows: the batch is split over all
axes of the mesh.
"""

import functools
import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

from umd.models.layers.attention_tpu import kernel_attention, supports

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "pallas")
NEEDS = {"cudnn": "gpu", "pallas": "tpu"}
KERNEL_FROM = 64  # tokens: the shortest sequence at which the kernel was measured to gain

Heads = Float[Array, "b n h d"]
Bias = Float[Array, "*b h n n"]


def plain_attention(q: Heads, k: Heads, v: Heads, bias: Bias | None = None) -> Heads:
  """Computes softmax(q k^T / sqrt(d) + bias) v in plain JAX, with the softmax in float32."""
  logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
  logits = logits * q.shape[-1] ** -0.5
  if bias is not None:
    logits = logits + bias.astype(jnp.float32)
  weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
  return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def plain_attention_on_cpu(q: Heads, k: Heads, v: Heads, bias: Bias | None = None) -> Heads:
  """Computes the same as `plain_attention`, faster on CPUs and slower on TPUs.

  Heads come before tokens, and the product with v is divided by the sum of the weights instead of
  the weights themselves, which saves a pass over [B, H, N, N].
  """
  q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
  logits = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
  if bias is not None:
    logits = logits + bias.astype(jnp.float32)
  exp = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
  out = jnp.einsum("bhqk,bhkd->bhqd", exp.astype(v.dtype), v, preferred_element_type=jnp.float32)
  return jnp.swapaxes(out / exp.sum(axis=-1, keepdims=True), 1, 2).astype(v.dtype)


def _split_axes(mesh) -> tuple[str, ...]:
  """Names the axes of the mesh over which the compiler would split the batch."""
  types = zip(mesh.axis_names, mesh.axis_types, strict=True)
  return tuple(name for name, kind in types if kind != AxisType.Manual)


def current_platform() -> str:
  """Names what the program that is being traced is for: "cpu", "gpu" or "tpu"."""
  device = jax.sharding.get_abstract_mesh().abstract_device or jax.config.jax_default_device
  platform = getattr(device, "platform", device) or jax.default_backend()
  return "gpu" if platform in ("cuda", "rocm") else platform


def _has_kernel_units() -> bool:
  """Tells whether the TPU multiplies bfloat16 as the kernel asks, which v4 and later do."""
  device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
  return not device.device_kind.startswith(("TPU v2", "TPU v3"))


def _compute_capability() -> float:
  """Returns that of this machine's NVIDIA GPUs (8.0 is Ampere), or 0 if there is none."""
  if jax.default_backend() != "gpu":  # The program is for a GPU that is elsewhere.
    return 0.0
  version = str(getattr(jax.local_devices(backend="gpu")[0], "compute_capability", ""))
  return float(version) if re.fullmatch(r"\d+\.\d+", version) else 0.0


def _cudnn_takes(itemsize: int, head_dim: int) -> bool:
  """Tells whether this machine's cuDNN has fused attention for such heads, with gradients."""
  capability = _compute_capability()
  most = 256 if capability >= 9 else 128
  return capability >= 8 and itemsize == 2 and head_dim % 8 == 0 and head_dim <= most


def cudnn_attention(q: Heads, k: Heads, v: Heads, bias: Bias | None = None) -> Heads:
  """Runs cuDNN's fused attention (`jax.nn.dot_product_attention`) on what `_cudnn_takes`.

  JAX refuses gradients at odd lengths where there is a bias, and counts an absent bias as one.
  Odd sequences therefore get one more token, which is masked as a key and dropped as a query.
  """
  fused = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
  batch, tokens, heads, _ = q.shape
  if bias is not None:
    # The gradient has the shape of the bias, so only the batch may be left to broadcast.
    bias = jnp.broadcast_to(bias, (*bias.shape[:-3], heads, tokens, tokens)).astype(q.dtype)
    bias = bias if bias.ndim == 4 else bias[None]
  if tokens % 2 == 0:
    return fused(q, k, v, bias)
  q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
  if bias is not None:
    bias = jnp.pad(bias, ((0, 0), (0, 0), (0, 1), (0, 1)))
  lengths = jnp.full(batch, tokens, jnp.int32)
  return fused(q, k, v, bias, key_value_seq_lengths=lengths)[:, :tokens]


def choose(
  shape: tuple[int, ...], dtype, implementation: str = "auto", has_bias: bool = False
) -> str:
  """Names which of "xla", "cudnn" and "pallas" `attend` runs for arrays [B, N, H, Dh] of a dtype.

  Raises:
    ValueError: there is no such implementation, or the platform does not have it.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f"model.attention={implementation!r} is not one of {list(IMPLEMENTATIONS)}.")
  platform = current_platform()
  if NEEDS.get(implementation, platform) != platform:
    raise ValueError(
      f"model.attention={implementation!r} needs a {NEEDS[implementation].upper()}, and this "
      f"program is for {platform}. Set it to 'auto' or 'xla'."
    )
  batch, tokens, _, head_dim = shape
  itemsize = jnp.dtype(dtype).itemsize
  if implementation != "xla" and platform == "gpu":
    return "cudnn" if _cudnn_takes(itemsize, head_dim) else "xla"
  if implementation == "xla" or platform != "tpu" or has_bias or not supports(tokens, head_dim):
    return "xla"
  mesh = jax.sharding.get_abstract_mesh()
  shares = 1
  for axis in _split_axes(mesh):
    shares *= mesh.shape[axis]
  if batch % shares or not _has_kernel_units():
    return "xla"
  if implementation == "pallas":
    return "pallas"
  # Without a mesh nothing says how the batch is split, and the kernel would gather it.
  known = not mesh.empty or jax.device_count() == 1
  return "pallas" if known and itemsize == 2 and tokens >= KERNEL_FROM else "xla"


def _on_each_device(attention, q: Heads, k: Heads, v: Heads) -> Heads:
  """Applies `attention` to every device's own rows of the batch."""
  mesh = jax.sharding.get_abstract_mesh()
  axes = _split_axes(mesh)
  if not axes:
    return attention(q, k, v)
  rows = PartitionSpec(axes)
  # Outputs of kernels do not say over which axes they vary, so that is not checked.
  split = jax.shard_map(
    attention, in_specs=(rows,) * 3, out_specs=rows, axis_names=set(axes), check_vma=False
  )
  return split(q, k, v)


def attend(
  q: Heads, k: Heads, v: Heads, implementation: str = "auto", bias: Bias | None = None
) -> Heads:
  """Computes softmax attention of every head, in which all tokens see all.

  Args:
    q, k, v: queries, keys and values of one dtype (float32 or bfloat16). The softmax is float32.
    implementation: one of IMPLEMENTATIONS. Shapes, dtypes and biases that "cudnn" or "pallas"
      cannot take get "xla".
    bias: added to the scaled logits, [H, N, N] (query by key) or [B, H, N, N]; sizes of 1
      broadcast.

  Raises:
    ValueError: there is no such implementation, or the platform does not have it.
  """
  match choose(q.shape, q.dtype, implementation, bias is not None):
    case "cudnn":
      return cudnn_attention(q, k, v, bias)
    case "pallas":
      return _on_each_device(kernel_attention, q, k, v)
  plain = plain_attention_on_cpu if current_platform() == "cpu" else plain_attention
  return plain(q, k, v, bias)
