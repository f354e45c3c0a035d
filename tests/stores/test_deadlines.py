"""A place that does not answer makes every caller wait for one deadline at most, and soon none at all."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from kvtc.errors import StoreFull, StoreUnavailable
from kvtc.store import bounded_calls, circuit, open_store
from kvtc.store.bounded_calls import MAX_THREADS, BoundedCalls
from kvtc.store.files.directory import Directory

from ..forking import in_forked_child
from .contract import wait_until
from .servers import answer_nothing, socket_server

DEADLINE = 0.3
CREDENTIALS = "access_key_id=name&secret_access_key=secret&region=us-east-1"


@pytest.fixture
def hanging_disk(tmp_path, monkeypatch):
    """The URL of a directory in which nothing can be read until the event is set."""
    open_store(f"file://{tmp_path}").close()
    answers = threading.Event()

    def hang(*_):
        answers.wait(60)

    monkeypatch.setattr(Directory, "load", hang)
    monkeypatch.setattr(Directory, "path", hang)
    yield f"file://{tmp_path}?timeout={DEADLINE}", answers
    answers.set()


@pytest.fixture(params=["redis", "s3", "file"])
def silent(request, hanging_disk):
    """The URL of a place that never answers."""
    with socket_server(answer_nothing) as place:
        yield {
            "redis": f"redis://{place}?timeout={DEADLINE}",
            "s3": f"s3://bucket?endpoint=http://{place}&timeout={DEADLINE}&{CREDENTIALS}",
            "file": hanging_disk[0],
        }[request.param]


def read(store, keys):
    """Values as a caller has them who takes every error for a miss."""
    try:
        return store.get_many(keys)
    except StoreUnavailable:
        return [None] * len(keys)


def write_and_read(store):
    with suppress(StoreUnavailable):
        store.put("k", b"v")
    return read(store, ["k"])[0]


def timed(call):
    begin = time.monotonic()
    value = call()
    return value, time.monotonic() - begin


@pytest.mark.parametrize("tiered", [False, True])
def test_eight_requests_at_once_wait_for_one_deadline_and_later_ones_for_none(silent, tiered, monkeypatch):
    monkeypatch.setattr(circuit, "PAUSE_SECONDS", 1000)
    with open_store([silent] if tiered else silent) as store, ThreadPoolExecutor(8) as callers:
        keys = [str(i) for i in range(40)]
        requests = [callers.submit(timed, lambda: read(store, keys)) for _ in range(8)]
        answers = [request.result() for request in requests]
        assert [values for values, _ in answers] == [[None] * 40] * 8
        # One deadline, and what a busy machine needs to start 8 threads: far from 8 deadlines.
        assert max(seconds for _, seconds in answers) < 5 * DEADLINE
        later = [timed(lambda: read(store, ["a", "b"])) for _ in range(20)]
        assert [values for values, _ in later] == [[None, None]] * 20
        assert sum(seconds for _, seconds in later) < DEADLINE
        assert store.statistics().errors >= 28


def test_the_error_says_what_has_not_answered(silent):
    with open_store(silent) as store:
        with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1|s3://bucket|FileStore"):
            store.get("k")
        with pytest.raises(StoreUnavailable, match="did not answer lately"):
            store.get("k")


def test_a_place_that_answers_again_is_found_in_the_background(hanging_disk, monkeypatch):
    monkeypatch.setattr(circuit, "PAUSE_SECONDS", 0.05)
    url, answers = hanging_disk
    with open_store(url) as store:
        read(store, ["k"])
        waits = [timed(lambda: read(store, ["k"]))[1] for _ in range(30) if not time.sleep(0.01)]
        assert sum(waits) < 2 * DEADLINE, "probes make no caller wait"
        assert sum(thread.name == "kvtc-probe" for thread in threading.enumerate()) == 1, "one probe hangs, not many"
        monkeypatch.undo()
        answers.set()
        wait_until(lambda: write_and_read(store) == b"v")


# The mechanism itself.


class Place:
    """What calls ask: as slow as a test wants."""

    def __init__(self, seconds=DEADLINE):
        self.answers = threading.Event()
        self.calls = BoundedCalls("the place", seconds, self.answer)

    def answer(self):
        assert self.answers.wait(60)
        return "here"


@pytest.fixture
def place():
    place = Place()
    yield place
    place.answers.set()


def test_threads_that_hang_are_bounded(place, monkeypatch):
    monkeypatch.setattr(bounded_calls.CircuitBreaker, "is_open", lambda _: False)
    for _ in range(3):
        with pytest.raises(StoreUnavailable, match=r"the place has not answered within 0\.3 seconds"):
            place.calls.run_all([place.answer] * MAX_THREADS)
        with pytest.raises(StoreUnavailable, match=f"the place: {MAX_THREADS} calls have not come back"):
            place.calls.run(place.answer)
        assert place.calls._threads._n_threads == MAX_THREADS
        place.answers.set()
        wait_until(lambda: not place.calls._threads._hanging)
        assert place.calls.run_all([place.answer] * 40) == ["here"] * 40
        place.answers.clear()


def test_calls_that_nobody_waits_for_are_not_begun(place, monkeypatch):
    monkeypatch.setattr(bounded_calls.CircuitBreaker, "is_open", lambda _: False)
    begun = []
    hanging = [place.answer] * (MAX_THREADS - 1)
    with ThreadPoolExecutor(1) as other:
        others = other.submit(place.calls.run_all, hanging)
        wait_until(lambda: place.calls._threads._n_threads - place.calls._threads._n_idle == len(hanging))
        with pytest.raises(StoreUnavailable):
            place.calls.run_all([place.answer, *(lambda: begun.append(1) for _ in range(5))])
        with pytest.raises(StoreUnavailable):
            others.result()
    place.answers.set()
    wait_until(lambda: not place.calls._threads._hanging)
    assert begun == []


def test_a_call_that_was_given_up_knows(place):
    knows = []

    def call():
        place.answer()
        knows.append(bounded_calls.is_given_up())

    with pytest.raises(StoreUnavailable):
        place.calls.run(call)
    place.answers.set()
    wait_until(lambda: knows)
    assert knows == [True]
    assert not bounded_calls.is_given_up()


def test_what_was_given_up_writes_nothing_any_more(tmp_path, monkeypatch):
    answers = threading.Event()
    with open_store(f"file://{tmp_path}?timeout={DEADLINE}&sync=data") as store:
        store.put("k", b"old")
        monkeypatch.setattr("kvtc.store.files.directory.os.fsync", lambda _: answers.wait(60))
        with pytest.raises(StoreUnavailable, match=r"within 0\.3 seconds"):
            store.put("k", b"given up")
        answers.set()
        wait_until(lambda: not store._writing._threads._hanging)
        assert store.get("k") == b"old"
        assert list((tmp_path / "partial").iterdir()) == []


@pytest.mark.parametrize("error", [KeyError("x"), StoreFull("full"), SystemExit(3), MemoryError()])
def test_what_a_call_raises_is_the_callers(place, error):
    def call():
        raise error

    with pytest.raises(type(error)) as caught:
        place.calls.run(call)
    assert caught.value is error
    place.answers.set()
    assert place.calls.run(place.answer) == "here", "what fails at once opens no circuit"


def test_an_answer_that_came_late_opens_no_circuit_if_it_was_an_answer(place):
    def call():
        time.sleep(0.2)
        raise StoreFull("full")

    with pytest.raises(StoreFull):
        place.calls.run(call)
    place.answers.set()
    assert place.calls.run(place.answer) == "here"


def test_threads_without_work_end(place, monkeypatch):
    monkeypatch.setattr(bounded_calls, "IDLE_SECONDS", 0.05)
    place.answers.set()
    assert place.calls.run(place.answer) == "here"
    wait_until(lambda: place.calls._threads._n_threads == 0)
    assert place.calls.run(place.answer) == "here"


def test_no_thread_to_be_had_is_an_error(place, monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(StoreUnavailable, match="no thread"):
        place.calls.run(place.answer)


def test_a_forked_child_begins_anew(place):
    with pytest.raises(StoreUnavailable):
        place.calls.run(place.answer)
    assert in_forked_child(lambda: place.calls.run(lambda: "in the child")) == "'in the child'"
