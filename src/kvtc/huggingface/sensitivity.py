"""How strongly a model's predictions depend on each key and value: second moments of gradients of its own log-likelihood.

A text is cut in two. The model reads the first part without gradients, and its cache becomes a leaf. It reads the second part on
top of that. A label is drawn at every position from the model's own distribution, and one backward pass gives the gradient g of
the labels' summed log-likelihood by every cached key and value. The sensitivity of a layer and head is the mean of g g^T over
cached tokens. Because labels are drawn from the model it is the Fisher information: to second order, an error e of a key or value
costs e^T E[g g^T] e / 2 nats of divergence. Gradients of keys are un-rotated, for errors are made in un-rotated keys.
"""

from __future__ import annotations

from itertools import count
from typing import Any

import torch
from torch import Tensor

from ..cache import CacheGeometry, KVCache
from ..coding.joint.metric import Metric
from ..errors import InvalidArgument, UnsupportedModel
from ..process.torch_state import gradients, model_torch_state, neutral_torch_state
from .models import capture, captured, evaluation_mode

METRIC_POWER, METRIC_RIDGE = 0.75, 0.01
"""Power of the sensitivity in the metric, and the share of its mean diagonal that is added to every direction."""
READ_SHARE = 0.75
"""Of a text that is cached; the rest is predicted."""
_MOST_PASSES = 64
_LEAST_TOKENS = 4


class Sensitivity:
    """What calibration gathers of a model besides its caches: the statistics behind the metric of `joint` and `conditional`.

    `calibrate` knows two methods of it: `capture`, which it calls for each sequence, and `metric`, which it calls once
    when all caches are captured. Other statistics need another class with these two, and nothing else changes.

    Attributes:
        keys, values: [L, H, D, D] float64, sums of g g^T.
        n_tokens: cached tokens that they are sums over.

    Parameters:
        model: a transformers causal LM.
        geometry: the layers and heads that are measured.
        sink_tokens: earlier tokens are left out.
        seed: of the labels.
    """

    @neutral_torch_state
    def __init__(self, model: Any, geometry: CacheGeometry, sink_tokens: int, seed: int = 0) -> None:
        shape = (geometry.n_layers, geometry.n_kv_heads, geometry.head_dim, geometry.head_dim)
        self.keys = torch.zeros(shape, dtype=torch.float64)
        self.values = torch.zeros(shape, dtype=torch.float64)
        self.n_tokens = 0
        self.n_passes = 0
        self._model = model
        self._geometry = geometry
        self._sink_tokens = sink_tokens
        self._generator = torch.Generator().manual_seed(seed)

    def capture(self, token_ids: Tensor) -> KVCache:
        """The cache of one sequence, [T] int64; gradients are taken from the first 64 that are long enough.

        Time: a forward pass, and a backward pass from the last quarter of the tokens. Memory: the activations of that quarter.

        Raises:
            UnsupportedModel: for a model that gives no gradients.
        """
        if self.n_passes == _MOST_PASSES or not self._is_enough(len(token_ids)):
            return capture(self._model, token_ids, self._geometry)
        n_read = int(READ_SHARE * len(token_ids))
        cached, leaves = self._passes(token_ids, n_read)
        self._add(leaves, n_read)
        self.n_passes += 1
        if self._geometry.rope.depends_on_length:
            # Read in two parts, its keys are rotated for two lengths.
            return capture(self._model, token_ids, self._geometry)
        return captured(self._model, cached, len(token_ids), self._geometry)

    @neutral_torch_state
    def metric(self, power: float = METRIC_POWER) -> Metric:
        """The metric of what was gathered; power: of the sensitivity.

        Raises:
            InvalidArgument: where no sequence was long enough.
        """
        if not self.n_tokens:
            needed = next(n for n in count() if self._is_enough(n))
            raise InvalidArgument(
                f"the metric of joint and conditional needs a text of {needed} tokens or more; the profile paper needs none"
            )
        return Metric.from_sensitivity(self.keys / self.n_tokens, self.values / self.n_tokens, power, METRIC_RIDGE)

    def _is_enough(self, n_tokens: int) -> bool:
        n_read = int(READ_SHARE * n_tokens)
        return min(n_read - self._sink_tokens, n_tokens - n_read) >= _LEAST_TOKENS

    def _passes(self, token_ids: Tensor, n_read: int) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
        """The whole cache, and the read part's keys and values of each layer [1, H, n_read, D] with their gradients."""
        model = self._model
        ids = token_ids.to(model.get_input_embeddings().weight.device)
        frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with model_torch_state(), evaluation_mode(model):
            cached = model(ids[None, :n_read], use_cache=True).past_key_values
            leaves = []
            for layer in cached.layers:
                layer.keys, layer.values = (
                    side.detach().clone().requires_grad_() for side in (layer.keys, layer.values)
                )
                leaves.append((layer.keys, layer.values))
            for parameter in frozen:
                parameter.requires_grad_(False)
            try:
                with gradients():
                    logits = model(ids[None, n_read:], past_key_values=cached, use_cache=True).logits[0]
                    scores = logits.float().log_softmax(dim=-1)
                    drawn = torch.multinomial(scores.detach().exp().cpu(), 1, generator=self._generator)
                    scores.gather(1, drawn.to(scores.device)).sum().backward()
            except RuntimeError as error:
                raise self._no_gradients() from error
            finally:
                for parameter in frozen:
                    parameter.requires_grad_(True)
        return cached, leaves

    @neutral_torch_state
    def _add(self, leaves: list[tuple[Tensor, Tensor]], n_read: int) -> None:
        geometry = self._geometry
        heads = slice(geometry.first_kv_head, geometry.first_kv_head + geometry.n_kv_heads)
        positions = torch.arange(n_read)
        for layer in range(geometry.n_layers):
            sides = leaves[geometry.first_layer + layer]
            if any(side.grad is None for side in sides):
                raise self._no_gradients()
            keys, values = (side.grad[0, heads].float() for side in sides if side.grad is not None)
            # Turned back by the angle, not un-rotated: the transpose keeps the factor on cosines that the inverse divides by.
            keys = geometry.rope.turn_layer(layer, keys, -positions.to(keys.device), n_read)
            for total, side in ((self.keys, keys), (self.values, values)):
                part = side[:, self._sink_tokens :].double()
                total[layer] += (part.mT @ part).cpu()
        self.n_tokens += n_read - self._sink_tokens

    def _no_gradients(self) -> UnsupportedModel:
        return UnsupportedModel(
            f"{type(self._model).__name__} gives no gradients by its cache, which joint and conditional need; "
            'calibrate for the profile paper alone (profiles=("paper",))'
        )
