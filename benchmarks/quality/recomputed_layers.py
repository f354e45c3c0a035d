"""What recomputing more layers gives: body bytes at the KL of `paper` against the layers that
`conditional` recomputes, and the time to restore beside the time to prefill.

    python -m benchmarks.quality.recomputed_layers --model MODEL --calibration FILE --calibration-text FILE... --text FILE...

MODEL is a folder, FILE its calibration for all profiles; `paper`, `joint` and the metric are its.
All numbers of layers are fitted to the same rows of --calibration-text, in one pass.
"""

import argparse
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch

import kvtc
from benchmarks.shared.calibrations import SEQUENCE_TOKENS
from benchmarks.shared.text_quality import add_text_arguments, measure, print_qualities, stretches
from kvtc.calibration import Calibration
from kvtc.calibration.conditional_fit import fit_conditional
from kvtc.calibration.joint_fit import table_rows
from kvtc.calibration.moments import Moments
from kvtc.cli.texts import documents, token_sequences
from kvtc.coding.joint.prediction import hidden_features, n_features
from kvtc.coding.transform import rows_of
from kvtc.evaluate.derived import fewer_bytes
from kvtc.evaluate.provenance import save_result
from kvtc.evaluate.schema import ABLATIONS
from kvtc.huggingface.continuation import prefill
from kvtc.huggingface.hidden_states import HiddenStates
from kvtc.huggingface.models import capture
from kvtc.process.progress import reporting, task
from kvtc.report.table import format_table

PAPER_RATIOS = (4, 8, 16, 32, 64, 128)
AT = ("paper 8x", "paper 16x", "paper 32x")
"""Points at whose KL bytes are compared."""
SINK_TOKENS = 4


def fitted(model: Any, tokenizer: Any, shipped: Calibration, options: argparse.Namespace) -> dict[int, Calibration]:
    """Calibrations by the number of layers that are recomputed."""
    geometry, importance = shipped.geometry, shipped.importance
    states = {m: HiddenStates(model, m, geometry) for m in options.layers}
    width = n_features(next(iter(states.values())).width)
    features = geometry.joint_features
    moments = Moments(features, width * len(states), shipped.joint.basis.rank)
    kept: list[tuple[torch.Tensor, dict[int, torch.Tensor]]] = []
    generator = torch.Generator().manual_seed(0)
    share = 1.5 * table_rows(features) / options.calibration_tokens
    with reporting(), task("reading text", options.calibration_tokens, "tokens") as advance:
        for ids in token_sequences(documents(options.calibration_text), tokenizer, SEQUENCE_TOKENS):
            with ExitStack() as stack:
                for recorded in states.values():
                    stack.enter_context(recorded)
                cache = capture(model, ids, geometry)
            keys = geometry.rope.unrotate(cache.keys, torch.arange(len(ids)), len(ids))
            rows = torch.cat([rows_of(keys), rows_of(cache.values)], dim=1)[SINK_TOKENS:].half().float()
            hidden = {m: recorded.taken()[SINK_TOKENS:].float() for m, recorded in states.items()}
            moments.add(rows, torch.cat([hidden_features(hidden[m]) for m in states], dim=1))
            drawn = torch.rand(len(rows), generator=generator) < share
            kept.append((rows[drawn].half(), {m: of_layer[drawn] for m, of_layer in hidden.items()}))
            advance(len(rows))
            if moments.n_rows + moments.n_pending >= options.calibration_tokens:
                break
    drawn_rows = torch.cat([rows for rows, _ in kept])[: table_rows(features)].float()
    levels = None if importance is None else importance.levels(drawn_rows)
    found = {}
    for index, m in enumerate(states):
        with reporting(), task(f"{m} recomputed layers"):
            part = moments.told_by(slice(index * width, (index + 1) * width))
            sample = drawn_rows, torch.cat([hidden[m] for _, hidden in kept])[: len(drawn_rows)]
            gathered: Any = SimpleNamespace(moments=part, geometry=geometry)
            of_layers = fit_conditional(
                gathered, sample, m, states[m].identity, shipped.joint.metric, levels, shipped.joint.basis.rank
            )
        found[m] = replace(shipped, conditional=of_layers)
    return found


def seconds_to_restore(model: Any, codec: kvtc.Codec, ids: torch.Tensor) -> tuple[float, float]:
    """Median seconds of a prefill, and of decoding with nothing computed before."""
    cache = prefill(model, ids)
    stream = codec.encode(cache, ids)
    prefills, restores = [], []
    for _ in range(3):
        started = time.perf_counter()
        prefill(model, ids)
        read = time.perf_counter()
        codec.forget_prefix()
        codec.decode(stream, ids)
        prefills.append(read - started)
        restores.append(time.perf_counter() - read)
    return median(prefills), median(restores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_arguments(parser)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--calibration-text", type=Path, nargs="+", required=True)
    parser.add_argument("--calibration-tokens", type=int, default=160_000)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--ratios", type=float, nargs="+", default=[16, 32, 64, 128])
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="bfloat16").eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    shipped = kvtc.load_calibration(options.calibration)
    by_layers = fitted(model, tokenizer, shipped, options)
    codecs = {f"paper {ratio:g}x": kvtc.Codec(shipped, "paper", ratio=ratio, window_tokens=0) for ratio in PAPER_RATIOS}
    codecs |= {f"joint {ratio:g}x": kvtc.Codec(shipped, ratio=ratio, window_tokens=0) for ratio in options.ratios}
    for m, calibration in by_layers.items():
        codecs |= {
            f"{m} layers {ratio:g}x": kvtc.Codec(calibration, "conditional", ratio=ratio, window_tokens=0, model=model)
            for ratio in options.ratios
        }
    qualities = measure(model, tokenizer, codecs, options)
    print_qualities(qualities)
    series = ["joint", *(f"{m} layers" for m in by_layers)]
    figures = [figure for figure in fewer_bytes({0: qualities}, series) if figure.at in AT]
    ids = next(iter(stretches(tokenizer, options)))[: -options.continuation]
    seconds = {name: seconds_to_restore(model, codecs[f"{name} {options.ratios[-1]:g}x"], ids) for name in series}

    def shown(name: str, at: str) -> str:
        (figure,) = (one for one in figures if (one.series, one.at) == (name, at))
        if figure.body_factor is None:
            return "not reached"
        interval = "" if figure.body_low is None else f" ({figure.body_low:.1f} to {figure.body_high:.1f})"
        return f"{'>= ' * figure.is_bound}{figure.body_factor:.1f}x{interval}"

    lines = [[name, *(shown(name, at) for at in AT), *(f"{s:.2f}" for s in seconds[name])] for name in series]
    print(format_table(["", *AT, "prefill, s", "restore, s"], lines))
    result = {
        "kind": ABLATIONS,
        "seconds": round(time.perf_counter() - started, 1),
        "calibration_tokens": options.calibration_tokens,
        "seconds_by_series": {name: dict(zip(("prefill", "restore"), s, strict=True)) for name, s in seconds.items()},
        "studies": [
            {
                "title": "Layers that are recomputed",
                "note": "All are fitted to the same rows; paper and joint are those of the calibration.",
                "qualities": [asdict(quality) for quality in qualities],
            }
        ],
        "fewer_bytes": [asdict(figure) for figure in figures],
    }
    save_result("recomputed_layers", result)


if __name__ == "__main__":
    main()
