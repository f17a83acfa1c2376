"""A training run to look at: loss and accept length by step, for training and held-out rows."""

import json
from pathlib import Path

PANELS = (("cross_entropy", "cross-entropy, nats per label"), ("accept_len_mean", "accept length, mean"))


def write_curves(metrics: Path, image: Path) -> None:
    """Draws the lines of metrics.jsonl into a PNG."""
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
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
