"""The coder of exact tokens: any bits come back, few bytes are needed, and damage is refused."""

from __future__ import annotations

import contextlib
import struct
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtc.cache import CACHE_DTYPES
from kvtc.coding.exact import float_kernels
from kvtc.coding.exact.floats import MOST_NUMBERS_A_BYTE, FloatLayout, compress_floats, decompress_floats
from kvtc.errors import CorruptStream
from tests.builders import random_cache

dtypes = st.sampled_from(CACHE_DTYPES)


def special_bytes(layout: FloatLayout, n_groups: int, seed: int, share: float) -> bytes:
    """Numbers around 1, and in their midst NaN of many payloads, infinities, zeros of both signs, denormals and any bits."""
    rng = np.random.default_rng(seed)
    shape = n_groups, layout.n_tokens, layout.n_features
    plain = torch.from_numpy(rng.standard_normal(shape) * np.exp2(rng.integers(-6, 6, (shape[0], 1, shape[2]))))
    patterns = np.frombuffer(bytes(plain.to(layout.dtype).reshape(-1).view(torch.uint8).numpy()), layout.pattern_dtype)
    infinity = ((1 << layout.n_bits - 1 - layout.mantissa_bits) - 1) << layout.mantissa_bits
    sign = 1 << layout.n_bits - 1
    special = [0, sign, 1, sign + 1, infinity, sign + infinity, infinity + 1, 2 * sign - 1, sign - 1]
    picked = np.where(
        rng.random(patterns.size) < 0.5,
        rng.choice(np.array(special, np.uint64), patterns.size),
        rng.integers(0, 2 * sign, patterns.size, np.uint64),
    )
    return np.where(rng.random(patterns.size) < share, picked, patterns).astype(layout.pattern_dtype).tobytes()


@given(
    dtype=dtypes,
    n_groups=st.integers(1, 5),
    n_tokens=st.integers(1, 70),
    n_features=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
    share=st.sampled_from([0.0, 0.02, 1.0]),
)
def test_any_bits_come_back(dtype, n_groups, n_tokens, n_features, seed, share):
    layout = FloatLayout(n_tokens, n_features, dtype)
    raw = special_bytes(layout, n_groups, seed, share)
    coded = compress_floats(raw, layout)
    assert decompress_floats(coded, len(raw), layout) == raw
    assert len(coded) < 40 + 1.5 * len(raw)


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


def test_the_same_bytes_without_compilation():
    """Plain Python computes what the compiled loops do: nothing overflows or rounds."""
    layout = FloatLayout(30, 3, torch.bfloat16)
    raw = special_bytes(layout, 2, 1, 0.1)
    coded = compress_floats(raw, layout)
    names = ["new_model", "renew_table", "class_of", "sign_context", "negative_slots", "learn", "rates_of"]
    plain = {name: getattr(float_kernels, name).py_func for name in names}
    with (
        patch.multiple(float_kernels, **plain, model_floats=float_kernels.model_floats.py_func),
        np.errstate(over="ignore"),
    ):
        assert compress_floats(raw, layout) == coded


def coded_example() -> tuple[FloatLayout, bytes, bytes]:
    layout = FloatLayout(40, 4, torch.bfloat16)
    raw = special_bytes(layout, 3, 2, 0.05)
    return layout, raw, compress_floats(raw, layout)


@given(place=st.integers(0, 10_000), flip=st.integers(1, 255))
def test_damage_is_refused_or_decodes_to_as_many_numbers(place, flip):
    layout, raw, coded = coded_example()
    damaged = bytearray(coded)
    damaged[place % len(coded)] ^= flip
    with contextlib.suppress(CorruptStream):
        assert len(decompress_floats(bytes(damaged), len(raw), layout)) == len(raw)


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
    layout, raw, coded = coded_example()
    with pytest.raises(CorruptStream):
        decompress_floats(change(coded), len(raw), layout)


def test_more_numbers_than_bytes_can_hold_are_refused_before_memory_is_asked_for():
    layout, _, coded = coded_example()
    with patch.object(np, "empty", side_effect=AssertionError), pytest.raises(CorruptStream, match="are claimed in"):
        decompress_floats(coded, 2 * (MOST_NUMBERS_A_BYTE * len(coded) + 1), layout)


def test_caches_take_fewer_bytes_than_zstd():
    zstandard = pytest.importorskip("zstandard")
    cache = random_cache(256, torch.bfloat16)
    numbers = torch.stack([cache.keys, cache.values])
    octets = numbers.reshape(-1).view(torch.uint8)
    coded = compress_floats(bytes(octets.numpy()), FloatLayout(256, cache.key_dim, torch.bfloat16))
    for data in (octets, octets.reshape(-1, 2).T.reshape(-1)):
        assert len(coded) < len(zstandard.ZstdCompressor(level=19).compress(bytes(data.numpy())))
