"""From rows to a calibration: find the bases, measure the distortion (paper, section 1.2), fit prediction and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..coding.joint.metric import Metric
from ..coding.paper.distortion import BLOCK_SIZES, measure_distortion
from ..coding.transform import Basis, project
from ..errors import InvalidArgument
from ..process.progress import task
from ..process.torch_state import neutral_torch_state
from .artifact import SIDE_NAMES, Calibration, CodedGroup, SideCalibration
from .checkpoint import Checkpoint
from .conditional_calibration import ConditionalCalibration
from .conditional_fit import fit_conditional
from .gradients import GradientSample, fit_metric
from .joint_calibration import JointCalibration
from .joint_fit import fit_joint, table_rows
from .rows import SAMPLE_ROWS, CalibrationRows

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
    paper: bool = True,
    sample: GradientSample | None = None,
    recomputed: tuple[int, bytes] | None = None,
    info: Mapping[str, Any] | None = None,
    checkpoint: Checkpoint | None = None,
    further: Sequence[tuple[CalibrationRows, GradientSample]] = (),
) -> Calibration:
    """Fit a calibration to the rows that were gathered.

    Time: for each basis one decomposition, about 9 P^3 operations up to `moments.EXACT_FEATURES` features and 4 P l^2
    above; a count of symbols for tables. Memory, on the device of the rows: 20 P^2 bytes, or 20 P l + 16 l^2, beside
    what the rows hold. On the CPU the same rows give the same tensors and fingerprint every time; those of another
    device differ by rounding.

    Parameters:
        rows: at least two.
        options: sizes; None: the defaults.
        paper: whether the calibration shall serve the profile `paper`.
        sample: gradients, from which the metric and the importance of tokens follow; None: it does not serve `joint`.
        recomputed: how many layers are recomputed, and the identity of their weights; with these and a sample the
            calibration serves `conditional`, too. The rows must have the hidden states that enter the next layer.
        info: what else the calibration's `info` shall say.
        checkpoint: keeps each part when it is done, and gives those that were; None: nothing is kept.
        further: rows and gradients of the groups that `joint` codes beside the first; with a sample alone.

    Raises:
        InvalidArgument: for fewer than two rows of a group, rows that do not vary, or layers to recompute for rows without
            hidden states.
    """
    options = FitOptions() if options is None else options
    checkpoint = Checkpoint(None, "") if checkpoint is None else checkpoint
    if options.layers_per_basis is not None and not 1 <= options.layers_per_basis <= rows.geometry.n_layers:
        raise InvalidArgument(
            f"layers_per_basis must lie in 1 .. {rows.geometry.n_layers}; got {options.layers_per_basis}"
        )
    if recomputed is not None and not rows.hidden_width:
        raise InvalidArgument("what recomputed layers predict is fitted to rows with hidden states; these have none")
    for its in (rows, *(one for one, _ in further)):
        if its.n_rows < 2:
            raise InvalidArgument(
                f"calibration needs at least 2 tokens past the {its.sink_tokens} sinks; got {its.n_rows}"
            )
    key = value = joint = conditional = importance = None
    groups: list[CodedGroup] = []
    if paper:
        key, value = _fit_paper(rows, options, checkpoint)
    if sample is not None:
        with task("metric"):
            metric, importance = fit_metric(sample, options.seed)
        drawn = rows.sample(table_rows(rows.geometry.joint_features), options.seed)
        levels = None if importance is None else importance.levels(drawn[0])
        rank = options.joint_rank
        joint = _fit_joint(0, rows, drawn[0], metric, levels, options, checkpoint)
        for number, (its, of_its) in enumerate(further, 1):
            groups.append(_fit_further(number, its, of_its, metric.unit, options, checkpoint))
        if recomputed is not None:

            def fitted_conditional() -> dict[str, Tensor]:
                with task("conditional basis and tables"):
                    return dict(fit_conditional(rows, drawn, *recomputed, metric, levels, rank).tensors())

            found = checkpoint.once("conditional", fitted_conditional)
            conditional = ConditionalCalibration.from_tensors(found, rows.geometry)
    made_from = {
        "n_sequences": rows.n_sequences,
        "n_rows": rows.n_rows,
        "sink_tokens": rows.sink_tokens,
        "layers_per_basis": options.layers_per_basis,
        "seed": options.seed,
    }
    return Calibration(
        rows.geometry,
        key,
        value,
        made_from | dict(info or {}),
        joint,
        conditional=conditional,
        importance=importance,
        further=tuple(groups),
    )


def _fit_further(
    number: int,
    rows: CalibrationRows,
    sample: GradientSample,
    unit: float,
    options: FitOptions,
    checkpoint: Checkpoint,
) -> CodedGroup:
    """A group behind the first. unit: of the metric of the first."""
    with task(f"metric of group {number}"):
        metric, importance = fit_metric(sample, options.seed, unit)
    drawn = rows.sample(table_rows(rows.geometry.joint_features), options.seed)[0]
    levels = None if importance is None else importance.levels(drawn)
    joint = _fit_joint(number, rows, drawn, metric, levels, options, checkpoint)
    return CodedGroup(rows.geometry, joint, importance)


def _fit_joint(
    number: int,
    rows: CalibrationRows,
    drawn: Tensor,
    metric: Metric,
    levels: Tensor | None,
    options: FitOptions,
    checkpoint: Checkpoint,
) -> JointCalibration:
    """The joint basis and tables of a group. drawn: rows of the sample."""

    def fitted() -> dict[str, Tensor]:
        with task("joint basis and tables" + (f" of group {number}" if number else "")):
            covariance = rows.moments.covariance()
            return dict(fit_joint(covariance, drawn, metric, levels, options.joint_rank).tensors("joint"))

    found = checkpoint.once("joint" + (str(number) if number else ""), fitted)
    return JointCalibration.from_tensors(found, "joint", rows.geometry)


def _fit_paper(
    rows: CalibrationRows, options: FitOptions, checkpoint: Checkpoint
) -> tuple[SideCalibration, SideCalibration]:
    """The bases of keys and of values, and their distortion."""
    found = []
    features = torch.split(torch.arange(rows.geometry.joint_features), list(rows.geometry.side_features))
    for name, side in zip(SIDE_NAMES, features, strict=True):
        tensors = checkpoint.once(name, partial(_fit_side, rows, options, name, side))
        found.append(SideCalibration.from_tensors(name, tensors, BLOCK_SIZES, float(tensors["variance"])))
    return found[0], found[1]


def _fit_side(rows: CalibrationRows, options: FitOptions, name: str, side: Tensor) -> dict[str, Tensor]:
    geometry = rows.geometry
    group = options.layers_per_basis or geometry.n_layers
    layer_features = len(side) // geometry.n_layers
    with task(f"{name} basis"):
        covariance = rows.moments.covariance().of(side)
        parts = torch.split(torch.arange(len(side)), group * layer_features)
        basis = block_diagonal([covariance.of(part).components(options.rank) for part in parts], options.rank)
    with task(f"{name} distortion"):
        mean, vectors = basis.matrices(torch.device("cpu"))
        of_side = rows.sample(SAMPLE_ROWS, options.seed)[0][:, side]
        table = measure_distortion(project(block, mean, vectors).numpy() for block in torch.split(of_side, 1024))
    variance = float(rows.moments.variances()[side.to(rows.moments.device)].sum())
    return dict(SideCalibration(basis, table, variance).tensors(name)) | {
        "variance": torch.tensor(variance, dtype=torch.float64, device="cpu")
    }


def block_diagonal(parts: list[Basis], rank: int) -> Basis:
    """Bases of consecutive features as one basis of all of them, components by falling variance, at most `rank`."""
    spectrum = torch.cat([part.spectrum for part in parts])
    order = spectrum.argsort(descending=True, stable=True)[:rank]
    vectors: Tensor = torch.block_diag(*(part.vectors for part in parts))  # type: ignore[no-untyped-call]
    return Basis(torch.cat([part.mean for part in parts]), vectors[:, order].contiguous(), spectrum[order])
