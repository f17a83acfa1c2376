"""What a mode says of itself, and that nothing else compares names of modes."""

import ast
from pathlib import Path

import dflash
from dflash.decoding.modes import BLOCK, GREEDY, MODES, RECOMPUTE, SEQUENTIAL, VERIFYING

NAMES = {"greedy", "cached_block_verify", "cached_sequential_verify", "recompute"}
ROOT = Path(dflash.__file__).parents[1]


def test_every_mode_is_there_by_its_name():
    assert set(MODES) == NAMES == set(dflash.MODES)
    assert all(mode.name == name for name, mode in MODES.items())


def test_what_verifies_drafts_and_has_a_name_for_its_cases():
    assert set(VERIFYING) == {m for m in MODES.values() if m.drafts} == {BLOCK, SEQUENTIAL}
    assert sorted(mode.short for mode in VERIFYING) == ["block", "seq"]
    assert [mode for mode in MODES.values() if mode.whole] == [BLOCK]
    assert not any(mode.short or mode.verify for mode in (GREEDY, RECOMPUTE))


def test_nothing_else_compares_names_of_modes():
    """A comparison with a literal, or the literal in a dictionary, would have to be found when a mode is added."""
    places = []
    for path in [*(ROOT / "dflash").rglob("*.py"), *(ROOT / "bench").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            compared = [*node.comparators, node.left] if isinstance(node, ast.Compare) else []
            compared += node.keys if isinstance(node, ast.Dict) else []
            if any(isinstance(c, ast.Constant) and c.value in NAMES - {"greedy"} for c in compared):
                places.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert places == []
