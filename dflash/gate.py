"""Verdicts on measured cases: is the number valid, is it above its floor, and which term moved. No jax."""

import dataclasses
from typing import Any

from dflash.cost_model import EXPLAINED_WITHIN, is_explained
from dflash.interval import LEAST_ROUNDS


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Floors:
    """What a case must reach; None asks for nothing. `predicted_share` is a share of the cost model's speed-up."""

    speedup_x: float | None = None
    acceptance_length: float | None = None
    predicted_share: float | None = None


def status(info: dict[str, Any]) -> str:
    """ok, or what is to be said of the case's speed-up before it is believed.

    no-draft      nothing was drafted: the target's server alone was measured (`no_draft` says why)
    no-baseline   greedy decoding did not run beside it
    invalid       tokens differ, nothing was measured, or the rounds are too noisy (`too_noisy` says how)
    quick         too few rounds to know their noise
    unexplained   measured, and further from what its steps predict than the cost model is good for (`residual`)
    """
    if info.get("no_draft"):
        return "no-draft"
    if info["lossless"] is None:
        return "no-baseline"
    if info.get("target_repeats_itself") is False:
        return "invalid"
    if not info["lossless"] or info["speedup_x"] is None or info.get("too_noisy"):
        return "invalid"
    if info["speedup_x_ci95"] is None:
        return "quick"
    predicted = info.get("predicted_speedup_x")
    if predicted and not is_explained(info["speedup_x"], predicted):
        return "unexplained"
    return "ok"


def doubt(info: dict[str, Any]) -> str | None:
    """Why a case's speed-up can be held against nothing, in one clause; None where it can."""
    if info["status"] == "no-draft":
        return f"no-draft: the target alone was measured, since {info['no_draft']}"
    if info["status"] == "no-baseline":
        return "no-baseline: greedy decoding must run beside it, to compare with and to prove the tokens"
    if info.get("target_repeats_itself") is False:
        return (
            "invalid: the target's server answers otherwise when it is asked again, without any draft, so nothing can "
            "be held against it; serve in float32, or one request at a time"
        )
    if info["lossless"] is False:
        place = info["first_divergence"]
        where = f"prompt {place['prompt']}, token {place['token']}"
        return f"invalid: the tokens must be the target's own, and differ first at {where}"
    if info["speedup_x"] is None:
        return "invalid: no block was needed, so nothing was measured; raise max_new_tokens"
    if info["status"] == "invalid":
        return f"invalid: {info['too_noisy']}; take more rounds on a quieter machine"
    if info["status"] == "quick":
        return f"without an interval: it needs at least {LEAST_ROUNDS} rounds"
    return None


def remark(info: dict[str, Any]) -> str | None:
    """What must be said of a case beside its figures; None for one that is ok."""
    if info["status"] == "unexplained":
        return (
            f"unexplained: {info['residual']:+.0%} off the {info['predicted_speedup_x']:.2f} that its steps predict "
            f"(within {EXPLAINED_WITHIN:.0%} is explained)"
        )
    return doubt(info)


def _block_cost(info: dict[str, Any]) -> str:
    if info["block_ratio"] is None:  # over HTTP no block is timed
        return "what a block costs is unknown"
    predicted = info.get("predicted_block_ratio")
    text = f"a block costs {info['block_ratio']:.2f} one-token steps"
    return text if predicted is None else f"{text} ({predicted:.2f} by its steps timed alone)"


def failures(info: dict[str, Any], floors: Floors) -> list[str]:
    """One sentence for each floor that a case is under, naming the term that moved. Empty when it passes.

    The speed-up is judged by the upper end of its interval, that of the clock's noise where it is known: what other
    prompts would give is not asked here.
    """
    why = doubt(info)
    # Noise fails a speed-up that something was asked of; wrong tokens, or none, fail whatever was asked.
    unmeasured = info["status"] in ("no-draft", "no-baseline") or info["lossless"] is False or info["speedup_x"] is None
    if unmeasured or (why and floors.speedup_x is not None):
        return [f"speedup_x is {why}"]
    said = []
    acceptance = info["acceptance_length"]
    if acceptance is None and floors.acceptance_length is not None:
        said.append(
            f"acceptance_length must reach {floors.acceptance_length:.2f}, and is unknown: {info['acceptance_unknown']}"
        )
    elif floors.acceptance_length is not None and acceptance < floors.acceptance_length:
        said.append(
            f"acceptance_length {acceptance:.2f} < {floors.acceptance_length:.2f}: the draft is accepted less "
            f"({_block_cost(info)})"
        )
    if why:
        return said
    low, high = info.get("speedup_x_timing_ci95") or info["speedup_x_ci95"]
    interval = f"speedup_x {info['speedup_x']:.2f} ({low:.2f} to {high:.2f})"
    if floors.speedup_x is not None and high < floors.speedup_x and acceptance is None:
        said.append(f"{interval} < {floors.speedup_x:.2f}; what is accepted is unknown")
    elif floors.speedup_x is not None and high < floors.speedup_x:
        needed = floors.speedup_x * acceptance / info["speedup_x"]
        # Without a floor of its own, acceptance can't be ruled out.
        moved = "the cost of a block" if floors.acceptance_length is not None else "acceptance or the cost of a block"
        moved = "acceptance" if said else moved
        said.append(
            f"{interval} < {floors.speedup_x:.2f}: {moved} moved; {_block_cost(info)}, acceptance_length is "
            f"{acceptance:.2f} and would have to be {needed:.2f}"
        )
    predicted = info.get("predicted_speedup_x")
    if floors.predicted_share is not None and predicted and high < floors.predicted_share * predicted:
        said.append(
            f"{interval} < {floors.predicted_share:.2f} x the {predicted:.2f} that its steps predict: the loop moved; "
            f"{_block_cost(info)}"
        )
    return said
