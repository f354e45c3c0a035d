"""The codec of engines: the tokens of one chunk, or of the end of a text, coded alone and without
an exact window.

An engine reuses a chunk in every conversation that begins with the same text, so no tokens at its
end are kept exactly. Sinks are exact where a chunk begins at position 0. Without a calibration, or
where the settings say so, all tokens are exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..backends import Target
from ..cache import CacheExtent, KVCache
from ..calibration import Calibration
from ..codec import Codec
from ..codec.opened_stream import first_position
from ..errors import TokenMismatch, UnsupportedModel
from ..key_digest import Part, digest
from ..process.torch_state import neutral_torch_state
from .settings import AUTO, EngineSettings

CHUNK_TOKENS = 256
SINK_TOKENS = 4
_COMPILED_TOKENS = 2 * SINK_TOKENS
_ANY_EXTENT = CacheExtent((0,), 0, 1, 8, 8)

Ids = Sequence[int] | np.ndarray | Tensor


class WindowlessCodec:
    """Codes keys and values of consecutive tokens of a text as one stream, and back. Safe to share
    between threads.

    Parameters:
        calibration: Of the layers and heads of one worker; None: all tokens are exact.
        settings: Profile, rate and device.
        extent: The layers and heads; None: those of the calibration, or of each chunk where all tokens are exact.
        fixed_size: Whether all streams of as many tokens have the same length, as of `Codec`.

    Raises:
        UnsupportedModel: The rotation of the model depends on the length of a text, which an engine
            does not tell.
        InvalidArgument: The calibration does not serve these settings.
    """

    def __init__(
        self,
        calibration: Calibration | None,
        settings: EngineSettings,
        extent: CacheExtent | None = None,
        *,
        fixed_size: bool = False,
    ) -> None:
        self.calibration = None if settings.lossless else calibration
        self.extent = extent
        if self.calibration is None:
            self.codec = Codec(
                lossless=True, chunk_tokens=CHUNK_TOKENS, max_tokens=CHUNK_TOKENS, device=settings.device
            )
            return
        if self.calibration.geometry.rope.depends_on_length:
            raise UnsupportedModel(
                "the rotation of this model depends on the length of a sequence, which an engine does not tell with a chunk"
            )
        self.extent = extent or self.calibration.geometry.extent
        best = "paper" if self.calibration.joint is None else "joint"
        self.codec = Codec(
            self.calibration,
            best if settings.profile == AUTO else settings.profile,
            ratio=settings.ratio,
            sink_tokens=SINK_TOKENS,
            window_tokens=0,
            step=settings.step,
            kl=settings.kl,
            fixed_size=fixed_size,
            chunk_tokens=CHUNK_TOKENS,
            # The caller says how many tokens it wants; behind them lies at most the rest of a chunk.
            max_tokens=CHUNK_TOKENS,
            device=settings.device,
        )

    @property
    def names(self) -> tuple[bytes, bytes]:
        """What the key of a stream says of the codec: whose tokens it codes, and how."""
        if self.calibration is not None:
            return self.calibration.fingerprint, self.codec.settings_digest
        of: dict[str, Part] = {}
        if self.extent is not None:
            of = {
                "layers": list(self.extent.layers),
                "heads": [self.extent.first_kv_head, self.extent.n_kv_heads],
                "dims": list(self.extent.dims),
            }
        return digest("exact tokens", **of), self.codec.settings_digest

    @neutral_torch_state
    def encode(self, keys: Tensor, values: Tensor, start: int, token_ids: Ids | None = None) -> bytes:
        """The stream of some tokens.

        Parameters:
            keys, values: [L, H, T, D], as the engine caches them, rotated.
            start: Position of the first token in its text; the others follow without gaps.
            token_ids: [T], if they are known: their digest is stored.

        Raises:
            InvalidCache, GeometryMismatch, InvalidArgument: As `Codec.encode`.
        """
        return self.codec.encode(cache_of(self.extent, keys, values, start), token_ids)

    @neutral_torch_state
    def decode(
        self, stream: bytes, start: int | None, n_tokens: int, token_ids: Ids | None = None
    ) -> tuple[Tensor, Tensor]:
        """keys, values [L, H, n_tokens, D] of the first tokens of a stream, in the dtype in which
        they were coded.

        Parameters:
            stream: As `encode` gives it.
            start: Position at which it must begin; None: at any.
            n_tokens: Tokens that are wanted.
            token_ids: Of the whole stream, or of the tokens that are wanted; None: not known.

        Raises:
            TokenMismatch: The stream is of other positions or token ids.
            KvtcError: As `Codec.decode`.
        """
        cache = self.codec.decode_neutral(stream, token_ids, n_tokens)
        if n_tokens and start is not None:
            _check_start(int(cache.resolved_positions()[0]), start)
        return cache.keys, cache.values

    @neutral_torch_state
    def decode_into(
        self, stream: bytes, start: int, targets: Sequence[tuple[Target, Target]], token_ids: Ids | None = None
    ) -> None:
        """Decode the first tokens of a stream to where they belong, layer by layer.

        Parameters:
            stream, start, token_ids: As in `decode`.
            targets: For each layer, where its keys and its values go, on the codec's device; each
                has offsets of as many tokens as are wanted.

        Raises:
            TokenMismatch, KvtcError: As `decode`.
        """
        _check_start(first_position(stream), start)
        n_tokens = len(targets[0][0].token_offsets)
        self.codec.decode_into(stream, targets, token_ids, n_tokens)

    def compile(self, dtype: torch.dtype) -> None:
        """Code a few tokens, so that kernels are compiled before the first chunk comes.

        Compiling for the first time takes longer than an engine waits for its workers when it ends: what they
        save then is lost.

        Parameters:
            dtype: Of the engine's cache.
        """
        sides = [
            torch.linspace(-1, 1, math.prod(shape), dtype=torch.float32, device=self.device).reshape(shape).to(dtype)
            for shape in (self.extent or _ANY_EXTENT).side_shapes(_COMPILED_TOKENS)
        ]
        self.decode(self.encode(sides[0], sides[1], 0), 0, _COMPILED_TOKENS)

    @property
    def device(self) -> torch.device:
        """Where streams are decoded."""
        return self.codec.device


def cache_of(extent: CacheExtent | None, keys: Tensor, values: Tensor, start: int) -> KVCache:
    """The tokens of a chunk, of which the first stands at position `start`."""
    positions = torch.arange(start, start + keys.shape[2], device="cpu")
    if extent is None:
        return KVCache(keys, values, positions)
    return KVCache(keys, values, positions, extent.layers, extent.first_kv_head)


def _check_start(found: int | None, expected: int) -> None:
    if found != expected:
        raise TokenMismatch(f"the stream begins at position {found}; expected {expected}")
