"""A calibration covers the sliding windows of a model beside its full attention, from one pass over the text."""

from __future__ import annotations

import copy

import pytest
import torch

import kvtc
from kvtc.calibration.checkpoint import Checkpoint
from kvtc.calibration.rows import CalibrationRows
from kvtc.codec.codec import Codec
from kvtc.errors import UnsupportedModel
from kvtc.huggingface.calibrate import accumulate
from kvtc.huggingface.models import capture_groups
from kvtc.huggingface.sensitivity import Sensitivity
from kvtc.huggingface.support import covered_geometries
from kvtc.prefix_cache import PrefixCache
from kvtc.store import open_store
from tests.tiny_architectures import WINDOW, random_ids, read, tiny_model

CHUNK = 16


@pytest.fixture(scope="module")
def gemma():
    return tiny_model("gemma3_text")


@pytest.fixture(scope="module")
def calibration(gemma):
    texts = random_ids(24, 60)
    return kvtc.calibrate(gemma, texts, profiles=("joint",), max_tokens=1000, progress=False)


def test_windows_and_full_attention_are_calibrated_together(gemma, calibration):
    full, windows = calibration.groups
    assert (full.geometry.layers, windows.geometry.layers) == ((2, 5), (0, 1, 3, 4))
    assert windows.geometry.is_window
    # Each kind of layer has a rotation of its own.
    assert full.geometry.rope.tables != windows.geometry.rope.tables
    assert [group.is_coded for group in kvtc.supported(gemma.config).groups] == [True, True]


def test_every_token_of_a_window_is_captured(gemma):
    """Not only those that a window still holds at the end."""
    geometries, ids = covered_geometries(gemma), random_ids(1, 50)[0]
    full, windows = capture_groups(gemma, ids, geometries)
    assert (full.n_tokens, windows.n_tokens) == (50, 50)
    for n in (WINDOW - 1, 40, 50):
        _, cache = read(gemma, ids[None, :n])
        held = cache.layers[1].keys[0]
        torch.testing.assert_close(windows.keys[1, :, n - held.shape[1] : n], held, rtol=1e-4, atol=1e-5)
    pieces = capture_groups(gemma, ids, geometries, piece_tokens=7)[1]
    torch.testing.assert_close(pieces.values, windows.values, rtol=1e-4, atol=1e-5)
    # Gradients come from the rows that the window holds when the model goes on.
    sensitivity = Sensitivity(gemma, geometries, sink_tokens=4)
    again = sensitivity.capture(ids)
    torch.testing.assert_close(again[1].keys, windows.keys, rtol=1e-4, atol=1e-5)
    of_full, of_windows = sensitivity.samples()
    assert (len(of_full.rows), len(of_windows.rows)) == (37 - 4, WINDOW - 1)
    assert bool((of_windows.sizes > 0).any())


def test_an_interrupted_pass_over_the_text_goes_on(gemma, tmp_path):
    geometries, texts = covered_geometries(gemma), random_ids(6, 40)

    def gathered(checkpoint: Checkpoint | None, n: int) -> tuple[list[CalibrationRows], Sensitivity]:
        rows = [CalibrationRows(geometry, max_tokens=1000) for geometry in geometries]
        sensitivity = Sensitivity(gemma, geometries, sink_tokens=4)
        accumulate(gemma, texts[:n], rows, sensitivity, checkpoint=checkpoint)
        return rows, sensitivity

    gathered(Checkpoint(tmp_path, "owner"), 4)
    rows, sensitivity = gathered(Checkpoint(tmp_path, "owner"), 6)
    expected, its = gathered(None, 6)
    for found, wanted in zip(rows, expected, strict=True):
        assert torch.equal(found.sample(50, 0)[0], wanted.sample(50, 0)[0])
        torch.testing.assert_close(found.moments.covariance().mean, wanted.moments.covariance().mean)
    for found, wanted in zip(sensitivity.samples(), its.samples(), strict=True):
        assert torch.equal(found.directions, wanted.directions)


@pytest.mark.parametrize("n_tokens", [WINDOW - 2, WINDOW, 3 * WINDOW + 5])
def test_the_model_goes_on_after_decoding(gemma, calibration, n_tokens):
    """With a fine step the next predictions are nearly those of the exact cache, and generate continues."""
    codec, ids = Codec(calibration, step=1e-3, sink_tokens=1, window_tokens=2, chunk_tokens=CHUNK), random_ids(1, 70)
    _, cache = read(gemma, ids[:, :n_tokens])
    stream = codec.encode(cache, ids[0, :n_tokens])
    assert [group.is_coded for group in kvtc.inspect(stream).groups] == [True, True]
    back = codec.decode(stream, ids[0, :n_tokens])
    expected = gemma.generate(
        ids[:, : n_tokens + 1], past_key_values=copy.deepcopy(cache), max_new_tokens=5, do_sample=False
    )
    found = gemma.generate(
        ids[:, : n_tokens + 1], past_key_values=copy.deepcopy(back), max_new_tokens=5, do_sample=False
    )
    assert torch.equal(found, expected)
    wanted, _ = read(gemma, ids[:, n_tokens : n_tokens + 9], cache)
    logits, _ = read(gemma, ids[:, n_tokens : n_tokens + 9], back)
    torch.testing.assert_close(logits, wanted, rtol=0.05, atol=0.02)


def test_coded_windows_in_a_prefix_cache(gemma, calibration):
    """Points are coded, too; a longer text is resumed at the last point that it shares."""
    codec, ids = Codec(calibration, step=1e-3, sink_tokens=1, window_tokens=2, chunk_tokens=CHUNK), random_ids(1, 90)
    points, cache = kvtc.ResumePoints(2 * CHUNK), None
    for start in range(0, 80, CHUNK):
        _, cache = read(gemma, ids[:, start : start + CHUNK], cache)
        points.take(cache, start + CHUNK)
    with open_store("memory:") as store, PrefixCache(codec, store, min_tokens=1, resume_every=2 * CHUNK) as prefixes:
        prefixes.save(ids[0, :80], cache, points).result()
        sizes = {key: len(store.get(key)) for key in store.keys() if key.startswith("point")}  # noqa: SIM118
        assert len(sizes) == 3
        row_bytes = 4 * 2 * 2 * 8 * 4
        assert max(sizes.values()) < 0.8 * (WINDOW - 1) * row_bytes
        for asked, n in ((90, 80), (75, 64), (40, 32)):
            found, n_found = prefixes.load(ids[0, :asked], whole=True)
            assert n_found == n
            _, exact = read(gemma, ids[:, :n])
            for layer in range(6):
                assert found.layers[layer].keys.shape == exact.layers[layer].keys.shape
                torch.testing.assert_close(found.layers[layer].values, exact.layers[layer].values, rtol=0.05, atol=0.02)


def test_a_model_of_windows_alone():
    """Its windows are the first group, and joint alone codes them."""
    model = tiny_model("mistral")
    with pytest.raises(UnsupportedModel, match="no layer of this model has full attention"):
        kvtc.calibrate(model, random_ids(2, 40), profiles=("joint", "paper"), max_tokens=60, progress=False)
    calibration = kvtc.calibrate(model, random_ids(16, 40), profiles=("joint",), max_tokens=500, progress=False)
    assert calibration.geometry.is_window
    codec, ids = Codec(calibration, step=1e-3, sink_tokens=1, window_tokens=2, chunk_tokens=CHUNK), random_ids(1, 50)
    _, cache = read(model, ids)
    stream = codec.encode(cache, ids[0])
    info = kvtc.inspect(stream)
    assert [group.is_coded for group in info.groups] == [True]
    assert info.body_ratio > 1
    back = codec.decode(stream, ids[0])
    for layer, exact in zip(back.layers, cache.layers, strict=True):
        torch.testing.assert_close(layer.keys, exact.keys, rtol=0.05, atol=0.02)
        assert torch.equal(layer.keys[:, :, -2:], exact.keys[:, :, -2:])
    lossless = Codec(calibration, lossless=True, chunk_tokens=CHUNK)
    assert torch.equal(lossless.decode(lossless.encode(cache)).layers[0].keys, cache.layers[0].keys)


@pytest.mark.parametrize(
    "name", ["gemma2", "gemma4_text", "gpt_oss", "cohere2", "olmo3", "mimo_v2_flash", "llama4_text"]
)
def test_the_windows_of_many_models(name):
    """Of other shapes than full attention, of two widths, of chunked attention: what `supported` says is done."""
    model = tiny_model(name)
    said = kvtc.supported(model.config)
    calibration = kvtc.calibrate(model, random_ids(6, 40), profiles=("joint",), max_tokens=200, progress=False)
    codec, ids = Codec(calibration, step=1e-3, sink_tokens=1, window_tokens=2, chunk_tokens=CHUNK), random_ids(1, 45)
    _, cache = read(model, ids)
    stream = codec.encode(cache, ids[0])
    coded = [(group.kind, group.layers) for group in kvtc.inspect(stream).groups if group.is_coded]
    assert coded == [(group.kind, group.layers) for group in said.groups if group.is_coded]
    assert {kind for kind, _ in coded} == {"full attention", "sliding window"}
    back = codec.decode(stream, ids[0])
    for found, exact in zip(back.layers, cache.layers, strict=True):
        if isinstance(getattr(exact, "keys", None), torch.Tensor):
            torch.testing.assert_close(found.keys, exact.keys, rtol=0.05, atol=0.02)
            torch.testing.assert_close(found.values, exact.values, rtol=0.05, atol=0.02)
