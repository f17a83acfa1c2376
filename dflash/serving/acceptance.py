"""Acceptance as each server reports it, in the definitions of `dflash.metrics`. What a server omits stays None.

A block commits at least one token: with more blocks than tokens, the count is not of these requests.

sglang       each answer: spec_verify_ct (blocks), spec_num_correct_drafts, a histogram; none counts the bonus token
sglang-jax   its log only, one line per decode step: accept-len counts the bonus token, accept-ratio = accept-len / S
vllm         counters of the whole server at /metrics, read before and after: drafts, drafted and accepted tokens
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dflash import metrics

Figures = dict[str, Any]
# The names of vLLM's counters; Prometheus clients append `_total`.
_NUMBER = r"(\d{1,15}(?:\.\d+)?(?:e\+\d\d?)?)"
_COUNTER = re.compile(rf"^vllm:spec_decode_num_(\w+?)(?:_total)?(?:\{{(.*)\}})? {_NUMBER}$", re.MULTILINE)
_POSITION = re.compile(r'position="(\d+)"')
_STEP = re.compile(
    r"Decode batch.*?#running-req: (\d{1,6}),.*?accept-len (\d{1,6}(?:\.\d+)?), accept-ratio (\d{1,6}(?:\.\d+)?)"
)


def of_counts(blocks: int, drafted: int, accepted: int) -> Figures:
    """The figures of `metrics.acceptance` from sums only; None for those that need the length of each block."""
    figures = metrics.acceptance([], 2) | {
        "num_drafts": blocks,
        "num_draft_tokens": drafted,
        "num_accepted_tokens": accepted,
    }
    if blocks and drafted:
        mean = accepted / blocks
        figures |= {"accept_len_mean": mean, "acceptance_length": mean + 1, "accept_rate": accepted / drafted}
    return figures


def of_histogram(histogram: Sequence[int], block_size: int) -> Figures:
    """All figures, from the number of blocks with 0, 1, 2, ... accepted tokens. Raises ValueError above S - 1."""
    return metrics.acceptance([[a] * count for a, count in enumerate(histogram)], block_size)


def unknown(why: str) -> Figures:
    """No figures, and why."""
    counts = dict.fromkeys(("num_drafts", "num_draft_tokens", "num_accepted_tokens"))
    return of_counts(0, 0, 0) | counts | {"acceptance_unknown": why}


def _known(figures: Figures) -> Figures:
    return figures | {"acceptance_unknown": None}


def of_sglang(metas: Sequence[Mapping[str, Any]], block_size: int, most: int) -> Figures:
    """From the `meta_info` of every completion; `most` is the number of tokens in all of them."""
    names = ("spec_verify_ct", "spec_num_correct_drafts")
    if not all(type(meta.get(name)) is int and meta[name] >= 0 for meta in metas for name in names):
        return unknown("its answers have no spec_verify_ct and spec_num_correct_drafts")
    blocks, accepted = (sum(meta[name] for meta in metas) for name in names)
    if blocks > most or accepted > blocks * (block_size - 1):
        return unknown(f"its answers have {most} tokens and tell of {accepted} accepted ones in {blocks} blocks")
    histograms = [meta.get("spec_correct_drafts_histogram") or [] for meta in metas]
    if all(_is_histogram(histogram, block_size) for histogram in histograms):
        summed = [sum(h[a] for h in histograms if a < len(h)) for a in range(block_size)]
        if sum(summed) == blocks:
            return _known(of_histogram(summed, block_size))
    return _known(of_counts(blocks, blocks * (block_size - 1), accepted))


def _is_histogram(value: Any, block_size: int) -> bool:
    """Whether this is a list of counts, at most one per accept length."""
    return isinstance(value, list) and 1 <= len(value) <= block_size and all(type(n) is int and n >= 0 for n in value)


def of_sglang_jax(log: str, block_size: int) -> Figures:
    """From the decode lines of a log with --decode-log-interval 1.

    A line is the mean over the requests of one step, so lines are weighted by their number of requests.
    """
    steps = [(int(n), float(length), float(ratio)) for n, length, ratio in _STEP.findall(log)]
    blocks = sum(n for n, _, _ in steps)
    if not blocks:
        return unknown("its log has no line with accept-len")
    # Both are printed with two digits.
    if any(abs(ratio * block_size - length) > 0.005 * (block_size + 1) + 1e-9 for _, length, ratio in steps):
        return unknown(f"accept-len / accept-ratio of its log is not the block size {block_size}")
    emitted = sum(round(n * length) for n, length, _ in steps)
    return _known(of_counts(blocks, blocks * (block_size - 1), emitted - blocks))


def read_counters(page: str) -> dict[str, float]:
    """vLLM's counters of speculative decoding on a /metrics page, summed over engines; per position as `pos0`, ..."""
    counters: dict[str, float] = {}
    for name, labels, value in _COUNTER.findall(page):
        if name == "accepted_tokens_per_pos":
            place = _POSITION.search(labels)
            name = f"pos{place[1]}" if place else name
        counters[name] = counters.get(name, 0.0) + float(value)
    return counters


def of_vllm(before: str, after: str, block_size: int, most: int) -> Figures:
    """From the /metrics page before and after; `most` is the number of tokens received in between."""
    old, new = read_counters(before), read_counters(after)
    grown = {name: round(value - old.get(name, 0.0)) for name, value in new.items()}
    blocks, drafted, accepted = (grown.get(name, 0) for name in ("drafts", "draft_tokens", "accepted_tokens"))
    if not blocks or not drafted:
        return unknown("its /metrics has no growing vllm:spec_decode_num_drafts")
    if blocks > most or accepted > drafted:
        return unknown(
            f"its /metrics grew by {blocks} blocks with {drafted} drafted and {accepted} accepted tokens, and {most} "
            "tokens came: it answered others too"
        )
    if (drafted % blocks == 0 and drafted // blocks != block_size - 1) or drafted > blocks * (block_size - 1):
        return unknown(
            f"its /metrics counts {drafted / blocks:.3g} drafted tokens a block, and a block of {block_size} has "
            f"{block_size - 1}: --block-size says what the server drafts"
        )
    reached = [blocks, *(grown.get(f"pos{k}", 0) for k in range(block_size - 1)), 0]
    if sum(reached[1:]) == accepted and drafted == blocks * (block_size - 1):
        histogram = [reached[a] - reached[a + 1] for a in range(block_size)]
        if min(histogram) >= 0:
            return _known(of_histogram(histogram, block_size))
    return _known(of_counts(blocks, drafted, accepted))
