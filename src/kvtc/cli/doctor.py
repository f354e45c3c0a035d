"""The subcommand `doctor`: what this installation can do, and why it cannot do the rest. Nothing of
it needs a network.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ..process.progress import task, track
from .arguments import Outcome, Subcommands
from .models import quiet_transformers

if TYPE_CHECKING:
    import torch

CORE = ("torch", "numpy", "numba", "safetensors", "tqdm")
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


@dataclass(frozen=True)
class DeviceReport:
    """A device, the backend that `auto` takes for it and why; why_not: what a cache coded and
    decoded there ran into.
    """

    device: str
    name: str
    backend: str | None
    reason: str | None
    why_not: str | None


def add_subcommands(subcommands: Subcommands) -> None:
    """Add `doctor`."""
    subcommands.add(doctor)


def doctor(options: argparse.Namespace) -> Outcome:  # noqa: ARG001  every subcommand is called alike
    """Say what works on this machine, and why the rest does not."""
    versions = {"python": platform.python_version(), "kvtc": _version("kvtc"), **{p: _version(p) for p in CORE}}
    packages = [{"package": p, "version": _version(p), "for": purpose} for p, purpose in OPTIONAL.items()]
    with task("coding a cache on every device"):
        devices = _devices()
    checks = [
        {"what": what, "why_not": _reason(check)} for what, check in track(list(_checks().items()), "checking", "parts")
    ]
    result = {
        "versions": versions | {str(entry["package"]): entry["version"] for entry in packages},
        "packages": packages,
        "devices": [{**asdict(device), "works": device.why_not is None} for device in devices],
        "checks": [{**entry, "works": entry["why_not"] is None} for entry in checks],
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
    return "works" if entry["why_not"] is None else f"no: {entry['why_not']}"


def _devices() -> list[DeviceReport]:
    import torch

    processor = platform.processor() or platform.machine()
    found = [_device_report(torch.device("cpu"), processor)]
    if not torch.cuda.is_available():
        built = "no NVIDIA GPU is visible" if torch.version.cuda else "this torch is built without CUDA"
        return [*found, DeviceReport("cuda", "-", None, None, f"{built}; see https://pytorch.org/get-started/locally")]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        name = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, compute capability {facts.major}.{facts.minor}"
        found.append(_device_report(torch.device("cuda", index), name))
    return found


def _device_report(device: torch.device, name: str) -> DeviceReport:
    from ..backends import choose

    choice = choose(device)
    return DeviceReport(str(device), name, choice.name, choice.reason, _reason(partial(_code_a_cache, device)))


def _code_a_cache(device: torch.device) -> None:
    """Encode a few random tokens on a device, and decode them."""
    import torch

    from .. import Codec, KVCache
    from ..reference import reference_calibration

    calibration = reference_calibration()
    geometry = calibration.geometry
    shape = (geometry.n_layers, geometry.n_kv_heads, _TOKENS, geometry.head_dim)
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(shape, generator=generator, dtype=torch.float32).to(device) for _ in range(2))
    codec = Codec(calibration, "joint", ratio=4, sink_tokens=1, window_tokens=1, device=device)
    cache = codec.decode(codec.encode(KVCache(keys, values)))
    kept = cache.keys[:, :, 0].equal(keys[:, :, 0]) and cache.values[:, :, -1].equal(values[:, :, -1])
    if not kept or not bool((cache.keys.isfinite() & cache.values.isfinite()).all()):
        raise RuntimeError("a cache does not come back as it was stored")


def _checks() -> dict[str, Callable[[], object]]:
    return {
        **{f"coder {name}": check for name, check in _coder_checks().items()},
        "transformers caches and models": _check_transformers,
        "stores in Redis": _check_redis,
        "stores in S3": _check_s3,
        "encrypted stores": _check_encryption,
        "lossless coding by nvCOMP": _check_nvcomp,
        "reference model": _check_reference_model,
        "reference calibration": _check_reference_calibration,
    }


def _version(package: str) -> str | None:
    from importlib import metadata

    from .. import __version__

    if package == "kvtc":
        return __version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _reason(check: Callable[[], object]) -> str | None:
    """Why a check fails, in one line; None if it passes."""
    try:
        check()
    except Exception as error:  # noqa: BLE001  whatever is wrong is reported
        return " ".join(str(error).split()) or type(error).__name__
    return None


def _coder_checks() -> dict[str, Callable[[], object]]:
    from ..coding.lossless import CODER_IDS, compress, decompress

    def round_trip(name: str) -> None:
        if decompress(compress(bytes(1000), name), 1000, name) != bytes(1000):
            raise RuntimeError("it does not give back what went in")

    return {name: partial(round_trip, name) for name in CODER_IDS}


def _check_redis() -> None:
    import kvtc.store.redis_store  # noqa: F401


def _check_s3() -> None:
    import kvtc.store.object_store  # noqa: F401


def _check_encryption() -> None:
    import kvtc.store.encryption  # noqa: F401


def _check_transformers() -> None:
    from ..huggingface.rope_discovery import require_transformers

    require_transformers()


def _check_nvcomp() -> None:
    import torch

    from ..backends.nvcomp import obstacle
    from ..errors import MissingDependency

    reason = obstacle(torch.device("cuda"))
    if reason is not None:
        raise MissingDependency(reason)


def _check_reference_model() -> None:
    from ..errors import MissingDependency
    from ..reference import reference_model

    try:
        quiet_transformers()
    except ImportError as error:
        raise MissingDependency('it needs transformers; pip install "kvtc[hf]"') from error
    reference_model()


def _check_reference_calibration() -> None:
    from ..reference import reference_calibration

    reference_calibration()


def _reference_facts() -> dict[str, Any] | None:
    """The fingerprint of the calibration that ships, and its profiles; None where it cannot be
    read.
    """
    from ..reference import reference_calibration

    if _reason(reference_calibration) is not None:
        return None
    calibration = reference_calibration()
    return {"fingerprint": calibration.fingerprint.hex(), "profiles": list(calibration.profiles)}
