"""From rows to a calibration: find the bases, measure the distortion (paper, section 1.2), fit prediction and tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..coding.paper.distortion import MAX_SAMPLE_ROWS, measure_distortion
from ..coding.transform import project
from ..errors import InvalidArgument
from ..process.progress import task, track
from ..process.torch_state import neutral_torch_state
from .artifact import Calibration, KindCalibration
from .conditional_fit import fit_conditional
from .gradients import GradientSample, fit_metric
from .joint_fit import fit_joint, joint_rows
from .principal import block_diagonal, principal_components
from .row_spool import RowSpool
from .rows import CalibrationRows

RANK_CAP, JOINT_RANK_CAP = 10_000, 4096


@dataclass(frozen=True)
class FitOptions:
    """How large the parts of a calibration are.

    Parameters:
        rank: components that the basis of keys, and that of values, have at most; for the profile `paper`.
        joint_rank: the same for the joint basis of `joint` and `conditional`; what it leaves out is coded, too, at more bytes.
        seed: of all random draws.
        layers_per_basis: for ablations alone (the paper's tables 16 and 17): bases of groups of so many layers; None: of all.

    Raises:
        InvalidArgument: for a rank below 1.
    """

    rank: int = RANK_CAP
    joint_rank: int = JOINT_RANK_CAP
    seed: int = 0
    layers_per_basis: int | None = None

    def __post_init__(self) -> None:
        for name in ("rank", "joint_rank"):
            if getattr(self, name) < 1:
                raise InvalidArgument(f"{name} must be at least 1; got {getattr(self, name)}")


@neutral_torch_state
def fit(
    rows: CalibrationRows,
    options: FitOptions | None = None,
    *,
    sample: GradientSample | None = None,
    recomputed: tuple[int, bytes] | None = None,
    info: Mapping[str, Any] | None = None,
) -> Calibration:
    """Fit a calibration to the rows that were accumulated.

    Time: for each basis as many passes over the rows as `principal_components` says, one for tables and one for the
    mean; one for levels, and one for prediction. Memory, on the device of the
    rows: at most 16 P l + 36 l^2 bytes, and about 1 GB for blocks, where l = 64 + the rank
    and P = p features, or 2 p with a sample. On the CPU the same rows give the same tensors and fingerprint every time;
    those of another device differ by rounding.

    Parameters:
        rows: at least two.
        options: sizes; None: the defaults.
        sample: gradients, from which the metric and the importance of tokens follow; None: the calibration serves `paper` alone.
        recomputed: how many layers are recomputed, and the identity of their weights; with these and a sample the
            calibration serves `conditional`, too. The rows must have the hidden states that enter the next layer.
        info: what else the calibration's `info` shall say.

    Raises:
        InvalidArgument: for fewer than two rows, rows that do not vary, or layers to recompute for rows without hidden states.
    """
    options = FitOptions() if options is None else options
    if options.layers_per_basis is not None and not 1 <= options.layers_per_basis <= rows.geometry.n_layers:
        raise InvalidArgument(
            f"layers_per_basis must lie in 1 .. {rows.geometry.n_layers}; got {options.layers_per_basis}"
        )
    if recomputed is not None and rows.hidden is None:
        raise InvalidArgument("what recomputed layers predict is fitted to rows with hidden states; these have none")
    if rows.n_rows < 2:
        raise InvalidArgument(
            f"calibration needs at least 2 tokens past the {rows.sink_tokens} sinks; got {rows.n_rows}"
        )
    key, value = (_fit_kind(name, spool, rows, options) for name, spool in (("key", rows.keys), ("value", rows.values)))
    joint = conditional = importance = None
    if sample is not None:
        with task("metric"):
            metric, importance = fit_metric(sample, options.seed)
        every = partial(joint_rows, rows.keys, rows.values)
        levels = None
        if importance is not None:
            of_device = importance.to(rows.keys.device)
            levels = torch.cat([of_device.levels(block).cpu() for block in every()])
        sizes = levels, options.joint_rank, options.seed
        joint = fit_joint(every, rows.n_rows, rows.keys.device, metric, *sizes, "joint")
        if recomputed is not None:
            hidden_layer, identity = recomputed
            conditional = fit_conditional(rows, hidden_layer, identity, metric, *sizes)
    made_from = {
        "n_sequences": rows.n_sequences,
        "n_tokens_seen": rows.keys.n_offered,
        "n_rows": rows.n_rows,
        "sink_tokens": rows.sink_tokens,
        "layers_per_basis": options.layers_per_basis,
        "seed": options.seed,
    }
    info = made_from | dict(info or {})
    return Calibration(rows.geometry, key, value, info, joint, conditional=conditional, importance=importance)


def _fit_kind(name: str, spool: RowSpool, rows: CalibrationRows, options: FitOptions) -> KindCalibration:
    """The basis of keys, or of values, and its distortion."""
    n_layers = rows.geometry.n_layers
    group, layer_features = options.layers_per_basis or n_layers, rows.geometry.row_features // n_layers
    ranges = [
        slice(start * layer_features, min(start + group, n_layers) * layer_features)
        for start in range(0, n_layers, group)
    ]
    shown = ranges if len(ranges) == 1 else track(ranges, f"{name} bases", "groups of layers")
    parts = [principal_components(spool, options.rank, columns, options.seed, f"{name} basis") for columns in shown]
    components = parts[0] if len(parts) == 1 else block_diagonal(parts, options.rank)
    mean, vectors = components.basis.matrices(spool.device)
    blocks = track(spool.sample(MAX_SAMPLE_ROWS, options.seed), f"{name} distortion", "blocks")
    table = measure_distortion(project(block, mean, vectors).cpu().numpy() for block in blocks)
    return KindCalibration(components.basis, table, components.total_variance)
