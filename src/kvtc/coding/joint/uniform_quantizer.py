"""The uniform quantizer: one step for all coefficients of a stream, and which coefficients are coded with which table.

With one step for coefficients of falling deviation, bits flow by themselves to where they lower the squared error most (reverse
water-filling): a coefficient far below the step is never coded, one just below it codes to zeros at hardly any cost. The ratio of
its deviation to the step decides a coefficient's variance class, and the class its probability table.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

N_CLASSES = 27
# Literals, because powers from a mathematics library may differ in the last digit: 2 ** (k / 2 - 3.5), rounded to nearest.
_ROOT_OF_HALF = 0.7071067811865476
BOUNDS: npt.NDArray[np.float64] = np.array(
    [_ROOT_OF_HALF * 2.0 ** (k // 2 - 3) if k % 2 == 0 else 2.0 ** (k // 2 - 3) for k in range(N_CLASSES)]
)
"""Deviation over step from which each class begins, half an octave apart; below the first a coefficient is not coded."""
MAX_SYMBOL = 31
"""Largest magnitude with a symbol of its own."""
N_SYMBOLS = 2 * MAX_SYMBOL + 2
ESCAPE = N_SYMBOLS - 1
ROUNDING = 0.4
"""Added before rounding down: below one half, so that zero is wider than other intervals (a dead zone)."""
N_ACTIVITIES = 4
"""Activity classes of a token."""
ACTIVITY_BITS = 2
"""In which each is stored."""
MAX_MAGNITUDE = 1 << 30


def column_classes(deviations: npt.NDArray[np.float32], step: float) -> npt.NDArray[np.uint8]:
    """Deviations [r], falling -> variance classes [n] of the n <= r coefficients that are coded at this step.

    Each bound is one float64 product, the same to the last bit on every machine: encoder and decoder must agree.
    """
    classes = np.searchsorted(BOUNDS * float(step), deviations.astype(np.float64), side="right") - 1
    # Not quite falling deviations would leave a hole: all up to the last that is coded are.
    n_coded = int(np.flatnonzero(classes >= 0)[-1]) + 1 if bool((classes >= 0).any()) else 0
    return classes[:n_coded].clip(0, N_CLASSES - 1).astype(np.uint8)


def quantize(coefficients: Tensor, step: float) -> Tensor:
    """Coefficients float32 -> int32 of the same shape."""
    magnitudes = (coefficients.abs() / step + ROUNDING).floor().clamp(max=MAX_MAGNITUDE)
    return (magnitudes * coefficients.sign()).to(torch.int32)


def to_symbols(values: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
    """Quantized values -> symbols: value + MAX_SYMBOL, or ESCAPE."""
    return np.where(np.abs(values) <= MAX_SYMBOL, values + MAX_SYMBOL, ESCAPE).astype(np.uint8)


def dequantize(values: Tensor, offsets: Tensor, step: float | Tensor) -> Tensor:
    """Integers [T, n] -> coefficients float32. step: of all, or a float32 tensor [T, n] of each.

    offsets [T, n, 2]: how far from its multiple of the step, in steps and towards zero, the mean of all lies that were rounded to
    +-1, and to more.
    """
    magnitudes = values.abs()
    shift = torch.where(magnitudes == 1, offsets[..., 0], offsets[..., 1])
    return values.sign() * (magnitudes - shift) * step
