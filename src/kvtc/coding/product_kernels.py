"""The loops of `product`, compiled by numba, and the one of the inverse; imported where they are first needed.

A product's inner loop is written for LLVM itself, as vectors of 16 floats whatever the processor's own width is: compiled from
Python it would reach a tenth of the speed. Each sum is a chain of fused multiply-adds in the order of the rows of the matrix, in
blocks of `BLOCK_ROWS`, so that its bits depend neither on the processor's vectors nor on the tile that it lies in.
"""

from __future__ import annotations

from functools import partial
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
TILE_ROWS, _TILE_VECTORS = (12, 2) if "+avx512f" in _FEATURES else (6, 1)
TILE_COLUMNS = _TILE_VECTORS * _VECTOR
_GROUP_TILES = 8
_LOOKED_AT = 64
_ALL_BUT_SIGN, _INFINITY = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
BLOCK_ROWS = 256
"""Rows of the matrix whose products form one partial sum; these are then added in order. Part of every result."""


def _tile_of(n_vectors: int) -> Any:
    """The inner loop of a tile of TILE_ROWS rows and so many vectors of columns, as numba calls it."""

    @intrinsic
    def add_tile(typing_context, rows, columns, sums, stride, count):  # type: ignore[no-untyped-def]  # noqa: ARG001
        """sums[i, j] += sum over k of rows[k, i] * columns[k, j], for one tile; all but the last two are addresses.

        rows: [count, TILE_ROWS], columns: [count, columns of a tile], sums: TILE_ROWS rows, `stride` floats apart. count: above 0.
        """
        return types.void(*[types.intp] * 5), partial(_generate_tile, n_vectors)

    return add_tile


def _generate_tile(n_vectors: int, context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
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
    places = [(row, part) for row in range(TILE_ROWS) for part in range(n_vectors)]
    left, row_at, column_at = (builder.phi(word) for _ in range(3))
    sums_of = {place: builder.phi(vector) for place in places}
    parts = [load(after(column_at, _VECTOR * part), vector) for part in range(n_vectors)]
    factors = [spread(load(after(row_at, row), scalar)) for row in range(TILE_ROWS)]
    added = {
        (row, part): builder.call(multiply_add, [factors[row], parts[part], sums_of[row, part]]) for row, part in places
    }
    less = builder.sub(left, ir.Constant(word, 1))
    next_row, next_column = after(row_at, TILE_ROWS), after(column_at, n_vectors * _VECTOR)
    builder.cbranch(builder.icmp_signed(">", less, ir.Constant(word, 0)), loop, end)
    starts = [(left, count, less), (row_at, rows, next_row), (column_at, columns, next_column)]
    for value, first, following in [*starts, *((sums_of[place], zero, added[place]) for place in places)]:
        value.add_incoming(first, before)
        value.add_incoming(following, loop)
    builder.position_at_end(end)
    bytes_apart = builder.mul(stride, ir.Constant(word, _FLOAT_BYTES))
    for row, part in places:
        at = after(builder.add(sums, builder.mul(bytes_apart, ir.Constant(word, row))), _VECTOR * part)
        total = builder.fadd(load(at, vector), added[row, part])
        builder.store(total, builder.inttoptr(at, vector.as_pointer()), align=_FLOAT_BYTES)
    return context.get_dummy_value()


_add_tile, _add_narrow_tile = _tile_of(_TILE_VECTORS), _tile_of(1)
NARROW_COLUMNS = _VECTOR


@compiled(nogil=True)
def pack_rows(rows, chosen, packed, first, stop):  # type: ignore[no-untyped-def]
    """The chosen columns of rows float32 [T, n] -> some tiles of packed [row tiles, chosen, TILE_ROWS], zeros past the last row."""
    for tile in range(first, stop):
        row = tile * TILE_ROWS
        height = min(TILE_ROWS, rows.shape[0] - row)
        if height == TILE_ROWS:
            for term in range(len(chosen)):
                for within in range(TILE_ROWS):
                    packed[tile, term, within] = rows[row + within, chosen[term]]
        else:
            packed[tile] = np.float32(0)
            for term in range(len(chosen)):
                for within in range(height):
                    packed[tile, term, within] = rows[row + within, chosen[term]]


@compiled(nogil=True)
def pack_turned_rows(turned, chosen, packed, first, stop):  # type: ignore[no-untyped-def]
    """The same of rows that lie column by column, turned float32 [n, T]: some tiles at a time, to read whole cache lines."""
    n_rows = turned.shape[1]
    for group in range(first, stop, _GROUP_TILES):
        last = min(group + _GROUP_TILES, stop)
        whole = min(last, n_rows // TILE_ROWS)
        for term in range(len(chosen)):
            column = turned[chosen[term]]
            for tile in range(group, whole):
                row = tile * TILE_ROWS
                for within in range(TILE_ROWS):
                    packed[tile, term, within] = column[row + within]
            for tile in range(whole, last):
                for within in range(TILE_ROWS):
                    row = tile * TILE_ROWS + within
                    packed[tile, term, within] = column[row] if row < n_rows else np.float32(0)


@compiled(nogil=True)
def pack_columns(matrix, packed):  # type: ignore[no-untyped-def]
    """matrix float32 [K, n] of any layout -> packed [tiles, K, width], zeros past the last column."""
    n_rows, n_columns = matrix.shape
    width = packed.shape[2]
    for tile in range(packed.shape[0]):
        first = tile * width
        for row in range(n_rows):
            for column in range(width):
                inside = first + column < n_columns
                packed[tile, row, column] = matrix[row, first + column] if inside else np.float32(0)


@compiled(nogil=True)
def add_product(rows, columns, start, sums, first_tile, stop_tile, first_row, stop_row):  # type: ignore[no-untyped-def]
    """Fill sums float32 [T, N] with a product added to start [N], in some tiles of columns and of rows.

    rows: [row tiles, K, TILE_ROWS] and columns: [column tiles, >= K, TILE_COLUMNS], as `pack` makes them.
    """
    n_rows, n_columns = sums.shape
    n_terms = rows.shape[1]
    edge = np.zeros((TILE_ROWS, TILE_COLUMNS), np.float32)
    rows_at, columns_at, sums_at = rows.ctypes.data, columns.ctypes.data, sums.ctypes.data
    for group in range(first_row, stop_row, _GROUP_TILES):
        last = min(group + _GROUP_TILES, stop_row)
        for row in range(group * TILE_ROWS, min(last * TILE_ROWS, n_rows)):
            for column in range(first_tile * TILE_COLUMNS, min(stop_tile * TILE_COLUMNS, n_columns)):
                sums[row, column] = start[column]
        for first in range(0, n_terms, BLOCK_ROWS):
            count = min(BLOCK_ROWS, n_terms - first)
            for tile in range(first_tile, stop_tile):
                column = tile * TILE_COLUMNS
                width = min(TILE_COLUMNS, n_columns - column)
                of_columns = columns_at + tile * columns.strides[0] + first * columns.strides[1]
                for row_tile in range(group, last):
                    row = row_tile * TILE_ROWS
                    height = min(TILE_ROWS, n_rows - row)
                    of_rows = rows_at + row_tile * rows.strides[0] + first * rows.strides[1]
                    if height == TILE_ROWS and width == TILE_COLUMNS:
                        there = sums_at + row * sums.strides[0] + column * sums.strides[1]
                        _add_tile(of_rows, of_columns, there, n_columns, count)
                    else:
                        edge[:height, :width] = sums[row : row + height, column : column + width]
                        _add_tile(of_rows, of_columns, edge.ctypes.data, TILE_COLUMNS, count)
                        sums[row : row + height, column : column + width] = edge[:height, :width]


@compiled(nogil=True)
def add_parts(turned, chosen, columns, parts, width, sums, first_row, stop_row):  # type: ignore[no-untyped-def]
    """Add products of some terms alone to some columns of sums float32 [T, N], in some tiles of rows.

    Parameters:
        turned: float32 [n, T]. chosen: int64, the rows of it that are terms.
        columns: float32 [column tiles, terms, NARROW_COLUMNS].
        parts: int64 [n, 3], for each its first term, the one behind its last (at most `BLOCK_ROWS` of them), and the first of
            the `width` columns of sums.
    """
    n_rows, n_columns = sums.shape
    own = np.zeros((BLOCK_ROWS, TILE_ROWS), np.float32)
    edge = np.zeros((TILE_ROWS, NARROW_COLUMNS), np.float32)
    for row_tile in range(first_row, stop_row):
        row = row_tile * TILE_ROWS
        height = min(TILE_ROWS, n_rows - row)
        for part in range(parts.shape[0]):
            first, count = parts[part, 0], parts[part, 1] - parts[part, 0]
            for term in range(count):
                values = turned[chosen[first + term]]
                if height == TILE_ROWS:
                    for within in range(TILE_ROWS):
                        own[term, within] = values[row + within]
                else:
                    own[term, :height] = values[row : row + height]
            for tile in range(columns.shape[0]):
                start = parts[part, 2] + tile * NARROW_COLUMNS
                its_width = min(NARROW_COLUMNS, width - tile * NARROW_COLUMNS)
                of_columns = columns[tile, first:].ctypes.data
                if height == TILE_ROWS and its_width == NARROW_COLUMNS:
                    _add_narrow_tile(own.ctypes.data, of_columns, sums[row:, start:].ctypes.data, n_columns, count)
                else:
                    edge[:height, :its_width] = sums[row : row + height, start : start + its_width]
                    _add_narrow_tile(own.ctypes.data, of_columns, edge.ctypes.data, NARROW_COLUMNS, count)
                    sums[row : row + height, start : start + its_width] = edge[:height, :its_width]


@compiled(nogil=True)
def multiply_rest(  # type: ignore[no-untyped-def]
    rows, spanned, at, size, features, begin, columns, places, found, first_row, stop_row
):
    """What `spanned` leaves of some blocks of rows, times their matrices, to chosen columns of found, in some tiles of rows.

    Parameters:
        rows: float32 [T, P].
        spanned: float32 [T, N], those blocks side by side from column `at` on. size: D.
        features: int64 [n], the first feature of each block in rows. begin: that of the first matrix of `columns`.
        columns: [column tiles, B D, NARROW_COLUMNS] of all matrices, one upon the other.
        places: int64 [P], the column of found that each result goes to; -1: none.
        found: float32 [T, N].
    """
    n_rows = rows.shape[0]
    own = np.zeros((size, TILE_ROWS), np.float32)
    edge = np.zeros((TILE_ROWS, NARROW_COLUMNS), np.float32)
    for row_tile in range(first_row, stop_row):
        row = row_tile * TILE_ROWS
        height = min(TILE_ROWS, n_rows - row)
        for index in range(len(features)):
            feature = features[index]
            for within in range(height):
                for term in range(size):
                    own[term, within] = (
                        rows[row + within, feature + term] - spanned[row + within, at + index * size + term]
                    )
            for tile in range(columns.shape[0]):
                start = tile * NARROW_COLUMNS
                n_columns = min(NARROW_COLUMNS, size - start)
                is_wanted = False
                for column in range(n_columns):
                    is_wanted |= places[feature + start + column] >= 0
                if not is_wanted:
                    continue
                edge[:] = np.float32(0)
                for first in range(0, size, BLOCK_ROWS):
                    count = min(BLOCK_ROWS, size - first)
                    of_columns = columns[tile, feature - begin + first :].ctypes.data
                    _add_narrow_tile(own[first:].ctypes.data, of_columns, edge.ctypes.data, NARROW_COLUMNS, count)
                for column in range(n_columns):
                    place = places[feature + start + column]
                    if place >= 0:
                        for within in range(height):
                            found[row + within, place] = edge[within, column]


@compiled(nogil=True)
def spread(values, places, found, first_row, stop_row):  # type: ignore[no-untyped-def]
    """values float32 [T, n] -> their columns at places int64 [n] of found float32 [T, N], in some rows."""
    for row in range(first_row, stop_row):
        for column in range(len(places)):
            found[row, places[column]] = values[row, column]


@compiled(nogil=True)
def are_finite(values, first, stop):  # type: ignore[no-untyped-def]
    """Whether some rows of values float32 [T, n] hold neither infinity nor NaN."""
    bits = values.view(np.uint32)
    largest = np.uint32(0)
    for index in range(first, stop):
        for place in range(bits.shape[1]):
            largest = max(largest, bits[index, place] & _ALL_BUT_SIGN)
    return largest < _INFINITY


@compiled(nogil=True)
def find_used(turned, used, first_index, stop_index):  # type: ignore[no-untyped-def]
    """turned float32 [n, T] -> some of used bool [n]: whether a row holds anything but zeros."""
    bits = turned.view(np.uint32)
    for index in range(first_index, stop_index):
        row = bits[index]
        for first in range(0, len(row), _LOOKED_AT):
            seen = np.uint32(0)
            for place in range(first, min(first + _LOOKED_AT, len(row))):
                seen |= row[place] & _ALL_BUT_SIGN
            if seen:
                used[index] = True
                break


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
