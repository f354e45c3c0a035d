"""A plan file, and what comes out of it: each policy simulated at each value of the sweep, with
every number's source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InvalidPlan
from ..process.progress import track
from .engine import Engine
from .events import ACTIVITIES, GPU
from .fields import Fields, check_number, read_json, read_object
from .measurements import load_measurements
from .model import read_model
from .policies import CodecPlan, EnginePlan, Fleet, Policy, TierPlan, policies_of
from .simulation import simulate
from .workload import Workload, read_workload

FIGURES = ("ttft_seconds", "latency_seconds")
MONTH_SECONDS, HOUR_SECONDS, GIB = 30 * 24 * 3600, 3600, 2**30


@dataclass(frozen=True)
class Published:
    """Published figures of one policy, by value of the sweep.

    Parameters:
        policy: the policy that they are compared with.
        figure: one of FIGURES.
        source: the publication.
        values: values of the sweep.
        seconds: the figure at each of the values.
        fitted: values at which numbers of the measurement file were fitted to the figure; agreement
            there proves nothing.
    """

    policy: str
    figure: str
    source: str
    values: Sequence[float]
    seconds: Sequence[float]
    fitted: Sequence[float]


@dataclass(frozen=True)
class Plan:
    """A plan file, read and checked.

    Parameters:
        description: what it is about, in words.
        fleet: the model, the engines and the tiers below them, with the measurements.
        codecs: those that are compared.
        workloads: what is asked, at each value of the sweep.
        sweep_field: the field of the workload that is swept; "": none.
        sweep_values: its values; [None]: there is no sweep.
        published: figures that results are shown beside.

    Example:
        >>> from pathlib import Path
        >>> from kvtc.plan import load_plan
        >>> plan = load_plan(Path(kvtc.__file__).parent / "plan/examples/paper_clients.json")
        >>> plan.sweep_field, plan.sweep_values
        ('clients', [1, 2, 4, 8, 10, 11, 12, 16])
    """

    description: str
    fleet: Fleet
    codecs: Sequence[CodecPlan]
    workloads: Sequence[Workload]
    sweep_field: str
    sweep_values: Sequence[float | None]
    published: Sequence[Published]


def load_plan(path: str | Path) -> Plan:
    """Read a plan and the files that it names, relative to its own directory.

    Parameters:
        path: the plan, a JSON file; docs/plan.md describes it.

    Returns:
        The plan.

    Raises:
        InvalidPlan: something is missing, unknown or impossible.
        OSError: a file cannot be read.

    Example:
        >>> from pathlib import Path
        >>> from kvtc.plan import load_plan
        >>> load_plan(Path(kvtc.__file__).parent / "plan/examples/paper_clients.json").fleet.model.name
        'Llama 3.3 70B'
    """
    path = Path(path)
    return read_object(read_json(path), str(path), partial(_plan, path.parent))


def _plan(directory: Path, fields: Fields) -> Plan:
    model = fields.inside("model", partial(read_model, directory=directory))
    measurements = load_measurements(directory / fields.text("measurements"))
    engine = fields.inside("engine", EnginePlan.read)
    tiers, codecs = fields.each("tiers", TierPlan.read), fields.each("codecs", CodecPlan.read)
    for kind, names in (("tiers", [tier.name for tier in tiers]), ("codecs", [codec.name for codec in codecs])):
        if len(set(names)) < len(names):
            raise InvalidPlan(f"{fields.where}: two {kind} have one name")
    sweep_field, values = fields.inside("sweep", _sweep) if "sweep" in fields else ("", [None])
    swept = [{sweep_field: value} if sweep_field else {} for value in values]
    workloads = [
        fields.inside("workload", partial(read_workload, directory=directory, overrides=override)) for override in swept
    ]
    policies = [policy.name for policy in policies_of(codecs)]
    published = fields.each("published", partial(_published, policies), [])
    fleet = Fleet(model, engine, tiers, measurements)
    return Plan(fields.text("description"), fleet, codecs, workloads, sweep_field, values, published)


def run_plan(plan: Plan) -> dict[str, Any]:
    """Simulate a plan.

    Parameters:
        plan: the plan.

    Returns:
        Seconds, bytes, shares and, if the measurement file has prices, costs; ready for JSON.

    Raises:
        MissingMeasurement: the measurement file lacks a number.
        InvalidPlan: something cannot be simulated.

    Example:
        >>> from pathlib import Path
        >>> from kvtc.plan import load_plan, run_plan
        >>> result = run_plan(load_plan(Path(kvtc.__file__).parent / "plan/examples/paper_clients.json"))
        >>> sorted({run["policy"] for run in result["runs"]})
        ['hold', 'offload paper', 'offload raw', 'recompute']
    """
    policies = policies_of(plan.codecs)
    wanted = [(*run, policy) for run in zip(plan.sweep_values, plan.workloads, strict=True) for policy in policies]
    runs = [
        {"value": value, **_run(plan, policy, workload)}
        for value, workload, policy in track(wanted, "simulating", "runs")
    ]
    model = plan.fleet.model
    return {
        "description": plan.description,
        "model": {
            "name": model.name,
            "parameters": model.n_parameters,
            "bytes_per_token": model.bytes_per_token,
            "gpu_cache_bytes": plan.fleet.engine.cache_bytes(model),
        },
        "calibrations": [
            {
                "codec": codec.name,
                "rank": codec.rank,
                "parameters": model.calibration_parameters(codec.rank),
                "share_of_model": model.calibration_share(codec.rank),
            }
            for codec in plan.codecs
        ],
        "sweep_field": plan.sweep_field or None,
        "runs": runs,
        "numbers": [asdict(number) for _, number in sorted(plan.fleet.measurements.used.items())],
        "sources": [
            asdict(source)
            for name, source in plan.fleet.measurements.sources.items()
            if any(number.source == name for number in plan.fleet.measurements.used.values())
        ],
    }


def _run(plan: Plan, policy: Policy, workload: Workload) -> dict[str, Any]:
    requests, engines, _ = simulate(workload.conversations, plan.fleet.engines(policy))
    measured = [
        request
        for request in requests
        if request.turn_index >= workload.warmup_turns and request.arrival >= workload.warmup_seconds
    ]
    if not measured:
        raise InvalidPlan(
            "no request is left past the warm-up: ask for more requests, or fewer warmup_turns and warmup_seconds"
        )
    n_gpus = plan.fleet.engine.n_gpus
    span = max(request.finished for request in measured) - min(request.arrival for request in measured)
    provisioned = span * plan.fleet.engine.n_engines * n_gpus / len(measured)
    stored = policy.stored_bytes(plan.fleet.model, plan.fleet.measurements) if policy.offloads else None
    names = [GPU, *(tier.name for tier in plan.fleet.tiers)] if policy.offloads else [GPU] if policy.keeps else []
    prompts = sum(request.turn.prompt_tokens for request in measured)
    hits = {name: [request for request in measured if request.hit_tier == name] for name in names}
    return {
        "policy": policy.name,
        "requests": len(measured),
        "ttft_seconds": _summary([request.first_token - request.arrival for request in measured]),
        "latency_seconds": _summary([request.finished - request.arrival for request in measured]),
        "hit_rate": {name: len(found) / len(measured) for name, found in hits.items()},
        "hit_rate_tokens": {
            name: sum(request.hit_tokens for request in found) / prompts for name, found in hits.items()
        },
        "raw_bytes_per_conversation": _mean(
            [request.total_tokens * plan.fleet.model.bytes_per_token for request in measured]
        ),
        "stored_bytes_per_conversation": _mean([stored(request.total_tokens) for request in measured])
        if stored
        else None,
        "requests_per_second": len(measured) / span,
        "gpu_seconds_per_request": {
            activity: n_gpus * _mean([request.engine_seconds[activity] for request in measured])
            for activity in ACTIVITIES
        },
        "provisioned_gpu_seconds_per_request": provisioned,
        "cost_per_1000_requests": _cost(plan, engines, provisioned, span / len(measured)),
    }


def _cost(plan: Plan, engines: Sequence[Engine], gpu_seconds: float, seconds: float) -> float | None:
    """Of GPUs and tiers as they stand there, used or not; a tier without limit costs what it held
    at most. None without prices.
    """
    gpu_hour = plan.fleet.measurements.optional("price.gpu_hour")
    if gpu_hour is None:
        return None
    cost = gpu_seconds / HOUR_SECONDS * gpu_hour
    # Engines that share a tier hold one and the same object.
    for tier in {id(linked.tier): linked.tier for engine in engines for linked in engine.below.tiers}.values():
        price = plan.fleet.measurements.number(f"price.{tier.name}.gib_month")
        held = tier.capacity_bytes if np.isfinite(tier.capacity_bytes) else tier.peak_bytes
        cost += held / GIB * price * seconds / MONTH_SECONDS
    return 1000 * cost


def _summary(seconds: Sequence[float]) -> dict[str, float]:
    middle, late = np.percentile(seconds, [50, 95])
    return {"mean": _mean(seconds), "p50": float(middle), "p95": float(late)}


def _mean(numbers: Sequence[float]) -> float:
    return float(np.mean(numbers))


def _sweep(fields: Fields) -> tuple[str, list[float | None]]:
    name, values = fields.text("field"), fields.items("values")
    if not values or any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        raise InvalidPlan(f"{fields.where}.values: expected a list of numbers, found {values!r}")
    return name, values


def _published(policies: Sequence[str], fields: Fields) -> Published:
    values, seconds = fields.items("values"), fields.items("seconds")
    if len(values) != len(seconds):
        raise InvalidPlan(f"{fields.where}: {len(values)} values and {len(seconds)} seconds")
    for number in (*values, *seconds):
        check_number(number, f"{fields.where}: a value or seconds")
    return Published(
        fields.choice("policy", policies),
        fields.choice("figure", FIGURES),
        fields.text("source"),
        values,
        seconds,
        fields.items("fitted", []),
    )
