"""What an entry of a store holds, as far as it says so itself: no calibration, no model."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..container.stream import parse_stream, parse_tables
from ..container.tables import MAGIC, parse_counts
from ..errors import KvtcError, UnsupportedVersion
from ..layer_runs import describe_layers
from ..prefix_cache.sort import SORTS, Sort
from ..prefix_cache.tails import INDEX_MAGIC, parse_index
from ..store.frame import ENCRYPTED_MAGIC
from ..store.place import DAMAGED, FOREIGN, SOUND

HEAD_BYTES = 8192
"""Of a value, from which it is described: the tables of a stream of two hundred chunks."""

STREAM, INDEX, SORT, ENCRYPTED, BYTES = "stream", "index of tails", "sort", "encrypted", "bytes"
OTHER = "other"
"""The kind of a key that neither a prefix cache nor an adapter gives."""
_STREAM_KINDS = ("chunk", "tail", "point", "window", "page")
_KEY = re.compile(rf"({'|'.join(_STREAM_KINDS)}|tails|sort)/[0-9a-f]{{64}}", re.ASCII)


@dataclass(frozen=True)
class Contents:
    """What a value is.

    Parameters:
        form: `STREAM`, `INDEX`, `SORT`, `ENCRYPTED` without a key at hand, or any other `BYTES`; `DAMAGED` or `FOREIGN` for what
            cannot be read.
        n_tokens, first_position: Of a stream: its tokens, and where they begin. None: it does not say so in its first bytes.
        profile, calibration, layout: Of a stream: how it is coded, the fingerprint of the calibration, and the groups of layers.
    """

    form: str
    n_tokens: int | None = None
    first_position: int | None = None
    profile: str | None = None
    calibration: str | None = None
    layout: str | None = None


def kind_of(key: str) -> str:
    """What a key says of its entry: chunk, tail, tails, point, window, sort, page, or `OTHER`."""
    known = _KEY.fullmatch(key)
    return known[1] if known else OTHER


def describe(state: str, head: bytes, n_bytes: int) -> Contents:
    """Describe a value of n_bytes bytes by its state and its first `HEAD_BYTES`, as of `Place.heads`."""
    if state != SOUND:
        return Contents(state)
    if not head.startswith(MAGIC):
        forms = {INDEX_MAGIC: INDEX, ENCRYPTED_MAGIC: ENCRYPTED} | dict.fromkeys(SORTS, SORT)
        return Contents(next((form for start, form in forms.items() if head.startswith(start)), BYTES))
    try:
        return _stream(memoryview(head), n_bytes)
    except UnsupportedVersion:
        return Contents(FOREIGN)
    except KvtcError:
        return Contents(DAMAGED)


def check(key: str, value: bytes) -> str:
    """Check the structure and all checksums of a value.

    Returns:
        Its form, as of `Contents`.

    Raises:
        CorruptStream, TruncatedStream: It contradicts itself, or is not what its key says.
        UnsupportedVersion: A later kvtc wrote it.
    """
    kind = kind_of(key)
    if value.startswith(ENCRYPTED_MAGIC):
        return ENCRYPTED
    if kind in _STREAM_KINDS or value.startswith(MAGIC):
        parse_stream(value).verify()
        return STREAM
    if kind == "tails":
        parse_index(value)
        return INDEX
    if kind == "sort":
        Sort.parse(value)
        return SORT
    return BYTES


def _stream(view: memoryview, n_bytes: int) -> Contents:
    counts = parse_counts(view, n_bytes)
    if counts.tables_end > len(view):
        return Contents(STREAM)
    header, chunks = parse_tables(view, counts)
    groups = [
        f"{group.describe()}, {str(group.dtype).removeprefix('torch.')}, layers {describe_layers(group.layers)}, "
        f"{' x '.join(str(axis) for axis in group.shape if axis) or 'nothing'}"
        for group in header.groups
    ]
    return Contents(
        STREAM,
        sum(chunks.region_tokens()),
        chunks[0].first_position if len(chunks) else None,
        header.profile,
        header.fingerprint.hex() if any(header.fingerprint) else None,
        "; ".join(groups),
    )
