"""Ablations that must matter: the tiny recipes with one thing broken, beside the students that were trained without.

    python -m benchmarks.ablations --chain outputs/chain/seed-0 --output outputs/ablations
    python -m benchmarks.ablations --chain outputs/chain/seed-0 --only no_critic

`--chain` is a folder of finished runs, tiny_dmd2, tiny_kd and tiny_self_forcing; the command runs where they were trained, for
the paths in their configurations. Every ablation is train.py with one patch and with the configuration that is saved with the
student's newest checkpoint: the same recipe, steps, seed and initial weights. Two train side by side where there are two cores.
One that was interrupted goes on, and a finished one is not trained again.

Student and ablation are then sampled alike, on the same captions and noise, as their method says: it is the training of an
ablation that is broken, not its sampler.

An ablation is visibly worse when in at least one of colour, shape, direction, area_constancy, area_drift, speed_drift the mean
is worse by at least 0.02 and the 90 % bootstrap interval of the paired difference excludes 0. The exit status is 1 when one is
not. These are six looks: equal students would pass now and then, where a measure varies enough for a difference of 0.02.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fvtitan.components.files import write_atomic
from fvtitan.components.visualise import contact_sheet
from fvtitan.config import JobConfig, read_toml
from fvtitan.data.moving_shapes import measured
from fvtitan.errors import UserError, cli, did_you_mean
from fvtitan.methods.dmd2 import DMD2Method
from fvtitan.methods.kd import KDMethod
from fvtitan.methods.self_forcing import Exit, SelfForcingMethod
from fvtitan.score import CONFIDENCE, Row, comparison, paired_difference, score_sources, table

LOOKED_AT = ("colour", "shape", "direction", "area_constancy", "area_drift", "speed_drift")
LOWER_IS_BETTER = ("area_drift", "speed_drift")
VISIBLE = 0.02
SIDE_BY_SIDE = 2

Patch = Callable[[type, str, Any], None]
"""`setattr`, or one that a test can undo."""


# ------------------------------------------------------------------------------------------------- what is broken


def no_critic(patch: Patch = setattr) -> None:
    """DMD2 whose critic stays the teacher: its phases run, on the same batches, but its optimizer's learning rate is 0."""
    build = DMD2Method.__init__

    def freeze(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:  # before every step: the schedule sets it anew
            group["lr"] = 0.0

    def broken(self: DMD2Method, **keys: Any) -> None:
        build(self, **keys)
        self.optimizers["critic"].register_step_pre_hook(freeze)

    patch(DMD2Method, "__init__", broken)


def wrong_shift(patch: Patch = setattr) -> None:
    """KD whose states are labelled with the sigmas of shift 1; trajectories and sampler keep the run's own."""
    build = KDMethod.__init__

    def broken(self: KDMethod, **keys: Any) -> None:
        build(self, **keys)
        self.sigmas = torch.tensor(self.cfg.method.ladder(1.0)[:-1], device=self.device)

    patch(KDMethod, "__init__", broken)


def no_context_pass(patch: Patch = setattr) -> None:
    """Self-Forcing without the forward of the clean block: the cache keeps the keys and values of the forward at which the
    block left the ladder, of its noisy state. That forward is run again: with gradient it writes nothing into the cache."""
    leave = SelfForcingMethod.leave

    def remember(self: SelfForcingMethod, exit_: Exit, *given: Any) -> torch.Tensor:
        self.last_exit = exit_
        return leave(self, exit_, *given)

    def broken(self: SelfForcingMethod, _block: Any, _noise: Any, cond: Any, cache: Any, start: int) -> None:
        exit_ = self.last_exit
        self.student.commit(exit_.noisy, cond, cache, start, float(exit_.sigma[0, 0]))

    patch(SelfForcingMethod, "leave", remember)
    patch(SelfForcingMethod, "commit", broken)


def no_context(patch: Patch = setattr) -> None:
    """Self-Forcing whose finished blocks never reach the cache: a forward of their first noise, at sigma 1, is kept in their
    place, so no block sees the one before it."""

    def broken(self: SelfForcingMethod, _block: Any, noise: Any, cond: Any, cache: Any, start: int) -> None:
        self.student.commit(noise(0), cond, cache, start, 1.0)

    patch(SelfForcingMethod, "commit", broken)


ABLATIONS = {  # and the recipe whose student it is compared with
    "no_critic": (no_critic, "tiny_dmd2"),
    "wrong_shift": (wrong_shift, "tiny_kd"),
    "no_context_pass": (no_context_pass, "tiny_self_forcing"),
    "no_context": (no_context, "tiny_self_forcing"),
}


# ------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Student:
    """A student of the chain: its newest checkpoint, and the configuration of its run."""

    checkpoint: Path
    cfg: JobConfig


def newest_checkpoint(folder: Path) -> Path:
    """The `step-<N>` of a run with the largest N. Raises `UserError` when there is none."""
    found = [path for path in folder.glob("checkpoint/step-*") if re.fullmatch(r"step-\d+", path.name)]
    if not found:
        raise UserError(f"{folder}/checkpoint holds no checkpoint: train this student first")
    return max(found, key=lambda path: int(path.name.removeprefix("step-")))


def finished_student(folder: Path) -> Student:
    """The student of a run's folder. Raises `UserError` when its run has not made all its steps."""
    checkpoint = newest_checkpoint(folder)
    cfg = read_toml(checkpoint / "config.toml")
    if checkpoint.name != f"step-{cfg.training.steps}":
        raise UserError(f"{checkpoint}: the run has {cfg.training.steps} steps: let it finish first")
    return Student(checkpoint, cfg)


def train_broken(name: str, arguments: Sequence[str]) -> int:
    """train.py in this process, with an ablation's patch; its exit status."""
    import train

    ABLATIONS[name][0]()
    sys.argv = ["train.py", *arguments]
    return train.main()


def command(name: str, student: Student, output: Path, steps: int | None) -> list[str]:
    """The command line of an ablation's training."""
    words = ["--job.config_file", str(student.checkpoint / "config.toml"), "--job.dump_folder", str(output / name)]
    words += ["--validation.enable", "false", *(["--training.steps", str(steps)] if steps else [])]
    return [sys.executable, "-m", "benchmarks.ablations", "train", name, "--", *words]


def train_all(commands: dict[str, list[str]], output: Path) -> None:
    """Run the commands, two at a time where there are two cores; each writes `<output>/<name>.log`. Raises `UserError` when one
    fails, after the others have finished. When this process is stopped, so are they: train.py saves and ends."""
    waiting, running, failed = list(commands), {}, []
    places = min(SIDE_BY_SIDE, len(os.sched_getaffinity(0)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or running:
            while waiting and len(running) < places:
                name = waiting.pop(0)
                print(f"training {name}: {output / name}.log", flush=True)
                with (output / f"{name}.log").open("a") as log:
                    # In a group of its own, so that Ctrl-C reaches it once: train.py leaves at once at the second signal.
                    running[name] = subprocess.Popen(
                        commands[name], env=environment, stdout=log, stderr=log, process_group=0
                    )
            for name in [name for name, child in running.items() if child.poll() is not None]:
                status = running.pop(name).returncode
                failed += [f"{name} ended with status {status}, see {output / name}.log"] if status else []
            time.sleep(0.2)
    finally:
        for child in running.values():
            child.terminate()
        for child in running.values():
            child.wait()
    if failed:
        raise UserError("; ".join(failed))


# -------------------------------------------------------------------------------------------------------- scoring


def worse_in(ablated: Row, student: Row) -> dict[str, tuple[float, float, float]]:
    """The measures in which an ablation is visibly worse than the student, with `paired_difference` of ablated - student."""
    found = {}
    for name in LOOKED_AT:
        difference = paired_difference(measured(ablated.judged, name), measured(student.judged, name))
        mean, *ends = [value if name in LOWER_IS_BETTER else -value for value in difference]
        if mean >= VISIBLE and min(ends) > 0:
            found[name] = difference
    return found


def score_pair(student: Path, ablated: Path, cfg: JobConfig, num_videos: int, sheets: dict[Path, Path]) -> list[Row]:
    """The rows of both, on videos as long as the training's; `sheets`: where a checkpoint's contact sheet goes."""
    sources = [str(student), str(ablated)]
    keys = {"steps": (), "guidance": (), "lengths": (cfg.data.num_frames,), "num_videos": num_videos}
    rows = []
    for row, shown in itertools.islice(score_sources(sources, **keys, pipeline=cfg.data.pipeline), len(sources)):
        rows.append(row)
        contact_sheet(shown, sheets[Path(row.model)])
    return rows


def verdict(name: str, found: dict[str, tuple[float, float, float]]) -> str:
    """One line."""
    words = [f"{what} {mean:+.3f} [{low:+.3f}, {high:+.3f}]" for what, (mean, low, high) in found.items()]
    return f"{name}: visibly worse in {', '.join(words)}" if words else f"{name}: NOT visibly worse"


def main() -> int:
    if sys.argv[1:2] == ["train"]:
        return train_broken(sys.argv[2], sys.argv[4:])  # after --
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablations", description="Break one thing in a recipe; is the student visibly worse?"
    )
    parser.add_argument("--chain", type=Path, required=True, help="folder of the finished runs, by recipe")
    parser.add_argument("--output", type=Path, default=Path("outputs/ablations"), help="for runs and results")
    parser.add_argument("--only", default="", help=f"comma-separated, of {', '.join(ABLATIONS)}; default: all")
    parser.add_argument("--steps", type=int, help="train the ablations for fewer steps, to see that everything runs")
    parser.add_argument("--num-videos", type=int, default=192, help="videos a row (192)")
    args = parser.parse_args()
    names = [name.strip() for name in args.only.split(",") if name.strip()] or list(ABLATIONS)
    for name in names:
        if name not in ABLATIONS:
            raise UserError(f"--only {name}: is no ablation.{did_you_mean(name, ABLATIONS)}")
    for option, value in (("--steps", args.steps), ("--num-videos", args.num_videos)):
        if value is not None and value < 1:
            raise UserError(f"{option} {value}: must be >= 1")
    students = {name: finished_student(args.chain / ABLATIONS[name][1]) for name in names}
    args.output.mkdir(parents=True, exist_ok=True)
    train_all({name: command(name, students[name], args.output, args.steps) for name in names}, args.output)

    rows: list[Row] = []
    compared: list[str] = []
    verdicts: dict[str, bool] = {}
    lines: list[str] = []
    for name, student in students.items():
        ablated = newest_checkpoint(args.output / name)
        sheets = {student.checkpoint: args.output / f"{ABLATIONS[name][1]}.png", ablated: args.output / f"{name}.png"}
        pair = score_pair(student.checkpoint, ablated, student.cfg, args.num_videos, sheets)
        found = worse_in(pair[1], pair[0])
        lines.append(verdict(name, found))
        print(lines[-1], flush=True)
        verdicts[name] = bool(found)
        compared += comparison(pair).splitlines()[2 if compared else 0 :]
        rows += pair
    parts = [
        f"{args.num_videos} videos a row\n{table(rows)}",
        f"Differences on the same captions and noise, with {CONFIDENCE:.0%} bootstrap intervals\n"
        + "\n".join(compared),
        "\n".join(lines),
    ]
    text = "\n\n".join(parts)
    write_atomic(args.output / "results.md", text + "\n")
    records = [dataclasses.asdict(row) | {"scores": row.scores} for row in rows]
    write_atomic(args.output / "rows.json", json.dumps(records, indent=1))
    print(f"\n{text}")
    return 0 if all(verdicts.values()) else 1


if __name__ == "__main__":
    cli(main)
