"""Counter-based randomness: every draw names its stream, so no draw depends on ranks, workers, accumulation or restarts.

A stream is a tuple such as `(seed, step, phase, position in the global batch, "noise")`. `fold` hashes it to the 32 bits
that the CPU generator uses of a seed, and the generator is re-seeded before each draw.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def fold(*parts: int | str) -> int:
    """Hash a stream's name to 32 bits. Never a shifted sum: neighbouring seeds and steps give unrelated streams."""
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, int | str):
            raise TypeError(f"fold takes ints and strings, got {part!r}")
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")


def generator(device: torch.device | str, *parts: int | str) -> torch.Generator:
    """A new generator at the start of the stream `parts`."""
    return torch.Generator(device).manual_seed(fold(*parts))


def seed_global_generators(seed: int, rank: int) -> None:
    """Seed the generators of torch, NumPy and Python. Methods draw from named streams only; a user's code may use these."""
    torch.manual_seed(fold(seed, "torch", rank))
    np.random.seed(fold(seed, "numpy", rank))
    random.seed(fold(seed, "python", rank))


class SampleStreams:
    """Draws that belong to samples: one stream per (prefix, position in the global batch, name).

    `positions` are the samples' places in the global batch, so 1 rank x accumulation 2 and 2 ranks x 1 draw the same.
    """

    def __init__(self, rng: torch.Generator, prefix: Sequence[int | str], positions: Sequence[int]):
        self.rng = rng
        self.prefix = tuple(prefix)
        self.positions = [int(position) for position in positions]

    def _stack(self, name: str, draw) -> Tensor:
        rows = []
        for position in self.positions:
            self.rng.manual_seed(fold(*self.prefix, position, name))
            rows.append(draw())
        return torch.stack(rows)

    def randn(self, name: str, *shape: int) -> Tensor:
        """Standard normal `[B, *shape]`, float32, on the generator's device."""
        return self._stack(name, lambda: torch.randn(shape, generator=self.rng, device=self.rng.device))

    def rand(self, name: str, *shape: int) -> Tensor:
        """Uniform on [0, 1), `[B, *shape]`, float32."""
        return self._stack(name, lambda: torch.rand(shape, generator=self.rng, device=self.rng.device))
