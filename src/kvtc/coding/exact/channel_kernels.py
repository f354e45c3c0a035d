"""The loops of the coder of channels, compiled by numba. Imported where they are first needed, as `rans_kernels` is.

All is done in integers, so that a cache has the same bytes everywhere. docs/format.md, "Coder 6", says what
a name or a number means.
"""

from __future__ import annotations

import numpy as np
from numba import int64, uint64

from ..compilation import compiled

# Numbers of the format, written out because a function that is compiled once does not see them change elsewhere.
_ESCAPE = 63
_CENTRE = 40
_OTHER_SIGN = 64
_NONE, _SIX, _BLOCK = uint64(0), uint64(6), uint64(64)
_ONE = uint64(1)


@compiled(nogil=True)
def measure(patterns, n_bits, means, kinds):  # type: ignore[no-untyped-def]
    """Fill the mean magnitude of each channel, -1 - mean where most numbers are negative, and its kind.

    patterns: unsigned integers [groups, tokens, features]. kinds: 4 times the octaves of the mean distance from the mean, above 1,
    and how rare the other sign is, 0 .. 3.
    """
    n_groups, n_tokens, n_features = patterns.shape
    all_but_sign = (int64(1) << (n_bits - 1)) - 1
    sums, negatives = np.empty(n_features, np.int64), np.empty(n_features, np.int64)
    for group in range(n_groups):
        sums[:] = 0
        negatives[:] = 0
        for token in range(n_tokens):
            for feature in range(n_features):
                pattern = int64(patterns[group, token, feature])
                sums[feature] += pattern & all_but_sign
                negatives[feature] += pattern > all_but_sign
        means_here = (sums + n_tokens // 2) // n_tokens
        sums[:] = 0
        for token in range(n_tokens):
            for feature in range(n_features):
                sums[feature] += abs((int64(patterns[group, token, feature]) & all_but_sign) - means_here[feature])
        for feature in range(n_features):
            distance, octaves = sums[feature] // n_tokens, int64(0)
            while distance > 1:
                distance >>= 1
                octaves += 1
            others = 100 * min(negatives[feature], n_tokens - negatives[feature])
            rare = (others < 30 * n_tokens) + (others < 10 * n_tokens) + (others < 2 * n_tokens)
            channel = group * n_features + feature
            is_negative = 2 * negatives[feature] > n_tokens
            means[channel] = -1 - means_here[feature] if is_negative else means_here[feature]
            kinds[channel] = 4 * octaves + rare


@compiled(nogil=True)
def symbols_of(patterns, n_bits, classes, centres, signs, n_plain, symbols, counts, plain, escaped):  # type: ignore[no-untyped-def]
    """Fill symbols uint8 [channels, tokens], their counts [classes, 128], plain bits, uint64, and escaped magnitudes -> how many
    plain bits, and escaped magnitudes.

    classes, centres, signs [channels]: as they are coded. n_plain: bits, by class.
    """
    _, n_tokens, n_features = patterns.shape
    all_but_sign = (int64(1) << (n_bits - 1)) - 1
    word, held, n_held, n_escaped = 0, _NONE, _NONE, 0
    for row in range(len(symbols)):
        group, feature = row // n_features, row % n_features
        shift, its_counts = n_plain[classes[row]], counts[classes[row]]
        mask, width, base = (int64(1) << shift) - 1, uint64(shift), centres[row] - _CENTRE
        sign = signs[row]
        for token in range(n_tokens):
            pattern = int64(patterns[group, token, feature])
            magnitude = pattern & all_but_sign
            symbol = (magnitude >> shift) - base
            if symbol < 0 or symbol >= _ESCAPE:
                symbol = int64(_ESCAPE)
                escaped[n_escaped] = magnitude >> shift
                n_escaped += 1
            if (pattern > all_but_sign) != sign:
                symbol += _OTHER_SIGN
            symbols[row, token] = symbol
            its_counts[symbol] += 1
            bits = uint64(magnitude & mask)
            held |= bits << n_held
            n_held += width
            if n_held >= _BLOCK:
                plain[word] = held
                word += 1
                n_held -= _BLOCK
                held = bits >> (width - n_held) if n_held else _NONE
    plain[word] = held
    return 64 * word + int64(n_held), n_escaped


@compiled(nogil=True)
def numbers_of(symbols, n_bits, classes, centres, n_plain, plain, escaped, patterns):  # type: ignore[no-untyped-def]
    """Fill `patterns` -> how many escaped magnitudes that took; -1 where a number is out of range.

    centres [channels]: with the sign as highest bit. plain: one block more than there are bits for. escaped: one more than there
    are. Else as in `symbols_of`.
    """
    _, n_tokens, n_features = patterns.shape
    sign_bit = int64(1) << (n_bits - 1)
    place, n_escaped, last_escaped, is_sound = _NONE, 0, len(escaped) - 1, True
    for row in range(len(symbols)):
        group, feature = row // n_features, row % n_features
        shift = n_plain[classes[row]]
        mask, width = (_ONE << uint64(shift)) - _ONE, uint64(shift)
        base, sign = (centres[row] & (sign_bit - 1)) - _CENTRE, centres[row] & sign_bit
        for token in range(n_tokens):
            symbol = int64(symbols[row, token])
            block, within = place >> _SIX, place & (_BLOCK - _ONE)
            bits = plain[block] >> within | (plain[block + _ONE] << _ONE) << (_BLOCK - _ONE - within)
            place += width
            kept = symbol & (_OTHER_SIGN - 1)
            high = base + kept
            if kept == _ESCAPE:
                high = int64(escaped[min(n_escaped, last_escaped)])
                n_escaped += 1
            magnitude = high << shift | int64(bits & mask)
            is_sound &= high >= 0 and magnitude < sign_bit
            patterns[group, token, feature] = magnitude | (sign ^ sign_bit if symbol >= _OTHER_SIGN else sign)
    return n_escaped if is_sound else -1
