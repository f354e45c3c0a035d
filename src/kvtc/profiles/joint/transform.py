"""The transform of the profiles `joint` and `conditional`: rows of keys and values together, in the metric, and back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...backends import Backend
from ...calibration.joint_calibration import JointCalibration
from ...coding.device import settle
from ...coding.joint.blocks import HeadBlocks
from ...coding.product import (
    BlockRows,
    Blocks,
    Columns,
    LayerBlocks,
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
    of_remainder: tuple[BlockRows, BlockRows] | None = None


_SideBlocks = tuple[Blocks, Blocks]


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
        turns = basis.turns.map(lambda side: side.to(device).float())
        key_features = turns.side_features[0]
        self._means = [columns[0] for columns in by_layer(mean, n_layers, key_features)]
        layers = by_layer(synthesis, n_layers, key_features)
        self._synthesis = [Columns(columns, product, result=product) for columns in layers]
        self._n_layers, self._layer_keys = n_layers, key_features // n_layers
        self._metric, self._turns, self._rank = metric, turns, basis.rank
        self._is_vector, self._coefficients = basis.of_vectors.cpu(), basis.order.cpu().long()
        self._lock = ForkSafeLock()
        settle(device)

    def project(self, rows: Tensor, n: int) -> Tensor:
        """Joint rows [T, P] -> their first n coefficients [T, n] float32, in the order of the basis."""
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
            remainder = HeadBlocks(*(side.matrices for side in analysis)).times(rows - spanned.float())
            found[:, places.to(rows.device)] = remainder[:, features.to(rows.device)]
            return found
        there = torch.full((self._is_vector.numel() - self._rank,), -1, dtype=torch.int64, device="cpu")
        there[features] = places
        is_wanted = [columns[0].ge(0).any() for columns in by_layer(there[None], self._n_layers, self._n_keys)]
        layers = [
            (self._synthesis[layer], self._means[layer], self._blocks_of(layer))
            for layer, is_its in enumerate(is_wanted)
            if bool(is_its)
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
        is_key = features < self._n_keys
        of_keys, of_values = self._remainder_blocks[1]
        keys = of_keys.rows(coefficients, held[is_key], features[is_key])
        values = of_values.rows(coefficients, held[~is_key], features[~is_key] - self._n_keys)
        return RestorableCoefficients(of_vectors, (keys, values))

    def restore(self, coefficients: RestorableCoefficients, layer: int) -> tuple[Tensor, Tensor]:
        """Coefficients -> a layer's part of joint rows: keys before rotation and values, [T, H * D]."""
        keys, values = self._restored(coefficients, layer).tensor_split([self._layer_keys], dim=1)
        return keys, values

    def _restored(self, coefficients: RestorableCoefficients, layer: int) -> Tensor:
        blocks: list[LayerBlocks] = []
        if coefficients.of_remainder is not None:
            numbers = self._blocks_of(layer)
            blocks = [
                side.of(numbers, at) for side, at in zip(coefficients.of_remainder, (0, self._layer_keys), strict=True)
            ]
        return self._synthesis[layer].times(coefficients.of_vectors, self._means[layer], blocks=blocks)

    def _blocks_of(self, layer: int) -> range:
        """The blocks of a layer among those of keys, or of values, as they are side by side in what is restored."""
        n_heads = len(self._turns.keys) // self._n_layers
        return range(layer * n_heads, (layer + 1) * n_heads)

    @property
    def _n_keys(self) -> int:
        """Features of joint rows that are of keys."""
        return self._layer_keys * self._n_layers

    @property
    def _remainder_blocks(self) -> tuple[_SideBlocks, _SideBlocks]:
        """From rows to coefficients of the remainder, and back: of keys, and of values."""
        with self._lock:
            return self._found_blocks

    @cached_property
    def _found_blocks(self) -> tuple[_SideBlocks, _SideBlocks]:
        roots, inverses, turns = self._metric.roots.sides, self._metric.inverses.sides, self._turns.sides
        there = [Blocks(product_of_blocks(*both)) for both in zip(roots, turns, strict=True)]
        back = [Blocks(product_of_blocks(turn.mT, inverse)) for turn, inverse in zip(turns, inverses, strict=True)]
        return (there[0], there[1]), (back[0], back[1])


def by_layer(joint: Tensor, n_layers: int, key_features: int) -> list[Tensor]:
    """Joint rows [n, P], key_features of which are of keys -> those of each layer: its keys, then its values."""
    keys, values = (side.tensor_split(n_layers, dim=1) for side in joint.tensor_split([key_features], dim=1))
    return [torch.cat(both, dim=1) for both in zip(keys, values, strict=True)]
