"""Peaks of accelerators: kinds are told apart, and the numbers are plausible ones of a device."""

import jax
import pytest

from umd.devices import chips

ALL = {**chips.TPUS, **chips.GPUS}


@pytest.mark.parametrize("kind", ALL)
def test_a_kind_is_itself_also_with_words_after_it(kind):
  assert chips.chip(kind) is ALL[kind]
  if kind in chips.GPUS:
    assert chips.chip(f"{kind} 96GB HBM9") in (ALL[kind], ALL.get(f"{kind} 96GB"))


@pytest.mark.parametrize(
  "kind, other",
  [
    ("NVIDIA L40S", "NVIDIA L4"),
    ("NVIDIA A10G", "NVIDIA A10"),
    ("NVIDIA H200 NVL", "NVIDIA H200"),
    ("NVIDIA A100 80GB PCIe", "NVIDIA A10"),
    ("NVIDIA GB200", "NVIDIA B200"),
    ("TPU v5 lite", "TPU v5"),
  ],
)
def test_names_that_begin_alike_are_different_devices(kind, other):
  assert chips.peak_flops(kind, "bfloat16") != chips.peak_flops(other, "bfloat16")


@pytest.mark.parametrize(
  "kind", ["cpu", "", "TPU v99", "TPU", "NVIDIA", "NVIDIA L", "NVIDIA H200 MIG 1g.18gb", "gfx942"]
)
def test_what_is_not_known_is_said_so(kind):
  assert chips.chip(kind) is chips.memory(kind) is None
  assert chips.peak_flops(kind, "bfloat16") is chips.peak_flops(kind, "float32") is None


def test_this_machine_has_no_peak():
  assert chips.peak_flops(jax.devices()[0].device_kind, "float32") is None


def test_a_type_without_a_peak_has_none():
  assert chips.peak_flops("TPU v4", "int4") is None


# A chip of a data sheet is so many devices: its peak (TFLOP/s), memory (GiB), bandwidth (GB/s).
@pytest.mark.parametrize(
  "kind, devices, teraflops, gib, bandwidth",
  [
    ("TPU v2", 2, 46, 16, 700),
    ("TPU v3", 2, 123, 32, 900),
    ("TPU v4", 1, 275, 32, 1228),
    ("TPU v6 lite", 1, 918, 32, 1638),
    ("TPU7x", 2, 2307, 192, 7380),
  ],
)
def test_the_devices_of_a_chip_share_it(kind, devices, teraflops, gib, bandwidth):
  assert chips.peak_flops(kind, "bfloat16") * devices == pytest.approx(teraflops * 1e12)
  assert chips.memory(kind) * devices == gib * 2**30
  assert chips.chip(kind).bandwidth * devices == pytest.approx(bandwidth * 1e9)


@pytest.mark.parametrize("kind, found", ALL.items())
def test_numbers_have_the_units_that_they_are_said_to_have(kind, found):
  # Operations per byte of bandwidth, and seconds to read the memory once: alike on all of them.
  assert 15 <= found.bfloat16 / found.bandwidth <= 800, kind
  assert 0.01 <= found.memory / found.bandwidth <= 0.1, kind
  assert found.float32 <= found.bfloat16
