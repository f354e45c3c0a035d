"""The stream as a container: what is cut, flipped, swapped or oversized is refused with the right error, in little memory."""

from __future__ import annotations

import resource
import time
import tracemalloc
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from struct import pack

import lz4.block
import pytest
import torch
import zstandard

import kvtc
from kvtc.cache import KVCache
from kvtc.codec.codec import Codec
from kvtc.codec.opened_stream import positions_of
from kvtc.coding.lossless import CODER_IDS, compress, decompress
from kvtc.container.parts import join_streams, split_stream
from kvtc.container.stream import Payload, code_payloads, parse_stream, write_stream
from kvtc.container.tables import SectionType
from kvtc.errors import CorruptStream, InvalidArgument, KvtcError, StreamTooLarge, TruncatedStream, UnsupportedVersion
from tests import claims
from tests.builders import (
    CHUNK_BYTES,
    CHUNK_TOKENS_AT,
    CHUNKS_AT,
    HEADER_BYTES,
    N_CHUNKS_AT,
    N_GROUPS_AT,
    N_SECTIONS_AT,
    RUN_BYTES,
    gappy_cache,
    golden_codec,
    joint_calibration,
    joint_codec,
    patched,
    random_cache,
    reseal,
    same_cache,
    section_table_at,
    sections_of,
    tiny_calibration,
    tiny_codec,
    told_cache,
    told_codec,
    told_ids,
    with_section,
)

MIB = 1 << 20


def tiny_stream(**options) -> bytes:
    """10 tokens: 3 chunks of 4, 4 and 2; sinks, body, window and digests."""
    return tiny_codec(**options).encode(random_cache(10, torch.bfloat16), range(10))


READERS = [kvtc.inspect, lambda stream: tiny_codec().decode(stream)]


@contextmanager
def little_memory(mib: int = 4):
    """Fails if the block allocates more than a few MiB, in Python or outside of it."""
    tracemalloc.start()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < mib * MIB
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 32 * MIB


def test_the_checksums_of_the_tests_are_those_of_the_writer():
    stream = tiny_stream()
    assert reseal(stream) == stream


@pytest.mark.parametrize("read", READERS, ids=["inspect", "decode"])
@pytest.mark.parametrize("make", [tiny_stream, lambda: tiny_codec().encode(gappy_cache())], ids=["plain", "gaps"])
def test_a_stream_cut_anywhere_is_truncated(make: Callable[[], bytes], read):
    stream = make()
    for length in range(len(stream)):
        with pytest.raises(TruncatedStream):
            read(stream[:length])


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_every_flipped_byte_is_detected(mask):
    codec, stream = tiny_codec(), tiny_stream()
    for place in range(len(stream)):
        damaged = bytearray(stream)
        damaged[place] ^= mask
        with pytest.raises((CorruptStream, TruncatedStream, UnsupportedVersion)):
            codec.decode(bytes(damaged))


def test_inspect_detects_every_flip_in_header_and_tables():
    stream = tiny_stream()
    for place in range(sections_of(stream)[0][1]):
        damaged = bytearray(stream)
        damaged[place] ^= 0x10
        with pytest.raises((CorruptStream, TruncatedStream, UnsupportedVersion)):
            kvtc.inspect(damaged)


def test_a_flip_under_right_checksums_raises_only_errors_of_the_package():
    codec, stream = tiny_codec(), tiny_stream()
    outcomes = {True: 0, False: 0}
    for place in range(len(stream)):
        damaged = bytearray(stream)
        damaged[place] ^= 0x04
        try:
            decoded = codec.decode(reseal(damaged))
        except KvtcError:
            outcomes[False] += 1
        else:
            assert decoded.keys.shape[0] == 3
            outcomes[True] += 1
    assert min(outcomes.values()) > 100


@pytest.mark.parametrize("read", READERS, ids=["inspect", "decode"])
@pytest.mark.parametrize("tail", [b"\0", b"KVTC", bytes(100)])
def test_trailing_bytes_are_corrupt(read, tail):
    with pytest.raises(CorruptStream, match=f"{len(tail)} bytes follow the last section"):
        read(tiny_stream() + tail)


@pytest.mark.parametrize("read", READERS, ids=["inspect", "decode"])
@pytest.mark.parametrize("data", [b"x", b"GGUF", b"PK\x03\x04" + bytes(200), b"kvtc" + bytes(52)])
def test_another_kind_of_file_is_named_as_such(read, data):
    with pytest.raises(CorruptStream, match="not a kvtc stream"):
        read(data)


@pytest.mark.parametrize("read", READERS, ids=["inspect", "decode"])
@pytest.mark.parametrize(("version", "remedy"), [(2, "encode the cache again"), (4, "upgrade kvtc")])
def test_another_version_names_both(read, version, remedy):
    with pytest.raises(UnsupportedVersion, match=rf"format version {version}; .*version 3: {remedy}"):
        read(patched(tiny_stream(), 4, "B", version))


def with_groups(stream: bytes, *kinds: int) -> bytes:
    """The stream with a group of each of these kinds, all else as in its own."""
    entry, run = stream[HEADER_BYTES + 1 : CHUNKS_AT - RUN_BYTES], stream[CHUNKS_AT - RUN_BYTES : CHUNKS_AT]
    groups = b"".join(bytes([kind]) + entry for kind in kinds) + run * len(kinds)
    data = stream[:HEADER_BYTES] + groups + stream[CHUNKS_AT:]
    return patched(data, N_GROUPS_AT, "B", len(kinds))


@pytest.mark.parametrize("read", [*READERS, split_stream], ids=["inspect", "decode", "split"])
@pytest.mark.parametrize(
    ("kinds", "found"),
    [
        ([0], r"1 groups of layers \(kind 0\)"),
        ([7], r"1 groups of layers \(kind 7\)"),
        ([1, 9], r"2 groups of layers \(full attention, kind 9\)"),
        ([255] * 255, r"255 groups of layers \(kind 255\)"),
    ],
)
def test_groups_that_a_later_version_may_hold_are_refused_by_their_kinds(read, kinds, found):
    with little_memory(), pytest.raises(UnsupportedVersion, match=rf"{found} .*this kvtc reads the kinds"):
        read(with_groups(tiny_stream(), *kinds))


@pytest.mark.parametrize("read", READERS, ids=["inspect", "decode"])
def test_a_group_without_values_is_not_coded(read):
    with pytest.raises(CorruptStream, match="the profile is paper, but there is no group that it codes"):
        read(patched(tiny_stream(), HEADER_BYTES + 12, "H", 0))


def test_what_a_stream_without_tokens_costs():
    """A stream without tokens is its header, one group, and the rate with its entry of the section table."""
    stream = tiny_codec().encode(random_cache(0))
    (_, start, length), *others = sections_of(stream)
    assert (start, len(stream), others) == (40 + 24 + 20, 84 + length, [])
    assert with_groups(stream, 1) == stream


def test_any_buffer_is_read():
    stream = tiny_stream()
    decoded = tiny_codec().decode(stream)
    for view in (bytearray(stream), memoryview(stream)):
        assert same_cache(tiny_codec().decode(view), decoded)
        assert kvtc.inspect(view) == kvtc.inspect(stream)


# Offsets in docs/format.md; a chunk or section table entry is counted from the first one.
UNKNOWN = {
    "profile": (5, "B", 9),
    "header flags": (6, "B", 8),
    "no group": (N_GROUPS_AT, "B", 0),
    "chunk_tokens 0": (CHUNK_TOKENS_AT, "I", 0),
    "chunk_tokens past its cap": (CHUNK_TOKENS_AT, "I", 32769),
    "dtype 0": (HEADER_BYTES + 1, "B", 0),
    "dtype 6": (HEADER_BYTES + 1, "B", 6),
    "no runs": (HEADER_BYTES + 2, "H", 0),
    "no layers in a run": (CHUNKS_AT - 2, "H", 0),
    "layers past their cap": (CHUNKS_AT - 4, "HH", 65535, 2),
    "part of another kind": (HEADER_BYTES + 4, "H", 5),
    "values that are keys, and are there": (HEADER_BYTES + 14, "H", 1),
    "a state that has run, without being one": (HEADER_BYTES + 14, "H", 2),
    "no heads": (HEADER_BYTES + 8, "H", 0),
    "no features": (HEADER_BYTES + 10, "HH", 0, 0),
    "reserved in group": (HEADER_BYTES + 14, "H", 4),
    "rope_length": (HEADER_BYTES + 16, "I", 2**31 + 1),
    "chunk flags": (CHUNKS_AT + 10, "H", 16),
    "chunk with positions in a stream without gaps": (CHUNKS_AT + 10, "H", 1),
    "chunk without tokens": (CHUNKS_AT + 2 * CHUNK_BYTES + 4, "HHH", 0, 0, 0),
    "too many tokens for the cell": (CHUNKS_AT + 4, "HHH", 2, 3, 0),
    "position past its cap": (CHUNKS_AT, "I", 2**31),
    "section type": (CHUNKS_AT + 3 * CHUNK_BYTES, "B", 2),
    "coder": (CHUNKS_AT + 3 * CHUNK_BYTES + 1, "B", 5),
    "group of a section": (CHUNKS_AT + 3 * CHUNK_BYTES + 2, "H", 1),
    "section of another chunk": (CHUNKS_AT + 3 * CHUNK_BYTES + 4, "I", 0),
}


@pytest.mark.parametrize("read", READERS, ids=["inspect", "decode"])
@pytest.mark.parametrize("case", UNKNOWN)
def test_unknown_numbers_are_corrupt(case, read):
    offset, layout, *values = UNKNOWN[case]
    with pytest.raises(CorruptStream):
        read(patched(tiny_stream(), offset, layout, *values))


def test_digests_without_their_flag_are_corrupt():
    stream = tiny_stream()
    with pytest.raises(CorruptStream):
        kvtc.inspect(patched(stream, 6, "B", stream[6] & ~1))


def test_a_last_position_past_2_to_the_31_is_corrupt():
    """Cells of 3 do not end at 2**31: the last one sticks out."""
    codec = tiny_codec(chunk_tokens=3, sink_tokens=0, window_tokens=0)
    last = 2**31 - 1
    good = codec.encode(random_cache(1, torch.bfloat16), positions=[last])
    assert codec.decode(good).positions.tolist() == [last]
    header, chunk = parse_stream(good).header, parse_stream(good).chunks[0]
    allocation = parse_stream(good).read(SectionType.RATE, 0xFFFFFFFF, kvtc.inspect(good).sections[0].raw_bytes)
    payloads = [Payload(SectionType.RATE, 0xFFFFFFFF, allocation), Payload(SectionType.BODY, 0, bytes(10))]
    with pytest.raises(CorruptStream, match="2 tokens from position 2147483647"):
        parse_stream(write_stream(header, [replace(chunk, n_body=2)], code_payloads(payloads, "none")))


@pytest.mark.parametrize(
    "offsets",
    [(0, 1, 2, 3), (0, 1, 1), (0, 3, 1), (0, 1, 4), (1, 2, 3), (0, 1, 65535)],
    ids=["too many", "equal", "falling", "past the cell", "not the chunk's first", "far away"],
)
def test_impossible_positions_are_corrupt(offsets):
    codec = tiny_codec()
    stream = codec.encode(gappy_cache())
    number = next(i for i, s in enumerate(kvtc.inspect(stream).sections) if s.kind == "positions")
    listed = pack(f"<{len(offsets)}H", *offsets)
    with pytest.raises(CorruptStream):
        codec.decode(with_section(stream, number, listed, coder=0, raw_bytes=len(listed)))


def test_possible_positions_are_accepted():
    """The counterpart of the test before: it fails there for what is listed, not for how it is put in."""
    codec = tiny_codec()
    stream = codec.encode(gappy_cache())
    number = next(i for i, s in enumerate(kvtc.inspect(stream).sections) if s.kind == "positions")
    decoded = codec.decode(with_section(stream, number, pack("<3H", 0, 1, 2), coder=0, raw_bytes=6))
    assert decoded.positions[:3].tolist() == [0, 1, 2]


def entry_of(stream: bytes, kind: str) -> int:
    """Offset of the first table entry of a kind of section."""
    number = next(i for i, s in enumerate(kvtc.inspect(stream).sections) if s.kind == kind)
    return section_table_at(stream) + 20 * number


def with_allocation(stream: bytes, raw: bytes) -> bytes:
    return with_section(stream, 0, raw, coder=0, raw_bytes=len(raw))


# Claims far beyond what is there, with every checksum right.
OVERSIZED = {
    "2**20 chunks": lambda s: patched(s, N_CHUNKS_AT, "I", 1 << 20),
    "2**32 chunks": lambda s: patched(s, N_CHUNKS_AT, "I", 2**32 - 1),
    "2**20 chunks and their sections": lambda s: patched(s, N_CHUNKS_AT, "II", 1 << 20, (4 << 20) + 1),
    "255 groups": lambda s: patched(s, N_GROUPS_AT, "B", 255),
    "2**32 sections": lambda s: patched(s, N_SECTIONS_AT, "I", 2**32 - 1),
    "4 sections a chunk": lambda s: patched(s, N_SECTIONS_AT, "I", 13),
    "stored bytes": lambda s: patched(s, entry_of(s, "body") + 12, "I", 2**32 - 1),
    "raw bytes of a body": lambda s: patched(s, entry_of(s, "body") + 8, "I", 2**32 - 1),
    "raw bytes of sinks": lambda s: patched(s, entry_of(s, "sink") + 8, "I", 2**32 - 1),
    "raw bytes of the rate": lambda s: patched(s, entry_of(s, "rate") + 8, "I", 2**32 - 1),
    "65535 tokens": lambda s: patched(s, CHUNKS_AT + 6, "H", 65535),
    "32766 tokens in one large cell": lambda s: patched(
        patched(split_stream(s)[1], CHUNK_TOKENS_AT, "I", 32768), CHUNKS_AT, "IHHH", 0, 0, 32766, 0
    ),
    "65535 runs": lambda s: with_allocation(s, pack("<H", 65535) + bytes(100)),
    "a run of 2**32 coefficients": lambda s: with_allocation(s, pack("<HIHHBH", 1, 0, 65535, 65535, 2, 0)),
    "a run that starts at 2**32": lambda s: with_allocation(s, pack("<HIHHBH", 1, 2**32 - 1, 1, 1, 2, 0)),
    "no allocation": lambda s: with_allocation(s, b""),
    "an allocation of nothing": lambda s: with_allocation(s, bytes(4)),
    "an allocation and more": lambda s: with_allocation(s, pack("<HIHHBHB", 1, 0, 1, 1, 2, 0, 0)),
}


@pytest.mark.parametrize("claim", OVERSIZED)
@pytest.mark.parametrize("coder", CODER_IDS)
def test_oversized_claims_are_refused_in_little_memory(coder, claim):
    codec, stream = tiny_codec(), OVERSIZED[claim](tiny_stream(coder=coder))
    with little_memory(), pytest.raises((CorruptStream, TruncatedStream)):
        codec.decode(stream)


BOMBS = {
    "deflate": lambda raw: zlib.compress(raw, 9, wbits=-15),
    "zstd": lambda raw: zstandard.ZstdCompressor(level=19, write_content_size=False).compress(raw),
    "zstd that names its size": lambda raw: zstandard.ZstdCompressor(level=1).compress(raw),
    "lz4": lambda raw: lz4.block.compress(raw, mode="high_compression", store_size=False),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_block_that_decodes_to_far_too_much_is_refused_in_little_memory(kind):
    """A few KiB that would become 256 MiB, where a body of some hundred bytes is due."""
    coder = kind.split()[0]
    codec, stream = tiny_codec(coder=coder), tiny_stream(coder=coder)
    number = next(i for i, s in enumerate(kvtc.inspect(stream).sections) if s.kind == "body")
    due = kvtc.inspect(stream).sections[number].raw_bytes
    size = 16 * MIB if coder == "lz4" else 256 * MIB
    block = BOMBS[kind](bytes(size))
    assert len(block) < size // 200
    bomb = with_section(stream, number, pack("<I", len(block)) + block, CODER_IDS[coder])
    with little_memory(), pytest.raises(CorruptStream):
        codec.decode(bomb)
    small = BOMBS[kind](bytes(due))
    codec.decode(with_section(stream, number, pack("<I", len(small)) + small, CODER_IDS[coder]))


@pytest.mark.parametrize("coder", ["deflate", "zstd", "lz4"])
@pytest.mark.parametrize(("profile", "most"), [(claims.PAPER, 868), (claims.JOINT, 8)])
def test_a_rate_is_not_inflated_before_its_size_is_checked(coder, profile, most):
    """64 MiB in some ten KiB; 868 bytes are 48 runs of keys and as many of values, a coefficient each."""
    bomb = claims.inflated_rate(joint_calibration(), 64 * MIB, coder, profile)
    assert len(bomb) < 300_000
    with (
        little_memory(),
        pytest.raises(CorruptStream, match=f"section rate claims 67108864 bytes; expected {most} at most"),
    ):
        joint_codec().decode(bomb)


def test_a_million_chunks_are_parsed_by_the_bytes_they_take():
    """Eleven seconds once; what is measured here is the processor's time, and the bytes are 44 million."""
    stream = claims.many_chunks(joint_calibration(), 1 << 20)
    started = time.process_time()
    tracemalloc.start()
    parsed = parse_stream(stream)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - started < 2
    assert peak < 4 * len(stream)
    assert (parsed.n_tokens, len(parsed.chunks), len(parsed.sections)) == (1 << 20, 1 << 20, (1 << 20) + 1)
    assert (parsed.chunks[-1].first_position, parsed.chunks[-1].n_body) == ((1 << 20) - 1, 1)
    last = parsed.find(SectionType.BODY, (1 << 20) - 1)
    assert (last, last.span) == (parsed.sections[-1], slice(len(stream) - 2, len(stream)))


@pytest.mark.parametrize("read", [kvtc.inspect, lambda s: parse_stream(s).verify(), split_stream])
def test_reading_tables_takes_time_and_memory_by_their_bytes(read):
    stream = claims.many_chunks(joint_calibration(), 1 << 16)
    started = time.process_time()
    tracemalloc.start()
    read(stream)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - started < 4
    assert peak < 16 * len(stream)


def test_parts_do_not_repeat_a_large_rate_without_end():
    """A megabyte of rate and 300 chunks in 1.1 MB would be 315 MB of parts."""
    stream = claims.large_rate_of_many_parts(joint_calibration(), 300, MIB)
    with (
        little_memory(),
        pytest.raises(StreamTooLarge, match="300 parts would each repeat the 1048576 bytes of the rate"),
    ):
        split_stream(stream)
    assert len(split_stream(claims.large_rate_of_many_parts(joint_calibration(), 60, MIB))) == 60


def test_more_chunks_than_a_reader_takes_are_not_written():
    part = claims.many_chunks(joint_calibration(), 1 << 20)
    more = patched(claims.many_chunks(joint_calibration(), 1), CHUNKS_AT, "I", 1 << 20)
    with pytest.raises(InvalidArgument, match="1048577 chunks; a stream holds 1048576 at most"):
        join_streams([part, more])


def test_claims_past_the_tokens_agreed_to_are_refused_in_little_memory():
    """Each chunk of 32768 tokens is sound and takes some hundred bytes; two thousand million tokens fit into 8 MB."""
    codec, calibration = told_codec("joint", step=4.0), joint_calibration()
    stream = claims.many_tokens(calibration, 65_535)
    assert (len(stream), kvtc.inspect(stream).n_tokens) == (7_995_367, 65_535 * 32_768)
    for read in (codec.decode, positions_of, codec.decode_layers, lambda s: codec.decode_batch([s])):
        with little_memory(16), pytest.raises(StreamTooLarge, match=r"2147450880 tokens .* 1048576 are allowed"):
            read(stream)
    with little_memory(16):
        assert codec.decode(stream, tokens=10).n_tokens == 10


@pytest.mark.parametrize("coder", CODER_IDS)
@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 65537, 200_000])
def test_lossless_coders_are_lossless(coder, size):
    half = torch.randint(256, (size // 2,), generator=torch.Generator().manual_seed(size)).tolist()
    raw = bytes(half) + bytes(size - size // 2)
    stored = compress(raw, coder)
    assert decompress(stored, size, coder) == raw
    for wrong in (size - 1, size + 1, size + 65536):
        if wrong >= 0:
            with pytest.raises(CorruptStream):
                decompress(stored, wrong, coder)


@pytest.mark.parametrize("coder", ["deflate", "zstd", "lz4"])
def test_blocks_that_end_early_or_late_are_corrupt(coder):
    raw = bytes(range(256)) * 4
    block = compress(raw, coder)[4:]
    for wrong in (b"", block[:-1], block + b"\0", block + block, b"\xff" * 20):
        with pytest.raises(CorruptStream):
            decompress(pack("<I", len(wrong)) + wrong, len(raw), coder)
    for lengths in (len(block) - 1, len(block) + 1, 2**32 - 1):
        with pytest.raises(CorruptStream):
            decompress(pack("<I", lengths) + block, len(raw), coder)


def test_chunks_in_the_wrong_order_are_corrupt():
    stream = parse_stream(tiny_stream())
    payloads = [
        Payload(s.type, s.chunk, stream.read(s.type, s.chunk, s.raw_bytes)) for s in stream.sections if s.chunk != 1
    ]
    first, _, last = stream.chunks
    assert len(parse_stream(write_stream(stream.header, [first], code_payloads(payloads[:3], "none"))).chunks) == 1
    for chunks in ([last, first], [first, first]):
        swapped = [payloads[0]] + [
            Payload(kind, index, bytes(8)) for index, chunk in enumerate(chunks) for kind in chunk.sections()
        ]
        with pytest.raises(CorruptStream, match="does not follow"):
            parse_stream(write_stream(stream.header, chunks, code_payloads(swapped, "none")))


@pytest.mark.parametrize(
    "counts",
    [((0, 4, 0), (4, 0, 0)), ((0, 0, 4), (0, 4, 0)), ((0, 2, 2), (0, 1, 3)), ((4, 0, 0), (0, 0, 4), (1, 3, 0))],
)
def test_regions_in_the_wrong_order_are_corrupt(counts):
    stream = parse_stream(tiny_stream())
    chunks = [
        replace(stream.chunks[0], first_position=4 * i, n_sink=sink, n_body=body, n_window=window)
        for i, (sink, body, window) in enumerate(counts)
    ]
    payloads = [Payload(SectionType.RATE, 0xFFFFFFFF, bytes(4))]
    payloads += [Payload(kind, index, bytes(8)) for index, chunk in enumerate(chunks) for kind in chunk.sections()]
    with pytest.raises(CorruptStream, match="earlier region"):
        parse_stream(write_stream(stream.header, chunks, code_payloads(payloads, "none")))


def long_cache(seed: int = 0, n: int = 22) -> KVCache:
    return random_cache(n, torch.bfloat16, seed)


def test_joining_what_was_split_gives_the_stream_back():
    for stream in (
        tiny_codec().encode(long_cache(), range(22)),
        tiny_codec(coder="none", sink_format="fp8").encode(long_cache()),
        tiny_codec().encode(gappy_cache(14)),
    ):
        parts = split_stream(stream)
        assert len(parts) == kvtc.inspect(stream).n_chunks > 3
        assert join_streams(parts) == stream
        assert join_streams([join_streams(parts[:2]), join_streams(parts[2:])]) == stream
        assert [split_stream(part) for part in parts] == [[part] for part in parts]


def test_each_part_decodes_to_its_own_tokens():
    codec = tiny_codec()
    stream = codec.encode(gappy_cache(14), range(14))
    whole, first = codec.decode(stream), 0
    for part in split_stream(stream):
        decoded = codec.decode(part, range(first, first + kvtc.inspect(part).n_tokens))
        tokens = slice(first, first + decoded.n_tokens)
        assert decoded.positions.tolist() == whole.positions[tokens].tolist()
        torch.testing.assert_close(decoded.keys, whole.keys[:, :, tokens])
        torch.testing.assert_close(decoded.values, whole.values[:, :, tokens])
        first = tokens.stop
    assert first == 14


@pytest.mark.parametrize("cache", [long_cache(), gappy_cache(14)], ids=["plain", "gaps"])
def test_every_prefix_of_the_parts_decodes_to_the_first_tokens(cache):
    codec = tiny_codec()
    stream = codec.encode(cache, range(cache.n_tokens))
    parts = split_stream(stream)
    for count in range(1, len(parts) + 1):
        prefix = join_streams(parts[:count])
        n = kvtc.inspect(prefix).n_tokens
        assert same_cache(codec.decode(prefix, range(n)), codec.decode(stream, range(n), tokens=n))
    assert n == cache.n_tokens


def test_parts_that_do_not_follow_one_another_do_not_join():
    parts = split_stream(tiny_codec().encode(long_cache(), range(22)))
    for wrong in (
        parts[::-1],
        [parts[0], parts[0]],
        [parts[0], parts[2]],
        [parts[0], *parts[2:]],
        [parts[1], parts[0]],
    ):
        with pytest.raises(InvalidArgument, match="do not follow"):
            join_streams(wrong)


def test_gappy_parts_out_of_order_do_not_join():
    parts = split_stream(tiny_codec().encode(gappy_cache(14)))
    with pytest.raises(InvalidArgument, match="do not follow"):
        join_streams([parts[1], parts[0]])


def other(n: int = 22, **options) -> bytes:
    return tiny_codec(**options).encode(long_cache(1, n), range(n))


def of_another_calibration() -> bytes:
    codec = Codec(tiny_calibration(1), ratio=3, sink_tokens=2, window_tokens=3, chunk_tokens=4)
    return codec.encode(long_cache(1), range(22))


FOREIGN = {
    "another rate": lambda: other(ratio=5),
    "another calibration": of_another_calibration,
    "another dtype": lambda: tiny_codec().encode(random_cache(22, torch.float16), range(22)),
    "another grid": lambda: other(chunk_tokens=5),
    "another rotation": lambda: tiny_codec().encode(replace(long_cache(), rope_length=99), range(22)),
    "no digests": lambda: tiny_codec().encode(long_cache(1)),
    "gaps": lambda: tiny_codec().encode(gappy_cache(14), range(14)),
    "another model": lambda: golden_codec().encode(KVCache(torch.ones(1, 1, 5, 8), torch.ones(1, 1, 5, 8)), range(5)),
}


@pytest.mark.parametrize("which", FOREIGN)
def test_foreign_parts_do_not_join(which):
    parts = split_stream(tiny_codec().encode(long_cache(), range(22)))
    other = split_stream(FOREIGN[which]())
    with pytest.raises(InvalidArgument, match="stream 1 was not made by the encoding of stream 0"):
        join_streams([parts[0], other[1]])


def test_splitting_and_joining_nothing():
    empty = tiny_codec().encode(random_cache(0))
    assert split_stream(empty) == []
    assert join_streams([empty, empty]) == empty
    with pytest.raises(InvalidArgument):
        join_streams([])


def test_joining_a_damaged_part_is_refused():
    parts = split_stream(tiny_stream())
    with pytest.raises(TruncatedStream):
        join_streams([parts[0], parts[1][:-1]])


# The profiles whose bodies are entropy-coded.

JOINT = ["joint", "conditional"]
JOINT_IDS = told_ids(14)


def joint_stream(profile: str) -> bytes:
    """14 tokens: 2 chunks; sinks, body, window and digests."""
    return joint_codec(profile).encode(told_cache(14, torch.bfloat16), JOINT_IDS)


@pytest.mark.parametrize("profile", JOINT)
def test_an_entropy_coded_stream_cut_anywhere_is_truncated(profile):
    codec, stream = joint_codec(profile), joint_stream(profile)
    for length in range(len(stream)):
        with pytest.raises(TruncatedStream):
            codec.decode(stream[:length], JOINT_IDS)


@pytest.mark.parametrize("profile", JOINT)
def test_every_flipped_byte_of_an_entropy_coded_stream_is_detected(profile):
    codec, stream = joint_codec(profile), joint_stream(profile)
    for place in range(len(stream)):
        damaged = bytearray(stream)
        damaged[place] ^= 0x80
        with pytest.raises((CorruptStream, TruncatedStream, UnsupportedVersion)):
            codec.decode(bytes(damaged), JOINT_IDS)


@pytest.mark.parametrize("profile", JOINT)
@pytest.mark.parametrize("mask", [0x01, 0x04, 0x80])
def test_a_flip_of_an_entropy_coded_stream_under_right_checksums(profile, mask):
    codec, stream = joint_codec(profile), joint_stream(profile)
    outcomes = {True: 0, False: 0}
    for place in range(len(stream)):
        damaged = bytearray(stream)
        damaged[place] ^= mask
        try:
            decoded = codec.decode(reseal(damaged), JOINT_IDS)
        except KvtcError:
            outcomes[False] += 1
        else:
            assert bool(decoded.keys.isfinite().all() or place >= sections_of(stream)[1][1])
            outcomes[True] += 1
    assert min(outcomes.values()) > 50


def with_body(stream: bytes, body: bytes) -> bytes:
    """The stream with the first body replaced."""
    number = next(i for i, s in enumerate(kvtc.inspect(stream).sections) if s.kind == "body")
    return with_section(stream, number, body, coder=0, raw_bytes=len(body))


def of_many_tokens(stream: bytes, body: bytes) -> bytes:
    """One chunk of 32768 body tokens."""
    large = patched(split_stream(stream)[1], CHUNK_TOKENS_AT, "I", 32768)
    alone = patched(large, CHUNKS_AT, "IHHH", 0, 0, 32768, 0)
    return with_body(with_window_dropped(alone), body)


def with_window_dropped(stream: bytes) -> bytes:
    """Without the last section, which is the window's."""
    entry, start, length = sections_of(stream)[-1]
    shorter = stream[:entry] + stream[entry + 20 : start] + stream[start + length :]
    return patched(shorter, N_SECTIONS_AT, "I", len(sections_of(stream)) - 1)


def many_chunks(profile: str, count: int) -> bytes:
    """Each claims 32768 tokens and has a body of one byte."""
    stream = joint_stream(profile)
    header = replace(parse_stream(stream).header, chunk_tokens=32768, has_digests=False)
    chunk = replace(parse_stream(stream).chunks[0], n_sink=0, n_window=0, n_body=32768, token_digest=bytes(8))
    chunks = [replace(chunk, first_position=32768 * index) for index in range(count)]
    rate = parse_stream(stream).read(SectionType.RATE, 0xFFFFFFFF, 4)
    payloads = [Payload(SectionType.RATE, 0xFFFFFFFF, rate)]
    payloads += [Payload(SectionType.BODY, index, b"x", is_final=True) for index in range(count)]
    return write_stream(header, chunks, code_payloads(payloads, "none"))


OVERSIZED_BODIES = {
    "no length": lambda s: of_many_tokens(s, bytes(100)),
    "no symbols": lambda s: of_many_tokens(s, bytes(8192 + 4)),
    "a length past the end": lambda s: of_many_tokens(s, bytes(8192) + pack("<I", 2**32 - 1)),
    "states alone": lambda s: of_many_tokens(s, bytes(8192) + pack("<I32I", 128, *[2**32 - 1] * 32)),
    "states of nothing": lambda s: of_many_tokens(s, bytes(8192) + pack("<I32I", 128, *[0] * 32)),
    "escapes past all symbols": lambda s: with_body(s, parse_stream(s).read(SectionType.BODY, 0, None) + bytes(10_000)),
}


@pytest.mark.parametrize("claim", OVERSIZED_BODIES)
def test_oversized_claims_of_bodies_are_refused_in_little_memory(claim):
    codec, stream = joint_codec("joint"), OVERSIZED_BODIES[claim](joint_codec("joint").encode(told_cache(14)))
    codec.decode(joint_codec("joint").encode(told_cache(14)))
    with little_memory(12), pytest.raises(CorruptStream):
        codec.decode(stream)


def test_tokens_of_many_chunks_are_not_believed_before_their_bodies():
    """Fifteen thousand million coefficients by the chunk table, and not a byte for any of them, even where they are allowed."""
    stream = many_chunks("joint", 5_000)
    codec = told_codec("joint", max_tokens=1 << 40)
    with (
        little_memory(),
        pytest.raises(CorruptStream, match="of chunk 0: 32768 tokens need at least 8196 bytes; it has 1"),
    ):
        codec.decode_layers(stream)


def test_a_body_of_a_few_bytes_may_hold_many_tokens():
    """With the coarsest step nothing is coded: two bits a token are left."""
    codec = told_codec("joint", step=joint_codec("joint")._encoder._steps.most, window_tokens=0)
    stream = codec.encode(told_cache(1000))
    info = kvtc.inspect(stream)
    assert sum(s.stored_bytes for s in info.sections if s.kind == "body") == 249 + 4 * 4
    assert bool(codec.decode(stream).keys.isfinite().all())


def test_entropy_coded_streams_of_two_steps_do_not_join():
    parts = [split_stream(joint_codec("joint", step=step).encode(told_cache(30))) for step in (4.0, 5.0)]
    with pytest.raises(InvalidArgument, match="rates differ"):
        join_streams([parts[0][0], parts[1][1]])
