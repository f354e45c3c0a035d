"""Promises about the package as a whole."""

import subprocess
import sys

OPTIONAL = ("transformers", "tokenizers", "matplotlib", "zstandard", "lz4", "redis", "obstore", "cryptography")

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
