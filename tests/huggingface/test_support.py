"""What kvtc says of a model from its config alone is what its codec does with the model's cache."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import kvtc
from kvtc.cli import main
from kvtc.codec.codec import Codec
from kvtc.errors import InvalidArgument, UnsupportedModel
from kvtc.huggingface.support import cache_without_weights, supported
from tests.tiny_architectures import ARCHITECTURES, random_ids, read, tiny_config, tiny_model

transformers = pytest.importorskip("transformers")

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
NAMED = {
    "gemma3_text", "gemma4_text", "gpt_oss", "llama4_text", "mimo_v2_flash", "qwen3_next", "qwen3_5_text", "nemotron_h", "lfm2",
    "granitemoehybrid", "kimi_linear", "deepseek_v3", "deepseek_v32", "deepseek_v4", "glm_moe_dsa", "mistral", "minimax_m3_vl_text",
}  # fmt: skip
"""Families that people run."""


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_the_groups_of_a_config_are_those_of_the_streams_of_its_model(name):
    model, ids = tiny_model(name), random_ids(1, 6)
    stream = Codec(lossless=True).encode(read(model, ids)[1], ids)
    found, said = kvtc.inspect(stream).groups, supported(model.config)
    assert said.stopped_by is None
    assert [(g.kind, g.part, g.layers, g.shape) for g in said.groups] == [
        (g.kind, g.part, g.layers, g.shape) for g in found
    ]


def test_bytes_of_a_cache():
    """In bfloat16: a window of 16 holds 15 tokens."""
    said = supported(tiny_config("gemma3_text"))
    assert said.not_coded is None
    full, window = said.groups
    assert (full.token_bytes, full.constant_bytes, full.is_coded) == (2 * 2 * 2 * 8 * 2, 0, True)
    assert (window.token_bytes, window.constant_bytes, window.is_coded) == (0, 15 * 4 * 2 * 2 * 8 * 2, False)
    assert (said.token_bytes, said.constant_bytes) == (128, window.constant_bytes)


def test_real_sizes_need_no_memory():
    """DeepSeek V3 has 671 thousand million parameters."""
    said = supported(transformers.DeepseekV3Config())
    assert said.token_bytes == 61 * (512 + 64) * 2
    assert "multi-head latent attention" in said.not_coded
    assert [group.kind for group in said.groups] == ["latent"]


def test_what_stops_a_model_is_said():
    said = supported(transformers.RecurrentGemmaConfig(num_hidden_layers=3))
    assert not said.is_supported
    assert said.stopped_by.startswith("recurrent_gemma ")
    with pytest.raises(UnsupportedModel):
        cache_without_weights(transformers.RecurrentGemmaConfig(num_hidden_layers=3))
    with pytest.raises(InvalidArgument, match="transformers model or config"):
        supported("gemma")


def test_a_model_is_left_as_it_was():
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    supported(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_doctor_of_a_config(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_config("qwen3_next").to_dict()))
    assert main(["doctor", str(path)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"full attention +keys and values +3 +2 x 8 x 8 +64 +0 +codes it", out)
    assert re.search(r"recurrent state +convolution state +0\.\.2 .* keeps it exactly", out)
    assert main(["doctor", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["is_supported"] is True
    path.write_text("{}")
    assert main(["doctor", str(path)]) != 0
    assert "is no config that transformers reads" in capsys.readouterr().err


def test_the_page_lists_the_families_that_people_run():
    rows = dict(re.findall(r"^\| `([\w-]+)` \| (.+?) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert {name for name in NAMED if rows[name].startswith("no")} == set()
    (taken, known) = map(
        int, re.search(r"caches\s+of\s+(\d+)\s+of\s+the\s+(\d+)\s+text\s+models", PAGE.read_text()).groups()
    )
    assert known == len(rows)
    assert taken == sum(not cell.startswith("no") for cell in rows.values()) >= 0.9 * known
