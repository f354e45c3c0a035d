"""The table of docs/models.md: what kvtc does with the cache of every text model that transformers ships.

    python -m benchmarks.models.support [MODEL_TYPE ...]

Without names all that transformers ships are listed. Each config class is taken with its default sizes. No weights are made or
loaded; it takes some minutes.
"""

from __future__ import annotations

import argparse
import json
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
STORED = Path(__file__).with_name("support.json")
Row = dict[str, Any]
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12], "partial_rotary_factor": 0.5}
_HUNYUAN = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [16, 16, 16, 16]}
_INDEXER = {
    "indexer_n_heads": 16,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 128,
    "indexer_budget": 2048,
    "indexer_compress_ratio": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000000.0, "partial_rotary_factor": 0.25},
}
_PUBLISHED: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "chameleon": {"vocabulary_map": {"<image>": 8711}},
    "cohere_compass": {
        "text_config": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}
    },
    "deepseek_ocr2": {
        "text_config": {
            "mlp_layer_types": ["dense"] + ["sparse"] * 11,
            "num_hidden_layers": 12,
            "num_experts_per_tok": 6,
        }
    },
    "deepseek_v2": {
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 6,
        "n_routed_experts": 64,
    },
    "diffusion_gemma": {"text_config": {"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}},
    "dots1": {
        "n_routed_experts": 128,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "head_dim": 128,
    },
    "dbrx": {"attn_config": {"rope_theta": 500000.0, "kv_n_heads": 8, "clip_qkv": 8.0}},
    "emu3": {"vocabulary_map": {"<image>": 151000, "<|extra_200|>": 151846}},
    "glm46v": {"text_config": {"rope_parameters": _SECTIONS}},
    "glm4v_moe": {"text_config": {"rope_parameters": _SECTIONS, "head_dim": 128}},
    "granitemoehybrid": {
        "layer_types": (["linear_attention"] * 5 + ["full_attention"] + ["linear_attention"] * 4) * 4,
        "num_hidden_layers": 40,
    },
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl": {"text_config": {"head_dim": 128, "rope_parameters": _HUNYUAN}},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "step3p7": {"text_config": {"sliding_window": 512}},
}
"""By name, fields of a model that was published, where a model of the default config has no attention or does not run."""
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"


def text_configs() -> dict[str, Any]:
    """A config of each text decoder, by its model type: of all models that predict text, with images or without.

    Where transformers has no class for the decoder alone, it is the config of the whole model.
    """
    found: dict[str, Any] = {}
    for name in sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}):
        try:
            whole = CONFIG_MAPPING[name](**_PUBLISHED.get(name, {}))
            config = whole.get_text_config(decoder=True)
        except Exception as error:  # noqa: BLE001  some cannot be made without arguments
            print(f"{name}: no default config: {type(error).__name__}")
            continue
        if config.is_encoder_decoder or getattr(config, "is_decoder", True) is False:
            continue
        is_alone = type(config) in transformers.AutoModel._model_mapping
        is_alone |= type(config) in transformers.AutoModelForCausalLM._model_mapping
        found.setdefault(config.model_type, config if is_alone else whole)
    return dict(sorted(found.items()))


def row_of(support: Support) -> Row:
    """What the table says of a model."""
    kept = [group for group in support.groups if group.token_bytes or group.constant_bytes]
    turned = "" if support.not_turned is None else " (keys as cached)"
    return {
        "groups": "; ".join(_group(group, turned) for group in kept),
        "kinds": sorted({group.kind for group in kept}),
        "is_coded": any(group.is_coded for group in kept),
        "token_bytes": round(support.token_bytes),
        "constant_bytes": support.constant_bytes,
        "stopped_by": _cell(support.stopped_by),
        "not_coded": _cell(support.not_coded),
    }


def _group(group: GroupSupport, turned: str) -> str:
    """turned: what is said of keys that are coded."""
    name = group.kind if group.part in ("keys and values", "recurrent state") else f"{group.kind} ({group.part})"
    listed = f"{name} x {len(group.layers)}"
    return f"**{listed}**{turned}" if group.is_coded else listed


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "/").replace("\n", " ")[:140]


def table(rows: dict[str, Row], version: str) -> str:
    """The summary and the table.

    Parameters:
        rows: by model type.
        version: of transformers.
    """
    taken = [row for row in rows.values() if not row["stopped_by"]]
    n_coded = sum(row["is_coded"] for row in taken)
    kinds = Counter(kind for row in taken for kind in row["kinds"])
    listed = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
    summary = (
        f"transformers {version}: kvtc takes the caches of {len(taken)} of the {len(rows)} text models "
        f"listed ({len(taken) / len(rows):.0%}), and codes a group of {n_coded} of them at a rate ({n_coded / len(rows):.0%}). "
        f"Models with a group of each kind: {listed}."
    )
    lines = [
        textwrap.fill(summary, 100, break_on_hyphens=False),
        "",
        "| model type | groups (bold: coded) | bytes a token | constant bytes |",
        "|---|---|---|---|",
        *(_line(name, row) for name, row in rows.items()),
        "",
    ]
    return "\n".join(lines)


def _line(name: str, row: Row) -> str:
    if row["stopped_by"]:
        return f"| `{name}` | no: {row['stopped_by']} | | |"
    return f"| `{name}` | {row['groups']} | {row['token_bytes']:,} | {row['constant_bytes']:,} |"


def with_table(page: str, stored: dict[str, Any]) -> str:
    """The text of the page with the table of what is stored."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + table(stored["rows"], stored["transformers"]) + END + rest.split(END)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="model types of text decoders")
    names = parser.parse_args().names
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    rows: dict[str, Row] = json.loads(STORED.read_text(encoding="utf-8"))["rows"] if names else {}
    for name, config in text_configs().items():
        if names and name not in names:
            continue
        rows[name] = row_of(supported(config))
        print(name, rows[name]["stopped_by"] or rows[name]["groups"], flush=True)
    stored = {"transformers": transformers.__version__, "rows": dict(sorted(rows.items()))}
    STORED.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), stored), encoding="utf-8")


if __name__ == "__main__":
    main()
