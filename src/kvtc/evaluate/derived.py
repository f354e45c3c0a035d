"""Figures that follow from a sweep: how many times fewer bytes at the same quality, and how small a
cache may get.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from ..container.tables import PROFILES
from .method_names import split_name
from .quality import Quality
from .schema import ScoreRecord
from .scoring import EXACT

ONE_POINT = 0.01
MEAN_OF_TASKS = "mean of tasks"
_LEAST_TEXTS = 3

Curve = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class FewerBytes:
    """How many times fewer bytes a series needs at the KL of one point of another series.

    Parameters:
        at: the name of the point.
        kl: the KL of the point, in nats.
        series: the series that is compared with it.
        body_factor, total_factor: times fewer bytes for the coded tokens, and for all tokens. Below
            1 the series needs more. None: the KL of the series is never as low.
        is_bound: whether the series is better even at its highest measured ratio, so that the
            factors are lower bounds.
        body_low, body_high: 95 % interval of body_factor over texts: the jackknife of its logarithm,
            with Student's t. None where fewer than 3 texts are known one by one, or where the
            factor without one of them is a bound or not reached.
    """

    at: str
    window_tokens: int
    kl: float
    series: str
    body_factor: float | None
    total_factor: float | None
    is_bound: bool
    body_low: float | None = None
    body_high: float | None = None


@dataclass(frozen=True)
class WithinAPoint:
    """The highest measured ratio at which a series stays within one point (0.01) of the exact
    cache.

    The same must be true at all lower ratios.

    Parameters:
        task: the name of the task, or "mean of tasks".
        setting: the setting of the method. None, like the ratios, if not even the lowest ratio is
            within one point.
        is_bound: whether no higher ratio was measured.
    """

    series: str
    window_tokens: int
    task: str
    setting: str | None
    body_ratio: float | None
    total_ratio: float | None
    is_bound: bool


def ratio_at_kl(curve: Curve, kl: float) -> tuple[float | None, bool]:
    """The highest ratio at which a curve has no higher KL than `kl`, and whether this is only a
    lower bound.

    Between measured points the curve is a straight line on a log-log scale; it is not continued
    beyond its ends.

    Parameters:
        curve: points (ratio, KL in nats).
        kl: the KL to reach, in nats.

    Returns:
        None if the KL of the curve is always higher.
    """
    points = sorted(curve)
    if points and points[-1][1] <= kl:
        return points[-1][0], True
    for (ratio_low, low), (ratio_high, high) in reversed(list(itertools.pairwise(points))):
        if low <= kl < high:
            share = math.log(kl / low) / math.log(high / low) if low > 0 else 0.0
            return math.exp(math.log(ratio_low) + share * math.log(ratio_high / ratio_low)), False
    return None, False


def fewer_bytes(
    qualities: Mapping[int, Sequence[Quality]], series: Sequence[str] = tuple(PROFILES)
) -> list[FewerBytes]:
    """Each of `series` against every point of every other that is not lossless; qualities by
    window.
    """
    found = []
    for window, measured in qualities.items():
        curves = {name: [quality for quality in measured if split_name(quality.name)[0] == name] for name in series}
        for point in (quality for quality in measured if quality.kl > 0):
            for name, curve in curves.items():
                if curve and name != split_name(point.name)[0]:
                    found.append(_against(point, window, name, curve))
    return found


def _against(point: Quality, window: int, series: str, curve: Sequence[Quality]) -> FewerBytes:
    body_factor, is_bound = _body_factor(point, curve)
    total, _ = ratio_at_kl([(other.total_ratio, other.kl) for other in curve], point.kl)
    total_factor = total / point.total_ratio if total else None
    low, high = (None, None) if body_factor is None or is_bound else _interval(body_factor, point, curve)
    return FewerBytes(point.name, window, point.kl, series, body_factor, total_factor, is_bound, low, high)


def _body_factor(point: Quality, curve: Sequence[Quality], left_out: int | None = None) -> tuple[float | None, bool]:
    """Times fewer body bytes at the KL of a point, and whether this is a lower bound; left_out: the
    number of a text that does not count.
    """
    ratio, kl = _without(point, left_out)
    points = [(own, own_kl) for own, own_kl in (_without(other, left_out) for other in curve) if own]
    found, is_bound = ratio_at_kl(points, kl)
    return (found / ratio if found and ratio else None), is_bound


def _without(quality: Quality, left_out: int | None) -> tuple[float | None, float]:
    """Body ratio and KL of all texts, or of all but one; texts are of one length."""
    if left_out is None or quality.body_ratio is None:
        return quality.body_ratio, quality.kl
    sizes, kls, n = quality.body_bytes_by_text, quality.kl_by_text, len(quality.kl_by_text)
    others = (sum(sizes) - sizes[left_out]) / (n - 1)
    return quality.body_ratio * sum(sizes) / n / others, (math.fsum(kls) - kls[left_out]) / (n - 1)


def _interval(factor: float, point: Quality, curve: Sequence[Quality]) -> tuple[float | None, float | None]:
    """The 95 % interval of a factor over texts: the jackknife of its logarithm, with Student's t."""
    n = len(point.kl_by_text)
    if n < _LEAST_TEXTS or any(len(other.kl_by_text) != n for other in curve):
        return None, None
    logs = []
    for text in range(n):
        found, is_bound = _body_factor(point, curve, text)
        if found is None or is_bound:
            return None, None
        logs.append(math.log(found))
    mean = math.fsum(logs) / n
    deviation = math.sqrt((n - 1) / n * math.fsum((log - mean) ** 2 for log in logs))
    reach = math.exp(_student_t(n - 1) * deviation)
    return factor / reach, factor * reach


def _student_t(freedom: int) -> float:
    """The quantile .975 of Student's t, by its expansion about the normal one; from 3 degrees of
    freedom on within 1 %.
    """
    z = NormalDist().inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + math.fsum(term / freedom**power for power, term in enumerate(terms, start=1))


def within_a_point(scores: Iterable[ScoreRecord]) -> list[WithinAPoint]:
    """`WithinAPoint` of every series and window, for each task and for the mean of the tasks.

    Tasks that the exact cache never solves are left out.
    """
    measured = list(scores)
    exact = {(score.task, score.context): share(score) for score in measured if score.codec == EXACT}
    exact = {place: value for place, value in exact.items() if value > 0}
    found = []
    for window in dict.fromkeys(score.window_tokens for score in measured):
        series: dict[str, dict[str, dict[tuple[str, int], ScoreRecord]]] = {}
        for score in measured:
            if score.window_tokens == window and score.codec != EXACT and (score.task, score.context) in exact:
                settings = series.setdefault(split_name(score.codec)[0], {})
                settings.setdefault(score.codec, {})[score.task, score.context] = score
        for name, settings in series.items():
            for task in [*dict.fromkeys(task for task, _ in exact), MEAN_OF_TASKS]:
                places = [place for place in exact if task in (place[0], MEAN_OF_TASKS)]
                wanted = sum(exact[place] for place in places) / len(places)
                # Ratios of different tasks differ a little: what a setting costs is the harmonic mean, bytes over bytes.
                measured_there = {
                    setting: [of_setting[place] for place in places if place in of_setting]
                    for setting, of_setting in settings.items()
                }
                points = [_point(setting, of_one) for setting, of_one in measured_there.items() if of_one]
                points.sort(key=lambda point: (point[0], point[2]))
                found.append(_highest(name, window, task, wanted, points))
    return found


def share(score: ScoreRecord) -> float:
    """What a task is judged by: copying by its tokens, all others by whole answers."""
    return score.tokens if score.task == "copy" else score.exact


def _point(name: str, scores: Sequence[ScoreRecord]) -> tuple[float, float | None, str, float]:
    """total_ratio, body_ratio, name and mean share of one setting over the places of a task."""
    total = [score.total_ratio for score in scores if score.total_ratio]
    body = [score.body_ratio for score in scores if score.body_ratio]
    mean = sum(share(score) for score in scores) / len(scores)
    return _harmonic(total) or 1.0, _harmonic(body), name, mean


def _harmonic(ratios: Sequence[float]) -> float | None:
    return len(ratios) / sum(1 / ratio for ratio in ratios) if ratios else None


def _highest(
    series: str, window: int, task: str, wanted: float, points: Sequence[tuple[float, float | None, str, float]]
) -> WithinAPoint:
    reached = list(itertools.takewhile(lambda point: point[3] >= wanted - ONE_POINT - 1e-9, points))
    if not reached:
        return WithinAPoint(series, window, task, None, None, None, is_bound=False)
    total, body, name, _ = reached[-1]
    return WithinAPoint(series, window, task, split_name(name)[1], body, total, is_bound=len(reached) == len(points))
