"""Diffusion forcing and teacher forcing through the method's own step."""

from __future__ import annotations

import pytest
import torch

from fvtitan import flow_matching as fm
from fvtitan.components.rng import SampleStreams
from fvtitan.methods.dfsft import DiffusionForcingSFTMethod
from fvtitan.methods.finetune import FineTuneMethod
from fvtitan.models.base import CausalModelBase, Conditioning
from fvtitan.models.blocks import CausalConfig
from fvtitan.models.wan.transformer import FLAVORS
from tests.helpers import bidirectional_model, causal_model, causal_recipe, make_cache, random_transformer, small_config

SHIFT = 5.0


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("data") / "cache")


def config(cache, tmp_path, frames_per_block=1, **overrides):
    keys = {"schedule__shift": SHIFT, "method__loss_weighting": "none", **overrides}
    return small_config(cache, tmp_path, job__config_file=causal_recipe(tmp_path, frames_per_block), **keys)


def batch_of(latents, step=1, positions=None):
    size = latents.shape[0]
    return {
        "latents": latents,
        "prompt_embeds": [torch.full((2, 64), 0.1 * i) for i in range(size)],
        "positions": torch.arange(size) if positions is None else positions,
        "sample_indices": torch.arange(size),
        "sample_passes": torch.full((size,), step),
    }


# ------------------------------------------------------------------------- equal to fine-tuning in one block (4.9)


def losses_and_gradients(cache, tmp_path, kind, *, frames_per_block=3, full_mask=False, shared=False, weighting="none"):
    """Of one step on the same weights, batch and streams, by FineTune or by diffusion forcing."""
    transformer = random_transformer(FLAVORS["tiny"])
    if kind == "finetune":
        cfg = small_config(cache, tmp_path, schedule__shift=SHIFT, method__loss_weighting=weighting)
        method = FineTuneMethod(cfg=cfg, role_models={"student": bidirectional_model(transformer)})
    else:
        cfg = config(cache, tmp_path, frames_per_block, method__loss_weighting=weighting)
        student = causal_model(transformer, frames_per_block)
        method = DiffusionForcingSFTMethod(cfg=cfg, role_models={"student": student})
        draw = method.draw_sigma
        if full_mask:
            student._plan = lambda frames, clean_context=False: None
        if shared:
            method.draw_sigma = lambda u, blocks: draw(u[:, :1].expand(-1, len(blocks)), blocks)
    method.on_train_start()
    latents = torch.stack([method.data[i]["latents"] for i in range(4)])
    loss, metrics = method.single_train_step(batch_of(latents), 1, "student")
    loss.backward()
    assert metrics == {}
    return loss.detach(), {name: p.grad for name, p in transformer.named_parameters()}


def relative(a, b):
    return max(float((a[name] - b[name]).norm() / b[name].norm()) for name in b)


@pytest.mark.parametrize("weighting", ["none", "bell"])
@pytest.mark.parametrize("case", [{}, {"frames_per_block": 1, "full_mask": True, "shared": True}])
def test_equals_finetune_when_all_frames_share_sigma_and_see_each_other(cache, tmp_path, weighting, case):
    expected, gradients = losses_and_gradients(cache, tmp_path, "finetune", weighting=weighting)
    loss, actual = losses_and_gradients(cache, tmp_path, "dfsft", weighting=weighting, **case)
    assert expected > 0.1 and float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert actual.keys() == gradients.keys() and relative(actual, gradients) <= 1e-6


@pytest.mark.parametrize("case", [{"full_mask": True}, {"shared": True}])
def test_and_only_then(cache, tmp_path, case):
    """One level per block, or the block-causal mask alone, make it another loss."""
    expected, gradients = losses_and_gradients(cache, tmp_path, "finetune")
    loss, actual = losses_and_gradients(cache, tmp_path, "dfsft", frames_per_block=1, **case)
    assert float(loss) != pytest.approx(float(expected), rel=1e-3)
    assert relative(actual, gradients) > 1e-2


# ---------------------------------------------------------------------------------------------- an analytic student


class GaussianStudent(CausalModelBase):
    """The exact velocity when every frame is x0 ~ N(mu, S) by itself, at each frame's own sigma. Records its inputs."""

    def __init__(self, cfg, mu, covariance):
        parameter = torch.nn.Linear(1, 1)
        super().__init__(parameter, trainable=True, schedule=cfg.schedule, device=torch.device("cpu"))
        role = cfg.models["student"]
        self.causal = CausalConfig(role.frames_per_block, role.independent_first_frame)
        self.mu = mu
        self.eigenvalues, self.basis = torch.linalg.eigh(covariance)
        self.calls = []

    def check_cache(self, cfg, cache):
        pass

    def num_tokens(self, sizes, latent_shape):
        return latent_shape[0]

    def conditioning(self, prompt_embeds):
        return Conditioning(torch.stack([embeds[0] for embeds in prompt_embeds]))

    def predict_velocity(self, noisy, sigma, cond):
        self.calls.append((noisy, sigma))
        x, s = noisy.flatten(2), sigma[..., None]
        gain = (1 - s) * self.eigenvalues / ((1 - s) ** 2 * self.eigenvalues + s**2)
        posterior = self.mu + ((x - (1 - s) * self.mu) @ self.basis * gain) @ self.basis.T
        return ((x - posterior) / s).reshape(noisy.shape)

    def predict_velocity_with_context(self, noisy, sigma, clean, clean_sigma, cond):
        v = self.predict_velocity(noisy, sigma, cond)
        self.calls[-1] += (clean, clean_sigma)
        return v

    def new_cache(self, latent_shape, *, recycle=False, first_frame=0):
        raise NotImplementedError

    def predict_velocity_streaming(self, noisy_block, sigma, cond, cache, start_frame):
        raise NotImplementedError

    def commit(self, block, cond, cache, start_frame, context_noise=0.0):
        raise NotImplementedError


DIM = 6


def analytic_method(cache, tmp_path, frames_per_block=1, **overrides):
    cfg = config(cache, tmp_path, frames_per_block, **overrides)
    torch.manual_seed(0)
    a = torch.randn(DIM, DIM) / DIM**0.5
    covariance, mu = a @ a.T + 0.05 * torch.eye(DIM), torch.randn(DIM)
    method = DiffusionForcingSFTMethod(cfg=cfg, role_models={"student": GaussianStudent(cfg, mu, covariance)})
    method.on_train_start()
    return method, mu, torch.linalg.cholesky(covariance)


def gaussian_batch(mu, factor, size, frames, step):
    noise = torch.randn(size, frames, DIM, generator=torch.Generator().manual_seed(step))
    return batch_of((mu + noise @ factor.T)[..., None, None], step)


def mean_loss(method, mu, factor, batches=5, size=1500, frames=12):
    losses = [
        method.single_train_step(gaussian_batch(mu, factor, size, frames, step), step, "student")[0]
        for step in range(1, batches + 1)
    ]
    return float(torch.stack(losses).mean())


def floor(method, weighting):
    """E over sigma of w tr(S [(1 - s)^2 S + s^2 I]^-1) / D, by the midpoint rule in u."""
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    s = fm.shift_sigma(u, SHIFT)[:, None]
    eigenvalues = method.student.eigenvalues.double()
    error = (eigenvalues / ((1 - s) ** 2 * eigenvalues + s**2)).mean(1)
    return float((fm.loss_weight(s[:, 0], weighting, SHIFT) * error).mean())


@pytest.mark.parametrize("weighting", ["none", "bell"])
@pytest.mark.parametrize("teacher_forcing", [False, True])
def test_the_analytic_student_reaches_the_floor(cache, tmp_path, weighting, teacher_forcing):
    keys = {"method__loss_weighting": weighting, "method__teacher_forcing": teacher_forcing}
    method, mu, factor = analytic_method(cache, tmp_path, **keys)
    reached = mean_loss(method, mu, factor)
    assert reached == pytest.approx(floor(method, weighting), rel=0.02)


@pytest.mark.parametrize("mutation", ["target sign", "levels of another block", "level of the first block", "no bell"])
def test_mutations_miss_the_floor(cache, tmp_path, monkeypatch, mutation):
    method, mu, factor = analytic_method(cache, tmp_path, method__loss_weighting="bell")
    exact = method.student.predict_velocity
    if mutation == "target sign":
        monkeypatch.setattr(fm, "velocity", lambda x0, noise: x0 - noise)
    elif mutation == "levels of another block":
        monkeypatch.setattr(method.student, "predict_velocity", lambda x, s, c: exact(x, s.roll(1, dims=1), c))
    elif mutation == "level of the first block":
        monkeypatch.setattr(method.student, "predict_velocity", lambda x, s, c: exact(x, s[:, :1].expand_as(s), c))
    else:
        monkeypatch.setattr(fm, "loss_weight", lambda sigma, kind, shift: torch.ones_like(sigma))
    reached = mean_loss(method, mu, factor, batches=1)
    monkeypatch.undo()
    assert reached != pytest.approx(floor(method, "bell"), rel=0.02)


# -------------------------------------------------------------------------------------------- noise levels, weights


def levels(method, mu, factor, size, frames):
    method.student.calls.clear()
    method.single_train_step(gaussian_batch(mu, factor, size, frames, 1), 1, "student")
    return method.student.calls[0][1]


def test_one_level_per_block_and_independent_across_blocks(cache, tmp_path):
    method, mu, factor = analytic_method(cache, tmp_path, frames_per_block=3)
    sigma = levels(method, mu, factor, 10_000, 9)
    assert sigma.shape == (10_000, 9)
    by_block = sigma.view(10_000, 3, 3)
    assert (by_block.amax(2) - by_block.amin(2)).max() == 0
    correlation = torch.corrcoef(by_block[:, :, 0].T.double())
    assert (correlation - torch.eye(3)).abs().max() <= 0.03
    neighbours = torch.stack([by_block[:-1, 0, 0], by_block[1:, 0, 0]]).double()
    assert torch.corrcoef(neighbours)[0, 1].abs() <= 0.03  # across samples too
    for x in (0.1, 0.5, 0.9):  # each block's level has the run's shift: P(sigma < x) = x / (s - (s - 1) x)
        assert (by_block[:, :, 0] < x).double().mean(0).tolist() == pytest.approx([x / (5 - 4 * x)] * 3, abs=0.015)


def test_an_independent_first_frame_has_its_own_level(cache, tmp_path):
    overrides = {"models.student.independent_first_frame": True}
    method, mu, factor = analytic_method(cache, tmp_path, frames_per_block=2, **overrides)
    sigma = levels(method, mu, factor, 100, 5)
    assert sigma[:, 1].eq(sigma[:, 2]).all() and sigma[:, 3].eq(sigma[:, 4]).all()
    assert sigma[:, [0, 1, 3]].unique().numel() == 300


def test_a_block_is_weighted_by_its_own_level(cache, tmp_path):
    """Two blocks, the second without error; the bell at shift 5 by timestep, the values of CausVid's table."""
    method, mu, factor = analytic_method(cache, tmp_path, frames_per_block=3, method__loss_weighting="bell")
    table = [(1000, 0.0), (937.5, 0.398), (833.3, 1.025), (500, 2.076), (250, 1.464), (20, 0.126), (4.98, 0.032)]
    batch = gaussian_batch(mu, factor, 2, 6, 1)
    streams = method.streams(batch, 1, "student")
    target = fm.velocity(batch["latents"], streams.randn("noise", *batch["latents"].shape[1:]))
    error = torch.tensor([1.0, 1, 1, 0, 0, 0])[:, None, None, None]
    method.student.predict_velocity = lambda noisy, sigma, cond: target + error
    for timestep, weight in table:
        sigma = torch.tensor([timestep / 1000] * 3 + [0.5] * 3).expand(2, -1)
        method.draw_sigma = lambda uniform, blocks, sigma=sigma: sigma
        loss, _ = method.single_train_step(batch, 1, "student")
        assert 2 * float(loss) == pytest.approx(weight, abs=0.01), timestep  # the table has no 250


def test_noise_is_per_frame_and_belongs_to_the_sample(cache, tmp_path):
    """What the student gets is the path at each frame's level, and the same when the batch is split."""
    method, mu, factor = analytic_method(cache, tmp_path)
    batch = gaussian_batch(mu, factor, 4, 3, 1)
    method.single_train_step(batch, 1, "student")
    noisy, sigma = method.student.calls[-1]
    s = sigma[..., None, None, None]
    noise = (noisy - (1 - s) * batch["latents"]) / s
    assert noise.unique().numel() == noise.numel() and abs(float(noise.mean())) < 0.3 and 0.7 < float(noise.std()) < 1.3
    half = batch_of(batch["latents"][2:], positions=torch.tensor([2, 3]))
    method.single_train_step(half, 1, "student")
    assert torch.equal(method.student.calls[-1][0], noisy[2:]) and torch.equal(method.student.calls[-1][1], sigma[2:])


# -------------------------------------------------------------------------------------------------- teacher forcing


def test_teacher_forcing_gives_the_clean_latents_at_sigma_zero(cache, tmp_path):
    plain, mu, factor = analytic_method(cache, tmp_path, frames_per_block=3)
    forced, *_ = analytic_method(cache, tmp_path, frames_per_block=3, method__teacher_forcing=True)
    batch = gaussian_batch(mu, factor, 5, 6, 1)
    for method in (plain, forced):
        method.single_train_step(batch, 1, "student")
    noisy, sigma, clean, clean_sigma = forced.student.calls[0]
    assert torch.equal(clean, batch["latents"]) and clean_sigma.eq(0).all() and clean_sigma.shape == (5, 6)
    assert torch.equal(noisy, plain.student.calls[0][0]) and torch.equal(sigma, plain.student.calls[0][1])
    assert len(plain.student.calls[0]) == 2  # diffusion forcing passes no context


def test_context_noise_is_at_most_its_maximum(cache, tmp_path):
    keys = {"method__teacher_forcing": True, "method__context_noise_max": 20.0}
    method, mu, factor = analytic_method(cache, tmp_path, frames_per_block=3, **keys)
    batch = gaussian_batch(mu, factor, 2000, 6, 1)
    method.single_train_step(batch, 1, "student")
    noisy, sigma, clean, level = method.student.calls[0]
    assert level.eq(level[:, :1]).all() and level[:, 0].unique().numel() > 1900  # one a sample
    assert 0 <= level.min() and 0.0195 < level.max() < 0.02
    assert float(level.mean()) == pytest.approx(0.01, abs=5e-4)
    chosen = level[:, 0] > 0.005  # where the noise can be read off
    s = level[chosen][..., None, None, None].double()
    context_noise = (clean[chosen] - (1 - s) * batch["latents"][chosen]) / s
    s = sigma[chosen][..., None, None, None].double()
    noise = (noisy[chosen] - (1 - s) * batch["latents"][chosen]) / s
    assert abs(float(context_noise.mean())) < 0.02 and float(context_noise.std()) == pytest.approx(1, abs=0.02)
    assert torch.corrcoef(torch.stack([context_noise.flatten(), noise.flatten()]))[0, 1].abs() < 0.03
    assert torch.corrcoef(torch.stack([level[:, 0], sigma[:, 0]]))[0, 1].abs() < 0.08


@pytest.mark.parametrize("teacher_forcing", [False, True])
def test_every_parameter_learns(cache, tmp_path, teacher_forcing):
    keys = {"method__teacher_forcing": teacher_forcing, "method__loss_weighting": "bell"}
    transformer = random_transformer(FLAVORS["tiny"])
    student = causal_model(transformer, 1)
    method = DiffusionForcingSFTMethod(cfg=config(cache, tmp_path, **keys), role_models={"student": student})
    method.on_train_start()
    latents = torch.stack([method.data[i]["latents"] for i in range(2)])
    method.single_train_step(batch_of(latents), 1, "student")[0].backward()
    assert all(parameter.grad.norm() > 0 for parameter in transformer.parameters())


@pytest.mark.parametrize("teacher_forcing", [False, True])
def test_heldout_loss(cache, tmp_path, teacher_forcing):
    """The unweighted error per sample; under teacher forcing over clean context."""
    keys = {"method__teacher_forcing": teacher_forcing, "method__loss_weighting": "bell"}
    method, mu, factor = analytic_method(cache, tmp_path, **keys)
    x0 = gaussian_batch(mu, factor, 6000, 3, 1)["latents"]
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2))
    sigma = torch.tensor([0.3, 0.6, 0.9]).expand(6000, -1)
    cond = Conditioning(torch.zeros(6000, 64))
    loss = method.heldout_loss(x0, noise, sigma, cond)
    assert loss.shape == (6000,)
    eigenvalues, s = method.student.eigenvalues, torch.tensor([0.3, 0.6, 0.9])[:, None]
    expected = (eigenvalues / ((1 - s) ** 2 * eigenvalues + s**2)).mean()
    assert float(loss.mean()) == pytest.approx(float(expected), rel=0.02)
    assert torch.equal(method.heldout_loss(x0[7:8], noise[7:8], sigma[7:8], cond)[0], loss[7])
    call = method.student.calls[0]
    assert len(call) == (4 if teacher_forcing else 2)
    if teacher_forcing:
        assert torch.equal(call[2], x0) and call[3].eq(0).all()


def test_samples_are_streamed_on_the_runs_own_schedule(cache, tmp_path):
    overrides = {"validation__sampling_steps": 4, "validation__guidance_scale": 3.0}
    spec = DiffusionForcingSFTMethod.sampler(config(cache, tmp_path, **overrides))
    assert spec.sigmas == pytest.approx([1.0, 0.9375, 0.833333, 0.625, 0.0], abs=1e-6)  # shift 5
    assert spec.streaming and spec.solver == "ode" and spec.guidance_scale == 3.0 and spec.context_noise == 0.0


def test_streams_are_named(cache, tmp_path, monkeypatch):
    """Every draw of a step comes from a stream of its own name."""
    names = []
    for kind in ("rand", "randn"):
        draw = getattr(SampleStreams, kind)
        monkeypatch.setattr(
            SampleStreams, kind, lambda self, name, *s, draw=draw: names.append(name) or draw(self, name, *s)
        )
    keys = {"method__teacher_forcing": True, "method__context_noise_max": 20.0}
    method, mu, factor = analytic_method(cache, tmp_path, **keys)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    method.single_train_step(gaussian_batch(mu, factor, 2, 3, 1), 1, "student")
    assert len(names) == len(set(names)) == 4
    assert torch.equal(torch.get_rng_state(), state)  # and none from the global generator
