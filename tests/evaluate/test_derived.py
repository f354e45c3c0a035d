"""Figures that follow from a sweep, by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtc.evaluate.derived import MEAN_OF_TASKS, _student_t, fewer_bytes, ratio_at_kl, within_a_point
from kvtc.evaluate.method_names import split_name
from kvtc.evaluate.quality import Quality
from kvtc.evaluate.schema import ScoreRecord


def quality(name, ratio, kl) -> Quality:
    body, total = round(1_000_000 / ratio), round(2_000_000 / ratio)
    return Quality(
        name=name, n_documents=1, n_tokens=100, body_tokens=50, original_bytes=2_000_000, body_bytes=body, total_bytes=total,
        body_ratio=ratio, total_ratio=ratio / 2, n_continuation=10, kl=kl, top1_agreement=1.0, perplexity_exact=2.0, perplexity=2.0,
        prefill_seconds=0.0, encode_seconds=0.0, decode_seconds=0.0,
    )  # fmt: skip


def score(codec, task, exact, ratio, tokens=1.0) -> ScoreRecord:
    return ScoreRecord(
        task=task, codec=codec, context=1000, n_contexts=1, n_questions=10, exact=exact, tokens=tokens, kl=0.0, by_depth=[],
        body_ratio=ratio, total_ratio=ratio and ratio / 2, window_tokens=128,
    )  # fmt: skip


def test_between_points_a_curve_is_straight_on_logarithms():
    curve = [(8.0, 1e-3), (32.0, 1e-1)]
    found, is_bound = ratio_at_kl(curve, 1e-2)
    assert found == pytest.approx(16)
    assert not is_bound


def test_beyond_its_ends_a_curve_gives_a_bound_or_nothing():
    curve = [(32.0, 1e-1), (8.0, 1e-3)]
    assert ratio_at_kl(curve, 0.5) == (32.0, True)
    assert ratio_at_kl(curve, 1e-4) == (None, False)
    assert ratio_at_kl([], 1.0) == (None, False)


def test_where_a_curve_is_flat_or_falls_the_highest_ratio_counts():
    curve = [(8.0, 3e-4), (16.0, 2e-4), (32.0, 4e-4), (64.0, 8e-4)]
    found, _ = ratio_at_kl(curve, 4e-4)
    assert found == pytest.approx(32)
    assert ratio_at_kl(curve, 1e-4)[0] is None


@given(
    st.lists(
        st.tuples(st.floats(1, 1e3), st.floats(1e-6, 10)), min_size=1, max_size=6, unique_by=lambda point: point[0]
    ),
    st.floats(1e-6, 10),
)
def test_a_curve_never_gives_more_than_was_measured(curve, kl):
    found, is_bound = ratio_at_kl(curve, kl)
    if found is None:
        assert all(point_kl > kl for _, point_kl in curve)
    else:
        reached = [ratio for ratio, point_kl in curve if point_kl <= kl]
        assert max(reached) * (1 - 1e-9) <= found <= max(ratio for ratio, _ in curve) * (1 + 1e-9)
        assert not is_bound or math.isclose(found, max(ratio for ratio, _ in curve))


def test_fewer_bytes_compares_the_profiles_with_every_other_point():
    measured = [quality("paper 8x", 8.0, 1e-2), quality("joint 16x", 16.0, 1e-3), quality("joint 64x", 64.0, 1e-1),
                quality("KIVI 2-bit", 4.0, 1e-1), quality("zstd", 1.5, 0.0)]  # fmt: skip
    found = {(figure.at, figure.series): figure for figure in fewer_bytes({128: measured})}
    assert set(found) == {("paper 8x", "joint"), ("joint 16x", "paper"), ("joint 64x", "paper"), ("KIVI 2-bit", "paper"),
                          ("KIVI 2-bit", "joint")}  # fmt: skip
    assert found["paper 8x", "joint"].body_factor == pytest.approx(4)
    assert found["paper 8x", "joint"].total_factor == pytest.approx(4)
    assert found["joint 16x", "paper"].body_factor is None
    assert (found["KIVI 2-bit", "joint"].body_factor, found["KIVI 2-bit", "joint"].is_bound) == (
        pytest.approx(16),
        True,
    )


def test_within_a_point_stops_at_the_first_ratio_that_is_not():
    scores = [
        score("exact cache", "needle", 0.9, None), score("exact cache", "copy", 0.0, None, tokens=0.8),
        score("exact cache", "variables", 0.0, None),
        *(score(f"paper {r}x", "needle", e, float(r)) for r, e in ((8, 0.91), (16, 0.5), (32, 0.9))),
        *(score(f"paper {r}x", "copy", 0.0, float(r), tokens=t) for r, t in ((8, 0.8), (16, 0.795), (32, 0.8))),
        *(score(f"paper {r}x", "variables", 0.0, float(r)) for r in (8, 16, 32)),
    ]  # fmt: skip
    found = {figure.task: figure for figure in within_a_point(scores)}
    assert set(found) == {"needle", "copy", MEAN_OF_TASKS}
    assert (found["needle"].setting, found["needle"].body_ratio, found["needle"].total_ratio) == ("8x", 8.0, 4.0)
    assert not found["needle"].is_bound
    assert (found["copy"].setting, found["copy"].is_bound) == ("32x", True)
    assert found[MEAN_OF_TASKS].setting == "8x"


def test_within_a_point_may_hold_for_nothing():
    scores = [score("exact cache", "needle", 0.9, None), score("KIVI 2-bit", "needle", 0.2, 5.0)]
    assert {figure.setting for figure in within_a_point(scores)} == {None}


@pytest.mark.parametrize(
    ("name", "series", "setting"),
    [("paper 16x", "paper", "16x"), ("FP8", "FP8", ""), ("H2O 1/8", "H2O", "1/8"), ("exact cache", "exact cache", ""),
     ("GEAR (rank 1) 2-bit", "GEAR (rank 1)", "2-bit"), ("window 16, 64x", "window 16", "64x"),
     ("TOVA 1/4 + conditional 16x", "TOVA 1/4 + conditional", "16x")],
)  # fmt: skip
def test_names_fall_into_series_and_setting(name, series, setting):
    assert split_name(name) == (series, setting)


def by_text(name, ratios, kls) -> Quality:
    """A method on texts of one length, each with its ratio and its KL."""
    sizes = [round(1_000_000 / ratio) for ratio in ratios]
    kl, ratio = sum(kls) / len(kls), len(sizes) * 1_000_000 / sum(sizes)
    return replace(quality(name, ratio, kl), kl_by_text=list(kls), body_bytes_by_text=sizes)


def test_a_factor_has_an_interval_over_texts():
    point = by_text("paper 8x", [8.0] * 4, [1e-2] * 4)
    # At 16x and 64x of the series, every text has the KL of the point half way on logarithms: exactly 4 times fewer bytes.
    same = [by_text("joint 16x", [16.0] * 4, [1e-3] * 4), by_text("joint 64x", [64.0] * 4, [1e-1] * 4)]
    (figure,) = [one for one in fewer_bytes({0: [point, *same]}) if one.at == "paper 8x"]
    assert figure.body_low == pytest.approx(4)
    assert figure.body_high == pytest.approx(4)
    differing = [
        by_text("joint 16x", [16.0] * 4, [1e-3] * 4),
        by_text("joint 64x", [64.0] * 4, [5e-2, 8e-2, 2e-1, 7e-2]),
    ]
    (figure,) = [one for one in fewer_bytes({0: [point, *differing]}) if one.at == "paper 8x"]
    logs = []
    for left_out in range(4):
        kl = (0.4 - [5e-2, 8e-2, 2e-1, 7e-2][left_out]) / 3
        share = math.log(1e-2 / 1e-3) / math.log(kl / 1e-3)
        logs.append(math.log(16 * 4**share / 8))
    deviation = math.sqrt(3 / 4 * sum((log - sum(logs) / 4) ** 2 for log in logs))
    assert math.log(figure.body_high / figure.body_factor) == pytest.approx(3.182 * deviation, rel=0.01)
    assert figure.body_low * figure.body_high == pytest.approx(figure.body_factor**2)


def test_there_is_no_interval_where_a_text_decides_whether_the_point_is_reached():
    point = by_text("paper 8x", [8.0] * 3, [1e-2] * 3)
    bound = [by_text("joint 16x", [16.0] * 3, [1e-3] * 3)]
    (figure,) = [one for one in fewer_bytes({0: [point, *bound]}) if one.at == "paper 8x"]
    assert figure.is_bound
    assert (figure.body_low, figure.body_high) == (None, None)
    # Without its third text, which is easy, the series never has a KL as low as the point's.
    just = [by_text("joint 16x", [16.0] * 3, [1.2e-2, 1.2e-2, 1e-3]), by_text("joint 64x", [64.0] * 3, [1e-1] * 3)]
    (figure,) = [one for one in fewer_bytes({0: [point, *just]}) if one.at == "paper 8x"]
    assert figure.body_factor is not None
    assert (figure.body_low, figure.body_high) == (None, None)


@pytest.mark.parametrize(("freedom", "quantile"), [(2, 4.303), (3, 3.182), (7, 2.365), (15, 2.131), (100, 1.984)])
def test_students_t(freedom, quantile):
    assert _student_t(freedom) == pytest.approx(quantile, rel=0.04 if freedom == 2 else 0.01)
