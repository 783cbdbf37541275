"""B8: saving and loading a checkpoint, against writing and reading the same bytes."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import models
from benchmarks.harness import Result, Setting, compare, gate, interleave
from benchmarks.training import bare_step, training
from fvtitan.components.checkpoint import Checkpointer
from fvtitan.distributed.utils import local_tensor


def run(setting: Setting) -> Result:
    """Student, AdamW and random state, sharded; wall time. A save hashes what it writes, and syncs it; a load checks every
    hash. `async` is what training waits for: the copy. Raw: one file, written and synced, or read."""
    latents = models.QUICK_LATENTS
    with training(latents, setting) as (method, batch), tempfile.TemporaryDirectory() as folder:
        bare_step(method, batch, 1)
        states = method.checkpoint_state()
        parameter = local_tensor(method.student.transformer.blocks[0].ffn[0].weight)
        before = parameter.detach().clone()
        sync = Checkpointer(Path(folder) / "sync")
        background = Checkpointer(Path(folder) / "async", async_mode="async")
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                sync.save(1, states)
                with torch.no_grad():
                    parameter.zero_()
                sync.load(1, states)
                error = gate(parameter.detach(), before, 0.0, "loaded weights")
                size = sum(path.stat().st_size for path in sync.path(1).iterdir())
                content, raw = os.urandom(1 << 20) * (size >> 20), Path(folder) / "raw"

                def write() -> None:
                    with open(raw, "wb") as file:
                        file.write(content)
                        file.flush()
                        os.fsync(file.fileno())

                def save_async() -> None:
                    background.save(1, states)

                steps: dict[str, Callable[[], object]] = {
                    "raw write + fsync": write,
                    "save": lambda: sync.save(1, states),
                    "async save, until training goes on": save_async,
                    "raw read": raw.read_bytes,
                    "load": lambda: sync.load(1, states),
                }
                write()
                waited = {name: background.wait for name in steps}  # nothing writes in the background of another
                times = interleave(steps, setting, wall=True, before=waited)
        finally:
            sync.close()
            background.close()
        free = shutil.disk_usage(folder).free
    rows = [
        compare(times, "save", "raw write + fsync", error=error),
        compare(times, "async save, until training goes on", "save"),
        compare(times, "load", "raw read", error=error),
    ]
    notes = [f"{size / 2**20:.0f} MiB; {free / 2**30:.0f} GiB free"]
    if setting.is_gpu:
        rates = {n: size / torch.tensor(t).median().item() / 1e9 for n, t in times.items()}
        notes.append(", ".join(f"{name}: {rate:.2f} GB/s" for name, rate in rates.items()))
    return Result("checkpoints", f"{size / 2**20:.0f} MiB on one rank", rows, notes)
