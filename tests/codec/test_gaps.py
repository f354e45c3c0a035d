"""Caches from which tokens were evicted, of the reference model: what is left is coded as well as the whole would be."""

from __future__ import annotations

import pytest
import torch

import kvtc
from kvtc.cache import KVCache
from kvtc.codec import transformers_cache as interop
from kvtc.container.stream import parse_stream
from kvtc.container.tables import SectionType
from kvtc.demo.run import CONVERSATION
from kvtc.huggingface.continuation import predict, prefill

N_CACHED, N_FED = 480, 24


@pytest.fixture(scope="module")
def model():
    return kvtc.reference_model()[0]


@pytest.fixture(scope="module")
def ids():
    _, tokenizer = kvtc.reference_model()
    text = CONVERSATION.read_text(encoding="utf-8")
    return torch.tensor(tokenizer(text).input_ids[: N_CACHED + N_FED])


@pytest.fixture(scope="module")
def whole(model, ids) -> KVCache:
    return interop.from_transformers(prefill(model, ids[:N_CACHED]), kvtc.reference_calibration().geometry)


def kept_tokens() -> torch.Tensor:
    """The sinks and half of the others, drawn at random."""
    drawn = torch.randperm(N_CACHED - 4, generator=torch.Generator().manual_seed(0))[: N_CACHED // 2]
    return torch.cat([torch.arange(4), 4 + drawn.sort().values])


def part(cache: KVCache, kept: torch.Tensor) -> KVCache:
    return KVCache(cache.keys[:, :, kept], cache.values[:, :, kept], kept, rope_length=cache.resolved_rope_length())


def loss(model, codec: kvtc.Codec, cache: KVCache, ids: torch.Tensor) -> tuple[float, float]:
    """body_ratio, and KL of the predictions after the cached tokens from exact to decoded, in nats."""
    kept = cache.resolved_positions()
    stream = codec.encode(cache, ids[kept])
    decoded = codec.decode(stream, ids[kept])
    assert torch.equal(decoded.resolved_positions(), kept)
    expected, found = (predict(model, interop.as_transformers(c), ids[N_CACHED:], N_CACHED) for c in (cache, decoded))
    return kvtc.inspect(stream).body_ratio, float((expected.exp() * (expected - found)).sum(dim=-1).mean())


@pytest.mark.parametrize("profile", ["paper", "joint"])
def test_an_evicted_cache_costs_and_loses_what_the_whole_does(model, ids, whole, profile):
    codec = kvtc.Codec(kvtc.reference_calibration(), profile, ratio=16, window_tokens=0)
    ratio, kl = loss(model, codec, whole, ids)
    ratio_left, kl_left = loss(model, codec, part(whole, kept_tokens()), ids)
    assert ratio_left == pytest.approx(ratio, rel=0.06)
    assert 0 < kl_left < 3 * kl + 0.002


def test_a_chunk_that_lost_nothing_is_coded_as_before(ids, whole):
    """Only what stands in a chunk decides its bytes: with a step, chunks around a gap stay those of the whole cache."""
    codec = kvtc.Codec(kvtc.reference_calibration(), "joint", step=1.0, window_tokens=0, chunk_tokens=64)
    kept = torch.cat([torch.arange(150), torch.arange(200, N_CACHED)])
    before, after = (
        parse_stream(codec.encode(cache, ids[cache.resolved_positions()])) for cache in (whole, part(whole, kept))
    )
    bodies = [[stream.read(SectionType.BODY, chunk, None) for chunk in range(8)] for stream in (before, after)]
    assert [a == b for a, b in zip(*bodies, strict=True)] == [True, True, False, False, True, True, True, True]
