"""Counting what autograd holds for backward."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that graphs made inside hold for their backward, and their peak: the activations."""

    def __init__(self) -> None:
        super().__init__(self._pack, self._unpack)
        self.now = self.peak = 0

    def _pack(self, tensor: Tensor) -> _Held:
        held = _Held(tensor)
        size = 0 if isinstance(tensor, torch.nn.Parameter) else tensor.nbytes
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(held, self._free, size)
        return held

    def _free(self, size: int) -> None:
        self.now -= size

    @staticmethod
    def _unpack(held: _Held) -> Tensor:
        return held.tensor


class _Held:
    def __init__(self, tensor: Tensor):
        self.tensor = tensor
