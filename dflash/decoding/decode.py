"""What users call: checks a request, runs one of the four modes, and returns the tokens with their figures."""

import copy
import dataclasses
import inspect
import operator
import time
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx

from dflash import metrics
from dflash.config import DraftVocab, UserError, check_draft, field_faults
from dflash.decoding.logprobs import log_probabilities
from dflash.decoding.loop import MAX_STOPS, Decoder, DecodeShape, State
from dflash.decoding.modes import BLOCK, MODES, RECOMPUTE
from dflash.decoding.recompute import recompute_row
from dflash.decoding.sampling import GREEDILY, Sampling
from dflash.decoding.script import ScriptedDraft
from dflash.metrics import round_up
from dflash.models.draft import Draft, proposing
from dflash.models.llama import Llama


class RequestError(UserError, ValueError):
    """A decode that can't be run as asked: the rule, what came, and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DecodeResult:
    """What one decode gave. `tokens[b]` are row b's new tokens, the stop token included.

    `accept_lens[b]` and `produced[b]` have one entry per block (empty for greedy: nothing was drafted there, and
    `produced` counts its one-token steps). Seconds: `compile_s` before, `prefill_s` from prompt to first token,
    `decode_s` for the rest. `texts` are the rows as text, given a tokenizer; `logprobs` each token's log-probability
    (`decoding.logprobs`), if asked for.
    """

    mode: str
    block_size: int
    tokens: list[list[int]]
    accept_lens: list[list[int]]
    produced: list[list[int]]
    compile_s: float
    prefill_s: float
    decode_s: float
    texts: list[str] | None = None
    logprobs: list[list[float]] | None = None

    @property
    def metrics(self) -> dict[str, Any]:
        """Figures by the names in `dflash.metrics`. Recompute has no times: it is for checking, not for speed."""
        timed = MODES[self.mode].cached
        return metrics.acceptance(self.accept_lens, self.block_size) | {
            "num_output_tokens": metrics.output_tokens(self.produced),
            "tok_s_total": metrics.throughput(self.produced, self.decode_s) if timed else None,
            "ttft_ms": 1000 * self.prefill_s if timed else None,
            "tpot_ms": metrics.time_per_output_token_ms(self.produced, self.decode_s) if timed else None,
            "compile_s": self.compile_s if timed else None,
        }


class Codec(Protocol):
    """What decoding needs of a tokenizer (`load_tokenizer`)."""

    stop_token_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]: ...

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...


# Tokens, or lengths of blocks, by row.
Rows = list[list[int]]
# Token ids; text as it is; or messages, through the chat template.
Prompt = Sequence[int] | str | Sequence[Mapping[str, str]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A checked request, with everything per row."""

    draft: Draft | None
    mode: str
    block_size: int
    prompts: list[list[int]]
    budgets: list[int]
    stops: list[list[int]]
    script: np.ndarray | None
    sampling: Sampling


def _integer(value: Any) -> int | None:
    """A Python, NumPy or JAX integer as a Python int; None for everything else."""
    try:
        return operator.index(value)
    except TypeError:
        return None


def _items(values: Any) -> list[Any] | None:
    """What an array, a list or a generator holds; None for text, bytes, mappings and non-iterables."""
    if isinstance(values, str | bytes | bytearray | Mapping):
        return None
    try:
        return list(values)
    except TypeError:  # also an array without a dimension
        return None


def _integers(values: Any, what: str) -> list[int]:
    items = _items(values)
    numbers = [None] if items is None else [_integer(v) for v in items]
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
    values = [one] if one is not None else _items(value)
    if values is not None and any(isinstance(v, Iterable) for v in values):
        _check_count("stop_token_ids", len(values), rows)
        stops = [_integers(v, "stop_token_ids") for v in values]
    else:
        stops = [_integers(value if values is None else values, "stop_token_ids")] * rows
    stops = [list(dict.fromkeys(ids)) for ids in stops]
    if max(map(len, stops)) > MAX_STOPS:
        raise RequestError(f"at most {MAX_STOPS} stop tokens a row, got {max(map(len, stops))}")
    outside = [i for ids in stops for i in ids if not 0 <= i < 2**31]
    if outside:
        raise RequestError(f"stop_token_ids must be token ids, 0 or more, got {outside[0]}")
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


def _token_ids(prompts: Iterable[Prompt], tokenizer: Codec | None) -> list[Any]:
    """Every prompt as token ids, as far as it is text or messages."""
    items = _items(prompts)
    if isinstance(prompts, str) or (items and isinstance(items[0], Mapping)):
        raise RequestError(f"prompts are a list of prompts, got one alone: put it into a list ({prompts!r:.60})")
    if items is None:
        raise RequestError(
            f"prompts are a list of token ids, texts or messages (those of a prompt set: its encode(tokenizer)), got "
            f"{prompts!r:.60}"
        )

    def ids(row: int, prompt: Any) -> Any:
        messages = isinstance(prompt, list | tuple) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
        if not (messages or isinstance(prompt, str)):
            return prompt
        if tokenizer is None:
            raise RequestError(f"text and messages need tokenizer=load_tokenizer(...); prompt {row} is {prompt!r:.60}")
        return tokenizer.encode_chat(list(prompt)) if messages else tokenizer.encode(prompt)

    return [ids(row, prompt) for row, prompt in enumerate(items)]


def _check_loaded(target: Any, draft: Any, tokenizer: Any) -> None:
    """Refuses what is not loaded, such as a name: an easy mistake."""
    proposer = draft.draft if isinstance(draft, ScriptedDraft) else draft
    for what, given, good, call in (
        ("target", target, isinstance(target, Llama), "load_target({})"),
        ("draft", proposer, isinstance(proposer, Draft | None), "load_draft({}, target)"),
        ("tokenizer", tokenizer, tokenizer is None or hasattr(tokenizer, "encode_chat"), "load_tokenizer({})"),
    ):
        if isinstance(given, str | Path):
            raise RequestError(f"a {what} is loaded, got a name: pass {call.format(repr(str(given)))}")
        if not good:
            raise RequestError(f"a {what} is what {call.format('...')} gives, got {type(given).__name__}")


def _check_block_size(draft: Draft, block_size: int | None, allow_larger_block: bool) -> int:
    trained = draft.config.block_size
    size = trained if block_size is None else _integer(block_size)
    if size is None:
        raise RequestError(f"block_size must be an integer, got {block_size!r}")
    if size < 2:
        raise RequestError(f"block_size must be at least 2 (anchor and one drafted token), got {size}")
    if size > trained and not allow_larger_block:
        raise RequestError(
            f"block_size {size} is above the {trained} that the draft was trained for, beyond which its proposals are "
            "untrained: use a smaller one, or in Python allow_larger_block=True"
        )
    return size


def _check_script(draft: ScriptedDraft, block_size: int, rows: int) -> np.ndarray:
    outputs = _items(draft.outputs) or []
    if len(outputs) != rows:
        raise RequestError(f"a scripted draft has one output per prompt ({rows}), got {len(outputs)}")
    if any(not 0 <= i < 2**31 for row in outputs for i in _integers(row, "outputs of a scripted draft")):
        raise RequestError("outputs of a scripted draft must be token ids")
    if _integer(draft.accept_len) not in range(block_size):
        raise RequestError(
            f"accept_len must be 0..{block_size - 1} for blocks of {block_size}, got {draft.accept_len!r}"
        )
    return draft.table(block_size)


def check_request(
    target: Llama,
    draft: Draft | ScriptedDraft | None,
    prompts: Sequence[Prompt],
    *,
    tokenizer: Codec | None = None,
    mode: str,
    block_size: int | None,
    max_new_tokens: int | Sequence[int],
    stop_token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
    sampling: Sampling = GREEDILY,
    allow_larger_block: bool = False,
    draft_vocab: DraftVocab | None = None,
) -> Request:
    """The request with defaults filled in, per row. Raises RequestError with the rule, what came, and what to do."""
    _check_loaded(target, draft, tokenizer)
    token_ids = _token_ids(prompts, tokenizer)
    if not isinstance(mode, str) or mode not in MODES:
        raise RequestError(f"mode must be one of {list(MODES)}, got {mode!r}")
    if faults := field_faults(sampling):
        raise RequestError("; ".join(faults))
    drafts = MODES[mode].drafts
    if draft is None and drafts:
        raise RequestError(
            f"mode {mode} needs a draft, got none: give one (load_draft or init_draft in Python, --draft in a command)"
        )
    if draft is not None and drafts is False:
        raise RequestError(
            f"mode {mode} decodes with the target alone, got a draft: leave the draft out (None in Python)"
        )
    config = target.config
    ids = _check_prompts(token_ids, config.vocab_size)
    network = draft.draft if isinstance(draft, ScriptedDraft) else draft
    size = 1
    if network is None and draft_vocab is not None:
        raise RequestError(
            f"draft_vocab says what a draft proposes, and there is none; got {draft_vocab!r}: leave it out"
        )
    if network is not None:
        check_draft(network.config, config)
        network = proposing(network, draft_vocab)
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
    if stop_token_ids is None:
        stop_token_ids = () if tokenizer is None else tokenizer.stop_token_ids
    stops = _check_stops(stop_token_ids, len(ids))
    return Request(
        draft=network,
        mode=mode,
        block_size=size,
        prompts=ids,
        budgets=budgets,
        stops=stops,
        script=_check_script(draft, size, len(ids)) if isinstance(draft, ScriptedDraft) else None,
        sampling=sampling,
    )


# The last few compiled decoders by what they were compiled for, without their networks: what is compiled serves every
# network of that form, and keeps none alive.
_COMPILED: OrderedDict[Hashable, Decoder] = OrderedDict()
_KEPT = 8


def forget_compiled() -> None:
    """Gives up every compiled decoder, and its memory on the device."""
    _COMPILED.clear()


def _form(network: Llama | Draft | None) -> Hashable:
    """What a program depends on of a network: its structure, and shape, dtype and place of every weight."""
    if network is None:
        return None
    graph, weights = nnx.split(network)
    return graph, tuple((leaf.shape, str(leaf.dtype), leaf.sharding) for leaf in jax.tree.leaves(weights))


def compiled_decoder(target: Llama, draft: Draft | None, shape: DecodeShape) -> Decoder:
    """The decoder of a shape, with the networks' current weights. Asking again compiles nothing: `compile_s` is 0."""
    key = (_form(target), _form(draft), shape)
    kept = _COMPILED.get(key)
    if kept is not None:
        _COMPILED.move_to_end(key)
        decoder = copy.copy(kept)
        decoder.target, decoder.draft = target, draft
        decoder.take_weights()
        return decoder
    decoder = Decoder(target, draft, shape)
    kept = copy.copy(decoder)
    kept.compile_s = 0.0
    del kept.target, kept.draft, kept._weights
    _COMPILED[key] = kept
    while len(_COMPILED) > _KEPT:
        _COMPILED.popitem(last=False)
    return decoder


def build_decoder(target: Llama, request: Request) -> Decoder:
    """The compiled decoder of a request's shape, with the models' current weights."""
    shape = DecodeShape(
        mode=request.mode,
        block_size=request.block_size,
        batch=len(request.prompts),
        # Rounded up, so that a few more tokens need no other program.
        max_prompt_len=round_up(max(map(len, request.prompts)), 32),
        max_new_tokens=round_up(max(request.budgets), 64),
        sampling=request.sampling,
    )
    return compiled_decoder(target, request.draft, shape)


def prefill(decoder: Decoder, request: Request) -> State:
    """Reads the request's prompts; each row's first token has then been emitted."""
    return decoder.prefill(
        request.prompts,
        budgets=request.budgets,
        stops=request.stops,
        script=request.script,
        sampling=request.sampling,
    )


def read_state(state: State) -> tuple[Rows, Rows, Rows]:
    """Tokens, accept lengths and produced lengths per row, from the device."""
    tokens, count = np.asarray(state.tokens), np.asarray(state.count)
    accepted, produced = np.asarray(state.accepted), np.asarray(state.produced)
    return (
        [row[:n].tolist() for row, n in zip(tokens, count, strict=True)],
        [row[row >= 0].tolist() for row in accepted],
        [row[row >= 0].tolist() for row in produced],
    )


def read_result(
    request: Request, state: State, *, compile_s: float = 0.0, prefill_s: float, decode_s: float
) -> DecodeResult:
    """What a request's decode gave, from the device; the seconds are those of `DecodeResult`."""
    tokens, accept_lens, produced = read_state(state)
    return DecodeResult(
        mode=request.mode,
        block_size=request.block_size,
        tokens=tokens,
        accept_lens=[[] for _ in tokens] if request.draft is None else accept_lens,
        produced=produced,
        compile_s=compile_s,
        prefill_s=prefill_s,
        decode_s=decode_s,
    )


def decode(
    target: Llama,
    draft: Draft | ScriptedDraft | None,
    prompts: Sequence[Prompt],
    *,
    tokenizer: Codec | None = None,
    logprobs: bool = False,
    mode: str = BLOCK.name,
    block_size: int | None = None,
    max_new_tokens: int | Sequence[int] = 128,
    stop_token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    first_row: int = 0,
    allow_larger_block: bool = False,
    draft_vocab: DraftVocab | None = None,
) -> DecodeResult:
    """Decodes prompts, with a draft or without; the tokens are the target's own in every mode.

    A prompt is token ids; or, with a `tokenizer`, text as it is, or messages (dicts of role and content) that go
    through its chat template. Then the result has `texts`, and rows end at the tokenizer's stop tokens unless others
    are named. With `logprobs` it has each token's log-probability too, at the price of reading every row once more.

    `mode` is greedy (one token at a time; draft None), cached_sequential_verify, cached_block_verify, or recompute (no
    cache; with a draft or None). `block_size` defaults to the draft's. `max_new_tokens` and `stop_token_ids` are for
    all rows, or one per row. With a temperature above 0 tokens are drawn, in every mode the same ones
    (`decoding.sampling.SamplingSettings` explains these settings): row b's depend on its prompt, `seed` and
    `first_row` + b. `draft_vocab` is how many tokens the draft proposes, or "all" (`models.draft.proposing`);
    by default those that it was trained with. Raises RequestError for a request that can't be run.
    """
    request = check_request(
        target,
        draft,
        prompts,
        tokenizer=tokenizer,
        mode=mode,
        block_size=block_size,
        max_new_tokens=max_new_tokens,
        stop_token_ids=stop_token_ids,
        sampling=Sampling(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, first_row=first_row
        ),
        allow_larger_block=allow_larger_block,
        draft_vocab=draft_vocab,
    )
    result = _decode(target, request) if MODES[mode].cached else _decode_by_recompute(target, request)
    if tokenizer is not None:
        result = dataclasses.replace(result, texts=[tokenizer.decode(row) for row in result.tokens])
    if logprobs:
        rows = zip(request.prompts, result.tokens, strict=True)
        result = dataclasses.replace(result, logprobs=[log_probabilities(target, *row) for row in rows])
    return result


def stream(
    target: Llama,
    draft: Draft | ScriptedDraft | None,
    prompts: Sequence[Prompt],
    *,
    every: int = 1,
    **settings: Any,
) -> Iterator[list[list[int]]]:
    """`decode`, token by token: yields the new tokens of every row after each `every` steps.

    The first are those of the prefill, one a row. `settings` are those of `decode`, but for `logprobs` and the mode
    recompute. Raises RequestError.
    """
    bound = inspect.signature(decode).bind(target, draft, prompts, **settings)
    bound.apply_defaults()
    asked = bound.arguments
    if asked.pop("logprobs"):
        raise RequestError("logprobs are of finished rows, and stream gives tokens as they come: use decode")
    sampling = Sampling(**{field.name: asked.pop(field.name) for field in dataclasses.fields(Sampling)})
    request = check_request(**asked, sampling=sampling)
    if not MODES[request.mode].cached:
        raise RequestError(f"mode {request.mode} does not stream: use decode")
    steps = _integer(every)
    if steps is None or steps < 1:
        raise RequestError(f"every counts steps, at least 1, got {every!r}")
    return _new_tokens(target, request, min(steps, max(request.budgets)))


def _new_tokens(target: Llama, request: Request, every: int) -> Iterator[list[list[int]]]:
    seen = [0] * len(request.prompts)
    for result in partial_results(target, request, every):
        yield [row[n:] for row, n in zip(result.tokens, seen, strict=True)]
        seen = [len(row) for row in result.tokens]


def _decode(target: Llama, request: Request) -> DecodeResult:
    decoder = build_decoder(target, request)
    start = time.perf_counter()
    state = prefill(decoder, request)
    first = time.perf_counter()
    state = decoder.steps(state)
    end = time.perf_counter()
    return read_result(request, state, compile_s=decoder.compile_s, prefill_s=first - start, decode_s=end - first)


def partial_results(target: Llama, request: Request, every: int = 4) -> Iterator[DecodeResult]:
    """Yields what was decoded so far: after prefill, then after every `every` steps. `compile_s` is left 0."""
    decoder = build_decoder(target, request)
    start = time.perf_counter()
    state = prefill(decoder, request)
    prefill_s, decode_s, limit = time.perf_counter() - start, 0.0, 0
    yield read_result(request, state, prefill_s=prefill_s, decode_s=decode_s)
    while not np.asarray(state.done).all():
        limit += every
        start = time.perf_counter()
        state = decoder.steps(state, limit)
        decode_s += time.perf_counter() - start
        yield read_result(request, state, prefill_s=prefill_s, decode_s=decode_s)


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
            draws=request.sampling.row(i).draws(1),
        )
        for i, prompt in enumerate(request.prompts)
    ]
    # Compiling is included: this mode is for checking, and its seconds mean nothing.
    seconds = time.perf_counter() - start
    return DecodeResult(
        mode=RECOMPUTE.name,
        block_size=request.block_size,
        tokens=[r[0] for r in rows],
        accept_lens=[[] if request.draft is None else r[1] for r in rows],
        produced=[r[2] for r in rows],
        compile_s=0.0,
        prefill_s=0.0,
        decode_s=seconds,
    )
