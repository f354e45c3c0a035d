"""Where a calibration is fitted: what is large runs on the device that was asked for, and nothing there grows with the rows."""

from __future__ import annotations

import pytest
import torch

from kvtc.cache import CacheGeometry
from kvtc.calibration import Calibration, moments
from kvtc.calibration.joint_fit import fit_joint
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


@pytest.fixture
def as_a_large_model(monkeypatch):
    """So many features that their products are sketched."""
    monkeypatch.setattr(moments, "EXACT_FEATURES", 0)
    monkeypatch.setattr(moments, "OVERSAMPLING", 4)


@pytest.mark.usefixtures("as_a_large_model")
def test_the_fit_of_a_large_model_runs_on_the_device_and_finds_the_same():
    with PretendedDevice() as device:
        found = fitted(DEVICE)
    expected = fitted("cpu")
    assert {"linalg_qr", "_linalg_svd", "_linalg_solve_ex", "addmm_"} <= device.operations
    for name, tensor in tensors_of(found).items():
        assert tensor.device.type == "cpu", name
        assert same_bits(tensor, tensors_of(expected)[name]), name


def test_the_fit_of_a_small_model_runs_on_the_device_and_finds_the_same():
    with PretendedDevice() as device:
        found = fitted(DEVICE)
    expected = fitted("cpu")
    assert {"_linalg_eigh", "_linalg_solve_ex", "mm"} <= device.operations
    for name, tensor in tensors_of(found).items():
        assert tensor.device.type == "cpu", name
        assert same_bits(tensor, tensors_of(expected)[name]), name


@pytest.mark.usefixtures("as_a_large_model")
def test_memory_on_the_device_is_what_is_said_of_it(monkeypatch):
    """8 P l bytes are held, and at most 20 P l + 16 l^2 more: a covariance of the 3840 features takes far more."""
    monkeypatch.setattr(moments, "_ROWS_AT_ONCE", 64)
    layers, heads, dim, n_rows, rank = 15, 4, 32, 400, 60
    geometry = CacheGeometry(tuple(range(layers)), 0, heads, dim, dim, Rope((), (NO_ROTATION,) * layers))
    features = geometry.joint_features
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(n_rows, 40, generator=generator) @ torch.randn(40, features, generator=generator)
    factors = torch.randn(2, layers, heads, dim, 2 * dim, generator=generator)
    metric = Metric.from_sensitivity(*(factors @ factors.mT), power=0.75, ridge=0.01)
    with PretendedDevice() as device:
        gathered = moments.Moments(features, 0, rank, 0, DEVICE)
        for part in drawn.split(64):
            gathered.add(part)
        fit_joint(gathered.covariance(), drawn, metric, None, rank)
    width, rows, roots = rank + 4, 64 * features * 4, features * dim * 4
    said = 28 * features * width + 16 * width**2
    assert said / 3 < device.most_bytes < said + 6 * rows + 2 * roots < 4 * features**2


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
