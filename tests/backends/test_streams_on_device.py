"""Streams decoded where they lie: tensors of bytes, here on the host's own device; and the prefix cache over a store of them."""

from __future__ import annotations

from functools import cache as remember

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvtc.backends import reference
from kvtc.codec.codec import Codec
from kvtc.container import stream_data
from kvtc.container.stream import parse_stream
from kvtc.container.tables import SectionType
from kvtc.errors import CorruptStream, InvalidArgument, KvtcError, TruncatedStream, UnsupportedVersion
from kvtc.prefix_cache import PrefixCache
from kvtc.profiles.joint.chunk_bytes import heads_of
from kvtc.store import open_store
from tests.builders import reseal, same_cache, sections_of, told_cache, told_codec, told_ids

N = 150


def codec(profile: str = "conditional", **changes) -> Codec:
    return told_codec(profile, **{"ratio": 4, "window_tokens": 16, "chunk_tokens": 32, **changes})


def on_device(stream: bytes) -> Tensor:
    return torch.frombuffer(bytearray(stream), dtype=torch.uint8)


def stream_of(made_by: Codec, n: int = N) -> bytes:
    return made_by.encode(told_cache(n), told_ids(n))


@pytest.fixture
def bodies(monkeypatch):
    """What reaches the backend."""
    found = []
    read, unpack = reference.ReferenceBackend.read_integers, reference.ReferenceBackend.unpack_groups

    def read_integers(self, chunks, rank):
        found.extend(part for chunk in chunks for part in (chunk.activities, chunk.symbols, chunk.escapes))
        return read(self, chunks, rank)

    def unpack_groups(self, chunks, counts, allocation):
        found.extend(chunks)
        return unpack(self, chunks, counts, allocation)

    monkeypatch.setattr(reference.ReferenceBackend, "read_integers", read_integers)
    monkeypatch.setattr(reference.ReferenceBackend, "unpack_groups", unpack_groups)
    return found


OPTIONS = [
    {"profile": "joint"},
    {"profile": "conditional"},
    {"profile": "joint", "window_format": "coded"},
    {"profile": "conditional", "fixed_size": True, "sink_format": "fp8"},
    {"profile": "paper", "coder": "none"},
    {"profile": "paper"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("tokens", [None, 70, 0])
def test_decodes_to_the_same_cache_and_leaves_bodies_where_they_lie(bodies, options, tokens):
    made = codec(**options)
    stream = stream_of(made)
    expected = made.decode_neutral(stream, told_ids(N), tokens=tokens)
    bodies.clear()
    whole = on_device(stream)
    assert same_cache(made.decode_neutral(whole, told_ids(N), tokens=tokens), expected)
    assert bool(bodies) == (tokens != 0)
    # A lossless coder leaves alone what it would lengthen.
    coders = {section.coder for section in parse_stream(stream).sections if section.type is SectionType.BODY}
    for body in bodies:
        assert isinstance(body, Tensor) or "deflate" in coders
        assert isinstance(body, bytes) or body.untyped_storage().data_ptr() == whole.data_ptr(), "a slice, not a copy"


def test_layers_batches_and_targets_take_tensors():
    made = codec()
    stream, ids = stream_of(made), told_ids(N)
    for (_, *expected), (_, *found) in zip(
        made.decode_layers(stream, ids), made.decode_layers(on_device(stream), ids), strict=True
    ):
        assert all(map(torch.equal, expected, found))


def test_tables_come_over_in_two_copies_at_most_and_sections_in_one(monkeypatch):
    made = codec("joint")
    sizes = []
    copy = stream_data._copy

    def counted(data):
        sizes.append(len(data))
        return copy(data)

    monkeypatch.setattr(stream_data, "_copy", counted)
    small = on_device(stream_of(made, 40))
    made.decode_neutral(small, told_ids(40))
    assert sizes[0] == min(len(small), stream_data._HEAD_BYTES)
    sizes.clear()
    stream = stream_of(codec("joint", chunk_tokens=2))
    codec("joint").decode_neutral(on_device(stream), told_ids(N))
    head = 64 + 20 * len(parse_stream(stream).chunks) + 20 * len(parse_stream(stream).sections)
    assert head <= stream_data._HEAD_BYTES or sizes[1] == head
    assert len(sizes) <= 4, "tables, the rate, and everything else that is read here"


def test_tables_longer_than_the_first_copy(monkeypatch):
    monkeypatch.setattr(stream_data, "_HEAD_BYTES", 60)
    made = codec()
    stream = stream_of(made)
    assert same_cache(made.decode_neutral(on_device(stream), told_ids(N)), made.decode_neutral(stream, told_ids(N)))


def test_what_is_read_here_is_verified_and_bodies_are_not_again():
    made = codec("joint", step=0.05, ratio=None)
    stream = stream_of(made)
    parsed = parse_stream(stream)
    for kind in (SectionType.RATE, SectionType.SINK, SectionType.WINDOW):
        section = next(section for section in parsed.sections if section.type is kind)
        damaged = bytearray(stream)
        damaged[section.offset] ^= 1
        with pytest.raises(CorruptStream, match=f"{kind.name.lower()}.*checksum"):
            made.decode_neutral(on_device(damaged))
    damaged = bytearray(stream)
    damaged[parsed.find(SectionType.BODY, 1).offset] ^= 1
    with pytest.raises(CorruptStream, match="body of chunk 1 fails"):
        made.decode_neutral(bytes(damaged))
    try:
        found = made.decode_neutral(on_device(damaged))
    except CorruptStream:
        return
    assert not same_cache(found, made.decode_neutral(stream))


def test_the_lengths_of_bodies_come_over_together():
    chunks = [b"abcdef", on_device(b"ghijkl"), b"mn", on_device(b"opq")]
    assert heads_of(chunks, [3, 2, 0, 3]) == [b"abc", b"gh", b"", b"opq"]
    assert heads_of([], []) == []


def test_damaged_tables_are_found():
    made = codec("joint")
    stream = stream_of(made)
    flipped = bytearray(stream)
    flipped[60] ^= 1
    newer = bytearray(stream)
    newer[4] = 9
    for data, error in (
        (flipped, CorruptStream),
        (newer, UnsupportedVersion),
        (stream[:40], TruncatedStream),
        (stream[:100], TruncatedStream),
        (stream[:-1], TruncatedStream),
        (stream + b"x", CorruptStream),
        (b"", TruncatedStream),
        (b"other bytes", CorruptStream),
    ):
        for form in (bytes(data), on_device(data) if data else torch.empty(0, dtype=torch.uint8)):
            with pytest.raises(error):
                made.decode_neutral(form)


def test_bodies_that_lie_about_their_parts_are_corrupt():
    """What the tables promise holds, but not what the body says of itself."""
    made = codec("joint")
    stream = bytearray(stream_of(made))
    offset = parse_stream(bytes(stream)).find(SectionType.BODY, 1).offset
    n_side = -(-32 * 2 // 8)
    stream[offset + n_side : offset + n_side + 4] = b"\xff" * 4
    with pytest.raises(CorruptStream, match="claims"):
        made.decode_neutral(on_device(reseal(stream)))


@remember
def stream_of_options(number: int) -> bytes:
    return stream_of(codec(**OPTIONS[number]))


@settings(max_examples=60)
@given(
    number=st.integers(0, len(OPTIONS) - 1),
    places=st.lists(st.integers(0, 10**6), min_size=1, max_size=4),
    value=st.binary(min_size=1, max_size=8),
)
def test_bodies_of_any_bytes_decode_or_are_corrupt(number, places, value):
    """No checksum stands before them on the device."""
    stream = bytearray(stream_of_options(number))
    spans = [s.span for s in parse_stream(bytes(stream)).sections if s.type is SectionType.BODY]
    for place in places:
        span = spans[place % len(spans)]
        at = span.start + place // len(spans) % (span.stop - span.start - len(value))
        stream[at : at + len(value)] = value
    try:
        found = codec(**OPTIONS[number]).decode_neutral(on_device(stream), told_ids(N))
    except KvtcError:
        return
    assert found.n_tokens == N


@pytest.mark.parametrize(
    "data", [torch.zeros(10), torch.zeros(2, 60, dtype=torch.uint8), np.zeros(60, np.uint8), "text"]
)
def test_other_things_are_no_streams(data):
    with pytest.raises(InvalidArgument, match="stream"):
        codec("joint").decode_neutral(data)


def test_a_strided_tensor_is_a_stream_too():
    made = codec("joint")
    stream = stream_of(made)
    spread = torch.zeros(2 * len(stream), dtype=torch.uint8)
    spread[::2] = on_device(stream)
    assert same_cache(made.decode_neutral(spread[::2]), made.decode_neutral(stream))


# The prefix cache over it.


@pytest.mark.parametrize("profile", ["paper", "joint", "conditional"])
def test_prefixes_are_the_same_as_over_memory(bodies, profile):
    found = {}
    for url in ("memory:", "device:cpu"):
        with open_store(url) as store, PrefixCache(codec(profile), store, min_tokens=1) as prefixes:
            prefixes.save(told_ids(N), told_cache(N)).result()
            bodies.clear()
            found[url] = prefixes.load_neutral(told_ids(N + 5))
            n_tensors = sum(isinstance(body, Tensor) for body in bodies)
            assert bool(n_tensors) == (url == "device:cpu")
    (expected, n), (cache, found_n) = found["memory:"], found["device:cpu"]
    assert n == found_n == N
    assert same_cache(cache, expected)


def test_after_the_device_has_lost_them_prefixes_come_from_files(tmp_path, bodies):
    upper = open_store("device:cpu")
    with (
        open_store([upper, f"file://{tmp_path}"]) as store,
        PrefixCache(codec(), store, min_tokens=1) as prefixes,
    ):
        prefixes.save(told_ids(N), told_cache(N)).result()
        expected, _ = prefixes.load_neutral(told_ids(N), whole=True)
        for key in list(upper.keys()):
            upper.delete(key)
        bodies.clear()
        for from_device in (False, True):
            cache, n = prefixes.load_neutral(told_ids(N), whole=True)
            assert (n, same_cache(cache, expected)) == (N, True)
            assert any(isinstance(body, Tensor) for body in bodies) == from_device
            bodies.clear()


def test_a_chunk_that_was_damaged_before_it_was_put_is_a_counted_miss():
    with open_store("device:cpu") as store, PrefixCache(codec(), store, min_tokens=1) as prefixes:
        prefixes.save(told_ids(N), told_cache(N)).result()
        keys = [key for key in prefixes.store.keys() if key.startswith("chunk")]  # noqa: SIM118
        for key in keys:
            value = bytearray(store.get(key))
            value[sections_of(value)[-1][1]] ^= 1
            store.put(key, value)
        assert prefixes.load_neutral(told_ids(N))[1] == 0
        assert prefixes.statistics["damaged"] == 1
        assert sum(map(store.contains, keys)) == len(keys) - 1
