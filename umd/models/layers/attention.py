"""Multi-head attention: one function, whose implementation is chosen by platform and shape.

- "xla": a few lines of JAX, anywhere; the reference, and what float32 gets.
- "cudnn": NVIDIA's fused attention, for 16-bit floats on GPUs from Ampere on.
- "pallas": our kernel for short sequences on TPU v4 and later, see `umd.models.layers.attention_tpu`.

The platform is that of the mesh in whose context the caller traces (`jax.set_mesh`, or
`jax.sharding.use_abstract_mesh`, also for a TPU that is not there), or else JAX's default. The
compiler cannot look into the TPU kernel and would gather the batch for it: in the context of a mesh
it runs on every device's own rows, the batch being split over all of the mesh's axes.
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
KERNEL_FROM = 64  # tokens: the fewest at which the kernel was found to gain

Heads = Float[Array, "b n h d"]


def plain_attention(q: Heads, k: Heads, v: Heads) -> Heads:
  """softmax(q k^T / sqrt(d)) v in plain JAX, softmax in float32."""
  logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
  weights = jax.nn.softmax(logits * q.shape[-1] ** -0.5, axis=-1).astype(v.dtype)
  return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def plain_attention_on_cpu(q: Heads, k: Heads, v: Heads) -> Heads:
  """As `plain_attention`; faster on CPUs, slower on TPUs.

  Heads come before tokens, and the sum of the weights divides the product with v: one pass less
  over [B, H, N, N].
  """
  q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
  logits = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
  exp = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
  out = jnp.einsum("bhqk,bhkd->bhqd", exp.astype(v.dtype), v, preferred_element_type=jnp.float32)
  return jnp.swapaxes(out / exp.sum(axis=-1, keepdims=True), 1, 2).astype(v.dtype)


def _split_axes(mesh) -> tuple[str, ...]:
  """Axes of the mesh over which the compiler would split the batch."""
  types = zip(mesh.axis_names, mesh.axis_types, strict=True)
  return tuple(name for name, kind in types if kind != AxisType.Manual)


def current_platform() -> str:
  """ "cpu", "gpu" or "tpu": what the program that is being traced is for."""
  device = jax.sharding.get_abstract_mesh().abstract_device or jax.config.jax_default_device
  platform = getattr(device, "platform", device) or jax.default_backend()
  return "gpu" if platform in ("cuda", "rocm") else platform


def _has_kernel_units() -> bool:
  """Whether the TPU multiplies bfloat16 as the kernel asks: from v4 on."""
  device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
  return not device.device_kind.startswith(("TPU v2", "TPU v3"))


def _compute_capability() -> float:
  """Of this machine's NVIDIA GPUs, 8.0 being Ampere; 0 for others."""
  if jax.default_backend() != "gpu":  # A program for a GPU that is elsewhere.
    return 0.0
  found = str(getattr(jax.local_devices(backend="gpu")[0], "compute_capability", ""))
  return float(found) if re.fullmatch(r"\d+\.\d+", found) else 0.0


def _cudnn_takes(itemsize: int, head_dim: int) -> bool:
  """Whether cuDNN has fused attention for such heads on this machine, and gradients of it."""
  capability = _compute_capability()
  most = 256 if capability >= 9 else 128
  return capability >= 8 and itemsize == 2 and head_dim % 8 == 0 and head_dim <= most


def cudnn_attention(q: Heads, k: Heads, v: Heads) -> Heads:
  """cuDNN's fused attention, see `jax.nn.dot_product_attention`; for what `_cudnn_takes`.

  JAX refuses gradients at odd lengths (it takes even an absent bias for one): those get one more
  token, which as a key is masked and as a query dropped.
  """
  fused = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
  batch, tokens, _, _ = q.shape
  if tokens % 2 == 0:
    return fused(q, k, v)
  q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
  lengths = jnp.full(batch, tokens, jnp.int32)
  return fused(q, k, v, key_value_seq_lengths=lengths)[:, :tokens]


def choose(shape: tuple[int, ...], dtype, implementation: str = "auto") -> str:
  """Which of "xla", "cudnn" and "pallas" `attend` runs for arrays [B, N, H, Dh] of a dtype.

  Raises:
    ValueError: no such implementation, or one that the platform has not got.
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
  if implementation == "xla" or platform != "tpu" or not supports(tokens, head_dim):
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
  """`attention` of every device's own rows of the batch."""
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


def attend(q: Heads, k: Heads, v: Heads, implementation: str = "auto") -> Heads:
  """Softmax attention of every head, softmax in float32, all tokens seeing all.

  Args:
    q, k, v: queries, keys and values, of one dtype (float32 or bfloat16).
    implementation: one of IMPLEMENTATIONS. Shapes and dtypes that "cudnn" or "pallas" does not
      take get "xla".

  Raises:
    ValueError: no such implementation, or one that the platform has not got.
  """
  match choose(q.shape, q.dtype, implementation):
    case "cudnn":
      return cudnn_attention(q, k, v)
    case "pallas":
      return _on_each_device(kernel_attention, q, k, v)
  return (plain_attention_on_cpu if current_platform() == "cpu" else plain_attention)(q, k, v)
