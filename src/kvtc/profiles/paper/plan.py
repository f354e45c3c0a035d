"""How the profile `paper` spends bits in one stream."""

from __future__ import annotations

from dataclasses import dataclass

from ...coding.paper.allocation import BitAllocation
from ...errors import CorruptStream
from .rate import SideAllocations


@dataclass(frozen=True)
class PaperPlan:
    """The bit allocations of keys and of values."""

    allocations: SideAllocations

    def to_bytes(self) -> bytes:
        """Both, one after the other."""
        return b"".join(allocation.to_bytes() for allocation in self.allocations)

    @classmethod
    def from_bytes(cls, data: bytes, ranks: tuple[int, int]) -> PaperPlan:
        """Inverse of `to_bytes`; ranks: of the bases. Raises `CorruptStream`."""
        key, offset = BitAllocation.from_bytes(data, 0, ranks[0])
        value, offset = BitAllocation.from_bytes(data, offset, ranks[1])
        if offset != len(data):
            raise CorruptStream(f"{len(data) - offset} bytes follow the bit allocations")
        if not key.runs and not value.runs:
            raise CorruptStream("the bit allocations store nothing at all")
        return cls((key, value))
