"""What Self-Forcing must satisfy, as functions that raise `AssertionError`: tests call them, and the mutation test calls them
on broken code."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fvtitan import samplers
from fvtitan.components.rng import seed_global_generators
from fvtitan.config import JobConfig
from fvtitan.distributed.parallelize import apply_ac
from fvtitan.methods.dmd2 import distribution_matching_loss
from fvtitan.methods.self_forcing import Rollout, SelfForcingMethod
from fvtitan.models.base import CausalModelBase
from fvtitan.models.blocks import CausalConfig, block_starts
from fvtitan.models.wan import transformer as network
from fvtitan.models.wan.transformer import WanConfig
from tests.dmd2_oracles import AUTHORS, ONE_STEP, Role, batch_of, in_bulk, run
from tests.helpers import bidirectional_model, causal_model, random_transformer, self_forcing_recipe, small_config
from tests.unit.test_rollout import reference

SIZES = WanConfig(num_layers=2, num_heads=2, head_dim=16, ffn_dim=48, text_dim=64, text_len=8, freq_dim=32)
SCORE_SIZES = dataclasses.replace(SIZES, num_layers=1)
LONG = {"student": {"local_attn_frames": 6}, "max_num_frames": 57}  # 9, 12 and 15 latent frames
MODES = ["direct", "replay"]


@functools.cache
def _config(cache: Path, folder: Path) -> JobConfig:
    folder.mkdir(parents=True, exist_ok=True)
    keys = {"data__caption_dropout": 0.0, "schedule__shift": 5.0, "optimizer__weight_decay": 0.0}
    return small_config(cache, folder, job__config_file=self_forcing_recipe(folder), **keys)


def config(
    cache: Path, folder: Path, frames: int, student: dict[str, object] | None = None, **method: object
) -> JobConfig:
    """A run's configuration; latents are `[B, frames, 16, 4, 4]`."""
    cfg = copy.deepcopy(_config(cache, folder))  # the command line takes a tenth of a second
    cfg.data.num_frames = 4 * frames - 3
    cfg.models["student"] = dataclasses.replace(cfg.models["student"], **(student or {}))
    cfg.method = dataclasses.replace(cfg.method, **method)
    cfg.check()
    return cfg


@functools.cache
def _network(seed: int, sizes: WanConfig) -> network.WanTransformer:
    return random_transformer(sizes, seed=seed)


def wan_method(
    cache: Path,
    folder: Path,
    *,
    frames: int = 9,
    student: dict[str, object] | None = None,
    dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
    **method: object,
) -> SelfForcingMethod:
    """Small random networks of Wan's kind for all roles; the student's blocks are three frames."""
    student = {"frames_per_block": 3, **(student or {})}
    cfg = config(cache, folder, frames, student, **method)
    networks = [copy.deepcopy(_network(seed, SIZES if seed == 0 else SCORE_SIZES)).to(dtype) for seed in range(3)]
    apply_ac(networks[0], "full" if checkpointing else "none")
    teacher = bidirectional_model(networks[1].requires_grad_(False))
    teacher.trainable = False
    roles = {"student": causal_model(networks[0], **student), "teacher": teacher}
    return started(SelfForcingMethod(cfg=cfg, role_models={**roles, "critic": bidirectional_model(networks[2])}))


def started(method: SelfForcingMethod) -> SelfForcingMethod:
    method.on_train_start()
    return method


def prompts_batch(size: int = 2, positions: Any = None) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(5)
    prompts = [torch.randn(2 + i, SIZES.text_dim, generator=rng) for i in range(size)]
    return batch_of(size, positions=positions) | {"prompt_embeds": prompts}


def step_where(condition: Callable[[int], bool]) -> int:
    return next(step for step in range(1, 5000) if condition(step))


def step_at(method: SelfForcingMethod, rung: int, frames: int | None = None) -> int:
    """A step in which the student's rollouts leave at `rung`, of so many frames if it matters."""

    def fits(step: int) -> bool:
        length = method.rollout_shape(batch_of(1), step, "student")[1]
        return set(method.exit_rungs(step, "student")) == {rung} and frames in (None, length)

    return step_where(fits)


def rolled(method: SelfForcingMethod, batch: dict[str, Any], step: int, role: str = "student") -> Rollout:
    return method.roll(batch, method.prompt_embeds(batch), method.streams(batch, step, role), step, role)


def spans(method: SelfForcingMethod, step: int) -> list[tuple[int, int]]:
    return block_starts(method.student.causal.blocks(method.rollout_shape(batch_of(1), step, "student")[1]))


def first_trained(method: SelfForcingMethod, step: int) -> int:
    """The first frame that may get a gradient, in words: from start_gradient_frame on; of a rollout that is longer than a
    clip, what teacher and critic see without its first block."""
    longer = spans(method, step)[-1][1] - method.cfg.data.latent_size()[0]
    causal = method.student.causal
    masked = 1 if causal.independent_first_frame else causal.frames_per_block
    return max(method.cfg.method.start_gradient_frame, longer + masked if longer else 0)


def gradients(
    method: SelfForcingMethod, batch: dict[str, Any], step: int, accumulation: int = 1
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and parameter gradients of a student step."""
    method.student.transformer.zero_grad()
    loss, _ = method.single_train_step(batch, step, "student")
    (loss / accumulation).backward()
    return loss.detach(), {name: p.grad.clone() for name, p in method.student.transformer.named_parameters()}


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative L2 distance, tensor by tensor; none is zero."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.norm() > 0, name
        distance = float((found[name] - tensor).norm() / tensor.norm())
        assert distance <= tolerance, f"{name}: {distance}"


# ------------------------------------------------------------------------------------- the gradient of a rollout


def check_blocks_are_cut(method: SelfForcingMethod, step: int) -> None:
    """(a) No path leads from a block's output to another block's output, nor to any noise; each has its own graph."""
    noises: dict[str, Tensor] = {}
    outputs: list[Tensor] = []
    streams_of, leave = method.streams, method.leave

    def streams(*args):
        made = streams_of(*args)
        draw = made.randn

        def randn(name, *shape):
            drawn = draw(name, *shape)
            return drawn if name == "score_noise" else noises.setdefault(name, drawn.requires_grad_())

        made.randn = randn
        return made

    def reached(output, other):
        return torch.autograd.grad(output.sum(), other, retain_graph=True, allow_unused=True)[0] is not None

    def recorded(*args):
        out = leave(*args)
        if out.requires_grad:
            assert reached(out, method.student.transformer.head.head.weight)
            for other in outputs:
                assert not reached(out, other) and not reached(other, out), "two blocks share a graph"
            for name, noise in noises.items():
                assert not reached(out, noise), f"a block's graph reaches {name}"
            outputs.append(out)
        return out

    method.streams, method.leave = streams, recorded
    loss, _ = method.student_step(prompts_batch(), step)
    loss.backward()
    assert len(outputs) == len([s for s, _ in spans(method, step) if s >= first_trained(method, step)]) >= 2
    assert noises and all(noise.grad is None for noise in noises.values())


def check_gradient(method: SelfForcingMethod, step: int, tolerance: float = 1e-5) -> None:
    """(b) The gradient is the sum over the blocks of: a cache that only the clean blocks before have filled, without
    gradient; one forward from what the block's last forward was given; times the derivative of the loss by the video."""
    batch, student = prompts_batch(), method.student
    _, found = gradients(method, batch, step)
    streams, prompts = method.streams(batch, step, "student"), method.prompt_embeds(batch)
    with torch.no_grad():
        rollout = rolled(method, batch, step)
    frames, first = method.cfg.data.latent_size()[0], first_trained(method, step)
    total = rollout.video.shape[1]
    gradient, _ = method.score(rollout.video[:, -frames:], prompts, streams, step)
    masked = 0 if total == frames else first_trained(method, step) - (total - frames)
    slope = torch.zeros_like(rollout.video, dtype=gradient.dtype)
    slope[:, total - frames + masked :] = gradient[:, masked:] / gradient[:, masked:].numel()
    level, rungs = method.cfg.method.context_noise / 1000, len(method.sigmas)
    context = (1 - level) * rollout.video
    if level:
        context = context + level * streams.randn(f"noise_{rungs}", *rollout.video.shape[1:])
    student.transformer.zero_grad()
    cond, blocks = student.conditioning(prompts), spans(method, step)
    for index, ((start, end), exit_) in enumerate(zip(blocks, rollout.exits, strict=True)):
        if start < first:
            continue
        student._cache = None
        cache = student.new_cache(rollout.video.shape)
        for low, high in blocks[:index]:
            student.commit(context[:, low:high], cond, cache, low, level)
        velocity = student.predict_velocity_streaming(exit_.noisy, exit_.sigma, cond, cache, start)
        clean = exit_.noisy - exit_.sigma[:, :, None, None, None] * velocity
        (clean * slope[:, start:end]).sum().backward()
    check_equal(found, {name: p.grad for name, p in student.transformer.named_parameters()}, tolerance)


def check_text_is_trained(method: SelfForcingMethod) -> None:
    """(c) At every exit rung the keys and values of the text have a gradient, from every trained block."""
    for rung in range(4):
        step = step_at(method, rung)
        seen: list[set[str]] = []
        leave = method.leave
        wanted = {n: p for n, p in method.student.transformer.named_parameters() if ".cross_attn." in n}
        wanted = {n: p for n, p in wanted.items() if n.split(".")[3] in ("k", "v", "norm_k")}
        assert len(wanted) == 5 * SIZES.num_layers

        def recorded(*args, leave=leave, wanted=wanted, seen=seen):
            out = leave(*args)
            if out.requires_grad:
                found = torch.autograd.grad(
                    out.square().sum(), list(wanted.values()), retain_graph=True, allow_unused=True
                )
                seen.append({n for n, g in zip(wanted, found, strict=True) if g is not None and g.any()})
            return out

        method.leave = recorded
        _, found = gradients_or_none(method, step)
        method.leave = leave
        assert len(seen) == len(spans(method, step)) and all(names == set(wanted) for names in seen), f"rung {rung}"
        for name in wanted:
            assert found[name] is not None and found[name].any(), (rung, name)


def gradients_or_none(method: SelfForcingMethod, step: int) -> tuple[Tensor, dict[str, Tensor | None]]:
    method.student.transformer.zero_grad()
    loss, _ = method.student_step(prompts_batch(), step)
    loss.backward()
    return loss, {name: p.grad for name, p in method.student.transformer.named_parameters()}


def check_forwards(method: SelfForcingMethod, step: int) -> None:
    """(d) How many forwards a student step has, and which of them with gradient. (e) Nothing else keeps a tensor for its
    backward."""
    calls: list[tuple[bool, int, bool]] = []
    saved: list[str] = []
    place = ["elsewhere"]

    def at(name: str):
        exact = getattr(method, name)

        def inside(*args):
            before, place[0] = place[0], name
            try:
                return exact(*args)
            finally:
                place[0] = before

        setattr(method, name, inside)

    for name in ("roll", "walk", "leave", "commit", "score"):
        at(name)
    hook = method.student.transformer.register_forward_pre_hook(
        lambda _, args, keys: calls.append(
            (torch.is_grad_enabled(), keys["start_frame"], bool(keys.get("commit", False)))
        ),
        with_kwargs=True,
    )
    replayed = method.cfg.method.gradient_mode == "replay"
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(place[0]) or t, lambda t: t):
        loss, _ = method.student_step(prompts_batch(), step)
    before_backward = len(calls)
    if replayed:
        assert not {"roll", "walk", "leave", "commit", "score"} & set(saved), "a rollout without gradient keeps tensors"
        saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(place[0]) or t, lambda t: t):
        loss.backward()
    hook.remove()
    blocks, rungs = spans(method, step), method.exit_rungs(step, "student")
    trained = [start for start, _ in blocks if start >= first_trained(method, step)]
    rollout = sum(rung + 1 for rung in rungs) + len(blocks) - 1  # nothing reads the last block's keys
    assert [start for grad, start, _ in calls if grad] == trained and trained
    assert [start for _, start, commit in calls if commit] == [start for start, _ in blocks[:-1]]
    assert before_backward == rollout and len(calls) == rollout + replayed * len(trained)
    assert "leave" in saved and not {"walk", "commit", "score"} & set(saved)


# --------------------------------------------------------------------------- what is rolled, what is cached


def check_rollout(method: SelfForcingMethod, tolerance: float = 1e-6) -> None:
    """A rollout that goes down to the last rung is the video that the sampler streams from the same noise, and the one that
    masked forwards of the whole video give, without a cache."""
    batch, last = prompts_batch(), len(method.sigmas) - 1
    step, spec = step_at(method, last), method.sampler(method.cfg)
    streams = method.streams(batch, step, "student")
    shape = method.rollout_shape(batch, step, "student")
    noise = streams.randn("noise", *shape[1:])
    fresh = {k: streams.randn(f"noise_{k}", *shape[1:]) for k in range(1, last + 2)}
    cond = method.student.conditioning(method.prompt_embeds(batch))
    with torch.no_grad():
        video = rolled(method, batch, step).video
        sampled = samplers.sample(method.student, spec, noise, cond, None, fresh.__getitem__)
        plain = reference(method.student, spec, noise, cond, cond, fresh.__getitem__)
    with_graph = rolled(method, batch, step).video
    scale = float(plain.abs().max())
    assert with_graph.requires_grad and plain.std() > 0.3
    assert float((video - with_graph.detach()).abs().max()) <= tolerance
    assert float((video - sampled).abs().max()) <= tolerance
    assert float((video - plain).abs().max()) <= 2e-5 * max(scale, 1)


def check_context(method: SelfForcingMethod, monkeypatch) -> None:
    """The method's commit leaves the keys and values of one forward of the block at exactly the context's noise level."""
    batch, level = prompts_batch(), method.cfg.method.context_noise
    step = step_at(method, 0)
    sigmas: list[Tensor] = []
    asked: list[Tensor] = []
    embedding = network.timestep_embedding
    with monkeypatch.context() as patch, torch.no_grad():
        hook = method.student.transformer.register_forward_pre_hook(
            lambda _, args, keys: sigmas.append((args[1], keys.get("commit", False))), with_kwargs=True
        )
        patch.setattr(network, "timestep_embedding", lambda t, dim: asked.append(t) or embedding(t, dim))
        rollout = rolled(method, batch, step)
        hook.remove()
    blocks, student = spans(method, step), method.student
    tokens = 4  # of a frame
    commits = [i for i, (_, commit) in enumerate(sigmas) if commit]
    assert len(commits) == len(blocks) - 1
    exact = torch.tensor(level / 1000, dtype=torch.float32)
    for i in commits:
        assert sigmas[i][0].eq(exact).all() and asked[i].eq(level).all(), (sigmas[i][0], asked[i])
    kept = [(layer.key.clone(), layer.value.clone()) for layer in rollout.cache.layers]
    context = rollout.video
    if level:
        noise = method.streams(batch, step, "student").randn(f"noise_{len(method.sigmas)}", *context.shape[1:])
        context = (1 - exact) * context + exact * noise
    student._cache = None
    cache = student.new_cache(rollout.video.shape)
    for start, end in blocks[:-1]:
        with torch.no_grad():
            at = torch.full((2, end - start), float(exact))
            student.transformer(
                context[:, start:end], at, rollout.cond.text, cache=cache, start_frame=start, commit=True
            )
    end = blocks[-1][0] * tokens
    for (key, value), layer in zip(kept, cache.layers, strict=True):
        assert torch.equal(key[:, :end], layer.key[:, :end]) and torch.equal(value[:, :end], layer.value[:, :end])


# --------------------------------------------------------------------------------------- a chain of numbers

FRAMES, NOISE = 8, 0.3


class Chain(Role, CausalModelBase):
    """x_1 = start z, x_{k+1} = gain x_k + .3 z, one frame a block; what it keeps of the past is the last committed frame."""

    def __init__(self, gain: float = 0.8, start: float = 0.8):
        module = nn.Module()
        module.gain, module.start = nn.Parameter(torch.tensor(gain)), nn.Parameter(torch.tensor(start))
        super().__init__(module=module)
        self.causal = CausalConfig(1)

    def new_cache(self, latent_shape, *, recycle=False, first_frame=0):
        return SimpleNamespace(last=None)

    def predict_velocity_streaming(self, noisy, sigma, cond, cache, start):
        self.calls.append({"noisy": noisy.detach(), "sigma": sigma, "start": start, "grad": torch.is_grad_enabled()})
        own = self.transformer
        x0 = own.gain * cache.last + NOISE * noisy if start else own.start * noisy
        return (noisy - x0) / sigma[:, :, None, None, None]

    def commit(self, block, cond, cache, start_frame, context_noise=0.0):
        cache.last = block

    def predict_velocity_with_context(self, *args):
        raise NotImplementedError

    def covariance(self) -> Tensor:
        """Of the FRAMES frames of its rollouts."""
        gain, start = float(self.transformer.gain), float(self.transformer.start)
        rows = [start * torch.eye(FRAMES, dtype=torch.float64)[0]]
        for k in range(1, FRAMES):
            rows.append(gain * rows[-1] + NOISE * torch.eye(FRAMES, dtype=torch.float64)[k])
        chain = torch.stack(rows)
        return chain @ chain.T


TRUE_COVARIANCE = torch.ones(FRAMES, FRAMES, dtype=torch.float64) + 0.01 * torch.eye(FRAMES, dtype=torch.float64)


def joint_posterior(covariance: Tensor, noisy: Tensor, sigma: Tensor) -> Tensor:
    """E[x0 | noisy] of all frames together, x0 ~ N(0, covariance) (4.3)."""
    values, vectors = torch.linalg.eigh(covariance)
    s = sigma.reshape(len(noisy), -1)[:, :1].double()
    gain = (1 - s) * values / ((1 - s) ** 2 * values + s**2)
    found = (noisy.flatten(1).double() @ vectors * gain) @ vectors.T
    return found.reshape(noisy.shape).to(noisy.dtype)


def chain_method(
    cache: Path, folder: Path, *, frames: int = FRAMES, steps: list[float] = ONE_STEP, updates: int = 1, **method: Any
) -> SelfForcingMethod:
    """A chain under the exact score of the truth, and a critic that always knows the chain."""
    student = method.pop("student", {})
    cfg = config(cache, folder, frames, student, denoising_steps=steps, teacher_guidance_scale=1.0, **method)
    cfg.data.height = cfg.data.width = 8
    cfg.training.steps = updates
    cfg.optimizer.lr, cfg.optimizer.betas = 0.02, (0.0, 0.999)
    cfg.lr_scheduler.warmup_steps, cfg.lr_scheduler.decay_type = 0, "linear"
    cfg.method.student_update_interval = 1
    chain = Chain()
    roles = {
        "student": chain,
        "teacher": Role(x0=lambda noisy, sigma, cond: joint_posterior(TRUE_COVARIANCE, noisy, sigma), trainable=False),
        "critic": Role(x0=lambda noisy, sigma, cond: joint_posterior(chain.covariance(), noisy, sigma)),
    }
    return started(SelfForcingMethod(cfg=cfg, role_models=roles))


def trained_chain(method: SelfForcingMethod, updates: int, batch_size: int, *, whole: bool = False) -> Chain:
    """Trained by the method's student steps; `whole`: by the gradient through the whole chain, the reference."""
    method = in_bulk(method)
    method.phases = lambda step: ("student",)
    if whole:

        def student_step(batch, step):
            streams, prompts = method.streams(batch, step, "student"), method.prompt_embeds(batch)
            noise, frames = streams.randn("noise", FRAMES, 1, 1, 1), []
            for k in range(FRAMES):
                own, z = method.student.transformer, noise[:, k : k + 1]
                frames.append(own.gain * frames[-1] + NOISE * z if k else own.start * z)
            video = torch.cat(frames, 1)
            gradient, metrics = method.score(video.detach(), prompts, streams, step)
            return distribution_matching_loss(video, gradient), metrics

        method.student_step = student_step
    run(method, updates, batch_size)
    return method.student


def variance(gain: float, first: float, frame: int) -> float:
    """Of a chain's frame, counted from 1."""
    for _ in range(frame - 1):
        first = gain**2 * first + NOISE**2
    return first


# --------------------------------------------------------------------------------------- what all ranks share


@contextlib.contextmanager
def as_rank(rank: int) -> Iterator[None]:
    state = torch.get_rng_state()
    seed_global_generators(0, rank)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def check_exits_and_lengths_are_shared(cache: Path, folder: Path, **method: Any) -> None:
    """Two ranks, in 20 steps: the same rungs for the same blocks, the same lengths, other noise; and a process that starts at
    step 11 sees what one that did not stop sees. What the student is asked tells, whatever the rungs were drawn from."""
    keys = {"student": {"local_attn_frames": 4}, "max_num_frames": 41, **method}

    def seen(rank: int, first: int) -> dict[tuple[int, str], tuple[list[tuple[int, float]], Tensor]]:
        found = {}
        with as_rank(rank):
            made = chain_method(cache, folder, steps=AUTHORS, **keys)
            for step in range(first, 21):
                for role in ("student", "critic"):
                    made.student.calls.clear()
                    with torch.no_grad():
                        batch = batch_of(2, step, positions=[2 * rank, 2 * rank + 1])
                        rolled(made, batch, step, role)
                    calls = made.student.calls
                    asked = [(call["start"], float(call["sigma"].max())) for call in calls]
                    found[step, role] = asked, calls[0]["noisy"]
        return found

    whole, other, resumed = seen(0, 1), seen(1, 1), seen(0, 11)
    assert len(whole) == 40 and len({len(asked) for asked, _ in whole.values()}) >= 6
    assert {asked[-1][0] + 1 for asked, _ in whole.values()} == {8, 9, 10, 11}
    for key, (asked, noise) in whole.items():
        assert other[key][0] == asked, f"{key}: rank 1 has another rollout"
        assert not torch.allclose(other[key][1], noise), f"{key}: both ranks have the same noise"
    for key, (asked, noise) in resumed.items():
        assert asked == whole[key][0] and torch.equal(noise, whole[key][1])
