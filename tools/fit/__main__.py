"""Tells whether a run fits into the memory of accelerators, and how fast it may be, without them.

  python -m tools.fit --config configs/ae_i1k.py:variant=L/2,... --topology v5e:4x4

compiles the trainer's own step for that slice of a TPU, or --topology local for the devices here,
or does the arithmetic for GPUs (gpu:H100x8), and prints memory, collectives and FLOPs. Neither the
data nor the chips need be here. Exit status: 0 if all fits, 3 if not, 1 if something is wrong.
"""

import argparse
import dataclasses
import json
import os
import sys
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow only reads a string of ops here.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

from absl import flags
from ml_collections import ConfigDict, config_flags

from tools.command_line import natural, run

DOES_NOT_FIT = 3
MEM_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"  # JAX's: its share of a GPU's memory.
TRAINER = "diffusion"


def load_config(path: str, overrides: list[str]) -> ConfigDict:
  """Reads FILE[:ARGUMENTS] and `--config.KEY=VALUE` as training does; ValueError if it cannot."""
  values, argv = flags.FlagValues(), ["fit", f"--config={path}", *overrides]
  options = dict(flag_values=values, lock_config=True, sys_argv=argv)
  config_flags.DEFINE_config_file("config", **options)
  try:
    rest = values(argv)
    if len(rest) > 1:
      raise ValueError(f"{rest[1]!r} is no flag. See --help.")
    list(values["config"].value)  # A file that cannot be read is reported at the first access.
    return values["config"].value
  except (flags.Error, AttributeError, KeyError, OSError, ValueError) as error:
    chain = [error]  # What the config itself says lies below what is wrapped around it.
    while chain[-1].__context__ and not chain[-1].__suppress_context__:
      chain.append(chain[-1].__context__)
    if overrides and isinstance(chain[-1], KeyError):
      raise ValueError(f"{' '.join(overrides)}: the config has no key {chain[-1]}.") from None
    own = (e for e in reversed(chain) if isinstance(e, (ValueError, OSError)))
    raise ValueError(str(next(own, error))) from None


class Hardware(NamedTuple):
  """What a step is to run on.

  Attributes:
    name: as it was asked for.
    devices: of the mesh.
    kind: as JAX names it.
    capacity: bytes of one that a program may use; None if not known.
    compiles: whether the step is compiled for it.
  """

  name: str
  devices: list
  kind: str
  capacity: int | None
  compiles: bool


def find_place(topology: str) -> Hardware:
  """The devices of "local", "v5e:4x4" or "gpu:H100x8"; to be called before JAX is used."""
  from tools.fit import compile
  from umd.devices import chips, memory

  kind, _, rest = topology.partition(":")
  if topology != "local":
    compile.prepare()
  import jax

  if topology == "local":
    devices = jax.devices()
    capacity = (devices[0].memory_stats() or {}).get("bytes_limit")
    return Hardware(topology, devices, devices[0].device_kind, capacity, True)
  if kind == "gpu":
    devices = memory.gpus(rest)
    share = float(os.environ.get(MEM_FRACTION, 0.75))
    capacity = int(share * chips.memory(devices[0].device_kind))
    return Hardware(topology, devices, devices[0].device_kind, capacity, False)
  devices = compile.tpu_devices(topology)
  known = chips.memory(devices[0].device_kind)
  # The rest is the chip's own: of 16 GiB a program has 15.75.
  return Hardware(topology, devices, devices[0].device_kind, known and known * 63 // 64, True)


def _parts_of_state(planned) -> dict[str, int]:
  """Bytes that each device keeps, all the time."""
  from umd.devices import memory

  state, frozen = planned.state, planned.step.frozen
  parts = dict(parameters=state.params, average=state.ema_params, optimiser=state.opt_state)
  kept = {name: memory.on_device(tree) for name, tree in parts.items()}
  return kept | ({"vae": memory.on_device(frozen)} if frozen else {})


def _compiled(planned, place: Hardware, report: dict, hlo_path: str) -> None:
  """Adds what the compiler says."""
  from tools.fit import compile
  from umd.devices import memory

  found = compile.compile_step(planned.step.lower(planned.state, planned.batch))
  report["memory"]["batch"] = memory.on_device(planned.batch)
  report["peak"] = found.peak + planned.idle
  if isinstance(found, compile.OutOfMemory):
    report.update(fits=False, capacity=found.capacity)
    report["peak"] += 0 if found.whole else sum(report["memory"].values())
    return
  report["memory"]["temporaries"] = found.temporaries
  report["fits"] = None if place.capacity is None else report["peak"] <= place.capacity
  if hlo_path:
    with open(hlo_path, "w", encoding="utf-8") as file:
      file.write(found.text)
  if (program := found.program) is None:
    return
  report.update(collectives=program.collectives(), cycles=program.cycles())
  report.update(kernels=program.kernels(), unknown_loops=program.unknown_loops)
  dtype, n = planned.parts.model.dtype, len(place.devices)
  if speed := compile.speed(program, place.kind, n, report["flops"], dtype):
    report.update(seconds=speed.seconds, mfu=speed.mfu)


def _estimated(planned, place: Hardware, report: dict, accumulate: int) -> None:
  """Adds what arithmetic says."""
  import jax

  from umd.devices import chips, memory

  parts, n = planned.parts, len(place.devices)
  rows, params = report["batch_size"] // accumulate, planned.state.params
  seen = jax.ShapeDtypeStruct((rows, *parts.model.image_size), "float32")
  batch = {"image": seen, "label": jax.ShapeDtypeStruct((rows,), "int32")}
  found = memory.residuals(parts.objective, params, batch)
  told = memory.estimate(params, found, memory.nbytes(planned.batch), n)
  report["memory"].update(
    gathered=told.gathered,
    batch=told.batch,
    gradients=told.gradients,
    activations=told.activations,
  )
  report["peak"] = sum(report["memory"].values())
  report["peak_per_image"] = (found.kept + found.working) / n / report["batch_size"]
  report["peak_per_image"] += told.batch / report["batch_size"]
  report["fits"] = report["peak"] <= place.capacity
  if peak := chips.peak_flops(place.kind, parts.model.dtype):
    report["seconds_at_peak"] = report["flops"] / (peak * n)


def examine(config, place: Hardware, args: argparse.Namespace, hlo_path: str = "") -> dict:
  """All that is known of a stage's step on that place."""
  from tools.fit import shapes

  planned = shapes.plan(config, place.devices, args.image_size, args.num_classes)
  model = planned.parts.model
  report = dict(
    topology=place.name,
    device_kind=place.kind,
    devices=len(place.devices),
    mesh=dict(planned.parts.mesh.shape),
    **{name: getattr(model, name) for name in ("variant", "scan", "remat")},
    image_size=model.image_size,
    batch_size=config.batch_size,
    flops=planned.parts.work.flops * planned.parts.mesh.size,
    memory=_parts_of_state(planned),
    capacity=place.capacity,
  )
  if place.compiles:
    _compiled(planned, place, report, hlo_path)
  else:
    _estimated(planned, place, report, config.accumulate)
  return report


def largest_batch(config, place: Hardware, args: argparse.Namespace, known: dict) -> int:
  """Finds the largest batch that fits; `known` is the report of the config's own batch."""
  from tools.fit import compile

  rows, peaks = known["batch_size"], {known["batch_size"]: known["peak"]}

  def peak(batch: int) -> int:
    if "peak_per_image" in known:
      return int(known["peak"] + (batch - rows) * known["peak_per_image"])
    if batch not in peaks:
      print(f"trying batch_size={batch} ...", file=sys.stderr, flush=True)
      other = dataclasses.replace(config, batch_size=batch)
      peaks[batch] = examine(other, place, args)["peak"]
    return peaks[batch]

  return compile.largest(peak, known["capacity"], rows, len(place.devices))


def _gib(number: int) -> str:
  return f"{number / 2**30:,.2f}"


def _memory_lines(report: dict) -> list[str]:
  lines = [f"  {name:14}{_gib(n):>9}" for name, n in report["memory"].items()]
  capacity, peak = report["capacity"], _gib(report["peak"])
  if report["fits"] is None:
    verdict = f"needs {peak} GiB; how much there is is not known"
  else:
    verdict = f"{'fits: needs' if report['fits'] else 'does not fit: needs'} {peak} of "
    verdict += f"{_gib(capacity)} GiB"
  return ["memory of a device, GiB", *lines, f"  {verdict}"]


def _speed_lines(report: dict) -> list[str]:
  lines = [f"  {report['flops'] / 1e12:,.2f} TFLOP a step, by the model's matrices"]
  if "seconds" in report:
    (slow, fast), (low, high) = report["seconds"], report["mfu"]
    lines.append(f"  {report['cycles']:,} cycles, as the compiler estimates")
    lines.append(f"  {1e3 * fast:,.0f} to {1e3 * slow:,.0f} ms a step, if it is right")
    rate = lambda seconds: f"{report['batch_size'] / seconds:,.0f}"
    shares = f"MFU {100 * low:.0f} to {100 * high:.0f} %"
    lines.append(f"  {rate(slow)} to {rate(fast)} images/s, {shares}")
  elif "seconds_at_peak" in report:
    lines.append(f"  at least {1e3 * report['seconds_at_peak']:,.0f} ms a step, at the chips' peak")
  else:
    lines.append("  no estimate of time: the compiler makes none for this device")
  if report.get("kernels"):
    lines.append(f"  the time of {report['kernels']} calls of own kernels is not in it")
  if report.get("unknown_loops"):
    lines.append(f"  {report['unknown_loops']} loops of unknown length count once")
  return ["speed", *lines]


def table(name: str, report: dict) -> str:
  """A report as text."""
  height, width, channels = report["image_size"]
  head = (
    f"[{name}] {report['variant']} on {height} x {width} x {channels}, batch "
    f"{report['batch_size']}; {report['devices']} x {report['device_kind']}, mesh {report['mesh']}"
  )
  layers = f"layers {'in a loop' if report['scan'] else 'unrolled'}, remat={report['remat']}"
  lines = [head, layers, *_memory_lines(report)]
  if "collectives" in report:
    found = report["collectives"].items()
    rows = [f"  {kind:20}{n:>8,} {size / 1e6:>12,.1f} MB" for kind, (n, size) in sorted(found)]
    lines += ["collectives of a step, each device", *(rows or ["  none"])]
  lines += _speed_lines(report)
  if "largest_batch" in report:
    lines.append(f"largest batch that fits: {report['largest_batch']}")
  return "\n".join(lines)


def fit(args: argparse.Namespace, overrides: list[str]) -> bool:
  """Prints a report of every stage; whether all of them fit."""
  config, place = load_config(args.config, overrides), find_place(args.topology)
  from trainers import stages

  plan = [(name, stage) for name, stage, _ in stages.plan(config, "fit")]
  todo = [(n, s) for n, s in plan if args.stage in ("", n) and s.trainer == TRAINER]
  if not todo:
    raise ValueError(
      f"--stage={args.stage!r}: the config has no such stage with trainer={TRAINER!r}, which is "
      f"the one that is looked at. It has {[name for name, _ in plan]}."
    )
  all_fit, reports = True, {}
  for name, stage in todo:
    report = examine(stage, place, args, args.save_hlo)
    if args.largest_batch and report["capacity"]:
      report["largest_batch"] = largest_batch(stage, place, args, report)
    print(table(name, report), flush=True)
    all_fit, reports[name] = all_fit and report["fits"] is not False, report
  if args.json:
    with open(args.json, "w", encoding="utf-8") as file:
      json.dump(reports, file, indent=2)
  return all_fit


def main(argv: list[str]) -> None:
  text = argparse.RawDescriptionHelpFormatter
  parser = argparse.ArgumentParser(
    "tools.fit", None, __doc__, formatter_class=text, allow_abbrev=False
  )
  add = parser.add_argument
  add("--config", required=True, metavar="FILE", help="with arguments behind a colon, as of train")
  add("--topology", default="local", help="local, a TPU slice (v5e:4x4) or gpu:KINDxN (local)")
  add("--stage", default="", metavar="NAME", help="look at this one only (all)")
  add("--largest_batch", action="store_true", help="search it, too: a few compilations more")
  add("--image_size", type=natural, default=0, metavar="N", help="side in pixels (as pp says)")
  add("--num_classes", type=natural, default=0, metavar="N", help="labels (as the data say)")
  add("--json", default="", metavar="FILE", help="write all numbers, in bytes and seconds")
  add("--save_hlo", default="", metavar="FILE", help="write the compiled program")
  args, overrides = parser.parse_known_args(argv)
  fits = []
  run(lambda: fits.append(fit(args, overrides)))
  sys.exit(0 if fits[0] else DOES_NOT_FIT)


if __name__ == "__main__":
  main(sys.argv[1:])
