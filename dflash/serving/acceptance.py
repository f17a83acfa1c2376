"""Acceptance as each server tells it, in the definitions of `dflash.metrics`. What a server does not tell stays None.

sglang       each answer: spec_verify_ct (blocks), spec_num_correct_drafts, a histogram; none counts the bonus token
sglang-jax   its log alone, a line a decode step: accept-len counts the bonus token, accept-ratio = accept-len / S
vllm         counters of the whole server at /metrics, read before and after: drafts, drafted and accepted tokens
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dflash import metrics

Figures = dict[str, Any]
# The names of vLLM's counters; `_total` is how Prometheus clients spell them.
_COUNTER = re.compile(r"^vllm:spec_decode_num_(\w+?)(?:_total)?(?:\{(.*)\})? (\S+)$", re.MULTILINE)
_POSITION = re.compile(r'position="(\d+)"')
_STEP = re.compile(r"Decode batch.*?#running-req: (\d+),.*?accept-len ([\d.]+), accept-ratio ([\d.]+)")


def of_counts(blocks: int, drafted: int, accepted: int) -> Figures:
    """The figures of `metrics.acceptance` from sums alone; None for those that need the length of each block."""
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
    """All figures, from how many blocks had 0, 1, 2, ... tokens accepted. Raises ValueError for more than S - 1."""
    return metrics.acceptance([[a] * count for a, count in enumerate(histogram)], block_size)


def unknown(why: str) -> Figures:
    """No figure, and why."""
    return of_counts(0, 0, 0) | dict.fromkeys(("num_drafts", "num_draft_tokens", "num_accepted_tokens")) | _told(why)


def _told(why: str | None) -> Figures:
    return {"acceptance_unknown": why}


def of_sglang(told: Sequence[Mapping[str, Any]], block_size: int) -> Figures:
    """From the `meta_info` of every answer."""
    if not all(isinstance(t.get(n), int) for t in told for n in ("spec_verify_ct", "spec_num_correct_drafts")):
        return unknown("its answers have no spec_verify_ct and spec_num_correct_drafts")
    blocks = sum(t["spec_verify_ct"] for t in told)
    accepted = sum(t["spec_num_correct_drafts"] for t in told)
    histograms: list[list[int]] = [t.get("spec_correct_drafts_histogram") or [] for t in told]
    if all(histograms) and all(len(h) <= block_size for h in histograms):
        summed = [sum(h[a] for h in histograms if a < len(h)) for a in range(block_size)]
        if sum(summed) == blocks:
            return of_histogram(summed, block_size) | _told(None)
    return of_counts(blocks, blocks * (block_size - 1), accepted) | _told(None)


def of_sglang_jax(log: str, block_size: int) -> Figures:
    """From the decode lines of a log with --decode-log-interval 1.

    A line holds the mean over the requests of one step, so lines weigh as many requests as they have.
    """
    steps = [(int(n), float(length), float(ratio)) for n, length, ratio in _STEP.findall(log)]
    blocks = sum(n for n, _, _ in steps)
    if not blocks:
        return unknown("its log has no line with accept-len")
    # Both are printed with two digits.
    if any(abs(ratio * block_size - length) > 0.005 * (block_size + 1) + 1e-9 for _, length, ratio in steps):
        return unknown(f"accept-len / accept-ratio of its log is not the block size {block_size}")
    emitted = sum(round(n * length) for n, length, _ in steps)
    return of_counts(blocks, blocks * (block_size - 1), emitted - blocks) | _told(None)


def read_counters(page: str) -> dict[str, float]:
    """vLLM's counters of speculative decoding on a /metrics page, summed over engines; one a position, `pos0`, ..."""
    counters: dict[str, float] = {}
    for name, labels, value in _COUNTER.findall(page):
        if name == "accepted_tokens_per_pos":
            place = _POSITION.search(labels)
            name = f"pos{place[1]}" if place else name
        counters[name] = counters.get(name, 0.0) + float(value)
    return counters


def of_vllm(before: str, after: str, block_size: int) -> Figures:
    """From the /metrics page before and after."""
    old, new = read_counters(before), read_counters(after)
    grown = {name: round(value - old.get(name, 0.0)) for name, value in new.items()}
    blocks, drafted, accepted = (grown.get(name, 0) for name in ("drafts", "draft_tokens", "accepted_tokens"))
    if not blocks or not drafted:
        return unknown("its /metrics has no growing vllm:spec_decode_num_drafts")
    reached = [blocks, *(grown.get(f"pos{k}", 0) for k in range(block_size - 1)), 0]
    if sum(reached[1:]) == accepted and drafted == blocks * (block_size - 1):
        histogram = [reached[a] - reached[a + 1] for a in range(block_size)]
        return of_histogram(histogram, block_size) | _told(None)
    return of_counts(blocks, drafted, accepted) | _told(None)
