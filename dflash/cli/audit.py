"""`python -m dflash audit`: is decoding with a draft lossless on this device, and what does it round differently?"""

import dataclasses
import json
import sys
from typing import Annotated

import tyro

from dflash import metrics
from dflash.cli.target import TargetOptions
from dflash.cli.template import TemplateOptions, refuse_unused_template
from dflash.config import BlockSize, Computed, Count
from dflash.decoding.audit import Audit
from dflash.decoding.audit import audit as run_audit
from dflash.host.device import device_facts
from dflash.host.provenance import compile_cache, of_command
from dflash.measuring.result import AuditResult, from_json
from dflash.report.sections import audit_details, render
from dflash.text.prompts import PromptSource, ids_sha256
from dflash.weights.load import UNTRAINED, load_draft, model_facts


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AuditArguments(TargetOptions):
    """What `audit` takes."""

    draft: str = ""
    """DFlashDraftModel or run directory, or smollm2-135m[-plain]; by default `untrained`, a draft whose proposals the
    scripts replace."""
    block_size: BlockSize | None = None
    """Block size, the anchor included; by default the draft's own."""
    prompts: tyro.conf.OmitArgPrefixes[PromptSource] = dataclasses.field(default_factory=PromptSource)
    template: tyro.conf.OmitArgPrefixes[TemplateOptions] = dataclasses.field(default_factory=TemplateOptions)
    num_prompts: Count = 2
    """Number of prompts, decoded together; of several turns the first."""
    max_new_tokens: Count = 64
    """Token budget of each."""
    dtype: Computed | None = "bfloat16"
    """Dtype of computation."""
    json: bool = False
    """Print one JSON object instead."""


def audit(args: Annotated[AuditArguments, tyro.conf.arg(name="")]) -> None:
    """Audit decoding against greedy decoding and a reading without cache; exits 1 for a defect."""
    refuse_unused_template(args, args.prompts.raw)
    compiled = compile_cache()
    device, target = args.open()
    draft = load_draft(args.draft or UNTRAINED, target)
    tokenizer = args.template.open(args.target)
    prompts = args.prompts.load().take(args.num_prompts).encode(tokenizer)
    result: Audit = run_audit(target, draft, prompts, block_size=args.block_size, max_new_tokens=args.max_new_tokens)
    where = device_facts(device, dp=args.dp, tp=args.tp)
    figures = where | {"case": args.target, "target": args.target, "draft": args.draft} | result.figures()
    if args.json:
        facts = where | model_facts(args.target, args.draft or UNTRAINED)
        facts |= {"prompts": args.prompts.source, "prompts_sha256": ids_sha256(prompts)} | tokenizer.facts
        print(json.dumps(metrics.finite(figures | {"dflash": of_command(facts, compiled)}), allow_nan=False))
    else:
        print("\n".join(render(audit_details(from_json(figures, AuditResult)))))
    if result.defects:
        sys.exit(1)
