"""Interleaved rANS: symbols to bytes at the cost that their frequency tables promise, and back.

Each symbol has a table of frequencies out of 4096, chosen by the class of its token and the class of its column. `count_lanes`
lanes, up to 32, share one stream of 16-bit words; lane l codes the tokens l, l + n_lanes, l + 2 n_lanes, ... Decoding goes through
blocks of n_lanes tokens, in a block through the columns, in a column through the lanes: the lanes of a GPU's warp advance
together, and all they share is the place in the stream.

Coded bytes: one state a lane (uint32, low byte first), then the words (uint16, low byte first) in the order they are read in.
A lane starts decoding at its state x, at least 2**16, and for every symbol

    slot = x % 4096; symbol = the one whose interval [first, first + frequency) of its table holds the slot
    x = frequency * (x // 4096) + slot - first
    if x < 2**16: x = 2**16 * x + next word

It ends at x = 2**16, where encoding started, with no word left: most damage shows. The fixed cost against the tables' cross
entropy is 16 to 32 bits a lane, 24 on average, at most 0.0024 bits a symbol where there are several; all else costs less than
0.01 %.
"""

from __future__ import annotations

from functools import cache, cached_property
from math import fsum, log2
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CorruptStream, InvalidArgument, KvtcError

TOTAL = 4096
LANES = 32
SYMBOLS_A_LANE = 10 * 1024
LOWER_BOUND = 1 << 16
MAX_TABLES = 1 << 16

Symbols = npt.NDArray[np.uint8]
Classes = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]


class RansTables:
    """Checked frequency tables, and what encoding and decoding derive from them when they first need it.

    frequencies: uint16 [n_tables, n_symbols], 2 to 256 symbols, every entry at least 1, every row sums to 4096; kept as a
    read-only copy. Table token_class * n_classes + column_class is for that pair. Anything else raises `error`. with_gaps: entries
    of 0 are fine too, up to 4095 in another; encoding such a symbol raises `InvalidArgument`.
    """

    def __init__(
        self,
        frequencies: npt.NDArray[np.uint16],
        n_classes: int,
        error: type[KvtcError] = InvalidArgument,
        *,
        with_gaps: bool = False,
    ) -> None:
        if frequencies.dtype != np.uint16 or frequencies.ndim != 2:
            raise error(f"frequencies are uint16 [tables, symbols], not {frequencies.dtype} {frequencies.shape}")
        n_tables, n_symbols = frequencies.shape
        if not 2 <= n_symbols <= 256:
            raise error(f"a frequency table has 2 to 256 symbols, not {n_symbols}")
        if n_classes < 1 or not 1 <= n_tables <= MAX_TABLES or n_tables % n_classes:
            raise error(
                f"{n_tables} frequency tables for {n_classes} column classes; expected a multiple, at most {MAX_TABLES}"
            )
        sums = frequencies.sum(axis=1, dtype=np.int64)
        lowest, highest = frequencies.min(axis=1), frequencies.max(axis=1)
        least = 0 if with_gaps else 1
        wrong = np.flatnonzero((sums != TOTAL) | (lowest < least) | (highest >= TOTAL))
        if len(wrong):
            row = wrong[0]
            raise error(
                f"frequency table {row} has entries from {lowest[row]} to {highest[row]} that sum to {sums[row]}; "
                f"expected {least} to {TOTAL - 1}, sum {TOTAL}"
            )
        self.frequencies = frequencies.copy(order="C")
        self.frequencies.flags.writeable = False
        self.n_classes = n_classes

    @property
    def n_tables(self) -> int:
        """Tables: token classes times column classes."""
        return int(self.frequencies.shape[0])

    @property
    def n_symbols(self) -> int:
        """Symbols of every table."""
        return int(self.frequencies.shape[1])

    @property
    def n_token_classes(self) -> int:
        """Token classes: what the tables are a multiple of `n_classes` by."""
        return self.n_tables // self.n_classes

    @cached_property
    def first_slots(self) -> npt.NDArray[np.uint32]:
        """uint32 [n_tables, n_symbols]: where each symbol's interval of the 4096 slots begins."""
        return np.cumsum(self.frequencies, axis=1, dtype=np.uint32) - self.frequencies

    @cached_property
    def entries(self) -> npt.NDArray[np.uint32]:
        """uint32 [n_tables, n_symbols]: the frequency in the low 16 bits, the first slot above, bit 31 where the frequency is 0."""
        gaps = (self.frequencies == 0).astype(np.uint32) << np.uint32(31)
        entries: npt.NDArray[np.uint32] = self.frequencies | self.first_slots << np.uint32(16) | gaps
        return entries

    @cached_property
    def reciprocals(self) -> npt.NDArray[np.uint64]:
        """uint64 [n_tables, n_symbols]: (2**44 - 1) // frequency, by which encoding divides; some number where it is 0."""
        return np.uint64(2**44 - 1) // np.maximum(self.frequencies, 1).astype(np.uint64)

    @cached_property
    def slots(self) -> npt.NDArray[np.uint8]:
        """uint8 [n_tables, 4096]: the symbol of each slot.

        Its entry is looked up by it: these bytes and a table's few entries fit a cache that an entry for every slot does not.
        """
        symbols = np.tile(np.arange(self.n_symbols, dtype=np.uint8), self.n_tables)
        return np.repeat(symbols, self.frequencies.reshape(-1)).reshape(self.n_tables, TOTAL)

    @cached_property
    def costs(self) -> npt.NDArray[np.float32]:
        """float32 [n_tables, n_symbols]: bits a symbol costs, infinite in a gap."""
        bits: npt.NDArray[np.float32] = _frequency_bits()[self.frequencies].astype(np.float32)
        return bits


def normalize_frequencies(
    counts: npt.NDArray[np.floating[Any]] | npt.NDArray[np.integer[Any]],
) -> npt.NDArray[np.uint16]:
    """Counts [n_tables, n_symbols], finite and not negative -> uint16 rows for `RansTables`; none costs the counts less bits.

    Symbols without a count get 1, and a row without counts becomes uniform. The same counts give the same rows everywhere.
    """
    if counts.ndim != 2 or not 2 <= counts.shape[1] <= 256:
        raise InvalidArgument(f"counts are [tables, 2 to 256 symbols], not {counts.shape}")
    weights = counts.astype(np.float64)
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise InvalidArgument("counts are finite and not negative")
    return np.array([_normalize(row, _savings()) for row in weights], np.uint16).reshape(counts.shape)


def count_lanes(n_columns: int, n_tokens: int) -> int:
    """Lanes that share the symbols: the largest power of two up to 32, up to the tokens and up to one for 10 240 symbols; else 1.

    So a lane's fixed cost is small beside its symbols, and a whole number of chunks fills a GPU's warp. 0 for no symbols.
    """
    n_symbols = n_columns * n_tokens
    most = min(LANES, n_tokens, max(1, n_symbols // SYMBOLS_A_LANE))
    return 1 << (most.bit_length() - 1) if n_symbols else 0


def encode_symbols(symbols: Symbols, column_class: Classes, token_class: Symbols, tables: RansTables) -> bytes:
    """Symbols uint8 [n_columns, n_tokens] with the classes [n_columns] and [n_tokens] -> coded bytes; b"" for no symbols."""
    _check_symbols(symbols, tables)
    columns, tokens = _check_classes(column_class, token_class, tables, InvalidArgument)
    if symbols.shape != (len(columns), len(tokens)):
        raise InvalidArgument(
            f"symbols {symbols.shape} with classes of {len(columns)} columns and {len(tokens)} tokens"
        )
    if not symbols.size:
        return b""
    from .rans_kernels import encode_lanes

    states = np.full(count_lanes(*symbols.shape), LOWER_BOUND, np.uint32)
    # A symbol writes one word at most, and one place is written in vain; what stays untouched of this takes address space only.
    words = np.empty(symbols.size + 1, np.uint16)
    start = encode_lanes(
        _plain(symbols), columns, tokens, tables.entries, tables.reciprocals, tables.n_classes, states, words
    )
    if start > words.size:
        raise InvalidArgument("a symbol has frequency 0 in its table: it cannot be coded")
    return bytes(states.astype("<u4").tobytes() + words[int(start) :].astype("<u2").tobytes())


def decode_symbols(
    data: bytes | bytearray | memoryview, column_class: Classes, token_class: Symbols, tables: RansTables
) -> Symbols:
    """Inverse of `encode_symbols`: coded bytes -> symbols uint8 [n_columns, n_tokens].

    Raises `CorruptStream` where `data` is nothing that `encode_symbols` writes, and for a token class without tables.
    """
    columns, tokens = _check_classes(column_class, token_class, tables, CorruptStream)
    symbols = np.empty((len(columns), len(tokens)), np.uint8)
    n_lanes = count_lanes(*symbols.shape)
    n_words = count_words(len(data), *symbols.shape)
    if not symbols.size:
        return symbols
    states = np.frombuffer(data, "<u4", n_lanes).astype(np.uint32)
    check_starts(states)
    from .rans_kernels import decode_lanes

    # The kernel looks for the end once a column, up to one word a lane too late.
    words = np.zeros(n_words + n_lanes, np.uint16)
    words[:n_words] = np.frombuffer(data, "<u2", n_words, 4 * n_lanes)
    n_read = decode_lanes(
        words, n_words, states, columns, tokens, tables.slots, tables.entries, tables.n_classes, symbols
    )
    check_ends(states, int(n_read), n_words)
    return symbols


def count_words(n_bytes: int, n_columns: int, n_tokens: int) -> int:
    """Words after the states in `n_bytes` coded bytes; `CorruptStream` if no such symbols take as many bytes."""
    least = 4 * count_lanes(n_columns, n_tokens)
    most = least + 2 * n_columns * n_tokens
    if n_bytes % 2 or not least <= n_bytes <= most:
        raise CorruptStream(f"{n_bytes} bytes of coded symbols; expected an even number from {least} to {most}")
    return (n_bytes - least) // 2


def check_starts(states: npt.NDArray[np.uint32]) -> None:
    """`CorruptStream` unless lanes may start decoding at these states [n_lanes]."""
    if int(states.min()) < LOWER_BOUND:
        raise CorruptStream(f"a coder's state starts at {states.min()}; expected at least {LOWER_BOUND}")


def check_ends(states: npt.NDArray[np.uint32], n_read: int, n_words: int) -> None:
    """`CorruptStream` unless all words are read and the states [n_lanes] are back where encoding started."""
    if n_read != n_words:
        found = f"only {n_read}" if n_read < n_words else "more"
        raise CorruptStream(f"{n_words} words of coded symbols are stored; decoding read {found}")
    wrong = np.flatnonzero(states != LOWER_BOUND)
    if len(wrong):
        raise CorruptStream(f"the coder of lane {wrong[0]} ends at state {states[wrong[0]]}; expected {LOWER_BOUND}")


def cost_bits(
    symbols: Symbols, column_class: Classes, tables: RansTables, costs: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.float32]:
    """Symbols uint8 [n_columns, n_tokens] -> float32 [n_token_classes, n_tokens]: bits each token would take in each class.

    costs [n_tables, n_symbols]: bits of each symbol where they are not those of the tables alone.
    """
    _check_symbols(symbols, tables)
    columns, _ = _check_classes(column_class, np.zeros(0, np.uint8), tables, InvalidArgument)
    if len(symbols) != len(columns):
        raise InvalidArgument(f"symbols {symbols.shape} with classes of {len(columns)} columns")
    from .rans_kernels import add_costs

    totals = np.zeros((tables.n_token_classes, symbols.shape[1]), np.float32)
    add_costs(_plain(symbols), columns, tables.costs if costs is None else costs, tables.n_classes, totals)
    return totals


@cache
def _frequency_bits() -> npt.NDArray[np.float64]:
    """Entry f: bits that a symbol of frequency f costs, infinite for 0. Rounded as `_savings` are."""
    bits = [log2(TOTAL) - round(log2(f) * 2**32) / 2**32 for f in range(1, TOTAL + 1)]
    return np.array([np.inf, *bits])


@cache
def _savings() -> npt.NDArray[np.float64]:
    """Entry f: bits saved by each symbol whose frequency grows from f to f + 1.

    Rounded to 2**-32, where the last digits of a mathematics library have no say.
    """
    return np.array([0.0] + [round(log2((f + 1) / f) * 2**32) / 2**32 for f in range(1, TOTAL + 1)])


def _normalize(weights: npt.NDArray[np.float64], savings: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """One row of counts -> frequencies that no other row beats.

    The cost is convex in each frequency: a row that no move of one slot from a symbol to another improves is the best one.
    """
    if not weights.any():
        weights = np.ones_like(weights)
    # The largest first, so that no sum of counts overflows.
    weights = weights / weights.max()
    frequencies = np.maximum(1, weights * (TOTAL / fsum(weights))).astype(np.int64)
    while True:
        left = TOTAL - int(frequencies.sum())
        gains = weights * savings[frequencies]
        losses = np.where(frequencies > 1, weights * savings[frequencies - 1], np.inf)
        to, taken = int(gains.argmax()), int(losses.argmin())
        if left == 0 and gains[to] <= losses[taken]:
            return frequencies
        if left >= 0:
            frequencies[to] += 1
        if left <= 0:
            frequencies[taken] -= 1


def _check_symbols(symbols: Symbols, tables: RansTables) -> None:
    if symbols.dtype != np.uint8 or symbols.ndim != 2:
        raise InvalidArgument(f"symbols are uint8 [columns, tokens], not {symbols.dtype} {symbols.shape}")
    if symbols.size and int(symbols.max()) >= tables.n_symbols:
        raise InvalidArgument(f"symbol {symbols.max()} in tables of {tables.n_symbols} symbols")


def _check_classes(
    column_class: Classes, token_class: Symbols, tables: RansTables, error: type[KvtcError]
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint8]]:
    """Both as the kernels take them; `error` is raised for a token class without tables, as it may come from a stream."""
    if column_class.dtype not in (np.uint8, np.uint16) or column_class.ndim != 1:
        raise InvalidArgument(
            f"column classes are uint8 or uint16 [columns], not {column_class.dtype} {column_class.shape}"
        )
    if token_class.dtype != np.uint8 or token_class.ndim != 1:
        raise InvalidArgument(f"token classes are uint8 [tokens], not {token_class.dtype} {token_class.shape}")
    if len(column_class) and int(column_class.max()) >= tables.n_classes:
        raise InvalidArgument(f"column class {column_class.max()} of {tables.n_classes}")
    if len(token_class) and int(token_class.max()) >= tables.n_token_classes:
        raise error(f"token class {token_class.max()} of {tables.n_token_classes}")
    # Copies: numba would compile once more for each other dtype, layout and read-only array.
    return column_class.astype(np.uint16, order="C"), token_class.astype(np.uint8, order="C")


def _plain(symbols: Symbols) -> Symbols:
    """C-contiguous and writable, as most symbols are already: one compiled kernel for all."""
    return np.require(symbols, np.uint8, ["C", "W"])
