"""The verbs `inspect` and `doctor`."""

from __future__ import annotations

import argparse
import importlib
import platform
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import Outcome, add_verb, describe_basis, joint_fields, quiet_transformers

if TYPE_CHECKING:
    from ..inspection import StreamInfo

PACKAGES = ("torch", "numpy", "numba", "safetensors", "tqdm", "transformers", "zstandard", "lz4", "matplotlib")
STORE_PACKAGES = ("redis", "obstore", "cryptography")
STORES = {"stores in Redis": "redis_store", "stores in S3": "object_store", "encrypted stores": "encryption"}


def add_verbs(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add `inspect` and `doctor`."""
    parser = add_verb(
        verbs,
        common,
        "inspect",
        inspect_file,
        "describe a stream or a calibration file (checksums of sections are verified by decode)",
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--sections", action="store_true", help="list every section of a stream")
    add_verb(verbs, common, "doctor", doctor, "say what works on this machine, and why the rest does not")


def inspect_file(options: argparse.Namespace) -> Outcome:
    """`kvtc inspect`."""
    from ..container import MAGIC
    from ..inspection import inspect

    with options.file.open("rb") as file:
        start = file.read(len(MAGIC))
    if start != MAGIC and options.file.suffix == ".safetensors":
        return _describe_calibration(options.file)
    info = inspect(options.file.read_bytes())
    result = asdict(info)
    if not options.sections:
        del result["sections"]
    return result, _describe_stream(info, options.sections)


def doctor(options: argparse.Namespace) -> Outcome:  # noqa: ARG001  every verb is called alike
    """`kvtc doctor`: everything is tried, nothing is fatal."""
    from ..evaluate.table import format_fields

    versions = {
        "python": platform.python_version(),
        "kvtc": _version("kvtc"),
        **{p: _version(p) for p in PACKAGES + STORE_PACKAGES},
    }
    checks: list[tuple[str, Callable[[], object]]] = [
        *((f"coder {name}", check) for name, check in _coder_checks().items()),
        ("device cpu", lambda: None),
        ("device cuda", _check_cuda),
        ("transformers caches and models", _check_transformers),
        ("pictures of the demo", _check_matplotlib),
        *((name, partial(importlib.import_module, f"kvtc.store.{module}")) for name, module in STORES.items()),
        ("reference model", _check_reference_model),
        ("reference calibration", _check_reference_calibration),
    ]
    found = [{"what": what, "why_not": _reason(check)} for what, check in checks]
    result = {"versions": versions, "checks": [{**entry, "works": entry["why_not"] is None} for entry in found]}
    text = "\n\n".join(
        [
            format_fields([(name, version or "not installed") for name, version in versions.items()]),
            format_fields(
                [(str(e["what"]), "works" if e["why_not"] is None else f"no: {e['why_not']}") for e in found]
            ),
        ]
    )
    return result, text


def _describe_stream(info: StreamInfo, with_sections: bool) -> str:
    from ..evaluate.table import format_fields, format_ratio, format_table

    parts = f"{info.sink_tokens} sink, {info.body_tokens:,} body, {info.window_tokens} window"
    fields = [
        ("stream", f"format version {info.format_version}, profile {info.profile}"),
        ("tokens", f"{info.n_tokens:,}: {parts}; {info.n_chunks} chunks of at most {info.chunk_tokens}"),
        ("first position", "-" if info.first_position is None else info.first_position),
        (
            "cache",
            f"{info.dtype}, layers {_range(info.layers)}, kv heads {_range(info.kv_heads)}, head_dim {info.head_dim}",
        ),
        ("calibration", info.fingerprint),
        ("token ids", "named by a digest: decode can compare them" if info.has_token_digests else "not known"),
    ]
    stored: dict[str, tuple[int, int, int]] = {}
    for section in info.sections:
        n, raw, size = stored.get(section.kind, (0, 0, 0))
        stored[section.kind] = (n + 1, raw + section.raw_bytes, size + section.stored_bytes)
    rows = [
        [kind, n, f"{raw:,}", f"{size:,}", f"{size / info.total_bytes:.1%}"] for kind, (n, raw, size) in stored.items()
    ]
    tables = info.total_bytes - sum(size for _, _, size in stored.values())
    rows.append(["header and tables", "-", f"{tables:,}", f"{tables:,}", f"{tables / info.total_bytes:.1%}"])
    rows.append(["stream", len(info.sections), "-", f"{info.total_bytes:,}", "100.0%"])
    ratios = [
        (
            "original",
            f"{info.original_bytes:,} bytes, at {'8' if info.dtype.startswith('float8') else '16'} bits a value",
        ),
        (
            "body_ratio",
            f"{format_ratio(info.body_ratio):>6}  coded tokens against {info.body_bytes:,} bytes: all but exact tokens",
        ),
        ("total_ratio", f"{format_ratio(info.total_ratio):>6}  all tokens against {info.total_bytes:,} bytes"),
    ]
    blocks = [
        format_fields(fields),
        format_table(["sections", "number", "raw bytes", "stored bytes", "share"], rows),
        format_fields(ratios),
    ]
    if with_sections:
        every = [
            ["-" if s.chunk is None else s.chunk, s.kind, s.coder, f"{s.raw_bytes:,}", f"{s.stored_bytes:,}"]
            for s in info.sections
        ]
        blocks.append(format_table(["chunk", "section", "coder", "raw bytes", "stored bytes"], every))
    return "\n\n".join(blocks)


def _describe_calibration(path: Path) -> Outcome:
    from ..calibration import load_calibration
    from ..evaluate.table import format_bytes, format_fields

    calibration = load_calibration(path)
    kinds = {"key": calibration.key, "value": calibration.value}
    tokens = calibration.joint.tokens if calibration.joint else None
    result = {
        "path": str(path),
        "fingerprint": calibration.fingerprint.hex(),
        "geometry": calibration.geometry.describe(),
        "row_features": calibration.geometry.row_features,
        "file_bytes": path.stat().st_size,
        "n_parameters": calibration.n_parameters,
        "ranks": {name: kind.basis.rank for name, kind in kinds.items()},
        "explained_variance": {name: kind.explained_variance for name, kind in kinds.items()},
        "joint_rank": calibration.joint.basis.rank if calibration.joint else None,
        "predicted_variance": tokens.explained.tolist() if tokens else None,
        "info": calibration.info,
    }
    fields: list[tuple[str, object]] = [
        ("calibration", calibration.fingerprint.hex()),
        ("covers", calibration.geometry.describe()),
        *((f"{name} basis", describe_basis(kind)) for name, kind in kinds.items()),
        *joint_fields(calibration),
        ("size", f"{format_bytes(path.stat().st_size)}, {calibration.n_parameters:,} numbers"),
        *((name.replace("_", " "), value) for name, value in calibration.info.items() if value is not None),
    ]
    return result, format_fields(fields)


def _range(half_open: tuple[int, int]) -> str:
    return f"{half_open[0]}..{half_open[1] - 1}"


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
    except Exception as error:  # noqa: BLE001  a doctor reports whatever is wrong
        return " ".join(str(error).split()) or type(error).__name__
    return None


def _coder_checks() -> dict[str, Callable[[], object]]:
    from ..coding.lossless import CODER_IDS, compress, decompress

    def round_trip(name: str) -> None:
        if decompress(compress(bytes(1000), name), 1000, name) != bytes(1000):
            raise RuntimeError("it does not give back what went in")

    return {name: lambda name=name: round_trip(name) for name in CODER_IDS}  # type: ignore[misc]


def _check_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        built = "no NVIDIA GPU is visible" if torch.version.cuda else "this torch is built without CUDA"
        raise RuntimeError(f"{built}; see https://pytorch.org/get-started/locally")
    torch.zeros(1, device="cuda")


def _check_transformers() -> None:
    from ..integrations.rope_discovery import require_transformers

    require_transformers()


def _check_matplotlib() -> None:
    from ..evaluate.plots import require_matplotlib

    require_matplotlib()


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
