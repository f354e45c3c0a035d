"""What `doctor` says of a model: the groups of its cache, from its config alone."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidArgument
from ..layer_runs import describe_layers
from .arguments import Outcome
from .models import quiet_transformers

if TYPE_CHECKING:
    from ..huggingface.support import GroupSupport, Support


def describe_model(name: str) -> Outcome:
    """What kvtc does with the cache of a model, named as for transformers, or by its config.json."""
    from ..huggingface.support import supported

    support = supported(_config(name))
    result = asdict(support) | {
        "is_supported": support.is_supported,
        "token_bytes": support.token_bytes,
        "constant_bytes": support.constant_bytes,
    }
    return result, _describe(support)


def _config(name: str) -> Any:
    classes, path = quiet_transformers(), Path(name)
    try:
        if path.is_file():
            fields = json.loads(path.read_text())
            return classes.AutoConfig.for_model(fields.pop("model_type"), **fields)
        return classes.AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise InvalidArgument(
            f"{name} is no config that transformers reads: {type(error).__name__}: {reason}"
        ) from error


def _describe(support: Support) -> str:
    from ..report.table import format_fields, format_table

    if not support.is_supported:
        return format_fields([("model", support.model_type), ("supported", f"no: {support.stopped_by}")])
    rows = [
        [
            group.kind,
            group.part,
            describe_layers(group.layers),
            " x ".join(str(axis) for axis in group.shape if axis) or "-",
            f"{group.token_bytes:,.0f}",
            f"{group.constant_bytes:,}",
            _treatment(group, support.not_coded is None),
        ]
        for group in support.groups
    ]
    heads = ["group", "part", "layers", "shape", "bytes a token", "constant bytes", "kvtc"]
    return "\n\n".join(
        [
            format_fields(
                [
                    ("model", support.model_type),
                    ("supported", "yes"),
                    ("at a rate", "yes" if support.not_coded is None else f"no, lossless alone: {support.not_coded}"),
                    *(
                        [("rotation", f"not known, keys are coded as cached: {support.not_turned}")]
                        * bool(support.not_turned)
                    ),
                ]
            ),
            format_table(heads, rows),
        ]
    )


def _treatment(group: GroupSupport, at_a_rate: bool) -> str:
    if group.is_coded:
        return "codes it"
    if at_a_rate and group.kind == "recurrent state" and group.part != "convolution state":
        return "rounds it to 8 bits"
    return "keeps it exactly" if group.token_bytes or group.constant_bytes else "-"
