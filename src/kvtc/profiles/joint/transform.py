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
from ...coding.product import Columns, PackedRows, product_of_blocks
from ...process.locks import ForkSafeLock


@dataclass(frozen=True, eq=False)
class RestorableCoefficients:
    """Coefficients as `JointTransform.restore` takes them: those of vectors, and [T, 2 p] of the remainder, if there are any.

    used: numbers of the blocks whose coefficients of the remainder are not all zero.
    """

    of_vectors: PackedRows
    of_remainder: Tensor | None = None
    used: frozenset[int] = frozenset()


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
        self._metric, self._turns, self._order = metric, basis.turns.to(device).float(), basis.order.to(device)
        self._of_vectors, self._rank = basis.of_vectors.to(device), basis.rank
        self._lock = ForkSafeLock()
        settle(device)

    def project(self, rows: Tensor, n: int) -> Tensor:
        """Joint rows [T, 2 p] -> their first n coefficients [T, n] float32, in the order of the basis."""
        of_vectors = self._of_vectors[:n]
        if bool(of_vectors.all()):
            return self._analysis.times(rows, -self._origin[:n], n)
        leading = self._analysis.times(rows, -self._origin)
        found = torch.empty(len(rows), n, dtype=torch.float32, device=rows.device)
        found[:, of_vectors] = leading[:, : int(of_vectors.sum())]
        restorable = RestorableCoefficients(self.packed(leading))
        layers = [self.restore(restorable, layer) for layer in range(self._n_layers)]
        spanned = torch.cat([layer[side] for side in (0, 1) for layer in layers], dim=1)
        remainder = times_blocks(rows - spanned.float(), self._remainder_blocks[0])
        found[:, ~of_vectors] = remainder[:, self._order[:n][~of_vectors] - self._rank]
        return found

    def packed(self, coefficients: Tensor) -> PackedRows:
        """Coefficients of vectors, as products take them."""
        return PackedRows(coefficients, self._product)

    def restorable(self, coefficients: Tensor) -> RestorableCoefficients:
        """The first coefficients [T, n] in the order of the basis."""
        n = coefficients.shape[1]
        of_vectors = self._of_vectors[:n]
        if bool(of_vectors.all()):
            return RestorableCoefficients(self.packed(coefficients))
        features = 2 * self._layer_features * self._n_layers
        remainder = torch.zeros(len(coefficients), features, dtype=torch.float32, device=coefficients.device)
        remainder[:, self._order[:n][~of_vectors] - self._rank] = coefficients[:, ~of_vectors]
        held = remainder.any(dim=0).reshape(len(self._turns), -1).any(dim=1).nonzero()[:, 0]
        used = frozenset(held.tolist())
        return RestorableCoefficients(self.packed(coefficients[:, of_vectors]), remainder, used)

    def restore(self, coefficients: RestorableCoefficients, layer: int) -> tuple[Tensor, Tensor]:
        """Coefficients -> a layer's part of joint rows: keys before rotation and values, [T, H * D]."""
        found = self._synthesis[layer].times(coefficients.of_vectors, self._means[layer])
        dim, n_heads = self._turns.shape[1], len(self._turns) // (2 * self._n_layers)
        for index in range(2 * n_heads):
            side, head = divmod(index, n_heads)
            block = (side * self._n_layers + layer) * n_heads + head
            if coefficients.of_remainder is not None and block in coefficients.used:
                own = coefficients.of_remainder[:, block * dim : (block + 1) * dim]
                found[:, index * dim : (index + 1) * dim] += self._remainder_blocks[1][block].times(own)
        keys, values = found.tensor_split(2, dim=1)
        return keys, values

    @property
    def _remainder_blocks(self) -> tuple[Tensor, list[Columns]]:
        """[B, D, D] float32: from rows to coefficients of the remainder; and each block that leads back."""
        with self._lock:
            return self._found_blocks

    @cached_property
    def _found_blocks(self) -> tuple[Tensor, list[Columns]]:
        metric, turns = self._metric, self._turns
        back = [Columns(block) for block in product_of_blocks(turns.mT, metric.inverses)]
        return product_of_blocks(metric.roots, turns), back


def by_layer(joint: Tensor, n_layers: int) -> list[Tensor]:
    """Joint rows [n, 2 p] -> those of each layer, [n, 2 H D]: its keys, then its values."""
    sides = joint.tensor_split(2 * n_layers, dim=1)
    return [torch.cat([sides[layer], sides[n_layers + layer]], dim=1) for layer in range(n_layers)]
