"""What an accelerator can do at most: matrix multiplication, memory and its bandwidth.

All of one device as JAX counts devices, known by `device.device_kind`. A TPU v2, v3 or 7x chip is
two devices (a core each), a v4 or v5p chip is one (its two cores work as one), v5e and v6e chips
have one core. Rates are dense, without structured sparsity, at boost clock, as vendors state them.
"""

import dataclasses

T, GB, GIB = 1e12, 1e9, 2**30


def memory(device_kind: str) -> int | None:
  """Bytes of the device's own memory; None if not known."""
  found = chip(device_kind)
  return found.memory if found else None


@dataclasses.dataclass(frozen=True)
class Chip:
  """Peaks of one device.

  Attributes:
    bfloat16: FLOP/s of matrix multiplications with bfloat16 inputs and float32 sums.
    float32: the same of float32 inputs at XLA's default precision, which rounds them: to bfloat16
      on a TPU, to TF32 on an NVIDIA GPU since Ampere.
    memory: bytes; a little of it is taken before any program runs.
    bandwidth: of that memory, bytes/s.
  """

  bfloat16: float
  float32: float
  memory: int
  bandwidth: float


def _tpu(teraflops: float, gib: int, gb_per_second: float, devices: int = 1) -> Chip:
  """A device of a chip (data sheets are of chips) that is seen as so many devices."""
  flops = teraflops * T / devices
  return Chip(flops, flops, gib * GIB // devices, gb_per_second * GB / devices)


def _gpu(bfloat16: float, float32: float, gb: float, gb_per_second: float) -> Chip:
  return Chip(bfloat16 * T, float32 * T, int(gb * GB), gb_per_second * GB)


# Google Cloud TPU documentation, "System architecture" of v2 to v6e and TPU7x; kinds as in JAX.
TPUS = {
  "TPU v2": _tpu(46, 16, 700, devices=2),
  "TPU v3": _tpu(123, 32, 900, devices=2),
  "TPU v4": _tpu(275, 32, 1228),
  "TPU v5 lite": _tpu(197, 16, 819),
  "TPU v5e": _tpu(197, 16, 819),
  "TPU v5": _tpu(459, 95, 2765),
  "TPU v5p": _tpu(459, 95, 2765),
  "TPU v6 lite": _tpu(918, 32, 1638),
  "TPU v6e": _tpu(918, 32, 1638),
  "TPU7x": _tpu(2307, 192, 7380, devices=2),
}

# NVIDIA data sheets of each product (half of a number that is marked "with sparsity"): BF16 and
# TF32 TFLOPS, GB, GB/s. Before Ampere there is neither BF16 nor TF32: both columns are FP32.
# Kinds are the beginnings of the names that the driver gives; the longest one counts.
GPUS = {
  "Tesla V100-SXM2-16GB": _gpu(15.7, 15.7, 16, 900),
  "Tesla V100-SXM2-32GB": _gpu(15.7, 15.7, 32, 900),
  "Tesla V100-PCIE-16GB": _gpu(14, 14, 16, 900),
  "Tesla V100-PCIE-32GB": _gpu(14, 14, 32, 900),
  "Tesla T4": _gpu(8.1, 8.1, 16, 320),
  "NVIDIA A100-SXM4-40GB": _gpu(312, 156, 40, 1555),
  "NVIDIA A100-SXM4-80GB": _gpu(312, 156, 80, 2039),
  "NVIDIA A100-PCIE-40GB": _gpu(312, 156, 40, 1555),
  "NVIDIA A100 80GB PCIe": _gpu(312, 156, 80, 1935),
  "NVIDIA A10": _gpu(125, 62.5, 24, 600),
  "NVIDIA A10G": _gpu(70, 35, 24, 600),  # As Amazon's pages say of its G5 instances.
  "NVIDIA A40": _gpu(149.7, 74.8, 48, 696),
  "NVIDIA RTX A6000": _gpu(154.8, 77.4, 48, 768),
  "NVIDIA GeForce RTX 3090": _gpu(71, 35.6, 24, 936),
  "NVIDIA GeForce RTX 4090": _gpu(165.2, 82.6, 24, 1008),
  "NVIDIA L4": _gpu(121, 60, 24, 300),
  "NVIDIA L40": _gpu(181, 90.5, 48, 864),
  "NVIDIA L40S": _gpu(362, 183, 48, 864),
  "NVIDIA H100 80GB HBM3": _gpu(989, 495, 80, 3350),
  "NVIDIA H100 PCIe": _gpu(756, 378, 80, 2000),
  "NVIDIA H100 NVL": _gpu(835, 418, 94, 3900),
  "NVIDIA H200": _gpu(989, 495, 141, 4800),
  "NVIDIA H200 NVL": _gpu(835, 418, 141, 4800),
  "NVIDIA GH200 480GB": _gpu(990, 495, 96, 4000),
  "NVIDIA B200": _gpu(2250, 1100, 180, 7700),
  "NVIDIA GB200": _gpu(2500, 1250, 186, 8000),
}


def chip(device_kind: str) -> Chip | None:
  """The peaks of a device of that kind; None if they are not known.

  A part of a GPU ("... MIG 1g.10gb") is not known: its share differs by the way it was cut.
  """
  if device_kind in TPUS:
    return TPUS[device_kind]
  if " MIG " in device_kind:
    return None
  words = device_kind.split()
  starts = (" ".join(words[:n]) for n in range(len(words), 0, -1))
  return next((GPUS[start] for start in starts if start in GPUS), None)


def peak_flops(device_kind: str, dtype: str) -> float | None:
  """FLOP/s that a device reaches at most in matrix multiplications; None if not known.

  Args:
    device_kind: as `jax.devices()[0].device_kind`.
    dtype: of the inputs, "bfloat16" or "float32" (at default precision, see `Chip`).
  """
  found = chip(device_kind)
  return {"bfloat16": found.bfloat16, "float32": found.float32}.get(dtype) if found else None
