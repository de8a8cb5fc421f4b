"""The report of a run: a page that holds its numbers, whatever they are and whatever is broken."""

import base64
import gzip
import html.parser
import io
import json
import math
import os
import re
import threading
import types

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import quickstart
from tools import report as tool
from trainers import stages
from umd import report
from umd.report import page, read, writer
from umd.runs import lock, preemption, workdir

EVIL = "</script><evil a=\"'&amp;"
CONFIG = {
  "trainer": "diffusion",
  "steps": 40,
  "summary": ["fewshot/*_mean", "generation/fid_*"],
  "checkpoint": {"every": 20, "best": "max:odd/one"},
  "optim": {"lr": 0.1, "wd": 0.0},
  "evals": {"generation": {"type": "generation"}, "fewshot": {"type": "fewshot"}},
}
RECORDS = [
  {"step": 10, "loss": 1.5, "loss/noised/eps": 2.0, "lr": 0.1, "skipped": 0.0, "a/word": "x"},
  {"step": 20, "loss": math.nan, "loss/noised/eps": 1.25, "lr": 0.2, "skipped": 0.0},
  {"step": 20, "fewshot/class_10shot_mean": 0.25, "fewshot/class_10shot_std": 0.01},
  {"step": 30, "loss": math.inf, "loss/noised/eps": 1.0, "lr": 0.1, "late": 3.0, "skipped": 0.0},
  {"step": 40, "loss": 0.5, "loss/noised/eps": 0.75, "lr": 0.0, "late": 4.0, "skipped": 0.0},
  {"step": 40, "fewshot/class_10shot_mean": 0.75, "fewshot/class_10shot_std": 0.02},
  {"step": 40, "generation/fid_10k": 12.5, "generation/sampler": "ddim", "a/word": "y"},
]


def parse(text: str):
  """Reads JSON as browsers do: without NaN."""

  def refuse(word):
    raise AssertionError(f"{word} is no JSON")

  return json.loads(text, parse_constant=refuse)


class Page(html.parser.HTMLParser):
  """What a browser makes of a page: elements, text, and the data of its scripts."""

  def __init__(self, text: str):
    super().__init__()
    self.elements, self.scripts, self.figures, self.text, self._open = [], {}, [], "", []
    self.feed(text)
    self.close()
    assert not self._open

  def handle_starttag(self, tag, attributes):
    self.elements.append((tag, dict(attributes)))
    if tag not in ("meta", "link", "img", "input", "wbr"):
      self._open.append((tag, dict(attributes)))

  def handle_endtag(self, tag):
    assert self._open[-1][0] == tag, f"</{tag}> ends <{self._open[-1][0]}>"
    self._open.pop()

  def handle_data(self, data):
    tag, attributes = self._open[-1] if self._open else ("", {})
    if attributes.get("class") == "figure":
      self.figures.append(parse(data))
    elif tag == "script":
      self.scripts[attributes.get("id", "")] = data
    elif tag != "style":
      self.text += data

  @property
  def data(self) -> dict:
    return parse(self.scripts["report-data"])

  @property
  def words(self) -> str:
    return " ".join(self.text.split())

  def lines(self) -> dict[str, dict]:
    """{name: trace} of all figures."""
    return {trace["name"]: trace for figure in self.figures for trace in figure["data"]}

  def attributes(self, tag: str, name: str) -> list:
    return [a[name] for t, a in self.elements if t == tag and name in a]


def png(side: int = 8, seed: int = 0) -> bytes:
  pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), np.uint8)
  out = io.BytesIO()
  Image.fromarray(pixels).save(out, "png")
  return out.getvalue()


def make(path, records=RECORDS, config=CONFIG, summary=True) -> str:
  """A workdir as a run leaves it."""
  folder = str(path)
  workdir.start(folder, config)
  lines = "".join(json.dumps(r) + "\n" for r in records)
  workdir.write_bytes(f"{folder}/metrics.jsonl", lines.encode())
  for step in (20, 40):
    workdir.write_bytes(f"{folder}/images/generation/images_{step:08d}.png", png(seed=step))
    os.makedirs(f"{folder}/checkpoints/{step}")
  seconds = {"productive": 90.0, "seconds": {"lost": 10.0}, "time": 0}
  workdir.write_json(f"{folder}/goodput.json", seconds)
  if summary:
    workdir.finish(folder, {"name": "run", "step": 40, "metrics": {}})
  return folder


def report_of(folder: str) -> Page:
  report.write_run(folder)
  return Page(workdir.read_bytes(f"{folder}/report.html").decode())


def test_the_page_holds_the_numbers(tmp_path):
  shown = report_of(make(tmp_path / "run"))
  (run,) = shown.data["runs"]
  assert (run["label"], run["state"], run["step"], run["steps"]) == ("run", "finished", 40, 40)
  assert run["headline"] == ["fewshot/class_10shot_mean", "generation/fid_10k"]
  assert run["latest"]["generation/fid_10k"] == 12.5 and run["latest"]["loss"] == 0.5
  assert run["latest"].keys() == {k for r in RECORDS for k in r} - {"step", *run["words"]}
  assert run["words"] == {"a/word": "y", "generation/sampler": "ddim"}
  lines = shown.lines()
  assert (lines["loss"]["x"], lines["loss"]["y"]) == ([10, 20, 30, 40], [1.5, None, None, 0.5])
  assert "loss: 2 of 4 values not finite, first at step 20" in shown.words
  assert lines["noised/eps"]["y"] == [2.0, 1.25, 1.0, 0.75]
  assert (lines["late"]["x"], lines["late"]["y"]) == ([30, 40], [3.0, 4.0])
  assert lines["class_10shot_mean"]["error_y"]["array"] == [0.01, 0.02]
  assert lines.keys() == {"loss", "noised/eps", "lr", "late", "skipped", "class_10shot_mean"}
  for figure in shown.figures:
    assert [mark["x0"] for mark in figure["layout"]["shapes"]] == [20, 40]  # checkpoints
  assert "0.75 ± 0.02 best" in shown.words
  for row in ("productive 1:30 90.0%", "lost 0:10 10.0%", "all 1:40 100.0%"):
    assert row in shown.words
  assert shown.attributes("figure", "data-step") == ["20", "40"]
  assert shown.attributes("img", "alt") == ["Samples at step 20", "Samples at step 40"]


def test_a_page_asks_the_network_for_nothing(tmp_path):
  shown = report_of(make(tmp_path / "run"))
  sources = [*shown.attributes("img", "src"), *shown.attributes("link", "href")]
  assert sources and all(source.startswith("data:") for source in sources)
  ids = [a["id"] for _, a in shown.elements if "id" in a]
  assert len(ids) == len(set(ids))
  links = shown.attributes("a", "href")
  assert links and set(links) <= {f"#{id_}" for id_ in ids}
  assert not shown.attributes("script", "src")
  (policy,) = [a["content"] for t, a in shown.elements if "Security" in a.get("http-equiv", "")]
  assert policy.startswith("default-src 'none'") and "http" not in policy
  plotly = gzip.decompress(base64.b64decode(shown.scripts["plotly"]))
  assert b"plotly.js v" in plotly[:200] and len(plotly) > 1e6


def test_nothing_in_a_run_can_break_the_page(tmp_path):
  metric = f"eval{EVIL}/{EVIL}"
  records = [{"step": s, metric: float(s), f"x/{EVIL}": EVIL, "loss": 1.0 / s} for s in (1, 2)]
  config = {**CONFIG, "summary": ["*"], EVIL: {EVIL: EVIL}, "evals": {f"eval{EVIL}": EVIL}}
  folder = make(tmp_path / EVIL.replace("/", ""), records, config)
  workdir.write_json(f"{folder}/default_config.json", CONFIG)
  workdir.write_bytes(f"{folder}/bad_data.txt", EVIL.encode())
  change = {"time": EVIL, "key": EVIL, "old": EVIL, "new": None}
  workdir.write_bytes(f"{folder}/config_changes.jsonl", json.dumps(change).encode() + b"\n")
  workdir.write_bytes(f"{folder}/goodput.json", EVIL.encode())
  runs = [read.read_run(folder), read.read_run(make(tmp_path / "b"))]
  one, both = report_of(folder), Page(page.comparison_page({EVIL: runs}))
  for shown in (one, both):
    assert not [tag for tag, _ in shown.elements if tag.startswith("evil")]
    assert EVIL in shown.text
  assert one.data["runs"][0]["latest"][metric] == 2.0
  assert one.data["runs"][0]["words"] == {f"x/{EVIL}": EVIL}


@pytest.mark.parametrize(
  ("name", "contents", "is_problem"),
  [
    ("config.json", b'{"steps": 4', True),
    ("config.json", b"[]", True),
    ("config.json", b'{"evals": [1], "checkpoint": 2, "steps": "x", "summary": "a"}', False),
    ("environment.json", b'{"command": 3, "devices": 1, "versions": []}', False),
    ("goodput.json", b"", True),
    ("summary.json", b"{", True),
    ("config_changes.jsonl", b'{"key": 1}\n[2]\n{', False),
    ("bad_data.txt", b"\xff\xff\n", False),
    ("stages.json", b"}", False),
    ("images/generation/images_00000040.png", b"\x89PNG\r\n\x1a\n torn", True),
    ("images/generation/notes.txt", b"", False),
    ("metrics.jsonl", b'{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n{"step": 3', False),
    ("metrics.jsonl", b'[1]\n{"loss": 1}\n{"step": "x"}\n{"step": 1, "loss": [1]}\n', False),
  ],
)
def test_a_broken_run_has_a_report_that_names_the_broken_file(tmp_path, name, contents, is_problem):
  folder = make(tmp_path / "run")
  workdir.write_bytes(f"{folder}/{name}", contents)
  shown = report_of(folder)
  assert len(shown.data["runs"]) == 1
  assert ("Could not be read" in shown.words) == is_problem
  assert not is_problem or os.path.basename(name) in shown.words


def test_a_run_that_has_just_begun_has_a_report(tmp_path):
  os.makedirs(tmp_path / "run")
  shown = report_of(str(tmp_path / "run"))
  (run,) = shown.data["runs"]
  assert run["state"] == "not started" and run["latest"] == {} and shown.figures == []
  assert "plotly" not in shown.scripts


def test_a_step_that_was_logged_twice_counts_once(tmp_path):
  records = [{"step": s, "loss": float(v)} for s, v in ((5, 1), (10, 2), (5, 3), (15, 4), (10, 5))]
  loss = read.read_run(make(tmp_path / "run", records)).metrics["loss"]
  assert (loss.steps.tolist(), loss.values.tolist()) == ([5, 10, 15], [3.0, 5.0, 4.0])


@pytest.mark.parametrize("seed", range(3))
def test_a_thinned_line_keeps_its_ends_its_extremes_and_its_gaps(seed):
  rng = np.random.default_rng(seed)
  n = int(rng.integers(5000, 9000))
  values = rng.standard_normal(n).cumsum()
  low, high, gap = rng.choice(np.arange(1, n - 1), 3, replace=False)
  values[low], values[high], values[gap] = -1e4, 1e4, np.nan
  series = read.Series(np.arange(n) * 7, values)
  kept = read.thin(series)
  assert len(kept.steps) <= read.POINTS + 3
  assert {0, 7 * (n - 1), 7 * low, 7 * high, 7 * gap} <= set(kept.steps.tolist())
  assert (np.diff(kept.steps) > 0).all()
  np.testing.assert_array_equal(kept.values, values[kept.steps // 7])
  means = read.means(series)
  counts = [len(s) for s in np.array_split(np.arange(n - 1), len(means.steps))]
  assert np.average(means.values, weights=counts) == pytest.approx(np.nanmean(values))


@pytest.mark.parametrize(
  ("name", "better"),
  [
    ("losses/ema/noised/eps/t1-250", min),
    ("generation/fid_10k", min),
    ("generation/frechet_classifier_floor", None),
    ("generation/is_10k", max),
    ("generation/kid_std_10k", None),
    ("fewshot/class_strict_10shot_mean", max),
    ("probe/lr/t0", None),
    ("reconstruction/masked_mse", min),
    ("grad_norm", None),
  ],
)
def test_which_values_are_better(name, better):
  assert read.direction(name) is better
  assert read.direction(name, f"max:{name}") is max
  assert read.direction(name, f"min:{name}") is min


def test_the_best_step_is_the_first_with_the_best_finite_value():
  values = np.array([5.0, math.nan, 1.0, 1.0, -math.inf, 2.0])
  series = read.Series(np.arange(1, 7), values)
  assert read.best_step(series, min) == 3 and read.best_step(series, max) == 1
  assert read.best_step(series, None) is None
  assert read.best_step(read.Series(np.arange(2), np.ones(2)), min) is None


def test_deviations_belong_to_their_means():
  names = ["f/a_mean", "f/a_std", "g/is_10k", "g/is_std_10k", "g/kid_5k", "x_std"]
  pairs = {name: std for name in names if (std := read.deviation(name, names))}
  assert pairs == {"f/a_mean": "f/a_std", "g/is_10k": "g/is_std_10k"}


def test_large_pictures_are_shrunk_and_of_many_a_few_are_taken(tmp_path, monkeypatch):
  large, small = png(400), png(20)
  assert len(large) > read.PICTURE_BYTES > len(small)
  assert read.encode(small).address.endswith(base64.b64encode(small).decode())
  monkeypatch.setattr(read, "SIDE", 200)
  shrunk = read.encode(large)
  kind, _, data = shrunk.address.partition(",")
  assert kind == "data:image/webp;base64"
  assert (shrunk.width, shrunk.height) == Image.open(io.BytesIO(base64.b64decode(data))).size
  assert shrunk.width == 200
  for step in range(1, 41):
    workdir.write_bytes(f"{tmp_path}/images/a/b_{step:08d}.png", small)
  cache = {}
  steps = list(read.read_run(str(tmp_path), cache=cache).pictures["a/b"])
  assert len(steps) == read.STEPS_OF_PICTURES and (steps[0], steps[-1]) == (1, 40)
  for path in cache:  # What was read once is not read again.
    os.remove(path)
    workdir.write_bytes(path, b"")
  assert not read.read_run(str(tmp_path), cache=cache).problems


def test_the_state_of_a_run_is_found_out(tmp_path):
  top = str(tmp_path / "top")
  folder = make(f"{top}/pretrain", summary=False)
  read.add_stages(top, ["pretrain", "finetune"])
  assert read.read_run(folder).state == read.INTERRUPTED
  with lock.hold([f"{top}/pretrain"]):
    assert read.read_run(folder).state == read.RUNNING
    assert read.read_run(f"{top}/finetune").state == read.NOT_STARTED
  workdir.finish(folder, {"step": 40})
  run = read.read_run(folder)
  assert (run.state, run.label) == (read.FINISHED, "top/pretrain")


def test_the_report_of_a_folder_leads_to_those_of_its_stages(tmp_path, capsys):
  read.add_stages(str(tmp_path), ["pretrain", "finetune"])
  read.add_stages(str(tmp_path), ["eval", "pretrain"])
  make(tmp_path / "pretrain")
  make(tmp_path / "finetune", summary=False)
  tool.main([str(tmp_path)])
  assert capsys.readouterr().out == f"{tmp_path}/report.html\n"
  shown = Page((tmp_path / "report.html").read_text())
  states = {run["label"].split("/")[1]: run["state"] for run in shown.data["runs"]}
  expected = {"pretrain": "finished", "finetune": "interrupted", "eval": "not started"}
  assert states == expected and list(states) == list(expected)
  links = shown.attributes("a", "href")
  assert links == ["pretrain/report.html", "finetune/report.html"]
  assert all((tmp_path / link).exists() for link in links)
  assert "1 of 3 stages finished" in shown.words and "12.5" in shown.words


def test_what_differs_from_the_defaults_is_shown(tmp_path):
  folder = make(tmp_path / "run")
  assert "defaults of the config's file are not known" in report_of(folder).words
  default = {**CONFIG, "steps": math.inf, "optim": {"lr": 0.1, "beta": 2}}
  workdir.write_json(f"{folder}/default_config.json", default)
  words = report_of(folder).words
  for row in ("steps Infinity 40", "optim.beta 2 -", "optim.wd - 0.0"):
    assert row in words
  assert "optim.lr" not in words
  workdir.write_json(f"{folder}/default_config.json", CONFIG)
  assert "All values are the defaults" in report_of(folder).words


def test_a_comparison_shows_what_differs_and_a_run_has_one_color(tmp_path, capsys):
  other = {**CONFIG, "optim": {"lr": 0.3, "wd": 0.0}, "new": 1}
  records = [{"step": s, "loss": 1.0 / s, "only": s % 7} for s in range(1, 60)]
  folders = [make(tmp_path / "a"), make(tmp_path / "b", records, other)]
  tool.main([*folders, "--out", str(tmp_path / "out.html")])
  assert capsys.readouterr().out == f"{tmp_path}/out.html\n"
  shown = Page((tmp_path / "out.html").read_text())
  differences = page.config_differences([read.read_run(folder) for folder in folders])
  assert differences == {"new": [None, 1], "optim.lr": [0.1, 0.3]}
  assert "optim.lr" in shown.words and "optim.wd" not in shown.words
  colors = {(t["name"], t["line"]["color"]) for f in shown.figures for t in f["data"]}
  assert colors == {("a", page.COLORS[0]), ("b", page.COLORS[1])}
  names = [tuple(t["name"] for t in f["data"]) for f in shown.figures]
  assert names[0] == ("a", "b") and ("b",) in names
  assert [run["latest"]["loss"] for run in shown.data["runs"]] == [0.5, 0.0169492]
  assert len(shown.attributes("img", "src")) == 4


def test_folders_with_stages_are_compared_stage_by_stage(tmp_path):
  for top, names in (("x", ["pretrain", "finetune"]), ("y", ["pretrain", "eval"])):
    read.add_stages(str(tmp_path / top), names)
    for name in names:
      make(tmp_path / top / name)
  groups = tool.groups([str(tmp_path / "x"), str(tmp_path / "y")])
  assert {stage: [run.label for run in runs] for stage, runs in groups.items()} == {
    "pretrain": ["x/pretrain", "y/pretrain"]
  }
  same = [make(tmp_path / "p" / name / "run") for name in "ab"]
  assert [run.label for run in tool.groups(same)[""]] == ["a/run", "b/run"]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["run", "absent"], "'absent' holds no run: .* Give the workdir of a run"),
    (["empty"], "'empty' has no metrics yet"),
    (["run", "top"], "The runs share no stage: .*'pretrain'"),
    (["top", "--out", "x.html"], "the stages .*pretrain.*, each with a report of its own"),
    (["run", "--out", "."], "--out='.' is a folder"),
  ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
  monkeypatch.chdir(tmp_path)
  make(tmp_path / "run")
  make(tmp_path / "empty", records=[])
  make(tmp_path / "top" / "pretrain")
  read.add_stages("top", ["pretrain"])
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(SystemExit):
    tool.main(arguments)
  assert re.fullmatch(f"error: .*{message}.*\n", capsys.readouterr().err)
  assert sorted(tmp_path.rglob("*")) == before


def test_a_report_that_cannot_be_written_is_one_warning(tmp_path, monkeypatch):
  def fail(run):
    raise RuntimeError("no page")

  monkeypatch.setattr(page, "run_page", fail)
  reporter = report.Reporter(make(tmp_path / "run"))
  with pytest.warns(UserWarning, match=r"report\.html was not written: .*no page") as warned:
    for _ in range(3):
      reporter.finish(read.FINISHED)
  assert len(warned) == 1


def test_updates_are_written_beside_training_and_the_last_one_waits(tmp_path, monkeypatch):
  """All updates that come while one is being written are one more: the newest is never lost."""
  begun, go, states = threading.Semaphore(0), threading.Semaphore(0), []

  def slow(folder, *, state, **known):
    begun.release()
    assert go.acquire(timeout=30)
    states.append(state)
    return read.read_run(folder, state=state)

  monkeypatch.setattr(writer, "write_run", slow)
  reporter = report.Reporter(make(tmp_path / "run", summary=False), 40)
  reporter.update()
  assert begun.acquire(timeout=30)
  for _ in range(4):
    reporter.update()  # It returns though nothing can be written.
  assert not states
  go.release()
  assert begun.acquire(timeout=30)
  go.release(2)
  reporter.finish(read.FINISHED)
  assert states == ["running", "running", "finished"]
  reporter.update(patience=60.0)  # One has only just been written.
  assert begun.acquire(timeout=30) and not begun.acquire(timeout=0.1)


@pytest.mark.parametrize(
  ("error", "state", "note"),
  [
    (preemption.Preempted(75), "interrupted", ""),
    (KeyboardInterrupt(), "interrupted", ""),
    (FloatingPointError("Step 3: <loss> is not finite\nmore"), "failed", "Step 3: <loss> is not"),
  ],
)
def test_the_report_says_how_a_run_ended(tmp_path, error, state, note):
  folder = make(tmp_path / "run", summary=False)
  with pytest.raises(type(error)), report.Reporter(folder, 80):
    raise error
  shown = Page(workdir.read_bytes(f"{folder}/report.html").decode())
  assert shown.data["runs"][0]["state"] == state and shown.data["runs"][0]["steps"] == 80
  assert note in shown.words


def test_the_defaults_are_kept_for_each_stage_and_of_one_config(tmp_path):
  ready = lambda name, path: types.SimpleNamespace(name=name, folder=str(path), summary=None)
  top, one = tmp_path / "top", tmp_path / "one"
  default = ConfigDict({"stages": ("a", "b"), "a": quickstart.get_config().pretrain})
  stages._write_defaults([ready("a", top / "a"), ready("b", top / "b")], str(top), default)
  assert read.stages(str(top)) == ["a", "b"]
  kept = workdir.read_json(str(top / "a" / report.DEFAULTS))
  # Records hold what the file leaves out, too, as the run's own config does.
  assert kept["steps"] == 2000 and kept["data"]["shuffle_buffer"] == 50_000
  assert not (top / "b").exists()
  stages._write_defaults([ready("one", one)], str(one), default.a)
  assert workdir.read_json(str(one / report.DEFAULTS)) == kept
  assert read.stages(str(one)) == []
