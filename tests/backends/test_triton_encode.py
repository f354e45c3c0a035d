"""Rounding, entropy coding and gathering of the backend triton against the reference, in the interpreter where there is no GPU.

The interpreter takes milliseconds for a step of the coder, so chunks here have few symbols, and lanes for as few.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtc.backends import CodedIntegers, ReferenceBackend, make_backend
from kvtc.codec.codec import Codec
from kvtc.coding import rans
from kvtc.coding.bitpack import unpack
from kvtc.coding.joint.escapes import decode_escapes
from kvtc.coding.joint.probability import ProbabilityTables
from kvtc.coding.joint.uniform_quantizer import ACTIVITY_BITS, ESCAPE, MAX_SYMBOL
from kvtc.coding.rans import count_lanes, decode_symbols
from kvtc.coding.rope import Rope, RopeTable
from kvtc.errors import InvalidArgument
from tests.builders import DTYPES, NAMES, golden_frequencies, joint_codec, stepped_calibration, told_cache, told_ids

pytest.importorskip("triton")

pytestmark = pytest.mark.usefixtures("guarded_kernels", "poisoned_memory")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
REFERENCE, TRITON = ReferenceBackend(CPU), make_backend(DEVICE, "triton")
FEW_SYMBOLS_A_LANE = 4
STEP = 0.25


@pytest.fixture(autouse=True, scope="module")
def _lanes_for_few_symbols():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rans, "SYMBOLS_A_LANE", FEW_SYMBOLS_A_LANE)
        yield


def tables(seed: int = 0) -> ProbabilityTables:
    """Tables with gaps."""
    offsets = np.random.default_rng(seed).uniform(0, 0.3, (4, 27, 2))
    return ProbabilityTables(golden_frequencies(), offsets.astype(np.float32))


TABLES = tables()


def classes_of(n_columns: int, seed: int = 0) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).integers(0, 27, n_columns)).astype(np.uint8)[::-1].copy()


def coefficients_of(n: int, n_columns: int, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    """Falling coefficients, and among them those at which a rounding error would show."""
    generator = np.random.default_rng(seed)
    falling = generator.laplace(size=(n, n_columns)) * STEP * scale * np.linspace(3, 0.3, n_columns)
    edges = np.array([0.0, -0.0, 0.5, 0.6, -0.6, 1.5, 30.6, -31.0, 31.5, 31.6, -32.0, 1e9, -2e9, 1e30]) * STEP
    chosen = generator.random((n, n_columns)) < 0.1
    falling[chosen] = generator.choice(edges, int(chosen.sum()))
    return torch.from_numpy(falling.astype(np.float32))


def integers_of(rounded, n_columns: int) -> np.ndarray:
    """Integers [n_columns, T] that the coder codes."""
    n_tokens = len(rounded.activities)
    symbols = rounded.symbols.cpu().view(torch.uint8).view(-1, n_tokens, 8)
    symbols = symbols.permute(0, 2, 1).reshape(-1, n_tokens).numpy()
    assert not symbols[n_columns:].any()
    symbols = symbols[:n_columns]
    return np.where(symbols == ESCAPE, rounded.values.cpu().numpy(), symbols.astype(np.int32) - MAX_SYMBOL)


def same_rounding(found, expected, n_columns: int) -> bool:
    return (
        np.array_equal(integers_of(found, n_columns), expected.values)
        and np.array_equal(found.activities.cpu().numpy(), expected.activities)
        and np.array_equal(found.bits, expected.bits)
    )


# Rounding.


@pytest.mark.parametrize(("n", "n_columns"), [(1, 3), (63, 9), (257, 8), (1000, 5)])
def test_rounding_is_the_references_to_the_last_bit(n, n_columns):
    coefficients, classes = coefficients_of(n, n_columns + 2), classes_of(n_columns)
    found = TRITON.round(coefficients.to(DEVICE), STEP, classes, TABLES)
    assert same_rounding(found, REFERENCE.round(coefficients, STEP, classes, TABLES), n_columns)


@settings(max_examples=15)
@given(st.data())
def test_rounding_of_anything_is_the_references(data):
    n, n_columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    floats = st.floats(-(2.0**20), 2.0**20, width=32) | st.floats(-2, 2, width=32)
    numbers = data.draw(st.lists(floats, min_size=n * n_columns, max_size=n * n_columns))
    coefficients = torch.tensor(numbers, dtype=torch.float32).reshape(n, n_columns)
    step = data.draw(st.floats(2.0**-10, 2.0**10, width=32))
    classes = classes_of(n_columns, data.draw(st.integers(0, 9)))
    found = TRITON.round(coefficients.to(DEVICE), step, classes, TABLES)
    assert same_rounding(found, REFERENCE.round(coefficients, step, classes, TABLES), n_columns)


def test_coefficients_may_have_any_strides():
    coefficients, classes = coefficients_of(40, 12), classes_of(5)
    expected = REFERENCE.round(coefficients, STEP, classes, TABLES)
    by_column = coefficients.T.contiguous().T.to(DEVICE)
    spread = torch.stack([coefficients, coefficients], dim=2).to(DEVICE)[..., 1]
    for each in (by_column, spread):
        assert same_rounding(TRITON.round(each, STEP, classes, TABLES), expected, 5)


def test_what_is_not_a_number_stays_in_its_buffers():
    coefficients = torch.tensor([[torch.nan, torch.inf, -torch.inf]] * 3, device=DEVICE)
    rounded = TRITON.round(coefficients, STEP, classes_of(3), TABLES)
    (parts,) = TRITON.write_integers(rounded, [slice(0, 3)], classes_of(3), TABLES)
    # What they become is nobody's promise, but they become integers that decode.
    chunk = CodedIntegers(3, parts.activities, parts.symbols, parts.escapes, classes_of(3), TABLES, STEP)
    decoded = REFERENCE.read_integers([chunk], 3)
    assert decoded.shape == (3, 3)
    assert decoded.isfinite().all()


# Coding.


def written(coefficients: torch.Tensor, classes: np.ndarray, spans: list[slice], of: ProbabilityTables = TABLES):
    """Of the backend, and of the reference."""
    found = TRITON.write_integers(TRITON.round(coefficients.to(DEVICE), STEP, classes, of), spans, classes, of)
    return found, REFERENCE.write_integers(REFERENCE.round(coefficients, STEP, classes, of), spans, classes, of)


@pytest.mark.parametrize(
    ("n", "n_columns", "cuts", "scale"),
    [
        (1, 3, [0, 1], 3),
        (63, 9, [0, 1, 3, 10, 30, 63], 30),
        (257, 8, [0, 257], 3),
        (1000, 1, [0, 400, 401, 401, 1000], 0.3),
    ],
)
def test_chunks_have_the_references_bytes(n, n_columns, cuts, scale):
    spans = [slice(start, stop) for start, stop in pairwise(cuts)]
    found, expected = written(coefficients_of(n, n_columns, scale), classes_of(n_columns), spans)
    assert found == expected
    assert any(each.escapes for each in expected)


def test_chunks_of_every_number_of_lanes_are_coded_in_one_call():
    spans = [slice(start, stop) for start, stop in pairwise(accumulate([1, 2, 4, 9, 17, 40], initial=0))]
    assert [count_lanes(4, span.stop - span.start) for span in spans] == [1, 2, 4, 8, 16, 32]
    found, expected = written(coefficients_of(73, 4), classes_of(4), spans[::-1])
    assert found == expected


def test_some_chunks_alone_and_some_tokens_of_none_are_coded():
    found, expected = written(coefficients_of(30, 5), classes_of(5), [slice(20, 29), slice(3, 7)])
    assert found == expected


@pytest.mark.parametrize("n_columns", [0, 1])
def test_without_coded_coefficients_or_tokens_there_are_no_symbols(n_columns):
    coefficients = coefficients_of(6, 3)
    spans = [slice(0, 5), slice(5, 5), slice(5, 6)]
    found, expected = written(coefficients, classes_of(n_columns), spans)
    assert found == expected
    assert written(coefficients[:0], classes_of(n_columns), [slice(0, 0)])[0] == [expected[1]]
    assert written(coefficients, classes_of(n_columns), [])[0] == []


def test_escapes_go_by_column_and_token():
    """All symbols escape, the ones as too large and the others for their table has no room for them."""
    coefficients = STEP * (torch.arange(24, dtype=torch.float32).reshape(6, 4) * 7 - 80)
    frequencies = golden_frequencies()
    frequencies[:] = 0
    frequencies[..., MAX_SYMBOL], frequencies[..., ESCAPE] = 1, 4095
    scarce = ProbabilityTables(frequencies, np.zeros((4, 27, 2), np.float32))
    found, expected = written(coefficients, classes_of(4), [slice(0, 2), slice(2, 6)], scarce)
    assert found == expected
    assert len(found[1].escapes) > 12


def test_the_cpu_decodes_what_is_encoded_here_and_the_other_way_round():
    coefficients, classes = coefficients_of(37, 6), classes_of(6)
    rounded = TRITON.round(coefficients.to(DEVICE), STEP, classes, TABLES)
    (parts,) = TRITON.write_integers(rounded, [slice(0, 37)], classes, TABLES)
    side = torch.frombuffer(bytearray(parts.activities), dtype=torch.uint8)
    symbols = decode_symbols(parts.symbols, classes, unpack(side, 37, ACTIVITY_BITS).numpy(), TABLES.rans)
    values = symbols.astype(np.int32) - MAX_SYMBOL
    values[symbols == ESCAPE] = decode_escapes(parts.escapes, int((symbols == ESCAPE).sum()))
    assert np.array_equal(values, integers_of(rounded, 6))
    chunk = CodedIntegers(37, parts.activities, parts.symbols, parts.escapes, classes, TABLES, STEP)
    assert torch.equal(TRITON.read_integers([chunk], 6).cpu(), REFERENCE.read_integers([chunk], 6))


def test_what_cannot_be_coded_is_refused():
    frequencies = golden_frequencies()
    frequencies[..., MAX_SYMBOL] += frequencies[..., ESCAPE]
    frequencies[..., ESCAPE] = 0
    no_escape = ProbabilityTables(frequencies, np.zeros((4, 27, 2), np.float32))
    coefficients, classes = torch.full((2, 1), 100.0), classes_of(1)
    for backend, device in ((REFERENCE, CPU), (TRITON, DEVICE)):
        rounded = backend.round(coefficients.to(device), STEP, classes, no_escape)
        with pytest.raises(InvalidArgument, match="frequency 0"):
            backend.write_integers(rounded, [slice(0, 2)], classes, no_escape)
    with pytest.raises(InvalidArgument, match="class 27"):
        TRITON.round(coefficients.to(DEVICE), STEP, np.array([27], np.uint8), TABLES)
    with pytest.raises(InvalidArgument, match="2 or more"):
        TRITON.round(coefficients.to(DEVICE), STEP, classes_of(2), TABLES)
    rounded = TRITON.round(coefficients.to(DEVICE), STEP, classes, TABLES)
    with pytest.raises(InvalidArgument, match="2 columns"):
        TRITON.write_integers(rounded, [slice(0, 2)], classes_of(2), TABLES)
    other = ProbabilityTables(frequencies[:, :3], np.zeros((4, 3, 2), np.float32))
    with pytest.raises(InvalidArgument, match="frequency tables"):
        TRITON.round(coefficients.to(DEVICE), STEP, classes, other)


# Rows.


L, H, N, D = 4, 2, 19, 12
TABLE, OTHER = RopeTable((1.0, 0.1, 0.01, 0.001), 1.25), RopeTable((1.0, 0.3), 0.9, interleaved=True)
ROPE = Rope((TABLE, OTHER, RopeTable(tuple(0.5**i for i in range(6)))), (0, -1, 1, 2))


def cache_sides(dtype: torch.dtype) -> list[torch.Tensor]:
    scales = 10.0 ** torch.randint(-4, 3, (L, H, N, D), generator=torch.Generator().manual_seed(0))
    return [
        (torch.randn(L, H, N, D, generator=torch.Generator().manual_seed(seed)) * scales).clamp(-448, 448).to(dtype)
        for seed in (1, 2)
    ]


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(found.cpu().view(torch.int32), expected.view(torch.int32))


def turns_of(rope: Rope, device: torch.device):
    return rope.turns(torch.arange(N, device=device) * 100, 100 * N, inverse=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_rows_of_a_cache_are_the_references(dtype):
    keys, values = cache_sides(dtype)
    expected = REFERENCE.gather(keys, values, turns_of(ROPE, CPU))
    assert same_bits(TRITON.gather(keys.to(DEVICE), values.to(DEVICE), turns_of(ROPE, DEVICE)), expected)
    by_token = [side.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2).to(DEVICE) for side in (keys, values)]
    assert same_bits(TRITON.gather(*by_token, turns_of(ROPE, DEVICE)), expected)


@pytest.mark.parametrize(("key_dim", "value_dim"), [(D, 3), (6, D)])
def test_rows_of_keys_and_values_of_two_widths(key_dim, value_dim):
    keys, values = cache_sides(torch.float32)
    keys, values = keys[..., :key_dim], values[..., :value_dim]
    rope = Rope((RopeTable((1.0, 0.5, 0.1)), RopeTable((0.3,), interleaved=True)), (0, 1, -1, 0))
    found = TRITON.gather(keys.to(DEVICE), values.to(DEVICE), turns_of(rope, DEVICE))
    assert same_bits(found, REFERENCE.gather(keys, values, turns_of(rope, CPU)))


def test_every_code_of_fp8_is_read():
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        codes = torch.arange(256, dtype=torch.uint8).view(dtype).view(1, 1, 16, 16)
        found = TRITON.gather(codes.to(DEVICE), codes.to(DEVICE), [None]).cpu()
        expected = REFERENCE.gather(codes, codes, [None])
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_a_part_of_a_cache_without_rotation_and_none_at_all():
    keys, values = (side[1:, :, 3:8].to(DEVICE) for side in cache_sides(torch.float32))
    expected = REFERENCE.gather(keys.cpu(), values.cpu(), [None] * 3)
    assert same_bits(TRITON.gather(keys, values, [None] * 3), expected)
    assert TRITON.gather(keys[:, :, :0], values[:, :, :0], [None] * 3).shape == (0, 2 * 3 * H * D)


def test_sides_that_do_not_fit_are_refused():
    keys, values = (side.to(DEVICE) for side in cache_sides(torch.float32))
    turns = turns_of(ROPE, DEVICE)
    with pytest.raises(InvalidArgument, match="a rotation a layer"):
        TRITON.gather(keys, values[:, :1], turns)
    with pytest.raises(InvalidArgument, match="3 rotations"):
        TRITON.gather(keys, values, turns[:3])
    with pytest.raises(InvalidArgument, match="expected 18 positions"):
        TRITON.gather(keys[:, :, 1:], values[:, :, 1:], turns)


# The codec.


def test_levels_and_the_remainder_are_the_references():
    cache, ids = told_cache(18), told_ids(18)
    options = {"step": 2.0, "window_tokens": 0, "sink_tokens": 0, "chunk_tokens": 8}
    reference = Codec(stepped_calibration(), "joint", **options)
    codec = Codec(stepped_calibration(), "joint", backend="triton", device=DEVICE, **options)
    stream = codec.encode(cache, ids)
    assert abs(len(stream) - len(reference.encode(cache, ids))) <= 0.01 * len(stream)
    for found, wanted in ((reference.decode(stream, ids), cache), (codec.decode(stream, ids), cache)):
        expected = reference.decode(reference.encode(wanted, ids), ids)
        assert torch.allclose(found.values.cpu().float(), expected.values.float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("profile", ["joint", "conditional", "paper"])
def test_a_stream_of_the_backend_is_the_references(profile):
    options = {"window_tokens": 2, "chunk_tokens": 8}
    options |= {"ratio": 4.0} if profile == "paper" else {"step": 2.0, "window_format": "coded"}
    cache, ids = told_cache(18), told_ids(18)
    reference = joint_codec(profile, **options)
    stream = joint_codec(profile, backend="triton", device=DEVICE, **options).encode(cache, ids)
    expected = reference.encode(cache, ids)
    assert abs(len(stream) - len(expected)) <= 0.01 * len(expected)
    restored, wanted = reference.decode(stream, ids), reference.decode(expected, ids)
    for found, side in ((restored.keys, wanted.keys), (restored.values, wanted.values)):
        assert torch.allclose(found.float(), side.float(), rtol=1e-2, atol=1e-2)
