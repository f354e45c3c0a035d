"""Measured distortion of every possible group: what the dynamic program chooses from (paper, B.17).

For each start i, each block size s and each symbol type, the squared error of quantizing coefficients i .. i+s-1 is measured
by quantizing sample rows exactly as the codec does; no analytic model of the error is used. Sums are kept per row, so tables
of different sample sizes compare.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .quantizer import SymbolType

BLOCK_SIZES = (1, 16, 64, 256, 1024)
SYMBOL_TYPES = (SymbolType.INT2, SymbolType.INT4, SymbolType.FP8)
MAX_SAMPLE_ROWS = 32768

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class DistortionTable:
    """Per-row squared errors: `energy` [r], left when a coefficient is dropped; `errors` [len(types), len(sizes), r], entry
    [t, s, i] left when the group of sizes[s] coefficients from i on is stored as types[t]; infinite where it would pass the end."""

    energy: npt.NDArray[np.float32]
    errors: npt.NDArray[np.float32]
    sizes: tuple[int, ...] = BLOCK_SIZES

    @property
    def rank(self) -> int:
        """r: coefficients covered."""
        return len(self.energy)


def measure_distortion(coefficients: Floats, sizes: tuple[int, ...] = BLOCK_SIZES) -> DistortionTable:
    """Coefficients [n, r] of sample rows (all of them are used) -> table; O(n * r * sum(sizes)) quantizations."""
    from .kernels import measure_groups

    columns = np.ascontiguousarray(coefficients.T, dtype=np.float32)
    rank, n_rows = columns.shape
    errors = np.full((len(SYMBOL_TYPES), len(sizes), rank), np.inf, dtype=np.float64)
    for index, size in enumerate(sizes):
        if size <= rank:
            measured = measure_groups(columns, size)
            errors[:, index, : rank - size + 1] = measured / n_rows
    energy = np.array([np.square(column, dtype=np.float64).mean() for column in columns])
    return DistortionTable(energy.astype(np.float32), errors.astype(np.float32), sizes)
