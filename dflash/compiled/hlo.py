"""The text of a compiled program (optimised HLO, as `Compiled.as_text()` prints it), parsed as far as it is read here.

Pure Python: no jax. A layout's `S(n)` is a memory space: none is HBM, 1 is VMEM, the others are smaller still.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """One array: element type, sizes, and the layout that says in which memory it lies and how it is tiled."""

    dtype: str
    sizes: tuple[int, ...]
    layout: str = ""

    @property
    def elements(self) -> int:
        return math.prod(self.sizes)

    @property
    def bits(self) -> int:
        """Bits of an element; 0 for tokens and other things that hold no data."""
        if self.dtype == "pred":
            return 8
        match = re.search(r"\d+", self.dtype)
        return int(match[0]) if match and self.dtype != "token" else 0

    @property
    def nbytes(self) -> float:
        """Bytes without the padding of tiles."""
        return self.elements * self.bits / 8

    @property
    def hbm_bytes(self) -> float:
        """Bytes in HBM, with the padding that its tiles bring; 0 for what lies elsewhere."""
        if re.search(r"S\(\d+\)", self.layout):
            return 0.0
        order, _, tiles = self.layout.partition(":")
        minor_to_major = [int(i) for i in order.split(",") if i.strip()]
        tile = re.match(r"T\(([\d,]+)\)", tiles)
        if not tile or not minor_to_major:
            return self.nbytes
        padded = list(self.sizes)
        for axis, size in zip(minor_to_major, reversed([int(t) for t in tile[1].split(",")]), strict=False):
            padded[axis] = -(-padded[axis] // size) * size
        return math.prod(padded) * self.bits / 8


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
    """`name = shapes opcode(operands), attributes`. A tuple's arrays are listed flat in `shapes`."""

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool = False

    def attribute(self, name: str) -> str | None:
        """What stands behind `name=`, up to the next comma or space; None where it is not there."""
        match = re.search(rf"\b{name}=%?([^,\s]+)", self.attributes)
        return match[1] if match else None

    @property
    def called(self) -> list[str]:
        """Names of the computations that this calls: a fusion's, a loop's body, a conditional's branches."""
        several = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        names = [n.strip() for n in several[1].split(",")] if several else []
        for key in ("calls", "to_apply", "body", "true_computation", "false_computation"):
            names += [n] if (n := self.attribute(key)) else []
        return [n.removeprefix("%") for n in names]

    @property
    def op_name(self) -> str:
        """Where in the traced function it comes from, scopes with slashes between; for a parameter, its path."""
        match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return match[1].replace("\\'", "'") if match else ""

    @property
    def backend(self) -> dict[str, Any]:
        """The compiler's own notes (`backend_config`); empty where there are none."""
        start = self.attributes.find("backend_config={")
        if start < 0:
            return {}
        config, _ = json.JSONDecoder().raw_decode(self.attributes[start + len("backend_config=") :])
        return config

    @property
    def estimated_cycles(self) -> int | None:
        """The compiler's own estimate; None where it has none, which it may also say with 2^63 - 1."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(match[1]) if match and int(match[1]) < 2**62 else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in the order in which they run."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {i.name: i for i in self.instructions}

    @functools.cached_property
    def root(self) -> Instruction:
        return next(i for i in self.instructions if i.is_root)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Parameters by number."""
        return {int(i.operands[0]): i for i in self.instructions if i.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """Who uses an instruction, and as which operand."""
        uses: dict[str, list[tuple[Instruction, int]]] = {i.name: [] for i in self.instructions}
        for instruction in self.instructions:
            for place, operand in enumerate(instruction.operands):
                if operand in uses and instruction.opcode != "parameter":
                    uses[operand].append((instruction, place))
        return uses


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program. `aliased`: the place of an output, and the entry parameter whose buffer it takes."""

    computations: dict[str, Computation]
    entry: Computation
    aliased: dict[int, int]

    def called(self, instruction: Instruction) -> list[Computation]:
        return [self.computations[name] for name in instruction.called]

    def inside(self, instruction: Instruction) -> Iterator[Instruction]:
        """Every instruction of the computations that this one calls, however deep."""
        for computation in self.called(instruction):
            for inner in computation.instructions:
                yield inner
                yield from self.inside(inner)


_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_START = re.compile(r"\s*(ROOT )?%?([^\s=]+) = ")
_ALIAS = re.compile(r"\{(\d*)[\d, ]*\}: \((\d+),")


def _closing(text: str, start: int) -> int:
    """The place of the bracket that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise ValueError(f"a bracket is never closed: {text[start : start + 80]!r}")


def _instruction(line: str) -> Instruction | None:
    start = _START.match(line)
    if not start:
        return None
    at = start.end()
    end = _closing(line, at) + 1 if line[at] == "(" else line.index(" ", at)
    shapes = tuple(
        Shape(dtype, tuple(int(s) for s in sizes.split(",") if s), layout)
        for dtype, sizes, layout in _SHAPE.findall(line[at:end])
    )
    opening = line.index("(", end)
    closing = _closing(line, opening)
    inner = re.sub(r"/\*.*?\*/", "", line[opening + 1 : closing])
    # An operand is a name, behind its shape in some versions; constants hold values, and have no operands.
    opcode = line[end:opening].strip()
    names = re.findall(r"%([^\s,()]+)", inner) if opcode not in ("parameter", "constant") else [inner.strip()]
    return Instruction(start[2], shapes, opcode, tuple(names), line[closing + 1 :], start[1] is not None)


def parse(text: str) -> Module:
    """The program of `Compiled.as_text()`. Raises ValueError where that is no optimised HLO."""
    computations: dict[str, Computation] = {}
    entry = None
    header = text[: text.find("\n")]
    name: str | None = None
    lines: list[Instruction] = []
    for line in text.splitlines():
        if name is None:
            opening = re.match(r"(ENTRY )?%?([^\s(]+) \(.*\{$", line)
            if opening:
                name, lines = opening[2], []
                entry = name if opening[1] else entry
        elif line == "}":
            computations[name] = Computation(name, tuple(lines))
            name = None
        else:
            instruction = _instruction(line)
            lines += [instruction] if instruction else []
    if entry is None:
        raise ValueError(f"this is no compiled program's text: it has no ENTRY computation; it begins {text[:80]!r}")
    start = header.find("input_output_alias={")
    pairs = _ALIAS.findall(header[start : header.find("entry_computation_layout", start)]) if start >= 0 else []
    return Module(computations, computations[entry], {int(out or 0): int(parameter) for out, parameter in pairs})
