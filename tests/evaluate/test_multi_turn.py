"""Repeated use: what is coded again and again, and compared with the exact cache."""

from __future__ import annotations

import pytest
import torch

import kvtc
from kvtc.errors import InvalidArgument
from kvtc.evaluate.baselines import Tova
from kvtc.evaluate.multi_turn import evaluate_turns
from kvtc.evaluate.quality import evaluate_continuation
from kvtc.huggingface.continuation import prefill

N_TOKENS, TURN, N_TURNS = 150, 10, 3


@pytest.fixture(scope="module")
def model():
    return kvtc.reference_model()[0]


@pytest.fixture(scope="module")
def ids():
    drawn = torch.randint(3, 4096, (50,), generator=torch.Generator().manual_seed(1))
    return drawn.repeat(3)


def codec(ratio, window=8):
    return kvtc.Codec(kvtc.reference_calibration(), "joint", ratio=ratio, window_tokens=window)


def test_exact_codings_change_nothing(model, ids):
    (found,) = evaluate_turns(model, [ids], {"exact": codec(16, window=1000)}, TURN, N_TURNS)
    assert found.kl == pytest.approx(0, abs=1e-5)
    assert found.top1_agreement == 1
    assert found.perplexity == pytest.approx(found.perplexity_exact, rel=1e-4)
    assert found.body_ratio is None


def test_coded_once_is_what_a_continuation_measures(model, ids):
    methods = {"joint 16x": codec(16)}
    (found,) = evaluate_turns(model, [ids], methods, TURN, N_TURNS)
    (once,) = evaluate_continuation(model, ids, methods, TURN * N_TURNS)
    assert found.kl_once == pytest.approx(once.kl, rel=1e-4)
    assert found.perplexity_exact == pytest.approx(once.perplexity_exact, rel=1e-5)
    assert found.n_continuation == TURN * N_TURNS
    assert (found.n_codings, len(found.kl_by_turn)) == (N_TURNS + 1, N_TURNS)
    assert sum(found.kl_by_turn) / N_TURNS == pytest.approx(found.kl, rel=1e-5)
    # The first turn is read from the prefix coded once, whatever comes later.
    (shorter,) = evaluate_turns(model, [ids[: -TURN * (N_TURNS - 1)]], methods, TURN, 1)
    assert shorter.kl == pytest.approx(found.kl_by_turn[0], rel=1e-3)


def test_the_last_stream_is_the_cost(model, ids):
    (found,) = evaluate_turns(model, [ids, ids], {"a": codec(8)}, TURN, N_TURNS)
    assert (found.n_documents, found.n_tokens) == (2, 2 * (N_TOKENS - 1))
    info = kvtc.inspect(codec(8).encode(prefill(model, ids[:-1])))
    assert found.total_ratio == pytest.approx(info.total_ratio, rel=0.05)
    assert found.body_ratio == pytest.approx(info.body_ratio, rel=0.05)


def test_impossible_uses_are_refused(model, ids):
    with pytest.raises(InvalidArgument, match="drop tokens"):
        evaluate_turns(model, [ids], {"TOVA": Tova(share=0.5)}, TURN, N_TURNS)
    with pytest.raises(InvalidArgument, match="too short"):
        evaluate_turns(model, [ids[:30]], {}, TURN, N_TURNS)
    with pytest.raises(InvalidArgument, match="at least 1"):
        evaluate_turns(model, [ids], {}, 0, N_TURNS)
