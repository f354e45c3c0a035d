"""The command line: every subcommand, and every way in which it may fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import kvtc
from kvtc.cache_file import load_cache, save_cache
from kvtc.cli import main
from kvtc.cli.texts import documents, token_ids_of
from kvtc.demo.run import CONVERSATION
from kvtc.errors import InvalidCache
from kvtc.huggingface.models import capture
from kvtc.reference import CALIBRATION_FILE, MODEL_DIRECTORY
from tests.builders import random_cache, relative_error
from tests.calibration.test_calibration import rewritten

ROOT = Path(__file__).parents[2]


def run(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def fails(capsys, *arguments, code: int = 1) -> str:
    """The one line that says why a command failed."""
    found, out, err = run(capsys, *arguments)
    assert found == code, err
    assert out == ""
    if code != 1:
        return err
    # Progress may have been shown before it.
    last = err.splitlines()[-1]
    assert last.startswith("kvtc: error: ")
    assert err.count("kvtc: error: ") == 1
    return last


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A directory with a text, its stream by the reference model, the cache restored from it, and another calibration."""
    directory = tmp_path_factory.mktemp("made")
    text = CONVERSATION.read_text(encoding="utf-8")
    (directory / "talk.txt").write_text(text[:1500], encoding="utf-8")
    (directory / "corpus.txt").write_text(f"{text[:2000]}\n\n\n{text[2000:4000]}\n\n\n\n\n\n", encoding="utf-8")
    reference = ["--model", "reference"]
    talk, stream = str(directory / "talk.txt"), str(directory / "talk.kvtc")
    assert main(["encode", talk, "-o", stream, *reference, "--profile", "paper", "--window-tokens", "16"]) == 0
    restored = str(directory / "talk.safetensors")
    assert main(["decode", stream, "-o", restored, *reference, "--text", talk]) == 0
    other = ["-o", str(directory / "other.safetensors"), "--rank", "100", "--tokens-per-sequence", "128"]
    assert main(["calibrate", *reference, "--text", str(directory / "corpus.txt"), *other]) == 0
    return directory


# The subcommands


def test_encode_a_text_as_the_library_does(capsys, made, tmp_path):
    output = tmp_path / "talk.kvtc"
    options = ["--model", "reference", "--ratio", 8, "--chunk-tokens", 64, "--coder", "none"]
    code, out, _ = run(capsys, "encode", made / "talk.txt", "-o", output, *options, "--json")
    result = json.loads(out)
    info = kvtc.inspect(output.read_bytes())
    assert code == 0
    assert (result["n_tokens"], result["total_bytes"]) == (info.n_tokens, output.stat().st_size)
    assert (result["body_ratio"], result["total_ratio"]) == (info.body_ratio, info.total_ratio)
    assert info.chunk_tokens == 64
    assert {section.coder for section in info.sections} == {"none"}
    assert info.has_token_digests
    assert info.profile == "joint"


def test_conditional_goes_there_and_back_with_the_model_and_the_text(capsys, made, tmp_path):
    stream, restored = tmp_path / "talk.kvtc", tmp_path / "talk.safetensors"
    chosen = ["--profile", "conditional", "--step", 0.5, "--window-tokens", 0]
    assert run(capsys, "encode", made / "talk.txt", "-o", stream, "--model", "reference", *chosen)[0] == 0
    assert kvtc.inspect(stream.read_bytes()).profile == "conditional"
    decode = ["decode", stream, "-o", restored, "--model", "reference"]
    assert run(capsys, *decode, "--text", made / "talk.txt")[0] == 0
    found, token_ids = load_cache(restored)
    exact = capture(kvtc.reference_model("bfloat16")[0], token_ids)
    assert relative_error(found.values[0], exact.values[0]) < 0.01
    assert relative_error(found.values, exact.values) < 0.2
    assert "expected" in fails(capsys, *decode, "--force")
    without = ["encode", made / "talk.safetensors", "-o", tmp_path / "b.kvtc", "--calibration", CALIBRATION_FILE]
    assert "recomputes layers of the model" in fails(capsys, *without, "--profile", "conditional")


def test_encode_a_saved_cache(capsys, made, tmp_path):
    calibration = CALIBRATION_FILE
    arguments = ["encode", made / "talk.safetensors", "-o", tmp_path / "a.kvtc", "--calibration", calibration]
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert "body_ratio" in out
    assert "total_ratio" in out
    code, out, _ = run(capsys, *arguments, "--profile", "paper", "--ratio", 8, "--force", "--json")
    assert code == 0
    assert json.loads(out)["prefill_seconds"] is None


def test_encode_to_a_fixed_size(capsys, made, tmp_path):
    sizes = set()
    for ratio in (16, 64):
        output = tmp_path / f"{ratio}.kvtc"
        options = ["--model", "reference", "--profile", "conditional", "--ratio", ratio, "--fixed-size"]
        code, out, _ = run(capsys, "encode", made / "talk.txt", "-o", output, *options, "--json")
        result = json.loads(out)
        codec = kvtc.Codec(kvtc.reference_calibration(), "conditional", ratio, fixed_size=True, model=MODEL_DIRECTORY)
        assert code == 0
        assert output.stat().st_size == codec.stream_bytes(result["n_tokens"]) == result["total_bytes"]
        assert result["padding_bytes"] == kvtc.inspect(output.read_bytes()).padding_bytes
        sizes.add(result["total_bytes"])
    assert len(sizes) == 2
    assert "padding" in run(capsys, "inspect", output)[1]


def test_measure_adds_a_curve_and_encode_goes_by_it(capsys, made, tmp_path, monkeypatch):
    monkeypatch.setattr("kvtc.huggingface.measure_quality.RATIOS", (16, 256))
    measured, output = tmp_path / "measured.safetensors", tmp_path / "talk.kvtc"
    arguments = ["measure", "--model", "reference", "--text", made / "corpus.txt", "-o", measured]
    code, out, _ = run(capsys, *arguments, "--json")
    points = json.loads(out)["quality"]["joint"]
    assert code == 0
    assert len(points) == 2
    assert "KL of conditional" in run(capsys, "inspect", measured)[1]
    encode = ["encode", made / "talk.txt", "-o", output, "--model", "reference", "--calibration", measured]
    assert run(capsys, *encode, "--profile", "joint", "--kl", points[0]["kl"])[0] == 0
    assert "outside of what was measured" in fails(capsys, *encode, "--force", "--profile", "joint", "--kl", 1e9)
    assert run(capsys, *encode, "--force", "--profile", "joint", "--kl", 1e-9)[0] == 0
    assert kvtc.inspect(output.read_bytes()).profile == "lossless"
    assert "not measured" in run(capsys, "inspect", made / "other.safetensors")[1]


def test_encode_with_a_coded_window(capsys, made, tmp_path):
    output = tmp_path / "talk.kvtc"
    options = ["--model", "reference", "--profile", "joint", "--step", 1, "--window-format", "coded"]
    assert run(capsys, "encode", made / "talk.txt", "-o", output, *options)[0] == 0
    assert kvtc.inspect(output.read_bytes()).window_format == "coded"
    assert "exact, coded" in run(capsys, "inspect", output)[1]


def test_decode_gives_back_the_cache_and_its_tokens(made):
    cache, token_ids = load_cache(made / "talk.safetensors")
    info = kvtc.inspect((made / "talk.kvtc").read_bytes())
    _, tokenizer = kvtc.reference_model()
    text = (made / "talk.txt").read_text(encoding="utf-8")
    assert token_ids.tolist() == [0, *tokenizer(text, add_special_tokens=False).input_ids]
    assert cache.n_tokens == info.n_tokens
    assert cache.dtype == torch.bfloat16
    decoded = kvtc.Codec(kvtc.reference_calibration()).decode((made / "talk.kvtc").read_bytes())
    assert torch.equal(cache.keys, decoded.keys)


def test_decode_a_prefix_elsewhere(capsys, made, tmp_path):
    output = tmp_path / "prefix.safetensors"
    options = ["--model", "reference", "--tokens", 100, "--start-position", 50]
    code, out, _ = run(capsys, "decode", made / "talk.kvtc", "-o", output, *options, "--json")
    cache, token_ids = load_cache(output)
    assert code == 0
    assert json.loads(out)["n_tokens"] == 100
    assert cache.resolved_positions().tolist() == list(range(50, 150))
    assert token_ids is None


def test_decode_a_transformers_stream(capsys, tmp_path):
    model, _ = kvtc.reference_model()
    with torch.no_grad():
        cache = model(torch.arange(3, 63)[None]).past_key_values
    codec = kvtc.Codec(kvtc.reference_calibration(), "joint", window_tokens=8)
    (tmp_path / "a.kvtc").write_bytes(codec.encode(cache))
    output = tmp_path / "a.safetensors"
    for options, positions in (([], range(60)), (["--tokens", 20, "--start-position", 7], range(7, 27))):
        code, _, _ = run(
            capsys, "decode", tmp_path / "a.kvtc", "-o", output, "--model", "reference", "--force", *options
        )
        assert code == 0
        assert load_cache(output)[0].resolved_positions().tolist() == list(positions)


def test_generate_goes_on_from_the_restored_cache(capsys, made):
    options = ["--model", "reference", "--text", made / "talk.txt", "--generate", 5]
    code, out, _ = run(capsys, "decode", made / "talk.kvtc", *options)
    assert code == 0
    assert out.strip()
    code, again, _ = run(capsys, "decode", made / "talk.kvtc", *options, "--json")
    assert json.loads(again)["continuation"].strip() == out.strip()


def test_a_model_with_states_goes_on_from_its_stream(capsys, made, tmp_path):
    hybrid = ["--model", ROOT / "reference_model" / "hybrid-6m"]
    stream, talk = tmp_path / "talk.kvtc", made / "talk.txt"
    encode = ["encode", talk, *hybrid, "--lossless", "--json"]
    code, out, _ = run(capsys, *encode, "-o", stream, "--resume-every", 256)
    whole = json.loads(out)
    assert code == 0
    assert whole["resume_points"] == [256, whole["n_tokens"]]
    rounded = json.loads(run(capsys, *encode, "-o", tmp_path / "rounded.kvtc", "--states", "int6")[1])
    assert rounded["total_bytes"] < whole["total_bytes"] / 2
    beginning, end = tmp_path / "beginning.txt", tmp_path / "end.txt"
    text = talk.read_text(encoding="utf-8")
    beginning.write_text(text[:1100], encoding="utf-8")
    end.write_text(text[:300], encoding="utf-8")
    model = transformers.AutoModelForCausalLM.from_pretrained(hybrid[1])
    tokenizer = transformers.AutoTokenizer.from_pretrained(hybrid[1])
    decode = ["decode", stream, *hybrid, "--generate", 8, "--json"]
    for file, n_tokens in ((talk, whole["n_tokens"]), (beginning, 256)):
        code, out, _ = run(capsys, *decode, "--text", file)
        assert code == 0
        assert json.loads(out)["n_tokens"] == n_tokens
        ids = token_ids_of(file, tokenizer)[None]
        cache = kvtc.prefill(model, ids[0, :n_tokens], kvtc.ResumePoints(every=256))
        expected = model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
        assert json.loads(out)["continuation"] == tokenizer.decode(expected[0, ids.shape[1] :])
    assert "expected more than 256" in fails(capsys, *decode, "--text", end)
    assert "--generate goes on from it" in fails(capsys, "decode", stream, "-o", tmp_path / "talk.safetensors")
    other = ["decode", stream, "--model", "reference", "--text", talk, "--generate", 8]
    assert "the cache of another model than reference" in fails(capsys, *other)


def test_a_lossless_stream_needs_no_calibration(capsys, made, tmp_path):
    stream, restored = tmp_path / "talk.kvtc", tmp_path / "talk.safetensors"
    assert run(capsys, "encode", made / "talk.safetensors", "-o", stream, "--lossless")[0] == 0
    assert run(capsys, "decode", stream, "-o", restored)[0] == 0
    assert torch.equal(load_cache(restored)[0].keys, load_cache(made / "talk.safetensors")[0].keys)


def test_calibrate_reads_documents_and_ranges(capsys, made, tmp_path):
    output = tmp_path / "part.safetensors"
    options = ["--model", "reference", "--text", made / "corpus.txt", made / "talk.txt", "--tokens-per-sequence", 200]
    options += ["--layers", "2:4", "--kv-heads", "0:2", "--tokens", 500, "--sink-tokens", 2]
    code, out, err = run(capsys, "calibrate", *options, "-o", output, "--json")
    result = json.loads(out)
    calibration = kvtc.load_calibration(output)
    assert code == 0
    assert "phases: reading text, key and value bases, metric, joint basis and tables" in err
    assert result["groups"][0]["geometry"] == "layers 2..3, kv heads 0..1, head_dim 32"
    assert result["fingerprint"] == calibration.fingerprint.hex()
    assert 500 <= result["info"]["n_rows"] < 700
    assert result["file_bytes"] == output.stat().st_size
    assert 3 <= result["info"]["n_sequences"] < 7
    code, out, _ = run(capsys, "calibrate", *options, "--tokens", 1200, "-o", output, "--force", "--json")
    assert 1200 <= json.loads(out)["info"]["n_rows"] < 1400
    assert [path.name for path in tmp_path.iterdir()] == ["part.safetensors"]


def test_documents_come_from_each_file_in_turn(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(f"{name}1\n\n\n{name}2\n", encoding="utf-8")
    (tmp_path / "c").write_text("c1\n\n\nc2\n\n\nc3", encoding="utf-8")
    found = list(documents([tmp_path / name for name in "abc"]))
    assert found == ["a1", "b1", "c1", "a2", "b2", "c2", "c3"]


def test_inspect_a_stream(capsys, made):
    code, out, _ = run(capsys, "inspect", made / "talk.kvtc", "--sections")
    assert code == 0
    for word in (
        "profile paper",
        "full attention, bfloat16, layers 0..11, kv heads 0..2, key_dim 32",
        "body_ratio",
        "total_ratio",
        "window",
        "rate",
        "deflate",
        "digest",
    ):
        assert word in out
    info = kvtc.inspect((made / "talk.kvtc").read_bytes())
    for options, has_sections in (([], False), (["--sections"], True)):
        result = json.loads(run(capsys, "inspect", made / "talk.kvtc", "--json", *options)[1])
        assert result["total_bytes"] == info.total_bytes
        assert [group["kind"] for group in result["groups"]] == ["full attention"]
        assert ("sections" in result) == has_sections


def test_inspect_a_calibration(capsys, made):
    code, out, _ = run(capsys, "inspect", made / "other.safetensors")
    calibration = kvtc.load_calibration(made / "other.safetensors")
    assert code == 0
    assert calibration.fingerprint.hex() in out
    assert "full attention, layers 0..11" in out
    result = json.loads(run(capsys, "inspect", made / "other.safetensors", "--json")[1])
    assert result["ranks"] == {"key": 100, "value": 100}
    assert result["explained_variance"]["key"] == pytest.approx(calibration.key.explained_variance)


def test_doctor(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert "transformers" in out
    result = json.loads(run(capsys, "doctor", "--json")[1])
    works = {check["what"]: check["works"] for check in result["checks"]}
    assert works["reference model"]
    assert works["reference calibration"]
    assert works["coder deflate"]
    assert all(check["why_not"] for check in result["checks"] if not check["works"])
    cpu = result["devices"][0]
    assert (cpu["device"], cpu["backend"], cpu["reason"]) == ("cpu", "reference", "a device of type cpu")
    assert cpu["works"]
    assert result["reference_calibration"]["fingerprint"] == kvtc.reference_calibration().fingerprint.hex()
    assert result["reference_calibration"]["fingerprint"] in out
    assert {"triton", "redis", "transformers"} <= {entry["package"] for entry in result["packages"]}


def test_doctor_says_what_a_device_ran_into(capsys, monkeypatch):
    def broken(*_):
        raise RuntimeError("the device\nhas fallen off the bus")

    monkeypatch.setattr("kvtc.codec.Codec.decode", broken)
    code, out, _ = run(capsys, "doctor", "--json")
    cpu = json.loads(out)["devices"][0]
    assert (code, cpu["works"], cpu["why_not"]) == (0, False, "the device has fallen off the bus")


def test_doctor_without_a_gpu_says_why(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    cuda = json.loads(run(capsys, "doctor", "--json")[1])["devices"][1]
    assert (cuda["device"], cuda["backend"], cuda["works"]) == ("cuda", None, False)
    assert "https://pytorch.org" in cuda["why_not"]


def test_doctor_names_what_is_missing(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setitem(sys.modules, "redis", None)
    monkeypatch.delitem(sys.modules, "kvtc.store.redis_store", raising=False)
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert 'pip install "kvtc[coders]"' in out
    assert 'pip install "kvtc[redis]"' in out


def test_demo(capsys, tmp_path, monkeypatch):
    asked = {}

    def quick(directory, ratio, say, source):  # noqa: ARG001
        asked.update(directory=directory, ratio=ratio)
        say("hello")
        return {"ratio": ratio}

    monkeypatch.setattr("kvtc.demo.run.run_demo", quick)
    assert run(capsys, "demo", "--model", "reference", "--output", tmp_path / "new", "--ratio", 32)[:2] == (
        0,
        "hello\n",
    )
    assert asked == {"directory": tmp_path / "new", "ratio": 32}
    code, out, err = run(capsys, "demo", "--model", "reference", "--output", tmp_path, "--json")
    assert (code, json.loads(out), err) == (0, {"ratio": 16}, "hello\n")
    (tmp_path / "rate_quality.svg").write_bytes(b"mine")
    assert "--force" in fails(capsys, "demo", "--output", tmp_path)
    assert run(capsys, "demo", "--model", "reference", "--output", tmp_path, "--force")[0] == 0


# What goes wrong


def test_missing_files(capsys, made, tmp_path):
    out = ["-o", tmp_path / "x"]
    gone = tmp_path / "gone.kvtc"
    for arguments in (
        ["inspect", gone],
        ["inspect", tmp_path / "gone.safetensors"],
        ["decode", gone, *out, "--model", "reference"],
        ["decode", made / "talk.kvtc", *out, "--calibration", gone],
        ["encode", gone, *out, "--model", "reference"],
        ["encode", tmp_path / "gone.safetensors", *out, "--model", "reference"],
        ["calibrate", "--model", "reference", "--text", gone, *out],
    ):
        assert "gone" in fails(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_damaged_streams(capsys, made, tmp_path):
    whole = (made / "talk.kvtc").read_bytes()
    damaged = tmp_path / "damaged.kvtc"
    decode = ["decode", damaged, "-o", tmp_path / "x.safetensors", "--model", "reference"]
    damaged.write_bytes(whole[:-1])
    fails(capsys, "inspect", damaged)
    fails(capsys, *decode)
    damaged.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "checksum" in fails(capsys, *decode)
    damaged.write_bytes(b"something else")
    assert "not a kvtc stream" in fails(capsys, "inspect", damaged)
    assert not (tmp_path / "x.safetensors").exists()


def test_wrong_calibration_and_wrong_text(capsys, made, tmp_path):
    decode = ["decode", made / "talk.kvtc", "-o", tmp_path / "x.safetensors"]
    assert "was made with calibration" in fails(capsys, *decode, "--calibration", made / "other.safetensors")
    assert "not a kvtc calibration" in fails(capsys, *decode, "--calibration", made / "talk.safetensors")
    (tmp_path / "other.txt").write_text("Something else was said. " * 100, encoding="utf-8")
    assert "token ids" in fails(capsys, *decode, "--model", "reference", "--text", tmp_path / "other.txt")


def test_outputs_are_not_overwritten(capsys, made, tmp_path):
    output = tmp_path / "mine"
    output.write_bytes(b"mine")
    encode = ["encode", made / "talk.txt", "--model", "reference", "-o", output]
    for arguments in (
        encode,
        ["decode", made / "talk.kvtc", "--model", "reference", "-o", output],
        ["calibrate", "--model", "reference", "--text", made / "corpus.txt", "-o", output],
    ):
        assert "--force" in fails(capsys, *arguments)
    assert output.read_bytes() == b"mine"
    assert run(capsys, *encode, "--force")[0] == 0
    assert output.read_bytes().startswith(b"KVTC")
    assert "does not exist" in fails(capsys, *encode[:-1], tmp_path / "no" / "x")
    assert "is a directory" in fails(capsys, *encode[:-1], tmp_path)


def test_values_that_cannot_be(capsys, made, tmp_path):
    out = ["-o", tmp_path / "x"]
    encode = ["encode", made / "talk.txt", "--model", "reference", *out]
    assert "at least 1" in fails(capsys, *encode, "--ratio", 0.5)
    assert "nowhere" in fails(capsys, *encode, "--device", "nowhere")
    assert "cannot keep to a fixed size" in fails(capsys, *encode, "--profile", "paper", "--fixed-size")
    calibrate = ["calibrate", "--model", "reference", "--text", made / "corpus.txt", *out]
    assert "nowhere" in fails(capsys, *calibrate, "--fit-device", "nowhere")
    assert "layers" in fails(capsys, *calibrate, "--layers", "4:2")
    assert "kv_heads" in fails(capsys, *calibrate, "--kv-heads", "0:9")
    assert "at least 2" in fails(capsys, *calibrate, "--tokens-per-sequence", 1)
    decode = ["decode", made / "talk.kvtc", "--model", "reference", *out]
    assert "tokens must lie in" in fails(capsys, *decode, "--tokens", 100_000)


def test_texts_and_models_that_cannot_be_read(capsys, made, tmp_path):
    out = ["-o", tmp_path / "x"]
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_bytes(b"")
    assert "not UTF-8" in fails(capsys, "encode", tmp_path / "latin.txt", "--model", "reference", *out)
    assert "no text" in fails(capsys, "encode", tmp_path / "empty.txt", "--model", "reference", *out)
    fails(capsys, "calibrate", "--model", "reference", "--text", tmp_path / "empty.txt", *out)
    assert "cannot load" in fails(capsys, "calibrate", "--model", tmp_path, "--text", made / "corpus.txt", *out)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["frobnicate"],
        ["inspect"],
        ["encode", "talk.txt", "-o", "x"],
        ["encode", "cache.safetensors", "-o", "x"],
        ["encode", "talk.txt", "-o", "x", "--model", "reference", "--ratio", "8", "--step", "0.1"],
        ["decode", "talk.kvtc", "--model", "reference"],
        ["decode", "talk.kvtc", "--model", "reference", "--generate", "5"],
        ["decode", "talk.kvtc", "--text", "talk.txt", "-o", "x", "--calibration", "c"],
        ["decode", "talk.kvtc", "--model", "reference", "--text", "t", "--generate", "5", "--tokens", "3"],
        ["decode", "talk.kvtc", "--model", "reference", "--text", "t", "--generate", "0"],
        ["calibrate", "--model", "reference", "--text", "t", "-o", "x", "--layers", "two"],
        ["encode", "talk.txt", "-o", "x", "--model", "reference", "--ratio", "8", "--kl", "0.001"],
        ["encode", "talk.txt", "-o", "x", "--model", "reference", "--lossless", "--resume-every", "0"],
    ],
)
def test_usage_errors(capsys, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "usage:" in fails(capsys, *arguments, code=2)


def test_debug_shows_the_traceback(capsys, tmp_path):
    code, _, err = run(capsys, "inspect", tmp_path / "gone", "--debug")
    assert code == 1
    assert err.startswith("Traceback")
    assert err.splitlines()[-1].startswith("kvtc: error: ")


def test_interrupt(capsys, monkeypatch, made):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("kvtc.codec.inspection.inspect", interrupt)
    assert run(capsys, "inspect", made / "talk.kvtc") == (130, "", "kvtc: interrupted\n")


def test_full_disk(capsys, made, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "x.safetensors")

    monkeypatch.setattr("kvtc.files.os.fsync", full)
    decode = ["decode", made / "talk.kvtc", "-o", tmp_path / "x.safetensors", "--model", "reference"]
    assert "No space left on device" in fails(capsys, *decode)
    assert list(tmp_path.iterdir()) == []


def test_as_a_program(made):
    """The module runs, a reader that leaves is no error, and help costs no heavy import."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "kvtc"]
    helped = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "kvtc", "--help"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert "calibrate" in helped.stdout
    assert "torch" not in helped.stderr
    piped = f"{sys.executable} -m kvtc inspect {made / 'talk.kvtc'} --sections | true"
    assert (
        subprocess.run(["bash", "-c", piped], capture_output=True, text=True, env=environment, check=True).stderr == ""
    )
    wrong = subprocess.run(
        [*command, "inspect", made / "talk.txt"], capture_output=True, text=True, env=environment, check=False
    )
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr.startswith("kvtc: error: this is not a kvtc stream")


# Cache files


def test_cache_file_round_trip(tmp_path):
    cache = random_cache(20, torch.float16, first_position=100)
    part = kvtc.KVCache(cache.keys[1:], cache.values[1:], cache.positions, (1, 2), 0, 4096)
    save_cache(tmp_path / "a.safetensors", part, torch.arange(20))
    back, token_ids = load_cache(tmp_path / "a.safetensors")
    assert torch.equal(back.keys, part.keys)
    assert torch.equal(back.values, part.values)
    assert torch.equal(back.resolved_positions(), part.resolved_positions())
    assert (back.layers, back.first_kv_head, back.rope_length) == ((1, 2), 0, 4096)
    assert token_ids.tolist() == list(range(20))


def test_cache_file_of_another_program(tmp_path):
    from safetensors.torch import save_file

    cache = random_cache(5)
    save_file(
        {"keys": cache.keys.contiguous(), "values": cache.values.contiguous(), "more": torch.zeros(1)}, tmp_path / "a"
    )
    back, token_ids = load_cache(tmp_path / "a")
    assert (back.n_tokens, back.positions, back.layers, token_ids) == (5, None, None, None)


def test_cache_files_that_hold_no_cache(tmp_path):
    from safetensors.torch import save_file

    cache = random_cache(5)
    keys, values = cache.keys.contiguous(), cache.values.contiguous()
    path = tmp_path / "a"
    for tensors, metadata in (
        ({"keys": keys}, None),
        ({"keys": keys, "values": values[:1].clone()}, None),
        ({"keys": keys, "values": values.double()}, None),
        ({"keys": keys, "values": values, "positions": torch.zeros(5)}, None),
        ({"keys": keys, "values": values, "positions": torch.zeros(5, dtype=torch.int64)}, None),
        ({"keys": keys, "values": values, "token_ids": torch.zeros(4, dtype=torch.int64)}, None),
        ({"keys": keys, "values": values}, {"layers": "many"}),
        ({"keys": keys, "values": values}, {"layers": "[-1, 0, 1]"}),
        ({"keys": keys, "values": values}, {"layers": "[0, 1, 65536]"}),
        ({"keys": keys, "values": values}, {"first_kv_head": "1_0"}),
        ({"keys": keys, "values": values}, {"first_kv_head": "[" * 100_000}),
        ({"keys": keys, "values": values}, {"rope_length": str(1 << 31)}),
        ({"keys": keys, "values": values}, {"rope_length": "9" * 5000}),
        # No value in either, and the positions of 2**40 tokens would take 8 TiB.
        (dict.fromkeys(("keys", "values"), torch.zeros(3, 0, 1 << 40, 8)), None),
    ):
        save_file(tensors, path, metadata)
        with pytest.raises(InvalidCache):
            load_cache(path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(InvalidCache):
        load_cache(path)
    with pytest.raises(InvalidCache):
        save_cache(path, cache, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(FileNotFoundError):
        load_cache(tmp_path / "gone")


# Texts longer than a model reads


@pytest.fixture(scope="module")
def long_text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("long") / "long.txt"
    path.write_text(CONVERSATION.read_text(encoding="utf-8") * 3, encoding="utf-8")
    return path


def test_a_text_longer_than_the_context_is_an_error_before_any_work(capsys, long_text, tmp_path, monkeypatch):
    _, tokenizer = kvtc.reference_model()
    n_tokens = 1 + len(tokenizer(long_text.read_text(encoding="utf-8"), add_special_tokens=False).input_ids)
    monkeypatch.setattr("kvtc.cli.encode.load_model", lambda *_: pytest.fail("a model was loaded"))
    error = fails(capsys, "encode", long_text, "--model", "reference", "-o", tmp_path / "x")
    assert f"{n_tokens:,} tokens, more than the context of reference, 4,096" in error
    assert "--truncate" in error
    assert list(tmp_path.iterdir()) == []


def test_the_beginning_of_a_long_text_can_be_encoded_and_decoded(capsys, long_text, tmp_path):
    stream, cache = tmp_path / "a.kvtc", tmp_path / "a.safetensors"
    encode = ["encode", long_text, "--model", "reference", "--truncate", "-o", stream, "--ratio", 64, "--json"]
    code, out, err = run(capsys, *encode)
    assert (code, json.loads(out)["n_tokens"]) == (0, 4096)
    assert "the first 4,096 of " in err
    assert "prefill: 4,096 tokens\n" in err
    decode = ["decode", stream, "--model", "reference", "--text", long_text]
    assert "--truncate" in fails(capsys, *decode, "-o", cache)
    code, out, _ = run(capsys, *decode, "-o", cache, "--truncate", "--json")
    assert (code, json.loads(out)["n_tokens"]) == (0, 4096)
    assert "4,101 tokens; the context" in fails(capsys, *decode, "--truncate", "--generate", 5)


def test_sequences_longer_than_the_context_are_refused(capsys, made, tmp_path):
    for subcommand in ("calibrate", "measure"):
        arguments = [subcommand, "--model", "reference", "--text", made / "corpus.txt", "-o", tmp_path / "x"]
        assert "5,000 tokens; the context" in fails(capsys, *arguments, "--tokens-per-sequence", 5000)


def test_progress_can_be_silenced(capsys, made, tmp_path):
    quiet = ["--model", "reference", "--quiet"]
    assert run(capsys, "encode", made / "talk.txt", "-o", tmp_path / "a", *quiet)[2] == ""
    assert run(capsys, "decode", tmp_path / "a", "--text", made / "talk.txt", "--generate", 3, *quiet)[2] == ""
    arguments = ["--text", made / "corpus.txt", "--profiles", "paper", "--rank", 16, "-o", tmp_path / "b"]
    assert run(capsys, "calibrate", *arguments, *quiet)[2] == ""
    assert run(capsys, "doctor", "--quiet")[2] == ""


# Files that somebody else wrote


@pytest.mark.parametrize(
    ("info", "found"),
    [
        ('{"note": "\\u001b[2Jgone\\u202e", "a\\u001b]0;title\\u0007": ["x\\ny"]}', "\\x1b[2Jgone\\u202e"),
        ("[1, 2]", None),
        ("5", None),
        ("null", None),
        ("[" * 100_000, None),
        ('{"a": ' * 900 + "1" + "}" * 900, None),
        ('{"seed": NaN}', None),
        ('{"seed": 1e999}', None),
        ('{"seed": ' + "1" * 5000 + "}", None),
    ],
)
def test_inspect_shows_odd_metadata_as_text_or_says_that_it_is_none(capsys, tmp_path, calibration, info, found):
    path = tmp_path / "a\x1b[7m.safetensors"
    calibration.save(path)
    rewritten(path, lambda metadata, _: metadata.update(info=info))
    if found is None:
        assert "\\x1b[7m" in fails(capsys, "inspect", path)
        return
    code, out, _ = run(capsys, "inspect", path)
    assert code == 0
    assert found in out
    assert out.replace("\n", "").isprintable()
    code, out, _ = run(capsys, "inspect", path, "--json")
    assert json.loads(out)["info"] == json.loads(info)
    assert out.replace("\n", "").isprintable()


def test_names_of_files_and_models_steer_no_terminal(capsys, made, tmp_path):
    odd = tmp_path / "x\x1b[2J\udcff.kvtc"
    assert "x\\x1b[2J\\udcff.kvtc" in fails(capsys, "inspect", odd)
    assert "\\x1b[2J" in fails(capsys, "inspect", "--odd\x1b[2J", odd, code=2)
    code, _, err = run(capsys, "inspect", odd, "--debug")
    assert code == 1
    assert err.replace("\n", "").isprintable()
    encode = ["encode", made / "talk.txt", "--model", "a\x1b[2J", "-o", tmp_path / "y"]
    assert "\\x1b[2J" in fails(capsys, *encode, "--calibration", CALIBRATION_FILE)
    code, out, _ = run(capsys, "encode", made / "talk.txt", "--model", "reference", "-o", odd)
    assert code == 0
    assert "x\\x1b[2J\\udcff.kvtc" in out


def test_outputs_are_files(capsys, made, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    encode = ["encode", made / "talk.txt", "--model", "reference", "--force", "-o"]
    assert "no file that could be replaced" in fails(capsys, *encode, tmp_path / "pipe")
    assert "no file that could be replaced" in fails(capsys, *encode, "/dev/null")
