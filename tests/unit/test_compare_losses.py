"""Two runs are compared bit by bit; what differs, what is missing and what cannot be read each have their exit status."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fvtitan import compare_losses
from fvtitan.components.metrics import MetricLogger
from fvtitan.errors import UserError


def run(folder, steps=range(1, 6), skip=(), **changed):
    """A run of a student, and of a critic from step 2 on, logged by the real logger; `changed`: {key: {step: value}}, `__`
    for `/`; `skip`: keys that are not logged."""
    log = MetricLogger(folder, total_steps=100, resume_step=steps[0] - 1, enable_tensorboard=False)
    for step in steps:
        values = {"loss/student": torch.tensor(1 / (3 + step)), "grad_norm/student": torch.tensor(0.1 * step)}
        values |= {"loss/critic": 0.25, "lr/student": 1e-3, "dmd/weight": 2.0} if step > 1 else {}
        values |= {key.replace("__", "/"): at[step] for key, at in changed.items() if step in at}
        log.log_step(step, {key: value for key, value in values.items() if key not in skip})
    log.close()
    return folder


@pytest.fixture
def compared(monkeypatch, capsys):
    def compared(*arguments):
        """(exit status, lines after the two paths) of the program; the status of a `UserError` is 2, as `cli` has it."""
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["compare_losses", *map(str, arguments)])
        status = compare_losses.main()
        return status, capsys.readouterr().out.splitlines()[2:]

    return compared


def test_equal_runs(tmp_path, compared):
    """Throughput differs between any two runs, and does not count, nor does what is not asked for."""
    a, b = run(tmp_path / "a"), run(tmp_path / "b", lr__student={3: 2e-3}, dmd__weight={4: 1.0})
    equal = ["grad_norm/student  5 steps equal", "loss/critic        4 steps equal", "loss/student       5 steps equal"]
    assert compared(a, b / "metrics.jsonl") == (0, equal)
    status, lines = compared(a, b, "--all")
    assert status == 1 and [line for line in lines if "DIFFERENT" not in line] == equal
    assert "dmd/weight         4 steps DIFFERENT from step 4: 2.0 and 1.0" in lines[0] and len(lines) == 5
    assert compared(a, b, "--keys", "loss/critic", "grad*") == (0, equal[:2])
    assert compared(a, b, "--keys", "lr/*")[0] == 1


def test_one_bit_is_a_difference(tmp_path, compared):
    value = torch.tensor(1 / 6).item()
    other = math.nextafter(value, 1)
    a, b = run(tmp_path / "a"), run(tmp_path / "b", loss__student={3: other, 5: 0.1875})
    status, lines = compared(a, b)
    where = f"DIFFERENT from step 3: {value!r} and {other!r}; largest relative difference 3.3e-01 at step 5"
    assert status == 1 and lines[2] == f"loss/student       5 steps {where}" and value != other
    assert compared(a, run(tmp_path / "c", loss__critic={2: 0.25 * (1 + 1e-6)}), "--tolerance", "1e-5") == (
        0,
        [
            "grad_norm/student  5 steps equal to 1e-05",
            "loss/critic        4 steps equal to 1e-05; largest relative difference 1.0e-06 at step 2",
            "loss/student       5 steps equal to 1e-05",
        ],
    )
    assert compared(a, tmp_path / "c", "--tolerance", "1e-7")[0] == 1


@pytest.mark.parametrize(
    ("x", "y", "equal", "near"),
    [
        (math.nan, math.nan, True, True),
        (math.inf, math.inf, True, True),
        (0.0, -0.0, False, True),
        (math.nan, 1.0, False, False),
        (math.inf, -math.inf, False, False),
        (1.0, math.inf, False, False),
    ],
)
def test_what_is_no_ordinary_number(tmp_path, compared, x, y, equal, near):
    a, b = (run(tmp_path / str(i), range(1, 3), loss__student={2: value}) for i, value in enumerate((x, y)))
    assert compared(a, b)[0] == (0 if equal else 1)
    assert compared(a, b, "--tolerance", "0.5")[0] == (0 if near else 1)


def test_what_only_one_has_is_said_and_fails(tmp_path, compared):
    a, b = run(tmp_path / "a", range(1, 9)), run(tmp_path / "b", range(3, 8), skip=["loss/critic"])
    equal = ["grad_norm/student  5 steps equal", "loss/student       5 steps equal"]
    status, lines = compared(a, b)
    assert status == 1
    assert lines == ["only in A: steps 1 to 2, 8", equal[0], "loss/critic        only in A: steps 3 to 7", equal[1]]
    assert compared(a, b, "--common") == (0, lines)
    status, lines = compared(b, a)
    assert status == 1 and lines[0] == "only in B: steps 1 to 2, 8"
    # a key that one run logs more rarely
    c = run(tmp_path / "c", loss__critic={1: 0.5})
    status, lines = compared(c, run(tmp_path / "d"))
    assert status == 1 and "loss/critic        only in A: steps 1" in lines
    assert "loss/critic        4 steps equal" in lines


def test_of_a_step_that_is_there_twice_the_last_counts(tmp_path, compared):
    a, b = run(tmp_path / "a"), run(tmp_path / "b", loss__student={4: 9.0, 5: 9.0})
    assert compared(a, b)[0] == 1
    again = (a / "metrics.jsonl").read_text().splitlines(keepends=True)[3:]
    with (b / "metrics.jsonl").open("a") as file:
        file.writelines([*again, '{"step": 6, "loss/stu'])  # and killed
    assert compared(a, b)[0] == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"step": 1, "loss/student"\n{"step": 2}\n', r"b\.jsonl: line 1 is not valid JSON"),
        ('{"step": 1, "loss/student": 1}\n[]\n', r"b\.jsonl: line 2 is not a record"),
        ('{"loss/student": 1}\n', r"line 1 is not a record: an object with a number `step`"),
        ('{"step": 1, "loss/student": [0]}\n', r"b\.jsonl: a value of step 1 is not a number"),
        ('{"step": 1, "loss/student": "x"}\n', r"a value of step 1 is not a number: .*'x'"),
        ('{"step": 1, "loss/student": 1%s}\n' % (400 * "0"), "a value of step 1 is not a number"),
        ("", r"no step in common: A has 1 to 5, B has none"),
        ('{"step": 7, "loss/student": 1}\n', r"no step in common: A has 1 to 5, B has 7$"),
        ('{"step": 1, "loss/teacher": 1}\n', r"no key in common: .*loss/student, loss/teacher"),
        (None, r"b\.jsonl: No such file or directory"),
    ],
)
def test_bad_input(tmp_path, compared, content, message):
    a, b = run(tmp_path / "a"), tmp_path / "b.jsonl"
    if content is not None:
        b.write_text(content)
    with pytest.raises(UserError, match=message):
        compared(a, b, "--common")


def test_bad_options(tmp_path, compared):
    a = run(tmp_path / "a")
    for tolerance in ("-1", "nan", "inf"):
        with pytest.raises(UserError, match=rf"--tolerance {tolerance}.*must be a number >= 0"):
            compared(a, a, "--tolerance", tolerance)
    with pytest.raises(UserError, match="--keys loss/studnt: neither run has one. Did you mean 'loss/student'"):
        compared(a, a, "--keys", "loss/studnt")
    with pytest.raises(UserError, match=r"no/metrics.jsonl|: No such file"):
        compared(a, tmp_path / "no")
    for wrong in (["--keys", "loss/*", "--all"], ["--tolerance", "x"]):
        with pytest.raises(SystemExit, match="2"):
            compared(a, a, *wrong)


def test_the_status_is_the_programs(tmp_path, monkeypatch, capsys):
    a, b = run(tmp_path / "a"), run(tmp_path / "b", loss__critic={3: 1.0})
    for other, status in ((a, 0), (b, 1), (tmp_path / "no", 2)):
        monkeypatch.setattr("sys.argv", ["compare_losses", str(a), str(other)])
        with pytest.raises(SystemExit) as exit_:
            compare_losses.cli(compare_losses.main)
        assert exit_.value.code == status
    assert capsys.readouterr().err == f"error: {tmp_path / 'no'}: No such file or directory\n"
    assert json.loads((a / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1  # read, not written
