"""How runs stop: real processes, real signals. A rank waits in a step until the test has done what it wants to happen there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fvtitan.components.processes import process_start
from fvtitan.components.stops import EXIT_STOPPED, SAME_SIGNAL_SECONDS, Stops, read_status
from fvtitan.errors import UserError
from fvtitan.methods.finetune import FineTuneMethod
from tests.faults.stops_worker import wait_in_steps
from tests.helpers import ROOT, make_cache, one_layer, small_arguments, train
from tests.integration.exact_worker import launch, output, start
from tests.integration.test_train import assert_same_checkpoint, training_values

PATIENCE = 120  # seconds for what takes a few
STEPS = 6


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("data") / "cache", 10)


def arguments_of(cache: Path, folder: Path, **keys: Any) -> list[str]:
    """Saved only when asked, and after the last step."""
    keys = {"training__steps": STEPS, "training__global_batch_size": 4, "checkpoint__interval": 100, **keys}
    return small_arguments(cache, folder / "run", **{**one_layer(cache.parent), **keys})


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    """The run that nothing stops, on 2 ranks."""
    folder = tmp_path_factory.mktemp("whole")
    assert launch(2, arguments_of(cache, folder), folder) == [0, 0], output(folder)
    return folder / "run"


def wait_for(condition: Callable[[], Any], what: str, folder: Path) -> Any:
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, f"waited for {what}\n{output(folder)}"
        time.sleep(0.02)
    return found


class Job:
    """Ranks that are running, in `folder`: what they print, and where they wait."""

    def __init__(self, folder: Path, processes: list[Any]) -> None:
        self.folder, self.processes = folder, processes

    def holding(self, step: int, *ranks: int) -> list[int]:
        """The process ids of the ranks, once they wait in the step."""
        paths = [self.folder / f"holding-{step}.rank{rank}" for rank in ranks]
        wait_for(lambda: all(p.exists() and p.read_text() for p in paths), f"step {step}", self.folder)
        return [int(path.read_text()) for path in paths]

    def go(self, step: int) -> None:
        (self.folder / f"go-{step}").touch()

    def says(self, words: str, times: int = 1) -> None:
        wait_for(lambda: output(self.folder).count(words) >= times, repr(words), self.folder)

    def exits(self) -> list[int]:
        for process in self.processes:
            process.join(PATIENCE)
        return [process.exitcode for process in self.processes]


@contextmanager
def running(ranks: int, arguments: list[str], folder: Path, **options: Any) -> Iterator[Job]:
    folder.mkdir(parents=True, exist_ok=True)
    processes = start(ranks, arguments, folder, wait_in_steps, options)
    try:
        yield Job(folder, processes)
    finally:
        for process in processes:
            if process.exitcode is None:
                process.kill()
            process.join()


@contextmanager
def torchrun(arguments: list[str], folder: Path, **options: Any) -> Iterator[tuple[subprocess.Popen, Job]]:
    """Two ranks, and torchrun's process, which leads a session of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "tests.faults.stops_worker", str(folder), json.dumps(options), *arguments]
    with open(folder / "torchrun.log", "wb") as log:
        agent = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield agent, Job(folder, [])
    finally:
        agent.kill()
        agent.wait()
        for pid in {
            int(path.read_text()) for path in folder.glob("holding-*")
        }:  # that they end by themselves is tested
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    """A process that nobody has waited for yet is dead as well."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def status_of(folder: Path) -> tuple[str, int | None, str, int | None]:
    status = read_status(folder / "run")
    assert set(status) == {"state", "step", "reason", "exit_code", "started", "updated"}
    return tuple(status[key] for key in ("state", "step", "reason", "exit_code"))


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run/checkpoint").glob("*"))


def assert_resumes_as_uninterrupted(cache: Path, folder: Path, whole: Path) -> None:
    assert launch(2, arguments_of(cache, folder), folder / "resumed") == [0, 0], output(folder / "resumed")
    assert_same_checkpoint(whole / f"checkpoint/step-{STEPS}", folder / f"run/checkpoint/step-{STEPS}")
    assert training_values(folder / "run") == training_values(whole)
    assert status_of(folder) == ("finished", STEPS, "", 0)


# ------------------------------------------------------------------------------------------------------ signals


def test_one_signalled_rank_stops_all_and_the_run_goes_on_as_if_nothing_had_been(cache, tmp_path, whole):
    """Fault 8."""
    with running(2, arguments_of(cache, tmp_path), tmp_path, hold=(3,)) as job:
        _, other = job.holding(3, 0, 1)
        os.kill(other, signal.SIGTERM)
        job.says("rank 1: SIGTERM: stopping at the end of the next step")
        job.go(3)
        assert job.exits() == [EXIT_STOPPED, EXIT_STOPPED], output(tmp_path)
    assert "rank 0: SIGTERM" not in output(tmp_path)
    assert f"stopped after step 4 of {STEPS} (SIGTERM)" in output(tmp_path)
    assert status_of(tmp_path) == ("stopped", 4, "SIGTERM", EXIT_STOPPED)
    assert checkpoints(tmp_path) == ["step-4"]
    assert_resumes_as_uninterrupted(cache, tmp_path, whole)


def test_a_second_signal_leaves_at_once_also_out_of_a_collective(cache, tmp_path, capsys):
    """Faults 10 and 13. Rank 0 waits for rank 1 inside a collective, where Python runs no handler. Meanwhile, nobody else may
    have the folder."""
    arguments = arguments_of(cache, tmp_path, checkpoint__interval=2)
    with running(2, arguments, tmp_path, hold=(3,), only_rank=1) as job:
        job.holding(3, 1)
        before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
        assert train(arguments) == 2
        (error,) = capsys.readouterr().err.strip().splitlines()
        process = job.processes[0]
        assert f"the run folder is in use by pid {process.pid} on host" in error
        assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before

        os.kill(process.pid, signal.SIGTERM)
        job.says("rank 0: SIGTERM: stopping")

        time.sleep(1.2 * SAME_SIGNAL_SECONDS)
        os.kill(process.pid, signal.SIGTERM)
        wait_for(lambda: process.exitcode is not None, "the end of rank 0", tmp_path)
        assert process.exitcode == 128 + signal.SIGTERM
        assert status_of(tmp_path) == ("failed", 2, "SIGTERM, the second signal", 128 + signal.SIGTERM)
        job.go(3)
        assert job.exits()[1] not in (0, EXIT_STOPPED)
    assert checkpoints(tmp_path) == ["step-2"]
    assert train(arguments_of(cache, tmp_path, training__steps=2)) == 0  # the lock is free, the checkpoint good
    assert status_of(tmp_path) == ("finished", 2, "", 0)


def test_what_hangs_ends_after_the_grace(cache, tmp_path):
    with running(1, arguments_of(cache, tmp_path, comm__stop_grace_seconds=1), tmp_path, hold=(2,)) as job:
        os.kill(*job.holding(2, 0), signal.SIGINT)
        assert job.exits() == [128 + signal.SIGINT], output(tmp_path)
    assert status_of(tmp_path) == ("failed", 1, "still there 1 s after SIGINT", 128 + signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_each_signal_stops_within_a_step(tmp_path, single_process_group, capsys, number):
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with Stops(tmp_path, 100) as stops:
        stops.begin_step()
        os.kill(os.getpid(), number)
        wait_for(lambda: stops._signal, number.name, tmp_path)
        os.kill(os.getpid(), number)  # torchrun passes on what a scheduler has sent to everyone
        assert not stops.end_step(1, last=False).stop
        stops.begin_step()
        assert stops.end_step(2, last=False).stop == number.name
        assert stops.exit_code == EXIT_STOPPED
    assert read_status(tmp_path)["state"] == "stopped"
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == handlers


def test_after_the_last_step_a_run_is_finished_not_stopped(tmp_path, single_process_group):
    with Stops(tmp_path, 100) as stops:
        (tmp_path / "stop").touch()
        stops.begin_step()
        assert not stops.end_step(1, last=True).stop
    assert (read_status(tmp_path)["state"], read_status(tmp_path)["exit_code"]) == ("finished", 0)
    assert not (tmp_path / "stop").exists()


@pytest.mark.parametrize(
    ("content", "old", "stops_it"),
    [("", False, True), ("", True, False), ("8612345.1\n", True, True), ("8612345.0\n", True, False)],
)
def test_a_stop_during_set_up_holds(tmp_path, single_process_group, monkeypatch, content, old, stops_it):
    """One that came after this process began, or from this job's script, which had begun before it. No other does."""
    monkeypatch.setenv("RDZV_ID", "8612345.1")
    (tmp_path / "stop").write_text(content)
    if old:
        before = process_start() - 1
        os.utime(tmp_path / "stop", (before, before))
    with Stops(tmp_path, 100) as stops:
        assert (tmp_path / "stop").exists() == stops_it
        stops.begin_step()
        assert stops.end_step(1, last=False).stop == ("the file stop" if stops_it else "")
    assert not (tmp_path / "stop").exists()


def test_when_this_process_began():
    assert 0 <= time.time() - process_start() - time.process_time() < 100_000
    reading, writing = os.pipe()
    before = time.time()
    if (child := os.fork()) == 0:
        os.write(writing, str(process_start()).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert before - 0.02 <= float(os.read(reading, 100)) <= time.time()


BUSY = {
    "save.before_manifest step=2": {},
    "validation step=2": {"validation__enable": True, "validation__num_prompts": 1, "validation__sampling_steps": 1},
    "save.before_shards step=2": {"checkpoint__async_mode": "async"},
    "step step=1": {"compile__enable": True, "compile__backend": "aot_eager"},
}


@pytest.mark.parametrize("busy", [*list(BUSY)[:1], *(pytest.param(b, marks=pytest.mark.slow) for b in list(BUSY)[1:])])
def test_a_signal_in_a_save_a_validation_or_a_compilation_waits_for_it(cache, tmp_path, monkeypatch, busy):
    """Fault 9. What is under way is finished, once; the run stops after the next step and goes on to the same bits."""
    keys = {"checkpoint__interval": 2, "validation__interval": 2, **BUSY[busy]}
    assert train(arguments_of(cache, tmp_path / "whole", **keys)) == 0
    monkeypatch.setenv("FVTITAN_TEST", "1")
    monkeypatch.setenv("FVTITAN_FAULTS", f"term {busy}")
    arguments = arguments_of(cache, tmp_path, **keys)
    assert train(arguments) == EXIT_STOPPED
    state, stopped, *how = status_of(tmp_path)
    assert (state, *how) == ("stopped", "SIGTERM", EXIT_STOPPED)
    later = stopped - int(busy[-1])  # a save in the background is heard of in any part of the next step
    assert later == 1 or (later == 2 and "async" in BUSY[busy].values())
    assert checkpoints(tmp_path) == [f"step-{step}" for step in (2, 3, 4) if step <= stopped and step in (2, stopped)]
    monkeypatch.delenv("FVTITAN_FAULTS")
    assert train(arguments) == 0
    assert_same_checkpoint(tmp_path / f"whole/run/checkpoint/step-{STEPS}", tmp_path / f"run/checkpoint/step-{STEPS}")
    assert training_values(tmp_path / "run") == training_values(tmp_path / "whole/run")


# -------------------------------------------------------------------------------------------------------- files


def test_files_save_validate_and_stop(cache, tmp_path):
    keys = {"validation__enable": True, "validation__interval": 100, "validation__num_prompts": 2}
    arguments = arguments_of(cache, tmp_path, **keys, validation__sampling_steps=1)
    run = tmp_path / "run"
    run.mkdir()
    (run / "stop").touch()
    os.utime(run / "stop", (1e9, 1e9))  # from before
    with running(2, arguments, tmp_path, hold=(1, 2, 3), only_rank=0) as job:
        for step, name in enumerate(("save", "validate", "stop"), 1):
            job.holding(step, 0)
            (run / name).touch()
            job.go(step)
        assert job.exits() == [EXIT_STOPPED, EXIT_STOPPED], output(tmp_path)
    said = output(tmp_path)
    assert f"removed {run / 'stop'}: it asked an earlier run" in said
    for step, name in enumerate(("save", "validate", "stop"), 2):
        assert f"step {step}: {run / name} asks to {name}" in said
        assert not (run / name).exists()
    assert checkpoints(tmp_path) == ["step-2", "step-4"]
    assert sorted(path.name for path in (run / "validation").glob("step-*")) == ["step-3"]
    assert status_of(tmp_path) == ("stopped", 4, "the file stop", EXIT_STOPPED)


# ---------------------------------------------------------------------------------------- the folder, the status


def test_the_lock_goes_with_its_process_not_with_what_it_forked(cache, tmp_path, capsys):
    """The loader's worker lives on for seconds after its parent was killed."""
    with running(1, arguments_of(cache, tmp_path, data__num_workers=1), tmp_path, hold=(2,)) as job:
        (pid,) = job.holding(2, 0)
        (worker,) = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        os.kill(pid, signal.SIGSTOP)  # it must not end its worker
        os.kill(pid, signal.SIGKILL)
        assert job.exits() == [-signal.SIGKILL]
        assert status_of(tmp_path)[0] == "running"
        assert alive(worker)
        assert train(arguments_of(cache, tmp_path, training__steps=1)) == 0
    assert "an earlier run here ended without saying so" in capsys.readouterr().out
    assert status_of(tmp_path) == ("finished", 1, "", 0)


def test_a_child_has_neither_signals_nor_lock(tmp_path, single_process_group):
    reading, writing = os.pipe()
    with Stops(tmp_path, 100) as stops:
        child = os.fork()
        if child == 0:
            usual = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and stops._lock is None
            os.write(writing, b"x")
            signal.pause() if usual else os._exit(1)
        os.read(reading, 1)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        assert not stops._signal


def test_an_error_is_one_line_in_the_status_without_secrets(cache, tmp_path, monkeypatch):
    def fails(self, batch, step, role):
        raise error

    monkeypatch.setattr(FineTuneMethod, "single_train_step", fails)
    monkeypatch.setenv("SOME_API_KEY", "tops3cret")
    error = RuntimeError("cannot reach https://tops3cret@host\nand more")
    with pytest.raises(RuntimeError):
        train(arguments_of(cache, tmp_path))
    assert status_of(tmp_path) == ("failed", 0, "RuntimeError: cannot reach https://***@host", 1)
    error = UserError("data.path: no")
    assert train(arguments_of(cache, tmp_path)) == 2
    assert status_of(tmp_path) == ("failed", 0, "data.path: no", 2)


def test_a_folder_that_cannot_be_one(tmp_path, single_process_group):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"job.dump_folder = '.*file' cannot be used: File exists"):
        Stops(tmp_path / "file", 100).__enter__()


# ----------------------------------------------------------------------------------------------------- torchrun


@pytest.mark.slow
def test_a_killed_torchrun_takes_its_ranks_along(cache, tmp_path):
    """Fault 12."""
    with torchrun(arguments_of(cache, tmp_path), tmp_path, hold=(3,)) as (agent, job):
        pids = job.holding(3, 0, 1)
        agent.kill()
        job.says("SIGTERM: stopping", times=2)
        job.go(3)
        wait_for(lambda: not any(map(alive, pids)), "the end of the ranks", tmp_path)
    assert status_of(tmp_path) == ("stopped", 4, "SIGTERM", EXIT_STOPPED), output(tmp_path)
    assert train(arguments_of(cache, tmp_path, training__steps=4)) == 0  # the lock is free, the checkpoint good
    assert status_of(tmp_path) == ("finished", 4, "", 0)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("everyone", [False, True])
def test_torchrun_passes_the_signal_on(cache, tmp_path, whole, number, everyone):
    """Faults 7 and 11. To torchrun, or as a scheduler does it, to every process group of the job; with loader workers."""
    arguments = arguments_of(cache, tmp_path, data__num_workers=1)
    with torchrun(arguments, tmp_path, hold=(3,)) as (agent, job):
        pids = job.holding(3, 0, 1)
        if everyone:
            for pid in pids:
                os.killpg(pid, number)
        agent.send_signal(number)
        job.says(f"{number.name}: stopping", times=2)
        job.go(3)
        assert agent.wait(PATIENCE) != 0
        assert not any(map(alive, pids))
    assert status_of(tmp_path) == ("stopped", 4, number.name, EXIT_STOPPED), output(tmp_path)
    assert "DataLoader worker" not in output(tmp_path)
    assert_resumes_as_uninterrupted(cache, tmp_path, whole)


@pytest.mark.slow
def test_torchrun_signalled_twice_leaves_nobody(cache, tmp_path):
    """Fault 10."""
    with torchrun(arguments_of(cache, tmp_path, checkpoint__interval=2), tmp_path, hold=(3,)) as (agent, job):
        pids = job.holding(3, 0, 1)
        agent.terminate()
        job.says("SIGTERM: stopping", times=2)

        time.sleep(1.2 * SAME_SIGNAL_SECONDS)
        agent.terminate()
        wait_for(lambda: agent.poll() is not None and not any(map(alive, pids)), "the end of all", tmp_path)
    assert checkpoints(tmp_path) == ["step-2"]
    assert status_of(tmp_path) == ("failed", 2, "SIGTERM, the second signal", 128 + signal.SIGTERM)
