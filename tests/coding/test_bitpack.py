"""Symbols to bytes and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kvtc.coding.bitpack import pack, packed_bytes, unpack

BITS = st.sampled_from([2, 4, 8])


@given(bits=BITS, data=st.data())
def test_unpacking_undoes_packing(bits, data):
    n = data.draw(st.integers(0, 70))
    symbols = torch.from_numpy(data.draw(arrays(np.uint8, n, elements=st.integers(0, 2**bits - 1))))
    packed = pack(symbols, bits)
    assert (packed.dtype, packed.numel()) == (torch.uint8, packed_bytes(n, bits))
    assert torch.equal(unpack(packed, n, bits), symbols)


@given(bits=BITS, data=st.data())
def test_packing_is_what_the_format_says(bits, data):
    """The first symbol takes the lowest bits; what is left over is zero."""
    symbols = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=40))
    as_one_number = sum(symbol << (bits * index) for index, symbol in enumerate(symbols))
    expected = as_one_number.to_bytes(-(-len(symbols) * bits // 8), "little")
    assert pack(torch.tensor(symbols, dtype=torch.uint8), bits).numpy().tobytes() == expected


@given(bits=BITS, data=st.binary(min_size=1, max_size=40))
def test_packing_undoes_unpacking(bits, data):
    packed = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    assert torch.equal(pack(unpack(packed, len(data) * 8 // bits, bits), bits), packed)


@given(bits=st.sampled_from([2, 4]), data=st.binary(min_size=1, max_size=9), n=st.integers(0, 36))
def test_left_over_bits_are_ignored(bits, data, n):
    n = min(n, len(data) * 8 // bits)
    used = torch.frombuffer(bytearray(data), dtype=torch.uint8)[: packed_bytes(n, bits)]
    flipped = used.clone()
    if n * bits % 8:
        flipped[-1] ^= 0xFF << n * bits % 8 & 0xFF
    assert torch.equal(unpack(flipped, n, bits), unpack(used, n, bits))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_shapes_are_read_in_order(bits):
    symbols = (torch.arange(24) % 2**bits).to(torch.uint8)
    shaped = symbols.reshape(2, 3, 4)
    assert torch.equal(pack(shaped, bits), pack(symbols, bits))
    assert torch.equal(pack(shaped.transpose(0, 2), bits), pack(shaped.transpose(0, 2).reshape(-1).clone(), bits))


@given(data=st.binary(min_size=2, max_size=40))
def test_16_bit_symbols_are_float16(data):
    """Any bit pattern, NaN too, and at odd places of a buffer."""
    n = len(data) // 2
    buffer = torch.frombuffer(bytearray(b"x" + data), dtype=torch.uint8)
    symbols = unpack(buffer[1 : 1 + 2 * n], n, 16)
    assert (symbols.dtype, symbols.numel()) == (torch.float16, n)
    assert pack(symbols, 16).numpy().tobytes() == data[: 2 * n]
