"""Run the benchmarks and write one JSON file and one table a benchmark.

python -m benchmarks.run [--only B1,B2] [--quick] [--rounds 9] [--device cuda] [--output DIR]

On a CPU only ratios are reported: how long one variant takes, divided by another of the same run, round by round. On a GPU
(no change of code) absolute numbers with TFLOP/s, MFU, GiB, and beside them what the roofline predicts, for Wan's own sizes.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import shlex
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Setting, to_markdown

BENCHMARKS = {
    "B1": "block",
    "B2": "sft_step",
    "B3": "trainer_overhead",
    "B4": "rollout",
    "B5": "method_steps",
    "B6": "block_causal",
    "B7": "loader",
    "B8": "checkpointing",
    "B9": "frames",
    "B10": "switches",
    "B11": "startup",
    "M1": "dmd2_memory",
    "M2": "self_forcing_memory",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help=f"comma-separated, of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument(
        "--quick", action="store_true", help="smallest sizes, 3 rounds: does it run, are results right?"
    )
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds, at least 7")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks"))
    args = parser.parse_args()
    names = [name.strip() for name in args.only.split(",") if name.strip()] or list(BENCHMARKS)
    if unknown := set(names) - set(BENCHMARKS):
        parser.error(f"--only: {', '.join(sorted(unknown))} unknown; there are {', '.join(BENCHMARKS)}")
    if args.rounds < 7:
        parser.error(f"--rounds {args.rounds}: fewer than 7 say nothing")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    setting = Setting(torch.device(args.device), args.quick, args.rounds)
    report: dict[str, Any] = {"machine": machine(setting), "benchmarks": {}}
    args.output.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in names:
        start = time.perf_counter()
        try:
            result = importlib.import_module(f"benchmarks.{BENCHMARKS[name]}").run(setting)
        except Exception:  # the others still run; the exit status says so
            traceback.print_exc()
            failed.append(name)
            continue
        report["benchmarks"][name] = result.to_json()
        print(f"{to_markdown(name, result)}\n({time.perf_counter() - start:.0f} s)\n", flush=True)
        write(args.output, report)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def machine(setting: Setting) -> dict[str, Any]:
    """What the numbers depend on."""
    if setting.is_gpu:
        device = torch.cuda.get_device_name(setting.device)
    else:
        models = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
        device = models[0].split(":")[1].strip() if models else platform.machine()
    return {
        "device": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_at_start": [round(value, 2) for value in os.getloadavg()],
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "-m", "benchmarks.run", *sys.argv[1:]]),
        "rounds": 3 if setting.quick else setting.rounds,
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


def write(folder: Path, report: dict[str, Any]) -> None:
    """`results.json` and `results.md`, of what is there so far."""
    from benchmarks.harness import Result, Row

    (folder / "results.json").write_text(json.dumps(report, indent=1))
    parts = ["  ".join(f"{key}: {value}" for key, value in report["machine"].items())]
    for name, result in report["benchmarks"].items():
        rows = [
            Row(**{key: value for key, value in row.items() if key in Row.__dataclass_fields__})
            for row in result["rows"]
        ]
        parts.append(to_markdown(name, Result(**{**result, "rows": rows})))
    (folder / "results.md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
