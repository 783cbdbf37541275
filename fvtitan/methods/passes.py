"""What a phase of a method runs, known from the configuration alone: forwards of its roles, with or without gradient.

`fvtitan.flops` makes FLOPs of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Pass:
    """Forwards of one role that differ in nothing, for one video of a micro-batch."""

    role: str
    num_frames: int
    """Latent frames of the video."""
    forwards: tuple[float, ...] = (1.0,)
    """How many of the whole video; in a stream, how many of each block. The mean, where they are drawn and the draw is not
    known."""
    gradient: bool = False
    """Whether each has a backward."""
    attention: Literal["full", "block_causal", "clean_context", "streaming"] = "full"
    """Among all frames; by the blocks of the role, over a whole video, or that behind its clean copy (twice the tokens); or
    block by block over a KV cache."""
    batch: int = 1
    """Videos in a forward for one of the micro-batch: 2 for both branches of guidance at once."""
    texts: float | None = None
    """In how many forwards the text is embedded and projected to keys and values; None: in all."""

    @property
    def num_forwards(self) -> float:
        """Calls of the network."""
        return sum(self.forwards)


def expected(outcomes: Sequence[list[Pass]]) -> list[Pass]:
    """The mean of equally likely outcomes: passes that differ in their numbers alone become one."""
    mean: dict[Pass, Pass] = {}
    for outcome in outcomes:
        for p in outcome:
            forwards = tuple(n / len(outcomes) for n in p.forwards)
            texts = None if p.texts is None else p.texts / len(outcomes)
            kind = dataclasses.replace(p, forwards=(), texts=None)
            if before := mean.get(kind):
                forwards = tuple(a + b for a, b in zip(before.forwards, forwards, strict=True))
                texts = None if texts is None else before.texts + texts
            mean[kind] = dataclasses.replace(p, forwards=forwards, texts=texts)
    return list(mean.values())
