"""Prompt sets by the name of their source: our own (`prompts.jsonl`), published ones, a file, or a data set."""

import dataclasses
import importlib.resources
import string
from pathlib import Path
from typing import Annotated, Any

import tyro

from dflash.config import Checked
from dflash.host.disk import expanded
from dflash.text.prompt import ChatTokenizer, Prompt, PromptError, PromptSet, ids_sha256
from dflash.text.rows import gather, json_of, lines, prompts_in
from dflash.text.sets import SETS, load_set, rows_of

__all__ = ["ChatTokenizer", "Prompt", "PromptError", "PromptSet", "PromptSource", "ids_sha256", "load_prompts"]


def load_prompts(
    source: str | Path, *, data_dir: str | Path | None = None, prompt_template: str = "", raw: bool = False
) -> PromptSet:
    """The prompt set that `source` names.

    `builtin` or `builtin:maths`; a published set such as `gsm8k` (`sets.SETS`), which may lie as a file in `data_dir`;
    a path ending in .jsonl, .json or .parquet, whose rows are of one of the shapes in `rows`, with an optional id and
    category; `hf:NAME[:config][:split][:field]`, where split is `test` and field `prompt` if left out or empty, or
    `prompt_template` makes text of a row's fields ("{question} Explain."). With `raw` no chat template is put around
    the words. PromptError for any other source, for one that can't be read, and for one with faults: all at once.
    """
    if not isinstance(source, str | Path):
        raise PromptError(f"prompts are named by text or a path, got {source!r:.60}")
    source = str(source)
    kind, _, rest = source.partition(":")
    if prompt_template and kind != "hf":
        raise PromptError(f"a prompt template makes text of the fields of hf:NAME; the source is {source!r}")
    if kind == "hf":
        prompt_set = _hugging_face(source, rest, prompt_template)
    elif Path(source).suffix in (".jsonl", ".json", ".parquet"):
        prompt_set = prompts_in(expanded(source), source)
    elif source in SETS:
        prompt_set = load_set(source, data_dir)
    elif source == "builtin" or (kind == "builtin" and rest):
        prompt_set = _builtin(rest)
    else:
        raise PromptError(
            f"prompts come from builtin[:category], {', '.join(SETS)}, a PATH.jsonl, .json or .parquet, or "
            f"hf:NAME[:config][:split][:field]; got {source!r}"
        )
    return prompt_set.raw() if raw else prompt_set


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PromptSource(Checked):
    """Where a command's prompts come from: the options that several commands share."""

    source: Annotated[str, tyro.conf.arg(name="prompts")] = "builtin"
    """builtin[:category], a set by name (gsm8k, mt-bench ...), FILE.jsonl, .json or .parquet, or hf:NAME."""
    data_dir: str = ""
    """Directory of named sets: gsm8k.jsonl, .json or .parquet, as they are published."""
    prompt_template: str = ""
    """What is asked of a row of hf:NAME: "{question} Explain."."""
    raw: bool = False
    """Prompts are plain text to be continued, without a chat template, as for a base model."""

    def load(self) -> PromptSet:
        """The prompts. Raises PromptError."""
        return load_prompts(self.source, data_dir=self.data_dir, prompt_template=self.prompt_template, raw=self.raw)


def _builtin(category: str) -> PromptSet:
    data = (importlib.resources.files("dflash.text") / "prompts.jsonl").read_bytes()
    every = gather("builtin", "line", lines(data), json_of, category="builtin")
    if not category:
        return every
    prompts = tuple(prompt for prompt in every.prompts if prompt.category == category)
    if not prompts:
        known = ", ".join(dict.fromkeys(prompt.category for prompt in every.prompts))
        raise PromptError(f"the categories of builtin are {known}; got {category!r}")
    return dataclasses.replace(every, name=f"builtin:{category}", prompts=prompts)


def _hugging_face(source: str, rest: str, template: str) -> PromptSet:
    name, config, split, field, *more = [*rest.split(":"), "", "", ""]
    if not name or any(more):
        raise PromptError(f"a Hugging Face data set is written hf:NAME[:config][:split][:field]; got {source!r}")
    rows = rows_of(name, config or None, split or "test", source, "save it as a .jsonl file of prompts, and name that")
    wanted = _fields(template) if template else {field or "prompt"}

    def read(row: Any) -> dict[str, Any]:
        if missing := sorted(wanted - set(row)):
            raise PromptError(f"{source} has the fields {', '.join(row)}; got {', '.join(map(repr, missing))}")
        if template:
            if null := sorted(name for name in wanted if row[name] is None):
                raise PromptError(f"a prompt template needs every field that it names; {', '.join(null)} is null")
            if odd := sorted(name for name in wanted if not isinstance(row[name], str | int | float)):
                raise PromptError(f"a prompt template takes text and numbers; got {row[odd[0]]!r:.60} for {odd[0]}")
            return {"prompt": template.format(**row)}
        value = row[field or "prompt"]
        return {"messages" if isinstance(value, list) else "prompt": value}

    return gather(source, "row", enumerate(rows, 1), read, category=name)


def _fields(template: str) -> set[str]:
    """The fields that a template names. Raises PromptError for what is no template."""
    try:
        parts = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as fault:
        raise PromptError(f"a prompt template is text with {{field}} in it: {fault}; got {template!r:.60}") from None
    fields = {str(field) for field, _, _ in parts}
    if not fields or not all(field.isidentifier() for field in fields) or any(how for _, *how in parts if any(how)):
        raise PromptError(f"a prompt template is text with {{field}} in it, a plain name; got {template!r:.60}")
    return fields
