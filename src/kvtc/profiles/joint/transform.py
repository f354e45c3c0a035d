"""The transform of the profiles `joint` and `conditional`: rows of keys and values together, in the metric, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import Backend
from ...cache import CacheGeometry
from ...calibration.joint_calibration import JointCalibration, TokenCoding
from ...coding.device import settle
from ...coding.product import Columns, PackedRows


class JointTransform:
    """The matrices of a calibration on a backend's device. product: the dtype that both sides of a product are rounded to.

    Analysis gives plain coefficients. Synthesis takes them as they are without tokens; with tokens it takes them rotated, which is
    what prediction adds to. The two differ by the metric.
    """

    def __init__(
        self,
        joint: JointCalibration,
        tokens: TokenCoding | None,
        geometry: CacheGeometry,
        backend: Backend,
        product: torch.dtype,
    ) -> None:
        device = backend.device
        basis, metric = joint.basis, joint.metric.to(device)
        vectors = basis.vectors.to(device).float()
        self._product = product
        self._rotation = None if tokens is None else Columns(tokens.rotation.to(device))
        mean = metric.unweigh(basis.mean[None].to(device))
        analysis = metric.weigh(vectors.T).T
        self._origin = Columns(analysis).times(mean)[0]
        self._analysis = Columns(analysis, product)
        turned = vectors if self._rotation is None else self._rotation.times(vectors)
        synthesis = metric.unweigh(turned.T)
        self._means = [columns[0] for columns in by_layer(mean, geometry.n_layers)]
        self._synthesis = [
            Columns(columns, product, result=product) for columns in by_layer(synthesis, geometry.n_layers)
        ]
        self._predictor = None if tokens is None else tokens.predictor.to(device)
        settle(device)

    def project(self, rows: Tensor) -> Tensor:
        """Joint rows [n, 2 p] -> plain coefficients [n, r] float32."""
        return self._analysis.times(rows, -self._origin)

    def rotated(self, plain: Tensor) -> Tensor:
        """Plain coefficients [n, r] as prediction is taken off them, or added to them; the same without tokens."""
        return plain if self._rotation is None else self._rotation.times(plain)

    def predict(self, triples: Tensor | None) -> Tensor:
        """What prediction sees of tokens, [n, 3] int64 -> their rotated coefficients [n, r] float32."""
        if self._predictor is None or triples is None:
            raise RuntimeError("prediction needs token ids")
        return self._predictor.predict(triples)

    def packed(self, coefficients: Tensor) -> PackedRows:
        """Completed coefficients as `restore` takes them."""
        return PackedRows(coefficients, self._product)

    @property
    def rank_follows_coding(self) -> bool:
        """Whether coefficients that are not coded stay zero, so that no product needs them."""
        return self._rotation is None

    def restore(self, coefficients: PackedRows, layer: int) -> tuple[Tensor, Tensor]:
        """The first completed coefficients [T, n] -> a layer's part of joint rows: keys before rotation and values, [T, H * D]."""
        keys, values = self._synthesis[layer].times(coefficients, self._means[layer]).tensor_split(2, dim=1)
        return keys, values


def by_layer(joint: Tensor, n_layers: int) -> list[Tensor]:
    """Joint rows [n, 2 p] -> those of each layer, [n, 2 H D]: its keys, then its values."""
    sides = joint.tensor_split(2 * n_layers, dim=1)
    return [torch.cat([sides[layer], sides[n_layers + layer]], dim=1) for layer in range(n_layers)]
