"""B1: forward and backward of one Wan block, ours against diffusers' with the same weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import models, roofline
from benchmarks.harness import Result, Row, Setting, absolute, compare, gate, interleave
from fvtitan.models.wan.attention import rope_table
from fvtitan.models.wan.transformer import FLAVORS, WanConfig


def run(setting: Setting) -> Result:
    """Eager and compiled; one noise level per sample, as diffusers takes it."""
    if setting.is_gpu:
        cases = [("1.3B", (3, 16, 60, 104)), ("1.3B", (21, 16, 60, 104)), ("14B", (21, 16, 60, 104))]
        rows = [
            row
            for name, latents in cases
            for row in _rows(FLAVORS[name], latents, setting, f"{name}, S = {models.num_tokens(latents):,}, ")
        ]
        return Result("Wan block, forward + backward", "bf16", rows)
    latents = models.QUICK_LATENTS if setting.quick else models.CPU_LATENTS
    cfg = models.CPU_SIZES
    shape = f"d = {cfg.dim}, {cfg.num_heads} heads, ffn {cfg.ffn_dim}, S = {models.num_tokens(latents)}, "
    shape += f"{cfg.text_len} text tokens, float32"
    return Result("Wan block, forward + backward", shape, _rows(cfg, latents, setting))


def _rows(cfg: WanConfig, latents: tuple[int, ...], setting: Setting, label: str = "") -> list[Row]:
    ours, theirs, arguments = _pair(cfg, latents, setting)
    steps = {"fvtitan": _step(ours), "diffusers": _step(theirs)}
    if not setting.quick:
        torch._dynamo.reset()
        steps["fvtitan compiled"] = _step(torch.compile(ours, fullgraph=True))
        steps["diffusers compiled"] = _step(torch.compile(theirs, fullgraph=True))
    results = {name: step(*arguments[name.split()[0]]) for name, step in steps.items()}
    tolerance = 3e-2 if setting.is_gpu else 1e-4
    errors = {
        name: max(
            gate(mine, other, tolerance, f"{label}{name}, {what}")
            for what, mine, other in zip(("output", "gradient"), result, results["diffusers"], strict=True)
        )
        for name, result in results.items()
    }
    times = interleave({name: lambda n=name: steps[n](*arguments[n.split()[0]]) for name in steps}, setting)
    rows = [compare(times, "fvtitan", "diffusers", what=f"{label}eager", target=1.0, error=errors["fvtitan"])]
    if "fvtitan compiled" in times:
        pair = ("fvtitan compiled", "diffusers compiled")
        rows.append(compare(times, *pair, what=f"{label}compiled", target=1.0, error=errors[pair[0]]))
        rows.append(compare(times, "fvtitan compiled", "fvtitan", what=f"{label}fvtitan: compiled / eager"))
    if setting.is_gpu:
        work = roofline.Work(roofline.block(cfg, latents), backward=True)
        rows += [absolute(f"{label}{name}", times, name, work) for name in times]
    return rows


def _pair(cfg: WanConfig, latents: tuple[int, ...], setting: Setting):
    """Both blocks, and the arguments of each: `{name: (x, modulation, ...)}`."""
    one = models.sizes(setting, 1) if cfg == models.CPU_SIZES else WanConfig(**{**vars(cfg), "num_layers": 1})
    whole = models.transformer(one, setting)
    twin = models.diffusers_twin(whole)
    frames, _, height, width = latents
    torch.manual_seed(2)
    with setting.device:
        x = torch.randn(1, models.num_tokens(latents), cfg.dim, dtype=whole.head.head.weight.dtype)
        text = torch.randn(1, cfg.text_len, cfg.dim, dtype=x.dtype)
        modulation = torch.randn(1, 6, cfg.dim)
    rope = rope_table(frames, height // 2, width // 2, cfg.head_dim, 0, x.device, torch.float32)
    wide = tuple(table.repeat_interleave(2, dim=-1)[None] for table in rope)  # [1, S, 1, head_dim]
    modulation_rows = modulation[:, None].expand(-1, frames, -1, -1)
    arguments = {"fvtitan": (x, modulation_rows, text, rope), "diffusers": (x, text, modulation, wide)}
    return whole.blocks[0], twin.blocks[0], arguments


def _step(block: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def step(x: Tensor, *others: object) -> tuple[Tensor, Tensor]:
        """Output, and gradient of its square's mean by the input; gradients of the parameters are computed too."""
        x = x.detach().requires_grad_()
        out = block(x, *others)
        out.float().square().mean().backward()
        for parameter in block.parameters():
            parameter.grad = None
        return out.detach(), x.grad

    return step
