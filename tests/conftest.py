"""Settings of every test, and the tiny calibration that most of them share."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from kvtc.calibration import Calibration
from kvtc.process import log_limits

from .builders import tiny_calibration
from .triton_memory import only_arguments

# A slow or busy machine is no failure, so nothing here has a deadline; ci draws the same examples on every run.
settings.register_profile("dev", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("dev"), max_examples=200, derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))

torch.set_num_threads(1)
# Nothing is fetched: libraries that would ask a hub are told so before they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# Kernels are interpreted where there is no GPU. Triton reads this when it is imported, with the first kernel.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    """Not in pyproject.toml: pytest would import numba for it, before `tests` has set its threads."""
    config.addinivalue_line("filterwarnings", "ignore::numba.core.errors.NumbaDeprecationWarning")


@pytest.fixture(scope="session")
def calibration() -> Calibration:
    """3 layers, 2 heads of 8 features, rotated in halves; fitted to low-rank caches."""
    return tiny_calibration()


@pytest.fixture(autouse=True)
def forgotten_warnings(monkeypatch):
    """What another test has logged is logged again."""
    monkeypatch.setattr(log_limits, "_limits", log_limits.LogLimits())


@pytest.fixture
def guarded_kernels():
    """Kernels fail that read or write outside of the tensors they are given; where there is a GPU, nothing is looked at."""
    if torch.cuda.is_available():
        yield
    else:
        with only_arguments():
            yield


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Memory that is asked for uninitialised holds what is no result: what a kernel leaves out shows."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(77))
