"""DMD2's own parts: rollouts, the teacher, what is logged, what is refused. Closed forms are in test_dmd2_oracles.py."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from fvtitan import flow_matching as fm
from fvtitan import samplers
from fvtitan.components.rng import SampleStreams
from fvtitan.config import RoleConfig, load_config
from fvtitan.data.latent_cache import LatentCache
from fvtitan.distributed.mesh import Mesh
from fvtitan.errors import UserError
from fvtitan.flow_matching import ScheduleConfig
from fvtitan.methods.dmd2 import DMD2Method
from fvtitan.models import build_roles
from fvtitan.models.base import Conditioning
from fvtitan.models.wan.model import WanModel
from fvtitan.models.wan.transformer import WanConfig
from tests.dmd2_oracles import (
    AUTHORS,
    Gaussian,
    Role,
    batch_of,
    gaussian_method,
    toy_config,
    toy_method,
    walking_method,
)
from tests.helpers import dmd2_recipe, make_cache, random_transformer, small_arguments, small_config

SMALL = WanConfig(num_layers=1, num_heads=2, head_dim=16, ffn_dim=48, text_dim=64, text_len=32, freq_dim=32)
LARGER = WanConfig(num_layers=2, num_heads=4, head_dim=16, ffn_dim=96, text_dim=64, text_len=32, freq_dim=32)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("data") / "cache")


def wan(sizes: WanConfig, seed: int, *, trainable: bool = False) -> WanModel:
    transformer = random_transformer(sizes, seed=seed)
    common = {"schedule": ScheduleConfig(shift=5.0), "device": torch.device("cpu"), "dtype": torch.float32}
    return WanModel(transformer, RoleConfig(flavor="tiny"), trainable=trainable, **common)


def wan_method(cache, folder, *, teacher: WanConfig = SMALL, **method: object) -> DMD2Method:
    """Random networks of Wan's kind for all roles, on the cache's videos of [3, 16, 4, 4]."""
    overrides = {"data__caption_dropout": 0.0, "schedule__shift": 5.0}
    cfg = small_config(cache, folder, job__config_file=dmd2_recipe(folder, **method), **overrides)
    return toy_method(cfg, wan(SMALL, 0, trainable=True), wan(teacher, 1), wan(SMALL, 2, trainable=True))


def real_batch(method: DMD2Method, size: int = 2) -> dict[str, object]:
    cache = LatentCache(method.cfg.data.path)
    samples = [cache[i] for i in range(size)]
    prompts = [sample["prompt_embeds"] for sample in samples]
    return batch_of(size, latents=torch.stack([s["latents"] for s in samples])) | {"prompt_embeds": prompts}


def counted(model: WanModel, monkeypatch) -> list[Conditioning]:
    """The conditionings of the model's forwards from now on."""
    calls, predict = [], model.predict_velocity
    monkeypatch.setattr(model, "predict_velocity", lambda x, s, cond: calls.append(cond) or predict(x, s, cond))
    return calls


# ---------------------------------------------------------------------------------------------------------- rollouts


def test_backward_simulation_is_the_samplers_own_walk(cache, tmp_path):
    """At every rung the student is asked what the sampler that validation uses asks it, from the same noise."""
    method = walking_method(cache, tmp_path)
    batch, spec = batch_of(3), method.sampler(method.cfg)
    step = next(s for s in range(1, 1000) if method.exit_rung(s, "student") == 3)
    streams = method.streams(batch, step, "student")
    shape = torch.Size((3, 1, 2, 1, 1))
    with torch.no_grad():
        generated = method.generate(batch, method.prompt_embeds(batch), streams, step, "student")
        ours = list(method.student.calls)
        method.student.calls.clear()
        fresh = {k: streams.randn(f"noise_{k}", *shape[1:]) for k in range(1, 4)}
        sampled = samplers.sample(
            method.student, spec, streams.randn("noise", *shape[1:]), ours[0]["cond"], None, fresh.__getitem__
        )
    assert len(ours) == len(method.student.calls) == 4
    for mine, theirs in zip(ours, method.student.calls, strict=True):
        assert torch.equal(mine["noisy"], theirs["noisy"]) and torch.equal(mine["sigma"], theirs["sigma"])
    torch.testing.assert_close(generated, sampled, rtol=0, atol=1e-6)


def test_rollouts_from_data_start_from_noised_videos(cache, tmp_path):
    method = wan_method(cache, tmp_path, rollout="data")
    assert DMD2Method.needs_latents(method.cfg)
    batch, calls = real_batch(method), []
    predict = method.student.predict_velocity
    method.student.predict_velocity = lambda x, s, cond: calls.append((x, s)) or predict(x, s, cond)
    for step in range(1, 6):
        calls.clear()
        method.student_step(batch, step)
        ((noisy, sigma),) = calls
        assert sigma.eq(method.sigmas[method.exit_rung(step, "student")]).all()
        noise = method.streams(batch, step, "student").randn("noise", 3, 16, 4, 4)
        torch.testing.assert_close(noisy, fm.add_noise(batch["latents"].float(), noise, sigma))


def test_rollouts_need_no_videos(cache, tmp_path):
    """The size is the configuration's; a batch of prompts will do."""
    method = wan_method(cache, tmp_path)
    assert not DMD2Method.needs_latents(method.cfg)
    batch = real_batch(method)
    del batch["latents"]
    for role in ("student", "critic"):
        loss, _ = method.single_train_step(batch, 1, role)
        assert loss.ndim == 0 and loss > 0
    assert method.latent_shape(batch) == (2, 3, 16, 4, 4)
    assert method.student.num_tokens(method.student.transformer.cfg, method.latent_shape(batch)) == 2 * 3 * 4


def test_draws_belong_to_samples_phases_and_names(cache, tmp_path, monkeypatch):
    """A sample's gradient is the same in another micro-batch; no draw comes from a global generator; each has a name."""
    method = walking_method(cache, tmp_path)
    names = []
    for kind in ("rand", "randn"):
        draw = getattr(SampleStreams, kind)
        monkeypatch.setattr(
            SampleStreams, kind, lambda self, name, *s, draw=draw: names.append(name) or draw(self, name, *s)
        )
    step = next(s for s in range(1, 1000) if method.exit_rung(s, "student") == 3)
    state = torch.get_rng_state()

    def gradients(positions):
        batch = batch_of(len(positions), positions=positions)
        with torch.no_grad():
            streams = method.streams(batch, step, "student")
            x = method.generate(batch, batch["prompt_embeds"], streams, step, "student")
            return method.score(x, batch["prompt_embeds"], streams, step)[0]

    whole = gradients([0, 1, 2, 3])
    assert sorted(names) == ["noise", "noise_1", "noise_2", "noise_3", "score_noise", "score_sigma"]
    torch.testing.assert_close(gradients([2, 3]), whole[2:], rtol=1e-5, atol=1e-6)
    method.critic_step(batch_of(2), step)
    assert torch.equal(torch.get_rng_state(), state)
    batch = batch_of(2)
    noises = [method.streams(batch, s, role).randn("noise", 4) for s in (1, 2) for role in ("student", "critic")]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(noises, 2))


def test_the_critics_target_is_the_noise_it_was_given(cache, tmp_path):
    """The noised videos are (1 - s) x + s eps for exactly the eps of the target."""
    method = gaussian_method(cache, tmp_path, student=(2.0, 0.0))  # the videos are 2 everywhere
    batch = batch_of(64)
    method.critic.calls.clear()
    method.critic.x0 = lambda noisy, sigma, cond: torch.full_like(noisy, 2.0)
    loss, _ = method.critic_step(batch, 1)
    assert float(loss) < 1e-9


# ----------------------------------------------------------------------------------------------------------- teacher


def noised(method: DMD2Method, batch):
    x = batch["latents"].float()
    sigma, noisy = method.noise_for_scores(x, method.streams(batch, 1, "student"))
    return noisy, sigma, method.prompt_embeds(batch)


def test_batched_guidance_is_the_same_in_one_pass(cache, tmp_path, monkeypatch):
    results, passes = [], []
    for batched in (False, True):
        method = wan_method(cache, tmp_path, batched_guidance=batched)
        calls = counted(method.teacher, monkeypatch)
        with torch.no_grad():
            results.append(method.teacher_x0(*noised(method, real_batch(method))))
        passes.append([cond.text.shape[0] for cond in calls])
    assert passes == [[2, 2], [4]]
    for separate, together in zip(*results, strict=True):
        torch.testing.assert_close(together, separate, rtol=1e-5, atol=1e-5)
    assert (results[0][0] - results[0][1]).abs().max() > 0.1  # guidance does something


def test_guidance_1_makes_no_unconditional_pass(cache, tmp_path, monkeypatch):
    method = wan_method(cache, tmp_path, teacher_guidance_scale=1.0)
    calls = counted(method.teacher, monkeypatch)
    method.student_step(real_batch(method), 1)
    assert [cond.text.shape[0] for cond in calls] == [2]


def test_guidance_0_is_the_unconditional_teacher(cache, tmp_path):
    method = wan_method(cache, tmp_path, teacher_guidance_scale=0.0)
    noisy, sigma, prompts = noised(method, real_batch(method))
    with torch.no_grad():
        guided, _ = method.teacher_x0(noisy, sigma, prompts)
        expected = method.teacher.predict_x0(noisy, sigma, method.teacher.unconditional(2))
    torch.testing.assert_close(guided, expected)


@pytest.mark.parametrize(
    ("cfg_uncond", "uncond_prompt", "expected"),
    [
        ("data", "empty", "empty"),
        ("data", "negative", "negative"),
        ("negative", "empty", "negative"),
        ("empty", "negative", "empty"),
    ],
)
def test_the_prompt_of_the_unconditional_pass(cache, tmp_path, monkeypatch, cfg_uncond, uncond_prompt, expected):
    recipe = dmd2_recipe(tmp_path, cfg_uncond=cfg_uncond)
    cfg = small_config(cache, tmp_path, job__config_file=recipe, data__uncond_prompt=uncond_prompt)
    method = toy_method(cfg, wan(SMALL, 0, trainable=True), wan(SMALL, 1), wan(SMALL, 2, trainable=True))
    calls, embeds = counted(method.teacher, monkeypatch), getattr(method.data, f"{expected}_prompt_embeds")
    noisy, sigma, _ = noised(method, real_batch(method))
    with torch.no_grad():
        method.teacher_x0(noisy, sigma, real_batch(method)["prompt_embeds"])
    assert torch.equal(calls[1].text, method.teacher.conditioning([embeds] * 2).text)
    assert not torch.equal(calls[0].text, calls[1].text)


def test_keep_is_no_guidance(cache, tmp_path, monkeypatch):
    method = wan_method(cache, tmp_path, cfg_uncond="keep", teacher_guidance_scale=1.0)
    calls = counted(method.teacher, monkeypatch)
    noisy, sigma, prompts = noised(method, real_batch(method))
    with torch.no_grad():
        guided, conditional = method.teacher_x0(noisy, sigma, prompts)
    assert torch.equal(guided, conditional) and len(calls) == 1


def test_dropped_captions_are_dropped_for_all_roles(cache, tmp_path, monkeypatch):
    """Student, teacher and critic are asked about the same prompts."""
    cfg = small_config(cache, tmp_path, job__config_file=dmd2_recipe(tmp_path), data__caption_dropout=0.5)
    method = toy_method(cfg, wan(SMALL, 0, trainable=True), wan(SMALL, 1), wan(SMALL, 2, trainable=True))
    asked = {role: counted(model, monkeypatch) for role, model in method.role_models.items()}
    batch = real_batch(method, 8)
    method.student_step(batch, 1)
    texts = [asked[role][0].text for role in ("student", "teacher", "critic")]
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])
    given = method.student.conditioning(batch["prompt_embeds"]).text
    dropped = [not torch.equal(a, b) for a, b in zip(texts[0], given, strict=True)]
    assert dropped == [method._drops_caption(i, 1) for i in range(8)] and 0 < sum(dropped) < 8


def test_a_teacher_of_another_size(cache, tmp_path):
    method = wan_method(cache, tmp_path, teacher=LARGER)
    sizes = [sum(p.numel() for p in model.transformer.parameters()) for model in method.role_models.values()]
    assert sizes[1] > 2 * sizes[0] == 2 * sizes[2]
    loss, metrics = method.student_step(real_batch(method), 1)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.student.transformer.parameters())
    assert all(p.grad is None for p in method.teacher.transformer.parameters())
    assert all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize(("dtype", "expected"), [("auto", "float32"), ("bfloat16", "bfloat16"), ("float32", "float32")])
def test_a_frozen_teachers_dtype(cache, tmp_path, single_process_group, dtype, expected):
    """That of its parameters and of its computation; what is trained stays float32; scores are float32."""
    models = {"teacher": {"dtype": dtype}}
    arguments = small_arguments(cache, tmp_path, job__config_file=dmd2_recipe(tmp_path, models))
    cfg = load_config(arguments)
    roles = build_roles(cfg, Mesh(cfg, "cpu"), torch.device("cpu"))
    dtypes = {role: {p.dtype for p in model.transformer.parameters()} for role, model in roles.items()}
    assert dtypes == {
        "student": {torch.float32},
        "teacher": {getattr(torch, expected)},
        "critic": {torch.float32},
    }
    method = DMD2Method(cfg=cfg, role_models=roles)
    method.on_train_start()
    assert roles["teacher"].identity and not roles["student"].identity
    loss, _ = method.student_step(real_batch(method), 1)
    assert loss.dtype == torch.float32 and loss.isfinite()
    inside = []
    roles["teacher"].transformer.blocks[0].ffn.register_forward_hook(lambda m, args, out: inside.append(out.dtype))
    method.student_step(real_batch(method), 1)
    assert set(inside) == {getattr(torch, expected)}


def test_the_description_says_what_people_get_wrong(cache, tmp_path):
    text = wan_method(cache, tmp_path, teacher_guidance_scale=4.0).description()
    assert "1000, 750, 500, 250 are the timesteps 1000, 937.5, 833.3, 625 (shift 5)" in text
    assert "4 in u + g (c - u) is 3 in c + g' (c - u)" in text and "\n" not in text


def test_rungs_without_the_shift(cache, tmp_path):
    method = wan_method(cache, tmp_path, warp_denoising_step=False)
    assert method.sigmas == (1.0, 0.75, 0.5, 0.25) and method.sampler(method.cfg).sigmas == (1.0, 0.75, 0.5, 0.25, 0.0)


def test_validation_has_the_teacher_beside_the_student(cache, tmp_path):
    """Sampled as a teacher is: many steps, with guidance."""
    recipe = dmd2_recipe(tmp_path)
    keys = {"validation__sampling_steps": 7, "validation__guidance_scale": 3.0, "schedule__shift": 5.0}
    cfg = small_config(cache, tmp_path, job__config_file=recipe, **keys)
    method = toy_method(cfg, wan(SMALL, 0, trainable=True), wan(SMALL, 1), wan(SMALL, 2, trainable=True))
    model, spec = method.reference()
    assert model is method.teacher and spec.solver == "ode" and spec.guidance_scale == 3.0
    assert spec.sigmas == tuple(fm.euler_ladder(7, 5.0))


# ------------------------------------------------------------------------------------------------------- what is logged


def test_what_a_student_step_logs(cache, tmp_path):
    """|x - real|, and how much worse than the teacher without guidance the critic denoises."""
    method = gaussian_method(cache, tmp_path, guidance=3.0, student=(0.7, 0.5), teacher=(-0.4, 1.2))
    batch = batch_of(200)
    _, metrics = method.student_step(batch, 1)
    assert set(metrics) == {"dmd/student_real_distance", "dmd/critic_error_ratio", "dmd/variance_to_teacher"}
    streams, prompts = method.streams(batch, 1, "student"), batch["prompt_embeds"]
    with torch.no_grad():
        x = method.generate(batch, prompts, streams, 1, "student")
        sigma, noisy = method.noise_for_scores(x, streams)
        guided, conditional = method.teacher_x0(noisy, sigma, prompts)
        fake = method.critic.predict_x0(noisy, sigma, method.critic.conditioning(prompts))
    assert float(metrics["dmd/student_real_distance"]) == pytest.approx(float((x - guided).abs().mean()), rel=1e-6)
    assert float(metrics["dmd/variance_to_teacher"]) == pytest.approx(float(x.var() / guided.var()), rel=1e-5)
    ratio = float((x - fake).square().mean() / (x - conditional).square().mean())
    assert float(metrics["dmd/critic_error_ratio"]) == pytest.approx(ratio, rel=1e-6)
    assert ratio < 0.9  # this critic knows the student


def test_what_a_critic_step_logs(cache, tmp_path):
    """Motion, mean and variance of videos that went down the whole ladder; the share of each exit rung."""
    method = walking_method(cache, tmp_path, frames=3)
    videos = {}
    generate = method.generate
    method.generate = lambda b, p, s, step, role: videos.setdefault(step, generate(b, p, s, step, role))
    with_motion = set()
    for step in range(1, 31):
        with torch.no_grad():
            _, metrics = method.critic_step(batch_of(2), step)
        shares = {key: float(value) for key, value in metrics.items() if key.startswith("exit_rung/")}
        drawn = [method.exit_rung(s, "critic") for s in range(1, step + 1)]
        assert list(shares) == [f"exit_rung/{t}" for t in (1000, 750, 500, 250)]
        assert list(shares.values()) == pytest.approx([drawn.count(k) / step for k in range(4)])
        if "rollout/motion_energy" in metrics:
            with_motion.add(step)
            x = videos[step]
            assert float(metrics["rollout/latent_mean"]) == pytest.approx(float(x.mean()), rel=1e-5)
            assert float(metrics["rollout/latent_variance"]) == pytest.approx(float(x.var()), rel=1e-5)
            motion = float((x[:, 1:] - x[:, :-1]).square().mean() / x.var())
            assert float(metrics["rollout/motion_energy"]) == pytest.approx(motion, rel=1e-5)
    assert with_motion == {s for s in range(1, 31) if method.exit_rung(s, "critic") == 3}


def test_the_share_of_exit_rungs_is_of_the_last_100_steps(cache, tmp_path):
    method = walking_method(cache, tmp_path)
    metrics = method.rollout_metrics(torch.randn(2, 1, 2, 1, 1), 1000)
    drawn = [method.exit_rung(s, "critic") for s in range(901, 1001)]
    shares = [float(metrics[f"exit_rung/{t}"]) for t in (1000, 750, 500, 250)]
    assert shares == pytest.approx([drawn.count(k) / 100 for k in range(4)]) and sum(shares) == pytest.approx(1)


def test_one_frame_has_no_motion(cache, tmp_path):
    method = walking_method(cache, tmp_path)
    step = next(s for s in range(1, 1000) if method.exit_rung(s, "critic") == 3)
    assert "rollout/motion_energy" not in method.rollout_metrics(torch.randn(2, 1, 2, 1, 1), step)


# ------------------------------------------------------------------------------------------------ what is not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("role", ["student", "teacher", "critic"])
@pytest.mark.faults
def test_values_that_are_not_finite_name_their_role(cache, tmp_path, role, value):
    """Fault 24. And no other: what teacher and critic make of broken videos is not their fault. One broken frame is enough for
    no number of the gradient to be used."""
    cfg = toy_config(cache, tmp_path, AUTHORS, method__teacher_guidance_scale=3.0)

    def x0(name):
        def answer(noisy, sigma, cond):
            answers = torch.ones_like(noisy)
            answers[0, 0] = value if name == role else 1.0
            return answers

        return answer

    module = Gaussian(0.0, 1.0)
    student = Role(x0=x0("student"), module=module)
    method = toy_method(cfg, student, Role(x0=x0("teacher"), trainable=False), Role(x0=x0("critic")))
    method.single_train_step(batch_of(2), 6, "critic")
    loss, _ = method.single_train_step(batch_of(2), 7, "student")
    assert loss.isnan()
    batch = batch_of(2)
    prompts, streams = method.prompt_embeds(batch), method.streams(batch, 7, "student")
    gradient, _ = method.score(method.generate(batch, prompts, streams, 7, "student"), prompts, streams, 7)
    assert gradient.isnan().all()
    assert method.not_finite() == f"the videos of the {role}"


# -------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("models", "method", "overrides", "message"),
    [
        (
            {"student": {"trainable": False}},
            {},
            {},
            "models.student.trainable: dmd2 needs true, the student is trained",
        ),
        ({"critic": {"trainable": False}}, {}, {}, "models.critic.trainable: dmd2 needs true, the critic is trained"),
        ({"teacher": {"trainable": True}}, {}, {}, "models.teacher.trainable: dmd2 needs false, the teacher is frozen"),
        (
            {"teacher": {"name": "wan_causal", "frames_per_block": 1}},
            {},
            {},
            "models.teacher.name = 'wan_causal': the scores are bidirectional, 'wan'",
        ),
        ({"critic": {"name": "wan_causal", "frames_per_block": 1}}, {}, {}, "models.critic.name = 'wan_causal'"),
        ({"student": {"name": "wan_causal", "frames_per_block": 1}}, {}, {}, "models.student.name = 'wan_causal'"),
        ({"teacher": {"init_from": "", "flavor": "tiny"}}, {}, {}, "models.teacher.init_from is empty"),
        ({"student": {"dtype": "bfloat16"}}, {}, {}, "models.student.dtype = 'bfloat16'"),
        ({}, {"denoising_steps": []}, {}, "method.denoising_steps = []: need descending timesteps in (0, 1000]"),
        ({}, {"denoising_steps": [500.0, 1000.0]}, {}, "method.denoising_steps = [500.0, 1000.0]: need descending"),
        ({}, {"denoising_steps": [1000.0, 500.0, 500.0]}, {}, "need descending timesteps"),
        ({}, {"denoising_steps": [1000.0, 0.0]}, {}, "need descending timesteps in (0, 1000]"),
        ({}, {"denoising_steps": [1001.0, 500.0]}, {}, "need descending timesteps in (0, 1000]"),
        ({}, {"denoising_steps": [750.0, 500.0]}, {}, "sampling starts from noise, so the first one must be 1000"),
        ({}, {"student_update_interval": 0}, {}, "method.student_update_interval = 0: must be >= 1"),
        ({}, {"teacher_guidance_scale": -1.0}, {}, "method.teacher_guidance_scale = -1.0: must be >= 0"),
        ({}, {"cfg_uncond": "keep"}, {}, 'method.cfg_uncond = "keep": teacher_guidance_scale = 4.0 has no effect'),
        ({}, {"cfg_uncond": "negatve"}, {}, "Did you mean 'negative'"),
        ({}, {"rollout": "simulated"}, {}, "Did you mean 'simulate'"),
        ({}, {"min_score_timestep": 980.0}, {}, "method.min_score_timestep = 980.0, max_score_timestep = 980.0: need"),
        ({}, {"min_score_timestep": -1.0}, {}, "need 0 <= min < max <= 1000"),
        ({}, {"max_score_timestep": 1001.0}, {}, "need 0 <= min < max <= 1000"),
        (
            {},
            {},
            {"validation__enable": True, "validation__heldout_path": "held_out"},
            "validation.heldout_path = 'held_out': a few-step student has no flow-matching loss",
        ),
        ({}, {"student_update_intervall": 5}, {}, "Did you mean 'student_update_interval'"),
    ],
)
def test_config_errors_are_one_line(tmp_path, models, method, overrides, message):
    with pytest.raises(UserError) as error:
        small_config("nowhere", tmp_path, job__config_file=dmd2_recipe(tmp_path, models, **method), **overrides)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("role", ["student", "teacher", "critic"])
def test_every_role_is_needed(tmp_path, role):
    path = dmd2_recipe(tmp_path)
    kept = [table for table in path.read_text().split("\n\n") if f"[models.{role}]" not in table]
    path.write_text("\n\n".join(kept))
    with pytest.raises(UserError, match=f"needs the role '{role}'"):
        small_config("nowhere", tmp_path, job__config_file=path)


@pytest.mark.parametrize("value", [0.0, 1.0, 980.0])
def test_ends_that_are_allowed(tmp_path, value):
    """What the checks must not refuse."""
    method = {"min_score_timestep": min(value, 979.0), "denoising_steps": [1000.0], "student_update_interval": 1}
    cfg = small_config("nowhere", tmp_path, job__config_file=dmd2_recipe(tmp_path, **method))
    phases = DMD2Method.phases(SimpleNamespace(cfg=cfg), 7)
    assert phases == ("student", "critic") and cfg.method.ladder(5.0) == (1.0, 0.0)
