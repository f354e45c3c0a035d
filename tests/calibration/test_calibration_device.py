"""Where a calibration is fitted: what is large runs on the device that was asked for, and nothing there grows with the rows."""

from __future__ import annotations

import pytest
import torch

from kvtc.cache import CacheGeometry
from kvtc.calibration import Calibration, principal
from kvtc.calibration.joint_fit import fit_joint, joint_rows
from kvtc.calibration.row_spool import RowSpool
from kvtc.coding.joint.metric import Metric
from kvtc.coding.rope import NO_ROTATION, Rope
from kvtc.errors import InvalidArgument
from tests.builders import (
    fit_caches,
    same_bits,
    tiny_geometry,
    tiny_gradients,
    told_cache,
    told_ids,
    told_model,
)
from tests.pretended_device import DEVICE, PretendedDevice

N_TOKENS = 2000
ENOUGH = 5
"""Caches."""


def fitted(device: str | torch.device, n_caches: int = ENOUGH) -> Calibration:
    """For all profiles, by the steps that a large model takes."""
    return fit_caches(
        tiny_geometry(),
        (told_cache(N_TOKENS, seed=seed) for seed in range(n_caches)),
        sink_tokens=0,
        rank=10,
        joint_rank=12,
        sample=tiny_gradients(),
        token_ids=(told_ids(N_TOKENS, seed) for seed in range(n_caches)),
        model=told_model(),
        device=device,
    )


def tensors_of(calibration: Calibration) -> dict[str, torch.Tensor]:
    found = dict(calibration._coding_tensors())
    for name, kind in (("key", calibration.key), ("value", calibration.value)):
        found |= {f"{name}.mean": kind.basis.mean, f"{name}.vectors": kind.basis.vectors}
        found |= {f"{name}.spectrum": kind.basis.spectrum, f"{name}.energy": torch.from_numpy(kind.distortion.energy)}
    return found


@pytest.fixture(autouse=True)
def as_a_large_model(monkeypatch):
    monkeypatch.setattr(principal, "EXACT_FEATURES", 0)
    monkeypatch.setattr(principal, "OVERSAMPLING", 4)
    monkeypatch.setattr("kvtc.calibration.row_spool.BLOCK_VALUES", 900 * tiny_geometry().row_features)


@pytest.fixture
def in_small_blocks(monkeypatch):
    """Of 64 rows, the fewest there are."""
    monkeypatch.setattr("kvtc.calibration.row_spool.BLOCK_VALUES", 1)


def test_the_fit_runs_on_the_device_and_finds_the_same():
    with PretendedDevice() as device:
        found = fitted(DEVICE)
    expected = fitted("cpu")
    assert {"linalg_qr", "_linalg_eigh", "_linalg_solve_ex", "addmm_", "addmm", "bmm"} <= device.operations
    for name, tensor in tensors_of(found).items():
        assert tensor.device.type == "cpu", name
        assert same_bits(tensor, tensors_of(expected)[name]), name


@pytest.mark.usefixtures("in_small_blocks")
def test_nothing_on_the_device_is_as_large_as_the_rows_or_a_covariance():
    with PretendedDevice() as device:
        fitted(DEVICE, n_caches=1)
    features = 2 * tiny_geometry().row_features
    assert device.largest == 64 * features < features**2


@pytest.mark.usefixtures("in_small_blocks")
def test_memory_on_the_device_is_what_is_said_of_it():
    """16 P l + 36 l^2 bytes and some blocks: a covariance of the 3840 features would take 14 times as much."""
    layers, heads, dim, n_rows, rank = 15, 4, 32, 400, 60
    geometry = CacheGeometry(tuple(range(layers)), 0, heads, dim, Rope((), (NO_ROTATION,) * layers))
    half, features = geometry.row_features, 2 * geometry.row_features
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(n_rows, 40, generator=generator) @ torch.randn(40, features, generator=generator)
    factors = torch.randn(2, layers, heads, dim, 2 * dim, generator=generator)
    metric = Metric.from_sensitivity(*(factors @ factors.mT), power=0.75, ridge=0.01)
    with (
        PretendedDevice() as device,
        RowSpool(half, n_rows, 0, None, DEVICE) as keys,
        RowSpool(half, n_rows, 0, None, DEVICE) as values,
    ):
        values.append(rows[:, half:], keys.append(rows[:, :half]))
        fit_joint(lambda: joint_rows(keys, values), n_rows, keys.device, metric, None, rank, 0, "joint")
    width, block, roots = rank + 4, 64 * features * 4, features * dim * 4
    said = 16 * features * width + 36 * width**2
    assert said / 2 < device.most_bytes < said + 5 * block + 2 * roots < features**2


def test_what_is_forgotten_on_the_cpu_shows():
    with PretendedDevice():
        there = torch.ones(3, 3, device=DEVICE)
        with pytest.raises(RuntimeError, match="two devices"):
            there @ torch.ones(3, 3)
        with pytest.raises((RuntimeError, TypeError)):
            there.numpy()
        assert torch.equal((there @ there).cpu(), torch.full((3, 3), 3.0))


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(InvalidArgument, match="device cuda:99 cannot be used"):
        fitted("cuda:99")
