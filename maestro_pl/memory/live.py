"""Bytes of the tensors that are alive, exactly, on any device: what a peak is measured with where no allocator counts."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the storages that operations make, while it is entered, and those that it is told of.

    What a kernel allocates inside one operation is not seen. Every operation costs some microseconds more.

    Args:
        known: tensors that exist already and count from the beginning (parameters, buffers, optimizer states).

    Attributes:
        bytes: of the storages alive now.
        peak: the most that were alive at once.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}
        self._watches: dict[int, Any] = {}
        for tensor in known:
            self._see(tensor)

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        self.peak = self.bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See :class:`TorchDispatchMode`."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = storage.nbytes()
        if key in self._sizes:
            if size != self._sizes[key]:  # resized in place
                self._add(size - self._sizes[key])
                self._sizes[key] = size
            return
        self._sizes[key] = size
        self._watches[key] = weakref.finalize(storage, self._gone, key)
        self._watches[key].atexit = False
        self._add(size)

    def _gone(self, key: int) -> None:
        self._add(-self._sizes.pop(key, 0))
        self._watches.pop(key, None)

    def _add(self, size: int) -> None:
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
