"""What quantization promises of every group: half a step at most, constants exactly, never an overflow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from kvtc.coding.paper.group_quantizer import FLOAT16_MAX, SymbolType, dequantize, quantize

INTS = [SymbolType.INT2, SymbolType.INT4]
SCALED = [*INTS, SymbolType.FP8]
ALL = [*SCALED, SymbolType.FP16]
FLOAT16_EPS, SMALLEST = 2.0**-10, 2.0**-24


def groups(limit: float):
    """Groups [rows, size] of float32 up to `limit` in magnitude, subnormal ones among them."""
    shapes = array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9)
    return arrays(np.float32, shapes, elements=st.floats(-limit, limit, width=32)).map(torch.from_numpy)


def round_trip(group: torch.Tensor, symbol_type: SymbolType) -> torch.Tensor:
    return dequantize(*quantize(group, symbol_type), symbol_type)


def rounding(value: torch.Tensor) -> torch.Tensor:
    """The most that rounding to float16 moves a value within its range."""
    return value.abs() * FLOAT16_EPS / 2 + SMALLEST / 2


@given(group=groups(30000), symbol_type=st.sampled_from(INTS))
def test_integers_are_within_half_a_step(group, symbol_type):
    """And what rounding shift and scale to float16 adds: it moves the ends of the range."""
    group = group.double()
    low, high = group.amin(1, keepdim=True), group.amax(1, keepdim=True)
    width, levels = high - low, 2**symbol_type.value - 1
    step = (width + rounding(width)) / levels
    bound = step / 2 + rounding(low) + rounding(width)
    error = (round_trip(group.float(), symbol_type).double() - group).abs()
    assert bool((error <= bound * (1 + 1e-5) + 1e-6 * group.abs()).all())


@given(group=groups(30000))
def test_fp8_is_within_its_own_rounding(group):
    """e4m3 keeps 3 bits of mantissa: 1/16 of the distance from the middle, and its subnormal spacing near it."""
    group = group.double()
    low, high = group.amin(1, keepdim=True), group.amax(1, keepdim=True)
    middle, half = (low + high) / 2, (high - low) / 2
    distance = (group - middle).abs() + rounding(middle)
    # A symbol stands for itself times scale / 448; its spacing near zero is 2**-9.
    bound = distance / 16 + (half + rounding(half)) / 448 * 2.0**-10 + rounding(middle) + rounding(half)
    error = (round_trip(group.float(), SymbolType.FP8).double() - group).abs()
    assert bool((error <= bound * (1 + 1e-5) + 1e-6 * (group.abs() + half)).all())


@given(group=groups(65504))
def test_fp16_is_float16(group):
    symbols, shift, scale = quantize(group, SymbolType.FP16)
    assert torch.equal(symbols, group.half())
    assert shift.numel() == scale.numel() == 0
    assert torch.equal(dequantize(symbols, shift, scale, SymbolType.FP16), group.half().float())


@given(group=groups(1e4), symbol_type=st.sampled_from(ALL))
def test_groups_do_not_see_each_other(group, symbol_type):
    alone = torch.cat([round_trip(row[None], symbol_type) for row in group])
    assert torch.equal(round_trip(group, symbol_type), alone)


@given(group=groups(1e4), symbol_type=st.sampled_from(SCALED))
def test_symbols_are_in_their_range(group, symbol_type):
    symbols, shift, scale = quantize(group, symbol_type)
    assert (symbols.dtype, shift.dtype, scale.dtype) == (torch.uint8, torch.float16, torch.float16)
    assert (symbols.shape, shift.shape, scale.shape) == (group.shape, group.shape[:1], group.shape[:1])
    assert bool((scale >= 0).all())
    if symbol_type is SymbolType.FP8:
        assert bool(symbols.view(torch.float8_e4m3fn).float().isfinite().all())
    else:
        assert int(symbols.max()) < 2**symbol_type.value


@given(value=st.floats(-FLOAT16_MAX, FLOAT16_MAX, width=16), size=st.integers(1, 9), kind=st.sampled_from(ALL))
def test_constant_groups_are_exact_to_float16(value, size, kind):
    group = torch.full((2, size), value)
    assert torch.equal(round_trip(group, kind), group)


@given(value=st.floats(-6e4, 6e4, width=32), size=st.integers(1, 9), kind=st.sampled_from(SCALED))
def test_constant_groups_have_no_scale(value, size, kind):
    group = torch.full((1, size), value)
    symbols, shift, scale = quantize(group, kind)
    assert not scale.any()
    assert torch.equal(dequantize(symbols, shift, scale, kind), torch.full((1, size), value).half().float())


@pytest.mark.parametrize("symbol_type", INTS)
def test_ends_of_a_group_are_hit(symbol_type):
    levels = 2**symbol_type.value - 1
    group = torch.tensor([[-1.0, 0.5, 2.0], [3.0, 3.0, 18.0]])
    symbols, shift, scale = quantize(group, symbol_type)
    assert symbols[:, 0].tolist() == [0, 0]
    assert symbols[:, 2].tolist() == [levels, levels]
    assert (shift.tolist(), scale.tolist()) == ([-1.0, 3.0], [3.0, 15.0])
    torch.testing.assert_close(round_trip(group, symbol_type)[:, [0, 2]], group[:, [0, 2]])


@given(group=groups(2.0**100), symbol_type=st.sampled_from(ALL))
def test_huge_values_saturate(group, symbol_type):
    restored = round_trip(group, symbol_type)
    # A shift and a scale, each a number of float16.
    assert bool((restored.abs() <= 2 * FLOAT16_MAX).all())
    alone = round_trip(group.reshape(-1, 1), symbol_type)
    assert torch.equal(alone, group.reshape(-1, 1).clamp(-FLOAT16_MAX, FLOAT16_MAX).half().float())


@pytest.mark.parametrize("symbol_type", SCALED)
@pytest.mark.parametrize("width", [2.0**-24, 2.0**-20, 2.0**-15, 2.0**-14, 2.0**-25, 2.0**-26])
def test_widths_among_the_subnormal_numbers_of_float16(symbol_type, width):
    """The scale is the width of the group, so that even the narrowest one that float16 holds keeps all its levels."""
    group = torch.linspace(0, width, 9)[None]
    symbols, _, scale = quantize(group, symbol_type)
    restored = dequantize(symbols, *quantize(group, symbol_type)[1:], symbol_type)
    assert bool(restored.isfinite().all())
    if width >= 2.0**-15 and symbol_type in INTS:
        assert float(scale[0]) == width
        assert symbols.unique().numel() == min(9, 2**symbol_type.value)
        assert float((restored - group).abs().max()) <= width / (2**symbol_type.value - 1) / 2 * 1.001
    else:
        assert float((restored - group).abs().max()) <= width / 3 + 1.5 * SMALLEST


@pytest.mark.parametrize(
    ("symbol_type", "bits"),
    [(SymbolType.INT2, 2 * 16 + 32), (SymbolType.INT4, 96), (SymbolType.FP8, 160), (SymbolType.FP16, 256)],
)
def test_bits_of_a_group(symbol_type, bits):
    assert symbol_type.group_bits(16) == bits
    assert symbol_type.has_scale == (symbol_type is not SymbolType.FP16)
