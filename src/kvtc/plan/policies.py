"""The four things that can be done with a cache between turns, each as engines that a simulation
can run.

recompute      nothing is kept; every prompt is prefilled from its first token hold           what
fits into GPU memory stays there offload raw    as hold, and a copy goes to the tiers below as it is
offload CODEC  as hold, and an encoded copy goes to the tiers below
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..errors import InvalidPlan
from .engine import Engine, Limits, Speeds
from .events import GPU, Clock, Request
from .fields import Fields
from .measurements import Measurements
from .model import PlannedModel
from .simulation import EngineMaker
from .storage import Hierarchy, Link, LinkedTier, StoredBytes, Tier, stored_encoded, stored_raw


@dataclass(frozen=True)
class EnginePlan:
    """Engines of one kind. memory_bytes: of one GPU; usable_share: of it for weights and caches."""

    n_engines: int
    n_gpus: int
    memory_bytes: float
    usable_share: float
    weight_bits: float
    limits: Limits

    @classmethod
    def read(cls, fields: Fields) -> EnginePlan:
        """The field `engine` of a plan."""
        return cls(
            fields.whole("engines", 1),
            fields.whole("gpus"),
            fields.number("gpu_memory_bytes"),
            fields.number("usable_share"),
            fields.number("weight_bits"),
            Limits(
                fields.whole("max_running", None),
                fields.whole("max_admitted", None),
                fields.truth("blocking_loads", True),
            ),
        )

    def cache_bytes(self, model: PlannedModel) -> float:
        """GPU memory of one engine that the weights leave for caches."""
        left = self.n_gpus * self.memory_bytes * self.usable_share - model.n_parameters * self.weight_bits / 8
        if left <= 0:
            raise InvalidPlan(
                f"the weights of {model.name} at {self.weight_bits:g} bits do not fit into {self.n_gpus} GPUs of "
                f"{self.memory_bytes:,.0f} bytes at a usable share of {self.usable_share:g}"
            )
        return left


@dataclass(frozen=True)
class TierPlan:
    """A tier below the GPU. `capacity_bytes` is that of each engine's tier, or of the shared one;
    infinite without a limit.
    """

    name: str
    capacity_bytes: float
    shared: bool

    @classmethod
    def read(cls, fields: Fields) -> TierPlan:
        """One entry of the field `tiers` of a plan."""
        share = fields.number("usable_share", 1.0)
        tier = cls(fields.text("name"), fields.number("bytes", math.inf) * share, fields.truth("shared", False))
        if tier.name == GPU:
            raise InvalidPlan(f"{fields.where}: {GPU} is the GPU's own memory; give the tier another name")
        return tier


@dataclass(frozen=True)
class CodecPlan:
    """A codec that may encode caches for the tiers.

    Parameters:
        name: its name in the measurement file.
        rank: the rank of its calibration.
        exact_tokens: tokens of sinks and window, which are kept exactly.
    """

    name: str
    rank: int
    exact_tokens: int

    @classmethod
    def read(cls, fields: Fields) -> CodecPlan:
        """One entry of the field `codecs` of a plan."""
        return cls(fields.text("name"), fields.whole("rank"), fields.whole("exact_tokens", low=0))


@dataclass(frozen=True)
class Policy:
    """What is done with caches: kept in GPU memory or not, copied to tiers or not, encoded or not."""

    name: str
    keeps: bool
    offloads: bool
    codec: CodecPlan | None = None

    def stored_bytes(self, model: PlannedModel, measurements: Measurements) -> StoredBytes:
        """Tokens -> bytes in the tiers below the GPU."""
        if self.codec is None:
            return stored_raw(model.bytes_per_token)
        ratio = measurements.number(f"codec.{self.codec.name}.body_ratio")
        return stored_encoded(model.bytes_per_token, ratio, self.codec.exact_tokens)


def policies_of(codecs: Sequence[CodecPlan]) -> list[Policy]:
    """All policies of a plan; one of the last kind for each codec."""
    plain = [Policy("recompute", False, False), Policy("hold", True, False), Policy("offload raw", True, True)]
    return plain + [Policy(f"offload {codec.name}", True, True, codec) for codec in codecs]


@dataclass(frozen=True)
class Fleet:
    """What a simulation needs to build the engines of a policy."""

    model: PlannedModel
    engine: EnginePlan
    tiers: Sequence[TierPlan]
    measurements: Measurements

    def speeds(self, policy: Policy) -> Speeds:
        """From the measurement file; `MissingMeasurement` where it lacks one."""
        number = self.measurements.number
        speeds = Speeds(
            self.measurements.points("engine.prefill_seconds"),
            number("engine.decode_step_seconds"),
            number("engine.decode_seconds_per_context_token"),
            number("engine.request_seconds"),
            self.model.bytes_per_token,
        )
        if policy.codec is None:
            return speeds
        codec = f"codec.{policy.codec.name}"
        return replace(
            speeds,
            encode_bytes_per_second=number(f"{codec}.encode_bytes_per_second"),
            decode_bytes_per_second=number(f"{codec}.decode_bytes_per_second"),
        )

    def link(self, tier: TierPlan, direction: str) -> Link:
        """One direction of the way to a tier, unused so far."""
        number = self.measurements.number
        return Link(
            number(f"tier.{tier.name}.{direction}_bytes_per_second"), number(f"tier.{tier.name}.access_seconds")
        )

    def engines(self, policy: Policy) -> EngineMaker:
        """A builder of the engines, their caches empty."""
        speeds, capacity = self.speeds(policy), self.engine.cache_bytes(self.model)
        stored = policy.stored_bytes(self.model, self.measurements)

        def linked(tier: TierPlan) -> LinkedTier:
            empty = Tier(tier.name, tier.capacity_bytes, stored)
            return LinkedTier(empty, self.link(tier, "read"), self.link(tier, "write"))

        def build(clock: Clock, answered: Callable[[Request], None]) -> list[Engine]:
            shared = {tier.name: linked(tier) for tier in self.tiers if tier.shared}
            engines = []
            for _ in range(self.engine.n_engines):
                below = [shared.get(tier.name) or linked(tier) for tier in self.tiers] if policy.offloads else []
                gpu = Tier(GPU, capacity, stored_raw(self.model.bytes_per_token))
                engines.append(Engine(clock, speeds, self.engine.limits, gpu, Hierarchy(below), policy.keeps, answered))
            return engines

        return build
