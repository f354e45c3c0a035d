"""Sliding windows beside full attention are coded at the same step, and come back at every resume point."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import kvtc
from kvtc.codec.codec import Codec
from kvtc.coding.joint.importance import Importance
from kvtc.errors import (
    CalibrationMismatch,
    CorruptCalibration,
    CorruptStream,
    GeometryMismatch,
    InvalidCache,
    UnsupportedVersion,
)
from tests.builders import GROUP_BYTES, HEADER_BYTES, patched, random_cache, rewritten, sections_of
from tests.tiny_architectures import MIXED_LAYERS, MIXED_WINDOWS, mixed_cache, windowed_calibration

CHUNK = 16


def windowed_codec(**options) -> Codec:
    defaults = {"sink_tokens": 2, "window_tokens": 3, "chunk_tokens": CHUNK}
    if not {"step", "lossless"} & options.keys():
        defaults["ratio"] = 4
    return Codec(windowed_calibration(), **(defaults | options))


def error_of(found, expected) -> float:
    """Relative, of keys and values [1, H, T, D] of two layers."""
    sides = [(getattr(found, name), getattr(expected, name)) for name in ("keys", "values")]
    return float(sum((a - b).square().sum() for a, b in sides) / sum(b.square().sum() for _, b in sides)) ** 0.5


def test_windows_are_coded_beside_full_layers():
    cache, codec = mixed_cache(), windowed_codec(step=0.05, states="lossless")
    stream = codec.encode(cache)
    back, info = codec.decode(stream), kvtc.inspect(stream)
    assert [group.is_coded for group in info.groups] == [True, True, False, False]
    for layer in (*MIXED_LAYERS, *MIXED_WINDOWS):
        assert 0 < error_of(back.layers[layer], cache.layers[layer]) < 0.1
        assert back.layers[layer].keys.shape == cache.layers[layer].keys.shape
        # The last tokens are exact in every group.
        assert torch.equal(back.layers[layer].keys[:, :, -3:], cache.layers[layer].keys[:, :, -3:])
        assert torch.equal(back.layers[layer].values[:, :, -3:], cache.layers[layer].values[:, :, -3:])
        assert not torch.equal(back.layers[layer].keys[:, :, -4], cache.layers[layer].keys[:, :, -4])
    assert torch.equal(back.layers[3].recurrent_states[0], cache.layers[3].recurrent_states[0])


def test_the_ratio_counts_the_bodies_of_all_groups():
    cache = mixed_cache(200)
    for ratio in (3, 6):
        stream = windowed_codec(ratio=ratio, window_tokens=0, sink_tokens=0).encode(cache)
        info = kvtc.inspect(stream)
        full, windows, *exact = info.groups
        rate = info.sections[0].stored_bytes
        tables = 40 + 20 * info.n_chunks + 20 + rate + 2 * 20 + 4 * (3 + 2)
        assert info.body_bytes == full.stored_bytes + windows.stored_bytes + tables
        assert info.body_ratio == (full.original_bytes + windows.original_bytes) / info.body_bytes
        assert abs(info.body_ratio / ratio - 1) < 0.02
        assert (windows.kind, windows.layers, windows.original_bytes) == (
            "sliding window",
            (1, 4),
            2 * 7 * 2 * 2 * 4 * 2,
        )
        assert not any(group.is_coded for group in exact)


def test_a_step_is_the_same_for_all_groups():
    """A group alone, and beside others, has the same bytes at one step."""
    cache, codec = mixed_cache(60), windowed_codec(step=0.1)
    both = kvtc.inspect(codec.encode(cache))
    full = replace(random_cache(60), layers=MIXED_LAYERS)
    alone = kvtc.inspect(codec.encode(full))
    sizes = [[s.stored_bytes for s in info.sections if s.group == 0 and s.kind == "body"] for info in (both, alone)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("window_format", ["exact", "coded"])
@pytest.mark.parametrize("n_tokens", [7, 8, 16, 17, 40, 50])
def test_every_prefix_that_ends_at_a_point_comes_back(n_tokens, window_format):
    """At points inside of the cache all is body; the stream of the parts up to a point is enough."""
    cache, points = mixed_cache(n_tokens), kvtc.ResumePoints(CHUNK)
    for at in range(CHUNK, n_tokens, CHUNK):
        assert points.take(mixed_cache(at, part_of=n_tokens))
    codec = windowed_codec(step=0.02, window_format=window_format)
    stream = codec.encode(cache, points=points)
    parts = kvtc.split_stream(stream)
    for at in (*range(CHUNK, n_tokens, CHUNK), n_tokens):
        back, expected = codec.decode(stream, tokens=at), mixed_cache(at, part_of=n_tokens)
        again = codec.decode(kvtc.join_streams(parts[: -(-at // CHUNK)]))
        for layer in (*MIXED_LAYERS, *MIXED_WINDOWS):
            assert error_of(back.layers[layer], expected.layers[layer]) < 0.05
            assert torch.equal(back.layers[layer].keys, again.layers[layer].keys)
            assert type(back.layers[layer]) is type(expected.layers[layer])
            assert back.layers[layer].get_seq_length() == at
        # Sinks are exact where a window still has them.
        first = max(0, at - 7)
        for layer in MIXED_WINDOWS if first < 2 else ():
            sinks = slice(0, 2 - first)
            assert torch.equal(back.layers[layer].keys[:, :, sinks], expected.layers[layer].keys[:, :, sinks])


@pytest.mark.parametrize("options", [{"lossless": True}, {"step": 0.02}, {"step": 0.02, "window_format": "coded"}])
@pytest.mark.parametrize("n_rows", [1, 3, 7])
def test_a_point_may_hold_the_last_rows_of_its_windows(options, n_rows):
    codec, points = windowed_codec(**options, window_tokens=2), kvtc.ResumePoints(CHUNK)
    points.take(mixed_cache(2 * CHUNK))
    stop = 2 * CHUNK
    cut = [
        one.span(stop - n_rows, stop, stop) if one.group.kind == "sliding window" else one for one in points.taken[stop]
    ]
    stream = codec.encode_point(cut, stop)
    assert kvtc.inspect(stream).first_position == stop - n_rows
    found = codec.decode_point(stream)
    assert [one.group for one in found] == [one.group for one in cut]
    for layer, expected in zip(found[0].sides, cut[0].sides, strict=True):
        for side, exact in zip(layer, expected, strict=True):
            assert side.shape == exact.shape
            assert float((side - exact).norm() / exact.norm()) < 0.05
            if "window_format" not in options:
                assert torch.equal(side[:, -2:], exact[:, -2:])
            if "lossless" in options:
                assert torch.equal(side, exact)


def test_profiles_that_code_one_group_leave_windows_as_they_are():
    cache = mixed_cache()
    for options in ({"profile": "paper", "ratio": 3}, {"lossless": True}):
        codec = Codec(windowed_calibration(), chunk_tokens=CHUNK, **options)
        stream = codec.encode(cache)
        assert not any(group.is_coded for group in kvtc.inspect(stream).groups[1:])
        back = codec.decode(stream)
        assert all(torch.equal(back.layers[layer].keys, cache.layers[layer].keys) for layer in MIXED_WINDOWS)
        # A codec of one profile reads all of them.
        assert torch.equal(windowed_codec().decode(stream).layers[1].keys, cache.layers[1].keys)


def test_batches_of_coded_windows():
    codec = windowed_codec(step=0.02)
    streams = [codec.encode(mixed_cache(n)) for n in (50, 20, 5)]
    batch, mask = codec.decode_batch(streams)
    assert mask.sum(dim=1).tolist() == [50, 20, 5]
    for index, stream in enumerate(streams):
        alone = codec.decode(stream)
        for layer in (*MIXED_LAYERS, *MIXED_WINDOWS):
            n = alone.layers[layer].keys.shape[2]
            assert torch.equal(batch.layers[layer].keys[index, :, -n:], alone.layers[layer].keys[0])
    exact = Codec(windowed_calibration(), "paper", chunk_tokens=CHUNK).encode(mixed_cache(20))
    mixed, _ = codec.decode_batch([streams[0], exact])
    assert torch.equal(mixed.layers[1].keys[1, :, -7:], mixed_cache(20).layers[1].keys[0])


def test_caches_without_the_windows_of_the_calibration():
    cache = mixed_cache()
    cache.layers[1], cache.layers[3] = cache.layers[3], cache.layers[1]
    with pytest.raises(
        GeometryMismatch, match=r"covers layers 0, 2, 5.*layers 1, 4,.*\(sliding window\); the cache holds"
    ):
        windowed_codec().encode(cache)
    stream = windowed_codec().encode(mixed_cache())
    with pytest.raises(
        GeometryMismatch, match=r"the stream codes sliding window of layers 1, 4, 2 heads of head_dim 4"
    ):
        Codec(replace(windowed_calibration(), further=()), ratio=3).decode(stream)
    other = Codec(replace(windowed_calibration(), further=windowed_calibration().further[:1], info={}), ratio=3)
    assert other.fingerprint == windowed_codec().fingerprint
    changed = replace(windowed_calibration().further[0], importance=Importance(torch.zeros(33)))
    with pytest.raises(CalibrationMismatch):
        Codec(replace(windowed_calibration(), further=(changed,)), ratio=3).decode(stream)


def test_windows_that_are_no_numbers_are_refused():
    cache = mixed_cache()
    cache.layers[4].values[0, 0, -1, 0] = float("nan")
    with pytest.raises(InvalidCache, match="values of layer 4 hold NaN"):
        windowed_codec().encode(cache)
    assert Codec(windowed_calibration(), lossless=True).encode(cache)


def test_the_calibration_file_has_all_groups(tmp_path):
    calibration = windowed_calibration()
    calibration.save(tmp_path / "calibration.safetensors")
    loaded = kvtc.load_calibration(tmp_path / "calibration.safetensors")
    assert loaded.fingerprint == calibration.fingerprint
    assert [(one.geometry.is_window, one.geometry.layers) for one in loaded.groups] == [
        (False, MIXED_LAYERS),
        (True, MIXED_WINDOWS),
    ]
    stream = windowed_codec().encode(mixed_cache())
    back = Codec(loaded, ratio=4).decode(stream)
    assert torch.equal(back.layers[1].keys, windowed_codec().decode(stream).layers[1].keys)


def test_a_calibration_file_of_groups_that_cannot_be(tmp_path):
    """Each is refused when it is loaded; none is used."""

    def widths(groups, _):
        groups[1] |= {"n_kv_heads": 1, "value_dim": 12}

    def latent(groups, _):
        groups[1]["kind"] = "latent"

    def no_basis(_, tensors):
        del tensors["group1.joint.mean"]

    def third(groups, _):
        groups.append(groups[1])

    def of_length(groups, _):
        groups[1]["rope"]["tables"][0]["dynamic"] = {"base": 10000.0, "factor": 2.0, "max_length": 32}

    for damage in (widths, latent, no_basis, third, of_length):
        path = tmp_path / f"{damage.__name__}.safetensors"
        windowed_calibration().save(path)

        def change(metadata, tensors, damage=damage):
            groups = json.loads(metadata["groups"])
            damage(groups, tensors)
            metadata["groups"] = json.dumps(groups)

        with pytest.raises((CorruptCalibration, UnsupportedVersion)):
            kvtc.load_calibration(rewritten(path, change))


def test_sections_of_coded_windows_that_cannot_be():
    """Another coder, length or type of a section of the window is damage, and nothing else."""
    codec = windowed_codec(step=0.05)
    stream = codec.encode(mixed_cache(8))
    mine = [number for number, section in enumerate(kvtc.inspect(stream).sections) if section.group == 1]
    assert [kvtc.inspect(stream).sections[number].kind for number in mine] == ["sink", "body", "window"]
    row_bytes = 2 * 2 * 4 * 2 * 4
    fields = [(0, "B", kind) for kind in (3, 4, 5, 7)] + [(1, "B", coder) for coder in (0, 4, 5, 7)]
    fields += [(8, "I", size) for size in (0, row_bytes - 1, 2 * row_bytes, 50 * row_bytes)]
    for number in mine:
        for offset, layout, value in fields:
            damaged = patched(stream, sections_of(stream)[number][0] + offset, layout, value)
            if damaged != stream:
                with pytest.raises(CorruptStream):
                    codec.decode(damaged)
    # The flag of the group: without it, or of a group that cannot be coded.
    for group, flags in ((1, 0), (0, 4), (2, 4)):
        with pytest.raises(CorruptStream):
            codec.decode(patched(stream, HEADER_BYTES + GROUP_BYTES * group + 14, "H", flags))
