"""Lossless streams: every bit comes back, on every path that reads and writes streams."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

import kvtc
from kvtc.cache import CACHE_DTYPES, KVCache
from kvtc.codec.codec import Codec
from kvtc.container.parts import join_streams, split_stream
from kvtc.errors import CorruptStream, InvalidArgument, InvalidCache, TokenMismatch
from kvtc.profiles.rates import Lossless, Ratio
from tests.builders import (
    CHUNKS_AT,
    gappy_cache,
    random_cache,
    reseal,
    sections_of,
    tiny_calibration,
    told_cache,
    told_codec,
    told_ids,
    with_section,
)


def lossless_codec(**options: object) -> Codec:
    return Codec(tiny_calibration(), lossless=True, **({"chunk_tokens": 32} | options))


def same_bits(found: KVCache, expected: KVCache) -> bool:
    pairs = ((found.keys, expected.keys), (found.values, expected.values))
    return all(torch.equal(a.view(torch.uint8), b.contiguous().view(torch.uint8)) for a, b in pairs)


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize("n", [0, 1, 33, 300])
def test_every_bit_comes_back(dtype, n):
    cache = random_cache(n, dtype)
    stream = lossless_codec().encode(cache)
    assert same_bits(lossless_codec().decode(stream), cache)
    info = kvtc.inspect(stream)
    assert (info.profile, info.body_tokens, info.sink_tokens, info.window_tokens) == ("lossless", n, 0, 0)
    if n == 300:
        assert info.body_ratio * dtype.itemsize / min(2, dtype.itemsize) > 1
        assert {section.coder for section in info.sections if section.kind == "body"} == {"floats"}


def test_nan_and_infinities_are_kept_and_lossy_codecs_refuse_them():
    cache = random_cache(40, torch.bfloat16)
    patterns = torch.tensor([0x7FC1, -2, 0x7F80, -128, -32768, 1], dtype=torch.int16)
    cache.keys[0, 0, 3:9, 0] = patterns.view(torch.bfloat16)
    assert same_bits(lossless_codec().decode(lossless_codec().encode(cache)), cache)
    with pytest.raises(InvalidCache, match="NaN or infinite"):
        Codec(tiny_calibration()).encode(cache)


def test_a_model_with_any_calibration_and_ids():
    cache, ids = told_cache(70, torch.bfloat16), told_ids(70)
    codec = told_codec(lossless=True)
    stream = codec.encode(cache, ids)
    assert same_bits(told_codec("paper").decode(stream, ids), cache)
    with pytest.raises(TokenMismatch):
        codec.decode(stream, ids + 1)


def test_prefixes_gaps_parts_and_layers():
    cache = gappy_cache(100)
    codec = lossless_codec()
    stream = codec.encode(cache)
    assert same_bits(codec.decode(stream, tokens=41), cache.span(0, 41))
    assert codec.decode(stream).positions.tolist() == cache.positions.tolist()
    parts = split_stream(stream)
    assert len(parts) > 2
    assert join_streams(parts) == stream
    for layer, keys, values in codec.decode_layers(stream):
        assert torch.equal(keys, cache.keys[layer])
        assert torch.equal(values, cache.values[layer])


def test_equal_chunks_have_equal_bytes():
    cache = random_cache(96, torch.bfloat16)
    codec = lossless_codec()
    assert split_stream(codec.encode(cache))[:2] == split_stream(codec.encode(cache.span(0, 64)))


def test_a_shift_turns_keys_and_keeps_values():
    cache = random_cache(50)
    moved = lossless_codec().decode(lossless_codec().encode(cache), start_position=7)
    assert torch.equal(moved.values, cache.values)
    assert not torch.equal(moved.keys, cache.keys)
    assert moved.positions[0] == 7


def test_coder_none_stores_numbers_as_they_are():
    cache = random_cache(40, torch.bfloat16)
    stream = lossless_codec(coder="none").encode(cache)
    assert {section.coder for section in kvtc.inspect(stream).sections} == {"none"}
    assert same_bits(lossless_codec().decode(stream), cache)


def test_exact_tokens_of_all_profiles_have_these_coders():
    cache = random_cache(200, torch.bfloat16)
    for coder in ("deflate", "zstd", "lz4"):
        stream = Codec(tiny_calibration(), window_tokens=100, coder=coder).encode(cache)
        coders = {section.kind: section.coder for section in kvtc.inspect(stream).sections}
        assert (coders["sink"], coders["window"]) == ("floats", "channels")
        decoded = Codec(tiny_calibration()).decode(stream)
        assert same_bits(decoded.span(100, 200), cache.span(100, 200))


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 4},
        {"step": 1.0},
        {"kl": 0.1},
        {"rate": Ratio(3)},
        {"profile": "paper"},
        {"profile": "joint"},
        {"fixed_size": True},
        {"sink_format": "fp8"},
        {"window_format": "coded"},
    ],
)
def test_what_contradicts_lossless_is_refused(options):
    with pytest.raises(InvalidArgument):
        told_codec(lossless=True, **options)


def test_rates_of_lossless_codecs():
    codec = lossless_codec()
    assert codec.rate == Lossless()
    assert Codec(tiny_calibration(), rate=Lossless()).settings.profile == "lossless"
    with pytest.raises(InvalidArgument):
        codec.with_rate(Ratio(4))
    with pytest.raises(InvalidArgument):
        Codec(tiny_calibration()).with_rate(Lossless())
    with pytest.raises(InvalidArgument, match="unknown"):
        Codec(tiny_calibration(), "lossless")
    with pytest.raises(InvalidArgument, match="size of their own"):
        codec.stream_bytes(10)
    assert codec.settings_digest != Codec(tiny_calibration()).settings_digest
    assert pickle.loads(pickle.dumps(codec)).encode(random_cache(9)) == codec.encode(random_cache(9))  # noqa: S301


def test_flags_that_are_not_exact_are_corrupt():
    stream = bytearray(lossless_codec().encode(random_cache(20)))
    for flag in (2, 8):
        stream[CHUNKS_AT + 10] = flag
        with pytest.raises(CorruptStream, match="not exact"):
            kvtc.inspect(reseal(stream))


def test_the_coder_of_floats_is_for_exact_tokens_alone():
    stream = Codec(tiny_calibration(), "paper", coder="none", window_tokens=0).encode(random_cache(50))
    kinds = [section.kind for section in kvtc.inspect(stream).sections]
    for number, kind in enumerate(kinds):
        _, start, length = sections_of(stream)[number]
        changed = with_section(stream, number, stream[start : start + length], coder=4)
        with pytest.raises(CorruptStream, match="are claimed in" if kind == "sink" else "no exact tokens"):
            Codec(tiny_calibration()).decode(changed)


def test_a_rate_in_a_lossless_stream_is_corrupt():
    stream = lossless_codec().encode(random_cache(20))
    with pytest.raises(CorruptStream, match="expected 0 at most"):
        lossless_codec().decode(with_section(stream, 0, bytes(4), raw_bytes=4))


def test_prefix_caches_keep_every_bit(tmp_path):
    cache, ids = random_cache(100, torch.bfloat16), np.arange(100)
    with kvtc.PrefixCache(lossless_codec(), kvtc.open_store(f"file://{tmp_path}"), min_tokens=1) as prefixes:
        prefixes.save(ids, cache).result()
        found, n_tokens = prefixes.load_neutral(ids)
        assert n_tokens == 96
        assert same_bits(found, cache.span(0, 96))
