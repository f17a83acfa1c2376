"""Verdicts on measured cases: is the number valid, is it above its floor, and which term moved."""

import dataclasses
from collections.abc import Sequence

from dflash.decoding.modes import MODES
from dflash.measuring.cost_model import EXPLAINED_WITHIN, is_explained
from dflash.measuring.interval import LEAST_ROUNDS
from dflash.measuring.result import Decode, Served, Status, VerifyRatio

# The speed-up of such a case must not be believed.
UNBELIEVED = ("invalid", "too-noisy", "slow-baseline")
# A share of proposed tokens; of a draft that is served wrongly hardly more is accepted.
HARDLY_ACCEPTED = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Floors:
    """What a case must reach; None requires nothing. `predicted_share` is a share of the cost model's speed-up."""

    speedup_x: float | None = None
    acceptance_length: float | None = None
    predicted_share: float | None = None


def status(case: Decode) -> Status:
    """ok, or what is to be said of the case's speed-up before it is believed.

    no-draft      nothing was drafted: only the target's server was measured (`no_draft` says why)
    no-baseline   greedy decoding did not run beside it
    invalid       tokens differ, or nothing was measured
    too-noisy     the rounds say too little (`too_noisy` says how)
    quick         too few rounds to know their noise
    slow-baseline a verify step, of any timed size, is cheaper than a one-token step: greedy decoding could be faster
    unexplained   measured, and surely further from what its steps predict than the cost model is good for (`residual`)
    """
    if case.no_draft:
        return "no-draft"
    if case.lossless is None:
        return "no-baseline"
    if not case.target_repeats_itself:
        return "invalid"
    if not case.lossless or case.speedup_x is None:
        return "invalid"
    if case.too_noisy:
        return "too-noisy"
    interval = _timing_interval(case)
    if interval is None:
        return "quick"
    if _cheaper_verify(case):
        return "slow-baseline"
    predicted = case.predicted_speedup_x
    if predicted and not is_explained(interval, predicted):
        return "unexplained"
    return "ok"


def _timing_interval(case: Decode) -> tuple[float, float] | None:
    """The interval of the clock's noise where it is known: what other prompts would give is not asked."""
    return case.speedup_x_timing_ci95 or case.speedup_x_ci95


def _cheaper_verify(case: Decode) -> VerifyRatio | None:
    """A verify step that surely takes less than a one-token step: greedy decoding could run such steps instead."""
    timed = [] if case.cheapest_verify is None else [case.cheapest_verify]
    if case.block_size is not None and case.verify_ratio is not None:
        own = VerifyRatio(tokens=case.block_size, ratio=case.verify_ratio, ratio_ci95=case.verify_ratio_ci95)
        timed.insert(0, own)
    return next((v for v in timed if (v.ratio_ci95 or (0.0, v.ratio))[1] < 1), None)


def doubt(case: Decode) -> str | None:
    """Why a case's speed-up can't be judged, in one clause; None if it can."""
    if case.status == "no-draft":
        return f"no-draft: the target alone was measured, since {case.no_draft}"
    if case.status == "no-baseline" and case.sampling and case.speedup_x is not None:
        return "no-baseline: a server draws with noise of its own, so texts can't be compared and nothing proves them"
    if case.status == "no-baseline":
        return "no-baseline: greedy decoding must run beside it, to compare with and to prove the tokens"
    if not case.target_repeats_itself:
        return (
            "invalid: the target's server answers otherwise when it is asked again, without any draft, so nothing can "
            "be compared with it; serve in float32, or one request at a time"
        )
    if case.lossless is False:
        place = case.first_divergence
        where = f" first at prompt {place.prompt}, token {place.token}" if place else ""
        return f"invalid: the tokens must be the target's own, and differ{where}"
    if case.speedup_x is None:
        return "invalid: no block was needed, so nothing was measured; raise max_new_tokens"
    if case.status == "too-noisy":
        return f"too noisy: {case.too_noisy}; take more rounds, or a quieter machine"
    if case.status == "quick":
        return f"without an interval: it needs at least {LEAST_ROUNDS} rounds"
    if case.status == "slow-baseline" and (cheaper := _cheaper_verify(case)):
        return (
            f"slow-baseline: a verify step of {cheaper.tokens} tokens takes {cheaper.ratio:.2f} of a one-token "
            "step, so greedy decoding is not as fast as it can be here, and no speed-up over it counts"
        )
    return None


def remark(case: Decode) -> str | None:
    """What must be said of a case beside its figures; None for one that is ok."""
    if case.status == "unexplained":
        return (
            f"unexplained: {case.residual:+.0%} off the {case.predicted_speedup_x:.2f} that its steps predict "
            f"(within {EXPLAINED_WITHIN:.0%} is explained)"
        )
    if case.status == "ok" and case.speedup_x is not None and case.speedup_x < 1 and _should_gain(case):
        accepted = case.acceptance_length
        length = "" if accepted is None else f", acceptance_length is {accepted:.2f}"
        return f"slower than greedy decoding with this draft at batch {case.batch_size}: {_block_cost(case)}{length}"
    return doubt(case)


def _should_gain(case: Decode) -> bool:
    """Whether the case exists to show a speed-up: it is not scripted, and does not verify token by token."""
    mode = MODES.get(case.mode)
    return case.is_own and (mode is None or mode.whole)


def alarm_line(case: Served) -> str | None:
    """What an alarm means; None for a case without one."""
    if not case.alarm or case.accept_rate is None:
        return None
    return (
        f"{case.alarm}: the target accepts {case.accept_rate:.1%} of what is proposed; either this draft is no better "
        "on these prompts, or the server runs it wrongly" + ("" if case.own else ": --offline tells which")
    )


def own_line(case: Served) -> str | None:
    """How a server's acceptance stands to ours; None where it was not held to it."""
    if case.own_unknown:
        return f"acceptance must be held to ours, and can't be: {case.own_unknown}"
    own = case.own
    if own is None or case.block_size is None:
        return None
    both = f"{case.accept_len_mean:.2f} of {case.block_size - 1} accepted by the server, {own.accept_len_mean:.2f} here"
    if not own.gap:
        return f"{both}: no gap"
    if not own.explained_by:
        return f"{both}: a gap, and none of {len(own.broken)} broken conventions explains it"
    nearest, *others = own.explained_by
    return f"{both}: a gap, as with {nearest}" + (f" (less closely: {'; '.join(others)})" if others else "")


def closing_line(cases: Sequence[Decode]) -> str | None:
    """A run in one line: the fastest case that a draft proposed for, of those that count; None where there is none."""
    measured = [(doubt(c) is None, c.speedup_x, c) for c in cases if c.speedup_x is not None and _should_gain(c)]
    if not measured:
        return None
    _, speedup, best = max(measured, key=lambda one: one[:2])
    interval = best.speedup_x_ci95
    between = "" if interval is None else f" (95% interval {interval[0]:.2f} to {interval[1]:.2f})"
    tokens = "lossless" if best.lossless else "NOT LOSSLESS"
    if best.lossless and best.near_ties:
        tokens += f" up to {best.near_ties} near ties"
    word = best.status.replace("-", " ")
    return f"{speedup:.2f} times as fast as greedy decoding{between}, {tokens}, {word}: {best.case}"


def _block_cost(case: Decode) -> str:
    if case.block_ratio is None:  # over HTTP no block is timed
        return "what a block costs is unknown"
    predicted = case.predicted_block_ratio
    text = f"a block costs {case.block_ratio:.2f} one-token steps"
    return text if predicted is None else f"{text} ({predicted:.2f} by its steps timed alone)"


def failures(case: Decode, floors: Floors) -> list[str]:
    """One sentence for each floor that a case is under, naming the term that moved. Empty when it passes.

    The speed-up is judged by the upper end of its interval, of the clock's noise alone if that is known: other prompts
    don't matter here.
    """
    why = doubt(case)
    # Noise fails a speed-up that something was asked of; wrong tokens, or none, fail whatever was asked.
    unmeasured = case.status in ("no-draft", "no-baseline") or case.lossless is False or case.speedup_x is None
    if unmeasured or (why and floors.speedup_x is not None):
        return [f"speedup_x is {why}"]
    broken = []
    acceptance = case.acceptance_length
    if acceptance is None and floors.acceptance_length is not None:
        broken.append(
            f"acceptance_length must reach {floors.acceptance_length:.2f}, and is unknown: {case.acceptance_unknown}"
        )
    elif acceptance is not None and floors.acceptance_length is not None and acceptance < floors.acceptance_length:
        broken.append(
            f"acceptance_length {acceptance:.2f} < {floors.acceptance_length:.2f}: the draft is accepted less "
            f"({_block_cost(case)})"
        )
    if why:
        return broken
    known = _timing_interval(case)
    if known is None or case.speedup_x is None:  # then there was a doubt
        return broken
    low, high = known
    interval = f"speedup_x {case.speedup_x:.2f} ({low:.2f} to {high:.2f})"
    if floors.speedup_x is not None and high < floors.speedup_x and acceptance is None:
        broken.append(f"{interval} < {floors.speedup_x:.2f}; what is accepted is unknown")
    elif acceptance is not None and floors.speedup_x is not None and high < floors.speedup_x:
        needed = floors.speedup_x * acceptance / case.speedup_x
        # Without a floor of its own, acceptance can't be ruled out.
        moved = "the cost of a block" if floors.acceptance_length is not None else "acceptance or the cost of a block"
        moved = "acceptance" if broken else moved
        broken.append(
            f"{interval} < {floors.speedup_x:.2f}: {moved} moved; {_block_cost(case)}, acceptance_length is "
            f"{acceptance:.2f} and would have to be {needed:.2f}"
        )
    predicted = case.predicted_speedup_x
    if floors.predicted_share is not None and predicted and high < floors.predicted_share * predicted:
        broken.append(
            f"{interval} < {floors.predicted_share:.2f} x the {predicted:.2f} that its steps predict: the loop moved; "
            f"{_block_cost(case)}"
        )
    return broken
