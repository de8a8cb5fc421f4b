"""The folder of a run: whose it is, and what it says about itself."""

import json
import os
import sys

import jax
import pytest
from stand_ins import object_store

from umd.runs import workdir as folder
from umd.runs.writers import read_jsonl

CONFIG = {"lr": 0.1, "seed": 0, "heads": ("x0", "eps"), "evals": {"a": {"every": 5}}}


def test_flatten_joins_names_with_dots_and_reads_as_json_does():
  config = {"a": {"b": {"c": 1}, "d": (1, (2, 3))}, "e": None, "f": "x"}
  assert folder.flatten(config) == {"a.b.c": 1, "a.d": [1, [2, 3]], "e": None, "f": "x"}
  assert folder.flatten(json.loads(json.dumps(config))) == folder.flatten(config)


@pytest.mark.parametrize(
  "old, new, expected",
  [
    ({"a": 1, "b": {"c": 2}}, {"b": {"c": 2}, "a": 1}, {}),
    ({"a": (1, 2)}, {"a": [1, 2]}, {}),
    ({"a": 1}, {"a": 2}, {"a": (1, 2)}),
    ({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}}, {"a.c": (None, 2)}),
    ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1}}, {"a.c": (2, None)}),
    ({"a": {"b": 1}}, {"a": 3}, {"a": (None, 3), "a.b": (1, None)}),
  ],
)
def test_differences_are_named_with_both_values(old, new, expected):
  assert folder.differences(old, new) == expected


def claim(workdir, **changes):
  """What a start of a run does with its folder."""
  config = {**CONFIG, **changes}
  folder.check_same_run(str(workdir), config, ("evals",))
  folder.start(str(workdir), config)
  return json.loads((workdir / "config.json").read_text())


def test_a_new_folder_is_made_and_the_same_config_may_come_again(tmp_path, capsys):
  workdir = tmp_path / "deep" / "run"
  written = claim(workdir)
  assert folder.flatten(written) == folder.flatten(CONFIG)
  assert claim(workdir) == written
  assert capsys.readouterr().out == ""


def test_a_harmless_change_is_told_and_written(tmp_path, capsys):
  claim(tmp_path)
  written = claim(tmp_path, evals={"a": {"every": 7}})
  assert written["evals"] == {"a": {"every": 7}}
  told = capsys.readouterr().out
  assert "evals.a.every" in told and "5" in told and "7" in told


def changes(workdir) -> list[tuple]:
  records = read_jsonl(str(workdir / "config_changes.jsonl"))
  assert all(set(r) == {"time", "key", "old", "new"} and r["time"][:2] == "20" for r in records)
  return [(r["key"], r["old"], r["new"]) for r in records]


def test_every_change_is_written_down_once(tmp_path):
  claim(tmp_path)
  claim(tmp_path)
  assert not (tmp_path / "config_changes.jsonl").exists()
  claim(tmp_path, evals={"a": {"every": 7, "num": 3}})
  first = [("evals.a.every", 5, 7), ("evals.a.num", None, 3)]
  assert changes(tmp_path) == first
  claim(tmp_path, evals={"a": {"every": 7, "num": 3}})
  claim(tmp_path, evals={})
  assert changes(tmp_path) == [*first, ("evals.a.every", 7, None), ("evals.a.num", 3, None)]


def test_harmless_may_be_a_part_of_a_section(tmp_path, capsys):
  old = {"data": {"name": "a", "data_dir": "x", "dir": {"a": 1}}, "data_dirs": 1}
  folder.start(str(tmp_path), old)
  check = lambda new: folder.check_same_run(str(tmp_path), new, ("data.data_dir", "data.dir"))
  check({**old, "data": {"name": "a", "data_dir": "y", "dir": {"a": 2}}})
  assert "data.data_dir was 'x', is now 'y'" in capsys.readouterr().out
  for new in ({**old, "data": {**old["data"], "name": "b"}}, {**old, "data_dirs": 2}):
    with pytest.raises(ValueError, match="another config"):
      check(new)


@pytest.mark.parametrize("contents", [b"", b'{"lr": 0.', b"[1, 2]", b"\xff"])
def test_a_torn_config_is_named_and_left_alone(tmp_path, contents):
  path = tmp_path / "config.json"
  path.write_bytes(contents)
  for call in (lambda: folder.check_same_run(str(tmp_path), CONFIG, ()), lambda: claim(tmp_path)):
    with pytest.raises(ValueError, match=r"config\.json holds no config .*copy, or choose another"):
      call()
  assert os.listdir(tmp_path) == ["config.json"] and path.read_bytes() == contents


@pytest.mark.parametrize(
  "changes, told",
  [
    ({"lr": 0.25}, ["lr", "0.1", "0.25"]),
    ({"heads": ("x0",)}, ["heads", "['x0', 'eps']", "['x0']"]),
    ({"lr": 0.25, "evals": {}}, ["lr"]),
    ({"momentum": 0.9}, ["momentum", "None", "0.9"]),
    # A key that only begins like a harmless one.
    ({"evals_seed": 1}, ["evals_seed"]),
  ],
)
def test_a_serious_change_is_an_error_with_both_values_and_nothing_is_written(
  tmp_path, changes, told
):
  claim(tmp_path)
  before = (tmp_path / "config.json").read_bytes()
  with pytest.raises(ValueError) as error:
    claim(tmp_path, **changes)
  for word in [str(tmp_path), *told]:
    assert word in str(error.value)
  assert "every" not in str(error.value)
  assert not (tmp_path / "config_changes.jsonl").exists()
  assert (tmp_path / "config.json").read_bytes() == before


def test_a_json_file_is_replaced_in_one_piece(tmp_path):
  path = str(tmp_path / "new" / "x.json")
  assert folder.read_json(path) is None
  folder.write_json(path, {"a": 1})
  with pytest.raises(TypeError):
    folder.write_json(path, {"a": 2, "b": object()})  # fails halfway
  assert folder.read_json(path) == {"a": 1}
  folder.write_json(path, {"a": 3})
  assert folder.read_json(path) == {"a": 3}
  assert os.listdir(tmp_path / "new") == ["x.json"]


def test_a_run_is_finished_once_it_says_so(tmp_path):
  assert folder.finished(str(tmp_path)) is None
  folder.finish(str(tmp_path), {"step": 5, "metrics": {"loss": 0.5}})
  assert folder.finished(str(tmp_path)) == {"step": 5, "metrics": {"loss": 0.5}}


def test_the_environment_names_versions_devices_and_command(tmp_path, monkeypatch):
  secret = ["--key", "SECRET", "--key=SECRET"]  # Of Weights & Biases.
  monkeypatch.setattr(sys, "argv", ["train.py", *secret, "--workdir", "here"])
  folder.start(str(tmp_path), CONFIG)
  found = json.loads((tmp_path / "environment.json").read_text())
  assert found["versions"]["jax"] == jax.__version__
  assert {"flax", "optax", "orbax-checkpoint", "numpy"} <= set(found["versions"])
  assert len(found["devices"]) == jax.device_count()
  assert found["backend"] == "cpu"
  assert found["command"] == [sys.executable, "train.py", "--workdir", "here"]


def test_a_run_at_an_address_is_written_and_read_as_on_this_machine(monkeypatch):
  object_store(monkeypatch)
  remote = "gs://bucket/run"
  folder.check_writable(remote)
  assert not folder.exists(remote) and folder.finished(remote) is None
  folder.check_same_run(remote, CONFIG, ())
  folder.start(remote, CONFIG)
  assert folder.exists(remote) and folder.exists(folder.join(remote, "config.json"))
  assert folder.flatten(folder.read_json(f"{remote}/config.json")) == folder.flatten(CONFIG)
  assert folder.read_json(f"{remote}/environment.json")["backend"] == "cpu"
  with pytest.raises(ValueError, match=r"lr: there 0\.1, now 0\.25"):
    folder.check_same_run(remote, {**CONFIG, "lr": 0.25}, ())
  folder.start(remote, {**CONFIG, "lr": 0.25})
  folder.start(remote, {**CONFIG, "lr": 0.5})
  lines = folder.read_bytes(f"{remote}/config_changes.jsonl").decode().splitlines()
  assert [json.loads(line)["new"] for line in lines] == [0.25, 0.5]
  folder.finish(remote, {"step": 1})
  folder.finish(remote, {"step": 5})
  assert folder.finished(remote) == {"step": 5}


@pytest.mark.parametrize("path", ["new/run", "there", "./there/", "/tmp"])
def test_looking_whether_a_folder_can_be_written_leaves_nothing_there(tmp_path, monkeypatch, path):
  monkeypatch.chdir(tmp_path)
  os.mkdir("there")
  folder.check_writable(path)
  assert os.listdir(tmp_path) == ["there"] and not os.listdir("there")


@pytest.mark.parametrize(
  ("workdir", "told"),
  [
    ("file/run", "file is no folder"),
    ("s3://bucket/run", "must be a folder of this machine or gs://"),
  ],
)
def test_a_workdir_that_cannot_be_written_is_an_error_that_names_it(
  tmp_path, monkeypatch, workdir, told
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match=f"workdir='{workdir}' cannot be written: .*{told}"):
    folder.check_writable(workdir)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named(tmp_path):
  tmp_path.chmod(0o500)
  with pytest.raises(ValueError, match=f"no permission to write in {tmp_path}"):
    folder.check_writable(str(tmp_path / "run"))


def test_a_bucket_that_cannot_be_written_is_named_with_what_the_store_says(monkeypatch):
  def refuse(*args, **options):
    raise RuntimeError("403: no storage.objects.create access\nand much more")

  objects = object_store(monkeypatch)
  monkeypatch.setattr(objects, "open", refuse)
  with pytest.raises(ValueError, match=r"'gs://bucket/run' cannot.*403: no.*access\. Check the bu"):
    folder.check_writable("gs://bucket/run")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_one_message_that_names_the_file(tmp_path):
  (tmp_path / "summary.json.tmp").symlink_to("/dev/full")
  with pytest.raises(OSError, match=r"summary\.json cannot be written: No space left.*Make room"):
    folder.finish(str(tmp_path), {"step": 5})
