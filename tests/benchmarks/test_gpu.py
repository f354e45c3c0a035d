"""The benchmark of CUDA devices, in miniature on the CPU: pieces, resuming, and the gate before anything is timed."""

import json

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import ceilings, gate, model
from benchmarks.gpu.cases import SHAPES, caches, calibration_for
from benchmarks.gpu.clock import Clock, StageClock
from benchmarks.gpu.coding import Case, Setting, decode_all
from kvtc.backends import ReferenceBackend


def call(directory, *arguments):
    gpu.main(["--device", "cpu", "--small", "--repeats", "1", "--directory", str(directory), *arguments])


def saved(directory):
    return json.loads((directory / "gpu_small.json").read_text())["result"]["pieces"]


def test_pieces_are_saved_and_not_measured_again(tmp_path, capsys):
    call(tmp_path, "--pieces", "nemo-joint-3000")
    first = saved(tmp_path)
    call(tmp_path, "--pieces", "nemo-joint-3000", "ceilings", "rans")
    pieces = saved(tmp_path)
    assert list(pieces) == ["nemo-joint-3000", "ceilings", "rans"]
    assert pieces["nemo-joint-3000"] == first["nemo-joint-3000"]
    piece = pieces["nemo-joint-3000"]
    assert piece["gate"]["passed"]
    assert piece["provenance"]["command"]
    assert [(one["sequences"], one["tokens"]) for one in piece["result"]["batches"]] == [(2, 300), (1, 520)]
    # A codec that lost its way would decode to something else.
    assert all(one["relative_error"] < 0.05 for one in piece["result"]["batches"])
    assert 8 < piece["result"]["batches"][0]["body_ratio"] < 32
    # Prediction makes every coefficient count, of which fewer are coded.
    assert 0 < piece["result"]["batches"][0]["coded"] <= piece["result"]["batches"][0]["coefficients"][0] == 24
    assert piece["result"]["batches"][0]["encode_to_ratio_seconds"] > 0
    assert "20 G/s" in capsys.readouterr().out
    call(tmp_path, "--list")
    assert "nemo-paper-6000                          -" in capsys.readouterr().out


def test_rans_reads_the_same_from_bytes_on_the_device():
    cpu, read = torch.device("cpu"), []
    right = ReferenceBackend.read_integers

    class Remembering(ReferenceBackend):
        def read_integers(self, chunks, rank):
            read.append((type(chunks[0].symbols), right(self, chunks, rank)))
            return read[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ceilings, "make_backend", lambda device, _: Remembering(device))
        found = ceilings.rans(Setting(cpu, "auto", Clock(cpu, repeats=1, warm_up=1), is_small=True))
    assert {kind for kind, _ in read} == {bytes, torch.Tensor}
    one_chunk = [values for _, values in read if len(values) == ceilings.CHUNK_TOKENS]
    assert len(one_chunk) == 4
    assert all(torch.equal(values, one_chunk[0]) for values in one_chunk)
    assert all(row["device_symbols_a_second"] > 0 for row in found["rows"])


def test_a_coefficient_takes_as_many_bits_of_every_model():
    setting = Setting(torch.device("cpu"), "auto", Clock(torch.device("cpu")), is_small=False)
    bits = {
        name: 16 * shape.geometry.joint_features / setting.ratio(Case(name, "joint", 3000)) / 3000
        for name, shape in SHAPES.items()
    }
    assert bits["nemo"] == pytest.approx(3.41, abs=0.01)
    assert bits["llama8"] == bits["llama70"] == pytest.approx(bits["nemo"])
    assert setting.ratio(Case("llama70", "paper", 6000)) == 16


def test_no_piece_begins_after_its_time(tmp_path, capsys):
    call(tmp_path, "--limit-seconds", "0", "--pieces", "ceilings", "rans")
    assert not (tmp_path / "gpu_small.json").exists()
    assert "call again for ceilings rans" in capsys.readouterr().err


def test_nothing_is_timed_on_a_red_gate(tmp_path, monkeypatch):
    class Wrong(ReferenceBackend):
        name = "wrong"

        def read_integers(self, chunks, rank):
            return super().read_integers(chunks, rank) + 0.1

    monkeypatch.setattr(gate, "make_backend", lambda device, _: Wrong(device))
    with pytest.raises(SystemExit, match="the backend wrong differs from the reference, nothing is timed"):
        call(tmp_path, "--pieces", "ceilings")
    assert not (tmp_path / "gpu_small.json").exists()


def test_layers_ahead_of_the_model_give_the_same_token():
    cpu = torch.device("cpu")
    setting = Setting(cpu, "auto", Clock(cpu), is_small=True)
    case, shape = Case("nemo", "joint", 3000), SHAPES["nemo"].small()
    calibration = calibration_for(shape, "joint", 24, cpu)
    codec, decoder = setting.codec(calibration, case), model.Decoder(shape, cpu)
    drawn = list(caches(calibration, "joint", (2, 300), cpu))
    streams, ids = [codec.encode(one.cache, one.token_ids) for one in drawn], [one.token_ids for one in drawn]
    following = torch.stack(ids)[:, 0]
    whole = decoder.step(following, 300, zip(*decode_all(codec, streams, ids), strict=True))
    ahead = decoder.step(following, 300, model.layer_by_layer(codec, streams, ids, cpu))
    assert torch.allclose(whole.float(), ahead.float(), rtol=0.05, atol=0.05)


def test_a_step_continues_a_prefill():
    decoder = model.Decoder(SHAPES["nemo"].small(), torch.device("cpu"))
    ids = torch.randint(512, (2, 40), generator=torch.Generator().manual_seed(0))
    kept = []

    def remember(*args):
        heads = real(*args)
        kept.append(heads[1:])
        return heads

    real = decoder._heads
    decoder._heads = remember
    decoder.prefill(ids[:, :-1])
    decoder._heads = real
    stepped = decoder.step(ids[:, -1], 39, iter(kept))
    assert torch.allclose(stepped.float(), decoder.prefill(ids).float(), rtol=0.1, atol=0.1)


def test_slow_runs_are_repeated_less():
    calls = []
    cpu = torch.device("cpu")
    assert len(Clock(cpu, repeats=3, warm_up=2).times(lambda: calls.append(1))) == 3
    assert len(calls) == 5
    # Every run comes too late: one to warm up, one that counts.
    assert len(Clock(cpu, repeats=3, warm_up=2, enough_seconds=0).times(lambda: calls.append(1))) == 1
    assert len(calls) == 7


def test_stages_within_others_count_once():
    class Work:
        def outer(self):
            return self.inner() + self.inner()

        def inner(self):
            return 1

    work, clock = Work(), StageClock(torch.device("cpu"))
    ticks = iter(range(6))
    clock._now = lambda: next(ticks)
    with clock.hooked({"outer": (work, "outer"), "inner": (work, "inner")}):
        assert work.outer() == 2
    # From tick 0 to 5, of which 1 to 2 and 3 to 4 are the inner stage's.
    assert clock.seconds() == {"inner": 2, "outer": 3}
    assert clock.seconds() == {}
