"""One benchmark case: rounds of DFlash decoding, each paired with greedy decoding of the same prompts.

Both clocks run from the end of prefill to the last token and include the first draft call. The tokens are compared in
every round; in bfloat16 those that differ are audited (docs/lossless.md).
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import jax.numpy as jnp
import numpy as np

from dflash import metrics
from dflash.decoding.audit import NEAR_TIE, Divergence, audit_again
from dflash.decoding.decode import RequestError, Rows, compiled_decoder, prefill, read_state
from dflash.decoding.modes import VERIFYING, Mode
from dflash.decoding.script import ScriptedDraft
from dflash.measuring import cost_model
from dflash.measuring.cost_model import StepTimes
from dflash.measuring.gate import status
from dflash.measuring.greedy import Greedy, timed_decode
from dflash.measuring.interval import (
    NO_SPEEDUP,
    acceptance_over_prompts,
    known,
    paired_seconds,
    rounds_to_add,
    speedup_figures,
)
from dflash.measuring.result import Decode, TokenPlace, VerifyRatio
from dflash.measuring.steps import experts_awake
from dflash.models.draft import Draft
from dflash.models.gpt_oss import GptOss


def first_divergence(expected: Sequence[Rows], got: Sequence[Rows]) -> TokenPlace | None:
    """Where the first row differs (prompt and token, from 0), over groups of rows; None when all are equal."""
    pairs = zip([r for g in expected for r in g], [r for g in got for r in g], strict=True)
    for prompt, (a, b) in enumerate(pairs):
        if (place := metrics.first_difference(a, b)) is not None:
            return TokenPlace(prompt=prompt, token=place)
    return None


def _steps(produced: Sequence[Rows]) -> np.ndarray:
    """One-token steps of every group, int64 [groups]; a batch takes as many as its longest row."""
    return np.array([max(map(sum, rows)) for rows in produced])


def _speed(produced: Sequence[Rows], seconds: float) -> tuple[float | None, float | None]:
    """Tokens per second, and milliseconds per token."""
    steps = int(_steps(produced).sum())
    tok_s_total = metrics.throughput([row for rows in produced for row in rows], seconds)
    return tok_s_total, 1000 * seconds / steps if steps else None


class PairedRun:
    """The rounds of one case, each paired with a round of `greedy`, which other cases may share.

    `scripted` replaces the draft's proposals so that exactly that many are accepted in every block. A `brief` case
    decodes the first quarter of the groups, and is content with the rounds it gets. With `baseline` False nothing is
    compared, and the case's status says so.
    """

    def __init__(
        self,
        greedy: Greedy,
        draft: Draft,
        *,
        mode: Mode,
        block_size: int,
        scripted: int | None = None,
        brief: bool = False,
        baseline: bool = True,
    ):
        if mode not in VERIFYING:
            known = ", ".join(m.name for m in VERIFYING)
            raise RequestError(f"a paired run compares {known} with greedy decoding, got {mode.name}")
        self.greedy, self.target, self.draft, self.mode = greedy, greedy.target, draft, mode
        self.block_size, self.max_new_tokens, self.with_baseline = block_size, greedy.shape.max_new_tokens, baseline
        self.brief, self.groups = brief, max(1, len(greedy.groups) // 4) if brief else len(greedy.groups)
        # All are checked before anything is compiled.
        self._requests = greedy.requests([draft] * self.groups, mode.name, block_size)
        shape = dataclasses.replace(greedy.shape, mode=mode.name, block_size=block_size)
        self.dflash = compiled_decoder(self.target, draft, shape)
        self.dflash.take_weights()
        if scripted is not None:
            # As far past the budget as the last block may look.
            needed = self.max_new_tokens + block_size - 1
            outputs = [greedy.outputs(group, needed) for group in range(self.groups)]
            scripts = [ScriptedDraft(draft=draft, outputs=rows, accept_len=scripted) for rows in outputs]
            self._requests = greedy.requests(scripts, mode.name, block_size)
        self.baseline_s: list[list[float]] = []
        self.dflash_s: list[list[float]] = []
        self.prefill_s: list[float] = []
        self.divergence: TokenPlace | None = None
        self._differing: list[tuple[list[Rows], list[Rows]]] = []
        self._seconds: list[float] = []
        self._outcome: list[tuple[Rows, Rows, Rows]] = []

    def decode(self, group: int) -> None:
        """Decodes one group with the draft; the first of them begins a round."""
        if group == 0:
            self._seconds, self._outcome = [], []
        start = time.perf_counter()
        ready = prefill(self.dflash, self._requests[group])
        self.prefill_s.append(time.perf_counter() - start)
        state, seconds = timed_decode(self.dflash, ready)
        self._seconds.append(seconds)
        self._outcome.append(read_state(state))

    def pair(self) -> None:
        """Ends the round: pairs it with the latest greedy round and compares their tokens."""
        self.dflash_s.append(self._seconds)
        if not self.with_baseline:
            return
        self.baseline_s.append(self.greedy.seconds[: self.groups])
        expected, tokens = self.greedy.tokens[: self.groups], [rows for rows, _, _ in self._outcome]
        if tokens != expected:
            self.divergence = self.divergence or first_divergence(expected, tokens)
            if (expected, tokens) not in self._differing:
                self._differing.append((expected, tokens))

    def rounds_to_add(self, rounds: int, precision: float) -> int:
        """Rounds to take before asking again, 0 for none: the last `rounds` leave the speed-up within `precision`."""
        if self.brief or not (self.with_baseline and self._outcome and self._block_steps()):
            return 0
        return rounds_to_add(np.array(self.baseline_s[-rounds:]), np.array(self.dflash_s[-rounds:]), precision)

    def _audit(self) -> list[Divergence]:
        """The verdict on each row that differed in some round. float32 needs none: rows must not differ."""
        if self.target.dtype != jnp.bfloat16:
            return []
        pair = ((self.greedy.decoder, self.greedy.greedy_requests[: self.groups]), (self.dflash, self._requests))
        return [d for rows in self._differing for d in audit_again(self.target, *pair, *rows)]

    def result(self, rounds: int, origin: Mapping[str, Any], steps: StepTimes | None = None) -> Decode:
        """The case's figures over its last `rounds` rounds, warm-up excluded; `origin` says what it measures."""
        info = self._workload() | self._accepted() | self._speeds(rounds) | self._compared() | self._experts()
        if steps is not None:
            info |= self._prediction(steps)
            info |= self._explanation(steps, info)
        case = Decode(**origin, **info, status="ok")
        return dataclasses.replace(case, status=status(case))

    @property
    def _produced(self) -> list[Rows]:
        return [rows for _, _, rows in self._outcome]

    def _workload(self) -> dict[str, Any]:
        """What was decoded."""
        lengths = [len(p) for r in self._requests for p in r.prompts]
        return {
            "mode": self.mode.name,
            "block_size": self.block_size,
            "batch_size": len(self._requests[0].prompts),
            "num_prompts": len(lengths),
            "prompt_len": max(lengths),
            "prompt_len_mean": sum(lengths) / len(lengths),
            "max_new_tokens": self.max_new_tokens,
            "dtype": str(self.target.dtype),
            "num_output_tokens": metrics.output_tokens([row for rows in self._produced for row in rows]),
        }

    def _accepted(self) -> dict[str, Any]:
        """What the target accepted."""
        accepted = [row for _, rows, _ in self._outcome for row in rows]
        return metrics.acceptance(accepted, self.block_size) | acceptance_over_prompts(accepted)

    def _speeds(self, rounds: int) -> dict[str, Any]:
        """What the tokens took, and how much less than greedy's."""
        dflash_s, produced = np.array(self.dflash_s[-rounds:]), self._produced
        total_s, speedup = float(np.median(dflash_s.sum(axis=1))), NO_SPEEDUP
        greedy_speed: tuple[float | None, float | None] = (None, None)
        if self.with_baseline:
            baseline_s, greedily = np.array(self.baseline_s[-rounds:]), self.greedy.produced[: self.groups]
            greedy_s, steps = float(np.median(baseline_s.sum(axis=1))), _steps(produced)
            if steps.any():
                # After a near tie the texts differ, and may in length: what is compared is the time of a token.
                pace = _steps(greedily) / np.maximum(steps, 1)
                seconds = paired_seconds(baseline_s, dflash_s * pace)
                greedy_s, total_s = float(seconds[0].sum()), float((seconds[1] / pace).sum())
                speedup = speedup_figures(baseline_s, dflash_s * pace)
                speedup["block_ratio"] = int(steps.sum()) / self._block_steps() / speedup["speedup_x"]
            greedy_speed = _speed(greedily, greedy_s)
        tok_s_total, tpot_ms = _speed(produced, total_s)
        return {
            "rounds": len(dflash_s),
            "compile_s": self.dflash.compile_s,
            "ttft_ms": 1000 * float(np.median(self.prefill_s[-rounds * len(self._requests) :])),
            "tok_s_total": tok_s_total,
            "tpot_ms": tpot_ms,
            "baseline_tok_s_total": greedy_speed[0],
            "baseline_tpot_ms": greedy_speed[1],
            **speedup,
        }

    def _compared(self) -> dict[str, Any]:
        """Whether the tokens are greedy's, and the verdict on those that are not."""
        if not self.with_baseline:
            return {"lossless": None, "first_divergence": None}
        divergences = self._audit()
        defects = [d for d in divergences if d.verdict != NEAR_TIE]
        return {
            "lossless": self.divergence is None or (bool(divergences) and not defects),
            "first_divergence": (
                TokenPlace(prompt=defects[0].prompt, token=defects[0].token) if defects else self.divergence
            ),
            "divergences": divergences,
            "near_ties": len(divergences) - len(defects),
        }

    def _block_steps(self) -> int:
        """Blocks that the device ran; a batch takes as many as its slowest row."""
        return sum(max(map(len, rows)) for _, _, rows in self._outcome)

    def _prediction(self, steps: StepTimes) -> dict[str, Any]:
        """The cost model's speed-up from the terms timed alone and the steps that both decoders actually took."""
        blocks = self._block_steps()
        if not blocks:
            return {"predicted_speedup_x": None, "predicted_block_ratio": None}
        ratio = steps.block_ratio(self.block_size)
        if not self.mode.whole:
            # One target step per token that is looked at, the refused one included, until no row agrees.
            looked_at = sum(1 + max(block) for _, rows, _ in self._outcome for block in zip_longest(*rows, fillvalue=0))
            ratio = looked_at / blocks + steps.draft_s[self.block_size] / steps.step_s
        longest = int(_steps(self._produced).sum())
        return {"predicted_speedup_x": longest / blocks / ratio, "predicted_block_ratio": ratio}

    def _experts(self) -> dict[str, Any]:
        """Experts awake in a one-token step and in a verify step of a routed target, expected and counted."""
        routed = self.target.config.experts
        if routed is None or not isinstance(self.target, GptOss):
            return {}
        prompts, outcome = self._requests[0].prompts, self._outcome[0][0]
        rows = [[*prompt, *tokens] for prompt, tokens in zip(prompts, outcome, strict=True)]
        sizes = {"experts_awake_step": 1, "experts_awake_verify": self.block_size}
        awake: dict[str, Any] = {"experts": routed.count}
        for name, size in sizes.items():
            awake[f"{name}_expected"] = metrics.expected_awake(routed.count, routed.per_token, size * len(rows))
            awake[name] = experts_awake(self.target, rows, size) if min(map(len, rows)) >= size else None
        return awake

    def _explanation(self, steps: StepTimes, info: dict[str, Any]) -> dict[str, Any]:
        """The terms of the cost model beside the measurement: where time goes, and which block size to use."""
        size, cheapest = self.block_size, steps.cheapest_verify()
        verify, draft, predicted = steps.verify_ratio(size), steps.draft_ratio(size), info["predicted_speedup_x"]
        terms: dict[str, Any] = {
            "verify_ratio": verify,
            "verify_ratio_ci95": known(*steps.verify_interval(size)),
            "cheapest_verify": VerifyRatio(
                tokens=cheapest,
                ratio=steps.verify_ratio(cheapest),
                ratio_ci95=known(*steps.verify_interval(cheapest)),
            ),
            "draft_ratio": draft,
            "break_even_acceptance_length": info["predicted_block_ratio"],
        }
        if predicted and info["speedup_x"]:
            terms["residual"] = cost_model.residual(info["speedup_x"], predicted)
            # Whatever is not the draft belongs to the target, however often a block calls it.
            terms["time_shares"] = cost_model.time_shares(
                info["predicted_block_ratio"] - draft, draft, info["block_ratio"]
            )
        if self.mode.whole and info["accept_rate_per_pos"] and min(steps.draft_s) == 2:
            terms["advice"] = cost_model.advice(steps, info["accept_rate_per_pos"])
        return terms
