"""The registry of model families, and the building of a run's roles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fvtitan.components.lora import base_parameters
from fvtitan.distributed.mesh import Mesh
from fvtitan.distributed.utils import log
from fvtitan.models.base import CausalModelBase, ModelBase
from fvtitan.models.wan.model import WanCausalModel, WanModel

if TYPE_CHECKING:
    from fvtitan.config import JobConfig

MODELS: dict[str, type[ModelBase]] = {"wan": WanModel, "wan_causal": WanCausalModel}


def is_causal(name: str) -> bool:
    """Whether the family sees time in blocks."""
    return issubclass(MODELS[name], CausalModelBase)


def families(*, causal: bool) -> str:
    """Those that do, or do not, for an error: `'wan'`."""
    return " or ".join(repr(name) for name in MODELS if is_causal(name) == causal)


def build_roles(
    cfg: JobConfig,
    mesh: Mesh,
    device: torch.device,
    needed: Sequence[str] | None = None,
    sizes: Mapping[str, Any] | None = None,
) -> dict[str, ModelBase]:
    """`{role: model}` for every `[models.<role>]`, or those `needed`, sharded and with weights; a line for each. A role whose
    network others share is built before them, whatever the order. With `sizes` by role they stay on meta, for a plan."""
    wanted = list(cfg.models if needed is None else needed)
    bases = {role: cfg.models[role].share_base_with for role in wanted}
    built: dict[str, ModelBase] = {}
    for role in dict.fromkeys([*filter(None, bases.values()), *wanted]):
        base = built.get(bases.get(role, ""))
        family, size = MODELS[cfg.models[role].name], sizes[role] if sizes else None
        model = built[role] = family.build(cfg, role, mesh, device, base, size)
        log(f"{role}: {_describe(cfg, role, model)}")
    return {role: built[role] for role in wanted}


def _describe(cfg: JobConfig, role: str, model: ModelBase) -> str:
    role_cfg = cfg.models[role]
    source, name = role_cfg.init_from or "random initialisation", role_cfg.name
    count = sum(p.numel() for p in base_parameters(model.transformer).values()) / 1e6
    network = f"{name}, {count:.2f} M parameters from {source}"
    if model.adapter is None:
        return network
    count = sum(p.numel() for p in model.trained_parameters().values()) / 1e6
    base = f"{name} on the network of {role_cfg.share_base_with}" if role_cfg.share_base_with else network
    return f"{base}, with an adapter of {count:.2f} M parameters (rank {role_cfg.lora.rank})"
