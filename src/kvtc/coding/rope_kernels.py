"""Cosines and sines of rotations, compiled by numba; imported where they are first needed.

Libraries differ in the last digit, between processors and even within an array. Here every result is a fixed chain of float64
operations, one rounding each, so that a key is rotated alike wherever and beside whatever it is decoded.
"""

from __future__ import annotations

import numpy as np

from .compilation import compiled

_QUADRANTS = 0.6366197723675814  # 2 / pi
# A quarter turn, pi / 2, in parts of 33 bits: their products with integers of 16 bits are exact.
_FIRST, _SECOND, _THIRD = 1.5707963267341256, 6.077100506303966e-11, 2.0222662487959506e-21
_HALF_WORD = 65536.0
_HALF, _ONE, _BELOW_HALF = np.uint32(16), np.uint32(1), np.uint32(0x7FFF)


@compiled(nogil=True)
def turn_angles(angles, cosines, sines):  # type: ignore[no-untyped-def]
    """angles float32 [n], of magnitudes below 2**31 -> cosines and sines float32 [n], all but correctly rounded.

    The polynomials are those of fdlibm (Sun Microsystems, 1993), for magnitudes up to pi / 4.
    """
    for index in range(angles.shape[0]):
        angle = np.float64(angles[index])
        turns = np.floor(angle * _QUADRANTS + 0.5)
        high = np.floor(turns / _HALF_WORD) * _HALF_WORD
        low = turns - high
        rest = angle - high * _FIRST
        rest = rest - low * _FIRST
        rest = rest - high * _SECOND
        rest = rest - low * _SECOND
        rest = rest - turns * _THIRD
        z = rest * rest
        sine = -2.50507602534068634195e-08 + z * 1.58969099521155010221e-10
        sine = -1.98412698298579493134e-04 + z * (2.75573137070700676789e-06 + z * sine)
        sine = -1.66666666666666324348e-01 + z * (8.33333333332248946124e-03 + z * sine)
        sine = rest + rest * z * sine
        cosine = 2.08757232129817482790e-09 + z * -1.13596475577881948265e-11
        cosine = 2.48015872894767294178e-05 + z * (-2.75573143513906633035e-07 + z * cosine)
        cosine = 4.16666666666666019037e-02 + z * (-1.38888888888741095749e-03 + z * cosine)
        cosine = 1.0 - 0.5 * z + z * z * cosine
        quadrant = np.int64(turns) & 3
        if quadrant & 1:
            cosine, sine = -sine, cosine
        if quadrant & 2:
            cosine, sine = -cosine, -sine
        cosines[index] = np.float32(cosine)
        sines[index] = np.float32(sine)


@compiled(nogil=True)
def turn_to_bfloat16(rows, source, turn, limit, patterns, target, shape, start, stop):  # type: ignore[no-untyped-def]
    """Rows [T, *shape] of shape = (H, D), turned (`rope.turn_in_place`) and saturated at limit -> bfloat16.

    Of the tokens start .. stop. All features of a head lie side by side.

    Parameters:
        rows: float32, flat. source: where the first begins, how far tokens, and how far heads are apart.
        turn: cosines and sines float32 [T, m], m is 0 where nothing is turned, and whether pairs are neighbours.
        patterns: uint16, flat. target: the same of them.
    """
    cosines, sines, interleaved = turn
    n_heads, n_features = shape
    n_pairs = cosines.shape[1]
    turned = np.empty(n_features, np.float32)
    bits = turned.view(np.uint32)
    for token in range(start, stop):
        for head in range(n_heads):
            at = source[0] + token * source[1] + head * source[2]
            row = rows[at : at + n_features]
            for feature in range(n_features):
                turned[feature] = row[feature]
            # Twice the same, for the compiler makes vectors of neighbours alone.
            for pair in range(0 if interleaved else n_pairs):
                a, b, cosine, sine = row[pair], row[pair + n_pairs], cosines[token, pair], sines[token, pair]
                turned[pair] = a * cosine - b * sine
                turned[pair + n_pairs] = b * cosine + a * sine
            for pair in range(n_pairs if interleaved else 0):
                a, b, cosine, sine = row[2 * pair], row[2 * pair + 1], cosines[token, pair], sines[token, pair]
                turned[2 * pair] = a * cosine - b * sine
                turned[2 * pair + 1] = b * cosine + a * sine
            for feature in range(n_features):
                value = turned[feature]  # NaN stays NaN
                turned[feature] = limit if value > limit else (-limit if value < -limit else value)
            place = target[0] + token * target[1] + head * target[2]
            found = patterns[place : place + n_features]
            for feature in range(n_features):
                # To nearest, ties to even.
                pattern = bits[feature]
                found[feature] = (pattern + _BELOW_HALF + ((pattern >> _HALF) & _ONE)) >> _HALF
