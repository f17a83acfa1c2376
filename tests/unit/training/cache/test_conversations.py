"""Conversations to learn from: who writes them, which side of the split they are on, and what a kill leaves."""

import dataclasses
import json

import pytest

from dflash import decode, load_target, load_tokenizer
from dflash.config import ConfigError
from dflash.text.prompts import PromptError, load_prompts
from dflash.training.cache.arrays import CacheError
from dflash.training.cache.conversations import (
    ConversationConfig,
    is_held_out,
    load_openings,
    read_batches,
    split_record,
    write_conversations,
)
from dflash.weights.tiny import write_tiny_target, write_tiny_tokenizer

SELF = ConversationConfig(
    count=20,
    max_prompt_len=64,
    max_user_turn=24,
    max_new_tokens=12,
    batch_size=16,
    held_out=0.3,
    seed=5,
    openings="none",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("conversations") / "target"
    return write_tiny_tokenizer(write_tiny_target(directory, vocab_size=260, num_hidden_layers=2))


@pytest.fixture(scope="module")
def target(folder):
    return load_target(folder)


@pytest.fixture(scope="module")
def tokenizer(folder):
    tokenizer = load_tokenizer(folder)
    # A random target hardly ever ends a turn by itself.
    tokenizer.stop_token_ids = (1, *range(100, 140))
    return tokenizer


@pytest.fixture
def make(target, tokenizer, tmp_path):
    def make(config=SELF, name="c.jsonl"):
        return write_conversations(target, tokenizer, config, tmp_path / name)

    return make


def asks(tmp_path, *texts, answer=None):
    lines = []
    for text in texts:
        messages = [{"role": "user", "content": text}]
        messages += [{"role": "assistant", "content": answer}] if answer else []
        lines.append(json.dumps({"messages": messages}))
    path = tmp_path / "asks.jsonl"
    path.write_text("\n".join(lines))
    return dataclasses.replace(SELF, source=str(path), count=len(texts))


def test_the_target_writes_both_sides(make, tokenizer):
    conversations = make()
    assert len(conversations) == 20
    assert len({c.prompt for c in conversations}) == 20
    front, end = tokenizer.encode_chat([{"role": "user", "content": "x"}])[:1], tokenizer.id_of("<|assistant|>")
    for c in conversations:
        assert [c.prompt[0], c.prompt[-1]] == [*front, end]
        assert 1 <= len(c.answer) <= 12
        assert len(c.answer) == 12 or c.answer[-1] in tokenizer.stop_token_ids


def test_turns_begin_as_told(make, tokenizer, tmp_path):
    front = tokenizer.encode_chat([{"role": "user", "content": "x"}])
    front = front[: front.index(*tokenizer.encode("x"))]
    openings = ("Why", "Write a list of")
    (tmp_path / "openings.jsonl").write_text("\n".join(map(json.dumps, openings)))
    texts = dataclasses.replace(SELF, openings=str(tmp_path / "openings.jsonl"))
    prompts = [list(c.prompt[len(front) :]) for c in make(texts)]
    begins = [tokenizer.encode(opening) for opening in openings]
    counts = [sum(p[: len(b)] == b for p in prompts) for b in begins]
    assert sum(counts) == len(prompts)
    assert min(counts) >= 5
    assert all(len(p) > min(map(len, begins)) for p in prompts)


def test_openings_come_from_the_box_or_a_file(tmp_path):
    assert load_openings("none") == ("",)
    assert len(load_openings("builtin")) > 200
    path = tmp_path / "o.jsonl"
    path.write_text('"Say:\\n\\n"\n"Why"\n')
    assert load_openings(str(path)) == ("Say:\n\n", "Why")


@pytest.mark.parametrize(("text", "line"), [('"a"\n5\n', "line 2"), ('"a"\n\n', "line 2"), ("Why\n", "line 1")])
def test_an_opening_is_a_json_string(text, line, tmp_path):
    path = tmp_path / "o.jsonl"
    path.write_text(text)
    with pytest.raises(PromptError, match=f"{line}: .*JSON string"):
        load_openings(str(path))


def test_openings_that_are_not_there_are_named(tmp_path):
    with pytest.raises(PromptError, match=r"builtin, none .*JSONL.* lost"):
        load_openings("lost")
    (tmp_path / "empty").touch()
    with pytest.raises(PromptError, match="holds no opening"):
        load_openings(str(tmp_path / "empty"))


def test_answers_are_the_targets_own_greedy_ones(make, target, tokenizer, tmp_path):
    conversations = make(asks(tmp_path, "Why?", "How come it rains?", "Tell me more."))
    prompts = [list(c.prompt) for c in conversations]
    assert prompts[0] == tokenizer.encode_chat([{"role": "user", "content": "Why?"}])
    greedy = decode(
        target, None, prompts, mode="greedy", max_new_tokens=12, stop_token_ids=tokenizer.stop_token_ids[:8]
    )
    for c, tokens in zip(conversations, greedy.tokens, strict=True):
        assert list(c.answer) == tokens[: len(c.answer)]


def test_given_answers_are_kept_and_asked_for(make, tokenizer, tmp_path):
    config = dataclasses.replace(asks(tmp_path, "Why?", answer="So."), answers="given")
    (conversation,) = make(config)
    assert list(conversation.answer) == [*tokenizer.encode("So."), 1]
    with pytest.raises(PromptError, match=r"answers=given .*assistant's turn"):
        make(dataclasses.replace(asks(tmp_path, "Why?"), answers="given"), "other.jsonl")


def test_no_date_moves_a_conversation_across_the_split(target, folder, tmp_path):
    template = "<|user|>{{ strftime_now('%Y-%m-%d') }} {% for m in messages %}{{ m.content }}</s>{% endfor %}"
    dated = write_tiny_tokenizer(tmp_path, template)
    config = asks(tmp_path, *(f"What is {i}?" for i in range(20)), answer="So.")

    def talks(**more):
        tokenizer = load_tokenizer(dated, **more)
        given = dataclasses.replace(config, answers="given")
        return write_conversations(target, tokenizer, given, tmp_path / tokenizer.template_date)

    november, december = talks(template_date="2025-11-28"), talks(template_date="2025-12-05")
    assert [c.prompt for c in november] != [c.prompt for c in december]
    assert [c.held_out for c in november] == [c.held_out for c in december]
    assert {c.held_out for c in november} == {True, False}


def test_an_answer_with_an_id_that_is_no_token_is_dropped_and_counted(target, tmp_path):
    """The head has rows that the tokenizer has no token for."""
    padded = write_tiny_tokenizer(tmp_path)
    data = json.loads((padded / "tokenizer.json").read_text())
    gone = [token for token, i in data["model"]["vocab"].items() if i >= 240]
    for token in gone:
        del data["model"]["vocab"][token]
    (padded / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = load_tokenizer(padded)
    config = dataclasses.replace(SELF, source="builtin", exclude=(), count=4, max_prompt_len=400)
    made = write_conversations(target, tokenizer, config, tmp_path / "c")
    batches = [json.loads(line) for line in (tmp_path / "c").read_bytes().splitlines()]
    assert sum(batch["dropped"] for batch in batches) > 0
    assert all(i < 240 for c in made for i in c.answer)


def test_the_same_seed_writes_the_same_file(make, tmp_path):
    assert make(name="a") == make(name="b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert make(dataclasses.replace(SELF, seed=6), "c") != make(name="a")


def test_a_killed_run_goes_on_where_it_stopped(make, tmp_path):
    whole = make()
    data = (tmp_path / "c.jsonl").read_bytes()
    assert data.count(b"\n") >= 2
    first = data.index(b"\n") + 1
    for kept in (0, 1, first - 1, first, first + 1, len(data) - 1, len(data)):
        (tmp_path / "cut").write_bytes(data[:kept])
        assert make(name="cut") == whole
        assert (tmp_path / "cut").read_bytes() == data
    assert [c for batch in read_batches(tmp_path / "c.jsonl") for c in batch][:20] == whole


def test_the_split_is_by_prompt_and_recorded(make):
    conversations = make()
    assert {c.held_out for c in conversations} == {True, False}
    for prompt in load_prompts("builtin").prompts:
        assert is_held_out(prompt, {}, 0.0) is False
        assert is_held_out(prompt, {}, 1.0) is True
    record = split_record(conversations)
    assert record["train"]["num_prompts"] + record["held_out"]["num_prompts"] == 20
    # By prompt: another answer, or another order, is the same split.
    other = [dataclasses.replace(c, answer=(1,)) for c in reversed(conversations)]
    assert split_record(other) == record
    assert split_record(conversations[1:]) != record


def test_evaluation_prompts_are_left_out(make, tmp_path):
    """Word for word, and in part: eight words in a row are no accident."""
    evaluated = load_prompts("builtin").prompts[0].messages[-1]["content"]
    part = "And now: " + " ".join(evaluated.split()[:9]).upper()
    config = asks(tmp_path, evaluated, part, "Why?")
    config = dataclasses.replace(config, count=1, max_prompt_len=600)
    (conversation,) = make(config)
    assert len(conversation.prompt) < 20
    with pytest.raises(PromptError, match=r"gives 1 .*600 prompt tokens"):
        make(dataclasses.replace(config, count=2), "other.jsonl")
    assert len(make(dataclasses.replace(config, count=3, exclude=()), "all.jsonl")) == 3


def test_every_turn_of_an_evaluation_set_is_left_out_and_it_may_lie_in_the_directory_of_sets(make, tmp_path):
    turns = ["Compose a post.", "Rewrite it so that every sentence begins with the letter A."]
    (tmp_path / "mt-bench.jsonl").write_text(json.dumps({"category": "writing", "prompt": turns, "prompt_id": 81}))
    config = asks(tmp_path, "Why?", f"Please: {turns[1]}")
    config = dataclasses.replace(config, exclude=("mt-bench",), data_dir=str(tmp_path), max_prompt_len=600)
    assert len(make(dataclasses.replace(config, count=1))) == 1
    with pytest.raises(PromptError, match="gives 1 conversations"):
        make(config, "other.jsonl")


def test_the_record_of_how_a_text_was_made_keeps_its_keys():
    """A cache that is half built, or checked against its settings, is known by them."""
    record = dataclasses.asdict(ConversationConfig())
    assert [(key, record[key]) for key in list(record)[:5]] == [
        ("source", "self"), ("data_dir", ""), ("prompt_template", ""), ("raw", False), ("openings", "builtin"),
    ]  # fmt: skip


def test_long_and_repeated_prompts_are_left_out(make, tmp_path):
    config = asks(tmp_path, "Why?", "Why?", "x" * 100, "How?")
    assert len(make(dataclasses.replace(config, count=2))) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"held_out": 2},
        {"held_out": 1.0},
        {"held_out": -0.1},
        {"held_out": float("nan")},
        {"temperature": float("nan")},
        {"prompt_temperature": -1},
        {"min_p": 1.5},
        {"count": 0},
        {"max_new_tokens": 0},
        {"answers": "made up"},
        {"seed": -1},
    ],
)
def test_settings_that_make_no_conversations_are_refused(changes):
    with pytest.raises(ConfigError, match=f"{next(iter(changes))} "):
        ConversationConfig(**changes)


@pytest.mark.parametrize(
    "line",
    [
        "{,}",
        "[]",
        '{"conversations": 7}',
        '{"conversations": [[[1], [2]]]}',
        '{"conversations": [[[1], [], false]]}',
        '{"conversations": [[[1], ["a"], false]]}',
        '{"conversations": [[[1], [2], 1]]}',
        "[" * 9999,
    ],
)
def test_a_damaged_line_is_one_sentence(tmp_path, line):
    path = tmp_path / "c.jsonl"
    path.write_text('{"conversations": [[[1], [2], false]]}\n' + line + "\n")
    with pytest.raises(CacheError, match=r"c\.jsonl, line 2,"):
        read_batches(path)
