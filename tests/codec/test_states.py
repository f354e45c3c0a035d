"""Recurrent states that are rounded: what is rounded, what is not, and that a model goes on from it."""

from __future__ import annotations

import re

import pytest
import torch

import kvtc
from kvtc.cli import main
from kvtc.codec.codec import Codec
from kvtc.container.stream import parse_stream
from kvtc.errors import CorruptStream, InvalidArgument, InvalidCache
from tests.builders import SECTION_BYTES, reseal, section_table_at
from tests.codec.test_groups import CHUNK, lossless, same
from tests.tiny_architectures import mixed_cache, mixed_calibration, random_ids, read, tiny_model

WITH_STATES = {
    "bamba": {"mamba_d_state": 32},
    "mamba2": {"state_size": 32},
    "mamba": {"state_size": 8},
    "qwen3_next": {},
    "minimax": {},
}
"""Mamba 2 beside attention and alone, Mamba 1, gated delta, lightning."""
IDS = random_ids(1, 60)


def states_of(cache) -> list[torch.Tensor]:
    found = [s for layer in cache.layers for s in getattr(layer, "recurrent_states", {}).values() if s is not None]
    return found + [one for one in getattr(cache, "linear_cache", []) if isinstance(one, torch.Tensor)]


def without_states(cache):
    """The same cache with zeros in place of its recurrent states, so that `same` compares all else."""
    for state in states_of(cache):
        state.zero_()
    return cache


@pytest.mark.parametrize("name", sorted(WITH_STATES))
@pytest.mark.parametrize(("states", "bound"), [("int8", 0.02), ("int6", 0.08)])
def test_states_alone_are_rounded(name, states, bound):
    """Keys, values and states of convolutions come back bit for bit, states close to what they were; the model goes on."""
    model = tiny_model(name, **WITH_STATES[name])
    _, cache = read(model, IDS[:, :50])
    codec = lossless(states=states)
    stream = codec.encode(cache, IDS[0, :50])
    back = lossless().decode(stream)
    for found, expected in zip(states_of(back), states_of(cache), strict=True):
        assert found.dtype == expected.dtype
        error = float((found - expected).norm() / expected.norm())
        assert 0 < error < bound
    expected, _ = read(model, IDS[:, 50:], cache)
    found, _ = read(model, IDS[:, 50:], lossless().decode(stream))
    assert float((found - expected).abs().max()) < float(expected.abs().max())
    _, cache = read(model, IDS[:, :50])
    assert same(without_states(back), without_states(cache))


def test_generate_goes_on_from_rounded_states():
    model = tiny_model("bamba", **WITH_STATES["bamba"])
    _, cache = read(model, IDS[:, :39])
    codec = lossless(states="int8")
    back = codec.decode(codec.encode(cache))
    ids = IDS[:, :40]
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert model.generate(ids, past_key_values=back, **options).shape == (1, 48)


def test_batches_of_rounded_states():
    model, ids = tiny_model("bamba", **WITH_STATES["bamba"]), random_ids(2, 30)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    _, cache = read(model, ids, attention_mask=mask)
    codec = lossless(states="int8")
    streams = codec.encode_batch(cache, ids, mask)
    back, _ = codec.decode_batch(streams)
    for index, stream in enumerate(streams):
        alone = codec.decode(stream)
        for one, batch in zip(states_of(alone), states_of(back), strict=True):
            assert torch.equal(one[0], batch[index])


def test_states_are_rounded_beside_a_coded_group():
    cache = mixed_cache()
    codec = Codec(mixed_calibration(), ratio=3, chunk_tokens=CHUNK, states="int6")
    stream = codec.encode(cache)
    exact = Codec(mixed_calibration(), ratio=3, chunk_tokens=CHUNK).encode(cache)
    assert torch.equal(codec.decode(stream).layers[0].keys, codec.decode(exact).layers[0].keys)
    assert len(states_of(cache)) == 1


def test_only_codecs_with_a_rate_round_states_unless_they_are_told_to():
    assert lossless().settings.states == "lossless"
    assert Codec(mixed_calibration(), lossless=True).settings.states == "lossless"
    assert Codec(mixed_calibration(), ratio=3).settings.states == "int8"
    assert Codec(mixed_calibration(), ratio=3, states="lossless").settings.states == "lossless"


def test_resume_points_are_rounded():
    model, points = tiny_model("mamba2", **WITH_STATES["mamba2"]), kvtc.ResumePoints(CHUNK)
    cache = kvtc.prefill(model, IDS[0], points)
    codec = lossless(states="int8")
    stream = codec.encode(cache, IDS[0], points=points)
    info = kvtc.inspect(stream)
    assert info.resume_points == (16, 32, 48, 60)
    assert [s.coder for s in info.sections if s.kind == "state" and s.group == 1] == ["rounded"] * 4
    # A point by itself, as prefix caches keep it, has the same numbers.
    found = codec.decode_point(codec.encode_point(points.taken[32], 32))
    of_stream = codec.decode(stream, IDS[0, :32], tokens=32)
    assert torch.equal(found[1].sides[0][0], of_stream.layers[0].recurrent_states[0][0])
    exact = lossless().decode_point(lossless().encode_point(points.taken[32], 32))
    assert not torch.equal(found[1].sides[0][0], exact[1].sides[0][0])


def test_inspect_says_how_states_are_kept(tmp_path, capsys):
    _, cache = read(tiny_model("bamba", **WITH_STATES["bamba"]), IDS)
    path = tmp_path / "a.kvtc"
    for states in ("lossless", "int8"):
        stream = lossless(states=states).encode(cache)
        path.write_bytes(stream)
        full, convolution, state = kvtc.inspect(stream).groups
        assert [one.is_rounded for one in (full, convolution, state)] == [False, False, states != "lossless"]
        assert main(["inspect", str(path)]) == 0
        how = "exact" if states == "lossless" else "rounded"
        assert re.search(
            rf"recurrent state, 4 x 16 x 32; {how}: [\d,]+ -> [\d,]+ bytes, ratio +\d", capsys.readouterr().out
        )
    assert state.ratio > 1.8


def test_states_that_cannot_be_rounded():
    with pytest.raises(InvalidArgument, match="states must be one of lossless, int8, int6; got 'int4'"):
        lossless(states="int4")
    _, cache = read(tiny_model("bamba"), IDS)
    states_of(cache)[0][0, 0, 0, 0] = float("nan")
    with pytest.raises(InvalidCache, match="cannot be rounded"):
        lossless(states="int8").encode(cache)
    assert lossless().encode(cache)


def test_the_coder_of_states_is_for_states_alone():
    """Its number in the entry of another section is damage."""
    stream = lossless(states="int8").encode(read(tiny_model("falcon_h1", mamba_d_state=32), IDS)[1])
    sections, table = kvtc.inspect(stream).sections, section_table_at(bytearray(stream))
    for number, section in enumerate(sections):
        data = bytearray(stream)
        data[table + SECTION_BYTES * number + 1] = 5
        if section.kind == "state":
            assert parse_stream(reseal(data)).n_tokens == 60
        else:
            with pytest.raises(CorruptStream, match="coder 5"):
                parse_stream(reseal(data))
