"""Statistics of an adapter as a file of metrics, for engines that do not ask an adapter for any."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from ..errors import PROGRAM_ENDS, InvalidArgument
from ..files import SHARED, write_atomically
from ..process.log_limits import log_once

logger = logging.getLogger(__name__)

SECONDS = 15.0
"""Between two writes: what Prometheus usually leaves between two looks."""


class MetricsFile:
    """A file that is replaced every 15 seconds, and once more when it is closed; a forked child writes none.

    Parameters:
        path: Of the file; None: there is none.
        read: Gives the text of the metrics.

    Raises:
        InvalidArgument: The file cannot be written.
    """

    def __init__(self, path: str | None, read: Callable[[], str]) -> None:
        self._path, self._read = path, read
        self._ends = threading.Event()
        if path is None:
            return
        try:
            self._replace(path)
        except OSError as error:
            raise InvalidArgument(f"the file of metrics {path} cannot be written: {error.strerror}") from error
        threading.Thread(target=self._run, args=(path,), name="kvtc-metrics", daemon=True).start()

    def close(self) -> None:
        """Write what was counted last."""
        self._ends.set()
        if self._path is not None:
            self._attempt(self._path)

    def _run(self, path: str) -> None:
        while not self._ends.wait(SECONDS):
            self._attempt(path)

    def _attempt(self, path: str) -> None:
        try:
            self._replace(path)
        except PROGRAM_ENDS:
            raise
        except BaseException as error:  # noqa: BLE001  metrics are no reason to end anything
            kind = type(error).__name__
            log_once(logger, kind, "the file of metrics %s is not written: %s: %s", path, kind, error)

    def _replace(self, path: str) -> None:
        write_atomically(path, self._read().encode(), SHARED)
