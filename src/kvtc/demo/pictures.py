"""The pictures of the demo: what the codec spends its bits on, and what quality costs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial

from torch import Tensor

from ..calibration import Calibration
from ..profiles.paper.rate import allocations_for
from ..profiles.rates import Rate
from ..report.parts import Chart, Point

BITS_OF_ORIGINAL = 16
NOISE = 1e-6
"""Past the numerical rank the fit finds noise around zero: variances below this share of the
largest are not shown.
"""


def spectrum(calibration: Calibration, rate: Rate) -> list[Chart]:
    """Two charts: the variance of every coefficient, and the bits that the profile `paper` gives
    it.

    Parameters:
        calibration: of the model whose caches are coded.
        rate: of a codec of the profile `paper` on this calibration.
    """
    kinds = {"keys": calibration.key, "values": calibration.value}
    allocations = dict(zip(kinds, allocations_for(rate, calibration, BITS_OF_ORIGINAL), strict=True))
    bits = {name: allocations[name].bits_per_coefficient(kind.basis.rank) for name, kind in kinds.items()}
    n_stored = [f"{int((bits[name] > 0).sum())} coefficients of {name}" for name in kinds]
    variances = {name: _variances(kind.basis.spectrum) for name, kind in kinds.items()}
    steps = {name: _steps(bits[name].tolist()) for name in kinds}
    by_coefficient = partial(Chart, x_title="coefficient, by falling variance", x_log=False, x_times=False)
    return [
        by_coefficient("Variance of every coefficient", variances, y_title="variance, squared cache units"),
        by_coefficient(f"Bits, which go to {' and '.join(n_stored)}", steps, y_title="bits a coefficient", y_log=False),
    ]


def _variances(found: Tensor) -> list[Point]:
    largest = float(found[0])
    return [
        (float(n), value, f"coefficient {n}: {value:.3g}")
        for n, value in enumerate(found.tolist(), start=1)
        if value > NOISE * largest
    ]


def _steps(bits: Sequence[float]) -> list[Point]:
    """The corners of a line that is level wherever coefficients have the same bits."""
    found: list[Point] = []
    start = 1
    for value, same in itertools.groupby(bits):
        n = len(list(same))
        label = f"coefficients {start} to {start + n - 1}: {value:g} bits"
        found += [(start - 0.5, value, label), (start + n - 0.5, value, label)]
        start += n
    return found
