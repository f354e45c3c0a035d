"""Time of kvtc on a CUDA device by stage, and what bounds it; in pieces, each saved when it is
done.

    python -m benchmarks.gpu                         # every piece that the result file does not hold yet
    python -m benchmarks.gpu --list
    python -m benchmarks.gpu --pieces ceilings nemo-joint-3000 --limit-seconds 300
    python -m benchmarks.gpu --device cpu --small    # everything in miniature, to see that it runs

Before anything is timed, the backend is compared with the reference backend on the same device;
where they differ nothing is timed. Times are medians after warm-up, of a device that idles before
and after; stages are bounded by CUDA events. Weights, bases and caches are random with measured
deviations (`cases`), which is enough for time and says nothing of quality.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.ceilings import ceilings, lossless, rans
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.coding import Case, Setting, measure_case
from benchmarks.gpu.gate import gate
from benchmarks.gpu.model import measure_first_token
from benchmarks.gpu.report import print_report
from kvtc.evaluate.provenance import RESULTS_DIRECTORY, Provenance, save_result
from kvtc.evaluate.schema import read_result

CASES = [
    *(Case("nemo", "paper", rank) for rank in (6000, 10000)),
    Case("nemo", "paper", 6000, "deflate"),
    *(Case("nemo", profile, rank) for profile in ("joint",) for rank in (3000, 6000, 10000)),
    *(Case(shape, *rest) for shape in ("llama8", "llama70") for rest in (("paper", 6000), ("joint", 3000))),
]
FIRST_TOKEN_CASES = [Case("nemo", "paper", 6000), Case("nemo", "joint", 3000)]


def pieces() -> dict[str, Callable[[Setting], dict[str, Any]]]:
    """What can be measured, in the order in which it is."""
    first = {"ceilings": ceilings, "rans": rans}
    coding = {case.name: partial(measure_case, case) for case in CASES}
    tokens = {f"first-token-{case.name}": partial(measure_first_token, case) for case in FIRST_TOKEN_CASES}
    return {**first, **coding, **tokens, "lossless": lossless}


def saved(directory: Path, name: str) -> dict[str, Any]:
    """Pieces of an earlier call, by name."""
    path = directory / f"{name}.json"
    return dict(read_result(path).result["pieces"]) if path.is_file() else {}


def run_pieces(chosen: list[str], setting: Setting, options: argparse.Namespace) -> list[str]:
    """Measure and save one piece after another; the names of those that time was not left for."""
    name = "gpu_small" if setting.is_small else "gpu"
    done = {} if options.again else saved(options.directory, name)
    left = [piece for piece in chosen if piece not in done]
    if not left:
        return []
    checked = gate(setting)
    if not checked["passed"]:
        raise SystemExit(
            f"the backend {checked['backend']} differs from the reference, nothing is timed: {checked['checks']}"
        )
    started = time.monotonic()
    while left and (options.limit_seconds is None or time.monotonic() - started < options.limit_seconds):
        piece, began = left.pop(0), time.monotonic()
        result = pieces()[piece](setting)
        done = (saved(options.directory, name)) | {
            piece: {
                "provenance": asdict(Provenance.now()),
                "device": str(setting.device),
                "seconds": round(time.monotonic() - began, 1),
                "gate": checked,
                "result": result,
            }
        }
        save_result(name, {"kind": "gpu", "pieces": done}, options.directory)
        setting.free()
    return left


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", nargs="+", choices=list(pieces()), metavar="PIECE", help="default: all")
    parser.add_argument("--list", action="store_true", help="name the pieces, and which are saved")
    parser.add_argument("--again", action="store_true", help="measure pieces that are saved, too")
    parser.add_argument("--limit-seconds", type=float, help="begin no further piece after so long")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--small", action="store_true", help="models in miniature")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--directory", type=Path, default=RESULTS_DIRECTORY)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    setting = Setting(device, options.backend, Clock(device, options.repeats), options.small)
    name = "gpu_small" if options.small else "gpu"
    if options.list:
        found = saved(options.directory, name)
        print("\n".join(f"{piece:40} {'saved' if piece in found else '-'}" for piece in pieces()))
        return
    left = run_pieces(options.pieces or list(pieces()), setting, options)
    print_report(saved(options.directory, name))
    if left:
        print(f"time is up; call again for {' '.join(left)}", file=sys.stderr)


if __name__ == "__main__":
    main()
