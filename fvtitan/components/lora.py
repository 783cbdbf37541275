"""LoRA (arXiv:2106.09685): named low-rank adapters on a frozen transformer's linear layers.

Which adapter a forward uses is an argument, never state of a module: under activation checkpointing the recomputation in
backward comes after other roles' forwards, and must still be this one's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvtitan.components.rng import generator
from fvtitan.distributed.utils import local_rows, local_tensor, reshard
from fvtitan.errors import UserError, did_you_mean

_DIFFUSERS = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2"}


@dataclass
class LoRAConfig:
    """[models.<role>.lora]: train low-rank adapters on the frozen network."""

    rank: int = 0
    """Rank of the adapters (usual: 16 to 128); 0: no LoRA, the whole network is trained."""
    alpha: float | None = None
    """The adapters' product is scaled by alpha / rank. Left out: the rank, as most trainers force it."""
    targets: tuple[str, ...] = ("q", "k", "v", "o", "ffn.0", "ffn.2")
    """Layers with an adapter, in both attentions: by Wan's names or diffusers' (to_q, to_out.0, ffn.net.0.proj, ...). Left out:
    all linear layers of a block, as musubi-tuner, diffusion-pipe and DiffSynth-Studio have it for Wan."""

    def check(self, section: str) -> None:
        if self.rank < 0:
            raise UserError(f"{section}.rank = {self.rank}: must be >= 1, or 0 for no LoRA")
        if not self.rank and self != LoRAConfig():
            raise UserError(f"{section}: alpha and targets have no effect with rank = 0: remove them, or set rank")
        if self.alpha is not None and self.alpha <= 0:
            raise UserError(f"{section}.alpha = {self.alpha}: must be > 0")
        if not self.targets:
            raise UserError(f"{section}.targets is empty: nothing would be trained")
        allowed = (*_DIFFUSERS, *_DIFFUSERS.values())
        for target in self.targets:
            if target not in allowed:
                raise UserError(f"{section}.targets: {target!r} is not a layer.{did_you_mean(target, allowed)}")

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def adapts(self, name: str) -> bool:
        """Whether the layer of this name in a block (`self_attn.q`) gets an adapter."""
        return any(f".{name}".endswith(f".{_DIFFUSERS.get(target, target)}") for target in self.targets)


class LoRALinear(nn.Linear):
    """`W x + b`, and with an adapter `+ scale B A x`. Its weight and bias keep their names; `lora_A.<adapter> [r, in]` and
    `lora_B.<adapter> [out, r]` are float32 masters."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.scale: dict[str, float] = {}

    def add(self, adapter: str, cfg: LoRAConfig) -> None:
        """Give it room for an adapter, on the weight's device and without values."""
        rank, place = cfg.rank, {"device": self.weight.device, "dtype": torch.float32}
        self.lora_A[adapter] = nn.Parameter(torch.empty(rank, self.in_features, **place))
        self.lora_B[adapter] = nn.Parameter(torch.empty(self.out_features, rank, **place))
        self.scale[adapter] = cfg.scale

    def forward(self, x: Tensor, adapter: str | None = None) -> Tensor:
        out = F.linear(x, self.weight, self.bias)
        if adapter is None or adapter not in self.scale:
            return out
        return out + F.linear(self.scale[adapter] * F.linear(x, self.lora_A[adapter]), self.lora_B[adapter])


def linear(layer: nn.Linear, x: Tensor, adapter: str | None) -> Tensor:
    """The layer of x, through the adapter where the layer has it."""
    return layer(x, adapter) if isinstance(layer, LoRALinear) else layer(x)


def add_adapter(transformer: nn.Module, adapter: str, cfg: LoRAConfig) -> None:
    """Put LoRA layers in place of the linear ones in `transformer.blocks` that `cfg` targets; before sharding."""
    for block in transformer.blocks:
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear) and cfg.adapts(name):
                if not isinstance(layer, LoRALinear):
                    layer = LoRALinear(layer)
                    block.set_submodule(name, layer)
                layer.add(adapter, cfg)


def base_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters without those of adapters."""
    return {n: p for n, p in module.named_parameters() if ".lora_A." not in n and ".lora_B." not in n}


def adapter_parameters(module: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """`{"blocks.0.self_attn.q.lora_A": parameter}` of one adapter: names that do not depend on who shares the network."""
    ours = (f".lora_A.{adapter}", f".lora_B.{adapter}")
    return {n.removesuffix(f".{adapter}"): p for n, p in module.named_parameters() if n.endswith(ours)}


@torch.no_grad()
def initialise_adapter(module: nn.Module, adapter: str, seed: int) -> None:
    """A Kaiming-uniform, B zero, so that training begins at the base. Each A is drawn whole from a stream of its own, so it is
    the same on any number of ranks."""
    reshard(module)
    for name, parameter in adapter_parameters(module, adapter).items():
        full = torch.zeros(parameter.shape)
        if name.endswith("lora_A"):
            nn.init.kaiming_uniform_(full, a=math.sqrt(5), generator=generator("cpu", seed, "init", adapter, name))
        local_tensor(parameter).copy_(full[local_rows(parameter)])


@torch.no_grad()
def merge_adapter(weights: Mapping[str, Tensor], adapter: Mapping[str, Tensor], scale: float) -> None:
    """`W += scale B A` in place, in at least float32, for the layers of an adapter as a checkpoint holds it (whole tensors);
    weights may be sharded."""
    for name, low in adapter.items():
        if name.endswith(".lora_A"):
            layer = name.removesuffix(".lora_A")
            weight = weights[f"{layer}.weight"]
            shard, rows = local_tensor(weight), adapter[f"{layer}.lora_B"][local_rows(weight)]
            wide = torch.promote_types(shard.dtype, torch.float32)
            delta = scale * (rows.to(shard.device, wide) @ low.to(shard.device, wide))
            shard.copy_(shard.to(wide) + delta)
