"""Calibration: rows are sampled fairly, the basis is that of an exact decomposition, and the file is trusted only when whole."""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

import kvtc
from kvtc.cache import CacheGeometry, KVCache
from kvtc.calibration import Calibration, SideCalibration, load_calibration
from kvtc.calibration import moments as moments_module
from kvtc.calibration.moments import Moments
from kvtc.calibration.rows import CalibrationRows
from kvtc.codec.codec import Codec
from kvtc.coding.joint.metric import Metric
from kvtc.coding.paper.distortion import measure_distortion
from kvtc.coding.rope import NO_ROTATION, DynamicScaling, LongScaling, Rope, RopeTable
from kvtc.coding.transform import Basis, project, rows_of
from kvtc.errors import CorruptCalibration, GeometryMismatch, InvalidArgument, InvalidCache, UnsupportedVersion
from kvtc.process.progress import reporting
from tests.builders import (
    fit_caches,
    golden_calibration,
    measured_calibration,
    random_cache,
    relative_error,
    rewritten,
    same_bits,
    tiny_calibration,
    tiny_geometry,
)

SOURCES = Path(kvtc.__file__).parent


def tensors_of(kind: SideCalibration) -> list[torch.Tensor]:
    table = kind.distortion
    return [
        kind.basis.mean,
        kind.basis.vectors,
        kind.basis.spectrum,
        torch.from_numpy(table.energy),
        torch.from_numpy(table.errors),
    ]


def same_calibration(first: Calibration, second: Calibration) -> bool:
    return (first.geometry, first.info) == (second.geometry, second.info) and all(
        a.total_variance == b.total_variance
        and a.distortion.sizes == b.distortion.sizes
        and all(same_bits(x, y) for x, y in zip(tensors_of(a), tensors_of(b), strict=True))
        for a, b in ((first.key, second.key), (first.value, second.value))
    )


# The file.


@pytest.fixture
def path(calibration, tmp_path) -> Path:
    calibration.save(tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def test_what_is_saved_is_loaded(calibration, path):
    loaded = load_calibration(path)
    assert same_calibration(loaded, calibration)
    assert loaded.fingerprint == calibration.fingerprint
    assert loaded.n_parameters == calibration.n_parameters == 2 * (48 + 48 * 48)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    cache = random_cache(40, torch.bfloat16)
    assert Codec(loaded, ratio=3).encode(cache) == Codec(calibration, ratio=3).encode(cache)


def test_rotations_of_every_kind_survive_the_file(tmp_path):
    """No table at all, and scaling of both kinds."""
    calibration = golden_calibration()
    for scaling in (None, DynamicScaling(1e4, 2.0, 64), LongScaling((0.1, 1 / 3), 4096)):
        table = RopeTable((1.0, float(np.float32(0.1))), 1.25, interleaved=True, scaling=scaling)
        changed = replace(calibration, geometry=replace(calibration.geometry, rope=Rope((table,), (0,))))
        changed.save(tmp_path / "file")
        assert load_calibration(tmp_path / "file").geometry == changed.geometry
        assert load_calibration(tmp_path / "file").fingerprint == changed.fingerprint != calibration.fingerprint
    calibration.save(str(tmp_path / "file"))
    assert load_calibration(str(tmp_path / "file")).geometry == calibration.geometry


def test_the_fingerprint_names_what_decoding_depends_on():
    calibration = tiny_calibration()
    key = calibration.key
    mean, vectors = key.basis.mean.clone(), key.basis.vectors.clone()
    mean[0] += 1
    vectors[3, 2] *= -1
    table = replace(key.distortion, energy=key.distortion.energy * 2)
    changed = [
        replace(calibration, geometry=replace(calibration.geometry, layers=(1, 2, 3))),
        replace(calibration, key=replace(key, basis=replace(key.basis, mean=mean))),
        replace(calibration, key=replace(key, basis=replace(key.basis, vectors=vectors))),
        replace(calibration, key=calibration.value, value=key),
    ]
    assert len({c.fingerprint for c in [calibration, *changed]}) == 5
    unchanged = [replace(calibration, info={"n": 1}), replace(calibration, key=replace(key, distortion=table))]
    assert {c.fingerprint for c in unchanged} == {calibration.fingerprint}


def test_a_file_that_is_not_there(tmp_path):
    for missing in (tmp_path / "nothing", tmp_path):
        with pytest.raises(FileNotFoundError, match=re.escape(str(missing))):
            load_calibration(missing)


@pytest.mark.parametrize("data", [b"", b"x", b"no calibration at all\n" * 50, bytes(1000), b"\xff" * 1000])
def test_a_file_of_another_kind(tmp_path, data):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(CorruptCalibration, match=re.escape(str(tmp_path / "file"))):
        load_calibration(tmp_path / "file")


def test_another_safetensors_file(tmp_path):
    safetensors.torch.save_file({"weight": torch.ones(3)}, tmp_path / "plain")
    safetensors.torch.save_file({"weight": torch.ones(3)}, tmp_path / "named", {"format": "pt"})
    for name in ("plain", "named"):
        with pytest.raises(CorruptCalibration, match="not a kvtc calibration"):
            load_calibration(tmp_path / name)


def test_a_file_cut_short(path):
    data = path.read_bytes()
    for length in [*range(0, len(data), 97), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(CorruptCalibration):
            load_calibration(path)


def test_rewriting_alone_changes_nothing(calibration, path):
    assert same_calibration(load_calibration(rewritten(path, lambda metadata, tensors: None)), calibration)  # noqa: ARG005


@pytest.mark.parametrize(("version", "remedy"), [("3", "calibrate again"), ("5", "upgrade kvtc")])
def test_another_version_names_both(path, version, remedy):
    rewritten(path, lambda metadata, _: metadata.update(version=version))
    with pytest.raises(UnsupportedVersion, match=rf"version {version}; .*version 4: {remedy}"):
        load_calibration(path)


@pytest.mark.parametrize(
    ("kinds", "found"),
    [
        (["full attention", "recurrent"], r"2 groups of layers \(full attention, recurrent\)"),
        (["recurrent"], r"1 groups of layers \(recurrent\)"),
        (["full attention"] * 1000, r"1000 groups of layers \(full attention\)"),
    ],
)
def test_groups_that_a_later_version_may_hold_are_refused_by_their_kinds(path, kinds, found):
    def change(metadata, _):
        (group,) = json.loads(metadata["groups"])
        metadata["groups"] = json.dumps([group | {"kind": kind} for kind in kinds])

    with pytest.raises(
        UnsupportedVersion, match=f"{found}; this kvtc reads one of full attention, latent, sliding window"
    ):
        load_calibration(rewritten(path, change))


def test_values_of_another_width_than_the_tensors_are_corrupt(path):
    with pytest.raises(CorruptCalibration, match=r"value\.spectrum holds 48 variances; expected 1 \.\. 24"):
        load_calibration(rewritten(path, replaced_in_groups('"value_dim": 8', '"value_dim": 4')))


def test_a_calibration_without_groups_is_corrupt(path):
    with pytest.raises(CorruptCalibration, match="at least one group of layers"):
        load_calibration(rewritten(path, lambda metadata, _: metadata.update(groups="[]")))


def replaced_in_groups(old: str, new: str):
    """A change of a file's metadata, for `rewritten`."""

    def change(metadata, _):
        assert old in metadata["groups"]
        metadata["groups"] = metadata["groups"].replace(old, new)

    return change


METADATA = ["version", "fingerprint", "groups", "block_sizes", "info"]


@pytest.mark.parametrize(
    ("name", "value"),
    # No information is information: of all of these only an empty object as `info` is sound.
    [(n, v) for n in METADATA for v in (None, "", "x", "[1", "{}") if (n, v) != ("info", "{}")],
)
def test_metadata_that_is_missing_or_senseless(path, name, value):
    rewritten(path, lambda metadata, _: metadata.pop(name) if value is None else metadata.update({name: value}))
    with pytest.raises(CorruptCalibration):
        load_calibration(path)


TENSORS = [
    f"{kind}.{part}" for kind in ("key", "value") for part in ("mean", "vectors", "spectrum", "energy", "errors")
]


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_are_missing_or_of_another_form(path, name):
    data = path.read_bytes()
    for change in (
        lambda _, tensors: tensors.pop(name),
        lambda _, tensors: tensors.update({name: tensors[name][:-1].contiguous()}),
        lambda _, tensors: tensors.update({name: tensors[name].double()}),
        lambda _, tensors: tensors.update({name: tensors[name][None]}),
    ):
        path.write_bytes(data)
        rewritten(path, change)
        with pytest.raises(CorruptCalibration):
            load_calibration(path)


@pytest.mark.parametrize("name", TENSORS)
def test_a_flipped_byte_in_a_tensor(path, name):
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    start, stop = json.loads(data[8 : 8 + size])[name]["data_offsets"]
    for place in range(8 + size + start, 8 + size + stop, max(1, (stop - start) // 50)):
        damaged = bytearray(data)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(CorruptCalibration, match="checksum"):
            load_calibration(path)


@pytest.mark.parametrize("mask", [0x01, 0x20, 0xFF])
def test_a_flipped_byte_in_the_metadata(calibration, path, mask):
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    detected = 0
    for place in range(8 + size):
        damaged = bytearray(data)
        damaged[place] ^= mask
        path.write_bytes(damaged)
        try:
            loaded = load_calibration(path)
        except (CorruptCalibration, UnsupportedVersion):
            detected += 1
        else:
            # White space behind the header may differ.
            assert same_calibration(loaded, calibration)
    assert detected > 0.99 * size


def test_a_file_without_its_checksum(path):
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = {name: value for name, value in file.metadata().items() if name != "checksum"}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    safetensors.torch.save_file(tensors, path, metadata)
    with pytest.raises(CorruptCalibration):
        load_calibration(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"layers": [0, 1, 2]', '"layers": [0, 1]'),
        ('"layers": [0, 1, 2]', '"layers": [0, 2, 1]'),
        ('"layers": [0, 1, 2]', '"layers": [0, 1, 1]'),
        ('"layers": [0, 1, 2]', '"layers": {}'),
        ('"layers": [0, 1, 2]', '"layers": []'),
        ('"layers": [0, 1, 2]', '"layers": [0, 1, 1e999]'),
        ('"key_dim": 8, "value_dim": 8', '"key_dim": 0, "value_dim": 0'),
        ('"key_dim": 8, "value_dim": 8', '"key_dim": 6, "value_dim": 6'),
        ('"layer_tables": [0, 0, 0]', '"layer_tables": [0, 0, 1]'),
        ('"rope": {', '"rope": [], "other": {'),
        ('"layers": [0, ', '"layers": [-1, '),
        ('"layers": [0, 1, 2]', '"layers": [0, 1, 65536]'),
        ('"layers": [0, ', '"layers": ["0", '),
        ('"layers": [0, ', '"layers": [0.0, '),
        ('"layers": [0, ', '"layers": [false, '),
        ('"layers": [0, ', '"layers": [1' + 4000 * "0" + ", "),
        ('"n_kv_heads": 2', '"n_kv_heads": 9223372036854775808'),
        ('"attention_scaling": 1.0', '"attention_scaling": 0'),
        ('"attention_scaling": 1.0', '"attention_scaling": NaN'),
        ('"attention_scaling": 1.0', '"attention_scaling": 1e999'),
        ('"attention_scaling": 1.0', '"attention_scaling": "1"'),
        ('"interleaved": false', '"interleaved": 0'),
        ('"interleaved": false', '"interleaved": false, "dynamic": []'),
        ('"interleaved": false', '"interleaved": false, "dynamic": {"base": 1e4, "factor": 0, "max_length": 8}'),
        ('"interleaved": false', '"interleaved": false, "long": {"inverse_frequencies": [1], "original_length": 8}'),
        ('"inverse_frequencies": [1.0', '"inverse_frequencies": [1e300'),
        ('"layer_tables": [0, 0, 0]', '"layer_tables": [0, 0, 0.0]'),
        ('"layer_tables": [0, 0, 0]', '"layer_tables": "000"'),
    ],
)
def test_a_geometry_that_contradicts_itself(path, old, new):
    with pytest.raises(CorruptCalibration):
        load_calibration(rewritten(path, replaced_in_groups(old, new)))


@pytest.mark.parametrize("first", ["-1", "0", "16", "17", "1e999", "null", "[]"])
def test_impossible_block_sizes(path, first):
    with pytest.raises(CorruptCalibration):
        load_calibration(
            rewritten(path, lambda metadata, _: metadata.update(block_sizes=f"[{first}, 16, 64, 256, 1024]"))
        )


@pytest.fixture
def whole_path(tmp_path) -> Path:
    """Of a calibration with every tensor that a file may hold."""
    measured_calibration().save(tmp_path / "whole.safetensors")
    return tmp_path / "whole.safetensors"


FLOATS = [
    *(f"{kind}.{part}" for kind in ("key", "value") for part in ("mean", "vectors", "spectrum", "energy", "errors")),
    *(
        f"{profile}.{part}"
        for profile in ("joint", "conditional")
        for part in ("mean", "scales", "turns", "roots", "deviations", "offsets", "curve")
    ),
    "recomputed.weights",
    "recomputed.explained",
    "quality.joint",
    "quality.conditional",
]
NEVER_NEGATIVE = ("spectrum", "scales", "energy", "errors", "deviations", "curve", "joint", "conditional")


@pytest.mark.parametrize("name", FLOATS)
def test_every_number_is_finite_and_in_range(whole_path, name):
    """NaN and both infinities anywhere; what is too large to be true; and what is negative where nothing can be."""
    data = whole_path.read_bytes()
    wrong = [math.nan, math.inf, -math.inf]
    if not name.startswith("recomputed."):
        wrong.append(1.5 if name.endswith(("vectors", "scales", "turns", "offsets")) else 1e38)
    if name.split(".")[1] in NEVER_NEGATIVE:
        wrong.append(-1e-3)
    for value in wrong:
        whole_path.write_bytes(data)

        def change(_, tensors, value=value):
            tensors[name] = tensors[name].clone()
            tensors[name].view(-1)[0 if name.endswith("errors") else -1] = value

        with pytest.raises(CorruptCalibration, match=re.escape(name)):
            load_calibration(rewritten(whole_path, change))


def test_a_group_past_the_last_coefficient_has_no_error(whole_path):
    """The dynamic program would take it for a group that can be had."""

    def change(_, tensors):
        tensors["key.errors"] = tensors["key.errors"].clone()
        tensors["key.errors"][0, 1, -1] = 0

    with pytest.raises(CorruptCalibration, match=r"key\.errors gives groups of 16 an error past the last of 48"):
        load_calibration(rewritten(whole_path, change))


@pytest.mark.parametrize(
    ("variances", "expected"),
    [("[1, 1]", "explains more"), ("[1e999, 1]", "1e999 is not finite"), ("[NaN, 1]", "NaN is not finite"),
     ("[-1, 1]", "number of 0"), ("[true, 1]", "found True"), ('["1", 1]', "found '1'"), ("[1]", "holds 1 numbers"),
     ('{"a": 1, "b": 2}', "must be a list"), ("[" + "9" * 400 + ", 1]", "out of all range")],
)  # fmt: skip
def test_total_variances_are_two_numbers(whole_path, variances, expected):
    def change(metadata, _):
        metadata["groups"], n_replaced = re.subn(r'(?<="total_variance": )\[.*?\]', variances, metadata["groups"])
        assert n_replaced == 1

    with pytest.raises(CorruptCalibration, match=expected):
        load_calibration(rewritten(whole_path, change))


ODD_JSON = {
    "endless lists": "[" * 100_000,
    "endless lists that end": "[" * 500 + "]" * 500,
    "endless objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "deep, but not endless": '{"a":' + "[" * 32 + "]" * 32 + "}",
    "a list": "[1]",
    "text": '"text"',
    "a number": "1",
    "nothing": "null",
    "NaN": '{"n": NaN}',
    "infinity": '{"n": -Infinity}',
    "infinity in digits": '{"n": 1e999}',
    "ten thousand digits": '{"n": ' + "1" * 10_000 + "}",
    "a name twice": '{"n": 1, "n": 2}',
}


@pytest.mark.parametrize("name", ["groups", "block_sizes", "info"])
@pytest.mark.parametrize("case", ODD_JSON)
def test_odd_json_is_refused_by_name_of_the_file(whole_path, name, case):
    with pytest.raises(CorruptCalibration, match=re.escape(str(whole_path))):
        load_calibration(rewritten(whole_path, lambda metadata, _: metadata.update({name: ODD_JSON[case]})))


@pytest.mark.parametrize("version", ["1.0", "-1", "0", "01", "true", "[1]", "1" * 5000, "\u0661", " "])
def test_a_version_is_a_whole_number(path, version):
    with pytest.raises(CorruptCalibration):
        load_calibration(rewritten(path, lambda metadata, _: metadata.update(version=version)))


def test_a_calibration_that_could_not_be_read_is_not_written(calibration, tmp_path):
    mean = calibration.key.basis.mean.clone()
    mean[3] = math.nan
    wrong = replace(calibration, key=replace(calibration.key, basis=replace(calibration.key.basis, mean=mean)))
    with pytest.raises(CorruptCalibration, match=r"key\.mean holds numbers that are not finite"):
        wrong.save(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_another_fingerprint_than_that_of_the_contents(path):
    with pytest.raises(CorruptCalibration, match="says its fingerprint is 00"):
        load_calibration(rewritten(path, lambda metadata, _: metadata.update(fingerprint="00")))


def test_nothing_unpickles():
    """A calibration file is data: no source may use a reader that runs what it reads."""
    forbidden = re.compile(r"\b(c?pickle|dill|joblib|shelve|marshal|torch\.load|allow_pickle)\b")
    sources = list(SOURCES.rglob("*.py"))
    assert len(sources) > 20
    assert [(source.name, found) for source in sources for found in forbidden.findall(source.read_text())] == []


# The sample of rows.


def line_rows(n_tokens: int, **options) -> CalibrationRows:
    """Rows of two features whose tokens are numbers: keys 0, 1, 2, ..., values 1000 more."""
    geometry = CacheGeometry((0,), 0, 1, 1, 1, Rope((), (NO_ROTATION,)))
    rows = CalibrationRows(geometry, sink_tokens=0, **options)
    start, lengths = 0, cycle((1, 7, 40, 3, 100))
    while start < n_tokens:
        numbers = torch.arange(start, min(n_tokens, start + next(lengths))).float().reshape(1, 1, -1, 1)
        rows.add(KVCache(numbers, numbers + 1000))
        start += numbers.shape[2]
    return rows


def test_few_rows_are_all_kept_in_order():
    rows = line_rows(60)
    sample, hidden = rows.sample(100, seed=5)
    assert (rows.n_rows, hidden.shape) == (60, (60, 0))
    assert torch.equal(sample, torch.arange(60.0)[:, None] + torch.tensor([0.0, 1000]))
    assert rows.sample(20, seed=5)[0].shape == (20, 2)
    assert torch.equal(rows.sample(20, seed=5)[0], rows.sample(20, seed=5)[0])


def test_the_sample_of_rows_is_uniform(monkeypatch):
    """Every row has the same chance, wherever it stands in the stream: counts over 600 draws of 40 out of 320 rows."""
    n, capacity, draws = 320, 40, 600
    monkeypatch.setattr("kvtc.calibration.rows.SAMPLE_ROWS", capacity)
    counts = torch.zeros(n)
    for seed in range(draws):
        kept = line_rows(n, seed=seed).sample(capacity, 0)[0]
        assert torch.equal(kept[:, 1], kept[:, 0] + 1000)
        kept = kept[:, 0].long()
        assert kept.unique().numel() == capacity
        counts[kept] += 1
    share = capacity / n
    deviation = (draws * share * (1 - share)) ** 0.5
    assert float((counts - draws * share).abs().max()) < 4.5 * deviation
    # Chi-square with n - 1 degrees of freedom (less what a fixed total takes): five deviations from its mean at most.
    chi_square = float(((counts - draws * share) ** 2 / (draws * share * (1 - share))).sum())
    assert abs(chi_square - n) < 5 * (2 * n) ** 0.5
    quarters = counts.reshape(4, -1).mean(dim=1) / draws
    assert float((quarters - share).abs().max()) < 0.01


def test_rows_that_16_bits_cannot_hold_are_refused():
    rows = CalibrationRows(tiny_geometry())
    cache = random_cache(20)
    cache.values[1, 1, 10, 1] = 65520.0
    with pytest.raises(InvalidCache, match="16 bits cannot"):
        rows.add(cache)


# The fit.


def caches(count: int = 3, n: int = 60) -> list[KVCache]:
    return [random_cache(n, seed=500 + index) for index in range(count)]


def quick_fit(items, **options) -> Calibration:
    return fit_caches(tiny_geometry(), items, **options)


def test_caches_are_read_once():
    class OneShot:
        """Can be iterated over once, and counts how far."""

        def __init__(self):
            self.given = 0

        def __iter__(self):
            assert self.given == 0
            for cache in caches():
                self.given += 1
                yield cache

    source = OneShot()
    calibration = quick_fit(source)
    assert source.given == 3
    assert same_calibration(calibration, quick_fit(caches()))
    assert same_calibration(calibration, quick_fit(iter(caches())))
    assert calibration.info["n_sequences"] == 3
    assert calibration.info["n_rows"] == 3 * 56


def test_caches_are_left_as_they_were():
    cache = random_cache(60)
    keys, values = cache.keys.clone(), cache.values.clone()
    quick_fit([cache])
    assert same_bits(cache.keys, keys)
    assert same_bits(cache.values, values)


def test_sinks_are_left_out():
    """Wild sinks change nothing; the same rows without them give the same calibration."""
    wild = caches()
    for cache in wild:
        cache.keys[:, :, :4] = 1e4
        cache.values[:, :, :4] = -1e4
    without = [
        KVCache(c.keys[:, :, 4:], c.values[:, :, 4:], torch.arange(4, c.n_tokens), rope_length=c.n_tokens)
        for c in caches()
    ]
    calibration = quick_fit(wild)
    assert calibration.fingerprint == quick_fit(without).fingerprint
    assert calibration.key.total_variance == quick_fit(without).key.total_variance
    assert quick_fit(wild, sink_tokens=0).value.total_variance > 100 * calibration.value.total_variance
    assert quick_fit(wild, sink_tokens=30).info["n_rows"] == 3 * 30


@pytest.mark.parametrize(("max_tokens", "read"), [(50, 1), (57, 2)])
def test_no_cache_is_asked_for_once_enough_tokens_are_seen(max_tokens, read):
    given = iter(list(caches()))
    info = quick_fit(given, max_tokens=max_tokens).info
    assert (info["n_sequences"], info["n_rows"], len(list(given))) == (read, 56 * read, 3 - read)


def test_a_long_cache_is_read_in_parts(monkeypatch):
    whole = quick_fit(caches()).fingerprint
    monkeypatch.setattr("kvtc.calibration.rows._TOKENS_AT_ONCE", 7)
    assert quick_fit(caches()).fingerprint == whole


def test_keys_are_calibrated_before_rotation(calibration):
    """The caches were made of few directions; rotation, if left in, would hide them."""
    for kind in (calibration.key, calibration.value):
        shares = kind.basis.spectrum.double().cumsum(0) / kind.total_variance
        assert shares[7] > 0.99
    geometry = tiny_geometry()
    rotated = replace(geometry, rope=replace(geometry.rope, layer_tables=(-1,) * 3))
    wrong = fit_caches(rotated, caches()).key
    assert wrong.basis.spectrum[:8].sum() < 0.9 * wrong.total_variance


def test_rank_is_capped():
    calibration = quick_fit(caches(), rank=5)
    assert calibration.key.basis.vectors.shape == (48, 5)
    assert calibration.key.distortion.rank == 5
    assert quick_fit([random_cache(20)]).key.basis.rank == 16


def test_the_distortion_is_that_of_the_calibration_rows():
    items = caches()
    calibration = quick_fit(items)
    rows = torch.cat([rows_of(cache.values)[4:] for cache in items]).half().float()
    basis = calibration.value.basis
    expected = measure_distortion(project(rows, basis.mean, basis.vectors.float()).numpy())
    np.testing.assert_allclose(calibration.value.distortion.energy, expected.energy, rtol=1e-3)
    np.testing.assert_allclose(calibration.value.distortion.errors, expected.errors, rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("lengths", [[], [0], [4, 4], [5]])
def test_too_few_rows(lengths):
    found = sum(max(0, n - 4) for n in lengths)
    with pytest.raises(InvalidArgument, match=f"at least 2 tokens past the 4 sinks; got {found}"):
        quick_fit([random_cache(n, seed=n) for n in lengths])


@pytest.mark.parametrize("kind", ["keys", "values"])
def test_caches_with_nan_are_refused(kind):
    cache = random_cache(60)
    getattr(cache, kind)[2, 0, 30, 1] = float("nan")
    with pytest.raises(InvalidCache, match=f"{kind} of layer 2"):
        quick_fit([*caches(), cache])


def test_caches_of_another_geometry_are_refused():
    cache = KVCache(torch.zeros(2, 2, 9, 8), torch.zeros(2, 2, 9, 8))
    with pytest.raises(GeometryMismatch, match=r"layers 0\.\.2, .* layers 0\.\.1"):
        quick_fit([*caches(), cache])


@pytest.mark.parametrize(
    "options",
    [
        {"sink_tokens": -1},
        {"max_tokens": 1},
        {"rank": 0},
        {"joint_rank": 0},
        {"layers_per_basis": 0},
        {"layers_per_basis": 4},
    ],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(InvalidArgument):
        quick_fit(caches(), **options)


def test_progress_is_told_and_can_be_silenced(capfd):
    quick_fit(caches())
    assert capfd.readouterr().err == ""
    with reporting():
        quick_fit(caches())
    told = capfd.readouterr().err
    assert told.splitlines() == ["key basis", "key distortion", "value basis", "value distortion"]


# The basis.


@pytest.fixture(scope="module")
def decaying_rows() -> torch.Tensor:
    """900 rows of 240 features whose variances fall like 1 / i, off centre; exact in float16."""
    generator = torch.Generator().manual_seed(4)
    rotation = torch.linalg.qr(torch.randn(240, 240, generator=generator)).Q
    scales = 4 / torch.arange(1, 241) ** 0.5
    rows = (torch.randn(900, 240, generator=generator) * scales) @ rotation + 2 * torch.randn(240, generator=generator)
    return rows.half().float()


def moments_of(rows: torch.Tensor, told: torch.Tensor | None = None, rank: int = 0, seed: int = 0) -> Moments:
    moments = Moments(rows.shape[1], 0 if told is None else told.shape[1], rank, seed)
    for start in range(0, len(rows), 70):
        moments.add(rows[start : start + 70], None if told is None else told[start : start + 70])
    return moments


def components_of(rows: torch.Tensor, rank: int, **options) -> Basis:
    return moments_of(rows, rank=rank, **options).covariance().components(rank)


def exact_variances(rows: torch.Tensor) -> torch.Tensor:
    rows = rows.double()
    return torch.linalg.svd(rows - rows.mean(dim=0), full_matrices=False).S.square() / len(rows)


@pytest.fixture
def as_a_large_model(monkeypatch):
    """So many features that their products are sketched."""
    monkeypatch.setattr(moments_module, "EXACT_FEATURES", 0)
    monkeypatch.setattr(moments_module, "OVERSAMPLING", 64)


@pytest.mark.usefixtures("as_a_large_model")
@pytest.mark.parametrize("rank", [1, 32, 100])
def test_components_of_a_sketch_explain_nearly_what_exact_ones_do(decaying_rows, rank):
    assert rank + moments_module.OVERSAMPLING < decaying_rows.shape[1]
    found, exact = components_of(decaying_rows, rank), exact_variances(decaying_rows)
    assert found.rank == rank
    # The variance that the vectors really catch; here variances fall slowly, as 1 / i.
    centred = decaying_rows.double() - decaying_rows.double().mean(dim=0)
    caught = (centred @ found.vectors.double()).square().sum() / len(centred)
    assert float(caught) > 0.95 * float(exact[:rank].sum())
    assert 0.85 * float(caught) < float(found.spectrum.sum()) < 1.001 * float(exact[:rank].sum())


def test_components_of_the_whole_space_are_exact(decaying_rows):
    rows = decaying_rows[:, :50]
    found, exact = components_of(rows, 50), exact_variances(rows)
    torch.testing.assert_close(found.spectrum.double(), exact, rtol=1e-4, atol=0)
    centred = rows - found.mean
    restored = centred @ found.vectors.float() @ found.vectors.float().T
    assert relative_error(restored, centred) < 2e-3


@pytest.mark.parametrize("columns", [70, 2048])
def test_products_are_whole_however_many_columns_are_added_at_once(decaying_rows, columns, monkeypatch):
    monkeypatch.setattr(moments_module, "_COLUMNS_AT_ONCE", columns)
    monkeypatch.setattr(moments_module, "_ROWS_AT_ONCE", 100)
    found = moments_of(decaying_rows)
    exact = torch.cov(decaying_rows.double().T, correction=0)
    torch.testing.assert_close(found.covariance().matrix, exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.variances(), exact.diagonal(), rtol=1e-5, atol=1e-6)


def test_what_is_far_from_zero_keeps_its_digits(decaying_rows):
    moved = decaying_rows[:, :50] + 1e4
    torch.testing.assert_close(components_of(moved, 50).spectrum.double(), exact_variances(moved), rtol=1e-3, atol=0)


def test_components_are_orthonormal_and_fall(decaying_rows):
    basis = components_of(decaying_rows, 100)
    gram = basis.vectors.double().T @ basis.vectors.double()
    assert float((gram - torch.eye(100)).abs().max()) < 2e-3
    assert bool((basis.spectrum[1:] <= basis.spectrum[:-1]).all())
    assert basis.vectors.dtype == torch.float16
    largest = basis.vectors.float().gather(0, basis.vectors.float().abs().argmax(0, keepdim=True))
    assert bool((largest > 0).all())
    torch.testing.assert_close(basis.mean, decaying_rows.mean(0), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("as_a_large_model")
def test_components_are_the_same_again(decaying_rows):
    first, second, other = (components_of(decaying_rows, 32, seed=seed) for seed in (0, 0, 1))
    assert same_bits(first.vectors, second.vectors)
    assert not same_bits(first.vectors, other.vectors)


def test_components_are_never_more_than_rows(decaying_rows):
    basis = components_of(decaying_rows[:10], 200)
    assert basis.rank == 10
    assert bool(basis.vectors.float().isfinite().all())


@pytest.mark.parametrize("is_sketched", [False, True])
def test_rows_without_variance(is_sketched, monkeypatch):
    if is_sketched:
        monkeypatch.setattr(moments_module, "EXACT_FEATURES", 0)
        monkeypatch.setattr(moments_module, "OVERSAMPLING", 1)
    rows = torch.full((20, 6), 2.5)
    found = components_of(rows, 4)
    assert float(found.spectrum.abs().max()) < 1e-9
    assert bool(found.vectors.float().isfinite().all())
    assert torch.equal(found.mean, torch.full((6,), 2.5))
    assert float(moments_of(rows).variances().abs().max()) == 0


@pytest.mark.parametrize("is_sketched", [False, True])
def test_what_told_features_leave_is_what_a_regression_on_the_rows_leaves(decaying_rows, is_sketched, monkeypatch):
    if is_sketched:
        monkeypatch.setattr(moments_module, "EXACT_FEATURES", 0)
        monkeypatch.setattr(moments_module, "OVERSAMPLING", 64)
    told = torch.cat([decaying_rows[:, :9] + 0.1 * decaying_rows[:, 9:18], torch.ones(900, 1)], dim=1)
    weights, variances, left = moments_of(decaying_rows, told, rank=40).regression(1e-5)
    remainder = (decaying_rows - told @ weights).double()
    torch.testing.assert_close(variances, remainder.var(dim=0, correction=0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(left.mean.double(), remainder.mean(dim=0), rtol=0, atol=1e-3)
    exact = exact_variances(remainder)[:40]
    # A sketch never finds more variance than there is; here variances fall slowly, as 1 / i.
    share = float(left.components(40).spectrum.sum()) / float(exact.sum())
    assert (0.8 if is_sketched else 0.999) < share < 1.001
    assert float(exact.sum()) < 0.8 * float(exact_variances(decaying_rows).sum())


def test_the_covariance_of_some_features_in_a_metric(decaying_rows):
    chosen = torch.arange(100, 148)
    factors = torch.randn(6, 8, 24, generator=torch.Generator().manual_seed(2))
    keys, values = (factors @ factors.mT).chunk(2)
    metric = Metric.from_sensitivity(keys[None], values[None], power=0.75, ridge=0.01)
    found = moments_of(decaying_rows).covariance().of(chosen).weighed(metric)
    weighed = metric.weigh(decaying_rows[:, chosen])
    torch.testing.assert_close(found.matrix.double(), torch.cov(weighed.double().T, correction=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.mean, weighed.mean(dim=0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("layers", "blocks"), [(1, [16, 16, 16]), (2, [32, 16]), (3, [48])])
def test_bases_per_layer(layers, blocks):
    calibration = quick_fit(caches(), layers_per_basis=layers)
    assert calibration.info["layers_per_basis"] == layers
    for kind in (calibration.key, calibration.value):
        assert kind.basis.rank == 48
        for column in kind.basis.vectors.T:
            assert sum(bool(block.any()) for block in column.split(blocks)) == 1
        assert kind.explained_variance == pytest.approx(1, abs=1e-3)
    cache = random_cache(200)
    codec = Codec(calibration, max_error=0.05, window_tokens=0)
    assert relative_error(codec.decode(codec.encode(cache)).values, cache.values) < 0.06


def test_one_basis_of_all_layers_beats_one_a_layer():
    """Layers share directions: within the same bits, cross-layer bases lose less."""
    errors = []
    for layers in (1, 3):
        codec = Codec(quick_fit(caches(), layers_per_basis=layers), ratio=4, window_tokens=0)
        cache = random_cache(300, seed=9)
        errors.append(relative_error(codec.decode(codec.encode(cache)).values, cache.values))
    assert errors[1] < 0.7 * errors[0]
