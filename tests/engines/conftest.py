"""What the tests of all engines have in common."""

from __future__ import annotations

import pytest

from tests.builders import joint_calibration


@pytest.fixture
def base_options(tmp_path):
    """The options that every engine needs: the calibration of a tiny model, and a directory as store."""
    joint_calibration().save(tmp_path / "tiny.safetensors")
    return {
        "kvtc.calibration": f"{tmp_path}/tiny.safetensors",
        "kvtc.store": f"file://{tmp_path}/store",
        "kvtc.identity": "tiny",
    }
