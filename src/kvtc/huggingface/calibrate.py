"""Calibration of a transformers model: capture its caches, accumulate their rows, fit, measure quality."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cache import CacheGeometry
from ..calibration import Calibration
from ..calibration.checkpoint import Checkpoint
from ..calibration.fit import JOINT_RANK_CAP, RANK_CAP, FitOptions, fit
from ..calibration.rows import DEFAULT_TOKENS, CalibrationRows
from ..container.tables import PROFILES
from ..errors import InvalidArgument, UnsupportedModel
from ..process.progress import note, reporting, task
from .hidden_states import HiddenStates
from .measure_quality import HeldOut, measure_quality
from .model_files import UnknownModel
from .model_identity import calibrated_identity
from .models import as_ids, capture_groups, geometry_of, verify_rope
from .rope_discovery import rotation_of
from .sensitivity import Sensitivity
from .support import covered_geometries

_VERIFICATION_TOKENS = 256
_GATHERED = "gathered"
_BASIS_SHARE = 0.125
"""Of the bytes of the model's parameters in 16 bits."""


def calibrate(
    model: Any,
    token_sequences: Iterable[Tensor | Sequence[int]],
    *,
    sink_tokens: int = 4,
    layers: tuple[int, int] | None = None,
    kv_heads: tuple[int, int] | None = None,
    profiles: Sequence[str] = tuple(PROFILES),
    max_tokens: int = DEFAULT_TOKENS,
    rank: int = RANK_CAP,
    joint_rank: int | None = None,
    recompute_layers: int = 1,
    checkpoint_directory: str | Path | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Calibration:
    """Calibrate a model on texts of its kind.

    Parameters:
        model: a transformers causal LM.
        token_sequences: [T] integers each; any iterable, read once and only until `max_tokens` tokens were seen.
            Sequences of at most `sink_tokens` tokens hold nothing to learn from and are skipped. The first one also
            verifies the rotation. Of a whole model, every 16th sequence of at least 384 tokens, up to 8, is not
            fitted to: quality is measured on it.
        sink_tokens: first tokens of each sequence, whose rows are left out; default 4.
        layers: half-open (start, stop) of the layers of one pipeline-parallel worker. None (default): all.
        kv_heads: half-open (start, stop) of the key-value heads of one tensor-parallel worker. None (default): all.
        profiles: what the calibration shall serve; default all. Each adds to the time and to the file; a
            calibration of `("joint",)` alone is the smallest.
        max_tokens: tokens past the sinks after which no more text is read; the default is
            `kvtc.calibration.rows.DEFAULT_TOKENS`.
        rank: the largest number of components of the bases of `paper`; the default is
            `kvtc.calibration.fit.RANK_CAP`.
        joint_rank: the same of the bases of `joint` and `conditional`. None (default): at most 4096, and no more
            than makes the joint basis, in 8 bits, an eighth as large as the model's parameters in 16 bits.
        recompute_layers: how many of the first layers `conditional` recomputes, at a cost of so many layers of a
            prefill; default 1.
        checkpoint_directory: a folder that keeps what is done, so that the same call goes on where an interrupted
            one was and ends in the same calibration; delete it when the calibration is saved. Nothing is kept for a
            model whose identity cannot be told (`kvtc.model_identity`). None (default): nothing is kept.
        seed: of all random draws; default 0.
        device: where the calibration is fitted. None (default): where the model's embeddings are.
        progress: whether to show on stderr what is being done; default True.

    Returns:
        The calibration; its `save` writes the file.

    Raises:
        InvalidArgument: an option is out of range, a profile is unknown, or there is too little text.
        UnsupportedModel: the model's cache, rotation or attention cannot be read; the message names the layer.
        InvalidCache: the model's cache holds NaN or infinite values.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        >>> untrained = LlamaForCausalLM(LlamaConfig(vocab_size=4096, **sizes))
        >>> texts = [token_ids[:200], token_ids[200:400], token_ids[400:]]
        >>> kvtc.calibrate(untrained, texts, profiles=("paper",), progress=False).geometry.describe()
        'layers 0..1, kv heads 0..1, head_dim 16'
    """
    unknown = set(profiles) - set(PROFILES)
    if unknown:
        raise InvalidArgument(f"profile {sorted(unknown)[0]!r} is unknown; expected some of {', '.join(PROFILES)}")
    if not profiles:
        raise InvalidArgument("expected at least one profile to calibrate for")
    is_whole, has_joint = layers is None and kv_heads is None, not set(profiles) <= {"paper"}
    # The others have no profile but joint.
    several = is_whole and "joint" in profiles
    geometries = covered_geometries(model) if several else [geometry_of(model, layers, kv_heads)]
    geometry = geometries[0]
    if geometry.is_window and set(profiles) != {"joint"}:
        raise UnsupportedModel(
            f"no layer of this model has full attention, so that joint alone codes its cache ({geometry.describe()}); calibrate "
            'for it (profiles=("joint",))'
        )
    sizes = FitOptions(rank, _joint_rank(model, geometries) if joint_rank is None else joint_rank, seed)
    about = _about(model)
    recorded = HiddenStates(model, recompute_layers, geometry) if "conditional" in profiles else None
    sensitivity = Sensitivity(model, geometries, sink_tokens) if has_joint else None
    held_out = HeldOut() if has_joint and is_whole else None
    embeddings = model.get_input_embeddings().weight
    with reporting(progress):
        note("phases: " + ", ".join(_phases(profiles, has_joint and is_whole)))
        rows, *further = (
            CalibrationRows(
                its,
                sink_tokens=sink_tokens,
                max_tokens=max_tokens,
                hidden_width=recorded.width if recorded and its is geometry else 0,
                rank=max(rank if "paper" in profiles else 0, sizes.joint_rank if has_joint else 0),
                seed=seed,
                device=embeddings.device if device is None else device,
            )
            for its in geometries
        )
        sequences = _verified(model, geometries, token_sequences, sink_tokens)
        owner = _digest(
            about,
            [its.describe() for its in geometries],
            sizes,
            sorted(profiles),
            recompute_layers,
            max_tokens,
            sink_tokens,
        )
        checkpoint = Checkpoint(checkpoint_directory if about["model_identity"] else None, owner)
        accumulate(model, sequences, [rows, *further], sensitivity, held_out, recorded, checkpoint)
        samples = sensitivity.samples() if sensitivity else []
        calibration = fit(
            rows,
            sizes,
            paper="paper" in profiles,
            sample=samples[0] if samples else None,
            recomputed=(recompute_layers, recorded.identity) if recorded else None,
            info=about,
            checkpoint=checkpoint,
            further=list(zip(further, samples[1:], strict=True)),
        )
        if held_out and held_out.sequences:
            calibration = measure_quality(model, calibration, held_out.sequences)
    return calibration


def _phases(profiles: Sequence[str], is_measured: bool) -> list[str]:
    """What a calibration does, in order."""
    found = ["reading text"]
    found += ["key and value bases"] if "paper" in profiles else []
    found += ["metric, joint basis and tables"] if not set(profiles) <= {"paper"} else []
    found += ["conditional basis and tables"] if "conditional" in profiles else []
    return found + (["quality"] if is_measured else [])


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _verified(
    model: Any,
    geometries: Sequence[CacheGeometry],
    token_sequences: Iterable[Tensor | Sequence[int]],
    sink_tokens: int,
) -> Iterator[Tensor]:
    """The sequences of more than sink_tokens tokens, as [T] int64; the rotation is verified on the first one, here and now.

    Time and memory: one forward pass over at most 256 tokens.
    """
    sequences = (ids for ids in map(as_ids, token_sequences) if len(ids) > sink_tokens)
    first = next(sequences, None)
    if first is None:
        raise InvalidArgument(f"expected at least one sequence of more than {sink_tokens} tokens, found none")
    known = [geometry for geometry in geometries if geometry.rope.is_known]
    if len(known) < len(geometries):
        note(f"keys are coded as they are cached: {rotation_of(model)[1]}")
    with task("checking the rotation"):
        for geometry in known:
            verify_rope(model, geometry, first[:_VERIFICATION_TOKENS])
    return chain([first], sequences)


def accumulate(
    model: Any,
    sequences: Iterable[Tensor],
    groups: Sequence[CalibrationRows],
    sensitivity: Sensitivity | None = None,
    held_out: HeldOut | None = None,
    recorded: HiddenStates | None = None,
    checkpoint: Checkpoint | None = None,
) -> None:
    """Capture the cache of one sequence after another and add its rows, until the first group has seen enough tokens.

    Where a checkpoint has some of it, the sequences that it has are passed over.

    Time: one forward pass of the model over each sequence; a pass that is recorded computes attention in float32.
    Memory: the cache of one sequence.

    Parameters:
        model: a transformers causal LM.
        sequences: [T] int64 each; none is asked for once the first group is full.
        groups: what the caches are added to, by group; the first takes hidden states, if any are recorded.
        sensitivity: captures the caches and records the passes; None: they are captured alone.
        held_out: takes some of the sequences, whose caches are not captured; None: none are.
        recorded: takes the hidden states of the same passes; None: none are taken.
        checkpoint: keeps what is gathered, every few minutes; None: nothing is kept.
    """
    rows, geometries = groups[0], [its.geometry for its in groups]
    kept = _Gathered(groups, sensitivity, checkpoint)
    kept.resume()
    read = hashlib.sha256()
    n_read = 0
    with task("reading text", rows.max_tokens, "tokens at most") as advance:
        advance(rows.n_rows)
        for ids in sequences:
            n_read += 1
            read.update(ids.numpy().tobytes())
            is_held_out = held_out is not None and held_out.takes(ids)
            if n_read == kept.n_sequences:
                kept.check(read.hexdigest())
            elif n_read > kept.n_sequences and not is_held_out:
                with recorded or nullcontext():
                    caches = sensitivity.capture(ids) if sensitivity else capture_groups(model, ids, geometries)
                before = rows.n_rows
                for its, cache in zip(groups, caches, strict=True):
                    its.add(cache, recorded.taken() if recorded and its is rows else None)
                advance(rows.n_rows - before)
                kept.save_if_due(n_read, read.hexdigest())
            if rows.is_full and n_read >= kept.n_sequences:
                break
    if n_read < kept.n_sequences:
        kept.check(read.hexdigest())
    if n_read > kept.n_sequences:
        kept.save(n_read, read.hexdigest())


class _Gathered:
    """Keeps what the pass over the text gathers in a checkpoint.

    Attributes:
        n_sequences: how many were kept, held-out ones included.
    """

    def __init__(
        self, groups: Sequence[CalibrationRows], sensitivity: Sensitivity | None, checkpoint: Checkpoint | None
    ) -> None:
        self._groups, self._sensitivity, self._checkpoint = groups, sensitivity, checkpoint
        self.n_sequences, self._digest = 0, ""

    def resume(self) -> None:
        """Take up what was kept."""
        found = None if self._checkpoint is None else self._checkpoint.load(_GATHERED)
        if found is None:
            return
        for number, rows in enumerate(self._groups):
            prefix = f"rows{number}."
            rows.resume({name[len(prefix) :]: its for name, its in found.items() if name.startswith(prefix)})
        if self._sensitivity is not None:
            self._sensitivity.resume(found)
        self.n_sequences = int(found["n_read"])
        self._digest = bytes(found["read"].tolist()).decode()
        note(f"reading text: {self._groups[0].n_rows:,} tokens were read before")

    def check(self, digest: str) -> None:
        """Raise `InvalidArgument` unless what was kept is of these sequences."""
        if digest != self._digest:
            raise InvalidArgument(
                "the text is not the one that the interrupted calibration read: delete its checkpoint directory"
            )

    def save_if_due(self, n_sequences: int, digest: str) -> None:
        """Keep it from time to time, when no rows wait: then an interruption changes no sum."""
        if (
            self._checkpoint is not None
            and self._checkpoint.is_due
            and not any(rows.moments.n_pending for rows in self._groups)
        ):
            self.save(n_sequences, digest)

    def save(self, n_sequences: int, digest: str) -> None:
        """Keep it."""
        for rows in self._groups:
            rows.moments.settle()
        if self._checkpoint is not None:
            state = self._sensitivity.state() if self._sensitivity else {}
            for number, rows in enumerate(self._groups):
                state |= {f"rows{number}.{name}": its for name, its in rows.state().items()}
            read = {"n_read": torch.tensor([n_sequences]), "read": torch.tensor(list(digest.encode()))}
            self._checkpoint.save(_GATHERED, state | read)


def _joint_rank(model: Any, geometries: Sequence[CacheGeometry]) -> int:
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    n_features = sum(geometry.joint_features for geometry in geometries)
    return max(1, min(JOINT_RANK_CAP, int(2 * n_parameters * _BASIS_SHARE) // n_features))


def _about(model: Any) -> dict[str, Any]:
    """What a calibration's `info` says of its model: the number of its parameters, and its identity.

    The identity is None where its parameters do not show their bytes, or it has forward hooks.
    """
    try:
        identity = calibrated_identity(model)
    except UnknownModel:
        identity = None
    # A parameter shared by several modules is listed once.
    return {"model_parameters": sum(parameter.numel() for parameter in model.parameters()), "model_identity": identity}
