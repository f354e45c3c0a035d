"""Chunks as cache servers hold them, tensors of one worker without token ids, as streams and
back."""

from __future__ import annotations

import logging
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor

from ..calibration import Calibration
from ..codec import Codec
from ..container.stream import parse_stream
from ..errors import CorruptStream, GeometryMismatch, InvalidArgument, UnsupportedLayout
from ..key_digest import digest
from ..process.log_limits import log_once
from ..process.torch_state import neutral_torch_state, writing_into
from ..profiles.rates import FixedSize
from .opaque_layout import OpaqueLayout, numbers_of, rows_layout
from .page_layout import PageLayout
from .position_search import check_fit, find_start
from .settings import AT_LEAST_ONE, AUTO, PREFIX, TEXT, EngineSettings, of_rank
from .windowless_codec import CHUNK_TOKENS, WindowlessCodec, cache_of

LayoutOf = Callable[[Sequence[int]], PageLayout | OpaqueLayout]
logger = logging.getLogger(__name__)

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
        exact_layout_of: Gives the layout of a chunk that the calibration does not cover, which is kept exactly.

    Raises:
        InvalidArgument: The calibration does not serve the settings.
    """

    def __init__(
        self,
        calibration: Calibration | None,
        settings: ChunkSettings,
        layout_of: LayoutOf,
        spacing: int | None = None,
        exact_layout_of: LayoutOf = rows_layout,
    ) -> None:
        self._codec = WindowlessCodec(calibration, settings)
        self._chunks = _Chunks(self._codec.calibration, layout_of, spacing, settings.max_tokens)
        is_exact = self._codec.calibration is None
        self._others = None if is_exact else ChunkCoder(None, settings, exact_layout_of)

    @property
    def name(self) -> bytes:
        """Digest of all that a stream depends on besides its chunk."""
        calibration, settings = self._codec.names
        return digest("chunk coder", calibration=calibration, settings=settings)

    def needs_start(self, data: Tensor) -> bool:
        """Whether the stream of a chunk depends on its position; it does not where the chunk is kept exactly."""
        try:
            self._chunks.covered(data)
        except UnsupportedLayout:
            return False
        return self._others is not None

    @neutral_torch_state
    def encode(self, data: Tensor, start: int | None = None) -> bytes:
        """The stream of a chunk.

        Parameters:
            data: The chunk. If the calibration covers no chunk of its shape and dtype, it is kept exactly, which is logged.
            start: Position of its first token; None: it is searched. (Exact chunks do not depend on it.)

        Raises:
            UnsupportedLayout: The calibration covers the chunk, but the keys are not those of the calibrated model at this
                position; or there is no calibration and the layout is unknown.
            InvalidCache, GeometryMismatch: As `Codec.encode`.
        """
        try:
            layout = self._chunks.covered(data)
        except UnsupportedLayout as error:
            if self._others is None:
                raise
            kind = f"{len(data.shape)} axes of {data.dtype}"
            log_once(logger, kind, "a chunk that the calibration does not cover is kept without loss: %s", error)
            return self._others.encode(data)
        return self._codec.encode(*self._chunks.read(layout, data, start))

    @neutral_torch_state
    def decode(self, stream: bytes, data: Tensor) -> None:
        """Fill a chunk from its stream.

        Raises:
            UnsupportedLayout: The layout of `data` is unknown.
            GeometryMismatch: An exact stream has another dtype than `data`.
            KvtcError: As `Codec.decode`.
        """
        if self._others is not None and not any(parse_stream(stream).header.fingerprint):
            self._others.decode(stream, data)
            return
        keys, values = self._codec.decode(stream, None, self._chunks.n_tokens(data.shape))
        self._chunks.write(keys, values, data)

    def compile(self, dtype: torch.dtype) -> None:
        """As `WindowlessCodec.compile`, for chunks of any dtype."""
        if self._others is not None and dtype.itemsize == 1:
            self._others.compile(dtype)
        else:
            self._codec.compile(numbers_of(dtype))


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
        self, calibration: Calibration | None, settings: ChunkSettings, layout_of: LayoutOf, spacing: int | None = None
    ) -> None:
        if settings.lossless:
            raise InvalidArgument(
                f"streams of a fixed size need {PREFIX}ratio: lossless ones have a length of their own, which the L2 adapter "
                "kvtc.engines.lmcache.l2 stores"
            )
        for name in ("step", "kl"):
            if getattr(settings, name) is not None:
                raise InvalidArgument(f"streams of a fixed size need {PREFIX}ratio, not {PREFIX}{name}")
        if settings.profile not in (AUTO, "joint"):
            raise InvalidArgument(
                f"streams of a fixed size are of the profile joint; {PREFIX}profile is {settings.profile}"
            )
        self._windowless = WindowlessCodec(calibration, replace(settings, profile="joint"), fixed_size=True)
        self._codec = self._windowless.codec
        self._chunks = _Chunks(calibration, layout_of, spacing, settings.max_tokens)
        self._stream_size, self._codec_of_first = cache(self._find_stream_size), cache(self._find_codec_of_first)

    def size(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Bytes of every chunk of this shape and dtype. Raises `UnsupportedLayout`."""
        return _FRAME.size + self._stream_size(self._chunks.n_tokens(shape), dtype)

    @neutral_torch_state
    def encode(self, data: Tensor, start: int | None = None) -> bytes:
        """As `ChunkCoder.encode`, in `size` bytes."""
        keys, values, start = self._chunks.read(self._chunks.covered(data), data, start)
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

    def compile(self, dtype: torch.dtype) -> None:
        """As `WindowlessCodec.compile`."""
        self._windowless.compile(dtype)

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


def restored_bytes(stream: bytes) -> int:
    """Bytes of the chunk that a stream was made of.

    Parameters:
        stream: Of a `ChunkCoder`.

    Raises:
        CorruptStream, TruncatedStream, UnsupportedVersion: It cannot be read.
    """
    parsed = parse_stream(stream)
    return parsed.n_tokens * parsed.header.joint_features * parsed.header.dtype.itemsize


@dataclass(frozen=True)
class _Chunks:
    """How chunks of one worker lie in memory, and where in their texts they can stand."""

    calibration: Calibration | None
    layout_of: LayoutOf
    spacing: int | None
    max_tokens: int

    def n_tokens(self, shape: Sequence[int]) -> int:
        """Tokens of a chunk of this shape; those of an exact one may end with zeros that fill a page."""
        layout = self.layout_of(shape)
        return -(-math.prod(shape) // layout.page_values) * layout.page_tokens

    def covered(self, data: Tensor) -> PageLayout | OpaqueLayout:
        """The layout of a chunk that can be coded. Raises `UnsupportedLayout`."""
        if self.calibration is not None and (data.dtype.itemsize == 1 or not data.is_floating_point()):
            raise UnsupportedLayout(
                f"the cache is {data.dtype}, and its scales are not known; expected 16 bits or more"
            )
        return self.layout_of(data.shape)

    def read(self, layout: PageLayout | OpaqueLayout, data: Tensor, start: int | None) -> tuple[Tensor, Tensor, int]:
        """keys, values [L, H, T, D] of a chunk, and its position: the one that is given, or the one
        that is found."""
        if self.calibration is None:
            numbers = data.reshape(-1).view(numbers_of(data.dtype))
            n_missing = -len(numbers) % layout.page_values
            if n_missing:
                numbers = torch.cat([numbers, numbers.new_zeros(n_missing)])
            return *layout.read(numbers), 0
        keys, values = layout.read(data)
        if start is None:
            start = find_start(keys, self.calibration, self.spacing or keys.shape[2], self.max_tokens)
        check_fit(keys, values, self.calibration, start)
        return keys, values, start

    def write(self, keys: Tensor, values: Tensor, data: Tensor) -> None:
        """Fill a chunk."""
        with writing_into(data):
            if self.calibration is not None:
                written = self.layout_of(data.shape).write(keys.to(data.dtype), values.to(data.dtype))
                data.copy_(written.reshape(data.shape))
                return
            if keys.dtype != numbers_of(data.dtype):
                raise GeometryMismatch(f"the stream keeps numbers of {keys.dtype}; expected {numbers_of(data.dtype)}")
            numbers = self.layout_of(data.shape).write(keys, values).reshape(-1)[: data.numel()]
            data.copy_(numbers.view(data.dtype).reshape(data.shape))
