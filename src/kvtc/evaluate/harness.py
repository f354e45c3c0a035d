"""A model class for lm-evaluation-harness whose context always goes through a codec: any task of
the harness measures kvtc.

    python -m kvtc.evaluate.harness --model kvtc --model_args pretrained=reference,profile=conditional,ratio=32 --tasks ...

takes the options of the harness's own command, and its results hold the ratios over all contexts.
The context of every request is prefilled, but for its last token; that cache is encoded and
decoded; and the rest is scored, or generated, on top of it. With codec=none the cache is taken as
it is.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from ..calibration import load_calibration
from ..codec import Codec
from ..errors import InvalidArgument
from ..huggingface.continuation import prefill
from ..process.torch_state import model_torch_state
from ..reference import MODEL_DIRECTORY, reference_calibration
from .methods import Cost, KvtcMethod, restore

REFERENCE = "reference"
MAX_NEW_TOKENS = 256


@register_model("kvtc")
class KvtcLM(TemplateLM):  # type: ignore[misc]
    """A model of lm-evaluation-harness whose contexts go through the codec.

    Parameters:
        pretrained: a directory or hub name of a causal model, or "reference".
        calibration: its calibration file; the reference model has one.
        codec: "kvtc", or "none" for the exact cache.
        dtype: dtype of the weights.
        device: where model and codec run. The harness asks for CUDA by default; the CPU is used
            where it is not there.
        max_length: most tokens of a context and an answer; None: the context of the model.
        codec_options: arguments of `kvtc.Codec`.
    """

    def __init__(
        self,
        pretrained: str = REFERENCE,
        calibration: str | None = None,
        codec: str = "kvtc",
        dtype: str = "auto",
        device: str = "cpu",
        max_length: int | None = None,
        batch_size: int | str = 1,  # noqa: ARG002  the harness passes it to every model; requests are scored one by one
        max_batch_size: int | None = None,  # noqa: ARG002
        **codec_options: Any,
    ) -> None:
        super().__init__()
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if codec not in ("kvtc", "none"):
            raise InvalidArgument(f"codec must be kvtc or none; got {codec!r}")
        if codec == "kvtc" and calibration is None and pretrained != REFERENCE:
            raise InvalidArgument("calibration=FILE is required: only the reference model has one that ships with kvtc")
        source: str | Path = MODEL_DIRECTORY if pretrained == REFERENCE else pretrained
        if device.startswith("cuda") and not torch.cuda.is_available():
            device = "cpu"
        self.model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).to(device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.max_length = int(max_length or self.model.config.max_position_embeddings)
        self._codec: Codec | None = None
        if codec == "kvtc":
            known = reference_calibration() if calibration is None else load_calibration(calibration)
            model = self.model if codec_options.get("profile") == "conditional" else None
            self._codec = Codec(known, device=device, model=model, **codec_options)
        self._costs: list[Cost] = []
        self._latest: tuple[list[int], Any] = ([], None)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results: the ratios over all contexts so far, bytes
        over bytes.
        """
        body_bytes = sum(cost.body_bytes for cost in self._costs)
        total_bytes = sum(cost.total_bytes for cost in self._costs)
        body_original = sum(cost.body_original_bytes for cost in self._costs)
        return {
            "kvtc_contexts": len(self._costs),
            "kvtc_body_ratio": body_original / body_bytes if body_bytes else None,
            "kvtc_total_ratio": sum(cost.original_bytes for cost in self._costs) / total_bytes if total_bytes else None,
        }

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids with the token that begins a text, unless it is asked to be left out."""
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=False)
        bos = self.tokenizer.bos_token_id
        begins = add_special_tokens is False or bos is None or ids[:1] == [bos]
        return ids if begins else [bos, *ids]

    @model_torch_state()
    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows: half of each window is context that goes
        through the codec.
        """
        totals = []
        for request in tqdm(requests, disable=disable_tqdm):
            ids = [self.prefix_token_id, *self.tok_encode(request.args[0], add_special_tokens=False)]
            total, half = 0.0, self.max_length // 2
            for start in range(1, len(ids), half):
                total += self._score(ids[max(0, start - half) : start], ids[start : start + half])[0]
            totals.append(total)
        return totals

    @model_torch_state()
    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, up to the first of the strings that end it."""
        answers = []
        for request in tqdm(requests, disable=disable_tqdm):
            text, options = request.args
            options = dict(options)
            until = options.pop("until", None) or []
            until = [until] if isinstance(until, str) else list(until)
            n_new = int(options.pop("max_gen_toks", MAX_NEW_TOKENS))
            ids = self.tok_encode(text)[-(self.max_length - n_new) :]
            fed = torch.tensor([ids], device=self.model.device)
            stops = {"stop_strings": until, "tokenizer": self.tokenizer} if until else {}
            samples = bool(options.pop("do_sample", False))
            kept = {name: options[name] for name in ("temperature", "top_p", "top_k") if samples and name in options}
            output = self.model.generate(
                fed,
                past_key_values=self._cache(ids[:-1]),
                attention_mask=torch.ones_like(fed),
                max_new_tokens=n_new,
                do_sample=samples,
                pad_token_id=self.eot_token_id,
                **stops,
                **kept,
            )
            answer = self.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
            for stop in until:
                answer = answer.split(stop)[0]
            answers.append(answer)
        return answers

    @model_torch_state()
    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        return [self._score(context, answer) for _, context, answer in tqdm(requests, disable=disable_tqdm)]

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Log-likelihood of a continuation, and whether greedy decoding gives it."""
        context = context[-(self.max_length - len(continuation)) :]
        fed = torch.tensor([[context[-1], *continuation[:-1]]], device=self.model.device)
        wanted = torch.tensor(continuation, device=self.model.device)
        logits = self.model(fed, past_key_values=self._cache(context[:-1])).logits[0].float()
        likelihood = logits.log_softmax(dim=-1).gather(1, wanted[:, None]).sum()
        return float(likelihood), bool((logits.argmax(dim=-1) == wanted).all())

    def _cache(self, ids: list[int]) -> Any:
        """The cache of a context after it went through the codec, to be read on from; None for no
        context.
        """
        if not ids:
            return None
        # The choices of a question follow one another, with one context.
        if self._latest[0] != ids:
            tokens = torch.tensor(ids, device=self.model.device)
            cache = prefill(self.model, tokens)
            if self._codec is not None:
                restored = restore(KvtcMethod(self._codec), self.model, cache, tokens)
                self._costs.append(restored.cost)
                cache = restored.cache
            self._latest = ids, cache
        return copy.deepcopy(self._latest[1])


def main() -> None:
    """The harness's own command, with this model class known to it."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
