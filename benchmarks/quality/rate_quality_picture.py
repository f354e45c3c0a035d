"""The first picture of the README: profiles and some baselines, from the evaluation of SmolLM2-135M
that was saved last.

    python -m benchmarks.quality.rate_quality_picture
"""

import argparse
from pathlib import Path

from kvtc.container.tables import PROFILES
from kvtc.evaluate.method_names import split_name
from kvtc.evaluate.provenance import RESULTS_DIRECTORY
from kvtc.evaluate.schema import read_result
from kvtc.report.charts import save_picture
from kvtc.report.text_sections import rate_distortion

SERIES = (*PROFILES, "FP8", "NVFP4", "INT4", "KIVI", "TurboQuant", "TOVA")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    records = read_result(RESULTS_DIRECTORY / "smollm2_window_0.json").result["qualities"]
    shown = [record for record in records if split_name(record["name"])[0] in SERIES]
    save_picture(
        Path("docs/images/rate_quality.svg"), "What quality costs: lower is better, further right is smaller",
        "SmolLM2-135M, held-out text of four kinds, 1,024 cached tokens, no window", [rate_distortion(shown, "body_ratio")],
    )  # fmt: skip


if __name__ == "__main__":
    main()
