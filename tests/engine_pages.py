"""Pages as engines index them, for stand-ins. `test_page_layout` holds this against bytes that the engines wrote themselves."""

from __future__ import annotations

import torch
from torch import Tensor


def sides(pages: Tensor, packing: str = "split") -> tuple[Tensor, Tensor]:
    """Pages of a layer [B, H, N, 2 D] -> views [B, H, N, D] of their keys and values, to be written to and read.

    packing: `split`, as vLLM's backends for GPUs; `vec`, as its CPU backend for most instruction sets.
    """
    n_pages, n_heads, n_tokens, content = pages.shape
    head_dim = content // 2
    if packing == "split":
        return pages[..., :head_dim], pages[..., head_dim:]
    assert packing == "vec"
    keys, values = pages.view(n_pages, n_heads, 2, n_tokens * head_dim).unbind(2)
    return keys.unflatten(-1, (head_dim, n_tokens)).transpose(2, 3), values.unflatten(-1, (n_tokens, head_dim))


def in_logical_order(memory: Tensor, axes: str, sizes: dict[str, int]) -> Tensor:
    """Flat memory in an order of the axes LBHNC -> a view [L, B, H, N, C]."""
    return memory.view([sizes[axis] for axis in axes]).permute([axes.index(axis) for axis in "LBHNC"])


def write_tokens(
    layers: Tensor | list[Tensor], slots: Tensor, keys: Tensor, values: Tensor, packing: str = "split"
) -> None:
    """keys, values [L, H, T, D] into the slots [T] of the layers' pages, slots counted through all pages."""
    for layer, pages in enumerate(layers):
        page, slot = slots // pages.shape[2], slots % pages.shape[2]
        for side, given in zip(sides(pages, packing), (keys, values), strict=True):
            side[page, :, slot] = given[layer].transpose(0, 1)


def read_tokens(layers: Tensor | list[Tensor], slots: Tensor, packing: str = "split") -> tuple[Tensor, Tensor]:
    """keys, values [L, H, T, D] of these slots."""
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for pages in layers:
        page, slot = slots // pages.shape[2], slots % pages.shape[2]
        for rows, side in zip(found, sides(pages, packing), strict=True):
            rows.append(side[page, :, slot].transpose(0, 1))
    return torch.stack(found[0]), torch.stack(found[1])
