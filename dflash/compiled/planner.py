"""Makes a plan: compiles the programs of its cases for a described TPU.

Two programs are compiled for a case, the greedy loop and the loop of block verification; of the second `verify` is what
was traced in the scope of that name, and `draft` all the rest of the block.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dflash.compiled.estimate import Part, whole
from dflash.compiled.floor import Floor, draft_floor, target_floor, training_floor
from dflash.compiled.plan import PlannedCase, PlannedProgram, Setting
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
from dflash.models.mesh import make_mesh
from dflash.training.trainer import TrainConfig, lower_step

# Is given each program's name and text.
Keep = Callable[[str, str], None]


def _program(part: Part, floor: Floor, chip: Chip, before_loop: Part | None = None) -> PlannedProgram:
    return PlannedProgram(
        cycles=part.cycles(chip.bytes_per_cycle),
        floor_cycles=floor.cycles(chip),
        floor=floor,
        hbm_bytes=part.hbm_bytes,
        unestimated=part.unestimated,
        before_loop_bytes=0.0 if before_loop is None else before_loop.hbm_bytes,
        collectives=part.collectives,
    )


def training_case(networks: Networks, config: TrainConfig, setting: Setting, keep: Keep | None = None) -> PlannedCase:
    """A training step of the draft in blocks and on rows of a setting's size, as a case: the target is not there."""
    n, chip = networks, networks.topology.chip
    assert n.draft is not None
    draft, context = dataclasses.replace(n.draft.config, block_size=setting.block_size), setting.context
    mesh = make_mesh(n.topology.devices, dp=n.dp, tp=n.tp)
    name = f"train-n{config.batch_size}-c{context}-b{draft.block_size}"
    compiled = compile_program(lower_step(draft, config, mesh, context=context))
    if isinstance(compiled, TooLarge):
        return PlannedCase(
            **dataclasses.asdict(setting),
            num_anchors=config.num_anchors,
            fits=False,
            refused=[compiled.message],
            bytes={},
            programs={},
        )
    if keep is not None:
        keep(name, compiled.text)
    # The first chunk of the vocabulary is outside its loop.
    chunks = math.ceil(draft.num_tokens / config.tp / config.objective.chunk) - 1
    step = whole(compiled.module, chunks)
    floor = training_floor(draft, config, context=context)
    return PlannedCase(
        **dataclasses.asdict(setting),
        num_anchors=config.num_anchors,
        fits=compiled.hbm_bytes <= chip.hbm_bytes,
        refused=[],
        bytes={"arguments": compiled.argument_bytes, "temporaries": compiled.temporary_bytes},
        programs={"train": _program(step, floor, chip)},
    )


class Planner:
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

    def case(self, setting: Setting) -> PlannedCase:
        key = (setting.batch, setting.context)
        if key not in self._greedy:
            self._greedy[key] = self._compiled(GREEDY, setting)
        greedy, block = self._greedy[key], self._compiled(BLOCK, setting)
        programs = {} if isinstance(greedy, TooLarge) else self._of_greedy(greedy, setting)
        programs |= {} if isinstance(block, TooLarge) else self._of_block(block, setting)
        refused = [p.message for p in (greedy, block) if isinstance(p, TooLarge)]
        made = [p for p in (greedy, block) if isinstance(p, Compiled)]
        # Both loops' networks and caches are there together; of temporaries one program's at a time.
        chip = self.networks.topology.chip
        case = PlannedCase(
            **dataclasses.asdict(setting),
            fits=not refused and max(p.hbm_bytes for p in made) <= chip.hbm_bytes,
            refused=refused,
            bytes={**self._bytes(setting), "temporaries": max((p.temporary_bytes for p in made), default=None)},
            programs=programs,
        )
        return case.with_gains(chip)

    def _bytes(self, setting: Setting) -> dict[str, float]:
        n = self.networks
        assert n.draft is not None
        return held_bytes(n.target, n.draft, decode_shape(BLOCK, **dataclasses.asdict(setting)))

    def _of_greedy(self, greedy: Compiled, setting: Setting) -> dict[str, PlannedProgram]:
        n, chip = self.networks, self.networks.topology.chip
        floor = target_floor(n.target, batch=setting.batch, tokens=1, context=setting.context)
        return {"step": _program(greedy.step, floor, chip, greedy.before_loop)}

    def _of_block(self, block: Compiled, setting: Setting) -> dict[str, PlannedProgram]:
        n, chip = self.networks, self.networks.topology.chip
        assert n.draft is not None
        sizes = {"batch": setting.batch, "tokens": setting.block_size, "context": setting.context}
        step = block.step
        parts = {"verify": step.within("verify"), "draft": step.outside("verify")}
        floors = {"verify": target_floor(n.target, **sizes), "draft": draft_floor(n.target, n.draft, **sizes)}
        return {name: _program(part, floors[name], chip, block.before_loop) for name, part in parts.items()}


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
