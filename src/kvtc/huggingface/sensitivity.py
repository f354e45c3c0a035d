"""How strongly a model's predictions depend on each key and value: gradients of its own log-likelihood.

A text is cut in two. The model reads the first part without gradients, and its cache becomes a leaf. It reads the second part on
top of that. A label is drawn at every position from the model's own distribution, and one backward pass gives the gradient g of
the labels' summed log-likelihood by every cached key and value. Because labels are drawn from the model, E[g g^T] is the Fisher
information: to second order, an error e of a key or value costs e^T E[g g^T] e / 2 nats of divergence. Gradients of keys are
un-rotated, for errors are made in un-rotated keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cache import CacheGeometry, KVCache, sides_of_layer
from ..calibration.gradients import GradientSample
from ..coding.transform import rows_of
from ..errors import InvalidArgument, UnsupportedModel
from ..process.torch_state import evaluation_mode, gradients, model_torch_state, neutral_torch_state
from .continuation import prefill
from .models import capture_groups, captured, window_rows
from .window_rows import WindowRows

READ_SHARE = 0.75
"""Of a text that is cached; the rest is predicted."""
_MOST_PASSES = 64
_LEAST_TOKENS = 4
_SAMPLED_TOKENS, _SAMPLED_BYTES = 256, 1 << 30
"""Of a pass, and of all: memory."""


class Sensitivity:
    """What calibration gathers of a model besides its caches, for the metric and steps by token of `joint` and `conditional`.

    `calibrate` calls `capture` for each sequence, and `sample` once when all caches are captured; `state` and `resume`
    keep what was gathered.

    Parameters:
        model: a transformers causal LM.
        geometries: the layers and heads that are measured, group by group.
        sink_tokens: earlier tokens are left out.
        seed: of the labels.
    """

    @neutral_torch_state
    def __init__(self, model: Any, geometries: Sequence[CacheGeometry], sink_tokens: int, seed: int = 0) -> None:
        self.n_passes = 0
        self._model = model
        self._geometries = list(geometries)
        self._sink_tokens = sink_tokens
        self._generator = torch.Generator().manual_seed(seed)
        self._parts: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in self._geometries]
        row_bytes = 4 * sum(geometry.joint_features for geometry in self._geometries)
        self._n_sampled = max(1, min(_SAMPLED_TOKENS, _SAMPLED_BYTES // (_MOST_PASSES * row_bytes)))

    def capture(self, token_ids: Tensor) -> list[KVCache]:
        """The cache of one sequence, [T] int64, by group; gradients are taken from the first 64 that are long enough.

        Time: a forward pass, and a backward pass from the last quarter of the tokens. Memory: the activations of that quarter.

        Raises:
            UnsupportedModel: for a model that gives no gradients.
        """
        if self.n_passes == _MOST_PASSES or not self._is_enough(len(token_ids)):
            return capture_groups(self._model, token_ids, self._geometries)
        n_read = int(READ_SHARE * len(token_ids))
        windows = window_rows(self._model, self._geometries)
        cached, leaves = self._passes(token_ids, n_read, windows)
        for geometry, parts, its in zip(self._geometries, self._parts, leaves, strict=True):
            parts.append(self._sampled(geometry, its, n_read))
        self.n_passes += 1
        if any(geometry.rope.depends_on_length for geometry in self._geometries):
            # Read in two parts, its keys are rotated for two lengths.
            return capture_groups(self._model, token_ids, self._geometries)
        return [captured(self._model, cached, len(token_ids), geometry, windows) for geometry in self._geometries]

    @neutral_torch_state
    def samples(self) -> list[GradientSample]:
        """Of each group tokens from every pass, with their gradients.

        Raises:
            InvalidArgument: where no sequence was long enough.
        """
        if not self.n_passes:
            needed = next(n for n in count() if self._is_enough(n))
            raise InvalidArgument(
                f"the metric of joint and conditional needs a text of {needed} tokens or more; the profile paper needs none"
            )
        found = []
        for number, geometry in enumerate(self._geometries):
            rows, directions, sizes = (torch.cat(parts) for parts in zip(*self._parts[number], strict=True))
            self._parts[number] = [(rows, directions, sizes)]  # and not a second copy beside
            n_heads = geometry.n_layers * geometry.n_kv_heads
            found.append(GradientSample(rows, directions, sizes, n_heads, geometry.dims))
        return found

    def state(self) -> dict[str, Tensor]:
        """All that was gathered; `resume` reads it."""
        found = {}
        for number, its in enumerate(self.samples() if self.n_passes else ()):
            its_own = {"rows": its.rows, "directions": its.directions, "sizes": its.sizes}
            found.update({f"gradients{number}.{name}": tensor for name, tensor in its_own.items()})
        return found | {"n_passes": torch.tensor([self.n_passes]), "generator": self._generator.get_state()}

    def resume(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state` of the same model."""
        self.n_passes = int(state["n_passes"])
        self._generator.set_state(state["generator"])
        for number in range(len(self._parts) if self.n_passes else 0):
            rows, directions, sizes = (state[f"gradients{number}.{name}"] for name in ("rows", "directions", "sizes"))
            self._parts[number] = [(rows, directions, sizes)]

    def _is_enough(self, n_tokens: int) -> bool:
        n_read = int(READ_SHARE * n_tokens)
        return min(n_read - self._sink_tokens, n_tokens - n_read) >= _LEAST_TOKENS

    def _passes(
        self, token_ids: Tensor, n_read: int, windows: WindowRows | None
    ) -> tuple[Any, list[list[tuple[Tensor, Tensor]]]]:
        """The whole cache, and the read part's keys and values [1, H, T, D] of the measured layers with their gradients.

        They are of each group, layer by layer; of a window its last tokens.
        """
        model = self._model
        ids = token_ids.to(model.get_input_embeddings().weight.device)
        frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with model_torch_state(), evaluation_mode(model):
            cached = prefill(model, ids[:n_read], windows and windows.cache)
            leaves = [[_leaves(cached.layers[index]) for index in its.layers] for its in self._geometries]
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
    def _sampled(
        self, geometry: CacheGeometry, leaves: list[tuple[Tensor, Tensor]], n_read: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, directions and sizes of a `GradientSample` from one pass."""
        if any(side.grad is None for sides in leaves for side in sides):
            raise self._no_gradients()
        start = n_read - leaves[0][0].shape[2]
        first = max(self._sink_tokens, start)
        n_sampled = min(self._n_sampled, n_read - first)
        spaced = np.linspace(first, n_read - 1, n_sampled).round().astype(np.int64)
        positions = torch.from_numpy(spaced)
        heads = slice(geometry.first_kv_head, geometry.first_kv_head + geometry.n_kv_heads)

        def rows(sides: list[Tensor]) -> Tensor:
            return torch.stack([side[0, heads][:, positions - start].float().cpu() for side in sides])

        keys, values = (rows([sides[index].detach() for sides in leaves]) for index in (0, 1))
        of_keys, of_values = (rows([sides[index].grad for sides in leaves]) for index in (0, 1))  # type: ignore[misc]
        plain = rows_of(geometry.rope.unrotate(keys, positions, n_read))
        # Turned back by the angle, not un-rotated: the transpose keeps the factor on cosines that the inverse divides by.
        turned = rows_of(
            torch.stack([geometry.rope.turn_layer(i, side, -positions, n_read) for i, side in enumerate(of_keys)])
        )
        gradients = torch.cat([turned, rows_of(of_values)], dim=1)
        sizes = gradients.norm(dim=1)
        directions = gradients / sizes[:, None].clamp_min(torch.finfo(torch.float32).tiny)
        limit = torch.finfo(torch.float16).max
        joint = torch.cat([plain, rows_of(values)], dim=1).clamp(-limit, limit)
        return joint.half(), directions.half(), sizes

    def _no_gradients(self) -> UnsupportedModel:
        return UnsupportedModel(
            f"{type(self._model).__name__} gives no gradients by its cache, which joint and conditional need; "
            'calibrate for the profile paper alone (profiles=("paper",))'
        )


def _leaves(layer: Any) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer, which become leaves."""
    layer.keys, layer.values = (side.detach().clone().requires_grad_() for side in (layer.keys, layer.values))
    return sides_of_layer(layer.keys, layer.values)
