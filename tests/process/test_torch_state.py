"""Whatever state of torch a caller is in, kvtc writes and reads the same bits, and leaves the state as it was."""

from __future__ import annotations

import ast
import inspect
import json
import random
import subprocess
import sys
import threading
import timeit
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache as remember
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import kvtc
from kvtc.cache import KVCache
from kvtc.cache_file import load_cache, save_cache
from kvtc.calibration.gradients import GradientSample
from kvtc.codec.codec import Codec
from kvtc.codec.transformers_cache import to_transformers
from kvtc.engines.chunk_coder import ChunkCoder, ChunkSettings, FixedChunkCoder
from kvtc.engines.page_layout import PageLayout, lmcache_layout
from kvtc.engines.vllm.page_mover import EnginePages
from kvtc.errors import InvalidArgument, InvalidCache
from kvtc.evaluate.quality import evaluate_continuation
from kvtc.huggingface.continuation import prefill
from kvtc.process.torch_state import neutral_torch_state, plain
from kvtc.profiles.rates import FixedSize, Step
from tests.builders import (
    HEAD_DIM,
    N_HEADS,
    N_LAYERS,
    fit_caches,
    joint_calibration,
    random_cache,
    same_bits,
    tiny_calibration,
    tiny_geometry,
    tiny_gradients,
    told_cache,
    told_codec,
    told_ids,
    told_model,
)

transformers = pytest.importorskip("transformers")

Found = dict[str, Any]
N = 40
CPU = torch.device("cpu")
REGIONS = {"sink_tokens": 2, "window_tokens": 5, "chunk_tokens": 8}


# The states.


class NoFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("__get__", "__len__"):  # shapes and the like compute nothing
            return func(*args, **(kwargs or {}))
        raise AssertionError(f"{func} reached the caller's mode")


class NoOperations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} reached the caller's mode")


@contextmanager
def switched(switch: Callable[[Any], Any], on: Any, off: Any) -> Iterator[None]:
    switch(on)
    try:
        yield
    finally:
        switch(off)


def refuse(tensor: Tensor) -> Tensor:
    raise AssertionError(f"{tensor.shape} was saved with the caller's hooks")


def set_precision(precision: str) -> None:
    torch.backends.fp32_precision = precision


OF_MODELS = {
    "no gradients": torch.no_grad,
    "inference mode": torch.inference_mode,
    "autocast to bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", torch.float16),
    "default float64": lambda: switched(torch.set_default_dtype, torch.float64, torch.float32),
    "default float16": lambda: switched(torch.set_default_dtype, torch.float16, torch.float32),
    "deterministic algorithms": lambda: switched(torch.use_deterministic_algorithms, True, False),
    "products in bfloat16": lambda: switched(torch.set_float32_matmul_precision, "medium", "highest"),
    "products in TF32": lambda: switched(set_precision, "tf32", "none"),
    "hooks on saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(refuse, refuse),
    "no hooks on saved tensors": lambda: torch.autograd.graph.disable_saved_tensors_hooks("none are allowed"),
    "errors of NumPy raised": lambda: np.errstate(all="raise"),
    "subnormal numbers flushed": lambda: switched(torch.set_flush_denormal, True, False),
}
"""In which models run too."""
STATES = OF_MODELS | {
    "default device meta": lambda: switched(torch.set_default_device, "meta", None),
    "device meta": lambda: torch.device("meta"),
    "a mode for functions": NoFunctions,
    "a mode for operations": NoOperations,
    "fake tensors": FakeTensorMode,
}


def state() -> tuple[Any, ...]:
    """All that a call might change."""
    subnormal = 5e-324
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cpu"),
        torch.get_default_dtype(),
        getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.mkldnn.matmul.fp32_precision,
        torch.backends.cuda.matmul.fp32_precision,
        torch.get_num_threads(),
        torch._C._autograd._saved_tensors_hooks_get_disabled_error_message(),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE),
        subnormal * 1.0 == 0.0,
        tuple(np.geterr().items()),
        np.get_printoptions()["precision"],
        random.getstate(),
        str(np.random.get_state()),
    )


def rng_state() -> bytes:
    return torch.random.default_generator.get_state().numpy().tobytes()


# What is called. Inputs are made outside of the state, where each call is made once before.


@remember
def model() -> Any:
    settings = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()


@remember
def texts() -> list[list[int]]:
    return [told_ids(400 if index == 15 else 90, index).tolist() for index in range(16)]


@remember
def told(n: int = N) -> KVCache:
    return told_cache(n, torch.bfloat16)


@remember
def one_of_transformers() -> Any:
    return to_transformers(told().keys[None], told().values[None], range(told().n_layers))


@remember
def gradients() -> GradientSample:
    return tiny_gradients()


@remember
def ids(n: int = N) -> Tensor:
    return told_ids(n)


@remember
def batch_of_two() -> tuple[Any, Tensor, Tensor]:
    cache = told()
    keys, values = (torch.stack([side, side.flip(2)]) for side in (cache.keys, cache.values))
    mask = torch.ones(2, N, dtype=torch.int64)
    mask[1, :9] = 0
    return to_transformers(keys, values, range(keys.shape[1])), torch.stack([told_ids(N), told_ids(N).flip(0)]), mask


def tensors_of(cache: Any) -> Found:
    if isinstance(cache, KVCache):
        return {"keys": cache.keys, "values": cache.values, "positions": cache.positions}
    return {
        f"{side} {at}": getattr(layer, side) for at, layer in enumerate(cache.layers) for side in ("keys", "values")
    }


def round_trip(profile: str) -> Found:
    codec = told_codec(profile, ratio=4, window_format="exact", **REGIONS)
    stream = codec.encode(told(), ids())
    return {"stream": stream} | tensors_of(codec.decode(stream, ids()))


def one_step() -> Found:
    codec = told_codec("joint", ratio=4, window_format="coded", sink_format="fp8", **REGIONS)
    return {"stream": codec.with_rate(Step(2.0)).encode(told(), ids())}


def fixed_size() -> Found:
    codec = told_codec("joint", ratio=4, fixed_size=True, **REGIONS)
    return {
        "stream": codec.encode(told(), ids()),
        "size": codec.stream_bytes(N),
        "other": codec.with_rate(FixedSize(8)).stream_bytes(N),
    }


def moved() -> Found:
    codec = Codec(tiny_calibration(), ratio=4, **REGIONS)
    return tensors_of(codec.decode(codec.encode(told()), start_position=1000, tokens=30))


def of_transformers() -> Found:
    codec = told_codec("conditional", ratio=4, **REGIONS)
    stream = codec.encode(one_of_transformers(), ids())
    return {"stream": stream} | tensors_of(codec.decode(stream, ids()))


def batch() -> Found:
    cache, both, mask = batch_of_two()
    codec = told_codec("conditional", ratio=4, **REGIONS)
    streams = codec.encode_batch(cache, both, mask)
    restored, restored_mask = codec.decode_batch(streams, both)
    return {"first": streams[0], "second": streams[1], "mask": restored_mask} | tensors_of(restored)


@remember
def tiny_numbers() -> KVCache:
    """Of which half are subnormal."""
    sides = (side.float() * 2.0**-127 for side in (told().keys, told().values))
    return KVCache(*sides)


def of_tiny_numbers() -> Found:
    codec = Codec(tiny_calibration(), ratio=4, **REGIONS)
    stream = codec.encode(tiny_numbers())
    return {"stream": stream} | tensors_of(codec.decode(stream, start_position=3))


def layer_by_layer() -> Found:
    codec = Codec(tiny_calibration(), ratio=4, **REGIONS)
    layers = codec.decode_layers(codec.encode(told()))
    return {f"{side} {layer}": tensor for layer, *sides in layers for side, tensor in zip("kv", sides, strict=True)}


def lazily() -> Found:
    codec = Codec(tiny_calibration(), ratio=4, **REGIONS)
    return tensors_of(codec.decode_lazily(codec.encode(told())))


@neutral_torch_state
def pages(n: int) -> tuple[list[Tensor], EnginePages]:
    layers = [torch.zeros(n, N_HEADS, 8, 2 * HEAD_DIM, dtype=torch.bfloat16) for _ in range(N_LAYERS)]
    layout = PageLayout("LBHNC", N_LAYERS, N_HEADS, HEAD_DIM, 8)
    return layers, EnginePages(layers, layout, 8, torch.bfloat16)


def into_pages() -> Found:
    layers, engine = pages(6)
    codec = Codec(tiny_calibration(), ratio=4, **REGIONS)
    codec.decode_into(codec.encode(told()), engine.targets({0: [5, 0, 3, 1, 4]}, N))
    keys, values = engine.read({0: [5, 0, 3]}, CPU)
    engine.write({0: [2, 1, 0]}, keys, values)
    return {f"layer {index}": layer for index, layer in enumerate(layers)} | {"keys": keys, "values": values}


def in_a_store() -> Found:
    codec = told_codec("conditional", ratio=4, window_tokens=5, chunk_tokens=8)
    with kvtc.open_store("memory:") as store, kvtc.PrefixCache(codec, store, min_tokens=8) as prefixes:
        prefixes.save(ids(), told()).result()
        cache, n_tokens = prefixes.load(ids())
        entries = {key: store.get(key) for key in sorted(store.keys())}
    return entries | {"n_tokens": n_tokens} | tensors_of(cache)


def on_a_device() -> Found:
    codec = Codec(tiny_calibration(), ratio=4, **REGIONS)
    with kvtc.open_store("device:cpu") as store:
        store.put("stream", codec.encode(told()))
        store.put("nothing", b"")
        (held,) = store.resident_many(["stream"])
        return {"held": held, "got": store.get("stream"), "nothing": store.get("nothing")}


def chunks() -> Found:
    @neutral_torch_state
    def layout_of(shape: Any) -> PageLayout:
        return lmcache_layout(shape, N_LAYERS, N_HEADS, HEAD_DIM)

    found: Found = {}
    for kind in (ChunkCoder, FixedChunkCoder):
        coder = kind(
            joint_calibration(), ChunkSettings("reference", "memory:", ratio=8, max_tokens=2048), layout_of, 256
        )
        data = chunk()
        found[kind.__name__] = coder.encode(data)
        coder.decode(found[kind.__name__], data)
        found[f"{kind.__name__} decoded"] = data
    return found


@neutral_torch_state
def chunk() -> Tensor:
    sides = (side[:, :, 256:] for side in (told(512).keys, told(512).values))
    rows = torch.stack([side.transpose(1, 2) for side in sides])
    return rows.reshape(2, N_LAYERS, 256, N_HEADS * HEAD_DIM)


def contents(path: Path) -> tuple[Any, bytes]:
    """Of a safetensors file, whose metadata are in another order every time."""
    data = path.read_bytes()
    stop = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:stop]), data[stop:]


def cache_file(folder: Path) -> Found:
    save_cache(folder / "cache.safetensors", told(), ids())
    cache, token_ids = load_cache(folder / "cache.safetensors")
    return {"file": contents(folder / "cache.safetensors"), "ids": token_ids} | tensors_of(cache)


def calibrated(calibration: kvtc.Calibration, folder: Path) -> Found:
    path = folder / "calibration.safetensors"
    calibration.save(path)
    again = kvtc.load_calibration(path)
    again.save(folder / "again.safetensors")
    tensors = {"mean": again.key.basis.mean, "weights": again.conditional.weights}
    files = {"file": contents(path), "again": contents(folder / "again.safetensors")}
    return files | {"fingerprint": calibration.fingerprint} | tensors


def fitted(folder: Path) -> Found:
    caches = [replace(told(200), rope_length=None), replace(told(150), rope_length=None)]
    calibration = fit_caches(
        tiny_geometry(),
        iter(caches),
        sample=gradients(),
        token_ids=iter([ids(200), ids(150)]),
        model=told_model(),
    )
    return calibrated(calibration, folder)


def of_a_model(folder: Path) -> Found:
    return calibrated(kvtc.calibrate(model(), iter(texts()), progress=False), folder)


CODING = {
    "paper": lambda _: round_trip("paper"),
    "joint": lambda _: round_trip("joint"),
    "conditional": lambda _: round_trip("conditional"),
    "one step": lambda _: one_step(),
    "fixed size": lambda _: fixed_size(),
    "moved": lambda _: moved(),
    "transformers": lambda _: of_transformers(),
    "batch": lambda _: batch(),
    "tiny numbers": lambda _: of_tiny_numbers(),
    "layer by layer": lambda _: layer_by_layer(),
    "lazily": lambda _: lazily(),
    "pages": lambda _: into_pages(),
    "prefixes": lambda _: in_a_store(),
    "device store": lambda _: on_a_device(),
    "chunks": lambda _: chunks(),
    "cache file": cache_file,
    "fit": fitted,
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> Callable[[str, Callable[[Any], Found]], Found]:
    """What a call finds in the usual state."""
    known: dict[str, Found] = {}

    def of(name: str, call: Callable[[Any], Found]) -> Found:
        if name not in known:
            known[name] = call(tmp_path_factory.mktemp("usual"))
        return known[name]

    return of


def same(found: Any, wanted: Any) -> bool:
    return same_bits(found, wanted) if isinstance(wanted, Tensor) else found == wanted


def is_ordinary(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and not (tensor.requires_grad or tensor.is_inference() or tensor.is_neg())


def check(call: Callable[[Any], Found], wanted: Found, entered: Any, folder: Path) -> None:
    generator = rng_state()
    with entered():
        before = state()
        found = call(folder)
        after = state()
    assert after == before
    assert rng_state() == generator
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not same(found[name], wanted[name])] == []
    assert [name for name, value in found.items() if isinstance(value, Tensor) and not is_ordinary(value)] == []


@pytest.mark.parametrize("name", CODING)
@pytest.mark.parametrize("entered", STATES)
def test_no_state_changes_what_is_written_or_read(entered, name, expected, tmp_path):
    check(CODING[name], expected(name, CODING[name]), STATES[entered], tmp_path)


@pytest.mark.parametrize("entered", [*OF_MODELS, "default device meta"])
def test_no_state_changes_what_is_calibrated(entered, expected, tmp_path):
    check(of_a_model, expected("of a model", of_a_model), STATES[entered], tmp_path)


@pytest.mark.parametrize("entered", [*OF_MODELS, "default device meta"])
def test_no_state_changes_what_is_measured_or_generated(entered, expected, tmp_path):
    """The restored cache is one that `generate` goes on from in that state; what it computes there is the caller's."""
    prompt = ids(60)[None]
    codec = Codec(joint_calibration_of_model(), "joint", ratio=4, window_tokens=4)

    def call(_: Path) -> Found:
        (quality,) = evaluate_continuation(model(), texts()[0], {"joint": codec}, 20)
        restored = codec.decode(codec.encode(prefix(), ids(59)), ids(59))
        return {"kl": quality.kl, "bytes": quality.total_bytes, "perplexity": quality.perplexity} | tensors_of(restored)

    check(call, expected("measured", call), STATES[entered], tmp_path)
    with STATES[entered]():
        restored = codec.decode_lazily(codec.encode(prefix(), ids(59)), ids(59))
        output = model().generate(prompt, past_key_values=restored, max_new_tokens=3, do_sample=False)
    assert output.shape == (1, 63)


@remember
def joint_calibration_of_model() -> kvtc.Calibration:
    return kvtc.calibrate(model(), texts(), profiles=("joint",), progress=False)


@remember
def prefix() -> Any:
    return prefill(model(), ids(59))


# The tensors.


class Own(Tensor):
    """A user's subclass, which expects to be asked."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("__get__", "__len__"):
            return super().__torch_function__(func, types, args, kwargs)
        raise AssertionError(f"{func} reached the caller's subclass")


def in_inference_mode(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "that requires a gradient": lambda tensor: tensor.clone().requires_grad_(tensor.is_floating_point()),
    "with a history": lambda tensor: tensor.clone().requires_grad_(tensor.is_floating_point()) * 1,
    "parameter": lambda tensor: torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point()),
    "buffer": torch.nn.Buffer,
    "subclass": lambda tensor: tensor.as_subclass(Own),
    "of other strides": lambda tensor: tensor.movedim(0, -1).contiguous().movedim(-1, 0),
    "of every other": lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda tensor: tensor[:, :, :1].expand(tensor.shape) if tensor.dim() == 4 else tensor,
    "to be negated": lambda tensor: torch._neg_view(-tensor),
    "of inference mode": in_inference_mode,
    "compiled": torch.compile(lambda tensor: tensor * 1, backend="eager"),
}


@neutral_torch_state
def usual(tensor: Tensor) -> Tensor:
    return plain(tensor, "a tensor").clone(memory_format=torch.contiguous_format)


@neutral_torch_state
def dynamic_cache(keys: Tensor, values: Tensor) -> Any:
    """Layers that hold the tensors as they are."""
    layers = [transformers.cache_utils.DynamicLayer() for _ in keys]
    for layer, *sides in zip(layers, keys, values, strict=True):
        layer.keys, layer.values = (side[None].as_subclass(type(keys)) for side in sides)
        layer.is_initialized = True
    return transformers.Cache(layers=layers)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tensor_is_coded_like_a_usual_one(kind):
    cache = told_cache(N)
    keys, values, positions, named = map(KINDS[kind], (cache.keys, cache.values, torch.arange(N), ids()))
    same_values = KVCache(usual(keys), usual(values))
    codec = told_codec("conditional", ratio=4, **REGIONS)
    wanted = codec.encode(same_values, ids())
    assert codec.encode(KVCache(keys, values, positions), named) == wanted
    assert codec.encode(KVCache(keys, values), named, positions) == wanted
    stream = codec.encode(dynamic_cache(keys, values), named)
    assert same_bits(codec.decode_neutral(stream, named).keys, codec.decode(wanted, ids()).keys)
    streams = []
    for saved, tokens in ((KVCache(keys, values), named), (same_values, ids())):
        with kvtc.open_store("memory:") as store, kvtc.PrefixCache(codec, store, min_tokens=8) as prefixes:
            prefixes.save(tokens, saved).result()
            streams.append({key: store.get(key) for key in sorted(store.keys())})
    assert streams[0] == streams[1]


@pytest.mark.parametrize(
    "make", [lambda side: side.to("meta"), Tensor.to_sparse, FakeTensorMode().from_tensor, Tensor.numpy, Tensor.tolist]
)
def test_tensors_without_numbers_of_their_own_are_refused(make):
    keys, values = (make(side) for side in (random_cache(N).keys, random_cache(N).values))
    codec = Codec(tiny_calibration(), ratio=4, **REGIONS)
    with pytest.raises(InvalidCache, match="keys: expected a"):
        codec.encode(KVCache(keys, values))
    with pytest.raises(InvalidCache, match="keys: expected a"):
        KVCache(keys, values).validate()


# What is around the calls.


def test_a_failed_call_gives_the_state_back():
    codec = Codec(tiny_calibration(), ratio=4, **REGIONS)
    with ExitStack() as stack:
        for name, entered in OF_MODELS.items():
            if name != "no hooks on saved tensors":  # there are some
                stack.enter_context(entered())
        before = state()
        with pytest.raises(InvalidArgument):
            codec.encode("no cache")
        with pytest.raises(InvalidCache):
            KVCache(torch.zeros(1), torch.zeros(1)).validate()
        assert state() == before


def test_an_iterator_leaves_the_callers_state_alone_between_steps():
    codec = Codec(tiny_calibration(), ratio=4, **REGIONS)
    layers = codec.decode_layers(codec.encode(told()))
    seen = []
    with torch.autocast("cpu"), torch.inference_mode():
        before = state()
        for _, *sides in layers:
            seen += sides
            assert state() == before
    assert len(seen) == 2 * N_LAYERS
    assert all(map(is_ordinary, seen))


def test_code_of_the_caller_runs_in_the_state_of_the_caller(tmp_path):
    """Texts come from the caller's own code, which a calibration asks for one by one."""
    states = []

    def asked() -> Iterator[list[int]]:
        for text in texts():
            states.append(state())
            yield text

    with torch.autocast("cpu"), torch.device("cpu"), np.errstate(all="raise"):
        before = state()
        kvtc.calibrate(model(), asked(), profiles=("paper",), progress=False).save(tmp_path / "one")
    assert states == [before] * len(texts())


def test_products_of_other_threads_are_given_their_precision_back_after_the_last_call():
    inside, leave = threading.Barrier(3), threading.Event()

    @neutral_torch_state
    def work() -> None:
        inside.wait(10)
        leave.wait(10)

    torch.set_float32_matmul_precision("medium")
    try:
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        inside.wait(10)
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        neutral_torch_state(torch.get_num_threads)()
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        leave.set()
        for thread in threads:
            thread.join()
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_precision_that_follows_from_a_wider_setting_goes_on_doing_so():
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    torch.backends.fp32_precision = "tf32"
    try:
        neutral_torch_state(torch.get_num_threads)()
        assert torch.backends.mkldnn.matmul.fp32_precision == "tf32"
        torch.backends.fp32_precision = "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)


FORKED = """
import os, threading, torch
from kvtc.process.torch_state import neutral_torch_state

inside, leave = threading.Event(), threading.Event()

@neutral_torch_state
def work():
    inside.set()
    leave.wait(10)

torch.set_float32_matmul_precision("medium")
thread = threading.Thread(target=work)
thread.start()
inside.wait(10)
child = os.fork()
if not child:
    neutral_torch_state(int)()
    os._exit(torch.get_float32_matmul_precision() != "medium")
print(os.waitpid(child, 0)[1])
leave.set()
thread.join()
print(torch.get_float32_matmul_precision())
"""


def test_a_fork_during_a_call_gives_the_child_the_callers_state():
    done = run(FORKED)
    assert done.stdout.split() == ["0", "medium"], done.stderr


IMPORTED = """
import pkgutil, importlib, torch
torch.set_default_dtype(torch.float64)
torch.set_default_device("meta")
with torch.inference_mode():
    import kvtc
    for module in pkgutil.walk_packages(kvtc.__path__, "kvtc."):
        if not any(name in module.name for name in ("vllm", "lmcache", "sglang", "__main__")):
            importlib.import_module(module.name)
torch.set_default_device(None)
torch.set_default_dtype(torch.float32)
cache = kvtc.KVCache(*torch.linspace(-1, 1, 2 * 12 * 3 * 300 * 32).reshape(2, 12, 3, 300, 32))
codec = kvtc.Codec(kvtc.reference_calibration(), "joint", ratio=16)
print(codec.encode(cache).hex())
"""


def test_the_state_at_import_does_not_matter():
    usual = IMPORTED.replace("64", "32").replace('"meta"', "None").replace("inference_mode", "no_grad")
    odd, plainly = (run(code) for code in (IMPORTED, usual))
    assert odd.stdout == plainly.stdout != "", odd.stderr


def test_compiled_code_calls_the_codec_without_looking_into_it():
    codec = Codec(tiny_calibration(), ratio=4, **REGIONS)
    wanted = codec.encode(KVCache(told().keys * 2, told().values))
    frames: list[Any] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        frames.append(graph)
        return graph.forward

    @torch.compile(backend=backend)
    def compiled(keys: Tensor, values: Tensor) -> tuple[bytes, Tensor]:
        stream = codec.encode(KVCache(keys * 2, values))
        return stream, codec.decode(stream).keys + 1

    stream, keys = compiled(told().keys, told().values)
    assert stream == wanted
    assert same_bits(keys, codec.decode(wanted).keys + 1)
    # One before the call and one after it.
    assert len(frames) <= 2


def test_layers_of_engines_that_were_made_in_inference_mode_are_written():
    layers, _ = pages(6)
    with torch.inference_mode():
        inference = [layer.clone() for layer in layers]
        engine = EnginePages(inference, PageLayout("LBHNC", N_LAYERS, N_HEADS, HEAD_DIM, 8), 8, torch.bfloat16)
    codec = Codec(tiny_calibration(), ratio=4, **REGIONS)
    stream = codec.encode(told())
    codec.decode_into(stream, engine.targets({0: range(5)}, N))
    keys, values = engine.read({0: range(5)}, CPU)
    decoded = codec.decode(stream)
    assert same_bits(keys, decoded.keys)
    assert same_bits(values, decoded.values)
    assert all(map(is_ordinary, (keys, values)))
    engine.write({0: range(5)}, values, keys)
    assert same_bits(engine.read({0: range(5)}, CPU)[0], decoded.values)


def test_a_loss_goes_back_through_a_model_that_reads_a_restored_cache():
    codec = Codec(joint_calibration_of_model(), "joint", ratio=4, window_tokens=4)
    with torch.inference_mode():
        stream = codec.encode(prefix(), ids(59))
        restored = codec.decode_lazily(stream, ids(59))
    model().zero_grad()
    model()(ids(60)[None, 59:], past_key_values=restored).logits.sum().backward()
    assert model().lm_head.weight.grad.abs().sum() > 0
    model().zero_grad()


def test_ids_that_cannot_be_written_to_are_taken():
    """torch warns of such arrays, once in a process."""
    cache, both, mask = batch_of_two()
    frozen = [side.numpy().copy() for side in (both, mask)]
    for array in frozen:
        array.setflags(write=False)
    codec = told_codec("conditional", ratio=4, **REGIONS)
    assert codec.encode_batch(cache, *frozen) == codec.encode_batch(cache, both, mask)
    assert codec.encode(told(), frozen[0][0], positions=np.arange(N)) == codec.encode(told(), ids())


# The mechanism.


def test_every_public_method_of_the_codec_is_neutral():
    methods = inspect.getmembers(Codec, inspect.isfunction)
    public = {name: method for name, method in methods if not name.startswith("_") or name == "__init__"}
    copies = {"with_window", "forget_prefix"}
    assert {name for name, method in public.items() if not hasattr(method, "__wrapped__")} == copies


FACTORIES = {"empty", "eye", "full", "linspace", "ones", "rand", "randn", "zeros"}
"""Of torch, that make numbers of the default dtype unless they are told another."""


def test_every_tensor_that_is_made_names_its_dtype():
    found = []
    for path in Path(kvtc.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            if of_torch and node.func.attr in FACTORIES and "dtype" not in {word.arg for word in node.keywords}:
                found.append(f"{path.name}:{node.lineno}")
    assert found == []


def test_numpy_treats_errors_as_usual():
    with np.errstate(all="raise"):
        errors = neutral_torch_state(np.geterr)()
        assert neutral_torch_state(np.multiply)(np.float32(1e-30), np.float32(1e-30)) == 0
    assert errors == {"divide": "warn", "over": "warn", "under": "ignore", "invalid": "warn"}


def test_the_state_costs_little():
    """Some microseconds; the limit is for busy machines."""
    nothing = neutral_torch_state(int)
    assert min(timeit.repeat(nothing, number=100, repeat=20)) / 100 < 50e-6
