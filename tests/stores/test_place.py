"""What operators see of a store: the same on a directory, on Redis and on S3."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtc.maintenance.diagnosis import diagnose
from kvtc.maintenance.eviction import evict
from kvtc.maintenance.verification import verify
from kvtc.store import open_place, open_store
from kvtc.store.frame import FRAME_BYTES
from kvtc.store.place import DAMAGED, FOREIGN, GONE, SOUND

from .contract import tamper
from .servers import redis_server, s3_server

CREDENTIALS = "access_key_id=name&secret_access_key=secret&region=us-east-1"


@pytest.fixture(params=["file", "redis", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Of an empty store, with a query."""
    if request.param == "file":
        (tmp_path / "store").mkdir()
        yield f"file://{tmp_path}/store?timeout=30"
    elif request.param == "redis":
        with redis_server(tmp_path) as server:
            yield f"redis://127.0.0.1:{server.port}?timeout=30"
    else:
        with s3_server() as server:
            yield f"s3://bucket/deep?endpoint=http://127.0.0.1:{server.port}&timeout=60&{CREDENTIALS}"


def test_entries_of_all_namespaces_or_of_one(url):
    with open_store(url) as store, open_store(url, namespace="team") as other:
        store.put_many([("a/b", b"value"), ("c", b"")])
        other.put("a/b", bytes(100))
    with open_place(url) as place:
        found = place.entries()
        assert [(one.namespace, one.key, one.n_bytes - FRAME_BYTES) for one in found] == [
            (None, "a/b", 5),
            (None, "c", 0),
            ("team", "a/b", 100),
        ]
        assert all(abs(one.used_at - time.time()) < 600 for one in found)
        assert place.heads(found, 3) == [(SOUND, b"val"), (SOUND, b""), (SOUND, bytes(3))]
        assert [place.read(one).value for one in found] == [b"value", b"", bytes(100)]
        assert [one.key for one in place.entries("c")] == ["c"]
    with open_place(url, namespace="team") as place:
        assert [(one.namespace, one.key) for one in place.entries()] == [("team", "a/b")]


def test_what_is_wrong_with_entries(url):
    with open_store(url) as store:
        store.put_many([("damaged", bytes(50)), ("newer", bytes(50)), ("sound", bytes(50)), ("gone", b"")])
        tamper(store, "damaged", lambda frame: frame[:-1] + b"x")
        tamper(store, "newer", lambda frame: frame[:4] + b"\x02" + frame[5:])
        with open_place(url) as place:
            entries = {entry.key: entry for entry in place.entries()}
            store.delete("gone")
            assert {key: place.read(entry).state for key, entry in entries.items()} == {
                "damaged": DAMAGED,
                "newer": FOREIGN,
                "sound": SOUND,
                "gone": GONE,
            }
            assert place.heads([entries["gone"], entries["newer"]], 4) == [(DAMAGED, b""), (FOREIGN, b"")]
            reading = place.read(entries["damaged"])
            store.put("damaged", b"repaired")
            place.discard(entries["damaged"], reading)  # no longer what was read
            assert store.get("damaged") == b"repaired"
            tamper(store, "damaged", lambda frame: frame[:-1] + b"x")
            found = verify(place, removes=True)
            assert (found.n_entries, found.count(DAMAGED), found.count(FOREIGN)) == (3, 1, 1)
            assert sorted(entry.key for entry in place.entries()) == ["newer", "sound"]


def test_evict_and_diagnose(url):
    with open_store(url) as store:
        for number in range(4):
            store.put(f"{number}", bytes(1000 * (number + 1)))
    with open_place(url) as place:
        found = diagnose(place)
        assert "answers" in {one.what for one in found}
        wrong = [one.what for one in found if not one.is_right]
        assert wrong in ([], ["memory of the server"])  # of a server of Redis without a limit
        assert evict(place, max_bytes=1 << 30, older_than=3600).removed == []
        done = evict(place, max_bytes=0)
        assert sorted(entry.key for entry in done.removed) == ["0", "1", "2", "3"]
        assert (done.n_bytes, done.n_entries, place.entries()) == (0, 0, [])
