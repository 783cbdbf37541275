"""One of two ranks that builds a role from a folder, and reports its largest anonymous memory meanwhile."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from fvtitan.config import CommConfig, load_config
from fvtitan.distributed.mesh import Mesh
from fvtitan.distributed.utils import close_distributed, init_distributed, local_rows, local_tensor
from fvtitan.models import build_roles
from fvtitan.models.wan.files import open_weights


def anonymous() -> int:
    """Bytes of this process's memory that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon:")).split()[1])


def main() -> None:
    source, output = sys.argv[1], Path(sys.argv[2])
    recipe = output / "recipe.toml"
    device = init_distributed(CommConfig())
    cfg = load_config(["--job.config_file", str(recipe), "--models.student.init_from", source], training=False)
    before, peak, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    student = build_roles(cfg, Mesh(cfg, device.type), device)["student"]
    done.set()
    thread.join()
    files, wrong = open_weights(source), []
    parameters = dict(student.transformer.named_parameters())
    for name, parameter in parameters.items():
        assert isinstance(parameter, DTensor) and parameter.dtype == torch.float32
        shard = local_tensor(parameter.detach())
        if not torch.equal(shard, files.read(name, local_rows(parameter)).reshape(shard.shape).float()):
            wrong.append(name)
    record = {"before": before, "peak": max(peak[0], anonymous()), "wrong": wrong}
    record["shards"] = sum(4 * local_tensor(p).numel() for p in parameters.values())
    record["largest"] = max(4 * p.numel() for p in parameters.values())
    (output / f"rank{dist.get_rank()}.json").write_text(json.dumps(record))
    close_distributed()


if __name__ == "__main__":
    main()
