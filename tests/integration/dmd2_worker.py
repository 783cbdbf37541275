"""A rank of several that trains by DMD2, writing down its rungs, noise, losses and gradients."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fvtitan.components.rng import SampleStreams
from fvtitan.distributed import utils
from fvtitan.methods.dmd2 import DMD2Method
from tests.integration.exact_worker import gathered


def watch(folder: Path, *, gradients: tuple[int, ...] = (), nan: tuple[int, int, str] = (-1, 0, "")) -> None:
    """Make this process record, and misbehave as asked. gradients: steps whose whole gradients are recorded, by phase.
    nan: (rank, step, role): the role's answers are NaN there."""
    rank = int(os.environ["RANK"])
    now: dict[str, Any] = {}
    noise: dict[str, Tensor] = {}

    def keep(name: str, record: dict[str, Any]) -> None:
        torch.save(record, folder / f"{name}.rank{rank}.pt")

    draw, step_of, rung_of = SampleStreams.randn, DMD2Method.single_train_step, DMD2Method.exit_rung

    def randn(self: SampleStreams, name: str, *shape: int) -> Tensor:
        noise[name] = draw(self, name, *shape)
        return noise[name]

    def single_train_step(self: DMD2Method, batch: dict[str, Any], step: int, role: str):
        noise.clear()
        now.update(step=step, role=role)
        if (rank, step) == tuple(nan[:2]):
            broken = self.role_models[nan[2]]
            predict = broken.predict_velocity
            broken.predict_velocity = lambda *args: predict(*args) * float("nan")
        asked: list[float] = []
        student = self.student.predict_velocity
        self.student.predict_velocity = lambda x, s, cond: asked.append(float(s.max())) or student(x, s, cond)
        try:
            loss, metrics = step_of(self, batch, step, role)
        finally:
            self.student.predict_velocity = student
        positions = batch["positions"].tolist()
        record = {"step": step, "role": role, "rank": rank, "positions": positions, "loss": float(loss.detach())}
        record |= {"asked": asked, "rung": rung_of(self, step, role), "noise": dict(noise)}
        keep(f"batch.step-{step}.{role}.position-{positions[0]}", record)
        return loss, metrics

    clip = utils.clip_grad_norm

    def clip_grad_norm(parameters, max_norm: float) -> Tensor:
        named = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        if now["step"] in gradients:
            keep(f"gradients.step-{now['step']}.{now['role']}", {**now, "gradients": gathered(named)})
        return clip(parameters, max_norm)

    SampleStreams.randn, DMD2Method.single_train_step = randn, single_train_step
    utils.clip_grad_norm = clip_grad_norm
