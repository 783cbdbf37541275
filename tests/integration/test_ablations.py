"""Each ablation breaks what it says and nothing else, "visibly worse" means what it says, and the program runs to its end."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from benchmarks import ablations
from benchmarks.ablations import finished_student, worse_in
from fvtitan.data.moving_shapes import Judgement
from fvtitan.errors import UserError, cli
from fvtitan.flow_matching import few_step_ladder
from fvtitan.methods.base import TrainingMethod
from fvtitan.methods.kd import KDMethod
from fvtitan.score import Row
from tests import dmd2_oracles, self_forcing_oracles
from tests.dmd2_oracles import Role
from tests.helpers import (
    GEOMETRY,
    ROOT,
    dmd2_recipe,
    kd_recipe,
    make_cache,
    self_forcing_recipe,
    small_arguments,
    small_config,
    train,
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("data") / "cache")


# ------------------------------------------------------------------------------------------------- what is broken


def test_no_critic(cache, tmp_path, monkeypatch):
    """The critic's phases run, and it alone does not move, also where its weights decay."""
    ablations.no_critic(monkeypatch.setattr)
    method = dmd2_oracles.walking_method(cache, tmp_path, optimizer__weight_decay=0.1)
    before = {role: [p.detach().clone() for p in module.parameters()] for role, module in method.role_modules.items()}
    phases = []
    dmd2_oracles.run(method, 2, 2, after=lambda _, role: phases.append(role))
    assert phases == ["student", "critic", "critic"]

    def moved(role):
        now = method.role_modules[role].parameters()
        return not all(torch.equal(*pair) for pair in zip(before[role], now, strict=True))

    assert moved("student") and not moved("critic")
    assert all(float(state["exp_avg"].norm()) > 0 for state in method.optimizers["critic"].state.values())


def test_wrong_shift(cache, tmp_path, monkeypatch):
    """The same states under other labels; the sampler is as before."""
    ablations.wrong_shift(monkeypatch.setattr)
    recipe = kd_recipe(tmp_path, teacher_inference_steps=48, student_sample_steps=4)
    keys = {"data__caption_dropout": 0.0, "schedule__shift": 5.0, "job__config_file": recipe}
    cfg = small_config(cache, tmp_path, **keys)
    student = Role(channels=1, velocity=lambda noisy, sigma, cond: noisy)
    method = KDMethod(cfg=cfg, role_models={"student": student})
    TrainingMethod.on_train_start(method)
    states = torch.arange(4.0).reshape(1, 4, 1, 1, 1, 1).expand(64, 4, 3, 1, 1, 1)  # each holds its rung
    method.single_train_step(dmd2_oracles.batch_of(64) | {"states": states, "latents": states[:, 0]}, 1, "student")
    (call,) = student.calls
    rung = call["noisy"][:, :, 0, 0, 0].long()
    assert rung.unique().tolist() == [0, 1, 2, 3]
    own = few_step_ladder((1000, 750, 500, 250), 5.0)
    labels = torch.tensor([1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(call["sigma"], labels[rung])
    assert method.sampler(cfg).sigmas == pytest.approx(own)


def committed_by(method) -> tuple[list, object]:
    """What enters the cache in a rollout that is left at rung 2, as (block, start, sigma), and the rollout."""
    committed, commit = [], method.student.commit

    def spy(block, cond, cache, start, sigma):
        committed.append((block, start, sigma))
        commit(block, cond, cache, start, sigma)

    method.student.commit = spy
    batch, step = self_forcing_oracles.prompts_batch(), self_forcing_oracles.step_at(method, rung=2)
    rollout = self_forcing_oracles.rolled(method, batch, step)
    assert [start for _, start, _ in committed] == [0, 3]
    return committed, rollout


def test_no_context_pass(cache, tmp_path, monkeypatch):
    """What enters the cache is the noisy state that left the ladder, at its own sigma, not the clean block at 0."""
    ablations.no_context_pass(monkeypatch.setattr)
    method = self_forcing_oracles.wan_method(cache, tmp_path)
    committed, rollout = committed_by(method)
    for (block, start, sigma), exit_ in zip(committed, rollout.exits, strict=False):
        clean = rollout.video[:, start : start + 3]
        assert torch.equal(block, exit_.noisy) and not torch.equal(exit_.noisy, clean)
        assert sigma == pytest.approx(method.sigmas[2])


def test_no_context(cache, tmp_path, monkeypatch):
    """What enters the cache is pure noise, that the block began with: nothing of the block."""
    ablations.no_context(monkeypatch.setattr)
    committed, rollout = committed_by(self_forcing_oracles.wan_method(cache, tmp_path))
    for (block, start, sigma), exit_ in zip(committed, rollout.exits, strict=False):
        assert sigma == 1.0 and not torch.equal(block, exit_.noisy)
        assert abs(float(block.std()) - 1) < 0.1 and not torch.equal(block, rollout.video[:, start : start + 3])


# -------------------------------------------------------------------------------------------------- visibly worse


def row(num_videos: int = 40, **changed: object) -> Row:
    """Judgements of good videos; of every tenth, or of all where that is a number, what is `changed`."""
    good = Judgement("red", "circle", "left", "small", 1.0, True, True, True, True, True, 0.9, 0.9, 0.1, 0.1)
    judged = [good] * num_videos
    for key, value in changed.items():
        judged = [
            dataclasses.replace(one, **{key: value}) if isinstance(value, float) or not i % 10 else one
            for i, one in enumerate(judged)
        ]
    return Row("", "", 4, 33, 4, 0.0, judged)


def test_visibly_worse():
    found = worse_in(row(shape_correct=False, area_drift=0.13, speed_drift=0.11), row())
    assert set(found) == {"shape", "area_drift"}  # 0.01 of speed_drift is too little
    assert found["shape"][0] == pytest.approx(-0.1) and found["area_drift"][0] == pytest.approx(0.03)
    assert worse_in(row(), row(shape_correct=False, area_drift=0.13)) == {}  # better
    assert worse_in(row(size_correct=False, speed_constancy=0.0), row()) == {}  # not looked at
    assert worse_in(row(10, colour_correct=False), row(10)) == {}  # one video of ten: the interval reaches 0


# ---------------------------------------------------------------------------------------------------- the program


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "no_critics"], "--only no_critics: is no ablation. Did you mean 'no_critic'?"),
        (["--steps", "0"], "--steps 0: must be >= 1"),
        ([], "tiny_dmd2/checkpoint holds no checkpoint: train this student first"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["ablations", "--chain", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli(ablations.main)
    error = capsys.readouterr().err.strip().splitlines()
    assert exit_.value.code == 2 and len(error) == 1 and message in error[0]


@pytest.mark.slow
def test_the_program(cache, tmp_path):
    """Runs of two steps in the place of the chain's: they are trained once, and scored beside their students."""
    chain, output = tmp_path / "chain", tmp_path / "output"
    recipes = {"tiny_dmd2": dmd2_recipe, "tiny_kd": kd_recipe, "tiny_self_forcing": self_forcing_recipe}
    for name, recipe in recipes.items():
        path = recipe(tmp_path).rename(tmp_path / f"{name}.toml")
        keys = {"job__config_file": path, "training__steps": 2, "training__seed": 3}
        assert train(small_arguments(cache, chain / name, **keys)) == 0
    command = [sys.executable, "-m", "benchmarks.ablations", "--chain", str(chain), "--output", str(output)]
    for attempt in (1, 2):
        done = subprocess.run([*command, "--steps", "2", "--num-videos", "2"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == ("NOT visibly worse" in done.stdout), done.stderr[-3000:]
        rows = json.loads((output / "rows.json").read_text())
        assert [one["model"] for one in rows] == [
            f"{folder}/checkpoint/step-2"
            for name, (_, recipe) in ablations.ABLATIONS.items()
            for folder in (chain / recipe, output / name)
        ]
        assert all(one["num_frames"] == GEOMETRY["num_frames"] and len(one["judged"]) == 2 for one in rows)
        for name in ablations.ABLATIONS:
            log = (output / f"{name}.log").read_text()
            assert log.count("finished 2 steps") == 1 and log.count("this job is finished") == attempt - 1
            assert finished_student(output / name).cfg.training.seed == 3
            assert f"\n{name}: " in (output / "results.md").read_text()
    with pytest.raises(UserError, match="step-2: the run has 5 steps: let it finish first"):
        config = chain / "tiny_kd/checkpoint/step-2/config.toml"
        config.write_text(config.read_text().replace("\nsteps = 2\n", "\nsteps = 5\n"))
        finished_student(chain / "tiny_kd")
