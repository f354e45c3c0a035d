"""Conversations and engines brought together on one clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .engine import Engine
from .events import Clock, Request
from .workload import Conversation

EngineMaker = Callable[[Clock, Callable[[Request], None]], Sequence[Engine]]


def simulate(
    conversations: Sequence[Conversation], make_engines: EngineMaker
) -> tuple[list[Request], Sequence[Engine], float]:
    """Run all conversations to their end.

    Parameters:
        conversations: conversation i has engine i modulo the number of engines.
        make_engines: builds the engines, given a clock and what to call at the end of an answer.

    Returns:
        The requests in the order of their ends, the engines, and the seconds that it took.
    """
    clock = Clock()
    done: list[Request] = []

    def ask(conversation: int, index: int, earliest: float) -> None:
        turn = conversations[conversation].turns[index]
        arrival = max(earliest + turn.think_seconds, turn.not_before)
        engine = engines[conversation % len(engines)]
        request = Request(conversation, index, turn, arrival)
        clock.at(arrival + engine.speeds.request_seconds, lambda: engine.arrive(request))

    def answered(request: Request) -> None:
        done.append(request)
        if request.turn_index + 1 < len(conversations[request.conversation].turns):
            ask(request.conversation, request.turn_index + 1, clock.now)

    engines = make_engines(clock, answered)
    for conversation, content in enumerate(conversations):
        ask(conversation, 0, content.start)
    clock.run()
    return done, engines, max((request.finished for request in done), default=0.0)
