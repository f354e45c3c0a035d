"""How the groups of layers of a worker are coded: what the calibration covers by it, all else without loss.

Imports no engine. The scheduler names entries by what the workers code them with, so both ask here.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from ...cache import CacheExtent, CacheGeometry
from ...calibration import Calibration
from ...container.groups import LATENT
from ...errors import GeometryMismatch
from ...key_digest import digest
from ...process.log_limits import log_once
from ..served_model import ServedModel
from ..settings import CacheShard, EngineSettings
from ..windowless_codec import CHUNK_TOKENS, WindowlessCodec
from .facts import EngineFacts
from .page_groups import PageGroup

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GroupCodec:
    """A group of layers of a worker and its codec.

    Parameters:
        group: The layers.
        extent: Of their keys and values, or latents that are coded; None: pages hold something else.
        codec: Lossless where the calibration does not cover them.
        names: What keys of entries say of all this.
    """

    group: PageGroup
    extent: CacheExtent | None
    codec: WindowlessCodec
    names: tuple[bytes, bytes]


def worker_codecs(
    facts: EngineFacts, worker: int, settings: EngineSettings, model: ServedModel | None = None
) -> list[GroupCodec]:
    """The groups of a worker.

    Parameters:
        facts: Of the engine.
        worker: Global rank of the worker.
        settings: The options of kvtc.
        model: The model that is served, which the calibration must suit; None: that was seen to.

    Returns:
        The same groups in the same order for every worker.

    Raises:
        GeometryMismatch: The calibration covers layers or heads that the worker does not hold.
        KvtcError, FileNotFoundError: As `EngineSettings.read_calibration` and `ServedModel.checked`.
    """
    held = list(zip(facts.groups, facts.shards[worker], strict=True))
    found: list[tuple[PageGroup, CacheShard, Calibration | None]] = []
    if not settings.lossless:
        shard = facts.shards[worker][0]
        calibration, name = settings.read_calibration(shard.tp_rank, shard.pp_rank)
        if model is not None:
            model.checked(calibration, name)
        taken = {number: _taken(calibration, number, name, held) for number in range(_n_coded(calibration, settings))}
        found = [(*its, calibration.of_group(number)) for number, its in taken.items() if its is not None]
    found += [(group, shard, None) for group, shard in held]
    return [_group_codec(facts, group, shard, calibration, settings) for group, shard, calibration in found]


def _n_coded(calibration: Calibration, settings: EngineSettings) -> int:
    """How many groups of a calibration are coded: `paper` codes the first one alone."""
    return 1 if calibration.joint is None or settings.profile == "paper" else len(calibration.groups)


def _taken(
    calibration: Calibration, number: int, name: str, held: list[tuple[PageGroup, CacheShard]]
) -> tuple[PageGroup, CacheShard] | None:
    """The layers that a group of the calibration covers, which are taken out of `held`; None where the engine keeps something
    else than keys and values in all of them."""
    geometry = calibration.geometry_of(number)
    at = next((at for at, (group, shard) in enumerate(held) if _covers(geometry, group, shard)), None)
    if at is None and any(not group.is_plain and set(geometry.layers) <= set(group.layers) for group, _ in held):
        return None
    if at is None:
        # Most likely the layers of another rank, or of another model: what the message says of one group is of use.
        for _, shard in held:
            shard.checked(calibration.of_group(number), name)
        raise GeometryMismatch(f"calibration {name} covers {geometry.describe()}, which the engine does not keep")
    group, shard = held.pop(at)
    if rest := [layer for layer in group.layers if layer not in geometry.layers]:
        held.insert(at, (group.of_layers(rest), replace(shard, layers=tuple(rest))))
    return group.of_layers(geometry.layers), replace(shard, layers=geometry.layers)


def _covers(geometry: CacheGeometry, group: PageGroup, shard: CacheShard) -> bool:
    """Whether a worker holds the layers of a geometry, with the same heads, as keys and values."""
    if geometry.kind == LATENT:
        return group.latent_width == sum(geometry.dims) and set(geometry.layers) <= set(group.layers)
    heads = shard.first_kv_head, shard.n_kv_heads, *shard.dims
    return (
        group.is_plain
        and set(geometry.layers) <= set(shard.layers)
        and heads == (geometry.first_kv_head, geometry.n_kv_heads, *geometry.dims)
    )


def _group_codec(
    facts: EngineFacts, group: PageGroup, shard: CacheShard, calibration: Calibration | None, settings: EngineSettings
) -> GroupCodec:
    extent = shard.extent if group.is_plain else None
    if calibration is not None and group.latent_width:
        extent = calibration.geometry.extent
    codec = WindowlessCodec(calibration, settings, extent)
    if calibration is None and not settings.lossless:
        log_once(logger, group.kind, "%s: kept without loss, for the calibration does not cover them", group.kind)
    owner, how = codec.names
    if extent is None:
        owner = digest(
            "pages of an engine",
            layers=list(group.layer_names),
            part=shard.first_kv_head,
            page_tokens=group.page_tokens,
            version=facts.version,
        )
    if kept := group.first_kept(0, CHUNK_TOKENS):
        owner = digest("window", owner=owner, first_kept=kept)
    return GroupCodec(group, extent, codec, (owner, how))
