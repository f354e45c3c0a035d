"""A serving engine, event by event.

An engine works in iterations, as continuous batching does. Between two decode steps it looks at its
queue: those who wait and for whom there is room are admitted together, first come first served.
That takes the engine's whole time: one after another, what is stored of their prompts is read and
decoded, the rest is prefilled, and what is new is encoded and stored; then all of them have their
first token. A decode step gives every running request one more. Writing to the tiers goes on in the
background.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import InvalidPlan
from .events import GPU, Clock, Request
from .storage import Hierarchy, LinkedTier, Tier


@dataclass(frozen=True)
class Speeds:
    """How fast an engine is.

    Parameters:
        prefill_points: (tokens, seconds), increasing.
        request_seconds: seconds of a request outside of the engine.
        step_seconds: seconds of a decode step.
        context_token_seconds: seconds that each token of context in the batch adds to a step.
        bytes_per_token: bytes of original cache.
        encode_bytes_per_second, decode_bytes_per_second: bytes of original cache that the codec
            takes.
    """

    prefill_points: Sequence[tuple[float, float]]
    step_seconds: float
    context_token_seconds: float
    request_seconds: float = 0.0
    bytes_per_token: float = 0.0
    encode_bytes_per_second: float = math.inf
    decode_bytes_per_second: float = math.inf

    def prefill(self, cached_tokens: int, prompt_tokens: int) -> float:
        """Seconds of prefill for the tokens of a prompt that are not cached: straight lines between
        measured points, from 0 at 0.
        """
        points = self.prefill_points
        if prompt_tokens > points[-1][0]:
            raise InvalidPlan(
                f"a prompt has {prompt_tokens:,} tokens; engine.prefill_seconds was measured up to {points[-1][0]:,.0f}"
            )
        tokens, seconds = zip((0.0, 0.0), *points, strict=True)
        until = np.interp([cached_tokens, prompt_tokens], tokens, seconds)
        return float(until[1] - until[0])


@dataclass(frozen=True)
class Limits:
    """What an engine admits.

    Parameters:
        max_running: requests that run at once, whatever their memory; None: only the memory limits
            them.
        max_admitted: requests that are admitted between two steps.
        blocking_loads: whether the engine stands still while it reads caches from a tier.
    """

    max_running: int | None = None
    max_admitted: int | None = None
    blocking_loads: bool = True


@dataclass(frozen=True)
class Segment:
    """Decode steps in a row."""

    start: float
    step_seconds: float
    steps: int


class Engine:
    """One engine with its GPU tier. keeps: whether caches stay in GPU memory after the answer."""

    def __init__(
        self,
        clock: Clock,
        speeds: Speeds,
        limits: Limits,
        gpu: Tier,
        below: Hierarchy,
        keeps: bool,
        answered: Callable[[Request], None],
    ) -> None:
        self.clock, self.speeds, self.limits, self.gpu, self.below = clock, speeds, limits, gpu, below
        self.busy_seconds = 0.0
        self._keeps, self._answered = keeps, answered
        self._waiting: deque[Request] = deque()
        self._newcomers = 0  # of those who wait, how many were not looked at yet
        self._admitted: list[Request] = []
        self._may_admit = 0
        self._running: list[Request] = []
        self._segment: Segment | None = None
        self._idle = True

    def arrive(self, request: Request) -> None:
        """A request joins the queue, or its cache is read first."""
        self._find(request)
        if self.limits.blocking_loads or not self._fetch(request):
            self._queue(request)

    def _queue(self, request: Request) -> None:
        self._waiting.append(request)
        self._newcomers += 1
        if self._idle:
            # Not at once: whoever else comes at this very time is admitted together with the first.
            self._idle = False
            self.clock.at(self.clock.now, self._next)
        elif self._segment is not None:
            self._shorten(self._segment)

    def _shorten(self, segment: Segment) -> None:
        """A newcomer is looked at after the decode step that is under way."""
        if segment.step_seconds:
            done = math.ceil((self.clock.now - segment.start) / segment.step_seconds - 1e-9)
            if max(done, 1) < segment.steps:
                self._decode(replace(segment, steps=max(done, 1)))

    def _next(self) -> None:
        """Between two steps: admit whoever waits now."""
        self._may_admit = min(len(self._waiting), self.limits.max_admitted or len(self._waiting))
        self._newcomers = len(self._waiting) - self._may_admit
        self._admit()

    # Admission, one request after another

    def _admit(self) -> None:
        request = self._take()
        if request is None:
            self._begin_answers()
            return
        self._may_admit -= 1
        self._admitted.append(request)
        spent, speeds = request.engine_seconds, self.speeds
        if request.source is not None and request.preloaded is None:
            spent["load"] = self._read(request.source, request) - self.clock.now
        if request.hit_tokens and request.hit_tier != GPU:
            spent["decode_cache"] = request.hit_tokens * speeds.bytes_per_token / speeds.decode_bytes_per_second
        spent["prefill"] = speeds.prefill(request.hit_tokens, request.turn.prompt_tokens)
        self._work(sum(spent.values()), lambda: self._prefilled(request))

    def _take(self) -> Request | None:
        """The next request there is room for, with what is known of its prompt; GPU memory is its
        own from now on.
        """
        limits = self.limits
        while self._may_admit:
            if limits.max_running is not None and len(self._running) + len(self._admitted) >= limits.max_running:
                return None
            request = self._waiting[0]
            self._find(request)
            if not limits.blocking_loads and self._fetch(request):
                self._waiting.popleft()  # its cache has left the GPU while it waited
                self._may_admit -= 1
                continue
            has_room = self.gpu.put(request.conversation, request.total_tokens) is not None
            if limits.max_running is None:
                if not has_room:
                    self._check_that_someone_leaves(request)
                    return None
                self.gpu.pin(request.conversation)
            return self._waiting.popleft()
        return None

    def _find(self, request: Request) -> None:
        """Where most of a request's prompt lies: in the GPU's tier where that is as good as any."""
        reused = request.turn.reused_tokens
        on_gpu = min(reused, self.gpu.tokens_of(request.conversation)) if self._keeps else 0
        source, n_tokens = self.below.find(request.conversation)
        if request.preloaded is not None:
            source, n_tokens = request.preloaded
        n_tokens = min(reused, n_tokens)
        if on_gpu and on_gpu >= n_tokens:
            request.source, request.hit_tier, request.hit_tokens = None, GPU, on_gpu
        elif source is not None and n_tokens:
            request.source, request.hit_tier, request.hit_tokens = source, source.tier.name, n_tokens
        else:
            request.source, request.hit_tier, request.hit_tokens = None, None, 0

    def _fetch(self, request: Request) -> bool:
        """Start to read a request's cache in the background; False if there is nothing to read."""
        source = request.source
        if source is None or request.preloaded is not None:
            return False
        request.preloaded = source, request.hit_tokens
        self.clock.at(self._read(source, request), lambda: self._queue(request))
        return True

    def _read(self, source: LinkedTier, request: Request) -> float:
        return source.read(self.clock.now, request.conversation, request.hit_tokens)

    def _check_that_someone_leaves(self, request: Request) -> None:
        if not self._running and not self._admitted:
            raise InvalidPlan(
                f"a request of {request.total_tokens:,} tokens needs {self.gpu.stored_bytes(request.total_tokens):,} bytes of "
                f"GPU memory; {self.gpu.capacity_bytes:,.0f} are left beside the weights"
            )

    def _prefilled(self, request: Request) -> None:
        """The cache of the prompt is stored as soon as it is there, as engines do: others may want
        it.
        """
        source, n_tokens = self.below.find(request.conversation)
        known = min(n_tokens, request.turn.reused_tokens) if source else 0
        self._store(request, request.turn.prompt_tokens, known, self._admit)

    # Answers

    def _begin_answers(self) -> None:
        """The first token of everyone admitted. A decode step comes before more are admitted."""
        admitted, self._admitted = self._admitted, []
        if not admitted:
            self._decode_or_rest()
            return
        for request in admitted:
            request.first_token = self.clock.now
            request.remaining = request.turn.answer_tokens - 1
        self._running += admitted
        self._leave(then=self._decode_or_rest)

    def _decode_or_rest(self) -> None:
        if not self._running:
            self._idle = not self._waiting
            if self._waiting:
                self._next()
            return
        context = sum(request.turn.prompt_tokens + request.turn.answer_tokens / 2 for request in self._running)
        step = self.speeds.step_seconds + self.speeds.context_token_seconds * context
        # Nobody waits, or nobody who waits has room before someone leaves; a newcomer shortens the segment.
        steps = min(request.remaining for request in self._running)
        self._decode(Segment(self.clock.now, step, 1 if self._newcomers else steps))

    def _decode(self, segment: Segment) -> None:
        self._segment = segment
        self.clock.at(segment.start + segment.steps * segment.step_seconds, lambda: self._decoded(segment))

    def _decoded(self, segment: Segment) -> None:
        if segment is not self._segment:
            return  # it was shortened
        self._segment = None
        seconds = segment.steps * segment.step_seconds
        self.busy_seconds += seconds
        for request in self._running:
            request.remaining -= segment.steps
            request.engine_seconds["answer"] += seconds / len(self._running)
        self._leave(then=self._next)

    def _leave(self, then: Callable[[], None]) -> None:
        """Requests that have their last token are done; what they leave behind is stored before the
        engine goes on.
        """
        finished = [request for request in self._running if not request.remaining]
        self._running = [request for request in self._running if request.remaining]
        for request in finished:
            request.finished = self.clock.now
            self.gpu.unpin(request.conversation)
            if not self._keeps:
                self.gpu.drop(request.conversation)
            self._answered(request)
        self._store_answers(deque(finished), then)

    def _store_answers(self, finished: deque[Request], then: Callable[[], None]) -> None:
        while finished:
            request = finished.popleft()
            _, known = self.below.find(request.conversation)
            if known:  # a prompt that has been dropped meanwhile is not written again
                self._store(request, request.total_tokens, known, lambda: self._store_answers(finished, then))
                return
        then()

    def _store(self, request: Request, n_tokens: int, known_tokens: int, then: Callable[[], None]) -> None:
        """Encode what is new, in the engine's time, and write it to the tiers below in the
        background.
        """
        if not self.below.tiers:
            then()
            return
        new_bytes = (n_tokens - known_tokens) * self.speeds.bytes_per_token
        seconds = new_bytes / self.speeds.encode_bytes_per_second
        request.engine_seconds["encode_cache"] += seconds
        self.below.store(self.clock.now + seconds, request.conversation, n_tokens, known_tokens)
        self._work(seconds, then)

    def _work(self, seconds: float, then: Callable[[], None]) -> None:
        self.busy_seconds += seconds
        self.clock.at(self.clock.now + seconds, then)
