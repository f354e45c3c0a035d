"""A device that is not there: tensors on it claim to be elsewhere, and meet no tensor of the CPU unless one is copied over.

It stands in for an accelerator where there is none. The arithmetic is the CPU's, so results are the same to the last bit; what is
forgotten on the CPU, or goes to numpy without a copy, raises as it would on a real one.
"""

from __future__ import annotations

import weakref
from collections import Counter
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
"""The one kind of device that every torch has and that holds no data of its own."""


class Elsewhere(Tensor):
    """A tensor of the pretended device around the one of the CPU that holds its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=DEVICE
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on the pretended device outside of it")


class PretendedDevice(TorchDispatchMode):
    """Within it `DEVICE` can be used.

    largest: numbers of the largest tensor that was on it. most_bytes: of all that were there at one time, less what an operation
    takes for itself. operations: names of what ran there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.most_bytes = 0
        self._held_bytes = 0
        self._holders: Counter[int] = Counter()
        self.operations: set[str] = set()
        # kvtc sets a caller's modes aside; this one stands for what no caller can.
        self._stay = mock.patch.object(torch._C, "_DisableTorchDispatch", nullcontext)

    def __enter__(self) -> PretendedDevice:
        self._stay.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stay.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        is_here = any(isinstance(tensor, Elsewhere) for tensor in tensors)
        name = func.overloadpacket.__name__
        target = kwargs.get("device")
        if target is not None:
            kwargs["device"] = torch.device("cpu")
            stays = torch.device(target) == DEVICE
        elif name == "copy_":
            stays = isinstance(args[0], Elsewhere)
        else:
            stays = is_here
            if is_here and not all(isinstance(t, Elsewhere) or t.dim() == 0 for t in tensors):
                raise RuntimeError(f"{func} got tensors of two devices: {[tuple(t.shape) for t in tensors]}")
        if stays:
            self.operations.add(name)
        found = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        if is_here and name.endswith("_") and not name.startswith("_"):
            return args[0]
        return tree_map(self._put, found) if stays else found

    def _put(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        self.largest = max(self.largest, value.numel())
        found, storage = Elsewhere(value), value.untyped_storage()
        address, n_bytes = storage.data_ptr(), storage.nbytes()
        # Views share what they view.
        if not self._holders[address]:
            self._held_bytes += n_bytes
            self.most_bytes = max(self.most_bytes, self._held_bytes)
        self._holders[address] += 1
        weakref.finalize(found, self._release, address, n_bytes)
        return found

    def _release(self, address: int, n_bytes: int) -> None:
        self._holders[address] -= 1
        if not self._holders[address]:
            self._held_bytes -= n_bytes


def _held(value: Any) -> Any:
    return value.inner if isinstance(value, Elsewhere) else value
