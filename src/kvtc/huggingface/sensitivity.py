"""How strongly attention's output depends on each key and value: gathered from forward passes, without gradients.

For a layer and query head let a_ts be the weight that token t gives to token s, o_t the head's output at t, W the head's slice of
the output projection, and R(s) the rotation at position s. To first order a change dk of the key before rotation and dv of a value
change what the head writes into the residual stream by

    a_ts W (v_s - o_t) (q dk)   with q = R(s)^T q_t * scaling,     and     a_ts W dv.

The sensitivity of keys is the mean of a_ts^2 |W (v_s - o_t)|^2 q q^T, that of values the mean of a_ts^2 W^T W, over sampled
tokens s and all later tokens t beyond a distance, summed over the query heads that share the key; both in units of the squared norm
of the residual stream where the head writes. Scores are computed a few queries at a time: no T x T matrix is ever whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..cache import CacheGeometry, KVCache
from ..coding.joint.metric import Metric
from ..errors import InvalidArgument, UnsupportedModel
from ..process.torch_state import neutral_torch_state
from .models import capture

_NAME = "kvtc_sensitivity"
_QUERIES_AT_ONCE = 256
_SCORES_AT_ONCE = 1 << 25
"""Scores of all heads held at a time: fewer queries at once where texts are long."""
_SAMPLES = 24
_MOST_PASSES = 64
METRIC_POWER, METRIC_RIDGE = 0.75, 0.01
"""Power of the sensitivity in the metric, and the share of its mean diagonal that is added to every direction."""
_OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "wo")


class Sensitivity:
    """What calibration gathers of a model besides its caches: the statistics behind the metric of `joint` and `conditional`.

    `calibrate` knows two methods of it: `capture`, which it calls for each sequence, and `metric`, which it calls once
    when all caches are captured. Other statistics need another class with these two, and nothing else changes.

    keys, values: [L, H, D, D] float64, sums over the passes made inside `recording`.

    Parameters:
        model: a transformers causal LM.
        geometry: the layers and heads that are recorded.
        sink_tokens: earlier tokens are never sampled.
        distance: tokens; up to so many later tokens do not count for a token: they see it exactly, from the window.
        seed: of the samples.
    """

    @neutral_torch_state
    def __init__(
        self, model: Any, geometry: CacheGeometry, sink_tokens: int, distance: int = 16, seed: int = 0
    ) -> None:
        shape = (geometry.n_layers, geometry.n_kv_heads, geometry.head_dim, geometry.head_dim)
        self.keys = torch.zeros(shape, dtype=torch.float64)
        self.values = torch.zeros(shape, dtype=torch.float64)
        self._residual = torch.zeros(geometry.n_layers, dtype=torch.float64)
        self._model = model
        self._geometry = geometry
        self._sink_tokens = sink_tokens
        self._distance = distance
        self._generator = torch.Generator().manual_seed(seed)
        self._sampled: Tensor = torch.empty(0, dtype=torch.int64)
        self.n_passes = 0

    def capture(self, token_ids: Tensor) -> KVCache:
        """The cache of one sequence, [T] int64; the passes of the first 64 long enough sequences are recorded."""
        if self.n_passes == _MOST_PASSES:
            return capture(self._model, token_ids, self._geometry)
        with self.recording(len(token_ids)):
            return capture(self._model, token_ids, self._geometry)

    @neutral_torch_state
    def metric(self, power: float = METRIC_POWER) -> Metric:
        """The metric of what was recorded; power: of the sensitivity. Raises as `moments` does."""
        return Metric.from_sensitivity(*self.moments(), power, METRIC_RIDGE)

    @contextmanager
    def recording(self, n_tokens: int) -> Iterator[None]:
        """Inside, one pass of the model over n_tokens tokens is recorded."""
        from transformers import AttentionInterface
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

        candidates = n_tokens - self._distance - self._sink_tokens - 1
        if candidates < 1:
            yield
            return
        self._draw(candidates)
        AttentionInterface.register(_NAME, self._attend)
        AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        usual = self._model.config._attn_implementation
        try:
            self._model.set_attn_implementation(_NAME)
        except ValueError as error:
            raise self._unobservable() from error
        hooks = [
            layer.register_forward_hook(self._residual_hook(index))
            for layer, index in _decoder_layers(self._model, self._geometry)
        ]
        try:
            yield
            self.n_passes += 1
        finally:
            self._model.set_attn_implementation(usual)
            for hook in hooks:
                hook.remove()

    @neutral_torch_state
    def moments(self) -> tuple[Tensor, Tensor]:
        """Sensitivities of keys and of values, [L, H, D, D] float64 each.

        Raises `InvalidArgument` if no recorded text was longer than the distance, `UnsupportedModel` if nothing was observed.
        """
        if not self.n_passes:
            needed = self._distance + self._sink_tokens + 1
            raise InvalidArgument(
                f"sensitivity needs a text of more than {needed} tokens; the profile paper needs none"
            )
        if not bool(self._residual.all()) or not bool(self.values.any()):
            raise self._unobservable()
        scale = (self._residual / self.n_passes)[:, None, None, None]
        return self.keys / scale, self.values / scale

    @neutral_torch_state
    def _draw(self, n_candidates: int) -> None:
        order = torch.randperm(n_candidates, generator=self._generator)[:_SAMPLES]
        self._sampled = (order + self._sink_tokens).sort().values

    def _unobservable(self) -> UnsupportedModel:
        return UnsupportedModel(
            f"the attention of {type(self._model).__name__} cannot be observed, which joint and conditional need; "
            'calibrate for the profile paper alone (profiles=("paper",))'
        )

    def _residual_hook(self, index: int) -> Any:
        @neutral_torch_state
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            self._residual[index] += float(hidden.float().square().sum(dim=-1).mean())

        return hook

    @neutral_torch_state
    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,  # noqa: ARG002  full causal attention is all that is supported
        scaling: float | None = None,
        softcap: float | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Causal attention [1, H_q, T, D] in float32, block by block of queries, with the moments on the way."""
        geometry = self._geometry
        layer = int(module.layer_idx) - geometry.first_layer  # type: ignore[arg-type]
        queries, keys, values = query[0].float(), key[0].float(), value[0].float()
        n_heads, n_tokens, dim = queries.shape
        shared = n_heads // keys.shape[0]
        keys, values = keys.repeat_interleave(shared, 0), values.repeat_interleave(shared, 0)
        scale = dim**-0.5 if scaling is None else scaling
        sampled = self._sampled.to(query.device)
        covered = 0 <= layer < geometry.n_layers
        gram = _output_gram(module, n_heads, values.shape[-1]).to(query.device)
        key_sums = torch.zeros(len(sampled), n_heads, dim, dim, dtype=torch.float32, device=query.device)
        value_sums = torch.zeros(n_heads, dtype=torch.float32, device=query.device)
        here = torch.arange(n_tokens, device=query.device)
        outputs = []
        at_once = max(1, min(_QUERIES_AT_ONCE, _SCORES_AT_ONCE // (n_heads * n_tokens)))
        for start in range(0, n_tokens, at_once):
            block, seen = slice(start, start + at_once), slice(0, start + at_once)
            scores = queries[:, block] @ keys[:, seen].mT * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            scores.masked_fill_(here[None, block, None] < here[None, None, seen], float("-inf"))
            weights = scores.softmax(dim=-1)
            output = weights @ values[:, seen]
            outputs.append(output)
            # Later tokens give a sampled one no weight yet.
            n_sampled = int((sampled < min(start + at_once, n_tokens)).sum())
            if covered and n_sampled:
                past = sampled[:n_sampled]
                beyond = (here[block, None] - past[None] > self._distance).float()
                squared = (weights[:, :, past] * beyond).square()
                lift = _squared_distance(values[:, past], output, gram)
                q = queries[:, block]
                key_sums[:n_sampled] += torch.einsum("hts,htd,hte->shde", squared * lift, q, q)
                value_sums += squared.sum(dim=(1, 2))
        if covered:
            self._add(layer, shared, key_sums * scale**2, value_sums[:, None, None] * gram, n_tokens)
        return torch.cat(outputs, dim=1).transpose(0, 1)[None].to(query.dtype).contiguous(), None

    def _add(self, layer: int, shared: int, key_sums: Tensor, value_sums: Tensor, n_tokens: int) -> None:
        """Un-rotate the sums at the sampled tokens' positions and add them up by key-value head."""
        rope, first = self._geometry.rope, self._geometry.first_kv_head
        positions = self._sampled.to(key_sums.device)
        # R^T M R: the rotation acts on rows and on columns; sampled tokens are the axis that positions run along.
        # Turned back by the angle, not un-rotated: the transpose keeps the factor on cosines that the inverse divides by.
        turned = key_sums.permute(1, 2, 0, 3).contiguous()
        for _ in range(2):
            turned = rope.turn_layer(layer, turned.flatten(0, 1), -positions, n_tokens).view_as(turned)
            turned = turned.transpose(1, 3).contiguous()
        heads = slice(first, first + self._geometry.n_kv_heads)
        size = turned.shape[-1]
        self.keys[layer] += turned.sum(dim=2).view(-1, shared, size, size).sum(dim=1)[heads].double().cpu()
        self.values[layer] += value_sums.view(-1, shared, size, size).sum(dim=1)[heads].double().cpu()


def _squared_distance(values: Tensor, outputs: Tensor, gram: Tensor) -> Tensor:
    """|W (v_s - o_t)|^2 [H, t, s] from values [H, s, D], outputs [H, t, D] and W^T W [H, D, D]."""
    weighted = values @ gram
    of_values = (weighted * values).sum(dim=-1)[:, None, :]
    of_outputs = ((outputs @ gram) * outputs).sum(dim=-1)[:, :, None]
    distance: Tensor = of_values + of_outputs - 2 * outputs @ weighted.mT
    return distance.clamp_min(0)


def _output_gram(module: nn.Module, n_heads: int, head_dim: int) -> Tensor:
    """W^T W [H, D, D] of each head's slice of the output projection; the identity where a model has none of a known name."""
    for name in _OUTPUT_PROJECTIONS:
        projection = getattr(module, name, None)
        weight = getattr(projection, "weight", None)
        if weight is None or weight.dim() != 2:
            continue
        # GPT-2's Conv1D keeps [in, out]; a linear layer [out, in].
        inside = weight if type(projection).__name__ == "Conv1D" else weight.T
        if inside.shape[0] == n_heads * head_dim:
            slices = inside.detach().float().view(n_heads, head_dim, -1)
            gram: Tensor = slices @ slices.mT
            return gram
    return torch.eye(head_dim, dtype=torch.float32).expand(n_heads, head_dim, head_dim)


def _decoder_layers(model: Any, geometry: CacheGeometry) -> list[tuple[nn.Module, int]]:
    """(decoder layer, index in the geometry): the modules that hold the attention modules."""
    modules = dict(model.named_modules())
    found = []
    for path, module in modules.items():
        layer = getattr(module, "layer_idx", None)
        if layer is None or "attention" not in type(module).__name__.lower() or "." not in path:
            continue
        index = int(layer) - geometry.first_layer
        if 0 <= index < geometry.n_layers:
            found.append((modules[path.rsplit(".", 1)[0]], index))
    return found
