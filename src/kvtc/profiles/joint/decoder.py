"""Decoding of the profiles with one step (docs/format.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ...backends import CodedIntegers
from ...coding.joint.uniform_quantizer import column_classes
from ...coding.product import PackedRows
from ...errors import CorruptStream
from ..interface import CodedBody
from .chunk_bytes import heads_of, least_bytes, split_integers
from .model import JointModel
from .plan import STEP_BYTES, StepPlan
from .transform import JointTransform


@dataclass(frozen=True, eq=False)
class DecodedCoefficients:
    """Coefficients [T, n] float32 of chunks that follow one another, n <= r: those past them are zero.

    flags: of each chunk, whether prediction was taken off (1) or not (0). transform: leads back from them.
    """

    values: Tensor
    flags: list[int]
    transform: JointTransform

    @cached_property
    def packed(self) -> PackedRows:
        """Ready to be multiplied, once for all layers."""
        return self.transform.packed(self.values)


class JointDecoder:
    """See `Decoder`."""

    most_plan_bytes = 2 * STEP_BYTES

    def __init__(self, model: JointModel) -> None:
        self.needs_tokens = model.predicted is not None
        self._model = model

    def read_plan(self, data: bytes) -> StepPlan:
        return self._model.steps.read_plan(data)

    def body_bytes(self, plan: StepPlan, n_tokens: int) -> None:  # noqa: ARG002  they depend on the tokens' values
        return None

    def fewest_bytes(self, n_tokens: int) -> int:
        return least_bytes(n_tokens) + self.needs_tokens

    def entropy_decode(self, bodies: Sequence[CodedBody[StepPlan]]) -> DecodedCoefficients:
        flags, chunks = [], []
        least = [self.fewest_bytes(body.n_tokens) for body in bodies]
        for body, head in zip(bodies, heads_of([body.data for body in bodies], least), strict=True):
            flag, integers = self._split(body, head)
            flags.append(flag)
            chunks.append(integers)
        transform = self._model.transform()
        if not transform.rank_follows_coding:
            return DecodedCoefficients(self._model.backend.read_integers(chunks, self._model.rank), flags, transform)
        widest = max((len(chunk.classes) for chunk in chunks), default=0)
        values = _without_zeros(self._model.backend.read_integers(chunks, widest))
        return DecodedCoefficients(values, flags, transform)

    def add_prediction(
        self, coefficients: DecodedCoefficients, bodies: Sequence[CodedBody[StepPlan]]
    ) -> DecodedCoefficients:
        if not self.needs_tokens or not bodies:
            return coefficients
        transform, values, flags = coefficients.transform, coefficients.values, coefficients.flags
        of_row = torch.tensor([flag for flag, body in zip(flags, bodies, strict=True) for _ in range(body.n_tokens)])
        for flag in set(flags):
            here = slice(None) if len(set(flags)) == 1 else (of_row == flag).nonzero()[:, 0].to(values.device)
            if flag:
                triples = [body.triples for body, its in zip(bodies, flags, strict=True) if its]
                predicted = transform.predict(torch.cat([some for some in triples if some is not None]))
                values[here] += predicted
            else:
                values[here] = transform.rotated(values[here])
        return coefficients

    def reconstruct(self, coefficients: DecodedCoefficients, layer: int) -> tuple[Tensor, Tensor]:
        return coefficients.transform.restore(coefficients.packed, layer)

    def _split(self, body: CodedBody[StepPlan], head: bytes) -> tuple[int, CodedIntegers]:
        """Whether a chunk is predicted, and the parts of its bytes; head: its least bytes."""
        flag, data = (head[0], body.data[1:]) if self.needs_tokens else (0, body.data)
        if flag > 1:
            raise CorruptStream(f"a chunk is predicted (1) or not (0); it says {flag}")
        model = self._model.expected if flag else self._model.plain
        step = body.plan.step_of(body.is_window)
        classes, head = column_classes(model.deviations, step), head[int(self.needs_tokens) :]
        return flag, split_integers(data, head, body.n_tokens, classes, model.tables, step)


def _without_zeros(coefficients: Tensor) -> Tensor:
    """Up to the last column that holds anything: at high ratios many that may be coded are zero throughout."""
    # NumPy where it can: threads that torch has started go on spinning, on cores that the products need.
    is_used = coefficients.numpy().any(axis=0) if coefficients.is_cpu else coefficients.any(dim=0).cpu().numpy()
    used = np.flatnonzero(is_used)
    return coefficients[:, : int(used[-1]) + 1 if len(used) else 0]
