"""FineTune through the method's own step, with an analytic student."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fvtitan import flow_matching as fm
from fvtitan.methods.finetune import FineTuneMethod
from fvtitan.models.base import Conditioning, ModelBase
from tests.helpers import make_cache, small_config

DIM = 6


class GaussianStudent(ModelBase):
    """The exact velocity for x0 ~ N(mu, S): v = (x - E[x0 | x]) / sigma."""

    def __init__(self, cfg, mu, covariance):
        super().__init__(nn.Linear(1, 1), trainable=True, schedule=cfg.schedule, device=torch.device("cpu"))
        self.mu = mu
        self.eigenvalues, self.basis = torch.linalg.eigh(covariance)

    def check_cache(self, cfg, cache):
        pass

    def num_tokens(self, sizes, latent_shape):
        return latent_shape[0]

    def conditioning(self, prompt_embeds):
        return Conditioning(torch.stack([embeds[0] for embeds in prompt_embeds]))

    def predict_velocity(self, noisy, sigma, cond):
        s = sigma[:, :1]
        gain = (1 - s) * self.eigenvalues / ((1 - s) ** 2 * self.eigenvalues + s**2)
        x = noisy.reshape(-1, DIM)
        posterior = self.mu + ((x - (1 - s) * self.mu) @ self.basis * gain) @ self.basis.T
        return ((x - posterior) / s).reshape(noisy.shape)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    cfg = small_config(make_cache(folder / "cache"), folder, schedule__shift=3.0)
    torch.manual_seed(0)
    a = torch.randn(DIM, DIM) / DIM**0.5
    covariance, mu = a @ a.T + 0.05 * torch.eye(DIM), torch.randn(DIM)
    method = FineTuneMethod(cfg=cfg, role_models={"student": GaussianStudent(cfg, mu, covariance)})
    method.on_train_start()
    return method, mu, torch.linalg.cholesky(covariance)


def batch_of(mu, factor, size, step):
    x0 = mu + torch.randn(size, DIM, generator=torch.Generator().manual_seed(step)) @ factor.T
    return {
        "latents": x0.reshape(size, 1, DIM, 1, 1),
        "prompt_embeds": [torch.zeros(1, 64)] * size,
        "positions": torch.arange(size),
        "sample_indices": torch.arange(size),
        "sample_passes": torch.full((size,), step),
    }


def mean_loss(method, mu, factor, batches=25, size=8000):
    steps = range(1, batches + 1)
    return sum(float(method.single_train_step(batch_of(mu, factor, size, s), s, "student")[0]) for s in steps) / batches


def floor(method):
    """E over sigma of tr(S [(1 - s)^2 S + s^2 I]^-1) / D, by the midpoint rule in u."""
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    s = fm.shift_sigma(u, 3.0)[:, None]
    eigenvalues = method.student.eigenvalues.double()
    return float((eigenvalues / ((1 - s) ** 2 * eigenvalues + s**2)).mean())


def test_the_analytic_student_reaches_the_floor(setting):
    method, mu, factor = setting
    assert mean_loss(method, mu, factor) == pytest.approx(floor(method), rel=0.02)


@pytest.mark.parametrize("mutation", ["target sign", "shifted sigma", "unshifted schedule"])
def test_mutations_miss_the_floor(setting, monkeypatch, mutation):
    method, mu, factor = setting
    if mutation == "target sign":
        monkeypatch.setattr(fm, "velocity", lambda x0, noise: x0 - noise)
    elif mutation == "shifted sigma":
        exact = method.student.predict_velocity
        monkeypatch.setattr(method.student, "predict_velocity", lambda x, s, c: exact(x, 0.85 * s, c))
    else:
        monkeypatch.setattr(fm, "sample_sigma", lambda uniform, schedule: uniform)
    assert mean_loss(method, mu, factor, batches=4) != pytest.approx(floor(method), rel=0.02)


def test_draws_belong_to_samples_not_to_the_split(setting):
    """A sample's sigma and noise are the same alone, in another micro-batch, and differ between positions and steps."""
    method, mu, factor = setting
    whole = batch_of(mu, factor, 4, 1)
    streams = method.streams(whole, 1, "student")
    noise, sigma = streams.randn("noise", 1, DIM), streams.rand("sigma", 1)
    second = {**whole, "positions": torch.tensor([2, 3])}
    assert torch.equal(method.streams(second, 1, "student").randn("noise", 1, DIM), noise[2:])
    assert torch.equal(method.streams(second, 1, "student").rand("sigma", 1), sigma[2:])
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(method.streams(whole, 2, "student").randn("noise", 1, DIM), noise)
    assert not torch.equal(method.streams(whole, 1, "critic").randn("noise", 1, DIM), noise)


def test_one_sigma_per_sample_for_all_frames(setting):
    method, *_ = setting
    sigma = method.draw_sigma(torch.rand(5, 1), 7)
    assert sigma.shape == (5, 7) and sigma.eq(sigma[:, :1]).all() and sigma[:, 0].unique().numel() == 5


def test_caption_dropout_has_its_rate_and_varies_by_pass(setting):
    method, *_ = setting
    dropped = torch.tensor([[method._drops_caption(i, p) for i in range(2000)] for p in range(4)])
    assert float(dropped.double().mean()) == pytest.approx(method.cfg.data.caption_dropout, abs=0.02)
    overlap = float((dropped[0] & dropped[1]).double().mean())
    assert overlap == pytest.approx(method.cfg.data.caption_dropout**2, abs=0.02)  # independent between passes
    prompt = torch.ones(2, 64)
    batch = {
        "prompt_embeds": [prompt] * 2000,
        "sample_indices": torch.arange(2000),
        "sample_passes": torch.zeros(2000).long(),
    }
    text = method.conditioning(batch).text
    replaced = text.ne(1).any(1)
    assert torch.equal(replaced, dropped[0])
    assert torch.equal(text[replaced][0], method.student.uncond_embeds[0])
