"""States are rounded alike everywhere, whatever they hold, and what was rounded is rounded to itself."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch

from kvtc.coding.exact.floats import FloatLayout, compress_floats
from kvtc.coding.states.rounding import ROUNDED_BITS, ROUNDED_DTYPES, compress_state, decompress_state
from kvtc.errors import CorruptStream, InvalidCache

SHAPES = [(1, 1, 1), (2, 3, 1), (1, 5, 3), (3, 7, 16), (2, 16, 128)]
"""Heads, rows, features."""


def raw_of(state: torch.Tensor) -> bytes:
    return state.contiguous().view(torch.uint8).numpy().tobytes()


def layout_of(state: torch.Tensor) -> FloatLayout:
    return FloatLayout(state.shape[1], state.shape[2], state.dtype)


def coded(state: torch.Tensor, bits: int) -> bytes:
    return compress_state(raw_of(state), layout_of(state), bits)


def rounded(state: torch.Tensor, bits: int) -> torch.Tensor:
    raw = decompress_state(coded(state, bits), state.nbytes, layout_of(state))
    return torch.frombuffer(bytearray(raw), dtype=state.dtype).reshape(state.shape)


def drawn(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows whose sizes differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = 4 ** torch.randn(*shape[:-1], 1, generator=generator)
    return (torch.randn(shape, generator=generator) * sizes).to(dtype)


@pytest.mark.parametrize("bits", ROUNDED_BITS.values())
@pytest.mark.parametrize("dtype", ROUNDED_DTYPES)
def test_no_number_is_off_by_more_than_half_a_step(bits, dtype):
    """A step is the largest number of a row over the largest integer, give or take the rounding of the scale."""
    for shape in SHAPES:
        state = drawn(shape, dtype)
        errors = (rounded(state, bits).double() - state.double()).abs()
        largest = state.double().abs().amax(-1, keepdim=True)
        steps = largest / (2 ** (bits - 1) - 1) * (1 + 1 / 256)
        assert bool((errors <= steps / 2 + largest * (1 / 256 + torch.finfo(dtype).eps)).all())


def test_rows_have_scales_of_their_own():
    """A row of small numbers is as good beside one of large numbers as without it."""
    state = torch.stack([drawn((4, 32)), 1e6 * drawn((4, 32))], dim=1)
    assert torch.equal(rounded(state, 6)[:, :1], rounded(state[:, :1].contiguous(), 6))


@pytest.mark.parametrize("dtype", ROUNDED_DTYPES)
def test_zeros_stay_zeros(dtype):
    state = drawn((2, 4, 16), dtype)
    state[0], state[1, 1], state[1, 2, 3:9] = 0, 0, 0
    assert torch.equal(rounded(state, 8)[state == 0], state[state == 0])


@pytest.mark.parametrize("size", [3.4e38, 1e30, 1e-30, 1e-35])
def test_huge_and_tiny_numbers_are_rounded_as_all_others(size):
    state = torch.rand(2, 8, 16, generator=torch.Generator().manual_seed(1)) * size
    back = rounded(state, 8)
    assert bool(torch.isfinite(back).all())
    assert float((back.double() - state.double()).norm() / state.double().norm()) < 0.01


def test_below_what_a_scale_can_say_numbers_become_zeros():
    """A scale is a bfloat16: the smallest one is 9e-41."""
    state = torch.tensor([1e-38, -3e-40, 1e-44, 0.0])[None, None]
    back = rounded(state, 8)
    assert float((back - state).abs().max()) < 9.2e-41
    assert torch.equal(rounded(torch.full((1, 2, 4), 1e-44), 8), torch.zeros(1, 2, 4))


def test_no_number_passes_the_largest_of_its_dtype():
    for dtype in ROUNDED_DTYPES:
        for divisor in (1.0, 1.01, 1.4, 1.9):
            state = torch.full((1, 2, 16), torch.finfo(dtype).max / divisor).to(dtype)
            assert bool(torch.isfinite(rounded(state, 6)).all())


@pytest.mark.parametrize("bits", ROUNDED_BITS.values())
def test_what_was_rounded_is_rounded_to_itself(bits):
    """A state that is restored and saved again unchanged has the same bytes: nothing is lost twice."""
    state = drawn((3, 40, 32))
    once = rounded(state, bits)
    assert not torch.equal(once, state)
    assert coded(once, bits) == coded(state, bits)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ROUNDED_DTYPES)
def test_what_is_not_finite_is_refused(value, dtype):
    state = drawn((2, 3, 16), dtype)
    state[1, 2, 5] = value
    with pytest.raises(InvalidCache, match="NaN or an infinity, which cannot be rounded; keep states lossless"):
        coded(state, 8)


def test_the_bytes_are_the_same_everywhere():
    """Single operations of binary32 and integers decide them."""
    state = ((torch.arange(4 * 20 * 16) * 7919 % 8191 - 4095).float() / 512).reshape(4, 20, 16)
    state = state * (1 + torch.arange(20))[:, None]
    found = {bits: (coded(state, bits), raw_of(rounded(state, bits))) for bits in ROUNDED_BITS.values()}
    digests = {bits: [hashlib.sha256(one).hexdigest()[:16] for one in its] for bits, its in found.items()}
    assert digests == {
        8: ["a089d2b250a81936", "83d928dc273f52ba"],
        6: ["56b281a4913a5ed2", "2835776c87167e53"],
    }


def test_rows_that_are_alike_but_for_scale_and_sign_take_few_bits():
    """States are sums of few outer products. The coder learns the row; a table of how often integers occur does not."""
    generator = torch.Generator().manual_seed(0)
    row, sizes = torch.randn(1, 1, 64, generator=generator), 4 * torch.randn(8, 64, 1, generator=generator)
    state = sizes * (row + torch.randn(8, 64, 64, generator=generator) / 20)
    lossless = len(compress_floats(raw_of(state), layout_of(state)))
    n_bytes = {bits: len(coded(state, bits)) for bits in ROUNDED_BITS.values()}
    assert n_bytes[8] < 0.7 * state.numel()
    assert n_bytes[6] < 0.45 * state.numel()
    assert lossless > 3 * state.numel()


def test_damage_is_found_before_memory_is_asked_for():
    state = drawn((2, 16, 16))
    data, layout = coded(state, 6), layout_of(state)
    with pytest.raises(CorruptStream, match="numbers are claimed in"):
        decompress_state(data, 1 << 31, layout)
    with pytest.raises(CorruptStream, match="scales of 4294967295 bytes are claimed"):
        decompress_state(b"\xff" * 4 + data[4:], state.nbytes, layout)
    for damaged in (b"", data[:3], data[:40], data[:-1], data + b"\0"):
        with pytest.raises(CorruptStream):
            decompress_state(damaged, state.nbytes, layout)
    scales = compress_floats(
        raw_of(torch.full((32,), math.inf, dtype=torch.bfloat16)), FloatLayout(16, 1, torch.bfloat16)
    )
    wrong = len(scales).to_bytes(4, "little") + scales + data[4 + int.from_bytes(data[:4], "little") :]
    with pytest.raises(CorruptStream, match="a scale of a rounded state is not finite"):
        decompress_state(wrong, state.nbytes, layout)
