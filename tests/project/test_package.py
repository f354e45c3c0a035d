"""The package as a stranger installs it: sdist and wheel are built, looked into, and tried in a fresh environment."""

from __future__ import annotations

import os
import re
import site
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import kvtc

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "src" / "kvtc"
NAME = f"kvtc-{kvtc.__version__}"
LARGE_BYTES = 100_000
# The files that may be large: the reference model and its calibration.
LARGE = {
    "kvtc/reference/kvtc-6m.calibration.safetensors",
    "kvtc/reference/kvtc-6m/model.safetensors",
    "kvtc/reference/kvtc-6m/tokenizer.json",
}

ROUND_TRIP = """
import pathlib, sys, torch, kvtc

assert pathlib.Path(kvtc.__file__).is_relative_to(sys.prefix), kvtc.__file__
calibration = kvtc.reference_calibration()
geometry = calibration.geometry
shape = (geometry.n_layers, geometry.n_kv_heads, 200, geometry.head_dim)
cache = kvtc.KVCache(torch.randn(shape), torch.randn(shape))
codec = kvtc.Codec(calibration, "joint", ratio=16)
restored = codec.decode(codec.encode(cache))
assert torch.equal(restored.keys[:, :, :4], cache.keys[:, :, :4])
assert restored.values.shape == shape
"""


def run(*command: object, environment: dict[str, str] | None = None) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """(sdist, wheel); the wheel is built from the sdist, so that nothing it needs can be missing there."""
    directory = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", directory, ROOT)
    return directory / f"{NAME}.tar.gz", directory / f"{NAME}-py3-none-any.whl"


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """The programs of a fresh environment with the wheel, in which the dependencies are those of this one."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps", built[1])
    (packages,) = environment.glob("lib/python*/site-packages")
    # Only paths of packages: what this environment installs as editable, such as kvtc itself, is not read through them.
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    return environment / "bin"


def files_of_sdist(path: Path) -> dict[str, int]:
    with tarfile.open(path) as file:
        return {member.name.removeprefix(f"{NAME}/"): member.size for member in file if member.isfile()}


def files_of_wheel(path: Path) -> dict[str, int]:
    with zipfile.ZipFile(path) as file:
        return {member.filename: member.file_size for member in file.infolist()}


def test_the_wheel_holds_the_package_and_nothing_else(built):
    found = {name: size for name, size in files_of_wheel(built[1]).items() if ".dist-info/" not in name}
    expected = {str(path.relative_to(SOURCES.parent)) for path in SOURCES.rglob("*") if path.is_file()}
    assert set(found) == {name for name in expected if "__pycache__" not in name}
    assert {name for name, size in found.items() if size > LARGE_BYTES} == LARGE
    assert found.keys() >= {"kvtc/py.typed", "kvtc/backends/triton/decode_kernels.py", "kvtc/coding/rans_kernels.py"}


def test_the_sdist_holds_what_is_installed_and_what_explains_it(built):
    found = files_of_sdist(built[0])
    assert {name.split("/")[0] for name in found} == {
        "src", "docs", "examples", "README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml", "PKG-INFO", ".gitignore",
    }  # fmt: skip
    large = {name for name, size in found.items() if size > LARGE_BYTES and not name.startswith("docs/images/")}
    assert large == {f"src/{name}" for name in LARGE}


def test_the_wheel_works_in_a_fresh_environment(installed):
    # Without the sources of this checkout, which a caller may have put on the path.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    version = run(installed / "python", "-c", "import kvtc; print(kvtc.__version__)", environment=environment)
    assert version.strip() == kvtc.__version__
    assert "subcommands:" in run(installed / "kvtc", "--help", environment=environment)
    run(installed / "python", "-c", ROUND_TRIP, environment=environment)


def test_the_readme_says_which_versions_are_needed_and_which_are_tested():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = [*project["dependencies"], *project["optional-dependencies"]["hf"]]
    least = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", line).groups() for line in required)
    tested = dict(re.findall(r"^([\w-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    words = " ".join(readme.split())
    python = project["requires-python"].removeprefix(">=")
    assert f"It needs Python {python} or newer and PyTorch {least['torch']} or newer" in words
    assert f"needs transformers {least['transformers']} or newer" in words
    assert f"run with PyTorch {tested['torch']} and transformers {tested['transformers']}" in words
