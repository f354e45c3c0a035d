"""Probability tables of quantized coefficients, shared by variance class and by the activity class of a token.

Which activity class a token has is chosen by the encoder, as the one in which the token's symbols cost least, and stored in two
bits. So every symbol is independent of every other once these are known, and they decode side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ..rans import TOTAL, RansTables, cost_bits, normalize_frequencies
from .uniform_quantizer import ESCAPE, MAX_SYMBOL, N_CLASSES, N_SYMBOLS

ESCAPED_BITS = 16.0
"""What a value too large for a symbol is taken to cost beyond the escape: most take two bytes."""
_GAP_BITS = 8.0
"""What a value costs beyond the escape whose symbol has no room in its table: it is small, so one byte."""


@dataclass(frozen=True, eq=False)
class ProbabilityTables:
    """frequencies uint16 [A, C, S], each row summing to 4 096, 0 where a symbol is too rare for one of its own and escapes instead;
    offsets float32 [A, C, 2] as `uniform.dequantize` takes them."""

    frequencies: npt.NDArray[np.uint16]
    offsets: npt.NDArray[np.float32]

    @cached_property
    def costs(self) -> npt.NDArray[np.float32]:
        """Bits of each symbol [A, C, S], escapes with their value."""
        bits = self.rans.costs.reshape(self.frequencies.shape).astype(np.float64)
        bits = np.where(np.isinf(bits), bits[..., ESCAPE:] + _GAP_BITS, bits)
        bits[..., ESCAPE] += ESCAPED_BITS
        return bits.astype(np.float32)

    @cached_property
    def costs_by_activity(self) -> npt.NDArray[np.float32]:
        """The same as [C, S, A]: those of one symbol side by side."""
        return np.ascontiguousarray(self.costs.transpose(1, 2, 0))

    @cached_property
    def rans(self) -> RansTables:
        """The tables as the coder takes them."""
        return RansTables(self.frequencies.reshape(-1, N_SYMBOLS), N_CLASSES, with_gaps=True)

    def token_costs(self, symbols: npt.NDArray[np.uint8], classes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Symbols [n, T], variance classes [n] -> bits [A, T] of each token's symbols in each activity class."""
        return cost_bits(symbols, classes, self.rans, self.costs.reshape(-1, N_SYMBOLS))


def tables_from_counts(counts: npt.NDArray[np.float64]) -> npt.NDArray[np.uint16]:
    """Counts [A, C, S] of symbols, ESCAPE among them -> frequencies. What is expected less than once in 8 192 symbols escapes.

    Zero never does: a table of large values would have nothing but the escape, and no coder takes a single symbol.
    """
    frequencies = np.zeros(counts.shape, np.uint16)
    for index in np.ndindex(counts.shape[:2]):
        row = counts[index].astype(np.float64)
        if not row.any():
            row[MAX_SYMBOL] = 1.0
        rare = row < 0.5 / TOTAL * row.sum()
        rare[[MAX_SYMBOL, ESCAPE]] = False
        row[ESCAPE] += row[rare].sum()
        frequencies[index][~rare] = normalize_frequencies(row[None, ~rare])[0]
    return frequencies
