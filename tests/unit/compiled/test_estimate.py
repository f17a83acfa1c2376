"""A step's cost: the larger of bytes and matrix cycles per instruction, collectives and kernels apart."""

import pytest
from program_texts import COUNTED, LOOP

from dflash.compiled.estimate import before_loop, step
from dflash.compiled.hlo import Module, parse

WEIGHT = 1024 * 512 * 2
SMALL = 512 * 2 + 4 * 128 * 2 + (512 * 2 + 512 * 4)  # a row, a slot, a norm's weight converted


@pytest.fixture(scope="module")
def module() -> Module:
    return parse(LOOP)


def test_a_step_is_the_loops_body(module: Module) -> None:
    part = step(module)
    assert part.hbm_bytes == 3 * WEIGHT + SMALL + 8 * WEIGHT
    assert part.matrix_cycles == 5000  # a loop on the vector unit has cycles too, and they are not believed


def test_each_instruction_takes_the_longer_of_its_bytes_and_its_product(module: Module) -> None:
    fast_memory = WEIGHT / 1000  # the product's 5000 cycles then outweigh its bytes' 1000
    part = step(module)
    assert part.cycles(fast_memory) == pytest.approx(5000 + (part.hbm_bytes - WEIGHT) / fast_memory)
    slow_memory = WEIGHT / 10000
    assert part.cycles(slow_memory) == pytest.approx(part.hbm_bytes / slow_memory)


def test_what_runs_before_the_loop_is_counted_apart(module: Module) -> None:
    assert before_loop(module).hbm_bytes == 2 * WEIGHT


def test_collectives_by_kind_with_the_bytes_of_their_results(module: Module) -> None:
    assert step(module).collectives == {"all-reduce": (1, 1024 * 2), "all-gather": (1, 8 * WEIGHT)}


def test_kernels_are_listed_by_their_bytes(module: Module) -> None:
    assert step(module).unestimated == {"tpu_custom_call": (1, 8 * WEIGHT)}


def test_a_part_of_a_step_by_named_scope(module: Module) -> None:
    assert step(module).within("propose").hbm_bytes == WEIGHT
    assert step(module).within("verify").matrix_cycles == 5000
    assert step(module).within("verify").collectives == {"all-reduce": (1, 1024 * 2)}


def test_a_scope_and_what_is_outside_of_it_are_the_whole_step(module: Module) -> None:
    part = step(module)
    assert part.within("verify").hbm_bytes + part.outside("verify").hbm_bytes == part.hbm_bytes


def test_what_the_compiler_adds_belongs_to_what_uses_it(module: Module) -> None:
    """The weight that is read ahead has no name of its own."""
    (ahead,) = [c for c in step(module).costs if c.instruction.name == "thick"]
    assert ahead.scope == "jit(loop)/while/body/verify/dot"


def test_a_loop_of_known_length_counts_that_often_and_is_no_decode_loop() -> None:
    module = parse(COUNTED)
    assert step(module).hbm_bytes == 4 * 2 * 1024 * 4
    assert before_loop(module).costs == ()


def test_a_loop_of_unknown_length_within_a_step_counts_as_often_as_the_caller_says() -> None:
    body = "%body (t: (s32[]"
    inner = COUNTED[COUNTED.index("%inner") : COUNTED.index("ENTRY")]
    loop = COUNTED[COUNTED.index("  %s = ") : COUNTED.index(", backend_config")]
    loop = loop.replace("%x.1", "%ones").replace("%i.1", "%i")
    ones = "  %ones = f32[1024]{0:T(1024)S(1)} constant({...})\n"
    text = LOOP.replace(body, inner + body).replace("  ROOT %next", ones + loop + "\n  ROOT %next")
    once, often = (step(parse(text), inner_trips=n).hbm_bytes for n in (1, 5))
    assert often - once == 4 * 2 * 1024 * 4
