"""Values too large for a symbol of their own, as variable-length bytes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...errors import CorruptStream

_MAX_BYTES = 5


def encode_escapes(values: npt.NDArray[np.int32]) -> bytes:
    """Values [k] -> each with its sign in the lowest bit, seven bits a byte, low ones first, the top bit set but in the last."""
    output = bytearray()
    for value in values.tolist():
        rest = 2 * value if value >= 0 else -2 * value - 1
        while rest >= 128:
            output.append(rest & 127 | 128)
            rest >>= 7
        output.append(rest)
    return bytes(output)


def escaped_bytes(values: npt.NDArray[np.int32]) -> int:
    """How many bytes `encode_escapes` makes of values [k]."""
    rest = 2 * np.abs(values.astype(np.int64)) - (values < 0)
    return len(rest) + sum(int((rest >> (7 * index) > 0).sum()) for index in range(1, _MAX_BYTES))


def decode_escapes(data: bytes, count: int) -> npt.NDArray[np.int32]:
    """Inverse of `encode_escapes` for `count` values that take all of data; `CorruptStream` otherwise."""
    raw = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(raw < 128)
    if len(ends) != count or (len(raw) and (not count or ends[-1] != len(raw) - 1)):
        raise CorruptStream(f"{count} escaped values are needed; {len(data)} bytes hold {len(ends)}")
    if not count:
        return np.zeros(0, np.int32)
    starts = np.concatenate([[0], ends[:-1] + 1])
    if int((ends - starts).max()) >= _MAX_BYTES:
        raise CorruptStream("an escaped value is longer than 5 bytes")
    within = np.arange(len(raw)) - np.repeat(starts, ends - starts + 1)
    plain = np.add.reduceat((raw & 127).astype(np.int64) << (7 * within), starts)
    signed = np.where(plain & 1, -(plain + 1) // 2, plain // 2)
    if int(np.abs(signed).max()) >= 1 << 31:
        raise CorruptStream("an escaped value is out of range")
    return signed.astype(np.int32)
