"""The integers of a chunk as bytes (docs/format.md).

Activity classes of its tokens, two bits each; the length of the rANS data; the rANS data; the escaped values.
"""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..coding.bitpack import pack, packed_bytes, unpack
from ..coding.escapes import decode_escapes, encode_escapes
from ..coding.probability import ProbabilityTables
from ..coding.rans import decode_symbols, encode_symbols
from ..coding.rounding import Rounded
from ..coding.uniform import ESCAPE, from_symbols, to_symbols
from ..errors import CorruptStream

ACTIVITY_BITS = 2
_LENGTH = struct.Struct("<I")


def least_bytes(n: int) -> int:
    """What n tokens take at least."""
    return packed_bytes(n, ACTIVITY_BITS) + _LENGTH.size


def write_integers(rounded: Rounded, classes: npt.NDArray[np.uint8], tables: ProbabilityTables) -> bytes:
    """Integers of coefficients of these variance classes -> bytes."""
    symbols = tables.escape_unlikely(to_symbols(rounded.values), classes, rounded.activities)
    coded = encode_symbols(symbols, classes, rounded.activities, tables.rans)
    escapes = encode_escapes(rounded.values[symbols == ESCAPE])
    side = pack(torch.from_numpy(rounded.activities), ACTIVITY_BITS).numpy().tobytes()
    return side + _LENGTH.pack(len(coded)) + coded + escapes


def read_integers(
    data: bytes, n: int, classes: npt.NDArray[np.uint8], tables: ProbabilityTables
) -> tuple[Tensor, Tensor]:
    """At least `least_bytes(n)` bytes -> integers [n, coded] and their offsets [n, coded, 2]; all bytes must be used."""
    n_side = packed_bytes(n, ACTIVITY_BITS)
    side = torch.frombuffer(bytearray(data[:n_side]), dtype=torch.uint8)
    activities = unpack(side, n, ACTIVITY_BITS).numpy().astype(np.uint8)
    start = least_bytes(n)
    (n_coded,) = _LENGTH.unpack_from(data, n_side)
    if n_coded > len(data) - start:
        raise CorruptStream(f"a chunk claims {n_coded} bytes of symbols; {len(data) - start} are left")
    symbols = decode_symbols(data[start : start + n_coded], classes, activities, tables.rans)
    escaped = decode_escapes(data[start + n_coded :], int((symbols == ESCAPE).sum()))
    values = torch.from_numpy(from_symbols(symbols, escaped)).T
    offsets = torch.from_numpy(tables.offsets)
    # Rows by token, columns by coefficient: each pair of classes has its own.
    return values, offsets[torch.from_numpy(activities.astype(np.int64))][:, torch.from_numpy(classes.astype(np.int64))]
