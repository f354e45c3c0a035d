"""kvtc's storage backend for SGLang, called as HiCache's controller calls one."""

from __future__ import annotations

import importlib

import pytest
import torch

from kvtc import inspect
from kvtc.errors import InvalidArgument, UnsupportedLayout, UnsupportedModel
from kvtc.store import open_store
from tests.builders import (
    HEAD_DIM,
    N_HEADS,
    N_LAYERS,
    measured_calibration,
    relative_error,
    told_cache,
)
from tests.failing import DECODE_ERRORS, ERRORS, break_decoding, break_store
from tests.fake_sglang import (
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    HostPool,
    PoolName,
    PoolTransfer,
    fake_sglang,
)

PAGE, N_PAGES = 64, 6
SIZES = (N_LAYERS, N_HEADS, HEAD_DIM)
KEYS = [f"hash-{index}" for index in range(N_PAGES)]
ALL = torch.arange(PAGE * N_PAGES)


@pytest.fixture
def make(base_options):
    """Opens a backend: changed configuration and host layout -> the backend, its pool filled with tokens 0 .. of a text."""
    options = base_options | {"backend_name": "kvtc", "kvtc.ratio": 8, "kvtc.max_tokens": 4096}

    def opened(layout: str = "layer_first", page: int = PAGE, sizes: tuple[int, int, int] = SIZES, **changed):
        config = HiCacheStorageConfig({**options, **changed.pop("options", {})}, **changed)
        backend = importlib.import_module("kvtc.engines.sglang.hicache").KvtcHiCache(config, {})
        pool = HostPool(layout, sizes, page, N_PAGES)
        if sizes == SIZES:
            cache = told_cache(page * N_PAGES, torch.bfloat16)
            pool.fill(cache.keys, cache.values)
        backend.register_mem_pool_host(pool)
        return backend, pool

    with fake_sglang():
        yield opened


@pytest.mark.parametrize("layout", ["layer_first", "page_first"])
@pytest.mark.parametrize("prefix", [[], None])
def test_pages_leave_host_memory_and_come_back_to_another_process(make, layout, prefix):
    backend, pool = make(layout)
    assert backend.batch_set_v1(KEYS[:5], ALL[: 5 * PAGE], HiCacheStorageExtraInfo(prefix)) == [True] * 5
    assert backend.counts["starts_searched"] == (0 if prefix == [] else 5)
    backend.close()
    other, _ = make(layout)
    expected = pool.kv_buffer.clone()
    other.register_mem_pool_host(pool)
    pool.kv_buffer.zero_()
    assert other.batch_exists(KEYS) == 5
    assert other.batch_get_v1(KEYS, ALL) == [True] * 5 + [False]
    kept = 5 * PAGE
    found, wanted = (
        buffer[:, :, :kept] if layout == "layer_first" else buffer[:, :kept] for buffer in (pool.kv_buffer, expected)
    )
    assert relative_error(found, wanted) < 0.1
    assert not pool.get_data_page(kept).any()
    other.close()


def test_a_quality_in_place_of_a_ratio(make, tmp_path):
    measured_calibration().save(tmp_path / "tiny.safetensors")
    for kl, expected in ((1e-3, 0), (1e-3, 2), (4e-3, 0)):
        backend, _ = make(options={"kvtc.ratio": None, "kvtc.kl": kl})
        assert backend.batch_exists(KEYS[:2]) == expected
        assert backend.batch_set_v1(KEYS[:2], ALL[: 2 * PAGE], HiCacheStorageExtraInfo([])) == [True] * 2
        backend.close()


def test_positions_count_from_the_pages_before(make, tmp_path):
    backend, _ = make()
    backend.batch_set_v1(KEYS[2:4], ALL[2 * PAGE : 4 * PAGE], HiCacheStorageExtraInfo(KEYS[:2]))
    with open_store(f"file://{tmp_path}/store") as store:
        assert sorted(inspect(store.get(key)).first_position for key in store.keys()) == [128, 192]  # noqa: SIM118


def test_layouts_share_their_streams(make):
    first, _ = make("layer_first")
    first.batch_set_v1(KEYS, ALL)
    second, pool = make("page_first")
    expected = pool.kv_buffer.clone()
    pool.kv_buffer.zero_()
    assert second.batch_get_v1(KEYS, ALL) == [True] * N_PAGES
    assert relative_error(pool.kv_buffer, expected) < 0.1


def test_flat_pages_go_the_same_way(make):
    """The calls of SGLang without `interface_v1`."""
    backend, pool = make()
    pages = [pool.get_data_page(index * PAGE) for index in range(2)]
    assert backend.batch_set(KEYS[:1], pages[:1])
    assert backend.set(KEYS[1], pages[1])
    assert (backend.exists(KEYS[1]), backend.exists(KEYS[2])) == (True, False)
    found = backend.batch_get(KEYS[:3])
    assert found[2] is None
    assert relative_error(torch.stack(found[:2]), torch.stack(pages)) < 0.1
    assert torch.equal(backend.get(KEYS[0]), found[0])


def test_other_pools_are_never_found(make):
    backend, _ = make()
    pages = PoolTransfer(PoolName.KV, ALL, KEYS)
    states = PoolTransfer(PoolName.MAMBA, ALL[:1], ["state"])
    assert backend.batch_set_v2([pages, states]) == {"kv": [True] * N_PAGES, "mamba": [False]}
    assert backend.batch_get_v2([pages, states]) == {"kv": [True] * N_PAGES, "mamba": [False]}
    assert backend.batch_exists_v2(KEYS).kv_hit_pages == N_PAGES
    found = backend.batch_exists_v2(KEYS, [states])
    assert (found.kv_hit_pages, found.extra_pool_hit_pages) == (0, {"mamba": 0})


def test_ranks_and_models_do_not_share_pages(make):
    backend, _ = make()
    backend.batch_set_v1(KEYS, ALL)
    other = {"kvtc.identity": "other"}, {"kvtc.namespace": "tenant"}
    for changed in (*({"options": one} for one in other), {"tp_rank": 1}, {"tp_size": 2}, {"pp_rank": 1}):
        assert make(**changed)[0].batch_exists(KEYS) == 0


def test_a_damaged_page_is_a_miss(make, tmp_path):
    backend, _ = make()
    backend.batch_set_v1(KEYS[:1], ALL[:PAGE])
    with open_store(f"file://{tmp_path}/store") as store:
        (key,) = store.keys()
        stream = bytearray(store.get(key))
        stream[-1] ^= 1
        store.put(key, stream)
    assert backend.batch_get_v1(KEYS[:1], ALL[:PAGE]) == [False]
    assert backend.batch_exists(KEYS[:1]) == 0


@pytest.mark.parametrize("error", ERRORS)
def test_whatever_a_store_raises_stays_out_of_the_threads_of_sglang(make, monkeypatch, error):
    backend, _ = make()
    with monkeypatch.context() as broken:
        break_store(broken, backend._pages.entries.store, error)
        assert backend.batch_set_v1(KEYS[:2], ALL[: 2 * PAGE]) == [False, False]
        assert backend.batch_get_v1(KEYS[:2], ALL[: 2 * PAGE]) == [False, False]
        assert backend.batch_exists(KEYS[:2]) == 0
    assert (backend.counts["save_errors"], backend.counts["misses"], backend.counts["store_errors"]) == (2, 2, 4)
    assert backend.batch_set_v1(KEYS[:2], ALL[: 2 * PAGE]) == [True, True]
    with monkeypatch.context() as broken:
        break_decoding(broken, DECODE_ERRORS[0])
        assert backend.batch_get_v1(KEYS[:2], ALL[: 2 * PAGE]) == [False, False]
    assert backend.counts["decode_errors"] == 2
    assert backend.batch_get_v1(KEYS[:2], ALL[: 2 * PAGE]) == [True, True]
    backend.close()


def test_what_cannot_work_is_refused(make):
    with pytest.raises(UnsupportedModel, match="MLA"):
        make(is_mla_model=True)
    with pytest.raises(UnsupportedModel, match="context-parallel"):
        make(attn_cp_size=2)
    with pytest.raises(InvalidArgument, match="pages of 48 tokens"):
        make(page=48)
    with pytest.raises(InvalidArgument, match="this rank holds 5 layers of 2"):
        make(sizes=(5, N_HEADS, HEAD_DIM))
    with pytest.raises(UnsupportedLayout, match="host layout 'page_unified'"):
        make("page_unified")
    with pytest.raises(InvalidArgument, match="either a ratio or a step or a kl"):
        make(options={"kvtc.kl": 0.001})
    with pytest.raises(InvalidArgument, match=r"unknown option kvtc\.calibrations"):
        make(options={"kvtc.calibrations": "x"})
