"""What an engine's configuration says to kvtc, and which shard of the model's cache a worker holds.

The options of all engines are those of `EngineSettings`, each written `kvtc.NAME`;
docs/guides/vllm.md has them as a table. An adapter that needs more has a subclass with more fields.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Self

from ..cache import CacheExtent
from ..calibration import Calibration, load_calibration
from ..errors import GeometryMismatch, InvalidArgument
from ..reference import reference_calibration

PREFIX = "kvtc."
OF_STORES = ("store", "metrics_file")
"""Options that there are only where kvtc has a store."""
REFERENCE = "reference"
AUTO = "auto"


def option(expected: str, accepts: Callable[[Any], bool]) -> dict[str, Any]:
    """The metadata of an option's field: which values it takes, in words and as a test."""
    return {"expected": expected, "accepts": accepts}


def one_of(*choices: str) -> dict[str, Any]:
    """The metadata of an option that takes one of some words."""
    return option(f"one of {', '.join(choices)}", lambda value: value in choices)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


TEXT = option("text", lambda value: isinstance(value, str) and value != "")
NUMBER = option("a number", lambda value: _is_integer(value) or isinstance(value, float))
AT_LEAST_ONE = option("at least 1", lambda value: _is_integer(value) and value >= 1)
AT_LEAST_ZERO = option("at least 0", lambda value: _is_integer(value) and value >= 0)
FLAG = option("true or false", lambda value: isinstance(value, bool))


@dataclass(frozen=True)
class EngineSettings:
    """The options of an engine's configuration that begin with `kvtc.`.

    Parameters:
        calibration: Path of the calibration file, in which `{tp_rank}` and `{pp_rank}` stand
            for the ranks of a worker; or `reference`, the calibration of the model that ships
            with kvtc. None: there is none, and all is lossless.
        store: URL for `kvtc.store.open_store`.
        profile: `paper`, `joint`, or `auto` (default): `joint` if the calibration serves it.
            (`conditional` recomputes layers of the model, which a worker's store does not have
            at hand.)
        ratio, step, kl: At most one of them, as of `kvtc.Codec`; none (default): the codec's
            default ratio.
        lossless: In place of a rate: what is loaded equals what was saved, bit for bit, for
            pages of any kind. It needs no calibration. Default False.
        namespace: Separates what must not be shared, such as the caches of tenants; default "".
        model: Path of the model's files, or its name on the hub, `name@revision` too. None
            (default): as the engine was given it.
        identity: A name for the weights that stands for the digest of their files; None
            (default): the digest.
        check_model: Whether a calibration of another model, or of another rotation, is refused;
            default True.
        device: Where the codec computes; default "cpu".
        threads: Tasks of coding at a time; default 1.

    Example:
        >>> from kvtc.engines.settings import EngineSettings
        >>> options = {"kvtc.calibration": "reference", "kvtc.store": "memory:", "kvtc.ratio": 32}
        >>> settings = EngineSettings.from_config(options)
        >>> settings.ratio, settings.profile, settings.read_calibration()[0].profiles
        (32, 'auto', ('paper', 'joint', 'conditional'))
        >>> exact = EngineSettings.from_config({"kvtc.lossless": True, "kvtc.store": "memory:"})
        >>> exact.lossless, exact.calibration
        (True, None)
        >>> EngineSettings.from_config({"kvtc.calibration": "reference"})
        Traceback (most recent call last):
        kvtc.errors.InvalidArgument: the engine's configuration must give kvtc.store
    """

    calibration: str | None = field(metadata=TEXT)
    store: str = field(metadata=TEXT)
    profile: str = field(default=AUTO, metadata=one_of(AUTO, "paper", "joint"))
    ratio: float | None = field(default=None, metadata=NUMBER)
    step: float | None = field(default=None, metadata=NUMBER)
    kl: float | None = field(default=None, metadata=NUMBER)
    lossless: bool = field(default=False, metadata=FLAG)
    namespace: str = field(default="", metadata=option("text", lambda value: isinstance(value, str)))
    model: str | None = field(default=None, metadata=TEXT)
    identity: str | None = field(default=None, metadata=TEXT)
    check_model: bool = field(default=True, metadata=FLAG)
    device: str = field(default="cpu", metadata=TEXT)
    threads: int = field(default=1, metadata=AT_LEAST_ONE)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, needs_store: bool = True) -> Self:
        """The settings that an engine's configuration gives.

        Parameters:
            config: Options of the engine by name; those that do not begin with `kvtc.` are left to
                others.
            needs_store: False where the engine itself stores the streams: there are no options of
                stores then.

        Returns:
            The settings.

        Raises:
            InvalidArgument: An option is unknown, missing or of a value that it does not take.
        """
        given = {key.removeprefix(PREFIX): value for key, value in config.items() if key.startswith(PREFIX)}
        known = {known.name: known for known in fields(cls) if needs_store or known.name not in OF_STORES}
        if unknown := sorted(given.keys() - known.keys()):
            raise InvalidArgument(
                f"unknown option {PREFIX}{unknown[0]}; expected one of {', '.join(known)} after {PREFIX}"
            )
        if given.get("lossless") is True:
            given.setdefault("calibration", None)
        for name, known_option in known.items():
            value = given.get(name, known_option.default)
            if value is MISSING:
                more = f", or {PREFIX}lossless" if name == "calibration" else ""
                raise InvalidArgument(f"the engine's configuration must give {PREFIX}{name}{more}")
            is_left_out = value is None and (known_option.default is None or name == "calibration")
            if not is_left_out and not known_option.metadata["accepts"](value):
                raise InvalidArgument(f"{PREFIX}{name} is {value!r}; expected {known_option.metadata['expected']}")
        return cls(**{"store": "", **given})

    def read_calibration(self, tp_rank: int = 0, pp_rank: int = 0) -> tuple[Calibration, str]:
        """The calibration of a worker, whatever layers and heads it covers.

        Parameters:
            tp_rank: The worker's tensor-parallel rank; default 0.
            pp_rank: Its pipeline-parallel rank; default 0.

        Returns:
            (the calibration, its name in messages).

        Raises:
            FileNotFoundError: There is no such file.
            CorruptCalibration, UnsupportedVersion: The file cannot be read.
            InvalidArgument: `calibration` has other names in braces than those of the two
                ranks.
        """
        if self.calibration is None:
            raise InvalidArgument(f"the engine's configuration must give {PREFIX}calibration")
        if self.calibration == REFERENCE:
            return reference_calibration(), self.calibration
        path = of_rank("calibration", self.calibration, tp_rank, pp_rank)
        return load_calibration(path), path


@dataclass(frozen=True)
class CacheShard(CacheExtent):
    """The layers and key-value heads that one worker holds.

    Parameters:
        layers: The layers of the model that the worker's pipeline-parallel rank computes.
        first_kv_head, n_kv_heads: The key-value heads of its tensor-parallel rank.
        key_dim, value_dim: Features of a head.
        tp_rank, pp_rank: The ranks.
    """

    tp_rank: int = 0
    pp_rank: int = 0

    def checked(self, calibration: Calibration, name: str) -> Calibration:
        """The calibration, if it covers exactly this shard.

        Parameters:
            calibration: Of any layers and heads.
            name: Of the calibration, for messages.

        Returns:
            The calibration.

        Raises:
            GeometryMismatch: It covers other layers or heads; the message says how to make the one
                that is needed.

        Example:
            >>> from kvtc.engines.settings import EngineSettings, worker_shards
            >>> found, name = EngineSettings(calibration="reference", store="memory:").read_calibration()
            >>> (shard,) = worker_shards(n_layers=12, n_kv_heads=3, head_dim=32, tp_size=1)
            >>> shard.checked(found, name).geometry.n_layers
            12
        """
        geometry = calibration.geometry
        if geometry.extent != self.extent:
            layers = self.layers[0], self.layers[-1] + 1
            heads = self.first_kv_head, self.first_kv_head + self.n_kv_heads
            raise GeometryMismatch(
                f"calibration {name} covers {geometry.describe()}; the worker of tensor-parallel rank {self.tp_rank} and pipeline "
                f"rank {self.pp_rank} holds {self.describe()}. Make one for it with kvtc.calibrate(model, texts, "
                f"layers={layers}, kv_heads={heads}), and let {PREFIX}calibration name "
                "the rank: model-{tp_rank}-{pp_rank}.safetensors"
            )
        return calibration


def of_rank(option: str, path: str, tp_rank: int, pp_rank: int) -> str:
    """A path with the ranks of a worker in place of {tp_rank} and {pp_rank}; `InvalidArgument` for other braces."""
    try:
        return path.format(tp_rank=tp_rank, pp_rank=pp_rank)
    except (KeyError, IndexError, ValueError) as error:
        raise InvalidArgument(
            f"{PREFIX}{option} {path!r}: only {{tp_rank}} and {{pp_rank}} stand for something"
        ) from error


def worker_shards(
    n_layers: int, n_kv_heads: int, head_dim: int, tp_size: int, layer_ranges: list[tuple[int, int]] | None = None
) -> list[CacheShard]:
    """The shards of all workers, by global rank: the tensor-parallel ranks of the first pipeline
    rank come first.

    Parameters:
        n_layers, n_kv_heads: Of the whole model.
        head_dim: Features of a head.
        tp_size: Number of tensor-parallel ranks. If it exceeds `n_kv_heads`, neighbouring ranks
            hold the same head.
        layer_ranges: (first layer, number of layers) of each pipeline rank. None (default): one
            rank has all layers.

    Returns:
        One shard for each worker.

    Raises:
        InvalidArgument: The heads do not divide among the ranks.

    Example:
        >>> from kvtc.engines.settings import worker_shards
        >>> [shard.first_kv_head for shard in worker_shards(12, n_kv_heads=4, head_dim=32, tp_size=2)]
        [0, 2]
    """
    if n_kv_heads % tp_size and tp_size % n_kv_heads:
        raise InvalidArgument(f"{n_kv_heads} key-value heads do not divide among {tp_size} tensor-parallel ranks")
    each = max(1, n_kv_heads // tp_size)
    shards = []
    for pp_rank, (first, number) in enumerate(layer_ranges or [(0, n_layers)]):
        for tp_rank in range(tp_size):
            head = tp_rank * n_kv_heads // tp_size
            shards.append(
                CacheShard(tuple(range(first, first + number)), head, each, head_dim, head_dim, tp_rank, pp_rank)
            )
    return shards
