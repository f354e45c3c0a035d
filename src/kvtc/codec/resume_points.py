"""What is needed besides the end of a cache to go on from the middle of it: its windows and states, as they were there."""

from __future__ import annotations

from typing import Any

from ..errors import InvalidArgument, InvalidCache
from ..process.torch_state import neutral_torch_state
from .exact_groups import ExactGroup
from .transformers_cache import Snapshots, SplitCache, TransformersCache

RESUME_EVERY = 4096
"""Tokens from one resume point to the next, unless a caller says otherwise."""


class ResumePoints:
    """Windows and states of one cache at several positions, taken while it grows, so that a stream of it can be resumed
    there.

    They cannot be had from the cache later: a window forgets what leaves it, and a state what it was. The end of a
    cache is a resume point of its stream in any case.

    Parameters:
        every: tokens from one point to the next, a multiple of the codec's chunk_tokens; default 4096.

    Raises:
        InvalidArgument: `every` is below 1.

    Example:
        >>> points = kvtc.ResumePoints(every=256)
        >>> grown = kvtc.prefill(model, token_ids, points)
        >>> sorted(points.taken)
        [256, 512]
    """

    def __init__(self, every: int = RESUME_EVERY) -> None:
        if every < 1:
            raise InvalidArgument(f"resume points every {every} tokens; expected 1 or more")
        self.every = every
        self.taken: dict[int, list[ExactGroup]] = {}

    def tokens_to_next(self, n_tokens: int) -> int:
        """How many tokens a cache has to read until a point is due.

        Parameters:
            n_tokens: tokens that it has read.

        Returns:
            A number of tokens.

        Example:
            >>> kvtc.ResumePoints(every=256).tokens_to_next(600)
            168
        """
        return self.every - n_tokens % self.every

    @neutral_torch_state
    def take(self, cache: Any, n_tokens: int | None = None) -> bool:
        """Copy the windows and states of a cache, if a point is due at its length.

        Parameters:
            cache: a transformers cache of batch 1; what was taken before is of the same text.
            n_tokens: tokens that it has read; needed where the cache does not say, as one of states alone. Default
                None.

        Returns:
            Whether a point was due.

        Raises:
            InvalidCache: the cache holds several sequences, or has read another number of tokens.
            UnsupportedModel: as `Codec.encode`.

        Example:
            >>> kvtc.ResumePoints(every=300).take(cache), kvtc.ResumePoints(every=256).take(cache)
            (True, False)
        """
        found = TransformersCache(cache)
        length = found.n_tokens if found.n_tokens is not None else n_tokens
        if found.n_sequences != 1 or length is None or n_tokens not in (None, length):
            raise InvalidCache(
                f"the cache holds {length or 'an unknown number of'} tokens of {found.n_sequences} sequences; expected one "
                f"sequence of {n_tokens or 'a known number of'} tokens"
            )
        if not length or length % self.every:
            return False
        self.taken[length] = [one.copied() for one in found.partial_groups()]
        return True

    def of(self, split: SplitCache, n_tokens: int, chunk_tokens: int) -> Snapshots:
        """The points before the end of a cache.

        Parameters:
            split: the cache in groups of layers.
            n_tokens: tokens that it has read.
            chunk_tokens: of the codec.

        Returns:
            Windows and states by position.

        Raises:
            InvalidArgument: a point is of another cache, or does not stand at the end of a chunk.

        Example:
            >>> kvtc.ResumePoints().of(codec.decode_split(stream), 600, 256)
            {}
        """
        groups = [one.group for one in split.partial]
        for position, exact in self.taken.items():
            if position > n_tokens:
                raise InvalidArgument(f"a resume point was taken after {position} tokens; the cache has {n_tokens}")
            if position % chunk_tokens:
                raise InvalidArgument(
                    f"a resume point after {position} tokens is inside of a chunk; expected every= a multiple of chunk_tokens, "
                    f"{chunk_tokens}"
                )
            if [one.group for one in exact] != groups:
                raise InvalidArgument(
                    f"the resume point after {position} tokens is of another cache: it holds "
                    f"{_listed([one.group.describe() for one in exact])}; the cache holds {_listed([g.describe() for g in groups])}"
                )
        return {position: self.taken[position] for position in sorted(self.taken) if position < n_tokens}


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "no windows and states"
