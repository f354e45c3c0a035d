"""Measuring what steps do to a model's predictions, so that a codec can take a quality (`kvtc.Codec(..., kl=0.001)`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from typing import Any

from torch import Tensor

from ..calibration.artifact import Calibration
from ..calibration.joint_calibration import CoefficientModel
from ..calibration.quality_curve import QualityCurve
from ..codec import Codec
from ..errors import InvalidArgument
from ..process.progress import track
from ..profiles.rates import Step
from .continuation import mean_divergence, predict, prefill
from .models import as_ids

N_CONTINUATION = 128
"""Predictions compared on each sequence, the last ones."""
LEAST_TOKENS = 3 * N_CONTINUATION
"""A shorter sequence has too little cache before its continuation."""
RATIOS = (4, 8, 16, 32, 64, 128, 256, 512)
"""Where the curve is measured: at the steps that are expected to give these ratios."""
_HELD_OUT_EVERY, _MOST_HELD_OUT = 16, 8
_STUDENT_95 = (6.31, 2.92, 2.35, 2.13, 2.02, 1.94, 1.89, 1.86, 1.83, 1.81, 1.80, 1.78, 1.77, 1.76, 1.75)
"""One-sided quantiles of Student's t for 2 texts and more; the last one stands for all above."""


@dataclass(frozen=True)
class _Case:
    """A sequence cut before its continuation: ids and exact cache before the cut, ids behind it, and their predictions."""

    cached: Tensor
    exact: Any
    fed: Tensor
    expected: Tensor


def measure_quality(
    model: Any, calibration: Calibration, token_sequences: Iterable[Tensor | Sequence[int]]
) -> Calibration:
    """Measure the KL of predictions at several steps, for each of the profiles `joint` and `conditional`.

    Time: for each sequence one prefill, and for each of 8 steps and each profile one encoding, one decoding and one
    pass over 128 tokens. Memory: the exact caches of all sequences.

    Parameters:
        model: a transformers causal LM.
        calibration: of the whole model, for `joint` at least.
        token_sequences: [T] integers each; text that the calibration was not fitted to and that it will not be
            judged by. Of each sequence of at least 384 tokens the last 128 are predicted, from a cache of which
            only the sinks are exact; shorter ones are left out. Eight sequences or more are advised.

    Returns:
        The calibration with the curves. Everything else, its fingerprint too, is as before.

    Raises:
        InvalidArgument: the calibration is of `paper` alone or of a part of the model, or no sequence is long
            enough.
    """
    if calibration.joint is None:
        raise InvalidArgument("this calibration serves the profile paper alone, which has no step")
    ids = [as_ids(sequence) for sequence in token_sequences]
    ids = [sequence for sequence in ids if len(sequence) >= LEAST_TOKENS]
    if not ids:
        raise InvalidArgument(
            f"expected a sequence of at least {LEAST_TOKENS} tokens to measure quality on, found none"
        )
    was_training = model.training
    model.eval()
    try:
        cases = [_case(model, sequence.to(model.device)) for sequence in track(ids, "exact predictions", "sequences")]
        of_profiles = {"joint": calibration.joint.coefficients}
        if calibration.conditional is not None:
            of_profiles["conditional"] = calibration.conditional.left.coefficients
        curves = {name: _curve(model, calibration, name, known, cases) for name, known in of_profiles.items()}
    finally:
        model.train(was_training)
    info = calibration.info | {"n_quality_sequences": len(ids)}
    return replace(calibration, quality=curves, info=info)


@dataclass
class HeldOut:
    """Sequences that a calibration is not fitted to, so that its quality can be measured on them."""

    sequences: list[Tensor] = field(default_factory=list)
    n_long: int = 0

    def takes(self, token_ids: Tensor) -> bool:
        """Whether a sequence is kept here: every 16th of at least 384 tokens is, up to 8."""
        if len(token_ids) < LEAST_TOKENS:
            return False
        self.n_long += 1
        if self.n_long % _HELD_OUT_EVERY or len(self.sequences) == _MOST_HELD_OUT:
            return False
        self.sequences.append(token_ids)
        return True


def _case(model: Any, ids: Tensor) -> _Case:
    n_cached = len(ids) - N_CONTINUATION - 1
    exact = prefill(model, ids[:n_cached])
    fed = ids[n_cached:-1]
    return _Case(ids[:n_cached], exact, fed, predict(model, exact, fed))


def _curve(
    model: Any, calibration: Calibration, profile: str, known: CoefficientModel, cases: list[_Case]
) -> QualityCurve:
    original_bits = 16 * calibration.geometry.joint_features
    steps = sorted({known.step_for(original_bits / ratio) for ratio in RATIOS})
    codec = Codec(
        calibration, profile, step=steps[0], window_tokens=0, model=model if profile == "conditional" else None
    )
    shown = track(steps, f"quality of {profile}", "steps")
    found = [_upper_mean([_divergence(model, codec.with_rate(Step(step)), case) for case in cases]) for step in shown]
    return QualityCurve.from_measurements(steps, found)


def _upper_mean(divergences: list[float]) -> float:
    """What the mean over many texts does not exceed, with a confidence of 95 %: few are measured, and some differ much."""
    n = len(divergences)
    if n == 1:
        return divergences[0]
    quantile = _STUDENT_95[min(n, len(_STUDENT_95) + 1) - 2]
    return float(fmean(divergences) + quantile * stdev(divergences) / n**0.5)


def _divergence(model: Any, codec: Codec, case: _Case) -> float:
    restored = codec.decode(codec.encode(case.exact, case.cached), case.cached)
    return mean_divergence(case.expected, predict(model, restored, case.fed))
