"""Readers of files that somebody else may have damaged: one clear error, or exactly what was written. Never anything else.

1,000 damaged inputs for each reader (`slow`), and the first of them by default. The damage of an input follows from the
reader's name and the input's number alone: `python -m tests.faults.test_fuzz toml 17` runs that one again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import random
import re
import runpy
import sys
import tempfile
import tomllib
import unittest.mock
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import LambdaLR

from fvtitan.components.checkpoint import Checkpointer
from fvtitan.components.checkpoint_folder import CheckpointError, read_tensor_names, read_tensors
from fvtitan.components.ema import EMA, EMAConfig
from fvtitan.components.stateful import Identity, ModelState, OptimizerState, RandomState, SchedulerState, TrainState
from fvtitan.config import CheckpointSection, JobConfig, load_config
from fvtitan.data.dataloader import BatchStream
from fvtitan.data.latent_cache import LatentCache, check_cache_geometry, fingerprint
from fvtitan.data.trajectory_cache import TrajectoryFolder
from fvtitan.distributed.utils import local_tensor
from fvtitan.errors import UserError
from fvtitan.methods import METHODS
from fvtitan.trajectories import build_contract, prepare_trajectories
from tests.faults.damage import (
    bounded,
    damaged_bytes,
    damaged_files,
    damaged_index,
    damaged_json,
    damaged_lines,
    damaged_pickle,
    read_files,
    write_files,
)
from tests.helpers import GEOMETRY, ROOT, kd_recipe, make_cache, read_checkpoint, small_arguments

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
BIG = {"HEX": "0x" + "f" * 5000, "DIGITS": "9" * 5000, "LONG": '"' + "x" * 2000 + '"', "DEEP": "[" * 3000 + "]" * 3000}
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


# ----------------------------------------------------------------------------------------------------------- caches


def assert_same(seen: Any, expected: Any, where: str = "") -> None:
    """Trees of dicts, lists and tensors, bit for bit."""
    assert type(seen) is type(expected), where
    if isinstance(expected, dict):
        assert seen.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(seen[key], value, f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(seen) == len(expected), where
        for i, value in enumerate(expected):
            assert_same(seen[i], value, f"{where}[{i}]")
    elif isinstance(expected, torch.Tensor):
        assert seen.dtype == expected.dtype and seen.shape == expected.shape and torch.equal(seen, expected), where
    else:
        assert seen == expected, f"{where}: {seen!r}, not {expected!r}"


def read_latents(path: Path) -> dict[str, Any]:
    """Everything that training sees of a cache."""
    cache = LatentCache(path)
    check_cache_geometry(cache, **GEOMETRY)
    return {
        "samples": [cache[i] for i in range(len(cache))],
        "prompts": (cache.empty_prompt_embeds, cache.negative_prompt_embeds),
        "buckets": (cache.bucket_shapes, cache.bucket_indices, cache.has_latents),
        "identity": (cache.fingerprint, cache.manifest["contract"]),
    }


def latents_as_written(path: Path) -> dict[str, Any]:
    """The samples and prompts of a cache, by nothing of ours."""
    lines = [json.loads(line) for line in (path / "samples.jsonl").read_bytes().split(b"\n") if line]
    stored = {name: load_file(path / name) for name in {line["shard"] for line in lines}}
    samples = []
    for line in lines:
        text = "text." + hashlib.sha256(line["caption"].encode()).hexdigest()[:24]
        tensors = {"latents": stored[line["shard"]][line["key"]], "prompt_embeds": stored[line["shard"]][text]}
        samples.append({"sample_id": line["sample_id"], "caption": line["caption"], **tensors})
    prompts = load_file(path / "prompts.safetensors")
    return {"samples": samples, "prompts": (prompts["empty"], prompts["negative"])}


def fit_manifest(files: dict[str, Any]) -> None:
    """Make a latent cache's manifest that of the damaged files, as far as they allow."""
    manifest = json.loads(files["manifest.json"])
    lines = files.get("samples.jsonl") or b""
    manifest["samples_sha256"] = hashlib.sha256(lines).hexdigest()
    manifest["shards"] = {name: len(files.get(name) or b"") for name in manifest["shards"]}
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError, AttributeError):
        samples = [json.loads(line) for line in lines.split(b"\n") if line]
        manifest |= {"num_samples": len(samples), "fingerprint": fingerprint(manifest["contract"], samples)}
    files["manifest.json"] = json.dumps(manifest).encode()


class Latents:
    def __init__(self, folder: Path) -> None:
        self.folder = folder / "damaged"
        self.files = read_files(make_cache(folder / "cache", 6, num_portrait=2))
        self.expected = read_latents(folder / "cache")

    def __call__(self, draws: random.Random) -> str:
        files: dict[str, Any] = dict(self.files)
        name, done = damaged_files(draws, files)
        fits = draws.random() < 0.5 and files.get("manifest.json") == self.files["manifest.json"]
        fits = fits and all(isinstance(content, bytes) for content in files.values())
        if fits:
            fit_manifest(files)
        write_files(self.folder, files)
        try:
            seen = read_latents(self.folder)
        except UserError as error:
            one_line(error)
            assert str(self.folder) in str(error), error
            return "error"
        if fits:
            expected = latents_as_written(self.folder)
            seen = {key: seen[key] for key in expected}
        else:
            expected = self.expected
        assert_same(seen, expected, f"{name}, {done}")
        return "same"


@pytest.mark.parametrize("count", [QUICK, pytest.param(ALL, marks=pytest.mark.slow)])
def test_latent_cache(tmp_path, count):
    outcomes = fuzz("latents", count, Latents(tmp_path))
    assert outcomes["error"] > count // 2 and outcomes["same"] > count // 50, outcomes


class Trajectories:
    """A complete cache of trajectories without a teacher, as a training run opens it."""

    TOTAL = 6

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "trajectories"
        make_cache(folder / "prompts", 3)
        keys = {"job__config_file": kd_recipe(folder, {"teacher": None}, num_trajectories=self.TOTAL)}
        self.cfg = load_config(small_arguments(folder / "prompts", folder / "run", **keys), world_size=1)
        self.prompts = LatentCache(folder / "prompts", prompts_only=True)
        contract = build_contract(self.cfg, self.prompts, 16, "")
        made = TrajectoryFolder(self.folder, contract)
        made.shard_samples = 4
        made.begin()
        rng = torch.Generator().manual_seed(0)
        shape = contract["shape"]
        for i in range(self.TOTAL):
            made.write_sample(i, torch.randn(2, *shape, generator=rng), torch.randn(shape, generator=rng))
        for name, indices in made.shards(self.TOTAL).items():
            made.pack(name, indices)
        made.commit(self.TOTAL)
        self.files = read_files(self.folder)
        self.expected = self.read()

    def read(self) -> list[Any]:
        with unittest.mock.patch("fvtitan.data.trajectory_cache.SHARD_SAMPLES", 4):
            cache = prepare_trajectories(self.cfg, None, self.prompts, 16)
            return [cache[i] for i in range(len(cache))]

    def __call__(self, draws: random.Random) -> str:
        files: dict[str, Any] = dict(self.files)
        name, done = damaged_files(draws, files)
        if draws.random() < 0.3 and files.get("manifest.json") == self.files["manifest.json"]:
            manifest = json.loads(files["manifest.json"])
            sizes = {shard: len(files[shard]) for shard in manifest["shards"] if isinstance(files.get(shard), bytes)}
            files["manifest.json"] = json.dumps(manifest | {"shards": manifest["shards"] | sizes}).encode()
        write_files(self.folder, files)
        try:
            seen = self.read()
        except UserError as error:
            one_line(error)
            assert str(self.folder) in str(error), error
            return "error"
        assert_same(seen, self.expected, f"{name}, {done}")
        return "same"


@pytest.mark.parametrize("count", [QUICK, pytest.param(ALL, marks=pytest.mark.slow)])
def test_trajectory_cache(tmp_path, single_process_group, count):
    outcomes = fuzz("trajectories", count, Trajectories(tmp_path))
    assert outcomes["error"] > count // 2 and outcomes["same"] > count // 50, outcomes


# ------------------------------------------------------------------------------------------------------ checkpoints


class Run:
    """What a run saves, small: every kind of state there is."""

    def __init__(self, data: LatentCache, seed: int, updates: int) -> None:
        torch.manual_seed(seed)
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
        for layer in (self.net[0], self.net[2], self.net):
            fully_shard(layer)
        weights = [p for p in self.net.parameters() if p.ndim == 2]
        biases = [p for p in self.net.parameters() if p.ndim == 1]
        self.optimizer = torch.optim.AdamW([{"params": weights}, {"params": biases, "weight_decay": 0.0}], lr=1e-2)
        scheduler = LambdaLR(self.optimizer, lambda update: 1 / (update + 1))
        model = SimpleNamespace(trained_parameters=lambda: dict(self.net.named_parameters()))
        ema, batches = (
            EMA(model, EMAConfig(True, 0.8)),
            BatchStream(data, global_batch_size=2, local_batch_size=2, seed=3),
        )
        train_state = TrainState()
        self.states: dict[str, Any] = {
            "roles.student.transformer": ModelState(self.net),
            "optimizers.student": OptimizerState(dict(self.net.named_parameters()), self.optimizer),
            "schedulers.student": SchedulerState(scheduler),
            "identity.teacher": Identity("models.teacher", "ab12"),
            "random_state": RandomState(torch.Generator().manual_seed(seed)),
            "dataloader": batches,
            "train_state": train_state,
            "ema.student": ema,
        }
        for step in range(1, updates + 1):
            next(batches)
            self.net(torch.ones(2, 4)).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            scheduler.step()
            ema.update(step)
            train_state.step = step

    def content(self) -> dict[str, Any]:
        """Copies: {dotted name: tensor}, and everything else as JSON has it."""
        tensors: dict[str, torch.Tensor] = {}
        flat_states = {name: state.state_dict() for name, state in self.states.items()}

        def plain(tree: Any, prefix: str) -> Any:
            if not isinstance(tree, dict):
                return tree
            rest = {}
            for key, value in tree.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{prefix}.{key}"] = local_tensor(value).detach().clone()
                else:
                    rest[key] = plain(value, f"{prefix}.{key}")
            return rest

        rest = {name: plain(tree, name) for name, tree in flat_states.items()}
        return {"tensors": tensors, "plain": json.loads(json.dumps(rest))}


class Checkpoints:
    """Two checkpoints, the newer one damaged: found, loaded into a run, and read without one."""

    ROLE = "roles.student.transformer"

    def __init__(self, folder: Path) -> None:
        self.folder, self.sentinel = folder / "checkpoint", folder / "sentinel"
        self.data = LatentCache(make_cache(folder / "cache", 6))
        checkpointer = Checkpointer(self.folder)
        for step in (1, 2):
            run = Run(self.data, seed=0, updates=step)
            checkpointer.save(step, run.states, extra_files={"config.toml": "[job]\n", "roles.json": "{}"})
        self.path = self.folder / "step-2"
        self.files = read_files(self.path)
        self.expected = run.content()

    def damage(self, draws: random.Random, files: dict[str, Any]) -> tuple[str, bool]:
        """(what was done, whether the manifest fits the damage)."""
        kind = draws.randrange(4)
        if kind == 0:
            name, done = damaged_files(draws, files)
        elif kind == 1:
            name = ".metadata"
            files[name], done = damaged_index(draws, files[name], self.sentinel)
        elif kind == 2:
            name = draws.choice(("state.json", "manifest.json"))
            text, done = damaged_json(draws, files[name].decode())
            files[name] = text.encode("utf-8", "surrogatepass")
        else:
            name = draws.choice([".metadata", *(name for name in files if name.endswith(".distcp"))])
            index = name == ".metadata" and draws.random() < 0.5
            files[name], done = damaged_pickle(draws, self.sentinel) if index else damaged_bytes(draws, files[name])
        fits = draws.random() < 0.8 and files.get("manifest.json") == self.files["manifest.json"]
        if fits:
            entries = [
                {"name": file, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                for file, content in files.items()
                if isinstance(content, bytes) and file != "manifest.json"
            ]
            files["manifest.json"] = json.dumps({"files": entries}).encode()
        return f"{name}, {done}", fits

    def as_written(self) -> dict[str, Any]:
        """What the files say, by torch's own reader; where it cannot read them, what was saved."""
        try:
            plain = json.loads((self.path / "state.json").read_bytes())["states"]
            return {"tensors": read_checkpoint(self.path), "plain": plain}
        except (CheckpointException, ValueError):
            return dict(self.expected)

    def __call__(self, draws: random.Random) -> str:
        files: dict[str, Any] = dict(self.files)
        done, fits = self.damage(draws, files)
        write_files(self.path, files)
        run = Run(self.data, seed=1, updates=0)
        before = run.content()
        with contextlib.suppress(UserError, CheckpointError):
            alone = read_tensors(self.path, self.ROLE)
            expected = (self.as_written() if fits else self.expected)["tensors"]
            own = {name.removeprefix(f"{self.ROLE}."): tensor for name, tensor in expected.items() if self.ROLE in name}
            assert_same(alone, own, done)
            assert sorted(read_tensor_names(self.path, self.ROLE)) == sorted(own), done
        checkpointer, read = Checkpointer(self.folder), None
        try:
            found = checkpointer.find(CheckpointSection())
            assert found == self.path, f"went back to {found} without a word: {done}"
            with unittest.mock.patch.object(dcp, "load", wraps=dcp.load) as read:
                checkpointer.load(found, run.states)
        except (UserError, CheckpointError) as error:
            one_line(error)
            assert str(self.path) in str(error), error
            # What was damaged, and then signed anew, may be refused while it is read; all else before.
            if not (fits and read is not None and read.called):
                assert_same(run.content(), before, f"touched by a load that failed: {done}")
            return "error"
        finally:
            checkpointer.close()
            assert not self.sentinel.exists(), f"executed: {done}"
        expected, seen = self.as_written() if fits else dict(self.expected), run.content()
        named = [{name for name in c["tensors"] if name.startswith("random_state.")} for c in (seen, expected)]
        if named[0] != named[1]:  # it starts anew, and says so
            for content in (seen, expected):
                content["plain"].pop("random_state", None)
                content["tensors"] = {n: t for n, t in content["tensors"].items() if "random_state." not in n}
        assert_same(seen["tensors"], expected["tensors"], done)
        plain = [json.dumps(content["plain"], sort_keys=True) for content in (seen, expected)]  # NaN is NaN there
        assert plain[0] == plain[1], done
        return "same"


@pytest.mark.parametrize("count", [QUICK, pytest.param(ALL, marks=pytest.mark.slow)])
def test_checkpoint(tmp_path, single_process_group, count):
    outcomes = fuzz("checkpoint", count, Checkpoints(tmp_path))
    assert outcomes["error"] > count // 2 and outcomes["same"] > count // 50, outcomes


# --------------------------------------------------------------------------------------------------------- programs


@pytest.mark.parametrize(
    ("program", "arguments", "named"),
    [
        ("config", ["recipe.toml"], "recipe.toml"),
        ("plan", ["recipe.toml"], "recipe.toml"),
        ("trajectories", ["recipe.toml"], "recipe.toml"),
        ("generate", ["--model", "step-1", "--prompts", "x", "--output", "out"], "step-1"),
        ("score", ["--models", "step-1"], "step-1"),
        ("preprocess", ["--data", "recipe.toml", "--model", "tiny-wan", "--output", "out"], "recipe.toml"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_programs_end_with_one_line(tmp_path, monkeypatch, capsys, program, arguments, named):
    """A damaged recipe, or a damaged checkpoint: exit status 2."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_bytes(RECIPES[0][:-20] + b"\xff = [[")
    write_files(
        tmp_path / "step-1", {"manifest.json": b'{"files": []}', "roles.json": b'{"student": {', "config.toml": b"["}
    )
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"fvtitan.{program}", run_name="__main__")
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and line.startswith("error: ") and named in line


READERS: dict[str, Callable[[Path], Attempt]] = {
    "toml": Toml,
    "latents": Latents,
    "trajectories": Trajectories,
    "checkpoint": Checkpoints,
}

if __name__ == "__main__":
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as scratch:
        print(run(sys.argv[1], int(sys.argv[2]), READERS[sys.argv[1]](Path(scratch))))
