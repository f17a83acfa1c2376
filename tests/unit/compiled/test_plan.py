"""The cost model of a plan, and its file."""

import dataclasses
import json
from pathlib import Path

import pytest
from sample_plans import CHIP, case, plan, program

from dflash.compiled.plan import (
    COLLECTIVE_S,
    Gains,
    PlanFile,
    PlannedCase,
    TriedMeshes,
    best_block_sizes,
    read_plan,
    write_plan,
)
from dflash.measuring.result import ResultError


def _case(size: int, **cycles: float) -> PlannedCase:
    programs = {name: program(each) for name, each in cycles.items()}
    return case(size, **programs).with_gains(CHIP)


def _gains(case: PlannedCase) -> Gains:
    assert case.gains is not None
    return case.gains


def test_a_steps_time_is_its_cycles_and_its_collectives() -> None:
    exchanging = program(CHIP.clock_hz, reduce=(5, 10 * CHIP.link_bytes_per_s))
    assert exchanging.seconds(CHIP) == pytest.approx(1 + 5 * COLLECTIVE_S + 10)


def test_gains_follow_the_cost_model() -> None:
    gains = _gains(_case(4, step=1e6, verify=1.25e6, draft=0.25e6))
    assert gains.break_even_acceptance_length == pytest.approx(1.5)
    assert gains.acceptance_length[0.5] == pytest.approx(1 + 0.5 + 0.25 + 0.125)
    assert gains.speedup_x[0.5] == pytest.approx(1.875 / 1.5)


def test_a_case_that_lacks_a_program_has_no_gains() -> None:
    assert _case(4, step=1e6).gains is None


def test_the_best_block_size_grows_with_what_is_accepted_and_is_greedy_where_nothing_pays() -> None:
    cases = [_case(4, step=1e6, verify=1.5e6, draft=0.4e6), _case(16, step=1e6, verify=3e6, draft=0.5e6)]
    best = best_block_sizes(cases)
    assert (best[0.5], best[0.7], best[0.9]) == (1, 4, 16)


def _plan(**changes: object) -> PlanFile:
    made = _case(4, step=1e6, verify=1.5e6, draft=0.4e6)
    refused = dataclasses.replace(made, fits=False, refused=["too large"], programs={}, gains=None)
    return plan(made, refused, **changes)


@pytest.mark.parametrize("auto", [None, TriedMeshes(fewest=1, fastest=8, step_ms={1: 9.0, 8: 2.0}, tried=[1, 3, 8])])
def test_a_plan_is_read_as_it_was_written(auto: TriedMeshes | None, tmp_path: Path) -> None:
    write_plan(tmp_path / "plan.json", _plan(auto=auto))
    assert read_plan(tmp_path / "plan.json") == _plan(auto=auto)


def test_the_file_has_the_documented_keys(tmp_path: Path) -> None:
    write_plan(tmp_path / "plan.json", _plan())
    raw = json.loads((tmp_path / "plan.json").read_text())
    assert {"estimate", "topology", "tp", "dp", "hbm_bytes", "cases"} <= raw.keys()
    first = raw["cases"][0]
    assert {"batch", "context", "block_size", "fits", "bytes", "programs"} <= first.keys()
    assert first["gains"]["speedup_x"].keys() == {"0.5", "0.6", "0.7", "0.8", "0.9"}
    step = first["programs"]["step"]
    assert {"cycles", "floor_cycles", "hbm_bytes", "unestimated", "before_loop_bytes", "collectives"} <= step.keys()
    assert step["unestimated"] == {"topk": [2, 1e6]}


@pytest.mark.parametrize(
    "changes",
    [{"cases": [{}]}, {"chip": None}, {"tp": "8"}, {"hbm_bytes": True}, {"target": 3}],
    ids=lambda changes: next(iter(changes)),
)
def test_what_is_no_plan_is_one_sentence(changes: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_plan(path, _plan())
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ResultError, match=r"plan\.json is none.*--json FILE") as raised:
        read_plan(path)
    assert next(iter(changes)) in str(raised.value)


@pytest.mark.parametrize("value", [0, -1.5])
@pytest.mark.parametrize(
    "keys",
    [
        ("chip", "clock_hz"),
        ("cases", 0, "programs", "step", "cycles"),
        ("cases", 0, "programs", "draft", "floor", "flops"),
    ],
    ids=lambda keys: keys[-1],
)
def test_figures_are_above_zero(keys: tuple[str | int, ...], value: float, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_plan(path, _plan())
    raw = part = json.loads(path.read_text())
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    path.write_text(json.dumps(raw))
    with pytest.raises(ResultError) as raised:
        read_plan(path)
    assert f"{'.'.join(map(str, keys))} must be above 0, got {float(value)}" in str(raised.value)
