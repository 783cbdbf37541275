"""What comes from outside and is damaged, missing, hostile or late: one clear error that names it, in bounded time."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fvtitan import preprocess
from fvtitan.components import faults
from fvtitan.components.metrics import read_metrics
from fvtitan.components.stops import read_status
from fvtitan.data import moving_shapes
from fvtitan.data.dataloader import BatchStream
from fvtitan.data.latent_cache import LatentCache, read_jsonl, shard_bytes
from fvtitan.data.video import VideoLimits
from fvtitan.errors import UserError
from tests.helpers import make_cache, one_layer, small_arguments, train
from tests.integration.exact_worker import launch, output

SHARD = "shard-00000.safetensors"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("data") / "cache", 10)


@pytest.fixture
def arm(monkeypatch):
    """Faults for what is read in this process or a worker of it, and for a run that is started in it."""

    def armed(text: str) -> None:
        environment = {"FVTITAN_TEST": "1", "FVTITAN_FAULTS": text}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        faults.arm(environment)

    yield armed
    faults.arm({})


def arguments_of(cache: Path, folder: Path, **keys: Any) -> list[str]:
    keys = {**one_layer(cache.parent), "training__steps": 2, "ema__enable": False, **keys}
    return small_arguments(cache, folder, **keys)


def one_line_error(capsys: pytest.CaptureFixture) -> str:
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error, error
    return error


def spoil(cache: Path, index: int, value: float) -> None:
    """A value in the latents of a sample; size and header of the shard stay."""
    tensors = load_file(cache / SHARD)
    tensors[f"latents.{index:05d}"].view(-1)[3] = value
    (cache / SHARD).write_bytes(shard_bytes(SHARD, tensors))


# ------------------------------------------------------------------------------------------------------ samples


@pytest.mark.parametrize(("workers", "value"), [(0, float("nan")), (1, float("inf"))])
def test_a_latent_that_is_not_finite_ends_the_run_with_its_name(cache, tmp_path, capsys, workers, value):
    """Fault 29. Nothing is put in its place: the order of the others stays a function of the seed."""
    damaged = shutil.copytree(cache, tmp_path / "damaged")
    spoil(damaged, 7, value)
    keys = {"training__steps": 20, "training__global_batch_size": 10, "data__num_workers": workers}
    assert train(arguments_of(damaged, tmp_path / "run", **keys)) == 2
    error = one_line_error(capsys)
    assert f"{damaged / SHARD}: latents of sample '7.mp4' hold NaN or Inf" in error and "fvtitan.preprocess" in error
    status = read_status(tmp_path / "run")
    assert (status["state"], status["exit_code"]) == ("failed", 2) and "'7.mp4'" in status["reason"]


def truncated(cache: Path) -> None:
    (cache / SHARD).write_bytes((cache / SHARD).read_bytes()[:-10])


def reshaped(cache: Path) -> None:
    tensors = load_file(cache / SHARD) | {"latents.00004": torch.zeros(3, 16, 2, 8).bfloat16()}
    (cache / SHARD).write_bytes(shard_bytes(SHARD, tensors))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, r"shard-00000.safetensors has \d+ bytes, the manifest says \d+"),
        (reshaped, r"sample '4.mp4' is BF16 \[3, 16, 2, 8\], samples.jsonl says BF16 \[3, 16, 4, 4\]"),
    ],
)
def test_a_damaged_shard_ends_the_run_before_its_first_step(cache, tmp_path, capsys, damage, message):
    """Fault 29."""
    copy = shutil.copytree(cache, tmp_path / "damaged")
    damage(copy)
    assert train(arguments_of(copy, tmp_path / "run")) == 2
    assert pytest.raises(UserError, LatentCache, copy).match(message)
    assert str(pytest.raises(UserError, LatentCache, copy).value) in one_line_error(capsys)
    assert not (tmp_path / "run/metrics.jsonl").exists()


# ------------------------------------------------------------------------------------------------------- videos


@pytest.mark.parametrize(
    ("name", "reason"), [("hangs", "(--max-read-seconds): hangs, or slow"), ("crashes", "(status -9)")]
)
def test_a_file_that_hangs_or_crashes_its_decoder_is_skipped_by_name(tmp_path, monkeypatch, name, reason):
    """Fault 28. The others are read; more than --max-bad-fraction of such files is an error."""
    videos, read = tmp_path / "videos", preprocess.read_video
    moving_shapes.render_dataset(videos, 4, num_frames=5, height=32, width=32)
    victim = sorted(videos.rglob("*.mp4"))[1]

    def bad(path: Path, **options: Any) -> torch.Tensor:
        while path == victim and name == "hangs":
            time.sleep(1)
        if path == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(path, **options)

    monkeypatch.setattr(preprocess, "read_video", bad)
    size = {"width": 32, "height": 32, "num_frames": 5, "limits": VideoLimits(max_read_seconds=2)}
    config = preprocess.PreprocessConfig(str(videos), "tiny-wan", str(tmp_path / "c"), max_bad_fraction=0.25, **size)
    preprocess.preprocess(config)
    assert len(LatentCache(tmp_path / "c")) == 3
    skipped = {line["file"]: line["reason"] for line in read_jsonl(tmp_path / "c/skipped.jsonl")}
    assert skipped[victim.relative_to(videos).as_posix()].endswith(reason)
    assert multiprocessing.active_children() == []
    if name == "hangs":
        return
    strict = dataclasses.replace(config, output=str(tmp_path / "strict"), max_bad_fraction=0.2)
    with pytest.raises(
        UserError, match="1 of 4 files cannot be used, more than --max-bad-fraction 0.2: .*the first: .*mp4: "
    ):
        preprocess.preprocess(strict)


# ------------------------------------------------------------------------------------------------------- loader


def streamed(cache: Path, **keys: Any) -> BatchStream:
    return BatchStream(LatentCache(cache), global_batch_size=2, local_batch_size=2, seed=0, num_workers=1, **keys)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("kill", "a worker of the loader died (exit status -9) while it read sample '{}'"),
        ("exit", "a worker of the loader died (exit status 13) while it read sample '{}'"),
        ("raise", "sample '{}' cannot be read: RuntimeError: FVTITAN_FAULTS at loader"),
        ("hang", "a worker of the loader took more than 2 s (half of comm.timeout_seconds) to read sample '{}'"),
    ],
)
def test_a_worker_that_fails_names_the_sample_when_its_batch_is_due(cache, arm, kind, message):
    """Fault 32. Never in the middle of what the process does meanwhile. Batches before it come as ever, but for those that a
    dead worker takes along."""
    healthy = streamed(cache)
    order = [next(healthy)["sample_ids"] for _ in range(4)]
    healthy.close()
    victim = order[3][0]
    arm(f"{kind} loader step={victim.removesuffix('.mp4')} times=0")
    stream = streamed(cache, timeout_seconds=2)
    assert [next(stream)["sample_ids"] for _ in range(2)] == order[:2]
    workers = multiprocessing.active_children()
    if kind in ("kill", "exit"):
        ended(workers)  # and nothing is raised here
    start = time.monotonic()
    taken: list[list[str]] = []
    with pytest.raises(RuntimeError) as error:
        while True:
            taken.append(next(stream)["sample_ids"])
    assert str(error.value).startswith(message.format(victim))
    assert time.monotonic() - start < 10 and taken in ([], order[2:3])
    stream.close()
    ended(workers)


def ended(workers: list[Any]) -> None:
    end = time.monotonic() + 60
    while any(worker.is_alive() for worker in workers):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_slow_worker_is_waited_for(cache, monkeypatch):
    """Fault 32. Longer than the loader looks after its workers, not as long as the limit."""
    read = LatentCache.__getitem__
    monkeypatch.setattr(LatentCache, "__getitem__", lambda self, index: time.sleep(0.7) or read(self, index))
    stream = streamed(cache, timeout_seconds=60)
    slow = next(stream)["sample_ids"]
    stream.close()
    monkeypatch.undo()
    healthy = streamed(cache)
    assert next(healthy)["sample_ids"] == slow
    healthy.close()


def test_a_run_whose_worker_dies_says_so_in_its_status(cache, tmp_path, arm):
    """Fault 32."""
    arm("kill loader step=3")
    with pytest.raises(RuntimeError, match=r"died \(exit status -9\) while it read sample '3.mp4'"):
        train(arguments_of(cache, tmp_path / "run", training__steps=20, data__num_workers=2))
    status = read_status(tmp_path / "run")
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert status["reason"].endswith("while it read sample '3.mp4'")


def with_faults(folder: Path, *, text: str) -> None:
    os.environ.update({"FVTITAN_TEST": "1", "FVTITAN_FAULTS": text})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kill", "hang", "raise"])
def test_a_loader_that_fails_on_one_rank_ends_all(cache, tmp_path, kind):
    """Fault 32. The rank says which sample it was before the other one gives up."""
    keys = {"training__steps": 50, "data__num_workers": 1, "comm__timeout_seconds": 20}
    watcher = {"watcher": with_faults, "text": f"{kind} loader step=3 rank=1"}
    exits = launch(2, arguments_of(cache, tmp_path, **keys), tmp_path / "log", **watcher)
    assert all(status not in (0, None) for status in exits), (exits, output(tmp_path / "log"))
    assert "sample '3.mp4'" in output(tmp_path / "log")
    assert read_status(tmp_path)["state"] == "failed"


# ----------------------------------------------------------------------------------------------------- data sets


def test_an_empty_data_set_does_not_start(cache, tmp_path, capsys):
    """Fault 31."""
    empty = shutil.copytree(cache, tmp_path / "empty")
    (empty / "samples.jsonl").write_text("")
    assert train(arguments_of(empty, tmp_path / "run")) == 2
    assert f"the cache {empty} has no samples; {empty / 'skipped.jsonl'} says why" in one_line_error(capsys)


def test_a_data_set_smaller_than_a_batch_is_repeated(tmp_path):
    """Fault 31. One sample, four in a batch: one epoch in four has a batch, and each is the sample four times."""
    one = make_cache(tmp_path / "one", 1)
    assert train(arguments_of(one, tmp_path / "run", training__global_batch_size=4)) == 0
    assert [row["step"] for row in read_metrics(tmp_path / "run/metrics.jsonl")] == [1, 2]


def test_other_data_is_refused_on_resume(cache, tmp_path, capsys):
    """Fault 33."""
    assert train(arguments_of(cache, tmp_path / "run", training__steps=1)) == 0
    other = make_cache(tmp_path / "other", 11)
    capsys.readouterr()
    assert train(arguments_of(other, tmp_path / "run")) == 2
    error = one_line_error(capsys)
    assert "data.path: the checkpoint was made with fingerprint" in error and "checkpoint.allow_changed" in error
    assert [row["step"] for row in read_metrics(tmp_path / "run/metrics.jsonl")] == [1]


def test_a_resume_that_is_required_needs_a_checkpoint(cache, tmp_path, capsys):
    """Fault 34. Not required, a fresh start says that it is one."""
    assert train(arguments_of(cache, tmp_path / "run", checkpoint__require_resume=True)) == 2
    assert "checkpoint.require_resume = true, but there is no checkpoint in" in one_line_error(capsys)
    assert train(arguments_of(cache, tmp_path / "run", training__steps=1)) == 0
    assert "no checkpoint to resume from: a fresh start" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------- dump folders


def test_a_dump_folder_may_have_any_name_and_lie_behind_a_link(cache, tmp_path, capsys):
    """Fault 36."""
    odd = tmp_path / "a run, ünïcode — 日本 'quoted' [1] {x} $HOME %s"
    odd.mkdir()
    (tmp_path / "link").symlink_to(odd)
    assert train(arguments_of(cache, odd, training__steps=1)) == 0
    assert train(arguments_of(cache, tmp_path / "link")) == 0
    assert "resumed from" in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(odd / "metrics.jsonl")] == [1, 2]


def a_file(folder: Path) -> Path:
    (folder / "run").write_text("mine")
    return folder / "run"


def below_a_file(folder: Path) -> Path:
    return a_file(folder) / "deeper"


def a_dead_link(folder: Path) -> Path:
    (folder / "run").symlink_to(folder / "nowhere" / "deep")
    return folder / "run"


def read_only(folder: Path) -> Path:
    return Path("/proc/fvtitan-run")  # also root can make nothing there


def too_long(folder: Path) -> Path:
    return folder / ("n" * 300)


@pytest.mark.parametrize("kind", [a_file, below_a_file, a_dead_link, read_only, too_long])
def test_a_dump_folder_that_cannot_be_one_is_named(cache, tmp_path, capsys, kind):
    """Fault 36."""
    folder = kind(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert train(arguments_of(cache, folder)) == 2
    assert f"job.dump_folder = {str(folder)!r} cannot be used: " in one_line_error(capsys)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_dump_folder_is_named(cache, tmp_path, capsys):
    """Fault 36."""
    (tmp_path / "run").mkdir(mode=0o555)
    assert train(arguments_of(cache, tmp_path / "run")) == 2
    assert "cannot be used: Permission denied" in one_line_error(capsys)


def test_manifest_of_a_cache_that_is_no_list_of_files(cache, tmp_path, capsys):
    """Fault 29."""
    damaged = shutil.copytree(cache, tmp_path / "damaged")
    manifest = json.loads((damaged / "manifest.json").read_text())
    (damaged / "manifest.json").write_text(json.dumps(manifest | {"shards": [SHARD]}))
    assert train(arguments_of(damaged, tmp_path / "run")) == 2
    assert "manifest.json" in one_line_error(capsys)
