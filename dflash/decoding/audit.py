"""Why two decoders disagree: first divergence, margin, noise, and the verdict near tie or defect.

The measure of every verdict is `dflash.decoding.reference`, which uses no cache and no loop; nothing of the decode
under suspicion is ever taken for noise. docs/lossless.md says what is promised.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from dflash.decoding.decode import Request, RequestError, Rows, build_decoder, check_request, prefill, read_state
from dflash.decoding.loop import Decoder, State
from dflash.decoding.modes import BLOCK, GREEDY, VERIFYING
from dflash.decoding.parity import ParityResult, compare_steps
from dflash.decoding.reference import SAFETY, Reference, relative_move
from dflash.decoding.sampling import GREEDILY, Sampling
from dflash.decoding.script import ScriptedDraft
from dflash.metrics import first_difference
from dflash.models.draft import Draft
from dflash.models.kv_cache import KVCache
from dflash.models.llama import Llama

NEAR_TIE, DEFECT = "near tie", "defect"
# A single position may move further than in any draw (a router may choose another expert); the mean may not.
PEAK = 4.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Divergence:
    """Where a decode first differs from greedy. None where one of the two had ended, or nothing could be measured.

    `margin` is the distance between the two tokens' honest logits, `noise` the margin that rounding may overturn there.
    `why` says what makes it a defect; it is empty for a near tie.
    """

    prompt: int
    token: int
    greedy_token: int | None
    dflash_token: int | None
    margin: float | None
    noise: float | None
    verdict: str
    why: str = ""

    def sentence(self) -> str:
        """The divergence in one line of text."""
        tokens = f"prompt {self.prompt}, token {self.token}: greedy {self.greedy_token}, DFlash {self.dflash_token}"
        margin = "" if self.margin is None else f", margin {self.margin:.3g}, noise {self.noise:.3g}"
        return f"{self.verdict} at {tokens}{margin}" + (f": {self.why}" if self.why else "")


def dishonest_token(
    reference: Reference, prompt: Sequence[int], tokens: Sequence[int], sampling: Sampling = GREEDILY
) -> str:
    """Describes the first token that is not the target's own choice; empty when all are.

    `reference` has read prompt and tokens; `sampling` is the row's.
    """
    judged = reference.judge(len(prompt) - 1, tokens, sampling)
    wrong = np.flatnonzero(~judged.honest)
    if not len(wrong):
        return ""
    k = int(wrong[0])
    return (
        f"token {k} is {tokens[k]}, {judged.margin[k]:.3g} below the target's {judged.best[k]} after the same tokens, "
        f"and rounding moves {judged.noise[k]:.3g} there"
    )


def _ends_wrong(tokens: Sequence[int], budget: int, stops: Sequence[int]) -> str:
    """What is wrong with a row's end, in words; empty when it ends at its first stop token or its budget."""
    stopped = next((k for k, t in enumerate(tokens) if t in stops), None)
    end = budget if stopped is None else min(budget, stopped + 1)
    return "" if len(tokens) == end else f"the row has {len(tokens)} tokens and should have ended after {end}"


def audit_divergence(
    target: Llama,
    row: int,
    prompt: Sequence[int],
    expected: Sequence[int],
    got: Sequence[int],
    faults: Sequence[str] = (),
    sampling: Sampling = GREEDILY,
) -> Divergence | None:
    """Why `got` differs from greedy's `expected`; None when it does not. `faults` are those already found in the row.

    With `sampling`, that of the row, greedy stands for drawing one token at a time.

    A near tie needs bfloat16, and more than a small margin where the rows diverge: every token of both rows must be the
    target's own choice after that row's tokens, or nearly tied with it, and their caches must be sound (`faults`). So a
    defect whose rows happen to diverge at a tie is seen in what follows.
    """
    place = first_difference(list(expected), list(got))
    if place is None:
        return None
    reasons = list(faults)
    for name, tokens in (("greedy", expected), ("DFlash", got)):
        fault = dishonest_token(Reference(target, [*prompt, *tokens]), prompt, tokens, sampling)
        if fault:
            reasons.append(f"{name}, {fault}")
    if target.dtype == jnp.float32:
        reasons.insert(0, "float32 tokens must be equal")
    pair = [int(tokens[place]) if place < len(tokens) else None for tokens in (expected, got)]
    margin = noise = None
    if None in pair:
        reasons.insert(0, "one ends where the other continues")
    else:
        shared = Reference(target, [*prompt, *expected[:place]])
        judged = [shared.judge(len(prompt) + place - 1, [t], sampling) for t in pair if t is not None]
        # Taken from the later one, which includes the draws that the first may have added.
        margin, noise = abs(float(judged[0].margin[0] - judged[1].margin[0])), float(judged[1].noise[0])
        if not margin <= noise:
            reasons.insert(0, "the margin is above the noise")
    return Divergence(
        prompt=row,
        token=place,
        greedy_token=pair[0],
        dflash_token=pair[1],
        margin=margin,
        noise=noise,
        verdict=DEFECT if reasons else NEAR_TIE,
        why="; ".join(dict.fromkeys(reasons)),
    )


def _cache_fault(cache: KVCache, row: int, layers: list[Any], moves: list[Any]) -> str:
    """Where a cache's row first differs from freshly computed keys and values by more than rounding; empty if nowhere.

    Compares only what a later token can see: in a window's ring, the last window - 1 positions.
    """
    length = int(cache.lengths[row])
    for i, (fresh, moved) in enumerate(zip(layers, moves, strict=True)):
        size, window = cache.values[i].shape[2], cache.windows[i]
        places = np.arange(0 if window is None else max(0, length - window + 1), length)
        held = (
            np.asarray(cache.keys[i][row], np.float32).transpose(2, 0, 1),
            np.asarray(cache.values[i][row], np.float32).transpose(1, 0, 2),
        )
        for what, mine, theirs, noise in zip(("keys", "values"), held, fresh, moved, strict=True):
            if not len(places):
                continue
            off = relative_move(mine[places % size].reshape(len(places), -1), theirs[places])
            far = off > PEAK * noise.max()
            if far.any() or not off.mean() <= SAFETY * noise[places].mean():
                k = int(np.argmax(far)) if far.any() else int(np.argmax(off))
                return (
                    f"layer {i}, {what} of position {places[k]}: off by {off[k]:.3g} of their norm (mean over "
                    f"{len(places)} positions {off.mean():.3g}), rounding moves {noise[places].mean():.3g}"
                )
    return ""


def _state_faults(reference: Reference, state: State, row: int, committed: int) -> list[str]:
    """Describes what is wrong with the caches after a decode. `reference` has read the row's `committed` tokens.

    A fault in the draft's cache changes no token, only what is accepted, so the cache itself is compared.
    """
    faults = []
    caches = [("target", state.cache, reference.keys_values, reference.moves)]
    if state.draft_cache is not None:
        caches.append(("draft", state.draft_cache, reference.draft_keys_values, reference.draft_moves))
    for name, cache, layers, moves in caches:
        if int(cache.lengths[row]) != committed:
            fault = f"holds {int(cache.lengths[row])} tokens, and {committed} were committed"
        else:
            fault = _cache_fault(cache, row, layers, moves)
        if fault:
            faults.append(f"{name} cache: {fault}")
    return faults


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoded:
    """A request, the state that decoding left on the device, and each row's tokens."""

    request: Request
    state: State
    rows: Rows

    @classmethod
    def by(cls, decoder: Decoder, request: Request) -> "Decoded":
        """Decodes the request."""
        state = decoder.steps(prefill(decoder, request))
        return cls(request=request, state=state, rows=read_state(state)[0])

    def faults(self, target: Llama) -> list[list[str]]:
        """Describes what is wrong with each row's tokens, end and caches; empty lists for a sound decode."""
        by_row = []
        for i, (prompt, tokens) in enumerate(zip(self.request.prompts, self.rows, strict=True)):
            committed = [*prompt, *tokens[:-1]]
            reference = Reference(target, committed, self.request.draft)
            descriptions = [
                dishonest_token(reference, prompt, tokens, self.request.sampling.row(i)),
                _ends_wrong(tokens, self.request.budgets[i], self.request.stops[i]),
                *_state_faults(reference, self.state, i, len(committed)),
            ]
            by_row.append([text for text in descriptions if text])
        return by_row


def audit_rows(
    target: Llama,
    prompts: Rows,
    expected: Rows,
    got: Rows,
    faults: Sequence[Sequence[str]],
    sampling: Sampling = GREEDILY,
) -> list[Divergence]:
    """One entry for each row whose tokens are not greedy's; `faults` are those already found, by row."""
    rows = enumerate(zip(prompts, expected, got, faults, strict=True))
    divergences = [audit_divergence(target, i, *row, sampling.row(i)) for i, row in rows]
    return [d for d in divergences if d is not None]


def audit_again(
    target: Llama,
    greedy: tuple[Decoder, Sequence[Request]],
    dflash: tuple[Decoder, Sequence[Request]],
    expected: Sequence[Rows],
    got: Sequence[Rows],
) -> list[Divergence]:
    """Judges the rows that differ, group by group: a group is decoded again, both ways, and its caches are checked.

    Prompts are numbered across the groups.
    """
    divergences: list[Divergence] = []
    first = 0
    groups = zip(greedy[1], dflash[1], expected, got, strict=True)
    for greedy_request, request, greedy_rows, rows in groups:
        if greedy_rows != rows:
            sound = Decoded.by(greedy[0], greedy_request).faults(target)
            faults = [[*a, *b] for a, b in zip(sound, Decoded.by(dflash[0], request).faults(target), strict=True)]
            some = audit_rows(target, request.prompts, greedy_rows, rows, faults, request.sampling)
            divergences += [dataclasses.replace(d, prompt=first + d.prompt) for d in some]
        first += len(rows)
    return divergences


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """What an audit found. `faults` describe defects other than divergences; `tokens` counts tokens judged."""

    dtype: str
    parity: ParityResult
    tokens: int
    divergences: dict[str, list[Divergence]]
    faults: list[str]

    @property
    def near_ties(self) -> int:
        """Divergences that are near ties."""
        return sum(d.verdict == NEAR_TIE for rows in self.divergences.values() for d in rows)

    @property
    def defects(self) -> list[str]:
        """A sentence for every defect; empty when the decoding is lossless."""
        sentences = [f"{case}: {d.sentence()}" for case, rows in self.divergences.items() for d in rows if d.why]
        if self.parity.defects:
            sentences.append(
                f"{self.parity.defects} of {self.parity.positions} teacher-forced positions flip without a near tie"
            )
        return sentences + self.faults

    def figures(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "dtype": self.dtype,
            "verdict": DEFECT if self.defects else "lossless up to near ties" if self.near_ties else "lossless",
            "tokens": self.tokens,
            "near_ties": self.near_ties,
            "defects": self.defects,
            "parity": dataclasses.asdict(self.parity),
            "divergences": {c: [dataclasses.asdict(d) for d in rows] for c, rows in self.divergences.items()},
        }


def audit(
    target: Llama,
    draft: Draft,
    prompts: Rows,
    *,
    block_size: int | None = None,
    max_new_tokens: int = 64,
    sampling: Sampling = GREEDILY,
) -> Audit:
    """Decodes the prompts greedily (or by `sampling`) and with the draft, and judges every token and every cache.

    Both verify modes, each with the draft's own proposals and with scripted ones, so that blocks are cut in the middle
    and accepted whole. Raises RequestError for a request that can't be run.
    """

    def request(network: Any, mode: str, budget: int) -> Request:
        return check_request(
            target,
            network,
            prompts,
            mode=mode,
            block_size=block_size,
            max_new_tokens=budget,
            sampling=sampling,
        )

    def run(*wanted: Any) -> Decoded:
        asked = request(*wanted)
        return Decoded.by(build_decoder(target, asked), asked)

    size = request(draft, BLOCK.name, max_new_tokens).block_size
    if max_new_tokens < size:
        raise RequestError(f"max_new_tokens must be at least a block ({size}) in an audit, got {max_new_tokens}")
    # A script needs to know what follows the budget, as far as the last block may look.
    longer = run(None, GREEDY.name, max_new_tokens + size - 1)
    sound, faults, judged = longer.faults(target), [], 0
    greedy = [row[:max_new_tokens] for row in longer.rows]
    proposers: dict[str, Any] = {"own": draft}
    for accepted in (size // 2, size - 1):
        proposers[f"a{accepted}"] = ScriptedDraft(draft=draft, outputs=longer.rows, accept_len=accepted)
    divergences: dict[str, list[Divergence]] = {}
    for mode in (m.name for m in VERIFYING):
        for name, proposer in proposers.items():
            case = f"{mode}-{name}"
            decoded = run(proposer, mode, max_new_tokens)
            by_row = decoded.faults(target)
            both = [[*a, *b] for a, b in zip(sound, by_row, strict=True)]
            rows = audit_rows(target, longer.request.prompts, greedy, decoded.rows, both, sampling)
            divergences |= {case: rows} if rows else {}
            faults += [f"{case}, prompt {i}: {text}" for i, texts in enumerate(by_row) for text in texts]
            judged += sum(map(len, decoded.rows))
    return Audit(
        dtype=str(target.dtype),
        parity=compare_steps(target, prompts, greedy, size),
        tokens=judged,
        divergences=divergences,
        faults=[f"greedy, prompt {i}: {text}" for i, texts in enumerate(sound) for text in texts] + faults,
    )
