"""Where a number comes from: date, commit, machine, versions and command, stored beside the number."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .. import __version__
from ..display import shown, without_credentials
from ..files import SHARED, write_atomically
from ..strict_json import dumps

SCHEMA_VERSION = 1
"""Of result files (`schema` says what they hold)."""

RESULTS_DIRECTORY = Path("benchmarks/results")

_ABSOLUTE = re.compile(r"(?<![^=,])/[^=,]*")


@dataclass(frozen=True)
class Provenance:
    """Where the numbers of one run come from.

    `commit` is None outside of a checkout of kvtc, and ends in "+changes" where tracked files of
    the package differ from it.
    """

    date: str
    commit: str | None
    machine: str
    n_cores: int
    n_threads: int
    python: str
    torch: str
    kvtc: str
    command: str

    @classmethod
    def now(cls) -> Provenance:
        """The stamp of the running process."""
        import torch

        return cls(
            date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            commit=_commit(),
            machine=_machine(),
            n_cores=os.cpu_count() or 1,
            n_threads=torch.get_num_threads(),
            python=platform.python_version(),
            torch=torch.__version__,
            kvtc=__version__,
            command=shlex.join(map(_public, [*_program(), *sys.argv[1:]])),
        )

    def describe(self) -> str:
        """The stamp in one line."""
        return (
            f"{self.date}, commit {self.commit or 'none'}, {self.machine}, {self.n_threads} of {self.n_cores} cores, "
            f"torch {self.torch}, kvtc {self.kvtc}"
        )


def save_result(name: str, result: Mapping[str, Any], directory: Path = RESULTS_DIRECTORY) -> Path:
    """Write a result and its provenance to `directory`/`name`.json, in place of an older one, and
    return the path.

    Parameters:
        name: the name of the file without its suffix.
        result: the result, of a `kind` that `schema` lists.
        directory: where to write; it is made if it is missing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    stamped = stamp(result)
    write_atomically(path, f"{dumps(stamped)}\n".encode(), SHARED)
    print(shown(f"saved {path}"), file=sys.stderr)
    return path


def stamp(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a result file holds: schema version, provenance, result."""
    return {"schema": SCHEMA_VERSION, "provenance": asdict(Provenance.now()), "result": dict(result)}


def _program() -> list[str]:
    """How the running program is called: a module by its name, a script by its file's."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    if module is None:
        return [Path(sys.argv[0]).name]
    return ["python", "-m", module.name.removesuffix(".__main__")]


def _public(word: str) -> str:
    """A word of a command without passwords, and of absolute paths the name alone: where a file lay
    is nobody's business.
    """
    return _ABSOLUTE.sub(lambda path: Path(path[0]).name, without_credentials(word))


def _commit() -> str | None:
    """The commit of the checkout that this package runs from."""
    package = Path(__file__).parents[1]
    # An installed kvtc may lie inside the checkout of another project: only a repository that tracks it counts.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _git(package, "rev-parse", "--short=12", "HEAD")
    changes = _git(package, "status", "--porcelain", "--untracked-files=no", "--", ".")
    return f"{commit}+changes" if commit and changes else commit


def _git(directory: Path, *arguments: str) -> str | None:
    """What git prints; None if it fails or is not there."""
    try:
        done = subprocess.run(  # noqa: S603
            ["git", "-C", str(directory), *arguments],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _machine() -> str:
    """Processor and GPU in words."""
    import torch

    processor = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        names = [line.partition(":")[2].strip() for line in cpu_info.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    return f"{processor} with {torch.cuda.get_device_name()}" if torch.cuda.is_available() else processor
