"""B11: from the command to the first step: train.py alone, and two ranks under torchrun, against importing torch."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import models
from benchmarks.harness import Result, Setting, compare, interleave
from benchmarks.training import arguments, write_cache
from fvtitan.models.wan.transformer import FLAVORS

ROOT = Path(__file__).parents[1]


def run(setting: Setting) -> Result:
    """Wall time of whole processes that train one step of the tiny model: imports, process group, roles, one step, the end.
    On a GPU compiled as well, with a warm cache (the first round, which fills it, is not counted)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_cache(folder / "cache", models.QUICK_LATENTS, FLAVORS["tiny"].text_dim)
        recipe = '[models.student]\nflavor = "tiny"\n[method]\nname = "finetune"\n'
        keys = {"training__steps": 1, "training__mixed_precision_param": "float32", "training__global_batch_size": 2}
        words = arguments(folder, models.QUICK_LATENTS, setting, recipe, **keys)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        commands = {
            "import torch": [sys.executable, "-c", "import torch, torch.distributed.fsdp"],
            "train.py, one step": [sys.executable, "train.py", *words],
        }
        if not setting.quick:
            commands["torchrun, 2 ranks"] = [*torchrun, "train.py", *words]
        if setting.is_gpu:
            commands["train.py, compiled"] = [sys.executable, "train.py", *words, "--compile.enable", "true"]
            del commands["torchrun, 2 ranks"]
        times = interleave({name: lambda c=c: _start(c) for name, c in commands.items()}, setting, warmup=1, wall=True)
    rows = [compare(times, name, "import torch") for name in commands if name != "import torch"]
    return Result("start-up", "tiny model, one step", rows)


def _start(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} ... ended with {done.returncode}:\n{done.stderr[-2000:]}")
