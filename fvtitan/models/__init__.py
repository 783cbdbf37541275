"""The registry of model families, and the building of a run's roles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fvtitan.distributed.mesh import Mesh
from fvtitan.distributed.utils import log
from fvtitan.models.base import ModelBase
from fvtitan.models.wan.model import WanCausalModel, WanModel

if TYPE_CHECKING:
    from fvtitan.config import JobConfig

MODELS: dict[str, type[WanModel]] = {"wan": WanModel, "wan_causal": WanCausalModel}


def build_roles(
    cfg: JobConfig, mesh: Mesh, device: torch.device, needed: Sequence[str] | None = None
) -> dict[str, ModelBase]:
    """`{role: model}` for every `[models.<role>]`, or those `needed`, sharded and with weights; a line for each."""
    roles: dict[str, ModelBase] = {}
    for role in cfg.models if needed is None else needed:
        model = roles[role] = MODELS[cfg.models[role].name].build(cfg, role, mesh, device)
        count = sum(p.numel() for p in model.transformer.parameters())
        source = cfg.models[role].init_from or "random initialisation"
        log(f"{role}: {cfg.models[role].name}, {count / 1e6:.2f} M parameters from {source}")
    return roles
