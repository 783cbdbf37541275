"""The benchmarks run, their correctness gates hold, and what they write has its shape. No time is asserted."""

import json
import math
import subprocess
import sys

import pytest
import torch

from benchmarks.harness import GateError, Row, Setting, Times, compare, gate, interleave, interval
from benchmarks.run import BENCHMARKS, main
from tests.helpers import ROOT

CHEAP = ("B6",)


@pytest.mark.parametrize(
    "names", [CHEAP, pytest.param(tuple(BENCHMARKS), marks=pytest.mark.slow)], ids=["cheap", "all"]
)
def test_quick_run(tmp_path, names):
    command = [sys.executable, "-m", "benchmarks.run", "--quick", "--output", str(tmp_path), "--only", ",".join(names)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["machine"].keys() >= {"device", "cores", "threads", "torch", "date", "command", "rounds"}
    assert tuple(report["benchmarks"]) == names
    table = (tmp_path / "results.md").read_text()
    for name, result in report["benchmarks"].items():
        assert f"## {name} {result['title']}" in table and result["rows"], name
        assert name not in CHEAP or any(row["error"] is not None for row in result["rows"]), f"{name} has no gate"
        for row in result["rows"]:
            assert math.isfinite(row["ratio"]) and not row["absolute"], (name, row)  # on a CPU ratios alone
            if row["interval"] is not None:
                low, high = row["interval"]
                assert low <= row["ratio"] <= high, (name, row)
                assert row["verdict"] in ("faster", "slower", "inconclusive"), (name, row)
            assert f"| {row['what']} | {row['ratio']:.3f} |" in table, (name, row)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--only", "B1,B99"], "B99 unknown; there are B1, B2"), (["--rounds", "3"], "fewer than 7 say nothing")],
)
def test_what_cannot_be_run_is_refused(monkeypatch, capsys, words, message):
    monkeypatch.setattr(sys, "argv", ["benchmarks.run", *words])
    with pytest.raises(SystemExit):
        main()
    assert message in capsys.readouterr().err


def test_every_benchmark_has_a_file():
    assert all((ROOT / "benchmarks" / f"{module}.py").is_file() for module in BENCHMARKS.values())


def test_gate():
    expected = torch.tensor([1.0, -4.0])
    assert gate(expected + torch.tensor([0.0, 0.04]), expected, 0.011, "x") == pytest.approx(0.01, rel=1e-3)
    with pytest.raises(GateError, match=r"x: the results differ by 1.0e-02"):
        gate(expected + torch.tensor([0.0, 0.04]), expected, 0.009, "x")
    with pytest.raises(GateError):
        gate(torch.tensor([math.nan, 1.0]), expected, 0.1, "x")


def test_ratios_are_taken_round_by_round():
    """A machine that is twice as slow in some rounds changes no ratio; one that varies within a round leaves it open."""
    speed = [1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0]
    times = Times({"a": [0.9 * s for s in speed], "b": speed, "c": [s * (0.8 + 0.05 * i) for i, s in enumerate(speed)]})
    row = compare(times, "a", "b", target=0.95)
    assert row.ratio == pytest.approx(0.9) and row.verdict == "faster" and row.outcome == "<= 0.95: met"
    assert compare(times, "b", "a", target=1.05).outcome == "<= 1.05: missed"
    assert compare(times, "c", "b", target=1.0).verdict == "inconclusive"
    assert compare(times, "c", "b", target=1.0).outcome == "<= 1.00: inconclusive"
    assert compare(times, "a", "b", scale=3.0).ratio == pytest.approx(0.3)
    assert Row("counted", 1.0, target=1.05).outcome == "<= 1.05: met" and Row("counted", 1.0).verdict == ""


@pytest.mark.parametrize("n", [6, 9, 20])
def test_interval_holds_the_median_95_times_in_100(n):
    rng = torch.Generator().manual_seed(n)
    hits = 0
    for _ in range(1000):
        low, high = interval(torch.rand(n, generator=rng, dtype=torch.float64).tolist())
        hits += low <= 0.5 <= high
    assert 945 <= hits <= 990  # order statistics come in steps: up to 98 %


def test_rounds_are_interleaved():
    order: list[str] = []
    variants = {name: lambda name=name: order.append(name) for name in "ab"}
    times = interleave(variants, Setting(torch.device("cpu"), quick=True), before={"b": lambda: order.append("-")})
    assert "".join(order) == "a-b-ba" * 2 and all(len(seconds) == 3 for seconds in times.values())
