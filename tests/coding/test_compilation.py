"""Compiled functions where numba may keep them on disk, and where it may not."""

from __future__ import annotations

import pytest
from numba.core import caching

from kvtc.coding.compilation import _CacheFiles, compiled


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


def test_two_processes_that_fill_a_cache_at_once_never_mix_their_code(tmp_path, monkeypatch):
    """Both see an empty index before either has written; numba's own files give the one code for the other then."""
    one, other = (_CacheFiles(str(tmp_path), "kernel", (1.0, 2)) for _ in range(2))
    one.save(("float32",), "code of float32")
    with monkeypatch.context() as patch:
        patch.setattr(other, "_load_index", dict)
        other.save(("float64",), "code of float64")
    assert one.load(("float32",)) in ("code of float32", None)
    assert one.load(("float64",)) == "code of float64"
    one.save(("float32",), "code of float32")
    assert other.load(("float32",)) == "code of float32"
    assert other.load(("float64",)) == "code of float64"
    # A file of before, of another source, is never taken for code of this one.
    assert _CacheFiles(str(tmp_path), "kernel", (3.0, 2)).load(("float64",)) is None


def test_every_compiled_function_has_such_a_cache():
    assert isinstance(compiled()(double)._cache._cache_file, _CacheFiles)
