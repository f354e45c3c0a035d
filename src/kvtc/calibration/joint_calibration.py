"""What is calibrated for the profiles `joint` and `conditional`, and its tensors in the calibration file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..cache import CacheGeometry
from ..coding.joint.metric import Metric
from ..coding.joint.prediction import N_TOKENS_SEEN, Predictor
from ..coding.joint.probability import ProbabilityTables
from ..coding.joint.uniform_quantizer import ESCAPE, N_ACTIVITIES, N_CLASSES, N_SYMBOLS
from ..coding.rans import TOTAL
from ..coding.transform import Basis
from ..errors import CorruptCalibration, InvalidArgument

Named = Iterator[tuple[str, Tensor]]

LARGEST = 2.0**40
"""Of numbers in a calibration file; caches hold far smaller ones, and what is computed from such numbers stays finite."""
LARGEST_SQUARE = LARGEST**2
ORTHONORMAL = 1 + 2.0**-7
"""Of an entry of an orthonormal matrix, rounded to 16 bits."""
_LARGEST_HALF = float(np.finfo(np.float16).max)
_LARGEST_SINGLE = float(np.finfo(np.float32).max)
_LEAST_STEP = 1 / LARGEST


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
class TokenCoding:
    """What `conditional` adds: prediction from token ids into rotated coefficients, and the distribution of what it leaves.

    rotation [r, r] float16: basis coefficients times it are the coefficients that are coded. explained [L, 2] float32: share of the
    variance of each layer's keys and of its values that prediction explains.
    """

    predictor: Predictor
    rotation: Tensor
    coefficients: CoefficientModel
    explained: Tensor

    def tensors(self) -> Named:
        """Its tensors in the calibration file."""
        yield "tokens.table", self.predictor.table
        yield "tokens.weights", self.predictor.weights
        yield "tokens.hidden", self.predictor.hidden
        yield "tokens.outputs", self.predictor.outputs
        yield "tokens.rotation", self.rotation
        yield "tokens.explained", self.explained
        yield from self.coefficients.tensors("tokens")

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], n_layers: int, rank: int) -> TokenCoding:
        """Inverse of `tensors`."""
        table, weights = tensors["tokens.table"], tensors["tokens.weights"]
        hidden, outputs = tensors["tokens.hidden"], tensors["tokens.outputs"]
        if table.dim() != 2 or not table.numel():
            raise CorruptCalibration(f"tokens.table is {tuple(table.shape)}; expected tokens and features")
        if outputs.dim() != 2:
            raise CorruptCalibration(f"tokens.outputs is {tuple(outputs.shape)}; expected hidden features and rank")
        n_features = N_TOKENS_SEEN * table.shape[1] + 1
        expect("tokens.table", table, tuple(table.shape), torch.int8)
        halves = torch.float16, -_LARGEST_HALF, _LARGEST_HALF
        expect("tokens.weights", weights, (n_features, rank), *halves)
        expect("tokens.hidden", hidden, (n_features, outputs.shape[0]), *halves)
        expect("tokens.outputs", outputs, (outputs.shape[0], rank), *halves)
        rotation, explained = tensors["tokens.rotation"], tensors["tokens.explained"]
        expect("tokens.rotation", rotation, (rank, rank), torch.float16, -ORTHONORMAL, ORTHONORMAL)
        expect("tokens.explained", explained, (n_layers, 2), torch.float32, -_LARGEST_SINGLE, ORTHONORMAL)
        coefficients = CoefficientModel.from_tensors(tensors, "tokens", rank)
        predictor = Predictor(table, weights, hidden, outputs)
        return cls(predictor, rotation, coefficients, explained)


@dataclass(frozen=True, eq=False)
class JointCalibration:
    """basis: of joint rows (keys, then values: 2 p features) in the metric. coefficients: their distribution."""

    basis: Basis
    metric: Metric
    coefficients: CoefficientModel
    tokens: TokenCoding | None

    def tensors(self) -> Named:
        """Its tensors in the calibration file."""
        yield "joint.mean", self.basis.mean
        yield "joint.vectors", self.basis.vectors
        yield "joint.spectrum", self.basis.spectrum
        yield "joint.roots", self.metric.roots
        yield from self.coefficients.tensors("joint")
        if self.tokens is not None:
            yield from self.tokens.tensors()

    @property
    def parts(self) -> dict[str, tuple[int, int]]:
        """(numbers, bytes in the file) of what weighs most: the basis; the token table, and all else that prediction needs."""
        found = {"basis": [self.basis.mean, self.basis.vectors, self.basis.spectrum, self.metric.roots]}
        if self.tokens is not None:
            predictor = self.tokens.predictor
            found["token table"] = [predictor.table]
            found["prediction"] = [predictor.weights, predictor.hidden, predictor.outputs, self.tokens.rotation]
        return {
            name: (sum(t.numel() for t in tensors), sum(t.numel() * t.element_size() for t in tensors))
            for name, tensors in found.items()
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], geometry: CacheGeometry) -> JointCalibration | None:
        """Inverse of `tensors`; None for a calibration without."""
        if "joint.mean" not in tensors:
            return None
        basis = Basis(tensors["joint.mean"], tensors["joint.vectors"], tensors["joint.spectrum"])
        roots = tensors["joint.roots"]
        rank, features = basis.spectrum.numel(), 2 * geometry.row_features
        n_blocks = 2 * geometry.n_layers * geometry.n_kv_heads
        expect_basis("joint", basis, features)
        shape = n_blocks, geometry.head_dim, geometry.head_dim
        expect("joint.roots", roots, shape, torch.float32, -LARGEST, LARGEST)
        coefficients = CoefficientModel.from_tensors(tensors, "joint", rank)
        tokens = TokenCoding.from_tensors(tensors, geometry.n_layers, rank) if "tokens.table" in tensors else None
        try:
            metric = Metric.from_roots(roots)
        except InvalidArgument as error:
            raise CorruptCalibration(f"joint.roots: {error}") from error
        expect("the inverse of joint.roots", metric.inverses, shape, torch.float32, -LARGEST, LARGEST)
        return cls(basis, metric, coefficients, tokens)


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
