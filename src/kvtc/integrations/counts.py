"""What adapters of engines count, for metrics and for tests."""

from __future__ import annotations

import threading
from typing import Any


class Counts:
    """Numbers that only grow, counted by many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals: dict[str, float] = {}
        self._taken: dict[str, float] = {}

    def add(self, **amounts: float) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self._totals[name] = self._totals.get(name, 0) + amount

    def read(self) -> dict[str, float]:
        """All of them so far."""
        with self._lock:
            return dict(self._totals)

    def take(self) -> dict[str, Any]:
        """What was added since the last take."""
        with self._lock:
            news = {name: total - self._taken.get(name, 0) for name, total in self._totals.items()}
            self._taken = dict(self._totals)
        return {name: amount for name, amount in news.items() if amount}
