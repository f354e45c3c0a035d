"""Planning: arithmetic against the paper, the simulation against queueing theory, examples against their documentation."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvtc.plan
from kvtc.cli import main
from kvtc.errors import InvalidPlan, MissingMeasurement
from kvtc.plan import load_plan, run_plan
from kvtc.plan.engine import Engine, Limits, Speeds
from kvtc.plan.fields import Fields
from kvtc.plan.measurements import load_measurements, read_measurements
from kvtc.plan.model import PlannedModel, model_from_config
from kvtc.plan.report import plot_plan
from kvtc.plan.simulation import simulate
from kvtc.plan.storage import Hierarchy, Link, LinkedTier, Tier, stored_encoded, stored_raw
from kvtc.plan.workload import Conversation, Turn, read_workload

EXAMPLES = Path(kvtc.plan.__file__).parent / "examples"
PAPER = EXAMPLES / "paper_clients.json"
DOCUMENT = Path(__file__).parents[2] / "docs" / "plan.md"


# Models


def config(kind, layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary, tied=False):
    return {
        "model_type": kind, "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": intermediate,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim, "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }  # fmt: skip


# Parameters as the models' weight files count them; of the paper's table 21 the parameters of one basis in millions, and the
# share of both in percent.
TABLE_21 = [
    (config("qwen2", 28, 1536, 8960, 12, 2, 128, 151936), 1_777_088_000, 8000, 51, 6.8),
    (config("qwen2", 28, 3584, 18944, 28, 4, 128, 152064), 7_615_616_512, 8000, 115, 3.2),
    (config("llama", 32, 4096, 14336, 32, 8, 128, 128256), 8_030_261_248, 10_000, 328, 8.7),
    (config("llama", 80, 8192, 28672, 64, 8, 128, 128256), 70_553_706_496, 10_000, 819, 2.4),
    (config("mistral", 40, 5120, 14336, 32, 8, 128, 131072), 12_247_782_400, 10_000, 410, 7.1),
]


@pytest.mark.parametrize(("content", "parameters", "rank", "millions", "percent"), TABLE_21)
def test_calibration_sizes_are_those_of_table_21(content, parameters, rank, millions, percent):
    model = model_from_config(content)
    assert model.n_parameters == parameters
    assert round(model.calibration_parameters(rank) / 2e6) == millions
    # The 1.5B model's share comes out at 6.66 %; all others round to what is printed.
    assert 100 * model.calibration_share(rank) == pytest.approx(percent, abs=0.15)


def test_bytes_of_a_token():
    assert model_from_config(TABLE_21[3][0]).bytes_per_token == 320 * 1024
    assert model_from_config(TABLE_21[3][0], bits=8).bytes_per_token == 160 * 1024


def test_parameters_of_the_reference_model_are_counted_as_transformers_counts_them():
    model, _ = kvtc.reference_model()
    content = json.loads(model.config.to_json_string())
    assert model_from_config(content).n_parameters == model.num_parameters()


def test_a_model_of_another_kind_needs_its_parameters():
    content = {**TABLE_21[2][0], "model_type": "mixtral"}
    with pytest.raises(InvalidPlan, match=r"mixtral.*give the field parameters"):
        model_from_config(content)
    assert model_from_config(content, parameters=47_000_000_000).n_parameters == 47_000_000_000


# Storage


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(1, 60), st.sampled_from(["put", "pin", "unpin", "drop"])), max_size=40
    )
)
def test_a_tier_never_holds_more_than_it_may(actions):
    tier = Tier("t", 100, stored_raw(1))
    held: dict[int, int] = {}
    pinned: set[int] = set()
    for conversation, n_tokens, action in actions:
        if action == "put":
            gone = tier.put(conversation, n_tokens)
            room = 100 - sum(held[other] for other in pinned if other != conversation)
            assert (gone is None) == (n_tokens > room)
            if gone is not None:
                assert pinned.isdisjoint(other for other, _ in gone)
                held = {c: n for c, n in held.items() if (c, n) not in gone} | {conversation: n_tokens}
        elif action == "pin" and conversation in held:
            tier.pin(conversation)
            pinned.add(conversation)
        elif action != "pin":
            (tier.unpin if action == "unpin" else tier.drop)(conversation)
            pinned.discard(conversation)
            if action == "drop":
                held.pop(conversation, None)
        assert tier.used_bytes == sum(held.values()) <= 100
        assert {c: tier.tokens_of(c) for c in held} == held


def hierarchy(*capacities, stored=None):
    tiers = [Tier(f"t{i}", capacity, stored or stored_raw(1)) for i, capacity in enumerate(capacities)]
    return Hierarchy([LinkedTier(tier, Link(10.0, 0.0), Link(10.0, 0.5)) for tier in tiers])


def test_what_one_tier_drops_moves_to_the_next():
    tiers = hierarchy(100, 100)
    for conversation in range(4):
        tiers.store(0.0, conversation, 50, 0)
    assert [tiers.find(c)[0].tier.name for c in range(4)] == ["t1", "t1", "t0", "t0"]
    tiers.store(0.0, 0, 50, 50)  # used again: moves up, and the least recently used moves down
    assert [tiers.find(c)[0].tier.name for c in range(4)] == ["t0", "t1", "t1", "t0"]
    tiers.store(0.0, 4, 50, 0)
    tiers.store(0.0, 5, 50, 0)
    assert tiers.find(1) == (None, 0)
    tiers.store(0.0, 6, 101, 0)  # too large for any
    assert tiers.find(6) == (None, 0)


def test_a_link_takes_one_transfer_after_another():
    link = Link(10.0, 0.5)
    assert [link.transfer(0.0, 20), link.transfer(1.0, 20), link.transfer(9.0, 20)] == [2.5, 5.0, 11.5]
    assert link.transfer(20.0, 0) == 20.0
    assert link.busy_seconds == 7.5


def test_what_is_not_yet_written_cannot_be_read():
    tiers = hierarchy(1000)
    tiers.store(0.0, 7, 100, 0)  # written at 0.5 + 100 / 10
    linked, n_tokens = tiers.find(7)
    assert linked.read(3.0, 7, n_tokens) == 10.5 + 10.0
    tiers.store(30.0, 7, 120, 100)
    assert linked.read(30.0, 7, 120) == 30.0 + 2.5 + 12.0


def test_stored_bytes_count_exact_tokens():
    stored = stored_encoded(1000, 10, 132)
    assert stored(100) == 100_000
    assert stored(1132) == 132_000 + 100_000


# Simulation


def one_engine(speeds, limits=None, gpu_bytes=math.inf, below=None, keeps=False):
    def make(clock, answered):
        gpu = Tier("gpu", gpu_bytes, stored_raw(speeds.bytes_per_token or 1))
        return [Engine(clock, speeds, limits or Limits(), gpu, below or Hierarchy([]), keeps, answered)]

    return make


SECOND = 1_000_000  # tokens that the server below prefills in a second


def served_one_by_one(arrivals, services):
    conversations = [
        Conversation(float(a), [Turn(max(1, round(SECOND * s)), 1)]) for a, s in zip(arrivals, services, strict=True)
    ]
    speeds = Speeds([(100 * SECOND, 100.0)], 0.0, 0.0)
    return simulate(conversations, one_engine(speeds, Limits(max_admitted=1)))


@pytest.mark.parametrize(("queue", "load"), [("M/M/1", 0.5), ("M/D/1", 0.6)])
def test_waiting_times_are_those_of_queueing_theory(queue, load):
    random, n = np.random.default_rng(1), 12_000
    arrivals = np.cumsum(random.exponential(1 / load, n))
    services = random.exponential(1.0, n) if queue == "M/M/1" else np.ones(n)
    done, engines, end = served_one_by_one(arrivals, services)
    waits = np.array([r.first_token - r.arrival - r.turn.prompt_tokens / SECOND for r in done])
    # Pollaczek and Khinchine: the mean of an infinitely long run.
    expected = load / (1 - load) * (1.0 if queue == "M/M/1" else 0.5)
    assert waits.mean() == pytest.approx(expected, rel=0.05)
    assert engines[0].busy_seconds / end == pytest.approx(load, rel=0.03)  # utilization law
    # Lindley's recursion: each single wait, exactly.
    wait = 0.0
    for i, found in enumerate(waits):
        wait = max(
            0.0, wait + (round(SECOND * services[i - 1]) / SECOND - (arrivals[i] - arrivals[i - 1]) if i else 0.0)
        )
        assert found == pytest.approx(wait, abs=1e-4)


def test_a_closed_loop_keeps_to_the_response_time_law():
    n_clients, think, prefill = 5, 3.0, 1.0
    turns = [Turn(SECOND, 1, 0, think)] * 50
    speeds = Speeds([(SECOND, prefill)], 0.0, 0.0)
    done, engines, end = simulate([Conversation(0.0, turns)] * n_clients, one_engine(speeds, Limits(max_admitted=1)))
    late = [r for r in done if r.turn_index >= 10]
    mean = np.mean([r.finished - r.arrival for r in late])
    assert mean == pytest.approx(n_clients * prefill - think)  # N / X - Z of a saturated server
    assert engines[0].busy_seconds == pytest.approx(len(done) * prefill)
    assert engines[0].busy_seconds / end > 0.98


def test_steps_are_shared_and_newcomers_wait_for_a_step():
    speeds = Speeds([(1000, 1.0)], 0.1, 0.001, request_seconds=0.25)
    # 100 tokens prefill in 0.1 s; alone a step takes 0.1 + 0.001 * (100 + 10 / 2) = 0.205 s.
    done, engines, _ = simulate(
        [Conversation(0.0, [Turn(100, 10)]), Conversation(0.5, [Turn(100, 10)])], one_engine(speeds)
    )
    first, second = sorted(done, key=lambda r: r.conversation)
    assert first.first_token == pytest.approx(0.25 + 0.1)
    # The second comes at 0.75, in the middle of the second step, which ends at 0.76.
    assert second.first_token == pytest.approx(0.35 + 2 * 0.205 + 0.1)
    assert first.finished == pytest.approx(second.first_token + 7 * 0.31)
    assert second.finished == pytest.approx(first.finished + 2 * 0.205)
    assert engines[0].busy_seconds == pytest.approx(sum(sum(r.engine_seconds.values()) for r in done))


def test_memory_limits_how_many_run():
    speeds = Speeds([(1000, 1.0)], 0.1, 0.0, bytes_per_token=1)
    turns = [Conversation(0.0, [Turn(100, 11)])] * 4
    done, _, _ = simulate(turns, one_engine(speeds, gpu_bytes=250))
    assert [round(r.finished, 6) for r in done] == [1.2, 1.2, 2.4, 2.4]
    done, _, _ = simulate(turns, one_engine(speeds, Limits(max_running=4), gpu_bytes=250))
    assert [round(r.finished, 6) for r in done] == [1.4] * 4
    with pytest.raises(InvalidPlan, match=r"111 tokens needs 111 bytes.*100 are left"):
        simulate(turns, one_engine(speeds, gpu_bytes=100))


@pytest.mark.parametrize("blocking", [True, False])
def test_what_a_reader_waits_for(blocking):
    """One conversation's cache is read from a tier while another one's answer is being decoded."""
    speeds = Speeds(
        [(1000, 1.0)], 0.1, 0.0, bytes_per_token=1, encode_bytes_per_second=200, decode_bytes_per_second=100
    )
    below = hierarchy(1000, stored=stored_encoded(1, 4, 0))
    asks_again = Conversation(0.0, [Turn(100, 1), Turn(101, 1, 101, 9.0)])
    # Held in GPU memory, the other's context pushes the first's out.
    other = Conversation(5.0, [Turn(100, 100)])
    limits = Limits(max_running=2, blocking_loads=blocking)
    done, _, _ = simulate([asks_again, other], one_engine(speeds, limits, 205, below, keeps=True))
    again = next(r for r in done if r.turn_index == 1)
    assert (again.hit_tier, again.hit_tokens) == ("t0", 101)
    read, decoded = 26 / 10, 1.01
    assert again.engine_seconds["decode_cache"] == pytest.approx(decoded)
    assert again.engine_seconds["load"] == pytest.approx(read if blocking else 0)
    assert read + decoded - 1e-9 <= again.first_token - again.arrival < read + decoded + 0.2
    running = next(r for r in done if r.conversation == 1)
    stalled = running.finished - running.first_token - 99 * 0.1
    assert stalled == pytest.approx(
        decoded + (read if blocking else 0) + again.engine_seconds["encode_cache"], abs=0.02
    )


@given(st.integers(0, 100), st.booleans(), st.booleans(), st.integers(1, 3), st.sampled_from([None, 1, 2]))
def test_everyone_is_answered_in_order_and_every_second_is_accounted_for(seed, blocking, keeps, running, admitted):
    workload = read_workload(
        Fields(
            {
                "kind": "conversations", "seed": seed, "conversations_per_second": 0.5, "conversations": 12,
                "turns": {"geometric": 3}, "first_prompt_tokens": {"lognormal": [80, 60]}, "turn_tokens": {"uniform": [1, 50]},
                "answer_tokens": {"exponential": 20}, "think_seconds": {"exponential": 5}, "max_tokens": 400,
            },
            "w",
        ),
        Path(),
    )  # fmt: skip
    speeds = Speeds([(100, 1.0), (400, 8.0)], 0.01, 1e-4, 0.1, 1, 500, 800)
    below = hierarchy(300, 500, stored=stored_encoded(1, 3, 10))
    make = one_engine(speeds, Limits(running if seed % 2 else None, admitted, blocking), 700, below, keeps)
    done, engines, end = simulate(workload.conversations, make)
    assert len(done) == sum(len(c.turns) for c in workload.conversations)
    answered: dict[int, float] = {}
    for request in done:
        assert request.arrival <= request.first_token <= request.finished
        assert request.arrival >= answered.get(request.conversation, 0.0)
        assert request.hit_tokens <= request.turn.reused_tokens
        answered[request.conversation] = request.finished
    spent = sum(sum(r.engine_seconds.values()) for r in done)
    assert engines[0].busy_seconds == pytest.approx(spent)
    assert spent <= end + sum(done[-1].engine_seconds.values())


# Workloads


def test_a_trace(tmp_path):
    lines = [
        {"seconds": 0, "conversation": "a", "prompt_tokens": 100, "answer_tokens": 10},
        {"seconds": 1, "conversation": "b", "prompt_tokens": 50, "answer_tokens": 5},
        {"seconds": 7, "conversation": "a", "prompt_tokens": 130, "answer_tokens": 10},
        {"seconds": 9, "conversation": "a", "prompt_tokens": 90, "answer_tokens": 10, "reused_tokens": 40},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    first, second = read_workload(Fields({"kind": "trace", "file": "trace.jsonl"}, "w"), tmp_path).conversations
    assert [turn.reused_tokens for turn in first.turns] == [0, 110, 40]
    assert [turn.not_before for turn in first.turns] == [0, 7, 9]
    assert second.start == 1
    for change, message in (
        ({"reused_tokens": 141}, r"trace.jsonl:4: 141 tokens cannot come again of 140"),
        ({"seconds": 3}, r"trace.jsonl:4: .*order"),
        ({"answer_tokens": 0}, r"trace.jsonl:4.answer_tokens: expected a whole number of at least 1"),
        ({"tokens": 3}, r"trace.jsonl:4: unknown field tokens"),
    ):
        path.write_text("\n".join(json.dumps(line) for line in [*lines[:3], {**lines[3], **change}]))
        with pytest.raises(InvalidPlan, match=message):
            read_workload(Fields({"kind": "trace", "file": "trace.jsonl"}, "w"), tmp_path)


@pytest.mark.parametrize(
    ("value", "mean"),
    [(7, 7), ({"exponential": 50}, 50), ({"geometric": 20}, 20), ({"uniform": [10, 30]}, 20), ({"lognormal": [60, 40]}, 60),
     ({"one_of": [10, 50]}, 30)],
)  # fmt: skip
def test_distributions_have_their_means(value, mean):
    fields = Fields(
        {
            "kind": "clients",
            "clients": 4000,
            "requests_per_client": 1,
            "context_tokens": value,
            "question_tokens": 1,
            "answer_tokens": 1,
        },
        "w",
    )
    prompts = [c.turns[0].prompt_tokens - 1 for c in read_workload(fields, Path()).conversations]
    assert np.mean(prompts) == pytest.approx(mean, rel=0.05)


def test_a_distribution_that_is_none():
    for value, message in (
        ({"normal": 3}, "one of constant, exponential"),
        (0, "above 0"),
        ({"uniform": [1]}, "expected 2 numbers"),
    ):
        with pytest.raises(InvalidPlan, match=message):
            read_workload(
                Fields({"kind": "clients", "clients": 1, "requests_per_client": 1, "context_tokens": value, "question_tokens": 1,
                        "answer_tokens": 1}, "w"), Path())  # fmt: skip


# Measurement files


def measurements_of(numbers, sources=None):
    sources = sources or {"s": {"kind": "quoted", "publication": "a paper"}}
    return {"description": "d", "sources": sources, "numbers": numbers}


def test_a_number_that_is_missing_is_named():
    measurements = read_measurements(measurements_of({}), "m.json")
    with pytest.raises(
        MissingMeasurement, match=r"m.json has no number tier.disk.read_bytes_per_second \(bytes a second from the tier"
    ):
        measurements.number("tier.disk.read_bytes_per_second")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (measurements_of({"engine.speed": {"value": 1, "source": "s"}}), "no number is called engine.speed"),
        (measurements_of({"price.gpu_hour": {"value": 1}}), "the field source is missing"),
        (measurements_of({"price.gpu_hour": {"value": math.inf, "source": "s"}}), "expected a number of at least 0"),
        (measurements_of({"codec.x.body_ratio": {"value": 0.5, "source": "s"}}), "of at least 1"),
        (measurements_of({"tier.x.read_bytes_per_second": {"value": 0, "source": "s"}}), "above 0"),
        (measurements_of({"engine.prefill_seconds": {"value": [[2, 1], [1, 2]], "source": "s"}}), "both rise"),
        (measurements_of({}, {"s": {"kind": "measured", "date": "today", "machine": "m"}}), "the field command is missing"),
        (measurements_of({}, {"s": {"kind": "guessed"}}), "expected one of measured, quoted, fitted"),
        (measurements_of({"price.gpu_hour": {"value": 1, "source": "s"}}, {"s": {"kind": "fitted", "publication": "p"}}), "note"),
    ],
)  # fmt: skip
def test_a_measurement_file_that_cannot_be_trusted(content, message):
    with pytest.raises(InvalidPlan, match=message):
        read_measurements(content, "m.json")


# The examples


@pytest.fixture(scope="module")
def paper_result():
    return run_plan(load_plan(PAPER))


def figure(result, policy, name, clients):
    return next(r[name]["mean"] for r in result["runs"] if (r["policy"], r["value"]) == (policy, clients))


def test_the_shape_of_the_papers_table_22(paper_result):
    plan = load_plan(PAPER)
    for figures in plan.published:
        for clients, seconds in zip(figures.values, figures.seconds, strict=True):
            found = figure(paper_result, figures.policy, figures.figure, clients)
            # Numbers fitted to a figure meet it as printed. The codec's times come from another table and another model: only the
            # order of magnitude of its time to first token is predicted, a third too low.
            allowed = (
                0.04
                if clients in figures.fitted
                else 0.35
                if "paper" in figures.policy and figures.figure[0] == "t"
                else 0.13
            )
            assert found == pytest.approx(seconds, rel=allowed), (figures, clients)
    for figure_name, gain_at_10, gain_at_12 in (("ttft_seconds", 1.1, 24), ("latency_seconds", 1.1, 5)):
        raw, encoded = (
            [figure(paper_result, policy, figure_name, clients) for clients in (10, 12)]
            for policy in ("offload raw", "offload paper")
        )
        assert raw[0] / encoded[0] < gain_at_10  # no gain while all fits
        assert raw[1] / encoded[1] > gain_at_12


def test_hits_of_the_paper_example(paper_result):
    hits = {(r["policy"], r["value"]): r["hit_rate"] for r in paper_result["runs"]}
    assert hits["hold", 2] == {"gpu": 1.0}
    assert hits["hold", 4] == {"gpu": 0.0}
    assert hits["offload raw", 11]["host"] == 1.0
    assert hits["offload raw", 12]["host"] == 0.0
    assert hits["offload paper", 16]["host"] == 1.0
    assert hits["recompute", 16] == {}


def test_the_documented_example_is_what_the_command_prints(capsys):
    assert main(["plan", "--config", str(PAPER)]) == 0
    printed = capsys.readouterr().out.strip()
    blocks = [block.strip("\n") for block in DOCUMENT.read_text(encoding="utf-8").split("```")[1::2]]
    assert printed in [block.removeprefix("text\n") for block in blocks]


def test_json_and_plot(capsys, tmp_path, paper_result):
    plot = tmp_path / "plan.svg"
    assert main(["plan", "--config", str(PAPER), "--json", "--plot", str(plot)]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(paper_result))
    picture = plot.read_text(encoding="utf-8")
    for run in paper_result["runs"]:
        assert f"{run['policy']} at {run['value']:g}: {run['ttft_seconds']['mean']:.3g} s</title>" in picture
    assert picture.count('hollow"><title>offload raw at 12, ') == 1  # the latency; the time to first token was fitted
    assert main(["plan", "--config", str(PAPER), "--plot", str(plot)]) == 1
    assert "exists; give --force" in capsys.readouterr().err
    with pytest.raises(InvalidPlan, match="no sweep"):
        plot_plan({**paper_result, "sweep_field": None}, [], plot)


def plan_files(directory, plan=None, numbers=None):
    """The paper's example made small, with changes; its plan's path."""
    content = json.loads(PAPER.read_text())
    content["model"] = {"name": "m", "layers": 80, "kv_heads": 8, "head_dim": 128, "parameters": 70_553_706_496}
    content |= {"sweep": None, "published": None, **(plan or {})}
    measured = json.loads((EXAMPLES / "paper_measurements.json").read_text())
    measured["numbers"] |= numbers or {}
    measured["numbers"] = {name: number for name, number in measured["numbers"].items() if number}
    (directory / "paper_measurements.json").write_text(json.dumps(measured))
    (directory / "plan.json").write_text(json.dumps(content))
    return directory / "plan.json"


def test_prices(tmp_path):
    prices = {
        "price.gpu_hour": {"value": 3.6, "source": "table 2"},
        "price.host.gib_month": {"value": 0, "source": "table 2"},
    }
    path = plan_files(tmp_path, numbers=prices)
    free = run_plan(load_plan(path))["runs"]
    assert free[0]["cost_per_1000_requests"] == pytest.approx(free[0]["provisioned_gpu_seconds_per_request"])
    prices["price.host.gib_month"]["value"] = 2592  # of 30 days: 0.001 a GiB and second
    run = run_plan(load_plan(plan_files(tmp_path, numbers=prices)))["runs"][2]
    rent = 256 * 0.9 / run["requests_per_second"]
    assert run["cost_per_1000_requests"] == pytest.approx(run["provisioned_gpu_seconds_per_request"] + rent)
    del prices["price.host.gib_month"]
    with pytest.raises(MissingMeasurement, match=r"price.host.gib_month"):
        run_plan(load_plan(plan_files(tmp_path, numbers=prices)))


def test_engines_share_what_is_shared(tmp_path):
    changes = {
        "engine": {"engines": 2, "gpus": 2, "gpu_memory_bytes": 80e9, "usable_share": 0.9, "weight_bits": 8},
        "tiers": [{"name": "host", "bytes": 20e9, "shared": True}],
    }
    content = json.loads(PAPER.read_text())["workload"] | {"clients": 16}
    plan = load_plan(plan_files(tmp_path, {**changes, "workload": content}))
    encoded = run_plan(plan)["runs"][3]
    # 16 conversations of 1.2 GB lie in 20 GB that two engines share; each has three contexts in its own memory.
    assert encoded["hit_rate"]["host"] + encoded["hit_rate"]["gpu"] == 1.0
    assert encoded["requests"] == 32


def test_a_trace_over_a_store_without_limit(tmp_path):
    """A conversation comes back after others have taken GPU and host: it is read from the store, or prefilled again."""
    requests = [(0, "a", 60_000), *((100 * i, f"other {i}", 60_000) for i in range(1, 7)), (900, "a", 60_200)]
    lines = [{"seconds": t, "conversation": c, "prompt_tokens": n, "answer_tokens": 10} for t, c, n in requests]
    (tmp_path / "trace.jsonl").write_text("\n".join(map(json.dumps, lines)))
    number = {"source": "table 2"}
    numbers = {
        "tier.store.read_bytes_per_second": {"value": 1e9, **number},
        "tier.store.write_bytes_per_second": {"value": 1e9, **number},
        "tier.store.access_seconds": {"value": 0.1, **number},
        "price.gpu_hour": {"value": 0, **number},
        "price.host.gib_month": {"value": 0, **number},
        "price.store.gib_month": {"value": 1, **number},
    }
    changes = {
        "workload": {"kind": "trace", "file": "trace.jsonl", "warmup_seconds": 900},
        "tiers": [{"name": "host", "bytes": 3e9}, {"name": "store", "shared": True}],
    }
    runs = {run["policy"]: run for run in run_plan(load_plan(plan_files(tmp_path, changes, numbers)))["runs"]}
    assert runs["hold"]["hit_rate"] == {"gpu": 0.0}
    for policy in ("offload raw", "offload paper"):
        run = runs[policy]
        assert run["hit_rate"] == {"gpu": 0.0, "host": 0.0, "store": 1.0}
        assert run["hit_rate_tokens"]["store"] == pytest.approx(60_010 / 60_200)
        stored = run["stored_bytes_per_conversation"]
        read = 2 * (0.1 + stored * 60_010 / 60_210 / 1e9)
        assert run["gpu_seconds_per_request"]["load"] == pytest.approx(read, rel=0.01)
        # 7 conversations, of which host holds two if they are encoded and none if not, for as long as the one answer takes.
        n_bytes = (5 if policy == "offload paper" else 7) * stored
        rent = 1000 * n_bytes / 2**30 / run["requests_per_second"] / (30 * 24 * 3600)
        assert run["cost_per_1000_requests"] == pytest.approx(rent, rel=0.01)
    assert runs["offload paper"]["ttft_seconds"]["mean"] < runs["hold"]["ttft_seconds"]["mean"]
    assert runs["offload raw"]["ttft_seconds"]["mean"] > runs["hold"]["ttft_seconds"]["mean"]  # slower than prefill


def test_the_chats_of_the_reference_model():
    plan = load_plan(EXAMPLES / "kvtc_6m_chats.json")
    runs = run_plan(plan)["runs"]
    assert [run["policy"] for run in runs[:5]] == [
        "recompute", "hold", "offload raw", "offload paper", "offload conditional",
    ]  # fmt: skip
    for _, hold, raw, *encoded in (runs[i : i + 5] for i in range(0, len(runs), 5)):
        assert sum(hold["hit_rate"].values()) < sum(raw["hit_rate"].values())
        for run in encoded:
            # Where raw caches fit, there is nothing to gain; when a request comes depends on the answer before it.
            assert sum(raw["hit_rate"].values()) - 0.02 < sum(run["hit_rate"].values()) <= 1
            assert run["stored_bytes_per_conversation"] < raw["stored_bytes_per_conversation"] / 5


@pytest.mark.parametrize(
    ("plan", "numbers", "message"),
    [
        ({"model": {"name": "m"}}, {}, "plan.json.model: the field head_dim is missing"),
        ({"polices": []}, {}, "unknown field polices"),
        (
            {"engine": {"gpus": 1, "gpu_memory_bytes": 80e9, "usable_share": 0.8, "weight_bits": 8}},
            {},
            "do not fit into 1 GPUs",
        ),
        ({"tiers": [{"name": "gpu"}]}, {}, "give the tier another name"),
        ({"tiers": [{"name": "x"}, {"name": "x"}]}, {}, "two tiers have one name"),
        ({"sweep": {"field": "client", "values": [1]}}, {}, "unknown field client"),
        ({"sweep": {"field": "clients", "values": []}}, {}, "expected a list of numbers"),
        ({"tiers": [{"name": "disk", "bytes": 1e12}]}, {}, "no number tier.disk.read_bytes_per_second"),
        ({}, {"codec.paper.body_ratio": None}, "no number codec.paper.body_ratio"),
        ({}, {"engine.prefill_seconds": {"value": [[1024, 0.1]], "source": "table 2"}}, "was measured up to 1,024"),
    ],
)
def test_a_plan_that_cannot_be(capsys, tmp_path, plan, numbers, message):
    assert main(["plan", "--config", str(plan_files(tmp_path, plan, numbers))]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("kvtc: error: ") == 1


def test_shipped_measurement_files_are_sound():
    files = sorted(EXAMPLES.glob("*measurements*.json"))
    assert files
    for path in files:
        assert load_measurements(path).numbers


def test_planning_needs_no_torch(tmp_path):
    command = ["plan", "--config", str(PAPER), "--quiet", "--json", "--plot", str(tmp_path / "plan.svg")]
    code = f"import sys; sys.modules['torch'] = None; from kvtc.cli import main; sys.exit(main({command}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["runs"]
    assert (tmp_path / "plan.svg").is_file()


def test_a_geometry_is_enough():
    model = PlannedModel("m", 2, 3, (4, 4), 1000)
    assert (
        model.side_features,
        model.bytes_per_token,
        model.calibration_parameters(10),
        model.calibration_parameters(99),
    ) == ((24, 24), 96, 480, 1152)


def test_latents_count_as_they_are_cached():
    """Those of DeepSeek V3: 512 features and a rotary part of 64 in 61 layers."""
    found = config("deepseek_v3", 61, 7168, 18432, 128, 128, 64, 129280)
    found |= {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "v_head_dim": 128}
    model = model_from_config(found, parameters=671_000_000_000)
    assert model.bytes_per_token == 61 * (512 + 64) * 2
    assert model.calibration_parameters(1000) == 61 * (512 + 64) * 1000


def test_values_may_be_narrower_than_keys():
    found = config("mimo_v2_flash", 2, 64, 64, 4, 2, 24, 100) | {"v_head_dim": 16}
    assert model_from_config(found, parameters=100_000).bytes_per_token == 2 * 2 * (24 + 16) * 2


ODD_JSON = {
    "NaN": ('{"n": NaN}', "NaN is not finite"),
    "infinity in digits": ('{"n": 1e999}', "out of all range"),
    "endless lists": ("[" * 100_000, "nested too deeply"),
    "a name twice": ('{"n": 1, "n": 2}', "a name twice"),
    "ten thousand digits": ('{"n": ' + "1" * 10_000 + "}", "not JSON"),
}


@pytest.mark.parametrize("case", ODD_JSON)
def test_odd_json_is_no_plan(tmp_path, case):
    text, expected = ODD_JSON[case]
    for name in ("plan.json", "measurements.json"):
        (tmp_path / name).write_text(text)
        with pytest.raises(InvalidPlan, match=expected):
            (load_plan if name == "plan.json" else load_measurements)(tmp_path / name)
    (tmp_path / "trace.jsonl").write_text(text)
    with pytest.raises(InvalidPlan, match=f"trace.jsonl:1.*{expected}"):
        read_workload(Fields({"kind": "trace", "file": "trace.jsonl"}, "w"), tmp_path)


@pytest.mark.parametrize("value", [10**400, -(10**400), 1 << 53 | 1, math.nan, True, "1", 1.5])
def test_numbers_no_plan_can_use(value):
    with pytest.raises(
        InvalidPlan, match=r"f\.n: expected a whole number of at least 1 and at most 2\*\*53, found .{,90}$"
    ):
        Fields({"n": value}, "f").whole("n")
    if value not in (1 << 53 | 1, 1.5):
        with pytest.raises(InvalidPlan, match=r"f\.n: expected a number above 0, found .{,90}$"):
            Fields({"n": value}, "f").number("n")
