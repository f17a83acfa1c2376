"""What decoding on a described TPU would take: memory, cycles, collectives, and what DFlash would gain. All estimated.

A case is a batch, a context and a block size. Two programs are compiled for it, the greedy loop and the loop of block
verification; of the second `verify` is what was traced in the scope of that name, and `draft` all the rest of the
block: proposing, committing, taking in the context.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dflash.compiled.estimate import Part, whole
from dflash.compiled.floor import Floor, draft_floor, target_floor, training_floor
from dflash.compiled.programs import (
    Compiled,
    Networks,
    TooLarge,
    compile_program,
    decode_shape,
    held_bytes,
    lower_decode,
)
from dflash.compiled.topology import Chip
from dflash.decoding.modes import BLOCK, GREEDY, Mode
from dflash.host.disk import write_atomically
from dflash.metrics import predicted_speedup
from dflash.models.mesh import make_mesh
from dflash.training.trainer import TrainConfig, lower_step

# Is given each program's name and text.
Keep = Callable[[str, str], None]
# What one collective takes beside its bytes. The compiler has no figure for it; published ones are 1 to 5 microseconds.
COLLECTIVE_S = 2e-6
# Shares of drafted tokens accepted, all slots alike, for which a speed-up is given.
ACCEPT_RATES = (0.5, 0.6, 0.7, 0.8, 0.9)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One case of a plan."""

    batch: int
    context: int
    block_size: int


def seconds(program: dict[str, Any], chip: Chip) -> float:
    """A step's time: its cycles by the chip's clock, and its collectives by their number and bytes."""
    collectives = program["collectives"].values()
    exchanged = sum(count * COLLECTIVE_S + nbytes / chip.link_bytes_per_s for count, nbytes in collectives)
    return program["cycles"] / chip.clock_hz + exchanged


def _program(part: Part, floor: Floor, chip: Chip, before_loop: Part | None = None) -> dict[str, Any]:
    return {
        "cycles": part.cycles(chip.bytes_per_cycle),
        "floor_cycles": floor.cycles(chip),
        "floor": dataclasses.asdict(floor),
        "hbm_bytes": part.hbm_bytes,
        "unestimated": {name: list(counts) for name, counts in part.unestimated.items()},
        "before_loop_bytes": 0.0 if before_loop is None else before_loop.hbm_bytes,
        "collectives": {kind: list(counts) for kind, counts in part.collectives.items()},
    }


def training_case(
    networks: Networks, config: TrainConfig, setting: Setting, keep: Keep | None = None
) -> dict[str, Any]:
    """A training step of the draft in blocks and on rows of a setting's size, as a case: the target is not there."""
    n, chip = networks, networks.topology.chip
    assert n.draft is not None
    draft, context = dataclasses.replace(n.draft.config, block_size=setting.block_size), setting.context
    mesh = make_mesh(n.topology.devices, dp=n.dp, tp=n.tp)
    name = f"train-n{config.batch_size}-c{context}-b{draft.block_size}"
    compiled = compile_program(lower_step(draft, config, mesh, context=context))
    case = dataclasses.asdict(setting) | {"num_anchors": config.num_anchors}
    if isinstance(compiled, TooLarge):
        return case | {"fits": False, "refused": [compiled.message], "bytes": {}, "programs": {}}
    if keep is not None:
        keep(name, compiled.text)
    # The first chunk of the vocabulary is outside its loop.
    chunks = math.ceil(draft.num_tokens / config.tp / config.objective.chunk) - 1
    step = whole(compiled.module, chunks)
    floor = training_floor(draft, config, context=context)
    return case | {
        "fits": compiled.hbm_bytes <= chip.hbm_bytes,
        "refused": [],
        "bytes": {"arguments": compiled.argument_bytes, "temporaries": compiled.temporary_bytes},
        "programs": {"train": _program(step, floor, chip)},
    }


class Plan:
    """Cases of one target and draft on one mesh. Compiles each program once; `keep` is given every program's text."""

    def __init__(self, networks: Networks, keep: Keep | None = None):
        assert networks.draft is not None
        self.networks, self._keep = networks, keep
        self._greedy: dict[tuple[int, int], Compiled | TooLarge] = {}

    def _compiled(self, mode: Mode, setting: Setting) -> Compiled | TooLarge:
        name = f"{mode.name}-n{setting.batch}-c{setting.context}"
        name += f"-b{setting.block_size}" if mode.drafts else ""
        programs = lower_decode(
            self.networks,
            mode,
            batch=setting.batch,
            context=setting.context,
            block_size=setting.block_size,
        )
        compiled = compile_program(programs.loop)
        if self._keep is not None and isinstance(compiled, Compiled):
            self._keep(name, compiled.text)
        return compiled

    def case(self, setting: Setting) -> dict[str, Any]:
        """One case in the form of the plan's JSON file."""
        key = (setting.batch, setting.context)
        if key not in self._greedy:
            self._greedy[key] = self._compiled(GREEDY, setting)
        greedy, block = self._greedy[key], self._compiled(BLOCK, setting)
        programs = {} if isinstance(greedy, TooLarge) else self._of_greedy(greedy, setting)
        programs |= {} if isinstance(block, TooLarge) else self._of_block(block, setting)
        refused = [p.message for p in (greedy, block) if isinstance(p, TooLarge)]
        made = [p for p in (greedy, block) if isinstance(p, Compiled)]
        # Both loops' networks and caches are there together; of temporaries one program's at a time.
        return {
            **dataclasses.asdict(setting),
            "fits": not refused and max(p.hbm_bytes for p in made) <= self.networks.topology.chip.hbm_bytes,
            "refused": refused,
            "bytes": self._bytes(setting) | {"temporaries": max((p.temporary_bytes for p in made), default=None)},
            "programs": programs,
        }

    def _bytes(self, setting: Setting) -> dict[str, float]:
        n = self.networks
        assert n.draft is not None
        return held_bytes(n.target, n.draft, decode_shape(BLOCK, **dataclasses.asdict(setting)))

    def _of_greedy(self, greedy: Compiled, setting: Setting) -> dict[str, Any]:
        n, chip = self.networks, self.networks.topology.chip
        floor = target_floor(n.target, batch=setting.batch, tokens=1, context=setting.context)
        return {"step": _program(greedy.step, floor, chip, greedy.before_loop)}

    def _of_block(self, block: Compiled, setting: Setting) -> dict[str, Any]:
        n, chip = self.networks, self.networks.topology.chip
        assert n.draft is not None
        sizes = {"batch": setting.batch, "tokens": setting.block_size, "context": setting.context}
        step = block.step
        parts = {"verify": step.within("verify"), "draft": step.outside("verify")}
        floors = {"verify": target_floor(n.target, **sizes), "draft": draft_floor(n.target, n.draft, **sizes)}
        return {name: _program(part, floors[name], chip, block.before_loop) for name, part in parts.items()}


def gains(case: dict[str, Any], chip: Chip) -> dict[str, Any] | None:
    """The cost model of a case that fits: what a block costs in one-token steps, and speed-ups by accept rate.

    With a share p of drafted tokens accepted, all slots alike, the acceptance length is 1 + p + p^2 + ...
    """
    programs = case["programs"]
    if not {"step", "verify", "draft"} <= programs.keys():
        return None
    step, verify, draft = (seconds(programs[name], chip) for name in ("step", "verify", "draft"))
    size = case["block_size"]
    lengths = {rate: sum(rate**i for i in range(size)) for rate in ACCEPT_RATES}
    return {
        "step_ms": 1000 * step,
        "verify_ms": 1000 * verify,
        "draft_ms": 1000 * draft,
        "break_even_acceptance_length": (verify + draft) / step,
        "speedup_x": {f"{rate:g}": predicted_speedup(length, step, verify, draft) for rate, length in lengths.items()},
        "acceptance_length": {f"{rate:g}": length for rate, length in lengths.items()},
    }


def best_block_sizes(cases: Sequence[dict[str, Any]]) -> dict[str, int]:
    """The block size that gains most at each accept rate; 1 is greedy decoding. Of cases of one batch and context."""
    gaining = [c for c in cases if c.get("gains")]
    return {
        f"{rate:g}": max(
            [(1.0, 1), *((c["gains"]["speedup_x"][f"{rate:g}"], c["block_size"]) for c in gaining)],
            key=lambda pair: (pair[0], -pair[1]),
        )[1]
        for rate in ACCEPT_RATES
    }


def settings(batches: Sequence[int], contexts: Sequence[int], block_sizes: Sequence[int]) -> Iterator[Setting]:
    for batch in batches:
        for context in contexts:
            for size in block_sizes:
                yield Setting(batch=batch, context=context, block_size=size)


def hlo_writer(directory: Path) -> Keep:
    """Writes each program's text into a directory."""

    def keep(name: str, text: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / f"{name}.hlo", text)

    return keep


def meshes(devices: int, dp: int) -> list[int]:
    """The tp that `auto` tries: all for which there are devices. Those that heads rule out fail before a compile."""
    return list(range(1, devices // dp + 1))
