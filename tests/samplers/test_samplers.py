"""Samplers: against the exact denoiser of Gaussian data, whose probability flow is known."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from umd import samplers
from umd.models.network import predict
from umd.paths import PATHS, Path, make_path
from umd.samplers import Sampling
from umd.trained.inference import Inference

T, FINE, MU, SD = 960, 10_000, 0.3, 0.5
EVERY = {
  **{name: {"sampler": name} for name in samplers.SOLVERS},
  "ddim, eta .5": {"sampler": "ddim", "eta": 0.5},
  "ddim, eta 1": {"sampler": "ddim", "eta": 1.0},
}
RANDOM = {"ddpm", "ddim, eta .5", "ddim, eta 1"}

every_path = pytest.mark.parametrize("name", PATHS)
every_sampler = pytest.mark.parametrize("sampler", EVERY)


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
  sampling = Sampling(**EVERY[name], steps=steps, clip_x0=False, **settings)
  return samplers.make_sampler(sampling, denoise or gaussian(path), path)


def run(name, path, x, steps, denoise=None, **settings):
  sampler = make(name, path, steps, denoise, **settings)
  walk = jax.jit(lambda x, keys: samplers.walk(sampler, x, keys))
  return np.asarray(walk(x, keys_for(len(x))))


@every_path
@every_sampler
def test_samples_of_the_exact_denoiser_have_the_moments_of_the_data(name, sampler):
  samples = run(sampler, make_path(name, T), normal(4096), 240)
  assert samples.mean() == pytest.approx(MU, abs=0.03)
  assert samples.std() == pytest.approx(SD, abs=0.03)


def flow_error(sampler, path, steps, spacing="uniform"):
  """Largest distance from the exact probability flow, x_T in [-2, 2]."""
  x = jnp.linspace(-2, 2, 9).reshape(-1, 1, 1, 1)
  alpha, sigma = path.table["x_t"][-1]
  exact = MU + SD * (x - alpha * MU) / np.sqrt(alpha**2 * SD**2 + sigma**2)
  return np.abs(run(sampler, path, x, steps, spacing=spacing) - exact).max()


def even_angles():
  """VP path whose timesteps are evenly spaced along its quarter circle."""
  angle = np.linspace(0, np.pi / 2, T + 1)
  alpha, sigma = np.cos(angle), np.sin(angle)
  rows = {"x_t": (alpha, sigma), "v": (-sigma, alpha)}
  return Path("even", {kind: np.stack(r, axis=1) for kind, r in rows.items()}, angle)


@pytest.mark.parametrize(
  "sampler, name, low, high",
  [
    *(("ddim", name, 1.85, 2.15) for name in (*PATHS, "even")),
    ("heun", "flow", 3.7, 4.7),
    ("heun", "even", 3.7, 4.7),
    # These leave t = 0 like sqrt(t), so the last step, which is DDIM's, shrinks too slowly.
    ("heun", "cosine", 2.4, 3.4),
    ("heun", "linear", 2.4, 3.4),
    ("ab2", "flow", 3.7, 4.7),
    ("ab2", "even", 3.7, 4.7),
    ("ab2", "cosine", 2.7, 3.7),
  ],
)
def test_doubling_the_steps_divides_the_error_by_the_order(sampler, name, low, high):
  path = even_angles() if name == "even" else make_path(name, T)
  coarse, fine = (flow_error(sampler, path, steps) for steps in (40, 80))
  assert low < coarse / fine < high


@every_path
def test_dpm_solver_is_of_second_order_in_the_log_snr(name):
  """From 20 steps on: with more, rounding makes steps at the ends uneven."""
  path = make_path(name, FINE)
  coarse, fine = (flow_error("dpmpp_2m", path, steps, "logsnr") for steps in (20, 40))
  assert 3.5 < coarse / fine < 5


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "ab2"])
@every_path
def test_steps_of_second_order_beat_ddim_at_twice_the_evaluations(name, sampler):
  path = make_path(name, T)
  error = flow_error(sampler, path, 20, "quadratic")
  assert error < flow_error("ddim", path, 40, "quadratic") / 1.5


def paper_2m(ts, path, x, predict):
  """Algorithm 2 of Lu et al. (2022), line by line, in float64; first order onto t = 0."""
  alpha, sigma = path.table["x_t"].T
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
  alpha, sigma = path.table["x_t"].T

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


def test_x0_that_changes_evenly_in_the_log_snr_is_taken_at_the_middle_of_the_step():
  """Whatever the lengths of the steps, and also where the one before was longer."""
  path, ts = make_path("cosine", T), (800, 500, 350, 290)
  alpha, sigma = path.table["x_t"].T
  lam = np.log(alpha[1:] / sigma[1:])
  lam = np.concatenate([[np.inf], lam])
  clock = jnp.asarray(lam, jnp.float32)

  def denoise(x_t, t):
    x0 = jnp.full_like(x_t, 0.2) + 0.3 * clock[t]
    return x0, jnp.zeros_like(x_t)

  sampler = make("dpmpp_2m", path, 1, denoise)
  state = sampler.start(normal(4))
  for t, s in itertools.pairwise(ts):
    x, (state, _) = np.float64(state.x), sampler.step(state, None, jnp.int32(t), jnp.int32(s))
    middle = lam[t] if t == ts[0] else (lam[t] + lam[s]) / 2  # The first step knows but its start.
    wanted = sigma[s] / sigma[t] * x - alpha[s] * np.expm1(lam[t] - lam[s]) * (0.2 + 0.3 * middle)
    np.testing.assert_allclose(state.x, wanted, rtol=1e-4)


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


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_heun_beats_ddim_at_the_same_number_of_evaluations(name):
  path = make_path(name, T)
  assert flow_error("heun", path, 20) < flow_error("ddim", path, 40) / 1.5


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
  alpha_bar_t, alpha_bar_s = path.table["x_t"][[T, T // 2], 0] ** 2
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


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"eta": -0.5}, r"eta=-0\.5 must be in \[0, 1\]"),
    ({"eta": 1.5}, r"eta=1\.5 must be in \[0, 1\]"),
    ({"eta": 0.5, "sampler": "heun"}, r"eta=0\.5: sampler='heun' takes no eta, only \['ddim'\]"),
    ({"sampler": "euler"}, r"sampler='euler' is not one of.*'ddim'.*'ddpm'.*'heun'"),
    ({"spacing": "log"}, r"spacing='log' is not one of \['uniform', 'quadratic'"),
    ({"steps": 0}, r"steps=0 must be at least 1"),
    ({"cfg_scale": float("nan")}, r"cfg_scale=nan must be in \[0, inf\)"),
    *(
      ({"guidance_interval": interval}, r"guidance_interval=\(.*0 <= low < high <= 1")
      for interval in [(0.5, 0.5), (0.8, 0.2), (-0.1, 1.0), (0.0, 1.1)]
    ),
  ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    Sampling(**settings)


def test_other_samplers_do_not_inherit_eta():
  own = Sampling(sampler="ddim", eta=0.5, steps=9)
  assert own.updated({"sampler": "heun", "steps": None}) == Sampling(sampler="heun", steps=9)
  assert own.updated({"sampler": "ddim"}) == own
  with pytest.raises(ValueError, match=r"'stps'\. Did you mean 'steps'.*'cfg_scale'"):
    own.updated({"stps": 3})


def test_configs_hold_every_setting_with_the_record_s_default():
  assert Sampling(**common.sampling(steps=125, cfg_scale=1.0)) == Sampling()
  assert common.sampling(steps=1, cfg_scale=1.0).keys() == dataclasses.asdict(Sampling()).keys()


@pytest.mark.parametrize("timesteps", [1, 7, 1000])
def test_every_number_of_steps_falls_strictly_and_evenly_from_T_to_0(timesteps):
  path = make_path("cosine", timesteps)
  for steps in range(1, timesteps + 1):
    ts = samplers.step_schedule(steps, path)
    assert len(ts) == steps + 1 and (ts[0], ts[-1]) == (timesteps, 0)
    assert (np.diff(ts) < 0).all(), steps
    assert np.abs(ts - np.linspace(timesteps, 0, steps + 1)).max() <= 0.5 + 1e-9, steps


@pytest.mark.parametrize("spacing", samplers.SPACINGS)
@every_path
def test_every_spacing_falls_strictly_from_T_to_0_in_as_many_steps_as_asked(name, spacing):
  for timesteps in (1, 2, 10, 1000):
    path = make_path(name, timesteps)
    for steps in {1, 2, 3, timesteps // 4, timesteps // 2, timesteps - 1, timesteps}:
      if not 1 <= steps <= timesteps:
        continue
      ts = samplers.step_schedule(steps, path, spacing)
      assert len(ts) == steps + 1 and (ts[0], ts[-1]) == (timesteps, 0)
      assert (np.diff(ts) < 0).all(), (timesteps, steps)


def test_spacings_are_even_in_what_they_are_named_after():
  """All but the first and the last step, and up to rounding, which many timesteps make small."""
  path = make_path("cosine", FINE)
  alpha, sigma = path.table["x_t"].T
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


def test_a_sampler_goes_by_its_spacing():
  path = make_path("cosine", T)
  times = make("ab2", path, 5, spacing="quadratic").times
  np.testing.assert_array_equal(times, samplers.step_schedule(5, path, "quadratic"))
  assert (times != samplers.step_schedule(5, path)).any()


def test_more_steps_than_timesteps_are_refused():
  with pytest.raises(ValueError, match=r"steps=11 must be in \[1, timesteps=10\]"):
    make("ddim", make_path("flow", 10), 11)


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
  path, x_t = make_path(name, T), normal(64)

  def wild(x_t, t):
    return 3 * x_t, jnp.full_like(x_t, 100.0)

  for t in map(jnp.int32, (1, T // 2, T)):
    x0, eps = samplers.clip_x0(wild, path, bound)(x_t, t)
    np.testing.assert_array_equal(x0, np.clip(3 * np.asarray(x_t), -bound, bound))
    np.testing.assert_allclose(path.combine("x_t", x0, eps, t), x_t, rtol=1e-4, atol=1e-5)


@every_path
@pytest.mark.parametrize("sampler", samplers.SOLVERS)
def test_a_trajectory_is_the_way_that_the_sampler_takes(name, sampler):
  path, x, keys, steps = make_path(name, T), normal(8), keys_for(8), 6
  made, ts = make(sampler, path, steps), samplers.step_schedule(steps, path)
  found = jax.jit(lambda x, keys: samplers.trace(made, x, keys))(x, keys)
  assert (found.x0.shape, found.x_t.shape) == ((steps, *x.shape), (steps + 1, *x.shape))
  np.testing.assert_array_equal(found.x_t[0], x)
  samples = run(sampler, path, x, steps)
  np.testing.assert_allclose(found.x_t[-1], samples, rtol=1e-5, atol=1e-5)
  seen = jax.vmap(lambda x_t, t: gaussian(path)(x_t, t)[0])(found.x_t[:-1], jnp.asarray(ts[:-1]))
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


@pytest.fixture(scope="module")
def labelled(nano):
  model, params = nano(num_classes=10, heads=("x0", "eps", "v"))
  return Inference(model, make_path("cosine", 10)), params


LABELS, X_T = jnp.array([3, 7]), jax.random.normal(jax.random.key(5), (2, 16, 16, 3))


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, t, labels):
  return predict(model, params, X_T, t, labels)


@pytest.mark.parametrize(
  "head, cfg_scale, channels",
  [("eps", 0.0, 0), ("eps", 1.0, 0), ("eps", 2.5, 0), ("x0", 2.5, 3), ("v", 2.5, 0), ("eps", 4, 2)],
)
def test_guidance_is_uncond_plus_scale_times_cond_minus_uncond(labelled, head, cfg_scale, channels):
  (inference, params), t = labelled, 4
  cond, uncond = (
    forward(inference.model, params, jnp.full(2, t), labels)[head]
    for labels in (LABELS, jnp.full(2, 10))
  )
  sampling = Sampling(head=head, cfg_scale=cfg_scale, cfg_channels=channels)
  denoise = jax.jit(inference.denoiser(params, LABELS, sampling))
  x0, eps = denoise(X_T, jnp.int32(t))
  assert np.abs(cond - uncond).mean() > 1e-2
  guided = np.array(uncond + cfg_scale * (cond - uncond))
  if channels:  # As DiT samples: the others are those of the conditional model.
    guided[..., channels:] = cond[..., channels:]
  for kind, want in {"x_t": X_T, head: guided}.items():
    a, b = inference.path.table[kind][t]
    np.testing.assert_allclose(a * x0 + b * eps, want, rtol=1e-3, atol=1e-3)


def test_guidance_is_for_its_interval_alone(labelled):
  inference, params = labelled
  sampling = Sampling(cfg_scale=2.5, guidance_interval=(0.3, 0.6))
  denoise = jax.jit(inference.denoiser(params, LABELS, sampling))
  for t in (2, 3, 6, 7):  # Of 10.
    cond, uncond = (
      forward(inference.model, params, jnp.full(2, t), labels)["eps"]
      for labels in (LABELS, jnp.full(2, 10))
    )
    assert np.abs(cond - uncond).mean() > 1e-2
    eps = uncond + 2.5 * (cond - uncond) if 3 <= t <= 6 else cond
    np.testing.assert_allclose(denoise(X_T, jnp.int32(t))[1], eps, rtol=1e-3, atol=1e-3)


def test_scale_1_works_without_labels(labelled):
  inference, params = labelled
  null, none = (
    jax.jit(inference.denoiser(params, labels, Sampling()))(X_T, jnp.int32(4))
    for labels in (jnp.full(2, 10), None)
  )
  np.testing.assert_allclose(none[0], null[0], rtol=1e-4, atol=1e-4)


def test_sample_draws_from_its_key_clips_x0_and_passes_options_on(labelled):
  inference, params = labelled

  @functools.partial(jax.jit, static_argnames=("clip_x0", "eta"))
  def sample(keys, labels=LABELS, clip_x0=True, eta=0.0):
    sampling = Sampling(steps=3, clip_x0=clip_x0, eta=eta)
    return inference.sample(params, keys, labels, sampling)

  keys = keys_for(2)
  images = sample(keys)
  assert images.shape == (2, 16, 16, 3)
  assert np.abs(images).max() <= 1 < np.abs(sample(keys, clip_x0=False)).max()
  np.testing.assert_allclose(sample(keys[::-1], LABELS[::-1]), images[::-1], atol=1e-3)
  assert np.abs(sample(keys, eta=1.0) - images).mean() > 1e-2
  assert np.abs(sample(keys_for(2, seed=2)) - images).mean() > 1e-2


@pytest.mark.parametrize(
  "options, labels, message",
  [
    ({"head": "eps"}, None, r"head='eps' does not determine x0.*'flow'.*'x0', 'eps'"),
    ({"head": "v"}, None, r"head='v' is not among the model's heads.*'x0', 'eps'"),
    ({"head": "x0", "cfg_scale": 2.0}, None, r"cfg_scale=2\.0 guides by labels.*cfg_scale=1"),
    ({"head": "x0", "cfg_scale": 2.0}, LABELS, r"cfg_scale=2\.0 guides by labels.*cfg_scale=1"),
    ({"head": "x0", "cfg_channels": 4}, None, r"cfg_channels=4 must be in \[0, 3\]"),
    ({"head": "x0", "steps": 11}, None, r"steps=11 must be in \[1, timesteps=10\]"),
  ],
)
def test_a_sample_that_cannot_be_drawn_is_refused_with_a_remedy(nano, options, labels, message):
  model, params = nano()
  inference = Inference(model, make_path("flow", 10))
  with pytest.raises(ValueError, match=message):
    inference.sample(params, keys_for(2), labels, Sampling(**{"steps": 3, **options}))
