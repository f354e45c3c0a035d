"""What `kvtc plan` needs to know of the reference model on this machine: prefill, decode steps,
codecs at 16x, memory and disk.

    python -m benchmarks.speed.plan_measurements --text FILE -o FILE.json [--repeats 7] [--directory DIR]

Every time is the best of `--repeats` after a warm-up: a planner wants to know what the machine can
do. The model runs in float32; caches are coded in bfloat16. The disk is that of `--directory`; what
is read was thrown out of the page cache before.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import torch

import kvtc
from benchmarks.shared.timing import best
from kvtc.evaluate.provenance import Provenance
from kvtc.files import write_atomically
from kvtc.huggingface.models import capture
from kvtc.plan.measurements import NAMES, load_measurements
from kvtc.reference import MODEL_DIRECTORY
from kvtc.report.table import format_table

PREFILLS = (256, 512, 1024, 2048, 4096)
BATCHES, CONTEXTS, STEPS = (1, 4, 8), (256, 1024, 2048), 8
CODED_TOKENS, RATIO = 2048, 16
TRANSFER_BYTES, SMALL_BYTES = 64 * 2**20, 4096


def prefill_points(model, ids: torch.Tensor, repeats: int) -> list[list[float]]:
    return [[n, round(best(lambda n=n: capture(model, ids[:n]), repeats), 5)] for n in PREFILLS if n <= len(ids)]


@torch.inference_mode()
def decode_times(model, ids: torch.Tensor, repeats: int) -> tuple[float, float]:
    """Seconds of a step, and what each token of context in the batch adds: least squares of
    relative errors.
    """
    rows, seconds = [], []
    for context in CONTEXTS:
        for batch in BATCHES:
            cache = model(ids[None, :context], use_cache=True, logits_to_keep=1).past_key_values
            cache.batch_repeat_interleave(batch)

            def steps(batch=batch, context=context, cache=cache):
                for step in range(STEPS):
                    next_ids = ids[None, context + step : context + step + 1].expand(batch, -1)
                    model(next_ids, past_key_values=cache, use_cache=True)
                cache.crop(-STEPS)

            rows.append([1.0, batch * (context + STEPS / 2)])
            seconds.append(best(steps, repeats) / STEPS)
    relative = np.array(rows) / np.array(seconds)[:, None]
    (step, per_token), *_ = np.linalg.lstsq(relative, np.ones(len(rows)), rcond=None)
    if min(step, per_token) <= 0:
        raise SystemExit(
            f"decode steps of {step:.3g} s and {per_token:.3g} s a token make no sense: the machine is too busy"
        )
    return float(step), float(per_token)


def codec_numbers(profile: str, cache: kvtc.KVCache, ids: torch.Tensor, repeats: int) -> dict[str, float]:
    codec = kvtc.Codec(kvtc.reference_calibration(), profile, ratio=RATIO, model=MODEL_DIRECTORY)
    stream = codec.encode(cache, ids)
    info = kvtc.inspect(stream)
    return {
        "encode_bytes_per_second": info.original_bytes / best(lambda: codec.encode(cache, ids), repeats),
        "decode_bytes_per_second": info.original_bytes / best(lambda: codec.decode(stream, ids), repeats),
        "body_ratio": info.body_ratio or 1.0,
    }


def memory_numbers(repeats: int) -> dict[str, float]:
    source = torch.ones(TRANSFER_BYTES, dtype=torch.uint8)
    target = torch.zeros_like(source)
    rate = TRANSFER_BYTES / best(lambda: target.copy_(source), repeats)
    access = best(lambda: target[:SMALL_BYTES].copy_(source[:SMALL_BYTES]), repeats)
    return {"read_bytes_per_second": rate, "write_bytes_per_second": rate, "access_seconds": access}


def disk_numbers(directory: Path, repeats: int) -> dict[str, float]:
    path, small = directory / "large", directory / "small"
    content = os.urandom(TRANSFER_BYTES)

    def write(target: Path, data: bytes) -> None:
        write_atomically(target, data)
        with target.open("rb") as file:
            os.fsync(file.fileno())

    def forget(target: Path) -> None:
        with target.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    written = TRANSFER_BYTES / best(lambda: write(path, content), repeats)
    write(small, content[:SMALL_BYTES])
    return {
        "read_bytes_per_second": TRANSFER_BYTES / best(path.read_bytes, repeats, lambda: forget(path)),
        "write_bytes_per_second": written,
        "access_seconds": best(small.read_bytes, repeats, lambda: forget(small)),
    }


def measure(text: str, directory: Path, repeats: int) -> dict[str, tuple[object, str]]:
    """Numbers by name, each with a note."""
    model, tokenizer = kvtc.reference_model()
    ids = torch.tensor(tokenizer(text).input_ids)[: max(PREFILLS)]
    if len(ids) < max(PREFILLS):
        raise SystemExit(f"the text has {len(ids)} tokens; {max(PREFILLS)} are needed")
    prompt = tokenizer.decode(ids[:CODED_TOKENS])
    step, per_token = decode_times(model, ids, repeats)
    shape = f"batches of {BATCHES} at contexts of {CONTEXTS} tokens, float32"
    found: dict[str, tuple[object, str]] = {
        "engine.request_seconds": (best(lambda: tokenizer(prompt), repeats), f"the tokenizer on {CODED_TOKENS} tokens"),
        "engine.prefill_seconds": (prefill_points(model, ids, repeats), "float32"),
        "engine.decode_step_seconds": (step, shape),
        "engine.decode_seconds_per_context_token": (per_token, shape),
    }
    exact = capture(model, ids[:CODED_TOKENS])
    cache = kvtc.KVCache(exact.keys.to(torch.bfloat16), exact.values.to(torch.bfloat16))
    for profile in ("paper", "conditional"):
        numbers = codec_numbers(profile, cache, ids[:CODED_TOKENS], repeats)
        note = f"{CODED_TOKENS} tokens, ratio {RATIO}, 4 sinks and 128 window tokens exact"
        found |= {f"codec.{profile}.{name}": (value, note) for name, value in numbers.items()}
    tiers = {
        "host": (memory_numbers(repeats), f"a copy of {TRANSFER_BYTES} bytes in memory"),
        "disk": (disk_numbers(directory, repeats), f"a file of {TRANSFER_BYTES} bytes, written through, read uncached"),
    }
    for tier, (numbers, note) in tiers.items():
        found |= {f"tier.{tier}.{name}": (value, note) for name, value in numbers.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help=f"a text of at least {max(PREFILLS)} tokens")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the measurement file to write")
    parser.add_argument("--directory", type=Path, default=Path(), help="where the disk is measured (default: here)")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()

    text = options.text.read_text(encoding="utf-8")[: 12 * max(PREFILLS)]
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        found = measure(text, Path(directory), options.repeats)
    stamp = Provenance.now()
    machine = (
        f"{stamp.machine}, {stamp.n_threads} of {stamp.n_cores} cores, torch {stamp.torch}, kvtc commit {stamp.commit}"
    )
    content = {
        "description": "The reference model kvtc-6m on a CPU",
        "sources": {"here": {"kind": "measured", "date": stamp.date, "machine": machine, "command": stamp.command}},
        "numbers": {
            name: {
                "value": float(f"{value:.4g}") if isinstance(value, float) else value,
                "source": "here",
                "note": note,
            }
            for name, (value, note) in found.items()
        },
    }
    write_atomically(options.output, (json.dumps(content, indent=2) + "\n").encode())
    numbers = load_measurements(options.output).numbers
    print(format_table(["number", "value"], [[name, numbers[name].value] for name in numbers]))
    print(f"\n{len(numbers)} numbers of the {len(NAMES)} kinds there are; saved {options.output}")


if __name__ == "__main__":
    main()
