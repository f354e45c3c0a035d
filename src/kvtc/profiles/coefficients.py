"""Rows of a chunk as coefficients, with prediction and without: the encoder takes what is cheaper."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..calibration.joint import CoefficientModel, JointCalibration, TokenCoding
from ..coding.rounding import Rounded, round_coefficients
from ..coding.transform import project, reconstruct, rows_of
from ..coding.uniform import column_classes
from ..errors import InvalidCache
from .interface import BodyRows


@dataclass(frozen=True)
class Coefficients:
    """Coefficients [n, r] float32 of a chunk, and their distribution. is_predicted: rotated, and prediction is taken off."""

    values: Tensor
    model: CoefficientModel
    is_predicted: bool

    def rounded(self, step: float) -> tuple[Rounded, npt.NDArray[np.uint8]]:
        """Their integers, and the variance classes of the ones that are coded."""
        classes = column_classes(self.model.deviations, step)
        return round_coefficients(self.values, step, classes, self.model.tables), classes


@dataclass(frozen=True)
class RoundedChunk:
    """What of a chunk is written: the integers of some coefficients at a step, and the variance classes of those coded."""

    coefficients: Coefficients
    rounded: Rounded
    classes: npt.NDArray[np.uint8]

    @property
    def bits(self) -> float:
        """Of all symbols, by the tables."""
        return float(self.rounded.bits.sum(dtype=np.float64))


def cheapest(choices: list[Coefficients], step: float) -> RoundedChunk:
    """The choice whose symbols take the fewest bits at this step, the first of equals."""
    return min((RoundedChunk(choice, *choice.rounded(step)) for choice in choices), key=lambda chunk: chunk.bits)


class JointTransform:
    """The matrices of a calibration, float32 on a device: mean [2 p], analysis and synthesis [2 p, r] (they differ by the metric).

    Analysis gives plain coefficients. Synthesis takes them as they are without tokens; with tokens it takes them rotated [r, r],
    which is what prediction adds to.
    """

    def __init__(self, joint: JointCalibration, tokens: TokenCoding | None, device: torch.device) -> None:
        basis, metric = joint.basis, joint.metric
        vectors = basis.vectors.float()
        rotation = None if tokens is None else tokens.rotation.float()
        turned = vectors if rotation is None else vectors @ rotation
        self._device = device
        self._joint, self._tokens = joint, tokens
        self._mean = metric.unweigh(basis.mean[None])[0].to(device)
        self._analysis = metric.weigh(vectors.T).T.contiguous().to(device)
        self._synthesis = metric.unweigh(turned.T).T.contiguous().to(device)
        self._rotation = None if rotation is None else rotation.to(device)

    def choices(self, rows: BodyRows) -> list[Coefficients]:
        """What may be coded of rows: with prediction, if there is any, and without. Raises `InvalidCache`."""
        joined = torch.cat([rows_of(rows.keys), rows_of(rows.values)], dim=1)
        plain = project(joined, self._mean, self._analysis)
        found = [Coefficients(plain, self._joint.coefficients, is_predicted=False)]
        if self._tokens is not None and self._rotation is not None:
            residual = plain @ self._rotation - self._predict(rows.triples)
            found.insert(0, Coefficients(residual, self._tokens.coefficients, is_predicted=True))
        if not all(bool(choice.values.isfinite().all()) for choice in found):
            raise InvalidCache("the cache holds values so large that the transform overflows float32")
        return found

    def completed(self, coefficients: Tensor, is_predicted: bool, triples: Tensor | None) -> Tensor:
        """Decoded coefficients [n, r] as `restore` takes them."""
        if is_predicted:
            return coefficients + self._predict(triples)
        return coefficients if self._rotation is None else coefficients @ self._rotation

    def restore(self, coefficients: Tensor, features: slice) -> Tensor:
        """Completed coefficients [T, r] -> some of the features of joint rows, [T, q]."""
        return reconstruct(coefficients, self._mean[features], self._synthesis[features])

    def _predict(self, triples: Tensor | None) -> Tensor:
        if self._tokens is None or triples is None:
            raise RuntimeError("prediction needs token ids")
        return self._tokens.predictor.predict(triples).to(self._device)
