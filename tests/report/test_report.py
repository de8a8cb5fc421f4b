"""The report of a run: a page that holds its numbers, whatever they are and whatever is broken."""

import base64
import gzip
import html.parser
import io
import json
import math
import os
import threading
import types

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from tools import report as tool
from umd import report
from umd.report import charts, page, read, writer
from umd.report import page as layout
from umd.report import read as pictures
from umd.report import read as series
from umd.runs import lock, preemption
from umd.runs import workdir as folder

EVIL = "</script><evil a=\"'&amp;"
CONFIG = {
  "trainer": "diffusion",
  "steps": 40,
  "summary": ["fewshot/*_mean", "generation/fid_*"],
  "checkpoint": {"every": 20, "best": "max:odd/one"},
  "optim": {"lr": 0.1, "wd": 0.0},
  "evals": {"generation": {"type": "generation"}, "fewshot": {"type": "fewshot"}},
}


class Page(html.parser.HTMLParser):
  """What a browser makes of a page: elements, text, and the data of its scripts."""

  def __init__(self, text: str):
    super().__init__()
    self.elements, self.scripts, self.text, self._open = [], {}, [], []
    self._glue = False
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attributes):
    self.elements.append((tag, dict(attributes)))
    self._glue = tag == "wbr"
    if tag not in ("meta", "link", "img", "input", "wbr"):
      self._open.append((tag, dict(attributes)))

  def handle_endtag(self, tag):
    assert self._open[-1][0] == tag, f"</{tag}> ends <{self._open[-1][0]}>"
    self._open.pop()

  def handle_data(self, data):
    tag, attributes = self._open[-1] if self._open else ("", {})
    if tag == "script":
      self.scripts[attributes.get("id", "")] = data
    elif tag != "style" and self._glue:
      self.text[-1] += data
    elif tag != "style":
      self.text.append(data)
    self._glue = False

  def close(self):
    super().close()
    assert not self._open

  @property
  def data(self) -> dict:
    def refuse(word):
      raise AssertionError(f"{word} is no JSON")

    return json.loads(self.scripts["report-data"], parse_constant=refuse)

  @property
  def words(self) -> str:
    return " ".join(" ".join(self.text).split())

  def lines(self) -> dict[str, dict]:
    """{metric: line}, of the first chart that has it."""
    found = {}
    for chart in self.data["charts"]:
      for line in chart["lines"]:
        found.setdefault(line["metric"], line)
    return found

  def attributes(self, tag: str, name: str) -> list:
    return [a[name] for t, a in self.elements if t == tag and name in a]


def png(side: int = 8, seed: int = 0) -> bytes:
  pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), np.uint8)
  out = io.BytesIO()
  Image.fromarray(pixels).save(out, "png")
  return out.getvalue()


RECORDS = [
  {"step": 10, "loss": 1.5, "loss/noised/eps": 2.0, "lr": 0.1, "skipped": 0.0, "a/word": "x"},
  {"step": 20, "loss": math.nan, "loss/noised/eps": 1.25, "lr": 0.2, "skipped": 0.0},
  {"step": 20, "fewshot/class_10shot_mean": 0.25, "fewshot/class_10shot_std": 0.01},
  {"step": 30, "loss": math.inf, "loss/noised/eps": 1.0, "lr": 0.1, "late": 3.0, "skipped": 0.0},
  {"step": 40, "loss": 0.5, "loss/noised/eps": 0.75, "lr": 0.0, "late": 4.0, "skipped": 0.0},
  {"step": 40, "fewshot/class_10shot_mean": 0.75, "fewshot/class_10shot_std": 0.02},
  {"step": 40, "generation/fid_10k": 12.5, "generation/sampler": "ddim", "a/word": "y"},
]


def make(path, records=RECORDS, config=CONFIG, summary=True) -> str:
  """A workdir as a run leaves it."""
  workdir = str(path)
  folder.start(workdir, config)
  lines = "".join(json.dumps(r) + "\n" for r in records)
  folder.write_bytes(f"{workdir}/metrics.jsonl", lines.encode())
  for step in (20, 40):
    folder.write_bytes(f"{workdir}/images/generation/images_{step:08d}.png", png(seed=step))
    os.makedirs(f"{workdir}/checkpoints/{step}")
  folder.write_json(
    f"{workdir}/goodput.json", {"productive": 90.0, "seconds": {"lost": 10.0}, "time": 0}
  )
  if summary:
    folder.finish(workdir, {"name": "run", "step": 40, "metrics": {}})
  return workdir


def report_of(workdir: str) -> Page:
  report.write_run(workdir)
  return Page(folder.read_bytes(f"{workdir}/report.html").decode())


def test_the_page_holds_the_numbers(tmp_path):
  found = report_of(make(tmp_path / "run"))
  (run,) = found.data["runs"]
  assert (run["label"], run["state"], run["step"], run["steps"]) == ("run", "finished", 40, 40)
  assert run["headline"] == ["fewshot/class_10shot_mean", "generation/fid_10k"]
  assert run["latest"]["generation/fid_10k"] == 12.5 and run["latest"]["loss"] == 0.5
  assert run["latest"].keys() == {k for r in RECORDS for k in r} - {"step", *run["words"]}
  assert run["words"] == {"a/word": "y", "generation/sampler": "ddim"}
  lines = found.lines()
  assert (lines["loss"]["x"], lines["loss"]["y"]) == ([10, 20, 30, 40], [1.5, None, None, 0.5])
  assert lines["loss"]["not_finite"] == {"count": 2, "steps": [20, 30]}
  assert lines["loss/noised/eps"]["y"] == [2.0, 1.25, 1.0, 0.75]
  assert "not_finite" not in lines["loss/noised/eps"]
  assert (lines["late"]["x"], lines["late"]["y"]) == ([30, 40], [3.0, 4.0])
  assert lines["fewshot/class_10shot_mean"]["std"] == [0.01, 0.02]
  assert lines.keys().isdisjoint({"skipped", "fewshot/class_10shot_std", "generation/fid_10k"})
  assert all(chart["checkpoints"] == [20, 40] for chart in found.data["charts"])
  assert "0.75 ± 0.02 best" in found.words and "skipped 0" in found.words
  assert "productive 1:30 90.0% lost 0:10 10.0% all 1:40" in found.words
  steps = [a["data-step"] for t, a in found.elements if t == "figure"]
  alts = found.attributes("img", "alt")
  assert steps == ["20", "40"] and alts == ["Samples at step 20", "Samples at step 40"]


def test_a_page_asks_the_network_for_nothing(tmp_path):
  found = report_of(make(tmp_path / "run"))
  sources = [*found.attributes("img", "src"), *found.attributes("link", "href")]
  assert sources and all(source.startswith("data:") for source in sources)
  assert all(href.startswith("#") for href in found.attributes("a", "href"))
  assert not found.attributes("script", "src")
  (policy,) = [a["content"] for t, a in found.elements if "Security" in a.get("http-equiv", "")]
  assert policy.startswith("default-src 'none'") and "http" not in policy
  packed = gzip.decompress(base64.b64decode(found.scripts["plotly"]))
  assert b"plotly.js v" in packed[:200] and len(packed) > 1e6


def test_links_lead_to_sections_and_ids_are_given_once(tmp_path):
  paths = [make(tmp_path / name) for name in "ab"]
  both = layout.Html(tool.comparison.page({"": [read.read(p) for p in paths]}))
  for found in (report_of(paths[0]), Page(both)):
    ids = [a["id"] for _, a in found.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {href[1:] for href in found.attributes("a", "href")} <= set(ids)


def test_nothing_in_a_run_can_break_the_page(tmp_path):
  metric = f"eval{EVIL}/{EVIL}"
  records = [{"step": s, metric: float(s), f"x/{EVIL}": EVIL, "loss": 1.0 / s} for s in (1, 2)]
  config = {**CONFIG, "summary": ["*"], EVIL: {EVIL: EVIL}, "evals": {f"eval{EVIL}": EVIL}}
  workdir = make(tmp_path / EVIL.replace("/", ""), records, config)
  folder.write_json(f"{workdir}/default_config.json", CONFIG)
  folder.write_bytes(f"{workdir}/bad_data.txt", EVIL.encode())
  change = {"time": EVIL, "key": EVIL, "old": EVIL, "new": None}
  folder.write_bytes(f"{workdir}/config_changes.jsonl", json.dumps(change).encode() + b"\n")
  folder.write_bytes(f"{workdir}/goodput.json", EVIL.encode())
  first = report_of(workdir)
  both = Page(tool.comparison.page({EVIL: [read.read(workdir), read.read(make(tmp_path / "b"))]}))
  for found in (first, both):
    assert found.elements.count(("evil", {})) == 0
    assert not [t for t, _ in found.elements if t.startswith("evil")]
    assert found.lines()[metric]["y"] == [1.0, 2.0]
    assert EVIL in "".join(found.text)
  assert first.data["runs"][0]["words"] == {f"x/{EVIL}": EVIL}


def test_a_step_that_was_logged_twice_counts_once(tmp_path):
  records = [{"step": s, "loss": float(v)} for s, v in ((5, 1), (10, 2), (5, 3), (15, 4), (10, 5))]
  found = report_of(make(tmp_path / "run", records)).lines()["loss"]
  assert (found["x"], found["y"]) == ([5, 10, 15], [3.0, 5.0, 4.0])


@pytest.mark.parametrize(
  ("name", "contents", "told"),
  [
    ("config.json", b'{"steps": 4', True),
    ("config.json", b"[]", True),
    ("config.json", b'{"summary": 3}', False),
    ("config.json", b'{"evals": [1], "checkpoint": 2, "steps": "x", "summary": "a"}', False),
    ("environment.json", b"\xff\xfe", True),
    ("environment.json", b'{"command": 3, "devices": 1, "versions": []}', False),
    ("goodput.json", b"", True),
    ("goodput.json", b'{"seconds": {"lost": 1.0}}', False),
    ("summary.json", b"{", True),
    ("default_config.json", b"nothing", True),
    ("config_changes.jsonl", b'{"key": 1}\n[2]\n{', False),
    ("bad_data.txt", b"\xff\xff\n", False),
    ("stages.json", b"}", False),
    ("images/generation/images_00000040.png", b"\x89PNG\r\n\x1a\n torn", True),
    ("images/generation/notes.txt", b"", False),
    ("images/odd_1.png", b"", False),
    (
      "metrics.jsonl",
      b'{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n{"step": 3, "lo',
      False,
    ),
    ("metrics.jsonl", b'[1]\n{"loss": 1}\n{"step": "x"}\n{"step": 1, "loss": [1]}\n', False),
    ("metrics.jsonl", b"", False),
  ],
)
def test_of_a_broken_run_there_is_a_report_and_it_says_what_is_broken(
  tmp_path, name, contents, told
):
  workdir = make(tmp_path / "run")
  folder.write_bytes(f"{workdir}/{name}", contents)
  found = report_of(workdir)
  assert len(found.data["runs"]) == 1
  assert ("Could not be read" in found.words) == told
  assert (os.path.basename(name) in found.words) == (told or name == "bad_data.txt")


def test_of_a_run_that_has_just_begun_there_is_a_report(tmp_path):
  os.makedirs(tmp_path / "run")
  found = report_of(str(tmp_path / "run"))
  assert found.data == {
    "runs": [
      {
        **dict(label="run", state="not started", step=0, steps=None, headline=[], latest={}),
        **dict(words={}, changed=None),
      }
    ],
    "charts": [],
  }
  assert "plotly" not in found.scripts


@pytest.mark.parametrize("seed", range(5))
def test_a_thinned_line_keeps_its_ends_its_extremes_and_its_gaps(seed):
  rng = np.random.default_rng(seed)
  n = int(rng.integers(3000, 9000))
  values = rng.standard_normal(n).cumsum()
  low, high, gap = rng.choice(np.arange(1, n - 1), 3, replace=False)
  values[low], values[high], values[gap] = -1e4, 1e4, np.nan
  whole = series.Series(np.arange(n) * 7, values)
  kept = series.thin(whole)
  assert len(kept.steps) <= 1.5 * series.POINTS + 2 < n * 1.1 + series.POINTS
  assert {0, 7 * (n - 1), 7 * low, 7 * high, 7 * gap} <= set(kept.steps.tolist())
  assert (np.diff(kept.steps) > 0).all()
  np.testing.assert_array_equal(kept.values, values[kept.steps // 7])
  means = series.means(whole)
  counts = [len(s) for s in np.array_split(np.arange(n - 1), len(means.steps))]
  assert np.average(means.values, weights=counts) == pytest.approx(np.nanmean(values))
  assert means.steps[-1] == 7 * (n - 1) and len(means.steps) <= series.POINTS


def test_a_short_line_and_a_few_items_stay_as_they_are():
  short = series.make({3: math.nan, 1: 2.0})
  assert series.thin(short).steps.tolist() == [1, 3] and math.isnan(series.thin(short).values[1])
  assert series.spread([1, 2, 3], 3) == [1, 2, 3]
  assert series.spread(list(range(100)), 4) == [0, 33, 66, 99]
  assert series.spread([1, 2], 1) == [1]


@pytest.mark.parametrize(
  ("name", "better"),
  [
    ("loss", min),
    ("losses/ema/noised/eps/t1-250", min),
    ("generation/fid_10k", min),
    ("generation/frechet_classifier", min),
    ("generation/frechet_classifier_floor", None),
    ("generation/is_10k", max),
    ("generation/is_std_10k", None),
    ("generation/kid_std_10k", None),
    ("fewshot/class_strict_10shot_mean", max),
    ("fewshot/class_strict_10shot_std", None),
    ("probe/top1/t0", max),
    ("probe/lr/t0", None),
    ("reconstruction/masked_mse", min),
    ("lr", None),
    ("grad_norm", None),
    ("images_per_second", max),
  ],
)
def test_which_values_are_better(name, better):
  assert series.direction(name) is better
  assert series.direction(name, f"max:{name}") is max
  assert series.direction(name, f"min:{name}") is min


def test_the_best_step_is_the_first_with_the_best_finite_value():
  found = series.make({1: 5.0, 2: math.nan, 3: 1.0, 4: 1.0, 5: -math.inf, 6: 2.0})
  assert series.best_step(found, min) == 3 and series.best_step(found, max) == 1
  assert series.best_step(found, None) is None
  assert series.best_step(series.make({1: 2.0, 2: 2.0}), min) is None


def test_deviations_belong_to_their_means():
  names = ["f/a_mean", "f/a_std", "g/is_10k", "g/is_std_10k", "g/kid_5k", "x_std"]
  found = {name: charts.deviation(name, names) for name in names}
  assert {k: v for k, v in found.items() if v} == {
    "f/a_mean": "f/a_std",
    "g/is_10k": "g/is_std_10k",
  }


def test_large_pictures_are_shrunk_and_few_of_many_are_taken(tmp_path, monkeypatch):
  large, small = png(400), png(20)
  assert len(large) > pictures.AS_IS > len(small)
  assert pictures.encode(small).address.endswith(base64.b64encode(small).decode())
  monkeypatch.setattr(pictures, "SIDE", 200)
  shrunk = pictures.encode(large)
  assert (shrunk.width, shrunk.height) == (200, 200)
  kind, _, data = shrunk.address.partition(",")
  assert kind == "data:image/webp;base64"
  assert Image.open(io.BytesIO(base64.b64decode(data))).size == (200, 200)
  for step in range(1, 41):
    folder.write_bytes(f"{tmp_path}/images/a/b_{step:08d}.png", small)
  paths, known, problems = pictures.find(str(tmp_path)), {}, []
  assert list(paths) == ["a/b"] and list(paths["a/b"]) == list(range(1, 41))
  chosen = list(pictures.load(paths, known, problems)["a/b"])
  assert len(chosen) == pictures.FRAMES[0] and chosen[0] == 1 and chosen[-1] == 40
  monkeypatch.setattr(pictures, "BYTES", 4 * len(small))
  assert 1 < len(pictures.load(paths, known, problems)["a/b"]) <= 3
  for path in paths["a/b"].values():  # What is known is not read again.
    os.remove(path)
  assert pictures.load(paths, known, problems)["a/b"] and not problems


def test_the_state_of_a_run_is_found_out(tmp_path):
  top = str(tmp_path / "top")
  workdir = make(f"{top}/pretrain", summary=False)
  read.add_stages(top, ["pretrain", "finetune"])
  state = lambda: read.read(workdir).state
  assert state() == read.INTERRUPTED
  with lock.hold(top, ["pretrain"]):
    assert state() == read.RUNNING
    assert read.read(f"{top}/finetune").state == read.NOT_STARTED
  folder.finish(workdir, {"step": 40})
  assert state() == read.FINISHED and read.read(workdir).label == "top/pretrain"


def test_the_report_of_a_folder_leads_to_those_of_its_stages(tmp_path):
  read.add_stages(str(tmp_path), ["pretrain", "finetune"])
  read.add_stages(str(tmp_path), ["eval", "pretrain"])
  make(tmp_path / "pretrain")
  make(tmp_path / "finetune", summary=False)
  report.write_overview(str(tmp_path))
  found = Page((tmp_path / "report.html").read_text())
  states = {run["label"].split("/")[1]: run["state"] for run in found.data["runs"]}
  expected = {"pretrain": "finished", "finetune": "interrupted", "eval": "not started"}
  assert states == expected and list(states) == list(expected)
  links = found.attributes("a", "href")
  assert links == ["pretrain/report.html", "finetune/report.html"]
  assert "1 of 3 stages finished" in found.words and "12.5" in found.words
  assert len(found.attributes("img", "src")) == 2


def test_what_differs_from_the_defaults_is_told(tmp_path):
  workdir = make(tmp_path / "run")
  assert report_of(workdir).data["runs"][0]["changed"] is None
  default = {**CONFIG, "steps": 9, "optim": {"lr": 0.1, "beta": 2}}
  folder.write_json(f"{workdir}/default_config.json", default)
  found = report_of(workdir)
  expected = {"steps": [9, 40], "optim.beta": [2, None], "optim.wd": [None, 0.0]}
  assert found.data["runs"][0]["changed"] == expected
  folder.write_json(f"{workdir}/default_config.json", CONFIG)
  assert "All values are the defaults" in report_of(workdir).words


def test_a_comparison_shows_what_differs_and_a_run_has_one_colour(tmp_path, capsys):
  other = {**CONFIG, "optim": {"lr": 0.3, "wd": 0.0}, "new": 1}
  records = [{"step": s, "loss": 1.0 / s, "only": s % 7} for s in range(1, 60)]
  paths = [make(tmp_path / "a"), make(tmp_path / "b", records, other)]
  tool.main([*paths, "--out", str(tmp_path / "out.html")])
  assert capsys.readouterr().out == f"{tmp_path}/out.html\n"
  found = Page((tmp_path / "out.html").read_text())
  runs = [read.read(path) for path in paths]
  differing = tool.comparison.config_differences(runs)
  assert differing == {"new": [None, 1], "optim.lr": [0.1, 0.3]}
  assert "optim.lr 0.1 0.3" in found.words and "optim.wd" not in found.words
  titles = {chart["title"]: chart["lines"] for chart in found.data["charts"]}
  assert [line["name"] for line in titles["loss"]] == ["a", "b"]
  assert [line["name"] for line in titles["only"]] == ["b"]
  colors = {(line["name"], line["color"]) for lines in titles.values() for line in lines}
  assert colors == {("a", 0), ("b", 1)}
  assert [run["latest"]["loss"] for run in found.data["runs"]] == [0.5, 0.0169492]
  assert len(found.attributes("img", "src")) == 4


def test_folders_of_stages_are_compared_stage_by_stage(tmp_path):
  for top, names in (("x", ["pretrain", "finetune"]), ("y", ["pretrain", "eval"])):
    read.add_stages(str(tmp_path / top), names)
    for name in names:
      make(tmp_path / top / name)
  found = tool.groups([str(tmp_path / "x"), str(tmp_path / "y")])
  assert {k: [r.label for r in v] for k, v in found.items()} == {
    "pretrain": ["x/pretrain", "y/pretrain"]
  }
  same = [make(tmp_path / "p" / name / "run") for name in "ab"]
  (runs,) = tool.groups(same).values()
  assert [run.label for run in runs] == ["a/run", "b/run"]


def test_one_run_gets_its_report_and_a_folder_all_of_them(tmp_path, capsys):
  read.add_stages(str(tmp_path), ["pretrain", "finetune"])
  make(tmp_path / "pretrain")
  tool.main([str(tmp_path)])
  assert capsys.readouterr().out == f"{tmp_path}/report.html\n"
  assert {p.parent.name for p in tmp_path.rglob("report.html")} == {tmp_path.name, "pretrain"}
  tool.main([f"{tmp_path}/pretrain", "--out", f"{tmp_path}/new/mine.html"])
  assert Page((tmp_path / "new/mine.html").read_text()).data["runs"][0]["step"] == 40


@pytest.mark.parametrize(
  ("arguments", "told"),
  [
    (["absent"], "'absent' holds no run: .* Give the workdir of a run"),
    (["run", "absent"], "'absent' holds no run"),
    (["empty"], "'empty' has no metrics yet"),
    (["run", "empty"], "'empty' has no metrics yet"),
    (["run", "top"], "'run' is a run, but others hold several, .*pretrain"),
    (["top", "--out", "x.html"], "the stages .*pretrain.*, each with a report of its own"),
    (["run", "--out", "."], "--out='.' is a folder"),
  ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, arguments, told):
  monkeypatch.chdir(tmp_path)
  make(tmp_path / "run")
  make(tmp_path / "empty", records=[])
  make(tmp_path / "top" / "pretrain")
  read.add_stages("top", ["pretrain"])
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(SystemExit, match=f"^error: .*{told}") as stop:
    tool.main(arguments)
  assert "\n" not in str(stop.value)
  assert sorted(tmp_path.rglob("*")) == before


def test_a_report_that_cannot_be_written_is_one_warning(tmp_path, monkeypatch):
  def fail(run):
    raise RuntimeError("no page")

  monkeypatch.setattr(page, "run_page", fail)
  reporter = report.Reporter(make(tmp_path / "run"))
  with pytest.warns(
    UserWarning, match=r"report\.html was not written: .*no page.* goes on"
  ) as told:
    for _ in range(3):
      reporter.finish(read.FINISHED)
  assert len(told) == 1


def test_updates_are_written_behind_the_back_and_the_last_one_waits(tmp_path, monkeypatch):
  """While one is being written, all that come are one more: the newest is never left out."""
  workdir, seen = make(tmp_path / "run", summary=False), []
  begun, go = threading.Semaphore(0), threading.Semaphore(0)

  def slow(path, *, state, **about):
    begun.release()
    assert go.acquire(timeout=30)
    seen.append((state, threading.current_thread() is threading.main_thread()))
    return read.read(path, state=state)

  monkeypatch.setattr(writer, "write_run", slow)
  reporter = report.Reporter(workdir, 40)
  reporter.update()
  assert begun.acquire(timeout=30)
  for _ in range(4):
    reporter.update()  # Returns though nothing can be written.
  assert not seen
  go.release()
  assert begun.acquire(timeout=30)
  go.release(2)
  reporter.finish(read.FINISHED)
  assert seen == [("running", False), ("running", False), ("finished", True)]
  reporter.update(patience=60.0)  # One has only just been written.
  assert reporter._thread is None


@pytest.mark.parametrize(
  ("error", "state", "note"),
  [
    (preemption.Preempted(75), "interrupted", None),
    (KeyboardInterrupt(), "interrupted", None),
    (FloatingPointError("Step 3: <loss> is not finite\nmore"), "failed", "Step 3: <loss> is not"),
  ],
)
def test_how_a_run_ended_is_told(tmp_path, error, state, note):
  workdir = make(tmp_path / "run", summary=False)
  with pytest.raises(type(error)), report.Reporter(workdir, 80):
    raise error
  found = Page(folder.read_bytes(f"{workdir}/report.html").decode())
  assert found.data["runs"][0]["state"] == state and found.data["runs"][0]["steps"] == 80
  assert note is None or note in found.words


def test_a_run_at_an_address_has_a_report(tmp_path, monkeypatch):
  """TensorFlow's file system in memory, in which files can be written once."""
  import tensorflow as tf

  monkeypatch.chdir(tmp_path)
  top = f"ram://bucket/{tmp_path.name}"
  read.add_stages(top, ["pretrain"])
  for name, contents in (
    ("config.json", json.dumps(CONFIG).encode()),
    ("metrics.jsonl", "".join(json.dumps(r) + "\n" for r in RECORDS).encode()),
    ("images/generation/images_00000040.png", png()),
    ("checkpoints/20/state", b"x"),
  ):
    tf.io.gfile.makedirs(os.path.dirname(f"{top}/pretrain/{name}"))
    folder.write_bytes(f"{top}/pretrain/{name}", contents)
  report.Reporter(f"{top}/pretrain").finish(read.FINISHED)
  found = Page(folder.read_bytes(f"{top}/pretrain/report.html").decode())
  assert found.lines()["loss/noised/eps"]["y"][-1] == 0.75 and "Could not" not in found.words
  assert found.data["charts"][0]["checkpoints"] == [20]
  assert len(found.attributes("img", "src")) == 1
  assert Page(folder.read_bytes(f"{top}/report.html").decode()).data["runs"][0]["step"] == 40
  assert not os.listdir(tmp_path)


def test_the_defaults_are_kept_for_each_stage_and_of_one_config(tmp_path):
  from trainers import stages

  ready = lambda name, path: types.SimpleNamespace(name=name, folder=str(path), summary=None)
  top, one = tmp_path / "top", tmp_path / "one"
  default = ConfigDict({"stages": ("a", "b"), "a": {"x": 1}})
  stages._note([ready("a", top / "a"), ready("b", top / "b")], str(top), default)
  assert read.stages(str(top)) == ["a", "b"]
  assert folder.read_json(str(top / "a" / report.DEFAULTS)) == {"x": 1}
  assert not (top / "b").exists()
  stages._note([ready("one", one)], str(one), ConfigDict({"x": 2}))
  assert folder.read_json(str(one / report.DEFAULTS)) == {"x": 2}
  assert read.stages(str(one)) == []
