"""A very small engine around a vLLM connector."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from kvtc.cache import KVCache

from .engine_pages import read_tokens, write_tokens
from .fake_vllm import KVConnectorRole


class FakeEngine:
    """A scheduler and one worker around a connector: blocks are written in the order of the calls that vLLM makes.

    truth: the cache of each prompt, which "the model" writes for tokens that are not loaded.
    """

    def __init__(
        self,
        connector_class: type,
        vllm_config: Any,
        kv_cache_config: Any,
        n_blocks: int = 64,
        kernel_tokens: int | None = None,
        axes: str = "BHNC",
    ):
        model = vllm_config.model_config
        self.heads, self.dim = heads, dim = model.get_total_num_kv_heads(), model.get_head_size()
        self.block_size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        inner = kernel_tokens or self.block_size
        sizes = {"B": n_blocks * self.block_size // inner, "H": heads, "N": inner, "C": 2 * dim}
        # Whatever the order in memory, vLLM hands out views in the order BHNC.
        self.layers = {
            name: torch.zeros([sizes[axis] for axis in axes], dtype=model.dtype).permute(
                [axes.index(axis) for axis in "BHNC"]
            )
            for name in vllm_config.layers
        }
        backend = next(iter(vllm_config.layers.values())).get_attn_backend().get_name()
        self.packing = "vec" if backend == "CPU_ATTN" else "split"
        self.names = list(vllm_config.layers)
        self.groups = kv_cache_config.kv_cache_groups
        self.scheduler = connector_class(vllm_config, KVConnectorRole.SCHEDULER, kv_cache_config)
        self.worker = connector_class(vllm_config, KVConnectorRole.WORKER, kv_cache_config)
        self.worker.register_kv_caches(self.layers)
        self.next_block = 1
        self.failed: set[int] = set()

    def run(
        self,
        request_id: str,
        token_ids: list[int],
        truth: KVCache,
        n_local: int = 0,
        step_tokens: int | None = None,
        **request: Any,
    ) -> tuple[int, KVCache]:
        """Prefill one prompt, of which the engine has the first n_local tokens -> (tokens loaded, its cache in the blocks).

        step_tokens: that are computed in one step; None: all. Of layers with windows the cache has zeros where pages were dropped.
        """
        fields = {"mm_features": [], "prompt_embeds": None, "lora_request": None, "cache_salt": None} | request
        asked = SimpleNamespace(request_id=request_id, prompt_token_ids=token_ids, **fields)
        n_blocks = -(-len(token_ids) // self.block_size)
        tables = []
        for _ in self.groups:
            tables.append(list(range(self.next_block, self.next_block + n_blocks))[::-1])
            self.next_block += n_blocks
        self._write(tables, truth, 0, n_local)
        n_found = None
        while n_found is None:
            n_found, is_async = self.scheduler.get_num_new_matched_tokens(asked, n_local)
        assert is_async == (n_found > 0)
        self._drop(tables, n_local + n_found)
        self.scheduler.update_state_after_alloc(asked, SimpleNamespace(get_block_ids=lambda: tuple(tables)), n_found)
        n_computed = n_local
        if n_found:
            n_computed = self._load(request_id, tables, n_local, n_local + n_found)
        n_loaded = n_computed - n_local
        if len(self.groups) > 1 and not n_loaded:  # vLLM computes all again, into new pages
            n_computed = 0
            for table, ids in enumerate(tables):
                tables[table] = [block or self._new_block() for block in ids]
        while n_computed < len(token_ids):
            stop = min(len(token_ids), n_computed + (step_tokens or len(token_ids)))
            self._drop(tables, n_computed)
            self._write(tables, truth, n_computed, stop)
            self._step(self._output(request_id, tables, n_computed, stop))
            n_computed = stop
        self.scheduler.request_finished_all_groups(asked, tuple(tables))
        return n_loaded, self._read(tables, len(token_ids))

    def finish(self) -> None:
        """Shut down, which waits for what goes on in the background."""
        self.worker.shutdown()
        self.scheduler.shutdown()

    def _new_block(self) -> int:
        self.next_block += 1
        return self.next_block - 1

    def _drop(self, tables: list[list[int]], n_computed: int) -> None:
        """Pages of windows that no further token reaches."""
        for ids, group in zip(tables, self.groups, strict=True):
            window = getattr(group.kv_cache_spec, "sliding_window", None)
            if window is not None:
                n_dropped = max(0, n_computed - window + 1) // self.block_size
                ids[:n_dropped] = [0] * n_dropped

    def _load(self, request_id: str, tables: list[list[int]], start: int, stop: int) -> int:
        """Steps without a forward until the request is loaded -> tokens that are there."""
        loaded: set[str] = set()
        invalid: set[int] = set()
        failed: set[str] = set()
        while request_id not in loaded:
            results, bad = self._step(self._output())
            loaded |= results.finished_recving
            failed |= results.failed_recving
            invalid |= bad
        self.failed |= invalid
        if len(self.groups) > 1:
            assert not invalid, "vLLM refuses blocks of several groups"
            return start if request_id in failed else stop
        good = [block not in invalid for block in tables[0][: stop // self.block_size]]
        return stop if all(good) else good.index(False) * self.block_size

    def _step(self, output: Any) -> tuple[Any, set[int]]:
        metadata = self.scheduler.build_connector_meta(output)
        self.worker.bind_connector_metadata(metadata)
        self.worker.start_load_kv(None)
        self.worker.wait_for_save()
        results = self.worker.get_transfer_results(set())
        invalid = self.worker.get_block_ids_with_load_errors()
        self.worker.clear_connector_metadata()
        return results, invalid

    def _output(
        self, request_id: str | None = None, tables: list[list[int]] | None = None, n_computed: int = 0, stop: int = 0
    ) -> Any:
        """A SchedulerOutput of one request, or of none."""
        news = [] if request_id is None else [SimpleNamespace(req_id=request_id, num_computed_tokens=n_computed)]
        return SimpleNamespace(
            scheduled_new_reqs=news,
            scheduled_cached_reqs=SimpleNamespace(req_ids=[], num_computed_tokens=[]),
            num_scheduled_tokens={new.req_id: stop - n_computed for new in news},
            kv_connector_block_state=SimpleNamespace(get_block_ids=lambda _: tuple(tables or [])),
        )

    def _slots(self, blocks: list[int], start: int, stop: int) -> torch.Tensor:
        tokens = torch.arange(start, stop)
        return torch.tensor(blocks)[tokens // self.block_size] * self.block_size + tokens % self.block_size

    def _write(self, tables: list[list[int]], truth: KVCache, start: int, stop: int) -> None:
        """What the model's attention does: tokens start .. stop - 1 into the blocks."""
        keys, values = (side[:, :, start:stop] for side in (truth.keys, truth.values))
        for table, ids in enumerate(tables):
            layers, at = self._layers(table)
            write_tokens(layers, self._slots(ids, start, stop), keys[at], values[at], self.packing)
            for pages in layers:
                pages[: self.block_size // pages.shape[2]] = 0  # what the ids of dropped pages name

    def _read(self, tables: list[list[int]], n_tokens: int) -> KVCache:
        keys, values = (
            torch.zeros(len(self.names), self.heads, n_tokens, self.dim, dtype=self.layers[self.names[0]].dtype)
            for _ in range(2)
        )
        for table, ids in enumerate(tables):
            layers, at = self._layers(table)
            keys[at], values[at] = read_tokens(layers, self._slots(ids, 0, n_tokens), self.packing)
        return KVCache(keys, values)

    def _layers(self, table: int) -> tuple[list[torch.Tensor], list[int]]:
        """The pages of a table's layers, and their numbers."""
        at = sorted(self.names.index(name) for name in self.groups[table].layer_names)
        return [self.layers[self.names[layer]] for layer in at], at
