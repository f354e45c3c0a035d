"""The transform of the profiles `joint` and `conditional`: rows of keys and values together, in the metric, and back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...backends import Backend
from ...calibration.joint_calibration import JointCalibration
from ...coding.device import settle
from ...coding.joint.metric import times_blocks
from ...coding.product import (
    BlockRows,
    Blocks,
    Columns,
    PackedRows,
    product_of_blocks,
    project_rest,
    spread_columns,
)
from ...process.locks import ForkSafeLock


@dataclass(frozen=True, eq=False)
class RestorableCoefficients:
    """Coefficients as `JointTransform.restore` takes them: those of vectors, and of the remainder, if any is not zero."""

    of_vectors: PackedRows
    of_remainder: BlockRows | None = None


class JointTransform:
    """The matrices of a calibration of n_layers layers on a backend's device. Analysis and synthesis differ by the metric.

    product: the dtype that both sides of a product are rounded to.
    """

    def __init__(self, joint: JointCalibration, n_layers: int, backend: Backend, product: torch.dtype) -> None:
        device = backend.device
        basis, metric = joint.basis, joint.metric.to(device)
        vectors = basis.matrix(device)
        self._product = product
        mean = metric.unweigh(basis.mean[None].to(device))
        analysis = metric.weigh(vectors.T).T
        self._origin = Columns(analysis).times(mean)[0]
        self._analysis = Columns(analysis, product)
        synthesis = metric.unweigh(vectors.T)
        self._means = [columns[0] for columns in by_layer(mean, n_layers)]
        self._synthesis = [Columns(columns, product, result=product) for columns in by_layer(synthesis, n_layers)]
        self._n_layers, self._layer_features = n_layers, len(basis.mean) // (2 * n_layers)
        self._metric, self._turns, self._rank = metric, basis.turns.to(device).float(), basis.rank
        self._is_vector, self._coefficients = basis.of_vectors.cpu(), basis.order.cpu().long()
        self._lock = ForkSafeLock()
        settle(device)

    def project(self, rows: Tensor, n: int) -> Tensor:
        """Joint rows [T, 2 p] -> their first n coefficients [T, n] float32, in the order of the basis."""
        is_vector = self._is_vector[:n]
        if bool(is_vector.all()):
            return self._analysis.times(rows, -self._origin[:n], n)
        leading = self._analysis.times(rows, -self._origin)
        found = torch.empty(len(rows), n, dtype=torch.float32, device=rows.device)
        of_vectors = is_vector.nonzero()[:, 0]
        spread_columns(leading[:, : len(of_vectors)].contiguous(), of_vectors, found)
        restorable, places = RestorableCoefficients(self.packed(leading)), (~is_vector).nonzero()[:, 0]
        features = self._coefficients[places] - self._rank
        analysis = self._remainder_blocks[0]
        if rows.device.type != "cpu":
            restored = [self.restore(restorable, layer) for layer in range(self._n_layers)]
            spanned = torch.cat([layer[side] for side in (0, 1) for layer in restored], dim=1)
            remainder = times_blocks(rows - spanned.float(), analysis.matrices)
            found[:, places.to(rows.device)] = remainder[:, features.to(rows.device)]
            return found
        there = torch.full((self._is_vector.numel() - self._rank,), -1, dtype=torch.int64, device="cpu")
        there[features] = places
        wanted = set((features // analysis.size).tolist())
        blocks = [self._blocks_of(layer) for layer in range(self._n_layers)]
        layers = [
            (self._synthesis[layer], self._means[layer], its)
            for layer, its in enumerate(blocks)
            if wanted.intersection(its)
        ]
        project_rest(rows, restorable.of_vectors, layers, analysis, there, found)
        return found

    def packed(self, coefficients: Tensor, chosen: Tensor | None = None) -> PackedRows:
        """Coefficients of vectors, as products take them; chosen: the columns that hold these, int64 [n], where not all do."""
        return PackedRows(coefficients, self._product, chosen)

    def restorable(self, coefficients: Tensor, used: Tensor) -> RestorableCoefficients:
        """The first coefficients [T, n] in the order of the basis. used: bool [n], on the CPU, of which any is not zero."""
        is_vector = self._is_vector[: coefficients.shape[1]]
        if bool(is_vector.all()):
            return RestorableCoefficients(self.packed(coefficients))
        of_vectors = self.packed(coefficients, is_vector.nonzero()[:, 0])
        held = (~is_vector & used).nonzero()[:, 0]
        if not len(held):
            return RestorableCoefficients(of_vectors)
        features = self._coefficients[held] - self._rank
        return RestorableCoefficients(of_vectors, self._remainder_blocks[1].rows(coefficients, held, features))

    def restore(self, coefficients: RestorableCoefficients, layer: int) -> tuple[Tensor, Tensor]:
        """Coefficients -> a layer's part of joint rows: keys before rotation and values, [T, H * D]."""
        keys, values = self._restored(coefficients, layer).tensor_split(2, dim=1)
        return keys, values

    def _restored(self, coefficients: RestorableCoefficients, layer: int) -> Tensor:
        remainder = coefficients.of_remainder
        blocks = None if remainder is None else remainder.of(self._blocks_of(layer))
        return self._synthesis[layer].times(coefficients.of_vectors, self._means[layer], blocks=blocks)

    def _blocks_of(self, layer: int) -> list[int]:
        """The blocks of a layer in joint rows, as they are side by side in what is restored."""
        n_heads = len(self._turns) // (2 * self._n_layers)
        return [(side * self._n_layers + layer) * n_heads + head for side in (0, 1) for head in range(n_heads)]

    @property
    def _remainder_blocks(self) -> tuple[Blocks, Blocks]:
        """From rows to coefficients of the remainder, and back."""
        with self._lock:
            return self._found_blocks

    @cached_property
    def _found_blocks(self) -> tuple[Blocks, Blocks]:
        metric, turns = self._metric, self._turns
        return Blocks(product_of_blocks(metric.roots, turns)), Blocks(product_of_blocks(turns.mT, metric.inverses))


def by_layer(joint: Tensor, n_layers: int) -> list[Tensor]:
    """Joint rows [n, 2 p] -> those of each layer, [n, 2 H D]: its keys, then its values."""
    sides = joint.tensor_split(2 * n_layers, dim=1)
    return [torch.cat([sides[layer], sides[n_layers + layer]], dim=1) for layer in range(n_layers)]
