"""How much of the draft the target accepts, live, for each category of prompts; every token compared with greedy's.

`--category-prompts` of each category, the longest of `--max-new-tokens`. Acceptance depends on the text: one mean over
all prompts says little of a user's own.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from dflash import metrics
from dflash.cli.pytest_options import open_prompts, open_tokenizer
from dflash.decoding.decode import compiled_decoder, prefill, read_state
from dflash.decoding.modes import BLOCK
from dflash.decoding.sampling import Sampling
from dflash.measuring.cases import drafts
from dflash.measuring.greedy import Greedy
from dflash.measuring.interval import acceptance_over_prompts
from dflash.measuring.result import Acceptance, Category, Results, to_json
from dflash.models.draft import Draft
from dflash.models.llama import Llama
from dflash.text.prompts import Prompt, ids_sha256
from dflash.text.tokenizer import Tokenizer
from dflash.weights.load import UNTRAINED


@pytest.mark.benchmark(group="acceptance")
def test_acceptance_by_category(
    benchmark: BenchmarkFixture,
    target: Llama,
    draft: Draft,
    answers: Callable[[Tokenizer, Sequence[Prompt]], list[str]],
    facts: dict[str, Any],
    sampling: Sampling,
    results: Results,
    pytestconfig: pytest.Config,
) -> None:
    options = pytestconfig.option
    if drafts(options)[0] == UNTRAINED:
        pytest.skip("nothing that an untrained draft proposes is accepted: --draft DIR names another")
    if options.prompts[0] == "random":
        pytest.skip("random prompts have no category: --prompts SOURCE names others")
    tokenizer = open_tokenizer(options)
    found = open_prompts(options, options.prompts[0])
    some = [prompt for every in found.by_category().values() for prompt in every[: options.category_prompts]]
    talks = dataclasses.replace(found, prompts=tuple(some))
    prompts = talks.turn_by_turn(functools.partial(answers, tokenizer)).prompts
    ids = [p.encode(tokenizer) for p in prompts]
    block_size, budget = max(options.block_sizes), max(options.max_new_tokens)
    stops = tokenizer.stop_token_ids

    size = next(size for size in (4, 3, 2, 1) if len(ids) % size == 0)
    batches = [ids[i : i + size] for i in range(0, len(ids), size)]
    # One program for all batches.
    greedy = Greedy(target, batches, max_new_tokens=budget, stop_token_ids=stops, sampling=sampling)

    def run() -> list[Any]:
        """Tokens, accept lengths and what each block gave, of the rows of each batch."""
        shape = dataclasses.replace(greedy.shape, mode=BLOCK.name, block_size=block_size)
        decoder = compiled_decoder(target, draft, shape)
        decoder.take_weights()
        requests = greedy.requests([draft] * len(batches), BLOCK.name, block_size)
        return [read_state(decoder.steps(prefill(decoder, request))) for request in requests]

    states = benchmark.pedantic(run, rounds=1, warmup_rounds=0)
    tokens, accepted = ([row for state in states for row in state[i]] for i in (0, 1))
    for group in range(len(batches)):
        greedy.decode(group)
    expected = [row for rows in greedy.tokens for row in rows]
    of_category: dict[str, list[list[int]]] = {}
    for row, prompt in zip(accepted, prompts, strict=True):
        of_category.setdefault(prompt.category, []).append(row)
    overall = metrics.acceptance(accepted, block_size)
    by_category = {
        name: Category(num_prompts=len(row), **metrics.acceptance(row, block_size), **acceptance_over_prompts(row))
        for name, row in of_category.items()
    }
    result = Acceptance(
        **facts | {"prompts_sha256": ids_sha256(ids), "protocol": "dflash"},  # z-lab's knows no categories
        **overall,
        **acceptance_over_prompts(accepted),
        case="acceptance",
        block_size=block_size,
        max_new_tokens=budget,
        lossless=tokens == expected,
        by_category=by_category,
    )
    benchmark.extra_info.update(to_json(result))
    results.measured.append(result)
    different = [p.id for p, a, b in zip(prompts, tokens, expected, strict=True) if a != b]
    if different:
        pytest.fail(
            f"the tokens must be the target's own, and differ for the prompts {', '.join(different)}", pytrace=False
        )
    least, length = options.min_acceptance_length, overall["acceptance_length"]
    if least is not None and length < least:
        pytest.fail(f"acceptance_length {length:.2f} < {least:.2f} over all categories", pytrace=False)
