"""Keys and values of two widths: full attention whose values are narrower than its keys, and latents (MLA)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvtc import Codec, KVCache, inspect, join_streams, load_calibration, split_stream
from kvtc.cache_file import load_cache, save_cache
from kvtc.coding.exact.tokens import decode_exact, decode_fp8, encode_exact, encode_fp8
from kvtc.coding.joint.basis import joint_in_bytes, joint_times_scales
from kvtc.coding.joint.blocks import HeadBlocks
from kvtc.coding.rope import NO_ROTATION, Rope
from kvtc.errors import CorruptCalibration, GeometryMismatch, InvalidArgument, InvalidCache

from ..builders import random_cache, relative_error, same_bits, same_cache, two_widths, two_widths_calibration

NAMES = ("wide keys", "latent")


def cache_of(name: str, n: int = 90, dtype: torch.dtype = torch.float32, seed: int = 0) -> KVCache:
    return random_cache(n, dtype, seed, geometry=two_widths(name))


def codec_of(name: str, profile: str, **options: object) -> Codec:
    return Codec(two_widths_calibration(name), profile, sink_tokens=2, window_tokens=9, chunk_tokens=32, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("profile", ["joint", "paper"])
@pytest.mark.parametrize("name", NAMES)
def test_a_round_trip(name, profile, dtype):
    """Sinks and window are exact; the body is near, and nearer at a lower ratio; parts decode alone."""
    cache, errors = cache_of(name, dtype=dtype), []
    for ratio in (2, 4):
        codec = codec_of(name, profile, ratio=ratio)
        stream = codec.encode(cache)
        restored = codec.decode(stream)
        for found, held in ((restored.keys, cache.keys), (restored.values, cache.values)):
            assert same_bits(found[:, :, :2], held[:, :, :2])
            assert same_bits(found[:, :, -9:], held[:, :, -9:])
        errors.append(max(relative_error(restored.keys, cache.keys), relative_error(restored.values, cache.values)))
        parts = split_stream(stream)
        assert join_streams(parts) == stream
        second = codec.decode(parts[1])
        torch.testing.assert_close(second.keys, restored.keys[:, :, 32:64], rtol=2**-7, atol=1e-3)
    assert errors[0] < errors[1] < 0.5
    assert errors[0] < (0.05 if profile == "joint" else 0.4)


@pytest.mark.parametrize("name", NAMES)
def test_ratios_count_both_widths(name):
    cache = cache_of(name, 600)
    info = inspect(codec_of(name, "joint", ratio=4).encode(cache))
    geometry = two_widths(name)
    assert info.original_bytes == 2 * 600 * geometry.joint_features
    assert info.body_ratio == pytest.approx(4, rel=0.03)
    assert info.groups[0].kind == {"wide keys": "full attention", "latent": "latent"}[name]
    assert info.groups[0].shape == (geometry.n_kv_heads, *geometry.dims)


@pytest.mark.parametrize("name", NAMES)
def test_fine_steps_code_the_remainder(name):
    codec = codec_of(name, "joint", step=2.0**-12)
    cache = cache_of(name)
    restored = codec.decode(codec.encode(cache))
    assert relative_error(restored.keys, cache.keys) < 1e-3
    assert relative_error(restored.values, cache.values) < 1e-3


@pytest.mark.parametrize("options", [{"fixed_size": True}, {"window_format": "coded"}, {"sink_format": "fp8"}])
@pytest.mark.parametrize("name", NAMES)
def test_other_forms_of_streams(name, options):
    cache, codec = cache_of(name, dtype=torch.bfloat16), codec_of(name, "joint", ratio=4, **options)
    stream = codec.encode(cache)
    restored = codec.decode(stream)
    assert relative_error(restored.keys, cache.keys) < 0.2
    assert relative_error(restored.values, cache.values) < 0.2
    if options == {"fixed_size": True}:
        assert (
            len(stream)
            == codec.stream_bytes(cache.n_tokens)
            == len(codec.encode(cache_of(name, dtype=torch.bfloat16, seed=1)))
        )


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_lossless_streams_are_bit_for_bit(name, calibrated):
    calibration = two_widths_calibration(name) if calibrated else None
    codec, cache = Codec(calibration, lossless=True, chunk_tokens=32), cache_of(name, dtype=torch.bfloat16)
    stream = codec.encode(cache)
    assert same_cache(codec.decode(stream), cache)
    assert len(stream) < cache.keys.nbytes + cache.values.nbytes


@pytest.mark.parametrize("name", NAMES)
def test_a_shift_turns_keys_and_keeps_values(name):
    codec, cache = codec_of(name, "joint", step=2.0**-12), cache_of(name)
    geometry = two_widths(name)
    moved = codec.decode(codec.encode(cache), start_position=7)
    plain = geometry.rope.unrotate(cache.keys, torch.arange(90), 90)
    torch.testing.assert_close(moved.keys, geometry.rope.rotate(plain, torch.arange(7, 97), 97), rtol=0, atol=5e-3)
    torch.testing.assert_close(moved.values, cache.values, rtol=0, atol=5e-3)


@pytest.mark.parametrize("name", NAMES)
def test_the_calibration_file(name, tmp_path):
    calibration = two_widths_calibration(name)
    calibration.save(tmp_path / "file")
    loaded = load_calibration(tmp_path / "file")
    assert loaded.fingerprint == calibration.fingerprint
    assert loaded.geometry == calibration.geometry
    stream = Codec(calibration, ratio=4).encode(cache_of(name, 200))
    assert Codec(loaded, ratio=4).encode(cache_of(name, 200)) == stream
    other = replace(calibration, geometry=replace(calibration.geometry, value_dim=calibration.geometry.value_dim + 4))
    with pytest.raises(CorruptCalibration):
        other.save(tmp_path / "other")


@pytest.mark.parametrize("name", NAMES)
def test_caches_of_other_widths_are_refused(name):
    cache, codec = cache_of(name), codec_of(name, "joint", ratio=4)
    with pytest.raises(GeometryMismatch, match="keys of"):
        codec.encode(KVCache(cache.values, cache.keys))
    with pytest.raises(InvalidCache, match="must both be"):
        codec.encode(KVCache(cache.keys, cache.values[:, :, 1:]))
    with pytest.raises(InvalidCache, match="no layer, head or feature"):
        codec.encode(KVCache(cache.keys, cache.values[..., :0]))
    lossless = Codec(lossless=True).encode(cache_of({"latent": "wide keys", "wide keys": "latent"}[name]))
    with pytest.raises(GeometryMismatch):
        codec.decode(lossless)


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_file(name, tmp_path):
    save_cache(tmp_path / "cache", cache_of(name))
    assert same_cache(load_cache(tmp_path / "cache")[0], cache_of(name))


def test_exact_tokens_in_bytes():
    shapes = ((2, 1, 5, 3), (2, 1, 5, 4))
    keys, values = (torch.randn(shape, generator=torch.Generator().manual_seed(3)).bfloat16() for shape in shapes)
    data = encode_exact(keys, values)
    assert all(map(same_bits, decode_exact(data, shapes, torch.bfloat16), (keys, values)))
    first = torch.frombuffer(bytearray(data), dtype=torch.bfloat16)[:7]
    assert same_bits(first, torch.cat([keys[0, 0, 0], values[0, 0, 0]]))
    found = decode_fp8(encode_fp8(keys, values), shapes, torch.bfloat16)
    for side, exact in zip(found, (keys, values), strict=True):
        torch.testing.assert_close(side, exact, rtol=0.07, atol=0.02)


def test_blocks_of_two_widths():
    drawn = torch.Generator().manual_seed(5)
    blocks = HeadBlocks(torch.randn(3, 2, 2, generator=drawn), torch.randn(3, 4, 4, generator=drawn))
    again = HeadBlocks.of(blocks.packed, 3, (2, 4))
    assert same_bits(again.keys, blocks.keys)
    assert same_bits(again.values, blocks.values)
    rows = torch.randn(6, 18, generator=drawn)
    dense = torch.block_diag(*blocks.keys, *blocks.values)
    torch.testing.assert_close(blocks.times(rows), rows @ dense)
    vectors, scales = joint_in_bytes(dense, blocks)
    assert scales.shape == (6, 18)
    torch.testing.assert_close(joint_times_scales(vectors, scales, blocks), dense, rtol=0, atol=0.02)


def test_keys_of_unknown_rotation_stay_where_they_are():
    calibration = two_widths_calibration("latent")
    rope = Rope((), (NO_ROTATION,) * 3, is_known=False)
    unknown = replace(calibration, geometry=replace(calibration.geometry, rope=rope))
    codec = Codec(unknown, "joint", ratio=4)
    stream = codec.encode(cache_of("latent", 300))
    assert codec.decode(stream, start_position=0).n_tokens == 300
    with pytest.raises(InvalidArgument, match="rotation of these keys is not known"):
        codec.decode(stream, start_position=5)
    assert Rope.from_json(rope.to_json()) == rope
    assert unknown.fingerprint != calibration.fingerprint
