"""Bytes that an instruction of a compiled program moves between HBM and the chip's own memories.

Operands and results that lie in HBM count, with the padding of their tiles; of an operand that is sliced or gathered
only what is taken, and of a buffer that is updated in place only the update. What a collective moves is not counted
here.
"""

from dflash.compiled.hlo import Computation, Instruction, Module, Shape

# What reads and writes nothing of its own: names for data, and notes to the compiler.
_NAMES = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier", "domain"}
_NOTES = {"after-all", "add-dependency", "partition-id", "replica-id", "async-update"}
# What is counted elsewhere: by what it calls.
_CALLS = {"while", "conditional", "call"}
# Custom calls that give data a name. The others are kernels.
_FREE_CALLS = {"ConcatBitcast", "AssumeGatherIndicesInBound", "AllocateBuffer", "Sharding"}
# An element of these is made of one element of their operand: what takes a part of the result reads that part.
_ELEMENTWISE = {"convert", "copy", "transpose", "reshape", "bitcast", "bitcast-convert", "negate"}
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter", "collective-broadcast")


def collective_kind(instruction: Instruction) -> str | None:
    """Which collective an instruction is or starts; None for all others, and for what waits for one."""
    opcode = instruction.opcode.removesuffix("-start")
    opcode = "all-to-all" if opcode == "ragged-all-to-all" else opcode
    return opcode if opcode in COLLECTIVES else None


def is_kernel(instruction: Instruction) -> bool:
    """Whether it is a kernel that the compiler has no estimate for (Pallas, and other custom calls)."""
    return instruction.opcode == "custom-call" and instruction.attribute("custom_call_target") not in {
        f'"{name}"' for name in _FREE_CALLS
    }


def _share(module: Module, computation: Computation, name: str, of_result: float = 1.0) -> float:
    """The share of an instruction's elements that its users in a fusion read, 0 to 1.

    `of_result` is the share of the fusion's own result that is wanted: less than all of it in a fusion within another.
    """
    instruction = computation.by_name[name]
    if instruction.is_root:
        return of_result
    total = 0.0
    for user, place in computation.users[name]:
        if user.opcode in ("slice", "dynamic-slice", "gather") and place == 0:
            # A slice of a slice: what is taken of the first is what the second takes.
            taken = user.shapes[0].elements / max(1, instruction.shapes[0].elements)
            total += taken * _share(module, computation, user.name, of_result)
        elif user.opcode in ("dynamic-update-slice", "scatter") and place == 0:
            continue  # written in place: what it holds elsewhere stays
        elif user.opcode == "fusion":
            (inner,) = module.called(user)
            wanted = _share(module, computation, user.name, of_result)
            total += _share(module, inner, inner.parameters[place].name, wanted)
        elif user.opcode in _ELEMENTWISE:
            total += _share(module, computation, user.name, of_result)
        else:
            return 1.0
    return min(1.0, total)


def _update(module: Module, computation: Computation, instruction: Instruction) -> Instruction | None:
    """What a fusion's result writes into a buffer in place; None where it writes the whole result."""
    if instruction.opcode in ("dynamic-update-slice", "scatter"):
        return computation.by_name[instruction.operands[1 if instruction.opcode == "dynamic-update-slice" else -1]]
    if instruction.opcode == "bitcast":
        return _update(module, computation, computation.by_name[instruction.operands[0]])
    if instruction.opcode == "fusion":
        (inner,) = module.called(instruction)
        return _update(module, inner, inner.root)
    return None


def updated_operand(module: Module, computation: Computation, instruction: Instruction) -> int | None:
    """The place of the operand that an instruction updates in place; None for one that makes something new."""
    if instruction.opcode in ("dynamic-update-slice", "scatter"):
        return 0
    if instruction.opcode != "fusion" or _update(module, computation, instruction) is None:
        return None
    same = [
        place
        for place, operand in enumerate(instruction.operands)
        if computation.by_name[operand].shapes[0].sizes == instruction.shapes[0].sizes
    ]
    return same[0] if same else None


def _written(module: Module, fusion: Instruction) -> float:
    """Bytes that a fusion writes to HBM."""
    (inner,) = module.called(fusion)
    parts = [inner.by_name[o] for o in inner.root.operands] if inner.root.opcode == "tuple" else [inner.root]
    total = 0.0
    for shape, part in zip(fusion.shapes, parts, strict=False):
        update = _update(module, inner, part)
        total += shape.hbm_bytes if update is None else _within(shape, update)
    return total


def _within(buffer: Shape, update: Instruction) -> float:
    """Bytes of an update to a buffer: none where the buffer lies elsewhere."""
    return update.shapes[0].nbytes if buffer.hbm_bytes else 0.0


def hbm_bytes(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Bytes that one instruction, loops and calls apart, reads from HBM and writes there."""
    opcode = instruction.opcode
    if opcode in _NAMES | _NOTES | _CALLS or collective_kind(instruction):
        return 0.0
    if opcode.endswith("-done") or (opcode == "custom-call" and not is_kernel(instruction)):
        return 0.0
    operands = [computation.by_name[o] for o in instruction.operands if o in computation.by_name]
    if opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
        # (source, destination, context) for a slice, (destination, source, context) for a copy.
        taken = instruction.shapes[0 if opcode == "copy-start" else 1]
        source = instruction.shapes[1 if opcode == "copy-start" else 0]
        return taken.hbm_bytes + (taken.nbytes if source.hbm_bytes else 0.0)
    if opcode == "async-start":
        return sum(hbm_bytes(module, c, c.root) for c in module.called(instruction))
    if opcode == "fusion":
        (inner,) = module.called(instruction)
        read = sum(
            operand.shapes[0].hbm_bytes * _share(module, inner, inner.parameters[place].name)
            for place, operand in enumerate(operands)
        )
        return read + _written(module, instruction)
    if opcode in ("slice", "dynamic-slice", "gather"):
        taken = instruction.shapes[0]
        return taken.hbm_bytes + (taken.nbytes if operands[0].shapes[0].hbm_bytes else 0.0)
    if opcode in ("dynamic-update-slice", "scatter"):
        update = operands[1] if opcode == "dynamic-update-slice" else operands[-1]
        return update.shapes[0].hbm_bytes + _within(instruction.shapes[0], update)
    return sum(s.hbm_bytes for o in operands for s in o.shapes[:1]) + sum(s.hbm_bytes for s in instruction.shapes)
