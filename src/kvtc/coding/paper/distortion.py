"""Measured distortion of every possible group: what the dynamic program chooses from (paper, B.17).

For each start i, each block size s and each symbol type, the squared error of quantizing coefficients i .. i+s-1 is measured
by quantizing sample rows exactly as the codec does; no analytic model of the error is used. Sums are kept per row, so tables
of different sample sizes compare.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from ..threads import in_threads
from .group_quantizer import SymbolType

BLOCK_SIZES = (1, 16, 64, 256, 1024)
SYMBOL_TYPES = (SymbolType.INT2, SymbolType.INT4, SymbolType.FP8)
_ROWS_AT_ONCE = 512

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


def _measure(columns: Floats, size: int, totals: npt.NDArray[np.float64], first: int, stop: int) -> None:
    from .allocation_kernels import measure_groups

    measure_groups(columns, size, first, stop, totals)


def measure_distortion(
    coefficients: Floats | Iterable[Floats], sizes: tuple[int, ...] = BLOCK_SIZES
) -> DistortionTable:
    """Coefficients [n, r] of sample rows, or blocks of such rows one by one -> table; all rows are used.

    O(n * r * sum(sizes)) quantizations; memory of a few hundred rows beyond what is given.
    """
    blocks = iter((coefficients,) if isinstance(coefficients, np.ndarray) else coefficients)
    first = next(blocks)
    rank, n_rows = first.shape[1], 0
    energy = np.zeros(rank)
    errors = np.full((len(SYMBOL_TYPES), len(sizes), rank), np.inf)
    for index, size in enumerate(sizes):
        errors[:, index, : max(0, rank - size + 1)] = 0
    for block in chain([first], blocks):
        n_rows += len(block)
        for start in range(0, len(block), _ROWS_AT_ONCE):
            # Few rows of all coefficients, close together in memory: they stay in a near cache while all groups are measured.
            columns = np.ascontiguousarray(block[start : start + _ROWS_AT_ONCE].T, dtype=np.float32)
            energy += np.square(columns, dtype=np.float64).sum(axis=1)
            for index, size in enumerate(sizes):
                if size <= rank:
                    totals = np.zeros((len(SYMBOL_TYPES), rank - size + 1))
                    in_threads(
                        partial(_measure, columns, size, totals),
                        totals.shape[1],
                        size * columns.size * len(SYMBOL_TYPES),
                    )
                    errors[:, index, : rank - size + 1] += totals
    return DistortionTable((energy / n_rows).astype(np.float32), (errors / n_rows).astype(np.float32), sizes)
