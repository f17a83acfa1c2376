"""What a user sees of an answer that is written in channels."""

import pytest

from dflash import load_tokenizer
from dflash.text.channels import shown
from dflash.weights.tiny import SPECIAL_TOKENS, write_tiny_tokenizer

HARMONY = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|return|>")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    import tokenizers

    folder = write_tiny_tokenizer(tmp_path_factory.mktemp("harmony"))
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(list(HARMONY))
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


ANSWER = (
    "<|channel|>analysis<|message|>They ask: 2 < 3?<|end|><|start|>assistant"
    "<|channel|>final<|message|>Yes, 2 < 3.<|return|>"
)


def test_the_final_channel_is_the_answer_and_others_are_named(tokenizer):
    ids = tokenizer.encode(ANSWER)
    assert shown(tokenizer, ids) == "[analysis] They ask: 2 < 3?\n\nYes, 2 < 3."
    assert shown(tokenizer, ids, special=True) == ANSWER


def test_what_is_shown_only_grows(tokenizer):
    ids, before = tokenizer.encode(ANSWER), ""
    for end in range(len(ids) + 1):
        now = shown(tokenizer, ids[:end])
        assert now.startswith(before)
        before = now


def test_an_answer_without_channels_is_its_text(tokenizer):
    ids = tokenizer.encode(f"Hi <|there|>{SPECIAL_TOKENS[1]}")
    assert shown(tokenizer, ids) == "Hi <|there|>"
