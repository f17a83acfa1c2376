"""`python -m dflash generate`: one answer, streamed, and what it took."""

import dataclasses
import json
from functools import partial
from typing import Annotated, Any

import tyro

from dflash import metrics
from dflash.cli.option import refuse_unused
from dflash.cli.target import TargetOptions
from dflash.cli.template import TemplateOptions, refuse_unused_template
from dflash.config import BlockSize, Count, DraftVocab
from dflash.decoding.decode import DecodeResult, RequestError, check_request, partial_results
from dflash.decoding.modes import BLOCK, GREEDY, MODES
from dflash.decoding.sampling import Sampling, SamplingOptions
from dflash.host.device import device_facts
from dflash.host.provenance import compile_cache, of_command
from dflash.text.channels import shown
from dflash.text.prompts import ids_sha256
from dflash.text.tokenizer import Tokenizer
from dflash.text.worker import WORKER
from dflash.weights.load import UNTRAINED, default_draft, load_draft, model_facts


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Generate(TargetOptions):
    """What `generate` takes."""

    prompt: Annotated[str, tyro.conf.Positional]
    """What to ask, as a user's message."""
    draft: str = ""
    """DFlashDraftModel or run directory, smollm2-135m (a draft that comes with the project, and the default for the
    target of that name; -plain is the other), or `untrained` to see the machinery; other targets are
    decoded greedily without one."""
    mode: Annotated[
        str | None, tyro.conf.arg(metavar=f"{{{','.join(m for m, mode in MODES.items() if mode.cached)}}}")
    ] = None
    """How to decode; by default greedy without a draft and cached_block_verify with one."""
    block_size: BlockSize | None = None
    """Block size, the anchor included; by default the draft's own."""
    draft_vocab_size: DraftVocab | None = None
    """Tokens of the vocabulary that the draft proposes, a number or all; by default those that it was trained with."""
    max_new_tokens: Count = 128
    """Token budget."""
    sampling: tyro.conf.OmitArgPrefixes[SamplingOptions] = dataclasses.field(default_factory=SamplingOptions)
    template: tyro.conf.OmitArgPrefixes[TemplateOptions] = dataclasses.field(
        default_factory=partial(TemplateOptions, template_date="today")
    )
    raw: bool = False
    """The prompt is plain text to be continued, without a chat template, as for a base model."""
    show_special: bool = False
    """Show special tokens, and all channels of GPT-OSS as it writes them."""
    system: str = ""
    """System message; by default the chat template's own."""
    json: bool = False
    """Print one JSON object at the end instead of the line of figures."""


def _print_new(text: str, printed: str) -> str:
    """Prints what is new in the text; half a character is held back until it is complete."""
    text = text.rstrip("\ufffd")
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
    """The named draft, else the one that comes with the target, unless --mode greedy; None: no draft."""
    if args.draft:
        return args.draft
    return None if args.mode == GREEDY.name else default_draft(args.target)


def _facts(args: Generate, tokenizer: Tokenizer, prompt: list[int], draft: str | None) -> dict[str, Any]:
    """The inputs, by name and hash; greedy decoding reads no draft."""
    facts = model_facts(args.target, draft or UNTRAINED)
    read = facts if draft else {name: facts[name] for name in ("target", "target_sha256")}
    return read | {"prompts_sha256": ids_sha256([prompt])} | tokenizer.facts


def _check_unused(args: Generate) -> None:
    """Raises ConfigError for options that this answer would ignore."""
    refuse_unused_template(args, args.raw)
    if args.raw:
        refuse_unused(args, ["system"], "for a chat, and --raw continues plain text")
    if _draft_name(args) is None:
        refuse_unused(args, ["block_size", "draft_vocab_size"], "for a draft, and none is used")


def generate(args: Annotated[Generate, tyro.conf.arg(name="")]) -> None:
    """Answer a prompt: stream the text, then one line of figures."""
    if not args.prompt.strip():
        raise RequestError(f"a prompt must have some text, got {args.prompt!r}: say what to ask")
    if args.mode in MODES and not MODES[args.mode].cached:
        raise RequestError(f"mode {args.mode} keeps no cache and can't be streamed: dflash.decode has it")
    _check_unused(args)
    WORKER.begin()  # its imports run while the target is read
    compiled = compile_cache()
    device, target = args.open()
    system = [{"role": "system", "content": args.system}] if args.system else []
    tokenizer = args.template.open(args.target)
    talk = [*system, {"role": "user", "content": args.prompt}]
    prompt = tokenizer.encode_raw(args.prompt) if args.raw else tokenizer.encode_chat(talk)
    name = _draft_name(args)
    draft = None if name is None else load_draft(name, target)
    sampling = Sampling.of(args.sampling)
    request = check_request(
        target,
        draft,
        [prompt],
        mode=args.mode or (GREEDY if draft is None else BLOCK).name,
        block_size=args.block_size,
        max_new_tokens=args.max_new_tokens,
        stop_token_ids=tokenizer.stop_token_ids,
        sampling=sampling,
        draft_vocab=args.draft_vocab_size,
    )
    printed = ""
    for result in partial_results(target, request):
        if not args.json:
            printed = _print_new(shown(tokenizer, result.tokens[0], args.show_special), printed)
    text = shown(tokenizer, result.tokens[0], args.show_special)
    if args.json:
        facts = _facts(args, tokenizer, prompt, name) | device_facts(device, dp=args.dp, tp=args.tp)
        origin = of_command(facts, compiled)
        answer = {
            "text": text,
            "tokens": result.tokens[0],
            "mode": result.mode,
            "sampling": sampling.facts,
            **result.metrics,
            "dflash": origin,
        }
        print(json.dumps(metrics.finite(answer), allow_nan=False))
    else:
        print(f"{text[len(printed) :]}\n\n{_figures(result)}")
