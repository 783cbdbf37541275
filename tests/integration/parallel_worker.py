"""Ranks that share a sequence or a model: what they compute, against one rank; and what they train, written down."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from fvtitan.components.checkpoint import Checkpointer
from fvtitan.distributed import utils
from fvtitan.distributed.sequence_parallel import SequenceShard
from fvtitan.models.base import Conditioning
from fvtitan.models.blocks import block_starts
from fvtitan.models.wan.model import WanCausalModel
from fvtitan.models.wan.transformer import WanTransformer
from tests.helpers import SMALL, bidirectional_model, causal_model, random_transformer
from tests.integration.exact_worker import gathered


class Collectives(TorchDispatchMode):
    """Counts collectives by name (`all_to_all_single`, `allgather_base_`)."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            self.counts[func._opname.strip("_")] += 1
        return func(*args, **(kwargs or {}))


# -------------------------------------------------------------------------- a forward and its gradients, in float64


def networks(mesh) -> tuple[WanTransformer, WanTransformer]:
    """The same network alone, and sharing sequences over the ranks of `mesh`."""
    alone, shared = random_transformer(SMALL, torch.float64), random_transformer(SMALL, torch.float64)
    shared.sequence_shard = SequenceShard.of(mesh)
    return alone, shared


def rollout(model: WanCausalModel, noise: Tensor, cond: Conditioning) -> Tensor:
    """Streaming, each block with gradient and then committed."""
    cache, blocks = model.new_cache(noise.shape), []
    for start, end in block_starts(model.causal.blocks(noise.shape[1])):
        x, sigma = noise[:, start:end], torch.full((len(noise), end - start), 0.7)
        blocks.append(x - 0.7 * model.predict_velocity_streaming(x, sigma, cond, cache, start))
        model.commit(blocks[-1], cond, cache, start)
    return torch.cat(blocks, dim=1)


WAYS = {
    "bidirectional": lambda net, x, s, cond: bidirectional_model(net).predict_velocity(x, s, cond),
    "block_causal": lambda net, x, s, cond: causal_model(net, 1).predict_velocity(x, s, cond),
    "window_and_sink": lambda net, x, s, cond: causal_model(
        net, 1, local_attn_frames=2, sink_frames=1
    ).predict_velocity(x, s, cond),
    "clean_context": lambda net, x, s, cond: causal_model(net, 1).predict_velocity_with_context(
        x, s, x.flip(0), torch.zeros_like(s), cond
    ),
    "streaming": lambda net, x, s, cond: rollout(causal_model(net, 1), x, cond),
    "streaming_window_and_sink": lambda net, x, s, cond: rollout(
        causal_model(net, 1, local_attn_frames=2, sink_frames=1), x, cond
    ),
}


def compare(folder: Path, *, size: tuple[int, int]) -> None:
    """Every way to run the network, on latents of `size`, against the same on one rank; then leave.

    A rank's gradients, averaged over the ranks as FSDP2 does it, must be the whole ones.
    """
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    alone, shared = networks(mesh)
    rng = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, SMALL.in_channels, *size, generator=rng, dtype=torch.float64)
    sigma = torch.rand(2, 4, generator=rng, dtype=torch.float64)
    cond = Conditioning(torch.randn(2, SMALL.text_len, SMALL.text_dim, generator=rng, dtype=torch.float64))
    slope = torch.randn(latents.shape, generator=rng, dtype=torch.float64)
    found: dict[str, Any] = {}
    for name, run in WAYS.items():
        results = []
        for net in (alone, shared):
            net.zero_grad(set_to_none=True)
            x = latents.clone().requires_grad_()
            with Collectives() as collectives:
                out = run(net, x, sigma, cond)
                forward = dict(collectives.counts)
                (out * slope).sum().backward()
            gradients = {key: p.grad.clone() for key, p in net.named_parameters()}
            if net is shared:
                for gradient in gradients.values():
                    dist.all_reduce(gradient)
                    gradient /= world
            results.append({"out": out.detach(), "latents": x.grad, **gradients})
        distance = {
            key: float((results[1][key] - value).norm() / value.norm().clamp_min(1e-30))
            for key, value in results[0].items()
        }
        total = {key: count - forward.get(key, 0) for key, count in collectives.counts.items()}
        found[name] = {"distance": distance, "forward": forward, "backward": total}
    torch.save(found, folder / f"compared.rank{dist.get_rank()}.pt")
    utils.close_distributed()
    sys.exit(0)


# ------------------------------------------------------------------------------------------------ process groups


def watch_timeouts(folder: Path) -> None:
    """Record, when training is over, how long each of this process' groups would wait, in seconds."""
    rank, close = int(os.environ["RANK"]), Checkpointer.close

    def closing(self: Checkpointer) -> None:
        backends = [group._get_backend(torch.device("cpu")) for group in distributed_c10d._world.pg_map]
        waits = [backend.options._timeout.total_seconds() for backend in backends]
        torch.save({"seconds": waits}, folder / f"timeouts.rank{rank}.pt")
        close(self)

    Checkpointer.close = closing


# ------------------------------------------------------------------------------------------------ what is trained


def watch(folder: Path) -> None:
    """Record the whole gradients of every phase, before they are clipped."""
    rank, clip, phase = int(os.environ["RANK"]), utils.clip_grad_norm, iter(range(1000))

    def clip_grad_norm(parameters: dict[str, Tensor], max_norm: float) -> Tensor:
        named = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        torch.save({"gradients": gathered(named)}, folder / f"gradients.phase-{next(phase):03d}.rank{rank}.pt")
        return clip(parameters, max_norm)

    utils.clip_grad_norm = clip_grad_norm
