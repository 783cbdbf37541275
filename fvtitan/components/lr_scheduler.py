"""Learning rate by role, counted in that role's own updates: linear warm-up, then constant, or a decay at the end."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fvtitan.errors import UserError


@dataclass
class LRSchedulerConfig:
    """[lr_scheduler]: defaults for every role; `[models.<role>.lr_scheduler]` overrides single keys."""

    warmup_steps: int = 0
    """Updates over which the learning rate rises linearly from 0; update k uses (k + 1) / (warmup_steps + 1)."""
    decay_type: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the decay after warm-up."""
    decay_ratio: float = 1.0
    """Share of the updates after warm-up that decay; before them the rate is constant (warm-up, stable, decay)."""
    min_lr_factor: float = 0.0
    """The decay ends at this fraction of the learning rate."""

    def check(self, section: str) -> None:
        if self.warmup_steps < 0:
            raise UserError(f"{section}.warmup_steps = {self.warmup_steps}: must be >= 0")
        if not 0 < self.decay_ratio <= 1:
            raise UserError(f"{section}.decay_ratio = {self.decay_ratio}: must be in (0, 1]")
        if not 0 <= self.min_lr_factor <= 1:
            raise UserError(f"{section}.min_lr_factor = {self.min_lr_factor}: must be in [0, 1]")


def lr_factor(update: int, cfg: LRSchedulerConfig, total_updates: int) -> float:
    """Factor on the learning rate for update number `update` (0-based) of `total_updates`."""
    if update < cfg.warmup_steps:
        return (update + 1) / (cfg.warmup_steps + 1)
    if cfg.decay_type == "constant":
        return 1.0
    decay_updates = max(1, round((total_updates - cfg.warmup_steps) * cfg.decay_ratio))
    progress = min(max((update - (total_updates - decay_updates)) / decay_updates, 0.0), 1.0)
    remaining = 1 - progress if cfg.decay_type == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return cfg.min_lr_factor + (1 - cfg.min_lr_factor) * remaining


def build_lr_scheduler(optimizer: Optimizer, cfg: LRSchedulerConfig, total_updates: int) -> LambdaLR:
    """The schedule of one role's optimizer; step it once per update of that role."""
    return LambdaLR(optimizer, functools.partial(lr_factor, cfg=cfg, total_updates=total_updates))
