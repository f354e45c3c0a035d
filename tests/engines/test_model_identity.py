"""Whose an entry is: the identity of models and adapters, and that engines keep the entries of different ones apart."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import shutil
import time
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch

import kvtc
from kvtc.engines.served_model import ServedModel
from kvtc.engines.settings import EngineSettings
from kvtc.engines.vllm.facts import Adapters
from kvtc.errors import CalibrationMismatch, InvalidArgument
from kvtc.huggingface import model_files
from kvtc.huggingface.model_files import UnknownModel, files_identity, find_model
from kvtc.huggingface.model_identity import calibrated_identity
from kvtc.reference import MODEL_DIRECTORY
from kvtc.store import open_store
from tests.builders import joint_calibration
from tests.engines import test_lmcache_adapters, test_sglang_hicache, test_vllm_tier
from tests.engines.test_chunk_coder import T, chunk
from tests.engines.test_vllm_connector import FOUND, SHAPE, close_to, prompt
from tests.fake_engine import FakeEngine
from tests.fake_lmcache import MemoryObj, ObjectKey, fake_lmcache
from tests.fake_sglang import fake_sglang
from tests.fake_vllm import LookupResult, configs, fake_vllm
from tests.tiny_models import weights, write_adapter, write_model


def changed(name: str, at: int) -> dict[str, torch.Tensor]:
    tensors = weights()
    tensors[name].view(-1)[at] += 1
    return tensors


class TestFiles:
    def test_a_copy_elsewhere_is_the_same_model(self, tmp_path):
        first = write_model(tmp_path / "a")
        second = shutil.copytree(first, tmp_path / "deep" / "b")
        (second / "config.json").write_text(
            json.dumps(
                json.loads((first / "config.json").read_text()) | {"_name_or_path": "x", "transformers_version": "9"}
            )
        )
        for path in second.iterdir():
            os.utime(path, (1, 1))
        (second / "model-0.safetensors").rename(second / "other.safetensors")
        (second / "tokenizer.json").write_text("{}")
        (second / "training_args.bin").write_bytes(b"x")
        assert files_identity(second) == files_identity(first)
        assert files_identity(first).startswith("files:")

    def test_how_tensors_are_spread_over_files_does_not_count(self, tmp_path):
        identities = {files_identity(write_model(tmp_path / str(n), n_files=n)) for n in (1, 2, 3)}
        backwards = write_model(tmp_path / "backwards", dict(reversed(weights().items())))
        assert identities == {files_identity(backwards)}

    def test_what_a_cache_depends_on_counts(self, tmp_path):
        """Another value, dtype, shape or name of a tensor; another rotation, quantization or precision."""
        renamed, recast, reshaped = weights(), weights(), weights()
        renamed["model.layers.1.q.weight"] = renamed.pop("model.layers.0.q.weight")
        recast["model.embed.weight"] = recast["model.embed.weight"].view(torch.float16)
        reshaped["model.embed.weight"] = reshaped["model.embed.weight"].view(64, 1024)
        places = [
            write_model(tmp_path / "as it is"),
            *(
                write_model(tmp_path / f"{name} {at}", changed(name, at))
                for name, at in (
                    ("model.embed.weight", 0), ("model.embed.weight", -1), ("model.norm.weight", 5), ("model.layers.0.q.weight", -1)
                )
            ),
            write_model(tmp_path / "trained", {name: tensor * 1.01 for name, tensor in weights().items()}),
            *(write_model(tmp_path / name, part) for name, part in (("n", renamed), ("d", recast), ("s", reshaped))),
            write_model(tmp_path / "theta", rope_theta=500000.0),
            write_model(tmp_path / "scaled", rope_scaling={"type": "yarn", "factor": 4.0}),
            write_model(tmp_path / "quantized", quantization_config={"quant_method": "awq", "bits": 4}),
            write_model(tmp_path / "dtype", torch_dtype="float16"),
        ]  # fmt: skip
        assert len({files_identity(place) for place in places}) == len(places)

    def test_of_a_large_tensor_a_sample_is_read_and_of_a_small_one_all(self, tmp_path):
        """64 KiB and less is read whole; of 256 KiB, 18 spans of 4 KiB: a change between two of them is not seen."""
        name, n_bytes = "model.layers.0.q.weight", 512 * 256 * 2
        spans = model_files._spans(n_bytes, model_files.PLACES)
        assert spans[0] == (0, 4096)
        assert sum(spans[-1]) == n_bytes
        sampled = np.zeros(n_bytes, bool)
        for start, length in spans:
            sampled[start : start + length] = True
        original = files_identity(write_model(tmp_path / "original"))
        unseen = int(np.flatnonzero(~sampled)[0]) // 2 + 1
        seen = spans[7][0] // 2 + 1
        assert files_identity(write_model(tmp_path / "unseen", changed(name, unseen))) == original
        assert files_identity(write_model(tmp_path / "seen", changed(name, seen))) != original

    def test_models_of_very_many_tensors_are_sampled_more_thinly(self, tmp_path, monkeypatch):
        monkeypatch.setattr(model_files, "MOST_SPANS", 3)
        model_files._identity.cache_clear()
        first, middle, last = (
            files_identity(write_model(tmp_path / str(at), changed("model.layers.0.q.weight", at)))
            for at in (0, 65000, -1)
        )
        assert len({files_identity(write_model(tmp_path / "original")), first, last}) == 3
        assert middle == files_identity(tmp_path / "original")
        model_files._identity.cache_clear()

    def test_other_formats_are_sampled_as_files(self, tmp_path, monkeypatch):
        monkeypatch.setattr(model_files, "FILE_START", 1000)
        monkeypatch.setattr(model_files, "FILE_PLACES", 2)
        data = np.random.default_rng(0).bytes(50_000)
        places = {}
        for name, at in (("original", None), ("copy", None), ("start", 10), ("middle", 25_000), ("end", -1)):
            folder = tmp_path / name
            folder.mkdir()
            (folder / "config.json").write_text("{}")
            contents = bytearray(data)
            if at is not None:
                contents[at] ^= 1
            (folder / f"{'weights' if name == 'copy' else 'pytorch_model'}.bin").write_bytes(contents)
            places[name] = files_identity(folder)
        assert places["original"] == places["copy"] == places["middle"]
        assert len(set(places.values())) == 3
        (tmp_path / "model.gguf").write_bytes(data)
        alone = files_identity(tmp_path / "model.gguf")
        (tmp_path / "model.gguf").write_bytes(data[:-1])
        assert files_identity(tmp_path / "model.gguf") != alone

    def test_code_of_the_model_counts(self, tmp_path):
        place = write_model(tmp_path / "model")
        before = files_identity(place)
        (place / "modeling_x.py").write_text("scale = 1")
        after = files_identity(place)
        (place / "modeling_x.py").write_text("scale = 2.0")
        assert len({before, after, files_identity(place)}) == 3

    def test_adapters_count_by_weights_and_configuration(self, tmp_path):
        first, copy = write_adapter(tmp_path / "a"), write_adapter(tmp_path / "b")
        assert files_identity(first) == files_identity(copy)
        others = write_adapter(tmp_path / "c", seed=1), write_adapter(tmp_path / "d", lora_alpha=16)
        assert len({files_identity(place) for place in (first, *others)}) == 3

    def test_files_are_read_again_only_when_they_change(self, tmp_path, monkeypatch):
        place = write_model(tmp_path / "model")
        before = files_identity(place)
        with monkeypatch.context() as patch:
            patch.setattr(model_files, "_tensors_of", lambda *_: pytest.fail("read again"))
            assert files_identity(place) == before
        write_model(place, changed("model.norm.weight", 0))
        os.utime(place / "model-0.safetensors", ns=(time.time_ns(), time.time_ns() + 10**9))
        assert files_identity(place) != before

    def test_files_that_are_written_in_place_with_their_time_kept_are_read_again(self, tmp_path):
        place = write_model(tmp_path / "model")
        path = place / "model-0.safetensors"
        before, times = files_identity(place), path.stat()
        contents = bytearray(path.read_bytes())
        contents[-1] ^= 1
        path.write_bytes(contents)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert files_identity(place) != before

    @pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
    def test_a_whole_model_beside_an_old_index_counts(self, tmp_path, index):
        """transformers loads model.safetensors whatever an index beside it names."""
        place = write_model(tmp_path / "model")
        shutil.copy(place / "model-0.safetensors", place / "pytorch_model-1.bin")
        file = "model-0.safetensors" if index.startswith("model") else "pytorch_model-1.bin"
        (place / index).write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
        found = {files_identity(place)}
        for at in (0, 1):
            safetensors.torch.save_file(changed("model.norm.weight", at), place / "model.safetensors")
            found.add(files_identity(place))
        assert len(found) == 3

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda place: (place / "model-0.safetensors").unlink(), "there are no weights in"),
            (lambda place: (place / "model-0.safetensors").write_bytes(b"\xff" * 100), "not a safetensors file"),
            (lambda place: (place / "model-0.safetensors").write_bytes(b"x"), "not a safetensors file"),
            (lambda place: os.truncate(place / "model-0.safetensors", 5000), "lie beyond its end"),
            (lambda place: (place / "config.json").write_text("{"), "does not hold JSON"),
            (lambda place: (place / "config.json").write_text("[]"), "not an object"),
            (lambda place: (place / "model.safetensors.index.json").write_text("{}"), "which tensor is in which file"),
            (
                lambda place: (place / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b"}}'),
                "cannot be read",
            ),
            (lambda place: shutil.rmtree(place), "there are no files at"),
        ],
    )
    def test_what_is_no_model_has_no_identity(self, tmp_path, damage, message):
        place = write_model(tmp_path / "model")
        damage(place)
        with pytest.raises(UnknownModel, match=message):
            files_identity(place)


class TestHub:
    @pytest.fixture
    def cache(self, tmp_path):
        """The hub's cache with two revisions of one model; its weights are links, as the hub's library makes them."""
        pytest.importorskip("huggingface_hub")
        root = tmp_path / "hub" / "models--org--tiny"
        for index, revision in enumerate(("a" * 40, "b" * 40)):
            blobs = write_model(root / "blobs" / str(index), changed("model.norm.weight", index))
            snapshot = root / "snapshots" / revision
            snapshot.mkdir(parents=True)
            for path in blobs.iterdir():
                (snapshot / path.name).symlink_to(path)
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text("b" * 40)
        return str(tmp_path / "hub")

    def test_a_name_is_its_default_revision_or_the_one_that_is_given(self, cache):
        found = [find_model("org/tiny", cache_dir=cache), find_model("org/tiny", "a" * 40, cache_dir=cache)]
        assert [place.name for place in found] == ["b" * 40, "a" * 40]
        assert find_model(f"org/tiny@{'a' * 40}", cache_dir=cache) == found[1]
        assert files_identity(found[0]) != files_identity(found[1])

    def test_a_revision_that_the_engine_does_not_tell_is_not_guessed(self, cache):
        with pytest.raises(UnknownModel, match=r"2 revisions of org/tiny .* such as org/tiny@a+"):
            find_model("org/tiny", cache_dir=cache, is_told=False)
        shutil.rmtree(f"{cache}/models--org--tiny/snapshots/{'b' * 40}")
        assert find_model("org/tiny", cache_dir=cache, is_told=False).name == "a" * 40

    @pytest.mark.parametrize(
        "name", ["org/other", "/no/such/folder", "s3://bucket/model", "x" * 5000, "~nobody-here/x", "a\0b"]
    )
    def test_what_is_not_on_this_machine_is_not_found(self, cache, name):
        with pytest.raises(UnknownModel, match=r"not on this machine|no files at"):
            find_model(name, cache_dir=cache)


class Lora(torch.nn.Module):
    """A layer as PEFT wraps it."""

    def __init__(self, base: torch.nn.Linear, scaling: float = 1.0) -> None:
        super().__init__()
        self.base_layer, self.scaling = base, {"default": scaling}
        self.lora_A = torch.nn.Linear(base.in_features, 2, bias=False)
        torch.nn.init.ones_(self.lora_A.weight)

    def forward(self, x):
        return self.base_layer(x) + self.scaling["default"] * self.lora_A(x).sum()


def change(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """The model, changed in the way of that name."""
    layer = model.model.layers[3]
    with torch.no_grad():
        match name:
            case "a row of the embeddings":
                model.model.embed_tokens.weight[100] += 1
            case "rows past the sixteenth":
                for parameter in model.parameters():
                    parameter[16:] *= 2
            case "one value":
                layer.mlp.up_proj.weight[-1, -1] += 1
            case "a LoRA":
                layer.self_attn.q_proj = Lora(layer.self_attn.q_proj)
            case "a LoRA of another scaling":
                layer.self_attn.q_proj = Lora(layer.self_attn.q_proj, 2.0)
            case "a layer less":
                del model.model.layers[-1]
            case "another order of layers":
                model.model.layers[3], model.model.layers[4] = model.model.layers[4], layer
            case "another scaling of attention":
                layer.self_attn.scaling *= 2
            case "another module":
                layer.mlp.act_fn = torch.nn.GELU()
            case "another forward":
                layer.mlp.forward = lambda x: x
            case "another configuration":
                model.config.rms_norm_eps = 1e-3
            case "another dtype":
                model.half()
            case "a new head":
                model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)
    return model


CHANGES = (
    "a row of the embeddings", "rows past the sixteenth", "one value", "a LoRA", "a LoRA of another scaling", "a layer less",
    "another order of layers", "another scaling of attention", "another module", "another forward", "another configuration",
    "another dtype", "a new head",
)  # fmt: skip


class TestLiveModels:
    @pytest.fixture
    def load(self):
        transformers = pytest.importorskip("transformers")

        def loaded(place=MODEL_DIRECTORY, **options):
            return transformers.AutoModelForCausalLM.from_pretrained(place, **options)

        return loaded

    def test_a_model_as_it_was_loaded_has_the_identity_of_its_files(self, load, tmp_path):
        copy = shutil.copytree(MODEL_DIRECTORY, tmp_path / "copy")
        model = load()
        identities = [kvtc.model_identity(one) for one in (model, load(copy), MODEL_DIRECTORY, copy)]
        assert set(identities) == {files_identity(MODEL_DIRECTORY)}
        model(torch.arange(5)[None], output_hidden_states=True)  # leaves hooks of transformers that only read
        assert kvtc.model_identity(model.train()) == identities[0]
        load().save_pretrained(tmp_path / "split", max_shard_size="3MB")
        assert (tmp_path / "split" / "model.safetensors.index.json").is_file()
        split = tmp_path / "split"
        assert kvtc.model_identity(load(split)) == kvtc.model_identity(split)

    def test_a_model_that_computes_other_caches_has_another_identity(self, load, tmp_path):
        copy = shutil.copytree(MODEL_DIRECTORY, tmp_path / "copy")
        rotated = {"rope_type": "default", "rope_theta": 1e6}
        made = [change(load(), name) for name in CHANGES]
        made += [load(rope_parameters=rotated), load(dtype=torch.float32)]
        again = [change(load(copy), name) for name in CHANGES]
        again += [load(copy, rope_parameters=rotated), load(copy, dtype=torch.float32)]
        identities = [kvtc.model_identity(model) for model in made]
        assert all(identity.startswith("parameters:") for identity in identities)
        assert len(set(identities)) == len(identities)
        assert [kvtc.model_identity(model) for model in again] == identities

    def test_a_model_that_was_never_in_files_has_the_identity_of_its_parameters(self, load):
        model = load()
        assert kvtc.model_identity(type(model)(model.config)).startswith("parameters:")

    def test_what_cannot_be_told_is_refused(self, load):
        quantized, hooked = load(dtype=torch.float32), load()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.ao.quantization.quantize_dynamic(quantized, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)
        with pytest.raises(UnknownModel, match=r"_packed_params: expected a torch.Tensor, got tuple$"):
            kvtc.model_identity(quantized)
        for register in ("register_forward_hook", "register_forward_pre_hook"):
            handle = getattr(hooked.model.layers[0], register)(lambda *_: None)
            with pytest.raises(
                UnknownModel, match=r"module model\.layers\.0 has a forward hook, .*<lambda>.*text of your own"
            ):
                kvtc.model_identity(hooked)
            handle.remove()
        assert kvtc.model_identity(hooked) == files_identity(MODEL_DIRECTORY)

    def test_hooks_of_accelerate_only_move_tensors(self, load):
        hooks = pytest.importorskip("accelerate.hooks")
        model = load()
        for layer in model.model.layers:
            hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(io_same_device=True))
        assert kvtc.model_identity(model) == files_identity(MODEL_DIRECTORY)

    def test_parameters_that_are_not_in_memory_have_no_identity(self):
        with torch.device("meta"):
            model = torch.nn.Linear(2, 2)
        with pytest.raises(UnknownModel, match=r"expected an ordinary dense tensor, got torch\.strided on meta"):
            kvtc.model_identity(model)

    def test_a_default_device_does_not_count(self, load):
        model, changed = load(), change(load(), "one value")
        expected = kvtc.model_identity(changed)
        with torch.device("meta"):
            assert kvtc.model_identity(model) == files_identity(MODEL_DIRECTORY)
            assert kvtc.model_identity(changed) == expected

    def test_for_a_calibration_the_dtype_that_parameters_were_cast_to_does_not_count(self, load):
        assert calibrated_identity(load(dtype=torch.float32)) == files_identity(MODEL_DIRECTORY)
        changed = calibrated_identity(change(load(dtype=torch.float32), "one value"))
        assert changed.startswith("parameters:")

    def test_a_calibration_knows_its_model(self):
        pytest.importorskip("transformers")
        model = kvtc.reference_model()[0]
        texts = [torch.arange(300) % 4000]
        made = kvtc.calibrate(model, texts, profiles=["paper"], rank=8, progress=False)
        assert made.info["model_identity"] == files_identity(MODEL_DIRECTORY)
        assert replace(made, info={}).fingerprint == made.fingerprint


def settings(**given) -> EngineSettings:
    return EngineSettings("unused", "memory:", **given)


class TestServedModel:
    def test_what_the_engine_was_told_counts(self, tmp_path):
        place = str(write_model(tmp_path / "model"))

        def identity(given=None, **changed):
            return ServedModel.of(settings(**(given or {})), place, **changed).identity

        identities = [
            identity(),
            identity(effective={"dtype": "float16"}),
            identity(effective={"dtype": "float16", "quantization": "fp8"}),
            identity(overrides={"rope_theta": 20000}),
            identity({"identity": "named"}),
            identity({"identity": "other"}),
            identity({"identity": "named"}, effective={"dtype": "float16"}),
        ]
        assert len(set(identities)) == len(identities)
        assert identity({"namespace": "tenant"}) == identity()
        tenants = [ServedModel.of(settings(namespace=name), place).scope for name in ("", "tenant")]
        assert tenants[0] != tenants[1]

    @pytest.mark.parametrize("name", [None, "/no/such/model"])
    def test_weights_that_are_not_found_must_be_named(self, name):
        with pytest.raises(UnknownModel, match=r"kvtc\.model.*kvtc\.identity"):
            ServedModel.of(settings(), name)
        assert ServedModel.of(settings(identity="mine"), name).weights == "named:mine"

    def test_a_calibration_of_another_model_is_refused(self, tmp_path):
        place = str(write_model(tmp_path / "model"))
        mine, other = files_identity(tmp_path / "model"), "files:" + "0" * 32
        served = ServedModel.of(settings(), place)
        for info in (
            {},
            {"model_identity": None},
            {"model_identity": mine},
            {"model_identity": "parameters:" + "0" * 32},
        ):
            calibration = replace(joint_calibration(), info=info)
            assert served.checked(calibration, "file") is calibration
        wrong = replace(joint_calibration(), info={"model_identity": other})
        with pytest.raises(CalibrationMismatch, match=rf"calibration file .*{other}.*{mine}.*kvtc\.check_model"):
            served.checked(wrong, "file")
        assert ServedModel.of(settings(check_model=False), place).checked(wrong, "file") is wrong

    @pytest.mark.parametrize(
        ("overrides", "layer"),
        [
            ({"rope_theta": 10000.0}, 0),
            ({"rope_parameters": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 2.0}}, 0),
            ({"num_hidden_layers": 11}, 11),
        ],
    )
    def test_a_calibration_of_another_rotation_is_refused(self, overrides, layer):
        pytest.importorskip("transformers")
        calibration = kvtc.reference_calibration()
        served = ServedModel.of(settings(), str(MODEL_DIRECTORY))
        assert served.checked(calibration, "reference") is calibration
        if "rope_theta" in overrides:
            overrides = {"rope_parameters": {"rope_type": "default", **overrides}}
        served = ServedModel.of(settings(), str(MODEL_DIRECTORY), overrides=overrides)
        with pytest.raises(
            CalibrationMismatch, match=rf"calibration reference rotates layer {layer} by.*kvtc\.check_model"
        ):
            served.checked(calibration, "reference")

    def test_a_rotation_that_cannot_be_found_out_is_not_compared(self, tmp_path, caplog):
        pytest.importorskip("transformers")
        place = write_model(tmp_path / "model", model_type="nobody-knows-it")
        served = ServedModel.of(settings(), str(place))
        assert served.rope is None
        assert "the model's rotation is not known" in caplog.text
        assert served.checked(joint_calibration(), "file") is joint_calibration()


@pytest.fixture
def options(base_options):
    del base_options["kvtc.identity"]
    return base_options | {"kvtc.ratio": 8, "kvtc.max_tokens": 4096}


@pytest.fixture
def models(tmp_path):
    """a; its copy elsewhere; a place where another model takes its place: (a, copy, replace a by another)."""
    first = write_model(tmp_path / "a")
    copy = write_model(tmp_path / "elsewhere" / "copy", n_files=2)

    def trained():
        write_model(first, changed("model.layers.0.q.weight", 0))
        os.utime(first / "model-0.safetensors", ns=(0, time.time_ns() + 10**9))

    return str(first), str(copy), trained


class TestVllmConnector:
    @pytest.fixture
    def options(self, options):
        return {name: options[name] for name in ("kvtc.calibration", "kvtc.store")} | {"kvtc.step": 0.05}

    @pytest.fixture
    def load(self, options):
        """Runs a prompt in a new engine -> tokens that it loads; checks what is loaded."""
        ids, truth = prompt()
        with fake_vllm():
            from kvtc.engines.vllm.connector import KvtcConnector

            def loaded(model, request=None, more=None, **changed):
                engine = FakeEngine(KvtcConnector, *configs(options | (more or {}), **SHAPE, model=model, **changed))
                n_loaded, found = engine.run("a", ids, truth, **(request or {}))
                assert close_to(found, truth)
                engine.finish()
                return n_loaded

            yield loaded

    def test_copies_share_entries_and_another_model_at_the_same_place_does_not(self, load, models):
        first, copy, trained = models
        assert [load(first), load(first), load(copy)] == [0, FOUND, FOUND]
        trained()
        assert [load(first), load(first), load(copy)] == [0, FOUND, FOUND]

    @pytest.mark.parametrize(
        "changed",
        [
            {"quantization": "fp8"},
            {"hf_overrides": {"rope_parameters": {"rope_theta": 20000.0}}},
            {"cache_dtype": "float32"},
            {"more": {"kvtc.namespace": "tenant"}},
            {"more": {"kvtc.identity": "mine"}},
            {"hf_config": SimpleNamespace(rope_type="longrope"), "max_model_len": 8192},
        ],
    )
    def test_what_vllm_was_told_keeps_entries_apart(self, load, models, changed):
        assert [load(models[0]), load(models[0], **changed), load(models[0], **changed)] == [0, 0, FOUND]

    def test_weights_in_no_file_must_be_named(self, load, models):
        for changed in ({"load_format": "dummy"}, {"hf_overrides": lambda config: config}):
            with pytest.raises(InvalidArgument, match=r"kvtc\.identity"):
                load(models[0], **changed)
            assert load(models[0], more={"kvtc.identity": str(changed)}, **changed) == 0
        with pytest.raises(InvalidArgument, match=r"weights of /no/such are not found.*kvtc\.identity"):
            load("/no/such")

    def test_a_calibration_of_another_model_ends_the_start(self, load, models, options):
        other = replace(joint_calibration(), info={"model_identity": "files:" + "0" * 32})
        other.save(options["kvtc.calibration"])
        with pytest.raises(CalibrationMismatch, match="was made for the model files:0000"):
            load(models[0])
        assert load(models[0], more={"kvtc.check_model": False}) == 0

    def test_adapters_are_known_by_their_weights(self, load, models, tmp_path):
        def request(path, number=1, **more):
            lora = SimpleNamespace(lora_name="adapter", lora_path=str(path), lora_int_id=number, load_inplace=False)
            return {"lora_request": lora, **more}

        first, copy = write_adapter(tmp_path / "first"), write_adapter(tmp_path / "copy")
        other = write_adapter(tmp_path / "other", seed=1)
        model = models[0]
        assert load(model) == 0
        assert [load(model, request(first)), load(model, request(first)), load(model, request(copy))] == [
            0,
            FOUND,
            FOUND,
        ]
        assert [load(model, request(other)), load(model, request(other))] == [0, FOUND]
        assert [load(model, request(first, cache_salt="x")), load(model, {"cache_salt": "x"})] == [0, 0]
        write_adapter(first, seed=2)
        os.utime(first / "adapter_model.safetensors", ns=(0, time.time_ns() + 10**9))
        assert [load(model, request(first)), load(model, request(first)), load(model, request(copy))] == [
            0,
            FOUND,
            FOUND,
        ]

    @pytest.mark.parametrize("path", ["/no/such/adapter", None])
    def test_an_adapter_without_files_is_neither_looked_up_nor_saved(self, options, models, path):
        ids, truth = prompt()
        lora = SimpleNamespace(lora_name="a", lora_path=path, lora_int_id=1, load_inplace=False)
        with fake_vllm():
            from kvtc.engines.vllm.connector import KvtcConnector

            engine = FakeEngine(KvtcConnector, *configs(options, **SHAPE, model=models[0]))
            assert [engine.run(name, ids, truth, lora_request=lora)[0] for name in "ab"] == [0, 0]
            assert engine.scheduler._planner.counts.read()["requests_unknown"] == 2
            engine.finish()
        with open_store(options["kvtc.store"]) as store:
            assert list(store.keys()) == []

    def test_engines_of_different_block_sizes_share_a_store(self, options, models):
        ids, truth = prompt()
        others, other_truth = prompt(seed=3)
        with fake_vllm():
            from kvtc.engines.vllm.connector import KvtcConnector

            def run(block_size, ids, truth):
                engine = FakeEngine(
                    KvtcConnector, *configs(options, **SHAPE, model=models[0], block_size=block_size), n_blocks=128
                )
                n_loaded, found = engine.run("a", ids, truth)
                engine.finish()
                assert close_to(found, truth)
                assert not engine.worker._mover.counts.read().get("entries_unusable")
                return n_loaded

            assert [run(16, ids, truth), run(32, others, other_truth)] == [0, 0]
            with open_store(options["kvtc.store"]) as store:
                before = {key: store.get(key) for key in store.keys()}  # noqa: SIM118
            assert [run(16, ids, truth), run(32, ids, truth)] == [688, FOUND]
            assert [run(16, others, other_truth), run(32, others, other_truth)] == [688, FOUND]
            with open_store(options["kvtc.store"]) as store:
                assert {key: store.get(key) for key in store.keys()} == before  # noqa: SIM118


def test_an_adapter_that_changed_under_the_engine_is_unknown_until_it_is_loaded_again(tmp_path):
    place = write_adapter(tmp_path / "adapter")
    adapters = Adapters("bfloat16")

    def digest(number=1, load_inplace=False, of=adapters):
        return of.digest(SimpleNamespace(lora_path=str(place), lora_int_id=number, load_inplace=load_inplace))

    first = digest()
    assert digest() == first != digest(of=Adapters("float16"))
    write_adapter(place, seed=1)
    os.utime(place / "adapter_model.safetensors", ns=(0, time.time_ns() + 10**9))
    with pytest.raises(UnknownModel, match="have changed since"):
        digest()
    second = digest(number=2)
    assert second != first
    assert digest(load_inplace=True) == digest() == second


class TestVllmTier:
    @pytest.fixture
    def exchange(self, options):
        """Stores a chunk and looks for it, as a tier whose model is at a place -> (was it there, is it now)."""
        del options["kvtc.max_tokens"]
        options["kvtc.attention_backend"] = "FLASH_ATTN"
        with fake_vllm():
            from kvtc.engines.vllm.tier import KvtcTier

            def exchanged(model, **more):
                made = test_vllm_tier.spec
                found = made()
                found.config.model.name = model
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(test_vllm_tier, "spec", lambda *_: found)
                    host = test_vllm_tier.Host(KvtcTier, options | more)
                context, keys = test_vllm_tier.request(host.tier, "a", 1)
                before = host.look(keys[0], context)
                host.fill(0, test_vllm_tier.truth(), 0)
                host.job(keys, [0], context, is_load=False)
                context, keys = test_vllm_tier.request(host.tier, "b", 1)
                after = host.look(keys[0], context)
                host.tier.shutdown()
                return before is LookupResult.HIT, after is LookupResult.HIT

            yield exchanged

    def test_copies_share_entries_and_another_model_at_the_same_place_does_not(self, exchange, models):
        first, copy, trained = models
        assert [exchange(first), exchange(first), exchange(copy)] == [(False, True), (True, True), (True, True)]
        trained()
        assert [exchange(first), exchange(copy)] == [(False, True), (True, True)]
        assert exchange("/no/such", **{"kvtc.identity": "mine"}) == (False, True)
        with pytest.raises(InvalidArgument, match=r"kvtc\.identity"):
            exchange("/no/such")


class TestSglang:
    @pytest.fixture
    def exchange(self, options):
        """Stores pages and looks for them, as a server of a model -> (pages found before, and after)."""
        helpers = test_sglang_hicache
        with fake_sglang() as server:

            def exchanged(model, page=helpers.PAGE, **told):
                if told.pop("is_server", True):
                    server.publish(model, **told)
                config = helpers.HiCacheStorageConfig(dict(options), model_name=model)
                backend = importlib.import_module("kvtc.engines.sglang.hicache").KvtcHiCache(config, {})
                pool = helpers.HostPool("layer_first", helpers.SIZES, page, helpers.N_PAGES)
                cache = helpers.told_cache(page * helpers.N_PAGES, torch.bfloat16)
                pool.fill(cache.keys, cache.values)
                backend.register_mem_pool_host(pool)
                before = backend.batch_exists(helpers.KEYS)
                indices = torch.arange(page * helpers.N_PAGES)
                assert all(backend.batch_set_v1(helpers.KEYS, indices, helpers.HiCacheStorageExtraInfo([])))
                after = backend.batch_exists(helpers.KEYS)
                assert backend.batch_get_v1(helpers.KEYS, indices) == [True] * helpers.N_PAGES
                backend.close()
                return before, after

            yield exchanged

    def test_copies_share_entries_and_another_model_at_the_same_place_does_not(self, exchange, models):
        first, copy, trained = models
        assert [exchange(first), exchange(first), exchange(copy)] == [(0, 6), (6, 6), (6, 6)]
        for told in (
            {"quantization": "fp8"},
            {"json_model_override_args": '{"rope_theta": 2.0}'},
            {"dtype": "float16"},
        ):
            assert exchange(first, **told) == (0, 6)
        trained()
        assert [exchange(first), exchange(copy)] == [(0, 6), (6, 6)]

    def test_outside_of_a_server_the_model_s_name_counts(self, exchange, models):
        assert exchange(models[0], is_server=False) == (0, 6)
        with pytest.raises(InvalidArgument, match=r"kvtc\.model.*kvtc\.identity"):
            exchange("a served name", is_server=False)

    def test_the_weights_of_adapters_count(self, exchange, models, tmp_path):
        first, other = write_adapter(tmp_path / "first"), write_adapter(tmp_path / "other", seed=1)
        assert exchange(models[0]) == (0, 6)
        for path in (first, other):
            found = [exchange(models[0], lora_paths={"adapter": str(path)}) for _ in range(2)]
            assert found == [(0, 6), (6, 6)]
        with pytest.raises(InvalidArgument, match="no files at"):
            exchange(models[0], lora_paths={"adapter": "/no/such"})
        with pytest.raises(InvalidArgument, match=r"load_format is dummy.*kvtc\.identity"):
            exchange(models[0], load_format="dummy")

    def test_engines_of_different_page_sizes_share_a_store(self, exchange, models, options):
        assert [exchange(models[0], page) for page in (16, 32, 16, 32)] == [(0, 6), (0, 6), (6, 6), (6, 6)]
        with open_store(options["kvtc.store"]) as store:
            assert len(list(store.keys())) == 12


class TestLmcache:
    @pytest.fixture
    def exchange(self, options):
        """Stores a chunk and looks for it, as LMCache's server does -> (was it there, is it now, counts)."""
        helpers = test_lmcache_adapters
        with fake_lmcache():

            def exchanged(name, **more):
                adapter = helpers.make_adapter(options | more)
                key = ObjectKey(helpers.HASHES[0], name)
                found = []
                for _ in range(2):
                    task = adapter.submit_lookup_and_lock_task([key], {})
                    found.append(helpers.take(lambda task=task: adapter.query_lookup_and_lock_result(task)).test(0))
                    adapter.submit_store_task([key], [MemoryObj(chunk(0))])
                    helpers.take(adapter.pop_completed_store_tasks)
                buffer = helpers.empty()
                load = adapter.submit_load_task([key], [buffer])
                assert helpers.take(lambda: adapter.query_load_result(load)).test(0) is found[1]
                counts = adapter.report_status()
                adapter.close()
                return *found, counts.get("other_models", 0)

            yield exchanged

    def test_copies_share_entries_and_another_model_at_the_same_place_does_not(self, exchange, models):
        first, copy, trained = models
        told = {"kvtc.model": first}
        assert [exchange(first, **told), exchange(f"{first}/", **told)] == [(False, True, 0), (True, True, 0)]
        assert exchange(copy, **{"kvtc.model": copy}) == (True, True, 0)
        trained()
        assert [exchange(first, **told), exchange(copy, **{"kvtc.model": copy})] == [(False, True, 0), (True, True, 0)]

    def test_chunks_of_another_model_on_the_same_server_are_left_alone(self, exchange, models):
        found = exchange("another model", **{"kvtc.model": models[0]})
        assert found[:2] == (False, False)
        assert found[2] >= 5

    def test_without_files_the_user_names_the_weights(self, exchange, models):
        with pytest.raises(InvalidArgument, match=r"must give kvtc\.model.*or kvtc\.identity"):
            exchange(models[0])
        named = {"kvtc.identity": "mine"}
        assert [exchange("a", **named), exchange("b", **named), exchange("a", **named)] == [
            (False, True, 0),
            (False, True, 0),
            (True, True, 0),
        ]
        both = [exchange(name, **named, **{"kvtc.model": name}) for name in ("a", "b")]
        assert both == [(False, True, 0), (True, True, 0)]

    def test_the_serde_refuses_entries_of_another_model(self, options, models):
        helpers = test_lmcache_adapters
        del options["kvtc.store"]
        first, copy, trained = models
        with fake_lmcache() as lmcache:
            importlib.import_module("kvtc.engines.lmcache.serde")

            def serde(model):
                return lmcache.serdes["kvtc"]({**options, "kvtc.model": model})

            def key(model):
                return ObjectKey(helpers.HASHES[0], model)

            made = serde(first)
            layout = helpers.MemoryLayoutDesc([torch.Size(helpers.SHAPE)], [torch.bfloat16])
            size = made.serializer.estimate_serialized_size(layout)
            entry = MemoryObj(torch.zeros(size, dtype=torch.uint8))
            assert made.serializer.serialize(MemoryObj(chunk(0)), entry, key(first)) == size
            made.deserializer.deserialize(entry, helpers.empty(), key(first))
            serde(copy).deserializer.deserialize(entry, helpers.empty(), key(copy))
            with pytest.raises(UnknownModel, match="a chunk of the model another"):
                made.serializer.serialize(MemoryObj(chunk(0)), entry, key("another"))
            trained()
            with pytest.raises(CalibrationMismatch, match="of another model"):
                serde(first).deserializer.deserialize(entry, helpers.empty(), key(first))

    def test_the_remote_plugin_takes_the_model_that_lmcache_names(self, options, models):
        helpers = test_lmcache_adapters
        first, copy, trained = models
        with fake_lmcache():
            make = importlib.import_module("kvtc.engines.lmcache.remote").KvtcRemoteConnector

            def is_there(model, chunk_size=T):
                memory = helpers.Memory([(*helpers.SHAPE[:2], chunk_size, *helpers.SHAPE[3:])])
                memory.metadata.model_name, memory.metadata.chunk_size = model, chunk_size
                connector = make(None, memory, SimpleNamespace(extra_config=dict(options)))
                key = helpers.engine_key("a")
                found = connector.exists_sync(key)
                asyncio.run(connector.put(key, MemoryObj(chunk(256)[:, :, :chunk_size].contiguous())))
                assert relative(asyncio.run(connector.get(key)).tensor, chunk(256)[:, :, :chunk_size])
                asyncio.run(connector.close())
                return found

            def relative(found, expected):
                return found.shape == expected.shape

            assert [is_there(first), is_there(first), is_there(copy)] == [False, True, True]
            assert [is_there(first, 128), is_there(first, 128), is_there(first)] == [False, True, True]
            trained()
            assert [is_there(first), is_there(copy)] == [False, True]
            with pytest.raises(InvalidArgument, match=r"kvtc\.identity"):
                is_there("/no/such")


def test_a_safetensors_file_that_kvtc_wrote_is_read_as_one(tmp_path):
    """Data begins after the header, whatever its length and metadata."""
    tensors = weights()
    identities = set()
    for index, metadata in enumerate((None, {"format": "pt"}, {"format": "pt", "more": "x" * 1000})):
        place = tmp_path / str(index)
        place.mkdir()
        safetensors.torch.save_file(tensors, place / "model.safetensors", metadata)
        identities.add(files_identity(place))
    assert len(identities) == 1
