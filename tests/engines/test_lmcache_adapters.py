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
from kvtc.process import log_limits
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


def zeros(shape, dtype) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8).to(dtype)


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


def make_remote(options, memory):
    make = importlib.import_module("kvtc.engines.lmcache.remote").KvtcRemoteConnector
    return make(loop=None, local_cpu_backend=memory, config=SimpleNamespace(extra_config=options))


def store(adapter, keys, items) -> bool:
    """Whether all are stored."""
    adapter.submit_store_task(keys, items)
    (result,) = take(adapter.pop_completed_store_tasks).values()
    return result.is_successful()


def look_up(adapter, keys) -> list[bool]:
    number = adapter.submit_lookup_and_lock_task(keys, {})
    return take(lambda: adapter.query_lookup_and_lock_result(number)).bits()


def load(adapter, keys, items) -> list[bool]:
    number = adapter.submit_load_task(keys, items)
    return take(lambda: adapter.query_load_result(number)).bits()


def noise(shape) -> torch.Tensor:
    """Keys and values of no model."""
    return 9 * torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


def any_bits(shape, dtype, seed: int = 0) -> torch.Tensor:
    """Numbers of any bits, those of NaN too."""
    n_bytes = torch.Size(shape).numel() * dtype.itemsize
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n_bytes,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def erased(item: MemoryObj) -> MemoryObj:
    """Memory for as much."""
    return MemoryObj(*(zeros(shape, dtype) for shape, dtype in zip(item.meta.shapes, item.meta.dtypes, strict=True)))


def held(item: MemoryObj) -> bytes:
    return item.raw_tensor[: item.get_size()].numpy().tobytes()


ROWS = (2, 1, 64, 6)
OF_ANY_KIND = {
    "16 bits": MemoryObj(any_bits(ROWS, torch.bfloat16)),
    "half": MemoryObj(any_bits(ROWS, torch.float16)),
    "32 bits": MemoryObj(any_bits(ROWS, torch.float32)),
    "e4m3": MemoryObj(any_bits(ROWS, torch.float8_e4m3fn)),
    "e5m2": MemoryObj(any_bits(ROWS, torch.float8_e5m2)),
    "packed": MemoryObj(any_bits((1, 2, 32, 21), torch.uint8)),
    "integers": MemoryObj(any_bits((1, 2, 32, 20), torch.int8)),
    "latents": MemoryObj(any_bits((1, 2, 64, 18), torch.bfloat16)),
    "states": MemoryObj(any_bits((1, 2, 1, 700), torch.float32)),
    "an odd number": MemoryObj(any_bits((7,), torch.bfloat16)),
    "several": MemoryObj(any_bits((2, 1, 32, 6), torch.bfloat16), any_bits((2, 3, 32, 6), torch.bfloat16, 1)),
    "of several widths": MemoryObj(any_bits((1, 2, 32, 6), torch.bfloat16), any_bits((1, 1, 1, 90), torch.bfloat16)),
    "of several dtypes": MemoryObj(any_bits((1, 2, 32, 6), torch.bfloat16), any_bits((1, 1, 32, 5), torch.uint8)),
}


def test_lossless_needs_no_calibration_and_keeps_chunks_of_any_kind_bit_for_bit(options):
    exact = {"kvtc.lossless": True, "kvtc.store": options["kvtc.store"], "kvtc.identity": "tiny"}
    keys = [ObjectKey(name.encode().ljust(8)) for name in OF_ANY_KIND]
    adapter = make_adapter(exact)
    assert store(adapter, keys, list(OF_ANY_KIND.values()))
    counts = adapter.report_status()
    assert (counts["entries_saved"], "starts_searched" in counts) == (len(keys), False)
    adapter.close()

    other = make_adapter(exact)
    assert all(look_up(other, keys))
    found = [erased(item) for item in OF_ANY_KIND.values()]
    assert all(load(other, keys, found))
    for name, item, expected in zip(OF_ANY_KIND, found, OF_ANY_KIND.values(), strict=True):
        assert held(item) == held(expected), name
    half = MemoryObj(torch.zeros(ROWS, dtype=torch.float16))
    assert load(other, keys[:1], [half]) == [False], "numbers of another dtype are not converted"
    other.close()
    lossy = make_adapter(options)
    assert not any(look_up(lossy, keys))
    lossy.close()


def test_what_the_calibration_does_not_cover_passes_without_loss(options, caplog, monkeypatch):
    monkeypatch.setattr(log_limits, "_limits", log_limits.LogLimits())
    fp8 = MemoryObj(any_bits(SHAPE, torch.float8_e4m3fn))
    items = [MemoryObj(chunk(0)), OF_ANY_KIND["states"], OF_ANY_KIND["latents"], fp8, OF_ANY_KIND["several"]]
    keys = [ObjectKey(HASHES[0], object_group_id=group) for group in range(len(items))]
    adapter = make_adapter(options)
    assert store(adapter, keys, items)
    assert store(
        adapter, [ObjectKey(HASHES[1], object_group_id=3)], [MemoryObj(any_bits(SHAPE, torch.float8_e4m3fn, 1))]
    )
    messages = [text for text in caplog.messages if "kept without loss" in text]
    assert len(messages) == 4, "one of each kind"
    assert any("its scales are not known" in text for text in messages)
    with open_store(options["kvtc.store"]) as opened:
        profiles = [inspect(opened.get(key)).profile for key in opened.keys()]  # noqa: SIM118
    assert sorted(profiles) == ["joint", *["lossless"] * 5]
    found = [erased(item) for item in items]
    assert load(adapter, keys, found) == [True] * len(items)
    assert 0 < relative_error(found[0].tensor, items[0].tensor) < 0.1
    assert [held(item) for item in found[1:]] == [held(item) for item in items[1:]]
    adapter.close()


def test_groups_of_one_shape_are_told_apart_by_an_option(options):
    windows, full = ObjectKey(HASHES[0], object_group_id=0), ObjectKey(HASHES[0], object_group_id=1)
    adapter = make_adapter({**options, "kvtc.object_group": 1})
    assert store(adapter, [windows, full], [MemoryObj(noise(SHAPE)), MemoryObj(chunk(0))])
    assert not store(adapter, [ObjectKey(HASHES[1], object_group_id=1)], [MemoryObj(noise(SHAPE))]), "of another model"
    found = [empty(), empty()]
    assert load(adapter, [windows, full], found) == [True, True]
    assert torch.equal(found[0].tensor, noise(SHAPE))
    assert 0 < relative_error(found[1].tensor, chunk(0)) < 0.1
    adapter.close()
    with pytest.raises(InvalidArgument, match=r"kvtc\.object_group is -1; expected at least 0"):
        make_adapter({**options, "kvtc.object_group": -1})


def test_of_windows_and_states_the_last_chunks_count_alone(options):
    """LMCache stores no chunk of states but the last, and folds the bits of all groups into a prefix."""
    exact = {"kvtc.lossless": True, "kvtc.store": options["kvtc.store"], "kvtc.identity": "tiny"}
    full, states = ([ObjectKey(name, object_group_id=group) for name in HASHES] for group in (0, 1))
    item = OF_ANY_KIND["integers"]
    adapter = make_adapter(exact)
    assert store(adapter, [*full[:3], states[2]], [item] * 4)
    assert look_up(adapter, [*full, *states]) == [True, True, True, False, False, False, True, False]
    assert look_up(adapter, [ObjectKey(HASHES[0], model_name="other"), states[2]]) == [False, True]
    adapter.close()


def test_packed_pages_have_keys_of_their_own(options):
    exact = {"kvtc.lossless": True, "kvtc.store": options["kvtc.store"], "kvtc.identity": "tiny"}
    packings = [{}, {"kvtc.packing": "vec"}, {"kvtc.packing": "vec", "kvtc.page_tokens": 32}, {"kvtc.packing": "amx"}]
    adapters = [make_adapter({**exact, **packing}) for packing in packings]
    assert len({adapter._key(ObjectKey(HASHES[0])) for adapter in adapters}) == len(packings)
    for adapter in adapters:
        adapter.close()


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
    assert look_up(other, keys) == [True, False, True], "LMCache makes of it what each group needs"
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
    data = [MemoryObj(chunk(0)), MemoryObj(noise(SHAPE))]
    assert not store(adapter, keys, data)
    assert "times as far from the calibrated mean" in caplog.text
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
    with pytest.raises(InvalidArgument, match=r"give kvtc\.calibration, or kvtc\.lossless"):
        make_adapter({"kvtc.store": "memory:", "kvtc.identity": "tiny"})
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
    with pytest.raises(InvalidArgument, match=r"the L2 adapter kvtc\.engines\.lmcache\.l2 stores"):
        lmcache.serdes["kvtc"]({"kvtc.lossless": True, "kvtc.identity": "tiny"})


class Memory:
    """LMCache's local backend: gives memory for chunks."""

    def __init__(self, shapes=(SHAPE,), dtypes=(torch.bfloat16,)) -> None:
        self.config = SimpleNamespace(use_layerwise=False)
        self.metadata = SimpleNamespace(
            shapes=list(map(torch.Size, shapes)), dtypes=list(dtypes), chunk_size=T, worker_id=0
        )
        self.metadata.model_name = "tiny"
        self.given: list[MemoryObj] = []

    def allocate(self, shapes, dtypes, fmt):  # noqa: ARG002
        self.given.append(MemoryObj(*map(zeros, shapes, dtypes)))
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
        await connector.put(engine_key("b"), MemoryObj(end, cached_positions=torch.arange(512, 612)))
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


def test_the_remote_plugin_keeps_several_tensors_and_their_ends_without_loss(options):
    exact = {"kvtc.lossless": True, "kvtc.store": options["kvtc.store"], "kvtc.identity": "tiny"}
    shapes, dtypes = [(2, 1, T, 6), (1, 3, T, 20)], [torch.float16, torch.float8_e5m2]
    memory = Memory(shapes, dtypes)
    connector = make_remote(exact, memory)
    items = {
        name: MemoryObj(
            *(any_bits((*shape[:2], n, shape[3]), dtype) for shape, dtype in zip(shapes, dtypes, strict=True))
        )
        for name, n in (("whole", T), ("end", 37))
    }

    async def use():
        for name, item in items.items():
            await connector.put(engine_key(name), item)
        return [await connector.get(engine_key(name)) for name in items]

    for name, found in zip(items, asyncio.run(use()), strict=True):
        assert found.meta.shapes == items[name].meta.shapes
        assert held(found) == held(items[name])
    connector.single_token_size = 1
    assert asyncio.run(connector.get(engine_key("whole"))) is None, "more than a chunk is not allocated"
    asyncio.run(connector.close())


def test_the_remote_plugin_passes_what_the_calibration_does_not_cover(options):
    dtype = torch.float8_e4m3fn
    connector, item = make_remote(options, Memory(dtypes=[dtype])), MemoryObj(any_bits(SHAPE, dtype))
    asyncio.run(connector.put(engine_key("a"), item))
    assert held(asyncio.run(connector.get(engine_key("a")))) == held(item)
    asyncio.run(connector.close())
    memory = Memory()
    memory.config.use_layerwise = True
    with pytest.raises(UnsupportedLayout, match="use_layerwise is set"):
        make_remote(options, memory)


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
