"""What LMCache's memory objects hold, as one tensor. Imports no LMCache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_MOST_AXES = 5
"""More than any chunk of keys and values has, so no calibration covers a chunk of so many."""


def tensor_of(item: Any, *, is_calibrated: bool = True) -> Tensor:
    """The numbers of a memory object, where they lie.

    Parameters:
        item: The memory object: of one tensor, or of several, one for each kernel group of the engine.
        is_calibrated: Whether a calibration can cover it.

    Returns:
        The tensor; with five axes where no calibration covers it. Several tensors are one of rows of numbers, in their dtype if
        they have the same and else in uint8.
    """
    shapes, dtypes = item.meta.shapes, item.meta.dtypes
    if shapes is None or len(shapes) == 1:
        data: Tensor = item.tensor
        return data if is_calibrated else data[(None,) * (_MOST_AXES - data.dim())]
    numbers: Tensor = item.raw_tensor.view(torch.uint8)[: item.get_size()]
    is_one_dtype = len(set(dtypes)) == 1
    if is_one_dtype:
        numbers = numbers.view(dtypes[0])
    rows = {
        (shape[-2], shape[-1] * (1 if is_one_dtype else dtype.itemsize))
        for shape, dtype in zip(shapes, dtypes, strict=True)
    }
    return numbers.view(1, 1, -1, *(rows.pop() if len(rows) == 1 else (1, numbers.numel())))
