"""The device mesh: replicate x shard."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

if TYPE_CHECKING:
    from fvtitan.config import JobConfig


def build_mesh(cfg: JobConfig, device_type: str) -> DeviceMesh:
    """1-D `("dp_shard",)` for FSDP2, 2-D `("dp_replicate", "dp_shard")` for HSDP; also on one rank."""
    replicate, shard = cfg.data_parallel_degrees(dist.get_world_size())
    if replicate > 1:
        return init_device_mesh(device_type, (replicate, shard), mesh_dim_names=("dp_replicate", "dp_shard"))
    return init_device_mesh(device_type, (shard,), mesh_dim_names=("dp_shard",))
