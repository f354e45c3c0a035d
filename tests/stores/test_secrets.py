"""No secret of a store in an error, a `repr` or a log, whatever goes wrong."""

import logging
import sys
import traceback
from urllib.parse import quote

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvtc.errors import InvalidArgument, KvtcError, MissingDependency
from kvtc.store import bounded_calls, open_store
from kvtc.store.redaction import Redactor, translated, user_info
from kvtc.store.urls import StoreUrl

from .servers import free_port, redis_server, s3_server, socket_server

# Signs that URLs write otherwise, and messages too.
SECRETS = ["sesame-open", "s3sa/me+==", "ses ame%41"]


def quoted(secret):
    return quote(secret, safe="")


def everything_of(error):
    """All that could be shown of an error, and of those that it came from."""
    texts, open_ends, seen = ["".join(traceback.format_exception(error))], [error], set()
    while open_ends:
        one = open_ends.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        texts += [str(one), repr(one)]
        open_ends += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]
    return "\n".join(texts)


def provoke(url, options):
    """What is shown by all that can go wrong with a store that is opened so."""
    shown = []
    try:
        store = open_store(url, **options)
    except KvtcError as error:
        return everything_of(error)
    with store:
        shown += [repr(store), str(store), repr(store.statistics())]
        calls = [
            lambda: store.get("k"),
            lambda: store.get_many([str(i) for i in range(40)]),
            lambda: store.put("k", b"v"),
            lambda: store.contains("k"),
            lambda: store.delete("k"),
            lambda: list(store.keys()),
            lambda: store.get("no key"),
            lambda: store.put("k", "no bytes"),
        ]
        for call in calls:
            try:
                call()
            except KvtcError as error:
                shown.append(everything_of(error))
    for call in (lambda: store.get("k"), lambda: store.put("k", b"v")):
        with pytest.raises(KvtcError) as caught:
            call()
        shown.append(everything_of(caught.value))
    return "\n".join(shown)


def tell_all(connection, _):
    """A server whose errors repeat what it was sent, as Redis does of commands that it does not know."""
    while received := connection.recv(65536):
        text = " ".join(part for part in received.decode("latin1").split("\r\n") if part[:1] not in "*$")
        connection.sendall(f"-ERR unknown command, with args beginning with: {text}\r\n".encode("latin1"))


def tell_all_by_http(connection, _):
    request = connection.recv(65536).decode("latin1")
    body = f"<Error><Code>Odd</Code><Message>{request}</Message></Error>".encode()
    connection.sendall(
        b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), body)
    )


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Servers that answer in each of the ways in which one can fail."""
    with (
        redis_server(tmp_path_factory.mktemp("redis"), "--requirepass", "another word") as redis,
        s3_server() as s3,
        socket_server(tell_all) as telling,
        socket_server(tell_all_by_http) as telling_by_http,
        socket_server(lambda connection, _: connection.close()) as closing,
    ):
        yield {
            "redis": [f"127.0.0.1:{redis.port}", telling, closing, f"127.0.0.1:{free_port()}"],
            "s3": [f"127.0.0.1:{s3.port}", telling_by_http, closing, f"127.0.0.1:{free_port()}"],
        }


def urls_with(secret, scheme, place):
    """Every way in which a secret is given to a store, and some in which it was meant to be."""
    code = quoted(secret)
    if scheme == "redis":
        return [
            (f"redis://:{code}@{place}?timeout=2", {}),
            (f"redis://name:{code}@{place}/0?timeout=2", {}),
            (f"redis://{place}?timeout=2&username=name&password={code}", {}),
            (f"redis://{place}", {"timeout": 2, "password": secret}),
            (f"redis://:{code}@{place}/database?db=x", {}),
            (f"redis://:{code}@{place}?colour=red", {}),
            (f"redis://:{code}@{place}?timeout=soon", {}),
            (f"redis://:{code}@{place}:port", {}),
            (f"redis://:{code}@{place}#part", {}),
            (f"rediss://:{code}@{place}?timeout=2&ssl_ca_certs=/nowhere", {}),
            (f"redis:{code}@{place}", {}),
            (f"{code}@{place}", {}),
            (f"tiered:memory:|redis://:{code}@{place}?timeout=2", {}),
            ([f"redis://:{code}@{place}?timeout=2"], {"write": "back"}),
        ]
    credentials = {"access_key_id": "name", "secret_access_key": secret, "region": "us-east-1", "timeout": 1}
    return [
        (f"s3://bucket?endpoint=http://{place}", credentials),
        (f"s3://bucket/deep?endpoint=http://{place}", credentials | {"session_token": secret}),
        (f"s3://bucket?endpoint=http://name:{quoted(code)}@{place}", credentials | {"secret_access_key": "x" * 40}),
        (f"s3://bucket?endpoint=http://{place}", credentials | {"access_key_id": secret}),
        (f"s3://name:{code}@bucket?endpoint=http://{place}", credentials),
        (f"s3://bucket?endpoint=http://name:{quoted(code)}@{place}:port", credentials),
        (f"s3://bucket?endpoint={place}", credentials | {"ca_file": "/nowhere"}),
        (
            f"tiered:memory:|s3://bucket?endpoint=http://{place}&timeout=1&region=r&secret_access_key={code}&access_key_id=a",
            {},
        ),
    ]


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("scheme", ["redis", "s3"])
def test_secrets_of_servers_are_shown_nowhere(places, scheme, secret, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(bounded_calls.CircuitBreaker, "is_open", lambda _: False)
    for place in places[scheme]:
        for url, options in urls_with(secret, scheme, place):
            shown = provoke(url, options) + caplog.text
            for form in {secret, quoted(secret), quoted(quoted(secret))}:
                assert form not in shown, url


@pytest.mark.parametrize("scheme", ["memory", "file", "device", "cuda", "nothing"])
def test_secrets_in_urls_of_places_that_need_none_are_shown_nowhere(scheme):
    for rest in ("//name:sesame-open@host/path", "?timeout=x&password=sesame-open"):
        assert "sesame" not in provoke(f"{scheme}:{rest}", {})


def test_secrets_of_the_environment_are_shown_nowhere(places, monkeypatch):
    for place in places["s3"]:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sesame-open")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "sesame-name")
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://sesame-user:sesame-word@{place}")
        monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
        assert "sesame" not in provoke("s3://bucket?region=r&timeout=1", {})


def test_errors_still_say_what_happened(places):
    telling = places["redis"][1]
    shown = provoke(f"redis://:sesame-open@{telling}?timeout=2", {})
    assert f"redis://{telling}: " in shown
    assert "unknown command" in shown


@given(st.text(min_size=1, max_size=40), st.text(max_size=60), st.text(max_size=60))
def test_no_form_of_a_secret_is_left_in_a_text(secret, before, after):
    assume("*" not in secret and secret.strip())
    redactor = Redactor([secret, None, ""])
    for form in (secret, quote(secret, safe="")):
        assert form not in redactor.cut(f"{before}{form}{after}")


def test_user_and_password_are_found_however_malformed_the_url_is():
    assert user_info("redis://host/0") == []
    assert "p@ss:w/rd" in user_info("redis://user:p@ss:w/rd@host")
    assert "word" in user_info("redis:user:word@host?db=1@2")


@given(st.text("ab:/@[]?#%", min_size=4, max_size=60))
def test_a_url_of_any_text_is_shown_without_what_stands_before_an_at_sign(text):
    try:
        shown = str(StoreUrl(f"redis://{text}@host"))
    except InvalidArgument as error:
        shown = everything_of(error)
    assert f"{text}@" not in shown


def test_the_meaning_of_an_error_stands_alone():
    def fail():
        raise ValueError("sesame")

    with pytest.raises(InvalidArgument) as caught:
        translated(fail, lambda error: InvalidArgument(type(error).__name__))
    assert "sesame" not in everything_of(caught.value)
    for signal in (KeyboardInterrupt, SystemExit):

        def interrupt(signal=signal):
            raise signal

        with pytest.raises(signal):
            translated(interrupt, lambda _: InvalidArgument("no"))


def test_packages_that_are_missing_tell_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "kvtc.store.redis_store", None)
    with pytest.raises((MissingDependency, ImportError)) as caught:
        open_store("redis://:sesame-open@host")
    assert "sesame-open@" not in str(caught.value)
