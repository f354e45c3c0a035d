"""Groups of layers: what each holds, its entry in the group table, and how many numbers its sections have.

A group is a set of layers whose cache is stored in one way: one kind, one part of a layer, one shape, one dtype.
docs/format.md, "Group table", is the specification.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from ..coding.exact.floats import FloatLayout
from ..coding.exact.tokens import exact_layout
from ..coding.states.rounding import ROUNDED_DTYPES
from ..errors import CorruptStream, InvalidArgument, UnsupportedVersion
from ..layer_runs import layer_runs

FULL_ATTENTION, WINDOW, LATENT = "full attention", "sliding window", "latent"
STATE, SIDE_BUFFER, NO_CACHE = "recurrent state", "side buffer", "no cache"
GROUP_KINDS = {FULL_ATTENTION: 1, WINDOW: 2, LATENT: 3, STATE: 4, SIDE_BUFFER: 5, NO_CACHE: 6}
DTYPES = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3, torch.float8_e4m3fn: 4, torch.float8_e5m2: 5}
DTYPE_OF = {number: dtype for dtype, number in DTYPES.items()}
MAX_LENGTH = 1 << 31
MAX_STATES = 16
"""Of one layer and part."""
MAX_NAMED_LAYERS = 1 << 12
"""In all groups of a stream."""

_GROUP = struct.Struct("<BBHHHHHHHI")
_RUN = struct.Struct("<HH")
GROUP_BYTES, RUN_BYTES = _GROUP.size, _RUN.size
_VALUES_ARE_KEYS, _HAS_RUN, _IS_CODED = 1, 2, 4
_KIND_NAMES = {number: name for name, number in GROUP_KINDS.items()}


Count = TypeVar("Count", int, npt.NDArray[np.int64])


class Part(IntEnum):
    """Which part of a layer's cache a group holds."""

    NOTHING = 0
    KEYS_AND_VALUES = 1
    CONVOLUTION_STATE = 2
    RECURRENT_STATE = 3
    LIGHTNING_STATE = 4
    INDEXER_KEYS = 5
    BLOCK_INDEX_KEYS = 6
    COMPRESSED_ENTRIES = 7
    BUFFERED_VALUES = 8
    BUFFERED_GATES = 9
    OVERLAP_VALUES = 10
    OVERLAP_GATES = 11
    INDEXER_POSITIONS = 12

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of groups that hold it."""
        if self is Part.KEYS_AND_VALUES:
            return FULL_ATTENTION, WINDOW, LATENT
        if self is Part.NOTHING:
            return (NO_CACHE,)
        return (STATE,) if self in _STATES else (SIDE_BUFFER,)

    @property
    def most_index(self) -> int:
        """The largest index among the equal parts of a layer."""
        if self in (Part.CONVOLUTION_STATE, Part.RECURRENT_STATE):
            return MAX_STATES - 1
        return 1 if self in _TAILS or self in _OVERLAPS or self is Part.COMPRESSED_ENTRIES else 0

    @property
    def is_snapshot(self) -> bool:
        """Whether it exists once at a position, and not for each token."""
        return self in _STATES or self in _TAILS or self in _OVERLAPS


_STATES = frozenset({Part.CONVOLUTION_STATE, Part.RECURRENT_STATE, Part.LIGHTNING_STATE})
_TAILS = frozenset({Part.BUFFERED_VALUES, Part.BUFFERED_GATES})
_OVERLAPS = frozenset({Part.OVERLAP_VALUES, Part.OVERLAP_GATES})


@dataclass(frozen=True)
class Group:
    """One entry of the group table.

    Parameters:
        kind: of `GROUP_KINDS`.
        part: of a layer's cache.
        dtype: of its numbers.
        layers: of the model, ascending.
        shape: of one token of one layer: heads, key features, value features. A part without heads and values has 1, features, 0.
            Of a state, its axes behind the batch: three, or two behind a 0.
        first_kv_head: where its heads stand in the model.
        index: which of a layer's equal parts it is.
        values_are_keys: whether a layer's values are its keys, and are not stored.
        has_run: whether the layers of a state have read tokens.
        extent: full attention and latents: the length that chose the rotation, 0 where nothing depends on it. Windows: their
            tokens. Side buffers: the tokens of one entry.
        is_coded: of a stream: whether the profile codes this group beside the first one. Groups of a cache do not say so.
    """

    kind: str
    part: Part
    dtype: torch.dtype
    layers: tuple[int, ...]
    shape: tuple[int, int, int]
    first_kv_head: int = 0
    index: int = 0
    values_are_keys: bool = False
    has_run: bool = False
    extent: int = 0
    is_coded: bool = False

    @property
    def has_rows(self) -> bool:
        """Whether a profile can code its tokens: heads with keys and values."""
        return self.kind in (FULL_ATTENTION, LATENT, WINDOW) and min(self.shape) > 0

    @property
    def can_be_further(self) -> bool:
        """Whether it can be coded beside the first: a window, but not one of latents."""
        heads, key_dim, value_dim = self.shape
        return self.kind == WINDOW and self.has_rows and (heads > 1 or key_dim == value_dim)

    @property
    def is_codable(self) -> bool:
        """Whether it can be the first coded group: rows of every token."""
        return self.kind in (FULL_ATTENTION, LATENT) and self.has_rows

    @property
    def is_complete(self) -> bool:
        """Whether what it holds of a token never changes and is never dropped, so that it can be restored at any token."""
        return self.kind in (FULL_ATTENTION, LATENT, NO_CACHE) or (
            self.kind == SIDE_BUFFER and not self.part.is_snapshot
        )

    @property
    def can_be_rounded(self) -> bool:
        """Whether a coder of states may round it."""
        return self.kind == STATE and self.dtype in ROUNDED_DTYPES

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def row_numbers(self) -> int:
        """Numbers of one token of all layers; of a state, of the whole of it."""
        heads, key_dim, value_dim = self.shape
        if self.kind == NO_CACHE:
            return 0
        if self.kind == STATE:
            return self.n_layers * math.prod(axis for axis in self.shape if axis)
        return self.n_layers * heads * (key_dim + value_dim)

    @property
    def row_bytes(self) -> int:
        return self.row_numbers * self.dtype.itemsize

    def rows_between(self, start: Count, stop: Count) -> Count:
        """How many rows a section has that covers the positions start .. stop - 1; of a window, at most."""
        if self.kind == NO_CACHE:
            return 0 * stop
        if self.kind == STATE:
            return 0 * stop + 1
        if self.part in _OVERLAPS:
            return 0 * stop + self.extent
        if self.part in _TAILS:
            return stop % self.extent
        return stop // self.extent - start // self.extent if self.kind == SIDE_BUFFER else stop - start

    def rows_held(self, position: int, start: int = 0) -> int:
        """How many of the tokens start .. position - 1 a window holds once `position` tokens were read."""
        return min(position - start, self.extent - 1)

    def layout(self, n_rows: int) -> FloatLayout:
        """How the numbers of a section of so many rows are ordered."""
        _, key_dim, value_dim = self.shape
        if self.kind == STATE:
            return FloatLayout(key_dim or 1, value_dim, self.dtype)
        if self.is_coded:
            return exact_layout(n_rows, (key_dim, value_dim), self.dtype)
        return FloatLayout(n_rows, key_dim + value_dim, self.dtype)

    def describe(self) -> str:
        """Which one it is, for messages."""
        name = self.part.name.lower().replace("_", " ")
        return self.kind if self.part in (Part.KEYS_AND_VALUES, Part.NOTHING) else f"{self.kind} ({name} {self.index})"


def pack_groups(groups: Sequence[Group]) -> bytes:
    """The group table: the entries, and then the runs of layers of all groups. Raises `InvalidArgument` for too many layers."""
    if (n_named := sum(group.n_layers for group in groups)) > MAX_NAMED_LAYERS:
        raise InvalidArgument(
            f"the groups of a cache name {n_named} layers; {MAX_NAMED_LAYERS} is the most that a stream can say"
        )
    runs = [layer_runs(group.layers) for group in groups]
    entries = b"".join(_pack(group, len(its)) for group, its in zip(groups, runs, strict=True))
    return entries + b"".join(_RUN.pack(*run) for its in runs for run in its)


def _pack(group: Group, n_runs: int) -> bytes:
    flags = group.values_are_keys * _VALUES_ARE_KEYS + group.has_run * _HAS_RUN + group.is_coded * _IS_CODED
    first = group.index if group.part.is_snapshot or group.kind == SIDE_BUFFER else group.first_kv_head
    return _GROUP.pack(
        GROUP_KINDS[group.kind], DTYPES[group.dtype], n_runs, group.part, first, *group.shape, flags, group.extent
    )  # fmt: skip


def count_runs(view: memoryview, offset: int, n_groups: int) -> int:
    """Runs of layers that the entries of a group table claim."""
    return sum(_GROUP.unpack_from(view, offset + GROUP_BYTES * index)[2] for index in range(n_groups))


def parse_groups(view: memoryview, offset: int, n_groups: int) -> tuple[Group, ...]:
    """The group table that begins at an offset, of a stream whose checksum holds.

    Raises `UnsupportedVersion` for kinds and parts that a later kvtc writes, `CorruptStream` for what no kvtc writes.
    """
    entries = [_GROUP.unpack_from(view, offset + GROUP_BYTES * index) for index in range(n_groups)]
    _check_known([(entry[0], entry[3]) for entry in entries])
    run_at, groups, n_named = offset + GROUP_BYTES * n_groups, [], 0
    for index, (kind, dtype, n_runs, part, first, *shape, flags, extent) in enumerate(entries):
        runs = [_RUN.unpack_from(view, run_at + RUN_BYTES * run) for run in range(n_runs)]
        run_at += RUN_BYTES * n_runs
        if not runs or any(not count or first_layer + count > 1 << 16 for first_layer, count in runs):
            raise CorruptStream(f"group {index} names its layers by the runs {runs[:4]}")
        n_named += sum(count for _, count in runs)
        if n_named > MAX_NAMED_LAYERS:
            raise CorruptStream(f"the groups name {n_named} layers and more; {MAX_NAMED_LAYERS} is the limit")
        if any(after[0] <= before[0] + before[1] for before, after in pairwise(runs)):
            raise CorruptStream(f"the runs of layers of group {index} do not ascend, or touch: {runs[:4]}")
        layers = tuple(layer for first_layer, count in runs for layer in range(first_layer, first_layer + count))
        if dtype not in DTYPE_OF or flags > (_VALUES_ARE_KEYS | _HAS_RUN | _IS_CODED):
            raise CorruptStream(f"group {index} has dtype {dtype} and flags {flags}: some value is unknown")
        is_indexed = Part(part).is_snapshot or _KIND_NAMES[kind] == SIDE_BUFFER
        group = Group(
            _KIND_NAMES[kind],
            Part(part),
            DTYPE_OF[dtype],
            layers,
            (shape[0], shape[1], shape[2]),
            0 if is_indexed else first,
            first if is_indexed else 0,
            bool(flags & _VALUES_ARE_KEYS),
            bool(flags & _HAS_RUN),
            extent,
            bool(flags & _IS_CODED),
        )
        _check_group(index, group)
        groups.append(group)
    check_together(groups)
    return tuple(groups)


def _check_known(found: list[tuple[int, int]]) -> None:
    """Raise `UnsupportedVersion`, naming the kinds found, for one that is not known, or holds a part that is not."""
    parts = set(Part)
    if any(kind not in _KIND_NAMES or part not in parts for kind, part in found):
        names = ", ".join(sorted({_KIND_NAMES.get(kind, f"kind {kind}") for kind, _ in found}))
        raise UnsupportedVersion(
            f"the stream holds {len(found)} groups of layers ({names}) with parts {sorted({part for _, part in found})}; this "
            f"kvtc reads the kinds {', '.join(GROUP_KINDS)}: upgrade kvtc"
        )


def _check_group(index: int, group: Group) -> None:
    """Raise `CorruptStream` unless the fields of an entry fit one another."""
    heads, key_dim, value_dim = group.shape
    is_right = {
        FULL_ATTENTION: heads and key_dim and not (group.values_are_keys and value_dim),
        LATENT: heads and key_dim and not (group.values_are_keys and value_dim),
        WINDOW: heads and key_dim and not (group.values_are_keys and value_dim) and group.extent >= 1,
        STATE: value_dim and (key_dim or not heads) and not group.extent,
        SIDE_BUFFER: heads and key_dim and not value_dim and group.extent >= 1,
        NO_CACHE: group.shape == (0, 0, 0) and not group.extent,
    }[group.kind]
    attention = group.part is Part.KEYS_AND_VALUES
    if (
        not is_right
        or group.kind not in group.part.kinds
        or (group.values_are_keys and not attention)
        or (group.has_run and group.kind != STATE)
        or (group.is_coded and not group.can_be_further)
        or group.extent > MAX_LENGTH
        or group.index > group.part.most_index
    ):
        raise CorruptStream(
            f"group {index}, {group.describe()}, has the shape {group.shape}, the extent {group.extent} and flags that do not fit"
        )


def check_together(groups: Sequence[Group]) -> None:
    """Raise `CorruptStream` where a layer has one part twice, or keys and values of several kinds, or has a part beside nothing."""
    held: dict[tuple[Part, int], set[int]] = {}
    for group in groups:
        seen = held.setdefault((group.part, group.index), set())
        for layer in sorted(seen & set(group.layers))[:1]:
            raise CorruptStream(f"two groups hold {group.part.name.lower().replace('_', ' ')} of layer {layer}")
        seen.update(group.layers)
    empty = held.pop((Part.NOTHING, 0), set())
    for layer in sorted(empty & set().union(*held.values()))[:1]:
        raise CorruptStream(f"layer {layer} is in a group without a cache and in another one")
