"""Whether entries are in a store, for a thread that asks one by one, must not wait, and asks again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ...entries import Entries
from ...process.locks import ForkSafeLock
from ...process.workers import Workers


@dataclass
class _Question:
    """Of one request. answers: by name, None until it is known. asked: (place in the text, name, keys) since the last flush."""

    answers: dict[str, bool | None] = field(default_factory=dict)
    asked: list[tuple[int, str, Sequence[str]]] = field(default_factory=list)


class StoreLookups:
    """Questions are gathered until `flush`, then put to the store together, in the order of the text.

    An entry is of use only if those before it are there too, so what follows the first that is missing counts as missing.
    """

    def __init__(self, entries: Entries) -> None:
        self._entries = entries
        self._asking = Workers(1, "the lookup of chunks", "kvtc-lookup")
        self._lock = ForkSafeLock()
        self._questions: dict[str, _Question] = {}

    def ask(self, request_id: str, place: int, name: str, keys: Sequence[str]) -> bool | None:
        """Whether all keys of a name are stored; None: not known yet, ask again after a flush."""
        with self._lock:
            question = self._questions.setdefault(request_id, _Question())
            if name not in question.answers:
                question.answers[name] = None
                question.asked.append((place, name, keys))
            return question.answers[name]

    def flush(self) -> None:
        """Begin to look for what was asked since the last time."""
        with self._lock:
            news = [question for question in self._questions.values() if question.asked]
            batches = [(question, sorted(question.asked, key=lambda asked: asked[0])) for question in news]
            for question in news:
                question.asked = []
        for question, batch in batches:
            self._asking.submit(self._look, question, batch)

    def set_missing(self, request_id: str, names: Sequence[str]) -> None:
        """What was found could not be read: for this request it is not there."""
        with self._lock:
            if question := self._questions.get(request_id):
                question.answers.update(dict.fromkeys(names, False))

    def forget(self, request_id: str) -> None:
        """The request is over."""
        with self._lock:
            self._questions.pop(request_id, None)

    def close(self) -> None:
        self._asking.close(finish=False)

    def _look(self, question: _Question, batch: list[tuple[int, str, Sequence[str]]]) -> None:
        keys = [key for _, _, of_name in batch for key in of_name]
        n_stored = 0
        try:
            n_stored = self._entries.count_leading(keys)
        finally:  # the scheduler asks until there is an answer
            with self._lock:
                for _, name, of_name in batch:
                    n_stored -= len(of_name)
                    question.answers[name] = n_stored >= 0
