"""Compiled programs' text: shapes, layouts, operands and what an instruction calls."""

import pytest

from dflash.compiled.hlo import Shape, parse

TEXT = """\
HloModule jit_f, is_scheduled=true, input_output_alias={ {0}: (2, {}, may-alias), {1, 0}: (0, {}, must-alias) }, \
entry_computation_layout={(f32[2]{0})->f32[2]{0}}, num_partitions=8

%fused (p.0: bf16[8,128], p.1: bf16[128]) -> bf16[8] {
  %p.0 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = bf16[128]{0:T(256)(128)(2,1)S(1)} parameter(1)
  ROOT %dot = bf16[8]{0:T(256)(128)(2,1)S(1)} convolution(%p.0, %p.1), dim_labels=bf_io->bf
}

ENTRY %main.1 (w: bf16[8,128], x: bf16[128], c: s32[3]) -> (bf16[8], s32[3]) {
  %w = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="weights[0][\\'head\\'].value"}
  %x = bf16[128]{0:T(256)(128)(2,1)S(1)} parameter(1)
  %c = s32[3]{0:T(128)} parameter(2)
  %constant.1 = s32[2]{0:T(128)} constant({4, 5})
  %fusion = bf16[8]{0:T(256)(128)(2,1)S(1)} fusion(%w, /*index=1*/%x), kind=kOutput, calls=%fused, \
metadata={op_name="jit(f)/while/body/verify/dot" stack_frame_id=3}, \
backend_config={"window_config":{"estimated_cycles":"1234","note":"{"},"aliasing":{"lists":[]}}
  ROOT %out = (bf16[8]{0:T(256)(128)(2,1)S(1)}, s32[3]{0:T(128)}) tuple(%fusion, %c)
}
"""


def test_a_fusion_knows_its_operands_its_computation_and_the_compilers_notes() -> None:
    module = parse(TEXT)
    fusion = module.entry.by_name["fusion"]
    assert fusion.operands == ("w", "x")
    assert [c.name for c in module.called(fusion)] == ["fused"]
    assert fusion.estimated_cycles == 1234
    assert fusion.backend["aliasing"] == {"lists": []}
    assert fusion.op_name == "jit(f)/while/body/verify/dot"
    assert module.entry.by_name["w"].op_name == "weights[0]['head'].value"
    assert module.entry.root.name == "out"
    assert [s.dtype for s in module.entry.root.shapes] == ["bf16", "s32"]
    assert module.entry.users["x"] == [(fusion, 1)]
    assert module.entry.by_name["constant.1"].operands == ("{4, 5}",)


def test_aliased_outputs_are_named_by_their_parameter() -> None:
    assert parse(TEXT).aliased == {0: 2, 1: 0}


@pytest.mark.parametrize(
    ("shape", "plain", "in_hbm"),
    [
        (Shape("bf16", (8, 128), "1,0:T(8,128)(2,1)"), 2048, 2048),
        (Shape("bf16", (8, 128), "1,0:T(8,128)(2,1)S(1)"), 2048, 0),
        # The two axes that lie innermost are padded to a tile's.
        (Shape("f32", (3, 5, 100), "2,1,0:T(8,128)"), 6000, 3 * 8 * 128 * 4),
        (Shape("f32", (100, 5), "0,1:T(8,128)"), 2000, 8 * 128 * 4),
        (Shape("s4", (64, 128), "1,0:T(64,128)(8,1)"), 4096, 4096),
        (Shape("f8e5m2", (256,), "0:T(1024)(128)(4,1)"), 256, 1024),
        (Shape("pred", (), ""), 1, 1),
        (Shape("token", ()), 0, 0),
    ],
)
def test_bytes_of_a_shape(shape: Shape, plain: float, in_hbm: float) -> None:
    assert shape.nbytes == plain
    assert shape.hbm_bytes == in_hbm


def test_what_is_no_program_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("module @jit_f {\n}\n")


def test_an_estimate_of_the_largest_integer_is_none() -> None:
    text = TEXT.replace('"1234"', '"9223372036854775807"')
    assert parse(text).entry.by_name["fusion"].estimated_cycles is None
