"""Stores in forked children, in other processes, and at the end of things."""

import contextlib
import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvtc.errors import InvalidArgument, StoreFull, StoreUnavailable
from kvtc.store import encrypted, open_store
from kvtc.store.files.directory import Directory
from kvtc.store.tiered import TieredStore

from ..forking import in_forked_child
from .contract import InMemory
from .servers import answer_nothing, redis_server, s3_server, socket_server
from .test_tiered import Gate

KEY = bytes(range(32))


@contextlib.contextmanager
def locks_held_by_another_thread(*locks):
    """As at a fork in the middle of another thread's work."""
    held, ends = threading.Event(), threading.Event()

    def hold():
        with contextlib.ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            held.set()
            ends.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        yield
    finally:
        ends.set()
        thread.join()


def use(store):
    """Everything that a store does; closed in the end."""
    store.put("child", b"of the child")
    store.flush()
    found = store.get_many(["parent", "child"])
    there = store.contains_prefix(["child", "absent"])
    store.delete("child")
    listed = sorted(store.keys())
    store.statistics()
    store.close()
    store.close()
    return found, there, listed


def locks_of(store):
    """All locks of a store and of what it is made of."""
    seen, open_ends, locks = set(), [store], []
    while open_ends:
        one = open_ends.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, list | tuple):
            open_ends += one
        elif isinstance(one, type(threading.Lock()) | type(threading.RLock()) | threading.Condition):
            locks.append(one)
        elif type(one).__module__.startswith("kvtc"):
            open_ends += vars(one).values()
    return locks


URLS = {
    "memory": "memory:",
    "device": "device:cpu",
    "file": "file://{path}/store?bytes=10MB",
    "through": "tiered:memory:|file://{path}/store",
    "back": "tiered:?write=back|memory:|file://{path}/store",
}


@pytest.mark.parametrize("name", URLS)
def test_a_child_has_stores_of_its_own_whatever_other_threads_held(tmp_path, name):
    with open_store(URLS[name].format(path=tmp_path)) as store:
        store.put("parent", b"of the parent")
        store.flush()
        locks = locks_of(store)
        assert locks
        with locks_held_by_another_thread(*locks):
            answer = in_forked_child(lambda: use(store))
        assert answer == repr(([b"of the parent", b"of the child"], 1, ["parent"]))
        assert store.get("parent") == b"of the parent"
        store.put("later", b"v")
        assert store.get("later") == b"v"


def test_a_child_of_an_encrypted_store(tmp_path):
    with encrypted(open_store(f"file://{tmp_path}"), KEY) as store:
        store.put("parent", b"of the parent")
        with locks_held_by_another_thread(*locks_of(store)):
            assert "of the child" in in_forked_child(lambda: use(store))


def test_a_child_of_a_redis_store(tmp_path):
    with redis_server(tmp_path) as server, open_store(f"redis://127.0.0.1:{server.port}?timeout=20") as store:
        store.put("parent", b"of the parent")
        pool = store._client.connection_pool
        with locks_held_by_another_thread(pool._lock, pool._fork_lock, *locks_of(store)):
            assert in_forked_child(lambda: use(store)) == repr(([b"of the parent", b"of the child"], 1, ["parent"]))
        assert store.get("parent") == b"of the parent"


def test_a_child_of_an_s3_store_says_at_once_that_it_cannot():
    options = {"access_key_id": "name", "secret_access_key": "secret", "region": "us-east-1"}
    with socket_server(answer_nothing) as place:
        url = f"s3://bucket?endpoint=http://{place}&timeout=0.1"
        with open_store(url, **options) as store:
            with pytest.raises(StoreUnavailable):
                store.get("k")
            answer = in_forked_child(lambda: store.get("k"), seconds=10)
            assert "StoreUnavailable" in answer
            assert "start processes with spawn" in answer


def test_a_memory_store_forked_in_the_middle_of_a_put_counts_anew():
    class Forking(InMemory):
        def _hold(self, frame):
            if self.answers is None:
                self.answers = ""
                self.answers = in_forked_child(lambda: (self.statistics().stored_bytes, self.put("l", b"v")))
            return super()._hold(frame)

    with Forking(5000) as store:
        store.answers = None
        store.put("k", bytes(4000))
        assert store.answers == "(0, None)"


def test_what_waits_to_be_written_is_the_parents_to_write():
    lower = Gate()
    with TieredStore([open_store("memory:"), lower], write="back") as store:
        lower.is_open.clear()
        store.put("in-flight", b"1")
        assert lower.is_waiting.wait(30)
        store.put("waiting", b"2")

        def in_child():
            lower.is_open.set()
            store.put("child", b"3")
            store.flush()
            written = list(lower._frames)
            store.close()
            return written

        assert in_forked_child(in_child) == "['child']"
        lower.is_open.set()
        store.flush()
        assert list(lower._frames) == ["in-flight", "waiting"]


def test_a_fork_does_not_carry_the_lock_of_a_directory_away(tmp_path):
    """The child inherits the descriptor, and with it the lock, unless that is let go of expressly."""
    directory = Directory(tmp_path, "none", 5, 0o600)
    with directory.ledger.locked():
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        with directory.ledger.locked():
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "the child must still live, without the lock"
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


# Other processes.


def _use_in_another_process(store):
    with store:
        return use(store)


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["file", "through", "back"])
def test_stores_are_opened_again_in_other_processes(tmp_path, method, name):
    with open_store(URLS[name].format(path=tmp_path)) as store:
        store.put("parent", b"of the parent")
        store.flush()
        with multiprocessing.get_context(method).Pool(1) as pool:
            found, there, listed = pool.apply_async(_use_in_another_process, (store,)).get(120)
        assert (found, there, listed) == ([b"of the parent", b"of the child"], 1, ["parent"])


def test_a_pickled_store_has_the_options_it_was_opened_with(tmp_path, monkeypatch):
    monkeypatch.setenv("KVTC_TEST_KEY", KEY.hex())
    with open_store(f"file://{tmp_path}?key_variable=KVTC_TEST_KEY", namespace="n", entry_bytes=100) as store:
        store.put("k", b"v")
        with copy.copy(store) as other:
            assert other.get("k") == b"v"
            assert other.namespace == "n"
            with pytest.raises(StoreFull, match="up to 100"):
                other.put("long", bytes(100))


@pytest.mark.parametrize(
    ("store", "reason"),
    [
        (lambda _: open_store("memory:"), "in this process"),
        (lambda _: open_store("device:cpu"), "in this process"),
        (lambda _: encrypted(open_store("memory:"), KEY), "in this process"),
        (lambda path: encrypted(open_store(f"file://{path}"), KEY), "not opened by a URL"),
        (lambda path: open_store([open_store(f"file://{path}")]), "not opened by a URL"),
    ],
)
def test_what_cannot_be_pickled_says_why(tmp_path, store, reason):
    with store(tmp_path) as opened, pytest.raises(InvalidArgument, match=f"cannot be pickled: .*{reason}"):
        pickle.dumps(opened)


def test_workers_forked_from_a_preloaded_program(tmp_path):
    """As gunicorn does: everything is opened and used before the fork, and each worker ends on its own."""
    code = """
import os, sys
from kvtc.store import open_store
store = open_store(["memory:", sys.argv[1]], write="back")
store.put("parent", bytes(100_000))
workers = []
for number in range(3):
    child = os.fork()
    if child == 0:
        assert store.get("parent") == bytes(100_000)
        store.put(f"worker/{number}", bytes(100_000))
        sys.exit(7)  # without a flush
    workers.append(child)
assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in workers] == [7] * 3
"""
    subprocess.run([sys.executable, "-c", code, f"file://{tmp_path}"], check=True, timeout=120)
    with open_store(f"file://{tmp_path}") as store:
        assert sorted(store.keys()) == ["parent", "worker/0", "worker/1", "worker/2"]


# Closing.


def calls_of(store):
    return {
        "get": lambda: store.get("k"),
        "get_many": lambda: store.get_many(["k", "l"]),
        "resident_many": lambda: store.resident_many(["k"]),
        "put": lambda: store.put("k", b"v"),
        "contains": lambda: store.contains("k"),
        "delete": lambda: store.delete("k"),
        "keys": lambda: list(store.keys()),
        "flush": lambda: store.flush(),
    }


@pytest.mark.parametrize("name", [*URLS, "encrypted", "redis", "s3"])
def test_after_closing_every_call_names_what_is_closed(tmp_path, name):
    urls = URLS | {
        "redis": "redis://127.0.0.1:1?timeout=0.1",
        "s3": "s3://bucket?endpoint=http://127.0.0.1:1&region=r&access_key_id=name&secret_access_key=secret",
        "encrypted": "file://{path}/store?key_variable=KVTC_TEST_KEY",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVTC_TEST_KEY", KEY.hex())
        store = open_store(urls[name].format(path=tmp_path))
    store.close()
    store.close()
    for call in calls_of(store).values():
        with pytest.raises(StoreUnavailable, match=r"^\w+Store\(.*\) is closed$"):
            call()
    store.statistics()


@pytest.mark.parametrize("name", [*URLS, "redis", "s3"])
def test_closed_while_others_put_and_flush(tmp_path, name):
    """They are done, or told that it is closed."""
    options = {}
    with contextlib.ExitStack() as stack:
        if name == "redis":
            server = stack.enter_context(redis_server(tmp_path))
            url = f"redis://127.0.0.1:{server.port}?timeout=20"
        elif name == "s3":
            server = stack.enter_context(s3_server())
            url = f"s3://bucket?endpoint=http://127.0.0.1:{server.port}"
            options = {"access_key_id": "name", "secret_access_key": "secret", "region": "us-east-1"}
        else:
            url = URLS[name].format(path=tmp_path)
        store = open_store(url, **options)
        begun = threading.Barrier(5)

        def work(seed):
            begun.wait()
            for number in range(100_000):
                try:
                    store.put(f"{seed}/{number % 10}", bytes(1000))
                    if number % 3 == 0:
                        store.flush()
                    store.get_many([f"{seed}/{i}" for i in range(10)])
                except StoreUnavailable as error:
                    return str(error)
            return "never closed"

        with ThreadPoolExecutor(6) as pool:
            workers = [pool.submit(work, seed) for seed in range(4)]
            begun.wait()
            time.sleep(0.1)
            closers = [pool.submit(store.close) for _ in range(2)]
            messages = [worker.result(60) for worker in workers]
            assert [closer.result(60) for closer in closers] == [None, None]
    if name != "s3":  # there is no such bucket
        assert all("closed" in message for message in messages), messages


def test_who_waits_for_room_in_the_background_is_told_of_the_end():
    lower = Gate()
    store = TieredStore([open_store("memory:"), lower], write="back", queue_bytes=1)
    lower.is_open.clear()
    store.put("a", b"1")
    assert lower.is_waiting.wait(30)
    store.put("b", b"2")
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(store.put, "c", b"3")
        time.sleep(0.1)
        closing = pool.submit(store.close)
        with pytest.raises(StoreUnavailable, match="closed"):
            waiting.result(30)
        lower.is_open.set()
        closing.result(30)
    assert lower._is_closed


def test_leaving_by_an_exception_writes_what_waits(tmp_path):
    def fail():
        with open_store(["memory:", f"file://{tmp_path}"], write="back") as store:
            store.put("k", b"v")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with open_store(f"file://{tmp_path}") as below:
        assert below.get("k") == b"v"


@pytest.mark.parametrize("tier", ["file", "redis"])
def test_what_waits_is_written_at_the_end_of_a_program(tmp_path, tier):
    code = """
import sys
from kvtc.store import open_store
store = open_store(["memory:", sys.argv[1]], write="back")
store.put_many((str(i), bytes(100_000)) for i in range(50))
"""
    with contextlib.ExitStack() as stack:
        url = f"file://{tmp_path}"
        if tier == "redis":
            url = f"redis://127.0.0.1:{stack.enter_context(redis_server(tmp_path)).port}"
        subprocess.run([sys.executable, "-c", code, url], check=True, timeout=120)
        with open_store(url) as store:
            assert store.contains_prefix([str(i) for i in range(50)]) == 50


def test_a_program_ends_although_a_tier_hangs():
    code = """
import sys
from kvtc.store import open_store
store = open_store(["memory:", sys.argv[1]], write="back")
store.put_many((str(i), bytes(1000)) for i in range(50))
"""
    with socket_server(answer_nothing) as place:
        done = subprocess.run(
            [sys.executable, "-c", code, f"redis://{place}?timeout=0.5"],
            timeout=60,
            capture_output=True,
            text=True,
            check=True,
        )
    assert "has not answered within 0.5 seconds" in done.stderr
    assert "Exception ignored" not in done.stderr
