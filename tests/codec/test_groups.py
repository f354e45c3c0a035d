"""Caches of every kind of layer go through a stream and come back as they were: the model goes on as if nothing had happened."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

import kvtc
from kvtc.codec.codec import Codec
from kvtc.container.parts import join_streams, split_stream
from kvtc.errors import CalibrationMismatch, GeometryMismatch, InvalidArgument, InvalidCache, UnsupportedModel
from tests.builders import random_cache, tiny_calibration, tiny_codec
from tests.tiny_architectures import (
    ARCHITECTURES,
    WINDOW,
    mixed_cache,
    mixed_calibration,
    random_ids,
    read,
    tiny_config,
    tiny_model,
)

CHUNK = 16
LENGTHS = [1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW - 1, 2 * WINDOW, 2 * WINDOW + 1, 3 * WINDOW + 5]
"""Before, at and after the boundaries of windows, attention chunks and chunks of a stream."""


def lossless(**options) -> Codec:
    return Codec(lossless=True, chunk_tokens=CHUNK, **options)


def tensors_of(cache) -> list[torch.Tensor]:
    """Every tensor of a cache, in one order."""
    found = []
    for layer in cache.layers:
        for name, value in sorted(vars(layer).items()):
            values = value.values() if isinstance(value, dict) else [value]
            found += [(name, one) for one in values if isinstance(one, torch.Tensor)]
    found += [("linear", one) for one in getattr(cache, "linear_cache", []) if isinstance(one, torch.Tensor)]
    return found


def same(first, second) -> bool:
    """Bit for bit, in layers of the same classes."""
    if [type(layer) for layer in first.layers] != [type(layer) for layer in second.layers]:
        return False
    pairs = list(zip(tensors_of(first), tensors_of(second), strict=True))
    return all(a[0] == b[0] and a[1].dtype == b[1].dtype and torch.equal(a[1], b[1]) for a, b in pairs)


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def model(request):
    return tiny_model(request.param)


def test_a_model_goes_on_after_decoding_as_after_its_own_cache(model):
    """Its next logits are equal bit for bit, read token by token, in pieces, and over several turns."""
    codec, ids = lossless(), random_ids(1, 100)
    for n in LENGTHS:
        _, cache = read(model, ids[:, :n])
        stream = codec.encode(cache, ids[0, :n])
        back = codec.decode(stream, ids[0, :n])
        assert same(back, cache)
        for start, stop in [(n, n + 1), (n + 1, n + 2), (n + 2, n + 20)]:
            expected, cache = read(model, ids[:, start:stop], cache)
            found, back = read(model, ids[:, start:stop], back)
            assert torch.equal(found, expected), (n, start)
        # The next turn begins with what was decoded.
        stop = n + 20
        again = codec.decode(codec.encode(back, ids[0, :stop]), ids[0, :stop])
        assert same(again, cache)


def test_generate_goes_on(model):
    if model.config.model_type in STATES_ALONE:
        pytest.skip("generate takes no cache of these that was filled before")
    ids = random_ids(1, 40)
    _, cache = read(model, ids[:, :-1])
    codec = lossless()
    back = codec.decode(codec.encode(cache))
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, past_key_values=copy.deepcopy(cache), **options)
    assert torch.equal(model.generate(ids, past_key_values=back, **options), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gemma3_text", "qwen3_next", "nemotron_h", "deepseek_v32", "lfm2"])
def test_caches_of_16_bits(name, dtype):
    model, ids = tiny_model(name, dtype), random_ids(1, 50)
    _, cache = read(model, ids)
    stream = lossless().encode(cache)
    assert same(lossless().decode(stream), cache)
    assert kvtc.inspect(stream).total_ratio > 0.8


STATES_ALONE = {"mamba", "mamba2"}
UNPADDED = {"deepseek_v4"}
"""Pool their tokens, so that padding is pooled with them."""


def test_batches(model):
    """Sequences of several lengths are coded one by one, and go on together, padded on the left."""
    ids, n = random_ids(3, 40), 30
    mask = torch.ones(3, 40, dtype=torch.int64)
    if model.config.model_type not in UNPADDED:
        mask[1, :9], mask[2, :20] = 0, 0
    _, cache = read(model, ids[:, :n], attention_mask=mask[:, :n])
    codec = lossless()
    streams = codec.encode_batch(cache, ids[:, :n], mask[:, :n])
    back, found_mask = codec.decode_batch(
        streams, [row[kept.bool()] for row, kept in zip(ids[:, :n], mask[:, :n], strict=True)]
    )
    assert torch.equal(found_mask, mask[:, :n])
    # What follows is not padded, and a model of states alone takes no mask of what it has read.
    further = {} if model.config.model_type in STATES_ALONE else {"attention_mask": mask}
    expected, _ = read(model, ids[:, n:], cache, **further)
    found, _ = read(model, ids[:, n:], back, **further)
    real = mask[:, n:].bool()
    assert torch.equal(found[real], expected[real])
    for index, stream in enumerate(streams):
        alone = codec.decode(stream)
        assert kvtc.inspect(stream).n_tokens == int(mask[index, :n].sum())
        assert len(alone.layers) == len(cache.layers)


def test_padding_of_a_model_that_pools_its_tokens_is_refused():
    model, ids = tiny_model("deepseek_v4"), random_ids(2, 30)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    _, cache = read(model, ids)
    with pytest.raises(UnsupportedModel, match="pools its tokens"):
        lossless().encode_batch(cache, ids, mask)
    codec = lossless()
    streams = [codec.encode(read(model, ids[:1, :n])[1]) for n in (20, 30)]
    with pytest.raises(UnsupportedModel, match="pools its tokens"):
        codec.decode_batch(streams)


def test_streams_of_other_groups_do_not_make_a_batch():
    ids, codec = random_ids(1, 20), lossless()
    streams = [codec.encode(read(tiny_model(name), ids)[1]) for name in ("gemma2", "gemma3_text")]
    with pytest.raises(InvalidArgument, match="stream 1 holds other groups of layers than stream 0"):
        codec.decode_batch(streams)


def test_what_inspect_says_of_groups():
    ids = random_ids(1, 50)
    stream = lossless().encode(read(tiny_model("gemma3_text"), ids)[1], ids)
    info = kvtc.inspect(stream)
    full, window = info.groups
    assert (full.kind, full.layers, full.shape, full.is_coded) == ("full attention", (2, 5), (2, 8, 8), True)
    assert (window.kind, window.layers, window.is_coded) == ("sliding window", (0, 1, 3, 4), False)
    assert (full.original_bytes, window.original_bytes) == (50 * 2 * 2 * 16 * 2, 15 * 4 * 2 * 16 * 2)
    # The window lies in the last two chunks, and each of them is written once.
    assert [(s.chunk, s.raw_bytes) for s in info.sections if s.group == 1] == [(2, 13 * 512), (3, 2 * 512)]
    assert info.resume_points == (50,)
    assert info.total_bytes == len(stream)
    plain = kvtc.inspect(lossless().encode(read(tiny_model("llama"), ids)[1]))
    assert plain.resume_points == ()


def test_states_exist_at_the_end_alone():
    ids, codec = random_ids(1, 50), lossless()
    stream = codec.encode(read(tiny_model("qwen3_next"), ids)[1], ids)
    with pytest.raises(InvalidArgument, match=r"cannot be restored after 32 tokens.*it can be after 50"):
        codec.decode(stream, ids[:, :32], tokens=32)


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "glm_moe_dsa", "minimax_m3_vl_text"])
def test_what_keeps_every_token_has_every_prefix(name):
    model, ids, codec = tiny_model(name), random_ids(1, 50), lossless()
    stream = codec.encode(read(model, ids)[1], ids)
    for n in (1, 16, 33, 49):
        _, expected = read(model, ids[:, :n])
        found = codec.decode(stream, ids[:, :n], tokens=n)
        assert [layer.keys.shape for layer in found.layers] == [layer.keys.shape for layer in expected.layers]
        assert read(model, ids[:, n:], found)[0].shape == (1, 50 - n, 64)


def test_a_window_longer_than_the_text_is_there_at_the_end_of_each_chunk():
    ids, codec = random_ids(1, 40), lossless()
    model = tiny_model("gemma2", sliding_window=64)
    stream = codec.encode(read(model, ids)[1], ids)
    assert kvtc.inspect(stream).resume_points == (16, 32, 40)
    found = codec.decode(stream, tokens=16)
    assert [layer.get_seq_length() for layer in found.layers] == [16] * 4
    assert read(model, ids[:, 16:], found)[0].shape == (1, 24, 64)


def test_parts_of_a_stream_of_groups():
    ids, codec = random_ids(1, 50), lossless()
    _, cache = read(tiny_model("nemotron_h"), ids)
    stream = codec.encode(cache, ids)
    parts = split_stream(stream)
    assert join_streams(parts) == stream
    assert [kvtc.inspect(part).resume_points for part in parts] == [(), (), (), (2,)]
    with pytest.raises(InvalidArgument, match="the stream begins at position 48"):
        codec.decode(parts[-1])
    with pytest.raises(InvalidArgument, match="cannot be restored after 48 tokens"):
        codec.decode(join_streams(parts[:-1]))


def test_a_stream_of_groups_is_no_neutral_cache():
    ids, codec = random_ids(1, 20), lossless()
    stream = codec.encode(read(tiny_model("gemma2"), ids)[1])
    for call in (codec.decode_neutral, codec.decode_layers, lambda data: codec.decode_into(data, [])):
        with pytest.raises(
            UnsupportedModel, match=r"several groups of layers \(full attention of layers 1, 3; sliding"
        ):
            call(stream)
    assert same(codec.decode_lazily(stream), codec.decode(stream))
    with pytest.raises(InvalidArgument, match="start_position cannot be given"):
        codec.decode(stream, start_position=3)


def test_a_cache_that_one_cannot_tell_the_length_of_needs_token_ids():
    _, cache = read(tiny_model("mamba2"), random_ids(1, 20))
    with pytest.raises(InvalidCache, match="give token_ids"):
        lossless().encode(cache)


def test_a_codec_without_calibration_is_lossless():
    with pytest.raises(InvalidArgument, match="needs a calibration"):
        Codec()
    with pytest.raises(InvalidArgument, match="without a calibration"):
        _ = lossless().geometry


def test_streams_with_and_without_calibration_are_told_apart():
    cache = random_cache(20)
    alone, calibrated = lossless(), tiny_codec(lossless=True, ratio=None)
    assert torch.equal(alone.decode(alone.encode(cache)).keys, cache.keys)
    with pytest.raises(CalibrationMismatch, match="this codec has none"):
        alone.decode(calibrated.encode(cache))
    with pytest.raises(CalibrationMismatch, match="the stream was made with calibration 0000"):
        calibrated.decode(alone.encode(cache))
    with pytest.raises(CalibrationMismatch, match="this codec has none"):
        alone.decode(tiny_codec().encode(cache))
    with pytest.raises(InvalidArgument, match="the rotation of these keys is not known"):
        alone.decode(alone.encode(cache), start_position=7)


def test_full_attention_is_coded_and_the_other_groups_are_exact():
    cache = mixed_cache()
    codec = Codec(mixed_calibration(), ratio=3, sink_tokens=2, window_tokens=3, chunk_tokens=CHUNK, states="lossless")
    stream = codec.encode(cache)
    back, info = codec.decode(stream), kvtc.inspect(stream)
    coded = random_cache(50)
    alone = Codec(tiny_calibration(), ratio=3, sink_tokens=2, window_tokens=3, chunk_tokens=CHUNK)
    expected = alone.decode(alone.encode(coded))
    for at, layer in enumerate((0, 2, 5)):
        assert torch.equal(back.layers[layer].keys[0], expected.keys[at])
        assert torch.equal(back.layers[layer].values[0], expected.values[at])
    for layer in (1, 3, 4):
        assert type(back.layers[layer]) is type(cache.layers[layer])
    assert torch.equal(back.layers[1].keys, cache.layers[1].keys)
    assert torch.equal(back.layers[3].recurrent_states[0], cache.layers[3].recurrent_states[0])
    assert [group.is_coded for group in info.groups] == [True, False, False, False]
    # What the other groups cost does not count for the body.
    plain = kvtc.inspect(alone.encode(coded))
    assert info.body_bytes == plain.body_bytes + 8  # two more runs of layers
    assert info.body_ratio >= 3


def test_other_layers_than_those_of_the_calibration():
    codec = Codec(mixed_calibration(), ratio=3)
    cache = mixed_cache()
    cache.layers[1], cache.layers[2] = cache.layers[2], cache.layers[1]
    with pytest.raises(
        GeometryMismatch, match=r"covers layers 0, 2, 5, .* the cache holds full attention: layers 0..1, 5"
    ):
        codec.encode(cache)
    stream = Codec(mixed_calibration(), lossless=True).encode(mixed_cache())
    with pytest.raises(GeometryMismatch, match=r"covers layers 0\.\.2, .* holds layers 0, 2, 5"):
        tiny_codec().decode(stream)
    windows = DynamicCache()
    windows.layers.append(mixed_cache().layers[1])
    with pytest.raises(GeometryMismatch, match="the cache holds sliding window"):
        codec.encode(windows)


def test_a_stream_without_the_group_of_the_calibration():
    ids = random_ids(1, 20)
    stream = lossless().encode(read(tiny_model("mistral"), ids)[1], ids)
    with pytest.raises(
        GeometryMismatch, match=r"covers layers 0\.\.2, .* the stream holds no such group \(sliding window\)"
    ):
        tiny_codec().decode(stream)


def test_parts_of_two_models_are_not_joined():
    ids, codec = random_ids(1, 40), lossless()
    first, second = (
        split_stream(codec.encode(read(tiny_model(name), ids)[1], ids)) for name in ("gemma3_text", "gemma2")
    )
    with pytest.raises(InvalidArgument, match="stream 1 was not made by the encoding of stream 0"):
        join_streams([first[0], second[1], first[2]])


def test_the_page_of_models_names_what_is_held_here():
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    listed = page.split("config classes:")[1].split("\n\n")[0]
    assert re.findall(r"`(\w+)`", listed) == sorted({type(tiny_config(name)).__name__ for name in ARCHITECTURES})


def test_fixed_sizes_and_positions_are_of_one_group():
    codec = Codec(mixed_calibration(), "paper", ratio=3)
    with pytest.raises(InvalidArgument, match="several groups"):
        codec.encode(mixed_cache(), positions=range(50))


def test_caches_that_are_not_as_their_classes_are():
    codec, cache = lossless(), mixed_cache()
    cache.layers[1].cumulative_length = 40
    with pytest.raises(InvalidCache, match=r"layers have read \[40, 50\] tokens"):
        codec.encode(cache)
    cache = mixed_cache()
    cache.layers[1].keys, cache.layers[1].values = (
        side[:, :, 1:] for side in (cache.layers[1].keys, cache.layers[1].values)
    )
    with pytest.raises(InvalidCache, match="it must hold 7; it holds 6"):
        codec.encode(cache)
    cache = mixed_cache()
    cache.activate_past_recording()
    with pytest.raises(InvalidCache, match="records past states"):
        codec.encode(cache)
    cache = mixed_cache()
    cache.layers[2].values = cache.layers[2].values[:, :1]
    with pytest.raises(InvalidCache, match="layer 2 holds keys"):
        codec.encode(cache)
    with pytest.raises(InvalidCache, match="holds no tokens yet"):
        codec.encode(DynamicCache(config=tiny_model("gemma2").config))


def test_an_unknown_class_of_layer_is_named():
    cache = mixed_cache()
    cache.layers[2] = type("PagedLayer", (DynamicLayer,), {})()
    with pytest.raises(UnsupportedModel, match="layer 2 is a PagedLayer"):
        lossless().encode(cache)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mistral", "qwen3_next", "deepseek_v3", "glm_moe_dsa"])
def test_static_caches_have_the_streams_of_those_that_grow(name):
    """Both are given the same numbers, in pieces that end before, at and after the window."""
    config, drawn = tiny_model(name).config, torch.Generator().manual_seed(0)
    static, grown = StaticCache(config, max_cache_len=64), DynamicCache(config=config)
    codec, n_tokens = lossless(), 0
    for piece in (3, WINDOW - 4, 1, 1, 7, 2 * WINDOW):
        n_tokens += piece
        for index, layer in enumerate(grown.layers):
            keys, values = torch.randn(1, 2, piece, 8, generator=drawn), torch.randn(1, 2, piece, 4, generator=drawn)
            for cache in (static, grown):
                if hasattr(layer, "conv_states"):
                    cache.update_conv_state(keys[:, :, -1, :4], index)
                    cache.update_recurrent_state(keys[:, :, :1], index)
                else:
                    cache.update(keys, values, index)
                if hasattr(layer, "indexer_keys"):
                    cache.update_indexer(keys[:, 0], index)
        if name == "mistral" and n_tokens <= WINDOW:
            with pytest.raises(InvalidCache, match="as long as its static cache"):
                codec.encode(static)
            continue
        ids = random_ids(1, n_tokens)
        assert codec.encode(static, ids) == codec.encode(grown, ids)
        assert same(codec.decode(codec.encode(static, ids)), grown)
