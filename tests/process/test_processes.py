"""Codecs and prefix caches in forked and spawned processes, in pickles, after their end and at the end of the interpreter."""

from __future__ import annotations

import multiprocessing
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from kvtc.codec.codec import Codec
from kvtc.counts import Counts
from kvtc.errors import InvalidArgument, StoreError, StoreUnavailable
from kvtc.prefix_cache import PrefixCache
from kvtc.process.workers import Workers
from kvtc.store import open_store
from tests.builders import told_cache, told_codec, told_ids
from tests.forking import in_forked_child

ROOT = Path(__file__).parents[2]
N = 200


def codec(profile: str = "joint") -> Codec:
    return told_codec(profile, ratio=4, window_tokens=16, chunk_tokens=32)


def prefix_cache(store: Any, **options: Any) -> PrefixCache:
    return PrefixCache(codec(), store, min_tokens=1, **options)


def save(prefixes: PrefixCache, seed: int = 0) -> Any:
    return prefixes.save(told_ids(N, seed), told_cache(N, seed=seed)).result(timeout=30)


def found(prefixes: PrefixCache, seed: int = 0) -> int:
    return prefixes.load_neutral(told_ids(N, seed), whole=True)[1]


def run(program: str, seconds: float = 120) -> str:
    """What a program of its own prints; it fails where the program does or hangs."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# Forked children.


def test_a_forked_child_saves_and_loads_with_threads_of_its_own(tmp_path):
    with open_store(f"file://{tmp_path}") as store, prefix_cache(store) as prefixes:
        save(prefixes)
        assert found(prefixes) == N

        def in_child():
            report = save(prefixes, seed=1)
            counts = prefixes.statistics
            loaded = found(prefixes), found(prefixes, seed=1)
            prefixes.close()
            return loaded, report.n_tokens, counts["saves"]

        assert in_forked_child(in_child) == repr(((N, N), N, 1)), "counts begin anew"
        assert (found(prefixes, seed=1), prefixes.statistics["saves"]) == (N, 1)


def test_locks_that_other_threads_hold_are_free_in_a_forked_child():
    with open_store("memory:") as store, prefix_cache(store) as prefixes:
        save(prefixes)
        locks = [
            prefixes.codec._lock,
            prefixes.codec._encoder._models[0]._lock,
            prefixes.entries.counts._lock,
            prefixes._tails._changing,
        ]
        held, over = threading.Barrier(2), threading.Event()

        def hold():
            for lock in locks:
                lock.__enter__()
            held.wait()
            over.wait()
            for lock in locks:
                lock.__exit__()

        holder = threading.Thread(target=hold)
        holder.start()
        held.wait()
        try:
            assert in_forked_child(lambda: (save(prefixes, 1).n_tokens, found(prefixes, 1))) == repr((N, N))
        finally:
            over.set()
            holder.join()


def test_saves_that_wait_in_the_parent_end_in_the_child_with_an_error_and_are_saved_once():
    may_go_on = threading.Event()
    with open_store("memory:") as store, prefix_cache(store, max_pending=1) as prefixes:
        put, written = store.put, []

        def slow_put(key, value):
            may_go_on.wait()
            written.append(key)
            put(key, value)

        store.put = slow_put
        future = prefixes.save(told_ids(N), told_cache(N))

        def in_child():
            try:
                future.result(timeout=20)
            except StoreUnavailable as error:
                store.put = put
                return str(error), save(prefixes, 1).n_tokens

        told = in_forked_child(in_child)
        assert "was forked meanwhile; the parent process does this" in told
        assert told.endswith(f", {N})"), "there is room for saves of its own"
        may_go_on.set()
        assert future.result(timeout=20).n_tokens == N
        assert len(written) == len(set(written))


def test_a_closed_prefix_cache_is_closed_in_the_child_too():
    with open_store("memory:") as store:
        prefixes = prefix_cache(store)
        prefixes.close()
        assert "this PrefixCache is closed" in in_forked_child(lambda: prefixes.load_neutral(told_ids(N)))


@pytest.mark.parametrize("profile", ["paper", "conditional"])
def test_workers_forked_from_a_server_that_has_computed_on_two_threads_go_on(profile):
    """As under gunicorn with its application loaded beforehand: PyTorch's threads are not in the children, which once hung."""
    program = f"""
import os, torch, kvtc
from tests.builders import told_cache, told_codec, told_ids
codec = told_codec({profile!r}, ratio=4)
torch.set_num_threads(2)
prefixes = kvtc.PrefixCache(codec, kvtc.open_store("memory:"))
torch.rand(2000, 2000) @ torch.rand(2000, 2000), torch.rand(1 << 22).exp()
prefixes.save(told_ids(900), told_cache(900)).result()
prefixes.load_neutral(told_ids(900))
expected = codec.encode(told_cache(900), told_ids(900))
for worker in range(2):
    child = os.fork()
    if child == 0:
        same = codec.encode(told_cache(900), told_ids(900)) == expected
        print(prefixes.load_neutral(told_ids(900), whole=True)[1], same, torch.get_num_threads(), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
print(torch.get_num_threads())
"""
    assert run(program).split("\n") == ["900 True 1"] * 2 + ["2"]


def test_a_child_of_a_program_that_only_computed_with_torch_makes_codecs_and_calibrations():
    """As where an application is loaded beforehand, and its workers make what they need of kvtc."""
    program = """
import os, torch, kvtc
torch.set_num_threads(2)
torch.rand(2000, 2000) @ torch.rand(2000, 2000), torch.rand(1 << 22).exp()
child = os.fork()
if child == 0:
    from tests.builders import told_cache, told_codec, told_ids
    stream = told_codec("conditional", ratio=4).encode(told_cache(900), told_ids(900))
    print(kvtc.inspect(stream).n_tokens, torch.get_num_threads(), flush=True)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), torch.get_num_threads())
"""
    assert run(program).split("\n") == ["900 1", "0 2"]


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_processes_of_every_kind_share_a_store(method, tmp_path):
    context = multiprocessing.get_context(method)
    url = f"file://{tmp_path}"
    with open_store(url) as store, prefix_cache(store) as prefixes:
        save(prefixes)
        with context.Pool(1) as pool:
            assert pool.apply_async(_load_in, (url, prefixes.codec)).get(timeout=120) == N


def _load_in(url: str, made: Codec) -> int:
    with open_store(url) as store, PrefixCache(made, store, min_tokens=1) as prefixes:
        return found(prefixes)


# Pickles.


@pytest.mark.parametrize("profile", ["paper", "joint", "conditional"])
@pytest.mark.parametrize("is_used", [False, True])
def test_a_codec_can_be_pickled(profile, is_used):
    made, cache, ids = codec(profile), told_cache(N), told_ids(N)
    if is_used:
        made.encode(cache, ids)
    copy = pickle.loads(pickle.dumps(made))  # noqa: S301  of our own
    assert copy.encode(cache, ids) == made.encode(cache, ids)
    assert copy.settings_digest == made.settings_digest
    with copy._lock, made._lock:  # not one and the same
        pass


def test_a_prefix_cache_cannot_be_pickled_and_says_why():
    with (
        open_store("memory:") as store,
        prefix_cache(store) as prefixes,
        pytest.raises(InvalidArgument, match="its codec can: open the store"),
    ):
        pickle.dumps(prefixes)


# Ends.


def test_what_is_asked_of_a_closed_prefix_cache_says_that_it_is_closed():
    with open_store("memory:") as store:
        prefixes = prefix_cache(store)
        save(prefixes)
        prefixes.close()
        prefixes.close()
        calls = (
            lambda: save(prefixes),
            lambda: prefixes.load(told_ids(N)),
            lambda: prefixes.load_neutral(told_ids(N)),
            lambda: prefixes.contains(told_ids(N)),
            lambda: prefixes.delete(told_ids(N)),
        )
        for call in calls:
            with pytest.raises(StoreUnavailable, match="this PrefixCache is closed"):
                call()
        assert prefixes.statistics["saves"] == 1


def test_closing_waits_for_saves_and_refuses_those_that_wait_for_room():
    may_go_on, told = threading.Event(), []
    with open_store("memory:") as store:
        prefixes = prefix_cache(store, max_pending=1)
        put = store.put
        store.put = lambda *entry: (may_go_on.wait(20), put(*entry))
        first = prefixes.save(told_ids(N), told_cache(N))

        def save_one_more():
            try:
                prefixes.save(told_ids(N, 1), told_cache(N, seed=1))
            except StoreUnavailable as error:
                told.append(str(error))

        waiting = threading.Thread(target=save_one_more)
        waiting.start()
        closers = [threading.Thread(target=prefixes.close) for _ in range(2)]
        for closer in closers:
            closer.start()
        while not prefixes._saver._is_closed:
            pass
        may_go_on.set()
        for thread in (waiting, *closers):
            thread.join(20)
            assert not thread.is_alive()
        assert first.result().n_tokens == N
        assert told == ["this PrefixCache is closed"]


def test_a_block_that_raises_ends_with_its_own_error_and_with_what_was_saved():
    with open_store("memory:") as store:
        with pytest.raises(ZeroDivisionError), prefix_cache(store) as prefixes:
            _ = prefixes.save(told_ids(N), told_cache(N)), 1 // 0
        with prefix_cache(store) as prefixes:
            assert found(prefixes) == N


def test_what_was_begun_is_saved_at_the_end_of_the_interpreter(tmp_path):
    program = f"""
import kvtc, torch
from tests.process.test_processes import prefix_cache, told_cache, told_ids
torch.set_num_threads(1)  # as here, so that the calibration is the same
prefixes = prefix_cache(kvtc.open_store("file://{tmp_path}"))
for seed in range(3):
    prefixes.save(told_ids({N}, seed), told_cache({N}, seed=seed))
"""
    assert run(program) == ""
    with open_store(f"file://{tmp_path}") as store, prefix_cache(store) as prefixes:
        assert [found(prefixes, seed) for seed in range(3)] == [N] * 3


def test_a_save_after_the_end_of_the_interpreter_has_begun_is_an_error_of_kvtc():
    program = """
import atexit, kvtc
from kvtc.errors import StoreUnavailable
from tests.process.test_processes import prefix_cache, told_cache, told_ids
prefixes = prefix_cache(kvtc.open_store("memory:"))
@atexit.register
def too_late():
    try:
        prefixes.save(told_ids(200), told_cache(200))
    except StoreUnavailable as error:
        print(error)
"""
    assert "this PrefixCache can begin no more tasks" in run(program)


# The parts that this is made of.


def test_a_task_that_fails_ends_no_worker():
    workers = Workers(1, "the test", "test", max_pending=1)
    for error in (MemoryError, KeyboardInterrupt, StoreError):
        with pytest.raises(error):
            workers.submit(_raise, error).result(10)
    assert workers.map(pow, [2, 3], [3, 2]) == [8, 9]
    workers.close()
    with pytest.raises(StoreUnavailable, match="the test is closed"):
        workers.submit(pow, 1, 1)


def _raise(error: type[BaseException]) -> None:
    raise error


def test_a_forked_child_counts_for_itself():
    counts = Counts()
    counts.add(loads=3)
    assert in_forked_child(lambda: (counts.add(loads=1), dict(counts.read()))[1]) == "{'loads': 1}"
    assert counts.read() == {"loads": 3}
