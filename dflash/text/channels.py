"""What a user is shown of an answer: GPT-OSS writes several channels, of which the final one is the answer."""

import re
from collections.abc import Sequence

from dflash.text.tokenizer import Tokenizer

# <|channel|>analysis<|message|>words<|end|><|start|>assistant<|channel|>final<|message|>words<|return|>
_PART = re.compile(r"<\|channel\|>(\w+)(?:(?!<\|message\|>).)*<\|message\|>((?:(?!<\|[a-z]+\|>).)*)", re.DOTALL)


def shown(tokenizer: Tokenizer, tokens: Sequence[int], special: bool = False) -> str:
    """The text of an answer as its tokens come: it only ever grows.

    With `special` everything as written. Else without special tokens; of channels, the words of each, after its name
    in brackets unless it is the final one.
    """
    whole = tokenizer.decode(tokens, skip_special_tokens=False)
    if special:
        return whole
    if not whole.startswith("<|channel|>"):
        return tokenizer.decode(tokens)
    parts = [words if name == "final" else f"[{name}] {words}" for name, words in _PART.findall(whole)]
    return "\n\n".join(parts)
