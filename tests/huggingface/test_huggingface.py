"""transformers models: what is supported, geometry and ranks, capture, and calibration's wiring."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from kvtc.cache import CacheGeometry, KVCache
from kvtc.calibration import Calibration
from kvtc.calibration.rows import CalibrationRows
from kvtc.codec.codec import Codec
from kvtc.codec.inspection import inspect
from kvtc.errors import GeometryMismatch, InvalidArgument, MissingDependency, UnsupportedModel
from kvtc.huggingface.calibrate import calibrate
from kvtc.huggingface.model_identity import calibrated_identity
from kvtc.huggingface.models import capture, geometry_of, keeps_every_token, verify_rope
from kvtc.huggingface.rope_discovery import context_length, rope_from_config
from kvtc.huggingface.sensitivity import READ_SHARE, Sensitivity
from tests.tiny_architectures import random_ids, read, tiny_config, tiny_model

transformers = pytest.importorskip("transformers")

SETTINGS: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
IDS = list(range(5, 35))


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SETTINGS)).float().eval()


def config(name: str, **changes: Any) -> Any:
    return getattr(transformers, f"{name}Config")(**{**SETTINGS, **changes})


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Mistral", {"sliding_window": 64}),
        ("Mistral", {"sliding_window": 4096}),
        ("Qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 2}),
        ("Gemma3Text", {}),
        ("Llama4Text", {}),
        ("Qwen3Next", {}),
        ("Jamba", {}),
        ("FalconH1", {}),
        ("Mamba", {}),
        ("Gemma4Text", {}),
    ],
)
def test_other_than_full_attention_is_noticed(name: str, changes: dict[str, Any]) -> None:
    assert not keeps_every_token(config(name, **changes))


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("gemma3_text", (2, 5)),
        ("gemma4_text", (1, 3)),
        ("gpt_oss", (1, 3)),
        ("qwen3_next", (3,)),
        ("jamba", (1, 3)),
        ("falcon_h1", (0, 1, 2, 3)),
        ("nemotron_h", (1,)),
        ("lfm2", (1, 3)),
        ("minimax_m3_vl_text", (0, 1, 2, 3)),
    ],
)
def test_the_geometry_is_of_the_layers_of_full_attention(name: str, layers: tuple[int, ...]) -> None:
    model = tiny_model(name)
    geometry = geometry_of(model)
    assert geometry == geometry_of(model.config)
    assert geometry.layers == layers
    cache = capture(model, IDS, geometry)
    assert cache.extent == geometry.extent
    assert verify_rope(model, geometry, IDS) < 1e-4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mamba2", "no layer of mamba2 keeps keys and values of every token; layer 0 is a linear_attention layer"),
        ("mistral", "no layer of mistral keeps keys and values of every token; layer 0 is a sliding_attention layer"),
    ],
)
def test_a_model_without_full_attention_has_no_geometry(name: str, message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        geometry_of(tiny_config(name))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Llama", {}),
        ("Mistral", {"sliding_window": None}),
        ("Qwen2", {"sliding_window": 64, "use_sliding_window": False}),
        ("Gemma3Text", {"layer_types": ["full_attention"] * 4}),
    ],
)
def test_full_attention_is_supported(name: str, changes: dict[str, Any]) -> None:
    assert keeps_every_token(config(name, **changes))


def test_geometry_of_a_model_and_of_its_config(llama: Any) -> None:
    geometry = geometry_of(llama)
    assert geometry == geometry_of(llama.config)
    assert geometry == CacheGeometry((0, 1, 2, 3), 0, 4, 8, 8, rope_from_config(llama.config))
    part = geometry_of(llama, layers=(1, 3), kv_heads=(2, 4))
    assert part == CacheGeometry((1, 2), 2, 2, 8, 8, geometry.rope.of_layers([1, 2]))


@pytest.mark.parametrize(
    ("name", "changes", "heads", "dim"),
    [
        ("GPTNeoX", {"num_key_value_heads": None}, 8, 8),
        ("Qwen3", {"head_dim": 16}, 4, 16),
        ("Falcon", {"multi_query": True}, 1, 8),
        ("Falcon", {"multi_query": False}, 8, 8),
        ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, 8, 8),
    ],
)
def test_heads_are_those_the_model_caches(name: str, changes: dict[str, Any], heads: int, dim: int) -> None:
    model = transformers.AutoModelForCausalLM.from_config(config(name, **changes))
    geometry = geometry_of(model)
    assert (geometry.n_kv_heads, geometry.head_dim) == (heads, dim)
    assert capture(model, IDS).keys.shape == (4, heads, len(IDS), dim)


@pytest.mark.parametrize("wanted", [(0, 5), (2, 2), (3, 1), (-1, 2)])
def test_ranges_outside_the_model_are_refused(llama: Any, wanted: tuple[int, int]) -> None:
    with pytest.raises(InvalidArgument, match=r"layers: expected .* <= 4, got"):
        geometry_of(llama, layers=wanted)
    with pytest.raises(InvalidArgument, match=r"kv_heads: expected .* <= 4, got"):
        geometry_of(llama.config, kv_heads=wanted)


def test_capture_returns_the_models_own_cache(llama: Any) -> None:
    cache = capture(llama, torch.tensor(IDS, dtype=torch.int32))
    with torch.no_grad():
        layers = llama(torch.tensor([IDS]), use_cache=True).past_key_values.layers
    assert torch.equal(cache.keys, torch.stack([layer.keys[0] for layer in layers]))
    assert torch.equal(cache.values, torch.stack([layer.values[0] for layer in layers]))
    assert cache.keys.is_contiguous()
    assert cache.values.is_contiguous()
    assert not cache.keys.is_inference()
    assert (cache.positions, cache.rope_length) == (None, None)
    cache.validate()
    geometry_of(llama).check(cache)


@pytest.mark.parametrize(("layers", "heads"), [((0, 2), (0, 4)), ((1, 4), (1, 3)), (None, (3, 4)), ((3, 4), None)])
def test_a_rank_is_a_slice_of_the_whole(llama: Any, layers: Any, heads: Any) -> None:
    whole = capture(llama, IDS)
    geometry = geometry_of(llama, layers, heads)
    part = capture(llama, IDS, geometry)
    geometry.check(part)
    rows, columns = slice(*(layers or (0, 4))), slice(*(heads or (0, 4)))
    assert torch.equal(part.keys, whole.keys[rows, columns])
    assert torch.equal(part.values, whole.values[rows, columns])
    assert part.keys.is_contiguous()


def test_a_text_read_in_pieces_gives_the_same_cache(llama: Any) -> None:
    whole = capture(llama, IDS)
    for piece_tokens in (1, 7, 30, 100):
        pieces = capture(llama, IDS, piece_tokens=piece_tokens)
        torch.testing.assert_close(pieces.keys, whole.keys, rtol=0, atol=2e-6)
        torch.testing.assert_close(pieces.values, whole.values, rtol=0, atol=2e-6)


def test_a_rotation_that_depends_on_the_length_reads_the_text_at_once() -> None:
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
    model = transformers.LlamaForCausalLM(config("Llama", max_position_embeddings=16, rope_parameters=rope)).eval()
    whole = capture(model, IDS)
    pieces = capture(model, IDS, piece_tokens=7)
    assert torch.equal(pieces.keys, whole.keys)
    assert pieces.rope_length == whole.rope_length


@pytest.mark.parametrize(
    ("name", "changes", "length"),
    [
        ("Llama", {}, 256),
        ("GPT2", {"n_positions": 300, "max_position_embeddings": 300}, 300),
        ("Bloom", {"max_position_embeddings": None}, None),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, 1024),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, 512),
        (
            "Llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16, "rope_theta": 1e4,
                    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                }
            },
            256,
        ),
    ],
)  # fmt: skip
def test_the_context_is_what_a_model_was_made_to_read(name: str, changes: dict[str, Any], length: int | None) -> None:
    assert context_length(config(name, **changes)) == length


def test_capture_computes_one_row_of_logits_without_dropout_and_restores_training(llama: Any) -> None:
    rows = []
    hook = llama.lm_head.register_forward_hook(lambda *call: rows.append(call[2].shape[1]))
    flags = [module.training for module in llama.modules()]
    llama.model.layers[1].train()
    mixed = [module.training for module in llama.modules()]
    try:
        capture(llama, IDS)
        assert [module.training for module in llama.modules()] == mixed != flags
        with pytest.raises(InvalidArgument):
            capture(llama, [])
        assert [module.training for module in llama.modules()] == mixed
    finally:
        hook.remove()
        llama.eval()
    assert rows == [1]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], r"one or more token ids in 0 \.\. 96, found none"),
        ([3, 97], r"in 0 \.\. 96, found 3 \.\. 97"),
        ([-1, 3], r"in 0 \.\. 96, found -1 \.\. 3"),
        ([[1, 2], [3, 4]], r"one sequence of integer token ids, got \(2, 2\)"),
        (7, r"one sequence of integer token ids, got \(\)"),
        ([1.0, 2.0], r"one sequence of integer token ids, got \(2,\) of torch.float32"),
        ("text", "expected a sequence of token ids"),
    ],
)
def test_token_ids_are_checked(llama: Any, ids: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        capture(llama, ids)


def test_a_geometry_of_another_model_is_refused(llama: Any) -> None:
    other = geometry_of(config("Llama", num_hidden_layers=6))
    with pytest.raises(GeometryMismatch, match=r"a model with 4 layers, .*; got layers 0\.\.5"):
        capture(llama, IDS, other)


def test_a_cache_of_unexpected_shape_is_refused() -> None:
    model = transformers.LlamaForCausalLM(config("Llama", num_key_value_heads=8))
    model.config.num_key_value_heads = 4
    with pytest.raises(UnsupportedModel, match=r"layer 0 caches keys \(1, 8, 30, 8\) .*; expected \(1, 4, 30, 8\)"):
        capture(model, IDS)


def test_without_transformers_the_message_says_what_to_install(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for call in (keeps_every_token, rope_from_config, geometry_of):
        with pytest.raises(MissingDependency, match=r'pip install "kvtc\[hf\]"'):
            call(llama.config)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="transformers model or config, got str"):
        keeps_every_token("llama")
    with pytest.raises(InvalidArgument, match="transformers model or config, got Linear"):
        geometry_of(nn.Linear(2, 2))
    with pytest.raises(UnsupportedModel, match="blt has no num_hidden_layers"):
        keeps_every_token(transformers.BltConfig())


class Seen(CalibrationRows):
    """Keeps the caches and hidden states that it is given, and the options that it is made with."""

    made: ClassVar[list[Seen]] = []

    def __init__(self, geometry: CacheGeometry, **options: Any) -> None:
        super().__init__(geometry, **options | {"device": "cpu"})
        self.options, self.caches, self.states = options, list[KVCache](), list[Tensor]()
        self.made.append(self)

    def add(self, cache: KVCache, hidden: Tensor | None = None) -> None:
        super().add(cache, hidden)
        self.caches.append(cache)
        self.states.append(hidden)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    monkeypatch.setattr("kvtc.huggingface.calibrate.CalibrationRows", Seen)
    monkeypatch.setattr(Seen, "made", [])
    return Seen.made


def quiet(model: Any, sequences: Any, **options: Any) -> Calibration:
    return calibrate(model, sequences, progress=False, **options)


def test_calibrate_passes_every_usable_sequence_once(llama: Any, seen: list[Seen]) -> None:
    sequences: list[list[int] | Tensor] = [[1, 2, 3, 4], IDS, torch.tensor(IDS[:9]), [], IDS[:5]]
    found = quiet(llama, iter(sequences), layers=(0, 2), kv_heads=(1, 3), profiles=("paper",), rank=7)
    (rows,) = seen
    assert found.geometry == rows.geometry == geometry_of(llama, (0, 2), (1, 3))
    assert (found.key.basis.rank, found.profiles) == (7, ("paper",))
    assert [cache.n_tokens for cache in rows.caches] == [30, 9, 5]
    assert torch.equal(rows.caches[1].keys, capture(llama, IDS[:9], rows.geometry).keys)
    parameters = sum(parameter.numel() for parameter in llama.parameters())
    of_model = {"model_parameters": parameters, "model_identity": calibrated_identity(llama)}
    assert of_model.items() <= found.info.items()
    assert (rows.options["sink_tokens"], rows.options["device"]) == (4, torch.device("cpu"))
    quiet(llama, sequences[1:2], profiles=("paper",), device="elsewhere")
    assert seen[1].options["device"] == "elsewhere"


def test_calibrate_verifies_on_a_bounded_prefix_and_captures_until_there_are_tokens_enough(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    hook = llama.model.embed_tokens.register_forward_hook(lambda *call: lengths.append(call[1][0].shape[-1]))
    monkeypatch.setattr("kvtc.huggingface.calibrate._VERIFICATION_TOKENS", 12)
    given = iter([[index] * 20 for index in range(4)])
    quiet(llama, given, sink_tokens=0, max_tokens=21, joint_rank=8)
    hook.remove()
    # Of each text three quarters are read, and the rest is predicted.
    assert (lengths, len(list(given))) == ([12, 15, 5, 15, 5], 2)


def test_calibrate_gives_each_cache_its_own_hidden_states(llama: Any, seen: list[Seen]) -> None:
    sequences = [list(range(start, start + 25)) for start in (3, 40, 9)]
    quiet(llama, sequences, joint_rank=8, recompute_layers=2)
    for ids, found in zip(sequences, seen[0].states, strict=True):
        with torch.no_grad():
            expected = llama(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    quiet(llama, sequences, layers=(1, 2), profiles=("joint",), joint_rank=8)
    assert seen[1].hidden_width == 0
    assert not llama.model.layers[2]._forward_pre_hooks


@pytest.mark.parametrize(("layers", "wrong", "most"), [(None, 0, 3), (None, 4, 3), ((1, 3), 3, 2)])
def test_calibrate_refuses_to_recompute_what_leaves_nothing(llama: Any, layers: Any, wrong: int, most: int) -> None:
    with pytest.raises(InvalidArgument, match=rf"recompute_layers must lie in 1 \.\. {most}; got {wrong}"):
        quiet(llama, [IDS], layers=layers, recompute_layers=wrong)


def test_calibrate_holds_sequences_out_of_a_whole_model_alone(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics are captured from all the others; quality is measured on what was held out."""
    captured: list[int] = []
    measured: list[list[int]] = []
    usual = Sensitivity.capture

    def capturing(self: Sensitivity, ids: Tensor) -> list[KVCache]:
        captured.append(int(ids[0]))
        return usual(self, ids)

    def measuring(_model: Any, calibration: Calibration, sequences: list[Tensor]) -> Calibration:
        measured.append([int(ids[0]) for ids in sequences])
        return calibration

    monkeypatch.setattr(Sensitivity, "capture", capturing)
    monkeypatch.setattr("kvtc.huggingface.calibrate.measure_quality", measuring)
    monkeypatch.setattr("kvtc.huggingface.measure_quality.LEAST_TOKENS", 30)
    monkeypatch.setattr("kvtc.huggingface.measure_quality._HELD_OUT_EVERY", 2)
    sequences = [[index, *IDS] for index in range(4)]
    quiet(llama, sequences, profiles=("joint",), joint_rank=8)
    assert (captured, measured) == ([0, 2], [[1, 3]])
    quiet(llama, sequences, profiles=("joint",), joint_rank=8, kv_heads=(0, 2))
    assert (captured, measured) == ([0, 2, 0, 1, 2, 3], [[1, 3]])


def test_logits_of_the_text_that_is_only_read_are_not_computed(llama: Any) -> None:
    """Of a large vocabulary they would take more time and memory than the layers."""
    computed: list[int] = []
    hook = llama.lm_head.register_forward_hook(lambda _module, _inputs, output: computed.append(output.shape[1]))
    try:
        Sensitivity(llama, [geometry_of(llama)], sink_tokens=4).capture(torch.tensor(IDS))
    finally:
        hook.remove()
    assert computed == [1, len(IDS) - int(READ_SHARE * len(IDS))]


def test_calibrate_refuses_what_cannot_be_calibrated(llama: Any, seen: list[Seen]) -> None:
    with pytest.raises(InvalidArgument, match="at least one sequence of more than 4 tokens, found none"):
        quiet(llama, [[1, 2, 3]])
    with pytest.raises(InvalidArgument, match="one sequence of integer token ids"):
        quiet(llama, [[IDS, IDS]])
    mistral = transformers.MistralForCausalLM(config("Mistral", sliding_window=64))
    with pytest.raises(UnsupportedModel, match="no layer of this model has full attention"):
        quiet(mistral, [IDS])
    hunyuan = transformers.AutoModelForCausalLM.from_config(config("HunYuanDenseV1", head_dim=8))
    for parameter in hunyuan.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0, 0.2)
    with pytest.raises(UnsupportedModel, match=r"layer 0 \(HunYuanDenseV1Attention\): un-rotated keys differ"):
        quiet(hunyuan, [IDS])
    assert not any(rows.caches for rows in seen)


@pytest.mark.parametrize(("name", "layers"), [("gemma3_text", (2, 5)), ("qwen3_next", (3,)), ("nemotron_h", (1,))])
def test_full_attention_beside_other_layers_is_calibrated_and_coded(name: str, layers: tuple[int, ...]) -> None:
    """Gradients are taken of the calibrated layers alone; other layers come back bit for bit, but for windows with joint."""
    model, texts = tiny_model(name), random_ids(4, 80)
    calibration = calibrate(model, list(texts), profiles=("paper", "joint"), joint_rank=16, progress=False)
    assert calibration.geometry.layers == layers
    _, cache = read(model, texts[:1, :60])
    for profile in ("paper", "joint"):
        codec = Codec(calibration, profile, ratio=4, window_tokens=4, chunk_tokens=16, states="lossless")
        stream = codec.encode(cache, texts[0, :60])
        info, back = inspect(stream), codec.decode(stream, texts[0, :60])
        assert info.groups[0].layers == layers
        codes_windows = profile == "joint"
        expected = [group.kind == "sliding window" and codes_windows for group in info.groups[1:]]
        assert [group.is_coded for group in info.groups] == [True, *expected]
        for index, (found, exact) in enumerate(zip(back.layers, cache.layers, strict=True)):
            if index in layers:
                assert not torch.equal(found.keys, exact.keys)
                assert torch.equal(found.keys[:, :, :4], exact.keys[:, :, :4])
            elif isinstance(getattr(exact, "keys", None), Tensor):
                assert torch.equal(found.keys, exact.keys) is not codes_windows
            elif hasattr(exact, "recurrent_states"):
                assert torch.equal(found.recurrent_states[0], exact.recurrent_states[0])
        assert read(model, texts[:1, 60:], back)[0].isfinite().all()
