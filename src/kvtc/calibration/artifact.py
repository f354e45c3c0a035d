"""The calibration and its file: bases, measured distortion and geometry, named by a fingerprint.

The file is safetensors with JSON metadata (docs/calibration.md). Nothing in it is code, and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .. import strict_json
from ..cache import MAX_EXTENT, CacheGeometry
from ..coding.joint.importance import Importance
from ..coding.paper.distortion import BLOCK_SIZES, SYMBOL_TYPES, DistortionTable
from ..coding.rope import Rope
from ..coding.transform import Basis
from ..container.groups import FULL_ATTENTION, LATENT, WINDOW, Group
from ..errors import CorruptCalibration, InvalidArgument, KvtcError, UnsupportedVersion
from ..files import write_atomically
from ..process.torch_state import neutral_torch_state
from .conditional_calibration import ConditionalCalibration
from .joint_calibration import (
    LARGEST_SQUARE,
    JointCalibration,
    Named,
    expect,
    expect_basis,
    importance_of,
)
from .quality_curve import QualityCurve

CALIBRATION_VERSION = 4
FINGERPRINT_BYTES = 16
MAX_GROUP_SIZE = 0xFFFF
SIDE_NAMES = ("key", "value")
_KINDS = (FULL_ATTENTION, LATENT, WINDOW)
"""Of groups that a calibration can cover."""
PROFILES_WITH_STEP = ("joint", "conditional")
_MOST_EXPLAINED = 1.01
"""Of the total variance, for both are sums of rounded numbers."""


@dataclass(frozen=True, eq=False)
class SideCalibration:
    """What is calibrated for keys, or for values, for the profile `paper`.

    Parameters:
        basis: orthonormal directions in which the rows vary most, with mean and spectrum.
        distortion: measured error of each coefficient group at each number of bits.
        total_variance: summed variance of all features of the calibration rows.

    Example:
        >>> calibration.key.basis.vectors.shape
        torch.Size([1152, 512])
        >>> 0.9 < calibration.key.explained_variance <= 1.01
        True
    """

    basis: Basis
    distortion: DistortionTable
    total_variance: float

    @property
    def explained_variance(self) -> float:
        """Share of the calibration rows' variance that the basis can express, 0 .. 1."""
        return float(self.basis.spectrum.double().sum()) / self.total_variance if self.total_variance else 1.0

    def tensors(self, name: str) -> Named:
        """Its tensors in the calibration file.

        Parameters:
            name: "key" or "value".

        Returns:
            An iterator of (name in the file, tensor).

        Example:
            >>> [name for name, tensor in calibration.key.tensors("key")]
            ['key.mean', 'key.vectors', 'key.spectrum', 'key.energy', 'key.errors']
        """
        yield f"{name}.mean", self.basis.mean
        yield f"{name}.vectors", self.basis.vectors
        yield f"{name}.spectrum", self.basis.spectrum
        yield f"{name}.energy", torch.from_numpy(self.distortion.energy)
        yield f"{name}.errors", torch.from_numpy(self.distortion.errors)

    @classmethod
    def from_tensors(
        cls, name: str, tensors: dict[str, Tensor], sizes: tuple[int, ...], total_variance: float
    ) -> SideCalibration:
        """Inverse of `tensors`.

        Parameters:
            name: "key" or "value".
            tensors: those of the file, by name.
            sizes: of the coefficient groups whose errors were measured.
            total_variance: as the class has it.

        Returns:
            What is calibrated for this side.

        Example:
            >>> from kvtc.calibration import SideCalibration
            >>> key = calibration.key
            >>> again = SideCalibration.from_tensors("key", dict(key.tensors("key")), key.distortion.sizes, key.total_variance)
            >>> again.explained_variance == key.explained_variance
            True
        """
        basis = Basis(tensors[f"{name}.mean"], tensors[f"{name}.vectors"], tensors[f"{name}.spectrum"])
        return cls(basis, _distortion(name, tensors, sizes), total_variance)


@dataclass(frozen=True, eq=False)
class CodedGroup:
    """What `joint` knows of one group of layers. importance: of tokens; None: all of them have one step."""

    geometry: CacheGeometry
    joint: JointCalibration
    importance: Importance | None

    def tensors(self, prefix: str) -> Named:
        """Its tensors in the calibration file."""
        yield from self.joint.tensors(f"{prefix}joint")
        if self.importance is not None:
            yield f"{prefix}importance", self.importance.weights


@dataclass(frozen=True, eq=False)
class Calibration:
    """All that the codec knows of a model, made by `kvtc.calibrate` and read by `kvtc.load_calibration`.

    Parameters:
        geometry: the layers and heads of the first group that it covers, and the rotation.
        key: basis and distortion of keys, for the profile `paper`; None: it does not serve it.
        value: the same of values.
        info: what it was made from; it plays no part in coding.
        joint: for `joint`; None: it does not serve it.
        quality: by profile, what steps do to the model's predictions, if that was measured; it plays no part in
            coding.
        conditional: for `conditional`; None: it does not serve it.
        importance: of tokens, for both; None: all tokens have one step.
        further: the groups that `joint` codes beside the first one. One step does the same harm in all of them.

    Example:
        >>> calibration.profiles
        ('paper', 'joint', 'conditional')
        >>> len(calibration.fingerprint), calibration.n_parameters > 1_000_000
        (16, True)
        >>> len(calibration.groups), calibration.geometry_of(0) == calibration.geometry
        (1, True)
        >>> from kvtc.container.stream import parse_stream
        >>> calibration.number_of(parse_stream(stream).header.groups[0])
        0
    """

    geometry: CacheGeometry
    key: SideCalibration | None
    value: SideCalibration | None
    info: dict[str, Any] = field(default_factory=dict)
    joint: JointCalibration | None = None
    quality: Mapping[str, QualityCurve] = field(default_factory=dict)
    conditional: ConditionalCalibration | None = None
    importance: Importance | None = None
    further: tuple[CodedGroup, ...] = ()

    @property
    def groups(self) -> tuple[CodedGroup, ...]:
        """The groups that `joint` codes, the first one first; none where `joint` is not served."""
        if self.joint is None:
            return ()
        return CodedGroup(self.geometry, self.joint, self.importance), *self.further

    def geometry_of(self, number: int) -> CacheGeometry:
        """The geometry of a group.

        Parameters:
            number: of the group, 0 for the first.

        Returns:
            Its geometry.
        """
        return self.further[number - 1].geometry if number else self.geometry

    def of_group(self, number: int) -> Calibration:
        """The calibration of one group alone, whose layers then count as full attention.

        Parameters:
            number: of the group, 0 for the first.

        Returns:
            This calibration without the groups beside the first one, or that of another group for `joint`.

        Example:
            >>> alone = calibration.of_group(0)
            >>> alone.fingerprint == calibration.fingerprint, len(alone.groups)
            (True, 1)
        """
        if not number:
            return replace(self, further=())
        group = self.further[number - 1]
        return Calibration(
            replace(group.geometry, is_window=False),
            None,
            None,
            self.info,
            group.joint,
            {name: curve for name, curve in self.quality.items() if name == "joint"},
            importance=group.importance,
        )

    def number_of(self, group: Group) -> int | None:
        """Which of `groups` covers a group of a cache.

        Parameters:
            group: as the group table of a stream has it.

        Returns:
            Its number, 0 for the first; None: none covers it.
        """
        return next((number for number, one in enumerate(self.groups) if covers(one.geometry, group)), None)

    @cached_property
    @neutral_torch_state
    def fingerprint(self) -> bytes:
        """First 16 bytes of the SHA-256 of all that decoding depends on: geometry, rotation, means, bases, tables."""
        digest = hashlib.sha256(json.dumps(_group_json(self.geometry), sort_keys=True).encode())
        for one in self.further:
            digest.update(json.dumps(_group_json(one.geometry), sort_keys=True).encode())
        for _, side in self.named_sides():
            for tensor in (side.basis.mean, side.basis.vectors):
                digest.update(tensor.cpu().contiguous().numpy().tobytes())
        for name, tensor in self._coding_tensors():
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.digest()[:FINGERPRINT_BYTES]

    def named_sides(self) -> Iterator[tuple[str, SideCalibration]]:
        """What is calibrated for keys and for values, as (name, `SideCalibration`); nothing where the profile `paper` is
        not served.

            >>> [name for name, side in calibration.named_sides()]
            ['key', 'value']
        """
        for name, side in zip(SIDE_NAMES, (self.key, self.value), strict=True):
            if side is not None:
                yield name, side

    @property
    def sides(self) -> tuple[SideCalibration, SideCalibration]:
        """Keys and values, for the profile `paper`; `InvalidArgument` for a calibration that does not serve it.

        >>> key, value = calibration.sides
        >>> key is calibration.key, value is calibration.value
        (True, True)
        """
        if self.key is None or self.value is None:
            raise InvalidArgument(
                f"this calibration serves {', '.join(self.profiles)}, not the profile paper: calibrate for it, too"
            )
        return self.key, self.value

    @property
    def profiles(self) -> tuple[str, ...]:
        """The profiles that it serves; a later one needs fewer bytes than those before it, and more to be known."""
        served = {
            "paper": self.key is not None,
            "joint": self.joint is not None,
            "conditional": self.conditional is not None,
        }
        return tuple(name for name, is_served in served.items() if is_served)

    @property
    def n_parameters(self) -> int:
        """How many numbers coding needs (means, bases, prediction), to compare with the model's parameters."""
        paper = sum(side.basis.mean.numel() + side.basis.vectors.numel() for _, side in self.named_sides())
        return paper + sum(tensor.numel() for _, tensor in self._coding_tensors())

    def _coding_tensors(self) -> Named:
        """The tensors of `joint` and `conditional`."""
        yield from self.joint.tensors("joint") if self.joint else ()
        yield from self.conditional.tensors() if self.conditional else ()
        if self.importance is not None:
            yield "importance", self.importance.weights
        for number, one in enumerate(self.further, 1):
            yield from one.tensors(_prefix(number))

    @neutral_torch_state
    def save(self, path: str | Path) -> None:
        """Write the calibration file. A reader never sees half of it.

        Parameters:
            path: the file; one that exists is replaced.

        Raises:
            CorruptCalibration: `load_calibration` would refuse the file.
            OSError: the file cannot be written.

        Example:
            >>> calibration.save("calibration.safetensors")
            >>> kvtc.load_calibration("calibration.safetensors").fingerprint == calibration.fingerprint
            True
        """
        variances = [side.total_variance for _, side in self.named_sides()]
        sizes = self.key.distortion.sizes if self.key is not None else BLOCK_SIZES
        metadata = {
            "format": "kvtc calibration",
            "version": str(CALIBRATION_VERSION),
            "fingerprint": self.fingerprint.hex(),
            "groups": json.dumps(
                [_group_json(self.geometry) | {"total_variance": variances}]
                + [_group_json(one.geometry) for one in self.further]
            ),
            "block_sizes": json.dumps(sizes),
            "info": json.dumps(self.info),
        }
        tensors = dict(entry for name, side in self.named_sides() for entry in side.tensors(name))
        tensors.update(self._coding_tensors())
        tensors.update({f"quality.{profile}": curve.tensor() for profile, curve in self.quality.items()})
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        _parse(metadata, tensors)
        data = safetensors.torch.save(tensors, {**metadata, "checksum": _checksum(metadata, tensors)})
        write_atomically(path, data)


def covers(geometry: CacheGeometry, group: Group) -> bool:
    """Whether a group of a cache, or of a stream, is what a geometry describes."""
    shape = geometry.n_kv_heads, *geometry.dims
    found = group.kind, group.layers, group.first_kv_head, group.shape, group.has_rows
    return found == (geometry.kind, geometry.layers, geometry.first_kv_head, shape, True)


@neutral_torch_state
def load_calibration(path: str | Path) -> Calibration:
    """Read a calibration file. Its checksum is compared, and nothing in it is unpickled.

    Parameters:
        path: the file.

    Returns:
        The calibration.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptCalibration: the file is damaged or holds no calibration.
        UnsupportedVersion: the file has another version, or groups of layers that this kvtc does not read.

    Example:
        >>> calibration.save("calibration.safetensors")
        >>> kvtc.load_calibration("calibration.safetensors").geometry.n_layers
        12
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no calibration file at {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_kind(metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        checksum = metadata.pop("checksum")
        if checksum != _checksum(metadata, tensors):
            raise CorruptCalibration("damaged: its contents do not give its checksum")
        calibration = _parse(metadata, tensors)
        if calibration.fingerprint.hex() != metadata["fingerprint"]:
            raise CorruptCalibration(
                f"it says its fingerprint is {metadata['fingerprint'][:64]}, its contents give {calibration.fingerprint.hex()}"
            )
    except UnsupportedVersion as error:
        raise UnsupportedVersion(f"{path} is {error}") from error
    except KvtcError as error:
        raise CorruptCalibration(f"{path}: {error}") from error
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CorruptCalibration(f"{path} is not a readable calibration: {type(error).__name__}: {error}") from error
    return calibration


def _check_kind(metadata: Mapping[str, str]) -> None:
    """Raise `CorruptCalibration` for another kind of file, `UnsupportedVersion` for another version of this one."""
    if metadata.get("format") != "kvtc calibration":
        raise CorruptCalibration("a safetensors file, but not a kvtc calibration")
    version = strict_json.whole(strict_json.loads(metadata["version"]), "version", 1, 1 << 32)
    if version != CALIBRATION_VERSION:
        remedy = "upgrade kvtc" if version > CALIBRATION_VERSION else "calibrate again"
        raise UnsupportedVersion(
            f"a calibration of version {version}; this kvtc reads version {CALIBRATION_VERSION}: {remedy}"
        )


def _parse(metadata: Mapping[str, str], tensors: dict[str, Tensor]) -> Calibration:
    """What a file holds, every number in a range that coding can use; KeyError, ValueError or `KvtcError` where one is not."""
    read = {name: strict_json.loads(metadata[name]) for name in ("groups", "block_sizes", "info")}
    group, *others = _groups_of(strict_json.items(read["groups"], "groups"))
    geometry = _geometry_of(group)
    found = strict_json.items(read["block_sizes"], "block_sizes")
    sizes = tuple(strict_json.whole(size, "block_sizes", 1, MAX_GROUP_SIZE) for size in found)
    if not sizes or any(after <= before for before, after in pairwise(sizes)):
        raise CorruptCalibration(f"block sizes {sizes}; expected ascending ones of 1 to {MAX_GROUP_SIZE}")
    variances = strict_json.items(group["total_variance"], "total_variance")
    key, value = _sides_of(tensors, sizes, variances, geometry)
    joint = JointCalibration.from_tensors(tensors, "joint", geometry) if "joint.mean" in tensors else None
    conditional = ConditionalCalibration.from_tensors(tensors, geometry)
    names = (f"quality.{profile}" for profile in PROFILES_WITH_STEP)
    curves = {name.split(".")[1]: QualityCurve.from_tensor(name, tensors[name]) for name in names if name in tensors}
    info = strict_json.fields(read["info"], "info")
    importance = importance_of(tensors, geometry)
    if joint is None and key is None:
        raise CorruptCalibration("it serves no profile: it holds neither a joint basis nor bases of keys and values")
    if joint is None and (others or geometry.is_window):
        kinds = ", ".join(str(one["kind"]) for one in (group, *others))
        raise CorruptCalibration(
            f"groups of {kinds}, but no joint basis: joint alone codes more than one of {FULL_ATTENTION}"
        )
    further = tuple(_further_group(number, one, tensors) for number, one in enumerate(others, 1))
    return Calibration(geometry, key, value, info, joint, curves, conditional, importance, further)


def _sides_of(
    tensors: dict[str, Tensor], sizes: tuple[int, ...], variances: list[Any], geometry: CacheGeometry
) -> tuple[SideCalibration | None, SideCalibration | None]:
    """What a file holds for the profile `paper`, of keys and of values; None and None for one without."""
    if not variances and not any(f"{name}.mean" in tensors for name in SIDE_NAMES):
        return None, None
    if len(variances) != len(SIDE_NAMES):
        raise CorruptCalibration(
            f"total_variance holds {len(variances)} numbers; expected one of keys and one of values"
        )
    sides = []
    for name, given, features in zip(SIDE_NAMES, variances, geometry.side_features, strict=True):
        basis = Basis(tensors[f"{name}.mean"], tensors[f"{name}.vectors"], tensors[f"{name}.spectrum"])
        expect_basis(name, basis, features)
        variance = strict_json.number(given, "total_variance", 0, LARGEST_SQUARE * features)
        if float(basis.spectrum.double().sum()) > _MOST_EXPLAINED * variance:
            raise CorruptCalibration(f"{name}.spectrum explains more than the total variance, {variance:g}")
        sides.append(SideCalibration.from_tensors(name, tensors, sizes, variance))
    return sides[0], sides[1]


def _distortion(name: str, tensors: dict[str, Tensor], sizes: tuple[int, ...]) -> DistortionTable:
    """The table of a side: an error where a group fits between its start and the last coefficient, infinity where it does not."""
    energy, errors = tensors[f"{name}.energy"], tensors[f"{name}.errors"]
    rank = tensors[f"{name}.spectrum"].numel()
    expect(f"{name}.energy", energy, (rank,), torch.float32, 0, LARGEST_SQUARE)
    expect(f"{name}.errors", errors, (len(SYMBOL_TYPES), len(sizes), rank), torch.float32)
    for index, size in enumerate(sizes):
        fitting, others = errors[:, index, : max(0, rank - size + 1)], errors[:, index, max(0, rank - size + 1) :]
        expect(f"{name}.errors", fitting, tuple(fitting.shape), torch.float32, 0, LARGEST_SQUARE)
        if not bool((others == torch.inf).all()):
            raise CorruptCalibration(
                f"{name}.errors gives groups of {size} an error past the last of {rank} coefficients"
            )
    return DistortionTable(np.asarray(energy), np.asarray(errors), sizes)


def _checksum(metadata: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """SHA-256 over all metadata but itself and all tensors by name, in hex: the fingerprint covers only what decoding needs."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _group_json(geometry: CacheGeometry) -> dict[str, Any]:
    """The entry of a group of layers in the file, but for its variances."""
    return {
        "kind": geometry.kind,
        "layers": list(geometry.layers),
        "first_kv_head": geometry.first_kv_head,
        "n_kv_heads": geometry.n_kv_heads,
        "key_dim": geometry.key_dim,
        "value_dim": geometry.value_dim,
        "rope": geometry.rope.to_json(),
    }


def _prefix(number: int) -> str:
    """Before the names of the tensors of a group behind the first."""
    return f"group{number}."


def _groups_of(groups: list[Any]) -> list[dict[str, Any]]:
    """The entries of the groups; `UnsupportedVersion`, naming the kinds found, for others that a later kvtc may write."""
    entries = [strict_json.fields(entry, "a group") for entry in groups]
    kinds = [str(entry["kind"])[:64] for entry in entries]
    if not entries:
        raise CorruptCalibration("groups is an empty list; expected at least one group of layers")
    if not set(kinds) <= set(_KINDS) or set(kinds[1:]) - {WINDOW}:
        raise UnsupportedVersion(
            f"a calibration of {len(kinds)} groups of layers ({', '.join(sorted(set(kinds))[:8])}); this kvtc reads one "
            f"of {', '.join(_KINDS)}, and further ones of {WINDOW}: upgrade kvtc"
        )
    return entries


def _further_group(number: int, entry: dict[str, Any], tensors: dict[str, Tensor]) -> CodedGroup:
    """A group behind the first."""
    geometry, prefix = _geometry_of(entry), _prefix(number)
    joint = JointCalibration.from_tensors(tensors, f"{prefix}joint", geometry)
    return CodedGroup(geometry, joint, importance_of(tensors, geometry, f"{prefix}importance"))


def _geometry_of(group: dict[str, Any]) -> CacheGeometry:
    names = ("first_kv_head", "n_kv_heads", "key_dim", "value_dim")
    listed = strict_json.items(group["layers"], "layers")
    layers = tuple(strict_json.whole(layer, "layers", 0, MAX_EXTENT) for layer in listed)
    first_kv_head, n_kv_heads, key_dim, value_dim = (
        strict_json.whole(group[name], name, 0, MAX_EXTENT) for name in names
    )
    rope = Rope.from_json(strict_json.fields(group["rope"], "rope"))
    geometry = CacheGeometry(layers, first_kv_head, n_kv_heads, key_dim, value_dim, rope, group["kind"] == WINDOW)
    if geometry.is_window and (rope.depends_on_length or (n_kv_heads == 1 and key_dim != value_dim)):
        raise CorruptCalibration(
            f"{geometry.describe()}: expected windows of one rotation at any length, and of one width where there is one head"
        )
    return geometry
