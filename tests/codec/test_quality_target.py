"""A codec that is asked for a quality, and the curve that it goes by."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import kvtc
from kvtc.calibration import load_calibration
from kvtc.calibration.quality_curve import QualityCurve
from kvtc.codec.codec import Codec
from kvtc.demo.run import CONVERSATION
from kvtc.errors import CorruptCalibration, InvalidArgument
from kvtc.evaluate.quality import evaluate_continuation
from kvtc.huggingface.continuation import mean_divergence
from kvtc.huggingface.measure_quality import LEAST_TOKENS, HeldOut, _upper_mean, measure_quality
from kvtc.profiles.rates import Step
from tests.builders import (
    joint_calibration,
    joint_codec,
    rewritten,
    same_cache,
    tiny_calibration,
    tiny_codec,
    told_cache,
    told_codec,
    told_ids,
)

CURVE = QualityCurve(np.array([0.1, 1.0, 10.0]), np.array([1e-4, 1e-3, 1e-1]))


@pytest.fixture(scope="module")
def with_curve() -> kvtc.Calibration:
    return replace(joint_calibration(), quality={"joint": CURVE})


def test_a_step_lies_between_measured_ones():
    assert CURVE.step_for(1e-3) == pytest.approx(1.0)
    assert CURVE.step_for(1e-4) == pytest.approx(0.1)
    assert CURVE.step_for(1e-2) == pytest.approx(10**0.5)


@pytest.mark.parametrize("kl", [9e-5, 0.11, 0.0, -1.0, float("nan")])
def test_what_was_not_measured_is_refused(kl):
    with pytest.raises(InvalidArgument, match=r"outside of what was measured: 0.0001 \.\. 0.1"):
        CURVE.step_for(kl)


def test_noise_does_not_make_quality_fall_with_the_step():
    curve = QualityCurve.from_measurements([4.0, 1.0, 2.0, 8.0], [3e-3, 2e-3, 1e-3, 5e-3])
    assert curve.steps.tolist() == [1, 2, 4, 8]
    assert curve.kl.tolist() == [2e-3, 2e-3, 3e-3, 5e-3]
    assert curve.step_for(2e-3) == pytest.approx(2.0)


def test_a_codec_takes_the_step_of_its_target(with_curve):
    codec = Codec(with_curve, "joint", kl=1e-3, window_tokens=0)
    assert codec.rate.step == pytest.approx(1.0)
    cache = told_cache(100)
    same = Codec(with_curve, "joint", step=codec.rate.step, window_tokens=0)
    assert codec.encode(cache) == same.encode(cache)


@pytest.mark.parametrize("kl", [0, 5e-5])
def test_below_the_curve_nothing_is_lost(with_curve, kl):
    codec = Codec(with_curve, "joint", kl=kl)
    cache = told_cache(300)
    assert codec.is_lossless
    assert same_cache(codec.decode(codec.encode(cache)), cache)


def test_a_curve_is_what_the_mean_over_many_texts_does_not_exceed():
    # Mean 2, standard error 1, and Student's t of one degree of freedom.
    assert _upper_mean([1.0, 3.0]) == pytest.approx(2 + 6.31)
    assert _upper_mean([1.0] * 40 + [3.0] * 40) == pytest.approx(2 + 1.75 / 79**0.5)
    assert _upper_mean([0.5]) == 0.5


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"profile": "joint", "kl": -1.0}, "outside of what was measured"),
        ({"profile": "joint", "kl": 1.0}, "outside of what was measured"),
        ({"profile": "conditional", "kl": 1e-3}, "no measured quality of the profile conditional.*measure_quality"),
        ({"profile": "paper", "kl": 1e-3}, "paper has no step"),
        ({"profile": "joint", "kl": 1e-3, "ratio": 8}, "not several"),
        ({"profile": "joint", "kl": 1e-3, "step": 1.0}, "not several"),
        ({"profile": "joint", "kl": 1e-3, "fixed_size": True}, "needs a ratio"),
    ],
)
def test_targets_that_cannot_be_are_refused(with_curve, options, expected):
    with pytest.raises(InvalidArgument, match=expected):
        Codec(with_curve, **options)


def test_the_curve_is_kept_in_the_file_and_not_in_the_fingerprint(with_curve, tmp_path):
    with_curve.save(tmp_path / "c")
    loaded = load_calibration(tmp_path / "c")
    assert list(loaded.quality) == ["joint"]
    np.testing.assert_array_equal(loaded.quality["joint"].tensor(), CURVE.tensor())
    assert loaded.fingerprint == joint_calibration().fingerprint
    stream = Codec(loaded, "joint", kl=1e-3).encode(told_cache(200))
    assert told_codec("joint").decode(stream).n_tokens == 200


@pytest.mark.parametrize(
    ("steps", "kl"),
    [([1.0], [1.0]), ([1.0, 1.0], [1.0, 2.0]), ([1.0, 2.0], [2.0, 1.0]), ([-1.0, 2.0], [1.0, 2.0]), ([1.0, 2.0], [0.0, 1.0]),
     ([1.0, np.inf], [1.0, 2.0]), ([1.0, 2.0], [1.0, np.nan])],
)  # fmt: skip
def test_what_is_no_curve_is_neither_read_nor_written(with_curve, tmp_path, steps, kl):
    curve = QualityCurve(np.array(steps), np.array(kl))
    with pytest.raises(CorruptCalibration, match=r"quality\.joint (must hold|holds)"):
        replace(with_curve, quality={"joint": curve}).save(tmp_path / "c")
    assert not (tmp_path / "c").exists()
    with_curve.save(tmp_path / "c")
    rewritten(tmp_path / "c", lambda _, tensors: tensors.update({"quality.joint": curve.tensor()}))
    with pytest.raises(CorruptCalibration, match=r"quality\.joint (must hold|holds)"):
        load_calibration(tmp_path / "c")


def test_another_step_with_the_same_matrices():
    codec = joint_codec("conditional", step=4.0)
    finer = codec.with_rate(Step(0.5))
    cache, ids = told_cache(60), told_ids(60)
    expected = joint_codec("conditional", step=0.5)
    assert finer.encode(cache, ids) == expected.encode(cache, ids)
    assert codec.encode(cache, ids) == joint_codec("conditional", step=4.0).encode(cache, ids)
    assert same_cache(finer.decode(finer.encode(cache, ids), ids), expected.decode(expected.encode(cache, ids), ids))
    with pytest.raises(InvalidArgument, match="serves steps of"):
        codec.with_rate(Step(1e9))
    with pytest.raises(InvalidArgument, match="has no step"):
        tiny_codec().with_rate(Step(1.0))
    with pytest.raises(InvalidArgument, match="have a fixed size"):
        joint_codec(ratio=8, fixed_size=True).with_rate(Step(1.0))


def test_every_sixteenth_long_sequence_is_held_out():
    held_out = HeldOut()
    sequences = [torch.full((LEAST_TOKENS - n % 2,), n) for n in range(400)]
    rest = [ids for ids in sequences if not held_out.takes(ids)]
    assert [int(ids[0]) for ids in held_out.sequences] == [30 + 32 * n for n in range(8)]
    assert len(rest) == 392


@pytest.fixture(scope="module")
def conversation() -> tuple[object, list[torch.Tensor]]:
    """The reference model, and a sequence as short as can be measured on."""
    pytest.importorskip("transformers")
    model, tokenizer = kvtc.reference_model()
    ids = tokenizer(CONVERSATION.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    parts = [ids[start : start + LEAST_TOKENS - 1] for start in (0,)]
    return model, [torch.tensor([tokenizer.bos_token_id, *part]) for part in parts]


def test_quality_is_measured_where_it_is_promised(conversation, monkeypatch):
    """Nothing but sinks exact, short sequences left out; asked for a measured KL, a codec takes the step it was measured at."""
    model, sequences = conversation
    monkeypatch.setattr("kvtc.huggingface.measure_quality.RATIOS", (16, 128))
    calibration = measure_quality(model, kvtc.reference_calibration(), [*sequences, sequences[0][:50]])
    assert set(calibration.quality) == {"joint", "conditional"}
    assert calibration.info["n_quality_sequences"] == 1
    assert calibration.fingerprint == kvtc.reference_calibration().fingerprint
    for profile, curve in calibration.quality.items():
        assert len(curve.steps) == 2
        assert 0 < curve.kl[0] < 0.5 * curve.kl[1] < 0.05
        codec = Codec(calibration, profile, kl=float(curve.kl[1]), window_tokens=0, model=model)
        assert codec.rate.step == pytest.approx(curve.steps[1])
        found = evaluate_continuation(model, sequences[0], {"": codec}, 128)[0]
        assert found.kl == pytest.approx(curve.kl[1], rel=0.9)


def test_divergence_of_equal_predictions_is_zero():
    one = torch.randn(4, 9).log_softmax(dim=-1)
    assert mean_divergence(one, one) == 0
    assert mean_divergence(one, torch.randn(4, 9).log_softmax(dim=-1)) > 0


def test_what_cannot_be_measured_is_refused(conversation):
    model, sequences = conversation
    with pytest.raises(InvalidArgument, match="at least 384 tokens"):
        measure_quality(model, kvtc.reference_calibration(), [sequences[0][:100]])
    with pytest.raises(InvalidArgument, match="paper alone"):
        measure_quality(model, tiny_calibration(), sequences)


def test_the_shipped_calibration_has_curves():
    quality = kvtc.reference_calibration().quality
    assert set(quality) == {"joint", "conditional"}
    for curve in quality.values():
        assert curve.kl[0] < 0.0005
        assert curve.kl[-1] > 0.01
