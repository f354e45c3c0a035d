"""KvtcTier, called as vLLM's tiering manager calls a tier; host memory is filled and read by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kvtc import inspect
from kvtc.engines.page_layout import PageLayout
from kvtc.engines.settings import EngineSettings
from kvtc.engines.vllm.tier_jobs import RowShard, TierChunk, TierJobs
from kvtc.engines.windowless_codec import WindowlessCodec
from kvtc.errors import GeometryMismatch, InvalidArgument, StoreUnavailable, UnsupportedLayout
from kvtc.store import open_store
from tests.builders import (
    HEAD_DIM,
    N_HEADS,
    N_LAYERS,
    joint_calibration,
    measured_calibration,
    relative_error,
    told_cache,
)
from tests.engine_pages import in_logical_order, read_tokens, write_tokens
from tests.failing import DECODE_ERRORS, ERRORS, break_decoding, break_store
from tests.fake_vllm import LookupResult, ReqContext, TransferJob, fake_vllm

PAGE, CHUNK = 32, 256
BLOCK_BYTES = 2 * N_LAYERS * N_HEADS * HEAD_DIM * PAGE * 2
ROW_BYTES = CHUNK // PAGE * BLOCK_BYTES + 64  # padded


@pytest.fixture
def tier_class():
    """The class, on stand-ins for vLLM."""
    with fake_vllm():
        from kvtc.engines.vllm.tier import KvtcTier

        yield KvtcTier


@pytest.fixture
def options(base_options):
    """What a user configures."""
    return base_options | {"kvtc.step": 0.05, "kvtc.attention_backend": "FLASH_ATTN"}


def spec(axes: str = "LBNHC", tp_size: int = 1, **changed):
    """An OffloadingSpec as a tier sees it."""
    group = SimpleNamespace(
        tokens_per_block=PAGE, layer_names=tuple(f"model.layers.{layer}.attn" for layer in range(N_LAYERS))
    )
    config = SimpleNamespace(
        groups=[group],
        worker_kv_bytes_per_block=BLOCK_BYTES // tp_size,
        model=SimpleNamespace(name="tiny", dtype="bfloat16"),
        cache=SimpleNamespace(blocks_per_chunk=CHUNK // PAGE),
        parallel=parallel(tp_size),
        canonical_layout=False,
        replicated_layout=False,
        kv_cache_layout=axes,
    )
    for name, value in changed.items():
        setattr(config, name, value)
    return SimpleNamespace(config=config)


def parallel(tp_size: int = 1, pp_size: int = 1, is_agnostic: bool = True):
    """An OffloadingParallelConfig."""
    return SimpleNamespace(
        tp_size=tp_size,
        pp_size=pp_size,
        pcp_size=1,
        dcp_size=1,
        world_size=tp_size * pp_size,
        is_parallelism_agnostic=is_agnostic,
    )


def pages_of(row: np.ndarray, axes: str):
    """The bytes of a worker's shard of a row as pages [L, B, H, N, 2 D]."""
    sizes = {"L": N_LAYERS, "B": CHUNK // PAGE, "H": N_HEADS, "N": PAGE, "C": 2 * HEAD_DIM}
    return in_logical_order(torch.from_numpy(row).view(torch.bfloat16), axes, sizes)


class Host:
    """Host memory of some chunks, and the tier over it."""

    def __init__(self, tier_class, options, axes: str = "LBNHC"):
        self.rows = np.zeros((6, ROW_BYTES), np.uint8)
        self.axes = axes
        self.tier = tier_class(spec(axes), memoryview(self.rows.view(np.int8)), "KvtcTier", **options)
        self.n_jobs = 0

    def fill(self, row: int, cache, index: int) -> None:
        span = slice(index * CHUNK, (index + 1) * CHUNK)
        write_tokens(self.pages(row), torch.arange(CHUNK), cache.keys[:, :, span], cache.values[:, :, span])

    def read(self, row: int):
        return read_tokens(self.pages(row), torch.arange(CHUNK))

    def pages(self, row: int):
        return pages_of(self.rows[row, : ROW_BYTES - 64], self.axes)

    def job(self, keys, rows, context, is_load: bool):
        """Submit a job and wait for its result."""
        self.n_jobs += 1
        job = TransferJob(self.n_jobs, keys, rows, is_load, context)
        (self.tier.submit_load if is_load else self.tier.submit_store)(job)
        assert self.tier.has_pending_work()
        self.tier.drain_jobs()
        (result,) = self.tier.get_finished_jobs()
        assert result.job_id == job.job_id
        assert not self.tier.has_pending_work()
        return result

    def look(self, key, context):
        """Ask as the scheduler does, step by step, until there is an answer."""
        while (found := self.tier.lookup(key, context)) is LookupResult.RETRY:
            self.tier.on_schedule_end(None)
        return found


def request(tier, name: str, n_chunks: int = 2):
    """A request's context and the keys of its chunks, as vLLM makes them."""
    context = ReqContext(name)
    keys = [bytes([index]) * 32 + bytes(4) for index in range(n_chunks)]
    for index, key in enumerate(keys):
        context.set_offload_key_position(key, (index + 1) * CHUNK)
    tier.on_new_request(context)
    return context, keys


def truth():
    return told_cache(2 * CHUNK, torch.bfloat16)


@pytest.mark.parametrize("axes", ["LBNHC", "LBHNC", "BLHNC"])
def test_chunks_leave_host_memory_and_come_back(tier_class, options, axes):
    cache = truth()
    host = Host(tier_class, options, axes)
    context, keys = request(host.tier, "a")
    assert host.look(keys[0], context) is LookupResult.MISS
    for row, index in ((4, 0), (1, 1)):
        host.fill(row, cache, index)
    # vLLM hands in keys in any order.
    assert host.job(keys[::-1], [1, 4], context, is_load=False).success
    host.tier.shutdown()
    with open_store(options["kvtc.store"]) as store:
        streams = [inspect(store.get(key)) for key in store.keys()]  # noqa: SIM118
    assert {stream.profile for stream in streams} == {"joint"}
    assert sorted(stream.first_position for stream in streams) == [0, CHUNK]
    other = Host(tier_class, options, axes)
    context, keys = request(other.tier, "b")
    assert [other.look(key, context) for key in keys] == [LookupResult.HIT] * 2
    result = other.job(keys, [2, 3], context, is_load=True)
    assert result.success
    assert result.transfer_bytes == sum(stream.total_bytes for stream in streams)
    for row, index in ((2, 0), (3, 1)):
        span = slice(index * CHUNK, (index + 1) * CHUNK)
        for found, expected in zip(other.read(row), (cache.keys[:, :, span], cache.values[:, :, span]), strict=True):
            assert relative_error(found, expected) < 0.02
    other.tier.on_request_finished(context)
    counts = other.tier.get_stats().data
    assert counts["vllm:kvtc_entries_loaded"] == 2
    assert set(counts) <= set(tier_class.build_metric_definitions({}))
    assert other.tier.get_stats() is None
    other.tier.shutdown()


def test_a_quality_in_place_of_a_step(tier_class, options):
    measured_calibration().save(options["kvtc.calibration"])
    del options["kvtc.step"]
    for kl, expected in ((2e-3, LookupResult.MISS), (2e-3, LookupResult.HIT), (4e-3, LookupResult.MISS)):
        host = Host(tier_class, options | {"kvtc.kl": kl})
        context, keys = request(host.tier, "a")
        assert host.look(keys[0], context) is expected
        host.fill(0, truth(), 0)
        assert host.job(keys[:1], [0], context, is_load=False).success
        host.tier.shutdown()


def test_a_damaged_entry_fails_its_job_and_is_then_missing(tier_class, options):
    cache, host = truth(), Host(tier_class, options)
    context, keys = request(host.tier, "a")
    for index in range(2):
        host.fill(index, cache, index)
    host.job(keys, [0, 1], context, is_load=False)
    with open_store(options["kvtc.store"]) as store:
        stored = {inspect(store.get(key)).first_position: key for key in store.keys()}  # noqa: SIM118
        stream = bytearray(store.get(stored[CHUNK]))
        stream[-1] ^= 1
        store.put(stored[CHUNK], bytes(stream))
    context, keys = request(host.tier, "b")
    assert [host.look(key, context) for key in keys] == [LookupResult.HIT] * 2
    result = host.job(keys, [2, 3], context, is_load=True)
    assert not result.success
    assert result.successful_keys == (keys[0],)
    # vLLM asks again; another answer would make it try for ever.
    assert [host.look(key, context) for key in keys] == [LookupResult.HIT, LookupResult.MISS]
    again, _ = request(host.tier, "c")
    assert host.look(keys[1], again) is LookupResult.MISS
    host.tier.shutdown()


def test_a_store_that_fails_is_a_miss_not_an_exception(tier_class, options):
    cache, host = truth(), Host(tier_class, options)
    context, keys = request(host.tier, "a")
    host.fill(0, cache, 0)

    def fails(*_):
        raise StoreUnavailable("gone")

    for name in ("put_many", "contains_prefix", "get_many"):
        setattr(host.tier._store, name, fails)
    assert host.look(keys[0], context) is LookupResult.MISS
    assert not host.job(keys[:1], [0], context, is_load=False).success
    assert not host.job(keys[:1], [0], context, is_load=True).success
    host.tier._store.contains_prefix = None  # what nobody foresaw
    assert host.look(keys[1], context) is LookupResult.MISS
    host.tier.shutdown()


@pytest.mark.parametrize("error", ERRORS)
def test_whatever_a_store_raises_ends_the_job_and_no_more(tier_class, options, monkeypatch, error):
    cache, host = truth(), Host(tier_class, options)
    context, keys = request(host.tier, "a")
    host.fill(0, cache, 0)
    with monkeypatch.context() as broken:
        break_store(broken, host.tier._store, error)
        assert host.look(keys[0], context) is LookupResult.MISS
        for is_load in (False, True):
            result = host.job(keys[:1], [0], context, is_load)
            assert (result.success, result.transfer_bytes) == (False, 0)
    counts = host.tier._jobs.counts.read()
    assert (counts["lookups"], counts["save_errors"], counts["misses"], counts["store_errors"]) == (1, 1, 1, 3)
    assert host.job(keys[:1], [0], context, is_load=False).success
    with monkeypatch.context() as broken:
        break_decoding(broken, DECODE_ERRORS[0])
        assert not host.job(keys[:1], [1], context, is_load=True).success
    assert host.tier._jobs.counts.read()["decode_errors"] == 1
    assert host.job(keys[:1], [1], context, is_load=True).success
    host.tier.shutdown()


def test_a_chunk_whose_position_is_not_told_is_not_stored(tier_class, options):
    host = Host(tier_class, options)
    context, keys = ReqContext("a"), [b"x" * 36]
    assert host.tier.lookup(keys[0], context) is LookupResult.MISS
    assert not host.job(keys, [0], context, is_load=False).success
    host.tier.shutdown()


def test_each_rank_has_its_shard_of_a_row(caplog):
    settings = EngineSettings("unused", "memory:", step=0.05)
    layout = PageLayout("LBHNC", N_LAYERS, N_HEADS, HEAD_DIM, PAGE)
    size = layout.bytes(CHUNK, torch.bfloat16)
    codecs = [WindowlessCodec(joint_calibration(seed), settings) for seed in (0, 1)]
    rows = np.zeros((2, 2 * size), np.uint8)
    shards = [RowShard(rank * size, layout, torch.bfloat16, codec) for rank, codec in enumerate(codecs)]
    with open_store("memory:") as store:
        jobs = TierJobs(rows, shards, store, b"model", CHUNK)
        caches = [told_cache(CHUNK, torch.bfloat16, seed=seed) for seed in (3, 4)]
        for rank, cache in enumerate(caches):
            shard = pages_of(rows[0, rank * size : (rank + 1) * size], "LBHNC")
            write_tokens(shard, torch.arange(CHUNK), cache.keys, cache.values)
        chunk = TierChunk(b"name", 0, 0)
        jobs.store(1, [chunk])
        jobs.drain()
        jobs.load(2, [TierChunk(b"name", 1, 0)])
        jobs.drain()
        assert [end.success for end in jobs.take_ends()] == [True, True]
        assert len(set(jobs.keys(b"name"))) == 2
        for rank, cache in enumerate(caches):
            shard = pages_of(rows[1, rank * size : (rank + 1) * size], "LBHNC")
            assert relative_error(read_tokens(shard, torch.arange(CHUNK))[0], cache.keys) < 0.02
        jobs.load(3, [TierChunk(b"name", 1, None)], "r7")
        jobs.close()
        assert f"request r7: chunk {b'name'.hex()} is given up: InvalidArgument: the engine does not say" in caplog.text


OPAQUE = {
    "lossless": {},
    "windows": {"groups": 2},
    "pipelines": {"parallel": parallel(pp_size=2), "worker_kv_bytes_per_block": BLOCK_BYTES // 2},
    "latents": {"replicated_layout": True, "parallel": parallel(4, is_agnostic=False)},
    "fp8": {"model": SimpleNamespace(name="tiny", dtype="fp8")},
    "packed numbers": {"model": SimpleNamespace(name="tiny", dtype="fp8_ds_mla")},
    "odd rows": {"worker_kv_bytes_per_block": BLOCK_BYTES - 6},
}


@pytest.mark.parametrize("case", OPAQUE)
def test_rows_of_unknown_contents_come_back_bit_for_bit(tier_class, options, case):
    """In any order, and whatever stands before them: of windows vLLM asks for the last chunks alone."""
    made = spec(**{name: value for name, value in OPAQUE[case].items() if name != "groups"})
    made.config.groups *= OPAQUE[case].get("groups", 1)
    if case in ("lossless", "odd rows"):
        options = {name: options[name] for name in ("kvtc.store", "kvtc.identity")} | {"kvtc.lossless": True}
    rows = np.random.default_rng(0).integers(0, 256, (6, ROW_BYTES), np.uint8)
    truth = rows.copy()
    host = Host.__new__(Host)
    host.tier, host.n_jobs = tier_class(made, memoryview(rows.view(np.int8)), "KvtcTier", **options), 0
    context, keys = request(host.tier, "a", 3)
    assert host.job(keys, [2, 3, 4], context, is_load=False).success
    rows[:] = 0
    host.tier.on_request_finished(context)
    again, _ = request(host.tier, "b", 3)
    assert host.look(keys[2], again) is LookupResult.HIT
    assert host.job([keys[2], keys[0]], [0, 5], again, is_load=True).success
    used = ROW_BYTES - 64 - (48 if case == "odd rows" else 0)
    assert np.array_equal(rows[0, :used], truth[4, :used])
    assert np.array_equal(rows[5, :used], truth[2, :used])
    host.tier.shutdown()


def test_of_windows_each_chunk_is_found_by_itself(tier_class, options):
    made = spec()
    made.config.groups *= 2
    host = Host(tier_class, options)
    host.tier.shutdown()
    host.tier = tier_class(made, memoryview(host.rows.view(np.int8)), "KvtcTier", **options)
    context, keys = request(host.tier, "a", 3)
    assert host.job(keys[2:], [0], context, is_load=False).success
    assert host.look(keys[0], context) is LookupResult.MISS
    assert host.look(keys[2], context) is LookupResult.HIT
    host.tier.shutdown()


def test_a_canonical_row_is_coded_for_any_number_of_workers(tier_class, options):
    """Its bytes are those of one worker with all heads, so four workers load what one has saved."""
    cache, rows = truth(), np.zeros((2, ROW_BYTES), np.uint8)
    host = Host(tier_class, options)
    host.fill(0, cache, 0)
    context, keys = request(host.tier, "a", 1)
    assert host.job(keys, [0], context, is_load=False).success
    host.tier.shutdown()
    for tp_size in (1, 2):
        made = spec(tp_size=tp_size, canonical_layout=True, parallel=parallel(tp_size))
        host.tier = tier_class(made, memoryview(rows.view(np.int8)), "KvtcTier", **options)
        context, _ = request(host.tier, "b", 1)
        assert host.look(keys[0], context) is LookupResult.HIT
        assert host.job(keys, [1], context, is_load=True).success
        found, _ = read_tokens(pages_of(rows[1, : ROW_BYTES - 64], "LBNHC"), torch.arange(CHUNK))
        assert relative_error(found, cache.keys[:, :, :CHUNK]) < 0.02
        host.tier.shutdown()


def test_what_cannot_work_is_refused_at_start(tier_class, options):
    rows = memoryview(np.zeros((2, ROW_BYTES), np.int8))

    def start(changed=None, options=options, **more):
        tier_class(spec(**more), rows, "KvtcTier", **(options | (changed or {}))).shutdown()

    start()
    with pytest.raises(UnsupportedLayout, match=r"kvtc\.attention_backend"):
        start(options={name: value for name, value in options.items() if name != "kvtc.attention_backend"})
    with pytest.raises(InvalidArgument, match="either a ratio or a step or a kl"):
        start({"kvtc.kl": 0.001})
    with pytest.raises(InvalidArgument, match="unknown option root_dir"):
        start({"root_dir": "/"})
    with pytest.raises(UnsupportedLayout, match="LHBNC"):
        start(axes="LHBNC")
    with pytest.raises(UnsupportedLayout, match="a worker's block has 5 bytes"):
        start(worker_kv_bytes_per_block=5)
    with pytest.raises(GeometryMismatch, match="kv heads 2"):
        start(tp_size=2, worker_kv_bytes_per_block=BLOCK_BYTES)
    with pytest.raises(InvalidArgument, match="divisor of 256"):
        start(cache=SimpleNamespace(blocks_per_chunk=5))
    with pytest.raises(InvalidArgument, match="a row of host memory"):
        start(cache=SimpleNamespace(blocks_per_chunk=16))
