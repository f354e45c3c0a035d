"""What both coders of exact tokens promise: any bits come back, few bytes are needed, and damage is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtc.cache import CACHE_DTYPES
from kvtc.coding.exact import channel_kernels, float_kernels
from kvtc.coding.exact.channels import compress_channels, decompress_channels
from kvtc.coding.exact.floats import MOST_NUMBERS_A_BYTE, FloatLayout, compress_floats, decompress_floats
from kvtc.errors import CorruptStream
from tests.builders import random_cache


class Coder(NamedTuple):
    """A coder, its compiled loops, and how many times as long as its input its bytes may be, with so many more."""

    compress: Callable[[bytes, FloatLayout], bytes]
    decompress: Callable[[bytes, int, FloatLayout], bytes]
    kernels: ModuleType
    longest: float
    and_bytes: int


CODERS = {
    "floats": Coder(compress_floats, decompress_floats, float_kernels, 1.5, 40),
    # A class for each channel, at worst, has a table of its own.
    "channels": Coder(compress_channels, decompress_channels, channel_kernels, 4, 10_000),
}
coders = pytest.mark.parametrize("coder", CODERS.values(), ids=CODERS)


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


@coders
@given(
    dtype=st.sampled_from(CACHE_DTYPES),
    n_groups=st.integers(1, 5),
    n_tokens=st.integers(1, 200),
    n_features=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
    share=st.sampled_from([0.0, 0.02, 1.0]),
)
def test_any_bits_come_back(coder, dtype, n_groups, n_tokens, n_features, seed, share):
    layout = FloatLayout(n_tokens, n_features, dtype)
    raw = special_bytes(layout, n_groups, seed, share)
    coded = coder.compress(raw, layout)
    assert coder.decompress(coded, len(raw), layout) == raw
    assert len(coded) < coder.and_bytes + coder.longest * len(raw)


@coders
def test_the_same_bytes_without_compilation(coder):
    """Plain Python computes what the compiled loops do: nothing overflows or rounds."""
    layout = FloatLayout(30, 3, torch.bfloat16)
    raw = special_bytes(layout, 2, 1, 0.1)
    coded = coder.compress(raw, layout)
    loops = {name: its.py_func for name, its in vars(coder.kernels).items() if hasattr(its, "py_func")}
    # What encodes words counts in types that plain Python has not.
    plain = {name: its for name, its in loops.items() if name not in ("encode_steps", "decode_floats")}
    with patch.multiple(coder.kernels, **plain), np.errstate(over="ignore"):
        assert coder.compress(raw, layout) == coded
        assert coder.decompress(coded, len(raw), layout) == raw


def coded_example(coder: Coder) -> tuple[FloatLayout, bytes, bytes]:
    layout = FloatLayout(40, 4, torch.bfloat16)
    raw = special_bytes(layout, 3, 2, 0.05)
    return layout, raw, coder.compress(raw, layout)


@coders
@given(place=st.integers(0, 10_000), flip=st.integers(1, 255))
def test_damage_is_refused_or_decodes_to_as_many_numbers(coder, place, flip):
    layout, raw, coded = coded_example(coder)
    damaged = bytearray(coded)
    damaged[place % len(coded)] ^= flip
    with contextlib.suppress(CorruptStream):
        assert len(coder.decompress(bytes(damaged), len(raw), layout)) == len(raw)


@coders
def test_more_numbers_than_bytes_can_hold_are_refused_before_memory_is_asked_for(coder):
    layout, _, coded = coded_example(coder)
    with patch.object(np, "empty", side_effect=AssertionError), pytest.raises(CorruptStream, match="are claimed in"):
        coder.decompress(coded, 2 * (MOST_NUMBERS_A_BYTE * len(coded) + 1), layout)


@coders
def test_caches_take_fewer_bytes_than_zstd(coder):
    zstandard = pytest.importorskip("zstandard")
    cache = random_cache(256, torch.bfloat16)
    octets = torch.stack([cache.keys, cache.values]).reshape(-1).view(torch.uint8)
    coded = coder.compress(bytes(octets.numpy()), FloatLayout(256, cache.key_dim, torch.bfloat16))
    for data in (octets, octets.reshape(-1, 2).T.reshape(-1)):
        assert len(coded) < len(zstandard.ZstdCompressor(level=19).compress(bytes(data.numpy())))
