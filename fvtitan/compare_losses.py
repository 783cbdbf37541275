"""Did a change leave the numbers alone? Compares the losses and gradient norms that two runs logged, step by step, bit by bit.

    python -m fvtitan.compare_losses outputs/before outputs/after
    python -m fvtitan.compare_losses outputs/1_rank outputs/2_ranks --tolerance 1e-5

One line a key: how many steps both have, the first that differs with both values, the largest relative difference. Exit status
0: equal; 1: different, or only one of them has a step or a key; 2: bad input.
"""

from __future__ import annotations

import argparse
import fnmatch
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from fvtitan.components.metrics import read_metrics
from fvtitan.errors import UserError, cli, did_you_mean, listed, shortened

KEYS = ("loss/*", "grad_norm/*")

Run = dict[int, dict[str, float]]
"""The values of each logged step."""


def read_run(path: Path) -> Run:
    """Of a run's folder or its `metrics.jsonl`; of a step that is there twice, the last. Raises `UserError`."""
    path = path / "metrics.jsonl" if path.is_dir() else path
    try:
        records = read_metrics(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    run: Run = {}
    for record in records:
        step = record.pop("step")
        try:
            run[step] = {key: float(value) for key, value in record.items()}
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{path}: a value of step {step} is not a number: {shortened(error)}") from None
    return run


def difference(a: float, b: float) -> float:
    """|a - b| / max(|a|, |b|); NaN is NaN, and infinitely far from everything else."""
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b))


def differs(a: float, b: float, tolerance: float) -> bool:
    """Bit by bit (0 is not -0, NaN is NaN), or relatively by more than `tolerance`."""
    return difference(a, b) > tolerance if tolerance else a.hex() != b.hex()


def chosen(run: Run, patterns: Sequence[str], everything: bool) -> Run:
    """The values of the keys that are compared, and the steps that have any."""

    def compared(key: str) -> bool:
        return not key.startswith("perf/") if everything else any(fnmatch.fnmatchcase(key, each) for each in patterns)

    values = {step: {key: value for key, value in record.items() if compared(key)} for step, record in run.items()}
    return {step: record for step, record in values.items() if record}


def spans(steps: Iterable[int]) -> str:
    """`1 to 10, 20`: consecutive numbers joined."""
    parts: list[list[int]] = []
    for step in sorted(steps):
        if parts and step == parts[-1][1] + 1:
            parts[-1][1] = step
        else:
            parts.append([step, step])
    return listed(str(first) if first == last else f"{first} to {last}" for first, last in parts)


def compare(a: Run, b: Run, tolerance: float = 0.0, common: bool = False) -> tuple[list[str], bool]:
    """(the lines of the report, whether the runs are equal). With `common`, what only one of them has does not count. Raises
    `UserError` when nothing is in both."""
    both = sorted(a.keys() & b.keys())
    if not both:
        raise UserError(f"no step in common: A has {spans(a) or 'none'}, B has {spans(b) or 'none'}")
    lines, equal = [], True

    def alone(what: str, in_a: Iterable[int], in_b: Iterable[int]) -> None:
        nonlocal equal
        for name, steps in (("A", set(in_a) - set(in_b)), ("B", set(in_b) - set(in_a))):
            if steps:
                lines.append(f"{what}only in {name}: steps {spans(steps)}")
                equal = equal and common

    alone("", a, b)
    keys = sorted({key for step in both for key in a[step] | b[step]})
    if not any(a[step].keys() & b[step].keys() for step in both):
        raise UserError(
            f"no key in common: A and B have {listed(keys)}, neither has one at a step where the other does"
        )
    width = max(map(len, keys))
    for key in keys:
        in_a, in_b = ([step for step in both if key in run[step]] for run in (a, b))
        alone(f"{key:{width}}  ", in_a, in_b)
        pairs = [(step, a[step][key], b[step][key]) for step in in_a if key in b[step]]
        if not pairs:
            continue
        apart = [pair for pair in pairs if differs(*pair[1:], tolerance)]
        largest, at = max((difference(x, y), -step) for step, x, y in pairs)
        verdict = f"equal to {tolerance:g}" if tolerance else "equal"
        if apart:
            step, x, y = apart[0]
            verdict, equal = f"DIFFERENT from step {step}: {x!r} and {y!r}", False
        relative = f"; largest relative difference {largest:.1e} at step {-at}" if largest else ""
        lines.append(f"{key:{width}}  {len(pairs)} steps {verdict}{relative}")
    return lines, equal


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fvtitan.compare_losses",
        description=__doc__.split("\n\n")[0],
        epilog="Exit status 0: equal; 1: different, or only one of them has a step or a key; 2: bad input.",
    )
    parser.add_argument("a", type=Path, metavar="A", help="folder of a run, or its metrics.jsonl")
    parser.add_argument("b", type=Path, metavar="B", help="the other")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--keys", nargs="+", default=KEYS, help=f"or patterns of keys ({' '.join(KEYS)})")
    which.add_argument("--all", action="store_true", help="all keys but perf/*")
    parser.add_argument(
        "--tolerance", type=float, default=0.0, help="relative difference that is allowed (%(default)s: bit by bit)"
    )
    parser.add_argument("--common", action="store_true", help="do not mind steps and keys that only one of them has")
    args = parser.parse_args()
    if not 0 <= args.tolerance < math.inf:
        raise UserError(f"--tolerance {args.tolerance}: must be a number >= 0")
    runs = [read_run(path) for path in (args.a, args.b)]
    there = {key for run in runs for record in run.values() for key in record}
    for pattern in args.keys if args.keys is not KEYS else ():
        if not fnmatch.filter(there, pattern):
            raise UserError(f"--keys {pattern}: neither run has one.{did_you_mean(pattern, there)}")
    lines, equal = compare(*(chosen(run, args.keys, args.all) for run in runs), args.tolerance, args.common)
    print(f"A {args.a}\nB {args.b}", *lines, sep="\n")
    return 0 if equal else 1


if __name__ == "__main__":
    cli(main)
