"""The plots of a run: speed-ups, costs, history. Each is drawn from measurements or left out."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from dflash.decoding.modes import BLOCK, MODES
from dflash.measuring.result import Decode, ResultFile, Step
from dflash.report.acceptance_figures import (
    accept_lengths,
    acceptance_by_category,
    acceptance_by_position,
    acceptance_by_slot,
)
from dflash.report.plot import INK, MUTED, SERIES, Plot, colour, finished, from_zero, new_figure, style


def _errors(cases: Sequence[Decode]) -> list[list[float]]:
    """Distances below and above each speed-up; a point without an interval has none."""
    triples = [(x, *(c.speedup_x_ci95 or (x, x))) for c, x in zip(cases, _speedups(cases), strict=True)]
    return [[max(0.0, x - low) for x, low, _ in triples], [max(0.0, high - x) for x, _, high in triples]]


def _speedups(cases: Sequence[Decode]) -> list[float]:
    return [c.speedup_x or math.nan for c in cases]


def _greedy_line(axes: Axes, *, across: bool) -> None:
    """Speed-up 1: as fast as greedy decoding."""
    (axes.axhline if across else axes.axvline)(1.0, color=INK, linewidth=0.9, linestyle=(0, (2, 2)))


def _measured(run: ResultFile) -> list[Decode]:
    """Cases whose speed-up counts: proven equal, or at least not shown to differ."""
    return [c for c in run.decodes if c.speedup_x is not None and c.lossless is not False]


def speedups(run: ResultFile) -> Plot | None:
    """Every case with its interval, and what its steps predict."""
    cases = _measured(run)[::-1]
    if not cases:
        return None
    figure, axes = new_figure("speed-up over greedy decoding", "", height=0.95 + 0.25 * len(cases))
    for name, series, wanted in (
        ("a draft's own proposals", SERIES[0], True),
        ("scripted proposals", SERIES[1], False),
    ):
        rows = [i for i, c in enumerate(cases) if c.is_own == wanted]
        chosen = [cases[i] for i in rows]
        if chosen:
            axes.errorbar(
                _speedups(chosen),
                rows,
                xerr=_errors(chosen),
                fmt="o" if wanted else "s",
                color=series,
                capsize=2.5,
                label=name,
            )
    predicted = [(i, c.predicted_speedup_x) for i, c in enumerate(cases) if c.predicted_speedup_x]
    if predicted:
        axes.plot(
            [x for _, x in predicted], [i for i, _ in predicted], "|", color=INK, markersize=11, label="cost model"
        )
    _greedy_line(axes, across=False)
    axes.set_yticks(range(len(cases)), [c.case for c in cases])
    axes.set_ylim(-0.6, len(cases) - 0.4)
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
    return finished(
        figure,
        axes,
        "Speed-up of every case",
        "With its 95% interval; the dashed line is greedy decoding. The bar is what the steps, timed alone, predict.",
    )


def _other_axes(case: Decode, key: str) -> tuple[str, ...]:
    """What a line of cases has in common when only `key` differs, in words; the proposer first."""
    # Scripts that accept the whole block are one line, though their names grow with it.
    whole = case.scripted is not None and case.scripted + 1 == case.block_size
    words = {
        "mode": MODES[case.mode].short if case.mode in MODES else case.mode,
        "block_size": f"{case.block_size} slots",
        "batch_size": f"batch {case.batch_size}",
        "max_new_tokens": f"{case.max_new_tokens} tokens",
        "prompts": f"{case.prompts}",
        "prompt_len": f"prompts of {case.prompt_len}",
        "draft": f"{case.draft}",
    }
    first = "all accepted" if whole else str(case.proposer or "draft")
    return (first, *(text for name, text in words.items() if name != key))


def _against(run: ResultFile, key: str, label: str) -> Plot | None:
    """Speed-up against one workload axis, a line for each case that is otherwise the same."""
    lines: dict[tuple[str, ...], list[Decode]] = {}
    for case in [c for c in _measured(run) if getattr(c, key) is not None]:
        lines.setdefault(_other_axes(case, key), []).append(case)
    lines = {
        k: sorted(v, key=lambda c: getattr(c, key)) for k, v in lines.items() if len({getattr(c, key) for c in v}) > 1
    }
    if not lines:
        return None
    figure, axes = new_figure(label, "speed-up")
    # A word shared by all lines says nothing.
    telling = [i for i, words in enumerate(zip(*lines, strict=True)) if i == 0 or len(set(words)) > 1]
    for i, (words, cases) in enumerate(lines.items()):
        x, y = [getattr(c, key) for c in cases], _speedups(cases)
        name = ", ".join(words[k] for k in telling)
        axes.errorbar(x, y, yerr=_errors(cases), **colour(i), capsize=2.5, label=name)
        predicted = [c.predicted_speedup_x for c in cases if c.predicted_speedup_x]
        if len(predicted) == len(cases):
            axes.plot(x, predicted, color=colour(i)["color"], linestyle=":", linewidth=1.2)
    _greedy_line(axes, across=True)
    from_zero(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    caption = "Points with 95% intervals are measured, the dotted line beside each is the cost model's."
    return finished(figure, axes, f"Speed-up against {label}", caption)


def advised_block_size(run: ResultFile) -> Plot | None:
    """The cost model's speed-up for every block size up to the measured one, and the measured speed-up."""
    advised = [(c, c.advice.by_block_size) for c in _measured(run) if c.is_own and c.advice]
    cases = [(c, rows) for c, rows in advised if len(rows) > 1 and c.block_size]
    if not cases:
        return None
    figure, axes = new_figure("block size", "speed-up")
    for i, (case, rows) in enumerate(cases[: len(SERIES)]):
        x, y = [r.block_size for r in rows], [r.predicted_speedup_x for r in rows]
        axes.plot(x, y, color=colour(i)["color"], linestyle=":", linewidth=1.4)
        measured = {**colour(i), "linestyle": "", "capsize": 2.5, "label": case.case}
        axes.errorbar([case.block_size or 0], _speedups([case]), yerr=_errors([case]), **measured)
    _greedy_line(axes, across=True)
    from_zero(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    caption = "Dotted, what the cost model predicts for every block size; with its interval, what was measured."
    return finished(figure, axes, "What each block size would give", caption)


def speedup_against_acceptance(run: ResultFile) -> Plot | None:
    """Measured points over the cost model's lines: the slope is one over the cost of a block."""
    shapes: dict[tuple[int, int], list[tuple[Decode, float, float]]] = {}
    for c in _measured(run):
        if c.mode == BLOCK.name and c.block_size and c.predicted_block_ratio and c.predicted_speedup_x:
            point = (c, c.predicted_block_ratio, c.predicted_speedup_x * c.predicted_block_ratio)
            shapes.setdefault((c.block_size, c.batch_size), []).append(point)
    if not shapes:
        return None
    figure, axes = new_figure("tokens emitted per block", "speed-up")
    for i, ((size, batch), points) in enumerate(sorted(shapes.items())):
        chosen = [c for c, _, _ in points]
        ratio = sum(ratio for _, ratio, _ in points) / len(points)
        axes.plot([0, size], [0, size / ratio], color=colour(i)["color"], linestyle=":", linewidth=1.2)
        x = [tokens for _, _, tokens in points]
        y = _speedups(chosen)
        name = f"{size} slots" + (f", batch {batch}" if len({k for _, k in shapes}) > 1 else "")
        axes.errorbar(x, y, yerr=_errors(chosen), **colour(i), linestyle="", capsize=2.5, label=name)
    _greedy_line(axes, across=True)
    axes.set_xlim(left=0)
    from_zero(axes)
    return finished(
        figure,
        axes,
        "Speed-up against tokens per block",
        "What acceptance buys on this device: measured points over the cost model's dotted lines. A block emits its "
        "acceptance length, less what stops and budgets cut. Where a line crosses the dashed one, DFlash breaks even.",
    )


def _terms(run: ResultFile, case: Decode) -> tuple[float, float] | None:
    """One-token steps that a case's draft and verify take, timed alone: its own, else the step benchmark's."""
    if case.draft_ratio and case.verify_ratio:
        return case.draft_ratio, case.verify_ratio
    size, batch = case.block_size, case.batch_size
    for step in run.of(Step):
        if size in step.draft_ms and size in step.verify_ms and step.batch_size == batch:
            return step.draft_ms[size] / step.step_ms, step.verify_ms[size] / step.step_ms
    return None


def _parts(run: ResultFile) -> list[tuple[str, tuple[float, float, float], float]]:
    """Of a draft's block cases: name, one-token steps that draft, verify and the rest take, and a block as measured."""
    rows = []
    for case in _measured(run):
        if case.is_own and case.mode == BLOCK.name and case.block_ratio:
            terms, whole = _terms(run, case), case.block_ratio
            if terms:
                rows.append((case.case, (*terms, max(0.0, whole - sum(terms))), whole))
    return rows


def block_parts(run: ResultFile) -> Plot | None:
    """Where a block's time goes: draft, verify, and by difference what commits and loops."""
    parts = _parts(run)[::-1]
    if not parts:
        return None
    figure, axes = new_figure("one-token steps", "", height=1.15 + 0.3 * len(parts))
    rows, left = range(len(parts)), [0.0] * len(parts)
    for i, label in enumerate(("draft", "verify", "commit and loop")):
        widths = [terms[i] for _, terms, _ in parts]
        axes.barh(rows, widths, 0.55, left=left, color=SERIES[i], label=label)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.plot([whole for _, _, whole in parts], rows, "d", color=INK, markersize=5, label="a block as measured")
    axes.set_yticks(rows, [name for name, _, _ in parts])
    axes.grid(axis="y", visible=False)
    return finished(
        figure,
        axes,
        "Where a block's time goes",
        "Draft and verify as timed alone; commit and loop are what is left of the measured block. Where the mark lies "
        "inside the bar, nothing is left: the difference is noise.",
    )


def step_costs(run: ResultFile) -> Plot | None:
    """T_verify and T_draft against the number of tokens, over the memory's floor."""
    if not run.of(Step):
        return None
    figure, axes = new_figure("tokens in a step", "milliseconds")
    for i, step in enumerate(run.of(Step)[:2]):
        where = "" if len(run.of(Step)) == 1 else f", batch {step.batch_size}"
        verify = {1: step.step_ms} | step.verify_ms
        axes.plot(list(verify), list(verify.values()), **colour(3 * i), label=f"target{where}")
        axes.plot(list(step.draft_ms), list(step.draft_ms.values()), **colour(3 * i + 1), label=f"draft{where}")
        floor = sorted(step.floor_ms.items())
        axes.plot([s for s, _ in floor], [ms for _, ms in floor], color=MUTED, linestyle="--", label=f"floor{where}")
    axes.set_xlim(left=0)
    from_zero(axes)
    caption = "The floor is the bytes of weights that a step reads over the memory bandwidth measured beside it."
    return finished(figure, axes, "What a step costs", caption)


def history(runs: Sequence[ResultFile]) -> Plot | None:
    """Speed-up of the draft's own cases over the runs, oldest first. `runs` are comparable ones."""
    lines: dict[str, list[tuple[int, Decode]]] = {}
    for i, run in enumerate(runs):
        for case in _measured(run):
            if case.is_own:
                lines.setdefault(case.case, []).append((i, case))
    lines = {name: points for name, points in lines.items() if len(points) > 1}
    if not lines:
        return None
    figure, axes = new_figure("", "speed-up")
    for i, (name, points) in enumerate(list(lines.items())[: len(SERIES)]):
        cases = [c for _, c in points]
        x, y = [p for p, _ in points], _speedups(cases)
        axes.errorbar(x, y, yerr=_errors(cases), **colour(i), capsize=2.5, label=name)
    _greedy_line(axes, across=True)
    axes.set_xlim(-0.3, len(runs) - 0.7)
    from_zero(axes)
    turned: dict[str, Any] = {"rotation": 30, "ha": "right"} if len(runs) > 4 else {}
    axes.set_xticks(range(len(runs)), [r.short_when[5:] for r in runs], **turned)
    return finished(figure, axes, "History", "Each run with its 95% intervals, oldest first (UTC).")


def all_plots(run: ResultFile, runs: Sequence[ResultFile]) -> dict[str, list[Plot]]:
    """The plots by the section of the page that shows them; `runs` is the history, oldest first."""
    draw: dict[str, list[Callable[[], Plot | None]]] = {
        "speedup": [
            lambda: speedups(run),
            lambda: speedup_against_acceptance(run),
            lambda: advised_block_size(run),
            lambda: _against(run, "block_size", "block size"),
            lambda: _against(run, "batch_size", "batch size"),
            lambda: _against(run, "max_new_tokens", "token budget"),
            lambda: _against(run, "prompt_len", "prompt length"),
        ],
        "acceptance": [
            lambda: acceptance_by_slot(run),
            lambda: accept_lengths(run),
            lambda: acceptance_by_category(run),
            lambda: acceptance_by_position(run),
        ],
        "cost": [lambda: step_costs(run), lambda: block_parts(run)],
        "history": [lambda: history(runs)],
    }
    with style():
        return {section: [p for make in makers if (p := make()) is not None] for section, makers in draw.items()}
