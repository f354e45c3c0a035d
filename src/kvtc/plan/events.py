"""Requests on their way, and the clock that they share."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from .storage import LinkedTier
from .workload import Turn

GPU = "gpu"
ACTIVITIES = ("load", "decode_cache", "prefill", "answer", "encode_cache")


@dataclass
class Request:
    """One turn and its times.

    `hit_tier` and `hit_tokens` say where most of the prompt was found; `source` is a tier to read
    from, and `preloaded` the tokens that were already read. `engine_seconds` is the engine's time
    for it by activity; a decode step is shared by its batch.
    """

    conversation: int
    turn_index: int
    turn: Turn
    arrival: float
    first_token: float = math.nan
    finished: float = math.nan
    hit_tier: str | None = None
    hit_tokens: int = 0
    source: LinkedTier | None = None
    preloaded: tuple[LinkedTier, int] | None = None
    remaining: int = 0
    engine_seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(ACTIVITIES, 0.0))

    @property
    def total_tokens(self) -> int:
        """Of prompt and answer."""
        return self.turn.prompt_tokens + self.turn.answer_tokens


class Clock:
    """Events in order of time; those of one time in the order in which they were planned."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def at(self, time: float, act: Callable[[], None]) -> None:
        """Plan an event."""
        heapq.heappush(self._events, (time, next(self._order), act))

    def run(self) -> None:
        """Until nothing is planned."""
        while self._events:
            self.now, _, act = heapq.heappop(self._events)
            act()
