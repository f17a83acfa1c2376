"""HBM bytes of an instruction: what lies in VMEM is free, and of what is sliced or updated only that part counts."""

import pytest
from program_texts import LOOP

from dflash.compiled.hlo import Module, parse
from dflash.compiled.traffic import hbm_bytes

WEIGHT = 1024 * 512 * 2


@pytest.fixture(scope="module")
def module() -> Module:
    return parse(LOOP)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("many", WEIGHT),  # columns and result are in VMEM
        ("one", WEIGHT),
        ("ahead", WEIGHT),  # read once, when it is started
        ("arrived", 0),
        ("embedded", 512 * 2),  # one row, sliced in a fusion within the fusion
        ("kept", 4 * 128 * 2),  # the new slot only
        ("norm", 512 * 2 + 512 * 4),
        ("thick", 0),  # no kernel
        ("kernel", 8192 * 512 * 2),  # the gathered weight; the columns are in VMEM
        ("all", 0),  # collectives are counted apart
        ("gathering", 0),
        ("gathered", 0),
        ("w", 0),
    ],
)
def test_bytes_of_an_instruction(module: Module, name: str, expected: float) -> None:
    body = module.computations["body"]
    assert hbm_bytes(module, body, body.by_name[name]) == expected


def test_what_is_sliced_of_a_copy_within_the_fusion_is_all_that_is_read(module: Module) -> None:
    """The compiler wraps a weight in a fusion of its own before it slices an expert out of it."""
    wrap = """
%wrap (x.0: bf16[2048,512]) -> bf16[2048,512] {
  %x.0 = bf16[2048,512]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %same = bf16[2048,512]{1,0:T(8,128)(2,1)} copy(%x.0)
}

%rows ("""
    wrapped = "%wrapped = bf16[2048,512]{1,0:T(8,128)(2,1)} fusion(%e.0), kind=kLoop, calls=%wrap\n  %taken"
    text = LOOP.replace("\n%rows (", wrap).replace("%taken", wrapped, 1).replace("slice(%e.0", "slice(%wrapped")
    body = parse(text).computations["body"]
    assert hbm_bytes(parse(text), body, body.by_name["embedded"]) == 512 * 2
    assert hbm_bytes(parse(text), body, body.by_name["one"]) == WEIGHT
