"""A plan's section of the report: its figures, its roofline, and a file that is no plan."""

import json

import pytest
import sample_runs
from matplotlib.axes import Axes

from dflash.measuring.result import ResultError, read_file
from dflash.report.page import write_report
from dflash.report.planned import planned_section

CHIP = {"flops_per_cycle": 1000.0, "bytes_per_cycle": 100.0, "clock_hz": 1e9}


def program(cycles):
    floor = {"hbm_bytes": 1e9, "flops": 4e9}
    return {"cycles": cycles, "floor_cycles": 1e7, "floor": floor}


def written(tmp_path, **changes):
    case = {"batch": 1, "context": 1280, "block_size": 8, "fits": False, "programs": {"step": program(1.5e7)}}
    plan = {"target": "t", "topology": "v6e:2x4", "tp": 8, "dp": 1, "estimate": "nothing was run"}
    plan |= {"hbm_bytes": 2.0**34, "chip": CHIP, "cases": [case]}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan | changes), encoding="utf-8")
    return path


def test_a_program_stands_beside_its_floor(tmp_path):
    section = planned_section(written(tmp_path))
    assert section.tables[0].rows == [["batch 1, context 1280, block 8", "step", "15.00", "10.00", "1.50"]]
    assert "v6e:2x4" in section.sentences[0]
    assert "does not fit 16.00 GiB" in section.sentences[1]
    assert [plot.title for plot in section.plots] == ["Roofline"]


def test_every_case_is_a_point_of_its_programs(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Axes, "plot", lambda _, x, y, **style: drawn.append((style["label"], len(x))))
    sizes = [{"batch": n, "context": c, "block_size": 8} for n in (1, 8) for c in (1024, 8192)]
    programs = {"step": program(1.5e7), "verify": program(1.6e7)}
    planned_section(written(tmp_path, cases=[s | {"fits": True, "programs": programs} for s in sizes]))
    assert drawn == [("step", 4), ("verify", 4), ("what the chip can do", 3)]


@pytest.mark.parametrize("changes", [{"cases": [{}]}, {"cases": 3}, {"chip": None}])
def test_what_is_no_plan_is_one_sentence(changes, tmp_path):
    with pytest.raises(ResultError, match=r"plan\.json is none.*--json FILE"):
        planned_section(written(tmp_path, **changes))


def test_it_is_on_the_page_of_a_run(tmp_path):
    run = tmp_path / "run.json"
    run.write_text(json.dumps(sample_runs.file_of([sample_runs.step()])))
    page = write_report(tmp_path / "out", read_file(run), plan=written(tmp_path, target="<b>"))
    text = page.read_text(encoding="utf-8")
    assert "What a TPU would take, estimated" in text
    assert "Roofline" in text
    assert "<b>" not in text
    assert "What a TPU would take" in page.with_suffix(".md").read_text(encoding="utf-8")
