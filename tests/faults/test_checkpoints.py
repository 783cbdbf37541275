"""What happens to checkpoints: ranks killed while they save, full disks, damage, folders that cannot be written, odd clocks.

Training is tiny: 4 steps, a checkpoint after each.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint import filesystem

from fvtitan.components.checkpoint import Checkpointer
from fvtitan.components.metrics import read_metrics
from fvtitan.components.stops import read_status
from fvtitan.errors import EXIT_DISK_FULL, cli
from fvtitan.methods.finetune import FineTuneMethod
from tests.helpers import (
    ROOT,
    causal_recipe,
    dmd2_recipe,
    make_cache,
    one_layer,
    self_forcing_recipe,
    small_arguments,
    train,
)
from tests.integration.exact_worker import launch, output
from tests.integration.test_train import assert_same_checkpoint, training_values

STEPS = 4


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("data") / "cache", 10)


@pytest.fixture(scope="module")
def arguments(cache):
    def arguments_of(folder: Path, **keys: Any) -> list[str]:
        settings = {"training__steps": STEPS, "training__global_batch_size": 4, "checkpoint__interval": 1}
        settings |= {"lr_scheduler__decay_type": "constant", **keys}  # a shorter run takes the same steps
        return small_arguments(cache, folder, **{**one_layer(cache.parent), **settings})

    return arguments_of


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """The run to which nothing happens, every checkpoint kept."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(arguments(folder, checkpoint__keep_latest_k=0)) == 0
    return folder


@pytest.fixture
def mount(tmp_path) -> Iterator[Any]:
    """`mount(folder, options)`: a file system in memory there."""
    mounted: list[Path] = []

    def tmpfs(folder: Path, options: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"this user cannot mount: {done.stderr.strip()}")
        mounted.append(folder)

    yield tmpfs
    for folder in reversed(mounted):
        subprocess.run(["umount", "-l", folder], check=True)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoint").iterdir())


def steps_logged(folder: Path) -> list[int]:
    return [record["step"] for record in read_metrics(folder / "metrics.jsonl")]


def assert_as_if_nothing_had_been(folder: Path, whole: Path) -> None:
    assert_same_checkpoint(whole / f"checkpoint/step-{STEPS}", folder / f"checkpoint/step-{STEPS}")
    assert training_values(folder) == training_values(whole)
    assert (status := read_status(folder))["state"] == "finished" and status["exit_code"] == 0


# ------------------------------------------------------------------------------------------------ killed in a save


def break_run(folder: Path, *, faults: str = "", half_a_shard: int = 0, file_size: int = 0) -> None:
    """In this rank: faults of FVTITAN_FAULTS; a kill in the middle of the shard of a step; a limit of bytes for the files of
    the last rank."""
    os.environ |= {"FVTITAN_TEST": "1", "FVTITAN_FAULTS": faults}
    if file_size and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.RLIM_INFINITY))
    if half_a_shard:
        write = filesystem._write_item

        def write_item(transforms: Any, stream: Any, *rest: Any) -> Any:
            if f"step-{half_a_shard}.tmp" in stream.name and stream.tell() > 1_000_000:
                stream.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return write(transforms, stream, *rest)

        filesystem._write_item = write_item


KILLS = {  # what happens at the third save, and what is left
    "before the shards": ({"faults": "kill save.before_shards step=3"}, ["step-1", "step-2", "step-3.tmp"]),
    "in a shard": ({"half_a_shard": 3}, ["step-1", "step-2", "step-3.tmp"]),
    "before .metadata": ({"faults": "kill save.shards step=3"}, ["step-1", "step-2", "step-3.tmp"]),
    "before the manifest": ({"faults": "kill save.before_manifest step=3"}, ["step-1", "step-2", "step-3.tmp"]),
    "before the rename": ({"faults": "kill save.before_rename step=3"}, ["step-1", "step-2", "step-3.tmp"]),
    "before the purge": ({"faults": "kill save.before_purge step=3"}, ["step-1", "step-2", "step-3"]),
}
QUICK = ("in a shard", "before the purge")


def cases(mode: str, quick: tuple[str, ...]) -> list[Any]:
    return [pytest.param(mode, kill, marks=[] if kill in quick else pytest.mark.slow) for kill in KILLS]


@pytest.mark.parametrize(("mode", "kill"), [*cases("disabled", QUICK), *cases("async", ("before the manifest",))])
def test_a_kill_in_a_save_costs_nothing_else(arguments, tmp_path, whole, capsys, mode, kill):
    """Faults 3, 4, 5, 6, 41. The step has been logged, and is logged once in the end; what was left is cleared; what was about
    to be removed is."""
    options, left = KILLS[kill]
    run, keys = tmp_path / "run", {"checkpoint__async_mode": mode}
    assert launch(1, arguments(run, **keys), tmp_path / "out", watcher=break_run, **options) == [-signal.SIGKILL]
    assert names(run) == left, output(tmp_path / "out")
    if kill == "in a shard":
        assert 1_000_000 < (run / "checkpoint/step-3.tmp/__0_0.distcp").stat().st_size < 1_800_000
    good = max(step for step in (1, 2, 3) if f"step-{step}" in left)
    assert steps_logged(run)[:3] == [1, 2, 3]

    assert train(arguments(run, **keys)) == 0
    said = capsys.readouterr().out
    assert f"resumed from {run / f'checkpoint/step-{good}'}: {good} of {STEPS}" in said
    assert ("removing the incomplete checkpoint" in said) == ("step-3.tmp" in left)
    assert names(run) == (["step-3", "step-4"] if good == 3 else ["step-2", "step-3", "step-4"])  # resumed from 2
    assert_as_if_nothing_had_been(run, whole)
    for step in (3, 4):
        assert_same_checkpoint(run / f"checkpoint/step-{step}", whole / f"checkpoint/step-{step}")


@pytest.fixture(scope="module")
def whole_on_2_ranks(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole-2")
    assert launch(2, arguments(folder / "run"), folder / "out") == [0, 0], output(folder / "out")
    return folder / "run"


@pytest.mark.parametrize(
    ("kill", "rank"),
    [
        pytest.param("save.before_manifest", 1),
        pytest.param("save.shards", 0, marks=pytest.mark.slow),
        pytest.param("save.shards", 1, marks=pytest.mark.slow),
        pytest.param("save.before_rename", 0, marks=pytest.mark.slow),
        pytest.param("save.before_purge", 1, marks=pytest.mark.slow),
    ],
)
def test_one_of_two_ranks_is_killed_in_a_save(arguments, tmp_path, whole_on_2_ranks, kill, rank):
    """Faults 3, 5. The other one does not wait for it, nor does it commit anything."""
    run = tmp_path / "run"
    fault = {"faults": f"kill {kill} step=3 rank={rank}"}
    status = launch(2, arguments(run), tmp_path / "killed", watcher=break_run, **fault)
    assert status[rank] == -signal.SIGKILL and status[1 - rank] not in (0, None), output(tmp_path / "killed")
    committed = kill == "save.before_purge"
    assert Checkpointer(run / "checkpoint").steps()[-1] == (3 if committed else 2)
    assert launch(2, arguments(run), tmp_path / "resumed") == [0, 0], output(tmp_path / "resumed")
    assert_as_if_nothing_had_been(run, whole_on_2_ranks)


@pytest.mark.slow
def test_torchrun_ends_when_a_rank_is_killed_in_a_save(arguments, tmp_path, whole_on_2_ranks):
    """Faults 3, 6."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    faulty = {**os.environ, "FVTITAN_TEST": "1", "FVTITAN_FAULTS": "kill save.before_manifest step=3 rank=1"}
    keys = {"checkpoint__async_mode": "async"}
    for environment, expected in ((faulty, 1), (dict(os.environ), 0)):
        done = subprocess.run(
            [*command, *arguments(run, **keys)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == expected, done.stderr[-3000:]
        assert names(run)[:2] == (["step-1", "step-2"] if expected else ["step-2", "step-3"])
    assert_as_if_nothing_had_been(run, whole_on_2_ranks)


# ---------------------------------------------------------------------------------------------------- a full disk


def fill(folder: Path, free: int) -> Path:
    """A file that leaves so many bytes."""
    path = folder / "filler"
    with open(path, "wb") as file:
        while (left := shutil.disk_usage(folder).free - free) > 0:
            file.write(bytes(min(left, 2**16)))
            file.flush()
    return path


def fill_in_step(patch: pytest.MonkeyPatch, folder: Path, sizes: dict[int, int | None]) -> None:
    """At the start of these steps the disk has so many bytes free; None: what filled it goes."""
    step_of = FineTuneMethod.single_train_step

    def single_train_step(self: FineTuneMethod, batch: dict[str, Any], step: int, role: str):
        if step in sizes:
            (folder / "filler").unlink(missing_ok=True)
            if (free := sizes.pop(step)) is not None:
                fill(folder, free)
        return step_of(self, batch, step, role)

    patch.setattr(FineTuneMethod, "single_train_step", single_train_step)


@pytest.mark.parametrize(
    "free",
    [
        pytest.param(0, id="not a byte", marks=pytest.mark.slow),
        pytest.param(500_000, id="it is foreseen"),
        pytest.param(1_640_000, id="in a shard"),
    ],
)
def test_a_full_disk_ends_the_run_with_its_own_status(arguments, tmp_path, whole, mount, monkeypatch, capfd, free):
    """Fault 14. The tensors of a checkpoint take 1.4 MB, its files 1.8."""
    run = tmp_path / "run"
    mount(run, "size=16m")
    with monkeypatch.context() as patch:
        fill_in_step(patch, run, {3: free})
        assert train(arguments(run)) == EXIT_DISK_FULL == 74
    (error,) = capfd.readouterr().err.strip().splitlines()
    assert error.startswith(f"error: cannot save {run / 'checkpoint/step-3'}")
    needed, left = (int(error.split(words)[0].split()[-1]) for words in (" bytes needed, ", " free in "))
    assert 1_000_000 < needed < 1_600_000 and abs(left - free) < 100_000
    assert ("No space left on device" in error) == (free != 500_000) and "inline_container" not in error
    status = read_status(run)
    assert (status["state"], status["step"], status["exit_code"]) == ("failed", 3, 74)
    assert status["reason"] == error.removeprefix("error: ")
    assert names(run) == ["step-1", "step-2"]
    (run / "filler").unlink()
    assert train(arguments(run)) == 0
    assert_as_if_nothing_had_been(run, whole)


@pytest.mark.parametrize("mode", ["disabled", pytest.param("async", marks=pytest.mark.slow)])
def test_training_may_go_on_without_a_save(arguments, tmp_path, whole, mount, monkeypatch, capsys, mode):
    """Fault 14. The next save is a good one when there is room; without it the run fails in the end."""
    run = tmp_path / "run"
    mount(run, "size=16m")
    keys = {"checkpoint__on_failed_save": "continue", "checkpoint__async_mode": mode}
    with monkeypatch.context() as patch:
        fill_in_step(patch, run, {3: 1_640_000, 4: None})
        if mode == "async":  # the write of step 3 ends before the disk is emptied in step 4
            save = Checkpointer.save
            patch.setattr(Checkpointer, "save", lambda self, *a, **k: (save(self, *a, **k), self.wait()))
        assert train(arguments(run, **keys)) == 0
    said = capsys.readouterr().out
    assert f"WARNING: cannot save {run / 'checkpoint/step-3'}" in said and "Training goes on" in said
    assert names(run) == ["step-2", "step-4"]
    assert_as_if_nothing_had_been(run, whole)

    shutil.rmtree(run / "checkpoint/step-4")
    with monkeypatch.context() as patch:
        fill_in_step(patch, run, {3: 1_640_000})
        assert train(arguments(run, **keys)) == EXIT_DISK_FULL
    captured = capsys.readouterr()
    assert "Training goes on" in captured.out and f"cannot save {run / 'checkpoint/step-4'}" in captured.err
    assert read_status(run)["exit_code"] == EXIT_DISK_FULL and names(run) == ["step-2"]


def test_a_limit_on_the_size_of_files_is_a_full_disk(arguments, tmp_path, whole):
    """Fault 14, also without the rights to mount one; and of one rank alone, which all of them tell."""
    run = tmp_path / "run"
    assert train(arguments(run, training__steps=1)) == 0
    status = launch(2, arguments(run), tmp_path / "out", watcher=break_run, file_size=300_000)
    assert status == [EXIT_DISK_FULL] * 2, output(tmp_path / "out")
    for log in sorted((tmp_path / "out").glob("*.log")):
        (error,) = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
        assert error.startswith(f"error: cannot save {run / 'checkpoint/step-2'} (rank 1): File too large: ")
        assert " bytes needed, " in error and "inline_container" not in log.read_text()
    assert read_status(run)["exit_code"] == EXIT_DISK_FULL and names(run) == ["step-1"]
    assert_same_checkpoint(run / "checkpoint/step-1", whole / "checkpoint/step-1")


def test_a_full_disk_has_its_status_wherever_it_shows(capsys):
    """Fault 14. In metrics.jsonl, for instance: with the stack."""

    def main() -> None:
        raise OSError(28, "No space left on device", "metrics.jsonl")

    with pytest.raises(SystemExit) as ended:
        cli(main)
    assert ended.value.code == EXIT_DISK_FULL
    assert "in main" in (said := capsys.readouterr().err) and "metrics.jsonl" in said


# --------------------------------------------------------------------------------------------------------- damage


def test_a_run_goes_back_from_damage_only_when_told(arguments, tmp_path, whole, capsys):
    """Faults 15, 16, 17, 18. To the newest that is whole, and ends as if nothing had been; the damaged ones stay."""
    run, keys = tmp_path / "run", {"checkpoint__keep_latest_k": 0}
    shutil.copytree(whole, run)
    shard = run / "checkpoint/step-3/__0_0.distcp"
    with open(shard, "r+b") as file:  # one bit
        file.seek(shard.stat().st_size // 2)
        byte = file.read(1)[0] ^ 1
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte]))
    os.truncate(run / "checkpoint/step-4/__0_0.distcp", 1000)
    before = {path: path.read_bytes() for path in (run / "checkpoint").rglob("*") if path.is_file()}

    assert train(arguments(run, **keys)) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert f"{run / 'checkpoint/step-4'}: __0_0.distcp has 1000 bytes" in error
    assert "step 2 was read and is whole: set checkpoint.load_step = 2, or checkpoint.fallback = true" in error
    assert "(damaged as well: 3)" in error and read_status(run)["exit_code"] == 2
    assert {path: path.read_bytes() for path in (run / "checkpoint").rglob("*") if path.is_file()} == before

    assert train(arguments(run, **keys, checkpoint__fallback=True)) == 0
    said = capsys.readouterr().out
    assert "__0_0.distcp has 1000 bytes" in said and "__0_0.distcp has changed" in said
    assert f"resumed from {run / 'checkpoint/step-2'}" in said
    assert_as_if_nothing_had_been(run, whole)
    assert names(run) == ["step-1", "step-2", "step-3", "step-3.aside", "step-4", "step-4.aside"]
    for path, content in before.items():
        step, name = path.parent.name, path.name
        damaged = step in ("step-3", "step-4")
        assert (run / "checkpoint" / (f"{step}.aside" if damaged else step) / name).read_bytes() == content


# ------------------------------------------------------------------------------- every method, and what does not fit

RECIPES = {"dfsft": causal_recipe, "dmd2": dmd2_recipe, "self_forcing": self_forcing_recipe}


@pytest.mark.slow
@pytest.mark.parametrize("method", RECIPES)
def test_each_method_goes_on_where_it_was(cache, tmp_path, method):
    """Fault 2; knowledge distillation and adapters have tests of their own. Two roles go on with whose turn it is, and with
    the number of their updates."""
    recipe = RECIPES[method](tmp_path, **({} if method == "dfsft" else {"student_update_interval": 2}))
    keys = {"job__config_file": recipe, "training__global_batch_size": 2, "data__pipeline": "tiny-wan"}
    keys = small_arguments(cache, tmp_path / "whole", training__steps=STEPS, checkpoint__interval=2, **keys)
    assert train(keys) == 0
    keys[keys.index(str(tmp_path / "whole"))] = str(tmp_path / "run")
    killed = launch(1, keys, tmp_path / "out", watcher=break_run, faults="kill step step=4")
    assert killed == [-signal.SIGKILL] and names(tmp_path / "run") == ["step-2"], output(tmp_path / "out")
    assert train(keys) == 0
    assert_as_if_nothing_had_been(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"models.student.flavor": "tiny", "models.student.init_from": "tiny-wan"},
            "the optimizer trains other parameters",
        ),
        (
            {"models.student.lora.rank": 4, "checkpoint__allow_changed": "models.student.lora.rank"},
            "the checkpoint lacks identity.student; it holds ",
        ),
    ],
    ids=["another network", "adapters"],
)
def test_what_does_not_fit_is_listed(arguments, tmp_path, whole, monkeypatch, capsys, keys, message):
    """Fault 35. By name, before anything is loaded."""
    monkeypatch.setattr(FineTuneMethod, "single_train_step", None)
    source = whole / "checkpoint/step-2"
    assert train(arguments(tmp_path / "run", checkpoint__initial_load_path=source, **keys)) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert f"cannot load {source}" in error and message in error and len(error) < 6000


# ------------------------------------------------------------------------------------------ folders and clocks


@pytest.mark.parametrize("where", ["run", "run/checkpoint"])
def test_a_read_only_folder_is_told_before_any_work(arguments, tmp_path, mount, monkeypatch, capsys, where):
    """Fault 36."""
    mount(tmp_path / where, "ro")
    monkeypatch.setattr(FineTuneMethod, "single_train_step", None)
    assert train(arguments(tmp_path / "run")) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert "job.dump_folder" in error and str(tmp_path / where) in error and "Read-only file system" in error


@pytest.mark.parametrize("where", ["run", "run/checkpoint"])
def test_a_file_where_a_folder_should_be(arguments, tmp_path, monkeypatch, capsys, where):
    """Fault 36."""
    (tmp_path / where).parent.mkdir(exist_ok=True)
    (tmp_path / where).write_text("mine")
    monkeypatch.setattr(FineTuneMethod, "single_train_step", None)
    assert train(arguments(tmp_path / "run")) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert "job.dump_folder" in error and str(tmp_path / where) in error and "File exists" in error
    assert (tmp_path / where).read_text() == "mine"


def test_any_path_will_do(arguments, tmp_path, whole):
    """Fault 36. Spaces, other scripts, a line break, links."""
    (tmp_path / "there").mkdir()
    run = tmp_path / "a link"
    run.symlink_to(tmp_path / "there", target_is_directory=True)
    run = run / "запуск 训练 é [1] {x} %s\n'\"#"
    assert train(arguments(run, training__steps=2)) == 0
    (run / "checkpoint").rename(tmp_path / "elsewhere")
    (run / "checkpoint").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert train(arguments(run)) == 0
    assert_as_if_nothing_had_been(run, whole)
    assert names(run) == ["step-2", "step-3", "step-4"]  # the one it was resumed from is known by any name


def test_a_clock_that_stands_still_or_goes_back(arguments, tmp_path, whole, monkeypatch):
    """Fault 37. Runs that start in the same second, or before the one they go on from."""
    run, now = tmp_path / "run", time.time()
    tensorboard = {"metrics__enable_tensorboard": True}
    for steps, clock in ((1, now), (2, now), (3, now - 86400), (STEPS, now)):
        monkeypatch.setattr(time, "time", lambda clock=clock: clock)
        monkeypatch.setattr(time, "gmtime", lambda *_, clock=clock, of=time.gmtime: of(clock))
        assert train(arguments(run, training__steps=steps, **tensorboard)) == 0
    assert_as_if_nothing_had_been(run, whole)
    assert len(list((run / "tensorboard").iterdir())) == 4
    assert names(run) == ["step-3", "step-4"]
