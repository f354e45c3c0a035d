"""Every snippet of the guides: run, or marked with what it needs, its options checked.

A snippet in Python without a mark is run as it stands, in an empty directory, with the names that its page takes for granted. All
others say in a comment above them what they need: `<!-- needs: vLLM; run by tests/engines/vllm_end_to_end.py -->`.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import kvtc
from kvtc.engines.lmcache.settings import LmcacheSettings
from kvtc.engines.settings import PREFIX
from kvtc.reference import MODEL_DIRECTORY
from kvtc.store import open_store

ROOT = Path(__file__).parents[2]
PAGES = [
    *sorted((ROOT / "docs/guides").glob("*.md")),
    *(ROOT / f"docs/{name}.md" for name in ("calibration", "concepts", "prefix_cache", "stores")),
    ROOT / "README.md",
]
FENCE = re.compile(
    r"(?:<!-- needs: (?P<needs>.+?) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
N_IDS = 700


@dataclass(frozen=True)
class Snippet:
    """needs: as marked, or None."""

    page: str
    line: int
    language: str
    needs: str | None
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def snippets() -> Iterator[Snippet]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in FENCE.finditer(text):
            line = text.count("\n", 0, found.start("code"))
            yield Snippet(page.name, line, found["language"], found["needs"], found["code"])


ALL = list(snippets())
RUN = [snippet for snippet in ALL if snippet.needs is None]
CONFIGURED = [snippet for snippet in ALL if f"{PREFIX}calibration" in snippet.code and snippet.language != "python"]


def test_what_is_not_run_says_what_it_needs():
    assert [str(snippet) for snippet in RUN if snippet.language != "python"] == []
    for snippet in ALL:
        for script in re.findall(r"tests/[\w/]+\.py", snippet.needs or ""):
            assert (ROOT / script).is_file(), f"{snippet} names {script}"


def test_there_are_snippets_of_every_page():
    assert {snippet.page for snippet in ALL} == {page.name for page in PAGES}
    assert {snippet.page for snippet in RUN} >= {
        "README.md",
        "calibration.md",
        "concepts.md",
        "prefix_cache.md",
        "stores.md",
        "vllm.md",
    }


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """An empty directory, in which places that snippets name lie too. Calibrating is cut short: one profile on a few texts."""
    (tmp_path / "kvtc.key").write_text("0123456789abcdef" * 4)
    monkeypatch.setenv("KVTC_STORE_KEY", "fedcba9876543210" * 4)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kvtc, "calibrate", partial(kvtc.calibrate, profiles=("paper",), progress=False), raising=False)
    return tmp_path


def names_of(page: str) -> dict[str, Any]:
    """What a page takes for granted."""
    if page == "stores.md":
        return {"stream": b"stream", "key": bytes(range(32))}
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(4, 4096, (80,), generator=generator) for _ in range(6)]
    if page in ("vllm.md", "calibration.md"):
        return {"kvtc": kvtc, "model": tiny_model(), "token_sequences": sequences}
    model, _ = kvtc.reference_model(dtype="bfloat16")
    token_ids = torch.arange(N_IDS)[None] % 1000
    with torch.no_grad():
        cache = model(token_ids, use_cache=True).past_key_values
    names = {"kvtc": kvtc, "path": str(MODEL_DIRECTORY), "token_sequences": sequences}
    names |= {"model": model, "token_ids": token_ids, "cache": cache}
    if page == "concepts.md":
        codec = kvtc.Codec(kvtc.reference_calibration())
        prompt_ids = torch.cat([token_ids, token_ids[:, :1]], dim=1)
        names |= {"codec": codec, "stream": codec.encode(cache, token_ids), "prompt_ids": prompt_ids}
    return names


def tiny_model() -> Any:
    """A model of 8 key-value heads, with random weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=4096, **sizes))


@pytest.mark.parametrize("snippet", [snippet for snippet in RUN if snippet.language == "python"], ids=str)
def test_snippet_runs(snippet, place):
    for package in ("transformers", "obstore", "redis", "cryptography"):
        pytest.importorskip(package)
    code = snippet.code.replace("/var/cache/kvtc", f"{place}/store").replace("/etc/kvtc.key", f"{place}/kvtc.key")
    exec(compile(code, str(snippet), "exec"), names_of(snippet.page))  # noqa: S102  the project's own pages


def objects(value: Any) -> Iterator[dict[str, Any]]:
    """All objects in an object, itself first."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from objects(item)


def configurations(snippet: Snippet) -> Iterator[Any]:
    """What JSON or YAML there is in a snippet."""
    if snippet.language == "json":
        yield json.loads(snippet.code)
    elif snippet.language == "yaml":
        yield pytest.importorskip("yaml").safe_load(snippet.code)
    else:
        yield from (json.loads(word) for word in shlex.split(snippet.code) if word.startswith("{"))


@pytest.mark.parametrize("snippet", CONFIGURED, ids=str)
def test_options_are_those_that_kvtc_reads(snippet, place):
    found = [o for config in configurations(snippet) for o in objects(config) if f"{PREFIX}calibration" in o]
    assert found
    for options in found:
        options.pop(f"{PREFIX}attention_backend", None)
        needs_store = options.get("type") != "kvtc"
        settings = LmcacheSettings.from_config(options, needs_store=needs_store)
        if needs_store:
            open_store(settings.store.replace("/var/cache/kvtc", f"{place}/store")).close()
