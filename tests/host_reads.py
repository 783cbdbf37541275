"""Seeing where Python waits for a tensor's value. On a GPU each such place is a host synchronisation."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
READING = {
    aten._local_scalar_dense,  # item(), float(), bool(), int()
    aten.equal,
    aten.masked_select,
    aten.nonzero,
    aten._unique2,
}


class HostReads(TorchDispatchMode):
    """Inside, `found` collects (`label`, what was read, where) of tensors other than those given to `on_host`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.found: list[tuple[object, str, str]] = []
        self.label: object = None
        self._paused = 0
        self._host: list[Tensor] = []
        for name in ("tolist", "numpy"):  # are no operators
            monkeypatch.setattr(Tensor, name, self._noting(name, getattr(Tensor, name)))

    def on_host(self, tensors: Iterable[Tensor]) -> None:
        """These are the host's own."""
        self._host = list(tensors)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def _noting(self, name, method):
        def noting(tensor, *args, **kwargs):
            if not any(tensor is host for host in self._host):
                self._note(name)
            return method(tensor, *args, **kwargs)

        return noting

    def _note(self, what: str) -> None:
        if not self._paused:
            frames = [
                f for f in traceback.extract_stack() if "/site-packages/" not in f.filename and f.filename != __file__
            ]
            self.found.append((self.label, what, f"{frames[-1].filename}:{frames[-1].lineno}"))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket in READING or _reads(func, args, kwargs):
            self._note(str(func))
        return func(*args, **kwargs)


def _reads(func, args, kwargs) -> bool:
    if func is aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return False
