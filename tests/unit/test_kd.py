"""Knowledge distillation on ODE trajectories: oracles 4.4 - 4.6 through the real classes, with roles whose ODE is known.

Trajectories come from `fvtitan.trajectories`, losses from the methods' own `single_train_step`; where an oracle speaks of least
squares, the student's minimum is found from the gradient and the Hessian of that loss.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fvtitan import flow_matching as fm
from fvtitan import samplers, trajectories
from fvtitan.components.rng import SampleStreams
from fvtitan.data.latent_cache import LatentCache
from fvtitan.errors import UserError
from fvtitan.flow_matching import ScheduleConfig
from fvtitan.methods.base import TrainingMethod
from fvtitan.methods.kd import KDCausalConfig, KDCausalMethod, KDConfig, KDMethod
from fvtitan.models import blocks
from fvtitan.models.base import CausalModelBase, Conditioning, ModelBase
from fvtitan.models.blocks import CausalConfig
from fvtitan.models.wan.model import WanCausalModel
from fvtitan.models.wan.transformer import FLAVORS
from fvtitan.trajectories import build_contract, make_trajectories, prepare_trajectories
from tests.helpers import bidirectional_model, causal_model, kd_recipe, make_cache, random_transformer, small_config

DIM = 6
SHIFTS = [1.0, 3.0, 5.0, 8.0]
EULER = {1.0: 0.0035, 3.0: 0.0046, 5.0: 0.0064, 8.0: 0.0092}  # relative error of 384 steps (oracles 4.4)
WARPED = [1000.0, 750.0, 500.0, 250.0]


class InMemory(LatentCache):
    """Every sample is read once: thousands of trajectories ask for theirs."""

    def __getitem__(self, index):
        kept = self.__dict__.setdefault("kept", {})
        if index not in kept:
            kept[index] = super().__getitem__(index)
        return kept[index]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return InMemory(make_cache(tmp_path_factory.mktemp("data") / "cache"), prompts_only=True)


@pytest.fixture(scope="module")
def base(prompts, tmp_path_factory):
    """Configurations of kd and of kd_causal, as parsed; `configured` makes the others."""
    folder = tmp_path_factory.mktemp("kd")
    parsed = {"pairs": {}}
    for name in ("kd", "kd_causal"):
        method = {"name": name, "teacher_inference_steps": 48, "student_sample_steps": 4, "cache_dtype": "float64"}
        method["teacher_guidance_scale"] = 1.0
        recipe = kd_recipe(folder, **method)
        parsed[name] = small_config(prompts.path, folder, job__config_file=recipe, data__caption_dropout=0.0)
    return SimpleNamespace(**parsed)


def configured(cfg, *, frames=1, shift=5.0, **method):
    """For latents [B, frames, channels, 1, 1]."""
    return dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, num_frames=4 * frames - 3, height=8, width=8),
        schedule=ScheduleConfig(shift=shift),
        method=dataclasses.replace(cfg.method, **method),
    )


# -------------------------------------------------------------------------------------------------- analytic roles


class Role(ModelBase):
    """What all analytic roles share: the text is the first row of the embedding."""

    def __init__(self, module: nn.Module, *, channels: int = DIM):
        super().__init__(module, trainable=True, schedule=ScheduleConfig(), device=torch.device("cpu"))
        self.latent_channels, self.identity = channels, "analytic"

    def check_cache(self, cfg, cache):
        pass

    def num_tokens(self, sizes, latent_shape):
        return latent_shape[0]

    def conditioning(self, prompt_embeds):
        return Conditioning(torch.stack([embeds[0] for embeds in prompt_embeds]))


class Causal(Role, CausalModelBase):
    """One frame a block; the cache is the list of committed frames."""

    causal = CausalConfig(1)

    def new_cache(self, latent_shape, *, recycle=False, first_frame=0):
        return []

    def commit(self, block, cond, cache, start_frame, context_noise=0.0):
        assert len(cache) == start_frame and context_noise == 0
        cache.append(block)

    def predict_velocity(self, noisy, sigma, cond):
        raise NotImplementedError

    def predict_velocity_with_context(self, noisy, sigma, clean, clean_sigma, cond):
        raise NotImplementedError

    def predict_velocity_streaming(self, noisy_block, sigma, cond, cache, start_frame):
        raise NotImplementedError


def gaussian_velocity(x, mean, variance, s):
    """(x - E[x0 | x]) / s for x0 ~ N(mean, variance), without the division."""
    gain = (s - (1 - s) * variance) / ((1 - s) ** 2 * variance + s**2)
    return gain * (x - (1 - s) * mean) - mean


class GaussianTeacher(Role):
    """The exact velocity for x0 ~ N(mean, covariance) over one dimension of the latents; unconditionally another mean."""

    def __init__(self, mean, other_mean, covariance, *, dimension=2, channels=DIM):
        super().__init__(nn.Linear(1, 1), channels=channels)
        self.mean, self.other_mean, self.dimension = mean, other_mean, dimension
        self.eigenvalues, self.basis = torch.linalg.eigh(covariance)

    def predict_velocity(self, noisy, sigma, cond):
        x = noisy.movedim(self.dimension, -1)
        unconditional = (cond.text == self.uncond_embeds[0]).all(1)
        mean = torch.where(unconditional[:, None], self.other_mean, self.mean) @ self.basis
        s, mean = (t.to(x.dtype).reshape(-1, 1, 1, 1, t.shape[-1]) for t in (sigma[:, :1], mean))
        velocity = gaussian_velocity(x @ self.basis.to(x.dtype), mean, self.eigenvalues.to(x.dtype), s)
        return (velocity @ self.basis.T.to(x.dtype)).movedim(-1, self.dimension)


class AutoregressiveTeacher(Causal):
    """Frame 1 ~ N(0, 1), frame 2 given frame 1 ~ N(rho x1 + drift, 1 - rho^2), channel by channel; the drift is 1 under a
    prompt and 0 without."""

    def __init__(self, rho, channels):
        super().__init__(nn.Linear(1, 1), channels=channels)
        self.rho = rho

    def predict_velocity_streaming(self, noisy_block, sigma, cond, cache, start_frame):
        drift = (cond.text != self.uncond_embeds[0]).any(1).to(noisy_block.dtype)[:, None, None, None, None]
        mean, variance = (self.rho * cache[-1] + drift, 1 - self.rho**2) if start_frame else (0.0, 1.0)
        return gaussian_velocity(noisy_block, mean, variance, sigma[:, :, None, None, None].to(noisy_block.dtype))


class LinearStudent(Role):
    """x0 = A x + b, with an A and a b of its own for each of the student's noise levels. `parameters` is all of them."""

    def __init__(self, levels):
        super().__init__(nn.Linear(1, len(levels) * DIM * (DIM + 1), bias=False, dtype=torch.float64))
        nn.init.zeros_(self.parameters)
        self.levels, self.calls = torch.tensor(levels), []

    @property
    def parameters(self):
        return self.transformer.weight

    def maps(self):
        """A [K, 6, 6], b [K, 6]."""
        both = self.parameters.reshape(len(self.levels), DIM, DIM + 1)
        return both[..., :DIM], both[..., DIM]

    def predict_velocity(self, noisy, sigma, cond):
        self.calls.append((noisy, sigma))
        level = (self.levels - sigma[:, :1]).abs().argmin(1)
        a, b = self.maps()
        x = noisy.flatten(1).double()
        x0 = torch.einsum("bij,bj->bi", a[level], x) + b[level]
        return ((x - x0) / sigma[:, :1]).reshape(noisy.shape)


class TwoFrameStudent(Causal):
    """x0 of a frame is a linear function of itself and of the frames that the project's mask lets it see."""

    def __init__(self, channels):
        super().__init__(nn.Linear(1, 6, bias=False, dtype=torch.float64), channels=channels)
        nn.init.zeros_(self.parameters)

    @property
    def parameters(self):
        return self.transformer.weight

    def coefficients(self):
        """`own[f]`, `other[f, g]`."""
        weights = self.parameters.flatten()
        return weights[:2], weights[2:].reshape(2, 2)

    def _velocity(self, x, frame, others, sigma):
        own, other = self.coefficients()
        x0 = own[frame] * x
        for start, end in blocks.earlier_frames(frame, frame + 1, -1, 0):
            x0 = x0 + sum(other[frame, g] * others[g] for g in range(start, end))
        return (x - x0) / sigma[:, :, None, None, None]

    def predict_velocity(self, noisy, sigma, cond):
        frames = noisy.split(1, dim=1)
        return torch.cat([self._velocity(frames[f], f, frames, sigma[:, f : f + 1]) for f in range(2)], dim=1)

    def predict_velocity_with_context(self, noisy, sigma, clean, clean_sigma, cond):
        assert clean_sigma.eq(0).all() and clean_sigma.shape == sigma.shape
        frames, others = noisy.split(1, dim=1), clean.split(1, dim=1)
        return torch.cat([self._velocity(frames[f], f, others, sigma[:, f : f + 1]) for f in range(2)], dim=1)

    def predict_velocity_streaming(self, noisy_block, sigma, cond, cache, start_frame):
        return self._velocity(noisy_block, start_frame, cache, sigma)


def batch_of(states, latents, step=1, positions=None):
    size = latents.shape[0]
    return {
        "states": states,
        "latents": latents,
        "prompt_embeds": [torch.full((2, 64), 0.5)] * size,
        "positions": torch.arange(size) if positions is None else positions,
        "sample_indices": torch.arange(size),
        "sample_passes": torch.full((size,), step),
    }


def method_for(cfg, student):
    """The method of `cfg` around a student, as after `on_train_start`; its data are the batches that a test gives it."""
    kind = KDCausalMethod if isinstance(cfg.method, KDCausalConfig) else KDMethod
    method = kind(cfg=cfg, role_models={"student": student})
    TrainingMethod.on_train_start(method)
    return method


def minimise(method, batch):
    """Put the student at the minimum of the method's own loss, which is quadratic in its parameters; returns that loss."""
    parameters = method.student.parameters
    loss, _ = method.single_train_step(batch, 1, "student")
    (gradient,) = torch.autograd.grad(loss, parameters, create_graph=True)
    rows = [torch.autograd.grad(g, parameters, retain_graph=True)[0].flatten() for g in gradient.flatten()]
    step = torch.linalg.pinv(torch.stack(rows), hermitian=True) @ gradient.detach().flatten()
    parameters.data -= step.reshape(parameters.shape)
    return float(method.single_train_step(batch, 1, "student")[0].detach())


def teacher_of(cfg, prompts):
    """The 6-dimensional Gaussian of oracles 4.4."""
    torch.manual_seed(0)
    a = torch.randn(DIM, DIM, dtype=torch.float64) / DIM**0.5
    covariance = a @ a.T + 0.05 * torch.eye(DIM, dtype=torch.float64)
    teacher = GaussianTeacher(*torch.randn(2, DIM, dtype=torch.float64), covariance)
    teacher.init_preprocessors(cfg, prompts)
    return teacher


def root(teacher, power, s=0.0):
    """((1 - s)^2 S + s^2 I)^power."""
    return teacher.basis @ torch.diag(((1 - s) ** 2 * teacher.eigenvalues + s**2) ** power) @ teacher.basis.T


def solved(cfg, prompts, size=2000):
    """(teacher, states [B, K, 6], x0 [B, 6]) of `size` trajectories."""
    teacher = teacher_of(cfg, prompts)
    states, x0 = make_trajectories(cfg, teacher, prompts, range(size), [1, DIM, 1, 1])
    return teacher, states.reshape(size, -1, DIM), x0.reshape(size, DIM)


def relative(a, b):
    return float((a - b).norm() / b.norm())


# ------------------------------------------------------------------------------------------- the ODE map (oracle 4.4)


def check_ode_map(base, prompts, shift=5.0):
    """Where 384 Euler steps end, and the states on the way, against the closed form."""
    cfg = configured(base.kd, shift=shift, teacher_inference_steps=384)
    teacher, states, x0 = solved(cfg, prompts)
    noise = states[:, 0]
    error = relative(x0 - teacher.mean, noise @ root(teacher, 0.5))
    assert error <= 0.012 and error == pytest.approx(EULER[shift], rel=0.15)
    for k, s in enumerate(cfg.method.ladder(shift)[:-1]):
        assert relative(states[:, k] - (1 - s) * teacher.mean, noise @ root(teacher, 0.5, s)) <= 0.012


@pytest.mark.parametrize("shift", SHIFTS)
def test_trajectories_follow_the_closed_form(base, prompts, shift):
    check_ode_map(base, prompts, shift)


@pytest.mark.parametrize("shift", SHIFTS)
def test_the_error_is_of_first_order(base, prompts, shift):
    errors = {}
    for steps in (48, 96):
        cfg = configured(base.kd, shift=shift, teacher_inference_steps=steps)
        teacher, states, x0 = solved(cfg, prompts)
        errors[steps] = relative(x0 - teacher.mean, states[:, 0] @ root(teacher, 0.5))
    assert errors[48] == pytest.approx({1.0: 0.028, 3.0: 0.036, 5.0: 0.050, 8.0: 0.071}[shift], rel=0.15)
    assert 1.8 <= errors[48] / errors[96] <= 2.2


def check_guidance(base, prompts, scale=3.0):
    """Guidance between two Gaussians of one covariance moves the mean to mu_u + w (mu_c - mu_u)."""
    cfg = configured(base.kd, teacher_inference_steps=384, teacher_guidance_scale=scale)
    teacher, states, x0 = solved(cfg, prompts)
    wanted = teacher.other_mean + scale * (teacher.mean - teacher.other_mean)
    assert (x0 - states[:, 0] @ root(teacher, 0.5)).mean(0).sub(wanted).abs().mean() <= 0.01


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_is_honoured(base, prompts, scale):
    check_guidance(base, prompts, scale)


def check_rungs(base, prompts, shift=5.0):
    """The stored timesteps, the student's and the sampler's are the warped list, to the last digit."""
    cfg = configured(base.kd, shift=shift)
    warped = [1000 * fm.shift_sigma(t / 1000, shift) for t in WARPED]
    contract = build_contract(cfg, prompts, DIM, "analytic")
    assert contract["timesteps"] == pytest.approx(warped, abs=1e-6)
    method = method_for(cfg, LinearStudent(cfg.method.ladder(shift)[:-1]))
    assert (1000 * method.sigmas).tolist() == pytest.approx(warped, abs=1e-4)  # float32
    assert [1000 * s for s in KDMethod.sampler(cfg).sigmas] == pytest.approx([*warped, 0], abs=1e-6)


@pytest.mark.parametrize("shift", SHIFTS)
def test_the_warped_ladder_lies_on_the_teachers(base, prompts, shift):
    assert configured(base.kd, shift=shift).method.rungs(shift) == (0, 12, 24, 36)
    check_rungs(base, prompts, shift)


def test_a_list_near_the_ladder_snaps_to_it(base):
    method = configured(base.kd, t_list=(999.0, 937.0, 833.0, 624.0, 0.0)).method
    assert method.rungs(5.0) == (0, 12, 24, 36)
    assert method.ladder(5.0) == fm.few_step_ladder(WARPED, 5.0)
    uneven = configured(base.kd, t_list=(1000.0, 625.0, 0.0), student_sample_steps=2).method
    assert uneven.rungs(5.0) == (0, 36)


# ------------------------------------------------------------------------------ regression recovers the map (oracle 4.5)


def regression(base, prompts, *, steps, shift=5.0, dtype="float64", size=4096):
    """(teacher, student at its minimum, residual) on `size` pairs."""
    cfg = configured(base.kd, shift=shift, teacher_inference_steps=steps, cache_dtype=dtype)
    teacher, states, x0 = solved(cfg, prompts, size)
    student = LinearStudent(cfg.method.ladder(shift)[:-1])
    batch = batch_of(states[:, :, None, :, None, None], x0[:, None, :, None, None])
    assert states.dtype == x0.dtype == getattr(torch, dtype)
    return teacher, student, 2 * minimise(method_for(cfg, student), batch)


@torch.no_grad()
def map_errors(teacher, student):
    """Of A relative, of b absolute, at each noise level."""
    of_a, of_b = [], []
    for a, b, s in zip(*student.maps(), student.levels.double().tolist(), strict=True):
        exact = root(teacher, 0.5) @ root(teacher, -0.5, s)
        of_a.append(relative(a, exact))
        of_b.append(float((b - (teacher.mean - (1 - s) * exact @ teacher.mean)).norm()))
    return of_a, of_b


@pytest.mark.parametrize(
    ("shift", "expected", "dtype", "residual"),
    [
        (5.0, [0.050, 0.049, 0.049, 0.047], "float64", 1e-15),
        (8.0, [0.071, 0.071, 0.071, 0.070], "float64", 1e-15),
        (5.0, [0.050, 0.049, 0.049, 0.047], "float32", 1e-11),
    ],
)
def test_regression_recovers_the_euler_map_exactly(base, prompts, shift, expected, dtype, residual):
    """Euler's map of a Gaussian is affine: nothing is left over."""
    teacher, student, left = regression(base, prompts, steps=48, shift=shift, dtype=dtype)
    assert 0 <= left <= residual
    assert map_errors(teacher, student)[0] == pytest.approx(expected, abs=0.0015)


def check_regression(base, prompts, shift=5.0):
    """With many steps that map is the ODE's."""
    teacher, student, left = regression(base, prompts, steps=384, shift=shift, size=1024)
    of_a, of_b = map_errors(teacher, student)
    assert left <= 1e-15 and round(max(of_a), 4) <= {5.0: 0.0064, 8.0: 0.0092}[shift] and max(of_b) <= 0.012


@pytest.mark.parametrize("shift", [5.0, 8.0])
def test_regression_recovers_the_ode_map(base, prompts, shift):
    check_regression(base, prompts, shift)


def check_noisy_rungs(base, prompts):
    """A student that returns its input pays the mean distance of the K states from the end: every rung the same share, and
    none is the end itself."""
    cfg = configured(base.kd)
    _, states, x0 = solved(cfg, prompts, 4096)
    student = LinearStudent(cfg.method.ladder(5.0)[:-1])
    student.predict_velocity = lambda noisy, sigma, cond: torch.zeros_like(noisy)
    batch = batch_of(states[:, :, None, :, None, None], x0[:, None, :, None, None])
    loss, metrics = method_for(cfg, student).single_train_step(batch, 1, "student")
    noisy = states[:, :4]
    assert metrics == {} and float(loss) == pytest.approx(float(0.5 * (noisy - x0[:, None]).square().mean()), rel=0.05)


def test_the_loss_is_half_the_mean_square_over_noisy_rungs(base, prompts):
    check_noisy_rungs(base, prompts)


# ------------------------------------------------------------------------- two frames, a causal student (oracle 4.6)

CHANNELS, VIDEOS = 200, 500  # channels are independent: 1e5 samples


def two_frames(base, prompts, rho, *, autoregressive, clean_context=True):
    """(method with its student at the minimum, residual). A causal student with one step, on the pairs of a teacher that
    knows both frames, or of one that makes the second from the first."""
    cfg = configured(base.kd_causal, frames=2, shift=1.0, teacher_inference_steps=384, student_sample_steps=1)
    if (rho, autoregressive) not in base.pairs:
        if autoregressive:
            teacher = AutoregressiveTeacher(rho, CHANNELS)
        else:
            covariance = torch.tensor([[1.0, rho], [rho, 1.0]], dtype=torch.float64)
            none = torch.zeros(2, dtype=torch.float64)
            teacher = GaussianTeacher(none, none, covariance, dimension=1, channels=CHANNELS)
        made_for = dataclasses.replace(cfg, method=dataclasses.replace(cfg.method, teacher_forcing=autoregressive))
        teacher.uncond_embeds = prompts[0]["prompt_embeds"]  # all are of this prompt: no drift
        indices = [len(prompts) * i for i in range(VIDEOS)]
        made = make_trajectories(made_for, teacher, prompts, indices, [2, CHANNELS, 1, 1])
        base.pairs[rho, autoregressive] = batch_of(*made)
    batch = base.pairs[rho, autoregressive]
    cfg = dataclasses.replace(cfg, method=dataclasses.replace(cfg.method, teacher_forcing=clean_context))
    method = method_for(cfg, TwoFrameStudent(CHANNELS))
    return method, 4 * minimise(method, batch)  # 0.5, and the mean over two frames of which one has a residual


def rollout_variances(method):
    """Of both frames, sampled as the method says from new noise."""
    rng = torch.Generator().manual_seed(1)
    noise = torch.randn(VIDEOS, 2, CHANNELS, 1, 1, generator=rng, dtype=torch.float64)
    cond = method.student.conditioning([torch.zeros(1, 64)] * VIDEOS)
    with torch.no_grad():
        video = samplers.sample(method.student, method.sampler(method.cfg), noise, cond, None, lambda rung: noise)
    return video.square().mean((0, 2, 3, 4)).tolist()


def halves(rho):
    """The bidirectional map is (a e1 + b e2, b e1 + a e2)."""
    return ((1 + rho) ** 0.5 + (1 - rho) ** 0.5) / 2, ((1 + rho) ** 0.5 - (1 - rho) ** 0.5) / 2


def check_bidirectional_pairs(base, prompts, rho=0.9):
    """Frame 1 cannot know what it was made with: the student learns a conditional mean, and streams too little variance."""
    (a, b), rest = halves(rho), (1 - rho**2) ** 0.5
    method, residual = two_frames(base, prompts, rho, autoregressive=False)
    own, other = method.student.coefficients()
    assert residual == pytest.approx(b**2, abs=0.02)
    assert own.tolist() == pytest.approx([a, rest / a], abs=0.02)
    assert other.flatten().tolist() == pytest.approx([0, 0, b / a, 0], abs=0.02)
    variances = rollout_variances(method)
    assert variances == pytest.approx([a**2, b**2 + rest**2 / a**2], abs=0.02)
    table = {0.5: (0.933, 0.8708), 0.9: (0.7179, 0.5467), 0.99: (0.5705, 0.4643)}
    assert variances == pytest.approx(table[rho], abs=0.02)


@pytest.mark.parametrize("rho", [0.5, 0.9, 0.99])
def test_pairs_of_a_bidirectional_teacher_are_biased(base, prompts, rho):
    check_bidirectional_pairs(base, prompts, rho)


def check_autoregressive_pairs(base, prompts, rho=0.9):
    method, residual = two_frames(base, prompts, rho, autoregressive=True)
    own, other = method.student.coefficients()
    assert residual <= 1e-15
    assert own.tolist() == pytest.approx([1, (1 - rho**2) ** 0.5], abs=0.02)
    assert other.flatten().tolist() == pytest.approx([0, 0, rho, 0], abs=0.02)
    assert rollout_variances(method) == pytest.approx([1, 1], abs=0.02)


@pytest.mark.parametrize("rho", [0.5, 0.9, 0.99])
def test_pairs_of_an_autoregressive_teacher_are_not(base, prompts, rho):
    check_autoregressive_pairs(base, prompts, rho)


def test_without_teacher_forcing_the_context_is_as_noisy_as_it_was_drawn(base, prompts):
    """Frame 2 then sees both noises: no residual of its own, and frame 1 is as it was."""
    a, b = halves(0.9)
    method, residual = two_frames(base, prompts, 0.9, autoregressive=False, clean_context=False)
    own, other = method.student.coefficients()
    assert residual == pytest.approx(b**2, abs=0.02)
    assert own.tolist() == pytest.approx([a, a], abs=0.02)
    assert other.flatten().tolist() == pytest.approx([0, 0, b, 0], abs=0.02)


def test_an_autoregressive_teacher_is_guided_too(base, prompts):
    """The drift of frame 2 is 1 under a prompt, 0 without, and w under guidance w."""
    cfg = configured(
        base.kd_causal, frames=2, teacher_inference_steps=384, teacher_forcing=True, teacher_guidance_scale=2.5
    )
    teacher = AutoregressiveTeacher(0.6, 1)
    teacher.init_preprocessors(cfg, prompts)
    states, x0 = make_trajectories(cfg, teacher, prompts, range(100), [2, 1, 1, 1])
    (first, second), noise = x0.flatten(1).T, states[:, 0].flatten(1)
    assert states.shape == (100, 4, 2, 1, 1, 1)
    assert (first - noise[:, 0]).abs().max() <= 0.02
    assert (second - (0.6 * first + 2.5 + 0.8 * noise[:, 1])).abs().max() <= 0.03


# --------------------------------------------------------------------------------------------- mutations (4.16)


def integer_timesteps(patch):
    exact = fm.euler_ladder
    for module in (fm, trajectories):
        patch.setattr(module, "euler_ladder", lambda n, shift: [round(1000 * s) / 1000 for s in exact(n, shift)])


def pairs_at_another_shift(patch):
    patch.setattr(trajectories, "euler_ladder", lambda steps, shift: fm.euler_ladder(steps, 8.0))


def the_end_is_drawn(patch):
    ladder, stored = KDConfig.ladder, KDConfig.stored
    patch.setattr(KDConfig, "ladder", lambda self, shift: (*ladder(self, shift), 0.0))
    patch.setattr(KDConfig, "stored", lambda self, shift: (*stored(self, shift), self.teacher_inference_steps))


def another_guidance(patch):
    patch.setattr(samplers, "guide", lambda c, u, scale: c + scale * (c - u))


def the_last_but_one_state(patch):
    exact = samplers.euler_states

    def states(*arguments):
        *found, _ = exact(*arguments)
        return iter([*found, found[-1]])

    patch.setattr(samplers, "euler_states", states)


def the_future_is_visible(patch):
    patch.setattr(blocks, "earlier_frames", lambda start, end, window, sink: ((0, start), (end, 2)))


def a_noisy_context(patch):
    exact = KDCausalMethod.predict_x0
    patch.setattr(KDCausalMethod, "predict_x0", lambda self, x, s, x0, batch: exact(self, x, s, x, batch))


def one_rung_a_video(patch):
    patch.setattr(KDCausalMethod, "draw_rungs", KDMethod.draw_rungs)


def check_rungs_of_blocks(base, prompts):
    """Uniform over the rungs, one a block, independent of the other blocks and samples."""
    cfg = configured(base.kd_causal, frames=6)
    student = TwoFrameStudent(1)
    student.causal = CausalConfig(2)
    method = method_for(cfg, student)
    rung = method.draw_rungs(batch_of(None, torch.empty(4000, 6)), 1, "student", 6)
    assert rung.shape == (4000, 6)
    by_block = rung.view(4000, 3, 2)
    assert by_block[..., 0].equal(by_block[..., 1])
    for block in by_block[..., 0].T:
        counts = block.bincount(minlength=4)
        assert len(counts) == 4 and ((counts - 1000) ** 2 / 1000).sum() < 16.3  # chi2, p = 1e-3
    assert (torch.corrcoef(by_block[..., 0].T.double()) - torch.eye(3)).abs().max() <= 0.05


MUTATIONS = [
    (pairs_at_another_shift, check_regression),
    (the_end_is_drawn, check_noisy_rungs),
    (another_guidance, check_guidance),
    (the_last_but_one_state, check_regression),
    (the_last_but_one_state, check_ode_map),
    (the_future_is_visible, check_bidirectional_pairs),
    (a_noisy_context, check_bidirectional_pairs),
    (integer_timesteps, check_rungs),
    (one_rung_a_video, check_rungs_of_blocks),
]


@pytest.mark.parametrize(("mutation", "check"), MUTATIONS, ids=lambda function: function.__name__)
def test_mutations_are_noticed(base, prompts, monkeypatch, mutation, check):
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        check(base, prompts)


def test_rungs_are_drawn_by_block(base, prompts):
    check_rungs_of_blocks(base, prompts)


# ------------------------------------------------------------------------------------------------------ single steps


class Recorder(TwoFrameStudent):
    """Blocks of two frames; keeps what it was given, and returns it."""

    causal = CausalConfig(2)

    def __init__(self, channels):
        super().__init__(channels)
        self.calls = []

    def predict_velocity(self, noisy, sigma, cond):
        self.calls.append((noisy, sigma))
        return torch.zeros_like(noisy)

    def predict_velocity_with_context(self, noisy, sigma, clean, clean_sigma, cond):
        self.calls.append((noisy, sigma, clean, clean_sigma))
        return torch.zeros_like(noisy)


def random_batch(size=6, frames=4, dtype=torch.bfloat16, shape=(2, 1, 1), rungs=4):
    rng = torch.Generator().manual_seed(0)
    states = torch.randn(size, rungs, frames, *shape, generator=rng).to(dtype)
    return batch_of(states, torch.randn(size, frames, *shape, generator=rng).to(dtype))


@pytest.mark.parametrize("kind", ["kd", "kd_causal", "teacher_forcing"])
def test_a_frame_gets_the_state_and_the_level_of_its_rung(base, kind):
    """Bitwise; in float32 from a bfloat16 cache; the target is the end, and under teacher forcing the context too."""
    keys = {"teacher_forcing": True} if kind == "teacher_forcing" else {}
    cfg = configured(base.kd if kind == "kd" else base.kd_causal, frames=4, **keys)
    method, batch = method_for(cfg, Recorder(2)), random_batch()
    loss, _ = method.single_train_step(batch, 3, "student")
    noisy, sigma, *context = method.student.calls[0]
    rung = method.draw_rungs(batch, 3, "student", 4)
    ladder = torch.tensor(cfg.method.ladder(5.0))
    assert noisy.dtype == sigma.dtype == torch.float32 and rung.unique().numel() > 2
    for sample in range(6):
        for frame in range(4):
            k = rung[sample, frame]
            assert torch.equal(noisy[sample, frame], batch["states"][sample, k, frame].float())
            assert sigma[sample, frame] == ladder[k]
    assert float(loss) == pytest.approx(float(0.5 * (noisy - batch["latents"].float()).square().mean()), rel=1e-6)
    if kind == "kd":
        assert rung.eq(rung[:, :1]).all()
    elif kind == "kd_causal":
        assert not rung.eq(rung[:, :1]).all() and not context
    else:
        clean, level = context
        assert torch.equal(clean, batch["latents"].float()) and level.eq(0).all() and level.shape == (6, 4)


@pytest.mark.parametrize("kind", ["kd", "kd_causal"])
def test_draws_belong_to_samples_and_have_a_name(base, monkeypatch, kind):
    """The same rungs for a sample in any split, others in the next step; none from the global generator."""
    names = []
    draw = SampleStreams.rand
    monkeypatch.setattr(SampleStreams, "rand", lambda self, name, *s: names.append(name) or draw(self, name, *s))
    method, batch = method_for(configured(getattr(base, kind), frames=4), Recorder(2)), random_batch(32)
    state = torch.get_rng_state()
    method.single_train_step(batch, 1, "student")
    assert names == ["rung"] and torch.equal(torch.get_rng_state(), state)
    half = batch_of(batch["states"][16:], batch["latents"][16:], positions=torch.arange(16, 32))
    method.single_train_step(half, 1, "student")
    method.single_train_step(batch, 2, "student")
    (_, whole), (_, second), (_, later) = method.student.calls
    assert torch.equal(second, whole[16:]) and not torch.equal(later, whole)


def wan_method(base, kind, **method):
    """Around the tiny Wan with random weights, blocks of one frame."""
    transformer = random_transformer(FLAVORS["tiny"])
    if kind == "kd":
        return method_for(configured(base.kd, frames=3, **method), bidirectional_model(transformer))
    cfg = configured(base.kd_causal, frames=3, teacher_forcing=kind == "teacher_forcing", **method)
    return method_for(cfg, causal_model(transformer, 1))


@pytest.mark.parametrize("kind", ["kd", "kd_causal", "teacher_forcing"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_every_parameter_learns_from_any_cache(base, kind, dtype):
    method, batch = wan_method(base, kind), random_batch(2, 3, dtype, (16, 4, 4))
    loss, _ = method.single_train_step(batch, 1, "student")
    loss.backward()
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert all(parameter.grad.norm() > 0 for parameter in method.student.transformer.parameters())


def check_mask(base, kind):
    """What the student makes of a block does not change with later blocks, noisy or clean; nor, under teacher forcing, with the
    block's own clean copy."""
    method, batch = wan_method(base, kind), random_batch(1, 3, torch.float32, (16, 4, 4))
    noisy, x0 = batch["states"][:, 0], batch["latents"]
    sigma = torch.tensor([[0.9, 0.6, 1.0]])

    def changed(noisy, x0):
        with torch.no_grad():
            return method.predict_x0(noisy, sigma, x0, batch).ne(method.predict_x0(*given, batch)).flatten(2).any(2)[0]

    given = (noisy, sigma, x0)
    for frame in range(3):
        bump = torch.zeros(1, 3, 1, 1, 1)
        bump[:, frame] = 1.0
        later = [f > frame for f in range(3)]
        own = [f == frame for f in range(3)]
        if kind == "teacher_forcing":
            assert changed(noisy + bump, x0).tolist() == own
            assert changed(noisy, x0 + bump).tolist() == later
        else:
            assert changed(noisy + bump, x0).tolist() == [a or b for a, b in zip(own, later, strict=True)]


@pytest.mark.parametrize("kind", ["kd_causal", "teacher_forcing"])
def test_the_future_is_not_seen(base, kind):
    check_mask(base, kind)


def test_a_full_mask_would_be_noticed(base, monkeypatch):
    monkeypatch.setattr(WanCausalModel, "_plan", lambda self, frames, clean_context=False: None)
    with pytest.raises(AssertionError):
        check_mask(base, "kd_causal")


def test_how_students_are_sampled(base):
    """On the rungs they were trained at, without guidance; the causal one streams."""
    for cfg, kind in ((base.kd, KDMethod), (base.kd_causal, KDCausalMethod)):
        spec = kind.sampler(configured(cfg, student_sample_type="ode", teacher_guidance_scale=6.0))
        assert spec.sigmas == pytest.approx([1.0, 0.9375, 0.833333, 0.625, 0.0], abs=1e-6)
        assert (spec.solver, spec.guidance_scale, spec.streaming) == ("ode", 1.0, kind is KDCausalMethod)
        assert kind.sampler(cfg).solver == "sde" and not kind.needs_latents(cfg)


# ------------------------------------------------------------------------------- from the teacher to what is learned


def test_what_is_read_is_what_was_made(base, prompts, tmp_path, single_process_group):
    """Through the files: states, ends and prompts of every sample, bitwise; and the method reads nothing else."""
    cfg = configured(base.kd, num_trajectories=30, teacher_path_cache=str(tmp_path / "t"), teacher_inference_steps=8)
    cfg = dataclasses.replace(cfg, training=dataclasses.replace(cfg.training, local_batch_size=4))
    teacher = teacher_of(cfg, prompts)
    cache = prepare_trajectories(cfg, teacher, prompts, DIM)
    states, x0 = make_trajectories(cfg, teacher, prompts, range(30), [1, DIM, 1, 1])
    assert len(cache) == 30 and cache.bucket_indices == [range(30)]
    for i in range(30):
        sample, prompt = cache[i], prompts[i % 12]
        assert sample.keys() == {"sample_id", "caption", "prompt_embeds", "states", "latents"}
        torch.testing.assert_close(sample["states"], states[i], rtol=1e-12, atol=1e-12)  # another batch size
        torch.testing.assert_close(sample["latents"], x0[i], rtol=1e-12, atol=1e-12)
        assert torch.equal(sample["prompt_embeds"], prompt["prompt_embeds"]) and sample["caption"] == prompt["caption"]
    assert [cache[i]["sample_id"] for i in (0, 11, 12)] == ["0.mp4#0", "11.mp4#0", "0.mp4#1"]
    noise = torch.stack([cache[i]["states"][0] for i in range(30)]).flatten(1)
    assert abs(float(noise.mean())) < 0.3 and noise.unique().numel() == 180  # nobody's noise is another's

    student = LinearStudent(cfg.method.ladder(5.0)[:-1])
    method = KDMethod(cfg=cfg, role_models={"student": student, "teacher": teacher})
    method.on_train_start()
    assert method.role_models == {"student": student} and method.data.fingerprint == cache.fingerprint
    assert torch.equal(method.data[17]["states"], cache[17]["states"])


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("models", "method", "overrides", "message"),
    [
        ({"student": {"trainable": False}}, {}, {}, "models.student.trainable = false: kd would have nothing to train"),
        ({"teacher": {"trainable": True}}, {}, {}, "models.teacher.trainable: kd needs false, the teacher is frozen"),
        ({"teacher": {"init_from": "", "flavor": "tiny"}}, {}, {}, "models.teacher.init_from is empty"),
        (
            {"teacher": {"name": "wan_causal", "frames_per_block": 1}},
            {},
            {},
            "models.teacher.name = 'wan_causal': these trajectories are made by a 'wan' teacher",
        ),
        ({"critic": {"flavor": "tiny"}}, {}, {}, "[models.critic] is not a role of 'kd'"),
        ({}, {"teacher_path_cache": ""}, {}, "method.teacher_path_cache is empty"),
        ({}, {"num_trajectories": 0}, {}, "method.num_trajectories = 0: must be >= 1"),
        ({}, {"teacher_inference_steps": 0}, {}, "method.teacher_inference_steps = 0: must be >= 1"),
        ({}, {"student_sample_steps": 0}, {}, "method.student_sample_steps = 0: must be >= 1"),
        ({}, {"teacher_guidance_scale": -1.0}, {}, "method.teacher_guidance_scale = -1.0: must be >= 0"),
        ({}, {"teacher_inference_steps": 50, "student_sample_steps": 4}, {}, "nearest: 48 or 52; or give t_list"),
        ({}, {"teacher_inference_steps": 2, "student_sample_steps": 4}, {}, "student_sample_steps = 4 does not divide"),
        ({}, {"t_list": [1000.0, 0.0]}, {}, "need student_sample_steps + 1 = 3 timesteps, the last one 0"),
        ({}, {"t_list": [1000.0, 900.0, 500.0]}, {}, "need student_sample_steps + 1 = 3 timesteps, the last one 0"),
        (
            {},
            {"t_list": [1000.0, 830.0, 0.0]},
            {},
            "method.t_list: 830 is not near a step of the teacher's ladder (teacher_inference_steps = 4, shift 3); the "
            "nearest is 900",
        ),
        ({}, {"t_list": [900.0, 750.0, 0.0]}, {}, "need descending timesteps that begin at 1000"),
        ({}, {"t_list": [1000.0, 999.0, 0.0]}, {}, "need descending timesteps that begin at 1000"),
        ({}, {"t_list": [1000.0, 750.0, 900.0, 0.0], "student_sample_steps": 3}, {}, "need descending timesteps"),
        ({}, {"t_list": [1000.0, 750.0, 0.0, 0.0], "student_sample_steps": 3}, {}, "0 is not a timestep in (0, 1000]"),
        ({}, {"t_list": [1000.0, "750", 0.0]}, {}, "method.t_list[1] = '750' has the wrong type"),
        ({}, {"cache_dtype": "float16"}, {}, "method.cache_dtype = 'float16' is not allowed"),
        ({}, {"student_sample_type": "sd"}, {}, "Did you mean 'sde'"),
        ({}, {"teacher_forcing": True}, {}, "unknown key method.teacher_forcing"),
        ({}, {"num_trajectory": 3}, {}, "Did you mean 'num_trajectories'"),
        (
            {},
            {},
            {"validation__enable": True, "validation__heldout_path": "held_out"},
            "validation.heldout_path = 'held_out': a few-step student has no flow-matching loss",
        ),
        ({}, {}, {"schedule__shift": 0.0}, "schedule.shift = 0.0: must be > 0"),
        # a causal student
        ({"student": {"name": "wan_causal", "frames_per_block": 1}}, {}, {}, "method 'kd' trains a 'wan' student"),
        (
            {"student": {"name": "wan", "frames_per_block": 0}},
            {"name": "kd_causal"},
            {},
            "trains a 'wan_causal' student",
        ),
        (
            {},
            {"name": "kd_causal", "num_frames_per_block": 3},
            {},
            "method.num_frames_per_block = 3, but models.student.frames_per_block = 1",
        ),
        (
            {"student": {"frames_per_block": 2}},
            {"name": "kd_causal"},
            {},
            "3 latent frames do not divide into blocks of 2",
        ),
        (
            {"teacher": {"name": "wan_causal", "frames_per_block": 1}},
            {"name": "kd_causal"},
            {},
            "models.teacher.name = 'wan_causal': these trajectories are made by a 'wan' teacher",
        ),
        (
            {"teacher": {"name": "wan", "frames_per_block": 0}},
            {"name": "kd_causal", "teacher_forcing": True},
            {},
            "models.teacher.name = 'wan': these trajectories are made by a 'wan_causal' teacher",
        ),
        (
            {"teacher": {"frames_per_block": 3}},
            {"name": "kd_causal", "teacher_forcing": True},
            {},
            "method.teacher_forcing: models.student and models.teacher must see time alike",
        ),
        (
            {"teacher": {"local_attn_frames": 2}},
            {"name": "kd_causal", "teacher_forcing": True},
            {},
            "method.teacher_forcing: models.student and models.teacher must see time alike",
        ),
    ],
)
def test_config_errors_are_one_line(tmp_path, models, method, overrides, message):
    with pytest.raises(UserError) as error:
        small_config("nowhere", tmp_path, job__config_file=kd_recipe(tmp_path, models, **method), **overrides)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_is_allowed(tmp_path):
    """One step, no teacher, guidance 0 and 1, blocks named twice alike."""
    recipe = kd_recipe(tmp_path, {"teacher": None}, student_sample_steps=1, teacher_guidance_scale=0.0)
    assert small_config("nowhere", tmp_path, job__config_file=recipe).method.ladder(3.0) == (1.0, 0.0)
    recipe = kd_recipe(tmp_path, name="kd_causal", teacher_forcing=True, num_frames_per_block=1)
    cfg = small_config("nowhere", tmp_path, job__config_file=recipe)
    assert cfg.method.autoregressive and cfg.method.rungs(3.0) == (0, 2)
    assert cfg.method.stored(3.0) == (0, 2)
    whole = dataclasses.replace(cfg.method, store_whole_trajectories=True)
    assert whole.stored(3.0) == (0, 1, 2, 3) and whole.rungs(3.0) == (0, 2)
