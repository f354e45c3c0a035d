"""Entries in memory."""

import pytest

from kvtc.errors import InvalidArgument, StoreFull
from kvtc.store import open_store
from kvtc.store.memory import ENTRY_BYTES

from .contract import StoreContract


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def url(self):
        return "memory:?bytes=64MB"


def budget(n_entries: int, value_bytes: int) -> str:
    return f"memory:?bytes={n_entries * (value_bytes + 48 + ENTRY_BYTES)}"


def test_those_used_longest_ago_go_first():
    with open_store(budget(3, 100)) as store:
        for key in "abc":
            store.put(key, bytes(100))
        store.get("a")
        store.put("d", bytes(100))
        assert sorted(store.keys()) == ["a", "c", "d"]
        counted = store.statistics()
        assert (counted.evictions, counted.stored_entries) == (1, 3)
        assert counted.stored_bytes == 3 * (148 + ENTRY_BYTES)


@pytest.mark.parametrize("use", [lambda store, keys: store.get_many(keys), lambda *_: None])
def test_a_chain_is_evicted_from_its_tail(use):
    with open_store(budget(4, 10)) as store:
        chain = ["head", "middle", "tail"]
        store.put_many((key, bytes(10)) for key in chain)
        use(store, chain)
        store.put_many([("x", bytes(10)), ("y", bytes(10)), ("z", bytes(10))])
        assert store.contains_prefix(chain) == 1


def test_many_small_entries_make_room_for_a_large_one():
    with open_store("memory:?bytes=100KB") as store:
        store.put_many((str(i), bytes(1000)) for i in range(60))
        store.put("large", bytes(90_000))
        assert store.get("large") == bytes(90_000)
        assert store.statistics().stored_bytes <= 100_000


def test_empty_values_too_fill_the_budget():
    with open_store("memory:?bytes=100KB") as store:
        store.put_many((str(i), b"") for i in range(1000))
        assert store.statistics().stored_entries <= 100_000 // ENTRY_BYTES


def test_what_exceeds_the_budget_is_refused_and_the_rest_stays():
    with open_store("memory:?bytes=10KB") as store:
        store.put("k", b"v")
        with pytest.raises(StoreFull, match="budget"):
            store.put("large", bytes(10_000))
        assert store.get("k") == b"v"
        assert store.statistics().errors == 1


@pytest.mark.parametrize(
    "url",
    [
        "memory:?bytes=0",
        "memory:?bytes=many",
        "memory:/path",
        "tape:",
        "",
        "/path",
        "memory://h:x/",
        "memory:#x",
    ],
)
def test_urls_that_mean_nothing_are_refused(url):
    with pytest.raises(InvalidArgument):
        open_store(url)
