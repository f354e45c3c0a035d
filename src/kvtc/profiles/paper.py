"""The profile `paper`: keys and values apart, groups of coefficients under a bit allocation, as published."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration.artifact import Calibration
from ..coding.allocation import BitAllocation
from ..coding.groups import chunk_bytes, decode_groups, encode_groups
from ..coding.transform import project, reconstruct, rows_of
from ..errors import CorruptStream, InvalidArgument, InvalidCache
from .interface import Allowance, BodyRows, CodedBody, CodedRows
from .paper_rate import RateTarget


@dataclass(frozen=True)
class PaperPlan:
    """The bit allocations of keys and of values."""

    allocations: tuple[BitAllocation, BitAllocation]

    def to_bytes(self) -> bytes:
        return b"".join(allocation.to_bytes() for allocation in self.allocations)


@dataclass(frozen=True)
class _Kind:
    """One kind (keys or values) ready to compute with: mean [q] and the used columns of its basis [q, n], float32."""

    mean: Tensor
    vectors: Tensor


class PaperCoder:
    """rate: what may be spent; None to decode only."""

    needs_tokens = False
    is_entropy_coded = False
    rate_bytes: int | None = None

    def __init__(self, calibration: Calibration, device: torch.device, rate: RateTarget | None = None) -> None:
        self.rate = rate
        self._calibration = calibration
        self._device = device
        self._working: dict[int, _Kind] = {}
        self._lock = threading.Lock()

    def encode_all(self, chunks: Callable[[bool], Iterable[BodyRows]], allowance: Allowance) -> CodedRows:
        if self.rate is None:
            raise RuntimeError("this coder only decodes")
        plan = PaperPlan(self.rate.allocations(allowance.original_bits))
        return CodedRows(plan, [self.encode(rows, plan) for rows in chunks(False)])

    def least_bytes(self, n_tokens: int) -> int:  # noqa: ARG002  the profile has no such bound
        raise InvalidArgument("the profile paper cannot keep to a fixed size: use joint or conditional")

    def encode(self, rows: BodyRows, plan: PaperPlan) -> bytes:
        packed = []
        kinds = self._kinds(plan)
        for side, kind, allocation in zip((rows.keys, rows.values), kinds, plan.allocations, strict=True):
            coefficients = project(rows_of(side), kind.mean, kind.vectors)
            if not bool(coefficients.isfinite().all()):
                raise InvalidCache("the cache holds values so large that the transform overflows float32")
            packed.append(encode_groups(coefficients, allocation))
        return b"".join(packed)

    def read_plan(self, data: bytes) -> PaperPlan:
        key, offset = BitAllocation.from_bytes(data, 0, self._calibration.key.basis.rank)
        value, offset = BitAllocation.from_bytes(data, offset, self._calibration.value.basis.rank)
        if offset != len(data):
            raise CorruptStream(f"{len(data) - offset} bytes follow the bit allocations")
        if not key.runs and not value.runs:
            raise CorruptStream("the bit allocations store nothing at all")
        return PaperPlan((key, value))

    def body_bytes(self, plan: PaperPlan, n_tokens: int) -> int:
        return sum(chunk_bytes(allocation, n_tokens) for allocation in plan.allocations)

    def decode(self, bodies: Sequence[CodedBody], plan: PaperPlan) -> list[tuple[Tensor, _Kind]]:
        """Per kind: coefficients [T, n], and what leads back from them."""
        found = []
        for side, (kind, allocation) in enumerate(zip(self._kinds(plan), plan.allocations, strict=True)):
            parts = [torch.zeros(0, allocation.n_coefficients, dtype=torch.float32, device=self._device)]
            for body in bodies:
                cut = chunk_bytes(plan.allocations[0], body.n_tokens)
                data = body.data[cut:] if side else body.data[:cut]
                parts.append(decode_groups(data, allocation, body.n_tokens, self._device))
            found.append((torch.cat(parts), kind))
        return found

    def restore(self, coefficients: list[tuple[Tensor, _Kind]], layer: int) -> tuple[Tensor, Tensor]:
        geometry = self._calibration.geometry
        size = geometry.n_kv_heads * geometry.head_dim
        features = slice(layer * size, (layer + 1) * size)
        keys, values = (reconstruct(c, kind.mean[features], kind.vectors[features]) for c, kind in coefficients)
        return keys, values

    def _kinds(self, plan: PaperPlan) -> tuple[_Kind, _Kind]:
        return self._kind(0, plan.allocations[0].n_coefficients), self._kind(1, plan.allocations[1].n_coefficients)

    def _kind(self, index: int, n_coefficients: int) -> _Kind:
        basis = (self._calibration.key, self._calibration.value)[index].basis
        with self._lock:
            kind = self._working.get(index)
            # Columns are needed from the first on: the widest conversion so far serves every narrower stream.
            if kind is None or kind.vectors.shape[1] < n_coefficients:
                vectors = basis.vectors[:, :n_coefficients].to(self._device).float()
                kind = self._working[index] = _Kind(basis.mean.to(self._device), vectors)
        return _Kind(kind.mean, kind.vectors[:, :n_coefficients])
