"""A plan's section of the report: its figures, and its roofline."""

import dataclasses
import json

import sample_plans
import sample_runs
from matplotlib.axes import Axes

from dflash.compiled.plan import write_plan
from dflash.compiled.topology import Chip
from dflash.measuring.result import read_file
from dflash.report.page import write_report
from dflash.report.planned import planned_section

CHIP = Chip(
    name="c", hbm_bytes=2.0**34, bytes_per_cycle=100.0, flops_per_cycle=1000.0, clock_hz=1e9, link_bytes_per_s=1e9
)


def program(cycles):
    return sample_plans.program(cycles, floor_cycles=1e7)


CASE = sample_plans.case(fits=False, step=program(1.5e7))


def written(tmp_path, target="t", cases=(CASE,)):
    write_plan(tmp_path / "plan.json", sample_plans.plan(*cases, chip=CHIP, target=target))
    return tmp_path / "plan.json"


def test_a_program_stands_beside_its_floor(tmp_path):
    section = planned_section(written(tmp_path))
    assert section.tables[0].rows == [["batch 1, context 1280, block 8", "step", "15.00", "10.00", "1.50"]]
    assert "v6e:2x4" in section.sentences[0]
    assert "does not fit 16.00 GiB" in section.sentences[1]
    assert [plot.title for plot in section.plots] == ["Roofline"]


def test_every_case_is_a_point_of_its_programs(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Axes, "plot", lambda _, x, y, **style: drawn.append((style["label"], len(x))))
    programs = {"step": program(1.5e7), "verify": program(1.6e7)}
    cases = [
        dataclasses.replace(CASE, batch=batch, context=context, programs=programs)
        for batch in (1, 8)
        for context in (1024, 8192)
    ]
    planned_section(written(tmp_path, cases=cases))
    assert drawn == [("step", 4), ("verify", 4), ("what the chip can do", 3)]


def test_it_is_on_the_page_of_a_run(tmp_path):
    run = tmp_path / "run.json"
    run.write_text(json.dumps(sample_runs.file_of([sample_runs.step()])))
    page = write_report(tmp_path / "out", read_file(run), plan=written(tmp_path, target="<b>"))
    text = page.read_text(encoding="utf-8")
    assert "What a TPU would take, estimated" in text
    assert "Roofline" in text
    assert "<b>" not in text
    assert "What a TPU would take" in page.with_suffix(".md").read_text(encoding="utf-8")
