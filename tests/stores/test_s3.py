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
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("PUT", "/bucket")
        connection.getresponse().close()
        connection.close()
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


@pytest.mark.parametrize("url", ["s3:", "s3:///path", "s3://bucket?timeout=-1", "s3://bucket?ca_file=/nowhere"])
def test_urls_that_mean_nothing_are_refused(url):
    with pytest.raises(InvalidArgument):
        open_store(url, **CREDENTIALS)
