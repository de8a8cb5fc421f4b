"""What a config leaves to "auto" is decided by the device, and what it says is done."""

import pytest

from configs import methods
from trainers import auto
from umd import objectives
from umd.devices import chips, memory
from umd.devices.mesh import make_mesh
from umd.models.autoencoder import AutoEncoder
from umd.objectives import Objective
from umd.paths import make_path

STREAMS = objectives.make_streams(methods.streams_of("dit"))
H100, CPU = "NVIDIA H100 80GB HBM3", "cpu"


def build(variant="nano/4"):
  def make(**attributes):
    model = AutoEncoder(variant, (64, 64, 3), **attributes)
    return Objective(model, make_path("cosine", 1000), STREAMS, 64)

  return make


def decide(kind, variant="nano/4", **settings):
  """(scan, remat) on a device of that kind."""
  mesh = make_mesh([memory.StandIn(0, kind)])
  model = auto.settle(build(variant), mesh, **settings).model
  return model.scan, model.remat


@pytest.fixture(scope="module")
def needs():
  """Bytes that a step takes by the policy."""
  mesh = make_mesh([memory.StandIn(0, H100)])
  return {
    remat: auto.needed(build("nano/4")(scan=False, remat=remat), mesh)
    for remat in ("none", "dots", "full")
  }


def test_the_kinds_are_known_or_not_as_these_tests_take_it():
  assert chips.memory(H100) and chips.memory(CPU) is None


def test_what_fits_is_kept(monkeypatch, needs):
  assert needs["none"] > needs["dots"] > needs["full"]
  for capacity, remat in (
    (needs["none"] / auto.USED + 1, "none"),
    (needs["dots"] / auto.USED + 1, "dots"),
    (needs["full"] / auto.USED + 1, "full"),
    (0.5 * needs["full"], "full"),  # Nothing fits: the least.
  ):
    monkeypatch.setattr(chips, "memory", lambda kind, capacity=capacity: int(capacity))
    assert decide(H100) == (False, remat)


def test_more_parts_of_a_batch_take_less(needs):
  mesh = make_mesh([memory.StandIn(0, H100)])
  assert auto.needed(build("nano/4")(scan=False, remat="none"), mesh, 4) < needs["none"]


@pytest.mark.parametrize("variant, scan", [("L/4", True), ("Ti/4", False)])
def test_many_layers_of_which_nothing_is_kept_run_in_a_loop(monkeypatch, variant, scan):
  monkeypatch.setattr(chips, "memory", lambda kind: 1)
  monkeypatch.setattr(auto, "needed", lambda *args: 2)
  assert decide(H100, variant) == (scan, "full")


def test_on_a_cpu_a_loop_keeps_the_products():
  assert decide(CPU) == (True, "dots")
  assert decide(CPU, remat="none") == (False, "none")
  assert decide(CPU, remat="full") == (True, "full")


@pytest.mark.parametrize("kind", [H100, CPU])
@pytest.mark.parametrize("scan", ["true", "false"])
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_what_is_said_is_done(kind, scan, remat):
  assert decide(kind, scan=scan, remat=remat) == (scan == "true", remat)
