"""`python -m dflash audit-teacher`: how far is EasyDeL's forward from the target's, and what would it do to a draft?"""

import dataclasses
import json
import sys
from typing import Annotated

import numpy as np
import tyro

from dflash import metrics
from dflash.cli.target import TargetOptions
from dflash.config import Computed, Index
from dflash.easydel import load
from dflash.easydel.teacher import CORRECTIONS, Deviation, audit_teacher
from dflash.host.device import device_facts
from dflash.weights.load import target_directory

# What the corrected forward may differ by: rounding, but no token.
_NEAR = {"float32": 2e-2, "bfloat16": float("inf")}
# The most tokens read by default: more, as for windows of 32768, needs a host with far more memory.
_LONGEST = 4096


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AuditTeacher(TargetOptions):
    """What `audit-teacher` takes."""

    dtype: Computed | None = "float32"
    """Dtype of computation; bfloat16 hides the smaller deviations."""
    num_tokens: Index = 0
    """Number of random tokens to read; 0 for 64, or three times the target's longest window, up to 4096."""
    json: bool = False
    """Print one JSON object instead."""


def audit_teacher_command(args: Annotated[AuditTeacher, tyro.conf.arg(name="")]) -> None:
    """Audit EasyDeL's forward as a teacher against ours; exit code 1 where the corrected one is still another model."""
    load()  # fail before reading a large target
    device, target = args.open()
    longest = max((w for w in target.config.windows if w), default=0)
    length = args.num_tokens or min(max(64, 3 * longest), _LONGEST)
    tokens = np.random.default_rng(0).integers(0, target.config.vocab_size, (1, length))
    rows, teacher = audit_teacher(target, target_directory(args.target), tokens)
    dtype = str(target.dtype)
    same = rows[-1].features <= _NEAR[dtype] and (dtype != "float32" or rows[-1].argmax == 1)
    if args.json:
        figures = device_facts(device, dp=args.dp, tp=args.tp) | {
            "target": args.target,
            "dtype": dtype,
            "num_tokens": length,
        }
        figures |= {"teacher": teacher.name, "rows": [dataclasses.asdict(row) for row in rows], "same": same}
        figures |= {"window_not_reached": longest if longest >= length else None}
        print(json.dumps(metrics.finite(figures), allow_nan=False))
    else:
        print("\n".join(_lines(rows)))
        print(f"{teacher.name}: " + ("the target's own forward, up to rounding" if same else "still ANOTHER MODEL"))
        if longest >= length:
            print(
                f"Not checked: what a window of {longest} hides, since {length} tokens were read; "
                f"--num-tokens {3 * longest} reads enough"
            )
    if not same:
        sys.exit(1)


def _lines(rows: list[Deviation]) -> list[str]:
    harms = {correction.name: correction.harm for correction in CORRECTIONS}
    table = [f"{'EasyDeL':<20}  largest difference of logits  of features  argmax equal"]
    for row in rows:
        name = f"+ {row.corrected}" if row.corrected else "as it is"
        table.append(f"{name:<20}  {row.logits:>28.2g}  {row.features:>11.2g}  {row.argmax:>12.1%}")
    sentences = [f"{row.corrected}: {harms[row.corrected]}." for row in rows if row.corrected]
    return [*table, "", "Uncorrected,", *sentences, ""]
