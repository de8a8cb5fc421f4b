"""Noise paths: closed forms, the algebra of their quantities, and where it breaks down."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from umd.paths import PATHS, Flow, make_path

T = (1, 10, 1000)
WHOLE = ("cosine", "linear", "flow")
EVERY = {name: make_path(name) for name in PATHS} | {"flow, real": Flow(0)}
HEADS = {name: [k for k in path.quantities if k != "x_t"] for name, path in EVERY.items()}
GOLDEN = os.path.join(os.path.dirname(os.path.dirname(__file__)), "golden", "official_edm.npz")

every_path = pytest.mark.parametrize("name", EVERY)
every_length = pytest.mark.parametrize("timesteps", T)
whole_path = pytest.mark.parametrize("name", WHOLE)


def pair(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), (2, *shape))


@pytest.fixture(scope="module")
def official():
  """The official MaskDiT: its preconditioner, its noise levels and its samplers."""
  return np.load(GOLDEN)


@every_path
def test_t0_is_exactly_clean_and_the_end_is_noise(name):
  path = EVERY[name]
  x0, eps = pair(3, 4, 4, 1)
  np.testing.assert_array_equal(path.combine("x_t", x0, eps, jnp.zeros(3)), x0)
  alpha, sigma = path.coefs("x_t", path.end)
  assert alpha / sigma < 0.021 and path.start_scale == pytest.approx(sigma, rel=1e-3)


@every_path
def test_noise_rises_and_the_coordinate_of_time_with_it(name):
  path = EVERY[name]
  alpha, sigma = path.coefs("x_t", path.grid)
  assert (np.diff(sigma / np.maximum(alpha, 1e-12)) > 0).all()
  assert (np.diff(path.progress(path.grid)) > 0).all() and path.progress(0) == 0


@every_length
def test_cosine_is_the_closed_form_of_nichol_and_dhariwal(timesteps):
  f = np.cos((np.arange(timesteps) / timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
  alpha, sigma = make_path("cosine", timesteps).coefs("x_t", np.arange(timesteps + 1))
  np.testing.assert_allclose(alpha[:-1] ** 2, f / f[0], rtol=1e-9)
  np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-12)
  # The cap on beta changes t = T only.
  assert (alpha[-1] / alpha[-2]) ** 2 == pytest.approx(1 - 0.999)


@pytest.mark.parametrize("timesteps", [100, 1000])
def test_linear_alpha_bar_is_the_product_of_one_minus_beta(timesteps):
  alpha, sigma = make_path("linear", timesteps).coefs("x_t", np.arange(timesteps + 1))
  np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-12)
  product = 1.0
  for i in range(timesteps):
    product *= 1 - (1e-4 + (2e-2 - 1e-4) * i / (timesteps - 1)) * 1000 / timesteps
    assert alpha[i + 1] ** 2 == pytest.approx(product, rel=1e-9)


def test_the_others_are_their_equations():
  t = np.linspace(0, 50, 7)
  np.testing.assert_allclose(make_path("flow", 50).coefs("x_t", t), (1 - t / 50, t / 50))
  np.testing.assert_allclose(Flow(0).coefs("x_t", t / 50), (1 - t / 50, t / 50))
  for name in ("ve", "edm"):
    np.testing.assert_array_equal(EVERY[name].coefs("x_t", t), (np.ones(7), t))


@whole_path
@every_length
@pytest.mark.parametrize("kind", ["x_t", "eps", "v"])
def test_whole_times_read_the_table_and_real_ones_agree_with_it(name, timesteps, kind):
  path, whole = make_path(name, timesteps), np.arange(timesteps + 1)
  table = np.float32(path.coefs(kind, whole))
  np.testing.assert_array_equal(path.coefs(kind, jnp.asarray(whole)), table)
  np.testing.assert_allclose(path.coefs(kind, whole.astype(float)), table, rtol=1e-6, atol=1e-8)
  real = path.coefs(kind, jnp.asarray(whole, jnp.float32))
  np.testing.assert_allclose(real, table, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_between_whole_times_noise_is_added_at_an_even_rate(name):
  """Two halves of a step keep as much of the image as the step, and each as much as the other."""
  path = make_path(name, 10)
  alpha, sigma = path.coefs("x_t", np.arange(0, 10.5, 0.5))
  kept = alpha[1:] / alpha[:-1]
  np.testing.assert_allclose(kept[::2], kept[1::2], rtol=1e-12)
  np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-12)


@every_path
def test_v_is_the_velocity_of_x_t_along_tau(name):
  path = EVERY[name]
  t = np.linspace(0.01, 0.99, 51)[:, None] * path.end + np.array([-1e-5, 0, 1e-5]) * path.end
  if path.timesteps:
    t += 0.5 - (t[:, 1:2] % 1)  # Where the rate of noise jumps there is no derivative.
  below, _, above = (np.stack(path.coefs("x_t", column)) for column in t.T)
  steps = path.progress(t[:, 2]) - path.progress(t[:, 0])
  np.testing.assert_allclose((above - below) / steps, path.coefs("v", t[:, 1]), atol=1e-5)


@every_path
def test_the_score_is_the_gradient_of_the_log_density(name):
  path = EVERY[name]
  t = jnp.linspace(0.1, 1, 7) * path.end
  x0, eps = pair(7)
  alpha, sigma = path.coefs("x_t", t)
  log_density = lambda x: (-((x - alpha * x0) ** 2) / (2 * sigma**2)).sum()
  wanted = jax.grad(log_density)(path.combine("x_t", x0, eps, t))
  np.testing.assert_allclose(path.combine("score", x0, eps, t), wanted, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("name, kind", [(n, k) for n in EVERY for k in HEADS[n]])
def test_invert_undoes_combine_wherever_not_singular(name, kind):
  path = EVERY[name]
  grid = path.grid[~path.singular(kind, path.grid)]
  t = jnp.asarray(grid)
  x0, eps = pair(len(t), 4, seed=2)
  found = path.invert(kind, path.combine(kind, x0, eps, t), path.combine("x_t", x0, eps, t), t)
  # Rounding to float32 of x_t and of the prediction is magnified by the inverse of the system.
  (alpha, sigma), (a, b) = path.coefs("x_t", grid), path.coefs(kind, grid)
  det = np.abs(alpha * b - sigma * a)
  size = (alpha + sigma) * (np.abs(a) + np.abs(b)) / det
  assert len(grid) >= len(path.grid) - 1 - (kind == "score")
  assert (np.abs(found - np.stack([x0, eps])) <= 2e-6 * np.maximum(1, size)[:, None]).all()


@every_path
def test_singular_and_unpredictable_name_the_ends_of_the_path(name):
  path, t = EVERY[name], EVERY[name].grid
  never, first = np.zeros(len(t), bool), t == 0
  last = (t == path.end) & name.startswith("flow")
  singular = {"x_t": ~never, "x0": first, "eps": last, "v": never, "score": first | last}
  unpredictable = {"x_t": never, "x0": never}
  for kind in path.quantities:
    np.testing.assert_array_equal(path.singular(kind, t), singular.get(kind, never), err_msg=kind)
    wanted = unpredictable.get(kind, first)
    np.testing.assert_array_equal(path.unpredictable(kind, t), wanted, err_msg=kind)
    assert path.invertible(kind) == (kind != "x_t" and not singular.get(kind, never)[1:].any())


def test_edm_is_the_official_preconditioner(official):
  """The published code of MaskDiT, which is EDM's, on latents: F and D of a small network."""
  path, sigma = EVERY["edm"], jnp.asarray(official["sigma"][:, 0, 0, 0])
  x0, eps, x = (jnp.asarray(official[k]) for k in ("x0", "eps", "x"))
  np.testing.assert_allclose(path.combine("x_t", x0, eps, sigma), x, rtol=1e-6, atol=1e-6)
  denoised, _ = path.invert("F", jnp.asarray(official["F"]), x, sigma)
  np.testing.assert_allclose(denoised, official["D"], rtol=1e-5, atol=2e-6)


def test_edm_has_the_coefficients_of_karras_et_al():
  path, s = EVERY["edm"], np.geomspace(0.002, 80, 9)
  c_skip, c_out = 0.25 / (s**2 + 0.25), 0.5 * s / np.sqrt(s**2 + 0.25)
  a, b = path.coefs("F", s)  # F = (x0 - c_skip (x0 + s eps)) / c_out.
  np.testing.assert_allclose(a, (1 - c_skip) / c_out)
  np.testing.assert_allclose(b, -c_skip * s / c_out)
  np.testing.assert_allclose(0.25 * a**2 + b**2, 1)  # Of unit variance.
  np.testing.assert_allclose(path.input_scale(s), 1 / np.sqrt(s**2 + 0.25))
  np.testing.assert_allclose(path.time_input(s), np.log(s) / 4)
  np.testing.assert_allclose(EVERY["ve"].time_input(s[1:]), np.log(np.maximum(s[1:], 0.01) / 2))


@every_path
def test_what_a_network_is_told_is_finite_at_t0_and_else_t_itself_on_other_paths(name):
  path, t = EVERY[name], jnp.asarray(EVERY[name].grid)
  assert np.isfinite(path.time_input(t)).all() and np.isfinite(path.input_scale(t)).all()
  if name not in ("ve", "edm"):
    assert path.time_input(t) is t and path.input_scale(t) == 1


@pytest.mark.parametrize(
  "name, settings, message",
  [
    ("sine", {}, r"path\.name='sine'.*cosine.*flow.*linear"),
    ("cosine", {"timesteps": 0}, r"path\.timesteps=0 must be at least 1"),
    ("flow", {"timesteps": -1}, r"path\.timesteps=-1 must be at least 1"),
    ("edm", {"timesteps": 10}, r"'edm' takes no \['timesteps'\].*sigma_max"),
    ("ve", {"sigma_min": 60.0}, r"path\.sigma_min=60\.0, path\.sigma_max=50\.0 must satisfy"),
  ],
)
def test_paths_that_make_no_sense_are_refused(name, settings, message):
  with pytest.raises(ValueError, match=message):
    make_path(name, **settings)


@pytest.mark.parametrize("ask", ["coefs", "singular", "unpredictable"])
def test_unknown_quantity_is_named_beside_the_known_ones(ask):
  with pytest.raises(ValueError, match=r"'F'.*'flow'.*eps.*v.*x0.*x_t"):
    getattr(make_path("flow", 10), ask)("F", 0)
