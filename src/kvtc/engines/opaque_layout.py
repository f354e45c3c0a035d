"""Pages of which kvtc knows nothing but their size: as rows of numbers that are kept bit for bit.

What an engine adds next year (packed numbers with their scales, latents of a new kind, states) comes through here, without loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cache import CacheExtent
from ..errors import UnsupportedLayout
from .page_layout import TokenPages

_MOST_FEATURES = 4096
"""Of one head: each has a model of its own while it is coded."""
_LONGEST_ROW, _MOST_LAYERS, _MOST_CHANNELS = 1 << 16, 1 << 12, 1 << 21
"""Beyond them a chunk is one run: what streams can say, and what models of channels take in memory."""
_FEWEST_TOKENS = 16
"""With fewer, a channel of its own has too few numbers to learn from."""
_RUN_ROW, _SHORTEST_ROW = 512, 16
_NUMBERS = {1: torch.float8_e4m3fn, 2: torch.bfloat16, 4: torch.float32}
"""As which numbers of so many bytes are coded, where an engine calls them integers."""


@dataclass(frozen=True)
class OpaqueLayout(TokenPages):
    """Pages of some layers, each of as many numbers for every token.

    Keys and values are the first and the second half of a token's numbers: they need not be its keys and values. A page that packs
    its tokens otherwise is restored as well, for pages are read and written whole.

    Parameters:
        layers: Numbers of the layers.
        page_tokens: N, tokens of a page; 1 where it holds no tokens.
        token_values: Numbers of a token in one layer.

    Raises:
        UnsupportedLayout: A token has an odd number of numbers.

    Example:
        >>> from kvtc.engines.opaque_layout import OpaqueLayout
        >>> layout = OpaqueLayout((0, 1), page_tokens=16, token_values=576)
        >>> pages = torch.arange(2 * 5 * layout.page_values // 2).reshape(2, 5, 16, 576)
        >>> keys, values = layout.read(pages)
        >>> keys.shape, torch.equal(layout.write(keys, values), pages)
        (torch.Size([2, 1, 80, 288]), True)
    """

    layers: tuple[int, ...]
    page_tokens: int
    token_values: int

    def __post_init__(self) -> None:
        if self.token_values < 2 or self.token_values % 2:
            raise UnsupportedLayout(f"{self.token_values} numbers of a token; kvtc keeps an even number of them")

    @property
    def extent(self) -> CacheExtent:
        """Layers, heads and features of the halves."""
        half = self.token_values // 2
        heads = next(n for n in range(1, half + 1) if half % n == 0 and half // n <= _MOST_FEATURES)
        return CacheExtent(self.layers, 0, heads, half // heads, half // heads)

    @property
    def page_values(self) -> int:
        """Numbers in one page of all layers."""
        return len(self.layers) * self.page_tokens * self.token_values

    def read(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """The halves of whole pages, copied.

        Parameters:
            data: The pages of all layers, the first layer's first, of any shape with as many numbers.

        Returns:
            Two tensors [L, H, B * N, D].

        Raises:
            UnsupportedLayout: `data` is not a whole number of pages.
        """
        if data.numel() % self.page_values:
            raise UnsupportedLayout(f"{data.numel()} numbers are not whole pages of {self.page_values}: {self}")
        heads, dim = self.extent.n_kv_heads, self.extent.key_dim
        numbers = data.reshape(len(self.layers), -1, 2, heads, dim).permute(2, 0, 3, 1, 4).contiguous()
        return numbers[0], numbers[1]

    def write(self, keys: Tensor, values: Tensor) -> Tensor:
        """The pages of some tokens: the inverse of `read`.

        Parameters:
            keys, values: [L, H, B * N, D].

        Returns:
            A contiguous tensor [L, B, N, numbers of a token].

        Raises:
            UnsupportedLayout: The tokens are not whole pages, or other sizes do not fit.
        """
        extent = self.extent
        expected = (extent.n_layers, extent.n_kv_heads, extent.key_dim)
        if (
            keys.shape != values.shape
            or (*keys.shape[:2], keys.shape[3]) != expected
            or keys.shape[2] % self.page_tokens
        ):
            raise UnsupportedLayout(
                f"layers, heads and features {expected} of pages of {self.page_tokens} tokens expected; got "
                f"{tuple(keys.shape)} and {tuple(values.shape)}"
            )
        numbers = torch.stack([keys, values]).permute(1, 3, 0, 2, 4)
        return numbers.reshape(extent.n_layers, -1, self.page_tokens, self.token_values)


def rows_layout(shape: Sequence[int]) -> OpaqueLayout:
    """How a chunk of any shape is kept as rows of numbers.

    A row is the last axis, and a token the one before it, where there are enough of them to learn from.
    All else is one run of numbers: then the last row ends with zeros unless it is full.

    Parameters:
        shape: Of the chunk.

    Returns:
        The layout.

    Example:
        >>> from kvtc.engines.opaque_layout import rows_layout
        >>> latents, state = rows_layout([1, 32, 256, 576]), rows_layout([1, 4, 1, 1_000_000])
        >>> (len(latents.layers), latents.token_values), (len(state.layers), state.token_values)
        ((32, 576), (1, 500))
    """
    *leading, n_tokens, n_values = (1, 1, *shape)
    n_layers = math.prod(leading)
    is_short = n_values <= _LONGEST_ROW and n_layers <= _MOST_LAYERS and n_layers * n_values <= _MOST_CHANNELS
    if n_tokens >= _FEWEST_TOKENS and not n_values % 2 and is_short:
        return OpaqueLayout(tuple(range(n_layers)), 1, n_values)
    n_numbers = math.prod(shape)
    fitting = (n for n in range(_RUN_ROW, _SHORTEST_ROW - 1, -2) if n_numbers % n == 0)
    return OpaqueLayout((0,), 1, next(fitting, _RUN_ROW))


def numbers_of(dtype: torch.dtype) -> torch.dtype:
    """As which dtype numbers are coded that need not be floats.

    Parameters:
        dtype: Of an engine's tensor.

    Returns:
        A dtype of as many bytes that streams know.

    Raises:
        UnsupportedLayout: Streams know none of so many bytes.

    Example:
        >>> from kvtc.engines.opaque_layout import numbers_of
        >>> numbers_of(torch.uint8), numbers_of(torch.float16)
        (torch.float8_e4m3fn, torch.float16)
    """
    if dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2):
        return dtype
    if dtype.itemsize not in _NUMBERS:
        raise UnsupportedLayout(f"numbers of {dtype}; kvtc keeps numbers of 1, 2 or 4 bytes")
    return _NUMBERS[dtype.itemsize]
