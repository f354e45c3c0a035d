"""Groups of layers in a stream: what must be there is, and what cannot be is refused, by one error that says what."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace

import pytest

import kvtc
from kvtc.codec.codec import Codec
from kvtc.container.groups import NO_CACHE, SIDE_BUFFER, STATE, WINDOW, Group, Part, pack_groups, parse_groups
from kvtc.container.stream import CodedSection, parse_stream, write_stream
from kvtc.container.tables import SectionType
from kvtc.errors import CorruptStream, InvalidArgument, KvtcError, StreamTooLarge, TruncatedStream, UnsupportedVersion
from tests.builders import groups_end, reseal
from tests.container.test_golden import golden_groups_cache, golden_stream

FULL, LATENT, IN_WINDOW, CONVOLUTION, RECURRENT, INDEXER, NOTHING = range(7)
"""Groups of the golden stream by their kinds; `index_of` says where each stands."""


def index_of(which: int) -> int:
    names = [("full attention", 1), ("latent", 1), ("sliding window", 1), ("recurrent state", 2), ("recurrent state", 3),
             ("side buffer", 5), ("no cache", 0)]  # fmt: skip
    groups = parse_stream(golden_stream("groups")).header.groups
    return next(i for i, group in enumerate(groups) if (group.kind, int(group.part)) == names[which])


def rewritten(
    groups: Callable[[list[Group]], list[Group]] = list,
    sections: Callable[[list[CodedSection]], list[CodedSection]] = list,
) -> bytes:
    """The golden stream with other groups, or other sections, under right checksums."""
    parsed = parse_stream(golden_stream("groups"))
    held = [CodedSection(section, bytes(parsed.stored(section))) for section in parsed.sections]
    header = replace(parsed.header, groups=tuple(groups(list(parsed.header.groups))))
    return write_stream(header, list(parsed.chunks), sections(held))


def changed(which: int, **fields: object) -> bytes:
    """The golden stream with other fields of a group."""
    at = index_of(which)
    return rewritten(lambda groups: [replace(one, **fields) if i == at else one for i, one in enumerate(groups)])


def without(which: int, chunk: int) -> bytes:
    """The golden stream without a group's section of a chunk."""
    at = index_of(which)
    return rewritten(sections=lambda held: [s for s in held if (s.entry.group, s.entry.chunk) != (at, chunk) or not at])


def moved(which: int, **fields: object) -> bytes:
    """The golden stream with other fields in the entry of a group's last section."""
    at = index_of(which)

    def change(held: list[CodedSection]) -> list[CodedSection]:
        last = max(i for i, section in enumerate(held) if section.entry.group == at)
        return [replace(s, entry=replace(s.entry, **fields)) if i == last else s for i, s in enumerate(held)]

    return rewritten(sections=change)


def test_groups_of_every_kind_come_back_from_their_table():
    groups = parse_stream(golden_stream("groups")).header.groups
    assert {group.kind for group in groups} == {"full attention", "latent", WINDOW, STATE, SIDE_BUFFER, NO_CACHE}
    assert rewritten() == golden_stream("groups")
    packed = pack_groups(groups)
    assert parse_groups(memoryview(packed), 0, len(groups)) == groups
    assert len(packed) == 7 * 20 + 4 * (2 + 1 + 2 + 1 + 1 + 1 + 1)


MISSING = {
    "tokens of a latent": (lambda: without(LATENT, 1), r"\(latent\) has 2 sections; it needs 3, one for each chunk"),
    "keys of an indexer": (
        lambda: without(INDEXER, 0),
        r"\(side buffer \(indexer keys 0\)\) has 2 sections; it needs 3",
    ),
}


@pytest.mark.parametrize("case", MISSING)
def test_a_missing_section_of_a_group_that_keeps_every_token_is_corrupt(case):
    make, message = MISSING[case]
    with pytest.raises(CorruptStream, match=message):
        kvtc.inspect(make())


@pytest.mark.parametrize(("which", "chunk"), [(IN_WINDOW, 2), (IN_WINDOW, 1), (CONVOLUTION, 2), (RECURRENT, 2)])
def test_without_a_window_or_a_state_there_is_no_resume_point(which, chunk):
    stream = without(which, chunk)
    assert kvtc.inspect(stream).resume_points == ()
    with pytest.raises(InvalidArgument, match=r"cannot be restored after 20 tokens.*it can be after none"):
        Codec(lossless=True).decode(stream)


WRONG = {
    "section of a group that is not there": lambda: moved(INDEXER, group=7),
    "two sections of one group": lambda: moved(INDEXER, group=index_of(LATENT)),
    "section of a chunk that is not there": lambda: moved(INDEXER, chunk=3),
    "state with the type of tokens": lambda: moved(RECURRENT, type=SectionType.BODY),
    "tokens with the type of a state": lambda: moved(LATENT, type=SectionType.STATE),
    "state of another size": lambda: moved(RECURRENT, raw_bytes=100),
    "half a token": lambda: moved(LATENT, raw_bytes=65),
    "more tokens than the chunk": lambda: moved(IN_WINDOW, raw_bytes=5 * 2 * 8 * 2),
    "section of nothing": lambda: moved(INDEXER, group=index_of(NOTHING)),
    "layer in two groups": lambda: changed(IN_WINDOW, layers=(0, 3)),
    "layer with nothing and something": lambda: changed(NOTHING, layers=(5,)),
    "window without an extent": lambda: changed(IN_WINDOW, extent=0),
    "side buffer without an extent": lambda: changed(INDEXER, extent=0),
    "state with an extent": lambda: changed(RECURRENT, extent=1),
    "state without axes": lambda: changed(RECURRENT, shape=(0, 0, 0)),
    "state with an axis before one that lacks": lambda: changed(RECURRENT, shape=(2, 0, 12)),
    "latent without heads": lambda: changed(LATENT, shape=(0, 6, 2)),
    "values that are keys and are there": lambda: changed(LATENT, values_are_keys=True),
    "nothing with a shape": lambda: changed(NOTHING, shape=(1, 1, 1)),
    "part of another kind": lambda: changed(LATENT, part=Part.RECURRENT_STATE),
    "sixteenth state": lambda: changed(RECURRENT, index=16),
    "second keys of an indexer": lambda: changed(INDEXER, index=1),
    "coded group that is not the first": lambda: rewritten(lambda groups: groups[1:] + groups[:1]),
    "extent past its cap": lambda: changed(IN_WINDOW, extent=2**31 + 1),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_groups_cannot_be_is_corrupt(case):
    with pytest.raises(CorruptStream):
        kvtc.inspect(WRONG[case]())


def test_layers_that_no_class_holds_together_are_corrupt():
    """The tables are sound; only a cache cannot be made of them."""
    stream = changed(RECURRENT, layers=(6,), index=0)
    with pytest.raises(CorruptStream, match="in a group without a cache"):
        kvtc.inspect(stream)
    stream = changed(INDEXER, layers=(0,))
    with pytest.raises(
        CorruptStream, match=r"layer 0 holds side buffer \(indexer keys 0\), sliding window: no class of layer"
    ):
        Codec(lossless=True).decode(stream)


def test_layers_that_hold_nothing_are_not_made_without_end():
    stream = changed(NOTHING, layers=(65_535,))
    assert kvtc.inspect(stream).groups[index_of(NOTHING)].layers == (65_535,)
    with pytest.raises(StreamTooLarge, match="layer 65535; a transformers cache of at most 4096 layers"):
        Codec(lossless=True).decode(stream)
    with pytest.raises(InvalidArgument, match="4102 layers; 4096 is the most"):
        changed(NOTHING, layers=tuple(range(6, 4_100)))
    many = bytearray(changed(NOTHING, layers=(6,)))
    last_run = groups_end(many) - 4
    many[last_run : last_run + 4] = struct.pack("<HH", 6, 4_094)
    with pytest.raises(CorruptStream, match="4102 layers and more; 4096 is the limit"):
        kvtc.inspect(reseal(many))


def test_a_stream_of_groups_cut_anywhere_is_truncated():
    stream = golden_stream("groups")
    for length in range(len(stream)):
        with pytest.raises(TruncatedStream):
            kvtc.inspect(stream[:length])


@pytest.mark.parametrize("mask", [0x01, 0x80])
def test_a_flip_of_a_stream_of_groups(mask):
    """Detected by a checksum; under right ones either an error of the package, or another cache."""
    codec, stream = Codec(lossless=True), golden_stream("groups")
    outcomes = {True: 0, False: 0}
    for place in range(len(stream)):
        damaged = bytearray(stream)
        damaged[place] ^= mask
        with pytest.raises((CorruptStream, TruncatedStream, UnsupportedVersion)):
            codec.decode(bytes(damaged))
        try:
            codec.decode(reseal(damaged))
        except KvtcError:
            outcomes[False] += 1
        else:
            outcomes[True] += 1
    assert min(outcomes.values()) > 50


def test_the_golden_cache_comes_back():
    cache, codec = golden_groups_cache(), Codec(lossless=True)
    found = codec.decode(golden_stream("groups"))
    assert [type(layer) for layer in found.layers] == [type(layer) for layer in cache.layers]
