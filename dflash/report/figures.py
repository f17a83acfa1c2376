"""The plots of a run: speed-ups, costs, history. Each is drawn of what was measured, or left out."""

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from dflash.report.acceptance_figures import (
    accept_lengths,
    acceptance_by_category,
    acceptance_by_position,
    acceptance_by_slot,
)
from dflash.report.plot import INK, MUTED, SERIES, Plot, colour, finished, from_zero, new_figure, style
from dflash.report.run import Info, Run, is_own


def _errors(cases: Sequence[Info]) -> list[list[float]]:
    """Distances below and above each speed-up; a point without an interval has none."""
    pairs = [(c["speedup_x"], c.get("speedup_x_ci95") or [c["speedup_x"]] * 2) for c in cases]
    return [[max(0.0, x - low) for x, (low, _) in pairs], [max(0.0, high - x) for x, (_, high) in pairs]]


def _greedy_line(axes: Axes, *, across: bool) -> None:
    """Speed-up 1: as fast as greedy decoding."""
    (axes.axhline if across else axes.axvline)(1.0, color=INK, linewidth=0.9, linestyle=(0, (2, 2)))


def _measured(run: Run) -> list[Info]:
    """Cases whose speed-up counts: proven equal, or at least not shown to differ."""
    return [c for c in run.decodes if c["speedup_x"] is not None and c["lossless"] is not False]


def speedups(run: Run) -> Plot | None:
    """Every case with its interval, and what its steps predict."""
    cases = _measured(run)[::-1]
    if not cases:
        return None
    figure, axes = new_figure("speed-up over greedy decoding", "", height=0.95 + 0.25 * len(cases))
    for name, series, wanted in (
        ("a draft's own proposals", SERIES[0], True),
        ("scripted proposals", SERIES[1], False),
    ):
        rows = [i for i, c in enumerate(cases) if is_own(c) == wanted]
        chosen = [cases[i] for i in rows]
        if chosen:
            axes.errorbar(
                [c["speedup_x"] for c in chosen],
                rows,
                xerr=_errors(chosen),
                fmt="o" if wanted else "s",
                color=series,
                capsize=2.5,
                label=name,
            )
    told = [(i, c["predicted_speedup_x"]) for i, c in enumerate(cases) if c.get("predicted_speedup_x")]
    if told:
        axes.plot([x for _, x in told], [i for i, _ in told], "|", color=INK, markersize=11, label="cost model")
    _greedy_line(axes, across=False)
    axes.set_yticks(range(len(cases)), [c["case"] for c in cases])
    axes.set_ylim(-0.6, len(cases) - 0.4)
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
    return finished(
        figure,
        axes,
        "Speed-up of every case",
        "Ratio of medians with its 95% interval; the dashed line is greedy decoding. The bar is what the steps, timed "
        "alone, predict.",
    )


def _other_axes(case: Info, key: str) -> tuple[str, ...]:
    """What a line of cases has in common when only `key` differs, in words; the proposer first."""
    # A script's name says how much is accepted, and that grows with the block: all of it is one line.
    whole = case.get("proposer") == f"a{(case['block_size'] or 0) - 1}"
    words = {
        "mode": {"cached_block_verify": "block", "served": "served"}.get(case["mode"], "sequential"),
        "block_size": f"{case['block_size']} slots",
        "batch_size": f"batch {case.get('batch_size')}",
        "max_new_tokens": f"{case.get('max_new_tokens')} tokens",
        "prompts": f"{case.get('prompts')}",
        "prompt_len": f"prompts of {case.get('prompt_len')}",
        "draft": f"{case.get('draft')}",
    }
    first = "all accepted" if whole else str(case.get("proposer") or "draft")
    return (first, *(text for name, text in words.items() if name != key))


def _against(run: Run, key: str, label: str) -> Plot | None:
    """Speed-up against one workload axis, a line for each case that is otherwise the same."""
    lines: dict[tuple[str, ...], list[Info]] = {}
    for case in [c for c in _measured(run) if c[key] is not None]:
        lines.setdefault(_other_axes(case, key), []).append(case)
    lines = {k: sorted(v, key=lambda c: c[key]) for k, v in lines.items() if len({c[key] for c in v}) > 1}
    if not lines:
        return None
    figure, axes = new_figure(label, "speed-up")
    # A word that all lines share tells nothing.
    telling = [i for i, words in enumerate(zip(*lines, strict=True)) if i == 0 or len(set(words)) > 1]
    for i, (words, cases) in enumerate(lines.items()):
        x, y = [c[key] for c in cases], [c["speedup_x"] for c in cases]
        name = ", ".join(words[k] for k in telling)
        axes.errorbar(x, y, yerr=_errors(cases), **colour(i), capsize=2.5, label=name)
        if all(c.get("predicted_speedup_x") for c in cases):
            predicted = [c["predicted_speedup_x"] for c in cases]
            axes.plot(x, predicted, color=colour(i)["color"], linestyle=":", linewidth=1.2)
    _greedy_line(axes, across=True)
    from_zero(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    caption = "Points with 95% intervals are measured, the dotted line beside each is the cost model's."
    return finished(figure, axes, f"Speed-up against {label}", caption)


def advised_block_size(run: Run) -> Plot | None:
    """The cost model's speed-up for every block size up to the measured one, and the measured one."""
    cases = [c for c in _measured(run) if is_own(c) and len((c.get("advice") or {}).get("by_block_size") or []) > 1]
    if not cases:
        return None
    figure, axes = new_figure("block size", "speed-up")
    for i, case in enumerate(cases[: len(SERIES)]):
        rows = case["advice"]["by_block_size"]
        x, y = [r["block_size"] for r in rows], [r["predicted_speedup_x"] for r in rows]
        axes.plot(x, y, color=colour(i)["color"], linestyle=":", linewidth=1.4)
        measured = {**colour(i), "linestyle": "", "capsize": 2.5, "label": case["case"]}
        axes.errorbar([case["block_size"]], [case["speedup_x"]], yerr=_errors([case]), **measured)
    _greedy_line(axes, across=True)
    from_zero(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    caption = "Dotted, what the cost model predicts for every block size; with its interval, what was measured."
    return finished(figure, axes, "What each block size would give", caption)


def speedup_against_acceptance(run: Run) -> Plot | None:
    """Measured points over the cost model's lines: the slope is one over the cost of a block."""
    cases = [c for c in _measured(run) if c["mode"] == "cached_block_verify" and c.get("predicted_block_ratio")]
    if not cases:
        return None
    figure, axes = new_figure("tokens a block", "speed-up")
    shapes = sorted({(c["block_size"], c["batch_size"]) for c in cases})
    for i, (size, batch) in enumerate(shapes):
        chosen = [c for c in cases if (c["block_size"], c["batch_size"]) == (size, batch)]
        ratio = sum(c["predicted_block_ratio"] for c in chosen) / len(chosen)
        axes.plot([0, size], [0, size / ratio], color=colour(i)["color"], linestyle=":", linewidth=1.2)
        x = [c["predicted_speedup_x"] * c["predicted_block_ratio"] for c in chosen]
        y = [c["speedup_x"] for c in chosen]
        name = f"{size} slots" + (f", batch {batch}" if len({k for _, k in shapes}) > 1 else "")
        axes.errorbar(x, y, yerr=_errors(chosen), **colour(i), linestyle="", capsize=2.5, label=name)
    _greedy_line(axes, across=True)
    axes.set_xlim(left=0)
    from_zero(axes)
    return finished(
        figure,
        axes,
        "Speed-up against tokens a block",
        "What acceptance buys on this device: measured points over the cost model's dotted lines. Where one crosses "
        "the dashed line of greedy decoding, DFlash breaks even.",
    )


def _terms(run: Run, case: Info) -> tuple[float, float] | None:
    """One-token steps that a case's draft and verify take, timed alone: its own, else the step benchmark's."""
    if case.get("draft_ratio") and case.get("verify_ratio"):
        return case["draft_ratio"], case["verify_ratio"]
    size, batch = str(case["block_size"]), case.get("batch_size")
    for step in run.steps:
        if size in step["draft_ms"] and size in step["verify_ms"] and step.get("batch_size") == batch:
            return step["draft_ms"][size] / step["step_ms"], step["verify_ms"][size] / step["step_ms"]
    return None


def _parts(run: Run) -> list[tuple[str, tuple[float, float, float], float]]:
    """Of a draft's block cases: name, one-token steps that draft, verify and the rest take, and a block as measured."""
    found = []
    for case in _measured(run):
        if is_own(case) and case["mode"] == "cached_block_verify" and case.get("block_ratio"):
            terms, whole = _terms(run, case), case["block_ratio"]
            if terms:
                found.append((case["case"], (*terms, max(0.0, whole - sum(terms))), whole))
    return found


def block_parts(run: Run) -> Plot | None:
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


def step_costs(run: Run) -> Plot | None:
    """T_verify and T_draft against the number of tokens, over the memory's floor."""
    if not run.steps:
        return None
    figure, axes = new_figure("tokens in a step", "milliseconds")
    for i, step in enumerate(run.steps[:2]):
        where = "" if len(run.steps) == 1 else f", batch {step['batch_size']}"
        verify = {1: step["step_ms"]} | {int(s): ms for s, ms in step["verify_ms"].items()}
        axes.plot(list(verify), list(verify.values()), **colour(3 * i), label=f"target{where}")
        draft = {int(s): ms for s, ms in step["draft_ms"].items()}
        axes.plot(list(draft), list(draft.values()), **colour(3 * i + 1), label=f"draft{where}")
        floor = sorted((int(s), ms) for s, ms in step["floor_ms"].items())
        axes.plot([s for s, _ in floor], [ms for _, ms in floor], color=MUTED, linestyle="--", label=f"floor{where}")
    axes.set_xlim(left=0)
    from_zero(axes)
    caption = "The floor is the bytes of weights that a step reads over the memory bandwidth measured beside it."
    return finished(figure, axes, "What a step costs", caption)


def history(runs: Sequence[Run]) -> Plot | None:
    """Speed-up of the draft's own cases over the runs, oldest first. `runs` are comparable ones."""
    lines: dict[str, list[tuple[int, Info]]] = {}
    for i, run in enumerate(runs):
        for case in _measured(run):
            if is_own(case):
                lines.setdefault(case["case"], []).append((i, case))
    lines = {name: points for name, points in lines.items() if len(points) > 1}
    if not lines:
        return None
    figure, axes = new_figure("", "speed-up")
    for i, (name, points) in enumerate(list(lines.items())[: len(SERIES)]):
        cases = [c for _, c in points]
        x, y = [p for p, _ in points], [c["speedup_x"] for c in cases]
        axes.errorbar(x, y, yerr=_errors(cases), **colour(i), capsize=2.5, label=name)
    _greedy_line(axes, across=True)
    axes.set_xlim(-0.3, len(runs) - 0.7)
    from_zero(axes)
    turned: dict[str, Any] = {"rotation": 30, "ha": "right"} if len(runs) > 4 else {}
    axes.set_xticks(range(len(runs)), [r.short_when[5:] for r in runs], **turned)
    return finished(figure, axes, "History", "Each run with its 95% intervals, oldest first (UTC).")


def all_plots(run: Run, runs: Sequence[Run]) -> dict[str, list[Plot]]:
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
