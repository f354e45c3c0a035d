"""The loops that Python is too slow for, compiled by numba: measuring groups, and the states of the dynamic program.

Imported where they are first needed: a program that only decodes never loads the compiler.
"""

from __future__ import annotations

import numpy as np

from ..compilation import compiled
from ..float_formats import E4M3_MAX, FLOAT16_MAX

_ROWS_AT_ONCE = 512
_E4M3 = (np.int32(-6), np.int32(3))
_FLOAT16 = (np.int32(-14), np.int32(10))


@compiled(nogil=True)
def _round(values, bits, cells, cell_bits, n, smallest_exponent, mantissa_bits):  # type: ignore[no-untyped-def]
    """Round values[:n] in place to a narrower float format, to nearest even; `bits` and `cell_bits` are integer views."""
    for i in range(n):
        # The spacing at a value is 2**(exponent - mantissa bits), with the exponent of the smallest normal below it.
        exponent = max(bits[i] & np.int32(0x7F800000), np.int32((127 + smallest_exponent) << 23))
        cell_bits[i] = exponent - np.int32(mantissa_bits << 23)
    for i in range(n):
        values[i] = np.rint(values[i] / cells[i]) * cells[i]


@compiled(nogil=True)
def measure_groups(columns, size, first_start, stop_start, totals):  # type: ignore[no-untyped-def]
    """columns [r, n] -> add the squared errors of some groups of `size` to totals float64 [3, r - size + 1]: int2, int4 and fp8.

    Rows are the inner loop, so every operation runs over vector lanes and a block of rows stays in the first-level cache.
    """
    n_rows = columns.shape[1]
    for start in range(first_start, stop_start):
        low = np.empty(_ROWS_AT_ONCE, np.float32)
        high = np.empty(_ROWS_AT_ONCE, np.float32)
        shift = np.empty((3, _ROWS_AT_ONCE), np.float32)
        step = np.empty((3, _ROWS_AT_ONCE), np.float32)
        inverse = np.empty((3, _ROWS_AT_ONCE), np.float32)
        left = np.empty((3, _ROWS_AT_ONCE), np.float32)
        value = np.empty(_ROWS_AT_ONCE, np.float32)
        value_bits = value.view(np.int32)
        cell = np.empty(_ROWS_AT_ONCE, np.float32)
        cell_bits = cell.view(np.int32)
        levels = np.array([3.0, 15.0, E4M3_MAX], np.float32)
        for first in range(0, n_rows, _ROWS_AT_ONCE):
            n = min(_ROWS_AT_ONCE, n_rows - first)
            low[:n] = columns[start, first : first + n]
            high[:n] = low[:n]
            for j in range(start + 1, start + size):
                column = columns[j, first : first + n]
                for i in range(n):
                    low[i] = min(low[i], column[i])
                    high[i] = max(high[i], column[i])
            for kind in range(3):
                half = kind == 2
                for i in range(n):
                    base = (low[i] + high[i]) * np.float32(0.5) if half else low[i]
                    value[i] = min(max(base, np.float32(-FLOAT16_MAX)), np.float32(FLOAT16_MAX))
                _round(value, value_bits, cell, cell_bits, n, _FLOAT16[0], _FLOAT16[1])
                shift[kind, :n] = value[:n]
                for i in range(n):
                    width = (high[i] - low[i]) * np.float32(0.5) if half else high[i] - low[i]
                    value[i] = min(width, np.float32(FLOAT16_MAX))
                _round(value, value_bits, cell, cell_bits, n, _FLOAT16[0], _FLOAT16[1])
                for i in range(n):
                    step[kind, i] = value[i] / levels[kind]
                    inverse[kind, i] = levels[kind] / value[i] if value[i] > 0 else np.float32(0)
                    left[kind, i] = 0
            for j in range(start, start + size):
                column = columns[j, first : first + n]
                for kind in range(2):
                    top = levels[kind]
                    for i in range(n):
                        symbol = np.rint((column[i] - shift[kind, i]) * inverse[kind, i])
                        symbol = min(max(symbol, np.float32(0)), top)
                        error = column[i] - shift[kind, i] - symbol * step[kind, i]
                        left[kind, i] += error * error
                top = levels[2]
                for i in range(n):
                    value[i] = min(max((column[i] - shift[2, i]) * inverse[2, i], -top), top)
                _round(value, value_bits, cell, cell_bits, n, _E4M3[0], _E4M3[1])
                for i in range(n):
                    error = column[i] - shift[2, i] - value[i] * step[2, i]
                    left[2, i] += error * error
            for kind in range(3):
                total = 0.0
                for i in range(n):
                    total += left[kind, i]
                totals[kind, start] += total


@compiled()
def fill_states(errors, energy, sizes, costs, units):  # type: ignore[no-untyped-def]
    """best[b] over all coefficients, and choices[i, b]: 0 drops coefficient i - 1, k + 1 ends group kind k there.

    Only the rows of the longest group back are kept: the table of errors is r * budget floats otherwise.
    """
    rank = len(energy)
    kept_rows = 1
    for k in range(len(sizes)):
        if sizes[k] <= rank and costs[k] <= units:
            kept_rows = max(kept_rows, sizes[k])
    kept_rows += 1
    best = np.zeros((kept_rows, units + 1), np.float64)
    choices = np.zeros((rank + 1, units + 1), np.uint8)
    for i in range(1, rank + 1):
        row = best[i % kept_rows]
        choice = choices[i]
        before = best[(i - 1) % kept_rows]
        for b in range(units + 1):
            row[b] = before[b] + energy[i - 1]
        for k in range(len(sizes)):
            if sizes[k] > i or costs[k] > units:
                continue
            error = errors[k, i - sizes[k]]
            source = best[(i - sizes[k]) % kept_rows]
            cost = costs[k]
            for b in range(cost, units + 1):
                candidate = source[b - cost] + error
                if candidate < row[b]:
                    row[b] = candidate
                    choice[b] = k + 1
    return best[rank % kept_rows].copy(), choices
