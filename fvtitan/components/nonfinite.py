"""A loss or a gradient norm that is NaN or infinite on any rank: the role is updated nowhere, and the run says why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch.distributed as dist

from fvtitan.components.stateful import TrainState
from fvtitan.distributed.utils import log


class NonFinite:
    """What happens instead of an update that is not finite: policy "halt" raises, "skip" counts it in `state` (which is saved,
    so a resumed run goes on counting) and raises beyond `max_skips`.

    The limit is on all that a run skips, not on those in a row: it bounds how many updates the result lacks, a broken network
    reaches it just as fast, and one bad sample in every epoch reaches it at all.
    """

    def __init__(self, policy: Literal["halt", "skip"], max_skips: int, state: TrainState) -> None:
        self.max_skips = max_skips if policy == "skip" else None
        self.state = state

    def skip(self, step: int, role: str, *, norm: float, loss: float, samples: Sequence[str], cause: str) -> None:
        """Say what was not finite, in all ranks' words. Collective. Raises `FloatingPointError` when the run must not go on.

        norm: the global one. loss, samples, cause: this rank's; cause is the method's (`not_finite`), empty when unknown.
        """
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (loss, list(samples), cause))
        causes = list(dict.fromkeys(why for _, _, why in everyone if why))
        ranks = [str(rank) for rank, (value, _, _) in enumerate(everyone) if not math.isfinite(value)]
        if not causes and ranks:
            causes = [f"the loss of the {role} on rank {', '.join(ranks)}"]
        what = "; ".join([*causes, f"the gradient norm of the {role} is {norm}"])
        lines = [f"step {step}: not finite: {what}; the {role} was not updated"]
        lines += [
            f"  rank {rank}: loss {value:.6g}, samples: {', '.join(ids)}"
            for rank, (value, ids, _) in enumerate(everyone)
        ]
        if self.max_skips is None:
            raise FloatingPointError("\n".join(lines))
        self.state.nonfinite_skips += 1
        if self.state.nonfinite_skips > self.max_skips:
            lines[0] += f"; training.max_nonfinite_skips = {self.max_skips} were skipped before"
            raise FloatingPointError("\n".join(lines))
        lines[0] += f"; skipped, {self.state.nonfinite_skips} of at most {self.max_skips}"
        log("WARNING, " + "\n".join(lines))
