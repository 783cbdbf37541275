"""B4: a streaming few-step rollout over the KV cache against recomputing the whole past with the block-causal mask."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import models, roofline
from benchmarks.harness import Result, Row, Setting, absolute, compare, gate, interleave
from fvtitan.config import RoleConfig
from fvtitan.flops import Flops
from fvtitan.flow_matching import ScheduleConfig, few_step_ladder
from fvtitan.models.base import Conditioning
from fvtitan.models.blocks import CausalConfig, block_starts
from fvtitan.models.wan.model import WanCausalModel
from fvtitan.models.wan.transformer import WanConfig
from fvtitan.samplers import SamplerSpec, level, solve, stream

FRAMES_PER_BLOCK = 3
SPEC = SamplerSpec(few_step_ladder((1000, 750, 500, 250), 5.0), solver="sde", streaming=True)


def run(setting: Setting) -> Result:
    """The same weights, noise and rungs give the same video. Per block: 4 passes of the block and one that commits it,
    against 4 passes of it and all blocks before it."""
    if setting.is_gpu:
        cfg, grid, chunks = models.sizes(setting), (16, 60, 104), [7]
    elif setting.quick:
        cfg, grid, chunks = models.sizes(setting, 2), (16, 4, 4), [3]
    else:
        cfg, grid, chunks = models.sizes(setting, 2), (16, 16, 16), [3, 7]
    rows = [row for count in chunks for row in _rows(cfg, (1, FRAMES_PER_BLOCK * count, *grid), setting)]
    tokens = models.num_tokens((FRAMES_PER_BLOCK, *grid))
    size = (
        f"{cfg.num_layers} layers, d = {cfg.dim}, {tokens} tokens a block of {FRAMES_PER_BLOCK} latent frames, 4 rungs"
    )
    return Result("streaming rollout", size, rows)


@torch.no_grad()
def _rows(cfg: WanConfig, shape: tuple[int, ...], setting: Setting) -> list[Row]:
    network = models.transformer(cfg, setting)
    role = RoleConfig(name="wan_causal", flavor="tiny", frames_per_block=FRAMES_PER_BLOCK)
    common = {"dtype": network.head.head.weight.dtype, "trainable": False, "schedule": ScheduleConfig(shift=5.0)}
    model = WanCausalModel(network, role, device=setting.device, **common)
    noise, _, text = models.random_inputs(cfg, shape, setting)
    fresh = [torch.randn_like(noise) for _ in SPEC.sigmas]
    variants: dict[str, Callable[[], Tensor]] = {
        "KV cache": lambda: torch.cat(
            list(stream(model, SPEC, noise, Conditioning(text), None, fresh.__getitem__)), dim=1
        ),
        "whole past": lambda: _recomputed(model, noise, Conditioning(text), fresh),
    }
    videos = {name: variant() for name, variant in variants.items()}
    error = gate(videos["KV cache"], videos["whole past"], 5e-2 if setting.is_gpu else 1e-4, "videos")
    times = interleave({name: torch.no_grad()(variant) for name, variant in variants.items()}, setting)
    blocks = shape[1] // FRAMES_PER_BLOCK
    works = {name: _work(cfg, shape, blocks, cached=name == "KV cache") for name in variants}
    predicted = works["KV cache"].flops / works["whole past"].flops
    label = f"{blocks} blocks: KV cache / whole past"
    target = 0.6 if blocks > 2 else None
    rows = [compare(times, "KV cache", "whole past", what=label, target=target, error=error, predicted=predicted)]
    if setting.is_gpu:
        rows += [absolute(f"{name}, {blocks} blocks", times, name, works[name]) for name in variants]
    return rows


def _recomputed(model: WanCausalModel, noise: Tensor, cond: Conditioning, fresh: list[Tensor]) -> Tensor:
    """The rollout without a cache: every pass sees [clean past | noisy block], block-causal, the past at sigma 0."""
    done = noise[:, :0]
    for start, end in block_starts(model.causal.blocks(noise.shape[1])):

        def velocity(x: Tensor, sigma: Tensor, done: Tensor = done) -> Tensor:
            past = level(done, 0.0)
            whole = model.predict_velocity(torch.cat([done, x], dim=1), torch.cat([past, sigma], dim=1), cond)
            return whole[:, done.shape[1] :]

        block = solve(SPEC, velocity, noise[:, start:end], lambda rung, s=start, e=end: fresh[rung][:, s:e])
        done = torch.cat([done, block], dim=1)
    return done


def _work(cfg: WanConfig, shape: tuple[int, ...], blocks: int, *, cached: bool) -> roofline.Work:
    """FLOPs of a rollout: with the cache every pass is one block that sees all blocks so far."""
    causal, rungs = CausalConfig(FRAMES_PER_BLOCK), len(SPEC.sigmas) - 1
    if cached:
        forwards = (*[rungs + 1.0] * (blocks - 1), float(rungs))
        return roofline.Work(roofline.network(cfg, shape, causal, attention="streaming", forwards=forwards, texts=1.0))
    lengths = [(FRAMES_PER_BLOCK * (number + 1), *shape[2:]) for number in range(blocks)]
    whole = [roofline.network(cfg, length, causal, attention="block_causal") for length in lengths]
    return roofline.Work(sum(whole, Flops()) * rungs)
