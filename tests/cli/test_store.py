"""The subcommand `store`: what operators see of a store, find wrong with it, and carry elsewhere."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvtc.cli import main
from kvtc.store import open_store
from kvtc.store.frame import FRAME_BYTES

GOLDEN = Path(__file__).parents[1] / "container" / "golden"
STREAMS = [bytes.fromhex(path.read_text()) for path in sorted(GOLDEN.glob("stream_v3*.hex"))]
JOINT = bytes.fromhex((GOLDEN / "stream_v3_joint.hex").read_text())
KEY = "00" * 31 + "01"


def key(number: int, kind: str = "chunk") -> str:
    return f"{kind}/{number:064x}"


def run(capsys: Any, *arguments: object) -> tuple[int, Any]:
    """Exit code, and what --json prints."""
    code = main([*map(str, arguments), "--json", "--quiet"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out) if captured.out else captured.err


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def url(root: Path) -> str:
    """A directory with streams of several kinds, an entry of another namespace, bytes of somebody, and files of others."""
    url = f"file://{root}"
    with open_store(url) as store:
        store.put_many((key(number), stream) for number, stream in enumerate(STREAMS))
        store.put("chats/17", b"anything")
        store.put(key(1, "sort"), b"tokens and points")
    with open_store(url, namespace="other") as store:
        store.put(key(9), JOINT)
    (root / "entries" / "README").write_text("of somebody")
    (root / "entries" / "00").mkdir(exist_ok=True)
    (root / "entries" / "00" / "Not a name.entry").write_text("of somebody")
    return url


def file_of(root: Path, name: str) -> Path:
    (path,) = root.rglob(f"{name.replace('/', '!')}.entry")
    return path


def change(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Put other bytes where an entry lies, used as long ago as before."""
    before = path.stat()
    path.write_bytes(change(path.read_bytes()))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def state_of(root: Path) -> dict[str, tuple[bytes, int]]:
    """All files, their bytes and times, but for the ledger's time."""
    files = [path for path in root.rglob("*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns * (path.name != "ledger")) for path in files}


def flip(frame: bytes, at: int) -> bytes:
    return frame[:at] + bytes([frame[at] ^ 1]) + frame[at + 1 :]


# list


def test_list_says_what_entries_say_of_themselves(capsys, url):
    code, found = run(capsys, "store", "list", url)
    assert code == 0
    assert found["n_entries"] == len(found["entries"]) == len(STREAMS) + 3
    assert found["n_bytes"] == sum(map(len, [*STREAMS, JOINT, b"anything", b"tokens and points"])) + FRAME_BYTES * (
        len(STREAMS) + 3
    )
    by_key = {(entry["namespace"], entry["key"]): entry for entry in found["entries"]}
    joint = by_key["other", key(9)]
    assert (joint["kind"], joint["form"], joint["profile"]) == ("chunk", "stream", "joint")
    assert joint["n_bytes"] == len(JOINT) + FRAME_BYTES
    assert joint["n_tokens"] > 0
    assert joint["first_position"] >= 0
    assert len(joint["calibration"]) == 32
    assert "full attention" in joint["layout"]
    assert 0 <= joint["age_seconds"] < 3600
    assert by_key[None, "chats/17"]["form"] == "bytes"
    assert by_key[None, "chats/17"]["kind"] == "other"
    assert by_key[None, key(1, "sort")]["form"] == "sort"


def test_list_of_a_namespace_and_of_a_prefix(capsys, url):
    assert [entry["key"] for entry in run(capsys, "store", "list", f"{url}?namespace=other")[1]["entries"]] == [key(9)]
    found = run(capsys, "store", "list", url, "--prefix", "chats/")[1]
    assert [entry["key"] for entry in found["entries"]] == ["chats/17"]


def test_list_in_the_order_of_age_and_of_bytes(capsys, root, url):
    os.utime(file_of(root, key(2)), ns=(10**9, 10**9))
    by_age = run(capsys, "store", "list", url, "--sort", "age")[1]["entries"]
    assert by_age[0]["key"] == key(2)
    assert [entry["age_seconds"] for entry in by_age] == sorted((e["age_seconds"] for e in by_age), reverse=True)
    sizes = [entry["n_bytes"] for entry in run(capsys, "store", "list", url, "--sort", "bytes")[1]["entries"]]
    assert sizes == sorted(sizes, reverse=True)


def test_the_text_names_every_entry(capsys, url):
    assert main(["store", "list", url]) == 0
    out = capsys.readouterr().out
    assert f"other={key(9)}" in out
    assert "chats/17" in out
    assert f"{len(STREAMS) + 3} entries" in out


@pytest.mark.parametrize("command", ["list", "verify"])
def test_looking_changes_nothing(capsys, root, url, command):
    (root / "partial" / "left.part").write_bytes(b"of a writer that died")
    before = state_of(root)
    code, _ = run(capsys, "store", command, f"{url}?bytes=4096")
    assert code == 0
    assert state_of(root) == before


@pytest.mark.parametrize("command", ["list", "verify"])
def test_a_store_that_is_not_there_is_one_error(capsys, tmp_path, command):
    code, said = run(capsys, "store", command, f"file://{tmp_path}/nowhere")
    assert code == 1
    assert "there is no such directory" in said
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("memory:", "memory of the process"),
        ("tiered:memory:|file:///x", "one of them"),
        ("file:///x?size=1", "unknown option size"),
        ("nonsense", "expected a scheme"),
    ],
)
def test_other_urls_are_refused(capsys, url, said):
    code, found = run(capsys, "store", "list", url)
    assert code == 1
    assert said in found


# verify


def test_verify_finds_a_sound_store_sound(capsys, url):
    code, found = run(capsys, "store", "verify", url)
    assert code == 0
    assert (found["n_entries"], found["n_damaged"], found["n_foreign"]) == (len(STREAMS) + 3, 0, 0)
    assert found["sound"] == {"stream": len(STREAMS) + 1, "bytes": 1, "sort": 1}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda frame: frame[:-1], "length"),
        (lambda frame: frame[:20], "at least"),
        (lambda frame: frame[:0], "at least"),
        (lambda frame: flip(frame, 0), "magic"),
        (lambda frame: flip(frame, 20), "name"),
        (lambda frame: flip(frame, len(frame) - 1), "checksum"),
    ],
)
@pytest.mark.parametrize("removes", [False, True])
def test_a_damaged_frame_is_found_and_removed_if_asked(capsys, root, url, damage, said, removes):
    path = file_of(root, key(2))
    change(path, damage)
    code, found = run(capsys, "store", "verify", url, *["--remove"] * removes)
    assert code == 1
    assert (found["n_damaged"], found["n_removed"], found["n_foreign"]) == (1, int(removes), 0)
    (fault,) = found["faults"]
    assert (fault["key"], fault["state"], fault["removed"]) == (key(2), "damaged", removes)
    assert said in fault["cause"]
    assert path.exists() is not removes
    with open_store(url) as store:
        assert store.get(key(3)) == STREAMS[3]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (key(70), flip(JOINT, len(JOINT) - 1), "checksum"),
        (key(70), flip(JOINT, 10), "checksum"),
        (key(70), JOINT[:-1], "byte"),
        (key(70), b"no stream", "KVTC"),
        (key(70, "page"), b"", "header"),
        (key(70, "tails"), b"KVTX" + bytes(19), "tails"),
        (key(70, "sort"), b"tokens", "sort"),
        ("chats/18", JOINT[:-1], "byte"),
    ],
)
def test_a_sound_frame_around_what_is_damaged(capsys, url, name, value, said):
    with open_store(url) as store:
        store.put(name, value)
    code, found = run(capsys, "store", "verify", url, "--remove")
    assert code == 1
    (fault,) = found["faults"]
    assert (fault["key"], fault["state"], fault["removed"]) == (name, "damaged", True)
    assert said in fault["cause"]
    assert run(capsys, "store", "verify", url)[0] == 0


def test_what_others_can_read_is_left_alone(capsys, root, url):
    with open_store(url) as store:
        store.put("large", bytes(20_000))
        store.put(key(71), JOINT[:4] + b"\xff" + JOINT[5:])
    change(file_of(root, key(2)), lambda frame: frame[:4] + b"\x02" + frame[5:])
    (root / "entries" / "00" / "link.entry").symlink_to("/etc/hostname")
    before = state_of(root)
    code, found = run(capsys, "store", "verify", f"{url}?entry_bytes=10000", "--remove")
    assert code == 0
    assert (found["n_damaged"], found["n_foreign"]) == (0, 3)
    causes = {fault["key"]: fault["cause"] for fault in found["faults"]}
    assert "frame version 2" in causes[key(2)]
    assert "format version 255" in causes[key(71)]
    assert "up to 10000" in causes["large"]
    assert state_of(root) == before


def test_an_encrypted_store_with_and_without_its_key(capsys, monkeypatch, tmp_path):
    url = f"file://{tmp_path}/secret"
    monkeypatch.setenv("RIGHT", KEY)
    monkeypatch.setenv("WRONG", KEY.replace("1", "2"))
    with open_store(url, key_variable="RIGHT", namespace="tenant") as store:
        store.put(key(1), JOINT)
        store.put(key(2), JOINT[:-1])
    code, found = run(capsys, "store", "verify", f"{url}?key_variable=RIGHT")
    assert (code, found["sound"], found["n_damaged"]) == (1, {"stream": 1}, 1)
    code, found = run(capsys, "store", "verify", url)
    assert (code, found["sound"]) == (0, {"encrypted": 2})
    code, found = run(capsys, "store", "verify", f"{url}?key_variable=WRONG", "--remove")
    assert (code, found["n_foreign"], found["n_removed"]) == (0, 2, 0)
    for options in ("", "?key_variable=RIGHT"):
        listed = run(capsys, "store", "list", url + options)[1]
        assert {entry["form"] for entry in listed["entries"]} == {"encrypted"}
        assert {entry["namespace"] for entry in listed["entries"]} == {"tenant"}
    assert run(capsys, "store", "verify", f"{url}?key_variable=RIGHT", "--remove")[1]["n_removed"] == 1
