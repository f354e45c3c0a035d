"""Compiled functions where numba may keep them on disk, and where it may not."""

from __future__ import annotations

import pytest
from numba.core import caching

from kvtc.coding.compilation import compiled


def double(x):
    return 2 * x


def test_a_function_is_kept_on_disk_for_the_next_process():
    assert not isinstance(compiled()(double)._cache, caching.NullCache)


def test_without_a_directory_for_it_a_function_is_compiled_all_the_same(monkeypatch):
    """A package in a directory that its user may not write to, and a user without one of their own."""
    for implementation in (caching.CompileResultCacheImpl, caching.CodeLibraryCacheImpl):
        monkeypatch.setattr(implementation, "_locator_classes", [])
    function = compiled(nogil=True)(double)
    assert isinstance(function._cache, caching.NullCache)
    assert function(21) == 42
    assert function.targetoptions["error_model"] == "numpy"


def test_an_error_of_the_compiler_is_not_hidden():
    with pytest.raises(TypeError):
        compiled()(7)
