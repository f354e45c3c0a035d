"""kvtc's adapters for LMCache, called as LMCache's controllers and backends call them."""

from __future__ import annotations

import asyncio
import importlib
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from kvtc import inspect
from kvtc.errors import InvalidArgument, UnsupportedLayout
from kvtc.store import open_store
from tests.builders import HEAD_DIM, N_HEADS, N_LAYERS, measured_calibration, relative_error
from tests.engines.test_chunk_coder import SHAPE, T, chunk
from tests.failing import DECODE_ERRORS, ERRORS, break_decoding, break_store
from tests.fake_lmcache import MemoryLayoutDesc, MemoryObj, ObjectKey, fake_lmcache

pytestmark = pytest.mark.usefixtures("lmcache")

HASHES = [bytes([index]) * 8 for index in range(4)]


@pytest.fixture
def lmcache():
    """Stand-ins for LMCache."""
    with fake_lmcache() as names:
        yield names


@pytest.fixture
def options(base_options):
    """What a user configures."""
    return base_options | {"kvtc.ratio": 8, "kvtc.max_tokens": 4096}


def serde_options(options):
    return {name: value for name, value in options.items() if name != "kvtc.store"}


def empty() -> MemoryObj:
    return MemoryObj(torch.zeros(SHAPE, dtype=torch.bfloat16))


def take(query, seconds: float = 30.0):
    """What a controller gets in the end."""
    deadline = time.monotonic() + seconds
    while (result := query()) in (None, {}):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return result


def make_adapter(options):
    return importlib.import_module("kvtc.engines.lmcache.l2").KvtcL2Adapter(options, l1_memory_desc=None)


def test_importing_kvtc_imports_no_engine():
    code = "import sys, kvtc, kvtc.engines; sys.exit(bool({'lmcache', 'sglang', 'vllm', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_chunks_go_to_the_store_and_come_back_to_another_adapter(lmcache, options):
    adapter = make_adapter(options)
    lmcache.bus.publish_lookup(HASHES, T)
    keys = [ObjectKey(name) for name in HASHES[:3]]
    data = [MemoryObj(chunk(256 * index)) for index in range(3)]
    task = adapter.submit_store_task(keys, data)
    (result,) = take(adapter.pop_completed_store_tasks).items()
    assert (result[0], result[1].is_successful()) == (task, True)
    assert "starts_searched" not in adapter.report_status()
    assert adapter.report_status()["entries_saved"] == 3
    (event,) = adapter.events
    assert event[:2] == ("stored", keys)
    assert sum(event[2]) == result[1].bytes_transferred()
    adapter.close()
    with open_store(options["kvtc.store"]) as store:
        assert sorted(inspect(store.get(key)).first_position for key in store.keys()) == [0, 256, 512]  # noqa: SIM118

    other = make_adapter(options)
    asked = [*keys, ObjectKey(HASHES[3])]
    lookup = other.submit_lookup_and_lock_task(asked, {})
    assert take(lambda: other.query_lookup_and_lock_result(lookup)).bits() == [True, True, True, False]
    buffers = [empty() for _ in asked]
    load = other.submit_load_task(asked, buffers)
    assert take(lambda: other.query_load_result(load)).bits() == [True, True, True, False]
    other.submit_unlock(asked)
    for buffer, item in zip(buffers, data, strict=False):
        assert relative_error(buffer.tensor, item.tensor) < 0.1
    assert other.events[-1][:2] == ("accessed", keys)
    other.delete(keys[1:2])
    assert other.events[-1] == ("deleted", keys[1:2], [0])
    lookup = other.submit_lookup_and_lock_task(keys, {})
    assert take(lambda: other.query_lookup_and_lock_result(lookup)).bits() == [True, False, False]
    other.close()


def test_a_quality_in_place_of_a_ratio(lmcache, options):
    measured_calibration().save(options["kvtc.calibration"])
    del options["kvtc.ratio"]
    for kl, expected in ((1e-3, [False]), (1e-3, [True]), (4e-3, [False])):
        adapter = make_adapter(options | {"kvtc.kl": kl})
        lookup = adapter.submit_lookup_and_lock_task([ObjectKey(HASHES[0])], {})
        assert take(lambda number=lookup, asked=adapter: asked.query_lookup_and_lock_result(number)).bits() == expected
        adapter.submit_store_task([ObjectKey(HASHES[0])], [MemoryObj(chunk(0))])
        (result,) = take(adapter.pop_completed_store_tasks).values()
        assert result.is_successful()
        adapter.close()
    importlib.import_module("kvtc.engines.lmcache.serde")
    with pytest.raises(InvalidArgument, match=r"fixed size need kvtc\.ratio, not kvtc\.kl"):
        lmcache.serdes["kvtc"](serde_options(options) | {"kvtc.kl": 1e-3})


def test_event_descriptors_differ_and_are_signalled(options):
    adapter = make_adapter(options)
    names = ("get_store_event_fd", "get_lookup_and_lock_event_fd", "get_load_event_fd")
    assert len({getattr(adapter, name)() for name in names}) == 3
    load = adapter.submit_load_task([ObjectKey(HASHES[0])], [empty()])
    assert take(lambda: adapter.query_load_result(load)).bits() == [False]
    deadline = time.monotonic() + 10
    while adapter._events[2].n_signals == 0 and time.monotonic() < deadline:
        time.sleep(0.005)
    assert [event.n_signals for event in adapter._events] == [0, 0, 1]
    adapter.close()


def test_chunks_that_cannot_be_stored_fail_their_task_alone(options, caplog):
    adapter = make_adapter(options)
    keys = [ObjectKey(name) for name in HASHES[:2]]
    data = [MemoryObj(chunk(0)), MemoryObj(torch.zeros(2, N_LAYERS, T, 5, dtype=torch.bfloat16))]
    adapter.submit_store_task(keys, data)
    (result,) = take(adapter.pop_completed_store_tasks).values()
    assert not result.is_successful()
    assert "LMCache chunk of shape" in caplog.text
    lookup = adapter.submit_lookup_and_lock_task(keys, {})
    assert take(lambda: adapter.query_lookup_and_lock_result(lookup)).bits() == [True, False]
    assert adapter.report_status()["save_errors"] == 1
    adapter.close()


@pytest.mark.parametrize("error", ERRORS)
def test_whatever_a_store_raises_is_a_miss(options, monkeypatch, error):
    adapter, keys = make_adapter(options), [ObjectKey(HASHES[0])]

    def store():
        adapter.submit_store_task(keys, [MemoryObj(chunk(0))])
        (result,) = take(adapter.pop_completed_store_tasks).values()
        return result.is_successful()

    def load():
        number = adapter.submit_load_task(keys, [empty()])
        return take(lambda: adapter.query_load_result(number)).bits()

    with monkeypatch.context() as broken:
        break_store(broken, adapter._chunks.entries.store, error)
        lookup = adapter.submit_lookup_and_lock_task(keys, {})
        assert take(lambda: adapter.query_lookup_and_lock_result(lookup)).bits() == [False]
        assert (store(), load()) == (False, [False])
        adapter.delete(keys)
    counts = adapter.report_status()
    assert (counts["save_errors"], counts["misses"], counts["store_errors"]) == (1, 1, 4)
    assert store()
    with monkeypatch.context() as broken:
        break_decoding(broken, DECODE_ERRORS[0])
        assert load() == [False]
    assert adapter.report_status()["decode_errors"] == 1
    assert load() == [True]
    adapter.close()


def test_models_groups_and_tenants_do_not_share_chunks(options):
    adapter = make_adapter(options)
    adapter.submit_store_task([ObjectKey(HASHES[0])], [MemoryObj(chunk(0))])
    take(adapter.pop_completed_store_tasks)
    others = [
        ObjectKey(HASHES[0], model_name="other"),
        ObjectKey(HASHES[0], cache_salt="tenant"),
        ObjectKey(HASHES[0], object_group_id=1),
        ObjectKey(HASHES[0], kv_rank=(2 << 24) | (1 << 16)),
    ]
    for key in others:
        lookup = adapter.submit_lookup_and_lock_task([key], {})
        assert take(lambda number=lookup: adapter.query_lookup_and_lock_result(number)).bits() == [False]
    adapter.close()


def test_what_cannot_work_ends_the_start(options):
    with pytest.raises(InvalidArgument, match=r"unknown option kvtc\.ration"):
        make_adapter({**options, "kvtc.ration": 8})
    with pytest.raises(InvalidArgument, match="either a ratio or a step or a kl"):
        make_adapter({**options, "kvtc.kl": 0.001})
    with pytest.raises(FileNotFoundError):
        make_adapter({**options, "kvtc.calibration": "nowhere.safetensors"})


def test_the_serde_is_registered_and_keeps_its_promise(lmcache, options):
    importlib.import_module("kvtc.engines.lmcache.server")
    serde = lmcache.serdes["kvtc"](serde_options(options))
    layout = MemoryLayoutDesc([torch.Size(SHAPE)], [torch.bfloat16])
    size = serde.serializer.estimate_serialized_size(layout)
    assert size < chunk(0).numel() * 2 / 8 + 100
    for index in (0, 2):  # the second is not told where it stands
        if index == 0:
            lmcache.bus.publish_lookup(HASHES[:1], T)
        key, buffer = ObjectKey(HASHES[index]), MemoryObj(torch.full((size,), 7, dtype=torch.uint8))
        data, found = MemoryObj(chunk(256 * index)), empty()
        assert serde.serializer.serialize(data, buffer, key) == size
        serde.deserializer.deserialize(buffer, found, key)
        assert relative_error(found.tensor, data.tensor) < 0.1


def test_the_serde_refuses_layouts_where_lmcache_deals_with_it(lmcache, options, caplog):
    importlib.import_module("kvtc.engines.lmcache.serde")
    serde = lmcache.serdes["kvtc"](serde_options(options))
    odd = torch.Size((2, N_LAYERS, T, 5))
    assert serde.serializer.estimate_serialized_size(MemoryLayoutDesc([odd], [torch.bfloat16])) == odd.numel() * 2
    two = MemoryLayoutDesc([torch.Size(SHAPE)] * 2, [torch.bfloat16] * 2)
    assert serde.serializer.estimate_serialized_size(two) == 2 * chunk(0).numel() * 2
    assert "chunks are not stored" in caplog.text
    with pytest.raises(UnsupportedLayout, match="LMCache chunk of shape"):
        serde.serializer.serialize(MemoryObj(torch.zeros(odd)), empty(), ObjectKey(HASHES[0]))
    with pytest.raises(InvalidArgument, match=r"unknown option kvtc\.store"):
        lmcache.serdes["kvtc"](options)


class Memory:
    """LMCache's local backend: gives memory for chunks."""

    def __init__(self) -> None:
        self.config = SimpleNamespace()
        self.metadata = SimpleNamespace(shapes=[torch.Size(SHAPE)], dtypes=[torch.bfloat16], chunk_size=T, worker_id=0)
        self.metadata.model_name = "tiny"
        self.given: list[MemoryObj] = []

    def allocate(self, shapes, dtypes, fmt):  # noqa: ARG002
        self.given.append(MemoryObj(torch.zeros(shapes[0], dtype=dtypes[0])))
        return self.given[-1]


def engine_key(name: str, worker: int = 0):
    return SimpleNamespace(chunk_hash=name, world_size=1, worker_id=worker, dtype=torch.bfloat16, tags=None)


def test_the_remote_plugin_keeps_chunks_and_ends_of_texts(options):
    memory = Memory()
    make = importlib.import_module("kvtc.engines.lmcache.remote").KvtcRemoteConnector
    config = SimpleNamespace(extra_config={**options, "remote_storage_plugin.kvtc.module_path": "x"})
    connector = make(loop=None, local_cpu_backend=memory, config=config)
    whole, end = chunk(256), chunk(512)[:, :, :100].contiguous()

    async def use():
        await connector.put(engine_key("a"), MemoryObj(whole))
        await connector.put(engine_key("b"), MemoryObj(end, SimpleNamespace(cached_positions=torch.arange(512, 612))))
        assert await connector.exists(engine_key("a"))
        assert not connector.exists_sync(engine_key("c"))
        return [await connector.get(engine_key(name)) for name in "abc"]

    first, second, third = asyncio.run(use())
    assert relative_error(first.tensor, whole) < 0.1
    assert second.tensor.shape == (2, N_LAYERS, 100, N_HEADS * HEAD_DIM)
    assert relative_error(second.tensor, end) < 0.1
    assert third is None
    assert len(asyncio.run(connector.list())) == 2
    assert connector.remove_sync(engine_key("a"))
    assert asyncio.run(connector.get(engine_key("a"))) is None
    asyncio.run(connector.close())


@pytest.mark.parametrize("error", ERRORS)
def test_whatever_a_store_raises_is_a_miss_of_the_remote_plugin(options, monkeypatch, error):
    memory = Memory()
    make = importlib.import_module("kvtc.engines.lmcache.remote").KvtcRemoteConnector
    connector = make(loop=None, local_cpu_backend=memory, config=SimpleNamespace(extra_config=options))
    key = engine_key("a")
    with monkeypatch.context() as broken:
        break_store(broken, connector._store, error)
        asyncio.run(connector.put(key, MemoryObj(chunk(256))))
        assert not connector.exists_sync(key)
        assert asyncio.run(connector.get(key)) is None
        assert connector.remove_sync(key)
    asyncio.run(connector.put(key, MemoryObj(chunk(256))))
    for fails in (lambda broken: break_decoding(broken, DECODE_ERRORS[0]), no_memory):
        with monkeypatch.context() as broken:
            fails(broken)
            assert asyncio.run(connector.get(key)) is None
    assert [item.n_references for item in memory.given] == [0], "what was given is given back"
    assert connector._chunks.counts.read()["decode_errors"] == 2
    assert relative_error(asyncio.run(connector.get(key)).tensor, chunk(256)) < 0.1
    asyncio.run(connector.close())


def no_memory(monkeypatch):
    monkeypatch.setattr(Memory, "allocate", lambda *_: None)


def test_what_is_no_stream_at_all_is_a_miss_of_the_remote_plugin(options):
    make = importlib.import_module("kvtc.engines.lmcache.remote").KvtcRemoteConnector
    connector = make(loop=None, local_cpu_backend=Memory(), config=SimpleNamespace(extra_config=options))
    asyncio.run(connector.put(engine_key("a"), MemoryObj(chunk(256))))
    (key,) = connector._store.keys()
    connector._store.put(key, b"no stream")
    assert asyncio.run(connector.get(engine_key("a"))) is None
    assert connector._chunks.counts.read()["damaged"] == 1
    assert not connector.exists_sync(engine_key("a"))
    asyncio.run(connector.close())


def test_memory_of_a_damaged_entry_is_given_back(options):
    memory = Memory()
    make = importlib.import_module("kvtc.engines.lmcache.remote").KvtcRemoteConnector
    connector = make(loop=None, local_cpu_backend=memory, config=SimpleNamespace(extra_config=options))
    asyncio.run(connector.put(engine_key("a"), MemoryObj(chunk(256))))
    with open_store(options["kvtc.store"]) as store:
        (key,) = store.keys()
        stream = bytearray(store.get(key))
        stream[-1] ^= 1
        store.put(key, stream)
    assert asyncio.run(connector.get(engine_key("a"))) is None
    assert [item.n_references for item in memory.given] == [0]
    asyncio.run(connector.close())
