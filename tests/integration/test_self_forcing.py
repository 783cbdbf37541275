"""Self-Forcing in train.py: who moves when, stops, ranks, and what a rollout costs in collectives."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fvtitan.components.checkpoint import Checkpointer
from fvtitan.methods.self_forcing import SelfForcingMethod
from fvtitan.models.wan import weights
from fvtitan.models.wan.transformer import WanConfig
from tests.dmd2_oracles import Recorder, check_average, check_update_schedule
from tests.helpers import (
    make_cache,
    random_transformer,
    read_checkpoint,
    self_forcing_recipe,
    small_arguments,
    stopping,
    train,
)
from tests.integration.exact_worker import launch, output, records
from tests.integration.self_forcing_worker import watch
from tests.integration.test_dmd2 import checkpoint, distance, values_of
from tests.self_forcing_oracles import MODES

SIZES = WanConfig(num_layers=2, num_heads=2, head_dim=16, ffn_dim=48, text_dim=64, text_len=32, freq_dim=32)
LENGTHS = (3, 4, 5)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A cache of prompts, and weights for all roles."""
    folder = tmp_path_factory.mktemp("self_forcing")
    models: dict[str, dict[str, object]] = {}
    for seed, role in enumerate(SelfForcingMethod.roles):
        weights.save_transformer(
            random_transformer(SIZES, seed=seed).state_dict(), SIZES, folder / role / "transformer"
        )
        (folder / role / "fvtitan.json").write_text(json.dumps({"text_len": SIZES.text_len}))
        models[role] = {"init_from": str(folder / role)}
    models["student"] |= {"local_attn_frames": 2}
    return SimpleNamespace(cache=make_cache(folder / "cache", 10), models=models)


def arguments_of(setting, folder: Path, method: dict[str, Any] | None = None, **overrides: Any) -> list[str]:
    """Videos of three latent frames, one a block; rollouts of up to five; four videos a step."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = {
        "job__config_file": self_forcing_recipe(folder, setting.models, **{"max_num_frames": 17, **(method or {})}),
        "schedule__shift": 5.0,
        "training__steps": 6,
        "training__global_batch_size": 4,
        "lr_scheduler__decay_type": "constant",
        "checkpoint__interval": 3,
        "checkpoint__keep_latest_k": 0,
        "ema__start_step": 0,
        **overrides,
    }
    return small_arguments(setting.cache, folder / "run", **keys)


# ------------------------------------------------------------------------------------------ who moves, and when


class StreamRecorder(Recorder):
    """With the rollouts of a streaming student, which replay makes without a graph."""

    def __init__(self, patch: pytest.MonkeyPatch):
        super().__init__(patch)
        recorder, roll = self, SelfForcingMethod.roll
        self.graphs: list[tuple[str, bool]] = []

        def rolling(self, batch, prompts, streams, step, role):
            recorder.graphs.append((role, torch.is_grad_enabled()))
            recorder.add("rollout", role, grad=role == "student")
            return roll(self, batch, prompts, streams, step, role)

        patch.setattr(SelfForcingMethod, "roll", rolling)


@pytest.mark.parametrize(("mode", "steps"), [("direct", 20), ("replay", 11)])
def test_who_is_trained_when(setting, tmp_path, monkeypatch, mode, steps):
    """In 20 steps 4 updates of the student, 20 of the critic, 4 of the moving average."""
    record = StreamRecorder(monkeypatch)
    keys = {"training__steps": steps, "ema__start_step": 1, "checkpoint__enable": False}
    arguments = arguments_of(setting, tmp_path, {"gradient_mode": mode}, training__global_batch_size=2, **keys)
    assert train(arguments) == 0
    check_update_schedule(record, steps)
    check_average(record, 0.8)
    assert len(record.students) == (steps + 4) // 5
    assert set(record.graphs) == {("student", mode == "direct"), ("critic", False)}


# ------------------------------------------------------------------------------------------------ stops, checkpoints


@pytest.mark.parametrize("mode", MODES)
def test_a_stop_between_two_updates_of_the_student_changes_nothing(setting, tmp_path, mode):
    """Bit for bit: roles, optimizers, moving average, schedules, generators, logged values; with rollouts of all lengths."""
    method = {"gradient_mode": mode, "context_noise": 20.0, "same_step_across_blocks": False}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    arguments = functools.partial(arguments_of, setting, method=method, training__global_batch_size=2)
    assert train(arguments(whole)) == 0
    with stopping(SelfForcingMethod, 5):
        train(arguments(stopped))
    assert Checkpointer(stopped / "run/checkpoint").steps() == [3]
    assert train(arguments(stopped)) == 0
    ours, expected = (read_checkpoint(checkpoint(folder, 6)) for folder in (stopped, whole))
    assert ours.keys() == expected.keys()
    for prefix in ("roles.student", "roles.critic", "optimizers.student", "optimizers.critic", "ema.student"):
        assert any(name.startswith(prefix) for name in expected)
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, expected[name])] == []
    state, reference = (json.loads((checkpoint(f, 6) / "state.json").read_text()) for f in (stopped, whole))
    assert state == reference
    assert values_of(stopped) == values_of(whole) and len(values_of(whole)) == 6


# ------------------------------------------------------------------------------------------------------------- ranks

STEPS, COMPARED = 20, 6
GRADIENTS = (1, 2, 6)


@pytest.fixture(scope="module")
def runs(setting, tmp_path_factory):
    """The same training on one rank with the whole batch, and on two ranks, sharded, in both gradient modes."""
    base = tmp_path_factory.mktemp("runs")
    made = {}
    for name, ranks, mode, steps in (
        ("whole", 1, "direct", COMPARED),
        ("direct", 2, "direct", STEPS),
        ("replay", 2, "replay", COMPARED),
    ):
        keys = {"training__steps": steps, "checkpoint__interval": 6, "training__local_batch_size": 4 // ranks}
        seen = base / name / "records"
        arguments = arguments_of(setting, base / name, {"gradient_mode": mode}, **keys)
        status = launch(ranks, arguments, seen, watcher=watch, gradients=GRADIENTS, probe=name == "direct")
        assert status == [0] * ranks, output(seen)
        made[name] = base / name
    return SimpleNamespace(**made)


def phases(folder: Path, rank: int = 0) -> dict[tuple[int, str], dict[str, Any]]:
    return {(r["step"], r["role"]): r for r in records(folder / "records", "phase") if r["rank"] == rank}


def test_ranks_make_the_same_rollouts_from_other_noise(runs):
    """Two processes: rungs, lengths and forwards of 20 steps."""
    ours, theirs = phases(runs.direct), phases(runs.direct, 1)
    assert ours.keys() == theirs.keys() and len(ours) == STEPS + 4
    for key, phase in ours.items():
        other = theirs[key]
        assert phase["asked"] == other["asked"] and len(phase["asked"]) >= 2 * 3 - 1
        assert [roll["frames"] for roll in phase["rolls"]] == [roll["frames"] for roll in other["rolls"]]
        assert phase["noise"].keys() == other["noise"].keys()
        for name, noise in phase["noise"].items():
            assert not torch.allclose(noise, other["noise"][name]), (key, name)
    rungs = {len({sigma for _, sigma, commit, _ in phase["asked"] if not commit}) for phase in ours.values()}
    assert rungs == {1, 2, 3, 4}
    assert {roll["frames"] for phase in ours.values() for roll in phase["rolls"]} == set(LENGTHS)


@pytest.mark.parametrize("name", ["direct", "replay"])
def test_a_rollout_gathers_the_student_once(runs, name):
    """Layers + 1 all-gathers a rollout, whatever its rungs and length; sharded again when it is done."""
    forwards = set()
    for rank in (0, 1):
        for phase in phases(getattr(runs, name), rank).values():
            (roll,) = phase["rolls"]
            assert roll["gathers"] == SIZES.num_layers + 1, roll
            assert roll["sharded"]
            forwards.add(len(phase["asked"]))
    assert len(forwards) > 2


def test_a_step_changes_the_next_rollout(runs):
    """What was gathered for one rollout is not used in another: the same draws after the student's update give another video.
    Not kept, the student is gathered for every forward: what is counted can be more."""
    for rank, probe in enumerate(records(runs.direct / "records", "probe")):
        assert (probe["before"] - probe["after"]).abs().max() > 1e-6
        kept, gathered_anew = probe["rolls"]
        calls = len(phases(runs.direct, rank)[1, "student"]["asked"])
        assert kept["gathers"] == SIZES.num_layers + 1
        assert gathered_anew["gathers"] == calls * (SIZES.num_layers + 1) > kept["gathers"]


def check_gradients(folder: Path, whole: Path) -> None:
    """On both ranks, to 1e-5 relative L2 per tensor, those of one rank."""
    one = phases(whole)
    for rank in (0, 1):
        found = phases(folder, rank)
        for step in GRADIENTS:
            for role in ("student", "critic") if step != 2 else ("critic",):
                expected = one[step, role]["gradients"]
                assert found[step, role]["gradients"].keys() == expected.keys()
                for parameter, gradient in expected.items():
                    assert gradient.norm() > 0
                    error = distance(found[step, role]["gradients"][parameter], gradient)
                    assert error <= 1e-5, (step, role, parameter, error)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "keys",
    [
        {"activation_checkpoint__mode": "full"},
        {"parallelism__fsdp_reshard_after_forward": False},
        {"parallelism__defer_grad_sync": True, "training__local_batch_size": 1},
    ],
    ids=["checkpointed", "kept gathered", "accumulated, one reduction"],
)
def test_two_ranks_train_what_one_trains_however_they_are_parallel(setting, runs, tmp_path, mode, keys):
    keys = {"training__local_batch_size": 2, **keys}
    arguments = arguments_of(setting, tmp_path, {"gradient_mode": mode}, **keys)
    status = launch(2, arguments, tmp_path / "records", watcher=watch, gradients=GRADIENTS)
    assert status == [0, 0], output(tmp_path / "records")
    check_gradients(tmp_path, runs.whole)


@pytest.mark.parametrize("name", ["direct", "replay"])
def test_two_ranks_train_what_one_trains(runs, name):
    """In both gradient modes: gradients, losses, and parameters after 6 steps."""
    folder = getattr(runs, name)
    check_gradients(folder, runs.whole)
    rows, expected_rows = (values_of(path)[:COMPARED] for path in (folder, runs.whole))
    ratios = {"dmd/critic_error_ratio", "rollout/latent_variance", "rollout/motion_energy"}  # not means of samples
    for row, expected in zip(rows, expected_rows, strict=True):
        assert row.keys() == expected.keys() and {"loss/critic", "grad_norm/critic"} <= row.keys()
        means = row.keys() - ratios
        assert {key: row[key] for key in means} == pytest.approx({key: expected[key] for key in means}, rel=1e-5)
    tensors, expected = (read_checkpoint(checkpoint(path, COMPARED)) for path in (folder, runs.whole))
    compared = [parameter for parameter in expected if parameter.startswith(("roles.", "ema."))]
    assert len({parameter.split(".")[1] for parameter in compared}) == 2
    for parameter in compared:
        assert distance(tensors[parameter], expected[parameter]) <= 1e-5, parameter


def test_noise_belongs_to_samples_on_any_split(runs):
    found, expected = (
        {
            (phase["step"], phase["role"], position, name): row
            for rank in range(ranks)
            for phase in phases(folder, rank).values()
            if phase["step"] <= COMPARED
            for name, noise in phase["noise"].items()
            for position, row in zip(phase["positions"], noise, strict=True)
        }
        for folder, ranks in ((runs.replay, 2), (runs.whole, 1))
    )
    assert found.keys() == expected.keys() and len({key[2] for key in found}) == 4
    assert all(torch.equal(found[key], noise) for key, noise in expected.items())


def test_replay_makes_the_forwards_of_direct_and_one_a_block_more(runs):
    direct, replay = phases(runs.direct), phases(runs.replay)
    for step in (1, 6):
        asked, again = direct[step, "student"]["asked"], replay[step, "student"]["asked"]
        trained = [call for call in asked if call[3]]
        assert [call[:3] for call in again[: len(asked)]] == [call[:3] for call in asked] and trained
        assert again[len(asked) :] == trained and not any(call[3] for call in again[: len(asked)])
