"""What calibration keeps of the rows of many caches: their moments, and a uniform sample of them."""

from __future__ import annotations

import json

import numpy as np
import torch
from torch import Tensor

from ..cache import CacheGeometry, KVCache
from ..coding.device import usable_device
from ..coding.joint.prediction import hidden_features, n_features
from ..coding.transform import rows_of
from ..errors import InvalidArgument, InvalidCache
from ..process.torch_state import neutral_torch_state
from .moments import Moments

DEFAULT_TOKENS = 160_000
SAMPLE_ROWS = 8192
"""Of which distortion and tables are counted."""
_LARGEST_STATE = 6e4
"""Of an entry of a hidden state in 16 bits: a few dwarf all others."""
_TOKENS_AT_ONCE = 1024
"""Of a cache whose rows are made in float32: memory does not grow with the length of texts."""


class CalibrationRows:
    """The rows that a calibration is fitted to: keys before rotation, values, and a hidden state of each token.

    Caches are given one by one to `add`; none is kept. Memory: 4 P^2 bytes (8 P^2 up to 4096 features, 8 P l above
    16 384, with l = rank + 512), where P = features of a joint row, and 16 kB for each feature.

    Parameters:
        geometry: layers and heads that the caches cover.
        sink_tokens: rows at positions below this are left out, because attention sinks look like nothing else.
        max_tokens: tokens past the sinks after which `is_full` is true.
        hidden_width: d, of the hidden states that come with the caches, which the profile `conditional` needs; 0: none do.
        rank: the largest that a basis will have.
        seed: of the sample.
        device: where moments are gathered.

    Raises:
        InvalidArgument: for an option out of range, or a device that cannot be used.
    """

    @neutral_torch_state
    def __init__(
        self,
        geometry: CacheGeometry,
        *,
        sink_tokens: int = 4,
        max_tokens: int = DEFAULT_TOKENS,
        hidden_width: int = 0,
        rank: int = 4096,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        if sink_tokens < 0 or max_tokens < 2:
            raise InvalidArgument(f"sink_tokens {sink_tokens}, max_tokens {max_tokens}: expected >= 0, >= 2")
        self.geometry, self.sink_tokens, self.max_tokens = geometry, sink_tokens, max_tokens
        self.hidden_width = hidden_width
        features = geometry.joint_features
        told = n_features(hidden_width) if hidden_width else 0
        self.moments = Moments(features, told, rank, seed, usable_device(device))
        self.n_sequences = self.n_rows = 0
        self._random = np.random.default_rng(seed)
        capacity = min(SAMPLE_ROWS, max_tokens)
        self._sample = torch.zeros(capacity, features + hidden_width, dtype=torch.float16)

    @property
    def is_full(self) -> bool:
        """Whether max_tokens tokens past the sinks were seen, so that no further cache is needed."""
        return self.n_rows >= self.max_tokens

    @neutral_torch_state
    def add(self, cache: KVCache, hidden: Tensor | None = None) -> None:
        """Add the rows of one cache.

        Time: one un-rotation of its rows, and 2 P^2 operations for each. Memory: 1024 tokens in float32.

        Parameters:
            cache: it must cover the geometry of these rows.
            hidden: [T, d], the hidden states of its tokens; needed with a `hidden_width`, else ignored.

        Raises:
            InvalidCache, GeometryMismatch: for a cache that cannot be used.
            InvalidArgument: for hidden states that are missing, or of another shape.
        """
        cache.validate()
        self.geometry.check(cache)
        cache = cache.plain()
        if self.hidden_width and (hidden is None or hidden.shape != (cache.n_tokens, self.hidden_width)):
            raise InvalidArgument(
                f"expected hidden states ({cache.n_tokens}, {self.hidden_width}) with the cache, found "
                f"{'none' if hidden is None else tuple(hidden.shape)}"
            )
        positions = cache.resolved_positions()
        body = (positions >= self.sink_tokens).to(cache.keys.device)
        if not bool(body.any()):
            return
        self.n_sequences += 1
        for start in range(0, cache.n_tokens, _TOKENS_AT_ONCE):
            part = slice(start, start + _TOKENS_AT_ONCE)
            keys, length = cache.keys[:, :, part], cache.resolved_rope_length()
            plain = rows_of(self.geometry.rope.unrotate(keys, positions[part], length))
            rows = torch.cat([plain, rows_of(cache.values[:, :, part])], dim=1)[body[part]]
            states = None
            if self.hidden_width and hidden is not None:
                states = hidden[part].to(rows.device)[body[part]].float().clamp(-_LARGEST_STATE, _LARGEST_STATE)
            self._add(rows, states)

    def _add(self, rows: Tensor, states: Tensor | None) -> None:
        half = (rows if states is None else torch.cat([rows, states], dim=1)).to(device="cpu", dtype=torch.float16)
        if not bool(half.isfinite().all()):
            raise InvalidCache("calibration rows hold values that 16 bits cannot: NaN, infinite, or beyond 65504")
        # As they are sampled: what 16 bits do not hold is no variance of theirs.
        kept = half.to(rows.device).float()
        features = rows.shape[1]
        self.moments.add(kept[:, :features], None if states is None else hidden_features(kept[:, features:]))
        # Reservoir sampling: a uniform sample of all tokens, as the paper draws them, of texts of unknown number (section 1.2).
        numbers = np.arange(self.n_rows, self.n_rows + len(rows))
        capacity = len(self._sample)
        slots = np.where(numbers < capacity, numbers, (self._random.random(len(rows)) * (numbers + 1)).astype(np.int64))
        for token in np.flatnonzero(slots < capacity):
            self._sample[slots[token]] = half[token]
        self.n_rows += len(rows)

    @neutral_torch_state
    def sample(self, n_rows: int, seed: int) -> tuple[Tensor, Tensor]:
        """Joint rows [n, P] and hidden states [n, d] of tokens drawn from the sample, float32, on the CPU."""
        kept = min(self.n_rows, len(self._sample))
        chosen = np.sort(np.random.default_rng(seed).permutation(kept)[:n_rows])
        drawn = self._sample[torch.from_numpy(chosen)].float()
        features = self.geometry.joint_features
        return drawn[:, :features], drawn[:, features:]

    @neutral_torch_state
    def state(self) -> dict[str, Tensor]:
        """All that was gathered; `resume` reads it."""
        counts = {"n_sequences": self.n_sequences, "n_rows": self.n_rows, "random": self._random.bit_generator.state}
        found = {f"moments.{name}": tensor for name, tensor in self.moments.state().items()}
        return found | {"sample": self._sample, "counts": torch.tensor(list(json.dumps(counts).encode()))}

    @neutral_torch_state
    def resume(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state` of rows with the same options."""
        self.moments.resume({name.removeprefix("moments."): tensor for name, tensor in state.items()})
        self._sample.copy_(state["sample"])
        counts = json.loads(bytes(state["counts"].tolist()))
        self.n_sequences, self.n_rows = counts["n_sequences"], counts["n_rows"]
        self._random.bit_generator.state = counts["random"]
