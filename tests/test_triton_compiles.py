"""Every kernel compiles for the GPUs that it is for, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .triton_kernels import KERNELS, ROOM

CAPABILITIES = ("80", "90", "100")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def facts():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.triton_kernels", *CAPABILITIES],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_every_kernel_compiles_for_every_gpu(facts):
    assert len(facts) == len(CAPABILITIES) * len(KERNELS)
    assert all(kernel["cubin_bytes"] > 0 for kernel in facts)


def test_no_kernel_rounds_otherwise_than_the_reference(facts):
    """Divisions are IEEE's, and no product is added to without being rounded."""
    assert [kernel for kernel in facts if kernel["approximate_divisions"] or kernel["fused"]] == []


def test_no_kernel_spills(facts):
    assert [kernel for kernel in facts if kernel["spills"]] == []


def test_a_warp_decodes_without_shared_memory(facts):
    """All that threads tell one another goes through registers: a step waits for nothing else."""
    decoding = [kernel for kernel in facts if kernel["kernel"].startswith("decode_integers")]
    assert len(decoding) == len(CAPABILITIES)
    assert all(kernel["shared_bytes"] == 0 for kernel in decoding)


def test_no_kernel_is_left_out():
    modules = (Path(ROOT, "src", *ROOM.split("."))).glob("*_kernels.py")
    assert {path.stem for path in modules} == {kernel.module for kernel in KERNELS}
