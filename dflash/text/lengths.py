"""Prompts of exactly so many tokens, and what the chat template puts around a user's words."""

import itertools
import random

from dflash.text.prompts import ChatTokenizer, PromptError, load_prompts


def exact_length_prompts(tokenizer: ChatTokenizer, length: int, count: int, seed: int) -> list[list[int]]:
    """`count` different prompts of exactly `length` tokens each, [count][length] token ids, for sweeps over length.

    The front of the chat template; builtin prompts one after another, in an order drawn from the seed, cut to size; and
    the end of the template wherever it leaves a token of text. PromptError if `length` has no room for text, or not
    enough for `count` different ones.
    """
    if count < 1:
        raise PromptError(f"count is at least 1; got {count}")
    texts = [prompt.words for prompt in load_prompts("builtin").prompts]

    def encode(text: str) -> list[int]:
        return tokenizer.encode_chat([{"role": "user", "content": text}])

    front, end = template_around(tokenizer)
    if length <= len(front):
        raise PromptError(f"the chat template begins with {len(front)} tokens; got length={length}: use a greater one")
    kept_end = end if length > len(front) + len(end) else []
    room = length - len(front) - len(kept_end)

    def draw(rng: random.Random) -> tuple[int, ...]:
        order = itertools.cycle(rng.sample(texts, len(texts)))
        picked: list[str] = []
        body: list[int] = []
        # Joined before encoding, so that the seams are tokens which a tokenizer would make.
        while len(body) < room:
            # Every prompt has a token at least, unless a template drops or cuts what it is given.
            if len(picked) > room:
                raise PromptError(
                    f"the chat template leaves {len(body)} tokens of any text, and {room} are asked for: use a shorter "
                    "length, or a template that takes the user's words whole"
                )
            picked += itertools.islice(order, len(picked) + 1)
            row = encode("\n\n".join(picked))
            body = row[len(front) : len(row) - len(end)]
        return tuple(body[:room])

    bodies: dict[tuple[int, ...], None] = {}
    # A generator per index: the same seed and index give the same text at every length.
    for index in range(count):
        # Short cuts may coincide; so many draws find every first word that there is.
        draws = (draw(random.Random(f"{seed} {index} {attempt}")) for attempt in range(1000))
        body = next((body for body in draws if body not in bodies), None)
        if body is None:
            raise PromptError(
                f"{length} tokens with this chat template leave {room} for text, which gives {len(bodies)} different "
                f"prompts; got count={count}: use a smaller one or a greater length"
            )
        bodies[body] = None
    return [front + list(body) + kept_end for body in bodies]


def template_around(tokenizer: ChatTokenizer) -> tuple[list[int], list[int]]:
    """What the chat template puts before and after a user's words, as token ids; either may be empty."""
    texts = [prompt.words for prompt in load_prompts("builtin").prompts]
    # What all conversations begin and end with is the template, whichever it may be.
    rows = [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in texts]
    front = _common_prefix(rows)
    return front, _common_prefix([row[len(front) :][::-1] for row in rows])[::-1]


def _common_prefix(rows: list[list[int]]) -> list[int]:
    return [column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))]
