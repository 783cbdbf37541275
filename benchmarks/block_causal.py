"""B6: block-causal self-attention: one call a block, one call with a dense mask, FlexAttention; beside full attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import roofline
from benchmarks.harness import Result, Row, Setting, absolute, compare, gate, interleave
from fvtitan.flops import Flops
from fvtitan.models.wan.attention import BlockCausal, attend, prepare

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def run(setting: Setting) -> Result:
    """Full attention computes all scores, a dense mask saves none of them. The CPU's kernel is slower on fewer than 768
    queries, so small blocks gain less there than they save."""
    heads, cases = 2, [(7, 180), (5, 768)]  # blocks, tokens of a block
    if setting.is_gpu:
        heads, cases = 12, [(7, 4680)]
    elif setting.quick:
        cases = [(3, 12)]
    rows = [row for blocks, tokens in cases for row in _case(heads, blocks, tokens, setting)]
    return Result("block-causal attention", f"{heads} heads of 128", rows)


def _case(heads: int, blocks: int, tokens: int, setting: Setting) -> list[Row]:
    length, per_frame, frames = blocks * tokens, tokens // 3, (3,) * blocks
    plan, share = BlockCausal(frames), (blocks + 1) / (2 * blocks)
    dense = plan.frame_mask(setting.device).repeat_interleave(per_frame, 0).repeat_interleave(per_frame, 1)
    flex = prepare(BlockCausal(frames, backend="flex"), per_frame, setting.device)

    def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    variants: dict[str, Attention] = {
        "one call a block": lambda q, k, v: attend(q, k, v, plan),
        "dense mask": lambda q, k, v: sdpa(q, k, v, dense),
        "full": lambda q, k, v: sdpa(q, k, v, None),
    }
    if not setting.quick:
        compiled = torch.compile(attend, dynamic=False)  # inductor 2.13: on a CPU, sizes that vary do not build
        variants["flex"] = lambda q, k, v: compiled(q, k, v, flex)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if setting.is_gpu else torch.float32
    q, k, v = (torch.randn(1, length, heads, 128, device=setting.device, dtype=dtype) for _ in range(3))
    errors = {
        name: gate(attention(q, k, v), variants["dense mask"](q, k, v), 3e-2 if setting.is_gpu else 1e-5, name)
        for name, attention in variants.items()
        if name != "full"
    }
    label = f"{blocks} blocks of {tokens} tokens, "
    forward = {name: lambda a=a: a(q, k, v) for name, a in variants.items()}
    trained = {name: _backward(a, q, k, v) for name, a in variants.items() if name != "flex" or setting.is_gpu}
    rows = _rows(f"{label}forward", forward, errors, length, share, setting)
    return rows + _rows(f"{label}forward + backward", trained, errors, length, share, setting)


def _backward(attention: Attention, *inputs: Tensor) -> Callable[[], None]:
    leaves = [x.detach().requires_grad_() for x in inputs]

    def step() -> None:
        torch.autograd.grad(attention(*leaves).sum(), leaves)

    return step


def _rows(label: str, steps: dict, errors: dict[str, float], length: int, share: float, setting: Setting) -> list[Row]:
    times = interleave(steps, setting, warmup=3)
    rows = [
        compare(times, name, "full", what=f"{label}: {name} / full", error=errors[name], predicted=ideal)
        for name, ideal in {"one call a block": share, "dense mask": 1.0, "flex": share}.items()
        if name in times
    ]
    if setting.is_gpu:
        for name in times:
            visible = 1.0 if name in ("full", "dense mask") else share
            flops = Flops(self_attention=4 * length**2 * 12 * 128 * visible)
            rows.append(absolute(f"{label}: {name}", times, name, roofline.Work(flops, "backward" in label)))
    return rows
