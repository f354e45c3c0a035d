"""The parts of the profiles `joint` and `conditional`, each alone: metric, prediction, quantizer, tables, escapes, sensitivity."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal, getcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvtc.cache import KVCache
from kvtc.calibration import load_calibration
from kvtc.calibration.conditional_calibration import ConditionalCalibration
from kvtc.calibration.entropy import fit_coefficients
from kvtc.calibration.joint_calibration import CoefficientModel, JointCalibration
from kvtc.codec.codec import Codec
from kvtc.coding.joint.basis import in_bytes, times_scales
from kvtc.coding.joint.escapes import decode_escapes, encode_escapes, escaped_bytes
from kvtc.coding.joint.metric import Metric
from kvtc.coding.joint.prediction import hidden_features, n_features
from kvtc.coding.joint.probability import ProbabilityTables, tables_from_counts
from kvtc.coding.joint.rounding import BIT_PRICE, round_coefficients
from kvtc.coding.joint.uniform_quantizer import (
    BOUNDS,
    ESCAPE,
    MAX_MAGNITUDE,
    MAX_SYMBOL,
    N_CLASSES,
    N_SYMBOLS,
    column_classes,
    dequantize,
    quantize,
    to_symbols,
)
from kvtc.coding.transform import rows_of
from kvtc.errors import CorruptCalibration, CorruptStream, InvalidArgument, UnsupportedModel
from kvtc.huggingface.sensitivity import Sensitivity
from tests.builders import (
    fit_caches,
    joint_calibration,
    relative_error,
    rewritten,
    same_bits,
    tiny_geometry,
    tiny_gradients,
    tiny_sensitivities,
    told_cache,
    told_ids,
    told_model,
)

# Metric.


@pytest.mark.parametrize("power", [0.0, 0.5, 0.75, 1.0])
def test_a_root_times_its_inverse_is_the_identity(power):
    metric = Metric.from_sensitivity(*tiny_sensitivities(), power=power, ridge=0.01)
    roots, inverses = metric.roots.packed, metric.inverses.packed
    torch.testing.assert_close(roots @ inverses, torch.eye(8).expand(12, 8, 8), rtol=0, atol=2e-5)
    torch.testing.assert_close(roots, roots.mT)
    assert bool((torch.linalg.eigvalsh(roots) > 0).all())
    rows = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(metric.unweigh(metric.weigh(rows)), rows, rtol=1e-4, atol=1e-4)
    again = Metric.from_roots(metric.roots)
    assert same_bits(again.inverses.packed, metric.inverses.packed)


def test_power_zero_is_the_plain_metric():
    metric = Metric.from_sensitivity(*tiny_sensitivities(), power=0, ridge=0.01)
    torch.testing.assert_close(metric.roots.packed, torch.eye(8).expand(12, 8, 8), rtol=0, atol=1e-6)


def test_power_one_measures_what_the_sensitivity_says():
    """Up to one factor, the squared length of weighted rows is the quadratic form; blocks stand in the order of the row."""
    keys, values = tiny_sensitivities()
    metric = Metric.from_sensitivity(keys, values, power=1, ridge=0)
    rows = torch.randn(7, 96, generator=torch.Generator().manual_seed(2)).double()
    blocks = rows.view(7, 12, 8)
    forms = torch.cat([keys.flatten(0, 1), values.flatten(0, 1)])
    expected = torch.einsum("tbd,bde,tbe->t", blocks, forms, blocks)
    measured = metric.weigh(rows.float()).double().square().sum(dim=1)
    torch.testing.assert_close(measured / expected, (measured / expected)[:1].expand(7), rtol=1e-4, atol=0)


def test_a_direction_without_sensitivity_still_counts():
    keys, values = tiny_sensitivities()
    keys[1, 0] = 0
    metric = Metric.from_sensitivity(keys, values, power=1, ridge=0.01)
    assert bool(metric.inverses.packed.isfinite().all())
    torch.testing.assert_close(metric.roots.keys[2], metric.roots.keys[2, 0, 0] * torch.eye(8))


# Prediction.


def test_features_are_the_state_at_unit_length_the_state_without_outliers_and_one():
    hidden = torch.tensor([[3.0, -4.0, 0.0, 0.0], [1000.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.bfloat16)
    features = hidden_features(hidden)
    assert (features.dtype, features.shape) == (torch.float32, (3, n_features(4)))
    torch.testing.assert_close(features[0], torch.tensor([1.2, -1.6, 0, 0, 0.3, -0.4, 0, 0, 1]))
    torch.testing.assert_close(features[1], torch.tensor([2.0, 0, 0, 0, 5, 0, 0, 0, 1]))
    torch.testing.assert_close(features[2], torch.tensor([0.0] * 8 + [1]))


# Rounding by cost.


def test_integers_are_the_cheapest_in_error_and_bits(fitted):
    """Against every integer there is."""
    coefficients, model = fitted
    step, tables = float(model.steps[8]), model.tables
    classes = column_classes(model.deviations, step)
    rounded = round_coefficients(coefficients, step, classes, tables)
    assert rounded.values.shape == (len(classes), len(coefficients))
    plain = to_symbols(quantize(coefficients[:, : len(classes)], step).numpy()).T
    assert rounded.activities.tolist() == tables.token_costs(plain, classes).argmin(axis=0).tolist()
    candidates = np.arange(-31, 32)
    bits = tables.costs[rounded.activities[None, :], classes[:, None]][..., candidates + MAX_SYMBOL]
    shifts = tables.offsets[rounded.activities[None, :], classes[:, None]]
    decoded = np.sign(candidates) * (
        np.abs(candidates) - np.where(np.abs(candidates) == 1, shifts[..., :1], shifts[..., 1:])
    )
    scaled = (coefficients[:, : len(classes)] / step).numpy().T
    prices = (scaled[..., None] - decoded) ** 2 + BIT_PRICE * bits
    inside = np.abs(scaled) < 30
    chosen = np.take_along_axis(prices, (rounded.values.clip(-31, 31) + MAX_SYMBOL)[..., None], axis=-1)[..., 0]
    # An integer two away is never cheaper but by a hair, so three candidates do.
    assert (chosen - prices.min(axis=-1))[inside].max() < 0.02
    assert (chosen == prices.min(axis=-1))[inside].mean() > 0.99
    costs = tables.token_costs(to_symbols(rounded.values), classes)
    np.testing.assert_allclose(rounded.bits, costs[rounded.activities, np.arange(costs.shape[1])], rtol=1e-4)


def test_rounding_by_cost_costs_less_than_rounding_to_nearest(fitted):
    """Price of both at one step: error in squared steps and bits together are lower than those of the nearest integers."""
    coefficients, model = fitted
    step, tables = float(model.steps[10]), model.tables
    classes = column_classes(model.deviations, step)
    used = coefficients[:, : len(classes)]
    rounded = round_coefficients(coefficients, step, classes, tables)
    offsets = torch.from_numpy(tables.offsets[rounded.activities][:, classes])

    def price(values: Tensor) -> tuple[float, float]:
        error = float(((dequantize(values, offsets, step) - used) / step).square().sum(dim=1).mean())
        costs = tables.token_costs(to_symbols(np.ascontiguousarray(values.numpy().T)), classes)
        return error, float(costs[rounded.activities, np.arange(len(used))].mean())

    by_cost, nearest = price(torch.from_numpy(rounded.values).T), price((used / step).round().int())
    assert by_cost[0] + BIT_PRICE * by_cost[1] < nearest[0] + BIT_PRICE * nearest[1]


def test_large_coefficients_are_left_to_escape(fitted):
    _, model = fitted
    coefficients = torch.zeros(3, len(model.deviations))
    coefficients[0, 0], coefficients[1, 0] = 1e9, -40.2
    rounded = round_coefficients(coefficients, 1.0, column_classes(model.deviations, 1.0), model.tables)
    assert rounded.values[0].tolist() == [10**9, -40, 0]
    assert not rounded.values[1:].any()


# Quantizer.


def test_bounds_of_classes_are_the_nearest_numbers():
    """2 ** (k / 2 - 3.5): known to the last bit, so that no mathematics library decides how a stream is parsed."""
    getcontext().prec = 60
    assert len(BOUNDS) == N_CLASSES
    for k, bound in enumerate(BOUNDS.tolist()):
        exact = (Decimal(2) ** (k - 7)).sqrt()
        near = [Decimal(float(np.nextafter(bound, end))) for end in (0, np.inf)]
        assert abs(Decimal(bound) - exact) <= min(abs(other - exact) for other in near)


def test_a_deviation_on_a_bound_belongs_to_the_class_above():
    """Odd bounds are powers of two: with such a step the comparison is of equal numbers."""
    for step in (0.25, 1.0, 8.0):
        exact = (BOUNDS[1::2] * step).astype(np.float32)[::-1].copy()
        assert column_classes(exact, step).tolist() == list(range(25, 0, -2))
        below = np.nextafter(exact, np.float32(0))
        assert column_classes(below, step).tolist() == list(range(24, -1, -2))


@given(
    st.lists(st.floats(2.0**-20, 2.0**20, width=32), min_size=1, max_size=40),
    st.floats(2.0**-12, 2.0**12, width=32),
    st.floats(1, 64, width=32),
)
def test_classes_fall_with_the_deviation_and_with_the_step(deviations, step, factor):
    falling = np.sort(np.array(deviations, np.float32))[::-1].copy()
    classes = column_classes(falling, step)
    assert classes.dtype == np.uint8
    assert (np.diff(classes.astype(int)) <= 0).all()
    assert len(classes) == int((falling.astype(np.float64) >= BOUNDS[0] * step).sum())
    coarser = column_classes(falling, float(np.float32(step * factor)))
    assert len(coarser) <= len(classes)
    assert (coarser <= classes[: len(coarser)]).all()


def test_deviations_that_do_not_quite_fall_leave_no_hole():
    assert column_classes(np.array([4, 0.01, 1, 0.01], np.float32), 1.0).tolist() == [11, 0, 7]
    assert column_classes(np.array([0.01, 0], np.float32), 1.0).tolist() == []
    assert column_classes(np.array([1e30], np.float32), 1.0).tolist() == [N_CLASSES - 1]


def test_zero_is_wider_than_other_intervals():
    values = torch.tensor([0.0, 0.59, 0.61, -0.59, -0.61, 1.59, 1.61, -31.61, 1e30, -1e30])
    for step in (1.0, 0.5):
        found = quantize(values * step, step).tolist()
        assert found == [0, 0, 1, 0, -1, 1, 2, -32, MAX_MAGNITUDE, -MAX_MAGNITUDE]


@given(st.lists(st.integers(-(2**31) + 1, 2**31 - 1), max_size=50))
def test_values_become_symbols_and_escapes(values):
    integers = np.array(values, np.int32)
    symbols = to_symbols(integers)
    assert ((symbols == ESCAPE) == (np.abs(integers.astype(np.int64)) > MAX_SYMBOL)).all()
    assert (symbols[symbols != ESCAPE].astype(int) - MAX_SYMBOL == integers[symbols != ESCAPE]).all()


def test_offsets_move_values_towards_zero():
    values = torch.tensor([[0, 1, -1, 2, -5]], dtype=torch.int32)
    offsets = torch.tensor([0.25, 0.125]).expand(1, 5, 2)
    assert dequantize(values, offsets, 2.0).tolist() == [[0.0, 1.5, -1.5, 3.75, -9.75]]


# Escapes.


@given(st.lists(st.integers(-(2**31) + 1, 2**31 - 1) | st.integers(-200, 200), max_size=60))
def test_escapes_round_trip(values):
    array = np.array(values, np.int32)
    data = encode_escapes(array)
    assert len(data) == escaped_bytes(array)
    np.testing.assert_array_equal(decode_escapes(data, len(values)), array)


def test_escapes_byte_by_byte():
    assert (
        encode_escapes(np.array([0, -1, 1, 63, -64, 64, 2**30], np.int32)).hex() == "0001027e7f" + "8001" + "8080808008"
    )


@given(st.binary(max_size=40), st.integers(0, 12))
def test_any_bytes_are_escapes_or_corrupt(data, count):
    try:
        values = decode_escapes(data, count)
    except CorruptStream:
        return
    assert values.dtype == np.int32
    assert len(values) == count
    # Longer spellings of a number are read too; what is written is the shortest.
    assert escaped_bytes(values) <= len(data)


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (b"", 1),
        (b"\0", 0),
        (b"\0\0", 1),
        (b"\0", 2),
        (b"\x80", 0),
        (b"\x80", 1),
        (b"\0\x80", 1),
        (b"\x80\x80\x80\x80\x80\0", 1),
        (b"\xff\xff\xff\xff\x7f", 1),
        (b"\xff\xff\xff\xff\x0f", 1),
        (b"\x80\x80\x80\x80\x10", 1),
    ],
    ids=lambda value: value.hex() if isinstance(value, bytes) else str(value),
)
def test_escapes_that_are_corrupt(data, count):
    with pytest.raises(CorruptStream):
        decode_escapes(data, count)


# Tables.


def drawn_tables(seed: int = 0) -> ProbabilityTables:
    random = np.random.default_rng(seed)
    width = 2.0 ** (np.arange(N_CLASSES) / 2 - 3)[None, :, None] * np.array([0.5, 1, 2, 4])[:, None, None]
    counts = random.random((4, N_CLASSES, N_SYMBOLS)) * 1e4 * np.exp(-np.abs(np.arange(N_SYMBOLS) - MAX_SYMBOL) / width)
    counts[..., ESCAPE] = 0
    return ProbabilityTables(tables_from_counts(counts), np.zeros((4, N_CLASSES, 2), np.float32))


def test_a_basis_in_bytes_is_near_the_exact_one_where_one_head_dwarfs_the_others():
    columns = torch.linalg.qr(torch.randn(8 * 32, 40, generator=torch.Generator().manual_seed(0))).Q
    columns = columns.reshape(8, 32, 40) * torch.tensor([1.0] + [0.01] * 7)[:, None, None]
    columns = columns.reshape(256, 40) / columns.flatten(0, 1).norm(dim=0)
    vectors, scales = in_bytes(columns, 8)
    assert (vectors.dtype, scales.dtype, scales.shape) == (torch.int8, torch.float16, (8, 40))
    error = (times_scales(vectors, scales) - columns).reshape(8, 32, 40).norm(dim=1)
    # Half a step of 127, evenly spread, is a hundredth of a typical entry: of every head by itself.
    assert bool((error <= 0.02 * columns.reshape(8, 32, 40).norm(dim=1)).all())


def test_tables_sum_to_4096_and_always_have_an_escape():
    tables = drawn_tables()
    assert (tables.frequencies.sum(axis=-1, dtype=int) == 4096).all()
    assert (tables.frequencies[..., ESCAPE] >= 1).all()
    assert (tables.frequencies == 0).any()
    assert tables.rans.n_token_classes == 4


def test_what_was_never_counted_is_coded_as_zero_or_escapes():
    row = tables_from_counts(np.zeros((1, 1, N_SYMBOLS)))[0, 0]
    assert (row[MAX_SYMBOL], row[ESCAPE], np.count_nonzero(row)) == (4095, 1, 2)


def test_zero_always_has_room():
    """Where nearly all values are large, a table would be left with nothing but the escape."""
    counts = np.zeros((1, 1, N_SYMBOLS))
    counts[0, 0, ESCAPE], counts[0, 0, 20] = 1e6, 1
    row = tables_from_counts(counts)[0, 0]
    assert (row[MAX_SYMBOL], row[ESCAPE], np.count_nonzero(row)) == (1, 4095, 2)


def test_symbols_without_room_escape():
    tables = drawn_tables()
    classes = np.arange(N_CLASSES, dtype=np.uint8)
    coefficients = 20 * torch.randn(40, N_CLASSES, generator=torch.Generator().manual_seed(1))
    rounded = round_coefficients(coefficients, 1.0, classes, tables)
    for column, token in np.ndindex(rounded.symbols.shape):
        plain = int(to_symbols(rounded.values[column, token]))
        has_room = tables.frequencies[rounded.activities[token], classes[column], plain] > 0
        assert rounded.symbols[column, token] == (plain if has_room else ESCAPE)
    assert (rounded.symbols[np.abs(rounded.values) <= MAX_SYMBOL] == ESCAPE).any()


def test_costs_of_tokens_by_hand():
    """Bits of the table, and what an escaped value takes: a byte where its symbol has no room, two where it has none at all."""
    tables = drawn_tables()
    random = np.random.default_rng(2)
    symbols = random.integers(0, N_SYMBOLS, (30, 9)).astype(np.uint8)
    classes = random.integers(0, N_CLASSES, 30).astype(np.uint8)
    expected = np.zeros((4, 9))
    for activity, column, token in np.ndindex(4, 30, 9):
        row = tables.frequencies[activity, classes[column]].astype(float)
        symbol = symbols[column, token]
        is_gap = row[symbol] == 0
        extra = 16 if symbol == ESCAPE else 8 if is_gap else 0
        expected[activity, token] += -np.log2(row[ESCAPE if is_gap else symbol] / 4096) + extra
    np.testing.assert_allclose(tables.token_costs(symbols, classes), expected, rtol=1e-5)


@pytest.fixture(scope="module")
def fitted() -> tuple[Tensor, CoefficientModel]:
    generator = torch.Generator().manual_seed(6)
    scale = torch.exp(0.4 * torch.randn(1500, 1, generator=generator))
    coefficients = torch.randn(1500, 30, generator=generator) * scale * 8 * 0.75 ** torch.arange(30)
    return coefficients, fit_coefficients(coefficients)


def test_bits_rise_as_the_step_falls(fitted):
    _, model = fitted
    assert (np.diff(model.steps) < 0).all()
    assert (np.diff(model.bits) >= 0).all()
    assert model.bits[0] >= 2
    assert (np.diff(model.deviations) <= 0).all()
    steps = [model.step_for(bits) for bits in (1.0, 5.0, 20.0, 60.0, 150.0, 1e6)]
    assert steps == sorted(steps, reverse=True)
    assert model.steps.min() <= min(steps) <= max(steps) <= model.steps.max() * (1 + 1e-9)


def test_the_curve_says_what_its_own_coefficients_cost(fitted):
    coefficients, model = fitted
    for index in (5, 12, 20):
        step = float(model.steps[index])
        classes = column_classes(model.deviations, step)
        bits = round_coefficients(coefficients, step, classes, model.tables).bits.mean() + 2
        assert bits == pytest.approx(model.bits[index], rel=0.02)


def test_activities_save_bits(fitted):
    """Against the same symbols all in one class: these tokens are of unlike loudness."""
    coefficients, model = fitted
    step = float(model.steps[14])
    classes = column_classes(model.deviations, step)
    symbols = to_symbols(quantize(coefficients[:, : len(classes)], step).numpy()).T
    costs = model.tables.token_costs(symbols, classes)
    assert costs.min(axis=0).mean() + 2 < 0.99 * costs.mean(axis=1).min()


def test_offsets_lower_the_error(fitted):
    coefficients, model = fitted
    step = float(model.steps[8])
    classes = column_classes(model.deviations, step)
    used = coefficients[:, : len(classes)]
    rounded = round_coefficients(coefficients, step, classes, model.tables)
    values = torch.from_numpy(rounded.values).T
    offsets = torch.from_numpy(model.tables.offsets[rounded.activities][:, classes])
    assert float(offsets.abs().max()) <= 0.5
    with_offsets = (dequantize(values, offsets, step) - used).square().mean()
    without = (dequantize(values, torch.zeros_like(offsets), step) - used).square().mean()
    assert with_offsets < without


def test_a_fit_is_the_same_again(fitted):
    coefficients, model = fitted
    again = fit_coefficients(coefficients)
    for (_, first), (_, second) in zip(model.tensors("x"), again.tensors("x"), strict=True):
        assert same_bits(first, second)


# The calibration file.


NAMES = [name for name, _ in joint_calibration()._coding_tensors()]


@pytest.fixture
def path(tmp_path):
    joint_calibration().save(tmp_path / "joint.safetensors")
    return tmp_path / "joint.safetensors"


def test_what_is_saved_is_loaded(path):
    calibration, loaded = joint_calibration(), load_calibration(path)
    assert loaded.fingerprint == calibration.fingerprint
    assert loaded.n_parameters == calibration.n_parameters
    tensors = zip(calibration._coding_tensors(), loaded._coding_tensors(), strict=True)
    for (name, before), (other, after) in tensors:
        assert name == other
        assert same_bits(before, after), name
    assert same_bits(loaded.joint.metric.inverses.packed, calibration.joint.metric.inverses.packed)


def test_a_joint_part_alone_is_loaded(tmp_path):
    calibration = joint_calibration(with_model=False)
    calibration.save(tmp_path / "file")
    loaded = load_calibration(tmp_path / "file")
    assert loaded.conditional is None
    assert loaded.fingerprint == calibration.fingerprint


@pytest.mark.parametrize("name", NAMES)
def test_tensors_that_are_missing_or_of_another_form(path, name):
    data = path.read_bytes()
    for change in (
        lambda _: None,
        lambda t: t[:-1].contiguous(),
        lambda t: t[..., :-1].contiguous(),
        lambda t: t.to(torch.float64 if t.dtype != torch.float64 else torch.float32),
        lambda t: t[None],
        lambda t: t.reshape(-1)[0],
        lambda t: t.reshape(-1)[:0],
        lambda t: t[:0],
    ):
        path.write_bytes(data)

        def apply(_, tensors, change=change):
            changed = change(tensors.pop(name))
            tensors.update({} if changed is None else {name: changed})

        rewritten(path, apply)
        with pytest.raises(CorruptCalibration):
            load_calibration(path)


def with_entry(tensor: Tensor, place: tuple, value: float) -> Tensor:
    changed = torch.from_numpy(tensor.numpy().copy())
    changed.numpy()[place] = value
    return changed


SENSELESS = {
    "a row of frequencies above 4096": ("joint.frequencies", lambda t: with_entry(t, (1, 3, 31), 4096), "sum to 4096"),
    "no room for escapes": (
        "conditional.frequencies",
        lambda t: with_entry(with_entry(t, (2, 5), 0), (2, 5, slice(30, 32)), 2048),
        "no room for escapes",
    ),
    "nothing but escapes": (
        "joint.frequencies",
        lambda t: with_entry(with_entry(t, (0, 0), 0), (0, 0, ESCAPE), 4096),
        "no room for escapes or for all else",
    ),
    "roots without an inverse": ("joint.roots", lambda t: with_entry(t, (3,), 0), "has no inverse"),
    "roots that are not finite": ("joint.roots", lambda t: with_entry(t, (3, 1, 1), np.nan), "not finite"),
    "steps that are not positive": ("joint.curve", lambda t: with_entry(t, (0, 4), 0), "positive steps"),
    "bits that fall": ("conditional.curve", lambda t: with_entry(t, (1, 4), 1e9), "rising bits"),
    "bits that are not finite": ("conditional.curve", lambda t: with_entry(t, (1, -1), np.inf), "not finite"),
    "bits of nothing": ("joint.curve", lambda t: with_entry(t, (1, 0), 0), "rising bits above 0"),
    "steps that rise": ("joint.curve", lambda t: with_entry(t, (0, 1), 1e9), "falling, positive steps"),
}


@pytest.mark.parametrize("case", SENSELESS)
def test_tensors_that_no_coder_could_use(path, case):
    name, change, expected = SENSELESS[case]
    rewritten(path, lambda _, tensors: tensors.update({name: change(tensors[name])}))
    with pytest.raises(CorruptCalibration, match=expected):
        load_calibration(path)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "recomputed.layers"])  # others fit no other number
def test_the_fingerprint_covers_every_tensor(name):
    calibration = joint_calibration()
    tensors = dict(calibration._coding_tensors())
    flat = tensors[name].numpy().copy()
    octets = flat.view(np.uint8).reshape(-1)
    octets[0] ^= 1
    if name.endswith("frequencies"):
        # One slot more for one symbol is one less for another.
        rows = flat.reshape(-1, N_SYMBOLS)
        rows[0] = tensors[name].numpy().reshape(-1, N_SYMBOLS)[0]
        rows[0, MAX_SYMBOL] -= 1
        rows[0, ESCAPE] += 1
    if name.endswith("order"):
        flat = tensors[name].numpy().copy()
        flat[[-1, -2]] = flat[[-2, -1]]
    given, geometry = {**tensors, name: torch.from_numpy(flat)}, calibration.geometry
    for found, is_same in ((given, False), (tensors, True)):
        joint = JointCalibration.from_tensors(found, "joint", geometry)
        conditional = ConditionalCalibration.from_tensors(found, geometry)
        other = replace(calibration, joint=joint, conditional=conditional)
        assert (other.fingerprint == calibration.fingerprint) is is_same


def test_predictions_explain_a_share_of_every_layer_behind_the_recomputed_one():
    conditional = joint_calibration().conditional
    assert conditional.explained.shape == (2, 2)
    assert bool(((conditional.explained > 0.3) & (conditional.explained < 1)).all())
    # What the rows are made of is found again.
    rows, features = told_cache(200, seed=7), hidden_features(told_model().run(told_ids(200, 7).numpy()).hidden)
    keys = tiny_geometry().rope.unrotate(rows.keys, torch.arange(200), 200)[1:]
    found = features @ conditional.weights.float()
    expected = torch.cat([rows_of(keys), rows_of(rows.values[1:])], dim=1)
    left = (expected - found).square().mean(dim=0).reshape(2, 2, -1).mean(dim=-1)
    variance = expected.var(dim=0).reshape(2, 2, -1).mean(dim=-1)
    torch.testing.assert_close(1 - (left / variance).T, conditional.explained, rtol=0, atol=0.05)


# Fitting what is degenerate.


def fitted_to(caches, **options):
    ids = [told_ids(cache.n_tokens) for cache in caches]
    return fit_caches(tiny_geometry(), caches, sample=tiny_gradients(), token_ids=ids, model=told_model(), **options)


@pytest.mark.parametrize(("n", "rank"), [(7, 96), (60, 1), (60, 5)])
def test_few_rows_and_few_components_are_fitted(n, rank, tmp_path):
    """Of few components all are far above the smallest steps: next to every value escapes."""
    calibration = fitted_to([told_cache(n)], joint_rank=rank)
    calibration.save(tmp_path / "file")
    cache, ids = told_cache(40), told_ids(40)
    for profile in ("joint", "conditional"):
        codec = Codec(load_calibration(tmp_path / "file"), profile, 8, window_tokens=0, model=told_model())
        assert codec.decode(codec.encode(cache, ids), ids).n_tokens == 40


@pytest.mark.parametrize("factor", [1e-4, 1.0, 1000.0])
def test_the_scale_of_the_cache_does_not_matter(factor):
    cache, ids = told_cache(100), told_ids(100)
    scaled = KVCache(cache.keys * factor, cache.values * factor)
    codec = Codec(fitted_to([scaled]), "conditional", 8, window_tokens=0, model=told_model())
    found = codec.decode(codec.encode(scaled, ids), ids)
    assert relative_error(found.values[1:], scaled.values[1:]) < 0.05


def test_rows_that_do_not_vary_are_refused():
    rows = torch.ones(3, 2, 50, 8)
    still = KVCache(tiny_geometry().rope.rotate(rows, torch.arange(50), 50), rows)
    with pytest.raises(InvalidArgument, match="do not vary"):
        fitted_to([still])


def test_a_basis_without_components_is_refused():
    with pytest.raises(InvalidArgument, match="joint_rank must be at least 1"):
        fitted_to([told_cache(50)], joint_rank=0)


@pytest.mark.parametrize(("factor", "ridge", "expected"), [(0, 0.01, "no sensitivity"), (np.nan, 0.01, "not finite")])
def test_sensitivities_that_say_nothing_are_refused(factor, ridge, expected):
    keys, values = tiny_sensitivities()
    with pytest.raises(InvalidArgument, match=expected):
        Metric.from_sensitivity(keys * factor, values * factor, power=0.75, ridge=ridge)


# Sensitivity, against derivatives by un-rotated keys.

SINKS, LENGTH = 2, 48
N_READ = 36


def tiny_llama(**rope):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.4,
        **rope,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def ids_of_length(n: int = LENGTH) -> Tensor:
    return torch.randint(50, (n,), generator=torch.Generator().manual_seed(1))


def gathered(model, geometry, n: int = LENGTH) -> Sensitivity:
    found = Sensitivity(model, [geometry], SINKS)
    (cache,) = found.capture(ids_of_length(n))
    assert (cache.n_layers, cache.n_tokens) == (geometry.n_layers, n)
    return found


def derived(model) -> Tensor:
    """Gradients of joint rows [N_READ, 2 p], by the model's own rotation of keys that are leaves before it."""
    from transformers import DynamicCache
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    from kvtc.huggingface.models import capture, geometry_of

    ids, rope = ids_of_length(), geometry_of(model).rope
    read = capture(model, ids[:N_READ])
    positions = torch.arange(N_READ)
    plain = [side.clone().requires_grad_() for side in rope.unrotate(read.keys, positions, N_READ)]
    values = [side.clone().requires_grad_() for side in read.values]
    cosines, sines = model.model.rotary_emb(read.values, positions[None])
    cache = DynamicCache()
    for layer, (keys, side) in enumerate(zip(plain, values, strict=True)):
        cache.update(apply_rotary_pos_emb(keys[None], keys[None], cosines, sines)[1], side[None], layer)
    scores = model(ids[None, N_READ:], past_key_values=cache).logits[0].log_softmax(-1)
    labels = torch.multinomial(scores.detach().exp(), 1, generator=torch.Generator().manual_seed(0))
    scores.gather(1, labels).sum().backward()
    return torch.cat([rows_of(torch.stack([leaf.grad for leaf in leaves])) for leaves in (plain, values)], dim=1)


ROPES = {
    "plain": {},
    "scaled": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 16,
            "rope_theta": 10000.0,
        }
    },
}


@pytest.mark.parametrize("rope", ROPES)
def test_gradients_are_those_by_unrotated_keys_and_values(rope):
    """With grouped heads; `scaled` has a factor on cosines and sines, which the derivative has too."""
    from kvtc.huggingface.models import capture, geometry_of

    model = tiny_llama(**ROPES[rope])
    geometry = geometry_of(model)
    assert (geometry.rope.tables[0].attention_scaling == 1) == (rope == "plain")
    found = gathered(model, geometry)
    rows, gradients = next(found.samples()[0].blocks())
    expected = derived(model)[SINKS:]
    torch.testing.assert_close(gradients, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))
    read = capture(model, ids_of_length()[:N_READ])
    plain = rows_of(geometry.rope.unrotate(read.keys, torch.arange(N_READ), N_READ))
    expected = torch.cat([plain, rows_of(read.values)], dim=1)[SINKS:]
    torch.testing.assert_close(rows, expected, rtol=1e-2, atol=1e-2)


def test_sensitivity_of_a_part_of_the_model():
    from kvtc.huggingface.models import geometry_of

    model = tiny_llama()
    whole = gathered(model, geometry_of(model))
    part = gathered(model, geometry_of(model, layers=(1, 2), kv_heads=(1, 2)))
    _, gradients = next(whole.samples()[0].blocks())
    expected = gradients.reshape(len(gradients), 2, 2, 2, 8)[:, :, 1, 1].reshape(len(gradients), -1)
    of_part = next(part.samples()[0].blocks())[1]
    torch.testing.assert_close(of_part, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))


def test_a_model_stays_as_it_was():
    from kvtc.huggingface.models import capture, geometry_of

    model = tiny_llama().train()
    model.lm_head.requires_grad_(False)
    frozen = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    found = Sensitivity(model, [geometry_of(model)], SINKS)
    with torch.inference_mode():
        (cache,) = found.capture(ids_of_length())
    assert found.n_passes == 1
    assert model.training
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == frozen
    assert all(parameter.grad is None for parameter in model.parameters())
    expected = capture(model, ids_of_length())
    torch.testing.assert_close(cache.keys, expected.keys, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cache.values, expected.values, rtol=1e-4, atol=1e-4)


def test_short_texts_are_captured_alone():
    from kvtc.huggingface.models import geometry_of

    model = tiny_llama()
    found = gathered(model, geometry_of(model), 12)
    assert found.n_passes == 0
    with pytest.raises(InvalidArgument, match="a text of 13 tokens or more"):
        found.samples()
    assert gathered(model, geometry_of(model), 13).n_passes == 1


def test_a_model_without_gradients_is_named(monkeypatch):
    from kvtc.huggingface.models import geometry_of

    model = tiny_llama()
    plain = type(model.model).forward
    monkeypatch.setattr(type(model.model), "forward", lambda *given, **named: torch.no_grad()(plain)(*given, **named))
    with pytest.raises(UnsupportedModel, match="LlamaForCausalLM gives no gradients"):
        Sensitivity(model, [geometry_of(model)], SINKS).capture(ids_of_length())
