"""Verdicts on measured cases: is the number valid, is it above its floor, and which term moved. No jax."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Floors:
    """What a case must reach; None asks for nothing. `predicted_share` is a share of the cost model's speed-up."""

    speedup_x: float | None = None
    acceptance_length: float | None = None
    predicted_share: float | None = None


def status(info: dict[str, Any]) -> str:
    """ok, or why the case's speed-up does not count: invalid (tokens differ, or nothing measured), no-baseline."""
    if info["baseline_tok_s_total"] is None:
        return "no-baseline"
    if not info["lossless"] or info["speedup_x"] is None:
        return "invalid"
    return "ok"


def _block_cost(info: dict[str, Any]) -> str:
    cost = info["acceptance_length"] / info["speedup_x"]
    predicted = info.get("predicted_block_ratio")
    text = f"a block costs {cost:.2f} one-token steps"
    return text if predicted is None else f"{text} ({predicted:.2f} by its steps timed alone)"


def failures(info: dict[str, Any], floors: Floors) -> list[str]:
    """One sentence for each floor that a case is under, naming the term that moved. Empty when it passes.

    The speed-up is judged by the upper end of its interval: a noisy run may pass, an honest one is never failed.
    """
    if info["status"] != "ok":
        place = info["first_divergence"]
        detail = f"; first at prompt {place['prompt']}, token {place['token']}" if place else ""
        return [f"speedup_x is {info['status']}: the tokens must be proven equal to the target's own{detail}"]
    said = []
    acceptance = info["acceptance_length"]
    if floors.acceptance_length is not None and acceptance < floors.acceptance_length:
        said.append(
            f"acceptance_length {acceptance:.2f} < {floors.acceptance_length:.2f}: the draft is accepted less "
            f"({_block_cost(info)})"
        )
    low, high = info["speedup_x_ci95"]
    interval = f"speedup_x {info['speedup_x']:.2f} ({low:.2f} to {high:.2f})"
    if floors.speedup_x is not None and high < floors.speedup_x:
        needed = floors.speedup_x * acceptance / info["speedup_x"]
        moved = "acceptance" if said else "the cost of a block"
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
