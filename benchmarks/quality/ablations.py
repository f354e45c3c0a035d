"""The paper's ablations on the reference model: what each part of codec and calibration is worth,
on held-out text.

    python -m benchmarks.quality.ablations --calibration-text FILE... --text FILE... --texts-per-file 2 [--studies layers seeds ...]

Studies of the codec alone use the calibration that ships with the model; the others fit their own,
with the same ranks, from --calibration-text. Each study is a result file of its own, so that one
can be repeated without the others.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any

import kvtc
from benchmarks.shared.calibrations import Recipe, add_calibration_arguments, calibrate_all
from benchmarks.shared.text_quality import add_text_arguments, measure, print_qualities
from kvtc.evaluate.provenance import save_result
from kvtc.evaluate.quality import Quality
from kvtc.evaluate.schema import ABLATIONS
from kvtc.profiles.rates import Truncation
from kvtc.reference import MODEL_DIRECTORY
from kvtc.report.table import format_table

N_DRAWS = 5
Cases = dict[str, kvtc.Codec]


@dataclass(frozen=True)
class Study:
    """title, note: for the page and the documentation. cases: the codecs to compare, by name."""

    title: str
    note: str
    cases: Callable[["Calibrations"], Cases]


class Calibrations:
    """The shipped calibration, and others made when they are asked for."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.shipped = kvtc.reference_calibration()
        self.tokens = options.calibration_tokens
        self._options = options

    def fit(self, recipes: dict[str, Recipe]) -> dict[str, kvtc.Calibration]:
        """By name."""
        return calibrate_all(recipes, self._options.calibration_text, self._options.processes)


def allocation(calibrations: Calibrations) -> Cases:
    cases = {}
    for ratio in (8, 16, 32, 64):
        cases[f"paper {ratio}x"] = kvtc.Codec(calibrations.shipped, "paper", ratio=ratio)
        cases[f"truncation {ratio}x"] = kvtc.Codec(calibrations.shipped, "paper", rate=Truncation(ratio))
    return cases


def sinks(calibrations: Calibrations) -> Cases:
    cases = {}
    for profile, ratio in (("paper", 16), ("paper", 64), ("conditional", 64)):
        for name, options in (
            ("exact", {}),
            ("in fp8", {"sink_format": "fp8"}),
            ("compressed", {"sink_tokens": 0}),
        ):
            cases[f"{profile}, sinks {name} {ratio}x"] = kvtc.Codec(
                calibrations.shipped, profile, ratio=ratio, model=MODEL_DIRECTORY, **options
            )
    return cases


def window(calibrations: Calibrations) -> Cases:
    return {
        f"{profile}, window {tokens}, {ratio}x": kvtc.Codec(
            calibrations.shipped, profile, ratio=ratio, window_tokens=tokens, model=MODEL_DIRECTORY
        )
        for profile, ratio in (("paper", 16), ("paper", 64), ("conditional", 64))
        for tokens in (0, 16, 64, 128)
    }


def budgets(calibrations: Calibrations) -> Cases:
    return {
        f"keys {key}x, values {value}x": kvtc.Codec(calibrations.shipped, "paper", key_ratio=key, value_ratio=value)
        for key, value in ((16, 16), (8, 32), (32, 8), (64, 64), (32, 256), (256, 32))
    }


def lossless(calibrations: Calibrations) -> Cases:
    return {
        f"{coder} {ratio}x": kvtc.Codec(calibrations.shipped, "paper", ratio=ratio, coder=coder)
        for ratio in (16, 64)
        for coder in ("none", "lz4", "deflate", "zstd")
    }


def layers(calibrations: Calibrations) -> Cases:
    n_layers = calibrations.shipped.geometry.n_layers
    groups = [group for group in range(1, n_layers + 1) if n_layers % group == 0]
    recipes = {str(group): Recipe(calibrations.tokens, layers_per_basis=group) for group in groups}
    cases = {}
    for group, made in calibrations.fit(recipes).items():
        for ratio in (8, 32):
            cases[f"layers a basis: {group}, {ratio}x"] = kvtc.Codec(made, "paper", ratio=ratio)
        cases[f"layers a basis: {group}, truncation 8x"] = kvtc.Codec(made, "paper", rate=Truncation(8))
    return cases


def tokens(calibrations: Calibrations) -> Cases:
    recipes = {f"{n // 1000} K tokens": Recipe(n) for n in (20_000, 40_000, 80_000, 160_000)}
    return _both_profiles(calibrations.fit(recipes) | {"as shipped": calibrations.shipped})


def seeds(calibrations: Calibrations) -> Cases:
    recipes = {f"draw {n + 1}": Recipe(calibrations.tokens, draw=n, n_draws=N_DRAWS) for n in range(N_DRAWS)}
    return _both_profiles(calibrations.fit(recipes))


def _both_profiles(calibrations: dict[str, kvtc.Calibration]) -> Cases:
    return {
        f"{profile}, {name}, {ratio}x": kvtc.Codec(made, profile, ratio=ratio, model=MODEL_DIRECTORY)
        for profile in ("paper", "conditional")
        for ratio in (16, 64)
        for name, made in calibrations.items()
    }


STUDIES = {
    "allocation": Study(
        "Dynamic program against truncation", "The paper's table 15; truncation keeps leading coefficients in 16 bits.", allocation
    ),
    "sinks": Study("The first four tokens", "The paper's table 6.", sinks),
    "window": Study("Last tokens kept exactly", "The paper's table 13.", window),
    "budgets": Study("Unequal budgets of keys and values", "The paper's table 7, with the profile paper.", budgets),
    "lossless": Study("Lossless coder of the profile paper", "The paper's table 14.", lossless),
    "layers": Study("One basis over all layers against groups of layers", "The paper's tables 16 and 17.", layers),
    "tokens": Study("Tokens of calibration text", "The paper's table 8.", tokens),
    "seeds": Study("Draws of calibration text", "The paper's table 10: disjoint sets of documents.", seeds),
}  # fmt: skip


def spread(qualities: list[Quality]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the draws of the study `seeds`."""
    found: dict[tuple[str, str], list[Quality]] = {}
    for quality in qualities:
        profile, _, ratio = quality.name.split(", ")
        found.setdefault((profile, ratio), []).append(quality)
    fields = ("kl", "top1_agreement", "body_ratio")
    return [
        {
            "name": f"{profile} {ratio}",
            "n_draws": len(draws),
            **{f"{field}_mean": mean(getattr(draw, field) for draw in draws) for field in fields},
            **{f"{field}_deviation": stdev(getattr(draw, field) for draw in draws) for field in fields},
        }
        for (profile, ratio), draws in found.items()
    ]


def run(name: str, calibrations: Calibrations, options: argparse.Namespace) -> None:
    """Measure, print and save one study."""
    started = time.perf_counter()
    study = STUDIES[name]
    cases = study.cases(calibrations)
    qualities = measure(*kvtc.reference_model(dtype="bfloat16"), cases, options)
    record: dict[str, Any] = {"title": study.title, "note": study.note, "qualities": [asdict(q) for q in qualities]}
    print(f"\n{study.title}\n")
    print_qualities(qualities)
    if name == "seeds":
        record["spread"] = spread(qualities)
        rows = [
            [line["name"], *(f"{line[f'kl_{what}']:.5f}" for what in ("mean", "deviation"))]
            for line in record["spread"]
        ]
        print()
        print(format_table([f"{N_DRAWS} draws", "KL (nats)", "deviation"], rows))
    seconds = round(time.perf_counter() - started, 1)
    is_fitted = name in ("layers", "seeds")
    record["calibration_tokens"] = options.calibration_tokens if is_fitted else None
    save_result(f"ablations_{name}", {"kind": ABLATIONS, "seconds": seconds, "studies": [record]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_arguments(parser)
    add_calibration_arguments(parser)
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES), metavar="NAME")
    options = parser.parse_args()
    calibrations = Calibrations(options)
    for name in options.studies:
        run(name, calibrations, options)


if __name__ == "__main__":
    main()
