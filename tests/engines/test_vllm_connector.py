"""KvtcConnector in a very small engine that calls it as vLLM does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kvtc import inspect
from kvtc.counts import COUNTERS, Counts
from kvtc.engines.settings import EngineSettings
from kvtc.engines.vllm.facts import engine_facts, layers_in_order, served_model
from kvtc.engines.vllm.page_groups import PageGroup
from kvtc.errors import GeometryMismatch, InvalidArgument, UnsupportedLayout, UnsupportedModel
from kvtc.metrics import COUNTER_METRICS
from kvtc.prefix_cache import PrefixCache
from kvtc.store import open_store
from tests.builders import (
    HEAD_DIM,
    N_HEADS,
    N_LAYERS,
    measured_calibration,
    relative_error,
    told_cache,
    told_codec,
    told_ids,
)
from tests.failing import DECODE_ERRORS, ERRORS, break_decoding, break_store
from tests.fake_engine import FakeEngine
from tests.fake_vllm import KVConnectorRole, configs, fake_vllm

SHAPE = {"n_layers": N_LAYERS, "n_kv_heads": N_HEADS, "head_dim": HEAD_DIM}
LENGTH = 700  # two whole chunks and a tail of 188 tokens, of which 5 blocks of 32 are whole
FOUND = 672


@pytest.fixture
def connector():
    """The class, on stand-ins for vLLM."""
    with fake_vllm():
        from kvtc.engines.vllm.connector import KvtcConnector

        yield KvtcConnector


@pytest.fixture
def options(base_options):
    """What a user configures."""
    return base_options | {"kvtc.step": 0.05, "of_others": 1}


def prompt(n: int = LENGTH, seed: int = 0) -> tuple[list[int], object]:
    """Token ids and the cache that the model computes for them."""
    return told_ids(n, seed).tolist(), told_cache(n, seed=seed)


def close_to(found, truth) -> bool:
    return relative_error(found.keys, truth.keys) < 0.02 and relative_error(found.values, truth.values) < 0.02


@pytest.mark.parametrize(
    ("backend", "kernel_tokens", "axes"),
    [
        ("FLASH_ATTN", None, "BHNC"),
        ("FLASH_ATTN", 16, "BHNC"),
        ("TRITON_ATTN", None, "BNHC"),
        ("CPU_ATTN", None, "BHNC"),
    ],
)
def test_another_process_loads_what_one_saved(connector, options, backend, kernel_tokens, axes):
    ids, truth = prompt()
    engine = {"kernel_tokens": kernel_tokens, "axes": axes}
    first = FakeEngine(connector, *configs(options, **SHAPE, backend=backend), **engine)
    assert first.run("a", ids, truth)[0] == 0
    first.finish()
    second = FakeEngine(connector, *configs(options, **SHAPE, backend=backend), **engine)
    n_loaded, found = second.run("b", ids, truth)
    second.finish()
    assert n_loaded == FOUND
    assert close_to(found, truth)
    # What was loaded was coded; what was not is as the model made it.
    for start, stop in ((0, 512), (512, FOUND)):
        assert not torch.equal(found.keys[:, :, start:stop], truth.keys[:, :, start:stop])
    assert torch.equal(found.keys[:, :, FOUND:], truth.keys[:, :, FOUND:])


def test_a_quality_in_place_of_a_step(connector, options):
    measured_calibration().save(options["kvtc.calibration"])
    del options["kvtc.step"]
    ids, truth = prompt()
    for kl, expected in ((2e-3, 0), (2e-3, FOUND), (4e-3, 0)):
        engine = FakeEngine(connector, *configs(options | {"kvtc.kl": kl}, **SHAPE))
        n_loaded, found = engine.run("a", ids, truth)
        engine.finish()
        assert n_loaded == expected
        assert close_to(found, truth)


def test_what_the_engine_has_itself_is_left_as_it_is(connector, options):
    ids, truth = prompt()
    engine = FakeEngine(connector, *configs(options, **SHAPE))
    engine.run("a", ids, truth)
    engine.worker._mover.close()
    again = FakeEngine(connector, *configs(options, **SHAPE))
    n_loaded, found = again.run("b", ids, truth, n_local=288)
    assert n_loaded == FOUND - 288
    assert torch.equal(found.keys[:, :, :288], truth.keys[:, :, :288])
    assert close_to(found, truth)
    for one in (engine, again):
        one.finish()


def test_a_conversation_that_grows_loads_what_it_shares_and_saves_the_rest(connector, options):
    ids, truth = prompt()

    def turn(n_tokens: int) -> int:
        engine = FakeEngine(connector, *configs(options, **SHAPE))
        n_loaded, found = engine.run("a", ids[:n_tokens], _first(truth, n_tokens))
        engine.finish()
        assert close_to(found, _first(truth, n_tokens))
        assert engine.worker._mover.counts.read().get("tokens_missed", 0) == 0
        return n_loaded

    def kinds() -> list[str]:
        with open_store(options["kvtc.store"]) as store:
            return sorted(key.split("/")[0] for key in store.keys())  # noqa: SIM118

    assert turn(300) == 0
    assert kinds() == ["chunk", "tail", "tails", "tails"]
    assert turn(500) == 288  # one chunk, and the whole block of its tail
    assert kinds() == ["chunk", "tail", "tails", "tails"]  # the longer tail has taken the place of the first
    assert turn(LENGTH) == 480
    # What was a tail is inside the second chunk.
    assert kinds() == ["chunk", "chunk", "tail", "tails", "tails", "tails"]
    assert turn(LENGTH) == FOUND


def test_prefixes_of_the_prefix_cache_and_of_the_connector_are_the_same(connector, options):
    ids, truth = prompt()
    codec = told_codec("joint", step=options["kvtc.step"], window_tokens=60)
    identity = served_model(configs(options, **SHAPE)[0], EngineSettings.from_config(options)).identity
    with open_store(options["kvtc.store"]) as store, PrefixCache(codec, store, identity=identity) as prefixes:
        prefixes.save(ids, truth).result()
        engine = FakeEngine(connector, *configs(options, **SHAPE))
        n_loaded, found = engine.run("a", ids, truth)
        assert n_loaded == FOUND
        assert close_to(found, truth)
        assert torch.equal(found.keys[:, :, 650:], truth.keys[:, :, 650:])  # an exact window
        ids, truth = prompt(600, seed=3)
        engine.run("b", ids, truth)
        engine.finish()
        cache, n_tokens = prefixes.load_neutral(ids)
        assert n_tokens > 512
        assert relative_error(cache.keys, truth.keys[:, :, :n_tokens]) < 0.02


def test_texts_that_fork_inside_a_tail_share_its_beginning(connector, options):
    ids, truth = prompt(400)
    engine = FakeEngine(connector, *configs(options, **SHAPE))
    engine.run("a", ids, truth)
    engine.finish()
    forked = ids[:330] + prompt(400, seed=5)[0][330:]
    engine = FakeEngine(connector, *configs(options, **SHAPE))
    assert engine.run("b", forked, truth)[0] == 320
    engine.finish()


def test_texts_that_fork_inside_a_tail_keep_one_each(connector, options):
    ids, truth = prompt(400)
    forked = ids[:330] + prompt(400, seed=5)[0][330:]

    def run(token_ids):
        engine = FakeEngine(connector, *configs(options, **SHAPE))
        n_loaded, found = engine.run("a", token_ids, truth)
        engine.finish()
        assert close_to(found, truth)
        return n_loaded

    assert [run(one) for one in (ids, forked, ids, forked)] == [0, 320, 384, 384]


def test_texts_that_fork_inside_a_chunk_share_its_beginning(connector, options):
    """Whichever of a document's questions comes first: its tokens fill a chunk that the others part from."""
    ids, truth = prompt(600)
    forks = [ids[:at] + prompt(600, seed=at)[0][at:] for at in (490, 200, 10)]

    def run(token_ids):
        engine = FakeEngine(connector, *configs(options, **SHAPE))
        n_loaded, found = engine.run("a", token_ids, truth)
        engine.finish()
        assert close_to(found, truth)
        assert engine.worker._mover.counts.read().get("tokens_missed", 0) == 0
        return n_loaded

    assert [run(one) for one in (ids, *forks)] == [0, 480, 192, 0]
    assert [run(one) for one in (ids, *forks)] == [576] * 4


def test_a_tail_that_is_outgrown_before_it_is_read_is_a_miss(connector, options):
    longer, whole = prompt(450)
    ids, truth = longer[:400], _first(whole, 400)
    engine = FakeEngine(connector, *configs(options, **SHAPE))
    engine.run("a", ids, truth)
    engine.finish()
    engine = FakeEngine(connector, *configs(options, **SHAPE))
    plan = engine.scheduler._planner.plan_load

    def outgrown_meanwhile(*arguments):
        other = FakeEngine(connector, *configs(options, **SHAPE))
        other.run("b", longer, whole)
        other.finish()
        return plan(*arguments)

    engine.scheduler._planner.plan_load = outgrown_meanwhile
    n_loaded, found = engine.run("a", ids, truth)
    assert n_loaded == 256
    assert close_to(found, truth)
    engine.finish()


def test_a_damaged_entry_is_computed_and_saved_anew(connector, options):
    ids, truth = prompt()
    engine = FakeEngine(connector, *configs(options, **SHAPE))
    engine.run("a", ids, truth)
    engine.finish()
    assert not engine.scheduler._planner._prompts
    store = open_store(options["kvtc.store"])
    streams = {key: store.get(key) for key in store.keys() if key.startswith("chunk")}  # noqa: SIM118
    damaged = max(streams, key=lambda key: inspect(streams[key]).first_position)
    store.put(damaged, streams[damaged][:-1] + bytes([streams[damaged][-1] ^ 1]))
    engine = FakeEngine(connector, *configs(options, **SHAPE))
    n_loaded, found = engine.run("b", ids, truth)
    assert n_loaded == 256
    assert len(engine.failed) == (FOUND - 256) // 32
    assert torch.equal(found.keys[:, :, 256:], truth.keys[:, :, 256:])
    assert close_to(found, truth)
    assert engine.worker._mover.counts.read()["damaged"] == 1
    engine.finish()
    assert store.get(damaged) is None
    for n_expected in (256, FOUND):
        engine = FakeEngine(connector, *configs(options, **SHAPE))
        assert engine.run("c", ids, truth)[0] == n_expected
        engine.finish()


def test_bytes_that_change_on_disk_are_counted_logged_once_and_deleted(connector, options, caplog):
    ids, truth = prompt()
    engine = FakeEngine(connector, *configs(options, **SHAPE))
    engine.run("a", ids, truth)
    engine.finish()
    store = open_store(options["kvtc.store"])
    streams = {key: store.get(key) for key in store.keys() if key.startswith("chunk")}  # noqa: SIM118
    damaged = max(streams, key=lambda key: inspect(streams[key]).first_position)
    (path,) = (
        one for one in store._directory.root.rglob("*") if one.is_file() and streams[damaged] in one.read_bytes()
    )
    path.write_bytes(path.read_bytes()[:-1] + bytes([streams[damaged][-1] ^ 1]))
    caplog.clear()
    engine = FakeEngine(connector, *configs(options, **SHAPE))
    n_loaded, found = engine.run("b", ids, truth)
    assert n_loaded == 256
    assert close_to(found, truth)
    counts = engine.worker._mover.counts.read()
    assert (counts["damaged"], counts["misses"], counts["other"]) == (1, 1, 0)
    assert not path.exists()
    messages = [one.getMessage() for one in caplog.records if one.name.startswith("kvtc")]
    (message,) = (one for one in messages if "is damaged and is deleted: checksum does not fit" in one)
    assert str(store._directory.root) in message
    (cost,) = (one for one in messages if one is not message)
    assert "tokens 256 .. 671 are left to the engine: entry " in cost
    assert damaged in cost
    assert all(one.startswith("request b: ") for one in messages)
    engine.finish()


def test_an_entry_that_vanishes_between_the_question_and_the_load_is_computed(connector, options, caplog):
    ids, truth = prompt()
    engine = FakeEngine(connector, *configs(options, **SHAPE))
    engine.run("a", ids, truth)
    engine.finish()
    engine = FakeEngine(connector, *configs(options, **SHAPE))
    engine.worker._store.get_many = lambda keys: [None] * len(keys)
    n_loaded, found = engine.run("b", ids, truth)
    assert n_loaded == 0
    assert torch.equal(found.keys, truth.keys)
    assert engine.worker._mover.counts.read()["misses"] == 1
    assert "request b: tokens 0 .. 671 are left to the engine: entry chunk/" in caplog.text
    engine.finish()


def test_errors_that_nobody_foresaw_stay_out_of_the_engine(connector, options):
    ids, truth = prompt()

    def fails(*_):
        raise ZeroDivisionError

    engine = FakeEngine(connector, *configs(options, **SHAPE))
    engine.worker._mover._groups[0].pages.read = fails
    assert engine.run("a", ids, truth)[0] == 0
    engine.finish()
    assert engine.worker._mover.counts.read()["save_errors"] == 3
    engine = FakeEngine(connector, *configs(options, **SHAPE))
    engine.run("a", ids, truth)
    engine.finish()
    engine = FakeEngine(connector, *configs(options, **SHAPE))
    engine.worker._mover._groups[0].pages.settle = fails
    n_loaded, found = engine.run("b", ids, truth)
    assert n_loaded == 0
    assert torch.equal(found.keys, truth.keys)
    engine.finish()
    engine = FakeEngine(connector, *configs(options, **SHAPE))
    engine.scheduler._store.contains_prefix = fails
    assert engine.run("c", ids, truth)[0] == 0
    engine.finish()


@pytest.mark.parametrize("error", ERRORS)
def test_whatever_a_store_raises_is_computed_by_the_engine(connector, options, monkeypatch, error):
    ids, truth = prompt()
    engine = FakeEngine(connector, *configs(options, **SHAPE))
    engine.run("a", ids, truth)
    engine.worker._mover.close()
    engine = FakeEngine(connector, *configs(options, **SHAPE))
    break_store(monkeypatch, engine.worker._store, error)
    n_loaded, found = engine.run("b", ids, truth)
    assert (n_loaded, torch.equal(found.keys, truth.keys)) == (0, True)
    assert engine.run("c", *prompt(600, seed=3))[0] == 0
    break_store(monkeypatch, engine.scheduler._store, error)
    assert engine.run("d", ids, truth)[0] == 0
    engine.worker._mover.close()
    counts = engine.worker._mover.counts.read()
    # Of the first prompt one entry was asked for; of the second three were to be saved, and again of the first.
    assert (counts["misses"], counts["save_errors"], counts["damaged"]) == (1, 6, 0)
    assert engine.scheduler._planner.counts.read()["tokens_found"] == FOUND
    engine.finish()


@pytest.mark.parametrize("error", DECODE_ERRORS)
def test_what_there_is_no_memory_for_is_computed_and_stays_in_the_store(connector, options, monkeypatch, error):
    ids, truth = prompt()
    engine = FakeEngine(connector, *configs(options, **SHAPE))
    engine.run("a", ids, truth)
    engine.finish()
    engine = FakeEngine(connector, *configs(options, **SHAPE))
    with monkeypatch.context() as broken:
        break_decoding(broken, error)
        n_loaded, found = engine.run("b", ids, truth)
    assert (n_loaded, torch.equal(found.keys, truth.keys)) == (0, True)
    assert engine.worker._mover.counts.read()["decode_errors"] == 1
    assert engine.run("c", ids, truth)[0] == FOUND
    engine.finish()


def test_a_request_whose_load_failed_is_not_sent_to_load_again(connector, options):
    ids, truth = prompt()
    engine = FakeEngine(connector, *configs(options, **SHAPE))
    engine.run("a", ids, truth)
    engine.finish()
    engine = FakeEngine(connector, *configs(options, **SHAPE))
    asked = SimpleNamespace(
        request_id="b", prompt_token_ids=ids, mm_features=[], prompt_embeds=None, lora_request=None, cache_salt=None
    )
    found = None
    while found is None:
        found, _ = engine.scheduler.get_num_new_matched_tokens(asked, 0)
    assert found == FOUND
    engine.scheduler.update_state_after_alloc(
        asked, SimpleNamespace(get_block_ids=lambda: (list(range(1, 23)),)), found
    )
    assert engine.scheduler.get_num_new_matched_tokens(asked, 0) == (0, False)
    engine.finish()


@pytest.mark.parametrize(
    "request_fields",
    [
        {"cache_salt": "another tenant"},
        {"lora_request": SimpleNamespace(lora_name="adapter", lora_path="/adapter")},
        {"mm_features": ["an image"]},
        {"prompt_embeds": torch.zeros(1)},
    ],
)
def test_caches_that_depend_on_more_than_token_ids_are_kept_apart(connector, options, request_fields):
    ids, truth = prompt()
    engine = FakeEngine(connector, *configs(options, **SHAPE))
    engine.run("a", ids, truth)
    engine.finish()
    engine = FakeEngine(connector, *configs(options, **SHAPE))
    assert engine.run("b", ids, truth, **request_fields)[0] == 0
    engine.finish()


def test_after_a_change_of_weights_nothing_older_is_found(connector, options):
    ids, truth = prompt()
    engine = FakeEngine(connector, *configs(options, **SHAPE))
    engine.run("a", ids, truth)
    engine.worker._mover.close()
    engine = FakeEngine(connector, *configs(options, **SHAPE))
    assert engine.run("b", ids, truth)[0] == FOUND
    assert engine.scheduler.reset_cache()
    assert engine.run("c", ids, truth)[0] == 0
    engine.finish()


def test_tensor_parallel_ranks_have_a_calibration_each(connector, options):
    vllm_config, kv_cache_config = configs(options, **SHAPE, tp_size=2)
    for role in KVConnectorRole:
        with pytest.raises(GeometryMismatch, match=r"kv_heads=\(0, 1\).*\{tp_rank\}"):
            connector(vllm_config, role, kv_cache_config)


def test_a_pipeline_rank_has_its_layers(connector, options):
    vllm_config, kv_cache_config = configs(options, **(SHAPE | {"n_layers": 2 * N_LAYERS}))
    vllm_config.parallel_config.pipeline_parallel_size = 2
    connector(vllm_config, KVConnectorRole.WORKER, kv_cache_config).shutdown()
    vllm_config.parallel_config.rank = 1
    with pytest.raises(GeometryMismatch, match=r"pipeline rank 1 holds layers 3\.\.5.*layers=\(3, 6\)"):
        connector(vllm_config, KVConnectorRole.WORKER, kv_cache_config)
    with pytest.raises(GeometryMismatch, match="pipeline rank 1"):
        connector(vllm_config, KVConnectorRole.SCHEDULER, kv_cache_config)


def test_a_hit_needs_the_chunk_of_every_rank(options):
    from kvtc.engines.vllm.prefix_planner import PrefixPlanner

    with open_store(options["kvtc.store"]) as store:
        planner = PrefixPlanner(
            store,
            b"model",
            [[(b"rank 0", b"settings")], [(b"rank 1", b"settings")]],
            [PageGroup(("layer",), (0,), (0,), 32)],
        )
        ids = told_ids(600).tolist()
        while (found := planner.matched_tokens("a", ids, 0)) is None:
            pass
        assert found == 0
        orders = planner.plan_saves("a", 600, [list(range(19))])
        assert [(order.piece.start, len(order.page_ids[0])) for order in orders] == [(0, 8), (256, 8), (512, 3)]
        assert planner.plan_saves("a", 600, [list(range(19))]) == []
        for order in orders:
            store.put(order.piece.keys[0], b"of rank 0")
        store.put(orders[0].piece.keys[1], b"of rank 1")
        while (found := planner.matched_tokens("b", ids, 0)) is None:
            pass
        assert found == 256
        planner.close()


def test_counts_are_reported_once_and_add_up(connector, options):
    ids, truth = prompt()
    engine = FakeEngine(connector, *configs(options, **SHAPE))
    engine.run("a", ids, truth)
    engine.worker._mover.close()
    report = engine.worker.get_kv_connector_stats()
    assert report.data["entries_saved"] == 3
    assert report.data["original_bytes"] > report.data["bytes_saved"] > 0
    assert engine.worker.get_kv_connector_stats() is None
    both = connector.build_kv_connector_stats(dict(report.data)).aggregate(report)
    assert both.reduce()["kvtc_entries_saved"] == 6
    engine.finish()


def test_counts_become_metrics(connector, options):
    ids, truth = prompt()
    made, seen = {}, []

    class Counter:
        def __init__(self, name, documentation, labelnames):
            assert documentation
            assert labelnames == ["engine"]
            made[name] = self

        def labels(self, value):
            return SimpleNamespace(inc=lambda amount: seen.append((self, value, amount)))

    metrics = connector.build_prom_metrics(None, {"Counter": Counter}, ["engine"], {0: ["0"]})
    engine = FakeEngine(connector, *configs(options, **SHAPE))
    engine.run("a", ids, truth)
    engine.worker._mover.close()
    for side in (engine.worker, engine.scheduler):
        metrics.observe(side.get_kv_connector_stats().data)
    assert (made["vllm:kvtc_entries_saved"], "0", 3) in seen
    assert (made["vllm:kvtc_tokens_asked"], "0", LENGTH) in seen
    engine.finish()


def test_every_count_is_a_metric():
    with fake_vllm():
        from kvtc.engines.vllm import metrics as vllm_metrics

        names = set(vllm_metrics.tier_metric_definitions())
        assert names == {f"vllm:{metric.name.removesuffix('_total')}" for metric in COUNTER_METRICS.values()}
        assert len(names) == len(COUNTERS)
        assert {"vllm:kvtc_tokens_loaded", "vllm:kvtc_read_bytes", "vllm:kvtc_original_bytes"} <= names
    with pytest.raises(KeyError, match="there is no counter chunks_lost"):
        Counts().add(chunks_lost=1)


def test_what_cannot_work_is_refused_at_start(connector, options):
    def start(role=KVConnectorRole.WORKER, policy="recompute", changed=None, **more):
        vllm_config, kv_cache_config = configs(options | (changed or {}), **(SHAPE | more))
        vllm_config.kv_transfer_config.kv_load_failure_policy = policy
        made = connector(vllm_config, role, kv_cache_config)
        tensors = {name: torch.zeros(4, N_HEADS, 32, 2 * HEAD_DIM) for name in vllm_config.layers}
        made.register_kv_caches(tensors)

    start()
    with pytest.raises(InvalidArgument, match="kv_load_failure_policy"):
        start(policy="fail")
    with pytest.raises(InvalidArgument, match=r"unknown option kvtc.ration"):
        start(changed={"kvtc.ration": 8})
    with pytest.raises(InvalidArgument, match=r"kvtc.store"):
        start(changed={"kvtc.store": None})
    with pytest.raises(InvalidArgument, match=r"kvtc.profile"):
        start(changed={"kvtc.profile": "best"})
    with pytest.raises(InvalidArgument, match="either a ratio or a step or a kl"):
        start(changed={"kvtc.kl": 0.001})
    with pytest.raises(InvalidArgument, match="divisor of 256"):
        start(KVConnectorRole.SCHEDULER, block_size=48)
    with pytest.raises(GeometryMismatch, match="head_dim 8"):
        start(head_dim=16)
    with pytest.raises(UnsupportedLayout, match="ROCM_ATTN"):
        start(backend="ROCM_ATTN")


def test_models_with_other_caches_are_refused(options):
    class MambaSpec(SimpleNamespace):
        pass

    vllm_config, kv_cache_config = configs(options, **SHAPE)
    (group,) = kv_cache_config.kv_cache_groups
    group.kv_cache_spec = MambaSpec(block_size=32)
    with pytest.raises(UnsupportedModel, match="MambaSpec"):
        engine_facts(vllm_config, kv_cache_config)


def test_layers_are_sorted_by_number():
    assert layers_in_order(["m.10.attn", "m.9.attn"]) == ("m.9.attn", "m.10.attn")
    with pytest.raises(UnsupportedModel, match="one layer's number"):
        layers_in_order(["m.1.attn.2"])


def _first(cache, n):
    return SimpleNamespace(keys=cache.keys[:, :, :n], values=cache.values[:, :, :n])
