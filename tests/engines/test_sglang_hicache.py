"""kvtc's storage backend for SGLang, called as HiCache's controller calls one."""

from __future__ import annotations

import importlib
import logging
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from kvtc import inspect
from kvtc.calibration.artifact import CodedGroup
from kvtc.errors import InvalidArgument, UnsupportedLayout, UnsupportedModel
from kvtc.store import open_store
from tests.builders import (
    HEAD_DIM,
    N_HEADS,
    N_LAYERS,
    joint_calibration,
    measured_calibration,
    relative_error,
    same_bits,
    told_cache,
)
from tests.failing import DECODE_ERRORS, ERRORS, break_decoding, break_store
from tests.fake_sglang import (
    EmptyPool,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    HostPool,
    LatentPool,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
    StatePool,
    UnequalPool,
    fake_sglang,
)

TRAILING = PoolHitPolicy.TRAILING_PAGES
PAGE, N_PAGES = 64, 6
SIZES = (N_LAYERS, N_HEADS, HEAD_DIM)
KEYS = [f"hash-{index}" for index in range(N_PAGES)]
ALL = torch.arange(PAGE * N_PAGES)


@pytest.fixture
def make(base_options):
    """Opens a backend: changed configuration and host layout -> the backend, its pool filled with tokens 0 .. of a text."""
    options = base_options | {"backend_name": "kvtc", "kvtc.ratio": 8, "kvtc.max_tokens": 4096}

    def opened(
        layout: str = "layer_first", page: int = PAGE, sizes: tuple[int, int, int] = SIZES, pool=None, **changed
    ):
        config = HiCacheStorageConfig({**options, **changed.pop("options", {})}, **changed)
        backend = importlib.import_module("kvtc.engines.sglang.hicache").KvtcHiCache(config, {})
        if pool is None:
            pool = HostPool(layout, sizes, page, N_PAGES)
            if sizes == SIZES:
                cache = told_cache(page * N_PAGES, torch.bfloat16)
                pool.fill(cache.keys, cache.values)
        backend.register_mem_pool_host(pool)
        return backend, pool

    with fake_sglang():
        yield opened


@pytest.fixture
def make_exact(make):
    """As `make`, with `kvtc.lossless` in place of a calibration."""
    exact = {"kvtc.calibration": None, "kvtc.ratio": None, "kvtc.lossless": True}
    return lambda **changed: make(**{**changed, "options": {**exact, **changed.get("options", {})}})


def fill_with_bytes(*buffers: torch.Tensor) -> list[torch.Tensor]:
    """Any bytes at all, NaN and infinities among them -> copies."""
    for number, buffer in enumerate(buffers):
        generator = torch.Generator().manual_seed(number)
        raw = torch.randint(0, 256, (buffer.nbytes,), dtype=torch.uint8, generator=generator)
        buffer.copy_(raw.view(buffer.dtype).reshape(buffer.shape))
    return [buffer.clone() for buffer in buffers]


def with_window(tmp_path) -> None:
    """The calibration of the tiny model, and the same again for a window of as many layers behind them."""
    first = joint_calibration()
    geometry = replace(
        first.geometry, layers=tuple(layer + N_LAYERS for layer in first.geometry.layers), is_window=True
    )
    assert first.joint is not None
    replace(first, further=(CodedGroup(geometry, deepcopy(first.joint), None),), conditional=None).save(
        tmp_path / "tiny.safetensors"
    )


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


@pytest.mark.parametrize("layout", ["layer_first", "page_first"])
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8]
)
def test_without_losses_pages_of_any_numbers_come_back_bit_for_bit(make_exact, layout, dtype):
    pool = HostPool(layout, (2, 3, 8), 48, 3, dtype)
    (expected,) = fill_with_bytes(pool.kv_buffer)
    keys, slots = KEYS[:3], torch.arange(144)
    backend, _ = make_exact(pool=pool)
    assert backend.batch_set_v1(keys, slots, HiCacheStorageExtraInfo(["before"])) == [True] * 3
    assert backend.counts["starts_searched"] == 0
    backend.close()
    other, _ = make_exact(pool=pool)
    pool.kv_buffer.zero_()
    assert other.batch_get_v1(keys, slots) == [True] * 3
    assert same_bits(pool.kv_buffer, expected)
    assert make_exact(pool=HostPool(layout, (2, 3, 8), 48, 3, torch.int8))[0].batch_exists(keys) == 0


def test_without_losses_layouts_share_their_streams(make_exact):
    first, pool = make_exact(layout="layer_first")
    first.batch_set_v1(KEYS, ALL)
    second, other = make_exact(layout="page_first", pool=HostPool("page_first", SIZES, PAGE, N_PAGES))
    assert second.batch_get_v1(KEYS, ALL) == [True] * N_PAGES
    assert same_bits(other.kv_buffer.transpose(1, 2).contiguous(), pool.kv_buffer)


@pytest.mark.parametrize("layout", ["layer_first", "page_first"])
@pytest.mark.parametrize("options", [{}, {"kvtc.lossless": True, "kvtc.calibration": None, "kvtc.ratio": None}])
def test_latents_are_kept_as_they_are_once_for_all_ranks(make, caplog, layout, options):
    caplog.set_level(logging.INFO)
    pool = LatentPool(layout, 3, 72, PAGE, N_PAGES, torch.bfloat16)
    (expected,) = fill_with_bytes(pool.kv_buffer)
    backend, _ = make(pool=pool, options=options, is_mla_model=True, tp_size=2)
    assert backend.batch_set_v1(KEYS, ALL) == [True] * N_PAGES
    assert "kept bit for bit: latents" in caplog.text
    pool.kv_buffer.zero_()
    other, _ = make(pool=pool, options=options, is_mla_model=True, tp_size=2, tp_rank=1)
    assert other.batch_get_v1(KEYS, ALL) == [True] * N_PAGES
    assert same_bits(pool.kv_buffer, expected)
    states = StatePool(2, 3)
    for which in (backend, other):
        which.register_mem_host_pool_v2(states, PoolName.MAMBA)
    one = PoolTransfer(PoolName.MAMBA, ALL[:1], KEYS[:1], TRAILING)
    assert backend.batch_set_v2([one]) == {"mamba": [True]}
    assert other.batch_get_v2([one]) == {"mamba": [False]}  # each rank has states of its own


def test_a_page_of_8_bits_with_unknown_scales_is_kept_as_it_is(make, caplog):
    caplog.set_level(logging.INFO)
    pool = HostPool("page_first", (5, 1, 8), PAGE, N_PAGES, torch.uint8)
    (expected,) = fill_with_bytes(pool.kv_buffer)
    backend, _ = make(pool=pool)
    assert "kept bit for bit: numbers of 8 bits" in caplog.text
    backend.batch_set_v1(KEYS, ALL)
    pool.kv_buffer.zero_()
    backend.batch_get_v1(KEYS, ALL)
    assert same_bits(pool.kv_buffer, expected)


def test_all_pools_of_a_model_come_back(make):
    """Keys and values are coded, states and what has another form come back bit for bit."""
    backend, pool = make()
    states, unequal = StatePool(4, 9), UnequalPool(PAGE, N_PAGES)
    exact = fill_with_bytes(*states.buffers, *unequal.buffers)
    transfers = [
        PoolTransfer(PoolName.KV, ALL, KEYS),
        PoolTransfer(PoolName.MAMBA, torch.tensor([2]), KEYS[-1:], TRAILING),
        PoolTransfer(PoolName.DRAFT, ALL, KEYS),
    ]
    expected = pool.kv_buffer.clone()
    for which in (backend, make(pool=pool)[0]):
        which.register_mem_host_pool_v2(pool, PoolName.KV)
        which.register_mem_host_pool_v2(states, PoolName.MAMBA)
        which.register_mem_host_pool_v2(unequal, PoolName.DRAFT)
        done = {"kv": [True] * N_PAGES, "mamba": [True], "draft": [True] * N_PAGES}
        if which is backend:
            assert which.batch_set_v2(transfers, HiCacheStorageExtraInfo([])) == done
            for buffer in (pool.kv_buffer, *states.buffers, *unequal.buffers):
                buffer.zero_()
        else:
            found = which.batch_exists_v2(KEYS, transfers[1:])
            assert (found.kv_hit_pages, found.restorable_prefix_pages) == (N_PAGES, [N_PAGES])
            assert found.extra_pool_hit_pages == {"kv": N_PAGES, "mamba": N_PAGES, "draft": N_PAGES}
            assert which.batch_get_v2(transfers) == done
        which.close()
    assert 0 < relative_error(pool.kv_buffer, expected) < 0.1
    for buffer, whole in zip(states.buffers, exact, strict=False):
        assert same_bits(buffer[2], whole[2])
        assert not buffer[0].any()
    assert all(same_bits(buffer, whole) for buffer, whole in zip(unequal.buffers, exact[2:], strict=True))


@pytest.mark.parametrize(
    ("page", "dim", "dtype"), [(7, 101, torch.uint8), (1, 101, torch.float16), (64, 3, torch.int64)]
)
def test_a_page_of_an_odd_size_comes_back(make_exact, page, dim, dtype):
    pool, slots = LatentPool("page_first", 1, dim, page, 3, dtype), torch.arange(3 * page)
    (expected,) = fill_with_bytes(pool.kv_buffer)
    backend, _ = make_exact(pool=pool)
    assert backend.set(KEYS[0], pool.get_data_page(0))
    assert same_bits(backend.get(KEYS[0]), expected.flatten()[: page * dim])
    assert backend.batch_set_v1(KEYS[:3], slots) == [True] * 3
    pool.kv_buffer.zero_()
    assert backend.batch_get_v1(KEYS[:3], slots) == [True] * 3
    assert same_bits(pool.kv_buffer, expected)


def test_only_a_prefix_that_every_pool_can_restore_is_found(make_exact):
    """Windows and states are stored where requests ended. The longest end of each is no common end."""
    backend, pool = make_exact()
    backend.register_mem_host_pool_v2(pool, PoolName.SWA)
    backend.register_mem_host_pool_v2(StatePool(N_PAGES, 1), PoolName.MAMBA)
    backend.register_mem_host_pool_v2(pool, PoolName.INDEXER)
    backend.batch_set_v1(KEYS[:5], ALL[: 5 * PAGE])

    def store(name, *numbers):
        slots = (
            torch.cat([ALL[number * PAGE :][:PAGE] for number in numbers]) if name != "mamba" else torch.tensor(numbers)
        )
        backend.batch_set_v2([PoolTransfer(PoolName(name), slots, [KEYS[number] for number in numbers], TRAILING)])

    store("swa", 0, 1, 3, 4)  # windows of two pages end at 1, 2 and 5 pages
    store("mamba", 1, 2)  # states stand behind 2 and 3 pages
    store("indexer", 0, 1, 2, 3)
    window = PoolTransfer(PoolName.SWA, None, ["?", "?"], TRAILING)
    state = PoolTransfer(PoolName.MAMBA, None, ["?"], TRAILING)
    indexer = PoolTransfer(PoolName.INDEXER)
    draft = PoolTransfer(PoolName.DRAFT)
    groups = PoolTransfer(PoolName.DRAFT, hit_policy=PoolHitPolicy.BLOCK_GROUPS)
    cases = [
        ([], 5, [1, 2, 3, 4, 5], {"kv": 5}),
        ([window], 5, [1, 2, 5], {"kv": 5, "swa": 5}),
        ([state], 3, [2, 3], {"kv": 5, "mamba": 3}),
        ([indexer], 4, [1, 2, 3, 4], {"kv": 5, "indexer": 4}),
        ([window, state], 2, [2], {"kv": 5, "swa": 5, "mamba": 3}),
        ([window, state, indexer, groups], 2, [2], {"kv": 5, "swa": 5, "mamba": 3, "indexer": 4}),
        ([draft], 0, [], {"kv": 5}),
    ]
    for transfers, n_pages, restorable, hits in cases:
        found = backend.batch_exists_v2(KEYS, transfers)
        assert (found.kv_hit_pages, found.restorable_prefix_pages, found.extra_pool_hit_pages) == (
            n_pages,
            restorable,
            hits,
        )
    assert backend.batch_exists_v2(["other"], [window]).extra_pool_hit_pages == {}


def test_a_pool_that_stands_for_others_hinders_nothing(make_exact):
    backend, _ = make_exact(pool=EmptyPool(PAGE))
    backend.register_mem_host_pool_v2(HostPool("page_first", SIZES, PAGE, N_PAGES), PoolName.SWA)
    assert backend.batch_set_v1(KEYS, ALL) == [True] * N_PAGES
    assert backend.batch_get_v1(KEYS, ALL) == [True] * N_PAGES
    assert backend.set(KEYS[0], torch.empty(0))
    assert backend.get(KEYS[0]).numel() == 0
    assert backend.batch_exists(KEYS) == N_PAGES
    assert backend.batch_exists_v2(KEYS, [PoolTransfer(PoolName.SWA)]).kv_hit_pages == 0
    backend.batch_set_v2([PoolTransfer(PoolName.SWA, ALL[: 2 * PAGE], KEYS[:2])])
    assert backend.batch_exists_v2(KEYS, [PoolTransfer(PoolName.SWA)]).kv_hit_pages == 2


def test_a_window_that_the_calibration_covers_is_coded(make, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with_window(tmp_path)
    backend, pool = make()
    backend.register_mem_host_pool_v2(pool, PoolName.SWA)
    backend.register_mem_host_pool_v2(pool, PoolName.DRAFT)
    assert caplog.text.count("coded with the calibration") == 2
    assert "the calibration does not cover them" in caplog.text
    expected = pool.kv_buffer.clone()
    window = PoolTransfer(PoolName.SWA, ALL[2 * PAGE : 4 * PAGE], KEYS[2:4], TRAILING)
    assert backend.batch_set_v2([window], HiCacheStorageExtraInfo(KEYS[:2])) == {"swa": [True, True]}
    with open_store(f"file://{tmp_path}/store") as store:
        assert sorted(inspect(store.get(key)).first_position for key in store.keys()) == [128, 192]  # noqa: SIM118
    pool.kv_buffer.zero_()
    assert backend.batch_exists(KEYS) == 0
    assert backend.batch_get_v2([window]) == {"swa": [True, True]}
    span = slice(2 * PAGE, 4 * PAGE)
    assert 0 < relative_error(pool.kv_buffer[:, :, span], expected[:, :, span]) < 0.1


def test_slots_that_are_not_pages_are_left_alone(make_exact):
    backend, pool = make_exact()
    (expected,) = fill_with_bytes(pool.kv_buffer)
    calls = [
        PoolTransfer(PoolName.KV, ALL[: PAGE + 1], KEYS[:1]),
        PoolTransfer(PoolName.KV, None, KEYS[:1]),
        PoolTransfer(PoolName.SWA, ALL[:PAGE], KEYS[:1]),
    ]
    for call in calls:
        assert backend.batch_set_v2([call]) == {call.name: [False]}
        assert backend.batch_get_v2([call]) == {call.name: [False]}
    assert same_bits(pool.kv_buffer, expected)


def test_ranks_and_models_do_not_share_pages(make):
    backend, _ = make()
    backend.batch_set_v1(KEYS, ALL)
    other = {"kvtc.identity": "other"}, {"kvtc.namespace": "tenant"}
    ranks = [{name: 1} for name in ("tp_rank", "pp_rank")] + [{name: 2} for name in ("tp_size", "pp_size")]
    for changed in (*({"options": one} for one in other), *ranks):
        assert make(**changed)[0].batch_exists(KEYS) == 0


def test_context_parallel_ranks_have_pages_of_their_own(make_exact):
    make_exact(attn_cp_size=2)[0].batch_set_v1(KEYS, ALL)
    assert make_exact(attn_cp_size=2)[0].batch_exists(KEYS) == N_PAGES
    assert make_exact(attn_cp_size=2, attn_cp_rank=1)[0].batch_exists(KEYS) == 0


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
    with pytest.raises(UnsupportedModel, match="context-parallel"):
        make(attn_cp_size=2)
    with pytest.raises(InvalidArgument, match="pages of 48 tokens"):
        make(page=48)
    with pytest.raises(InvalidArgument, match="this rank holds 5 layers of 2"):
        make(sizes=(5, N_HEADS, HEAD_DIM))
    with pytest.raises(UnsupportedLayout, match="host layout 'page_unified'"):
        make("page_unified")
    backend, _ = make()
    packed = UnequalPool(PAGE, 1)
    packed.layout = "layer_first"
    with pytest.raises(UnsupportedLayout, match=r"pool draft .* gives its pages to no storage backend"):
        backend.register_mem_host_pool_v2(packed, PoolName.DRAFT)
    with pytest.raises(InvalidArgument, match=r"must give kvtc\.calibration"):
        make(options={"kvtc.calibration": None})
    with pytest.raises(InvalidArgument, match="either a ratio or a step or a kl"):
        make(options={"kvtc.kl": 0.001})
    with pytest.raises(InvalidArgument, match=r"unknown option kvtc\.calibrations"):
        make(options={"kvtc.calibrations": "x"})
