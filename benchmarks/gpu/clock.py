"""Clocks for `benchmarks.gpu`: medians of whole runs, and what each stage adds to a run, nested
ones counted once.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def begin_peak(device: torch.device) -> None:
    """Forget how much memory was taken at once so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Memory taken at once since `begin_peak`, what was there before included; None where that is
    not counted.
    """
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


@dataclass(frozen=True)
class Clock:
    """device: what runs are waited for. repeats: runs whose median counts, after warm_up others;
    fewer of slow ones, but one each.

    A piece of the benchmark so takes minutes at most, also where a backend leaves much to the CPU.
    """

    device: torch.device
    repeats: int = 5
    warm_up: int = 2
    enough_seconds: float = 20.0
    """After so long no further run begins that is not needed."""

    def times(self, run: Callable[[], Any]) -> list[float]:
        """Seconds of each run that counts, from a device that idles to one that idles again."""
        found: list[float] = []
        began, n_warm_ups = time.perf_counter(), 0
        while len(found) < self.repeats:
            synchronize(self.device)
            started = time.perf_counter()
            result = run()
            synchronize(self.device)
            stopped = time.perf_counter()
            is_late = stopped - began > self.enough_seconds
            if n_warm_ups < self.warm_up and not (n_warm_ups and is_late):
                n_warm_ups += 1
            else:
                found.append(stopped - started)
            del result  # before the next run asks for as much memory
            if found and is_late:
                break
        return found

    def median(self, run: Callable[[], Any]) -> float:
        return statistics.median(self.times(run))


@dataclass
class _Open:
    name: str
    start: Any
    inner: list[tuple[Any, Any]] = field(default_factory=list)


class StageClock:
    """Hooks around functions of the codec and its backend; a stage within another is not counted in
    the outer one.

    On CUDA devices stages are bounded by events of the stream, so that nothing waits for the device
    in between: a stage is what it adds to the stream's time, the host's preparation included where
    the device has to wait for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._open: list[_Open] = []
        self._closed: dict[str, list[tuple[Any, Any, list[tuple[Any, Any]]]]] = defaultdict(list)

    @contextmanager
    def hooked(self, stages: dict[str, tuple[Any, str]]) -> Iterator[None]:
        """stages: name -> an object, class or module, and the function of it that is the stage.
        Several may share a name.
        """
        with ExitStack() as stack:
            for name, (owner, function) in stages.items():
                stage = name.partition("/")[0]
                stack.enter_context(patch.object(owner, function, self._around(stage, getattr(owner, function))))
            yield

    def seconds(self) -> dict[str, float]:
        """Of each stage since it was last asked, in all."""
        synchronize(self._device)
        found = {
            name: sum(
                self._between(start, stop) - sum(self._between(*pair) for pair in inner) for start, stop, inner in calls
            )
            for name, calls in self._closed.items()
        }
        self._closed.clear()
        return found

    def _around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._open.append(_Open(name, self._now()))
            try:
                return function(*args, **kwargs)
            finally:
                call, stop = self._open.pop(), self._now()
                self._closed[name].append((call.start, stop, call.inner))
                if self._open:
                    self._open[-1].inner.append((call.start, stop))

        return timed

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, stop: Any) -> float:
        return stop - start if self._device.type != "cuda" else start.elapsed_time(stop) / 1e3
