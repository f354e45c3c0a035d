"""What kvtc's three ways into LMCache have in common: options, a worker's coder, and where chunks
stand. Imports no LMCache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import torch

from ...calibration import Calibration
from ...errors import UnsupportedLayout
from ...huggingface.model_files import UnknownModel
from ...key_digest import Part
from ...process.locks import ForkSafeLock
from ..chunk_coder import ChunkCoder, ChunkSettings, FixedChunkCoder
from ..opaque_layout import rows_layout
from ..page_layout import PACKINGS, SPLIT, PageLayout, lmcache_layout
from ..position_search import KnownStarts
from ..served_model import ServedModel
from ..settings import AT_LEAST_ONE, AT_LEAST_ZERO, PREFIX, one_of

Coder = TypeVar("Coder", ChunkCoder, FixedChunkCoder)


@dataclass(frozen=True)
class LmcacheSettings(ChunkSettings):
    """The options of LMCache's configuration that begin with `kvtc.` (docs/guides/lmcache.md).

    Parameters:
        packing: How the engine packs the numbers of a page, as of `lmcache_layout`: LMCache does
            not know it.
        page_tokens: Tokens of a page of the engine, where pages are packed.
        object_group: The object group of LMCache that the calibration is for; None: any whose
            chunks have its shape.
    """

    packing: str = field(default=SPLIT, metadata=one_of(*PACKINGS))
    page_tokens: int = field(default=1, metadata=AT_LEAST_ONE)
    object_group: int | None = field(default=None, metadata=AT_LEAST_ZERO)

    @property
    def key_parts(self) -> dict[str, Part]:
        """What the key of an entry says of the engine's pages: chunks that are kept exactly are as packed as those are."""
        return {} if self.packing == SPLIT else {"packing": self.packing, "page_tokens": self.page_tokens}

    def is_calibrated(self, object_group: int) -> bool:
        """Whether the calibration can be for an object group."""
        return self.object_group in (None, object_group)

    def model_in_key(self, name: str) -> str | None:
        """What the key of an entry says of the model besides the `ServedModel`.

        Parameters:
            name: The model's name in LMCache's key of a chunk.

        Returns:
            None if `kvtc.model` is given and names the same model; the name if it is not given.

        Raises:
            UnknownModel: The chunk is of another model than `kvtc.model`.
        """
        if self.model is None:
            return name
        if name.rstrip("/") != self.model.partition("@")[0].rstrip("/"):
            raise UnknownModel(f"a chunk of the model {name}; {PREFIX}model is {self.model}")
        return None

    def layout(self, shape: Sequence[int], calibration: Calibration) -> PageLayout:
        """The layout of a chunk of this shape. Raises `UnsupportedLayout`."""
        geometry = calibration.geometry
        if geometry.key_dim != geometry.value_dim:
            raise UnsupportedLayout(
                f"the calibration covers {geometry.describe()}, of which LMCache's chunks are not read"
            )
        return lmcache_layout(shape, *geometry.sizes, page_tokens=self.page_tokens, packing=self.packing)


class WorkerCoders(Generic[Coder]):
    """The coders of LMCache's workers by number, each made once. Safe to share between threads.

    Parameters:
        coder_class: `ChunkCoder` or `FixedChunkCoder`.
        settings: The options.
        model: The model that is served.
        first_worker: Its coder is made at once, so that what cannot work ends LMCache's start.
        spacing: As of `ChunkCoder`.
        dtypes: Of chunks, for which it compiles at once; a guess where LMCache does not tell.

    Raises:
        KvtcError, FileNotFoundError: As `EngineSettings.read_calibration`, `ServedModel.checked`
            and the coder.
    """

    def __init__(
        self,
        coder_class: type[Coder],
        settings: LmcacheSettings,
        model: ServedModel,
        first_worker: int = 0,
        spacing: int | None = None,
        dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
    ) -> None:
        self._coder_class: type[Coder] = coder_class
        self._settings, self._model, self._spacing = settings, model, spacing
        self._lock = ForkSafeLock()
        self._coders: dict[int, Coder] = {}
        for dtype in dtypes:
            self.of(first_worker).compile(dtype)

    def of(self, worker: int) -> Coder:
        """The coder of a worker. Raises what the constructor raises."""
        with self._lock:
            if worker not in self._coders:
                self._coders[worker] = self._made(worker)
            return self._coders[worker]

    def _made(self, worker: int) -> Coder:
        settings = self._settings
        if settings.lossless:
            return self._coder_class(None, settings, rows_layout, self._spacing)
        calibration = self._model.checked(*settings.read_calibration(worker))
        return self._coder_class(
            calibration, settings, partial(settings.layout, calibration=calibration), self._spacing
        )


def learn_starts(starts: KnownStarts, event: Any) -> None:
    """Note where the chunks of a prompt stand, which LMCache publishes when it looks them up
    (`EventType.MP_LOOKUP`)."""
    starts.learn([bytes(name) for name in event.metadata["chunk_hashes"]], event.metadata["chunk_size"])


def worker_of(kv_rank: int) -> int:
    """The number of a worker in the `kv_rank` of LMCache's keys: world size, worker, and the same
    of a node, 8 bits each."""
    return kv_rank >> 16 & 0xFF
