"""SGLang's own pools of host memory and its cache controller on a CPU, filled with any bytes, and what a kvtc backend gives back.

`sglang_round_trip.py` runs this in SGLang's environment. Pages without losses are compared byte by byte, with a digest for each.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm_end_to_end import expect

PAGE, N_PAGES = 64, 2
LAYERS, HEADS, DIM = 3, 2, 32
MHA_LAYOUTS = ("layer_first", "page_first", "page_first_direct", "page_head")
MLA_LAYOUTS = ("layer_first", "page_first", "page_first_direct")
LOSSLESS = {"kvtc.lossless": True, "kvtc.identity": "bytes"}


def say_that_there_is_one_rank() -> None:
    """What a server's settings tell SGLang."""
    from sglang.srt.runtime_context import get_parallel

    ranks = ("tp_rank", "pp_rank", "attn_dcp_rank", "attn_tp_rank")
    sizes = ("tp_size", "pp_size", "attn_dcp_size", "attn_tp_size")
    get_parallel().override_permanently(**dict.fromkeys(ranks, 0), **dict.fromkeys(sizes, 1))


def bring_back_all_kinds() -> None:
    """Pools of every kind that can be made here, through one backend that writes and another that reads."""
    from sglang.srt.mem_cache.hicache_storage import PoolName

    kinds: list[tuple[str, str, Any]] = [
        (f"heads, {layout}, {str(dtype).removeprefix('torch.')}", PoolName.KV, mha_pool(layout, dtype))
        for layout in MHA_LAYOUTS
        for dtype in (torch.bfloat16, torch.float8_e4m3fn)
    ]
    kinds += [
        (f"heads, page_first, {str(dtype).removeprefix('torch.')}", PoolName.KV, mha_pool("page_first", dtype))
        for dtype in (torch.float16, torch.float32, torch.float8_e5m2)
    ]
    kinds += [(f"latents, {layout}, bfloat16", PoolName.KV, mla_pool(layout, torch.bfloat16)) for layout in MLA_LAYOUTS]
    kinds += [
        ("latents, page_first, float8_e4m3fn", PoolName.KV, mla_pool("page_first", torch.float8_e4m3fn)),
        (
            "keys and values of unequal width, page_first, bfloat16",
            PoolName.KV,
            mha_pool("page_first", torch.bfloat16, 24),
        ),
        (
            "keys and values of unequal width, page_first_direct, bfloat16",
            PoolName.KV,
            mha_pool("page_first_direct", torch.bfloat16, 24),
        ),
        ("indexer, page_first, uint8", PoolName.INDEXER, indexer_pool("page_first")),
        ("indexer, layer_first, uint8", PoolName.INDEXER, indexer_pool("layer_first")),
        ("states of float32 and bfloat16", PoolName.MAMBA, state_pool()),
    ]
    for kind, name, pool in kinds:
        n_bytes, n_stored = bring_back(name, pool)
        print(
            f"  {kind}: {pool_pages(pool)} pages, {n_bytes} bytes stored in {n_stored}; every byte and digest as before"
        )


def bring_back(name: Any, pool: Any) -> tuple[int, int]:
    """All pages of a pool out of it and back -> their bytes, and the bytes of their streams."""
    from sglang.srt.mem_cache.hicache_storage import PoolTransfer

    fill_with_numbers(pool)
    before, digests = [buffer.clone() for buffer in buffers_of(pool)], page_digests(pool)
    keys, slots = [f"page-{index}" for index in range(pool_pages(pool))], torch.arange(pool.size)
    with tempfile.TemporaryDirectory() as scratch:
        for is_writer in (True, False):
            made = backend(Path(scratch), LOSSLESS, pool)
            made.register_mem_host_pool_v2(pool, name)
            call = made.batch_set_v2 if is_writer else made.batch_get_v2
            expect("pages", call([PoolTransfer(name, slots, keys=keys)]), {name: [True] * len(keys)})
            if is_writer:
                for buffer in buffers_of(pool):
                    buffer.view(torch.uint8).zero_()
            made.close()
        n_stored = sum(file.stat().st_size for file in (Path(scratch) / "entries").rglob("*") if file.is_file())
    after = buffers_of(pool)
    expect(
        "bytes",
        all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(after, before, strict=True)),
        True,
    )
    expect("digests of pages", page_digests(pool), digests)
    return sum(buffer.nbytes for buffer in before), n_stored


def go_through_the_controller() -> None:
    """A model with full attention, windows and states, through SGLang's controller and its threads: what it looks for, finds and
    reads is by its own rules."""
    for where, expected in (("the end of the second request", 5), ("a page before it", 2)):
        with tempfile.TemporaryDirectory() as scratch, running_controller(Path(scratch)) as controller:
            write_two_requests(controller, states_at=4 if expected == 5 else 3)
            n_found, is_same = read_back(controller, 6)
            expect(f"pages found with states at {where}", n_found, expected)
            expect("bytes that the controller read", is_same, True)
            print(
                f"  full attention, windows of 2 pages, states at {where}: {n_found} of 5 pages restored, bytes as before"
            )


def write_two_requests(controller: Any, states_at: int) -> None:
    """One of 2 pages and one of 5 that begins with them, as SGLang's tree gives them to the controller.

    states_at: the page behind which the states of the second one are kept.
    """
    from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer

    keys, tokens = hashes(6), torch.arange(6 * PAGE)

    def trailing(name: Any, slots: torch.Tensor, its: list[str]) -> Any:
        return PoolTransfer(name, slots, keys=its, hit_policy=PoolHitPolicy.TRAILING_PAGES)

    def write(first: int, stop: int, state: int) -> None:
        window = slice(max(first, stop - 2), stop)
        controller.write_storage(
            tokens[first * PAGE : stop * PAGE],
            [],
            hash_value=keys[first:stop],
            prefix_keys=keys[:first],
            extra_pools=[
                trailing(PoolName.SWA, tokens[window.start * PAGE : window.stop * PAGE], keys[window]),
                trailing(PoolName.MAMBA, torch.tensor([state]), [keys[state]]),
            ],
        )
        done = controller.ack_backup_queue.get(timeout=120)
        expect("tokens written", done.completed_tokens, (stop - first) * PAGE)

    write(0, 2, 1)
    write(2, 5, states_at)


def read_back(controller: Any, n_pages: int) -> tuple[int, bool]:
    """Ask for a text of so many pages as a request does -> pages found, and whether what came is what was written."""
    from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle
    from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer

    wanted = [
        PoolTransfer(PoolName.SWA, keys=["?"] * 2, hit_policy=PoolHitPolicy.TRAILING_PAGES),
        PoolTransfer(PoolName.MAMBA, keys=["?"], hit_policy=PoolHitPolicy.TRAILING_PAGES),
    ]
    handle = CacheRequestHandle("request", 0)
    controller.prefetch(handle, token_ids(n_pages), prefix_keys=[], extra_pools=wanted)
    operation = controller.prefetch_hit_queue.get(timeout=120)
    group, n_found = controller.mem_pool_host, operation.storage_hit_count // PAGE
    group.alloc(6 * PAGE)  # where the originals lie
    operation.host_indices = group.alloc(n_found * PAGE)
    for transfer, n_slots in zip(wanted, (2 * PAGE, 1), strict=True):
        transfer.host_indices = (
            torch.arange(6 * n_slots, 7 * n_slots) if n_slots == 1 else torch.arange(6 * PAGE, 8 * PAGE)
        )
    controller.prefetch_buffer.put(operation)
    hits: dict[str, int] = {}
    while True:
        ack = controller.ack_prefetch_queue.get(timeout=120)
        hits.update(ack.pool_hits or {})
        if ack.completed_req:
            break
    expect("pages of other pools", (hits["swa"], hits["mamba"]), (2, 1))
    same = []
    for name, slots, sources in (
        (PoolName.KV, operation.host_indices[::PAGE].tolist(), range(n_found)),
        (PoolName.SWA, wanted[0].host_indices[::PAGE].tolist(), range(n_found - 2, n_found)),
        (PoolName.MAMBA, wanted[1].host_indices.tolist(), [n_found - 1]),
    ):
        pool = group.get_pool(name)
        step = pool.page_size
        same += [
            torch.equal(pool.get_data_page(slot).view(torch.uint8), pool.get_data_page(source * step).view(torch.uint8))
            for slot, source in zip(slots, sources, strict=True)
        ]
    return n_found, all(same)


@contextmanager
def running_controller(store: Path) -> Iterator[Any]:
    """SGLang's controller over three pools of host memory, with kvtc's backend attached as the server attaches it."""
    from sglang.srt.mem_cache.hicache_storage import PoolName
    from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
    from sglang.srt.mem_cache.pool_host.group import HostPoolGroup, PoolEntry

    pools = {
        PoolName.KV: mha_pool("page_first", torch.bfloat16, n_pages=6),
        PoolName.SWA: mha_pool("page_first", torch.bfloat16, n_pages=6),
        PoolName.MAMBA: state_pool(8),
    }
    for pool in pools.values():
        fill_with_numbers(pool)
    entries = [
        PoolEntry(name, pool, pool.of_device, lambda layer: layer, is_primary_index_anchor=name == PoolName.KV)
        for name, pool in pools.items()
    ]
    controller = HybridCacheController(
        SimpleNamespace(get_kvcache=lambda: pools[PoolName.KV].of_device),
        HostPoolGroup(entries),
        PAGE,
        None,
        None,
        storage_backend="dynamic",
        model_name="bytes",
        storage_backend_extra_config=backend_options(store, LOSSLESS),
    )
    try:
        yield controller
    finally:
        controller.detach_storage_backend()


def token_ids(n_pages: int) -> list[int]:
    return list(range(n_pages * PAGE))


def hashes(n_pages: int) -> list[str]:
    """SGLang's hashes of the pages of the text."""
    from sglang.srt.mem_cache.utils import get_storage_hash_str

    return list(get_storage_hash_str(token_ids(n_pages), None, page_size=PAGE))


def backend_options(store: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What a user gives SGLang for kvtc."""
    return {
        "backend_name": "kvtc",
        "module_path": "kvtc.engines.sglang.hicache",
        "class_name": "KvtcHiCache",
        "interface_v1": 1,
        "kvtc.store": f"file://{store}",
        **options,
    }


def backend(store: Path, options: dict[str, Any], pool: Any) -> Any:
    """As SGLang's cache controller makes it from the user's options."""
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
    from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory

    config = HiCacheStorageConfig(
        tp_rank=0,
        tp_size=1,
        pp_rank=0,
        pp_size=1,
        attn_cp_rank=0,
        attn_cp_size=1,
        is_mla_model=not hasattr(pool, "head_num"),
        enable_storage_metrics=False,
        is_page_first_layout=pool.layout != "layer_first",
        model_name="kvtc-6m",
        extra_config=backend_options(store, options),
    )
    made = StorageBackendFactory.create_backend("dynamic", config, pool)
    made.register_mem_pool_host(pool)
    return made


def mha_pool(
    layout: str,
    dtype: torch.dtype,
    value_dim: int | None = None,
    *,
    n_pages: int = N_PAGES,
    page_tokens: int = PAGE,
    sizes: tuple[int, int, int] = (LAYERS, HEADS, DIM),
) -> Any:
    """SGLang's pool of keys and values of heads; of a class of its own where their widths differ."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sglang.srt.mem_cache.pool_host.mha import get_mha_host_pool_cls

    n_layers, n_heads, dim = sizes
    device = MHATokenToKVPool(
        size=n_pages * page_tokens,
        page_size=page_tokens,
        dtype=dtype,
        head_num=n_heads,
        head_dim=dim,
        v_head_dim=value_dim or dim,
        layer_num=n_layers,
        device="cpu",
        enable_memory_saver=False,
    )
    info = device._mha_buffer_info()
    pool = get_mha_host_pool_cls(info)(
        info,
        2.0,
        0,
        page_tokens,
        layout,
        pin_memory=False,
        device="cpu",
        device_capacity_tokens=n_pages * page_tokens,
        start_layer=0,
        end_layer=n_layers,
    )
    pool.of_device = device
    return pool


def mla_pool(layout: str, dtype: torch.dtype) -> Any:
    """SGLang's pool of latents."""
    from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool
    from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost

    size = N_PAGES * PAGE
    device = MLATokenToKVPool(
        size=size,
        page_size=PAGE,
        dtype=dtype,
        kv_lora_rank=64,
        qk_rope_head_dim=16,
        layer_num=LAYERS,
        device="cpu",
        enable_memory_saver=False,
    )
    return MLATokenToKVPoolHost(
        device.get_device_pool_infos()[0].buffer_info,
        1.0,
        0,
        PAGE,
        layout,
        pin_memory=False,
        device="cpu",
        device_capacity_tokens=size,
        start_layer=0,
        end_layer=LAYERS,
        target_layer_num=LAYERS,
    )


def indexer_pool(layout: str) -> Any:
    """SGLang's pool of the keys by which sparse attention chooses latents: 8 bits a number, and scales behind them."""
    from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool
    from sglang.srt.mem_cache.pool_host.dsa import DSAIndexerPoolHost

    device = DSATokenToKVPool(
        size=N_PAGES * PAGE,
        page_size=PAGE,
        kv_lora_rank=512,
        dtype=torch.bfloat16,
        qk_rope_head_dim=64,
        layer_num=LAYERS,
        device="cpu",
        index_head_dim=128,
        enable_memory_saver=False,
        kv_cache_dim=576,
    )
    pool = DSAIndexerPoolHost(device.host_pool_decls()[-1], mla_pool(layout, torch.bfloat16), pin_memory=False)
    pool.kv_buffer, pool.size = pool.index_k_with_scale_buffer, pool.indexer_page_num * PAGE  # as in the others
    return pool


def state_pool(n_states: int = N_PAGES) -> Any:
    """SGLang's pool of recurrent states and convolutions."""
    from sglang.srt.mem_cache.device_pool_info import MambaStateBufferInfo
    from sglang.srt.mem_cache.pool_host.mamba import MambaPoolHost

    info = MambaStateBufferInfo(
        temporal=torch.zeros(LAYERS, n_states, 4, 16, 32),
        conv=(torch.zeros(LAYERS, n_states, 96, 3, dtype=torch.bfloat16),),
    )
    pool = MambaPoolHost(info, 1.0, 0, device_capacity=n_states, pin_memory=False, layout="page_first")
    pool.of_device = info
    return pool


def buffers_of(pool: Any) -> list[torch.Tensor]:
    """The memory of a pool."""
    held = pool.kv_buffer
    return [held] if isinstance(held, torch.Tensor) else list(held)


def fill_with_numbers(pool: Any) -> None:
    """Numbers like those of a cache, and some that only bits tell apart: NaN with a payload, zeros of both signs."""
    for number, buffer in enumerate(buffers_of(pool)):
        generator = torch.Generator().manual_seed(number)
        flat = buffer.view(-1) if buffer.dtype != torch.uint8 else buffer.view(-1).view(pool.dtype)
        flat.copy_(torch.randn(flat.shape, generator=generator).to(flat.dtype))
        raw = flat.view(torch.uint8)
        raw[: raw.numel() // 8] = torch.randint(0, 256, (raw.numel() // 8,), generator=generator, dtype=torch.uint8)


def pool_pages(pool: Any) -> int:
    return int(pool.size) // int(pool.page_size)


def page_digests(pool: Any) -> list[str]:
    """Of every page, as SGLang gives it; of the whole memory where it gives no pages."""
    try:
        pages = [pool.get_data_page(index * pool.page_size) for index in range(pool_pages(pool))]
    except NotImplementedError:
        pages = buffers_of(pool)
    return [
        hashlib.sha256(page.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest() for page in pages
    ]
