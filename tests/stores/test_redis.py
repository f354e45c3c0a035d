"""Entries in a Redis server."""

import random
import shutil
import subprocess
import time

import pytest

from kvtc.errors import InvalidArgument, StoreFull, StoreUnavailable
from kvtc.store import open_store, redis_store

from .contract import SharedPlaceContract
from .servers import free_port, redis_server


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def url(server, request):
    """Every test has keys of its own."""
    return f"redis://127.0.0.1:{server.port}/0?prefix=t{abs(hash(request.node.nodeid))}:&timeout=20"


class TestRedisStore(SharedPlaceContract):
    """The whole contract."""


def test_large_values_and_large_batches_come_back(url):
    with open_store(url) as store:
        large = random.Random(0).randbytes(40 << 20)
        store.put("large", large)
        assert store.get("large") == large
        batch = [(f"k{i}", large[i << 20 : (i + 1) << 20]) for i in range(40)]
        store.put_many(batch)
        assert store.get_many([key for key, _ in batch]) == [value for _, value in batch]
        assert store.contains_prefix([key for key, _ in batch]) == 40


def test_what_exceeds_a_redis_string_is_refused(url, monkeypatch):
    monkeypatch.setattr(redis_store, "MAX_FRAME_BYTES", 1000)
    with open_store(url) as store, pytest.raises(StoreFull, match="1048 bytes"):
        store.put("k", bytes(1000))


def test_entries_are_forgotten_after_their_ttl(url):
    with open_store(url, ttl=0.2) as store:
        store.put("k", b"v")
        assert store.get("k") == b"v"
        deadline = time.monotonic() + 20
        while store.contains("k") and time.monotonic() < deadline:
            time.sleep(0.05)
        assert store.get("k") is None


def test_keys_and_values_of_other_programs_do_no_harm(url, server):
    prefix = url.partition("prefix=")[2].partition("&")[0]
    client = redis_store.redis.Redis(port=server.port)
    with open_store(url) as store:
        store.put("a/b", b"v")
        for name in (b"\xff\xfe\x00", "ü".encode(), b"A", b"a/b", b"other=x"):
            client.set(prefix.encode() + name, b"x")
        client.rpush(prefix + "list", "x")
        assert list(store.keys()) == ["a/b"]
        assert store.get_many(["a/b", "list", "absent"]) == [b"v", None, None]
        store.put("list", b"w")
        assert store.get("list") == b"w"


def test_a_value_that_is_too_long_is_not_read(url, server):
    with open_store(url, entry_bytes=1000) as store, open_store(url) as other:
        other.put_many([("a", bytes(1000)), ("b", bytes(1001)), ("c", b"")])
        redis = redis_store.redis.Redis(port=server.port)
        before = redis.info("stats")["total_net_output_bytes"]
        assert store.get_many(["a", "b", "c", "absent"]) == [bytes(1000), None, b"", None]
        other.put("b", bytes(1 << 20))
        assert store.get("b") is None
        assert redis.info("stats")["total_net_output_bytes"] - before < 100_000
        assert (store.statistics().foreign, store.statistics().damaged) == (2, 0)


def test_a_full_server_says_so(tmp_path):
    with (
        redis_server(tmp_path, "--maxmemory", "4mb") as server,
        open_store(f"redis://127.0.0.1:{server.port}") as store,
    ):
        store.put("k", b"v")
        with pytest.raises(StoreFull, match="memory"):
            store.put_many((str(i), bytes(1 << 20)) for i in range(10))
        assert store.get("k") == b"v"


def test_passwords_are_passed_on_and_never_shown(tmp_path):
    with redis_server(tmp_path, "--requirepass", "open sesame") as server:
        place, secret = f"127.0.0.1:{server.port}", {"password": "open sesame"}
        with open_store(f"redis://:open%20sesame@{place}") as store:
            store.put("k", b"v")
            assert store.get("k") == b"v"
            assert "sesame" not in repr(store)
        with open_store(f"redis://{place}", **secret) as store:
            assert store.get("k") == b"v"
        with open_store(f"redis://:wrong-word@{place}") as store, pytest.raises(StoreUnavailable) as caught:
            store.get("k")
        assert "wrong-word" not in str(caught.value)


def test_tls_with_a_certificate_that_must_be_known(tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    key, certificate, port = tmp_path / "key.pem", tmp_path / "cert.pem", free_port()
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    ]
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, *names, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    tls = ["--tls-port", str(port), "--port", "0", "--tls-cert-file", str(certificate), "--tls-key-file", str(key)]
    with redis_server(tmp_path, *tls, "--tls-auth-clients", "no", port=port):
        with open_store(f"rediss://127.0.0.1:{port}?ssl_ca_certs={certificate}") as store:
            store.put("k", b"v")
            assert store.get("k") == b"v"
        with open_store(f"rediss://127.0.0.1:{port}") as store, pytest.raises(StoreUnavailable, match="certificate"):
            store.get("k")


@pytest.mark.parametrize("query", ["timeout=0", "ttl=soon", "prefix=*", "db=x"])
def test_options_that_mean_nothing_are_refused(query):
    with pytest.raises(InvalidArgument):
        open_store(f"redis://127.0.0.1:1?{query}")
