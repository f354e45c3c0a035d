"""A stream with several resume points gives back the cache at each of them, and holds no more than they need."""

from __future__ import annotations

import copy
import re

import pytest
import torch

import kvtc
from kvtc.cli import main
from kvtc.codec.codec import Codec
from kvtc.errors import InvalidArgument, InvalidCache
from tests.codec.test_groups import CHUNK, lossless, same
from tests.tiny_architectures import (
    ARCHITECTURES,
    WINDOW,
    mixed_cache,
    mixed_calibration,
    random_ids,
    read,
    tiny_model,
)

EVERY, N_TOKENS = 2 * CHUNK, 5 * CHUNK + 5
IDS = random_ids(1, N_TOKENS + 40)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_point_goes_on_as_the_cache_did(name):
    """Bit for bit, in the next tokens too; a stream of the parts up to a point is enough."""
    model, points, kept, cache = tiny_model(name), kvtc.ResumePoints(EVERY), {}, None
    for start in range(0, N_TOKENS, CHUNK):
        stop = min(start + CHUNK, N_TOKENS)
        cache = read(model, IDS[:, start:stop], cache)[1]
        assert points.take(cache, stop) == (stop % EVERY == 0)
        kept[stop] = copy.deepcopy(cache)
    codec = lossless()
    stream = codec.encode(cache, IDS[0, :N_TOKENS], points=points)
    info = kvtc.inspect(stream)
    assert info.resume_points in ((EVERY, 2 * EVERY, N_TOKENS), ())
    parts = kvtc.split_stream(stream)
    for stop in (EVERY, 2 * EVERY, N_TOKENS):
        back = codec.decode(stream, IDS[0, :stop], tokens=stop)
        assert same(back, kept[stop])
        assert same(codec.decode(kvtc.join_streams(parts[: -(-stop // CHUNK)])), kept[stop])
        expected, found = (read(model, IDS[:, stop : stop + 9], its)[0] for its in (kept[stop], back))
        assert torch.equal(found, expected)
    if info.resume_points:
        with pytest.raises(InvalidArgument, match=r"cannot be restored after 16 tokens.*it can be after 32, 64, 85"):
            codec.decode(stream, IDS[0, :CHUNK], tokens=CHUNK)


def test_windows_that_no_point_needs_are_not_kept():
    """A window of 16 holds 15 tokens: those before 64 tokens, and those before the end."""
    model, points = tiny_model("gemma3_text"), kvtc.ResumePoints(4 * CHUNK)
    cache = kvtc.prefill(model, IDS[0, :N_TOKENS], points)
    info = kvtc.inspect(lossless().encode(cache, points=points))
    row = 4 * 2 * 2 * 8 * 4
    assert [(s.chunk, s.raw_bytes // row) for s in info.sections if s.group == 1] == [(3, 15), (4, 10), (5, 5)]


def test_windows_that_several_points_need_are_kept_once():
    model = tiny_model("gemma3_text", sliding_window=2 * WINDOW + 4)
    points = kvtc.ResumePoints(CHUNK)
    stream = lossless().encode(kvtc.prefill(model, IDS[0, :N_TOKENS], points), points=points)
    info = kvtc.inspect(stream)
    assert [s.chunk for s in info.sections if s.group == 1] == list(range(6))
    assert info.groups[1].original_bytes == N_TOKENS * 4 * 2 * 2 * 8 * 2
    assert info.resume_points == (16, 32, 48, 64, 80, 85)


def test_prefill_goes_on_from_a_cache():
    model, points = tiny_model("mamba2"), kvtc.ResumePoints(EVERY)
    whole = kvtc.prefill(model, IDS[0, :N_TOKENS], points)
    more = kvtc.ResumePoints(EVERY)
    cache = kvtc.prefill(model, IDS[0, :EVERY], more)
    assert same(kvtc.prefill(model, IDS[0, :N_TOKENS], more, cache, EVERY), whole)
    assert list(points.taken) == list(more.taken) == [EVERY, 2 * EVERY]
    with pytest.raises(InvalidArgument, match="a cache of 99 tokens does not begin a text of 9"):
        kvtc.prefill(model, IDS[0, :9], more, cache, 99)


def test_points_beside_a_coded_group():
    points = kvtc.ResumePoints(CHUNK)
    assert points.take(mixed_cache(CHUNK))
    codec = Codec(mixed_calibration(), ratio=3, sink_tokens=2, window_tokens=3, chunk_tokens=CHUNK)
    stream = codec.encode(mixed_cache(50), points=points)
    assert kvtc.inspect(stream).resume_points == (CHUNK, 50)
    back = codec.decode(stream, tokens=CHUNK)
    assert torch.equal(back.layers[1].keys, mixed_cache(CHUNK).layers[1].keys)
    assert torch.equal(back.layers[0].keys, codec.decode(stream).layers[0].keys[:, :, :CHUNK])


def test_points_that_are_not_of_the_cache():
    ids, codec = IDS[:, :50], lossless()
    gemma, points = tiny_model("gemma3_text"), kvtc.ResumePoints(20)
    cache = kvtc.prefill(gemma, ids[0], points)
    with pytest.raises(
        InvalidArgument, match="20 tokens is inside of a chunk; expected every= a multiple of chunk_tokens, 16"
    ):
        codec.encode(cache, points=points)
    points = kvtc.ResumePoints(CHUNK)
    kvtc.prefill(tiny_model("qwen3_next"), ids[0], points)
    with pytest.raises(InvalidArgument, match="after 16 tokens is of another cache: it holds recurrent state"):
        codec.encode(cache, points=points)
    points = kvtc.ResumePoints(CHUNK)
    kvtc.prefill(gemma, ids[0], points)
    with pytest.raises(InvalidArgument, match="taken after 32 tokens; the cache has 20"):
        codec.encode(kvtc.prefill(gemma, ids[0, :20], kvtc.ResumePoints()), points=points)
    with pytest.raises(InvalidArgument, match="every 0 tokens"):
        kvtc.ResumePoints(0)
    with pytest.raises(InvalidCache, match="holds 50 tokens of 1 sequences; expected one sequence of 49"):
        points.take(cache, 49)
    with pytest.raises(InvalidCache, match="unknown number"):
        points.take(read(tiny_model("mamba2"), ids)[1])


def test_inspect_lists_groups_and_points(tmp_path, capsys):
    points = kvtc.ResumePoints(CHUNK)
    cache = kvtc.prefill(tiny_model("gemma3_text"), IDS[0, :N_TOKENS], points)
    path = tmp_path / "a.kvtc"
    path.write_bytes(lossless().encode(cache, points=points))
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"group +sliding window, float32, layers 0\.\.1, 3\.\.4, .* bytes, ratio 0\.\d", out)
    assert re.search(r"resume points +16, 32, 48, 64, 80, 85\n", out)
