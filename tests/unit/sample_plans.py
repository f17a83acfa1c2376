"""Plans of made-up figures: a program, a case, a file."""

import dataclasses
from typing import Any

from dflash.compiled.floor import Floor
from dflash.compiled.plan import PlanFile, PlannedCase, PlannedProgram
from dflash.compiled.topology import CHIPS, Chip

CHIP = CHIPS["TPU v6 lite"]


def program(cycles: float, floor_cycles: float = 1e6, **collectives: tuple[int, float]) -> PlannedProgram:
    return PlannedProgram(
        cycles=cycles,
        floor_cycles=floor_cycles,
        floor=Floor(hbm_bytes=1e9, flops=4e9),
        hbm_bytes=1e9,
        unestimated={"topk": (2, 1e6)},
        before_loop_bytes=0.0,
        collectives=collectives,
    )


def case(block_size: int = 8, fits: bool = True, **programs: PlannedProgram) -> PlannedCase:
    return PlannedCase(
        batch=1,
        context=1280,
        block_size=block_size,
        fits=fits,
        refused=[],
        bytes={"weights": 1e9, "temporaries": None},
        programs=programs,
    )


def plan(*cases: PlannedCase, chip: Chip = CHIP, **changes: Any) -> PlanFile:
    made = PlanFile(
        estimate="nothing was run",
        target="t",
        topology="v6e:2x4",
        tp=8,
        dp=1,
        dtype="bfloat16",
        experts="bfloat16",
        hbm_bytes=chip.hbm_bytes,
        chip=chip,
        cases=list(cases),
    )
    return dataclasses.replace(made, **changes)
