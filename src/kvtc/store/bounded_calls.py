"""Calls to a place that may never answer: a caller waits at most one deadline, and a bounded number
of threads may hang."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import suppress
from typing import Any, TypeVar

from ..errors import PROGRAM_ENDS, InvalidArgument, StoreFull, StoreUnavailable
from ..process.forks import in_child
from .circuit import CircuitBreaker

T = TypeVar("T")
MAX_THREADS = 16
IDLE_SECONDS = 5.0  # after which a thread without work ends

_here = threading.local()


class Call(Future[Any]):
    """What a thread does for a caller who may have gone."""

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__()
        self.function = function
        self.is_given_up = False

    def perform(self) -> None:
        if not self.set_running_or_notify_cancel():
            return
        _here.call = self
        try:
            self.set_result(self.function())
        except BaseException as error:  # noqa: BLE001  the caller's, SystemExit too
            self.set_exception(error)
        finally:
            _here.call = None


def is_given_up() -> bool:
    """In a thread that performs a call: whether its caller has gone, so that nothing should come of
    it any more."""
    call: Call | None = getattr(_here, "call", None)
    return call is not None and call.is_given_up


class Threads:
    """At most `limit` daemon threads that perform calls in the order given, and end where there is
    nothing to do."""

    def __init__(self, place: str, limit: int) -> None:
        self._place, self._limit = place, limit
        self._renew()
        in_child(self._renew)

    def _renew(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[Call] = deque()
        self._n_threads = self._n_idle = 0
        self._hanging: set[Call] = set()  # running, though their callers have gone

    def submit(self, call: Call) -> None:
        """`StoreUnavailable` where all threads hang, or none can be started."""
        with self._changed:
            if len(self._hanging) >= self._limit:
                raise StoreUnavailable(f"{self._place}: {self._limit} calls have not come back")
            if self._n_idle <= len(self._waiting) and self._n_threads < self._limit:
                self._start()
            self._waiting.append(call)
            self._changed.notify()

    def _start(self) -> None:
        try:
            threading.Thread(target=self._work, name="kvtc-store", daemon=True).start()
            self._n_threads += 1
        except RuntimeError as error:
            if self._n_threads == 0:
                raise StoreUnavailable(f"{self._place}: no thread for the call: {error}") from error

    def give_up(self, call: Call) -> None:
        """Its caller does not wait any longer."""
        with self._changed:
            call.is_given_up = True
            if call.cancel():
                with suppress(ValueError):
                    self._waiting.remove(call)
            elif not call.done():
                self._hanging.add(call)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._n_idle += 1
                has_work = self._changed.wait_for(lambda: self._waiting, IDLE_SECONDS)
                self._n_idle -= 1
                if not has_work:
                    self._n_threads -= 1
                    return
                call = self._waiting.popleft()
            call.perform()
            with self._changed:
                self._hanging.discard(call)
            del call  # and what it holds


class BoundedCalls:
    """The calls of one store, which fail and recover together: see `CircuitBreaker`.

    Parameters:
        place: Names the store in messages.
        seconds: The longest that a caller waits.
        probe: Asks for something cheap, to find out whether the store answers again.
        meaning: What a caller gets in place of an error of a call.
    """

    def __init__(
        self,
        place: str,
        seconds: float,
        probe: Callable[[], object],
        meaning: Callable[[BaseException], BaseException] = lambda error: error,
    ) -> None:
        self._place, self._seconds, self._meaning = place, seconds, meaning
        self._threads = Threads(place, MAX_THREADS)
        self._circuit = CircuitBreaker(probe, seconds / 2)

    def run(self, call: Callable[[], T]) -> T:
        """What the call returns or raises; raises `StoreUnavailable` if no answer comes in time, or
        none has come lately."""
        return self.run_all([call])[0]

    def run_all(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """As `run`, for calls side by side with one deadline; the first error is raised and gives
        up the others."""
        if self._circuit.is_open():
            raise StoreUnavailable(f"{self._place} did not answer lately; it is asked again in the background")
        begin = time.monotonic()
        begun = [Call(call) for call in calls]
        try:
            return self._results(begun)
        except PROGRAM_ENDS:
            raise
        except BaseException as error:
            failure = self._meaning(error)
            if not isinstance(failure, StoreFull | InvalidArgument):  # they are answers
                self._circuit.failed(time.monotonic() - begin)
            if failure is error:
                raise
        finally:
            for call in begun:
                if not call.done():
                    self._threads.give_up(call)
        raise failure  # out of reach of the error, which may hold a password

    def _results(self, begun: Sequence[Call]) -> list[Any]:
        for call in begun:
            self._threads.submit(call)
        if len(begun) == 1:  # quicker, and what most are
            with suppress(TimeoutError):
                begun[0].exception(self._seconds)
        else:
            wait(begun, self._seconds, FIRST_EXCEPTION)
        for call in begun:
            if call.done() and (error := call.exception()) is not None:
                raise error
        if not all(call.done() for call in begun):
            raise StoreUnavailable(f"{self._place} has not answered within {self._seconds:g} seconds")
        return [call.result() for call in begun]
