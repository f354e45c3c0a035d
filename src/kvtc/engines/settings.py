"""What an engine's configuration says to kvtc, and which part of the model's cache a worker holds.

All adapters take the same keys: kvtc.calibration, kvtc.store, kvtc.profile, kvtc.ratio, kvtc.step, kvtc.kl, kvtc.namespace,
kvtc.model, kvtc.identity, kvtc.check_model, kvtc.device, kvtc.threads (docs/guides/vllm.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..cache import describe_range
from ..calibration import Calibration, load_calibration
from ..errors import GeometryMismatch, InvalidArgument
from ..reference import reference_calibration

PREFIX = "kvtc."
REFERENCE = "reference"
AUTO = "auto"
PROFILE_CHOICES = (AUTO, "paper", "joint", "conditional")
RATES = ("ratio", "step", "kl")


@dataclass(frozen=True)
class EngineSettings:
    """The keys that begin with `kvtc.`, checked.

    calibration: path of the file, with `{tp_rank}` and `{pp_rank}` where every rank has its own, or `reference`. store: URL for
    `kvtc.store.open_store`. profile: `auto` is the best that the calibration serves and the engine's knowledge allows. ratio, step,
    kl: one of them, as of `kvtc.Codec`. namespace: separates what must not be shared, such as tenants. model: path or hub name of
    the model's files, `name@revision` too; the engine's by default. identity: a name for the weights, in place of their files.
    check_model: whether a calibration of another model, or of another rotation, is refused. device: where the codec computes.
    threads: coding at a time.
    """

    calibration: str
    store: str
    profile: str = AUTO
    ratio: float | None = None
    step: float | None = None
    kl: float | None = None
    namespace: str = ""
    model: str | None = None
    identity: str | None = None
    check_model: bool = True
    device: str = "cpu"
    threads: int = 1

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, needs_store: bool = True) -> EngineSettings:
        """From an engine's free-form options, of which those of others are left alone. Raises `InvalidArgument`.

        needs_store: False where the engine itself stores the streams; then there is no kvtc.store.
        """
        given = {key.removeprefix(PREFIX): value for key, value in config.items() if key.startswith(PREFIX)}
        known = [field.name for field in fields(cls) if needs_store or field.name != "store"]
        if unknown := sorted(set(given) - set(known)):
            raise InvalidArgument(
                f"unknown option {PREFIX}{unknown[0]}; expected one of {', '.join(known)} after {PREFIX}"
            )
        for name in ("calibration", "store") if needs_store else ("calibration",):
            if not isinstance(given.get(name), str) or not given[name]:
                raise InvalidArgument(f"the engine's configuration must give {PREFIX}{name}")
        settings = cls(**{"store": "", **given})
        if settings.profile not in PROFILE_CHOICES:
            raise InvalidArgument(
                f"{PREFIX}profile is {settings.profile!r}; expected one of {', '.join(PROFILE_CHOICES)}"
            )
        for name in RATES:
            value = getattr(settings, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise InvalidArgument(f"{PREFIX}{name} is {value!r}; expected a number")
        for name in ("namespace", "model", "identity"):
            value = given.get(name, "unset")
            if not isinstance(value, str) or not (value or name == "namespace"):
                raise InvalidArgument(f"{PREFIX}{name} is {value!r}; expected text")
        if not isinstance(settings.check_model, bool):
            raise InvalidArgument(f"{PREFIX}check_model is {settings.check_model!r}; expected true or false")
        if not isinstance(settings.threads, int) or settings.threads < 1:
            raise InvalidArgument(f"{PREFIX}threads is {settings.threads!r}; expected at least 1")
        return settings

    def load_calibration(self, part: CachePart) -> Calibration:
        """The calibration of one worker's part; as `read_calibration`, and `GeometryMismatch` naming what would be needed."""
        calibration, name = self.read_calibration(part.tp_rank, part.pp_rank)
        return part.checked(calibration, name)

    def read_calibration(self, tp_rank: int = 0, pp_rank: int = 0) -> tuple[Calibration, str]:
        """(calibration of a rank, its name), whatever it covers.

        Raises `FileNotFoundError`, `CorruptCalibration`, `UnsupportedVersion`, `InvalidArgument`.
        """
        if self.calibration == REFERENCE:
            return reference_calibration(), self.calibration
        try:
            path = Path(self.calibration.format(tp_rank=tp_rank, pp_rank=pp_rank))
        except (KeyError, IndexError, ValueError) as error:
            raise InvalidArgument(
                f"{PREFIX}calibration {self.calibration!r}: only {{tp_rank}} and {{pp_rank}} stand for something"
            ) from error
        return load_calibration(path), str(path)


@dataclass(frozen=True)
class CachePart:
    """The layers and key-value heads that one worker holds: all of them, or those of a tensor- or pipeline-parallel rank."""

    first_layer: int
    n_layers: int
    first_kv_head: int
    n_kv_heads: int
    head_dim: int
    tp_rank: int = 0
    pp_rank: int = 0

    @property
    def ranges(self) -> tuple[int, int, int, int, int]:
        return self.first_layer, self.n_layers, self.first_kv_head, self.n_kv_heads, self.head_dim

    def checked(self, calibration: Calibration, name: str) -> Calibration:
        """The calibration, if it covers exactly this part; `GeometryMismatch` otherwise."""
        geometry = calibration.geometry
        found = (
            geometry.first_layer,
            geometry.n_layers,
            geometry.first_kv_head,
            geometry.n_kv_heads,
            geometry.head_dim,
        )
        if found != self.ranges:
            first, layers, head, heads, _ = self.ranges
            raise GeometryMismatch(
                f"calibration {name} covers {geometry.describe()}; the worker of tensor-parallel rank {self.tp_rank} and pipeline "
                f"rank {self.pp_rank} holds {describe_range(*self.ranges)}. Make one for it with kvtc.calibrate(model, texts, "
                f"layers=({first}, {first + layers}), kv_heads=({head}, {head + heads})), and let {PREFIX}calibration name "
                "the rank: model-{tp_rank}-{pp_rank}.safetensors"
            )
        return calibration


def tensor_parallel_parts(
    n_layers: int, n_kv_heads: int, head_dim: int, tp_size: int, layer_ranges: list[tuple[int, int]] | None = None
) -> list[CachePart]:
    """The parts of all workers, pipeline ranks outermost, as engines share out key-value heads.

    n_layers, n_kv_heads: of the whole model. layer_ranges: (first, number) of each pipeline rank; None for one that has all.
    Where there are more ranks than heads, neighbouring ranks hold the same head.
    """
    if n_kv_heads % tp_size and tp_size % n_kv_heads:
        raise InvalidArgument(f"{n_kv_heads} key-value heads do not divide among {tp_size} tensor-parallel ranks")
    each = max(1, n_kv_heads // tp_size)
    parts = []
    for pp_rank, (first, number) in enumerate(layer_ranges or [(0, n_layers)]):
        for tp_rank in range(tp_size):
            head = tp_rank * n_kv_heads // tp_size
            parts.append(CachePart(first, number, head, each, head_dim, tp_rank, pp_rank))
    return parts
