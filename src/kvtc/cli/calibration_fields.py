"""What a calibration file holds and is worth, as the subcommands that write or read one show it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..cache import CacheGeometry
from ..calibration import Calibration
from ..report.table import format_bytes

Fields = list[tuple[str, object]]


def describe_calibration(calibration: Calibration, path: Path) -> tuple[dict[str, Any], Fields]:
    """A calibration and its file, for JSON and in words."""
    sides = dict(calibration.named_sides())
    joint, n_bytes, info = calibration.joint, path.stat().st_size, calibration.info
    conditional = calibration.conditional
    result = {
        "path": str(path),
        "fingerprint": calibration.fingerprint.hex(),
        "groups": [
            {"kind": geometry.kind, "geometry": geometry.describe(), "joint_rank": rank}
            for geometry, rank in _groups(calibration)
        ],
        "joint_features": calibration.geometry.joint_features,
        "file_bytes": n_bytes,
        "n_parameters": calibration.n_parameters,
        "ranks": {name: side.basis.rank for name, side in sides.items()},
        "explained_variance": {name: side.explained_variance for name, side in sides.items()},
        "joint_rank": joint.basis.rank if joint else None,
        "quality": {
            profile: [
                {"step": step, "kl": kl} for step, kl in zip(curve.steps.tolist(), curve.kl.tolist(), strict=True)
            ]
            for profile, curve in calibration.quality.items()
        },
        "recomputed_layers": conditional.n_layers if conditional else None,
        "predicted_variance": conditional.explained.tolist() if conditional else None,
        "info": info,
    }
    fields: Fields = [
        ("calibration", calibration.fingerprint.hex()),
        *(("group", f"{geometry.kind}, {geometry.describe()}") for geometry, _ in _groups(calibration)),
    ]
    for name, side in sides.items():
        worth = f"{side.basis.rank:,} coefficients explain {side.explained_variance:.2%} of the variance"
        fields.append((f"{name} basis", worth))
    fields += _joint_fields(calibration)
    fields.append(("size", f"{format_bytes(n_bytes)}, {calibration.n_parameters:,} numbers"))
    fields += [(name.replace("_", " "), value) for name, value in info.items() if value is not None]
    return result, fields


def _groups(calibration: Calibration) -> list[tuple[CacheGeometry, int | None]]:
    """Each group that it covers, and the rank of its joint basis."""
    of_joint: list[tuple[CacheGeometry, int | None]] = [
        (group.geometry, group.joint.basis.rank) for group in calibration.groups
    ]
    return of_joint or [(calibration.geometry, None)]


def _joint_fields(calibration: Calibration) -> Fields:
    """What a calibration has for the profiles `joint` and `conditional`."""
    joint = calibration.joint
    if joint is None:
        return [("joint basis", "none: this calibration serves the profile paper alone")]
    fields: Fields = [("joint rank", f"{joint.basis.rank:,} coefficients of keys and values together")]
    conditional = calibration.conditional
    if conditional is not None:
        fields.append(("recomputed", f"the first {conditional.n_layers} layers"))
        for name, shares in zip(("keys", "values"), conditional.explained.T.tolist(), strict=True):
            by_layer = " ".join(f"{share:.2f}" for share in shares)
            fields.append((f"predicted {name}", f"share of variance by layer: {by_layer}"))
    for profile, curve in calibration.quality.items():
        measured = (
            f"{curve.kl[0]:.2g} to {curve.kl[-1]:.2g} nats at steps of {curve.steps[0]:.3g} to {curve.steps[-1]:.3g}"
        )
        fields.append((f"KL of {profile}", measured))
    if not calibration.quality:
        fields.append(("KL", "not measured: kvtc measure adds it"))
    return fields
