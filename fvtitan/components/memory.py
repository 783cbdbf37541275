"""Counting the bytes of tensors, on any device and of fake ones too."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fvtitan.distributed.utils import local_tensor


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made inside that are still alive (`now`), and the most there were (`peak`).

    `existing` tensors, and views of them, are not counted. A storage counts with the size it has: FSDP2 frees gathered
    parameters by resizing theirs.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._held = [local_tensor(tensor).untyped_storage() for tensor in existing]
        self._sizes: dict[int, int] = {storage._cdata: 0 for storage in self._held}

    def __enter__(self) -> LiveBytes:
        self._resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            result = self._resize(storage, size)
            if storage._cdata in self._sizes:
                self._change(storage._cdata, size)
            return result

        torch.UntypedStorage.resize_ = resize_
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = local_tensor(tensor).untyped_storage()
                if storage._cdata not in self._sizes:
                    self._sizes[storage._cdata] = 0
                    weakref.finalize(storage, self._forget, storage._cdata)
                    self._change(storage._cdata, storage.nbytes())
        return result

    def _change(self, key: int, size: int) -> None:
        self.now += size - self._sizes[key]
        self.peak = max(self.peak, self.now)
        self._sizes[key] = size

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
