"""States are rounded alike everywhere, whatever they hold, and what was rounded is rounded to itself."""

from __future__ import annotations

import hashlib
import math
import struct

import numpy as np
import pytest
import torch

from kvtc.coding.states.rounding import ROUNDED_BITS, ROUNDED_DTYPES, compress_state, decompress_state
from kvtc.errors import CorruptStream, InvalidCache

SIZES = [1, 2, 3, 127, 128, 129, 300, 1000]


def raw_of(state: torch.Tensor) -> bytes:
    return state.contiguous().view(torch.uint8).numpy().tobytes()


def rounded(state: torch.Tensor, bits: int) -> torch.Tensor:
    raw = raw_of(state)
    back = decompress_state(compress_state(raw, state.dtype, bits), len(raw), state.dtype, bits)
    return torch.frombuffer(bytearray(back), dtype=state.dtype)


def heavy_tailed(n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(n)
    return (torch.randn(n, generator=drawn) * 4 ** torch.randn(n, generator=drawn)).to(dtype)


@pytest.mark.parametrize("bits", ROUNDED_BITS.values())
@pytest.mark.parametrize("dtype", ROUNDED_DTYPES)
def test_the_error_of_a_block_is_that_of_its_scale(bits, dtype):
    """No number of the transformed block is off by more than half a step, so that the block is off by their root mean square."""
    top = 2 ** (bits - 1) - 1
    for n in SIZES:
        state = heavy_tailed(n, dtype)
        back, start = rounded(state, bits), 0
        while start < n:
            size = min(128, 1 << ((n - start).bit_length() - 1))
            block, found = (one[start : start + size].double() for one in (state, back))
            # No transformed number is larger than the sum of the magnitudes, over the root of their number.
            step = float(block.abs().sum()) / math.sqrt(size) / top * (1 + 1 / 256)
            own = float((block.abs() * torch.finfo(dtype).eps).norm())
            assert float((block - found).norm()) <= step / 2 * math.sqrt(size) + own
            start += size


def test_the_transform_spreads_what_stands_out():
    """One number a thousand times as large as the others does not take their bits: without the transform all would be zero."""
    state = heavy_tailed(128).clamp(-1, 1)
    state[17] = 1000.0
    back = rounded(state, 8)
    others = torch.arange(128) != 17
    assert float((back - state).norm()) < 6
    assert bool((back[others] != 0).all())


@pytest.mark.parametrize("dtype", ROUNDED_DTYPES)
def test_zeros_stay_zeros(dtype):
    assert torch.equal(rounded(torch.zeros(300, dtype=dtype), 8), torch.zeros(300, dtype=dtype))


@pytest.mark.parametrize("size", [3.4e38, 1e30, 1e-30, 1e-38, 1e-42])
def test_huge_and_tiny_numbers_are_rounded_as_all_others(size):
    """Scales reach beyond float32, and nothing overflows or vanishes on the way."""
    state = torch.rand(300, generator=torch.Generator().manual_seed(1)) * size
    back = rounded(state, 8)
    assert bool(torch.isfinite(back).all())
    assert float((back.double() - state.double()).norm() / state.double().norm()) < 0.02


def test_no_number_passes_the_largest_of_its_dtype():
    for dtype in ROUNDED_DTYPES:
        state = torch.full((128,), torch.finfo(dtype).max, dtype=dtype)
        state[::3] /= 2
        assert bool(torch.isfinite(rounded(state, 6)).all())


@pytest.mark.parametrize("bits", ROUNDED_BITS.values())
def test_what_was_rounded_is_rounded_to_itself(bits):
    """A state that is restored and saved again unchanged has the same bytes: nothing is lost twice."""
    state = heavy_tailed(1000)
    once = rounded(state, bits)
    assert not torch.equal(once, state)
    assert compress_state(raw_of(once), once.dtype, bits) == compress_state(raw_of(state), state.dtype, bits)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ROUNDED_DTYPES)
def test_what_is_not_finite_is_refused(value, dtype):
    state = torch.ones(300, dtype=dtype)
    state[280] = value
    with pytest.raises(InvalidCache, match="NaN or an infinity, which cannot be rounded; keep states lossless"):
        compress_state(raw_of(state), dtype, 8)


def test_the_bytes_are_the_same_everywhere():
    """Integers and single operations of binary64 decide them."""
    numbers = (np.arange(5000, dtype=np.int64) * 7919 % 8191 - 4095).astype(np.float32) / np.float32(512)
    raw = (numbers * (1 + np.arange(5000) // 700).astype(np.float32)).tobytes()
    coded = {bits: compress_state(raw, torch.float32, bits) for bits in (8, 6)}
    digests = {bits: hashlib.sha256(one).hexdigest()[:16] for bits, one in coded.items()}
    assert digests == {8: "1d1e1f93e32f3978", 6: "6910ed983717e001"}
    restored = b"".join(decompress_state(one, len(raw), torch.float32, bits) for bits, one in coded.items())
    assert hashlib.sha256(restored).hexdigest()[:16] == "c0328f88d892f2a7"


def test_entropy_coding_saves_some_of_the_bits():
    """A table beside 20 000 numbers and a scale for each 128 of them included."""
    state = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    assert len(compress_state(raw_of(state), torch.float32, 8)) < 8 / 8 * 20_000
    assert len(compress_state(raw_of(state), torch.float32, 6)) < 6 / 8 * 20_000


def test_damage_is_found_before_memory_is_asked_for():
    raw = raw_of(heavy_tailed(300))
    coded = bytearray(compress_state(raw, torch.float32, 6))
    with pytest.raises(CorruptStream, match="rounded numbers need"):
        decompress_state(bytes(coded), 1 << 31, torch.float32, 6)
    with pytest.raises(CorruptStream):
        decompress_state(bytes(coded[:-2]), len(raw), torch.float32, 6)
    wrong = bytearray(coded)
    struct.pack_into("<H", wrong, 0, 4000)
    with pytest.raises(CorruptStream, match="frequency table"):
        decompress_state(bytes(wrong), len(raw), torch.float32, 6)
    # Any scale is some number.
    wrong = bytearray(coded)
    struct.pack_into("<2H", wrong, 2 * 63, 0xFFFF, 0)
    found = torch.frombuffer(bytearray(decompress_state(bytes(wrong), len(raw), torch.float32, 6)), dtype=torch.float32)
    assert bool(torch.isfinite(found).all())
