"""Prompts of an exact number of tokens: natural text within the chat template, the same for the same seed."""

import pytest
from word_tokenizer import WordTokenizer

from dflash.text.lengths import exact_length_prompts
from dflash.text.prompts import PromptError, load_prompts

BUILTIN = [prompt.messages[-1]["content"] for prompt in load_prompts("builtin").prompts]


@pytest.fixture
def tokenizer():
    return WordTokenizer()


@pytest.mark.parametrize("length", [16, 64, 257, 20_000], ids="len{}".format)
def test_exact_length_keeps_the_template_around_natural_text(tokenizer, length):
    rows = exact_length_prompts(tokenizer, length, count=3, seed=0)
    texts = [tokenizer.decode(row) for row in rows]
    assert [len(row) for row in rows] == [length] * 3
    assert len(set(texts)) == 3
    assert all(text.startswith(tokenizer.FRONT) and text.endswith(tokenizer.END) for text in texts)
    starts = [text.removeprefix(tokenizer.FRONT).removesuffix(tokenizer.END)[:60] for text in texts]
    assert all(any(known.startswith(start) or start.startswith(known) for known in BUILTIN) for start in starts)
    # Nothing of the template is inside.
    assert all(text.count("<|") == (tokenizer.FRONT + tokenizer.END).count("<|") for text in texts)


def test_exact_length_repeats_with_its_seed_and_grows_with_its_arguments():
    def make(length, count, seed):
        return exact_length_prompts(WordTokenizer(), length, count, seed)

    assert make(100, 4, 5) == make(100, 4, 5)
    assert make(100, 4, 5) != make(100, 4, 6)
    assert make(100, 2, 5) == make(100, 4, 5)[:2]
    # The same text, only more of it.
    end = len(WordTokenizer().encode(WordTokenizer.END))
    assert [row[: 100 - end] for row in make(300, 4, 5)] == [row[:-end] for row in make(100, 4, 5)]


def test_exact_length_gives_up_the_end_of_the_template_before_the_text(tokenizer):
    front, end = (len(tokenizer.encode(text)) for text in (tokenizer.FRONT, tokenizer.END))
    for room in (1, end):
        for row in exact_length_prompts(tokenizer, front + room, count=4, seed=0):
            assert len(row) == front + room
            assert "<|" not in tokenizer.decode(row).removeprefix(tokenizer.FRONT)
    for row in exact_length_prompts(tokenizer, front + end + 1, count=4, seed=0):
        assert tokenizer.decode(row).endswith(tokenizer.END)


def test_exact_length_without_a_template_is_plain_text():
    plain = WordTokenizer()
    plain.encode_chat = lambda messages: plain.encode(messages[0]["content"])
    assert [len(row) for row in exact_length_prompts(plain, 5, count=20, seed=0)] == [5] * 20


def test_exact_length_refuses_what_has_no_room(tokenizer):
    front = len(tokenizer.encode(tokenizer.FRONT))
    with pytest.raises(ValueError, match=rf"begins with {front} tokens; got length={front}"):
        exact_length_prompts(tokenizer, front, count=1, seed=0)
    with pytest.raises(ValueError, match=r"\d+ different prompts; got count=500"):
        exact_length_prompts(tokenizer, front + 1, count=500, seed=0)


def test_exact_length_refuses_to_make_none(tokenizer):
    with pytest.raises(ValueError, match="count is at least 1; got 0"):
        exact_length_prompts(tokenizer, 50, count=0, seed=0)


@pytest.mark.parametrize("kept", [0, 20])
def test_exact_length_of_a_template_that_cuts_its_words_is_refused(tokenizer, kept):
    encode = tokenizer.encode_chat
    tokenizer.encode_chat = lambda talk: encode([{"role": "user", "content": "Say: " + talk[0]["content"][:kept]}])
    with pytest.raises(PromptError, match=r"leaves \d+ tokens of any text"):
        exact_length_prompts(tokenizer, 200, count=1, seed=0)
