"""train.py itself: resume, topology, precision, failures."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fvtitan.components.metrics import read_metrics
from fvtitan.components.rng import fold
from fvtitan.components.stops import read_status
from fvtitan.components.validation import Validator, forget_validations, is_validated
from fvtitan.config import load_config
from fvtitan.data.dataloader import GlobalBatchSampler
from fvtitan.data.latent_cache import LatentCache
from fvtitan.errors import UserError
from fvtitan.flops import phase_flops
from fvtitan.methods import METHODS
from fvtitan.methods.dmd2 import DMD2Method
from fvtitan.methods.finetune import FineTuneMethod
from fvtitan.methods.passes import Pass
from fvtitan.models.wan.flops import forward_flops
from fvtitan.models.wan.transformer import FLAVORS
from tests.helpers import (
    ROOT,
    causal_recipe,
    dmd2_recipe,
    make_cache,
    one_layer,
    read_checkpoint,
    small_arguments,
    stopping,
    train,
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("data") / "cache", num_samples=10)


def small(cache: Path, folder: Path, **keys: Any) -> list[str]:
    """Of a student of one layer."""
    return small_arguments(cache, folder, **{**one_layer(cache.parent), **keys})


def torchrun(ranks: int, arguments: list[str], script: str = "train.py") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def training_values(folder) -> list[dict[str, float]]:
    """metrics.jsonl without what the clock decides."""
    records = read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in record.items() if not key.startswith("perf/")} for record in records]


def assert_same_checkpoint(first, second) -> None:
    a, b = read_checkpoint(first), read_checkpoint(second)
    assert a.keys() == b.keys() and len(a) > 100
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name
    assert json.loads((first / "state.json").read_text()) == json.loads((second / "state.json").read_text())


@pytest.mark.faults
@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_stopped_run_resumes_bit_for_bit(cache, tmp_path, workers):
    """Fault 1."""
    # 6 steps of 4 samples over 10: the stop lies in the middle of an epoch, and the run crosses epochs.
    keys = {"training__global_batch_size": 4, "data__num_workers": workers}
    assert train(small(cache, tmp_path / "whole", **keys)) == 0

    with stopping(FineTuneMethod, 4):
        train(small(cache, tmp_path / "stopped", **keys))
    assert train(small(cache, tmp_path / "stopped", **{**keys, "data__num_workers": 0})) == 0

    assert_same_checkpoint(tmp_path / "whole/checkpoint/step-6", tmp_path / "stopped/checkpoint/step-6")
    values = training_values(tmp_path / "whole")
    assert [record["step"] for record in values] == [1, 2, 3, 4, 5, 6]
    assert values == training_values(tmp_path / "stopped")


def test_a_finished_job_says_so(cache, tmp_path, capsys):
    arguments = small(cache, tmp_path, training__steps=2, checkpoint__interval=2)
    assert train(arguments) == 0
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert train(arguments) == 0
    assert "this job is finished: 2 of 2 steps are done" in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_training_without_checkpoints_is_the_same_training(cache, tmp_path):
    """Saving changes nothing: no fake optimizer step, no draw from a stream."""
    assert train(small(cache, tmp_path / "often", checkpoint__interval=1)) == 0
    assert train(small(cache, tmp_path / "never", checkpoint__enable=False)) == 0
    assert training_values(tmp_path / "often") == training_values(tmp_path / "never")


@pytest.mark.slow
@pytest.mark.parametrize("defer", [False, True])
def test_one_rank_accumulating_equals_two_ranks(cache, tmp_path, defer):
    """1 rank x accumulation 2, 1 rank with twice the batch, and 2 ranks train the same model."""
    # From trained weights: a fresh bias is all AdamW's steps, which amplify rounding where a gradient vanishes.
    keys = {"training__global_batch_size": 4, "checkpoint__interval": 6, "parallelism__defer_grad_sync": defer}
    keys["models.student.init_from"] = "tiny-wan"
    assert train(small_arguments(cache, tmp_path / "accumulated", **keys)) == 0
    whole = {**keys, "training__local_batch_size": 4}
    assert train(small_arguments(cache, tmp_path / "whole", **whole)) == 0
    done = torchrun(2, small_arguments(cache, tmp_path / "ranks", **keys))
    assert done.returncode == 0, done.stderr[-3000:]
    reference = training_values(tmp_path / "whole")
    weights = read_checkpoint(tmp_path / "whole/checkpoint/step-6")
    for name in ("accumulated", "ranks"):
        for expected, record in zip(reference, training_values(tmp_path / name), strict=True):
            assert record == pytest.approx(expected, rel=1e-5), name
        for key, tensor in read_checkpoint(tmp_path / name / "checkpoint/step-6").items():
            if key.startswith(("roles.", "ema.")):
                assert (tensor - weights[key]).norm() <= 1e-5 * weights[key].norm(), (name, key)


@pytest.mark.slow
@pytest.mark.parametrize("teacher_forcing", [False, True])
def test_diffusion_forcing_is_the_same_on_two_ranks_and_with_checkpointing(cache, tmp_path, teacher_forcing):
    keys = {
        "job__config_file": causal_recipe(tmp_path),
        "method__teacher_forcing": teacher_forcing,
        "method__context_noise_max": 20.0 if teacher_forcing else 0.0,
        "activation_checkpoint__mode": "full",
        "training__global_batch_size": 4,
        "training__steps": 2,
        "lr_scheduler__warmup_steps": 0,
        "checkpoint__interval": 2,
    }
    assert train(small_arguments(cache, tmp_path / "accumulated", **keys)) == 0
    kept = {**keys, "activation_checkpoint__mode": "none"}
    assert train(small_arguments(cache, tmp_path / "kept", **kept)) == 0
    done = torchrun(2, small_arguments(cache, tmp_path / "ranks", **keys))
    assert done.returncode == 0, done.stderr[-3000:]
    reference = training_values(tmp_path / "accumulated")
    assert len(reference) == 2 and reference[0]["loss/student"] > 0.1 and reference[1]["grad_norm/student"] > 0
    weights = read_checkpoint(tmp_path / "accumulated/checkpoint/step-2")
    assert training_values(tmp_path / "kept") == reference
    for expected, record in zip(reference, training_values(tmp_path / "ranks"), strict=True):
        assert record == pytest.approx(expected, rel=1e-5)
    for key, tensor in read_checkpoint(tmp_path / "ranks/checkpoint/step-2").items():
        if key.startswith(("roles.", "ema.")):
            assert (tensor - weights[key]).norm() <= 1e-5 * weights[key].norm() + 1e-6, key


@pytest.mark.slow
@pytest.mark.faults
def test_resume_on_another_number_of_ranks(cache, tmp_path):
    """Fault 21. 2 -> 1 -> 2 ranks: parameters, optimizer and EMA are exact at load, and the data goes on where it stopped."""
    keys = {"training__global_batch_size": 4, "checkpoint__interval": 2, "checkpoint__keep_latest_k": 0}
    assert train(small_arguments(cache, tmp_path / "one", **keys)) == 0
    for ranks, last in ((2, 2), (1, 4), (2, 6)):
        folder = tmp_path / "mixed"
        done = torchrun(ranks, small_arguments(cache, folder, **keys))
        assert done.returncode == 0, done.stderr[-3000:]
        for step in range(last + 1, 7):  # as if it had been stopped at `last`
            shutil.rmtree(folder / f"checkpoint/step-{step}", ignore_errors=True)
    assert training_values(tmp_path / "mixed")[-1]["step"] == 6
    for expected, record in zip(training_values(tmp_path / "one"), training_values(tmp_path / "mixed"), strict=True):
        assert record["loss/student"] == pytest.approx(expected["loss/student"], rel=1e-6)
        assert record == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data__path": "nowhere"}, "data.path: the cache nowhere does not exist"),
        ({"data__num_frames": 13}, "data.num_frames = 13, but the cache"),
        ({"models.student.init_from": "nowhere"}, "'nowhere' is neither 'tiny-wan', nor a folder, nor a hub id"),
        ({"checkpoint__require_resume": True}, "require_resume"),
        ({"training__global_batch_size": 3}, "training.global_batch_size = 3"),
    ],
)
def test_bad_input_is_one_line_and_status_2(cache, tmp_path, capsys, overrides, message):
    assert train(small_arguments(cache, tmp_path, **overrides)) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and message in error[0]


def test_flex_attention_cannot_train_on_a_cpu(cache, tmp_path, capsys):
    recipe = {"job__config_file": causal_recipe(tmp_path), "models.student.attention_backend": "flex"}
    assert train(small_arguments(cache, tmp_path / "run", **recipe)) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and 'models.student.attention_backend = "flex"' in error[0]


@pytest.mark.faults
def test_nothing_is_updated_when_the_gradient_is_not_finite(cache, tmp_path, monkeypatch):
    """Fault 23."""
    step_of = FineTuneMethod.single_train_step

    def diverges(self, batch, step, role):
        loss, metrics = step_of(self, batch, step, role)
        return (loss * float("nan") if step == 3 else loss), metrics

    monkeypatch.setattr(FineTuneMethod, "single_train_step", diverges)
    with pytest.raises(
        FloatingPointError, match="step 3: not finite: the loss of the student on rank 0; the gradient norm"
    ):
        train(small(cache, tmp_path, checkpoint__interval=1))
    steps = sorted(path.name for path in (tmp_path / "checkpoint").glob("step-*"))
    assert steps == ["step-1", "step-2"]


def test_training_imports_no_encoder(cache, tmp_path):
    """A machine that only trains needs neither diffusers nor transformers nor PyAV, and starts faster."""
    arguments = small_arguments(cache, tmp_path, training__steps=1)
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['train.py', *{arguments!r}]\n"
        "try:\n    runpy.run_path('train.py', run_name='__main__')\n"
        "except SystemExit as e:\n    assert not e.code, e.code\n"
        "found = {'diffusers', 'transformers', 'av'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.faults
def test_a_changed_key_is_refused_with_both_values_or_takes_effect(cache, tmp_path, capsys):
    """Fault 19. What decides what is learned; nothing of the run is touched by the refusal. With leave, the new learning rate
    is used from the next step on, at the schedule's position, and the weight decay by every matrix."""
    keys = {"training__steps": 4, "checkpoint__interval": 2}
    assert train(small(cache, tmp_path, **keys)) == 0
    shutil.rmtree(tmp_path / "checkpoint/step-4")

    def trained() -> dict[Path, bytes]:
        """Everything but who had the folder last, and how that ended."""
        paths = (path for path in tmp_path.rglob("*") if path.is_file() and path.name not in ("lock", "status.json"))
        return {path: path.read_bytes() for path in paths}

    before = trained()
    changed = {**keys, "optimizer__lr": 2e-3, "optimizer__weight_decay": 0.5, "ema__decay": 0.7}
    capsys.readouterr()
    assert train(small(cache, tmp_path, **changed)) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert (
        "step-2 was made with ema.decay = 0.8 (now 0.7), optimizer.lr = 0.001 (now 0.002), optimizer.weight_decay"
        in error
    )
    assert trained() == before and read_status(tmp_path)["state"] == "failed"

    allowed = ["ema.decay", "optimizer.lr", "optimizer.weight_decay"]
    assert train([*small(cache, tmp_path, **changed), "--checkpoint.allow_changed", *allowed]) == 0
    assert "changed since the checkpoint, as allowed: optimizer.lr, 0.001 -> 0.002" in capsys.readouterr().out
    lr = [record["lr/student"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert lr[2] == pytest.approx(2 * 1e-3) and lr[3] == pytest.approx(2e-3 / 2)  # cosine: 1 and 1/2 of the peak
    groups = json.loads((tmp_path / "checkpoint/step-4/state.json").read_text())["states"]["optimizers.student"]
    assert sorted(group["weight_decay"] for group in groups["param_groups"]) == [0.0, 0.5]


@pytest.mark.faults
def test_a_validation_that_failed_after_the_last_step_is_made_up_for(cache, tmp_path, monkeypatch, capsys):
    """All steps are done and saved; only the validation is made, and then the job is finished."""
    keys = {"validation__enable": True, "validation__num_prompts": 1, "validation__sampling_steps": 1}
    arguments = small(cache, tmp_path, **keys, training__steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(Validator, "_write", lambda *_: (_ for _ in ()).throw(UserError("no room")))
        assert train(arguments) == 2
    assert read_status(tmp_path)["reason"] == "no room"
    monkeypatch.setattr(FineTuneMethod, "single_train_step", None)
    assert train(arguments) == 0
    assert list((tmp_path / "validation/step-2/ema").glob("*.mp4")) and read_status(tmp_path)["state"] == "finished"
    assert "this job is finished" not in capsys.readouterr().out
    before = [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert train(arguments) == 0 and "this job is finished" in capsys.readouterr().out
    assert before == [1, 2] == [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert is_validated(tmp_path, 2)
    forget_validations(tmp_path, after=1)
    assert not is_validated(tmp_path, 2)


@pytest.mark.faults
def test_the_average_may_be_switched_off_and_on(cache, tmp_path, capsys):
    """Fault 19. Switched on, it begins as a copy of the student that the checkpoint holds."""

    def run(steps: int, average: bool, *more: str) -> int:
        keys = {"ema__enable": average, "ema__start_step": 0, "checkpoint__interval": 1, "training__steps": steps}
        return train([*small(cache, tmp_path, **keys), *more])

    allowed = ("--checkpoint.allow_changed", "ema.enable")
    assert run(1, True) == 0 and run(2, False) == 2
    assert "ema.enable = True (now False)" in capsys.readouterr().err
    assert run(2, False, *allowed) == 0 and run(3, True, *allowed) == 0
    old, new = (read_checkpoint(tmp_path / f"checkpoint/step-{step}") for step in (2, 3))
    averages = [name for name in new if name.startswith("ema.")]
    assert averages and not [name for name in old if name.startswith("ema.")]
    for name in averages:
        own = name.replace("ema.student", "roles.student.transformer")
        torch.testing.assert_close(new[name], torch.lerp(old[own], new[own], 0.2))


@pytest.mark.faults
def test_an_allowed_key_must_exist(cache, tmp_path, capsys):
    """Fault 19."""
    assert train(small(cache, tmp_path, training__steps=1)) == 0
    arguments = small(cache, tmp_path, training__steps=2)
    assert train([*arguments, "--checkpoint.allow_changed", "optimizer.rl"]) == 2
    assert "'optimizer.rl' is not a key of this run. Did you mean 'optimizer.lr'" in capsys.readouterr().err


@pytest.mark.faults
def test_keys_of_execution_may_change(cache, tmp_path):
    """Fault 20. Workers, batch split, checkpointing of activations, validation, logging, the number of steps."""
    assert train(small(cache, tmp_path / "whole", training__steps=4, training__global_batch_size=2)) == 0
    assert train(small(cache, tmp_path / "split", training__steps=2, training__global_batch_size=2)) == 0
    other = {
        "training__steps": 4,
        "training__local_batch_size": 1,
        "training__global_batch_size": 2,
        "data__num_workers": 1,
        "activation_checkpoint__mode": "full",
        "models.student.parallelism.fsdp_reshard_after_forward": False,
        "metrics__log_freq": 2,
        "lr_scheduler__decay_type": "cosine",
    }
    assert train(small(cache, tmp_path / "split", **other)) == 0
    assert len(read_metrics(tmp_path / "split/metrics.jsonl")) == 4


@pytest.mark.parametrize("method", ["finetune", pytest.param("dfsft", marks=pytest.mark.slow), "dmd2"])
def test_a_cache_of_several_sizes(tmp_path, method):
    """Every bucket is trained on, tokens and FLOPs are those of each phase's own clips, and the held-out loss does not depend
    on which clips share a forward."""
    mixed = make_cache(tmp_path / "cache", 15, num_portrait=4, num_long=5)
    recipe = {"dfsft": causal_recipe(tmp_path), "finetune": ""}.get(method)
    if recipe is None:
        recipe = dmd2_recipe(tmp_path, student_update_interval=2, rollout="data")
    keys = {
        "training__global_batch_size": 4,
        "checkpoint__enable": False,
        "ema__enable": False,
        "metrics__peak_tflops": 2.0,
        "validation__enable": method != "dmd2",
        "validation__num_prompts": 1,
        "validation__sampling_steps": 1,
        **({"job__config_file": recipe} if recipe else {}),
        **({"validation__heldout_path": mixed, "validation__heldout_clips": 12} if method != "dmd2" else {}),
    }
    rows = {}
    for local in (1, 4) if method == "finetune" else (2,):
        arguments = small_arguments(mixed, tmp_path / f"run{local}", **keys, training__local_batch_size=local)
        assert train(arguments) == 0
        rows[local] = read_metrics(tmp_path / f"run{local}/metrics.jsonl")
    losses = [rows[local][-1]["validation/loss"] for local in rows if method != "dmd2"]
    assert losses == pytest.approx(losses[:1] * len(losses), rel=1e-5)
    cfg, sizes, seen = load_config(arguments), dict.fromkeys(DMD2Method.roles, FLAVORS["tiny"]), set()
    data = LatentCache(mixed)
    order, number = GlobalBatchSampler(data.bucket_indices, 4, seed=0), 0
    for row in rows[local]:
        done = tokens = 0
        for role in ("student", "critic")[row["step"] % 2 == 0 :] if method == "dmd2" else ("student",):
            frames, _, height, width = data.bucket_shapes[order.batch(number).bucket]
            number += 1
            seen.add((frames, height))
            rungs = [fold(cfg.training.seed, row["step"], role, "exit_rung") % 4] if method == "dmd2" else []
            passes = METHODS[method].passes(cfg.with_latent_size(frames, height, width), role, rungs)
            assert {p.num_frames for p in passes} == {frames}
            done += 4 * phase_flops(cfg, passes, sizes, height, width).model
            tokens += 4 * frames * height
        assert row["perf/tokens_per_second"] * row["perf/step_seconds"] == pytest.approx(tokens)
        assert 1e12 * row["perf/tflops_per_device"] * row["perf/step_seconds"] == pytest.approx(done, rel=1e-9)
    assert seen == {(3, 4), (3, 6), (5, 4)}


def test_flops_of_a_run(tmp_path, capsys):
    """Those of every phase that ran: by the shape of its batch, and by its exit."""
    two_shapes = make_cache(tmp_path / "cache", 12, num_portrait=6)
    keys = {"checkpoint__enable": False, "training__global_batch_size": 4, "metrics__peak_tflops": 2.0}
    assert train(small_arguments(two_shapes, tmp_path / "sft", **keys, activation_checkpoint__mode="full")) == 0
    assert re.search(r"^attention: flash, the first that can of cudnn > flash ", capsys.readouterr().out, re.MULTILINE)
    seen = set()
    for row in read_metrics(tmp_path / "sft/metrics.jsonl"):
        tokens = round(row["perf/tokens_per_second"] * row["perf/step_seconds"] / 4)
        flops = forward_flops(Pass("student", 3), FLAVORS["tiny"], None, {12: 4, 18: 6}[tokens], 4)
        done = 1e12 * row["perf/tflops_per_device"] * row["perf/step_seconds"]
        assert done == pytest.approx(4 * 3 * flops.total, rel=1e-9)
        assert row["perf/hfu"] / row["perf/mfu"] == pytest.approx(1 + flops.recomputed("full") / (3 * flops.total))
        seen.add(tokens)
    assert seen == {12, 18}

    recipe, sizes = dmd2_recipe(tmp_path, student_update_interval=2), dict.fromkeys(DMD2Method.roles, FLAVORS["tiny"])
    arguments = small_arguments(two_shapes, tmp_path / "dmd2", job__config_file=recipe, **keys)
    assert train(arguments) == 0
    cfg, seen = load_config(arguments), set()
    for row in read_metrics(tmp_path / "dmd2/metrics.jsonl"):
        done = 0.0
        for role in ("student", "critic")[row["step"] % 2 == 0 :]:
            rung = fold(cfg.training.seed, row["step"], role, "exit_rung") % 4
            done += 4 * phase_flops(cfg, DMD2Method.passes(cfg, role, [rung]), sizes, 4, 4).model
            seen.add(rung)
        assert 1e12 * row["perf/tflops_per_device"] * row["perf/step_seconds"] == pytest.approx(done, rel=1e-9)
    assert len(seen) > 1
