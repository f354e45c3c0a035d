"""Layers restored one after another: on demand, or on a CUDA device ahead of demand, beside what the caller computes."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

Layer = tuple[Tensor, Tensor]


class LayerQueue:
    """Gives each of n_layers layers once. restore: index -> keys and values of a layer, on the device.

    On a CUDA device the first layer is queued when this is made, and the next whenever one is taken, on a stream of their own: it
    is restored while the model computes with the layer that was taken, and the caller's stream waits for what it takes.
    Elsewhere a layer is restored when it is taken. Safe to share between threads.
    """

    def __init__(self, restore: Callable[[int], Layer], n_layers: int, device: torch.device) -> None:
        self._restore, self._n_layers, self._device = restore, n_layers, device
        self._lock = threading.Lock()
        self._taken: set[int] = set()
        self._ahead: dict[int, tuple[Layer, torch.cuda.Event]] = {}
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            home, self._stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            # What layers are restored from was made on this stream, and its memory is used again there.
            self._stream.wait_stream(home)
            weakref.finalize(self, home.wait_stream, self._stream).atexit = False
            self._queue(0, self._stream)

    def take(self, layer: int) -> Layer:
        """Keys and values of a layer, for use on the current stream."""
        with self._lock:
            self._taken.add(layer)
            if self._stream is None:
                return self._restore(layer)
            self._queue(layer, self._stream)
            sides, done = self._ahead.pop(layer)
            current = torch.cuda.current_stream(self._device)
            current.wait_event(done)
            for side in sides:
                side.record_stream(current)
            if layer + 1 not in self._taken:
                self._queue(layer + 1, self._stream)
            return sides

    def _queue(self, layer: int, stream: torch.cuda.Stream) -> None:
        """Start a layer, unless it is under way."""
        if layer in self._ahead or layer >= self._n_layers:
            return
        with torch.cuda.stream(stream):
            sides = self._restore(layer)
            self._ahead[layer] = sides, stream.record_event()
