"""What a plan estimates for a TPU, as a section of the report: a table, and a roofline."""

from pathlib import Path

from dflash.compiled.plan import PlannedProgram, read_plan
from dflash.compiled.topology import Chip
from dflash.report.plot import INK, Plot, colour, finished, new_figure, style
from dflash.report.sections import Section, Table, number


def planned_section(path: Path) -> Section:
    """The section of a plan's JSON file. Raises ResultError for a file that is none."""
    plan = read_plan(path)
    section = Section(key="plan", title="What a TPU would take, estimated")
    section.sentences.append(f"{plan.target} on {plan.topology}, tp {plan.tp}, dp {plan.dp}: {plan.estimate}.")
    rows: list[list[str]] = []
    points: dict[str, list[PlannedProgram]] = {}
    for case in plan.cases:
        where = f"batch {case.batch}, context {case.context}, block {case.block_size}"
        for name, program in case.programs.items():
            cycles, floor = program.cycles / 1e6, program.floor_cycles / 1e6
            rows.append([where, name, number(cycles), number(floor), number(cycles / floor)])
            points.setdefault(name, []).append(program)
        if not case.fits:
            section.sentences.append(f"{where}: does not fit {plan.hbm_bytes / 2**30:.2f} GiB.")
    header = ["case", "program", "M cycles", "floor", "/ floor"]
    section.tables.append(Table(header=header, rows=rows))
    if points:
        with style():
            section.plots = [_roofline(plan.chip, points)]
    return section


def _roofline(chip: Chip, programs: dict[str, list[PlannedProgram]]) -> Plot:
    """Each program of every case by the products that it must make for each byte that it must read, and the peak."""
    peak, bandwidth = chip.flops_per_cycle * chip.clock_hz, chip.bytes_per_cycle * chip.clock_hz
    figure, axes = new_figure("operations for each byte read", "TFLOP/s of one device")
    ridge, seen = peak / bandwidth, []
    for i, (name, cases) in enumerate(programs.items()):
        flops = [program.floor.flops for program in cases]
        ratios = [program.floor.flops / program.floor.hbm_bytes for program in cases]
        reached = [n * chip.clock_hz / program.cycles / 1e12 for n, program in zip(flops, cases, strict=True)]
        axes.plot(ratios, reached, linestyle="", **colour(i), label=name)
        seen += ratios
    ends = [min(*seen, ridge) / 2, ridge, 4 * max(*seen, ridge)]
    axes.plot(ends, [min(x * bandwidth, peak) / 1e12 for x in ends], color=INK, label="what the chip can do")
    axes.set_xscale("log")
    axes.set_yscale("log")
    return finished(
        figure,
        axes,
        "Roofline",
        "What a step must compute over what it must read, and over its estimated time, collectives apart. Left of the "
        "bend memory sets the limit, right of it the matrix unit.",
    )
