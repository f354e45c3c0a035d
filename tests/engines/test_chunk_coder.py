"""Chunks of cache servers as streams: positions told or found, sizes fixed or free, and a store behind them."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

from kvtc import inspect
from kvtc.engines.chunk_coder import ChunkCoder, ChunkSettings, FixedChunkCoder
from kvtc.engines.lmcache.settings import LmcacheSettings, WorkerCoders, worker_of
from kvtc.engines.page_layout import lmcache_layout
from kvtc.engines.position_search import KnownStarts, check_fit, find_start
from kvtc.engines.served_model import ServedModel
from kvtc.engines.stored_chunks import StoredChunks
from kvtc.engines.tasks import Tasks
from kvtc.errors import CorruptStream, GeometryMismatch, InvalidArgument, StoreUnavailable, UnsupportedLayout
from kvtc.store import open_store
from tests.builders import HEAD_DIM, N_HEADS, N_LAYERS, joint_calibration, relative_error, told_cache
from tests.failing import DECODE_ERRORS, break_decoding

T = 256
SHAPE = (2, N_LAYERS, T, N_HEADS * HEAD_DIM)


def chunk(start: int, dtype: torch.dtype = torch.bfloat16, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    """Tokens start .. start + T - 1 of a text as LMCache holds them."""
    cache = told_cache(start + T, dtype)
    rows = [side[:, :, start:].transpose(1, 2) for side in (cache.keys, cache.values)]  # [L, T, H, D]
    return (torch.stack(rows) if shape[0] == 2 else torch.cat(rows, dim=-1)).reshape(shape)


def settings(**changed) -> ChunkSettings:
    return ChunkSettings("reference", "memory:", **({"ratio": 8, "max_tokens": 4096} | changed))


def joint_alone():
    """A calibration that does not serve the profile paper."""
    return replace(joint_calibration(), key=None, value=None, conditional=None)


def coder(kind: type = ChunkCoder, **changed):
    def layout_of(shape):
        return lmcache_layout(shape, N_LAYERS, N_HEADS, HEAD_DIM)

    return kind(joint_calibration(), settings(**changed), layout_of, T)


@pytest.mark.parametrize("start", [0, 256, 1024, 3072])
def test_a_position_that_nobody_tells_is_found(start):
    cache = told_cache(start + T)
    for calibration in (joint_calibration(), joint_alone()):
        assert find_start(cache.keys[:, :, start:], calibration, T, 4096) == start


@pytest.mark.parametrize("kind", [ChunkCoder, FixedChunkCoder])
@pytest.mark.parametrize("start", [0, 512])
def test_a_chunk_comes_back_wherever_it_stands(kind, start):
    data, found = chunk(start), torch.zeros(SHAPE, dtype=torch.bfloat16)
    either = coder(kind)
    told, searched = either.encode(data, start), either.encode(data)
    assert told == searched
    either.decode(told, found)
    assert relative_error(found, data) < 0.1


@pytest.mark.parametrize("kind", [ChunkCoder, FixedChunkCoder])
def test_keys_that_do_not_fit_the_calibration_are_refused(kind):
    either = coder(kind)
    with pytest.raises(UnsupportedLayout, match="not at position 256"):
        either.encode(chunk(512), 256)
    fused = (1, N_LAYERS, T, 2 * N_HEADS * HEAD_DIM)
    with pytest.raises(UnsupportedLayout, match="times as far"):
        either.encode(chunk(256).reshape(fused), 256)
    with pytest.raises(UnsupportedLayout, match="another model"):
        either.encode(9 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)))


def test_a_calibration_for_joint_alone_tells_keys_that_fit():
    cache = told_cache(3 * T)
    keys, values = cache.keys[:, :, T : 2 * T], cache.values[:, :, T : 2 * T]
    check_fit(keys, values, joint_alone(), T)
    for its_keys, its_values, start in (
        (keys, values, 2 * T),
        (keys.roll(1, dims=0), values, T),
        (keys, keys, T),
        (keys.roll(3, dims=-1), values, T),
    ):
        with pytest.raises(UnsupportedLayout, match="times as far"):
            check_fit(its_keys, its_values, joint_alone(), start)


def test_the_order_of_axes_does_not_matter_to_a_stream():
    shapes = [SHAPE, (1, N_LAYERS, T, 2 * N_HEADS * HEAD_DIM), (N_LAYERS, T, 2 * N_HEADS * HEAD_DIM)]
    streams = {coder().encode(chunk(256, shape=shape), 256) for shape in shapes}
    assert len(streams) == 1


@pytest.mark.parametrize("ratio", [2, 8, 16, 60, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fixed_chunks_have_the_promised_size(ratio, dtype):
    fixed = coder(FixedChunkCoder, ratio=ratio)
    size = fixed.size(SHAPE, dtype)
    assert {len(fixed.encode(chunk(start, dtype), start)) for start in (0, 256, 512)} == {size}
    if ratio < 50:
        assert size <= chunk(0).numel() * 2 / ratio + 100


def test_the_first_chunk_keeps_its_sinks_in_a_fixed_size():
    fixed, data, found = coder(FixedChunkCoder), chunk(0), torch.zeros(SHAPE, dtype=torch.bfloat16)
    fixed.decode(fixed.encode(data, 0), found)
    assert torch.equal(found[:, :, :4], data[:, :, :4])


def test_damaged_bytes_are_refused():
    fixed, found = coder(FixedChunkCoder), torch.zeros(SHAPE, dtype=torch.bfloat16)
    framed = bytearray(fixed.encode(chunk(256), 256))
    with pytest.raises(CorruptStream, match="is said to lie in 100 bytes"):
        fixed.decode(bytes(framed[:100]), found)
    with pytest.raises(CorruptStream):
        fixed.decode(b"\0\0", found)
    framed[len(framed) // 2] ^= 1
    with pytest.raises(CorruptStream):
        fixed.decode(bytes(framed), found)


def test_what_the_calibration_does_not_cover_is_kept_exactly(caplog):
    either = coder()
    for data in (
        chunk(0).to(torch.float8_e4m3fn),
        torch.randn(3, 5),
        torch.arange(40, dtype=torch.int16).reshape(2, 20),
    ):
        stream, found = either.encode(data), torch.zeros_like(data)
        assert (inspect(stream).profile, either.needs_start(data)) == ("lossless", False)
        either.decode(stream, found)
        assert torch.equal(found.view(torch.uint8), data.view(torch.uint8))
    assert "a chunk that the calibration does not cover is kept without loss" in caplog.text
    with pytest.raises(GeometryMismatch, match=r"keeps numbers of torch\.float32; expected torch\.float16"):
        either.decode(either.encode(torch.randn(3, 5)), torch.zeros(3, 5, dtype=torch.float16))
    with pytest.raises(UnsupportedLayout, match=r"numbers of torch\.int64; kvtc keeps numbers of 1, 2 or 4 bytes"):
        either.encode(torch.zeros(3, 5, dtype=torch.int64))


def test_what_cannot_be_coded_is_refused():
    for data in (chunk(0).to(torch.float8_e4m3fn), torch.zeros(3, 5)):
        with pytest.raises(UnsupportedLayout, match=r"its scales are not known|LMCache chunk of shape"):
            coder(FixedChunkCoder).encode(data, 0)
    for name in ("step", "kl"):
        with pytest.raises(InvalidArgument, match=rf"fixed size need kvtc\.ratio, not kvtc\.{name}"):
            coder(FixedChunkCoder, **{"ratio": None, name: 0.01})
    with pytest.raises(InvalidArgument, match="of the profile joint"):
        coder(FixedChunkCoder, profile="paper")


def test_options_of_the_servers():
    given = {"kvtc.calibration": "reference", "kvtc.store": "memory:"}
    options = LmcacheSettings.from_config(
        {**given, "kvtc.packing": "vec", "kvtc.page_tokens": 32, "kvtc.ratio": 4, "x": 1}
    )
    assert (options.packing, options.page_tokens, options.max_tokens, options.ratio) == ("vec", 32, 131072, 4)
    for wrong, message in (
        ({"kvtc.packing": "tight"}, r"kvtc\.packing is 'tight'; expected one of split, vec, amx"),
        ({"kvtc.page_tokens": 0}, r"kvtc\.page_tokens is 0; expected at least 1"),
        ({"kvtc.threads": True}, r"kvtc\.threads is True; expected at least 1"),
        ({"kvtc.model": ""}, r"kvtc\.model is ''; expected text"),
        ({"kvtc.check_model": "no"}, r"kvtc\.check_model is 'no'; expected true or false"),
        ({"kvtc.profile": "conditional"}, r"kvtc\.profile is 'conditional'; expected one of auto, paper, joint"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            LmcacheSettings.from_config({**given, **wrong})
    with pytest.raises(InvalidArgument, match=r"unknown option kvtc\.store"):
        LmcacheSettings.from_config(given, needs_store=False)
    with pytest.raises(InvalidArgument, match=r"must give kvtc\.store"):
        LmcacheSettings.from_config({"kvtc.calibration": "reference"})


def test_workers_of_a_server_have_calibrations_of_their_own(tmp_path):
    joint_calibration().save(tmp_path / "tiny-1.safetensors")
    config = {"kvtc.calibration": f"{tmp_path}/tiny-{{tp_rank}}.safetensors", "kvtc.identity": "tiny"}
    options = LmcacheSettings.from_config(config, needs_store=False)
    model, worker = ServedModel.of(options, None), worker_of(2 << 24 | 1 << 16 | 2 << 8 | 1)
    coders = WorkerCoders(ChunkCoder, options, model, worker)
    assert coders.of(1) is coders.of(worker)
    with pytest.raises(FileNotFoundError, match="tiny-0"):
        coders.of(0)


def test_known_starts_forget_the_oldest():
    starts = KnownStarts(capacity=3)
    starts.learn([b"a", b"b"], 256)
    starts.learn([b"a", b"c", b"d"], 256)
    assert [starts.get(name) for name in (b"a", b"b", b"c", b"d")] == [0, None, 256, 512]


class BrokenStore:
    """A store whose server is gone."""

    def __getattr__(self, name):
        def refuse(*_):
            raise StoreUnavailable(f"{name}: no server")

        return refuse


def stored(store=None) -> StoredChunks:
    return StoredChunks(store or open_store("memory:"), lambda _: coder(), b"tiny")


def test_chunks_are_saved_once_and_loaded():
    chunks, data = stored(), [chunk(0), chunk(256)]
    keys = [chunks.key(0, chunk=name) for name in ("aa", "bb")]
    sizes = [chunks.save(0, key, item, start) for key, item, start in zip(keys, data, (0, None), strict=True)]
    assert all(sizes)
    assert chunks.save(0, keys[0], data[0], 0) == 0
    assert chunks.n_stored([*keys, chunks.key(0, chunk="cc")]) == 2
    found = [torch.zeros(SHAPE, dtype=torch.bfloat16) for _ in range(3)]
    asked = [*keys, chunks.key(0, chunk="cc")]
    assert [chunks.load(0, key, item) for key, item in zip(asked, found, strict=True)] == [True, True, False]
    assert relative_error(torch.stack(found[:2]), torch.stack(data)) < 0.1
    counts = chunks.counts.read()
    assert (counts["entries_saved"], counts["entries_shared"], counts["starts_searched"]) == (2, 1, 1)
    assert (counts["bytes_saved"], counts["original_bytes"]) == (sum(sizes), 2 * data[0].numel() * 2)
    assert (counts["entries_loaded"], counts["misses"]) == (2, 1)


def test_an_entry_that_cannot_be_decoded_is_a_miss_and_deleted(caplog):
    store = open_store("memory:")
    chunks = stored(store)
    key = chunks.key(0, chunk="aa")
    chunks.save(0, key, chunk(0), 0)
    stream = bytearray(store.get(key))
    stream[len(stream) // 2] ^= 1
    store.put(key, stream)
    assert not chunks.load(0, key, torch.zeros(SHAPE, dtype=torch.bfloat16))
    assert "is deleted" in caplog.text
    assert chunks.n_stored([key]) == 0
    assert chunks.counts.read()["damaged"] == 1


def test_a_stream_of_other_tokens_than_asked_for_is_a_miss():
    store = open_store("memory:")
    chunks = stored(store)
    chunks.save(0, chunks.key(0, chunk="aa"), chunk(0)[:, :, :128], 0)
    assert not chunks.load(0, chunks.key(0, chunk="aa"), torch.zeros(SHAPE, dtype=torch.bfloat16))


def test_a_store_that_does_not_answer_makes_misses(caplog):
    chunks = stored(BrokenStore())
    assert chunks.save(0, "chunk/a", chunk(0), 0) is None
    assert chunks.n_stored(["chunk/a"]) == 0
    assert not chunks.load(0, "chunk/a", torch.zeros(SHAPE))
    chunks.delete("chunk/a")
    counts = chunks.counts.read()
    assert (counts["save_errors"], counts["store_errors"], counts["misses"]) == (1, 4, 1)
    assert "no server" in caplog.text


@pytest.mark.parametrize("error", DECODE_ERRORS)
def test_a_chunk_that_there_is_no_memory_for_stays(monkeypatch, error):
    store = open_store("memory:")
    chunks, data = stored(store), torch.zeros(SHAPE, dtype=torch.bfloat16)
    key = chunks.key(0, chunk="aa")
    chunks.save(0, key, chunk(0), 0)
    with monkeypatch.context() as broken:
        break_decoding(broken, error)
        assert not chunks.load(0, key, data)
    assert (chunks.counts.read()["decode_errors"], chunks.counts.read()["damaged"]) == (1, 0)
    assert chunks.load(0, key, data)


def test_what_a_stream_depends_on_is_in_its_key():
    def key(scope=b"tiny", salt="", **changed):
        return StoredChunks(open_store("memory:"), lambda _: coder(**changed), scope).key(0, chunk="aa", salt=salt)

    assert len({key(), key(scope=b"other"), key(salt="tenant"), key(ratio=4), key(ratio=None, step=0.1)}) == 5
    assert inspect(coder().encode(chunk(256), 256)).profile == "joint"


def test_a_task_that_raises_ends_as_failed(caplog):
    told = threading.Semaphore(0)
    tasks = Tasks[int, str]("the test", "kvtc-test", notify=told.release)
    tasks.submit(5, lambda: "done", "failed")
    tasks.submit(6, lambda: 1 // 0, "failed")
    assert tasks.is_busy
    tasks.drain()
    told.acquire(timeout=10)
    told.acquire(timeout=10)
    assert (tasks.take(5), tasks.take(5)) == ("done", None)
    assert tasks.is_busy
    assert tasks.take_all() == {6: "failed"}
    assert not tasks.is_busy
    assert "the test: task " in caplog.text
    assert "ZeroDivisionError" in caplog.text
    tasks.close()
    with pytest.raises(StoreUnavailable, match="the test is closed"):
        tasks.submit(7, lambda: "late", "failed")
    assert not tasks.is_busy


def test_a_task_ends_even_with_the_program():
    tasks = Tasks[int, str]("the test", "kvtc-test")

    def leave():
        raise SystemExit

    tasks.submit(0, leave, "failed")
    tasks.drain()
    assert tasks.take(0) == "failed"
    tasks.close()
