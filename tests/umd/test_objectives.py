"""Objectives: the value against loops in numpy, what is scored, and who holds which rows."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scipy import stats
from stand_ins import at_once

from umd import objectives
from umd.masks import Mask, patchify
from umd.models.autoencoder import AutoEncoder
from umd.models.network import predict
from umd.objectives import Stream, Term
from umd.paths import make_path

BATCH, CLASSES, PATCH = 16, 10, 4
HALF = {"eps": Term("eps", "visible", 0.5), "x0": Term("x0", "masked", 0.5)}
MAE = {"x0": Term("x0", "masked")}


def halves(share, labels=False):
  """UMD: clean rows and noised rows."""
  return [
    Stream("clean", MAE, (0.0, share), "clean", 0.75, labels),
    Stream("noised", HALF, (share, 1.0), "uniform", 0.375),
  ]


METHODS = {
  "mae": [Stream("clean", MAE, timesteps="clean", mask_ratio=0.75, labels=False)],
  "umd": halves(0.5),
  "dit": [Stream("noised", {head: Term(head, "all", 0.5) for head in ("eps", "x0")})],
  "maskdit": [Stream("noised", HALF, mask_ratio=0.5)],
}


def batch(size=BATCH):
  rng = np.random.default_rng(0)
  image = rng.uniform(-1, 1, (size, 16, 16, 3)).astype(np.float32)
  label = rng.integers(0, CLASSES, size).astype(np.int32)
  return {"image": jnp.asarray(image), "label": jnp.asarray(label)}


def patches(image):
  """One image [H, W, C] as patches [N, P * P * C], by loops."""
  starts = range(0, 16, PATCH)
  return np.stack([image[r : r + PATCH, c : c + PATCH].ravel() for r in starts for c in starts])


def oracle(model, params, path, method, data, key, drop):
  """The loss by loops over rows, examples and tokens; only random draws and the network are shared.

  Rows alternate clean, noised in UMD, whose split is half and half.
  """
  forward, total = jax.jit(functools.partial(predict, model)), 0.0
  images, classes = map(np.asarray, (data["image"], data["label"]))
  for i, stream in enumerate(method):
    rows = [r for r in range(BATCH) if len(method) == 1 or r % 2 == i]
    keys = jax.random.split(jax.random.fold_in(key, i), 4)
    u = np.asarray(jax.random.uniform(keys[0], (len(rows),)))
    t = np.array([0 if stream.timesteps == "clean" else 1 + int(v * path.timesteps) for v in u])
    eps = np.asarray(jax.random.normal(keys[1], (len(rows), 16, 16, 3)))
    order = np.argsort(jax.random.uniform(keys[2], (len(rows), 16)), axis=1)
    dropped = np.asarray(jax.random.bernoulli(keys[3], drop, (len(rows),)))
    keep = int(16 * (1 - stream.mask_ratio))
    x0 = images[rows]
    alpha, sigma = np.stack(path.coefs("x_t", t)).reshape(2, -1, 1, 1, 1)
    labels = np.where(dropped, CLASSES, classes[rows])
    if not stream.labels:
      labels[:] = CLASSES
    restore = np.argsort(order, axis=1)
    mask = Mask(*map(jnp.asarray, (order[:, :keep], restore, np.float32(restore >= keep))))
    x_t = np.float32(alpha * x0 + sigma * eps)
    preds = forward(params, x_t, t, labels, mask if keep < 16 else None)
    for term in stream.terms.values():
      target, per_example = {"x0": x0, "eps": eps}[term.head], []
      for b in range(len(rows)):
        tokens = {"all": order[b], "visible": order[b, :keep], "masked": order[b, keep:]}
        error = (patches(np.asarray(preds[term.head][b])) - patches(target[b])) ** 2
        per_example.append(np.mean([error[n] for n in tokens[term.where]]))
      total += len(rows) / BATCH * term.weight * np.mean(per_example)
  return total


@pytest.mark.parametrize("name", METHODS)
def test_loss_is_the_one_computed_by_loops(nano, name):
  (model, params), path = nano(num_classes=CLASSES), make_path("cosine", 100)
  loss = objectives.Objective(model, path, METHODS[name], BATCH, label_drop_prob=0.5)
  key, data = jax.random.key(3), batch()
  got, metrics = jax.jit(at_once(loss))(params, data, key)
  want = oracle(model, params, path, METHODS[name], data, key, 0.5)
  np.testing.assert_allclose(got, want, rtol=1e-4)
  assert set(metrics) == {f"{s.name}/{term}" for s in METHODS[name] for term in s.terms}


def spy(**attributes):
  """(model, calls): predicts params[head] whatever it is shown, and keeps what it was shown."""
  calls = []

  class Spy(AutoEncoder):
    @nn.nowrap
    def apply(self, variables, inputs, groups, method):
      calls.extend(x._asdict() for x in inputs)
      params = variables["params"]
      return [{h: params[h][: len(x.images)] for h in self.heads} for x in inputs]

  return Spy("nano/4", (16, 16, 3), **attributes), calls


def run(loss, calls, *arguments):
  """The objective of these arguments, compiled; `calls` then has what the spy was shown."""

  def traced(*arguments):
    calls.clear()
    return at_once(loss)(*arguments), [dict(call) for call in calls]

  result, calls[:] = jax.jit(traced)(*arguments)
  return result


def predictions(size):
  """Parameters of a spy: its predictions for up to `size` images."""
  draws = np.random.default_rng(1).standard_normal((2, size, 16, 16, 3)).astype(np.float32)
  return dict(zip(("x0", "eps"), jnp.asarray(draws), strict=True))


@pytest.mark.parametrize("where", objectives.WHERE)
@pytest.mark.parametrize("head", ["x0", "eps"])
def test_gradient_reaches_scored_tokens_of_the_head_and_no_others(where, head):
  model, calls = spy()
  stream = Stream("noised", {"it": Term(head, where)}, mask_ratio=0.375)
  loss = objectives.Objective(model, make_path("flow", 10), [stream], 4)
  arguments = predictions(4), batch(4), jax.random.key(0)
  gradient = jax.jit(jax.grad(lambda *a: at_once(loss)(*a)[0]))(*arguments)
  run(loss, calls, *arguments)
  masked = np.asarray(calls[-1]["mask"].masked) == 1
  scored = {"all": masked | True, "visible": ~masked, "masked": masked}[where]
  reached = {h: (np.abs(patchify(g, PATCH)) > 0).all(axis=-1) for h, g in gradient.items()}
  np.testing.assert_array_equal(reached.pop(head), scored)
  assert not any((np.abs(gradient[h]) > 0).any() for h in reached)


@pytest.mark.parametrize("share, realised", [(0.3, 5 / 16), (0.05, 1 / 16)])
def test_streams_count_by_their_realised_share_of_rows(share, realised):
  model, calls = spy()
  loss = objectives.Objective(model, make_path("cosine", 10), halves(share), BATCH)
  total, m = run(loss, calls, predictions(BATCH), batch(), jax.random.key(0))
  assert [len(c["images"]) for c in calls] == [BATCH * realised, BATCH * (1 - realised)]
  clean, noised = m["clean/x0"], (m["noised/eps"] + m["noised/x0"]) / 2
  np.testing.assert_allclose(total, realised * clean + (1 - realised) * noised, rtol=1e-6)


def test_timesteps_cover_1_to_T_evenly_and_clean_is_0():
  model, calls = spy()
  streams = [Stream("noised", {"x0": Term("x0")}), Stream("clean", MAE, (0.0, 1.0), "clean", 0.75)]
  loss = objectives.Objective(model, make_path("flow", 7), streams, 2048)
  run(loss, calls, predictions(2048), batch(2048), jax.random.key(0))
  counts = np.bincount(calls[0]["t"], minlength=8)
  assert counts[0] == 0 and len(counts) == 8
  assert stats.chisquare(counts[1:]).pvalue > 1e-3
  assert not np.asarray(calls[1]["t"]).any()
  np.testing.assert_array_equal(calls[1]["images"], batch(2048)["image"])


@pytest.mark.parametrize("timesteps", [1, 7, 1000])
def test_uniform_timesteps_end_at_1_and_T(timesteps):
  ends = jnp.array([0.0, np.nextafter(np.float32(1), np.float32(0))])
  got = objectives.uniform(ends, make_path("flow", timesteps))
  np.testing.assert_array_equal(got, [1, timesteps])
  assert got.dtype == jnp.int32


@pytest.mark.parametrize("drop", [0.0, 0.1, 1.0])
def test_labels_drop_at_the_given_rate_and_stay_with_their_images(drop):
  model, calls = spy(num_classes=CLASSES)
  loss = objectives.Objective(model, make_path("flow", 7), halves(0.5, labels=True), 2048, drop)
  data = batch(2048)
  run(loss, calls, predictions(2048), data, jax.random.key(0))
  for i, call in enumerate(calls):
    shown, labels = np.asarray(call["labels"]), np.asarray(data["label"])[i::2]
    null = shown == CLASSES
    np.testing.assert_array_equal(shown[~null], labels[~null])
    assert stats.binomtest(int(null.sum()), 1024, drop).pvalue > 1e-3


@pytest.mark.parametrize("classes, labels", [(0, True), (CLASSES, False)])
def test_no_labels_are_shown_without_classes_or_where_a_stream_wants_none(classes, labels):
  model, calls = spy(num_classes=classes)
  stream = Stream("clean", MAE, timesteps="clean", mask_ratio=0.75, labels=labels)
  loss = objectives.Objective(model, make_path("flow", 7), [stream], 4)
  run(loss, calls, predictions(4), batch(4), jax.random.key(0))
  assert calls[0]["labels"] is None


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5])
def test_rows_are_dealt_in_the_share_asked_for_without_loss_or_overlap(share):
  for size in (16, 100, 1024):
    period = objectives.period(streams := halves(share), size)
    clean, noised = (
      objectives.take_rows(jnp.arange(size), objectives.stream_rows(s, period), period)
      for s in streams
    )
    np.testing.assert_array_equal(np.sort([*clean, *noised]), np.arange(size))
    assert len(clean) / size == pytest.approx(share, abs=1 / 64)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5])
def test_the_pattern_of_rows_divides_the_batch_and_holds_the_shares(share):
  streams = halves(share)
  for size in range(16, 1025, 8):
    period = objectives.period(streams, size)
    start, stop = objectives.stream_rows(streams[0], period)
    assert size % period == 0 and start == 0
    assert objectives.stream_rows(streams[1], period) == (stop, period)
    assert stop / period == pytest.approx(share, abs=1 / 64), size


@pytest.mark.parametrize("share, period", [(0.5, 2), (0.25, 4), (0.3, 16), (0.05, 16), (1.0, 1)])
def test_the_pattern_of_rows_is_short(share, period):
  assert objectives.period([Stream("clean", MAE, (0.0, share))], 1024) == period


def spread(data, devices):
  mesh = Mesh(jax.devices()[:devices], ("data",))
  return jax.device_put(data, NamedSharding(mesh, PartitionSpec("data")))


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5])
def test_rows_stay_on_their_device_and_are_the_same_on_one(share):
  clean = halves(share)[0]
  size = objectives.period([clean], 64)
  take = jax.jit(lambda x: objectives.take_rows(x, objectives.stream_rows(clean, size), size))
  alone, shared = (take(spread(np.arange(64), devices)) for devices in (1, 4))
  np.testing.assert_array_equal(alone, shared)
  for shard in shared.addressable_shards:
    assert set(np.asarray(shard.data) // 16) == {shard.device.id}


def test_sharded_loss_moves_no_images_and_is_the_same(nano):
  (model, params), path = nano(num_classes=CLASSES, scan=True), make_path("cosine", 100)
  loss = objectives.Objective(model, path, METHODS["umd"], BATCH, label_drop_prob=0.1)
  key, step = jax.random.key(0), jax.jit(jax.value_and_grad(at_once(loss), has_aux=True))
  program = step.lower(params, spread(batch(), 4), key).compile()
  text = program.as_text()
  moves = r"\b(collective-permute|all-to-all|all-gather|collective-broadcast)"
  assert "all-reduce" in text and not re.findall(moves, text)
  alone, metrics = jax.jit(at_once(loss))(params, spread(batch(), 1), key)
  (shared, shared_metrics), _ = program(params, spread(batch(), 4), key)
  np.testing.assert_allclose(shared, alone, rtol=1e-5)
  for name, value in metrics.items():
    np.testing.assert_allclose(shared_metrics[name], value, rtol=1e-5, err_msg=name)


def one(head="x0", where="all", **stream):
  return [Stream("s", {"it": Term(head, where)}, **stream)]


@pytest.mark.parametrize(
  "streams, message",
  [
    ([], r"streams is empty.*at least one"),
    ([Stream("s", {})], r"streams\.s has no terms.*at least one"),
    (one("v"), r"streams\.s\.terms\.it: head='v'.*'x0', 'eps'.*Add it"),
    (one(where="hidden"), r"streams\.s\.terms\.it: where='hidden'.*all.*visible.*masked"),
    (one(timesteps="now"), r"streams\.s: timesteps='now'.*clean.*uniform"),
    (one(where="masked"), r"streams\.s\.terms\.it.*mask_ratio=0\.0 .*Set where='all'"),
    (one(mask_ratio=1.0), r"mask_ratio=1\.0 must be in"),
    (one(mask_ratio=0.99), r"mask_ratio=0\.99 keeps none of 16 tokens.*at most"),
    (one("eps", timesteps="clean"), r"streams\.s\.terms\.it: head='eps'.*'clean'.*Score 'x0'"),
    (one(rows=(0.0, 0.05)), r"streams\.s: rows=\(0\.0, 0\.05\).*no row.*batch of 8.*Enlarge"),
    (one(rows=(0.5, 0.5)), r"streams\.s: rows=\(0\.5, 0\.5\).*from < to"),
    (one(rows=(0.5, 1.5)), r"streams\.s: rows=\(0\.5, 1\.5\).*<= 1"),
    (one(rows=(-0.5, 0.5)), r"streams\.s: rows=\(-0\.5, 0\.5\).*0 <= from"),
  ],
)
def test_a_method_that_cannot_be_is_refused_at_once(streams, message):
  model = AutoEncoder("nano/4", (16, 16, 3))
  with pytest.raises(ValueError, match=message):
    objectives.Objective(model, make_path("cosine", 10), streams, 8)


def test_a_head_that_the_path_does_not_know_is_refused_at_once():
  model = AutoEncoder("nano/4", (16, 16, 3), heads=("x0", "F"))
  for timesteps in ("uniform", "clean"):
    with pytest.raises(ValueError, match="'F'"):
      objectives.Objective(model, make_path("cosine", 10), one("F", timesteps=timesteps), 8)


def test_complementary_streams_are_shown_every_patch_once():
  model, calls = spy()
  streams = objectives.make_streams(
    {
      "first": dict(
        rows=(0, 1), mask_ratio=0.25, mask_kind="blocks", mask_side=2, terms={"x0": dict(head="x0")}
      ),
      "second": dict(rows=(0, 1), complement_of="first", terms={"x0": dict(head="x0")}),
    }
  )
  loss = objectives.Objective(model, make_path("flow", 10), streams, 8)
  run(loss, calls, predictions(8), batch(8), jax.random.key(0))
  first, second = (np.asarray(call["mask"].masked) for call in calls)
  np.testing.assert_array_equal(first + second, np.ones((8, 16)))
  blocks = first.reshape(8, 2, 2, 2, 2)
  assert np.ptp(blocks, axis=(2, 4)).max() == 0 and first.sum(axis=1).tolist() == [4] * 8
  assert len({row.tobytes() for row in first}) > 1


@pytest.mark.parametrize(
  "second, message",
  [
    (dict(complement_of="third"), r"streams\.second: complement_of='third'.*\['first'\]"),
    (dict(complement_of="second"), r"streams\.second: complement_of='second'"),
    (dict(complement_of="first", rows=(0, 0.5)), r"streams\.second: rows=.*same rows"),
  ],
)
def test_a_complement_of_nothing_is_refused(second, message):
  terms = {"x0": dict(head="x0")}
  streams = {"first": dict(rows=(0, 1), mask_ratio=0.5, terms=terms)}
  streams["second"] = dict(rows=(0, 1), terms=terms) | second
  with pytest.raises(ValueError, match=message):
    objectives.make_streams(streams)


def test_the_complement_of_no_mask_is_refused():
  terms = {"x0": dict(head="x0")}
  streams = {"first": dict(rows=(0, 1), terms=terms)}
  streams["second"] = dict(rows=(0, 1), terms=terms, complement_of="first")
  with pytest.raises(ValueError, match=r"streams\.second: 'first' drops no token"):
    objectives.Objective(spy()[0], make_path("flow", 10), objectives.make_streams(streams), 8)


@pytest.mark.parametrize("weight_of_t", objectives.WEIGHTS)
def test_times_count_by_their_weight(weight_of_t):
  model, calls = spy()
  stream = Stream("noised", {"x0": Term("x0", weight_of_t=weight_of_t)})
  path = make_path("cosine", 10)
  loss = objectives.Objective(model, path, [stream], 64)
  guess, data = predictions(64), batch(64)
  total, _ = run(loss, calls, guess, data, jax.random.key(0))
  errors = np.square(guess["x0"] - data["image"]).mean((1, 2, 3))
  weight = objectives.WEIGHTS[weight_of_t](path, "x0", calls[0]["t"])
  np.testing.assert_allclose(total, np.mean(weight * errors), rtol=1e-5)


@pytest.mark.parametrize("condition", ["adaln", "adaln_shared"])
def test_a_time_per_token_that_is_constant_is_a_time_per_image(nano, condition):
  """In what the network is shown, in its outputs, in the loss and in the gradients."""
  model, params = nano(condition=condition, num_classes=3)
  path, stream = make_path("cosine", 100), Stream("noised", HALF, mask_ratio=0.5)
  rng = np.random.default_rng(0)
  x0, eps = jnp.asarray(rng.standard_normal((2, 4, 16, 16, 3)), jnp.float32)
  noise, t = jnp.asarray(rng.random((4, 16)), jnp.float32), jnp.array([1, 20, 50, 100])

  @jax.jit
  def loss(params, t):
    draw = objectives.Draw(x0, jnp.array([0, 1, 2, 3]), t, eps, noise)
    values = objectives.score(model, path, [stream], params, [draw])[0]
    return sum(value.sum() for value in values.values())

  of_images = jax.value_and_grad(loss)(params, t)
  of_tokens = jax.value_and_grad(loss)(params, jnp.tile(t[:, None], (1, 16)))
  np.testing.assert_allclose(of_tokens[0], of_images[0], rtol=1e-6)
  scale = max(np.abs(g).max() for g in jax.tree.leaves(of_images[1]))
  for a, b in zip(*map(jax.tree.leaves, (of_tokens[1], of_images[1])), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6 * scale)


def test_edms_objective_is_its_weighted_denoising_loss(nano):
  """sigma ~ exp(N(-1.2, 1.2^2)); the network sees c_in x and c_noise."""
  model, calls = spy(heads=("x0",))
  path, term = make_path("edm"), Term("x0", weight_of_t="edm")
  stream = Stream("noised", {"x0": term}, timesteps="log_normal")
  guess = {"x0": predictions(64)["x0"]}
  data = batch(64)
  loss = objectives.Objective(model, path, [stream], 64)
  (draw,) = loss.draw(data, jax.random.key(0))
  total, _ = loss(guess, [draw])
  sigma = np.asarray(draw.t)
  assert np.log(sigma).mean() == pytest.approx(-1.2, abs=0.5)
  noisy = data["image"] + sigma[:, None, None, None] * draw.eps
  scale = 1 / np.sqrt(sigma**2 + 0.25)
  np.testing.assert_allclose(
    calls[-1]["images"], scale[:, None, None, None] * noisy, rtol=1e-4, atol=1e-5
  )
  np.testing.assert_allclose(calls[-1]["t"], np.log(sigma) / 4, rtol=1e-4)
  weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
  want = np.mean(weight * np.square(guess["x0"] - data["image"]).mean((1, 2, 3)))
  np.testing.assert_allclose(total, want, rtol=1e-4)
