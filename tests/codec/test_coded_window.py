"""A window that is coded like the body, with a finer step."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

import kvtc
from kvtc.cache import KVCache
from kvtc.codec.codec import Codec
from kvtc.container.parts import join_streams, split_stream
from kvtc.container.stream import parse_stream
from kvtc.container.tables import STREAM_WIDE, SectionType
from kvtc.errors import CorruptStream, InvalidArgument
from kvtc.profiles.joint.plan import FINER_WINDOW
from tests.builders import (
    CHUNKS_AT,
    assert_parts_decode_alone,
    joint_codec,
    patched,
    relative_error,
    reseal,
    same_bits,
    same_cache,
    sections_of,
    tiny_calibration,
    tiny_codec,
    told_cache,
    told_codec,
    told_gappy_cache,
    told_ids,
    with_section,
)

PROFILES = ["joint", "conditional"]
WINDOW = 30

of_both = pytest.mark.parametrize("profile", PROFILES)


def window_codec(profile: str = "joint", **options: object) -> Codec:
    return joint_codec(profile, **({"window_tokens": WINDOW, "window_format": "coded", "chunk_tokens": 64} | options))


def steps_of(stream: bytes) -> list[float]:
    return np.frombuffer(parse_stream(stream).read(SectionType.RATE, STREAM_WIDE, 8), "<f4").tolist()


@of_both
@pytest.mark.parametrize("n", [0, 2, 3, 32, 33, 100])
def test_round_trip(profile, n):
    """The window comes back closer than the body; sinks bit for bit."""
    codec = window_codec(profile, step=2.0)
    cache, ids = told_cache(n), told_ids(n)
    stream = codec.encode(cache, ids)
    decoded, info = codec.decode(stream, ids), kvtc.inspect(stream)
    assert decoded.n_tokens == n
    assert info.window_tokens == max(0, min(WINDOW, n - 2))
    assert info.window_format == ("coded" if n > 2 else "exact")
    assert steps_of(stream) == [2.0, 2.0 / FINER_WINDOW]
    assert same_bits(decoded.keys[:, :, :2], cache.keys[:, :, :2])
    window, body = slice(max(2, n - WINDOW), n), slice(2, max(2, n - WINDOW))
    if n > 2:
        assert 0 < relative_error(decoded.values[:, :, window], cache.values[:, :, window]) < 0.08
    if n > WINDOW + 20:
        errors = [relative_error(decoded.values[:, :, here], cache.values[:, :, here]) for here in (window, body)]
        assert errors[0] < 0.5 * errors[1]


@of_both
def test_the_window_costs_less_than_an_exact_one_and_the_body_as_much(profile):
    cache, ids = told_cache(400, torch.bfloat16), told_ids(400)
    streams = [
        window_codec(profile, ratio=16, window_format=window_format).encode(cache, ids)
        for window_format in ("exact", "coded")
    ]
    exact, coded = (kvtc.inspect(stream) for stream in streams)
    assert coded.total_ratio > 1.2 * exact.total_ratio
    assert coded.body_ratio == pytest.approx(16, rel=0.02)
    sizes = [sum(s.stored_bytes for s in info.sections if s.kind == "window") for info in (exact, coded)]
    assert sizes[1] < 0.6 * sizes[0]
    assert coded.body_bytes == coded.total_bytes - sum(
        s.stored_bytes + 20 for s in coded.sections if s.kind in ("sink", "window")
    )


@of_both
def test_prediction_sees_what_comes_before_the_window(profile):
    """Layers are recomputed from the ids of the body and of the window."""
    codec = window_codec(profile, step=0.05, chunk_tokens=256)
    cache, ids = told_cache(100), told_ids(100)
    decoded = codec.decode(codec.encode(cache, ids), ids)
    assert relative_error(decoded.values[:, :, 2:], cache.values[:, :, 2:]) < 0.01
    assert relative_error(decoded.keys[:, :, 2:], cache.keys[:, :, 2:]) < 0.01


@of_both
def test_chunks_decode_alone(profile):
    codec = window_codec(profile, chunk_tokens=16)
    cache, ids = told_gappy_cache(60) if profile == "joint" else (told_cache(60, torch.bfloat16), told_ids(60))
    stream = codec.encode(cache, ids)
    whole = codec.decode(stream, ids)
    assert_parts_decode_alone(codec, stream, ids)
    for n in (0, 1, 20, 31, 45, 60):
        part = codec.decode(stream, ids[:n], tokens=n)
        torch.testing.assert_close(part.keys, whole.keys[:, :, :n], rtol=2**-7, atol=1e-3)


@of_both
def test_one_step_makes_equal_chunks(profile):
    """Where the body ends does not change the chunks before; a window of other chunks does not either."""
    codec = window_codec(profile, step=1.0, chunk_tokens=32)
    cache, ids = told_cache(150), told_ids(150)
    parts = split_stream(codec.encode(cache, ids))
    shorter = KVCache(cache.keys[:, :, :140], cache.values[:, :, :140])
    assert split_stream(codec.encode(shorter, ids[:140]))[:3] == parts[:3]


@of_both
def test_moved_elsewhere(profile):
    codec, ids = window_codec(profile), told_ids(80)
    stream = codec.encode(told_cache(80), ids)
    here, there = codec.decode(stream, ids), codec.decode(stream, ids, start_position=500)
    assert same_bits(here.values, there.values)


@of_both
def test_a_step_stays_within_what_the_calibration_serves(profile):
    least = window_codec(profile)._encoder._steps.least
    stream = window_codec(profile, step=least).encode(told_cache(40), told_ids(40))
    assert steps_of(stream) == [least, least]


@of_both
def test_a_fixed_size_holds_the_window_too(profile):
    codec = window_codec(profile, ratio=16, fixed_size=True)
    exact = window_codec(profile, ratio=16, fixed_size=True, window_format="exact")
    for n in (20, 200):
        cache, ids = told_cache(n, torch.bfloat16), told_ids(n)
        stream = codec.encode(cache, ids)
        assert len(stream) == codec.stream_bytes(n) < exact.stream_bytes(n)
        assert same_cache(codec.decode(stream, ids), codec.decode(join_streams(split_stream(stream)), ids))


def test_a_window_without_a_step_is_corrupt():
    stream = window_codec().encode(told_cache(60))
    with pytest.raises(CorruptStream, match="no step for it"):
        window_codec().decode(with_section(stream, 0, stream[sections_of(stream)[0][1] :][:4], raw_bytes=4))
    with pytest.raises(CorruptStream, match="one step or two"):
        window_codec().decode(with_section(stream, 0, bytes(5), raw_bytes=5))
    with pytest.raises(CorruptStream, match="claims 12 bytes; expected 8 at most"):
        window_codec().decode(with_section(stream, 0, bytes(12), raw_bytes=12))
    with pytest.raises(CorruptStream, match="outside of what"):
        window_codec().decode(with_section(stream, 0, struct.pack("<2f", 1, np.nan)))


def test_windows_are_coded_in_all_chunks_or_in_none():
    stream = window_codec(chunk_tokens=16).encode(told_cache(60))
    last = CHUNKS_AT + 20 * 3
    assert stream[last + 10] == 8
    with pytest.raises(CorruptStream, match="all or none"):
        kvtc.inspect(patched(stream, last + 10, "H", 0))


def test_paper_has_no_coded_window():
    with pytest.raises(InvalidArgument, match="keeps its window exactly"):
        Codec(tiny_calibration(), window_format="coded")
    with pytest.raises(InvalidArgument, match="exact or coded; got 'fp8'"):
        told_codec("joint", window_format="fp8")
    stream = bytearray(tiny_codec().encode(told_cache(3)))
    stream[CHUNKS_AT + 10] = 8
    with pytest.raises(CorruptStream, match="all or none"):
        kvtc.inspect(reseal(stream))
