"""What a recipe needs on so many GPUs, found out on a laptop: memory by part, FLOPs, collectives, a roofline time.

    python -m fvtitan.plan train_configs/wan2.1_t2v_14b_dmd2.toml --world-size 64 --memory 80 [--section.key value ...]

Runs the recipe's own training step as one rank of the job, on tensors that have shapes but no data and a process group without
peers. Networks deeper than 4 blocks are run with 3 and with 4, and continued: every block adds the same. So what is counted is
what the code does, under its checkpointing, sharding and sequence parallelism; torch.compile, which saves some more, is left
out. A teacher that only makes trajectories is counted all the time, though it leaves before the first step.

Exit status: 0 it fits, 1 it does not, 2 the recipe is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fvtitan import flops
from fvtitan.components.lora import base_parameters
from fvtitan.components.memory import LiveBytes
from fvtitan.config import JobConfig, load_config
from fvtitan.distributed.mesh import Mesh
from fvtitan.distributed.utils import clip_grad_norm, local_tensor
from fvtitan.errors import UserError, cli
from fvtitan.methods import METHODS
from fvtitan.methods.base import TrainingMethod
from fvtitan.methods.passes import Pass
from fvtitan.models import MODELS, build_roles
from fvtitan.models.base import ModelBase
from fvtitan.models.wan import attention

GIB = 2**30
RESERVE = 0.06
"""Share of a GPU's memory that CUDA's context, NCCL's buffers and the allocator's gaps take."""
COUNTED_DEPTH = 4
GPUS_OF_A_NODE = 8


@dataclass
class Phase:
    """What one phase of one optimizer step makes on this rank, all its micro-batches."""

    share: float = 1.0
    """How often a step of the run has it."""
    peak: float = 0.0
    """Bytes alive at once: activations, gathered parameters, gradients, what the phases before have left."""
    cache: float = 0.0
    """Of them, the KV cache."""
    calls: Counter[str] = field(default_factory=Counter)
    """Collectives by name."""
    traffic: Counter[str] = field(default_factory=Counter)
    """Bytes that this rank receives in them."""

    def plus(self, other: Phase, factor: float) -> Phase:
        """self + factor * other, number by number."""

        def added(a: Counter[str], b: Counter[str]) -> Counter[str]:
            return Counter({name: a[name] + factor * b[name] for name in a | b})

        return Phase(
            self.share,
            self.peak + factor * other.peak,
            self.cache + factor * other.cache,
            added(self.calls, other.calls),
            added(self.traffic, other.traffic),
        )


@dataclass(frozen=True)
class RoleMemory:
    """Bytes of a role on one GPU."""

    parameters: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    average: float = 0.0

    @property
    def held(self) -> float:
        """All the time; gradients come and go within a phase."""
        return self.parameters + self.optimizer + self.average

    def plus(self, other: RoleMemory, factor: float) -> RoleMemory:
        """self + factor * other, number by number."""
        ours, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return RoleMemory(*(a + factor * b for a, b in zip(ours, theirs, strict=True)))


@dataclass(frozen=True)
class Plan:
    """A job on one of its GPUs."""

    roles: dict[str, RoleMemory]
    phases: dict[str, Phase]
    flops: dict[str, flops.PhaseFlops]
    """Of one video, by phase."""
    videos: int
    """A step's, on the ranks of one sequence."""
    sequence: int
    tokens: int
    """Of one video."""
    seconds: dict[str, float]
    """Of a step by the roofline: compute, sharding (overlapped with it), sequence (not overlapped)."""

    @property
    def peak(self) -> float:
        """Bytes, at the worst moment of a step."""
        return sum(role.held for role in self.roles.values()) + max(phase.peak for phase in self.phases.values())

    @property
    def step_seconds(self) -> float:
        return max(self.seconds["compute"], self.seconds["sharding"]) + self.seconds["sequence"]


class _Traffic(TorchDispatchMode):
    """Counts collectives and the bytes that this rank receives."""

    NAMES = {"allgather": "all-gather", "all_gather": "all-gather", "reduce_scatter": "reduce-scatter"}
    NAMES |= {
        "all_to_all": "all-to-all",
        "alltoall": "all-to-all",
        "allreduce": "all-reduce",
        "all_reduce": "all-reduce",
    }

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            word = func._opname.strip("_")
            name = next((name for start, name in self.NAMES.items() if word.startswith(start)), None)
            if name:
                received = args[1] if name == "reduce-scatter" else result if isinstance(result, Tensor) else args[0]
                tensors = received if isinstance(received, list | tuple) else [received]
                self.calls[name] += 1
                self.bytes[name] += sum(tensor.nbytes for tensor in tensors)
        return result


class _Samples:
    """Stands for the data: one sample of the recipe's size."""

    has_latents, prompts_only, fingerprint = True, False, ""
    bucket_indices = [range(1)]

    def __init__(self, cfg: JobConfig, sizes: Any) -> None:
        frames, height, width = cfg.data.latent_size()
        self.sample = {
            "latents": torch.zeros(frames, sizes.in_channels, height, width, dtype=torch.bfloat16),
            "prompt_embeds": torch.zeros(sizes.text_len, sizes.text_dim, dtype=torch.bfloat16),
        }
        self.empty_prompt_embeds = self.negative_prompt_embeds = self.sample["prompt_embeds"]

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.sample

    def sample_id(self, index: int) -> str:
        return "planned"

    def batch(self, cfg: JobConfig) -> dict[str, Any]:
        """A micro-batch, as the loader would give it to any method."""
        size, latents = cfg.training.local_batch_size, self.sample["latents"]
        stacked = torch.stack([latents] * size)
        stored = len(cfg.method.stored(cfg.schedule.shift)) if hasattr(cfg.method, "stored") else 1
        return {
            "latents": stacked,
            "states": torch.stack([stacked] * stored, dim=1),
            "prompt_embeds": [self.sample["prompt_embeds"]] * size,
            "positions": torch.arange(size),
            "sample_indices": torch.arange(size),
            "sample_passes": torch.zeros(size, dtype=torch.int64),
            "sample_ids": [str(i) for i in range(size)],
            "captions": [""] * size,
            "epoch": 0,
        }


@contextlib.contextmanager
def fake_job(world_size: int) -> Iterator[None]:
    """A process group of `world_size` ranks of which only this one, rank 0, exists."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        for cached in (attention.rope_table, attention.block_mask):
            cached.cache_clear()  # they hold tensors without data


def role_memory(cfg: JobConfig, models: Mapping[str, ModelBase]) -> dict[str, RoleMemory]:
    """Bytes of every role's shards on this rank, from the networks themselves. One that roles share counts for its own role."""
    found = {}
    for role, model in models.items():
        shares, trained = cfg.models[role].share_base_with, model.trained_parameters() if model.trainable else {}
        parameters = [] if shares or cfg.models[role].cpu_offload else list(base_parameters(model.transformer).values())
        parameters += trained.values() if model.adapter else []
        held, learned = (sum(local_tensor(p.detach()).nbytes for p in part) for part in (parameters, trained.values()))
        averaged = cfg.ema.enable and role == "student"
        found[role] = RoleMemory(held, learned, 2 * learned, learned if averaged else 0.0)
    return found


def run_phases(cfg: JobConfig, mesh: Mesh, sizes: Mapping[str, Any]) -> tuple[dict[str, RoleMemory], dict[str, Phase]]:
    """One optimizer step of the method, on fake tensors, with networks of these sizes."""
    device, method_class = torch.device("cpu"), METHODS[cfg.method.name]
    with contextlib.redirect_stdout(None):
        models = build_roles(cfg, mesh, device, sizes=sizes)
    samples = _Samples(cfg, sizes["student"])
    batch = samples.batch(cfg)  # a real one: places in the global batch are read on the host
    with FakeTensorMode(allow_non_fake_inputs=True):
        for transformer in {model.transformer: None for model in models.values()}:
            transformer.to_empty(device=device)
        planned = type(method_class.__name__, (method_class,), {"dataset": lambda self: samples})
        method = planned(cfg=cfg, role_models=models)
        TrainingMethod.on_train_start(method)
        memory = role_memory(cfg, models)
        accumulation = _accumulation(cfg, dist.get_world_size())
        existing = [p for model in models.values() for p in model.transformer.parameters()]
        step, phases = _longest_step(method), {}
        with LiveBytes(existing) as live:
            for role in method.phases(1):
                gc.collect()
                live.peak = live.now
                phase = Phase(method.total_updates(role) / cfg.training.steps)
                for last in [False, True][accumulation == 1 :]:  # all but the last micro-batch are alike
                    method.role_modules[role].set_requires_gradient_sync(last or not cfg.parallelism.defer_grad_sync)
                    with _Traffic() as traffic:
                        loss, _ = method.single_train_step(batch, step, role)
                        (loss / accumulation).backward()
                        del loss
                        if last:
                            clip_grad_norm(method.get_grad_clip_targets(role), cfg.training.max_norm)
                    made = Phase(calls=traffic.calls, traffic=traffic.bytes)
                    phase = phase.plus(made, 1 if last else accumulation - 1)
                method.optimizers[role].zero_grad()
                phase.peak, phase.cache = live.peak, sum(model.cache_bytes() for model in models.values())
                phases[role] = phase
    return memory, phases


def _accumulation(cfg: JobConfig, world_size: int) -> int:
    sequences = world_size // cfg.parallelism.context_parallel_degree
    return cfg.global_batch_size(world_size) // (cfg.training.local_batch_size * sequences)


def _longest_step(method: TrainingMethod) -> int:
    """Among the first steps, that with the longest rollout."""
    return max(range(1, 65), key=lambda step: sum(rung + 1 for rung in method.exit_rungs(step, "student")))


def measure(cfg: JobConfig, mesh: Mesh, sizes: Mapping[str, Any]) -> tuple[dict[str, RoleMemory], dict[str, Phase]]:
    """`run_phases` of networks of any depth: deep ones are run with one block less too, and continued. Those that are equally
    deep go together."""

    def at(depths: Mapping[str, int]) -> tuple[dict[str, RoleMemory], dict[str, Phase]]:
        return run_phases(cfg, mesh, {r: dataclasses.replace(size, num_layers=depths[r]) for r, size in sizes.items()})

    counted = {role: min(size.num_layers, COUNTED_DEPTH) for role, size in sizes.items()}
    memory, phases = whole_memory, whole_phases = at(counted)
    for depth in sorted({size.num_layers for size in sizes.values()} - set(range(COUNTED_DEPTH + 1))):
        fewer = {role: n - (sizes[role].num_layers == depth) for role, n in counted.items()}
        less_memory, less_phases = at(fewer)
        more = depth - COUNTED_DEPTH

        def continued(total: dict, here: dict, less: dict, more: int = more) -> dict:
            return {key: total[key].plus(here[key].plus(less[key], -1), more) for key in total}

        whole_memory = continued(whole_memory, memory, less_memory)
        whole_phases = continued(whole_phases, phases, less_phases)
    return whole_memory, whole_phases


def role_sizes(cfg: JobConfig) -> dict[str, Any]:
    """Sizes of every role's network: by its flavor where that is given, so that nothing need be fetched."""
    sizes = {}
    for role, model in cfg.models.items():
        model = cfg.models[model.share_base_with] if model.share_base_with else model
        offline = dataclasses.replace(model, init_from="", init_role="student", init_weights="auto")
        sizes[role] = MODELS[model.name].role_sizes(offline if model.flavor else model, role)
    return sizes


def make_plan(cfg: JobConfig, world_size: int, rates: Rates) -> Plan:
    """Plan a checked configuration; collective over the ranks of a `fake_job`."""
    cfg = copy.deepcopy(cfg)
    cfg.compile.enable = False
    sizes, method = role_sizes(cfg), METHODS[cfg.method.name]
    (frames, height, width), student = cfg.data.latent_size(), sizes["student"]
    sequence = cfg.parallelism.context_parallel_degree
    memory, phases = measure(cfg, Mesh(cfg, "cpu"), sizes)
    videos = cfg.training.local_batch_size * _accumulation(cfg, world_size)
    passes = {role: method.passes(cfg, role) for role in phases}
    compute = sum(
        phases[role].share * videos / sequence * rates.compute_seconds(cfg, passes[role], sizes) for role in phases
    )
    traffic = Counter()
    for phase in phases.values():
        traffic.update({name: phase.share * count for name, count in phase.traffic.items()})
    bandwidth = rates.in_node if world_size <= GPUS_OF_A_NODE else rates.between_nodes
    seconds = {
        "compute": compute,
        "sharding": sum(count for name, count in traffic.items() if name != "all-to-all") / bandwidth,
        "sequence": traffic["all-to-all"] / (rates.in_node if sequence <= GPUS_OF_A_NODE else rates.between_nodes),
    }
    return Plan(
        roles=memory,
        phases=phases,
        flops={role: flops.phase_flops(cfg, passes[role], sizes, height, width) for role in phases},
        videos=videos,
        sequence=sequence,
        tokens=MODELS[cfg.models["student"].name].num_tokens(student, (1, frames, student.in_channels, height, width)),
        seconds=seconds,
    )


@dataclass(frozen=True)
class Rates:
    """How fast a GPU and its links are taken to be."""

    peak: float
    """FLOP/s."""
    in_node: float
    """Bytes a second that a GPU receives from others of its node."""
    between_nodes: float
    """The same, from other nodes."""

    def compute_seconds(self, cfg: JobConfig, passes: Sequence[Pass], sizes: Mapping[str, Any]) -> float:
        """Of one video on one GPU."""
        _, height, width = cfg.data.latent_size()
        mode = cfg.activation_checkpoint.mode
        return sum(
            flops.roofline_seconds(
                flops.role_flops(cfg, p, sizes, height, width), self.peak, gradient=p.gradient, mode=mode
            )
            for p in passes
        )


# --------------------------------------------------------------------------------------------------------- switches


def switches(cfg: JobConfig) -> dict[str, Callable[[JobConfig], None]]:
    """Single keys that change memory or time, and nothing of what is learned; and how to set them."""
    found: dict[str, Callable[[JobConfig], None]] = {}

    def offer(key: str, value: Any) -> None:
        def apply(other: JobConfig) -> None:
            *path, name = key.split(".")
            section: Any = other
            for part in path:
                section = section[part] if isinstance(section, dict) else getattr(section, part)
            setattr(section, name, value)

        found[f"{key} = {str(value).lower() if isinstance(value, bool) else value}"] = apply

    for mode in ("none", "selective", "full"):
        if mode != cfg.activation_checkpoint.mode:
            offer("activation_checkpoint.mode", mode)
    p = cfg.parallelism
    offer("parallelism.fsdp_reshard_after_forward", not p.fsdp_reshard_after_forward)
    offer("parallelism.context_parallel_degree", 2 * p.context_parallel_degree)
    if p.context_parallel_degree > 1:
        offer("parallelism.context_parallel_degree", p.context_parallel_degree // 2)
    if p.data_parallel_replicate_degree > 1:
        offer("parallelism.data_parallel_replicate_degree", 1)
    if cfg.training.local_batch_size % 2 == 0:
        offer("training.local_batch_size", cfg.training.local_batch_size // 2)
    for role, model in cfg.models.items():
        if not model.trainable and not model.cpu_offload:
            offer(f"models.{role}.cpu_offload", True)
    if getattr(cfg.method, "gradient_mode", "replay") == "direct":
        offer("method.gradient_mode", "replay")
    return found


def plan_switches(cfg: JobConfig, world_size: int, rates: Rates) -> dict[str, Plan]:
    """The plan with each switch that this job can take."""
    plans = {}
    for name, apply in switches(cfg).items():
        other = copy.deepcopy(cfg)
        other.training.global_batch_size = cfg.global_batch_size(world_size)
        apply(other)
        try:
            other.check()
            other.check_world(world_size)
            plans[name] = make_plan(other, world_size, rates)
        except UserError:
            continue  # not for this job: heads, batch or ranks do not divide
    return plans


def best_switch(plan: Plan, others: Mapping[str, Plan], room: float) -> str | None:
    """The one that buys the most: memory when the plan does not fit, else time among those that fit."""
    if plan.peak > room:
        better = {name: other.peak for name, other in others.items() if other.peak < plan.peak}
    else:
        fitting = {name: other.step_seconds for name, other in others.items() if other.peak <= room}
        better = {name: seconds for name, seconds in fitting.items() if seconds < 0.99 * plan.step_seconds}
    return min(better, key=better.get) if better else None


# ----------------------------------------------------------------------------------------------------------- report


def report(cfg: JobConfig, plan: Plan, world_size: int, memory: float, rates: Rates) -> list[str]:
    """The plan in words; `memory` is a GPU's, in bytes."""
    frames, height, width = cfg.data.latent_size()
    replicate, shard = cfg.data_parallel_degrees(world_size, "student")
    share = f"every {plan.sequence} GPUs that share a sequence" if plan.sequence > 1 else "each GPU"
    lines = [
        f"{cfg.job.config_file}: {cfg.method.name} on {world_size} GPUs of {memory / GIB:.0f} GiB",
        f"  replicate {replicate} x shard {shard} x sequence {plan.sequence}; checkpointing {cfg.activation_checkpoint.mode}; "
        f"{plan.videos} video{'s' if plan.videos > 1 else ''} a step on {share}, each {frames} x {height} x {width} latents = "
        f"{plan.tokens:,} tokens",
        "",
        f"  {'GiB on each GPU':<28}{'parameters':>12}{'gradients':>12}{'optimizer':>12}{'average':>12}",
    ]
    for role, part in plan.roles.items():
        numbers = "".join(f"{value / GIB:12.3g}" for value in dataclasses.astuple(part))
        lines.append(f"  {role:<28}{numbers}")
    for role, phase in plan.phases.items():
        rest = phase.peak - phase.cache - plan.roles[role].gradients
        cache = f", KV cache {phase.cache / GIB:.2f}" if phase.cache else ""
        lines.append(f"  {role + ' phase':<28}activations, gathered parameters, buffers {rest / GIB:.2f}{cache}")
    verdict = "fits" if plan.peak <= (1 - RESERVE) * memory else "does NOT fit"
    lines.append(
        f"  {'peak':<28}{plan.peak / GIB:.2f} of {(1 - RESERVE) * memory / GIB:.1f} ({RESERVE:.0%} kept for CUDA, NCCL, gaps): "
        f"it {verdict}"
    )
    lines += [
        "",
        f"  {'each optimizer step':<28}{'share':>12}{'PFLOP':>12}{'recomputed':>12}   collectives (GiB received)",
    ]
    for role, phase in plan.phases.items():
        f = plan.flops[role] * (plan.videos / 1e15)
        calls = ", ".join(
            f"{round(count)} {name}s ({phase.traffic[name] / GIB:.2f})" for name, count in sorted(phase.calls.items())
        )
        lines.append(
            f"  {role + ' phase':<28}{phase.share:>12.2f}{f.model:>12.2f}{f.hardware - f.model:>12.2f}   {calls}"
        )
    needed = (
        sum(phase.share * plan.flops[role].model for role, phase in plan.phases.items()) * plan.videos / plan.sequence
    )
    mfu = needed / plan.step_seconds / rates.peak
    lines += [
        "",
        f"  roofline: {plan.step_seconds:.2f} s a step (compute {plan.seconds['compute']:.2f}, sharding "
        f"{plan.seconds['sharding']:.2f} beside it, sequence {plan.seconds['sequence']:.2f}), "
        f"{plan.videos * plan.tokens / plan.sequence / plan.step_seconds:.0f} tokens/s a GPU, MFU {mfu:.0%}",
    ]
    return lines


def report_switches(plan: Plan, others: Mapping[str, Plan], room: float) -> list[str]:
    """What each switch would change, and the one to take."""
    lines = [f"  {'one switch':<58}{'GiB':>10}{'s a step':>10}"]
    for name, other in sorted(others.items(), key=lambda item: item[1].peak):
        mark = "" if other.peak <= room else "   does not fit"
        gib, seconds = (other.peak - plan.peak) / GIB, other.step_seconds - plan.step_seconds
        lines.append(f"  {name:<58}{gib:>+10.2f}{seconds:>+10.2f}{mark}")
    best = best_switch(plan, others, room)
    lines.append(f"  buys the most: {best}" if best else "  none of them buys anything here")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fvtitan.plan",
        description=__doc__.splitlines()[0],
        epilog="Further arguments are keys of the recipe.",
    )
    parser.add_argument("config", help="the recipe, a TOML file")
    parser.add_argument("--world-size", type=int, default=8, help="GPUs of the job (%(default)s)")
    parser.add_argument("--memory", type=float, default=80.0, help="GiB of each (%(default)s)")
    parser.add_argument(
        "--peak-tflops", type=float, default=989.0, help="dense bf16 TFLOP/s of each (%(default)s: H100, H200)"
    )
    parser.add_argument("--in-node", type=float, default=300.0, help="GB/s a GPU receives within a node (%(default)s)")
    parser.add_argument(
        "--between-nodes", type=float, default=50.0, help="GB/s a GPU receives between nodes (%(default)s)"
    )
    parser.add_argument("--no-switches", action="store_true", help="do not try what single switches would change")
    args, overrides = parser.parse_known_args()
    for name in ("world_size", "memory", "peak_tflops", "in_node", "between_nodes"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name):g}: must be > 0")
    cfg = load_config(["--job.config_file", args.config, *overrides], world_size=args.world_size)
    rates = Rates(1e12 * args.peak_tflops, 1e9 * args.in_node, 1e9 * args.between_nodes)
    memory = args.memory * GIB
    with fake_job(args.world_size):
        plan = make_plan(cfg, args.world_size, rates)
        print("\n".join(report(cfg, plan, args.world_size, memory, rates)), flush=True)
        room = (1 - RESERVE) * memory
        if not args.no_switches:
            print("\n".join(["", *report_switches(plan, plan_switches(cfg, args.world_size, rates), room)]))
    sys.exit(plan.peak > room)


if __name__ == "__main__":
    cli(main)
