"""The codec: what users call. The stages that turn a cache into a stream and back stand in `pipeline`, in their order."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..backends import Bytes, Target, make_backend
from ..cache import CACHE_DTYPES, CacheGeometry, KVCache, TokenIds
from ..calibration.artifact import Calibration, covers
from ..coding.device import usable_device
from ..coding.regions import ChunkSpan, split_regions
from ..coding.rope import NO_ROTATION, Rope
from ..container.groups import FULL_ATTENTION, LATENT, WINDOW, Group
from ..container.stream import Stream, parse_stream
from ..container.tables import FORMAT_VERSION, JOINT, LOSSLESS, Chunk, Header
from ..errors import CorruptStream, InvalidArgument, InvalidCache, StreamTooLarge, UnsupportedModel
from ..key_digest import digest
from ..layer_runs import describe_layers
from ..process.forks import in_child
from ..process.locks import ForkSafeLock
from ..process.torch_state import compute_alone, neutral_torch_state, writing_into
from ..profiles import AnyEncoder, AnyProfile, LosslessProfile, make_profile
from ..profiles.interface import CodedRows
from ..profiles.rates import FixedSize, Lossless, Rate
from . import pipeline
from . import transformers_cache as interop
from .coded_groups import open_window, restored_window
from .exact_groups import ExactGroup, check_beginning, check_restorable, read_group, read_groups, start_of
from .fixed_size import fixed_stream_bytes
from .opened_stream import MAX_TOKENS, OpenedStream, check_calibration, open_stream, shift_to
from .options import (
    RateArguments,
    as_ids,
    as_tensor,
    check_is_calibration,
    check_limit,
    check_regions,
    product_dtype,
    stream_settings,
)
from .pipeline import Decoding
from .recomputing import recomputation_of, recompute_cache
from .resume_points import ResumePoints
from .sealed_stream import chunks_of, draft_stream, exact_settings, fingerprint_of
from .transformers_cache import SplitCache


class Codec:
    """Encodes caches of one calibrated model at one rate, and decodes every stream made with the same calibration.

    A codec is safe to share between threads, and can be pickled. In a forked child PyTorch computes on one thread; a child that
    is to use more is spawned.

    Parameters:
        calibration: of the model, from `kvtc.load_calibration` or `kvtc.calibrate`. None (default): a lossless codec needs none,
            and then takes the cache of any model.
        profile: "paper", "joint" or "conditional". The last one recomputes the first layers of the model, so it needs `model`,
            and encode and decode need the ids of all tokens from position 0 on. Default: "joint", or "paper" where the calibration
            serves that alone or an option of it is given.
        ratio: bits of the cache over bits of the coded body; default 16. `joint` and `conditional` meet it in real bytes
            (body_ratio). `paper` counts bits before lossless coding, as published, so its real body_ratio is higher.
        sink_tokens: tokens at the beginning that are stored exactly; default 4.
        window_tokens: tokens at the end that are stored exactly; default 128.
        key_ratio: `paper` only: the ratio of keys alone.
        value_ratio: `paper` only: the ratio of values alone.
        step: instead of a ratio, the quantizer's step itself, so that equal chunks of different caches have equal bytes.
        kl: instead of a ratio, the divergence in nats that the model's predictions have at most, on average over texts like those
            of the calibration, by its quality curve; lossless below the curve.
        max_error: `paper` only, instead of a ratio: the largest relative error of keys, and of values, 0 to 1.
        rate: instead of all of these, a rate as a type of `kvtc.profiles.rates`; ablations are asked for by it.
        lossless: instead of a rate, keep every token exactly, bit for bit; sinks, window and profile are then not used.
        coder: the lossless coder of the body of `paper`, of fp8 sinks and of positions: "deflate" (default), "zstd",
            "lz4" or "none". Exact tokens have a coder of their own, which "none" also leaves out.
        sink_format: "exact" (default) or "fp8".
        window_format: "exact" (default), or "coded": as the body, with a quarter of its step (`joint`, `conditional`).
        states: how recurrent states are kept: "lossless", or rounded to "int8" or "int6" with a scale for each row, also where
            tokens are lossless. Default: "int8", or "lossless" where tokens are. States of convolutions are always lossless.
        fixed_size: whether all streams of tokens at the same positions have the same length, which `stream_bytes` tells: the step
            is as fine as fits, and the rest is padding (`joint`, `conditional`, with a ratio). Default False.
        chunk_tokens: tokens of a chunk, the unit of random access; default 256.
        max_tokens: how many tokens decode may restore besides those that `tokens` or `token_ids` name; a limit is needed, because
            few bytes may stand for many tokens. Default 2**20.
        model: the calibrated model, for `conditional`: a transformers model in memory, or the path of a checkpoint folder, of
            which the embedding and the recomputed layers alone are read.
        device: where the arithmetic runs; default "cpu".
        backend: "reference", "triton", or "auto" (default): Triton on CUDA devices if it is installed, else the reference.
        precision: dtype that both sides of a product are rounded to: "float32", "bfloat16", or "auto" (default): bfloat16 on
            CUDA devices, else float32. Sums are float32.

    Raises:
        InvalidArgument: for arguments that can never work, or that contradict one another, and for a model of other weights than
            those that the calibration was made with.
        BackendUnavailable: for a backend that cannot run on the device.

    Source: Staniszewski et al. 2025, "KV Cache Transform Coding for Compact Storage in LLM Inference", for the pipeline.

    Example:
        >>> codec = kvtc.Codec(calibration, "joint", ratio=32, window_tokens=64)
        >>> info = kvtc.inspect(codec.encode(cache, token_ids))
        >>> info.profile, round(info.body_ratio), info.window_tokens
        ('joint', 32, 64)
    """

    @neutral_torch_state
    def __init__(
        self,
        calibration: Calibration | None = None,
        profile: str | None = None,
        ratio: float | None = None,
        sink_tokens: int = 4,
        window_tokens: int = 128,
        key_ratio: float | None = None,
        value_ratio: float | None = None,
        *,
        step: float | None = None,
        kl: float | None = None,
        max_error: float | None = None,
        rate: Rate | None = None,
        lossless: bool = False,
        coder: str = "deflate",
        sink_format: str = "exact",
        window_format: str = "exact",
        states: str | None = None,
        fixed_size: bool = False,
        chunk_tokens: int = 256,
        max_tokens: int = MAX_TOKENS,
        model: Any = None,
        device: str | torch.device = "cpu",
        backend: str = "auto",
        precision: str = "auto",
    ) -> None:
        check_is_calibration(calibration, lossless or isinstance(rate, Lossless))
        check_regions(sink_tokens, window_tokens)
        check_limit(max_tokens)
        arguments = RateArguments(ratio, step, kl, key_ratio, value_ratio, max_error, fixed_size, rate, lossless)
        profile = profile or arguments.profile or ("joint" if calibration and calibration.joint else "paper")
        self.calibration = calibration
        self.max_tokens = max_tokens
        self.rate = arguments.resolve(profile, calibration)
        profile = LOSSLESS if self.is_lossless else profile
        # Sections cost a little: where all tokens are exact, none is kept apart.
        self.sink_tokens, self.window_tokens = (0, 0) if self.is_lossless else (sink_tokens, window_tokens)
        self.settings = stream_settings(profile, chunk_tokens, coder, sink_format, window_format, states, self.rate)
        self.device = usable_device(device)
        self.backend = make_backend(self.device, backend)
        self._product = product_dtype(precision, self.device)
        self._lock = ForkSafeLock()
        self._recomputation = recomputation_of(model, calibration, self.device)
        self._profiles: dict[str, AnyProfile] = {}
        self._encoder = self._encoder_at(self.rate)
        in_child(self._renew)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a codec that was pickled (its calibration, settings and matrices are) or copied."""
        self.__dict__.update(state)
        in_child(self._renew)

    def _renew(self) -> None:
        """In a forked child, whose own code may compute before this codec does."""
        compute_alone()

    @neutral_torch_state
    def with_rate(self, rate: Rate) -> Codec:
        """The same codec at another rate; the matrices are shared.

        Parameters:
            rate: a rate of `kvtc.profiles.rates`, for streams of the same kind.

        Returns:
            The other codec.

        Raises:
            InvalidArgument: the profile lacks such a rate, or one of the two rates is of fixed size and the other is
                not.

        Example:
            >>> from kvtc.profiles.rates import Ratio
            >>> smaller = codec.with_rate(Ratio(64)).encode(cache)
            >>> round(kvtc.inspect(smaller).body_ratio)
            64
        """
        if isinstance(rate, FixedSize) is not self.settings.fixed_size:
            raise InvalidArgument(
                f"streams of this codec {'have' if self.settings.fixed_size else 'lack'} a fixed size"
            )
        other = copy.copy(self)
        other._lock = ForkSafeLock()
        other._profiles = dict(self._profiles)
        other.rate, other._encoder = rate, self._encoder_at(rate)
        return other

    @neutral_torch_state
    def encode(
        self, cache: Any, token_ids: Any = None, positions: Any = None, points: ResumePoints | None = None
    ) -> bytes:
        """A cache as a stream. The cache is left as it was.

        Parameters:
            cache: a transformers cache of batch 1, or a `KVCache`. The groups of layers that the calibration covers
                are coded at the codec's rate (with `joint` alone also sliding windows); recurrent states are kept as
                `states` says, and all other groups bit for bit.
            token_ids: [T] integers; their digest is stored and must match on decode. With `conditional` those of all
                tokens from position 0 on, up to the last of the cache, whose positions have no gaps. None (default):
                no digest is stored.
            positions: [T] integers, increasing: where the tokens stand. None (default): the cache's own, or 0 .. T-1.
            points: where besides its end the cache can be resumed, taken while it grew; of use where it has windows
                or states.

        Returns:
            The stream; docs/format.md describes its bytes.

        Raises:
            InvalidCache: the cache holds several sequences, NaN, infinities, or tensors of a shape or dtype that no
                cache has.
            GeometryMismatch: the cache has other layers or heads than the calibration covers.
            UnsupportedModel: the cache has a layer of a kind that kvtc does not know.
            InvalidArgument: token ids, positions or points do not fit the cache.

        Example:
            >>> stream = codec.encode(cache, token_ids)
            >>> kvtc.inspect(stream).n_tokens
            600
        """
        is_transformers = interop.is_transformers_cache(cache)
        if is_transformers:
            found = interop.TransformersCache(cache)
            if found.n_sequences != 1:
                raise InvalidCache(f"the cache holds {found.n_sequences} sequences; use encode_batch")
            split = found.split(self.covered)
        elif isinstance(cache, KVCache):
            cache.check_axes()
            split = interop.SplitCache(cache, [], cache.n_tokens)
        else:
            raise InvalidArgument(f"expected a transformers DynamicCache or a kvtc.KVCache, got {type(cache).__name__}")
        return self._encode(split, as_ids(token_ids), as_ids(positions), is_transformers, points)

    @neutral_torch_state
    def encode_split(self, split: SplitCache, token_ids: Any = None) -> bytes:
        """As `encode`, of groups of layers by themselves.

        Parameters:
            split: the groups, as `decode_split` gives them.
            token_ids: as in `encode`.

        Returns:
            The stream.

        Example:
            >>> split = codec.decode_split(stream)
            >>> again = codec.encode_split(split, token_ids)
            >>> kvtc.inspect(again).n_tokens == split.n_tokens == 600
            True
        """
        return self._encode(split, as_ids(token_ids), None, is_transformers=False)

    @neutral_torch_state
    def stream_bytes(
        self,
        n_tokens: int,
        dtype: torch.dtype = torch.bfloat16,
        first_position: int = 0,
        positions: Any = None,
    ) -> int:
        """The size of every stream that this codec, made with `fixed_size=True`, writes of so many tokens; no cache is
        needed.

        Parameters:
            n_tokens: tokens of the cache.
            dtype: of the cache; default bfloat16.
            first_position: of its first token; the others follow without gaps. Default 0.
            positions: [n_tokens] integers, increasing, in place of first_position.

        Returns:
            Bytes.

        Raises:
            InvalidArgument: the codec has no fixed size, or there are no such tokens or no caches of this dtype.

        Example:
            >>> fixed = kvtc.Codec(calibration, ratio=16, fixed_size=True)
            >>> fixed.stream_bytes(600) == len(fixed.encode(cache))
            True
        """
        if not self.settings.fixed_size:
            raise InvalidArgument("streams have a size of their own unless the codec is made with fixed_size=True")
        if dtype not in CACHE_DTYPES or n_tokens < 0 or first_position < 0:
            raise InvalidArgument(f"{n_tokens} tokens of {dtype} from position {first_position} cannot be")
        ids = as_ids(positions)
        places = torch.arange(first_position, first_position + n_tokens) if ids is None else torch.from_numpy(ids)
        if len(places) != n_tokens:
            raise InvalidArgument(f"{n_tokens} tokens, but {len(places)} positions")
        spans = self._spans(places)
        return self._size(chunks_of(self.settings, spans, places), dtype)

    @property
    def geometry(self) -> CacheGeometry:
        """The first group that is coded; `InvalidArgument` for a codec without a calibration.

        >>> codec.geometry.n_layers
        12
        """
        if self.calibration is None:
            raise InvalidArgument("this codec was made without a calibration, which is needed here")
        return self.calibration.geometry

    @property
    def fingerprint(self) -> bytes:
        """The 16 bytes by which streams name the calibration; zeros without one.

        >>> codec.fingerprint == calibration.fingerprint
        True
        """
        return fingerprint_of(self.calibration)

    @property
    def covered(self) -> list[CacheGeometry]:
        """Of the groups that a cache must have: those that are coded, or else the first that the calibration covers.

        >>> codec.covered == [codec.geometry]
        True
        """
        if self.calibration is None:
            return []
        if self.settings.profile == JOINT:
            return [group.geometry for group in self.calibration.groups]
        return [self.calibration.geometry]

    @property
    def is_lossless(self) -> bool:
        """Whether every token is kept exactly.

        >>> kvtc.Codec(lossless=True).is_lossless, codec.is_lossless
        (True, False)
        """
        return isinstance(self.rate, Lossless)

    @property
    def needs_prefix(self) -> bool:
        """Whether `encode` and `decode` need the ids of all tokens from position 0 on (`conditional`), not of the
        cache's own alone.

            >>> kvtc.Codec(calibration, "conditional", model=model).needs_prefix, codec.needs_prefix
            (True, False)
        """
        return self._encoder is not None and self._encoder.recomputation is not None

    def forget_prefix(self) -> None:
        """Drop what was recomputed last (`conditional`), which is kept in memory for texts that go on from it.

        >>> codec.forget_prefix()
        """
        if self._recomputation is not None:
            self._recomputation.forget()

    @property
    def settings_digest(self) -> bytes:
        """SHA-256 of all that a stream depends on besides the cache and the calibration, for the keys of entries.

        What counts is listed here by name: a field that is added elsewhere does not rename every entry.

            >>> codec.settings_digest == kvtc.Codec(calibration, ratio=32).settings_digest
            False
        """
        settings = self.settings
        return digest(
            "codec settings",
            format_version=FORMAT_VERSION,
            profile=settings.profile,
            chunk_tokens=settings.chunk_tokens,
            coder=settings.coder,
            fp8_sinks=settings.fp8_sinks,
            fixed_size=settings.fixed_size,
            coded_window=settings.coded_window,
            states=settings.states,
            rate=self.rate.key_parts,
            sink_tokens=self.sink_tokens,
            window_tokens=self.window_tokens,
        )

    def with_window(self, window_tokens: int) -> Codec:
        """The same codec with another window.

        Parameters:
            window_tokens: tokens at the end that are stored exactly; 0: all tokens but the sinks are coded.

        Returns:
            The other codec.

        Raises:
            InvalidArgument: window_tokens is negative.

        Example:
            >>> kvtc.inspect(codec.with_window(0).encode(cache)).body_tokens
            596
        """
        if window_tokens < 0:
            raise InvalidArgument(f"window_tokens {window_tokens} must not be negative")
        other = copy.copy(self)
        other.window_tokens = window_tokens
        return other

    @neutral_torch_state
    def decode(
        self, stream: Bytes, token_ids: Any = None, tokens: int | None = None, start_position: int | None = None
    ) -> Any:
        """A stream as a cache of the kind that was encoded, ready for `generate`.

        Parameters:
            stream: bytes, or uint8 [bytes] on a device, where coded bodies stay and are not held against their
                checksums again.
            token_ids: [T] integers, the ids the stream was made from, or those of its first `tokens`; the last chunk
                of a prefix is compared only if the ids of all its tokens are given. With `conditional` the ids of all
                tokens before them come first. None (default): nothing is compared.
            tokens: how many tokens are decoded, from the beginning; only the chunks that hold them are read, as
                wholes. None (default): all.
            start_position: where the first token is placed, instead of where it stood; keys are rotated to match, so
                that sinks and window are then exact up to rounding. None (default): where it stood.

        Returns:
            A transformers `DynamicCache`, or a `KVCache` if one was encoded.

        Raises:
            TruncatedStream, CorruptStream: the stream is damaged.
            UnsupportedVersion: the stream has another version, or holds what this kvtc does not know.
            CalibrationMismatch: the stream was made with another calibration.
            GeometryMismatch: the stream covers other layers or heads than the calibration.
            TokenMismatch: the stream was made from other token ids.
            StreamTooLarge: the stream stands for more tokens than `max_tokens` allows.
            InvalidArgument: `tokens` or `start_position` is out of range.

        Example:
            >>> prefix = codec.decode(stream, token_ids[:300], tokens=300)
            >>> prefix.get_seq_length()
            300
            >>> codec.decode(stream, token_ids + 1)
            Traceback (most recent call last):
            kvtc.errors.TokenMismatch: the token ids of chunk 0 (tokens 0 .. 255, from position 0) are not those of the stream
        """
        parsed = parse_stream(stream)
        if parsed.header.others:
            return self._decode_groups(parsed, token_ids, tokens, start_position)
        cache, is_transformers = self._decode(parsed, token_ids, tokens, start_position)
        return interop.as_transformers(cache) if is_transformers else cache

    @neutral_torch_state
    def decode_neutral(
        self, stream: Bytes, token_ids: Any = None, tokens: int | None = None, start_position: int | None = None
    ) -> KVCache:
        """As `decode`, but a `KVCache` whatever was encoded: with positions, and without transformers.

        Parameters:
            stream, token_ids, tokens, start_position: as in `decode`.

        Returns:
            The cache.

        Raises:
            UnsupportedModel: the stream has other layers than full attention. All others as in `decode`.

        Example:
            >>> restored = codec.decode_neutral(stream)
            >>> restored.keys.shape, restored.dtype
            (torch.Size([12, 3, 600, 32]), torch.bfloat16)
        """
        return self._decode(_of_one_group(stream), token_ids, tokens, start_position)[0]

    def _decode_groups(self, stream: Stream, token_ids: Any, tokens: int | None, start_position: int | None) -> Any:
        """A transformers cache of all groups."""
        if start_position is not None:
            raise InvalidArgument(
                "a cache of several groups of layers stays where it was: start_position cannot be given"
            )
        check_beginning(stream)
        return interop.from_split(self._decode_split(stream, token_ids, tokens), self.device)

    @neutral_torch_state
    def decode_split(self, stream: Bytes, token_ids: Any = None, tokens: int | None = None) -> SplitCache:
        """As `decode`, but the groups of layers by themselves; a stream of windows or states may begin after position 0.

        Parameters:
            stream, token_ids, tokens: as in `decode`.

        Returns:
            The group that is coded, as `coded` (None: there is none), and the exact groups, as `exact`.

        Example:
            >>> split = codec.decode_split(stream)
            >>> split.coded.n_tokens, split.exact
            (600, [])
        """
        return self._decode_split(parse_stream(stream), token_ids, tokens)

    def _decode_split(self, stream: Stream, token_ids: Any, tokens: int | None, start: int = 0) -> SplitCache:
        opened = self._open(stream, as_ids(token_ids), tokens)
        exact = self._others(stream, opened, start)
        coded = self._restored(opened, 0) if opened.header.coded is not None else None
        start = int(opened.positions[0]) if opened.n_tokens else 0
        return SplitCache(coded, exact, opened.n_tokens, start=start)

    def _others(self, stream: Stream, opened: OpenedStream, start: int = 0) -> list[ExactGroup]:
        """The groups beside the first that is coded, as they were after the tokens that are decoded; of windows what they hold
        of the tokens from position `start` on."""
        check_restorable(stream, opened.n_tokens, start)
        return [
            self._window(stream, opened, index)
            if stream.header.groups[index].is_coded
            else read_group(stream, index, opened.n_chunks, opened.n_tokens)
            for index in stream.header.others
        ]

    def _window(self, stream: Stream, opened: OpenedStream, index: int) -> ExactGroup:
        """A window that is coded."""
        group = stream.header.groups[index]
        number = self.calibration.number_of(group) if self.calibration is not None else None
        if number is None:
            raise CorruptStream(f"group {index} is coded, but the calibration does not cover it")
        decoder = self._profile(stream.header.profile).decoder(number)
        rows = open_window(stream, index, opened.n_chunks, opened.n_tokens, decoder, opened.plan)
        start = start_of(stream)
        return restored_window(group, self._restored(rows, 0, number), group.rows_held(start + opened.n_tokens, start))

    def _decoding(
        self, opened: Sequence[OpenedStream], shifts: Sequence[int] | None = None, waits: bool = True, number: int = 0
    ) -> Decoding:
        """waits: for exact tokens, so that every error of the streams is raised here. number: of the group."""
        header = opened[0].header
        if self.calibration is None:
            rope = Rope((), (NO_ROTATION,) * header.n_layers, is_known=False)
            geometry = CacheGeometry(header.layers, header.first_kv_head, header.n_kv_heads, *header.dims, rope)
        else:
            geometry = self.calibration.geometry_of(number)
        if any(shifts or ()) and not geometry.rope.is_known:
            raise InvalidArgument("the rotation of these keys is not known: start_position cannot be given")
        decoding = Decoding(opened, shifts or [0] * len(opened), geometry, self.backend)
        if waits:
            decoding.wait()
        return decoding

    def _decode(
        self, stream: Stream, token_ids: Any, tokens: int | None, start_position: int | None
    ) -> tuple[KVCache, bool]:
        """The cache of the only group, and whether it was one of transformers."""
        opened = self._open(stream, as_ids(token_ids), tokens)
        header = opened.header
        shift = shift_to(start_position, opened)
        return self._restored(opened, shift), header.is_transformers

    def _restored(self, opened: OpenedStream, shift: int, number: int = 0) -> KVCache:
        """A group that is coded. number: of it in the calibration."""
        header, decoding = opened.header, self._decoding([opened], [shift], False, number)
        shape = (header.n_layers, header.n_kv_heads, opened.n_tokens)
        keys, values = (torch.empty(*shape, dim, dtype=header.dtype, device=self.device) for dim in header.dims)
        decoding.write_layers(lambda layer: [(Target.of(keys[layer]), Target.of(values[layer]))])
        positions = opened.positions[: opened.n_tokens] + shift
        # 0: it was not recorded, for no frequency depends on it. Moved to the front, a length too short would be negative.
        rope_length = max(0, header.rope_length + shift) if header.rope_length else None
        return KVCache(keys, values, positions, header.layers, header.first_kv_head, rope_length)

    @neutral_torch_state
    def decode_layers(self, stream: Bytes, token_ids: Any = None) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The layers of a stream one after the other, each as soon as it is restored.

        Arguments and stream are checked, and coefficients decoded, before this returns.

        Parameters:
            stream, token_ids: as in `decode`.

        Returns:
            An iterator of (layer, keys [H, T, D], values [H, T, D]), first layer first.

        Raises:
            UnsupportedModel: the stream has other layers than full attention. All others as in `decode`.

        Example:
            >>> for layer, keys, values in codec.decode_layers(stream):
            ...     assert keys.shape == values.shape == (3, 600, 32)
            >>> layer
            11
        """
        opened = self._open(_of_one_group(stream), as_ids(token_ids), None)
        header, decoding = opened.header, self._decoding([opened])
        return ((layer, *decoding.new_layer(index)) for index, layer in enumerate(header.layers))

    @neutral_torch_state
    def decode_lazily(self, stream: Bytes, token_ids: Any = None, tokens: int | None = None) -> Any:
        """As `decode`, but always a `DynamicCache`, whose layers are restored when the model first comes to them.

        Arguments and stream are checked, and coefficients decoded, before this returns. On CUDA each layer is
        restored beside the computations of the one before it. A cache of several groups of layers is restored at
        once.

        Parameters:
            stream, token_ids, tokens: as in `decode`.

        Returns:
            The `DynamicCache`.

        Example:
            >>> lazy = codec.decode_lazily(stream)
            >>> torch.equal(lazy.layers[5].keys, codec.decode(stream).layers[5].keys)
            True
        """
        parsed = parse_stream(stream)
        if parsed.header.others:
            return self._decode_groups(parsed, token_ids, tokens, None)
        opened = self._open(parsed, as_ids(token_ids), tokens)
        decoding = self._decoding([opened])
        return interop.lazy_cache(decoding.new_layer, opened.n_tokens, opened.header, self.device)

    @neutral_torch_state
    def decode_into(
        self,
        stream: Bytes,
        targets: Sequence[tuple[Target, Target]],
        token_ids: Any = None,
        tokens: int | None = None,
        start_position: int | None = None,
    ) -> None:
        """A stream as keys and values of an engine: each layer is written where its targets say, such as in pages.

        What is read of the stream is checked before anything is written.

        Parameters:
            stream, token_ids, tokens, start_position: as in `decode`.
            targets: (of keys, of values) for each layer of the stream, each with a place for every token that is
                decoded, on the codec's device.

        Raises:
            InvalidArgument: the targets are of other layers or tokens.
            UnsupportedModel: the stream has other layers than full attention. All others as in `decode`.

        Example:
            >>> from kvtc.backends import Target
            >>> keys, values = torch.zeros(2, 12, 3, 600, 32, dtype=torch.bfloat16)
            >>> codec.decode_into(stream, [(Target.of(keys[layer]), Target.of(values[layer])) for layer in range(12)])
            >>> torch.equal(values, codec.decode_neutral(stream).values)
            True
        """
        opened = self._open(_of_one_group(stream), as_ids(token_ids), tokens)
        places = {len(target.token_offsets) for sides in targets for target in sides}
        if len(targets) != opened.header.n_layers or places != {opened.n_tokens}:
            raise InvalidArgument(
                f"targets for {len(targets)} layers and {sorted(places)} tokens; the stream holds {opened.header.n_layers} layers, "
                f"and {opened.n_tokens} tokens are decoded"
            )
        shift = shift_to(start_position, opened)
        decoding = self._decoding([opened], [shift])
        with writing_into(*(target.data for sides in targets for target in sides)):
            decoding.write_layers(lambda layer: [targets[layer]])

    @neutral_torch_state
    def encode_batch(self, cache: Any, token_ids: Any, attention_mask: Any) -> list[bytes]:
        """A left-padded transformers cache of several sequences as one stream each, without the padding.

        Parameters:
            cache: a transformers cache of batch B.
            token_ids: [B, T] integers.
            attention_mask: [B, T] integers or booleans; 0 marks padding. Positions count from the first real token,
                as `generate` counts them.

        Returns:
            B streams.

        Raises:
            InvalidArgument: ids or mask have another shape than the cache, or there is padding after real tokens. All
                others as in `encode`.

        Example:
            >>> batch = codec.decode_batch([stream, kvtc.split_stream(stream)[0]])
            >>> streams = codec.encode_batch(batch[0], token_ids.expand(2, 600), batch[1])
            >>> [kvtc.inspect(one).n_tokens for one in streams]
            [600, 256]
        """
        ids, mask = as_tensor(token_ids, "token ids"), as_tensor(attention_mask, "attention mask").bool()
        found = interop.TransformersCache(cache)
        shape = (found.n_sequences, ids.shape[-1] if found.n_tokens is None else found.n_tokens)
        if tuple(ids.shape) != shape or tuple(mask.shape) != shape:
            raise InvalidArgument(
                f"token_ids {tuple(ids.shape)} and attention_mask {tuple(mask.shape)} must both be {shape}: "
                "sequences and tokens of the cache (whose last token may not have been fed to the model yet)"
            )
        if bool((mask[:, 1:] < mask[:, :-1]).any()):
            raise InvalidArgument("the attention mask has padding after real tokens; kvtc expects padding on the left")
        streams = []
        for index in range(shape[0]):
            padding = int((~mask[index]).sum())
            part = found.split(self.covered, index, padding)
            streams.append(self._encode(part, as_ids(ids[index][mask[index]]), None, is_transformers=True))
        return streams

    @neutral_torch_state
    def decode_batch(self, streams: Sequence[Bytes], token_ids: Any = None) -> tuple[Any, Tensor]:
        """Streams of transformers caches as one left-padded cache. Padded places hold zeros.

        Parameters:
            streams: at least one.
            token_ids: one sequence of ids for each stream, or a tensor [B, T] padded on the left. None (default):
                nothing is compared.

        Returns:
            (a transformers cache of batch B, its attention mask [B, T] int64).

        Raises:
            InvalidArgument: there are no streams, ids do not fit them, or they hold different groups of layers.
            StreamTooLarge: the batch with its padding has more tokens than `max_tokens` allows. All others as in
                `decode`.

        Example:
            >>> cache_of_two, mask = codec.decode_batch([stream, kvtc.split_stream(stream)[0]])
            >>> mask.sum(dim=1)
            tensor([600, 256])
        """
        if not streams:
            raise InvalidArgument("there are no streams to decode")
        parsed = [parse_stream(stream) for stream in streams]
        lengths = [stream.n_tokens for stream in parsed]
        longest = max(lengths)
        ids = [None] * len(streams) if token_ids is None else [as_ids(row) for row in token_ids]
        if len(ids) != len(streams):
            raise InvalidArgument(f"{len(streams)} streams, but token ids for {len(ids)}")
        is_padded = isinstance(token_ids, Tensor)
        if is_padded and token_ids.shape[1] != longest:
            raise InvalidArgument(
                f"token_ids {tuple(token_ids.shape)} must be {(len(streams), longest)}: the tokens of the longest stream "
                "(to which the last token of an answer may not belong yet)"
            )
        n_places, named = len(streams) * longest, len(streams) * max(0 if row is None else len(row) for row in ids)
        if n_places > self.max_tokens + named:
            raise StreamTooLarge(
                f"a batch of {n_places} tokens with its padding would have to be decoded; {self.max_tokens + named} are allowed: "
                "give token_ids=, or the codec more max_tokens="
            )
        opened = []
        for index, (stream, length) in enumerate(zip(parsed, lengths, strict=True)):
            row = ids[index]
            row = row[longest - length :] if row is not None and is_padded else row
            check_beginning(stream)
            opened.append(self._open(stream, row, None))
            if _without_extents(opened[index].header) != _without_extents(opened[0].header):
                raise InvalidArgument(
                    f"stream {index} holds other groups of layers than stream 0: {describe_groups(stream.header)} instead of "
                    f"{describe_groups(parsed[0].header)}"
                )
        profiles = {stream.header.profile for stream in parsed}
        groups = [
            [index for index, stream in enumerate(parsed) if stream.header.profile == profile]
            for profile in sorted(profiles)
        ]
        # Coefficients come first: memory for the batch is asked for once all streams have proved sound.
        header = opened[0].header
        exact = [self._others(stream, one) for stream, one in zip(parsed, opened, strict=True)]
        decodings = [self._decoding([opened[index] for index in group]) for group in groups if header.coded is not None]
        mask = torch.zeros(len(streams), longest, dtype=torch.int64, device=self.device)
        for index, length in enumerate(lengths):
            mask[index, longest - length :] = 1
        if header.coded is None:
            return interop.grouped_cache(header, None, exact, lengths, self.device), mask
        shape = (len(streams), header.n_layers, header.n_kv_heads, longest)
        keys, values = (torch.zeros(*shape, dim, dtype=header.dtype, device=self.device) for dim in header.dims)
        for group, decoding in zip(groups, decodings, strict=True):
            for layer in range(header.n_layers):
                places = [(index, layer, slice(None), slice(longest - lengths[index], None)) for index in group]
                decoding.write_layer(layer, [(Target.of(keys[at]), Target.of(values[at])) for at in places])
        if not header.others:
            return interop.to_transformers(keys, values, header.layers), mask
        layers = [(keys[:, layer], values[:, layer]) for layer in range(header.n_layers)]
        return interop.grouped_cache(header, layers, exact, lengths, self.device), mask

    def _encode(
        self,
        split: SplitCache,
        token_ids: TokenIds | None,
        positions: TokenIds | None,
        is_transformers: bool,
        points: ResumePoints | None = None,
    ) -> bytes:
        cache = split.coded
        if split.exact and (positions is not None or self.settings.fixed_size):
            raise InvalidArgument(
                "a cache of several groups of layers stands at positions 0 and after, and its streams have no fixed size"
            )
        if cache is None:
            return self._encode_others(split, token_ids, is_transformers, points)
        if positions is not None:
            cache = replace(cache, positions=torch.from_numpy(positions))
        cache = cache.plain()
        cache.validate(is_finite=not self.is_lossless)
        if self.calibration is not None:
            self.calibration.geometry.check(cache)
        recomputation = None if self._encoder is None else self._encoder.recomputation
        recomputed = recompute_cache(recomputation, cache, token_ids, self.settings.profile)
        if recomputed is not None and token_ids is not None:
            token_ids = token_ids[recomputed.first :]
        if token_ids is not None and len(token_ids) != cache.n_tokens:
            raise InvalidArgument(f"the cache holds {cache.n_tokens} tokens, but {len(token_ids)} token ids are given")
        places = cache.resolved_positions()
        spans = self._spans(places)
        split = self._with_points(replace(split, coded=cache), points, cache.n_tokens)
        blocks = self.backend.block_coder
        draft = draft_stream(self.settings, self.calibration, split, is_transformers, token_ids, spans, places, blocks)
        if self._encoder is None or self.calibration is None:
            return draft.seal(b"", CodedRows(), is_final=True, size=None)
        size = self._size(list(draft.chunks), cache.dtype) if self.settings.fixed_size else None
        return pipeline.encode(recomputed, draft, size, self.calibration, self.backend, self._encoder)

    def _with_points(self, split: SplitCache, points: ResumePoints | None, n_tokens: int) -> SplitCache:
        if points is None:
            return split
        return replace(split, points=points.of(split, n_tokens, self.settings.chunk_tokens))

    def _encode_others(
        self, split: SplitCache, token_ids: TokenIds | None, is_transformers: bool, points: ResumePoints | None
    ) -> bytes:
        """A cache without full attention."""
        n_tokens = split.n_tokens if split.n_tokens is not None else 0 if token_ids is None else len(token_ids)
        if not n_tokens:
            raise InvalidCache(
                "the cache holds no tokens, or states alone, which do not say how many tokens they have read: give token_ids"
            )
        if token_ids is not None and len(token_ids) != n_tokens:
            raise InvalidArgument(f"the cache holds {n_tokens} tokens, but {len(token_ids)} token ids are given")
        places = torch.arange(split.start, split.start + n_tokens)
        split = self._with_points(split, points, n_tokens)
        settings, calibration, spans = self.settings, self.calibration, self._spans(places)
        is_coded = self._encoder is not None and any(
            covers(one, its.group) for one in self.covered for its in split.exact
        )
        if not (is_coded or self.is_lossless):
            settings, calibration = exact_settings(settings), None
            spans = split_regions(places, 0, 0, settings.chunk_tokens)
        blocks = self.backend.block_coder
        draft = draft_stream(settings, calibration, split, is_transformers, token_ids, spans, places, blocks)
        if not draft.coded or self._encoder is None or calibration is None:
            return draft.seal(b"", CodedRows(), is_final=True, size=None)
        return pipeline.encode(None, draft, None, calibration, self.backend, self._encoder)

    @neutral_torch_state
    def encode_point(self, exact: Sequence[ExactGroup], n_tokens: int) -> bytes:
        """Windows and states as they were after some tokens, as a stream of these groups alone.

        Parameters:
            exact: the groups; of a window it may be the last rows alone.
            n_tokens: tokens that had been read.

        Returns:
            The stream, for `decode_point`.

        Example:
            >>> from kvtc.codec.exact_groups import ExactGroup
            >>> from kvtc.container.groups import STATE, Group, Part
            >>> state = torch.arange(6.0).reshape(1, 2, 3)
            >>> group = Group(STATE, Part.RECURRENT_STATE, state.dtype, layers=(0,), shape=(1, 2, 3), has_run=True)
            >>> point = codec.encode_point([ExactGroup(group, [(state,)])], n_tokens=512)
            >>> torch.equal(codec.decode_point(point)[0].sides[0][0], state)
            True
        """
        start = n_tokens - max([1, *(one.n_rows for one in exact if one.group.kind == WINDOW)])
        split = SplitCache(None, list(exact), n_tokens - start, start=start)
        return self._encode_others(split, None, False, None)

    @neutral_torch_state
    def decode_point(self, data: Bytes) -> list[ExactGroup]:
        """Inverse of `encode_point`.

        Parameters:
            data: the stream.

        Returns:
            The groups.

        Raises:
            CorruptStream, CalibrationMismatch: As `decode`.
        """
        stream = parse_stream(data)
        if stream.header.coded is not None or not stream.n_tokens:
            raise CorruptStream("a resume point holds tokens of every kind, or none; expected windows and states")
        if stream.header.further:
            return self._decode_split(stream, None, None, start_of(stream)).exact
        return read_groups(stream, len(stream.chunks), stream.n_tokens)

    def _spans(self, positions: Tensor) -> list[ChunkSpan]:
        return split_regions(positions, self.sink_tokens, self.window_tokens, self.settings.chunk_tokens)

    def _size(self, chunks: list[Chunk], dtype: torch.dtype) -> int:
        """Bytes of a stream of fixed size."""
        encoder = self._encoder
        if not isinstance(self.rate, FixedSize) or encoder is None or self.calibration is None:
            raise InvalidArgument("streams have a size of their own unless the codec is made with fixed_size=True")
        return fixed_stream_bytes(
            chunks, self.calibration.geometry, dtype, self.rate.ratio, encoder.plan_bytes(), encoder.least_bytes
        )

    def _open(self, stream: Stream, token_ids: TokenIds | None, tokens: int | None) -> OpenedStream:
        check_calibration(stream.header, self.calibration)
        decoder = self._profile(stream.header.profile).decoder()
        return open_stream(stream, decoder, token_ids, tokens, self.max_tokens, self.backend.block_coder)

    def _encoder_at(self, rate: Rate) -> AnyEncoder | None:
        """The encoder at a rate; None where every token is exact."""
        if isinstance(rate, Lossless) is not (self.settings.profile == LOSSLESS):
            raise InvalidArgument(
                f"the rate {rate} in a codec that writes streams of the profile {self.settings.profile}"
            )
        if isinstance(rate, Lossless):
            return None
        return self._profile(self.settings.profile).encoder(rate, self.settings.coded_window)

    def _profile(self, name: str) -> AnyProfile:
        """A profile, whichever this codec writes, made ready at first need."""
        with self._lock:
            if name not in self._profiles and self.calibration is None:
                self._profiles[name] = LosslessProfile(None, self.backend)
            elif name not in self._profiles and self.calibration is not None:
                self._profiles[name] = make_profile(
                    name, self.calibration, self.backend, self._product, self._recomputation
                )
            return self._profiles[name]


def _of_one_group(stream: Bytes) -> Stream:
    """A stream parsed; `UnsupportedModel` unless the group that is coded is the only one."""
    parsed = parse_stream(stream)
    if parsed.header.others:
        raise UnsupportedModel(
            f"the stream holds several groups of layers ({describe_groups(parsed.header)}), which decode and decode_batch restore"
        )
    return parsed


def describe_groups(header: Header) -> str:
    """The groups of a stream in words, for messages."""
    return "; ".join(f"{group.describe()} of layers {describe_layers(group.layers)}" for group in header.groups)


def _without_extents(header: Header) -> list[Group]:
    """Groups, whatever length chose their rotation, and however they are coded."""
    groups = [replace(group, is_coded=False) for group in header.groups]
    return [replace(group, extent=0) if group.kind in (FULL_ATTENTION, LATENT) else group for group in groups]
