"""The coder of few exact tokens, beside what both promise (`test_exact_coders`)."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from kvtc.cache import CACHE_DTYPES
from kvtc.coding.exact.floats import MOST_NUMBERS_A_BYTE, FloatLayout, compress_floats, decompress_floats
from kvtc.errors import CorruptStream
from tests.coding.test_exact_coders import CODERS, coded_example


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_numbers_that_never_change_cost_next_to_nothing(dtype):
    layout = FloatLayout(2000, 16, dtype)
    raw = bytes(np.full(2 * 2000 * 16, 5, layout.pattern_dtype))
    coded = compress_floats(raw, layout)
    # Until a channel's spread is small, numbers have their plain bits.
    at_first = 2 * 300 * 16 * layout.mantissa_bits / 8
    assert 2 * 2000 * 16 / MOST_NUMBERS_A_BYTE < len(coded) < 2 * 2000 * 16 * 0.08 / 8 + at_first
    assert decompress_floats(coded, len(raw), layout) == raw


def test_a_channel_with_an_offset_costs_what_its_noise_does():
    """Numbers of 100 and a noise of 1 have some 5 bits in bfloat16, where a step is half the noise."""
    layout = FloatLayout(256, 64, torch.bfloat16)
    noise = torch.randn(4, 256, 64, generator=torch.Generator().manual_seed(0))
    raw = bytes((100 + noise).bfloat16().reshape(-1).view(torch.uint8).numpy())
    assert len(compress_floats(raw, layout)) * 8 < 3.4 * 4 * 256 * 64


@pytest.mark.parametrize(
    "change",
    {
        "too little": lambda c: c[:2],
        "no state": lambda c: c[:7],
        "a word less": lambda c: struct.pack("<I", struct.unpack_from("<I", c)[0] - 1) + c[4:],
        "more words than bytes": lambda c: struct.pack("<I", 2**32 - 1) + c[4:],
        "a low state": lambda c: c[:4] + struct.pack("<I", 65535) + c[8:],
        "a high state": lambda c: c[:4] + struct.pack("<I", 2**32 - 1) + c[8:],
        "a byte less": lambda c: c[:-1],
        "a byte more": lambda c: c + b"\0",
        "half": lambda c: c[: len(c) // 2],
    }.values(),
)
def test_what_is_not_coded_so_is_corrupt(change):
    layout, raw, coded = coded_example(CODERS["floats"])
    with pytest.raises(CorruptStream):
        decompress_floats(change(coded), len(raw), layout)
