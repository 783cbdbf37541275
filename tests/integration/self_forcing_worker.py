"""A rank of several that trains by Self-Forcing, writing down its rollouts, noise, collectives, losses and gradients."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from fvtitan.components.rng import SampleStreams
from fvtitan.distributed import utils
from fvtitan.methods.self_forcing import Rollout, SelfForcingMethod
from tests.integration.exact_worker import gathered


class Gathers(TorchDispatchMode):
    """Counts all-gathers."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += str(func).startswith(("c10d._allgather_base_", "c10d.allgather_"))
        return func(*args, **(kwargs or {}))


def watch(folder: Path, *, gradients: tuple[int, ...] = (), probe: bool = False) -> None:
    """Make this process record. gradients: steps whose whole gradients are recorded, by phase. probe: step 1's rollout is
    made once more after the student's update, and once without keeping what is gathered."""
    rank = int(os.environ["RANK"])
    now: dict[str, Any] = {}
    noise: dict[str, Tensor] = {}
    draw, step_of, roll = SampleStreams.randn, SelfForcingMethod.single_train_step, SelfForcingMethod.roll
    probed: dict[str, Any] = {}

    def randn(self: SampleStreams, name: str, *shape: int) -> Tensor:
        noise[name] = draw(self, name, *shape)
        return noise[name]

    def rolling(self: SelfForcingMethod, *args) -> Rollout:
        with Gathers() as gathers:
            rollout = roll(self, *args)
        sharded = all(isinstance(parameter, DTensor) for parameter in self.student.transformer.parameters())
        now["rolls"].append({"gathers": gathers.count, "sharded": sharded, "frames": rollout.video.shape[1]})
        return rollout

    def forward(module: torch.nn.Module, args: Any, keys: dict[str, Any]) -> None:
        call = keys["start_frame"], float(args[1].max()), bool(keys.get("commit")), torch.is_grad_enabled()
        now["asked"].append(call)

    def again() -> Tensor:
        with torch.no_grad():
            return rolling(*probed["arguments"]).video

    def single_train_step(self: SelfForcingMethod, batch: dict[str, Any], step: int, role: str):
        if not now:
            self.student.transformer.register_forward_pre_hook(forward, with_kwargs=True)
        now.update(step=step, role=role, rank=rank, positions=batch["positions"].tolist(), rolls=[], asked=[])
        if probe and (step, role) == (1, "student"):
            probed["arguments"] = self, batch, self.prompt_embeds(batch), self.streams(batch, step, role), step, role
            probed["before"] = again()
        if probe and (step, role) == (1, "critic"):
            probed["after"] = again()
            self.student.gathered = contextlib.nullcontext
            again()
            del self.student.gathered
            utils.reshard(self.student.transformer)
            record = {"before": probed["before"], "after": probed["after"], "rolls": now["rolls"]}
            torch.save(record, folder / f"probe.rank{rank}.pt")
        noise.clear()
        now.update(rolls=[], asked=[])
        loss, metrics = step_of(self, batch, step, role)
        now.update(loss=float(loss.detach()), noise=dict(noise))
        return loss, metrics

    clip = utils.clip_grad_norm

    def clip_grad_norm(parameters, max_norm: float) -> Tensor:
        record = dict(now)
        if now["step"] in gradients:
            named = {name: p.grad for name, p in parameters.items() if p.grad is not None}
            record["gradients"] = gathered(named)
        torch.save(record, folder / f"phase.step-{now['step']}.{now['role']}.rank{rank}.pt")
        return clip(parameters, max_norm)

    SampleStreams.randn, utils.clip_grad_norm = randn, clip_grad_norm
    SelfForcingMethod.single_train_step, SelfForcingMethod.roll = single_train_step, rolling
