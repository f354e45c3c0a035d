"""Windows of resume points are kept by chunk: each token once, whichever points need it.

Most tests have windows of 40 tokens, which reach back over 39 tokens: to two or three chunks of 16.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import kvtc
from kvtc.codec.codec import Codec
from kvtc.errors import CorruptStream
from kvtc.prefix_cache.sort import Sort
from kvtc.store import Store, open_store
from tests.codec.test_groups import lossless
from tests.prefix_cache.test_pointed import CHUNK, Conversation, keys_of, model_of, opened
from tests.tiny_architectures import MIXED_WINDOWS, mixed_cache, random_ids, windowed_calibration


@pytest.fixture
def store() -> Iterator[Store]:
    with open_store("memory:") as opened:
        yield opened


def saved(store, ends, ids=None) -> Conversation:
    """A conversation that is saved at each of its ends, without other points."""
    talk = Conversation(model_of("long windows"), random_ids(1, 160) if ids is None else ids)
    for n in ends:
        talk.read(n)
        with opened(store) as prefixes:
            prefixes.save(talk.ids[0, :n], talk.cache).result()
    return talk


def tokens_of(store, kind: str) -> list[int]:
    return sorted(kvtc.inspect(store.get(key)).n_tokens for key in keys_of(store, kind + "/"))


def loaded(store, ids, **counts) -> tuple[object, int]:
    """What another process loads of a text; its counts of misses and faults are those that are given."""
    with opened(store) as prefixes:
        # Asks for the sort of the model, so that the load looks for no other chunks.
        prefixes.contains(ids)
        found = prefixes.load(ids, whole=True)
        names = ("misses", "damaged", "other")
        assert {name: prefixes.statistics[name] for name in names} == dict.fromkeys(names, 0) | counts
        return found


def test_a_chat_of_short_turns_stores_each_window_token_once(store):
    """Beside the chunks, a point has only the tokens behind the last of them."""
    ends = list(range(64, 113, 4))
    talk = saved(store, ends)
    # The window before token 64 begins at token 25, and has the last 7 tokens of their chunk.
    assert tokens_of(store, "window") == [7, *[CHUNK] * 5]
    assert tokens_of(store, "point") == sorted(end % CHUNK or 1 for end in ends)
    for n in ends:
        found, n_found = loaded(store, talk.ids[0, :n])
        assert n_found == n
        talk.check(found, n)


def test_points_of_the_grid_share_chunks(store):
    """Each window reaches back to the chunks of the point before it, which has the first of them whole."""
    talk = Conversation(model_of("long windows"), random_ids(1, 140))
    talk.read(128)
    with opened(store) as prefixes:
        prefixes.save(talk.ids[0, :128], talk.cache, talk.points).result()
    # Points after 32, 64, 96 and 128 tokens; token 25 is the first that the second one needs, of a chunk that the first one has.
    assert tokens_of(store, "window") == [CHUNK] * 8
    assert tokens_of(store, "point") == [1] * 4
    for n in (32, 64, 96, 128):
        talk.check(loaded(store, talk.ids[0, :n])[0], n)


def test_a_chunk_that_is_missing_or_damaged_takes_its_points_with_it(store):
    talk = saved(store, (64, 80, 96))
    before = set(keys_of(store, "window"))
    talk.read(112)
    with opened(store) as prefixes:
        prefixes.save(talk.ids[0, :112], talk.cache).result()
    (last,) = set(keys_of(store, "window")) - before
    entry = store.get(last)
    store.delete(last)
    for n, expected, misses in ((112, 96, 1), (96, 96, 0)):
        found, n_found = loaded(store, talk.ids[0, :n], misses=misses)
        assert n_found == expected
        talk.check(found, expected)
    store.put(last, entry[:-1] + bytes([entry[-1] ^ 1]))
    assert loaded(store, talk.ids[0, :112], misses=1, damaged=1)[1] == 96
    assert last not in keys_of(store)
    with opened(store) as prefixes:
        assert prefixes.contains(talk.ids[0, :112]) == 96
        prefixes.save(talk.ids[0, :112], talk.cache).result()
    assert store.get(last) == entry
    talk.check(loaded(store, talk.ids[0, :112])[0], 112)


def test_conversations_that_begin_alike_share_chunks(store):
    talk = saved(store, (64, 72, 96))
    before = set(keys_of(store, "window"))
    ids = talk.ids.clone()
    ids[:, 80:] = random_ids(1, 80, seed=1)
    other = saved(store, (64, 72, 96), ids)
    # The chunks before token 80 are the same, of which the last is whole in both.
    assert len(set(keys_of(store, "window")) - before) == 1
    for each in (talk, other):
        each.check(loaded(store, each.ids[0, :96])[0], 96)


def test_what_is_left_of_a_chunk_is_kept_until_more_of_it_is_saved(store):
    """The windows begin at the tokens 39, 37 and 31: of the chunk from token 32 on they hold 9 tokens, 11, and all."""
    talk = Conversation(model_of("long windows"), random_ids(1, 80))
    for n in (70, 76, 78):
        talk.read(n)
    for n, kept in ((78, [9, 16]), (76, [11, 16]), (78, [11, 16]), (70, [1, 11, 16, 16]), (76, [1, 11, 16, 16])):
        with opened(store) as prefixes:
            prefixes.save(talk.ids[0, :n], talk.kept[n]).result()
        assert tokens_of(store, "window") == kept
        talk.check(loaded(store, talk.ids[0, :78])[0], 78)
    for n in (70, 76):
        found, n_found = loaded(store, talk.ids[0, :n])
        assert n_found == n
        talk.check(found, n)
    # What is left serves those who need no more.
    for key in keys_of(store, "window"):
        chunk = kvtc.inspect(store.get(key))
        if (chunk.n_tokens, chunk.first_position) == (CHUNK, 32):
            store.delete(key)
    assert [loaded(store, talk.ids[0, :n])[1] for n in (76, 78)] == [76, 78]
    assert loaded(store, talk.ids[0, :70], misses=1)[1] == 0


def two_lengths(n: int) -> DynamicCache:
    """A cache of n tokens of one text: layers with windows of 8, 40 and 40 tokens, and one of full attention."""
    cache, drawn = DynamicCache(), torch.Generator().manual_seed(0)
    for window in (8, 40, 0, 40):
        keys, values = torch.randn(2, 1, 2, 160, 4, generator=drawn)
        layer = DynamicSlidingWindowLayer(sliding_window=window) if window else DynamicLayer()
        layer.update(keys[:, :, :n], values[:, :, :n])
        cache.layers.append(layer)
    return cache


def test_windows_of_several_lengths_are_kept_by_themselves(store):
    ids = random_ids(1, 160)[0]
    for n in (66, 82, 98):
        with opened(store) as prefixes:
            prefixes.save(ids[:n], two_lengths(n)).result()
    # The short windows hold 5 tokens before the last chunk's end, the long ones 5 of their first chunk and all of the others.
    assert tokens_of(store, "window") == [5, 5, 5, 5, *[CHUNK] * 4]
    for n in (66, 82, 98):
        found, n_found = loaded(store, ids[:n])
        assert n_found == n
        for layer, expected in zip(found.layers, two_lengths(n).layers, strict=True):
            assert torch.equal(layer.keys, expected.keys)
            assert torch.equal(layer.values, expected.values)
    for key in keys_of(store, "window"):
        groups = kvtc.inspect(store.get(key)).groups
        assert {group.layers for group in groups} in ({(0,)}, {(1, 3)})


def coded(window_tokens: int) -> Codec:
    options = {"step": 0.02, "sink_tokens": 2, "chunk_tokens": 4, "states": "lossless"}
    return Codec(windowed_calibration(), window_tokens=window_tokens, **options)


def test_chunks_of_coded_windows(store):
    """Windows of 8 tokens and chunks of 4: whole chunks are coded, the last 3 tokens are exact, and other codecs' points serve."""
    ids = random_ids(1, 50)[0]
    for n, window_tokens in ((29, 3), (30, 3), (31, 0), (33, 6)):
        with opened(store, coded(window_tokens), resume_every=8) as prefixes:
            prefixes.save(ids[:n], mixed_cache(n, part_of=50)).result()
    infos = [kvtc.inspect(store.get(key)) for key in keys_of(store, "window")]
    assert all(info.profile == "joint" and info.window_tokens == 0 for info in infos)
    for n, n_exact in ((29, 3), (30, 3), (31, 0), (33, 6)):
        with opened(store, coded(2), resume_every=8) as prefixes:
            found, n_found = prefixes.load(ids[:n], whole=True)
        assert n_found == n
        for layer in MIXED_WINDOWS:
            for name in ("keys", "values"):
                side, exact = (getattr(cache.layers[layer], name) for cache in (found, mixed_cache(n, part_of=50)))
                assert side.shape == exact.shape
                n_coded = side.shape[2] - n_exact
                assert torch.equal(side[:, :, n_coded:], exact[:, :, n_coded:])
                assert 0 < (side - exact).norm() / exact.norm() < 0.05


def test_entries_that_are_not_what_a_point_needs(store):
    """A chunk of other layers, or with too few tokens, stays, and a point with too few tokens is damage."""
    talk, codec = saved(store, (64, 72)), lossless()
    chunks = {kvtc.inspect(store.get(key)).n_tokens: key for key in keys_of(store, "window")}
    entry = store.get(chunks[7])
    # The window after token 64 needs the last 7 tokens of this chunk.
    store.put(chunks[7], codec.encode_point([one.span(26, 32, 32) for one in codec.decode_point(entry)], 32))
    assert loaded(store, talk.ids[0, :64], misses=1, other=1)[1] == 0
    points = kvtc.ResumePoints(32)
    points.take(two_lengths(32))
    store.put(chunks[7], codec.encode_point(points.taken[32], 32))
    assert loaded(store, talk.ids[0, :64], misses=1, other=1)[1] == 0
    store.put(chunks[7], entry)
    assert loaded(store, talk.ids[0, :64])[1] == 64
    (point,) = (key for key in keys_of(store, "point") if kvtc.inspect(store.get(key)).n_tokens == 8)
    own = codec.decode_point(store.get(point))
    store.put(point, codec.encode_point([one.span(65, 72, 72) for one in own], 72))
    assert loaded(store, talk.ids[0, :72], misses=1, damaged=1)[1] == 64


def test_the_sort_of_a_model():
    for sort in (Sort(True, (8, 4096)), Sort(False, ()), Sort(True, ())):
        assert Sort.parse(sort.pack()) == sort
    assert Sort(False, (512,)).pack() == b"points alone 512"
    for data in (
        b"",
        b"tokens",
        b"tokens and points ",
        b"tokens and points 0",
        b"points alone 8, 9",
        b"points alone" + b" 1" * 256,
    ):
        with pytest.raises(CorruptStream, match=r"the sort of a model's caches is .*; expected one of"):
            Sort.parse(data)
