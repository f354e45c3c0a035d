"""Encoding on a GPU: coefficients to integers by cost, and the integers of many chunks to bytes, a launch each (docs/format.md).

Bytes are those of `coding` for the same coefficients. Escapes are rare: the device finds them, the host writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...coding.bitpack import pack, packed_bytes
from ...coding.joint.escapes import encode_escapes
from ...coding.joint.probability import ProbabilityTables
from ...coding.joint.rounding import BIT_PRICE
from ...coding.joint.uniform_quantizer import ACTIVITY_BITS, ESCAPE, N_ACTIVITIES, N_CLASSES, N_SYMBOLS
from ...coding.rans import count_lanes
from ...errors import InvalidArgument
from ..interface import IntegerBytes
from .decode_kernels import THREADS
from .encode_kernels import COPIED_WORDS, GROUP, collect_words, encode_chunks, round_tokens

_Uploaded = tuple[Tensor, Tensor, Tensor, Tensor]


class EncodeTables:
    """Probability tables as the kernels take them: uploaded when they are first seen, kept as long as they live.

    Of each: costs float32 [classes, symbols, activities], negative where the symbol escapes; offsets float32 [classes, activities,
    2]; entries int32 and reciprocals int64 [activities, classes, symbols].
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._uploaded: WeakKeyDictionary[ProbabilityTables, _Uploaded] = WeakKeyDictionary()

    def of(self, tables: ProbabilityTables) -> _Uploaded:
        """Costs, offsets, entries, reciprocals."""
        uploaded = self._uploaded.get(tables)
        if uploaded is None:
            expected = (N_ACTIVITIES, N_CLASSES, N_SYMBOLS)
            if tables.frequencies.shape != expected:
                raise InvalidArgument(f"frequency tables {tables.frequencies.shape}; expected {expected}")
            costs = np.where(tables.frequencies == 0, -tables.costs, tables.costs).transpose(1, 2, 0)
            parts = (
                np.ascontiguousarray(costs),
                np.ascontiguousarray(tables.offsets.transpose(1, 0, 2)),
                tables.rans.entries.view(np.int32),
                tables.rans.reciprocals.view(np.int64),
            )
            costs_, offsets, entries, reciprocals = (torch.from_numpy(part).to(self._device) for part in parts)
            uploaded = self._uploaded[tables] = costs_, offsets, entries, reciprocals
        return uploaded


@dataclass(frozen=True, eq=False)
class RoundedOnDevice:
    """symbols: int64 [groups, T], those of 8 coefficients in its bytes, 0 past the last. values: int32 [n, T], set where the symbol
    is an escape. activities: uint8 [T]. token_bits: float32 [T]."""

    symbols: Tensor
    values: Tensor
    activities: Tensor
    token_bits: Tensor

    @property
    def bits(self) -> npt.NDArray[np.float32]:
        """[T]: what the tables say the symbols of each token take."""
        return self._on_host[0]

    @property
    def token_class(self) -> npt.NDArray[np.uint8]:
        """[T]: activity classes."""
        return self._on_host[1]

    @cached_property
    def _on_host(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
        n = len(self.activities)
        both = torch.cat([self.token_bits.view(torch.uint8), self.activities]).cpu().numpy()
        return both[: 4 * n].view(np.float32), both[4 * n :]


def round_coefficients(
    coefficients: Tensor, step: float, classes: npt.NDArray[np.uint8], tables: ProbabilityTables, uploaded: EncodeTables
) -> RoundedOnDevice:
    """As `coding.rounding.round_coefficients`, to the last bit; best where the tokens of a coefficient lie side by side."""
    n_tokens, n_columns = len(coefficients), len(classes)
    _check_classes(classes)
    if coefficients.dtype != torch.float32 or coefficients.shape[1] < n_columns:
        raise InvalidArgument(
            f"coefficients {coefficients.dtype} {tuple(coefficients.shape)}; expected float32 [T, {n_columns} or more]"
        )
    device = coefficients.device
    used = coefficients[:, :n_columns]
    if used.stride(0) != 1:
        used = used.T.contiguous().T
    rounded = RoundedOnDevice(
        torch.empty(-(-n_columns // GROUP.value), n_tokens, dtype=torch.int64, device=device),
        torch.empty(n_columns, n_tokens, dtype=torch.int32, device=device),
        torch.zeros(n_tokens, dtype=torch.uint8, device=device),
        torch.zeros(n_tokens, dtype=torch.float32, device=device),
    )
    if not used.numel():
        return rounded
    costs, offsets, _, _ = uploaded.of(tables)
    with torch.cuda.device_of(used):  # type: ignore[no-untyped-call]
        round_tokens[(-(-n_tokens // THREADS.value),)](
            used, used.stride(1), n_tokens, n_columns, step,
            torch.from_numpy(classes.copy()).to(device), costs, offsets,
            rounded.values, rounded.symbols, rounded.activities, rounded.token_bits,
            BIT_PRICE=BIT_PRICE,
            num_warps=1,
            enable_fp_fusion=False,
        )  # fmt: skip
    return rounded


def write_integers(
    rounded: RoundedOnDevice,
    spans: Sequence[slice],
    classes: npt.NDArray[np.uint8],
    tables: ProbabilityTables,
    uploaded: EncodeTables,
) -> list[IntegerBytes]:
    """What `round_coefficients` gave for these classes and tables -> bytes of chunks; spans: their tokens.

    Raises `InvalidArgument` for a symbol of frequency 0 where the escape has none either.
    """
    bounds = [(start, max(start, stop)) for start, stop, _ in (span.indices(len(rounded.activities)) for span in spans)]
    symbols = _encode(rounded, bounds, classes, uploaded.of(tables))
    activities = _pack_activities(rounded.token_class, bounds)
    return [IntegerBytes(*parts) for parts in zip(activities, symbols, _write_escapes(rounded, bounds), strict=True)]


def _encode(
    rounded: RoundedOnDevice, bounds: Sequence[tuple[int, int]], classes: npt.NDArray[np.uint8], uploaded: _Uploaded
) -> list[bytes]:
    """rANS data of chunks."""
    _check_classes(classes)
    n_columns, n_tokens = rounded.values.shape
    if len(classes) != n_columns:
        raise InvalidArgument(f"classes of {len(classes)} columns for the integers of {n_columns}")
    starts = np.array([start for start, _ in bounds], np.int64)
    counts = np.array([stop - start for start, stop in bounds], np.int64)
    lanes = np.array([count_lanes(n_columns, count) for count in counts.tolist()], np.int64)
    coded = np.flatnonzero(lanes)
    if not len(coded):
        return [b""] * len(bounds)
    device = rounded.symbols.device
    ends = np.cumsum(counts[coded] * n_columns + 2 * lanes[coded])
    fields = np.stack([starts[coded], counts[coded], lanes[coded], ends], axis=1)
    padded = np.pad(classes, (0, -n_columns % GROUP.value)).view("<i8")
    words = torch.empty(int(ends[-1]), dtype=torch.uint16, device=device)
    report = torch.empty(len(coded), 2, dtype=torch.int32, device=device)
    with torch.cuda.device_of(words):  # type: ignore[no-untyped-call]
        encode_chunks[(len(coded),)](
            rounded.symbols, n_tokens, torch.from_numpy(padded).to(device), n_columns, rounded.activities, uploaded[2], uploaded[3],
            torch.from_numpy(fields).to(device), words, report,
            num_warps=1,
            enable_fp_fusion=False,
        )  # fmt: skip
    n_words, is_gap = report.cpu().numpy().T.astype(np.int64)
    if is_gap.any():
        raise InvalidArgument("a symbol has frequency 0 in its table: it cannot be coded")
    parts = _collected(words, ends, n_words + 2 * lanes[coded])
    of_chunk = dict(zip(coded.tolist(), parts, strict=True))
    return [of_chunk.get(chunk, b"") for chunk in range(len(bounds))]


def _collected(words: Tensor, ends: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> list[bytes]:
    """The words before each end, in one copy to the host."""
    stops = np.cumsum(counts)
    fields = np.stack([ends - counts, counts, stops - counts], axis=1)
    joined = torch.empty(int(stops[-1]), dtype=torch.uint16, device=words.device)
    with torch.cuda.device_of(words):  # type: ignore[no-untyped-call]
        collect_words[(len(counts), -(-int(counts.max()) // COPIED_WORDS.value))](
            words, torch.from_numpy(fields).to(words.device), joined, num_warps=8, enable_fp_fusion=False
        )
    data = joined.cpu().numpy().astype("<u2", copy=False)
    return [data[stop - count : stop].tobytes() for stop, count in zip(stops.tolist(), counts.tolist(), strict=True)]


def _pack_activities(activities: npt.NDArray[np.uint8], bounds: Sequence[tuple[int, int]]) -> list[bytes]:
    """Activity classes of chunks, all packed at once."""
    cuts = list(accumulate((packed_bytes(stop - start, ACTIVITY_BITS) for start, stop in bounds), initial=0))
    per_byte = 8 // ACTIVITY_BITS
    padded = np.zeros(per_byte * cuts[-1], np.uint8)
    for cut, (start, stop) in zip(cuts, bounds, strict=False):
        padded[per_byte * cut :][: stop - start] = activities[start:stop]
    whole = pack(torch.from_numpy(padded), ACTIVITY_BITS).numpy().tobytes()
    return [whole[begin:end] for begin, end in pairwise(cuts)]


def _write_escapes(rounded: RoundedOnDevice, bounds: Sequence[tuple[int, int]]) -> list[bytes]:
    """Escaped values of chunks, in each by coefficient and token."""
    n_tokens = len(rounded.activities)
    is_escape = (rounded.symbols.view(torch.uint8) == ESCAPE).view(len(rounded.symbols), n_tokens, GROUP.value)
    group, token, place = is_escape.nonzero(as_tuple=True)
    column = group * GROUP.value + place
    found = torch.stack([token, column, rounded.values[column, token].long()]).cpu().numpy()
    found = found[:, found[0].argsort(kind="stable")]
    written = []
    for start, stop in bounds:
        first, last = found[0].searchsorted([start, stop])
        of_token, of_column, value = found[:, first:last]
        written.append(encode_escapes(value[np.lexsort((of_token, of_column))].astype(np.int32)))
    return written


def _check_classes(classes: npt.NDArray[np.uint8]) -> None:
    if len(classes) and int(classes.max()) >= N_CLASSES:
        raise InvalidArgument(f"column class {classes.max()} of {N_CLASSES}")
