"""The loops of the rANS coder, compiled by numba. Imported where they are first needed, as `kernels` is.

The loop over the lanes is innermost, and their chains of dependent operations overlap in it. It has no branch: about one symbol in
eleven moves a word, and which ones nobody can predict. All is uint64, because numba takes an index that may be negative for one
to be wrapped. Callers check every index; only the number of words is checked here, once a column.
"""

from __future__ import annotations

import numpy as np
from numba import uint16, uint32, uint64

from .compilation import compiled

# Numbers of the format, written out because a function that is compiled once does not see them change elsewhere.
_SLOT_BITS = uint64(12)
_SLOT = uint64(4095)
_TOTAL = uint64(4096)
_LOWER_BOUND = uint64(1 << 16)
_WORD_BITS = uint64(16)
# A state must stay below 2**32 after a symbol, so it may be up to its frequency times 2**20 before.
_HEADROOM_BITS = uint64(20)
_RECIPROCAL_BITS = uint64(44)
_GAP_BIT = uint64(31)
# Bits 16 times a boolean shifts by a word or not at all.
_FOUR = uint64(4)
_ONE = uint64(1)
_NONE = uint64(0)
_GROUP_TOKENS = 128


@compiled(nogil=True)
def encode_lanes(symbols, column_class, token_class, entries, reciprocals, n_classes, states, words):  # type: ignore[no-untyped-def]
    """Fill the end of `words`, uint16 [1 + one a symbol] -> index where they start; past the end if a symbol's frequency is 0.

    symbols: uint8 [n_columns, n_tokens]. entries: uint32 [n_tables, n_symbols], the frequency, the first slot from bit 16 on and
    bit 31 for a frequency of 0. reciprocals: uint64 [n_tables, n_symbols], (2**44 - 1) // frequency. states: uint32 [n_lanes],
    a power of two up to 128, left as they end.
    """
    n_columns, n_tokens = symbols.shape
    n_symbols = uint64(entries.shape[1])
    n_lanes = len(states)
    flat_entries, flat_reciprocals = entries.reshape(-1), reciprocals.reshape(-1)
    of_token = np.empty(n_lanes, np.uint64)
    table = np.empty(n_lanes, np.uint64)
    group = np.empty(n_columns * _GROUP_TOKENS, np.uint8)
    place = uint64(len(words) - 1)
    seen = _NONE
    for first in range((n_tokens - 1) // n_lanes * n_lanes, -1, -n_lanes):
        in_group = first % _GROUP_TOKENS
        if in_group + n_lanes == _GROUP_TOKENS or first + n_lanes >= n_tokens:
            _copy_tokens(symbols, first - in_group, group, True)
        n = uint64(min(n_lanes, n_tokens - first))
        for lane in range(n):
            of_token[lane] = uint64(token_class[uint64(first) + lane]) * uint64(n_classes) * n_symbols
        last = -1
        for column in range(n_columns - 1, -1, -1):
            if column_class[column] != last:
                last = column_class[column]
                for lane in range(n):
                    table[lane] = of_token[lane] + uint64(last) * n_symbols
            at = uint64(column * _GROUP_TOKENS + in_group)
            # The last lane first, because the words are written backwards.
            for back in range(n):
                lane = n - _ONE - back
                index = table[lane] + uint64(group[at + lane])
                entry = uint64(flat_entries[index])
                seen |= entry
                frequency = entry & _SLOT
                state = uint64(states[lane])
                words[place] = uint16(state)
                is_full = uint64((state >> _HEADROOM_BITS) >= frequency)
                place -= is_full
                state >>= is_full << _FOUR
                # Exactly state // frequency, for each state below frequency * 2**20.
                quotient = ((state + _ONE) * flat_reciprocals[index]) >> _RECIPROCAL_BITS
                first_slot = (entry >> _WORD_BITS) & _SLOT
                states[lane] = uint32(state + quotient * (_TOTAL - frequency) + first_slot)
    return uint64(len(words)) + _ONE if seen >> _GAP_BIT else place + _ONE


@compiled(nogil=True)
def _copy_tokens(symbols, first, group, to_group):  # type: ignore[no-untyped-def]
    """symbols[:, first : first + _GROUP_TOKENS] to the rows of `group`, uint8 [n_columns * _GROUP_TOKENS], or back.

    The coder visits few tokens of one column after the other: in a wide matrix each is in another page and waits for memory.
    """
    n_columns, n_tokens = symbols.shape
    flat = symbols.reshape(-1)
    n = min(_GROUP_TOKENS, n_tokens - first)
    for column in range(n_columns):
        outside, inside = column * n_tokens + first, column * _GROUP_TOKENS
        if to_group:
            _copy_row(flat, uint64(outside), group, uint64(inside), n)
        else:
            _copy_row(group, uint64(inside), flat, uint64(outside), n)


@compiled(nogil=True)
def _copy_row(source, start, target, place, n):  # type: ignore[no-untyped-def]
    """n bytes, _GROUP_TOKENS at most. A number that the compiler knows makes this a few vectors."""
    if n == _GROUP_TOKENS:
        for token in range(uint64(_GROUP_TOKENS)):
            target[place + token] = source[start + token]
    else:
        for token in range(uint64(n)):
            target[place + token] = source[start + token]


@compiled(nogil=True)
def decode_lanes(words, n_words, states, column_class, token_class, slots, entries, n_classes, symbols):  # type: ignore[no-untyped-def]
    """Fill `symbols`, uint8 [n_columns, n_tokens] -> how many words that took; it ends early with more than `n_words`.

    words: uint16 [n_words + n_lanes or more], for the check comes once a column. states: uint32 [n_lanes], left as they end.
    slots: uint8 [n_tables, 4096], the symbol of each. entries: as in `encode_lanes`.
    """
    n_columns, n_tokens = symbols.shape
    n_symbols = uint64(entries.shape[1])
    n_lanes = len(states)
    flat_slots, flat_entries = slots.reshape(-1), entries.reshape(-1)
    of_token = np.empty(n_lanes, np.uint64)
    slots_start = np.empty(n_lanes, np.uint64)
    entries_start = np.empty(n_lanes, np.uint64)
    group = np.empty(n_columns * _GROUP_TOKENS, np.uint8)
    place = _NONE
    for first in range(0, n_tokens, n_lanes):
        in_group = first % _GROUP_TOKENS
        n = uint64(min(n_lanes, n_tokens - first))
        for lane in range(n):
            of_token[lane] = uint64(token_class[uint64(first) + lane]) * uint64(n_classes)
        last = -1
        for column in range(n_columns):
            if column_class[column] != last:
                last = column_class[column]
                for lane in range(n):
                    table = of_token[lane] + uint64(last)
                    slots_start[lane] = table << _SLOT_BITS
                    entries_start[lane] = table * n_symbols
            at = uint64(column * _GROUP_TOKENS + in_group)
            for lane in range(n):
                state = uint64(states[lane])
                slot = state & _SLOT
                symbol = flat_slots[slots_start[lane] + slot]
                entry = uint64(flat_entries[entries_start[lane] + uint64(symbol)])
                group[at + lane] = symbol
                state = (entry & _SLOT) * (state >> _SLOT_BITS) + slot - (entry >> _WORD_BITS)
                is_low = state < _LOWER_BOUND
                refilled = (state << _WORD_BITS) | uint64(words[place])
                place += uint64(is_low)
                states[lane] = uint32(refilled if is_low else state)
            if place > uint64(n_words):
                return place
        if in_group + n_lanes == _GROUP_TOKENS or first + n_lanes >= n_tokens:
            _copy_tokens(symbols, first - in_group, group, False)
    return place


@compiled(nogil=True)
def add_costs(symbols, column_class, costs, n_classes, totals):  # type: ignore[no-untyped-def]
    """Add to `totals`, float32 [n_token_classes, n_tokens], what the symbols cost; costs: float32 [n_tables, n_symbols], bits."""
    n_columns, n_tokens = symbols.shape
    for column in range(n_columns):
        for kind in range(len(totals)):
            table = costs[kind * n_classes + column_class[column]]
            for token in range(n_tokens):
                totals[kind, token] += table[uint64(symbols[column, token])]
