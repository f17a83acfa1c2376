"""A training run to look at: loss and accept length by step, for training and held-out rows."""

import json
from pathlib import Path
from typing import Any

PANELS = (("cross_entropy", "cross-entropy, nats per label"), ("accept_len_mean", "accept length, mean"))


def read_metrics(metrics: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, none where there is no file; what a kill left of the last one is no line."""
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def write_curves(metrics: Path, image: Path) -> None:
    """Draws the lines of metrics.jsonl into a PNG."""
    from matplotlib.figure import Figure

    lines = read_metrics(metrics)
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, 2), PANELS, strict=True):
        for key, title in ((name, "training"), (f"held_out_{name}", "held out")):
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                axes.plot(*zip(*points, strict=True), label=title, marker="o" if len(points) < 20 else "")
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    temporary = image.with_name(image.name + ".tmp")
    figure.savefig(temporary, format="png", dpi=120)
    temporary.replace(image)
