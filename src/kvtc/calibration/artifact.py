"""The calibration and its file: bases, measured distortion and geometry, named by a fingerprint.

The file is safetensors with JSON metadata (docs/calibration.md). Nothing in it is code, and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..cache import CacheGeometry
from ..coding.distortion import SYMBOL_TYPES, DistortionTable
from ..coding.rope import Rope
from ..coding.transform import Basis
from ..errors import CorruptCalibration, KvtcError, UnsupportedVersion
from ..files import write_atomically
from ..torch_state import neutral_torch_state
from .joint import JointCalibration, expect
from .quality import QualityCurve

CALIBRATION_VERSION = 1
FINGERPRINT_BYTES = 16
MAX_GROUP_SIZE = 0xFFFF
KINDS = ("key", "value")
PROFILES_WITH_STEP = ("joint", "conditional")


@dataclass(frozen=True, eq=False)
class KindCalibration:
    """What is calibrated for keys, or for values: the basis, the distortion table, the variance of all features summed."""

    basis: Basis
    distortion: DistortionTable
    total_variance: float

    @property
    def explained_variance(self) -> float:
        """Share of the calibration rows' variance that the basis can express, 0 .. 1."""
        return float(self.basis.spectrum.double().sum()) / self.total_variance if self.total_variance else 1.0


@dataclass(frozen=True, eq=False)
class Calibration:
    """Everything the codec knows of a model. key, value: for the profile `paper`; joint: for `joint` and `conditional`.

    quality: what steps do to the model's predictions, by profile, where that was measured. `info` says what it was made from. Both
    play no part in coding.
    """

    geometry: CacheGeometry
    key: KindCalibration
    value: KindCalibration
    info: dict[str, Any] = field(default_factory=dict)
    joint: JointCalibration | None = None
    quality: Mapping[str, QualityCurve] = field(default_factory=dict)

    @cached_property
    @neutral_torch_state
    def fingerprint(self) -> bytes:
        """First 16 bytes of the SHA-256 of all that decoding depends on: geometry, rotation, means, bases, tables."""
        digest = hashlib.sha256(json.dumps(_geometry_json(self.geometry), sort_keys=True).encode())
        for kind in (self.key, self.value):
            for tensor in (kind.basis.mean, kind.basis.vectors):
                digest.update(tensor.cpu().contiguous().numpy().tobytes())
        for name, tensor in self.joint.tensors() if self.joint else ():
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.digest()[:FINGERPRINT_BYTES]

    @property
    def profiles(self) -> tuple[str, ...]:
        """The profiles it serves; a later one codes closer than those before it."""
        if self.joint is None:
            return ("paper",)
        return ("paper", "joint") if self.joint.tokens is None else ("paper", "joint", "conditional")

    @property
    def n_parameters(self) -> int:
        """Numbers in all that coding needs (means, bases, prediction), to compare with the model's parameters."""
        paper = sum(kind.basis.mean.numel() + kind.basis.vectors.numel() for kind in (self.key, self.value))
        return paper + (sum(tensor.numel() for _, tensor in self.joint.tensors()) if self.joint else 0)

    @neutral_torch_state
    def save(self, path: str | Path) -> None:
        """Write the file; a reader never sees half of it."""
        metadata = {
            "format": "kvtc calibration",
            "version": str(CALIBRATION_VERSION),
            "fingerprint": self.fingerprint.hex(),
            "geometry": json.dumps(_geometry_json(self.geometry)),
            "total_variance": json.dumps([self.key.total_variance, self.value.total_variance]),
            "block_sizes": json.dumps(self.key.distortion.sizes),
            "info": json.dumps(self.info),
        }
        tensors: dict[str, Tensor] = {}
        for name, kind in zip(KINDS, (self.key, self.value), strict=True):
            tensors[f"{name}.mean"] = kind.basis.mean
            tensors[f"{name}.vectors"] = kind.basis.vectors
            tensors[f"{name}.spectrum"] = kind.basis.spectrum
            tensors[f"{name}.energy"] = torch.from_numpy(kind.distortion.energy)
            tensors[f"{name}.errors"] = torch.from_numpy(kind.distortion.errors)
        tensors.update(self.joint.tensors() if self.joint else ())
        tensors.update({f"quality.{profile}": curve.tensor() for profile, curve in self.quality.items()})
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        data = safetensors.torch.save(tensors, {**metadata, "checksum": _checksum(metadata, tensors)})
        write_atomically(path, data)


@neutral_torch_state
def load_calibration(path: str | Path) -> Calibration:
    """Read a calibration file.

    Raises FileNotFoundError, `CorruptCalibration` (damaged, or no calibration at all) or `UnsupportedVersion`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no calibration file at {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != "kvtc calibration":
                raise CorruptCalibration(f"{path} is a safetensors file but not a kvtc calibration")
            if int(metadata["version"]) != CALIBRATION_VERSION:
                raise UnsupportedVersion(
                    f"{path} is calibration version {metadata['version']}; "
                    f"this kvtc reads version {CALIBRATION_VERSION}: upgrade kvtc"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        checksum = metadata.pop("checksum")
        if checksum != _checksum(metadata, tensors):
            raise CorruptCalibration(f"{path} is damaged: its contents do not give its checksum")
        calibration = _parse(metadata, tensors)
    except (CorruptCalibration, UnsupportedVersion):
        raise
    except (
        safetensors.SafetensorError,
        KvtcError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        OverflowError,
    ) as error:
        raise CorruptCalibration(f"{path} is not a readable calibration: {type(error).__name__}: {error}") from error
    if calibration.fingerprint.hex() != metadata.get("fingerprint"):
        raise CorruptCalibration(
            f"{path} says its fingerprint is {metadata.get('fingerprint')}, its contents give {calibration.fingerprint.hex()}"
        )
    return calibration


def _parse(metadata: dict[str, str], tensors: dict[str, Tensor]) -> Calibration:
    geometry = _geometry_from_json(json.loads(metadata["geometry"]))
    variances = json.loads(metadata["total_variance"])
    sizes = tuple(int(size) for size in json.loads(metadata["block_sizes"]))
    if not sizes or any(after <= before for before, after in pairwise((0, *sizes, MAX_GROUP_SIZE + 1))):
        raise CorruptCalibration(f"block sizes {sizes}; expected ascending ones of 1 to {MAX_GROUP_SIZE}")
    kinds = []
    for name, variance in zip(KINDS, variances, strict=True):
        basis = Basis(tensors[f"{name}.mean"], tensors[f"{name}.vectors"], tensors[f"{name}.spectrum"])
        energy, errors = tensors[f"{name}.energy"], tensors[f"{name}.errors"]
        rank = basis.spectrum.numel()
        p = geometry.row_features
        expect(f"{name}.mean", basis.mean, (p,), torch.float32)
        expect(f"{name}.vectors", basis.vectors, (p, rank), torch.float16)
        expect(f"{name}.spectrum", basis.spectrum, (rank,), torch.float32)
        expect(f"{name}.energy", energy, (rank,), torch.float32)
        expect(f"{name}.errors", errors, (len(SYMBOL_TYPES), len(sizes), rank), torch.float32)
        table = DistortionTable(np.asarray(energy), np.asarray(errors), sizes)
        kinds.append(KindCalibration(basis, table, float(variance)))
    joint = JointCalibration.from_tensors(tensors, geometry)
    names = (f"quality.{profile}" for profile in PROFILES_WITH_STEP)
    curves = {name.split(".")[1]: QualityCurve.from_tensor(name, tensors[name]) for name in names if name in tensors}
    return Calibration(geometry, kinds[0], kinds[1], json.loads(metadata["info"]), joint, curves)


def _checksum(metadata: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """SHA-256 over all metadata but itself and all tensors by name, in hex: the fingerprint covers only what decoding needs."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _geometry_json(geometry: CacheGeometry) -> dict[str, Any]:
    return {
        "first_layer": geometry.first_layer,
        "n_layers": geometry.n_layers,
        "first_kv_head": geometry.first_kv_head,
        "n_kv_heads": geometry.n_kv_heads,
        "head_dim": geometry.head_dim,
        "rope": geometry.rope.to_json(),
    }


def _geometry_from_json(fields: dict[str, Any]) -> CacheGeometry:
    names = ("first_layer", "n_layers", "first_kv_head", "n_kv_heads", "head_dim")
    first_layer, n_layers, first_kv_head, n_kv_heads, head_dim = (int(fields[name]) for name in names)
    return CacheGeometry(first_layer, n_layers, first_kv_head, n_kv_heads, head_dim, Rope.from_json(fields["rope"]))
