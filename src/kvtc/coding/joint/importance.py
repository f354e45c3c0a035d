"""Steps by token: tokens on which predictions depend more are quantized with a finer step.

How strongly predictions depend on a token differs by orders of magnitude. A linear function of the token's row tells a third of
the variance of its logarithm (SmolLM2-135M, other texts than those it was fitted to). The encoder rounds what it tells to one of
sixteen levels, half an octave of the step apart, multiplies the token's coefficients accordingly, and stores the level; the decoder
divides.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..product import Columns
from ..threads import in_threads

LEVEL_BITS = 4
N_LEVELS = 1 << LEVEL_BITS
MIDDLE_LEVEL = N_LEVELS // 2
_ROOT_OF_HALF = 0.7071067811865476
# Literals and powers of two, because powers from a mathematics library may differ in the last digit.
FACTORS = tuple(2.0 ** (level // 2 - 4) * (2 * _ROOT_OF_HALF if level % 2 else 1.0) for level in range(N_LEVELS))
"""What coefficients of each level are multiplied by; 1 in the middle."""

_OPERATIONS = 8
"""Of one coefficient, about, as `in_threads` counts them."""


@dataclass(frozen=True, eq=False)
class Importance:
    """weights float32 [P + 1]: from joint rows, and 1, to levels above the middle."""

    weights: Tensor

    def levels(self, rows: Tensor) -> Tensor:
        """Joint rows [T, P] -> uint8 [T]."""
        found = self._columns.times(rows, self.weights[-1:])[:, 0]
        return (found + MIDDLE_LEVEL).nan_to_num().round().clamp(0, N_LEVELS - 1).to(torch.uint8)

    def to(self, device: torch.device) -> Importance:
        """The same on a device."""
        return Importance(self.weights.to(device))

    @cached_property
    def _columns(self) -> Columns:
        return Columns(self.weights[:-1, None])


def factors(levels: Tensor) -> Tensor:
    """Levels uint8 [T] -> float32 [T, 1]."""
    return torch.tensor(FACTORS, dtype=torch.float32, device=levels.device)[levels.long()][:, None]


def multiply(coefficients: Tensor, levels: Tensor) -> None:
    """Coefficients [T, n] float32, changed in place, times the factors of their tokens' levels, uint8 [T]."""
    if coefficients.device.type != "cpu":
        coefficients *= factors(levels)
        return
    from .rounding_kernels import multiply_rows

    rows, its_factors = coefficients.numpy(), np.array(FACTORS, np.float32)[levels.numpy()]
    in_threads(lambda *some: multiply_rows(rows, its_factors, *some), len(rows), _OPERATIONS * rows.size)


def divide(coefficients: Tensor, levels: Tensor) -> None:
    """Coefficients [T, n] float32, changed in place, over the factors of their tokens' levels, uint8 [T] on the CPU."""
    if coefficients.device.type != "cpu":
        coefficients /= factors(levels.to(coefficients.device))
        return
    from .rounding_kernels import divide_columns

    turned, divisors = coefficients.numpy().T, np.array(FACTORS, np.float32)[levels.numpy()]
    in_threads(lambda *columns: divide_columns(turned, divisors, *columns), len(turned), _OPERATIONS * turned.size)
