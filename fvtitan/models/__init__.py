"""The registry of model families, and the building of a run's roles."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.distributed.device_mesh import DeviceMesh

from fvtitan.models.base import ModelBase
from fvtitan.models.wan.model import WanCausalModel, WanModel

if TYPE_CHECKING:
    from fvtitan.config import JobConfig

MODELS: dict[str, type[WanModel]] = {"wan": WanModel, "wan_causal": WanCausalModel}


def build_roles(cfg: JobConfig, mesh: DeviceMesh, device: torch.device) -> dict[str, ModelBase]:
    """`{role: model}` for every `[models.<role>]`, sharded and with weights."""
    return {role: MODELS[cfg.models[role].name].build(cfg, role, mesh, device) for role in cfg.models}
