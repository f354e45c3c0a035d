"""A stream held against a calibration: everything checked, every section read, before memory is asked for by token count.

What is asked for by token count is bounded by what the caller has agreed to: a few bytes may soundly stand for many tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import compress
from operator import not_
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backends import Bytes
from ..cache import CacheExtent, TokenIds, describe_widths
from ..calibration.artifact import Calibration, covers
from ..coding.exact.tokens import decode_exact, decode_fp8, exact_bytes, fp8_bytes
from ..coding.lossless import BlockCoder
from ..coding.threads import Begun
from ..container.stream import Stream, Wanted, parse_stream, token_digest
from ..container.tables import LOSSLESS, MAX_POSITION, STREAM_WIDE, Chunk, Header, SectionType
from ..errors import (
    CalibrationMismatch,
    CorruptStream,
    GeometryMismatch,
    InvalidArgument,
    StreamTooLarge,
    TokenMismatch,
)
from ..layer_runs import describe_layers
from ..process.torch_state import neutral_torch_state
from ..profiles import AnyDecoder
from ..profiles.interface import CodedBody, Plan
from ..recomputation import Recomputed
from .recomputing import check_prefix, recompute_chunks

MAX_TOKENS = 1 << 20
"""Tokens that are decoded at most unless the caller names more."""
_FLOAT_OPERATIONS = 512
"""Of a byte of exact tokens, about, as `Begun` counts them."""


@dataclass(frozen=True)
class ExactTokens:
    """Sinks, or window kept exactly, of one chunk.

    keys, values: [L, H, n, D] in the stream's dtype; the first of them is token `first`.
    """

    first: int
    keys: Tensor
    values: Tensor

    @property
    def tokens(self) -> slice:
        return slice(self.first, self.first + self.keys.shape[2])


@dataclass(frozen=True)
class OpenedStream:
    """The first `n_tokens` tokens of a stream, read but not yet transformed.

    positions: [T'] int64 of all tokens in the chunks read (T' >= n_tokens). body: the coded ones among them, with a window
    that is coded. decoder: of the stream's profile. coded: bodies and coded windows, in order. exact_bytes: of sinks and exact
    tokens, which may still be on their way. exact_parts: of each of them how many tokens it holds, the first, whether in fp8.
    n_chunks: how many were read. plan: of the stream.
    """

    header: Header
    n_tokens: int
    n_chunks: int
    decoder: AnyDecoder
    positions: Tensor
    body: slice
    coded: list[CodedBody[Any]]
    exact_bytes: Begun[list[bytes]]
    exact_parts: list[tuple[int, int, bool]]
    plan: Plan

    def exact(self) -> list[ExactTokens]:
        """Sinks and exact tokens, in order. Raises `CorruptStream`."""
        return [
            _exact(data, self.header, *part)
            for data, part in zip(self.exact_bytes.result(), self.exact_parts, strict=True)
        ]


def open_stream(
    stream: Stream,
    decoder: AnyDecoder,
    token_ids: TokenIds | None,
    tokens: int | None,
    max_tokens: int,
    block_coder: BlockCoder | None = None,
) -> OpenedStream:
    """Check a stream against token ids, and read the sections of its first tokens.

    Parameters:
        stream: parsed, and made with the calibration (`check_calibration`). Where its bytes are on a device, bodies that no
            lossless coder was applied to stay there; their checksums are not verified then.
        decoder: of its profile.
        token_ids: int64, those of its tokens, or of the first `tokens`, behind those of all tokens before them where layers are
            recomputed; None where decoding needs none.
        tokens: how many tokens are wanted; None: all.
        max_tokens: how many tokens past those that `tokens`, or else token_ids, name may have to be decoded.
        block_coder: decodes blocks of lossless coders, where it takes them.

    Raises:
        StreamTooLarge: for more tokens than may have to be decoded.
        TruncatedStream, CorruptStream, TokenMismatch, InvalidArgument: as `Codec.decode` says.
    """
    header = stream.header
    n_tokens = stream.n_tokens if tokens is None else tokens
    if not isinstance(n_tokens, int) or not 0 <= n_tokens <= stream.n_tokens:
        raise InvalidArgument(f"tokens must lie in 0 .. {stream.n_tokens}, what the stream holds; got {tokens}")
    first_id = stream.chunks[0].first_position if decoder.recomputation is not None and stream.n_tokens else 0
    own_ids = None if token_ids is None else token_ids[first_id:]
    named = tokens if tokens is not None else 0 if own_ids is None else len(own_ids)
    chunks = _chunks_of(stream, n_tokens, named + max_tokens)
    if decoder.recomputation is not None:
        check_prefix(header.profile, token_ids, first_id + n_tokens)
    if own_ids is not None:
        _check_tokens(header, chunks, own_ids, n_tokens)
    plan = decoder.read_plan(_rate(stream, decoder))
    keys = [(kind, index) for index, chunk in enumerate(chunks) for kind in chunk.sections(header.coded is not None)]
    wanted = [(kind, index, _raw_bytes(kind, chunks[index], header, decoder, plan)) for kind, index in keys]
    _check_lengths(stream, chunks, wanted, decoder)
    left = stream.leave([one for one in wanted if _is_coded(one[0], chunks[one[1]], header)])
    others = [one for one in wanted if one[:2] not in left]
    is_exact = [
        kind is SectionType.SINK or chunks[index].exact_tokens(kind, header.profile) > 0 for kind, index, _ in others
    ]
    exact_ones, others = list(compress(others, is_exact)), list(compress(others, map(not_, is_exact)))
    # Exact tokens are decoded one number after the other: beside all else.
    n_operations = 0 if block_coder is not None else _FLOAT_OPERATIONS * sum(one[2] or 0 for one in exact_ones)
    exact_bytes = Begun(partial(stream.read_all, exact_ones, block_coder), n_operations)
    read = {one[:2]: raw for one, raw in zip(others, stream.read_all(others, block_coder), strict=True)}
    coded_bytes: dict[tuple[SectionType, int], Bytes] = {**read, **left}
    recomputed = recompute_chunks(decoder.recomputation, chunks, token_ids, first_id)
    positions, coded = [], []
    exact: list[tuple[int, int, bool]] = []
    first = 0
    for index, chunk in enumerate(chunks):
        positions.append(_positions(read.get((SectionType.POSITIONS, index)), header, index, chunk))
        if header.coded is None:
            first += chunk.n_tokens
            continue
        if chunk.n_sink:
            exact.append((chunk.n_sink, first, chunk.fp8_sinks))
        n_exact = chunk.exact_tokens(SectionType.BODY, header.profile)
        if n_exact:
            exact.append((n_exact, first + chunk.n_sink, False))
        elif chunk.n_body:
            body_bytes = coded_bytes[SectionType.BODY, index]
            coded.append(
                CodedBody(body_bytes, chunk.n_body, plan, _part(recomputed, first + chunk.n_sink, chunk.n_body))
            )
        if chunk.n_window:
            at = first + chunk.n_tokens - chunk.n_window
            if chunk.coded_window:
                window, known = coded_bytes[SectionType.WINDOW, index], _part(recomputed, at, chunk.n_window)
                coded.append(CodedBody(window, chunk.n_window, plan, known, is_window=True))
            else:
                exact.append((chunk.n_window, at, False))
        if chunk.is_padded and read[SectionType.PADDING, index].strip(b"\0"):
            raise CorruptStream(f"the padding of chunk {index} holds other bytes than zeros")
        first += chunk.n_tokens
    # Regions follow one another over the whole stream, so the coded tokens are one range. An exact body has none.
    n_sink = sum(chunk.n_sink for chunk in chunks) if header.coded is not None else 0
    body = slice(n_sink, n_sink + sum(rows.n_tokens for rows in coded))
    whole = torch.cat(positions) if positions else torch.empty(0, dtype=torch.int64, device="cpu")
    return OpenedStream(header, n_tokens, len(chunks), decoder, whole, body, coded, exact_bytes, exact, plan)


def first_position(stream_bytes: bytes) -> int | None:
    """Where the first token of a stream stands; None without tokens."""
    chunks = parse_stream(stream_bytes).chunks
    return chunks[0].first_position if chunks else None


@neutral_torch_state
def positions_of(stream_bytes: bytes, max_tokens: int = MAX_TOKENS) -> Tensor:
    """Where the tokens of a stream stand, [T] int64: with gaps, it says whose token ids decoding needs.

    Raises `StreamTooLarge` for more than max_tokens.
    """
    stream = parse_stream(stream_bytes)
    positions = []
    for index, chunk in enumerate(_chunks_of(stream, stream.n_tokens, max_tokens)):
        data = stream.read(SectionType.POSITIONS, index, 2 * chunk.n_tokens) if chunk.explicit_positions else None
        positions.append(_positions(data, stream.header, index, chunk))
    return torch.cat(positions) if positions else torch.empty(0, dtype=torch.int64, device="cpu")


def check_calibration(header: Header, calibration: Calibration | None) -> None:
    """Raise `GeometryMismatch`, or `CalibrationMismatch`, where a stream was not made with a calibration; None: without one."""
    if calibration is None:
        if header.profile != LOSSLESS or any(header.fingerprint):
            raise CalibrationMismatch(
                f"the stream was made with calibration {header.fingerprint.hex()}, profile {header.profile}; this codec has none"
            )
        return
    geometry = calibration.geometry
    is_covered = header.further or any(covers(geometry, group) for group in header.groups)
    if header.coded is None and not is_covered:
        kinds = ", ".join(sorted({group.kind for group in header.groups}))
        raise GeometryMismatch(
            f"the calibration covers {geometry.describe()}; the stream holds no such group ({kinds})"
        )
    if header.coded is not None:
        found = CacheExtent(header.layers, header.first_kv_head, header.n_kv_heads, *header.dims)
        if found != geometry.extent:
            raise GeometryMismatch(f"the calibration covers {geometry.describe()}; the stream holds {found.describe()}")
    for group in (header.groups[index] for index in header.further):
        if calibration.number_of(group) is None:
            covered = "; ".join(one.geometry.describe() for one in calibration.groups)
            raise GeometryMismatch(
                f"the calibration covers {covered or geometry.describe()}; the stream codes {group.kind} of layers "
                f"{describe_layers(group.layers)}, {group.shape[0]} heads of {describe_widths(*group.shape[1:])}"
            )
    if header.fingerprint != calibration.fingerprint:
        raise CalibrationMismatch(
            f"the stream was made with calibration {header.fingerprint.hex()}; this one is {calibration.fingerprint.hex()}"
        )


def _chunks_of(stream: Stream, n_tokens: int, most: int) -> list[Chunk]:
    """The leading chunks that hold the first `n_tokens` tokens; `StreamTooLarge` where they hold more than `most`."""
    stops = stream.chunks.tokens.cumsum()
    count = int(np.searchsorted(stops, n_tokens)) + 1 if n_tokens else 0
    if count and stops[count - 1] > most:
        raise StreamTooLarge(
            f"{stops[count - 1]} tokens would have to be decoded; {most} are allowed: name as many by tokens= or token_ids=, "
            "or give the codec more max_tokens="
        )
    return [stream.chunks[index] for index in range(count)]


def _rate(stream: Stream, decoder: AnyDecoder) -> bytes:
    """The bytes that say how bits are spent, no more than the profile can use."""
    raw_bytes = stream.find(SectionType.RATE).raw_bytes
    if raw_bytes > decoder.most_plan_bytes:
        raise CorruptStream(f"section rate claims {raw_bytes} bytes; expected {decoder.most_plan_bytes} at most")
    return stream.read(SectionType.RATE, STREAM_WIDE, raw_bytes)


def _check_lengths(stream: Stream, chunks: list[Chunk], wanted: list[Wanted], decoder: AnyDecoder) -> None:
    """Raise `CorruptStream` for coded tokens in fewer bytes than they take at least, whatever they are."""
    for kind, index, raw_bytes in wanted:
        if raw_bytes is None and kind is not SectionType.PADDING:
            n_tokens = chunks[index].n_window if kind is SectionType.WINDOW else chunks[index].n_body
            section, least = stream.find(kind, index), decoder.fewest_bytes(n_tokens)
            if section.stored_bytes < least:
                raise CorruptStream(
                    f"{section.describe()}: {n_tokens} tokens need at least {least} bytes; it has {section.stored_bytes}"
                )


def _check_tokens(header: Header, chunks: list[Chunk], token_ids: TokenIds, n_tokens: int) -> None:
    if not header.has_digests:
        raise TokenMismatch("token ids are given, but the stream was encoded without any to compare with")
    if len(token_ids) < n_tokens:
        raise TokenMismatch(f"{n_tokens} tokens are to be decoded, but only {len(token_ids)} token ids are given")
    first = 0
    for index, chunk in enumerate(chunks):
        ids = token_ids[first : first + chunk.n_tokens]
        # A digest covers a whole chunk: the last chunk of a prefix is compared only where its ids are all given.
        whole = len(ids) == chunk.n_tokens
        if whole and token_digest(ids) != chunk.token_digest:
            raise TokenMismatch(
                f"the token ids of chunk {index} (tokens {first} .. {first + chunk.n_tokens - 1}, from position "
                f"{chunk.first_position}) are not those of the stream"
            )
        first += chunk.n_tokens


def _part(recomputed: Recomputed | None, first: int, n: int) -> Recomputed | None:
    return None if recomputed is None else recomputed.part(slice(first, first + n))


def _is_coded(kind: SectionType, chunk: Chunk, header: Header) -> bool:
    """Whether a section holds coded tokens, rather than exact ones or none."""
    return kind in (SectionType.BODY, SectionType.WINDOW) and not chunk.exact_tokens(kind, header.profile)


def _raw_bytes(kind: SectionType, chunk: Chunk, header: Header, decoder: AnyDecoder, plan: Plan) -> int | None:
    """What a section of a chunk holds; None where that does not follow from its tokens."""
    if kind is SectionType.POSITIONS:
        return 2 * chunk.n_tokens
    n_exact = chunk.exact_tokens(kind, header.profile)
    if n_exact:
        return exact_bytes(header.joint_features * n_exact, header.dtype)
    if kind is SectionType.BODY:
        return decoder.body_bytes(plan, chunk.n_body)
    if kind is SectionType.SINK:
        return fp8_bytes(header.n_layers * header.n_kv_heads * chunk.n_sink, header.dims)
    return decoder.body_bytes(plan, chunk.n_window) if kind is SectionType.WINDOW else None


def _positions(data: bytes | None, header: Header, index: int, chunk: Chunk) -> Tensor:
    """Those of a chunk, from its section where it has one."""
    if data is None:
        return torch.arange(chunk.first_position, chunk.first_position + chunk.n_tokens, device="cpu")
    start = chunk.first_position // header.chunk_tokens * header.chunk_tokens
    positions = np.frombuffer(data, dtype="<u2").astype(np.int64) + start
    stop = min(start + header.chunk_tokens, MAX_POSITION)
    if positions[0] != chunk.first_position or positions[-1] >= stop or bool((positions[1:] <= positions[:-1]).any()):
        raise CorruptStream(f"the positions of chunk {index} do not ascend from {chunk.first_position} within its cell")
    return torch.from_numpy(positions)


def _exact(data: bytes, header: Header, n: int, first: int, is_fp8: bool) -> ExactTokens:
    key_dim, value_dim = header.dims
    heads = header.n_layers, header.n_kv_heads, n
    decode = decode_fp8 if is_fp8 else decode_exact
    return ExactTokens(first, *decode(data, ((*heads, key_dim), (*heads, value_dim)), header.dtype))


def shift_to(start_position: int | None, opened: OpenedStream) -> int:
    """How far tokens move so that the first stands at `start_position`."""
    if start_position is None or not opened.n_tokens:
        return 0
    shift = start_position - int(opened.positions[0])
    if start_position < 0 or int(opened.positions[-1]) + shift >= 1 << 31:
        raise InvalidArgument(f"start_position {start_position} moves tokens outside of 0 .. 2**31 - 1")
    return shift
