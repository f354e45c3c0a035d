"""The prefix cache on small caches and on the reference model: what is found, what is shared, and what failures become."""

from __future__ import annotations

import struct
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import kvtc
from kvtc.cache import KVCache
from kvtc.codec.codec import Codec
from kvtc.codec.options import as_token_ids
from kvtc.entries import Entries
from kvtc.errors import GeometryMismatch, InvalidArgument, InvalidCache, StoreError
from kvtc.prefix_cache import Chain, PrefixCache, chunk_key
from kvtc.prefix_cache.tails import MAX_TAILS, Tail, Tails, parse_index
from kvtc.store import Store, open_store
from tests.builders import joint_calibration, random_cache, told_cache, told_codec, told_ids, told_model
from tests.failing import Panic, break_store

CHUNK, WINDOW = 32, 16


def codec(profile: str = "conditional", **changes: Any) -> Codec:
    settings = {"ratio": 4, "window_tokens": WINDOW, "chunk_tokens": CHUNK, **changes}
    return told_codec(profile, **settings)


@pytest.fixture
def store() -> Iterator[Store]:
    with open_store("memory:") as opened:
        yield opened


@pytest.fixture
def prefixes(store: Store) -> Iterator[PrefixCache]:
    with PrefixCache(codec(), store, min_tokens=1) as opened:
        yield opened


def saved(prefixes: PrefixCache, n: int, seed: int = 0) -> Any:
    return prefixes.save(told_ids(n, seed), told_cache(n, seed=seed)).result()


def list_keys(prefixes: PrefixCache) -> list[str]:
    return list(prefixes.store.keys())


def error(found: KVCache, exact: KVCache, tokens: slice) -> float:
    found_side, exact_side = found.values[:, :, tokens], exact.values[:, :, tokens]
    return float((found_side - exact_side).norm() / exact_side.norm())


@pytest.mark.parametrize("profile", ["paper", "joint", "conditional"])
@pytest.mark.parametrize("n", [17, 47, 48, 49, 200])
def test_loads_what_was_saved(store: Store, profile: str, n: int) -> None:
    with PrefixCache(codec(profile), store, min_tokens=1) as prefixes:
        report = saved(prefixes, n)
        cache, n_tokens = prefixes.load_neutral(told_ids(n + 5))
    assert cache is not None
    assert report.n_tokens == n_tokens == cache.n_tokens == n
    assert report.chunks == max(0, n - WINDOW) // CHUNK
    exact = told_cache(n)
    assert error(cache, exact, slice(n - WINDOW, None)) == 0
    assert error(cache, exact, slice(0, 4)) == 0
    assert error(cache, exact, slice(None)) < 0.5


def test_loads_equal_what_the_codec_gives(prefixes: PrefixCache) -> None:
    """Chunks alone decode to what they decode to within one stream of the whole, given the same step."""
    step = told_codec("joint", step=0.05, window_tokens=WINDOW, chunk_tokens=CHUNK)
    with PrefixCache(step, prefixes.store, min_tokens=1) as other:
        saved(other, 150)
        found, _ = other.load_neutral(told_ids(150), whole=True)
    expected = step.decode_neutral(step.encode(told_cache(150), told_ids(150)), told_ids(150))
    assert found is not None
    torch.testing.assert_close(found.keys, expected.keys)
    torch.testing.assert_close(found.values, expected.values)


def test_leaves_a_token_to_go_on_from(prefixes: PrefixCache) -> None:
    saved(prefixes, 96 + WINDOW)
    assert prefixes.load_neutral(told_ids(96 + WINDOW), whole=True)[1] == 96 + WINDOW
    # The tail is matched by sixteens.
    assert prefixes.load_neutral(told_ids(96 + WINDOW))[1] == 96
    assert prefixes.load_neutral(told_ids(1))[1] == 0


def test_finds_the_longest_common_prefix(prefixes: PrefixCache) -> None:
    saved(prefixes, 200)
    fork = told_ids(300)
    for at, expected in (
        (0, 0),
        (15, 0),
        (31, 16),
        (32, 32),
        (100, 96),
        (120, 112),
        (160, 160),
        (170, 160),
        (180, 176),
        (250, 200),
    ):
        other = torch.cat([fork[:at], told_ids(60, seed=9)])
        other[at] = (fork[at] + 1) % 40
        assert prefixes.load_neutral(other)[1] == expected, at


def test_growing_codes_only_new_chunks(prefixes: PrefixCache) -> None:
    assert saved(prefixes, 100).coded == 2
    assert saved(prefixes, 100).coded == 0
    report = saved(prefixes, 180)
    assert (report.chunks, report.coded) == (5, 3)
    kinds = [key.split("/")[0] for key in list_keys(prefixes)]
    assert sorted(kinds) == ["chunk"] * 5 + ["tail"] + ["tails"] * 6, "the old tail is gone"
    assert prefixes.load_neutral(told_ids(200))[1] == 180


def test_conversations_share_their_beginning(prefixes: PrefixCache) -> None:
    shared, ids = 128, {}
    for seed in (1, 2):
        cache, other = told_cache(200), told_cache(200, seed=seed)
        sides = [
            torch.cat([getattr(cache, s)[:, :, :shared], getattr(other, s)[:, :, shared:]], 2)
            for s in ("keys", "values")
        ]
        ids[seed] = torch.cat([told_ids(shared), told_ids(200, seed)[shared:]])
        report = prefixes.save(ids[seed], KVCache(*sides)).result()
        assert report.coded == (5 if seed == 1 else 1)
    assert prefixes.load_neutral(ids[1], whole=True)[1] == prefixes.load_neutral(ids[2], whole=True)[1] == 200


def test_a_deeper_chain_does_not_hide_a_tail(prefixes: PrefixCache) -> None:
    """One text saved at two lengths by two servers: both are found."""
    saved(prefixes, 200)
    saved(prefixes, 110)
    assert prefixes.load_neutral(told_ids(110), whole=True)[1] >= 96
    assert prefixes.load_neutral(told_ids(220))[1] == 200


def test_namespaces_calibrations_profiles_and_rates_are_apart(store: Store, prefixes: PrefixCache) -> None:
    saved(prefixes, 100)
    others = [
        PrefixCache(codec(), store, namespace="other"),
        PrefixCache(codec("joint"), store),
        PrefixCache(codec(ratio=5), store),
        PrefixCache(codec(sink_tokens=0), store),
        PrefixCache(Codec(joint_calibration(1), "conditional", ratio=4, chunk_tokens=CHUNK, model=told_model()), store),
    ]
    for other in others:
        with other:
            assert other.load_neutral(told_ids(100)) == (None, 0)
            assert other.contains(told_ids(100)) == 0
    with PrefixCache(codec(window_tokens=0), store) as windowless:
        assert windowless.contains(told_ids(100)) == 64, "a chunk has no window: those of every window are shared"


def test_contains_and_delete(prefixes: PrefixCache) -> None:
    saved(prefixes, 200)
    assert prefixes.contains(told_ids(200)) == 160
    prefixes.delete(told_ids(200), keep_tokens=64)
    assert prefixes.load_neutral(told_ids(200))[1] == 64
    prefixes.delete(told_ids(200))
    assert list_keys(prefixes) == []


def test_short_prefixes_are_skipped(store: Store) -> None:
    with PrefixCache(codec(), store, min_tokens=64) as prefixes:
        assert saved(prefixes, 63).n_tokens == 0
        assert saved(prefixes, 64).n_tokens == 64
        assert (prefixes.statistics["saves"], prefixes.statistics["saves_skipped"]) == (1, 1)


def test_what_was_saved_may_change_afterwards(prefixes: PrefixCache) -> None:
    cache = told_cache(100)
    future = prefixes.save(told_ids(100), cache)
    cache.values.zero_()
    future.result()
    found, _ = prefixes.load_neutral(told_ids(100), whole=True)
    assert found is not None
    assert error(found, told_cache(100), slice(100 - WINDOW, None)) == 0


def damage(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    "harm", [damage, lambda data: data[: len(data) // 2], lambda _: b"", lambda _: b"KVTT\xff\xff\xff\xff"]
)
@pytest.mark.parametrize("what", ["chunk", "tail"])
def test_unusable_entries_are_misses(prefixes: PrefixCache, harm: Any, what: str) -> None:
    saved(prefixes, 200)
    keys = list_keys(prefixes)
    nodes = prefixes.chain.nodes(as_token_ids(told_ids(200)))
    key = chunk_key(nodes[3]) if what == "chunk" else next(key for key in keys if key.startswith("tail/"))
    prefixes.store.put(key, harm(prefixes.store.get(key)))
    found, n_tokens = prefixes.load_neutral(told_ids(200), whole=True)
    assert n_tokens == (64 if what == "chunk" else 160)
    assert found is not None
    assert prefixes.statistics["damaged"] == 1
    assert not prefixes.store.contains(key)
    assert saved(prefixes, 200).coded == (1 if what == "chunk" else 0)
    assert prefixes.load_neutral(told_ids(200), whole=True)[1] == 200


def test_swapped_entries_are_misses(prefixes: PrefixCache) -> None:
    saved(prefixes, 200)
    nodes = prefixes.chain.nodes(as_token_ids(told_ids(200)))
    store, first, second = prefixes.store, chunk_key(nodes[2]), chunk_key(nodes[3])
    entries = store.get(first), store.get(second)
    store.put(first, entries[1])
    store.put(second, entries[0])
    assert prefixes.load_neutral(told_ids(200))[1] == 32


class Broken:
    """A store that is not there."""

    def __getattr__(self, name: str) -> Any:
        def fail(*_: object) -> Any:
            raise StoreError("the store is gone")

        return fail


def test_a_dead_store_is_a_miss_and_a_failed_save() -> None:
    with PrefixCache(codec(), Broken(), min_tokens=1) as prefixes:  # type: ignore[arg-type]
        with pytest.raises(StoreError, match="gone"):
            saved(prefixes, 100)
        assert prefixes.load_neutral(told_ids(100)) == (None, 0)
        assert prefixes.contains(told_ids(100)) == 0
        assert prefixes.statistics["store_errors"] >= 3


def test_refuses_what_is_no_prefix(prefixes: PrefixCache) -> None:
    with pytest.raises(InvalidArgument, match="holds 50 tokens, but 49"):
        prefixes.save(told_ids(49), told_cache(50))
    with pytest.raises(InvalidArgument, match="from position 0"):
        prefixes.save(told_ids(50), random_cache(50, first_position=3))
    with pytest.raises(InvalidArgument, match="DynamicCache"):
        prefixes.save(told_ids(50), {})
    with pytest.raises(GeometryMismatch):
        prefixes.save(told_ids(50), replace(told_cache(50), layers=(1, 2, 3)))
    bad = told_cache(50)
    bad.keys[0, 0, 0, 0] = float("nan")
    with pytest.raises(InvalidCache, match="NaN"):
        prefixes.save(told_ids(50), bad)
    with pytest.raises(InvalidArgument, match="integers"):
        prefixes.load_neutral(torch.rand(4))
    with pytest.raises(InvalidArgument, match="at least 1"):
        PrefixCache(codec(), prefixes.store, max_pending=0)


def test_empty(prefixes: PrefixCache) -> None:
    assert prefixes.load_neutral([]) == (None, 0)
    assert prefixes.save([], told_cache(0)).result().n_tokens == 0


def test_many_threads(store: Store) -> None:
    """Savers and loaders of texts that share beginnings, at once: what is found is right."""
    barrier = threading.Barrier(8)
    with PrefixCache(codec("joint", ratio=2), store, min_tokens=1, max_pending=2) as prefixes:

        def work(index: int) -> None:
            barrier.wait()
            for turn in range(4):
                n = 60 + 35 * ((index + turn) % 4)
                saved(prefixes, n, seed=index % 2)
                found, n_tokens = prefixes.load_neutral(told_ids(n, index % 2), whole=True)
                assert found is not None
                assert n_tokens > n - CHUNK - WINDOW
                assert error(found, told_cache(n_tokens, seed=index % 2), slice(None)) < 0.2

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        assert (prefixes.statistics["damaged"], prefixes.statistics["other"]) == (0, 0)


def test_the_reference_model_goes_on_from_a_prefix() -> None:
    """Two turns, the second in another prefix cache over the same store, generate what the exact cache generates."""
    pytest.importorskip("transformers")
    model, tokenizer = kvtc.reference_model()
    text = "The river had risen in the night, and the miller's men stood on the bridge and watched it come down. " * 24
    ids = torch.tensor([tokenizer(text).input_ids])
    fine = Codec(kvtc.reference_calibration(), "joint", step=1e-3)
    with open_store("memory:") as store:
        with PrefixCache(fine, store) as first, torch.no_grad():
            cache, n_tokens = first.load(ids)
            assert n_tokens == 0
            exact = model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
            first.save(exact, cache).result()
        with PrefixCache(fine, store) as second, torch.no_grad():
            restored, n_tokens = second.load(ids)
            assert 0 < ids.shape[1] - n_tokens <= 16
            assert restored.get_seq_length() == n_tokens
            again = model.generate(ids, past_key_values=restored, max_new_tokens=8, do_sample=False)
    assert torch.equal(exact, again)


def test_a_tail_is_matched_by_sixteens() -> None:
    ids = as_token_ids(range(40))
    with open_store("memory:") as store:
        tails = Tails(Entries(store))
        assert tails.save(b"node", ids, lambda: b"stream") == 6
        for n, expected in ((0, 0), (15, 0), (16, 16), (39, 32), (40, 40), (50, 40)):
            found = tails.find(b"node", as_token_ids(range(n)))
            assert found == ([(Tail.of(b"node", ids), expected)] if expected else [])
        assert tails.find(b"other", ids) == []


def test_a_chunk_is_found_by_texts_that_part_from_it() -> None:
    """Its entry has the node that the chunk's own text has; what begins with the whole chunk finds that node itself."""
    ids = as_token_ids(range(100))
    with open_store("memory:") as store:
        tails = Tails(Entries(store))
        tails.save(b"node", ids[:48], lambda: b"stream")
        tails.note_chunk(b"node", ids, 64)
        assert [key.split("/")[0] for key in store.keys()] == ["tails"], "the tail lies within it"  # noqa: SIM118
        other = as_token_ids([*range(50), *range(200, 260)])
        ((chunk, n_common),) = tails.find(b"node", other)
        assert (chunk.is_chunk, n_common) == (True, 48)
        assert chunk.key(b"node") == chunk_key(Chain(b"node", 64).nodes(ids)[1])
        assert chunk.key(b"another worker") == chunk_key(Chain(b"another worker", 64).nodes(ids)[1])
        assert tails.find(b"node", ids) == []
        # A text that is stored behind the same tokens has more in common with a third one.
        tails.save(b"node", other, lambda: b"stream")
        assert [(tail.is_chunk, n) for tail, n in tails.find(b"node", other)] == [(False, 110), (True, 48)]
        tails.note_chunk(b"node", other, 64)
        assert [(tail.is_chunk, n) for tail, n in tails.find(b"node", other)] == [(True, 48)]


def test_a_chunk_that_is_gone_does_not_hide_a_shorter_tail(prefixes: PrefixCache) -> None:
    """An index may tell of entries that the store has evicted."""
    saved(prefixes, 200)
    forked_at = torch.cat([told_ids(20), (told_ids(300)[20:] + 1) % 40])
    prefixes.save(forked_at[:60], told_cache(60)).result()
    other = torch.cat([told_ids(28), told_ids(60, seed=9)])
    other[28] = (told_ids(300)[28] + 1) % 40
    assert prefixes.load_neutral(other)[1] == 16
    first, *others = Tails(Entries(prefixes.store)).find(prefixes.chain.root, as_token_ids(other))
    assert others
    prefixes.store.delete(first[0].key(prefixes.chain.root))
    assert prefixes.load_neutral(other)[1] == 16
    for tail, _ in others:
        prefixes.store.delete(tail.key(prefixes.chain.root))
    assert prefixes.load_neutral(other)[1] == 0


def tells_of_a_tail(prefixes: PrefixCache, key: str) -> bool:
    """Whether an index tells of more than chunks."""
    return not all(tail.is_chunk for tail in parse_index(prefixes.store.get(key) or b""))


def _tail(n_tokens: int) -> bytes:
    return struct.pack("<32s?I", b"name" * 8, False, n_tokens) + bytes(16 * -(-n_tokens // 16))


@pytest.mark.parametrize(
    "tails",
    [[_tail(0)], [_tail(15)], [_tail(16)] * (MAX_TAILS + 1), [_tail(0)] * 500_000],
    ids=["0", "15", "33", "many"],
)
def test_an_index_that_tells_of_tails_that_cannot_be_is_damaged(tails: list[bytes]) -> None:
    with open_store("memory:") as store:
        found = Tails(Entries(store))
        found.save(b"node", as_token_ids(range(40)), lambda: b"stream")
        (key,) = (key for key in store.keys() if key.startswith("tails/"))  # noqa: SIM118
        store.put(key, b"KVTX" + b"".join(tails))
        assert found.find(b"node", as_token_ids(range(40))) == []
        assert not store.contains(key)


def test_a_long_index_costs_no_more_memory_than_its_bytes() -> None:
    with open_store("memory:") as store:
        tails = Tails(Entries(store))
        tails.save(b"node", as_token_ids(range(40)), lambda: b"stream")
        (key,) = (key for key in store.keys() if key.startswith("tails/"))  # noqa: SIM118
        index = b"KVTX" + _tail(16 << 20)
        store.put(key, index)
        tracemalloc.start()
        try:
            assert tails.find(b"node", as_token_ids(range(40))) == []
            assert tracemalloc.get_traced_memory()[1] < 4 * len(index)
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("n", [1, 15, 16, CHUNK + WINDOW - 1, CHUNK + 1, 2 * CHUNK + 8])
@pytest.mark.parametrize("window", [0, 5, WINDOW])
def test_a_report_tells_what_a_load_finds(n: int, window: int) -> None:
    with open_store("memory:") as store, PrefixCache(codec().with_window(window), store, min_tokens=1) as prefixes:
        assert saved(prefixes, n).n_tokens == prefixes.load_neutral(told_ids(n), whole=True)[1]


@pytest.mark.parametrize("operation", ["put", "contains", "get_many"])
def test_a_save_that_a_panic_ends_is_counted(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store("memory:") as store, PrefixCache(codec(), store, min_tokens=1) as prefixes:
        break_store(monkeypatch, store, Panic, operation)
        with pytest.raises(StoreError, match="Panic"):
            saved(prefixes, 100)
        assert (prefixes.statistics["save_errors"], prefixes.statistics["store_errors"]) == (1, 1)


def test_tails_of_one_beginning_are_bounded_and_the_last_saved_stay() -> None:
    shared, n = list(range(100)), MAX_TAILS + 3
    texts = [as_token_ids([*shared, *range(1000 * index, 1000 * index + 50)]) for index in range(n)]
    with open_store("memory:") as store:
        tails = Tails(Entries(store))
        for ids in texts:
            tails.save(b"node", ids, lambda: b"stream")
        # One that is saved again is the last again.
        tails.save(b"node", texts[3], lambda: b"stream")
        tails.save(b"node", as_token_ids([*shared, 5]), lambda: b"stream")
        found = [tails.find(b"node", ids)[0][1] for ids in texts]
        gone = [index for index, n_common in enumerate(found) if n_common < 150]
        assert gone == [0, 1, 2, 4]
        assert {found[index] for index in gone} == {96}, "what others have in common with it"
        assert len([key for key in store.keys() if key.startswith("tail/")]) == MAX_TAILS  # noqa: SIM118


@pytest.mark.parametrize(
    "harm", [lambda data: data[:-1], lambda data: data[:30], lambda _: b"", lambda data: b"x" + data]
)
def test_a_damaged_index_of_tails_is_deleted_and_written_anew(prefixes: PrefixCache, harm: Any) -> None:
    saved(prefixes, 200)
    key = next(key for key in list_keys(prefixes) if key.startswith("tails/") and tells_of_a_tail(prefixes, key))
    prefixes.store.put(key, harm(prefixes.store.get(key)))
    assert prefixes.load_neutral(told_ids(200), whole=True)[1] == 160
    assert (prefixes.statistics["damaged"], prefixes.store.contains(key)) == (1, False)
    saved(prefixes, 200)
    assert prefixes.load_neutral(told_ids(200), whole=True)[1] == 200


def test_two_processes_that_save_tails_of_one_index_lose_at_most_one(store: Store) -> None:
    """The index is read and written; what another writes between is lost, and found again once it is saved again."""
    with PrefixCache(codec(), store, min_tokens=1) as one, PrefixCache(codec(), store, min_tokens=1) as two:
        texts = [forked(told_ids, 100, 90, seed) for seed in (1, 2)]
        get_many, others = store.get_many, [texts[1]]

        def meanwhile(keys: list[str]) -> list[bytes | None]:
            entries = list(get_many(keys))
            if keys[0].startswith("tails/") and others:
                two.save(*others.pop()).result()
            return entries

        store.get_many = meanwhile  # type: ignore[method-assign, assignment]
        one.save(*texts[0]).result()
        assert not others
        assert [two.load_neutral(ids, whole=True)[1] for ids, _ in texts] == [100, 80]
        two.save(*texts[1]).result()
        assert [one.load_neutral(ids, whole=True)[1] for ids, _ in texts] == [100, 100]


def forked(ids_of: Any, n: int, at: int, seed: int) -> tuple[Any, KVCache]:
    """A text that leaves the one of seed 0 after so many tokens, and its cache."""
    cache, other = told_cache(n), told_cache(n, seed=seed)
    sides = [
        torch.cat([getattr(cache, side)[:, :, :at], getattr(other, side)[:, :, at:]], 2) for side in ("keys", "values")
    ]
    return torch.cat([ids_of(n)[:at], ids_of(n, seed)[at:]]), KVCache(*sides)


def test_two_conversations_with_short_parts_of_their_own_keep_both(store: Store) -> None:
    """The second once took the place of the first, of which 752 tokens were left."""
    with PrefixCache(told_codec("joint", step=0.05), store) as prefixes:
        texts = [forked(told_ids, 860, 755, seed) for seed in (1, 2)]
        for ids, cache in texts:
            prefixes.save(ids, cache).result()
        for ids, exact in texts:
            cache, n_tokens = prefixes.load_neutral(ids, whole=True)
            assert cache is not None
            assert n_tokens == 860
            assert error(cache, exact, slice(732, None)) == 0, "the exact window of its own"
        assert prefixes.load_neutral(forked(told_ids, 860, 755, 3)[0], whole=True)[1] == 752


def test_a_growing_conversation_replaces_its_own_tail_alone(prefixes: PrefixCache) -> None:
    ours, theirs = forked(told_ids, 100, 90, 1), forked(told_ids, 76, 70, 2)
    prefixes.save(*theirs).result()
    for n in (80, 90, 100):
        prefixes.save(ours[0][:n], ours[1].span(0, n)).result()
        assert sum(key.startswith("tail/") for key in list_keys(prefixes)) == 2
    assert prefixes.load_neutral(ours[0], whole=True)[1] == 100
    assert prefixes.load_neutral(theirs[0], whole=True)[1] == 76
    # What hung on the way is inside the new chunks; the other conversation's is not.
    longer, cache = torch.cat([ours[0], told_ids(60, 5)]), told_cache(160)
    prefixes.save(longer, cache).result()
    assert prefixes.load_neutral(longer, whole=True)[1] == 160
    assert prefixes.load_neutral(theirs[0], whole=True)[1] == 76
    assert sum(key.startswith("tail/") for key in list_keys(prefixes)) == 2


@pytest.mark.parametrize(
    "ids", [[2**63], np.array([5, 2**64 - 1], np.uint64), torch.tensor([2**63], dtype=torch.uint64)]
)
def test_ids_that_would_wrap_are_refused(ids):
    """As int64, 2**64 - 1 and -1 would have one key."""
    with pytest.raises(InvalidArgument, match="are at most 9223372036854775807; got"):
        as_token_ids(ids)
    assert as_token_ids(np.array([2**63 - 1], np.uint64)).tolist() == [2**63 - 1]
