"""Bytes of tensors that are alive, counted rather than timed or read off the process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Context that counts the memory of results made inside it, also those that only autograd or autocast holds."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        """Most bytes alive after any operation."""

    def __enter__(self) -> Self:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    @property
    def now(self) -> int:
        """Bytes alive."""
        self._made = {address: made for address, made in self._made.items() if not made[0].expired()}
        return sum(size for _, size in self._made.values())

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: Mapping[str, Any] | None = None
    ) -> Any:
        """Run it, and remember the storages of what it returns, except those that it was given."""
        result = function(*arguments, **(named or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((arguments, named)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in given:
                storage = x.untyped_storage()
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result
