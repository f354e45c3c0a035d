"""Every kernel compiles for the GPUs that it is for, as it is launched, without a GPU."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

import kvtc
from kvtc.backends import ReferenceBackend, Target, make_backend
from kvtc.backends.interface import CodedIntegers
from kvtc.coding.joint.probability import ProbabilityTables
from kvtc.coding.paper.allocation import BitAllocation, Run
from kvtc.coding.paper.group_quantizer import SymbolType
from kvtc.coding.rope import RopeTable
from tests.builders import golden_frequencies
from tests.triton_launches import compiled, recorded

pytest.importorskip("triton")

CAPABILITIES = [80, 90, 100]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TRITON = make_backend(DEVICE, "triton")
TABLES = ProbabilityTables(golden_frequencies(), np.zeros((4, 27, 2), np.float32))
CLASSES = np.array([20, 10], np.uint8)


def launch_decoding():
    reference = ReferenceBackend(DEVICE)
    rounded = reference.round(torch.ones(2, 2, device=DEVICE), 0.5, CLASSES, TABLES)
    (written,) = reference.write_integers(rounded, [slice(0, 2)], CLASSES, TABLES)
    chunk = CodedIntegers(2, written.activities, written.symbols, written.escapes, CLASSES, TABLES, 0.5)
    TRITON.read_integers([chunk], 2)


def launch_encoding():
    coefficients = torch.ones(4, 9, device=DEVICE)
    classes = np.repeat(CLASSES, [4, 5])
    rounded = TRITON.round(coefficients, 0.3, classes, TABLES)
    TRITON.write_integers(rounded, [slice(0, 1), slice(1, 4)], classes, TABLES)


def launch_gathering():
    turn = RopeTable((1.0,) * 64).turn(torch.arange(3, device=DEVICE), 0, inverse=True)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        side = torch.zeros(2, 2, 3, 128, device=DEVICE).to(dtype)
        TRITON.gather(side, side, [turn, None])


def launch_grouping():
    kinds = list(SymbolType)
    allocation = BitAllocation(tuple(Run(12 * index, 3, 4, kind) for index, kind in enumerate(kinds)))
    coefficients = torch.ones(3, 50, device=DEVICE)
    packed = TRITON.pack_groups(coefficients, [slice(0, 1), slice(1, 3)], allocation)
    TRITON.unpack_groups(packed, [1, 2], allocation)


def launch_placing():
    turn = RopeTable((1.0,) * 64).turn(torch.arange(3, device=DEVICE), 0, inverse=False)
    for rows, dtype in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float8_e4m3fn)):
        keys = torch.zeros(3, 2, 128, dtype=rows, device=DEVICE)
        side = torch.zeros(2, 3, 128, device=DEVICE).to(dtype)
        TRITON.place(keys, keys, turn, (Target.of(side), Target.of(side)))


LAUNCHES = [launch_decoding, launch_encoding, launch_gathering, launch_grouping, launch_placing]
"""Each calls the backend so that a kernel is launched as users launch it, on as little data as does."""


@pytest.fixture(scope="module")
def launches():
    with recorded() as found:
        for launch in LAUNCHES:
            launch()
    return found


@pytest.fixture(scope="module")
def facts(launches):
    return compiled(launches, CAPABILITIES)


def test_every_kernel_compiles_for_every_gpu(launches, facts):
    assert len(facts) == len(CAPABILITIES) * len(launches)
    assert all(kernel["cubin_bytes"] > 0 for kernel in facts)


def test_no_kernel_rounds_otherwise_than_the_reference(facts):
    """Divisions are IEEE's, and no product is added to without being rounded."""
    assert [kernel for kernel in facts if kernel["approximate_divisions"] or kernel["fused"]] == []


def test_no_kernel_keeps_arrays_in_memory_of_its_own(facts):
    assert [kernel for kernel in facts if kernel["local_memory"]] == []


def test_a_warp_codes_without_shared_memory(facts):
    """All that its threads tell one another goes through registers."""
    coding = {"decode_integers", "encode_chunks", "round_tokens"}
    assert {kernel["shared_bytes"] for kernel in facts if kernel["kernel"] in coding} == {0}


def test_no_kernel_is_left_out(launches):
    """Kernels are the functions of kernel modules that no other function there calls."""
    expected = set()
    for path in (Path(kvtc.__file__).parent / "backends" / "triton").glob("*_kernels.py"):
        tree = ast.parse(path.read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        called = {
            call.func.id for call in ast.walk(tree) if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
        }
        expected |= functions - called
    assert {launch["name"] for launch in launches} == expected
