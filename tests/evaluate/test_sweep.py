"""`kvtc evaluate`: what it measures is what the library measures, written in the schema, for any model."""

from __future__ import annotations

import gzip
import json
from dataclasses import fields

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvtc
from kvtc.cli import main
from kvtc.demo.run import CONVERSATION
from kvtc.errors import InvalidArgument
from kvtc.evaluate import schema
from kvtc.evaluate.quality import evaluate_continuation, summarize
from kvtc.evaluate.sweep import Methods, Sweep, Tasks, Texts, methods_of, run_sweep, stretches
from kvtc.report.sections import render_text, sections_of

TEXT = CONVERSATION.read_text(encoding="utf-8")
SMALL = ["--tokens", "180", "--continuation", "30", "--texts-per-file", "2", "--ratios", "16", "--profiles", "joint"]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "talk.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def swept(text_file, tmp_path_factory):
    """one run of the subcommand with everything in it."""
    directory = tmp_path_factory.mktemp("swept")
    published = directory / "kv-retrieval-4_keys.jsonl.gz"
    pairs = [[f"key-{n}", f"value-{n}"] for n in range(4)]
    with gzip.open(published, "wt", encoding="utf-8") as file:
        file.write(json.dumps({"ordered_kv_records": pairs, "key": "key-1", "value": "value-1"}) + "\n")
    options = ["--window", "0", "16", "--turns", "10x2", "--baselines", "KIVI", "--evict", "2", "--bits-per-byte", "1"]
    tasks = ["--tasks", "needle", "copy", "--contexts", "260", "--n-contexts", "1", "--n-questions", "2"]
    output = directory / "all.json"
    published_option = ["--key-value-retrieval", str(published)]
    arguments = ["evaluate", "--text", str(text_file), *SMALL, *options, *tasks, *published_option, "-o", str(output)]
    assert main(arguments) == 0
    return schema.read_result(output).result


def test_every_method_is_measured_in_every_window(swept):
    names = ["KIVI 4-bit", "KIVI 2-bit", "TOVA 1/2 + joint 16x", "joint 16x"]
    for window in (0, 16):
        assert [q["name"] for q in swept["qualities"] if q["window_tokens"] == window] == names
        scored = [s for s in swept["scores"] if s["window_tokens"] == window and s["task"] == "copy"]
        assert [s["codec"] for s in scored] == ["exact cache", *names]
    assert {s["task"] for s in swept["scores"]} == {"needle", "copy", "kv-retrieval-4_keys"}


def test_records_have_the_fields_that_are_documented(swept):
    assert swept["kind"] == schema.EVALUATION
    assert (swept["model"], swept["n_layers"], swept["cache_dtype"]) == ("reference", 12, "bfloat16")
    for name, record in (
        ("qualities", schema.QualityRecord),
        ("scores", schema.ScoreRecord),
        ("turns", schema.TurnRecord),
    ):
        assert {field.name for field in fields(record)} == set(swept[name][0])
    assert 0 < swept["bits_per_byte"]["talk"] < 8
    assert {figure["series"] for figure in swept["fewer_bytes"]} == {"joint"}
    assert {figure["task"] for figure in swept["within_a_point"]} >= {"copy", "mean of tasks"}


def test_turns_shrink_the_window_and_leave_evicting_methods_out(swept):
    assert [turn["name"] for turn in swept["turns"]] == ["KIVI 4-bit", "KIVI 2-bit", "joint 16x"] * 2
    assert [turn["window_tokens"] for turn in swept["turns"]] == [0] * 3 + [6] * 3
    assert {turn["n_codings"] for turn in swept["turns"]} == {3}


def test_the_subcommand_measures_what_the_library_measures(swept, text_file):
    model, tokenizer = kvtc.reference_model(dtype="bfloat16")
    codecs = {"joint 16x": kvtc.Codec(kvtc.reference_calibration(), "joint", ratio=16, window_tokens=16)}
    texts = stretches(tokenizer, Texts(n_tokens=180, per_file=2), [text_file])
    found = summarize([evaluate_continuation(model, ids, codecs, 30)[0] for ids in texts])
    (measured,) = [q for q in swept["qualities"] if q["window_tokens"] == 16 and q["name"] == "joint 16x"]
    assert measured["total_bytes"] == found.total_bytes
    assert measured["kl"] == pytest.approx(found.kl, rel=1e-4)


def test_progress_and_result_go_apart(text_file, capsys):
    assert main(["evaluate", "--text", str(text_file), *SMALL, "--json"]) == 0
    out, err = capsys.readouterr()
    stamped = json.loads(out)
    assert stamped["schema"] == 1
    assert "provenance" in stamped
    assert len(stamped["result"]["qualities"]) == 1
    assert "quality: window 128, 2 texts of 180 tokens: 2 caches\n" in err
    assert main(["evaluate", "--text", str(text_file), *SMALL, "--json", "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_the_exact_cache_alone_needs_no_calibration(text_file, capsys, tmp_path):
    model, tokenizer = kvtc.reference_model()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=4096
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    other = ["evaluate", "--model", str(tmp_path / "other"), "--text", str(text_file)]
    options = [
        "--exact-only",
        "--tasks-only",
        "--tasks",
        "copy",
        "--contexts",
        "260",
        "--n-contexts",
        "1",
        "--n-questions",
        "1",
    ]
    assert main([*other, *options]) == 0
    assert "exact cache" in capsys.readouterr().out
    assert main(other) == 2
    assert "--calibration is required" in capsys.readouterr().err
    del model


def test_a_model_of_ones_own_is_calibrated_and_measured_in_one_command(text_file, capsys, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=4096
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "own")
    kvtc.reference_model()[1].save_pretrained(tmp_path / "own")
    calibration = tmp_path / "own.safetensors"
    made = ["--calibration", str(calibration), "--calibrate-on", str(text_file)]
    small = ["--tokens", "180", "--continuation", "30", "--texts-per-file", "3", "--window", "0", "--json"]
    command = ["evaluate", str(tmp_path / "own"), "--text", str(text_file), *made, *small]
    assert main([*command, "--ratios", "4", "16", "--baselines", "FP8", "NVFP4", "INT4"]) == 0
    first = json.loads(capsys.readouterr().out)["result"]
    names = ["FP8", "NVFP4", "INT4"]
    names += [f"{name} {ratio}x" for name in ("paper", "joint", "conditional") for ratio in (4, 16)]
    assert [record["name"] for record in first["qualities"]] == names
    assert all(len(record["kl_by_text"]) == len(record["body_bytes_by_text"]) == 3 for record in first["qualities"])
    assert first["model"] == "own"
    # The second time the calibration is there, and is taken as it is.
    before = calibration.read_bytes()
    assert main([*command, "--ratios", "16", "--profiles", "joint"]) == 0
    assert calibration.read_bytes() == before


def test_a_ratio_that_cannot_be_reached_is_left_out_and_listed(text_file, capsys):
    options = ["--profiles", "paper", "--ratios", "16", "1024", "--window", "0"]
    assert main(["evaluate", "--text", str(text_file), *SMALL[:6], *options, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["result"]
    assert [record["name"] for record in result["qualities"]] == ["paper 16x"]
    (missing,) = result["not_reached"]
    assert (missing["name"], missing["window_tokens"]) == ("paper 1024x", 0)
    assert "too few" in missing["why"]
    shown = render_text(sections_of(schema.ResultFile("x", {}, result)))
    assert "paper 1024x" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--baselines", "gzip"], "unknown baselines: gzip"),
        (["--baselines", "CacheGen"], "CacheGen needs text"),
        (["--tasks", "chess"], "unknown tasks: chess"),
        (["--tokens", "4096"], "expected 4096"),
        (["--tokens", "900000"], "900,000 tokens; the context of reference is 4,096"),
        (["--tasks", "--contexts", "1024", "5000"], "5,000 tokens; the context of reference is 4,096"),
        (["-o", "result.txt"], "must end in .json"),
        (["--text", "no such file"], "No such file"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(text_file, capsys, options, message):
    assert main(["evaluate", "--text", str(text_file), *SMALL, *options]) == 1
    err = capsys.readouterr().err
    assert message in err.splitlines()[-1]


@pytest.mark.parametrize("turns", ["16", "0x3", "ax3", "16x"])
def test_turns_are_written_tokens_x_turns(text_file, capsys, turns):
    assert main(["evaluate", "--text", str(text_file), "--turns", turns]) == 2
    assert "TxN" in capsys.readouterr().err


def test_all_baselines_are_known_by_series():
    calibration = kvtc.reference_calibration()
    every = methods_of(calibration, Methods(profiles=(), baselines=None), 128)
    some = methods_of(calibration, Methods(profiles=(), baselines=("H2O", "GEAR (rank 1)")), 128)
    assert set(some) < set(every)
    assert {name[:3] for name in some} == {"H2O", "GEA"}
    assert "GEAR 2-bit" not in some
    assert [name for name in every if "zstd" in name or "lossless" in name][-1] == "kvtc lossless"
    variants = methods_of(calibration, Methods(profiles=(), baselines=("GEAR",)), 128)
    assert {"GEAR 2-bit", "GEAR (rank 1) 2-bit"} <= set(variants)


def test_a_sweep_of_nothing_is_a_result_too():
    model, tokenizer = kvtc.reference_model()
    found = run_sweep(model, tokenizer, None, Sweep(), model_name="m")
    assert found == {"kind": "evaluation", "model": "m", "n_layers": 12, "cache_dtype": "float32"}


def test_texts_may_be_too_short(tmp_path):
    (tmp_path / "a.txt").write_text("a few words", encoding="utf-8")
    tokenizer = kvtc.reference_model()[1]
    with pytest.raises(InvalidArgument, match=r"a\.txt: stretch 1 of 4"):
        list(stretches(tokenizer, Texts(), [tmp_path / "a.txt"]))


def test_settings_have_the_papers_defaults():
    assert (Methods().windows, Texts().n_tokens, Tasks().names) == ((128,), 1792, ())
