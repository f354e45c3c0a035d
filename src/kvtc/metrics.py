"""What users of stores, and stores, have counted, as text in the format of Prometheus: docs/metrics.md.

`COUNTERS` and `StoreStatistics` are the vocabulary; here are the names that Prometheus knows them by.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import NamedTuple

from .counts import COUNTERS
from .errors import InvalidArgument
from .store import StoreStatistics

_LABEL = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*", re.ASCII)
_BYTES = "bytes_"


class Metric(NamedTuple):
    """A metric of Prometheus.

    Parameters:
        name: With its unit, and `_total` at the end of a counter.
        kind: counter or gauge.
        help: What it says.
    """

    name: str
    kind: str
    help: str


def counter_name(counter: str) -> str:
    """A counter of `COUNTERS` with its unit last, as Prometheus wants it: kvtc_read_bytes for bytes_read."""
    is_of_bytes = counter.startswith(_BYTES)
    return f"kvtc_{counter.removeprefix(_BYTES)}_bytes" if is_of_bytes else f"kvtc_{counter}"


COUNTER_METRICS = {name: Metric(f"{counter_name(name)}_total", "counter", text) for name, text in COUNTERS.items()}
"""By the names of `COUNTERS`."""

STORE_METRICS = {
    "hits": Metric("kvtc_store_hits_total", "counter", "Values that the store found."),
    "misses": Metric("kvtc_store_misses_total", "counter", "Values absent, damaged, foreign or out of reach."),
    "puts": Metric("kvtc_store_puts_total", "counter", "Values of calls that kept all they were given."),
    "bytes_read": Metric("kvtc_store_read_bytes_total", "counter", "Bytes of the values found."),
    "bytes_written": Metric("kvtc_store_written_bytes_total", "counter", "Bytes of the values kept."),
    "evictions": Metric("kvtc_store_evictions_total", "counter", "Entries removed to keep the byte budget."),
    "errors": Metric("kvtc_store_storage_errors_total", "counter", "Calls that the storage refused or did not answer."),
    "damaged": Metric("kvtc_store_damaged_total", "counter", "Entries found damaged, and removed."),
    "foreign": Metric("kvtc_store_foreign_total", "counter", "Entries that cannot be read here, left alone."),
    "stored_entries": Metric("kvtc_store_entries", "gauge", "Entries in the store."),
    "stored_bytes": Metric("kvtc_store_bytes", "gauge", "Bytes of all entries, frames included."),
}
"""By the fields of `StoreStatistics`."""

Statistics = Mapping[str, int] | StoreStatistics
"""Of a prefix cache or an adapter, by the names of `COUNTERS`, or of a store."""


def prometheus_text(statistics: Iterable[tuple[Mapping[str, str], Statistics]]) -> str:
    """Statistics in Prometheus' text format, version 0.0.4.

    Parameters:
        statistics: (labels, statistics) of each source; labels tell sources of one kind apart. Of users of stores all counters are
            told, those that are 0 too; of a store, what it knows.

    Returns:
        Lines that end with a newline; "" where there are no sources.

    Raises:
        InvalidArgument: A label has a name that Prometheus does not take.

    Example:
        >>> from kvtc.metrics import prometheus_text
        >>> with kvtc.open_store("memory:") as store:
        ...     store.put("chats/1", stream)
        ...     text = prometheus_text([({"tier": "memory"}, store.statistics())])
        >>> [line for line in text.splitlines() if "puts" in line][1:]
        ['# TYPE kvtc_store_puts_total counter', 'kvtc_store_puts_total{tier="memory"} 1']
    """
    lines: dict[Metric, list[str]] = {}
    for labels, counted in statistics:
        is_store = isinstance(counted, StoreStatistics)
        known = STORE_METRICS if is_store else COUNTER_METRICS
        values = asdict(counted) if isinstance(counted, StoreStatistics) else counted
        told = _labels(labels)
        for field, metric in known.items():
            value = values.get(field, None if is_store else 0)
            if value is not None:
                lines.setdefault(metric, []).append(f"{metric.name}{told} {value}")
    return "".join(
        f"# HELP {metric.name} {metric.help}\n# TYPE {metric.name} {metric.kind}\n"
        + "".join(f"{one}\n" for one in samples)
        for metric, samples in lines.items()
    )


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    for name in labels:
        if _LABEL.fullmatch(name) is None:
            raise InvalidArgument(f"label {name!r:.80}: expected letters, digits and _, not a digit or __ first")
    escapes = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    told = ",".join(f'{name}="{str(value).translate(escapes)}"' for name, value in labels.items())
    return f"{{{told}}}"
