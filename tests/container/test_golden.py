"""The format does not drift: bytes of version 3 that are kept, and a second decoder written from docs/format.md alone."""

from __future__ import annotations

import math
import re
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import lz4.block
import numpy as np
import pytest
import torch
import zstandard
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import (
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

import kvtc
from kvtc.cache import KVCache
from kvtc.calibration import Calibration
from kvtc.codec.codec import Codec
from kvtc.codec.resume_points import ResumePoints
from kvtc.profiles.rates import Ratio, Truncation
from kvtc.recomputation import Recomputed
from tests.builders import (
    GOLDEN_TOKEN_IDS,
    GoldenModel,
    golden_cache,
    golden_calibration,
    golden_codec,
    golden_conditional_cache,
    golden_joint_codec,
    golden_latent_cache,
    golden_latent_codec,
    joint_codec,
    random_cache,
    same_cache,
    sections_of,
    stepped_calibration,
    told_cache,
    told_gappy_cache,
    told_ids,
    told_model,
    two_widths,
    two_widths_calibration,
)
from tests.tiny_architectures import mixed_cache, windowed_calibration

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"
PAGE = HERE.parents[1] / "docs" / "format.md"
JOINT_PROFILES = ["joint", "conditional"]


def golden_stream(profile: str = "paper") -> bytes:
    name = "stream_v3.hex" if profile == "paper" else f"stream_v3_{profile}.hex"
    return bytes.fromhex((GOLDEN / name).read_text())


def printed_lines() -> list[list[tuple[int, bytes]]]:
    """(offset, bytes) of the lines of each example on the page."""
    examples = re.findall(r"^```text\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [
        [
            (int(offset, 16), bytes.fromhex(octets))
            for offset, octets in re.findall(r"^([0-9a-f]{4})  ((?:[0-9a-f]{2} )+) .*$", example, re.MULTILINE)
        ]
        for example in examples
    ]


def test_the_page_prints_the_golden_stream():
    printed = b""
    for offset, octets in printed_lines()[0]:
        assert offset == len(printed)
        printed += octets
    assert printed == golden_stream()


def test_the_page_prints_what_is_special_in_the_conditional_stream():
    """Rate and body byte by byte; all else is as in the other example."""
    stream, seen = golden_stream("conditional"), set()
    for offset, octets in printed_lines()[1]:
        assert stream[offset : offset + len(octets)] == octets
        seen |= set(range(offset, offset + len(octets)))
    (_, rate, rate_bytes), *others = sections_of(stream)
    _, body, body_bytes = others[1]
    assert seen >= {5, *range(rate, rate + rate_bytes), *range(body, body + body_bytes)}


def test_the_golden_stream_decodes_to_the_expected_cache():
    decoded = golden_codec().decode(golden_stream(), GOLDEN_TOKEN_IDS)
    assert same_cache(decoded, golden_cache())


def test_encoding_gives_the_golden_stream():
    assert golden_codec().encode(golden_cache(), GOLDEN_TOKEN_IDS).hex() == golden_stream().hex()


CACHES = {"joint": golden_cache, "conditional": golden_conditional_cache}


@pytest.mark.parametrize("profile", JOINT_PROFILES)
def test_encoding_gives_the_golden_streams_of_the_other_profiles(profile):
    codec = golden_joint_codec(profile)
    assert codec.encode(CACHES[profile](), GOLDEN_TOKEN_IDS).hex() == golden_stream(profile).hex()


@pytest.mark.parametrize("profile", JOINT_PROFILES)
def test_the_specification_suffices_for_the_golden_streams_of_the_other_profiles(profile):
    """Nothing that is computed with these calibrations rounds before the end: both decoders give the same bits."""
    stream, codec = golden_stream(profile), golden_joint_codec(profile)
    decoded = codec.decode(stream, GOLDEN_TOKEN_IDS)
    known = GoldenModel().run(np.array(GOLDEN_TOKEN_IDS))
    positions, rope_length, keys, values = decode_by_the_page(stream, codec.calibration, known)
    assert (positions, rope_length) == ([0, 1, 3, 6] if profile == "joint" else [0, 1, 2, 3], 0)
    np.testing.assert_array_equal(keys, decoded.keys.float().numpy())
    np.testing.assert_array_equal(values, decoded.values.float().numpy())
    # Some directions are coded: here they come back as close as the step and bfloat16 allow.
    cache, features = CACHES[profile](), {"joint": ([1, 6], [0, 3]), "conditional": ([1], [2])}[profile]
    for found, original, chosen in zip((keys, values), (cache.keys, cache.values), features, strict=True):
        np.testing.assert_allclose(found[-1:, ..., chosen], original.float().numpy()[-1:, ..., chosen], atol=0.2)
    if profile == "conditional":
        np.testing.assert_array_equal(keys[0], cache.keys[0].float().numpy())


@pytest.mark.parametrize("profile", JOINT_PROFILES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn])
def test_the_specification_suffices_for_the_other_profiles(profile, dtype):
    """Several chunks, gaps, escapes and coefficients that are not coded."""
    cache, ids = told_text(profile, dtype)
    for step in (0.02, 30.0):
        codec = joint_codec(profile, step=step, chunk_tokens=64)
        stream = codec.encode(cache, ids)
        decoded = codec.decode(stream, ids)
        positions, rope_length, keys, values = decode_by_the_page(stream, codec.calibration, known_of(profile, ids))
        assert (positions, rope_length) == (cache.resolved_positions().tolist(), 270)
        # Sums of numbers as large as these round in the fifth digit.
        near = max(torch.finfo(dtype).eps, 1e-4)
        # Next to zero the numbers of a small dtype are further apart.
        near_zero = max(1e-3, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
        np.testing.assert_allclose(keys, decoded.keys.float().numpy(), rtol=near, atol=near_zero)
        np.testing.assert_allclose(values, decoded.values.float().numpy(), rtol=near, atol=near_zero)


@pytest.mark.parametrize("profile", JOINT_PROFILES)
@pytest.mark.parametrize("step", [0.02, 4.0])
def test_the_specification_suffices_for_levels_and_the_remainder(profile, step):
    cache, ids = told_text(profile)
    codec = Codec(stepped_calibration(), profile, step=step, chunk_tokens=64, window_tokens=3, model=told_model())
    stream = codec.encode(cache, ids)
    decoded = codec.decode(stream, ids)
    _, _, keys, values = decode_by_the_page(stream, codec.calibration, known_of(profile, ids))
    np.testing.assert_allclose(keys, decoded.keys.float().numpy(), rtol=2**-7, atol=1e-3)
    np.testing.assert_allclose(values, decoded.values.float().numpy(), rtol=2**-7, atol=1e-3)


def test_the_specification_suffices_for_several_lanes():
    """Two of them in a chunk that has symbols enough, and a token that only the first has."""
    cache, ids = told_gappy_cache(501, torch.float32)
    codec = joint_codec("joint", step=4.0, sink_tokens=0, window_tokens=0, chunk_tokens=2048)
    stream = codec.encode(cache, ids)
    n_coded = len(variance_classes(codec.calibration.joint.coefficients.deviations, 4.0))
    assert 2 * 10240 <= 501 * n_coded < 4 * 10240
    _, _, keys, values = decode_by_the_page(stream, codec.calibration)
    decoded = codec.decode(stream, ids)
    np.testing.assert_allclose(keys, decoded.keys.numpy(), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(values, decoded.values.numpy(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("profile", JOINT_PROFILES)
@pytest.mark.parametrize("options", [{"step": 0.5}, {"ratio": 16, "fixed_size": True}])
def test_the_specification_suffices_for_coded_windows_and_fixed_sizes(profile, options):
    cache, ids = told_text(profile)
    codec = joint_codec(profile, **({"chunk_tokens": 64, "window_tokens": 40, "window_format": "coded"} | options))
    stream = codec.encode(cache, ids)
    decoded = codec.decode(stream, ids)
    _, _, keys, values = decode_by_the_page(stream, codec.calibration, known_of(profile, ids))
    np.testing.assert_allclose(keys, decoded.keys.float().numpy(), rtol=2**-7, atol=1e-3)
    np.testing.assert_allclose(values, decoded.values.float().numpy(), rtol=2**-7, atol=1e-3)


def test_the_golden_stream_with_a_coded_window():
    """The only window token, coded; with no lossless coder and one step its bytes never change."""
    codec = golden_joint_codec("conditional", window_format="coded")
    stream = golden_stream("window")
    assert codec.encode(golden_conditional_cache(), GOLDEN_TOKEN_IDS).hex() == stream.hex()
    decoded = codec.decode(stream, GOLDEN_TOKEN_IDS)
    known = GoldenModel().run(np.array(GOLDEN_TOKEN_IDS))
    _, _, keys, values = decode_by_the_page(stream, codec.calibration, known)
    np.testing.assert_array_equal(keys, decoded.keys.float().numpy())
    np.testing.assert_array_equal(values, decoded.values.float().numpy())


def test_the_specification_suffices_for_the_golden_stream():
    positions, rope_length, keys, values = decode_by_the_page(golden_stream(), golden_calibration())
    assert positions == [0, 1, 3, 6]
    assert rope_length == 0
    np.testing.assert_array_equal(keys, golden_cache().keys.float().numpy())
    np.testing.assert_array_equal(values, golden_cache().values.float().numpy())


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2]
)
@pytest.mark.parametrize(("n_tokens", "chunk_tokens"), [(60, 32), (150, 256)])
def test_the_specification_suffices_for_lossless_streams(calibration, dtype, n_tokens, chunk_tokens):
    cache = ragged_cache(dtype, n_tokens)
    stream = Codec(calibration, lossless=True, chunk_tokens=chunk_tokens).encode(cache)
    positions, rope_length, keys, values = decode_by_the_page(stream, calibration)
    assert (positions, rope_length) == (cache.positions.tolist(), cache.rope_length)
    np.testing.assert_array_equal(keys, cache.keys.float().numpy())
    np.testing.assert_array_equal(values, cache.values.float().numpy())


@pytest.mark.parametrize("name", ["wide keys", "latent"])
@pytest.mark.parametrize("profile", ["paper", "joint", "lossless"])
@pytest.mark.parametrize("sink_format", ["exact", "fp8"])
def test_the_specification_suffices_for_two_widths(name, profile, sink_format):
    cache = replace(random_cache(60, torch.bfloat16, geometry=two_widths(name)), rope_length=60)
    options = {"lossless": True} if profile == "lossless" else {"ratio": 2, "sink_format": sink_format}
    calibration = two_widths_calibration(name)
    codec = Codec(calibration, None if profile == "lossless" else profile, chunk_tokens=32, window_tokens=9, **options)
    stream = codec.encode(cache)
    decoded = codec.decode(stream)
    _, _, keys, values = decode_by_the_page(stream, calibration)
    np.testing.assert_allclose(keys, decoded.keys.float().numpy(), rtol=2**-7, atol=1e-3)
    np.testing.assert_allclose(values, decoded.values.float().numpy(), rtol=2**-7, atol=1e-3)


def test_the_golden_stream_of_latents():
    """Nothing that is computed with its calibration rounds before the end."""
    codec, stream = golden_latent_codec(), golden_stream("latent")
    assert codec.encode(golden_latent_cache(), GOLDEN_TOKEN_IDS).hex() == stream.hex()
    decoded = codec.decode(stream, GOLDEN_TOKEN_IDS)
    _, _, keys, values = decode_by_the_page(stream, codec.calibration)
    np.testing.assert_array_equal(keys, decoded.keys.float().numpy())
    np.testing.assert_array_equal(values, decoded.values.float().numpy())


def golden_lossless_cache() -> KVCache:
    """Integers by formula as bfloat16, with a number that escapes, a NaN, infinities, -0.0 and a denormal."""
    patterns = 16256 + (torch.arange(2 * 20 * 8).reshape(2, 1, 1, 20, 8) * 7919) % 389 - 128
    patterns[1] -= 32768 * (torch.arange(8) % 3 == 1)
    patterns[0, 0, 0, 4, :6] = torch.tensor([0x7FC1, 0x7F80, -128, -32768, 1, 0x0080])
    keys, values = patterns.to(torch.int16).view(torch.bfloat16)
    return KVCache(keys, values)


def golden_channels_cache() -> KVCache:
    """Integers by formula as bfloat16: channels of several spreads and signs, and numbers that escape."""
    token, feature = torch.arange(130)[:, None], torch.arange(8)
    patterns = 16256 + 64 * feature + ((token * 7919 + feature * 613) % 389 - 194 << feature % 4) // 4
    patterns = torch.stack([patterns, patterns.flip(0)])[:, None, None]
    patterns[:, 0, 0, :, 1] -= 32768
    patterns[0, 0, 0, :, 4] -= 32768 * (token[:, 0] % 7 == 3).int()
    patterns[1, 0, 0, ::3, 6:] -= 32768
    patterns[0, 0, 0, 4, :6] = torch.tensor([0x7FC1, 0x7F80, -128, -32768, 1, 0x0080])
    keys, values = patterns.to(torch.int16).view(torch.bfloat16)
    return KVCache(keys, values)


@pytest.mark.parametrize(
    ("name", "coder", "make", "n_tokens"),
    [("lossless", "floats", golden_lossless_cache, 16), ("channels", "channels", golden_channels_cache, 130)],
)
def test_the_golden_lossless_streams(name, coder, make, n_tokens):
    """Integers alone decide their bytes, so they never change."""
    cache, stream = make(), golden_stream(name)
    codec = Codec(golden_calibration(), lossless=True, chunk_tokens=n_tokens)
    assert codec.encode(cache).hex() == stream.hex()
    assert coder in {section.coder for section in kvtc.inspect(stream).sections}
    decoded = codec.decode(stream)
    assert torch.equal(decoded.keys.view(torch.int16), cache.keys.view(torch.int16))
    assert torch.equal(decoded.values.view(torch.int16), cache.values.view(torch.int16))
    *_, keys, values = decode_by_the_page(stream, golden_calibration())
    np.testing.assert_array_equal(keys, cache.keys.float().numpy())
    np.testing.assert_array_equal(values, cache.values.float().numpy())


def ragged_cache(dtype: torch.dtype, n_tokens: int = 60) -> KVCache:
    """Tokens whose positions begin inside a cell and leave some out."""
    length = 3 * n_tokens // 2
    whole = random_cache(length, dtype, seed=3)
    places = torch.tensor([p for p in range(3, length - 2) if p % 7 not in (2, 5)])[:n_tokens]
    return KVCache(whole.keys[:, :, places], whole.values[:, :, places], places, rope_length=length)


@pytest.mark.parametrize("coder", ["none", "deflate", "zstd", "lz4"])
@pytest.mark.parametrize(
    ("dtype", "sink_format", "rate"),
    [
        (torch.bfloat16, "exact", Ratio(3)),
        (torch.float16, "fp8", Ratio(3)),
        (torch.float32, "exact", Truncation(3)),
        (torch.float8_e4m3fn, "exact", Ratio(3)),
        (torch.float8_e5m2, "fp8", Ratio(3)),
    ],
)
def test_the_specification_suffices_for_every_feature(calibration, coder, dtype, sink_format, rate):
    codec = Codec(
        calibration,
        rate=rate,
        window_tokens=9,
        sink_tokens=6,
        chunk_tokens=16,
        coder=coder,
        sink_format=sink_format,
    )
    cache = ragged_cache(dtype)
    stream = codec.encode(cache)
    decoded = codec.decode(stream)
    positions, rope_length, keys, values = decode_by_the_page(stream, calibration)
    assert positions == cache.positions.tolist()
    assert rope_length == 90
    # The page fixes no order of summation, so a sum may round to the neighbouring number of the cache's dtype.
    step = max(torch.finfo(dtype).eps, 1e-5)
    near_zero = torch.finfo(dtype).tiny * torch.finfo(dtype).eps + 1e-5
    np.testing.assert_allclose(keys, decoded.keys.float().numpy(), rtol=step, atol=near_zero)
    np.testing.assert_allclose(values, decoded.values.float().numpy(), rtol=step, atol=near_zero)


def told_text(profile: str, dtype: torch.dtype = torch.bfloat16) -> tuple[KVCache, Tensor]:
    """A cache, with gaps where the profile allows any, and its ids."""
    if profile == "joint":
        return told_gappy_cache(90, dtype)
    return replace(told_cache(90, dtype), rope_length=270), told_ids(90)


def known_of(profile: str, ids: Tensor) -> Recomputed | None:
    """What the first layer of `told_model` computes of a text."""
    return told_model().run(ids.numpy()) if profile == "conditional" else None


def golden_groups_cache() -> DynamicCache:
    """20 tokens: full attention in layers 1 and 4, a window in 0 and 5, states in 2, latents with an indexer in 3, nothing in 6."""

    def formula(*shape: int) -> Tensor:
        patterns = 16256 + (torch.arange(math.prod(shape)) * 7919) % 389 - 128
        return patterns.to(torch.int16).view(torch.bfloat16).reshape(1, *shape)

    cache = DynamicCache()
    for layer in range(7):
        if layer in (1, 4):
            cache.layers.append(DynamicLayer())
            cache.layers[layer].update(formula(2, 20, 4), -formula(2, 20, 4))
        elif layer in (0, 5):
            cache.layers.append(DynamicSlidingWindowLayer(sliding_window=7))
            cache.layers[layer].update(formula(1, 20, 4), -formula(1, 20, 4))
        elif layer == 2:
            cache.layers.append(LinearAttentionLayer())
            cache.layers[layer].update_conv_state(formula(6, 4))
            cache.layers[layer].update_recurrent_state(formula(2, 3, 4).float())
        elif layer == 3:
            cache.layers.append(DynamicIndexedLayer())
            cache.layers[layer].update(formula(1, 20, 6), formula(1, 20, 2))
            cache.layers[layer].update_indexer(formula(20, 4))
        else:
            cache.layers.append(DummyLayer())
    return cache


def test_the_golden_stream_of_groups():
    """Integers alone decide its bytes, and the page suffices to read them."""
    cache, stream = golden_groups_cache(), golden_stream("groups")
    codec = Codec(lossless=True, chunk_tokens=8)
    assert codec.encode(cache).hex() == stream.hex()
    found = groups_by_the_page(stream)
    full, latent, window, convolution, state, indexer, nothing = sorted(
        found, key=lambda one: (one["kind"] in (4, 5, 6), one["kind"] == 2, one["kind"], one["part"])
    )
    assert [one["layers"] for one in (full, window, latent, convolution, state, indexer, nothing)] == [
        [1, 4],
        [0, 5],
        [3],
        [2],
        [2],
        [3],
        [6],
    ]
    both = full["numbers"].reshape(2, 2, 2, 20, 4)
    for at, layer in enumerate((1, 4)):
        np.testing.assert_array_equal(both[0, at], cache.layers[layer].keys[0].float().numpy())
        np.testing.assert_array_equal(both[1, at], cache.layers[layer].values[0].float().numpy())
    for one, layers in ((window, (0, 5)), (latent, (3,))):
        for at, layer in enumerate(layers):
            # Of a latent transformers keeps the vector as keys; in a stream the rotary part is the key.
            sides = ("values", "keys") if one is latent else ("keys", "values")
            first, second = (getattr(cache.layers[layer], side)[0].float().numpy() for side in sides)
            width = first.shape[-1]
            np.testing.assert_array_equal(one["numbers"][at][..., :width], first)
            np.testing.assert_array_equal(one["numbers"][at][..., width:], second)
    np.testing.assert_array_equal(convolution["numbers"][0], cache.layers[2].conv_states[0][0].float().numpy())
    np.testing.assert_array_equal(state["numbers"][0], cache.layers[2].recurrent_states[0][0].numpy())
    np.testing.assert_array_equal(indexer["numbers"][0, 0], cache.layers[3].indexer_keys[0].float().numpy())
    assert nothing["numbers"].size == 0


def test_the_golden_stream_of_rounded_states():
    """Integers and single operations of binary32 decide its bytes. All else is as in the stream that keeps states exactly."""
    cache, stream = golden_groups_cache(), golden_stream("states")
    codec = Codec(lossless=True, chunk_tokens=8, states="int6")
    assert codec.encode(cache).hex() == stream.hex()
    found, exact = (groups_by_the_page(data) for data in (stream, golden_stream("groups")))
    for one, other in zip(found, exact, strict=True):
        if (one["kind"], one["part"]) != (4, 3):
            np.testing.assert_array_equal(one["numbers"], other["numbers"])
            continue
        np.testing.assert_array_equal(one["numbers"][0], codec.decode(stream).layers[2].recurrent_states[0][0].numpy())
        largest = np.abs(other["numbers"]).max(axis=-1, keepdims=True)
        assert (np.abs(one["numbers"] - other["numbers"]) <= largest / 31 / 2 * 1.1).all()
        assert (one["numbers"] != other["numbers"]).any()


def golden_windows_cache(n: int = 6) -> DynamicCache:
    """Full attention in layer 0 and a window of 5 in layer 1, in quarters: the first n of 6 tokens."""
    rows = ((torch.arange(4 * 6 * 8).reshape(4, 1, 1, 6, 8) * 7) % 25 - 12) / 4
    cache = DynamicCache()
    for sides, layer in ((rows[:2], DynamicLayer()), (rows[2:], DynamicSlidingWindowLayer(sliding_window=5))):
        layer.update(*(side[:, :, :n].bfloat16() for side in sides))
        cache.layers.append(layer)
    return cache


def test_the_golden_stream_of_coded_windows():
    """Two resume points; the rows of both groups at one step, each in its own metric."""
    codec, points = golden_joint_codec("windows"), ResumePoints(4)
    assert points.take(golden_windows_cache(4))
    stream = golden_stream("windows")
    assert codec.encode(golden_windows_cache(), points=points).hex() == stream.hex()
    full, window = coded_groups_by_the_page(stream, codec.calibration)
    assert (full[0], window[0]) == ([*range(6)], [*range(6)])
    for n in (4, 6):
        decoded = codec.decode(stream, tokens=n)
        for (_, rows), layer, first in ((full, 0, 0), (window, 1, max(0, n - 4))):
            found = decoded.layers[layer].keys[0].float().numpy(), decoded.layers[layer].values[0].float().numpy()
            np.testing.assert_array_equal(rows[0, 0, :, first:n], found[0])
            np.testing.assert_array_equal(rows[1, 0, :, first:n], found[1])
    # What the vectors pick comes back as close as the step and bfloat16 allow.
    window_keys = golden_windows_cache(6).layers[1].keys[0, 0, :, [1, 6]].float().numpy()
    np.testing.assert_allclose(window[1][0, 0, 0, 2:][:, [1, 6]], window_keys, atol=0.2)


@pytest.mark.parametrize("options", [{"step": 0.1}, {"ratio": 4, "window_format": "coded"}])
def test_the_specification_suffices_for_coded_windows_of_layers(options):
    """Rotation, sinks, levels that are not there, and exact groups between."""
    codec = Codec(windowed_calibration(), chunk_tokens=16, sink_tokens=2, window_tokens=3, **options)
    points = ResumePoints(16)
    for n in (16, 32):
        assert points.take(mixed_cache(n, part_of=50))
    stream = codec.encode(mixed_cache(), points=points)
    full, window = coded_groups_by_the_page(stream, codec.calibration)
    assert (full[0], window[0]) == ([*range(50)], [*range(9, 16), *range(25, 32), *range(43, 50)])
    back = codec.decode(stream)
    for (_, rows), layers in ((full, (0, 2, 5)), (window, (1, 4))):
        for at, layer in enumerate(layers):
            for side, found in enumerate((back.layers[layer].keys[0], back.layers[layer].values[0])):
                np.testing.assert_allclose(
                    rows[side, at, :, -found.shape[1] :], found.float().numpy(), rtol=1e-4, atol=1e-3
                )


# From here on nothing of the package is used but the tensors of a calibration, and of a model's first layers.

Sides = tuple[np.ndarray, np.ndarray]
"""Of keys, and of values."""


def decode_by_the_page(
    data: bytes, calibration: Calibration, known: Recomputed | None = None
) -> tuple[list[int], int, np.ndarray, np.ndarray]:
    """Stream -> positions, rope length, keys and values [L, H, T, D] float32. Assumes a sound stream that begins a text.

    known: what the first layers compute of all tokens, for `conditional`.
    """
    magic, version, profile, flags, n_groups, _, cell, n_chunks, n_sections, crc = struct.unpack_from(
        "<4s4B16s4I", data
    )
    kind, dtype, n_runs, part, _, heads, *dims, group_flags, rope_length = struct.unpack_from("<2B7HI", data, 40)
    layers = struct.unpack_from("<2H", data, 60)[1]
    section_table = 64 + 20 * n_chunks
    tables_end = section_table + 20 * n_sections
    is_one_width = dims[0] == dims[1]
    assert (magic, version, n_groups, n_runs, part) == (b"KVTC", 3, 1, 1, 1)
    assert (kind, group_flags) == (1 if is_one_width or heads > 1 else 3, 0)
    assert zlib.crc32(data[:36] + data[40:tables_end]) == crc
    sections, start = {}, tables_end
    for index in range(n_sections):
        kind, coder, group, chunk, raw, stored, crc = struct.unpack_from("<BBHIIII", data, section_table + 20 * index)
        part = data[start : start + stored]
        assert (group, zlib.crc32(part)) == (0, crc)
        if coder in EXACT_CODERS:
            n_tokens = struct.unpack_from("<3H", data, 68 + 20 * chunk)[kind - 3]
            groups = (2 * layers * heads, dims[0]) if is_one_width else (layers * heads, sum(dims))
            sections[kind, chunk] = EXACT_CODERS[coder](part, (groups[0], n_tokens, groups[1]), dtype)
            assert len(sections[kind, chunk]) == raw
        else:
            sections[kind, chunk] = undo_coder(part, coder, raw)
        start += stored
    assert start == len(data)

    allocations, at = [], 0
    rate = sections[1, 0xFFFFFFFF]
    for _ in range(2 if profile == 1 else 0):
        (count,) = struct.unpack_from("<H", rate, at)
        allocations.append([struct.unpack_from("<IHHB", rate, at + 2 + 9 * i) for i in range(count)])
        at += 2 + 9 * count

    assert profile != 4 or not rate
    steps = struct.unpack(f"<{len(rate) // 4}f", rate) if profile > 1 else ()
    positions: list[int] = []
    parts: list[Sides] = []
    for index in range(n_chunks):
        first, n_sink, n_body, n_window, chunk_flags, _ = struct.unpack_from("<IHHHH8s", data, 64 + 20 * index)
        n = n_sink + n_body + n_window
        if chunk_flags & 1:
            assert flags & 4
            here = [first // cell * cell + offset for offset in struct.unpack(f"<{n}H", sections[2, index])]
        else:
            here = list(range(first, first + n))
        known = known if profile == 3 else None
        if n_sink and chunk_flags & 2:
            parts.append(fp8_vectors(sections[3, index], (layers, heads, n_sink), dims, dtype))
        elif n_sink:
            parts.append(exact_sides(sections[3, index], (layers, heads, n_sink), dims, dtype))
        if n_body and profile == 4:
            parts.append(exact_sides(sections[4, index], (layers, heads, n_body), dims, dtype))
        elif n_body:
            if profile == 1:
                rows = body_rows(sections[4, index], n_body, allocations, calibration)
            else:
                rows = joint_rows(sections[4, index], n_body, steps[0], here[n_sink:], known, calibration)
            places = np.array(here[n_sink : n_sink + n_body])
            parts.append(both_sides(rows, places, known, rope_length, heads, dims, calibration, dtype))
        if n_window and chunk_flags & 8:
            rows = joint_rows(sections[5, index], n_window, steps[1], here[n_sink + n_body :], known, calibration)
            places = np.array(here[n_sink + n_body :])
            parts.append(both_sides(rows, places, known, rope_length, heads, dims, calibration, dtype))
        elif n_window:
            parts.append(exact_sides(sections[5, index], (layers, heads, n_window), dims, dtype))
        if chunk_flags & 4:
            assert not any(sections[6, index])
        positions += here
    keys, values = (np.concatenate(side, axis=2) for side in zip(*parts, strict=True))
    return positions, rope_length, keys, values


def groups_by_the_page(data: bytes) -> list[dict]:
    """The groups of a lossless stream: kind, part, layers, and numbers by layer, rows of all chunks together."""
    profile, _, n_groups, cell, n_chunks, n_sections = struct.unpack_from("<x3B16x3I", data, 4)
    assert (data[:5], profile) == (b"KVTC\x03", 4)
    entries = [struct.unpack_from("<2B7HI", data, 40 + 20 * index) for index in range(n_groups)]
    at, groups = 40 + 20 * n_groups, []
    for kind, dtype, n_runs, part, _, heads, key_dim, value_dim, flags, extent in entries:
        layers = []
        for _ in range(n_runs):
            first, count = struct.unpack_from("<2H", data, at)
            layers += range(first, first + count)
            at += 4
        axes = [axis for axis in (heads, key_dim, value_dim) if axis]
        groups.append(
            {
                "kind": kind,
                "dtype": dtype,
                "part": part,
                "layers": layers,
                "axes": axes,
                "flags": flags,
                "extent": extent,
                "parts": [],
            }
        )
    chunks = [struct.unpack_from("<IHHHH8s", data, at + 20 * index) for index in range(n_chunks)]
    assert all(first // cell == (first + n - 1) // cell for first, _, n, _, _, _ in chunks)
    at += 20 * n_chunks
    start = at + 20 * n_sections
    for index in range(n_sections):
        kind, coder, number, chunk, raw, stored, crc = struct.unpack_from("<BBHIIII", data, at + 20 * index)
        part, start = data[start : start + stored], start + stored
        assert zlib.crc32(part) == crc
        if kind == 1:
            assert (raw, stored) == (0, 0)
            continue
        group, n_tokens = groups[number], chunks[chunk][2]
        size = {1: 2, 2: 2, 3: 4, 4: 1, 5: 1}[group["dtype"]]
        is_coded = number == 0 and group["kind"] in (1, 3) and group["axes"][1] == group["axes"][2]
        if group["kind"] == 4:
            assert kind == 7
            shape = len(group["layers"]), *group["axes"]
            order = (-1, *shape[-2:])
        else:
            heads, width = group["axes"][0], sum(group["axes"][1:])
            n_rows = raw // (size * len(group["layers"]) * heads * width)
            assert n_rows == n_tokens or group["kind"] == 2
            shape = len(group["layers"]), heads, n_rows, width
            if is_coded:
                shape = 2, len(group["layers"]) * heads, n_rows, width // 2
            order = (-1, *shape[-2:])
        n_numbers = math.prod(shape)
        order = (n_numbers // (order[1] * order[2]), *order[1:])
        if coder == 5:
            assert group["kind"] == 4
            group["parts"].append(rounded_state(part, order, group["dtype"]).reshape(shape))
            continue
        exact = EXACT_CODERS.get(coder)
        plain = exact(part, order, group["dtype"]) if exact else undo_coder(part, coder, raw)
        group["parts"].append(numbers(plain, shape, group["dtype"]))
    assert start == len(data)
    for group in groups:
        parts = group["parts"]
        group["numbers"] = np.concatenate(parts, axis=-2) if parts else np.empty(0)
    return groups


def coded_groups_by_the_page(data: bytes, calibration: Calibration) -> list[tuple[list[int], np.ndarray]]:
    """Of a stream of profile 2 that begins a text, for each coded group: the positions of its rows, and these [2, L, H, n, D]."""
    profile, flags, n_groups, cell, n_chunks, n_sections = struct.unpack_from("<x3B16x3I", data, 4)
    assert (data[:5], profile, flags & 4) == (b"KVTC\x03", 2, 0)
    entries = [struct.unpack_from("<2B7HI", data, 40 + 20 * index) for index in range(n_groups)]
    at = 40 + 20 * n_groups
    n_layers = []
    for entry in entries:
        n_layers.append(sum(struct.unpack_from("<2H", data, at + 4 * run)[1] for run in range(entry[2])))
        at += 4 * entry[2]
    chunks = [struct.unpack_from("<IHHHH8s", data, at + 20 * index) for index in range(n_chunks)]
    at += 20 * n_chunks
    start, steps = at + 20 * n_sections, ()
    found: list[tuple[list[int], list[np.ndarray]]] = [([], []) for _ in entries]
    for index in range(n_sections):
        kind, coder, number, chunk, raw, stored, crc = struct.unpack_from("<BBHIIII", data, at + 20 * index)
        part, start = data[start : start + stored], start + stored
        assert zlib.crc32(part) == crc
        if kind == 1:
            steps = struct.unpack(f"<{raw // 4}f", part)
            continue
        _, dtype, _, _, _, heads, dim, value_dim, group_flags, _ = entries[number]
        if number and not group_flags & 4:
            continue
        assert dim == value_dim
        first, *counts, chunk_flags, _ = chunks[chunk]
        shape = n_layers[number], heads
        n_rows = counts[kind - 3]
        if number:
            row_bytes = {1: 2, 2: 2, 3: 4, 4: 1, 5: 1}[dtype] * math.prod(shape) * 2 * dim
            n_rows, rest = divmod(raw, row_bytes)
            assert (rest, 0 < n_rows <= counts[kind - 3]) == (0, True)
        stop = first + sum(counts[: kind - 2])
        places = np.arange(stop - n_rows, stop)
        if kind == 4 or (kind == 5 and chunk_flags & 8):
            assert coder == (7 if number else 0)
            one = calibration.groups[sum(entry[8] & 4 > 0 for entry in entries[1 : number + 1])]
            rows = joint_rows(part, n_rows, steps[kind - 4], places.tolist(), None, one)
            sides = np.stack(both_sides(rows, places, None, 1, heads, [dim, dim], one, dtype))
        elif coder in EXACT_CODERS:
            plain = EXACT_CODERS[coder](part, (2 * math.prod(shape), n_rows, dim), dtype)
            sides = numbers(plain, (2, *shape, n_rows, dim), dtype)
        else:
            sides = numbers(undo_coder(part, coder, raw), (2, *shape, n_rows, dim), dtype)
        found[number][0].extend(places.tolist())
        found[number][1].append(sides)
    assert start == len(data)
    assert all(first // cell == (first + sum(counts) - 1) // cell for first, *counts, _, _ in chunks)
    return [(places, np.concatenate(parts, axis=3)) for places, parts in found if parts]


def both_sides(
    rows: Sides,
    places: np.ndarray,
    known: Recomputed | None,
    rope_length: int,
    heads: int,
    dims: list[int],
    calibration: Calibration,
    dtype: int,
) -> Sides:
    """[n, p'] of coded layers -> [L, H, n, D], keys rotated; recomputed layers are as the model caches them."""
    n, own = len(places), 0 if known is None else known.keys.shape[0]
    sides = []
    for side, dim in zip(rows, dims, strict=True):
        coded = side.reshape(n, -1, heads, dim).transpose(1, 2, 0, 3)
        sides.append(np.concatenate([np.zeros((own, heads, n, dim), np.float32), coded]))
    rotate(sides[0], places, rope_length, calibration)
    if known is not None:
        for side, its in zip(sides, (known.keys, known.values), strict=True):
            side[:own] = its.float().numpy()[:, :, places]
    return round_to(sides[0], dtype), round_to(sides[1], dtype)


def exact_sides(data: bytes, heads: tuple[int, int, int], dims: list[int], dtype: int) -> Sides:
    """Exact tokens -> keys and values; heads: L, H, n."""
    if dims[0] == dims[1]:
        keys, values = numbers(data, (2, *heads, dims[0]), dtype)
    else:
        keys, values = np.split(numbers(data, (*heads, sum(dims)), dtype), [dims[0]], axis=3)
    return keys, values


def undo_coder(part: bytes, coder: int, raw: int) -> bytes:
    if coder == 0:
        return part
    n = -(-raw // 65536)
    lengths = struct.unpack_from(f"<{n}I", part)
    out, at = b"", 4 * n
    for index, length in enumerate(lengths):
        block, size = part[at : at + length], min(65536, raw - 65536 * index)
        if coder == 1:
            out += zlib.decompress(block, wbits=-15)
        elif coder == 2:
            out += zstandard.ZstdDecompressor().decompress(block, max_output_size=size)
        else:
            out += lz4.block.decompress(block, uncompressed_size=size)
        at += length
    assert len(out) == raw
    return out


def small_floats(exponent_bits: int, mantissa_bits: int, bias: int) -> np.ndarray:
    """The 256 values of an 8-bit float format; its infinities are not among what tests decode."""
    code = np.arange(256)
    exponent, mantissa = (code >> mantissa_bits) & ((1 << exponent_bits) - 1), code & ((1 << mantissa_bits) - 1)
    fraction = mantissa / (1 << mantissa_bits) + (exponent > 0)
    return np.where(code < 128, 1, -1) * fraction * 2.0 ** (np.maximum(exponent, 1) - bias)


E4M3, E5M2 = small_floats(4, 3, 7), small_floats(5, 2, 15)


def numbers(data: bytes, shape: tuple[int, ...], dtype: int) -> np.ndarray:
    if dtype == 1:
        values = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    elif dtype in (2, 3):
        values = np.frombuffer(data, "<f2" if dtype == 2 else "<f4").astype(np.float32)
    else:
        values = (E4M3 if dtype == 4 else E5M2)[np.frombuffer(data, np.uint8)].astype(np.float32)
    return values.reshape(shape)


def exact_floats(data: bytes, shape: tuple[int, int, int], dtype: int) -> bytes:
    """Coder 4; numbers are ordered [group][token][feature]."""
    n_bits, m = {1: (16, 7), 2: (16, 10), 3: (32, 23), 4: (8, 3), 5: (8, 2)}[dtype]
    n_words, x = struct.unpack_from("<2I", data)
    words = iter(struct.unpack_from(f"<{n_words}H", data, 8))
    plain, n_plain = int.from_bytes(data[8 + 2 * n_words :], "little"), 0
    counts = [[1] * 64 for _ in range(128)]
    tables = [[64] * 64 for _ in range(128)]
    left, negatives = [16] * 128, [32768] * 132
    running = [(2 ** (n_bits - 2 - m) - 1) * 2 ** (m + 4), 2 ** (m + 4)]
    groups, n_tokens, n_features = shape
    state: dict[tuple[int, int], list[int]] = {}
    found = np.zeros(shape, np.uint32)

    def step(frequencies: list[int]) -> int:
        nonlocal x
        slot, symbol, first = x % 4096, 0, 0
        while first + frequencies[symbol] <= slot:
            first += frequencies[symbol]
            symbol += 1
        x = frequencies[symbol] * (x // 4096) + slot - first
        if x < 65536:
            x = 65536 * x + next(words)
        return symbol

    for token in range(n_tokens):
        for group in range(groups):
            for feature in range(n_features):
                mean, spread, sign = state.get((group, feature), [*running, 0])
                if token == 0:
                    mean, spread = running
                spread_class = 0
                octave = max(spread, 16).bit_length() - 1
                quarter = max(spread, 16) * 4 // 2**octave % 4
                spread_class = min(4 * (octave - 4) + quarter, 127)
                u = min(max(spread_class // 4 - 2, 0), max(m - 2, 0))
                symbol = step(tables[spread_class])
                counts[spread_class][symbol] += 1
                left[spread_class] -= 1
                if not left[spread_class]:
                    its, total = counts[spread_class], sum(counts[spread_class])
                    frequencies = [1 + 4032 * count // total for count in its]
                    frequencies[its.index(max(its))] += 4096 - sum(frequencies)
                    tables[spread_class], left[spread_class] = frequencies, total // 4
                if symbol == 63:
                    u, above = n_bits - 1, 0
                else:
                    above = mean // 16 // 2**u + symbol - 40
                magnitude = above * 2**u + (plain >> n_plain) % 2**u
                n_plain += u
                context = 4 * (sign // 64 + 16) + sum(symbol >= bound for bound in (35, 40, 45))
                f = min(max(negatives[context] // 16, 16), 4080)
                negative = 1 - step([f, 4096 - f])
                negatives[context] += (65536 * negative - negatives[context]) // 32
                found[group, token, feature] = magnitude + negative * 2 ** (n_bits - 1)
                deviation = 16 * magnitude - mean
                if token == 0:
                    running = [mean + deviation // 8, spread + (abs(deviation) - spread) // 16]
                    state[group, feature] = [16 * magnitude, running[1], -256 if negative else 256]
                else:
                    most = 6 * max(spread, 16)
                    clipped = min(max(deviation, -most), most)
                    by_mean, by_spread = 65536 // (min(token, 15) + 1), 65536 // (min(token + 1, 15) + 1)
                    state[group, feature] = [
                        mean + clipped * by_mean // 65536,
                        spread + (abs(clipped) - spread) * by_spread // 65536,
                        sign + ((-1024 if negative else 1024) - sign) // 8,
                    ]
    assert x == 65536
    assert next(words, None) is None
    assert len(data) == 8 + 2 * n_words + -(-n_plain // 8)
    assert not plain >> n_plain
    return found.astype(f"<u{n_bits // 8}").tobytes()


def exact_channels(data: bytes, shape: tuple[int, int, int], dtype: int) -> bytes:
    """Coder 6; numbers are ordered [group][token][feature]."""
    n_bits = {1: 16, 2: 16, 3: 32, 4: 8, 5: 8}[dtype]
    size, (groups, n_tokens, n_features) = n_bits // 8, shape
    n_channels = groups * n_features
    n_classes, *lengths = struct.unpack_from("<H5I", data)
    n_plain = list(data[22 : 22 + n_classes])
    at, parts = 22 + n_classes, []
    for length in lengths:
        parts.append(data[at : at + length])
        at += length
    escaped = iter(np.frombuffer(data[at:], f"<u{size}").tolist())
    classes = list(exact_floats(parts[0], (groups, 1, n_features), 4))
    by_class = sorted(range(n_channels), key=lambda channel: (classes[channel], channel))
    centres = dict(
        zip(
            by_class,
            np.frombuffer(exact_floats(parts[1], (1, 1, n_channels), dtype), f"<u{size}").tolist(),
            strict=True,
        )
    )
    tables = np.frombuffer(exact_floats(parts[2], (1, n_classes, 128), 2), "<u2").reshape(n_classes, 128).tolist()
    lanes = 1
    while 2 * lanes <= min(32, n_tokens, n_channels * n_tokens // 10240):
        lanes *= 2
    states = list(struct.unpack_from(f"<{lanes}I", parts[3]))
    words = iter(np.frombuffer(parts[3][4 * lanes :], "<u2").tolist())
    symbols = np.zeros((n_channels, n_tokens), int)
    for block in range(0, n_tokens, lanes):
        for channel in range(n_channels):
            frequencies = tables[classes[channel]]
            for token in range(block, min(block + lanes, n_tokens)):
                x, symbol, first = states[token - block], 0, 0
                while first + frequencies[symbol] <= x % 4096:
                    first += frequencies[symbol]
                    symbol += 1
                x = frequencies[symbol] * (x // 4096) + x % 4096 - first
                states[token - block] = 65536 * x + next(words) if x < 65536 else x
                symbols[channel, token] = symbol
    assert set(states) == {65536}
    assert next(words, None) is None
    plain, n_read = int.from_bytes(parts[4], "little"), 0
    found = np.zeros(shape, np.uint32)
    for channel in range(n_channels):
        u, centre = n_plain[classes[channel]], centres[channel]
        for token in range(n_tokens):
            symbol = symbols[channel, token]
            y = symbol % 64
            above = next(escaped) if y == 63 else centre % 2 ** (n_bits - 1) + y - 40
            sign = centre // 2 ** (n_bits - 1) ^ symbol // 64
            number = above * 2**u + (plain >> n_read) % 2**u + sign * 2 ** (n_bits - 1)
            found[channel // n_features, token, channel % n_features] = number
            n_read += u
    assert next(escaped, None) is None
    assert len(parts[4]) == -(-n_read // 8)
    assert not plain >> n_read
    return found.astype(f"<u{size}").tobytes()


EXACT_CODERS = {4: exact_floats, 6: exact_channels}


def rounded_state(data: bytes, shape: tuple[int, int, int], dtype: int) -> np.ndarray:
    """Coder 5; numbers are ordered [group][row][feature]."""
    (m,) = struct.unpack_from("<I", data)
    of_scales = *shape[:2], 1
    scales = numbers(exact_floats(data[4 : 4 + m], of_scales, 1), of_scales, 1)
    octets = np.frombuffer(exact_floats(data[4 + m :], shape, 4), np.uint8).astype(np.int32).reshape(shape)
    return round_to(scales * np.where(octets >= 128, 128 - octets, octets).astype(np.float32), dtype)


def fp8_vectors(data: bytes, heads: tuple[int, int, int], dims: list[int], dtype: int) -> Sides:
    n_vectors, first = math.prod(heads), 0
    scales = np.frombuffer(data, "<f2", offset=n_vectors * sum(dims)).astype(np.float32) / np.float32(448)
    sides = []
    for its_scales, dim in zip(np.split(scales, 2), dims, strict=True):
        symbols = E4M3[np.frombuffer(data, np.uint8, n_vectors * dim, first)].astype(np.float32)
        sides.append(round_to(symbols.reshape(*heads, dim) * its_scales.reshape(*heads, 1), dtype))
        first += n_vectors * dim
    return sides[0], sides[1]


def body_rows(data: bytes, n: int, allocations: list, calibration: Calibration) -> Sides:
    """[n, p] float32: keys before rotation, and values."""
    at, sides = 0, []
    for runs, kind in zip(allocations, (calibration.key, calibration.value), strict=True):
        coefficients = np.zeros((n, kind.basis.rank), np.float32)
        for start, size, count, bits in runs:
            if bits < 16:
                octets = np.frombuffer(data, np.uint8, 4 * count * n, at).reshape(2, 2, count * n)
                shift, scale = (
                    (low.astype("<u2") + (high.astype("<u2") << 8)).view("<f2").astype(np.float32).reshape(count, n, 1)
                    for low, high in octets
                )
                at += 4 * count * n
            n_bytes = -(-count * n * size * bits // 8)
            packed = np.frombuffer(data, np.uint8, n_bytes, at)
            at += n_bytes
            if bits == 16:
                values = packed.view("<f2").astype(np.float32).reshape(count, n, size)
            elif bits == 8:
                values = shift + E4M3[packed].astype(np.float32).reshape(count, n, size) * (scale / np.float32(448))
            else:
                symbols = (packed[:, None] >> np.arange(0, 8, bits)) & (2**bits - 1)
                symbols = symbols.reshape(-1)[: count * n * size].reshape(count, n, size).astype(np.float32)
                values = shift + symbols * (scale / np.float32(2**bits - 1))
            coefficients[:, start : start + size * count] = values.transpose(1, 0, 2).reshape(n, -1)
        sides.append(coefficients @ kind.basis.vectors.float().numpy().T + kind.basis.mean.numpy())
    assert at == len(data)
    return sides[0], sides[1]


def joint_rows(
    data: bytes, n: int, step: float, places: list[int], known: Recomputed | None, calibration: Calibration
) -> Sides:
    """As `body_rows`, for the profiles with one step; with `conditional` of the layers behind the recomputed ones."""
    joint = calibration.joint if known is None else calibration.conditional.left
    model, order, rank = joint.coefficients, joint.basis.order.numpy(), joint.basis.vectors.shape[1]
    levels = [8] * n
    if calibration.importance is not None:
        levels, data = [data[token // 2] >> 4 * (token % 2) & 15 for token in range(n)], data[-(-n // 2) :]
    at = -(-n // 4)
    activities = [data[token // 4] >> 2 * (token % 4) & 3 for token in range(n)]
    (length,) = struct.unpack_from("<I", data, at)
    classes = variance_classes(model.deviations, step)
    tables = model.tables.frequencies.astype(int).tolist()
    symbols = rans_symbols(data[at + 4 : at + 4 + length], activities, classes, tables)
    escapes = iter(escaped_values(data[at + 4 + length :]))
    coefficients = np.zeros((n, len(order)), np.float32)
    for column, (row, of_column) in enumerate(zip(symbols, classes, strict=True)):
        for token, symbol in enumerate(row):
            value = next(escapes) if symbol == 63 else symbol - 31
            offset = model.tables.offsets[activities[token], of_column, int(abs(value) > 1)]
            decoded = np.sign(value) * (np.float32(abs(value)) - offset) * np.float32(step)
            coefficients[token, order[column]] = decoded / np.float32(2.0 ** ((levels[token] - 8) / 2))
    assert next(escapes, None) is None

    tensors = dict(joint.tensors("joint"))
    scales, mean = tensors["joint.scales"].numpy().astype(np.float32), tensors["joint.mean"].numpy()
    sides, at, first = [], 0, 0
    n_blocks = len(scales) // 2
    for index, dim in enumerate(calibration.geometry.dims):
        features = slice(at, at + n_blocks * dim)
        its_scales = np.repeat(scales[index * n_blocks : (index + 1) * n_blocks], dim, axis=0)
        rows = coefficients[:, :rank] @ (joint.basis.vectors.numpy()[features] * its_scales).T + mean[features]
        # Blocks of two widths are one row of numbers in the file.
        own = slice(first, first + n_blocks * dim * dim)
        roots, turns = (tensors[f"joint.{name}"].float().numpy().reshape(-1)[own] for name in ("roots", "turns"))
        inverses = np.linalg.inv(roots.reshape(-1, dim, dim).astype(np.float64)).astype(np.float32)
        turned = coefficients[:, rank:][:, features].reshape(n, n_blocks, dim)
        blocks = rows.reshape(turned.shape) + np.einsum("tbd,bed->tbe", turned, turns.reshape(-1, dim, dim))
        sides.append(np.einsum("tbd,bde->tbe", blocks, inverses).reshape(n, -1))
        at, first = features.stop, own.stop
    if known is not None:
        hidden = known.hidden.float().numpy()[places[:n]]
        rms = np.maximum(np.sqrt(np.mean(hidden**2, axis=1, keepdims=True)), np.float32(1e-6))
        features = np.concatenate([hidden / rms, hidden.clip(-50, 50) / np.float32(10), np.ones_like(rms)], axis=1)
        said = features @ calibration.conditional.weights.float().numpy()
        sides = [side + its for side, its in zip(sides, np.split(said, [sides[0].shape[1]], axis=1), strict=True)]
    return sides[0], sides[1]


def variance_classes(deviations: np.ndarray, step: float) -> list[int]:
    """Of the coefficients that are coded; numbers of Python are float64."""
    bounds = [
        step * (2.0 ** ((k - 1) // 2 - 3) if k % 2 else 0.7071067811865476 * 2.0 ** (k // 2 - 3)) for k in range(27)
    ]
    classes = [sum(float(deviation) >= bound for bound in bounds) - 1 for deviation in deviations]
    n_coded = max((i + 1 for i, found in enumerate(classes) if found >= 0), default=0)
    return [max(0, found) for found in classes[:n_coded]]


def rans_symbols(data: bytes, activities: list[int], classes: list[int], tables: list) -> list[list[int]]:
    """[coefficient][token]."""
    symbols = [[0] * len(activities) for _ in classes]
    if not classes:
        assert not data
        return symbols
    n_lanes = 1
    while 2 * n_lanes <= min(32, len(activities), len(activities) * len(classes) // 10240):
        n_lanes *= 2
    states = list(struct.unpack_from(f"<{n_lanes}I", data))
    words = iter(struct.unpack_from(f"<{(len(data) - 4 * n_lanes) // 2}H", data, 4 * n_lanes))
    for block in range(0, len(activities), n_lanes):
        for column, column_class in enumerate(classes):
            for token in range(block, min(block + n_lanes, len(activities))):
                row, state = tables[activities[token]][column_class], states[token - block]
                slot, symbol = state % 4096, 0
                while slot >= row[symbol]:
                    slot -= row[symbol]
                    symbol += 1
                state = row[symbol] * (state // 4096) + slot
                states[token - block] = state if state >= 65536 else state * 65536 + next(words)
                symbols[column][token] = symbol
    assert set(states) == {65536}
    assert next(words, None) is None
    return symbols


def escaped_values(data: bytes) -> list[int]:
    values, number, shift = [], 0, 0
    for octet in data:
        number |= (octet & 127) << shift
        shift += 7
        if octet < 128:
            values.append(-(number + 1) // 2 if number & 1 else number // 2)
            number, shift = 0, 0
    return values


def rotate(keys: np.ndarray, positions: np.ndarray, rope_length: int, calibration: Calibration) -> None:
    """Half-split rotation of every layer, in place; keys [L, H, n, D]."""
    rope = calibration.geometry.rope
    for layer, index in enumerate(rope.layer_tables):
        if index < 0:
            continue
        table = rope.tables[index]
        assert (table.interleaved, table.scaling, rope_length > 0) == (False, None, True)
        frequencies = np.array(table.inverse_frequencies, np.float32)
        angles = positions.astype(np.float32)[:, None] * frequencies
        cos, sin = np.cos(angles) * table.attention_scaling, np.sin(angles) * table.attention_scaling
        half = len(frequencies)
        first, second = keys[layer, ..., :half].copy(), keys[layer, ..., half : 2 * half].copy()
        keys[layer, ..., :half] = first * cos - second * sin
        keys[layer, ..., half : 2 * half] = second * cos + first * sin


def round_to(values: np.ndarray, dtype: int) -> np.ndarray:
    """Nearest value of the cache's dtype, ties to even, the largest one where it is passed."""
    kind = {1: torch.bfloat16, 2: torch.float16, 3: torch.float32, 4: torch.float8_e4m3fn, 5: torch.float8_e5m2}[dtype]
    limit = torch.finfo(kind).max
    return torch.from_numpy(values.astype(np.float32)).clamp(-limit, limit).to(kind).float().numpy()
