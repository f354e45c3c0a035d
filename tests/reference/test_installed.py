"""Finding models that do not ship with kvtc: where they are looked for, and what is said where they are not."""

from argparse import Namespace
from pathlib import Path

import pytest

from kvtc.cli.models import find_calibration, load_tokenizer
from kvtc.errors import InvalidArgument
from kvtc.installed_models import SMOLLM2, installed_model, models_directory, places_of
from kvtc.reference import CALIBRATION_FILE, MODEL_DIRECTORY


def test_the_variable_goes_before_the_cache_directory_and_that_before_the_home(monkeypatch, tmp_path):
    for name in ("KVTC_MODELS", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models_directory() == tmp_path / ".cache" / "kvtc" / "models"
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert models_directory() == Path("/cache/kvtc/models")
    monkeypatch.setenv("KVTC_MODELS", "/models")
    assert models_directory() == Path("/models")
    assert places_of(SMOLLM2).calibration == Path("/models/smollm2-135m.calibration.safetensors")


def test_a_model_that_is_not_whole_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setenv("KVTC_MODELS", str(tmp_path))
    with pytest.raises(InvalidArgument, match=r"expected config\.json in .*; `make bench-models`"):
        installed_model(SMOLLM2)
    folder = tmp_path / SMOLLM2
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).touch()
    with pytest.raises(InvalidArgument, match=r"expected model\.safetensors"):
        installed_model(SMOLLM2)
    (folder / "model.safetensors").touch()
    assert installed_model(SMOLLM2).directory == folder


def test_the_command_line_knows_it_by_name(monkeypatch, tmp_path):
    monkeypatch.setenv("KVTC_MODELS", str(tmp_path))
    with pytest.raises(InvalidArgument, match="is not installed"):
        load_tokenizer(SMOLLM2)
    # Any folder of a model stands for it here.
    (tmp_path / SMOLLM2).symlink_to(MODEL_DIRECTORY)
    assert load_tokenizer(SMOLLM2)("a").input_ids
    refused = []
    options = Namespace(model=SMOLLM2, calibration=None, usage_error=refused.append)
    find_calibration(options)
    assert refused
    places_of(SMOLLM2).calibration.symlink_to(CALIBRATION_FILE)
    assert find_calibration(options).geometry.n_layers == 12
    assert len(refused) == 1
