"""What changes between runs, and what baselines and comparisons make of it."""

import dataclasses
import json
import math

import pytest
import sample_runs
from scipy.special import stdtrit

from dflash.measuring import baselines
from dflash.measuring.repeat import again, between_runs, with_spread
from dflash.measuring.result import ResultError, read_file
from dflash.report.compare import compare


def test_the_spread_is_that_of_logarithms():
    runs = [2.0, 2.0 * math.exp(0.1), 2.0 * math.exp(-0.1)]
    assert between_runs(runs) == pytest.approx(0.1)
    case = sample_runs.case(speedup_x=runs[0])
    others = [{case.case: x} for x in runs[1:]] + [{"another": 9.0}]
    measured = with_spread(case, others)
    assert (measured.between_runs, measured.runs) == (pytest.approx(0.1), 3)
    assert with_spread(case, [{"another": 9.0}]) is case


def test_a_floor_leaves_room_for_what_changes_between_runs():
    case = sample_runs.case(between_runs=0.04, runs=5)
    held = baselines.baseline_of(case)["speedup_x"]
    margin = stdtrit(4, 0.975) * math.sqrt(2) * 0.04
    assert held["floor"] == pytest.approx(case.speedup_x * math.exp(-margin), abs=1e-4)
    assert (held["between_runs"], held["runs"]) == (0.04, 5)
    assert held["floor"] < baselines.baseline_of(sample_runs.case())["speedup_x"]["floor"]


def test_a_baseline_keeps_what_it_knows_when_it_is_written_anew(tmp_path):
    baselines.close_run([sample_runs.case(between_runs=0.04, runs=5)], tmp_path, update=True)
    baselines.close_run([sample_runs.case()], tmp_path, update=True)
    (held,) = baselines.read_baselines(tmp_path, "cpu").values()
    assert (held["speedup_x"]["between_runs"], held["speedup_x"]["runs"]) == (0.04, 5)
    known = baselines.with_held_spread(sample_runs.case(), {sample_runs.case().case: held})
    assert (known.between_runs, known.runs) == (0.04, 5)
    other = sample_runs.case(cpu_model="slide rule")
    assert baselines.with_held_spread(other, {other.case: held}) is other


@pytest.mark.parametrize("spread", [{"between_runs": 0.1}, {"between_runs": 0.1, "runs": 1}, {"runs": 3}])
def test_a_spread_of_no_runs_is_refused(tmp_path, spread):
    baselines.close_run([sample_runs.case()], tmp_path, update=True)
    path = tmp_path / "cpu.json"
    data = json.loads(path.read_text())
    next(iter(data["cases"].values()))["speedup_x"] |= spread
    path.write_text(json.dumps(data))
    with pytest.raises(baselines.BaselineError, match="at least 2 runs"):
        baselines.read_baselines(tmp_path, "cpu")


def test_a_change_within_what_changes_between_runs_is_none(tmp_path):
    def run(name, tilt, **more):
        benchmark = sample_runs.decode(tilt=tilt, spread=0.01)
        benchmark["extra_info"] |= more
        (tmp_path / name).write_text(json.dumps(sample_runs.file_of([benchmark])))
        return read_file(tmp_path / name)

    spread = {"between_runs": 0.05, "runs": 5}
    old, new = run("old.json", 1.0), run("new.json", 1.05)
    (plain,) = compare(old, new)
    (known,) = compare(run("known.json", 1.0, **spread), new)
    assert (plain.verdict, known.verdict) == ("faster", "no significant change")
    assert known.interval[0] < plain.interval[0]
    assert dataclasses.replace(known, verdict="", interval=None, p=None).ratio == plain.ratio


def test_a_run_that_gives_no_results_is_told():
    with pytest.raises(ResultError, match="run 2 said"):
        again(["--no-such-option"], [], [], 1)
