"""Starting from other weights: what is taken, what is fresh, and position embeddings resized."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import quickstart
from trainers import diffusion, stages
from umd.codecs.codec import Pixels
from umd.devices.mesh import make_mesh, replicated
from umd.models.network import param_shapes
from umd.runs import workdir as folder
from umd.runs.checkpoint import Checkpoints
from umd.state import TrainState, init_state
from umd.trained import saved, transfer
from umd.trained.transfer import adopt, check, leaves, resample


def filled(value, **shapes):
  return {k: {"kernel": np.full(s, value, np.float32)} for k, s in shapes.items()}


def fresh_state(params, fsdp=1):
  init = lambda key: jax.tree.map(jnp.asarray, params)
  return init_state(init, optax.adam(0.1), jax.random.key(0), make_mesh(fsdp=fsdp))


@pytest.mark.parametrize("fsdp", [1, 4])
def test_adopt_takes_all_but_the_fresh_subtrees(fsdp):
  state = fresh_state(filled(1.0, body=(64, 96), head=(3,)), fsdp)
  drawn = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32)
  loaded = {"body": {"kernel": drawn}, "old": {"kernel": np.zeros(5)}}
  adopted = adopt(state, loaded, ("head", "old"))
  for params in (adopted.params, adopted.ema_params):
    assert set(params) == {"body", "head"}
    np.testing.assert_array_equal(params["body"]["kernel"], drawn)
    np.testing.assert_array_equal(params["head"]["kernel"], np.ones(3))
  assert adopted.step == 0
  assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), adopted.opt_state, state.opt_state))
  for new, old in zip(jax.tree.leaves(adopted), jax.tree.leaves(state), strict=True):
    assert new.sharding == old.sharding and new.dtype == old.dtype
  assert adopted.params["body"]["kernel"].is_fully_replicated == (fsdp == 1)


def test_adopted_parameters_average_and_source_share_no_memory():
  """The step is given both to overwrite, and a buffer can be given only once."""
  start = filled(1.0, body=(64, 96), head=(3,))
  state = adopt(fresh_state(start), start, ("head",))
  pointers = [
    {
      shard.data.unsafe_buffer_pointer()
      for leaf in jax.tree.leaves(tree)
      for shard in leaf.addressable_shards
    }
    for tree in (state.params, state.ema_params)
  ]
  assert not pointers[0] & pointers[1]
  assert start["body"]["kernel"].ctypes.data not in pointers[0] | pointers[1]
  add = jax.jit(
    lambda s: s.replace(params=jax.tree.map(lambda x: x + 4, s.params)), donate_argnums=0
  )
  state = add(add(state))
  for shard in state.params["body"]["kernel"].addressable_shards:
    np.testing.assert_array_equal(shard.data, np.full((64, 96), 9))
  np.testing.assert_array_equal(state.ema_params["body"]["kernel"], np.ones((64, 96)))
  np.testing.assert_array_equal(start["body"]["kernel"], np.ones((64, 96)))


@pytest.mark.parametrize(
  "loaded, told",
  [
    (filled(0.0, body=(2, 4), head=(3,)), ["body/kernel", "(2, 3)", "(2, 4)"]),
    (filled(0.0, body=(2, 3)), ["head/kernel", "(3,)", "absent"]),
    (filled(0.0, body=(2, 3), head=(3,), more=(9,)), ["more/kernel", "(9,)", "absent"]),
  ],
)
def test_adopt_lists_the_leaves_that_do_not_fit(loaded, told):
  state = fresh_state(filled(1.0, body=(2, 3), head=(3,)))
  with pytest.raises(ValueError) as error:
    adopt(state, loaded)
  for word in told:
    assert word in str(error.value)
  others = {"body/kernel", "head/kernel", "more/kernel"} - set(told)
  assert not any(other in str(error.value) for other in others)


def test_position_embeddings_may_differ_in_number_but_not_in_width():
  own = {"pos_embed": np.zeros((16, 32)), "body/kernel": np.zeros((2, 2))}
  check(own, own | {"pos_embed": np.zeros((64, 32))}, ())
  with pytest.raises(ValueError, match=r"pos_embed: here \('N', 32\), there \('N', 48\)"):
    check(own, own | {"pos_embed": np.zeros((16, 48))}, ())
  with pytest.raises(ValueError, match=r"pos_embed: here \('N', 32\), there absent"):
    check(own, {"body/kernel": np.zeros((2, 2))}, ())


def test_a_fresh_part_that_is_in_neither_model_is_an_error():
  own = leaves(filled(0.0, body=(2,)))
  with pytest.raises(ValueError, match=r"init_fresh=\['label_embd'\].*known: \['body'\]"):
    check(own, own, ("label_embd", "body"))


# (rows, columns) before, after: up, down, one of each, by factors that are no integers.
GRIDS = [((8, 6), (16, 12)), ((8, 6), (4, 3)), ((8, 6), (12, 3)), ((8, 6), (5, 11))]


@pytest.mark.parametrize("old, new", GRIDS)
def test_resampling_is_tensorflows_bicubic_with_antialiasing(old, new):
  import tensorflow as tf

  drawn = np.random.default_rng(1).standard_normal((*old, 7)).astype(np.float32)
  assert resample(drawn, old, old) is drawn
  found = resample(drawn.reshape(-1, 7), old, new)
  assert found.dtype == np.float32
  # Its kernel is Keys's with a = -1/2, as ours, and it leaves out what is beyond the edge.
  expected = tf.image.resize(drawn, new, method="bicubic", antialias=True).numpy()
  np.testing.assert_allclose(found.reshape(*new, 7), expected, atol=1e-4)


def placed(params, average) -> TrainState:
  """A state without an optimiser on all devices."""
  return jax.device_put(TrainState(jnp.int32(0), params, average, ()), replicated(make_mesh()))


@pytest.fixture(scope="module")
def earlier(tmp_path_factory, nano):
  """(workdir, parameters) of a run on 8 x 8 images, 16 patches; its average is -2 times them."""
  path, (model, params) = tmp_path_factory.mktemp("earlier"), nano("nano/2", (8, 8, 1))
  folder.start(str(path), quickstart.get_config("variant=nano/2").pretrain.to_dict())
  folder.write_json(str(path / "model.json"), saved.describe_model(model, Pixels()))
  checkpoints = Checkpoints(str(path))
  checkpoints.save(placed(params, jax.tree.map(lambda x: -2.0 * x, params)), 3, {"position": 0})
  checkpoints.close()
  return path, jax.device_get(params)


@pytest.fixture
def start(earlier, nano):
  """`start(image_size, model settings, config settings)`: a model started from that run."""

  def make(image_size=(8, 8, 1), settings=None, **overrides):
    model, params = nano("nano/2", image_size, **(settings or {}))
    config = quickstart.get_config("variant=nano/2").finetune
    config.update_from_flattened_dict({"init_fresh": (), **overrides})
    fresh = jax.tree.map(lambda x: 0.5 * x, params)
    return diffusion.start_from(placed(fresh, fresh), str(earlier[0]), config, model)

  return make


@pytest.mark.parametrize("weights, factor", [("ema", -2.0), ("raw", 1.0)])
def test_average_or_raw_weights_are_taken_as_asked(earlier, start, weights, factor):
  state, step = start(init_weights=weights)
  assert step == 3
  for params in (state.params, state.ema_params):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, factor * b), params, earlier[1])


def test_weights_that_are_neither_are_an_error(start):
  with pytest.raises(ValueError, match=r"init_weights='best' is not one of \['ema', 'raw'\]"):
    start(init_weights="best")


# The last has as many patches as the run's, in another shape.
@pytest.mark.parametrize("height, width", [(12, 12), (4, 4), (4, 16)])
def test_another_image_size_resamples_positions_and_takes_the_rest(earlier, start, height, width):
  state, _ = start((height, width, 1), init_weights="raw")
  grid = height // 2, width // 2
  found, given = leaves(jax.device_get(state.params)), leaves(earlier[1])
  for name in found:
    expected = given[name]
    if name in transfer.POSITIONS:
      assert found[name].shape == (grid[0] * grid[1], 32)
      expected = resample(expected, (4, 4), grid)
      assert expected.shape != given[name].shape or np.abs(expected - given[name]).max() > 0.01
    np.testing.assert_array_equal(found[name], expected, err_msg=name)
  jax.tree.map(np.testing.assert_array_equal, state.ema_params, state.params)


def test_labels_start_afresh_and_another_architecture_is_refused(earlier, start, nano):
  path, source = earlier
  labelled = dict(num_classes=10)
  state, _ = start(settings=labelled, init_weights="raw", init_fresh=("label_embed",))
  _, drawn = nano("nano/2", (8, 8, 1), **labelled)
  halved = jax.tree.map(lambda x: 0.5 * x, drawn["label_embed"])
  jax.tree.map(np.testing.assert_array_equal, state.params["label_embed"], halved)
  np.testing.assert_array_equal(state.params["pos_embed"], source["pos_embed"])
  with pytest.raises(ValueError, match=r"label_embed/.*there absent"):
    start(settings=labelled)
  model, _ = nano("nano/2", (8, 8, 1), condition="token")
  shapes = param_shapes(model)
  with pytest.raises(ValueError, match=r"(?s)init_from: .*head_adaln/kernel: here absent"):
    saved.check_fits(str(path), shapes, ())


TINY = "variant=nano/2,steps=1,finetune_steps=1,batch_size=32,adaln=true"


def tiny_config(**overrides):
  """Two stages without evaluations; the second starts from the first."""
  config = quickstart.get_config(TINY)
  with config.unlocked():
    for stage in config.stages:
      config[stage].evals = {}
    config.update_from_flattened_dict(overrides)
  return config


@pytest.mark.parametrize("reference", ["absent", "stage:pretrain"])
def test_a_missing_checkpoint_is_an_error_before_anything_is_written(tmp_path, reference):
  workdir = tmp_path / "work"
  given = reference if reference.startswith("stage:") else str(tmp_path / reference)
  config = tiny_config(**{"finetune.init_from": given, "stages": ("finetune",)})
  with pytest.raises(FileNotFoundError, match="no checkpoint"):
    stages.run(config, str(workdir))
  assert not workdir.exists()


def test_a_run_is_found_by_its_folder_its_stage_or_what_it_is_in(earlier, tmp_path):
  run = tmp_path / "other" / "pretrain"
  run.parent.mkdir()
  run.symlink_to(earlier[0])
  assert saved.locate("", "W") == ""
  assert saved.locate("stage:pretrain", "gs://b/W") == "gs://b/W/pretrain"
  assert saved.locate(str(earlier[0]), "W") == str(earlier[0])
  assert saved.locate(str(run.parent), "W") == str(run)
