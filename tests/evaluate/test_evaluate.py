"""Quality against the exact cache, tables and provenance, on the reference model."""

from __future__ import annotations

import json
import math
import shlex
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec

import pytest
import torch

import kvtc
from kvtc.errors import InvalidArgument, UnsupportedModel
from kvtc.evaluate.baselines import Fp8
from kvtc.evaluate.methods import KvtcMethod
from kvtc.evaluate.provenance import Provenance, save_result
from kvtc.evaluate.quality import Quality, evaluate_continuation, summarize
from kvtc.huggingface.continuation import predict, prefill
from kvtc.report.table import format_bytes, format_fields, format_ratio, format_seconds, format_table

from ..tiny_architectures import mixed_cache, mixed_calibration

N_TOKENS, N_CONTINUATION = 400, 60


@pytest.fixture(scope="module")
def model():
    return kvtc.reference_model()[0]


@pytest.fixture(scope="module")
def token_ids() -> torch.Tensor:
    """Ids that repeat, so that the predictions depend on the cache."""
    drawn = torch.randint(3, 4096, (100,), generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.tensor([0]), drawn.repeat(N_TOKENS // 100)])[:N_TOKENS]


@pytest.fixture(scope="module")
def calibration() -> kvtc.Calibration:
    return kvtc.reference_calibration()


@pytest.fixture(scope="module")
def qualities(model, token_ids, calibration) -> list[Quality]:
    codecs = {f"{ratio}": kvtc.Codec(calibration, ratio=ratio, window_tokens=16) for ratio in (4, 64)}
    return evaluate_continuation(model, token_ids, codecs, N_CONTINUATION)


def test_costs_are_those_of_the_stream(model, token_ids, calibration, qualities):
    cached = token_ids[: N_TOKENS - N_CONTINUATION - 1]
    codec = kvtc.Codec(calibration, ratio=4, window_tokens=16)
    info = kvtc.inspect(codec.encode(prefill(model, cached), cached))
    found = qualities[0]
    assert (found.name, found.n_tokens, found.body_tokens) == ("4", len(cached), len(cached) - 20)
    assert (found.body_bytes, found.total_bytes) == (info.body_bytes, info.total_bytes)
    assert (found.body_ratio, found.total_ratio) == (info.body_ratio, info.total_ratio)


def test_the_body_ratio_of_a_cache_with_windows_is_that_of_the_layers_that_are_coded():
    cache, method = mixed_cache(), KvtcMethod(kvtc.Codec(mixed_calibration(), "paper", ratio=4, window_tokens=4))
    stream = method.encode(None, cache, torch.arange(50))
    info, cost = kvtc.inspect(stream), method.measure(stream)
    assert cost.body_ratio == info.body_ratio
    assert cost.total_ratio == info.total_ratio
    assert cost.original_bytes > cost.body_original_bytes == info.body_tokens * info.groups[0].original_bytes / 50


def test_a_baseline_names_the_layer_that_is_no_full_attention():
    with pytest.raises(UnsupportedModel, match=r"shape \(1, 2, 50, 8\) of layer 0 in layer 1, found \(1, 2, 7, 4\)"):
        Fp8().encode(None, mixed_cache(), torch.arange(50))


def test_exact_perplexity_is_that_of_one_pass_over_the_whole_text(model, token_ids, qualities):
    with torch.no_grad():
        logits = model(token_ids[None]).logits[0, -N_CONTINUATION - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits, token_ids[-N_CONTINUATION:])
    assert qualities[0].n_continuation == N_CONTINUATION
    assert qualities[0].perplexity_exact == pytest.approx(math.exp(loss), rel=1e-3)


def test_more_bits_are_better(qualities):
    fine, coarse = qualities
    assert 0 <= fine.kl < coarse.kl
    assert coarse.top1_agreement <= fine.top1_agreement <= 1
    assert fine.body_ratio < coarse.body_ratio
    assert coarse.total_ratio < coarse.body_ratio


def test_exact_tokens_alone_change_nothing(model, token_ids, calibration):
    codec = kvtc.Codec(calibration, window_tokens=N_TOKENS)
    (quality,) = evaluate_continuation(model, token_ids, {"exact": codec}, N_CONTINUATION, repeats=2)
    assert quality.kl == pytest.approx(0, abs=1e-6)
    assert quality.top1_agreement == 1
    assert quality.body_ratio is None
    assert min(quality.prefill_seconds, quality.encode_seconds, quality.decode_seconds) > 0


def test_the_cache_and_the_model_are_left_as_they_were(model, token_ids, calibration):
    cache = prefill(model, token_ids[:50])
    predict(model, cache, token_ids[50:60])
    assert cache.get_seq_length() == 50
    model.train()
    try:
        evaluate_continuation(model, token_ids[:90], {"a": kvtc.Codec(calibration)}, 20)
        assert model.training
    finally:
        model.eval()


@pytest.mark.parametrize(("n_tokens", "n_continuation", "repeats"), [(10, 9, 1), (10, 0, 1), (10, 2, 0)])
def test_impossible_splits_are_refused(model, token_ids, n_tokens, n_continuation, repeats):
    with pytest.raises(InvalidArgument):
        evaluate_continuation(model, token_ids[:n_tokens], {}, n_continuation, repeats)


def test_summary_sums_costs_and_averages_predictions(qualities):
    first = qualities[0]
    second = replace(
        first,
        total_bytes=3 * first.total_bytes,
        body_bytes=2 * first.body_bytes,
        body_ratio=first.body_ratio / 2,
        n_continuation=30,
        kl=1.0,
    )
    both = summarize([first, second])
    assert both.n_documents == 2
    assert both.n_tokens == 2 * first.n_tokens
    assert both.total_ratio == pytest.approx(first.total_ratio / 2)
    assert both.body_ratio == pytest.approx(first.body_ratio / 1.5)
    assert both.kl == pytest.approx((60 * first.kl + 30) / 90)
    assert both.perplexity == pytest.approx(first.perplexity)
    assert both.encode_seconds == pytest.approx(2 * first.encode_seconds)
    assert summarize([first]) == replace(first, perplexity=pytest.approx(first.perplexity),
                                         perplexity_exact=pytest.approx(first.perplexity_exact),
                                         kl=pytest.approx(first.kl), body_ratio=pytest.approx(first.body_ratio),
                                         top1_agreement=pytest.approx(first.top1_agreement))  # fmt: skip


def test_summary_of_several_codecs_or_none_is_refused(qualities):
    for mixed in (qualities, []):
        with pytest.raises(InvalidArgument):
            summarize(mixed)


def test_table_aligns_numbers_to_the_right():
    text = format_table(["name", "ratio"], [["a", "8.5x"], ["long one", "-"], ["b", "117.0x"]], indent="  ")
    assert text.splitlines() == [
        "  name       ratio",
        "  --------  ------",
        "  a           8.5x",
        "  long one       -",
        "  b         117.0x",
    ]
    assert format_fields([("a", 1), ("long", "x y")]) == "a     1\nlong  x y"


def test_numbers_in_words():
    assert [format_bytes(n) for n in (0, 1023, 1536, 20_480, 5 << 20)] == [
        "0 bytes", "1023 bytes", "1.50 KiB", "20.0 KiB", "5.00 MiB",
    ]  # fmt: skip
    assert [format_seconds(s) for s in (0.0042, 0.042, 4.2)] == ["4.2 ms", "42 ms", "4.2 s"]
    assert [format_ratio(r) for r in (None, 17.03)] == ["-", "17.0x"]


def test_provenance_says_where_a_number_comes_from(tmp_path):
    stamp = Provenance.now()
    assert stamp.torch == torch.__version__
    assert stamp.machine in stamp.describe()
    assert "/" not in stamp.command.split()[0]
    path = save_result("speed", {"seconds": 1.5}, tmp_path / "results")
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert saved["result"] == {"seconds": 1.5}
    assert saved["provenance"]["kvtc"] == kvtc.__version__


def test_a_module_is_recorded_as_it_is_called(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/gpu/__main__.py", "--small"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", ModuleSpec("benchmarks.gpu.__main__", None))
    assert Provenance.now().command == "python -m benchmarks.gpu --small"


def test_a_recorded_command_holds_no_secrets_and_no_places(monkeypatch):
    command = [
        "/opt/x/kvtc",
        "evaluate",
        "--text",
        "/home/me/a b.txt",
        "c/d.txt",
        "--calibration=/home/me/c.safetensors",
    ]
    command += ["--model_args", "pretrained=/models/m,ratio=8", "redis://user:pass@host:1/0"]
    monkeypatch.setattr("sys.argv", command)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    assert shlex.split(Provenance.now().command) == [
        "kvtc", "evaluate", "--text", "a b.txt", "c/d.txt", "--calibration=c.safetensors", "--model_args",
        "pretrained=m,ratio=8", "redis://host:1/0",
    ]  # fmt: skip


def test_figures_that_are_not_finite_are_written_as_none(tmp_path):
    path = save_result("broken", {"kl": float("nan"), "rows": [{"perplexity": float("inf"), "n": (1, 2)}]}, tmp_path)
    assert json.loads(path.read_text())["result"] == {"kl": None, "rows": [{"perplexity": None, "n": [1, 2]}]}
