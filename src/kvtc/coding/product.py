"""Matrix products whose bits depend on the numbers alone.

Libraries of linear algebra add up the terms of a product in an order that depends on the processor, the number of threads, the
shape and the layout in memory. Here the order is fixed: on CPUs each result is computed by itself, from the first row of the matrix
to the last, by fused multiply-adds (IEEE 754) in blocks. So a row gives the same coefficients alone and among others, from a basis
as it was fitted and as it was loaded, with any number of threads and on any processor. On other devices torch multiplies.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidArgument
from .threads import in_threads


class PackedRows:
    """Rows [T, K] as products read them: packed once for many products. dtype: what their numbers are rounded to."""

    def __init__(self, rows: Tensor, dtype: torch.dtype = torch.float32) -> None:
        self.shape = (rows.shape[0], rows.shape[1])
        self.device = rows.device
        self.dtype = dtype
        self.values = rows.to(dtype)
        if rows.device.type == "cpu":
            self._packed = _packed(self.values.float().T, _kernels().TILE_ROWS)

    @property
    def packed(self) -> Any:
        """[tiles, K, rows of a tile] float32, on CPUs."""
        return self._packed


class Columns:
    """A matrix [K, N] that rows are multiplied by, packed once. It stays on its device.

    dtype: what the numbers of both sides are rounded to before they are multiplied; sums are float32. result: dtype of results.
    """

    def __init__(self, matrix: Tensor, dtype: torch.dtype = torch.float32, result: torch.dtype = torch.float32) -> None:
        self.shape = (matrix.shape[0], matrix.shape[1])
        self._dtype, self._result = dtype, result
        self._is_on_cpu = matrix.device.type == "cpu"
        self._matrix: Any = (
            _packed(matrix.detach().to(dtype).float(), _kernels().TILE_COLUMNS) if self._is_on_cpu else matrix.to(dtype)
        )

    def times(self, rows: Tensor | PackedRows, start: Tensor | None = None, n_columns: int | None = None) -> Tensor:
        """rows [T, K'] -> rows @ matrix[:K', :n_columns] + start, in `result`. start: [n_columns] float32, zeros if None.

        Raises `InvalidArgument` for rows that are longer than the matrix, and for more columns than it has.
        """
        n = self.shape[1] if n_columns is None else n_columns
        if rows.shape[1] > self.shape[0] or n > self.shape[1]:
            raise InvalidArgument(f"rows {tuple(rows.shape)} times {n} columns of a matrix {self.shape}")
        if not self._is_on_cpu:
            values = rows.values if isinstance(rows, PackedRows) else rows.to(self._dtype)
            return self._times_elsewhere(values, start, n)
        packed = rows if isinstance(rows, PackedRows) else PackedRows(rows, self._dtype)
        sums = np.empty((packed.shape[0], n), np.float32)
        _add_product(packed.packed, self._matrix, np.zeros(n, np.float32) if start is None else start.numpy(), sums)
        return torch.from_numpy(sums).to(self._result)

    def _times_elsewhere(self, rows: Tensor, start: Tensor | None, n: int) -> Tensor:
        matrix = self._matrix[: rows.shape[1], :n]
        if self._dtype == torch.float32 or self._result == self._dtype:
            return rows @ matrix if start is None else torch.addmm(start.to(self._dtype), rows, matrix)
        zero = torch.zeros(n, dtype=torch.float32, device=rows.device)
        if rows.is_cuda:
            return torch.addmm(zero if start is None else start, rows, matrix, out_dtype=torch.float32)
        return torch.addmm(zero if start is None else start, rows.float(), matrix.float())


def product(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows [T, K] @ matrix [K, N] -> float32 [T, N], for a matrix that is multiplied by once."""
    return Columns(matrix).times(rows)


def product_of_blocks(left: Tensor, right: Tensor) -> Tensor:
    """left [n, K, K] @ right [n, K, K] -> float32 [n, K, K], matrix by matrix."""
    if left.device.type != "cpu":
        return left @ right
    return torch.stack([product(rows, matrix) for rows, matrix in zip(left, right, strict=True)])


def inverses(blocks: Tensor) -> Tensor:
    """Symmetric positive blocks [n, D, D] -> their inverses in float64, on the CPU.

    Raises `InvalidArgument` where one has no inverse.
    """
    found = blocks.detach().to("cpu", torch.float64, copy=True).contiguous()
    data, done = found.numpy(), []

    def invert(first: int, stop: int) -> None:
        done.append(_kernels().invert(data, first, stop))

    in_threads(invert, len(found), found.numel() * found.shape[-1])
    if not all(done):
        raise InvalidArgument("a block is not positive: it has no inverse")
    return found


def _add_product(*operands: Any) -> None:
    """`product_kernels.add_product` of rows, columns, start and sums, in threads."""
    rows, _, _, sums = operands
    add = _kernels().add_product
    row_tiles, column_tiles = len(rows), -(-sums.shape[1] // _kernels().TILE_COLUMNS)
    n_terms = sums.size * rows.shape[1]
    if column_tiles >= row_tiles:
        in_threads(lambda first, stop: add(*operands, first, stop, 0, row_tiles), column_tiles, n_terms)
    else:
        in_threads(lambda first, stop: add(*operands, 0, column_tiles, first, stop), row_tiles, n_terms)


def _packed(matrix: Tensor, width: int) -> Any:
    """matrix [K, n] float32 -> float32 [tiles, K, width], as the kernels read it."""
    rows, columns = matrix.shape
    packed = np.zeros((-(-columns // width), rows, width), np.float32)
    _kernels().pack(matrix.detach().numpy(), packed)
    return packed


def _kernels() -> Any:
    """Imported at first use: it brings the compiler."""
    from . import product_kernels

    return product_kernels
