"""B10: activation checkpointing, compilation, and the moving average, each on and off."""

from __future__ import annotations

import typing
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks import models, roofline
from benchmarks.harness import Result, Row, Setting, absolute, compare, gate, interleave
from benchmarks.training import training
from fvtitan.components.ema import EMA, EMAConfig
from fvtitan.config import ActivationCheckpointSection
from fvtitan.distributed.parallelize import apply_ac, apply_compile
from fvtitan.distributed.utils import local_tensor
from fvtitan.models.wan.transformer import WanTransformer


def run(setting: Setting) -> Result:
    """Forward and backward of the network for the first two; one update of all parameters for the last."""
    latents = models.GPU_LATENTS[7800] if setting.is_gpu else models.CPU_LATENTS
    if setting.quick:
        latents = models.QUICK_LATENTS
    cfg = models.sizes(setting)
    inputs = models.random_inputs(cfg, (1, *latents), setting)
    modes = typing.get_args(typing.get_type_hints(ActivationCheckpointSection)["mode"])
    networks = {f"AC {mode}": models.transformer(cfg, setting) for mode in modes}
    for mode, network in zip(modes, networks.values(), strict=True):
        apply_ac(network, mode)
    if not setting.quick:
        networks["compiled"] = models.transformer(cfg, setting)
        apply_compile(networks["compiled"], "inductor")
    steps = {name: _step(network, inputs) for name, network in networks.items()}
    outputs = {name: step() for name, step in steps.items()}
    tolerance = 3e-2 if setting.is_gpu else 1e-4
    errors = {name: gate(output, outputs["AC none"], tolerance, name) for name, output in outputs.items()}
    times = interleave(steps, setting)
    forward = roofline.network(cfg, latents)
    plain = roofline.Work(forward, backward=True).flops
    rows = []
    for name in times:
        mode = name.removeprefix("AC ") if name.startswith("AC ") else "none"
        work = roofline.Work(forward, True, mode)
        if name != "AC none":
            what, ratio = f"{name} / none", work.flops / plain
            rows.append(compare(times, name, "AC none", what=what, error=errors[name], predicted=ratio))
        if setting.is_gpu:
            rows.append(absolute(name, times, name, work))
    rows.append(_ema(setting, latents))
    return Result("switches", f"{cfg.num_layers} layers, S = {models.num_tokens(latents)}, forward + backward", rows)


def _step(network: WanTransformer, inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    def step() -> Tensor:
        out = network(*inputs)
        out.float().square().mean().backward()
        for parameter in network.parameters():
            parameter.grad = None
        return out.detach()

    return step


@torch.no_grad()
def _ema(setting: Setting, latents: tuple[int, ...]) -> Row:
    """Ours updates lists of local shards; the plain way is the same line on the DTensors."""
    with training(latents, setting) as (method, _):
        student = method.student.transformer
        ema, plain = EMA(method.student, EMAConfig(enable=True)), EMA(method.student, EMAConfig(enable=True))

        def on_dtensors() -> None:
            torch._foreach_lerp_(list(plain.shadow.values()), [p.detach() for p in student.parameters()], 0.01)

        assert isinstance(next(student.parameters()), DTensor)
        steps = {"local shards": lambda: ema.update(1), "DTensors": on_dtensors}
        models.random_weights(student)
        for step in steps.values():
            step()
        pairs = zip(ema.shadow.values(), plain.shadow.values(), strict=True)
        error = max(gate(*map(local_tensor, pair), 1e-6, "averages") for pair in pairs)
        times = interleave(steps, setting)
    return compare(times, "local shards", "DTensors", what="EMA on local shards / on DTensors", error=error)
