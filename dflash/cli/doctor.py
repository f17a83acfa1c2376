"""`python -m dflash doctor`: is this host ready, and what is to be mended?"""

import dataclasses
import json
import sys
from typing import Annotated, Literal

import tyro

from dflash.doctor import examine


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Doctor:
    """What `doctor` takes."""

    device: Literal["", "cpu", "gpu", "tpu"] = ""
    """A device that must be there; by default a TPU where the host seems to have one, else any."""
    json: bool = False
    """Print one JSON object instead."""


def doctor(args: Annotated[Doctor, tyro.conf.arg(name="")]) -> None:
    """Check versions, devices, memory, space, token and caches; exit code 1 when something must be mended."""
    findings = examine(args.device)
    to_mend = [f for f in findings if f.verdict == "mend"]
    if args.json:
        print(json.dumps({"ready": not to_mend, "findings": [dataclasses.asdict(f) for f in findings]}))
    else:
        width = max(len(f.name) for f in findings)
        for f in findings:
            print(f"{f.verdict:4}  {f.name:{width}}  {f.found}" + (f"; {f.advice}" if f.advice else ""))
        print("ready" if not to_mend else f"to mend before a run: {', '.join(f.name for f in to_mend)}")
    if to_mend:
        sys.exit(1)
