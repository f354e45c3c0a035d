"""Decoding on a GPU: the bytes of many chunks to coefficients, in one launch (docs/format.md, "Decoding on a GPU").

The kernel decodes whatever the bytes say and stays inside of its buffers; it reports what `rans.decode_symbols` would look at.
Escapes are rare: it leaves NaN in their place, and their values are filled in afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...coding.bitpack import packed_bytes
from ...coding.joint.escapes import decode_escapes
from ...coding.joint.probability import ProbabilityTables
from ...coding.joint.uniform_quantizer import (
    ACTIVITY_BITS,
    ESCAPE,
    MAX_SYMBOL,
    N_ACTIVITIES,
    N_CLASSES,
    N_SYMBOLS,
    dequantize,
)
from ...coding.rans import LOWER_BOUND, check_ends, check_starts, count_lanes, count_words
from ...errors import CorruptStream, InvalidArgument
from ..interface import Bytes, CodedIntegers
from .decode_kernels import NEVER, NODE, THREADS, decode_integers

_FIELDS = (
    "lanes",
    "tokens",
    "columns",
    "words",
    "words_at",
    "activities_at",
    "classes_at",
    "tables_at",
    "output_at",
)
"""What the kernel is told of each chunk, in its order; *_at: elements from the beginning of a buffer."""


class DecodeTables:
    """Probability tables as the kernel takes them: uploaded when they are first seen, kept as long as they live.

    Of each: search trees int32 [tables, 9, 4], a root and 8 leaves of first slots, two in each; entries int64 [tables, 64]; and for
    escapes their offsets float32 [tables, 2].
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._uploaded: WeakKeyDictionary[ProbabilityTables, tuple[Tensor, Tensor, Tensor]] = WeakKeyDictionary()

    def of(self, tables: Sequence[ProbabilityTables]) -> tuple[Tensor, Tensor, Tensor]:
        """Trees, entries and offsets of one or more, one after another."""
        if len(tables) == 1:
            return self._of(tables[0])
        trees, entries, offsets = (torch.cat(parts) for parts in zip(*(self._of(each) for each in tables), strict=True))
        return trees, entries, offsets

    def _of(self, tables: ProbabilityTables) -> tuple[Tensor, Tensor, Tensor]:
        uploaded = self._uploaded.get(tables)
        if uploaded is None:
            parts = _trees(tables), _entries(tables), torch.from_numpy(tables.offsets).reshape(-1, 2)
            uploaded = parts[0].to(self._device), parts[1].to(self._device), parts[2].to(self._device)
            self._uploaded[tables] = uploaded
        return uploaded


def _trees(tables: ProbabilityTables) -> Tensor:
    leaves = tables.rans.first_slots.astype("<u2").reshape(-1, N_SYMBOLS // NODE.value, NODE.value)
    nodes = np.concatenate([leaves[:, None, :, 0], leaves], axis=1)
    nodes[..., 0] = NEVER.value
    return torch.from_numpy(nodes.view("<i4"))


def _entries(tables: ProbabilityTables) -> Tensor:
    """Frequency, first slot and, of what is not an escape, the coefficient at a step of 1."""
    expected = (N_ACTIVITIES, N_CLASSES, N_SYMBOLS)
    if tables.frequencies.shape != expected or not np.isfinite(tables.offsets).all():
        raise InvalidArgument(
            f"frequency tables {tables.frequencies.shape} and offsets; expected {expected} and finite offsets: NaN marks an escape"
        )
    offsets = torch.from_numpy(tables.offsets).reshape(-1, 1, 2)
    coefficients = dequantize(torch.arange(-MAX_SYMBOL, MAX_SYMBOL + 2)[None], offsets, 1.0)
    coefficients[:, ESCAPE] = torch.nan
    entries = np.empty((len(offsets), N_SYMBOLS, 2), "<u4")
    entries[..., 0], entries[..., 1] = tables.rans.entries, coefficients.numpy().view(np.uint32)
    return torch.from_numpy(entries.view("<i8")[..., 0])


def read_integers(chunks: Sequence[CodedIntegers], rank: int, tables: DecodeTables, device: torch.device) -> Tensor:
    """Chunks -> coefficients [T, rank] float32 of their tokens in order, column by column in memory; those not coded are zero.

    Raises `CorruptStream`, naming the chunk by its index, where `coding` does for one chunk.
    """
    n_words = [_checked(index, chunk, rank) for index, chunk in enumerate(chunks)]
    if not chunks:
        return torch.zeros(0, rank, dtype=torch.float32, device=device)
    output = torch.zeros(rank, sum(chunk.n_tokens for chunk in chunks), dtype=torch.float32, device=device)
    batch = _Batch(chunks, n_words, tables, device)
    escaped = _escaped_values(chunks, batch.decode(output))
    if len(escaped):
        batch.fill_escapes(output, escaped)
    return output.T


class _Batch:
    """Chunks as the kernel takes them: all bytes in one buffer on the device, and the fields of each chunk."""

    def __init__(
        self, chunks: Sequence[CodedIntegers], n_words: Sequence[int], tables: DecodeTables, device: torch.device
    ) -> None:
        n = len(chunks)
        kinds = list({id(chunk.tables): chunk.tables for chunk in chunks}.values())
        tables_at = {id(kind): index * N_ACTIVITIES * N_CLASSES for index, kind in enumerate(kinds)}
        # Most chunks of a stream have the same classes, and what is the same is read from one place.
        classes = [chunk.classes.tobytes() for chunk in chunks]
        distinct = list(dict.fromkeys(classes))
        parts = [*(chunk.activities for chunk in chunks), *(chunk.symbols for chunk in chunks), *distinct]
        self._data, places = _joined(parts, device)
        classes_at = dict(zip(distinct, places[2 * n :], strict=True))
        columns = (
            [count_lanes(len(chunk.classes), chunk.n_tokens) for chunk in chunks],
            [chunk.n_tokens for chunk in chunks],
            [len(chunk.classes) for chunk in chunks],
            n_words,
            [place // 2 for place in places[n : 2 * n]],
            places[:n],
            [classes_at[each] for each in classes],
            [tables_at[id(chunk.tables)] for chunk in chunks],
            list(accumulate((chunk.n_tokens for chunk in chunks), initial=0))[:n],
        )
        fields = np.array(columns, np.int64)
        self._of_chunk = dict(zip(_FIELDS, fields, strict=True))
        self._fields = torch.from_numpy(fields.T.copy()).to(device)
        self._steps = torch.tensor([chunk.step for chunk in chunks], dtype=torch.float32, device=device)
        self._trees, self._entries, self._offsets = tables.of(kinds)
        self._chunk_of_thread = share_out(self._of_chunk)

    def decode(self, output: Tensor) -> npt.NDArray[np.int64]:
        """Fill the coded columns of `output` [rank, T], NaN for escapes -> escapes of each chunk."""
        n_threads = len(self._chunk_of_thread)
        report = torch.empty(n_threads, 4, dtype=torch.int32, device=output.device)
        if n_threads:
            with torch.cuda.device_of(output):  # type: ignore[no-untyped-call]
                decode_integers[(n_threads // THREADS.value,)](
                    self._data,
                    self._data.view(torch.uint16),
                    self._fields,
                    self._steps,
                    self._trees.view(torch.uint32),
                    self._entries,
                    torch.from_numpy(self._chunk_of_thread).to(output.device),
                    output,
                    output.stride(0),
                    report,
                    num_warps=1,
                    enable_fp_fusion=False,
                )
        return self._checked_escapes(report.cpu().numpy())

    def _checked_escapes(self, report: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        """What the threads report -> escapes of each chunk; `CorruptStream` for the first chunk that does not end as it should."""
        used = self._chunk_of_thread >= 0
        chunk_of, report = self._chunk_of_thread[used], report[used]
        n_words = self._of_chunk["words"]
        starts, ends = report[:, 0].view(np.uint32), report[:, 1].view(np.uint32)
        wrong = (starts < LOWER_BOUND) | (ends != LOWER_BOUND) | (report[:, 2] != n_words[chunk_of])
        if wrong.any():
            index = int(chunk_of[wrong].min())
            lanes = chunk_of == index
            with _naming(index):
                check_starts(starts[lanes])
                check_ends(ends[lanes], int(report[lanes, 2][0]), int(n_words[index]))
        return np.bincount(chunk_of, report[:, 3], minlength=len(n_words)).astype(np.int64)

    def fill_escapes(self, output: Tensor, escaped: npt.NDArray[np.int32]) -> None:
        """Put escaped integers, ordered [chunk][column][token], where `output` is NaN."""
        column, token = output[: int(self._of_chunk["columns"].max())].isnan().nonzero(as_tuple=True)
        first_tokens = torch.from_numpy(self._of_chunk["output_at"]).to(output.device)
        chunk, order = (torch.bucketize(token, first_tokens, right=True) - 1).sort(stable=True)
        column, token = column[order], token[order]
        here = dict(zip(_FIELDS, self._fields[chunk].T, strict=True))
        local = token - here["output_at"]
        activity = self._data[here["activities_at"] + local // 4].long() >> 2 * (local % 4) & (N_ACTIVITIES - 1)
        classes = self._data[here["classes_at"] + column].long()
        offsets = self._offsets[here["tables_at"] + activity * N_CLASSES + classes]
        output[column, token] = dequantize(torch.from_numpy(escaped).to(output.device), offsets, self._steps[chunk])


def _checked(index: int, chunk: CodedIntegers, rank: int) -> int:
    """Words of a chunk whose lengths agree with one another and whose classes have tables."""
    n_columns = len(chunk.classes)
    if n_columns > rank or (n_columns and int(chunk.classes.max()) >= N_CLASSES):
        raise InvalidArgument(
            f"chunk {index}: classes of {n_columns} columns; expected at most {rank}, below {N_CLASSES}"
        )
    with _naming(index):
        n_bytes = packed_bytes(chunk.n_tokens, ACTIVITY_BITS)
        if len(chunk.activities) != n_bytes:
            raise CorruptStream(f"{len(chunk.activities)} bytes of activity classes; expected {n_bytes}")
        return count_words(len(chunk.symbols), n_columns, chunk.n_tokens)


def share_out(of_chunk: dict[str, npt.NDArray[np.int64]]) -> npt.NDArray[np.int32]:
    """Fields of the chunks -> the chunk of each thread of whole warps, -1 for none.

    Lanes are powers of two up to a warp: in falling order they fill warps without gaps, each chunk's at a multiple of their number.
    A warp takes as many steps as its most columns times its most blocks, so what shares one has the same columns.
    """
    lanes, columns = of_chunk["lanes"], of_chunk["columns"]
    blocks = -(-of_chunk["tokens"] // np.maximum(lanes, 1))
    warps = [np.zeros(0, np.int64)]
    # What takes longest begins first.
    for n_columns in np.unique(columns)[::-1]:
        chunks = np.flatnonzero(columns == n_columns)
        chunks = chunks[np.lexsort((-blocks[chunks], -lanes[chunks]))]
        threads = np.repeat(chunks, lanes[chunks])
        warps.append(np.pad(threads, (0, -len(threads) % THREADS.value), constant_values=-1))
    return np.concatenate(warps).astype(np.int32)


def _joined(parts: Sequence[Bytes], device: torch.device) -> tuple[Tensor, list[int]]:
    """All parts in one buffer on the device, and where each begins: at even places, for words are read as uint16."""
    on_host = [part for part in parts if isinstance(part, bytes)]
    on_device = [part for part in parts if isinstance(part, Tensor)]
    host_places, n_host = _even_places(on_host, 0)
    device_places, _ = _even_places(on_device, n_host)
    buffer = torch.empty(n_host, dtype=torch.uint8, pin_memory=device.type == "cuda")
    view = buffer.numpy()
    for place, part in zip(host_places, on_host, strict=True):
        view[place : place + len(part)] = np.frombuffer(part, np.uint8)
    data = buffer.to(device, non_blocking=True)
    if on_device:
        gap = torch.zeros(1, dtype=torch.uint8, device=device)
        data = torch.cat([data, *(piece for part in on_device for piece in (part, gap[: len(part) % 2]))])
    of_host, of_device = iter(host_places), iter(device_places)
    return data, [next(of_device if isinstance(part, Tensor) else of_host) for part in parts]


def _even_places(parts: Sequence[Bytes], first: int) -> tuple[list[int], int]:
    """Where each part begins if each takes an even number of bytes, and where the last one ends."""
    *places, end = accumulate((len(part) + len(part) % 2 for part in parts), initial=first)
    return places, end


def _escaped_values(chunks: Sequence[CodedIntegers], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """Escaped integers of all chunks; `CorruptStream` unless each holds as many as were decoded."""
    on_device = [chunk.escapes for chunk in chunks if isinstance(chunk.escapes, Tensor)]
    fetched = torch.cat(on_device).cpu().numpy().tobytes() if on_device else b""
    parts, place = [], 0
    for chunk in chunks:
        data = chunk.escapes
        if isinstance(data, Tensor):
            place, data = place + len(data), fetched[place : place + len(data)]
        parts.append(data)
    joined = b"".join(parts)
    # Value after value: where each chunk's last one stops, the chunk must.
    stops = np.flatnonzero(np.frombuffer(joined, np.uint8) < 128) + 1
    needed = np.cumsum(counts)
    if len(stops) == needed[-1] and (np.append(0, stops)[needed] == np.cumsum([len(part) for part in parts])).all():
        with suppress(CorruptStream):
            return decode_escapes(joined, int(needed[-1]))
    # Something is wrong: chunk by chunk, to say where.
    values = []
    for index, (part, count) in enumerate(zip(parts, counts.tolist(), strict=True)):
        with _naming(index):
            values.append(decode_escapes(part, count))
    return np.concatenate(values)


@contextmanager
def _naming(index: int) -> Iterator[None]:
    """Errors of a chunk say which one it is."""
    try:
        yield
    except CorruptStream as error:
        raise CorruptStream(f"chunk {index}: {error}") from error
