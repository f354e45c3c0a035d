"""The dynamic program against every segmentation there is, the measured table against the quantizer, and the allocation's bytes."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from math import inf

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtc.coding.paper.allocation import (
    BitAllocation,
    Run,
    allocate_bits,
    allocate_bits_for_error,
    distortion_of,
    truncate,
)
from kvtc.coding.paper.distortion import BLOCK_SIZES, SYMBOL_TYPES, DistortionTable, measure_distortion
from kvtc.coding.paper.group_quantizer import SymbolType, dequantize, quantize
from kvtc.coding.paper.groups import chunk_bytes, decode_groups, encode_groups
from kvtc.errors import CorruptStream, InvalidArgument

SIZES = (1, 2, 4)


@cache
def all_costs(rank: int, sizes: tuple[int, ...]) -> np.ndarray:
    """Bits of every segmentation of `rank` coefficients, in the order of `all_errors`."""
    if rank == 0:
        return np.zeros(1, np.int64)
    parts = [all_costs(rank - 1, sizes)]
    for symbol_type in SYMBOL_TYPES:
        parts += [all_costs(rank - size, sizes) + symbol_type.group_bits(size) for size in sizes if size <= rank]
    return np.concatenate(parts)


def all_errors(table: DistortionTable, start: int = 0) -> np.ndarray:
    """Error of every way to drop or store coefficients from `start` on: nothing is left out and nothing is clever."""
    if start == table.rank:
        return np.zeros(1)
    rest = {size: all_errors(table, start + size) for size in table.sizes if start + size <= table.rank}
    dropped = rest[1] if 1 in rest else all_errors(table, start + 1)
    parts = [dropped + float(table.energy[start])]
    for kind in range(len(SYMBOL_TYPES)):
        parts += [tail + float(table.errors[kind, table.sizes.index(size), start]) for size, tail in rest.items()]
    return np.concatenate(parts)


def random_table(seed: int, rank: int, sizes: tuple[int, ...] = SIZES, is_wild: bool = True) -> DistortionTable:
    """Wild: any errors at all, more bits may be worse. Else as quantization gives them: falling with bits and energy."""
    random = np.random.default_rng(seed)
    energy = random.exponential(size=rank) * 0.6 ** np.arange(rank) * 10
    errors = np.full((len(SYMBOL_TYPES), len(sizes), rank), inf)
    for index, size in enumerate(sizes):
        for start in range(rank - size + 1):
            if is_wild:
                errors[:, index, start] = random.exponential(size=3) * size * random.choice([0, 0.1, 1, 3])
            else:
                share = np.sort(random.random(3) * [0.5, 0.1, 0.01])[::-1]
                errors[:, index, start] = share * energy[start : start + size].sum() * (1 + 0.1 * size)
    return DistortionTable(energy.astype(np.float32), errors.astype(np.float32), sizes)


instances = {
    "seed": st.integers(0, 2**32 - 1),
    "rank": st.integers(1, 7),
    "sizes": st.sampled_from([(1, 2, 4), (1, 2, 3), (1, 3), (1,), (2, 4), (1, 5, 7)]),
    "budget": st.integers(0, 330),
    "is_wild": st.booleans(),
}


@settings(max_examples=500)
@given(**instances)
def test_the_dynamic_program_is_as_good_as_every_segmentation(seed, rank, sizes, budget, is_wild):
    table = random_table(seed, rank, sizes, is_wild)
    allocation = allocate_bits(table, budget)
    least = float(all_errors(table)[all_costs(rank, sizes) <= budget].min())
    assert distortion_of(allocation, table) == pytest.approx(least, rel=1e-12, abs=1e-12)
    assert allocation.bits_per_row <= budget
    assert allocation.n_coefficients <= rank
    assert all(run.size in sizes and run.symbol_type in SYMBOL_TYPES for run in allocation.runs)
    assert all(run.stop <= following.start for run, following in pairwise(allocation.runs))


@settings(max_examples=100)
@given(seed=instances["seed"], rank=st.integers(1, 7), is_wild=st.booleans())
def test_more_bits_never_hurt(seed, rank, is_wild):
    table = random_table(seed, rank, is_wild=is_wild)
    errors = [distortion_of(allocate_bits(table, budget), table) for budget in range(0, 300, 7)]
    assert all(after <= before + 1e-12 for before, after in pairwise(errors))
    unbounded = distortion_of(allocate_bits(table, 10**6), table)
    assert unbounded == pytest.approx(float(all_errors(table).min()), rel=1e-12, abs=1e-12)


@settings(max_examples=200)
@given(seed=instances["seed"], rank=st.integers(1, 7), is_wild=st.booleans(), share=st.floats(0, 1.2))
def test_the_fewest_bits_for_an_error(seed, rank, is_wild, share):
    table = random_table(seed, rank, is_wild=is_wild)
    errors, costs = all_errors(table), all_costs(rank, SIZES)
    least, most = float(errors.min()), float(np.sum(table.energy, dtype=np.float64))
    # Between two errors that can be reached: sums in another order do not decide.
    reached = np.unique(errors)
    allowed = least + share * (most - least)
    after = int(np.searchsorted(reached, allowed * (1 + 1e-9)))
    allowed = (reached[after - 1] + reached[after]) / 2 if 0 < after < len(reached) else reached[-1] * 2 + 1
    fewest = int(costs[errors <= allowed].min())
    allocation = allocate_bits_for_error(table, allowed, 10**4)
    assert allocation.bits_per_row == fewest
    assert distortion_of(allocation, table) <= allowed * (1 + 1e-9)
    assert allocate_bits_for_error(table, allowed, fewest).bits_per_row == fewest
    if fewest:
        with pytest.raises(InvalidArgument, match=f"within {fewest - 1} bits"):
            allocate_bits_for_error(table, allowed, fewest - 1)


def test_an_error_below_what_any_bits_reach_is_refused():
    table = random_table(0, 7)
    least = float(all_errors(table).min())
    for impossible in (-1.0, least * 0.99 - 1e-6):
        with pytest.raises(InvalidArgument, match="cannot be met"):
            allocate_bits_for_error(table, impossible, 10**4)


def test_a_long_table_in_doubling_budgets():
    """Past the first budgets that are tried; checked from both sides by the other program."""
    energy = np.linspace(2, 1, 300, dtype=np.float32)
    errors = np.full((3, 3, 300), inf, np.float32)
    for index, size in enumerate((1, 16, 64)):
        for kind, share in enumerate((0.3, 0.03, 0.002)):
            errors[kind, index, : 301 - size] = share * np.convolve(energy, np.ones(size), "valid")
    table = DistortionTable(energy, errors, (1, 16, 64))
    allowed = 0.05 * float(energy.sum())
    allocation = allocate_bits_for_error(table, allowed, 10**5)
    bits = allocation.bits_per_row
    assert bits > 256
    assert distortion_of(allocation, table) <= allowed
    assert distortion_of(allocate_bits(table, bits - 1), table) > allowed


def test_budgets_at_the_edges():
    table = random_table(1, 7, is_wild=False)
    cheapest = SymbolType.INT2.group_bits(1)
    assert allocate_bits(table, 0).runs == allocate_bits(table, cheapest - 1).runs == ()
    assert allocate_bits(table, cheapest).bits_per_row == cheapest
    with pytest.raises(InvalidArgument, match="negative; got -1"):
        allocate_bits(table, -1)
    assert allocate_bits(table, 10**9).runs == allocate_bits(table, 10**5).runs


def test_equal_neighbours_become_one_run():
    """Only pairs of int4 are any good: 3 of them, a gap of one, 2 more."""
    errors = np.full((3, 2, 11), 1000, np.float32)
    errors[1, 1, [0, 2, 4, 7, 9]] = 0
    energy = np.array([5, 5, 5, 5, 5, 5, 0, 5, 5, 5, 5], np.float32)
    allocation = allocate_bits(DistortionTable(energy, errors, (1, 2)), 1000)
    assert allocation.runs == (Run(0, 2, 3, SymbolType.INT4), Run(7, 2, 2, SymbolType.INT4))
    assert (allocation.bits_per_row, allocation.n_coefficients) == (5 * 40, 11)
    expected = [20.0] * 6 + [0.0] + [20.0] * 4 + [0.0]
    assert allocation.bits_per_coefficient(12).tolist() == expected


@pytest.mark.parametrize(
    ("rank", "budget"), [(10, 0), (10, 15), (10, 16), (10, 100), (10, 160), (10, 1000), (70_000, 10**9)]
)
def test_truncation(rank, budget):
    allocation = truncate(rank, budget)
    kept = min(rank, budget // 16)
    assert (allocation.n_coefficients, allocation.bits_per_row) == (kept, 16 * kept)
    assert all(run.symbol_type is SymbolType.FP16 and run.size == 1 for run in allocation.runs)
    assert BitAllocation.from_bytes(allocation.to_bytes(), 0, rank)[0] == allocation


# Bytes.


@st.composite
def allocations(draw) -> BitAllocation:
    runs, place = [], 0
    for _ in range(draw(st.integers(0, 6))):
        start = place + draw(st.integers(0, 5))
        size, count = draw(st.integers(1, 9)), draw(st.integers(1, 5))
        symbol_type = draw(st.sampled_from([SymbolType.INT2, SymbolType.INT4, SymbolType.FP8, SymbolType.FP16]))
        runs.append(Run(start, size, count, symbol_type))
        place = runs[-1].stop
    return BitAllocation(tuple(runs))


@given(allocation=allocations(), before=st.binary(max_size=3), after=st.binary(max_size=3))
def test_an_allocation_survives_its_bytes(allocation, before, after):
    data = before + allocation.to_bytes() + after
    found, end = BitAllocation.from_bytes(data, len(before), max(1, allocation.n_coefficients))
    assert found == allocation
    assert data[end:] == after
    assert allocation.bits_per_coefficient(allocation.n_coefficients).sum() == pytest.approx(allocation.bits_per_row)
    if allocation.runs:
        with pytest.raises(CorruptStream):
            BitAllocation.from_bytes(data, len(before), allocation.n_coefficients - 1)
    for length in range(len(before), end):
        with pytest.raises(CorruptStream):
            BitAllocation.from_bytes(data[:length], len(before), 10**6)


@given(data=st.binary(max_size=40), rank=st.integers(1, 2**33))
def test_any_bytes_are_an_allocation_or_corrupt(data, rank):
    try:
        allocation, end = BitAllocation.from_bytes(data, 0, rank)
    except CorruptStream:
        return
    assert allocation.to_bytes() == data[:end]
    assert allocation.n_coefficients <= rank


@given(allocation=allocations(), counts=st.lists(st.integers(0, 4), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_groups_come_back_from_their_bytes(allocation, counts, seed):
    """Whatever the runs, and however few the tokens of a chunk: bytes as many as promised, values as quantized."""
    width = allocation.n_coefficients + seed % 3
    coefficients = torch.randn(sum(counts), width, generator=torch.Generator().manual_seed(seed))
    coded = [encode_groups(part, allocation) for part in coefficients.split(counts)]
    assert [len(part) for part in coded] == [chunk_bytes(allocation, n) for n in counts]
    expected = torch.zeros(sum(counts), allocation.n_coefficients)
    for run in allocation.runs:
        for start in range(run.start, run.stop, run.size) if sum(counts) else ():
            group = slice(start, start + run.size)
            expected[:, group] = dequantize(*quantize(coefficients[:, group], run.symbol_type), run.symbol_type)
    decoded = torch.zeros_like(expected)
    for part, found in zip(coded, decoded.split(counts), strict=True):
        decode_groups(part, allocation, found.numpy())
        with pytest.raises(CorruptStream, match="bytes of groups"):
            decode_groups(part + b"0", allocation, found.numpy())
    assert torch.equal(decoded, expected)


# The measured table.


def simulated(coefficients: torch.Tensor, symbol_type: SymbolType, start: int, size: int) -> float:
    group = coefficients[:, start : start + size]
    restored = dequantize(*quantize(group, symbol_type), symbol_type)
    return float((restored.double() - group.double()).square().sum()) / len(coefficients)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 100.0, 1e5])
def test_measured_errors_are_those_of_the_quantizer(scale):
    """Float16 shifts and scales that are normal, subnormal, and past their range."""
    sizes, rank = (1, 2, 5, 16, 64), 80
    generator = torch.Generator().manual_seed(11)
    coefficients = torch.randn(1100, rank, generator=generator) * 0.95 ** torch.arange(rank) * scale
    coefficients[:, ::7] += 3 * scale
    table = measure_distortion(coefficients.numpy(), sizes)
    assert table.energy == pytest.approx(coefficients.double().square().mean(dim=0).numpy(), rel=1e-5)
    for kind, symbol_type in enumerate(SYMBOL_TYPES):
        for index, size in enumerate(sizes):
            measured = table.errors[kind, index]
            assert np.isinf(measured[rank - size + 1 :]).all()
            for start in {0, 1, 6, 7, 30, rank - size} & set(range(rank - size + 1)):
                expected = simulated(coefficients, symbol_type, start, size)
                assert measured[start] == pytest.approx(expected, rel=1e-3, abs=1e-9 * scale**2)


def test_measured_errors_of_constant_groups():
    coefficients = np.full((600, 8), 0.1, np.float32)
    table = measure_distortion(coefficients, (1, 4))
    expected = (np.float32(0.1) - np.float16(0.1).astype(np.float32)) ** 2
    for index, size in enumerate((1, 4)):
        np.testing.assert_allclose(table.errors[:, index, : 9 - size], size * expected, rtol=1e-3)


def test_a_table_does_not_depend_on_how_many_rows_it_saw():
    rows = np.random.default_rng(0).normal(size=(700, 20)).astype(np.float32)
    once, twice = measure_distortion(rows), measure_distortion(np.concatenate([rows, rows]))
    assert once.sizes == BLOCK_SIZES
    np.testing.assert_allclose(once.errors, twice.errors, rtol=1e-5)
    np.testing.assert_allclose(once.energy, twice.energy, rtol=1e-5)
    assert np.isinf(once.errors[:, BLOCK_SIZES.index(64) :]).all()
    in_blocks = measure_distortion(part for part in (rows[:0], rows[:1], rows[1:600], rows[600:]))
    np.testing.assert_allclose(in_blocks.errors, once.errors, rtol=1e-5)
    np.testing.assert_allclose(in_blocks.energy, once.energy, rtol=1e-5)


def test_an_allocation_loses_what_its_table_says():
    """The whole way: measure, allocate, code, decode, compare."""
    generator = torch.Generator().manual_seed(2)
    coefficients = torch.randn(800, 40, generator=generator) * 0.85 ** torch.arange(40)
    table = measure_distortion(coefficients.numpy(), (1, 4, 16))
    for budget in (100, 250, 500):
        allocation = allocate_bits(table, budget)
        data = encode_groups(coefficients, allocation)
        assert len(data) * 8 == 800 * allocation.bits_per_row
        decoded = torch.zeros_like(coefficients)
        decode_groups(data, allocation, decoded.numpy())
        lost = float((decoded.double() - coefficients.double()).square().sum()) / 800
        assert lost == pytest.approx(distortion_of(allocation, table), rel=1e-3)
