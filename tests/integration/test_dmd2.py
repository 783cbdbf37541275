"""DMD2 in train.py: stops, ranks, other teachers, broken values, and that collapse is noticed."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fvtitan.components.checkpoint import Checkpointer
from fvtitan.components.metrics import read_metrics
from fvtitan.components.stateful import ModelState, OptimizerState, RandomState, SchedulerState, TrainState
from fvtitan.methods.dmd2 import DMD2Method
from fvtitan.models.wan import weights
from fvtitan.models.wan.transformer import WanConfig
from tests.dmd2_oracles import parameters_of
from tests.helpers import dmd2_recipe, make_cache, random_transformer, read_checkpoint, small_arguments, stopping, train
from tests.integration.dmd2_worker import watch
from tests.integration.exact_worker import launch, output, records

SIZES = WanConfig(num_layers=1, num_heads=2, head_dim=16, ffn_dim=48, text_dim=64, text_len=32, freq_dim=32)
LARGER = WanConfig(num_layers=2, num_heads=4, head_dim=16, ffn_dim=96, text_dim=64, text_len=32, freq_dim=32)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A cache, and weights for all roles; the teacher is larger than the others."""
    folder = tmp_path_factory.mktemp("dmd2")
    models: dict[str, dict[str, object]] = {}
    for seed, role in enumerate((*DMD2Method.roles, "other")):
        sizes = LARGER if role in ("teacher", "other") else SIZES
        weights.save_transformer(
            random_transformer(sizes, seed=seed).state_dict(), sizes, folder / role / "transformer"
        )
        (folder / role / "fvtitan.json").write_text(json.dumps({"text_len": sizes.text_len}))
        models[role] = {"init_from": str(folder / role)}
    return SimpleNamespace(cache=make_cache(folder / "cache", 10), models=models)


def arguments_of(setting, folder: Path, *, other_teacher: bool = False, **overrides: Any) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    models = {role: setting.models[role] for role in DMD2Method.roles}
    if other_teacher:
        models["teacher"] = setting.models["other"]
    keys = {
        "job__config_file": dmd2_recipe(folder, models),
        "training__steps": 8,
        "training__global_batch_size": 4,
        "checkpoint__interval": 3,
        "checkpoint__keep_latest_k": 0,
        "ema__start_step": 0,
        **overrides,
    }
    return small_arguments(setting.cache, folder / "run", **keys)


def values_of(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what the clock and the machine decide."""
    rows = read_metrics(folder / "run/metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in rows]


def checkpoint(folder: Path, step: int) -> Path:
    return folder / f"run/checkpoint/step-{step}"


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


# ------------------------------------------------------------------------------------------------ stops, checkpoints


@pytest.fixture(scope="module")
def whole(setting, tmp_path_factory):
    """8 steps without a stop: the student is trained in steps 1 and 6."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(arguments_of(setting, folder)) == 0
    return folder


@pytest.mark.parametrize("stop", [4, pytest.param(7, marks=pytest.mark.slow)])
def test_a_stop_between_two_updates_of_the_student_changes_nothing(setting, whole, tmp_path, stop):
    """Bit for bit: roles, optimizers, moving average, schedules, generators, logged values."""
    with stopping(DMD2Method, stop):
        train(arguments_of(setting, tmp_path))
    assert Checkpointer(tmp_path / "run/checkpoint").steps() == [3, 6][: 1 + (stop > 6)]
    assert train(arguments_of(setting, tmp_path)) == 0
    ours, expected = (read_checkpoint(checkpoint(folder, 8)) for folder in (tmp_path, whole))
    assert ours.keys() == expected.keys()
    for prefix in ("roles.student", "roles.critic", "optimizers.student", "optimizers.critic", "ema.student"):
        assert any(name.startswith(prefix) for name in expected)
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, expected[name])] == []
    state, reference = (json.loads((checkpoint(f, 8) / "state.json").read_text()) for f in (tmp_path, whole))
    assert state == reference
    assert values_of(tmp_path) == values_of(whole) and len(values_of(whole)) == 8


def test_updates_are_counted_by_role(whole):
    """Each role's schedule, optimizer and moving average count its own updates."""
    tensors = read_checkpoint(checkpoint(whole, 8))
    assert tensors["optimizers.student.state.head.head.weight.step"] == 2
    assert tensors["optimizers.critic.state.head.head.weight.step"] == 8
    state = json.loads((checkpoint(whole, 8) / "state.json").read_text())["states"]
    assert state["schedulers.student"]["last_epoch"] == 2 and state["schedulers.critic"]["last_epoch"] == 8
    assert state["ema.student"]["num_updates"] == 2


def test_a_checkpoint_holds_the_teachers_identity_and_not_its_weights(setting, whole):
    names = read_checkpoint(checkpoint(whole, 8))
    assert not [name for name in names if "teacher" in name]
    assert {name.split(".")[1] for name in names if name.startswith("roles.")} == {"student", "critic"}
    state = json.loads((checkpoint(whole, 8) / "state.json").read_text())["states"]
    assert [name for name in state if "teacher" in name] == ["identity.teacher"]
    assert state["identity.teacher"] == {"sha256": teachers_hash(setting)}


def teachers_hash(setting) -> str:
    """sha256 of the sorted (name, sha256) of config and weights."""
    folder = Path(setting.models["teacher"]["init_from"]) / "transformer"
    hashes = sorted((path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in folder.iterdir())
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def test_another_teacher_is_refused_before_anything_is_loaded(setting, tmp_path, monkeypatch, capsys):
    assert train(arguments_of(setting, tmp_path, training__steps=3)) == 0
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    capsys.readouterr()
    loaded = []
    with monkeypatch.context() as patch:
        for kind in (ModelState, OptimizerState, RandomState, SchedulerState, TrainState):
            patch.setattr(kind, "load_state_dict", lambda self, state: loaded.append(self))
        assert train(arguments_of(setting, tmp_path, other_teacher=True)) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and "models.teacher" in error[0]
    assert "the checkpoint was trained with the weights" in error[0] and "job.dump_folder" in error[0]
    assert loaded == [] and (tmp_path / "run/metrics.jsonl").read_bytes() == before
    assert Checkpointer(tmp_path / "run/checkpoint").steps() == [3]
    assert train(arguments_of(setting, tmp_path)) == 0  # the same one goes on


def test_a_copy_of_the_teacher_elsewhere_is_the_same_teacher(setting, tmp_path):
    assert train(arguments_of(setting, tmp_path, training__steps=3)) == 0
    copy = shutil.copytree(setting.models["teacher"]["init_from"], tmp_path / "copy")
    moved = SimpleNamespace(cache=setting.cache, models={**setting.models, "teacher": {"init_from": str(copy)}})
    assert train(arguments_of(moved, tmp_path, training__steps=4)) == 0


# ---------------------------------------------------------------------------------------------- what is not finite


@pytest.mark.parametrize(
    ("broken", "step", "message"),
    [
        ("teacher", 6, "step 6: not finite: the videos of the teacher; the gradient norm of the student is nan"),
        ("critic", 6, "step 6: not finite: the videos of the critic; the gradient norm of the student is nan"),
        ("student", 6, "step 6: not finite: the videos of the student; the gradient norm of the student is nan"),
        ("critic", 4, "step 4: not finite: the loss of the critic on rank 0; the gradient norm of the critic is nan"),
        ("student", 4, "step 4: not finite: the videos of the student; the gradient norm of the critic is nan"),
    ],
)
@pytest.mark.faults
def test_nothing_is_updated_when_a_role_breaks(setting, tmp_path, monkeypatch, broken, step, message):
    """Fault 24. The role that broke is named. All roles stay as the step before left them."""
    left: dict[str, Any] = {}
    step_of = DMD2Method.single_train_step

    def breaks(self, batch, now, role):
        if now == step:
            left.update(method=self, before={r: parameters_of(m.transformer) for r, m in self.role_models.items()})
            predict = self.role_models[broken].predict_velocity
            self.role_models[broken].predict_velocity = lambda *args: predict(*args) * float("nan")
        return step_of(self, batch, now, role)

    monkeypatch.setattr(DMD2Method, "single_train_step", breaks)
    with pytest.raises(FloatingPointError, match=message):
        train(arguments_of(setting, tmp_path, checkpoint__interval=step - 1, training__global_batch_size=2))
    assert Checkpointer(tmp_path / "run/checkpoint").steps() == [step - 1]
    for role, before in left["before"].items():
        after = parameters_of(left["method"].role_models[role].transformer)
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items()), role


@pytest.mark.faults
def test_a_broken_teacher_on_one_rank_updates_no_rank(setting, tmp_path):
    """Fault 24."""
    arguments = arguments_of(setting, tmp_path, checkpoint__interval=1)
    status = launch(2, arguments, tmp_path / "records", watcher=watch, nan=(1, 6, "teacher"))
    assert 0 not in status
    assert "not finite: the videos of the teacher" in (tmp_path / "records/rank1.log").read_text()
    assert Checkpointer(tmp_path / "run/checkpoint").steps() == [1, 2, 3, 4, 5]


# ------------------------------------------------------------------------------------------------------------- ranks

STEPS = 20
GRADIENTS = (1, 2, 6)


@pytest.fixture(scope="module")
def splits(setting, tmp_path_factory):
    """20 steps of 4 samples: one rank with accumulation 2, and two ranks."""
    base = tmp_path_factory.mktemp("splits")
    made = {}
    for name, ranks in (("accumulated", 1), ("ranks", 2)):
        keys = {"training__steps": STEPS, "checkpoint__interval": 6, "lr_scheduler__decay_type": "constant"}
        seen = base / name / "records"
        status = launch(ranks, arguments_of(setting, base / name, **keys), seen, watcher=watch, gradients=GRADIENTS)
        assert status == [0] * ranks, output(seen)
        made[name] = base / name
    return SimpleNamespace(**made)


def test_ranks_leave_at_the_same_rungs_with_other_noise(splits):
    """Two processes: what the student was asked in 20 steps."""
    seen = records(splits.ranks / "records", "batch")
    by_rank = [{(r["step"], r["role"]): r for r in seen if r["rank"] == rank} for rank in (0, 1)]
    assert by_rank[0].keys() == by_rank[1].keys() and len(by_rank[0]) == STEPS + 4
    for key, ours in by_rank[0].items():
        theirs = by_rank[1][key]
        assert ours["asked"] == theirs["asked"] and len(ours["asked"]) == ours["rung"] + 1
        assert ours["noise"].keys() == theirs["noise"].keys()
        for name, noise in ours["noise"].items():
            assert not torch.allclose(noise, theirs["noise"][name]), (key, name)
    assert {r["rung"] for r in seen} == {0, 1, 2, 3}


def test_noise_belongs_to_samples_on_any_split(splits):
    found, expected = (
        {
            (r["step"], r["role"], position, name): row
            for r in records(folder / "records", "batch")
            for name, noise in r["noise"].items()
            for position, row in zip(r["positions"], noise, strict=True)
        }
        for folder in (splits.ranks, splits.accumulated)
    )
    assert found.keys() == expected.keys() and len({key[2] for key in found}) == 4
    assert all(torch.equal(found[key], noise) for key, noise in expected.items())


def test_two_ranks_train_what_one_with_accumulation_trains(splits):
    for step in GRADIENTS:
        for role in ("student", "critic") if step != 2 else ("critic",):
            (expected,) = records(splits.accumulated / "records", f"gradients.step-{step}.{role}")
            for rank in records(splits.ranks / "records", f"gradients.step-{step}.{role}"):
                assert rank["gradients"].keys() == expected["gradients"].keys()
                for name, gradient in expected["gradients"].items():
                    assert gradient.norm() > 0
                    assert distance(rank["gradients"][name], gradient) <= 1e-5, (step, role, name)
    rows, expected_rows = (values_of(folder)[:6] for folder in (splits.ranks, splits.accumulated))
    for row, expected in zip(rows, expected_rows, strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
    tensors, expected = (read_checkpoint(checkpoint(f, 6)) for f in (splits.ranks, splits.accumulated))
    compared = [name for name in expected if name.startswith(("roles.", "ema."))]
    assert len({name.split(".")[1] for name in compared}) == 2
    for name in compared:
        assert distance(tensors[name], expected[name]) <= 1e-5, name


# ---------------------------------------------------------------------------------------------------------- collapse


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("prompts") / "cache", 24)


def watched(folder: Path, cache: Path, *, still: bool = False, **overrides) -> list[dict[str, float]]:
    """A run from the shipped network that trains the student, and logs, at every step; its values."""
    method = {"denoising_steps": [1000.0, 500.0], "student_update_interval": 1, "teacher_guidance_scale": 3.0}
    keys = {
        "job__config_file": dmd2_recipe(folder, **method),
        "training__seed": 1,
        "training__steps": 32,
        "data__caption_dropout": 0.0,
        "schedule__shift": 5.0,
        "optimizer__lr": 1e-4,
        "lr_scheduler__warmup_steps": 0,
        "lr_scheduler__decay_type": "constant",
        "ema__enable": False,
        "checkpoint__enable": False,
        **overrides,
    }
    with pytest.MonkeyPatch.context() as patch:
        if still:
            generate = DMD2Method.generate
            patch.setattr(
                DMD2Method, "generate", lambda *args: (x := generate(*args)).mean(1, keepdim=True).expand_as(x)
            )
        assert train(small_arguments(cache, folder / "run", **keys)) == 0
    return values_of(folder)


def warnings_in(text: str) -> list[str]:
    return [line for line in text.splitlines() if "WARNING" in line]


STATIC, DRIFT, LOSING = "are becoming static: ", "latents drifts: ", "the critic is losing: "


@pytest.mark.parametrize(
    ("fault", "warning"),
    [
        ({"still": True, "training__steps": 12}, STATIC),
        pytest.param({"models.student.optimizer.lr": 3e-3, "training__steps": 20}, DRIFT, marks=pytest.mark.slow),
        ({"models.critic.optimizer.lr": 0.1, "training__steps": 8}, LOSING),
    ],
    ids=["a student that stands still", "student 30 times too fast", "critic 1000 times too fast"],
)
def test_collapse_is_noticed(prompts, tmp_path, capsys, fault, warning):
    """Each warning by a fault that causes it."""
    watched(tmp_path, prompts, **fault)
    said = warnings_in(capsys.readouterr().out)
    assert any(warning in line for line in said), said
    assert all(line.startswith("WARNING, step ") for line in said)


@pytest.mark.slow
def test_a_healthy_run_is_not_warned_of(prompts, tmp_path, capsys):
    """The same run without a fault."""
    values = watched(tmp_path, prompts)
    assert warnings_in(capsys.readouterr().out) == []
    assert sum("rollout/motion_energy" in row for row in values) > 10
    assert sum("dmd/critic_error_ratio" in row for row in values) == 32


@pytest.mark.parametrize("seed", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "lr", [pytest.param(1e-4, marks=pytest.mark.slow), 3e-3], ids=["gains contrast", "diverges at once"]
)
def test_the_teacher_is_the_yardstick(setting, tmp_path, capsys, seed, lr):
    """A few-step student starts from blurred videos, and healthy training multiplies their variance; one that diverges in its
    first step has no healthy start to be compared with."""
    keys = {"models.student.optimizer.lr": lr, "training__seed": seed, "training__steps": 24}
    watched(tmp_path, setting.cache, **keys)
    said = warnings_in(capsys.readouterr().out)
    assert any(DRIFT in line for line in said) == (lr > 1e-3), said
