"""The chain on a laptop: from the shipped tiny-wan to few-step and streaming students, judged in one table and one picture.

    python -m fvtitan.chain                                   # about half an hour on 2 CPU cores
    python -m fvtitan.chain --seeds 0 1 2 --output outputs/chain

Trains `tiny_dfsft.toml`, `tiny_kd.toml`, `tiny_dmd2.toml`, `tiny_kd_causal.toml` and `tiny_self_forcing.toml` with train.py, as
many at a time as there are cores; scores each beside its teacher and its untrained self, at the trained length and at three
times that; and compares the scores with the "Expect" lines in the recipes' headers. `--output` gets

    seed-<s>/<recipe>/      the runs
    scores/                 what the judge measured, a folder a model
    log/                    what each stage printed
    results.md              the table, what the recipes expect, where and when; results.json: the same for programs
    contact_sheet.png       held-out captions x models; contact_sheet.gif: the same, moving

The same command goes on where it was stopped. Exit status: 0; 1 when a stage failed or a score is not what its recipe
expects; 2 for bad input; 75 when a signal stopped it.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import itertools
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fvtitan.components.files import write_atomic
from fvtitan.components.stops import EXIT_STOPPED
from fvtitan.components.visualise import comparison_sheet
from fvtitan.config import read_toml
from fvtitan.data.moving_shapes import held_out_combinations
from fvtitan.errors import UserError, cli
from fvtitan.flow_matching import euler_ladder, few_step_ladder
from fvtitan.generate import load_model, parse_rungs
from fvtitan.methods import METHODS
from fvtitan.models.encoders import TextEncoder, VideoVAE
from fvtitan.models.pipeline import TINY_WAN
from fvtitan.samplers import SamplerSpec, num_forwards
from fvtitan.score import score

TRAIN = Path(__file__).parents[1] / "train.py"
STUDENTS = ("tiny_dfsft", "tiny_kd", "tiny_dmd2", "tiny_kd_causal", "tiny_self_forcing")
STREAMING = ("tiny_dfsft", "tiny_kd_causal", "tiny_self_forcing")
UNTRAINED = ("tiny_dfsft", "tiny_kd_causal")  # judged as they began too; the others began as rows that are there anyway
GOES_ON_WITH = {"tiny_kd_causal": "tiny_dfsft", "tiny_self_forcing": "tiny_kd_causal"}
RUNGS = {4: "1000,750,500,250", 2: "1000,500"}
EULER_STEPS = (50, 4, 2)
SHEET_PROMPTS = 4
SCORES = ("colour", "shape", "direction", "area_drift", "speed_drift")


@dataclass(frozen=True)
class Stage:
    """One program of the chain."""

    name: str
    command: tuple[str, ...]
    after: tuple[str, ...] = ()
    """Stages whose results it reads."""
    model: Path | None = None
    """Of a stage that scores: what. Such a stage is not run again for the same model; a training sees itself that it is
    finished."""


@dataclass(frozen=True)
class Chain:
    """What is trained, on which seeds, and where it goes."""

    recipes: Path
    output: Path
    seeds: Sequence[int]
    num_videos: Sequence[int]
    """Judged videos a row, one number a length."""

    def recipe(self, name: str) -> Path:
        return self.recipes / f"{name}.toml"

    @property
    def lengths(self) -> tuple[int, int]:
        """Frames of the judged videos: as in training, and three times as many latent frames."""
        trained = read_toml(self.recipe(STUDENTS[0])).data.num_frames
        return trained, 3 * (trained + 3) - 3

    def checkpoint(self, seed: int, name: str) -> Path:
        """The last checkpoint of a recipe's run."""
        steps = read_toml(self.recipe(name)).training.steps
        return self.output / f"seed-{seed}" / name / "checkpoint" / f"step-{steps}"

    def arguments(self, seed: int, name: str) -> list[str]:
        """Recipe and command line of a run."""
        words = [str(self.recipe(name)), "--training.seed", str(seed)]
        words += ["--job.dump_folder", str(self.output / f"seed-{seed}" / name), "--validation.enable", "false"]
        if name in ("tiny_kd", "tiny_kd_causal") and seed != 0:
            cache = read_toml(self.recipe(name)).method.teacher_path_cache
            words += ["--method.teacher_path_cache", f"{cache}_seed{seed}"]
        if name in GOES_ON_WITH:
            words += ["--models.student.init_from", str(self.checkpoint(seed, GOES_ON_WITH[name]))]
        return words

    def train(self, seed: int, name: str, *after: str) -> Stage:
        command = (sys.executable, str(TRAIN), "--job.config_file", *self.arguments(seed, name))
        return Stage(f"seed-{seed}/{name}", command, after)

    def score(self, name: str, model: str | Path, *more: str, after: tuple[str, ...] = ()) -> Stage:
        """Sample and judge a model at both lengths."""
        command = (sys.executable, "-m", "fvtitan.score", "--models", str(model), *more, "--no-ceiling")
        command += ("--num-frames", *map(str, self.lengths), "--num-videos", *map(str, self.num_videos))
        return Stage(
            f"scores/{name}", (*command, "--output", str(self.output / "scores" / name)), after, model=Path(model)
        )

    def stages(self) -> list[Stage]:
        """All of them; of those that can run, the first are run first."""
        trainings, scores = [], []
        for seed in self.seeds:
            here, first = f"seed-{seed}/", f"seed-{self.seeds[0]}/"
            # The first seed's run that needs the clips, or the prompts, makes them for all.
            clips, prompts = ((), ()) if here == first else ((first + "tiny_dfsft",), (first + "trajectories",))
            make = (sys.executable, "-m", "fvtitan.trajectories", *self.arguments(seed, "tiny_kd"))
            trainings += [
                self.train(seed, "tiny_dfsft", *clips),
                Stage(here + "trajectories", make, prompts),
                self.train(seed, "tiny_kd_causal", here + "tiny_dfsft", here + "trajectories"),
                self.train(seed, "tiny_self_forcing", here + "tiny_kd_causal"),
                self.train(seed, "tiny_kd", here + "trajectories"),
                self.train(seed, "tiny_dmd2", here + "trajectories"),
            ]
            for name in STUDENTS:
                more = () if name in STREAMING else ("--rungs", *RUNGS.values())
                more += ("--untrained",) if name in UNTRAINED and here == first else ()
                scores.append(self.score(here + name, self.checkpoint(seed, name), *more, after=(here + name,)))
        ways = ("--steps", *map(str, EULER_STEPS), "--rungs", *RUNGS.values())
        return [*trainings, self.score("teacher", TINY_WAN, *ways), *scores]


# ------------------------------------------------------------------------------------------------------- running it


@dataclass
class Runner:
    """Runs stages side by side, each when those before it are done; keeps what they print and the time they took."""

    output: Path
    jobs: int
    running: dict[Stage, tuple[subprocess.Popen, float]] = field(default_factory=dict)
    stops: int = 0
    """Signals that have asked for a stop."""

    def run(self, stages: Sequence[Stage]) -> int:
        """0, 1 when a stage failed, 75 when a signal stopped it. What runs beside a failed stage is stopped, and saves."""
        handlers = {
            number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        }
        waiting, done, failed, passed_on = list(stages), set(), False, 0
        try:
            while self.running or (waiting and not failed and not self.stops):
                able = [] if failed or self.stops else [s for s in waiting if done.issuperset(s.after)]
                for stage in able[: self.jobs - len(self.running)]:
                    waiting.remove(stage)
                    if self._is_done(stage):
                        done.add(stage.name)
                        say(f"{stage.name}: is there")
                    else:
                        self._start(stage)
                time.sleep(0.2)
                for stage in [s for s, (process, _) in self.running.items() if process.poll() is not None]:
                    if self._end(stage):
                        done.add(stage.name)
                    elif not (failed or self.stops):  # one that was stopped is no failure
                        failed = True
                        self._terminate()
                if self.stops > passed_on:  # here, so that none misses it that was being started
                    passed_on = self.stops
                    self._terminate()
        finally:
            if self.running:  # an exception came between
                self._terminate()
                for process, _ in self.running.values():
                    process.wait()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self.stops:
            say("stopped; the same command goes on from here")
            return EXIT_STOPPED
        return 1 if failed else 0

    def _start(self, stage: Stage) -> None:
        log = self._log(stage)
        log.parent.mkdir(parents=True, exist_ok=True)
        self._mark(stage).unlink(missing_ok=True)  # it writes where the results of an earlier request are
        # One thread each: see run_train.sh. A session of its own: Ctrl-C is passed on once, by us.
        environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ}
        with open(log, "ab") as file:
            process = subprocess.Popen(
                stage.command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self.running[stage] = (process, time.monotonic())
        say(f"{stage.name}: starts, {log}")

    def _end(self, stage: Stage) -> bool:
        """Whether it succeeded."""
        process, started = self.running.pop(stage)
        seconds = time.monotonic() - started
        write_json(
            self.output / "stages.json", self.seconds() | {stage.name: self.seconds().get(stage.name, 0.0) + seconds}
        )
        if process.returncode == 0:
            say(f"{stage.name}: done in {minutes(seconds)}")
            if stage.model is not None:
                write_json(self._mark(stage), request(stage))
            return True
        if not self.stops:
            lines = self._log(stage).read_text(errors="replace").splitlines()[-20:]
            say(f"{stage.name}: status {process.returncode} after {minutes(seconds)}\n  " + "\n  ".join(lines))
        return False

    def _is_done(self, stage: Stage) -> bool:
        return stage.model is not None and read_json(self._mark(stage)) == request(stage)

    def seconds(self) -> dict[str, float]:
        """By stage, over all starts."""
        return read_json(self.output / "stages.json") or {}

    def _mark(self, stage: Stage) -> Path:
        return self.output / stage.name / "request.json"

    def _log(self, stage: Stage) -> Path:
        return self.output / "log" / f"{stage.name}.log"

    def _stop(self, *_: object) -> None:
        self.stops += 1

    def _terminate(self) -> None:
        """They save and end; at a second time they leave at once."""
        for process, _ in self.running.values():
            process.terminate()


def request(stage: Stage) -> dict[str, Any]:
    """What a stage that scores was asked, and of which weights."""
    manifest = stage.model / "manifest.json"
    identity = hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else ""
    return {"command": list(stage.command[1:]), "weights": identity}


def say(text: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", flush=True)


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"


def read_json(path: Path) -> Any:
    """None when it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(content, indent=1))


# ------------------------------------------------------------------------------------------------- what came out


@dataclass(frozen=True)
class Result:
    """A line of the table: one way of sampling one model at one length, of every seed."""

    label: str
    num_frames: int
    forwards: int
    seconds: tuple[float, ...]
    scores: tuple[Mapping[str, float], ...]


def results(chain: Chain) -> list[Result]:
    """The rows that the scoring stages have left."""
    found: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    names = ["teacher", *(f"seed-{seed}/{name}" for name in STUDENTS for seed in chain.seeds)]
    for name in names:
        for row in read_json(chain.output / "scores" / name / "rows.json"):
            found.setdefault((label(name, row), row["num_frames"], row["forwards"]), []).append(row)
    return [
        Result(*key, tuple(row["seconds"] for row in rows), tuple(row["scores"] for row in rows))
        for key, rows in found.items()
    ]


def label(name: str, row: Mapping[str, Any]) -> str:
    """What a row is called in the table."""
    if row["own"]:
        return f"{'before ' if row['untrained'] else ''}`{name.split('/')[-1]}`"
    return f"teacher, {row['steps']} steps" if row["sampler"].startswith("Euler") else "before `tiny_kd`, `tiny_dmd2`"


def table(found: Sequence[Result]) -> str:
    """Markdown, short videos first; of several seeds mean and standard deviation."""
    lines = ["| | frames | forwards | s/video | " + " | ".join(name.replace("_", " ") for name in SCORES) + " |"]
    lines.append("| --- " + "| --: " * (3 + len(SCORES)) + "|")
    for num_frames in sorted({row.num_frames for row in found}):
        for row in (row for row in found if row.num_frames == num_frames):
            cells = [spread([scores[name] for scores in row.scores], 3) for name in SCORES]
            seconds = f"{statistics.median(row.seconds):.2f}"
            lines.append(f"| {row.label} | {num_frames} | {row.forwards} | {seconds} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


@dataclass(frozen=True)
class Expectation:
    """One number that a recipe's header promises."""

    recipe: str
    num_frames: int
    forwards: int
    score: str
    relation: str
    bound: float

    def __str__(self) -> str:
        return f"{self.recipe}, {self.num_frames} frames, {self.forwards} forwards: {self.score} {self.relation} {self.bound:g}"

    def holds(self, value: float) -> bool:
        return value >= self.bound if self.relation == ">=" else value <= self.bound


def expectations(recipe: Path) -> list[Expectation]:
    """The "Expect" lines of a recipe's header: `33 frames, 4 forwards: colour >= 0.98, area drift <= 0.1`.

    Raises `UserError` for one that cannot be read.
    """
    found = []
    for line in itertools.takewhile(lambda line: line.startswith("#"), recipe.read_text(encoding="utf-8").splitlines()):
        if not (way := re.search(r"(\d+) frames, (\d+) forwards: (.*)", line)):
            continue
        for part in way[3].split(","):
            bound = re.fullmatch(r"\s*([a-z ]+) ([<>]=) (\d*\.?\d+)\s*", part)
            if not bound:
                raise UserError(f"{recipe}: {part.strip()!r} in the header: need a score, >= or <=, and a number")
            score = bound[1].replace(" ", "_")
            found.append(Expectation(recipe.stem, int(way[1]), int(way[2]), score, bound[2], float(bound[3])))
    return found


def check_expectations(chain: Chain) -> None:
    """Raise `UserError`, before anything is trained, when a header promises what the chain does not measure."""
    for name in STUDENTS:
        cfg = read_toml(chain.recipe(name))
        spec, student = METHODS[cfg.method.name].sampler(cfg), cfg.models["student"]
        measured = {(chain.lengths[0], rungs) for rungs in RUNGS} | {(chain.lengths[1], rungs) for rungs in RUNGS}
        if student.is_causal:
            blocks = {frames: len(student.causal().blocks((frames - 1) // 4 + 1)) for frames in chain.lengths}
            measured = {(frames, num_forwards(spec, blocks[frames])) for frames in chain.lengths}
        for expected in expectations(chain.recipe(name)):
            if (expected.num_frames, expected.forwards) not in measured or expected.score not in SCORES:
                ways = ", ".join(f"{frames} frames, {forwards} forwards" for frames, forwards in sorted(measured))
                raise UserError(
                    f"{chain.recipe(name)}: the header expects {expected}; measured are {', '.join(SCORES)} at {ways}"
                )


def check(chain: Chain, found: Sequence[Result]) -> tuple[list[str], bool]:
    """A line for every number that a header promises, and whether all hold, for every seed."""
    rows = {(row.label, row.num_frames, row.forwards): row for row in found}
    lines, good = [], True
    for name in STUDENTS:
        for expected in expectations(chain.recipe(name)):
            scores = rows[f"`{name}`", expected.num_frames, expected.forwards].scores
            values = [each[expected.score] for each in scores]
            holds = all(map(expected.holds, values))
            good &= holds
            lines.append(f"{'ok  ' if holds else 'MISS'} {expected}: {', '.join(f'{value:.3f}' for value in values)}")
    return lines, good


def picture(chain: Chain) -> None:
    """Held-out captions x models, of the first seed: `contact_sheet.png` and `.gif`."""
    captions = [attributes.caption for attributes in held_out_combinations()]
    count = min(SHEET_PROMPTS, chain.num_videos[0])
    prompts = [captions[i * (len(captions) - 1) // max(1, count - 1)] for i in range(count)]
    vae, encoder = VideoVAE(TINY_WAN), TextEncoder(TINY_WAN)
    embeds, uncond = [row.bfloat16() for row in encoder.encode(prompts)], encoder.encode([""])[0].bfloat16()
    teacher = load_model(TINY_WAN)
    shift, few = teacher.contract.shift, few_step_ladder(parse_rungs(RUNGS[4]), teacher.contract.shift)
    columns = [(f"teacher, {n} steps", teacher.model, SamplerSpec(tuple(euler_ladder(n, shift)), 3.0)) for n in (50, 4)]
    columns.append(("untrained, 4", teacher.model, SamplerSpec(few, solver="sde")))
    for name in STUDENTS:
        student = load_model(str(chain.checkpoint(chain.seeds[0], name)))
        columns.append(
            (f"{name.removeprefix('tiny_')}, {len(student.contract.sigmas) - 1}", student.model, student.contract.spec)
        )
    videos = {}
    for title, model, spec in columns:
        model.uncond_embeds = uncond
        _, shown = score(title, model, spec, vae, prompts, embeds, num_frames=chain.lengths[0], num_videos=len(prompts))
        videos[title] = [frames for _, frames in shown]
    comparison_sheet(prompts, videos, chain.output / "contact_sheet", fps=16)


def report(chain: Chain, seconds: Mapping[str, float]) -> int:
    """Write and print the table. 0, or 1 when a score is not what its recipe expects."""
    found = results(chain)
    lines, good = check(chain, found)
    seeds = "seed " + ", ".join(map(str, chain.seeds)) + (", mean ± standard deviation" if len(chain.seeds) > 1 else "")
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}"
    where = f"{machine}, {datetime.date.today()}, commit {commit()}"
    videos = [f"{count} of {frames} frames" for frames, count in zip(chain.lengths, chain.num_videos, strict=True)]
    text = f"{where}; {seeds}; videos a row: {', '.join(videos)}\n\n{table(found)}\n"
    text += "\nWhat the recipes' headers expect:\n\n" + "".join(f"    {line}\n" for line in lines)
    text += "\n| stage | minutes |\n| --- | --: |\n"
    text += "".join(f"| {name} | {s / 60:.1f} |\n" for name, s in seconds.items())
    write_atomic(chain.output / "results.md", text)
    write_json(
        chain.output / "results.json", {"where": where, "seconds": dict(seconds), "rows": [vars(row) for row in found]}
    )
    print(text, flush=True)
    return 0 if good else 1


def commit() -> str:
    """Of the checkout that runs, with + when it has changes."""
    command = ["git", "-C", str(TRAIN.parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fvtitan.chain",
        description="Train the tiny recipes one after another, judge them, print one table. It goes on where it was stopped.",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="train everything once for each (0)")
    parser.add_argument("--output", default="outputs/chain", help="where everything goes (outputs/chain)")
    parser.add_argument("--recipes", default="train_configs", help="folder of the recipes, or of your changed copies")
    parser.add_argument(
        "--num-videos",
        type=int,
        nargs=2,
        default=[192, 48],
        help="judged a row, of the trained length and of three times that (192 48)",
    )
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8), help="programs at a time (one a core)")
    args = parser.parse_args()
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds {' '.join(map(str, args.seeds))}: need different numbers >= 0")
    for option, values in (("--num-videos", args.num_videos), ("--jobs", [args.jobs])):
        if min(values) < 1:
            raise UserError(f"{option} {min(values)}: must be >= 1")
    chain = Chain(Path(args.recipes), Path(args.output), args.seeds, args.num_videos)
    check_expectations(chain)
    runner = Runner(chain.output, args.jobs)
    status = runner.run(chain.stages())
    if status:
        return status
    picture(chain)
    status = report(chain, runner.seconds())
    say(f"{chain.output / 'results.md'}, {chain.output / 'contact_sheet.png'}, {chain.output / 'contact_sheet.gif'}")
    return status


if __name__ == "__main__":
    cli(main)
