"""What can go wrong with servers. In every case: a counted miss or a clear error, never wrong bytes and never a hang."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from kvtc.errors import StoreUnavailable
from kvtc.store import open_store

from .contract import tamper, wait_until
from .servers import answer_nothing, free_port, redis_server, s3_server, socket_server
from .writer import value_of

CREDENTIALS = {"access_key_id": "name", "secret_access_key": "secret", "region": "us-east-1"}


def calls(store):
    """One call of every kind."""
    return {
        "get": lambda: store.get("k"),
        "get_many": lambda: store.get_many([str(i) for i in range(40)]),
        "put": lambda: store.put("k", b"value"),
        "put_many": lambda: store.put_many((str(i), b"v") for i in range(40)),
        "contains_prefix": lambda: store.contains_prefix([str(i) for i in range(40)]),
        "contains_many": lambda: store.contains_many([str(i) for i in range(40)]),
        "delete": lambda: store.delete("k"),
        "keys": lambda: list(store.keys()),
    }


def expect_unavailable(store):
    for n_errors, call in enumerate(calls(store).values(), 1):
        with pytest.raises(StoreUnavailable):
            call()
        assert store.statistics().errors == n_errors


# Redis.


@pytest.fixture
def server(tmp_path):
    with redis_server(tmp_path) as server:
        yield server


def test_redis_killed_and_started_again(server):
    url = f"redis://127.0.0.1:{server.port}?timeout=2"
    with open_store(url) as store:
        store.put("k", b"value")
        assert store.get("k") == b"value"
        server.kill()
        expect_unavailable(store)
        server.start()
        assert store.get("k") is None  # this server keeps nothing
        store.put("k", b"again")
        assert store.get("k") == b"again"
        assert store.statistics().hits == 2


def test_redis_that_never_answers(server):
    url = f"redis://127.0.0.1:{server.port}?timeout=0.1"
    with open_store(url) as store:
        store.put("k", b"value")
        os.kill(server.process.pid, signal.SIGSTOP)
        expect_unavailable(store)
        os.kill(server.process.pid, signal.SIGCONT)
        with open_store(url, timeout=20) as patient:
            assert patient.get("k") in (b"value", None)  # a delete may have waited in the socket


def test_redis_that_stops_and_goes_on_under_callers_side_by_side(server, tmp_path):
    """One deadline for all of them together, no wait afterwards, and used again soon after it answers again."""
    deadline = 1
    with (
        open_store([f"file://{tmp_path}/store", f"redis://127.0.0.1:{server.port}?timeout={deadline}"]) as store,
        ThreadPoolExecutor(8) as callers,
    ):
        lower = store.tiers[1]
        lower.put("k", b"value")
        os.kill(server.process.pid, signal.SIGSTOP)
        begin = time.monotonic()
        assert list(callers.map(store.get, [f"absent/{i}" for i in range(8)])) == [None] * 8
        assert deadline <= time.monotonic() - begin < 4 * deadline
        begin = time.monotonic()
        assert [store.get("k") for _ in range(8)] == [None] * 8
        assert time.monotonic() - begin < deadline
        os.kill(server.process.pid, signal.SIGCONT)
        wait_until(lambda: store.get("k") == b"value")


def test_no_redis_at_all():
    with open_store(f"redis://127.0.0.1:{free_port()}?timeout=2") as store:
        expect_unavailable(store)


def test_a_dead_redis_under_tiers_costs_nothing_but_a_count(server, tmp_path):
    tiers = ["memory:?bytes=1MB", f"file://{tmp_path}/store", f"redis://127.0.0.1:{server.port}?timeout=2"]
    with open_store(tiers) as store:
        store.put("a", b"1")
        server.kill()
        store.put("b", b"2")
        assert store.get_many(["a", "b", "c"]) == [b"1", b"2", None]
        assert store.statistics().errors == 2
        server.start()
        store.put("d", b"4")
        assert store.tiers[2].get("d") == b"4"


# Objects that somebody has changed on a server.


@contextmanager
def url_of(place, path):
    """A server that was just started."""
    if place == "redis":
        with redis_server(path) as server:
            yield f"redis://127.0.0.1:{server.port}?timeout=20", {}
    else:
        with s3_server() as server:
            yield f"s3://bucket/deep?endpoint=http://127.0.0.1:{server.port}&timeout=60", CREDENTIALS


@pytest.mark.parametrize("place", ["redis", "s3"])
def test_objects_damaged_or_exchanged_on_a_server_are_misses(tmp_path, place):
    keys = [str(i) for i in range(6)]
    with (
        url_of(place, tmp_path) as (url, options),
        open_store(url, **options) as store,
        open_store(url, **options) as other,
    ):
        store.put_many((key, value_of(key)) for key in keys)
        tamper(other, "0", lambda frame: frame[:60] + bytes([frame[60] ^ 4]) + frame[61:])
        tamper(other, "1", lambda frame: frame[:10])
        tamper(other, "2", lambda frame: frame + b"more")
        frames = {}
        for key in ("3", "4"):
            tamper(other, key, lambda frame, key=key: frames.setdefault(key, frame))
        tamper(other, "3", lambda _: frames["4"])
        tamper(other, "4", lambda _: frames["3"])
        assert store.get_many(keys) == [None] * 5 + [value_of("5")]
        assert store.statistics().damaged == 5
        assert list(store.keys()) == ["5"]


# S3, played by a few lines that misbehave in one way each.


def read_request(connection) -> bytes:
    request = b""
    while b"\r\n\r\n" not in request:
        received = connection.recv(65536)
        if not received:
            return b""
        request += received
    return request


def answer_500(connection, _):
    while read_request(connection):
        connection.sendall(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 4\r\nConnection: close\r\n\r\nhelp")
        return


def answer_half(connection, ends):
    """Headers and the first half of an object, then silence."""
    read_request(connection)
    head = (
        b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\nETag: "x"\r\nLast-Modified: Wed, 21 Oct 2015 07:28:00 GMT\r\n\r\n'
    )
    connection.sendall(head + bytes(500))
    ends.wait(60)


def answer_with_another_object(connection, _):
    while read_request(connection):
        head = b'HTTP/1.1 200 OK\r\nContent-Length: 60\r\nETag: "x"\r\nLast-Modified: Wed, 21 Oct 2015 07:28:00 GMT\r\n\r\n'
        connection.sendall(head + b"<html>welcome to this hotel, please log in first</html>     ")


def close_at_once(connection, _):
    connection.close()


@pytest.mark.parametrize("answer", [answer_500, answer_nothing, close_at_once])
def test_s3_that_fails(answer):
    with socket_server(answer) as place:
        url = f"s3://bucket/prefix?endpoint=http://{place}&timeout=0.4"
        with open_store(url, **CREDENTIALS) as store:
            expect_unavailable(store)


def test_s3_that_falls_silent_in_the_middle_of_an_object():
    with (
        socket_server(answer_half) as place,
        open_store(f"s3://bucket?endpoint=http://{place}&timeout=0.4", **CREDENTIALS) as store,
    ):
        with pytest.raises(StoreUnavailable):
            store.get("k")
        assert store.statistics().errors == 1


def test_a_proxy_that_answers_with_a_page_of_its_own_is_a_miss():
    with (
        socket_server(answer_with_another_object) as place,
        open_store(f"s3://bucket?endpoint=http://{place}&timeout=5", **CREDENTIALS) as store,
    ):
        assert store.get("k") is None
        assert store.statistics().damaged == 1


def test_no_s3_at_all():
    with open_store(f"s3://bucket?endpoint=http://127.0.0.1:{free_port()}&timeout=0.4", **CREDENTIALS) as store:
        expect_unavailable(store)
