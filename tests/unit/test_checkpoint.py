"""Checkpoints: whole or invisible, exact, strict, and unable to run anyone's code."""

from __future__ import annotations

import copy
import errno
import json
import pickle
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode

from fvtitan.components import checkpoint_folder
from fvtitan.components.checkpoint import Checkpointer
from fvtitan.components.checkpoint_folder import CheckpointError, DamagedCheckpoint, DiskFull, file_entry, verify_files
from fvtitan.components.stateful import ModelState, OptimizerState, RandomState, SchedulerState, TrainState
from fvtitan.config import CheckpointSection
from fvtitan.errors import UserError

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Net(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.first = nn.Linear(4, width)
        self.blocks = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width)])
        self.unused = nn.Linear(3, 1)  # has no gradient, so its optimizer state stays empty

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


def sharded(seed: int = 0, width: int = 8) -> nn.Module:
    torch.manual_seed(seed)
    net = Net(width)
    for block in net.blocks:
        fully_shard(block)
    return fully_shard(net)


def adamw(net: nn.Module, **options) -> torch.optim.AdamW:
    matrices = [p for p in net.parameters() if p.ndim == 2]
    vectors = [p for p in net.parameters() if p.ndim < 2]
    return torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2, **options)


def step(net, optimizer, seed):
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
    net(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


class Plain:
    def __init__(self, **values):
        self.values = values

    def state_dict(self):
        return dict(self.values)

    def load_state_dict(self, state):
        self.values = state


def everything(net, optimizer, scheduler=None, **more):
    states = {
        "roles.student.transformer": ModelState(net),
        "optimizers.student": OptimizerState(dict(net.named_parameters()), optimizer),
    }
    if scheduler:
        states["schedulers.student"] = SchedulerState(scheduler)
    return states | more


def snapshot(net, optimizer):
    """Bytes of everything that training depends on."""

    def full(t):
        return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()

    state = {
        name: {k: full(v) for k, v in optimizer.state[p].items()}
        for name, p in net.named_parameters()
        if optimizer.state.get(p)
    }
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return {name: full(p) for name, p in net.named_parameters()}, state, groups


def assert_equal(a, b):
    assert a[0].keys() == b[0].keys() and all(torch.equal(a[0][k], b[0][k]) for k in a[0])
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        assert a[1][name].keys() == b[1][name].keys()
        for key, value in a[1][name].items():
            assert torch.equal(value, b[1][name][key]) and value.dtype == b[1][name][key].dtype, (name, key)
    assert a[2] == b[2]


@pytest.mark.parametrize("kernel", [{"fused": True}, {"foreach": False}, {"foreach": True, "amsgrad": True}])
def test_round_trip_is_bit_equal_and_training_goes_on_the_same(tmp_path, kernel):
    def build(seed):
        net = sharded(seed)
        optimizer = adamw(net, **kernel)
        return net, optimizer, LambdaLR(optimizer, lambda update: 1 / (update + 1))

    net, optimizer, scheduler = build(0)
    train_state = Plain(step=2, pair=[1, 0.1], none=None, nested={"a": {"b": True}, "t": torch.arange(3)})
    for number in range(2):
        step(net, optimizer, number)
        scheduler.step()
    before = snapshot(net, optimizer)
    checkpointer = Checkpointer(tmp_path / "checkpoint")
    files = {"config.toml": "a = 1\n", "versions.json": "{}"}
    checkpointer.save(2, everything(net, optimizer, scheduler, train_state=train_state), extra_files=files)
    assert_equal(snapshot(net, optimizer), before)  # saving changed nothing
    for number in range(2, 4):
        step(net, optimizer, number)
        scheduler.step()

    other, other_optimizer, other_scheduler = build(1)
    loaded = Plain(step=0, nested={"t": torch.zeros(3, dtype=torch.int64)})
    path = tmp_path / "checkpoint/step-2"
    assert not Checkpointer(tmp_path / "checkpoint").load(
        2, everything(other, other_optimizer, other_scheduler, train_state=loaded)
    )
    assert_equal(snapshot(other, other_optimizer), before)
    assert type(other_optimizer.param_groups[0]["betas"]) is tuple
    assert (path / "config.toml").read_text() == "a = 1\n"
    nested = loaded.values.pop("nested")
    assert loaded.values == {"step": 2, "pair": [1, 0.1], "none": None}
    assert nested["a"] == {"b": True} and nested["t"].tolist() == [0, 1, 2]
    for number in range(2, 4):
        step(other, other_optimizer, number)
        other_scheduler.step()
    assert_equal(snapshot(other, other_optimizer), snapshot(net, optimizer))
    assert other_scheduler.state_dict()["last_epoch"] == 4


def test_the_kernel_may_change_between_save_and_load(tmp_path):
    net = sharded(0)
    optimizer = adamw(net, fused=True)
    step(net, optimizer, 0)
    Checkpointer(tmp_path).save(1, everything(net, optimizer))
    other = sharded(1)
    loop = adamw(other, foreach=False)
    Checkpointer(tmp_path).load(1, everything(other, loop))
    assert loop.param_groups[0]["foreach"] is False and not loop.param_groups[0]["fused"]
    assert loop.state[other.first.weight]["step"].item() == 1
    step(other, loop, 1)


def test_a_never_stepped_optimizer_is_not_touched_by_saving_or_loading(tmp_path):
    net = sharded(0)
    optimizer = adamw(net)
    calls = []
    optimizer.register_step_pre_hook(lambda *a: calls.append("step"))
    optimizer.register_state_dict_pre_hook(lambda *a: calls.append("state_dict"))
    before = snapshot(net, optimizer)
    Checkpointer(tmp_path).save(0, everything(net, optimizer))
    assert not calls and not optimizer.state and all(p.grad is None for p in net.parameters())
    assert_equal(snapshot(net, optimizer), before)

    other = sharded(1)
    stepped = adamw(other)
    step(other, stepped, 0)
    Checkpointer(tmp_path).load(0, everything(other, stepped))
    assert not stepped.state
    step(net, optimizer, 7)
    step(other, stepped, 7)
    assert_equal(snapshot(other, stepped), snapshot(net, optimizer))


def test_parameters_without_gradient_have_no_entry(tmp_path):
    net = sharded(0)
    optimizer = adamw(net)
    step(net, optimizer, 0)
    assert net.unused.weight not in optimizer.state
    Checkpointer(tmp_path).save(1, everything(net, optimizer))
    other = sharded(1)
    fresh = adamw(other)
    Checkpointer(tmp_path).load(1, everything(other, fresh))
    assert other.unused.weight not in fresh.state and other.first.weight in fresh.state


class Allocations(TorchDispatchMode):
    """Counts the bytes of tensors with memory of their own that are made inside."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and any(word in function.name() for word in ("_like", "zeros", "clone")):
            self.bytes += result.numel() * result.element_size()
        return result


def test_loading_copies_neither_parameters_nor_optimizer_state(tmp_path):
    """A 14B model that fits must also resume: only the optimizer's state is made, once."""
    net = sharded(0, width=64)
    optimizer = adamw(net)
    step(net, optimizer, 0)
    Checkpointer(tmp_path).save(1, everything(net, optimizer))
    saved = [tensor for entries in snapshot(net, optimizer)[1].values() for tensor in entries.values()]
    other = sharded(1, width=64)
    states = everything(other, adamw(other))
    with Allocations() as allocations:
        Checkpointer(tmp_path).load(1, states)
    total = sum(tensor.numel() * tensor.element_size() for tensor in saved)
    assert total > 50_000 and total <= allocations.bytes < 1.02 * total


def test_hyper_parameters_follow_names_not_the_order_of_groups(tmp_path):
    net = sharded(0)
    optimizer = adamw(net)
    optimizer.param_groups[0]["lr"] = 0.125
    Checkpointer(tmp_path).save(1, everything(net, optimizer))
    other = sharded(0)
    turned = adamw(other)
    turned.param_groups.reverse()
    Checkpointer(tmp_path).load(1, everything(other, turned))
    assert [group["lr"] for group in turned.param_groups] == [1e-2, 0.125]
    mixed = sharded(0)
    with pytest.raises(UserError, match="share an optimizer group"):
        Checkpointer(tmp_path).load(1, everything(mixed, torch.optim.AdamW(mixed.parameters())))
    fewer = sharded(0)
    with pytest.raises(UserError, match=r"2 differ: unused.bias, unused.weight"):
        trained = [p for name, p in fewer.named_parameters() if "unused" not in name]
        Checkpointer(tmp_path).load(1, everything(fewer, torch.optim.AdamW(trained)))


def test_gathered_parameters_are_loaded_visibly(tmp_path):
    net, other = sharded(0), sharded(1)
    Checkpointer(tmp_path).save(1, {"m": ModelState(net)})
    x = torch.ones(2, 4)
    with torch.no_grad():
        expected = net(x)
        assert not torch.equal(other(x), expected)  # leaves the root gathered
        Checkpointer(tmp_path).load(1, {"m": ModelState(other)})
        assert torch.equal(other(x), expected)


def test_random_state_continues_every_stream(tmp_path):
    def draw():
        return [
            torch.rand(3).tolist(),
            np.random.randn(3).tolist(),
            random.gauss(0, 1),
            torch.rand(2, generator=generator).tolist(),
        ]

    generator = torch.Generator().manual_seed(5)
    draw()
    state = {"random_state": RandomState(generator)}
    Checkpointer(tmp_path).save(1, state)
    expected = draw(), draw()
    draw()
    Checkpointer(tmp_path).load(1, state)
    assert (draw(), draw()) == expected


def test_ranks_may_come_and_go(tmp_path, caplog):
    state = {"random_state": RandomState()}
    Checkpointer(tmp_path).save(1, state)
    expected = torch.rand(2)
    Checkpointer(tmp_path).load(1, state | {"random_state": RandomState()})
    assert torch.equal(torch.rand(2), expected) and "is not in" not in caplog.text
    state["random_state"].rank = 7
    Checkpointer(tmp_path).load(1, state)
    assert "random_state is not in" in caplog.text
    Checkpointer(tmp_path).save(2, simple())
    Checkpointer(tmp_path).load(2, simple() | state)
    Checkpointer(tmp_path).load(1, {}, allow_unexpected=[])


# Which checkpoints there are


def simple(value: float = 1.0) -> dict:
    return {"state": Plain(t=torch.full((100,), value), n=1)}


def test_only_complete_checkpoints_with_the_exact_name_count(tmp_path):
    checkpointer = Checkpointer(tmp_path / "c")
    assert checkpointer.steps() == []
    for number in (10, 9, 100):
        checkpointer.save(number, simple())
    for name in ("step-101.tmp", "my-step-102", "step-103-copy", "step-0104"):
        (tmp_path / "c" / name).mkdir()
        for file in checkpointer.path(100).iterdir():
            (tmp_path / "c" / name / file.name).write_bytes(file.read_bytes())
    (tmp_path / "c" / "step-105").mkdir()
    (tmp_path / "c" / "step-106").write_text("a file")
    assert checkpointer.steps() == [9, 10, 100]
    manifest = json.loads((checkpointer.path(9) / "manifest.json").read_text())["files"]
    assert {e["name"] for e in manifest} | {"manifest.json"} == {p.name for p in checkpointer.path(9).iterdir()}
    (checkpointer.path(100) / ".metadata").unlink()
    assert checkpointer.steps()[-1] == 10


def test_what_to_start_from(tmp_path):
    checkpointer = Checkpointer(tmp_path / "c")
    assert checkpointer.find(CheckpointSection()) is None
    with pytest.raises(UserError, match="require_resume = true, but there is no checkpoint"):
        checkpointer.find(CheckpointSection(require_resume=True))
    other = CheckpointSection(initial_load_path=str(tmp_path / "other" / "step-5"))
    with pytest.raises(UserError, match="cannot read .*other/step-5: there is no checkpoint"):
        checkpointer.find(other)
    Checkpointer(tmp_path / "other").save(5, simple())
    assert checkpointer.find(other) == tmp_path / "other/step-5"
    for number in (1, 2, 3):
        checkpointer.save(number, simple())
    assert checkpointer.find(other) == checkpointer.path(3)
    assert checkpointer.find(CheckpointSection(load_step=1)) == checkpointer.path(1)
    with pytest.raises(UserError, match="load_step = 7 is not in .*: there are 1, 2, 3"):
        checkpointer.find(CheckpointSection(load_step=7))
    (checkpointer.path(3) / "state.json").unlink()
    for section in (CheckpointSection(), CheckpointSection(load_step=3)):  # not silently from 2
        with pytest.raises(DamagedCheckpoint, match="step-3: state.json is missing.*step 2 was read and is whole: set"):
            checkpointer.find(section)
    assert checkpointer.find(CheckpointSection(load_step=2)) == checkpointer.path(2)


@pytest.mark.faults
def test_keep_latest_k(tmp_path):
    """Fault 38."""
    with pytest.raises(UserError, match="keep_latest_k = 1 is not allowed"):
        Checkpointer(tmp_path, keep_latest_k=1)
    everything_kept = Checkpointer(tmp_path)
    for number in range(4):
        everything_kept.save(number, simple(float(number)))
    assert everything_kept.steps() == [0, 1, 2, 3]
    (tmp_path / "step-50").mkdir()  # foreign and incomplete: neither counted nor removed
    (tmp_path / "notes").mkdir()
    state = simple()
    checkpointer = Checkpointer(tmp_path, keep_latest_k=2)
    checkpointer.load(1, state)
    assert state["state"].values["t"][0] == 1
    checkpointer.save(4, simple())
    assert checkpointer.steps() == [1, 2, 3, 4]  # two are known to be good: 1, which was read, and 4
    next(checkpointer.path(3).glob("*.distcp")).write_bytes(b"")
    checkpointer.save(5, simple())
    assert checkpointer.steps() == [1, 4, 5]  # 1 is the one this run was resumed from
    (checkpointer.path(5) / "keep").touch()
    checkpointer.save(6, simple())
    assert checkpointer.steps() == [1, 4, 5, 6]  # 5 does not count
    for number in (7, 8):
        checkpointer.save(number, simple())
    assert checkpointer.steps() == [1, 5, 7, 8]
    assert checkpointer.path(3).is_dir()  # damaged
    assert (tmp_path / "step-50").is_dir() and (tmp_path / "notes").is_dir()


@pytest.mark.faults
def test_a_failing_removal_is_no_failure_and_is_completed(tmp_path, monkeypatch, caplog):
    """Fault 38."""
    checkpointer = Checkpointer(tmp_path, keep_latest_k=2)
    for number in range(2):
        checkpointer.save(number, simple())
    unlink = Path.unlink

    def deny(path, **options):
        if path.name == "state.json":
            raise PermissionError(13, "Permission denied")
        unlink(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", deny)
        checkpointer.save(2, simple())
        assert "could not remove" in caplog.text and checkpointer.steps() == [1, 2]
        assert sorted(p.name for p in tmp_path.iterdir()) == ["step-0.tmp", "step-1", "step-2"]
        checkpointer.save(3, simple())
        assert sorted(p.name for p in tmp_path.iterdir()) == ["step-0.tmp", "step-1.tmp", "step-2", "step-3"]
        Checkpointer(tmp_path)  # nor does it keep a run from starting
    checkpointer.save(4, simple())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-3", "step-4"]


@pytest.mark.faults
def test_only_what_is_newer_than_enough_good_ones_keeps_an_old_one(tmp_path):
    """Fault 38. A run that goes on from 4 knows of one good one; of two after its first save. Later ones of an abandoned
    course are no reason to remove its own."""
    before = Checkpointer(tmp_path)
    for number in (2, 4, 6, 100):
        before.save(number, simple())
    checkpointer = Checkpointer(tmp_path, keep_latest_k=2)
    checkpointer.load(checkpointer.find(CheckpointSection(load_step=4)), simple())
    checkpointer.save(5, simple())
    assert checkpointer.steps() == [4, 5, 6, 100]
    for number in (6, 7, 8):
        checkpointer.save(number, simple())
    assert checkpointer.steps() == [4, 7, 8, 100]


def test_a_step_that_is_trained_again_replaces_its_checkpoint(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(3, simple(1.0))
    checkpointer.save(3, simple(2.0))
    state = simple(0.0)
    checkpointer.load(3, state)
    assert state["state"].values["t"][0] == 2.0
    assert [p.name for p in tmp_path.iterdir()] == ["step-3"]
    (tmp_path / "step-3").rename(tmp_path / "step-3.old.tmp")  # killed between the two renames
    assert Checkpointer(tmp_path).steps() == [3]


@pytest.mark.faults
def test_what_has_the_name_already_is_kept_unless_it_is_ours_and_whole(tmp_path, capsys):
    """Fault 18."""
    checkpointer = Checkpointer(tmp_path)
    for number in (1, 2, 3, 4, 5):
        checkpointer.save(number, simple(1.0))
    damage_flip(checkpointer.path(2))  # of the same size
    (checkpointer.path(3) / "keep").touch()
    (checkpointer.path(4) / ".fvtitan-checkpoint").unlink()  # somebody's copy
    (tmp_path / "step-6").write_text("a file")
    kept = {n: {p.name: p.read_bytes() for p in checkpointer.path(n).iterdir()} for n in (2, 3, 4)}
    for number in (2, 3, 4, 5, 6):
        checkpointer.save(number, simple(2.0))
        said = f"it is now {tmp_path}/step-{number}.aside" if number != 5 else "replacing it"
        assert f"{checkpointer.path(number)} was there already: {said}" in capsys.readouterr().out
        state = simple(0.0)
        checkpointer.load(number, state)
        assert state["state"].values["t"][0] == 2.0
    for number, files in kept.items():
        assert {p.name: p.read_bytes() for p in (tmp_path / f"step-{number}.aside").iterdir()} == files
    assert (tmp_path / "step-6.aside").read_text() == "a file"
    (checkpointer.path(3) / "keep").touch()
    checkpointer.save(3, simple(3.0))
    assert sorted(p.name for p in tmp_path.iterdir() if "." in p.name) == [
        *(f"step-{number}.aside" for number in (2, 3)),
        "step-3.aside-2",
        *(f"step-{number}.aside" for number in (4, 6)),
    ]
    assert Checkpointer(tmp_path).steps() == [1, 2, 3, 4, 5, 6]


@pytest.mark.faults
@pytest.mark.parametrize(
    "point",
    [
        *(pytest.param(p, marks=pytest.mark.slow) for p in ("_commit", "file_entry", "publish")),
        "write_atomic:manifest.json",
    ],
)
def test_a_kill_before_the_commit_leaves_the_good_one(tmp_path, point):
    """Fault 3."""
    program = textwrap.dedent(f"""
        import os, signal, sys
        import torch
        from fvtitan.components import checkpoint
        from tests_plain import Plain

        def die(*_):
            os.kill(os.getpid(), signal.SIGKILL)

        checkpointer = checkpoint.Checkpointer({str(tmp_path / "c")!r})
        checkpointer.save(1, {{"state": Plain(t=torch.ones(100), n=1)}})
        point = {point!r}
        if point == "_commit":
            checkpointer._commit = die
        elif point == "file_entry":
            checkpoint.file_entry = die
        elif point == "publish":
            checkpoint.Path.rename = die
        else:
            write = checkpoint.write_atomic
            checkpoint.write_atomic = lambda path, text: die() if path.name == "manifest.json" else write(path, text)
        checkpointer.save(2, {{"state": Plain(t=torch.zeros(100), n=2)}})
    """)
    (tmp_path / "tests_plain.py").write_text(
        "class Plain:\n    def __init__(self, **v):\n        self.v = v\n    def state_dict(self):\n"
        "        return self.v\n    def load_state_dict(self, s):\n        self.v = s\n"
    )
    (tmp_path / "program.py").write_text(program)
    (tmp_path / "c" / "step-9.tmp").mkdir(parents=True)  # somebody else's
    result = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, timeout=60, capture_output=True, text=True)
    assert result.returncode == -9, result.stderr
    assert list((tmp_path / "c" / "step-2.tmp").glob("*.distcp"))
    checkpointer = Checkpointer(tmp_path / "c")
    assert checkpointer.steps()[-1] == 1
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["step-1", "step-9.tmp"]
    state = simple(5.0)
    checkpointer.load(1, state)
    assert state["state"].values["t"][0] == 1.0


# Damage and mischief


def damage_truncate(path):
    shard = next(path.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-7])
    return "bytes, written were"


def damage_flip(path):
    shard = next(path.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    return "sha256 differs"


def damage_missing(path):
    next(path.glob("*.distcp")).unlink()
    return "is missing"


def damage_state(path):
    (path / "state.json").write_text((path / "state.json").read_text().replace("1", "2"))
    return r"state.json has changed"


def damage_manifest(path):
    (path / "manifest.json").write_text("")
    return "manifest.json cannot be read"


def damage_no_manifest(path):
    (path / "manifest.json").unlink()
    return "not a complete checkpoint"


def damage_unreadable(path):
    """A bad block; the patch below makes it one."""
    (path / "bad block").touch()
    return r"state.json: Input/output error"


DAMAGES = [
    damage_truncate,
    damage_flip,
    damage_missing,
    damage_state,
    damage_manifest,
    damage_no_manifest,
    damage_unreadable,
]


@pytest.fixture
def bad_blocks(monkeypatch):
    read: list[str] = []  # the folders whose bytes are read
    sha256 = checkpoint_folder.file_sha256

    def reading(path):
        read.append(path.parent.name)
        if path.name == "state.json" and (path.parent / "bad block").exists():
            raise OSError(5, "Input/output error")
        return sha256(path)

    monkeypatch.setattr(checkpoint_folder, "file_sha256", reading)
    return read


def test_ranks_share_the_reading_outside_of_a_run_and_hear_of_what_one_finds(tmp_path, bad_blocks, monkeypatch):
    net = sharded(0)
    Checkpointer(tmp_path).save(1, everything(net, adamw(net)))
    path = tmp_path / "step-1"
    files = {entry["name"] for entry in json.loads((path / "manifest.json").read_text())["files"]}
    names: list[str] = []
    sha256 = checkpoint_folder.file_sha256
    monkeypatch.setattr(checkpoint_folder, "file_sha256", lambda file: names.append(file.name) or sha256(file))
    told: list[Exception | None] = [None, None]
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)

    def gather(outcomes: list, mine: tuple) -> None:
        outcomes[:] = [(error, None) for error in told]
        outcomes[dist.get_rank()] = mine

    monkeypatch.setattr(dist, "all_gather_object", gather)
    by_rank = []
    for rank in range(2):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        names.clear()
        verify_files(path)
        by_rank.append(set(names))
        assert len(names) == len(by_rank[-1])
    assert by_rank[0] | by_rank[1] == files and not by_rank[0] & by_rank[1] and all(by_rank)
    told[0] = DamagedCheckpoint("a file that rank 0 has read")
    with pytest.raises(DamagedCheckpoint, match="that rank 0 has read"):
        verify_files(path)
    told[0] = None
    (path / "state.json").write_text("{}")  # its size is compared by all
    with pytest.raises(DamagedCheckpoint, match="step-1: state.json has 2 bytes"):
        verify_files(path)


@pytest.mark.faults
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_before_anything_is_touched(tmp_path, damage, bad_blocks):
    """Faults 15, 16, 17."""
    net = sharded(0)
    optimizer = adamw(net)
    step(net, optimizer, 0)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, everything(net, optimizer))
    checkpointer.save(2, everything(net, optimizer))
    message = damage(checkpointer.path(2))
    other = sharded(1)
    fresh = adamw(other)
    before = snapshot(other, fresh)
    with pytest.raises(DamagedCheckpoint, match=message) as caught:
        checkpointer.load(2, everything(other, fresh))
    assert str(checkpointer.path(2)) in str(caught.value)
    assert_equal(snapshot(other, fresh), before)
    checkpointer.load(1, everything(other, fresh))


@pytest.mark.faults
@pytest.mark.parametrize("damage", DAMAGES)
def test_going_back_from_damage(tmp_path, damage, bad_blocks, capsys):
    """Faults 15, 16, 17, 18. Only when asked to; to the newest that is whole; nothing is removed, then or later, and the way
    is not blocked."""
    checkpointer = Checkpointer(tmp_path)
    for number in range(1, 5):
        checkpointer.save(number, simple(float(number)))
    damage_flip(checkpointer.path(3))
    message = damage(checkpointer.path(4))
    damaged = {n: {p.name: p.read_bytes() for p in checkpointer.path(n).iterdir()} for n in (3, 4)}
    with pytest.raises(DamagedCheckpoint, match=message) as caught:
        Checkpointer(tmp_path).find(CheckpointSection())
    hint = "step 2 was read and is whole: set checkpoint.load_step = 2, or checkpoint.fallback = true"
    assert str(checkpointer.path(4)) in str(caught.value)
    assert str(caught.value).endswith(f"; {hint} (damaged as well: 3)")
    assert {n: {p.name: p.read_bytes() for p in checkpointer.path(n).iterdir()} for n in (3, 4)} == damaged

    for _ in range(2):  # as often as it is tried
        checkpointer = Checkpointer(tmp_path, keep_latest_k=2)
        capsys.readouterr()
        assert checkpointer.find(CheckpointSection(fallback=True)) == checkpointer.path(2)
        said = capsys.readouterr().out
        assert "sha256 differs" in said and all(str(checkpointer.path(n)) in said for n in (2, 3, 4))
        assert f"going back to {checkpointer.path(2)}" in said
    bad_blocks.clear()
    state = simple(0.0)
    checkpointer.load(checkpointer.path(2), state)
    assert state["state"].values["t"][0] == 2.0 and not bad_blocks  # read once
    for number in range(3, 8):
        checkpointer.save(number, simple(10.0 + number))
    assert checkpointer.steps() == [2, 6, 7]
    for number, files in damaged.items():
        there = {p.name: p.read_bytes() for p in (tmp_path / f"step-{number}.aside").iterdir()}
        assert f"damaged checkpoint {tmp_path}/step-{number}" in there.pop("keep").decode() or number == 4
        assert there == files
    assert Checkpointer(tmp_path).find(CheckpointSection()) == checkpointer.path(7)


@pytest.mark.faults
def test_a_copy_without_hidden_files_is_not_passed_over(tmp_path):
    """Fault 17: `cp step-2/*` leaves out .metadata."""
    checkpointer = Checkpointer(tmp_path)
    for number in (1, 2):
        checkpointer.save(number, simple())
    for path in checkpointer.path(2).glob(".*"):
        path.unlink()
    with pytest.raises(DamagedCheckpoint, match=r"step-2: \.\S+ is missing.*step 1 was read and is whole"):
        checkpointer.find(CheckpointSection())


@pytest.mark.faults
def test_a_damaged_one_is_never_removed(tmp_path):
    """Fault 18. Not even when it is old, by a run that knows nothing of it."""
    checkpointer = Checkpointer(tmp_path)
    for number in (1, 2):
        checkpointer.save(number, simple())
    damage_flip(checkpointer.path(2))
    checkpointer.find(CheckpointSection(fallback=True))
    for start in (3, 6):
        later = Checkpointer(tmp_path, keep_latest_k=2)
        for number in range(start, start + 3):
            later.save(number, simple())
    assert later.steps() == [2, 7, 8]


@pytest.mark.faults
def test_when_none_is_whole(tmp_path):
    """Fault 18. Neither a fresh start nor another source."""
    elsewhere = Checkpointer(tmp_path / "elsewhere")
    elsewhere.save(9, simple())
    checkpointer = Checkpointer(tmp_path / "c")
    checkpointer.save(1, simple())
    damage_flip(checkpointer.path(1))
    with pytest.raises(DamagedCheckpoint, match="sha256 differs.; there is no other one"):
        checkpointer.find(CheckpointSection())
    checkpointer.save(2, simple())
    damage_truncate(checkpointer.path(2))
    with pytest.raises(DamagedCheckpoint, match=r"no other one is whole \(damaged as well: 1\)"):
        checkpointer.find(CheckpointSection())
    section = CheckpointSection(fallback=True, initial_load_path=str(elsewhere.path(9)))
    with pytest.raises(DamagedCheckpoint, match="none is whole: .*step-2: .*step-1: "):
        checkpointer.find(section)
    damage_manifest(elsewhere.path(9))
    with pytest.raises(DamagedCheckpoint, match="step-9: manifest.json cannot be read.*there is no other one$"):
        Checkpointer(tmp_path / "d").find(CheckpointSection(initial_load_path=str(elsewhere.path(9))))


class Evil:
    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return Path.touch, (self.sentinel,)


def forge(path, name, content):
    """Change a file and make the manifest fit: the manifest is integrity, not authenticity."""
    (path / name).write_bytes(content)
    files = [file_entry(file) for file in path.iterdir() if file.name != "manifest.json"]
    (path / "manifest.json").write_text(json.dumps({"files": files}))


@pytest.mark.faults
def test_a_malicious_metadata_pickle_is_refused(tmp_path):
    """Fault 40."""
    checkpointer = Checkpointer(tmp_path / "c")
    checkpointer.save(1, simple())
    path, sentinel = checkpointer.path(1), tmp_path / "sentinel"
    original = pickle.loads((path / ".metadata").read_bytes())
    for make in ("whole", "inside"):
        index = Evil(sentinel)
        if make == "inside":
            index = copy.deepcopy(original)
            index.planner_data = Evil(sentinel)
        forge(path, ".metadata", pickle.dumps(index))
        with pytest.raises(DamagedCheckpoint, match="refused .*metadata"):
            checkpointer.load(1, simple())
    assert not sentinel.exists()
    pickle.loads((path / ".metadata").read_bytes())
    assert sentinel.exists()  # it would have worked


@pytest.mark.faults
def test_pickled_objects_and_foreign_files_are_refused(tmp_path):
    """Fault 40."""
    checkpointer = Checkpointer(tmp_path / "c")
    checkpointer.save(1, simple())
    path = checkpointer.path(1)
    original = (path / ".metadata").read_bytes()
    index = pickle.loads(original)
    for info in index.storage_data.values():
        info.relative_path = "../../secret"
    forge(path, ".metadata", pickle.dumps(index))
    with pytest.raises(DamagedCheckpoint, match="points to '../../secret'"):
        checkpointer.load(1, simple())

    sentinel = tmp_path / "sentinel"
    dcp.save({"state.t": torch.zeros(100), "state.evil": Evil(sentinel)}, checkpoint_id=str(tmp_path / "evil"))
    for file in (tmp_path / "evil").iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    forge(path, ".metadata", (path / ".metadata").read_bytes())
    with pytest.raises(DamagedCheckpoint, match="refused"):
        checkpointer.load(1, simple())
    assert not sentinel.exists()

    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][0]["name"] = "../x"
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedCheckpoint, match="names files elsewhere"):
        checkpointer.load(1, simple())


# Strictness


@pytest.mark.faults
def test_names_and_shapes_must_fit(tmp_path):
    """Fault 35."""
    net = sharded(0)
    optimizer = adamw(net)
    step(net, optimizer, 0)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, everything(net, optimizer, ema=Plain(t=torch.ones(2)), note=Plain(n=1)))

    wide = sharded(1, width=16)
    before = snapshot(wide, adamw(wide))
    with pytest.raises(UserError, match=r"roles.student.transformer.first.weight \[8, 4\] saved, \[16, 4\] here"):
        checkpointer.load(1, everything(wide, adamw(wide)), allow_unexpected=["ema", "note"])
    assert_equal(snapshot(wide, adamw(wide)), before)

    other = sharded(1)
    states = everything(other, adamw(other))
    with pytest.raises(UserError, match="2 unexpected in the checkpoint: ema.t, note"):
        checkpointer.load(1, states)
    with pytest.raises(UserError, match="1 unexpected in the checkpoint: note$"):
        checkpointer.load(1, states, allow_unexpected=["ema"])
    checkpointer.load(1, states, allow_unexpected=["ema", "note"])
    checkpointer.load(1, {"roles.student.transformer": ModelState(other)}, allow_unexpected=[""])

    critic = sharded(2)
    more = states | {"roles.critic.transformer": ModelState(critic)}
    with pytest.raises(UserError, match="lacks roles.critic.transformer; it holds roles.student.transformer, opt"):
        checkpointer.load(1, more, allow_unexpected=["ema", "note"])
    kept = critic.first.weight.full_tensor().clone()
    lacking = checkpointer.load(1, more, allow_unexpected=["ema", "note"], allow_missing=["roles.critic"])
    assert lacking == ["roles.critic.transformer"]
    assert torch.equal(critic.first.weight.full_tensor(), kept)

    deeper = sharded(1)
    deeper.extra = nn.Linear(2, 2)
    with pytest.raises(UserError, match="2 missing in the checkpoint: roles.student.transformer.extra.weight"):
        checkpointer.load(1, {"roles.student.transformer": ModelState(deeper)}, allow_unexpected=[""])
    with pytest.raises(UserError, match="step-77: there is no checkpoint"):
        checkpointer.load(77, states)


@pytest.mark.faults
def test_at_most_twenty_names_are_listed(tmp_path):
    """Fault 35."""
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, {"state": Plain(**{f"t{i:02d}": torch.ones(1) for i in range(30)})})
    with pytest.raises(UserError, match="30 unexpected in the checkpoint: .*state.t19 and 10 more") as caught:
        checkpointer.load(1, {"state": Plain(other=torch.ones(1))})
    assert "1 missing in the checkpoint: state.other" in str(caught.value) and "t20" not in str(caught.value)


@pytest.mark.faults
def test_another_dtype_is_an_error_unless_asked_for(tmp_path):
    """Fault 35."""
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, simple(0.3))
    state = {"state": Plain(t=torch.zeros(100, dtype=torch.bfloat16))}
    with pytest.raises(UserError, match="state.t torch.float32 saved, torch.bfloat16 here"):
        checkpointer.load(1, state)
    checkpointer.load(1, state, allow_cast=True)
    assert torch.equal(state["state"].values["t"], torch.full((100,), 0.3).bfloat16())


# Writing that fails, writing in the background


def fail_to_write(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.faults
@pytest.mark.parametrize("where", ["dcp", "commit", "space"])
def test_a_failed_save_leaves_the_good_one_and_no_rest(tmp_path, monkeypatch, where):
    """Fault 14."""
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, simple())
    if where == "dcp":
        monkeypatch.setattr("torch.distributed.checkpoint.FileSystemWriter.write_data", fail_to_write)
    elif where == "commit":
        monkeypatch.setattr("fvtitan.components.checkpoint.file_entry", fail_to_write)
    else:
        monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 7}))
    with pytest.raises(DiskFull, match="step-2.* bytes needed, .* free in") as caught:
        checkpointer.save(2, simple())
    expected = (
        "step-2: the disk is too full: 400 bytes needed, 7 free in" if where == "space" else "No space left on device"
    )
    assert expected in str(caught.value) and len(str(caught.value)) < 400
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
    checkpointer.save(2, simple())
    assert checkpointer.steps() == [1, 2]


def test_a_background_save_holds_the_values_of_the_call(tmp_path):
    net = sharded(0)
    optimizer = adamw(net)
    step(net, optimizer, 0)
    before = snapshot(net, optimizer)
    values = {"n": [1]}
    checkpointer = Checkpointer(tmp_path, async_mode="async", keep_latest_k=2)
    for number in range(1, 4):
        states = everything(net, optimizer, train_state=Plain(**values), random_state=Plain(t=torch.get_rng_state()))
        checkpointer.save(number, states)
        values["n"][0] += 1
        checkpointer.maybe_finish()
        step(net, optimizer, number)
        with torch.no_grad():
            net.first.bias.zero_()
        if number == 1:
            checkpointer.wait()
            other, state = sharded(1), Plain()
            fresh = adamw(other)
            Checkpointer(tmp_path).load(
                1, everything(other, fresh, train_state=state), allow_unexpected=["random_state"]
            )
            assert_equal(snapshot(other, fresh), before)
            assert state.values == {"n": [1]}
    checkpointer.close()
    checkpointer.close()
    assert checkpointer.steps() == [2, 3]


@pytest.mark.faults
def test_a_failed_background_save_is_raised_and_never_counts(tmp_path, monkeypatch):
    """Faults 6 and 14."""
    checkpointer = Checkpointer(tmp_path, async_mode="async")
    monkeypatch.setattr("torch.distributed.checkpoint.FileSystemWriter.write_data", fail_to_write)
    checkpointer.save(1, simple())
    with pytest.raises(CheckpointError, match=f"{tmp_path}/step-1.*No space left"):
        while True:
            checkpointer.maybe_finish()
    assert checkpointer.steps() == [] and not list(tmp_path.iterdir())
    monkeypatch.undo()
    checkpointer.save(2, simple())
    checkpointer.close()
    assert checkpointer.steps() == [2]


@pytest.mark.faults
@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_failed_save_may_be_let_pass_but_not_the_last(tmp_path, monkeypatch, capsys, mode):
    """Fault 14."""
    checkpointer = Checkpointer(tmp_path, async_mode=mode, on_failed_save="continue")
    with monkeypatch.context() as patch:
        patch.setattr("torch.distributed.checkpoint.FileSystemWriter.write_data", fail_to_write)
        checkpointer.save(1, simple())
        checkpointer.wait()
        said = capsys.readouterr().out
        assert f"WARNING: cannot save {tmp_path}/step-1" in said and "on_failed_save" in said
        assert "No space left on device: 400 bytes needed" in said
        assert not list(tmp_path.iterdir())
    checkpointer.save(2, simple())
    checkpointer.wait()
    with monkeypatch.context() as patch:
        patch.setattr("torch.distributed.checkpoint.FileSystemWriter.write_data", fail_to_write)
        with pytest.raises(DiskFull):
            checkpointer.save(3, simple(), last=True)
            checkpointer.wait()
    assert checkpointer.steps() == [2]
    checkpointer.close()


def test_no_process_group_is_needed_to_read(tmp_path):
    Checkpointer(tmp_path).save(1, {"m": ModelState(sharded(0))})
    program = (
        "import sys, torch\nfrom fvtitan.components.checkpoint import Checkpointer\n"
        "from fvtitan.components.stateful import ModelState\n"
        "m = torch.nn.Module(); m.first = torch.nn.Linear(4, 8)\n"
        "m.blocks = torch.nn.ModuleList([torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)])\n"
        "m.unused = torch.nn.Linear(3, 1)\n"
        "Checkpointer(sys.argv[1]).load(1, {'m': ModelState(m)})\nprint(m.first.weight.sum().item())"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60, cwd=REPOSITORY
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == sharded(0).first.weight.full_tensor().sum().item()
    assert not result.stderr


def test_a_state_from_before_skips_were_counted(tmp_path):
    Checkpointer(tmp_path).save(1, {"train_state": Plain(step=7)})
    state = TrainState()
    Checkpointer(tmp_path).load(1, {"train_state": state})
    assert (state.step, state.nonfinite_skips) == (7, 0)


def test_a_failed_save_does_not_hide_what_ends_the_run(tmp_path, monkeypatch, capsys):
    """A write in the background and training fail together: training's error is the one that is raised."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    net = sharded()
    monkeypatch.setattr("fvtitan.components.checkpoint.file_entry", full)
    for error in (FloatingPointError("step 3: not finite"), None):
        with pytest.raises(FloatingPointError if error else DiskFull):
            with Checkpointer(tmp_path, async_mode="async") as checkpointer:
                checkpointer.save(1, {"roles.student.transformer": ModelState(net)})
                if error:
                    raise error
        assert ("WARNING: cannot commit" in capsys.readouterr().out) == bool(error)
    assert Checkpointer(tmp_path).steps() == []
