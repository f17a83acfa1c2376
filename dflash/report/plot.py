"""matplotlib figures as inline SVG that follows the page: colours are CSS variables, text is the page's own font."""

import dataclasses
import io
import re
from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

# Colours that stand for CSS variables: drawn with these, then replaced.
INK, MUTED, GRID = "#010101", "#020202", "#030303"
SERIES = ("#0a0001", "#0a0002", "#0a0003", "#0a0004", "#0a0005", "#0a0006")
MARKERS = ("o", "s", "^", "D", "v", "P")
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid"} | {c: f"--series-{i}" for i, c in enumerate(SERIES, 1)}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # file names are not formulas
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
}
# As wide as a phone, in inches, so that a figure's letters stay readable.
WIDTH, HEIGHT = 4.3, 2.75


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """A drawn figure with the words around it."""

    title: str
    caption: str
    svg: str


def style() -> AbstractContextManager[None]:
    """The style for all drawing."""
    return mpl.rc_context(_STYLE)


def new_figure(xlabel: str, ylabel: str, height: float = HEIGHT) -> tuple[Figure, Axes]:
    """One empty plot. No pyplot: nothing global, nothing to close."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot(xlabel=xlabel, ylabel=ylabel)


def colour(i: int) -> dict[str, Any]:
    """Colour and marker of the i-th line, so that lines differ by more than colour."""
    return {"color": SERIES[i % len(SERIES)], "marker": MARKERS[i % len(MARKERS)]}


def from_zero(axes: Axes) -> None:
    """A vertical axis that starts at 0, so that heights can be compared, with room above the highest point."""
    axes.set_ylim(0, 1.08 * float(axes.dataLim.ymax) or 1.0)


def finished(figure: Figure, axes: Axes, title: str, caption: str) -> Plot:
    """The plot with its legend, as the page takes it."""
    _legend(figure, axes)
    name = "".join(c if c.isalnum() else "-" for c in title.lower())
    return Plot(title=title, caption=caption, svg=_to_svg(figure, name, f"{title}. {caption}"))


def _legend(figure: Figure, axes: Axes) -> None:
    """Above the plot, where it hides no point; no legend for a single unnamed thing."""
    entries = list(zip(*axes.get_legend_handles_labels(), strict=True))
    if entries:
        # Bars and points first, then the lines they are compared with.
        handles, names = zip(*sorted(entries, key=lambda f: isinstance(f[0], Line2D)), strict=True)
        columns = min(len(names), 3 if max(map(len, names)) < 16 else 2)
        figure.legend(handles, names, loc="outside upper left", ncols=columns)


def _to_svg(figure: Figure, name: str, label: str) -> str:
    """The figure's SVG element. `name` keeps its ids apart from other figures', `label` is for screen readers."""
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", text.getvalue(), flags=re.DOTALL)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font(?:-family)?: ?[^;\"]*sans-serif[^;\"]*", lambda m: _font(m.group()), svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    # Scales with the page: the size in points goes, the view box stays.
    svg = re.sub(r'<svg([^>]*?) width="[^"]*"', r"<svg\1", svg, count=1)
    svg = re.sub(r'<svg([^>]*?) height="[^"]*"', r"<svg\1", svg, count=1)
    escaped = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escaped}"', 1).strip()


def _font(style: str) -> str:
    """matplotlib lists every font it would accept; the page's own is better. The size stays."""
    size = re.search(r"[\d.]+px", style)
    return f"font-size: {size.group()}" if size else "font-style: normal"
