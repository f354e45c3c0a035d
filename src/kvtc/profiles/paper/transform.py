"""The transform of the profile `paper`: keys and values each in a basis of its own."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ...calibration.artifact import Calibration
from ...coding.device import settle
from ...coding.product import Columns, PackedRows
from ...coding.transform import Basis
from ...process.locks import ForkSafeLock


class SideTransform:
    """Keys, or values: the first n columns of their basis on a device, packed for each direction at first need.

    layer_features: features of one layer, H * D. product: dtype that both sides of a product are rounded to.
    """

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


class PaperTransform:
    """The transforms of keys and of values, as wide as they have been asked for so far. Safe to share between threads."""

    def __init__(self, calibration: Calibration, device: torch.device, product: torch.dtype) -> None:
        self.product = product
        key, value = calibration.sides
        self._bases = key.basis, value.basis
        self._layer_features = calibration.geometry.layer_features
        self._device = device
        self._sides: dict[int, SideTransform] = {}
        self._lock = ForkSafeLock()

    def side(self, index: int, n_coefficients: int) -> SideTransform:
        """Of keys (0) or values (1), with n_coefficients columns or more."""
        basis = self._bases[index]
        with self._lock:
            side = self._sides.get(index)
            # Columns are needed from the first on: the widest conversion so far serves every narrower stream.
            if side is None or side.n_columns < n_coefficients:
                # On a device all at once: other streams may still read a narrower conversion when it is let go.
                n = n_coefficients if self._device.type == "cpu" else basis.rank
                side = SideTransform(basis, n, self._layer_features[index], self._device, self.product)
                self._sides[index] = side
        return side
