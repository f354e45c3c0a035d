"""The integers of a chunk as bytes (docs/format.md).

Where steps differ by token, the level of each, four bits; activity classes of its tokens, two bits each; the length of the rANS
data; the rANS data; the escaped values.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...backends import Bytes, CodedIntegers, IntegerBytes
from ...coding.bitpack import pack, packed_bytes, unpack
from ...coding.joint.importance import LEVEL_BITS
from ...coding.joint.probability import ProbabilityTables
from ...coding.joint.uniform_quantizer import ACTIVITY_BITS
from ...errors import CorruptStream

_LENGTH = struct.Struct("<I")


def least_bytes(n: int) -> int:
    """What n tokens take at least."""
    return packed_bytes(n, ACTIVITY_BITS) + _LENGTH.size


def join_integers(parts: IntegerBytes) -> bytes:
    """The parts of a chunk -> its bytes."""
    return parts.activities + _LENGTH.pack(len(parts.symbols)) + parts.symbols + parts.escapes


def split_integers(
    data: Bytes, head: bytes, n: int, classes: npt.NDArray[np.uint8], tables: ProbabilityTables, step: float
) -> CodedIntegers:
    """The parts of a chunk of n tokens, which take all bytes of data; head: the first `least_bytes(n)` of them."""
    n_side, start = packed_bytes(n, ACTIVITY_BITS), least_bytes(n)
    (n_coded,) = _LENGTH.unpack(head[n_side:start])
    if n_coded > len(data) - start:
        raise CorruptStream(f"a chunk claims {n_coded} bytes of symbols; {len(data) - start} are left")
    stop = start + n_coded
    return CodedIntegers(n, data[:n_side], data[start:stop], data[stop:], classes, tables, step)


def join_levels(levels: Tensor) -> bytes:
    """Levels uint8 [n] -> their bytes."""
    return pack(levels, LEVEL_BITS).cpu().numpy().tobytes()


def split_levels(head: bytes, n: int) -> Tensor:
    """Inverse of `join_levels`, from the beginning of a chunk's bytes."""
    return unpack(torch.frombuffer(bytearray(head[: level_bytes(n)]), dtype=torch.uint8), n, LEVEL_BITS)


def level_bytes(n: int) -> int:
    """What the levels of n tokens take."""
    return packed_bytes(n, LEVEL_BITS)


def heads_of(chunks: Sequence[Bytes], counts: Sequence[int]) -> list[bytes]:
    """The first bytes of chunks in the host's memory, so many of each; from a device they come over in one copy."""
    firsts = [chunk[:count] for chunk, count in zip(chunks, counts, strict=True)]
    tensors = [first for first in firsts if isinstance(first, Tensor)]
    copied = torch.cat(tensors).cpu().numpy().tobytes() if tensors else b""
    heads, start = [], 0
    for first in firsts:
        if isinstance(first, Tensor):
            heads.append(copied[start : start + len(first)])
            start += len(first)
        else:
            heads.append(first)
    return heads
