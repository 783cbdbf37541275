"""The KV cache of a streaming rollout: a plain object, handed down, allocated once and reused.

Only passes without gradient write: into the slots of their own block, which are nobody's until it is committed. Where these
follow the context in memory, attention reads both there and nothing is copied. A pass with gradient reads the cache and
concatenates its own keys and values; it never writes into a tensor of a graph. All positions are Python ints: no host
synchronisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fvtitan.models.blocks import CausalConfig, Runs, earlier_frames


@dataclass
class LayerCache:
    """One layer: roped keys and values `[B, slots * tokens, heads, head_dim]`, of this rank's heads where ranks share a
    sequence; those of the text `[B, text_len, heads, head_dim]`, of all heads."""

    key: Tensor
    value: Tensor
    text_key: Tensor
    text_value: Tensor


@dataclass(frozen=True)
class LayerPass:
    """What one streaming pass of one layer reads and writes: views of its buffers, `[tokens, B, heads, head_dim]` as they lie
    in memory. Where in the buffer is no number here, so blocks with contexts of the same sizes share a compiled graph."""

    keys: tuple[Tensor, ...]
    """Keys and values of the context, range by range."""
    values: tuple[Tensor, ...]
    in_place: bool
    """The one range of keys and values ends with room for the pass' own: written there first, all are read as they lie."""
    write_keys: tuple[Tensor, ...]
    """Where this pass leaves its own keys and values, unless in place; empty: nowhere."""
    write_values: tuple[Tensor, ...]
    text_key: Tensor
    """Of the text, `[B, text_len, heads, head_dim]`."""
    text_value: Tensor
    text: str
    """"compute": keys and values of the text from the embedding, as a pass with gradient must; "fill": and keep them;
    "reuse": take the kept ones."""
    sink_shift: int = 0
    """By how many frames the sink, the first range of the context, is seen later than it was."""
    sink_rope: tuple[Tensor, Tensor] | None = None
    """The rotation for that; the network makes it."""


def recall(ranges: Sequence[Tensor], fresh: Tensor) -> Tensor:
    """A copy of the ranges `[tokens, B, ...]` of a buffer and of `fresh [B, S, ...]`, one behind the other `[B, S', ...]`."""
    return torch.cat([*(tokens.transpose(0, 1) for tokens in ranges), fresh], dim=1)


def append(room: Tensor, fresh: Tensor) -> Tensor:
    """Write `fresh [B, S, ...]` to the end of a range `[tokens, B, ...]`; all of it `[B, tokens, ...]`, a view."""
    room[-fresh.shape[1] :].copy_(fresh.transpose(0, 1))
    return room.transpose(0, 1)


def store(ranges: Sequence[Tensor], fresh: Tensor) -> None:
    """Write `fresh [B, S, ...]` into the ranges `[tokens, B, ...]` of a buffer, in their order."""
    for tokens, part in zip(ranges, fresh.split([tokens.shape[0] for tokens in ranges], dim=1), strict=True):
        tokens.copy_(part.transpose(0, 1))


def _ranges(buffer: Tensor, runs: Runs) -> tuple[Tensor, ...]:
    return tuple(buffer.transpose(0, 1)[low:high] for low, high in runs)


class KVCache:
    """Keys and values of the clean frames of a rollout, for every layer.

    The buffer spans `num_frames`, and a window is a slice of it; with `recycle` (inference only, needs a window) it holds
    the sink and one window, and slots are used again, so a stream has no end. `first_frame` is the number of the stream's
    first frame: RoPE is relative, so it changes nothing but what long streams look like inside. Blocks that end after
    `trained_frames` (0: none) see the sink directly before their window, as if nothing lay between: no distance then is one
    that training never had. Of the heads, `num_shards` ranks that share a sequence hold a part each.
    """

    def __init__(
        self,
        causal: CausalConfig,
        *,
        num_layers: int,
        batch_size: int,
        num_frames: int,
        tokens_per_frame: int,
        text_len: int,
        num_heads: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
        recycle: bool = False,
        first_frame: int = 0,
        trained_frames: int = 0,
        num_shards: int = 1,
    ) -> None:
        self.causal = causal
        self.tokens_per_frame = tokens_per_frame
        self.batch_size = batch_size
        self.recycle = recycle and causal.window >= 0 and causal.sink + causal.window < num_frames
        self.num_slots = causal.sink + causal.window if self.recycle else num_frames
        self.first_frame = first_frame
        self.trained_frames = trained_frames

        def empty(*sizes: int) -> Tensor:
            return torch.empty(*sizes, head_dim, device=device, dtype=dtype)

        def layer() -> LayerCache:
            # Tokens first in memory: ranges of them do not interleave, which AOTAutograd would take for an overlap.
            tokens, heads = self.num_slots * tokens_per_frame, num_heads // num_shards
            key, value = (empty(tokens, batch_size, heads).transpose(0, 1) for _ in range(2))
            return LayerCache(key, value, *(empty(batch_size, text_len, num_heads) for _ in range(2)))

        self.layers = [layer() for _ in range(num_layers)]
        # Passes read through `.data`, which has a version counter of its own: a graph that saved a slot stays valid while
        # other slots are written.
        self._reading = [LayerCache(*(tensor.data for tensor in vars(layer).values())) for layer in self.layers]
        self.reset()

    def holds(self, num_frames: int) -> bool:
        """Whether a stream of so many frames fits."""
        return self.recycle or num_frames <= self.num_slots

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        self.end = self.first_frame
        """Frames up to here are committed; what lies in the slots of later ones means nothing."""
        self.text_embedding: Tensor | None = None  # of the prompt, once it was computed without gradient

    def _slots(self, start: int, end: int) -> Runs:
        """Slots of the frames `[start, end)`, in the frames' order."""
        start, end, sink = start - self.first_frame, end - self.first_frame, self.causal.sink
        if not self.recycle:
            return ((start, end),)
        runs: list[tuple[int, int]] = []
        for frame in range(start, end):
            slot = frame if frame < sink else sink + (frame - sink) % (self.num_slots - sink)
            if runs and runs[-1][1] == slot:
                runs[-1] = (runs[-1][0], slot + 1)
            else:
                runs.append((slot, slot + 1))
        return tuple(runs)

    def _tokens(self, frames: Runs) -> Runs:
        n = self.tokens_per_frame
        return tuple((low * n, high * n) for start, end in frames for low, high in self._slots(start, end))

    def passes(self, start: int, end: int, *, write: bool) -> list[LayerPass]:
        """One `LayerPass` a layer for a forward of the block `[start, end)`. With `write`, the block's frames are
        committed by it. Raises `ValueError` for a block that leaves a gap or does not fit."""
        if not self.first_frame <= start <= self.end:
            raise ValueError(
                f"a block starts at frame {start}, but the cache is filled from {self.first_frame} to {self.end}"
            )
        if not self.recycle and end - self.first_frame > self.num_slots:
            raise ValueError(
                f"a block ends at frame {end}, but the cache has room up to {self.first_frame + self.num_slots}"
            )
        earlier = earlier_frames(start - self.first_frame, end - self.first_frame, self.causal.window, self.causal.sink)
        shift = self._sink_shift(earlier, start - self.first_frame, end - self.first_frame)
        shifted = tuple((low + self.first_frame, high + self.first_frame) for low, high in earlier)
        context, slots = self._tokens(shifted), self._tokens(((start, end),))
        # A block that was committed before is another's context: only its own commit may write there.
        may_write = not torch.is_grad_enabled() and (write or start == self.end)
        in_place = may_write and not shift and len(slots) == 1 and len(context) <= 1
        if in_place and context:
            in_place = context[0][1] == slots[0][0]
        if torch.is_grad_enabled():
            text = "compute"
        else:
            text = "fill" if self.text_embedding is None else "reuse"
        if write:
            assert not torch.is_grad_enabled(), "only a pass without gradient may write into the cache"
            self.end = end
        if in_place:
            read_from, context, slots = self.layers, (((context or slots)[0][0], slots[0][1]),), ()
        else:
            read_from, slots = self._reading, slots if write else ()
        return [
            LayerPass(
                keys=_ranges(read.key, context),
                values=_ranges(read.value, context),
                in_place=in_place,
                write_keys=_ranges(layer.key, slots),
                write_values=_ranges(layer.value, slots),
                text_key=layer.text_key,
                text_value=layer.text_value,
                text=text,
                sink_shift=shift,
            )
            for layer, read in zip(self.layers, read_from, strict=True)
        ]

    def _sink_shift(self, earlier: Runs, start: int, end: int) -> int:
        sink = self.causal.sink
        if not self.trained_frames or end <= self.trained_frames or not sink or earlier[0] != (0, sink):
            return 0
        window = earlier[1][0] if len(earlier) > 1 else start
        return window - sink
