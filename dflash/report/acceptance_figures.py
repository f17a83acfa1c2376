"""The plots of what is accepted: by slot, by length, by kind of prompt, by position."""

from matplotlib.ticker import MaxNLocator, PercentFormatter

from dflash.decoding.modes import BLOCK, VERIFYING
from dflash.measuring.result import Acceptance, Decode, Offline, ResultFile
from dflash.report.plot import INK, SERIES, Plot, colour, finished, from_zero, new_figure


def _accepting(run: ResultFile) -> list[Decode | Acceptance | Offline]:
    """What tells how a draft of its own is accepted: decoding cases, then live and offline evaluations."""
    own = [c for c in run.decodes if c.is_own and c.lossless is not False]
    return [*own, *run.of(Acceptance), *run.of(Offline)]


def _by_slot(run: ResultFile) -> list[tuple[str, list[float]]]:
    """Names and accept_rate_per_pos of drafts, each curve once: both modes accept the same."""
    series: dict[str, list[float]] = {}
    for info in _accepting(run):
        name = info.case
        for mode in VERIFYING:
            name = name.removeprefix(f"{mode.short}-")
        if info.accept_rate_per_pos and info.accept_rate_per_pos not in series.values():
            series[name] = info.accept_rate_per_pos
    return list(series.items())[: len(SERIES)]


def acceptance_by_slot(run: ResultFile) -> Plot | None:
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


def accept_lengths(run: ResultFile) -> Plot | None:
    """Histogram of accept lengths, as shares."""
    shown: list[tuple[str, list[int]]] = []
    for info in _accepting(run):
        counts = info.accept_histogram
        if isinstance(info, Decode) and info.mode != BLOCK.name:
            continue
        if counts and sum(counts) and counts not in [other for _, other in shown]:
            shown.append((info.case, counts))
    shown = shown[: len(SERIES)]
    if not shown:
        return None
    figure, axes = new_figure("drafted tokens accepted in a block", "share of blocks")
    width = 0.8 / len(shown)
    for i, (name, counts) in enumerate(shown):
        x = [a + (i - (len(shown) - 1) / 2) * width for a in range(len(counts))]
        axes.bar(x, [n / sum(counts) for n in counts], width, color=SERIES[i], label=name)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="x", visible=False)
    blocks = ", ".join(str(sum(counts)) for _, counts in shown)
    return finished(figure, axes, "Accept length", f"Blocks counted: {blocks}.")


def acceptance_by_position(run: ResultFile) -> Plot | None:
    """Offline acceptance by where a block's context starts."""
    shown = [o for o in run.of(Offline) if len(o.by_ctx_pos_start) > 1]
    if not shown:
        return None
    figure, axes = new_figure("first position of the context", "mean accept length")
    for i, offline in enumerate(shown[: len(SERIES)]):
        points = sorted((start, bucket.accept_len_mean) for start, bucket in offline.by_ctx_pos_start.items())
        axes.plot([x for x, _ in points], [y for _, y in points], **colour(i), label=offline.case)
    from_zero(axes)
    caption = "A draft that has learnt positions instead of text falls here."
    return finished(figure, axes, "Acceptance by position", caption)


def acceptance_by_category(run: ResultFile) -> Plot | None:
    """Acceptance length of each kind of prompt."""
    live = next(iter(run.of(Acceptance)), None)
    if live is None or live.acceptance_length is None:
        return None
    kinds = [(name, c.acceptance_length) for name, c in live.by_category.items() if c.acceptance_length]
    kinds.sort(key=lambda k: k[1])
    figure, axes = new_figure("acceptance length", "", height=0.7 + 0.26 * len(kinds))
    # The figure stands beside the name: at the end of its bar the dashed line could cross it.
    axes.barh([f"{name}  {x:.2f}" for name, x in kinds], [x for _, x in kinds], 0.6, color=SERIES[0])
    axes.axvline(live.acceptance_length, color=INK, linewidth=0.9, linestyle=(0, (2, 2)))
    axes.grid(axis="y", visible=False)
    return finished(figure, axes, "Acceptance by kind of prompt", "The dashed line is all of them together.")
