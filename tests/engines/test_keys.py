"""Keys of entries: different parts never give one key, and what a codec's settings are is listed by name."""

from __future__ import annotations

import hashlib
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtc import Codec
from kvtc.codec.sealed_stream import StreamSettings
from kvtc.engines.page_layout import PageLayout
from kvtc.engines.settings import EngineSettings
from kvtc.engines.stored_chunks import StoredChunks
from kvtc.engines.vllm.page_groups import PageGroup
from kvtc.engines.vllm.prefix_planner import PrefixPlanner
from kvtc.engines.vllm.tier_jobs import RowShard, TierChunk, TierJobs
from kvtc.engines.windowless_codec import WindowlessCodec
from kvtc.key_digest import digest, entry_scope
from kvtc.prefix_cache import Chain
from kvtc.profiles.rates import Truncation
from kvtc.store import open_store
from tests.builders import (
    HEAD_DIM,
    N_HEADS,
    N_LAYERS,
    joint_calibration,
    relative_error,
    tiny_calibration,
    told_cache,
    told_model,
)

STEP = EngineSettings("unused", "memory:", step=0.05)
TEXTS = st.text(st.sampled_from("ab\n\0/:,|=\"'\\ x0"), max_size=6) | st.text(max_size=4)
PARTS = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats(allow_nan=False) | TEXTS | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
NAMED = st.dictionaries(st.sampled_from(["namespace", "salt", "adapter", "a", "b"]), PARTS, max_size=4)


def told_apart(part):
    """A value that is equal to another one's only if both are the same part: 1, 1.0, True and "1" are not."""
    if isinstance(part, dict):
        return "mapping", frozenset((name, told_apart(value)) for name, value in part.items())
    if isinstance(part, list):
        return "list", tuple(map(told_apart, part))
    return type(part).__name__, part.hex() if isinstance(part, float) else part


@given(TEXTS, NAMED, TEXTS, NAMED)
def test_different_parts_never_have_one_digest(purpose, parts, other_purpose, others):
    same = (purpose, told_apart(parts)) == (other_purpose, told_apart(others))
    assert (digest(purpose, **parts) == digest(other_purpose, **others)) is same
    assert len(digest(purpose, **parts)) == 32


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"namespace": "model", "salt": "x\ny"}, {"namespace": "model\nx", "salt": "y"}),
        ({"adapter": "a\nsalt b", "salt": None}, {"adapter": "a", "salt": "b"}),
        ({"salt": ""}, {"salt": None}),
        ({"salt": ""}, {}),
        ({"a": "1"}, {"a": 1}),
        ({"a": 1}, {"a": True}),
        ({"a": 1}, {"a": 1.0}),
        ({"a": "ab"}, {"a": b"ab"}),
        ({"a": ["ab", ""]}, {"a": ["a", "b"]}),
        ({"a": ["a", ["b"]]}, {"a": ["a", "b"]}),
        ({"a": {"b": "c"}}, {"a": [["b", "c"]]}),
        ({"a": "\ud800"}, {"a": "?"}),
    ],
)
def test_parts_that_a_separator_would_confuse(first, second):
    assert digest("key", **first) != digest("key", **second)


def test_a_digest_does_not_depend_on_order_and_is_always_the_same():
    assert digest("key", a=1, b=["x", None]) == digest("key", b=("x", None), a=1)

    def framed(kind, contents):
        return kind + len(contents).to_bytes(8, "little") + contents

    named = framed(b"s", b"a") + framed(b"i", b"1") + framed(b"s", b"b") + framed(b"n", b"")
    written = framed(b"l", framed(b"s", b"key") + framed(b"m", named))
    assert digest("key", b=None, a=1) == hashlib.sha256(written).digest()
    with pytest.raises(TypeError, match="object"):
        digest("key", a=object())


NAMES = st.tuples(TEXTS, TEXTS, st.none() | TEXTS, st.none() | TEXTS)


@given(NAMES, NAMES)
def test_requests_of_different_owners_have_no_key_in_common(first, second):
    """Namespace, model, adapter and salt, as the vLLM connector makes keys of them."""

    def root(names):
        namespace, identity, adapter, salt = names
        request = None if (adapter, salt) == (None, None) else digest("request", adapter=adapter, salt=salt)
        return Chain.of(entry_scope(namespace, identity), b"calibration", b"settings", 256, request).root

    assert (root(first) == root(second)) is (first == second)


@given(NAMES, NAMES)
def test_chunks_of_servers_have_no_key_in_common(first, second):
    class Coder:
        name = b"coder"

    def key(names):
        namespace, identity, model, salt = names
        chunks = StoredChunks(None, lambda _: Coder(), entry_scope(namespace, identity))
        return chunks.key(0, chunk="aa", model=model, salt=salt)

    assert (key(first) == key(second)) is (first == second)


def test_every_setting_of_a_stream_is_in_the_key():
    """A field that is added to these must be listed in `Codec.settings_digest`, or be of no effect on what is stored."""
    assert {field.name for field in fields(StreamSettings)} == {
        "profile", "chunk_tokens", "coder", "fp8_sinks", "fixed_size", "coded_window", "states"
    }  # fmt: skip
    joint, paper = joint_calibration(), tiny_calibration()
    codecs = [
        *(Codec(paper, "paper", 8, **changed) for changed in (
            {}, {"key_ratio": 4}, {"value_ratio": 4}, {"coder": "none"}, {"sink_format": "fp8"},
            {"chunk_tokens": 128}, {"sink_tokens": 0}, {"window_tokens": 0}, {"states": "lossless"}, {"states": "int6"},
        )),
        Codec(paper, "paper", max_error=0.2),
        Codec(paper, "paper", rate=Truncation(8)),
        *(Codec(joint, profile, model=told_model(), **changed) for profile in ("joint", "conditional") for changed in (
            {"ratio": 8}, {"ratio": 9}, {"step": 0.1}, {"ratio": 8, "fixed_size": True}, {"ratio": 8, "window_format": "coded"},
        )),
    ]  # fmt: skip
    digests = [codec.settings_digest for codec in codecs]
    assert len(set(digests)) == len(codecs)
    assert Codec(joint, "joint", 8).settings_digest == Codec(joint, "joint", 8.0).settings_digest == digests[12]


def test_chunks_of_another_length_have_other_keys():
    """vLLM names a chunk by the hash of its last block, whatever its length."""
    layout = PageLayout("LBHNC", N_LAYERS, N_HEADS, HEAD_DIM, 32)

    def keys(n_tokens):
        rows = np.zeros((1, layout.bytes(n_tokens, torch.bfloat16)), np.uint8)
        part = RowShard(0, layout, torch.bfloat16, WindowlessCodec(joint_calibration(), STEP))
        with open_store("memory:") as store:
            jobs = TierJobs(rows, [part], store, b"scope", n_tokens)
            found = jobs.keys(b"hash")
            jobs.close()
        return found

    assert len({*keys(256), *keys(128), *keys(512)}) == 3
    assert keys(256) == keys(256)


def test_engines_with_chunks_of_different_lengths_share_a_store():
    """Both store under one name of vLLM's, and each reads back its own; nothing is deleted."""
    cache = told_cache(256, torch.bfloat16)
    with open_store("memory:") as store:
        tiers = {}
        for n_tokens in (256, 128):
            layout = PageLayout("LBHNC", N_LAYERS, N_HEADS, HEAD_DIM, 32)
            part = RowShard(0, layout, torch.bfloat16, WindowlessCodec(joint_calibration(), STEP))
            span = slice(256 - n_tokens, 256)
            data = layout.write(cache.keys[:, :, span], cache.values[:, :, span])
            rows = data.flatten().view(torch.uint8).numpy().reshape(1, -1).copy()
            tiers[n_tokens] = TierJobs(rows, [part], store, b"scope", n_tokens), rows, rows.copy()
            tiers[n_tokens][0].store(1, [TierChunk(b"hash", 0, 256 - n_tokens)])
            tiers[n_tokens][0].drain()
        entries = {key: store.get(key) for key in store.keys()}  # noqa: SIM118
        assert len(entries) == 2
        for n_tokens, (jobs, rows, original) in tiers.items():
            rows[:] = 0
            jobs.load(2, [TierChunk(b"hash", 0, 256 - n_tokens)])
            jobs.drain()
            assert [end.success for end in jobs.take_ends()] == [True, True]
            found, wanted = (torch.from_numpy(side).view(torch.bfloat16) for side in (rows, original))
            assert relative_error(found, wanted) < 0.05
            jobs.close()
        assert {key: store.get(key) for key in store.keys()} == entries  # noqa: SIM118


def test_prefixes_do_not_depend_on_the_engine_s_pages():
    with open_store("memory:") as store:
        names = set()
        for page_tokens in (16, 32):
            planner = PrefixPlanner(
                store, b"scope", [[(b"calibration", b"settings")]], [PageGroup(("layer",), (0,), (0,), page_tokens)]
            )
            while planner.matched_tokens("a", list(range(600)), 0) is None:
                pass
            names.add(tuple(planner._prompts["a"].result().nodes[0]))
            planner.close()
    assert len(names) == 1
