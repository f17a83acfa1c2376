"""The plots of what is accepted: by slot, by length, by kind of prompt, by position."""

from matplotlib.ticker import MaxNLocator, PercentFormatter

from dflash.report.plot import INK, SERIES, Plot, colour, finished, from_zero, new_figure
from dflash.report.run import Info, Run, is_own


def _by_slot(run: Run) -> list[tuple[str, list[float]]]:
    """Names and accept_rate_per_pos of drafts, each curve once: both modes accept the same."""
    found: dict[str, list[float]] = {}
    for info in [c for c in run.decodes if is_own(c) and c["lossless"] is not False] + run.acceptances:
        name = str(info["case"]).removeprefix("block-").removeprefix("seq-")
        if info.get("accept_rate_per_pos") and info["accept_rate_per_pos"] not in found.values():
            found[name] = info["accept_rate_per_pos"]
    return list(found.items())[: len(SERIES)]


def acceptance_by_slot(run: Run) -> Plot | None:
    curves = _by_slot(run)
    if not curves:
        return None
    figure, axes = new_figure("drafted token", "accepted up to it")
    for i, (name, rates) in enumerate(curves):
        axes.plot(range(1, len(rates) + 1), rates, **colour(i), label=name)
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    caption = "Share of blocks whose first k drafted tokens were all accepted; their sum is the mean accept length."
    return finished(figure, axes, "Acceptance by slot", caption)


def accept_lengths(run: Run) -> Plot | None:
    """Histogram of accepted tokens a block, as shares."""
    wanted = [c for c in run.decodes if is_own(c) and c["mode"] == "cached_block_verify" and c["lossless"] is not False]
    found: list[Info] = []
    for info in wanted + run.acceptances:
        counts = info.get("accept_histogram")
        if counts and sum(counts) and counts not in [i["accept_histogram"] for i in found]:
            found.append(info)
    found = found[: len(SERIES)]
    if not found:
        return None
    figure, axes = new_figure("drafted tokens accepted in a block", "share of blocks")
    width = 0.8 / len(found)
    for i, info in enumerate(found):
        counts = info["accept_histogram"]
        x = [a + (i - (len(found) - 1) / 2) * width for a in range(len(counts))]
        axes.bar(x, [n / sum(counts) for n in counts], width, color=SERIES[i], label=f"{info['case']}")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="x", visible=False)
    blocks = ", ".join(f"{sum(i['accept_histogram'])}" for i in found)
    return finished(figure, axes, "Accept length", f"Blocks counted: {blocks}.")


def acceptance_by_position(run: Run) -> Plot | None:
    """Offline acceptance by where a block's context starts."""
    found = [i for i in run.acceptances if len(i.get("by_ctx_pos_start") or {}) > 1]
    if not found:
        return None
    figure, axes = new_figure("first position of the context", "mean accept length")
    for i, info in enumerate(found[: len(SERIES)]):
        points = sorted((int(start), bucket["accept_len_mean"]) for start, bucket in info["by_ctx_pos_start"].items())
        axes.plot([x for x, _ in points], [y for _, y in points], **colour(i), label=info["case"])
    from_zero(axes)
    caption = "A draft that has learnt positions instead of text falls here."
    return finished(figure, axes, "Acceptance by position", caption)


def acceptance_by_category(run: Run) -> Plot | None:
    """Acceptance length of each kind of prompt."""
    info = next((i for i in run.acceptances if i.get("by_category")), None)
    if info is None:
        return None
    kinds = [(n, b["acceptance_length"]) for n, b in info["by_category"].items() if b.get("acceptance_length")]
    kinds.sort(key=lambda k: k[1])
    figure, axes = new_figure("tokens a block (acceptance length)", "", height=0.7 + 0.26 * len(kinds))
    bars = axes.barh([n for n, _ in kinds], [x for _, x in kinds], 0.6, color=SERIES[0])
    axes.bar_label(bars, fmt="%.2f", padding=3, color=INK)
    axes.axvline(info["acceptance_length"], color=INK, linewidth=0.9, linestyle=(0, (2, 2)))
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.12)
    return finished(figure, axes, "Acceptance by kind of prompt", "The dashed line is all of them together.")
