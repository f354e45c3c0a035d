"""Chunks as cache servers hold them, tensors of one worker without token ids, as streams and
back."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor

from ..calibration import Calibration
from ..codec import Codec
from ..errors import CorruptStream, InvalidArgument, UnsupportedLayout
from ..key_digest import digest
from ..process.torch_state import neutral_torch_state, writing_into
from ..profiles.rates import FixedSize
from .opaque_layout import OpaqueLayout, numbers_of
from .page_layout import PageLayout
from .position_search import check_fit, find_start
from .settings import AT_LEAST_ONE, AUTO, PREFIX, TEXT, EngineSettings, of_rank
from .windowless_codec import CHUNK_TOKENS, WindowlessCodec, cache_of

LayoutOf = Callable[[Sequence[int]], PageLayout | OpaqueLayout]
_FRAME = struct.Struct("<I")
_LARGEST_RATIO = 1e9
_NEAR = 1.0005


@dataclass(frozen=True)
class ChunkSettings(EngineSettings):
    """The options of an engine that gives chunks without token ids.

    Parameters:
        max_tokens: Where the engine does not say at which position a chunk stands, it is searched
            below this one.
        metrics_file: Path of a file for metrics, with `{tp_rank}` and `{pp_rank}` as in `calibration`;
            None: there is none.
    """

    max_tokens: int = field(default=131072, metadata=AT_LEAST_ONE)
    metrics_file: str | None = field(default=None, metadata=TEXT)

    def metrics_path(self, tp_rank: int = 0, pp_rank: int = 0) -> str | None:
        """The file of metrics of a worker. Raises `InvalidArgument` for other names in braces."""
        return None if self.metrics_file is None else of_rank("metrics_file", self.metrics_file, tp_rank, pp_rank)


class ChunkCoder:
    """Codes chunks of one worker, each as long as its content asks for. Safe to share between
    threads.

    Parameters:
        calibration: Of the worker's layers and heads; None: chunks are exact, and may hold anything.
        settings: Profile, rate and device.
        layout_of: Gives the layout of a chunk from its shape.
        spacing: Chunks begin at multiples of so many tokens; None: of their own length.

    Raises:
        InvalidArgument: The calibration does not serve the settings.
    """

    def __init__(
        self, calibration: Calibration | None, settings: ChunkSettings, layout_of: LayoutOf, spacing: int | None = None
    ) -> None:
        self._codec = WindowlessCodec(calibration, settings)
        self._chunks = _Chunks(self._codec.calibration, layout_of, spacing, settings.max_tokens)

    @property
    def name(self) -> bytes:
        """Digest of all that a stream depends on besides its chunk."""
        calibration, settings = self._codec.names
        return digest("chunk coder", calibration=calibration, settings=settings)

    @neutral_torch_state
    def encode(self, data: Tensor, start: int | None = None) -> bytes:
        """The stream of a chunk.

        Parameters:
            data: The chunk, of any shape whose layout is known, in 16 or 32 bits, or in any where chunks are exact.
            start: Position of its first token; None: it is searched. (Exact chunks do not depend on it.)

        Raises:
            UnsupportedLayout: The layout is unknown, or the keys are not those of the calibrated
                model at this position.
            InvalidCache, GeometryMismatch: As `Codec.encode`.
        """
        return self._codec.encode(*self._chunks.read(data, start))

    @neutral_torch_state
    def decode(self, stream: bytes, data: Tensor) -> None:
        """Fill a chunk from its stream.

        Raises:
            UnsupportedLayout: The layout of `data` is unknown.
            KvtcError: As `Codec.decode`.
        """
        keys, values = self._codec.decode(stream, None, self._chunks.n_tokens(data.shape))
        self._chunks.write(keys, values, data)


class FixedChunkCoder:
    """Codes chunks of one worker in as many bytes whatever they hold: 4 bytes with the length of
    the stream, the stream, zeros.

    Where a text begins, four tokens are exact: the rest of that chunk gets a higher ratio, so that
    its stream fits as well.

    Parameters:
        calibration, settings, layout_of, spacing: As of `ChunkCoder`.

    Raises:
        InvalidArgument: The settings give a step or a kl, or another profile than `joint`.
    """

    def __init__(
        self, calibration: Calibration, settings: ChunkSettings, layout_of: LayoutOf, spacing: int | None = None
    ) -> None:
        if settings.lossless:
            raise InvalidArgument(
                f"streams of a fixed size need {PREFIX}ratio: lossless ones have a length of their own"
            )
        for name in ("step", "kl"):
            if getattr(settings, name) is not None:
                raise InvalidArgument(f"streams of a fixed size need {PREFIX}ratio, not {PREFIX}{name}")
        if settings.profile not in (AUTO, "joint"):
            raise InvalidArgument(
                f"streams of a fixed size are of the profile joint; {PREFIX}profile is {settings.profile}"
            )
        self._codec = WindowlessCodec(calibration, replace(settings, profile="joint"), fixed_size=True).codec
        self._chunks = _Chunks(calibration, layout_of, spacing, settings.max_tokens)
        self._stream_size, self._codec_of_first = cache(self._find_stream_size), cache(self._find_codec_of_first)

    def size(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Bytes of every chunk of this shape and dtype. Raises `UnsupportedLayout`."""
        return _FRAME.size + self._stream_size(self._chunks.n_tokens(shape), dtype)

    @neutral_torch_state
    def encode(self, data: Tensor, start: int | None = None) -> bytes:
        """As `ChunkCoder.encode`, in `size` bytes."""
        keys, values, start = self._chunks.read(data, start)
        codec = self._codec if start else self._codec_of_first(keys.shape[2], data.dtype)
        stream = codec.encode(cache_of(codec.geometry, keys, values, start))
        return (_FRAME.pack(len(stream)) + stream).ljust(self.size(data.shape, data.dtype), b"\0")

    @neutral_torch_state
    def decode(self, framed: bytes, data: Tensor) -> None:
        """Fill a chunk from its bytes.

        Raises:
            CorruptStream: There are fewer bytes than the first four say.
            UnsupportedLayout, KvtcError: As `ChunkCoder.decode`.
        """
        (n_bytes,) = _FRAME.unpack_from(framed) if len(framed) >= _FRAME.size else (len(framed),)
        stream = framed[_FRAME.size : _FRAME.size + n_bytes]
        if len(stream) != n_bytes:
            raise CorruptStream(f"a stream of {n_bytes} bytes is said to lie in {len(framed)} bytes")
        cache = self._codec.decode_neutral(stream, None, self._chunks.n_tokens(data.shape))
        self._chunks.write(cache.keys, cache.values, data)

    def _find_stream_size(self, n_tokens: int, dtype: torch.dtype) -> int:
        """Of a chunk inside a text, or what the first one takes at the least, where that is
        more."""
        least = self._codec.with_rate(FixedSize(_LARGEST_RATIO)).stream_bytes(n_tokens, dtype)
        return max(least, self._codec.stream_bytes(n_tokens, dtype, first_position=CHUNK_TOKENS))

    def _find_codec_of_first(self, n_tokens: int, dtype: torch.dtype) -> Codec:
        """For the first chunk of a text: the lowest ratio at which it takes no more than any
        other."""
        rate, most = self._codec.rate, self._stream_size(n_tokens, dtype)
        if not isinstance(rate, FixedSize):
            raise InvalidArgument("a fixed size needs the profile joint")
        if self._codec.stream_bytes(n_tokens, dtype) <= most:
            return self._codec
        low, high = rate.ratio, _LARGEST_RATIO
        while high > low * _NEAR:
            middle = math.sqrt(low * high)
            fits = self._codec.with_rate(FixedSize(middle)).stream_bytes(n_tokens, dtype) <= most
            low, high = (low, middle) if fits else (middle, high)
        return self._codec.with_rate(FixedSize(high))


@dataclass(frozen=True)
class _Chunks:
    """How chunks of one worker lie in memory, and where in their texts they can stand."""

    calibration: Calibration | None
    layout_of: LayoutOf
    spacing: int | None
    max_tokens: int

    def n_tokens(self, shape: Sequence[int]) -> int:
        """Tokens of a chunk of this shape."""
        layout = self.layout_of(shape)
        return math.prod(shape) // layout.page_values * layout.page_tokens

    def read(self, data: Tensor, start: int | None) -> tuple[Tensor, Tensor, int]:
        """keys, values [L, H, T, D] of a chunk, and its position: the one that is given, or the one
        that is found."""
        layout = self.layout_of(data.shape)
        if self.calibration is None:
            return *layout.read(data.view(numbers_of(data.dtype))), 0
        if data.dtype.itemsize == 1:
            raise UnsupportedLayout(
                f"the cache is {data.dtype}, and its scales are not known; expected 16 bits or more"
            )
        keys, values = layout.read(data)
        if start is None:
            start = find_start(keys, self.calibration, self.spacing or keys.shape[2], self.max_tokens)
        check_fit(keys, values, self.calibration, start)
        return keys, values, start

    def write(self, keys: Tensor, values: Tensor, data: Tensor) -> None:
        """Fill a chunk."""
        with writing_into(data):
            numbers = data.dtype if self.calibration is not None else numbers_of(data.dtype)
            written = self.layout_of(data.shape).write(keys.to(numbers), values.to(numbers))
            data.copy_(written.reshape(data.shape).view(data.dtype))
