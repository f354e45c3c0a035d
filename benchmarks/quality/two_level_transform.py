"""Whether a transform in two levels, inside groups of layers and across them, makes decoding
cheaper at equal bytes and error.

    python -m benchmarks.quality.two_level_transform --text FILE... [--ratios 16 64 256] [--groups 2 3 4 6 12]

Flat, a token costs n * 2 p multiply-adds from n coefficients to the features. In two levels each
group's features follow from few coefficients of its own, and these from the shared ones: K * (n + 2
p / G) for G groups that keep K coefficients together. The shared basis V (in the metric) becomes
blockdiag(U_g U_g^T) V: U_g are the leading left singular vectors of group g's rows of V times the
deviations; which are kept is decided over all groups at once. Both may use fewer shared
coefficients than there are. The encoder is the flat one, so bytes are equal; each is taken as small
as held-out rows in the metric allow at most 2 % more error.
"""

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

import kvtc
from benchmarks.shared.text_quality import add_text_arguments, measure, print_qualities, stretches
from benchmarks.shared.timing import best
from kvtc.coding.product import Columns
from kvtc.coding.transform import rows_of
from kvtc.evaluate.provenance import save_result
from kvtc.huggingface.models import capture
from kvtc.profiles.joint.transform import by_layer
from kvtc.report.table import format_table

MORE_ERROR = 1.02
SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Of the shared coefficients that the first level may use."""
SINK_TOKENS = 4
TIMED_TOKENS, TIMED_SHARE = 256, 8
GEOMETRIES = {"Llama 3.1 8B": (65_536, 32), "Mistral NeMo 12B": (81_920, 40)}
"""Joint features 2 p, layers."""
RANK = 10_000


@dataclass(frozen=True)
class Decoded:
    """Held-out rows [T, 2 p] in the metric less their mean, and what a codec decoded of them:
    coefficients [T, n] in the basis.
    """

    rows: Tensor
    coefficients: Tensor
    is_rotated: bool


@dataclass(frozen=True)
class Levels:
    """One transform. groups: 1 for the flat one. shared: coefficients used. kept: those of all
    groups together, 0 for flat ones.

    error: squared error over that of the whole flat transform. multiply_adds: a token.
    """

    groups: int
    shared: int
    kept: int
    error: float
    multiply_adds: int


def decoded_rows(codec: kvtc.Codec, calibration: kvtc.Calibration, texts: list[tuple[kvtc.KVCache, Tensor]]) -> Decoded:
    """Encode and decode; the coefficients are those that the inverse transform gets."""
    joint, transform = calibration.joint, codec._encoder._model.transform()
    plain = transform.packed
    got: list[Tensor] = []
    transform.packed = lambda values: (got.append(values), plain(values))[1]
    rows, coefficients = [], []
    for cache, ids in texts:
        codec.decode(codec.encode(cache, ids), ids)
        keys = calibration.geometry.rope.unrotate(cache.keys, cache.resolved_positions(), cache.resolved_rope_length())
        both = torch.cat([rows_of(keys), rows_of(cache.values)], dim=1)[SINK_TOKENS:]
        rows.append(joint.metric.weigh(both) - joint.basis.mean)
        coefficients.append(got[-1].float())
    transform.packed = plain
    rank = max(values.shape[1] for values in coefficients)
    padded = torch.cat([torch.nn.functional.pad(values, (0, rank - values.shape[1])) for values in coefficients])
    if codec._encoder._model._tokens is None:
        return Decoded(torch.cat(rows), padded, is_rotated=False)
    return Decoded(torch.cat(rows), padded @ joint.tokens.rotation.float().T, is_rotated=True)


def features_of(group: int, groups: int, n_layers: int, n_features: int) -> Tensor:
    """Indices of the keys and values of a group's layers in the joint row."""
    layers = torch.arange(n_features).reshape(2, n_layers, -1)
    return layers[:, group * n_layers // groups : (group + 1) * n_layers // groups].flatten()


def group_bases(calibration: kvtc.Calibration, groups: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of each group: its features, its directions U_g, and how much of the shared coefficients'
    variance each carries.
    """
    vectors = calibration.joint.basis.vectors.float()
    deviations = torch.from_numpy(calibration.joint.coefficients.deviations)
    for group in range(groups):
        features = features_of(group, groups, calibration.geometry.n_layers, len(vectors))
        directions, scales, _ = torch.linalg.svd(vectors[features] * deviations, full_matrices=False)
        yield features, directions, scales


def flat_levels(calibration: kvtc.Calibration, decoded: Decoded) -> list[Levels]:
    """The flat transform with all coefficients it gets, and with as few of them as the error
    allows.
    """
    n = decoded.coefficients.shape[1]
    vectors = calibration.joint.basis.vectors.float()[:, :n]
    along = decoded.rows @ vectors
    # Of orthonormal columns: what each coefficient takes off the error of restoring nothing.
    gains = (along.square() - (along - decoded.coefficients).square()).double().sum(dim=0).cumsum(0)
    errors = (decoded.rows.double().square().sum() - gains) / (decoded.rows.double().square().sum() - gains[-1])
    fewest = int((errors <= MORE_ERROR).nonzero()[0]) + 1
    # Where coefficients are rotated, fewer of them are a product of their own.
    turning = n * fewest if decoded.is_rotated else 0
    whole = Levels(1, n, 0, 1.0, n * len(vectors))
    fewer = Levels(1, fewest, 0, float(errors[fewest - 1]), turning + fewest * len(vectors))
    return [whole, fewer]


def two_levels(calibration: kvtc.Calibration, decoded: Decoded, groups: int) -> Levels | None:
    """The cheapest with so many groups that keeps to the error; None where none does."""
    n = decoded.coefficients.shape[1]
    vectors = calibration.joint.basis.vectors.float()[:, :n]
    n_features = len(vectors)
    flat_error = float((decoded.rows - decoded.coefficients @ vectors.T).double().square().sum())
    energy = float(decoded.rows.double().square().sum())
    bases = list(group_bases(calibration, groups))
    order = torch.cat([scales for *_, scales in bases]).argsort(descending=True)
    found = []
    for share in SHARES:
        shared = round(share * n)
        gains = []
        for features, directions, _ in bases:
            along = decoded.rows[:, features] @ directions
            restored = decoded.coefficients[:, :shared] @ (directions.T @ vectors[features, :shared]).T
            gains.append((along.square() - (along - restored).square()).double().sum(dim=0))
        errors = (energy - torch.cat(gains)[order].cumsum(0)) / flat_error
        enough = (errors <= MORE_ERROR).nonzero()
        if len(enough):
            kept = int(enough[0]) + 1
            turning = n * shared if decoded.is_rotated and shared < n else 0
            cost = turning + kept * (shared + n_features // groups)
            found.append(Levels(groups, shared, kept, float(errors[kept - 1]), cost))
    return min(found, key=lambda levels: levels.multiply_adds, default=None)


def approximated(calibration: kvtc.Calibration, levels: Levels) -> Tensor:
    """The basis [2 p, r] that a transform comes to; unused columns are zero."""
    vectors = calibration.joint.basis.vectors.float().clone()
    vectors[:, levels.shared :] = 0
    if levels.groups == 1:
        return vectors
    bases = list(group_bases(calibration, levels.groups))
    least = torch.cat([scales for *_, scales in bases]).sort(descending=True).values[levels.kept - 1]
    for features, directions, scales in bases:
        used = directions[:, scales >= least]
        vectors[features] = used @ (used.T @ vectors[features])
    return vectors


def codec_with(calibration: kvtc.Calibration, profile: str, ratio: float, levels: Levels) -> kvtc.Codec:
    """It writes what the flat one writes, and decodes by the approximated basis."""
    codec = kvtc.Codec(calibration, profile, ratio=ratio, window_tokens=0)
    transform, joint = codec._encoder._model.transform(), calibration.joint
    basis = approximated(calibration, levels)
    turned = basis if codec._encoder._model._tokens is None else basis @ joint.tokens.rotation.float()
    synthesis = joint.metric.unweigh(turned.T)
    transform._synthesis = [Columns(columns) for columns in by_layer(synthesis, len(transform._synthesis))]
    return codec


def timed(features: int, groups: int, repeats: int = 7) -> dict[str, float | int]:
    """Seconds of the products of an eighth of the groups' features, flat and with 1.3 times fewer
    multiply-adds, by turns.
    """
    inner = int(RANK * features / (1.3 * (RANK * groups + features)))
    some = max(1, groups // TIMED_SHARE)
    width = features // groups
    coefficients = torch.randn(TIMED_TOKENS, RANK)
    flat, across = torch.randn(RANK, some * width), torch.randn(RANK, some * inner)
    inside = torch.randn(some, inner, width)

    def in_two_levels() -> Tensor:
        between = (coefficients @ across).reshape(TIMED_TOKENS, some, inner).transpose(0, 1)
        return torch.bmm(between, inside)

    seconds: dict[str, list[float]] = {"flat": [], "two_levels": []}
    for _ in range(repeats):
        seconds["flat"].append(best(lambda: coefficients @ flat, 1))
        seconds["two_levels"].append(best(in_two_levels, 1))
    ratio = min(seconds["flat"]) / min(seconds["two_levels"])
    return {
        "coefficients_of_a_group": inner,
        "share_of_its_features": round(inner / width, 3),
        "times_faster": round(ratio, 2),
    }


def fewer_in(features: int, levels: Levels, whole: Levels, is_rotated: bool) -> float:
    """How many times fewer multiply-adds than flat in another geometry, where as large a share of
    the coefficients is kept.
    """
    shared = RANK * levels.shared / whole.shared
    turning = RANK * shared if is_rotated and shared < RANK else 0
    if levels.groups == 1:
        return RANK * features / (turning + shared * features)
    kept = RANK * levels.kept / whole.shared
    return RANK * features / (turning + kept * (shared + features / levels.groups))


def costs() -> Iterator[dict[str, object]]:
    """What two levels may keep in the geometry of larger models, so that they take 1.3 times fewer
    multiply-adds than flat.
    """
    for name, (features, layers) in GEOMETRIES.items():
        for groups in (4, 8, layers):
            yield {"model": name, "features": features, "groups": groups, **timed(features, groups)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_arguments(parser)
    parser.add_argument("--ratios", type=float, nargs="+", default=[16, 64, 256])
    parser.add_argument("--profiles", nargs="+", default=["joint", "conditional"])
    parser.add_argument("--groups", type=int, nargs="+", default=[2, 3, 4, 6, 12])
    options = parser.parse_args()
    model, tokenizer = kvtc.reference_model(dtype="bfloat16")
    calibration = kvtc.reference_calibration()
    n_cached = options.tokens - options.continuation - 1
    texts = [
        (capture(model, ids[:n_cached], calibration.geometry), ids[:n_cached]) for ids in stretches(tokenizer, options)
    ]
    found: list[tuple[str, float, Levels]] = []
    at_same_shares: list[dict[str, object]] = []
    methods: dict[str, kvtc.Codec] = {}
    for profile in options.profiles:
        for ratio in options.ratios:
            codec = kvtc.Codec(calibration, profile, ratio=ratio, window_tokens=0)
            decoded = decoded_rows(codec, calibration, texts)
            flat = flat_levels(calibration, decoded)
            several = [levels for g in options.groups if (levels := two_levels(calibration, decoded, g)) is not None]
            for levels in [*flat, *several]:
                found.append((profile, ratio, levels))
                fewer = {
                    name: round(fewer_in(features, levels, flat[0], decoded.is_rotated), 2)
                    for name, (features, _) in GEOMETRIES.items()
                }
                at_same_shares.append({"profile": profile, "ratio": ratio, "groups": levels.groups, **fewer})
            cheapest = min(several, key=lambda levels: levels.multiply_adds)
            for name, levels in (("flat", flat[0]), ("flat, fewer", flat[1]), ("two levels", cheapest)):
                methods[f"{profile} {ratio:g}x {name}"] = codec_with(calibration, profile, ratio, levels)
    print(table_of(found))
    larger = list(costs())
    for lines in (at_same_shares, larger):
        print()
        print(format_table(list(lines[0]), [[str(value) for value in line.values()] for line in lines]))
    qualities = measure(model, tokenizer, methods, options)
    print_qualities(qualities)
    result = {
        "most_error": MORE_ERROR,
        "transforms": [{"profile": profile, "ratio": ratio, **asdict(levels)} for profile, ratio, levels in found],
        "at_the_same_shares": at_same_shares,
        "products": {"rank": RANK, "tokens": TIMED_TOKENS, "fewer_multiply_adds": 1.3, "lines": larger},
        "qualities": [asdict(quality) for quality in qualities],
    }
    save_result("two_level_transform", result)


def table_of(found: Iterable[tuple[str, float, Levels]]) -> str:
    header = ["profile", "ratio", "groups", "shared", "kept", "error", "multiply-adds", "fewer than flat"]
    rows, whole = [], 1
    for profile, ratio, levels in found:
        whole = levels.multiply_adds if levels.error == 1 and not levels.kept else whole
        fewer = f"{whole / levels.multiply_adds:.2f}x"
        numbers = levels.groups, levels.shared, levels.kept, f"{levels.error:.4f}", levels.multiply_adds
        rows.append([profile, f"{ratio:g}", *map(str, numbers), fewer])
    return format_table(header, rows)


if __name__ == "__main__":
    main()
