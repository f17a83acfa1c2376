"""Conversations to learn from: a prompt, the target's own answer to it, and which side of the split the prompt is on.

A draft is accepted when it proposes what the target would say, so the target writes the answers, and without given
prompts also the user's turns. The split is by prompt, never by row: rows of one prompt contain each other's answer.
"""

import dataclasses
import hashlib
import importlib.resources
import json
import os
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from tqdm import tqdm

from dflash.config import Count, Fraction, Index, Mass, Seed, Share, Temperature
from dflash.decoding.sampling import Sampling
from dflash.host.disk import expanded, parse_object, whole_lines
from dflash.models.llama import Llama
from dflash.text.lengths import template_around
from dflash.text.prompts import Prompt, PromptError, PromptSource, load_prompts
from dflash.text.tokenizer import Tokenizer
from dflash.training.cache.arrays import CacheError
from dflash.training.cache.sample import Sampler

# An evaluation prompt that shares this many words in a row with a training prompt would measure memorisation.
OVERLAP_WORDS = 8


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Token ids: `prompt` through the chat template up to where the answer begins, `answer` with its stop token."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    held_out: bool


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ConversationConfig(PromptSource):
    """How conversations are made; the text of a cache."""

    source: Annotated[str, tyro.conf.arg(name="prompts")] = "self"
    """self (the target writes the user's turn too), builtin[:category], a set by name (gsm8k, alpaca ...), FILE.jsonl,
    .json or .parquet of prompts or conversations, or hf:NAME; of several turns the first is asked."""
    openings: str = "builtin"
    """How the turns that the target writes begin: builtin (as usual requests do), none, or a JSONL file of strings.
    Without any, a target drifts into the small talk it was tuned on."""
    count: Annotated[Count, tyro.conf.arg(name="num-conversations")] = 1024
    """Number of conversations to make."""
    answers: Literal["target", "given"] = "target"
    """Whose answers: the target's, or those given in the source's conversations."""
    temperature: Temperature = 0.0
    """Temperature of the answers; 0 is greedy, as decoding will be."""
    prompt_temperature: Temperature = 1.0
    """Temperature of the user turns that the target writes."""
    top_k: Index = 0
    """With a temperature above 0: draw from this many of the likeliest tokens; 0 from all."""
    top_p: Mass = 1.0
    """With a temperature above 0: draw from the likeliest tokens that reach this probability together."""
    min_p: Share = 0.05
    """With a temperature above 0: exclude tokens less likely than this fraction of the likeliest."""
    max_prompt_len: Count = 256
    """Longest prompt in tokens; longer ones are left out."""
    max_user_turn: Count = 96
    """Longest user turn that the target writes, in tokens; a turn that does not end by then is left out."""
    max_new_tokens: Count = 256
    """Longest answer in tokens."""
    batch_size: Count = 32
    """Conversations or windows at a time; features of sequences are read an eighth of this at a time."""
    held_out: Fraction = 0.05
    """Share of the prompts that training never sees."""
    exclude: tuple[str, ...] = ("builtin",)
    """Evaluation prompts: a conversation that shares 8 words in a row with one of them is left out."""
    seed: Seed = 0
    """Seed of every draw."""

    def sampling(self, temperature: float, seed: int) -> Sampling:
        """How tokens are drawn at this temperature."""
        return Sampling(temperature=temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p, seed=seed)

    def excluded(self) -> Iterator[Prompt]:
        """The evaluation prompts. Raises PromptError."""
        for source in self.exclude:
            yield from load_prompts(source, data_dir=self.data_dir).prompts


def prompt_hash(prompt: Sequence[int]) -> str:
    """SHA-256 of a prompt's token ids (int32, little endian)."""
    return hashlib.sha256(np.asarray(prompt, "<i4").tobytes()).hexdigest()


def is_held_out(prompt: Prompt, variables: Mapping[str, Any], share: float) -> bool:
    """Whether a prompt is held out: by its messages and the template's variables, so that no date moves it across."""
    identity = json.dumps([prompt.messages or prompt.text, variables], sort_keys=True).encode()
    return int(hashlib.sha256(identity).hexdigest()[:16], 16) < share * 2**64


def split_record(conversations: Iterable[Conversation]) -> dict[str, Any]:
    """A cache's record of its split: the number of prompts on each side and the SHA-256 of their sorted hashes."""
    sides: dict[str, set[str]] = {"train": set(), "held_out": set()}
    for c in conversations:
        sides["held_out" if c.held_out else "train"].add(prompt_hash(c.prompt))
    return {
        side: {"num_prompts": len(hashes), "sha256": hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest()}
        for side, hashes in sides.items()
    }


class _Overlap:
    """The word sequences of evaluation prompts."""

    def __init__(self, prompts: Iterable[Prompt]):
        turns = (words for prompt in prompts for words in (prompt.words, *prompt.later))
        self._seen = {run for words in turns for run in self._runs(words)}

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
    path = expanded(source)
    if source == "builtin":
        data = (importlib.resources.files("dflash.text") / "openings.jsonl").read_bytes()
    elif path.is_file():
        data = path.read_bytes()
    else:
        raise PromptError(f"openings come from builtin, none or a JSONL file of strings; there is no file at {source}")
    openings = []
    for number, line in enumerate(data.splitlines(), 1):
        try:
            opening = json.loads(line)
        except (ValueError, RecursionError):
            opening = None
        if not isinstance(opening, str):
            raise PromptError(f"{source}, line {number}: an opening is a JSON string; got {line[:60]!r}")
        openings.append(opening)
    if not openings:
        raise PromptError(f"{source} holds no opening: give at least one line, or `none`")
    return tuple(openings)


def check_sources(config: ConversationConfig, max_position: int) -> None:
    """Raises PromptError for a source that can't be read, or turns that can't be written, before anything is."""
    if config.source == "self" and config.max_user_turn >= max_position:
        raise PromptError(
            f"a user turn that the target writes stays within its {max_position} positions; got max_user_turn "
            f"{config.max_user_turn}: lower it"
        )
    load_openings(config.openings)
    list(config.excluded())
    if config.source != "self":
        config.load()


class _Users:
    """Batches of user turns that the target writes itself; batch n is the same whatever came before it."""

    def __init__(self, target: Llama, tokenizer: Tokenizer, config: ConversationConfig):
        self.tokenizer, self.config = tokenizer, config
        self.front, end = template_around(tokenizer)
        if not self.front or not end:
            raise PromptError(
                "the chat template leaves nothing around the user's words to show where they begin and end: "
                "give prompts (source) instead of letting the target write them"
            )
        self.stops = {end[0], *tokenizer.stop_token_ids}
        # In a shuffled order, so that a batch holds every kind.
        openings = load_openings(config.openings)
        self.openings = random.Random(config.seed).sample(openings, len(openings))
        self.fronts = [[*self.front, *tokenizer.encode(opening)] for opening in self.openings]
        self.sampler = Sampler(
            target,
            batch=config.batch_size,
            max_prompt_len=max(len(front) for front in self.fronts),
            max_new_tokens=config.max_user_turn,
            stop_token_ids=tuple(sorted(self.stops)),
            sampling=config.sampling(config.prompt_temperature, config.seed),
        )

    def batch(self, number: int) -> list[Prompt]:
        size = self.config.batch_size
        indices = range(number * size, (number + 1) * size)
        kinds = [i % len(self.openings) for i in indices]
        rows = self.sampler.run([self.fronts[kind] for kind in kinds], indices=indices)
        # A turn cut by the budget is half a question.
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
        self.prompts, self.size = config.load().prompts, config.batch_size

    def batch(self, number: int) -> list[Prompt]:
        return list(self.prompts[number * self.size : (number + 1) * self.size])


class Conversations:
    """Makes conversations batch by batch. A batch depends on the config and the batches before it.

    `dropped` of the last batch had an answer with an id that the tokenizer doesn't have.
    """

    dropped = 0

    def __init__(self, target: Llama, tokenizer: Tokenizer, config: ConversationConfig):
        self.tokenizer, self.config = tokenizer, config
        own = config.source == "self"
        self._users: _Users | _Given = _Users(target, tokenizer, config) if own else _Given(config)
        self._overlap = _Overlap(config.excluded())
        self._sampler = Sampler(
            target,
            batch=config.batch_size,
            max_prompt_len=config.max_prompt_len,
            max_new_tokens=config.max_new_tokens,
            stop_token_ids=tokenizer.stop_token_ids,
            sampling=config.sampling(config.temperature, config.seed + 1),
        )

    def batch(self, number: int, known: set[str]) -> list[Conversation] | None:
        """The conversations of batch `number` whose prompts' hashes are not in `known`; None at the source's end."""
        prompts = self._users.batch(number)
        if not prompts and isinstance(self._users, _Given):
            return None
        questions: dict[str, tuple[list[int], list[int], bool]] = {}
        for prompt in prompts:
            ids, answer = self._encode(prompt)
            fresh = prompt_hash(ids) not in known and prompt.words not in self._overlap
            if fresh and len(ids) <= self.config.max_prompt_len:
                held_out = is_held_out(prompt, self.tokenizer.variables, self.config.held_out)
                questions.setdefault(prompt_hash(ids), (ids, answer[: self.config.max_new_tokens], held_out))
        known.update(questions)
        rows, answers, sides = map(list, zip(*questions.values(), strict=True)) if questions else ([], [], [])
        if rows and self.config.answers == "target":
            first = number * self.config.batch_size
            answers = self._sampler.run(rows, indices=range(first, first + len(rows)))
        made = []
        # Rows of a padded head are no tokens: nothing that a tokenizer makes teaches them.
        strange = set(self.tokenizer.unknown({i for answer in answers for i in answer}))
        for prompt_ids, answer, side in zip(rows, answers, sides, strict=True):
            if strange.isdisjoint(answer):
                made.append(Conversation(prompt=tuple(prompt_ids), answer=tuple(answer), held_out=side))
        self.dropped = len(rows) - len(made)
        return made

    def _encode(self, prompt: Prompt) -> tuple[list[int], list[int]]:
        """Ids of a prompt, and of its answer where that is given."""
        if self.config.answers != "given":
            return prompt.encode(self.tokenizer), []
        if not prompt.answer:
            raise PromptError(
                "answers=given needs conversations that end with the assistant's turn; one ends before it"
            )
        return self.tokenizer.encode_answered([*prompt.messages, {"role": "assistant", "content": prompt.answer}])


def write_conversations(
    target: Llama, tokenizer: Tokenizer, config: ConversationConfig, path: Path
) -> list[Conversation]:
    """Writes `config.count` conversations to a JSONL file, one line per batch, and returns them.

    Resumes where a killed run stopped; a line that was cut short is made again. Raises PromptError if the source has
    too few.
    """
    done = read_batches(path)
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
            line = {"batch": number, "conversations": rows, "dropped": maker.dropped}
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            conversations += batch
            bar.update(min(len(batch), config.count - bar.n))
            number += 1
    return conversations[: config.count]


def read_batches(path: Path) -> list[list[Conversation]]:
    """The complete lines of a file; what a kill left after them is cut off. Raises CacheError for one that is none."""
    if not path.exists():
        return []
    lines, size = whole_lines(path)
    batches = [_conversations_of(line, f"{path}, line {number},") for number, line in enumerate(lines, 1)]
    os.truncate(path, size)
    return batches


def _conversations_of(line: bytes, place: str) -> list[Conversation]:
    remedy = "it is damaged, build the cache again"
    rows = parse_object(line, place, CacheError, remedy).get("conversations")
    if not isinstance(rows, list) or not all(_is_conversation(row) for row in rows):
        raise CacheError(f"{place} must hold conversations, each a prompt, an answer and its side: {remedy}")
    return [Conversation(prompt=tuple(p), answer=tuple(a), held_out=h) for p, a, h in rows]


def _is_conversation(row: Any) -> bool:
    return (
        isinstance(row, list)
        and len(row) == 3
        and all(isinstance(ids, list) and ids and all(type(i) is int for i in ids) for ids in row[:2])
        and isinstance(row[2], bool)
    )
