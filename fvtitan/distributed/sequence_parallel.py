"""Ulysses sequence parallelism (arXiv:2309.14509): each rank has a share of every frame's tokens, but inside self-attention
all tokens for a share of the heads, with an all-to-all before and after.

The network takes and returns whole latents; only what lies between is divided. All ranks of a sequence compute the same loss
from the same latents, so a rank's gradients are those through its own tokens. `gather` scales them by the number of ranks,
and the mean over all ranks that FSDP2 takes makes them the whole ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd, wait_tensor
from torch.distributed.device_mesh import DeviceMesh

from fvtitan.errors import UserError


def divisors(value: int) -> str:
    """All that divide `value`, for messages."""
    return ", ".join(str(i) for i in range(1, value + 1) if value % i == 0)


def check_heads(role: str, num_heads: int, degree: int) -> None:
    """Every rank gets whole heads. Raises `UserError` when they cannot be dealt out evenly."""
    if num_heads % degree:
        raise UserError(
            f"parallelism.context_parallel_degree = {degree}: must divide the {num_heads} heads of models.{role}; allowed: "
            f"{divisors(num_heads)}"
        )


@dataclass(frozen=True)
class SequenceShard:
    """This rank's share of sequences whose frames have `tokens_per_frame` tokens: every frame is cut into `size` runs of
    `ceil(tokens_per_frame / size)`, the last ones zero-padded. So a frame's noise level reaches its tokens on every rank, and
    no attention ever sees padding: it ends where a rank has whole frames."""

    group: str
    """Name of the process group."""
    rank: int
    size: int
    tokens_per_frame: int = 0

    @classmethod
    def of(cls, mesh: DeviceMesh) -> SequenceShard:
        """For the ranks of a 1-D mesh."""
        return cls(mesh.get_group().group_name, mesh.get_local_rank(), mesh.size())

    @property
    def share(self) -> int:
        """Tokens of a frame on each rank, padding included."""
        return -(-self.tokens_per_frame // self.size)

    def rows(self, x: Tensor, dim: int = 0) -> Tensor:
        """This rank's tokens of `x`, which has those of whole frames along `dim`."""
        x = self._cut(x.unflatten(dim, (-1, self.tokens_per_frame)), dim + 1)
        return x.select(dim + 1, self.rank).flatten(dim, dim + 1)

    def split(self, x: Tensor) -> Tensor:
        """Whole sequences `[B, frames * tokens_per_frame, C]` -> this rank's tokens `[B, frames * share, C]`."""
        return _Split.apply(x, self)

    def gather(self, x: Tensor) -> Tensor:
        """This rank's tokens `[B, frames * share, C]` -> whole sequences `[B, frames * tokens_per_frame, C]`, on every rank."""
        return _Gather.apply(x, self)

    def to_heads(self, x: Tensor) -> Tensor:
        """This rank's tokens of all heads `[B, frames * share, heads, D]` -> all tokens of this rank's heads
        `[B, frames * tokens_per_frame, heads / size, D]`."""
        x = x.unflatten(2, (self.size, -1)).unflatten(1, (-1, self.share))  # [B, frames, share, size, heads / size, D]
        x = self._exchange(x.permute(3, 0, 1, 2, 4, 5))  # by rank that had the tokens
        return self._join(x.permute(1, 2, 0, 3, 4, 5), 2).flatten(1, 2)

    def to_tokens(self, x: Tensor) -> Tensor:
        """The way back: `[B, frames * tokens_per_frame, heads / size, D]` -> `[B, frames * share, heads, D]`."""
        x = self._cut(x.unflatten(1, (-1, self.tokens_per_frame)), 2)  # [B, frames, size, share, heads / size, D]
        x = self._exchange(x.permute(2, 0, 1, 3, 4, 5))  # by rank that had the heads
        return x.permute(1, 2, 3, 0, 4, 5).flatten(3, 4).flatten(1, 2)

    def _cut(self, x: Tensor, dim: int) -> Tensor:
        """Frames' tokens along `dim` -> `[..., size, share, ...]`, zero-padded."""
        padding = self.share * self.size - self.tokens_per_frame
        if padding:
            x = F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, padding))
        return x.unflatten(dim, (self.size, self.share))

    def _join(self, x: Tensor, dim: int) -> Tensor:
        """The inverse: `[..., size, share, ...]` at `dim` -> frames' tokens, without the padding."""
        return x.flatten(dim, dim + 1).narrow(dim, 0, self.tokens_per_frame)

    def _exchange(self, x: Tensor) -> Tensor:
        """`x[i]` goes to rank i; the result's `[i]` came from rank i."""
        return all_to_all_single_autograd(x.contiguous(), None, None, self.group)

    def _all_gather(self, x: Tensor) -> Tensor:
        """Every rank's tokens -> whole sequences."""
        x = x.unflatten(1, (-1, self.share)).contiguous()
        # The operator itself: its Python names differ between torch 2.11 and 2.13.
        every = wait_tensor(torch.ops._c10d_functional.all_gather_into_tensor(x, self.size, self.group))
        return self._join(every.unflatten(0, (self.size, -1)).movedim(0, 2), 2).flatten(1, 2)


class _Split(torch.autograd.Function):
    """Backward gives every rank the whole gradient: the ranks' parts, which `gather` has scaled, put together."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: SequenceShard) -> Tensor:
        ctx.shard = shard
        return shard.rows(x, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.shard._all_gather(grad) / ctx.shard.size, None


class _Gather(torch.autograd.Function):
    """Every rank has the whole gradient and keeps that of its own tokens, times the number of ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: SequenceShard) -> Tensor:
        ctx.shard = shard
        return shard._all_gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.shard.size * ctx.shard.rows(grad, 1), None
