"""How serving engines lay out their pages of cache; keys and values `[L, H, T, D]` from pages and
to them.

Engines keep a cache in pages of N tokens (vLLM says block). What differs between them is the order
of the axes, and on CPUs how the numbers of one head are packed inside a page. Axis letters of a
layout, in the order of memory:

    S side (keys, then values)   L layers   B pages   N tokens of a page   H key-value heads
    D features of a head         C both sides of a head, 2 * D (where there is no S)

Nothing here guesses: a layout is built from what the engine says of itself, and refused if kvtc
does not know it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UnsupportedLayout

SPLIT, VEC, AMX = "split", "vec", "amx"
PACKINGS = (SPLIT, VEC, AMX)
_AMX_TOKENS = 16
_AMX_FEATURES = 16
_LOGICAL = "LBHNC"

# Backends of vLLM that read a head's content as keys, then values.
_SPLITTING_BACKENDS = frozenset({"FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION"})
_VLLM_CPU_BACKEND = "CPU_ATTN"
_VLLM_PACKINGS = {"vec": VEC, "vec16": VEC, "amx": AMX}
# Physical orders by vLLM's names; in BHLNC and LHBNC a page is not one run of bytes.
_VLLM_AXES = ("LBHNC", "LBNHC", "BLHNC", "BLNHC")
CACHE_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "half": torch.float16,
    "float32": torch.float32,
    "float": torch.float32,
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


class TokenPages(ABC):
    """What layouts of pages have in common: page_tokens, tokens of a page, and page_values, its numbers in all layers."""

    page_tokens: int

    @property
    @abstractmethod
    def page_values(self) -> int:
        """Numbers in one page of all layers."""

    def bytes(self, n_tokens: int, dtype: torch.dtype) -> int:
        """The size of tokens in these pages.

        Parameters:
            n_tokens: How many.
            dtype: Of their numbers.

        Returns:
            Bytes of keys and values of all layers.

        Example:
            >>> from kvtc.engines.page_layout import PageLayout
            >>> PageLayout("LBHNC", 2, 3, 8, page_tokens=16).bytes(16, torch.bfloat16)
            3072
        """
        return n_tokens * self.page_values // self.page_tokens * dtype.itemsize


@dataclass(frozen=True)
class PageLayout(TokenPages):
    """How some pages of some layers lie in one tensor.

    Parameters:
        axes: The order of the axes in memory, in the letters above.
        n_layers, n_kv_heads, head_dim: L, H and D.
        page_tokens: N.
        packing: How the numbers of a page and head lie. `split` (default): keys [N, D] beside
            values [N, D]. `vec`: keys [D, N], then values [N, D]. `amx`: keys [N / 16, D / 2,
            16, 2], then values [D / 16, N / 2, 16, 2].

    Raises:
        UnsupportedLayout: The axes or the packing are unknown, or do not go together.

    Example:
        >>> from kvtc.engines.page_layout import PageLayout
        >>> layout = PageLayout("LBHNC", n_layers=2, n_kv_heads=3, head_dim=8, page_tokens=16)
        >>> pages = torch.arange(5 * layout.page_values).reshape(layout.shape(n_pages=5))
        >>> keys, values = layout.read(pages)
        >>> keys.shape, torch.equal(layout.write(keys, values), pages)
        (torch.Size([2, 3, 80, 8]), True)
    """

    axes: str
    n_layers: int
    n_kv_heads: int
    head_dim: int
    page_tokens: int
    packing: str = SPLIT

    def __post_init__(self) -> None:
        if sorted(self.axes) not in (sorted(_LOGICAL), sorted("SLBHND")):
            raise UnsupportedLayout(f"axes {self.axes!r}; expected an order of {_LOGICAL} or of SLBHND")
        if self.packing not in PACKINGS:
            raise UnsupportedLayout(f"packing {self.packing!r}; expected one of {', '.join(PACKINGS)}")
        if self.packing != SPLIT and "S" in self.axes:
            raise UnsupportedLayout(f"packing {self.packing!r} is inside a page; axes {self.axes} keep sides apart")
        if self.packing == AMX and (self.page_tokens % _AMX_TOKENS or self.head_dim % _AMX_FEATURES):
            raise UnsupportedLayout(
                f"packing amx needs pages of a multiple of {_AMX_TOKENS} tokens and heads of a multiple of {_AMX_FEATURES}; "
                f"got {self.page_tokens} and {self.head_dim}"
            )

    @property
    def page_values(self) -> int:
        """Numbers in one page, keys and values of all layers."""
        return 2 * self.n_layers * self.n_kv_heads * self.page_tokens * self.head_dim

    def shape(self, n_pages: int) -> list[int]:
        """The shape of a tensor that holds pages.

        Parameters:
            n_pages: How many.

        Returns:
            Sizes in the order of the axes.
        """
        sizes = {
            "S": 2,
            "L": self.n_layers,
            "B": n_pages,
            "H": self.n_kv_heads,
            "N": self.page_tokens,
            "D": self.head_dim,
            "C": 2 * self.head_dim,
        }
        return [sizes[axis] for axis in self.axes]

    def read(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of whole pages, copied.

        Parameters:
            data: The pages, of any shape with as many numbers.

        Returns:
            Keys and values, each [L, H, B * N, D].

        Raises:
            UnsupportedLayout: `data` is not a whole number of pages.
        """
        n_pages, rest = divmod(data.numel(), self.page_values)
        if rest:
            raise UnsupportedLayout(f"{data.numel()} numbers are not whole pages of {self.page_values}: {self}")
        tensor = data.reshape(self.shape(n_pages))
        if "S" in self.axes:
            keys, values = _permuted(tensor, self.axes, "SLBHND")
        else:
            keys, values = unpack(_permuted(tensor, self.axes, _LOGICAL), self.packing)
        return _tokens_together(keys), _tokens_together(values)

    def write(self, keys: Tensor, values: Tensor) -> Tensor:
        """The pages of some tokens: the inverse of `read`.

        Parameters:
            keys, values: [L, H, B * N, D].

        Returns:
            A contiguous tensor in the order of the axes.

        Raises:
            UnsupportedLayout: The tokens are not whole pages, or other sizes do not fit.
        """
        expected = (self.n_layers, self.n_kv_heads, self.head_dim)
        if keys.shape != values.shape or (*keys.shape[:2], keys.shape[3]) != expected:
            raise UnsupportedLayout(
                f"layers, heads and features {expected} expected; got keys {tuple(keys.shape)}, values {tuple(values.shape)}"
            )
        if keys.shape[2] % self.page_tokens:
            raise UnsupportedLayout(f"{keys.shape[2]} tokens are not whole pages of {self.page_tokens}")
        paged = [_unfold(side, 2, -1, self.page_tokens).permute(0, 2, 1, 3, 4) for side in (keys, values)]
        if "S" in self.axes:
            return _permuted(torch.stack(paged), "SLBHND", self.axes).contiguous()
        return _permuted(pack(paged[0], paged[1], self.packing), _LOGICAL, self.axes).contiguous()


def unpack(content: Tensor, packing: str) -> tuple[Tensor, Tensor]:
    """The keys and values of pages.

    Parameters:
        content: [.., N, 2 D], as an engine holds it.
        packing: As of `PageLayout`.

    Returns:
        Keys and values, each [.., N, D].

    Example:
        >>> from kvtc.engines.page_layout import unpack
        >>> unpack(torch.tensor([[1, 2, 3, 4]]), "split")
        (tensor([[1, 2]]), tensor([[3, 4]]))
    """
    n, d = content.shape[-2], content.shape[-1] // 2
    if packing == SPLIT:
        return content[..., :d], content[..., d:]
    halves = content.reshape(*content.shape[:-2], 2, n * d)
    keys, values = halves[..., 0, :], halves[..., 1, :]
    if packing == VEC:
        return _unfold(keys, -1, d, n).transpose(-1, -2), _unfold(values, -1, n, d)
    keys = _unfold(keys, -1, n // _AMX_TOKENS, d // 2, _AMX_TOKENS, 2).transpose(-3, -2)
    values = _unfold(values, -1, d // _AMX_FEATURES, n // 2, _AMX_FEATURES, 2)
    values = values.movedim((-3, -1, -4, -2), (-4, -3, -2, -1))
    return keys.reshape(*content.shape[:-2], n, d), values.reshape(*content.shape[:-2], n, d)


def pack(keys: Tensor, values: Tensor, packing: str) -> Tensor:
    """Inverse of `unpack`.

    Parameters:
        keys, values: [.., N, D].
        packing: As of `PageLayout`.

    Returns:
        [.., N, 2 D], as an engine holds it.

    Example:
        >>> from kvtc.engines.page_layout import pack
        >>> pack(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[5, 6], [7, 8]]), "vec")
        tensor([[1, 3, 2, 4],
                [5, 6, 7, 8]])
    """
    n, d = keys.shape[-2:]
    if packing == SPLIT:
        return torch.cat([keys, values], dim=-1)
    if packing == VEC:
        keys = keys.transpose(-1, -2)
    else:
        keys = _unfold(_unfold(keys, -1, d // 2, 2), -3, n // _AMX_TOKENS, _AMX_TOKENS).transpose(-3, -2)
        values = _unfold(_unfold(values, -1, d // _AMX_FEATURES, _AMX_FEATURES), -3, n // 2, 2)
        values = values.movedim((-4, -3, -2, -1), (-3, -1, -4, -2))
    lead = values.shape[: values.dim() - (2 if packing == VEC else 4)]
    halves = torch.stack([keys.reshape(*lead, n * d), values.reshape(*lead, n * d)], dim=-2)
    return halves.reshape(*lead, n, 2 * d)


def vllm_layout(
    n_layers: int,
    n_kv_heads: int,
    head_dim: int,
    page_tokens: int,
    *,
    backend: str,
    isa: str | None = None,
    axes: str = _LOGICAL,
) -> PageLayout:
    """The layout of vLLM's pages, whose logical order is [B, H, N, 2 D] for each layer.

    Parameters:
        n_layers, n_kv_heads, head_dim, page_tokens: Of the pages.
        backend: Name of the attention backend, as `AttentionBackend.get_name()` gives it.
        isa: Instruction set for which the CPU backend packs pages; None (default) for other
            backends.
        axes: Name of vLLM's `KVCacheLayout`, for raw bytes; vLLM's views of a layer are in
            logical order, which is the default.

    Returns:
        The layout.

    Raises:
        UnsupportedLayout: kvtc does not read pages of this backend, instruction set or order.

    Example:
        >>> from kvtc.engines.page_layout import vllm_layout
        >>> vllm_layout(12, 3, 32, page_tokens=16, backend="FLASH_ATTN").packing
        'split'
    """
    if axes not in _VLLM_AXES:
        raise UnsupportedLayout(f"vLLM's KV cache layout {axes}; kvtc reads {', '.join(_VLLM_AXES)}")
    if backend == _VLLM_CPU_BACKEND:
        if isa not in _VLLM_PACKINGS:
            raise UnsupportedLayout(
                f"vLLM's CPU attention packs pages for isa {isa!r}; kvtc reads {', '.join(_VLLM_PACKINGS)}"
            )
        packing = _VLLM_PACKINGS[isa]
    elif backend in _SPLITTING_BACKENDS:
        packing = SPLIT
    else:
        known = ", ".join(sorted({_VLLM_CPU_BACKEND, *_SPLITTING_BACKENDS}))
        raise UnsupportedLayout(f"vLLM's attention backend {backend}; kvtc reads pages of {known}")
    return PageLayout(axes, n_layers, n_kv_heads, head_dim, page_tokens, packing)


def lmcache_layout(
    shape: Sequence[int], n_layers: int, n_kv_heads: int, head_dim: int, *, page_tokens: int = 1, packing: str = SPLIT
) -> PageLayout:
    """The layout of a chunk of LMCache.

    Parameters:
        shape: [2, L, T, H * D], or with keys beside values [1, L, T, H * 2 D] or [L, T, H * 2
            D].
        n_layers, n_kv_heads, head_dim: L, H and D.
        page_tokens: Tokens of a page of the engine, where it packs pages: the chunk holds their
            slots one after the other, packed as they are. Default 1.
        packing: Of the engine's pages, as of `PageLayout`; default `split`.

    Returns:
        The layout.

    Raises:
        UnsupportedLayout: The shape is another one.

    Example:
        >>> from kvtc.engines.page_layout import lmcache_layout
        >>> lmcache_layout([2, 12, 256, 96], n_layers=12, n_kv_heads=3, head_dim=32).axes
        'SLBNHD'
    """
    shape, row = tuple(shape), n_kv_heads * head_dim
    sides, layers, _, features = shape if len(shape) == 4 else (1, *shape) if len(shape) == 3 else (0, 0, 0, 0)
    if layers == n_layers and (sides, features) == (2, row) and packing == SPLIT:
        return PageLayout("SLBNHD", n_layers, n_kv_heads, head_dim, page_tokens)
    if layers == n_layers and (sides, features) == (1, 2 * row):
        return PageLayout("LBNHC", n_layers, n_kv_heads, head_dim, page_tokens, packing)
    raise UnsupportedLayout(
        f"LMCache chunk of shape {shape}, packing {packing}; expected [2, {n_layers}, T, {row}], [1, {n_layers}, T, {2 * row}] or "
        f"[{n_layers}, T, {2 * row}]"
    )


def sglang_layout(name: str, n_layers: int, n_kv_heads: int, head_dim: int, page_tokens: int) -> PageLayout:
    """The layout of a page of SGLang's host memory.

    Parameters:
        name: Of SGLang's host layout.
        n_layers, n_kv_heads, head_dim, page_tokens: Of the page.

    Returns:
        The layout.

    Raises:
        UnsupportedLayout: kvtc does not read this layout.

    Example:
        >>> from kvtc.engines.page_layout import sglang_layout
        >>> sglang_layout("page_first", 12, 3, 32, page_tokens=64).axes
        'SBNLHD'
    """
    axes = {
        "layer_first": "SLBNHD",
        "page_first": "SBNLHD",
        "page_first_direct": "SBLNHD",
        "page_head": "SBHNLD",
    }
    if name not in axes:
        raise UnsupportedLayout(f"SGLang's host layout {name!r}; kvtc reads {', '.join(axes)}")
    return PageLayout(axes[name], n_layers, n_kv_heads, head_dim, page_tokens)


def cache_dtype(name: str) -> torch.dtype:
    """The dtype of a cache.

    Parameters:
        name: As an engine calls the dtype.

    Returns:
        The dtype of torch.

    Raises:
        UnsupportedLayout: The cache has scales of its own, or the name is unknown.

    Example:
        >>> from kvtc.engines.page_layout import cache_dtype
        >>> cache_dtype("fp8")
        torch.float8_e4m3fn
    """
    if name not in CACHE_DTYPES:
        raise UnsupportedLayout(f"cache dtype {name!r}; kvtc reads {', '.join(CACHE_DTYPES)}")
    return CACHE_DTYPES[name]


def _unfold(tensor: Tensor, axis: int, *sizes: int) -> Tensor:
    """One axis as several."""
    axis %= tensor.dim()
    return tensor.reshape(*tensor.shape[:axis], *sizes, *tensor.shape[axis + 1 :])


def _permuted(tensor: Tensor, source: str, target: str) -> Tensor:
    return tensor.permute([source.index(axis) for axis in target])


def _tokens_together(paged: Tensor) -> Tensor:
    """[L, B, H, N, D] -> [L, H, B * N, D]"""
    return paged.permute(0, 2, 1, 3, 4).flatten(2, 3)
