"""Run by torchrun: train a little, save, load; prints one JSON line with what rank 0 saw."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fvtitan.components import checkpoint, checkpoint_folder
from fvtitan.components.checkpoint import Checkpointer
from fvtitan.components.checkpoint_folder import CheckpointError, DamagedCheckpoint, verify_files
from fvtitan.components.stateful import ModelState, OptimizerState, RandomState
from fvtitan.config import CheckpointSection
from fvtitan.errors import UserError


def build(seed: int):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 1), nn.LayerNorm(1))  # 7 and 1: uneven, empty shards
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    fully_shard(net[0])
    fully_shard(net)
    return net, torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True)


def train(net, optimizer, first: int, last: int):
    for number in range(first, last):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(number))
        net(x).square().mean().backward()  # the same data on every rank, so that any world size trains the same model
        optimizer.step()
        optimizer.zero_grad()


def digest(net, optimizer) -> dict[str, str]:
    def of(tensor):
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return hashlib.sha256(full.detach().cpu().numpy().tobytes()).hexdigest()[:16]

    sums = {}
    for name, parameter in net.named_parameters():
        sums[name] = of(parameter)
        for key, value in sorted(optimizer.state[parameter].items()):
            assert key == "step" or value.placements == parameter.placements
            sums[f"{name}.{key}"] = of(value)
    return sums


def states_of(net, optimizer) -> dict:
    return {
        "roles.student.transformer": ModelState(net),
        "optimizers.student": OptimizerState(dict(net.named_parameters()), optimizer),
        "random_state": RandomState(),
    }


def go_on(folder: Path, *, asynchronous: bool) -> dict:
    """Resume if there is something, train two steps, save; with `asynchronous`, train on while it is written."""
    checkpointer = Checkpointer(folder, async_mode="async" if asynchronous else "disabled")
    net, optimizer = build(seed=dist.get_world_size())
    states, report = states_of(net, optimizer), {}
    start = max(checkpointer.steps(), default=0)
    if start:
        checkpointer.load(start, states)
        report["loaded"] = digest(net, optimizer)
    train(net, optimizer, start, start + 2)
    report["saved"] = digest(net, optimizer)
    checkpointer.save(start + 2, states)
    if asynchronous:
        train(net, optimizer, start + 2, start + 5)
        checkpointer.maybe_finish()
        checkpointer.wait()
        checkpointer.load(start + 2, states)  # holds the values of the call, though training went on
        report["loaded again"] = digest(net, optimizer)
    checkpointer.close()
    return report | {
        "random": random_states(checkpointer.path(start + 2)),
        "files": sorted(path.name for path in checkpointer.path(start + 2).iterdir()),
    }


def random_states(path: Path) -> list[str]:
    return sorted(json.loads((path / "state.json").read_text())["states"]["random_state"])


def fail(folder: Path) -> dict:
    """One rank cannot write, or cannot read: all of them hear of it and go on together."""
    checkpointer = Checkpointer(folder)
    net, optimizer = build(seed=0)
    states, seen, rank = states_of(net, optimizer), [], dist.get_rank()
    original = checkpoint.file_entry

    def broken(path):
        raise OSError(28, "No space left on device")

    checkpoint.file_entry = broken if rank == 1 else original
    try:
        checkpointer.save(1, states)
    except CheckpointError as error:
        seen.append(str(error))
    checkpoint.file_entry = original
    dist.barrier()
    assert checkpointer.steps() == [] and not list(folder.iterdir())
    dist.barrier()  # rank 0 makes its next files after the others have looked
    checkpointer.save(1, states)
    if rank == 0:
        shard = checkpointer.path(1) / "__1_0.distcp"
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    dist.barrier()
    hashed: list[str] = []
    sha256 = checkpoint_folder.file_sha256
    checkpoint_folder.file_sha256 = lambda path: hashed.append(path.name) or sha256(path)
    try:
        verify_files(checkpointer.path(1))
    except DamagedCheckpoint as error:
        verified = (str(error), hashed)
    checkpoint_folder.file_sha256 = sha256
    before = digest(net, optimizer)
    for step, kind in ((1, DamagedCheckpoint), (4, UserError)):
        try:
            checkpointer.load(step, states)
        except kind as error:
            seen.append(str(error))
    assert digest(net, optimizer) == before
    (checkpointer.path(0)).mkdir(exist_ok=True)  # somebody's
    checkpointer.save(3, states)
    if rank == 1:
        checkpointer.path(3).joinpath("state.json").unlink()
    dist.barrier()
    try:
        checkpointer.find(CheckpointSection(fallback=True))
    except DamagedCheckpoint as error:
        seen.append(str(error))
    checkpointer.save(2, states)
    try:
        checkpointer.find(CheckpointSection())
    except DamagedCheckpoint as error:
        seen.append(str(error))
    assert checkpointer.find(CheckpointSection(fallback=True)) == checkpointer.path(2)
    checkpointer.load(checkpointer.path(2), states)
    for step in (1, 3, 4):
        checkpointer.save(step, states)
    checkpointer.load(1, states)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (seen, verified))
    return {"errors": [errors for errors, _ in everyone], "verified": [outcome for _, outcome in everyone]}


def main() -> None:
    folder, modes = Path(sys.argv[1]), sys.argv[2:]
    dist.init_process_group("gloo")
    report = {}
    for mode in modes:
        report |= fail(folder / "fail") if mode == "fail" else go_on(folder / "run", asynchronous=mode == "async")
    if dist.get_rank() == 0:
        print(json.dumps(report))
    dist.destroy_process_group()


main()
