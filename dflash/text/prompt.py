"""Prompts, sets of them in a fixed order, and what identifies them once they are encoded."""

import collections
import dataclasses
import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from dflash.config import UserError


class PromptError(UserError, ValueError):
    """A prompt source that can't be used: the rule, what came, and what to do."""


ROLES = ("system", "developer", "user", "assistant")


def text_of(value: Any, what: str) -> str:
    """The value, if it is text with words in it. Raises PromptError."""
    if not isinstance(value, str) or not value.strip():
        raise PromptError(f"{what} is text that isn't blank; got {value!r:.60}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise PromptError(f"{what} is text of whole characters; half of one is in {value!r:.60}") from None
    return value


class ChatTokenizer(Protocol):
    """What prompts need from a tokenizer: a conversation, or plain text, as token ids."""

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]: ...

    def encode_raw(self, text: str) -> list[int]: ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One conversation to be answered: `messages` are {"role", "content"}, the last one the user's.

    `later` are the user's next turns, each after the answer to the one before. `answer` is the source's own answer, if
    it has one: used in training only, not part of the prompt. A raw prompt has no messages but `text`, which is to be
    continued, without a chat template.
    """

    id: str
    category: str
    messages: tuple[dict[str, str], ...] = ()
    later: tuple[str, ...] = ()
    answer: str = ""
    text: str = ""

    def __post_init__(self) -> None:
        for name, value in (("id", self.id), ("category", self.category)):
            text_of(value, name)
        for message in self.messages:
            if not isinstance(message, dict) or set(message) != {"role", "content"}:
                raise PromptError(f"a message is an object of role and content, nothing else; got {message!r:.60}")
            if message["role"] not in ROLES:
                raise PromptError(f"a role is one of {', '.join(ROLES)}; got {message['role']!r:.60}")
        # A model's own answer may have no words.
        contents = [m["content"] for m in self.messages if m["content"] != "" or m["role"] != "assistant"]
        for words in (*contents, *self.later, *(() if self.messages else (self.text,))):
            text_of(words, "a message or prompt")
        if self.messages and self.messages[-1]["role"] != "user":
            raise PromptError(
                f"the last message is the user's, since it is to be answered; got {self.messages[-1]['role']}"
            )

    @property
    def words(self) -> str:
        """The text that is to be answered or continued."""
        return self.messages[-1]["content"] if self.messages else self.text

    def encode(self, tokenizer: ChatTokenizer) -> list[int]:
        """Token ids, with the chat template up to where the answer begins, or those of the raw text."""
        return tokenizer.encode_chat(self.messages) if self.messages else tokenizer.encode_raw(self.text)

    def raw(self) -> "Prompt":
        """The same words without a chat template. PromptError for several messages, which only a template joins."""
        if len(self.messages) > 1 or self.later:
            raise PromptError(
                f"plain text to be continued is one message, since only a chat template joins several; {self.id} has "
                "more: leave --raw out, or choose prompts of one message"
            )
        return dataclasses.replace(self, messages=(), later=(), answer="", text=self.words)

    def answered(self, answer: str) -> "Prompt":
        """The conversation at the user's next turn, after this answer."""
        turns = ({"role": "assistant", "content": answer}, {"role": "user", "content": self.later[0]})
        return dataclasses.replace(self, messages=(*self.messages, *turns), later=self.later[1:])


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PromptSet:
    """Prompts in a fixed order. `name` says where they come from."""

    name: str
    prompts: tuple[Prompt, ...]

    def __post_init__(self) -> None:
        if not self.prompts:
            raise PromptError(f"a prompt set needs at least one prompt; {self.name} has none")
        times = collections.Counter(prompt.id for prompt in self.prompts)
        if twice := [each for each, n in times.items() if n > 1]:
            raise PromptError(f"an id occurs once in a prompt set; more than once in {self.name}: {', '.join(twice)}")

    def take(self, n: int, seed: int | None = None) -> "PromptSet":
        """`n` of the prompts: one of each category in turn or, with a seed, the first `n` of a shuffle.

        The shuffle is that of the reference benchmark, whose seed is 42. PromptError if the set has fewer than `n`.
        """
        if not 1 <= n <= len(self.prompts):
            raise PromptError(f"take 1 to {len(self.prompts)} prompts, which is all that {self.name} has; got {n}")
        if seed is not None:
            order = list(self.prompts)
            random.Random(seed).shuffle(order)
            return PromptSet(name=f"{self.name}[{n},seed={seed}]", prompts=tuple(order[:n]))
        turns = itertools.zip_longest(*self.by_category().values())
        spread = [prompt for turn in turns for prompt in turn if prompt is not None]
        return PromptSet(name=f"{self.name}[{n}]", prompts=tuple(spread[:n]))

    def by_category(self) -> dict[str, list[Prompt]]:
        """The prompts of each category, both in order."""
        taken: dict[str, list[Prompt]] = {}
        for prompt in self.prompts:
            taken.setdefault(prompt.category, []).append(prompt)
        return taken

    def raw(self) -> "PromptSet":
        """The same words without a chat template."""
        return dataclasses.replace(self, prompts=tuple(prompt.raw() for prompt in self.prompts))

    def encode(self, tokenizer: ChatTokenizer, max_prompt_len: int | None = None) -> list[list[int]]:
        """Token ids of each prompt's first turn, with the chat template, up to where the answer begins.

        `max_prompt_len` is in tokens; PromptError names all longer prompts. Truncating would change the question.
        """
        rows = [prompt.encode(tokenizer) for prompt in self.prompts]
        lengths = {prompt.id: len(row) for prompt, row in zip(self.prompts, rows, strict=True)}
        if max_prompt_len is not None and max(lengths.values()) > max_prompt_len:
            long = ", ".join(f"{each} ({n})" for each, n in lengths.items() if n > max_prompt_len)
            raise PromptError(
                f"a prompt has at most {max_prompt_len} tokens; got {long}: allow more or leave these out"
            )
        return rows

    def turn_by_turn(self, answer: Callable[[list[Prompt]], list[str]]) -> "PromptSet":
        """Every turn as a prompt of its own, with the answers before it; `answer` gives those to prompts at a time."""
        turns = [[prompt] for prompt in self.prompts]
        while waiting := [talk for talk in turns if talk[-1].later]:
            for talk, text in zip(waiting, answer([talk[-1] for talk in waiting]), strict=True):
                following = talk[-1].answered(text)
                talk.append(dataclasses.replace(following, id=f"{talk[0].id}-turn-{len(talk) + 1}"))
        return PromptSet(name=self.name, prompts=tuple(prompt for talk in turns for prompt in talk))


def ids_sha256(rows: Iterable[Sequence[int]]) -> str:
    """What identifies encoded prompts: SHA-256 of their token ids in order, wherever they came from."""
    return hashlib.sha256(json.dumps([list(map(int, row)) for row in rows], separators=(",", ":")).encode()).hexdigest()
