"""kvtc beside its rivals on held-out text: what each costs, every byte counted, and what it does to the predictions.

python benchmarks/rivals.py --text FILE... --profile-text FILE... [--window 128] [--ratios 8 16 32 64] [--dtype bfloat16]
    [--tokens 1792] [--continuation 256] [--texts-per-file 4]

A window of 0 is the mode in which pages are stored: all tokens but kvtc's sinks are coded. CacheGen is profiled on stretches of
--profile-text, which must not hold the texts measured.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import kvtc
from kvtc.evaluate.baselines import baselines
from kvtc.evaluate.methods import KvtcMethod, Method
from kvtc.evaluate.provenance import save_result
from kvtc.integrations.continuation import prefill
from quality import add_text_arguments, kvtc_codecs, measure, print_qualities, stretches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_arguments(parser)
    parser.add_argument("--profile-text", type=Path, nargs="+", required=True, help="text that CacheGen is profiled on")
    parser.add_argument("--ratios", type=float, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--window", type=int, default=128, help="last tokens kept exactly")
    parser.add_argument("--dtype", default="bfloat16", help="of the model and its cache")
    parser.add_argument("--name", default="rivals", help="of the result file")
    options = parser.parse_args()
    model, tokenizer = kvtc.reference_model(dtype=options.dtype)
    calibration = kvtc.reference_calibration()
    profile_options = argparse.Namespace(**{**vars(options), "text": options.profile_text})
    profile_caches = [prefill(model, ids) for ids in stretches(tokenizer, profile_options)]
    codecs = kvtc_codecs(calibration, ["paper", "joint", "conditional"], options.ratios, options.window)
    methods: dict[str, Method] = {
        **baselines(calibration.geometry, options.window, profile_caches),
        **{f"kvtc {name}": KvtcMethod(codec) for name, codec in codecs.items()},
    }
    qualities = sorted(measure(model, tokenizer, methods, options), key=lambda quality: quality.total_ratio)
    print_qualities(qualities)
    result = {"window_tokens": options.window, "dtype": options.dtype, "ratios": options.ratios}
    save_result(options.name, {**result, "qualities": [asdict(quality) for quality in qualities]})


if __name__ == "__main__":
    main()
