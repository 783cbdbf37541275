"""AdamW by role: weight decay on matrices only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from fvtitan.errors import UserError


@dataclass
class OptimizerConfig:
    """[optimizer]: defaults for every role; `[models.<role>.optimizer]` overrides single keys."""

    name: Literal["AdamW"] = "AdamW"
    """Optimizer (decoupled weight decay, arXiv:1711.05101)."""
    lr: float = 1e-5
    """Learning rate after warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Weight decay of matrices; norms, biases and modulation have none."""
    implementation: Literal["fused", "foreach", "for-loop"] = "fused"
    """Kernel: fused (one kernel, no host synchronisation), foreach, or a plain loop over the parameters."""

    def check(self, section: str) -> None:
        if self.lr < 0:
            raise UserError(f"{section}.lr = {self.lr}: must be >= 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"{section}.betas = {list(self.betas)}: both must be in [0, 1)")
        if self.eps <= 0 or self.weight_decay < 0:
            raise UserError(f"{section}: eps = {self.eps} must be > 0 and weight_decay = {self.weight_decay} >= 0")


OPTIMIZERS = {"AdamW": torch.optim.AdamW}


def has_weight_decay(name: str, parameter: nn.Parameter) -> bool:
    """Matrices decay; norms, biases and modulation tables do not."""
    return parameter.ndim >= 2 and not name.endswith("modulation")


def hyper_parameters(group: dict[str, Any], cfg: OptimizerConfig) -> dict[str, Any]:
    """What the configuration says about a parameter group; `lr` before any schedule."""
    decay = cfg.weight_decay if group["decays"] else 0.0
    return {"lr": cfg.lr, "betas": cfg.betas, "eps": cfg.eps, "weight_decay": decay}


def build_optimizer(parameters: Mapping[str, nn.Parameter], cfg: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trained parameters of one role, by name, in two groups: with and without weight decay."""
    groups = [
        {"params": [p for n, p in parameters.items() if has_weight_decay(n, p)], "decays": True},
        {"params": [p for n, p in parameters.items() if not has_weight_decay(n, p)], "decays": False},
    ]
    return OPTIMIZERS[cfg.name](
        [group | hyper_parameters(group, cfg) for group in groups if group["params"]],
        fused=cfg.implementation == "fused",
        foreach=cfg.implementation == "foreach",
    )
