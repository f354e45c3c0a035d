"""Counts of the adapters as metrics of vLLM: in its log, and at /metrics as vllm:kvtc_*."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload.base import OffloadingCounterMetadata
from vllm.v1.metrics.utils import create_metric_per_engine

from ...counts import COUNTERS
from ...metrics import counter_name


def metric_name(counter: str) -> str:
    """The library of Prometheus adds `_total`."""
    return f"vllm:{counter_name(counter)}"


class KvtcStats(KVConnectorStats):
    """Counts of the connector since its last report; vLLM logs their sums."""

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KvtcStats:
        for name, amount in other.data.items():
            self.data[name] = self.data.get(name, 0) + amount
        return self

    def reduce(self) -> dict[str, int | float]:
        return {f"kvtc_{name}": amount for name, amount in self.data.items()}

    def is_empty(self) -> bool:
        return not self.data


class KvtcPromMetrics(KVConnectorPromMetrics):
    """Counts of the connector for Prometheus."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: create_metric_per_engine(
                self._counter_cls(name=metric_name(name), documentation=text, labelnames=labelnames),
                per_engine_labelvalues,
            )
            for name, text in COUNTERS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, amount in transfer_stats_data.items():
            if counter := self._counters.get(name):
                counter[engine_idx].inc(amount)


def tier_metric_definitions() -> dict[str, Any]:
    """What a tier tells vLLM of its counts."""
    return {metric_name(name): OffloadingCounterMetadata(documentation=text) for name, text in COUNTERS.items()}


def tier_stats(news: dict[str, Any]) -> Any:
    """A tier's counts since its last report; None if nothing was counted."""
    if not news:
        return None
    stats = OffloadingConnectorStats()
    for name, amount in news.items():
        stats.increase_counter(metric_name(name), amount)
    return stats
