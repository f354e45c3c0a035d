"""What can go wrong on a disk. In every case: a counted miss or a clear error, never wrong bytes.

KVTC_KILLS says how many writers are killed; `make test-faults` kills 200.
"""

import contextlib
import errno
import fcntl
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvtc.errors import StoreFull, StoreUnavailable
from kvtc.store import open_store
from kvtc.store.files import ledger as ledger_module

from .writer import value_of

ROOT = Path(__file__).parents[2]
N_KILLS = int(os.environ.get("KVTC_KILLS", "10"))
BLOCK = 4096
YEAR_NS = 365 * 86400 * 10**9


def start_writer(url: str, first: int, count: int = 10**9) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    command = [sys.executable, "-m", "tests.stores.writer", url, str(first), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)


def reported(writer: subprocess.Popen) -> list[str]:
    """Keys of whole lines; the last may have been cut."""
    text = writer.stdout.read()
    writer.stdout.close()
    return text[: text.rfind("\n") + 1].split()


def disk_bytes(root: Path) -> int:
    total = 0
    for path in root.rglob("*.entry"):
        with contextlib.suppress(FileNotFoundError):  # evicted while we look
            total += -(-path.stat().st_size // BLOCK) * BLOCK
    return total


def check_all(store, keys=()) -> None:
    """Every entry there is, and every one of these, has the value that its key says."""
    for key in {*store.keys(), *keys}:
        assert store.get(key) == value_of(key, store.namespace), key
    assert store.statistics().damaged == 0


# Killed processes.


@pytest.mark.parametrize("options", ["", "?sync=full"])
def test_writers_killed_at_any_moment_lose_nothing_that_was_committed(tmp_path, options):
    generator = random.Random(options)
    committed: list[str] = []
    for kill in range(-(-N_KILLS // 2)):
        writer = start_writer(f"file://{tmp_path}{options}", first=1000 * kill)
        assert writer.stdout.readline().strip() == f"chain/{1000 * kill}"
        time.sleep(generator.uniform(0, 0.05))
        writer.kill()
        committed += [f"chain/{1000 * kill}", *reported(writer)]
        writer.wait()
        with open_store(f"file://{tmp_path}{options}") as store:
            assert list((tmp_path / "partial").iterdir()) == []
            check_all(store, committed[-50:])
    with open_store(f"file://{tmp_path}{options}") as store:
        check_all(store, committed)


def test_killed_while_evicting_leaves_a_store_within_its_budget(tmp_path):
    url, generator = f"file://{tmp_path}?bytes=1MB", random.Random(3)
    for kill in range(-(-N_KILLS // 2)):
        writers = [start_writer(url, first=0), start_writer(url, first=500 * kill)]
        for writer in writers:
            writer.stdout.readline()
        time.sleep(generator.uniform(0, 0.1))
        for writer in writers:
            writer.kill()
            reported(writer)
            writer.wait()
        with open_store(url) as store:
            check_all(store)
            assert disk_bytes(tmp_path) <= 1_000_000
            store.put("chain/0", value_of("chain/0"))


# Several processes at once.


def test_processes_with_one_budget_and_namespaces_of_their_own(tmp_path):
    urls = [f"file://{tmp_path}?bytes=2MB&namespace={name}" for name in ("one", "two")]
    writers = [start_writer(url, first=0, count=60) for url in urls for _ in range(2)]
    stores = [open_store(url) for url in urls]
    try:
        while any(writer.poll() is None for writer in writers):
            for store in stores:
                for key in [f"chain/{number}" for number in range(0, 60, 7)]:
                    assert store.get(key) in (None, value_of(key, store.namespace))
    finally:
        n_reported = [len(reported(writer)) for writer in writers]
        for writer in writers:
            writer.wait()
    assert n_reported == [60] * 4
    # Only now: a walk among writers counts entries that were never there together.
    assert disk_bytes(tmp_path) <= 2_000_000
    for store in stores:
        check_all(store)
        assert list(store.keys())
        store.close()


def test_a_lock_that_nobody_lets_go_of_is_an_error_not_a_hang(tmp_path):
    with open_store(f"file://{tmp_path}?timeout=0.5") as store, (tmp_path / "ledger").open() as holder:
        store.put("k", b"v")
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(StoreUnavailable, match="locked"):
            store.put("k", b"w")
        assert store.get("k") == b"v"


# Disks that are full or cannot be written.


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 512 kB."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system takes rights that this user has not")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_full_disk_is_an_error_and_breaks_nothing(small_disk):
    with open_store(f"file://{small_disk}/store") as store:
        store.put("kept", b"v")
        with pytest.raises(StoreFull, match="ENOSPC"):
            store.put_many((str(i), bytes(100_000)) for i in range(10))
        assert list((small_disk / "store" / "partial").iterdir()) == []
        n_kept = len(list(store.keys())) - 1
        assert store.contains_prefix([str(i) for i in range(10)]) == n_kept > 0
        assert store.get_many(["kept", "0"]) == [b"v", bytes(100_000)]
        store.delete("0")
        store.put("new", bytes(90_000))
        assert store.get("new") == bytes(90_000)


def test_a_budget_larger_than_the_disk_evicts_when_the_disk_is_full(small_disk):
    with open_store(f"file://{small_disk}/store?bytes=1GB") as store:
        for i in range(30):
            store.put(str(i), bytes(100_000))
        assert store.get("29") == bytes(100_000)
        assert store.statistics().evictions > 20


def test_a_file_system_that_became_read_only_serves_what_it_has(small_disk):
    with open_store(f"file://{small_disk}/store") as store:
        store.put("k", b"v")
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        with pytest.raises(StoreUnavailable, match="EROFS"):
            store.put("l", b"w")
        assert store.get("k") == b"v"
    with open_store(f"file://{small_disk}/store?bytes=1MB") as reader:
        assert reader.get("k") == b"v"
        assert list(reader.keys()) == ["k"]


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EDQUOT, StoreFull), (errno.EFBIG, StoreFull), (errno.EIO, StoreUnavailable)]
)
def test_a_write_that_fails_leaves_the_old_value(tmp_path, monkeypatch, number, kind):
    with open_store(f"file://{tmp_path}") as store:
        store.put("k", b"old")

        def fail(*_):
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", fail)
            with pytest.raises(kind, match=errno.errorcode[number]):
                store.put("k", b"new")
        assert store.get("k") == b"old"
        assert list((tmp_path / "partial").iterdir()) == []


def test_writes_that_come_in_pieces_are_whole(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data)[:1000]))
    with open_store(f"file://{tmp_path}") as store:
        store.put("k", bytes(range(256)) * 100)
        assert store.get("k") == bytes(range(256)) * 100


def test_a_writer_at_work_is_not_taken_for_a_dead_one(tmp_path, monkeypatch):
    write = os.write

    def write_while_another_opens(descriptor, data):
        with open_store(f"file://{tmp_path}"), open_store(f"file://{tmp_path}?bytes=1MB"):
            assert len(list((tmp_path / "partial").iterdir())) == 1
        return write(descriptor, data)

    with open_store(f"file://{tmp_path}") as store, monkeypatch.context() as patch:
        patch.setattr(os, "write", write_while_another_opens)
        store.put("k", bytes(1000))
        assert store.get("k") == bytes(1000)


# Files that somebody has changed.


def test_files_damaged_or_exchanged_on_disk_are_misses(tmp_path):
    with open_store(f"file://{tmp_path}") as store:
        keys = [str(i) for i in range(6)]
        store.put_many((key, value_of(key)) for key in keys)
        paths = {path.stem: path for path in tmp_path.rglob("*.entry")}
        content = bytearray(paths["0"].read_bytes())
        content[len(content) // 2] ^= 4
        paths["0"].write_bytes(content)
        os.truncate(paths["1"], 10)
        os.truncate(paths["2"], 1 << 40)  # as long as a terabyte, and sparse
        one, other = paths["3"].read_bytes(), paths["4"].read_bytes()
        paths["3"].write_bytes(other)
        paths["4"].write_bytes(one)
        assert store.get_many(keys) == [None] * 5 + [value_of("5")]
        assert store.statistics().damaged == 5
        assert list(store.keys()) == ["5"]


# Clocks.


@pytest.mark.parametrize("stamp", [0, 1, -YEAR_NS, 100 * YEAR_NS, 300 * YEAR_NS])
def test_stamps_of_other_times_do_no_harm(tmp_path, stamp):
    with open_store(f"file://{tmp_path}?bytes={20 * BLOCK}") as store:
        store.put_many((f"old/{i}", bytes(10)) for i in range(10))
        for path in tmp_path.rglob("*.entry"):
            os.utime(path, ns=(stamp, stamp))
        store.get("old/3")
        for i in range(15):
            store.put(f"new/{i}", bytes(10))
        kept = set(store.keys())
        assert {f"new/{i}" for i in range(15)} | {"old/3"} <= kept
        assert disk_bytes(tmp_path) <= 20 * BLOCK


@pytest.mark.parametrize("jump", [-10 * YEAR_NS, 10 * YEAR_NS, -YEAR_NS // 10**6])
def test_recency_survives_jumps_of_the_clock(tmp_path, monkeypatch, jump):
    now = time.time_ns()
    with open_store(f"file://{tmp_path}?bytes={10 * BLOCK}") as store:
        for i in range(5):
            store.put(f"before/{i}", bytes(10))
        monkeypatch.setattr(ledger_module.time, "time_ns", lambda: now + jump)
        store.get("before/0")
        for i in range(5):
            store.put(f"during/{i}", bytes(10))
        monkeypatch.undo()
    with open_store(f"file://{tmp_path}?bytes={10 * BLOCK}") as store:
        store.put("after/0", bytes(10))
        store.put("after/1", bytes(10))
        kept = set(store.keys())
        assert {"before/0", "after/0", "after/1", *(f"during/{i}" for i in range(5))} <= kept
        assert "before/1" not in kept
