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
coders = [lambda name=name: kvtc.Codec(calibration, "paper", lossless=name) for name in ("zstd", "lz4")]
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


def test_the_rooms_are_those_that_contributors_read_of_in_their_order():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rooms = re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE)
    found = {path.stem for path in (ROOT / "src" / "kvtc").iterdir() if path.is_dir() or path.suffix == ".py"}
    assert set(rooms) == {name for name in found if not name.startswith("__")}
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    floors = [layer.split(" | ") for layer in contracts[0]["layers"]]
    floor = {room: number for number, names in enumerate(floors) for room in names}
    assert [floor[room] for room in rooms] == sorted(floor[room] for room in rooms)


def test_modules_that_configurations_name_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`(kvtc(?:\.\w+){3,})`", text)
    assert len(named) == 7
    assert all((ROOT / "src" / Path(*name.split("."))).with_suffix(".py").is_file() for name in named)


def test_no_folder_of_the_package_is_a_drawer():
    folders = {path.parent for path in (ROOT / "src" / "kvtc").rglob("*.py")}
    assert {folder.name: n for folder in folders if (n := len([*folder.glob("[!_]*.py")])) > 15} == {}
