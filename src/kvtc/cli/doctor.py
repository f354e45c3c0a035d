"""The subcommand `doctor`: what this installation can do, and why it cannot do the rest. Nothing of
it needs a network.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from functools import partial
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import KvtcError, MissingDependency
from ..process.progress import task, track
from .arguments import Outcome, Subcommands
from .model_support import describe_model
from .models import quiet_transformers

if TYPE_CHECKING:
    import torch

CORE = ("kvtc", "torch", "numpy", "numba", "safetensors", "tqdm")
OPTIONAL = {
    "triton": "kernels for CUDA devices",
    "nvidia-nvcomp-cu12": "DEFLATE of streams written on CUDA devices",
    "nvidia-nvcomp-cu13": "the same with CUDA 13",
    "transformers": "calibrating models of transformers, coding their caches",
    "zstandard": "the lossless coder zstd",
    "lz4": "the lossless coder lz4",
    "redis": "stores at redis:// and rediss://",
    "obstore": "stores at s3://",
    "cryptography": "stores encrypted at rest",
    "lm_eval": "tasks of lm-evaluation-harness",
}
_TOKENS = 8


def add_subcommands(subcommands: Subcommands) -> None:
    """Add `doctor`."""
    parser = subcommands.add(doctor)
    parser.add_argument("model", nargs="?", help="a model, or its config.json: say what is done with its cache instead")


def doctor(options: argparse.Namespace) -> Outcome:
    """Say what works on this machine, and why the rest does not; or what is done with the cache of a model."""
    if options.model is not None:
        return describe_model(options.model)
    packages = [{"package": name, "version": _version(name), "for": purpose} for name, purpose in OPTIONAL.items()]
    with task("coding a cache on every device"):
        devices = _devices()
    checks = [{"what": what, **_tried(check)} for what, check in track(list(_checks().items()), "checking", "parts")]
    result = {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in (*CORE, *OPTIONAL)}},
        "packages": packages,
        "devices": devices,
        "checks": checks,
        "reference_calibration": _reference_facts(),
    }
    return result, _describe(result)


def _describe(result: dict[str, Any]) -> str:
    from ..report.table import format_fields, format_table

    facts = result["reference_calibration"]
    required = [(name, version) for name, version in result["versions"].items() if name not in OPTIONAL]
    packages = [[entry["package"], entry["version"] or "not installed", entry["for"]] for entry in result["packages"]]
    devices = [[d["device"], d["name"], d["backend"] or "-", d["reason"] or "-", _state(d)] for d in result["devices"]]
    checks = [(check["what"], _state(check)) for check in result["checks"]]
    if facts is not None:
        checks.append(("its fingerprint", f"{facts['fingerprint']}, for {', '.join(facts['profiles'])}"))
    return "\n\n".join(
        [
            format_fields([(name, version or "not installed") for name, version in required]),
            format_table(["optional package", "version", "for"], packages),
            format_table(["device", "name", "backend", "because", "a cache coded there"], devices),
            format_fields(checks),
        ]
    )


def _state(entry: dict[str, Any]) -> str:
    return "works" if entry["works"] else f"no: {entry['why_not']}"


def _devices() -> list[dict[str, Any]]:
    """The devices, the backend that `auto` takes for each and why, and whether a cache was coded
    and decoded there.
    """
    import torch

    found = [_try_device(torch.device("cpu"), platform.processor() or platform.machine())]
    if not torch.cuda.is_available():
        built = "no NVIDIA GPU is visible" if torch.version.cuda else "this torch is built without CUDA"
        why_not = f"{built}; see https://pytorch.org/get-started/locally"
        absent = {"device": "cuda", "name": "-", "backend": None, "reason": None, "works": False, "why_not": why_not}
        return [*found, absent]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        name = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, compute capability {facts.major}.{facts.minor}"
        found.append(_try_device(torch.device("cuda", index), name))
    return found


def _try_device(device: torch.device, name: str) -> dict[str, Any]:
    from ..backends import choose

    choice = choose(device)
    facts = {"device": str(device), "name": name, "backend": choice.name, "reason": choice.reason}
    return facts | _tried(partial(_code_a_cache, device))


def _code_a_cache(device: torch.device) -> None:
    """Encode a few random tokens on a device, and decode them."""
    import torch

    from .. import Codec, KVCache
    from ..reference import reference_calibration

    calibration = reference_calibration()
    geometry = calibration.geometry
    generator = torch.Generator().manual_seed(0)
    keys, values = (
        torch.randn(shape, generator=generator, dtype=torch.float32).to(device)
        for shape in geometry.side_shapes(_TOKENS)
    )
    codec = Codec(calibration, "joint", ratio=4, sink_tokens=1, window_tokens=1, device=device)
    cache = codec.decode(codec.encode(KVCache(keys, values)))
    kept = cache.keys[:, :, 0].equal(keys[:, :, 0]) and cache.values[:, :, -1].equal(values[:, :, -1])
    if not kept or not bool((cache.keys.isfinite() & cache.values.isfinite()).all()):
        raise RuntimeError("a cache does not come back as it was stored")


def _checks() -> dict[str, Callable[[], object]]:
    from ..coding.lossless import CODER_IDS
    from ..reference import reference_calibration, reference_model

    return {
        **{f"coder {name}": partial(_code_bytes, name) for name in CODER_IDS},
        "transformers caches and models": quiet_transformers,
        "stores in Redis": partial(import_module, "kvtc.store.redis_store"),
        "stores in S3": partial(import_module, "kvtc.store.object_store"),
        "encrypted stores": partial(import_module, "kvtc.store.encryption"),
        "lossless coding by nvCOMP": _check_nvcomp,
        "reference model": reference_model,
        "reference calibration": reference_calibration,
    }


def _version(package: str) -> str | None:
    if package == "kvtc":
        return __version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _tried(check: Callable[[], object]) -> dict[str, Any]:
    """Whether a check passes and, in one line, why not."""
    try:
        check()
    except Exception as error:  # noqa: BLE001  whatever is wrong is reported
        return {"works": False, "why_not": " ".join(str(error).split()) or type(error).__name__}
    return {"works": True, "why_not": None}


def _code_bytes(coder: str) -> None:
    from ..coding.lossless import compress, decompress

    if decompress(compress(bytes(1000), coder), 1000, coder) != bytes(1000):
        raise RuntimeError("it does not give back what went in")


def _check_nvcomp() -> None:
    import torch

    from ..backends.nvcomp import obstacle

    reason = obstacle(torch.device("cuda"))
    if reason is not None:
        raise MissingDependency(reason)


def _reference_facts() -> dict[str, Any] | None:
    from ..reference import reference_calibration

    try:
        calibration = reference_calibration()
    except KvtcError:
        return None
    return {"fingerprint": calibration.fingerprint.hex(), "profiles": list(calibration.profiles)}
