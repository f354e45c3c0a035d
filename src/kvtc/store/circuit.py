"""Circuit breaker: a place that has made a caller wait in vain is asked again in the background,
not by the next caller."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from ..errors import PROGRAM_ENDS
from ..process.forks import in_child

PAUSE_SECONDS = 1.0  # between two probes
SLOW_SECONDS = 1.0  # a failure that took longer opens the circuit; a quicker one is an answer, and costs callers little


class CircuitBreaker:
    """Whether a place of storage may be asked: while the circuit is closed. A slow failure opens
    it, and a probe that succeeds closes it.

    Parameters:
        probe: Asks the place for something cheap, and raises if that fails. It runs in a thread of
            its own, one at a time, at most every `PAUSE_SECONDS`, and only if somebody wants to
            ask. The circuit stays open as long as it hangs.
        slow_seconds: A failure that took at least so long opens the circuit; at most
            `SLOW_SECONDS`.
    """

    def __init__(self, probe: Callable[[], object], slow_seconds: float = float("inf")) -> None:
        self._probe, self._slow_seconds = probe, min(slow_seconds, SLOW_SECONDS)
        self._renew()
        in_child(self._renew)

    def _renew(self) -> None:
        self._lock = threading.Lock()
        self._is_open = self._is_probing = False
        self._next_probe = 0.0

    def is_open(self) -> bool:
        """Whether nobody may ask now. Starts the next probe if it is due."""
        if not self._is_open:
            return False
        with self._lock:
            is_due = self._is_open and not self._is_probing and time.monotonic() >= self._next_probe
            self._is_probing |= is_due
        if is_due:
            try:
                threading.Thread(target=self._try_again, name="kvtc-probe", daemon=True).start()
            except RuntimeError:  # no more threads, for now
                self._end_probe(succeeded=False)
        return True

    def failed(self, seconds: float) -> None:
        """A call has failed after so many seconds."""
        if seconds >= self._slow_seconds:
            with self._lock:
                self._is_open = True
                self._next_probe = time.monotonic() + PAUSE_SECONDS

    def _try_again(self) -> None:
        succeeded = False
        try:
            self._probe()
            succeeded = True
        except PROGRAM_ENDS:
            raise
        except BaseException:  # noqa: BLE001, S110  whatever it is, the place cannot be used yet
            pass
        finally:
            self._end_probe(succeeded)

    def _end_probe(self, succeeded: bool) -> None:
        with self._lock:
            self._is_probing = False
            self._is_open &= not succeeded
            self._next_probe = time.monotonic() + PAUSE_SECONDS
