"""From rows to a calibration: find the bases, measure the distortion (paper, section 1.2), fit prediction and tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..coding.joint.metric import Metric
from ..coding.joint.prediction import reduce_embeddings
from ..coding.paper.distortion import MAX_SAMPLE_ROWS, measure_distortion
from ..coding.transform import project
from ..errors import InvalidArgument
from ..process.progress import track
from ..process.torch_state import neutral_torch_state, plain
from .artifact import Calibration, KindCalibration
from .joint_fit import fit_joint
from .principal import block_diagonal, principal_components
from .row_spool import RowSpool
from .rows import CalibrationRows

RANK_CAP = 10_000
EMBEDDING_RANK = 256
HIDDEN_FEATURES = 384


@dataclass(frozen=True)
class FitOptions:
    """How large the parts of a calibration are.

    Parameters:
        rank: components that the basis of keys, and that of values, have at most; for the profile `paper`.
        joint_rank: the same for the joint basis of `joint` and `conditional`.
        embedding_rank: features that the token embeddings are reduced to, for `conditional`.
        hidden_features: hidden features of its prediction; 0: the prediction is linear.
        seed: of all random draws.
        layers_per_basis: for ablations alone (the paper's tables 16 and 17): bases of groups of so many layers; None: of all.

    Raises:
        InvalidArgument: for a rank below 1.
    """

    rank: int = RANK_CAP
    joint_rank: int = RANK_CAP
    embedding_rank: int = EMBEDDING_RANK
    hidden_features: int = HIDDEN_FEATURES
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
    metric: Metric | None = None,
    embeddings: Tensor | None = None,
    info: Mapping[str, Any] | None = None,
) -> Calibration:
    """Fit a calibration to the rows that were accumulated.

    Time: nine passes over the rows for each basis, and one each for prediction and tables. Memory, on the device of the
    rows: at most 16 P l + 36 l^2 bytes, 2 kB a row for prediction, and about 1 GB for blocks, where l = 64 + the rank
    and P = p features, or 2 p with a metric. On the CPU the same rows give the same tensors and fingerprint every time;
    those of another device differ by rounding.

    Parameters:
        rows: at least two.
        options: sizes; None: the defaults.
        metric: in which the joint basis is fitted; None: the calibration serves `paper` alone.
        embeddings: [vocabulary, hidden], the model's input embeddings; with them and a metric the calibration serves
            `conditional`, too. The rows must have been accumulated with token ids.
        info: what else the calibration's `info` shall say.

    Raises:
        InvalidArgument: for fewer than two rows, rows that do not vary, or embeddings for rows without token ids.
    """
    options = FitOptions() if options is None else options
    if options.layers_per_basis is not None and not 1 <= options.layers_per_basis <= rows.geometry.n_layers:
        raise InvalidArgument(
            f"layers_per_basis must lie in 1 .. {rows.geometry.n_layers}; got {options.layers_per_basis}"
        )
    if embeddings is not None and rows.triples is None:
        raise InvalidArgument("embeddings need rows that were accumulated with token ids")
    if rows.n_rows < 2:
        raise InvalidArgument(
            f"calibration needs at least 2 tokens past the {rows.sink_tokens} sinks; got {rows.n_rows}"
        )
    key, value = (_fit_kind(name, spool, rows, options) for name, spool in (("key", rows.keys), ("value", rows.values)))
    joint = None
    if metric is not None:
        table = None
        if embeddings is not None:
            table = reduce_embeddings(plain(embeddings, "embeddings"), options.embedding_rank, rows.keys.device)
        sizes = options.joint_rank, options.seed, table, rows.triples, options.hidden_features
        joint = fit_joint(rows.geometry, rows.keys, rows.values, metric, *sizes)
    made_from = {
        "n_sequences": rows.n_sequences,
        "n_tokens_seen": rows.keys.n_offered,
        "n_rows": rows.n_rows,
        "sink_tokens": rows.sink_tokens,
        "layers_per_basis": options.layers_per_basis,
        "seed": options.seed,
    }
    return Calibration(rows.geometry, key, value, made_from | dict(info or {}), joint)


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
