"""`cuda:` entries on a device, up to a byte budget: what is decoded there need not leave it.

An entry is the stream alone, so that idle conversations take a fraction of the device's memory that
their caches would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import torch
from torch import Tensor

from .backends import Bytes
from .coding.device import CPU, usable_device
from .container.stream import parse_stream
from .container.tables import MAGIC
from .errors import InvalidArgument, KvtcError, StoreFull, StoreUnavailable
from .process.forks import in_child
from .process.torch_state import neutral_torch_state
from .store.frame import FRAME_BYTES, DamagedEntry, ForeignEntry, check_head
from .store.memory import MemoryStore
from .store.urls import StoreUrl

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class DeviceEntry:
    """A frame: its head in the host's memory, its value [n] uint8 on the device.

    is_sound: the value is a stream of which every checksum held when it was put.
    """

    head: bytes
    value: Tensor
    is_sound: bool

    def __len__(self) -> int:
        return len(self.head) + len(self.value)


class DeviceStore(MemoryStore):
    """Entries in the memory of a device.

    Checksums are verified in the host's memory. `get` brings an entry there and verifies its frame,
    as every store does. `resident_many` gives tensors that it does not verify again, of values that
    were sound streams when they were put, every section's checksum included; other values it gives
    as `get_many` does, so that decoding finds the fault. Only the device's error correction can
    find what happens to its memory afterwards.

    A tensor that was given out stays as it is when its entry is evicted, and does not count in the
    budget then.

    Parameters:
        url: `cuda:`, `cuda:0`, or `device:` with the name of any device of torch. Options: as of
            `MemoryStore`.

    Raises:
        StoreUnavailable: The device cannot be used.
    """

    def __init__(self, url: StoreUrl) -> None:
        super().__init__(url)
        self._is_left_behind = False
        in_child(self._leave_behind)

    def _take_place(self, url: StoreUrl) -> None:
        if url.host or (url.scheme == "device" and not url.path):
            raise InvalidArgument(f"{url}: expected a device after the colon, as in cuda:0 or device:cpu")
        name = url.path if url.scheme == "device" else f"cuda:{url.path}".removesuffix(":")
        try:
            self.device = usable_device(name)
        except InvalidArgument as error:
            raise StoreUnavailable(f"no store can be there: {error}") from error

    def __repr__(self) -> str:
        return f"DeviceStore({self.device}, {self._max_bytes} bytes)"

    def resident_many(self, keys: Sequence[str]) -> list[Bytes | None]:
        """As `Store.resident_many`: the values of sound streams are uint8 [bytes] on the device,
        which must not be written to.
        """
        self._check_open()
        names = [self._names.name(key) for key in keys]
        return self._counted(self._attempt(lambda: self._resident(names)))

    def _resident(self, names: Sequence[str]) -> list[Bytes | None]:
        with self._lock:
            self._mark_used(names)
            held: list[DeviceEntry | None] = [self._frames.get(name) for name in names]
        return [self._given(name, entry) for name, entry in zip(names, held, strict=True)]

    def _leave_behind(self) -> None:
        self._is_left_behind = self.device.type != "cpu"

    def _attempt(self, call: Callable[[], T]) -> T:
        return super()._attempt(self._refuse if self._is_left_behind else call)

    def _refuse(self) -> NoReturn:
        raise StoreUnavailable(f"{self!r}: a forked process cannot use its parent's device; start it with spawn")

    def _given(self, name: str, entry: DeviceEntry | None) -> Bytes | None:
        if entry is None:
            return None
        if entry.is_sound:
            try:
                check_head(name, entry.head, FRAME_BYTES + len(entry.value))
            except (DamagedEntry, ForeignEntry):
                pass  # counted and removed as any other
            else:
                return entry.value
        return self._open(name, self._frame(entry))

    @neutral_torch_state
    def _hold(self, frame: bytes) -> DeviceEntry:
        head, value = frame[:FRAME_BYTES], frame[FRAME_BYTES:]
        try:
            # A copy: torch shares memory with what it makes a tensor of, and a frame is not to be
            # written to.
            nothing = torch.empty(0, dtype=torch.uint8, device=CPU)
            here = torch.frombuffer(bytearray(value), dtype=torch.uint8) if value else nothing
            return DeviceEntry(head, here.to(self.device), _is_sound_stream(value))
        except torch.OutOfMemoryError as error:
            raise StoreFull(f"{self.device} has no memory for an entry of {len(value)} bytes") from error

    @neutral_torch_state
    def _frame(self, held: DeviceEntry) -> bytes:
        return held.head + held.value.cpu().numpy().tobytes()


def _is_sound_stream(value: bytes) -> bool:
    """Whether a value is a stream whose checksums hold, all of them."""
    if not value.startswith(MAGIC):
        return False
    try:
        parse_stream(value).verify()
    except KvtcError:
        return False
    return True
