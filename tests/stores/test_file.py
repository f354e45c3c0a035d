"""Entries in a directory."""

import os
import shutil
import stat
import tracemalloc
from pathlib import Path

import pytest

from kvtc.errors import InvalidArgument, StoreFull, StoreUnavailable
from kvtc.store import open_store

from .contract import SharedPlaceContract

BLOCK = 4096


class TestFileStore(SharedPlaceContract):
    @pytest.fixture
    def url(self, tmp_path):
        return f"file://{tmp_path}/store"


class TestFileStoreWithBudgetAndSync(TestFileStore):
    @pytest.fixture
    def url(self, tmp_path):
        return f"file://{tmp_path}/store?bytes=64MB&sync=full"


def disk_bytes(root) -> int:
    return sum(-(-path.stat().st_size // BLOCK) * BLOCK for path in root.rglob("*.entry"))


def test_the_budget_is_kept_and_those_used_longest_ago_go_first(tmp_path):
    with open_store(f"file://{tmp_path}?bytes={20 * BLOCK}") as store:
        for i in range(20):
            store.put(f"{i:02}", bytes(1000))
        store.get("00")
        assert store.statistics().evictions == 0
        store.put("20", bytes(1000))
        kept = sorted(store.keys())
        assert "00" in kept
        assert "20" in kept
        assert "01" not in kept
        assert disk_bytes(tmp_path) <= 20 * BLOCK
        assert store.statistics().evictions == 21 - len(kept)


def test_of_equal_recency_the_largest_goes_first(tmp_path):
    with open_store(f"file://{tmp_path}?bytes={12 * BLOCK}") as store:
        store.put_many([("small", bytes(10)), ("large", bytes(8 * BLOCK)), ("other", bytes(10))])
        for path in tmp_path.rglob("*.entry"):
            os.utime(path, ns=(5, 5))
        store.put("new", bytes(2 * BLOCK))
        assert sorted(store.keys()) == ["new", "other", "small"]


@pytest.mark.parametrize("use", [lambda store, keys: store.get_many(keys), lambda *_: None])
def test_a_chain_is_evicted_from_its_tail(tmp_path, use):
    with open_store(f"file://{tmp_path}?bytes={4 * BLOCK}") as store:
        chain = ["head", "middle", "tail"]
        store.put_many((key, bytes(10)) for key in chain)
        use(store, chain)
        store.put_many([("x", bytes(10)), ("y", bytes(10))])
        assert store.contains_prefix(chain) in (1, 2)


def test_several_objects_keep_one_budget(tmp_path):
    url = f"file://{tmp_path}?bytes={30 * BLOCK}"
    with open_store(url) as one, open_store(url, namespace="other") as two:
        for i in range(100):
            (one, two)[i % 2].put(str(i), bytes(BLOCK // 2))
            assert disk_bytes(tmp_path) <= 30 * BLOCK
        assert one.statistics().evictions + two.statistics().evictions > 0


def test_a_smaller_budget_is_enforced_on_opening(tmp_path):
    with open_store(f"file://{tmp_path}") as store:
        store.put_many((str(i), bytes(10)) for i in range(40))
    with open_store(f"file://{tmp_path}?bytes={10 * BLOCK}"):
        assert disk_bytes(tmp_path) <= 10 * BLOCK


def test_an_entry_larger_than_the_budget_is_refused_and_the_rest_stays(tmp_path):
    with open_store(f"file://{tmp_path}?bytes={4 * BLOCK}") as store:
        store.put("k", b"v")
        with pytest.raises(StoreFull, match="budget"):
            store.put("large", bytes(5 * BLOCK))
        assert store.get("k") == b"v"
        assert list((tmp_path / "partial").iterdir()) == []


def test_the_ledger_may_be_lost_or_damaged(tmp_path):
    url = f"file://{tmp_path}?bytes={10 * BLOCK}"
    with open_store(url) as store:
        for damage in (
            lambda path: path.unlink(),
            lambda path: path.write_bytes(b"x" * 9),
            lambda path: path.write_bytes(b"\xff" * 99),
        ):
            store.put_many((str(i), bytes(10)) for i in range(9))
            damage(tmp_path / "ledger")
            store.put_many((f"n{i}", bytes(10)) for i in range(9))
            assert disk_bytes(tmp_path) <= 10 * BLOCK
            assert store.get("n0") == bytes(10)


def test_leftovers_of_dead_writers_are_removed(tmp_path):
    with open_store(f"file://{tmp_path}") as store:
        store.put("k", b"v")
    (tmp_path / "partial" / "dead.part").write_bytes(bytes(100))
    with open_store(f"file://{tmp_path}") as store:
        assert list((tmp_path / "partial").iterdir()) == []
        assert store.get("k") == b"v"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/null")])
@pytest.mark.parametrize("query", ["", "&bytes=1MB"])
def test_what_is_no_partial_file_is_left_alone_and_not_waited_for(tmp_path, make, query):
    url = f"file://{tmp_path}?timeout=10{query}"
    with open_store(url) as store:
        store.put("k", b"v")
    make(tmp_path / "partial" / "odd.part")
    with open_store(url) as store:
        store.put("l", b"w")
        assert store.get_many(["k", "l"]) == [b"v", b"w"]
        assert store.statistics().errors == 0
    assert [path.name for path in (tmp_path / "partial").iterdir()] == ["odd.part"]


def test_a_link_at_an_entry_is_one_miss_and_is_replaced_by_the_next_value(tmp_path):
    with open_store(f"file://{tmp_path}/store") as store:
        store.put_many([("k", b"v"), ("l", b"w")])
        (path,) = tmp_path.rglob("k.entry")
        other = path.rename(tmp_path / "other")
        path.symlink_to(other)
        before = other.read_bytes()
        assert store.get_many(["k", "l"]) == [None, b"w"]
        assert (store.statistics().foreign, store.statistics().damaged) == (1, 0)
        assert path.is_symlink()
        store.put("k", b"new")
        assert store.get("k") == b"new"
    assert other.read_bytes() == before


@pytest.mark.parametrize("place", ["shard", "entries"])
def test_no_link_below_the_root_is_written_through(tmp_path, place):
    with open_store(f"file://{tmp_path}/store") as store:
        store.put("k", b"v")
        (path,) = tmp_path.rglob("k.entry")
        directory = path.parent if place == "shard" else path.parent.parent
        directory.symlink_to(directory.rename(tmp_path / "other"))
        before = {path: path.read_bytes() for path in tmp_path.rglob("other/**/*.entry")}
        for change in (lambda: store.put("k", b"new"), lambda: store.delete("k")):
            with pytest.raises(StoreUnavailable, match="ELOOP"):
                change()
    assert len(before) == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("other/**/*.entry")} == before


def test_eviction_passes_over_what_is_no_entry(tmp_path):
    with open_store(f"file://{tmp_path}?bytes=64KB") as store:
        store.put("k", b"v")
        (path,) = tmp_path.rglob("k.entry")
        (path.parent / "directory.entry").mkdir()
        for number in range(40):
            store.put(f"n{number}", bytes(4000))
        assert store.get("n39") == bytes(4000)
        assert store.statistics().evictions > 0


def test_a_directory_emptied_under_the_store_is_made_again(tmp_path):
    with open_store(f"file://{tmp_path}/store?bytes=1MB") as store:
        store.put("k", b"v")
        shutil.rmtree(tmp_path / "store")
        assert store.get("k") is None
        assert list(store.keys()) == []
        assert store.contains_prefix(["k"]) == 0
        store.put("k", b"again")
        assert store.get("k") == b"again"


@pytest.mark.parametrize(
    ("umask", "query", "files", "directories"),
    [
        (0o022, "", 0o600, 0o700),
        (0o000, "", 0o600, 0o700),
        (0o022, "?mode=0640", 0o640, 0o750),
        (0o077, "?mode=0644", 0o600, 0o700),
        (0o000, "?mode=0660", 0o660, 0o770),
    ],
)
def test_only_the_owner_may_look_inside_unless_told_otherwise(tmp_path, umask, query, files, directories):
    before = os.umask(umask)
    try:
        with open_store(f"file://{tmp_path}/new/deep/store{query}") as store:
            store.put("k", b"v")
            assert store.get("k") == b"v"
            shutil.rmtree(tmp_path / "new" / "deep" / "store" / "entries")
            store.put("k", b"v")
    finally:
        os.umask(before)
    made = list(tmp_path.rglob("*"))
    assert {stat.S_IMODE(path.stat().st_mode) for path in made if path.is_file()} == {files}
    assert {stat.S_IMODE(path.stat().st_mode) for path in made if path.is_dir()} == {directories}


@pytest.mark.parametrize("mode", ["0400", "0700", "0200", "4600", "rw", "999"])
def test_modes_that_mean_nothing_are_refused(tmp_path, mode):
    with pytest.raises(InvalidArgument, match="mode"):
        open_store(f"file://{tmp_path}/store?mode={mode}")
    assert not (tmp_path / "store").exists()


def test_a_sparse_entry_is_not_read(tmp_path):
    """Two gigabytes that take a block on disk, with a head that fits them."""
    with open_store(f"file://{tmp_path}") as store:
        store.put("k", b"")
        (path,) = tmp_path.rglob("*.entry")
        head = bytearray(path.read_bytes())
        head[8:16] = (2 << 30).to_bytes(8, "little")
        path.write_bytes(head)
        os.truncate(path, (2 << 30) + 48)
        tracemalloc.start()
        try:
            assert store.get("k") is None
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()
        assert (store.statistics().foreign, store.statistics().damaged) == (1, 0)
        assert path.exists()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_a_miss_and_not_waited_for(tmp_path, make):
    with open_store(f"file://{tmp_path}?timeout=10") as store:
        store.put("k", b"v")
        (path,) = tmp_path.rglob("*.entry")
        path.unlink()
        make(path)
        assert store.get("k") is None
        assert store.statistics().damaged == 1


def test_files_of_others_are_not_listed(tmp_path):
    with open_store(f"file://{tmp_path}") as store:
        store.put("k", b"v")
        (path,) = tmp_path.rglob("*.entry")
        for name in (b"\xff\xfe.entry", "ü.entry".encode(), b"A.entry", b"no entry"):
            (Path(os.fsdecode(os.fsencode(path.parent) + b"/" + name))).write_bytes(b"x")
        assert list(store.keys()) == ["k"]


def test_a_link_planted_as_the_ledger_is_not_followed(tmp_path):
    with open_store(f"file://{tmp_path}/store") as store:
        (tmp_path / "store" / "ledger").unlink(missing_ok=True)
        (tmp_path / "precious").write_bytes(b"precious")
        (tmp_path / "store" / "ledger").symlink_to(tmp_path / "precious")
        with pytest.raises(StoreUnavailable, match="ELOOP"):
            store.put("k", b"v")
        assert store.get("k") is None
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_a_place_that_is_no_directory_is_unavailable(tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(StoreUnavailable, match="file"):
        open_store(f"file://{tmp_path}/file/store")


@pytest.mark.parametrize(
    "url", ["file:relative", "file://host/path", "file:///tmp/x?sync=always", "file:///tmp/x?bytes=-1", "file:"]
)
def test_urls_that_mean_nothing_are_refused(url):
    with pytest.raises(InvalidArgument):
        open_store(url)
