"""The networks that are measured, with random weights, and diffusers' with the same ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.harness import Setting
from fvtitan.distributed.utils import local_tensor
from fvtitan.models.wan.adapter import config_to_diffusers, diffusers_names, to_diffusers_tensor
from fvtitan.models.wan.transformer import FLAVORS, WanConfig, WanTransformer

CPU_SIZES = WanConfig(num_layers=4, num_heads=2, head_dim=128, ffn_dim=1536, text_dim=64, text_len=32)
CPU_LATENTS = (9, 16, 16, 20)  # [T, C, H, W]: 720 tokens
QUICK_LATENTS = (3, 16, 8, 8)  # 48 tokens
GPU_LATENTS = {7800: (5, 16, 60, 104), 32760: (21, 16, 60, 104)}  # 480 x 832 pixels, 17 and 81 frames


def sizes(setting: Setting, num_layers: int | None = None) -> WanConfig:
    """Wan 1.3B on a GPU, a small one on a CPU."""
    cfg = FLAVORS["1.3B"] if setting.is_gpu else CPU_SIZES
    return cfg if num_layers is None else WanConfig(**{**vars(cfg), "num_layers": num_layers})


def num_tokens(latents: tuple[int, ...]) -> int:
    """Of latents `[..., T, C, H, W]`, one sample's."""
    frames, _, height, width = latents[-4:]
    return frames * height * width // 4


@torch.no_grad()
def random_weights(module: nn.Module) -> nn.Module:
    """Every parameter random, so that outputs are of order one and depend on everything; zeros would run faster."""
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        parameter = local_tensor(parameter)  # of a network on one rank
        spread = 0.1 if parameter.ndim == 1 else (2 / sum(parameter.shape[-2:])) ** 0.5
        parameter.normal_(std=spread)
        if name.endswith(("norm_q.weight", "norm_k.weight", "norm3.weight")):
            parameter.add_(1)
    return module


def transformer(cfg: WanConfig, setting: Setting, dtype: torch.dtype | None = None) -> WanTransformer:
    """Ours, float32 on a CPU and bf16 on a GPU."""
    dtype = dtype or (torch.bfloat16 if setting.is_gpu else torch.float32)
    with setting.device:
        return random_weights(WanTransformer(cfg)).to(dtype)


def diffusers_twin(ours: WanTransformer) -> nn.Module:
    """diffusers' WanTransformer3DModel with a copy of our weights, in training mode."""
    from diffusers import WanTransformer3DModel

    weights = dict(ours.named_parameters())
    device, dtype = ours.head.head.weight.device, ours.head.head.weight.dtype
    with device:
        twin = WanTransformer3DModel(**{k: v for k, v in config_to_diffusers(ours.cfg).items() if k != "_class_name"})
    names = diffusers_names(weights)
    twin.load_state_dict({names[n]: to_diffusers_tensor(n, p.detach(), ours.cfg) for n, p in weights.items()})
    return twin.to(dtype).train()


def random_inputs(cfg: WanConfig, latents: tuple[int, ...], setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
    """(latents `[B, T, C, H, W]`, sigma `[B, T]`, the same for all frames, text `[B, text_len, text_dim]`)."""
    torch.manual_seed(1)
    batch, frames = latents[0], latents[1]
    with setting.device:
        return (
            torch.randn(latents),
            torch.rand(batch, 1).expand(-1, frames),
            torch.randn(batch, cfg.text_len, cfg.text_dim),
        )


def unsharded(sharded: WanTransformer) -> WanTransformer:
    """A copy of a sharded network (on one rank) that is not."""
    with torch.device("meta"):
        copy = WanTransformer(sharded.cfg)
    tensors = {name: local_tensor(p.detach()).clone() for name, p in sharded.named_parameters()}
    copy.load_state_dict(tensors, assign=True)
    return copy
