"""The first layers of transformers models, recomputed from token ids: in memory and from a folder, and the codec on them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import kvtc
from kvtc import recomputation
from kvtc.errors import InvalidArgument, UnsupportedModel
from kvtc.huggingface.models import capture
from kvtc.recomputation import open_recomputation

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
IDS = np.random.default_rng(0).integers(3, 97, 200)
SETTINGS = {"vocab_size": 97, "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "pad_token_id": 0}
MODELS = {
    "Llama": {"intermediate_size": 48, "num_key_value_heads": 2},
    "Qwen3": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 16},
    "GPT2": {"n_positions": 256},
    "GPTNeoX": {"intermediate_size": 48},
    "Falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 64, "do_layer_norm_before": True},
    "Bloom": {},
}


def made(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(SETTINGS | MODELS[name] | changes))
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


@pytest.fixture(scope="module")
def llama() -> Any:
    return made("Llama", max_position_embeddings=512)


@pytest.mark.parametrize("from_folder", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_it_computes_what_the_model_does(name: str, from_folder: bool, tmp_path: Path, monkeypatch: Any) -> None:
    model = made(name)
    if from_folder:
        model.save_pretrained(tmp_path)
    monkeypatch.setattr(recomputation, "PIECE_TOKENS", 64)
    found = open_recomputation(tmp_path if from_folder else model, 2, CPU).run(IDS)
    with torch.no_grad():
        whole = model(torch.from_numpy(IDS)[None], output_hidden_states=True, use_cache=True)
    torch.testing.assert_close(found.hidden, whole.hidden_states[2][0], rtol=1e-4, atol=1e-4)
    for layer in range(2):
        torch.testing.assert_close(found.keys[layer], whole.past_key_values.layers[layer].keys[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            found.values[layer], whole.past_key_values.layers[layer].values[0], rtol=1e-4, atol=1e-4
        )


def test_of_a_folder_the_first_layers_alone_are_loaded(llama: Any, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path)
    found = open_recomputation(str(tmp_path), 1, CPU)
    names = {name for name, _ in found._decoder.named_parameters()}
    assert "layers.0.mlp.up_proj.weight" in names
    assert not any(name.startswith(("layers.2", "layers.3", "lm_head")) for name in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_identity_is_that_of_the_first_layers_in_any_place_and_dtype(
    llama: Any, tmp_path: Path, dtype: Any
) -> None:
    expected = open_recomputation(llama, 1, CPU).identity
    made("Llama", max_position_embeddings=512).to(dtype).save_pretrained(tmp_path)
    assert open_recomputation(tmp_path, 1, CPU).identity == expected
    assert open_recomputation(llama, 2, CPU).identity != expected
    weights = load_file(tmp_path / "model.safetensors")
    for layer, is_same in ((1, True), (0, False)):
        changed = {name: tensor.clone() for name, tensor in weights.items()}
        changed[f"model.layers.{layer}.mlp.up_proj.weight"][0, 0] += 1
        save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
        assert (open_recomputation(tmp_path, 1, CPU).identity == expected) is is_same


def test_the_model_stays_as_it_was(llama: Any) -> None:
    llama.train()
    try:
        open_recomputation(llama, 1, CPU).run(IDS)
        assert all(module.training for module in llama.modules())
    finally:
        llama.eval()
    assert len(llama.model.layers) == llama.config.num_hidden_layers == 4
    assert llama(torch.from_numpy(IDS)[None]).logits.shape == (1, 200, 97)


def test_what_cannot_be_recomputed_is_refused(llama: Any, tmp_path: Path) -> None:
    for wrong in (0, 5):
        with pytest.raises(InvalidArgument, match=f"{wrong} layers are to be recomputed; the model has 4"):
            open_recomputation(llama, wrong, CPU)
    with pytest.raises(InvalidArgument, match="do not load"):
        open_recomputation(tmp_path, 1, CPU)
    with pytest.raises(InvalidArgument, match="expected a transformers model or the path of one, got Linear"):
        open_recomputation(torch.nn.Linear(2, 2), 1, CPU)
    with pytest.raises(UnsupportedModel, match="0 lists of layers"):
        recomputation.layers_of(torch.nn.Linear(2, 2))
    with pytest.raises(InvalidArgument, match=r"token ids in 0 \.\. 96, found 5 \.\. 97"):
        open_recomputation(llama, 1, CPU).run(np.array([5, 97]))
    with pytest.raises(InvalidArgument, match="one or more token ids"):
        open_recomputation(llama, 1, CPU).run(np.array([], np.int64))


@pytest.mark.parametrize("layers", [None, (0, 3), (1, 4), (2, 4)])
@pytest.mark.parametrize("kv_heads", [None, (1, 2)])
def test_a_codec_of_a_model_and_of_its_folder(llama: Any, layers: Any, kv_heads: Any, tmp_path: Path) -> None:
    """Of all of its layers and of a part; layers that are recomputed come back as they were."""
    llama.save_pretrained(tmp_path)
    part = {"layers": layers, "kv_heads": kv_heads}
    texts = [torch.randint(3, 97, (100,), generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    calibration = kvtc.calibrate(llama, texts, **part, rank=16, recompute_layers=2, progress=False)
    cache = capture(llama, IDS, calibration.geometry)
    codecs = [
        kvtc.Codec(calibration, "conditional", step=0.05, window_tokens=0, chunk_tokens=64, model=model)
        for model in (llama, tmp_path)
    ]
    codecs.append(pickle.loads(pickle.dumps(codecs[0])))  # noqa: S301
    streams = [codec.encode(cache, IDS) for codec in codecs]
    own = sum(layer < 2 for layer in calibration.geometry.layers)
    for codec in codecs:
        for stream in streams:
            found = codec.decode(stream, IDS)
            torch.testing.assert_close(found.keys[:own], cache.keys[:own], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found.values[:own], cache.values[:own], rtol=1e-4, atol=1e-4)
            left = (found.values - cache.values)[own:].norm() / cache.values[own:].norm()
            assert 0 < float(left) < 0.2
    joint = kvtc.Codec(calibration, "joint", step=0.05, window_tokens=0, chunk_tokens=64)
    assert len(streams[0]) < len(joint.encode(cache, IDS))


def test_a_rotation_that_depends_on_the_length_is_refused() -> None:
    dynamic = made("Llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(UnsupportedModel, match="layers cannot be recomputed for a part of it"):
        kvtc.calibrate(dynamic, [IDS], progress=False)
