"""Entries in S3."""

import http.client
import random

import pytest

from kvtc.errors import InvalidArgument, StoreUnavailable
from kvtc.store import open_store

from .contract import SharedPlaceContract
from .servers import s3_server

CREDENTIALS = {"access_key_id": "name", "secret_access_key": "secret", "region": "us-east-1"}


@pytest.fixture(scope="module")
def endpoint():
    with s3_server() as server:
        endpoint = f"http://127.0.0.1:{server.port}"
        yield endpoint


@pytest.fixture
def url(endpoint, request):
    return f"s3://bucket/t{abs(hash(request.node.nodeid))}/deep?endpoint={endpoint}&timeout=60"


class TestObjectStore(SharedPlaceContract):
    @pytest.fixture
    def options(self):
        return CREDENTIALS


def test_large_values_come_back(url):
    with open_store(url, **CREDENTIALS) as store:
        large = random.Random(0).randbytes(40 << 20)
        store.put("large", large)
        assert store.get("large") == large


def test_a_bucket_that_is_not_there_is_unavailable_not_empty(endpoint):
    with open_store(f"s3://nowhere?endpoint={endpoint}", **CREDENTIALS) as store:
        for call in (lambda: store.put("k", b"v"), lambda: store.get("k")):
            with pytest.raises(StoreUnavailable, match="NoSuchBucket"):
                call()
        assert store.statistics().errors == 2


def test_secrets_are_never_shown(endpoint):
    options = CREDENTIALS | {"secret_access_key": "sesame"}
    with open_store(f"s3://nowhere?endpoint={endpoint}", **options) as store, pytest.raises(StoreUnavailable) as caught:
        store.put("k", b"v")
    assert "sesame" not in str(caught.value) + repr(store)


def request(endpoint, method, path):
    connection = http.client.HTTPConnection(endpoint.removeprefix("http://"))
    connection.request(method, path, body=b"x")
    connection.getresponse().close()
    connection.close()


def test_objects_of_other_programs_are_not_listed(endpoint):
    with open_store(f"s3://bucket/mine?endpoint={endpoint}&timeout=60", **CREDENTIALS) as store:
        store.put("a/b", b"v")
        for name in ("%C3%BC.entry", "A.entry", "deep/k.entry", "none", "x=k.entry"):
            request(endpoint, "PUT", f"/bucket/mine/{name}")
        assert list(store.keys()) == ["a/b"]


def test_a_name_that_cannot_be_listed_is_named(endpoint):
    with open_store(f"s3://bucket/others?endpoint={endpoint}&timeout=60", **CREDENTIALS) as store:
        store.put("k", b"v")
        request(endpoint, "PUT", "/bucket/others/a//b")
        with pytest.raises(StoreUnavailable, match="others/a//b"):
            list(store.keys())
        assert store.get("k") == b"v"


@pytest.mark.parametrize("url", ["s3:", "s3:///path", "s3://bucket?timeout=-1", "s3://bucket?ca_file=/nowhere"])
def test_urls_that_mean_nothing_are_refused(url):
    with pytest.raises(InvalidArgument):
        open_store(url, **CREDENTIALS)
