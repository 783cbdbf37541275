"""B3: what train.py costs beside the step itself, and what FSDP2 costs on one rank.

train.py itself runs. Its method is one that, whenever train.py asks for a step, first runs a step of each bare loop: so
the loops take turns, and every round is one step of each.
"""

from __future__ import annotations

import runpy
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import models
from benchmarks.harness import Result, Setting, Times, compare, gate, synchronise
from benchmarks.training import arguments, bare_step, build_method, unsharded
from fvtitan.config import load_config
from fvtitan.methods import METHODS
from fvtitan.methods.base import TrainingMethod
from fvtitan.methods.finetune import FineTuneMethod

TRAIN = Path(__file__).parents[1] / "train.py"


def run(setting: Setting) -> Result:
    """train.py's loop / the same step and the same sharded model in five lines; and those with / without fully_shard."""
    latents = models.GPU_LATENTS[7800] if setting.is_gpu else models.CPU_LATENTS
    rounds = 4 if setting.quick else 5 * setting.rounds
    if setting.quick:
        latents = models.QUICK_LATENTS
    keys = {"training__steps": rounds + 3, "metrics__log_freq": 10}
    if setting.is_gpu:  # two networks with their optimizers fill half of it
        keys["activation_checkpoint__mode"] = "full"
    with tempfile.TemporaryDirectory() as folder:
        words = arguments(Path(folder), latents, setting, **keys)
        times, losses = _take_turns(words, setting)
    times = Times({name: seconds[-rounds:] for name, seconds in times.items()})
    allowed = 1e-3 if setting.is_gpu else 1e-6  # bf16, and sums in an order of their own
    error = max(gate(losses["train.py"], other, allowed, f"losses of {name}") for name, other in losses.items())
    rows = [compare(times, "train.py", "bare loop", target=1.03, error=error)]
    if "without fully_shard" in times:
        rows.append(compare(times, "bare loop", "without fully_shard", what="FSDP2 on one rank / none", error=error))
    size = (
        f"{models.sizes(setting).num_layers} layers, S = {models.num_tokens(latents)}, {rounds} steps of each in turn"
    )
    return Result("train.py beside a bare loop", size, rows)


def _take_turns(words: list[str], setting: Setting) -> tuple[Times, dict[str, Tensor]]:
    cfg = load_config(words)
    clock = time.perf_counter if setting.is_gpu else time.process_time
    loops: dict[str, TrainingMethod] = {}
    times: dict[str, list[float]] = {}
    losses: dict[str, list[Tensor]] = {}
    resumed = 0.0

    class TakingTurns(FineTuneMethod):
        """train.py's method."""

        def single_train_step(self, batch: dict[str, Any], step: int, role: str) -> tuple[Tensor, dict[str, Tensor]]:
            nonlocal resumed
            synchronise(setting)
            if step > 1:
                times.setdefault("train.py", []).append(clock() - resumed)
            else:
                loops["bare loop"] = build_method(cfg, self.device, FineTuneMethod)
                if not setting.is_gpu:  # there fully_shard is also what casts to bf16
                    loops["without fully_shard"] = unsharded(loops["bare loop"])
            turn = list(loops.items())
            for name, method in turn[::-1] if step % 2 else turn:
                start = clock()
                loss = bare_step(method, batch, step)
                synchronise(setting)
                times.setdefault(name, []).append(clock() - start)
                losses.setdefault(name, []).append(loss.detach())
            resumed = clock()
            loss, extra = super().single_train_step(batch, step, role)
            losses.setdefault("train.py", []).append(loss.detach())
            return loss, extra

    with mock.patch.dict(METHODS, finetune=TakingTurns), mock.patch.object(sys, "argv", ["train.py", *words]):
        try:
            runpy.run_path(str(TRAIN), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"train.py ended with {end.code}") from None
    count = min(map(len, times.values()))
    return (
        Times({name: seconds[-count:] for name, seconds in times.items()}),
        {name: torch.stack(values) for name, values in losses.items()},
    )
