"""Models whose keys and values have two widths: latents (MLA), and keys wider than values; and keys of unknown rotation."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kvtc
from kvtc.cli import main
from kvtc.coding.rope import Rope
from kvtc.errors import InvalidArgument, UnsupportedModel
from kvtc.evaluate.baselines import Fp8
from kvtc.evaluate.quality import evaluate_continuation
from kvtc.huggingface.models import capture, geometry_of, verify_rope
from kvtc.huggingface.rope_discovery import rotation_of
from kvtc.huggingface.sensitivity import Sensitivity
from kvtc.huggingface.support import supported
from kvtc.store import open_store
from tests.builders import relative_error
from tests.tiny_architectures import random_ids, read, tiny_config, tiny_model

transformers = pytest.importorskip("transformers")

IDS = random_ids(1, 40)[0]
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.7}
INDEXED = {"index_head_dim": 8, "index_n_heads": 2, "index_topk": 8}
SIZES = (
    "vocab_size", "pad_token_id", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim",
    "qk_nope_head_dim", "v_head_dim",
    "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group", "first_k_dense_replace",
)  # fmt: skip
GPTJ = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 512, "n_inner": 32}


@pytest.mark.parametrize(
    ("name", "changes", "layers", "interleaved"),
    [
        ("deepseek_v2", {}, (0, 1, 2, 3), True),
        ("deepseek_v2", {"rope_parameters": YARN}, (0, 1, 2, 3), True),
        ("deepseek_v3", {}, (0, 1, 2, 3), False),
        ("deepseek_v3", {"rope_interleave": False}, (0, 1, 2, 3), False),
        ("deepseek_v3", {"rope_parameters": YARN}, (0, 1, 2, 3), False),
        ("deepseek_v32", {}, (0, 1, 2, 3), False),
        ("glm4_moe_lite", {}, (0, 1, 2, 3), False),
        ("glm_moe_dsa", {}, (0, 1, 2, 3), False),
        ("kimi_linear", {}, (3,), None),
        ("minicpm3", {}, (0, 1, 2, 3), False),
    ],
)
def test_the_rotary_part_of_a_latent_is_the_key(
    name: str, changes: dict[str, Any], layers: Any, interleaved: Any
) -> None:
    """transformers caches latent vectors as keys and rotary parts as values. The rotary part is the only one that is turned."""
    model = tiny_model(name, **changes)
    geometry = geometry_of(model)
    assert geometry == geometry_of(model.config)
    assert (geometry.layers, geometry.n_kv_heads, geometry.dims) == (layers, 1, (4, 16))
    assert geometry.rope.is_known
    assert [table.interleaved for table in geometry.rope.tables] == ([] if interleaved is None else [interleaved])
    cache = capture(model, IDS, geometry)
    geometry.check(cache)
    held = read(model, IDS[None])[1].layers
    assert torch.equal(cache.keys, torch.stack([held[layer].values[0] for layer in layers]))
    assert torch.equal(cache.values, torch.stack([held[layer].keys[0] for layer in layers]))
    assert verify_rope(model, geometry, IDS) < 1e-5


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("axk1", {}),
        ("axk2", INDEXED),
        ("dots3_note_text", INDEXED),
        ("hy_v4", INDEXED),
        ("longcat_flash", {"num_layers": 2, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "moe_topk": 2}),
        ("mistral4", {"head_dim": None}),
        ("youtu", {}),
    ],
)
def test_other_families_cache_latents_alike(name: str, changes: dict[str, Any]) -> None:
    """Layers of Longcat have two caches each; Dots normalizes rotary parts before it turns them."""
    sizes = tiny_config("deepseek_v3").to_dict() | changes
    kept = {field: sizes[field] for field in (*SIZES, *changes) if sizes[field] is not None}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **kept)
    alone = {"mistral4": transformers.Mistral4ForCausalLM}  # transformers finds it as a part of a larger model alone
    make = alone.get(name, transformers.AutoModelForCausalLM.from_config)
    model = make(config).float().eval()
    geometry = geometry_of(model)
    assert (geometry.n_kv_heads, geometry.dims, geometry.rope.is_known) == (1, (4, 16), True)
    assert verify_rope(model, geometry, IDS) < 1e-5
    geometry.check(capture(model, IDS, geometry))


def test_another_order_of_pairs_shows() -> None:
    model = tiny_model("deepseek_v3", qk_rope_head_dim=8, head_dim=8)
    geometry = geometry_of(model)
    table = replace(geometry.rope.tables[0], interleaved=True)
    with pytest.raises(UnsupportedModel, match="un-rotated keys differ"):
        verify_rope(model, replace(geometry, rope=Rope((table,), geometry.rope.layer_tables)), IDS)


def test_keys_may_be_wider_than_values() -> None:
    model = tiny_model("mimo_v2_flash", v_head_dim=6)
    geometry = geometry_of(model)
    assert (geometry.n_kv_heads, geometry.dims) == (2, (8, 6))
    assert verify_rope(model, geometry, IDS) < 1e-5
    geometry.check(capture(model, IDS, geometry))


def test_one_head_of_two_widths_is_not_taken_for_a_latent() -> None:
    """A cache does not show which of both it is."""
    with pytest.raises(UnsupportedModel, match="expected latents of two widths"):
        geometry_of(tiny_config("mimo_v2_flash", num_key_value_heads=1))
    with pytest.raises(UnsupportedModel, match="expected latents of two widths"):
        geometry_of(tiny_config("deepseek_v3", kv_lora_rank=4))


def test_gradients_are_by_what_the_cache_holds() -> None:
    """Through the up-projections: they are the slopes of the likelihood of the labels that were drawn."""
    model = tiny_model("deepseek_v3", torch.float64, first_k_dense_replace=4)
    geometry, ids, n_read = geometry_of(model), IDS, 30
    sensitivity = Sensitivity(model, [geometry], sink_tokens=4)
    labels = Sensitivity(model, [geometry], sink_tokens=4)._generator
    _, (leaves,) = sensitivity._passes(ids, n_read, None)

    def scores(moved: list[tuple[Tensor, Tensor]]) -> Tensor:
        cache = transformers.DynamicCache()
        for layer, (rotary, latent) in enumerate(moved):
            cache.update(latent, rotary, layer)
        with torch.no_grad():
            return model(ids[None, n_read:], past_key_values=cache).logits[0].float().log_softmax(dim=-1)

    held = [tuple(side.detach()[:, :, :n_read] for side in sides) for sides in leaves]
    exact = scores(held)
    drawn = torch.multinomial(exact.exp(), 1, generator=labels)
    for side in (0, 1):
        directions = [torch.randn(sides[side].shape, dtype=torch.float64) for sides in held]
        found = []
        for sign in (1, -1):
            moved = [list(sides) for sides in held]
            for sides, direction in zip(moved, directions, strict=True):
                sides[side] = sides[side] + sign * 1e-1 * direction
            found.append(float(scores(moved).gather(1, drawn).double().sum()))
        slope = sum(
            float((sides[side].grad[:, :, :n_read] * d).sum()) for sides, d in zip(leaves, directions, strict=True)
        )
        assert (found[0] - found[1]) / 2e-1 == pytest.approx(slope, rel=0.1)


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v32", "kimi_linear"])
def test_a_latent_model_is_calibrated_and_its_cache_coded(name: str) -> None:
    """The model goes on from what is decoded; what is not of the latents comes back bit for bit."""
    model, texts = tiny_model(name), [random_ids(1, 128, seed=seed)[0] for seed in range(1, 5)]
    calibration = kvtc.calibrate(model, texts, profiles=("paper", "joint"), progress=False)
    ids = random_ids(1, 150, seed=9)
    _, cache = read(model, ids[:, :140])
    for profile, ratio, most in (("joint", 4, 0.6), ("paper", 1.8, 0.8)):
        codec = kvtc.Codec(calibration, profile, ratio=ratio, window_tokens=16)
        stream = codec.encode(cache, ids[0, :140])
        (coded,) = [group for group in kvtc.inspect(stream).groups if group.is_coded]
        assert (coded.kind, coded.shape) == ("latent", (1, 4, 16))
        for restored in (codec.decode(stream, ids[0, :140]), codec.decode_lazily(stream, ids[0, :140])):
            for layer in calibration.geometry.layers:
                for side in ("keys", "values"):
                    exact = getattr(cache.layers[layer], side)
                    found = getattr(restored.layers[layer], side)
                    assert found.shape == exact.shape
                    assert torch.equal(found[:, :, -16:], exact[:, :, -16:])
                    assert relative_error(found, exact) < most
            after = read(model, ids[:, 140:], restored)[0]
            assert relative_error(after, read(model, ids[:, 140:], copy.deepcopy(cache))[0]) < 0.2
    streams = kvtc.Codec(calibration, ratio=4).encode_batch(cache, ids[:, :140], torch.ones(1, 140))
    batch, _ = kvtc.Codec(calibration, ratio=4).decode_batch(streams, ids[:, :140])
    assert batch.layers[calibration.geometry.layers[0]].keys.shape[-1] == 16


def test_keys_of_unknown_rotation_are_coded_as_they_are() -> None:
    torch.manual_seed(0)
    model = transformers.GPTJForCausalLM(transformers.GPTJConfig(**GPTJ)).eval()
    rope, reason = rotation_of(model)
    assert not rope.is_known
    assert "has no *RotaryEmbedding module" in reason
    said = supported(model.config)
    assert said.not_coded is None
    assert said.not_turned == rotation_of(model.config)[1]
    assert [group.is_coded for group in said.groups] == [True]
    texts = [random_ids(1, 128, seed=seed)[0] for seed in range(1, 4)]
    calibration = kvtc.calibrate(model, texts, profiles=("joint",), progress=False)
    assert not calibration.geometry.rope.is_known
    codec, (_, cache) = kvtc.Codec(calibration, ratio=4), read(model, random_ids(1, 200))
    stream = codec.encode(cache)
    assert relative_error(codec.decode(stream).layers[0].keys, cache.layers[0].keys) < 0.5
    with pytest.raises(InvalidArgument, match="rotation of these keys is not known"):
        codec.decode(stream, start_position=3)


def test_latents_are_evaluated_beside_fp8() -> None:
    model, texts = tiny_model("deepseek_v3"), [random_ids(1, 128, seed=seed)[0] for seed in range(1, 4)]
    calibration = kvtc.calibrate(model, texts, profiles=("joint",), progress=False)
    methods = {"FP8": Fp8(), "joint": kvtc.Codec(calibration, ratio=2, window_tokens=0)}
    for quality in evaluate_continuation(model, random_ids(1, 160, seed=9)[0], methods, 32):
        assert 1.9 < quality.body_ratio < 2.1
        assert 0 <= quality.kl < 0.05


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v32"])
def test_prefixes_of_latents_are_found_and_read_on_from(name: str) -> None:
    model, texts = tiny_model(name), [random_ids(1, 128, seed=seed)[0] for seed in range(1, 4)]
    calibration = kvtc.calibrate(model, texts, profiles=("joint",), progress=False)
    codec = kvtc.Codec(calibration, ratio=2, sink_tokens=4, window_tokens=16, chunk_tokens=32)
    ids = random_ids(1, 120, seed=9)
    logits, _ = read(model, ids)
    with kvtc.PrefixCache(codec, open_store("memory:"), min_tokens=32) as prefixes:
        prefixes.save(ids[0, :100], read(model, ids[:, :100])[1]).result()
        restored, n_tokens = prefixes.load(ids[0])
    assert n_tokens >= 96
    after = read(model, ids[:, n_tokens:], restored)[0]
    assert relative_error(after, logits[:, n_tokens:]) < 0.2


def test_doctor_says_which_keys_are_coded_as_cached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(transformers.GPTJConfig(**GPTJ).to_dict()))
    assert main(["doctor", str(path)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"at a rate +yes", out)
    assert "keys are coded as cached: GPTJForCausalLM (gptj): has no *RotaryEmbedding module" in " ".join(out.split())
    path.write_text(json.dumps(tiny_config("deepseek_v3").to_dict()))
    assert main(["doctor", str(path)]) == 0
    assert re.search(r"latent +keys and values +0\.\.3 +1 x 4 x 16 +160 +0 +codes it", capsys.readouterr().out)
