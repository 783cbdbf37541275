"""The switch of the fault tests: off without FVTITAN_TEST=1, strict about what it is told."""

from __future__ import annotations

import pytest
import torch

from fvtitan.components import faults
from fvtitan.errors import UserError
from tests.helpers import small_arguments, train


@pytest.fixture
def arm():
    yield lambda text: faults.arm({"FVTITAN_TEST": "1", "FVTITAN_FAULTS": text})
    faults.arm({})


def test_outside_of_tests_a_run_with_faults_does_not_start(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FVTITAN_FAULTS", "kill step step=1")
    monkeypatch.delenv("FVTITAN_TEST", raising=False)
    assert train(small_arguments(tmp_path, tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert "FVTITAN_FAULTS = 'kill step step=1'" in error and "FVTITAN_TEST=1" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kill stepp", "'stepp' is not a point. Did you mean 'step'?"),
        ("kil step", "'kil' cannot happen there. Did you mean 'kill'?"),
        ("nan step", "'nan' cannot happen there"),
        ("kill step steps=2", "'steps=2' is not step=N"),
        ("kill step step=x", "'step=x' is not step=N"),
        ("kill", "'' is not a point"),
        ("kill step;", "''"),
    ],
)
def test_what_is_not_a_fault_is_refused(arm, text, message):
    with pytest.raises(UserError) as error:
        arm(text)
    assert message in str(error.value)


def test_a_fault_happens_where_it_is_asked_for(arm, monkeypatch):
    arm("raise step step=3 rank=1; nan loss times=2; inf loss step=9 times=0")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        faults.reach("step", 2)
        faults.reach("loader", 3)
    monkeypatch.setenv("RANK", "0")
    faults.reach("step", 3)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(RuntimeError, match="FVTITAN_FAULTS at step"):
        faults.reach("step", 3)
    faults.reach("step", 3)  # once

    one = torch.ones(2, requires_grad=True)
    assert all(torch.isnan(faults.spoil("loss", one, step)).all() for step in (1, 2))
    assert faults.spoil("loss", one, 3) is one
    for _ in range(3):
        spoiled = faults.spoil("loss", one, 9)
        assert torch.isinf(spoiled).all() and spoiled.requires_grad
