"""The codec from a cache to a stream and back: what is kept exactly, what is close, what it costs, and what is refused."""

from __future__ import annotations

import math
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import kvtc
from kvtc.cache import KVCache
from kvtc.codec.codec import Codec
from kvtc.codec.inspection import GroupInfo
from kvtc.coding.lossless import CODER_IDS
from kvtc.coding.paper.group_quantizer import SymbolType
from kvtc.coding.rope import DynamicScaling, Rope
from kvtc.coding.transform import cache_side_of, rows_of
from kvtc.errors import (
    CalibrationMismatch,
    GeometryMismatch,
    InvalidArgument,
    InvalidCache,
    KvtcError,
    MissingDependency,
    StreamTooLarge,
    TokenMismatch,
)
from kvtc.profiles.paper.rate import allocations_for
from kvtc.profiles.rates import MaxError, SideRatios, Truncation
from tests.builders import (
    DTYPES,
    NAMES,
    at,
    fit_caches,
    fresh_codec,
    gappy_cache,
    random_cache,
    relative_error,
    same_bits,
    same_cache,
    tiny_calibration,
    tiny_codec,
    tiny_geometry,
)

SINKS, WINDOW = 4, 128
MAX_ERROR = 0.05


def body_errors(cache: KVCache, decoded: KVCache, tokens: slice) -> list[tuple[float, float, float]]:
    """Per kind, over some tokens: norm of the error, of the rows less the calibrated mean, and of the rows."""
    calibration = tiny_calibration()
    place, length = cache.resolved_positions(), cache.resolved_rope_length()
    found = []
    for kind, original, result in (
        (calibration.key, cache.keys, decoded.keys),
        (calibration.value, cache.values, decoded.values),
    ):
        # Rotation keeps lengths: the error may be measured on rotated keys, the distance from the mean may not.
        plain = calibration.geometry.rope.unrotate(original, place, length) if kind is calibration.key else original
        rows = rows_of(plain[:, :, tokens])
        error = rows_of(original[:, :, tokens]) - rows_of(result[:, :, tokens])
        found.append((float(error.norm()), float((rows - kind.basis.mean).norm()), float(rows.norm())))
    return found


@pytest.mark.parametrize("n", [0, 1, 2, 4, 5, 131, 132, 133, 134, 400, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_round_trip(calibration, dtype, n):
    """Nothing at all, sinks only, window only, one body token, many: sinks and window bit for bit, the body close."""
    codec = Codec(calibration, max_error=MAX_ERROR)
    cache = random_cache(n, dtype, seed=n)
    stream = codec.encode(cache)
    decoded = codec.decode(stream)
    info = kvtc.inspect(stream)
    assert (info.n_tokens, info.sink_tokens, info.window_tokens) == (n, min(n, SINKS), min(max(0, n - SINKS), WINDOW))
    assert (decoded.n_tokens, decoded.dtype) == (n, dtype)
    assert torch.equal(decoded.resolved_positions(), torch.arange(n))
    body = slice(SINKS, max(SINKS, n - WINDOW))
    kept = torch.tensor([t for t in range(n) if not body.start <= t < body.stop], dtype=torch.int64)
    assert same_cache(at(decoded, kept), at(cache, kept))
    if info.body_tokens:
        # A bound holds on average over rows; a single row may be somewhat worse. Numbers of the dtype round, twice at most.
        margin = 4.0 if info.body_tokens < 10 else 1.15
        for error, centred, norm in body_errors(cache, decoded, body):
            assert 0 < error <= margin * MAX_ERROR * centred + torch.finfo(dtype).eps * norm


@pytest.mark.parametrize("max_error", [0.3, 0.1, 0.03, 0.01])
def test_max_error_is_met_and_not_by_far_too_much(calibration, max_error):
    codec = Codec(calibration, max_error=max_error, sink_tokens=0, window_tokens=0)
    cache = random_cache(1000, seed=5)
    for error, centred, _ in body_errors(cache, codec.decode(codec.encode(cache)), slice(None)):
        assert 0.2 * max_error < error / centred < 1.15 * max_error


def test_a_smaller_max_error_costs_more(calibration):
    bits = [sum(a.bits_per_row for a in allocations_for(MaxError(e), calibration, 16)) for e in (0.5, 0.1, 0.02, 5e-3)]
    assert bits == sorted(set(bits))


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_encoding_leaves_the_cache_as_it_was(dtype):
    for cache in (random_cache(40, dtype), gappy_cache(14, dtype)):
        keys, values = cache.keys.clone(), cache.values.clone()
        positions = cache.resolved_positions().clone()
        tiny_codec(sink_format="fp8").encode(cache)
        assert same_bits(cache.keys, keys)
        assert same_bits(cache.values, values)
        assert torch.equal(cache.resolved_positions(), positions)


def test_decoding_leaves_the_stream_as_it_was():
    stream = bytearray(tiny_codec().encode(random_cache(20)))
    before = bytes(stream)
    tiny_codec().decode(stream).keys.zero_()
    assert stream == before


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_layers_decode_to_the_layers_of_the_cache(dtype):
    codec = tiny_codec()
    stream = codec.encode(gappy_cache(30, dtype), range(30))
    decoded, seen = codec.decode(stream), []
    for layer, keys, values in codec.decode_layers(stream, range(30)):
        assert same_bits(keys, decoded.keys[layer])
        assert same_bits(values, decoded.values[layer])
        seen.append(layer)
    assert seen == [0, 1, 2]


def test_layers_are_checked_before_the_first_is_asked_for():
    codec = tiny_codec()
    stream = codec.encode(random_cache(30), range(30))
    with pytest.raises(TokenMismatch):
        codec.decode_layers(stream, range(1, 31))


@pytest.mark.parametrize("cache", [random_cache(21, torch.bfloat16), gappy_cache(21)], ids=["plain", "gaps"])
def test_the_first_tokens_alone(cache):
    codec = tiny_codec()
    stream = codec.encode(cache, range(21))
    whole = codec.decode(stream)
    for n in range(22):
        part = codec.decode(stream, token_ids=range(n), tokens=n)
        assert part.n_tokens == n
        assert torch.equal(part.resolved_positions(), whole.resolved_positions()[:n])
        # Other shapes of matrices may sum in another order: the last place of bfloat16 may differ.
        torch.testing.assert_close(part.keys, whole.keys[:, :, :n], rtol=2**-7, atol=1e-5)
        torch.testing.assert_close(part.values, whole.values[:, :, :n], rtol=2**-7, atol=1e-5)


def test_the_first_tokens_need_no_other_chunk():
    codec = tiny_codec()
    stream = codec.encode(random_cache(21))
    damaged = bytearray(stream)
    damaged[-1] ^= 1
    assert same_cache(codec.decode(bytes(damaged), tokens=8), codec.decode(stream, tokens=8))
    with pytest.raises(KvtcError):
        codec.decode(bytes(damaged))


@pytest.mark.parametrize(("first", "start"), [(0, 0), (0, 1000), (0, 3), (700, 0), (700, 699), (700, 100_000)])
def test_tokens_can_be_placed_elsewhere(calibration, first, start):
    codec = Codec(calibration, ratio=3, window_tokens=8)
    cache = random_cache(60, first_position=first)
    stream = codec.encode(cache)
    here, there = codec.decode(stream), codec.decode(stream, start_position=start)
    shift = start - first
    assert torch.equal(there.positions, here.positions + shift)
    assert here.rope_length is None
    assert there.rope_length is None
    assert same_bits(there.values, here.values)
    rope = calibration.geometry.rope
    plain = rope.unrotate(here.keys, here.positions, 1)
    expected = rope.rotate(plain, here.positions + shift, 1)
    torch.testing.assert_close(there.keys, expected, rtol=1e-4, atol=1e-4)
    if shift:
        assert relative_error(there.keys, here.keys) > 0.1


def test_placed_where_it_was_nothing_changes():
    codec = tiny_codec()
    stream = codec.encode(random_cache(30, torch.bfloat16, first_position=9))
    assert same_cache(codec.decode(stream, start_position=9), codec.decode(stream))


def test_a_part_placed_elsewhere_continues_as_one_cache():
    """Gaps move along, and tokens= and start_position= go together."""
    codec = tiny_codec()
    stream = codec.encode(gappy_cache(20))
    moved = codec.decode(stream, tokens=11, start_position=50)
    assert moved.positions.tolist() == [p + 50 for p in gappy_cache(20).positions[:11].tolist()]


def test_positions_come_with_the_cache_or_beside_it():
    codec, cache = tiny_codec(), gappy_cache(20)
    bare = KVCache(cache.keys, cache.values, rope_length=cache.rope_length)
    stream = codec.encode(cache)
    for positions in (cache.positions, cache.positions.int(), cache.positions.tolist(), cache.positions[None]):
        assert codec.encode(bare, positions=positions) == stream
    decoded = codec.decode(stream)
    assert decoded.positions.tolist() == cache.positions.tolist()
    assert decoded.rope_length == cache.rope_length
    assert bool((codec.decode(codec.encode(bare)).keys != decoded.keys).any())


def test_a_cache_from_the_middle_of_a_sequence_has_no_sinks():
    codec = tiny_codec(window_tokens=0, sink_tokens=4, chunk_tokens=16)
    cache = random_cache(40, first_position=1000)
    stream = codec.encode(cache)
    info = kvtc.inspect(stream)
    assert (info.first_position, info.sink_tokens, info.body_tokens) == (1000, 0, 40)
    decoded = codec.decode(stream)
    assert decoded.positions.tolist() == list(range(1000, 1040))
    assert decoded.rope_length is None
    assert relative_error(decoded.keys, cache.keys) < 0.05
    assert kvtc.inspect(codec.encode(random_cache(40, first_position=2))).sink_tokens == 2


def test_chunks_stand_on_one_grid_wherever_a_cache_begins():
    codec = tiny_codec(chunk_tokens=16)
    for first in (0, 5, 15, 16, 1000):
        parts = [kvtc.inspect(part) for part in kvtc.split_stream(codec.encode(random_cache(70, first_position=first)))]
        starts = [part.first_position for part in parts]
        assert starts == [first, *range(16 * (first // 16 + 1), first + 70, 16)]
        assert sum(part.n_tokens for part in parts) == 70


def test_the_length_that_chose_the_rotation_travels():
    """A cache of a dynamic rotation that was prefilled as part of a longer sequence."""
    geometry = tiny_geometry()
    table = replace(geometry.rope.tables[0], scaling=DynamicScaling(10000.0, 4.0, 64))
    geometry = replace(geometry, rope=Rope((table,), geometry.rope.layer_tables))
    plain, place = random_cache(300), torch.arange(300)
    unrotated = tiny_geometry().rope.unrotate(plain.keys, place, 300)

    def rotated(length: int) -> KVCache:
        return KVCache(geometry.rope.rotate(unrotated, place, length), plain.values, rope_length=length)

    codec = Codec(fit_caches(geometry, [rotated(300)]), max_error=0.02, window_tokens=0)
    for length in (300, 1000):
        decoded = codec.decode(codec.encode(rotated(length)))
        assert decoded.rope_length == length
        assert relative_error(decoded.keys, rotated(length).keys) < 0.03
    assert relative_error(rotated(300).keys, rotated(1000).keys) > 0.1


def test_a_prefix_has_one_stream_however_long_the_cache_is():
    codec = tiny_codec(window_tokens=0, chunk_tokens=16)
    whole = random_cache(70)
    shorter = KVCache(whole.keys[:, :, :50], whole.values[:, :, :50])
    parts, others = kvtc.split_stream(codec.encode(whole)), kvtc.split_stream(codec.encode(shorter))
    assert parts[:3] == others[:3]
    assert codec.decode(kvtc.join_streams([*others[:3], *parts[3:]])).n_tokens == 70


def test_other_defaults_of_torch_change_nothing():
    codec, cache = tiny_codec(), random_cache(40)
    stream = codec.encode(cache)
    expected = codec.decode(stream)
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            assert fresh_codec().encode(cache) == stream
            assert same_cache(fresh_codec().decode(stream), expected)
        finally:
            torch.set_default_dtype(torch.float32)


def test_the_same_cache_gives_the_same_bytes():
    codec, cache = fresh_codec(), random_cache(300, torch.bfloat16)
    stream = codec.encode(cache, range(300))
    assert codec.encode(cache, range(300)) == stream
    # A wider stream of the same calibration widens what the codec keeps to compute with.
    codec.decode(tiny_codec(ratio=1.2).encode(cache))
    assert codec.encode(cache, range(300)) == stream
    assert fresh_codec().encode(cache, torch.arange(300)) == stream


def test_threads_share_a_codec():
    codec, caches = fresh_codec(), [random_cache(50, torch.bfloat16, seed) for seed in range(8)]
    expected = [tiny_codec().encode(cache) for cache in caches]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(codec.encode, caches)) == expected
        decoded = list(pool.map(codec.decode, expected))
    assert all(same_cache(found, codec.decode(stream)) for found, stream in zip(decoded, expected, strict=True))


def test_any_codec_of_the_calibration_decodes():
    stream = tiny_codec(ratio=2, coder="zstd").encode(random_cache(40))
    assert same_cache(tiny_codec(ratio=9, sink_tokens=0).decode(stream), tiny_codec(ratio=2).decode(stream))


def test_kinds_have_ratios_of_their_own(calibration):
    cache = random_cache(400)
    errors = {}
    for key_ratio, value_ratio in ((2, 8), (8, 2)):
        codec = Codec(calibration, key_ratio=key_ratio, value_ratio=value_ratio, window_tokens=0)
        keys, values = allocations_for(codec.rate, calibration, 16)
        assert keys.bits_per_row <= 16 * 48 / key_ratio
        assert values.bits_per_row <= 16 * 48 / value_ratio
        found = body_errors(cache, codec.decode(codec.encode(cache)), slice(4, 400))
        errors[key_ratio] = [error / centred for error, centred, _ in found]
    assert errors[2][0] < 0.5 * errors[8][0]
    assert errors[8][1] < 0.5 * errors[2][1]
    both = Codec(calibration, ratio=8, key_ratio=2)
    assert both.rate == SideRatios(2, 8)


def test_truncation_keeps_the_leading_coefficients_in_16_bits(calibration):
    codec = Codec(calibration, rate=Truncation(4), window_tokens=0, sink_tokens=0)
    for allocation in allocations_for(codec.rate, calibration, 16):
        (run,) = allocation.runs
        assert (run.start, run.size, run.count, run.symbol_type) == (0, 1, 16 * 48 // 4 // 16, SymbolType.FP16)
    cache = random_cache(50)
    leading = calibration.value.basis.vectors[:, :12].float()
    centred = rows_of(cache.values) - calibration.value.basis.mean
    expected = cache_side_of((centred @ leading) @ leading.T + calibration.value.basis.mean, 3, 2)
    torch.testing.assert_close(codec.decode(codec.encode(cache)).values, expected, rtol=1e-3, atol=5e-3)


@pytest.mark.parametrize("coder", CODER_IDS)
def test_coders_change_the_bytes_and_not_the_cache(coder):
    cache = random_cache(300, torch.bfloat16)
    plain = tiny_codec(coder="none", chunk_tokens=64).encode(cache)
    stream = tiny_codec(coder=coder, chunk_tokens=64).encode(cache)
    assert same_cache(tiny_codec().decode(stream), tiny_codec().decode(plain))
    assert {s.coder for s in kvtc.inspect(stream).sections if s.kind == "body"} <= {coder, "none"}
    if coder != "none":
        assert len(stream) < len(plain)
        assert coder in {s.coder for s in kvtc.inspect(stream).sections if s.kind == "body"}


@pytest.mark.parametrize(("coder", "module"), [("zstd", "zstandard"), ("lz4", "lz4.block")])
def test_a_coder_that_is_not_installed_is_named(monkeypatch, coder, module):
    stream = tiny_codec(coder=coder, chunk_tokens=64).encode(random_cache(300))
    monkeypatch.setitem(sys.modules, module, None)
    for call in (lambda: fresh_codec(coder=coder), lambda: tiny_codec().decode(stream)):
        with pytest.raises(MissingDependency, match=r"kvtc\[coders\]"):
            call()


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_sinks_in_fp8(dtype):
    cache = random_cache(40, dtype)
    codec = tiny_codec(sink_tokens=4, sink_format="fp8", chunk_tokens=64)
    stream = codec.encode(cache)
    decoded = codec.decode(stream)
    (sinks,) = (s for s in kvtc.inspect(stream).sections if s.kind == "sink")
    assert sinks.raw_bytes == 2 * 3 * 2 * 4 * (8 + 2)
    for found, original in ((decoded.keys, cache.keys), (decoded.values, cache.values)):
        assert same_bits(found[:, :, 37:], original[:, :, 37:])
        expected = original[:, :, :4].float()
        largest = expected.abs().amax(dim=-1, keepdim=True)
        # Three bits of mantissa; below 2**-6 / 448 of the largest, e4m3 is subnormal. Then the rounding to the dtype.
        bound = expected.abs() * (2**-4 + torch.finfo(dtype).eps) + largest * (2**-10 / 448 + 2**-10)
        assert bool(((found[:, :, :4].float() - expected).abs() <= bound).all())


def test_zero_sinks_in_fp8_are_zero():
    cache = KVCache(torch.zeros(3, 2, 4, 8), torch.zeros(3, 2, 4, 8))
    assert same_cache(tiny_codec(sink_format="fp8", sink_tokens=4).decode(tiny_codec().encode(cache)), cache)
    decoded = tiny_codec().decode(tiny_codec(sink_format="fp8", sink_tokens=4).encode(cache))
    assert not decoded.keys.any()
    assert not decoded.values.any()


@pytest.mark.parametrize(
    ("sinks", "window", "expected"),
    [
        (0, 0, (0, 50, 0)),
        (0, 9, (0, 41, 9)),
        (9, 0, (9, 41, 0)),
        (50, 5, (50, 0, 0)),
        (3, 99, (3, 0, 47)),
        (99, 99, (50, 0, 0)),
    ],
)
def test_regions(sinks, window, expected):
    codec, cache = tiny_codec(sink_tokens=sinks, window_tokens=window), random_cache(50, torch.float16)
    stream = codec.encode(cache)
    info = kvtc.inspect(stream)
    assert (info.sink_tokens, info.body_tokens, info.window_tokens) == expected
    decoded = codec.decode(stream)
    kept = torch.cat([torch.arange(expected[0]), torch.arange(50 - expected[2], 50)])
    assert same_cache(at(decoded, kept), at(cache, kept))
    assert (info.body_ratio is None) == (expected[1] == 0)
    if expected[1]:
        assert not same_bits(decoded.keys, cache.keys)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("ratio", [2, 4, 6])
def test_the_body_takes_no_more_than_its_ratio_allows(dtype, ratio):
    codec = Codec(tiny_calibration(), ratio=ratio)
    info = kvtc.inspect(codec.encode(random_cache(4096, dtype), range(4096)))
    assert info.body_ratio >= ratio


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_costs_add_up(dtype):
    codec = tiny_codec()
    for cache in (random_cache(0, dtype), random_cache(2, dtype), random_cache(30, dtype), gappy_cache(30, dtype)):
        stream = codec.encode(cache)
        info = kvtc.inspect(stream)
        value_bytes = 1 if dtype.itemsize == 1 else 2
        assert info.total_bytes == len(stream)
        assert info.total_bytes == 64 + 20 * info.n_chunks + sum(20 + s.stored_bytes for s in info.sections)
        assert info.original_bytes == 2 * 48 * value_bytes * cache.n_tokens
        exact = sum(20 + s.stored_bytes for s in info.sections if s.kind in ("sink", "window"))
        if info.body_tokens:
            assert info.body_bytes == len(stream) - exact
            assert math.isclose(info.body_ratio, 2 * 48 * value_bytes * info.body_tokens / info.body_bytes)
        else:
            assert (info.body_bytes, info.body_ratio) == (0, None)
        if cache.n_tokens:
            assert math.isclose(info.total_ratio, info.original_bytes / len(stream))
        else:
            assert info.total_ratio is None


def test_inspect_tells_what_a_stream_holds(calibration):
    info = kvtc.inspect(tiny_codec(coder="none").encode(random_cache(11, torch.float16, first_position=1), range(11)))
    assert info.format_version == 3
    assert (info.profile, info.fingerprint) == ("paper", calibration.fingerprint.hex())
    stored = sum(20 + section.stored_bytes for section in info.sections[1:])
    ratio = info.original_bytes / stored
    assert info.groups == (
        GroupInfo(
            "full attention",
            "keys and values",
            "float16",
            (0, 1, 2),
            (2, 8, 8),
            0,
            True,
            info.original_bytes,
            stored,
            ratio,
        ),
    )
    assert (info.first_position, info.last_chunk_position, info.n_chunks, info.chunk_tokens) == (1, 8, 3, 4)
    assert (info.n_tokens, info.sink_tokens, info.body_tokens, info.window_tokens) == (11, 1, 7, 3)
    assert info.has_token_digests
    # The last cell holds position 8 of the body and the window of 3 behind it.
    expected = [("rate", None), ("sink", 0), ("body", 0), ("body", 1), ("body", 2), ("window", 2)]
    assert [(s.kind, s.chunk) for s in info.sections] == expected
    assert all(s.coder == "none" and s.raw_bytes == s.stored_bytes for s in info.sections)


# Errors. Each names what was expected and what was found.


def test_another_calibration_is_refused():
    stream = tiny_codec().encode(random_cache(20))
    other = tiny_calibration(1)
    with pytest.raises(CalibrationMismatch, match=f"{tiny_calibration().fingerprint.hex()}.*{other.fingerprint.hex()}"):
        Codec(other, ratio=3).decode(stream)


def part_of_model(**changes: object) -> Codec:
    calibration = tiny_calibration()
    return Codec(replace(calibration, geometry=replace(calibration.geometry, **changes)), ratio=3)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"layers": (3, 4, 5)}, r"covers layers 3\.\.5, .* holds layers 0\.\.2"),
        ({"first_kv_head": 2}, r"kv heads 2\.\.3, .* kv heads 0\.\.1"),
    ],
)
def test_another_rank_is_refused(changes, expected):
    stream, codec = tiny_codec().encode(random_cache(20)), part_of_model(**changes)
    with pytest.raises(GeometryMismatch, match=expected):
        codec.decode(stream)
    with pytest.raises(GeometryMismatch, match=expected):
        codec.encode(random_cache(20))


def test_a_rank_encodes_its_own_part():
    codec, cache = part_of_model(layers=(3, 4, 5), first_kv_head=2), random_cache(20)
    cache.layers, cache.first_kv_head = (3, 4, 5), 2
    stream = codec.encode(cache)
    decoded = codec.decode(stream)
    assert (decoded.layers, decoded.first_kv_head) == ((3, 4, 5), 2)
    assert [layer for layer, _, _ in codec.decode_layers(stream)] == [3, 4, 5]
    assert kvtc.inspect(stream).groups[0].layers == (3, 4, 5)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 2, 20, 8), r"layers 0\.\.2, .* layers 0\.\.1"),
        ((3, 1, 20, 8), r"kv heads 0\.\.1, .* kv heads 0\.\.0"),
        ((3, 2, 20, 16), r"head_dim 8; .* head_dim 16"),
    ],
)
def test_a_cache_of_another_geometry_is_refused(shape, expected):
    with pytest.raises(GeometryMismatch, match=expected):
        tiny_codec().encode(KVCache(torch.zeros(shape), torch.zeros(shape)))


@pytest.mark.parametrize("count", [0, 19, 21])
def test_the_count_of_token_ids_must_be_that_of_the_cache(count):
    with pytest.raises(InvalidArgument, match=f"20 tokens, but {count} token ids"):
        tiny_codec().encode(random_cache(20), range(count))


@pytest.mark.parametrize("ids", [[[1, 2], [3, 4]], [0.5] * 20, "abc", torch.zeros(2, 10).long()])
def test_token_ids_must_be_one_row_of_integers(ids):
    with pytest.raises(InvalidArgument, match="integers"):
        tiny_codec().encode(random_cache(20), ids)


def test_token_ids_are_compared():
    codec = tiny_codec()
    stream = codec.encode(random_cache(20), torch.arange(20))
    for same in (range(20), list(range(20)), torch.arange(20)[None], torch.arange(20).int(), range(25)):
        assert codec.decode(stream, same).n_tokens == 20
    wrong = [*range(9), 99, *range(10, 20)]
    with pytest.raises(TokenMismatch, match=r"chunk 2 \(tokens 8 \.\. 11, from position 8\)"):
        codec.decode(stream, wrong)
    assert codec.decode(stream, wrong, tokens=8).n_tokens == 8
    with pytest.raises(TokenMismatch, match="20 tokens are to be decoded, but only 19"):
        codec.decode(stream, range(19))


def test_token_ids_cannot_be_compared_with_none():
    with pytest.raises(TokenMismatch, match="without any"):
        tiny_codec().decode(tiny_codec().encode(random_cache(20)), range(20))


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        (range(19), r"20 tokens, but positions of shape \(19,\)"),
        ([3] * 20, "strictly increasing"),
        ([*range(10), *range(9, 19)], "strictly increasing"),
        (range(-1, 19), r"0 \.\. 2\*\*31 - 1; got -1 \.\. 18"),
        (range(2**31 - 19, 2**31 + 1), r"got 2147483629 \.\. 2147483648"),
    ],
)
def test_impossible_positions_are_refused(positions, expected):
    cache = random_cache(20)
    with pytest.raises(InvalidCache, match=expected):
        tiny_codec().encode(cache, positions=positions)
    with pytest.raises(InvalidCache, match=expected):
        tiny_codec().encode(KVCache(cache.keys, cache.values, torch.tensor(positions)))


def test_an_impossible_rope_length_is_refused():
    cache = random_cache(20)
    for length in (-1, 2**31):
        with pytest.raises(InvalidCache, match=f"got {length}"):
            tiny_codec().encode(KVCache(cache.keys, cache.values, rope_length=length))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.int64])
def test_another_dtype_is_refused(dtype):
    side = torch.zeros(3, 2, 20, 8, dtype=dtype)
    with pytest.raises(InvalidCache, match=f"keys are {dtype}.*expected one dtype of bfloat16"):
        tiny_codec().encode(KVCache(side, side))


def test_keys_and_values_of_two_dtypes_are_refused():
    with pytest.raises(InvalidCache, match=r"keys are torch\.float16, values torch\.float32"):
        tiny_codec().encode(KVCache(torch.zeros(3, 2, 20, 8).half(), torch.zeros(3, 2, 20, 8)))


def test_keys_and_values_of_two_shapes_are_refused():
    with pytest.raises(InvalidCache, match=r"\(3, 2, 20, 8\) and \(3, 2, 19, 8\)"):
        tiny_codec().encode(KVCache(torch.zeros(3, 2, 20, 8), torch.zeros(3, 2, 19, 8)))


@pytest.mark.parametrize("shape", [(3, 2, 8), (96,), (1, 3, 2, 20, 8)])
def test_another_number_of_axes_is_refused(shape):
    with pytest.raises(InvalidCache, match="keys and values must both be"):
        tiny_codec().encode(KVCache(torch.zeros(shape), torch.zeros(shape)))


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d is not torch.float8_e4m3fn])
@pytest.mark.parametrize("kind", ["keys", "values"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinities_are_refused_by_kind_and_layer(dtype, kind, bad):
    cache = random_cache(20)
    cache.layers = (5, 6, 7)
    getattr(cache, kind)[1, 0, 19, 7] = bad
    codec = part_of_model(layers=(5, 6, 7))
    with pytest.raises(InvalidCache, match=f"{kind} of layer 6 hold NaN or infinite"):
        codec.encode(replace(cache, keys=cache.keys.to(dtype), values=cache.values.to(dtype)))


@pytest.mark.parametrize("thing", [None, 5, torch.zeros(3, 2, 20, 8), (torch.zeros(1), torch.zeros(1))])
def test_what_is_no_cache_is_refused(thing):
    with pytest.raises(InvalidArgument, match=f"KVCache, got {type(thing).__name__}"):
        tiny_codec().encode(thing)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"profile": "draft"}, "'draft' is unknown; expected one of paper"),
        ({"coder": "brotli"}, "'brotli' is unknown; expected one of none, deflate, zstd, lz4"),
        ({"sink_format": "int4"}, "exact or fp8; got 'int4'"),
        ({"sink_tokens": -1}, "sink_tokens -1"),
        ({"window_tokens": -1}, "window_tokens -1"),
        ({"chunk_tokens": 0}, r"1 \.\. 32768; got 0"),
        ({"chunk_tokens": 32769}, "got 32769"),
        ({"ratio": 0.9}, "at least 1; got 0.9"),
        ({"ratio": float("nan")}, "got nan"),
        ({"ratio": float("inf")}, "got inf"),
        ({"key_ratio": -2}, "got -2"),
        ({"ratio": 50}, r"leaves 15 bits a token, too few"),
        ({"rate": Truncation(50)}, r"leaves 15 bits a token, too few"),
        ({"max_error": 0}, "between 0 and 1; got 0"),
        ({"max_error": 1.5}, "got 1.5"),
        ({"max_error": 1e-6}, "cannot be met"),
        ({"max_error": 0.1, "ratio": 3}, "not several"),
        ({"max_error": 0.1, "value_ratio": 3}, "not several"),
        ({"ratio": 3, "rate": Truncation(3)}, "not several"),
    ],
)
def test_impossible_settings_are_refused(calibration, options, expected):
    with pytest.raises(InvalidArgument, match=expected):
        Codec(calibration, **options)


def test_a_ratio_that_only_8_bit_caches_cannot_have_is_refused_for_them(calibration):
    codec = Codec(calibration, ratio=12)
    assert codec.decode(codec.encode(random_cache(200))).n_tokens == 200
    with pytest.raises(InvalidArgument, match="32 bits a token, too few"):
        codec.encode(random_cache(200, torch.float8_e5m2))


@pytest.mark.parametrize("tokens", [-1, 21, 10**9])
def test_only_tokens_that_are_there_decode(tokens):
    with pytest.raises(InvalidArgument, match=rf"0 \.\. 20, what the stream holds; got {tokens}"):
        tiny_codec().decode(tiny_codec().encode(random_cache(20)), tokens=tokens)


def test_no_more_tokens_are_decoded_than_agreed_to():
    """The limit counts tokens beyond those that are named, in whole chunks: 20 tokens are 5 chunks of 4."""
    cache, ids = random_cache(20, torch.bfloat16), range(20)
    stream = tiny_codec().encode(cache, ids)
    codec = fresh_codec(max_tokens=19)
    for named in ({}, {"tokens": None}):
        with pytest.raises(
            StreamTooLarge, match=r"20 tokens .* 19 are allowed: name as many by tokens= .* max_tokens="
        ):
            codec.decode(stream, **named)
    for named in ({"tokens": 20}, {"tokens": 1}, {"token_ids": ids}):
        assert codec.decode(stream, **named).n_tokens == named.get("tokens", 20)
    assert fresh_codec(max_tokens=20).decode(stream).n_tokens == 20
    # Three tokens past the first are the rest of its chunk.
    assert fresh_codec(max_tokens=3).decode(stream, tokens=1).n_tokens == 1
    with pytest.raises(StreamTooLarge, match="4 tokens would have to be decoded; 3 are allowed"):
        fresh_codec(max_tokens=2).decode(stream, tokens=1)
    with pytest.raises(StreamTooLarge, match=r"20 tokens .* 18 are allowed"):
        fresh_codec(max_tokens=1).decode(stream, tokens=17)
    with pytest.raises(StreamTooLarge):
        codec.decode_batch([stream])


def test_a_batch_is_limited_with_its_padding():
    """One long stream among short ones asks for places for all of them."""
    streams = [fresh_codec().encode(random_cache(n, torch.bfloat16)) for n in (20, 1, 1)]
    assert fresh_codec(max_tokens=60).decode_batch(streams)[1].shape == (3, 20)
    with pytest.raises(StreamTooLarge, match=r"a batch of 60 tokens with its padding .* 59 are allowed"):
        fresh_codec(max_tokens=59).decode_batch(streams)


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, None])
def test_a_limit_is_a_number_of_tokens(limit):
    with pytest.raises(InvalidArgument, match="max_tokens must be a whole number of at least 1"):
        fresh_codec(max_tokens=limit)


@pytest.mark.parametrize("start", [-1, -(2**40), 2**31 - 19, 2**40])
def test_tokens_cannot_be_placed_outside_of_the_positions(start):
    codec = tiny_codec()
    with pytest.raises(InvalidArgument, match=f"start_position {start} "):
        codec.decode(codec.encode(random_cache(20)), start_position=start)


def test_the_last_possible_place():
    codec = tiny_codec()
    decoded = codec.decode(codec.encode(random_cache(20)), start_position=2**31 - 20)
    assert decoded.positions[-1] == 2**31 - 1


def test_huge_values_saturate_instead_of_overflowing():
    """Rows far outside of what was calibrated come back finite."""
    cache = random_cache(30)
    cache.keys[:, :, 10] = 1e30
    cache.values[:, :, 11] = -1e30
    decoded = tiny_codec().decode(tiny_codec().encode(cache))
    assert bool(decoded.keys.isfinite().all())
    assert bool(decoded.values.isfinite().all())
    others = [t for t in range(30) if t not in (10, 11)]
    assert relative_error(decoded.values[:, :, others], cache.values[:, :, others]) < 0.05


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16], ids=str)
def test_what_passes_the_dtype_becomes_its_largest_value(dtype):
    """Restored and moved numbers overshoot a little: at the end of the range that must not make NaN or infinity of them."""
    limit = torch.finfo(dtype).max
    generator = torch.Generator().manual_seed(6)
    side = torch.where(torch.rand(3, 2, 40, 8, generator=generator) < 0.5, -limit, limit).to(dtype)
    codec = tiny_codec()
    stream = codec.encode(KVCache(side, side.clone()))
    for start in (0, 17):
        decoded = codec.decode(stream, start_position=start)
        for found in (decoded.keys.float(), decoded.values.float()):
            assert bool(found.isfinite().all())
            assert float(found.abs().max()) == limit


# Caches of transformers, one and many at a time.


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model_calibration(model):
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(64, (80,), generator=generator) for _ in range(12)]
    return kvtc.calibrate(model, sequences, max_tokens=1000, progress=False)


LENGTHS = (37, 50, 9)


@pytest.fixture(scope="module")
def batch(model):
    """Ids, mask and cache of sequences of unequal lengths, padded on the left, as `generate` would have prefilled them."""
    generator = torch.Generator().manual_seed(2)
    longest = max(LENGTHS)
    ids = torch.randint(1, 64, (len(LENGTHS), longest), generator=generator)
    mask = torch.stack([(torch.arange(longest) >= longest - length).long() for length in LENGTHS])
    ids = ids * mask
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.inference_mode():
        cache = model(ids, attention_mask=mask, position_ids=positions, use_cache=True).past_key_values
    return ids, mask, cache


def one_of(cache, index: int, length: int):
    from transformers import DynamicCache

    alone = DynamicCache()
    for layer, content in enumerate(cache.layers):
        sides = (content.keys, content.values)
        alone.update(*(side[index : index + 1, :, side.shape[2] - length :].clone() for side in sides), layer)
    return alone


def sides_of(cache) -> tuple[Tensor, Tensor]:
    return tuple(torch.stack([getattr(layer, name) for layer in cache.layers]) for name in ("keys", "values"))


def batch_codec(calibration, **options) -> Codec:
    return Codec(calibration, "paper", **({"ratio": 3, "window_tokens": 8, "chunk_tokens": 16} | options))


def test_a_batch_encodes_like_its_sequences(model_calibration, batch):
    ids, mask, cache = batch
    codec = batch_codec(model_calibration)
    streams = codec.encode_batch(cache, ids, mask)
    alone = [codec.encode(one_of(cache, i, length), ids[i][mask[i].bool()]) for i, length in enumerate(LENGTHS)]
    assert streams == alone


def test_a_batch_decodes_like_its_sequences(model_calibration, batch):
    ids, mask, cache = batch
    codec = batch_codec(model_calibration)
    streams = codec.encode_batch(cache, ids, mask)
    for given in (None, ids, [ids[i][mask[i].bool()] for i in range(len(LENGTHS))]):
        decoded, found_mask = codec.decode_batch(streams, given)
        assert torch.equal(found_mask, mask)
        assert type(decoded).__name__ == "DynamicCache"
        for found, name in zip(sides_of(decoded), ("keys", "values"), strict=True):
            assert found.shape == (3, len(LENGTHS), 2, max(LENGTHS), 8)
            for i, length in enumerate(LENGTHS):
                alone = torch.stack([getattr(layer, name)[0] for layer in codec.decode(streams[i]).layers])
                assert same_bits(found[:, i, :, max(LENGTHS) - length :], alone)
                assert not found[:, i, :, : max(LENGTHS) - length].any()


def test_a_batch_checks_the_ids_of_every_sequence(model_calibration, batch):
    ids, mask, cache = batch
    codec = batch_codec(model_calibration)
    streams = codec.encode_batch(cache, ids, mask)
    wrong = ids.clone()
    wrong[1, -1] += 1
    with pytest.raises(TokenMismatch):
        codec.decode_batch(streams, wrong)
    with pytest.raises(InvalidArgument, match="3 streams, but token ids for 2"):
        codec.decode_batch(streams, ids[:2])


def test_a_decoded_batch_generates_what_the_original_does(model, model_calibration, batch):
    ids, mask, cache = batch
    codec = batch_codec(model_calibration, window_tokens=100)
    decoded, found_mask = codec.decode_batch(codec.encode_batch(cache, ids, mask), ids)
    step = torch.randint(1, 64, (len(LENGTHS), 1), generator=torch.Generator().manual_seed(3))
    longer, longer_mask = torch.cat([ids, step], 1), torch.cat([found_mask, torch.ones_like(step)], 1)
    arguments = {"attention_mask": longer_mask, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(longer, **arguments)
    assert torch.equal(model.generate(longer, past_key_values=decoded, **arguments), expected)
    assert expected.shape == (len(LENGTHS), max(LENGTHS) + 7)


def test_a_lossy_batch_generates_too(model, model_calibration, batch):
    ids, mask, cache = batch
    codec = batch_codec(model_calibration)
    decoded, found_mask = codec.decode_batch(codec.encode_batch(cache, ids, mask), ids)
    longer = torch.cat([ids, torch.ones(len(LENGTHS), 1, dtype=torch.int64)], 1)
    longer_mask = torch.cat([found_mask, torch.ones(len(LENGTHS), 1, dtype=torch.int64)], 1)
    tokens = model.generate(
        longer, attention_mask=longer_mask, past_key_values=decoded, max_new_tokens=6, do_sample=False
    )
    assert tokens.shape == (len(LENGTHS), max(LENGTHS) + 7)
    assert decoded.get_seq_length() == max(LENGTHS) + 6


def test_what_goes_in_comes_out(model_calibration, batch):
    _, _, cache = batch
    codec = batch_codec(model_calibration)
    alone = one_of(cache, 1, 50)
    keys, values = (side.clone() for side in sides_of(alone))
    decoded = codec.decode(codec.encode(alone))
    assert type(decoded).__name__ == "DynamicCache"
    assert all(same_bits(a, b) for a, b in zip(sides_of(alone), (keys, values), strict=True))
    for found, original in zip(sides_of(decoded), (keys, values), strict=True):
        assert same_bits(found[..., 42:, :], original[..., 42:, :])
        assert same_bits(found[..., :4, :], original[..., :4, :])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda ids, mask: (ids[:2], mask[:2]), r"must both be \(3, \d+\)"),
        (lambda ids, mask: (ids[:, 1:], mask), r"\(3, 49\) and attention_mask \(3, 50\)"),
        (lambda ids, mask: (ids[:, 1:], mask[:, 1:]), r"must both be \(3, 50\)"),
        (lambda ids, mask: (ids, mask.flip(1)), "padding on the left"),
    ],
)
def test_batches_that_cannot_be_are_refused(model_calibration, batch, change, expected):
    ids, mask, cache = batch
    with pytest.raises(InvalidArgument, match=expected):
        batch_codec(model_calibration).encode_batch(cache, *change(ids, mask))


def test_layers_of_a_transformers_cache_keep_their_places(calibration):
    """A pipeline rank's cache has empty places before its layers, and gets them back."""
    from transformers import DynamicCache

    geometry = replace(calibration.geometry, layers=(2, 3, 4))
    codec = Codec(replace(calibration, geometry=geometry), ratio=3, window_tokens=4)
    part = random_cache(20)
    cache = DynamicCache()
    for layer in range(geometry.n_layers):
        cache.update(part.keys[layer][None], part.values[layer][None], layer + 2)
    stream = codec.encode(cache)
    assert kvtc.inspect(stream).groups[0].layers == (2, 3, 4)
    restored = codec.decode(stream)
    assert [layer.is_initialized for layer in restored.layers] == [False] * 2 + [True] * geometry.n_layers
    with pytest.raises(GeometryMismatch, match=r"layers 0\.\.2.*layers 2\.\.4"):
        Codec(calibration).encode(cache)
    holes = DynamicCache()
    for layer in (0, 2):
        holes.update(part.keys[layer][None], part.values[layer][None], layer)
    with pytest.raises(GeometryMismatch, match=r"layers 0\.\.2.*layers 0, 2"):
        Codec(calibration).encode(holes)


def test_slips_of_the_hand_are_named(calibration):
    stream = tiny_codec().encode(random_cache(20))
    with pytest.raises(InvalidArgument, match=r"expected a kvtc\.Calibration"):
        Codec("calibration.safetensors")
    with pytest.raises(InvalidArgument, match="device cuda:99 cannot be used"):
        Codec(calibration, device="cuda:99")
    with pytest.raises(InvalidArgument, match="a stream is bytes; got str"):
        kvtc.inspect("stream.kvtc")
    with pytest.raises(InvalidArgument, match=r"tokens must lie in 0 \.\. 20.*2\.5"):
        tiny_codec().decode(stream, tokens=2.5)


def test_ids_past_the_cache_are_named_in_a_batch(model_calibration, batch):
    ids, mask, cache = batch
    codec = batch_codec(model_calibration)
    streams = codec.encode_batch(cache, ids, mask)
    with pytest.raises(InvalidArgument, match=r"token_ids \(3, 51\) must be \(3, 50\)"):
        codec.decode_batch(streams, torch.cat([ids, ids[:, :1]], dim=1))


def test_a_kind_that_would_get_nothing_is_refused(calibration):
    with pytest.raises(InvalidArgument, match="for keys leaves 0 bits"):
        Codec(calibration, key_ratio=1e6, value_ratio=2)


def test_an_error_below_what_the_basis_leaves_is_refused():
    narrow = fit_caches(tiny_geometry(), [random_cache(200)], rank=2)
    with pytest.raises(InvalidArgument, match="the basis alone leaves"):
        Codec(narrow, max_error=0.001)


def test_a_batch_is_not_one_sequence(model_calibration, batch):
    with pytest.raises(InvalidCache, match="holds 3 sequences; use encode_batch"):
        batch_codec(model_calibration).encode(batch[2])


def test_no_streams_make_no_batch(model_calibration):
    with pytest.raises(InvalidArgument, match="no streams"):
        batch_codec(model_calibration).decode_batch([])
