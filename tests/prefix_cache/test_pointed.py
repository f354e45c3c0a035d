"""Prefixes of caches of every kind of layer: loaded at resume points, as they were, whatever of the store is left."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator

import pytest
import torch
from transformers import DynamicCache

import kvtc
from kvtc.codec.codec import Codec
from kvtc.errors import InvalidArgument, UnsupportedModel
from kvtc.prefix_cache import PrefixCache
from kvtc.prefix_cache.tails import MAX_TAILS
from kvtc.store import Store, open_store
from tests.codec.test_groups import lossless, same, tensors_of
from tests.tiny_architectures import (
    ARCHITECTURES,
    mixed_cache,
    mixed_calibration,
    random_ids,
    read,
    tiny_model,
)

CHUNK, EVERY = 16, 32
NAMES = sorted(ARCHITECTURES)
COMPLETE = {
    *("llama", "qwen3", "phi3", "hy_v3", "minimax_m3_vl_text"),
    *("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "minicpm3"),
}
"""Those whose caches can be restored at any token."""


@pytest.fixture
def store() -> Iterator[Store]:
    with open_store("memory:") as opened:
        yield opened


def keys_of(store: Store, kind: str = "") -> list[str]:
    return [key for key in store.keys() if key.startswith(kind)]  # noqa: SIM118


def model_of(name: str):
    """A tiny model; "long windows": of 40 tokens, which are longer than a chunk."""
    return tiny_model("gemma3_text", sliding_window=40) if name == "long windows" else tiny_model(name)


def opened(store: Store, codec: Codec | None = None, **options) -> PrefixCache:
    return PrefixCache(
        codec or lossless(), store, **({"min_tokens": 1, "resume_every": EVERY, "identity": "tiny"} | options)
    )


class Conversation:
    """A text and the cache that a model has of it, as it was at every length at which it was looked at."""

    def __init__(self, model, ids: torch.Tensor) -> None:
        self.model, self.ids, self.points = model, ids, kvtc.ResumePoints(EVERY)
        self.cache, self.n_tokens, self.kept = None, 0, {}

    def read(self, n: int) -> None:
        """Go on to n tokens; what a prefix cache can load is kept."""
        while self.n_tokens < n:
            stop = min(n, self.n_tokens + self.points.tokens_to_next(self.n_tokens))
            self.cache = read(self.model, self.ids[:, self.n_tokens : stop], self.cache)[1]
            self.n_tokens = stop
            self.points.take(self.cache, stop)
            self.kept[stop] = copy.deepcopy(self.cache)

    def check(self, found, n: int) -> None:
        """A cache of n tokens is what it was in memory, and goes on alike."""
        assert same(found, self.kept[n])
        expected, after = (
            read(self.model, self.ids[:, n : n + 5], its)[0] for its in (copy.deepcopy(self.kept[n]), found)
        )
        assert torch.equal(after, expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_prefix_is_loaded_at_the_last_point_before_it(name, store):
    """Two conversations with one beginning, several turns each."""
    model = tiny_model(name)
    ids, other = random_ids(1, 170), random_ids(1, 170, seed=1)
    shared = torch.cat([ids[:, :75], other[:, 75:]], dim=1)
    first, second = Conversation(model, ids), Conversation(model, shared)
    ends = (70, 105, 130)
    for talk in (first, second):
        for n in ends:
            with opened(store) as prefixes:
                talk.read(n)
                report = prefixes.save(talk.ids[0, :n], talk.cache, talk.points).result()
                assert report.n_tokens == n or name in COMPLETE
    for talk in (first, second):
        for asked in (33, 64, 70, 74, 96, 104, 105, 129, 130, 160):
            with opened(store) as prefixes:
                found, n = prefixes.load(talk.ids[0, :asked], whole=True)
                if name in COMPLETE:
                    assert n >= min(asked, 128) // CHUNK * CHUNK
                    whole = copy.deepcopy(talk.cache)
                    whole.crop(n - 130)
                    assert all(
                        torch.equal(a[1], b[1]) for a, b in zip(tensors_of(found), tensors_of(whole), strict=True)
                    )
                    continue
                assert n == max(point for point in (32, 64, 70, 96, 105, 128, 130) if point <= asked)
                talk.check(found, n)
                assert prefixes.contains(talk.ids[0, :asked]) == n


@pytest.mark.parametrize("name", ["gemma3_text", "long windows", "mamba2", "llama"])
def test_another_store_loads_from_what_is_portable(name, store):
    """Chunks, points and tails of one conversation; of others that share its beginning, none."""
    talk, other = Conversation(model_of(name), random_ids(1, 120)), Conversation(model_of(name), random_ids(1, 120))
    other.ids[:, 80:] = random_ids(1, 40, seed=1)
    for each in (other, talk):
        each.read(105)
        with opened(store) as prefixes:
            prefixes.save(each.ids[0, :105], each.cache, each.points).result()
    with opened(store) as prefixes:
        found = prefixes.portable(talk.ids[0])
        most = prefixes.load(talk.ids[0], whole=True)[1]
    with open_store("memory:") as target:
        target.put_many((key, store.get(key) if value is None else value) for key, value in found)
        with opened(target) as prefixes:
            loaded, n = prefixes.load(talk.ids[0], whole=True)
            assert n == most >= 96
            talk.check(loaded, n)
            assert prefixes.load(other.ids[0], whole=True)[1] <= 80


def test_what_is_shared_is_stored_once(store):
    model, ids = tiny_model("gemma3_text"), random_ids(1, 100)
    talk = Conversation(model, ids)
    talk.read(100)
    with opened(store) as prefixes:
        prefixes.save(ids[0], talk.cache, talk.points).result()
        keys = set(keys_of(store))
        again = prefixes.save(ids[0], talk.cache, talk.points).result()
        assert (again.coded, again.chunks) == (0, 6)
        assert set(keys_of(store)) == keys
    kinds = [key.split("/")[0] for key in keys]
    # Points after 32, 64 and 96 tokens and at the end, behind a tail of 20 tokens with its index. The windows before the last
    # two are of one chunk, of which they reach back to the last 15 and 11 tokens.
    expected = {"chunk": 6, "tail": 1, "tails": 1, "point": 4, "window": 3, "sort": 1}
    assert {kind: kinds.count(kind) for kind in kinds} == expected


@pytest.mark.parametrize("name", ["gemma3_text", "long windows", "mistral", "nemotron_h", "kimi_linear"])
def test_whatever_is_evicted_no_half_of_a_prefix_is_loaded(name, store):
    """Entries go in a random order: what is loaded is right, and ends where all groups have a common end."""
    talk, draw = Conversation(model_of(name), random_ids(1, 150)), random.Random(0)
    with opened(store) as prefixes:
        for n in (50, 90, 140):
            talk.read(n)
            prefixes.save(talk.ids[0, :n], talk.cache, talk.points).result()
    keys, lengths = sorted(key for key in keys_of(store) if not key.startswith("sort")), []
    draw.shuffle(keys)
    for key in keys:
        store.delete(key)
        with opened(store) as prefixes:
            found, n = prefixes.load(talk.ids[0, :145])
            if n:
                talk.check(found, n)
            assert prefixes.contains(talk.ids[0, :144]) == n
            lengths.append(n)
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] == 0


def test_a_damaged_point_is_deleted_and_the_one_before_it_loaded(store):
    talk = Conversation(tiny_model("qwen3_next"), random_ids(1, 90))
    with opened(store) as prefixes:
        for n in (32, 64):
            talk.read(n)
            before = set(keys_of(store))
            prefixes.save(talk.ids[0, :n], talk.cache).result()
        for key in set(keys_of(store)) - before:
            if key.startswith("point"):
                data = store.get(key)
                store.put(key, data[:-1] + bytes([data[-1] ^ 1]))
        found, n = prefixes.load(talk.ids[0])
        assert n == 32
        talk.check(found, n)
        assert (prefixes.statistics["damaged"], prefixes.load(talk.ids[0])[1]) == (1, 32)
        assert prefixes.statistics["damaged"] == 1


@pytest.mark.parametrize("name", ["gemma3_text", "long windows"])
def test_what_is_deleted_is_gone(name, store):
    talk = Conversation(model_of(name), random_ids(1, 100))
    talk.read(100)
    with opened(store) as prefixes:
        prefixes.save(talk.ids[0], talk.cache, talk.points).result()
        prefixes.delete(talk.ids[0], keep_tokens=40)
        assert prefixes.load(talk.ids[0])[1] == 32
        prefixes.delete(talk.ids[0])
        assert {key.split("/")[0] for key in keys_of(store)} == {"sort"}


def test_points_of_one_beginning_are_bounded(store):
    model = tiny_model("mamba2")
    with opened(store) as prefixes:
        for seed in range(MAX_TAILS + 3):
            ids = torch.cat([random_ids(1, 20), random_ids(1, 8, seed)], dim=1)
            prefixes.save(ids[0], read(model, ids)[1]).result()
    kinds = [key.split("/")[0] for key in keys_of(store)]
    assert (kinds.count("point"), kinds.count("tails")) == (MAX_TAILS, 1)


def test_a_coded_group_beside_windows_and_states(store):
    """The full-attention layers are coded at the codec's rate, the others are as they were."""
    codec = Codec(mixed_calibration(), ratio=3, sink_tokens=2, window_tokens=3, chunk_tokens=CHUNK, states="lossless")
    cache, points = mixed_cache(90), kvtc.ResumePoints(EVERY)
    points.take(mixed_cache(EVERY))
    ids = random_ids(1, 90)[0]
    with opened(store, codec) as prefixes:
        report = prefixes.save(ids, cache, points).result()
        assert (report.n_tokens, report.chunks) == (90, 4)
        found, n = prefixes.load(ids, whole=True)
        assert n == 90
        for layer in (1, 4):
            assert torch.equal(found.layers[layer].keys, cache.layers[layer].keys)
        assert torch.equal(found.layers[3].recurrent_states[0], cache.layers[3].recurrent_states[0])
        # Its window of three tokens is exact.
        assert torch.equal(found.layers[0].keys[:, :, -3:], cache.layers[0].keys[:, :, -3:])
        assert prefixes.load(ids[:60])[1] == EVERY
        with pytest.raises(UnsupportedModel, match="several groups of layers, which load gives back"):
            prefixes.load_neutral(ids)


def test_what_one_model_has_is_not_found_for_another(store):
    ids = random_ids(1, 60)
    for name in ("gemma3_text", "mistral", "llama"):
        with opened(store, identity=name) as prefixes:
            prefixes.save(ids[0], read(tiny_model(name), ids)[1]).result()
    for name in ("gemma3_text", "mistral", "llama", "qwen3_next"):
        with opened(store, identity=name) as prefixes:
            found, n = prefixes.load(ids[0], whole=True)
            if name == "qwen3_next":
                assert n == 0
            else:
                assert same(found, read(tiny_model(name), ids[:, :n])[1])


def test_arguments():
    with open_store("memory:") as store:
        with pytest.raises(InvalidArgument, match="resume_every 40 must be a multiple of chunk_tokens, 16"):
            opened(store, resume_every=40)
        with pytest.raises(InvalidArgument, match="no calibration, which would tell models apart: give an identity"):
            opened(store, identity="")
        with opened(store) as prefixes:
            talk = Conversation(tiny_model("gemma3_text"), random_ids(1, 50))
            talk.read(50)
            with pytest.raises(InvalidArgument, match="taken after 32 tokens; the cache has 20"):
                prefixes.save(talk.ids[0], read(talk.model, talk.ids[:, :20])[1], talk.points)
            found, n = prefixes.load(talk.ids[0])
            assert (type(found), n) == (DynamicCache, 0)


def test_points_have_rounded_states_where_the_codec_says_so(store):
    """In fewer bytes, and under names of their own: a codec with other states does not find them."""
    chat = Conversation(tiny_model("bamba", mamba_d_state=32), random_ids(1, 70))
    chat.read(70)
    exact, rounding = lossless(), lossless(states="int8")
    sizes = {}
    for codec in (exact, rounding):
        with opened(store, codec) as prefixes:
            assert prefixes.load(chat.ids)[1] == 0
            sizes[codec] = prefixes.save(chat.ids, chat.cache, chat.points).result().written_bytes
    assert sizes[rounding] < 0.8 * sizes[exact]
    with opened(store, exact) as prefixes:
        chat.check(*prefixes.load(chat.ids))
    with opened(store, rounding) as prefixes:
        found, n_tokens = prefixes.load(chat.ids[:, :40])
        assert n_tokens == EVERY
        state, expected = (its.layers[0].recurrent_states[0] for its in (found, chat.kept[EVERY]))
        assert 0 < float((state - expected).norm() / expected.norm()) < 0.02
        assert torch.equal(found.layers[1].keys, chat.kept[EVERY].layers[1].keys)
