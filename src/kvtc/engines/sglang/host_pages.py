"""The pages of one pool of SGLang's host memory, as flat tensors of numbers."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedLayout
from ..opaque_layout import OpaqueLayout, rows_layout


class HostPages:
    """The pages of a pool.

    Most pools give a page as a flat tensor. Those that do not, for keys and values of unequal width, tell where its bytes lie.

    Parameters:
        name: SGLang's name of the pool.
        pool: The pool.

    Attributes:
        page_tokens: Slots of a page; 1 where it holds no tokens.
        dtype: Of its numbers.
        n_values: Numbers of a page; 0 where the pool stands for others and holds nothing.

    Raises:
        UnsupportedLayout: The pool does not give its pages.
    """

    def __init__(self, name: str, pool: Any) -> None:
        self.name, self.pool = name, pool
        self.page_tokens = int(getattr(pool, "page_size", 1) or 1)
        try:
            flat, self._is_flat = pool.get_data_page(0), True
        except (NotImplementedError, ValueError):
            flat, self._is_flat = self._read_runs(0), False
        self._flat_dtype, n_bytes = flat.dtype, flat.numel() * flat.dtype.itemsize
        # States are given as bytes, and most of these are numbers of one dtype.
        dtype: torch.dtype = getattr(pool, "temporal_dtype", flat.dtype)
        self.dtype = dtype if dtype.itemsize in (1, 2, 4) and n_bytes % dtype.itemsize == 0 else torch.uint8
        self.n_values = n_bytes // self.dtype.itemsize

    @property
    def head_sizes(self) -> tuple[int, int, int] | None:
        """(layers, heads, features) where a page holds keys and values of one width; None elsewhere."""
        n_layers, n_heads, dim = (int(getattr(self.pool, name, 0)) for name in ("layer_num", "head_num", "head_dim"))
        is_of_heads = self.n_values == 2 * n_layers * n_heads * dim * self.page_tokens > 0
        return (n_layers, n_heads, dim) if is_of_heads else None

    @property
    def opaque_layout(self) -> OpaqueLayout:
        """The page as rows of numbers."""
        n_layers = 1 if self.pool.layout == "page_first" else int(getattr(self.pool, "layer_num", 1))
        n_values, rest = divmod(self.n_values, n_layers * self.page_tokens)
        layout = rows_layout((1, self.n_values) if rest else (n_layers, self.page_tokens, n_values))
        return replace(layout, page_tokens=-(-self.n_values // (len(layout.layers) * layout.token_values)))

    def numbers(self, flat: Tensor) -> Tensor:
        """A page as SGLang gives it -> its numbers, [n_values] of `dtype`."""
        return flat.contiguous().view(self.dtype)

    def flat(self, numbers: Tensor) -> Tensor:
        """Inverse of `numbers`."""
        return numbers.view(self._flat_dtype)

    def read(self, index: int) -> Tensor:
        """The page that begins at a slot, as SGLang gives it.

        Parameters:
            index: Of its first slot.
        """
        flat: Tensor = self.pool.get_data_page(index) if self._is_flat else self._read_runs(index)
        return flat

    def write(self, index: int, flat: Tensor) -> None:
        """Fill the page that begins at a slot.

        Parameters:
            index: Of its first slot.
            flat: As of `read`.
        """
        if self._is_flat:
            self.pool.set_from_flat_data_page(index, flat)
            return
        runs = self._runs(index)
        for run, part in zip(runs, torch.split(flat.view(torch.uint8), [len(run) for run in runs]), strict=True):
            run.copy_(part)

    def _read_runs(self, index: int) -> Tensor:
        joined = torch.cat(self._runs(index))
        return joined.view(self.pool.dtype) if len(joined) % self.pool.dtype.itemsize == 0 else joined

    def _runs(self, index: int) -> list[Tensor]:
        """The bytes of a page where they lie, in the order in which SGLang would send them."""
        try:
            addresses, sizes = self.pool.get_page_buffer_meta(torch.arange(index, index + self.page_tokens))
        except (NotImplementedError, ValueError) as error:
            raise UnsupportedLayout(
                f"SGLang's pool {self.name} ({type(self.pool).__name__}, layout {self.pool.layout}) gives its pages to no storage "
                f"backend: {error}"
            ) from error
        return [
            torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)
            for address, size in zip(addresses, sizes, strict=True)
        ]
