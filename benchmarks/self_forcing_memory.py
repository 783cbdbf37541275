"""M2: activation memory of a Self-Forcing student step by the number of blocks: direct grows with them, replay does not.

python benchmarks/self_forcing_memory.py [--batch 4]

Counts what autograd holds for backward (of views their own size), with the tiny Wan, at 3 and 9 blocks of 3 latent frames;
prints one line with the ratios.
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
from benchmarks.memory import SavedBytes  # noqa: E402
from fvtitan.config import load_config  # noqa: E402
from fvtitan.data.dataloader import BatchStream  # noqa: E402
from fvtitan.distributed.mesh import Mesh  # noqa: E402
from fvtitan.distributed.utils import close_distributed, init_distributed  # noqa: E402
from fvtitan.methods import METHODS  # noqa: E402
from fvtitan.models import build_roles  # noqa: E402
from fvtitan.preprocess import PreprocessConfig, preprocess  # noqa: E402

NUM_FRAMES = {3: 33, 9: 105}  # blocks -> video frames


def run(setting: Setting) -> Result:
    """Replay should hold one block's activations, whatever their number."""
    batch = 1 if setting.quick else 4
    values = measure(batch)
    replay, direct = (values["peak_mib"][mode] for mode in ("replay", "direct"))
    rows = [
        Row("replay: 9 blocks / 3 blocks", values["replay_9_to_3_blocks"], target=1.15, predicted=1.0),
        Row("direct: 9 blocks / 3 blocks", values["direct_9_to_3_blocks"], predicted=3.0),
        Row("3 blocks: replay / direct", replay["3"] / direct["3"], target=0.5),
    ]
    return Result("activations of a Self-Forcing student step", f"tiny Wan, batch {batch}", rows, ["Counted."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    print(json.dumps(measure(parser.parse_args().batch)))


def measure(batch: int) -> dict[str, Any]:
    """`peak_mib` by mode and number of blocks, and their ratios."""
    peaks: dict[str, dict[int, int]] = {"direct": {}, "replay": {}}
    with tempfile.TemporaryDirectory() as folder:
        prompts, cache = Path(folder) / "prompts.txt", Path(folder) / "cache"
        prompts.write_text("a small red circle moving left\n" * 2 * batch)
        preprocess(PreprocessConfig(data="", prompts=str(prompts), model="tiny-wan", output=str(cache)))
        for blocks, frames in NUM_FRAMES.items():
            keys = {
                "job.config_file": ROOT / "train_configs/tiny_self_forcing.toml",
                "models.student.init_from": "tiny-wan",
                "data.path": cache,
                "data.num_frames": frames,
                "training.local_batch_size": batch,
                "training.global_batch_size": -1,
            }
            cfg = load_config([word for key, value in keys.items() for word in (f"--{key}", str(value))])
            device = init_distributed(cfg.comm)
            try:
                roles = build_roles(cfg, Mesh(cfg, device.type), device)
                method = METHODS[cfg.method.name](cfg=cfg, role_models=roles)
                method.on_train_start()
                batches = BatchStream(method.data, global_batch_size=batch, local_batch_size=batch, seed=0)
                for mode, by_blocks in peaks.items():
                    cfg.method.gradient_mode = mode
                    gc.collect()
                    saved = SavedBytes()
                    with saved:
                        loss, _ = method.single_train_step(next(batches), 1, "student")
                        loss.backward()
                    by_blocks[blocks] = saved.peak
                    method.optimizers["student"].zero_grad()
            finally:
                close_distributed()
    growth = {f"{mode}_9_to_3_blocks": round(by[9] / by[3], 3) for mode, by in peaks.items()}
    return {
        "device": str(device),
        "batch": batch,
        "peak_mib": {mode: {str(k): round(v / 2**20, 1) for k, v in by.items()} for mode, by in peaks.items()},
        **growth,
    }


if __name__ == "__main__":
    main()
