"""How a transformer is made parallel: sequence parallelism -> activation checkpointing -> compile -> FSDP2, as plain functions
in this order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from fvtitan.distributed.mesh import Mesh
from fvtitan.distributed.sequence_parallel import SequenceShard, check_heads

if TYPE_CHECKING:
    from fvtitan.config import JobConfig

# Student, teacher, critic and their grad / no-grad variants each need graphs; Dynamo's default of 8 is too small.
DYNAMO_RECOMPILE_LIMIT = 64


def parallelize(transformer: nn.Module, mesh: Mesh, cfg: JobConfig, role: str) -> None:
    """Apply `cfg`'s parallelism to the transformer of `role`, with `.blocks`, in place, before its weights exist (meta
    device)."""
    apply_sequence_parallel(transformer, mesh.sequence, role)
    apply_ac(transformer, cfg.activation_checkpoint.mode)
    if cfg.compile.enable:
        apply_compile(transformer)
    apply_fsdp(transformer, mesh.parameters(role), cfg, role)


def apply_sequence_parallel(transformer: nn.Module, sequence: DeviceMesh, role: str) -> None:
    """Let the ranks of `sequence` share the tokens. Raises `UserError` when they cannot share the heads."""
    check_heads(role, transformer.cfg.num_heads, sequence.size())
    transformer.sequence_shard = SequenceShard.of(sequence)


def apply_ac(transformer: nn.Module, mode: str) -> None:
    """full: the model recomputes each block in backward. A flag, not a wrapper, so no wrapper's name leaks."""
    transformer.checkpoint_blocks = mode == "full"


def apply_compile(transformer: nn.Module) -> None:
    """Compile every block in place: identical blocks share graphs, and parameter names stay as they are."""
    torch._dynamo.config.recompile_limit = DYNAMO_RECOMPILE_LIMIT
    for block in transformer.blocks:
        block.compile(fullgraph=True)


def apply_fsdp(transformer: nn.Module, mesh: DeviceMesh, cfg: JobConfig, role: str) -> None:
    """Shard each block and the root with FSDP2, also on one rank: one process and 512 GPUs run the same numerics.

    Inputs are not cast: FSDP2 would round sigma and RoPE tables to bf16 (937.5 would arrive as 936). The model casts.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, cfg.role_dtypes(role)[1]),
        reduce_dtype=getattr(torch, cfg.training.mixed_precision_reduce),
        cast_forward_inputs=False,
    )
    reshard = cfg.role_parallelism(role).fsdp_reshard_after_forward
    offload = OffloadPolicy()
    if cfg.models[role].cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    for module in (*transformer.blocks, transformer):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard, offload_policy=offload)
