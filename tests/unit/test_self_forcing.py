"""Self-Forcing against closed forms, functional references and invariants, and that the same checks fail when the method is
broken. The checks are in tests/self_forcing_oracles.py; the numbers in docstrings are those of the list of oracles."""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import json
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fvtitan import flow_matching as fm
from fvtitan import samplers
from fvtitan.components.rng import fold
from fvtitan.errors import UserError
from fvtitan.methods.self_forcing import SelfForcingMethod, _Replayed
from fvtitan.models import kv_cache
from fvtitan.models.base import Conditioning
from fvtitan.models.kv_cache import KVCache
from fvtitan.models.wan import transformer as network
from fvtitan.models.wan.model import WanCausalModel
from tests import self_forcing_oracles as oracles
from tests.dmd2_oracles import AUTHORS, batch_of
from tests.helpers import ROOT, make_cache, self_forcing_recipe, small_config
from tests.self_forcing_oracles import (
    FRAMES,
    LONG,
    MODES,
    check_equal,
    first_trained,
    gradients,
    prompts_batch,
    rolled,
    spans,
    step_at,
    step_where,
)
from tests.unit.test_rollout import SYNCHRONISING, Record

WINDOW = {"student": {"local_attn_frames": 6}}
SINK = {"student": {"local_attn_frames": 4, "sink_frames": 1}}
FIRST = {"student": {"independent_first_frame": True}, "frames": 7}
LONG_FIRST = {"student": {"independent_first_frame": True, "local_attn_frames": 4}, "frames": 7, "max_num_frames": 49}


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("self_forcing")
    return SimpleNamespace(cache=make_cache(folder / "cache"), folder=folder / "runs")


def wan(toys, **keys: Any) -> SelfForcingMethod:
    return oracles.wan_method(toys.cache, toys.folder, **keys)


def chain(toys, **keys: Any) -> SelfForcingMethod:
    return oracles.chain_method(toys.cache, toys.folder, **keys)


# ------------------------------------------------------------------------------------------- exposure bias

UPDATES, BATCH = 500, 1024


def nearest_chain() -> tuple[float, float]:
    """(gain, start) where the mean distribution-matching gradient vanishes: it is s^2 / (1 - s)^2 times that of the
    divergence at noise level s, so the minimum of the divergences' sum under these weights."""
    free = torch.tensor([0.9, 1.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([free], max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-10)
    u = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    s = fm.shift_sigma(u, 5.0).clamp(0.02, 0.98)[:, None, None]
    unit = torch.eye(FRAMES, dtype=torch.float64)
    truth = (1 - s) ** 2 * oracles.TRUE_COVARIANCE + s**2 * unit

    def divergence():
        optimizer.zero_grad()
        rows = [free[1] * unit[0]]
        for k in range(1, FRAMES):
            rows.append(free[0] * rows[-1] + oracles.NOISE * unit[k])
        chain = torch.stack(rows)
        ours = (1 - s) ** 2 * (chain @ chain.T) + s**2 * unit
        kl = torch.linalg.solve(truth, ours).diagonal(dim1=1, dim2=2).sum(1) - torch.logdet(ours)
        loss = (kl * (s**2 / (1 - s) ** 2).flatten()).mean()
        loss.backward()
        return loss

    optimizer.step(divergence)
    gain, start = free.tolist()
    return gain, start


def test_the_reference_of_a_chain(toys):
    """Teacher forcing drifts; the gradient through the whole chain leads to the nearest chain, .9611."""
    gain = 1 / 1.01  # the regression of a true frame on the one before
    assert [oracles.variance(gain, 1.01, k) for k in (8, 20, 60)] == pytest.approx([1.473, 2.13, 3.47], abs=5e-3)
    assert oracles.variance(gain, 1.01, 8) >= 1.4
    assert nearest_chain() == pytest.approx((0.9611, 1.0425), abs=2e-4)
    whole = oracles.trained_chain(chain(toys, updates=UPDATES), UPDATES, BATCH, whole=True)
    assert abs(float(whole.transformer.gain.detach()) - 0.9611) <= 0.006


@pytest.mark.parametrize("mode", MODES)
def test_a_chain_trained_on_its_own_rollouts_does_not_drift(toys, mode):
    """Truncated, the gradient leads to .954; variance in closed form and of streamed videos."""
    method = chain(toys, updates=UPDATES, gradient_mode=mode)
    trained = oracles.trained_chain(method, UPDATES, BATCH)
    gain, start = float(trained.transformer.gain.detach()), float(trained.transformer.start.detach())
    assert abs(gain - 0.954) <= 0.006, gain
    assert oracles.variance(gain, start**2, 8) <= 1.2 and oracles.variance(gain, start**2, 60) <= 1.3
    noise = torch.randn(20_000, 60, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        spec = method.sampler(method.cfg)
        no_fresh_noise = [].__getitem__  # there is one rung
        video = samplers.sample(trained, spec, noise, Conditioning(torch.zeros(1, 1)), None, no_fresh_noise)
    for frame in (8, 60):
        assert float(video[:, frame - 1].var()) == pytest.approx(oracles.variance(gain, start**2, frame), rel=0.05)


# ---------------------------------------------------------------------------------- the gradient of a rollout

VARIANTS = {"all frames": {}, "window": WINDOW}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("keys", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("mode", MODES)
class TestGradient:
    def make(self, toys, mode, keys, checkpointing, **more):
        return wan(toys, gradient_mode=mode, checkpointing=checkpointing, **keys, **more)

    @pytest.mark.parametrize("rung", [0, 2])
    def test_blocks_are_cut_from_each_other(self, toys, mode, keys, checkpointing, rung):
        method = self.make(toys, mode, keys, checkpointing)
        oracles.check_blocks_are_cut(method, step_at(method, rung))

    @pytest.mark.parametrize("rung", [0, 3])
    def test_the_gradient_is_that_of_the_last_forwards(self, toys, mode, keys, checkpointing, rung):
        method = self.make(toys, mode, keys, checkpointing)
        oracles.check_gradient(method, step_at(method, rung))

    def test_the_texts_projections_are_trained(self, toys, mode, keys, checkpointing):
        oracles.check_text_is_trained(self.make(toys, mode, keys, checkpointing))

    @pytest.mark.parametrize("start", [0, 4])
    def test_forwards_and_what_they_keep(self, toys, mode, keys, checkpointing, start):
        method = self.make(toys, mode, keys, checkpointing, start_gradient_frame=start)
        for rung in (0, 2):
            oracles.check_forwards(method, step_at(method, rung))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "keys",
    [FIRST, SINK, LONG, LONG_FIRST, {"student_sample_type": "ode"}, {"context_noise": 20.0}, {"dtype": torch.float64}],
    ids=["first frame", "sink", "long", "long, first frame", "ode", "context noise", "float64"],
)
def test_the_gradient_of_other_rollouts(toys, mode, keys):
    """Everything that shapes a rollout."""
    method = wan(toys, gradient_mode=mode, **keys)
    longer = keys["max_num_frames"] // 4 + 1 if "max_num_frames" in keys else None
    step = step_at(method, 2, longer)
    oracles.check_gradient(method, step, 1e-10 if "dtype" in keys else 1e-5)
    oracles.check_forwards(method, step)


@pytest.mark.parametrize("mode", MODES)
def test_blocks_that_leave_at_their_own_rungs(toys, mode):
    method = wan(toys, gradient_mode=mode, same_step_across_blocks=False)
    step = step_where(lambda s: len(set(method.exit_rungs(s, "student"))) == 3)
    oracles.check_blocks_are_cut(method, step)
    del method.streams, method.leave
    oracles.check_gradient(method, step)
    oracles.check_forwards(method, step)


def test_all_blocks_leave_at_the_last_rung_when_asked(toys):
    method = wan(toys, last_step_only=True)
    assert all(method.exit_rungs(step, "student") == [3, 3, 3] for step in range(1, 50))
    oracles.check_forwards(method, 1)


def test_blocks_draw_their_own_rungs(toys):
    """Uniform, and independent of each other: chi-square over 4000 steps, p > 1e-3, on pairs of neighbours."""
    method = wan(toys, same_step_across_blocks=False)
    drawn = torch.tensor([method.exit_rungs(step, "student") for step in range(1, 4001)])
    for values, cells, limit in ((drawn, 4, 16.27), (4 * drawn[:, :-1] + drawn[:, 1:], 16, 37.70)):
        for column in values.T:
            expected = 4000 / cells
            counts = torch.bincount(column, minlength=cells).double()
            assert float(((counts - expected).square() / expected).sum()) < limit


# ------------------------------------------------------------------------------------------------ replay == direct

SHAPES = {
    "plain": {},
    "independent first frame": FIRST,
    "window and sink": SINK,
    "own rungs": {"same_step_across_blocks": False},
    "ode": {"student_sample_type": "ode"},
    "context noise": {"context_noise": 20.0},
    "later blocks": {"start_gradient_frame": 3},
    "last rung": {"last_step_only": True},
    "long": LONG,
    "long, independent first frame": LONG_FIRST,
    "checkpointed, long": {**LONG, "checkpointing": True},
    "long, first frame made anew": {**LONG, "reencode_first_frame": True},
}


PRECISIONS = {"fp32": (torch.float32, 1e-5), "fp64": (torch.float64, 1e-10)}
SLOW_IN_FP64 = {
    "long, first frame made anew",
    "window and sink",
    "ode",
    "later blocks",
    "last rung",
    "checkpointed, long",
}


@pytest.mark.parametrize(
    ("keys", "dtype", "tolerance"),
    [
        pytest.param(
            keys,
            *precision,
            id=f"{shape}-{name}",
            marks=[pytest.mark.slow] if name == "fp64" and shape in SLOW_IN_FP64 else [],
        )
        for shape, keys in SHAPES.items()
        for name, precision in PRECISIONS.items()
    ],
)
def test_replay_equals_direct(toys, keys, dtype, tolerance):
    """Losses, logged values and every parameter's gradient, in each of several steps, with and without accumulation."""
    direct, replay = (wan(toys, gradient_mode=mode, dtype=dtype, **keys) for mode in MODES)
    batch, seen = prompts_batch(), set()
    steps = range(1, 3)
    if "max_num_frames" in keys:
        longest = (keys["max_num_frames"] - 1) // 4 + 1
        steps = [step_where(lambda s, n=n: spans(direct, s)[-1][1] == n) for n in (direct._num_frames(1, ""), longest)]
        steps = sorted({*steps, step_where(lambda s: spans(direct, s)[-1][1] == keys.get("frames", 9))})
    for step in steps:
        seen.add(spans(direct, step)[-1][1])
        (loss, expected), (other, found) = (gradients(method, batch, step) for method in (direct, replay))
        assert float(other) == pytest.approx(float(loss), rel=tolerance) and other.dtype == loss.dtype
        check_equal(found, expected, tolerance)
        half = gradients(replay, batch, step, accumulation=2)[1]
        check_equal({name: 2 * gradient for name, gradient in half.items()}, found, tolerance)
    assert len(seen) >= (2 if "max_num_frames" in keys else 1)
    metrics = [method.single_train_step(batch, 1, "student")[1] for method in (direct, replay)]
    assert {k: float(v) for k, v in metrics[0].items()} == {k: float(v) for k, v in metrics[1].items()}


def test_a_replay_runs_in_the_context_of_its_step():
    """torch.compile's settings are context variables (torch >= 2.12), and a GPU's backward runs in another thread."""
    setting, seen = contextvars.ContextVar("setting", default=0), []
    setting.set(1)
    loss = _Replayed.apply(
        torch.zeros((), requires_grad=True), lambda scale: seen.append((setting.get(), float(scale)))
    )
    thread = threading.Thread(target=(3 * loss).backward)
    thread.start()
    thread.join()
    assert seen == [(1, 3.0)]


@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_add_up(toys, mode):
    """Two halves at half the loss are the whole batch."""
    method = wan(toys, gradient_mode=mode)
    whole = prompts_batch(4)
    _, expected = gradients(method, whole, 1)
    method.student.transformer.zero_grad()
    for rows in ([0, 1], [2, 3]):
        batch = prompts_batch(4)
        part = {
            key: [batch[key][i] for i in rows] if isinstance(batch[key], list) else batch[key][rows] for key in batch
        }
        (method.single_train_step(part, 1, "student")[0] / 2).backward()
    check_equal({name: p.grad for name, p in method.student.transformer.named_parameters()}, expected, 1e-5)


# -------------------------------------------------------------------------------------- training is as inference is

ROLLOUTS = {
    "sde": {},
    "ode": {"student_sample_type": "ode"},
    "context noise": {"context_noise": 20.0},
    "ode, context noise": {"student_sample_type": "ode", "context_noise": 20.0},
    "window": WINDOW,
    "sink": SINK,
    "first frame": FIRST,
    "long": LONG,
    "one rung": {"denoising_steps": [1000.0]},
}


@pytest.mark.parametrize("keys", ROLLOUTS.values(), ids=ROLLOUTS)
def test_a_rollout_is_what_the_sampler_streams(toys, keys):
    oracles.check_rollout(wan(toys, **keys))


@pytest.mark.parametrize("context_noise", [0.0, 20.0])
@pytest.mark.parametrize("keys", [{}, FIRST, LONG], ids=["plain", "first frame", "long"])
def test_the_context_is_exact(toys, monkeypatch, context_noise, keys):
    """Sigma 0 gives the network timestep 0; context noise 20 is sigma 0.02, timestep 20."""
    oracles.check_context(wan(toys, context_noise=context_noise, **keys), monkeypatch)


def test_the_sampler_says_how_training_rolls(toys):
    spec = wan(toys, student_sample_type="ode", context_noise=20.0)
    spec = spec.sampler(spec.cfg)
    assert spec.streaming and spec.solver == "ode" and spec.context_noise == 0.02 and spec.guidance_scale == 1
    assert spec.sigmas == pytest.approx((1.0, 15 / 16, 5 / 6, 5 / 8, 0.0))


def test_the_critic_rolls_the_same_way_without_a_graph(toys):
    """Its own draws; gradient for the critic alone."""
    method = wan(toys, **LONG)
    batch = prompts_batch()
    for step in range(1, 5):
        loss, metrics = method.single_train_step(batch, step, "critic")
        loss.backward()
        assert all(p.grad is None for p in method.student.transformer.parameters())
        assert all(p.grad is not None for p in method.critic.transformer.parameters())
        assert sum(float(v) for k, v in metrics.items() if k.startswith("exit_rung/")) == pytest.approx(1)
    with torch.no_grad():
        video = method.generate(batch, batch["prompt_embeds"], method.streams(batch, 1, "critic"), 1, "critic")
        assert video.shape == (2, 9, 16, 4, 4)
        step = step_where(lambda s: method.exit_rungs(s, "critic")[0] == method.exit_rungs(s, "student")[0])
        assert not torch.equal(
            rolled(method, batch, step).exits[0].noisy, rolled(method, batch, step, "critic").exits[0].noisy
        )


# -------------------------------------------------------------------------------------------------- long rollouts


def test_the_first_scored_frame_may_be_made_anew(toys):
    """The picture with which the frames up to there end, as the latent of a video's start; the others stay, and a rollout as
    long as a clip stays whole."""
    method, video = wan(toys, **LONG, reencode_first_frame=True), torch.randn(2, 15, 16, 4, 4)
    window = method.scored(video)
    pixels = method.vae.decode(video[:, :7])
    assert torch.equal(window[:, 1:], video[:, 7:]) and pixels.shape[1] == 25
    assert torch.allclose(window[:, :1], method.vae.encode(pixels[:, -1:]), atol=1e-6)
    assert torch.equal(method.scored(video[:, :9]), video[:, :9])
    assert torch.equal(wan(toys, **LONG).scored(video), video[:, 6:])


@pytest.mark.parametrize("first", [False, True], ids=["blocks", "independent first frame"])
def test_lengths_are_uniform_over_those_allowed(toys, first):
    """All lengths from a clip's to the longest, a block apart; chi-square over 4000 steps, p > 1e-3; each phase has its own."""
    keys = LONG_FIRST if first else LONG
    method = wan(toys, **keys)
    shortest, longest = (7, 13) if first else (9, 15)
    allowed = list(range(shortest, longest + 1, 3))
    drawn = {
        role: [method.rollout_shape(batch_of(1), s, role)[1] for s in range(1, 4001)] for role in ("student", "critic")
    }
    pairs = [10_000 * a + b for a, b in zip(drawn["student"], drawn["critic"], strict=True)]
    for values, cells, limit in ((drawn["student"], 3, 13.82), (drawn["critic"], 3, 13.82), (pairs, 9, 26.12)):
        counts = torch.unique(torch.tensor(values), return_counts=True)[1].double()
        assert len(counts) == cells
        assert float(((counts - 4000 / cells).square() / (4000 / cells)).sum()) < limit
    assert sorted(set(drawn["student"])) == allowed == sorted(set(drawn["critic"]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "keys", [LONG, LONG_FIRST, {}, FIRST], ids=["long", "long, first frame", "clip", "first frame"]
)
def test_the_last_window_is_scored_and_its_first_block_masked(toys, mode, keys):
    """The derivative of the loss by the rollout's video: exactly zero before the last clip and in its first block (its first
    frame where that is a block), the distribution-matching gradient over the number of what is left elsewhere; nothing is
    masked in a rollout as long as a clip."""
    method, batch = wan(toys, gradient_mode=mode, **keys), prompts_batch()
    roll, frames, lengths = method.roll, keys.get("frames", 9), set()
    scored = {}

    def as_leaf(*args):
        rollout = roll(*args)
        scored["video"] = rollout.video.detach().requires_grad_(mode == "direct")
        return dataclasses.replace(rollout, video=scored["video"])

    score = method.score
    method.roll = as_leaf
    method.score = lambda x, *args: scored.setdefault("score", (x, *score(x, *args)))[1:]
    method.replay = lambda rollout, slope, step: scored.update(slope=slope)
    for step in range(1, 13):
        scored.clear()
        loss, _ = method.student_step(batch, step)
        (loss / 4).backward()
        slope = 4 * (scored["video"].grad if mode == "direct" else scored["slope"])
        total = slope.shape[1]
        lengths.add(total)
        start = total - frames
        masked = (1 if "independent_first_frame" in keys.get("student", {}) else 3) if start else 0
        assert method.masked_frames(step, "student") == masked
        assert first_trained(method, step) == (start + masked if start else 0)
        assert torch.equal(scored["score"][0], scored["video"][:, start:])  # the last frames, as many as a clip has
        expected = scored["score"][1][:, masked:] / scored["score"][1][:, masked:].numel()
        assert not slope[:, : start + masked].any()
        assert slope[:, start + masked :].flatten(2).any(2).all()
        torch.testing.assert_close(slope[:, start + masked :], expected, rtol=1e-5, atol=1e-8)
        assert float(loss.detach()) == pytest.approx(
            float(0.5 * scored["score"][1][:, masked:].square().mean()), rel=1e-5
        )
    assert len(lengths) == (3 if "max_num_frames" in keys else 1)


# ----------------------------------------------------------------------------------------------------------- costs


@pytest.mark.parametrize("keys", [{}, {**SINK, "context_noise": 20.0}, {"student_sample_type": "ode", **WINDOW}])
def test_a_rollout_never_waits_for_the_device(toys, keys):
    """With and without gradient, and in the replayed backward."""
    method, batch = wan(toys, **keys), prompts_batch()
    step = step_at(method, 3)
    arguments = (method.prompt_embeds(batch), method.streams(batch, step, "student"), step, "student")
    with Record() as record:
        rollout = method.roll(batch, *arguments)
        assert rollout.video.requires_grad
        with torch.no_grad():
            rollout = method.roll(batch, *arguments)
        method.replay(rollout, torch.ones_like(rollout.video), step)
    assert len(record.names) > 1000 and not SYNCHRONISING & set(record.names)
    assert any(p.grad is not None for p in method.student.transformer.parameters())


class Allocations(TorchDispatchMode):
    """Empty tensors of four dimensions that come to life inside: what a cache is made of."""

    def __init__(self):
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.empty.memory_format and out.ndim == 4:
            self.shapes.append(tuple(out.shape))
        return out


@pytest.mark.parametrize("mode", MODES)
def test_the_cache_is_allocated_once(toys, mode):
    """For all steps of both roles; another batch size has its own."""
    method = wan(toys, gradient_mode=mode)
    with Allocations() as made:
        for step in range(1, 5):
            for role in ("student", "critic"):
                method.single_train_step(prompts_batch(), step, role)[0].backward()
    keys, text = (9 * 4, 2, 2, 16), (2, 8, 2, 16)
    assert made.shapes == [keys, keys, text, text] * 2
    with Allocations() as made:
        method.single_train_step(prompts_batch(3), 5, "critic")
    assert len(made.shapes) == 8


def test_the_cache_is_allocated_once_for_each_length(toys):
    method = wan(toys, **LONG)
    lengths = set()
    with Allocations() as made:
        for step in range(1, 9):
            lengths.add(spans(method, step)[-1][1])
            method.single_train_step(prompts_batch(), step, "student")
    assert len(lengths) == 3
    assert len(made.shapes) <= 8 * len(lengths)


@pytest.mark.slow
def test_replay_holds_one_block_however_many_there_are():
    """The benchmark: what autograd holds, from 3 to 9 blocks, grows by at most 15 %; in direct mode with the blocks."""
    command = [sys.executable, str(ROOT / "benchmarks/self_forcing_memory.py"), "--batch", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    values = json.loads(done.stdout.strip().splitlines()[-1])
    assert values["replay_9_to_3_blocks"] <= 1.15 and values["direct_9_to_3_blocks"] > 2, values
    peaks = values["peak_mib"]
    assert peaks["replay"]["3"] < 0.5 * peaks["direct"]["3"], values


# -------------------------------------------------------------------------------------------- ranks, and draws


def test_all_ranks_have_the_same_rollouts(toys):
    """With real processes in integration/test_self_forcing.py"""
    oracles.check_exits_and_lengths_are_shared(toys.cache, toys.folder)
    oracles.check_exits_and_lengths_are_shared(toys.cache, toys.folder, same_step_across_blocks=False)


def test_draws_belong_to_samples(toys):
    """A sample's rollout is the same in another micro-batch; no draw comes from a global generator."""
    method = chain(toys, steps=AUTHORS, context_noise=20.0)
    step, state = step_at(method, 3), torch.get_rng_state()
    with torch.no_grad():
        whole = rolled(method, batch_of(4), step).video
        half = rolled(method, batch_of(2, positions=[2, 3]), step).video
    torch.testing.assert_close(half, whole[2:])
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------------------- mutations


def copying(p: kv_cache.LayerPass, size: int, write: bool) -> kv_cache.LayerPass:
    """A pass of a block of `size` tokens, made in place, as one that copies its context."""
    if not p.in_place:
        return p
    room = {"key": p.keys[0], "value": p.values[0]}
    context = {f"{name}s": (x[:-size],) if x.shape[0] > size else () for name, x in room.items()}
    slots = {f"write_{name}s": (x[-size:],) if write else () for name, x in room.items()}
    return dataclasses.replace(p, in_place=False, **context, **slots)


def graph_in_cache(patch) -> None:
    """The cache is written with gradient: nothing is detached."""
    passes = KVCache.passes

    def passing(self, start, end, *, write):
        self._reading = self.layers
        with torch.no_grad():
            found = passes(self, start, end, write=write)
        with torch.enable_grad():
            found = [copying(p, (end - start) * self.tokens_per_frame, write) for p in found]
        return [dataclasses.replace(p, text="compute") if torch.is_grad_enabled() else p for p in found]

    def commit(self, block, noise, cond, cache, start):
        sigma = torch.zeros(block.shape[:2])
        self.student.transformer(block, sigma, cond.text, cache=cache, start_frame=start, commit=True)

    patch.setattr(KVCache, "passes", passing)
    patch.setattr(kv_cache, "_ranges", torch.enable_grad()(kv_cache._ranges))
    patch.setattr(SelfForcingMethod, "commit", commit)


def cached_text(patch) -> None:
    """Keys and values of the text come from the cache under gradient too."""
    passes = KVCache.passes

    def passing(self, start, end, *, write):
        found = passes(self, start, end, write=write)
        return [dataclasses.replace(p, text="reuse") if self.text_embedding is not None else p for p in found]

    patch.setattr(KVCache, "passes", passing)


def whole_walk(patch) -> None:
    """Gradient through all rungs."""
    patch.setattr(SelfForcingMethod, "walk", SelfForcingMethod.walk.__wrapped__)


def own_exits(patch) -> None:
    """Each rank leaves where it likes."""
    patch.setattr(SelfForcingMethod, "exit_rung", lambda self, step, role: int(torch.randint(len(self.sigmas), ())))


def own_lengths(patch) -> None:
    """Each rank rolls as long as it likes."""

    @functools.cache
    def length(rank, step, role):
        return FRAMES + fold(rank, step, role) % 4

    patch.setattr(SelfForcingMethod, "_num_frames", lambda self, step, role: length(torch.initial_seed(), step, role))


def no_clean_pass(patch) -> None:
    """The context is what the buffer held, zeros here."""

    def commit(self, block, noise, cond, cache, start):
        for layer in cache.layers:
            layer.key.zero_(), layer.value.zero_()
        cache.end = start + block.shape[1]

    patch.setattr(SelfForcingMethod, "commit", commit)


def no_context_pass_after_the_first(patch) -> None:
    """Later blocks are committed as the first one was."""
    commit = SelfForcingMethod.commit

    def committing(self, block, noise, cond, cache, start):
        commit(self, block, noise, cond, cache, start) if start == 0 else setattr(cache, "end", start + block.shape[1])

    patch.setattr(SelfForcingMethod, "commit", committing)


def wrong_slot(patch) -> None:
    passes = KVCache.passes

    def passing(self, start, end, *, write):
        found, size = passes(self, start, end, write=write), (end - start) * self.tokens_per_frame
        if not write:
            return found
        slots = [
            {f"write_{name}s": kv_cache._ranges(getattr(layer, name), ((0, size),)) for name in ("key", "value")}
            for layer in self.layers
        ]
        return [dataclasses.replace(copying(p, size, write), **slot) for p, slot in zip(found, slots, strict=True)]

    patch.setattr(KVCache, "passes", passing)


def noisy_context(patch) -> None:
    """What the last forward was given is committed, not what it made."""
    walk, commit, last = SelfForcingMethod.walk, SelfForcingMethod.commit, {}

    def walking(self, *args):
        last["exit"] = walk(self, *args)
        return last["exit"]

    patch.setattr(SelfForcingMethod, "walk", walking)
    patch.setattr(SelfForcingMethod, "commit", lambda self, block, *args: commit(self, last["exit"].noisy, *args))


def slightly_noisy_level(patch) -> None:
    """The authors' training code: a clean block is said to be at timestep 5."""
    commit = WanCausalModel.commit
    patch.setattr(
        WanCausalModel,
        "commit",
        lambda self, block, cond, cache, start, level: commit(self, block, cond, cache, start, 0.005),
    )


def keys_before_rope(patch) -> None:
    forward = network.SelfAttention.forward

    def unturned(self, x, rope, mask, stream, *rest):
        out = forward(self, x, rope, mask, stream, *rest)
        if stream is not None and stream.in_place:
            network.append(stream.keys[0], self.key_value(x, None)[0])
        elif stream is not None and stream.write_keys:
            network.store(stream.write_keys, self.key_value(x, None)[0])
        return out

    patch.setattr(network.SelfAttention, "forward", unturned)


def every_block_at_frame_0(patch) -> None:
    table = network.rope_table
    patch.setattr(network, "rope_table", lambda t, h, w, d, start, *rest: table(t, h, w, d, 0, *rest))


def unmasked(patch) -> None:
    patch.setattr(SelfForcingMethod, "masked_frames", lambda self, step, role: 0)


def unscaled_replay(patch) -> None:
    """The replayed backward does not see that the loss was divided."""
    replay = SelfForcingMethod.replay
    patch.setattr(
        SelfForcingMethod,
        "replay",
        lambda self, rollout, slope, step: replay(self, rollout, 2 * slope, step),
    )


MUTATIONS = {  # how it is broken: the checks that must see it
    graph_in_cache: ["cut", "gradient"],
    cached_text: ["text"],
    whole_walk: ["cut", "forwards"],
    own_exits: ["shared"],
    own_lengths: ["shared"],
    no_clean_pass: ["rollout", "context", "gradient"],
    no_context_pass_after_the_first: ["rollout", "context"],
    wrong_slot: ["rollout"],
    noisy_context: ["rollout", "context", "gradient"],
    slightly_noisy_level: ["context"],
    keys_before_rope: ["rollout"],
    every_block_at_frame_0: ["rollout"],
    unmasked: ["long"],
    unscaled_replay: ["replayed"],
}


@pytest.mark.parametrize(
    ("mutation", "check"),
    [(m, check) for m, checks in MUTATIONS.items() for check in checks],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_mutations_are_seen(toys, monkeypatch, mutation, check):
    """The check that holds on the method (above) fails on the broken method."""

    def on(check_, rung, **keys):
        method = wan(toys, **keys)
        check_(method, step_at(method, rung, 12 if "max_num_frames" in keys else None))

    longer = {**LONG, "max_num_frames": 45}
    checks = {
        "cut": lambda: on(oracles.check_blocks_are_cut, 3),
        "gradient": lambda: on(oracles.check_gradient, 0),
        "text": lambda: oracles.check_text_is_trained(wan(toys)),
        "forwards": lambda: on(oracles.check_forwards, 3),
        "shared": lambda: oracles.check_exits_and_lengths_are_shared(toys.cache, toys.folder),
        "rollout": lambda: oracles.check_rollout(wan(toys)),
        "context": lambda: oracles.check_context(wan(toys), monkeypatch),
        "long": lambda: on(oracles.check_gradient, 0, **longer),
        "replayed": lambda: on(oracles.check_gradient, 0, gradient_mode="replay"),
    }
    checks[check]()
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        checks[check]()


# ----------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("student", "method", "overrides", "message"),
    [
        ({"name": "wan", "frames_per_block": 0}, {}, {}, "method 'self_forcing' trains a 'wan_causal' student"),
        ({}, {"rollout": "data"}, {}, "method.rollout = 'data': self_forcing trains on its own rollouts, \"simulate\""),
        (
            {"frames_per_block": 3},
            {"num_frames_per_block": 1},
            {},
            "method.num_frames_per_block = 1, but models.student.frames_per_block = 3: give it there alone",
        ),
        ({}, {"context_noise": 1000.0}, {}, "method.context_noise = 1000.0: a timestep, in [0, 1000)"),
        ({}, {"context_noise": -1.0}, {}, "method.context_noise = -1.0: a timestep, in [0, 1000)"),
        (
            {},
            {"start_gradient_frame": 3},
            {},
            "method.start_gradient_frame = 3: must be in [0, 2], or no block of data.num_frames = 9 would be trained",
        ),
        ({}, {"start_gradient_frame": -1}, {}, "method.start_gradient_frame = -1: must be in [0, 2]"),
        (
            {"local_attn_frames": 2},
            {"max_num_frames": 16},
            {},
            "method.max_num_frames = 16: must be 4n + 1 and at least data.num_frames = 9",
        ),
        ({"local_attn_frames": 2}, {"max_num_frames": 5}, {}, "method.max_num_frames = 5: must be 4n + 1 and at least"),
        (
            {"frames_per_block": 3, "local_attn_frames": 3},
            {"max_num_frames": 13},
            {},
            "method.max_num_frames = 13: 4 latent frames do not divide into blocks of 3",
        ),
        ({}, {"max_num_frames": 17}, {}, "models.student.local_attn_frames = -1"),
        ({}, {"reencode_first_frame": True}, {}, "method.reencode_first_frame has no effect without max_num_frames"),
        ({"frames_per_block": 2}, {}, {}, "data.num_frames = 9, models.student: 3 latent frames do not divide"),
        ({}, {"gradient_mode": "both"}, {}, "method.gradient_mode = 'both' is not allowed."),
        ({}, {"student_sample_type": "sdee"}, {}, "Did you mean 'sde'"),
        ({}, {"last_step": True}, {}, "Did you mean 'last_step_only'"),
        ({}, {"same_step_across_blocks": 1}, {}, "method.same_step_across_blocks = 1 has the wrong type int"),
        ({}, {"denoising_steps": [750.0]}, {}, "the first one must be 1000"),
        ({}, {"student_update_interval": 0}, {}, "method.student_update_interval = 0: must be >= 1"),
    ],
)
def test_config_errors_are_one_line(tmp_path, student, method, overrides, message):
    with pytest.raises(UserError) as error:
        recipe = self_forcing_recipe(tmp_path, {"student": student}, **method)
        small_config("nowhere", tmp_path, job__config_file=recipe, **overrides)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("student", "method"),
    [
        ({"frames_per_block": 3}, {"num_frames_per_block": 3}),
        ({}, {"start_gradient_frame": 2, "context_noise": 999.0, "gradient_mode": "replay"}),
        ({}, {"max_num_frames": 9}),
        ({"local_attn_frames": 2}, {"max_num_frames": 81}),
    ],
)
def test_what_the_checks_must_not_refuse(tmp_path, student, method):
    recipe = self_forcing_recipe(tmp_path, {"student": student}, **method)
    cfg = small_config("nowhere", tmp_path, job__config_file=recipe)
    assert not SelfForcingMethod.needs_latents(cfg) and cfg.method.rollout == "simulate"


def test_a_start_of_the_gradient_after_the_last_block_is_refused(tmp_path):
    recipe = self_forcing_recipe(tmp_path, {"student": {"frames_per_block": 3}}, start_gradient_frame=1)
    with pytest.raises(UserError, match="start_gradient_frame"):
        small_config("nowhere", tmp_path, job__config_file=recipe)


def test_longer_rollouts_of_a_clip_of_one_block_are_refused(tmp_path):
    student = {"frames_per_block": 3, "local_attn_frames": 3}
    recipe = self_forcing_recipe(tmp_path, {"student": student}, max_num_frames=21)
    with pytest.raises(UserError, match="max_num_frames"):
        small_config("nowhere", tmp_path, job__config_file=recipe)
