"""The kernels of decoding against the reference, to the last bit, and what damage does to them. Interpreted where there is no GPU.

The interpreter takes milliseconds for a step of the coder, so chunks here have few symbols, and lanes for as few.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtc.backends import CodedIntegers, ReferenceBackend, Target, make_backend
from kvtc.coding import rans
from kvtc.coding.joint.probability import ProbabilityTables
from kvtc.coding.rans import count_lanes
from kvtc.coding.rope import RopeTable
from kvtc.errors import CorruptStream, InvalidArgument
from tests.builders import DTYPES, NAMES, golden_frequencies, joint_codec, same_cache, told_cache, told_ids

pytest.importorskip("triton")
from kvtc.backends.triton.decoding import share_out

pytestmark = pytest.mark.usefixtures("guarded_kernels")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REFERENCE, TRITON = ReferenceBackend(DEVICE), make_backend(DEVICE, "triton")
FEW_SYMBOLS_A_LANE = 4
RANK = 24


@pytest.fixture(autouse=True, scope="module")
def _lanes_for_few_symbols():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rans, "SYMBOLS_A_LANE", FEW_SYMBOLS_A_LANE)
        yield


def tables(seed: int) -> ProbabilityTables:
    """Tables with gaps; others for another seed."""
    generator = np.random.default_rng(seed)
    frequencies = golden_frequencies()
    if seed:
        frequencies = frequencies[::-1].copy()
    return ProbabilityTables(frequencies, generator.uniform(0, 0.3, (4, 27, 2)).astype(np.float32))


TABLES = [tables(0), tables(1)]


def chunk(n: int, n_columns: int, step: float = 0.25, seed: int = 0, scale: float = 3.0, of: int = 0) -> CodedIntegers:
    """Integers of falling size, some of them escaped: too large for a symbol, or in a gap of the tables."""
    generator = np.random.default_rng(seed)
    classes = np.sort(generator.integers(0, 27, n_columns)).astype(np.uint8)[::-1].copy()
    falling = generator.laplace(size=(n, n_columns)) * step * scale * np.linspace(3, 0.3, n_columns)
    rounded = REFERENCE.round(torch.from_numpy(falling.astype(np.float32)), step, classes, TABLES[of])
    (written,) = REFERENCE.write_integers(rounded, [slice(0, n)], classes, TABLES[of])
    return CodedIntegers(n, written.activities, written.symbols, written.escapes, classes, TABLES[of], step)


def on_device(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy()).to(DEVICE)


def same_numbers(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """The same bits, but for those of NaN."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[expected.element_size()]
    equal = found.contiguous().view(integers) == expected.contiguous().view(integers)
    return found.dtype == expected.dtype and bool((equal | found.isnan() & expected.isnan()).all())


# Integers.


def test_chunks_of_any_sizes_decode_in_one_call_as_the_reference_does():
    chunks = [
        chunk(257, 5, step=0.125),
        chunk(1, 7, step=3.0, seed=1),
        chunk(63, RANK, step=0.01, seed=2, of=1),
        chunk(1000, 2, seed=3, scale=0.3),
        chunk(40, 0),
        chunk(9, 4, seed=4, of=1, scale=30),
        chunk(0, 3),
        chunk(17, 4, seed=5),
        chunk(6, 4, seed=6),
        chunk(2, 5, seed=7),
    ]
    assert {count_lanes(len(each.classes), each.n_tokens) for each in chunks} == {0, 1, 2, 4, 8, 16, 32}
    assert sum(len(each.escapes) for each in chunks) > 50
    found = TRITON.read_integers(chunks, RANK)
    some = [each for each in chunks if each.n_tokens]
    assert same_numbers(found, REFERENCE.read_integers(some, RANK))


@given(st.lists(st.tuples(st.sampled_from([1, 2, 4, 8, 16, 32]), st.integers(1, 40), st.integers(1, 3))))
def test_every_warp_is_of_chunks_with_the_same_columns(sizes):
    lanes, tokens, columns = np.array(sizes, np.int64).reshape(-1, 3).T
    threads = share_out({"lanes": lanes, "tokens": tokens, "columns": columns})
    assert len(threads) % 32 == 0
    assert all(len({columns[each] for each in warp if each >= 0}) == 1 for warp in threads.reshape(-1, 32))
    for index, n_lanes in enumerate(lanes):
        places = np.flatnonzero(threads == index)
        assert places[0] % n_lanes == 0
        assert places.tolist() == list(range(places[0], places[0] + n_lanes))


def test_nothing_at_all_decodes():
    assert TRITON.read_integers([], RANK).shape == (0, RANK)
    uncoded = [chunk(5, 0), chunk(0, 2), chunk(0, 0)]
    found = TRITON.read_integers(uncoded, RANK)
    assert found.shape == (5, RANK)
    assert not found.any()
    assert TRITON.read_integers([chunk(0, 0)], RANK).shape == (0, RANK)


def test_bytes_may_be_on_the_device():
    chunks = [chunk(9, 3, seed=4, scale=30), chunk(6, 3, seed=6), chunk(5, 2, seed=7, of=1)]
    moved = [
        replace(
            each,
            activities=on_device(each.activities),
            symbols=on_device(each.symbols),
            escapes=on_device(each.escapes),
        )
        for each in (chunks[0], chunks[2])
    ]
    found = TRITON.read_integers([moved[0], chunks[1], moved[1]], RANK)
    assert same_numbers(found, REFERENCE.read_integers(chunks, RANK))


@cache
def good() -> CodedIntegers:
    """4 lanes, and some escapes."""
    return chunk(7, 3, seed=8, scale=30)


def first_state(state: int) -> bytes:
    return state.to_bytes(4, "little") + good().symbols[4:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda: {"symbols": first_state(65535)}, "a coder's state starts at 65535; expected at least 65536"),
        (lambda: {"symbols": first_state(65536)}, "coder|words"),
        (lambda: {"symbols": first_state(0xFFFFFFFF)}, "coder|words"),
        (lambda: {"symbols": good().symbols[:-2]}, "words of coded symbols are stored; decoding read more"),
        (lambda: {"symbols": good().symbols + b"\0\0"}, "words of coded symbols are stored; decoding read only"),
        (lambda: {"symbols": good().symbols[:16]}, "0 words of coded symbols are stored; decoding read more"),
        (lambda: {"symbols": good().symbols[:-1]}, "bytes of coded symbols; expected an even number from 16 to 58"),
        (lambda: {"symbols": b""}, "0 bytes of coded symbols"),
        (lambda: {"symbols": good().symbols + bytes(42)}, "bytes of coded symbols"),
        (lambda: {"activities": good().activities + b"\0"}, "3 bytes of activity classes; expected 2"),
        (lambda: {"activities": b""}, "0 bytes of activity classes; expected 2"),
        (lambda: {"escapes": good().escapes + b"\0"}, "escaped values are needed"),
        (lambda: {"escapes": b""}, "escaped values are needed; 0 bytes hold 0"),
        (lambda: {"escapes": b"\xff" * 6 + good().escapes}, "an escaped value is longer than 5 bytes"),
    ],
)
def test_damage_is_found_and_stays_in_its_buffers(damage, message):
    damaged = replace(good(), **damage())
    with pytest.raises(CorruptStream, match=f"chunk 2: .*({message})"):
        TRITON.read_integers([chunk(5, 2), chunk(4, 3), damaged], RANK)


@settings(max_examples=20)
@given(st.data())
def test_any_bytes_do_as_the_reference_does(data):
    fields = {name: bytearray(getattr(good(), name)) for name in ("activities", "symbols", "escapes")}
    for _ in range(data.draw(st.integers(1, 3))):
        field = fields[data.draw(st.sampled_from(list(fields)))]
        field[data.draw(st.integers(0, len(field) - 1))] = data.draw(st.integers(0, 255))
    damaged = replace(good(), **{name: bytes(field) for name, field in fields.items()})
    results = []
    for backend in (REFERENCE, TRITON):
        try:
            results.append(backend.read_integers([damaged], RANK))
        except CorruptStream as error:
            results.append(str(error).removeprefix("chunk 0: "))
    if isinstance(results[0], str):
        assert results[0] == results[1]
    else:
        assert same_numbers(results[1], results[0])


def test_classes_without_tables_are_refused():
    with pytest.raises(InvalidArgument, match="chunk 0"):
        TRITON.read_integers([replace(good(), classes=np.array([27, 0, 0], np.uint8))], RANK)
    with pytest.raises(InvalidArgument, match="at most 2"):
        TRITON.read_integers([good()], 2)


# Places.


T, H, D = 19, 2, 12
SCALES = 10.0 ** torch.randint(-9, 7, (T, H, D), generator=torch.Generator().manual_seed(0))
KEYS, VALUES = (torch.randn(T, H, D, generator=torch.Generator().manual_seed(seed)) * SCALES for seed in (1, 2))
VALUES[0, 0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])
# Halfway between two numbers of bfloat16, e4m3 and e5m2, normal and not, and float32's own subnormals.
TIES = [
    1 + 2**-8,
    1 + 3 * 2**-8,
    1 + 2**-4,
    1 + 3 * 2**-4,
    1.125,
    1.375,
    1.5 * 2**-9,
    2**-10,
    1.5 * 2**-16,
    1e-40,
    4e-41,
    -3e-45,
]
VALUES[1, 0] = torch.tensor(TIES)
TURNS = [(0, False), (4, False), (4, True), (6, False), (6, True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize(("n_pairs", "interleaved"), TURNS)
def test_rows_are_turned_and_saturated_as_the_reference_does(dtype, n_pairs, interleaved):
    table = RopeTable(tuple(10000.0 ** (-i / 8) for i in range(n_pairs)), 1.25, interleaved)
    turn = table.turn(torch.arange(T, device=DEVICE) + 3, 0, inverse=False) if n_pairs else None
    for rows in (torch.float32, torch.bfloat16):
        # The interpreter misreads subnormal numbers of bfloat16.
        least = 0.0 if rows == torch.float32 else torch.finfo(rows).tiny
        keys, values = (side.where(~(side.abs() < least), 0.0).to(DEVICE, rows) for side in (KEYS, VALUES))
        found, expected = ([torch.zeros(H, T, D, device=DEVICE).to(dtype) for _ in range(2)] for _ in range(2))
        TRITON.place(keys, values, turn, (Target.of(found[0]), Target.of(found[1])))
        REFERENCE.place(keys, values, turn, (Target.of(expected[0]), Target.of(expected[1])))
        assert same_numbers(found[0], expected[0])
        assert same_numbers(found[1], expected[1])


@pytest.mark.parametrize("key_dim", [8, D])
def test_keys_and_values_of_two_widths(key_dim):
    """The narrower ones are turned like the others, and neither reaches into the other's places."""
    turn = RopeTable((1.0, 0.5, 0.25), 1.25).turn(torch.arange(T, device=DEVICE), 0, inverse=False)
    sides = KEYS[..., :key_dim].to(DEVICE), VALUES[..., : D + 4 - key_dim].to(DEVICE)
    found, expected = ([torch.zeros_like(side.transpose(0, 1)) for side in sides] for _ in range(2))
    for backend, written in ((TRITON, found), (REFERENCE, expected)):
        backend.place(*sides, turn, (Target.of(written[0]), Target.of(written[1])))
    assert all(map(same_numbers, found, expected))


@pytest.mark.parametrize("axes", ["BHNC", "BNHC", "BCHN"])
def test_rows_go_into_pages_of_any_order_and_nowhere_else(axes):
    """Pages of 8 tokens, keys and values side by side, in the middle of a tensor whose other pages stay."""
    sizes = {"B": 9, "H": H, "N": 8, "C": 2 * D}
    pages = torch.full([sizes[axis] for axis in axes], 7.0, dtype=torch.bfloat16, device=DEVICE)
    logical = pages.permute([axes.index(axis) for axis in "BHNC"])
    strides = dict(zip("BHNC", logical.stride(), strict=True))
    page, slot = torch.tensor([5, 1, 6])[torch.arange(T) // 8], torch.arange(T) % 8
    offsets = (page * strides["B"] + slot * strides["N"]).to(DEVICE)
    targets = [
        Target(pages.view(-1), offsets + kind * D * strides["C"], strides["H"], strides["C"]) for kind in range(2)
    ]
    expected = logical.clone()
    for kind, side in enumerate((KEYS, VALUES)):
        expected[page, :, slot, kind * D : (kind + 1) * D] = side.to(DEVICE, torch.bfloat16).clamp(-3.3e38, 3.3e38)
    keys, values = (side.to(DEVICE) for side in (KEYS, VALUES.clamp(-3.3e38, 3.3e38)))
    TRITON.place(keys, values, None, (targets[0], targets[1]))
    assert same_numbers(logical, expected)


def test_rows_of_any_strides_and_places_outside_of_the_data():
    keys = KEYS.permute(1, 2, 0).contiguous().permute(2, 0, 1).to(DEVICE)
    values = torch.cat([VALUES, VALUES], dim=2).to(DEVICE)[:, :, :D]
    data = torch.full((H * T * D + 64,), 7.0, device=DEVICE)
    inside = data[32:-32]
    offsets = torch.arange(T, device=DEVICE) * D
    offsets[3], offsets[5], offsets[7] = -D, 1 << 40, -(1 << 40)
    target = Target(inside, offsets, T * D, 1)
    TRITON.place(keys, values, None, (target, target))
    assert bool((data[:32] == 7).all())
    assert bool((data[-32:] == 7).all())
    written = inside.view(H, T, D)
    kept = [token for token in range(T) if token not in (2, 3, 5, 7)]
    assert same_numbers(
        written[:, kept], values.transpose(0, 1)[:, kept].clamp(-3.4028234663852886e38, 3.4028234663852886e38)
    )


def test_targets_that_do_not_fit_are_refused():
    side = torch.zeros(H, T, D, device=DEVICE)
    target, other = Target.of(side), Target.of(side.half())
    with pytest.raises(InvalidArgument, match="float16"):
        TRITON.place(KEYS.to(DEVICE), VALUES.to(DEVICE), None, (target, other))
    with pytest.raises(InvalidArgument, match="18 tokens"):
        TRITON.place(KEYS[1:].to(DEVICE), VALUES[1:].to(DEVICE), None, (target, target))


# The codec.


@pytest.mark.parametrize("profile", ["joint", "conditional"])
def test_a_stream_decodes_as_with_the_reference(profile):
    """But for the last places: the order of summation of the inverse transform is free."""
    options = {"step": 0.5, "window_tokens": 4, "window_format": "coded", "chunk_tokens": 16}
    cache, ids = told_cache(40), told_ids(40)
    reference = joint_codec(profile, **options)
    stream = reference.encode(cache, ids)
    expected = reference.decode(stream, ids)
    kernels = joint_codec(profile, backend="triton", device=DEVICE, **options)
    found = kernels.decode(stream, ids)
    lying_there = torch.frombuffer(bytearray(stream), dtype=torch.uint8).to(DEVICE)
    assert same_cache(kernels.decode(lying_there, ids), found)
    for side, of_reference in ((found.keys, expected.keys), (found.values, expected.values)):
        assert torch.allclose(side.cpu().float(), of_reference.float(), rtol=1e-3, atol=1e-3)
