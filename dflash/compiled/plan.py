"""What decoding on a described TPU would take, as the file of `dflash plan` holds it. All of it is estimated.

A case is a batch, a context and a block size. Its programs are `step`, a greedy step of one token; `verify`, the
target's part of a block; `draft`, all the rest of the block: proposing, committing, taking in the context. The case of
a training has `train` alone.
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

from dflash.compiled.floor import Floor
from dflash.compiled.topology import Chip
from dflash.config import fault_list
from dflash.host.disk import read_object, write_atomically
from dflash.measuring.result import ResultError, from_json, to_json
from dflash.metrics import predicted_speedup

# What one collective takes beside its bytes. The compiler has no figure for it; published ones are 1 to 5 microseconds.
COLLECTIVE_S = 2e-6
# Shares of drafted tokens accepted, all slots alike, for which a speed-up is given.
ACCEPT_RATES = (0.5, 0.6, 0.7, 0.8, 0.9)

# Whose figures these are.
ESTIMATE = "by the TPU's compiler; nothing was run"
_REMEDY = "`dflash plan --json FILE` writes one"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """The sizes of a case."""

    batch: int
    context: int
    block_size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedProgram:
    """A step of a program on one device. `unestimated` and `collectives`: by kind, how many, and their bytes."""

    cycles: float
    floor_cycles: float
    floor: Floor
    hbm_bytes: float
    unestimated: dict[str, tuple[int, float]]
    before_loop_bytes: float
    collectives: dict[str, tuple[int, float]]

    def seconds(self, chip: Chip) -> float:
        """A step's time: its cycles by the chip's clock, and its collectives by their number and bytes."""
        exchanged = (
            count * COLLECTIVE_S + nbytes / chip.link_bytes_per_s for count, nbytes in self.collectives.values()
        )
        return self.cycles / chip.clock_hz + sum(exchanged)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gains:
    """What a block costs in one-token steps, and what it brings at each of ACCEPT_RATES."""

    step_ms: float
    verify_ms: float
    draft_ms: float
    break_even_acceptance_length: float
    speedup_x: dict[float, float]
    acceptance_length: dict[float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedCase(Setting):
    """`bytes` on one device by what they are of; `refused`: the compiler's words where it refuses a program."""

    num_anchors: int | None = None
    fits: bool
    refused: list[str]
    bytes: dict[str, float | None]
    programs: dict[str, PlannedProgram]
    gains: Gains | None = None

    def with_gains(self, chip: Chip) -> "PlannedCase":
        """With the cost model's, where all its programs were made.

        With a share p of drafted tokens accepted, all slots alike, the acceptance length is 1 + p + p^2 + ...
        """
        if not {"step", "verify", "draft"} <= self.programs.keys():
            return self
        step, verify, draft = (self.programs[name].seconds(chip) for name in ("step", "verify", "draft"))
        lengths = {rate: sum(rate**i for i in range(self.block_size)) for rate in ACCEPT_RATES}
        gains = Gains(
            step_ms=1000 * step,
            verify_ms=1000 * verify,
            draft_ms=1000 * draft,
            break_even_acceptance_length=(verify + draft) / step,
            speedup_x={rate: predicted_speedup(length, step, verify, draft) for rate, length in lengths.items()},
            acceptance_length=lengths,
        )
        return dataclasses.replace(self, gains=gains)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TriedMeshes:
    """What `--tp auto` chose: the tp that fits with the fewest chips, and the fastest. `step_ms` of all that fit."""

    fewest: int
    fastest: int
    step_ms: dict[int, float]
    tried: list[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanFile:
    """The file of a plan: one target and draft on one mesh. Bytes are of one device."""

    estimate: str
    target: str
    topology: str
    tp: int
    dp: int
    dtype: str
    experts: str
    hbm_bytes: float
    chip: Chip
    cases: list[PlannedCase]
    auto: TriedMeshes | None = None


def write_plan(path: Path, plan: PlanFile) -> None:
    """Writes it as JSON; the path is as `write_atomically` takes it."""
    write_atomically(path, json.dumps(to_json(plan), indent=1, allow_nan=False) + "\n")


def read_plan(path: Path) -> PlanFile:
    """Raises ResultError for a file that is no plan, with its faults."""
    raw = read_object(path, ResultError, _REMEDY)
    try:
        plan = from_json(raw, PlanFile)
        if faults := _not_positive(plan):
            raise ResultError(fault_list(faults))
    except ResultError as error:
        raise ResultError(f"a plan has cases with programs; {path} is none ({error}): {_REMEDY}") from None
    return plan


def _not_positive(plan: PlanFile) -> list[str]:
    """Figures of 0 or less where there is something to divide by."""
    figures = {f"chip.{name}": value for name, value in dataclasses.asdict(plan.chip).items() if name != "name"}
    for number, case in enumerate(plan.cases):
        for name, program in case.programs.items():
            where = f"cases.{number}.programs.{name}"
            figures |= {f"{where}.cycles": program.cycles, f"{where}.floor_cycles": program.floor_cycles}
            figures |= {f"{where}.floor.{key}": value for key, value in dataclasses.asdict(program.floor).items()}
    return [f"{name} must be above 0, got {value}" for name, value in figures.items() if value <= 0]


def best_block_sizes(cases: Iterable[PlannedCase]) -> dict[float, int]:
    """The block size that gains most at each accept rate; 1 is greedy decoding. Of cases of one batch and context."""
    gaining = [(case.gains, case.block_size) for case in cases if case.gains is not None]
    return {
        rate: max(
            [(1.0, 1), *((gains.speedup_x[rate], size) for gains, size in gaining)],
            key=lambda pair: (pair[0], -pair[1]),
        )[1]
        for rate in ACCEPT_RATES
    }
