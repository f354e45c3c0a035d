"""A short run of the fuzzer; `make fuzz` is the long one."""

from __future__ import annotations

import re
import signal
import time

import pytest

import kvtc
from kvtc.codec.codec import Codec
from kvtc.coding import rans
from kvtc.coding.rans import count_lanes
from kvtc.errors import CorruptStream
from tests import fuzz


def test_random_damage_raises_only_errors_of_the_package():
    report = fuzz.run(2000, seed=2)
    assert report.failures == []
    assert report.memory_growth < fuzz.MEMORY_GROWTH_BYTES
    assert sum(report.outcomes.values()) == 2000
    # The mutations reach all depths: tables, sections, and sound streams that are just different ones.
    for outcome in (
        "CorruptStream",
        "TruncatedStream",
        "UnsupportedVersion",
        "CalibrationMismatch",
        "StreamTooLarge",
        "used",
    ):
        assert report.outcomes[outcome] > 2
    assert min(report.kinds[kind] for kind in ("stream", "claim", "file")) > 40
    assert report.outcomes["CorruptCalibration"] + report.outcomes["InvalidCache"] > 20


def test_the_fuzzer_notices_other_errors(monkeypatch):
    sound = {target.stream for target in fuzz.make_targets()}

    def careless(_, data, **__):
        if data not in sound:
            raise IndexError("list index out of range")

    monkeypatch.setattr(Codec, "decode", careless)
    report = fuzz.run(200, seed=0)
    assert report.outcomes["FAILURE"] == len(report.failures) > 10
    assert "IndexError: list index out of range; reproduce: python -m tests.fuzz --seed 0 --first" in report.failures[0]


@pytest.mark.parametrize(
    ("what", "expected"), [("memory", r"\d+ MiB for \d+ bytes; \d+ were allowed"), ("time", r"s for \d+ bytes")]
)
def test_the_fuzzer_notices_memory_and_time(monkeypatch, what, expected):
    """Of each input by itself: it is given back before the next one."""

    def careless(*_, **__):
        if what == "memory":
            bytearray(200 << 20)
        else:
            until = time.process_time() + 0.4
            while time.process_time() < until:
                pass

    if what == "time":
        monkeypatch.setattr(fuzz, "SECONDS", 0.3)
        monkeypatch.setattr(fuzz, "SECONDS_A_BYTE", 0.0)
    monkeypatch.setattr(kvtc, "inspect", careless)
    report = fuzz.run(6, seed=0)
    assert len(report.failures) > 3
    assert all(re.search(expected, failure) for failure in report.failures if "stream: AssertionError" in failure)


def test_a_mutation_is_the_same_again():
    first, second = (fuzz.run(50, seed=3, first=first) for first in (100, 100))
    assert first.outcomes == second.outcomes
    targets = fuzz.make_targets()
    drawn = [fuzz.mutate(fuzz.draw_of(0, 7), targets)[1] for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_time_is_limited():
    with pytest.raises(TimeoutError), fuzz.limited_seconds(0.05):
        signal.pause()


def test_right_checksums_reach_the_decoders():
    """A stream whose section is replaced decodes, or is refused for what it says and not for a checksum."""
    targets = fuzz.make_targets()
    outcomes = []
    for number in range(100):
        target = targets[number % (len(targets) - 1)]
        data = bytes(fuzz.replace_section(fuzz.draw_of(0, number), target))
        try:
            target.decode(data)
            outcomes.append("decoded")
        except CorruptStream as error:
            outcomes.append(str(error))
    assert outcomes.count("decoded") > 20
    assert not [outcome for outcome in outcomes if "checksum" in outcome]


def test_wrong_states_reach_the_coder(monkeypatch):
    """Lengths, states and words that are wrong under right checksums: refused by the coder, or other symbols; two lanes too."""
    counts = []
    monkeypatch.setattr(rans, "count_lanes", lambda *shape: counts.append(count_lanes(*shape)) or counts[-1])
    targets = [target for target in fuzz.make_targets() if target.final]
    assert set(counts) >= {1, 2}
    outcomes = []
    for number in range(150):
        target, draw = targets[number % len(targets)], fuzz.draw_of(1, number)
        data = bytearray(target.stream)
        fuzz.set_coder_state(draw, data, targets)
        try:
            target.decode(fuzz.reseal(data))
            outcomes.append("decoded")
        except CorruptStream as error:
            outcomes.append(str(error))
    for reason in ("decoded", "state starts at", "decoding read more", "decoding read only", "ends at state", "claims"):
        assert any(reason in found for found in outcomes), reason
    assert not [found for found in outcomes if "checksum" in found]
