"""Entries on a device; here that of the host."""

from __future__ import annotations

import pytest
import torch

import kvtc.device_store
from kvtc.device_store import DeviceStore
from kvtc.errors import InvalidArgument, StoreFull, StoreUnavailable
from kvtc.store import encrypted, open_store
from kvtc.store.memory import ENTRY_BYTES

from ..builders import random_cache, reseal, sections_of, tiny_codec
from ..forking import in_forked_child
from .contract import StoreContract, tamper


class TestDeviceStore(StoreContract):
    @pytest.fixture
    def url(self):
        return "device:cpu?bytes=64MB"


class TestOverFiles(StoreContract):
    @pytest.fixture
    def url(self, tmp_path):
        return f"tiered:device:cpu?bytes=64MB|file://{tmp_path}/store"

    def place(self, store):
        upper, lower = store.tiers
        for key in list(upper.keys()):
            upper.delete(key)
        return lower


def a_stream(n: int = 200) -> bytes:
    return tiny_codec().encode(random_cache(n))


@pytest.fixture
def store():
    with open_store("device:cpu?bytes=10MB") as opened:
        yield opened


def test_streams_are_given_as_they_lie(store):
    store.put_many([("stream", a_stream()), ("other", b"no stream")])
    found, other, absent = store.resident_many(["stream", "other", "absent"])
    assert isinstance(found, torch.Tensor)
    assert found.dtype == torch.uint8
    assert found.numpy().tobytes() == a_stream() == store.get("stream")
    assert (other, absent) == (b"no stream", None)
    assert store.resident_many(["stream"])[0].data_ptr() == found.data_ptr()
    counted = store.statistics()
    assert (counted.hits, counted.misses, counted.bytes_read) == (4, 1, 3 * len(a_stream()) + 9)


def test_a_stream_with_a_wrong_checksum_is_given_as_bytes(store):
    _, start, _ = sections_of(a_stream())[-1]
    damaged = bytearray(a_stream())
    damaged[start] ^= 1
    store.put_many([("damaged", damaged), ("short", a_stream()[:-1]), ("resealed", reseal(damaged))])
    damaged_found, short, resealed = store.resident_many(["damaged", "short", "resealed"])
    assert (damaged_found, short) == (bytes(damaged), a_stream()[:-1])
    assert isinstance(resealed, torch.Tensor)


@pytest.mark.parametrize("at", [0, 8, 20])
def test_a_damaged_head_is_a_miss_and_goes(store, at):
    store.put("k", a_stream())
    tamper(store, "k", lambda frame: frame[:at] + bytes([frame[at] ^ 1]) + frame[at + 1 :])
    assert store.resident_many(["k"]) == [None]
    assert store.statistics().damaged == 1
    assert not store.contains("k")


def test_entries_that_changed_places_are_misses(store):
    store.put("a", a_stream())
    store.put("b", a_stream(150))
    frame_of_a = store._read([store._names.name("a")])[0]
    tamper(store, "b", lambda _: frame_of_a)
    assert store.resident_many(["b"]) == [None]


def test_an_entry_of_a_newer_format_is_left_alone(store):
    store.put("k", a_stream())
    tamper(store, "k", lambda frame: frame[:4] + b"\2" + frame[5:])
    assert store.resident_many(["k"]) == [None]
    assert store.statistics().foreign == 1
    assert store.contains("k")


def test_those_used_longest_ago_go_first_and_tensors_given_out_stay():
    size = len(a_stream()) + 48 + ENTRY_BYTES
    with open_store(f"device:cpu?bytes={3 * size}") as store:
        for key in "abc":
            store.put(key, a_stream())
        (held,) = store.resident_many(["a"])
        store.put("d", a_stream())
        assert sorted(store.keys()) == ["a", "c", "d"]
        assert store.statistics().stored_bytes == 3 * size
        store.put_many([(key, a_stream()) for key in "efg"])
        assert held.numpy().tobytes() == a_stream()
        with pytest.raises(StoreFull, match="budget"):
            store.put("large", bytes(3 * size))
        assert sorted(store.keys()) == ["e", "f", "g"]


def test_a_device_without_memory_is_a_full_store(store, monkeypatch):
    store.put("k", b"here")

    def refuse(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(kvtc.device_store.torch, "frombuffer", refuse)
    before = store.statistics().stored_bytes
    with pytest.raises(StoreFull, match="no memory"):
        store.put("other", b"not here")
    assert store.get("k") == b"here"
    assert store.statistics().stored_bytes == before


def test_over_another_tier_only_what_lies_on_the_device_is_a_tensor():
    upper, lower = open_store("device:cpu"), open_store("memory:")
    with open_store([upper, lower]) as store:
        lower.put("k", a_stream())
        assert store.resident_many(["k"]) == [a_stream()]
        assert isinstance(store.resident_many(["k"])[0], torch.Tensor), "it has been copied above"
        assert isinstance(lower.resident_many(["k"])[0], bytes)


def test_encrypted_it_gives_bytes(store):
    hidden = encrypted(store, bytes(range(32)))
    hidden.put("k", a_stream())
    assert hidden.resident_many(["k"]) == [a_stream()]


def test_a_forked_child_cannot_use_its_parents_device_and_says_so():
    with open_store("device:meta") as store:
        store.put("k", b"v")
        answer = in_forked_child(lambda: store.get("k"))
        assert "StoreUnavailable" in answer
        assert "start it with spawn" in answer
        assert store.contains("k")


def test_what_a_device_raises_is_an_error_of_the_store(store, monkeypatch):
    store.put("k", a_stream())

    def fail(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(DeviceStore, "_frame", fail)
    with pytest.raises(StoreUnavailable, match="illegal memory access"):
        store.get("k")
    with open_store([store, open_store("memory:")]) as tiers:
        assert tiers.get("k") is None


def test_the_callers_default_device_does_not_matter(store):
    torch.set_default_device("meta")
    try:
        store.put_many([("empty", b""), ("k", b"v")])
        assert store.get_many(["empty", "k"]) == [b"", b"v"]
    finally:
        torch.set_default_device(None)


def test_urls():
    with open_store("device:cpu?bytes=1MB&namespace=n") as store:
        assert isinstance(store, DeviceStore)
        assert (store.device, store.namespace) == (torch.device("cpu"), "n")
    for url in ("device:", "device:?bytes=1", "device://cpu", "cuda://0", "device:cpu?bytes=0"):
        with pytest.raises(InvalidArgument):
            open_store(url)
    with pytest.raises(StoreUnavailable, match="cannot be used"):
        open_store("device:nothing")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device is there")
@pytest.mark.parametrize("url", ["cuda:", "cuda:0?bytes=8GB"])
def test_without_a_device_it_says_so(url):
    with pytest.raises(StoreUnavailable, match="cuda"):
        open_store(url)
