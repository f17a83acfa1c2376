"""HTTP to one server: every exchange ends within a time and a number of bytes, and no message holds a secret.

A redirect is refused, since following it would carry the key to another host. The time of an exchange runs from its
first byte to its last, whatever trickles in between.
"""

import asyncio
import base64
import contextlib
import json
import os
import re
import time
import urllib.parse
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx

from dflash.config import UserError
from dflash.host.disk import one_line
from dflash.host.provenance import redact

# An event holds one token or, on some servers, all tokens so far: id and escaped text of each, and more.
_EVENT_BYTES, _TOKEN_BYTES = 1 << 16, 64
_ANSWER_BYTES = 1 << 20
_PAGE_BYTES, _PAGE_S = 1 << 24, 60.0
_ERROR_BYTES, _ERROR_S = 1 << 16, 10.0
# Characters shown of a server's text, and of a whole sentence.
_SHOWN, _SENTENCE = 500, 900
_LOCAL = ("127.0.0.1", "localhost", "::1")


class ServingError(UserError, ValueError):
    """A server that can't be measured: the rule, what came, and what to do."""


class RejectedError(ServingError):
    """The server rejected this request; it may accept another."""


class BusyError(ServingError):
    """The server takes no request now (429 or 503); it may after `wait_s` seconds."""

    def __init__(self, sentence: str, wait_s: float):
        super().__init__(sentence)
        self.wait_s = wait_s


def redacted(text: str, secrets: tuple[str, ...] = ()) -> str:
    """The text without these secrets, and without words that `redact` takes for one."""
    return "\n".join(" ".join(redact(line.split(" "), secrets)) for line in text.split("\n"))


def read_url(url: str) -> httpx.URL:
    """A server's URL without `/v1`, which requests add. Raises ServingError without showing a password or a query."""
    try:
        parsed = httpx.URL(url.strip().rstrip("/").removesuffix("/v1").rstrip("/"))
        fits = parsed.scheme in ("http", "https") and bool(parsed.host) and (parsed.port or 1) < 2**16
    except (httpx.InvalidURL, TypeError, UnicodeError):
        fits = False
    if not fits or parsed.query or parsed.fragment:
        raise ServingError(
            f"a URL of a server is http://HOST:PORT or https://HOST, also with a path; got {_shown_url(url)!r:.200}"
        )
    return parsed


def _shown_url(url: str) -> str:
    """A URL with *** for what stands before the host, and for what follows the path."""
    place, sign, _ = re.split(r"([?#]|$)", url, maxsplit=1)
    if "@" in url:
        place = f"***@{place.rpartition('@')[2]}" if "@" in place else "***"
    return place + (sign and f"{sign}***")


class Connection:
    """The server at `url`; each answer may take `timeout_s` in total. `key` goes into the Authorization header.

    Every request has a connection of its own. Safe to share between tasks and threads.
    """

    def __init__(self, url: str, *, timeout_s: float, key: str = ""):
        self._base = read_url(url)
        self._timeout_s = timeout_s
        self.secrets = _forms(key) + _forms(self._base.password) + _forms(self._base.userinfo.decode())
        if key and self._base.userinfo:
            raise ServingError("one header carries one secret: give --key-variable, or a password in the URL, not both")
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ServingError(
                "the key that --key-variable names must be one word of printable ASCII, and has a line break, a space "
                "or another character that no header may hold"
            )
        self.url = str(self._base.copy_with(userinfo=b""))
        self._headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})
        # The environment's proxy is bypassed for this host.
        self._local = self._base.host in _LOCAL
        try:
            self._tls = httpx.create_ssl_context() if self._base.scheme == "https" else False
            httpx.AsyncClient(trust_env=not self._local, verify=self._tls)
        except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
            raise ServingError(
                "proxies and certificates that the environment names (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY, "
                f"SSL_CERT_FILE, SSL_CERT_DIR) must be ones that can be used: {redacted(str(error)):.{_SHOWN}}"
            ) from None

    def error(self, what: str) -> ServingError:
        """An error of this server; its text is redacted before it is cut, so that no part of a secret remains."""
        return ServingError(f"{one_line(redacted(self.url + what, self.secrets)):.{_SENTENCE}}")

    def is_healthy(self, seconds: float = 5.0) -> bool:
        """Whether /health answers 200 in this time."""

        async def ask() -> bool:
            async with self._exchange("GET", "/health", None, seconds):
                return True

        try:
            return asyncio.run(ask())
        except ServingError:  # refused, reset, too slow, not ready, not HTTP
            return False

    def page(self, path: str) -> str:
        """The body of a page. Raises ServingError, or RejectedError if there is none."""

        async def ask() -> bytes:
            async with self._exchange("GET", path, None, min(_PAGE_S, self._timeout_s)) as response:
                self._check_form(path, response)
                body = bytearray()
                async for chunk in response.aiter_raw():
                    body += chunk
                    if len(body) > _PAGE_BYTES:
                        raise self.error(f"{path} must be a page of at most {_PAGE_BYTES >> 20} MiB, and went on")
                return bytes(body)

        return asyncio.run(ask()).decode("utf-8", errors="replace")

    async def stream(self, path: str, body: dict[str, Any], take: Callable[[Any], None], tokens: int) -> None:
        """Posts a request for that many tokens, and passes every event of the answer, a JSON value, to `take`.

        Raises ServingError, also for a ValueError that `take` raises: what is wrong with the shape of an event.
        """
        event_bytes = _EVENT_BYTES + _TOKEN_BYTES * tokens
        most = _ANSWER_BYTES + tokens * (event_bytes // 8)
        async with self._exchange("POST", path, body, self._timeout_s) as response:
            self._check_form(path, response)
            events, received = _Events(take, event_bytes), 0
            try:
                async for chunk in response.aiter_raw():
                    received += len(chunk)
                    if received > most:
                        raise ValueError(f"more than {most >> 10} KiB for {tokens} tokens")
                    events.feed(chunk)
                events.end()
            except (ValueError, RecursionError) as error:
                if isinstance(error, ServingError):
                    raise
                raise self.error(f" must stream events, and sent {error}") from None

    # ---- one exchange

    @contextlib.asynccontextmanager
    async def _exchange(
        self, method: str, path: str, body: dict[str, Any] | None, seconds: float
    ) -> AsyncIterator[httpx.Response]:
        """The response to an accepted request; reading it is subject to the time limit too."""
        answered = False
        url = self._base.copy_with(path=self._base.path.rstrip("/") + path)
        try:
            async with (
                asyncio.timeout(seconds),
                httpx.AsyncClient(
                    headers=self._headers,
                    timeout=None,
                    follow_redirects=False,
                    trust_env=not self._local,
                    verify=self._tls,
                ) as client,
                client.stream(method, url, json=body) as response,
            ):
                answered = True
                if response.status_code != 200:
                    raise await self._refusal(path, response)
                yield response
        except TimeoutError:
            raise self.error(
                f" must end an answer within {seconds:g} s, and did not: allow more (--request-timeout)"
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError) as error:
            how = "broke off an answer" if answered else "does not answer"
            raise self.error(f" {how}: {_reason(error)}") from None

    def _check_form(self, path: str, response: httpx.Response) -> None:
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding != "identity":
            raise self.error(f"{path} was asked for no compression, and sent {encoding}")
        if response.headers.get("Content-Type", "").startswith("text/html"):
            raise self.error(f"{path} answered with {_HTML}")

    async def _refusal(self, path: str, response: httpx.Response) -> ServingError:
        """What a status other than 200 means."""
        code, headers = response.status_code, response.headers
        if 300 <= code < 400:
            place = redacted(headers.get("Location", "nowhere"), self.secrets)
            return self.error(
                f"{path} redirects ({code}) to {place:.{_SHOWN}}: a redirect is not followed, since it would carry the "
                "key there; give the URL of the server itself"
            )
        body = redacted(await _beginning(response, min(_ERROR_S, self._timeout_s / 2)), self.secrets)
        reason = _HTML if _is_html(body) else f"{body:.{_SHOWN}}"
        refused = str(self.error(f"{path} refused a request with {code}: {reason}"))
        if code in (401, 403):
            key = "was not accepted" if self.secrets else "was not given"
            return ServingError(f"{refused}; a key {key}: --key-variable names the variable that holds it")
        if code in (429, 503):
            return BusyError(refused, _wait_s(headers.get("Retry-After", "")))
        return RejectedError(refused)


_HTML = "an HTML page instead of JSON: the URL must be that of the API, not of a web interface or a proxy"


def _is_html(text: str) -> bool:
    return text.lstrip()[:15].lower().startswith(("<!doctype html", "<html"))


def _forms(secret: str | None) -> tuple[str, ...]:
    """A secret as given, and as it may come back in JSON, in a URL and in a basic-authentication header."""
    if not secret:
        return ()
    encoded = base64.b64encode(urllib.parse.unquote(secret).encode()).decode()
    return tuple(dict.fromkeys((secret, json.dumps(secret)[1:-1], urllib.parse.quote(secret, safe=""), encoded)))


async def _beginning(response: httpx.Response, seconds: float) -> str:
    """The beginning of a refusal's body, as much as arrives in this time."""
    body = bytearray()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > _ERROR_BYTES:
                    break
    return bytes(body[:_ERROR_BYTES]).decode("utf-8", errors="replace").strip()


def _wait_s(retry_after: str) -> float:
    """Seconds that a busy server asks for, within bounds; a date in the header gives the default."""
    return min(float(retry_after), 30.0) if retry_after.isdecimal() else 1.0


def _reason(error: BaseException) -> str:
    """The innermost reason: wrappers only say that something failed."""
    deepest: BaseException | None = error
    reason = str(error) or type(error).__name__
    while deepest is not None:
        if isinstance(deepest, OSError) and deepest.strerror:
            code = deepest.errno or 0  # below 0 for an unknown host name
            reason = os.strerror(code) if code > 0 else deepest.strerror
        deepest = deepest.__cause__ or deepest.__context__
    return reason


class _Events:
    """Server-sent events of a stream of bytes; each is the JSON of its `data` lines."""

    def __init__(self, take: Callable[[Any], None], most: int):
        self._take, self._most = take, most
        self._rest, self._data, self._size = b"", list[bytes](), 0
        self._taken, self._foreign = False, b""  # whether an event came, and the first line that belongs to none

    def feed(self, chunk: bytes) -> None:
        """Raises ValueError for anything that is not an event, and for an event longer than `most` bytes."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            self._line(line.rstrip(b"\r"))
        if len(self._rest) + self._size > self._most:
            raise ValueError(f"one of more than {self._most >> 10} KiB")

    def end(self) -> None:
        """After the last byte: an event need not end with an empty line."""
        self._line(self._rest.rstrip(b"\r"))
        self._line(b"")
        if self._foreign and not self._taken:
            text = self._foreign.decode("utf-8", errors="replace")
            raise ValueError(_HTML if _is_html(text) else f"a line without `data:` instead: {text}")

    def _line(self, line: bytes) -> None:
        if line.startswith(b"data:"):
            self._data.append(line[5:].strip())
            self._size += len(line)
            if self._size > self._most:
                raise ValueError(f"one of more than {self._most >> 10} KiB")
        elif line and not line.startswith((b":", b"event:", b"id:", b"retry:")):
            self._foreign = self._foreign or line
        elif not line and self._data:
            data, self._data, self._size = b"\n".join(self._data), [], 0
            self._taken = True
            if data != b"[DONE]":
                self._take(_json(data))


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        text = data.decode("utf-8", errors="replace")
        raise ValueError(_HTML if _is_html(text) else f"what is no JSON ({error!s:.80}): {text}") from None


def patiently(ask: Callable[[], Any]) -> Any:
    """The answer; a busy server is asked once more after a pause."""
    try:
        return ask()
    except BusyError as busy:
        time.sleep(busy.wait_s)
        return ask()
