"""A calibration that was interrupted, wherever that was, goes on and ends in the same file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
import transformers
from torch import Tensor

import kvtc
from kvtc.calibration import Calibration, checkpoint
from kvtc.calibration.checkpoint import Checkpoint
from kvtc.errors import InvalidArgument
from kvtc.huggingface import calibrate as calibrate_module

N_TEXTS, TOKENS = 24, 400
PHASES = ("gathered", "key", "value", "joint", "conditional")


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    return transformers.LlamaForCausalLM(config).eval()


def texts(seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 50, (TOKENS,), generator=generator) for _ in range(N_TEXTS)]


def calibrated(directory: Path | None, sequences: list[Tensor] | None = None, **options: Any) -> Calibration:
    given = texts() if sequences is None else sequences
    return kvtc.calibrate(
        llama(), given, rank=20, joint_rank=24, checkpoint_directory=directory, progress=False, **options
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file of a calibration that was not interrupted."""
    path = tmp_path_factory.mktemp("whole") / "whole.safetensors"
    calibrated(None).save(path)
    return contents(path)


def contents(path: Path) -> str:
    """The checksum of everything in a file; safetensors writes its parts in any order."""
    with safetensors.safe_open(path, framework="pt") as file:
        return str(file.metadata()["checksum"])


class Killed(BaseException):
    """Nothing catches it."""


def killed(*_: Any) -> Any:
    raise Killed


def killed_before_quality(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A calibration that is interrupted when all is fitted."""
    with monkeypatch.context() as patched:
        patched.setattr(calibrate_module, "measure_quality", killed)
        with pytest.raises(Killed):
            calibrated(directory)


@pytest.fixture
def always_due(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN", 0.0)


@pytest.mark.usefixtures("always_due")
@pytest.mark.parametrize("stop", range(1, 8))
def test_an_interruption_after_any_file_changes_nothing(
    stop: int, whole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []
    usual = Checkpoint.save

    def save(self: Checkpoint, phase: str, tensors: dict[str, Tensor]) -> None:
        usual(self, phase, tensors)
        saved.append(phase)
        if len(saved) == stop:
            raise Killed

    monkeypatch.setattr(Checkpoint, "save", save)
    with pytest.raises(Killed):
        calibrated(tmp_path / "kept")
    assert len(saved) == stop
    monkeypatch.setattr(Checkpoint, "save", usual)
    calibrated(tmp_path / "kept").save(tmp_path / "again.safetensors")
    assert contents(tmp_path / "again.safetensors") == whole


@pytest.mark.usefixtures("always_due")
def test_an_interruption_while_quality_is_measured_changes_nothing(
    whole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_before_quality(tmp_path / "kept", monkeypatch)
    assert sorted(path.stem for path in (tmp_path / "kept").iterdir()) == sorted(PHASES)
    # Nothing is read again.
    monkeypatch.setattr(calibrate_module.Sensitivity, "capture", killed)
    calibrated(tmp_path / "kept").save(tmp_path / "again.safetensors")
    assert contents(tmp_path / "again.safetensors") == whole


@pytest.mark.usefixtures("always_due")
def test_what_is_kept_of_another_calibration_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed_before_quality(tmp_path / "kept", monkeypatch)
    with pytest.raises(InvalidArgument, match="not the one that the interrupted calibration read"):
        calibrated(tmp_path / "kept", texts(2))
    with pytest.raises(InvalidArgument, match="not the one that the interrupted calibration read"):
        calibrated(tmp_path / "kept", texts()[:5])
    other = calibrated(tmp_path / "kept", sink_tokens=5)
    assert other.fingerprint == calibrated(None, sink_tokens=5).fingerprint


def test_damaged_files_are_not_used(tmp_path: Path) -> None:
    kept = Checkpoint(tmp_path / "kept", "mine")
    kept.save("key", {"numbers": torch.arange(4)})
    found = kept.load("key")
    assert found is not None
    assert torch.equal(found["numbers"], torch.arange(4))
    assert Checkpoint(tmp_path / "kept", "yours").load("key") is None
    assert kept.load("value") is None
    path = tmp_path / "kept" / "key.safetensors"
    for data in (b"", path.read_bytes()[:-1], b"\xff" * 100):
        path.write_bytes(data)
        assert kept.load("key") is None


def test_a_directory_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgument, match="cannot keep what is done in"):
        Checkpoint(tmp_path / "file" / "kept", "mine")
    with pytest.raises(InvalidArgument, match="cannot keep what is done in"):
        Checkpoint(tmp_path / "file", "mine")


def test_a_killed_process_leaves_what_another_one_goes_on_from(whole: str, tmp_path: Path) -> None:
    """SIGKILL, in the middle of the fit, in a process of its own."""
    program = f"""
import os, signal, sys, torch
torch.set_num_threads({torch.get_num_threads()})
from pathlib import Path
from kvtc.calibration import checkpoint, fit
from tests.calibration.test_checkpoint import calibrated
checkpoint.SECONDS_BETWEEN = 0.0
fit.fit_joint = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
calibrated(Path({str(tmp_path / "kept")!r}))
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == -9
    assert sorted(path.stem for path in (tmp_path / "kept").iterdir()) == ["gathered", "key", "value"]
    calibrated(tmp_path / "kept").save(tmp_path / "again.safetensors")
    assert contents(tmp_path / "again.safetensors") == whole
