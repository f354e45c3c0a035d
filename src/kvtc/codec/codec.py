"""The codec. The order of the stages stands here and nowhere else:

encode   regions -> un-rotate keys -> predict -> project -> quantize -> entropy-code -> stream
decode   stream -> entropy-decode -> dequantize -> predict -> reconstruct, layer by layer -> rotate keys -> cache

What stands between un-rotated keys and the stream's sections is the profile's (`profiles`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..backends import Bytes, Target, make_backend
from ..cache import CACHE_DTYPES, KVCache
from ..calibration.artifact import Calibration
from ..coding.device import usable_device
from ..coding.regions import ChunkSpan, split_regions
from ..container import FORMAT_VERSION, Chunk, SectionType, parse_stream
from ..errors import InvalidArgument, InvalidCache, StreamTooLarge
from ..key_digest import digest
from ..process.forks import in_child
from ..process.locks import ForkSafeLock
from ..process.progress import track
from ..process.torch_state import compute_alone, neutral_torch_state, writing_into
from ..profiles import Allowance, BodyCoder, JointCoder
from ..profiles.joint.step_search import StepRate
from . import transformers_cache as interop
from .fixed_size import fixed_stream_bytes
from .layers import Restoration
from .opened_stream import MAX_TOKENS, OpenedStream, TokenIds, open_stream, shift_to
from .options import (
    as_ids,
    as_tensor,
    asks_for_paper,
    check_calibration,
    check_limit,
    check_regions,
    coder_and_rate,
    decoder,
    product_dtype,
    stream_settings,
)
from .rows import coded_rows
from .sealed_stream import chunks_of, draft_stream


class Codec:
    """Encodes caches of a calibrated model at one rate, and decodes every stream made with the same calibration.

    profile: "paper", "joint" or "conditional"; the last predicts from token ids, which encode and decode then need. None: the last
    of these that the calibration serves, or `paper` where an option of it is given.
    ratio: bits of a cached value over bits the body may spend on it; None means 16. With `paper` it counts bits before lossless
    coding, as published: the real body_ratio is at least that on texts of ordinary length. With the others it is the body_ratio,
    and the step is found for each cache. step: instead of a ratio, the step itself, so that chunks of different caches coincide.
    kl: instead, the step at which the model's predictions are expected to diverge so much, in nats, by the calibration's curve.
    sink_tokens, window_tokens: tokens kept exactly at the beginning and the end. sink_format: "exact" or "fp8". window_format:
    "exact", or with `joint` and `conditional` "coded": like the body, with a quarter of its step.
    fixed_size: every stream of tokens at the same places has the same bytes, `stream_bytes` of them: the step is as fine as
    fits, and what is left is padded (`joint` and `conditional`, with a ratio).
    lossless: "deflate", "zstd", "lz4" or "none". chunk_tokens: unit of random access. device: where the arithmetic runs.
    backend: "reference", "triton", or "auto": the latter on CUDA devices where it is installed (docs/gpu.md). precision: of what
    transforms multiply, "float32", "bfloat16", or "auto": the latter on CUDA devices. Sums are float32.
    max_tokens: how many tokens a stream may make decode restore beyond those that `tokens` or `token_ids` name, since a few bytes
    may stand for many tokens; past it decode raises `StreamTooLarge`.

    Of the profile `paper` alone: key_ratio, value_ratio: the ratio of one kind. max_error: instead of a ratio, the largest relative
    error (Frobenius norm over the centred calibration rows) of each kind. allocation: "dynamic" (the dynamic program) or
    "truncate" (leading coefficients in 16 bits; the paper's table 15).

    Safe to share between threads, and can be pickled. In a forked child PyTorch then computes on one thread; a child that is to use
    more is spawned.
    """

    @neutral_torch_state
    def __init__(
        self,
        calibration: Calibration,
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
        allocation: str = "dynamic",
        lossless: str = "deflate",
        sink_format: str = "exact",
        window_format: str = "exact",
        fixed_size: bool = False,
        chunk_tokens: int = 256,
        max_tokens: int = MAX_TOKENS,
        device: str | torch.device = "cpu",
        backend: str = "auto",
        precision: str = "auto",
    ) -> None:
        check_calibration(calibration)
        check_regions(sink_tokens, window_tokens)
        check_limit(max_tokens)
        of_paper = key_ratio, value_ratio, max_error, allocation
        if profile is None:
            profile = "paper" if asks_for_paper(of_paper) else calibration.profiles[-1]
        self.calibration = calibration
        self.sink_tokens = sink_tokens
        self.window_tokens = window_tokens
        self.max_tokens = max_tokens
        self.settings = stream_settings(profile, chunk_tokens, lossless, sink_format, window_format, fixed_size)
        self.device = usable_device(device)
        self.backend = make_backend(self.device, backend)
        self._product = product_dtype(precision, self.device)
        self._lock = ForkSafeLock()
        made_for = calibration, self.backend, self._product
        self._coder, self.rate = coder_and_rate(*made_for, self.settings, ratio, step, kl, of_paper)
        self._coders = {profile: self._coder}
        in_child(self._renew)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a codec that was pickled (its calibration, settings and matrices are) or copied."""
        self.__dict__.update(state)
        in_child(self._renew)

    def _renew(self) -> None:
        """In a forked child, whose own code may compute before this codec does."""
        compute_alone()

    @neutral_torch_state
    def with_step(self, step: float) -> Codec:
        """The same codec (`joint`, `conditional`) with another step in place of its rate; the matrices are shared."""
        if not isinstance(self._coder, JointCoder) or self.settings.fixed_size:
            raise InvalidArgument("only a codec of joint or conditional, and without fixed size, takes a step")
        other = copy.copy(self)
        other._lock = ForkSafeLock()
        other._coder = self._coder.with_step(step)
        other.rate = StepRate(step=step, finer_window=self._coder.finer_window)
        other._coders = self._coders | {self.settings.profile: other._coder}
        return other

    @neutral_torch_state
    def encode(self, cache: Any, token_ids: Any = None, positions: Any = None) -> bytes:
        """A cache -> stream. The cache is left as it was.

        cache: a transformers `DynamicCache` of batch 1, or a `KVCache`. token_ids [T]: their digest is stored and must match on
        decode. positions [T]: where the tokens stand, increasing; default the cache's own, or 0 .. T-1.

        Raises `InvalidCache`, `GeometryMismatch`, `UnsupportedModel`, `InvalidArgument`.
        """
        is_transformers = interop.is_transformers_cache(cache)
        if is_transformers:
            if interop.batch_shape(cache)[0] != 1:
                raise InvalidCache(f"the cache holds {interop.batch_shape(cache)[0]} sequences; use encode_batch")
            cache = interop.from_transformers(cache, self.calibration.geometry)
        elif not isinstance(cache, KVCache):
            raise InvalidArgument(f"expected a transformers DynamicCache or a kvtc.KVCache, got {type(cache).__name__}")
        return self._encode(cache, as_ids(token_ids), as_ids(positions), is_transformers)

    @neutral_torch_state
    def stream_bytes(
        self,
        n_tokens: int,
        dtype: torch.dtype = torch.bfloat16,
        first_position: int = 0,
        positions: Any = None,
    ) -> int:
        """Bytes of every stream that this codec, made with `fixed_size=True`, writes of n_tokens tokens; no cache is needed.

        dtype: of the cache. The tokens stand at first_position and after, or at `positions` [n_tokens].

        Raises `InvalidArgument` for a codec without fixed size and for tokens or a dtype that cannot be.
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
    def settings_digest(self) -> bytes:
        """SHA-256 of all that a stream depends on besides the cache and the calibration, for the keys of entries.

        What counts is listed here by name: a field that is added elsewhere does not rename every entry.
        """
        settings = self.settings
        return digest(
            "codec settings",
            format_version=FORMAT_VERSION,
            profile=settings.profile,
            chunk_tokens=settings.chunk_tokens,
            lossless=settings.lossless,
            fp8_sinks=settings.fp8_sinks,
            fixed_size=settings.fixed_size,
            coded_window=settings.coded_window,
            rate=self.rate.key_parts,
            sink_tokens=self.sink_tokens,
            window_tokens=self.window_tokens,
        )

    def with_window(self, window_tokens: int) -> Codec:
        """The same codec, but for how many of the last tokens stay exact; 0: every token past the sinks is coded, alike."""
        if window_tokens < 0:
            raise InvalidArgument(f"window_tokens {window_tokens} must not be negative")
        other = copy.copy(self)
        other.window_tokens = window_tokens
        return other

    def with_ratio(self, ratio: float) -> Codec:
        """The same codec of fixed size, but for the ratio that its sizes follow from."""
        if not self.settings.fixed_size or not isinstance(self.rate, StepRate):
            raise InvalidArgument("only a codec made with fixed_size=True can be given another ratio")
        other = copy.copy(self)
        other.rate = replace(self.rate, ratio=ratio)
        return other

    @neutral_torch_state
    def decode(
        self, stream: Bytes, token_ids: Any = None, tokens: int | None = None, start_position: int | None = None
    ) -> Any:
        """A stream -> cache of the kind that was encoded, ready for `generate`.

        stream: bytes, or uint8 [bytes] on a device, where coded bodies stay and are not held against their checksums again.
        token_ids: the ids the stream was made from, or those of its first `tokens`; the last chunk of a prefix is compared only
        if the ids of all its tokens are given. tokens: decode only so many tokens from the beginning; only the chunks that hold
        them are read, as wholes. start_position: place the first token there instead of where it stood, keys rotated to match
        (then sinks and window are exact up to rounding).

        Raises `TruncatedStream`, `CorruptStream`, `UnsupportedVersion`, `CalibrationMismatch`, `GeometryMismatch`,
        `TokenMismatch`, `StreamTooLarge`, `InvalidArgument`.
        """
        cache, is_transformers = self._decode(stream, token_ids, tokens, start_position)
        if not is_transformers:
            return cache
        return interop.as_transformers(cache)

    @neutral_torch_state
    def decode_neutral(
        self, stream: Bytes, token_ids: Any = None, tokens: int | None = None, start_position: int | None = None
    ) -> KVCache:
        """As `decode`, but a `KVCache` whatever was encoded: with positions, and without transformers."""
        return self._decode(stream, token_ids, tokens, start_position)[0]

    def _decode(
        self, stream: Bytes, token_ids: Any, tokens: int | None, start_position: int | None
    ) -> tuple[KVCache, bool]:
        """The cache, and whether it was one of transformers."""
        opened = self._open(stream, as_ids(token_ids), tokens)
        header = opened.header
        shift = shift_to(start_position, opened)
        restoration = Restoration([opened], [shift], self.calibration, self.backend)
        shape = (header.n_layers, header.n_kv_heads, opened.n_tokens, header.head_dim)
        keys = torch.empty(shape, dtype=header.dtype, device=self.device)
        values = torch.empty_like(keys)
        for layer in track(range(header.n_layers), "decoding", "layers"):
            restoration.write_layer(layer, [(Target.of(keys[layer]), Target.of(values[layer]))])
        positions = opened.positions[: opened.n_tokens] + shift
        # 0: it was not recorded, for no frequency depends on it. Moved to the front, a length too short would be negative.
        rope_length = max(0, header.rope_length + shift) if header.rope_length else None
        cache = KVCache(keys, values, positions, header.first_layer, header.first_kv_head, rope_length)
        return cache, header.is_transformers

    @neutral_torch_state
    def decode_layers(self, stream: Bytes, token_ids: Any = None) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (layer, keys [H, T, D], values [H, T, D]), first layer first, each as soon as it is restored.

        Arguments and stream are checked, and coefficients decoded, before this returns.
        """
        opened = self._open(stream, as_ids(token_ids), None)
        header, restoration = opened.header, Restoration([opened], [0], self.calibration, self.backend)
        return ((header.first_layer + layer, *restoration.new_layer(layer)) for layer in range(header.n_layers))

    @neutral_torch_state
    def decode_lazily(self, stream: Bytes, token_ids: Any = None, tokens: int | None = None) -> Any:
        """As `decode`, but always a `DynamicCache`, whose layers are restored when the model first comes to them.

        Arguments and stream are checked, and coefficients decoded, before this returns. On CUDA each layer is restored beside the
        computations of the one before it.
        """
        opened = self._open(stream, as_ids(token_ids), tokens)
        restoration = Restoration([opened], [0], self.calibration, self.backend)
        return interop.lazy_cache(restoration.new_layer, opened.n_tokens, opened.header, self.device)

    @neutral_torch_state
    def decode_into(
        self,
        stream: Bytes,
        targets: Sequence[tuple[Target, Target]],
        token_ids: Any = None,
        tokens: int | None = None,
        start_position: int | None = None,
    ) -> None:
        """A stream -> keys and values of an engine, each layer written where its targets say: in pages, say.

        targets: of keys and of values, for each layer of the stream, with places for the tokens decoded, on the codec's device.
        The others as in `decode`, which also says what is raised; what is read of the stream is checked before anything is
        written.
        """
        opened = self._open(stream, as_ids(token_ids), tokens)
        places = {len(target.token_offsets) for sides in targets for target in sides}
        if len(targets) != opened.header.n_layers or places != {opened.n_tokens}:
            raise InvalidArgument(
                f"targets for {len(targets)} layers and {sorted(places)} tokens; the stream holds {opened.header.n_layers} layers, "
                f"and {opened.n_tokens} tokens are decoded"
            )
        restoration = Restoration([opened], [shift_to(start_position, opened)], self.calibration, self.backend)
        with writing_into(*(target.data for sides in targets for target in sides)):
            for layer, sides in enumerate(targets):
                restoration.write_layer(layer, [sides])

    @neutral_torch_state
    def encode_batch(self, cache: Any, token_ids: Any, attention_mask: Any) -> list[bytes]:
        """A left-padded transformers cache of several sequences -> one stream each, padding left out.

        token_ids, attention_mask: [B, T]; a mask of 0 marks padding. Positions count from the first real token, as `generate`
        counts them.
        """
        ids, mask = as_tensor(token_ids, "token ids"), as_tensor(attention_mask, "attention mask").bool()
        shape = interop.batch_shape(cache)
        if tuple(ids.shape) != shape or tuple(mask.shape) != shape:
            raise InvalidArgument(
                f"token_ids {tuple(ids.shape)} and attention_mask {tuple(mask.shape)} must both be {shape}: "
                "sequences and tokens of the cache (whose last token may not have been fed to the model yet)"
            )
        if bool((mask[:, 1:] < mask[:, :-1]).any()):
            raise InvalidArgument("the attention mask has padding after real tokens; kvtc expects padding on the left")
        streams = []
        for index in range(shape[0]):
            tokens = mask[index].nonzero().flatten().cpu()
            part = interop.from_transformers(cache, self.calibration.geometry, index, tokens)
            streams.append(self._encode(part, as_ids(ids[index][mask[index]]), None, is_transformers=True))
        return streams

    @neutral_torch_state
    def decode_batch(self, streams: Sequence[Bytes], token_ids: Any = None) -> tuple[Any, Tensor]:
        """Streams of transformers caches -> (one left-padded cache, attention_mask [B, T] int64).

        token_ids: one sequence of ids per stream, or a tensor [B, T] padded on the left. Padded places hold zeros.
        """
        if not streams:
            raise InvalidArgument("there are no streams to decode")
        lengths = [parse_stream(stream).n_tokens for stream in streams]
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
        for index, (stream, length) in enumerate(zip(streams, lengths, strict=True)):
            row = ids[index]
            row = row[longest - length :] if row is not None and is_padded else row
            opened.append(self._open(stream, row, None))
            if opened[index].header.dtype != opened[0].header.dtype:
                raise InvalidArgument(
                    f"stream {index} holds {opened[index].header.dtype}, stream 0 {opened[0].header.dtype}"
                )
        coders = {id(stream.coder): stream.coder for stream in opened}.values()
        groups = [[index for index, stream in enumerate(opened) if stream.coder is coder] for coder in coders]
        # Coefficients come first: memory for the batch is asked for once all streams have proved sound.
        restorations = [
            Restoration([opened[index] for index in group], [0] * len(group), self.calibration, self.backend)
            for group in groups
        ]
        header = opened[0].header
        mask = torch.zeros(len(streams), longest, dtype=torch.int64, device=self.device)
        shape = (len(streams), header.n_layers, header.n_kv_heads, longest, header.head_dim)
        keys = torch.zeros(shape, dtype=header.dtype, device=self.device)
        values = torch.zeros_like(keys)
        for index, length in enumerate(lengths):
            mask[index, longest - length :] = 1
        for group, restoration in zip(groups, restorations, strict=True):
            for layer in range(header.n_layers):
                places = [(index, layer, slice(None), slice(longest - lengths[index], None)) for index in group]
                restoration.write_layer(layer, [(Target.of(keys[at]), Target.of(values[at])) for at in places])
        return interop.to_transformers(keys, values, header.first_layer), mask

    def _encode(
        self,
        cache: KVCache,
        token_ids: TokenIds | None,
        positions: TokenIds | None,
        is_transformers: bool,
    ) -> bytes:
        if positions is not None:
            cache = replace(cache, positions=torch.from_numpy(positions))
        cache = cache.plain()
        cache.validate()
        self.calibration.geometry.check(cache)
        if token_ids is not None and len(token_ids) != cache.n_tokens:
            raise InvalidArgument(f"the cache holds {cache.n_tokens} tokens, but {len(token_ids)} token ids are given")
        if token_ids is None and self._coder.needs_tokens:
            raise InvalidArgument(
                f"the profile {self.settings.profile} predicts from token ids; give token_ids, or use joint"
            )
        spans = self._spans(cache.resolved_positions())
        blocks = self.backend.block_coder
        draft = draft_stream(self.settings, self.calibration, cache, is_transformers, token_ids, spans, blocks)
        size = self._size(list(draft.chunks), cache.dtype) if self.settings.fixed_size else None
        bodies = [index for index, span in enumerate(spans) if span.n_body]
        windows = [index for index, chunk in enumerate(draft.chunks) if chunk.coded_window]
        rate_bytes = self._coder.rate_bytes or 0
        allowance = Allowance(
            sum(span.n_body for span in spans),
            cache.original_bits,
            other_bytes=draft.body_bytes + rate_bytes,
            at_most=None if size is None else size - draft.n_bytes - rate_bytes,
        )
        here = cache, token_ids, self.calibration, self.backend
        coded = self._coder.encode_all(
            lambda is_window: coded_rows(*here, [spans[i] for i in (windows if is_window else bodies)], is_window),
            allowance,
        )
        sections = {(SectionType.BODY, index): data for index, data in zip(bodies, coded.bodies, strict=True)}
        sections |= {(SectionType.WINDOW, index): data for index, data in zip(windows, coded.windows, strict=True)}
        return draft.seal(coded.plan.to_bytes(), sections, self._coder.is_entropy_coded, size)

    def _spans(self, positions: Tensor) -> list[ChunkSpan]:
        return split_regions(positions, self.sink_tokens, self.window_tokens, self.settings.chunk_tokens)

    def _size(self, chunks: list[Chunk], dtype: torch.dtype) -> int:
        """Bytes of a stream of fixed size."""
        if not isinstance(self.rate, StepRate) or self._coder.rate_bytes is None:
            raise InvalidArgument("streams have a size of their own unless the codec is made with fixed_size=True")
        return fixed_stream_bytes(
            chunks,
            self.calibration.geometry,
            dtype,
            self.rate.ratio,
            self._coder.rate_bytes,
            self._coder.least_bytes,
        )

    def _open(self, stream: Bytes, token_ids: TokenIds | None, tokens: int | None) -> OpenedStream:
        limits = token_ids, tokens, self.max_tokens
        return open_stream(stream, self.calibration, self._coder_of, *limits, self.backend.block_coder)

    def _coder_of(self, profile: str) -> BodyCoder:
        """The coder of a stream's profile, whichever this codec writes."""
        with self._lock:
            if profile not in self._coders:
                self._coders[profile] = decoder(self.calibration, self.backend, self._product, profile)
            return self._coders[profile]
