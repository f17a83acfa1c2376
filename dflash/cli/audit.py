"""`python -m dflash audit`: is decoding with a draft lossless on this device, and what does it round differently?"""

import dataclasses
import json
import sys
from typing import Annotated, Literal

import tyro

from dflash import metrics
from dflash.audit import Audit
from dflash.audit import audit as run_audit
from dflash.decoding.decode import RequestError
from dflash.device import device_facts, open_default_device
from dflash.prompts import load_prompts
from dflash.provenance import compile_cache, of_command
from dflash.report import audit_lines
from dflash.tokenizer import load_tokenizer
from dflash.weights.load import UNTRAINED, init_draft, load_draft, load_target, model_facts


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AuditArguments:
    """What `audit` takes."""

    target: str = "smollm2-135m"
    """Snapshot directory of the target, or smollm2-135m."""
    draft: str = ""
    """DFlashDraftModel or run directory, or smollm2-135m; without one an untrained draft, whose proposals the scripts
    replace."""
    block_size: int | None = None
    """Block size, the anchor included; by default the draft's own."""
    prompts: str = "builtin"
    """Prompts: builtin[:category], humaneval, FILE.jsonl or hf:NAME."""
    num_prompts: int = 2
    """How many of them, decoded together."""
    max_new_tokens: int = 64
    """Token budget of each."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of computation."""
    json: bool = False
    """Print one JSON object instead."""


def audit(args: Annotated[AuditArguments, tyro.conf.arg(name="")]) -> None:
    """Audit decoding against greedy decoding and a reading without cache; exit code 1 for a defect."""
    device, compiled = open_default_device(), compile_cache()
    if args.num_prompts < 1:
        raise RequestError(f"num_prompts must be at least 1, got {args.num_prompts}")
    target = load_target(args.target, args.dtype)
    draft = load_draft(args.draft, target) if args.draft else init_draft(target)
    prompt_set = load_prompts(args.prompts).take(args.num_prompts)
    prompts = prompt_set.encode(load_tokenizer(args.target))
    found: Audit = run_audit(target, draft, prompts, block_size=args.block_size, max_new_tokens=args.max_new_tokens)
    figures = device_facts(device) | {"target": args.target, "draft": args.draft} | found.figures()
    if args.json:
        facts = device_facts(device) | model_facts(args.target, args.draft or UNTRAINED)
        facts |= {"prompts": args.prompts, "prompts_sha256": prompt_set.sha256}
        print(json.dumps(metrics.finite(figures | {"dflash": of_command(facts, compiled)}), allow_nan=False))
    else:
        print("\n".join(audit_lines(figures)))
    if found.defects:
        sys.exit(1)
