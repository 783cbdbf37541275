"""Ranks that hang, fail, or do not call what the others call: all exit, and it is said who and where. Numbers of faults:
docs/reliability.md."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fvtitan.components.checkpoint import Checkpointer
from fvtitan.components.stops import Stops, read_status
from fvtitan.components.watchdog import Watchdog, explain
from fvtitan.distributed.utils import _record_collectives
from fvtitan.methods.dmd2 import DMD2Method
from tests.faults.test_numbers import expect_faults
from tests.faults.test_stops import alive, torchrun, wait_for
from tests.helpers import dmd2_recipe, make_cache, one_layer, small_arguments, train
from tests.integration.exact_worker import launch, output
from tests.integration.test_train import assert_same_checkpoint

TIMEOUT = 15
BOUND = TIMEOUT + 35


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("data") / "cache", 10)


def arguments_of(cache: Path, folder: Path, **keys: Any) -> list[str]:
    keys = {"training__steps": 4, "training__global_batch_size": 4, "checkpoint__interval": 1, **keys}
    if "job__config_file" not in keys:
        keys |= one_layer(cache.parent)
    return small_arguments(cache, folder / "run", **{"comm__timeout_seconds": TIMEOUT, **keys})


def watch_errors(folder: Path, *, faults: str) -> None:
    """As under torchrun, which names such a file for every rank."""
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(folder / f"error.rank{os.environ['RANK']}.json")
    expect_faults(folder, faults=faults)


def reason_of(folder: Path, step: int) -> str:
    status = read_status(folder / "run")
    assert (status["state"], status["step"], status["exit_code"]) == ("failed", step, 1), output(folder)
    return status["reason"]


def breaks(cache: Path, folder: Path, faults: str, step: int, **keys: Any) -> str:
    """Two ranks that both exit with 1 after `step` steps, in bounded time; the reason in status.json."""
    statuses = launch(2, arguments_of(cache, folder, **keys), folder, watcher=watch_errors, faults=faults)
    ended = time.time()
    assert statuses == [1, 1], output(folder)
    if step:
        saved = Checkpointer(folder / "run/checkpoint")
        assert saved.steps() == list(range(1, step + 1))
        assert ended - saved.path(step).stat().st_mtime < BOUND
    return reason_of(folder, step)


def stacks(folder: Path) -> list[str]:
    return [(folder / f"run/stacks.rank{rank}.txt").read_text() for rank in range(2)]


def test_a_rank_that_hangs_in_a_step_ends_all(cache, tmp_path):
    """Fault 26. The reason names the collective and who did not come; the stacks of both are written."""
    reason = breaks(cache, tmp_path, "hang step step=2 rank=1", 1)
    assert re.match(r"no progress for \d+ s; rank 1 did not come to collective \d+ ", reason)
    assert "of default_pg (group 0), gloo:all_gather" in reason
    assert "rank 1 is in the start of step 2, at fvtitan/components/faults.py:" in reason
    waiting, hanging = stacks(tmp_path)
    assert "in predict_velocity" in waiting and "in foreach_all_gather" in waiting and "rank 0, pid " in waiting
    assert 'faults.py", line ' in hanging and "in reach" in hanging and "in _listen" in hanging  # all threads
    for rank in range(2):
        recorded = json.loads((tmp_path / f"run/flight_recorder.rank{rank}.json").read_text())
        assert any(entry["profiling_name"] == "gloo:all_gather" for entry in recorded["entries"])


@pytest.mark.slow
def test_a_rank_that_hangs_with_the_interpreter_ends_too(cache, tmp_path):
    """Fault 26. Its own threads do not run any more: its stacks are written from C, and its part, the status,
    is another rank's."""
    reason = breaks(cache, tmp_path, "freeze step step=2 rank=0", 1)
    assert "rank 0 does not answer; rank 1 is in step 2, student, micro-batch 0, at " in reason
    assert "in reach" in stacks(tmp_path)[0]


@pytest.mark.slow
def test_a_rank_that_hangs_in_a_validation_ends_all(cache, tmp_path):
    """Fault 26, where only the others' collective has a limit."""
    keys = {"validation__enable": True, "validation__interval": 2, "validation__num_prompts": 2}
    reason = breaks(cache, tmp_path, "hang validation rank=1", 2, **keys, validation__sampling_steps=1)
    assert "rank 1 did not come to collective " in reason
    assert "rank 1 is in checkpoint, validation of step 2, at fvtitan/components/faults.py:" in reason
    waiting, hanging = stacks(tmp_path)
    assert "Timed out waiting" in waiting and "in reach" in hanging


@pytest.mark.slow
def test_torchrun_ends_when_a_rank_hangs(cache, tmp_path, monkeypatch):
    """Fault 26. And leaves nobody."""
    monkeypatch.setenv("FVTITAN_TEST", "1")
    monkeypatch.setenv("FVTITAN_FAULTS", "hang step step=3 rank=0")
    with torchrun(arguments_of(cache, tmp_path), tmp_path, hold=(1,)) as (agent, job):
        pids = job.holding(1, 0, 1)
        job.go(1)
        wait_for(lambda: agent.poll() is not None and not any(map(alive, pids)), "the end of all", tmp_path)
        assert agent.returncode == 1
    assert "rank 0 did not come to collective " in reason_of(tmp_path, 2)


@pytest.mark.slow
def test_a_collective_that_one_rank_skips_is_named(cache, tmp_path):
    """Fault 27. Its next collective meets the one that the other rank waits in."""
    reason = breaks(cache, tmp_path, "skip collective rank=1", 0)
    assert re.match(r"no progress for \d+ s; collective \d+ ", reason)
    assert "is gloo:all_reduce [3] on rank 0, but gloo:all_reduce [2] on rank 1; " in reason


def test_a_failing_rank_is_the_reason_not_what_the_others_raise(cache, tmp_path):
    """Fault 42."""
    assert breaks(cache, tmp_path, "raise step step=2 rank=1", 1) == "rank 1: RuntimeError: FVTITAN_FAULTS at step"
    assert "gloo" in (tmp_path / "rank0.log").read_text()
    error = json.loads((tmp_path / "error.rank1.json").read_text())["message"]
    assert (
        error["message"] == "RuntimeError: FVTITAN_FAULTS at step" and "in main" in error["extraInfo"]["py_callstack"]
    )
    assert not list((tmp_path / "run").glob("stacks*"))


@pytest.mark.slow
def test_nothing_is_saved_of_half_a_step(cache, tmp_path, monkeypatch):
    """Fault 42. The student of step 2 is updated when the critic fails; the run goes on from step 1."""
    keys = {"job__config_file": dmd2_recipe(tmp_path, student_update_interval=1), "training__steps": 2}
    keys |= {"training__global_batch_size": 2, "comm__timeout_seconds": 600}
    assert train(arguments_of(cache, tmp_path / "whole", **keys)) == 0
    step_of = DMD2Method.single_train_step

    def single_train_step(self, batch, step, role):
        if (step, role) == (2, "critic"):
            raise RuntimeError("out of memory")
        return step_of(self, batch, step, role)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(DMD2Method, "single_train_step", single_train_step)
        train(arguments_of(cache, tmp_path, **keys))
    assert reason_of(tmp_path, 1) == "RuntimeError: out of memory"
    assert [path.name for path in (tmp_path / "run/checkpoint").iterdir()] == ["step-1"]
    assert train(arguments_of(cache, tmp_path, **keys)) == 0
    assert_same_checkpoint(tmp_path / "whole/run/checkpoint/step-2", tmp_path / "run/checkpoint/step-2")


def test_only_steps_are_limited(tmp_path, single_process_group, monkeypatch):
    """Fault 26. Set-up, checkpoints and validations take their time; the next step is limited again."""
    late = threading.Event()
    monkeypatch.setattr(Watchdog, "_leave", lambda self, error=None: late.set())
    limit = 1.0
    with Stops(tmp_path, 100) as stops, Watchdog(tmp_path, limit, stops) as watchdog:
        assert not late.wait(1.3 * limit)
        watchdog.beat("step 1")
        with watchdog.resting("validation"):
            assert not late.wait(1.3 * limit)
        assert not late.wait(1.3 * limit)
        watchdog.beat("step 2")
        assert late.wait(600)
    assert not list(tmp_path.glob("stacks*"))


def test_a_failure_keeps_its_status_where_a_rank_takes_long_to_close(tmp_path, single_process_group, monkeypatch):
    """Fault 42. It is still uploading its metrics when its time is over: the disk was full, and that is what is said."""
    left, statuses = threading.Event(), []

    def leave(status: int) -> None:
        statuses.append(status)
        left.set()

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr("fvtitan.components.watchdog._UNWIND_SECONDS", 0.1)
    with Stops(tmp_path, 100) as stops, Watchdog(tmp_path, 600, stops) as watchdog:
        watchdog._tell_failure("DiskFull: no room", 74)
        assert left.wait(600)
        status = read_status(tmp_path)
    assert (statuses, status["exit_code"], status["reason"]) == ([74], 74, "rank 0: DiskFull: no room")


def test_a_lost_connection_is_not_the_reason_when_its_other_end_has_timed_out(
    tmp_path, single_process_group, monkeypatch
):
    """Fault 27. gloo closes it before the rank whose collective has timed out can say so."""
    left, sleep, lost = [], time.sleep, RuntimeError("gloo/transport/tcp/pair.cc: Connection closed by peer")
    monkeypatch.setattr(Watchdog, "_leave", lambda self, error=None: left.append(error))
    with pytest.raises(RuntimeError), Stops(tmp_path, 100) as stops, Watchdog(tmp_path, 600, stops) as watchdog:
        monkeypatch.setattr(time, "sleep", lambda seconds: watchdog._store.set("hang", "1") or sleep(seconds))
        raise lost
    assert lost in left


def test_what_the_user_has_set_for_the_recorder_stays(tmp_path, monkeypatch):
    names = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT")
    names += ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", "7")
    _record_collectives(tmp_path)
    prefix = str(tmp_path / "nccl_trace.rank")
    expected = ["7", "1", prefix]
    assert [os.environ[name] for name in names if name in os.environ] == expected
    _record_collectives(tmp_path / "another")
    assert [os.environ[name] for name in names if name in os.environ] == expected


# --------------------------------------------------------------------------------------------------- the report


def report(*groups: dict[str, dict[str, str]], seconds: float = 9.0) -> dict[int, dict[str, Any]]:
    """Of ranks that have made these calls."""
    return {
        rank: {"where": f"step 3 of {rank}", "seconds": seconds + rank, "line": f"x.py:{rank}", "groups": calls}
        for rank, calls in enumerate(groups)
    }


def test_the_report_names_who_is_behind_in_which_group():
    a, b = {"7": "nccl:all_reduce [1]"}, {"7": "nccl:all_reduce [1]", "8": "nccl:_all_gather_base [64]"}
    reason, lines = explain(report({"world": b}, {"world": b}, {"world": a}, {"world": b}), 4)
    assert reason == (
        "no progress for 12 s; rank 2 did not come to collective 8 of world, nccl:_all_gather_base [64]; "
        "rank 2 is in step 3 of 2, at x.py:2"
    )
    assert lines[3] == "  rank 3: step 3 of 3 for 12 s, at x.py:3"
    reason, _ = explain(report({"world": b, "shard a": a}, {"world": b, "shard a": b}, {"world": b, "shard b": a}), 3)
    assert "rank 0 did not come to collective 8 of shard a, nccl:_all_gather_base [64]; rank 0 is in" in reason
    reason, _ = explain(report({"world": {"7": "x [1]"}}, {"world": {str(n): "x [1]" for n in range(90, 99)}}), 2)
    assert "rank 0 did not come to collective 8 of world, what followed; rank 0" in reason


def test_the_report_names_calls_that_differ():
    a, b = (
        {"6": "nccl:all_reduce [4]", "7": "nccl:broadcast [1]"},
        {"6": "nccl:all_reduce [2]", "7": "nccl:broadcast [9]"},
    )
    reason, _ = explain(report({"world": a}, {"world": b}), 2)
    assert (
        "; collective 6 of world is nccl:all_reduce [4] on rank 0, but nccl:all_reduce [2] on rank 1; rank 0" in reason
    )
    c = {"6": "nccl:all_reduce [2]", "7": "nccl:broadcast [1]"}  # ranks may send differently much
    reason, _ = explain(report({"world": b}, {"world": c}), 2)
    assert reason == "no progress for 10 s; rank 1 is in step 3 of 1, at x.py:1"


def test_the_report_without_a_recorder_or_an_answer():
    """Or after a failure, which is the reason then."""
    reports = report({}, {}, {})
    del reports[1]
    reason, lines = explain(reports, 3)
    assert reason == "no progress for 11 s; rank 1 does not answer; rank 2 is in step 3 of 2, at x.py:2"
    assert len(lines) == 2
    assert explain(reports, 3, "rank 1: OutOfMemoryError: 80 GiB")[0] == "rank 1: OutOfMemoryError: 80 GiB"
