"""The coder of recurrent states: each number is rounded once, to 8 or 6 bits.

A state is cut into blocks of 128 numbers. In a block signs are flipped by a fixed pattern, and the Hadamard transform spreads each
number over all of the block: no number stands out any more, and the error of rounding is alike for all. The largest number of the
block has the largest integer; the integers are entropy-coded with a table of the section's own.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from ...errors import CorruptStream, InvalidCache
from ..rans import RansTables, decode_symbols, encode_symbols, normalize_frequencies

ROUNDED_BITS = {"int8": 8, "int6": 6}
"""Bits of the integers by the name of a coder."""
ROUNDED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCK_NUMBERS = 128


def compress_state(raw: bytes, dtype: torch.dtype, bits: int) -> bytes:
    """Round a state.

    Parameters:
        raw: its numbers in their dtype, one at least.
        dtype: of `ROUNDED_DTYPES`.
        bits: of an integer, 2 to 8.

    Returns:
        Coded bytes: the table of frequencies, the scales of blocks, the entropy-coded integers.

    Raises:
        InvalidCache: for NaN and infinities.
    """
    from .kernels import round_blocks

    values = torch.frombuffer(bytearray(raw), dtype=dtype).float().numpy()
    scales, symbols = np.empty(_n_blocks(len(values)), np.uint16), np.empty(len(values), np.uint8)
    n_symbols = (1 << bits) - 1
    if not round_blocks(values, n_symbols // 2, scales, symbols):
        raise InvalidCache("a state holds NaN or an infinity, which cannot be rounded; keep states lossless")
    frequencies = normalize_frequencies(np.bincount(symbols, minlength=n_symbols)[None])
    coded = encode_symbols(symbols[None], *_classes(len(symbols)), RansTables(frequencies, 1))
    return frequencies.astype("<u2").tobytes() + scales.astype("<u2").tobytes() + coded


def decompress_state(stored: bytes | memoryview, raw_bytes: int, dtype: torch.dtype, bits: int) -> bytes:
    """Numbers close to those that `compress_state` was given, the same on every machine.

    Raises `CorruptStream` where nothing of raw_bytes bytes was coded so.
    """
    from .kernels import restore_blocks

    n_numbers, n_symbols = raw_bytes // dtype.itemsize, (1 << bits) - 1
    n_blocks = _n_blocks(n_numbers)
    start = 2 * (n_symbols + n_blocks)
    if start > len(stored):
        raise CorruptStream(f"{n_numbers} rounded numbers need {start} bytes and more; {len(stored)} are stored")
    head = np.frombuffer(stored, "<u2", n_symbols + n_blocks).astype(np.uint16)
    tables = RansTables(head[None, :n_symbols], 1, CorruptStream)
    symbols = decode_symbols(stored[start:], *_classes(n_numbers), tables)[0]
    values = np.empty(n_numbers, np.float32)
    restore_blocks(symbols, n_symbols // 2, head[n_symbols:], values)
    limit = torch.finfo(dtype).max
    numbers = torch.from_numpy(values).clamp(-limit, limit).to(dtype)
    return bytes(numbers.view(torch.uint8).numpy().tobytes())


def _n_blocks(n_numbers: int) -> int:
    """Whole ones, and what is left in powers of two."""
    return n_numbers // BLOCK_NUMBERS + (n_numbers % BLOCK_NUMBERS).bit_count()


def _classes(n_numbers: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Of one column and of all numbers: one table for all."""
    return np.zeros(1, np.uint8), np.zeros(n_numbers, np.uint8)
