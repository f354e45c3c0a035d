"""Probability tables and the rate curve from calibration coefficients, for every step at once.

A table belongs to a ratio of deviation to step, not to a coefficient, so one set serves all steps: symbols are counted at many of
them. Activity classes are found by turns, as in vector quantization: count the symbols of each class, then give every token the
class in which it costs least.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..coding.joint.probability import ProbabilityTables, tables_from_counts
from ..coding.joint.rounding import round_coefficients
from ..coding.joint.uniform_quantizer import (
    ACTIVITY_BITS,
    ESCAPE,
    MAX_SYMBOL,
    N_ACTIVITIES,
    N_CLASSES,
    N_SYMBOLS,
    column_classes,
    quantize,
    to_symbols,
)
from ..errors import InvalidArgument
from ..process.progress import track
from .joint_calibration import CoefficientModel

N_STEPS = 28
STEPS_PER_OCTAVE = 2
TURNS = 5
ROUNDING_TURNS = 2
"""Turns with integers as an encoder chooses them, by cost: which depends on the tables."""
SMOOTHING = 0.02


@dataclass
class _Quantized:
    """Calibration coefficients at one step."""

    step: float
    symbols: npt.NDArray[np.uint8]
    classes: npt.NDArray[np.uint8]
    activities: npt.NDArray[np.uint8]


def fit_coefficients(coefficients: Tensor) -> CoefficientModel:
    """Coefficients [n, r] float32 of calibration rows, by falling variance -> their model.

    Raises `InvalidArgument` where they are all zero: there is no step to speak of.
    """
    measured = coefficients.square().mean(dim=0).sqrt()
    # Sampling noise must not break the order that classes rely on.
    deviations: npt.NDArray[np.float32] = measured.flip(0).cummax(0).values.flip(0).numpy()
    if not deviations[0] > 0:
        raise InvalidArgument("calibration rows do not vary, or prediction leaves nothing of them: give other texts")
    steps = float(deviations[0]) * np.exp2(1 - np.arange(N_STEPS) / STEPS_PER_OCTAVE)
    at_steps = [found for step in steps if (found := _quantize_at(coefficients, deviations, float(step))) is not None]
    frequencies = tables_from_counts(_counts(at_steps))
    tables = ProbabilityTables(frequencies, np.zeros((*frequencies.shape[:2], 2), np.float32))
    for _ in range(TURNS):
        for found in at_steps:
            found.activities = tables.token_costs(found.symbols, found.classes).argmin(axis=0).astype(np.uint8)
        frequencies = tables_from_counts(_counts(at_steps))
        tables = ProbabilityTables(frequencies, tables.offsets)
    for _ in track(range(ROUNDING_TURNS), "counting symbols", "turns"):
        tables = ProbabilityTables(frequencies, _offsets(coefficients, at_steps))
        for found in at_steps:
            rounded = round_coefficients(coefficients, found.step, found.classes, tables)
            found.symbols, found.activities = to_symbols(rounded.values), rounded.activities
        frequencies = tables_from_counts(_counts(at_steps))
    tables = ProbabilityTables(frequencies, _offsets(coefficients, at_steps))
    of_tokens = (round_coefficients(coefficients, found.step, found.classes, tables).bits for found in at_steps)
    bits = [float(some.mean()) + ACTIVITY_BITS for some in of_tokens]
    # Bits rise as the step falls; where nothing is coded yet they stand still.
    return CoefficientModel(deviations, tables, np.array([f.step for f in at_steps]), np.maximum.accumulate(bits))


def _quantize_at(coefficients: Tensor, deviations: npt.NDArray[np.float32], step: float) -> _Quantized | None:
    classes = column_classes(deviations, step)
    if not len(classes):
        return None
    used = coefficients[:, : len(classes)]
    symbols = np.ascontiguousarray(to_symbols(quantize(used, step).numpy()).T)
    # To begin with, tokens are sorted by how large their coefficients are against what is usual.
    energy = (used.abs() / torch.from_numpy(deviations[: len(classes)])).clamp(max=6).mean(dim=1).numpy()
    bounds = np.quantile(energy, np.arange(1, N_ACTIVITIES) / N_ACTIVITIES)
    activities = np.searchsorted(bounds, energy).astype(np.uint8)
    return _Quantized(step, symbols, classes, activities)


def _counts(at_steps: list[_Quantized]) -> npt.NDArray[np.float64]:
    """Symbols counted by activity and variance class; neighbours lend a little where a class was hardly seen."""
    counts = np.zeros((N_ACTIVITIES, N_CLASSES, N_SYMBOLS))
    for found in at_steps:
        for column_class in np.unique(found.classes):
            columns = found.symbols[found.classes == column_class].astype(np.int64)
            keys = columns + N_SYMBOLS * found.activities.astype(np.int64)[None, :]
            counts[:, column_class] += np.bincount(keys.ravel(), minlength=N_ACTIVITIES * N_SYMBOLS).reshape(
                N_ACTIVITIES, -1
            )
    pooled = counts.sum(axis=0, keepdims=True)
    smoothed: npt.NDArray[np.float64] = counts + SMOOTHING * pooled / np.maximum(1, pooled.sum(axis=-1, keepdims=True))
    return smoothed


def _offsets(coefficients: Tensor, at_steps: list[_Quantized]) -> npt.NDArray[np.float32]:
    """Mean distance towards zero, in steps, of what was rounded to +-1 and to more, [A, C, 2]."""
    n_cells = N_ACTIVITIES * N_CLASSES * 2
    sums, counts = np.zeros(n_cells), np.full(n_cells, 1e-9)
    for found in at_steps:
        columns, tokens = np.nonzero((found.symbols != ESCAPE) & (found.symbols != MAX_SYMBOL))
        values = np.abs(found.symbols[columns, tokens].astype(np.int32) - MAX_SYMBOL)
        magnitudes = np.abs(coefficients.numpy()[tokens, columns]) / np.float32(found.step)
        cells = (found.activities[tokens].astype(np.int64) * N_CLASSES + found.classes[columns]) * 2 + (values > 1)
        sums += np.bincount(cells, values - magnitudes, n_cells)
        counts += np.bincount(cells, minlength=n_cells)
    offsets: npt.NDArray[np.float32] = (sums / counts).clip(-0.5, 0.5).astype(np.float32)
    return offsets.reshape((N_ACTIVITIES, N_CLASSES, 2))
