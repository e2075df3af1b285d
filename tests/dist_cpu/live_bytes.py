"""Bytes of the tensors that are alive, exactly and on any machine: every storage that an operator
returns is counted until it is gone (not what the operator uses inside)."""

import gc
import weakref
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """`peak`: most bytes alive at one time inside the context, beside those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        # Kept alive: a new storage must not get the address of one of these.
        self._before = {s._cdata: s for s in existing_storages()}
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return found

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._alive and key not in self._before:
            size = storage.nbytes()
            self._alive[key] = weakref.ref(storage, partial(self._gone, key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int, _: Any) -> None:
        del self._alive[key]
        self.now -= size


def existing_storages() -> list[torch.UntypedStorage]:
    """One of each, of all tensors that Python knows."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    return list({s._cdata: s for s in (t.untyped_storage() for t in tensors)}.values())
