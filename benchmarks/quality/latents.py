"""Rate and quality of a model with latents (MLA): `joint` and `paper` beside FP8, NVFP4 and INT4 of the same latents.

    python -m benchmarks.quality.latents MODEL --calibration FILE --calibration-text FILE... --text FILE...

MODEL is a checkpoint folder. A calibration that is not there yet is made from --calibration-text. No token but the sinks is exact.
"""

import argparse
import time
from pathlib import Path

import kvtc
from benchmarks.shared.text_quality import add_text_arguments
from kvtc.cli.texts import SEQUENCE_TOKENS, documents, token_sequences
from kvtc.evaluate.provenance import save_result, stamp
from kvtc.evaluate.schema import ResultFile
from kvtc.evaluate.sweep import Methods, Sweep, Texts, run_sweep
from kvtc.report.sections import render_text, sections_of

RATIOS = (2, 3, 4, 6, 8, 12, 16, 24, 32)
BASELINES = ("FP8", "NVFP4", "INT4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    add_text_arguments(parser)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--calibration-text", type=Path, nargs="+", default=[])
    parser.add_argument("--calibration-tokens", type=int, default=160_000)
    parser.add_argument("--output", type=Path, help="folder of the result (default: benchmarks/results)")
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="bfloat16").eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if not options.calibration.exists():
        sequences = token_sequences(documents(options.calibration_text), tokenizer, SEQUENCE_TOKENS)
        kvtc.calibrate(
            model, sequences, max_tokens=options.calibration_tokens, profiles=("paper", "joint")
        ).save(options.calibration)  # fmt: skip
    sweep = Sweep(
        methods=Methods(profiles=("paper", "joint"), ratios=RATIOS, windows=(0,), baselines=BASELINES),
        texts=Texts(
            files=options.text,
            n_tokens=options.tokens,
            n_continuation=options.continuation,
            per_file=options.texts_per_file,
        ),
    )
    result = run_sweep(model, tokenizer, kvtc.load_calibration(options.calibration), sweep, options.model.name)
    result["seconds"] = round(time.perf_counter() - started, 1)
    stamped = stamp(result)
    print(render_text(sections_of(ResultFile("latents", stamped["provenance"], result))))
    save_result("latents", result, *([options.output] if options.output else []))


if __name__ == "__main__":
    main()
