"""Time to the first token, for `benchmarks.gpu`: prefill of a random-weight model against decoding
its cache and one step.

A decoder as NeMo and Llama have it, no more than time needs: RMSNorm, grouped-query attention with
rotation, gated MLP.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

import kvtc
from benchmarks.gpu.cases import Shape, caches, calibration_for
from benchmarks.gpu.coding import Case, Setting, decode_all

Layer = tuple[Tensor, Tensor]
Cache = Iterator[Layer]


class Decoder:
    """Weights are random bfloat16. Keys and values of a layer are [B, H, T, D]."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape = shape
        self._generator = torch.Generator(device).manual_seed(0)
        queries, keys = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
        self.embedding = self._random(shape.vocabulary, shape.hidden)
        self.head = self._random(shape.vocabulary, shape.hidden)
        self.layers = [
            {
                "qkv": self._random(queries + 2 * keys, shape.hidden),
                "out": self._random(shape.hidden, queries),
                "gate_up": self._random(2 * shape.mlp, shape.hidden),
                "down": self._random(shape.hidden, shape.mlp),
            }
            for _ in range(shape.n_layers)
        ]

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> Tensor:
        """Ids [B, T] -> logits [B, V] of the next token; keys and values are kept until it returns,
        as serving keeps them.
        """
        turn = self._turn(torch.arange(ids.shape[1], device=ids.device))
        hidden, kept = self.embedding[ids], []
        for weights in self.layers:
            queries, keys, values = self._heads(hidden, weights, turn)
            kept.append((keys, values))
            hidden = self._rest(hidden, weights, self._attend(queries, keys, values, is_causal=True))
        return self._logits(hidden)

    @torch.inference_mode()
    def step(self, ids: Tensor, position: int, cache: Cache) -> Tensor:
        """The next token's ids [B], and each layer's cache when its turn comes -> logits [B, V]."""
        turn = self._turn(torch.tensor([position], device=ids.device))
        hidden = self.embedding[ids[:, None]]
        for weights, (keys, values) in zip(self.layers, cache, strict=True):
            queries, key, value = self._heads(hidden, weights, turn)
            both = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
            hidden = self._rest(hidden, weights, self._attend(queries, *both, is_causal=False))
        return self._logits(hidden)

    def _random(self, *sizes: int) -> Tensor:
        made = torch.empty(sizes, dtype=torch.bfloat16, device=self._generator.device)
        return made.normal_(0, sizes[-1] ** -0.5, generator=self._generator)

    def _turn(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.shape.geometry.rope.tables[0].cos_sin(positions, len(positions))
        return cos.bfloat16(), sin.bfloat16()

    def _heads(
        self, hidden: Tensor, weights: dict[str, Tensor], turn: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        joined = linear(rms_norm(hidden, hidden.shape[-1:]), weights["qkv"])
        heads = joined.unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)
        n, kv = self.shape.n_heads, self.shape.n_kv_heads
        return _turned(heads[:, :n], *turn), _turned(heads[:, n : n + kv], *turn), heads[:, n + kv :].contiguous()

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, is_causal: bool) -> Tensor:
        if queries.device.type != "cuda":
            return scaled_dot_product_attention(queries, keys, values, is_causal=is_causal, enable_gqa=True)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(queries, keys, values, is_causal=is_causal, enable_gqa=True)

    def _rest(self, hidden: Tensor, weights: dict[str, Tensor], attended: Tensor) -> Tensor:
        hidden = hidden + linear(attended.transpose(1, 2).flatten(2), weights["out"])
        gate, up = linear(rms_norm(hidden, hidden.shape[-1:]), weights["gate_up"]).chunk(2, dim=-1)
        return hidden + linear(silu(gate) * up, weights["down"])

    def _logits(self, hidden: Tensor) -> Tensor:
        return linear(rms_norm(hidden[:, -1], hidden.shape[-1:]), self.head)


def _turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def measure_first_token(case: Case, setting: Setting) -> dict[str, Any]:
    """Seconds from what is known (ids, or ids and streams) to the logits of the next token, for
    each batch of the shape.
    """
    shape = setting.shape(case.shape)
    calibration = calibration_for(shape, case.profile, setting.rank(case.rank), setting.device)
    codec, model = setting.codec(calibration, case), Decoder(shape, setting.device)
    batches = []
    for batch in shape.batches:
        streams, ids = [], []
        for sequence in caches(calibration, case.profile, batch, setting.device):
            streams.append(codec.encode(sequence.cache, sequence.token_ids))
            ids.append(sequence.token_ids)
        setting.free()
        batches.append(_measure_batch(model, codec, streams, ids, setting))
        setting.free()
    return {"case": vars(case) | {"rank": setting.rank(case.rank)}, "model": shape.name, "batches": batches}


def _measure_batch(
    model: Decoder, codec: kvtc.Codec, streams: list[bytes], ids: list[Tensor], setting: Setting
) -> dict[str, Any]:
    prompt = torch.stack(ids).to(setting.device)
    following, n_tokens = prompt[:, 0], prompt.shape[1]
    seconds = setting.clock.median
    runs: dict[str, Callable[[], Any]] = {
        "prefill": lambda: model.prefill(prompt),
        "decode_and_step": lambda: model.step(following, n_tokens, zip(*decode_all(codec, streams, ids), strict=True)),
        "streamed_by_layer": lambda: model.step(
            following, n_tokens, layer_by_layer(codec, streams, ids, setting.device)
        ),
    }
    found = {name: seconds(run) for name, run in runs.items()}
    return {
        "sequences": len(ids),
        "tokens": n_tokens,
        **{f"{name}_seconds": value for name, value in found.items()},
        "prefill_over_decode": found["prefill"] / found["decode_and_step"],
        "prefill_over_streamed": found["prefill"] / found["streamed_by_layer"],
    }


def layer_by_layer(codec: kvtc.Codec, streams: list[bytes], ids: list[Tensor], device: torch.device) -> Cache:
    """Layers of a batch as they are restored; on a CUDA device by a stream of its own, one layer
    ahead of the model.
    """
    if device.type != "cuda":
        yield from _layers(codec, streams, ids)
        return
    consumer, producer = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    producer.wait_stream(consumer)
    layers = _layers(codec, streams, ids)
    ahead = _next(layers, producer)
    while ahead is not None:
        (keys, values), ready = ahead
        ahead = _next(layers, producer)
        consumer.wait_event(ready)
        keys.record_stream(consumer)
        values.record_stream(consumer)
        yield keys, values


def _next(layers: Cache, stream: torch.cuda.Stream) -> tuple[Layer, torch.cuda.Event] | None:
    with torch.cuda.stream(stream):
        layer = next(layers, None)
        return None if layer is None else (layer, stream.record_event())


def _layers(codec: kvtc.Codec, streams: list[bytes], ids: list[Tensor]) -> Cache:
    parts = [codec.decode_layers(stream, its) for stream, its in zip(streams, ids, strict=True)]
    for layer in zip(*parts, strict=True):
        yield torch.stack([keys for _, keys, _ in layer]), torch.stack([values for _, _, values in layer])
