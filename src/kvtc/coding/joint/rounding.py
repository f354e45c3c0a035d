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

from .probability import ProbabilityTables
from .uniform_quantizer import quantize, to_symbols

BIT_PRICE = 2 * log(2) / 12
"""Squared error, in squared steps, that a bit is worth: what one more bit takes off the error of a fine quantizer, 1/12."""


@dataclass(frozen=True, eq=False)
class Rounded:
    """values int32 [n, T] by coefficient and token; activities uint8 [T], the class whose tables each token is coded with; bits
    float32 [T], what those tables say the token's symbols take."""

    values: npt.NDArray[np.int32]
    activities: npt.NDArray[np.uint8]
    bits: npt.NDArray[np.float32]


def round_coefficients(
    coefficients: Tensor, step: float, classes: npt.NDArray[np.uint8], tables: ProbabilityTables
) -> Rounded:
    """Coefficients [T, r] float32, variance classes [n] of the first n, which are coded -> their integers.

    A token's activity class is the one in which its integers cost least when they are rounded by error alone; then each
    integer is chosen among zero and the two next to the coefficient, by distance from what it decodes to and by bits.
    """
    used = coefficients[:, : len(classes)]
    values = np.ascontiguousarray(quantize(used, step).cpu().numpy().T)
    activities = tables.token_costs(to_symbols(values), classes).argmin(axis=0).astype(np.uint8)
    bits = np.zeros(len(activities), np.float32)
    if values.size:
        from .rounding_kernels import choose_integers

        scaled = np.ascontiguousarray((used / step).cpu().numpy().T)
        choose_integers(scaled, classes, activities, tables.costs, tables.offsets, np.float32(BIT_PRICE), values, bits)
    return Rounded(values, activities, bits)
