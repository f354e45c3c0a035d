"""Products have the bits that their numbers give, whatever they are computed beside, from and on."""

import multiprocessing
import os
import threading

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kvtc.coding.product import (
    Blocks,
    Columns,
    PackedRows,
    all_finite,
    inverses,
    product,
    project_rest,
    spread_columns,
    used_columns,
)
from kvtc.coding.product_kernels import BLOCK_ROWS
from kvtc.coding.rope_kernels import turn_angles
from kvtc.coding.threads import Begun, in_threads
from kvtc.errors import InvalidArgument
from tests.processors import at_offset

SHAPES = [(1, 1, 1), (1, 7, 5), (13, 300, 65), (64, 256, 64), (5, 257, 63), (100, 513, 130)]


def operands(n_rows: int, n_terms: int, n_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.Generator().manual_seed(n_rows)
    return torch.randn(n_rows, n_terms, generator=drawn), torch.randn(n_terms, n_columns, generator=drawn)


def fused(a: np.float32, b: np.float32, c: np.float32) -> np.float32:
    """a * b + c, rounded once: products of float32 are exact in float64, and so is the sum where 80 bits hold it."""
    return np.float32(np.longdouble(a) * np.longdouble(b) + np.longdouble(c))


def by_definition(rows: NDArray[np.float32], matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """The order that docs/format.md lays down."""
    result = np.zeros((len(rows), matrix.shape[1]), np.float32)
    for i, j in np.ndindex(result.shape):
        for start in range(0, matrix.shape[0], BLOCK_ROWS):
            partial = np.float32(0)
            for k in range(start, min(start + BLOCK_ROWS, matrix.shape[0])):
                partial = fused(rows[i, k], matrix[k, j], partial)
            result[i, j] += partial
    return result


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_is_the_sum_in_its_order(shape):
    rows, matrix = operands(*shape)
    few = slice(0, 3)
    expected = by_definition(rows[few].numpy(), matrix[:, few].numpy())
    found = product(rows, matrix)[few, few].numpy()
    # float64 holds all but the rarest of these sums: a tie of the two roundings.
    assert (found == expected).mean() > 0.95
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    exact = (rows.double() @ matrix.double()).numpy()
    np.testing.assert_allclose(product(rows, matrix).numpy(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("offset", [0, 4, 16, 32])
@pytest.mark.parametrize("by_columns", [False, True])
def test_layout_has_no_say(offset, by_columns):
    rows, matrix = operands(40, 300, 130)
    there = at_offset(matrix, offset, by_columns)
    assert there.data_ptr() % 64 == offset
    assert torch.equal(product(at_offset(rows, offset, by_columns), there), product(rows, matrix))


def test_other_rows_and_columns_have_no_say():
    rows, matrix = operands(100, 513, 130)
    columns = Columns(matrix)
    whole = columns.times(rows)
    for part in (slice(0, 1), slice(7, 8), slice(50, 100)):
        assert torch.equal(columns.times(rows[part]), whole[part])
    assert torch.equal(columns.times(rows, n_columns=17), whole[:, :17])
    assert torch.equal(Columns(matrix[:, 60:70]).times(rows), whole[:, 60:70])


def test_zeros_at_the_end_of_rows_have_no_say():
    rows, matrix = operands(9, 513, 70)
    rows[:, 290:] = 0
    assert torch.equal(product(rows[:, :290], matrix[:290]), product(rows, matrix))
    assert torch.equal(Columns(matrix).times(rows[:, :290]), product(rows, matrix))


def test_threads_have_no_say():
    rows, matrix = operands(600, 900, 300)
    before, found = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2, 5):
            torch.set_num_threads(n_threads)
            found.append(product(rows, matrix))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_start_is_added_first_and_operands_are_rounded():
    rows, matrix = operands(4, 20, 6)
    start = torch.arange(6.0)
    assert torch.equal(Columns(matrix).times(rows, start), start + product(rows, matrix))
    narrow = Columns(matrix, torch.bfloat16, result=torch.bfloat16)
    expected = product(rows.bfloat16().float(), matrix.bfloat16().float())
    assert torch.equal(narrow.times(rows), expected.bfloat16())
    assert torch.equal(Columns(matrix, torch.bfloat16).times(PackedRows(rows, torch.bfloat16)), expected)


@pytest.mark.parametrize("shape", [(0, 5, 3), (3, 0, 4), (3, 5, 0)], ids=str)
def test_products_of_nothing(shape):
    assert torch.equal(product(*operands(*shape)), torch.zeros(shape[0], shape[2]))


def test_shapes_that_do_not_fit():
    rows, matrix = operands(4, 20, 6)
    for call in (lambda: Columns(matrix[:19]).times(rows), lambda: Columns(matrix).times(rows, n_columns=7)):
        with pytest.raises(InvalidArgument, match="columns of a matrix"):
            call()


def test_a_row_that_is_not_finite_spoils_no_other():
    rows, matrix = operands(9, 20, 70)
    spoilt = rows.clone()
    spoilt[4, 3] = torch.inf
    found = product(spoilt, matrix)
    assert not bool(found[4].isfinite().any())
    others = [row for row in range(9) if row != 4]
    assert torch.equal(found[others], product(rows, matrix)[others])


def test_inverses_are_those_of_the_blocks():
    factors = torch.randn(5, 24, 24, generator=torch.Generator().manual_seed(3)).double()
    blocks = factors @ factors.mT + torch.eye(24)
    found = inverses(blocks)
    torch.testing.assert_close(found @ blocks, torch.eye(24).double().expand(5, 24, 24))
    assert torch.equal(inverses(at_offset(blocks, 16, by_columns=True)), found)
    assert torch.equal(inverses(blocks[2:3]), found[2:3])


@pytest.mark.parametrize("block", [torch.zeros(2, 2), -torch.eye(2), torch.full((2, 2), torch.nan), torch.ones(2, 2)])
def test_a_block_without_an_inverse(block):
    with pytest.raises(InvalidArgument, match="no inverse"):
        inverses(block[None])


def test_angles_are_turned_to_the_nearest_float32():
    """Positions up to 2**31: the sines and cosines of float64 are right to the last digit of float32 but for ties."""
    angles = np.concatenate([np.linspace(0, 7, 999), np.geomspace(1e-6, 2.0**31 - 200, 999)]).astype(np.float32)
    cosines, sines = np.empty_like(angles), np.empty_like(angles)
    turn_angles(angles, cosines, sines)
    wide = angles.astype(np.longdouble)
    np.testing.assert_allclose(cosines, np.cos(wide).astype(np.float32), rtol=1.2e-7, atol=1e-9)
    np.testing.assert_allclose(sines, np.sin(wide).astype(np.float32), rtol=1.2e-7, atol=1e-9)


def test_an_error_in_a_thread_is_the_callers():
    before = torch.get_num_threads()
    torch.set_num_threads(2)

    def fail_at_the_second(first: int, stop: int) -> None:
        if first == 1:
            raise MemoryError(f"{first} .. {stop}")

    try:
        with pytest.raises(MemoryError, match=r"1 \.\. 2"):
            in_threads(fail_at_the_second, 4, 1 << 40)
    finally:
        torch.set_num_threads(before)


def test_work_within_work_shares_the_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    inside, both = set(), threading.Barrier(2)

    def work(*_: int) -> None:
        both.wait(60)
        mine = []
        in_threads(lambda *part: mine.append((threading.get_ident(), part)), 100, 1 << 40)
        inside.add(len({thread for thread, _ in mine}) <= 2)
        inside.add(len(mine) == 8)  # four parts of each of two threads

    in_threads(work, 2, 1 << 40)
    assert inside == {True}
    alone = []
    in_threads(lambda *part: alone.append(part), 100, 1 << 40)
    assert len(alone) == 16


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_products_go_on_in_a_forked_child():
    rows, matrix = operands(600, 900, 300)
    expected = product(rows, matrix)
    context = multiprocessing.get_context("fork")
    told = context.SimpleQueue()
    child = context.Process(target=lambda: told.put(bool((product(rows, matrix).numpy() == expected.numpy()).all())))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert told.get() is True


def used_operands(n_rows: int, n_terms: int) -> torch.Tensor:
    rows = torch.randn(n_rows, n_terms, generator=torch.Generator().manual_seed(n_terms))
    rows[:, ::3] = 0.0
    rows[-1, 3] = -0.0
    return rows


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("n_rows", [1, 6, 97])
def test_some_columns_of_rows_are_packed_as_they_are_alone(n_rows, by_columns):
    rows, matrix = operands(n_rows, 40, 30)
    chosen = torch.tensor([3, 0, 39, 17])
    laid = rows.T.contiguous().T if by_columns else rows
    packed = PackedRows(laid, chosen=chosen)
    assert torch.equal(packed.values, rows[:, chosen])
    assert torch.equal(Columns(matrix[:4]).times(packed), product(rows[:, chosen].contiguous(), matrix[:4]))


@pytest.mark.parametrize("size", [5, 16, 32, 300])
def test_products_with_blocks_are_those_of_all_features_to_the_last_bit(size):
    """Features that are zero are left out; a block of more rows than one partial sum takes is cut where a product is."""
    drawn = torch.Generator().manual_seed(size)
    blocks, values = torch.randn(3, size, size, generator=drawn), torch.randn(13, 7, generator=drawn)
    features = torch.randperm(3 * size, generator=drawn)[:7]
    dense = torch.zeros(13, 3 * size)
    dense[:, features] = values
    rows, (left, matrix) = Blocks(blocks).rows(values, torch.arange(7), features), operands(13, 20, 2 * size)
    plain = Columns(matrix).times(left)
    expected = plain.clone()
    for place, block in enumerate((2, 0)):
        here = slice(place * size, (place + 1) * size)
        expected[:, here] += product(dense[:, block * size : (block + 1) * size].contiguous(), blocks[block])
    found = Columns(matrix).times(left, blocks=[rows.of([2, 0])])
    if size <= BLOCK_ROWS:
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected)
    rounded = Columns(matrix, result=torch.bfloat16).times(left, blocks=[rows.of([2, 0])])
    torch.testing.assert_close(rounded, expected.bfloat16(), rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize("size", [5, 16, 40])
def test_the_rest_of_rows_is_projected_block_by_block(size):
    drawn = torch.Generator().manual_seed(size)
    rows, leading = torch.randn(203, 4 * size, generator=drawn), torch.randn(203, 9, generator=drawn)
    back, mean = torch.randn(9, 4 * size, generator=drawn), torch.randn(4 * size, generator=drawn)
    blocks = torch.randn(4, size, size, generator=drawn)
    places = torch.full((4 * size,), -1)
    wanted = torch.randperm(4 * size, generator=drawn)[:size]
    places[wanted] = torch.arange(size)
    layers, order = [], torch.arange(4 * size).view(4, size)
    for numbers in ([0, 2], [1, 3]):
        features = order[numbers].flatten()
        layers.append((Columns(back[:, features]), mean[features], numbers))
    found = torch.empty(203, size)
    project_rest(rows, PackedRows(leading), layers, [Blocks(blocks)], places, found)
    rest = rows - Columns(back).times(leading, mean)
    expected = torch.cat(
        [product(rest[:, part].contiguous(), block) for part, block in zip(order, blocks, strict=True)], dim=1
    )
    assert torch.equal(found, expected[:, wanted])


@pytest.mark.parametrize("n_rows", [1, 200])
def test_columns_that_hold_anything_are_found(n_rows):
    rows = used_operands(n_rows, 7)
    assert used_columns(rows).tolist() == [False, True, True, False, True, True, False]
    assert used_columns(rows.T.contiguous().T).tolist() == rows.any(dim=0).tolist()


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_found(wrong):
    rows = torch.full((9, 5), torch.finfo(torch.float32).max)
    assert all_finite(rows)
    rows[8, 4] = wrong
    assert not all_finite(rows)
    assert not all_finite(rows.T)


def test_columns_go_to_their_places():
    values, found = torch.randn(7, 3), torch.zeros(7, 5)
    spread_columns(values, torch.tensor([4, 0, 2]), found)
    assert torch.equal(found[:, [4, 0, 2]], values)
    assert not found[:, [1, 3]].any()


@pytest.mark.parametrize("n_operations", [0, 1 << 40])
def test_begun_work_gives_its_result_or_its_error(n_operations, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert Begun(lambda: 7, n_operations).result() == 7
    failing = Begun(lambda: 1 // 0, n_operations)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            failing.result()
