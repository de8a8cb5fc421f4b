"""Noise paths: closed forms, the algebra of x0, eps and v, and where it breaks down."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from umd.paths import PATHS, make_path

T = (1, 10, 1000)
HEADS = ("x0", "eps", "v")

every_path = pytest.mark.parametrize("name", PATHS)
every_length = pytest.mark.parametrize("timesteps", T)
variance_preserving = pytest.mark.parametrize("name", ["cosine", "linear"])


@every_path
@every_length
def test_t0_is_exactly_clean(name, timesteps):
  path = make_path(name, timesteps)
  x0, eps = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 1))
  assert path.timesteps == timesteps
  np.testing.assert_array_equal(path.combine("x_t", x0, eps, jnp.zeros(3, jnp.int32)), x0)


@every_path
@every_length
def test_signal_falls_and_noise_rises(name, timesteps):
  path = make_path(name, timesteps)
  alpha, sigma = path.table["x_t"].T
  assert (np.diff(alpha) < 0).all() and (alpha >= 0).all()
  assert (np.diff(sigma) > 0).all() and (sigma <= 1).all()
  assert (np.diff(path.time) > 0).all()


@variance_preserving
@every_length
def test_variance_is_preserved(name, timesteps):
  table = make_path(name, timesteps).table["x_t"]
  np.testing.assert_allclose((table**2).sum(axis=1), 1, rtol=1e-12)


@pytest.mark.parametrize("timesteps", [10, 1000])
def test_cosine_is_the_closed_form_of_nichol_and_dhariwal(timesteps):
  f = np.cos((np.arange(timesteps) / timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
  alpha = make_path("cosine", timesteps).table["x_t"][:, 0]
  np.testing.assert_allclose(alpha[:-1] ** 2, f / f[0], rtol=1e-9)
  # The cap on beta changes t = T only.
  assert (alpha[-1] / alpha[-2]) ** 2 == pytest.approx(1 - 0.999)


@pytest.mark.parametrize("timesteps", [100, 1000])
def test_linear_alpha_bar_is_the_product_of_one_minus_beta(timesteps):
  alpha_bar, product = make_path("linear", timesteps).table["x_t"][:, 0] ** 2, 1.0
  for i in range(timesteps):
    beta = 1e-4 + (2e-2 - 1e-4) * i / (timesteps - 1)
    product *= 1 - beta * 1000 / timesteps
    assert alpha_bar[i + 1] == pytest.approx(product, rel=1e-9)


@every_length
def test_flow_is_the_straight_line(timesteps):
  s = np.arange(timesteps + 1) / timesteps
  np.testing.assert_allclose(make_path("flow", timesteps).table["x_t"], np.stack([1 - s, s], 1))


@every_path
def test_long_paths_end_in_almost_pure_noise(name):
  alpha, sigma = make_path(name, 1000).table["x_t"][-1]
  assert alpha < 0.01 and sigma > 0.99


@every_path
@pytest.mark.parametrize("kind", ["x_t", *HEADS])
def test_combine_is_the_table_row_of_each_example(name, kind):
  path = make_path(name, 10)
  x0, eps = jax.random.normal(jax.random.key(1), (2, 3, 4, 4, 1))
  t = np.array([7, 0, 10])
  got = path.combine(kind, x0, eps, jnp.asarray(t))
  for i in range(3):
    a, b = path.table[kind][t[i]]
    np.testing.assert_allclose(got[i], a * x0[i] + b * eps[i], rtol=1e-5, atol=1e-6)


@every_path
@every_length
@pytest.mark.parametrize("head", HEADS)
def test_invert_undoes_combine_wherever_not_singular(name, timesteps, head):
  path = make_path(name, timesteps)
  t = jnp.arange(timesteps + 1)
  x0, eps = jax.random.normal(jax.random.key(2), (2, len(t), 4))
  got = path.invert(head, path.combine(head, x0, eps, t), path.combine("x_t", x0, eps, t), t)
  # float32 rounding of x_t is magnified by 1 / det: by 1 / alpha for eps, by 1 / sigma for x0.
  (alpha, sigma), (a, b) = path.table["x_t"].T, path.table[head].T
  regular = ~path.singular(head)
  det = np.abs(alpha * b - sigma * a)[regular, None]
  error = np.abs(got - np.stack([x0, eps]))[:, regular]
  assert regular.sum() >= timesteps
  assert (error <= 2e-6 * np.maximum(1, 1 / det)).all()


@every_path
@every_length
def test_v_is_the_velocity_of_x_t_along_time(name, timesteps):
  path = make_path(name, timesteps)
  step = np.diff(path.time)[:, None]
  slope = np.diff(path.table["x_t"], axis=0) / step
  v = (path.table["v"][1:] + path.table["v"][:-1]) / 2
  # Trapezoid rule: the error is h^2 / 12 |v''| to leading order, and |v''| <= 1 on every path.
  assert (np.abs(slope - v) <= step**2 / 6 + 1e-9).all()


@every_path
@every_length
def test_singular_and_unpredictable_name_the_ends_of_the_path(name, timesteps):
  path, t = make_path(name, timesteps), np.arange(timesteps + 1)
  first, last = t == 0, (t == timesteps) & (name == "flow")
  never, always = t < 0, t >= 0
  singular = {"x_t": always, "x0": first, "eps": last, "v": never}
  unpredictable = {"x_t": never, "x0": never, "eps": first, "v": first}
  for kind in path.table:
    np.testing.assert_array_equal(path.singular(kind), singular[kind], err_msg=kind)
    np.testing.assert_array_equal(path.unpredictable(kind), unpredictable[kind], err_msg=kind)


@every_path
def test_table_holds_the_heads_named_here(name):
  assert set(make_path(name, 10).table) == {"x_t", *HEADS}


def test_unknown_path_is_named_beside_the_known_ones():
  with pytest.raises(ValueError, match=r"path\.name='sine'.*cosine.*flow.*linear"):
    make_path("sine", 10)


@every_path
@pytest.mark.parametrize("timesteps", [0, -1])
def test_a_path_needs_a_timestep(name, timesteps):
  with pytest.raises(ValueError, match=rf"path\.timesteps={timesteps} must be at least 1"):
    make_path(name, timesteps)


@pytest.mark.parametrize(
  "ask",
  [
    lambda path: path.coefs("score", jnp.zeros(1, jnp.int32)),
    lambda path: path.singular("score"),
    lambda path: path.unpredictable("score"),
  ],
  ids=["coefs", "singular", "unpredictable"],
)
def test_unknown_quantity_is_named_beside_the_known_ones(ask):
  with pytest.raises(ValueError, match=r"'score'.*eps.*v.*x0.*x_t"):
    ask(make_path("flow", 10))
