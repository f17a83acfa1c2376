"""What users call: checks a request, runs one of the four modes, and returns tokens with their figures."""

import dataclasses
import functools
import operator
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from dflash import metrics
from dflash.config import MODES, check_draft
from dflash.decoding.loop import MAX_STOPS, Decoder, State
from dflash.decoding.recompute import recompute_row
from dflash.decoding.script import ScriptedDraft
from dflash.models.draft import Draft
from dflash.models.llama import Llama


class RequestError(ValueError):
    """A decode that can't be run as asked: the rule, what came, and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DecodeResult:
    """What one decode gave. `tokens[b]` are row b's new tokens, the stop token included.

    `accept_lens[b]` and `produced[b]` have one entry per block (empty for greedy: nothing was drafted there, and
    `produced` counts its one-token steps). Seconds: `compile_s` before, `prefill_s` from prompt to first token,
    `decode_s` for the rest.
    """

    mode: str
    block_size: int
    tokens: list[list[int]]
    accept_lens: list[list[int]]
    produced: list[list[int]]
    compile_s: float
    prefill_s: float
    decode_s: float

    @property
    def metrics(self) -> dict[str, Any]:
        """Figures by the names in `dflash.metrics`. Recompute has no times: what it spends is no decoder's."""
        timed = self.mode != "recompute"
        return metrics.acceptance(self.accept_lens, self.block_size) | {
            "num_output_tokens": metrics.output_tokens(self.produced),
            "tok_s_total": metrics.throughput(self.produced, self.decode_s) if timed else None,
            "ttft_ms": 1000 * self.prefill_s if timed else None,
            "tpot_ms": metrics.time_per_output_token_ms(self.produced, self.decode_s) if timed else None,
            "compile_s": self.compile_s if timed else None,
        }


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A checked request: everything per row."""

    draft: Draft | None
    mode: str
    block_size: int
    prompts: list[list[int]]
    budgets: list[int]
    stops: list[list[int]]
    script: np.ndarray | None


def _integer(value: Any) -> int | None:
    """An integer of any kind (python, numpy, jax) as python's own; None for everything else."""
    try:
        return operator.index(value)
    except TypeError:
        return None


def _integers(values: Any, what: str) -> list[int]:
    numbers = [_integer(v) for v in values] if isinstance(values, Iterable) else [None]
    known = [n for n in numbers if n is not None]
    if len(known) < len(numbers):
        raise RequestError(f"{what} must be integers, got {repr(values)[:60]}")
    return known


def _check_count(name: str, count: int, rows: int) -> None:
    if count != rows:
        raise RequestError(f"{name} must be one for all or one per prompt ({rows}), got {count}")


def _check_budgets(value: Any, rows: int) -> list[int]:
    """One budget for all rows, or one per row."""
    one = _integer(value)
    if one is not None:
        return [one] * rows
    budgets = _integers(value, "max_new_tokens")
    _check_count("max_new_tokens", len(budgets), rows)
    return budgets


def _check_stops(value: Any, rows: int) -> list[list[int]]:
    """Stop tokens for all rows (one, or several), or several per row."""
    one = _integer(value)
    values = [one] if one is not None else list(value)
    if any(isinstance(v, Iterable) for v in values):
        _check_count("stop_token_ids", len(values), rows)
        stops = [_integers(v, "stop_token_ids") for v in values]
    else:
        stops = [_integers(values, "stop_token_ids")] * rows
    if max(map(len, stops)) > MAX_STOPS:
        raise RequestError(f"at most {MAX_STOPS} stop tokens a row, got {max(map(len, stops))}")
    return stops


def _check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> list[list[int]]:
    if len(prompts) == 0:
        raise RequestError("prompts must hold at least one prompt, got none")
    checked = []
    for row, prompt in enumerate(prompts):
        ids = _integers(prompt, f"token ids (prompt {row})")
        if not ids:
            raise RequestError(f"a prompt must have at least one token; prompt {row} is empty")
        outside = [t for t in ids if not 0 <= t < vocab_size]
        if outside:
            raise RequestError(
                f"token ids must be 0..{vocab_size - 1}; prompt {row} has {outside[0]}: "
                "is it another model's tokenizer?"
            )
        checked.append(ids)
    return checked


def _check_block_size(draft: Draft, block_size: int | None, allow_larger_block: bool) -> int:
    trained = draft.config.block_size
    size = trained if block_size is None else _integer(block_size)
    if size is None:
        raise RequestError(f"block_size must be an integer, got {block_size!r}")
    if size < 2:
        raise RequestError(f"block_size must be at least 2 (anchor and one drafted token), got {size}")
    if size > trained and not allow_larger_block:
        raise RequestError(
            f"block_size {size} is above the {trained} that the draft was made for, where its proposals are "
            "untrained; use a smaller one, or allow_larger_block to try"
        )
    return size


def check_request(
    target: Llama,
    draft: Draft | ScriptedDraft | None,
    prompts: Sequence[Sequence[int]],
    *,
    mode: str,
    block_size: int | None,
    max_new_tokens: int | Sequence[int],
    stop_token_ids: Sequence[int] | Sequence[Sequence[int]],
    temperature: float,
    allow_larger_block: bool,
) -> Request:
    """The request with defaults filled in, per row. Raises RequestError with the rule, what came, and what to do."""
    if mode not in MODES:
        raise RequestError(f"mode must be one of {list(MODES)}, got {mode!r}")
    if temperature != 0:
        raise RequestError(f"decoding is greedy only; got temperature {temperature}: leave it at 0")
    if draft is None and mode.startswith("cached"):
        raise RequestError(f"mode {mode} needs a draft, got none: load_draft or init_draft makes one")
    if draft is not None and mode == "greedy":
        raise RequestError("mode greedy decodes with the target alone, got a draft: pass None")
    config = target.config
    ids = _check_prompts(prompts, config.vocab_size)
    network = draft.draft if isinstance(draft, ScriptedDraft) else draft
    size = 1
    if network is not None:
        check_draft(network.config, config)
        size = _check_block_size(network, block_size, allow_larger_block)
    budgets = _check_budgets(max_new_tokens, len(ids))
    if min(budgets) < 1:
        raise RequestError(f"max_new_tokens must be at least 1, got {min(budgets)}")
    limit = min(config.max_position, network.config.max_position if network is not None else config.max_position)
    for row, (prompt, budget) in enumerate(zip(ids, budgets, strict=True)):
        if len(prompt) + budget + size > limit:
            raise RequestError(
                f"prompt + max_new_tokens + block must stay within {limit} positions; prompt {row} needs "
                f"{len(prompt)} + {budget} + {size}: shorten the prompt or the budget"
            )
    stops = _check_stops(stop_token_ids, len(ids))
    script = None
    if isinstance(draft, ScriptedDraft):
        if len(draft.outputs) != len(ids):
            raise RequestError(f"a scripted draft has one output per prompt ({len(ids)}), got {len(draft.outputs)}")
        script = draft.table(size)
    return Request(draft=network, mode=mode, block_size=size, prompts=ids, budgets=budgets, stops=stops, script=script)


@functools.lru_cache(maxsize=8)
def compiled_decoder(
    target: Llama, draft: Draft | None, mode: str, block_size: int, batch: int, prompt_len: int, max_new_tokens: int
) -> Decoder:
    """The decoder of a shape; the last few are kept, so that asking again compiles nothing."""
    return Decoder(
        target,
        draft,
        mode=mode,
        block_size=block_size,
        batch=batch,
        max_prompt_len=prompt_len,
        max_new_tokens=max_new_tokens,
    )


def build_decoder(target: Llama, request: Request) -> Decoder:
    """The compiled decoder of a request's shape, with the models' present weights."""
    longest = max(map(len, request.prompts))
    decoder = compiled_decoder(
        target,
        request.draft,
        request.mode,
        request.block_size,
        len(request.prompts),
        -(-longest // 32) * 32,
        max(request.budgets),
    )
    decoder.take_weights()
    return decoder


def prefill(decoder: Decoder, request: Request) -> State:
    """The request's prompts, read; each row's first token is out."""
    return decoder.prefill(request.prompts, budgets=request.budgets, stops=request.stops, script=request.script)


def read_state(state: State) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Tokens, accept lengths and produced lengths per row, from the device."""
    tokens, count = np.asarray(state.tokens), np.asarray(state.count)
    accepted, produced = np.asarray(state.accepted), np.asarray(state.produced)
    return (
        [row[:n].tolist() for row, n in zip(tokens, count, strict=True)],
        [row[row >= 0].tolist() for row in accepted],
        [row[row >= 0].tolist() for row in produced],
    )


def decode(
    target: Llama,
    draft: Draft | ScriptedDraft | None,
    prompts: Sequence[Sequence[int]],
    *,
    mode: str = "cached_block_verify",
    block_size: int | None = None,
    max_new_tokens: int | Sequence[int] = 128,
    stop_token_ids: Sequence[int] | Sequence[Sequence[int]] = (),
    temperature: float = 0.0,
    allow_larger_block: bool = False,
) -> DecodeResult:
    """Greedy decoding of token id prompts, with a draft or without; the tokens are the target's own in every mode.

    `mode` is greedy (draft None), cached_sequential_verify, cached_block_verify, or recompute (no cache; with a draft
    or None). `block_size` defaults to the draft's. `max_new_tokens` and `stop_token_ids` are for all rows, or one per
    row. Raises RequestError for a request that can't be run.
    """
    request = check_request(
        target,
        draft,
        prompts,
        mode=mode,
        block_size=block_size,
        max_new_tokens=max_new_tokens,
        stop_token_ids=stop_token_ids,
        temperature=temperature,
        allow_larger_block=allow_larger_block,
    )
    if mode == "recompute":
        return _decode_by_recompute(target, request)
    compiled_before = compiled_decoder.cache_info().misses
    decoder = build_decoder(target, request)
    compile_s = decoder.compile_s if compiled_decoder.cache_info().misses > compiled_before else 0.0
    start = time.perf_counter()
    state = prefill(decoder, request)
    first = time.perf_counter()
    state = decoder.steps(state)
    end = time.perf_counter()
    tokens, accept_lens, produced = read_state(state)
    return DecodeResult(
        mode=mode,
        block_size=request.block_size,
        tokens=tokens,
        accept_lens=[[] for _ in tokens] if mode == "greedy" else accept_lens,
        produced=produced,
        compile_s=compile_s,
        prefill_s=first - start,
        decode_s=end - first,
    )


def stream(target: Llama, request: Request, every: int = 4) -> Iterator[tuple[State, float, float]]:
    """The state after prefill and then after every `every` steps, with prefill and decode seconds so far."""
    decoder = build_decoder(target, request)
    start = time.perf_counter()
    state = prefill(decoder, request)
    prefill_s, decode_s, limit = time.perf_counter() - start, 0.0, 0
    yield state, prefill_s, decode_s
    while not np.asarray(state.done).all():
        limit += every
        start = time.perf_counter()
        state = decoder.steps(state, limit)
        decode_s += time.perf_counter() - start
        yield state, prefill_s, decode_s


def _decode_by_recompute(target: Llama, request: Request) -> DecodeResult:
    start = time.perf_counter()
    rows = [
        recompute_row(
            target,
            request.draft,
            prompt,
            block_size=request.block_size,
            budget=request.budgets[i],
            stops=request.stops[i],
            script=None if request.script is None else request.script[i],
        )
        for i, prompt in enumerate(request.prompts)
    ]
    # Compiling is inside: this mode is for trust, and its seconds mean nothing.
    seconds = time.perf_counter() - start
    return DecodeResult(
        mode="recompute",
        block_size=request.block_size,
        tokens=[r[0] for r in rows],
        accept_lens=[[] if request.draft is None else r[1] for r in rows],
        produced=[r[2] for r in rows],
        compile_s=0.0,
        prefill_s=0.0,
        decode_s=seconds,
    )
