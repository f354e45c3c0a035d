"""Time, processor time and peak memory of calibrating the reference model for all profiles, and
what the calibration is worth.

    python -m benchmarks.calibration.cost --calibration-text FILE... --text FILE... --texts-per-file 2 [--calibration-tokens 160000]

The quality is measured beside the calibration that ships with the model, which saw more text.
"""

import argparse
import resource
import time
from dataclasses import asdict

import kvtc
from benchmarks.shared.calibrations import Recipe, add_calibration_arguments, calibrate
from benchmarks.shared.text_quality import add_text_arguments, measure, print_qualities
from kvtc.evaluate.provenance import save_result
from kvtc.reference import MODEL_DIRECTORY
from kvtc.report.table import format_fields


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_arguments(parser)
    add_calibration_arguments(parser)
    parser.set_defaults(calibration_tokens=160_000)
    options = parser.parse_args()
    started, cpu = time.perf_counter(), time.process_time()
    made = calibrate(Recipe(options.calibration_tokens), options.calibration_text)
    cost = {
        "calibration_tokens": options.calibration_tokens,
        "seconds": round(time.perf_counter() - started, 1),
        "processor_seconds": round(time.process_time() - cpu, 1),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    print(format_fields(list(cost.items())))
    shipped = kvtc.reference_calibration()
    codecs = {
        f"{profile}, {name}, {ratio}x": kvtc.Codec(calibration, profile, ratio=ratio, model=MODEL_DIRECTORY)
        for profile in ("paper", "joint", "conditional")
        for ratio in (16, 64)
        for name, calibration in (("measured here", made), ("as shipped", shipped))
    }
    qualities = measure(*kvtc.reference_model(dtype="bfloat16"), codecs, options)
    print_qualities(qualities)
    seen = shipped.info["n_rows"]
    save_result(
        "calibration_cost",
        {**cost, "shipped_tokens_seen": seen, "qualities": [asdict(quality) for quality in qualities]},
    )


if __name__ == "__main__":
    main()
