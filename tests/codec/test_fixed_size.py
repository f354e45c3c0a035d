"""Streams of a fixed size: exactly the promised bytes, whatever the cache holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvtc
from kvtc.cache import KVCache
from kvtc.codec.codec import Codec
from kvtc.container.parts import join_streams, split_stream
from kvtc.errors import CorruptStream, InvalidArgument
from kvtc.profiles.joint.step_search import FinestStep
from kvtc.profiles.rates import FixedSize
from tests.builders import (
    CHUNK_BYTES,
    CHUNKS_AT,
    DTYPES,
    N_HEADS,
    N_LAYERS,
    NAMES,
    gappy_cache,
    joint_codec,
    reseal,
    same_bits,
    same_cache,
    section_table_at,
    sections_of,
    tiny_calibration,
    told_cache,
    told_codec,
    told_ids,
)

PROFILES = ["joint", "conditional"]
SHAPE = N_LAYERS, N_HEADS

of_both = pytest.mark.parametrize("profile", PROFILES)


def fixed_codec(profile: str = "joint", **options: object) -> Codec:
    return joint_codec(profile, **({"ratio": 16, "chunk_tokens": 64, "fixed_size": True} | options))


def wild_cache(n: int, kind: str, dtype: torch.dtype, seed: int) -> KVCache:
    """Caches that no calibration has seen."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, *SHAPE, n, 8, generator=generator)
    both = {
        "zeros": torch.zeros_like(noise),
        "constant": torch.full_like(noise, 300.0),
        "noise": 50 * noise,
        "huge": 1e4 * noise,
        "largest": torch.full_like(noise, torch.finfo(dtype).max if dtype.itemsize < 4 else 1e30) * noise.sign(),
        "one token": torch.where(torch.arange(n)[:, None] == n // 2, 3e4 * noise, noise),
        "tiny": 1e-6 * noise,
        "told": torch.stack([told_cache(n, seed=seed).keys, told_cache(n, seed=seed).values]),
    }[kind]
    limit = torch.finfo(dtype).max
    keys, values = both.clamp(-limit, limit).to(dtype)
    return KVCache(keys.contiguous(), values.contiguous())


KINDS = ["zeros", "constant", "noise", "huge", "largest", "one token", "tiny", "told"]


@settings(max_examples=60, deadline=None)
@given(
    profile=st.sampled_from(PROFILES),
    n=st.integers(0, 150),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.float8_e4m3fn]),
    ratio=st.sampled_from([1.0, 3.0, 16.0, 100.0, 1000.0]),
    window=st.sampled_from([0, 3, 40]),
    sink_format=st.sampled_from(["exact", "fp8"]),
    window_format=st.sampled_from(["exact", "coded"]),
    seed=st.integers(0, 3),
)
def test_any_cache_fits_to_the_byte(profile, n, kind, dtype, ratio, window, sink_format, window_format, seed):
    options = {"ratio": ratio, "window_tokens": window, "sink_format": sink_format, "window_format": window_format}
    codec = fixed_codec(profile, **options)
    cache, ids = wild_cache(n, kind, dtype, seed), told_ids(n, seed)
    stream = codec.encode(cache, ids)
    assert len(stream) == codec.stream_bytes(n, dtype)
    decoded = codec.decode(stream, ids)
    assert (decoded.n_tokens, decoded.dtype) == (n, dtype)
    assert bool(decoded.keys.float().isfinite().all())
    info = kvtc.inspect(stream)
    assert info.total_bytes == len(stream)
    # Padding and all else that is not exact tokens counts for the body.
    exact = sum(s.stored_bytes + 20 for s in info.sections if s.kind in ("sink", "window"))
    assert info.body_bytes == (len(stream) - exact if info.body_tokens else 0)


@of_both
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_pages_of_a_usual_cache_are_full(profile, dtype):
    """Hardly a byte is padding where the coded rows can use it."""
    codec = fixed_codec(profile, chunk_tokens=256, window_tokens=0)
    stream = codec.encode(told_cache(600, dtype), told_ids(600))
    info = kvtc.inspect(stream)
    assert info.padding_bytes < 0.02 * info.total_bytes
    # What coding saves of the exact sinks is there for the body.
    assert info.body_ratio == pytest.approx(16, rel=0.02)


@of_both
def test_a_higher_ratio_is_a_smaller_stream_and_a_coarser_cache(profile):
    cache, ids = told_cache(400), told_ids(400)
    sizes, found = [], []
    for ratio in (4, 16, 64):
        codec = fixed_codec(profile, ratio=ratio, window_tokens=0, sink_tokens=0)
        stream = codec.encode(cache, ids)
        sizes.append(len(stream))
        found.append(float((codec.decode(stream, ids).values - cache.values).norm()))
    assert sizes[0] > 3.5 * sizes[1] > 3.5 * 3.5 * sizes[2] * 0.5
    assert found == sorted(found)


@of_both
def test_where_nothing_fits_nothing_is_coded(profile, monkeypatch):
    """The last resort: the mean row, or what token ids say, and the size all the same."""
    monkeypatch.setattr(FinestStep, "goes_on_after", lambda *_: False)
    codec = fixed_codec(profile, window_tokens=0)
    cache, ids = told_cache(100), told_ids(100)
    stream = codec.encode(cache, ids)
    assert len(stream) == codec.stream_bytes(100, torch.float32)
    other = told_cache(100, seed=0)
    other.values[:, :, 2:] += 5.0
    assert same_bits(codec.decode(codec.encode(other, ids), ids).values, codec.decode(stream, ids).values)


@of_both
def test_the_size_follows_the_places_of_tokens(profile):
    """A cache that begins inside a cell, and one with gaps: another size, known as well."""
    codec = fixed_codec(profile)
    whole, ids = told_cache(100), told_ids(100)
    part = KVCache(whole.keys[:, :, 30:], whole.values[:, :, 30:], torch.arange(30, 100))
    told = ids if profile == "conditional" else ids[30:]
    assert len(codec.encode(part, told)) == codec.stream_bytes(70, torch.float32, first_position=30)
    gappy = gappy_cache(40)
    if profile == "joint":
        assert len(codec.encode(gappy, ids[:40])) == codec.stream_bytes(40, positions=gappy.positions)
    # Where the ratio leaves too little, the places are added to what suffices.
    scant = fixed_codec(profile, ratio=1000)
    assert scant.stream_bytes(40, positions=gappy.positions) == scant.stream_bytes(40) + 2 * 40 + 20


def test_lossless_coding_of_exact_tokens_buys_a_finer_step():
    """The window of zeros takes few bytes; the size stays, so the body gets them."""
    cache, ids = told_cache(200), told_ids(200)
    emptied = KVCache(cache.keys.clone(), cache.values.clone())
    emptied.keys[:, :, 120:], emptied.values[:, :, 120:] = 0, 0
    codec = fixed_codec(window_tokens=80)
    first, second = codec.encode(cache, ids), codec.encode(emptied, ids)
    assert len(first) == len(second)
    body = slice(2, 120)
    errors = [
        float((codec.decode(stream, ids).values[:, :, body] - cache.values[:, :, body]).norm())
        for stream in (first, second)
    ]
    assert errors[1] < 0.5 * errors[0]


@of_both
def test_padded_streams_split_and_join(profile):
    codec, ids = fixed_codec(profile, ratio=2000), told_ids(200)
    stream = codec.encode(told_cache(200), ids)
    assert kvtc.inspect(stream).padding_bytes >= 0
    parts = split_stream(stream)
    assert [any(s.kind == "padding" for s in kvtc.inspect(part).sections) for part in parts] == [False] * 3 + [True]
    assert join_streams(parts) == stream
    assert same_cache(codec.decode(stream, ids), codec.decode(join_streams(parts), ids))
    # A prefix that does not reach the padding does not read it.
    damaged = bytearray(stream)
    damaged[-1] ^= 1
    assert codec.decode(bytes(damaged), ids[:64], tokens=64).n_tokens == 64


def padded_stream() -> bytes:
    """A window that lossless coding makes small, and padding in its place."""
    codec = fixed_codec(window_tokens=40, sink_tokens=0)
    return codec.encode(wild_cache(20, "zeros", torch.float16, 0))


def test_padding_is_zeros():
    stream = bytearray(padded_stream())
    assert kvtc.inspect(bytes(stream)).padding_bytes > 100
    assert stream[-100:] == bytes(100)
    stream[-7] = 1
    with pytest.raises(CorruptStream, match="padding of chunk 0 fails its checksum"):
        fixed_codec().decode(bytes(stream))
    with pytest.raises(CorruptStream, match="other bytes than zeros"):
        fixed_codec().decode(reseal(stream))


def test_padding_is_not_coded_again():
    stream = bytearray(padded_stream())
    entry = sections_of(stream)[-1][0]
    assert entry == section_table_at(stream) + 40
    stream[entry + 1] = 1
    with pytest.raises(CorruptStream, match="coded twice"):
        fixed_codec().decode(reseal(stream))


def test_padding_needs_its_flag():
    stream = bytearray(padded_stream())
    assert stream[CHUNKS_AT + 10] == 4
    stream[CHUNKS_AT + 10] = 0
    with pytest.raises(CorruptStream, match="need 2 sections; 3 are in the table"):
        kvtc.inspect(reseal(stream))
    stream[CHUNKS_AT + 10] = 16
    with pytest.raises(CorruptStream, match="flags 16"):
        kvtc.inspect(reseal(stream))
    assert len(stream) > CHUNKS_AT + CHUNK_BYTES


def test_an_empty_cache_has_a_size_too():
    codec = fixed_codec()
    assert len(codec.encode(told_cache(0))) == codec.stream_bytes(0) == 88


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"profile": "paper"}, "paper cannot keep to a fixed size"),
        ({"profile": "joint", "step": 1.0}, "a fixed size needs a ratio"),
        ({"profile": "conditional", "ratio": 0.5}, "at least 1; got 0.5"),
    ],
)
def test_settings_without_a_size_are_refused(options, expected):
    with pytest.raises(InvalidArgument, match=expected):
        told_codec(fixed_size=True, **options)


@pytest.mark.parametrize(
    "arguments", [{"n_tokens": -1}, {"n_tokens": 3, "dtype": torch.int8}, {"n_tokens": 3, "first_position": -1}]
)
def test_sizes_of_what_cannot_be_are_refused(arguments):
    with pytest.raises(InvalidArgument, match="cannot be"):
        fixed_codec().stream_bytes(**arguments)


def test_positions_must_be_as_many_as_tokens():
    with pytest.raises(InvalidArgument, match="3 tokens, but 2 positions"):
        fixed_codec().stream_bytes(3, positions=np.array([1, 5]))


def test_other_codecs_promise_no_size():
    for codec in (joint_codec("joint"), Codec(tiny_calibration(), ratio=3)):
        with pytest.raises(InvalidArgument, match="fixed_size=True"):
            codec.stream_bytes(10)


def test_the_default_ratio_is_sixteen():
    codec = told_codec("joint", fixed_size=True)
    assert codec.rate == FixedSize(16)


def test_another_ratio_of_the_same_codec():
    codec = fixed_codec(window_tokens=0)
    other = codec.with_rate(FixedSize(4))
    cache = told_cache(100)
    assert len(other.encode(cache)) == other.stream_bytes(100, torch.float32) > codec.stream_bytes(100, torch.float32)
    assert other.encode(cache) == fixed_codec(window_tokens=0, ratio=4).encode(cache)
    with pytest.raises(InvalidArgument, match="lack a fixed size"):
        joint_codec("joint").with_rate(FixedSize(4))
    with pytest.raises(InvalidArgument, match="at least 1"):
        codec.with_rate(FixedSize(0.5))
