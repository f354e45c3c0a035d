"""Caches of transformers whose layers are restored when the model first comes to them."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import weakref
from dataclasses import replace

import pytest
import torch

import kvtc
from kvtc.codec.codec import Codec
from kvtc.codec.layer_queue import LayerQueue
from kvtc.codec.pipeline import Decoding
from kvtc.errors import CorruptStream, MissingDependency, TokenMismatch
from tests.builders import (
    random_cache,
    tiny_calibration,
    tiny_geometry,
    told_cache,
    told_codec,
    told_ids,
)

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model():
    return kvtc.reference_model()[0]


@pytest.fixture(scope="module")
def prompt(model):
    return torch.randint(model.config.vocab_size, (1, 80), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def codec():
    return Codec(kvtc.reference_calibration(), "joint", ratio=8, window_tokens=16)


@pytest.fixture(scope="module")
def stream(model, prompt, codec):
    with torch.no_grad():
        cache = model(prompt[:, :-1], use_cache=True).past_key_values
    return codec.encode(cache, prompt[0, :-1])


@pytest.fixture
def events(monkeypatch):
    """What is restored, and what else a test notes, in order."""
    found = []
    restore = Decoding.write_layer

    def write_layer(self, layer, sides):
        found.append(("restored", layer))
        restore(self, layer, sides)

    monkeypatch.setattr(Decoding, "write_layer", write_layer)
    return found


def small_codec() -> Codec:
    return told_codec("joint", ratio=4, window_tokens=16, chunk_tokens=32)


def is_same(lazy, whole) -> bool:
    return len(lazy.layers) == len(whole.layers) and all(
        torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
        for one, other in zip(lazy.layers, whole.layers, strict=True)
    )


def test_generates_the_same_tokens(model, prompt, codec, stream):
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    whole = model.generate(prompt, past_key_values=codec.decode(stream, prompt[0, :-1]), **options)
    lazy_cache = codec.decode_lazily(stream, prompt[0, :-1])
    assert torch.equal(model.generate(prompt, past_key_values=lazy_cache, **options), whole)
    assert {type(layer).__name__ for layer in lazy_cache.layers} == {"DynamicLayer"}


def test_a_layer_is_restored_when_the_model_comes_to_it(model, prompt, codec, stream, events):
    cache = codec.decode_lazily(stream, prompt[0, :-1])
    assert cache.get_seq_length() == prompt.shape[1] - 1
    assert cache.get_mask_sizes(1, 0) == (prompt.shape[1], 0)
    assert events == []
    hooks = [
        layer.register_forward_hook(lambda *_, index=index: events.append(("computed", index)))
        for index, layer in enumerate(model.get_decoder().layers)
    ]
    try:
        with torch.no_grad():
            model(prompt[:, -1:], past_key_values=cache)
    finally:
        for hook in hooks:
            hook.remove()
    n_layers = model.config.num_hidden_layers
    assert events == [(what, index) for index in range(n_layers) for what in ("restored", "computed")]


def test_everything_is_checked_before_it_returns(codec, stream, prompt):
    damaged = bytearray(stream)
    damaged[-1] ^= 1
    with pytest.raises(CorruptStream):
        codec.decode_lazily(bytes(damaged))
    with pytest.raises(TokenMismatch):
        codec.decode_lazily(stream, prompt[0, 1:])


@pytest.mark.parametrize("tokens", [0, 3, 50, 150])
def test_a_prefix_and_a_neutral_cache(tokens):
    codec = small_codec()
    stream = codec.encode(told_cache(150), told_ids(150))
    cache, expected = codec.decode_lazily(stream, tokens=tokens), codec.decode_neutral(stream, tokens=tokens)
    assert cache.get_seq_length() == tokens
    assert all(torch.equal(layer.keys[0], keys) for layer, keys in zip(cache.layers, expected.keys, strict=True))
    assert all(torch.equal(layer.values[0], v) for layer, v in zip(cache.layers, expected.values, strict=True))
    assert cache.get_seq_length() == tokens


def test_what_was_not_looked_at_can_be_coded_copied_and_changed(codec, stream, prompt, events):
    ids = prompt[0, :-1]

    def lazy():
        events.clear()
        return codec.decode_lazily(stream, ids)

    whole = codec.decode(stream, ids)
    assert is_same(copy.deepcopy(lazy()), whole)
    assert is_same(pickle.loads(pickle.dumps(lazy())), whole)  # noqa: S301
    assert codec.encode(lazy(), ids) == codec.encode(whole, ids)
    cache = lazy()
    cache.crop(-5)
    assert cache.get_seq_length() == whole.get_seq_length() - 5
    cache = lazy()
    cache.batch_repeat_interleave(2)
    assert cache.layers[1].values.shape[0] == 2
    cache = lazy()
    cache.reset()
    assert events == []
    assert cache.get_seq_length() == 0
    with pytest.raises(AttributeError, match="nothing"):
        _ = lazy().layers[0].nothing


def test_what_layers_are_restored_from_is_let_go_after_the_last(codec, stream, monkeypatch):
    alive = []
    made = Decoding.__init__

    def init(self, *arguments):
        made(self, *arguments)
        alive.append(weakref.ref(self))

    monkeypatch.setattr(Decoding, "__init__", init)
    cache = codec.decode_lazily(stream)
    for layer in cache.layers[:-1]:
        _ = layer.keys
    gc.collect()
    assert alive[0]() is not None
    _ = cache.layers[-1].keys
    gc.collect()
    assert alive[0]() is None


def test_a_rank_of_a_pipeline_has_its_layers_at_their_places():
    calibration = replace(tiny_calibration(), geometry=replace(tiny_geometry(), layers=(2, 3, 4)))
    codec, cache = Codec(calibration, "paper", ratio=4), random_cache(40)
    cache.layers = (2, 3, 4)
    stream = codec.encode(cache)
    found = codec.decode_lazily(stream)
    assert [layer.is_initialized for layer in found.layers] == [False, False, True, True, True]
    assert found.get_seq_length(1) == 0
    assert torch.equal(found.layers[4].keys[0], codec.decode(stream).keys[2])


def test_without_transformers_the_message_says_so(monkeypatch):
    codec = small_codec()
    stream = codec.encode(random_cache(40), told_ids(40))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependency):
        codec.decode_lazily(stream)


class FakeStream:
    """A CUDA stream and its events that only note what is asked of them."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self):
        self.log.append("event")
        return f"event {self.log.count('event') - 1}"


class FakeSide:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def record_stream(self, stream):
        self.log.append(f"{self.name} is used on {stream.name}")


class Entered:
    def __init__(self, stream):
        self.stream = stream

    def __enter__(self):
        self.stream.log.append(f"on {self.stream.name}")

    def __exit__(self, *_):
        self.stream.log.append("back")


def test_on_cuda_the_next_layer_is_queued_beside_the_one_that_is_used(monkeypatch):
    log = []
    home = FakeStream("home", log)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: home)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: FakeStream("side", log))
    monkeypatch.setattr(torch.cuda, "stream", Entered)

    def restore(layer):
        log.append(f"restore {layer}")
        return FakeSide(f"keys {layer}", log), FakeSide(f"values {layer}", log)

    def queued(layer):
        return ["on side", f"restore {layer}", "event", "back"]

    def taken(layer, event):
        used = [f"{side} {layer} is used on home" for side in ("keys", "values")]
        return [f"home waits for event {event}", *used]

    queue = LayerQueue(restore, 3, torch.device("cuda"))
    assert log == ["side waits for home", *queued(0)]
    del log[:1]
    for layer in range(3):
        before = len(log)
        queue.take(layer)
        assert log[before:] == [*taken(layer, layer), *(queued(layer + 1) if layer < 2 else [])]
    before = len(log)
    del queue
    gc.collect()
    assert log[before:] == ["home waits for side"], "memory made at home is used at home again"


def test_layers_asked_for_in_another_order_are_each_restored_once(monkeypatch):
    log = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: FakeStream("home", log))
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: FakeStream("side", log))
    monkeypatch.setattr(torch.cuda, "stream", Entered)
    restored = []

    def restore(layer):
        restored.append(layer)
        return FakeSide("keys", log), FakeSide("values", log)

    queue = LayerQueue(restore, 4, torch.device("cuda"))
    for layer in (2, 0, 1, 3):
        queue.take(layer)
    assert restored == [0, 2, 3, 1]
