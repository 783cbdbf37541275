"""B5: the phases of DMD2 and Self-Forcing: seconds a FLOP, against those of a plain forward and backward."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from torch.utils.flop_counter import FlopCounterMode

from benchmarks import models
from benchmarks.flops import CPU_ATTENTION
from benchmarks.harness import Result, Row, Setting, compare, interleave
from benchmarks.training import bare_step, training

ROLES = """
[models.teacher]
init_from = "{weights}"
trainable = false
[models.critic]
init_from = "{weights}"
[models.student]
init_from = "{weights}"
"""
RECIPES = {
    "dmd2": ROLES + '[method]\nname = "dmd2"\n',
    "self_forcing": ROLES + 'name = "wan_causal"\nframes_per_block = 3\n[method]\nname = "self_forcing"\n',
}


def run(setting: Setting) -> Result:
    """1: everything a phase does beside its forwards and backwards costs nothing, and they run at the same rate. FLOPs are
    counted while it runs (scores that fused attention computes again in backward count)."""
    latents = (9, 16, 60, 104) if setting.is_gpu else (9, 16, 16, 20)  # longer ones, of three networks: over 80 GB
    if setting.quick:
        latents = (3, 16, 8, 8)
    rows = [row for name, recipe in RECIPES.items() for row in _rows(name, recipe, latents, setting)]
    return Result("method steps", f"{models.sizes(setting).num_layers} layers, S = {models.num_tokens(latents)}", rows)


def _rows(name: str, recipe: str, latents: tuple[int, ...], setting: Setting) -> list[Row]:
    ac = {"activation_checkpoint__mode": "full"} if setting.is_gpu else {}
    with training(latents, setting, recipe, **ac) as (method, batch):
        step = next(s for s in range(1, 200) if "student" in method.phases(s) and method.exit_rung(s, "student") == 3)
        noisy, sigma, text = models.random_inputs(method.student.transformer.cfg, (1, *latents), setting)

        def plain() -> None:
            method.student.transformer(noisy, sigma, text).float().square().mean().backward()
            method.optimizers["student"].zero_grad()

        steps: dict[str, Callable[[], object]] = {
            "plain": plain,
            **{role: lambda role=role: bare_step(method, batch, step, role) for role in ("student", "critic")},
        }
        flops = {role: _count(run) for role, run in steps.items()}
        times = interleave(steps, setting)
        rows = [
            compare(
                times,
                role,
                "plain",
                what=f"{name}, {role}: {flops[role] / flops['plain']:.2f} x the FLOPs, seconds a FLOP / plain",
                scale=flops[role] / flops["plain"],
                predicted=None if setting.is_gpu else 1.0,
            )
            for role in ("student", "critic")
        ]
        if setting.is_gpu:
            for row, role in zip(rows, ("student", "critic"), strict=True):
                seconds = statistics.median(times[role])
                rate, memory = flops[role] / seconds / 1e12, times.peak_bytes[role] / 2**30
                row.absolute = {"ms": 1e3 * seconds, "tflops": rate, "gib": memory}
    return rows


def _count(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        run()
    return counter.get_total_flops()
