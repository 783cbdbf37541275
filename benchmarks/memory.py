"""Counting the bytes of tensors, on any device."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fvtitan.distributed.utils import local_tensor


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made inside that are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(local_tensor(tensor).untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


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
