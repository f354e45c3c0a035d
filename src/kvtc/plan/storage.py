"""Where caches lie between turns: tiers with byte budgets, least recently used out first, and the
links to them.

A tier keeps, for each conversation, how many of its first tokens it holds. The GPU's own tier holds
them raw; the tiers below hold them raw or encoded, and what one of them drops moves to the next.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

# Tokens -> whole bytes: sums of whole numbers come out at zero again.
StoredBytes = Callable[[int], int]


@dataclass
class Link:
    """One direction of a way to a tier: one transfer after another."""

    bytes_per_second: float
    access_seconds: float
    free_at: float = 0.0
    busy_seconds: float = 0.0

    def transfer(self, now: float, n_bytes: float) -> float:
        """Queue a transfer at `now`; returns when it is done."""
        if n_bytes <= 0:
            return now
        seconds = self.access_seconds + n_bytes / self.bytes_per_second
        self.free_at = max(now, self.free_at) + seconds
        self.busy_seconds += seconds
        return self.free_at


@dataclass
class Tier:
    """One tier.

    Parameters:
        name: its name.
        capacity_bytes: its size; math.inf for a tier without limit.
        stored_bytes: tokens -> the bytes that they take in this tier.
    """

    name: str
    capacity_bytes: float
    stored_bytes: StoredBytes
    used_bytes: int = 0
    peak_bytes: int = 0
    _tokens: OrderedDict[int, int] = field(default_factory=OrderedDict)
    _pinned: set[int] = field(default_factory=set)

    def tokens_of(self, conversation: int) -> int:
        """How many tokens it holds of a conversation."""
        return self._tokens.get(conversation, 0)

    def drop(self, conversation: int) -> None:
        """Forget a conversation."""
        self._pinned.discard(conversation)
        self.used_bytes -= self.stored_bytes(self._tokens.pop(conversation, 0))

    def put(self, conversation: int, n_tokens: int) -> list[tuple[int, int]] | None:
        """Hold so many tokens, as the most recently used.

        Returns:
            What was evicted, as (conversation, tokens); None if the tokens cannot fit.
        """
        needed = self.stored_bytes(n_tokens)
        pinned = sum(self.stored_bytes(self._tokens[other]) for other in self._pinned if other != conversation)
        if pinned + needed > self.capacity_bytes:
            return None
        was_pinned = conversation in self._pinned
        self.drop(conversation)
        gone = []
        while self.used_bytes + needed > self.capacity_bytes:
            oldest = next(other for other in self._tokens if other not in self._pinned)
            gone.append((oldest, self._tokens[oldest]))
            self.drop(oldest)
        self._tokens[conversation] = n_tokens
        if was_pinned:
            self._pinned.add(conversation)
        self.used_bytes += needed
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return gone

    def pin(self, conversation: int) -> None:
        """Keep a conversation that runs."""
        self._pinned.add(conversation)

    def unpin(self, conversation: int) -> None:
        """Let it go when there is need."""
        self._pinned.discard(conversation)


@dataclass
class LinkedTier:
    """A tier below the GPU with its links, from it and to it."""

    tier: Tier
    reading: Link
    writing: Link
    _written_at: dict[int, float] = field(default_factory=dict)

    def read(self, now: float, conversation: int, n_tokens: int) -> float:
        """Read the first tokens of a conversation, once they are written; returns when that is
        done.
        """
        return self.reading.transfer(max(now, self._written_at[conversation]), self.tier.stored_bytes(n_tokens))

    def write(self, now: float, conversation: int, n_tokens: int, known_tokens: int) -> None:
        """Write the tokens that are not known here."""
        stored = self.tier.stored_bytes
        self._written_at[conversation] = self.writing.transfer(now, stored(n_tokens) - stored(known_tokens))


@dataclass
class Hierarchy:
    """The tiers below the GPU, fastest first. A conversation lies in one of them; using it moves it
    to the first.
    """

    tiers: Sequence[LinkedTier]

    def find(self, conversation: int) -> tuple[LinkedTier | None, int]:
        """The tier that holds a conversation, and how many of its tokens."""
        for linked in self.tiers:
            if n_tokens := linked.tier.tokens_of(conversation):
                return linked, n_tokens
        return None, 0

    def store(self, now: float, conversation: int, n_tokens: int, known_tokens: int) -> None:
        """Put a conversation into the first tier that can hold it; only the tokens after
        `known_tokens` cross the link.
        """
        for linked in self.tiers:
            linked.tier.drop(conversation)
        self._place(now, 0, conversation, n_tokens, known_tokens)

    def _place(self, now: float, index: int, conversation: int, n_tokens: int, known_tokens: int) -> None:
        if index == len(self.tiers):
            return
        linked = self.tiers[index]
        gone = linked.tier.put(conversation, n_tokens)
        if gone is None:
            self._place(now, index + 1, conversation, n_tokens, known_tokens)
            return
        linked.write(now, conversation, n_tokens, known_tokens)
        for other, other_tokens in gone:
            self._place(now, index + 1, other, other_tokens, 0)


def stored_raw(bytes_per_token: float) -> StoredBytes:
    """Tokens as they are."""
    return lambda n_tokens: math.ceil(n_tokens * bytes_per_token)


def stored_encoded(bytes_per_token: float, body_ratio: float, exact_tokens: int) -> StoredBytes:
    """Bytes of tokens of which `exact_tokens` (sinks and window) are kept exactly, and the rest at
    1/body_ratio.
    """

    def stored(n_tokens: int) -> int:
        exact = min(n_tokens, exact_tokens)
        return math.ceil((exact + (n_tokens - exact) / body_ratio) * bytes_per_token)

    return stored
