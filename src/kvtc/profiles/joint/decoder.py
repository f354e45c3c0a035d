"""Decoding of the profiles with one step (docs/format.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...backends import CodedIntegers
from ...coding.joint.importance import divide
from ...coding.joint.uniform_quantizer import column_classes
from ...coding.product import used_columns
from ..interface import CodedBody
from .chunk_bytes import heads_of, level_bytes, split_integers, split_levels
from .model import JointModel
from .plan import STEP_BYTES, StepPlan
from .prediction import PredictedRows
from .transform import JointTransform, RestorableCoefficients


@dataclass(frozen=True, eq=False)
class DecodedCoefficients:
    """Coefficients of chunks that follow one another.

    transform: leads back from them. predicted: what is added then; None for `joint`.
    """

    restorable: RestorableCoefficients
    transform: JointTransform
    predicted: PredictedRows | None = None


class JointDecoder:
    """See `Decoder`."""

    most_plan_bytes = 2 * STEP_BYTES

    def __init__(self, model: JointModel) -> None:
        self.recomputation = model.recomputation
        self._model = model

    def read_plan(self, data: bytes) -> StepPlan:
        return self._model.steps.read_plan(data)

    def body_bytes(self, plan: StepPlan, n_tokens: int) -> None:  # noqa: ARG002  they depend on the tokens' values
        return None

    def fewest_bytes(self, n_tokens: int) -> int:
        return self._model.least_bytes(n_tokens)

    def entropy_decode(self, bodies: Sequence[CodedBody[StepPlan]]) -> DecodedCoefficients:
        least = [self.fewest_bytes(body.n_tokens) for body in bodies]
        heads = heads_of([body.data for body in bodies], least)
        chunks = [self._split(body, head) for body, head in zip(bodies, heads, strict=True)]
        widest = max((len(chunk.classes) for chunk in chunks), default=0)
        values = self._model.backend.read_integers(chunks, widest)
        # At high ratios many of the last that may be coded are zero throughout.
        used = used_columns(values)
        n = int(used.nonzero()[-1]) + 1 if used.any() else 0
        values = values[:, :n]
        if self._model.importance is not None and bodies:
            levels = [split_levels(head, body.n_tokens) for body, head in zip(bodies, heads, strict=True)]
            divide(values, torch.cat(levels))
        transform = self._model.transform()
        return DecodedCoefficients(transform.restorable(values, used[:n]), transform)

    def add_prediction(
        self, coefficients: DecodedCoefficients, bodies: Sequence[CodedBody[StepPlan]]
    ) -> DecodedCoefficients:
        parts = [body.recomputed for body in bodies if body.recomputed is not None]
        if self._model.prediction is None or not parts:
            return coefficients
        return replace(coefficients, predicted=PredictedRows(self._model.prediction, parts))

    def reconstruct(self, coefficients: DecodedCoefficients, layer: int) -> tuple[Tensor, Tensor]:
        predicted, coded = coefficients.predicted, layer - self._model.n_own
        if predicted is not None and coded < 0:
            return predicted.own(layer)
        left = coefficients.transform.restore(coefficients.restorable, max(0, coded))
        if predicted is None:  # there is no prediction, or no token
            return left
        said = predicted.layer(coded)
        return left[0] + said[0], left[1] + said[1]

    def _split(self, body: CodedBody[StepPlan], head: bytes) -> CodedIntegers:
        """The parts of a chunk's bytes; head: its least bytes."""
        model, step = self._model.coefficients, body.plan.step_of(body.is_window)
        classes = column_classes(model.deviations, step)
        n_head = 0 if self._model.importance is None else level_bytes(body.n_tokens)
        return split_integers(body.data[n_head:], head[n_head:], body.n_tokens, classes, model.tables, step)
