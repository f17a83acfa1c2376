"""Rows of files and data sets as prompts: the shapes in which conversations are published."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dflash.config import fault_list
from dflash.host.disk import unique_keys
from dflash.text.prompt import Prompt, PromptError, PromptSet, text_of

# What a row may hold its words under; other keys are ignored. `text` counts where there is none of the others, since
# some sets keep a rendering under it.
_SHAPES = ("prompt", "messages", "conversations", "turns", "instruction")
_BY_LINE = "a file with a row on each line is named .jsonl"
# As in ShareGPT.
_SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}


Read = Callable[[Any], Any]


def prompts_in(path: Path, name: str, read: Read = lambda row: row, category: str = "file") -> PromptSet:
    """The prompts of a .jsonl, .json or .parquet file; `read` makes a row in one of the shapes of each of its rows."""
    if not path.is_file():
        raise PromptError(f"a path to prompts names a file; there is none at {name}")
    if path.suffix == ".jsonl":
        return gather(name, "line", lines(path.read_bytes()), lambda line: read(json_of(line)), category)
    return gather(name, "row", enumerate(_table(path), 1), read, category)


def _table(path: Path) -> list[Any]:
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ModuleNotFoundError:
            raise PromptError(f"{path} is read by a package: python -m pip install 'datasets>=3'") from None
        try:
            rows: list[Any] = pyarrow.parquet.read_table(path).to_pylist()
        except (OSError, ValueError, pyarrow.lib.ArrowException) as error:
            raise PromptError(f"{path} must be a Parquet file, got: {error}; fetch it again") from None
        return rows
    try:
        rows = json_of(path.read_bytes())
    except PromptError as fault:
        raise PromptError(f"{path} must hold a JSON list of prompts: {fault}; {_BY_LINE}") from None
    if not isinstance(rows, list):
        raise PromptError(f"{path} must hold a JSON list of prompts, got {type(rows).__name__}; {_BY_LINE}")
    return rows


def gather(name: str, unit: str, numbered: Iterable[tuple[int, Any]], read: Read, category: str) -> PromptSet:
    """Makes a prompt from what `read` finds in each line or row; all faults come in one PromptError."""
    prompts: dict[str, Prompt] = {}
    found_at: dict[str, int] = {}
    faults = []
    for number, line in numbered:
        try:
            prompt = prompt_of(read(line), f"{unit}-{number}", category)
            if found_at.setdefault(prompt.id, number) != number:
                raise PromptError(f"an id occurs once; {prompt.id} is already that of {unit} {found_at[prompt.id]}")
        except ValueError as fault:
            faults.append(f"{unit} {number}: {fault}")
        else:
            prompts[prompt.id] = prompt
    if faults:
        raise PromptError(f"faults in {name} ({len(faults)}), to be fixed or removed: {fault_list(faults)}")
    return PromptSet(name=name, prompts=tuple(prompts.values()))


def lines(data: bytes) -> list[tuple[int, bytes]]:
    """The lines of a JSONL file that are not blank, with their numbers."""
    return [(number, line) for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]


def json_of(text: bytes) -> Any:
    """The value that JSON text holds. Raises PromptError, also for a key that occurs twice in one object.

    Otherwise it is read as loosely as Python does: a NaN under a key that is ignored is harmless.
    """
    try:
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=unique_keys)
    except json.JSONDecodeError as fault:
        line = "" if fault.lineno == 1 else f"line {fault.lineno}, "
        raise PromptError(f"not JSON: {fault.msg} at {line}column {fault.colno}") from None
    except RecursionError:
        raise PromptError("not JSON that can be read: it nests too deeply") from None
    except ValueError as fault:  # no UTF-8, a number of thousands of digits, or a key twice
        raise PromptError(f"not JSON that can be read: {fault!s:.80}") from None


def prompt_of(row: Any, own_id: str, category: str) -> Prompt:
    """The prompt that a row holds, in whichever shape. Raises PromptError."""
    shapes = []
    if isinstance(row, dict):
        shapes = [s for s in _SHAPES if row.get(s) is not None] or ["text"] * ("text" in row)
    if len(shapes) != 1:
        raise PromptError(f"an object with one of {', '.join(_SHAPES)} or text is wanted; got {row!r:.60}")
    (shape,) = shapes
    # A table has null for what a row lacks.
    given, kind = (
        row[key] if row.get(key) is not None else own for key, own in (("id", own_id), ("category", category))
    )
    whole: dict[str, Any] = {"id": str(given) if type(given) is int else given, "category": kind}
    words = row[shape]
    if shape == "text":
        return Prompt(**whole, text=words)
    if shape in ("messages", "conversations"):
        if not isinstance(words, list):
            raise PromptError(f'"{shape}" is a list; got {words!r:.60}')
        messages = [_message(message) for message in words]
    elif shape == "turns":
        if not isinstance(words, list) or not words:
            raise PromptError(f'"turns" is a list of texts; got {words!r:.60}')
        return Prompt(**whole, messages=({"role": "user", "content": words[0]},), later=tuple(words[1:]))
    else:
        more = row.get("input") if shape == "instruction" else None
        if more and not isinstance(more, str):
            raise PromptError(f"the input of an instruction is text; got {more!r:.60}")
        words = text_of(words, "an instruction") if more else words
        # The words between them are those of the published figures.
        messages = [{"role": "user", "content": f"{words}\n\nInput:\n{more}" if more else words}]
        if shape == "instruction" and isinstance(row.get("output"), str) and row["output"]:
            messages.append({"role": "assistant", "content": row["output"]})
    answer = ""
    if len(messages) > 1 and messages[-1]["role"] == "assistant" and isinstance(messages[-1]["content"], str):
        answer = messages.pop()["content"]
    return Prompt(**whole, messages=tuple(messages), answer=answer)


def _message(message: Any) -> dict[str, Any]:
    """Role and content of a message, as OpenAI (content may be parts) or ShareGPT writes it; more keys are ignored."""
    if not isinstance(message, dict):
        raise PromptError(f"a message is an object of role and content, or from and value; got {message!r:.60}")
    for role, content in (("role", "content"), ("from", "value")):
        if role in message and content in message:
            speaker, words = message[role], message[content]
            if isinstance(words, list):
                words = "".join(map(_part, words))
            return {"role": _SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker, "content": words}
    raise PromptError(f"a message is an object of role and content, or from and value; got {message!r:.60}")


def _part(part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise PromptError(f'of the parts of a content only {{"type": "text", "text": ...}} is read; got {part!r:.60}')
    text: str = part["text"]
    return text
