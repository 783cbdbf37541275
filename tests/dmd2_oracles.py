"""What DMD2 must satisfy, as functions that raise `AssertionError`: tests call them, and the mutation test calls them on
broken code. Roles are analytic or a small MLP; everything else is the method's own code."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fvtitan import flow_matching as fm
from fvtitan.components.ema import EMA
from fvtitan.components.rng import generator, seed_global_generators
from fvtitan.distributed.utils import local_tensor, reshard
from fvtitan.methods import dmd2
from fvtitan.methods.dmd2 import DMD2Method
from fvtitan.models.base import Conditioning, ModelBase
from tests.helpers import dmd2_recipe, small_config, train

STANDARD_ERRORS = 5
ONE_STEP = [1000.0]
AUTHORS = [1000.0, 750.0, 500.0, 250.0]


class Role(ModelBase):
    """A role given by a function of `(noisy, sigma [B, T, 1, 1, 1], cond)`: its denoised latents, or its velocity. Latents are
    [B, T, channels, H, W]. Records its calls."""

    def __init__(self, *, channels=1, x0=None, velocity=None, module=None, trainable=True, identity="", schedule=None):
        super().__init__(module or nn.Linear(1, 1), trainable=trainable, schedule=schedule, device=torch.device("cpu"))
        self.latent_channels, self.x0, self.velocity, self.identity = channels, x0, velocity, identity
        self.calls: list[dict[str, Any]] = []

    def check_cache(self, cfg, cache):
        pass

    def num_tokens(self, sizes, latent_shape):
        return latent_shape[0]

    def conditioning(self, prompt_embeds):
        if isinstance(prompt_embeds, Tensor):  # in bulk
            return Conditioning(prompt_embeds)
        return Conditioning(torch.stack([embeds[0] for embeds in prompt_embeds]))

    def predict_velocity(self, noisy, sigma, cond):
        call = {"noisy": noisy.detach(), "sigma": sigma, "cond": cond, "grad": torch.is_grad_enabled()}
        self.calls.append(call)
        level = sigma[:, :, None, None, None]
        if self.velocity is not None:
            return self.velocity(noisy, level, cond)
        return (noisy - self.x0(noisy, level, cond)) / level


class Gaussian(nn.Module):
    """x = m + tau z, as a one-step student."""

    def __init__(self, mean: float, std: float):
        super().__init__()
        self.mean, self.std = nn.Parameter(torch.tensor(mean)), nn.Parameter(torch.tensor(std))

    def forward(self, noise: Tensor, sigma: Tensor | None = None, cond: Conditioning | None = None) -> Tensor:
        return self.mean + self.std * noise


def posterior(mean: Tensor | float, variance: Tensor | float, noisy: Tensor, sigma: Tensor) -> Tensor:
    """E[x0 | noisy] for x0 ~ N(mean, variance) (oracles 4.3)."""
    gain = (1 - sigma) * variance / ((1 - sigma) ** 2 * variance + sigma**2)
    return mean + gain * (noisy - (1 - sigma) * mean)


def toy_config(cache: Path, folder: Path, steps: list[float] | tuple[float, ...] = ONE_STEP, *, frames=1, **overrides):
    """A run's configuration for latents [B, frames, channels, 1, 1]."""
    method = {key.removeprefix("method__"): overrides.pop(key) for key in list(overrides) if key.startswith("method__")}
    folder.mkdir(parents=True, exist_ok=True)
    recipe = dmd2_recipe(folder, denoising_steps=list(map(float, steps)), **method)
    keys = {"schedule__shift": 5.0, "data__caption_dropout": 0.0, "optimizer__weight_decay": 0.0, **overrides}
    cfg = small_config(cache, folder, job__config_file=recipe, **keys)
    cfg.data.num_frames, cfg.data.height, cfg.data.width = 4 * frames - 3, 8, 8
    return cfg


def toy_method(cfg, student: Role, teacher: Role, critic: Role) -> DMD2Method:
    method = DMD2Method(cfg=cfg, role_models={"student": student, "teacher": teacher, "critic": critic})
    method.on_train_start()
    return method


def gaussian_method(
    cache, folder, *, student=(0.7, 0.5), teacher=(-0.4, 1.2), guidance=1.0, channels=1, **keys
) -> DMD2Method:
    """A one-step Gaussian student, the exact score of a Gaussian teacher, and a critic that always knows the student.

    Unconditionally (the cache's empty prompt) the teacher's mean is -0.5.
    """
    cfg = toy_config(cache, folder, method__teacher_guidance_scale=guidance, **keys)
    module = Gaussian(*student)
    mean, std = teacher

    def real(noisy: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        conditional = cond.text.eq(0).all(1).reshape(-1, 1, 1, 1, 1)
        return posterior(torch.where(conditional, mean, -0.5), std**2, noisy, sigma)

    def fake(noisy: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        return posterior(module.mean.detach(), module.std.detach() ** 2, noisy, sigma)

    return toy_method(
        cfg,
        Role(channels=channels, x0=module, module=module),
        Role(channels=channels, x0=real, trainable=False),
        Role(channels=channels, x0=fake),
    )


def batch_of(size: int, step: int = 1, *, positions=None, latents: Tensor | None = None) -> dict[str, Any]:
    batch = {
        "prompt_embeds": [torch.zeros(1, 64)] * size,
        "positions": torch.arange(size) if positions is None else torch.as_tensor(positions),
        "sample_indices": torch.arange(size),
        "sample_passes": torch.full((size,), step),
        "sample_ids": [f"{i}.mp4" for i in range(size)],
    }
    return batch if latents is None else {**batch, "latents": latents}


class BulkStreams:
    """`SampleStreams` with one generator a draw instead of one a sample: the toys draw millions."""

    def __init__(self, prefix: tuple[int | str, ...], size: int):
        self.prefix, self.size = prefix, size

    def randn(self, name: str, *shape: int) -> Tensor:
        return torch.randn((self.size, *shape), generator=generator("cpu", *self.prefix, name))

    def rand(self, name: str, *shape: int) -> Tensor:
        return torch.rand((self.size, *shape), generator=generator("cpu", *self.prefix, name))


def in_bulk(method: DMD2Method) -> DMD2Method:
    """Draws and prompts of a whole batch at once."""
    seed = method.cfg.training.seed
    method.streams = lambda batch, step, role: BulkStreams((seed, step, role), len(batch["positions"]))
    method.prompt_embeds = lambda batch: torch.zeros(len(batch["positions"]), 64)
    return method


def run(method: DMD2Method, steps: int, batch_size: int, after: Callable[[int, str], None] | None = None) -> None:
    """What train.py does, without clipping, for these steps."""
    batch = batch_of(batch_size)
    for step in range(1, steps + 1):
        for role in method.phases(step):
            loss, _ = method.single_train_step(batch, step, role)
            loss.backward()
            method.optimizers[role].step()
            method.optimizers[role].zero_grad()
            method.lr_schedulers[role].step()
            if after is not None:
                after(step, role)


def close(found: float | Tensor, expected: float, error: float) -> None:
    assert abs(float(found) - expected) <= error, f"{float(found)} is not {expected} +- {error}"


# --------------------------------------------------------------------------------------- the gradient


def check_gradient(cache: Path, folder: Path, sigma: float, draws: int = 4_000_000) -> None:
    """E[g], E[g z], and the student's parameter gradients, at one noise level in closed form; one sample of many numbers, so
    that the normaliser is one number, which is logged."""
    (m, tau), (mu, std) = (0.7, 0.5), (-0.4, 1.2)
    method = gaussian_method(cache, folder, student=(m, tau), teacher=(mu, std), channels=draws)
    # Outside of this interval is every draw: all are moved to its end.
    method.cfg.method.min_score_timestep = method.cfg.method.max_score_timestep = 1000 * sigma
    batch = batch_of(1)
    generated = method.generate(batch, method.prompt_embeds(batch), method.streams(batch, 1, "student"), 1, "student")
    loss, metrics = method.student_step(batch, 1)
    loss.backward()
    gradient, again = method.score(
        generated.detach(), method.prompt_embeds(batch), method.streams(batch, 1, "student"), 1
    )
    scale = float(metrics["dmd/student_real_distance"])
    assert scale == float(again["dmd/student_real_distance"])
    s, keep = sigma, 1 - sigma
    real, fake = keep**2 * std**2 + s**2, keep**2 * tau**2 + s**2
    g, z = gradient.double() * scale, (generated.detach().double() - m) / tau
    expected = {
        "g": (g, (m - mu) * s**2 / real),
        "g z": (g * z, keep**2 * tau * (tau**2 / fake - std**2 / real)),
    }
    for values, mean in expected.values():
        close(values.mean(), mean, STANDARD_ERRORS * float(values.std()) / draws**0.5)
    kl = {
        "m": (method.student.transformer.mean, g, keep**2 * (m - mu) / real),
        "tau": (method.student.transformer.std, g * z, keep**2 * tau * (1 / real - 1 / fake)),
    }
    factor = keep**2 / s**2
    for parameter, values, derivative in kl.values():
        error = STANDARD_ERRORS * factor * float(values.std()) / draws**0.5
        close(factor * scale * parameter.grad, derivative, error)
    # |x - real| is a folded normal: real = mu + a (x_s - keep mu), x - real = (1 - a keep) x - a s eps - (1 - a keep) mu.
    a = keep * std**2 / real
    centre, spread = (1 - a * keep) * (m - mu), math.hypot((1 - a * keep) * tau, a * s)
    ratio = centre / spread
    folded = spread * math.sqrt(2 / math.pi) * math.exp(-(ratio**2) / 2) + centre * math.erf(ratio / math.sqrt(2))
    close(scale, folded, STANDARD_ERRORS * math.hypot(centre, spread) / draws**0.5)


# ------------------------------------------------------------------------ the loss and the normaliser


def check_loss_identity() -> None:
    """L = 0.5 mean(grad^2) and dL/dx numel = (fake - real) / mean|x - real| per sample."""
    rng = torch.Generator().manual_seed(0)
    x, real, fake = (torch.randn(3, 5, 4, 2, 2, generator=rng) for _ in range(3))
    x.requires_grad_()
    gradient = dmd2.distribution_matching_gradient(x.detach(), real, fake)
    loss = dmd2.distribution_matching_loss(x, gradient)
    loss.backward()
    expected = torch.stack([(f - r) / (v - r).abs().mean() for v, r, f in zip(x.detach(), real, fake, strict=True)])
    close((gradient - expected).norm() / expected.norm(), 0, 1e-6)
    close((x.grad * x.numel() - expected).norm() / expected.norm(), 0, 1e-6)
    close(loss.detach() / (0.5 * expected.square().mean()), 1, 1e-6)


def check_small_gradients_survive(scale: float) -> None:
    """Videos in bfloat16, a gradient of this size: dL/dx has it to 1 %."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 4, 8, 8, generator=rng).bfloat16().requires_grad_()
    gradient = scale * torch.randn(x.shape, generator=rng)
    dmd2.distribution_matching_loss(x, gradient).backward()
    close((x.grad.float() * x.numel() - gradient).norm() / gradient.norm(), 0, 1e-2)


def check_normaliser_is_per_sample() -> None:
    """A sample with values 1000 times as large leaves the others' gradient as it is, exactly."""
    rng = torch.Generator().manual_seed(2)
    x, real, fake = (torch.randn(2, 3, 4, 2, 2, generator=rng) for _ in range(3))
    before = dmd2.distribution_matching_gradient(x, real, fake)
    real[0] *= 1000
    after = dmd2.distribution_matching_gradient(x, real, fake)
    close((after[1] - before[1]).abs().max(), 0, 0)
    assert not torch.equal(after[0], before[0])


# ------------------------------------------------------------------------------------- guidance's fixed point


def check_guidance_fixed_point(cache: Path, folder: Path, guidance: float, *, normaliser: bool = False) -> None:
    """Trained by the method, the mean settles at mu_u + g (mu_c - mu_u)."""
    keys = {"training__steps": 600, "optimizer__lr": 0.1, "lr_scheduler__warmup_steps": 0}
    keys |= {"lr_scheduler__decay_type": "linear", "method__student_update_interval": 1}
    method = in_bulk(gaussian_method(cache, folder, student=(0.0, 1.0), teacher=(1.0, 1.0), guidance=guidance, **keys))
    method.phases = lambda step: ("student",)
    mean, std = method.student.transformer.mean, method.student.transformer.std
    gradient_of = dmd2.distribution_matching_gradient
    std.requires_grad_(False)
    try:
        if not normaliser:  # a number alone comes arbitrarily near to `real`
            dmd2.distribution_matching_gradient = lambda x, real, fake: fake - real
        run(method, 600, 64)
    finally:
        dmd2.distribution_matching_gradient = gradient_of
    close(mean.detach(), -0.5 + guidance * 1.5, 0.05)


# ------------------------------------------------------------------------------------ where scores are asked


def check_score_levels(cache: Path, folder: Path, draws: int = 100_000) -> None:
    """The law of sigma: F(s) = s / (5 - 4 s) on (.02, .98), atoms at its ends; continuous; one level a sample; and the noised
    videos are at that level."""
    method = in_bulk(gaussian_method(cache, folder, frames=3))
    streams = method.streams(batch_of(draws), 1, "student")
    sigma, noisy = method.noise_for_scores(torch.zeros(draws, 3, 1, 1, 1), streams)
    assert sigma.shape == (draws, 3) and sigma.eq(sigma[:, :1]).all()
    drawn = sigma[:, 0].double().sort().values
    low, high = float(drawn.eq(drawn[0]).double().mean()), float(drawn.eq(drawn[-1]).double().mean())
    close(drawn[0], 0.02, 1e-7)
    close(drawn[-1], 0.98, 1e-7)
    close(low, 0.02 / 4.92, 0.001)
    close(high, 1 - 0.98 / 1.08, 0.004)
    inside = drawn[(drawn > drawn[0]) & (drawn < drawn[-1])]
    empirical = low + torch.arange(1, len(inside) + 1) / draws
    close((empirical - inside / (5 - 4 * inside)).abs().max(), 0, 0.01)
    assert inside.unique().numel() > 0.95 * inside.numel(), "levels on a grid"
    noise = streams.randn("score_noise", 3, 1, 1, 1)
    torch.testing.assert_close(noisy, sigma[..., None, None, None] * noise)


def check_ladder(cache: Path, folder: Path) -> None:
    """The rungs that the student is asked at, exactly; never whole timesteps."""
    method = gaussian_method(cache, folder, steps=AUTHORS)
    spec = method.sampler(method.cfg)
    expected = [1.0, 15 / 16, 5 / 6, 5 / 8, 0.0]
    for sigmas in ((*method.sigmas, 0.0), spec.sigmas):
        assert len(sigmas) == 5
        for found, wanted in zip(sigmas, expected, strict=True):
            close(found, wanted, 1e-6)
    assert spec.solver == "sde" and spec.guidance_scale == 1 and not spec.streaming
    calls = asked(method, 4)
    for found, wanted in zip(calls, expected[:4], strict=True):
        close(found["sigma"].max(), wanted, 1e-6)
        close(found["sigma"].min(), wanted, 1e-6)


def asked(method: DMD2Method, rungs: int) -> list[dict[str, Any]]:
    """The student's calls in the first student phase that walks all of its rungs."""
    step = next(step for step in range(1, 1000) if method.exit_rung(step, "student") == rungs - 1)
    method.student.calls.clear()
    method.student_step(batch_of(3), step)
    return method.student.calls


# ----------------------------------------------------------------------------------- what the critic learns


class MLP(nn.Module):
    """A velocity `[B, T, C, 1, 1]`, T C = channels, by 3 x 64 from latents and the one sigma of a sample."""

    def __init__(self, channels: int, seed: int):
        super().__init__()
        self.channels = channels
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                *(nn.Linear(channels + 1, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU()),
                *(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, channels)),
            )

    def forward(self, noisy: Tensor, sigma: Tensor, cond: Conditioning | None = None) -> Tensor:
        x = torch.cat([noisy.flatten(1), 2 * sigma.flatten(1)[:, :1] - 1], dim=1)
        return self.layers(x).reshape(noisy.shape)


def critic_floor(tau: float) -> float:
    """E over the law of sigma of tau^2 / c^2, by the midpoint rule."""
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    s = fm.shift_sigma(u, 5.0).clamp(0.02, 0.98)
    return float((tau**2 / ((1 - s) ** 2 * tau**2 + s**2)).mean())


def critic_toy(cache: Path, folder: Path, tau: float, critic: Role, **keys: Any) -> DMD2Method:
    """A student that makes N(0, tau^2), and this critic."""
    student = Gaussian(0.0, tau)
    teacher = Role(x0=lambda noisy, sigma, cond: noisy, trainable=False)
    cfg = toy_config(cache, folder, method__teacher_guidance_scale=1.0, **keys)
    return in_bulk(toy_method(cfg, Role(x0=student, module=student), teacher, critic))


def critic_loss(method: DMD2Method, batches: int = 20, size: int = 100_000) -> float:
    batch = batch_of(1)
    batch["positions"] = torch.arange(size)
    with torch.no_grad():
        losses = [method.critic_step(batch, 10_000 + step)[0] for step in range(batches)]
    return float(torch.stack(losses).mean())


def check_critic_floor(cache: Path, folder: Path, tau: float) -> None:
    """The exact velocity, untrained, costs the floor of the flow-matching loss over the law of sigma."""
    critic = Role(x0=lambda noisy, sigma, cond: posterior(0.0, tau**2, noisy, sigma))
    loss = critic_loss(critic_toy(cache, folder, tau, critic))
    close(loss / critic_floor(tau), 1, 0.005)


def check_critic_learns(cache: Path, folder: Path, tau: float) -> None:
    """A small network trained by the critic's steps reaches the floor, and the exact velocity."""
    network = MLP(1, seed=0)
    keys = {"training__steps": 2000, "optimizer__lr": 2e-3, "lr_scheduler__warmup_steps": 0}
    critic = Role(velocity=network, module=network)
    method = critic_toy(cache, folder, tau, critic, **keys, lr_scheduler__decay_type="linear")
    method.phases = lambda step: ("critic",)
    run(method, 2000, 1024)
    close(critic_loss(method) / critic_floor(tau), 1, 0.01)
    sigma, noisy = method.noise_for_scores(
        tau * BulkStreams((0,), 50_000).randn("x", 1, 1, 1, 1), BulkStreams((1,), 50_000)
    )
    level = sigma[..., None, None, None]
    exact = (noisy - posterior(0.0, tau**2, noisy, level)) / level
    with torch.no_grad():
        close((network(noisy, level) - exact).square().mean().sqrt(), 0, 0.05)


# ------------------------------------------------------------------------------------ a ring of 8 Gaussians

RADIUS, DEVIATION = 1.5, 0.2
CENTRES = RADIUS * torch.stack([torch.tensor([math.cos(a), math.sin(a)]) for a in torch.arange(8) * math.pi / 4])


def ring(size: int, seed: int) -> Tensor:
    """Samples `[size, 1, 2, 1, 1]`."""
    rng = torch.Generator().manual_seed(seed)
    mode = torch.randint(8, (size,), generator=rng)
    return (CENTRES[mode] + DEVIATION * torch.randn(size, 2, generator=rng)).reshape(size, 1, 2, 1, 1)


def ring_x0(noisy: Tensor, sigma: Tensor, cond: Conditioning | None = None) -> Tensor:
    """E[x0 | noisy]."""
    x, s = noisy.flatten(1), sigma.flatten(1)
    spread = (1 - s) ** 2 * DEVIATION**2 + s**2
    distance = (x[:, None] - (1 - s)[:, None] * CENTRES).square().sum(2)
    share = torch.softmax(-distance / (2 * spread), dim=1)
    gain = (1 - s) * DEVIATION**2 / spread
    mean = share @ CENTRES
    return (mean + gain * (x - (1 - s) * mean)).reshape(noisy.shape)


def ring_method(cache: Path, folder: Path, *, seed: int, updates: int, pretrained: dict[str, Tensor], steps=ONE_STEP):
    """Student and critic are networks from the same pretrained weights, the teacher is exact."""
    overrides = {
        "schedule__shift": 2.0,
        "training__seed": seed,
        "training__steps": 5 * updates,
        "models.student.optimizer.lr": 2e-3,
        "models.critic.optimizer.lr": 1e-3,
        "lr_scheduler__warmup_steps": 0,
        "lr_scheduler__decay_type": "linear",
        "method__teacher_guidance_scale": 1.0,
    }
    cfg = toy_config(cache, folder, steps, **overrides)
    cfg.optimizer.betas = (0.0, 0.999)
    networks = {role: MLP(2, seed=0) for role in ("student", "critic")}
    for network in networks.values():
        network.load_state_dict(pretrained)
    student, critic = (Role(channels=2, velocity=m, module=m) for m in networks.values())
    return in_bulk(toy_method(cfg, student, Role(channels=2, x0=ring_x0, trainable=False), critic))


def pretrained_ring(iterations: int = 1500, batch_size: int = 1024, seed: int = 0) -> dict[str, Tensor]:
    """A network that has the ring's velocity, by regression onto the exact one."""
    network = MLP(2, seed=seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, iterations)
    for iteration in range(iterations):
        streams = BulkStreams((seed, iteration, "pretrain"), batch_size)
        sigma = fm.shift_sigma(streams.rand("sigma", 1, 1, 1, 1), 2.0).clamp_min(0.02)
        noisy = (1 - sigma) * ring(batch_size, seed + iteration) + sigma * streams.randn("noise", 1, 2, 1, 1)
        target = (noisy - ring_x0(noisy, sigma)) / sigma
        optimizer.zero_grad()
        (network(noisy, sigma) - target).square().mean().backward()
        optimizer.step()
        schedule.step()
    return network.state_dict()


def distance_to_ring(samples: Tensor) -> dict[str, float]:
    """Share of samples within 4 standard deviations of a mode, of the emptiest mode, and the sliced Wasserstein-1 distance."""
    x = samples.flatten(1)
    nearest = (x[:, None] - CENTRES).norm(dim=2).min(1)
    inside = nearest.values <= 4 * DEVIATION
    counts = torch.bincount(nearest.indices[inside], minlength=8) / len(x)
    angles = torch.arange(16) * math.pi / 16
    directions = torch.stack([angles.cos(), angles.sin()])
    ours, theirs = ((y @ directions).sort(0).values for y in (x, ring(len(x), 10**6).flatten(1)))
    return {
        "in_mode": float(inside.double().mean()),
        "min_share": float(counts.min()),
        "modes": int((counts > 0.02).sum()),
        "sw1": float((ours - theirs).abs().mean()),
    }


def train_on_ring(method: DMD2Method, updates: int, *, decay: float = 0.98) -> dict[str, float]:
    """How near the moving average of the student comes."""
    average = {name: p.detach().clone() for name, p in method.student.transformer.named_parameters()}

    def after(step: int, role: str) -> None:
        if role == "student":
            for name, parameter in method.student.transformer.named_parameters():
                average[name].lerp_(parameter.detach(), 1 - decay)

    run(method, 5 * updates, 256, after)
    method.student.transformer.load_state_dict(average)
    noise = BulkStreams((1, "test"), 20_000)
    with torch.no_grad():
        shape = torch.Size((20_000, 1, 2, 1, 1))
        cond = Conditioning(torch.zeros(1, 1))
        last = len(method.sigmas) - 1
        x = method.simulate(noise, shape, cond, last)
        return distance_to_ring(method.student.predict_x0(x, torch.full(x.shape[:2], method.sigmas[last]), cond))


# --------------------------------------------------------------------------------- the gradient of a rollout


def walking_method(cache: Path, folder: Path, *, seed: int = 0, frames: int = 1, **keys: Any) -> DMD2Method:
    """A small network as the student, on four rungs; the ring's teacher; another network as the critic."""
    keys = {"schedule__shift": 5.0, "training__seed": seed, "method__teacher_guidance_scale": 1.0, **keys}
    cfg = toy_config(cache, folder, AUTHORS, frames=frames, **keys)
    student, critic = MLP(2 * frames, seed=1), MLP(2 * frames, seed=2)
    still = ring_x0 if frames == 1 else (lambda noisy, sigma, cond: noisy * (1 - sigma))
    return toy_method(
        cfg,
        Role(channels=2, velocity=student, module=student),
        Role(channels=2, x0=still, trainable=False),
        Role(channels=2, velocity=critic, module=critic),
    )


def check_gradient_of_the_last_forward_alone(cache: Path, folder: Path) -> None:
    """At every exit rung: rung + 1 forwards, gradient in the last one, and the parameters' gradient is that of this one
    forward from what came before it. Teacher and critic answer without gradient."""
    method = walking_method(cache, folder)
    network = method.student.transformer
    for rung in range(4):
        step = next(step for step in range(1, 1000) if method.exit_rung(step, "student") == rung)
        batch = batch_of(5, step)
        for role in method.role_models.values():
            role.calls.clear()
        network.zero_grad()
        loss, _ = method.student_step(batch, step)
        loss.backward()
        calls = method.student.calls
        assert [call["grad"] for call in calls] == [False] * rung + [True]
        assert not any(call["grad"] for role in ("teacher", "critic") for call in method.role_models[role].calls)
        assert all(p.grad is None for p in method.critic.transformer.parameters())
        found = [p.grad.clone() for p in network.parameters()]
        network.zero_grad()
        generated = method.student.predict_x0(calls[rung]["noisy"], calls[rung]["sigma"], calls[rung]["cond"])
        streams = method.streams(batch, step, "student")
        gradient, _ = method.score(generated.detach(), method.prompt_embeds(batch), streams, step)
        (generated * gradient / gradient.numel()).sum().backward()
        for ours, parameter in zip(found, network.parameters(), strict=True):
            close((ours - parameter.grad).norm() / parameter.grad.norm(), 0, 1e-5)


# ------------------------------------------------------------------------------------------------ exit rungs


def check_exit_is_shared(cache: Path, folder: Path) -> None:
    """Two ranks, in 20 steps: the same rungs, other noise; and a process that starts at step 11 has the rungs that one that
    did not stop has. What the student is asked tells, whatever the rungs were drawn from."""

    def seen(rank: int, first: int) -> dict[int, tuple[list[float], Tensor]]:
        seed_global_generators(0, rank)
        method = walking_method(cache, folder)
        found = {}
        for step in range(first, 21):
            for role in ("student", "critic"):
                method.student.calls.clear()
                with torch.no_grad():
                    batch = batch_of(2, step, positions=[2 * rank, 2 * rank + 1])
                    method.single_train_step(batch, step, role)
                calls = method.student.calls
                found[step, role] = [float(call["sigma"].max()) for call in calls], calls[0]["noisy"]
        return found

    whole, other, resumed = seen(0, 1), seen(1, 1), seen(0, 11)
    assert len(whole) == 40 and len({len(rungs) for rungs, _ in whole.values()}) == 4
    for key, (rungs, noise) in whole.items():
        assert other[key][0] == rungs, f"{key}: rank 1 leaves at another rung"
        assert not torch.allclose(other[key][1], noise), f"{key}: both ranks have the same noise"
    for key, (rungs, noise) in resumed.items():
        assert rungs == whole[key][0] and torch.equal(noise, whole[key][1])


def check_exit_is_uniform(cache: Path, folder: Path) -> None:
    """Chi-square over 4000 draws, p > 1e-3: each phase's rungs, and the pairs of a step's two phases."""
    method = walking_method(cache, folder)
    drawn = {role: torch.tensor([method.exit_rung(s, role) for s in range(1, 4001)]) for role in ("student", "critic")}
    pairs = 4 * drawn["student"] + drawn["critic"]
    for values, cells, limit in (*((d, 4, 16.27) for d in drawn.values()), (pairs, 16, 37.70)):
        counts = torch.bincount(values, minlength=cells).double()
        statistic = float(((counts - 4000 / cells).square() / (4000 / cells)).sum())
        assert len(counts) == cells and statistic < limit, f"chi-square {statistic}"


# -------------------------------------------------------------------------------------------- who moves, and when


class Recorder:
    """What train.py does with a method: events in order, with a hash of every role at each."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.events: list[dict[str, Any]] = []
        self.students: list[dict[str, Tensor]] = []  # after each of its updates
        self.method: DMD2Method | None = None
        self.ema: EMA | None = None
        recorder = self
        init, step_of, generate = DMD2Method.__init__, DMD2Method.single_train_step, DMD2Method.generate
        make_ema, update = EMA.__init__, EMA.update

        def made(self, **keys):
            init(self, **keys)
            recorder.method = self
            for role, optimizer in self.optimizers.items():
                optimizer.register_step_pre_hook(lambda *_, role=role: recorder.add("before", role, grads=True))
                optimizer.register_step_post_hook(lambda *_, role=role: recorder.stepped(role))

        def phase(self, batch, step, role):
            recorder.step = step
            recorder.add("phase", role)
            return step_of(self, batch, step, role)

        def rollout(self, batch, prompts, streams, step, role):
            recorder.add("rollout", role, grad=torch.is_grad_enabled())
            return generate(self, batch, prompts, streams, step, role)

        def averaging(self, module, cfg):
            make_ema(self, module, cfg)
            recorder.ema = self

        def averaged(self, step):
            update(self, step)
            recorder.add("ema", "student")

        patch.setattr(DMD2Method, "__init__", made)
        patch.setattr(DMD2Method, "single_train_step", phase)
        patch.setattr(DMD2Method, "generate", rollout)
        patch.setattr(EMA, "__init__", averaging)
        patch.setattr(EMA, "update", averaged)

    def add(self, kind: str, role: str, *, grads: bool = False, **more: Any) -> None:
        event = {"kind": kind, "role": role, "step": self.step, "hashes": self.hashes(), **more}
        if grads:
            models = self.method.role_models.items()
            event["grads"] = {r for r, m in models if any(p.grad is not None for p in m.transformer.parameters())}
        teacher = self.method.teacher.transformer
        frozen = not teacher.training and not any(p.requires_grad for p in teacher.parameters())
        self.events.append({**event, "frozen": frozen})

    def stepped(self, role: str) -> None:
        self.add("after", role)
        if role == "student":
            self.students.append(parameters_of(self.method.student.transformer))

    def hashes(self) -> dict[str, str]:
        return {role: weight_hash(model.transformer) for role, model in self.method.role_models.items()}

    def of(self, *kinds: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["kind"] in kinds]


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    reshard(module)  # a gathered parameter is not what an optimizer has stepped
    return {name: local_tensor(p.detach()).clone() for name, p in module.named_parameters()}


def weight_hash(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for tensor in parameters_of(module).values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def recorded(arguments: list[str], patch: pytest.MonkeyPatch) -> Recorder:
    """A run of train.py, recorded."""
    recorder = Recorder(patch)
    if train(arguments):
        raise RuntimeError("train.py failed")
    return recorder


def check_update_schedule(record: Recorder, steps: int, interval: int = 5) -> None:
    """The student at steps 1, 1 + interval, ..., before the critic of the step, which is trained at every step on the student
    as it then is. An optimizer moves its own role and nothing else; the teacher is frozen."""
    expected = [
        (step, role)
        for step in range(1, steps + 1)
        for role in (("student", "critic") if step % interval == 1 % interval else ("critic",))
    ]
    stepped = record.of("after")
    assert [(event["step"], event["role"]) for event in stepped] == expected
    assert [(event["step"], event["role"]) for event in record.of("phase")] == expected
    assert [(event["step"], event["role"]) for event in record.of("ema")] == [e for e in expected if e[1] == "student"]
    assert [event["grad"] for event in record.of("rollout")] == [role == "student" for _, role in expected]

    for before, after in zip(record.of("before"), stepped, strict=True):
        moved = {role for role, value in after["hashes"].items() if value != before["hashes"][role]}
        assert moved == {after["role"]} == before["grads"], (after["step"], after["role"])
    student = None
    for event in record.events:  # between its updates the student stays as its last one has left it
        if event["kind"] == "after" and event["role"] == "student":
            student = event["hashes"]["student"]
        if event["kind"] == "rollout" and event["role"] == "critic":
            assert event["hashes"]["student"] == student, f"step {event['step']}: the critic saw an older student"
    assert len({event["hashes"]["teacher"] for event in record.events}) == 1
    assert all(event["frozen"] for event in record.events)


def check_average(record: Recorder, decay: float) -> None:
    """The moving average is decay^n start + (1 - decay) sum of decay^(n - j) student_j, an update of the student at a time."""
    (first, *others) = record.students
    start = record.ema.cfg.start_step
    assert start == 1 and len(others) >= 2  # the first update is copied
    average = {name: tensor.double() for name, tensor in first.items()}
    for student in others:
        average = {name: decay * value + (1 - decay) * student[name].double() for name, value in average.items()}
    assert record.ema.num_updates == len(others)
    for name, shadow in record.ema.shadow.items():
        found = local_tensor(shadow).double()
        close((found - average[name]).norm() / average[name].norm().clamp_min(1e-30), 0, 1e-6)
