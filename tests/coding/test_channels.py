"""The coder of many exact tokens, beside what both promise (`test_exact_coders`)."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from kvtc.cache import CACHE_DTYPES
from kvtc.coding.exact.channels import MOST_NUMBERS_A_BYTE, compress_channels, decompress_channels
from kvtc.coding.exact.floats import FloatLayout, compress_floats
from kvtc.errors import CorruptStream
from tests.coding.test_exact_coders import CODERS, coded_example

HEAD = struct.Struct("<H5I")


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_numbers_that_never_change_cost_next_to_nothing(dtype):
    layout = FloatLayout(2000, 16, dtype)
    for pattern in (5, 0, (1 << layout.n_bits) - 1):
        raw = np.full(2 * 2000 * 16, pattern, layout.pattern_dtype).tobytes()
        coded = compress_channels(raw, layout)
        assert 2 * 2000 * 16 / MOST_NUMBERS_A_BYTE < len(coded) < 2 * 2000 * 16 * 0.03 / 8 + 500
        assert decompress_channels(coded, len(raw), layout) == raw


@pytest.mark.parametrize("n_tokens", [128, 256])
def test_it_takes_about_as_few_bytes_as_the_coder_that_learns(n_tokens):
    """Channels of all scales, some with an offset: of 64 heads, as a small model has."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.randn(64, 1, 64, generator=generator).exp2()
    noise = torch.randn(64, n_tokens, 64, generator=generator)
    cache = scales * (noise + 3 * torch.randn(64, 1, 64, generator=generator))
    raw = bytes(cache.bfloat16().reshape(-1).view(torch.uint8).numpy())
    layout = FloatLayout(n_tokens, 64, torch.bfloat16)
    assert len(compress_channels(raw, layout)) < 1.01 * len(compress_floats(raw, layout))


def with_head(coded: bytes, number: int, value: int) -> bytes:
    """With another number in its head: the classes, or the bytes of one of five parts."""
    head = list(HEAD.unpack_from(coded))
    head[number] = value
    return HEAD.pack(*head) + coded[HEAD.size :]


@pytest.mark.parametrize(
    "change",
    {
        "nothing": lambda c: c[:0],
        "too little": lambda c: c[:7],
        "the head alone": lambda c: c[: HEAD.size],
        "no classes": lambda c: with_head(c, 0, 0),
        "more classes than there may be": lambda c: with_head(c, 0, 257),
        "a class more": lambda c: with_head(c, 0, HEAD.unpack_from(c)[0] + 1),
        "longer parts than bytes": lambda c: with_head(c, 5, 2**32 - 1),
        "no plain bits": lambda c: with_head(c, 5, 0),
        "too many plain bits of a class": lambda c: c[: HEAD.size] + b"\xff" + c[HEAD.size + 1 :],
        "an escaped number less": lambda c: c[:-2],
        "an escaped number more": lambda c: c + b"\0\0",
        "half of one more": lambda c: c + b"\0",
        "an escaped number out of range": lambda c: c[:-2] + b"\xff\xff",
        "half": lambda c: c[: len(c) // 2],
    }.values(),
)
def test_what_is_not_coded_so_is_corrupt(change):
    layout, raw, coded = coded_example(CODERS["channels"])
    with pytest.raises(CorruptStream):
        decompress_channels(change(coded), len(raw), layout)


@pytest.mark.parametrize(
    "table", {"a free number": [4095, 1], "a sum that is not 4096": [2000, 2000], "one symbol": [4096]}.values()
)
def test_tables_that_no_encoder_writes_are_corrupt(table):
    layout, raw, coded = coded_example(CODERS["channels"])
    n_classes, *lengths = HEAD.unpack_from(coded)
    first = HEAD.size + n_classes + lengths[0] + lengths[1]
    wrong = np.zeros((n_classes, 128), "<u2")
    wrong[:, : len(table)] = table
    tables = compress_floats(wrong.tobytes(), FloatLayout(n_classes, 128, torch.float16))
    changed = with_head(coded, 3, len(tables))
    with pytest.raises(CorruptStream):
        decompress_channels(changed[:first] + tables + changed[first + lengths[2] :], len(raw), layout)


@pytest.mark.parametrize("n_numbers", [0, 40 * 4 - 1, 40 * 4 * 3 + 1, 2 * 40 * 4])
def test_numbers_that_are_not_those_of_whole_groups_are_corrupt(n_numbers):
    layout, _, coded = coded_example(CODERS["channels"])
    with pytest.raises(CorruptStream):
        decompress_channels(coded, 2 * n_numbers, layout)
