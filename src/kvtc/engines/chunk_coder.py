"""Chunks as cache servers hold them, tensors of one worker without token ids, as streams and back."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..cache import KVCache
from ..calibration import Calibration
from ..codec import Codec
from ..errors import CorruptStream, InvalidArgument, UnsupportedLayout
from ..key_digest import digest
from ..process.torch_state import neutral_torch_state, writing_into
from ..profiles.rates import FixedSize
from .page_codec import CHUNK_TOKENS, PageCodec
from .page_layout import PACKINGS, SPLIT, PageLayout, lmcache_layout
from .position_search import check_fit, find_start
from .settings import AUTO, PREFIX, EngineSettings

LayoutOf = Callable[[Sequence[int]], PageLayout]
_FRAME = struct.Struct("<I")
_LARGEST_RATIO = 1e9
_NEAR = 1.0005


@dataclass(frozen=True)
class ChunkOptions:
    """What a cache server does not know of the engine's pages, so that the user tells it.

    packing, page_tokens: as of `lmcache_layout`, for engines on CPUs. max_tokens: where a chunk's position is not told, it is
    searched below this one.
    """

    packing: str = SPLIT
    page_tokens: int = 1
    max_tokens: int = 131072

    @classmethod
    def split(cls, config: Mapping[str, Any]) -> tuple[ChunkOptions, dict[str, Any]]:
        """(these options, all others) of an engine's configuration. Raises `InvalidArgument`."""
        names = [f"{PREFIX}{name}" for name in ("packing", "page_tokens", "max_tokens")]
        others = {key: value for key, value in config.items() if key not in names}
        options = cls(**{key.removeprefix(PREFIX): config[key] for key in names if key in config})
        if options.packing not in PACKINGS:
            raise InvalidArgument(f"{PREFIX}packing is {options.packing!r}; expected one of {', '.join(PACKINGS)}")
        for name in ("page_tokens", "max_tokens"):
            if not isinstance(getattr(options, name), int) or getattr(options, name) < 1:
                raise InvalidArgument(f"{PREFIX}{name} is {getattr(options, name)!r}; expected at least 1")
        return options, others

    def lmcache_layout(self, shape: Sequence[int], calibration: Calibration) -> PageLayout:
        """The layout of an LMCache chunk of this shape."""
        geometry = calibration.geometry
        return lmcache_layout(
            shape,
            geometry.n_layers,
            geometry.n_kv_heads,
            geometry.head_dim,
            page_tokens=self.page_tokens,
            packing=self.packing,
        )


class ChunkCoder:
    """Chunks of one worker -> streams, each as long as its content asks for. Safe to share between threads.

    layout_of: shape of a chunk -> its layout. spacing: chunks begin at multiples of so many tokens; None: of
    their own length.
    """

    def __init__(
        self,
        calibration: Calibration,
        settings: EngineSettings,
        layout_of: LayoutOf,
        spacing: int | None,
        max_tokens: int,
    ) -> None:
        self.calibration = calibration
        if settings.profile == AUTO:
            settings = replace(settings, profile="paper" if calibration.joint is None else "joint")
        self._codec = PageCodec(calibration, settings)
        self._codec.profile(has_token_ids=False)  # refuses conditional
        self._layout_of, self._spacing, self._max_tokens = layout_of, spacing, max_tokens

    @property
    def name(self) -> bytes:
        """Digest of all that a stream depends on besides its chunk."""
        settings = self._codec.codec(has_token_ids=False).settings_digest
        return digest("chunk coder", calibration=self.calibration.fingerprint, settings=settings)

    @neutral_torch_state
    def encode(self, data: Tensor, start: int | None = None) -> bytes:
        """A chunk, whose first token stands at start (None: it is searched) -> stream.

        Raises `UnsupportedLayout`, `InvalidCache`, `GeometryMismatch`.
        """
        keys, values = _read(data, self._layout_of(data.shape))
        start = _checked_start(keys, self.calibration, start, self._spacing, self._max_tokens)
        return self._codec.encode(keys, values, start)

    @neutral_torch_state
    def decode(self, stream: bytes, data: Tensor) -> None:
        """Fill a chunk from its stream. Raises `UnsupportedLayout` and what `Codec.decode` raises."""
        layout = self._layout_of(data.shape)
        keys, values = self._codec.decode(stream, None, _count_tokens(data.shape, layout))
        _write(keys, values, data, layout)


class FixedChunkCoder:
    """Chunks of one worker -> as many bytes whatever they hold: 4 that say how long the stream is, the stream, zeros.

    Where a text begins, four tokens are kept exactly: the rest of that chunk gets a higher ratio, so that its stream fits as well.
    """

    def __init__(
        self,
        calibration: Calibration,
        settings: EngineSettings,
        layout_of: LayoutOf,
        spacing: int | None,
        max_tokens: int,
    ) -> None:
        for name in ("step", "kl"):
            if getattr(settings, name) is not None:
                raise InvalidArgument(f"streams of a fixed size need {PREFIX}ratio, not {PREFIX}{name}")
        if settings.profile not in (AUTO, "joint"):
            raise InvalidArgument(
                f"streams of a fixed size are of the profile joint; {PREFIX}profile is {settings.profile}"
            )
        self.calibration = calibration
        self._codec = PageCodec(calibration, replace(settings, profile="joint"), fixed_size=True).codec(False)
        self._layout_of, self._spacing, self._max_tokens = layout_of, spacing, max_tokens
        self._sizes: dict[tuple[int, torch.dtype], int] = {}
        self._firsts: dict[tuple[int, torch.dtype], Codec] = {}

    def size(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Bytes of every chunk of this shape. Raises `UnsupportedLayout`."""
        layout = self._layout_of(shape)
        return _FRAME.size + self._stream_size(_count_tokens(shape, layout), dtype)

    @neutral_torch_state
    def encode(self, data: Tensor, start: int | None = None) -> bytes:
        """As `ChunkCoder.encode`, but `size` bytes."""
        keys, values = _read(data, self._layout_of(data.shape))
        start = _checked_start(keys, self.calibration, start, self._spacing, self._max_tokens)
        codec = self._codec if start else self._codec_of_first(keys.shape[2], data.dtype)
        geometry = self.calibration.geometry
        positions = torch.arange(start, start + keys.shape[2])
        stream = codec.encode(KVCache(keys, values, positions, geometry.first_layer, geometry.first_kv_head))
        return (_FRAME.pack(len(stream)) + stream).ljust(self.size(data.shape, data.dtype), b"\0")

    @neutral_torch_state
    def decode(self, framed: bytes, data: Tensor) -> None:
        """Fill a chunk from its bytes. Raises `CorruptStream`, `UnsupportedLayout` and what `Codec.decode` raises."""
        layout = self._layout_of(data.shape)
        (n_bytes,) = _FRAME.unpack_from(framed) if len(framed) >= _FRAME.size else (len(framed),)
        stream = framed[_FRAME.size : _FRAME.size + n_bytes]
        if len(stream) != n_bytes:
            raise CorruptStream(f"a stream of {n_bytes} bytes is said to lie in {len(framed)} bytes")
        cache = self._codec.decode_neutral(stream, None, _count_tokens(data.shape, layout))
        _write(cache.keys, cache.values, data, layout)

    def _stream_size(self, n_tokens: int, dtype: torch.dtype) -> int:
        """Of a chunk inside a text, or what the first one takes at the least, where that is more."""
        if (n_tokens, dtype) not in self._sizes:
            least = self._codec.with_rate(FixedSize(_LARGEST_RATIO)).stream_bytes(n_tokens, dtype)
            inside = self._codec.stream_bytes(n_tokens, dtype, first_position=CHUNK_TOKENS)
            self._sizes[n_tokens, dtype] = max(least, inside)
        return self._sizes[n_tokens, dtype]

    def _codec_of_first(self, n_tokens: int, dtype: torch.dtype) -> Codec:
        """For the first chunk of a text: the lowest ratio at which it takes no more than any other."""
        if (n_tokens, dtype) not in self._firsts:
            self._firsts[n_tokens, dtype] = self._codec.with_rate(FixedSize(self._ratio_of_first(n_tokens, dtype)))
        return self._firsts[n_tokens, dtype]

    def _ratio_of_first(self, n_tokens: int, dtype: torch.dtype) -> float:
        most, low, high = self._stream_size(n_tokens, dtype), self._ratio, _LARGEST_RATIO
        if self._codec.stream_bytes(n_tokens, dtype) <= most:
            return low
        while high > low * _NEAR:
            middle = math.sqrt(low * high)
            fits = self._codec.with_rate(FixedSize(middle)).stream_bytes(n_tokens, dtype) <= most
            low, high = (low, middle) if fits else (middle, high)
        return high

    @property
    def _ratio(self) -> float:
        rate = self._codec.rate
        if not isinstance(rate, FixedSize):
            raise InvalidArgument("a fixed size needs the profile joint")
        return rate.ratio


def _count_tokens(shape: Sequence[int], layout: PageLayout) -> int:
    return math.prod(shape) // layout.page_values * layout.page_tokens


def _read(data: Tensor, layout: PageLayout) -> tuple[Tensor, Tensor]:
    """A chunk -> keys, values [L, H, T, D]; `UnsupportedLayout` for numbers that mean nothing without scales."""
    if data.dtype.itemsize == 1:
        raise UnsupportedLayout(f"the cache is {data.dtype}, and nobody tells the scales of its numbers; use 16 bits")
    return layout.read(data)


def _checked_start(
    keys: Tensor, calibration: Calibration, start: int | None, spacing: int | None, max_tokens: int
) -> int:
    """Where a chunk stands: as told, or searched."""
    if start is None:
        start = find_start(keys, calibration, spacing or keys.shape[2], max_tokens)
    check_fit(keys, calibration, start)
    return start


def _write(keys: Tensor, values: Tensor, data: Tensor, layout: PageLayout) -> None:
    with writing_into(data):
        data.copy_(layout.write(keys.to(data.dtype), values.to(data.dtype)).reshape(data.shape))
