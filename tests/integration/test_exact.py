"""The same training on any number of ranks, and what went wrong in the systems before us.

Which test holds each of those defects; a test below sees that all of them exist.

| defect found in a predecessor   | held by
| ------------------------------- | -------
| clip by the rank-local norm     | integration/test_exact.py::test_gradients_do_not_depend_on_the_split
|                                 | integration/test_exact.py::test_clipping_by_local_norms_would_show
| a method that nothing runs      | integration/test_exact.py::test_every_recipe_trains
| sharded EMA saved as replicated | integration/test_exact.py::test_stops_of_real_processes
| LoRA gradients not reduced      | integration/test_lora.py::test_adapters_are_the_same_on_all_ranks
| same noise on every data rank   | integration/test_exact.py::test_noise_belongs_to_samples
| both DMD losses before a step   | integration/test_plan.py::test_memory_is_what_a_real_step_takes
| EMA stepped with the critic     | integration/test_exact.py::test_the_average_counts_student_updates
| one shift here, another there   | integration/test_exact.py::test_one_shift_for_everything
| `t_list` checked after hours    | unit/test_kd.py::test_config_errors_are_one_line
| a setting read by nothing       | integration/test_exact.py::test_every_key_is_read_by_a_run
|                                 | unit/test_config.py::test_options_are_few_and_each_is_read_somewhere
| remainder frames first, or last | unit/test_blocks.py::test_blocks_tile_the_video_or_the_error_names_the_nearest_lengths
| causal only for batch 1, 128 n  | parity/test_causal.py::test_a_batch_is_its_samples
|                                 | parity/test_causal.py::test_any_number_of_tokens
| caption dropout as last epoch   | unit/test_finetune.py::test_caption_dropout_has_its_rate_and_varies_by_pass
| order as in the last epoch      | unit/test_dataloader.py::test_an_epoch_that_divides_is_exactly_one_permutation_of_everything
| half a checkpoint is the latest | unit/test_checkpoint.py::test_a_kill_before_the_commit_leaves_the_good_one
| unknown keys ignored            | unit/test_config.py::test_errors_name_key_value_and_fix
| `x or default` loses a 0        | unit/test_config.py::test_zero_is_a_value
| validation with another ladder  | integration/test_exact.py::test_validation_samples_as_the_method_says
| losses logged from rank 0 only  | integration/test_exact.py::test_a_logged_value_is_the_jobs
| NaN applied silently            | integration/test_exact.py::test_nan_on_one_rank_updates_no_rank
|                                 | integration/test_train.py::test_nothing_is_updated_when_the_gradient_is_not_finite
| export diffusers cannot find    | integration/test_export.py::test_wanpipeline_gives_our_video
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import os
import re
import sys
import typing
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fvtitan import flow_matching, samplers
from fvtitan.components.checkpoint import Checkpointer
from fvtitan.components.metrics import ThroughputMeter, read_metrics
from fvtitan.components.rng import generator
from fvtitan.components.stateful import TrainState
from fvtitan.components.validation import Validator
from fvtitan.config import JobConfig, RoleConfig, load_config, read_toml
from fvtitan.data.dataloader import BatchStream, GlobalBatchSampler
from fvtitan.data.latent_cache import LatentCache
from fvtitan.distributed.mesh import Mesh
from fvtitan.methods import METHODS
from fvtitan.methods.base import MethodConfig
from fvtitan.methods.finetune import FineTuneConfig, FineTuneMethod
from fvtitan.methods.passes import Pass
from fvtitan.models import build_roles
from fvtitan.models.encoders import TextEncoder
from fvtitan.models.wan import weights
from fvtitan.models.wan.flops import forward_flops
from fvtitan.models.wan.model import WanModel
from fvtitan.models.wan.transformer import WanConfig
from tests.helpers import (
    GEOMETRY,
    ROOT,
    make_cache,
    random_transformer,
    read_checkpoint,
    small_arguments,
    stopping,
    train,
)
from tests.integration.exact_worker import launch, output, part, records

STEPS = 6
MAX_NORM = 0.05
SIZES = WanConfig(num_layers=2, num_heads=4, head_dim=32, ffn_dim=192, text_dim=64, text_len=32, freq_dim=64)
PARAMETERS = len(list(random_transformer(SIZES).parameters()))
SHIPPED = tuple(METHODS.values())


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("data") / "cache", 10)


@pytest.fixture(scope="module")
def heldout(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("data") / "heldout", 5, seed=1)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Initial weights with which every parameter has a gradient from the first step on, which is not so when the output
    projection is zero; and few of them, for speed."""
    folder = tmp_path_factory.mktemp("start")
    weights.save_transformer(random_transformer(SIZES).state_dict(), SIZES, folder / "transformer")
    (folder / "fvtitan.json").write_text(json.dumps({"text_len": SIZES.text_len}))
    return folder


def arguments_of(start: Path, cache: Path, folder: Path, **overrides: Any) -> list[str]:
    return small_arguments(
        cache, folder, **{"models.student.flavor": "", "models.student.init_from": start, **overrides}
    )


def values_of(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what the clock and the machine decide."""
    rows = read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in rows]


def distance(a: Tensor, b: Tensor) -> float:
    """Relative L2; 0 for two zeros."""
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


# ------------------------------------------------------------------- the split of a global batch does not matter


@dataclass
class Run:
    folder: Path
    records: Path

    def gradients(self) -> dict[int, dict[str, Any]]:
        """By step; the whole tensors, which every rank has recorded."""
        return {record["step"]: record for record in records(self.records, "gradients")}

    def everyones_gradients(self, step: int) -> list[dict[str, Any]]:
        return records(self.records, f"gradients.step-{step}")

    def batches(self) -> list[dict[str, Any]]:
        return records(self.records, "batch")


@pytest.fixture(scope="module")
def parity(cache, start, tmp_path_factory):
    """Trains on 8 samples a step, with a clip that bites."""
    base = tmp_path_factory.mktemp("parity")

    def run(name: str, ranks: int, **overrides: Any) -> Run:
        made = Run(base / name, base / f"{name}-records")
        keys = {
            "training__steps": STEPS,
            "training__global_batch_size": 8,
            "training__max_norm": MAX_NORM,
            "checkpoint__interval": STEPS,
            "lr_scheduler__decay_type": "constant",  # a shorter run takes the same steps
            **overrides,
        }
        status = launch(ranks, arguments_of(start, cache, made.folder, **keys), made.records, gradients=(1, 2, STEPS))
        assert status == [0] * ranks, output(made.records)
        return made

    return run


@pytest.fixture(scope="module")
def whole(parity):
    return parity("whole", 1, training__local_batch_size=8)


@pytest.fixture(scope="module")
def accumulated(parity):
    return parity("accumulated", 1, training__local_batch_size=4)


@pytest.fixture(scope="module")
def two_ranks(parity):
    return parity("ranks", 2, training__local_batch_size=2)  # and accumulation 2


@pytest.fixture(scope="module")
def replicated(parity):
    """HSDP, reducing once a step."""
    keys = {"parallelism__data_parallel_replicate_degree": 2, "parallelism__defer_grad_sync": True}
    return parity("replicated", 2, training__local_batch_size=2, training__steps=1, checkpoint__enable=False, **keys)


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative distance of a tensor, and its name."""
    assert found.keys() == expected.keys() and len(expected) == PARAMETERS
    return max((distance(found[name], tensor), name) for name, tensor in expected.items())


@pytest.mark.parametrize("split", ["accumulated", "two_ranks", "replicated"])
def test_gradients_do_not_depend_on_the_split(whole, split, request):
    found, expected = request.getfixturevalue(split).gradients(), whole.gradients()
    assert sorted(found) == ([1] if split == "replicated" else [1, 2, STEPS])
    for step, record in found.items():
        assert all(float(gradient.norm()) > 0 for gradient in record["before"].values())
        norm = float(torch.stack([gradient.norm() for gradient in record["after"].values()]).norm())
        assert record["norm"] > 4 * MAX_NORM and norm == pytest.approx(MAX_NORM, rel=1e-4)  # the clip is active
        for kind in ("before", "after"):
            assert worst(record[kind], expected[step][kind])[0] <= 1e-5, (step, kind)


def test_clipping_by_local_norms_would_show(whole, two_ranks):
    """Each rank's shards scaled by that rank's own norm, as a predecessor did: far beyond the tolerance."""
    wrong = {name: gradient.clone() for name, gradient in two_ranks.gradients()[1]["before"].items()}
    for rank in two_ranks.everyones_gradients(1):
        for name, offset in rank["offsets"].items():
            part(wrong[name], offset).mul_(MAX_NORM / rank["local_norm"])
    assert worst(two_ranks.gradients()[1]["after"], whole.gradients()[1]["after"])[0] <= 1e-5
    assert worst(wrong, whole.gradients()[1]["after"])[0] > 0.1


@pytest.mark.parametrize("split", ["accumulated", "two_ranks"])
def test_losses_and_parameters_do_not_depend_on_the_split(whole, start, split, request):
    run = request.getfixturevalue(split)
    rows = values_of(run.folder)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row, expected in zip(rows, values_of(whole.folder), strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
    ours, reference = (read_checkpoint(r.folder / f"checkpoint/step-{STEPS}") for r in (run, whole))
    for prefix in ("roles.student.transformer.", "ema.student."):
        found, expected = (
            {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
            for state in (ours, reference)
        )
        assert worst(found, expected)[0] <= 1e-5
        first = weights.read_pipeline(str(start))[1]
        assert (
            min(distance(first[name], tensor) for name, tensor in expected.items()) > 1e-4
        )  # six steps are a long way


def test_the_same_split_is_the_same_run(parity, two_ranks):
    again = parity("again", 2, training__local_batch_size=2, training__steps=2, checkpoint__enable=False)
    assert values_of(again.folder) == values_of(two_ranks.folder)[:2]
    for step in (1, 2):  # the gradients of step 2 are those of what step 1 has made of the weights
        found, expected = again.gradients()[step], two_ranks.gradients()[step]
        for kind in ("before", "after"):
            assert found[kind].keys() == expected[kind].keys()
            assert all(torch.equal(found[kind][name], tensor) for name, tensor in expected[kind].items())


def by_position(run: Run, key: str) -> dict[tuple[int, int], Any]:
    """What each (step, position in the global batch) got."""
    found = {}
    for batch in run.batches():
        for position, value in zip(batch["positions"], batch[key], strict=True):
            assert (batch["step"], position) not in found
            found[batch["step"], position] = value
    return found


def test_noise_belongs_to_samples(whole, accumulated, two_ranks):
    """Data ranks draw different noise, and each sample the same one in whatever split."""
    expected = by_position(whole, "noise")
    assert sorted(expected) == list(itertools.product(range(1, STEPS + 1), range(8)))
    for run in (accumulated, two_ranks):
        noise = by_position(run, "noise")
        assert noise.keys() == expected.keys() and all(torch.equal(noise[k], expected[k]) for k in expected)
        assert by_position(run, "sample_ids") == by_position(whole, "sample_ids")
    for step in range(1, STEPS + 1):
        ours, theirs = (
            torch.cat([b["noise"] for b in two_ranks.batches() if b["step"] == step and b["rank"] == rank])
            for rank in (0, 1)
        )
        assert ours.shape == theirs.shape == (4, 3, 16, 4, 4)
        alike = (ours.flatten(1) @ theirs.flatten(1).T) / (ours[0].numel())
        assert alike.abs().max() < 0.2  # unrelated draws of 768 numbers: 0.036 is one standard deviation
    assert len({noise.numpy().tobytes() for noise in expected.values()}) == len(expected)  # nor is any drawn twice


def test_a_logged_value_is_the_jobs(two_ranks):
    """The logged loss is the mean over both ranks and their micro-batches, not what rank 0 saw."""
    for row in values_of(two_ranks.folder):
        losses = {
            rank: [b["loss"] for b in two_ranks.batches() if (b["step"], b["rank"]) == (row["step"], rank)]
            for rank in (0, 1)
        }
        assert len(losses[0]) == len(losses[1]) == 2
        assert row["loss/student"] == pytest.approx(sum(losses[0] + losses[1]) / 4, rel=1e-6)
        assert row["loss/student"] != pytest.approx(sum(losses[0]) / 2, rel=1e-4)
    logged = {row["step"]: row["grad_norm/student"] for row in values_of(two_ranks.folder)}
    for step, record in two_ranks.gradients().items():
        assert logged[step] == pytest.approx(record["norm"], rel=1e-6) and record["local_norm"] < 0.95 * record["norm"]


def uneven_ranks(folder: Path) -> None:
    """Makes rank 1 wait longer and hold more memory."""
    rank, read = int(os.environ["RANK"]), ThroughputMeter.read
    own = {"perf/data_wait": (0.25, 0.75)[rank], "perf/peak_memory_gib": (1.0, 2.0)[rank]}
    ThroughputMeter.read = lambda self: read(self) | own


def test_logged_performance_is_that_of_the_worst_rank(cache, start, tmp_path):
    """And rates are of the whole job, FLOPs a device."""
    keys = {"training__steps": 1, "training__global_batch_size": 8, "metrics__peak_tflops": 0.5}
    arguments = arguments_of(start, cache, tmp_path / "run", **keys, checkpoint__enable=False)
    assert launch(2, arguments, tmp_path / "ranks", watcher=uneven_ranks) == [0, 0], output(tmp_path / "ranks")
    (row,) = read_metrics(tmp_path / "run/metrics.jsonl")
    assert row["perf/data_wait"] == 0.75 and row["perf/peak_memory_gib"] == 2.0
    clip = forward_flops(Pass("student", 3), SIZES, None, 4, 4).total
    job = 2 * 1e12 * row["perf/tflops_per_device"] * row["perf/step_seconds"]
    assert job == pytest.approx(8 * 3 * clip, rel=1e-9)
    assert row["perf/mfu"] == pytest.approx(row["perf/tflops_per_device"] / 0.5, rel=1e-9)


@pytest.mark.faults
def test_nan_on_one_rank_updates_no_rank(cache, start, tmp_path):
    """Fault 23."""
    arguments = arguments_of(start, cache, tmp_path / "run", checkpoint__interval=1, training__global_batch_size=4)
    status = launch(2, arguments, tmp_path / "records", nan=(1, 3))
    assert 0 not in status
    for log in sorted((tmp_path / "records").glob("rank*.log")):  # rank 0's own loss was finite
        assert "step 3: not finite: the loss of the student on rank 1; the gradient norm" in log.read_text()
    assert Checkpointer(tmp_path / "run/checkpoint").steps() == [1, 2]


# ---------------------------------------------------------------------------------- stops, world sizes, workers


@dataclass
class Stage:
    ranks: int
    local_batch_size: int
    workers: int
    stop_before: int = 0  # all ranks are killed there; 0: runs to the end
    torchrun: bool = False


CASES = {  # samples, how many of them in a second bucket, steps, stages
    # One bucket of 30: an epoch is 2.5 global batches, so that a pass over the data ends within one.
    "1 -> 3": (30, 0, 4, [Stage(1, 6, 2, stop_before=4), Stage(3, 2, 0)]),
    # Two shapes, 10 and 20 samples.
    "2 -> 1 -> 2, two buckets": (
        30,
        10,
        6,
        [Stage(2, 6, 0, stop_before=4), Stage(1, 6, 2, stop_before=5), Stage(2, 6, 1)],
    ),
    # Started by torchrun; stopped, and saved, exactly between two epochs.
    "2 -> 4, torchrun": (24, 0, 4, [Stage(2, 3, 1, stop_before=3, torchrun=True), Stage(4, 3, 0)]),
}
GLOBAL_BATCH = 12


def run_stages(folder: Path, start: Path, case: str) -> tuple[Path, list[Path]]:
    """Train through the case's stages, a checkpoint every 2 steps; the cache and each stage's records."""
    samples, portrait, steps, stages = CASES[case]
    cache = make_cache(folder / "cache", samples, num_portrait=portrait)
    for number, stage in enumerate(stages):
        keys = {
            "training__steps": steps,
            "training__global_batch_size": GLOBAL_BATCH,
            "training__local_batch_size": stage.local_batch_size,
            "data__num_workers": stage.workers,
            "checkpoint__interval": 2,
            "checkpoint__keep_latest_k": 0,
        }
        status = launch(
            stage.ranks,
            arguments_of(start, cache, folder / "run", **keys),
            folder / f"stage-{number}",
            torchrun=stage.torchrun,
            stop_before=stage.stop_before,
            states=True,
        )
        killed = [1] if stage.torchrun else [-9] * stage.ranks
        finished = [0] if stage.torchrun else [0] * stage.ranks
        assert status == (killed if stage.stop_before else finished), output(folder / f"stage-{number}")
    return cache, [folder / f"stage-{number}" for number in range(len(stages))]


SLOW = ("1 -> 3", "2 -> 4, torchrun")


@pytest.mark.faults
@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] if c in SLOW else []) for c in CASES])
def test_stops_of_real_processes(case, start, tmp_path):
    """Faults 1, 20, 21. Each sample of an epoch once, in the one order, whatever stops, ranks and workers; and what a stage
    loads is bit for bit what the one before it saved: parameters, optimizer, moving average, schedule, position in the data."""
    *_, steps, stages = CASES[case]
    cache, folders = run_stages(tmp_path, start, case)
    taken: dict[int, dict[int, str]] = {}  # step -> position -> sample
    noise: dict[tuple[int, int], Tensor] = {}
    for stage, folder in zip(stages, folders, strict=True):
        batches = records(folder, "batch")
        assert {batch["rank"] for batch in batches} == set(range(stage.ranks)) == set(range(batches[0]["world"]))
        seen: dict[int, dict[int, str]] = {}
        for batch in batches:
            here = seen.setdefault(batch["step"], {})
            for position, sample, drawn in zip(batch["positions"], batch["sample_ids"], batch["noise"], strict=True):
                assert position not in here
                here[position] = sample
                assert torch.equal(noise.setdefault((batch["step"], position), drawn), drawn)
        for step, here in seen.items():
            assert sorted(here) == list(range(GLOBAL_BATCH))
            assert taken.setdefault(step, here) == here  # a step that is trained again takes the same samples
    assert sorted(taken) == list(range(1, steps + 1))

    data = LatentCache(cache)
    ids = [sample["sample_id"] for sample in data.samples]
    order = GlobalBatchSampler(data.bucket_indices, GLOBAL_BATCH, seed=0)
    for step, here in taken.items():
        assert [here[p] for p in range(GLOBAL_BATCH)] == [ids[i] for i in order.batch(step - 1).indices]
    chains = [[], *([] for _ in data.bucket_indices[1:])]
    for step in sorted(taken):
        (bucket,) = {
            bucket for bucket, members in enumerate(data.bucket_indices) for i in members if ids[i] == taken[step][0]
        }
        chains[bucket] += [taken[step][p] for p in range(GLOBAL_BATCH)]
    for members, chain in zip(data.bucket_indices, chains, strict=True):
        for start in range(0, len(chain), len(members)):
            once = chain[start : start + len(members)]
            assert len(set(once)) == len(once) and set(once) <= {ids[i] for i in members}
    assert all(len(chain) > len(members) for members, chain in zip(data.bucket_indices, chains, strict=True))

    for stage, folder in zip(stages, folders, strict=True):
        saved, loaded = records(folder, "saved"), records(folder, "loaded")
        assert len(loaded) == (0 if stage is stages[0] else stage.ranks)
        assert len(saved) >= stage.ranks and not any(record["changed"] for record in saved)
        assert [record["differing"] for record in saved + loaded if record["differing"]] == []
        for shards in [record["shards"] for record in saved]:  # all ranks together hold the moving average once
            assert shards["own"] == pytest.approx(shards["whole"] / stage.ranks, rel=0.1)
    for step in range(2, steps + 1, 2):  # from start_step = 2 on there is an average a student update
        state = json.loads((tmp_path / f"run/checkpoint/step-{step}/state.json").read_text())["states"]
        assert state["ema.student"]["num_updates"] == step - 2


# ------------------------------------------------------------------------------------------------- validation


def validated(start: Path, cache: Path, heldout: Path, folder: Path, **overrides: Any) -> list[str]:
    keys = {
        "training__steps": 6,
        "training__global_batch_size": 4,
        "ema__start_step": 0,
        "checkpoint__interval": 3,
        "checkpoint__keep_latest_k": 0,
        "validation__enable": True,
        "validation__interval": 3,
        "validation__num_prompts": 3,
        "validation__sampling_steps": 1,
        "validation__heldout_path": heldout,
        "validation__heldout_clips": 5,  # batches of 2, 2 and 1: a second rank has nothing in the last round
        "metrics__enable_tensorboard": True,
    }
    return arguments_of(start, cache, folder, **{**keys, **overrides})


class Validated:
    """Runs of 6 steps, validated and saved at 3 and 6."""

    def __init__(self, *inputs: Path, folder: Path):
        self.inputs, self.folder = inputs, folder

    def run(
        self, name: str, ranks: int = 1, status: int = 0, options: dict[str, Any] | None = None, **overrides: Any
    ) -> Path:
        seen = self.folder / f"{name}-{ranks}-records"
        arguments = validated(*self.inputs, self.folder / name, **overrides)
        assert launch(ranks, arguments, seen, **(options or {})) == [status] * ranks, output(seen)
        return self.folder / name


@pytest.fixture(scope="module")
def runs(start, cache, heldout, tmp_path_factory):
    return Validated(start, cache, heldout, folder=tmp_path_factory.mktemp("validated"))


@pytest.fixture(scope="module")
def plain(runs):
    return runs.run("plain", options={"states": True})


@pytest.fixture(scope="module")
def resumed(runs):
    """One rank, killed two logged steps after its checkpoint; two ranks go on. Training draws from all generators."""
    runs.run("resumed", 1, -9, {"stop_before": 6, "disturb": True})
    assert [row["step"] for row in values_of(runs.folder / "resumed")] == [1, 2, 3, 4, 5]
    return runs.run("resumed", 2, options={"disturb": True})


def heldout_values(folder: Path) -> dict[int, dict[str, float]]:
    rows = {row["step"]: {k: v for k, v in row.items() if k.startswith("validation")} for row in values_of(folder)}
    assert {step for step, row in rows.items() if row} == {3, 6}
    assert all(len(rows[step]) == 2 * 10 for step in (3, 6))  # raw and EMA: the mean and 9 noise levels
    return {step: rows[step] for step in (3, 6)}


def test_held_out_loss_is_the_same_on_other_ranks_and_after_a_resume(plain, resumed):
    expected, found = heldout_values(plain), heldout_values(resumed)
    assert found[3] == expected[3]
    assert found[6] == pytest.approx(expected[6], rel=1e-6)
    assert expected[6]["validation/loss"] != pytest.approx(
        expected[3]["validation/loss"], rel=1e-4
    )  # it measures the student
    assert expected[6]["validation_ema/loss"] != pytest.approx(expected[6]["validation/loss"], rel=1e-5)


def test_one_picture_shows_what_all_ranks_have_sampled(plain, resumed):
    """The second of two ranks samples the third video; the student is the same but for rounding."""
    sheets = [np.asarray(Image.open(f / "validation/step-6/ema/contact_sheet.png"), int) for f in (plain, resumed)]
    assert sheets[0].shape == sheets[1].shape and np.abs(sheets[0] - sheets[1]).max() <= 2


@pytest.mark.slow
def test_ranks_that_share_a_sequence_validate_as_one(runs, plain):
    shared = runs.run("shared", 2, parallelism__context_parallel_degree=2, checkpoint__enable=False)
    assert heldout_values(shared)[6] == pytest.approx(heldout_values(plain)[6], rel=1e-5)
    videos = [sorted(p.name for p in (f / "validation/step-6").rglob("*.*")) for f in (shared, plain)]
    assert videos[0] == videos[1] and len([name for name in videos[0] if name.endswith(".mp4")]) == 6  # raw and EMA


def test_validation_neither_sees_nor_moves_the_generators(runs, plain, resumed):
    """Training that drew from every generator there is has the same held-out loss (above), and without validation training is
    the same bit for bit: parameters, optimizer, moving average, generators."""
    without = runs.run("without", validation__enable=False)
    ours, expected = (read_checkpoint(folder / "checkpoint/step-6") for folder in (plain, without))
    assert ours.keys() == expected.keys() and len(ours) > 5 * PARAMETERS
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, expected[name])] == []
    assert values_of(without) == [
        {key: value for key, value in row.items() if not key.startswith("validation")} for row in values_of(plain)
    ]
    disturbed = read_checkpoint(resumed / "checkpoint/step-6")
    for name in ("torch", "numpy.keys", "python.words"):
        assert not torch.equal(disturbed[f"random_state.rank0.{name}"], ours[f"random_state.rank0.{name}"]), name


def test_swapping_in_the_average_leaves_the_student_bit_equal(runs, plain):
    for step in (3, 6):
        (record,) = records(runs.folder / "plain-1-records", f"validated.step-{step}")
        assert record["before"] == record["after"] and len(record["before"]) > 4 * PARAMETERS
        student, average = (
            [digest for name, digest in sorted(record["before"].items()) if name.startswith(prefix)]
            for prefix in ("roles.student.", "ema.")
        )
        assert student != average  # so the swap would have shown


@torch.no_grad()
def test_held_out_loss_is_what_it_says(plain, heldout):
    """By hand: the flow-matching error of the saved weights, on clips, noise and 9 levels that depend on nothing else."""
    levels = [3 * u / (1 + 2 * u) for u in ((i + 0.5) / 9 for i in range(9))]  # the 9 mid-quantiles, shift 3
    row, clips = heldout_values(plain)[6], LatentCache(heldout)
    for name, raw in (("validation", True), ("validation_ema", False)):
        sizes, tensors = weights.read_checkpoint(plain / "checkpoint/step-6", "student", raw=raw)
        model = WanModel.from_tensors(sizes, tensors, flow_matching.ScheduleConfig(), RoleConfig())
        by_level = {
            float(key.split("sigma_")[1]): value for key, value in row.items() if key.startswith(f"{name}/loss_sigma")
        }
        assert sorted(by_level) == pytest.approx(levels, abs=6e-4)
        mean = 0.0
        for level, logged in zip(levels, [by_level[key] for key in sorted(by_level)], strict=True):
            losses = []
            for i in range(5):
                x0 = clips[i]["latents"][None].float()
                noise = torch.randn(x0.shape[1:], generator=generator("cpu", 0, "heldout", i))[None]
                x = (1 - level) * x0 + level * noise
                v = model.predict_velocity(
                    x, torch.full((1, 3), level), model.conditioning([clips[i]["prompt_embeds"]])
                )
                losses.append(float((v - (noise - x0)).square().mean()))
            assert logged == pytest.approx(sum(losses) / 5, rel=1e-5)
            mean += sum(losses) / 5 / 9
        assert row[f"{name}/loss"] == pytest.approx(mean, rel=1e-5)


@pytest.mark.faults
def test_metrics_and_tensorboard_go_on_without_a_step_twice(plain, resumed):
    """Fault 41. Killed after step 5 was logged, resumed from step 3 on another number of ranks: each step once, in both."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = values_of(resumed)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row, expected in zip(rows, values_of(plain), strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
    assert len(list((resumed / "tensorboard").iterdir())) == 2  # the killed run's file and the other one's
    events = EventAccumulator(str(resumed / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    in_both = {row["step"]: row for row in read_metrics(resumed / "metrics.jsonl")}
    names = {name for row in in_both.values() for name in row if name != "step"}
    assert set(events.Tags()["scalars"]) == names and {"loss/student", "validation/loss", "perf/step_seconds"} <= names
    for name in names:
        steps = [event.step for event in events.Scalars(name)]
        assert steps == [step for step, row in in_both.items() if name in row], name
        for event in events.Scalars(name):
            assert event.value == pytest.approx(in_both[event.step][name], rel=1e-6)
    assert [event.step for event in events.Images("validation_ema/0")] == [3, 6]


# --------------------------------------------------------------------------------------- two roles, one seldom


@dataclass
class TwoRolesConfig(FineTuneConfig):
    name: Literal["two_roles"] = "two_roles"


class TwoRolesMethod(FineTuneMethod):
    """Two networks, each trained as finetune trains its student; the critic for the first time in step 3, the student not in
    steps 3 and 5."""

    Config = TwoRolesConfig
    roles = ("student", "critic")
    optimizer_steps: dict[str, int] = {}

    def __init__(self, **keys: Any):
        super().__init__(**keys)
        self.role_models["critic"].init_preprocessors(self.cfg, self.data)
        for role, optimizer in self.optimizers.items():
            type(self).optimizer_steps[role] = 0
            optimizer.register_step_pre_hook(lambda *_, role=role: self.count(role))

    def count(self, role: str) -> None:
        type(self).optimizer_steps[role] += 1

    def phases(self, step: int) -> tuple[str, ...]:
        return {1: ("student",), 2: ("student",), 3: ("critic",), 5: ("critic",)}.get(step, ("student", "critic"))

    def single_train_step(self, batch: dict[str, Any], step: int, role: str):
        student, self.student = self.student, self.role_models[role]
        try:
            return super().single_train_step(batch, step, role)
        finally:
            self.student = student


class TwoRoles:
    """Runs of 6 steps of the method above."""

    def __init__(self, start: Path, cache: Path, folder: Path):
        self.cache, self.folder = cache, folder
        roles = "".join(f'[models.{role}]\ninit_from = "{start}"\n' for role in TwoRolesMethod.roles)
        (folder / "recipe.toml").write_text(f'[method]\nname = "two_roles"\n{roles}')

    def train(self, name: str, interval: int) -> Path:
        keys = {
            "job__config_file": self.folder / "recipe.toml",
            "checkpoint__interval": interval,
            "checkpoint__keep_latest_k": 0,
            "ema__start_step": 1,
            "ema__decay": 0.75,
        }
        assert train(small_arguments(self.cache, self.folder / name, **keys)) == 0
        return self.folder / name


@pytest.fixture(scope="module")
def two_roles(start, cache, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "two_roles", TwoRolesMethod)
        yield TwoRoles(start, cache, tmp_path_factory.mktemp("two-roles"))


@pytest.fixture(scope="module")
def often(two_roles):
    """Saved after every step: what a checkpoint may and may not change shows in comparison with other runs."""
    folder = two_roles.train("often", interval=1)
    assert TwoRolesMethod.optimizer_steps == {"student": 4, "critic": 4}  # no hook has fired for a save
    return folder


def assert_same_training(first: Path, second: Path) -> None:
    ours, expected = (read_checkpoint(folder / f"checkpoint/step-{STEPS}") for folder in (first, second))
    assert ours.keys() == expected.keys() and len(ours) > 7 * PARAMETERS
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, expected[name])] == []
    assert values_of(first) == values_of(second)


def test_the_average_counts_student_updates(often):
    """It moves with the student, not in steps that train the critic alone, and knows how often."""
    folders = {step: often / f"checkpoint/step-{step}" for step in range(1, STEPS + 1)}
    saved = [json.loads((folder / "state.json").read_text())["states"]["ema.student"] for folder in folders.values()]
    assert [state["num_updates"] for state in saved] == [0, 1, 1, 2, 2, 3]  # step 1 is a copy
    states = {step: read_checkpoint(folder) for step, folder in folders.items()}
    names = [name.removeprefix("ema.student.") for name in states[1] if name.startswith("ema.student.")]
    assert len(names) == PARAMETERS
    for name in names:
        average = states[1][f"roles.student.transformer.{name}"]
        for step in (2, 4, 6):
            average = 0.75 * average + 0.25 * states[step][f"roles.student.transformer.{name}"]
            torch.testing.assert_close(states[step][f"ema.student.{name}"], average, rtol=1e-6, atol=1e-7)
        for step in (3, 5):
            assert torch.equal(states[step][f"ema.student.{name}"], states[step - 1][f"ema.student.{name}"])
    moved = "roles.critic.transformer.head.head.weight"
    assert torch.equal(states[2][moved], states[1][moved]) and not torch.equal(states[3][moved], states[2][moved])


def test_saving_a_never_stepped_optimizer_changes_nothing(two_roles, often):
    """Saved while the critic has never been stepped, or only at the end: the same training, to the optimizers' counts."""
    assert_same_training(often, two_roles.train("once", interval=STEPS))
    early, late = (read_checkpoint(often / f"checkpoint/step-{step}") for step in (2, STEPS))
    assert not any(name.startswith("optimizers.critic.state") for name in early)
    assert any(name.startswith("optimizers.student.state") for name in early)
    assert late["optimizers.critic.state.head.head.weight.step"] == 4


@pytest.mark.faults
def test_a_run_resumes_from_before_an_optimizers_first_step(two_roles, often):
    """Fault 2."""
    with stopping(TwoRolesMethod, 4):
        two_roles.train("stopped", interval=2)
    assert Checkpointer(two_roles.folder / "stopped/checkpoint").steps() == [2]  # the critic's first step is the third
    assert_same_training(often, two_roles.train("stopped", interval=2))


# ---------------------------------------------------------------------------- every recipe, every key, one schedule


def settings_of(cls: type, prefix: str = "") -> set[str]:
    """The dotted names of all options below a dataclass."""
    names: set[str] = set()
    for field in dataclasses.fields(cls):
        kind = typing.get_type_hints(cls)[field.name]
        if dataclasses.is_dataclass(kind):
            names |= settings_of(kind, f"{prefix}{field.name}.")
        elif typing.get_origin(kind) is not dict and field.name != "method":
            names.add(f"{prefix}{field.name}")
    return names


class Reads:
    """Records which keys of which section the program reads, other than to check, parse, compare or print them."""

    OWN = (str(ROOT / "fvtitan"), str(ROOT / "train.py"))
    CHECKS = re.compile(r"_?check\w*|_parse\w*|to_toml|load_config|read_toml")

    def __init__(self, patch: pytest.MonkeyPatch):
        self.seen: set[tuple[type, str]] = set()
        self.sections = self._sections(JobConfig) | self._sections(RoleConfig)
        self.sections = self.sections - {MethodConfig} | {method.Config for method in SHIPPED}
        for section in self.sections:
            patch.setattr(section, "__getattribute__", self._recording(section))

    def _sections(self, cls: type) -> set[type]:
        kinds = [typing.get_type_hints(cls)[field.name] for field in dataclasses.fields(cls)]
        return {cls}.union(*(self._sections(kind) for kind in kinds if dataclasses.is_dataclass(kind)))

    def _recording(self, section: type):
        plain = section.__getattribute__

        def get(instance: Any, name: str) -> Any:
            frame = sys._getframe(1)
            if frame.f_code.co_filename.startswith(self.OWN) and (section, name) not in self.seen:
                while frame and not self.CHECKS.fullmatch(frame.f_code.co_name):
                    frame = frame.f_back
                if frame is None:
                    self.seen.add((section, name))
            return plain(instance, name)

        return get

    def unread(self) -> set[str]:
        return {
            f"{section.__name__}.{field.name}"
            for section in self.sections
            for field in dataclasses.fields(section)
            if (section, field.name) not in self.seen
        }


RECIPES = sorted(path.name for path in (ROOT / "train_configs").glob("*.toml"))


@pytest.fixture(scope="module")
def recipes(cache, heldout, tmp_path_factory):
    """Every shipped recipe for 2 steps, the large ones with the tiny network: exit statuses, folders, and what was read."""
    folder, statuses = tmp_path_factory.mktemp("recipes"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        reads = Reads(patch)
        for name in RECIPES:
            recipe = read_toml(ROOT / "train_configs" / name)
            tiny: dict[str, object] = {}
            for role, model in recipe.models.items():
                earlier = re.fullmatch(r"outputs/(.+)/checkpoint/step-\d+", model.init_from)
                if earlier:  # another recipe's student, which was just trained
                    tiny[f"models.{role}.init_from"] = folder / f"{earlier[1]}.toml" / "checkpoint/step-2"
                    tiny |= {f"models.{role}.flavor": "tiny"} if model.flavor else {}
                elif "/" in model.init_from:
                    tiny |= {f"models.{role}.init_from": "tiny-wan", f"models.{role}.flavor": "tiny"}
            size = min(recipe.training.local_batch_size, 2)
            small = {
                "job__config_file": ROOT / "train_configs" / name,
                "job__dump_folder": folder / name,
                "job__description": "",
                "data__path": cache,
                "data__pipeline": "tiny-wan",
                "data__moving_shapes_clips": 0,
                "data__num_workers": 0,
                **tiny,
                "training__steps": 2,
                "training__local_batch_size": size,
                "training__global_batch_size": 2 * size,
                "compile__enable": False,  # minutes on a CPU, and the same arithmetic
                "ema__start_step": 0,
                "lr_scheduler__warmup_steps": 0,
                "checkpoint__interval": 2 if name.startswith("wan") else 1,
                "validation__enable": not name.startswith("wan"),  # as the tiny recipe of the same method
                "validation__num_prompts": 1,
                "validation__num_prompts_last": 0,
                "validation__sampling_steps": 1,
                "validation__heldout_path": heldout if recipe.validation.heldout_path else "",
                "validation__heldout_clips": 2,
                **{f"data__{key}": value for key, value in GEOMETRY.items()},
            }
            if recipe.models["student"].name == "wan_causal" and not METHODS[recipe.method.name].needs_latents(recipe):
                small["data__num_frames"] = 21  # two blocks; the cached videos are one
            if hasattr(recipe.method, "teacher_path_cache"):
                small |= {
                    "method__teacher_path_cache": folder / f"{name}-trajectories",
                    "method__num_trajectories": 3,
                    "method__teacher_inference_steps": 4,
                }
            statuses[name] = train(
                [word for key, value in small.items() for word in (f"--{key.replace('__', '.')}", str(value))]
            )
        compiled = {"compile__enable": True, "compile__backend": "eager", "training__steps": 1}
        assert train(small_arguments(cache, folder / "compiled", **compiled)) == 0
        for kind in ("uniform", "logit_normal", "mode"):
            flow_matching.sample_sigma(torch.rand(2), flow_matching.ScheduleConfig(sigma_sampling=kind))
    return SimpleNamespace(folder=folder, statuses=statuses, reads=reads)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains(recipes, name):
    assert recipes.statuses[name] == 0
    folder = recipes.folder / name
    rows = read_metrics(folder / "metrics.jsonl")
    assert rows[-1]["step"] == 2 and "loss/student" in rows[0]
    assert all(value > 0 for row in rows for key, value in row.items() if key.startswith("loss/"))
    if name.startswith("wan"):
        assert Checkpointer(folder / "checkpoint").steps() == [2]
        return
    assert Checkpointer(folder / "checkpoint").steps() == [1, 2]
    assert list((folder / "validation/step-2/student").glob("*.mp4"))
    first, last = (read_checkpoint(folder / f"checkpoint/step-{step}") for step in (1, 2))
    moved = [name for name in first if name.startswith("roles.") and not torch.equal(first[name], last[name])]
    assert len(moved) >= (80 if "lora" in name else 101)  # of adapters, those of the critic


def test_every_key_is_read_by_a_run(recipes):
    """Reading a key to check it, or to print the configuration, does not count."""
    methods = ("DiffusionForcingSFT", "KDCausal", "SelfForcing")
    only_checked = {f"{name}Config.num_frames_per_block" for name in methods}  # must agree with models.student's
    assert recipes.reads.unread() == only_checked
    assert len(recipes.reads.seen) > 80


@pytest.fixture
def built(start, cache, heldout, tmp_path, single_process_group):
    """A method and a validator as train.py makes them, with shift 4.5."""
    keys = {"schedule__shift": 4.5, "method__loss_weighting": "bell", "training__max_norm": MAX_NORM}
    cfg = load_config(validated(start, cache, heldout, tmp_path, **keys))
    roles = build_roles(cfg, Mesh(cfg, "cpu"), torch.device("cpu"))
    method = FineTuneMethod(cfg=cfg, role_models=roles)
    method.on_train_start()
    logged: dict[str, float] = {}
    ignored = {"add_video": lambda *a, **k: None, "add_text": lambda *a: None}
    metrics = SimpleNamespace(log=lambda step, values: logged.update(values), **ignored)
    return SimpleNamespace(
        cfg=cfg, method=method, logged=logged, validator=Validator(cfg, method, metrics, torch.device("cpu"))
    )


def test_one_shift_for_everything(built, monkeypatch):
    """All users read the one object: after it changes, training, its loss weight, the held-out loss and the sampler follow."""
    assert [name for name in settings_of(JobConfig) | settings_of(RoleConfig) if "shift" in name] == ["schedule.shift"]
    assert built.method.student.schedule is built.cfg.schedule
    built.cfg.schedule.shift = 1.75
    u = torch.tensor([[0.3], [0.8]])
    shifted = 1.75 * u / (1 + 0.75 * u)
    torch.testing.assert_close(built.method.draw_sigma(u, 3), shifted.expand(2, 3))

    weighted, seen = [], {}
    weight_of, sample_of = flow_matching.loss_weight, samplers.sample
    monkeypatch.setattr(flow_matching, "loss_weight", lambda *a: weighted.append(a[2]) or weight_of(*a))
    monkeypatch.setattr(
        samplers, "sample", lambda model, spec, *a: seen.update(spec=spec) or sample_of(model, spec, *a)
    )
    batch = next(BatchStream(built.method.data, global_batch_size=4, local_batch_size=2, seed=0))
    built.method.single_train_step(batch, 1, "student")
    assert weighted == [1.75]

    built.validator.run(1, None, last=False)
    levels = [1.75 * q / (1 + 0.75 * q) for q in ((i + 0.5) / 9 for i in range(9))]
    logged = sorted(float(key.split("sigma_")[1]) for key in built.logged if "sigma_" in key)
    assert logged == pytest.approx(levels, abs=6e-4)
    assert seen["spec"].sigmas == (1.0, 0.0)
    built.cfg.validation.sampling_steps = 4
    expected = [1.75 * q / (1 + 0.75 * q) for q in (1, 0.75, 0.5, 0.25, 0)]
    assert built.method.sampler(built.cfg).sigmas == pytest.approx(expected)
    assert METHODS["dfsft"].sampler(built.cfg).sigmas == pytest.approx(expected)


def test_validation_samples_as_the_method_says(built, monkeypatch):
    """The ladder, the guidance and the solver are the method's own, whatever they are."""
    seen, sample_of = [], samplers.sample
    monkeypatch.setattr(
        samplers, "sample", lambda model, spec, *a: seen.append((model, spec)) or sample_of(model, spec, *a)
    )
    spec = samplers.SamplerSpec(sigmas=(1.0, 0.7, 0.2, 0.0), guidance_scale=1.5)
    monkeypatch.setattr(FineTuneMethod, "sampler", classmethod(lambda cls, cfg: spec))
    built.validator.run(1, None, last=False)
    assert seen == [(built.method.student, spec)] * 2  # batches of 2 and 1


def test_what_validation_needs_leaves_memory(built, monkeypatch):
    """The text encoder at once, though train.py collects no garbage by then; the KV cache of a streamed sample."""
    encoders, made, released = [], TextEncoder.__init__, []
    monkeypatch.setattr(
        TextEncoder, "__init__", lambda self, *a, **k: encoders.append(weakref.ref(self)) or made(self, *a, **k)
    )
    counts, encode = [], TextEncoder.encode
    monkeypatch.setattr(
        TextEncoder, "encode", lambda self, prompts: counts.append(len(prompts)) or encode(self, prompts)
    )
    monkeypatch.setattr(built.cfg.validation, "num_prompts", 11)
    gc.disable()
    try:
        validator = Validator(built.cfg, built.method, built.validator.metrics, torch.device("cpu"))
        assert [ref() for ref in encoders] == [None] and counts[-2:] == [8, 3] and len(validator.embeds) == 11
    finally:
        gc.enable()
    monkeypatch.setattr(type(built.method.student), "release_cache", lambda model: released.append(model))
    built.validator.run(2, None, last=False)
    assert released == [built.method.student]


def test_the_table_above_names_tests_that_exist():
    named = re.findall(r"\| ([\w/]+\.py)::(\w+)$", __doc__, re.MULTILINE)
    assert len(named) >= 20
    for file, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE), f"{file}::{test}"
    rows = [row for row in __doc__.splitlines() if row.startswith("| ")][1:]
    assert all("::test_" in row or set(row) <= set("| -") for row in rows)


def test_a_closed_checkpointer_leaves_no_thread(tmp_path, single_process_group):
    """gloo's threads need the GIL to let go of a collective's tensors: one that is late aborts a process that is ending."""

    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    before = threads()
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, {"train_state": TrainState(1)})
    assert threads() > before
    checkpointer.close()
    assert threads() == before
