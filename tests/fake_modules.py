"""Packages that are not installed, as modules with given names in them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def fake_modules(modules: Mapping[str, Mapping[str, Any]], adapters: Sequence[str]) -> Iterator[None]:
    """Put modules, by path, in place of a package; adapters: modules that import it, forgotten afterwards."""
    packages = {path.split(".")[0] for path in modules}
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] in packages}
    added = []
    for path, contents in modules.items():
        parts = path.split(".")
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            if name not in sys.modules:
                sys.modules[name] = ModuleType(name)
                added.append(name)
        vars(sys.modules[path]).update(contents)
    try:
        yield
    finally:
        for name in (*added, *adapters):
            sys.modules.pop(name, None)
            package, _, child = name.rpartition(".")
            if package in sys.modules:  # `from package import child` finds it there too
                vars(sys.modules[package]).pop(child, None)
        sys.modules.update(before)
