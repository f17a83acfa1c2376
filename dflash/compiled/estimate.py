"""An estimate of what a compiled program costs: bytes, cycles on the matrix unit, collectives, copies of weights.

A step is the sum over its instructions of the larger of two: the HBM bytes over the chip's bandwidth, and the cycles of
the matrix unit where the compiler gives them for a product. Its figures for loops on the vector unit and for copies are
wrong by 3 to 4 times, so those count by their bytes. Collectives are listed apart.
"""

import dataclasses
from collections.abc import Iterator

from dflash.compiled.hlo import Computation, Instruction, Module
from dflash.compiled.traffic import collective_kind, hbm_bytes, is_kernel


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """One instruction, as often as a step runs it. `scope` is its `op_name`, or that of what uses its result."""

    instruction: Instruction
    scope: str
    count: float
    hbm_bytes: float
    matrix_cycles: float

    def cycles(self, bytes_per_cycle: float) -> float:
        return max(self.hbm_bytes / bytes_per_cycle, self.matrix_cycles)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A step, or what runs before the loop: sums over its instructions."""

    costs: tuple[Cost, ...]

    @property
    def hbm_bytes(self) -> float:
        return sum(c.hbm_bytes for c in self.costs)

    @property
    def matrix_cycles(self) -> float:
        return sum(c.matrix_cycles for c in self.costs)

    def cycles(self, bytes_per_cycle: float) -> float:
        """Cycles of all instructions but the collectives."""
        return sum(c.cycles(bytes_per_cycle) for c in self.costs)

    @property
    def unestimated(self) -> dict[str, tuple[int, float]]:
        """Kernels without an estimate, by name: how often they run, and the bytes that stand for them."""
        totals: dict[str, tuple[int, float]] = {}
        for cost in self.costs:
            if is_kernel(cost.instruction):
                name = (cost.instruction.attribute("custom_call_target") or "").strip('"')
                count, total = totals.get(name, (0, 0.0))
                totals[name] = (count + round(cost.count), total + cost.hbm_bytes)
        return totals

    @property
    def collectives(self) -> dict[str, tuple[int, float]]:
        """By kind: how many a step runs, and the bytes of their results on one device."""
        totals: dict[str, tuple[int, float]] = {}
        for cost in self.costs:
            kind = collective_kind(cost.instruction)
            if kind:
                count, total = totals.get(kind, (0, 0.0))
                totals[kind] = (count + round(cost.count), total + cost.count * collective_bytes(cost.instruction))
        return totals

    def within(self, *scopes: str) -> "Part":
        """What of it was traced under one of these named scopes."""
        return Part(costs=tuple(c for c in self.costs if set(scopes) & set(c.scope.split("/"))))

    def outside(self, *scopes: str) -> "Part":
        """All of it that was not."""
        return Part(costs=tuple(c for c in self.costs if not set(scopes) & set(c.scope.split("/"))))


def collective_bytes(instruction: Instruction) -> float:
    """Bytes of a collective's result on one device."""
    shapes = [s for s in instruction.shapes if s.sizes and "S(2)" not in s.layout] or list(instruction.shapes)
    if instruction.opcode in ("all-gather-start", "collective-permute-start"):
        shapes = shapes[len(shapes) // 2 :]  # the operands come first
    return sum(s.nbytes for s in shapes)


def _trips(instruction: Instruction, unknown: float) -> float:
    """How often a loop's body runs, as the compiler found out; else `unknown` times."""
    known = instruction.backend.get("known_trip_count")
    return float(known["n"]) if known else unknown


def _costs(module: Module, computation: Computation, count: float, inner_trips: float) -> Iterator[Cost]:
    for instruction in computation.instructions:
        if instruction.opcode == "while":
            body = module.computations[instruction.attribute("body") or ""]
            yield from _costs(module, body, count * _trips(instruction, inner_trips), inner_trips)
            continue
        if instruction.opcode == "call":
            for called in module.called(instruction):
                yield from _costs(module, called, count, inner_trips)
            continue
        if instruction.opcode == "conditional":
            branches = [list(_costs(module, c, count, inner_trips)) for c in module.called(instruction)]
            yield from max(branches, key=lambda costs: sum(c.hbm_bytes for c in costs))
            continue
        for hidden in _collectives_in(module, instruction):
            yield Cost(instruction=hidden, scope=hidden.op_name, count=count, hbm_bytes=0.0, matrix_cycles=0.0)
        yield Cost(
            instruction=instruction,
            scope=_scope(computation, instruction),
            count=count,
            hbm_bytes=count * hbm_bytes(module, computation, instruction),
            matrix_cycles=count * _matrix_cycles(module, instruction),
        )


def _scope(computation: Computation, instruction: Instruction) -> str:
    """Where an instruction was traced; what the compiler made by itself (a read ahead) belongs to what uses it."""
    waiting, seen = [instruction], {instruction.name}
    while waiting:
        here = waiting.pop(0)
        if here.op_name:
            return here.op_name
        users = [user for user, _ in computation.users[here.name] if user.name not in seen]
        seen |= {user.name for user in users}
        waiting += users
    return ""


def _collectives_in(module: Module, instruction: Instruction) -> list[Instruction]:
    """Collectives that a fusion or an asynchronous call holds."""
    if instruction.opcode not in ("fusion", "async-start"):
        return []
    return [i for i in module.inside(instruction) if collective_kind(i)]


def _matrix_cycles(module: Module, instruction: Instruction) -> float:
    """The compiler's cycles of a product on the matrix unit; 0 for all else."""
    is_product = instruction.opcode == "convolution" or (
        instruction.opcode == "fusion" and any(i.opcode == "convolution" for i in module.inside(instruction))
    )
    return float(instruction.estimated_cycles or 0) if is_product else 0.0


def _main_loop(module: Module) -> Instruction | None:
    """The loop that the program is: of the entry's loops the one that carries most; None for a program without one."""
    loops = [i for i in module.entry.instructions if i.opcode == "while" and not i.backend.get("known_trip_count")]
    return max(loops, key=lambda i: sum(s.nbytes for s in i.shapes), default=None)


def step(module: Module, inner_trips: float = 1.0) -> Part:
    """What one pass through the program's loop costs; the whole program without a loop.

    A loop in it whose length the compiler does not know counts `inner_trips` times.
    """
    loop = _main_loop(module)
    body = module.entry if loop is None else module.computations[loop.attribute("body") or ""]
    return Part(costs=tuple(_costs(module, body, 1.0, inner_trips)))


def whole(module: Module, inner_trips: float = 1.0) -> Part:
    """All that a program runs; loops whose length the compiler does not know count `inner_trips` times."""
    return Part(costs=tuple(_costs(module, module.entry, 1.0, inner_trips)))


def before_loop(module: Module) -> Part:
    """What runs once per call, around the loop; nothing for a program without one."""
    loop = _main_loop(module)
    if loop is None:
        return Part(costs=())
    others = tuple(i for i in module.entry.instructions if i is not loop)
    return Part(costs=tuple(_costs(module, dataclasses.replace(module.entry, instructions=others), 1.0, 1.0)))
