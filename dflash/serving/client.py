"""One request to a server over HTTP, streamed, and its answer, trimmed to the budget.

Two APIs: OpenAI's `/v1/completions`, and SGLang's own `/generate`, which takes and gives token ids. A request is greedy
and asks for nothing more: some servers die of a sampled one, or of one that wants log-probabilities.
"""

import dataclasses
import http.client
import itertools
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from dflash import metrics
from dflash.serving.server import ServingError, opener, redacted
from dflash.tokenizer import Tokenizer

Api = Literal["openai", "sglang"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One answer. Seconds run from the request: `ttft_s` to the first text, `seconds` to the end.

    tokens   ids after the prompt, up to the first stop token (with it, where `exact`) and to the budget
    exact    the server gave the ids; else they are its text, encoded again
    counted  tokens that count, the stop token among them, never more than the budget
    emitted  tokens that the server says it made, before anything was cut
    text     what came, not cut
    told     what else the server said of this request
    """

    tokens: tuple[int, ...]
    exact: bool
    counted: int
    emitted: int
    text: str
    ttft_s: float
    seconds: float
    told: dict[str, Any]


class _RefusedError(ServingError):
    """The server says no to this request: it may take another."""


@dataclasses.dataclass(kw_only=True, slots=True)
class _Reply:
    """What a stream said until its end."""

    text: str = ""
    ids: list[int] = dataclasses.field(default_factory=list)
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finished: bool = False
    told: dict[str, Any] = dataclasses.field(default_factory=dict)

    def take_openai(self, event: dict[str, Any]) -> None:
        for choice in event.get("choices") or []:
            self.text += choice.get("text") or ""
            self.ids += choice.get("token_ids") or []
            self.finished = self.finished or choice.get("finish_reason") is not None
        usage = event.get("usage") or {}
        self.prompt_tokens = usage.get("prompt_tokens", self.prompt_tokens)
        self.completion_tokens = usage.get("completion_tokens", self.completion_tokens)

    def take_sglang(self, event: dict[str, Any]) -> None:
        """Each event holds all so far, or, on servers told so, what is new."""
        meta, text, ids = event.get("meta_info") or {}, event.get("text") or "", event.get("output_ids") or []
        self.prompt_tokens = meta.get("prompt_tokens", self.prompt_tokens)
        self.completion_tokens = meta.get("completion_tokens", self.completion_tokens)
        # Half a character, U+FFFD, is another one in the next event.
        all_so_far = len(ids) == self.completion_tokens if ids else text.startswith(self.text.rstrip("\ufffd"))
        self.text = text if all_so_far else self.text + text
        self.ids = list(ids) if all_so_far else self.ids + list(ids)
        self.finished = self.finished or meta.get("finish_reason") is not None
        self.told = meta


class Client:
    """Asks one server. `model` is the name that it serves; `key` goes into the Authorization header.

    Safe to share between threads once `learn` has returned.
    """

    def __init__(self, url: str, *, api: Api, model: str, tokenizer: Tokenizer, timeout_s: float, key: str = ""):
        self.url, self.api, self.model, self.tokenizer = url.rstrip("/"), api, model, tokenizer
        self._timeout_s = timeout_s
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._opener = opener(self.url)
        self._counts = self._takes_ids = self._gives_ids = True

    def get(self, path: str) -> str:
        """The body of a page. Raises ServingError."""
        with self._send(path, None) as page:
            try:
                return page.read().decode("utf-8", errors="replace")
            except (OSError, http.client.HTTPException) as error:
                raise ServingError(f"{self.url + path} broke off: {error or type(error).__name__}") from None

    def learn(self, prompt: Sequence[int], unnamed: str) -> None:
        """Finds out what the server takes and gives, by asking for one token: ids and counts where it can, else text.

        A client without a model's name takes the only one that is served, or `unnamed`.
        """
        if not self.model and self.api == "openai":
            self.model = self._only_model() or unnamed
        for self._counts, self._takes_ids, self._gives_ids in itertools.product((True, False), repeat=3):
            try:
                self.ask(prompt, 1)
                return
            except _RefusedError as refused:
                last = refused
        raise ServingError(str(last))

    def ask(self, prompt: Sequence[int], max_new_tokens: int) -> Answer:
        """The server's greedy answer. Raises ServingError when it refuses, breaks off, or read another prompt."""
        begun = time.perf_counter()
        ttft_s, reply = None, _Reply()
        take = reply.take_openai if self.api == "openai" else reply.take_sglang
        path, body = self._request(prompt, max_new_tokens)
        for event in self._events(path, body):
            take(event)
            if ttft_s is None and (reply.text or reply.ids):
                ttft_s = time.perf_counter() - begun
        seconds = time.perf_counter() - begun
        if not reply.finished:
            raise ServingError(f"{self.url} broke off an answer after {len(reply.text)} characters")
        if reply.prompt_tokens not in (None, len(prompt)):
            raise ServingError(
                f"both servers must read the same prompt of {len(prompt)} tokens, and {self.url} read "
                f"{reply.prompt_tokens}: it serves another model, or its tokenizer adds tokens to the text"
            )
        return self._answer(reply, max_new_tokens, seconds if ttft_s is None else ttft_s, seconds)

    def _only_model(self) -> str | None:
        try:
            (listed,) = json.loads(self.get("/v1/models"))["data"]
            return listed["id"]
        except (ServingError, ValueError, KeyError, TypeError):  # not every server lists what it serves
            return None

    def _request(self, prompt: Sequence[int], max_new_tokens: int) -> tuple[str, dict[str, Any]]:
        if self.api == "sglang":
            sampling = {"temperature": 0, "max_new_tokens": max_new_tokens}
            return "/generate", {"input_ids": list(prompt), "sampling_params": sampling, "stream": True}
        said = list(prompt) if self._takes_ids else self.tokenizer.decode(prompt, skip_special_tokens=False)
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": said,
            "max_tokens": max_new_tokens,
            "temperature": 0,
            "stream": True,
        }
        if self._counts:
            body |= {"stream_options": {"include_usage": True}}
        return "/v1/completions", body | ({"return_token_ids": True} if self._gives_ids else {})

    def _answer(self, reply: _Reply, max_new_tokens: int, ttft_s: float, seconds: float) -> Answer:
        exact = bool(reply.ids) and reply.completion_tokens in (None, len(reply.ids))
        ids = reply.ids if exact else self.tokenizer.encode(reply.text)
        emitted = len(ids) if reply.completion_tokens is None else reply.completion_tokens
        stop = next((i for i, token in enumerate(ids) if token in self.tokenizer.stop_token_ids), len(ids))
        return Answer(
            # A server that gives ids gives the stop token too.
            tokens=tuple(ids[: min(stop + exact, max_new_tokens)]),
            exact=exact,
            counted=min(stop + 1 if exact else emitted, emitted, max_new_tokens),
            emitted=emitted,
            text=reply.text,
            ttft_s=ttft_s,
            seconds=seconds,
            told=reply.told,
        )

    def _events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a stream, until its end or the server's."""
        with self._send(path, body) as stream:
            try:
                for line in stream:
                    data = line.decode("utf-8", errors="replace").partition("data:")[2].strip()
                    if not data or data == "[DONE]":
                        continue
                    event = json.loads(data)
                    if not isinstance(event, dict):
                        raise ServingError(f"{self.url} must stream JSON objects, got {data!r:.200}")
                    if event.get("error"):
                        raise ServingError(f"{self.url} broke off an answer: {redacted(str(event['error'])):.500}")
                    yield event
            except (OSError, http.client.HTTPException) as error:
                raise ServingError(f"{self.url} broke off an answer: {error or type(error).__name__}") from None
            except json.JSONDecodeError as error:
                raise ServingError(f"{self.url} must stream JSON events, got {data!r:.200}: {error}") from None

    def _send(self, path: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers=self._headers)
        try:
            return self._opener.open(request, timeout=self._timeout_s)
        except urllib.error.HTTPError as error:
            with error:
                said = error.read().decode("utf-8", errors="replace").strip()
            refused = f"{self.url + path} refused a request with {error.code}: {redacted(said):.500}"
            raise _RefusedError(refused) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ServingError(f"{self.url} does not answer: {reason or type(error).__name__}") from None


def first_difference(a: Answer, b: Answer, max_new_tokens: int) -> int | None:
    """The first token at which two answers to one request differ, from 0; None when they are equal.

    Where a server gave text alone and ran over the budget, where to cut it is unknown: of two answers that filled the
    budget, the longer text must begin with the shorter.
    """
    made = sorted((a.emitted, b.emitted))
    if not (a.exact and b.exact) and made[0] >= max_new_tokens and made[1] > max_new_tokens:
        # Half a character at a cut is told as U+FFFD.
        shorter, longer = sorted((a.text.rstrip("\ufffd"), b.text.rstrip("\ufffd")), key=len)
        if longer.startswith(shorter):
            return None
    return metrics.first_difference(a.tokens, b.tokens)
