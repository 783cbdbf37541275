"""train.py as one rank that waits in the steps it is told to, until the test says go."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from fvtitan.methods.finetune import FineTuneMethod
from tests.helpers import train


def wait_in_steps(folder: Path, *, hold: tuple[int, ...] = (), only_rank: int = -1) -> None:
    """In each step of `hold`, write `holding-<step>.rank<r>` and wait for `go-<step>`; on one rank, or on all (-1)."""
    rank = int(os.environ["RANK"])
    step_of = FineTuneMethod.single_train_step

    def single_train_step(self: FineTuneMethod, batch: dict[str, Any], step: int, role: str):
        if step in hold and only_rank in (-1, rank) and not (folder / f"go-{step}").exists():
            (folder / f"holding-{step}.rank{rank}").write_text(str(os.getpid()))
            while not (folder / f"go-{step}").exists():
                time.sleep(0.02)
        return step_of(self, batch, step, role)

    FineTuneMethod.single_train_step = single_train_step


if __name__ == "__main__":
    wait_in_steps(Path(sys.argv[1]), **json.loads(sys.argv[2]))
    sys.exit(train(sys.argv[3:]))
