"""Weights and caches that a program copies, converts or gathers, by the names that the traced function has for them."""

import pytest
from program_texts import LOOP

from dflash.compiled.hlo import parse
from dflash.compiled.movement import moves

WEIGHT = 1024 * 512 * 2
CACHE = 4 * 256 * 128 * 2


def test_a_copy_before_the_loop_a_convert_in_it_and_a_gather() -> None:
    found = {(m.kind, m.origin, m.in_loop): m.nbytes for m in moves(parse(LOOP))}
    assert found == {
        ("copy", "weights[0]['up'].value", False): 2 * WEIGHT,
        # Its origin goes through the copy, and through the loop's tuple.
        ("all-gather", "weights[0]['up'].value", True): 8 * WEIGHT,
        ("convert", "weights[0]['norm'].value", True): 512 * 2 + 512 * 4,
    }


def test_reading_ahead_and_computing_are_no_moves() -> None:
    instructions = {m.instruction.name for m in moves(parse(LOOP))}
    assert instructions.isdisjoint({"ahead", "many", "one", "all", "embedded"})


@pytest.mark.parametrize("in_loop", [True, False])
def test_a_cache_that_is_laid_out_anew_is_seen_though_the_loop_changes_it(in_loop: bool) -> None:
    copy = "bf16[1,4,256,128]{2,3,1,0:T(8,128)(2,1)} copy"
    if in_loop:
        text = LOOP.replace("  ROOT %next", f"  %again = {copy}(%kept)\n  ROOT %next")
    else:
        text = LOOP.replace("  ROOT %k.2", "  %k.2").replace(
            "(%loop), index=3\n", f"(%loop), index=3\n  ROOT %again = {copy}(%k.2)\n"
        )
    (found,) = [m for m in moves(parse(text)) if m.origin == "state.cache.keys[0]"]
    assert (found.kind, found.in_loop, found.nbytes) == ("copy", in_loop, 2 * CACHE)


def test_a_fusion_that_only_moves_is_a_move() -> None:
    fusion = """
%turn (f.0: bf16[1024,512]) -> bf16[512,1024] {
  %f.0 = bf16[1024,512]{0,1:T(8,128)(2,1)} parameter(0)
  ROOT %swapped = bf16[512,1024]{1,0:T(8,128)(2,1)} transpose(%f.0), dimensions={1,0}
}

ENTRY"""
    text = LOOP.replace("\nENTRY", fusion).replace("copy(%w.1)", "fusion(%w.1), kind=kLoop, calls=%turn")
    (found,) = [m for m in moves(parse(text)) if not m.in_loop]
    assert (found.kind, found.origin) == ("fusion", "weights[0]['up'].value")
    computed = text.replace("transpose(%f.0), dimensions={1,0}", "negate(%f.0)")
    assert not [m for m in moves(parse(computed)) if not m.in_loop]
