"""Stores over stores."""

import subprocess
import sys
import threading
import time

import pytest

from kvtc.errors import InvalidArgument, StoreFull, StoreUnavailable
from kvtc.process import log_limits
from kvtc.store import circuit, open_store
from kvtc.store.tiered import TieredStore

from ..failing import Panic
from .contract import InMemory, StoreContract, wait_until


class Tiers(StoreContract):
    def place(self, store):
        upper, lower = store.tiers
        for key in list(upper.keys()):
            upper.delete(key)
        return lower


class TestWriteThrough(Tiers):
    @pytest.fixture
    def url(self, tmp_path):
        return f"tiered:memory:?bytes=64MB|file://{tmp_path}/store"


class TestWriteBack(Tiers):
    @pytest.fixture
    def url(self, tmp_path):
        return ["memory:?bytes=64MB", f"file://{tmp_path}/store"]

    @pytest.fixture
    def options(self):
        return {"write": "back"}


class TestWriteBackWithTinyQueueAndMemory(Tiers):
    @pytest.fixture
    def url(self, tmp_path):
        return f"tiered:?write=back&queue_bytes=1|memory:?bytes=1500|file://{tmp_path}/store"


class Gate(InMemory):
    """A store that can be dead, full, or as slow as a test wants."""

    def __init__(self):
        super().__init__()
        self.fault = None
        self.calls = 0
        self.is_open = threading.Event()
        self.is_open.set()
        self.is_waiting = threading.Event()

    def _pass(self):
        self.calls += 1
        if self.fault is not None:
            raise self.fault
        if not self.is_open.is_set():
            self.is_waiting.set()
            assert self.is_open.wait(30)

    def _read(self, names):
        self._pass()
        return super()._read(names)

    def _write(self, names, frames):
        self._pass()
        super()._write(names, frames)

    def _leading(self, names):
        self._pass()
        return super()._leading(names)


def test_a_hit_below_is_copied_above():
    upper, middle, lower = open_store("memory:"), open_store("memory:"), open_store("memory:")
    with TieredStore([upper, middle, lower]) as store:
        lower.put_many([("a", b"1"), ("b", b"2")])
        middle.put("b", b"2")
        assert store.get_many(["a", "b", "c"]) == [b"1", b"2", None]
        assert upper.get_many(["a", "b"]) == [b"1", b"2"]
        assert middle.get("a") == b"1"
        assert store.statistics().hits == 2
        assert store.statistics().misses == 1


def test_every_tier_keeps_its_own_budget(tmp_path):
    with open_store(f"tiered:memory:?bytes=20KB|file://{tmp_path}?bytes=80KB") as store:
        for i in range(100):
            store.put(str(i), bytes(1000))
        upper, lower = store.tiers
        assert upper.statistics().stored_bytes <= 20_000
        assert sum(path.stat().st_size for path in tmp_path.rglob("*.entry")) <= 80_000
        assert store.get("99") == bytes(1000)
        in_lower_only = next(key for key in lower.keys() if not upper.contains(key))  # noqa: SIM118
        assert store.get(in_lower_only) == bytes(1000)


def test_a_prefix_may_lie_in_several_tiers():
    upper, lower = open_store("memory:"), open_store("memory:")
    with TieredStore([upper, lower]) as store:
        upper.put_many([("0", b""), ("3", b"")])
        lower.put_many([("1", b""), ("2", b""), ("4", b""), ("6", b"")])
        assert store.contains_prefix([str(i) for i in range(8)]) == 5


def test_a_tier_that_failed_slowly_is_left_alone_until_it_answers_in_the_background(monkeypatch):
    class Slow(Gate):
        def _pass(self):
            if self.fault is not None:
                time.sleep(0.2)
            super()._pass()

    monkeypatch.setattr(circuit, "PAUSE_SECONDS", 1000)
    monkeypatch.setattr(circuit, "SLOW_SECONDS", 0.1)
    upper, lower = open_store("memory:?bytes=1000"), Slow()
    with TieredStore([upper, lower]) as store:
        lower.fault = StoreUnavailable("gone")
        store.put("k", b"v")
        assert store.get("k") == b"v"
        assert store.get("other") is None
        assert store.contains_prefix(["k", "other"]) == 1
        store.delete("k")
        assert lower.calls == 1
        assert store.statistics().errors == 5  # the search for the prefix asks twice
        assert store.statistics().misses == 1
        lower.fault = None
        store._tiers[1]._circuit._next_probe = 0
        wait_until(lambda: store.put("k", b"v") or lower.contains("k"))


@pytest.mark.parametrize("kind", [MemoryError, OSError, RuntimeError, ZeroDivisionError])
class TestErrorsOfAnyKind:
    """What a store of somebody else's may raise hinders no other tier, and is logged with its cause, once."""

    class Broken(Gate):
        def get_many(self, _):
            raise self.fault

        def put_many(self, _):
            raise self.fault

        def contains_prefix(self, _):
            raise self.fault

        def delete(self, _):
            raise self.fault

        def statistics(self):
            raise self.fault

        def close(self):
            raise self.fault

    @pytest.fixture
    def broken(self, kind, monkeypatch):
        monkeypatch.setattr(log_limits, "_limits", log_limits.LogLimits())
        store = self.Broken()
        store.fault = kind("the cause")
        return store

    def test_in_the_first_tier(self, broken, kind, caplog):
        lower = open_store("memory:")
        store = TieredStore([broken, lower])
        store.put_many([("a", b"1"), ("b", b"2")])
        assert lower.get_many(["a", "b"]) == [b"1", b"2"]
        assert store.get_many(["a", "b", "c"]) == [b"1", b"2", None]
        assert store.contains_prefix(["a", "b", "c"]) == 2
        store.delete("a")
        assert not lower.contains("a")
        assert (
            store.statistics().errors == 6
        )  # what was found is also offered to it, and the search for the prefix asks twice
        store.close()
        with pytest.raises(StoreUnavailable, match="closed"):
            lower.get("b")
        (message,) = caplog.messages
        first, *trace = message.split("\n")
        assert first == f"tier Broken: {kind.__name__}: the cause"
        assert trace[-1].endswith(f"{kind.__name__}: the cause")

    def test_in_a_lower_tier_in_the_background(self, broken):
        upper, lowest = open_store("memory:"), open_store("memory:")
        with TieredStore([upper, broken, lowest], write="back") as store:
            for number in range(20):
                store.put(str(number), b"v")
            store.flush()
            assert lowest.contains_prefix([str(number) for number in range(20)]) == 20
            assert store.get("absent") is None

    def test_where_there_is_no_other_tier(self, broken):
        store = TieredStore([broken])
        assert store.get("k") is None
        with pytest.raises(StoreUnavailable, match="no tier"):
            store.put("k", b"v")


@pytest.mark.parametrize("signal", [KeyboardInterrupt, SystemExit])
def test_interrupts_are_the_callers(signal):
    upper = TestErrorsOfAnyKind.Broken()
    upper.fault = signal()
    with pytest.raises(signal):
        TieredStore([upper, open_store("memory:")]).get("k")


@pytest.mark.parametrize("make", [list, str, len, lambda value: (value,)])
def test_values_that_are_no_bytes_are_a_miss_of_that_tier(make):
    class Odd(InMemory):
        def get_many(self, keys):
            return [make(value) for value in super().get_many(keys)]

        def keys(self):
            return [1, None]

        def statistics(self):
            return None

    with TieredStore([Odd(), open_store("memory:")]) as store:
        store.put("k", b"v")
        assert store.get("k") == b"v"
        assert store.resident_many(["k"]) == [b"v"]
        assert list(store.keys()) == ["k"]
        assert store.statistics().errors == 3


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_what_is_like_bytes_is_given_as_bytes(kind):
    class Alike(InMemory):
        def get_many(self, keys):
            return [kind(value) for value in super().get_many(keys)]

    with TieredStore([Alike()]) as store:
        store.put("k", b"v")
        assert type(store.get("k")) is bytes
        assert store.get("k") == b"v"


@pytest.mark.parametrize(
    ("count", "leading", "errors"), [(None, 1, 2), ("3", 1, 2), (2.5, 1, 2), (-5, 1, 0), (10**9, 2, 0)]
)
def test_numbers_of_entries_that_cannot_be_are_none(count, leading, errors):
    class Odd(InMemory):
        def contains_prefix(self, _):
            return count

    with TieredStore([Odd(), open_store("memory:")]) as store:
        store.put("k", b"v")
        assert store.contains_prefix(["k", "l"]) == leading
        assert store.statistics().errors == errors


def test_entries_of_any_tier_are_there_where_another_fails():
    class Odd(InMemory):
        def contains_many(self, _):
            return [True]

    lowest = open_store("memory:")
    with TieredStore([Odd(), open_store("memory:"), lowest]) as store:
        store.put("k", b"v")
        lowest.put("low", b"v")
        assert store.contains_many(["gone", "k", "low"]) == [False, True, True]
        assert store.statistics().errors == 1


@pytest.mark.parametrize("ending", ["flush", "close"])
def test_an_entry_that_a_panic_keeps_from_a_tier_is_given_up_and_the_next_are_written(ending):
    class Panicking(InMemory):
        n_puts = 0

        def put_many(self, entries):
            self.n_puts += 1
            if self.n_puts == 1:
                raise Panic
            super().put_many(entries)

        def close(self):
            self.kept = sorted(self.keys())

    upper, lower = open_store("memory:"), Panicking()
    store = TieredStore([upper, lower], write="back")
    store.put_many([("a", b"1"), ("b", b"2"), ("c", b"3")])
    getattr(store, ending)()
    store.close()
    assert lower.kept == ["b", "c"]


def test_a_store_may_be_closed_by_a_signal_handler():
    store = TieredStore([open_store("memory:"), open_store("memory:")])
    counters, (upper, lower) = store._counters._lock, store.tiers
    with counters, upper._lock, lower._lock, upper._counters._lock:  # where the handler interrupts its thread
        store.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        store.get("k")


def test_a_store_that_breaks_the_contract_is_a_tier_that_failed():
    class Odd(InMemory):
        def get_many(self, _):
            return []

        def contains_prefix(self, _):
            return -1

    with TieredStore([Odd(), open_store("memory:")]) as store:
        store.put("k", b"v")
        assert store.get("k") == b"v"
        assert store.contains_prefix(["k", "l"]) == 1


def test_a_tier_that_came_back_is_used_again():
    lower = Gate()
    with TieredStore([open_store("memory:?bytes=600"), lower]) as store:
        store.put("k", b"v")
        lower.fault = StoreUnavailable("gone")
        store.put("l", b"v")
        assert store.get("k") is None
        lower.fault = None
        assert store.get("k") == b"v"


def test_what_one_tier_cannot_hold_another_takes():
    with TieredStore([open_store("memory:?bytes=2000"), open_store("memory:")]) as store:
        entries = [("small", b"1"), ("large", bytes(5000)), ("after", b"2")]
        store.put_many(entries)
        assert store.get_many([key for key, _ in entries]) == [value for _, value in entries]
        assert store.tiers[0].contains("after")


@pytest.mark.parametrize("write", ["through", "back"])
def test_an_older_value_does_not_outlive_one_that_has_no_room(write):
    with TieredStore([open_store("memory:?bytes=2000"), open_store("memory:")], write=write) as store:
        store.put("k", b"old")
        store.put("k", bytes(5000))
        assert store.get("k") == bytes(5000)
        store.flush()
        assert store.get("k") == bytes(5000)


def test_what_no_tier_takes_is_an_error():
    lower = Gate()
    with TieredStore([open_store("memory:?bytes=600"), lower]) as store:
        lower.fault = StoreFull("full")
        store.put("small", b"1")
        with pytest.raises(StoreUnavailable, match="1 of 1"):
            store.put("large", bytes(1000))


def test_write_back_returns_at_once_and_close_waits_for_it():
    upper, lower = open_store("memory:?bytes=700"), Gate()
    store = TieredStore([upper, lower], write="back")
    lower.is_open.clear()
    store.put_many([("a", b"1"), ("b", b"2"), ("c", b"3")])  # the first tier has room for one
    assert store.get_many(["b", "c"]) == [b"2", b"3"]
    assert store.contains_prefix(["c"]) == 1
    assert set(store.tiers[0].keys()) != {"a", "b", "c"}
    lower.is_open.set()
    store.flush()
    assert lower._frames.keys() == {"a", "b", "c"}
    store.put("d", b"4")
    store.close()
    assert not any(thread.name == "kvtc-write-back" for thread in threading.enumerate())


def test_deleted_on_its_way_stays_deleted():
    lower = Gate()
    with TieredStore([open_store("memory:"), lower], write="back") as store:
        lower.is_open.clear()
        store.put("in-flight", b"1")
        assert lower.is_waiting.wait(30)
        store.put("waiting", b"2")
        store.delete("waiting")
        deleter = threading.Thread(target=store.delete, args=("in-flight",))
        deleter.start()
        lower.is_open.set()
        deleter.join(30)
        # At once, without a flush: what has been deleted must not come by for a moment and be copied above.
        assert list(lower._frames) == []
        assert list(store.keys()) == []
        assert store.get_many(["in-flight", "waiting"]) == [None, None]


def test_a_full_queue_makes_writers_wait():
    lower = Gate()
    with TieredStore([open_store("memory:"), lower], write="back", queue_bytes=1) as store:
        lower.is_open.clear()
        store.put("a", b"1")
        assert lower.is_waiting.wait(30)
        store.put("b", b"2")
        writer = threading.Thread(target=store.put, args=("c", b"3"))
        writer.start()
        writer.join(0.2)
        assert writer.is_alive()
        lower.is_open.set()
        writer.join(30)
        assert not writer.is_alive()
        store.flush()
        assert lower._frames.keys() == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("change", "upper_value"),
    [
        (lambda store: store.put("k", b"new"), b"new"),
        (lambda store: store.delete("k"), None),
        (lambda store: store.put("other", b"new"), b"old"),
    ],
)
def test_a_value_read_before_a_write_is_not_copied_over_it(change, upper_value):
    class SlowAnswer(Gate):
        def _read(self, names):
            frames = InMemory._read(self, names)
            self._pass()
            return frames

        def _write(self, names, frames):
            InMemory._write(self, names, frames)

    upper, lower = open_store("memory:"), SlowAnswer()
    with TieredStore([upper, lower]) as store:
        lower.put("k", b"old")
        lower.is_open.clear()
        reader = threading.Thread(target=store.get, args=("k",))
        reader.start()
        assert lower.is_waiting.wait(30)
        change(store)
        lower.is_open.set()
        reader.join()
        assert upper.get("k") == upper_value


def test_what_waits_is_written_when_a_program_ends_without_closing(tmp_path):
    code = """
import sys
from kvtc.store import open_store
store = open_store(["memory:", sys.argv[1]], write="back")
store.put_many((str(i), bytes(100_000)) for i in range(50))
"""
    subprocess.run([sys.executable, "-c", code, f"file://{tmp_path}"], check=True, timeout=120)
    with open_store(f"file://{tmp_path}") as store:
        assert store.contains_prefix([str(i) for i in range(50)]) == 50


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_that_died_is_followed_by_another():
    class Deadly(InMemory):
        n_exits = 0

        def put_many(self, entries):
            entries = list(entries)
            if entries[0][0].startswith("deadly"):
                self.n_exits += 1
                raise SystemExit
            super().put_many(entries)

    lower = Deadly()
    with TieredStore([open_store("memory:"), lower], write="back", queue_bytes=1) as store:
        for key in ("deadly/1", "a", "deadly/2", "b"):
            store.put(key, b"v")
        store.flush()
        assert lower.contains_prefix(["a", "b"]) == 2
        assert lower.n_exits == 2
        for thread in threading.enumerate():  # what they raise is told before this test is over
            if thread.name == "kvtc-write-back":
                thread.join()


def test_no_thread_to_write_with_is_an_error_and_writing_goes_on_later(monkeypatch):
    lower = open_store("memory:")
    with TieredStore([open_store("memory:"), lower], write="back") as store:

        def refuse(_):
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(StoreUnavailable, match="no thread"):
                store.put("a", b"1")
        store.put("b", b"2")
        store.flush()
        assert lower.get_many(["a", "b"]) == [None, b"2"]


@pytest.mark.parametrize("url", ["tiered:", "tiered:?write=back", "tiered:?write=never|memory:", "tiered:memory:|", []])
def test_urls_that_mean_nothing_are_refused(url):
    with pytest.raises(InvalidArgument):
        open_store(url)


def test_tiers_take_options_of_their_own(tmp_path):
    with open_store(f"tiered:memory:?namespace=a|file://{tmp_path}?namespace=b&sync=data", write="back") as store:
        store.put("k", b"v")
        store.flush()
        assert [tier.namespace for tier in store.tiers] == ["a", "b"]
        assert list(store.keys()) == ["k"]
