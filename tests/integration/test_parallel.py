"""Sequence parallelism, HSDP and roles with degrees of their own train the same model as one rank."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fvtitan.components.metrics import read_metrics
from fvtitan.distributed.sequence_parallel import check_heads
from fvtitan.errors import UserError
from fvtitan.models.wan import weights
from fvtitan.models.wan.transformer import WanConfig
from tests.helpers import (
    SMALL,
    causal_recipe,
    dmd2_recipe,
    kd_recipe,
    make_cache,
    random_transformer,
    self_forcing_recipe,
    small_arguments,
    small_config,
)
from tests.integration.exact_worker import launch, output, records
from tests.integration.parallel_worker import WAYS, compare, watch, watch_timeouts

SIZES = WanConfig(num_layers=2, num_heads=4, head_dim=16, ffn_dim=48, text_dim=64, text_len=32, freq_dim=32)
RANKS = [2, pytest.param(4, marks=pytest.mark.slow)]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


# ------------------------------------------------------------------------------------------------------ the network


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("size", [(4, 4), (6, 6)], ids=["even", "padded"])  # 4 and 9 tokens a frame
def test_a_shared_sequence_is_the_whole_one(tmp_path, ranks, size):
    """Outputs, and gradients by parameters and latents, in float64; and 4 all-to-alls a block, forward and backward."""
    assert launch(ranks, [], tmp_path, watcher=compare, size=size) == [0] * ranks, output(tmp_path)
    everyone = records(tmp_path, "compared")
    assert len(everyone) == ranks
    for found in everyone:
        assert set(found) == set(WAYS)
        for name, result in found.items():
            assert max(result["distance"].values()) < 1e-12, (name, max(result["distance"].items(), key=lambda i: i[1]))
            blocks = 4 if name.startswith("streaming") else 1
            passes = 2 * blocks if name.startswith("streaming") else 1  # each block with gradient, and committed
            assert result["forward"]["all_to_all_single"] == 4 * SMALL.num_layers * passes
            assert result["backward"]["all_to_all_single"] == 4 * SMALL.num_layers * blocks


# ----------------------------------------------------------------------------------------------------- whole methods


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A cache, and weights for all roles with which every parameter has a gradient from the first step on."""
    folder = tmp_path_factory.mktemp("parallel")
    models: dict[str, dict[str, object]] = {}
    for seed, role in enumerate(("student", "teacher", "critic")):
        weights.save_transformer(
            random_transformer(SIZES, seed=seed).state_dict(), SIZES, folder / role / "transformer"
        )
        (folder / role / "fvtitan.json").write_text(json.dumps({"text_len": SIZES.text_len}))
        models[role] = {"init_from": str(folder / role)}
    return SimpleNamespace(cache=make_cache(folder / "cache", 10), models=models, runs={}, folder=folder)


def recipe(setting, method: str, folder: Path) -> dict[str, Any]:
    """Keys of a run of `method`. Without videos of its own, a method makes such of 9 tokens a frame, which 2 do not divide."""
    student = {"models.student.flavor": "", "models.student.init_from": setting.models["student"]["init_from"]}
    if method == "finetune":
        return student
    if method == "dfsft":
        return {"job__config_file": causal_recipe(folder), **student}
    odd = {"data__height": 48, "data__width": 48, "schedule__shift": 5.0}
    if method == "dmd2":
        return {"job__config_file": dmd2_recipe(folder, setting.models, student_update_interval=2), **odd}
    mode = method.removeprefix("self_forcing_")
    return {
        "job__config_file": self_forcing_recipe(folder, setting.models, gradient_mode=mode, student_update_interval=2),
        **odd,
    }


SPLITS = {
    "one rank": (1, {}),
    "fsdp 2": (2, {}),
    "hsdp 2 x 1": (2, {"parallelism__data_parallel_replicate_degree": 2}),
    "sequence 2": (2, {"parallelism__context_parallel_degree": 2}),
    "replicated student": (2, {"models.student.parallelism.data_parallel_shard_degree": 1}),
    "sequence 2, selective, compiled": (
        2,
        {
            "parallelism__context_parallel_degree": 2,
            "activation_checkpoint__mode": "selective",
            "compile__enable": True,
            "compile__backend": "aot_eager",
        },
    ),
    "sequence 4": (4, {"parallelism__context_parallel_degree": 4}),
    "shard 2, sequence 2": (4, {"parallelism__context_parallel_degree": 2}),
    "hsdp 2 x 2": (4, {"parallelism__data_parallel_replicate_degree": 2}),
    "hsdp 2 x 1, sequence 2": (
        4,
        {"parallelism__data_parallel_replicate_degree": 2, "parallelism__context_parallel_degree": 2},
    ),
}


def run(setting, method: str, split: str) -> SimpleNamespace:
    """The logged losses and recorded gradients of 3 steps on 4 samples."""
    key = f"{method}, {split}"
    if key not in setting.runs:
        ranks, keys = SPLITS[split]
        folder = setting.folder / key.replace(" ", "-")
        folder.mkdir()
        sequences = ranks // keys.get("parallelism__context_parallel_degree", 1)
        keys = {
            "training__steps": 3,
            "training__global_batch_size": 4,
            "training__local_batch_size": 4 // sequences,
            "lr_scheduler__decay_type": "constant",
            "checkpoint__enable": False,
            **recipe(setting, method, folder),
            **keys,
        }
        arguments = small_arguments(setting.cache, folder / "run", **keys)
        assert launch(ranks, arguments, folder / "records", watcher=watch) == [0] * ranks, output(folder / "records")
        losses = [
            {name: value for name, value in row.items() if name.startswith(("loss/", "grad_norm/"))}
            for row in read_metrics(folder / "run" / "metrics.jsonl")
        ]
        gradients = [record["gradients"] for record in records(folder / "records", "gradients")]
        setting.runs[key] = SimpleNamespace(losses=losses, gradients=gradients[::ranks], everyone=gradients)
    return setting.runs[key]


METHODS = ["finetune", "dfsft", "dmd2", "self_forcing_direct", "self_forcing_replay"]
QUICK = [(method, "sequence 2") for method in METHODS]
QUICK += [(method, "hsdp 2 x 1") for method in ("finetune", "dmd2")]
QUICK += [("finetune", "sequence 2, selective, compiled"), ("dmd2", "replicated student")]


@pytest.mark.parametrize(
    ("method", "split"),
    [
        pytest.param(method, split, marks=[] if (method, split) in QUICK else [pytest.mark.slow])
        for method in METHODS
        for split in list(SPLITS)[1:]
    ],
)
def test_the_same_training_however_it_is_split(setting, method, split):
    """Losses and gradients of every phase."""
    expected, found = run(setting, method, "one rank"), run(setting, method, split)
    phases = 3 if method in ("finetune", "dfsft") else 5
    assert len(found.gradients) == len(expected.gradients) == phases
    for row, reference in zip(found.losses, expected.losses, strict=True):
        assert row == pytest.approx(reference, rel=1e-5)
    for ours, theirs in zip(found.gradients, expected.gradients, strict=True):
        assert ours.keys() == theirs.keys() and all(float(gradient.norm()) > 0 for gradient in theirs.values())
        apart = {name: distance(ours[name], gradient) for name, gradient in theirs.items()}
        assert max(apart.values()) < 1e-5, max(apart.items(), key=lambda item: item[1])


@pytest.mark.parametrize("method", ["kd", pytest.param("kd_causal", marks=pytest.mark.slow)])
def test_distillation_on_trajectories_of_a_shared_sequence(setting, tmp_path, method):
    """A teacher that two ranks share makes the same trajectories, each once, and the student learns the same from them."""
    caches, losses = [], []
    for ranks in (1, 2):
        folder = tmp_path / f"{ranks}"
        models = {role: setting.models[role] for role in ("student", "teacher")}
        keys = {
            "job__config_file": kd_recipe(folder, models, name=method),
            "data__height": 48,
            "data__width": 48,
            "training__steps": 2,
            "training__global_batch_size": 4,
            "training__local_batch_size": 4,
            "parallelism__context_parallel_degree": ranks,
            "checkpoint__enable": False,
        }
        arguments = small_arguments(setting.cache, folder / "run", **keys)
        assert launch(ranks, arguments, folder / "records", watcher=watch) == [0] * ranks, output(folder / "records")
        shards = sorted((folder / "trajectories").glob("*.safetensors"))
        caches.append({name: tensor for path in shards for name, tensor in load_file(path).items()})
        losses.append([row["loss/student"] for row in read_metrics(folder / "run" / "metrics.jsonl")])
    assert caches[0].keys() == caches[1].keys() and len(caches[0]) >= 12
    for name, tensor in caches[0].items():
        assert distance(caches[1][name].float(), tensor.float()) < 1e-3, name  # they are stored in bfloat16
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_copies_of_a_model_need_the_space_of_one(setting, tmp_path):
    """What a checkpoint says that it needs is what it takes."""
    keys = {"training__steps": 1, "parallelism__data_parallel_replicate_degree": 2}
    arguments = small_arguments(setting.cache, tmp_path / "run", **keys)
    assert launch(2, arguments, tmp_path / "records", watcher=watch) == [0, 0], output(tmp_path / "records")
    (said,) = re.findall(r"saved checkpoint \S+ \((\d+) MiB", output(tmp_path / "records"))
    taken = sum(path.stat().st_size for path in (tmp_path / "run/checkpoint/step-1").glob("*.distcp"))
    assert int(said) == pytest.approx(taken / 2**20, rel=0.1)


def test_every_process_group_waits_as_long_as_the_recipe_says(setting, tmp_path):
    """The job's, those of the meshes, and the checkpoints'."""
    keys = {"training__steps": 1, "comm__timeout_seconds": 77, "parallelism__data_parallel_replicate_degree": 2}
    arguments = small_arguments(setting.cache, tmp_path / "run", **keys)
    assert launch(2, arguments, tmp_path / "records", watcher=watch_timeouts) == [0, 0], output(tmp_path / "records")
    for found in records(tmp_path / "records", "timeouts"):
        assert len(found["seconds"]) >= 3 and set(found["seconds"]) == {77.0}


# --------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"parallelism__context_parallel_degree": 3}, "must divide the 8 processes; allowed: 1, 2, 4, 8"),
        ({"parallelism__context_parallel_degree": 8}, "must divide the 4 heads of models.student; allowed: 1, 2, 4"),
        ({"parallelism__context_parallel_degree": 0}, "context_parallel_degree = 0: must be >= 1"),
        (
            {"parallelism__context_parallel_degree": 2, "parallelism__data_parallel_shard_degree": 8},
            "1 x data_parallel_shard_degree 8 x context_parallel_degree 2 is 16, but there are 8 processes",
        ),
        (
            {"parallelism__context_parallel_degree": 2, "training__global_batch_size": 6},
            "must be a multiple of local_batch_size x data ranks = 2 x 4; nearest: 8",
        ),
        (
            {"models.student.parallelism.data_parallel_shard_degree": 3},
            "models.student.parallelism.data_parallel_shard_degree = 3: must divide the 8 data ranks; allowed: 1, 2, 4, 8",
        ),
        ({"models.student.parallelism.data_parallel_shard_degree": 0}, "models.student.parallelism.*= 0: must be >= 1"),
    ],
)
def test_degrees_that_do_not_fit(setting, tmp_path, monkeypatch, keys, message):
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(UserError, match=message):
        small_config(setting.cache, tmp_path, **keys)


def test_heads_of_a_pretrained_model_that_cannot_be_shared():
    with pytest.raises(
        UserError, match="context_parallel_degree = 8: must divide the 12 heads of models.teacher; allo"
    ):
        check_heads("teacher", 12, 8)
