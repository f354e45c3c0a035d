"""What every store promises. A test class of a store inherits `StoreContract` and says how one is opened."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtc.errors import InvalidArgument, StoreFull, StoreUnavailable
from kvtc.store import Store, open_store
from kvtc.store.base import telling_unreadable
from kvtc.store.framed import FramedStore
from kvtc.store.memory import MemoryStore
from kvtc.store.urls import StoreUrl

KEYS = st.text("abcxyz0189/._-", min_size=1, max_size=40)
VALUES = st.binary(max_size=300)


def tamper(store: FramedStore, key: str, change: Callable[[bytes], bytes]) -> None:
    """Put other bytes where the entry's frame lies."""
    name = store._names.name(key)
    (frame,) = store._read([name])
    store._write([name], iter([change(frame)]))


class InMemory(MemoryStore):
    """A memory store, of which tests make odd ones."""

    def __init__(self, max_bytes: int = 1 << 30) -> None:
        super().__init__(StoreUrl(f"memory:?bytes={max_bytes}"))


def wait_until(condition: Callable[[], object], seconds: float = 30) -> None:
    """Wait for something that happens in the background."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} seconds"
        time.sleep(0.02)


class StoreContract:
    """A fixture `url` must be at hand; `place` is what tampering reaches, where the store is a wrapper of another."""

    @pytest.fixture
    def options(self):
        return {}

    @pytest.fixture
    def store(self, url, options):
        with open_store(url, **options) as store:
            yield store

    def place(self, store: Store) -> FramedStore:
        return store

    # Values come back as they were put.

    @pytest.mark.parametrize("size", [0, 1, 47, 48, 4096, 1_000_003])
    def test_a_value_of_any_size_comes_back(self, store, size):
        value = random.Random(size).randbytes(size)
        store.put("a/key.1_x-y", value)
        assert store.get("a/key.1_x-y") == value

    def test_what_was_never_put_is_a_miss(self, store):
        assert store.get("absent") is None
        assert store.contains("absent") is False

    def test_a_later_value_takes_the_place_of_an_earlier_one(self, store):
        store.put("k", b"long first value" * 100)
        store.put("k", b"second")
        assert store.get("k") == b"second"

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda raw: memoryview(raw).cast("I")])
    def test_every_kind_of_bytes_is_taken(self, store, kind):
        store.put("k", kind(b"12345678"))
        assert store.get("k") == b"12345678"

    def test_many_at_once_keep_their_order(self, store):
        entries = [(f"chain/{i}", bytes([i]) * i) for i in range(40)]
        store.put_many(entries)
        keys = [key for key, _ in entries]
        assert store.get_many([*keys[::-1], "absent", keys[3], keys[3]]) == [
            *[value for _, value in entries[::-1]],
            None,
            entries[3][1],
            entries[3][1],
        ]
        assert store.get_many([]) == []
        store.put_many([])

    # One test, many subclasses, and examples that clean up after each other: what the two checks warn of is meant.
    @settings(
        max_examples=25,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
    )
    @given(entries=st.dictionaries(KEYS, VALUES, max_size=8), deleted=st.sets(KEYS, max_size=3))
    def test_it_is_a_mapping(self, store, entries, deleted):
        for key in list(store.keys()):  # of the example before
            store.delete(key)
        store.put_many(entries.items())
        for key in deleted:
            store.delete(key)
        left = {key: value for key, value in entries.items() if key not in deleted}
        assert store.get_many(list(entries)) == [left.get(key) for key in entries]
        assert set(store.keys()) == set(left)

    # Presence.

    def test_a_prefix_is_counted_up_to_the_first_absent_key(self, store):
        keys = [f"{i:02}" for i in range(12)]
        store.put_many((key, b"v") for key in keys if key != "07")
        assert store.contains_prefix(keys) == 7
        assert store.contains_prefix(keys[:5]) == 5
        assert store.contains_prefix(keys[7:]) == 0
        assert store.contains_prefix([]) == 0
        assert store.contains("08")
        assert store.contains_many(keys) == [key != "07" for key in keys]
        assert store.contains_many([]) == []

    def test_deleted_is_absent(self, store):
        store.put("k", b"v")
        store.delete("k")
        store.delete("k")
        assert store.get("k") is None
        assert not store.contains("k")
        assert list(store.keys()) == []

    # Arguments.

    @pytest.mark.parametrize("key", ["", "A", "a b", "ä", "a\n", "a:b", "a" * 201, b"a", None, "a!b", "a=b", "\uff11"])
    def test_a_key_that_is_none_is_refused(self, store, key):
        for call in (store.get, store.contains, store.delete, lambda key: store.put(key, b"")):
            with pytest.raises(InvalidArgument, match="key"):
                call(key)

    def test_awkward_keys_are_kept_apart(self, store):
        keys = [".", "..", "/", "a/b", "a.b", "a_b", "a-b", "-", "a//b", "../../etc/x", "x" * 200]
        store.put_many((key, key.encode()) for key in keys)
        assert store.get_many(keys) == [key.encode() for key in keys]
        assert sorted(store.keys()) == sorted(keys)

    def test_a_value_that_is_no_bytes_is_refused(self, store):
        with pytest.raises(InvalidArgument, match="str"):
            store.put("k", "text")
        assert not store.contains("k")

    # Damage is a miss, never a wrong value.

    @pytest.mark.parametrize(
        "change",
        [
            lambda frame: frame[:0],
            lambda frame: frame[:20],
            lambda frame: frame[:-1],
            lambda frame: frame + b"\0",
            lambda frame: bytes([frame[0] ^ 1]) + frame[1:],
            lambda frame: frame[:5] + b"\1" + frame[6:],
            lambda frame: frame[:8] + b"\xff" * 8 + frame[16:],
            lambda frame: frame[:40] + bytes([frame[40] ^ 1]) + frame[41:],
            lambda frame: frame[:-1] + bytes([frame[-1] ^ 128]),
            lambda frame: bytes(len(frame)),
        ],
    )
    def test_a_damaged_entry_is_a_counted_miss_and_goes(self, store, change):
        store.put("k", b"some value")
        store.flush()
        place = self.place(store)
        tamper(place, "k", change)
        assert store.get("k") is None
        assert place.statistics().damaged == 1
        assert store.statistics().misses == 1
        assert not store.contains("k")
        store.put("k", b"again")
        assert store.get("k") == b"again"

    def test_the_reader_of_a_damaged_or_foreign_entry_is_told_and_it_is_logged(self, store, caplog):
        store.put_many([("damaged", b"value"), ("foreign", b"value"), ("sound", b"value")])
        store.flush()
        place = self.place(store)
        tamper(place, "damaged", lambda frame: frame[:-1])
        tamper(place, "foreign", lambda frame: frame[:4] + b"\2" + frame[5:])
        told: list[str] = []
        with telling_unreadable(told.append):
            assert store.get_many(["damaged", "foreign", "sound", "absent"]) == [None, None, b"value", None]
        assert told == ["damaged", "foreign"]
        assert [("is deleted" in one, "is left alone" in one) for one in caplog.messages] == [(1, 0), (0, 1)]
        tamper(self.place(store), "sound", lambda frame: frame[:-1])
        assert store.get("sound") is None
        assert told == ["damaged", "foreign"], "only reads within the block"

    def test_entries_that_changed_places_are_misses(self, store):
        store.put("a", b"value of a")
        store.put("b", b"value of b")
        store.flush()
        place = self.place(store)
        frame_of_a = place._read([place._names.name("a")])[0]
        tamper(place, "b", lambda _: frame_of_a)
        assert store.get_many(["a", "b"]) == [b"value of a", None]

    def test_a_sound_entry_written_since_is_not_removed_as_damaged(self, store):
        store.put("k", b"sound")
        store.flush()
        place = self.place(store)
        place._discard(place._names.name("k"), b"what was read before")
        assert store.get("k") == b"sound"

    def test_an_entry_of_a_newer_format_is_left_alone(self, store):
        store.put("k", b"value")
        store.flush()
        place = self.place(store)
        tamper(place, "k", lambda frame: frame[:4] + b"\2" + frame[5:])
        assert store.get("k") is None
        assert place.statistics().foreign == 1
        assert store.contains("k")

    def test_a_longer_entry_than_is_read_is_left_alone(self, store):
        """Somebody else may have put it, who reads longer ones."""
        place = self.place(store)
        place.put_many([("k", bytes(5000)), ("small", b"v")])
        place.entry_bytes = 4999
        assert place.get_many(["k", "small"]) == [None, b"v"]
        assert (place.statistics().foreign, place.statistics().damaged) == (1, 0)
        tamper(place, "small", lambda frame: frame + bytes(5000))
        assert place.get("small") is None
        assert (place.statistics().foreign, place.statistics().damaged) == (1, 1), "as long, and no frame"
        assert (place.contains("k"), place.contains("small")) == (True, False)
        with pytest.raises(StoreFull, match="entry_bytes"):
            place.put_many([("before", b"v"), ("k", bytes(5000)), ("after", b"v")])
        assert (place.contains("before"), place.contains("after")) == (True, False)
        place.entry_bytes = 5000
        assert place.get("k") == bytes(5000)

    # Counting, closing, threads.

    def test_hits_misses_and_bytes_are_counted(self, store):
        store.put_many([("a", b"12345"), ("b", b"")])
        store.get_many(["a", "b", "c"])
        counted = store.statistics()
        assert (counted.hits, counted.misses, counted.puts) == (2, 1, 2)
        assert (counted.bytes_read, counted.bytes_written) == (5, 5)
        assert counted.hits == 2

    def test_a_closed_store_says_so(self, store):
        store.close()
        store.close()
        for call in (store.keys, lambda: store.get("k"), lambda: store.put("k", b""), lambda: store.contains("k")):
            with pytest.raises(StoreUnavailable, match="closed"):
                call()

    def test_threads_do_not_disturb_each_other(self, store):
        def work(seed):
            generator = random.Random(seed)
            for _ in range(40):
                key = f"k{generator.randrange(10)}"
                if generator.random() < 0.5:
                    store.put(key, key.encode() * 1000)
                elif (value := store.get(key)) is not None:
                    assert value == key.encode() * 1000

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        assert store.statistics().damaged == 0

    # URLs and namespaces.

    def test_an_unknown_option_is_refused(self, url, options):
        with pytest.raises(InvalidArgument, match="colour"):
            open_store(url, **options, colour="red")


class SharedPlaceContract(StoreContract):
    """For stores whose entries outlive the object and are seen by others."""

    def test_another_object_sees_the_entries(self, store, url, options):
        store.put("k", b"value")
        store.flush()
        with open_store(url, **options) as other:
            assert other.get("k") == b"value"
            other.delete("k")

    def test_namespaces_do_not_meet(self, store, url, options):
        store.put("k", b"of nobody")
        with (
            open_store(url, **options, namespace="one") as one,
            open_store(url, **options, namespace="two") as two,
        ):
            assert one.get("k") is None
            one.put("k", b"of one")
            two.put("k", b"of two")
            assert (store.get("k"), one.get("k"), two.get("k")) == (b"of nobody", b"of one", b"of two")
            assert list(one.keys()) == list(two.keys()) == ["k"]
            one.delete("k")
            assert (store.get("k"), two.get("k")) == (b"of nobody", b"of two")
        with pytest.raises(InvalidArgument, match="namespace"):
            open_store(url, **options, namespace="a/b")
