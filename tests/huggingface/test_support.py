"""What kvtc says of a model from its config alone is what its codec does with the model's cache."""

from __future__ import annotations

import json
import re

import pytest
import torch

import kvtc
from benchmarks.models import support as page_of_models
from kvtc.cli import main
from kvtc.codec.codec import Codec
from kvtc.errors import InvalidArgument, UnsupportedModel
from kvtc.huggingface.support import cache_without_weights, supported
from tests.tiny_architectures import ARCHITECTURES, random_ids, read, tiny_config, tiny_model

transformers = pytest.importorskip("transformers")

NAMED = {
    "gemma3_text", "gemma4_text", "gpt_oss", "llama4_text", "mimo_v2_flash", "qwen3_next", "qwen3_5_text", "nemotron_h", "lfm2",
    "granitemoehybrid", "kimi_linear", "qwen4_exp_text", "glm5_next_text",
    "deepseek_v3", "deepseek_v32", "deepseek_v4", "glm_moe_dsa", "mistral", "minimax_m3_vl_text",
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
    assert (window.token_bytes, window.constant_bytes, window.is_coded) == (0, 15 * 4 * 2 * 2 * 8 * 2, True)
    assert (said.token_bytes, said.constant_bytes) == (128, window.constant_bytes)


def test_real_sizes_need_no_memory():
    """DeepSeek V3 has 671 thousand million parameters."""
    said = supported(transformers.DeepseekV3Config())
    assert said.token_bytes == 61 * (512 + 64) * 2
    assert (said.not_coded, said.not_turned) == (None, None)
    assert [(group.kind, group.shape, group.is_coded) for group in said.groups] == [("latent", (1, 64, 512), True)]


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
    assert re.search(r"recurrent state +recurrent state +0\.\.2 .* rounds it to 8 bits", out)
    assert main(["doctor", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["is_supported"] is True
    path.write_text("{}")
    assert main(["doctor", str(path)]) != 0
    assert "is no config that transformers reads" in capsys.readouterr().err


@pytest.fixture(scope="module")
def stored() -> dict:
    return json.loads(page_of_models.STORED.read_text(encoding="utf-8"))


def test_the_page_shows_what_is_stored(stored):
    page = page_of_models.PAGE.read_text(encoding="utf-8")
    assert page_of_models.with_table(page, stored) == page
    rows = stored["rows"]
    assert {name for name in NAMED if rows[name]["stopped_by"]} == set()
    assert sum(not row["stopped_by"] for row in rows.values()) >= 0.9 * len(rows)
    assert sum(row["is_coded"] for row in rows.values()) >= 0.8 * len(rows)


def test_what_is_stored_is_of_every_text_model_of_this_transformers(stored):
    if stored["transformers"] != transformers.__version__:
        pytest.skip(f"the table is of transformers {stored['transformers']}")
    configs = page_of_models.text_configs()
    assert set(configs) == set(stored["rows"])
    # One of each kind, and some of those whose code looks at numbers that are not there.
    for name in ("gemma3_text", "gemma3n_text", "glm4v_text", "glm5_next_text", "lfm2_moe", "mamba2", "mimo_v2_flash"):
        assert page_of_models.row_of(supported(configs[name])) == stored["rows"][name], name
