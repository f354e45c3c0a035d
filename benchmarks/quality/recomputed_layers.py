"""The recompute dial: the first m layers are not stored but computed again from the token ids, and
help to predict the others.

    python -m benchmarks.quality.recomputed_layers --calibration-text FILE... --text FILE... --texts-per-file 2 [--layers 0 1 2 3]

What is coded of the layers from m on is what a regression leaves over: on the features of the token
and its two predecessors and, of the token itself, on the exact un-rotated keys and values of the
layers before m. All by the product's own functions and with its metric; m = 0 is `conditional` with
linear prediction. Decoding runs the first m layers of the model, so streams hold nothing of them.
Sinks are exact, there is no window. Ratios count the original bytes of all layers.
"""

import argparse
import copy
import struct
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

import kvtc
from benchmarks.quality.pipeline_steps import SINK_TOKENS, Rows
from benchmarks.shared.calibrations import add_calibration_arguments, sequences
from benchmarks.shared.text_quality import add_text_arguments, measure, print_qualities, stretches
from kvtc.backends import ReferenceBackend
from kvtc.calibration.entropy import fit_coefficients
from kvtc.calibration.joint_fit import TABLE_ROWS, WeightedRows
from kvtc.calibration.prediction_fit import REGRESSION_RIDGE
from kvtc.calibration.rows import CHUNK_TOKENS
from kvtc.coding.joint.prediction import token_features, token_triples
from kvtc.coding.joint.uniform_quantizer import column_classes
from kvtc.coding.transform import cache_side_of, rows_of
from kvtc.evaluate.derived import FewerBytes, fewer_bytes
from kvtc.evaluate.methods import Cost
from kvtc.evaluate.provenance import save_result
from kvtc.evaluate.schema import RECOMPUTE, QualityRecord, RecomputePoint
from kvtc.huggingface.continuation import prefill
from kvtc.profiles.joint.chunk_bytes import join_integers, split_integers
from kvtc.report.table import format_table

HEADER, LENGTH = struct.Struct("<If"), struct.Struct("<I")
TIMED_RATIO = 64
BACKEND = ReferenceBackend(torch.device("cpu"))


class Moments:
    """Second moments of token features and weighted joint rows, [f + 2 p] squared, from one pass;
    and a sample of both.
    """

    def __init__(self, rows: Rows, joint) -> None:
        self.table, self.metric = joint.tokens.predictor.table, joint.metric
        weighted = WeightedRows(rows.keys, rows.values, self.metric)
        self.n_rows = weighted.n_rows
        chosen = torch.zeros(self.n_rows, dtype=torch.bool)
        chosen[np.random.default_rng(0).permutation(self.n_rows)[:TABLE_ROWS]] = True
        total, sample, start = 0.0, [], 0
        for block in weighted.blocks():
            part = slice(start, start + len(block))
            both = torch.cat([token_features(self.table, rows.triples[part]), block], dim=1)
            total = total + (both.T @ both).double()
            sample.append(both[chosen[part]])
            start += len(block)
        self.total, self.sample = total, torch.cat(sample)
        self.n_features = self.total.shape[0] - block.shape[1]


class Scheme:
    """Fitted coding of the layers from m on."""

    def __init__(self, model, geometry: kvtc.CacheGeometry, moments: Moments, m: int, rank: int) -> None:
        self.m, self.geometry, self.metric, self.table = m, geometry, moments.metric, moments.table
        is_exact = torch.zeros(2, geometry.n_layers, geometry.row_features // geometry.n_layers, dtype=torch.bool)
        is_exact[:, :m] = True
        self.is_exact = is_exact.flatten()
        f = moments.n_features
        known = torch.cat([torch.arange(f), f + self.is_exact.nonzero()[:, 0]])
        coded = f + (~self.is_exact).nonzero()[:, 0]
        of_known, across = moments.total[known][:, known], moments.total[known][:, coded]
        # The last token feature is 1, so its products are sums. Features of tokens are about one; others by their variance.
        variances = of_known.diagonal() - moments.total[f - 1, known].square() / moments.n_rows
        ridge = torch.where(torch.arange(len(known)) < f, float(moments.n_rows), variances) * REGRESSION_RIDGE
        weights = torch.linalg.solve(of_known + ridge.diag(), across)
        left = moments.total[coded][:, coded] - across.T @ weights - weights.T @ across + weights.T @ of_known @ weights
        self.vectors = torch.linalg.eigh((left + left.T) / 2).eigenvectors.flip(1)[:, :rank].float().contiguous()
        self.weights = weights.float()
        residual = moments.sample[:, coded] - moments.sample[:, known] @ self.weights
        self.coefficients = fit_coefficients(residual @ self.vectors)
        self.left = float(left.diagonal().sum()) / moments.n_rows
        self._first = first_layers(model, m)

    def recompute(self, token_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [H, T, D] of the first m layers."""
        if not self.m:
            return []
        return [(layer.keys[0], layer.values[0]) for layer in prefill(self._first, token_ids).layers]

    def rows(self, layers: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Weighted joint rows [T, 2 p] of the first layers, the others zero."""
        n_tokens, n_layers = layers[0][0].shape[1], self.geometry.n_layers
        keys, values = (torch.stack(of_kind) for of_kind in zip(*layers, strict=True))
        rope = self.geometry.rope.slice_layers(0, len(layers))
        sides = rope.unrotate(keys, torch.arange(n_tokens), n_tokens), values
        padded = [
            torch.nn.functional.pad(side.float(), (0, 0, 0, 0, 0, 0, 0, n_layers - len(layers))) for side in sides
        ]
        return self.metric.weigh(torch.cat([rows_of(side) for side in padded], dim=1))

    def predicted(self, token_ids: Tensor, first: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Weighted features [T, q] of the coded layers."""
        positions = np.arange(len(token_ids))
        features = token_features(self.table, token_triples(token_ids.numpy(), positions, CHUNK_TOKENS))
        if first:
            features = torch.cat([features, self.rows(first)[:, self.is_exact]], dim=1)
        return features @ self.weights

    def layers_of(self, weighted: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted features [T, q] of the coded layers -> their keys and values [L - m, H, T, D],
        rotated.
        """
        full = torch.zeros(len(weighted), len(self.is_exact))
        full[:, ~self.is_exact] = weighted
        shape = self.geometry.n_layers, self.geometry.n_kv_heads
        keys, values = (cache_side_of(side, *shape) for side in self.metric.unweigh(full).chunk(2, dim=1))
        rotated = self.geometry.rope.rotate(keys, torch.arange(len(weighted)), len(weighted))
        return rotated[self.m :], values[self.m :]


def first_layers(model, m: int):
    """A model of the first m layers, which are shared."""
    first = copy.deepcopy(model)
    first.model.layers = first.model.layers[:m]
    first.config.num_hidden_layers = m
    return first


def chunks(n_tokens: int) -> Iterator[slice]:
    """Of the tokens after the sinks, on the codec's grid."""
    bounds = sorted({SINK_TOKENS, *range(CHUNK_TOKENS, n_tokens, CHUNK_TOKENS), n_tokens})
    return (slice(*pair) for pair in pairwise(bounds))


@dataclass(frozen=True)
class Recomputing:
    """A scheme at a step, as a method of evaluation.

    Stream: tokens and step; sinks of the coded layers in 16 bits; of each chunk the length and the
    integers.
    """

    scheme: Scheme
    step: float

    @cached_property
    def classes(self) -> np.ndarray:
        return column_classes(self.scheme.coefficients.deviations, float(np.float32(self.step)))

    def encode(self, _model: Any, cache: Any, token_ids: Tensor, /) -> bytes:
        scheme, tables = self.scheme, self.scheme.coefficients.tables
        layers = [(layer.keys[0], layer.values[0]) for layer in cache.layers]
        residual = scheme.rows(layers)[:, ~scheme.is_exact] - scheme.predicted(token_ids, layers[: scheme.m])
        coefficients = residual @ scheme.vectors
        sinks = torch.stack([torch.stack(layer) for layer in layers[scheme.m :]])[:, :, :, :SINK_TOKENS].contiguous()
        parts = [HEADER.pack(len(token_ids), self.step), sinks.view(torch.uint8).numpy().tobytes()]
        for chunk in chunks(len(token_ids)):
            rounded = BACKEND.round(coefficients[chunk], float(np.float32(self.step)), self.classes, tables)
            whole = [slice(0, len(rounded.activities))]
            data = join_integers(BACKEND.write_integers(rounded, whole, self.classes, tables)[0])
            parts += [LENGTH.pack(len(data)), data]
        return b"".join(parts)

    def decode(self, stream: bytes, token_ids: Tensor, /) -> Any:
        scheme = self.scheme
        n_tokens, step = HEADER.unpack_from(stream)
        n_sinks, at = self._sink_bytes, HEADER.size
        sinks = torch.frombuffer(bytearray(stream[at : at + n_sinks]), dtype=torch.bfloat16)
        at += n_sinks
        first = scheme.recompute(token_ids)
        weighted = scheme.predicted(token_ids, first)
        for chunk in chunks(n_tokens):
            (size,) = LENGTH.unpack_from(stream, at)
            data = stream[at + LENGTH.size : at + LENGTH.size + size]
            at += LENGTH.size + size
            tables = scheme.coefficients.tables
            parts = split_integers(data, chunk.stop - chunk.start, self.classes, tables, step)
            coefficients = BACKEND.read_integers([parts], len(self.classes))
            weighted[chunk] += coefficients @ scheme.vectors[:, : len(self.classes)].T
        keys, values = (side.to(torch.bfloat16) for side in scheme.layers_of(weighted))
        shape = len(keys), 2, scheme.geometry.n_kv_heads, SINK_TOKENS, scheme.geometry.head_dim
        exact = sinks.reshape(shape)
        keys[:, :, :SINK_TOKENS], values[:, :, :SINK_TOKENS] = exact[:, 0], exact[:, 1]
        restored = DynamicCache()
        for index, (key, value) in enumerate([*first, *zip(keys, values, strict=True)]):
            restored.update(key[None].contiguous(), value[None].contiguous(), index)
        return restored

    def measure(self, stream: bytes, /) -> Cost:
        n_tokens, _ = HEADER.unpack_from(stream)
        original = 4 * self.scheme.geometry.row_features * n_tokens
        return Cost(n_tokens, n_tokens - SINK_TOKENS, original, len(stream) - self._sink_bytes, len(stream))

    @property
    def _sink_bytes(self) -> int:
        geometry = self.scheme.geometry
        return 4 * geometry.row_features * SINK_TOKENS * (geometry.n_layers - self.scheme.m) // geometry.n_layers


def label(m: int) -> str:
    return f"{m} layers recomputed"


def timed_points(model, ids: Tensor, timed: dict[int, Recomputing], repeats: int):
    """Points, and seconds of recomputation alone by label: medians of interleaved runs."""
    cache = prefill(model, ids)
    streams = {m: method.encode(model, cache, ids) for m, method in timed.items()}
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(repeats):
        runs = {("prefill", 0): lambda: prefill(model, ids)}
        for m, method in timed.items():
            runs["encode", m] = lambda method=method: method.encode(model, cache, ids)
            runs["decode", m] = lambda method=method, m=m: method.decode(streams[m], ids)
            runs["recompute", m] = lambda method=method: method.scheme.recompute(ids)
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            found.setdefault(name, []).append(time.perf_counter() - started)
    seconds = {name: round(median(of_name), 5) for name, of_name in found.items()}
    for m in timed:
        share = seconds["recompute", m] / seconds["prefill", 0]
        print(f"{label(m)}: {seconds['recompute', m]:.4f} s, {share:.2f} of a prefill")
    points = []
    for m, stream in streams.items():
        original = timed[m].measure(stream).original_bytes
        times = seconds["prefill", 0], seconds["encode", m], seconds["decode", m]
        points.append(RecomputePoint(f"{label(m)} {TIMED_RATIO}x", len(ids), *times, original, len(stream)))
    return points, {label(m): seconds["recompute", m] for m in timed}


def print_factors(figures: list[FewerBytes]) -> None:
    """Times fewer body bytes at the KL of each point without recomputation."""
    series = list(dict.fromkeys(figure.series for figure in figures))
    found = {(figure.series, figure.at): figure for figure in figures}
    points = list(dict.fromkeys((figure.at, figure.kl) for figure in figures))

    def shown(figure: FewerBytes | None) -> str:
        if figure is None or figure.body_factor is None:
            return "-"
        return f"{'>= ' * figure.is_bound}{figure.body_factor:.2f}x"

    rows = [[at, f"{kl:.5f}", *(shown(found.get((one, at))) for one in series)] for at, kl in points]
    print(format_table(["at the KL of", "KL", *series], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_arguments(parser)
    add_calibration_arguments(parser)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 1, 2, 3], help="how many are recomputed")
    parser.add_argument("--ratios", type=float, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument("--joint-rank", type=int, default=640)
    parser.add_argument("--repeats", type=int, default=15, help="timed runs")
    options = parser.parse_args()
    started = time.perf_counter()
    model, tokenizer = kvtc.reference_model(dtype="bfloat16")
    shipped = kvtc.reference_calibration()
    geometry = shipped.geometry
    rows = Rows(model, sequences(options.calibration_text, tokenizer), geometry, options.calibration_tokens)
    moments = Moments(rows, shipped.joint)
    schemes = {m: Scheme(model, geometry, moments, m, options.joint_rank) for m in options.layers}
    print(f"fitted in {time.perf_counter() - started:.0f} s", flush=True)
    token_bits = 32 * geometry.row_features
    methods = {
        f"{label(m)} {ratio:g}x": Recomputing(scheme, scheme.coefficients.step_for(token_bits / ratio))
        for m, scheme in schemes.items()
        for ratio in options.ratios
    }
    qualities = measure(model, tokenizer, methods, options)
    print_qualities(qualities)
    series = [label(m) for m in options.layers[1:]]
    of_plain = [figure for figure in fewer_bytes({0: qualities}, series) if figure.at.startswith(label(0))]
    print_factors(of_plain)
    ids = next(iter(stretches(tokenizer, options)))[: options.tokens - options.continuation - 1]
    timed = {m: methods[f"{label(m)} {TIMED_RATIO}x"] for m in options.layers}
    points, recompute_seconds = timed_points(model, ids, timed, options.repeats)
    result = {
        "kind": RECOMPUTE,
        "seconds": round(time.perf_counter() - started, 1),
        "calibration_tokens": options.calibration_tokens,
        "joint_rank": options.joint_rank,
        "n_layers": geometry.n_layers,
        "qualities": [asdict(QualityRecord(**asdict(quality), window_tokens=0)) for quality in qualities],
        "factors": [asdict(figure) for figure in of_plain],
        "variance_left": {label(m): scheme.left for m, scheme in schemes.items()},
        "recompute_seconds": recompute_seconds,
        "points": [asdict(point) for point in points],
    }
    save_result("recomputed_layers", result)


if __name__ == "__main__":
    main()
