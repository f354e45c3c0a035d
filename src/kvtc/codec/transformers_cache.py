"""Caches of transformers as groups and back: what goes into the codec comes out of it.

The model library is imported only to build a cache of its kind; reading one needs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..cache import CacheExtent, CacheGeometry, KVCache, sides_of_layer
from ..calibration.artifact import covers
from ..container.groups import NO_CACHE, SIDE_BUFFER, STATE, Group, Part
from ..container.tables import Header
from ..errors import GeometryMismatch, InvalidCache, MissingDependency, UnsupportedModel
from ..process.torch_state import neutral_torch_state
from .exact_groups import ExactGroup
from .layer_parts import (
    LayerPart,
    cache_of_parts,
    check_static_windows,
    grouped,
    lightning_parts,
    parts_of,
    sequence_of,
)
from .layer_queue import Layer, LayerQueue

EMPTY_DTYPE = torch.bfloat16


Snapshots = Mapping[int, Sequence[ExactGroup]]
"""By position, ascending: the groups that are not complete, as they were after so many tokens."""


@dataclass(frozen=True)
class SplitCache:
    """A cache of one sequence as the group that a profile codes, if there is one, and all others.

    n_tokens: that it has read; None where it does not say, as one of states alone. points: those before its end at which it can be
    resumed. start: the position of its first token, before which its exact groups may hold rows, too.
    """

    coded: KVCache | None
    exact: list[ExactGroup]
    n_tokens: int | None
    points: Snapshots = field(default_factory=dict)
    start: int = 0

    @property
    def partial(self) -> list[ExactGroup]:
        """The groups that are not complete."""
        return [one for one in self.exact if not one.group.is_complete]

    def span(self, start: int, stop: int) -> SplitCache:
        """The complete groups of a cache that begins at position 0, at the positions start .. stop - 1."""
        coded = None if self.coded is None else self.coded.span(start, stop)
        complete = [one for one in self.exact if one.group.is_complete]
        return SplitCache(coded, complete, stop - start, start=start)

    @property
    def keeps_tokens(self) -> bool:
        """Whether any group keeps every token, so that chunks hold something."""
        return self.coded is not None or any(one.group.is_complete and one.group.row_numbers for one in self.exact)

    def snapshots(self, end: int) -> list[dict[int, ExactGroup]]:
        """Of each exact group what it was at every point, and at the end."""
        place = {one.group: index for index, one in enumerate(self.partial)}
        return [
            {position: its[place[one.group]] for position, its in self.points.items() if one.group in place}
            | {end: one}
            for one in self.exact
        ]


class TransformersCache:
    """A transformers cache taken apart, all sequences of its batch.

    Raises `UnsupportedModel` for a kind of layer that kvtc does not know, `InvalidCache` for layers that do not fit each other.
    """

    def __init__(self, cache: Any) -> None:
        check_static_windows(cache.layers)
        self._parts: list[LayerPart] = [
            part for index, layer in enumerate(cache.layers) for part in parts_of(layer, index)
        ]
        self._parts += lightning_parts(cache)
        filled = [part for part in self._parts if part.sides]
        lengths = {part.n_tokens for part in filled if part.n_tokens is not None}
        batches = {part.sides[0].shape[0] for part in filled}
        if len(lengths) > 1 or len(batches) > 1:
            raise InvalidCache(
                f"layers have read {sorted(lengths)} tokens of {sorted(batches)} sequences; expected one number of each"
            )
        self.n_sequences = batches.pop() if batches else 1
        self.n_tokens = lengths.pop() if lengths else None
        if not filled:
            self._parts, self.n_tokens = [], 0
            special = [type(layer).__name__ for layer in cache.layers if type(layer).__name__ != "DynamicLayer"]
            if special:
                raise InvalidCache(
                    f"the cache holds no tokens yet; one with layers of {special[0]} can be coded after its first"
                )

    @property
    def groups(self) -> list[Group]:
        """Its groups, in the order of the group table of a lossless stream: the first that can be coded, and then all others."""
        found = [one.group for one in grouped([(part.group, part.sides) for part in self._parts])]
        return sorted(found, key=lambda group: group is not next((one for one in found if one.is_codable), None))

    @neutral_torch_state
    def split(self, covered: Sequence[CacheGeometry], batch_index: int = 0, first_token: int = 0) -> SplitCache:
        """One sequence.

        Parameters:
            covered: of the groups that are coded, which must be there; none: the first of full attention is the coded one.
            batch_index: which sequence.
            first_token: how many tokens of padding stand before it.

        Raises:
            GeometryMismatch: if a group that is covered is not there, or the first of full attention is not covered.
        """
        first = next((geometry for geometry in covered if not geometry.is_window), None)
        if not self._parts:
            return SplitCache(None if first is None else _empty(first), [], 0)
        found = self._grouped(self._parts, batch_index, first_token)
        codable = [one for one in found if one.group.is_codable]
        coded = next((one for one in codable if first is None or covers(first, one.group)), None)
        missing = [geometry for geometry in covered if not any(covers(geometry, one.group) for one in found)]
        if missing or (covered and first is None and coded is not None):
            held = "; ".join(f"{one.group.describe()}: {_extent(one.group)}" for one in found)
            expected = "; ".join(geometry.describe() for geometry in covered)
            raise GeometryMismatch(f"the calibration covers {expected}; the cache holds {held}")
        exact = [one for one in found if one is not coded]
        tokens = None if self.n_tokens is None else self.n_tokens - first_token
        return SplitCache(None if coded is None else _neutral(coded), exact, tokens)

    def partial_groups(self) -> list[ExactGroup]:
        """The groups of the first sequence that are not complete: windows and states."""
        return self._grouped([part for part in self._parts if not part.group.is_complete], 0, 0)

    def _grouped(self, parts: Sequence[LayerPart], batch_index: int, first_token: int) -> list[ExactGroup]:
        n_tokens = self.n_tokens or 0
        return grouped([(part.group, sequence_of(part, batch_index, first_token, n_tokens)) for part in parts])


def is_transformers_cache(cache: object) -> bool:
    """Whether an object looks like a transformers cache (a list of layers that hold keys and values)."""
    return isinstance(getattr(cache, "layers", None), list)


def from_transformers(cache: Any, geometry: CacheGeometry) -> KVCache:
    """A `DynamicCache` of one sequence, of full-attention layers alone -> `KVCache`.

    Raises `UnsupportedModel` for other layers, and as `TransformersCache`.
    """
    found = TransformersCache(cache)
    if found.n_sequences != 1:
        raise InvalidCache(f"the cache holds {found.n_sequences} sequences; expected one")
    split = found.split([geometry])
    if split.exact or split.coded is None:
        others = ", ".join(sorted({one.group.describe() for one in split.exact}))
        raise UnsupportedModel(
            f"layers of other groups ({others}) beside full attention; expected full attention alone"
        )
    return split.coded


def _extent(group: Group) -> str:
    return CacheExtent(group.layers, group.first_kv_head, *group.shape).describe()


def _empty(geometry: CacheGeometry) -> KVCache:
    keys, values = (torch.empty(shape, dtype=EMPTY_DTYPE) for shape in geometry.side_shapes(0))
    return KVCache(keys, values, layers=geometry.layers, first_kv_head=geometry.first_kv_head)


def _neutral(coded: ExactGroup) -> KVCache:
    # Layers may lie on several devices.
    device = coded.sides[0][0].device
    keys, values = (torch.stack([its[side].to(device) for its in coded.sides]) for side in (0, 1))
    return KVCache(keys, values, layers=coded.group.layers, first_kv_head=coded.group.first_kv_head)


@neutral_torch_state
def as_transformers(cache: KVCache) -> Any:
    """A `DynamicCache` of one sequence."""
    return to_transformers(cache.keys[None], cache.values[None], cache.resolved_layers())


@neutral_torch_state
def to_transformers(keys: Tensor, values: Tensor, layers: Iterable[int]) -> Any:
    """keys, values [B, L, H, T, D] -> a `DynamicCache` that `generate` continues from, its layers at their places."""
    cache = new_transformers_cache()
    for index, layer in enumerate(layers):
        cache.update(*sides_of_layer(keys[:, index], values[:, index]), layer)
    return cache


@neutral_torch_state
def grouped_cache(
    header: Header,
    coded: Sequence[tuple[Tensor, Tensor]] | None,
    sequences: Sequence[Sequence[ExactGroup]],
    lengths: Sequence[int],
    device: torch.device,
) -> Any:
    """A transformers cache of sequences with equal groups, padded on the left.

    Parameters:
        header: of any of their streams.
        coded: keys and values [B, H, T, D] of each layer of the group that is coded; None: no group is.
        sequences: the exact groups of each.
        lengths: tokens of each.
        device: of the tensors.

    Raises:
        UnsupportedModel: for sequences of several lengths, of a model that pools its tokens.
        MissingDependency: without transformers.
    """
    parts = []
    if coded is not None:
        parts.append(ExactGroup(header.groups[0], list(coded)))
    for members in zip(*sequences, strict=True):
        group = members[0].group
        if len(set(lengths)) > 1 and group.kind == SIDE_BUFFER and group.extent > 1:
            raise UnsupportedModel(
                "this model pools its tokens, and padding with them: decode its sequences one by one"
            )
        layers = [
            tuple(_stacked(same, group, device) for same in zip(*its, strict=True))
            for its in zip(*(member.sides for member in members), strict=True)
        ]
        parts.append(ExactGroup(group, layers))
    return cache_of_parts(parts, max(lengths))


@neutral_torch_state
def from_split(split: SplitCache, device: torch.device) -> Any:
    """A transformers cache of one sequence; raises as `cache_of_parts`."""
    parts = [
        ExactGroup(one.group, [tuple(side[None].to(device) for side in its) for its in one.sides])
        for one in split.exact
    ]
    if (coded := split.coded) is not None:
        extent = coded.extent
        shape = extent.n_kv_heads, *extent.dims
        group = Group(extent.kind, Part.KEYS_AND_VALUES, coded.dtype, extent.layers, shape)
        layers = zip(coded.keys, coded.values, strict=True)
        parts.append(ExactGroup(group, [(keys[None], values[None]) for keys, values in layers]))
    return cache_of_parts(parts, split.start + (split.n_tokens or 0))


def _stacked(sides: Sequence[Tensor], group: Group, device: torch.device) -> Tensor:
    """[B, ...] of one side of each sequence, rows padded on the left."""
    if group.kind in (STATE, NO_CACHE):
        return torch.stack(list(sides)).to(device)
    most = max(side.shape[1] for side in sides)
    padded = [torch.nn.functional.pad(side.view(_integers(side)), (0, 0, most - side.shape[1], 0)) for side in sides]
    return torch.stack(padded).view(sides[0].dtype).to(device)


def _integers(side: Tensor) -> torch.dtype:
    """Integers as wide as the numbers of a tensor: not every operation takes every float."""
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32}[side.itemsize]


def lazy_cache(restore: Callable[[int], Layer], n_tokens: int, header: Header, device: torch.device) -> Any:
    """A `DynamicCache` of n_tokens tokens whose layers are restored when they are first looked at; raises `MissingDependency`.

    restore: index of a layer -> its keys and values [H, T, D] on the device.
    """
    cache = new_transformers_cache()
    from .lazy_layers import LazyLayer

    queue = LayerQueue(lambda index: sides_of_layer(*restore(index)), header.n_layers, device)
    cache.layers += [cache.layer_class_to_replicate() for _ in range(header.layers[-1] + 1)]
    for index, layer in enumerate(header.layers):
        cache.layers[layer] = LazyLayer(queue, index, n_tokens, header.dtype, device)
    return cache


def new_transformers_cache() -> Any:
    """An empty `DynamicCache`; raises `MissingDependency`."""
    try:
        from transformers import DynamicCache
    except ImportError as error:
        raise MissingDependency('a transformers cache needs transformers; pip install "kvtc[hf]"') from error
    return DynamicCache()
