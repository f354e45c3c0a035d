"""lm-evaluation-harness runs tasks through kvtc; with enough bits every answer is the plain model's."""

from __future__ import annotations

import json
import sys

import lm_eval
import pytest
import yaml
from lm_eval.models.huggingface import HFLM

import kvtc
from kvtc.errors import InvalidArgument
from kvtc.evaluate import harness
from kvtc.evaluate.harness import KvtcLM
from kvtc.reference import MODEL_DIRECTORY

WORDS = ("river", "stone", "window", "garden", "letter", "engine", "coffee", "winter")


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    path = tmp_path_factory.mktemp("task") / "documents.jsonl"
    with path.open("w") as file:
        for index in range(6):
            story = " ".join(
                f"The {WORDS[(index + k) % 8]} stood by the {WORDS[(index * 3 + k) % 8]}." for k in range(40)
            )
            file.write(json.dumps({"story": story, "choices": [" The", " zebra"], "answer": 0}) + "\n")
    return path


def task(documents, output_type, **fields):
    return {
        "task": f"local_{output_type}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(documents)}},
        "test_split": "test",
        "output_type": output_type,
        "doc_to_text": "{{story}}",
        "target_delimiter": "",
        **fields,
    }


def tasks(documents):
    choice = task(documents, "multiple_choice", doc_to_choice="choices", doc_to_target="answer")
    generation = task(
        documents,
        "generate_until",
        doc_to_target="{{choices[0]}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
    )
    return [choice, generation]


def run(documents, model):
    return lm_eval.simple_evaluate(model=model, tasks=tasks(documents), log_samples=True, bootstrap_iters=0)


def answers(documents, **model_options):
    """Responses of every example, by task."""
    found = run(documents, KvtcLM(dtype="float32", **model_options))
    return {name: [sample["resps"] for sample in samples] for name, samples in found["samples"].items()}


def outcomes(found):
    """What each example is judged by: the choice made, or the text generated."""
    chosen = [
        [float(likelihood) for likelihood, _ in sample["filtered_resps"]]
        for sample in found["samples"]["local_multiple_choice"]
    ]
    generated = [sample["filtered_resps"] for sample in found["samples"]["local_generate_until"]]
    return [likelihoods.index(max(likelihoods)) for likelihoods in chosen], generated, chosen


@pytest.fixture(scope="module")
def plain(documents):
    """The harness's own model class on the same weights; contexts begin as those of `KvtcLM` do."""
    own = HFLM(pretrained=str(MODEL_DIRECTORY), dtype="float32", device="cpu", batch_size=1, add_bos_token=True)
    return run(documents, own)


def test_without_codec_every_answer_is_that_of_the_harness_own_model(documents, plain):
    found = run(documents, KvtcLM(codec="none", dtype="float32"))
    for mine, theirs in zip(outcomes(found)[:2], outcomes(plain)[:2], strict=True):
        assert mine == theirs
        assert len(mine) == 6
    for mine, theirs in zip(outcomes(found)[2], outcomes(plain)[2], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-3)
    assert found["config"]["kvtc_total_ratio"] is None


def test_with_many_bits_every_answer_is_the_plain_models(documents, plain):
    found = run(documents, KvtcLM(dtype="float32", profile="joint", ratio=4, window_tokens=0))
    assert outcomes(found)[:2] == outcomes(plain)[:2]
    # Every context went through the codec: what changed little did change.
    assert outcomes(found)[2] != outcomes(plain)[2]
    # The choices of one question share a context, and generation asks for it once more.
    assert found["config"]["kvtc_contexts"] == 12
    assert 3 < found["config"]["kvtc_total_ratio"] <= found["config"]["kvtc_body_ratio"]


def test_the_ratios_are_those_of_the_streams():
    model = KvtcLM(dtype="float32", profile="joint", ratio=8, window_tokens=16)
    context, text = "The river stood by the stone. " * 20, " The"
    asked = type("Request", (), {"args": (context, text), "arguments": (context, text)})
    model.loglikelihood([asked])
    ids = [0, *model.tokenizer.encode(context.rstrip(), add_special_tokens=False)]
    cache = harness.prefill(model.model, kvtc_ids := model.model.dummy_inputs["input_ids"].new_tensor(ids[:-1]))
    codec = kvtc.Codec(kvtc.reference_calibration(), "joint", ratio=8, window_tokens=16)
    info = kvtc.inspect(codec.encode(cache, kvtc_ids))
    assert model.get_model_info()["kvtc_total_ratio"] == pytest.approx(info.total_ratio, rel=1e-6)


def test_the_harness_command_knows_the_model(documents, tmp_path, monkeypatch, capsys):
    (choice, _) = tasks(documents)
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(choice), encoding="utf-8")
    options = ["--model", "kvtc", "--model_args", "profile=joint,ratio=8,window_tokens=0,dtype=float32"]
    local = [
        "--tasks",
        "local_multiple_choice",
        "--include_path",
        str(tmp_path),
        "--limit",
        "2",
        "--output_path",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", ["harness", *options, *local])
    harness.main()
    assert "local_multiple_choice" in capsys.readouterr().out
    (written,) = tmp_path.rglob("results_*.json")
    result = json.loads(written.read_text(encoding="utf-8"))
    assert result["results"]["local_multiple_choice"]["acc,none"] == 1.0
    assert result["config"]["kvtc_body_ratio"] > 7


def test_a_coded_context_changes_likelihoods_and_little_else(documents):
    plain = answers(documents, codec="none")["local_multiple_choice"]
    coded = answers(documents, ratio=16, window_tokens=0)["local_multiple_choice"]
    assert plain != coded
    for before, after in zip(plain, coded, strict=True):
        # The harness wraps each response; what is compared is the likelihood of the first choice.
        assert abs(float(before[0][0][0]) - float(after[0][0][0])) < 1


def test_a_model_without_calibration_is_refused():
    with pytest.raises(InvalidArgument, match="calibration=FILE"):
        KvtcLM(pretrained="somewhere")
