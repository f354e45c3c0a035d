"""The loops between coefficients and symbols, compiled by numba; imported where they are first needed, as `kernels` is.

Tokens are taken 16 at a time, so that rows of coefficients and columns of symbols are both read and written by cache lines.
"""

from __future__ import annotations

import numpy as np

from ..compilation import compiled
from .uniform_quantizer import ESCAPE, MAX_MAGNITUDE, MAX_SYMBOL, N_ACTIVITIES, ROUNDING

TILE_TOKENS = 16
_ESCAPE = np.uint8(ESCAPE)
_MAX_SYMBOL = np.int32(MAX_SYMBOL)
_PAST_SYMBOLS = np.float32(MAX_SYMBOL + 1)
_MAX_MAGNITUDE = np.float32(MAX_MAGNITUDE)
_ROUNDING = np.float32(ROUNDING)


@compiled(nogil=True)
def round_tokens(coefficients, step, column_class, costs, rooms, offsets, bit_price, first, stop, found):  # type: ignore[no-untyped-def]
    """Integers of the tokens first .. stop, `first` a multiple of 16 (`rounding.round_coefficients`).

    coefficients: float32 [T, r or more]. costs: float32 [C, S, A], bits. rooms: uint16 [A, C, S], 0 where a symbol escapes.
    offsets: float32 [A, C, 2]. `found` is filled: values int32 [n, T], symbols uint8 [n, T],
    activities uint8 [T], bits float32 [T].
    """
    values, symbols, activities, bits = found
    n_columns = len(column_class)
    totals = np.zeros((TILE_TOKENS, N_ACTIVITIES), np.float32)
    for start in range(first, stop, TILE_TOKENS):
        end = min(start + TILE_TOKENS, stop)
        totals[:] = np.float32(0)
        for column in range(n_columns):
            of_class = costs[column_class[column]]
            for token in range(start, end):
                coefficient = coefficients[token, column]
                magnitude = min(np.floor(abs(coefficient) / step + _ROUNDING), _MAX_MAGNITUDE)
                value = np.int32(magnitude) if coefficient > 0 else -np.int32(magnitude)
                values[column, token] = value
                of_symbol = of_class[ESCAPE if magnitude > _MAX_SYMBOL else _MAX_SYMBOL + value]
                for activity in range(N_ACTIVITIES):
                    totals[token - start, activity] += of_symbol[activity]
        for token in range(start, end):
            activities[token] = np.argmin(totals[token - start])
            bits[token] = np.float32(0)
        for column in range(n_columns):
            its_class = column_class[column]
            for token in range(start, end):
                activity = activities[token]
                of_class = costs[its_class]
                scaled = coefficients[token, column] / step
                magnitude = abs(scaled)
                below = np.int32(min(magnitude, _PAST_SYMBOLS))
                best = values[column, token]
                if below < _MAX_SYMBOL:
                    shifts = offsets[activity, its_class]
                    sign = np.int32(-1) if scaled < 0 else np.int32(1)
                    best = np.int32(0)
                    best_bits = of_class[_MAX_SYMBOL, activity]
                    least = magnitude * magnitude + bit_price * best_bits
                    for candidate in range(max(below, np.int32(1)), below + np.int32(2)):
                        error = magnitude - (np.float32(candidate) - shifts[0 if candidate == 1 else 1])
                        its_bits = of_class[_MAX_SYMBOL + sign * candidate, activity]
                        price = error * error + bit_price * its_bits
                        if price < least:
                            least, best, best_bits = price, sign * np.int32(candidate), its_bits
                    values[column, token] = best
                    bits[token] += best_bits
                symbol = _ESCAPE if abs(best) > _MAX_SYMBOL else np.uint8(_MAX_SYMBOL + best)
                if below >= _MAX_SYMBOL:
                    bits[token] += of_class[symbol, activity]
                symbols[column, token] = symbol if rooms[activity, its_class, symbol] else _ESCAPE


@compiled(nogil=True)
def dequantize_symbols(symbols, column_class, activities, offsets, step, coefficients):  # type: ignore[no-untyped-def]
    """Symbols uint8 [n, T] -> coefficients float32 [T, n or more], as `uniform_quantizer.dequantize` says.

    In place of escapes is something that the caller replaces.
    """
    n_columns, n_tokens = symbols.shape
    for start in range(0, n_tokens, TILE_TOKENS):
        for column in range(n_columns):
            its_class = column_class[column]
            for token in range(start, min(start + TILE_TOKENS, n_tokens)):
                value = np.int32(symbols[column, token]) - _MAX_SYMBOL
                magnitude = abs(value)
                shift = offsets[activities[token], its_class, 0 if magnitude == 1 else 1]
                sign = np.float32(value > 0) - np.float32(value < 0)
                coefficients[token, column] = sign * (np.float32(magnitude) - shift) * step
