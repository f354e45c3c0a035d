"""Bits and reconstruction error of a token by its offset in its chunk, on plain held-out text.

    python -m benchmarks.quality.error_by_offset --text FILE... [--tokens 2048] [--texts-per-file 4]

The first tokens of a chunk have fewer predecessors, or none, to be predicted from: with
`conditional` they cost more. Bits are those of the calibrated tables at the step of the stream,
side information included; lanes and section headers belong to no token. The error is the squared
error of the restored row in the metric, over the mean squared norm of centred rows; prediction
changes bits, not the step, so the error should not depend on the offset. The first chunk, which
holds the sinks, is left out.
"""

import argparse
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kvtc
from benchmarks.shared.text_quality import stretches
from kvtc.codec import transformers_cache as interop
from kvtc.coding.joint.prediction import token_triples
from kvtc.coding.joint.uniform_quantizer import column_classes, quantize, to_symbols
from kvtc.coding.transform import project, rows_of
from kvtc.container.stream import parse_stream
from kvtc.container.tables import STREAM_WIDE, SectionType
from kvtc.evaluate.provenance import save_result
from kvtc.huggingface.continuation import prefill
from kvtc.report.table import format_table

CHUNK = 256
ACTIVITY_BITS = 2
METHODS = (("paper", 16), ("paper", 32), ("joint", 32), ("joint", 64), ("conditional", 32), ("conditional", 64))
GROUPS = ((0, 1), (1, 2), (2, 3), (3, 4), (4, 16), (16, 64), (64, 128), (128, 192), (192, 255), (255, 256))


def weighted_rows(calibration: kvtc.Calibration, cache: kvtc.KVCache) -> torch.Tensor:
    """Joint rows [T, 2 p] of a cache, un-rotated and in the metric."""
    positions, length = cache.resolved_positions(), cache.resolved_rope_length()
    unrotated = calibration.geometry.rope.unrotate(cache.keys, positions, length)
    return calibration.joint.metric.weigh(torch.cat([rows_of(unrotated), rows_of(cache.values)], dim=1))


def token_bits(calibration: kvtc.Calibration, rows: torch.Tensor, ids: torch.Tensor, stream: bytes) -> np.ndarray:
    """Bits [T] that each token's symbols take in a stream of `joint` or `conditional`."""
    joint = calibration.joint
    parsed = parse_stream(stream)
    (step,) = struct.unpack("<f", parsed.read(SectionType.RATE, STREAM_WIDE, 4))
    coefficients, model = project(rows, joint.basis.mean, joint.basis.vectors.float()), joint.coefficients
    if parsed.header.profile == "conditional":
        triples = token_triples(ids.numpy(), np.arange(len(ids)), CHUNK)
        coefficients = coefficients @ joint.tokens.rotation.float() - joint.tokens.predictor.predict(triples)
        model = joint.tokens.coefficients
    classes = column_classes(model.deviations, step)
    values = np.ascontiguousarray(quantize(coefficients[:, : len(classes)], step).numpy().T)
    return model.tables.token_costs(to_symbols(values), classes).min(axis=0) + ACTIVITY_BITS


def by_offset(figures: list[np.ndarray]) -> list[dict[str, float]]:
    """Figures [T] of several texts -> mean and standard error in each of GROUPS, all chunks but the
    first together.
    """
    chunks = np.concatenate([f[CHUNK : len(f) // CHUNK * CHUNK].reshape(-1, CHUNK) for f in figures])
    found = []
    for start, stop in GROUPS:
        # Tokens of one chunk go together: the error is that of means of chunks.
        means = chunks[:, start:stop].mean(axis=1)
        error = means.std(ddof=1) / len(means) ** 0.5
        found.append({"first": start, "last": stop - 1, "mean": float(means.mean()), "standard_error": float(error)})
    return found


def measure(options: argparse.Namespace) -> dict[str, dict[str, list[np.ndarray]]]:
    """Errors, and bits but for `paper`, by method: [T] of each text."""
    model, tokenizer = kvtc.reference_model(dtype="bfloat16")
    calibration = kvtc.reference_calibration()
    codecs = {
        f"{name} {ratio}x": kvtc.Codec(calibration, name, ratio=ratio, window_tokens=0) for name, ratio in METHODS
    }
    found: dict[str, dict[str, list[np.ndarray]]] = {name: {"error": [], "bits": []} for name in codecs}
    for ids in stretches(tokenizer, options):
        cache: Any = interop.from_transformers(prefill(model, ids), calibration.geometry)
        rows = weighted_rows(calibration, cache)
        scale = (rows - calibration.joint.basis.mean).square().sum(dim=1).mean()
        for name, codec in codecs.items():
            stream = codec.encode(cache, ids)
            restored = weighted_rows(calibration, codec.decode(stream, ids))
            found[name]["error"].append(((restored - rows).square().sum(dim=1) / scale).numpy())
            if not name.startswith("paper"):
                found[name]["bits"].append(token_bits(calibration, rows, ids, stream))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="held-out text files")
    parser.add_argument("--tokens", type=int, default=2048, help="of a text")
    parser.add_argument("--texts-per-file", type=int, default=4)
    options = parser.parse_args()
    started = time.perf_counter()
    found = measure(options)
    tables = {
        what: {name: by_offset(figures[what]) for name, figures in found.items() if figures[what]}
        for what in ("bits", "error")
    }
    for what, scale, unit in (("bits", 1, "bits"), ("error", 100, "error, % of variance")):
        groups = [f"{start}" if stop == start + 1 else f"{start}..{stop - 1}" for start, stop in GROUPS]
        rows = [
            [group, *(f"{scale * line[i]['mean']:.2f} +-{scale * line[i]['standard_error']:.2f}" for line in tables[what].values())]
            for i, group in enumerate(groups)
        ]  # fmt: skip
        print(f"\n{unit}\n\n{format_table(['offset', *tables[what]], rows)}")
    result = {"kind": "chunk_offsets", "seconds": round(time.perf_counter() - started, 1), **tables}
    save_result("error_by_offset", result)


if __name__ == "__main__":
    main()
