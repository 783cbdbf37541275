"""The ranks of a job: replicate x shard x sequence, the last one fastest, so the ranks of one sequence are neighbours.

The ranks of a sequence read the same samples; a role's parameters are sharded over shard x sequence ranks and replicated over
the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

if TYPE_CHECKING:
    from fvtitan.config import JobConfig


def data_ranks(cfg: JobConfig) -> tuple[int, int]:
    """(number of this rank's sequence, how many there are): what divides samples among ranks asks for this."""
    degree = cfg.parallelism.context_parallel_degree
    return dist.get_rank() // degree, dist.get_world_size() // degree


def leads_sequence(cfg: JobConfig) -> bool:
    """Whether this rank is the first of its sequence: the one that writes what all of them have."""
    return dist.get_rank() % cfg.parallelism.context_parallel_degree == 0


class Mesh:
    """The process groups of a job, made once."""

    def __init__(self, cfg: JobConfig, device_type: str) -> None:
        self._cfg, self._device_type = cfg, device_type
        self._parameters: dict[tuple[int, int], DeviceMesh] = {}
        self.sequence: DeviceMesh | None = None
        """The ranks that share this rank's sequences; None: it has them alone."""
        if cfg.parallelism.context_parallel_degree > 1:
            shape = (data_ranks(cfg)[1], cfg.parallelism.context_parallel_degree)
            self.sequence = self._make(shape, ("data", "sequence"))["sequence"]

    def parameters(self, role: str) -> DeviceMesh:
        """1-D `("shard",)` for FSDP2, 2-D `("replicate", "shard")` for HSDP; also on one rank. Roles of the same degrees
        share it."""
        replicate, shard = self._cfg.data_parallel_degrees(dist.get_world_size(), role)
        degrees = (replicate, shard * self._cfg.parallelism.context_parallel_degree)
        if degrees not in self._parameters:
            names = ("replicate", "shard")
            kept = slice(None) if replicate > 1 else slice(1, None)
            self._parameters[degrees] = self._make(degrees[kept], names[kept])
        return self._parameters[degrees]

    def _make(self, shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
        """A mesh whose groups wait as long as [comm] says."""
        mesh = init_device_mesh(self._device_type, shape, mesh_dim_names=names)
        for group in mesh.get_all_groups():
            if dist.get_backend(group) != "fake":  # a plan's, which never waits
                _set_pg_timeout(self._cfg.comm.timeout, group)
        return mesh
