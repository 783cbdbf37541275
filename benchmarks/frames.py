"""B9: time against the number of latent frames: a S + b S^2, and b / a against the closed form.

The closed form counts FLOPs; a second of matrix products and a second of attention are not the same number of them, on any
machine. So three numbers are compared with it: b / a of the FLOPs that were counted, exactly; b / a of the measured time; and
that of the time with both parts measured by themselves, at S of 13 frames, and the rates taken out of it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import models, roofline
from benchmarks.flops import CPU_ATTENTION
from benchmarks.harness import Result, Row, Setting, absolute, interleave, interval
from fvtitan.models.wan.transformer import WanConfig

FRAMES = (5, 9, 13, 17, 21)


def run(setting: Setting) -> Result:
    """Forward of the whole model, without gradient."""
    cfg = models.sizes(setting, None if setting.is_gpu else 2)
    grid = (16, 60, 104) if setting.is_gpu else (16, 4, 8) if setting.quick else (16, 16, 20)
    network = models.transformer(cfg, setting)
    steps, counted = {}, []
    for frames in FRAMES:
        step = _forward(network, cfg, (1, frames, *grid), setting)
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            step()
        counted.append(counter.get_total_flops())
        steps[str(frames)] = step
    tokens = [models.num_tokens((frames, *grid)) for frames in FRAMES]
    steps |= _parts(cfg, tokens[2], setting)
    times = interleave(steps, setting)
    expected = _expected(cfg, tokens)
    rates = [  # how much longer a FLOP takes in attention than in a linear layer, in each round
        (attention / linear) / (_part_flops(cfg, tokens[2])[1] / _part_flops(cfg, tokens[2])[0])
        for linear, attention in zip(times["linear"], times["attention"], strict=True)
    ]
    fits = [_fit(tokens, [times[str(f)][i] for f in FRAMES]) / expected for i in range(len(rates))]
    even = [fit / rate for fit, rate in zip(fits, rates, strict=True)]
    rows = [Row("b / a of counted FLOPs / closed form", _fit(tokens, counted) / expected, predicted=1.0)]
    for what, values in {
        "b / a of time / closed form": fits,
        "seconds a FLOP: attention / linear layers": rates,
        "b / a of time at equal rates / closed form": even,
    }.items():
        rows.append(Row(what, statistics.median(values), interval(values), predicted=1.0))
    if setting.is_gpu:
        works = [roofline.Work(*roofline.forward_flops(cfg, count)) for count in tokens]
        rows += [absolute(f"{f} frames", times[str(f)], w, setting) for f, w in zip(FRAMES, works, strict=True)]
    size = f"{cfg.num_layers} layers, d = {cfg.dim}, {FRAMES} latent frames, S = {tokens[0]} - {tokens[-1]}, forward"
    return Result("time against the number of frames", size, rows)


def _forward(network, cfg: WanConfig, shape: tuple[int, ...], setting: Setting) -> Callable[[], None]:
    inputs = models.random_inputs(cfg, shape, setting)

    def step() -> None:
        with torch.no_grad():
            network(*inputs)

    return step


def _fit(tokens: list[int], values: list[float]) -> float:
    """b / a of `values = a S + b S^2 + c`, every value weighing by its relative error."""
    s, y = np.array(tokens, float), np.array(values, float)
    design = np.stack([s, s**2, np.ones_like(s)], axis=1) / y[:, None]
    a, b, _ = np.linalg.lstsq(design, np.ones_like(y), rcond=None)[0]
    return b / a


def _expected(cfg: WanConfig, tokens: list[int]) -> float:
    """b / a of the closed form."""
    return _fit(tokens, [sum(roofline.forward_flops(cfg, count)) for count in tokens])


def _part_flops(cfg: WanConfig, tokens: int) -> tuple[float, float]:
    return 4 * tokens * cfg.dim * cfg.ffn_dim, 4 * tokens**2 * cfg.dim


def _parts(cfg: WanConfig, tokens: int, setting: Setting) -> dict[str, Callable[[], object]]:
    """The two products of the feed-forward, and one self-attention, at S tokens."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if setting.is_gpu else torch.float32
    with setting.device:
        x = torch.randn(1, tokens, cfg.dim, dtype=dtype)
        up, down = (torch.randn(shape, dtype=dtype) for shape in ((cfg.ffn_dim, cfg.dim), (cfg.dim, cfg.ffn_dim)))
    heads = x.unflatten(-1, (cfg.num_heads, -1)).transpose(1, 2)
    return {
        "linear": lambda: F.linear(F.linear(x, up), down),
        "attention": lambda: F.scaled_dot_product_attention(heads, heads, heads),
    }
