"""Launches of kernels, recorded where they are interpreted and compiled for GPUs that need not be there.

Triton decides when it is imported whether it interprets or compiles. So `recorded` runs in a test, and this module is a program of
its own as well: launches as JSON on its standard input, facts about their machine code on its standard output.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

Launch = dict[str, Any]
_TENSOR = "tensor of "


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Every launch while this lasts: kernel, arguments, with dtypes for tensors, and options."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    with pytest.MonkeyPatch.context() as patch:
        for kind in (InterpretedFunction, JITFunction):
            patch.setattr(kind, "run", _recording(kind.run, launches))
        yield launches


def _recording(run: Any, launches: list[Launch]) -> Any:
    def recording(self: Any, *arguments: Any, **options: Any) -> Any:
        described = [_described(argument) for argument in arguments]
        named = {name: _described(option) for name, option in options.items() if name not in ("grid", "warmup")}
        launch = {"module": self.fn.__module__, "name": self.fn.__name__, "arguments": described, "options": named}
        if launch not in launches:
            launches.append(launch)
        return run(self, *arguments, **options)

    return recording


def _described(argument: Any) -> Any:
    return f"{_TENSOR}{argument.dtype}" if isinstance(argument, torch.Tensor) else argument


def compiled(launches: list[Launch], capabilities: list[int]) -> list[dict[str, Any]]:
    """Facts about the machine code of each launch for each GPU, from a process in which Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.triton_launches", *map(str, capabilities)],
        input=json.dumps(launches),
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    facts: list[dict[str, Any]] = json.loads(done.stdout)
    return facts


class _NoDriver:
    """What Triton asks before it compiles: it launches nothing then. Devices go by their capability."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability

    def get_current_stream(self, device: int) -> int:
        return device


def _compile(launch: Launch, capability: int) -> dict[str, Any]:
    from triton.runtime import driver

    driver.set_active(_NoDriver(capability))
    arguments = [
        getattr(torch, argument.removeprefix(f"{_TENSOR}torch.")) if isinstance(argument, str) else argument
        for argument in launch["arguments"]
    ]
    kernel = getattr(importlib.import_module(launch["module"]), launch["name"])
    compiled = kernel.warmup(*arguments, grid=(1,), **launch["options"])
    ptx = compiled.asm["ptx"]
    return {
        "kernel": launch["name"],
        "capability": capability,
        "cubin_bytes": len(compiled.asm["cubin"]),
        "shared_bytes": compiled.metadata.shared,
        "local_memory": len(re.findall(r"\b(?:ld|st)\.local", ptx)),
        "approximate_divisions": len(re.findall(r"\bdiv\.(?:full|approx)", ptx)),
        "fused": len(re.findall(r"\bfma\.", ptx)),
    }


if __name__ == "__main__":
    given = json.load(sys.stdin)
    json.dump([_compile(launch, int(capability)) for capability in sys.argv[1:] for launch in given], sys.stdout)
