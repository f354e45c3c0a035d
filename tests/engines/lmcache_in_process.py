"""kvtc as a remote storage plugin of LMCache's engine inside a process: real caches of the reference model out and back.

The engine is LMCache's own, with its storage manager and event loop; where vLLM's pages would be, a tensor is. (vLLM's connector to
this engine, LMCacheConnectorV1, does not run on CPUs.) Run by `lmcache_end_to_end.py`, in LMCache's environment.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["LMCACHE_TRACK_USAGE"] = "false"
os.environ.setdefault("PYTHONHASHSEED", "0")

import torch
from lmcache.v1.cache_engine import LMCacheEngineBuilder
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.gpu_connector.gpu_connectors import GPUConnectorInterface
from lmcache.v1.metadata import LMCacheMetadata
from vllm_end_to_end import prompts

from kvtc.codec import transformers_cache as interop
from kvtc.reference import MODEL_DIRECTORY, reference_calibration, reference_model

RATIO = 8
CHUNK_TOKENS = 256


class TensorConnector(GPUConnectorInterface):
    """Moves chunks between LMCache and a tensor [2, L, T, H * D]."""

    def __init__(self, caches: torch.Tensor) -> None:
        self.caches = self.kvcaches = caches
        self.inited = True

    def to_gpu(self, memory_obj: Any, start: int, end: int, **_: Any) -> None:
        self.caches[:, :, start:end].copy_(memory_obj.tensor)

    def from_gpu(self, memory_obj: Any, start: int, end: int, **_: Any) -> None:
        memory_obj.tensor.copy_(self.caches[:, :, start:end])

    def batched_to_gpu(self, memory_objs: Any, starts: Any, ends: Any, **_: Any) -> None:
        for item, start, end in zip(memory_objs, starts, ends, strict=True):
            self.to_gpu(item, start, end)

    def batched_from_gpu(self, memory_objs: Any, starts: Any, ends: Any, **_: Any) -> None:
        for item, start, end in zip(memory_objs, starts, ends, strict=True):
            self.from_gpu(item, start, end)

    def get_shape(self, num_tokens: int) -> torch.Size:
        return torch.Size([2, self.caches.shape[1], num_tokens, self.caches.shape[3]])

    def initialize_kvcaches_ptr(self, **_: Any) -> None:
        pass


def main() -> None:
    ids = torch.tensor([prompts()[0]])
    model, _ = reference_model("bfloat16")
    geometry = reference_calibration().geometry
    with torch.no_grad():
        cache = interop.from_transformers(model(ids).past_key_values, geometry)
    # [2, L, H, T, D] -> [2, L, T, H * D]
    caches = torch.stack([cache.keys, cache.values]).transpose(2, 3).flatten(3).contiguous()
    with tempfile.TemporaryDirectory() as scratch:
        lossy = {"kvtc.calibration": "reference", "kvtc.ratio": RATIO}
        is_good = is_kept("lossy", Path(scratch), caches, ids[0], lossy, most_error=0.1)
        is_good &= is_kept("lossless", Path(scratch), caches, ids[0], {"kvtc.lossless": True}, most_error=0.0)
    # LMCache's threads do not end by themselves.
    sys.stdout.flush()
    os._exit(0 if is_good else 1)


def is_kept(
    name: str, scratch: Path, caches: torch.Tensor, ids: torch.Tensor, options: dict[str, Any], most_error: float
) -> bool:
    """Whether all tokens come back from a store, with no larger relative error."""
    expected, store = caches.clone(), scratch / name
    found = round_trip(name, store, caches, ids, options)
    stored = sum(file.stat().st_size for file in (store / "entries").rglob("*") if file.is_file())
    original = caches.numel() * 2
    error = float((caches.float() - expected.float()).norm() / expected.float().norm())
    print(
        f"  in process: {name}: {found} of {len(ids)} tokens come back, relative error {error:.4f}; {stored} bytes for "
        f"{original} at 16 bits: total ratio {original / stored:.2f}"
    )
    caches.copy_(expected)
    return found == len(ids) and error <= most_error


def round_trip(name: str, store: Path, caches: torch.Tensor, ids: torch.Tensor, options: dict[str, Any]) -> int:
    """Tokens that came back: stored by LMCache's engine, erased, retrieved into `caches`."""
    config = LMCacheEngineConfig.from_dict(
        {
            "chunk_size": CHUNK_TOKENS,
            "local_cpu": False,
            "max_local_cpu_size": 0.5,
            "save_unfull_chunk": True,
            "remote_storage_plugins": ["kvtc"],
            "extra_config": {
                "remote_storage_plugin.kvtc.module_path": "kvtc.engines.lmcache.remote",
                "remote_storage_plugin.kvtc.class_name": "KvtcRemoteConnector",
                "kvtc.store": f"file://{store}",
                **options,
            },
        }
    )
    _, n_layers, n_tokens, _ = caches.shape
    geometry = reference_calibration().geometry
    metadata = LMCacheMetadata(
        model_name=str(MODEL_DIRECTORY),
        world_size=1,
        local_world_size=1,
        worker_id=0,
        local_worker_id=0,
        kv_dtype=torch.bfloat16,
        kv_shape=(n_layers, 2, CHUNK_TOKENS, geometry.n_kv_heads, geometry.head_dim),
    )
    engine = LMCacheEngineBuilder.get_or_create(
        f"kvtc-{name}", config, metadata, TensorConnector(caches), lambda tensor, _: tensor, lambda item, _: item
    )
    engine.post_init()
    engine.store(ids)
    deadline = time.monotonic() + 60
    while engine.lookup(ids) < n_tokens and time.monotonic() < deadline:
        time.sleep(0.5)
    caches.zero_()
    return int(engine.retrieve(ids).sum())


if __name__ == "__main__":
    main()
