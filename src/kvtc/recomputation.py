"""The first layers of a model, recomputed from token ids: their keys and values, and the hidden state that enters the next one.

The profile `conditional` needs no bytes for the keys and values of these layers, and predicts those of all deeper layers
from the hidden state. m of L layers cost m / L of a prefill.
"""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .cache import TokenIds, sides_of_layer
from .errors import InvalidArgument, MissingDependency, UnsupportedModel
from .key_digest import Part, digest
from .process.locks import ForkSafeLock
from .process.torch_state import evaluation_mode, model_torch_state, plain, torch_functions

PIECE_TOKENS = 2048
"""Tokens of one forward pass, so that memory is bounded."""


@dataclass(frozen=True, eq=False)
class Recomputed:
    """What the first m layers compute of n tokens that follow one another.

    Attributes:
        first: position of the first of them.
        hidden: [n, d] in the model's dtype; it enters layer m.
        keys, values: [m, H, n, D] in the model's dtype, of all heads, as the model caches them.
    """

    first: int
    hidden: Tensor
    keys: Tensor
    values: Tensor

    def part(self, tokens: slice) -> Recomputed:
        """Some of the tokens; a view."""
        first = self.first + tokens.indices(len(self.hidden))[0]
        return Recomputed(first, self.hidden[tokens], self.keys[:, :, tokens], self.values[:, :, tokens])


class Recomputation(ABC):
    """Recomputes the first layers of one model. Safe to share between threads.

    What it computed last is kept, so that a text that goes on from the same tokens is computed from there on.

    Attributes:
        n_layers: m, how many layers it recomputes.
        identity: 32 bytes, digest of the weights that it computes with.
    """

    def __init__(self, n_layers: int, identity: bytes) -> None:
        self.n_layers, self.identity = n_layers, identity
        self._lock = ForkSafeLock()
        self._ids: TokenIds | None = None
        self._last: Recomputed | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ids": None, "_last": None}

    def run(self, token_ids: TokenIds) -> Recomputed:
        """Recompute a text.

        Parameters:
            token_ids: int64 [T], of all tokens from position 0 on.

        Returns:
            What the layers compute of all T tokens.

        Raises:
            InvalidArgument: for ids outside of the vocabulary.
        """
        with self._lock:
            known = self._n_common(token_ids)
            if self._last is None or known < len(token_ids):
                before = None if self._last is None or not known else self._last.part(slice(known))
                for start in range(known, len(token_ids), PIECE_TOKENS):
                    before = self._go_on(before, token_ids[start : start + PIECE_TOKENS])
                self._ids, self._last = token_ids, before
            if self._last is None:
                raise InvalidArgument("expected one or more token ids to recompute layers of, found none")
            return self._last.part(slice(len(token_ids)))

    def forget(self) -> None:
        """Drop what was computed last."""
        with self._lock:
            self._ids = self._last = None

    @abstractmethod
    def _go_on(self, before: Recomputed | None, token_ids: TokenIds) -> Recomputed:
        """Tokens `before`, and those that follow them."""

    def _n_common(self, token_ids: TokenIds) -> int:
        """Leading tokens of a text that were recomputed last."""
        if self._ids is None:
            return 0
        n = min(len(self._ids), len(token_ids))
        differ = (self._ids[:n] != token_ids[:n]).nonzero()[0]
        return int(differ[0]) if len(differ) else n


def open_recomputation(model: Any, n_layers: int, device: torch.device) -> Recomputation:
    """The first layers of a model.

    Parameters:
        model: a transformers model in memory, whose first layers are shared, or the path of a checkpoint folder, of which
            the embedding and the first layers alone are read; or a `Recomputation`, which is returned.
        n_layers: m, 1 or more and fewer than the model has.
        device: where layers from a folder compute; a model in memory stays where it is.

    Raises:
        InvalidArgument: for a number of layers that the model does not have, or a folder that cannot be read.
        UnsupportedModel: for a model whose layers are not found.
        MissingDependency: without transformers.
    """
    if isinstance(model, Recomputation):
        return model
    if isinstance(model, nn.Module):
        return TruncatedModel(decoder_of(model), n_layers)
    return TruncatedModel(_first_layers(model, n_layers).to(device), n_layers)


class TruncatedModel(Recomputation):
    """The embedding and first layers of a transformers decoder, which are shared with it.

    Parameters:
        decoder: the decoder, or one of the first n_layers layers alone.
        n_layers: how many layers it shall have.
    """

    def __init__(self, decoder: Any, n_layers: int) -> None:
        name, layers = layers_of(decoder)
        if not 1 <= n_layers <= len(layers):
            raise InvalidArgument(f"{n_layers} layers are to be recomputed; the model has {len(layers)}")
        truncated: Any = copy.copy(decoder)
        truncated._modules = dict(decoder._modules)
        setattr(truncated, name, layers[:n_layers])
        super().__init__(n_layers, _identity(truncated))
        # Any other layer than the last one stands for the next one: what calls it may read its attributes.
        stop = copy.copy(layers[n_layers - 1])
        stop.forward = _stop
        setattr(truncated, name, nn.ModuleList([*layers[:n_layers], stop]))
        truncated.config = copy.deepcopy(decoder.config)
        set_layers(truncated.config, n_layers + 1)
        self._decoder = truncated
        self._vocabulary = int(truncated.get_input_embeddings().weight.shape[0])

    def _go_on(self, before: Recomputed | None, token_ids: TokenIds) -> Recomputed:
        from transformers import DynamicCache

        if int(token_ids.min()) < 0 or int(token_ids.max()) >= self._vocabulary:
            raise InvalidArgument(
                f"expected token ids in 0 .. {self._vocabulary - 1}, found {token_ids.min()} .. {token_ids.max()}"
            )
        cache = DynamicCache()
        if before is not None:
            for layer in range(self.n_layers):
                cache.update(*sides_of_layer(before.keys[layer][None], before.values[layer][None]), layer)
        ids = torch.from_numpy(token_ids).to(self._decoder.get_input_embeddings().weight.device)
        with model_torch_state(), torch_functions(), evaluation_mode(self._decoder):
            try:
                self._decoder(input_ids=ids[None], past_key_values=cache, use_cache=True)
                raise UnsupportedModel(f"{type(self._decoder).__name__} does not call its layers one after the other")
            except _Reached as reached:
                hidden = reached.hidden[0]
        sides = [sides_of_layer(layer.keys[0], layer.values[0]) for layer in cache.layers[: self.n_layers]]
        keys, values = map(torch.stack, zip(*sides, strict=True))
        return Recomputed(0, hidden if before is None else torch.cat([before.hidden, hidden]), keys, values)


class _Reached(Exception):
    """The layer behind the recomputed ones is called."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def _stop(hidden_states: Tensor, *_: Any, **__: Any) -> None:
    raise _Reached(hidden_states)


def decoder_of(model: Any) -> Any:
    """The decoder of a transformers model: its embedding and layers, without what predicts tokens."""
    if not hasattr(model, "get_decoder"):
        raise InvalidArgument(f"expected a transformers model or the path of one, got {type(model).__name__}")
    return model.get_decoder()


def layers_of(decoder: Any) -> tuple[str, nn.ModuleList]:
    """Name and modules of the layers of a decoder. Raises `UnsupportedModel`."""
    found = [(name, part) for name, part in decoder.named_children() if isinstance(part, nn.ModuleList) and len(part)]
    if len(found) != 1:
        raise UnsupportedModel(f"{type(decoder).__name__} has {len(found)} lists of layers; expected one")
    return found[0]


def recording(model: Any, layer: int, record: Callable[[Tensor], None]) -> Any:
    """A hook that records the hidden states [1, n, d] which enter a layer, until its `remove` is called."""

    def hook(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        record((args[0] if args else named["hidden_states"]).detach())

    return layers_of(decoder_of(model))[1][layer].register_forward_pre_hook(hook, with_kwargs=True)


def set_layers(config: Any, n_layers: int) -> None:
    """Make a configuration one of so many layers, as far as the model code of a decoder reads it."""
    types = getattr(config, "layer_types", None)
    if types is not None:
        config.layer_types = [*types, types[-1]][:n_layers]
    config.num_hidden_layers = n_layers


def _first_layers(place: str | Path, n_layers: int) -> Any:
    """The decoder of a checkpoint with the first layers alone; nothing else of the files is read into memory."""
    try:
        from transformers import AutoConfig, AutoModel
        from transformers.utils import logging
    except ImportError as error:
        raise MissingDependency('recomputing layers needs transformers; pip install "kvtc[hf]"') from error
    verbosity, shows_progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    # That the deeper layers are left out is no news.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(place, local_files_only=True)
        set_layers(config.get_text_config(), n_layers)
        with torch_functions():
            model = AutoModel.from_pretrained(place, config=config, dtype="auto", local_files_only=True)
    except Exception as error:  # foreign code reads foreign files: whatever it raises, they do not load
        raise InvalidArgument(f"the first {n_layers} layers of {place} do not load: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
        if shows_progress:
            logging.enable_progress_bar()
    return decoder_of(model)


def _identity(decoder: nn.Module) -> bytes:
    """Digest of weights, rounded to bfloat16: a model that was cast, as to float32, is the same."""
    parts: list[Part] = []
    for name, weights in sorted(decoder.named_parameters()):
        rounded = plain(weights, name).to("cpu", torch.bfloat16).contiguous()
        parts.append(
            [name, list(rounded.shape), hashlib.sha256(rounded.reshape(-1).view(torch.uint8).numpy().data).digest()]
        )
    return digest("recomputed layers", weights=parts)
