"""Rows of chunks as coefficients, with prediction and without: the encoder takes for each chunk what is cheaper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...backends import Backend, IntegerBytes, Rounded
from ...cache import CacheGeometry
from ...calibration.joint_calibration import CoefficientModel, JointCalibration, TokenCoding
from ...coding.device import settle
from ...coding.joint.uniform_quantizer import column_classes
from ...coding.product import Columns, PackedRows
from ...errors import InvalidCache
from ..interface import BodyRows


@dataclass(frozen=True)
class Coefficients:
    """Coefficients [n, r] float32, and their distribution. is_predicted: rotated, and prediction is taken off."""

    values: Tensor
    model: CoefficientModel
    is_predicted: bool

    def rounded(self, step: float, backend: Backend) -> RoundedRows:
        """Their integers at a step."""
        classes = column_classes(self.model.deviations, step)
        return RoundedRows(self, backend.round(self.values, step, classes, self.model.tables), classes)


@dataclass(frozen=True)
class RoundedRows:
    """The integers of coefficients at a step, and the variance classes of those that are coded."""

    coefficients: Coefficients
    rounded: Rounded
    classes: npt.NDArray[np.uint8]

    def bits(self, tokens: slice) -> float:
        """Of the symbols of some tokens, by the tables."""
        return float(self.rounded.bits[tokens].sum(dtype=np.float64))

    def write(self, spans: Sequence[slice], backend: Backend) -> list[IntegerBytes]:
        """The integers of the tokens of some chunks as bytes."""
        return backend.write_integers(self.rounded, spans, self.classes, self.coefficients.model.tables)


def cheapest(choices: Sequence[RoundedRows], tokens: slice) -> int:
    """The index of the choice whose symbols take the fewest bits for these tokens, the first of equals."""
    return min(range(len(choices)), key=lambda index: choices[index].bits(tokens))


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
        self._joint, self._tokens, self._product = joint, tokens, product
        self._rotation = None if tokens is None else Columns(tokens.rotation.to(device))
        mean = metric.unweigh(basis.mean[None].to(device))
        analysis = metric.weigh(vectors.T).T
        self._origin = Columns(analysis).times(mean)[0]
        self._analysis = Columns(analysis, product)
        turned = vectors if self._rotation is None else self._rotation.times(vectors)
        synthesis = metric.unweigh(turned.T)
        size = geometry.n_kv_heads * geometry.head_dim
        self._means = torch.split(mean[0], size)
        self._synthesis = [Columns(side, product, result=product) for side in torch.split(synthesis, size, dim=1)]
        self._predictor = None if tokens is None else tokens.predictor.to(device)
        settle(device)

    def choices(self, rows: BodyRows) -> list[Coefficients]:
        """What may be coded of rows: with prediction, if there is any, and without. Raises `InvalidCache`."""
        plain = self._analysis.times(rows.rows, -self._origin)
        found = [Coefficients(plain, self._joint.coefficients, is_predicted=False)]
        if self._tokens is not None and self._rotation is not None:
            residual = self._rotation.times(plain) - self._predict(rows.triples)
            found.insert(0, Coefficients(residual, self._tokens.coefficients, is_predicted=True))
        if not all(bool(choice.values.isfinite().all()) for choice in found):
            raise InvalidCache("the cache holds values so large that the transform overflows float32")
        return found

    def packed(self, coefficients: Tensor) -> PackedRows:
        """Completed coefficients as `restore` takes them."""
        return PackedRows(coefficients, self._product)

    def completed(self, coefficients: Tensor, is_predicted: bool, triples: Tensor | None) -> Tensor:
        """Decoded coefficients [n, r] float32, with what prediction adds to them."""
        if is_predicted:
            return coefficients + self._predict(triples)
        return coefficients if self._rotation is None else self._rotation.times(coefficients)

    @property
    def rank_follows_coding(self) -> bool:
        """Whether coefficients that are not coded are zero once completed, so that no product needs them."""
        return self._rotation is None

    def restore(self, coefficients: PackedRows, layer: int) -> tuple[Tensor, Tensor]:
        """The first completed coefficients [T, n] -> a layer's part of joint rows: keys before rotation and values, [T, H * D]."""
        keys, values = (
            self._synthesis[side].times(coefficients, self._means[side])
            for side in (layer, len(self._synthesis) // 2 + layer)
        )
        return keys, values

    def _predict(self, triples: Tensor | None) -> Tensor:
        if self._predictor is None or triples is None:
            raise RuntimeError("prediction needs token ids")
        return self._predictor.predict(triples)
