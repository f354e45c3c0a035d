"""A decoder of random weights for `gpu.py`: what prefill costs, and one step on top of a cache that was decoded.

RMS norm, grouped-query attention with rotation, SwiGLU, in bfloat16 with torch's own attention. All layers share the weights of
one: what is computed, and what is read of them, is the same (they are far larger than a device's caches).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from gpu_cases import Geometry

MLP_TOKENS = 16384
"""Tokens that the MLP takes at once: its intermediate values of all would take gigabytes."""


class Decoder:
    """Keys and values are kept as [B, H, T, D], one pair a layer."""

    def __init__(self, geometry: Geometry, device: torch.device) -> None:
        self.geometry, self.device = geometry, device
        generator = torch.Generator(device).manual_seed(0)

        def weights(inputs: int, outputs: int) -> Tensor:
            drawn = torch.randn(inputs, outputs, generator=generator, device=device, dtype=torch.bfloat16)
            return drawn / inputs**0.5

        q, kv = geometry.n_heads * geometry.head_dim, geometry.n_kv_heads * geometry.head_dim
        self.embedding = weights(geometry.vocabulary, geometry.hidden)
        self.attention_in = weights(geometry.hidden, q + 2 * kv)
        self.attention_out = weights(q, geometry.hidden)
        self.gate, self.up = (weights(geometry.hidden, geometry.mlp) for _ in range(2))
        self.down = weights(geometry.mlp, geometry.hidden)
        self._splits = (q, kv, kv)

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Ids [B, T] -> logits of the last tokens [B, vocabulary], and keys and values of each layer [B, H, T, D]."""
        hidden = self.embedding[ids]
        turn = self._turn(torch.arange(ids.shape[1], device=self.device))
        caches = []
        for _ in range(self.geometry.n_layers):
            queries, keys, values = self._project(hidden, turn)
            caches.append((keys, values))
            hidden = self._finish(hidden, _attend(queries, keys, values, is_causal=True))
        return self._logits(hidden[:, -1:]), caches

    def embed(self, ids: Tensor) -> Tensor:
        """Ids [B] -> hidden [B, 1, hidden]."""
        return self.embedding[ids[:, None]]

    @torch.inference_mode()
    def layer_step(self, hidden: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """One layer for the last of the cached tokens: its key and value [B, H, T, D] are overwritten with what is computed."""
        last = keys.shape[2] - 1
        queries, key, value = self._project(hidden, self._turn(torch.tensor([last], device=self.device)))
        keys[:, :, last:], values[:, :, last:] = key, value
        return self._finish(hidden, _attend(queries, keys, values, is_causal=False))

    @torch.inference_mode()
    def step(self, ids: Tensor, caches: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Ids [B] of the last cached tokens -> logits [B, vocabulary]."""
        hidden = self.embed(ids)
        for keys, values in caches:
            hidden = self.layer_step(hidden, keys, values)
        return self._logits(hidden)

    def _project(self, hidden: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        normed = rms_norm(hidden, hidden.shape[-1:])
        parts = (normed @ self.attention_in).split(self._splits, dim=-1)
        batch, tokens, _ = hidden.shape
        queries, keys, values = (part.view(batch, tokens, -1, self.geometry.head_dim).transpose(1, 2) for part in parts)
        return _rotate(queries, turn), _rotate(keys, turn), values.contiguous()

    def _finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        hidden = hidden + attended.transpose(1, 2).flatten(2) @ self.attention_out
        flat = hidden.view(-1, hidden.shape[-1])
        for part in flat.split(MLP_TOKENS):
            normed = rms_norm(part, part.shape[-1:])
            part += (silu(normed @ self.gate) * (normed @ self.up)) @ self.down
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        return rms_norm(hidden[:, 0], hidden.shape[-1:]) @ self.embedding.T

    def _turn(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        pairs = torch.arange(0, self.geometry.head_dim, 2, device=self.device)
        angles = positions[:, None] * self.geometry.rope_base ** (-pairs / self.geometry.head_dim)
        return angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, is_causal: bool) -> Tensor:
    return scaled_dot_product_attention(queries, keys, values, is_causal=is_causal, enable_gqa=True)


def _rotate(side: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    cosines, sines = turn
    first, second = side.chunk(2, dim=-1)
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)
