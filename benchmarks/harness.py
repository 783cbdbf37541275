"""What all benchmarks share: interleaved timing, ratios with their spread, correctness gates, tables."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.roofline import GPU_PEAK_FLOPS, Work


class Times(dict[str, list[float]]):
    """Seconds of every round, by variant; on a GPU with the most bytes that were allocated in one."""

    def __init__(self, seconds: Mapping[str, list[float]], peak_bytes: Mapping[str, int] | None = None) -> None:
        super().__init__(seconds)
        self.peak_bytes = dict(peak_bytes or {})


MOST_ROUNDS = 101
SHORT_SECONDS = 15


class GateError(AssertionError):
    """Two variants do not compute the same: their times may not be compared."""


@dataclass(frozen=True)
class Setting:
    """How a run measures."""

    device: torch.device
    quick: bool = False
    """The smallest sizes and three rounds: does it run, are the results right?"""
    rounds: int = 9

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"


@dataclass
class Row:
    """One line of a table: how long one variant takes, divided by another."""

    what: str
    ratio: float | None = None
    """Median over the rounds of (variant / baseline in the same round); or a number that was counted."""
    interval: tuple[float, float] | None = None
    """95 % confidence interval of that median; None: counted, not measured."""
    predicted: float | None = None
    """The ratio, or on a GPU the milliseconds, that a closed form gives."""
    target: float | None = None
    """The ratio should be at most this."""
    error: float | None = None
    """Largest difference of the results / largest value, at the correctness gate."""
    absolute: dict[str, float] = field(default_factory=dict)
    """On a GPU: ms, TFLOP/s, MFU, GiB."""

    @property
    def verdict(self) -> str:
        """Which is faster; "inconclusive" when the rounds vary too much to tell: the interval reaches over 1."""
        if self.ratio is None or self.interval is None:
            return ""
        if self.interval[0] <= 1 <= self.interval[1]:
            return "inconclusive"
        return "faster" if self.ratio < 1 else "slower"

    @property
    def outcome(self) -> str:
        """Whether the target is met."""
        if self.target is None:
            return ""
        low, high = self.interval or (self.ratio, self.ratio)
        word = "met" if high <= self.target else "missed" if low > self.target else "inconclusive"
        return f"<= {self.target:.2f}: {word}"


@dataclass
class Result:
    """One benchmark: its rows, and the sizes it was run with."""

    title: str
    sizes: str
    rows: list[Row]
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        rows = [{**vars(row), "verdict": row.verdict, "outcome": row.outcome} for row in self.rows]
        return {**vars(self), "rows": rows}


def interleave(
    variants: Mapping[str, Callable[[], object]],
    setting: Setting,
    *,
    warmup: int = 2,
    wall: bool = False,
    before: Mapping[str, Callable[[], object]] | None = None,
) -> Times:
    """Run the variants in turn, A B C, C B A, A B C ..., once a round, and time each; more rounds than asked for when they are
    short. No variant always has the same one before it, whose memory and caches it finds.

    On a CPU the clock is the process' own time, so that other processes do not count; `wall` for what waits (disks, workers,
    other processes). On a GPU it is wall time between synchronisations. What `before` has for a variant runs first, untimed.
    """
    clock = time.perf_counter if wall or setting.is_gpu else time.process_time
    warmup, least = (1, 3) if setting.quick else (warmup, setting.rounds)
    times, peaks = {name: [] for name in variants}, {}
    gc.collect()
    gc.disable()  # a collection would hit whichever variant runs then
    begin, number = time.perf_counter(), 0
    try:
        while number < warmup + least or (
            not setting.quick and number < MOST_ROUNDS and time.perf_counter() - begin < SHORT_SECONDS
        ):
            turn = list(variants.items())
            for name, run in turn[::-1] if number % 2 else turn:
                if before and name in before:
                    before[name]()
                synchronise(setting)
                if setting.is_gpu:
                    torch.cuda.reset_peak_memory_stats(setting.device)
                start = clock()
                run()
                synchronise(setting)
                times[name].append(clock() - start)
                if setting.is_gpu:
                    peaks[name] = torch.cuda.max_memory_allocated(setting.device)
            number += 1
            gc.collect()
    finally:
        gc.enable()
    return Times({name: seconds[warmup:] for name, seconds in times.items()}, peaks)


def synchronise(setting: Setting) -> None:
    if setting.is_gpu:
        torch.cuda.synchronize(setting.device)


def compare(
    times: Times,
    variant: str,
    baseline: str,
    *,
    what: str = "",
    target: float | None = None,
    error: float | None = None,
    predicted: float | None = None,
    scale: float = 1.0,
) -> Row:
    """The row `variant / baseline`; `scale` divides the ratio (by how much more work the variant does)."""
    ratios = [a / b / scale for a, b in zip(times[variant], times[baseline], strict=True)]
    return Row(what or f"{variant} / {baseline}", statistics.median(ratios), interval(ratios), predicted, target, error)


def interval(values: list[float]) -> tuple[float, float]:
    """95 % confidence interval of the median, from the order of the values alone (the sign test); all of them when there
    are fewer than six."""
    values, n = sorted(values), len(values)
    tail, below = 0.5**n, 0  # of n values, `below` or fewer fall below the median with probability `tail`
    while tail <= 0.025 and below < n // 2:
        below += 1
        tail += math.comb(n, below) * 0.5**n
    below = max(below - 1, 0)
    return values[below], values[-1 - below]


def absolute(what: str, times: Times, variant: str, work: Work) -> Row:
    """A row of absolute numbers, for a GPU: the median time, what it means, and what the roofline predicts."""
    seconds = statistics.median(times[variant])
    return Row(
        what,
        predicted=1e3 * work.seconds(),
        absolute={
            "ms": 1e3 * seconds,
            "ms_min": 1e3 * min(times[variant]),
            "tflops": work.flops / seconds / 1e12,
            "mfu": work.model_flops / seconds / GPU_PEAK_FLOPS,
            "gib": times.peak_bytes[variant] / 2**30,
        },
    )


def gate(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> float:
    """Largest difference / largest expected value. Raises `GateError` when it is above the tolerance or not finite."""
    error = float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())
    if not error <= tolerance:
        raise GateError(f"{what}: the results differ by {error:.1e} of the largest value, allowed are {tolerance:.0e}")
    return error


def to_markdown(name: str, result: Result) -> str:
    """The benchmark as a heading, its sizes and one table."""
    gpu = any(row.absolute for row in result.rows)
    header = ["what", "ratio", "95 % interval", "verdict", "target", "predicted", "max rel. error"]
    header += ["ms", "TFLOP/s", "MFU", "GiB"] if gpu else []
    lines = [
        f"## {name} {result.title}",
        "",
        result.sizes,
        "",
        f"| {' | '.join(header)} |",
        "|" + " --- |" * len(header),
    ]
    for row in result.rows:
        spread = f"{row.interval[0]:.3f} - {row.interval[1]:.3f}" if row.interval else ""
        unit = " ms" if row.absolute else ""
        cells = [
            row.what,
            _cell(row.ratio, ".3f"),
            spread,
            row.verdict,
            row.outcome,
            _cell(row.predicted, ".3g", unit),
            _cell(row.error, ".1e"),
        ]
        if gpu:
            formats = {"ms": ".1f", "tflops": ".0f", "mfu": ".1%", "gib": ".1f"}
            cells += [_cell(row.absolute.get(key), form) for key, form in formats.items()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{note}\n" for note in result.notes)])


def _cell(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"
