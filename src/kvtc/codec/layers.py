"""Streams on their way back into caches: coefficients of all of them decoded at once, then layer after layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import Backend, Target
from ..calibration.artifact import Calibration
from ..coding.transform import saturate
from ..process.torch_state import neutral_torch_state
from .opened_stream import ExactTokens, OpenedStream

Sides = tuple[Target, Target]


class Restoration:
    """Opened streams of one profile; their coefficients are decoded when this is made, which raises `CorruptStream`.

    shifts: how far the tokens of each stream move.
    """

    def __init__(
        self, opened: Sequence[OpenedStream], shifts: Sequence[int], calibration: Calibration, backend: Backend
    ) -> None:
        self._opened = opened
        self._backend = backend
        self._n_heads, self._head_dim = calibration.geometry.n_kv_heads, calibration.geometry.head_dim
        self._coder = opened[0].coder
        self._coefficients = self._coder.decode([body.on(backend.device) for stream in opened for body in stream.coded])
        rope = calibration.geometry.rope
        self._turns, self._exact = [], []
        for stream, shift in zip(opened, shifts, strict=True):
            # Decoded are whole chunks, wanted is a prefix.
            body = slice(stream.body.start, min(stream.body.stop, stream.n_tokens))
            positions = (stream.positions[body] + shift).to(backend.device)
            self._turns.append(rope.turns(positions, stream.header.rope_length + shift))
            self._exact.append([self._moved(part, stream, shift, calibration) for part in stream.exact])

    def write_layer(self, layer: int, sides: Sequence[Sides]) -> None:
        """Restore a layer of every stream. sides: for each stream where its first `n_tokens` tokens go, keys and values."""
        keys, values = (
            rows.view(-1, self._n_heads, self._head_dim) for rows in self._coder.restore(self._coefficients, layer)
        )
        first = 0
        for stream, targets, turns, exact in zip(self._opened, sides, self._turns, self._exact, strict=True):
            start, stop = stream.body.start, max(stream.body.start, min(stream.body.stop, stream.n_tokens))
            here = slice(first, first + stop - start)
            body = targets[0].part(slice(start, stop)), targets[1].part(slice(start, stop))
            self._backend.place(keys[here], values[here], turns[layer], body)
            for part in exact:
                n = max(0, min(part.tokens.stop, stream.n_tokens) - part.first)
                for target, side in zip(targets, (part.keys, part.values), strict=True):
                    target.part(slice(part.first, part.first + n)).write(side[layer][:, :n])
            first += stream.body.stop - start

    @neutral_torch_state
    def new_layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer of the first stream as keys and values [H, T, D] of their own, in its dtype, on the backend's device."""
        stream = self._opened[0]
        shape = (self._n_heads, stream.n_tokens, self._head_dim)
        keys, values = (
            torch.empty(shape, dtype=stream.header.dtype, device=self._backend.device) for _ in ("keys", "values")
        )
        self.write_layer(layer, [(Target.of(keys), Target.of(values))])
        return keys, values

    def _moved(self, part: ExactTokens, stream: OpenedStream, shift: int, calibration: Calibration) -> ExactTokens:
        """Exact tokens on the backend's device, their keys turned to new positions if there is a shift."""
        keys, values = part.keys.to(self._backend.device), part.values.to(self._backend.device)
        if shift:
            rope, length = calibration.geometry.rope, stream.header.rope_length
            positions = stream.positions[part.tokens]
            plain = rope.unrotate(keys, positions, length)
            keys = saturate(rope.rotate(plain, positions + shift, length + shift), keys.dtype)
        return ExactTokens(part.first, keys, values)
