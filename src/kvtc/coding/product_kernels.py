"""The loops of `product`, compiled by numba, and the one of the inverse; imported where they are first needed.

A product's inner loop is written for LLVM itself, as vectors of 16 floats whatever the processor's own width is: compiled from
Python it would reach a tenth of the speed. Each sum is a chain of fused multiply-adds in the order of the rows of the matrix, in
blocks of `BLOCK_ROWS`, so that its bits depend neither on the processor's vectors nor on the tile that it lies in.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from .compilation import compiled

_VECTOR = 16
_FLOAT_BYTES = 4
_FEATURES = cpu_target.target_context.codegen().magic_tuple()[2]
# Tiles that fit the registers: of a processor with 32 wide ones, and of any other. They have no say in the results.
TILE_ROWS, _TILE_VECTORS = (6, 4) if "+avx512f" in _FEATURES else (6, 1)
TILE_COLUMNS = _TILE_VECTORS * _VECTOR
BLOCK_ROWS = 256
"""Rows of the matrix whose products form one partial sum; these are then added in order. Part of every result."""


@intrinsic
def _add_tile(typing_context, rows, columns, sums, stride, count):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """sums[i, j] += sum over k of rows[k, i] * columns[k, j], for one tile; all but the last two are addresses.

    rows: [count, TILE_ROWS], columns: [count, TILE_COLUMNS], sums: TILE_ROWS rows, `stride` floats apart. count: at least 1.
    """
    return types.void(*[types.intp] * 5), _generate_tile


def _generate_tile(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
    rows, columns, sums, stride, count = arguments
    scalar, word = ir.FloatType(), ir.IntType(64)
    vector = ir.VectorType(scalar, _VECTOR)
    name = f"llvm.fma.v{_VECTOR}f32"
    multiply_add = builder.module.globals.get(name)
    if multiply_add is None:
        multiply_add = ir.Function(builder.module, ir.FunctionType(vector, [vector] * 3), name)

    def after(address: Any, floats: int) -> Any:
        return builder.add(address, ir.Constant(word, _FLOAT_BYTES * floats))

    def load(address: Any, kind: Any) -> Any:
        return builder.load(builder.inttoptr(address, kind.as_pointer()), align=_FLOAT_BYTES)

    def spread(value: Any) -> Any:
        index = ir.IntType(32)
        first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(index, 0))
        return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(index, _VECTOR), [0] * _VECTOR))

    before, loop, end = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("end")
    builder.branch(loop)
    builder.position_at_end(loop)
    zero = ir.Constant(vector, [0.0] * _VECTOR)
    places = [(row, part) for row in range(TILE_ROWS) for part in range(_TILE_VECTORS)]
    left, row_at, column_at = (builder.phi(word) for _ in range(3))
    partial = {place: builder.phi(vector) for place in places}
    parts = [load(after(column_at, _VECTOR * part), vector) for part in range(_TILE_VECTORS)]
    factors = [spread(load(after(row_at, row), scalar)) for row in range(TILE_ROWS)]
    added = {
        (row, part): builder.call(multiply_add, [factors[row], parts[part], partial[row, part]]) for row, part in places
    }
    less = builder.sub(left, ir.Constant(word, 1))
    next_row, next_column = after(row_at, TILE_ROWS), after(column_at, TILE_COLUMNS)
    builder.cbranch(builder.icmp_signed(">", less, ir.Constant(word, 0)), loop, end)
    starts = [(left, count, less), (row_at, rows, next_row), (column_at, columns, next_column)]
    for value, first, following in [*starts, *((partial[place], zero, added[place]) for place in places)]:
        value.add_incoming(first, before)
        value.add_incoming(following, loop)
    builder.position_at_end(end)
    bytes_apart = builder.mul(stride, ir.Constant(word, _FLOAT_BYTES))
    for row, part in places:
        at = after(builder.add(sums, builder.mul(bytes_apart, ir.Constant(word, row))), _VECTOR * part)
        total = builder.fadd(load(at, vector), added[row, part])
        builder.store(total, builder.inttoptr(at, vector.as_pointer()), align=_FLOAT_BYTES)
    return context.get_dummy_value()


@compiled(nogil=True)
def pack(matrix, packed):  # type: ignore[no-untyped-def]
    """matrix float32 [K, n] of any layout -> packed [tiles, K, width], zeros but for these: width columns side by side a tile."""
    n_rows, n_columns = matrix.shape
    width = packed.shape[2]
    for tile in range(packed.shape[0]):
        first = tile * width
        for row in range(n_rows):
            for column in range(min(width, n_columns - first)):
                packed[tile, row, column] = matrix[row, first + column]


@compiled(nogil=True)
def add_product(rows, columns, start, sums, first_tile, stop_tile, first_row, stop_row):  # type: ignore[no-untyped-def]
    """Fill sums float32 [T, N] with a product added to start [N], in some tiles of columns and of rows.

    rows: [row tiles, K, TILE_ROWS] and columns: [column tiles, >= K, TILE_COLUMNS], as `pack` makes them.
    """
    n_rows, n_columns = sums.shape
    n_terms = rows.shape[1]
    for row in range(first_row * TILE_ROWS, min(stop_row * TILE_ROWS, n_rows)):
        for column in range(first_tile * TILE_COLUMNS, min(stop_tile * TILE_COLUMNS, n_columns)):
            sums[row, column] = start[column]
    edge = np.zeros((TILE_ROWS, TILE_COLUMNS), np.float32)
    for first in range(0, n_terms, BLOCK_ROWS):
        count = min(BLOCK_ROWS, n_terms - first)
        for tile in range(first_tile, stop_tile):
            column = tile * TILE_COLUMNS
            width = min(TILE_COLUMNS, n_columns - column)
            of_columns = columns[tile, first:].ctypes.data
            for row_tile in range(first_row, stop_row):
                row = row_tile * TILE_ROWS
                height = min(TILE_ROWS, n_rows - row)
                of_rows = rows[row_tile, first:].ctypes.data
                if height == TILE_ROWS and width == TILE_COLUMNS:
                    _add_tile(of_rows, of_columns, sums[row:, column:].ctypes.data, n_columns, count)
                else:
                    edge[:height, :width] = sums[row : row + height, column : column + width]
                    _add_tile(of_rows, of_columns, edge.ctypes.data, TILE_COLUMNS, count)
                    sums[row : row + height, column : column + width] = edge[:height, :width]


@compiled(nogil=True)
def invert(blocks, first, stop):  # type: ignore[no-untyped-def]
    """Replace some of the blocks float64 [n, D, D], symmetric and positive, by their inverses; False where one has none.

    Gauss and Jordan's elimination in place, without pivots: in the order of rows, one rounding for each operation.
    """
    size = blocks.shape[1]
    for index in range(first, stop):
        block = blocks[index]
        for k in range(size):
            pivot = block[k, k]
            if not pivot > 0 or not np.isfinite(pivot):
                return False
            block[k, k] = 1.0
            for j in range(size):
                block[k, j] = block[k, j] / pivot
            for i in range(size):
                if i != k:
                    factor = block[i, k]
                    block[i, k] = 0.0
                    for j in range(size):
                        block[i, j] = block[i, j] - factor * block[k, j]
    return True
