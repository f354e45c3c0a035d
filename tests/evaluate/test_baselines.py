"""The baselines: their bytes by hand, their round trips, and reading on from what they restore."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

import kvtc
from kvtc.codec.transformers_cache import to_transformers
from kvtc.errors import InvalidArgument, MissingDependency, UnsupportedModel
from kvtc.evaluate.baselines import (
    H2O,
    CacheGen,
    Fp8,
    Gear,
    Int4,
    Kivi,
    Nvfp4,
    PlainZstd,
    Profile,
    Tova,
    TurboQuant,
    Xkv,
    baselines,
)
from kvtc.evaluate.baselines.eviction import attention_queries
from kvtc.evaluate.baselines.nvfp4 import e2m1_symbols, e2m1_values
from kvtc.evaluate.baselines.stream import Header, cache_sides
from kvtc.evaluate.baselines.turboquant import lloyd_max_levels
from kvtc.evaluate.methods import KvtcMethod, Method, as_method, restore
from kvtc.evaluate.quality import evaluate_continuation
from kvtc.huggingface.continuation import predict, prefill
from kvtc.huggingface.models import geometry_of
from tests.builders import random_cache, relative_error, two_widths

N_LAYERS, N_HEADS, HEAD_DIM = 3, 2, 8
VALUES = N_LAYERS * N_HEADS * HEAD_DIM
HEADER = 17


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=N_LAYERS, num_attention_heads=4,
        num_key_value_heads=N_HEADS, head_dim=HEAD_DIM, vocab_size=64, max_position_embeddings=512,
        initializer_range=0.4, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def drawn_ids(n_tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 64, (n_tokens,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def profile(model) -> Profile:
    return Profile.of(prefill(model, drawn_ids(150, seed)) for seed in (5, 6))


@pytest.fixture(scope="module")
def methods(model) -> dict[str, Method]:
    """All of the registry, with a window of 16, and those that it has no place for."""
    found = baselines(geometry_of(model), 16, [prefill(model, drawn_ids(150, 7))])
    return {**found, "float16": Kivi(window_tokens=1000)}


def sides(model, method, n_tokens=70, seed=0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Keys and values [L, H, T, D], exact and restored."""
    ids = drawn_ids(n_tokens, seed)
    cache = prefill(model, ids)
    return list(cache_sides(cache)), list(cache_sides(restore(method, model, cache, ids).cache))


def error(model, method, n_tokens=70) -> float:
    exact, found = sides(model, method, n_tokens)
    return relative_error(torch.stack(found), torch.stack(exact))


def names() -> list[str]:
    return [
        "FP8", "NVFP4", "INT4", "KIVI 4-bit", "KIVI 2-bit", "GEAR 4-bit", "GEAR 2-bit", "GEAR (rank 1) 4-bit",
        "GEAR (rank 1) 2-bit",
        "H2O 1/2", "H2O 1/4", "H2O 1/8", "H2O 1/16", "TOVA 1/2", "TOVA 1/4", "TOVA 1/8", "TOVA 1/16",
        "xKV rank/4", "xKV rank/8", "xKV rank/16", "CacheGen bins*0.5", "CacheGen bins*1", "CacheGen bins*2", "CacheGen bins*4",
        "TurboQuant 4-bit", "TurboQuant 3-bit", "TurboQuant 2-bit", "TurboQuant (sketched keys) 4-bit",
        "TurboQuant (sketched keys) 3-bit", "TurboQuant (sketched keys) 2-bit", "zstd", "zstd (byte planes)", "float16",
    ]  # fmt: skip


def test_the_registry_names_every_baseline(model, methods):
    assert list(methods) == names()
    assert not any(name.startswith("CacheGen") for name in baselines(geometry_of(model)))


@pytest.mark.parametrize("name", ["wide keys", "latent"])
def test_keys_and_values_of_two_widths_make_the_round_trip(name):
    """Those that look at one head's keys with queries, or at keys and values together, are left out."""
    geometry, ids = two_widths(name), drawn_ids(70)
    held = random_cache(70, geometry=geometry)
    cache = to_transformers(held.keys[None], held.values[None], range(N_LAYERS))
    found = baselines(geometry, 16, [cache])
    assert {name.split()[0] for name in found} == {"FP8", "NVFP4", "INT4", "KIVI", "GEAR", "xKV", "TurboQuant", "zstd"}
    for method in found.values():
        restored = restore(method, None, cache, ids)
        assert restored.cost.original_bytes == 70 * 2 * geometry.joint_features
        keys, values = cache_sides(restored.cache)
        assert (keys.shape, values.shape) == (held.keys.shape, held.values.shape)
    fp8 = restore(found["FP8"], None, cache, ids)
    assert fp8.cost.total_bytes == HEADER + 70 * geometry.joint_features + 2 * N_LAYERS * geometry.n_kv_heads * 4
    assert relative_error(cache_sides(fp8.cache)[0], held.keys) < 0.05


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("n_tokens", [1, 2, 9, 16, 17, 95])
def test_every_length_makes_the_round_trip(model, methods, name, n_tokens):
    ids = drawn_ids(n_tokens)
    cache = prefill(model, ids)
    before = [side.clone() for side in cache_sides(cache)]
    restored = restore(methods[name], model, cache, ids)
    assert all(torch.equal(*pair) for pair in zip(before, cache_sides(cache), strict=True))
    keys, values = cache_sides(restored.cache)
    assert keys.shape == values.shape
    assert keys.shape[:2] + keys.shape[3:] == (N_LAYERS, N_HEADS, HEAD_DIM)
    assert keys.dtype == values.dtype == torch.float32
    assert keys.isfinite().all()
    assert values.isfinite().all()
    cost = restored.cost
    assert cost.n_tokens == n_tokens
    assert cost.original_bytes == 4 * VALUES * n_tokens
    assert cost.total_ratio == pytest.approx(4 * VALUES * n_tokens / cost.total_bytes)
    evicts = name[:4] in ("H2O ", "TOVA")
    assert keys.shape[2] == (max(1, round(n_tokens / int(name.split("/")[1]))) if evicts else n_tokens)
    has_window = not evicts and name not in ("FP8", "NVFP4", "INT4", "zstd", "zstd (byte planes)", "float16")
    if has_window:
        assert cost.body_tokens == max(0, n_tokens - 16)
        window = slice(cost.body_tokens, None)
        for found, exact in zip((keys, values), before, strict=True):
            assert torch.equal(found[:, :, window], exact[:, :, window].half().float())
    elif name == "float16":
        assert (cost.body_tokens, cost.body_bytes, cost.body_ratio) == (0, 0, None)
        assert cost.total_bytes == HEADER + cost.original_bytes
    else:
        assert (cost.body_tokens, cost.body_bytes) == (n_tokens, cost.total_bytes)


@pytest.mark.parametrize("name", names())
def test_the_same_cache_gives_the_same_bytes(model, methods, name):
    ids = drawn_ids(60)
    cache = prefill(model, ids)
    first, second = (methods[name].encode(model, cache, ids) for _ in range(2))
    assert first == second


def test_bytes_are_those_counted_by_hand(model):
    ids = drawn_ids(50)
    cache = prefill(model, ids)

    def total(method: Method) -> int:
        return len(method.encode(model, cache, ids)) - HEADER

    n_values = VALUES * 50
    assert total(Fp8()) == 2 * (n_values + 4 * N_LAYERS * N_HEADS)
    # Half a byte a value, a byte for each head's one block of 8 features, 4 bytes a layer; INT4: 4 bytes for each head.
    assert total(Nvfp4()) == 2 * (n_values // 2 + n_values // 8 + 4 * N_LAYERS)
    assert total(Int4()) == 2 * (n_values // 2 + 4 * n_values // 8)
    # Keys in groups of 32 and 18 tokens, values in groups of a head's 8 features, each with 4 bytes.
    scales = 4 * (2 * VALUES + n_values // 8)
    assert total(Kivi(window_tokens=0)) == 2 * n_values * 2 // 8 + scales
    assert total(Kivi(window_tokens=0, bits=4)) == 2 * n_values * 4 // 8 + scales
    # Of 40 tokens in the body; 10 in the window, 4 bytes for each key and value.
    body = 2 * VALUES * 40 * 2 // 8 + 4 * (2 * VALUES + VALUES * 40 // 8)
    assert total(Kivi(window_tokens=10)) == body + 4 * VALUES * 10
    # One group per key channel and value token; 0.05 * 50 = 2 outliers at each end of a channel, 0.05 * 16 = 1 of a token; rank 3.
    groups = 4 * (VALUES + N_LAYERS * 50)
    outliers = 4 * (VALUES * 4 + N_LAYERS * 50 * 2)
    factors = 2 * 2 * N_LAYERS * N_HEADS * 3 * (50 + HEAD_DIM)
    gear = Gear(window_tokens=0, rank=3, outliers=0.1)
    assert total(gear) == 2 * n_values * 2 // 8 + groups + outliers + factors
    norms = 2 * N_LAYERS * N_HEADS * 50
    assert total(TurboQuant(bits=3)) == 2 * (norms + 3 * n_values // 8)
    assert total(TurboQuant(bits=3, sketched_keys=True)) == 3 * norms + 2 * 3 * n_values // 8
    # Groups of 2 layers and of 1, 32 and 16 features: ranks 8 and 4 for keys, 16 and 8 for values.
    xkv = Xkv(geometry=geometry_of(model), layers_per_group=2, key_share=0.25, value_share=0.5)
    assert total(xkv) == 2 * ((8 + 16) * (50 + 32) + (4 + 8) * (50 + 16))
    for evicting in (H2O(share=0.2), Tova(share=0.2)):
        assert total(evicting) == 4 * VALUES * 10


def test_cachegen_costs_what_its_tables_say(model, profile):
    ids = drawn_ids(95)
    method = CacheGen(profile=profile)
    stream = method.encode(model, prefill(model, ids), ids)
    # A length of 4 bytes, a scale of 2 for each of the 10 anchors of 3 layers and 2 kinds; the rest is coded.
    n_coded = len(stream) - HEADER - 4 - 2 * 10 * N_LAYERS * 2
    bits_a_value = 8 * n_coded / (2 * VALUES * 95)
    assert 1.5 < bits_a_value < 4.5


@pytest.mark.parametrize(
    ("coarse", "fine"),
    [
        (Kivi(window_tokens=0, bits=2), Kivi(window_tokens=0, bits=4)),
        (Kivi(window_tokens=0, group_size=64), Kivi(window_tokens=0, group_size=4)),
        (Kivi(window_tokens=0, group_size=64), Gear(window_tokens=0)),
        (Gear(window_tokens=0, rank=1), Gear(window_tokens=0, rank=4)),
        (Gear(window_tokens=0, outliers=0), Gear(window_tokens=0, outliers=0.1)),
        (TurboQuant(bits=2), TurboQuant(bits=3)),
        (TurboQuant(bits=3), TurboQuant(bits=4)),
        (TurboQuant(bits=3, sketched_keys=True), TurboQuant(bits=5, sketched_keys=True)),
        (TurboQuant(bits=2), Fp8()),
        (Nvfp4(), Fp8()),
        (Int4(), Fp8()),
        (Kivi(window_tokens=0, bits=2), Int4()),
        (Int4(group_size=64), Int4(group_size=2)),
        (Fp8(), PlainZstd()),
    ],
    ids=lambda method: str(method).replace(" ", ""),
)
def test_more_bits_are_better(model, coarse, fine):
    assert error(model, fine) < error(model, coarse) < 1


def test_ranks_and_bins_trade_bits_for_error(model):
    geometry = geometry_of(model)
    whole = Xkv(geometry=geometry, key_share=1, value_share=1)
    assert error(model, whole) < 2e-3
    assert error(model, Xkv(geometry=geometry, key_share=0.5, value_share=0.5)) > error(model, whole)
    profiled = [prefill(model, drawn_ids(150, seed)) for seed in (5, 6)]
    levels = [CacheGen(profile=Profile.of(profiled, bin_factor=factor)) for factor in (0.5, 1, 2)]
    errors = [error(model, level) for level in levels]
    assert errors[0] < errors[1] < 0.8
    assert errors[1] < errors[2]
    ids = drawn_ids(95)
    sizes = [len(level.encode(model, prefill(model, ids), ids)) for level in levels]
    assert sizes[0] > sizes[1] > sizes[2]


def test_errors_have_the_size_that_theory_gives(model):
    exact, found = sides(model, Fp8())
    for side, restored in zip(exact, found, strict=True):
        limit = side.abs().amax(dim=(2, 3), keepdim=True) / 448
        assert bool(((side - restored).abs() <= side.abs() / 16 + limit * 2**-9).all())
    # For a uniform coordinate, as in 3 dimensions, the best 2**b levels are evenly spaced.
    assert torch.allclose(lloyd_max_levels(3, 2), torch.tensor([-0.75, -0.25, 0.25, 0.75]), atol=1e-3)
    # Lloyd and Max: the distortion of a Gaussian at 2 bits is 0.1175.
    vectors = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    levels = lloyd_max_levels(4096, 2) * math.sqrt(4096)
    nearest = (vectors[:, None] - levels).square().amin(dim=1)
    assert float(nearest.mean()) == pytest.approx(0.1175, rel=0.03)


def test_e2m1_rounds_to_the_nearest_value_and_ties_to_even():
    values = torch.tensor([0.0, 0.25, 0.3, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.1, 100.0])
    expected = torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0])
    assert torch.equal(e2m1_values(e2m1_symbols(values)), expected)
    assert torch.equal(e2m1_values(e2m1_symbols(-values)), -expected)
    assert torch.equal(e2m1_symbols(e2m1_values(torch.arange(16))), torch.arange(16, dtype=torch.uint8))


def test_nvfp4_scales_each_block_so_that_its_largest_value_fits(model):
    for side, restored in zip(*sides(model, Nvfp4()), strict=True):
        # A head of 8 features is one block. The widest gap of e2m1 is 2 of 6, and a scale is rounded by 1/16 at most.
        largest = side.abs().amax(dim=-1, keepdim=True)
        assert bool(((side - restored).abs() <= largest * (1 / 6 + 1 / 16)).all())
        assert float((side - restored).square().mean() / side.square().mean()) < 0.02


def test_int4_is_a_straight_grid_between_the_extremes_of_a_group(model):
    for side, restored in zip(*sides(model, Int4()), strict=True):
        width = side.amax(dim=-1, keepdim=True) - side.amin(dim=-1, keepdim=True)
        limit = side.abs().amax(dim=-1, keepdim=True) * 2**-10  # shift and scale are rounded to float16
        assert bool(((side - restored).abs() <= width / 30 + limit).all())


def test_sketched_keys_have_inner_products_that_are_right_on_average(model):
    key = prefill(model, drawn_ids(1))
    exact = cache_sides(key)[0]
    query = torch.ones(HEAD_DIM)
    sketches = [TurboQuant(bits=2, sketched_keys=True, seed=seed) for seed in range(300)]
    found = [cache_sides(restore(sketch, model, key, drawn_ids(1)).cache)[0] @ query for sketch in sketches]
    spread = torch.stack(found).std(dim=0) / math.sqrt(len(found))
    assert bool(((torch.stack(found).mean(dim=0) - exact @ query).abs() < 5 * spread).all())


@pytest.mark.parametrize("byte_planes", [False, True])
def test_zstd_loses_nothing_of_16_bits(byte_planes):
    model = kvtc.reference_model(dtype="bfloat16")[0]
    exact, found = sides(model, PlainZstd(byte_planes=byte_planes))
    assert exact[0].dtype == torch.bfloat16
    assert all(torch.equal(*pair) for pair in zip(exact, found, strict=True))


def test_zstd_needs_its_package(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingDependency):
        error(model, PlainZstd())


def test_recorded_queries_give_the_attention_of_the_model(model):
    ids = drawn_ids(40)
    keys = cache_sides(prefill(model, ids))[0]
    found = attention_queries(model, ids)
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            expected = model(ids[None], output_attentions=True).attentions
    finally:
        model.set_attn_implementation(usual)
    causal = torch.ones(40, 40).tril().bool()
    for queries, layer_keys, weights in zip(found, keys, expected, strict=True):
        scores = queries @ layer_keys.repeat_interleave(2, 0).mT
        assert torch.allclose(scores.masked_fill(~causal, -torch.inf).softmax(dim=-1), weights[0], atol=1e-5)


def test_h2o_keeps_heavy_hitters_and_recent_tokens():
    keys = torch.zeros(1, 30, 4)
    keys[0, 3] = torch.tensor([5.0, 0, 0, 0])
    queries = torch.tensor([1.0, 0, 0, 0]).repeat(2, 30, 1)
    (kept,) = H2O().kept_tokens(queries, keys, 6)
    assert kept.tolist()[-3:] == [27, 28, 29]
    assert 3 in kept


def test_tova_drops_what_the_last_token_attends_to_least():
    keys = torch.eye(8)[None].repeat(2, 1, 1)
    # Every token prefers itself, then tokens by the order of their number.
    queries = (torch.eye(8) * 9 + torch.arange(8.0)[None]).repeat(4, 1, 1)
    kept = Tova().kept_tokens(queries, keys, 3)
    assert kept.tolist() == [[5, 6, 7]] * 2


def test_one_choice_for_all_heads_is_made_by_what_they_gather_together():
    keys = torch.zeros(2, 12, 4)
    keys[0, 2, 0] = keys[1, 5, 0] = 4.0
    queries = torch.tensor([1.0, 0, 0, 0]).repeat(2, 12, 1)
    alone = H2O().kept_tokens(queries, keys, 6).tolist()
    shared = H2O(is_shared=True).kept_tokens(queries, keys, 6).tolist()
    assert 2 in alone[0]
    assert 5 in alone[1]
    assert alone[0] != alone[1]
    assert shared[0] == shared[1]
    assert {2, 5} <= set(shared[0])


def test_token_by_token_is_what_all_scores_at_once_would_give(model):
    ids = drawn_ids(200)
    keys = cache_sides(prefill(model, ids))[0][1]
    queries = attention_queries(model, ids)[1]
    scores = queries @ keys.repeat_interleave(2, 0).mT
    kept, gathered = [[], []], torch.zeros(2, 200)
    for token in range(200):
        for head in range(2):
            kept[head].append(token)
            weights = scores[2 * head : 2 * head + 2, token, kept[head]].softmax(dim=-1).sum(dim=0)
            gathered[head, kept[head]] += weights
            if len(kept[head]) > 20:
                kept[head].remove(min(kept[head][:-10], key=lambda old: float(gathered[head, old])))
    assert H2O().kept_tokens(queries, keys, 20).tolist() == kept


@pytest.mark.parametrize("method", [H2O(share=1), Tova(share=1)], ids=["H2O", "TOVA"])
def test_with_nothing_evicted_predictions_are_the_exact_ones(model, method):
    ids = drawn_ids(40)
    model.half()  # so that 16 bits a value are all there is
    try:
        cache = prefill(model, ids[:30])
        restored = restore(method, model, cache, ids[:30]).cache
        assert torch.equal(predict(model, restored, ids[30:], first_position=30), predict(model, cache, ids[30:]))
    finally:
        model.float()


def test_predictions_after_eviction_are_those_of_a_mask(model):
    ids = drawn_ids(40)
    cache = prefill(model, ids[:30])
    kept = torch.tensor([0, 3, 4, 11, 28])
    hidden = torch.full((10, 40), -torch.inf)
    hidden[:, kept] = 0
    hidden[:, 30:] = torch.full((10, 10), -torch.inf).triu(1)
    with torch.no_grad():
        expected = model(ids[None, 30:], past_key_values=prefill(model, ids[:30]), attention_mask=hidden[None, None])
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
    found = predict(model, cache, ids[30:], first_position=30)
    assert torch.allclose(found, expected.logits[0].log_softmax(dim=-1), atol=1e-4)
    assert not torch.allclose(found, predict(model, cache, ids[30:]), atol=1e-2)


def test_models_without_positions_refuse_evicted_caches():
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=64)).eval()
    ids = drawn_ids(12)
    cache = prefill(model, ids[:8])
    assert torch.equal(predict(model, cache, ids[8:], first_position=8), predict(model, cache, ids[8:]))
    with pytest.raises(UnsupportedModel):
        predict(model, cache, ids[8:], first_position=9)


def test_baselines_and_kvtc_stand_in_one_table(model, methods):
    found = evaluate_continuation(model, drawn_ids(120), methods, 20)
    assert [quality.name for quality in found] == names()
    assert all(quality.n_tokens == 99 for quality in found)
    by_name = {quality.name: quality for quality in found}
    assert by_name["float16"].kl < 1e-3 < by_name["H2O 1/8"].kl
    assert by_name["KIVI 4-bit"].kl < by_name["KIVI 2-bit"].kl


def test_a_codec_is_a_method(calibration):
    codec = kvtc.Codec(calibration)
    assert as_method(codec) == KvtcMethod(codec)
    assert as_method(as_method(codec)) == KvtcMethod(codec)


def test_what_cannot_be_coded_is_refused(model):
    with pytest.raises(InvalidArgument):
        Profile.of([])
    with pytest.raises(InvalidArgument):
        Profile.of([prefill(model, drawn_ids(1))])
    with pytest.raises(InvalidArgument):
        Header.of(*[torch.zeros(1, 1, 1, 1, dtype=torch.float64)] * 2, 0)
