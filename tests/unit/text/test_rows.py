"""The shapes in which prompts are published, and the files that hold them."""

import json

import pytest

from dflash.text.prompts import load_prompts

USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
SHAPES = {
    "messages": {"messages": [USER, ANSWER]},
    "more keys": {"messages": [USER | {"name": "me", "weight": 1}, ANSWER], "tools": [], "source": "x"},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": w} for w in ("Wh", "y?")]}, ANSWER]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
    "conversations of OpenAI": {"conversations": [USER, ANSWER]},
    "instruction": {"instruction": "Why?", "input": "", "output": "So.", "text": "Below is an instruction."},
}


def write(path, rows):
    text = json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows))
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("end", [".jsonl", ".json"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_the_same_prompt(tmp_path, name, end):
    (prompt,) = load_prompts(write(tmp_path / f"own{end}", [SHAPES[name]])).prompts
    assert (prompt.messages, prompt.answer, prompt.text) == ((USER,), "So.", "")


def test_an_instruction_is_followed_by_its_input(tmp_path):
    (prompt,) = load_prompts(write(tmp_path / "a.json", [{"instruction": "Add.", "input": "1 2"}])).prompts
    assert prompt.words == "Add.\n\nInput:\n1 2"


def test_what_is_null_in_a_table_is_not_there(tmp_path):
    rows = [
        {"prompt": "Why?", "turns": None, "id": None, "category": None},
        {"prompt": "How?", "id": 7, "category": "x"},
    ]
    found = load_prompts(write(tmp_path / "a.json", rows)).prompts
    assert [(prompt.id, prompt.category) for prompt in found] == [("row-1", "file"), ("7", "x")]


def test_turns_of_the_user_follow_each_other(tmp_path):
    (prompt,) = load_prompts(write(tmp_path / "a.jsonl", [{"turns": ["One?", "Two?"]}])).prompts
    assert (prompt.words, prompt.later) == ("One?", ("Two?",))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"turns": []}, "is a list of texts"),
        ({"turns": ["a", " "]}, "isn't blank"),
        ({"text": ""}, "isn't blank"),
        ({"text": "a \ud83d b"}, "half of one"),
        ({"prompt": "a", "id": "\ud83d"}, "id is text of whole"),
        ({"instruction": " ", "input": "x"}, "an instruction .*isn't blank"),
        ({"instruction": ["Add."], "input": "x"}, "an instruction .*isn't blank"),
        ({"instruction": "Add.", "input": 5}, "the input .* is text; got 5"),
        ({"conversations": [{"from": "human", "text": "x"}]}, "or from and value"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "a role is one of"),
    ],
)
def test_a_row_of_another_shape_is_refused(tmp_path, row, said):
    with pytest.raises(ValueError, match=rf"\(1\), .*row 1: .*{said}"):
        load_prompts(write(tmp_path / "a.json", [row]))


TWICE = {
    "the prompt": ('{"prompt": "x", "prompt": "y"}', "prompt"),
    "the same prompt": ('{"prompt": "x", "prompt": "x"}', "prompt"),
    "an id": ('{"id": "a", "prompt": "x", "id": "b"}', "id"),
    "a key that is ignored": ('{"prompt": "x", "source": 1, "source": {}}', "source"),
    "a message's content": ('{"messages": [{"role": "user", "content": "x", "content": "y"}]}', "content"),
    "a key spelt in two ways": ('{"prompt": "x", "pr\\u006fmpt": "y"}', "prompt"),
}


@pytest.mark.parametrize("end", [".jsonl", ".json"])
@pytest.mark.parametrize("name", TWICE)
def test_a_key_that_occurs_twice_is_refused(tmp_path, name, end):
    row, key = TWICE[name]
    path = tmp_path / f"own{end}"
    path.write_text(f"[{row}]" if end == ".json" else '{"prompt": "other"}\n' + row)
    with pytest.raises(ValueError, match=rf"{'line 2: ' if end == '.jsonl' else ''}.*'{key}' occurs twice"):
        load_prompts(str(path))


def test_a_key_may_occur_in_two_objects_and_what_is_ignored_be_odd(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "x", "more": {"prompt": "y"}, "score": NaN}\n{"prompt": "z"}')
    assert [prompt.words for prompt in load_prompts(str(path)).prompts] == ["x", "z"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1}', "a JSON list of prompts, got dict"),
        ('{"prompt": "a"}\n{"prompt": "b"}', r"own\.json must .*named \.jsonl"),
    ],
)
def test_a_json_file_that_holds_no_list_is_refused(tmp_path, text, said):
    path = tmp_path / "own.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        load_prompts(str(path))
