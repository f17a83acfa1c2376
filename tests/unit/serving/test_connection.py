"""HTTP to a server that means harm: every exchange ends in time and in bytes, in one sentence, without a secret."""

import asyncio
import gzip
import importlib.util
import itertools
import json
import re
import time
from functools import partial

import pytest
from hostile_server import endless, event, head, hostile

from dflash.serving import connection as module
from dflash.serving.connection import BusyError, Connection, RejectedError, ServingError, patiently, read_url, redacted

KEY = "averysecretkey-0123456789"
# More than an answer that ends takes on a busy machine; and what an endless one is given.
LIMIT_S, SHORT_S = 60.0, 0.5
# What the time limit of an exchange may be exceeded by, on a busy machine.
SLACK_S = 30.0
MOST = 4 << 20
GOOD = event(choices=[{"text": "a", "finish_reason": "length"}])


def stream(server, key=KEY, tokens=4, path="/v1/completions", limit_s=LIMIT_S):
    """The events of one answer."""
    events = []
    connection = Connection(server.url, timeout_s=limit_s, key=key)
    asyncio.run(connection.stream(path, {"prompt": "x"}, events.append, tokens))
    return events


def page(server, path="/v1/models", limit_s=LIMIT_S):
    return Connection(server.url, timeout_s=limit_s, key=KEY).page(path)


def refusal(ask, server):
    """The one sentence of a ServingError, which came in time and holds no secret."""
    begun = time.monotonic()
    with pytest.raises(ServingError) as error:
        ask(server)
    assert time.monotonic() - begun < SHORT_S + SLACK_S
    sentence = str(error.value)
    assert KEY not in sentence
    assert "\n" not in sentence.strip()
    assert len(sentence) < 1200
    return sentence


ENDLESS = {
    "line": lambda *_: itertools.chain([head(), b"data: "], endless(b"x" * 65536)),
    "comment": lambda *_: itertools.chain([head(), b": "], endless(b"x" * 65536)),
    "events": lambda *_: itertools.chain([head()], endless(event(choices=[{"text": "a"}]) * 100)),
    "data lines": lambda *_: itertools.chain([head()], endless(b"data: x\n" * 1000)),
    "heartbeats": lambda *_: itertools.chain([head()], endless(b": ping\n\n", 0.05)),
    "trickled events": lambda *_: itertools.chain([head()], endless(event(choices=[]), 0.05)),
    "trickled line": lambda *_: itertools.chain([head(), b"data: "], endless(b"x", 0.05)),
    "trickled headers": lambda *_: itertools.chain([b"HTTP/1.1 200 OK\r\n"], endless(b"X-A: b\r\n", 0.05)),
    "headers": lambda *_: itertools.chain([b"HTTP/1.1 200 OK\r\n"], endless(b"X-A: b\r\n" * 1000)),
    "nothing": lambda *_: endless(b"", 0.05),
    "informational": lambda *_: endless(b"HTTP/1.1 103 Early\r\n\r\n", 0.01),
    "error body": lambda *_: itertools.chain([head(500)], endless(b"x" * 65536)),
    "trickled error body": lambda *_: itertools.chain([head(401)], endless(b"x", 0.05)),
    "models": lambda *_: itertools.chain([head(200, "application/json"), b'{"data": ['], endless(b"7," * 32768)),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_an_endless_stream_ends_in_time_and_in_bytes(kind):
    with hostile(ENDLESS[kind]) as server:
        refusal(partial(stream, limit_s=SHORT_S), server)
        # The server's own buffers are in it.
        assert server.sent < MOST + (8 << 20)


@pytest.mark.parametrize("kind", ["models", "trickled line", "heartbeats", "nothing", "error body"])
def test_an_endless_page_ends_in_time_and_in_bytes(kind):
    with hostile(ENDLESS[kind]) as server:
        refusal(partial(page, limit_s=SHORT_S), server)
        assert server.sent < module._PAGE_BYTES + (8 << 20)


def test_a_long_answer_that_was_asked_for_is_taken():
    """All tokens so far in every event, as some servers have it."""
    tokens = 512
    parts = [event(text="word " * i, output_ids=list(range(100000, 100000 + i))) for i in range(1, tokens + 1)]
    with hostile(head() + b"".join(parts) + b"data: [DONE]\n\n") as server:
        assert len(stream(server, tokens=tokens)) == tokens


def test_health_is_asked_within_bounds():
    with hostile(ENDLESS["trickled headers"]) as server:
        begun = time.monotonic()
        assert not Connection(server.url, timeout_s=60).is_healthy(0.5)
        assert time.monotonic() - begun < SLACK_S
    for code, healthy in ((200, True), (503, False), (302, False)):
        with hostile(head(code, "text/html")) as server:
            assert Connection(server.url, timeout_s=LIMIT_S).is_healthy() is healthy


# ---- secrets


@pytest.mark.parametrize("code", [301, 302, 307, 308])
def test_a_redirect_is_refused_and_carries_no_key(code):
    with hostile(head() + GOOD) as other:
        with hostile(head(code, more=f"Location: {other.url}/v1/completions?{KEY}\r\n")) as server:
            sentence = refusal(stream, server)
            assert "redirect" in sentence
            assert other.url in sentence
            assert f"Bearer {KEY}".encode() in server.requests[0][0]
        assert other.requests == []


@pytest.mark.parametrize(
    "answer",
    [
        head(401) + f'{{"error": "no such key: {KEY}"}}'.encode(),
        head(500) + f"Authorization: Bearer {KEY}".encode(),
        # Cut in the middle of the key, if it were cut before it is redacted.
        head(400) + b"x " * 243 + KEY.encode(),
        head() + event(error={"message": f"bad {KEY}"}),
        head() + event(error=f"{'x' * 480} {KEY}"),
        head() + f"data: {KEY} is no JSON\n\n".encode(),
        head() + f"{KEY}\n".encode(),
        head(302, more=f"Location: https://elsewhere/{KEY}\r\n"),
        f"HTTP/1.1 200 {KEY}\r\nBroken {KEY}\r\n\r\n".encode(),
        head(200, more=f"Content-Encoding: {KEY}\r\n"),
    ],
)
def test_a_key_that_comes_back_is_not_shown(answer):
    def take(value):
        if isinstance(value, dict) and "error" in value:
            raise ValueError(f"an error: {value['error']}")

    def ask(server):
        connection = Connection(server.url, timeout_s=LIMIT_S, key=KEY)
        asyncio.run(connection.stream("/v1/completions", {}, take, 4))

    with hostile(answer) as server:
        sentence = refusal(ask, server)
    assert KEY[:12] not in sentence


def test_a_password_in_a_url_is_sent_and_not_shown():
    with hostile(head(401) + b"not dXNlcjpwYXNzLXdvcmQtMTIz, pass-word-123") as server:
        url = server.url.replace("//", "//user:pass-word-123@")
        connection = Connection(url, timeout_s=LIMIT_S)
        with pytest.raises(ServingError) as error:
            connection.page("/v1/models")
        assert b"Basic dXNlcjpwYXNzLXdvcmQtMTIz" in server.requests[0][0]
    assert "pass-word" not in str(error.value)
    assert "dXNlcjpwYXNz" not in str(error.value)
    assert server.url in str(error.value)
    with pytest.raises(ServingError, match="not both"):
        Connection(url, timeout_s=1, key=KEY)


@pytest.mark.parametrize("key", [f"{KEY}\n", f"{KEY}\r\nX-Other: 1", f"{KEY} ", f"{KEY}é"])
def test_a_key_that_no_header_may_hold_is_refused_unseen(key):
    with pytest.raises(ServingError, match="--key-variable") as error:
        Connection("http://127.0.0.1:1", timeout_s=1, key=key)
    assert KEY not in str(error.value)


def test_redacted_keeps_all_but_secrets(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "abcdefghijk")
    text = "two tokens of a tokenizer\n  key abcdefghijk, hf_aaaaaaaaaa and --api-key xyz, http://me:p@ss@host"
    hidden = "two tokens of a tokenizer\n  key ***, *** and --api-key *** http://***@host"
    assert redacted(text) == hidden
    assert redacted("a key of 1 word", ("word",)) == "a key of 1 ***"


# ---- what is said of refusals and of other shapes


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        (head(401) + b"no", "--key-variable"),
        (head(403) + b"no", "--key-variable"),
        (head(200, "text/html; charset=utf-8") + b"<p>Welcome", "HTML page"),
        (head(404, "text/html") + b"<!DOCTYPE html><html>nginx", "HTML page"),
        (head() + b"<html>\n<body>hello\n", "HTML page"),
        (head() + b'{"choices": []}\n', "without `data:`"),
        (head() + b"data: {,}\n\n", "no JSON"),
        (head() + b"data: " + b"[" * 50000 + b"\n\n", "no JSON"),
        (head() + b"data: " + b"9" * 5000 + b"\n\n", "no JSON"),
        (head() + b"data: \xff\xfe\n\n", "no JSON"),
        (head(more="Content-Encoding: gzip\r\n") + gzip.compress(GOOD), "no compression"),
        (head(more="Content-Length: 1000\r\n") + GOOD, "broke off"),
        (b"", "does not answer"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "does not answer"),
        (head(204), "204"),
    ],
)
def test_an_answer_of_another_kind_is_one_sentence(answer, named):
    with hostile(answer) as server:
        assert named in refusal(stream, server)


@pytest.mark.parametrize("said", [b"a\nb\rc", b"a\x1b[2J\x1b]0;b\x07c", "a\x9b31mb\u2028c".encode()])
def test_what_a_server_says_moves_no_cursor(said):
    for answer in (head(400) + said, head() + b"data: [" + said + b"\n\n"):
        with hostile(answer) as server:
            assert refusal(stream, server).isprintable()


def test_a_stream_is_read_as_the_standard_has_it():
    text = b': data: {"a": 0}\r\nevent: x\ndata:{"a": 1}\r\n\r\nid: 7\ndata: {"a":\ndata: 2}\n\n'
    text += b'data: [DONE]\n\n: end\ndata: {"a": 3}'
    with hostile(head() + text) as server:
        assert [value["a"] for value in stream(server)] == [1, 2, 3]


def test_a_shape_that_the_reader_refuses_is_one_sentence():
    def ask(server):
        def take(value):
            raise ValueError(f"a number: {value!r}")

        asyncio.run(Connection(server.url, timeout_s=LIMIT_S).stream("/x", {}, take, 4))

    with hostile(head() + b"data: 7\n\n") as server:
        assert re.match(f"{server.url} .*events.* 7$", refusal(ask, server))


def test_a_refusal_may_be_of_this_request_alone():
    for code, kind in ((400, RejectedError), (422, RejectedError), (500, RejectedError), (401, ServingError)):
        with hostile(head(code) + b"said so") as server, pytest.raises(ServingError, match="said so") as error:
            stream(server)
        assert type(error.value) is kind


@pytest.mark.parametrize("code", [429, 503])
def test_a_busy_server_is_asked_once_more(code, monkeypatch):
    pauses = []
    monkeypatch.setattr(module.time, "sleep", pauses.append)
    busy = head(code, more="Retry-After: 7\r\n") + b"try later"
    with hostile(lambda number, _: [busy if number == 0 else head() + GOOD]) as server:
        assert patiently(lambda: stream(server)) == [json.loads(GOOD[6:])]
    assert pauses == [7.0]
    with hostile(busy) as server:
        with pytest.raises(BusyError, match=str(code)):
            patiently(lambda: stream(server))
        assert len(server.requests) == 2


def test_a_busy_server_is_not_waited_for_without_bounds():
    assert [module._wait_s(text) for text in ("", "3", "99999", "9" * 400, "-1", "Wed, 21 Oct")] == [1, 3, 30, 30, 1, 1]


# ---- URLs


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://host:80/v1", "http://host"),
        ("http://host:8000/v1/", "http://host:8000"),
        ("https://host/prefix/v1", "https://host/prefix"),
        ("https://host/v1beta", "https://host/v1beta"),
        (" http://[::1]:8000/ ", "http://[::1]:8000"),
    ],
)
def test_a_url_is_taken_as_people_paste_it(url, base):
    assert str(read_url(url)).rstrip("/") == base


@pytest.mark.parametrize(
    "url",
    [
        "x:80",
        "ftp://host",
        "http://",
        "http://host:99999",
        "http://host:x",
        "http://u:s3cret/word@host",
        "http://h?a=s3cret",
    ],
)
def test_what_is_no_url_of_a_server_is_refused(url):
    with pytest.raises(ServingError, match="a URL of a server is"):
        read_url(url)


def test_requests_go_below_the_path_of_the_url():
    with hostile(head(200, "application/json") + b"{}") as server:
        Connection(f"{server.url}/prefix/v1/", timeout_s=LIMIT_S).page("/v1/models")
        assert server.requests[0][0].startswith(b"GET /prefix/v1/models HTTP/1.1\r\n")


@pytest.mark.parametrize("url", ["http://host:1/?api_key=" + KEY, "http://host:1/v1#" + KEY, "host?key=a@b" + KEY])
def test_what_follows_a_url_is_not_shown(url):
    with pytest.raises(ServingError, match="got ") as error:
        read_url(url)
    assert KEY not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALL_PROXY", "socks5://user:averysecretpassword@127.0.0.1:1"),
        ("HTTPS_PROXY", "ftp://user:averysecretpassword@host:1"),
        ("NO_PROXY", "[::"),
        ("SSL_CERT_FILE", "/no/such/file"),
        ("SSL_CERT_FILE", __file__),
    ],
)
def test_an_environment_that_can_not_be_used_is_named(name, value, monkeypatch):
    if name == "ALL_PROXY" and importlib.util.find_spec("socksio"):
        pytest.skip("httpx speaks to such a proxy here")
    monkeypatch.setenv(name, value)
    with pytest.raises(ServingError, match=name) as error:
        Connection("https://192.0.2.1", timeout_s=1)
    assert "averysecretpassword" not in str(error.value)
    Connection("http://127.0.0.1:9", timeout_s=1)  # asked without a proxy


def test_a_server_that_is_not_there_is_named():
    with hostile(b"") as server:
        pass
    assert "does not answer: Connection refused" in refusal(stream, server)
