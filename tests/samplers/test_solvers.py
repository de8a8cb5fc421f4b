"""Samplers: against the exact denoiser of Gaussian data, whose probability flow is known."""

import dataclasses
import functools
import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from umd import samplers
from umd.paths import EDM, VE, Flow, Path, make_path
from umd.samplers import Sampling

T, FINE, MU, SD = 960, 10_000, 0.3, 0.5
EVERY = {
  **{name: {"sampler": name} for name in samplers.SOLVERS},
  "ddim, eta .5": {"sampler": "ddim", "eta": 0.5},
  "ddim, eta 1": {"sampler": "ddim", "eta": 1.0},
}
GOLDEN = os.path.join(os.path.dirname(os.path.dirname(__file__)), "golden", "official_edm.npz")
RANDOM = {"ddpm", "ddim, eta .5", "ddim, eta 1"}

WHOLE = ("cosine", "linear", "flow")
# Where time is the noise itself, even steps in time would all but miss the image.
SPACINGS = {"ve": "karras", "edm": "karras"}

every_path = pytest.mark.parametrize("name", [*WHOLE, "flow, real", "ve", "edm"])
whole_path = pytest.mark.parametrize("name", WHOLE)
every_sampler = pytest.mark.parametrize("sampler", EVERY)


@dataclasses.dataclass(frozen=True)
class EvenAngles(Path):
  """A variance-preserving path in real time that moves evenly along its quarter circle."""

  end = np.pi / 2

  def mix(self, t):
    return jnp.cos(t), jnp.sin(t)

  def velocity(self, t):
    return -jnp.sin(t), jnp.cos(t)

  def tau(self, t):
    return t


def path_of(name):
  others = {"flow, real": Flow(0), "ve": VE(), "edm": EDM(), "even": EvenAngles()}
  return others.get(name) or make_path(name, T)


def gaussian(path, mu=MU, sd=SD):
  """The exact denoiser of data N(mu, sd^2); sd = 0 puts all of it at mu."""

  def denoise(x_t, t):
    alpha, sigma = path.coefs("x_t", t)
    x0 = mu + alpha * sd**2 / (alpha**2 * sd**2 + sigma**2) * (x_t - alpha * mu)
    return x0, (x_t - alpha * x0) / sigma

  return denoise


def normal(count, seed=0):
  return jax.random.normal(jax.random.key(seed), (count, 1, 1, 1))


def keys_for(count, seed=1):
  return jax.random.split(jax.random.key(seed), count)


def make(name, path, steps, denoise=None, **settings):
  settings = {"spacing": SPACINGS.get(path.name, "uniform"), **settings}
  sampling = Sampling(**EVERY[name], steps=steps, clip_x0=False, **settings)
  return samplers.make_sampler(sampling, denoise or gaussian(path), path)


def run(name, path, x, steps, denoise=None, **settings):
  sampler = make(name, path, steps, denoise, **settings)
  walk = jax.jit(lambda x, keys: samplers.walk(sampler, x, keys))
  return np.asarray(walk(x, keys_for(len(x))))


@every_path
@every_sampler
def test_samples_of_the_exact_denoiser_have_the_moments_of_the_data(name, sampler):
  path = path_of(name)
  samples = run(sampler, path, path.start_scale * normal(4096), 240)
  assert samples.mean() == pytest.approx(MU, abs=0.03)
  assert samples.std() == pytest.approx(SD, abs=0.03)


def flow_error(sampler, path, steps, **settings):
  """Largest distance from the exact probability flow, from noise of up to 2 deviations."""
  x = path.start_scale * jnp.linspace(-2, 2, 9).reshape(-1, 1, 1, 1)
  alpha, sigma = path.coefs("x_t", path.end)
  exact = MU + SD * (x - alpha * MU) / np.sqrt(alpha**2 * SD**2 + sigma**2)
  return np.abs(run(sampler, path, x, steps, **settings) - exact).max()


@pytest.mark.parametrize(
  "sampler, name, low, high",
  [
    *(("ddim", name, 1.85, 2.15) for name in (*WHOLE, "even", "flow, real", "ve", "edm")),
    *(("heun", name, 3.7, 4.7) for name in ("flow", "even", "flow, real", "ve", "edm")),
    *(("ab2", name, 3.5, 4.7) for name in ("flow", "even", "flow, real", "ve", "edm")),
    # These leave t = 0 like sqrt(t), so the last step, which is DDIM's, shrinks too slowly.
    ("heun", "cosine", 2.4, 3.4),
    ("heun", "linear", 2.4, 3.4),
    ("ab2", "cosine", 2.7, 3.7),
  ],
)
def test_doubling_the_steps_divides_the_error_by_the_order(sampler, name, low, high):
  coarse, fine = (flow_error(sampler, path_of(name), steps) for steps in (40, 80))
  assert low < coarse / fine < high


@pytest.mark.parametrize("name", [*WHOLE, "flow, real", "ve", "edm"])
def test_dpm_solver_is_of_second_order_in_the_log_snr(name):
  """From 20 steps on: with more, rounding makes steps at the ends uneven."""
  path = make_path(name, FINE) if name in WHOLE else path_of(name)
  coarse, fine = (flow_error("dpmpp_2m", path, steps, spacing="logsnr") for steps in (20, 40))
  assert 3.5 < coarse / fine < 5


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp_2m"])
def test_between_whole_times_a_table_is_a_path_like_others(sampler):
  """Many more steps than the table has rows still come closer to the exact probability flow."""
  path, errors = make_path("cosine", 10), []
  for steps in (40, 80):
    times = np.linspace(10, 0, steps + 1, dtype=np.float32)
    solver = dataclasses.replace(make(sampler, path, 10), times=times)
    x = jnp.linspace(-2, 2, 9).reshape(-1, 1, 1, 1)
    alpha, sigma = path.coefs("x_t", 10)
    exact = MU + SD * (x - alpha * MU) / np.sqrt(alpha**2 * SD**2 + sigma**2)
    walk = jax.jit(lambda x, solver=solver: samplers.walk(solver, x, keys_for(9)))
    errors.append(np.abs(walk(x) - exact).max())
  assert errors[0] / errors[1] > 1.85 and errors[1] < 0.05


@pytest.mark.parametrize("sampler, steps", [("dpmpp_2m", 20), ("ab2", 20), ("heun", 10)])
@whole_path
def test_steps_of_second_order_beat_ddim_at_as_many_evaluations(name, sampler, steps):
  path = make_path(name, T)
  error = flow_error(sampler, path, steps, spacing="quadratic")
  assert error < flow_error("ddim", path, 20, spacing="quadratic") / 1.5


@pytest.mark.parametrize("sampler, name", [("heun", "heun"), ("ddim", "euler")])
def test_edm_is_sampled_as_the_official_code_does(sampler, name):
  """Noise levels and network inputs of MaskDiT's samplers; its network's outputs are replayed."""
  official, calls = np.load(GOLDEN), []
  for steps in (5, 18, 40):
    times = samplers.step_schedule(steps, EDM(), "karras")
    np.testing.assert_allclose(times, [*official[f"sigmas/{steps}"], 0], rtol=1e-6)

  def denoise(x_t, t):
    x0, k = jnp.asarray(official[f"{name}/net_D"][len(calls)]), len(calls)
    calls.append(float(t))
    np.testing.assert_allclose(x_t, official[f"{name}/net_x"][k], rtol=1e-5, atol=1e-5)
    return x0, (x_t - x0) / t

  with jax.disable_jit():
    x = make(sampler, EDM(), 5, denoise)
    x = samplers.walk(x, 80 * jnp.asarray(official["sampler/z"]), keys_for(2))
  np.testing.assert_allclose(calls, official[f"{name}/net_sigma"], rtol=1e-6)
  np.testing.assert_allclose(x, official[f"{name}/out"], rtol=1e-5, atol=1e-5)


def paper_2m(ts, path, x, predict):
  """Algorithm 2 of Lu et al. (2022), line by line, in float64; first order onto t = 0."""
  alpha, sigma = path.coefs("x_t", path.grid)
  lam = np.log(alpha, where=alpha > 0, out=np.full(len(alpha), -np.inf)) - np.log(sigma + 1e-300)
  previous = None
  for i in range(1, len(ts)):
    s, t = ts[i - 1], ts[i]  # The paper steps from s = t_{i-1} to t = t_i.
    x0, h = predict(x, s), lam[t] - lam[s]
    if previous is None or t == 0:
      d = x0
    else:
      r = (lam[s] - lam[ts[i - 2]]) / h
      d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * previous
    x, previous = sigma[t] / sigma[s] * x - alpha[t] * np.expm1(-h) * d, x0
  return x


@pytest.mark.parametrize("spacing", samplers.SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 3, 12])
def test_dpm_solver_is_the_papers_algorithm_2(spacing, steps):
  path, x = make_path("cosine", T), normal(16)
  alpha, sigma = path.coefs("x_t", path.grid)

  def predict(x, t):  # As `gaussian`, in float64.
    a, s = alpha[t], sigma[t]
    return MU + a * SD**2 / (a**2 * SD**2 + s**2) * (x - a * MU)

  wanted = paper_2m(samplers.step_schedule(steps, path, spacing), path, np.float64(x), predict)
  np.testing.assert_allclose(
    run("dpmpp_2m", path, x, steps, spacing=spacing), wanted, rtol=1e-3, atol=1e-4
  )


@pytest.mark.parametrize("spacing", ["uniform", "karras"])
@pytest.mark.parametrize("steps", [5, 20])
def test_dpm_solver_is_that_of_diffusers(spacing, steps):
  """Which has timesteps 0..T - 1 for our 1..T, and is given ours."""
  torch = pytest.importorskip("torch", reason="PyTorch is not installed")
  solvers = pytest.importorskip("diffusers", reason="diffusers is not installed")
  path, x = make_path("linear", 1000), normal(16)
  solver = solvers.DPMSolverMultistepScheduler(
    beta_start=1e-4, beta_end=2e-2, prediction_type="sample", final_sigmas_type="zero"
  )
  ts, exact = samplers.step_schedule(steps, path, spacing), gaussian(path)
  solver.set_timesteps(timesteps=(ts[:-1] - 1).tolist())
  theirs = torch.tensor(np.asarray(x))
  for t in ts[:-1]:
    x0 = np.asarray(exact(jnp.asarray(theirs.numpy()), jnp.int32(t))[0])
    theirs = solver.step(torch.tensor(x0), int(t) - 1, theirs).prev_sample
  ours = run("dpmpp_2m", path, x, steps, spacing=spacing)
  np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-3, atol=1e-3)


def test_adams_bashforth_is_exact_where_the_velocity_changes_evenly():
  """d x / d time = a + b time, after a first step of Euler's, with steps of any lengths."""
  path, ts, a, b = make_path("flow", 100), (100, 80, 50, 45, 10), 0.7, -1.3

  def denoise(x_t, t):
    v = a + b * t / 100
    x0 = x_t - t / 100 * v
    return x0, x0 + v

  sampler = make("ab2", path, 1, denoise)
  state = sampler.step(sampler.start(normal(4)), None, jnp.int32(ts[0]), jnp.int32(ts[1]))[0]
  x, s = np.float64(state.x), np.array(ts) / 100
  for i in range(1, len(ts) - 1):
    state = sampler.step(state, None, jnp.int32(ts[i]), jnp.int32(ts[i + 1]))[0]
    wanted = x + a * (s[i + 1] - s[1]) + b * (s[i + 1] ** 2 - s[1] ** 2) / 2
    np.testing.assert_allclose(state.x, wanted, rtol=1e-5, atol=1e-6)


def test_ddim_is_eulers_method_on_the_flow_path():
  path, x, steps = make_path("flow", T), normal(8), 6
  ts = samplers.step_schedule(steps, path)
  found, wanted = run("ddim", path, x, steps), x
  for t, s in itertools.pairwise(ts):
    v = path.combine("v", *gaussian(path)(wanted, jnp.int32(t)), jnp.int32(t))
    wanted = wanted + (s - t) / T * v
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, steps", [("cosine", 3), ("linear", 1), ("flow", 10)])
@every_sampler
def test_a_point_is_reached_exactly(name, sampler, steps):
  path = make_path(name, 10)
  samples = run(sampler, path, normal(8), steps, gaussian(path, sd=0.0))
  np.testing.assert_allclose(samples, MU, rtol=1e-6)


@pytest.mark.parametrize("name, steps", [("cosine", T), ("linear", 10), ("flow", T)])
def test_ddpm_is_ddim_with_eta_1(name, steps):
  path, x = make_path(name, T), normal(64)
  ddpm, ddim = (run(sampler, path, x, steps) for sampler in ("ddpm", "ddim, eta 1"))
  np.testing.assert_allclose(ddpm, ddim, atol=1e-3)


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize("sampler, eta", [("ddim", 0), ("ddim, eta .5", 0.5), ("ddim, eta 1", 1)])
def test_ddim_adds_the_noise_of_song_et_al(name, sampler, eta):
  path, x = make_path(name, T), normal(4096)

  def identity(x_t, t):
    return x_t, jnp.zeros_like(x_t)

  # Two steps: T -> T / 2 adds noise, T / 2 -> 0 none.
  samples = run(sampler, path, x, 2, identity)
  alpha_bar_t, alpha_bar_s = path.coefs("x_t", np.array([T, T // 2]))[0] ** 2
  std = eta * np.sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s))
  noise = samples - np.sqrt(alpha_bar_s) * np.asarray(x)
  assert noise.std() == pytest.approx(std, rel=0.05, abs=1e-6)
  assert abs(np.corrcoef(noise.ravel(), x.ravel())[0, 1]) < 0.05 or eta == 0


@every_sampler
def test_an_image_depends_on_its_own_noise_and_key_alone(sampler):
  path, x, keys = make_path("cosine", 10), normal(4), keys_for(4)
  made = make(sampler, path, 5)
  walk = jax.jit(lambda x, keys: samplers.walk(made, x, keys).ravel())
  samples, order = np.asarray(walk(x, keys)), jnp.array([2, 0, 3, 1])
  np.testing.assert_allclose(walk(x[order], keys[order]), samples[order], rtol=1e-5)
  changed = walk(x, keys.at[1].set(jax.random.key(9))) != samples
  np.testing.assert_array_equal(changed, [False, sampler in RANDOM, False, False])


@pytest.mark.parametrize("timesteps, steps", [(10, 1), (10, 10), (1000, 62)])
@pytest.mark.parametrize("sampler", samplers.SOLVERS)
def test_each_step_asks_the_denoiser_once_and_heun_twice_but_for_the_last(
  sampler, timesteps, steps
):
  path, asked = make_path("cosine", timesteps), []

  def denoise(x_t, t):
    jax.debug.callback(lambda t: asked.append(int(t)), t, ordered=True)
    return gaussian(path)(x_t, t)

  run(sampler, path, normal(2), steps, denoise)
  jax.effects_barrier()
  ts = samplers.step_schedule(steps, path)[:-1].tolist()
  assert asked == (sorted(ts + ts[1:], reverse=True) if sampler == "heun" else ts)
  assert len(asked) == samplers.SOLVERS[sampler].evaluations(steps)


@every_path
@pytest.mark.parametrize("bound", [1.0, 0.5])
def test_clipped_x0_is_bounded_and_still_explains_x_t(name, bound):
  path, x_t = path_of(name), normal(64)

  def wild(x_t, t):
    return 3 * x_t, jnp.full_like(x_t, 100.0)

  for t in jnp.asarray(path.grid)[jnp.array([1, len(path.grid) // 2, -1])]:
    x0, eps = samplers.clip_x0(wild, path, bound)(x_t, t)
    np.testing.assert_array_equal(x0, np.clip(3 * np.asarray(x_t), -bound, bound))
    np.testing.assert_allclose(path.combine("x_t", x0, eps, t), x_t, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["cosine", "edm"])
@pytest.mark.parametrize("sampler", samplers.SOLVERS)
def test_a_trajectory_is_the_way_that_the_sampler_takes(name, sampler):
  path, keys, steps = path_of(name), keys_for(8), 6
  x, made = path.start_scale * normal(8), make(sampler, path, steps)
  found = jax.jit(lambda x, keys: samplers.trace(made, x, keys))(x, keys)
  assert (found.x0.shape, found.x_t.shape) == ((steps, *x.shape), (steps + 1, *x.shape))
  np.testing.assert_array_equal(found.x_t[0], x)
  samples = run(sampler, path, x, steps)
  np.testing.assert_allclose(found.x_t[-1], samples, rtol=1e-5, atol=1e-5)
  seen = jax.vmap(lambda x_t, t: gaussian(path)(x_t, t)[0])(
    found.x_t[:-1], jnp.asarray(made.times[:-1])
  )
  np.testing.assert_allclose(found.x0, seen, rtol=1e-4, atol=1e-5)


KNOWN, RHO = 0.9, 0.9  # Of pairs of pixels: the value of one, and their correlation.


def correlated(path):
  """The exact denoiser of pairs of pixels, each N(MU, SD^2)."""
  cov = SD**2 * np.array([[1, RHO], [RHO, 1]])

  def denoise(x_t, t):
    alpha, sigma = path.coefs("x_t", t)
    gain = alpha * cov @ jnp.linalg.inv(alpha**2 * cov + sigma**2 * jnp.eye(2))
    x0 = MU + ((x_t - alpha * MU).reshape(-1, 2) @ gain.T).reshape(x_t.shape)
    return x0, (x_t - alpha * x0) / sigma

  return denoise


@functools.cache
def painter(name, sampler, resampling):
  """Compiles: (x_T, keys) -> pairs of which the first is known."""
  path = make_path(name, T)
  made = make(sampler, path, 40, correlated(path))

  def fill(x, keys):
    known = jnp.broadcast_to(jnp.array([KNOWN, jnp.nan])[None, None, :, None], x.shape)
    mask = jnp.isnan(known).astype(jnp.float32)
    return samplers.inpaint(made, x, keys, known, mask, resampling)

  return jax.jit(fill)


def inpaint(name, sampler, resampling, count=2048, keys=None):
  """Pairs [count, 2] of which the first is known."""
  x = jax.random.normal(jax.random.key(0), (count, 1, 2, 1))
  fill = painter(name, sampler, resampling)
  return np.asarray(fill(x, keys_for(count) if keys is None else keys)).reshape(-1, 2)


@pytest.mark.parametrize("name, sampler", [("cosine", "ddpm"), ("flow", "ddim")])
def test_inpainting_draws_from_the_conditional_the_closer_the_more_it_resamples(name, sampler):
  mean, sd = MU + RHO * (KNOWN - MU), SD * np.sqrt(1 - RHO**2)
  once, often = inpaint(name, sampler, 1), inpaint(name, sampler, 10)
  for pairs in (once, often):
    np.testing.assert_array_equal(pairs[:, 0], np.float32(KNOWN))
  far, near = (abs(pairs[:, 1].mean() - mean) for pairs in (once, often))
  assert near < 0.05 < 0.15 < far < mean - MU  # Even without, the known half is not ignored.
  assert often[:, 1].std() == pytest.approx(sd, abs=0.06)


def test_what_is_filled_in_depends_on_its_own_key_alone():
  keys = keys_for(4)
  changed = inpaint("flow", "ddim", 2, 4, keys.at[1].set(jax.random.key(9)))
  differs = np.abs(changed - inpaint("flow", "ddim", 2, 4, keys))[:, 1] > 1e-6
  np.testing.assert_array_equal(differs, [False, True, False, False])


def test_a_multistep_sampler_fills_in_as_ddim_does():
  """Every step follows fresh noise, so that there is no history to go by."""
  wanted = inpaint("flow", "ddim", 3, 16)
  for sampler in ("dpmpp_2m", "ab2"):
    np.testing.assert_allclose(inpaint("flow", sampler, 3, 16), wanted, rtol=1e-4, atol=1e-4)


def test_a_step_is_taken_at_least_once():
  with pytest.raises(ValueError, match=r"resampling=0 must be at least 1"):
    inpaint("flow", "ddim", 0, 4)


@pytest.mark.parametrize("spacing", samplers.SPACINGS)
@every_path
def test_every_spacing_falls_strictly_to_0_in_as_many_steps_as_asked(name, spacing):
  for timesteps in (1, 2, 10, 1000):
    path = make_path(name, timesteps) if name in WHOLE else path_of(name)
    numbers = {1, 2, 3, timesteps // 4, timesteps // 2, timesteps - 1, timesteps}
    for steps in numbers & set(range(1, timesteps + 1)):
      times = samplers.step_schedule(steps, path, spacing)
      assert len(times) == steps + 1 and (times[0], times[-1]) == (path.end, 0)
      assert (np.diff(times) < 0).all(), (timesteps, steps)
      if spacing == "uniform":
        assert np.abs(times - np.linspace(path.end, 0, steps + 1)).max() <= 0.5 + 1e-5


def test_spacings_are_even_in_what_they_are_named_after():
  """All but the first and the last step, and up to rounding, which many timesteps make small."""
  path = make_path("cosine", FINE)
  alpha, sigma = path.coefs("x_t", path.grid)
  even_in = {
    "uniform": lambda t: t / FINE,
    "quadratic": lambda t: np.sqrt(t / FINE),
    "logsnr": lambda t: np.log(alpha[t] / sigma[t]),
    "karras": lambda t: (sigma[t] / alpha[t]) ** (1 / 7),
  }
  for spacing, coordinate in even_in.items():
    ts = samplers.step_schedule(12, path, spacing)
    gaps = np.diff(coordinate(ts[1:-1]))
    np.testing.assert_allclose(gaps, gaps.mean(), rtol=0.1, err_msg=spacing)


def test_more_steps_than_timesteps_are_refused():
  with pytest.raises(ValueError, match=r"steps=11 must be in \[1, timesteps=10\]"):
    make("ddim", make_path("flow", 10), 11)
