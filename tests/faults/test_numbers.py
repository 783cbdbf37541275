"""Numbers that go wrong: not finite, or far from those before. Numbers of faults: docs/reliability.md."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fvtitan.components.checkpoint import Checkpointer
from fvtitan.components.metrics import MetricLogger, read_metrics
from fvtitan.components.spikes import READINGS, WINDOW
from fvtitan.components.stops import read_status
from tests.helpers import (
    dmd2_recipe,
    make_cache,
    one_layer,
    read_checkpoint,
    self_forcing_recipe,
    small_arguments,
    train,
)
from tests.integration.exact_worker import launch, output
from tests.integration.test_train import assert_same_checkpoint, training_values


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("data") / "cache", 10)


@pytest.fixture
def expect(monkeypatch):
    """Arms faults for the runs of this process."""
    monkeypatch.setenv("FVTITAN_TEST", "1")
    monkeypatch.setenv("FVTITAN_FAULTS", "")
    return lambda text: monkeypatch.setenv("FVTITAN_FAULTS", text)


def expect_faults(folder: Path, *, faults: str) -> None:
    """The same in a rank that `launch` starts."""
    os.environ.update(FVTITAN_TEST="1", FVTITAN_FAULTS=faults)


def arguments_of(cache: Path, folder: Path, **keys: Any) -> list[str]:
    keys = {
        "training__steps": 4,
        "training__global_batch_size": 4,
        "checkpoint__interval": 1,
        "checkpoint__keep_latest_k": 0,
        **keys,
    }
    if "job__config_file" not in keys:
        keys |= one_layer(cache.parent)
    return small_arguments(cache, folder / "run", **keys)


def skipping(max_skips: int = 5) -> dict[str, Any]:
    return {"training__nonfinite": "skip", "training__max_nonfinite_skips": max_skips}


def saved(folder: Path, step: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    checkpoint = folder / f"run/checkpoint/step-{step}"
    return read_checkpoint(checkpoint), json.loads((checkpoint / "state.json").read_text())["states"]


def unlike(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], prefix: str = "") -> list[str]:
    assert before.keys() == after.keys()
    return [name for name in before if name.startswith(prefix) and not torch.equal(before[name], after[name])]


def assert_step_changed_nothing(folder: Path, step: int, skips: int) -> None:
    """But the position in the data, the generators and the count: neither weights, moments, average nor schedule."""
    (before, plain_before), (after, plain) = saved(folder, step - 1), saved(folder, step)
    assert {name.split(".")[0] for name in unlike(before, after)} == {"random_state"}  # seeded anew for every draw
    assert plain["train_state"] == {"step": step, "nonfinite_skips": skips}
    changed = {name for name in plain if plain[name] != plain_before[name]}
    assert changed == {"train_state", "dataloader"}


# ------------------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize(
    "fault",
    ["inf loss", "nan gradient", *(pytest.param(f, marks=pytest.mark.slow) for f in ("nan loss", "inf gradient"))],
)
def test_a_skipped_update_leaves_everything_as_it_was(cache, tmp_path, expect, capsys, fault):
    """Fault 23, 24. A loss that is not finite has finite derivatives here: it is seen by itself."""
    expect(f"{fault} step=3")
    assert train(arguments_of(cache, tmp_path, **skipping())) == 0
    assert_step_changed_nothing(tmp_path, 3, 1)
    assert unlike(saved(tmp_path, 3)[0], saved(tmp_path, 4)[0], "roles.") != []
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [row["nonfinite_skips"] for row in rows] == [0, 0, 1, 1]
    said = capsys.readouterr().out
    assert "WARNING, step 3: not finite: " in said and "the student was not updated; skipped, 1 of at most 5" in said


def test_what_is_not_finite_on_one_rank_is_skipped_on_all(cache, tmp_path):
    """Fault 23. All samples of the step are named."""
    arguments = arguments_of(cache, tmp_path, **skipping())
    statuses = launch(2, arguments, tmp_path, watcher=expect_faults, faults="nan loss step=3 rank=1")
    assert statuses == [0, 0], output(tmp_path)
    assert_step_changed_nothing(tmp_path, 3, 1)
    said = (tmp_path / "rank0.log").read_text()
    assert "not finite: the loss of the student on rank 1; the gradient norm of the student is nan" in said
    (first, second) = (line for line in said.splitlines() if line.startswith("  rank "))
    assert "  rank 0: loss " in first and "nan" not in first and "  rank 1: loss nan, samples: " in second
    assert sum(len(line.split("samples: ")[1].split(", ")) for line in (first, second)) == 4


def test_one_rank_halts_all(cache, tmp_path):
    """Fault 23."""
    statuses = launch(
        2, arguments_of(cache, tmp_path), tmp_path, watcher=expect_faults, faults="inf gradient step=3 rank=1"
    )
    assert statuses == [1, 1], output(tmp_path)
    status = read_status(tmp_path / "run")
    assert (status["state"], status["step"], status["exit_code"]) == ("failed", 2, 1)
    assert status["reason"].startswith(
        "FloatingPointError: step 3: not finite: the gradient norm of the student is inf"
    )
    assert Checkpointer(tmp_path / "run/checkpoint").steps() == [1, 2]


@pytest.mark.slow
def test_skips_are_counted_over_resumes_and_bounded(cache, tmp_path, expect):
    """Fault 23: limit exceeded."""
    expect("nan loss times=0 step=1; nan loss times=0 step=4")  # both micro-batches of a step
    assert train(arguments_of(cache, tmp_path, training__steps=2, **skipping(1))) == 0
    with pytest.raises(FloatingPointError, match=r"step 4: .*training.max_nonfinite_skips = 1 were skipped before"):
        train(arguments_of(cache, tmp_path, training__steps=6, **skipping(1)))
    assert Checkpointer(tmp_path / "run/checkpoint").steps() == [1, 2, 3]
    assert train(arguments_of(cache, tmp_path, training__steps=6, **skipping(2))) == 0
    assert saved(tmp_path, 6)[1]["train_state"] == {"step": 6, "nonfinite_skips": 2}


@pytest.mark.slow
def test_a_run_with_skips_resumes_bit_for_bit(cache, tmp_path, expect):
    """Fault 23."""
    expect("nan loss step=2; inf gradient step=5")
    for name, stops in (("whole", [6]), ("resumed", [2, 3, 6])):
        for steps in stops:
            keys = {"lr_scheduler__decay_type": "constant", "training__steps": steps, **skipping()}
            assert train(arguments_of(cache, tmp_path / name, **keys)) == 0
    whole, resumed = tmp_path / "whole/run", tmp_path / "resumed/run"
    assert_same_checkpoint(whole / "checkpoint/step-6", resumed / "checkpoint/step-6")
    assert str(training_values(whole)) == str(training_values(resumed))  # nan is not itself
    assert saved(tmp_path / "resumed", 6)[1]["schedulers.student"]["last_epoch"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("role", ["student", "critic"])
def test_the_other_roles_phase_goes_on(cache, tmp_path, expect, role):
    """Fault 24. Of the two phases of a step, the one that is not finite changes nothing of its role, the other one all."""
    expect("inf gradient step=2" if role == "student" else "inf gradient step=3")
    recipe = dmd2_recipe(tmp_path, student_update_interval=1 if role == "student" else 3)
    keys = {"job__config_file": recipe, "training__steps": 3, "training__global_batch_size": 2, **skipping()}
    assert train(arguments_of(cache, tmp_path, **keys)) == 0
    step = 2 if role == "student" else 3
    (before, plain_before), (after, plain) = saved(tmp_path, step - 1), saved(tmp_path, step)
    for kind in ("roles", "optimizers"):
        assert unlike(before, after, f"{kind}.{role}.") == []
    assert plain[f"schedulers.{role}"] == plain_before[f"schedulers.{role}"]
    if role == "student":
        assert unlike(before, after, "ema.") == []
        assert unlike(before, after, "roles.critic.") != []
        assert plain["schedulers.critic"] != plain_before["schedulers.critic"]


@pytest.mark.slow
def test_a_loss_whose_gradient_is_replayed_is_seen_too(cache, tmp_path, expect):
    """Fault 24."""
    expect("inf loss step=2")
    recipe = self_forcing_recipe(tmp_path, gradient_mode="replay", student_update_interval=1)
    keys = {"job__config_file": recipe, "training__steps": 2, "training__global_batch_size": 2, **skipping()}
    assert train(arguments_of(cache, tmp_path, **keys)) == 0
    before, after = saved(tmp_path, 1)[0], saved(tmp_path, 2)[0]
    assert unlike(before, after, "roles.student.") == [] and unlike(before, after, "roles.critic.") != []


# ----------------------------------------------------------------------------------------------------- spikes


def test_a_spike_is_said_and_trained_on(cache, tmp_path, expect, capsys):
    """Fault 25."""
    expect(f"spike loss step={READINGS + 2}")
    keys = {"training__steps": READINGS + 3, "training__global_batch_size": 2, "checkpoint__enable": False}
    assert train(arguments_of(cache, tmp_path, **keys)) == 0
    warnings = sorted(line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING"))
    assert [line.split(" is ")[0] for line in warnings] == [
        f"WARNING, step {READINGS + 2}: {name}/student" for name in ("grad_norm", "loss")
    ]
    assert f"times its median of the last {READINGS + 1} logged steps" in warnings[0]
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert rows[-2]["loss/student"] > 500 and rows[-1]["nonfinite_skips"] == 0


def values_at(step: int) -> dict[str, float]:
    """A falling, noisy loss; spikes of two logged steps, a gradient that is not finite, and a smaller spike."""
    noise = 0.3 * torch.randn(1, generator=torch.Generator().manual_seed(step)).item()
    loss = math.exp(noise - step / 500) * (50 if step in (200, 201) else 4 if step == 300 else 1)
    return {"loss/student": loss, "grad_norm/student": math.nan if step == 250 else 2.0, "lr/student": 10.0 * step}


def test_a_resumed_run_warns_of_the_same_spikes(tmp_path, capsys):
    """Fault 25. The window is read from metrics.jsonl, and no checkpoint has to hold it."""
    said = {}
    for name, parts in (("whole", [400]), ("resumed", [199, 200, 290, 400])):
        first = 1
        for last in parts:
            logger = MetricLogger(tmp_path / name, total_steps=400, resume_step=first - 1, enable_tensorboard=False)
            for step in range(first, last + 1):
                logger.log_step(step, values_at(step))
            logger.close()
            first = last + 1
        said[name] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    assert WINDOW < 199 and said["whole"] == said["resumed"]
    (warning,) = said["whole"]
    assert warning.startswith("WARNING, step 200: loss/student is ")
