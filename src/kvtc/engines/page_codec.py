"""Pages of an engine as streams: the tokens of one chunk, at known positions, coded alone.

An engine reuses a chunk in any conversation that begins alike, so nothing here is kept exact at the end of a text (a window of 0);
sinks are exact where a chunk begins at position 0. Where token ids are known, they predict (`conditional`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..backends import Target
from ..cache import KVCache
from ..calibration import Calibration
from ..codec import Codec
from ..codec.opened_stream import first_position
from ..errors import InvalidArgument, TokenMismatch, UnsupportedModel
from ..process.torch_state import neutral_torch_state
from .settings import AUTO, PREFIX, EngineSettings

CHUNK_TOKENS = 256
SINK_TOKENS = 4

Ids = Sequence[int] | np.ndarray | Tensor


class PageCodec:
    """Keys and values of the tokens start .. stop - 1 -> one stream, and back. Safe to share between threads.

    fixed_size: as of `Codec`.
    """

    def __init__(self, calibration: Calibration, settings: EngineSettings, *, fixed_size: bool = False) -> None:
        if calibration.geometry.rope.depends_on_length:
            raise UnsupportedModel(
                "the rotation of this model depends on the length of a sequence, which pages of an engine do not tell"
            )
        self.calibration = calibration
        joint = calibration.joint
        best = "paper" if joint is None else "joint" if joint.tokens is None else "conditional"
        self._told = best if settings.profile == AUTO else settings.profile
        self._untold = "joint" if self._told == "conditional" and settings.profile == AUTO else self._told
        profiles = dict.fromkeys((self._told, self._untold))
        self._codecs = {profile: _codec(calibration, profile, settings, fixed_size) for profile in profiles}

    def serves(self, has_token_ids: bool) -> bool:
        """Whether there is a profile for chunks with, or without, token ids."""
        return has_token_ids or self._untold != "conditional"

    def profile(self, has_token_ids: bool) -> str:
        """The profile of streams written with token ids, or without; `InvalidArgument` where that cannot be."""
        profile = self._told if has_token_ids else self._untold
        if not self.serves(has_token_ids):
            raise InvalidArgument(
                f"{PREFIX}profile is conditional, but the engine gives no token ids here; use {AUTO} or joint"
            )
        return profile

    def codec(self, has_token_ids: bool) -> Codec:
        """The codec of that profile."""
        return self._codecs[self.profile(has_token_ids)]

    @neutral_torch_state
    def encode(self, keys: Tensor, values: Tensor, start: int, token_ids: Ids | None = None) -> bytes:
        """keys, values [L, H, T, D] of the tokens at positions start .. start + T - 1 -> stream.

        token_ids [T], where known. Raises `InvalidCache`, `GeometryMismatch`, `InvalidArgument`.
        """
        geometry = self.calibration.geometry
        positions = torch.arange(start, start + keys.shape[2], device="cpu")
        cache = KVCache(keys, values, positions, geometry.first_layer, geometry.first_kv_head)
        return self.codec(token_ids is not None).encode(cache, token_ids)

    @neutral_torch_state
    def decode(
        self, stream: bytes, start: int | None, n_tokens: int, token_ids: Ids | None = None
    ) -> tuple[Tensor, Tensor]:
        """A stream that begins at position start -> keys, values [L, H, n_tokens, D] of its first tokens, in its dtype.

        start None: wherever the stream says. token_ids: those of the whole stream, or of the tokens wanted.
        Raises what `Codec.decode` raises.
        """
        cache = self.codec(token_ids is not None).decode_neutral(stream, token_ids, n_tokens)
        if n_tokens and start is not None:
            _check_start(int(cache.resolved_positions()[0]), start)
        return cache.keys, cache.values

    @neutral_torch_state
    def decode_into(
        self, stream: bytes, start: int, targets: Sequence[tuple[Target, Target]], token_ids: Ids | None = None
    ) -> None:
        """A stream that begins at position start -> its first tokens, as many as the targets have places for, layer by layer.

        targets, on the codec's device, and token_ids as in `Codec.decode_into`, which says what is raised.
        """
        _check_start(first_position(stream), start)
        n_tokens = len(targets[0][0].token_offsets)
        self.codec(token_ids is not None).decode_into(stream, targets, token_ids, n_tokens)

    @property
    def device(self) -> torch.device:
        """Where streams are decoded."""
        return next(iter(self._codecs.values())).device


def _check_start(found: int | None, expected: int) -> None:
    if found != expected:
        raise TokenMismatch(f"the stream begins at position {found}; expected {expected}")


def _codec(calibration: Calibration, profile: str, settings: EngineSettings, fixed_size: bool) -> Codec:
    return Codec(
        calibration,
        profile,
        ratio=settings.ratio,
        sink_tokens=SINK_TOKENS,
        window_tokens=0,
        step=settings.step,
        kl=settings.kl,
        fixed_size=fixed_size,
        chunk_tokens=CHUNK_TOKENS,
        # Whoever decodes pages names their tokens; past them lies at most the rest of a chunk.
        max_tokens=CHUNK_TOKENS,
        device=settings.device,
    )
