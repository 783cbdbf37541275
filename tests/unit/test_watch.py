"""Watching for collapse, from readings alone; that real faults in real runs give them is in integration/test_dmd2.py."""

from __future__ import annotations

import pytest

from fvtitan.methods.watch import READINGS, CollapseWatch

MOTION, VARIANCE, CRITIC = "dmd/motion_to_teacher", "dmd/variance_to_teacher", "dmd/critic_error_ratio"


def read(watch: CollapseWatch, name: str, values: list[float]) -> list[int]:
    """The readings (0-based) at which something was said."""
    return [i for i, value in enumerate(values) if watch.read({name: value})]


FAULTS = [
    (MOTION, 0.1, "are becoming static: their motion is 0.10 of what the teacher makes of them"),
    (VARIANCE, 40.0, "the variance of the student's latents drifts: it is 40.00"),
    (VARIANCE, 0.01, "the variance of the student's latents drifts: it is 0.01"),
    (
        CRITIC,
        3.0,
        "the critic is losing: it denoises the student's videos worse than the teacher does (squared error x 3.00",
    ),
]


@pytest.mark.parametrize(("name", "value", "words"), FAULTS)
def test_a_collapse_from_the_start_is_said_after_a_few_readings(name, value, words):
    """There is no healthy start to compare it with; one line, with what to look at."""
    watch = CollapseWatch()
    said = [watch.read({name: value}) for _ in range(40)]
    assert [bool(lines) for lines in said] == [i == READINGS - 1 for i in range(40)]
    (line,) = said[READINGS - 1]
    assert words in line and "Known causes: " in line and "\n" not in line


@pytest.mark.parametrize(("name", "value", "_"), FAULTS)
def test_what_leaves_its_range_is_said_once_and_again_after_it_was_back(name, value, _):
    watch = CollapseWatch()
    assert read(watch, name, [1.0] * 20) == []
    assert len(read(watch, name, [value] * 40)) == 1
    assert read(watch, name, [1.0] * 40) == []
    assert len(read(watch, name, [value] * 40)) == 1


@pytest.mark.parametrize(
    ("name", "value"), [(MOTION, 0.5), (MOTION, 50.0), (VARIANCE, 0.25), (VARIANCE, 2.5), (CRITIC, 1.2), (CRITIC, 0.01)]
)
def test_what_stays_in_its_range_is_not_said(name, value):
    assert read(CollapseWatch(), name, [value] * 100) == []


def test_one_odd_reading_says_nothing():
    for name, odd in ((MOTION, 0.1), (VARIANCE, 8.0), (VARIANCE, 0.05), (CRITIC, 1.9)):
        assert read(CollapseWatch(), name, [1.0] * 20 + [odd] + [1.0] * 20) == [], name


def test_what_is_not_there_is_not_judged_and_readings_count_by_name():
    """Motion comes with finished videos alone, the critic's error with student steps."""
    watch = CollapseWatch()
    for i in range(30):
        values = {"loss/critic": 1.0} | ({MOTION: 1.0} if i % 5 == 0 else {}) | ({VARIANCE: 1.0} if i % 2 else {})
        assert watch.read(values) == []
    assert watch.read({}) == []
    said = [message for _ in range(20) for message in watch.read({MOTION: 0.0, VARIANCE: 0.0, CRITIC: 9.0})]
    assert len(said) == 3
