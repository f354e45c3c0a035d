"""What is calibrated for the profiles `joint` and `conditional`, and its tensors in the calibration file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..cache import CacheGeometry
from ..coding.joint.basis import LARGEST_ENTRY, JointBasis
from ..coding.joint.blocks import HeadBlocks
from ..coding.joint.importance import Importance
from ..coding.joint.metric import Metric
from ..coding.joint.probability import ProbabilityTables
from ..coding.joint.uniform_quantizer import ESCAPE, N_ACTIVITIES, N_CLASSES, N_SYMBOLS
from ..coding.rans import TOTAL
from ..coding.transform import Basis
from ..errors import CorruptCalibration, InvalidArgument
from ..layer_runs import describe_layers

Named = Iterator[tuple[str, Tensor]]

LARGEST = 2.0**40
"""Of numbers in a calibration file; caches hold far smaller ones, and what is computed from such numbers stays finite."""
LARGEST_SQUARE = LARGEST**2
ORTHONORMAL = 1 + 2.0**-7
"""Of an entry of an orthonormal matrix, rounded to 16 bits."""
_LEAST_STEP = 1 / LARGEST
_BASIS = ("mean", "vectors", "scales", "turns", "order")
"""Tensors of a `JointBasis`, by their names in the file."""


@dataclass(frozen=True, eq=False)
class CoefficientModel:
    """How coefficients are distributed: deviations float32 [r], falling; tables; and what tokens cost on average.

    steps, bits float64 [S]: bits a token at each step, its activity class included; steps falling, bits rising.
    """

    deviations: npt.NDArray[np.float32]
    tables: ProbabilityTables
    steps: npt.NDArray[np.float64]
    bits: npt.NDArray[np.float64]

    def step_for(self, bits: float) -> float:
        """The step at which a token is expected to take so many bits; at most what the curve's ends allow."""
        return float(np.exp2(np.interp(np.log2(bits), np.log2(self.bits), np.log2(self.steps))))

    def tensors(self, prefix: str) -> Named:
        """Its tensors in the calibration file."""
        yield f"{prefix}.deviations", torch.from_numpy(self.deviations)
        yield f"{prefix}.frequencies", torch.from_numpy(self.tables.frequencies)
        yield f"{prefix}.offsets", torch.from_numpy(self.tables.offsets)
        yield f"{prefix}.curve", torch.from_numpy(np.stack([self.steps, self.bits]))

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], prefix: str, rank: int) -> CoefficientModel:
        """Inverse of `tensors`; `CorruptCalibration` for tables that no coder could use."""
        deviations = tensors[f"{prefix}.deviations"]
        frequencies, offsets = tensors[f"{prefix}.frequencies"], tensors[f"{prefix}.offsets"]
        curve = tensors[f"{prefix}.curve"]
        expect(f"{prefix}.deviations", deviations, (rank,), torch.float32, 0, LARGEST)
        expect(f"{prefix}.frequencies", frequencies, (N_ACTIVITIES, N_CLASSES, N_SYMBOLS), torch.uint16)
        expect(f"{prefix}.offsets", offsets, (N_ACTIVITIES, N_CLASSES, 2), torch.float32, -1, 1)
        expect(f"{prefix}.curve", curve, (2, curve.numel() // 2), torch.float64, 0, LARGEST)
        tables = ProbabilityTables(frequencies.numpy(), offsets.numpy())
        room = tables.frequencies[..., ESCAPE]
        if (
            bool((tables.frequencies.sum(axis=-1, dtype=np.int64) != TOTAL).any())
            or not room.all()
            or int(room.max()) >= TOTAL
        ):
            raise CorruptCalibration(
                f"a row of {prefix}.frequencies does not sum to {TOTAL} or leaves no room for escapes or for all else"
            )
        steps, bits = curve.numpy()
        falls, rises = bool((np.diff(steps) <= 0).all()), bool((np.diff(bits) >= 0).all())
        if not len(steps) or not (falls and rises) or steps.min() < _LEAST_STEP or bits[0] <= 0:
            raise CorruptCalibration(f"{prefix}.curve must hold falling, positive steps and rising bits above 0")
        return cls(deviations.numpy(), tables, steps, bits)


@dataclass(frozen=True, eq=False)
class JointCalibration:
    """basis: of joint rows (keys, then values: P features) in the metric. coefficients: their distribution, in its order.

    The profile `joint` has one for the rows of all layers, `conditional` one for what prediction leaves of those that it codes.
    """

    basis: JointBasis
    metric: Metric
    coefficients: CoefficientModel

    def tensors(self, prefix: str) -> Named:
        """Its tensors in the calibration file."""
        for name in _BASIS:
            found = getattr(self.basis, name)
            yield f"{prefix}.{name}", found.packed if isinstance(found, HeadBlocks) else found
        yield f"{prefix}.roots", self.metric.roots.packed
        yield from self.coefficients.tensors(prefix)

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], prefix: str, geometry: CacheGeometry) -> JointCalibration:
        """Inverse of `tensors`, of the layers of a geometry; `CorruptCalibration` where they are missing or odd."""
        if f"{prefix}.mean" not in tensors:
            layers = describe_layers(geometry.layers)
            raise CorruptCalibration(f"there is no {prefix}.mean: nothing says how layers {layers} are coded")
        basis = _joint_basis(tensors, prefix, geometry)
        roots = _head_blocks(tensors, f"{prefix}.roots", geometry, torch.float32, LARGEST)
        coefficients = CoefficientModel.from_tensors(tensors, prefix, basis.order.numel())
        try:
            metric = Metric.from_roots(roots)
        except InvalidArgument as error:
            raise CorruptCalibration(f"{prefix}.roots: {error}") from error
        for side in metric.inverses.sides:
            expect(f"the inverse of {prefix}.roots", side, tuple(side.shape), torch.float32, -LARGEST, LARGEST)
        return cls(basis, metric, coefficients)


def importance_of(tensors: dict[str, Tensor], geometry: CacheGeometry, name: str = "importance") -> Importance | None:
    """The importance of tokens in a calibration file, the tensor `name`; None for one without."""
    if name not in tensors:
        return None
    weights = tensors[name]
    expect(name, weights, (geometry.joint_features + 1,), torch.float32, -LARGEST, LARGEST)
    return Importance(weights)


def _joint_basis(tensors: dict[str, Tensor], prefix: str, geometry: CacheGeometry) -> JointBasis:
    turns = _head_blocks(tensors, f"{prefix}.turns", geometry, torch.float16, ORTHONORMAL)
    fields: dict[str, Any] = {name: tensors[f"{prefix}.{name}"] for name in _BASIS} | {"turns": turns}
    basis = JointBasis(**fields)
    features, n_blocks = geometry.joint_features, len(turns)
    rank = basis.vectors.shape[-1] if basis.vectors.dim() else 0
    if not 1 <= rank <= features:
        raise CorruptCalibration(f"{prefix}.vectors holds {rank} columns; expected 1 .. {features}")
    expect(f"{prefix}.mean", basis.mean, (features,), torch.float32, -LARGEST, LARGEST)
    expect(f"{prefix}.vectors", basis.vectors, (features, rank), torch.int8)
    expect(f"{prefix}.scales", basis.scales, (n_blocks, rank), torch.float16, 0, ORTHONORMAL / LARGEST_ENTRY)
    expect(f"{prefix}.order", basis.order, (rank + features,), torch.int32, 0, rank + features - 1)
    if not bool((basis.order.sort().values == torch.arange(rank + features)).all()):
        raise CorruptCalibration(f"{prefix}.order does not hold every coefficient once")
    if bool((basis.order[basis.of_vectors].diff() < 0).any()):
        raise CorruptCalibration(f"{prefix}.order does not keep the order of the vectors")
    return basis


def _head_blocks(
    tensors: dict[str, Tensor], name: str, geometry: CacheGeometry, dtype: torch.dtype, largest: float
) -> HeadBlocks:
    """Blocks as `HeadBlocks.packed` gives them, of numbers up to `largest`."""
    n_heads, (key_dim, value_dim) = geometry.n_layers * geometry.n_kv_heads, geometry.dims
    is_one_width = key_dim == value_dim
    shape = (2 * n_heads, key_dim, key_dim) if is_one_width else (n_heads * (key_dim**2 + value_dim**2),)
    expect(name, tensors[name], shape, dtype, -largest, largest)
    return HeadBlocks.of(tensors[name], n_heads, geometry.dims)


def expect_basis(name: str, basis: Basis, features: int) -> None:
    """Raise `CorruptCalibration` unless a basis of rows of so many features can be one."""
    rank = basis.spectrum.numel()
    if not 1 <= rank <= features:
        raise CorruptCalibration(f"{name}.spectrum holds {rank} variances; expected 1 .. {features}, one a coefficient")
    expect(f"{name}.mean", basis.mean, (features,), torch.float32, -LARGEST, LARGEST)
    expect(f"{name}.vectors", basis.vectors, (features, rank), torch.float16, -ORTHONORMAL, ORTHONORMAL)
    expect(f"{name}.spectrum", basis.spectrum, (rank,), torch.float32, 0, LARGEST_SQUARE)


def expect(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    low: float | None = None,
    high: float | None = None,
) -> None:
    """Raise `CorruptCalibration` unless a tensor of the file has this shape and dtype, and numbers of low .. high alone."""
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise CorruptCalibration(f"{name} is {tuple(tensor.shape)} {tensor.dtype}; expected {shape} {dtype}")
    if low is None or high is None or not tensor.numel():
        return
    # NaN is the least and the largest number of what holds one.
    least, largest = (float(end) for end in tensor.aminmax())
    if not (low <= least and largest <= high):
        raise CorruptCalibration(
            f"{name} holds numbers that are not finite or out of range: {least:g} .. {largest:g}; expected {low:g} .. {high:g}"
        )
