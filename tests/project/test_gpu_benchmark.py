"""The benchmark of CUDA devices, in miniature on the CPU: pieces, resuming, and the gate before anything is timed."""

import json
from pathlib import Path

import pytest
import torch

from kvtc.backends import ReferenceBackend

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    return gpu


def call(gpu, directory, *arguments):
    gpu.main(["--device", "cpu", "--small", "--repeats", "1", "--directory", str(directory), *arguments])


def saved(directory):
    return json.loads((directory / "gpu_small.json").read_text())["result"]["pieces"]


def test_pieces_are_saved_and_not_measured_again(gpu, tmp_path, capsys):
    call(gpu, tmp_path, "--pieces", "nemo-conditional-3000")
    first = saved(tmp_path)
    call(gpu, tmp_path, "--pieces", "nemo-conditional-3000", "ceilings", "rans")
    pieces = saved(tmp_path)
    assert list(pieces) == ["nemo-conditional-3000", "ceilings", "rans"]
    assert pieces["nemo-conditional-3000"] == first["nemo-conditional-3000"]
    piece = pieces["nemo-conditional-3000"]
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
    call(gpu, tmp_path, "--list")
    assert "nemo-paper-6000                          -" in capsys.readouterr().out


def test_rans_reads_the_same_from_bytes_on_the_device(gpu):
    import gpu_ceilings
    from gpu_clock import Clock
    from gpu_coding import Setting

    del gpu

    cpu, read = torch.device("cpu"), []
    right = ReferenceBackend.read_integers

    class Remembering(ReferenceBackend):
        def read_integers(self, chunks, rank):
            read.append((type(chunks[0].symbols), right(self, chunks, rank)))
            return read[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_ceilings, "make_backend", lambda device, _: Remembering(device))
        found = gpu_ceilings.rans(Setting(cpu, "auto", Clock(cpu, repeats=1, warm_up=1), is_small=True))
    assert {kind for kind, _ in read} == {bytes, torch.Tensor}
    one_chunk = [values for _, values in read if len(values) == gpu_ceilings.CHUNK_TOKENS]
    assert len(one_chunk) == 4
    assert all(torch.equal(values, one_chunk[0]) for values in one_chunk)
    assert all(row["device_symbols_a_second"] > 0 for row in found["rows"])


def test_a_coefficient_takes_as_many_bits_of_every_model(gpu):
    from gpu_cases import SHAPES
    from gpu_clock import Clock
    from gpu_coding import Case, Setting

    del gpu
    setting = Setting(torch.device("cpu"), "auto", Clock(torch.device("cpu")), is_small=False)
    bits = {
        name: 32 * shape.geometry.row_features / setting.ratio(Case(name, "conditional", 3000)) / 3000
        for name, shape in SHAPES.items()
    }
    assert bits["nemo"] == pytest.approx(3.41, abs=0.01)
    assert bits["llama8"] == bits["llama70"] == pytest.approx(bits["nemo"])
    assert setting.ratio(Case("llama70", "paper", 6000)) == 16


def test_no_piece_begins_after_its_time(gpu, tmp_path, capsys):
    call(gpu, tmp_path, "--limit-seconds", "0", "--pieces", "ceilings", "rans")
    assert not (tmp_path / "gpu_small.json").exists()
    assert "call again for ceilings rans" in capsys.readouterr().err


def test_nothing_is_timed_on_a_red_gate(gpu, tmp_path, monkeypatch):
    import gpu_gate

    class Wrong(ReferenceBackend):
        name = "wrong"

        def read_integers(self, chunks, rank):
            return super().read_integers(chunks, rank) + 1e-2

    monkeypatch.setattr(gpu_gate, "make_backend", lambda device, _: Wrong(device))
    with pytest.raises(SystemExit, match="the backend wrong differs from the reference, nothing is timed"):
        call(gpu, tmp_path, "--pieces", "ceilings")
    assert not (tmp_path / "gpu_small.json").exists()


def test_layers_ahead_of_the_model_give_the_same_token(gpu):
    import gpu_model
    from gpu_cases import SHAPES, caches, calibration_for
    from gpu_clock import Clock
    from gpu_coding import Case, Setting, decode_all

    del gpu
    cpu = torch.device("cpu")
    setting = Setting(cpu, "auto", Clock(cpu), is_small=True)
    case, shape = Case("nemo", "conditional", 3000), SHAPES["nemo"].small()
    calibration = calibration_for(shape, "conditional", 24, cpu)
    codec, model = setting.codec(calibration, case), gpu_model.Decoder(shape, cpu)
    drawn = list(caches(calibration, "conditional", (2, 300), cpu))
    streams, ids = [codec.encode(one.cache, one.token_ids) for one in drawn], [one.token_ids for one in drawn]
    following = torch.stack(ids)[:, 0]
    whole = model.step(following, 300, zip(*decode_all(codec, streams, ids), strict=True))
    ahead = model.step(following, 300, gpu_model.layer_by_layer(codec, streams, ids, cpu))
    assert torch.allclose(whole.float(), ahead.float(), rtol=0.05, atol=0.05)


def test_a_step_continues_a_prefill(gpu):
    import gpu_model
    from gpu_cases import SHAPES

    del gpu
    model = gpu_model.Decoder(SHAPES["nemo"].small(), torch.device("cpu"))
    ids = torch.randint(512, (2, 40), generator=torch.Generator().manual_seed(0))
    kept = []

    def remember(*args):
        heads = real(*args)
        kept.append(heads[1:])
        return heads

    real = model._heads
    model._heads = remember
    model.prefill(ids[:, :-1])
    model._heads = real
    stepped = model.step(ids[:, -1], 39, iter(kept))
    assert torch.allclose(stepped.float(), model.prefill(ids).float(), rtol=0.1, atol=0.1)


def test_slow_runs_are_repeated_less(gpu):
    from gpu_clock import Clock

    del gpu
    calls = []
    cpu = torch.device("cpu")
    assert len(Clock(cpu, repeats=3, warm_up=2).times(lambda: calls.append(1))) == 3
    assert len(calls) == 5
    # Every run comes too late: one to warm up, one that counts.
    assert len(Clock(cpu, repeats=3, warm_up=2, enough_seconds=0).times(lambda: calls.append(1))) == 1
    assert len(calls) == 7


def test_stages_within_others_count_once(gpu):
    from gpu_clock import StageClock

    del gpu

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
