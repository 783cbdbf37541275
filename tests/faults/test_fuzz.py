"""Readers of files that somebody else may have damaged: one clear error, or exactly what was written. Never anything else.

1,000 damaged inputs for each reader (`slow`), and the first of them by default. The damage of an input follows from the
reader's name and the input's number alone: `python -m tests.faults.test_fuzz toml 17` runs that one again.
"""

from __future__ import annotations

import dataclasses
import random
import re
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fvtitan.config import JobConfig, load_config
from fvtitan.errors import UserError
from fvtitan.methods import METHODS
from tests.faults.damage import bounded, damaged_bytes, damaged_lines
from tests.helpers import ROOT

QUICK, ALL = 40, 1000
Attempt = Callable[[random.Random], str]  # damages, reads, asserts; returns what was done


def one_line(error: BaseException) -> None:
    """Our errors are one readable line."""
    message = str(error)
    assert message.isprintable() and 10 < len(message) < 3000, f"{message[:200]!r}... of {len(message)} characters"


def run(reader: str, number: int, attempt: Attempt) -> str:
    """One input, whose outcome is "error" or "same"."""
    with bounded():
        try:
            return attempt(random.Random(f"{reader} {number}"))
        except BaseException as error:
            error.add_note(f"input {number} of {reader}: python -m tests.faults.test_fuzz {reader} {number}")
            raise


def fuzz(reader: str, count: int, attempt: Attempt) -> Counter[str]:
    return Counter(run(reader, number, attempt) for number in range(count))


# ------------------------------------------------------------------------------------------------------------- TOML

RECIPES = [path.read_bytes() for path in sorted((ROOT / "train_configs").glob("*.toml"))]
OTHER_VALUES = """
    0 -1 3 1_000 0x10 9223372036854775807 9223372036854775808 99999999999999999999999 HEX DIGITS
    0.0 -0.0 0.5 1e-3 1e308 1e999 -1e999 inf -inf nan +nan 1. .5 0x 1e
    true false True "" "x" 'tiny' "\\u0000" "\\ud800" "\\n" "\u2028" "é" LONG \"\"\"a\nb\"\"\" "unended
    [] [1] [0.9,0.99] ["a"] [[1]] [nan] [1,"a"] [true] DEEP {} {a=1} {name="dmd2"} {a={b=1}} 1979-05-27 07:32:00
    """.split()
BIG = {"HEX": "0x" + "f" * 5000, "DIGITS": "9" * 5000, "LONG": '"' + "x" * 10**5 + '"', "DEEP": "[" * 3000 + "]" * 3000}
OTHER_LINES = (
    "unknown = 1",
    "stepz = 3",
    '"" = 1',
    '"a\\nb" = 1',
    '"a.b" = 1',
    "steps.x = 1",
    "training.steps = 3",
    "optimizer.lr = 1e-4",
    "method.name = 'kd'",
    "[training]",
    "[[training]]",
    "[training.steps]",
    "[models]",
    '[models."a\\nb"]',
    "[models.student]\ninit_from = 'tiny-wan'",
    "[models.judge]\ninit_from = 'tiny-wan'",
    "[models.student.optimizer]\nlr = 3",
    "[no.such.table]",
    "method = 'dmd2'",
    "models = 3",
    "a" + ".a" * 3000 + " = 1",
    "[" + ".".join("b" * 1500) + "]",
    "\ufeff",
    "# a comment",
    "   ",
)


def damaged_toml(draws: random.Random) -> tuple[bytes, str]:
    content = draws.choice(RECIPES)
    kind = draws.randrange(5)
    if kind == 0:
        return damaged_bytes(draws, content)
    text = content.decode()
    if kind == 1:
        text, done = damaged_lines(draws, text)
        return text.encode(), done
    lines = text.split("\n")
    if kind == 2:
        line, at = draws.choice(OTHER_LINES), draws.randrange(len(lines))
        lines.insert(at, line)
        return "\n".join(lines).encode(), f"{line[:40]!r} before line {at}"
    at = draws.choice([i for i, line in enumerate(lines) if re.match(r"\w+ = ", line)])
    key = lines[at].split(" = ")[0]
    value = draws.choice(OTHER_VALUES)
    lines[at] = f"{key} = {BIG.get(value, value)}"
    return "\n".join(lines).encode("utf-8", "surrogatepass"), f"{key} = {value}"


def assert_parsed(cls: type, parsed: Any, table: dict[str, Any], where: str) -> None:
    """Each key that the file sets is what was parsed, and each that it does not is the default."""
    assert table.keys() <= {f.name for f in dataclasses.fields(cls)}, f"{where} has {sorted(table)}"
    for field in dataclasses.fields(cls):
        value, here = getattr(parsed, field.name), f"{where}.{field.name}"
        if field.name not in table:
            default = field.default_factory() if field.default is dataclasses.MISSING else field.default
            assert value == default, f"{here} = {value!r}, set by nobody"
        elif dataclasses.is_dataclass(value):
            assert_parsed(type(value), value, table[field.name], here)
        elif isinstance(value, dict):
            assert value.keys() == table[field.name].keys(), here
            for name, entry in value.items():
                assert_parsed(type(entry), entry, table[field.name][name], f"{here}.{name}")
        else:
            same = list(value) if isinstance(value, tuple) else value
            assert same == table[field.name], f"{here} = {value!r}, the file says {table[field.name]!r}"
            assert isinstance(same, bool) == isinstance(table[field.name], bool), here


class Toml:
    def __init__(self, folder: Path) -> None:
        self.path = folder / "recipe.toml"

    def __call__(self, draws: random.Random) -> str:
        content, done = damaged_toml(draws)
        self.path.write_bytes(content)
        try:
            cfg = load_config(["--job.config_file", str(self.path)], world_size=1)
        except UserError as error:
            assert str(self.path) in str(error) or "=" in str(error) or "models" in str(error), (done, error)
            one_line(error)
            return "error"
        table = tomllib.loads(content.decode())
        assert cfg.job.config_file == str(self.path)
        table["job"] = {**table.get("job", {}), "config_file": cfg.job.config_file}
        name = table.get("method", {}).get("name", "finetune")
        assert type(cfg.method) is METHODS[name].Config, done
        table.setdefault("method", {"name": "finetune"})
        assert_parsed(JobConfig, cfg, table, "")
        return "same"


@pytest.mark.parametrize("count", [QUICK, pytest.param(ALL, marks=pytest.mark.slow)])
def test_toml(tmp_path, count):
    outcomes = fuzz("toml", count, Toml(tmp_path))
    assert outcomes["error"] > count // 3 and outcomes["same"] > count // 10, outcomes


READERS: dict[str, Callable[[Path], Attempt]] = {"toml": Toml}

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(run(sys.argv[1], int(sys.argv[2]), READERS[sys.argv[1]](Path(scratch))))
