"""B9: time against the number of latent frames: a S + b S^2, and b / a against the closed form.

The closed form counts FLOPs, and a FLOP of attention does not take as long as one of the rest on any machine. So the fit of the
time is compared after that: both parts are measured by themselves at S of 13 frames (attention; the network without it), and
the ratio of their seconds a FLOP is taken out of b / a. What is left should be 1: no part of the time grows otherwise.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import models, roofline
from benchmarks.flops import CPU_ATTENTION
from benchmarks.harness import Result, Row, Setting, absolute, interleave
from fvtitan.models.wan import transformer
from fvtitan.models.wan.transformer import WanConfig

FRAMES = (5, 9, 13, 17, 21)


def run(setting: Setting) -> Result:
    """Forward of the whole model, without gradient."""
    cfg = models.sizes(setting, None if setting.is_gpu else 2)
    grid = (16, 60, 104) if setting.is_gpu else (16, 4, 8) if setting.quick else (16, 32, 40)
    network = models.transformer(cfg, setting)
    steps, counted = {}, []
    for frames in FRAMES:
        step = _forward(network, cfg, (1, frames, *grid), setting)
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            step()
        counted.append(counter.get_total_flops())
        steps[str(frames)] = step
    tokens = [models.num_tokens((frames, *grid)) for frames in FRAMES]
    steps |= _parts(network, cfg, (1, FRAMES[2], *grid), setting)
    times = interleave(steps, setting)
    closed = [roofline.network(cfg, (frames, *grid)) for frames in FRAMES]
    attention, linear = closed[2].attention, closed[2].total - closed[2].attention
    expected = _fit(tokens, [flops.total for flops in closed])

    def ratios(rounds: Sequence[int]) -> tuple[float, float, float]:
        """Of the medians over some rounds."""
        median = {name: statistics.median([seconds[i] for i in rounds]) for name, seconds in times.items()}
        fit = _fit(tokens, [median[str(frames)] for frames in FRAMES]) / expected
        rate = (median["attention"] / attention) / (median["rest"] / linear)
        return fit, rate, fit / rate

    rounds = len(times["rest"])
    rng = random.Random(0)
    drawn = zip(*(ratios(rng.choices(range(rounds), k=rounds)) for _ in range(400)), strict=True)
    labels = (
        "b / a of time / closed form",
        "seconds a FLOP: attention / the rest",
        "b / a of time at equal rates / closed form (target: 0.85 - 1.15)",
    )
    rows = [Row("b / a of counted FLOPs / closed form", _fit(tokens, counted) / expected, predicted=1.0)]
    for what, value, values in zip(labels, ratios(range(rounds)), drawn, strict=True):
        values = sorted(values)
        rows.append(Row(what, value, (values[10], values[-11]), predicted=1.0))  # bootstrap over the rounds
    if setting.is_gpu:
        pairs = zip(FRAMES, closed, strict=True)
        rows += [absolute(f"{f} frames", times, str(f), roofline.Work(flops)) for f, flops in pairs]
    size = f"{cfg.num_layers} layers, d = {cfg.dim}, {FRAMES} latent frames, S = {tokens[0]} - {tokens[-1]}, forward"
    return Result("time against the number of frames", size, rows)


def _forward(network, cfg: WanConfig, shape: tuple[int, ...], setting: Setting) -> Callable[[], None]:
    inputs = models.random_inputs(cfg, shape, setting)

    def step() -> None:
        with torch.no_grad():
            network(*inputs)

    return step


def _fit(tokens: list[int], values: list[float]) -> float:
    """b / a of `values = a S + b S^2`, every value weighing by its relative error."""
    s, y = np.array(tokens, float), np.array(values, float)
    design = np.stack([s, s**2], axis=1) / y[:, None]
    a, b = np.linalg.lstsq(design, np.ones_like(y), rcond=None)[0]
    return b / a


def _parts(network, cfg: WanConfig, shape: tuple[int, ...], setting: Setting) -> dict[str, Callable[[], object]]:
    """All attention of a forward, and the forward with attention left out."""
    torch.manual_seed(0)
    forward = _forward(network, cfg, shape, setting)
    size = (1, models.num_tokens(shape), cfg.num_heads, cfg.head_dim)
    dtype = network.head.head.weight.dtype
    q, k, v = (torch.randn(size, device=setting.device, dtype=dtype).transpose(1, 2) for _ in range(3))
    text = k[:, :, : cfg.text_len]

    def attention() -> None:
        for _ in range(cfg.num_layers):
            F.scaled_dot_product_attention(q, k, v)
            F.scaled_dot_product_attention(q, text, text)

    def rest() -> None:
        with mock.patch.object(transformer, "attend", lambda q, *_: q):
            forward()

    return {"attention": attention, "rest": rest}
