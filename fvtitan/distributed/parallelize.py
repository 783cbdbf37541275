"""How a transformer is made parallel: sequence parallelism -> activation checkpointing -> compile -> FSDP2, as plain functions
in this order."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from fvtitan.distributed.mesh import Mesh
from fvtitan.distributed.sequence_parallel import SequenceShard, check_heads
from fvtitan.distributed.utils import use_private_compile_cache

if TYPE_CHECKING:
    from fvtitan.config import JobConfig

# Roles share the graphs of one `Block.forward`. A streaming student has up to 3 for each length of its context (with and
# without gradient, commit), validation 2 more for each size of its batches: 147 in all for 21 blocks of one frame and two
# sizes. Dynamo's default is 8.
DYNAMO_RECOMPILE_LIMIT = 192
# FlexAttention in a compiled block, and compiled alone in an eager one.
KEPT_OPERATORS = frozenset({"flex_attention", "inductor_compiled_code", "_c10d_functional::all_to_all_single"})


def parallelize(transformer: nn.Module, mesh: Mesh, cfg: JobConfig, role: str) -> None:
    """Apply `cfg`'s parallelism to the transformer of `role`, with `.blocks`, in place, before its weights exist (meta
    device)."""
    if mesh.sequence is not None:
        apply_sequence_parallel(transformer, mesh.sequence, role)
    apply_ac(transformer, cfg.activation_checkpoint.mode)
    if cfg.compile.enable:
        apply_compile(transformer, cfg.compile.backend)
    apply_fsdp(transformer, mesh.parameters(role), cfg, role)


def apply_sequence_parallel(transformer: nn.Module, sequence: DeviceMesh, role: str) -> None:
    """Let the ranks of `sequence` share the tokens. Raises `UserError` when they cannot share the heads."""
    check_heads(role, transformer.cfg.num_heads, sequence.size())
    transformer.sequence_shard = SequenceShard.of(sequence)


def apply_ac(transformer: nn.Module, mode: str) -> None:
    """What each block recomputes in backward. none: nothing; full: everything; selective: everything but the outputs of its
    attentions (`keep_attentions`). A function the block calls, not a wrapper, so no wrapper's name leaks."""
    for block in transformer.blocks:
        block.checkpoint = {"none": None, "selective": _checkpoint_selectively, "full": _checkpoint_fully}[mode]


def _checkpoint_fully(forward: Callable[..., Tensor], *args: Any) -> Tensor:
    return checkpoint(forward, *args, use_reentrant=False)


def _checkpoint_selectively(forward: Callable[..., Tensor], *args: Any) -> Tensor:
    return checkpoint(forward, *args, use_reentrant=False, context_fn=_selective_contexts)


def _selective_contexts() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(keep_attentions)


def keep_attentions(context: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Save what is dear to compute again and small to keep: attention, by whatever kernel, and sequence parallelism's
    all-to-alls. Everything else is recomputed.

    Without a kernel, attention is two batched products, which nothing else in a block is; the second, probabilities by
    values, has no more columns than its first operand wherever keys are no fewer than a head's channels.
    """
    name = op.name()
    if name == "aten::bmm":
        keep = args[1].shape[-1] <= args[0].shape[-1]
    else:
        keep = name.startswith("aten::_scaled_dot_product_") or name in KEPT_OPERATORS
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def apply_compile(transformer: nn.Module, backend: str | Callable[..., Any]) -> None:
    """Compile every block in place: identical blocks share graphs, and parameter names stay as they are.

    Graphs have static shapes. `fullgraph`: what cannot be compiled, or one graph more than the limit, is an error and not
    silently run without.
    """
    use_private_compile_cache()
    torch._dynamo.config.recompile_limit = DYNAMO_RECOMPILE_LIMIT
    for block in transformer.blocks:
        block.compile(fullgraph=True, dynamic=False, backend=backend)


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
