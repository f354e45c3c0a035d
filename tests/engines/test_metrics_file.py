"""Metrics of adapters as a file, for engines that ask an adapter for none."""

from __future__ import annotations

import logging
import stat
import threading
import time

import pytest

from kvtc.engines import metrics_file
from kvtc.engines.chunk_coder import ChunkSettings
from kvtc.engines.metrics_file import MetricsFile
from kvtc.engines.stored_chunks import StoredChunks
from kvtc.errors import InvalidArgument
from kvtc.store import open_store
from tests.stores.contract import wait_until
from tests.stores.test_metrics import parsed


def test_a_file_is_replaced_again_and_again_and_at_the_end(monkeypatch, tmp_path):
    monkeypatch.setattr(metrics_file, "SECONDS", 0.02)
    path, texts = tmp_path / "kvtc.prom", ["first\n"]
    file = MetricsFile(str(path), lambda: texts[-1])
    assert path.read_text() == "first\n"
    assert stat.S_IMODE(path.stat().st_mode) & stat.S_IRUSR
    texts.append("second\n")
    wait_until(lambda: path.read_text() == "second\n")
    file.close()
    texts.append("third\n")
    time.sleep(0.1)
    assert path.read_text() == "second\n"
    assert [each.name for each in tmp_path.iterdir()] == ["kvtc.prom"]
    wait_until(lambda: not any(thread.name == "kvtc-metrics" for thread in threading.enumerate()))


def test_without_a_path_nothing_is_done():
    MetricsFile(None, lambda: pytest.fail("it was read")).close()


def test_a_file_that_cannot_be_written_is_refused_at_start_and_logged_later(monkeypatch, tmp_path, caplog):
    with pytest.raises(InvalidArgument, match="cannot be written: No such file"):
        MetricsFile(str(tmp_path / "absent" / "kvtc.prom"), str)
    monkeypatch.setattr(metrics_file, "SECONDS", 1000)
    (tmp_path / "there").mkdir()
    file = MetricsFile(str(tmp_path / "there" / "kvtc.prom"), str)
    (tmp_path / "there" / "kvtc.prom").unlink()
    (tmp_path / "there").rmdir()
    with caplog.at_level(logging.WARNING):
        file.close()
    assert "is not written: FileNotFoundError" in caplog.text


def test_chunks_write_what_they_and_their_store_have_counted(tmp_path):
    path = tmp_path / "kvtc.prom"
    chunks = StoredChunks(open_store("memory:"), lambda _: pytest.fail("no coder"), b"scope")
    chunks.write_metrics(str(path), engine="sglang", tp_rank="1")
    assert chunks.read(["chunk/absent"]) == [None]
    assert chunks.decode(0, "chunk/absent", None, lambda *_: None) is None
    chunks.close()
    found = parsed(path.read_text())
    label = 'engine="sglang",tp_rank="1"'
    assert found["kvtc_misses_total"] == {label: 1}
    assert found["kvtc_store_misses_total"] == {label: 1}
    assert found["kvtc_store_entries"] == {label: 0}


def test_each_rank_has_a_file_of_its_own():
    given = {"kvtc.calibration": "reference", "kvtc.store": "memory:"}
    settings = ChunkSettings.from_config({**given, "kvtc.metrics_file": "/x/{tp_rank}-{pp_rank}.prom"})
    assert settings.metrics_path(3, 1) == "/x/3-1.prom"
    assert ChunkSettings.from_config(given).metrics_path() is None
    with pytest.raises(InvalidArgument, match=r"only \{tp_rank\} and \{pp_rank\}"):
        ChunkSettings.from_config({**given, "kvtc.metrics_file": "{rank}.prom"}).metrics_path()
    with pytest.raises(InvalidArgument, match=r"unknown option kvtc\.metrics_file"):
        ChunkSettings.from_config({"kvtc.calibration": "reference", "kvtc.metrics_file": "x"}, needs_store=False)
