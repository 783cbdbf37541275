"""Checkpoints over real ranks: 2 -> 1 -> 2 is exact, and nobody hangs when one rank fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("checkpoint_worker.py")


def launch(ranks: int, *arguments: object) -> dict:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(WORKER)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2])}
    result = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=120, env=environment
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.strip().splitlines()[-1])


@pytest.mark.faults
@pytest.mark.slow
def test_two_one_two_ranks_and_errors(tmp_path):
    """Faults 14, 16, 17, 18, 21."""
    first = launch(2, tmp_path, "train", "fail")
    assert {".metadata", "state.json", "manifest.json", "__0_0.distcp", "__1_0.distcp"} <= set(first["files"])
    second = launch(1, tmp_path, "train")
    assert second["loaded"] == first["saved"]
    third = launch(2, tmp_path, "async")
    assert third["loaded"] == second["saved"]
    assert third["loaded again"] == third["saved"]
    assert len({tuple(run["saved"].items()) for run in (first, second, third)}) == 3

    assert [run["random"] for run in (first, second, third)] == [["rank0", "rank1"], ["rank0"], ["rank0", "rank1"]]

    errors = first["errors"]  # what each of the two ranks was told
    assert errors[0] == errors[1] and len(errors[0]) == 5
    assert "(rank 1): No space left on device" in errors[0][0] and "bytes needed" in errors[0][0]
    assert "__1_0.distcp has changed since it was written" in errors[0][1]
    (told, by_rank_0), (also_told, by_rank_1) = first["verified"]  # outside of a run
    assert told == also_told and "__1_0.distcp has changed since it was written" in told
    assert by_rank_0 and by_rank_1 and not set(by_rank_0) & set(by_rank_1)
    assert "there is no checkpoint" in errors[0][2]
    assert "none is whole: " in errors[0][3] and "state.json is missing" in errors[0][3]
    assert "step 2 was read and is whole" in errors[0][4]
    folder = tmp_path / "fail"
    assert sorted(p.name for p in folder.iterdir()) == [
        *("step-0", "step-1", "step-1.aside", "step-2", "step-3", "step-3.aside", "step-4")
    ]
