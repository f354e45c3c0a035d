"""KvtcConnector for models whose layers cache in several ways, in a very small engine that calls it as vLLM does."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from kvtc import Codec, inspect
from kvtc.cache import KVCache
from kvtc.calibration.artifact import CodedGroup
from kvtc.calibration.gradients import GradientSample
from kvtc.container.stream import parse_stream
from kvtc.engines.opaque_layout import OpaqueLayout
from kvtc.engines.page_layout import PageLayout
from kvtc.engines.vllm.page_groups import PageGroup
from kvtc.engines.vllm.page_mover import EnginePages
from kvtc.errors import GeometryMismatch
from kvtc.store import open_store
from tests.builders import (
    HEAD_DIM,
    N_HEADS,
    N_LAYERS,
    SINK_TOKENS,
    fit_caches,
    random_cache,
    relative_error,
    same_bits,
    tiny_geometry,
    told_cache,
    told_ids,
    two_widths,
    two_widths_calibration,
)
from tests.fake_engine import FakeEngine
from tests.fake_vllm import KVConnectorRole, configs, fake_vllm

SHAPE = {"n_layers": N_LAYERS, "n_kv_heads": N_HEADS, "head_dim": HEAD_DIM}
LENGTH, FOUND = 700, 672  # two whole chunks, and of the tail of 188 tokens 5 blocks of 32


@pytest.fixture
def connector():
    """The class, on stand-ins for vLLM."""
    with fake_vllm():
        from kvtc.engines.vllm.connector import KvtcConnector

        yield KvtcConnector


@pytest.fixture
def exact(tmp_path):
    """Options without a calibration."""
    return {"kvtc.lossless": True, "kvtc.store": f"file://{tmp_path}/store", "kvtc.identity": "tiny"}


def prompt(n: int = LENGTH, seed: int = 0) -> tuple[list[int], KVCache]:
    return told_ids(n, seed).tolist(), told_cache(n, torch.bfloat16, seed)


def run(connector, options, n: int = LENGTH, kinds=None, **request) -> tuple[int, KVCache, FakeEngine]:
    """One prompt in an engine of its own."""
    ids, truth = prompt(n)
    config = configs(options, **SHAPE, dtype=torch.bfloat16, **(kinds or {}))
    engine = FakeEngine(connector, *config, n_blocks=256)
    n_loaded, found = engine.run("a", ids, truth, **request)
    engine.finish()
    return n_loaded, found, engine


def assert_same_where_needed(found: KVCache, truth: KVCache, windows: dict[int, int], stop: int) -> None:
    """Bit for bit in all tokens that the next one at `stop` attends to."""
    for layer in range(N_LAYERS):
        first = max(0, stop - windows[layer] + 1) if layer in windows else 0
        for side, expected in ((found.keys, truth.keys), (found.values, truth.values)):
            assert same_bits(side[layer, :, first:], expected[layer, :, first:])


def test_lossless_needs_no_calibration_and_gives_back_every_bit(connector, exact):
    truth = prompt()[1]
    assert run(connector, exact)[0] == 0
    n_loaded, found, engine = run(connector, exact)
    assert n_loaded == FOUND
    assert same_bits(found.keys, truth.keys)
    assert same_bits(found.values, truth.values)
    assert engine.worker._mover.counts.read()["entries_loaded"] == 3


# Longer than a chunk, shorter than one, and shorter than a page's neighbours.
@pytest.mark.parametrize("window", [40, 129, 300])
@pytest.mark.parametrize("step_tokens", [None, 200])
def test_windows_are_loaded_beside_full_attention(connector, exact, window, step_tokens):
    windows = {1: window, 2: window}
    kinds = {"windows": windows, "layers_per_table": 1}  # as vLLM deals them to three block tables
    truth = prompt()[1]
    assert run(connector, exact, kinds=kinds, step_tokens=step_tokens)[0] == 0
    n_loaded, found, _ = run(connector, exact, kinds=kinds)
    # Of a tail in several steps the engine has dropped the first pages before it is saved.
    expected = FOUND if step_tokens is None or window > 90 else 512
    assert n_loaded == expected
    assert_same_where_needed(found, truth, windows, expected)


@pytest.mark.parametrize(("window", "expected"), [(129, 512), (300, 544)])
def test_a_chunk_of_another_prompt_is_used_where_all_groups_keep_its_beginning(connector, exact, window, expected):
    """Of a chunk, a window shorter than that keeps the last tokens alone."""
    windows = {1: window, 2: window}
    config = configs(exact, **SHAPE, dtype=torch.bfloat16, windows=windows, layers_per_table=1)
    ids, truth = prompt(800)
    for token_ids, n_expected in ((ids, 0), (ids[:560] + prompt(800, 1)[0][560:], expected)):
        engine = FakeEngine(connector, *config, n_blocks=256)
        n_loaded, found = engine.run("a", token_ids, truth)
        engine.finish()
        assert n_loaded == n_expected
    assert_same_where_needed(found, truth, windows, expected)


def test_a_window_keeps_what_it_reaches_back_to(connector, exact):
    run(connector, exact, kinds={"windows": {1: 40, 2: 40}, "layers_per_table": 1})
    with open_store(exact["kvtc.store"]) as store:
        streams = [inspect(store.get(key)) for key in store.keys() if not key.startswith("tails/")]  # noqa: SIM118
    found = sorted((stream.n_tokens, stream.first_position) for stream in streams)
    # Of a chunk the last 39 tokens, in whole grains of 64; of the tail, which may be resumed anywhere, all.
    assert found == [(64, 192), (64, 448), (188, 512), (188, 512), (256, 0), (256, 256)]


def test_a_prompt_goes_on_where_every_group_can(connector, exact):
    """Without the last chunk of the windows, the chunk before it is the end; full attention is there whole."""
    windows = {1: 300, 2: 300}
    kinds = {"windows": windows, "layers_per_table": 2}
    truth = prompt(1100)[1]
    run(connector, exact, 1100, kinds)
    forget(exact, 768, n_layers=2)
    n_loaded, found, _ = run(connector, exact, 1100, kinds)
    assert n_loaded == 768
    assert_same_where_needed(found, truth, windows, 768)
    assert run(connector, exact, 1100, kinds)[0] == 1088  # the run before has saved what was missing
    forget(exact, 512, n_layers=2)
    assert run(connector, exact, 1100, kinds)[0] == 512  # 725 is the first token that 1024 needs


def test_chunks_that_a_window_no_longer_reaches_are_not_needed(connector, exact):
    windows = {1: 300, 2: 300}
    kinds = {"windows": windows, "layers_per_table": 2}
    run(connector, exact, 1100, kinds)
    forget(exact, 0, n_layers=2)
    forget(exact, 256, n_layers=2)
    n_loaded, found, _ = run(connector, exact, 1100, kinds)
    assert n_loaded == 1088
    assert_same_where_needed(found, prompt(1100)[1], windows, 1088)


def test_a_damaged_window_fails_the_whole_load(connector, exact):
    """vLLM cannot be told which blocks of several tables are missing: the request is computed."""
    kinds = {"windows": {1: 300, 2: 300}, "layers_per_table": 2}
    truth = prompt()[1]
    run(connector, exact, kinds=kinds)
    forget(exact, 256, n_layers=2, damaged=True)
    n_loaded, found, engine = run(connector, exact, kinds=kinds)
    assert n_loaded == 0
    counts = engine.worker._mover.counts.read()
    assert (counts["damaged"], counts["tokens_loaded"], counts["tokens_missed"]) == (1, 0, FOUND)
    assert_same_where_needed(found, truth, {1: 300, 2: 300}, LENGTH)


def test_what_the_engine_has_itself_is_left_as_it_is(connector, exact):
    windows = {1: 300, 2: 300}
    kinds = {"windows": windows, "layers_per_table": 2}
    run(connector, exact, kinds=kinds)
    n_loaded, found, _ = run(connector, exact, kinds=kinds, n_local=288)
    assert n_loaded == FOUND - 288
    assert_same_where_needed(found, prompt()[1], windows, LENGTH)


def test_windows_are_coded_where_the_calibration_covers_them(connector, tmp_path, exact):
    calibration_of_windows((0,), (1, 2)).save(tmp_path / "both")
    options = exact | {"kvtc.lossless": False, "kvtc.calibration": f"{tmp_path}/both", "kvtc.step": 0.05}
    windows = {1: 300, 2: 300}
    kinds = {"windows": windows, "layers_per_table": 1}
    run(connector, options, kinds=kinds)
    n_loaded, found, engine = run(connector, options, kinds=kinds)
    assert n_loaded == FOUND
    assert [one.codec.codec.is_lossless for one in engine.worker._mover._groups] == [False, False]
    truth = prompt()[1]
    for layer, first in ((0, 0), (1, FOUND - 256), (2, FOUND - 256)):
        for side, expected in ((found.keys, truth.keys), (found.values, truth.values)):
            assert relative_error(side[layer, :, first:], expected[layer, :, first:]) < 0.02
            assert not same_bits(side[layer, :, first:], expected[layer, :, first:])


def test_what_the_calibration_does_not_cover_passes_without_loss(connector, tmp_path, exact):
    calibration_of_windows((0,), (1, 2), n_groups=1).save(tmp_path / "full")
    options = exact | {"kvtc.lossless": False, "kvtc.calibration": f"{tmp_path}/full", "kvtc.step": 0.05}
    windows = {1: 300, 2: 300}
    kinds = {"windows": windows, "layers_per_table": 2}
    run(connector, options, kinds=kinds)
    n_loaded, found, engine = run(connector, options, kinds=kinds)
    assert n_loaded == FOUND
    assert [one.codec.codec.is_lossless for one in engine.worker._mover._groups] == [False, True]
    truth = prompt()[1]
    assert same_bits(found.values[1:, :, FOUND - 299 :], truth.values[1:, :, FOUND - 299 :])
    assert not same_bits(found.values[0], truth.values[0])


def test_a_calibration_of_other_heads_is_refused(connector, tmp_path, exact):
    calibration_of_windows((0,), (1, 2)).save(tmp_path / "both")
    options = exact | {"kvtc.lossless": False, "kvtc.calibration": f"{tmp_path}/both", "kvtc.step": 0.05}
    config = configs(options, **(SHAPE | {"head_dim": 16}), windows={1: 300, 2: 300})
    with pytest.raises(GeometryMismatch, match="head_dim 16"):
        connector(config[0], KVConnectorRole.WORKER, config[1])


@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "latent", "axes"),
    [
        (torch.bfloat16, "auto", 72, (64, 32, 72)),
        (torch.uint8, "fp8_ds_mla", 72, (64, 32, 72)),
        # Of 32 features: two in a byte, and a scale for each 16.
        (torch.uint8, "nvfp4", None, (64, 2, 32, N_HEADS, 18)),
    ],
)
def test_pages_of_an_unknown_kind_are_kept_bit_for_bit(connector, exact, dtype, cache_dtype, latent, axes):
    """Numbers that are packed with their scales, of which vLLM tells no more than the size; latents without a calibration."""
    config = configs(exact, **SHAPE, latent=latent, cache_dtype=cache_dtype)
    shape, generator = (*axes[:-1], axes[-1] * dtype.itemsize), torch.Generator().manual_seed(3)
    truth = {
        name: torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).view(dtype)
        for name in config[0].layers
    }
    found = {name: torch.zeros_like(pages) for name, pages in truth.items()}
    serve(connector, config, truth, 0)
    serve(connector, config, found, FOUND)
    for name, pages in truth.items():
        assert same_bits(found[name][1:22], pages[1:22])
        assert not found[name][22:].view(torch.uint8).any()


def test_latents_are_coded_by_their_calibration(connector, tmp_path, exact):
    """vLLM holds the features of a rotary part in pairs, and behind the latent; transformers in two halves, as the key."""
    calibration = two_widths_calibration("latent")
    calibration.save(tmp_path / "latent")
    options = exact | {"kvtc.lossless": False, "kvtc.calibration": f"{tmp_path}/latent", "kvtc.step": 0.05}
    cache = random_cache(704, torch.bfloat16, geometry=two_widths("latent"))
    config = configs(options, **SHAPE, latent=20, dtype=torch.bfloat16)
    pairs = cache.keys.unflatten(-1, (2, 2)).transpose(-1, -2).flatten(-2)
    rows = torch.cat([cache.values, pairs], dim=-1)[:, 0].unflatten(1, (22, 32))
    truth = {name: torch.zeros(64, 32, 20, dtype=torch.bfloat16) for name in config[0].layers}
    for pages, its in zip(truth.values(), rows, strict=True):
        pages[1:23] = its
    found = {name: torch.zeros_like(pages) for name, pages in truth.items()}
    serve(connector, config, truth, 0)
    serve(connector, config, found, FOUND)
    for name, pages in truth.items():
        assert relative_error(found[name][1:22], pages[1:22]) < 0.02
        assert not same_bits(found[name][1:22], pages[1:22])
    with open_store(options["kvtc.store"]) as store:
        streams = [store.get(key) for key in store.keys() if key.startswith("chunk/")]  # noqa: SIM118
    (stream,) = (stream for stream in streams if inspect(stream).first_position == 256)
    decoded = Codec(calibration).decode_neutral(stream)
    assert relative_error(decoded.keys, cache.keys[:, :, 256:512]) < 0.02
    assert relative_error(decoded.values, cache.values[:, :, 256:512]) < 0.02


def test_an_fp8_cache_is_read_by_its_scales():
    layers = [torch.randn(4, N_HEADS, 8, 2 * HEAD_DIM).to(torch.float8_e4m3fn) for _ in range(2)]
    layout = PageLayout("LBHNC", 2, N_HEADS, HEAD_DIM, 8)
    scales = [(0.5, 2.0), (0.25, 1.0)]
    pages = EnginePages(layers, layout, 8, torch.float8_e4m3fn, scales=scales)
    keys, values = pages.read({0: [1, 3]}, torch.device("cpu"))
    plain = EnginePages(layers, layout, 8, torch.float8_e4m3fn).read({0: [1, 3]}, torch.device("cpu"))
    assert keys.dtype == pages.coded_dtype == torch.bfloat16
    for layer, (of_keys, of_values) in enumerate(scales):
        assert torch.equal(keys[layer].float(), plain[0][layer].float() * of_keys)
        assert torch.equal(values[layer].float(), plain[1][layer].float() * of_values)
    before = [layer.clone() for layer in layers]
    pages.write({0: [1, 3]}, keys, values)
    assert all(same_bits(layer, was) for layer, was in zip(layers, before, strict=True))
    pages.write({0: [0]}, 1e6 * keys[:, :, :8], values[:, :, :8])
    assert all(layer.float().isfinite().all() for layer in layers)


def test_pages_of_several_tables():
    layers = [torch.randn(6, 4, 6) for _ in range(2)]
    pages = EnginePages(layers, OpaqueLayout((0, 1), 4, 6), 4, torch.float32, tables=(0, 2))
    keys, _ = pages.read({0: [1, 2], 2: [4, 5]}, torch.device("cpu"))
    assert torch.equal(keys[0, 0], layers[0][1:3, :, :3].flatten(0, 1))
    assert torch.equal(keys[1, 0], layers[1][4:6, :, :3].flatten(0, 1))


@pytest.mark.parametrize(
    ("reach", "needed", "kept"),
    [(None, 0, 0), (39, 448, 192), (299, 192, 0), (255, 224, 0), (256, 224, 0), (0, 480, 256)],
)
def test_what_a_group_needs_and_keeps(reach, needed, kept):
    group = PageGroup(("a",), (0,), (0,), 32, reach)
    assert group.first_needed(491) == needed
    assert group.first_kept(0, 256) == kept


def serve(connector, config, tensors: dict[str, torch.Tensor], expected: int) -> None:
    """One prompt in blocks 1 .. 22 of these tensors, of which so many tokens are loaded; all are saved where none is."""
    tables = [list(range(1, 23))]
    scheduler, worker = (connector(config[0], role, config[1]) for role in KVConnectorRole)
    worker.register_kv_caches(tensors)
    fields = {"mm_features": [], "prompt_embeds": None, "lora_request": None, "cache_salt": None}
    asked = SimpleNamespace(request_id="a", prompt_token_ids=told_ids(LENGTH).tolist(), **fields)
    while (n_found := scheduler.get_num_new_matched_tokens(asked, 0)[0]) is None:
        pass
    assert n_found == expected
    scheduler.update_state_after_alloc(asked, SimpleNamespace(get_block_ids=lambda: tables), n_found)
    step = SimpleNamespace(
        scheduled_new_reqs=[] if n_found else [SimpleNamespace(req_id="a", num_computed_tokens=0)],
        scheduled_cached_reqs=SimpleNamespace(req_ids=[], num_computed_tokens=[]),
        num_scheduled_tokens={"a": LENGTH},
        kv_connector_block_state=SimpleNamespace(get_block_ids=lambda _: tables),
    )
    worker.bind_connector_metadata(scheduler.build_connector_meta(step))
    worker.start_load_kv(None)
    worker.wait_for_save()
    worker.shutdown()
    scheduler.shutdown()


def calibration_of_windows(full, windows, n_groups: int = 2):
    """Of layers of full attention and others with windows, fitted to the caches of `told_cache`."""

    def fitted(layers):
        geometry = tiny_geometry()
        part = replace(geometry, layers=layers, rope=geometry.rope.of_layers(layers))
        caches = (told_cache(200, seed=seed) for seed in range(100, 106))
        kept = (KVCache(one.keys[list(layers)], one.values[list(layers)], layers=layers) for one in caches)
        return fit_caches(part, kept, sink_tokens=SINK_TOKENS, sample=gradients(len(layers)))

    first, second = fitted(full), fitted(windows)
    further = CodedGroup(replace(second.geometry, is_window=True), second.joint, second.importance)
    return replace(first, key=None, value=None, further=(further,)[: n_groups - 1])


def gradients(n_layers: int, n: int = 512) -> GradientSample:
    """Gradients that know no direction from another."""
    shape = n, 2 * n_layers * N_HEADS, HEAD_DIM
    drawn, rows = torch.randn(2, *shape, generator=torch.Generator().manual_seed(7)).flatten(2)
    sizes = drawn.norm(dim=1)
    return GradientSample(rows.half(), (drawn / sizes[:, None]).half(), sizes, n_layers * N_HEADS, (HEAD_DIM, HEAD_DIM))


def forget(options, position: int, n_layers: int, damaged: bool = False) -> None:
    """Delete, or damage, what begins at a position and has so many layers."""
    with open_store(options["kvtc.store"]) as store:
        for key in [key for key in store.keys() if not key.startswith("tails/")]:  # noqa: SIM118
            stream = store.get(key)
            if inspect(stream).first_position == position and parse_stream(stream).header.n_layers == n_layers:
                if damaged:
                    store.put(key, stream[:-1] + bytes([stream[-1] ^ 1]))
                else:
                    store.delete(key)
