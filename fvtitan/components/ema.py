"""Exponential moving average of what a role trains: float32, sharded like the model, one line of arithmetic."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fvtitan.components.stateful import check_saved
from fvtitan.distributed.utils import local_tensor
from fvtitan.errors import UserError

if TYPE_CHECKING:
    from fvtitan.models.base import ModelBase


@dataclass
class EMAConfig:
    """[ema]: moving average of the student, counted in student updates."""

    enable: bool = False
    """Keep a moving average of the student."""
    decay: float = 0.99
    """ema = decay * ema + (1 - decay) * student, after every student update."""
    start_step: int = 0
    """Up to and including this training step the average is a copy of the student."""

    def check(self) -> None:
        if not 0 <= self.decay < 1:
            raise UserError(f"ema.decay = {self.decay}: must be in [0, 1)")
        if self.start_step < 0:
            raise UserError(f"ema.start_step = {self.start_step}: must be >= 0")


class EMA:
    """Moving average of a role's trained parameters. Stateful: tensors under their parameter's name, and the update count."""

    def __init__(self, model: ModelBase, cfg: EMAConfig):
        self.model = model
        self.cfg = cfg
        self.num_updates = 0
        self.shadow: dict[str, Tensor] = {n: p.detach().clone() for n, p in model.trained_parameters().items()}

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """Local shards of (average, parameter); lists of plain tensors are 30x cheaper to dispatch than DTensors."""
        parameters = self.model.trained_parameters()
        shadow = [local_tensor(average) for average in self.shadow.values()]
        return shadow, [local_tensor(parameters[name].detach()) for name in self.shadow]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Call after each update of the student, with the training step it belongs to."""
        shadow, parameters = self._pairs()
        if step <= self.cfg.start_step:
            torch._foreach_copy_(shadow, parameters)
            return
        torch._foreach_lerp_(shadow, parameters, 1 - self.cfg.decay)
        self.num_updates += 1

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew with what the role holds now."""
        torch._foreach_copy_(*self._pairs())
        self.num_updates = 0

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the role holds the average; afterwards its own parameters again, bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        shadow, parameters = self._pairs()
        held = [p.clone() for p in parameters]
        torch._foreach_copy_(parameters, shadow)
        torch._foreach_copy_(shadow, held)

    def state_dict(self) -> dict[str, Any]:
        return {"num_updates": self.num_updates, **self.shadow}

    def load_template(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """The averages, to read into; raises `UserError` when the rest is not a count."""
        check_saved({"num_updates": self.num_updates}, saved, "ema")
        return dict(self.shadow)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_updates = state["num_updates"]
        for name, average in self.shadow.items():
            source = state[name]
            local_tensor(average).copy_(source.to_local() if isinstance(source, DTensor) else source)
