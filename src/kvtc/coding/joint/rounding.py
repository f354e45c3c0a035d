"""Rounding by cost: every coefficient becomes the integer that is cheapest in squared error and bits together.

Rounding to the nearest integer counts the error alone. Where a smaller integer, zero above all, is much more probable, it saves
bits that are worth more elsewhere: as a finer step. One price of a bit makes both comparable (Sullivan and Wiegand 1998,
"Rate-distortion optimization for video compression"). Only an encoder rounds: the decoder is told nothing of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..threads import in_threads
from .probability import ProbabilityTables
from .uniform_quantizer import ESCAPE, MAX_SYMBOL

BIT_PRICE = 2 * log(2) / 12 / 3
"""Squared error, in squared steps, that a bit is worth: a third of what one more bit takes off the error of a fine quantizer. At
that price itself, and at none, predictions of SmolLM2-135M diverge more at equal bytes."""
_OPERATIONS = 32
"""Of one coefficient, about, as `in_threads` counts them."""


@dataclass(frozen=True, eq=False)
class Rounded:
    """Integers by coefficient and token, and what they are coded as.

    large: int32 [n, T], what escapes stand for; set there alone. symbols: uint8 [n, T], `ESCAPE` where there is no room for an
    integer. activities: uint8 [T], the class whose tables each token is coded with. bits: float32 [T], what those tables say the
    token's symbols take.
    """

    large: npt.NDArray[np.int32]
    symbols: npt.NDArray[np.uint8]
    activities: npt.NDArray[np.uint8]
    bits: npt.NDArray[np.float32]

    @property
    def values(self) -> npt.NDArray[np.int32]:
        """int32 [n, T]: the integers."""
        return np.where(self.symbols == ESCAPE, self.large, self.symbols.astype(np.int32) - MAX_SYMBOL)

    def escaped(self, tokens: slice = slice(None)) -> npt.NDArray[np.int32]:
        """Integers of some tokens that escape, by coefficient and token."""
        symbols = self.symbols[:, tokens]
        places = np.flatnonzero(symbols == ESCAPE)
        columns, found = np.divmod(places, max(1, symbols.shape[1]))
        return self.large[:, tokens][columns, found]


def round_coefficients(
    coefficients: Tensor, step: float, classes: npt.NDArray[np.uint8], tables: ProbabilityTables
) -> Rounded:
    """Coefficients [T, r] float32, variance classes [n] of the first n, which are coded -> their integers.

    A token's activity class is the one in which its integers cost least when they are rounded by error alone; then each
    integer is chosen among zero and the two next to the coefficient, by distance from what it decodes to and by bits.
    """
    n_tokens, n_columns = len(coefficients), len(classes)
    large, symbols = np.empty((n_columns, n_tokens), np.int32), np.empty((n_columns, n_tokens), np.uint8)
    activities, bits = np.zeros(n_tokens, np.uint8), np.zeros(n_tokens, np.float32)
    if symbols.size:
        from .rounding_kernels import TILE_TOKENS, round_tokens

        rows = coefficients.detach().cpu().contiguous().numpy()
        of_tables = tables.costs_by_activity, tables.frequencies, tables.offsets
        found = large, symbols, activities, bits

        def work(first: int, stop: int) -> None:
            last = min(stop * TILE_TOKENS, n_tokens)
            start = first * TILE_TOKENS
            round_tokens(rows, np.float32(step), classes, *of_tables, np.float32(BIT_PRICE), start, last, found)

        in_threads(work, -(-n_tokens // TILE_TOKENS), _OPERATIONS * symbols.size)
    return Rounded(large, symbols, activities, bits)
