"""The trainer of small models: what a new model takes from another, and a run that was stopped."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kvtc.demo.run import CONVERSATION

PROGRAM = Path(__file__).parents[2] / "reference_model" / "train.py"
TINY = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("train_small_models", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def run(tmp_path):
    """A run whose text is random."""
    np.random.default_rng(0).integers(3, 4096, 4096).astype(np.uint16).tofile(tmp_path / "tokens.bin")
    words = " ".join("".join("abcdefghij"[int(digit)] for digit in str(number)) for number in range(100, 300))
    (tmp_path / "synthetic.txt").write_text(f"{words}.\n\n\n" * 40, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(("preset", "layer_type"), [("latent", "latent_attention"), ("recurrent", "mamba")])
def test_another_architecture_begins_with_what_means_the_same_in_kvtc_6m(program, preset, layer_type):
    from transformers import AutoModelForCausalLM

    model = program.new_model(program.PRESETS[preset])
    given = AutoModelForCausalLM.from_pretrained(program.KVTC_6M, dtype=torch.float32).model
    mine = dict(model.model.named_parameters())
    names = {"feed_forward.": "mlp.", "pre_ff_layernorm": "post_attention_layernorm", "final_layernorm": "norm"}
    taken = set()
    for name, parameter in mine.items():
        old = name
        for its_name, llama_name in names.items():
            old = old.replace(its_name, llama_name)
        if old in dict(given.named_parameters()) and "self_attn" not in old:
            assert torch.equal(parameter, given.get_parameter(old)), name
            taken.add(old)
    assert {
        "embed_tokens.weight",
        "norm.weight",
        "layers.11.mlp.down_proj.weight",
        "layers.3.input_layernorm.weight",
    } <= taken
    assert model.num_parameters() < 7_000_000
    if layer_type == "mamba":
        assert [hasattr(layer, "mamba") for layer in model.model.layers] == [True, True, True, False] * 3
        steps = torch.cat([layer.mamba.dt_bias for layer in model.model.layers if hasattr(layer, "mamba")])
        steps = torch.nn.functional.softplus(steps.detach())
        assert 0.00099 < float(steps.min()) < 0.005 < 0.03 < float(steps.max()) < 0.1001


def test_latent_attention_begins_nearly_as_good_as_the_attention_that_it_comes_from(program):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(program.TOKENIZER)
    text = CONVERSATION.read_text(encoding="utf-8")

    def bits(model):
        return program.bits_per_byte(model, tokenizer, text, 512, 1)

    given = AutoModelForCausalLM.from_pretrained(program.KVTC_6M, dtype=torch.float32)
    assert bits(program.new_model(program.PRESETS["latent"])) < 1.6 * bits(given)


def test_a_run_that_was_stopped_ends_as_one_that_was_not(program, run):
    config = (
        program.PRESETS["recurrent"].config | TINY | {"attn_layer_indices": [1], "mamba_n_heads": 2, "mamba_d_head": 32}
    )
    preset = replace(
        program.PRESETS["recurrent"],
        config=config,
        tokens_per_step=256,
        stages=((4, 64, 0.0),),
        warmup=1,
        grow_from=None,
    )

    def trained(last_steps):
        for file in ("checkpoint.safetensors", "log.jsonl", "held_out.jsonl"):
            (run / file).unlink(missing_ok=True)
        for last in last_steps:
            program.train(preset, run, "cpu", last, 10.0, False, [])
        return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]

    whole = trained([4])
    assert trained([1, 3, 4]) == whole
    assert len(whole) == 4


def test_bits_per_byte_are_logged_every_20_steps_and_kept_when_the_run_goes_on(program, run):
    (run / "text.txt").write_text("A short text that was not trained on. " * 300, encoding="utf-8")
    preset = replace(
        program.PRESETS["cpu"], config=program.PRESETS["cpu"].config | TINY, tokens_per_step=32, stages=((21, 32, 0.0),),
        grow_from=None,
    )  # fmt: skip
    for last in (20, 21):
        program.train(preset, run, "cpu", last, 10.0, False, [run / "text.txt"])
        (line,) = map(json.loads, (run / "held_out.jsonl").read_text().splitlines())
        assert line["step"] == 19
        assert 1 < line["text"] < 8
