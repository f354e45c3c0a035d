"""Group quantization of the backend triton against the reference, in the interpreter where there is no GPU."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtc.backends import ReferenceBackend, make_backend
from kvtc.coding.paper.allocation import BitAllocation, Run
from kvtc.coding.paper.group_quantizer import SymbolType
from kvtc.coding.paper.groups import chunk_bytes
from kvtc.errors import CorruptStream

pytest.importorskip("triton")

pytestmark = pytest.mark.usefixtures("guarded_kernels", "poisoned_memory")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
REFERENCE, TRITON = ReferenceBackend(CPU), make_backend(DEVICE, "triton")
FP16, FP8, INT4, INT2 = SymbolType.FP16, SymbolType.FP8, SymbolType.INT4, SymbolType.INT2
# Sizes and counts at which neither tokens nor groups end with a byte, two runs of one type, and dropped coefficients.
MIXED = BitAllocation(
    (
        Run(0, 1, 3, FP16),
        Run(3, 4, 2, FP8),
        Run(12, 3, 3, INT4),
        Run(21, 5, 1, INT2),
        Run(26, 1, 2, INT4),
        Run(30, 7, 2, INT2),
    )
)


def coefficients_of(n: int, width: int = 46) -> torch.Tensor:
    """Falling over the range of float16 and below it, with groups of equal values and values past the range."""
    drawn = torch.randn(n, width, generator=torch.Generator().manual_seed(n)) * torch.logspace(3, -6, width)
    drawn[n // 2, 3:7] = 2.5
    drawn[0, 12:21] = 0
    drawn[-1, [0, 4, 13, 22, 31]] = torch.tensor([1e6, -1e6, 1e38, -1e38, 7e4])
    return drawn


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(found.cpu().view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize(("n", "cuts"), [(1, [0, 1]), (63, [0, 5, 5, 12, 63]), (257, [0, 257]), (1000, [0, 999, 1000])])
def test_chunks_are_the_references(n, cuts):
    coefficients = coefficients_of(n)
    spans = [slice(start, stop) for start, stop in pairwise(cuts)]
    expected = REFERENCE.pack_groups(coefficients, spans, MIXED)
    assert TRITON.pack_groups(coefficients.to(DEVICE), spans, MIXED) == expected
    counts = [span.stop - span.start for span in spans]
    assert same_bits(TRITON.unpack_groups(expected, counts, MIXED), REFERENCE.unpack_groups(expected, counts, MIXED))


@pytest.mark.parametrize("kind", list(SymbolType))
@pytest.mark.parametrize(("size", "count"), [(1, 1), (16, 2), (3, 5), (130, 1)])
def test_every_symbol_type_in_groups_of_any_size(kind, size, count):
    allocation = BitAllocation((Run(2, size, count, kind),))
    coefficients = torch.randn(9, 2 + size * count, generator=torch.Generator().manual_seed(size)) * 10
    spans = [slice(0, 4), slice(4, 9)]
    expected = REFERENCE.pack_groups(coefficients, spans, allocation)
    by_column = coefficients.T.contiguous().T.to(DEVICE)
    assert TRITON.pack_groups(by_column, spans, allocation) == expected
    found = TRITON.unpack_groups(expected, [4, 5], allocation)
    assert same_bits(found, REFERENCE.unpack_groups(expected, [4, 5], allocation))


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
@settings(max_examples=15)
@given(st.data())
def test_any_bytes_decode_as_the_references(data):
    counts = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))
    chunks = [data.draw(st.binary(min_size=size, max_size=size)) for size in (chunk_bytes(MIXED, n) for n in counts)]
    found = TRITON.unpack_groups(chunks, counts, MIXED).cpu()
    expected = REFERENCE.unpack_groups(chunks, counts, MIXED)
    assert torch.equal(found.isnan(), expected.isnan())
    assert same_bits(found.nan_to_num(0.0), expected.nan_to_num(0.0))


@pytest.mark.parametrize(("kind", "top"), [(INT2, 3.0), (INT4, 15.0), (FP8, 448.0)])
def test_halves_between_symbols_go_to_the_even_one(kind, top):
    """With a step of 1, or between neighbours of fp8."""
    low, halves = (-top, torch.arange(32) - 15.5) if kind is FP8 else (0.0, torch.arange(32) * 0.5 % top)
    coefficients = torch.cat([torch.tensor([low, top]), halves])[None]
    allocation = BitAllocation((Run(0, 34, 1, kind),))
    expected = REFERENCE.pack_groups(coefficients, [slice(0, 1)], allocation)
    assert TRITON.pack_groups(coefficients.to(DEVICE), [slice(0, 1)], allocation) == expected


def test_some_chunks_alone_in_any_order():
    coefficients, spans = coefficients_of(30), [slice(20, 29), slice(3, 6)]
    assert TRITON.pack_groups(coefficients.to(DEVICE), spans, MIXED) == REFERENCE.pack_groups(
        coefficients, spans, MIXED
    )


def test_bytes_may_be_on_the_device():
    coefficients, spans = coefficients_of(12), [slice(0, 5), slice(5, 6), slice(6, 12)]
    chunks = REFERENCE.pack_groups(coefficients, spans, MIXED)
    moved = [torch.frombuffer(bytearray(chunk), dtype=torch.uint8).to(DEVICE) for chunk in chunks]
    expected = REFERENCE.unpack_groups(chunks, [5, 1, 6], MIXED)
    for given_chunks in (moved, [moved[0], chunks[1], moved[2]]):
        assert same_bits(TRITON.unpack_groups(given_chunks, [5, 1, 6], MIXED), expected)


def test_without_runs_or_tokens_there_is_nothing():
    coefficients, nothing = coefficients_of(4).to(DEVICE), BitAllocation(())
    assert TRITON.pack_groups(coefficients, [slice(0, 4)], nothing) == [b""]
    assert TRITON.pack_groups(coefficients, [], MIXED) == []
    assert TRITON.pack_groups(coefficients[:0], [slice(0, 0)], MIXED) == [b""]
    assert TRITON.unpack_groups([b""], [4], nothing).shape == (4, 0)
    assert TRITON.unpack_groups([b"", b""], [0, 0], MIXED).shape == (0, MIXED.n_coefficients)
    assert TRITON.unpack_groups([], [], MIXED).shape == (0, MIXED.n_coefficients)


def test_chunks_of_another_length_are_refused():
    chunk = bytes(chunk_bytes(MIXED, 3))
    for damaged in (chunk[:-1], chunk + b"\0", b""):
        with pytest.raises(CorruptStream, match=f"chunk 1: {len(damaged)} bytes of groups; 3 tokens take {len(chunk)}"):
            TRITON.unpack_groups([chunk, damaged], [3, 3], MIXED)
