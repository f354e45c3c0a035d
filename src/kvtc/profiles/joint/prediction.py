"""What the recomputed layers say of rows (`conditional`): those of these layers themselves, and a prediction of all deeper ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...cache import CacheGeometry
from ...calibration.conditional_calibration import ConditionalCalibration
from ...coding.device import settle
from ...coding.joint.prediction import hidden_features
from ...coding.product import Columns, PackedRows
from ...coding.transform import rows_of
from ...recomputation import Recomputation, Recomputed
from .transform import by_layer


class RowPrediction:
    """The regression of a calibration on a device, in float32 everywhere, for encoder and decoder must agree.

    Parameters:
        conditional: the calibration.
        geometry: of the whole calibration, recomputed layers included.
        recomputation: of the calibrated model.
        device: where rows are predicted.
    """

    def __init__(
        self,
        conditional: ConditionalCalibration,
        geometry: CacheGeometry,
        recomputation: Recomputation,
        device: torch.device,
    ) -> None:
        self.geometry, self.recomputation, self.device = geometry, recomputation, device
        self.n_own = conditional.n_own(geometry)
        self._behind = geometry.behind(self.n_own)
        weights = conditional.weights.to(device).float()
        layers = by_layer(weights, self._behind.n_layers, self._behind.side_features[0])
        self.layers = [Columns(columns) for columns in layers]
        settle(device)

    def coded(self, rows: Tensor) -> Tensor:
        """Joint rows [n, P] of all layers -> those of the layers that are coded, [n, P']."""
        sides = zip(
            torch.split(rows, list(self.geometry.side_features), dim=1), self._behind.side_features, strict=True
        )
        return torch.cat([side[:, side.shape[1] - n_coded :] for side, n_coded in sides], dim=1)

    def rows(self, recomputed: Recomputed) -> Tensor:
        """The prediction of these rows, [n, P'] float32."""
        predicted = PredictedRows(self, [recomputed])
        sides = zip(*(predicted.layer(layer) for layer in range(len(self.layers))), strict=True)
        return torch.cat([layer for side in sides for layer in side], dim=1)


class PredictedRows:
    """What is known of the tokens of several parts, in order, layer by layer."""

    def __init__(self, prediction: RowPrediction, parts: Sequence[Recomputed]) -> None:
        self._prediction, self._parts = prediction, parts
        self._features = PackedRows(hidden_features(torch.cat([part.hidden for part in parts]).to(prediction.device)))

    def own(self, layer: int) -> tuple[Tensor, Tensor]:
        """Rows of a recomputed layer, [T, H * D] float32: keys before rotation, and values."""
        geometry, device = self._prediction.geometry, self._prediction.device
        heads = slice(geometry.first_kv_head, geometry.first_kv_head + geometry.n_kv_heads)
        keys, values = [], []
        for part in self._parts:
            stop = part.first + len(part.hidden)
            sides = [side[geometry.layers[layer], heads].to(device) for side in (part.keys, part.values)]
            positions = torch.arange(part.first, stop, device=device)
            keys.append(rows_of(geometry.rope.turn_layer(layer, sides[0], positions, stop, inverse=True)[None]))
            values.append(rows_of(sides[1][None]))
        return torch.cat(keys), torch.cat(values)

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """The prediction of a layer behind the recomputed ones, the first of which is 0."""
        found = self._prediction.layers[layer].times(self._features)
        keys, values = torch.split(found, list(self._prediction.geometry.layer_features), dim=1)
        return keys, values
