"""What can go wrong under a prefix cache. In every case: a counted miss or a clear error, never another text's cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvtc.codec.codec import Codec
from kvtc.errors import StoreUnavailable
from kvtc.prefix_cache import PrefixCache
from kvtc.store import open_store

from ..builders import joint_calibration, same_cache, told_cache, told_ids, told_model
from .servers import answer_nothing, redis_server, socket_server
from .test_faults_remote import CREDENTIALS, answer_500, close_at_once

ROOT = Path(__file__).parents[2]
N_TOKENS = 200


def codec(seed: int = 0) -> Codec:
    return Codec(joint_calibration(seed), "conditional", model=told_model(), ratio=4, window_tokens=16, chunk_tokens=32)


def save(prefixes: PrefixCache, seed: int = 0) -> None:
    prefixes.save(told_ids(N_TOKENS, seed), told_cache(N_TOKENS, seed=seed)).result()


@pytest.mark.parametrize("place", ["file", "redis"])
def test_two_processes_with_different_calibrations_on_one_store(tmp_path, place):
    for seed in (0, 1):
        joint_calibration(seed).save(tmp_path / f"{seed}.safetensors")
    if place == "file":
        run_both(f"file://{tmp_path}/store", tmp_path)
    else:
        with redis_server(tmp_path) as server:
            run_both(f"redis://127.0.0.1:{server.port}", tmp_path)


def run_both(url: str, directory: Path) -> None:
    """Both at once, each checking what it finds; then what each has left is there under names of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.stores.two_calibrations", url, str(directory / f"{seed}.safetensors"), "4"],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in (0, 1)
    ]
    ends = [(process.communicate()[1], process.returncode) for process in processes]
    assert [code for _, code in ends] == [0, 0], ends
    with open_store(url) as store:
        n_entries = len(list(store.keys()))
        for seed in (0, 1):
            with PrefixCache(codec(seed), store, min_tokens=1) as prefixes:
                assert prefixes.load_neutral(told_ids(N_TOKENS, 4), whole=True)[1] == N_TOKENS
                for text in range(5):
                    prefixes.delete(told_ids(N_TOKENS, text))
            assert len(list(store.keys())) == (n_entries // 2 if seed == 0 else 0)


def test_an_entry_of_another_calibration_under_this_ones_name_is_a_miss_and_left_alone():
    """As a frame it is sound, and as a stream: only the fingerprint tells. It may be of use to somebody else."""
    with (
        open_store("memory:") as store,
        open_store("memory:") as other_store,
        PrefixCache(codec(0), store, min_tokens=1) as mine,
        PrefixCache(codec(1), other_store, min_tokens=1) as others,
    ):
        save(mine)
        save(others)
        expected, _ = mine.load_neutral(told_ids(N_TOKENS), whole=True)
        for name, foreign in zip(sorted(store.keys()), sorted(other_store.keys()), strict=True):
            assert name != foreign
            store.put(name, other_store.get(foreign))
        n_entries = len(list(store.keys()))
        assert mine.load_neutral(told_ids(N_TOKENS), whole=True) == (None, 0)
        assert (mine.statistics["other"], mine.statistics["damaged"]) == (1, 0)
        assert len(list(store.keys())) == n_entries
        mine.delete(told_ids(N_TOKENS))
        save(mine)
        found, n_tokens = mine.load_neutral(told_ids(N_TOKENS), whole=True)
        assert n_tokens == N_TOKENS
        assert same_cache(found, expected)


def test_an_entry_of_another_text_under_this_ones_name_is_a_miss():
    with open_store("memory:") as store, PrefixCache(codec(), store, min_tokens=1) as prefixes:
        save(prefixes, 0)
        of_first = set(store.keys())
        save(prefixes, 1)
        of_second = set(store.keys()) - of_first
        for one, other in zip(sorted(of_first), sorted(of_second), strict=True):
            values = store.get(one), store.get(other)
            store.put(one, values[1])
            store.put(other, values[0])
        assert prefixes.load_neutral(told_ids(N_TOKENS, 0), whole=True) == (None, 0)
        assert prefixes.load_neutral(told_ids(N_TOKENS, 1), whole=True) == (None, 0)
        assert (prefixes.statistics["other"], prefixes.statistics["damaged"]) == (2, 0)


@pytest.mark.parametrize("answer", [answer_500, answer_nothing, close_at_once])
def test_s3_that_fails_is_a_miss_and_a_failed_save(answer):
    with (
        socket_server(answer) as place,
        open_store(f"s3://bucket?endpoint=http://{place}&timeout=0.4", **CREDENTIALS) as store,
        PrefixCache(codec(), store, min_tokens=1) as prefixes,
    ):
        assert prefixes.load_neutral(told_ids(N_TOKENS)) == (None, 0)
        assert prefixes.contains(told_ids(N_TOKENS)) == 0
        with pytest.raises(StoreUnavailable):
            save(prefixes)
        assert prefixes.statistics["store_errors"] >= 3


def test_redis_killed_between_save_and_load_is_a_miss_and_saved_again(tmp_path):
    with (
        redis_server(tmp_path) as server,
        open_store(f"redis://127.0.0.1:{server.port}?timeout=2") as store,
        PrefixCache(codec(), store, min_tokens=1) as prefixes,
    ):
        save(prefixes)
        assert prefixes.load_neutral(told_ids(N_TOKENS), whole=True)[1] == N_TOKENS
        server.kill()
        assert prefixes.load_neutral(told_ids(N_TOKENS), whole=True) == (None, 0)
        server.start()
        assert prefixes.load_neutral(told_ids(N_TOKENS), whole=True) == (None, 0)  # this server keeps nothing
        save(prefixes)
        assert prefixes.load_neutral(told_ids(N_TOKENS), whole=True)[1] == N_TOKENS
