"""Work for engines that hand in tasks, poll for their ends and must never wait."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from ..errors import PROGRAM_ENDS, StoreUnavailable
from ..process.forks import in_child
from ..process.log_limits import log_once
from ..process.workers import Workers

logger = logging.getLogger(__name__)

Name = TypeVar("Name", bound=Hashable)
Result = TypeVar("Result")


class Tasks(Generic[Name, Result]):
    """Tasks on threads of their own. Each ends with a result, whatever it raises. Safe to share
    between threads.

    Parameters:
        owner: What the tasks do, in words, for messages.
        thread_name: Beginning of the names of the threads.
        n_threads: Tasks that run at a time.
        notify: Called each time that a task has ended; None: nobody is told.
    """

    def __init__(
        self, owner: str, thread_name: str, n_threads: int = 1, notify: Callable[[], object] | None = None
    ) -> None:
        self._workers = Workers(n_threads, owner, thread_name)
        self._owner, self._notify = owner, notify
        self._renew()
        in_child(self._renew)

    def _renew(self) -> None:
        self._changed = threading.Condition()
        self._results: dict[Name, Result] = {}
        self._n_running = 0

    def submit(self, name: Name, work: Callable[[], Result], otherwise: Result) -> None:
        """Begin a task.

        Parameters:
            name: By which its result is taken.
            work: Gives the result.
            otherwise: The result where `work` raises, which is logged.

        Raises:
            StoreUnavailable: After `close`, and where the process can begin no more tasks.
        """
        with self._changed:
            self._n_running += 1
        try:
            self._workers.submit(self._run, name, work, otherwise)
        except StoreUnavailable:
            with self._changed:
                self._n_running -= 1
            raise

    def take(self, name: Name) -> Result | None:
        """The result of a task, once; None while there is none."""
        with self._changed:
            return self._results.pop(name, None)

    def take_all(self) -> dict[Name, Result]:
        """The results that nobody has taken, by name, in the order in which the tasks ended."""
        with self._changed:
            results, self._results = self._results, {}
        return results

    @property
    def is_busy(self) -> bool:
        """Whether tasks run, wait to run, or have ended and are not taken."""
        with self._changed:
            return self._n_running > 0 or bool(self._results)

    def drain(self) -> None:
        """Wait until no task runs or waits to run."""
        with self._changed:
            self._changed.wait_for(lambda: self._n_running == 0)

    def close(self) -> None:
        """Finish what was begun, and begin nothing more."""
        self._workers.close()

    def _run(self, name: Name, work: Callable[[], Result], otherwise: Result) -> None:
        result = otherwise
        try:
            result = work()
        except PROGRAM_ENDS:
            raise
        except BaseException as error:  # noqa: BLE001
            log_once(logger, type(error).__name__, "%s: task %s failed", self._owner, name, exc_info=error)
        finally:  # the engine waits for the end of each task
            with self._changed:
                self._results[name] = result
                self._n_running -= 1
                self._changed.notify_all()
            if self._notify is not None:
                self._notify()
