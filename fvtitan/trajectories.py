"""A teacher's ODE trajectories -> trajectory cache, for the methods kd and kd_causal.

    python -m fvtitan.trajectories CONFIG [--section.key value ...]
    torchrun --nproc_per_node=8 -m fvtitan.trajectories CONFIG

CONFIG is the recipe that will train on them. The ranks make different samples at the same time, with the same result as one
process; a run that was interrupted, at any moment, goes on with the samples that are missing.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from fvtitan import samplers
from fvtitan.components.progress import Progress
from fvtitan.components.rng import generator
from fvtitan.config import load_config
from fvtitan.data.latent_cache import LatentCache
from fvtitan.data.prepare import prepare_data
from fvtitan.data.trajectory_cache import TrajectoryCache, TrajectoryFolder, num_complete
from fvtitan.distributed.mesh import Mesh, data_ranks, leads_sequence
from fvtitan.distributed.utils import close_distributed, init_distributed, log, on_rank_zero, only_job
from fvtitan.errors import UserError, cli
from fvtitan.flow_matching import NUM_TIMESTEPS, euler_ladder
from fvtitan.methods import METHODS
from fvtitan.methods.kd import KDConfig
from fvtitan.models import MODELS, build_roles
from fvtitan.models.base import CausalModelBase, ModelBase
from fvtitan.models.wan.weights import weights_hash
from fvtitan.samplers import SamplerSpec, VelocityFn

if TYPE_CHECKING:
    from fvtitan.config import JobConfig


def build_contract(cfg: JobConfig, prompts: LatentCache, channels: int, teacher: str) -> dict[str, Any]:
    """Everything that determines the content of a cache. `teacher` is the hash of its weights, "" when there is none."""
    method, shift = cfg.method, cfg.schedule.shift
    ladder = euler_ladder(method.teacher_inference_steps, shift)
    frames, height, width = cfg.data.latent_size()
    return {
        "teacher": teacher,
        "teacher_dtype": cfg.role_dtypes("teacher")[1] if teacher else "",
        "teacher_inference_steps": method.teacher_inference_steps,
        "teacher_guidance_scale": method.teacher_guidance_scale,
        "shift": shift,
        "timesteps": [NUM_TIMESTEPS * ladder[i] for i in method.stored(shift)],
        "uncond_prompt": cfg.data.uncond_prompt,
        "shape": [frames, channels, height, width],
        "dtype": method.cache_dtype,
        "prompts": prompts.fingerprint,
        "seed": cfg.training.seed,
        "causal": dataclasses.asdict(cfg.models["student"].causal()) if method.autoregressive else None,
    }


def prepare_trajectories(
    cfg: JobConfig, teacher: ModelBase | None, prompts: LatentCache, channels: int
) -> TrajectoryCache:
    """The complete cache of `cfg.method` for latents of `channels`, filled first when it is not complete. All ranks take part.

    Raises `UserError` when it is incomplete and there is no teacher, was made under another contract, or is being made
    by another job.
    """
    method, configured = cfg.method, cfg.models.get("teacher")
    total = method.num_trajectories
    identity = teacher.identity if teacher else weights_hash(configured) if configured else ""
    contract = build_contract(cfg, prompts, channels, identity)
    unknown = [] if configured else ["teacher", "teacher_dtype"]
    folder = on_rank_zero(lambda: TrajectoryFolder(method.teacher_path_cache, contract, ignore=unknown))
    if on_rank_zero(lambda: num_complete(folder.path, total)) < total:
        with only_job(folder.path):
            missing = on_rank_zero(lambda: folder.missing(total))
            if missing and teacher is None:
                raise UserError(
                    f"method.teacher_path_cache = {method.teacher_path_cache!r} holds {total - len(missing)} of "
                    f"num_trajectories = {total}: add a [models.teacher] to make the rest, or lower num_trajectories"
                )
            log(
                f"{folder.path}: {total - len(missing)} of {total} trajectories are there and whole; {len(missing)} to make"
            )
            fill(cfg, teacher, prompts, folder, missing)
    stored = method.stored(cfg.schedule.shift)
    rows = [stored.index(rung) for rung in method.rungs(cfg.schedule.shift)]
    return TrajectoryCache(folder, total, prompts, rows)


def fill(
    cfg: JobConfig, teacher: ModelBase | None, prompts: LatentCache, folder: TrajectoryFolder, missing: list[int]
) -> None:
    """Make the missing samples, pack all into shards, and say that the cache is complete.

    Samples are made in fixed groups of `training.local_batch_size`, whoever makes them: the last bits of a forward depend on
    what else is in the batch. The forwards of a sharded teacher are collective: a rank without a group runs along.
    """
    (rank, world), writes = data_ranks(cfg), leads_sequence(cfg)
    size, total = cfg.training.local_batch_size, cfg.method.num_trajectories
    on_rank_zero(folder.begin)
    groups, wanted = sorted({index // size for index in missing}), set(missing)
    if teacher is not None:
        teacher.init_preprocessors(cfg, prompts)
    mine = [index for group in groups[rank::world] for index in _members(group, size) if index in wanted]
    progress = Progress(
        "trajectories", len(mine), "samples" + (" of this rank" if world > 1 else ""), quiet=dist.get_rank() != 0
    )
    for first in range(0, len(groups), world):
        own = first + rank < len(groups)
        members = _members(groups[first + rank] if own else groups[0], size)
        states, x0 = make_trajectories(cfg, teacher, prompts, members, folder.contract["shape"])
        done = [row for row, index in enumerate(members) if own and writes and index in wanted]
        for row in done:
            if not (states[row].isfinite().all() and x0[row].isfinite().all()):
                raise UserError(
                    f"{folder.path}: sample {members[row]} ({prompts.sample_id(members[row] % len(prompts))}): the teacher "
                    f"{cfg.models['teacher'].init_from} gives NaN or Inf, which is not written: are its weights damaged?"
                )
            folder.write_sample(members[row], states[row], x0[row])
        progress.add(len(done))
    dist.barrier()
    for name, indices in list(folder.shards(total).items())[dist.get_rank() :: dist.get_world_size()]:
        folder.pack(name, indices)
    dist.barrier()
    on_rank_zero(lambda: folder.commit(total))


def _members(group: int, size: int) -> range:
    return range(group * size, (group + 1) * size)


@torch.no_grad()
def make_trajectories(
    cfg: JobConfig, teacher: ModelBase, prompts: LatentCache, indices: Sequence[int], shape: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The stored states `[B, K, T, C, H, W]` of the samples `indices`, and where they end, x0 `[B, T, C, H, W]`.

    Euler steps on the run's ladder with guidance; block by block over its own clean blocks with an autoregressive teacher.
    """
    method, shift = cfg.method, cfg.schedule.shift
    ladder, stored = euler_ladder(method.teacher_inference_steps, shift), set(method.stored(shift))
    dtype = torch.float64 if method.cache_dtype == "float64" else torch.float32
    noise = [torch.randn(*shape, generator=generator("cpu", cfg.training.seed, "trajectory", i)) for i in indices]
    cond = teacher.conditioning([prompts[i % len(prompts)]["prompt_embeds"] for i in indices])
    scale = method.teacher_guidance_scale
    uncond = teacher.unconditional(len(indices)) if scale != 1 else None
    kept: list[Tensor] = []

    def solve(velocity_fn: VelocityFn, x: Tensor, _fresh: object = None) -> Tensor:
        states = []
        for rung, state in enumerate(samplers.euler_states(velocity_fn, x, ladder)):
            states += [state] if rung in stored else []
        kept.append(torch.stack(states, dim=1))
        return state

    x = torch.stack(noise).to(teacher.device, dtype)
    if method.autoregressive:
        assert isinstance(teacher, CausalModelBase)
        spec = SamplerSpec(tuple(ladder), scale, streaming=True)
        x0 = torch.cat(list(samplers.stream(teacher, spec, x, cond, uncond, solver=solve)), dim=1)
    else:
        x0 = solve(samplers.guided(teacher, cond, uncond, scale), x)
    return torch.cat(kept, dim=2), x0


def main() -> None:
    argv = sys.argv[1:]
    if argv and not argv[0].startswith("-"):
        argv = ["--job.config_file", *argv]
    cfg = load_config(argv, training=False)
    if not isinstance(cfg.method, KDConfig):
        raise UserError(f"method.name = {cfg.method.name!r} reads no trajectories: need a recipe of kd or kd_causal")
    if "teacher" not in cfg.models:
        raise UserError("there is no [models.teacher] to make trajectories with")
    device = init_distributed(cfg.comm)
    try:
        prepare_data(cfg)
        needed = [role for role in METHODS[cfg.method.name].needed_roles(cfg) if role == "teacher"]
        roles = build_roles(cfg, Mesh(cfg, device.type), device, needed)
        prompts = LatentCache(cfg.data.path, prompts_only=True)
        teacher = cfg.models["teacher"]
        sizes = MODELS[teacher.name].role_sizes(teacher, "teacher")
        cache = prepare_trajectories(cfg, roles.get("teacher"), prompts, sizes.in_channels)
        log(f"{cache.folder.path}: complete, {len(cache)} trajectories")
    finally:
        close_distributed()


if __name__ == "__main__":
    cli(main)
