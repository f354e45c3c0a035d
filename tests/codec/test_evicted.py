"""Evicted caches in kvtc streams: every byte counted, kept tokens where they stood."""

from __future__ import annotations

import pytest
import torch

import kvtc
from kvtc.codec.opened_stream import positions_of
from kvtc.errors import TokenMismatch
from kvtc.evaluate.baselines import H2O, EvictedKvtc, Tova
from kvtc.evaluate.baselines.stream import cache_sides
from kvtc.evaluate.methods import restore
from kvtc.evaluate.quality import evaluate_continuation
from kvtc.huggingface.continuation import prefill

N_TOKENS = 120


@pytest.fixture(scope="module")
def model():
    return kvtc.reference_model()[0]


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 4096, (N_TOKENS,), generator=torch.Generator().manual_seed(0))


def evicted(share=0.5, profile="joint", window=8, eviction=Tova, **options) -> EvictedKvtc:
    codec = kvtc.Codec(kvtc.reference_calibration(), profile, ratio=8, window_tokens=window)
    return EvictedKvtc(eviction=eviction(share=share, **options), codec=codec)


@pytest.mark.parametrize("profile", ["paper", "joint"])
@pytest.mark.parametrize(("eviction", "options"), [(Tova, {}), (H2O, {"is_shared": True})])
def test_kept_tokens_come_back_where_they_stood(model, ids, profile, eviction, options):
    method = evicted(profile=profile, eviction=eviction, **options)
    cache = prefill(model, ids)
    stream = method.encode(model, cache, ids)
    kept = positions_of(stream[4:])
    assert len(kept) == N_TOKENS // 2
    assert bool((kept[1:] > kept[:-1]).all())
    exact = [side[:, :, kept] for side in cache_sides(cache)]
    found = cache_sides(method.decode(stream, ids))
    for side, restored in zip(exact, found, strict=True):
        assert torch.equal(restored[:, :, -8:], side[:, :, -8:])
        assert float((restored - side).norm() / side.norm()) < 0.5


def test_the_tokens_kept_are_those_all_layers_together_attend_to(model, ids):
    stream = evicted().encode(model, prefill(model, ids), ids)
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            weights = model(ids[None], output_attentions=True).attentions
    finally:
        model.set_attn_implementation("sdpa")
    scores = torch.stack([layer[0].log() for layer in weights])
    kept: list[int] = []
    for token in range(N_TOKENS):
        kept.append(token)
        if len(kept) > N_TOKENS // 2:
            of_kept = scores[:, :, token, kept].softmax(dim=-1).mean(dim=(0, 1))
            kept.pop(int(of_kept.argmin()))
    assert positions_of(stream[4:]).tolist() == kept


def test_cost_counts_all_bytes_and_all_tokens(model, ids):
    method = evicted()
    cache = prefill(model, ids)
    stream = method.encode(model, cache, ids)
    cost, info = method.measure(stream), kvtc.inspect(stream[4:])
    assert cost.total_bytes == len(stream) == info.total_bytes + 4
    assert cost.n_tokens == N_TOKENS
    assert cost.original_bytes == 2 * info.original_bytes
    assert cost.body_tokens == N_TOKENS - info.sink_tokens - info.window_tokens
    assert cost.body_bytes == info.body_bytes + 4
    all_exact = evicted(window=N_TOKENS)
    cost = all_exact.measure(all_exact.encode(model, cache, ids))
    assert (cost.body_tokens, cost.body_bytes) == (N_TOKENS, cost.total_bytes)


def test_another_text_is_noticed(model, ids):
    method = evicted()
    stream = method.encode(model, prefill(model, ids), ids)
    with pytest.raises(TokenMismatch):
        method.decode(stream, ids.flip(0))


def test_coding_adds_little_to_what_eviction_costs(model, ids):
    text = torch.cat([ids[:60], ids[:60], ids[:60]])
    methods = {"evicted": Tova(share=0.5), "and coded": evicted(window=0)}
    plain, coded = evaluate_continuation(model, text, methods, 40)
    assert coded.total_ratio > 2 * plain.total_ratio
    assert 0 < coded.kl < 3 * plain.kl + 0.1


def test_one_token_is_kept_of_a_short_cache(model, ids):
    restored = restore(evicted(share=0.1), model, prefill(model, ids[:3]), ids[:3])
    assert restored.cache.get_seq_length() == 1
    assert restored.cost.n_tokens == 3
