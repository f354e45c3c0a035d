"""Promises about the package as a whole."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]

OPTIONAL = ("transformers", "tokenizers", "zstandard", "lz4", "redis", "obstore", "cryptography")

BLOCK_OPTIONAL = f"""
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Block())
"""

WITHOUT_OPTIONAL = """
import torch
import kvtc
import kvtc.store
from kvtc.errors import MissingDependency

calibration = kvtc.reference_calibration()
geometry = calibration.geometry
shape = (geometry.n_layers, geometry.n_kv_heads, 300, geometry.head_dim)
cache = kvtc.KVCache(torch.randn(shape), torch.randn(shape))
codec = kvtc.Codec(calibration, "paper", ratio=16)
restored = codec.decode(codec.encode(cache))
assert restored.keys.shape == shape
coders = [lambda name=name: kvtc.Codec(calibration, "paper", coder=name) for name in ("zstd", "lz4")]
urls = ("redis://localhost", "s3://bucket", "memory:?key_variable=KEY")
stores = [lambda url=url: kvtc.store.open_store(url) for url in urls]
for call in (*coders, *stores, kvtc.reference_model):
    try:
        call()
    except MissingDependency as error:
        assert "pip install" in str(error), error
    else:
        raise SystemExit("a missing package was not noticed")
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_the_core_works_without_any_optional_package():
    done = run(BLOCK_OPTIONAL + WITHOUT_OPTIONAL)
    assert done.returncode == 0, done.stderr


def test_importing_kvtc_imports_nothing_heavy():
    done = run("import sys, kvtc; print([m for m in ('torch', 'numpy', 'numba', 'transformers') if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_stores_import_no_numerics():
    code = "import sys, kvtc.store as s; s.open_store('tiered:memory:'); print([m for m in ('torch', 'numpy') if m in sys.modules])"
    done = run(code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_every_public_name_loads():
    done = run(
        "import kvtc; print(all(getattr(kvtc, name) is not None for name in kvtc.__all__), set(kvtc.__all__) == set(dir(kvtc)))"
    )
    assert done.stdout.split() == ["True", "True"], done.stderr


def contributing() -> str:
    return (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def tree() -> list[tuple[str, str]]:
    """(path, description) of each line of the tree that contributors read; an indented line lies in the one above it."""
    (block,) = re.findall(r"^```text\n(.*?)^```$", contributing(), flags=re.MULTILINE | re.DOTALL)
    found, folders = [], {}
    for line in block.splitlines():
        name, _, description = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        path = folders.get(depth - 1, "") + name
        folders[depth] = path
        found.append((path, description.strip()))
    return found


def test_the_tree_is_short():
    assert len(tree()) <= 60
    assert [line for line in tree() if len(line[1].split()) > 6] == []


def test_the_tree_names_every_module_of_the_first_level_and_every_package():
    package = ROOT / "src" / "kvtc"
    folders = {path.parent for path in package.rglob("*.py")}
    modules = {path for path in package.glob("*.py") if not path.stem.startswith("__")}
    expected = [f"{path.relative_to(ROOT)}/" for path in folders] + [str(path.relative_to(ROOT)) for path in modules]
    paths = [path for path, _ in tree()]
    assert sorted(path for path in paths if path.startswith("src/")) == sorted(expected)
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_tree_is_in_the_order_of_the_layers():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    number = {name: index for index, names in enumerate(layers) for name in names.split(" | ")}
    found = [re.fullmatch(r"src/kvtc/(\w+)(\.py|/)", path) for path, _ in tree()]
    order = [number[match[1]] for match in found if match]
    assert len(order) == len(number)
    assert order == sorted(order)


def test_how_to_add_something_takes_ten_lines_at_most():
    recipes = re.findall(r"^## (How to add .+?)\n\n(.*?)\n\n(?=## )", contributing(), flags=re.MULTILINE | re.DOTALL)
    assert [name for name, _ in recipes] == [
        f"How to add {what}" for what in ("a profile", "a coder", "a store", "an engine", "a baseline")
    ]
    assert [name for name, text in recipes if len(text.splitlines()) > 10] == []


def test_modules_that_configurations_name_are_there():
    named = re.findall(r"`(kvtc(?:\.\w+){3,})`", contributing())
    assert len(named) == 7
    assert all((ROOT / "src" / Path(*name.split("."))).with_suffix(".py").is_file() for name in named)


def test_no_folder_of_the_package_is_a_drawer():
    folders = {path.parent for path in (ROOT / "src" / "kvtc").rglob("*.py")}
    assert {folder.name: n for folder in folders if (n := len([*folder.glob("[!_]*.py")])) > 15} == {}
