"""The loops of the coder of floats, compiled by numba. Imported where they are first needed, as `rans_kernels` is.

Encoder and decoder learn the same model from the same numbers, in integers alone. The encoder goes forward through the model and
notes the slots of every step, then backward through the rANS coder. What a name or a number means says docs/format.md, "Coder 4".
"""

from __future__ import annotations

import numpy as np
from numba import int64, uint16, uint32, uint64

from ..compilation import compiled

# Numbers of the format, written out because a function that is compiled once does not see them change elsewhere.
_N_SYMBOLS = 64
_ESCAPE = 63
_CENTRE = 40
_N_SPREADS = 128
_N_SIGNS = 33 * 4
_SLOTS = 4096
_LEFT_FIRST = 16
_LARGEST_DEVIATION = 6
_SLOT = uint64(4095)
_SLOT_BITS = uint64(12)
_LOWER_BOUND = uint64(1 << 16)
_WORD_BITS = uint64(16)
_HEADROOM_BITS = uint64(20)
_RECIPROCAL_BITS = uint64(44)
_NONE, _ONE, _FOUR, _SIX, _BLOCK = uint64(0), uint64(1), uint64(4), uint64(6), uint64(64)
# Quarters of octaves from 16 on.
_QUARTERS = np.array(
    [0] * 16 + [4 * d.bit_length() - 20 + ((4 * d >> d.bit_length() - 1) & 3) for d in range(16, 4096)]
)


@compiled(nogil=True)
def new_model(n_channels):  # type: ignore[no-untyped-def]
    """Mean, spread and sign of each channel; counts and table of each spread class, how many numbers until it is renewed; signs."""
    channels = np.zeros((n_channels, 3), np.int64)
    counts = np.ones((_N_SPREADS, _N_SYMBOLS), np.int64)
    entries = np.empty((_N_SPREADS, _N_SYMBOLS), np.uint32)
    for spread in range(_N_SPREADS):
        for symbol in range(_N_SYMBOLS):
            entries[spread, symbol] = _SLOTS // _N_SYMBOLS * (1 + (symbol << 16))
    left = np.full(_N_SPREADS, _LEFT_FIRST, np.int64)
    negatives = np.full(_N_SIGNS, 1 << 15, np.int64)
    return channels, counts, entries, left, negatives


@compiled(nogil=True)
def renew_table(counts, entries):  # type: ignore[no-untyped-def]
    """The table (frequency, and from bit 16 on the first slot) for these counts -> numbers until it is renewed again."""
    total, most, rest = int64(0), 0, int64(_SLOTS - _N_SYMBOLS)
    for symbol in range(_N_SYMBOLS):
        total += counts[symbol]
        if counts[symbol] > counts[most]:
            most = symbol
    for symbol in range(_N_SYMBOLS):
        rest -= counts[symbol] * (_SLOTS - _N_SYMBOLS) // total
    first = int64(0)
    for symbol in range(_N_SYMBOLS):
        frequency = 1 + counts[symbol] * (_SLOTS - _N_SYMBOLS) // total
        if symbol == most:
            frequency += rest
        entries[symbol] = uint32(frequency | first << 16)
        first += frequency
    return total >> 2


@compiled(nogil=True)
def class_of(spread):  # type: ignore[no-untyped-def]
    """Quarters of octaves of a spread from 16 on."""
    quarters = int64(0)
    while spread >= len(_QUARTERS):
        spread >>= 8
        quarters += 32
    return min(quarters + _QUARTERS[spread], _N_SPREADS - 1)


@compiled(nogil=True)
def sign_context(sign, symbol):  # type: ignore[no-untyped-def]
    """What a number's sign is expected to be: by the signs before it, and by how its magnitude compares to theirs."""
    place = 0 if symbol < 35 else (1 if symbol < 40 else (2 if symbol < 45 else 3))
    return (((sign << 4) >> 10) + 16) * 4 + place


@compiled(nogil=True)
def negative_slots(negatives, context):  # type: ignore[no-untyped-def]
    """Of 4096, those of a negative number."""
    return uint64(min(max(negatives[context] >> 4, 16), _SLOTS - 16))


@compiled(nogil=True)
def learn(channels, channel, running, token, rates, deviation, spread, is_negative):  # type: ignore[no-untyped-def]
    """Take a number into its channel's mean, spread and sign, or, of the first token, into the running ones."""
    if token == 0:
        magnitude = running[0] + deviation
        running[0] += deviation >> 3
        running[1] += (abs(deviation) - running[1]) >> 4
        channels[channel, 0], channels[channel, 1] = magnitude, running[1]
        channels[channel, 2] = -256 if is_negative else 256
        return
    clipped = min(max(deviation, -_LARGEST_DEVIATION * spread), _LARGEST_DEVIATION * spread)
    channels[channel, 0] += (clipped * rates[0]) >> 16
    channels[channel, 1] += ((abs(clipped) - channels[channel, 1]) * rates[1]) >> 16
    channels[channel, 2] += ((-1024 if is_negative else 1024) - channels[channel, 2]) >> 3


@compiled(nogil=True)
def first_expected(n_bits, mantissa_bits):  # type: ignore[no-untyped-def]
    """What the first number is expected to be: 1.0, give or take an octave."""
    bias = (int64(1) << (n_bits - 2 - mantissa_bits)) - 1
    return np.array([bias << (mantissa_bits + 4), int64(1) << (mantissa_bits + 4)])


@compiled(nogil=True)
def rates_of(token):  # type: ignore[no-untyped-def]
    """How fast mean and spread follow, over 65536."""
    return 65536 // (min(token, 15) + 1), 65536 // (min(token + 1, 15) + 1)


@compiled(nogil=True)
def model_floats(patterns, n_bits, mantissa_bits, steps, plain):  # type: ignore[no-untyped-def]
    """Fill the slots of all steps, uint32 [2 a number], as tables have them, and the plain bits, uint64 -> how many bits.

    patterns: unsigned integers [groups, tokens, features].
    """
    n_groups, n_tokens, n_features = patterns.shape
    channels, counts, entries, left, negatives = new_model(n_groups * n_features)
    running = first_expected(n_bits, mantissa_bits)
    all_but_sign, most_plain = (int64(1) << (n_bits - 1)) - 1, max(mantissa_bits - 2, 0)
    n, word, held, n_held = 0, 0, _NONE, _NONE
    for token in range(n_tokens):
        rates = rates_of(token)
        for group in range(n_groups):
            for feature in range(n_features):
                channel = group * n_features + feature
                mean, spread = (running[0], running[1]) if token == 0 else (channels[channel, 0], channels[channel, 1])
                spread = max(spread, 16)
                pattern = int64(patterns[group, token, feature])
                magnitude, is_negative = pattern & all_but_sign, pattern > all_but_sign
                its_class = class_of(spread)
                n_plain = min(max((its_class >> 2) - 2, 0), most_plain)
                symbol = (magnitude >> n_plain) - (mean >> 4 >> n_plain) + _CENTRE
                if symbol < 0 or symbol >= _ESCAPE:
                    symbol, n_plain = int64(_ESCAPE), int64(n_bits - 1)
                steps[n] = entries[its_class, symbol]
                counts[its_class, symbol] += 1
                left[its_class] -= 1
                if left[its_class] == 0:
                    left[its_class] = renew_table(counts[its_class], entries[its_class])
                bits = uint64(magnitude & ((int64(1) << n_plain) - 1))
                held |= bits << n_held
                n_held += uint64(n_plain)
                if n_held >= _BLOCK:
                    plain[word] = held
                    word += 1
                    n_held -= _BLOCK
                    held = bits >> (uint64(n_plain) - n_held) if n_held else _NONE
                context = sign_context(channels[channel, 2], symbol)
                slots = negative_slots(negatives, context)
                steps[n + 1] = uint32(slots) if is_negative else uint32((_SLOTS - slots) | slots << _WORD_BITS)
                negatives[context] += ((65536 if is_negative else 0) - negatives[context]) >> 5
                n += 2
                learn(channels, channel, running, token, rates, (magnitude << 4) - mean, spread, is_negative)
    plain[word] = held
    return 64 * word + int64(n_held)


@compiled(nogil=True)
def encode_steps(steps, reciprocals, words):  # type: ignore[no-untyped-def]
    """Fill the end of `words`, uint16 [1 + one a step] -> the coder's state, and where the words start.

    reciprocals: uint64 [4096], (2**44 - 1) // frequency.
    """
    state, place = _LOWER_BOUND, uint64(len(words) - 1)
    for index in range(len(steps) - 1, -1, -1):
        entry = uint64(steps[index])
        frequency = entry & _SLOT
        words[place] = uint16(state)
        is_full = uint64((state >> _HEADROOM_BITS) >= frequency)
        place -= is_full
        state >>= is_full << _FOUR
        quotient = ((state + _ONE) * reciprocals[frequency]) >> _RECIPROCAL_BITS
        state += quotient * (uint64(_SLOTS) - frequency) + (entry >> _WORD_BITS)
    return state, place + _ONE


@compiled(nogil=True)
def fill_slots(entries, slots):  # type: ignore[no-untyped-def]
    """slots uint8 [4096]: the symbol of each."""
    for symbol in range(_N_SYMBOLS):
        first, frequency = entries[symbol] >> uint32(16), entries[symbol] & uint32(4095)
        slots[first : first + frequency] = symbol


@compiled(nogil=True)
def advance(state, frequency, offset, words, place):  # type: ignore[no-untyped-def]
    """The coder's state after a step, offset: of the slot within the symbol's -> state, and the place of the next word."""
    state = frequency * (state >> _SLOT_BITS) + offset
    is_low = state < _LOWER_BOUND
    refilled = (state << _WORD_BITS) | uint64(words[min(place, uint64(len(words) - 1))])
    return (refilled if is_low else state), place + uint64(is_low)


@compiled(nogil=True)
def decode_floats(words, state, plain, n_bits, mantissa_bits, patterns):  # type: ignore[no-untyped-def]
    """Fill `patterns` -> whether all can be; the state at the end, words and plain bits read. It ends early where those run out.

    words, plain: one word and two blocks more than there are, zeros.
    """
    n_groups, n_tokens, n_features = patterns.shape
    channels, counts, entries, left, negatives = new_model(n_groups * n_features)
    slots = np.empty((_N_SPREADS, _SLOTS), np.uint8)
    for spread_class in range(_N_SPREADS):
        fill_slots(entries[spread_class], slots[spread_class])
    running = first_expected(n_bits, mantissa_bits)
    largest, most_plain = (int64(1) << (n_bits - 1)) - 1, max(mantissa_bits - 2, 0)
    place, position, last = _NONE, _NONE, uint64(len(plain) - 2)
    for token in range(n_tokens):
        rates = rates_of(token)
        for group in range(n_groups):
            for feature in range(n_features):
                channel = group * n_features + feature
                mean, spread = (running[0], running[1]) if token == 0 else (channels[channel, 0], channels[channel, 1])
                spread = max(spread, 16)
                its_class = class_of(spread)
                n_plain = min(max((its_class >> 2) - 2, 0), most_plain)
                slot = state & _SLOT
                symbol = int64(slots[its_class, slot])
                entry = uint64(entries[its_class, symbol])
                state, place = advance(state, entry & _SLOT, slot - (entry >> _WORD_BITS), words, place)
                counts[its_class, symbol] += 1
                left[its_class] -= 1
                if left[its_class] == 0:
                    left[its_class] = renew_table(counts[its_class], entries[its_class])
                    fill_slots(entries[its_class], slots[its_class])
                start = ((mean >> 4 >> n_plain) + symbol - _CENTRE) << n_plain
                if symbol == _ESCAPE:
                    start, n_plain = int64(0), int64(n_bits - 1)
                block, within = min(position >> _SIX, last), position & (_BLOCK - _ONE)
                bits = plain[block] >> within | (plain[block + _ONE] << _ONE) << (_BLOCK - _ONE - within)
                position += uint64(n_plain)
                magnitude = start + int64(bits & ((_ONE << uint64(n_plain)) - _ONE))
                if magnitude < 0 or magnitude > largest:
                    return False, state, place, position
                context = sign_context(channels[channel, 2], symbol)
                negative = negative_slots(negatives, context)
                slot = state & _SLOT
                is_negative = slot < negative
                frequency = negative if is_negative else uint64(_SLOTS) - negative
                state, place = advance(state, frequency, slot if is_negative else slot - negative, words, place)
                negatives[context] += ((65536 if is_negative else 0) - negatives[context]) >> 5
                patterns[group, token, feature] = magnitude + (largest + 1 if is_negative else 0)
                learn(channels, channel, running, token, rates, (magnitude << 4) - mean, spread, is_negative)
        if place >= uint64(len(words)) or (position >> _SIX) > last:
            break
    return True, state, place, position
