"""Which memory kernels touch: checked address by address where they are interpreted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch


@contextmanager
def only_arguments() -> Iterator[None]:
    """For as long as this lasts, a kernel fails that reads or writes outside of the tensors it is launched with."""
    from triton.runtime import interpreter

    memory = _Memory(interpreter._interpreter)
    launch = interpreter.GridExecutor.__call__

    def launching(self: Any, *arguments: Any, **options: Any) -> None:
        memory.allow([each for each in (*arguments, *options.values()) if isinstance(each, torch.Tensor)])
        launch(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_interpreter", memory)
        patch.setattr(interpreter.GridExecutor, "__call__", launching)
        yield


class _Memory:
    """Triton's own access to memory, behind a check of every address."""

    def __init__(self, memory: Any) -> None:
        self._memory = memory
        self._starts = self._ends = np.zeros(0, np.uint64)

    def allow(self, tensors: list[torch.Tensor]) -> None:
        parts = [tensor for tensor in tensors if tensor.numel()]
        extents = [
            1 + sum((n - 1) * stride for n, stride in zip(part.shape, part.stride(), strict=True)) for part in parts
        ]
        starts = np.array([part.data_ptr() for part in parts], np.uint64)
        sizes = [extent * part.element_size() for extent, part in zip(extents, parts, strict=True)]
        self._starts, self._ends = starts, starts + np.array(sizes, np.uint64)

    def load(self, addresses: Any, mask: Any, other: Any, dtype: Any) -> Any:
        self._check(addresses, mask, np.dtype(dtype).itemsize)
        return self._memory.load(addresses, mask, other, dtype)

    def store(self, addresses: Any, values: Any, mask: Any) -> Any:
        self._check(addresses, mask, values.dtype.itemsize)
        return self._memory.store(addresses, values, mask)

    def _check(self, addresses: Any, mask: Any, size: int) -> None:
        touched = np.broadcast_to(addresses, mask.shape)[mask.astype(bool)].astype(np.uint64)[:, None]
        inside = (self._starts <= touched) & (touched + np.uint64(size) <= self._ends)
        assert inside.any(axis=1).all(), "a kernel touches memory outside of its arguments"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)
