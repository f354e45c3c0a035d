"""Levels of tokens, which give each a step of its own, and coefficients of the remainder, from a cache to a stream and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvtc import inspect
from kvtc.cache import KVCache
from kvtc.codec.codec import Codec
from kvtc.coding.joint.importance import FACTORS, MIDDLE_LEVEL, N_LEVELS
from kvtc.coding.transform import rows_of
from tests.builders import (
    assert_parts_decode_alone,
    joint_calibration,
    relative_error,
    stepped_calibration,
    tiny_geometry,
    told_cache,
    told_ids,
    told_model,
)

N = 200
PROFILES = ["joint", "conditional"]


def codec_of(profile: str = "joint", **options: object) -> Codec:
    return Codec(stepped_calibration(), profile, model=told_model(), sink_tokens=0, window_tokens=0, **options)


def levels_of(cache: KVCache) -> Tensor:
    keys = tiny_geometry().rope.unrotate(cache.keys, torch.arange(N), N)
    return stepped_calibration().importance.levels(torch.cat([rows_of(keys), rows_of(cache.values)], dim=1))


def test_factors_are_half_octaves_about_one():
    assert pytest.approx([2 ** ((level - MIDDLE_LEVEL) / 2) for level in range(N_LEVELS)]) == FACTORS


@pytest.mark.parametrize("profile", PROFILES)
def test_a_token_of_a_higher_level_comes_back_more_exactly(profile):
    """The error of a token goes with its step, so it halves every two levels."""
    cache, ids = told_cache(N), told_ids(N)
    codec = codec_of(profile, step=1.0)
    decoded = codec.decode(codec.encode(cache, ids), ids)
    errors, levels = (decoded.values - cache.values).square().sum(dim=(0, 1, 3)), levels_of(cache)
    high, low = errors[levels >= MIDDLE_LEVEL + 2].mean(), errors[levels <= MIDDLE_LEVEL - 2].mean()
    assert min(int((levels >= MIDDLE_LEVEL + 2).sum()), int((levels <= MIDDLE_LEVEL - 2).sum())) >= 10
    assert float(high) < float(low) / 8


@pytest.mark.parametrize("profile", PROFILES)
def test_parts_and_batches_have_their_own_levels(profile):
    cache, ids = told_cache(N), told_ids(N)
    codec = codec_of(profile, step=1.0, chunk_tokens=64)
    stream = codec.encode(cache, ids)
    assert_parts_decode_alone(codec, stream, ids.numpy())
    # A prefix ends within a chunk, whose levels are read whole.
    prefix = codec.decode(stream, ids[:70], tokens=70)
    torch.testing.assert_close(prefix.values, codec.decode(stream, ids).values[:, :, :70])


def test_a_ratio_is_met_with_the_bytes_of_levels():
    cache, ids = told_cache(N, torch.bfloat16), told_ids(N)
    stream = codec_of(ratio=8.0).encode(cache, ids)
    assert inspect(stream).body_ratio == pytest.approx(8, rel=0.02)


def test_a_fixed_size_holds_the_levels():
    cache, ids = told_cache(N), told_ids(N)
    codec = codec_of(ratio=8.0, fixed_size=True)
    stream = codec.encode(cache, ids)
    assert len(stream) == codec.stream_bytes(N, torch.float32)
    assert relative_error(codec.decode(stream, ids).values, cache.values) < 0.5


@pytest.mark.parametrize("profile", PROFILES)
def test_no_rank_sets_a_floor(profile):
    """Two vectors of 96 directions: the rest is the remainder's."""
    cache, ids = told_cache(N), told_ids(N)
    few = Codec(joint_calibration(joint_rank=2), profile, step=0.01, window_tokens=0, model=told_model())
    assert relative_error(few.decode(few.encode(cache, ids), ids).values, cache.values) < 0.005
