"""Encryption around other stores."""

import base64
import secrets

import pytest

from kvtc.errors import InvalidArgument
from kvtc.store import encrypted, open_store
from kvtc.store.base import telling_unreadable

from .contract import SharedPlaceContract, StoreContract, tamper

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))


@pytest.fixture
def variable(monkeypatch):
    monkeypatch.setenv("KVTC_TEST_KEY", KEY.hex())
    return "KVTC_TEST_KEY"


class TestEncryptedMemory(StoreContract):
    @pytest.fixture
    def url(self, variable):
        return f"memory:?key_variable={variable}"

    def place(self, store):
        return store.inner


class TestEncryptedFile(SharedPlaceContract):
    @pytest.fixture
    def url(self, tmp_path, variable):
        return f"file://{tmp_path}/store?key_variable={variable}"

    def place(self, store):
        return store.inner


def test_nothing_of_a_value_lies_in_clear(tmp_path):
    secret = b"the prompt of somebody" * 50
    with encrypted(open_store(f"file://{tmp_path}"), KEY) as store:
        store.put("k", secret)
        store.put("l", secret)
    files = [path.read_bytes() for path in tmp_path.rglob("*.entry")]
    assert len(files) == 2
    assert files[0][48:] != files[1][48:]
    assert all(b"prompt" not in content for content in files)


def test_another_key_reads_nothing_and_removes_nothing(tmp_path):
    url = f"file://{tmp_path}"
    with encrypted(open_store(url), KEY) as store:
        store.put("k", b"secret")
    with encrypted(open_store(url), OTHER) as store:
        assert store.get("k") is None
        assert store.statistics().foreign == 1
    with encrypted(open_store(url), KEY) as store:
        assert store.get("k") == b"secret"


def test_keys_can_be_changed_one_after_the_other(tmp_path):
    url = f"file://{tmp_path}"
    with encrypted(open_store(url), KEY) as store:
        store.put("old", b"1")
    with encrypted(open_store(url), OTHER, KEY) as store:
        assert store.get("old") == b"1"
        store.put("new", b"2")
    with encrypted(open_store(url), OTHER) as store:
        assert store.get_many(["old", "new"]) == [None, b"2"]


def test_values_in_clear_are_not_returned():
    inner = open_store("memory:")
    with encrypted(inner, KEY) as store:
        inner.put("k", b"x" * 100)
        assert store.get("k") is None
        assert store.statistics().foreign == 1


@pytest.mark.parametrize("other_namespace", [False, True])
def test_a_ciphertext_given_another_name_with_a_sound_frame_is_a_miss(tmp_path, other_namespace):
    """What somebody with access to the disk could do: frames carry no secret, so that they can be made for any name."""
    place = f"file://{tmp_path}"
    inner, elsewhere = open_store(place), open_store(place, namespace="two" if other_namespace else None)
    target = "k" if other_namespace else "other"
    with encrypted(inner, KEY) as store, encrypted(elsewhere, KEY) as victim:
        store.put("k", b"secret")
        elsewhere.put(target, inner.get("k"))
        assert victim.get(target) is None
        assert victim.statistics().damaged == 1
        assert not victim.contains(target)
        assert store.get("k") == b"secret"


@pytest.mark.parametrize("position", [0, 5, 8, 16, 27, 28, -1])
def test_no_bit_of_an_encrypted_value_can_be_changed(position):
    inner = open_store("memory:")
    with encrypted(inner, KEY) as store:
        store.put("k", b"secret")
        changed = bytearray(inner.get("k"))
        changed[position] ^= 1
        inner.put("k", changed)
        assert store.get("k") is None


def test_damage_below_is_counted_above():
    inner = open_store("memory:")
    with encrypted(inner, KEY) as store:
        store.put("k", b"secret")
        tamper(inner, "k", lambda frame: frame[:-1])
        assert store.get("k") is None
        assert store.statistics().damaged == 1


@pytest.mark.parametrize(
    ("position", "told", "cause"),
    [
        (0, "foreign", "it is not encrypted, or in a newer format"),
        (9, "foreign", "it is encrypted with another key"),
        (-1, "damaged", "its authentication tag does not fit"),
    ],
)
def test_a_reader_is_told_why_a_value_is_not_decrypted(caplog, position, told, cause):
    inner, found = open_store("memory:"), []
    with encrypted(inner, KEY) as store, telling_unreadable(found.append):
        store.put("k", b"secret")
        changed = bytearray(inner.get("k"))
        changed[position] ^= 1
        inner.put("k", changed)
        assert store.get("k") is None
    assert found == [told]
    assert caplog.messages[0].endswith(f": {cause}")


@pytest.mark.parametrize("text", [KEY.hex() + "\n", base64.b64encode(KEY).decode(), f"\n{KEY.hex()}\n{OTHER.hex()}\n"])
def test_keys_come_from_files(tmp_path, text):
    path = tmp_path / "key"
    path.write_text(text)
    with open_store(f"file://{tmp_path}/store?key_file={path}") as store:
        store.put("k", b"v")
    with encrypted(open_store(f"file://{tmp_path}/store"), KEY) as store:
        assert store.get("k") == b"v"


@pytest.mark.parametrize("text", ["", "\n", "abc", KEY.hex()[:-2], KEY.hex() + "\nsesame", "é"])
def test_what_is_no_key_is_refused_and_not_shown(tmp_path, text):
    path = tmp_path / "key"
    path.write_text(text)
    with pytest.raises(InvalidArgument, match="key file") as caught:
        open_store(f"memory:?key_file={path}")
    assert "sesame" not in str(caught.value)
    assert KEY.hex()[:-2] not in str(caught.value)


@pytest.mark.parametrize("byte", [0, 255, 7])
def test_a_key_of_one_repeated_byte_is_refused(tmp_path, monkeypatch, byte):
    key = bytes([byte]) * 32
    with pytest.raises(InvalidArgument, match="repeated"):
        encrypted(open_store("memory:"), KEY, key)
    (tmp_path / "key").write_text(key.hex())
    monkeypatch.setenv("KVTC_TEST_KEY", base64.b64encode(key).decode())
    for option in (f"key_file={tmp_path}/key", "key_variable=KVTC_TEST_KEY"):
        with pytest.raises(InvalidArgument, match="repeated"):
            open_store(f"memory:?{option}")


@pytest.mark.parametrize(
    ("mode", "warns"), [(0o600, False), (0o400, False), (0o640, True), (0o604, True), (0o666, True)]
)
def test_a_key_file_that_others_may_use_is_warned_of(tmp_path, caplog, mode, warns):
    path = tmp_path / "key"
    path.write_text(KEY.hex())
    path.chmod(mode)
    open_store(f"memory:?key_file={path}").close()
    expected = f"key file {path} has permissions {mode:04o}: others may use it; expected 0600 or 0400"
    assert caplog.messages == ([expected] if warns else [])


def test_a_key_that_is_not_there_is_refused(tmp_path):
    for option in (f"key_file={tmp_path}/none", "key_variable=KVTC_NOT_SET", "key_file=x&key_variable=y"):
        with pytest.raises(InvalidArgument):
            open_store(f"memory:?{option}")
    for keys in ([], [b"short"], [KEY, b""], ["x" * 32], [KEY.hex()]):
        with pytest.raises(InvalidArgument):
            encrypted(open_store("memory:"), *keys)


def test_random_keys_as_the_documentation_makes_them(monkeypatch):
    monkeypatch.setenv("KVTC_TEST_KEY", secrets.token_hex(32))
    with open_store("memory:?key_variable=KVTC_TEST_KEY") as store:
        store.put("k", b"v")
        assert store.get("k") == b"v"
