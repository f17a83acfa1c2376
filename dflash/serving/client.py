"""One request to a server, streamed, and its completion, trimmed to the budget.

Two APIs: OpenAI's `/v1/completions`, and SGLang's own `/generate`, which takes and returns token ids. A request is
greedy and asks for nothing more, unless sampling is asked for: some servers crash on it, or on log-probabilities.
"""

import abc
import asyncio
import dataclasses
import itertools
import json
import time
from collections.abc import Sequence
from typing import Any, TypeVar

from dflash import metrics
from dflash.decoding.sampling import GREEDILY, Sampling
from dflash.serving.connection import Connection, RejectedError, ServingError, patiently
from dflash.text.tokenizer import Tokenizer

T = TypeVar("T")
# Some servers end an answer with the block that reached the budget; anything longer is a mistake.
_OVER = 1024
_KINDS = {list: "list", dict: "object", str: "text", int: "count"}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """A server's answer to one prompt. Seconds run from the request: `ttft_s` to the first text, `seconds` to the end.

    tokens   ids after the prompt, up to the first stop token (with it, where `exact`) and to the budget
    exact    the server gave the ids; else they are its text, encoded again
    counted  tokens that count, the stop token among them, never more than the budget
    emitted  tokens that the server says it made, before anything was cut
    text     what came, not cut
    meta     what else the server said of this request
    """

    tokens: tuple[int, ...]
    exact: bool
    counted: int
    emitted: int
    text: str
    ttft_s: float
    seconds: float
    meta: dict[str, Any]

    def divergence(self, other: "Completion", max_new_tokens: int) -> int | None:
        """The first token at which two completions of a prompt differ, from 0; None when they are equal.

        Where a server gave text alone and ran over the budget, where to cut it is unknown: of two completions that
        filled the budget, the longer text must begin with the shorter.
        """
        fewer, more = sorted((self.emitted, other.emitted))
        if not (self.exact and other.exact) and fewer >= max_new_tokens and more > max_new_tokens:
            # Half a character at a cut comes as U+FFFD.
            shorter, longer = sorted((self.text.rstrip("\ufffd"), other.text.rstrip("\ufffd")), key=len)
            if longer.startswith(shorter):
                return None
        return metrics.first_difference(self.tokens, other.tokens)


@dataclasses.dataclass(kw_only=True, slots=True)
class Reply:
    """What a stream delivered until its end."""

    text: str = ""
    ids: list[int] = dataclasses.field(default_factory=list)
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finished: bool = False
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)

    def count(self, usage: dict[str, Any]) -> None:
        for name in ("prompt_tokens", "completion_tokens"):
            if (value := _field(usage, name, int)) is not None:
                setattr(self, name, value)


def _kind(value: Any, kind: type[T], name: str) -> T:
    """The value, if it is of this kind. Raises ValueError."""
    if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and value < 0):
        raise ValueError(f"{name} that is no {_KINDS[kind]}: {value!r}")
    return value


def _field(source: Any, name: str, kind: type[T]) -> T | None:
    """A field of an object; None if it is absent or null. Raises ValueError for another kind of value."""
    value = _kind(source, dict, "what holds " + name).get(name)
    return None if value is None else _kind(value, kind, name)


def _items(source: Any, name: str, kind: type[T]) -> list[T]:
    """The values of a list of an object, each of this kind; none if it is absent. Raises ValueError."""
    return [_kind(item, kind, f"an entry of {name}") for item in _field(source, name, list) or []]


class Client(abc.ABC):
    """Asks one server through its API. `model` is the name that it serves."""

    def __init__(self, connection: Connection, *, model: str, tokenizer: Tokenizer, sampling: Sampling = GREEDILY):
        self.connection, self.model, self.tokenizer = connection, model, tokenizer
        # A filter that excludes nothing is left out: not every server knows every filter.
        facts, neutral = sampling.facts or {"temperature": 0}, GREEDILY
        self._sampling = {n: v for n, v in facts.items() if n in ("temperature", "seed") or v != getattr(neutral, n)}

    @abc.abstractmethod
    def request(self, prompt: Sequence[int], max_new_tokens: int) -> tuple[str, dict[str, Any]]:
        """Path and body of a request for a stream."""

    @abc.abstractmethod
    def take(self, reply: Reply, event: Any) -> None:
        """Adds an event of the stream to the reply. Raises ValueError for an event of another shape."""

    def learn(self, prompt: Sequence[int], unnamed: str) -> None:
        """Finds out what the server takes and returns by asking for one token. Raises ServingError.

        A client without a model's name uses the only one that is served, or `unnamed`.
        """
        patiently(lambda: asyncio.run(self.ask(prompt, 1)))

    async def ask(self, prompt: Sequence[int], max_new_tokens: int) -> Completion:
        """The server's completion. Raises ServingError if it refuses, breaks off, or read another prompt."""
        reply, ttft_s = Reply(), None
        path, body = self.request(prompt, max_new_tokens)
        begun = time.perf_counter()

        def take(event: Any) -> None:
            nonlocal ttft_s
            if error := _kind(event, dict, "an event").get("error"):
                raise ValueError(f"an error: {error}")
            self.take(reply, event)
            if ttft_s is None and (reply.text or reply.ids):
                ttft_s = time.perf_counter() - begun

        await self.connection.stream(path, body, take, max_new_tokens)
        seconds = time.perf_counter() - begun
        if not reply.finished:
            raise self.connection.error(f" broke off an answer after {len(reply.text)} characters")
        if (reply.completion_tokens or 0) > max_new_tokens + _OVER:
            raise self.connection.error(
                f" must answer with the {max_new_tokens} tokens that were asked for, and says that it made more than "
                f"{_OVER} over that"
            )
        if reply.prompt_tokens not in (None, len(prompt)):
            raise self.connection.error(
                f" must read the same prompt of {len(prompt)} tokens as every server, and read {reply.prompt_tokens}: "
                "it serves another model, or its tokenizer adds tokens to the text"
            )
        return self._completion(reply, max_new_tokens, seconds if ttft_s is None else ttft_s, seconds)

    def _completion(self, reply: Reply, max_new_tokens: int, ttft_s: float, seconds: float) -> Completion:
        # Halves of a surrogate pair, which JSON may contain, make one character or none.
        text = reply.text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        exact = bool(reply.ids) and reply.completion_tokens in (None, len(reply.ids))
        ids = reply.ids if exact else self.tokenizer.encode(text)
        emitted = len(ids) if reply.completion_tokens is None else reply.completion_tokens
        stop = next((i for i, token in enumerate(ids) if token in self.tokenizer.stop_token_ids), len(ids))
        return Completion(
            # A server that returns ids returns the stop token too.
            tokens=tuple(ids[: min(stop + exact, max_new_tokens)]),
            exact=exact,
            counted=min(stop + 1 if exact else emitted, emitted, max_new_tokens),
            emitted=emitted,
            text=text,
            ttft_s=ttft_s,
            seconds=seconds,
            meta=reply.meta,
        )


class OpenAIClient(Client):
    """OpenAI's completions; ids and counts if the server can, else text."""

    _counts = _takes_ids = _gives_ids = True

    def learn(self, prompt: Sequence[int], unnamed: str) -> None:
        if not self.model:
            self.model = self._only_model() or unnamed
        for self._counts, self._takes_ids, self._gives_ids in itertools.product((True, False), repeat=3):
            try:
                return super().learn(prompt, unnamed)
            except RejectedError as rejected:
                last = rejected
        raise ServingError(str(last))

    def _only_model(self) -> str | None:
        """The name of the served model; None if the server lists none or more than one."""
        try:
            (model,) = _items(json.loads(self.connection.page("/v1/models")), "data", dict)
            return _field(model, "id", str)
        except RejectedError:
            return None
        except (ValueError, RecursionError) as error:
            if isinstance(error, ServingError):
                raise
            return None

    def request(self, prompt: Sequence[int], max_new_tokens: int) -> tuple[str, dict[str, Any]]:
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": list(prompt) if self._takes_ids else self.tokenizer.decode(prompt, skip_special_tokens=False),
            "max_tokens": max_new_tokens,
            "stream": True,
            **self._sampling,
        }
        if self._counts:
            body |= {"stream_options": {"include_usage": True}}
        return "/v1/completions", body | ({"return_token_ids": True} if self._gives_ids else {})

    def take(self, reply: Reply, event: Any) -> None:
        choices = _items(event, "choices", dict)
        if len(choices) > 1 or any(_field(choice, "index", int) for choice in choices):
            raise ValueError("more than the one choice that was asked for")
        for choice in choices:
            reply.text += _field(choice, "text", str) or ""
            reply.ids += _items(choice, "token_ids", int)
            reply.finished = reply.finished or choice.get("finish_reason") is not None
        reply.count(_field(event, "usage", dict) or {})


class SglangClient(Client):
    """SGLang's own API, which has no name of a model."""

    def request(self, prompt: Sequence[int], max_new_tokens: int) -> tuple[str, dict[str, Any]]:
        # It has another name for the seed.
        sampling = {"sampling_seed" if n == "seed" else n: v for n, v in self._sampling.items()}
        sampling |= {"max_new_tokens": max_new_tokens}
        return "/generate", {"input_ids": list(prompt), "sampling_params": sampling, "stream": True}

    def take(self, reply: Reply, event: Any) -> None:
        """Each event holds everything so far, or only what is new, if the server was told so."""
        meta = _field(event, "meta_info", dict) or {}
        text, ids = _field(event, "text", str) or "", _items(event, "output_ids", int)
        reply.count(meta)
        # Half a character, U+FFFD, is a different one in the next event.
        all_so_far = len(ids) == reply.completion_tokens if ids else text.startswith(reply.text.rstrip("\ufffd"))
        reply.text = text if all_so_far else reply.text + text
        reply.ids = ids if all_so_far else reply.ids + ids
        reply.finished = reply.finished or meta.get("finish_reason") is not None
        reply.meta = meta
