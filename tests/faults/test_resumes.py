"""What a run that goes on may change, and what it may not. Numbers of faults: docs/reliability.md."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fvtitan.components.metrics import read_metrics
from fvtitan.components.stops import read_status
from fvtitan.models.wan import weights
from fvtitan.models.wan.transformer import FLAVORS
from tests.helpers import causal_recipe, make_cache, random_transformer, small_arguments, train
from tests.integration.exact_worker import launch, output
from tests.integration.test_train import assert_same_checkpoint, training_values

BATCH = {"training__global_batch_size": 4}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("data") / "cache", 10)


@pytest.fixture(scope="module")
def half(cache, tmp_path_factory):
    """A run of 4 steps that was stopped after 2."""
    folder = tmp_path_factory.mktemp("half")
    assert train(arguments_of(cache, folder)) == 0
    shutil.rmtree(folder / "run/checkpoint/step-4")
    return folder / "run"


@pytest.fixture
def resume(half, tmp_path):
    """Goes on from a copy of it."""
    shutil.copytree(half, tmp_path / "run")
    return tmp_path


def arguments_of(cache: Path, folder: Path, **keys: Any) -> list[str]:
    keys = {"training__steps": 4, "checkpoint__interval": 2, **BATCH, **keys}
    return small_arguments(cache, folder / "run", **keys)


def content(folder: Path) -> dict[Path, bytes]:
    """Without who had the folder last, and how that ended."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("lock", "status.json"))
    return {path: path.read_bytes() for path in paths}


def other_sizes(folder: Path) -> dict[str, Any]:
    sizes = dataclasses.replace(FLAVORS["tiny"], ffn_dim=128)
    weights.save_transformer(random_transformer(sizes).state_dict(), sizes, folder / "other/transformer")
    (folder / "other/fvtitan.json").write_text(json.dumps({"text_len": sizes.text_len}))
    return {"models.student.flavor": "", "models.student.init_from": folder / "other"}


CHANGES = {
    "learning rate": (
        lambda folder: {"optimizer__lr": 2e-3},
        ["optimizer.lr = 0.001 (now 0.002)", "checkpoint.allow_changed"],
    ),
    "a group's own": (
        lambda folder: {"models.student.optimizer.weight_decay": 0.5, "optimizer__eps": 1e-6},
        ["models.student.optimizer.weight_decay = None (now 0.5)", "optimizer.eps = 1e-08 (now 1e-06)"],
    ),
    "schedule": (lambda folder: {"schedule__shift": 2.5}, ["schedule.shift = ", "(now 2.5)"]),
    "precision": (
        lambda folder: {"training__mixed_precision_param": "bfloat16"},
        ["training.mixed_precision_param = 'float32' (now 'bfloat16')"],
    ),
    "method": (
        lambda folder: {"job__config_file": causal_recipe(folder)},
        ["method.name = 'finetune' (now 'dfsft')", "models.student.name = 'wan' (now 'wan_causal')"],
    ),
    "seed": (
        lambda folder: {"training__seed": 7},
        ["training.seed: ", "seed 0, this run has 7", "'training.seed' to checkpoint.allow_changed"],
    ),
    "global batch": (
        lambda folder: {"training__global_batch_size": 8},
        ["training.global_batch_size: ", "4, this run has 8", "'training.global_batch_size' to"],
    ),
    "dataset": (
        lambda folder: {"data__path": make_cache(folder / "cache", 10, seed=1)},
        ["data.path: the checkpoint was made with fingerprint ", "'data.path' to checkpoint.allow_changed"],
    ),
}


QUICK = ("learning rate", "method", "seed", "global batch", "dataset")


@pytest.mark.parametrize("change", [pytest.param(c, marks=[] if c in QUICK else [pytest.mark.slow]) for c in CHANGES])
def test_what_is_learned_stays(cache, resume, tmp_path, capsys, change):
    """Fault 19. One line that names every key that differs, with both values, and the way out; nothing is touched."""
    make, words = CHANGES[change]
    keys, before = make(tmp_path), content(tmp_path / "run")
    capsys.readouterr()
    assert train(arguments_of(keys.pop("data__path", cache), tmp_path, **keys)) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert all(word in error for word in words), error
    assert content(tmp_path / "run") == before and read_status(tmp_path / "run")["state"] == "failed"


def test_another_network_is_refused(cache, resume, tmp_path, capsys):
    """Fault 19. By its shapes, and whatever is allowed."""
    keys, before = other_sizes(tmp_path), content(tmp_path / "run")
    capsys.readouterr()
    assert train(arguments_of(cache, tmp_path, **keys)) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert "of another shape or dtype: roles.student.transformer.blocks.0.ffn.0" in error and "saved, [128" in error
    assert content(tmp_path / "run") == before


def test_with_leave_it_changes(resume, tmp_path, capsys):
    """Fault 19."""
    keys = {"optimizer__lr": 2e-3, "training__seed": 7, "training__global_batch_size": 8}
    arguments = arguments_of(make_cache(tmp_path / "cache", 10, seed=1), tmp_path, **keys)
    allowed = ["data.path", "optimizer.lr", "training.seed", "training.global_batch_size"]
    capsys.readouterr()
    assert train([*arguments, "--checkpoint.allow_changed", *allowed]) == 0
    assert "changed since the checkpoint, as allowed: optimizer.lr, 0.001 -> 0.002" in capsys.readouterr().out
    assert read_metrics(tmp_path / "run/metrics.jsonl")[2]["lr/student"] == pytest.approx(2e-3)


# -------------------------------------------------------------------------------------------- how it is executed


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert train(arguments_of(cache, folder)) == 0
    return folder / "run"


EXECUTION = {
    "workers": ({"data__num_workers": 2}, 0.0),
    "activation checkpointing": ({"activation_checkpoint__mode": "full"}, 1e-5),
    "batch split": ({"training__local_batch_size": 1}, 1e-5),
    "compile": ({"compile__enable": True, "compile__backend": "aot_eager"}, 1e-5),
}


@pytest.mark.parametrize(
    "change", [pytest.param(c, marks=[pytest.mark.slow] if c != "activation checkpointing" else []) for c in EXECUTION]
)
def test_how_it_is_executed_may_change(cache, whole, resume, tmp_path, change):
    """Fault 20. The same training, bit for bit with other workers."""
    keys, tolerance = EXECUTION[change]
    assert train(arguments_of(cache, tmp_path, **keys)) == 0
    if not tolerance:
        assert_same_checkpoint(whole / "checkpoint/step-4", tmp_path / "run/checkpoint/step-4")
    expected, found = training_values(whole), training_values(tmp_path / "run")
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    for row, other in zip(found, expected, strict=True):
        assert row == (pytest.approx(other, rel=tolerance) if tolerance else other)


@pytest.mark.slow
def test_two_workers_then_none(cache, whole, tmp_path):
    """Fault 20."""
    assert (
        train(
            arguments_of(cache, tmp_path, training__steps=2, data__num_workers=2, lr_scheduler__decay_type="constant")
        )
        == 0
    )
    assert train(arguments_of(cache, tmp_path, lr_scheduler__decay_type="constant")) == 0
    assert train(arguments_of(cache, tmp_path / "whole", lr_scheduler__decay_type="constant")) == 0
    assert_same_checkpoint(tmp_path / "whole/run/checkpoint/step-4", tmp_path / "run/checkpoint/step-4")


@pytest.mark.slow
def test_ranks_that_do_not_divide_the_batch(cache, tmp_path):
    """Fault 22. One line, before anything is made."""
    assert launch(3, arguments_of(cache, tmp_path), tmp_path) == [2, 2, 2], output(tmp_path)
    for rank in range(3):
        (error,) = (tmp_path / f"rank{rank}.log").read_text().strip().splitlines()
        assert "training.global_batch_size = 4" in error and "2 x 3; nearest: 6" in error
    assert not (tmp_path / "run").exists()
