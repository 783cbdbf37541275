"""train.py as one rank of several, writing down what the rank saw: samples, noise, losses, gradients, states.

`launch` forks the ranks from a server that has imported everything (a rank then starts in no time), or has torchrun start
this file. A record is a file `<name>.rank<r>.pt`, so that what a killed rank saw is there as well.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from fvtitan.components.checkpoint import Checkpointer
from fvtitan.components.ema import EMA
from fvtitan.components.rng import SampleStreams
from fvtitan.components.validation import Validator
from fvtitan.distributed import utils
from fvtitan.methods.finetune import FineTuneMethod
from tests.helpers import ROOT, read_checkpoint, train

TIMEOUT = 600
forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(
    [
        "train",
        "tests.integration.exact_worker",
        "av",
        "diffusers.models.autoencoders.autoencoder_kl_wan",
        "ftfy",
        "torch._dynamo",
        "torch.utils.tensorboard",
        "torchdata.stateful_dataloader",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.umt5.modeling_umt5",
        "tyro",
    ]
)


def launch(
    ranks: int,
    arguments: list[str],
    folder: Path,
    *,
    torchrun: bool = False,
    watcher: Callable[..., None] | None = None,
    **options: Any,
) -> list[int]:
    """train.py with `arguments` on `ranks` ranks, records and output into `folder`; the exit statuses, under torchrun only
    its own. Options: see `watch`, or those of another function of a module that is called in its place."""
    folder.mkdir(parents=True, exist_ok=True)
    if torchrun:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command += ["-m", "tests.integration.exact_worker", str(folder), json.dumps(options), *arguments]
        with open(folder / "torchrun.log", "wb") as log:
            done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=TIMEOUT)
        return [done.returncode]
    processes = start(ranks, arguments, folder, watcher, options)
    try:
        for process in processes:
            process.join(TIMEOUT)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            if process.exitcode is None:
                process.kill()


def start(
    ranks: int, arguments: list[str], folder: Path, watcher: Callable[..., None] | None, options: dict[str, Any]
) -> list[Any]:
    """The forked ranks of `launch`, running. Kill them in the end."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's agent holds one
    environment = {
        "WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": store.port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_RESTART_COUNT": 0,
    }
    processes = []
    for rank in range(ranks):
        here = {key: str(value) for key, value in {**environment, "RANK": rank, "LOCAL_RANK": rank}.items()}
        processes.append(forkserver.Process(target=_rank, args=(here, folder, watcher or watch, options, arguments)))
        processes[-1].start()
        processes[-1].store = store  # lives as long
    return processes


def output(folder: Path) -> str:
    """What the ranks printed, for the message of an assertion."""
    return "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("*.log")))


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    """All records of a kind, over all ranks."""
    return [torch.load(path) for path in sorted(folder.glob(f"{kind}.*.pt"))]


def _rank(
    environment: dict[str, str],
    folder: Path,
    watcher: Callable[..., None],
    options: dict[str, Any],
    arguments: list[str],
) -> None:
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # of the loader's workers, as under torchrun
    with open(folder / f"rank{environment['RANK']}.log", "w", buffering=1) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        watcher(folder, **options)
        sys.exit(train(arguments))


def watch(
    folder: Path,
    *,
    stop_before: int = 0,
    gradients: tuple[int, ...] = (),
    disturb: bool = False,
    nan: tuple[int, int] = (-1, 0),
    states: bool = False,
) -> None:
    """Make this process record, and misbehave as asked.

    stop_before: a step at whose start all ranks kill themselves. gradients: steps whose gradients are recorded, before and
    after clipping. disturb: training draws from every generator there is. nan: (rank, step) whose loss is NaN. states: compare
    what is saved, loaded and validated, bit for bit.
    """
    rank = int(os.environ["RANK"])
    noise: list[Tensor] = []
    now = {"step": 0}

    def keep(name: str, record: dict[str, Any]) -> None:
        torch.save(record, folder / f"{name}.rank{rank}.pt")

    draw = SampleStreams.randn

    def randn(self: SampleStreams, name: str, *shape: int) -> Tensor:
        noise.append(draw(self, name, *shape))
        return noise[-1]

    SampleStreams.randn = randn
    step_of = FineTuneMethod.single_train_step

    def single_train_step(self: FineTuneMethod, batch: dict[str, Any], step: int, role: str):
        if step == stop_before:
            dist.barrier()
            os.kill(os.getpid(), signal.SIGKILL)
        noise.clear()
        now["step"] = step
        if disturb:
            self.generator.manual_seed(step)
            torch.rand(step), torch.rand(step, generator=self.generator), np.random.rand(step), random.random()
        loss, metrics = step_of(self, batch, step, role)
        positions = batch["positions"].tolist()
        seen = {"step": step, "rank": rank, "world": dist.get_world_size(), "positions": positions}
        seen |= {"sample_ids": list(batch["sample_ids"]), "noise": torch.cat(noise), "loss": float(loss.detach())}
        keep(f"batch.step-{step}.position-{positions[0]}", seen)
        return (loss * float("nan") if (rank, step) == tuple(nan) else loss), metrics

    FineTuneMethod.single_train_step = single_train_step

    if gradients:
        clip_globally = utils.clip_grad_norm

        def clip_grad_norm(parameters, max_norm: float) -> Tensor:
            if now["step"] not in gradients:
                return clip_globally(parameters, max_norm)
            named = {name: p.grad for name, p in parameters.items() if p.grad is not None}
            local_norm = torch.nn.utils.get_total_norm([utils.local_tensor(gradient) for gradient in named.values()])
            before = gathered(named)
            norm = clip_globally(parameters, max_norm)
            record = {"step": now["step"], "rank": rank, "norm": float(norm), "local_norm": float(local_norm)}
            record |= {"offsets": {name: offset_of(gradient) for name, gradient in named.items()}}
            keep(f"gradients.step-{now['step']}", record | {"before": before, "after": gathered(named)})
            return norm

        utils.clip_grad_norm = clip_grad_norm

    if states:
        save, load, validate = Checkpointer.save, Checkpointer.load, Validator.run

        def saving(self: Checkpointer, step: int, states, **options) -> None:
            before = digest(states)
            save(self, step, states, **options)
            changed = digest(states) != before
            differing = differences(states, self.path(step))
            keep(
                f"saved.step-{step}",
                {"changed": changed, "differing": differing, "shards": shards(states["ema.student"])},
            )

        def loading(self: Checkpointer, source, states, **options):
            lacking = load(self, source, states, **options)
            keep(f"loaded.{Path(source).name}", {"differing": differences(states, Path(source))})
            return lacking

        def validating(self: Validator, step: int, ema, **options) -> None:
            before = digest(self.method.checkpoint_state() | {"ema": ema})
            validate(self, step, ema, **options)
            after = digest(self.method.checkpoint_state() | {"ema": ema})
            keep(f"validated.step-{step}", {"before": before, "after": after})

        Checkpointer.save, Checkpointer.load, Validator.run = saving, loading, validating


def offset_of(tensor: Tensor) -> list[tuple[int, int]]:
    """Where this rank's shard lies in the whole tensor: (start, end) by dimension."""
    if not isinstance(tensor, DTensor):
        return [(0, size) for size in tensor.shape]
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return [(start, start + size) for start, size in zip(offset, shape, strict=True)]


def part(whole: Tensor, offset: list[tuple[int, int]]) -> Tensor:
    """That part of the whole tensor, sharing its memory."""
    return whole[tuple(slice(start, end) for start, end in offset)]


def gathered(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the whole tensors, on every rank, by one collective."""
    mine = {name: (offset_of(tensor), utils.local_tensor(tensor).clone()) for name, tensor in named.items()}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    whole = {name: torch.full(tensor.shape, float("nan")) for name, tensor in named.items()}
    for shards in everyone:
        for name, (offset, local) in shards.items():
            part(whole[name], offset).copy_(local)
    return whole


def flat(states: dict[str, Any]) -> dict[str, Any]:
    """Everything in states by its dotted name, without the generators, which are each rank's own."""
    found: dict[str, Any] = {}

    def walk(prefix: str, tree: dict[str, Any]) -> None:
        for key, value in tree.items():
            walk(f"{prefix}.{key}", value) if isinstance(value, dict) else found.__setitem__(f"{prefix}.{key}", value)

    for name, state in states.items():
        if name != "random_state":
            walk(name, state.state_dict())
    return found


def digest(states: dict[str, Any]) -> dict[str, str]:
    """A hash of this rank's part of every tensor, and the text of everything else."""

    def hashed(tensor: Tensor) -> str:
        content = utils.local_tensor(tensor).detach().contiguous().view(-1).view(torch.uint8).numpy()
        return hashlib.sha256(content.tobytes()).hexdigest()

    return {name: hashed(v) if isinstance(v, Tensor) else json.dumps(v) for name, v in flat(states).items()}


def differences(states: dict[str, Any], checkpoint: Path) -> list[str]:
    """The names of what is not, bit for bit, what a checkpoint's files say; this rank's part of the tensors."""
    ours, tensors = flat(states), read_checkpoint(checkpoint)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("random_state.")}
    written: dict[str, Any] = {}
    for name, tree in json.loads((checkpoint / "state.json").read_text())["states"].items():
        written |= flat({name: types.SimpleNamespace(state_dict=lambda tree=tree: tree)})
    differing = set(ours) ^ (set(tensors) | set(written))
    for name in set(ours) - differing:
        value = ours[name]
        if not isinstance(value, Tensor):
            same = json.loads(json.dumps(value)) == written[name]
        else:
            same = value.shape == tensors[name].shape
            same = same and torch.equal(utils.local_tensor(value).detach(), part(tensors[name], offset_of(value)))
        differing |= set() if same else {name}
    return sorted(differing)


def shards(ema: EMA) -> dict[str, int]:
    """How many numbers of the moving average this rank holds, and how many there are."""
    held = [utils.local_tensor(average).numel() for average in ema.shadow.values()]
    return {"own": sum(held), "whole": sum(average.numel() for average in ema.shadow.values())}


if __name__ == "__main__":
    watch(Path(sys.argv[1]), **json.loads(sys.argv[2]))
    sys.exit(train(sys.argv[3:]))
