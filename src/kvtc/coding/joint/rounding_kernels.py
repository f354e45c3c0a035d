"""The loop of rounding by cost, compiled by numba; imported where it is first needed, as `kernels` is."""

from __future__ import annotations

import numpy as np

from ..compilation import compiled
from .uniform_quantizer import ESCAPE, MAX_SYMBOL

_ESCAPE = np.int32(ESCAPE)
_MAX_SYMBOL = np.int32(MAX_SYMBOL)


@compiled(nogil=True)
def choose_integers(scaled, column_class, token_class, costs, offsets, bit_price, values, bits):  # type: ignore[no-untyped-def]
    """Replace `values`, int32 [n_columns, n_tokens], by the cheapest integers; add their cost to `bits`, float32 [n_tokens].

    scaled: float32, coefficients over the step. costs: float32 [A, C, S]. offsets: float32 [A, C, 2]. What is beyond the
    symbols stays as it is.
    """
    n_columns, n_tokens = scaled.shape
    for column in range(n_columns):
        for token in range(n_tokens):
            of_symbol = costs[token_class[token], column_class[column]]
            magnitude = abs(scaled[column, token])
            below = np.int32(min(magnitude, np.float32(_MAX_SYMBOL + 1)))
            if below >= _MAX_SYMBOL:
                is_escape = abs(values[column, token]) > _MAX_SYMBOL
                bits[token] += of_symbol[_ESCAPE if is_escape else _MAX_SYMBOL + values[column, token]]
                continue
            shifts = offsets[token_class[token], column_class[column]]
            sign = np.int32(-1) if scaled[column, token] < 0 else np.int32(1)
            best = np.int32(0)
            best_bits = of_symbol[_MAX_SYMBOL]
            least = magnitude * magnitude + bit_price * best_bits
            for candidate in range(max(below, np.int32(1)), below + np.int32(2)):
                error = magnitude - (np.float32(candidate) - shifts[0 if candidate == 1 else 1])
                its_bits = of_symbol[_MAX_SYMBOL + sign * candidate]
                price = error * error + bit_price * its_bits
                if price < least:
                    least, best, best_bits = price, np.int32(candidate), its_bits
            values[column, token] = sign * best
            bits[token] += best_bits
