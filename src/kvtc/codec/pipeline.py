"""The stages of the codec in their order; `encode` and `Decoding` mirror one another.

encode   un-rotate -> predict -> project -> quantize -> entropy-code -> seal
decode   open -> entropy-decode -> add prediction -> reconstruct, layer by layer -> rotate

The stages between are the profile's (`profiles.interface`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from ..backends import Backend, Target
from ..cache import CacheGeometry, KVCache
from ..calibration.artifact import Calibration
from ..coding.regions import ChunkSpan
from ..coding.threads import in_threads
from ..coding.transform import saturate
from ..process.progress import task, track
from ..process.torch_state import neutral_torch_state
from ..profiles.interface import Budget, CodedRows, Encoder, Plan, Rows
from ..recomputation import Recomputed
from .opened_stream import ExactTokens, OpenedStream
from .sealed_stream import StreamDraft

CoefficientsT = TypeVar("CoefficientsT")
SymbolsT = TypeVar("SymbolsT")
PlanT = TypeVar("PlanT", bound=Plan)
Sides = tuple[Target, Target]
"""Where keys and values of one layer go."""
_LAYERS_AT_ONCE = 4
"""At most: each takes memory for its rows in float32."""
_WRITING_OPERATIONS = 128
"""Of a pair of a key's and a value's features, about, as `in_threads` counts them."""


def encode(
    recomputed: Recomputed | None,
    draft: StreamDraft,
    size: int | None,
    calibration: Calibration,
    backend: Backend,
    encoder: Encoder[CoefficientsT, SymbolsT, PlanT],
) -> bytes:
    """The rows of a draft -> stream.

    All coefficients are held until the plan is found, 4 r bytes a token for r coefficients, so that rows are un-rotated and
    projected once however many steps are tried.

    Parameters:
        recomputed: what the first layers compute of its tokens; None where the profile predicts nothing.
        draft: the sections of the stream that do not depend on the rate, and the rows that are to be coded.
        size: bytes of the stream, which is padded to them; None: no padding.
        calibration: of the cache's model.
        backend: does the arithmetic.
        encoder: of a profile, at a rate.
    """
    batches = []
    for one in draft.coded:
        spans, geometry = list(one.spans.values()), calibration.geometry_of(one.number)
        for rows in unrotated(one.cache, recomputed, spans, draft.settings.coded_window, geometry, backend, one.number):
            predicted = encoder.predict(rows)
            batches.append((rows.is_window, encoder.project(rows, predicted)))
    search = encoder.search([coefficients for _, coefficients in batches], _budget(draft, size, encoder))
    is_searching = True
    while is_searching:
        coded = CodedRows()
        for is_window, coefficients in batches:
            symbols = encoder.quantize(coefficients, search.plan)
            coded.add(encoder.entropy_code(symbols), is_window)
        is_searching = search.goes_on_after(coded)
    plan, coded = search.best
    return draft.seal(plan.to_bytes(), coded, encoder.is_entropy_coded, size)


def unrotated(
    cache: KVCache,
    recomputed: Recomputed | None,
    spans: list[ChunkSpan],
    codes_windows: bool,
    geometry: CacheGeometry,
    backend: Backend,
    group: int = 0,
) -> Iterator[Rows]:
    """The rows of coded tokens on the backend's device, some chunks at a time: all bodies, then all windows that are coded.

    geometry: of the cache, which is the group of this number in the calibration.
    """
    positions, length = cache.resolved_positions(), cache.resolved_rope_length()
    most = backend.batch_tokens(geometry.joint_features)
    batches = [(False, batch) for batch in _batches([(span, span.body) for span in spans if span.n_body], most)]
    if codes_windows:
        windows = [(span, span.window) for span in spans if span.n_window]
        batches += [(True, batch) for batch in _batches(windows, most)]
    for is_window, batch in track(batches, "encoding", "batches"):
        tokens = slice(batch[0][1].start, batch[-1][1].stop)
        keys, values = (side[:, :, tokens].to(backend.device) for side in (cache.keys, cache.values))
        turns = geometry.rope.turns(positions[tokens].to(backend.device), length, inverse=True)
        known = None if recomputed is None else recomputed.part(tokens)
        counts = tuple(part.stop - part.start for _, part in batch)
        yield Rows(backend.gather(keys, values, turns), known, counts, cache.original_bits, is_window, group)


class Decoding:
    """Opened streams of one profile on their way back into caches, layer by layer.

    Coefficients are decoded when this is made, which raises `CorruptStream`; `wait` raises it for exact tokens.

    Parameters:
        opened: the streams.
        shifts: how many positions the tokens of each stream move.
        geometry: of the group that is coded.
        backend: does the arithmetic.
    """

    def __init__(
        self, opened: Sequence[OpenedStream], shifts: Sequence[int], geometry: CacheGeometry, backend: Backend
    ) -> None:
        self._opened, self._backend = opened, backend
        self._n_heads, self._dims = geometry.n_kv_heads, geometry.dims
        self._decoder = opened[0].decoder
        bodies = [body.on(backend.device) for stream in opened for body in stream.coded]
        coefficients = self._decoder.entropy_decode(bodies)
        self._coefficients = self._decoder.add_prediction(coefficients, bodies)
        self._rope = rope = geometry.rope
        self._turns, self._shifts = [], shifts
        for stream, shift in zip(opened, shifts, strict=True):
            # Decoded are whole chunks, wanted is a prefix.
            body = slice(stream.body.start, min(stream.body.stop, stream.n_tokens))
            positions = (stream.positions[body] + shift).to(backend.device)
            self._turns.append(rope.turns(positions, stream.header.rope_length + shift))

    def wait(self) -> None:
        """Until exact tokens are there, too. Raises `CorruptStream`."""
        self._exact  # noqa: B018  the first look at them waits

    @cached_property
    def _exact(self) -> list[list[ExactTokens]]:
        """Of each stream, those that are wanted."""
        return [
            [self._moved(part, stream, shift) for part in stream.exact()]
            for stream, shift in zip(self._opened, self._shifts, strict=True)
        ]

    def write_layer(self, layer: int, sides: Sequence[Sides]) -> None:
        """Restore one layer of every stream.

        Parameters:
            layer: its index within the calibration.
            sides: for each stream where its first `n_tokens` tokens go.
        """
        self._write_body(layer, sides)
        self._write_exact(layer, sides)

    def write_layers(self, sides: Callable[[int], Sequence[Sides]]) -> None:
        """Restore all layers, on CPUs several at a time. sides: layer -> what `write_layer` takes.

        Exact tokens come last: they may still be on their way. Raises `CorruptStream` for them.
        """
        n_layers, is_inference = self._opened[0].header.n_layers, torch.is_inference_mode_enabled()
        n_values = sum(stream.n_tokens for stream in self._opened) * n_layers * self._n_heads * sum(self._dims) // 2
        with task("decoding", n_layers, "layers") as advance:

            @neutral_torch_state
            def write(first: int, stop: int) -> None:
                with torch.inference_mode(is_inference):
                    for layer in range(first, stop):
                        self._write_body(layer, sides(layer))
                        advance(1)

            most = _LAYERS_AT_ONCE if self._backend.device.type == "cpu" else 1
            in_threads(write, n_layers, _WRITING_OPERATIONS * n_values, most)
        for layer in range(n_layers):
            self._write_exact(layer, sides(layer))

    @neutral_torch_state
    def new_layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer of the only stream as keys and values [H, T, D] of their own, in its dtype, on the backend's device."""
        (stream,) = self._opened
        dtype, device = stream.header.dtype, self._backend.device
        keys, values = (
            torch.empty(self._n_heads, stream.n_tokens, dim, dtype=dtype, device=device) for dim in self._dims
        )
        self.write_layer(layer, [(Target.of(keys), Target.of(values))])
        return keys, values

    def _write_body(self, layer: int, sides: Sequence[Sides]) -> None:
        keys, values = (
            rows.view(-1, self._n_heads, dim)
            for rows, dim in zip(self._decoder.reconstruct(self._coefficients, layer), self._dims, strict=True)
        )
        first = 0
        for stream, targets, turns in zip(self._opened, sides, self._turns, strict=True):
            start, stop = stream.body.start, max(stream.body.start, min(stream.body.stop, stream.n_tokens))
            here = slice(first, first + stop - start)
            body = targets[0].part(slice(start, stop)), targets[1].part(slice(start, stop))
            self._backend.place(keys[here], values[here], turns[layer], body)
            first += stream.body.stop - start

    def _write_exact(self, layer: int, sides: Sequence[Sides]) -> None:
        for targets, exact in zip(sides, self._exact, strict=True):
            for part in exact:
                for target, side in zip(targets, (part.keys, part.values), strict=True):
                    target.part(part.tokens).write(side[layer])

    def _moved(self, part: ExactTokens, stream: OpenedStream, shift: int) -> ExactTokens:
        """Exact tokens on the backend's device, their keys turned to new positions if there is a shift."""
        wanted = slice(0, max(0, stream.n_tokens - part.first))
        keys, values = (side[:, :, wanted].to(self._backend.device) for side in (part.keys, part.values))
        if shift:
            rope, length = self._rope, stream.header.rope_length
            positions = stream.positions[part.tokens][wanted]
            plain = rope.unrotate(keys, positions, length)
            keys = saturate(rope.rotate(plain, positions + shift, length + shift), keys.dtype)
        return ExactTokens(part.first, keys, values)


def _budget(draft: StreamDraft, size: int | None, encoder: Encoder[CoefficientsT, SymbolsT, PlanT]) -> Budget:
    plan_bytes = encoder.plan_bytes()
    return Budget(
        sum(one.body_bytes for one in draft.coded),
        draft.coded[0].cache.original_bits,
        other_bytes=draft.body_bytes + plan_bytes,
        at_most=None if size is None else size - draft.n_bytes - plan_bytes,
    )


_Part = tuple[ChunkSpan, slice]
"""A chunk, and its tokens that are coded."""


def _batches(parts: Sequence[_Part], n_tokens: int) -> Iterator[list[_Part]]:
    """Neighbours that hold n_tokens at most, or one of them."""
    batch: list[_Part] = []
    held = 0
    for span, tokens in parts:
        count = tokens.stop - tokens.start
        if batch and held + count > n_tokens:
            yield batch
            batch, held = [], 0
        batch.append((span, tokens))
        held += count
    if batch:
        yield batch
