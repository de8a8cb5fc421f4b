"""Checkpoints that were damaged, killed, or had no room: reported, never restored in silence."""

import errno
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from test_checkpoint import POSITION, assert_bitwise_equal, make_state

from umd.runs import integrity
from umd.runs.checkpoint import Checkpoints, Retention, load_params, param_shapes
from umd.state import TrainState

ROOT = Path(__file__).resolve().parents[2]
# Orbax writes these after the checksums, and nothing is restored from them.
UNCOVERED = ("_CHECKPOINT_METADATA", "commit_success.txt", "SHA256SUMS")


def save(workdir, *steps, **options):
  with Checkpoints(str(workdir), **options) as checkpoints:
    for step in steps:
      checkpoints.save(make_state(4, step), step, POSITION)


def files_of(folder: Path) -> list[str]:
  return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


def contents_of(folder: Path) -> dict:
  return {name: (folder / name).read_bytes() for name in files_of(folder)}


def flip(raw: bytes, at: int) -> bytes:
  return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


DAMAGE = {
  "the first byte flipped": lambda raw: flip(raw, 0),
  "a byte in the middle flipped": lambda raw: flip(raw, len(raw) // 2),
  "the last byte flipped": lambda raw: flip(raw, len(raw) - 1),
  "cut in half": lambda raw: raw[: len(raw) // 2],
  "emptied": lambda raw: b"",
  "longer": lambda raw: raw + b"\0",
  "deleted": None,
}


def damage(file: Path, how: str) -> None:
  raw = file.read_bytes()
  file.unlink()
  if DAMAGE[how]:
    file.write_bytes(DAMAGE[how](raw))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """The workdir of a run that saved steps 1 and 2; not to be touched."""
  workdir = tmp_path_factory.mktemp("whole")
  save(workdir, 1, 2)
  return workdir


@pytest.fixture
def run(whole, tmp_path):
  """A copy of that workdir to break."""
  return Path(shutil.copytree(whole, tmp_path / "run"))


def test_sha256sum_of_coreutils_agrees(whole):
  """An oracle that shares no code: all files but those written later are listed, and right."""
  folder = whole / "checkpoints" / "2"
  done = subprocess.run(
    ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  listed = {line.removesuffix(": OK") for line in done.stdout.splitlines()}
  assert listed == set(files_of(folder)) - set(UNCOVERED)
  assert {"metrics.json", "data/metadata", "state/_METADATA", "state/manifest.ocdbt"} <= listed


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_to_any_file_is_reported_and_the_older_checkpoint_found(run, how):
  folder = run / "checkpoints" / "2"
  for name in sorted(set(files_of(folder)) - set(UNCOVERED)):
    before = (folder / name).read_bytes()
    damage(folder / name, how)
    found = integrity.find_newest(str(run / "checkpoints"))
    assert found.step == 1, name
    assert name in found.damaged[2] and ("missing" in found.damaged[2]) == (how == "deleted")
    (folder / name).write_bytes(before)
  assert integrity.find_newest(str(run / "checkpoints")).step == 2


def test_no_byte_of_the_list_of_checksums_can_change(run):
  folder = run / "checkpoints" / "2"
  raw = (folder / "SHA256SUMS").read_bytes()
  changed = [flip(raw, at) for at in range(0, len(raw), 7)]
  for contents in (*changed, *(raw[:-n] for n in (1, 40, 100, 101, 300, len(raw)))):
    (folder / "SHA256SUMS").write_bytes(contents)
    assert integrity.verify(epath.Path(folder))


@pytest.mark.parametrize("how", ["deleted", "cut in half"])
def test_what_no_checksum_covers_does_no_harm(run, how):
  """The two files that orbax writes last: reported, or what is restored is right all the same."""
  for name in UNCOVERED[:2]:
    folder = run / "checkpoints" / "2"
    before = (folder / name).read_bytes()
    damage(folder / name, how)
    with Checkpoints(str(run)) as checkpoints:
      state, _, step, reports = checkpoints.restore_newest(make_state(4, 0))
    assert_bitwise_equal(state, make_state(4, step))
    assert step == (1 if reports else 2)
    if how == "deleted" and name == "_CHECKPOINT_METADATA":
      assert reports
    aside = run / "checkpoints" / "damaged_2"
    if aside.exists():
      aside.rename(folder)
    (folder / name).write_bytes(before)


@pytest.mark.parametrize("how", ["a byte in the middle flipped", "deleted"])
def test_a_damaged_checkpoint_is_moved_aside_and_its_step_saved_again(run, how):
  folder = run / "checkpoints" / "2"
  largest = max((folder / "state").rglob("d/*"), key=lambda f: f.stat().st_size)
  damage(largest, how)
  kept = contents_of(folder)
  with Checkpoints(str(run)) as checkpoints:
    state, data, step, reports = checkpoints.restore_newest(make_state(4, 0))
    assert (step, data) == (1, POSITION)
    assert_bitwise_equal(state, make_state(4, 1))
    (report,) = reports
    assert "checkpoint 2 is damaged" in report and largest.name in report
    assert contents_of(run / "checkpoints" / "damaged_2") == kept
    assert checkpoints.latest() == 1
    checkpoints.save(make_state(4, 2), 2, POSITION)
  damage(next((folder / "state").rglob("d/*")), how)
  with Checkpoints(str(run)) as checkpoints:
    assert checkpoints.restore_newest(make_state(4, 0)).step == 1
  assert (run / "checkpoints" / "damaged_2_2").is_dir()


def test_if_all_are_damaged_nothing_starts_anew_or_is_moved(run):
  for step in ("1", "2"):
    damage(run / "checkpoints" / step / "state" / "_METADATA", "emptied")
  before = contents_of(run)
  for _ in range(2):  # Nor at the second start.
    with pytest.raises(ValueError, match=r"All checkpoints .* damaged") as error:
      Checkpoints(str(run)).restore_newest(make_state(4, 0))
    assert "1: state/_METADATA" in str(error.value) and "2: state/_METADATA" in str(error.value)
  assert contents_of(run) == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Of TensorStore.
def test_another_run_is_read_but_never_written(run, capsys, monkeypatch):
  largest = max((run / "checkpoints/2/state").rglob("d/*"), key=lambda f: f.stat().st_size)
  damage(largest, "the first byte flipped")
  monkeypatch.setattr(integrity, "SMALL", largest.stat().st_size - 1)
  (run / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()
  before = contents_of(run), sorted(os.listdir(run / "checkpoints"))
  # A look at the small files alone does not see it; shapes come from there, weights do not.
  verify = lambda **quick: integrity.verify(epath.Path(run / "checkpoints" / "2"), **quick)
  assert not verify(quick=True) and verify()
  params, step = load_params(str(run))
  assert step == 1
  assert_bitwise_equal(params, jax.device_get(make_state(4, 1).ema_params))
  assert "checkpoint 2 is damaged" in capsys.readouterr().out
  shapes = jax.tree.map(lambda leaf: tuple(leaf.shape), param_shapes(str(run)))
  assert shapes == {"body": {"kernel": (3, 5)}, "token": (7,)}
  assert (contents_of(run), sorted(os.listdir(run / "checkpoints"))) == before


KILLED = """
import os, signal
from test_checkpoint import POSITION, make_state
from umd.runs import integrity as checksums
from umd.runs.checkpoint import Checkpoints
checkpoints = Checkpoints({workdir!r})
write = checksums.write
def killed(*arguments):
  {before}
  os.kill(os.getpid(), signal.SIGKILL)
checksums.write = killed
checkpoints.save(make_state(1, 3), 3, POSITION)
checkpoints.close()
"""


@pytest.mark.parametrize("before", ["pass", "write(*arguments)"])
def test_a_save_killed_before_its_commit_is_ignored(run, before):
  """With all arrays written: without the checksums, and with them."""
  code = KILLED.format(workdir=str(run), before=before)
  environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'runs'}"}
  done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
  assert done.returncode == -signal.SIGKILL
  assert list((run / "checkpoints").glob("3.*/state")), "killed too early to tell"
  with Checkpoints(str(run)) as checkpoints:
    assert sorted(os.listdir(run / "checkpoints")) == ["1", "2"]
    assert checkpoints.restore_newest(make_state(4, 0))[2:] == (2, [])
    checkpoints.save(make_state(4, 3), 3, POSITION)
  assert sorted(os.listdir(run / "checkpoints")) == ["2", "3"]


def full(*_):
  raise OSError(errno.ENOSPC, "No space left on device")


def test_a_run_goes_on_when_a_save_fails_and_saves_the_next_time(tmp_path, monkeypatch):
  said = []
  save(tmp_path, 1)
  with Checkpoints(str(tmp_path), say=said.append) as checkpoints:
    with monkeypatch.context() as patch:
      patch.setattr(integrity, "write", full)
      checkpoints.save(make_state(4, 2), 2, POSITION)
      assert not checkpoints.wait()
      checkpoints.save(make_state(4, 3), 3, POSITION)
      assert not checkpoints.wait()
    assert len(said) == 2  # Every time.
    for step, text in zip((2, 3), said, strict=True):
      assert f"step {step} was NOT SAVED" in text and "No space left" in text
      assert "newest checkpoint is of step 1" in text and "Make room" in text
    # What was half written does not take up the room that the next save needs.
    assert os.listdir(tmp_path / "checkpoints") == ["1"] and checkpoints.latest() == 1
    checkpoints.save(make_state(4, 4), 4, POSITION)
    assert checkpoints.wait() and len(said) == 2
  with Checkpoints(str(tmp_path)) as checkpoints:
    state, *_ = checkpoints.restore_newest(make_state(4, 0))
  assert_bitwise_equal(state, make_state(4, 4))
  assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "4"]


def test_a_last_save_that_fails_is_an_error_at_the_end(tmp_path, monkeypatch):
  said = []
  checkpoints = Checkpoints(str(tmp_path), say=said.append)
  monkeypatch.setattr(integrity, "write", full)
  checkpoints.save(make_state(4, 2), 2, POSITION)
  with pytest.raises(OSError, match=r"last checkpoint, of step 2, was not saved") as error:
    checkpoints.close()
  assert error.value.__cause__.errno == errno.ENOSPC and len(said) == 1


def test_a_last_save_that_fails_does_not_hide_the_error_that_ended_the_run(tmp_path, monkeypatch):
  said = []
  monkeypatch.setattr(integrity, "write", full)
  with (
    pytest.raises(FloatingPointError, match="loss"),
    Checkpoints(str(tmp_path), say=said.append) as checkpoints,
  ):
    checkpoints.save(make_state(4, 2), 2, POSITION)
    raise FloatingPointError("loss")
  assert "last checkpoint, of step 2, was not saved" in said[-1]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Of TensorStore.
def test_a_file_system_that_takes_no_more_bytes_is_met_by_the_real_writer(tmp_path):
  """No stand-in: the kernel refuses TensorStore's write, in a thread of its own."""
  large = {"w": jnp.asarray(np.random.default_rng(0).standard_normal(2**19).astype(np.float32))}
  state, said = TrainState(jnp.int32(1), large, large, ()), []
  with Checkpoints(str(tmp_path), say=said.append) as checkpoints:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
      checkpoints.save(state, 1, POSITION)
      assert not checkpoints.wait()
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, limits)
      signal.signal(signal.SIGXFSZ, handler)
    assert "step 1 was NOT SAVED" in said[0] and "File too large" in said[0]
    checkpoints.save(state, 2, POSITION)
  assert load_params(str(tmp_path))[1] == 2


def test_a_step_is_saved_once(tmp_path):
  with Checkpoints(str(tmp_path)) as checkpoints:
    checkpoints.save(make_state(4, 1), 1, POSITION)
    checkpoints.save(make_state(4, 7), 1, POSITION)
    assert_bitwise_equal(checkpoints.restore_newest(make_state(4, 0)).state, make_state(4, 1))


# Step: the value of the metric there, None where it was not measured.
VALUES = {10: 0.3, 20: 0.9, 30: None, 40: 0.9, 50: float("nan"), 60: 0.1, 70: None, 80: 0.5}


@pytest.mark.parametrize(
  ("options", "kept"),
  [
    ({}, {70, 80}),
    ({"keep": 1}, {80}),
    ({"keep": 99}, set(VALUES)),
    ({"keep": 1, "keep_every": 30}, {30, 60, 80}),
    ({"keep": 1, "best": "max:top1"}, {40, 80}),  # The newer of two equals.
    ({"keep": 1, "best": "min:top1"}, {60, 80}),
    ({"keep": 1, "best": "max:unknown"}, {80}),
    ({"keep": 2, "keep_every": 20, "best": "min:top1"}, {20, 40, 60, 70, 80}),
  ],
)
def test_what_is_kept(options, kept):
  metrics = {step: {"top1": value} for step, value in VALUES.items() if value is not None}
  assert Retention(**options).kept(list(VALUES), metrics) == kept


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"keep": 0}, "checkpoint.keep=0 must be at least 1"),
    ({"keep_every": -5}, "checkpoint.keep_every=-5 must be 0"),
    ({"best": "top1"}, "checkpoint.best='top1' must be 'max:NAME' or 'min:NAME'"),
    ({"best": "most:top1"}, "checkpoint.best='most:top1' must be"),
    ({"best": "max:"}, "checkpoint.best='max:' must be"),
  ],
)
def test_bad_settings_are_errors_before_anything_is_made(tmp_path, options, message):
  with pytest.raises(ValueError, match=message):
    Checkpoints(str(tmp_path / "run"), **options)
  assert not (tmp_path / "run").exists()


def test_the_best_checkpoint_survives_a_restart(tmp_path):
  options = dict(keep=1, keep_every=4, best="max:eval/top1")
  values = {1: 0.1, 2: 0.8, 3: None, 4: 0.2, 5: 0.7, 6: None, 7: 0.3}
  for steps in ((1, 2, 3), (4, 5, 6, 7)):
    with Checkpoints(str(tmp_path), **options) as checkpoints:
      for step in steps:
        metrics = {} if values[step] is None else {"eval/top1": values[step], "loss": 1.0}
        checkpoints.save(make_state(4, step), step, POSITION, metrics)
  folder = tmp_path / "checkpoints"
  assert sorted(os.listdir(folder)) == ["2", "4", "7"]
  assert json.loads((folder / "2" / "metrics.json").read_text()) == {"eval/top1": 0.8, "loss": 1.0}
  # A number that its checksum denies is not believed.
  assert integrity.read_metrics(epath.Path(folder / "2"))["eval/top1"] == 0.8
  (folder / "2" / "metrics.json").write_text('{"eval/top1": 0.9}')
  assert integrity.read_metrics(epath.Path(folder / "2")) == {}


TWO = """
import resource, signal, sys, time
import jax, numpy as np
place, port, workdir = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, place)
from jax.sharding import NamedSharding, PartitionSpec
from umd.runs import checkpoint
from umd.devices.mesh import make_mesh, replicate
from umd.state import TrainState
checkpoint.TIMEOUT_SECONDS = 8
split = NamedSharding(make_mesh(), PartitionSpec("data"))
def make(step):
  whole = np.random.default_rng(step).standard_normal(2**20).astype(np.float32)
  w = {"w": jax.make_array_from_callback(whole.shape, split, lambda part: whole[part])}
  return TrainState(replicate(np.int32([step]), make_mesh()), w, w, ())
def same(state, step):
  mine = [np.asarray(s.data) for s in state.params["w"].addressable_shards]
  want = [np.asarray(s.data) for s in make(step).params["w"].addressable_shards]
  return all(map(np.array_equal, mine, want))
with checkpoint.Checkpoints(workdir, best="max:x") as checkpoints:
  for step in (1, 2, 3):
    checkpoints.save(make(step), step, {"position": 0}, {"x": -float(step)} if place == 0 else {})
  assert checkpoints.wait()
  if place == 0:
    folder = checkpoints._folder + "/3/state/manifest.ocdbt"
    raw = open(folder, "rb").read()
    open(folder, "wb").write(raw[:20] + bytes([raw[20] ^ 1]) + raw[21:])
  found = checkpoints.restore_newest(make(0))
  assert found.step == 2 and same(found.state, 2), found.step
  assert len(found.reports) == (place == 0), found.reports
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  if place == 1:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, limits[1]))
  began = time.monotonic()
  checkpoints.save(make(4), 4, {"position": 0})
  assert not checkpoints.wait()
  print("waited", round(time.monotonic() - began, 1), flush=True)
  assert time.monotonic() - began < 40
  resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  checkpoints.save(make(5), 5, {"position": 0})
  assert checkpoints.wait()
  found = checkpoints.restore_newest(make(0))
  assert found.step == 5 and same(found.state, 5)
print("done", flush=True)
"""


@pytest.mark.slow
def test_two_processes_agree_on_what_is_damaged_and_survive_one_that_cannot_write(tmp_path):
  """Process 0 judges for both; the wait for the one without room is bounded, and both go on."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = str(s.getsockname()[1])
  flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
  command = [sys.executable, "-c", TWO]
  both = [
    subprocess.Popen(
      [*command, str(place), port, str(tmp_path)],
      env={**os.environ, **flags},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for place in range(2)
  ]
  try:
    told = [p.communicate(timeout=300)[0] for p in both]
  finally:
    for p in both:
      p.kill()
  assert [p.returncode for p in both] == [0, 0], told[0] + told[1]
  assert "step 4 was NOT SAVED" in told[0] and "File too large" in told[1]
  # The best by process 0's numbers, and the newest two.
  kept = {name for name in os.listdir(tmp_path / "checkpoints") if name.isdigit()}
  assert kept == {"1", "2", "5"}
