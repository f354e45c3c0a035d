"""The integers of a chunk as bytes (docs/format.md).

Activity classes of its tokens, two bits each; the length of the rANS data; the rANS data; the escaped values.
"""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

from ..backends import Bytes, CodedIntegers, IntegerBytes
from ..coding.bitpack import packed_bytes
from ..coding.probability import ProbabilityTables
from ..coding.uniform import ACTIVITY_BITS
from ..errors import CorruptStream

_LENGTH = struct.Struct("<I")


def least_bytes(n: int) -> int:
    """What n tokens take at least."""
    return packed_bytes(n, ACTIVITY_BITS) + _LENGTH.size


def join_integers(parts: IntegerBytes) -> bytes:
    """The parts of a chunk -> its bytes."""
    return parts.activities + _LENGTH.pack(len(parts.symbols)) + parts.symbols + parts.escapes


def split_integers(
    data: Bytes, n: int, classes: npt.NDArray[np.uint8], tables: ProbabilityTables, step: float
) -> CodedIntegers:
    """At least `least_bytes(n)` bytes -> the parts of a chunk of n tokens; they take all bytes."""
    n_side, start = packed_bytes(n, ACTIVITY_BITS), least_bytes(n)
    (n_coded,) = _LENGTH.unpack(host_bytes(data[n_side:start]))
    if n_coded > len(data) - start:
        raise CorruptStream(f"a chunk claims {n_coded} bytes of symbols; {len(data) - start} are left")
    stop = start + n_coded
    return CodedIntegers(n, data[:n_side], data[start:stop], data[stop:], classes, tables, step)


def host_bytes(data: Bytes) -> bytes:
    """Bytes in the host's memory, wherever they lie."""
    return data if isinstance(data, bytes) else data.cpu().numpy().tobytes()
