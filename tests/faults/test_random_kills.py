"""Fault 39: runs that are killed at random moments, again and again, end as if nothing had been.

A kill hits one rank, after which the others must end by themselves, or all of them. Each of `POINTS` is the moment of one of
them, in an order and by ranks that the seed draws. The others come at any point that the rank reaches, in start-up, steps,
loader, validation and the parts of a save, some time after one, or at any time at all.
"""

from __future__ import annotations

import functools
import json
import random
import signal
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch

from fvtitan.components.checkpoint import Checkpointer
from tests.faults.kills_worker import kill_oneself
from tests.helpers import make_cache, read_checkpoint, small_arguments
from tests.integration.exact_worker import output, start
from tests.integration.test_dmd2 import arguments_of as dmd2_arguments
from tests.integration.test_dmd2 import setting as dmd2_setting  # noqa: F401
from tests.integration.test_self_forcing import arguments_of as self_forcing_arguments
from tests.integration.test_self_forcing import setting as self_forcing_setting  # noqa: F401
from tests.integration.test_train import training_values

PATIENCE = 300  # seconds for what takes a few
TIMEOUT = 60  # of a rank that waits for one that was killed before they were connected; torchrun would end it at once
POINTS = {  # in a rank's first steps, and whether that of rank 0 alone
    "start-up: networks": False,
    "start-up: find": False,
    "step": False,
    "loader": False,
    "save.before_shards": False,
    "save.shards": False,
    "save.before_manifest": False,
    "save.before_rename": True,
    "save.before_purge": False,
}
EVENTS = 24  # of start-up and about two steps: a run gets on, and each of its parts is hit


def run(ranks: int, arguments: list[str], folder: Path, *, everyone: bool = False, **kill: Any) -> list[int]:
    """The exit statuses. With `everyone`, all ranks are killed when the victim has died; else they end by themselves."""
    folder.mkdir(parents=True)
    processes = start(ranks, arguments, folder, kill_oneself, kill)
    try:
        running, end = list(processes), time.monotonic() + PATIENCE
        while running and wait([process.sentinel for process in running], timeout=end - time.monotonic()):
            running = [process for process in running if process.exitcode is None]
            if everyone and len(running) < ranks:
                for process in running:
                    process.kill()
        assert not running, f"still there after {PATIENCE} s\n{output(folder)}"
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            if process.exitcode is None:
                process.kill()
            process.join()


def events(folder: Path, rank: int) -> list[tuple[float, str]]:
    lines = [line.split(" ", 1) for line in (folder / f"events.rank{rank}").read_text().splitlines()]
    return [(float(when), name) for when, name in lines]


def killed(seed: str, ranks: int, kills: int, whole: Path, arguments: list[str], folder: Path) -> list[str]:
    """Start the run again after each of `kills` kills, then let it end; where each hit its victim."""
    draws = random.Random(seed)
    first = events(whole, 0)
    duration = next(when for when, name in first[EVENTS:] if name == "step") - first[0][0]  # of as much, unharmed
    points = draws.sample(list(POINTS), len(POINTS))[:kills]
    moments = draws.sample([*points, *[""] * (kills - len(points))], kills)
    landed: list[str] = []
    for attempt, point in enumerate(moments):
        victim, everyone = draws.randrange(ranks), draws.random() < 0.5
        number, delay = draws.randint(1, EVENTS), 0.0
        if point:
            victim, number = 0 if POINTS[point] else victim, draws.randint(1, 2 if "start-up" not in point else 1)
        elif (kind := draws.choice(("at", "after", "any"))) == "after":
            delay = draws.uniform(0.001, 0.2)
        elif kind == "any":
            number, delay = 1, draws.uniform(0.001, duration)
        here = folder / f"attempt-{attempt}"
        kill = {"victim": victim, "point": point, "number": number, "delay": delay}
        status = run(ranks, arguments, here, everyone=everyone, **kill)
        said = f"kill {attempt} of {seed!r}: {kill}, everyone: {everyone}, exit {status}\n{output(here)}"
        assert status[victim] == -signal.SIGKILL, said  # it landed: the run had not ended before
        assert 0 not in status, said
        names = [name for _, name in events(here, victim)]
        assert not point or names.count(point) == number, said
        landed.append(point or names[-1])
        complete = Checkpointer(folder / "run/checkpoint").steps()
        visible = [int(p.name[5:]) for p in (folder / "run/checkpoint").glob("step-*") if p.suffix != ".tmp"]
        assert sorted(visible) == complete, said
    assert run(ranks, arguments, folder / "last") == [0] * ranks, output(folder / "last")
    return landed


def assert_same_run(ours: Path, expected: Path, step: int) -> None:
    """Parameters, optimizers, moving averages, generators and everything else that is saved, and the logged values."""
    a, b = (read_checkpoint(folder / f"checkpoint/step-{step}") for folder in (ours, expected))
    assert a.keys() == b.keys()
    for prefix in ("roles.student", "optimizers.student", "ema.student", "random_state"):
        assert any(name.startswith(prefix) for name in a)
    assert [name for name, tensor in a.items() if not torch.equal(tensor, b[name])] == []
    plain = [json.loads((folder / f"checkpoint/step-{step}/state.json").read_text()) for folder in (ours, expected)]
    assert plain[0] == plain[1]
    assert training_values(ours) == training_values(expected)
    assert [row["step"] for row in training_values(ours)] == list(range(1, step + 1))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("data") / "cache", 10)


def finetune_arguments(cache: Path, folder: Path, **overrides: Any) -> list[str]:
    keys = {"training__global_batch_size": 4, "validation__num_prompts": 1, "validation__sampling_steps": 1}
    return small_arguments(cache, folder / "run", **{**keys, **overrides})


def check(seed: str, arguments: Any, tmp_path: Path, ranks: int, kills: int, steps: int, **keys: Any) -> list[str]:
    """A run that is killed against one that is not; where the kills hit."""
    keys = {"training__steps": steps, "checkpoint__interval": 1, "checkpoint__keep_latest_k": 2, **keys}
    keys["comm__timeout_seconds"] = TIMEOUT
    both = [arguments(folder, **keys) for folder in (tmp_path / "whole", tmp_path / "killed")]
    assert run(ranks, both[0], tmp_path / "whole/events") == [0] * ranks, output(tmp_path / "whole/events")
    landed = killed(seed, ranks, kills, tmp_path / "whole/events", both[1], tmp_path / "killed")
    assert_same_run(tmp_path / "killed/run", tmp_path / "whole/run", steps)
    return landed


@pytest.mark.slow
def test_three_kills(cache, tmp_path):
    """Fault 39."""
    landed = check("three", functools.partial(finetune_arguments, cache), tmp_path, ranks=1, kills=3, steps=9)
    assert len(landed) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "async_mode"), [("finetune", "disabled"), ("dmd2", "async"), ("self_forcing", "disabled")]
)
def test_twenty_kills(cache, dmd2_setting, self_forcing_setting, tmp_path, method, async_mode):  # noqa: F811
    """Fault 39."""
    keys: dict[str, Any] = {"checkpoint__async_mode": async_mode}
    if method == "finetune":
        arguments = functools.partial(finetune_arguments, cache)
        keys |= {"validation__enable": True, "validation__interval": 2}
    elif method == "dmd2":
        arguments = functools.partial(dmd2_arguments, dmd2_setting)
    else:
        arguments = functools.partial(self_forcing_arguments, self_forcing_setting)
    landed = check(method, arguments, tmp_path, ranks=2, kills=20, steps=30, **keys)
    assert len(landed) == 20 and set(landed) >= set(POINTS), landed
