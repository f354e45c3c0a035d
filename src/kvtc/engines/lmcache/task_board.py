"""Work for event loops that hand in tasks, poll for their ends and must never wait."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Generic, TypeVar

from ...errors import PROGRAM_ENDS
from ...process.locks import ForkSafeLock
from ...process.log_limits import log_once
from ...process.workers import Workers

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class TaskBoard(Generic[Result]):
    """Tasks of one kind, one after another on a thread. notify: called when a result is there. numbers: task ids, may be shared."""

    def __init__(self, name: str, notify: Callable[[], object], numbers: itertools.count[int]) -> None:
        self._pool = Workers(1, f"the task board {name}", name)
        self._name, self._notify, self._numbers = name, notify, numbers
        self._lock = ForkSafeLock()
        self._results: dict[int, Result] = {}

    def submit(self, work: Callable[[], Result], failed: Result) -> int:
        """Begin a task -> its id. failed: its result if it raises."""
        task = next(self._numbers)
        self._pool.submit(self._run, task, work, failed)
        return task

    def take(self, task: int) -> Result | None:
        """The result of a task, once; None while there is none."""
        with self._lock:
            return self._results.pop(task, None)

    def take_all(self) -> dict[int, Result]:
        """All results that nobody has taken."""
        with self._lock:
            results, self._results = self._results, {}
        return results

    def close(self) -> None:
        """Finish what was begun."""
        self._pool.close()

    def _run(self, task: int, work: Callable[[], Result], failed: Result) -> None:
        result = failed
        try:
            result = work()
        except PROGRAM_ENDS:
            raise
        except BaseException as error:  # noqa: BLE001
            log_once(logger, type(error).__name__, "a task of %s failed", self._name, exc_info=error)
        finally:  # the engine waits for the end of each task, whatever went wrong
            with self._lock:
                self._results[task] = result
            self._notify()
