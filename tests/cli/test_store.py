"""The subcommand `store`: what operators see of a store, find wrong with it, and carry elsewhere."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import stat
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kvtc
from kvtc.cli import main
from kvtc.cli.models import load_tokenizer
from kvtc.cli.texts import token_ids_of
from kvtc.demo.run import CONVERSATION
from kvtc.entries import Entries
from kvtc.errors import CorruptStream, StoreFull, StoreUnavailable, TruncatedStream, UnsupportedVersion
from kvtc.maintenance.archive import import_entries
from kvtc.prefix_cache import PrefixCache
from kvtc.prefix_cache.tails import parse_index
from kvtc.store import open_place, open_store
from kvtc.store.frame import FRAME_BYTES
from kvtc.store.place import PlaceView

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
        store.put(key(1, "sort"), b"tokens and points 512")
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
    assert found["n_bytes"] == sum(map(len, [*STREAMS, JOINT, b"anything", b"tokens and points 512"])) + FRAME_BYTES * (
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
        (key(70, "window"), b"no stream", "KVTC"),
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


# size


def test_size_says_whose_the_bytes_are(capsys, url):
    code, found = run(capsys, "store", "size", f"{url}?bytes=10MB")
    assert code == 0
    assert (found["n_entries"], found["budget_bytes"]) == (len(STREAMS) + 3, 10_000_000)
    assert found["n_charged"] == 4096 * (len(STREAMS) + 3)
    assert sum(owner["n_bytes"] for owner in found["owners"]) == found["n_bytes"]
    assert [owner["n_bytes"] for owner in found["owners"]] == sorted(
        (o["n_bytes"] for o in found["owners"]), reverse=True
    )
    (other,) = [owner for owner in found["owners"] if owner["namespace"] == "other"]
    assert (other["kind"], other["profile"], other["n_entries"]) == ("chunk", "joint", 1)
    assert "layers" in other["layout"]
    assert run(capsys, "store", "size", f"{url}?namespace=other")[1]["n_entries"] == 1


# evict


@pytest.fixture
def aged(tmp_path) -> tuple[str, Path]:
    """Ten entries of one block each, used 0, 100, .. 900 seconds ago, and one of two blocks used 900 seconds ago."""
    root = tmp_path / "aged"
    with open_store(f"file://{root}") as store:
        for number in range(10):
            store.put(f"e/{number}", bytes(1000))
        store.put("e/large", bytes(5000))
    now = time.time_ns()
    for name, age in [*((f"e/{number}", 100 * number) for number in range(10)), ("e/large", 900)]:
        os.utime(file_of(root, name), ns=(now - age * 10**9,) * 2)
    return f"file://{root}", root


def kept(url: str, **options: Any) -> list[str]:
    with open_store(url, **options) as store:
        return sorted(key.removeprefix("e/") for key in list(store.keys()))


@pytest.mark.parametrize(
    ("options", "removed"),
    [
        (["--bytes", "48KiB"], []),
        (["--bytes", "45000"], ["large"]),
        (["--bytes", "40KiB"], ["large"]),
        (["--bytes", "32KiB"], ["large", "9", "8"]),
        (["--bytes", "0"], ["large", *map(str, range(9, -1, -1))]),
        (["--older-than", "650s"], ["large", "9", "8", "7"]),
        (["--older-than", "13min"], ["large", "9", "8"]),
        (["--older-than", "1h"], []),
        (["--older-than", "850s", "--bytes", "32KiB"], ["large", "9", "8"]),
        (["--bytes", "0", "--prefix", "e/1"], ["1"]),
    ],
)
@pytest.mark.parametrize("is_dry_run", [False, True])
def test_evict_in_the_order_of_the_store(capsys, aged, options, removed, is_dry_run):
    url, _ = aged
    code, found = run(capsys, "store", "evict", url, *options, *["--dry-run"] * is_dry_run)
    assert code == 0
    assert [entry["key"].removeprefix("e/") for entry in found["removed"]] == removed
    gone = [] if is_dry_run else removed
    assert kept(url) == sorted({*map(str, range(10)), "large"} - set(gone))


def test_evict_agrees_with_the_store_itself(capsys, aged, tmp_path):
    url, root = aged
    shutil.copytree(root, tmp_path / "copy")
    for copied in (tmp_path / "copy").rglob("*.entry"):
        shutil.copystat(root / copied.relative_to(tmp_path / "copy"), copied)
    open_store(f"file://{tmp_path}/copy?bytes=33000").close()  # evicts until a tenth of the budget is free
    run(capsys, "store", "evict", url, "--bytes", "29700")
    assert kept(url) == kept(f"file://{tmp_path}/copy")


def test_evict_leaves_others_alone(capsys, root, url):
    change(file_of(root, key(2)), lambda frame: frame[:4] + b"\x02" + frame[5:])
    change(file_of(root, key(3)), lambda frame: flip(frame, 0))
    others = [root / "entries" / "README", root / "entries" / "00" / "Not a name.entry"]
    code, found = run(capsys, "store", "evict", f"{url}?namespace=other", "--bytes", "0")
    assert (code, found["n_removed"], found["n_entries"]) == (0, 1, 0)
    code, found = run(capsys, "store", "evict", url, "--bytes", "0")
    assert (code, found["n_left_alone"], found["n_entries"]) == (0, 2, 2)
    assert all(path.exists() for path in [*others, file_of(root, key(2)), file_of(root, key(3))])
    assert len(list(root.rglob("*.entry"))) == 3


@pytest.mark.parametrize("options", [[], ["--bytes", "much"], ["--older-than", "7"], ["--older-than", "-1d"]])
def test_evict_needs_to_know_what(capsys, aged, options):
    assert main(["store", "evict", aged[0], *options]) == 2
    capsys.readouterr()
    assert len(kept(aged[0])) == 11


# doctor


def told(capsys: Any, url: str) -> tuple[int, dict[str, tuple[bool, str]]]:
    code, found = run(capsys, "store", "doctor", url)
    assert found["is_right"] is (code == 0)
    return code, {one["what"]: (one["is_right"], one["told"]) for one in found["findings"]}


def test_doctor_finds_a_sound_store_right(capsys, root, url):
    before = state_of(root)
    code, found = told(capsys, f"{url}?bytes=1MB")
    assert code == 0, found
    assert {"permissions", "free disk", "budget", "clock of the directory", "lock"} <= found.keys()
    assert found["files of others among the entries"][1].startswith("1, such as Not a name.entry")
    assert state_of(root) == before


def make_wrong(root: Path, what: str) -> None:
    if what == "permissions":
        (root / "entries").chmod(0o755)
    elif what == "files of writers that died":
        (root / "partial" / "left.part").write_bytes(bytes(100))
    elif what == "entries of unknown versions":
        change(file_of(root, key(2)), lambda frame: frame[:4] + b"\x02" + frame[5:])
    elif what == "entries that begin damaged":
        change(file_of(root, key(2)), lambda frame: frame[:30])
    elif what == "clock of the directory":
        raw = (root / "ledger").read_bytes()
        (root / "ledger").write_bytes(raw[:8] + (time.time_ns() + 10**12).to_bytes(8, "little") + raw[16:])
    elif what == "entries from the future":
        os.utime(file_of(root, key(2)), ns=(time.time_ns() + 10**12,) * 2)
    elif what == "count in the ledger":
        raw = (root / "ledger").read_bytes()
        (root / "ledger").write_bytes(raw[:16] + (4096).to_bytes(8, "little"))


@pytest.mark.parametrize(
    "what",
    [
        "permissions",
        "files of writers that died",
        "entries of unknown versions",
        "entries that begin damaged",
        "clock of the directory",
        "entries from the future",
        "count in the ledger",
    ],
)
def test_doctor_names_what_is_wrong(capsys, root, url, what):
    make_wrong(root, what)
    code, found = told(capsys, url)
    assert code == 1
    assert [name for name, (is_right, _) in found.items() if not is_right] == [what]


def test_doctor_of_a_budget_that_is_exceeded_and_one_beyond_the_disk(capsys, url):
    assert told(capsys, f"{url}?bytes=5000")[1]["budget"] == (
        False,
        f"{4096 * (len(STREAMS) + 4):,} of 5,000 bytes in use",
    )
    is_right, said = told(capsys, f"{url}?bytes=900TB")[1]["free disk"]
    assert not is_right
    assert "too few for the rest of the budget" in said


def test_doctor_of_a_root_that_anyone_may_write_to(capsys, root, url):
    root.chmod(0o755)
    assert told(capsys, url)[0] == 0
    root.chmod(0o777)
    assert "any user may write to store" in told(capsys, url)[1]["permissions"][1]


def test_doctor_of_a_lock_that_somebody_holds(capsys, root, url):
    with (root / "ledger").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        code, found = told(capsys, f"{url}?timeout=0.5")
    assert code == 1
    assert "locked by another process" in found["lock"][1]


# export and import


def test_a_whole_store_goes_elsewhere_in_one_file(capsys, url, tmp_path):
    file, target = tmp_path / "all.kvta", f"file://{tmp_path}/target"
    code, found = run(capsys, "store", "export", url, "-o", file)
    assert (code, found["n_entries"], found["left_out"]) == (0, len(STREAMS) + 2, {})
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    code, found = run(capsys, "store", "import", target, file)
    assert (code, found["n_written"], found["n_there"]) == (0, len(STREAMS) + 2, 0)
    with open_store(url) as before, open_store(target) as after:
        keys = sorted(before.keys())
        assert sorted(after.keys()) == keys
        assert after.get_many(keys) == before.get_many(keys)
    assert run(capsys, "store", "import", target, file)[1] == {
        "n_written": 0,
        "n_there": len(STREAMS) + 2,
        "written_bytes": 0,
    }


def test_export_of_a_prefix_keeps_the_order_of_use(capsys, aged, tmp_path):
    url, _ = aged
    file, target = tmp_path / "some.kvta", f"file://{tmp_path}/target"
    assert run(capsys, "store", "export", url, "-o", file, "--prefix", "e/")[1]["n_entries"] == 11
    run(capsys, "store", "import", target, file)
    by_age = [run(capsys, "store", "list", its, "--sort", "age")[1]["entries"] for its in (url, target)]
    assert [entry["key"] for entry in by_age[0]][2:] == [entry["key"] for entry in by_age[1]][2:]


def test_export_leaves_out_what_is_damaged_and_says_so(capsys, root, url, tmp_path):
    change(file_of(root, key(2)), lambda frame: flip(frame, len(frame) - 1))
    with open_store(url) as store:
        store.put(key(60), JOINT[:-1])
    code, found = run(capsys, "store", "export", url, "-o", tmp_path / "x")
    assert (code, found["n_entries"], found["left_out"]) == (1, len(STREAMS) + 1, {"damaged": 2})
    assert run(capsys, "store", "import", f"file://{tmp_path}/target", tmp_path / "x")[0] == 0


def test_encrypted_entries_are_carried_with_and_without_the_key(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("RIGHT", KEY)
    url, key_too = f"file://{tmp_path}/secret", "?key_variable=RIGHT"
    with open_store(url + key_too) as store:
        store.put(key(1), JOINT)
    for given, file in (("", tmp_path / "sealed"), (key_too, tmp_path / "clear")):
        assert run(capsys, "store", "export", url + given, "-o", file)[1]["n_entries"] == 1
        assert (JOINT in file.read_bytes()) is bool(given)
    code, said = run(capsys, "store", "import", f"file://{tmp_path}/a{key_too}", tmp_path / "sealed")
    assert (code, "leave the key out" in said) == (1, True)
    for given, file in (("", "sealed"), (key_too, "clear")):
        target = f"file://{tmp_path}/target-{file}"
        assert run(capsys, "store", "import", target + given, tmp_path / file)[1]["n_written"] == 1
        with open_store(target + key_too) as store:
            assert store.get(key(1)) == JOINT


@pytest.fixture
def exported(capsys, tmp_path) -> Path:
    """A file with three entries."""
    with open_store(f"file://{tmp_path}/few") as store:
        store.put_many([(key(1), JOINT), ("chats/1", bytes(9000)), ("chats/2", b"")])
    run(capsys, "store", "export", f"file://{tmp_path}/few", "-o", tmp_path / "few.kvta")
    return tmp_path / "few.kvta"


def test_the_budget_of_the_target_holds(capsys, exported, tmp_path):
    target = f"file://{tmp_path}/target"
    with open_store(target) as store:
        for number in range(10):
            store.put(f"old/{number}", bytes(1000))
    code, said = run(capsys, "store", "import", f"{target}?bytes=16KiB", exported)
    assert (code, "by the byte budget" in said) == (1, True)
    assert len(kept(target)) <= 4  # as a store with this budget does when it is opened
    code, found = run(capsys, "store", "import", f"{target}?bytes=24KiB", exported)
    assert (code, found["n_written"]) == (0, 3)
    assert {key(1), "chats/1", "chats/2"} <= set(kept(target))
    assert sum(-(-path.stat().st_size // 4096) * 4096 for path in (tmp_path / "target").rglob("*.entry")) <= 24 << 10


def record(name: bytes, value: bytes, n_bytes: int | None = None) -> bytes:
    return struct.pack("<HQ", len(name), len(value) if n_bytes is None else n_bytes) + name + value


def sealed(*records: bytes, head: bytes = b"KVTA\x01\0\0\0", count: int | None = None) -> bytes:
    whole = head + b"".join(records) + struct.pack("<HQ", 0, len(records) if count is None else count)
    return whole + hashlib.blake2b(whole, digest_size=32).digest()


HOSTILE = {
    "empty": (b"", "does not begin with KVTA"),
    "another file": (b"KVTC" + bytes(100), "does not begin with KVTA"),
    "newer": (sealed(head=b"KVTA\x02\0\0\0"), "version 2"),
    "endless value": (sealed(record(b"a", b"", 1 << 62)), "entry_bytes"),
    "value beyond the end": (sealed(record(b"a", b"", 1 << 20)), "are expected"),
    "endless key": (b"KVTA\x01\0\0\0" + struct.pack("<HQ", 60000, 1) + bytes(70000), "the longest has 200"),
    "no end": (sealed(record(b"a", b"x"))[:-40], "are expected"),
    "one byte short": (sealed(record(b"a", b"x"))[:-1], "are expected"),
    "one byte too many": (sealed(record(b"a", b"x")) + b"\0", "does not fit"),
    "wrong count": (sealed(record(b"a", b"x"), count=2), "does not fit"),
    "wrong checksum": (flip(sealed(record(b"a", b"x")), 19), "does not fit"),
    "no key": (sealed(record(b"A/../b", b"x")), "has no key"),
    "no text": (sealed(record(b"\xff\xfe", b"x")), "has no key"),
    "no stream": (sealed(record(key(1).encode(), b"x")), "KVTC"),
    "damaged stream": (sealed(record(key(1).encode(), flip(JOINT, len(JOINT) - 1))), "checksum"),
    "no index": (sealed(record(key(1, "tails").encode(), b"x")), "index of tails"),
    "pickle": (b"\x80\x04\x95" + bytes(60), "does not begin with KVTA"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_one_error_and_changes_nothing(capsys, tmp_path, name):
    contents, said = HOSTILE[name]
    file, target = tmp_path / "file", f"file://{tmp_path}/target"
    file.write_bytes(contents)
    with open_store(target) as store:
        store.put("a", b"before")
    tracemalloc.start()
    code, err = run(capsys, "store", "import", target, file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert code == 1
    assert said in err
    assert err.count("\n") == 1
    assert peak < 4 << 20
    with open_store(target) as store:
        assert list(store.keys()) == ["a"]
        assert store.get("a") == b"before"


def test_every_changed_byte_of_a_file_is_noticed(tmp_path):
    whole = sealed(record(b"chats/1", b"value"), record(key(1).encode(), JOINT))
    file = tmp_path / "file"
    with open_place(f"file://{tmp_path}/target", recovers=True) as place:
        for at in (*range(60), *range(60, len(whole), 7)):
            file.write_bytes(flip(whole, at))
            with pytest.raises((CorruptStream, TruncatedStream, UnsupportedVersion, StoreFull)):
                import_entries(place, file)
        assert place.entries() == []
        file.write_bytes(whole)
        assert import_entries(place, file)["written"] == 2


def test_what_is_no_regular_file_is_refused_at_once(capsys, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    code, err = run(capsys, "store", "import", f"file://{tmp_path}/target", tmp_path / "pipe")
    assert (code, "no regular file" in err) == (1, True)


def test_a_conversation_goes_to_another_machine(capsys, tmp_path):
    """Saved by a prefix cache, exported by its text, imported, and loaded by another prefix cache."""
    text = tmp_path / "talk.txt"
    text.write_text(CONVERSATION.read_text(encoding="utf-8")[:1600], encoding="utf-8")
    ids = token_ids_of(text, load_tokenizer("reference"))
    codec = kvtc.Codec(kvtc.reference_calibration(), lossless=True)
    geometry = codec.geometry
    shape = (geometry.n_layers, geometry.n_kv_heads, len(ids), geometry.head_dim)
    cache = kvtc.KVCache(*(torch.randn(shape, generator=torch.Generator().manual_seed(n)) for n in (0, 1)))
    source, target, file = f"file://{tmp_path}/source", f"file://{tmp_path}/target", tmp_path / "talk.kvta"
    other_ids = torch.cat([ids[:-1], ids[:1]])
    with open_store(source) as store, PrefixCache(codec, store, min_tokens=1, namespace="team") as prefixes:
        prefixes.save(other_ids, cache).result()
        prefixes.save(ids, cache).result()
    options = ["--text", text, "--model", "reference", "--lossless", "--namespace", "team"]
    code, found = run(capsys, "store", "export", source, "-o", file, *options)
    assert (code, found["left_out"]) == (0, {})
    assert found["n_entries"] == len(ids) // 256 + 2
    with open_store(target) as store, PrefixCache(codec, store, min_tokens=1, namespace="team") as prefixes:
        prefixes.save(torch.cat([ids[:-2], ids[:2]]), cache).result()  # another tail of the same index
    assert run(capsys, "store", "import", target, file)[1]["n_there"] == len(ids) // 256
    with open_store(target) as store, PrefixCache(codec, store, namespace="team") as prefixes:
        loaded, n_tokens = prefixes.load_neutral(ids, whole=True)
        assert n_tokens == len(ids)
        assert torch.equal(loaded.keys, cache.keys)
        assert prefixes.load_neutral(torch.cat([ids[:-2], ids[:2]]), whole=True)[1] == len(ids)
        # The tail of the other conversation of the source was not carried.
        assert prefixes.load_neutral(other_ids, whole=True)[1] < len(ids)
    before = state_of(tmp_path / "source")
    run(capsys, "store", "export", source, "-o", file, "--force", *options)
    assert state_of(tmp_path / "source") == before
    code, said = run(capsys, "store", "export", source, "-o", tmp_path / "none", *options[:-2])
    assert (code, "nothing of this text" in said) == (1, True)


def test_a_view_of_a_place_reads_and_changes_nothing(monkeypatch, root, url, tmp_path):
    change(file_of(root, key(2)), lambda frame: flip(frame, len(frame) - 1))
    before = state_of(root)
    with open_place(url) as place:
        view = PlaceView(place)
        assert view.get_many([key(1), key(2), "absent"]) == [STREAMS[1], None, None]
        assert view.contains_prefix([key(0), key(1), "absent"]) == 2
        assert key(1) in list(view.keys())
        entries = Entries(view)
        assert (
            entries.parse(key(1), b"", lambda _: parse_index(b"no index")) is None
        )  # found damaged, and to be deleted
        for call in (lambda: view.put("a", b""), lambda: view.delete(key(1))):
            with pytest.raises(StoreUnavailable, match="only looked at"):
                call()
    assert state_of(root) == before
    monkeypatch.setenv("RIGHT", KEY)
    with open_store(f"file://{tmp_path}/secret", key_variable="RIGHT") as store:
        store.put(key(1), JOINT)
    for options, found in ({}, None), ({"key_variable": "RIGHT"}, JOINT):
        with open_place(f"file://{tmp_path}/secret", **options) as place:
            assert PlaceView(place).get(key(1)) == found
