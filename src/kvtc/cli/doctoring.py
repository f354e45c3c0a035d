"""The verb `doctor`: what this installation can do, found by trying it. Nothing is downloaded, and nothing is fatal."""

from __future__ import annotations

import argparse
import importlib
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from .arguments import Outcome, add_verb, quiet_transformers

if TYPE_CHECKING:
    import torch

PACKAGES = (
    "torch",
    "numpy",
    "numba",
    "triton",
    "safetensors",
    "tqdm",
    "transformers",
    "zstandard",
    "lz4",
    "matplotlib",
)
STORE_PACKAGES = ("redis", "obstore", "cryptography")
CODED_TOKENS = 12
"""Of the cache that is coded on every device."""


@dataclass(frozen=True)
class Check:
    """Something that works or does not. purpose: what it is for. run: raises where it does not work; may give a description."""

    what: str
    purpose: str
    run: Callable[[], str | None]

    def outcome(self) -> dict[str, Any]:
        """Whether it works, and what was found or why not, in one line."""
        found, why_not = None, None
        try:
            found = self.run()
        except Exception as error:  # noqa: BLE001  a doctor reports whatever is wrong
            why_not = " ".join(str(error).split()) or type(error).__name__
        works = why_not is None
        return {"what": self.what, "purpose": self.purpose, "works": works, "found": found, "why_not": why_not}


def add_verbs(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add `doctor`."""
    add_verb(verbs, common, "doctor", doctor, "say what works on this machine, and why the rest does not")


def doctor(options: argparse.Namespace) -> Outcome:  # noqa: ARG001  every verb is called alike
    """`kvtc doctor`: everything is tried, nothing is fatal."""
    from ..evaluate.table import format_fields

    versions = {
        "python": platform.python_version(),
        **{name: _version(name) for name in ("kvtc", *PACKAGES, *STORE_PACKAGES)},
    }
    devices = _devices()
    found = [check.outcome() for check in _checks()]
    blocks = [
        format_fields([(name, version or "not installed") for name, version in versions.items()]),
        format_fields([(f"device {device['device']}", _describe_device(device)) for device in devices]),
        format_fields([(str(entry["what"]), _describe_check(entry)) for entry in found]),
    ]
    return {"versions": versions, "devices": devices, "checks": found}, "\n\n".join(blocks)


def _describe_check(entry: dict[str, Any]) -> str:
    if not entry["works"]:
        return f"no: {entry['why_not']} ({entry['purpose']})"
    return f"works: {entry['found'] or entry['purpose']}"


def _describe_device(entry: dict[str, Any]) -> str:
    if entry["backend"] is None:
        return f"no: {entry['why_not']}"
    state = "works" if entry["works"] else f"fails: {entry['why_not']}"
    return f"{state}: {entry['name']}; backend {entry['backend']} ({entry['reason']})"


def _devices() -> list[dict[str, Any]]:
    """Each device of torch: its name, the backend that `auto` chooses there and why, and whether a cache can be coded with it."""
    import torch

    from ..backends import choose

    names = {"cpu": platform.processor() or platform.machine()}
    names |= {f"cuda:{index}": torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    found = []
    for device, name in names.items():
        choice = choose(torch.device(device))
        tried = Check(device, "", partial(_code_a_cache, torch.device(device))).outcome()
        found.append({"device": device, "name": name, "backend": choice.name, "reason": choice.reason,
                      "works": tried["works"], "why_not": tried["why_not"]})  # fmt: skip
    if len(names) == 1:
        built = "no NVIDIA GPU is visible" if torch.version.cuda else "this torch is built without CUDA"
        why_not = f"{built}; see https://pytorch.org/get-started/locally"
        found.append(
            {"device": "cuda", "name": None, "backend": None, "reason": None, "works": False, "why_not": why_not}
        )
    return found


def _code_a_cache(device: torch.device) -> None:
    """A small cache through the codec and back."""
    import torch

    from ..cache import KVCache
    from ..codec import Codec
    from ..reference import reference_calibration

    calibration = reference_calibration()
    geometry = calibration.geometry
    shape = (2, geometry.n_layers, geometry.n_kv_heads, CODED_TOKENS, geometry.head_dim)
    keys, values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    codec = Codec(calibration, "joint", sink_tokens=0, window_tokens=0, device=device)
    restored = codec.decode_neutral(codec.encode(KVCache(keys, values)))
    if restored.keys.shape != keys.shape or not bool(restored.keys.isfinite().all()):
        raise RuntimeError("a cache does not come back from the codec")


def _checks() -> list[Check]:
    from ..coding.lossless import CODER_IDS

    def store(module: str) -> Callable[[], None]:
        return lambda: _imports(f"kvtc.store.{module}")

    return [
        *(Check(f"coder {name}", "lossless coding of sections", partial(_check_coder, name)) for name in CODER_IDS),
        Check("transformers caches and models", "generate with coded caches, calibrate a model", _check_transformers),
        Check("pictures of the demo", "plots of kvtc demo and of benchmarks", _check_matplotlib),
        Check("stores in Redis", "caches at redis:// and rediss://", store("redis_store")),
        Check("stores in S3", "caches at s3://", store("object_store")),
        Check("encrypted stores", "AES-GCM for stores at rest", store("encryption")),
        Check("nvCOMP", "a rival that the benchmark of GPUs measures; coding does not need it", _check_nvcomp),
        Check("reference model", "demo and figures, nothing downloaded", _check_reference_model),
        Check("reference calibration", "coding caches of the reference model", _check_reference_calibration),
    ]


def _version(package: str) -> str | None:
    from importlib import metadata

    from .. import __version__

    if package == "kvtc":
        return __version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _imports(module: str) -> None:
    importlib.import_module(module)


def _check_coder(name: str) -> None:
    from ..coding.lossless import compress, decompress

    if decompress(compress(bytes(1000), name), 1000, name) != bytes(1000):
        raise RuntimeError("it does not give back what went in")


def _check_transformers() -> None:
    from ..integrations.rope_discovery import require_transformers

    require_transformers()


def _check_matplotlib() -> None:
    from ..evaluate.plots import require_matplotlib

    require_matplotlib()


def _check_nvcomp() -> None:
    from ..errors import MissingDependency

    try:
        importlib.import_module("nvidia.nvcomp")
    except ImportError as error:
        raise MissingDependency("it is not installed; pip install nvidia-nvcomp-cu12") from error


def _check_reference_model() -> str:
    from ..errors import MissingDependency
    from ..reference import MODEL_NAME, reference_model

    try:
        quiet_transformers()
    except ImportError as error:
        raise MissingDependency('it needs transformers; pip install "kvtc[hf]"') from error
    model, _ = reference_model()
    return f"{MODEL_NAME}, {sum(part.numel() for part in model.parameters()):,} parameters"


def _check_reference_calibration() -> str:
    from ..reference import reference_calibration

    calibration = reference_calibration()
    return f"fingerprint {calibration.fingerprint.hex()}, {calibration.geometry.describe()}; {', '.join(calibration.profiles)}"
