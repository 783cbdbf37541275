"""Caches of trajectories with real files, teachers and processes; the runs that learn from them, and what they hand over."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import weakref
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save

from fvtitan import trajectories
from fvtitan.components.checkpoint import Checkpointer
from fvtitan.config import load_config
from fvtitan.data.latent_cache import LatentCache
from fvtitan.data.trajectory_cache import TrajectoryCache, TrajectoryFolder
from fvtitan.distributed.mesh import Mesh
from fvtitan.distributed.utils import local_tensor, only_job
from fvtitan.errors import UserError, cli
from fvtitan.methods.kd import KDMethod
from fvtitan.models import build_roles
from fvtitan.models.base import ModelBase
from fvtitan.models.wan import model as wan_model
from fvtitan.models.wan import weights
from fvtitan.models.wan.transformer import WanConfig
from tests.helpers import (
    dmd2_recipe,
    kd_recipe,
    make_cache,
    random_transformer,
    read_checkpoint,
    small_arguments,
    stopping,
    train,
)
from tests.integration.exact_worker import forkserver
from tests.integration.exact_worker import launch as launch_training
from tests.integration.test_train import assert_same_checkpoint, training_values

SIZES = WanConfig(num_layers=2, num_heads=4, head_dim=32, ffn_dim=192, text_dim=64, text_len=32, freq_dim=64)
TOTAL = 70  # two shards: 64 and 6


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("data") / "cache", num_samples=10)


def pipeline_of(folder: Path, sizes: WanConfig = SIZES, seed: int = 0) -> Path:
    """A pipeline's transformer with random weights."""
    weights.save_transformer(random_transformer(sizes, seed=seed).state_dict(), sizes, folder / "transformer")
    (folder / "fvtitan.json").write_text(json.dumps({"text_len": sizes.text_len}))
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return pipeline_of(tmp_path_factory.mktemp("start"))


class Runs:
    """Command lines of kd runs from the weights of `start` on `prompts`."""

    def __init__(self, start: Path, prompts: Path):
        self.start, self.prompts = start, prompts

    def __call__(self, folder: Path, models: dict | None = None, overrides: dict | None = None, **method) -> list[str]:
        roles = {role: {"init_from": str(self.start)} for role in ("student", "teacher")}
        for role, keys in (models or {}).items():
            roles[role] = None if keys is None else {**roles.get(role, {}), **keys}
        recipe = kd_recipe(folder / "recipe", roles, **{"num_trajectories": TOTAL, **method})
        kept = recipe.with_name(f"{len(list(recipe.parent.iterdir()))}.toml")
        recipe.rename(kept)  # the next recipe in this folder is another file
        keys = {"job__config_file": kept, "training__local_batch_size": 8, **(overrides or {})}
        return small_arguments(self.prompts, folder / "run", **keys)


@pytest.fixture(scope="module")
def runs(start, prompts):
    return Runs(start, prompts)


def make(arguments: list[str]) -> Path:
    """`python -m fvtitan.trajectories` in this process; its cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["trajectories.py", *arguments])
        trajectories.main()
    return Path(load_config(arguments).method.teacher_path_cache)


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory):
    """A complete cache, made by one process."""
    return make(runs(tmp_path_factory.mktemp("whole")))


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """`000000.states`, `000000.x0` and so on."""
    return {name: t for path in sorted(folder.glob("shard-*")) for name, t in load_file(path).items()}


@contextlib.contextmanager
def spied():
    """The samples that are written meanwhile, and the roles that are built."""
    written, built = [], []
    with pytest.MonkeyPatch.context() as patch:
        write, build = TrajectoryFolder.write_sample, wan_model.build_transformer
        patch.setattr(TrajectoryFolder, "write_sample", lambda self, i, *t: written.append(i) or write(self, i, *t))
        patch.setattr(wan_model, "build_transformer", lambda cfg, role, *a: built.append(role) or build(cfg, role, *a))
        yield written, built


# ------------------------------------------------------------------------------------------------- what it holds


def test_a_cache_holds_what_it_should(whole, prompts):
    assert sorted(content(whole)) == [
        "contract.json",
        "manifest.json",
        "shard-00000.safetensors",
        "shard-00001.safetensors",
    ]
    tensors = tensors_of(whole)
    assert sorted(tensors) == sorted(f"{i:06d}.{key}" for i in range(TOTAL) for key in ("states", "x0"))
    for i in range(TOTAL):
        states, x0 = tensors[f"{i:06d}.states"], tensors[f"{i:06d}.x0"]
        assert states.shape == (2, 3, 16, 4, 4) and x0.shape == (3, 16, 4, 4) and states.dtype == x0.dtype
        assert states.dtype == torch.bfloat16 and (states[1].float() - x0.float()).abs().max() > 0.1
    first = torch.stack([tensors[f"{i:06d}.states"][0] for i in range(TOTAL)]).float()
    assert abs(float(first.mean())) < 0.01 and float(first.std()) == pytest.approx(1, abs=0.01)  # pure noise
    assert len({noise.numpy().tobytes() for noise in first}) == TOTAL
    contract = json.loads((whole / "contract.json").read_text())
    assert contract["timesteps"] == [1000.0, 750.0] and contract["shift"] == 3.0 and contract["teacher"]
    assert contract["prompts"] == LatentCache(prompts).fingerprint


def test_one_job_at_a_time_makes_a_cache(runs, tmp_path):
    arguments = runs(tmp_path)
    cache = Path(load_config(arguments).method.teacher_path_cache)
    with (
        only_job(cache),
        pytest.raises(UserError, match="is being made by pid .*: when that is done, the same command"),
    ):
        make(arguments)
    assert not list(cache.glob("*.safetensors"))


def test_the_size_of_a_sample(tmp_path):
    """At Wan's 480p and 81 frames with 4 states, the text at its true length of 300 tokens: at most 0.022 GiB."""
    contract = {"timesteps": [1000.0, 750.0, 500.0, 250.0], "shape": [21, 16, 60, 104], "dtype": "bfloat16"}
    folder = TrajectoryFolder(tmp_path, contract)
    folder.begin()
    folder.write_sample(0, torch.zeros(4, 21, 16, 60, 104), torch.zeros(21, 16, 60, 104))
    text = len(save({"text": torch.zeros(300, 4096, dtype=torch.bfloat16)}))
    alone = folder.sample_path(0).stat().st_size
    folder.pack("shard-00000.safetensors", range(1))
    packed = (tmp_path / "shard-00000.safetensors").stat().st_size
    for size in (alone, packed):
        assert 5 * 2 * 21 * 16 * 60 * 104 < size and (size + text) / 2**30 <= 0.022
    assert folder.shard_samples == 51  # shards of a GiB
    whole = TrajectoryFolder(tmp_path / "whole", contract | {"timesteps": [0.0] * 48})
    assert whole.shard_samples == 5


# ----------------------------------------------------------------------- processes, and how they end


def worker(environment: dict[str, str], log: Path, kill: tuple[str, str, int] | None, arguments: list[str]) -> None:
    """A rank of `fvtitan.trajectories` that kills itself before the n-th file operation of a kind ("" is fsync or replace) on
    a path with a word in it."""
    os.environ.update(environment)
    with open(log, "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    seen = 0

    def watched(name, exact, where):
        kinds = (name,) if name == "unlink" else ("", name)

        def operation(*given, **keys):
            nonlocal seen
            path = os.readlink(f"/proc/self/fd/{given[0]}") if name == "fsync" else str(given[where])
            if kill and kill[0] in kinds and kill[1] in path:
                seen += 1
                if seen == kill[2]:
                    os.kill(os.getpid(), signal.SIGKILL)
            return exact(*given, **keys)

        return operation

    os.fsync, os.replace = watched("fsync", os.fsync, 0), watched("replace", os.replace, 1)
    os.unlink = watched("unlink", os.unlink, 0)
    sys.argv = ["trajectories.py", *arguments]
    cli(trajectories.main)


def launch(arguments: list[str], folder: Path, ranks: int = 1, kill: tuple[str, str, int] | None = None) -> list[int]:
    """`fvtitan.trajectories` in processes of its own; their exit statuses. `kill` is the last rank's; then all die."""
    folder.mkdir(parents=True, exist_ok=True)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's agent holds one
    shared = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    processes = []
    for rank in range(ranks):
        here = {key: str(value) for key, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
        given = (here, folder / f"rank{rank}.log", kill if rank == ranks - 1 else None, arguments)
        processes.append(forkserver.Process(target=worker, args=given))
        processes[-1].start()
    try:
        running = {process.sentinel: process for process in processes}
        while running:
            for sentinel in wait(list(running), timeout=300):
                if running.pop(sentinel).exitcode:
                    return [process.exitcode for process in processes]
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def test_two_ranks_make_the_same_cache(runs, whole, tmp_path):
    status = launch(runs(tmp_path), tmp_path / "logs", ranks=2)
    said = (tmp_path / "logs/rank0.log").read_text()
    assert status == [0, 0], said
    assert content(tmp_path / "recipe/trajectories") == content(whole)
    assert "trajectories: 38/38 samples of this rank, 0s left" in said


@pytest.mark.faults
@pytest.mark.parametrize(
    ("ranks", "kills"),
    [(1, 2), pytest.param(1, 5, marks=pytest.mark.slow), pytest.param(2, 5, marks=pytest.mark.slow)],
)
def test_killed_at_random_moments(runs, whole, tmp_path, ranks, kills):
    """Fault 43. The cache is the same, and what was written before a kill is not made again."""
    draws, arguments, path = random.Random(10 * ranks + kills), runs(tmp_path), tmp_path / "recipe/trajectories"
    kept: dict[Path, int] = {}
    for attempt in range(kills):
        left = (TOTAL - len(kept)) // ranks**2  # no rank has fewer
        moment = draws.randrange(1, 3 * left // (kills - attempt) - 2)  # of the three operations that a sample takes
        status = launch(arguments, tmp_path / "logs", ranks, ("", "samples", moment))
        assert -signal.SIGKILL in status, (tmp_path / "logs/rank0.log").read_text()
        assert not (path / "manifest.json").exists()
        files = {file: file.stat().st_mtime_ns for file in (path / "samples").glob("[0-9]*")}
        assert kept.items() <= files.items() and len(files) < TOTAL
        kept = files
    assert kept
    with spied() as (written, _):
        make(arguments)
    assert content(path) == content(whole)
    assert sorted(written) == sorted(set(range(TOTAL)) - {int(file.stem) for file in kept})


@pytest.mark.faults
@pytest.mark.parametrize(
    "kill",
    [
        ("replace", "shard-00000", 1),
        ("replace", "manifest.json", 1),
        pytest.param(("fsync", "shard-00001", 1), marks=pytest.mark.slow),
        ("replace", "contract.json", 1),
    ],
    ids=lambda kill: f"{kill[1]}",
)
def test_killed_while_packing(runs, whole, tmp_path, kill):
    """Fault 43. Nothing is made again but what was not yet there."""
    arguments, path = runs(tmp_path), tmp_path / "recipe/trajectories"
    assert launch(arguments, tmp_path / "logs", kill=kill) == [-signal.SIGKILL]
    assert not (path / "manifest.json").exists()
    with spied() as (written, _):
        make(arguments)
    assert content(path) == content(whole) and written == (list(range(TOTAL)) if "contract" in kill[1] else [])


@pytest.mark.faults
def test_killed_while_packed_samples_are_removed(runs, whole, tmp_path):
    """Fault 43. They are not made again, and the rest of their own files go."""
    arguments, path = runs(tmp_path), tmp_path / "recipe/trajectories"
    assert launch(arguments, tmp_path / "logs", kill=("unlink", "samples/0", 5)) == [-signal.SIGKILL]
    assert len(list((path / "samples").iterdir())) == TOTAL - 4 and not (path / "manifest.json").exists()
    with spied() as (written, _):
        make(arguments)
    assert written == []
    assert content(path) == content(whole) and not (path / "samples").exists()


# --------------------------------------------------------------------------------- damage, growth, and what is refused


@pytest.mark.faults
def test_a_sample_that_is_not_finite_is_not_written(runs, start, tmp_path, monkeypatch):
    """Fault 29."""

    def overflows(cfg, teacher, prompts, indices, shape):
        states = torch.zeros(len(indices), 2, *shape)
        states[2, 0, 0] = float("nan")
        return states, torch.zeros(len(indices), *shape)

    monkeypatch.setattr(trajectories, "make_trajectories", overflows)
    with pytest.raises(
        UserError, match=rf": sample 2 \(.*\): the teacher {start} gives NaN or Inf, which is not written"
    ):
        make(runs(tmp_path, num_trajectories=8))
    assert sorted(content(tmp_path / "recipe/trajectories/samples")) == ["000000.safetensors", "000001.safetensors"]


class Interrupted(Exception):
    """In place of a kill, in this process."""


def interrupted(arguments: list[str], after: int) -> Path:
    """A cache of which `after` samples were written."""
    write, count = TrajectoryFolder.write_sample, iter(range(after + 1))

    def stops(self, *given):
        if next(count) == after:
            raise Interrupted
        write(self, *given)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(TrajectoryFolder, "write_sample", stops)
        make(arguments)
    return Path(load_config(arguments).method.teacher_path_cache)


@pytest.mark.faults
def test_samples_of_a_larger_cache_stay(runs, whole, tmp_path):
    """Fault 43. Another job makes more of them, or was killed while it did."""
    path = Path(shutil.copytree(whole, tmp_path / "recipe/trajectories"))
    more, packed = path / f"samples/{TOTAL:06d}.safetensors", path / "samples/000003.safetensors"
    more.parent.mkdir()
    for file in (more, packed):
        file.write_text("a trajectory")
    assert len(prepare(runs(tmp_path, {"teacher": None}))) == TOTAL
    assert more.exists()
    TrajectoryFolder(path, json.loads((path / "contract.json").read_text())).commit(TOTAL)
    assert more.exists() and not packed.exists()
    assert content(path).items() >= content(whole).items()


@pytest.mark.faults
def test_a_truncated_sample_is_made_again(runs, whole, tmp_path):
    """Fault 43."""
    arguments = runs(tmp_path)
    path = interrupted(arguments, 20)
    for index, size in ((3, -1), (11, 40), (17, 0)):
        file = path / f"samples/{index:06d}.safetensors"
        file.write_bytes(file.read_bytes()[:size])
    with spied() as (written, _):
        make(arguments)
    assert sorted(written) == [3, 11, 17, *range(20, TOTAL)] and content(path) == content(whole)


@pytest.mark.faults
@pytest.mark.parametrize(("shard", "lost"), [("shard-00000", range(64)), ("shard-00001", range(64, 70))])
@pytest.mark.parametrize("size", [None, 40, -1])
def test_a_truncated_shard_is_made_again(runs, whole, tmp_path, shard, lost, size):
    """Fault 43."""
    path = shutil.copytree(whole, tmp_path / "recipe/trajectories")
    file = path / f"{shard}.safetensors"
    file.write_bytes(file.read_bytes()[:size]) if size else file.unlink()
    if size == -1 or lost != range(64):  # without the teacher, and before anything else is done
        with pytest.raises(
            UserError, match=rf"holds {TOTAL - len(lost)} of num_trajectories = {TOTAL}: add a \[models.te"
        ):
            prepare(runs(tmp_path, {"teacher": None}))
    if lost != range(64) or size == 40:
        with spied() as (written, _):
            make(runs(tmp_path))
        assert written == list(lost) and content(path) == content(whole)


def prepare(arguments: list[str]) -> TrajectoryCache:
    """As `on_train_start` of a run that has not built a teacher."""
    cfg = load_config(arguments)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        data = LatentCache(cfg.data.path, prompts_only=True)
        return trajectories.prepare_trajectories(cfg, None, data, SIZES.in_channels)
    finally:
        dist.destroy_process_group()


def test_an_incomplete_cache_without_a_teacher_fails_at_the_start(runs, tmp_path, capsys):
    interrupted(runs(tmp_path), 20)
    capsys.readouterr()
    assert train(runs(tmp_path, {"teacher": None})) == 2
    output = capsys.readouterr()
    assert len(output.err.splitlines()) == 1 and "holds 20 of num_trajectories = 70" in output.err
    assert "add a [models.teacher] to make the rest, or lower num_trajectories" in output.err
    assert not (tmp_path / "run/metrics.jsonl").exists() and "step 1/" not in output.out
    for missing in (20, 21):  # whole samples, but no shards: enough for 20
        arguments = runs(tmp_path, {"teacher": None}, num_trajectories=missing)
        if missing == 21:
            with pytest.raises(UserError, match="holds 20 of num_trajectories = 21"):
                prepare(arguments)
        else:
            assert len(prepare(arguments)) == 20
    with pytest.raises(UserError, match="'.*/nowhere' holds 0 of num_trajectories = 70"):
        prepare(runs(tmp_path, {"teacher": None}, teacher_path_cache=str(tmp_path / "nowhere")))
    assert not (tmp_path / "nowhere").exists()


def test_a_cache_grows_and_is_read_in_part(runs, whole, tmp_path):
    """Growing keeps what is there; fewer trajectories are the first of them. Neither depends on when the rest was made."""
    path = make(runs(tmp_path, num_trajectories=20))
    few = tensors_of(path)
    assert len(few) == 40 and all(torch.equal(tensor, tensors_of(whole)[name]) for name, tensor in few.items())
    with spied() as (written, _):
        make(runs(tmp_path))
    assert sorted(written) == list(range(20, TOTAL)) and content(path) == content(whole)
    before = content(path)
    with spied() as (written, _):
        cache = prepare(runs(tmp_path, num_trajectories=33))
        make(runs(tmp_path, num_trajectories=33))
    assert written == [] and content(path) == before and len(cache) == 33 and cache.bucket_indices == [range(33)]
    assert torch.equal(cache[32]["latents"], few["000000.x0"] * 0 + tensors_of(whole)["000032.x0"])


def test_a_complete_cache_builds_no_teacher(runs, whole, capsys, tmp_path):
    shutil.copytree(whole, tmp_path / "recipe/trajectories")
    assert train(runs(tmp_path, overrides={"training__steps": 1})) == 0
    output = capsys.readouterr().out
    assert "student: wan, " in output and "teacher: " not in output and "trajectories: " not in output
    assert train(runs(tmp_path, num_trajectories=71, overrides={"job__dump_folder": tmp_path / "more"})) == 0
    output = capsys.readouterr().out
    assert "teacher: wan, " in output and "trajectories: 1/1 samples, 0s left" in output


def test_the_teacher_leaves_memory_after_the_fill(runs, tmp_path, monkeypatch):
    """Before the first step, of itself: train.py has switched the garbage collector off."""
    alive, prepared, step_of = [], trajectories.prepare_trajectories, KDMethod.single_train_step

    def prepares(cfg, teacher, *given):
        alive.extend(weakref.ref(held) for held in (teacher, teacher.transformer, *teacher.transformer.parameters()))
        return prepared(cfg, teacher, *given)

    def first(self, *given):
        assert len(alive) > 20 and [held() for held in alive if held() is not None] == []
        return step_of(self, *given)

    monkeypatch.setattr(trajectories, "prepare_trajectories", prepares)
    monkeypatch.setattr(KDMethod, "single_train_step", first)
    assert train(runs(tmp_path, num_trajectories=8, overrides={"training__steps": 1})) == 0


@pytest.fixture(scope="module")
def other_start(tmp_path_factory):
    return pipeline_of(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="module")
def other_prompts(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("data") / "other", num_samples=10, seed=1)


@pytest.mark.parametrize(
    ("method", "overrides", "message"),
    [
        ({}, {"schedule__shift": 5.0}, "shift is 3.0 there and 5.0 in this run"),
        ({"teacher_guidance_scale": 5.0}, {}, "teacher_guidance_scale is 6.0 there and 5.0 in this run"),
        ({"teacher_inference_steps": 8}, {}, "teacher_inference_steps is 4 there and 8 in this run"),
        (
            {"student_sample_steps": 4},
            {},
            "timesteps is [1000.0, 750.0] there and [1000.0, 900.0, 750.0, 500.0] in this",
        ),
        ({"store_whole_trajectories": True}, {}, "timesteps is [1000.0, 750.0] there and"),
        ({"cache_dtype": "float32"}, {}, "dtype is 'bfloat16' there and 'float32' in this run"),
        ({}, {"data__num_frames": 5}, "shape is [3, 16, 4, 4] there and [2, 16, 4, 4] in this run"),
        ({}, {"data__width": 64}, "shape is [3, 16, 4, 4] there and [3, 16, 4, 8] in this run"),
        ({}, {"training__seed": 1}, "seed is 0 there and 1 in this run"),
        ({}, {"data__uncond_prompt": "negative"}, "uncond_prompt is 'empty' there and 'negative' in this run"),
        ({}, {"data__path": "other_prompts"}, "prompts is '"),
        ({}, {"models.teacher.init_from": "other_start"}, "teacher is '"),
        ({"name": "kd_causal", "teacher_forcing": True}, {}, "causal is None there and {'frames_per_block': 1"),
    ],
)
def test_another_contract_is_refused_by_name(runs, whole, tmp_path, request, method, overrides, message):
    found = {"other_prompts", "other_start"}
    overrides = {key: request.getfixturevalue(v) if v in found else v for key, v in overrides.items()}
    arguments = runs(tmp_path, overrides=overrides, teacher_path_cache=str(whole), **method)
    with pytest.raises(UserError) as error:
        prepare(arguments)
    assert f"method.teacher_path_cache = {str(whole)!r} was made under another contract: {message}" in str(error.value)
    assert str(error.value).endswith("; use another folder") and "\n" not in str(error.value)


def test_what_a_contract_does_not_hold(runs, whole, tmp_path):
    """Steps, batches and names are nobody's business; nor is the teacher when there is none."""
    overrides = {
        "training__steps": 9,
        "training__local_batch_size": 2,
        "optimizer__lr": 0.1,
        "data__caption_dropout": 0.9,
    }
    keys = {"teacher_path_cache": str(whole), "student_sample_type": "ode"}
    assert len(prepare(runs(tmp_path, overrides=overrides, **keys))) == TOTAL
    assert len(prepare(runs(tmp_path, {"teacher": None}, **keys))) == TOTAL


def test_a_folder_that_is_something_else(runs, tmp_path):
    path = tmp_path / "mine"
    path.mkdir()
    (path / "thesis.txt").write_text("x")
    arguments = runs(tmp_path, teacher_path_cache=str(path))
    with pytest.raises(UserError, match="mine' exists and is not a trajectory cache: use another"):
        prepare(arguments)
    (path / "contract.json").write_text("{")
    with pytest.raises(UserError, match="contract.json is damaged"):
        prepare(arguments)
    assert (path / "thesis.txt").exists()


def test_a_file_in_its_place(runs, tmp_path):
    path = tmp_path / "file"
    path.write_text("x")
    with pytest.raises(UserError, match="file' exists and is not a trajectory cache: use another"):
        prepare(runs(tmp_path, teacher_path_cache=str(path)))


def test_any_number_of_ranks_makes_trajectories(runs, tmp_path, monkeypatch):
    """A recipe as shipped, global batch 8 of 8 a rank, whatever torchrun's number of processes."""
    arguments = runs(tmp_path, num_trajectories=8, overrides={"training__global_batch_size": 8})
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        patch.setattr(sys, "argv", ["trajectories.py", *arguments])
        trajectories.main()


@pytest.mark.parametrize("method", ["finetune", "no teacher"])
def test_the_program_says_what_it_needs(runs, prompts, tmp_path, method):
    arguments = small_arguments(prompts, tmp_path) if method == "finetune" else runs(tmp_path, {"teacher": None})
    with pytest.raises(UserError, match="need a recipe of kd or kd_causal|there is no .models.teacher."):
        make(arguments)


# ------------------------------------------------------------------------------------ one cache for many students


def test_other_ladders_and_causal_students_read_whole_trajectories(runs, whole, tmp_path):
    """The same states as in a cache of these rungs alone, bitwise; the teacher rests."""
    keys = {"store_whole_trajectories": True, "num_trajectories": 8}
    path = make(runs(tmp_path, **keys))
    stored = tensors_of(path)
    assert stored["000000.states"].shape == (4, 3, 16, 4, 4)
    with spied() as (written, _):
        for method, rows in [
            ({"student_sample_steps": 2}, [0, 2]),
            ({"student_sample_steps": 4}, [0, 1, 2, 3]),
            ({"student_sample_steps": 1}, [0]),
            ({"student_sample_steps": 2, "t_list": [1000.0, 510.0, 0.0]}, [0, 3]),
            ({"name": "kd_causal"}, [0, 2]),
        ]:
            cache = prepare(runs(tmp_path, **keys, **method))
            for i in range(8):
                assert torch.equal(cache[i]["states"], stored[f"{i:06d}.states"][rows])
    assert written == [] and len(list(path.iterdir())) == 3
    rungs = tensors_of(whole)
    for i in range(8):
        assert torch.equal(stored[f"{i:06d}.states"][[0, 2]], rungs[f"{i:06d}.states"])
        assert torch.equal(stored[f"{i:06d}.x0"], rungs[f"{i:06d}.x0"])
    shared = prepare(runs(tmp_path, name="kd_causal", teacher_path_cache=str(whole)))
    assert torch.equal(shared[40]["states"], rungs["000040.states"])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_wider_caches_round_to_the_same(runs, whole, tmp_path, dtype):
    path = make(runs(tmp_path, cache_dtype=dtype, num_trajectories=8))
    wide, narrow = tensors_of(path), tensors_of(whole)
    assert {tensor.dtype for tensor in wide.values()} == {getattr(torch, dtype)}
    for name, tensor in wide.items():
        if dtype == "float32":
            assert torch.equal(tensor.bfloat16(), narrow[name])
        torch.testing.assert_close(tensor.float(), narrow[name].float(), rtol=2**-7, atol=1e-2)


# ------------------------------------------------------------------------------------------------------- training

KINDS = [{}, {"name": "kd_causal"}, {"name": "kd_causal", "teacher_forcing": True}]


@pytest.mark.faults
@pytest.mark.parametrize(
    "method",
    [pytest.param(kind, marks=pytest.mark.slow if i else []) for i, kind in enumerate(KINDS)],
    ids=["kd", "kd_causal", "teacher_forcing"],
)
def test_a_stopped_run_resumes_bit_for_bit(runs, tmp_path, method):
    """Fault 2. 4 steps of 4 samples over 10: the stop lies in the middle of an epoch, and the run crosses epochs."""
    keys = {
        "training__steps": 4,
        "checkpoint__interval": 2,
        "training__global_batch_size": 4,
        "training__local_batch_size": 2,
        "data__num_workers": 2 if not method else 0,
    }
    method = {"num_trajectories": 10, **method}
    assert train(runs(tmp_path, overrides=keys, **method)) == 0
    keys |= {"job__dump_folder": tmp_path / "stopped", "data__num_workers": 0}
    with stopping(KDMethod, 3):
        train(runs(tmp_path, overrides=keys, **method))
    assert Checkpointer(tmp_path / "stopped/checkpoint").steps() == [2]
    assert train(runs(tmp_path, overrides=keys, **method)) == 0
    assert_same_checkpoint(tmp_path / "run/checkpoint/step-4", tmp_path / "stopped/checkpoint/step-4")
    values = training_values(tmp_path / "run")
    assert [record["step"] for record in values] == [1, 2, 3, 4] and values[0]["loss/student"] > 0.01
    assert values == training_values(tmp_path / "stopped")


def test_a_run_resumes_without_its_teacher(runs, tmp_path):
    """A complete cache needs none: whether it is configured changes nothing of the data."""
    keys = {"training__steps": 2, "checkpoint__interval": 1}
    assert train(runs(tmp_path, overrides=keys, num_trajectories=8)) == 0
    shutil.rmtree(tmp_path / "run/checkpoint/step-2")
    assert train(runs(tmp_path, {"teacher": None}, overrides=keys, num_trajectories=8)) == 0
    assert Checkpointer(tmp_path / "run/checkpoint").steps() == [1, 2]


# ------------------------------------------------------------------------------------- what a run hands to the next


@pytest.fixture(scope="module")
def finetuned(start, prompts, tmp_path_factory):
    """A checkpoint of two steps of fine-tuning whose moving average is neither the first weights nor the last."""
    folder = tmp_path_factory.mktemp("finetuned")
    keys = {"models.student.flavor": "", "models.student.init_from": start, "training__steps": 2}
    keys |= {"ema__start_step": 0, "lr_scheduler__warmup_steps": 0, "checkpoint__interval": 2}
    assert train(small_arguments(prompts, folder, **keys)) == 0
    return folder / "checkpoint/step-2"


@pytest.fixture(scope="module")
def two_roles(start, prompts, tmp_path_factory):
    """A checkpoint of a student and a critic, without a moving average."""
    folder = tmp_path_factory.mktemp("two_roles")
    recipe = dmd2_recipe(folder, {role: {"init_from": str(start)} for role in ("student", "teacher", "critic")})
    keys = {"training__steps": 1, "lr_scheduler__warmup_steps": 0, "ema__enable": False}
    assert train(small_arguments(prompts, folder / "run", job__config_file=recipe, **keys)) == 0
    return folder / "run/checkpoint/step-1"


def saved(checkpoint: Path, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a state of a checkpoint."""
    state = read_checkpoint(checkpoint)
    return {key: state[f"{name}.{key}"] for key in random_transformer(SIZES).state_dict()}


def loaded(arguments: list[str], role: str) -> tuple[ModelBase, dict[str, torch.Tensor]]:
    """A role as a run begins with it, and its parameters. What nothing was read into is NaN, not what was in memory before."""
    cfg = load_config(arguments)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.use_deterministic_algorithms(True)
    try:
        model = build_roles(cfg, Mesh(cfg, "cpu"), torch.device("cpu"), [role])[role]
        return model, {name: local_tensor(p.detach()).clone() for name, p in model.transformer.named_parameters()}
    finally:
        torch.use_deterministic_algorithms(False)
        dist.destroy_process_group()


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and len(expected) > 50
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


@pytest.mark.parametrize(
    ("init_weights", "state"),
    [("auto", "ema.student"), ("ema", "ema.student"), ("raw", "roles.student.transformer")],
)
@pytest.mark.parametrize("kind", ["kd", "kd_causal"])
def test_a_student_from_a_checkpoint(runs, finetuned, tmp_path, kind, init_weights, state):
    """Its weights or their average, bitwise, with the sizes of the checkpoint; a causal one from a bidirectional one too."""
    arguments = runs(tmp_path, {"student": {"init_from": str(finetuned), "init_weights": init_weights}}, name=kind)
    model, found = loaded(arguments, "student")
    assert_equal(found, saved(finetuned, state))
    assert model.transformer.cfg == SIZES and model.trainable
    other = {"ema.student": "roles.student.transformer", "roles.student.transformer": "ema.student"}[state]
    assert not torch.equal(found["head.head.weight"], saved(finetuned, other)["head.head.weight"])


def test_a_checkpoint_without_an_average_gives_its_weights(runs, two_roles, tmp_path):
    """By default, and of the role that is named."""
    for role in ("student", "critic"):
        arguments = runs(tmp_path, {"student": {"init_from": str(two_roles), "init_role": role}})
        assert_equal(loaded(arguments, "student")[1], saved(two_roles, f"roles.{role}.transformer"))
    student, critic = (saved(two_roles, f"roles.{role}.transformer") for role in ("student", "critic"))
    assert not torch.equal(student["head.head.weight"], critic["head.head.weight"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_frozen_teacher_from_a_checkpoint(runs, finetuned, tmp_path, dtype):
    arguments = runs(tmp_path, {"teacher": {"init_from": str(finetuned), "dtype": dtype}})
    model, found = loaded(arguments, "teacher")
    kind = getattr(torch, dtype)
    assert {tensor.dtype for tensor in found.values()} == {kind}
    assert_equal(found, {name: tensor.to(kind) for name, tensor in saved(finetuned, "ema.student").items()})
    assert not any(p.requires_grad for p in model.transformer.parameters()) and not model.transformer.training
    assert model.identity == weights.weights_hash(load_config(arguments).models["teacher"]) != ""


def test_two_ranks_read_what_one_reads(runs, finetuned, tmp_path):
    """A teacher: by the trajectories that it makes. A student: by what a step with learning rate 0 saves."""
    models = {role: {"init_from": str(finetuned)} for role in ("student", "teacher")}
    still = {"training__steps": 1, "optimizer__lr": 0, "optimizer__weight_decay": 0, "checkpoint__interval": 1}
    one = content(make(runs(tmp_path / "1", models, num_trajectories=16, overrides=still)))
    arguments = runs(tmp_path / "2", models, num_trajectories=16, overrides=still)
    assert launch(arguments, tmp_path / "logs", 2) == [0, 0], (tmp_path / "logs/rank0.log").read_text()
    assert content(tmp_path / "2/recipe/trajectories") == one and len(one) == 3
    assert launch_training(2, arguments, tmp_path / "records") == [0, 0]
    assert_equal(
        saved(tmp_path / "2/run/checkpoint/step-1", "roles.student.transformer"), saved(finetuned, "ema.student")
    )


@pytest.mark.parametrize(
    ("models", "overrides", "message"),
    [
        ({"flavor": "tiny"}, {}, "models.student: flavor = 'tiny' is WanConfig(num_layers=4"),
        ({"init_role": "critic"}, {}, "the checkpoint holds no role 'critic'; it holds student"),
        ({"init_from": "two_roles", "init_weights": "ema"}, {}, "has no moving average of 'student'"),
        (
            {},
            {"schedule__shift": 5.0},
            "was trained with schedule.shift = 3, this run has 5: use the same",
        ),
        ({"init_from": "truncated"}, {}, "damaged checkpoint"),
        ({"init_from": "nowhere"}, {}, "'nowhere' is neither 'tiny-wan', nor a folder, nor a hub id"),
    ],
    ids=["shapes", "role", "average", "shift", "damage", "nowhere"],
)
def test_what_cannot_be_handed_over(runs, whole, finetuned, two_roles, tmp_path, capsys, models, overrides, message):
    """One line that names both sides, before anything is trained."""
    source = finetuned
    if models.get("init_from") == "two_roles":
        source = two_roles
    elif models.get("init_from") == "truncated":
        source = shutil.copytree(finetuned, tmp_path / "step-2")
        shard = next(source.glob("*.distcp"))
        shard.write_bytes(shard.read_bytes()[:-7])
    elif models.get("init_from") == "nowhere":
        source = Path("nowhere")
    arguments = runs(tmp_path, {"student": {**models, "init_from": str(source)}}, overrides)
    assert train(arguments) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("error: ") and message in error and str(source) in error
    if "flavor" in models:
        assert "holds WanConfig(num_layers=2" in error and "remove flavor to take the sizes of init_from" in error
    assert not (tmp_path / "run/metrics.jsonl").exists() and not (tmp_path / "recipe/trajectories").exists()


def test_a_chain_of_recipes(runs, finetuned, tmp_path, capsys):
    """finetune -> kd -> kd_causal, the last two from one cache, each from the average that the one before has saved."""
    teacher, cache = {"init_from": str(finetuned)}, str(tmp_path / "trajectories")
    keys = {"training__steps": 2, "ema__start_step": 0, "lr_scheduler__warmup_steps": 0, "checkpoint__interval": 1}
    last = finetuned
    for name in ("kd", "kd_causal"):
        folder = tmp_path / name
        models = {"student": {"init_from": str(last)}, "teacher": teacher}
        arguments = runs(folder, models, keys, name=name, teacher_path_cache=cache, num_trajectories=12)
        capsys.readouterr()
        assert_equal(loaded(arguments, "student")[1], saved(last, "ema.student"))
        assert train(arguments) == 0
        assert ("teacher: wan, " in capsys.readouterr().out) == (name == "kd")
        last = folder / "run/checkpoint/step-2"
        moved = saved(last, "roles.student.transformer"), saved(last, "ema.student")
        assert all(
            not torch.equal(m["head.head.weight"], saved(finetuned, "ema.student")["head.head.weight"]) for m in moved
        )


# ---------------------------------------------------------------------------------- what else decides what a cache holds


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"init_weights": "raw"}, {"init_weights": "ema"}),
        ({"dtype": "bfloat16"}, {"dtype": "float32"}),
    ],
    ids=["average", "dtype"],
)
def test_other_weights_of_one_teacher_are_another_contract(runs, finetuned, tmp_path, first, second):
    keys = {"num_trajectories": 8}
    path = make(runs(tmp_path, {"teacher": {"init_from": str(finetuned), **first}}, **keys))
    other = make(runs(tmp_path / "2", {"teacher": {"init_from": str(finetuned), **second}}, **keys))
    assert not torch.equal(tensors_of(path)["000000.x0"], tensors_of(other)["000000.x0"])
    with pytest.raises(UserError, match="was made under another contract: teacher"):
        prepare(runs(tmp_path, {"teacher": {"init_from": str(finetuned), **second}}, **keys))


def test_another_window_of_an_autoregressive_teacher_is_another_contract(runs, tmp_path):
    keys = {"num_trajectories": 8, "name": "kd_causal", "teacher_forcing": True}
    window = {role: {"local_attn_frames": 1} for role in ("student", "teacher")}
    path, other = make(runs(tmp_path, **keys)), make(runs(tmp_path / "2", window, **keys))
    assert not torch.equal(tensors_of(path)["000000.x0"], tensors_of(other)["000000.x0"])
    with pytest.raises(UserError, match="was made under another contract: "):
        prepare(runs(tmp_path, window, **keys))


def test_keys_of_checkpoints_are_not_ignored(runs, tmp_path):
    for key, value in (("init_role", "teacher"), ("init_weights", "raw")):
        with pytest.raises(UserError, match=f"models.student.{key}"):
            loaded(runs(tmp_path, {"student": {key: value}}), "student")
