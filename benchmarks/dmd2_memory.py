"""M1: peak memory of a DMD2 step. The phases run one after the other, so it is the larger phase's, not their sum.

python benchmarks/dmd2_memory.py [--batch 32]

Counts the bytes of the tensors that a step makes and that are alive at once: activations, gathered parameters, gradients; not
the weights and optimizer states, which are there before. With the tiny Wan; prints one line with the ratio of a whole step to
its phases.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.harness import Result, Row, Setting  # noqa: E402
from fvtitan.components.memory import LiveBytes  # noqa: E402
from fvtitan.config import load_config  # noqa: E402
from fvtitan.data.dataloader import BatchStream  # noqa: E402
from fvtitan.distributed.mesh import Mesh  # noqa: E402
from fvtitan.distributed.utils import clip_grad_norm, close_distributed, init_distributed  # noqa: E402
from fvtitan.methods import METHODS  # noqa: E402
from fvtitan.methods.base import TrainingMethod  # noqa: E402
from fvtitan.models import build_roles  # noqa: E402
from fvtitan.preprocess import PreprocessConfig, preprocess  # noqa: E402


def run_phase(method: TrainingMethod, batches: BatchStream, step: int, role: str) -> None:
    """One phase as in train.py."""
    loss, _ = method.single_train_step(next(batches), step, role)
    loss.backward()
    clip_grad_norm(method.get_grad_clip_targets(role), 1.0)
    method.optimizers[role].step()
    method.optimizers[role].zero_grad()


def peak_bytes(method: TrainingMethod, batches: BatchStream, step: int, roles: tuple[str, ...]) -> int:
    """Most bytes alive at once during the phases, of tensors that they made."""
    gc.collect()
    with LiveBytes() as live:
        for role in roles:
            run_phase(method, batches, step, role)
    return live.peak


def run(setting: Setting) -> Result:
    """The largest batch the numbers were taken at is 32."""
    batch = 2 if setting.quick else 32
    values = measure(batch)
    peaks = ", ".join(f"{name} {size:.0f} MiB" for name, size in values["peak_mib"].items())
    rows = [
        Row("step / larger phase", values["step_to_larger_phase"], target=1.05, predicted=1.0),
        Row("step / sum of the phases", values["step_to_sum_of_phases"]),
    ]
    return Result("peak memory of a DMD2 step", f"tiny Wan, batch {batch}", rows, [f"{peaks}; counted"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    print(json.dumps(measure(parser.parse_args().batch)))


def measure(batch: int) -> dict[str, Any]:
    """`peak_mib` of each phase and of a step, and the ratios."""
    with tempfile.TemporaryDirectory() as folder:
        prompts, cache = Path(folder) / "prompts.txt", Path(folder) / "cache"
        prompts.write_text("a small red circle moving left\n" * 2 * batch)
        preprocess(PreprocessConfig(data="", prompts=str(prompts), model="tiny-wan", output=str(cache)))
        recipe = str(ROOT / "train_configs/tiny_dmd2.toml")
        keys = [
            "--data.path",
            str(cache),
            "--training.local_batch_size",
            str(batch),
            "--training.global_batch_size",
            "-1",
        ]
        cfg = load_config(["--job.config_file", recipe, *keys])
        device = init_distributed(cfg.comm)
        try:
            method = METHODS[cfg.method.name](cfg=cfg, role_models=build_roles(cfg, Mesh(cfg, device.type), device))
            method.on_train_start()
            size = {"global_batch_size": batch, "local_batch_size": batch, "seed": 0}
            batches = BatchStream(method.data, **size)
            step = next(
                step for step in range(1, 100, 5) if method.exit_rung(step, "student") == 3
            )  # the longest rollout
            for role in ("student", "critic"):
                run_phase(method, batches, step, role)  # optimizer states exist from here on
            peaks = {
                name: peak_bytes(method, batches, step, roles)
                for name, roles in {
                    "student": ("student",),
                    "critic": ("critic",),
                    "step": ("student", "critic"),
                }.items()
            }
        finally:
            close_distributed()
    larger, both = max(peaks["student"], peaks["critic"]), peaks["student"] + peaks["critic"]
    ratios = {"step_to_larger_phase": peaks["step"] / larger, "step_to_sum_of_phases": peaks["step"] / both}
    return {
        "device": str(device),
        "batch": batch,
        "peak_mib": {k: round(v / 2**20, 1) for k, v in peaks.items()},
        **{k: round(v, 3) for k, v in ratios.items()},
    }


if __name__ == "__main__":
    main()
