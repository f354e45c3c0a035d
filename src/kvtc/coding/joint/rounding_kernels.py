"""The loops between coefficients and symbols, compiled by numba; imported where they are first needed, as `kernels` is.

Tokens are taken 16 at a time, so that rows of coefficients and columns of symbols are both read and written by cache lines.
"""

from __future__ import annotations

import numpy as np

from ..compilation import compiled
from .uniform_quantizer import ESCAPE, MAX_MAGNITUDE, MAX_SYMBOL, N_ACTIVITIES, ROUNDING

TILE_TOKENS = 16
_TILE_COLUMNS = 64
_MARGIN = 1e-3
_ALL_BUT_SIGN = np.uint32(0x7FFFFFFF)
_ZERO = np.uint8(MAX_SYMBOL)
_ESCAPE = np.uint8(ESCAPE)
_MAX_SYMBOL = np.int32(MAX_SYMBOL)
_PAST_SYMBOLS = np.float32(MAX_SYMBOL + 1)
_MAX_MAGNITUDE = np.float32(MAX_MAGNITUDE)
_ROUNDING = np.float32(ROUNDING)


@compiled(nogil=True)
def round_tokens(coefficients, step, column_class, costs, rooms, offsets, bit_price, first, stop, found):  # type: ignore[no-untyped-def]
    """Integers of the tokens first .. stop, `first` a multiple of 16 (`rounding.round_coefficients`).

    coefficients: float32 [T, r or more]. costs: float32 [C, S, A], bits. rooms: uint16 [A, C, S], 0 where a symbol escapes.
    offsets: float32 [A, C, 2]. `found` is filled: large int32 [n, T], where a symbol is the escape; symbols uint8 [n, T],
    activities uint8 [T], bits float32 [T].

    Most tiles of most columns are zeros alone: that is seen, and counted, for 16 tokens at once.
    """
    large, symbols, activities, bits = found
    n_columns = len(column_class)
    limits = _zero_limits(costs, rooms, offsets, bit_price)
    tile = np.zeros((n_columns, TILE_TOKENS), np.float32)
    patterns = tile.view(np.uint32)
    peak = np.zeros(1, np.uint32)
    highest = peak.view(np.float32)
    totals = np.zeros((N_ACTIVITIES, TILE_TOKENS), np.float32)
    its_activities = np.zeros(TILE_TOKENS, np.uint8)
    sums, zero_bits = np.zeros(TILE_TOKENS, np.float32), np.zeros(TILE_TOKENS, np.float32)
    limit = np.zeros(TILE_TOKENS, np.float32)
    for start in range(first, stop, TILE_TOKENS):
        n = min(TILE_TOKENS, stop - start)
        if n < TILE_TOKENS:
            tile[:] = np.float32(0)
        for column in range(0, n_columns, _TILE_COLUMNS):
            last_column = min(column + _TILE_COLUMNS, n_columns)
            for token in range(n):
                for place in range(column, last_column):
                    tile[place, token] = coefficients[start + token, place] / step
        totals[:] = np.float32(0)
        for column in range(n_columns):
            of_class = costs[column_class[column]]
            most = np.uint32(0)
            for token in range(TILE_TOKENS):
                most = max(most, patterns[column, token] & _ALL_BUT_SIGN)
            peak[0] = most
            if highest[0] + _ROUNDING < np.float32(1):
                for activity in range(N_ACTIVITIES):
                    of_zero = of_class[_MAX_SYMBOL, activity]
                    for token in range(TILE_TOKENS):
                        totals[activity, token] += of_zero
                continue
            for token in range(n):
                scaled = tile[column, token]
                magnitude = min(np.floor(abs(scaled) + _ROUNDING), _MAX_MAGNITUDE)
                symbol = _MAX_SYMBOL + (np.int32(magnitude) if scaled > 0 else -np.int32(magnitude))
                of_symbol = of_class[ESCAPE if magnitude > _MAX_SYMBOL else symbol]
                for activity in range(N_ACTIVITIES):
                    totals[activity, token] += of_symbol[activity]
        for token in range(n):
            cheapest = 0
            for activity in range(1, N_ACTIVITIES):
                if totals[activity, token] < totals[cheapest, token]:
                    cheapest = activity
            its_activities[token] = cheapest
            activities[start + token] = cheapest
        sums[:] = np.float32(0)
        last = -1
        for column in range(n_columns):
            its_class = column_class[column]
            of_class = costs[its_class]
            if its_class != last:
                last = its_class
                for token in range(TILE_TOKENS):
                    zero_bits[token] = of_class[_MAX_SYMBOL, its_activities[token]]
                    limit[token] = limits[its_class, its_activities[token]]
            n_others = np.int32(0)
            for token in range(TILE_TOKENS):
                n_others += np.int32(abs(tile[column, token]) >= limit[token])
            if n_others == 0:
                for token in range(TILE_TOKENS):
                    sums[token] += zero_bits[token]
                if n == TILE_TOKENS:
                    for token in range(TILE_TOKENS):
                        symbols[column, start + token] = _ZERO
                else:
                    for token in range(n):
                        symbols[column, start + token] = _ZERO
                continue
            for token in range(n):
                activity = its_activities[token]
                scaled = tile[column, token]
                magnitude = abs(scaled)
                if magnitude < limit[token]:
                    sums[token] += zero_bits[token]
                    symbols[column, start + token] = _ZERO
                    continue
                below = np.int32(min(magnitude, _PAST_SYMBOLS))
                sign = np.int32(-1) if scaled < 0 else np.int32(1)
                if below < _MAX_SYMBOL:
                    shifts = offsets[activity, its_class]
                    best = np.int32(0)
                    best_bits = zero_bits[token]
                    least = magnitude * magnitude + bit_price * best_bits
                    for candidate in range(max(below, np.int32(1)), below + np.int32(2)):
                        error = magnitude - (np.float32(candidate) - shifts[0 if candidate == 1 else 1])
                        its_bits = of_class[_MAX_SYMBOL + sign * candidate, activity]
                        price = error * error + bit_price * its_bits
                        if price < least:
                            least, best, best_bits = price, sign * np.int32(candidate), its_bits
                    sums[token] += best_bits
                    symbol = np.int32(_ESCAPE) if abs(best) > _MAX_SYMBOL else np.int32(_MAX_SYMBOL) + best
                else:
                    best = sign * np.int32(min(np.floor(magnitude + _ROUNDING), _MAX_MAGNITUDE))
                    symbol = np.int32(_ESCAPE) if abs(best) > _MAX_SYMBOL else np.int32(_MAX_SYMBOL) + best
                    sums[token] += of_class[symbol, activity]
                if rooms[activity, its_class, symbol] == 0:
                    symbol = np.int32(_ESCAPE)
                if symbol == _ESCAPE:
                    large[column, start + token] = best
                symbols[column, start + token] = np.uint8(symbol)
        for token in range(n):
            bits[start + token] = sums[token]


@compiled(nogil=True)
def _zero_limits(costs, rooms, offsets, bit_price):  # type: ignore[no-untyped-def]
    """float32 [C, A]: below which magnitude, in steps, zero is certainly the cheapest; 0 where that cannot be said.

    Between zero and one it is where their prices meet, and a little less than that, for prices are rounded.
    """
    n_classes = costs.shape[0]
    limits = np.zeros((n_classes, N_ACTIVITIES), np.float32)
    for its_class in range(n_classes):
        for activity in range(N_ACTIVITIES):
            one = 1.0 - np.float64(offsets[activity, its_class, 0])
            if one < 0.25 or one > 2 or rooms[activity, its_class, _MAX_SYMBOL] == 0:
                continue
            of_zero = np.float64(costs[its_class, _MAX_SYMBOL, activity])
            cheaper = min(costs[its_class, _MAX_SYMBOL - 1, activity], costs[its_class, _MAX_SYMBOL + 1, activity])
            meet = (one * one + bit_price * (np.float64(cheaper) - of_zero)) / (2 * one)
            limits[its_class, activity] = max(0.0, min(meet - _MARGIN, 0.99))
    return limits


@compiled(nogil=True)
def dequantize_symbols(symbols, column_class, activities, offsets, step, turned, start, escapes):  # type: ignore[no-untyped-def]
    """Symbols uint8 [n, t] -> coefficients (`uniform_quantizer.dequantize`), and how many escapes are among them.

    They go to turned float32 [n or more, T], from token `start` on. The escapes' places, column t + token, rising, are put at
    the beginning of escapes int64, as far as it has room; what stands there is something that the caller replaces.
    """
    n_columns, n_tokens = symbols.shape
    ones, others = np.empty(n_tokens, np.float32), np.empty(n_tokens, np.float32)
    n_escapes = 0
    last = -1
    for column in range(n_columns):
        its_class = column_class[column]
        if its_class != last:
            last = its_class
            for token in range(n_tokens):
                ones[token] = offsets[activities[token], its_class, 0]
                others[token] = offsets[activities[token], its_class, 1]
        its_symbols, found = symbols[column], turned[column, start : start + n_tokens]
        most = np.uint8(0)
        for token in range(n_tokens):
            symbol = its_symbols[token]
            most = max(most, symbol)
            value = np.int32(symbol) - _MAX_SYMBOL
            magnitude = abs(value)
            shift = ones[token] if magnitude == 1 else others[token]
            sign = np.float32(value > 0) - np.float32(value < 0)
            found[token] = sign * (np.float32(magnitude) - shift) * step
        if most == _ESCAPE:
            for token in range(n_tokens):
                if its_symbols[token] == _ESCAPE:
                    if n_escapes < len(escapes):
                        escapes[n_escapes] = column * n_tokens + token
                    n_escapes += 1
    return n_escapes


@compiled(nogil=True)
def divide_columns(turned, divisors, first, stop):  # type: ignore[no-untyped-def]
    """turned float32 [n, T], some rows of it changed in place: each token over its divisor [T]."""
    for column in range(first, stop):
        values = turned[column]
        for token in range(len(divisors)):
            values[token] = values[token] / divisors[token]


@compiled(nogil=True)
def multiply_rows(rows, factors, first, stop):  # type: ignore[no-untyped-def]
    """rows float32 [T, n], some of them changed in place: each times its factor [T]."""
    for token in range(first, stop):
        values, factor = rows[token], factors[token]
        for column in range(len(values)):
            values[column] = values[column] * factor
