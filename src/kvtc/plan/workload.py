"""Who asks what and when.

Everything is conversations of turns: a client that asks about one long text again and again, a chat
that comes, takes some turns with pauses between and goes, the recorded requests of one
conversation. A turn starts when its time has come and the turn before it has been answered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import strict_json
from ..errors import InvalidPlan
from .fields import Fields, check_number

Random = np.random.Generator
Draw = Callable[[Random], float]


@dataclass(frozen=True)
class Turn:
    """One request of a conversation.

    Parameters:
        prompt_tokens, answer_tokens: tokens of the prompt and of the answer.
        reused_tokens: first tokens of the prompt that were in the turn before, as prompt or as
            answer.
        think_seconds: the pause after the answer to the turn before.
        not_before: for a recorded request, seconds since the start of the recording.
    """

    prompt_tokens: int
    answer_tokens: int
    reused_tokens: int = 0
    think_seconds: float = 0.0
    not_before: float = 0.0


@dataclass(frozen=True)
class Conversation:
    """start: seconds at which its first turn comes."""

    start: float
    turns: Sequence[Turn]


def read_draw(value: Any, where: str, allow_zero: bool = False) -> Draw:
    """What draws a number, from JSON; `InvalidPlan` where it is none of these.

    It is the number itself, or {"exponential": mean}, {"geometric": mean}, {"uniform": [low,
    high]}, {"lognormal": [mean, standard deviation]} or {"one_of": [values]}.
    """
    if not isinstance(value, dict):
        constant = check_number(value, where, inclusive=allow_zero)
        return lambda _: constant
    if len(value) != 1 or next(iter(value)) not in _DRAW:
        raise InvalidPlan(f"{where}: expected a number or an object with one of {', '.join(_DRAW)}; found {value!r}")
    ((name, parameters),) = value.items()
    numbers = parameters if isinstance(parameters, list) else [parameters]
    checked = [check_number(number, f"{where}.{name}", inclusive=allow_zero) for number in numbers]
    needed = {"uniform": 2, "lognormal": 2, "exponential": 1, "geometric": 1, "constant": 1}.get(name)
    if not checked or (needed and len(checked) != needed):
        raise InvalidPlan(f"{where}.{name}: expected {needed or 'some'} numbers, found {len(checked)}")
    return lambda random: float(_DRAW[name](random, *checked))


def _lognormal(random: Random, mean: float, deviation: float) -> float:
    variance = np.log1p((deviation / mean) ** 2)
    return float(random.lognormal(np.log(mean) - variance / 2, np.sqrt(variance)))


_DRAW: dict[str, Any] = {
    "constant": lambda _, value: value,
    "exponential": lambda random, mean: random.exponential(mean),
    "geometric": lambda random, mean: random.geometric(min(1.0, 1 / mean)),
    "uniform": lambda random, low, high: random.uniform(low, high),
    "lognormal": _lognormal,
    "one_of": lambda random, *values: values[int(random.integers(len(values)))],
}


@dataclass(frozen=True)
class Workload:
    """Conversations, and which of their requests the statistics leave out because the caches are
    still filling.
    """

    conversations: Sequence[Conversation]
    warmup_turns: int
    warmup_seconds: float


def read_workload(fields: Fields, directory: Path, overrides: Mapping[str, Any] | None = None) -> Workload:
    """The field `workload` of a plan. overrides: fields that a sweep sets."""
    fields.override(overrides or {})
    kind = fields.choice("kind", _READERS)
    random = np.random.default_rng(fields.whole("seed", 0, low=0))
    conversations = _READERS[kind](fields, random, directory)
    default = 1 if kind == "clients" else 0
    return Workload(
        conversations,
        fields.whole("warmup_turns", default, low=0),
        fields.number("warmup_seconds", 0.0, inclusive=True),
    )


def _clients(fields: Fields, random: Random, _: Path) -> list[Conversation]:
    """`clients` that each ask `requests_per_client` questions about one text of their own: a closed
    loop.
    """
    n_clients, n_requests = fields.whole("clients"), fields.whole("requests_per_client")
    context, question, answer = (
        _tokens(fields, name) for name in ("context_tokens", "question_tokens", "answer_tokens")
    )
    think = read_draw(fields.get("think_seconds", 0), f"{fields.where}.think_seconds", allow_zero=True)
    conversations = []
    for _client in range(n_clients):
        own = context(random)
        turns = [
            Turn(
                own + question(random),
                answer(random),
                own if turn else 0,
                think(random) if turn else 0.0,
            )
            for turn in range(n_requests)
        ]
        conversations.append(Conversation(0.0, turns))
    return conversations


def _conversations(fields: Fields, random: Random, _: Path) -> list[Conversation]:
    """Conversations that come as a Poisson process; a turn's prompt is all that was said before and
    something new.
    """
    rate, n = fields.number("conversations_per_second"), fields.whole("conversations")
    first, more, answer = (_tokens(fields, name) for name in ("first_prompt_tokens", "turn_tokens", "answer_tokens"))
    n_turns = _tokens(fields, "turns")
    think = read_draw(fields.get("think_seconds"), f"{fields.where}.think_seconds", allow_zero=True)
    limit = fields.whole("max_tokens")
    conversations, now = [], 0.0
    for _conversation in range(n):
        now += random.exponential(1 / rate)
        turns: list[Turn] = []
        said = 0
        for turn in range(n_turns(random)):
            prompt = said + (more if turn else first)(random)
            answered = answer(random)
            if prompt + answered > limit:  # a conversation ends where the context does
                break
            turns.append(Turn(prompt, answered, said, think(random) if turn else 0.0))
            said = prompt + answered
        if turns:
            conversations.append(Conversation(now, turns))
    return conversations


def _trace(fields: Fields, _: Random, directory: Path) -> list[Conversation]:
    """Recorded requests, one JSON object a line: seconds, conversation, prompt_tokens,
    answer_tokens and, if not all that was said before comes again, reused_tokens.
    """
    path = directory / fields.text("file")
    recorded: dict[str, list[Turn]] = {}
    starts: dict[str, float] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            entry = Fields(strict_json.loads(line), where)
        except ValueError as error:
            raise InvalidPlan(f"{where} is not JSON: {error}") from error
        name, seconds = str(entry.get("conversation")), entry.number("seconds", inclusive=True)
        prompt, answer = entry.whole("prompt_tokens"), entry.whole("answer_tokens")
        turns = recorded.setdefault(name, [])
        starts.setdefault(name, seconds)
        if turns and seconds < turns[-1].not_before:
            raise InvalidPlan(f"{where}: the requests of conversation {name} do not stand in order of their seconds")
        said = turns[-1].prompt_tokens + turns[-1].answer_tokens if turns else 0
        reused = entry.whole("reused_tokens", min(said, prompt), low=0)
        if reused > min(said, prompt):
            raise InvalidPlan(
                f"{where}: {reused} tokens cannot come again of {said} said before, in a prompt of {prompt}"
            )
        turns.append(Turn(prompt, answer, reused, 0.0, seconds))
        entry.finish()
    if not recorded:
        raise InvalidPlan(f"{path} holds no request")
    return [Conversation(starts[name], turns) for name, turns in recorded.items()]


def _tokens(fields: Fields, name: str) -> Callable[[Random], int]:
    """Draws a whole number of at least 1."""
    draw = read_draw(fields.get(name), f"{fields.where}.{name}")
    return lambda random: max(1, round(draw(random)))


_READERS = {"clients": _clients, "conversations": _conversations, "trace": _trace}
