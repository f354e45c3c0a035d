"""The table of docs/models.md: what kvtc does with the cache of every text model that transformers ships.

    python -m benchmarks.models.support [MODEL_TYPE ...]

Without names all that transformers ships are listed. Each config class is taken with its default sizes. No weights are made or
loaded; it takes some minutes.
"""

from __future__ import annotations

import argparse
import textwrap
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from kvtc.huggingface.support import GroupSupport, Support, supported

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
_LAYER_TYPES = {"granitemoehybrid": ["linear_attention"] * 5 + ["full_attention"] + ["linear_attention"] * 4}
"""Where the default config has no attention at all: the layers of a model that was published."""
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"


def text_configs() -> dict[str, Any]:
    """A config of each text decoder, by its model type: of all models that predict text, with images or without."""
    found: dict[str, Any] = {}
    for name in sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}):
        try:
            config = CONFIG_MAPPING[name]().get_text_config(decoder=True)
        except Exception as error:  # noqa: BLE001  some cannot be made without arguments
            print(f"{name}: no default config: {type(error).__name__}")
            continue
        if config.is_encoder_decoder or getattr(config, "is_decoder", True) is False:
            continue
        if config.model_type in _LAYER_TYPES:
            period = _LAYER_TYPES[config.model_type]
            config.layer_types = (period * config.num_hidden_layers)[: config.num_hidden_layers]
        found.setdefault(config.model_type, config)
    return dict(sorted(found.items()))


def row(support: Support) -> str:
    """The line of a model."""
    if not support.is_supported:
        return f"| `{support.model_type}` | no: {_cell(support.stopped_by)} | | |"
    groups = "; ".join(_group(group) for group in support.groups if group.token_bytes or group.constant_bytes)
    return f"| `{support.model_type}` | {groups} | {support.token_bytes:,.0f} | {support.constant_bytes:,} |"


def _group(group: GroupSupport) -> str:
    name = group.kind if group.part in ("keys and values", "recurrent state") else f"{group.kind} ({group.part})"
    return f"{'**' if group.is_coded else ''}{name} x {len(group.layers)}{'**' if group.is_coded else ''}"


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "/").replace("\n", " ")[:110]


def table(supports: list[Support]) -> str:
    """The summary and the table."""
    taken = [one for one in supports if one.is_supported]
    coded = [one for one in taken if any(group.is_coded for group in one.groups)]
    kinds = Counter(
        kind
        for one in taken
        for kind in {group.kind for group in one.groups if group.token_bytes or group.constant_bytes}
    )
    listed = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
    summary = (
        f"transformers {transformers.__version__}: kvtc takes the caches of {len(taken)} of the {len(supports)} text models "
        f"listed ({len(taken) / len(supports):.0%}), and codes a group of {len(coded)} of them at a rate. "
        f"Models with a group of each kind: {listed}."
    )
    lines = [
        textwrap.fill(summary, 100),
        "",
        "| model type | groups (bold: coded) | bytes a token | constant bytes |",
        "|---|---|---|---|",
        *(row(one) for one in supports),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="model types of text decoders")
    names = parser.parse_args().names
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    supports = []
    for name, config in text_configs().items():
        if names and name not in names:
            continue
        supports.append(supported(config))
        print(name, supports[-1].stopped_by or "yes", flush=True)
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    PAGE.write_text(before + BEGIN + table(supports) + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
