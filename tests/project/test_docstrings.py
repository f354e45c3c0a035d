"""What users call says what it takes, returns and raises, and shows it in an example that is run here.

Every example of the package is run, those of the public names and any other. It goes on from the example of the package `kvtc`
itself, which makes a model, its cache, a codec and a stream.
"""

from __future__ import annotations

import ast
import doctest
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import kvtc
from kvtc import errors

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "kvtc"

PUBLIC: dict[str, tuple[str, ...]] = {
    "kvtc": tuple(kvtc._HOME),
    "kvtc.cache_file": ("load_cache", "save_cache"),
    "kvtc.calibration": ("SideCalibration",),
    "kvtc.codec.inspection": ("GroupInfo", "SectionInfo"),
    "kvtc.engines.page_layout": (
        "PageLayout", "cache_dtype", "lmcache_layout", "pack", "sglang_layout", "unpack", "vllm_layout",
    ),
    "kvtc.engines.settings": ("EngineSettings", "worker_shards"),
    "kvtc.evaluate.baselines": (
        "CacheGen", "EvictedKvtc", "Fp8", "Gear", "H2O", "Int4", "Kivi", "Nvfp4", "PlainZstd", "Profile", "Tova", "TurboQuant",
        "Xkv", "baselines",
    ),
    "kvtc.evaluate.baselines.eviction": ("Eviction",),
    "kvtc.evaluate.baselines.stream": ("BodyMethod",),
    "kvtc.evaluate.methods": ("Cost", "KvtcMethod", "Method"),
    "kvtc.evaluate.quality": ("Quality", "evaluate_continuation", "summarize"),
    "kvtc.evaluate.schema": ("ResultFile", "read_result"),
    "kvtc.evaluate.sweep": ("Methods", "Sweep", "Tasks", "Texts", "run_sweep"),
    "kvtc.huggingface.models": ("capture", "geometry_of"),
    "kvtc.huggingface.support": ("GroupSupport",),
    "kvtc.metrics": ("prometheus_text",),
    "kvtc.plan": ("Plan", "load_plan", "run_plan"),
    "kvtc.prefix_cache": ("Chain", "SaveReport", "chunk_key"),
    "kvtc.profiles": ("register",),
    "kvtc.profiles.rates": ("FixedSize", "Lossless", "MaxError", "Ratio", "SideRatios", "Step", "Truncation"),
    "kvtc.store": ("Store", "StoreStatistics", "encrypted", "open_place"),
}  # fmt: skip
"""The names that users may import, by the module that the documentation tells them to import them from."""

WITHOUT_EXAMPLE = {
    "Method": "a protocol, of which KvtcMethod and the baselines are the examples",
    "run_sweep": "takes many seconds; tests/evaluate/test_sweep.py runs it",
    "measure_quality": "takes seconds; tests/codec/test_quality_target.py runs it",
    "register": "changes the process; tests/profiles/test_another_profile.py runs it",
    "Store.resident_many": "differs from get_many on a GPU alone",
}
"""Why there is none. Modules that an engine loads are missing from `PUBLIC`, for the engine calls them, not a user: the programs
tests/engines/*_end_to_end.py run them."""


Definition = ast.ClassDef | ast.FunctionDef


@dataclass(frozen=True)
class Public:
    """A class or function that users call, or a method or property of such a class, as its source has it."""

    name: str
    node: Definition
    owner: str | None = None
    bases: tuple[ast.ClassDef, ...] = ()

    def __str__(self) -> str:
        return self.name

    @property
    def doc(self) -> str:
        return ast.get_docstring(self.node) or ""

    @property
    def decorators(self) -> set[str]:
        return {ast.unparse(decorator).split("(")[0] for decorator in self.node.decorator_list}

    @property
    def function(self) -> ast.FunctionDef | None:
        """Itself, or what makes one of a class."""
        if isinstance(self.node, ast.FunctionDef):
            return self.node
        made = [node for node in self.node.body if isinstance(node, ast.FunctionDef)]
        return next((node for node in made if node.name in ("__init__", "__post_init__")), None)

    @property
    def is_property(self) -> bool:
        return bool(self.decorators & {"property", "cached_property"})

    @property
    def parameters(self) -> list[str]:
        """What a caller may give it, or what a record holds."""
        if "dataclass" in self.decorators:
            fields = [node for one in (*self.bases, self.node) for node in one.body if isinstance(node, ast.AnnAssign)]
            return [ast.unparse(field.target) for field in fields]
        if self.function is None:
            return []
        given = self.function.args
        every = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
        return [one.arg for one in every if one.arg not in ("self", "cls")]

    @property
    def returns(self) -> bool:
        """Whether it returns something. What takes nothing says so in its first sentence."""
        if isinstance(self.node, ast.ClassDef) or not self.parameters:
            return False
        return ast.unparse(self.node.returns) not in ("None", "NoReturn")

    @property
    def raised(self) -> set[str]:
        """The errors of kvtc that it raises in its own lines."""
        raised = [node.exc for node in ast.walk(self.function or ast.Pass()) if isinstance(node, ast.Raise)]
        calls = [ast.unparse(error.func) for error in raised if isinstance(error, ast.Call)]
        return {name for name in calls if hasattr(errors, name)}


@cache
def tree_of(module: str) -> tuple[Path, ast.Module]:
    path = (PACKAGE.parent / Path(*module.split("."))).with_suffix(".py")
    path = path if path.is_file() else path.with_suffix("") / "__init__.py"
    return path, ast.parse(path.read_text(encoding="utf-8"))


def definition(module: str, name: str) -> tuple[str, Definition]:
    """Where a name of a module is defined, and how."""
    if module == "kvtc":
        return definition(f"kvtc.{kvtc._HOME[name]}", name)
    path, tree = tree_of(module)
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            parts = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
            above = parts[: len(parts) - node.level + 1]
            return definition(".".join([*above, *filter(None, [node.module])]), name)
    raise LookupError(f"{module} has no {name}")


def bases_of(module: str, node: ast.ClassDef) -> tuple[ast.ClassDef, ...]:
    """The classes of kvtc that a class inherits from, the first ancestor first."""
    found: tuple[ast.ClassDef, ...] = ()
    for base in node.bases:
        if ast.unparse(base) not in ("ABC", "Protocol"):
            home, its = definition(module, ast.unparse(base))
            assert isinstance(its, ast.ClassDef)
            found += (*bases_of(home, its), its)
    return found


def methods(node: ast.ClassDef, bases: tuple[ast.ClassDef, ...]) -> list[ast.FunctionDef]:
    """The public ones of a class, without those of a base that is public itself or that say there what they do."""
    listed = {name for names in PUBLIC.values() for name in names}
    inherited = functions_of(base for base in bases if base.name in listed)
    found = functions_of([*(base for base in bases if base.name not in listed), node])
    return [one for name, one in found.items() if ast.get_docstring(one) or name not in inherited]


def functions_of(classes: Iterable[ast.ClassDef]) -> dict[str, ast.FunctionDef]:
    functions = [node for one in classes for node in one.body if isinstance(node, ast.FunctionDef)]
    return {function.name: function for function in functions if not function.name.startswith("_")}


def public() -> Iterator[Public]:
    for module, names in PUBLIC.items():
        for name in names:
            home, node = definition(module, name)
            bases = bases_of(home, node) if isinstance(node, ast.ClassDef) else ()
            yield Public(name, node, bases=bases)
            if isinstance(node, ast.ClassDef):
                for method in methods(node, bases):
                    yield Public(f"{name}.{method.name}", method, name)


ALL = list(public())


def section(doc: str, name: str) -> str:
    """The indented lines under `Parameters:`, say."""
    found = re.search(rf"^{name}:\n((?: {{4}}.*\n|\n)+)", doc + "\n", flags=re.MULTILINE)
    return found[1] if found else ""


@pytest.mark.parametrize("one", ALL, ids=str)
def test_a_docstring_says_what_is_taken_returned_and_raised(one):
    assert re.match(r".+?[.:](\n\n|\n?$)", one.doc, flags=re.DOTALL), "expected a sentence first"
    if other := re.match(r"As `([\w.]+)`[.:]", one.doc):
        assert other[1] in [str(another) for another in ALL]
        return
    named = re.findall(r"^ {4}([\w, *]+):", section(one.doc, "Parameters"), flags=re.MULTILINE)
    assert set(one.parameters) - {name.strip(" *") for line in named for name in line.split(",")} == set()
    assert not one.returns or section(one.doc, "Returns")
    assert {name for name in one.raised if not re.search(rf"\b{name}\b", one.doc)} == set()


@pytest.mark.parametrize("one", ALL, ids=str)
def test_a_docstring_has_an_example(one):
    """Of a method, in its class or beside another method; of what a function gives, where it is looked at."""
    if {one.name, one.owner} & WITHOUT_EXAMPLE.keys() or one.doc.startswith("As `"):
        return
    docs = [one.doc] if one.owner is None else [other.doc for other in ALL if one.owner in (other.owner, other.name)]
    code = "\n".join(re.findall(r"^ *(?:>>>|\.\.\.) (.*)$", "\n".join(docs), flags=re.MULTILINE))
    is_class = isinstance(one.node, ast.ClassDef)
    assert code if is_class else re.search(rf"\b{one.node.name}\b", code)


def test_what_has_no_example_is_there():
    assert WITHOUT_EXAMPLE.keys() <= {one.name for one in ALL}
    assert [path for path in re.findall(r"tests/[\w/]+\.py", str(WITHOUT_EXAMPLE)) if not (ROOT / path).is_file()] == []


def docstrings() -> Iterator[tuple[str, str]]:
    """(where, docstring) of each docstring in the package that has an example, but for the one that all go on from."""
    for path in sorted({*PACKAGE.rglob("*.py")} - {PACKAGE / "__init__.py"}):
        text = path.read_text(encoding="utf-8")
        if ">>>" in text:
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    doc, name = ast.get_docstring(node) or "", getattr(node, "name", "module")
                    if ">>>" in doc:
                        yield f"{path.relative_to(PACKAGE)}:{name}", doc


def run(where: str, doc: str, names: dict[str, Any]) -> dict[str, Any]:
    """The names after the example."""
    example = doctest.DocTestParser().get_doctest(doc, names, where, where, 0)
    found: list[str] = []
    doctest.DocTestRunner(verbose=False).run(example, out=found.append, clear_globs=False)
    assert not found, "".join(found)
    return example.globs


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What examples take for granted."""
    pytest.importorskip("transformers")
    return run("kvtc", kvtc.__doc__, {})


@pytest.mark.parametrize(("where", "doc"), [pytest.param(*one, id=one[0]) for one in docstrings()])
def test_example(where, doc, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(where, doc, dict(names))
