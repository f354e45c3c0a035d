"""Matrix products whose bits depend on the numbers alone.

Libraries of linear algebra add up the terms of a product in an order that depends on the processor, the number of threads, the
shape and the layout in memory. Here the order is fixed: on CPUs each result is computed by itself, from the first row of the matrix
to the last, by fused multiply-adds (IEEE 754) in blocks. So a row gives the same coefficients alone and among others, from a basis
as it was fitted and as it was loaded, with any number of threads and on any processor. On other devices torch multiplies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import InvalidArgument
from .threads import in_threads

_GROUP_TILES = 8
_PACKING_OPERATIONS = 16
"""Of one number, about, as `in_threads` counts them."""


class PackedRows:
    """Rows [T, K] as products read them: packed once for many products.

    dtype: what their numbers are rounded to. chosen: int64 [K'], which columns of the rows are meant, in their order; None: all.
    """

    def __init__(self, rows: Tensor, dtype: torch.dtype = torch.float32, chosen: Tensor | None = None) -> None:
        self.shape = (rows.shape[0], rows.shape[1] if chosen is None else len(chosen))
        self.device = rows.device
        self.dtype = dtype
        self._rows, self._chosen = rows.to(dtype), chosen
        if rows.device.type == "cpu":
            self._packed = _packed_rows(self._rows.float(), chosen)

    @property
    def values(self) -> Tensor:
        """The same rows [T, K'], not packed."""
        return self._rows if self._chosen is None else self._rows[:, self._chosen]

    @property
    def packed(self) -> Any:
        """[tiles, K', rows of a tile] float32, on CPUs."""
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
            _packed_columns(matrix.detach().to(dtype).float(), _kernels().TILE_COLUMNS)
            if self._is_on_cpu
            else matrix.to(dtype)
        )

    def times(
        self,
        rows: Tensor | PackedRows,
        start: Tensor | None = None,
        n_columns: int | None = None,
        blocks: Sequence[LayerBlocks] = (),
    ) -> Tensor:
        """rows [T, K'] -> rows @ matrix[:K', :n_columns] + start, in `result`. start: [n_columns] float32, zeros if None.

        blocks: products with blocks, which are added to the rounded result, each to columns of their own.

        Raises `InvalidArgument` for rows that are longer than the matrix, and for more columns than it has.
        """
        n = self.shape[1] if n_columns is None else n_columns
        if rows.shape[1] > self.shape[0] or n > self.shape[1]:
            raise InvalidArgument(f"rows {tuple(rows.shape)} times {n} columns of a matrix {self.shape}")
        if not self._is_on_cpu:
            values = rows.values if isinstance(rows, PackedRows) else rows.to(self._dtype)
            return _added(self._times_elsewhere(values, start, n), blocks)
        packed = rows if isinstance(rows, PackedRows) else PackedRows(rows, self._dtype)
        sums = np.empty((packed.shape[0], n), np.float32)
        begin = np.zeros(n, np.float32) if start is None else start.numpy()
        if self._result == torch.float32 or not blocks:
            _add_product(packed.packed, self._matrix, begin, sums, blocks)
            return torch.from_numpy(sums).to(self._result)
        _add_product(packed.packed, self._matrix, begin, sums, ())
        return _added(torch.from_numpy(sums).to(self._result), blocks)

    def _times_elsewhere(self, rows: Tensor, start: Tensor | None, n: int) -> Tensor:
        matrix = self._matrix[: rows.shape[1], :n]
        if self._dtype == torch.float32 or self._result == self._dtype:
            return rows @ matrix if start is None else torch.addmm(start.to(self._dtype), rows, matrix)
        zero = torch.zeros(n, dtype=torch.float32, device=rows.device)
        if rows.is_cuda:
            return torch.addmm(zero if start is None else start, rows, matrix, out_dtype=torch.float32)
        return torch.addmm(zero if start is None else start, rows.float(), matrix.float())


class Blocks:
    """Square matrices [B, D, D] that blocks of rows are multiplied by, packed once. They stay on their device."""

    def __init__(self, blocks: Tensor) -> None:
        self.size = blocks.shape[1]
        self.matrices = blocks
        if blocks.device.type == "cpu":
            self.packed = _packed_columns(blocks.detach().reshape(-1, self.size), _kernels().NARROW_COLUMNS)

    def rows(self, values: Tensor, columns: Tensor, features: Tensor) -> BlockRows:
        """Rows that are zero but for some features of their B D.

        Parameters:
            values: float32 [T, n].
            columns: int64 [k], on the CPU: which columns of values hold those features.
            features: int64 [k], on the CPU: which features they are; any order, none twice.
        """
        order = features.argsort()
        return BlockRows(self, values, columns[order], features[order])


class BlockRows:
    """Rows as `Blocks` multiply them. features: rising."""

    def __init__(self, blocks: Blocks, values: Tensor, columns: Tensor, features: Tensor) -> None:
        self._blocks = blocks
        self._features = features.numpy()
        self._is_on_cpu = values.device.type == "cpu"
        if self._is_on_cpu:
            self._turned, self._chosen = _turned(values), columns.numpy()
            # A zero adds nothing to a sum: the terms that are not there change no bit of it.
            self._columns = np.ascontiguousarray(blocks.packed[:, self._features])
        else:
            n_blocks, size, _ = blocks.matrices.shape
            self._dense = torch.zeros(len(values), n_blocks * size, dtype=torch.float32, device=values.device)
            self._dense[:, features.to(values.device)] = values[:, columns.to(values.device)]

    def of(self, blocks: Sequence[int], at: int = 0) -> LayerBlocks:
        """The products of some blocks, which are side by side in the results, from column `at` on."""
        size = self._blocks.size
        groups = [
            (block * size + first, block * size + min(first + _block_rows(), size), at + place * size)
            for place, block in enumerate(blocks)
            for first in range(0, size, _block_rows())
        ]
        bounds = np.array(groups, np.int64).reshape(-1, 3)
        bounds[:, :2] = np.searchsorted(self._features, bounds[:, :2])
        return LayerBlocks(self, blocks, at, bounds[bounds[:, 1] > bounds[:, 0]])


@dataclass(frozen=True, eq=False)
class LayerBlocks:
    """Products of some blocks. at: their first column. parts: as `product_kernels.add_parts` takes them."""

    rows: BlockRows
    blocks: Sequence[int]
    at: int
    parts: npt.NDArray[np.int64]

    def added_to(self, found: Tensor) -> Tensor:
        """found [T, n], changed in place: plus the products."""
        own, size = self.rows, self.rows._blocks.size
        if not len(self.parts):
            return found
        if own._is_on_cpu:
            sums = np.zeros(found.shape, np.float32)
            self.add(sums, 0, -(-len(sums) // _kernels().TILE_ROWS))
            found += torch.from_numpy(sums)
            return found
        for place in sorted(set(self.parts[:, 2].tolist())):
            block = self.blocks[(place - self.at) // size]
            here = own._dense[:, block * size : (block + 1) * size]
            found[:, place : place + size] += here @ own._blocks.matrices[block]
        return found

    def add(self, sums: Any, first_row: int, stop_row: int) -> None:
        """sums float32 [T, n], changed in place, in some tiles of rows; on CPUs."""
        own = self.rows
        operands = own._turned, own._chosen, own._columns, self.parts, own._blocks.size
        _kernels().add_parts(*operands, sums, first_row, stop_row)


def product(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows [T, K] @ matrix [K, N] -> float32 [T, N], for a matrix that is multiplied by once."""
    return Columns(matrix).times(rows)


def product_of_blocks(left: Tensor, right: Tensor) -> Tensor:
    """left [n, K, K] @ right [n, K, K] -> float32 [n, K, K], matrix by matrix."""
    if left.device.type != "cpu":
        return left @ right
    return torch.stack([product(rows, matrix) for rows, matrix in zip(left, right, strict=True)])


def project_rest(
    rows: Tensor,
    of_rows: PackedRows,
    layers: Sequence[tuple[Columns, Tensor, Sequence[int]]],
    sides: Sequence[Blocks],
    places: Tensor,
    found: Tensor,
) -> None:
    """What products leave of rows, times blocks, to chosen columns of `found`; on CPUs.

    Parameters:
        rows: float32 [T, P]: the blocks of each side, one side after the other.
        of_rows: what stands for them, [T, K].
        layers: of each the matrix [K, N] that leads back to some blocks of each side, side after side, what is added then,
            float32 [N], and the numbers of those blocks among their side's.
        sides: what the rest is multiplied by.
        places: int64 [P], the column of found that each result goes to; -1: none.
        found: float32 [T, n], changed in place.
    """
    kernels = _kernels()
    there, data, output = places.numpy(), rows.contiguous().numpy(), found.numpy()
    begins = np.cumsum([0, *(len(side.matrices) * side.size for side in sides)])
    of_layers = [(columns, start.numpy(), np.array(numbers, np.int64)) for columns, start, numbers in layers]
    n_groups = -(-len(of_rows.packed) // _GROUP_TILES)

    def work(first: int, stop: int) -> None:
        # Some rows through all layers, for results of one row are all over `found`.
        for group in range(first, stop):
            tiles = group * _GROUP_TILES, min((group + 1) * _GROUP_TILES, len(of_rows.packed))
            part = slice(tiles[0] * kernels.TILE_ROWS, tiles[1] * kernels.TILE_ROWS)
            packed, its_rows, its_output = of_rows.packed[slice(*tiles)], data[part], output[part]
            for columns, start, numbers in of_layers:
                spanned = np.empty((len(its_rows), columns.shape[1]), np.float32)
                n_tiles = columns._matrix.shape[0]
                kernels.add_product(packed, columns._matrix, start, spanned, 0, n_tiles, 0, len(packed))
                if columns._result != torch.float32:
                    spanned = torch.from_numpy(spanned).to(columns._result).float().numpy()
                at = 0
                for side, begin in zip(sides, begins, strict=False):
                    features = begin + numbers * side.size
                    operands = spanned, at, side.size, features, begin
                    kernels.multiply_rest(its_rows, *operands, side.packed, there, its_output, 0, len(packed))
                    at += len(numbers) * side.size

    in_threads(work, n_groups, rows.numel() * of_rows.shape[1])


def used_columns(values: Tensor) -> Tensor:
    """values [T, n] float32 -> bool [n], on the CPU: whether a column holds anything but zeros."""
    if values.device.type != "cpu":
        return values.any(dim=0).cpu()
    # Not torch's `any`: threads that torch has started go on spinning, on cores that the products need.
    turned, used = _turned(values), np.zeros(values.shape[1], np.bool_)
    in_threads(lambda *some: _kernels().find_used(turned, used, *some), len(used), values.numel())
    return torch.from_numpy(used)


def spread_columns(values: Tensor, places: Tensor, found: Tensor) -> None:
    """values [T, n] float32 -> their columns at places int64 [n], on the CPU, of found [T, N]."""
    if found.device.type != "cpu":
        found[:, places.to(found.device)] = values
        return
    operands = values.numpy(), places.numpy(), found.numpy()
    in_threads(lambda *rows: _kernels().spread(*operands, *rows), len(values), _PACKING_OPERATIONS * values.numel())


def all_finite(values: Tensor) -> bool:
    """Whether values float32 [T, n] hold neither infinity nor NaN."""
    if values.device.type != "cpu" or not values.is_contiguous():
        return bool(values.isfinite().all())
    data, found = values.numpy(), list[bool]()
    in_threads(
        lambda *rows: found.append(_kernels().are_finite(data, *rows)), len(data), _PACKING_OPERATIONS * data.size
    )
    return all(found)


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


def _added(found: Tensor, blocks: Sequence[LayerBlocks]) -> Tensor:
    for its in blocks:
        found = its.added_to(found)
    return found


def _add_product(rows: Any, columns: Any, start: Any, sums: Any, blocks: Sequence[LayerBlocks]) -> None:
    """`product_kernels.add_product`, and what `blocks` add, in threads."""
    add = _kernels().add_product
    row_tiles, column_tiles = len(rows), -(-sums.shape[1] // _kernels().TILE_COLUMNS)
    n_terms = sums.size * rows.shape[1]
    if not blocks and column_tiles >= row_tiles:
        in_threads(lambda *tiles: add(rows, columns, start, sums, *tiles, 0, row_tiles), column_tiles, n_terms)
        return

    def work(first: int, stop: int) -> None:
        add(rows, columns, start, sums, 0, column_tiles, first, stop)
        for its in blocks:
            its.add(sums, first, stop)

    in_threads(work, row_tiles, n_terms)


def _packed_rows(rows: Tensor, chosen: Tensor | None) -> Any:
    """rows [T, n] float32 -> float32 [tiles, chosen, TILE_ROWS], as the kernels read them."""
    kernels, data = _kernels(), rows.detach().numpy()
    terms = np.arange(data.shape[1]) if chosen is None else chosen.numpy()
    packed = np.empty((-(-len(data) // kernels.TILE_ROWS), len(terms), kernels.TILE_ROWS), np.float32)
    is_turned = data.strides[0] < data.strides[1]
    pack, source = (kernels.pack_turned_rows, data.T) if is_turned else (kernels.pack_rows, data)
    source = np.ascontiguousarray(source)
    in_threads(lambda *tiles: pack(source, terms, packed, *tiles), len(packed), _PACKING_OPERATIONS * packed.size)
    return packed


def _turned(values: Tensor) -> npt.NDArray[np.float32]:
    """values [T, n] float32 -> [n, T]: as decoded coefficients lie already."""
    return np.ascontiguousarray(values.detach().numpy().T)


def _packed_columns(matrix: Tensor, width: int) -> Any:
    """matrix [K, n] float32 -> float32 [tiles, K, width], as the kernels read it."""
    rows, columns = matrix.shape
    packed = np.empty((-(-columns // width), rows, width), np.float32)
    _kernels().pack_columns(matrix.detach().numpy(), packed)
    return packed


def _block_rows() -> int:
    return int(_kernels().BLOCK_ROWS)


def _kernels() -> Any:
    """Imported at first use: it brings the compiler."""
    from . import product_kernels

    return product_kernels
