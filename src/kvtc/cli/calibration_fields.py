"""What a calibration holds and is worth, as fields that several subcommands show."""

from __future__ import annotations

from ..calibration import Calibration, KindCalibration
from ..report.table import format_bytes


def describe_basis(kind: KindCalibration) -> str:
    """Size and worth of a basis."""
    return f"{kind.basis.rank:,} coefficients explain {kind.explained_variance:.2%} of the variance"


def joint_fields(calibration: Calibration) -> list[tuple[str, object]]:
    """What a calibration has for the profiles `joint` and `conditional`, in words."""
    joint = calibration.joint
    if joint is None:
        return [("joint basis", "none: this calibration serves the profile paper alone")]
    fields: list[tuple[str, object]] = [
        ("joint rank", f"{joint.basis.rank:,} coefficients of keys and values together")
    ]
    fields += [(f"joint {name}", f"{n:,} numbers, {format_bytes(size)}") for name, (n, size) in joint.parts.items()]
    if joint.tokens is not None:
        for name, shares in zip(("keys", "values"), joint.tokens.explained.T.tolist(), strict=True):
            by_layer = " ".join(f"{share:.2f}" for share in shares)
            fields.append((f"predicted {name}", f"share of variance by layer: {by_layer}"))
    return fields


def quality_of(calibration: Calibration) -> dict[str, list[dict[str, float]]]:
    """The measured quality of each profile: step and KL, for JSON."""
    return {
        profile: [{"step": step, "kl": kl} for step, kl in zip(curve.steps.tolist(), curve.kl.tolist(), strict=True)]
        for profile, curve in calibration.quality.items()
    }


def quality_fields(calibration: Calibration) -> list[tuple[str, object]]:
    """The same in words."""
    return [
        (
            f"KL of {profile}",
            f"{curve.kl[0]:.2g} to {curve.kl[-1]:.2g} nats at steps of {curve.steps[0]:.3g} to {curve.steps[-1]:.3g}",
        )
        for profile, curve in calibration.quality.items()
    ] or [("KL", "not measured: kvtc measure adds it")]
