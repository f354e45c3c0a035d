"""Tiny geometries, caches, calibrations and streams, the same on every run."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Iterable
from dataclasses import fields, replace
from functools import cache as remember
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvtc.cache import CacheGeometry, KVCache
from kvtc.calibration import Calibration, SideCalibration
from kvtc.calibration.artifact import CodedGroup
from kvtc.calibration.conditional_calibration import ConditionalCalibration
from kvtc.calibration.fit import FitOptions, fit
from kvtc.calibration.gradients import GradientSample
from kvtc.calibration.joint_calibration import CoefficientModel, JointCalibration
from kvtc.calibration.quality_curve import QualityCurve
from kvtc.calibration.rows import CalibrationRows
from kvtc.codec.codec import Codec
from kvtc.codec.inspection import inspect
from kvtc.coding.joint.basis import JointBasis
from kvtc.coding.joint.blocks import HeadBlocks
from kvtc.coding.joint.importance import Importance
from kvtc.coding.joint.metric import Metric
from kvtc.coding.joint.probability import ProbabilityTables
from kvtc.coding.paper.distortion import DistortionTable
from kvtc.coding.product import product
from kvtc.coding.rope import NO_ROTATION, Rope, RopeTable
from kvtc.coding.transform import Basis, cache_side_of, rows_of
from kvtc.container.parts import join_streams, split_stream
from kvtc.errors import InvalidArgument
from kvtc.process.torch_state import neutral_torch_state
from kvtc.recomputation import Recomputation, Recomputed

N_LAYERS, N_HEADS, HEAD_DIM = 3, 2, 8
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2]
NAMES = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
SINK_TOKENS = 4
LATENT = 8

# The layout of docs/format.md, restated here so that tests do not believe the writer.
HEADER_BYTES, GROUP_BYTES, RUN_BYTES, CHUNK_BYTES, SECTION_BYTES = 40, 20, 4, 20, 20
N_GROUPS_AT, CHUNK_TOKENS_AT, N_CHUNKS_AT, N_SECTIONS_AT, HEADER_CHECKSUM_AT = 7, 24, 28, 32, 36
CHUNKS_AT = HEADER_BYTES + GROUP_BYTES + RUN_BYTES
"""Of a stream with one group of neighbouring layers."""


@remember
def tiny_geometry() -> CacheGeometry:
    """3 layers, 2 key-value heads, head_dim 8, half-split rotation in every layer: p = 48."""
    table = RopeTable(tuple((10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)).tolist()))
    return CacheGeometry(tuple(range(N_LAYERS)), 0, N_HEADS, HEAD_DIM, HEAD_DIM, Rope((table,), (0,) * N_LAYERS))


def random_cache(
    n: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    first_position: int = 0,
    geometry: CacheGeometry | None = None,
) -> KVCache:
    """A cache of `n` tokens with a few strong directions and a little noise, as real ones have."""
    geometry = geometry or tiny_geometry()
    mixing = torch.Generator().manual_seed(7)
    drawn = torch.Generator().manual_seed(1000 + seed)
    sides = []
    for features in geometry.side_features:
        directions = torch.randn(LATENT, features, generator=mixing)
        strength = 0.6 ** torch.arange(LATENT)
        offset = torch.randn(features, generator=mixing)
        rows = (torch.randn(n, LATENT, generator=drawn) * strength) @ directions + offset
        rows += 0.02 * torch.randn(n, features, generator=drawn)
        sides.append(cache_side_of(rows, geometry.n_layers, geometry.n_kv_heads))
    positions = torch.arange(first_position, first_position + n)
    keys = geometry.rope.rotate(sides[0], positions, first_position + n)
    return KVCache(keys.to(dtype), sides[1].to(dtype, copy=True).contiguous(), positions if first_position else None)


def two_widths(name: str) -> CacheGeometry:
    """3 layers: "wide keys" has 2 heads with keys of 12 features, 8 of them rotated, and values of 4; "latent" latents of 16
    features with rotary parts of 4."""
    heads, key_dim, value_dim, rotated = {"wide keys": (2, 12, 4, 8), "latent": (1, 4, 16, 4)}[name]
    table = RopeTable(tuple((10000.0 ** (-torch.arange(0, rotated, 2) / rotated)).tolist()))
    return CacheGeometry(tuple(range(N_LAYERS)), 0, heads, key_dim, value_dim, Rope((table,), (0,) * N_LAYERS))


@remember
def two_widths_calibration(name: str) -> Calibration:
    """Of `random_cache` with a geometry of `two_widths`, for `paper` and `joint`; the joint basis leaves much to the remainder."""
    geometry, generator = two_widths(name), torch.Generator().manual_seed(43)
    gradients = torch.randn(128, geometry.joint_features, generator=generator)
    gradients *= 10 ** torch.rand(geometry.joint_features, generator=generator)
    sizes = gradients.norm(dim=1)
    rows = torch.randn(gradients.shape, generator=generator).half()
    directions = (gradients / sizes[:, None]).half()
    sample = GradientSample(rows, directions, sizes, geometry.n_layers * geometry.n_kv_heads, geometry.dims)
    caches = (random_cache(200, seed=20_000 + index, geometry=geometry) for index in range(4))
    return fit_caches(geometry, caches, sink_tokens=SINK_TOKENS, sample=sample, joint_rank=12)


def fit_caches(
    geometry: CacheGeometry,
    caches: Iterable[KVCache],
    token_ids: Iterable[Tensor] | None = None,
    sample: GradientSample | None = None,
    model: Recomputation | None = None,
    **options: object,
) -> Calibration:
    """A calibration of caches that are there already, and of the model with their token ids.

    options: of `CalibrationRows` and of `FitOptions`.
    """
    sizes = {name.name: options.pop(name.name) for name in fields(FitOptions) if name.name in options}
    seed = {"seed": sizes["seed"]} if "seed" in sizes else {}
    states = None if model is None else (hidden_of(model, ids) for ids in token_ids)
    largest = max(sizes.get("rank") or 4096, sizes.get("joint_rank") or 4096)
    width = 0 if model is None else TOLD_WIDTH
    rows = CalibrationRows(geometry, hidden_width=width, rank=largest, **seed, **options)
    for cache in caches:
        rows.add(cache, None if states is None else next(states))
        if rows.is_full:
            break
    recomputed = None if model is None else (model.n_layers, model.identity)
    return fit(rows, FitOptions(**sizes), sample=sample, recomputed=recomputed)


@remember
def tiny_calibration(seed: int = 0) -> Calibration:
    """Fitted to caches that `random_cache` draws with other seeds than tests use; every `seed` has its own fingerprint."""
    caches = (random_cache(200, seed=10_000 + 100 * seed + index) for index in range(10))
    return fit_caches(tiny_geometry(), caches, sink_tokens=SINK_TOKENS)


VOCABULARY = 40
TOLD_WIDTH = 36
"""Features of the hidden states of `ToldModel`."""


@neutral_torch_state
def hidden_of(model: Recomputation, token_ids: Tensor) -> Tensor:
    """The hidden states that enter the layer behind the recomputed ones."""
    return model.run(token_ids.numpy()).hidden


class ToldModel(Recomputation):
    """The first layer of a model that is not there: its hidden state is made of a token and its two predecessors."""

    def __init__(self) -> None:
        super().__init__(1, b"told model".ljust(32))

    @neutral_torch_state
    def _go_on(self, before: Recomputed | None, token_ids: NDArray[np.int64]) -> Recomputed:
        if token_ids.min() < 0 or token_ids.max() >= VOCABULARY:
            raise InvalidArgument("outside of the vocabulary")
        embeddings = torch.randn(
            VOCABULARY, TOLD_WIDTH // 3, dtype=torch.float32, generator=torch.Generator().manual_seed(11)
        )
        now = embeddings[torch.from_numpy(token_ids)]
        if before is not None:
            now = torch.cat([before.hidden[:, : TOLD_WIDTH // 3], now])
        hidden = torch.cat(
            [0.4**back * torch.nn.functional.pad(now, (0, 0, back, 0))[: len(now)] for back in range(3)], 1
        )
        rows = product(hidden, told_mixing()) + told_offset()
        geometry = tiny_geometry()
        keys, values = (cache_side_of(side, N_LAYERS, N_HEADS)[:1].contiguous() for side in rows.chunk(2, dim=1))
        first = geometry.rope.of_layers([0])
        return Recomputed(0, hidden, first.rotate(keys, torch.arange(len(hidden)), len(hidden)), values)


@remember
def told_model() -> ToldModel:
    """The only one: what it computed last may be used again."""
    return ToldModel()


@remember
@neutral_torch_state
def told_mixing() -> Tensor:
    """[TOLD_WIDTH, P]: what a hidden state says of the rows."""
    return torch.randn(
        TOLD_WIDTH, tiny_geometry().joint_features, dtype=torch.float32, generator=torch.Generator().manual_seed(17)
    )


@remember
@neutral_torch_state
def told_offset() -> Tensor:
    """[P]: the mean row."""
    return torch.randn(tiny_geometry().joint_features, dtype=torch.float32, generator=torch.Generator().manual_seed(18))


def told_ids(n: int, seed: int = 0) -> Tensor:
    """Token ids [n] that `told_cache` of the same seed belongs to; a shorter text is a prefix of a longer one."""
    return torch.randint(VOCABULARY, (4096,), generator=torch.Generator().manual_seed(500 + seed))[:n]


def told_cache(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> KVCache:
    """A cache of `told_model`: its first layer follows from token ids, the others from the hidden state and latent noise."""
    geometry, places = tiny_geometry(), torch.arange(n)
    features = geometry.joint_features
    drawn = torch.randn(4096, LATENT, generator=torch.Generator().manual_seed(2000 + seed))[:n]
    mixing = torch.randn(LATENT, features, generator=torch.Generator().manual_seed(19))
    noise = (drawn * 0.7 ** torch.arange(LATENT)) @ mixing
    noise += 0.02 * torch.randn(4096, features, generator=torch.Generator().manual_seed(3000 + seed))[:n]
    for side in noise.chunk(2, dim=1):
        side[:, : N_HEADS * HEAD_DIM] = 0
    hidden = told_model().run(told_ids(n, seed).numpy()).hidden if n else torch.zeros(0, TOLD_WIDTH)
    rows = product(hidden, told_mixing()) + told_offset() + noise
    keys, values = (cache_side_of(side, geometry.n_layers, geometry.n_kv_heads) for side in rows.chunk(2, dim=1))
    return KVCache(geometry.rope.rotate(keys, places, n).to(dtype), values.to(dtype, copy=True).contiguous())


@neutral_torch_state
def tiny_sensitivities(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sensitivities of keys and of values [L, H, D, D], some directions a thousand times those of others."""
    generator = torch.Generator().manual_seed(40 + seed)
    shape = (2, N_LAYERS, N_HEADS, HEAD_DIM, HEAD_DIM)
    factors = torch.randn(shape, generator=generator) * 30 ** -torch.linspace(0, 1, HEAD_DIM)
    keys, values = (factors @ factors.mT).double()
    return keys, values


@remember
def tiny_gradients(n: int = 512) -> GradientSample:
    """Gradients whose second moments are near `tiny_sensitivities`, of rows that have nothing to do with them."""
    generator = torch.Generator().manual_seed(41)
    roots = torch.linalg.cholesky(torch.cat([side.flatten(0, 1) for side in tiny_sensitivities()])).float()
    drawn = torch.randn(len(roots), n, HEAD_DIM, generator=generator)
    gradients = (drawn @ roots.mT).transpose(0, 1).reshape(n, -1)
    sizes = gradients.norm(dim=1)
    rows = torch.randn(gradients.shape, generator=generator).half()
    return GradientSample(rows, (gradients / sizes[:, None]).half(), sizes, N_LAYERS * N_HEADS, (HEAD_DIM, HEAD_DIM))


@remember
def joint_calibration(seed: int = 0, with_model: bool = True, joint_rank: int = 4096) -> Calibration:
    """Fitted to caches that `told_cache` makes, for all profiles; without the model not for `conditional`."""
    seeds = range(100 * (seed + 1), 100 * (seed + 1) + 6)
    return fit_caches(
        tiny_geometry(),
        (told_cache(200, seed=s) for s in seeds),
        sink_tokens=SINK_TOKENS,
        sample=tiny_gradients(),
        token_ids=(told_ids(200, s) for s in seeds),
        model=told_model() if with_model else None,
        joint_rank=joint_rank,
    )


@remember
def stepped_calibration() -> Calibration:
    """`joint_calibration` of few vectors, so that much is coded of the remainder, and with levels that differ by token."""
    calibration = joint_calibration(joint_rank=12)
    cache = told_cache(400, seed=99)
    keys = tiny_geometry().rope.unrotate(cache.keys, torch.arange(400), 400)
    rows = torch.cat([rows_of(keys), rows_of(cache.values)], dim=1)
    weights = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(3))
    weights *= 2.5 / (rows @ weights).std()
    return replace(calibration, importance=Importance(torch.cat([weights, -(rows.mean(dim=0) @ weights)[None]])))


def told_codec(profile: str | None = None, *arguments: object, **options: object) -> Codec:
    """A codec of `joint_calibration` with its model."""
    return Codec(joint_calibration(), profile, *arguments, model=told_model(), **options)


@remember
def measured_calibration() -> Calibration:
    """`joint_calibration` with made-up curves: step 0.05 is at a KL of 0.001 with `joint` and 0.002 with `conditional`."""
    curves = {
        "joint": QualityCurve(np.array([0.05, 5.0]), np.array([1e-3, 1e-1])),
        "conditional": QualityCurve(np.array([0.05, 5.0]), np.array([2e-3, 1e-1])),
    }
    return replace(joint_calibration(), quality=curves)


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are equal bit for bit: shape, dtype and values, NaN and signed zeros too."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


def same_cache(first: KVCache, second: KVCache) -> bool:
    """Whether two caches hold the same bits at the same positions."""
    return (
        same_bits(first.keys, second.keys)
        and same_bits(first.values, second.values)
        and torch.equal(first.resolved_positions(), second.resolved_positions())
        and first.resolved_rope_length() == second.resolved_rope_length()
        and first.extent == second.extent
    )


def at(cache: KVCache, tokens: slice | Tensor) -> KVCache:
    """Some tokens of a cache, at their positions."""
    return KVCache(cache.keys[:, :, tokens], cache.values[:, :, tokens], cache.resolved_positions()[tokens])


def assert_parts_decode_alone(codec: Codec, stream: bytes, ids: NDArray[np.int64]) -> None:
    """The parts of a stream are the stream, and each decodes to what the whole has at its tokens."""
    whole, parts, first = codec.decode(stream, ids), split_stream(stream), 0
    assert join_streams(parts) == stream
    for part in parts:
        n = inspect(part).n_tokens
        decoded = codec.decode(part, ids[0 if codec.needs_prefix else first : first + n])
        assert decoded.resolved_positions().tolist() == whole.resolved_positions()[first : first + n].tolist()
        torch.testing.assert_close(decoded.values, whole.values[:, :, first : first + n], rtol=2**-7, atol=1e-3)
        first += n
    assert first == len(ids)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def counts_of(stream: bytes | bytearray) -> tuple[int, int]:
    """Chunks and sections that a header claims."""
    return struct.unpack_from("<II", stream, N_CHUNKS_AT)


def section_table_at(stream: bytes | bytearray) -> int:
    """Offset of the section table by the header's own claim."""
    return groups_end(stream) + CHUNK_BYTES * counts_of(stream)[0]


def groups_end(stream: bytes | bytearray) -> int:
    """Offset of the chunk table by the claims of the group table."""
    entries = [HEADER_BYTES + GROUP_BYTES * index for index in range(stream[N_GROUPS_AT])]
    n_runs = sum(
        struct.unpack_from("<H", stream, entry + 2)[0] for entry in entries if entry + GROUP_BYTES <= len(stream)
    )
    return HEADER_BYTES + GROUP_BYTES * len(entries) + RUN_BYTES * n_runs


def sections_of(stream: bytes | bytearray) -> list[tuple[int, int, int]]:
    """(offset of the table entry, offset of the bytes, their number) of each section; stops where the bytes end."""
    table, (_, n_sections) = section_table_at(stream), counts_of(stream)
    found, start = [], table + SECTION_BYTES * n_sections
    for number in range(n_sections):
        entry = table + SECTION_BYTES * number
        if entry + SECTION_BYTES > len(stream):
            break
        (stored,) = struct.unpack_from("<I", stream, entry + 12)
        found.append((entry, start, stored))
        start += stored
    return found


def reseal(stream: bytes | bytearray) -> bytes:
    """The stream with every checksum made right again, as far as its tables still describe it."""
    data = bytearray(stream)
    if len(data) < HEADER_BYTES:
        return bytes(data)
    for entry, start, stored in sections_of(data):
        struct.pack_into("<I", data, entry + 16, zlib.crc32(data[start : start + stored]))
    tables_end = section_table_at(data) + SECTION_BYTES * counts_of(data)[1]
    checksum = zlib.crc32(data[HEADER_BYTES:tables_end], zlib.crc32(data[:HEADER_CHECKSUM_AT]))
    struct.pack_into("<I", data, HEADER_CHECKSUM_AT, checksum)
    return bytes(data)


def patched(stream: bytes, offset: int, layout: str, *values: int) -> bytes:
    """The stream with fields at `offset` replaced (struct notation) and checksums made right again."""
    data = bytearray(stream)
    struct.pack_into("<" + layout, data, offset, *values)
    return reseal(data)


def golden_calibration() -> Calibration:
    """By formula, in numbers that are sums of few powers of two: nothing that is computed with it ever rounds.

    1 layer, 1 head of 8 features without rotation; the bases permute the features. The tables of distortion leave one sensible
    choice: keys as 4 coefficients of int4, one dropped, 2 of fp8, one dropped; values as two groups of 4 in int2.
    """
    geometry = CacheGeometry((0,), 0, 1, 8, 8, Rope((), (NO_ROTATION,)))
    order = torch.tensor([3, 1, 4, 0, 5, 2, 6, 7])
    key_vectors, value_vectors = torch.eye(8)[:, order].half(), -torch.eye(8).half()
    key_mean, value_mean = torch.arange(8) * 0.25 - 1, torch.arange(8) * -0.5
    chosen = {"key": ((1, 1, 0), (2, 0, 5)), "value": ((0, 1, 0), (0, 1, 4))}
    kinds = []
    for name, mean, vectors in (("key", key_mean, key_vectors), ("value", value_mean, value_vectors)):
        sizes = (2, 4)
        errors = np.full((3, len(sizes), 8), 1000, np.float32)
        for index, size in enumerate(sizes):
            errors[:, index, 8 - size + 1 :] = np.inf
        for entry in chosen[name]:
            errors[entry] = 0
        table = DistortionTable(np.full(8, 2, np.float32), errors, sizes)
        kinds.append(SideCalibration(Basis(mean, vectors, torch.full((8,), 2.0)), table, 16.0))
    return Calibration(geometry, kinds[0], kinds[1])


def golden_cache() -> KVCache:
    """4 tokens in bfloat16 at positions 0, 1, 3 and 6; the two in the middle are chosen so that quantization is exact."""
    calibration = golden_calibration()
    # Groups span 15 steps of 1/8 (int4), 448 steps of 1/256 up and down (fp8) and 3 steps of 1/2 or 1/4 (int2).
    int4 = torch.tensor([[-1.0, -0.875, 0.25, 0.875], [0.0, 1.0, 1.875, 0.625]])
    fp8 = torch.tensor([[-1.75, 1.75], [2.25, -1.25]])
    dropped = torch.zeros(2, 1)
    key_coefficients = torch.cat([int4, dropped, fp8, dropped], dim=1)
    value_coefficients = torch.tensor(
        [[0.0, 0.5, 1.0, 1.5, -0.75, 0.0, -0.25, -0.5], [-1.0, 0.5, -0.5, 0.0, 0.25, 1.0, 0.75, 0.5]]
    )
    sides = []
    for kind, coefficients in ((calibration.key, key_coefficients), (calibration.value, value_coefficients)):
        body = coefficients @ kind.basis.vectors.float().T + kind.basis.mean
        first, last = torch.arange(8) * 0.375 - len(sides), 2 - torch.arange(8) * 0.625 - len(sides)
        sides.append(torch.cat([first[None], body, last[None]])[None, None].to(torch.bfloat16))
    return KVCache(sides[0], sides[1], torch.tensor([0, 1, 3, 6]))


GOLDEN_TOKEN_IDS = [11, 7, 5, 2]


def golden_codec() -> Codec:
    """One sink, one window token, cells of 4 positions, no lossless coder: zlib may change its output, this must not."""
    return Codec(golden_calibration(), ratio=1.25, sink_tokens=1, window_tokens=1, chunk_tokens=4, coder="none")


def with_section(
    stream: bytes, number: int, stored: bytes, coder: int | None = None, raw_bytes: int | None = None
) -> bytes:
    """The stream with the stored bytes of section `number` replaced, its table entry and all checksums to match."""
    entry, start, length = sections_of(stream)[number]
    data = bytearray(stream[:start] + stored + stream[start + length :])
    struct.pack_into("<I", data, entry + 12, len(stored))
    if coder is not None:
        struct.pack_into("<B", data, entry + 1, coder)
    if raw_bytes is not None:
        struct.pack_into("<I", data, entry + 8, raw_bytes)
    return reseal(data)


def fresh_codec(**options: object) -> Codec:
    """A codec whose streams have several chunks and every kind of section in few bytes."""
    defaults = {"ratio": 3, "sink_tokens": 2, "window_tokens": 3, "chunk_tokens": 4}
    return Codec(tiny_calibration(), **(defaults | options))


@remember
def tiny_codec(**options: object) -> Codec:
    """`fresh_codec`, made once for the same options."""
    return fresh_codec(**options)


def gappy_cache(n: int = 10, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> KVCache:
    """A cache whose positions leave some out, inside cells of 4 and between them."""
    whole = random_cache(3 * n, dtype, seed)
    places = torch.tensor([place for place in range(3 * n) if place % 4 != 2 and place // 4 != 1])[:n]
    return KVCache(whole.keys[:, :, places], whole.values[:, :, places], places, rope_length=3 * n)


def told_gappy_cache(n: int = 10, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> tuple[KVCache, Tensor]:
    """`told_cache` with the gaps of `gappy_cache`, and the ids of what is left."""
    whole, places = told_cache(3 * n, dtype, seed), gappy_cache(n).resolved_positions()
    cache = KVCache(whole.keys[:, :, places], whole.values[:, :, places], places, rope_length=3 * n)
    return cache, told_ids(3 * n, seed)[places]


@remember
def joint_codec(profile: str = "joint", **options: object) -> Codec:
    """A codec of `joint_calibration` for few bytes; made once for the same options."""
    defaults: dict[str, object] = {"sink_tokens": 2, "window_tokens": 3, "chunk_tokens": 8}
    if "ratio" not in options:
        defaults["step"] = 4.0
    return told_codec(profile, **(defaults | options))


def golden_frequencies() -> np.ndarray:
    """Tables [4, 27, 64] by formula: +-m halves every 1, 2 or 3 steps of m, faster for calmer tokens, and ends in gaps."""
    tables = np.zeros((4, 27, 64), np.uint16)
    for activity, column_class in np.ndindex(4, 27):
        row = tables[activity, column_class]
        for magnitude in range(1, 32):
            row[[31 - magnitude, 31 + magnitude]] = 512 >> (3 - activity) >> (1 + magnitude // (1 + column_class // 9))
        row[63] = 16
        row[31] = 4096 - int(row.sum())
    return tables


def golden_joint_calibration() -> Calibration:
    """`golden_calibration` with a joint part of 4 vectors, by formula in sums of few powers of two, as there.

    The vectors pick key features 1 and 6 and value features 0 and 3; of the remainder key feature 2 and value feature 2 vary.
    The metric doubles keys and halves values. Key feature 1 alone tells levels.
    """
    plain = golden_calibration()
    vectors = torch.zeros(16, 4, dtype=torch.int8)
    for column, (feature, sign) in enumerate([(1, 1), (8, -1), (6, 1), (11, 1)]):
        vectors[feature, column] = (64 if feature < 8 else 32) * sign
    turns = HeadBlocks(torch.eye(8)[None].half(), -torch.eye(8)[None].half())
    varying = [0, 1, 4 + 2, 2, 3, 4 + 8 + 2]
    order = torch.tensor(varying + [place for place in range(20) if place not in varying]).int()
    basis = JointBasis(
        torch.arange(16) * 0.25 - 2, vectors, torch.tensor([[1 / 64], [1 / 32]]).half().expand(2, 4), turns, order
    )
    metric = Metric.from_roots(HeadBlocks(2 * torch.eye(8)[None], torch.eye(8)[None] / 2))
    offsets = np.full((4, 27, 2), [0.125, 0.0625], np.float32)
    tables = ProbabilityTables(golden_frequencies(), offsets)
    steps, bits = 2.0 ** np.arange(3, -5, -1), np.arange(8) * 4.0 + 2
    model = CoefficientModel(np.array([4, 2, 1, 1, 0.5, 0.25] + 14 * [0], np.float32), tables, steps, bits)
    importance = Importance(torch.tensor([0.0, -2.0] + 14 * [0.0] + [0.75]))
    joint = JointCalibration(basis, metric, model)
    return Calibration(plain.geometry, plain.key, plain.value, joint=joint, importance=importance)


def golden_windows_calibration() -> Calibration:
    """`golden_joint_calibration` with a window of the same shape in layer 1, whose metric is 1 and whose tokens have one step."""
    first = golden_joint_calibration()
    geometry = replace(first.geometry, layers=(1,), is_window=True)
    joint = replace(first.joint, metric=Metric.from_roots(HeadBlocks(torch.eye(8)[None], torch.eye(8)[None])))
    return replace(first, further=(CodedGroup(geometry, joint, None),))


def golden_latent_codec() -> Codec:
    """As `golden_joint_codec`, of a latent of 6 features and a rotary part of 2: together they are as wide as a key is there.

    The vectors pick rotary feature 1 and latent features 0, 3 and 4; of the remainder rotary feature 0 and latent feature 2 vary.
    """
    joint = golden_joint_calibration().joint
    vectors = torch.zeros(8, 4, dtype=torch.int8)
    for column, (feature, sign) in enumerate([(1, 1), (2, -1), (5, 1), (6, 1)]):
        vectors[feature, column] = (64 if feature < 2 else 32) * sign
    turns = HeadBlocks(torch.eye(2)[None].half(), -torch.eye(6)[None].half())
    varying = [0, 1, 4, 2, 3, 4 + 2 + 2]
    order = torch.tensor(varying + [place for place in range(12) if place not in varying]).int()
    scales = torch.tensor([[1 / 64], [1 / 32]]).half().expand(2, 4)
    basis = JointBasis(torch.arange(8) * 0.25 - 2, vectors, scales, turns, order)
    metric = Metric.from_roots(HeadBlocks(2 * torch.eye(2)[None], torch.eye(6)[None] / 2))
    deviations = np.array([4, 2, 1, 1, 0.5, 0.25] + 6 * [0], np.float32)
    importance = Importance(torch.tensor([0.0, -2.0] + 6 * [0.0] + [0.75]))
    geometry = CacheGeometry((0,), 0, 1, 2, 6, Rope((), (NO_ROTATION,)))
    joint = JointCalibration(basis, metric, replace(joint.coefficients, deviations=deviations))
    calibration = Calibration(geometry, None, None, joint=joint, importance=importance)
    return Codec(calibration, step=0.125, sink_tokens=1, window_tokens=1, chunk_tokens=4, coder="none")


def golden_latent_cache() -> KVCache:
    """The keys of `golden_cache`, the first two features of which are the rotary part."""
    cache = golden_cache()
    return KVCache(cache.keys[..., :2], cache.keys[..., 2:], cache.positions)


class GoldenModel(Recomputation):
    """The first of two layers of a model that is not there, by formula."""

    def __init__(self) -> None:
        super().__init__(1, bytes(range(32)))

    def _go_on(self, before: Recomputed | None, token_ids: NDArray[np.int64]) -> Recomputed:
        assert before is None
        ids = torch.from_numpy(token_ids)
        # At a root mean square of 10 all features are 1 or -1.
        hidden = torch.stack([20.0 * (ids % 2) - 10, 20.0 * (ids // 2 % 2) - 10], dim=1)
        keys = (ids[:, None] * 0.125 + torch.arange(4) * 0.5)[None, None]
        return Recomputed(0, hidden, keys, -keys)


def golden_conditional_calibration() -> Calibration:
    """`golden_calibration` seen as two layers of 4 features, the first of which is recomputed; of the other two vectors.

    The basis picks key feature 1 and value feature 2 of the second layer; the metric doubles keys and halves values.
    """
    plain, joint = golden_calibration(), golden_joint_calibration().joint
    vectors = torch.zeros(8, 2, dtype=torch.int8)
    vectors[1, 0], vectors[6, 1] = 64, -32
    turns = HeadBlocks(torch.eye(4)[None].half(), torch.eye(4)[None].half())
    order = torch.arange(10).int()
    basis = JointBasis(
        torch.arange(8) * 0.25 - 1, vectors, torch.tensor([[1 / 64], [1 / 32]]).half().expand(2, 2), turns, order
    )
    metric = Metric.from_roots(HeadBlocks(2 * torch.eye(4)[None], torch.eye(4)[None] / 2))
    model = replace(joint.coefficients, deviations=np.array([4, 2] + 8 * [0], np.float32))
    weights = ((torch.arange(40).reshape(5, 8) % 7 - 3) / 8).half()
    left = JointCalibration(basis, metric, model)
    conditional = ConditionalCalibration(1, GoldenModel().identity, weights, torch.full((1, 2), 0.5), left)
    geometry = CacheGeometry((0, 1), 0, 1, 4, 4, Rope((), (NO_ROTATION, NO_ROTATION)))
    return Calibration(geometry, plain.key, plain.value, conditional=conditional)


def golden_conditional_cache() -> KVCache:
    """The rows of `golden_cache` as two layers, at positions without gaps; the first layer is what is recomputed."""
    cache, said = golden_cache(), GoldenModel().run(np.array(GOLDEN_TOKEN_IDS))
    sides = (side[0, 0].unflatten(1, (2, 4)).transpose(0, 1)[:, None].clone() for side in (cache.keys, cache.values))
    keys, values = sides
    keys[0], values[0] = said.keys[0].bfloat16(), said.values[0].bfloat16()
    return KVCache(keys.contiguous(), values.contiguous())


def golden_joint_codec(profile: str, **options: object) -> Codec:
    """As `golden_codec`; the step is an eighth, so that some values escape. profile: or "windows", of `joint`."""
    defaults = {"step": 0.125, "sink_tokens": 1, "window_tokens": 1, "chunk_tokens": 4, "coder": "none"}
    if profile == "windows":
        return Codec(golden_windows_calibration(), **(defaults | options))
    calibration = golden_joint_calibration() if profile == "joint" else golden_conditional_calibration()
    return Codec(calibration, profile, model=GoldenModel(), **(defaults | options))


def rewritten(path: Path, change) -> Path:
    """The file with `change(metadata, tensors)` done to it, and its checksum made right again."""
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del metadata["checksum"]
    change(metadata, tensors)
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    safetensors.torch.save_file(tensors, path, {**metadata, "checksum": digest.hexdigest()})
    return path
