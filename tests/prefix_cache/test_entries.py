"""What is a miss, what is damage, what is counted and logged, and what is the caller's."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
import torch

from kvtc.codec.codec import Codec
from kvtc.codec.options import as_token_ids
from kvtc.counts import Counts
from kvtc.entries import Entries
from kvtc.errors import (
    CalibrationMismatch,
    CorruptStream,
    GeometryMismatch,
    InvalidArgument,
    StoreError,
    TokenMismatch,
    TruncatedStream,
    UnsupportedVersion,
)
from kvtc.prefix_cache import PrefixCache, chunk_key
from kvtc.process import log_limits
from kvtc.store import open_store
from tests.builders import joint_calibration, told_cache, told_codec, told_ids
from tests.failing import DECODE_ERRORS, ERRORS, break_decoding, break_store, raising

CHUNK, WINDOW = 32, 16


@pytest.fixture
def entries():
    with open_store("memory:") as store:
        store.put("here", b"entry")
        yield Entries(store)


def prefix_cache(store: Any) -> PrefixCache:
    codec = told_codec("joint", step=0.1, window_tokens=WINDOW, chunk_tokens=CHUNK)
    return PrefixCache(codec, store, min_tokens=1)


def save(prefixes: PrefixCache, n: int = 200) -> Any:
    return prefixes.save(told_ids(n), told_cache(n)).result()


def test_what_is_there_is_loaded_and_what_is_not_is_saved_once(entries):
    assert entries.read(["here", "gone"]) == [b"entry", None]
    assert entries.decode("here", b"entry", bytes.decode) == "entry"
    assert entries.decode("gone", None, bytes.decode) is None
    assert [entries.save("new", lambda: b"four", 100) for _ in range(2)] == [4, 0]
    assert entries.put("new", lambda: b"other", replace=True) == 5
    assert entries.count_leading(["here", "new", "gone", "new"]) == 2
    assert entries.present(["here", "new", "gone", "new", "gone"]) == [True, True, False, True, False]
    assert entries.present(["gone", "new"]) == [False, True]
    assert entries.present(["here"]) == [True]
    assert entries.present([]) == []
    entries.forget("new")
    assert entries.read(["new"]) == [None]
    assert entries.counts.read() == {
        "bytes_read": 5,
        "entries_loaded": 1,
        "misses": 1,
        "entries_saved": 2,
        "entries_shared": 1,
        "bytes_saved": 9,
        "original_bytes": 100,
        "lookups": 5,
    }


@pytest.mark.parametrize("error", ERRORS)
def test_whatever_a_store_raises_is_a_miss_or_an_error_of_the_store(entries, monkeypatch, error):
    break_store(monkeypatch, entries.store, error)
    (entry,) = entries.read(["here"])
    assert entries.decode("here", entry, bytes.decode) is None
    assert entries.read(["here"], is_resident=True) == [None]
    assert entries.count_leading(["here"]) == 0
    assert entries.present(["here"]) == [False]
    assert entries.save("new", lambda: b"four") is None
    entries.forget("here")
    counts = entries.counts.read()
    assert (counts["misses"], counts["store_errors"], counts["save_errors"], counts["damaged"]) == (1, 6, 1, 0)
    told = (
        lambda: entries.fetch(["here"]),
        lambda: entries.put("new", lambda: b"four"),
        lambda: entries.put("new", lambda: b"four", replace=True),
        lambda: entries.write("new", b"four"),
        lambda: entries.delete("here"),
    )
    for call in told:
        with pytest.raises(StoreError, match="the cause") as raised:
            call()
        assert isinstance(raised.value, error) or isinstance(raised.value.__cause__, error)
    assert entries.counts.read()["store_errors"] == 11
    monkeypatch.undo()
    assert entries.read(["here"]) == [b"entry"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_a_program_ends_it(entries, monkeypatch, error):
    calls = (
        lambda: entries.decode("here", b"entry", raising(error)),
        lambda: entries.save("new", raising(error)),
        lambda: entries.read(["here"]),
        lambda: entries.count_leading(["here"]),
        lambda: entries.present(["here"]),
        lambda: entries.save("new", lambda: b"four"),
        lambda: entries.forget("here"),
    )
    for index, call in enumerate(calls):
        if index == 2:
            break_store(monkeypatch, entries.store, error)
        with pytest.raises(error):
            call()
    assert not entries.counts.read()["store_errors"]


@pytest.mark.parametrize(
    ("value", "found"), [(bytearray(b"v"), b"v"), (memoryview(b"v"), b"v"), ("v", None), ([1], None), (7, None)]
)
def test_what_a_store_gives_comes_as_bytes_or_is_an_error_of_the_store(entries, monkeypatch, value, found):
    monkeypatch.setattr(entries.store, "get_many", lambda keys: [value for _ in keys])
    loaded = entries.read(["here"])
    assert loaded == [found]
    assert loaded[0] is None or type(loaded[0]) is bytes
    assert entries.counts.read()["store_errors"] == (found is None)


def test_only_resident_values_may_be_tensors_of_bytes(entries, monkeypatch):
    tensor = torch.zeros(4, dtype=torch.uint8)
    for name in ("get_many", "resident_many"):
        monkeypatch.setattr(entries.store, name, lambda keys: [tensor for _ in keys])
    assert entries.read(["here"], is_resident=True)[0] is tensor
    assert entries.read(["here"]) == [None]
    monkeypatch.setattr(entries.store, "resident_many", lambda keys: [tensor.float() for _ in keys])
    assert entries.read(["here"], is_resident=True) == [None]


@pytest.mark.parametrize(("count", "leading"), [(-5, 0), (10**9, 2), (1, 1), (None, 0), ("2", 0)])
def test_leading_entries_are_no_more_than_were_asked_for(entries, monkeypatch, count, leading):
    monkeypatch.setattr(entries.store, "contains_prefix", lambda _: count)
    assert entries.count_leading(["here", "gone"]) == leading


def test_entries_that_are_there_are_told_for_as_many_keys_as_were_asked_for(entries, monkeypatch):
    assert entries.present(["gone", "here"]) == [False, True]
    for flags in ([True], [True] * 3, None):
        monkeypatch.setattr(entries.store, "contains_many", lambda _, flags=flags: flags)
        assert entries.present(["gone", "here"]) == [False, False]
    assert (entries.counts.read()["store_errors"], entries.counts.read()["lookups"]) == (3, 4)


@pytest.mark.parametrize("error", [CorruptStream, TruncatedStream])
def test_a_damaged_entry_is_deleted(entries, error):
    assert entries.decode("here", b"entry", raising(error)) is None
    counts = entries.counts.read()
    assert (counts["damaged"], counts["other"], counts["decode_errors"], counts["misses"]) == (1, 0, 0, 1)
    assert entries.store.get("here") is None


@pytest.mark.parametrize(
    "error", [UnsupportedVersion, CalibrationMismatch, GeometryMismatch, TokenMismatch, InvalidArgument]
)
def test_an_entry_of_another_kind_is_left_alone(entries, error):
    assert entries.decode("here", b"entry", raising(error)) is None
    counts = entries.counts.read()
    assert (counts["damaged"], counts["other"], counts["decode_errors"], counts["misses"]) == (0, 1, 0, 1)
    assert entries.store.get("here") == b"entry"


@pytest.mark.parametrize(
    ("change", "counter"),
    [
        (lambda frame: frame[:-1] + bytes([frame[-1] ^ 1]), "damaged"),
        (lambda frame: frame[:-1], "damaged"),
        (lambda frame: frame[:4] + b"\2" + frame[5:], "other"),
    ],
)
def test_what_a_store_finds_damaged_or_foreign_is_counted_by_its_reader_alone_and_logged_once(
    entries, caplog, change, counter
):
    (name,) = entries.store._frames
    frame = entries.store._frames[name]
    another = Entries(entries.store)
    for _ in range(3):
        entries.store._frames[name] = change(frame)
        (entry,) = entries.read(["here"])
        assert entries.decode("here", entry, bytes.decode) is None
        assert entries.store.contains("here") == (counter == "other")
    counts = entries.counts.read()
    assert (counts[counter], counts["misses"], counts["damaged"] + counts["other"]) == (3, 3, 3)
    assert not another.counts.read()
    assert len(caplog.messages) == 1


def test_damage_that_cannot_be_deleted_is_logged_with_its_cause(entries, monkeypatch, caplog):
    (name,) = entries.store._frames
    entries.store._frames[name] = entries.store._frames[name][:-1]
    monkeypatch.setattr(entries.store, "_discard", raising(OSError))
    assert entries.read(["here"]) == [None]
    assert entries.counts.read()["damaged"] == entries.store.statistics().errors == 1
    assert caplog.messages[1].endswith("is not deleted: OSError: the cause")


@pytest.mark.parametrize("error", DECODE_ERRORS)
def test_an_entry_is_left_alone_where_memory_or_code_fails(entries, error):
    assert entries.decode("here", b"entry", raising(error)) is None
    counts = entries.counts.read()
    assert (counts["damaged"], counts["other"], counts["decode_errors"], counts["misses"]) == (0, 0, 1, 1)
    assert entries.store.get("here") == b"entry"


@pytest.mark.parametrize("given", [[], [b"a", b"b"], None, [7]])
def test_a_store_that_gives_what_was_not_asked_for_gives_nothing(entries, monkeypatch, given):
    monkeypatch.setattr(entries.store, "get_many", lambda _: given)
    assert entries.read(["here"]) == [None]
    assert entries.counts.read()["store_errors"] == 1


def test_failures_are_logged_with_their_cause_once_a_minute_of_each_kind(entries, monkeypatch, caplog):
    now = [1000.0]
    monkeypatch.setattr(log_limits.time, "monotonic", lambda: now[0])
    for _ in range(3):
        entries.decode("here", b"entry", raising(RuntimeError))
        entries.decode("here", b"entry", raising(TokenMismatch))
    break_store(monkeypatch, entries.store, OSError)
    entries.read(["here"])
    now[0] += 61
    entries.read(["here"])
    assert [message.split("\n")[0] for message in caplog.messages] == [
        "entry here is not decoded: RuntimeError: the cause",
        "entry here is not what was asked for and is left alone: TokenMismatch: the cause",
        "the store did not read here: OSError: the cause",
        "the store did not read here: OSError: the cause",
    ]
    assert ["Traceback" in record.message for record in caplog.records] == [True, False, True, True]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_counts_have_one_vocabulary_and_are_taken_once():
    counts = Counts()
    counts.add(loads=1, bytes_read=10)
    assert counts.take() == {"loads": 1, "bytes_read": 10}
    counts.add(loads=2, misses=0)
    assert counts.take() == {"loads": 2}
    assert counts.take() == {}
    assert counts.read() == {"loads": 3, "bytes_read": 10, "misses": 0}
    assert counts.read()["damaged"] == 0
    with pytest.raises(KeyError, match="there is no counter chunks_lost"):
        counts.add(chunks_lost=1)


# Through the prefix cache; the adapters of engines have tests of their own.


@pytest.mark.parametrize("error", ERRORS)
def test_a_prefix_that_a_store_does_not_give_is_a_miss(monkeypatch, error):
    with open_store("memory:") as store, prefix_cache(store) as prefixes:
        save(prefixes)
        break_store(monkeypatch, store, error)
        assert prefixes.load_neutral(told_ids(200)) == (None, 0)
        assert prefixes.contains(told_ids(200)) == 0
        with pytest.raises(StoreError, match="the cause"):
            save(prefixes)
        with pytest.raises(StoreError, match="the cause"):
            prefixes.delete(told_ids(200))
        counts = prefixes.statistics
        assert (counts["loads"], counts["hits"], counts["tokens_loaded"], counts["save_errors"]) == (1, 0, 0, 1)
        monkeypatch.undo()
        assert prefixes.load_neutral(told_ids(200), whole=True)[1] == 200
        save(prefixes, 260)
        assert prefixes.statistics["saves"] == 2, "the worker goes on"


@pytest.mark.parametrize("error", DECODE_ERRORS)
def test_a_prefix_that_there_is_no_memory_for_is_a_miss_and_stays(monkeypatch, error):
    with open_store("memory:") as store, prefix_cache(store) as prefixes:
        save(prefixes)
        keys = set(store.keys())
        with monkeypatch.context() as broken:
            break_decoding(broken, error)
            assert prefixes.load_neutral(told_ids(200)) == (None, 0)
        with monkeypatch.context() as broken:
            broken.setattr("kvtc.prefix_cache.parts.torch.cat", raising(error))
            assert prefixes.load_neutral(told_ids(200)) == (None, 0), "memory for each part, but not for the whole"
        assert prefixes.statistics["decode_errors"] == 2
        assert prefixes.statistics["damaged"] == 0
        assert set(store.keys()) == keys
        assert prefixes.load_neutral(told_ids(200), whole=True)[1] == 200


@pytest.mark.parametrize("error", DECODE_ERRORS)
def test_a_save_that_there_is_no_memory_for_is_told_and_the_next_one_is_saved(monkeypatch, error):
    with open_store("memory:") as store, prefix_cache(store) as prefixes:
        with monkeypatch.context() as broken:
            broken.setattr(prefixes._parts.windowless, "encode_split", raising(error))
            with pytest.raises(error, match="the cause"):
                save(prefixes)
        save(prefixes)
        assert (prefixes.statistics["save_errors"], prefixes.statistics["saves"]) == (1, 1)


def test_an_interrupt_in_a_store_reaches_the_caller(monkeypatch):
    with open_store("memory:") as store, prefix_cache(store) as prefixes:
        save(prefixes)
        break_store(monkeypatch, store, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            prefixes.load_neutral(told_ids(200))
        with pytest.raises(KeyboardInterrupt):
            save(prefixes)
        monkeypatch.undo()
        assert prefixes.load_neutral(told_ids(200), whole=True)[1] == 200


@pytest.mark.parametrize("kind", ["damaged", "newer", "of another calibration", "of another text"])
def test_only_damaged_chunks_are_deleted(kind):
    with open_store("memory:") as store, prefix_cache(store) as prefixes:
        save(prefixes)
        key = chunk_key(prefixes.chain.nodes(as_token_ids(told_ids(200)))[2])
        stream = store.get(key)
        second = slice(CHUNK, 2 * CHUNK)
        others = {
            "damaged": lambda: stream[:-1] + bytes([stream[-1] ^ 1]),
            "newer": lambda: stream[:4] + bytes([99, 0]) + stream[6:],
            "of another calibration": lambda: Codec(
                joint_calibration(5), "joint", step=0.1, window_tokens=0, chunk_tokens=CHUNK
            ).encode(told_cache(200).span(second.start, second.stop), told_ids(200)[second]),
            "of another text": lambda: prefixes._parts.windowless.encode(
                told_cache(200).span(second.start, second.stop), told_ids(200, seed=9)[second]
            ),
        }
        store.put(key, others[kind]())
        assert prefixes.load_neutral(told_ids(200), whole=True)[1] == CHUNK
        counts = prefixes.statistics
        expected = (1, 0) if kind == "damaged" else (0, 1)
        assert (counts["damaged"], counts["other"], counts["misses"]) == (*expected, 1)
        assert store.contains(key) == (kind != "damaged")
        assert save(prefixes).coded == (1 if kind == "damaged" else 0)


def test_many_threads_count_right(entries):
    def work():
        for _ in range(200):
            entries.decode("here", entries.read(["here"])[0], bytes.decode)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert entries.counts.read()["entries_loaded"] == 800
