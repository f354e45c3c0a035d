"""What each place of the pipeline gives: from `paper` to `conditional`, one place switched after
another, on the reference model.

    python -m benchmarks.quality.pipeline_steps --calibration-text FILE... --text FILE... --texts-per-file 2 [--windows 0 16 128]

    paper -> one step and rANS, keys and values apart -> one transform of both -> metric -> one recomputed layer
          -> rounding by cost

and the last one with one place switched off. All are fitted to the same rows of --calibration-text;
bytes are those of real streams. Without rounding by cost each coefficient is rounded by itself,
with the dead zone of `uniform.quantize`, and tables are fitted to that. Without the metric keys and
values are scaled to unit variance.
"""

import argparse
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from unittest.mock import patch

import numpy as np
import torch

import kvtc
import kvtc.backends.reference
import kvtc.calibration.entropy
from benchmarks.shared.calibrations import RANKS, add_calibration_arguments, sequences
from benchmarks.shared.text_quality import add_text_arguments, measure, print_qualities
from kvtc.calibration import Calibration
from kvtc.calibration.conditional_fit import fit_conditional
from kvtc.calibration.entropy import fit_coefficients
from kvtc.calibration.fit import FitOptions, block_diagonal, fit
from kvtc.calibration.joint_calibration import JointCalibration
from kvtc.calibration.joint_fit import complete, fit_joint, table_rows
from kvtc.calibration.rows import CalibrationRows
from kvtc.coding.joint.blocks import HeadBlocks
from kvtc.coding.joint.metric import Metric
from kvtc.coding.joint.rounding import Rounded
from kvtc.coding.joint.uniform_quantizer import ESCAPE, quantize, to_symbols
from kvtc.evaluate.derived import FewerBytes, fewer_bytes
from kvtc.evaluate.provenance import save_result
from kvtc.evaluate.quality import Quality
from kvtc.evaluate.schema import ABLATIONS
from kvtc.huggingface.calibrate import accumulate
from kvtc.huggingface.hidden_states import HiddenStates
from kvtc.report.table import format_table

PAPER_RATIOS = (8, 16, 32, 64)
AT = ("paper 8x", "paper 16x")
"""Points at whose KL bytes are compared."""


@dataclass(frozen=True)
class Fit:
    """What a calibration is fitted with."""

    is_joined: bool = True
    has_metric: bool = True
    recomputes: bool = False
    rounds_by_cost: bool = False


@dataclass(frozen=True)
class Step:
    """A row of the study: a calibration, and how it is used. One with recomputed layers serves the
    profile `joint`, too.
    """

    name: str
    fit: Fit
    profile: str = "conditional"


FULL = Fit(recomputes=True, rounds_by_cost=True)
STEPS = [
    Step("one step and rANS", Fit(is_joined=False, has_metric=False), "joint"),
    Step("+ joint transform", Fit(has_metric=False), "joint"),
    Step("+ metric", replace(FULL, rounds_by_cost=False), "joint"),
    Step("+ a recomputed layer", replace(FULL, rounds_by_cost=False)),
    Step("+ rounding by cost", FULL),
    Step("all but recomputation", FULL, "joint"),
    Step("all but the metric", replace(FULL, has_metric=False)),
]
"""Cumulatively, then all but one."""


def rounded_plainly(coefficients, step, classes, tables) -> Rounded:
    """As `round_coefficients`, but each coefficient by itself, whatever it costs."""
    values = np.ascontiguousarray(quantize(coefficients[:, : len(classes)], step).cpu().numpy().T)
    symbols = to_symbols(values)
    costs = tables.token_costs(symbols, classes)
    activities = costs.argmin(axis=0).astype(np.uint8)
    has_room = tables.frequencies[activities[None, :], classes[:, None], symbols] > 0
    return Rounded(values, np.where(has_room, symbols, ESCAPE).astype(np.uint8), activities, costs.min(axis=0))


@contextmanager
def plain_rounding() -> Iterator[None]:
    """Inside, encoders round plainly and tables are fitted to that."""
    with (
        patch.object(kvtc.backends.reference, "round_coefficients", rounded_plainly),
        patch.object(kvtc.calibration.entropy, "round_coefficients", rounded_plainly),
    ):
        yield


def rounding(fit: Fit):
    return nullcontext() if fit.rounds_by_cost else plain_rounding()


class Fits:
    """Calibrations from the same rows; the metric is that of the shipped one. identity: of the weights
    of the recomputed layer.
    """

    def __init__(self, rows: CalibrationRows, shipped: Calibration, rank: int, identity: bytes) -> None:
        self._rows, self._shipped, self._rank, self._identity = rows, shipped, rank, identity
        self._drawn = rows.sample(table_rows(shipped.geometry.joint_features), 0)
        self.paper = fit(rows, FitOptions(**RANKS))
        sides = zip(
            rows.moments.variances().split(shipped.geometry.side_features),
            shipped.joint.metric.roots.sides,
            strict=True,
        )
        self._unit_variance = Metric.from_roots(
            HeadBlocks(
                *(torch.eye(roots.shape[1]).expand_as(roots) / side.mean().sqrt().float() for side, roots in sides)
            )
        )

    def of(self, fit: Fit) -> Calibration:
        """Its tables are made with its rounding."""
        metric = self._shipped.joint.metric if fit.has_metric else self._unit_variance
        with rounding(fit):
            joint = self._joined(metric) if fit.is_joined else self._separate(metric)
            conditional = None
            if fit.recomputes:
                conditional = fit_conditional(self._rows, self._drawn, 1, self._identity, metric, None, self._rank)
        made = Calibration(self._shipped.geometry, self.paper.key, self.paper.value, {}, joint)
        return replace(made, conditional=conditional)

    def _joined(self, metric: Metric) -> JointCalibration:
        return fit_joint(self._rows.moments.covariance(), self._drawn[0], metric, None, self._rank)

    def _separate(self, metric: Metric) -> JointCalibration:
        """A basis of keys beside one of values, components of both by falling variance."""
        covariance = self._rows.moments.covariance().weighed(metric)
        parts = [covariance.of(side).components(self._rank) for side in torch.arange(len(covariance.mean)).chunk(2)]
        basis, coefficients = complete(block_diagonal(parts, self._rank), metric, metric.weigh(self._drawn[0]))
        return JointCalibration(basis, metric, fit_coefficients(coefficients))


def measured(model, tokenizer, fitted: Mapping[Fit, Calibration], paper: Calibration, window: int, options):
    """Every step at every ratio, `paper` first."""
    codecs = {f"paper {ratio:g}x": kvtc.Codec(paper, ratio=ratio, window_tokens=window) for ratio in PAPER_RATIOS}
    found = measure(model, tokenizer, codecs, options)
    for step in STEPS:
        codecs = {
            f"{step.name} {ratio:g}x": kvtc.Codec(
                fitted[step.fit], step.profile, ratio=ratio, window_tokens=window, model=model
            )
            for ratio in options.ratios
        }
        with rounding(step.fit):
            found += measure(model, tokenizer, codecs, options)
        print(f"window {window}: {step.name}", flush=True)
    return found


def gains(qualities: list[Quality], window: int, names: list[str]) -> list[FewerBytes]:
    """Times fewer bytes than `paper` at its KL."""
    return [figure for figure in fewer_bytes({window: qualities}, names) if figure.at in AT]


def print_gains(figures: list[FewerBytes], names: list[str]) -> None:
    found = {(figure.series, figure.at): figure for figure in figures}

    def shown(figure: FewerBytes) -> str:
        return "-" if figure.body_factor is None else f"{'>= ' * figure.is_bound}{figure.body_factor:.2f}x"

    print(format_table(["", *AT], [[name, *(shown(found[name, at]) for at in AT)] for name in names]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_arguments(parser)
    add_calibration_arguments(parser)
    parser.add_argument("--joint-rank", type=int, default=640)
    parser.add_argument("--ratios", type=float, nargs="+", default=[10, 32, 80, 192])
    parser.add_argument("--windows", type=int, nargs="+", default=[0], help="last tokens kept exactly")
    options = parser.parse_args()
    started = time.perf_counter()
    model, tokenizer = kvtc.reference_model(dtype="bfloat16")
    shipped = kvtc.reference_calibration()
    texts = sequences(options.calibration_text, tokenizer)
    recorded = HiddenStates(model, 1, shipped.geometry)
    rows = CalibrationRows(shipped.geometry, max_tokens=options.calibration_tokens, hidden_width=recorded.width)
    accumulate(model, texts, [rows], recorded=recorded)
    if not rows.is_full:
        raise SystemExit(f"the calibration text holds {rows.n_rows} tokens; {rows.max_tokens} are asked for")
    fits = Fits(rows, shipped, options.joint_rank, recorded.identity)
    fitted = {fit: fits.of(fit) for fit in dict.fromkeys(step.fit for step in STEPS)}
    print(f"fitted in {time.perf_counter() - started:.0f} s", flush=True)
    names = [step.name for step in STEPS]
    studies, figures = [], []
    for window in options.windows:
        qualities = measured(model, tokenizer, fitted, fits.paper, window, options)
        print_qualities(qualities)
        of_window = gains(qualities, window, names)
        print_gains(of_window, names)
        figures += of_window
        studies.append(
            {
                "title": f"What each place of the pipeline gives, window {window}",
                "note": "Each row starting with + is the row above with one place more; all are fitted to the same rows.",
                "qualities": [asdict(quality) for quality in qualities],
            }
        )
    result = {
        "kind": ABLATIONS,
        "seconds": round(time.perf_counter() - started, 1),
        "calibration_tokens": options.calibration_tokens,
        "joint_rank": options.joint_rank,
        "studies": studies,
        "gains": [asdict(figure) for figure in figures],
    }
    save_result("pipeline_steps", result)


if __name__ == "__main__":
    main()
