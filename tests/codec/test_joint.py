"""The profiles `joint` and `conditional` from a cache to a stream and back, and what is refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import kvtc
from kvtc import recomputation
from kvtc.backends import reference
from kvtc.cache import KVCache
from kvtc.calibration import load_calibration
from kvtc.codec.codec import Codec
from kvtc.container.parts import join_streams, split_stream
from kvtc.container.stream import parse_stream
from kvtc.container.tables import PROFILES as PROFILE_NUMBERS
from kvtc.container.tables import STREAM_WIDE, SectionType
from kvtc.demo.run import CONVERSATION
from kvtc.errors import CorruptStream, InvalidArgument, InvalidCache, TokenMismatch
from kvtc.huggingface.models import capture
from kvtc.profiles.joint import encoder as joint_encoder
from kvtc.profiles.joint.step_search import CostEstimate
from kvtc.profiles.rates import Truncation
from tests.builders import (
    DTYPES,
    NAMES,
    SINK_TOKENS,
    VOCABULARY,
    ToldModel,
    assert_parts_decode_alone,
    at,
    joint_calibration,
    joint_codec,
    patched,
    random_cache,
    relative_error,
    same_bits,
    same_cache,
    tiny_calibration,
    tiny_codec,
    told_cache,
    told_codec,
    told_gappy_cache,
    told_ids,
    told_model,
    with_section,
)

PROFILES = ["joint", "conditional"]
WINDOW = 128

of_both = pytest.mark.parametrize("profile", PROFILES)


@pytest.fixture(scope="module")
def conversation_cache() -> tuple[KVCache, Tensor]:
    """The reference model's cache of the first 404 tokens of the demo's conversation, and their ids."""
    pytest.importorskip("transformers")
    model, tokenizer = kvtc.reference_model()
    text = CONVERSATION.read_text(encoding="utf-8")[:4000]
    ids = torch.tensor([tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids][:404])
    cache = capture(model, ids)
    return KVCache(cache.keys.bfloat16(), cache.values.bfloat16()), ids


def errors(found: KVCache, expected: KVCache) -> float:
    """Relative error of keys and values together."""
    both = [torch.cat([cache.keys.double(), cache.values.double()]) for cache in (found, expected)]
    return relative_error(*both)


def step_of(stream: bytes) -> float:
    raw = parse_stream(stream).read(SectionType.RATE, STREAM_WIDE, 4)
    return float(np.frombuffer(raw, "<f4")[0])


def bodies_of(stream: bytes) -> list[bytes]:
    """The coded rows of every chunk."""
    parsed = parse_stream(stream)
    return [parsed.read(s.type, s.chunk, None) for s in parsed.sections if s.type is SectionType.BODY]


@of_both
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("n", [0, 1, 2, 131, 132, 133, 300, 1000])
def test_round_trip(n, dtype, profile):
    """Nothing, sinks alone, all but one coded token, many: sinks and window bit for bit, the body close."""
    codec = joint_codec(profile, step=0.1, sink_tokens=SINK_TOKENS, window_tokens=WINDOW, chunk_tokens=256)
    cache, ids = told_cache(n, dtype), told_ids(n)
    stream = codec.encode(cache, ids)
    decoded, info = codec.decode(stream, ids), kvtc.inspect(stream)
    assert (info.profile, info.n_tokens, info.body_tokens) == (profile, n, max(0, n - SINK_TOKENS - WINDOW))
    assert (decoded.n_tokens, decoded.dtype) == (n, dtype)
    body = slice(SINK_TOKENS, max(SINK_TOKENS, n - WINDOW))
    kept = torch.tensor([t for t in range(n) if not body.start <= t < body.stop], dtype=torch.int64)
    assert same_cache(at(decoded, kept), at(cache, kept))
    if info.body_tokens:
        error = errors(at(decoded, body), at(cache, body))
        assert 0 < error < 0.02 + torch.finfo(dtype).eps


@of_both
@pytest.mark.parametrize(
    ("sinks", "window", "chunk"), [(0, 0, 256), (0, 0, 1), (4, 0, 7), (0, 9, 33), (40, 0, 16), (2, 100, 16)]
)
def test_regions_and_chunks_of_every_kind(profile, sinks, window, chunk):
    # Fine enough for tokens without predecessors: what is left of them is larger than of those that tables are made for.
    codec = joint_codec(profile, step=0.02, sink_tokens=sinks, window_tokens=window, chunk_tokens=chunk)
    cache, ids = told_cache(70), told_ids(70)
    stream = codec.encode(cache, ids)
    info = kvtc.inspect(stream)
    assert (info.sink_tokens, info.window_tokens) == (sinks, min(window, 70 - sinks))
    decoded = codec.decode(stream, ids)
    assert errors(decoded, cache) < 0.01
    assert same_bits(decoded.keys[:, :, :sinks], cache.keys[:, :, :sinks])
    assert same_bits(decoded.values[:, :, 70 - window :], cache.values[:, :, 70 - window :])


def test_positions_with_gaps():
    """A cache from which tokens were evicted."""
    codec = joint_codec("joint", step=0.02)
    cache, ids = told_gappy_cache(40, torch.float32)
    stream = codec.encode(cache, ids)
    decoded = codec.decode(stream, ids)
    assert decoded.positions.tolist() == cache.positions.tolist()
    assert decoded.rope_length == cache.rope_length
    assert errors(decoded, cache) < 0.01


def test_layers_are_not_recomputed_for_caches_with_gaps():
    cache, _ = told_gappy_cache(40, torch.float32)
    with pytest.raises(
        InvalidArgument, match=r"expected a cache without gaps, found 40 tokens at positions 0 \.\. \d+; use joint"
    ):
        joint_codec("conditional").encode(cache, told_ids(120))


@of_both
def test_placed_elsewhere_values_stay(profile):
    codec, ids = joint_codec(profile), told_ids(40)
    stream = codec.encode(told_cache(40), ids)
    here, there = codec.decode(stream, ids), codec.decode(stream, ids, start_position=1000)
    assert same_bits(here.values, there.values)
    assert there.positions.tolist() == list(range(1000, 1040))


@of_both
def test_a_larger_step_costs_fewer_bytes_and_more_error(profile):
    cache, ids = told_cache(500), told_ids(500)
    sizes, found = [], []
    for step in (0.02, 0.1, 0.5, 2.0, 8.0, 40.0, 1000.0):
        codec = joint_codec(profile, step=step, window_tokens=0, chunk_tokens=256)
        stream = codec.encode(cache, ids)
        sizes.append(len(stream))
        found.append(errors(codec.decode(stream, ids), cache))
    assert sizes == sorted(sizes, reverse=True)
    assert found == sorted(found)
    assert found[0] < 0.004
    # Where nothing is coded, prediction is left, or the mean row.
    assert 0.2 < found[-1] < {"joint": 1.1, "conditional": 0.8}[profile]


def test_token_ids_lower_the_bytes_and_the_error():
    """At one step; what they tell need not be stored."""
    cache, ids = told_cache(800), told_ids(800)
    streams = [joint_codec(p, step=2.0, window_tokens=0, chunk_tokens=256).encode(cache, ids) for p in PROFILES]
    assert len(streams[1]) < 0.75 * len(streams[0])


def test_recomputed_layers_are_what_the_model_gives():
    """They need no bytes, and whatever the step is, they come back as they were, but for one rounding."""
    cache, ids = told_cache(300), told_ids(300)
    codec = joint_codec("conditional", step=1000.0, window_tokens=0)
    decoded = codec.decode(codec.encode(cache, ids), ids)
    assert errors(at(decoded, slice(2, None)), at(cache, slice(2, None))) > 0.1
    assert relative_error(decoded.keys[0], cache.keys[0]) < 1e-6
    assert relative_error(decoded.values[0], cache.values[0]) < 1e-6


@pytest.mark.parametrize("first", [1, 7, 64])
def test_the_end_of_a_text_is_coded_with_the_ids_of_all_of_it(first):
    codec = joint_codec("conditional", step=0.5)
    cache, ids = told_cache(200).span(first, 200), told_ids(200)
    stream = codec.encode(cache, ids)
    decoded = codec.decode(stream, ids)
    assert decoded.positions.tolist() == list(range(first, 200))
    assert errors(decoded, cache) < 0.05
    moved = codec.decode(stream, ids, start_position=0)
    assert same_bits(moved.values, decoded.values)
    part = codec.decode(stream, ids[: first + 50], tokens=50)
    torch.testing.assert_close(part.values, decoded.values[:, :, :50], rtol=1e-5, atol=1e-5)
    for call in (lambda given: codec.encode(cache, given), lambda given: codec.decode(stream, given)):
        with pytest.raises(
            InvalidArgument, match="ids of all tokens from position 0 on: expected 200 token_ids, found"
        ):
            call(ids[first:])
    with pytest.raises(TokenMismatch):
        codec.decode(stream, ids.flip(0))


def test_the_model_is_asked_for_when_the_codec_is_made():
    with pytest.raises(
        InvalidArgument, match=r"give Codec\(\.\.\., model=\), a transformers model or the path of its folder"
    ):
        Codec(joint_calibration(), "conditional")
    stream = joint_codec("conditional").encode(told_cache(20), told_ids(20))
    with pytest.raises(InvalidArgument, match="or use joint, which needs none"):
        Codec(joint_calibration()).decode(stream, told_ids(20))
    assert Codec(joint_calibration()).settings.profile == "joint"
    assert Codec(tiny_calibration()).settings.profile == "paper"


def test_a_model_of_other_weights_is_refused():
    other = ToldModel()
    other.identity = b"another model".ljust(32)
    with pytest.raises(InvalidArgument, match="other weights than those that the calibration was made with"):
        Codec(joint_calibration(), "conditional", model=other)


def test_what_was_recomputed_last_is_gone_on_from(monkeypatch):
    model, ids, asked = ToldModel(), told_ids(300).numpy(), []
    go_on = ToldModel._go_on
    monkeypatch.setattr(ToldModel, "_go_on", lambda self, *given: (asked.append(len(given[1])), go_on(self, *given))[1])
    monkeypatch.setattr(recomputation, "PIECE_TOKENS", 64)
    whole = ToldModel().run(ids)
    asked.clear()
    for n in (100, 50, 300):
        found = model.run(ids[:n])
        assert same_bits(found.hidden, whole.hidden[:n])
        assert same_bits(found.keys, whole.keys[:, :, :n])
    assert asked == [64, 36, 64, 64, 64, 8]
    other = np.concatenate([ids[:40], ids[:10]])
    assert same_bits(model.run(other).hidden, ToldModel().run(other).hidden)


@of_both
@pytest.mark.parametrize("ratio", [3, 4, 8, 16])
@pytest.mark.parametrize("chunk", [16, 256])
@pytest.mark.parametrize("n", [1000, 1700])
def test_the_ratio_is_met(profile, ratio, chunk, n):
    codec = told_codec(profile, ratio, chunk_tokens=chunk, window_tokens=0)
    stream = codec.encode(told_cache(n), told_ids(n))
    assert kvtc.inspect(stream).body_ratio == pytest.approx(ratio, rel=0.03)


@of_both
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_the_ratio_counts_the_bits_of_the_dtype(profile, dtype):
    """A calibration of fp32 caches does not know the noise of 8 bits: small coefficients escape, so bits rise in leaps."""
    codec = told_codec(profile, 8)
    stream = codec.encode(told_cache(1300, dtype), told_ids(1300))
    assert kvtc.inspect(stream).body_ratio == pytest.approx(8, rel=0.015 if dtype.itemsize > 1 else 0.12)


@of_both
@pytest.mark.parametrize("sampled", [64, 300])
def test_the_ratio_is_met_from_a_sample_of_the_tokens(profile, sampled, monkeypatch):
    """Tokens are few enough here to look at all; a longer cache is sampled, and fairly: not just where chunks begin."""
    monkeypatch.setattr(joint_encoder, "SEARCH_TOKENS", sampled)
    codec = told_codec(profile, 8, chunk_tokens=32, window_tokens=0)
    stream = codec.encode(told_cache(3000), told_ids(3000))
    assert kvtc.inspect(stream).body_ratio == pytest.approx(8, rel=0.015)


@of_both
def test_an_estimate_that_is_off_is_put_right(profile, monkeypatch):
    """The real bytes decide: tables that promise a third of them cost another turn and change nothing."""
    codec = told_codec(profile, 8, window_tokens=0)
    cache, ids = told_cache(600), told_ids(600)
    right = step_of(codec.encode(cache, ids))
    expected = CostEstimate.bytes_at
    monkeypatch.setattr(CostEstimate, "bytes_at", lambda estimate, step: expected(estimate, step) / 3)
    stream = codec.encode(cache, ids)
    assert kvtc.inspect(stream).body_ratio == pytest.approx(8, rel=0.015)
    assert step_of(stream) == pytest.approx(right, rel=0.02)


@of_both
@pytest.mark.parametrize(("body", "window"), [(256, 16), (400, 0)])
def test_the_ratio_is_met_on_the_reference_model(profile, body, window, conversation_cache):
    cache, ids = conversation_cache
    # In float32: torch's products of bfloat16 do not run with every instruction set that it may be told to use.
    model, _ = kvtc.reference_model()
    n = SINK_TOKENS + body + window
    cache = KVCache(cache.keys[:, :, :n], cache.values[:, :, :n])
    for ratio in (8, 128):
        codec = Codec(kvtc.reference_calibration(), profile, ratio, window_tokens=window, model=model)
        assert kvtc.inspect(codec.encode(cache, ids[:n])).body_ratio == pytest.approx(ratio, rel=0.015)


@of_both
@pytest.mark.parametrize("n", [1, 5, 20])
def test_a_body_too_short_for_its_ratio_gets_the_coarsest_step(profile, n):
    """Tables, states and lengths alone take more than the ratio allows; the ratio is missed and the stream is sound."""
    codec = told_codec(profile, 32, sink_tokens=0, window_tokens=0)
    cache, ids = told_cache(n), told_ids(n)
    stream = codec.encode(cache, ids)
    assert kvtc.inspect(stream).body_ratio < 32
    calibration = codec.calibration
    coding = calibration.joint if profile == "joint" else calibration.conditional.left
    assert step_of(stream) == pytest.approx(coding.coefficients.steps.max(), rel=1e-3)
    assert codec.decode(stream, ids).n_tokens == n


@of_both
def test_without_a_ratio_it_is_sixteen(profile):
    stream = told_codec(profile).encode(told_cache(1400), told_ids(1400))
    assert kvtc.inspect(stream).body_ratio == pytest.approx(16, rel=0.03)


@of_both
def test_one_step_makes_chunks_that_do_not_depend_on_what_follows(profile):
    codec = joint_codec(profile, step=1.0, window_tokens=0, chunk_tokens=32)
    whole, ids = told_cache(150, torch.bfloat16), told_ids(150)
    parts = split_stream(codec.encode(whole, ids))
    for n in (32, 50, 96, 149):
        shorter = KVCache(whole.keys[:, :, :n], whole.values[:, :, :n])
        others = split_stream(codec.encode(shorter, ids[:n]))
        assert others[: n // 32] == parts[: n // 32]
    joined = join_streams([*others[:3], *parts[3:]])
    assert same_cache(codec.decode(joined, ids), codec.decode(join_streams(parts), ids))


@of_both
def test_a_ratio_makes_steps_that_differ(profile):
    """So parts of two encodings do not join, which a step allows."""
    codec = told_codec(profile, 16, chunk_tokens=32, window_tokens=0)
    first, second = (split_stream(codec.encode(told_cache(300, seed=seed), told_ids(300, seed))) for seed in (0, 1))
    with pytest.raises(InvalidArgument, match="rates differ"):
        join_streams([first[0], second[1]])


def test_parts_decode_to_their_own_tokens():
    codec, (cache, ids) = joint_codec("joint"), told_gappy_cache(30)
    assert_parts_decode_alone(codec, codec.encode(cache, ids), ids)
    conditional = joint_codec("conditional")
    assert_parts_decode_alone(conditional, conditional.encode(told_cache(30), told_ids(30)), told_ids(30))


@pytest.mark.parametrize(("profile", "gaps"), [("joint", False), ("joint", True), ("conditional", False)])
def test_the_first_tokens_alone(profile, gaps):
    codec = joint_codec(profile)
    cache, ids = told_gappy_cache(45) if gaps else (told_cache(45, torch.bfloat16), told_ids(45))
    stream = codec.encode(cache, ids)
    whole = codec.decode(stream, ids)
    for n in range(46):
        part = codec.decode(stream, ids[:n], tokens=n)
        assert part.resolved_positions().tolist() == whole.resolved_positions()[:n].tolist()
        # Other shapes of matrices may sum in another order: the last place of bfloat16 may differ.
        torch.testing.assert_close(part.keys, whole.keys[:, :, :n], rtol=2**-7, atol=1e-3)
        torch.testing.assert_close(part.values, whole.values[:, :, :n], rtol=2**-7, atol=1e-3)


@of_both
def test_layers_decode_to_the_layers_of_the_cache(profile):
    codec, ids = joint_codec(profile), told_ids(40)
    stream = codec.encode(told_cache(40, torch.bfloat16), ids)
    decoded = codec.decode(stream, ids)
    for layer, keys, values in codec.decode_layers(stream, ids):
        assert same_bits(keys, decoded.keys[layer])
        assert same_bits(values, decoded.values[layer])


def test_conditional_needs_token_ids():
    codec, cache, ids = joint_codec("conditional"), told_cache(20), told_ids(20)
    with pytest.raises(InvalidArgument, match="expected 20 token_ids, found none; or use joint"):
        codec.encode(cache)
    stream = codec.encode(cache, ids)
    for call in (codec.decode, codec.decode_neutral, codec.decode_layers):
        with pytest.raises(InvalidArgument, match="expected 20 token_ids, found none"):
            call(stream)
    assert codec.decode(stream, ids).n_tokens == 20


@pytest.mark.parametrize("place", [0, 5, 10, 19])
def test_other_token_ids_are_refused(place):
    codec, ids = joint_codec("conditional"), told_ids(20)
    stream = codec.encode(told_cache(20), ids)
    wrong = ids.clone()
    wrong[place] += 1
    with pytest.raises(TokenMismatch, match=f"chunk {place // 8} "):
        codec.decode(stream, wrong % VOCABULARY)
    with pytest.raises(InvalidArgument, match="expected 20 token_ids, found 19"):
        codec.decode(stream, ids[:19])


def test_a_stream_that_claims_to_have_no_digests_cannot_be_conditional():
    codec, ids = joint_codec("conditional"), told_ids(8)
    plain = joint_codec("joint").encode(told_cache(8))
    with pytest.raises(TokenMismatch):
        codec.decode(patched(plain, 5, "B", 3), ids)


def test_joint_checks_token_ids_and_needs_none():
    codec, cache, ids = joint_codec("joint"), told_cache(20), told_ids(20)
    stream = codec.encode(cache, ids)
    assert same_cache(codec.decode(stream), codec.decode(stream, ids))
    assert bodies_of(stream) == bodies_of(codec.encode(cache))
    with pytest.raises(TokenMismatch):
        codec.decode(stream, ids + 1)


@pytest.mark.parametrize("reader", ["paper", *PROFILES])
@pytest.mark.parametrize("writer", ["paper", *PROFILES])
def test_every_codec_decodes_what_the_calibration_can(writer, reader):
    ids = told_ids(60)
    codecs = {name: told_codec(name, 4, window_tokens=8) for name in (writer, reader)}
    stream = codecs[writer].encode(told_cache(60, torch.bfloat16), ids)
    found = codecs[reader].decode(stream, ids)
    assert same_cache(found, codecs[writer].decode(stream, ids))


@of_both
def test_a_calibration_without_the_joint_part_says_what_to_do(profile):
    with pytest.raises(InvalidArgument, match=f"made without the profile {profile}; calibrate again with it"):
        Codec(tiny_calibration(), profile)
    stream = patched(tiny_codec().encode(random_cache(20), range(20)), 5, "B", PROFILE_NUMBERS[profile])
    with pytest.raises(InvalidArgument, match="calibrate again"):
        tiny_codec().decode(stream, range(20))


def test_a_calibration_without_recomputed_layers_serves_joint_alone():
    calibration = joint_calibration(with_model=False)
    assert calibration.conditional is None
    cache = told_cache(40)
    codec = Codec(calibration, "joint", step=0.2)
    assert errors(codec.decode(codec.encode(cache)), cache) < 0.02
    with pytest.raises(InvalidArgument, match="made without the profile conditional; calibrate again with it"):
        Codec(calibration, "conditional")


@pytest.mark.parametrize(
    ("profile", "options", "expected"),
    [
        ("paper", {"step": 1.0}, "paper has no step"),
        ("joint", {"ratio": 4, "step": 1.0}, "either a ratio or a step"),
        ("joint", {"ratio": 0.5}, "at least 1"),
        ("joint", {"ratio": float("nan")}, "at least 1"),
        ("joint", {"step": 0.0}, "must be positive"),
        ("joint", {"step": -1.0}, "must be positive"),
        ("joint", {"step": float("inf")}, "must be positive"),
        ("joint", {"step": 1e-30}, "serves steps of .* got 1e-30"),
        ("joint", {"step": 1e30}, "serves steps of"),
        ("joint", {"step": 1e300}, "serves steps of"),
        ("conditional", {"step": 1e9}, "serves steps of"),
        ("joint", {"key_ratio": 4}, "are of the profile paper, not joint"),
        ("conditional", {"max_error": 0.1}, "are of the profile paper"),
        ("conditional", {"rate": Truncation(4)}, "are of the profile paper"),
        ("jointly", {}, "'jointly' is unknown"),
    ],
)
def test_impossible_settings_are_refused(profile, options, expected):
    with pytest.raises(InvalidArgument, match=expected):
        told_codec(profile, **options)


@of_both
@pytest.mark.parametrize("end", [0, 1])
def test_the_outermost_steps_decode(profile, end):
    """They are stored as float32; rounding must not take them past what a decoder accepts."""
    steps = joint_codec(profile)._encoder._steps
    step = (steps.least, steps.most)[end]
    codec = joint_codec(profile, step=step)
    cache, ids = told_cache(30), told_ids(30)
    stream = codec.encode(cache, ids)
    assert step_of(stream) == step
    codec.decode(stream, ids)
    beyond = np.nextafter(np.float32(step), np.float32([0, np.inf][end])).tobytes()
    for wrong in (beyond, bytes(4), b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xbf", b"", bytes(5)):
        with pytest.raises(CorruptStream):
            codec.decode(with_section(stream, 0, wrong, coder=0, raw_bytes=len(wrong)), ids)


# Bytes.


@of_both
def test_the_same_cache_gives_the_same_bytes(profile, tmp_path):
    """Again, with another codec, and with a calibration that was saved and loaded."""
    cache, ids = told_cache(300, torch.bfloat16), told_ids(300)
    joint_calibration().save(tmp_path / "file")
    loaded = load_calibration(tmp_path / "file")
    codecs = [Codec(made, profile, 6, chunk_tokens=64, model=told_model()) for made in (joint_calibration(), loaded)]
    stream = codecs[0].encode(cache, ids)
    assert [codec.encode(cache, ids) for codec in codecs] == [stream, stream]
    assert same_cache(codecs[0].decode(stream, ids), codecs[1].decode(stream, ids))


@of_both
def test_threads_share_a_codec(profile):
    seeds = range(8)
    codec = told_codec(profile, step=1.0, chunk_tokens=16)
    caches, ids = [told_cache(50, torch.bfloat16, s) for s in seeds], [told_ids(50, s) for s in seeds]
    other = told_codec(profile, step=1.0, chunk_tokens=16)
    expected = [other.encode(cache, i) for cache, i in zip(caches, ids, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(codec.encode, caches, ids)) == expected
        decoded = list(pool.map(codec.decode, expected, ids))
    assert all(same_cache(d, other.decode(s, i)) for d, s, i in zip(decoded, expected, ids, strict=True))


@of_both
def test_encoding_leaves_the_cache_as_it_was(profile):
    cache = told_cache(40, torch.bfloat16)
    keys, values = cache.keys.clone(), cache.values.clone()
    joint_codec(profile).encode(cache, told_ids(40))
    assert same_bits(cache.keys, keys)
    assert same_bits(cache.values, values)


class Perturbed(ToldModel):
    """Hidden states that are off a little, as those of another machine are."""

    def _go_on(self, before, token_ids):
        found = super()._go_on(before, token_ids)
        noise = torch.randn(found.hidden.shape, generator=torch.Generator().manual_seed(5))
        return replace(found, hidden=found.hidden * (1 + 1e-3 * noise))


def test_symbols_do_not_depend_on_the_prediction(monkeypatch):
    """A decoder whose prediction rounds otherwise reads the same integers from the bytes; only values differ, by as little."""
    cache, ids = told_cache(200), told_ids(200)
    codec = joint_codec("conditional", step=0.5, window_tokens=0, chunk_tokens=64)
    stream = codec.encode(cache, ids)
    seen: list[np.ndarray] = []
    read = reference.decode_symbols
    monkeypatch.setattr(reference, "decode_symbols", lambda *given: (seen.append(read(*given)), seen[-1])[1])
    first = codec.decode(stream, ids)
    other = Codec(codec.calibration, "conditional", model=Perturbed()).decode(stream, ids)
    assert len(seen) == 2 * 4
    assert all(np.array_equal(a, b) for a, b in zip(seen[:4], seen[4:], strict=True))
    assert 0 < errors(other, first) < 2e-3


# Caches that cannot be coded.


@of_both
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinities_are_refused(profile, bad):
    cache = told_cache(30)
    cache.values[1, 0, 20, 3] = bad
    with pytest.raises(InvalidCache):
        joint_codec(profile).encode(cache, told_ids(30))


@of_both
@pytest.mark.parametrize("options", [{"step": 4.0}, {"ratio": 8}])
def test_values_past_float32_are_refused(profile, options):
    cache = told_cache(30)
    cache.keys[:, :, 10] = torch.finfo(torch.float32).max
    with pytest.raises(InvalidCache, match="overflows float32"):
        joint_codec(profile, **options).encode(cache, told_ids(30))


@of_both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_values_escape(profile, dtype):
    """An outlier costs bytes and hurts no other token."""
    codec = joint_codec(profile, step=0.02, window_tokens=0)
    cache, ids = told_cache(40, dtype), told_ids(40)
    expected = errors(at(codec.decode(codec.encode(cache, ids), ids), slice(20)), at(cache, slice(20)))
    cache.values[1:, :, 25] = 60000.0  # the first layer is recomputed
    decoded = codec.decode(codec.encode(cache, ids), ids)
    assert errors(at(decoded, slice(20)), at(cache, slice(20))) == expected
    assert relative_error(decoded.values[1:, :, 25], cache.values[1:, :, 25]) < 0.01


@of_both
def test_no_symbol_of_a_damaged_body_hurts_more_than_the_decoder_can_tell(profile):
    """Any flip in a body under right checksums decodes to a cache or is refused; nothing else is raised."""
    codec, ids = joint_codec(profile, step=0.5), told_ids(20)
    stream = codec.encode(told_cache(20, torch.bfloat16), ids)
    number = next(i for i, s in enumerate(parse_stream(stream).sections) if s.type is SectionType.BODY)
    body, outcomes = bodies_of(stream)[0], []
    for place in range(8 * len(body)):
        damaged = bytearray(body)
        damaged[place // 8] ^= 1 << place % 8
        try:
            decoded = codec.decode(with_section(stream, number, bytes(damaged), raw_bytes=len(body)), ids)
            outcomes.append(bool(decoded.keys.isfinite().all()))
        except CorruptStream:
            outcomes.append(None)
    # The final states of the coder give nearly all away; a changed escape does not.
    assert outcomes.count(None) > 0.7 * len(outcomes)
    assert False not in outcomes


@of_both
def test_bodies_of_the_wrong_length_are_corrupt(profile):
    codec, ids = joint_codec(profile, step=0.5), told_ids(20)
    stream = codec.encode(told_cache(20, torch.bfloat16), ids)
    number = next(i for i, s in enumerate(parse_stream(stream).sections) if s.type is SectionType.BODY)
    body = bodies_of(stream)[0]
    for wrong in (b"", *(body[:n] for n in range(1, len(body))), body + b"\0", body + b"\x80", body + b"\xff" * 9):
        with pytest.raises(CorruptStream):
            codec.decode(with_section(stream, number, wrong, raw_bytes=len(wrong)), ids)


@pytest.mark.parametrize("coder", [1, 2, 3])
def test_bodies_are_not_coded_twice(coder):
    codec = joint_codec("joint")
    stream = codec.encode(told_cache(20, torch.bfloat16))
    number = next(i for i, s in enumerate(parse_stream(stream).sections) if s.type is SectionType.BODY)
    with pytest.raises(CorruptStream, match="coded twice"):
        codec.decode(with_section(stream, number, bodies_of(stream)[0], coder=coder))


# Batches of transformers caches.


def batch_of(lengths: tuple[int, ...]) -> tuple[object, Tensor, Tensor]:
    """A left-padded DynamicCache, ids and mask."""
    transformers = pytest.importorskip("transformers")
    longest = max(lengths)
    keys, values = (torch.zeros(len(lengths), 3, 2, longest, 8) for _ in range(2))
    ids, mask = (torch.zeros(len(lengths), longest, dtype=torch.int64) for _ in range(2))
    for row, n in enumerate(lengths):
        cache = told_cache(n, seed=row)
        keys[row, :, :, longest - n :], values[row, :, :, longest - n :] = cache.keys, cache.values
        ids[row, longest - n :], mask[row, longest - n :] = told_ids(n, row), 1
    made = transformers.DynamicCache()
    for layer in range(3):
        made.update(keys[:, layer], values[:, layer], layer)
    return made, ids, mask


@of_both
def test_batches(profile):
    lengths = (37, 50, 9)
    codec = joint_codec(profile, step=0.02)
    cache, ids, mask = batch_of(lengths)
    streams = codec.encode_batch(cache, ids, mask)
    for row, n in enumerate(lengths):
        assert bodies_of(streams[row]) == bodies_of(codec.encode(told_cache(n, seed=row), told_ids(n, row)))
    for given in (ids, [told_ids(n, row) for row, n in enumerate(lengths)]):
        decoded, found = codec.decode_batch(streams, given)
        assert torch.equal(found, mask)
        for layer in range(3):
            assert relative_error(decoded.layers[layer].keys, cache.layers[layer].keys) < 0.02
    if profile == "conditional":
        with pytest.raises(InvalidArgument, match="found none"):
            codec.decode_batch(streams)
    with pytest.raises(TokenMismatch):
        codec.decode_batch(streams, ids.roll(1, dims=0))
