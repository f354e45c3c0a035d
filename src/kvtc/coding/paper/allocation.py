"""Bit allocation: which consecutive coefficients share a group, and how many bits its symbols get (paper, B.17).

`allocate_bits` is the exact dynamic program: over all ways to cut the coefficients into groups of the allowed sizes, each
stored as int2, int4, fp8 or not at all, it finds the least measured error within a budget of bits a row. Dropping is offered
one coefficient at a time: larger dropped groups cost nothing either, so they are runs of these and the optimum is the same.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from ...errors import CorruptStream, InvalidArgument
from .distortion import SYMBOL_TYPES, DistortionTable
from .group_quantizer import SymbolType

_COUNT, _RUN = struct.Struct("<H"), struct.Struct("<IHHB")


@dataclass(frozen=True)
class Run:
    """`count` neighbouring groups of `size` coefficients each, all stored as `symbol_type`, the first at `start`."""

    start: int
    size: int
    count: int
    symbol_type: SymbolType

    @property
    def stop(self) -> int:
        """One past the last coefficient."""
        return self.start + self.size * self.count

    @property
    def bits_per_row(self) -> int:
        """Bits of a token, shifts and scales included."""
        return self.count * self.symbol_type.group_bits(self.size)


@dataclass(frozen=True)
class BitAllocation:
    """Runs of groups in ascending order; coefficients between and after them are dropped (decoded as zero)."""

    runs: tuple[Run, ...]

    @property
    def bits_per_row(self) -> int:
        """Bits of a token before lossless coding."""
        return sum(run.bits_per_row for run in self.runs)

    @property
    def n_coefficients(self) -> int:
        """Columns of the basis that are ever used: one past the last stored coefficient."""
        return self.runs[-1].stop if self.runs else 0

    def bits_per_coefficient(self, rank: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Bits a token spends on each of `rank` coefficients, [rank] float64; a group's 32 shared bits are spread evenly."""
        bits = np.zeros(rank)
        for run in self.runs:
            bits[run.start : run.stop] = run.symbol_type.group_bits(run.size) / run.size
        return bits

    def to_bytes(self) -> bytes:
        """uint16 count of runs, then per run uint32 start, uint16 size, uint16 count, uint8 symbol bits (little-endian)."""
        parts = [_COUNT.pack(len(self.runs))]
        parts += [_RUN.pack(run.start, run.size, run.count, run.symbol_type) for run in self.runs]
        return b"".join(parts)

    @classmethod
    def from_bytes(cls, data: bytes, offset: int, rank: int) -> tuple[BitAllocation, int]:
        """Parse at `offset`, checking order and bounds against `rank`; returns the allocation and where it ends."""
        if offset + _COUNT.size > len(data):
            raise CorruptStream("the bit allocation ends early")
        (n_runs,) = _COUNT.unpack_from(data, offset)
        offset += _COUNT.size
        if offset + _RUN.size * n_runs > len(data):
            raise CorruptStream(f"the bit allocation claims {n_runs} runs in {len(data) - offset} bytes")
        runs, covered = [], 0
        for _ in range(n_runs):
            start, size, count, bits = _RUN.unpack_from(data, offset)
            offset += _RUN.size
            if bits not in (2, 4, 8, 16) or size == 0 or count == 0 or start < covered or start + size * count > rank:
                raise CorruptStream(
                    f"the bit allocation holds a run of {count} x {size} coefficients at {start} with {bits} bits; "
                    f"expected ascending runs of 2, 4, 8 or 16 bits within {rank} coefficients"
                )
            runs.append(Run(start, size, count, SymbolType(bits)))
            covered = runs[-1].stop
        return cls(tuple(runs)), offset


def most_bytes(rank: int) -> int:
    """Bytes that no allocation over `rank` coefficients exceeds: each run holds one of them at least."""
    return _COUNT.size + _RUN.size * min(rank, 0xFFFF)


def allocate_bits(table: DistortionTable, budget_bits: int) -> BitAllocation:
    """The allocation of least error within `budget_bits` a row; exact. Time O(r * budget).

    Memory: r * budget / 2 bytes of choices and 4 * budget bytes for each coefficient of the largest group (1024 at most)."""
    return _trace(table, *_solve(table, budget_bits))


def allocate_bits_for_error(table: DistortionTable, max_error: float, max_bits: int) -> BitAllocation:
    """The cheapest allocation whose per-row squared error is at most `max_error`; `InvalidArgument` past `max_bits` a row."""
    budget = min(256, max_bits)
    while True:
        best, choices, unit = _solve(table, budget)
        enough = np.flatnonzero(best <= max_error)
        if enough.size:
            return _trace(table, best[: enough[0] + 1], choices, unit)
        if budget >= max_bits:
            raise InvalidArgument(
                f"a squared error of {max_error:.6g} a row cannot be met: the least within {max_bits} bits is {best[-1]:.6g}"
            )
        budget = min(2 * budget, max_bits)


def truncate(rank: int, budget_bits: int) -> BitAllocation:
    """The baseline of the paper's table 15: the leading coefficients in 16 bits each, the rest dropped."""
    kept = min(rank, budget_bits // SymbolType.FP16.group_bits(1))
    runs: list[Run] = []
    while kept > 0:
        count = min(kept, 0xFFFF)
        runs.append(Run(sum(run.count for run in runs), 1, count, SymbolType.FP16))
        kept -= count
    return BitAllocation(tuple(runs))


def distortion_of(allocation: BitAllocation, table: DistortionTable) -> float:
    """Per-row squared error that the table measured for an allocation of its own groups."""
    total = float(np.sum(table.energy, dtype=np.float64))
    for run in allocation.runs:
        for start in range(run.start, run.stop, run.size):
            kept = float(np.sum(table.energy[start : start + run.size], dtype=np.float64))
            error = table.errors[SYMBOL_TYPES.index(run.symbol_type), table.sizes.index(run.size), start]
            total += float(error) - kept
    return total


def _solve(table: DistortionTable, budget_bits: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], int]:
    """Least error for every budget [units + 1], the choice behind each state [r + 1, units + 1], and the bits of a unit."""
    from .allocation_kernels import fill_states

    if budget_bits < 0:
        raise InvalidArgument(f"a bit budget cannot be negative; got {budget_bits}")
    costs = [t.group_bits(size) for t in SYMBOL_TYPES for size in table.sizes]
    unit = math.gcd(*costs)
    # Budgets past the dearest price of every coefficient change nothing; cutting them off bounds memory.
    most = table.rank * max(SymbolType.FP8.group_bits(size) // size + 1 for size in table.sizes)
    units = min(budget_bits, most) // unit
    errors = table.errors.reshape(len(costs), table.rank).astype(np.float64)
    sizes = np.array([size for _ in SYMBOL_TYPES for size in table.sizes])
    best, choices = fill_states(errors, table.energy.astype(np.float64), sizes, np.array(costs) // unit, units)
    return best, choices, unit


def _trace(
    table: DistortionTable, best: np.ndarray[Any, Any], choices: np.ndarray[Any, Any], unit: int
) -> BitAllocation:
    """Walk back from the last state; equal neighbouring groups become one run."""
    groups: list[tuple[int, int, SymbolType]] = []
    position, left = table.rank, len(best) - 1
    while position:
        choice = int(choices[position, left])
        if choice == 0:
            position -= 1
            continue
        symbol_type, size = SYMBOL_TYPES[(choice - 1) // len(table.sizes)], table.sizes[(choice - 1) % len(table.sizes)]
        position -= size
        left -= symbol_type.group_bits(size) // unit
        groups.append((position, size, symbol_type))
    return BitAllocation(tuple(_runs(groups[::-1])))


def _runs(groups: Sequence[tuple[int, int, SymbolType]]) -> list[Run]:
    """Neighbouring groups of one size and type -> runs of at most 65535 groups."""
    runs: list[Run] = []
    # Within a run, start minus index times size is constant: a dropped coefficient between groups begins a new run.
    for _, members in groupby(enumerate(groups), key=lambda item: (item[1][1:], item[1][0] - item[0] * item[1][1])):
        run = [group for _, group in members]
        for first in range(0, len(run), 0xFFFF):
            part = run[first : first + 0xFFFF]
            runs.append(Run(part[0][0], part[0][1], len(part), part[0][2]))
    return runs
