"""Files that kvtc writes: whole or not at all, nobody else's to read, and never through somebody else's link."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from kvtc import files
from kvtc.cache_file import save_cache
from kvtc.evaluate.provenance import save_result
from kvtc.files import SHARED, write_atomically
from tests.builders import random_cache


@pytest.fixture
def umask():
    """The usual one, and the way to set another."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.usefixtures("umask")
def test_new_files_are_their_owners_alone(tmp_path, calibration):
    write_atomically(tmp_path / "stream", b"x")
    save_cache(tmp_path / "cache", random_cache(5))
    calibration.save(tmp_path / "calibration")
    assert {path.name: mode(path) for path in tmp_path.iterdir()} == dict.fromkeys(
        ("stream", "cache", "calibration"), 0o600
    )


@pytest.mark.usefixtures("umask")
def test_what_is_made_to_be_shown_has_the_usual_permissions(tmp_path):
    write_atomically(tmp_path / "page", b"x", SHARED)
    assert mode(save_result("speed", {"seconds": 1.5}, tmp_path)) == 0o644
    assert mode(tmp_path / "page") == 0o644


def test_a_stricter_umask_is_respected(tmp_path, umask):
    umask(0o277)
    write_atomically(tmp_path / "private", b"x")
    write_atomically(tmp_path / "shared", b"x", SHARED)
    assert (mode(tmp_path / "private"), mode(tmp_path / "shared")) == (0o400, 0o400)


@pytest.mark.parametrize("permissions", [0o640, 0o604, 0o400])
def test_a_file_that_is_replaced_hands_its_permissions_on(tmp_path, permissions):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    path.chmod(permissions)
    write_atomically(path, b"new")
    assert (path.read_bytes(), mode(path)) == (b"new", permissions)


def test_links_are_replaced_and_never_written_through(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    (tmp_path / "a").symlink_to(victim)
    write_atomically(tmp_path / "a", b"new")
    assert (victim.read_bytes(), (tmp_path / "a").read_bytes()) == (b"mine", b"new")
    assert not (tmp_path / "a").is_symlink()
    # Even a link that stands where the temporary file would be leads nowhere.
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "known")
    (tmp_path / ".b.known.part").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "b", b"new")
    assert victim.read_bytes() == b"mine"
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failure, step):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail(*_):
        raise failure

    monkeypatch.setattr(files.os if step == "fsync" else files.Path, step, fail)
    with pytest.raises(type(failure)) as caught:
        write_atomically(path, b"new")
    assert getattr(caught.value, "filename", str(path)) == str(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_names_as_long_as_the_file_system_takes(tmp_path):
    path = tmp_path / ("n" * 255)
    write_atomically(path, b"x")
    assert path.read_bytes() == b"x"


def test_where_nothing_can_be_written_the_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        write_atomically(tmp_path / "gone" / "a", b"x")
    assert caught.value.filename == str(tmp_path / "gone" / "a")


def test_a_file_of_somebody_else_hands_no_permissions_on(tmp_path, monkeypatch):
    path = tmp_path / "planted"
    path.write_bytes(b"")
    path.chmod(0o666)
    found = path.lstat()
    monkeypatch.setattr(Path, "lstat", lambda _: os.stat_result((*found[:4], found.st_uid + 1, *found[5:10])))
    write_atomically(path, b"private")
    monkeypatch.undo()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
