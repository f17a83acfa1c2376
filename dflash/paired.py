"""One benchmark case: DFlash decoding of prompts that are decoded greedily in the same round, round by round.

Both clocks run from after prefill to the last token; the first draft call is inside. The tokens of both are compared
in every round; in bfloat16 those that differ are audited (docs/lossless.md).
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import jax.numpy as jnp
import numpy as np

from dflash import cost_model, metrics
from dflash.audit import NEAR_TIE, Divergence, audit_again
from dflash.cost_model import StepTimes
from dflash.decoding.decode import RequestError, compiled_decoder, prefill, read_state
from dflash.decoding.script import ScriptedDraft
from dflash.gate import status
from dflash.greedy import Greedy, Rows, timed_decode
from dflash.interval import NO_SPEEDUP, known, rounds_to_add, speedup_figures
from dflash.measure import experts_awake
from dflash.models.draft import Draft
from dflash.models.gpt_oss import GptOss


def first_divergence(expected: Sequence[Rows], got: Sequence[Rows]) -> dict[str, int] | None:
    """Where the first row differs (prompt and token, from 0), over groups of rows; None when all are equal."""
    pairs = zip([r for g in expected for r in g], [r for g in got for r in g], strict=True)
    for prompt, (a, b) in enumerate(pairs):
        if (place := metrics.first_difference(a, b)) is not None:
            return {"prompt": prompt, "token": place}
    return None


def _steps(produced: Sequence[Rows]) -> np.ndarray:
    """One-token steps of every group, int64 [groups]: a batch takes as many as its longest row."""
    return np.array([max(map(sum, rows)) for rows in produced])


class PairedRun:
    """The rounds of one case, each paired with a round of `greedy`, which other cases may share.

    `scripted` replaces the draft's proposals so that exactly that many are accepted in every block. With `baseline`
    False nothing is compared, and the case's status says so.
    """

    def __init__(
        self,
        greedy: Greedy,
        draft: Draft,
        *,
        mode: str,
        block_size: int,
        scripted: int | None = None,
        baseline: bool = True,
    ):
        if not mode.startswith("cached"):
            raise RequestError(f"a paired run compares a cached mode with greedy decoding, got mode {mode!r}")
        self.greedy, self.target, self.draft, self.mode = greedy, greedy.target, draft, mode
        self.block_size, self.max_new_tokens, self.with_baseline = block_size, greedy.max_new_tokens, baseline
        groups = len(greedy.groups)
        # All are checked before anything is compiled.
        self._requests = greedy.requests([draft] * groups, mode, block_size)
        self.dflash = compiled_decoder(self.target, draft, mode, block_size, *greedy.shape, self.max_new_tokens)
        self.dflash.take_weights()
        if scripted is not None:
            # As far past the budget as the last block may look.
            outputs = greedy.outputs(self.max_new_tokens + block_size - 1)
            scripts = [ScriptedDraft(draft=draft, outputs=rows, accept_len=scripted) for rows in outputs]
            self._requests = greedy.requests(scripts, mode, block_size)
        self.baseline_s: list[list[float]] = []
        self.dflash_s: list[list[float]] = []
        self.prefill_s: list[float] = []
        self.divergence: dict[str, int] | None = None
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
        """Ends the round: pairs it with the latest of greedy decoding, and compares their tokens."""
        self.dflash_s.append(self._seconds)
        if not self.with_baseline:
            return
        self.baseline_s.append(self.greedy.seconds)
        expected, tokens = self.greedy.tokens, [rows for rows, _, _ in self._outcome]
        if tokens != expected:
            self.divergence = self.divergence or first_divergence(expected, tokens)
            if (expected, tokens) not in self._differing:
                self._differing.append((expected, tokens))

    def rounds_to_add(self, rounds: int, precision: float) -> int:
        """Rounds to take before asking again, until the interval of the last is narrower than `precision` of the

        speed-up; 0 where it is, and where there is no speed-up.
        """
        if not (self.with_baseline and self._outcome and self._block_steps()):
            return 0
        return rounds_to_add(np.array(self.baseline_s[-rounds:]), np.array(self.dflash_s[-rounds:]), precision)

    def _audit(self) -> list[Divergence]:
        """The verdict on each row that differed in some round. In float32 none is needed: it must not differ."""
        if self.target.dtype != jnp.bfloat16:
            return []
        pair = ((self.greedy.decoder, self.greedy.greedy_requests), (self.dflash, self._requests))
        return [d for rows in self._differing for d in audit_again(self.target, *pair, *rows)]

    def info(self, rounds: int, steps: StepTimes | None = None) -> dict[str, Any]:
        """The case's figures over its last `rounds` rounds (warm-up comes before), by the names in `metrics`."""
        accepted = [row for _, rows, _ in self._outcome for row in rows]
        produced = [row for _, _, rows in self._outcome for row in rows]
        dflash_s = np.array(self.dflash_s[-rounds:])
        dflash_steps = _steps([rows for _, _, rows in self._outcome])
        longest = int(dflash_steps.sum())
        total_s = float(np.median(dflash_s.sum(axis=1)))
        lengths = [len(p) for r in self._requests for p in r.prompts]
        divergences = self._audit()
        defects = [d for d in divergences if d.verdict != NEAR_TIE]
        place = {"prompt": defects[0].prompt, "token": defects[0].token} if defects else self.divergence
        info: dict[str, Any] = {
            "mode": self.mode,
            "block_size": self.block_size,
            "batch_size": len(self._requests[0].prompts),
            "num_prompts": len(lengths),
            "prompt_len": max(lengths),
            "prompt_len_mean": sum(lengths) / len(lengths),
            "max_new_tokens": self.max_new_tokens,
            "dtype": str(self.target.dtype),
            **metrics.acceptance(accepted, self.block_size),
            "num_output_tokens": metrics.output_tokens(produced),
            "tok_s_total": metrics.throughput(produced, total_s),
            "ttft_ms": 1000 * float(np.median(self.prefill_s[-rounds * len(self._requests) :])),
            "tpot_ms": 1000 * total_s / longest if longest else None,
            "compile_s": self.dflash.compile_s,
            "rounds": len(dflash_s),
            "baseline_tok_s_total": None,
            "baseline_tpot_ms": None,
            **NO_SPEEDUP,
            "block_ratio": None,
            "lossless": None,
            "first_divergence": place,
            "divergences": None,
            "near_ties": None,
        }
        if self.with_baseline:
            baseline_s = np.array(self.baseline_s[-rounds:])
            greedy_s = float(np.median(baseline_s.sum(axis=1)))
            greedily = [row for rows in self.greedy.produced for row in rows]
            greedy_steps = _steps(self.greedy.produced)
            longest_greedy = int(greedy_steps.sum())
            info |= {
                "baseline_tok_s_total": metrics.throughput(greedily, greedy_s),
                "baseline_tpot_ms": 1000 * greedy_s / longest_greedy if longest_greedy else None,
                "lossless": self.divergence is None or (bool(divergences) and not defects),
                "divergences": [dataclasses.asdict(d) for d in divergences],
                "near_ties": len(divergences) - len(defects),
            }
            if longest:
                # After a near tie the texts differ, and may in length: what is compared is the time of a token.
                dflash_s = dflash_s * (greedy_steps / np.maximum(dflash_steps, 1))
                info |= speedup_figures(baseline_s, dflash_s)
                info |= {"block_ratio": longest / self._block_steps() / info["speedup_x"]}
        info |= self._experts()
        if steps is not None:
            info |= self._prediction(steps, longest)
            info |= self._explanation(steps, info)
        return metrics.finite(info | {"status": status(info)})

    def _block_steps(self) -> int:
        """Blocks that the device went through: a batch takes as many as its slowest row."""
        return sum(max(map(len, rows)) for _, _, rows in self._outcome)

    def _prediction(self, steps: StepTimes, longest: int) -> dict[str, Any]:
        """The cost model's speed-up from the terms timed alone, with the steps that both decoders really took."""
        blocks = self._block_steps()
        if not blocks:
            return {"predicted_speedup_x": None, "predicted_block_ratio": None}
        ratio = steps.block_ratio(self.block_size)
        if self.mode == "cached_sequential_verify":
            # One target step per token that is looked at, the refused one included, until no row agrees.
            looked_at = sum(1 + max(block) for _, rows, _ in self._outcome for block in zip_longest(*rows, fillvalue=0))
            ratio = looked_at / blocks + steps.draft_s[self.block_size] / steps.step_s
        return {"predicted_speedup_x": longest / blocks / ratio, "predicted_block_ratio": ratio}

    def _experts(self) -> dict[str, Any]:
        """Experts awake in a step of one token a row and in a verify step, expected and counted, of a routed target."""
        routed = self.target.config.experts
        if routed is None or not isinstance(self.target, GptOss):
            return {}
        prompts, outcome = self._requests[0].prompts, self._outcome[0][0]
        rows = [[*prompt, *tokens] for prompt, tokens in zip(prompts, outcome, strict=True)]
        sizes = {"experts_awake_step": 1, "experts_awake_verify": self.block_size}
        told: dict[str, Any] = {"experts": routed.count}
        for name, size in sizes.items():
            told[f"{name}_expected"] = metrics.expected_awake(routed.count, routed.per_token, size * len(rows))
            told[name] = experts_awake(self.target, rows, size) if min(map(len, rows)) >= size else None
        return told

    def _explanation(self, steps: StepTimes, info: dict[str, Any]) -> dict[str, Any]:
        """The terms of the cost model beside what was measured: where time goes, and which block size to use."""
        size = self.block_size
        verify, draft, predicted = steps.verify_ratio(size), steps.draft_ratio(size), info["predicted_speedup_x"]
        told: dict[str, Any] = {
            "verify_ratio": verify,
            "verify_ratio_ci95": known(*steps.verify_ratio_ci95.get(size, (0.0, math.inf))),
            "draft_ratio": draft,
            "break_even_acceptance_length": info["predicted_block_ratio"],
            "residual": None,
            "time_shares": None,
            "advice": None,
        }
        if predicted and info["speedup_x"]:
            told["residual"] = cost_model.residual(info["speedup_x"], predicted)
            # What is not the draft is the target's, however often a block asks it.
            told["time_shares"] = cost_model.time_shares(
                info["predicted_block_ratio"] - draft, draft, info["block_ratio"]
            )
        if self.mode == "cached_block_verify" and info["accept_rate_per_pos"] and min(steps.draft_s) == 2:
            told["advice"] = cost_model.advice(steps, info["accept_rate_per_pos"])
        return told
