"""How much of the draft the target accepts, live, for each category of prompts; every token compared with greedy's.

`--num-prompts` of each category, the longest of `--max-new-tokens`. Acceptance depends on the text: one mean over all
prompts says little of a user's own.
"""

from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from dflash import decode, metrics
from dflash.models.draft import Draft
from dflash.models.llama import Llama
from dflash.prompts import Prompt, load_prompts
from dflash.report.summary import Results
from dflash.sweep import drafts
from dflash.tokenizer import load_tokenizer
from dflash.weights.load import UNTRAINED

ROWS = 32


def _of_each_category(source: str, count: int) -> list[Prompt]:
    taken: dict[str, list[Prompt]] = {}
    for prompt in load_prompts(source).prompts:
        taken.setdefault(prompt.category, []).append(prompt)
    return [p for prompts in taken.values() for p in prompts[:count]]


@pytest.mark.benchmark(group="acceptance")
def test_acceptance_by_category(
    benchmark: BenchmarkFixture,
    target: Llama,
    draft: Draft,
    facts: dict[str, Any],
    results: Results,
    pytestconfig: pytest.Config,
) -> None:
    options = pytestconfig.option
    if drafts(options)[0] == UNTRAINED:
        pytest.skip("an untrained draft is accepted never: --draft DIR names another")
    if options.prompts[0] == "random":
        pytest.skip("random prompts have no category: --prompts SOURCE names others")
    tokenizer = load_tokenizer(options.target)
    prompts = _of_each_category(options.prompts[0], options.num_prompts)
    ids = [tokenizer.encode_chat(list(p.messages)) for p in prompts]
    block_size, budget = max(options.block_sizes), max(options.max_new_tokens)
    stops = tokenizer.stop_token_ids

    def run(draft: Draft | None) -> tuple[list[list[int]], list[list[int]]]:
        mode = "greedy" if draft is None else "cached_block_verify"
        more = {"mode": mode, "block_size": block_size, "max_new_tokens": budget, "stop_token_ids": stops}
        results = [decode(target, draft, ids[i : i + ROWS], **more) for i in range(0, len(ids), ROWS)]
        return [row for r in results for row in r.tokens], [row for r in results for row in r.accept_lens]

    tokens, accepted = benchmark.pedantic(run, (draft,), rounds=1, warmup_rounds=0)
    expected, _ = run(None)
    by_category = {
        name: {"num_prompts": sum(p.category == name for p in prompts)}
        | metrics.acceptance([a for a, p in zip(accepted, prompts, strict=True) if p.category == name], block_size)
        for name in dict.fromkeys(p.category for p in prompts)
    }
    overall = metrics.acceptance(accepted, block_size)
    info = facts | overall | {"case": "acceptance", "block_size": block_size, "max_new_tokens": budget}
    info = metrics.finite(info | {"lossless": tokens == expected, "by_category": by_category})
    benchmark.extra_info.update(info)
    results.acceptances.append(info)
    different = [p.id for p, a, b in zip(prompts, tokens, expected, strict=True) if a != b]
    assert not different, f"the tokens must be the target's own, and differ for the prompts {', '.join(different)}"
    least = options.min_acceptance_length
    assert not least or overall["acceptance_length"] >= float(least), (
        f"acceptance_length {overall['acceptance_length']:.2f} < {float(least):.2f} over all categories"
    )
