"""The profile `paper`: keys and values apart, groups of coefficients under a bit allocation, as published."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from ...backends import Backend
from ...calibration.artifact import Calibration
from ...coding.device import settle
from ...coding.paper.allocation import BitAllocation, most_bytes
from ...coding.paper.groups import chunk_bytes
from ...coding.product import Columns, PackedRows
from ...coding.transform import Basis
from ...errors import CorruptStream, InvalidArgument, InvalidCache
from ...process.locks import ForkSafeLock
from ..interface import Allowance, BodyRows, CodedBody, CodedRows
from .rate import RateTarget


@dataclass(frozen=True)
class PaperPlan:
    """The bit allocations of keys and of values."""

    allocations: tuple[BitAllocation, BitAllocation]

    def to_bytes(self) -> bytes:
        return b"".join(allocation.to_bytes() for allocation in self.allocations)


class BasisSide:
    """Keys, or values, ready to compute with: the first n columns of a basis, packed for each direction at first need."""

    def __init__(self, basis: Basis, n: int, layer_features: int, device: torch.device, product: torch.dtype) -> None:
        self.n_columns = n
        self.means = torch.split(basis.mean.to(device), layer_features)
        self._mean = basis.mean.to(device)
        self._vectors = basis.vectors[:, :n].to(device)
        self._layer_features, self._product = layer_features, product

    def coefficients(self, rows: Tensor, n: int) -> Tensor:
        """Rows [T, p] -> the first n coefficients [T, n] float32."""
        origin, analysis = self._analysis
        return analysis.times(rows, -origin[:n], n)

    def rows(self, coefficients: PackedRows, layer: int) -> Tensor:
        """Coefficients [T, <= n] -> a layer's part of rows, [T, H * D]."""
        return self._synthesis[layer].times(coefficients, self.means[layer])

    @cached_property
    def _analysis(self) -> tuple[Tensor, Columns]:
        """The mean's own coefficients [n] float32, and the matrix."""
        found = Columns(self._vectors).times(self._mean[None])[0], Columns(self._vectors, self._product)
        settle(self._mean.device)
        return found

    @cached_property
    def _synthesis(self) -> list[Columns]:
        layers = torch.split(self._vectors.T, self._layer_features, dim=1)
        found = [Columns(layer, self._product, result=self._product) for layer in layers]
        settle(self._mean.device)
        return found


class PaperCoder:
    """product: dtype of products. rate: what may be spent; None to decode only."""

    needs_tokens = False
    is_entropy_coded = False
    rate_bytes: int | None = None

    def __init__(
        self, calibration: Calibration, backend: Backend, product: torch.dtype, rate: RateTarget | None = None
    ) -> None:
        self.rate = rate
        self.most_rate_bytes = sum(most_bytes(kind.basis.rank) for kind in (calibration.key, calibration.value))
        self._calibration = calibration
        self._backend, self._product = backend, product
        self._working: dict[int, BasisSide] = {}
        self._lock = ForkSafeLock()

    def encode_all(self, chunks: Callable[[bool], Iterable[BodyRows]], allowance: Allowance) -> CodedRows:
        if self.rate is None:
            raise RuntimeError("this coder only decodes")
        plan = PaperPlan(self.rate.allocations(allowance.original_bits))
        return CodedRows(plan, [data for rows in chunks(False) for data in self.encode(rows, plan)])

    def least_bytes(self, n_tokens: int) -> int:  # noqa: ARG002  the profile has no such bound
        raise InvalidArgument("the profile paper cannot keep to a fixed size: use joint or conditional")

    def fewest_bytes(self, n_tokens: int) -> int:  # noqa: ARG002  `body_bytes` says how many
        return 0

    def encode(self, rows: BodyRows, plan: PaperPlan) -> list[bytes]:
        """The bytes of each chunk."""
        sides = rows.rows.tensor_split(2, dim=1)
        packed = []
        for index, (side, allocation) in enumerate(zip(sides, plan.allocations, strict=True)):
            kind = self._kind(index, allocation.n_coefficients)
            coefficients = kind.coefficients(side, allocation.n_coefficients)
            if not bool(coefficients.isfinite().all()):
                raise InvalidCache("the cache holds values so large that the transform overflows float32")
            packed.append(self._backend.pack_groups(coefficients, rows.spans, allocation))
        return [keys + values for keys, values in zip(*packed, strict=True)]

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

    def decode(self, bodies: Sequence[CodedBody]) -> list[tuple[PackedRows, BasisSide]]:
        """Per kind: coefficients [T, n], and what leads back from them."""
        plans = [(plan, list(same)) for plan, same in groupby(bodies, key=lambda body: body.plan)]
        return [self._decode_side(side, plans) for side in (0, 1)]

    def _decode_side(self, side: int, plans: list[tuple[PaperPlan, list[CodedBody]]]) -> tuple[PackedRows, BasisSide]:
        widest = max((plan.allocations[side].n_coefficients for plan, _ in plans), default=0)
        parts = [torch.zeros(0, widest, dtype=torch.float32, device=self._backend.device)]
        for plan, bodies in plans:
            allocation = plan.allocations[side]
            cuts = [chunk_bytes(plan.allocations[0], body.n_tokens) for body in bodies]
            data = [body.data[cut:] if side else body.data[:cut] for body, cut in zip(bodies, cuts, strict=True)]
            found = self._backend.unpack_groups(data, [body.n_tokens for body in bodies], allocation)
            parts.append(torch.nn.functional.pad(found, (0, widest - allocation.n_coefficients)))
        return PackedRows(torch.cat(parts), self._product), self._kind(side, widest)

    def restore(self, coefficients: list[tuple[PackedRows, BasisSide]], layer: int) -> tuple[Tensor, Tensor]:
        keys, values = (kind.rows(packed, layer) for packed, kind in coefficients)
        return keys, values

    def _kind(self, index: int, n_coefficients: int) -> BasisSide:
        basis = (self._calibration.key, self._calibration.value)[index].basis
        with self._lock:
            kind = self._working.get(index)
            # Columns are needed from the first on: the widest conversion so far serves every narrower stream.
            if kind is None or kind.n_columns < n_coefficients:
                geometry = self._calibration.geometry
                size = geometry.n_kv_heads * geometry.head_dim
                device = self._backend.device
                # On a device all at once: other streams may still read a narrower conversion when it is let go.
                n = n_coefficients if device.type == "cpu" else basis.rank
                kind = BasisSide(basis, n, size, device, self._product)
                self._working[index] = kind
        return kind
