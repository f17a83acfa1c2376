"""Which of a program's inputs are copied, converted, re-laid out or gathered from other devices.

A value that data movement alone made of an entry parameter (a weight, a cache) has that parameter as its origin.
"""

import dataclasses
from collections.abc import Iterator

from dflash.compiled.estimate import collective_bytes
from dflash.compiled.hlo import Computation, Instruction, Module
from dflash.compiled.traffic import collective_kind, hbm_bytes, updated_operand

# What gives its operand another name or place, and waits for none.
_NAMES = {"bitcast", "opt-barrier", "copy-start", "slice-start", "add-dependency"}
# What makes a new array of old values, in another order, type or shape.
_MAKES = {"copy", "convert", "transpose", "reshape", "bitcast-convert", "pad", "concatenate"}
# What a fusion may hold that only moves.
_MOVES = _MAKES | {"bitcast", "slice", "dynamic-slice", "reverse", "broadcast"}
_MOVES |= {"parameter", "constant", "tuple", "get-tuple-element"}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """`instruction` makes a new array in HBM (or on other devices: `kind` names the collective) of an input.

    `origin` is the input's path, as the traced function calls it; `nbytes` what is read and written, or received.
    """

    kind: str
    origin: str
    instruction: Instruction
    in_loop: bool
    nbytes: float


# Of a value: its origins, one a place of a tuple; None where it was computed.
_Origins = tuple[str | None, ...]


def moves(module: Module) -> list[Move]:
    """Every move of an input that the program makes, before its loop and in it."""
    arguments: dict[int, _Origins] = {n: (p.op_name or p.name,) for n, p in module.entry.parameters.items()}
    return list(_moves(module, module.entry, arguments, in_loop=False))


def _moves(module: Module, computation: Computation, arguments: dict[int, _Origins], in_loop: bool) -> Iterator[Move]:
    known: dict[str, _Origins] = {}
    for instruction in computation.instructions:
        given = [known.get(o, (None,)) for o in instruction.operands]
        known[instruction.name] = _origins(module, computation, instruction, given, arguments)
        kind = collective_kind(instruction)
        if kind:
            for origin in {o for origins in given for o in origins if o}:
                yield Move(
                    kind=kind,
                    origin=origin,
                    instruction=instruction,
                    in_loop=in_loop,
                    nbytes=collective_bytes(instruction),
                )
        elif instruction.opcode == "while":
            # A loop carries one tuple; what it changes in place is still called what came in.
            body = module.computations[instruction.attribute("body") or ""]
            yield from _moves(module, body, {0: given[0]}, in_loop=True)
        elif instruction.opcode in ("call", "conditional"):
            for place, inner in enumerate(module.called(instruction)):
                # A conditional's first operand chooses; each branch has an operand of its own behind it.
                passed = given if instruction.opcode == "call" else given[place + 1 : place + 2]
                yield from _moves(module, inner, dict(enumerate(passed)), in_loop)
        elif _is_move(module, instruction) and any(s.hbm_bytes for s in instruction.shapes):
            for origin in {o for origins in given for o in origins if o}:
                yield Move(
                    kind=instruction.opcode,
                    origin=origin,
                    instruction=instruction,
                    in_loop=in_loop,
                    nbytes=hbm_bytes(module, computation, instruction),
                )


def _is_move(module: Module, instruction: Instruction) -> bool:
    if instruction.opcode == "fusion":
        return all(i.opcode == "fusion" or i.opcode in _MOVES for i in module.inside(instruction))
    return instruction.opcode in _MAKES


def _origins(
    module: Module,
    computation: Computation,
    instruction: Instruction,
    given: list[_Origins],
    arguments: dict[int, _Origins],
) -> _Origins:
    opcode = instruction.opcode
    if opcode == "parameter":
        return arguments.get(int(instruction.operands[0]), (None,))
    if opcode == "tuple":
        return tuple(origins[0] if len(origins) == 1 else None for origins in given)
    if opcode == "get-tuple-element":
        place = int(instruction.attribute("index") or 0)
        return given[0][place : place + 1] if place < len(given[0]) else (None,)
    if opcode == "while":
        return given[0]
    updated = updated_operand(module, computation, instruction)
    if updated is not None:
        return given[updated][:1]
    if opcode in _NAMES or collective_kind(instruction) or opcode.endswith("-done"):
        return given[0][:1] if given else (None,)
    if opcode == "custom-call" or _is_move(module, instruction):
        # Several parts of one input make that input again.
        merged = {o for origins in given for o in origins}
        return (merged.pop(),) if len(merged) == 1 else (None,)
    return (None,)
