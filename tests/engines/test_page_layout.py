"""Pages of engines: every number is looked up where the engine's own indexing puts it."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtc.engines.page_layout import PageLayout, cache_dtype, lmcache_layout, sglang_layout, vllm_layout
from kvtc.errors import UnsupportedLayout

L, H, N, D, B = 3, 2, 32, 16, 4


def tokens(n: int = B * N) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [L, H, n, D], every number different."""
    both = torch.arange(2 * L * H * n * D, dtype=torch.int32)
    keys, values = both.view(2, L, H, n, D)
    return keys, values


def spots(n: int = B * N):
    """Some (layer, head, token, feature)."""
    return itertools.product((0, L - 1), range(H), (0, 1, 17, N, n - 1), (0, 1, 7, D - 1))


@pytest.mark.parametrize("axes", ["LBHNC", "LBNHC", "BLHNC", "BLNHC"])
def test_vllm_on_gpu_keeps_keys_beside_values(axes):
    keys, values = tokens()
    layout = vllm_layout(L, H, D, N, backend="FLASH_ATTN", axes=axes)
    data = layout.write(keys, values)
    for layer, head, token, feature in spots():
        place = {"L": layer, "B": token // N, "H": head, "N": token % N}
        at = [place.get(axis, slice(None)) for axis in axes]
        content = data[tuple(at)]
        assert content[feature] == keys[layer, head, token, feature]
        assert content[D + feature] == values[layer, head, token, feature]
    assert all(map(torch.equal, layout.read(data.flatten()), (keys, values)))


@pytest.mark.parametrize("isa", ["vec", "vec16"])
def test_vllm_on_cpu_transposes_the_keys_of_a_page(isa):
    keys, values = tokens()
    layout = vllm_layout(L, H, D, N, backend="CPU_ATTN", isa=isa)
    data = layout.write(keys, values).view(L, B, H, 2 * N * D)
    for layer, head, token, feature in spots():
        page, slot = divmod(token, N)
        assert data[layer, page, head, feature * N + slot] == keys[layer, head, token, feature]
        assert data[layer, page, head, N * D + slot * D + feature] == values[layer, head, token, feature]
    assert all(map(torch.equal, layout.read(data), (keys, values)))


def test_vllm_on_cpu_with_amx_interleaves_for_its_tiles():
    keys, values = tokens()
    layout = vllm_layout(L, H, D, N, backend="CPU_ATTN", isa="amx")
    data = layout.write(keys, values).view(L, B, H, 2 * N * D)
    for layer, head, token, feature in spots():
        page, slot = divmod(token, N)
        tile, row = divmod(slot, 16)
        key_at = ((tile * D // 2 + feature // 2) * 16 + row) * 2 + feature % 2
        assert data[layer, page, head, key_at] == keys[layer, head, token, feature]
        strip, column = divmod(feature, 16)
        value_at = N * D + ((strip * N // 2 + slot // 2) * 16 + column) * 2 + slot % 2
        assert data[layer, page, head, value_at] == values[layer, head, token, feature]
    assert all(map(torch.equal, layout.read(data), (keys, values)))


def test_lmcache_chunk_of_two_planes():
    keys, values = tokens()
    layout = lmcache_layout([2, L, B * N, H * D], L, H, D)
    data = layout.write(keys, values).reshape(2, L, B * N, H * D)
    for layer, head, token, feature in spots():
        assert data[0, layer, token, head * D + feature] == keys[layer, head, token, feature]
        assert data[1, layer, token, head * D + feature] == values[layer, head, token, feature]
    assert all(map(torch.equal, layout.read(data), (keys, values)))


@pytest.mark.parametrize("lead", [(1,), ()])
def test_lmcache_chunk_with_sides_fused_in_each_head(lead):
    keys, values = tokens()
    layout = lmcache_layout([*lead, L, B * N, H * 2 * D], L, H, D)
    data = layout.write(keys, values).reshape(*lead, L, B * N, H * 2 * D)
    rows = data.reshape(L, B * N, H, 2 * D)
    for layer, head, token, feature in spots():
        assert rows[layer, token, head, feature] == keys[layer, head, token, feature]
        assert rows[layer, token, head, D + feature] == values[layer, head, token, feature]
    assert all(map(torch.equal, layout.read(data), (keys, values)))


@pytest.mark.parametrize("packing", ["vec", "amx"])
def test_lmcache_chunk_of_packed_pages_is_the_pages_slot_by_slot(packing):
    keys, values = tokens()
    pages = PageLayout("LBHNC", L, H, D, N, packing).write(keys, values)
    slots = torch.stack([pages[:, :, :, slot] for slot in range(N)], dim=2).reshape(L, B * N, H * 2 * D)
    layout = lmcache_layout(slots.shape, L, H, D, page_tokens=N, packing=packing)
    assert all(map(torch.equal, layout.read(slots), (keys, values)))
    assert torch.equal(layout.write(keys, values).view_as(slots), slots)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("layer_first", "LNHD"),
        ("page_first", "NLHD"),
        ("page_first_direct", "LNHD"),
        ("page_head", "HNLD"),
    ],
)
def test_sglang_host_pages(name, shape):
    keys, values = tokens(N)
    layout = sglang_layout(name, L, H, D, N)
    sizes = {"L": L, "N": N, "H": H, "D": D}
    data = layout.write(keys, values).view(2, *(sizes[axis] for axis in shape))
    for layer, head, token, feature in spots(N):
        if token < N:
            place = {"L": layer, "N": token, "H": head, "D": feature}
            at = tuple(place[axis] for axis in shape)
            assert data[0][at] == keys[layer, head, token, feature]
            assert data[1][at] == values[layer, head, token, feature]
    assert all(map(torch.equal, layout.read(data), (keys, values)))


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
        (lambda: lmcache_layout([2, L, N, H * 2 * D], L, H, D), "2, 3, 32, 64"),
        (lambda: lmcache_layout([N, H * D], L, H, D), "32, 32"),
        (lambda: lmcache_layout([2, L, N, H * D], L, H, D, packing="vec"), "vec"),
        (lambda: sglang_layout("page_unified", L, H, D, N), "page_unified"),
        (lambda: cache_dtype("int8_per_token_head"), "int8_per_token_head"),
        (lambda: PageLayout("LBHN", L, H, D, N), "LBHN"),
        (lambda: PageLayout("LBHNC", L, H, D, N).read(torch.zeros(5)), "5"),
        (lambda: PageLayout("LBHNC", L, H, D, N).write(*tokens(N + 1)), "33"),
        (lambda: PageLayout("LBHNC", L, H + 1, D, N).write(*tokens(N)), r"\(3, 3, 16\)"),
    ],
)
def test_what_is_not_known_is_refused_by_name(refused, names):
    with pytest.raises(UnsupportedLayout, match=names):
        refused()


def test_dtypes_by_the_engines_names():
    assert cache_dtype("bfloat16") is torch.bfloat16
    assert cache_dtype("fp8_e4m3") is torch.float8_e4m3fn
