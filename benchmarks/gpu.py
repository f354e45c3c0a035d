"""kvtc on a CUDA device, stage by stage, at the geometries of large models; in pieces of a few minutes.

    python benchmarks/gpu.py [--device cuda] [--pieces NAME...] [--limit-seconds 600]
    python benchmarks/gpu.py --list
    python benchmarks/gpu.py --device cpu --small      the same code in tiny sizes, to see that it runs
    python benchmarks/gpu.py --plot

Each piece is saved as soon as it is finished, and one that is there is not measured again (`--again` does). Before anything is
timed the device's integers and caches are compared with the reference backend's; where they differ, nothing is reported. Models,
caches and calibrations are made up (`gpu_cases`, `gpu_model`): speed is measured here, quality is not. Times are medians after a
warm-up, between moments at which the device is idle. docs/gpu.md says what the pieces are and what is aimed at.
"""

import argparse
import gc
import sys
import time
from pathlib import Path
from typing import Any

import torch

import gpu_gate
from gpu_pieces import Options, pieces
from gpu_report import plot, print_report
from kvtc.backends import choose
from kvtc.evaluate.provenance import RESULTS_DIRECTORY, Provenance, save_result
from kvtc.evaluate.schema import read_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--small", action="store_true", help="tiny sizes: no figure means anything")
    parser.add_argument("--pieces", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--limit-seconds", type=float, default=float("inf"), help="begin no piece after so long")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--again", action="store_true", help="measure pieces that are there, too")
    parser.add_argument("--list", action="store_true", help="name the pieces, and which are there")
    parser.add_argument("--plot", action="store_true", help="draw what was saved, and stop")
    parser.add_argument("--directory", type=Path, default=RESULTS_DIRECTORY, help="where results are kept")
    options = parser.parse_args()
    started = time.monotonic()
    name = "gpu_small" if options.small else "gpu"
    found, all_pieces = saved(options.directory / f"{name}.json"), pieces(options.small)
    if options.list:
        for piece in all_pieces:
            print(f"{piece}{'  (there)' if piece in found else ''}")
        return
    if options.plot:
        plot(found, name)
        return
    unknown = set(options.pieces or ()) - set(all_pieces)
    if unknown:
        parser.error(f"no such pieces: {', '.join(sorted(unknown))}; --list names them")
    wanted = [piece for piece in all_pieces if not options.pieces or piece in options.pieces]
    missing = [piece for piece in wanted if options.again or piece not in found]
    if missing:
        run = Options(torch.device(options.device), options.small, options.backend, options.repeats)
        hardware = describe(run)
        require_same_hardware(found, hardware)
        require_correct(run)
        for piece in missing:
            if time.monotonic() - started > options.limit_seconds:
                print(f"time is up before {piece}; call again to go on")
                break
            print(f"{piece} ...", flush=True)
            begun = time.monotonic()
            measured = all_pieces[piece](run)
            stamped = {"provenance": vars(Provenance.now()), "hardware": hardware, "repeats": run.repeats}
            found[piece] = {**measured, **stamped, "seconds": round(time.monotonic() - begun, 1)}
            save_result(name, {"kind": "gpu", "small": options.small, "pieces": found}, options.directory)
            gc.collect()
            if run.device.type == "cuda":
                torch.cuda.empty_cache()
    print_report({piece: found[piece] for piece in all_pieces if piece in found})


def saved(path: Path) -> dict[str, dict[str, Any]]:
    """The pieces that are there, by name."""
    return read_result(path).result["pieces"] if path.is_file() else {}


def describe(options: Options) -> dict[str, Any]:
    """What is measured."""
    choice = choose(options.device, options.backend)
    found: dict[str, Any] = {"device": options.device.type, "backend": choice.name, "why": choice.reason}
    if options.device.type == "cuda":
        properties = torch.cuda.get_device_properties(options.device)
        found |= {"name": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return found


def require_same_hardware(found: dict[str, dict[str, Any]], hardware: dict[str, Any]) -> None:
    for piece, result in found.items():
        if result["hardware"] != hardware:
            raise SystemExit(
                f"the piece {piece} was measured on {result['hardware']}; this is {hardware}: give another --directory"
            )


def require_correct(options: Options) -> None:
    compared = gpu_gate.check(options.of_codec, options.device)
    wrong = [what for what, is_same in compared.items() if not is_same]
    if wrong:
        raise SystemExit(
            f"this device does not compute what the reference does, so nothing is timed: {', '.join(wrong)}"
        )
    print(f"{len(compared)} comparisons with the reference agree", file=sys.stderr)


if __name__ == "__main__":
    main()
