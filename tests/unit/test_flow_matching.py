"""Sigma arithmetic against closed forms and diffusers' scheduler."""

import math

import pytest
import torch

from fvtitan import flow_matching as fm
from fvtitan.errors import UserError
from fvtitan.flow_matching import ScheduleConfig
from fvtitan.samplers import euler, guide


def test_path_velocity_and_x0_agree():
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 5, 3, 4, 4), torch.randn(2, 5, 3, 4, 4)
    sigma = 0.05 + 0.9 * torch.rand(2, 5)
    x, v = fm.add_noise(x0, noise, sigma), fm.velocity(x0, noise)
    torch.testing.assert_close(fm.velocity_to_x0(x, v, sigma), x0, atol=1e-5, rtol=0)
    # d x / d sigma along the path is the velocity: its sign and scale.
    step = 1e-2
    torch.testing.assert_close((fm.add_noise(x0, noise, sigma + step) - x) / step, v, atol=1e-3, rtol=0)
    assert torch.equal(fm.add_noise(x0, noise, torch.zeros(2, 5)), x0)
    assert torch.equal(fm.add_noise(x0, noise, torch.ones(2, 5)), noise)


def test_bf16_inputs_are_widened_and_float64_is_kept():
    x = torch.randn(1, 2, 1, 2, 2).bfloat16()
    assert fm.add_noise(x, x, torch.full((1, 2), 0.3)).dtype == torch.float32
    assert fm.velocity_to_x0(x.double(), x.double(), torch.full((1, 2), 0.3).double()).dtype == torch.float64


def test_shift():
    u = torch.linspace(0, 1, 11)
    assert torch.equal(fm.shift_sigma(u, 1.0), u)
    warped = [1000 * float(fm.shift_sigma(t / 1000, 5.0)) for t in (1000, 750, 500, 250)]
    assert warped == pytest.approx([1000, 937.5, 833.3333, 625], abs=1e-3)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
@pytest.mark.parametrize("steps", [1, 4, 16, 50])
def test_ladder_is_the_one_of_diffusers(shift, steps):
    import numpy as np
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    assert fm.euler_ladder(steps, shift) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


def test_sigma_distributions():
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(0))

    def draw(**keys):
        return fm.sample_sigma(uniform, ScheduleConfig(**keys)).double()

    # P(sigma < x) at shift s is the inverse shift of x.
    sigma = draw(shift=5.0)
    for x in (0.1, 0.5, 0.9):
        assert float((sigma < x).double().mean()) == pytest.approx(x / (5 - 4 * x), abs=0.005)
    sigma = draw(shift=1.0, sigma_sampling="logit_normal", logit_mean=-0.5, logit_std=0.8)
    logit = torch.logit(sigma.clamp(1e-6, 1 - 1e-6))
    assert float(logit.mean()) == pytest.approx(-0.5, abs=0.01) and float(logit.std()) == pytest.approx(0.8, abs=0.01)
    sigma = draw(shift=1.0, sigma_sampling="mode", mode_scale=1.29)
    assert 0 <= float(sigma.min()) and float(sigma.max()) <= 1
    assert float(((sigma > 0.4) & (sigma < 0.6)).double().mean()) > 0.22  # uniform: 0.20; mode favours the middle
    assert torch.equal(draw(shift=1.0, sigma_sampling="mode", mode_scale=0.0), 1 - uniform.double().float().double())


def test_bell_weight():
    sigma = torch.tensor([1.0, 0.9375, 0.83333, 0.5, 0.25, 0.02, 0.00498])
    weight = fm.loss_weight(sigma, "bell", 5.0)
    assert weight.tolist() == pytest.approx([0, 0.398, 1.025, 2.076, 1.464, 0.126, 0.032], abs=0.01)
    grid = fm.shift_sigma(torch.arange(1, 1001) / 1000, 5.0)
    assert float(fm.loss_weight(grid, "bell", 5.0).mean()) == pytest.approx(1.0, abs=1e-5)
    assert torch.equal(fm.loss_weight(sigma, "none", 5.0), torch.ones(7))


def test_guidance_forms():
    c, u = torch.randn(2, 3), torch.randn(2, 3)
    torch.testing.assert_close(guide(c, u, 4.0), c + 3.0 * (c - u))
    torch.testing.assert_close(guide(c, u, 1.0), c)
    assert guide(c.bfloat16(), u.bfloat16(), 2.0).dtype == torch.float32


@pytest.mark.parametrize(("shift", "expected"), [(1.0, 0.014), (3.0, 0.018), (5.0, 0.025), (8.0, 0.036)])
def test_euler_integrates_the_gaussian_flow(shift, expected):
    """x0 ~ N(mu, S): the exact map from noise is mu + S^(1/2) eps; Euler is first order in the number of steps."""
    torch.manual_seed(0)
    a = torch.randn(6, 6, dtype=torch.float64) / math.sqrt(6)
    covariance, mu = a @ a.T + 0.05 * torch.eye(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    eigenvalues, basis = torch.linalg.eigh(covariance)

    def velocity_fn(x, sigma):
        s = float(sigma[0, 0])
        gain = (1 - s) * eigenvalues / ((1 - s) ** 2 * eigenvalues + s**2)
        flat = x.reshape(-1, 6)
        posterior = mu + ((flat - (1 - s) * mu) @ basis * gain) @ basis.T
        return ((flat - posterior) / s).reshape(x.shape)

    noise = torch.randn(2000, 1, 1, 1, 6, dtype=torch.float64)
    exact = mu + (noise.reshape(-1, 6) @ basis * eigenvalues.sqrt()) @ basis.T

    def error(steps):
        out = euler(velocity_fn, noise, fm.euler_ladder(steps, shift)).reshape(-1, 6)
        return float((out - exact).norm() / exact.norm())

    assert error(96) == pytest.approx(expected, rel=0.5)  # mu enters the norm here
    assert 1.8 <= error(48) / error(96) <= 2.2
    assert error(384) <= 0.012


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"shift": 0.0}, "schedule.shift"),
        ({"sigma_sampling": "logit_normal", "logit_std": 0.0}, "schedule.logit_std"),
        ({"sigma_sampling": "mode", "mode_scale": 5.0}, "schedule.mode_scale"),
        ({"logit_mean": 1.0}, "has no effect"),
    ],
)
def test_bad_schedules_are_refused(keys, message):
    with pytest.raises(UserError, match=message):
        ScheduleConfig(**keys).check()
