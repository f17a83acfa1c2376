"""Every number that is reported: its name, its formula, its unit. Pure Python, no jax.

The words: a block has S slots, the anchor and S - 1 drafted tokens, of which the target accepts a.

accept_len          a, 0..S-1; the bonus token is not counted
acceptance_length   a + 1, the papers' tau; counts the bonus
accept_rate         sum a / sum (S - 1), a fraction
accept_rate_per_pos share of blocks whose first k drafted tokens were all accepted, k = 1..S-1
produced            tokens a block emits: a + 1, cut at the stop token and at the budget
tok_s_total         tokens emitted after each row's first / decode seconds, over all rows; prefill excluded
tpot_ms             decode milliseconds / tokens emitted after the first, of one row
ttft_ms             milliseconds from prompt to first token
speedup_x           tok_s_total / baseline_tok_s_total, of the same tokens
verify_ratio        T_verify(S) / T_1, the steps timed alone; draft_ratio T_draft(S) / T_1
block_ratio         what a block cost in the loop, in one-token steps; predicted_block_ratio by its steps alone
experts_awake_step  experts that a one-token step wakes, mean over layers; _verify: a verify step; _expected:
                    the same if routing were even
residual            speedup_x / predicted_speedup_x - 1

Over HTTP (mode `served`, dflash/serving/) no clock can start after prefill: tok_s_total is the tokens that count / the
seconds from the first request to the last answer of a round; ttft_ms and tpot_ms are medians over requests.

Means are pooled over blocks: every block weighs the same. acceptance_length_by_prompt is the mean of each prompt's own
mean, as some papers have it. Intervals of both (`_ci95`) are over prompts.
"""

import math
from collections.abc import Sequence
from typing import Any

HIGHER_IS_BETTER = {
    "accept_rate": True,
    "accept_len_mean": True,
    "acceptance_length": True,
    "tok_s_total": True,
    "baseline_tok_s_total": True,
    "speedup_x": True,
    "verify_ratio": False,
    "draft_ratio": False,
    "block_ratio": False,
    "ttft_ms": False,
    "tpot_ms": False,
    "baseline_tpot_ms": False,
    "compile_s": False,
}


def round_up(value: int, multiple: int) -> int:
    """`value` rounded up to a multiple."""
    return -(-value // multiple) * multiple


def acceptance(accept_lens: Sequence[Sequence[int]], block_size: int) -> dict[str, Any]:
    """The acceptance figures of accept lengths per row and block; each is None if nothing was drafted.

    Raises ValueError when an accept length can't come from a block of `block_size`.
    """
    lengths = [a for row in accept_lens for a in row]
    drafted = block_size - 1
    bad = [a for a in lengths if not 0 <= a <= drafted]
    if bad:
        raise ValueError(f"accept lengths of a block of {block_size} are 0..{drafted}, got {bad[0]}")
    count, accepted = len(lengths), sum(lengths)
    figures: dict[str, Any] = {
        "num_drafts": count if drafted else 0,
        "num_draft_tokens": count * drafted,
        "num_accepted_tokens": accepted,
    }
    if not count or not drafted:
        names = ("accept_len_mean", "acceptance_length", "accept_rate", "accept_histogram", "accept_rate_per_pos")
        return figures | dict.fromkeys(names)
    histogram = [lengths.count(a) for a in range(block_size)]
    return figures | {
        "accept_len_mean": accepted / count,
        "acceptance_length": accepted / count + 1,
        "accept_rate": accepted / (count * drafted),
        "accept_histogram": histogram,
        "accept_rate_per_pos": [sum(histogram[k:]) / count for k in range(1, block_size)],
    }


def output_tokens(produced: Sequence[Sequence[int]]) -> int:
    """Tokens emitted by all rows: each row's first comes from prefill, the rest from its blocks."""
    return len(produced) + sum(map(sum, produced))


def throughput(produced: Sequence[Sequence[int]], decode_s: float) -> float | None:
    """tok_s_total: tokens of the blocks over the seconds of the blocks; None when no block was needed."""
    tokens = sum(map(sum, produced))
    return tokens / decode_s if tokens and decode_s > 0 else None


def time_per_output_token_ms(produced: Sequence[Sequence[int]], decode_s: float) -> float | None:
    """tpot_ms of the row that emitted most, since the loop runs until it ends; None when no block was needed."""
    longest = max((sum(row) for row in produced), default=0)
    return 1000 * decode_s / longest if longest else None


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first position where two rows of tokens differ, from 0 (the end of the shorter row counts); None if equal."""
    if a == b:
        return None
    places = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(places, min(len(a), len(b)))


def predicted_speedup(acceptance_length: float, step_s: float, verify_s: float, draft_s: float) -> float:
    """The cost model: tokens per block over a block's cost in one-token steps (Leviathan et al. 2023).

    step_s T_1, verify_s T_verify(S), draft_s T_draft(S), in seconds.
    """
    return acceptance_length / ((verify_s + draft_s) / step_s)


def expected_awake(experts: int, per_token: int, tokens: int) -> float:
    """Experts that a step of `tokens` tokens is expected to wake if routing is even and independent."""
    return experts * (1 - (1 - per_token / experts) ** tokens)


def finite(value: Any) -> Any:
    """The figures with None for NaN and infinity, at any depth: bare NaN is not valid JSON."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
