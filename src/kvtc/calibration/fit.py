"""From caches to a calibration: sample rows, find the basis, measure the distortion (paper, section 1.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..cache import CacheGeometry, KVCache
from ..coding.device import usable_device
from ..coding.joint.metric import Metric
from ..coding.joint.prediction import N_TOKENS_SEEN, NO_TOKEN, reduce_embeddings, token_triples
from ..coding.paper.distortion import MAX_SAMPLE_ROWS, measure_distortion
from ..coding.transform import project, rows_of
from ..errors import InvalidArgument
from ..process.progress import note, reporting, task, track
from ..process.torch_state import neutral_torch_state, plain
from .artifact import Calibration, KindCalibration
from .joint_calibration import JointCalibration
from .joint_fit import fit_joint
from .principal import block_diagonal, principal_components
from .row_spool import FLOAT16_BYTES, RowSpool, require_disk

MAX_ROWS = 160_000
RANK_CAP = 10_000
EMBEDDING_RANK = 256
HIDDEN_FEATURES = 384
CHUNK_TOKENS = 256
"""Tokens of a chunk in `kvtc.Codec`, unless it is told otherwise."""
_TOKENS_AT_ONCE = 1024
"""Of a cache whose rows are made in float32: memory does not grow with the length of texts."""


def fit(
    geometry: CacheGeometry,
    caches: Iterable[KVCache],
    *,
    sink_tokens: int = 4,
    max_rows: int = MAX_ROWS,
    max_tokens: int | None = None,
    rank: int = RANK_CAP,
    layers_per_basis: int | None = None,
    metric: Callable[[], Metric] | None = None,
    joint_rank: int = RANK_CAP,
    token_ids: Iterable[Tensor] | None = None,
    embeddings: Tensor | None = None,
    embedding_rank: int = EMBEDDING_RANK,
    hidden_features: int = HIDDEN_FEATURES,
    spool_directory: str | Path | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    model_parameters: int | None = None,
    model_identity: str | None = None,
    progress: bool = True,
) -> Calibration:
    """Fit a calibration to an iterable of caches, each seen once.

    sink_tokens: rows at positions below this are left out, for sinks look like nothing else.
    max_rows: rows kept, on disk in 16 bits, keys and values. max_tokens: no cache is asked for once so many tokens past the sinks
    were seen, and no more rows are kept; None: max_rows. Of more, the rows are drawn uniformly from all.
    rank: most components a basis may have. layers_per_basis: bases over groups of so many layers instead of over all
    (the paper's tables 16 and 17). model_parameters: the model's size, to report the calibration's against. model_identity: as of
    `kvtc.model_identity`, for `info`.

    metric: asked for when all caches are read; with it the profile `joint` is fitted, with a basis of at most joint_rank
    components. token_ids, in step with the caches, and embeddings [vocabulary, hidden], the model's input embeddings, which are
    reduced to embedding_rank features: with them `conditional`, too. hidden_features: of its prediction; 0 for a linear one.

    device: where bases and prediction are found; tables are counted on the CPU. Rows come to it block by block, and at most
    16 P l + 36 l^2 bytes of its memory, 2 kB a row for prediction, and about 1 GB for blocks are held at once: l = 64 + the rank,
    P = p features, with `metric` 2 p. On the CPU a calibration has the same
    tensors and fingerprint every time; that of another device differs by rounding.

    Raises `InvalidArgument` where no rows or no disk are left, or the device cannot be used; `InvalidCache` and `GeometryMismatch`
    for unusable caches.
    """
    if sink_tokens < 0 or max_rows < 2 or rank < 1:
        raise InvalidArgument(f"sink_tokens {sink_tokens}, max_rows {max_rows}, rank {rank}: expected >= 0, >= 2, >= 1")
    max_tokens = max_rows if max_tokens is None else max_tokens
    if max_tokens < 2:
        raise InvalidArgument(f"max_tokens must be at least 2; got {max_tokens}")
    if layers_per_basis is not None and not 1 <= layers_per_basis <= geometry.n_layers:
        raise InvalidArgument(f"layers_per_basis must lie in 1 .. {geometry.n_layers}; got {layers_per_basis}")
    if (token_ids is None) != (embeddings is None):
        raise InvalidArgument("token_ids and embeddings go together: prediction needs both")
    place = usable_device(device)
    directory = Path(spool_directory) if spool_directory is not None else None
    p = geometry.row_features
    max_rows = min(max_rows, max_tokens)
    disk = require_disk(2 * max_rows * p * FLOAT16_BYTES, directory)
    with reporting(progress):
        note(f"calibration rows: {disk} for at most {max_rows} rows of 2 x {p} features")
    with (
        reporting(progress),
        RowSpool(p, max_rows, seed, directory, place) as keys,
        RowSpool(p, max_rows, seed, directory, place) as values,
    ):
        triples = np.full((max_rows, N_TOKENS_SEEN), NO_TOKEN, np.int64) if token_ids is not None else None
        ids = iter(token_ids) if token_ids is not None else None
        n_sequences = _spool_rows(geometry, caches, sink_tokens, keys, values, ids, triples, max_tokens)
        if keys.n_rows < 2:
            raise InvalidArgument(
                f"calibration needs at least 2 tokens past the {sink_tokens} sinks; got {keys.n_rows}"
            )
        kinds = [_fit_kind(name, spool, geometry, rank, layers_per_basis, seed)
                 for name, spool in (("key", keys), ("value", values))]  # fmt: skip

        @neutral_torch_state
        def jointly(make_metric: Callable[[], Metric]) -> JointCalibration:
            table, seen = None, None
            if embeddings is not None and triples is not None:
                table = reduce_embeddings(plain(embeddings, "embeddings"), embedding_rank, place)
                seen = torch.from_numpy(triples)
            return fit_joint(geometry, keys, values, make_metric(), joint_rank, seed, table, seen, hidden_features)

        joint = None if metric is None else jointly(metric)
        info = {
            "n_sequences": n_sequences,
            "n_tokens_seen": keys.n_offered,
            "n_rows": keys.n_rows,
            "sink_tokens": sink_tokens,
            "layers_per_basis": layers_per_basis,
            "model_parameters": model_parameters,
            "model_identity": model_identity,
            "seed": seed,
        }
    return Calibration(geometry, kinds[0], kinds[1], info, joint)


def _spool_rows(
    geometry: CacheGeometry,
    caches: Iterable[KVCache],
    sink_tokens: int,
    keys: RowSpool,
    values: RowSpool,
    token_ids: Iterator[Tensor] | None,
    triples: npt.NDArray[np.int64] | None,
    max_tokens: int,
) -> int:
    """Keep a sample of the rows of the first max_tokens tokens; `triples` gets what prediction sees of each kept row."""
    n_sequences = 0
    # The caches and ids come from the caller's code, which runs in the caller's torch state.
    for cache in _counted(caches, max_tokens):
        cache.validate()
        geometry.check(cache)
        ids = _ids_of(cache, token_ids) if token_ids is not None else None
        n_sequences += _spool_cache(geometry, cache.plain(), sink_tokens, keys, values, ids, triples)
        if keys.n_offered >= max_tokens:
            break
    return n_sequences


@neutral_torch_state
def _spool_cache(
    geometry: CacheGeometry,
    cache: KVCache,
    sink_tokens: int,
    keys: RowSpool,
    values: RowSpool,
    ids: Tensor | None,
    triples: npt.NDArray[np.int64] | None,
) -> bool:
    """Whether a cache has tokens past the sinks, whose rows are offered to the spools."""
    positions = cache.resolved_positions()
    body = (positions >= sink_tokens).to(cache.keys.device)
    if not bool(body.any()):
        return False
    # Predecessors end where a chunk begins, as often as they will when caches are coded.
    seen = None
    if ids is not None:
        seen = token_triples(np.asarray(ids, dtype=np.int64), positions.numpy(), CHUNK_TOKENS).numpy()
    for start in range(0, cache.n_tokens, _TOKENS_AT_ONCE):
        part = slice(start, start + _TOKENS_AT_ONCE)
        here = body[part]
        unrotated = geometry.rope.unrotate(cache.keys[:, :, part], positions[part], cache.resolved_rope_length())
        slots = keys.append(rows_of(unrotated)[here])
        values.append(rows_of(cache.values[:, :, part])[here], slots)
        if seen is not None and triples is not None:
            kept = slots >= 0
            # A slot may be drawn twice in one part: the later row stays, here as in the spool.
            triples[slots[kept]] = seen[part][here.cpu().numpy()][kept]
    return True


def _ids_of(cache: KVCache, token_ids: Iterator[Tensor]) -> Tensor:
    """The next ids, [T] of this cache."""
    ids = next(token_ids, None)
    found = "none" if ids is None else len(ids)
    if ids is None or found != cache.n_tokens:
        raise InvalidArgument(
            f"token_ids must go with the caches: one has {cache.n_tokens} tokens, its ids are {found}"
        )
    return ids


@neutral_torch_state
def _fit_kind(
    name: str,
    spool: RowSpool,
    geometry: CacheGeometry,
    rank: int,
    layers_per_basis: int | None,
    seed: int,
) -> KindCalibration:
    group = layers_per_basis or geometry.n_layers
    layer_features = geometry.row_features // geometry.n_layers
    ranges = [
        slice(start * layer_features, min(start + group, geometry.n_layers) * layer_features)
        for start in range(0, geometry.n_layers, group)
    ]
    told = ranges if len(ranges) == 1 else track(ranges, f"{name} bases", "groups of layers")
    parts = [principal_components(spool, rank, columns, seed, f"{name} basis") for columns in told]
    components = parts[0] if len(parts) == 1 else block_diagonal(parts, rank)
    mean, vectors = components.basis.matrices(spool.device)
    blocks = track(spool.sample(MAX_SAMPLE_ROWS, seed), f"{name} distortion", "blocks")
    table = measure_distortion(project(block, mean, vectors).cpu().numpy() for block in blocks)
    return KindCalibration(components.basis, table, components.total_variance)


def _counted(caches: Iterable[KVCache], max_tokens: int) -> Iterator[KVCache]:
    """The caches, their tokens told."""
    with task("reading text", max_tokens, "tokens at most") as advance:
        for cache in caches:
            yield cache
            advance(cache.n_tokens)
