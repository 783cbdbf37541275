"""The chain of tiny recipes: what it runs, in which order, what it does when something breaks, and what it says of the scores.

That it runs as a whole is in test_readme.py, whose command it is.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from fvtitan import chain as program
from fvtitan.chain import (
    SCORES,
    STUDENTS,
    Chain,
    Expectation,
    Result,
    Runner,
    Stage,
    check,
    check_expectations,
    expectations,
    label,
    table,
)
from fvtitan.components.stops import EXIT_STOPPED
from fvtitan.errors import UserError
from tests.helpers import ROOT


def chain_of(tmp_path: Path, seeds=(0,), recipes=ROOT / "train_configs") -> Chain:
    return Chain(recipes, tmp_path, seeds, (192, 48))


# ------------------------------------------------------------------------------------------------------ what is run


def test_stages_name_only_earlier_ones_and_every_seed_has_its_own_folders(tmp_path):
    stages = chain_of(tmp_path, seeds=(0, 1)).stages()
    names = [stage.name for stage in stages]
    assert len(set(names)) == len(names) == 2 * (6 + 5) + 1
    seen: set[str] = set()
    for stage in stages:
        assert seen.issuperset(stage.after), stage
        seen.add(stage.name)
    folders, caches = (
        {stage.command[stage.command.index(flag) + 1] for stage in stages if flag in stage.command}
        for flag in ("--job.dump_folder", "--method.teacher_path_cache")
    )
    assert folders == {str(tmp_path / f"seed-{seed}" / name) for seed in (0, 1) for name in STUDENTS}
    assert caches == {"data/moving_shapes/trajectories_seed1"}  # seed 0 has the recipe's own


def test_every_student_goes_on_from_what_its_own_seed_has_left(tmp_path):
    chain = chain_of(tmp_path, seeds=(3,))
    stages = {stage.name: stage for stage in chain.stages()}
    for name, earlier in (("tiny_kd_causal", "tiny_dfsft"), ("tiny_self_forcing", "tiny_kd_causal")):
        stage = stages[f"seed-3/{name}"]
        start = stage.command[stage.command.index("--models.student.init_from") + 1]
        assert start == str(chain.checkpoint(3, earlier)) and f"seed-3/{earlier}" in stage.after
        assert stages[f"scores/seed-3/{earlier}"].model == chain.checkpoint(3, earlier)


# ------------------------------------------------------------------------------------------------------- running it


def python(name: str, code: str, *after: str, model: Path | None = None) -> Stage:
    return Stage(name, (sys.executable, "-S", "-c", code), after, model)


def test_stages_run_side_by_side_after_those_they_read(tmp_path, capsys):
    """a and b wait for each other's file, so they run together; c reads what both have left."""
    meet = "import pathlib, time\npathlib.Path({0!r}).touch()\nwhile not pathlib.Path({1!r}).exists(): time.sleep(0.01)"
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    read = f"import os; assert os.path.exists({a!r}) and os.path.exists({b!r}); print('both')"
    stages = [python("c", read, "a", "b"), python("a", meet.format(a, b)), python("b", meet.format(b, a))]
    runner = Runner(tmp_path, jobs=2)
    assert runner.run(stages) == 0
    assert (tmp_path / "log/c.log").read_text() == "both\n" and set(runner.seconds()) == {"a", "b", "c"}


def test_a_failure_stops_the_others_and_shows_its_last_lines(tmp_path, capsys):
    """The one beside it gets SIGTERM, so that it can save; what would come after is not started."""
    term = (
        "import pathlib, signal, sys, time\nsignal.signal(15, lambda *a: (print('saved', flush=True), sys.exit(75)))\n"
    )
    wait = f"{term}pathlib.Path({str(tmp_path / 'up')!r}).touch()\nwhile True: time.sleep(0.01)"
    until = f"import pathlib, sys, time\nwhile not pathlib.Path({str(tmp_path / 'up')!r}).exists(): time.sleep(0.01)\n"
    fail = f"{until}sys.exit('broken: why')"
    assert Runner(tmp_path, jobs=2).run([python("beside", wait), python("bad", fail), python("later", "", "bad")]) == 1
    out = capsys.readouterr().out
    assert "bad: status 1" in out and "broken: why" in out and "later" not in out
    assert (tmp_path / "log/beside.log").read_text() == "saved\n"


def test_a_signal_stops_all_with_its_own_status(tmp_path, capsys):
    """Also the one that is just being started; and each once, for at a second signal train.py leaves without saving."""
    told = []

    class Stopped(Runner):
        def _start(self, stage):
            if stage.name == "b":
                os.kill(os.getpid(), signal.SIGINT)
            super()._start(stage)

        def _terminate(self):
            told.append([stage.name for stage in self.running])
            super()._terminate()

    before = signal.getsignal(signal.SIGINT)
    stages = [python(name, "import time; time.sleep(60)") for name in "abc"]
    assert Stopped(tmp_path, jobs=2).run(stages) == EXIT_STOPPED
    assert told == [["a", "b"]] and not (tmp_path / "log/c.log").exists()
    assert "the same command goes on from here" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before


def test_a_score_is_not_measured_twice_but_again_for_other_weights(tmp_path, capsys):
    model = tmp_path / "model"
    model.mkdir()
    (model / "manifest.json").write_text("1")
    stage = python("scores/x", "print('ran')", model=model)
    (tmp_path / "scores/x").mkdir(parents=True)
    for expected, manifest in ((1, "1"), (1, "1"), (2, "2")):
        (model / "manifest.json").write_text(manifest)
        assert Runner(tmp_path, jobs=1).run([stage]) == 0
        assert (tmp_path / "log/scores/x.log").read_text() == "ran\n" * expected
    assert "scores/x: is there" in capsys.readouterr().out


def test_a_score_that_was_begun_for_another_request_is_not_taken_for_the_first(tmp_path):
    """Its rows are where those of the first were, whatever became of it."""
    (tmp_path / "scores/x").mkdir(parents=True)
    first, other = (python("scores/x", f"print({name!r})", model=tmp_path) for name in ("first", "other"))
    assert Runner(tmp_path, jobs=1).run([first]) == 0
    killed = Runner(tmp_path, jobs=1)
    killed._start(other)
    [(process, _)] = killed.running.values()
    process.wait()
    assert Runner(tmp_path, jobs=1).run([first]) == 0
    assert (tmp_path / "log/scores/x.log").read_text() == "first\nother\nfirst\n"


def test_an_error_of_its_own_leaves_nothing_running(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "write_json", lambda *_: 1 / 0)
    runner = Runner(tmp_path, jobs=2)
    with pytest.raises(ZeroDivisionError):
        runner.run([python("ends", ""), python("stays", "while True: pass")])
    [(process, _)] = runner.running.values()
    assert process.poll() == -signal.SIGTERM


# ---------------------------------------------------------------------------------------------------- what came out


def result(name: str, frames: int, forwards: int, *colours: float) -> Result:
    rest = dict.fromkeys(SCORES, 0.5)
    return Result(
        name, frames, forwards, (0.25,) * len(colours), tuple(rest | {"colour": colour} for colour in colours)
    )


def test_headers_promise_what_is_measured(tmp_path):
    chain = chain_of(tmp_path)
    assert chain.lengths == (33, 105)
    check_expectations(chain)
    for name in STUDENTS:
        found = expectations(chain.recipe(name))
        assert len(found) >= 8 and {each.recipe for each in found} == {name}, name
        assert {each.score for each in found} >= {"colour", "shape", "direction", "area_drift"}


@pytest.mark.parametrize(
    "change",
    [("33 frames, 4 forwards", "33 frames, 5 forwards"), ("33 frames, 4", "37 frames, 4"), (": colour", ": color")],
)
def test_a_header_that_promises_what_is_not_measured_is_refused_at_the_start(change, tmp_path):
    recipes = tmp_path / "recipes"
    shutil.copytree(ROOT / "train_configs", recipes)
    text = (recipes / "tiny_kd.toml").read_text()
    (recipes / "tiny_kd.toml").write_text(text.replace(*change))
    with pytest.raises(
        UserError, match=r"tiny_kd.toml: the header expects .*; measured are colour, .* at 33 frames, 2 forwards"
    ):
        check_expectations(chain_of(tmp_path, recipes=recipes))


def test_expectations_of_a_header(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        "# Expect:   9 frames, 4 forwards: colour >= 0.98, area drift <= .1\n#           33 frames, 12 forwards: shape >= 1\n"
        '\n[job]\n# 9 frames, 2 forwards: colour >= 1 is not in the header\ndescription = ""\n'
    )
    assert expectations(recipe) == [
        Expectation("r", 9, 4, "colour", ">=", 0.98),
        Expectation("r", 9, 4, "area_drift", "<=", 0.1),
        Expectation("r", 33, 12, "shape", ">=", 1.0),
    ]

    recipe.write_text("# Expect: 9 frames, 4 forwards: colour > 0.98\n")
    with pytest.raises(UserError, match="'colour > 0.98' in the header: need a score, >= or <=, and a number"):
        expectations(recipe)


def test_one_seed_below_its_bound_is_a_miss(tmp_path, monkeypatch):
    monkeypatch.setattr("fvtitan.chain.STUDENTS", ("r",))
    (tmp_path / "r.toml").write_text("# Expect: 33 frames, 4 forwards: colour >= 0.9, speed drift <= 0.5\n")
    chain = chain_of(tmp_path, recipes=tmp_path)
    lines, good = check(chain, [result("`r`", 33, 4, 0.95, 0.9)])
    assert good and [line[:4] for line in lines] == ["ok  ", "ok  "]
    lines, good = check(chain, [result("`r`", 33, 4, 0.95, 0.89)])
    assert not good and lines[0] == "MISS r, 33 frames, 4 forwards: colour >= 0.9: 0.950, 0.890"


def test_the_table_has_short_videos_first_and_the_spread_of_several_seeds():
    lines = table([result("a", 105, 44, 1.0), result("a", 33, 14, 0.9, 1.0)]).splitlines()
    assert lines[2].startswith("| a | 33 | 14 | 0.25 | 0.950 ± 0.071 | 0.500 ± 0.000 |")
    assert (
        lines[3].startswith("| a | 105 | 44 | 0.25 | 1.000 | 0.500 |") and len({line.count("|") for line in lines}) == 1
    )


def test_rows_have_names():
    own = {"own": True, "untrained": False, "sampler": "", "steps": 4}
    assert label("seed-2/tiny_kd", own) == "`tiny_kd`"
    assert label("seed-2/tiny_kd", own | {"untrained": True}) == "before `tiny_kd`"
    teacher = {"own": False, "untrained": False, "sampler": "Euler, guidance 3", "steps": 50}
    assert label("teacher", teacher) == "teacher, 50 steps"
    assert label("teacher", teacher | {"sampler": "re-noised at 1000"}) == "before `tiny_kd`, `tiny_dmd2`"
