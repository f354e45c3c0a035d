"""Which chunks are in a store, for a scheduler that asks for one after the other, must not wait,
and asks again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ...entries import Entries
from ...process.locks import ForkSafeLock
from ...process.log_limits import concerning
from ...process.workers import Workers


@dataclass
class _Request:
    """What one request has asked.

    Parameters:
        answers: By name of a chunk; None until it is known.
        asked: (position in the text, name, keys) since the last flush.
        alone: (name, keys) of chunks that are of use by themselves, since the last flush.
    """

    answers: dict[str, bool | None] = field(default_factory=dict)
    asked: list[tuple[int, str, Sequence[str]]] = field(default_factory=list)
    alone: list[tuple[str, Sequence[str]]] = field(default_factory=list)


class StoreLookups:
    """Gathers lookups until `flush`, then asks the store for all of a request together, in the
    order of its text.

    A chunk is of use only if those before it are there too, so all behind the first that is missing
    count as missing; but for those that are asked for alone.

    Parameters:
        entries: The entries that are asked for.
    """

    def __init__(self, entries: Entries) -> None:
        self._entries = entries
        self._asking = Workers(1, "the lookup of chunks", "kvtc-lookup")
        self._lock = ForkSafeLock()
        self._requests: dict[str, _Request] = {}

    def ask(
        self, request_id: str, position: int, name: str, keys: Sequence[str], *, is_alone: bool = False
    ) -> bool | None:
        """Whether a chunk is stored.

        Parameters:
            request_id: Of the request that asks.
            position: Of the chunk in the request's text.
            name: Of the chunk.
            keys: Of its entries, one for each worker.
            is_alone: Whether it is of use without those before it; default False.

        Returns:
            Whether all keys have entries; None: not known yet, ask again after a flush.
        """
        with self._lock:
            request = self._requests.setdefault(request_id, _Request())
            if name not in request.answers:
                request.answers[name] = None
                if is_alone:
                    request.alone.append((name, keys))
                else:
                    request.asked.append((position, name, keys))
            return request.answers[name]

    def flush(self) -> None:
        """Begin to look for what was asked since the last time."""
        with self._lock:
            batches: list[tuple[str, _Request, list[tuple[str, Sequence[str]]]]] = []
            for request_id, request in self._requests.items():
                if request.asked:
                    in_order = sorted(request.asked, key=lambda asked: asked[0])
                    batches.append((request_id, request, [(name, keys) for _, name, keys in in_order]))
                batches += [(request_id, request, [alone]) for alone in request.alone]
                request.asked, request.alone = [], []
        for request_id, request, batch in batches:
            self._asking.submit(self._look, request_id, request, batch)

    def set_missing(self, request_id: str, names: Sequence[str]) -> None:
        """These chunks were found and could not be loaded: for this request they are missing."""
        with self._lock:
            if request := self._requests.get(request_id):
                request.answers.update(dict.fromkeys(names, False))

    def forget(self, request_id: str) -> None:
        """The request is over."""
        with self._lock:
            self._requests.pop(request_id, None)

    def close(self) -> None:
        """Wait for the lookup that runs, and drop those that wait."""
        self._asking.close(finish=False)

    def _look(self, request_id: str, request: _Request, batch: list[tuple[str, Sequence[str]]]) -> None:
        keys = [key for _, of_name in batch for key in of_name]
        n_stored = 0
        try:
            with concerning(f"request {request_id}"):
                n_stored = self._entries.count_leading(keys)
        finally:  # the scheduler asks until there is an answer
            with self._lock:
                for name, of_name in batch:
                    n_stored -= len(of_name)
                    request.answers[name] = n_stored >= 0
