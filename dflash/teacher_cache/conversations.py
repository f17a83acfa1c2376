"""Conversations to learn from: a prompt, the target's own answer to it, and which side of the split the prompt is on.

A draft is accepted when it says what the target would say, so the target writes the answers; where no prompts are
given it writes the user's turn too. The split is by prompt, never by row: rows of one prompt know each other's answer.
"""

import dataclasses
import hashlib
import importlib.resources
import json
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dflash.models.llama import Llama
from dflash.prompts import Prompt, PromptError, load_prompts, template_around
from dflash.teacher_cache.sample import Sampler
from dflash.tokenizer import Tokenizer

# Evaluation prompts that share this many words in a row with a training prompt would measure memory.
OVERLAP_WORDS = 8


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Token ids: `prompt` through the chat template up to where the answer begins, `answer` with its stop token."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    held_out: bool


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ConversationConfig:
    """What conversations are made of.

    source: `self` (the target writes the user's turn), or what `load_prompts` reads. openings: how the turns that the
    target writes begin, one after another; without any, a target drifts into the small talk it was tuned on. answers:
    `target`, or `given` for conversations that end with the assistant's turn. Lengths in tokens; temperature 0 answers
    greedily, which is what decoding will do.
    """

    source: str = "self"
    openings: tuple[str, ...] = ("",)
    count: int = 1024
    answers: str = "target"
    temperature: float = 0.0
    prompt_temperature: float = 1.0
    min_p: float = 0.05
    max_prompt_len: int = 256
    max_user_turn: int = 96
    max_new_tokens: int = 256
    batch_size: int = 64
    held_out: float = 0.05
    exclude: tuple[str, ...] = ("builtin",)
    seed: int = 0


def prompt_hash(prompt: Sequence[int]) -> str:
    """SHA-256 of a prompt's token ids (int32, little endian): what the split goes by."""
    return hashlib.sha256(np.asarray(prompt, "<i4").tobytes()).hexdigest()


def is_held_out(prompt: Sequence[int], share: float) -> bool:
    """The same prompt is always on the same side, whatever else is drawn."""
    return int(prompt_hash(prompt)[:16], 16) < share * 2**64


def split_record(conversations: Iterable[Conversation]) -> dict[str, Any]:
    """What a cache says of its split: for each side how many prompts, and the SHA-256 of their sorted hashes."""
    sides: dict[str, set[str]] = {"train": set(), "held_out": set()}
    for c in conversations:
        sides["held_out" if c.held_out else "train"].add(prompt_hash(c.prompt))
    return {
        side: {"num_prompts": len(hashes), "sha256": hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest()}
        for side, hashes in sides.items()
    }


class _Overlap:
    """Knows the word sequences of evaluation prompts."""

    def __init__(self, sources: Sequence[str]):
        self._seen: set[tuple[str, ...]] = set()
        for source in sources:
            for prompt in load_prompts(source).prompts:
                self._seen |= set(self._runs(prompt.messages[-1]["content"]))

    @staticmethod
    def _runs(text: str) -> Iterator[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        size = min(OVERLAP_WORDS, max(len(words), 1))
        yield from (tuple(words[i : i + size]) for i in range(len(words) - size + 1))

    def __contains__(self, text: str) -> bool:
        return any(run in self._seen for run in self._runs(text))


def load_openings(source: str) -> tuple[str, ...]:
    """How user turns begin: `builtin`, `none` or a path to a JSONL file of strings. PromptError for anything else."""
    if source == "none":
        return ("",)
    path = Path(source).expanduser()
    if source == "builtin":
        data = (importlib.resources.files("dflash") / "data" / "openings.jsonl").read_bytes()
    elif path.is_file():
        data = path.read_bytes()
    else:
        raise PromptError(f"openings come from builtin, none or a JSONL file of strings; there is no file at {source}")
    openings = []
    for number, line in enumerate(data.splitlines(), 1):
        try:
            opening = json.loads(line)
        except ValueError:
            opening = None
        if not isinstance(opening, str):
            raise PromptError(f"{source}, line {number}: an opening is a JSON string; got {line[:60]!r}")
        openings.append(opening)
    if not openings:
        raise PromptError(f"{source} holds no opening: give at least one line, or `none`")
    return tuple(openings)


def check_sources(config: ConversationConfig) -> None:
    """Raises PromptError for a source that can't be read, before anything is written."""
    for source in (*config.exclude, *(() if config.source == "self" else (config.source,))):
        load_prompts(source)


class _Users:
    """Batches of user turns that the target writes itself; batch n is the same whatever came before it."""

    def __init__(self, target: Llama, tokenizer: Tokenizer, config: ConversationConfig):
        self.tokenizer, self.config = tokenizer, config
        self.front, end = template_around(tokenizer)
        if not self.front or not end:
            raise PromptError(
                "the chat template leaves nothing around the user's words that tells where they begin and end: "
                "give prompts (source) instead of letting the target write them"
            )
        self.stops = {end[0], *tokenizer.stop_token_ids}
        # In an order of its own, so that a batch holds every kind.
        self.openings = random.Random(config.seed).sample(config.openings, len(config.openings))
        self.fronts = [[*self.front, *tokenizer.encode(opening)] for opening in self.openings]
        self.sampler = Sampler(
            target,
            batch=config.batch_size,
            max_prompt_len=max(len(front) for front in self.fronts),
            max_new_tokens=config.max_user_turn,
            stop_token_ids=tuple(sorted(self.stops)),
            temperature=config.prompt_temperature,
            min_p=config.min_p,
            seed=config.seed,
        )

    def batch(self, number: int) -> list[Prompt]:
        size = self.config.batch_size
        indices = range(number * size, (number + 1) * size)
        kinds = [i % len(self.openings) for i in indices]
        rows = self.sampler.run([self.fronts[kind] for kind in kinds], indices=indices)
        # A turn that the budget cut is half a question.
        texts = [
            (self.openings[kind] + self.tokenizer.decode(row[:-1])).strip()
            for kind, row in zip(kinds, rows, strict=True)
            if row[-1] in self.stops
        ]
        return [
            Prompt(id=str(i), category="self", messages=({"role": "user", "content": t},))
            for i, t in enumerate(texts)
            if t
        ]


class _Given:
    """Batches of the prompts of a source."""

    def __init__(self, config: ConversationConfig):
        self.prompts, self.size = load_prompts(config.source).prompts, config.batch_size

    def batch(self, number: int) -> list[Prompt]:
        return list(self.prompts[number * self.size : (number + 1) * self.size])


class Conversations:
    """Makes conversations batch by batch. What a batch holds follows from the config and the batches before it."""

    def __init__(self, target: Llama, tokenizer: Tokenizer, config: ConversationConfig):
        self.tokenizer, self.config = tokenizer, config
        own = config.source == "self"
        self._users: _Users | _Given = _Users(target, tokenizer, config) if own else _Given(config)
        self._overlap = _Overlap(config.exclude)
        self._sampler = Sampler(
            target,
            batch=config.batch_size,
            max_prompt_len=config.max_prompt_len,
            max_new_tokens=config.max_new_tokens,
            stop_token_ids=tokenizer.stop_token_ids,
            temperature=config.temperature,
            min_p=config.min_p,
            seed=config.seed + 1,
        )

    def batch(self, number: int, known: set[str]) -> list[Conversation] | None:
        """The conversations of batch `number` whose prompts' hashes are not in `known`; None when the source ends."""
        prompts = self._users.batch(number)
        if not prompts and isinstance(self._users, _Given):
            return None
        asked: dict[str, tuple[list[int], str]] = {}
        for prompt in prompts:
            ids = self.tokenizer.encode_chat(list(prompt.messages))
            fresh = prompt_hash(ids) not in known and prompt.messages[-1]["content"] not in self._overlap
            if fresh and len(ids) <= self.config.max_prompt_len:
                asked.setdefault(prompt_hash(ids), (ids, prompt.answer))
        known.update(asked)
        rows = [ids for ids, _ in asked.values()]
        if self.config.answers == "given":
            answers = [self._given_answer(text) for _, text in asked.values()]
        else:
            first = number * self.config.batch_size
            answers = self._sampler.run(rows, indices=range(first, first + len(rows))) if rows else []
        return [
            Conversation(prompt=tuple(p), answer=tuple(a), held_out=is_held_out(p, self.config.held_out))
            for p, a in zip(rows, answers, strict=True)
        ]

    def _given_answer(self, text: str) -> list[int]:
        if not text:
            raise PromptError(
                "answers=given needs conversations that end with the assistant's turn; one ends before it"
            )
        return [*self.tokenizer.encode(text), *self.tokenizer.stop_token_ids[:1]][: self.config.max_new_tokens]


def write_conversations(
    target: Llama, tokenizer: Tokenizer, config: ConversationConfig, path: Path
) -> list[Conversation]:
    """Makes `config.count` conversations into a JSONL file, one line a batch, and returns them.

    Goes on where a killed run stopped: a line that was cut short is made again. Raises PromptError when the source has
    too few.
    """
    done = list(_read_batches(path))
    conversations = [c for batch in done for c in batch]
    known = {prompt_hash(c.prompt) for c in conversations}
    if len(conversations) >= config.count:
        return conversations[: config.count]
    maker = Conversations(target, tokenizer, config)
    with (
        path.open("ab") as file,
        tqdm(total=config.count, initial=len(conversations), desc="conversations", unit="") as bar,
    ):
        number = len(done)
        while len(conversations) < config.count:
            batch = maker.batch(number, known)
            if batch is None:
                raise PromptError(
                    f"{config.source} gives {len(conversations)} conversations of at most "
                    f"{config.max_prompt_len} prompt tokens that evaluation prompts don't overlap; got "
                    f"count={config.count}: ask for fewer"
                )
            rows = [[list(c.prompt), list(c.answer), c.held_out] for c in batch]
            file.write(json.dumps({"batch": number, "conversations": rows}).encode() + b"\n")
            file.flush()
            conversations += batch
            bar.update(min(len(batch), config.count - bar.n))
            number += 1
    return conversations[: config.count]


def _read_batches(path: Path) -> Iterator[list[Conversation]]:
    """The whole lines of a file; what a kill left after them is cut off."""
    if not path.exists():
        return
    whole = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            yield [
                Conversation(prompt=tuple(p), answer=tuple(a), held_out=h)
                for p, a, h in json.loads(line)["conversations"]
            ]
    os.truncate(path, whole)


def read_conversations(path: Path) -> list[Conversation]:
    """The conversations of a file that `write_conversations` made."""
    with path.open("rb") as file:
        return [
            Conversation(prompt=tuple(p), answer=tuple(a), held_out=h)
            for line in file
            for p, a, h in json.loads(line)["conversations"]
        ]
