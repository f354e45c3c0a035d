"""kvtc in SGLang's HiCache: its own backend factory, host memory pools and controller on a CPU, real caches of the reference model.

Pages of every kind without losses, and a model of several kinds through the controller: `sglang_pools`. Then coded, for each host
layout, and with and without telling how many pages come before:

    set   the pages of a text go from SGLang's host memory to a store
    get   host memory is erased; another backend finds the pages and fills it; the model goes on from what came back

SGLang's server needs a GPU and is not started. Run in SGLang's environment: `make test-engines ENGINES=sglang`. Prints what is
stored and how the model's answer differs, and exits with 1 where something is not as it must be.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from sglang_pools import backend, bring_back_all_kinds, go_through_the_controller, mha_pool, say_that_there_is_one_rank
from vllm_end_to_end import Failure, expect, prompts

from kvtc.cache import KVCache
from kvtc.codec import transformers_cache as interop
from kvtc.reference import MODEL_DIRECTORY, reference_calibration, reference_model

RATIO = 4
CODED = {
    "kvtc.calibration": "reference",
    "kvtc.model": str(MODEL_DIRECTORY),
    "kvtc.ratio": RATIO,
    "kvtc.max_tokens": 4096,
}
EXACT = {"kvtc.lossless": True, "kvtc.model": str(MODEL_DIRECTORY)}
N_TOKENS, N_NEW = 1024, 32


def main() -> None:
    ids = torch.tensor([prompts()[0]])
    model, _ = reference_model("bfloat16")
    sys.meta_path.insert(0, Torchvision())
    geometry = reference_calibration().geometry
    with torch.no_grad():
        cache = interop.from_transformers(model(ids[:, :N_TOKENS]).past_key_values, geometry)
    exact = answer(model, ids, cache)
    print("sglang: pages of any bytes, kvtc.lossless, by SGLang's pools and its controller")
    say_that_there_is_one_rank()
    bring_back_all_kinds()
    go_through_the_controller()
    print(f"sglang: kvtc-6m in bfloat16, ratio {RATIO}, {N_TOKENS} tokens")
    for page_tokens in (64, 256):
        for layout in ("layer_first", "page_first", "page_first_direct"):
            for prefix in ([], None):
                found = round_trip(layout, page_tokens, prefix, cache)
                told = "told" if prefix is not None else "searched"
                expect(
                    f"answer after {layout}, pages of {page_tokens}, positions {told}", answer(model, ids, found), exact
                )
    for page_tokens in (64, 256):
        found = round_trip("page_first", page_tokens, [], cache, EXACT)
        same = torch.equal(found.keys, cache.keys) and torch.equal(found.values, cache.values)
        expect(f"a cache without losses, pages of {page_tokens}", same, True)
    print("all as it must be")


def round_trip(
    layout: str, page_tokens: int, prefix: list[str] | None, cache: KVCache, options: dict[str, Any] = CODED
) -> KVCache:
    """The cache as it comes back."""
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageExtraInfo

    n_pages, sizes = N_TOKENS // page_tokens, reference_calibration().geometry.sizes
    pool = mha_pool(layout, torch.bfloat16, n_pages=n_pages, page_tokens=page_tokens, sizes=sizes)
    fill(pool, cache)
    keys, indices = [f"page-{index}" for index in range(n_pages)], torch.arange(N_TOKENS)
    with tempfile.TemporaryDirectory() as scratch:
        store = Path(scratch) / "store"
        first = backend(store, options, pool)
        told = HiCacheStorageExtraInfo(prefix_keys=prefix)
        expect("pages set", first.batch_set_v1(keys, indices, told), [True] * n_pages)
        expect("positions searched", first.counts["starts_searched"], 0 if prefix is not None else n_pages)
        first.close()
        pool.kv_buffer.zero_()
        second = backend(store, options, pool)
        expect("pages found", second.batch_exists([*keys, "another"]), n_pages)
        expect("pages found by the newer call", second.batch_exists_v2(keys).kv_hit_pages, n_pages)
        expect("pages got", second.batch_get_v1(keys, indices, told), [True] * n_pages)
        second.close()
        stored = sum(file.stat().st_size for file in (store / "entries").rglob("*") if file.is_file())
    original = reference_calibration().geometry.joint_features * 2 * N_TOKENS
    found = read(pool, cache)
    error = float((found.keys.float() - cache.keys.float()).norm() / cache.keys.float().norm())
    rate = "without losses" if options is EXACT else f"positions {'told' if prefix is not None else 'searched'}"
    print(
        f"  {layout}, pages of {page_tokens}, {rate}: {n_pages} pages, {stored} "
        f"bytes for {original} at 16 bits: total ratio {original / stored:.2f}; relative error of keys {error:.4f}"
    )
    return found


def fill(pool: Any, cache: KVCache) -> None:
    """Write a cache into host memory, layer by layer, through SGLang's own views of its layers."""
    for index in range(cache.n_layers):
        for refs, side in ((pool.k_data_refs, cache.keys), (pool.v_data_refs, cache.values)):
            rows = side[index].transpose(0, 1)
            target = refs[index]
            if target.dim() == 4:  # pages, tokens of a page, heads, features
                pages = rows.reshape(-1, *target.shape[1:])
                target[: len(pages)] = pages
            else:
                target[:N_TOKENS] = rows


def read(pool: Any, cache: KVCache) -> KVCache:
    """The cache in host memory."""
    sides = []
    for refs in (pool.k_data_refs, pool.v_data_refs):
        layers = [ref.flatten(0, 1) if ref.dim() == 4 else ref for ref in refs]
        sides.append(torch.stack([layer[:N_TOKENS].transpose(0, 1) for layer in layers]).contiguous())
    return KVCache(sides[0], sides[1], cache.positions)


def answer(model: Any, ids: torch.Tensor, cache: KVCache) -> list[int]:
    """The model's greedy tokens after the text, of which the beginning is in the cache."""
    past = interop.to_transformers(cache.keys[None].clone(), cache.values[None].clone(), range(cache.n_layers))
    given = ids[:, : N_TOKENS + 64]
    with torch.no_grad():
        out = model.generate(given, past_key_values=past, max_new_tokens=N_NEW, do_sample=False, pad_token_id=0)
    tokens: list[int] = out[0, given.shape[1] :].tolist()
    return tokens


def _class_named(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), dict.fromkeys(("NEAREST", "BILINEAR", "BICUBIC", "LANCZOS")))


class Torchvision(MetaPathFinder, Loader):
    """SGLang imports it, no text model uses it, its builds for GPUs do not load here: modules in which every name is a class."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:  # noqa: ARG002
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name)
        vars(module)["__getattr__"] = _class_named
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


if __name__ == "__main__":
    try:
        main()
    except Failure as failure:
        sys.exit(f"FAILED: {failure}")
