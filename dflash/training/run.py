"""A training run: batches through the trainer, figures to metrics.jsonl, checkpoints to run-<step>/, and resuming.

A run that is killed and started again gives, bit for bit, the weights of an uninterrupted one: all of its state is in
the checkpoint, and a step's data depends only on its number.
"""

import dataclasses
import io
import json
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import filelock
import jax
import numpy as np
import tyro
from tqdm import tqdm

from dflash.config import Checked, ConfigError, Count, DraftConfig, UserError
from dflash.host.ahead import ahead
from dflash.host.disk import parse_object, read_object, whole_lines, write_atomically
from dflash.measuring.steps import matmul_rate
from dflash.metrics import finite
from dflash.training.batches import Batch, TrainingBatches
from dflash.training.objective import SUMS, means
from dflash.training.trainer import TrainConfig, Trainer, learning_rate, step_flops
from dflash.weights.runs.checkpoint import read_optimizer_state, read_run, run_config, write_run
from dflash.weights.runs.directories import MARKER, latest_run
from dflash.weights.snapshot import WeightsError, holds_weights

# The plots of metrics.jsonl: a figure and the label of its axis.
PANELS = (("cross_entropy", "cross-entropy, nats per label"), ("accept_len_mean", "accept length, mean"))


class TrainingError(UserError, RuntimeError):
    """Training that can't continue: at which step, on which rows, and where the last good checkpoint is."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig(Checked):
    """Where a run is kept and how often it reports."""

    root: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(name="save-directory")]
    """Directory of the run; if it holds checkpoints of this run, the run is resumed."""
    save_every: Count = 500
    """Steps between checkpoints."""
    keep: Count = 2
    """Checkpoints to keep."""
    log_every: Count = 10
    """Steps between lines of metrics.jsonl."""
    evaluate_every: Count = 200
    """Steps between scores on held-out rows."""


def claim_run(root: Path) -> filelock.BaseFileLock:
    """Reserves the directory of a run, created if missing, for this process until it is released or the process ends.

    Raises ConfigError if another process trains in it, it holds a draft already, or it can't be created.
    """
    if holds_weights(root):
        raise ConfigError(
            f"{root} holds the weights of a draft, which its name would go on to mean: give a new directory"
        )
    lock = filelock.FileLock(root / ".training.lock", is_singleton=True)
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ConfigError(
            f"one process at a time trains in a directory, and another one does in {root}: wait until it ends, or give "
            "another directory"
        ) from None
    except OSError as error:
        raise ConfigError(f"a run is kept in a directory; {root}: {error.strerror}") from None
    return lock


class Start(NamedTuple):
    """Where a run starts: its last checkpoint, None for a new run; `identity` marks its own checkpoints.

    Runs that were begun before there were identities have None.
    """

    checkpoint: Path | None
    identity: str | None


def open_run(root: Path, settings: Mapping[str, Any], origin: Mapping[str, Any] | None) -> Start:
    """Where the run in `root`, a claimed directory, resumes from; the settings of a new run are written.

    Raises ConfigError if it was a run with other settings, or its last checkpoint belongs to another run.
    """
    path, latest = root / "run_config.json", latest_run(root)
    if latest is None:
        identity = secrets.token_hex(16)
        content = dict(settings) | {"identity": identity} | ({"dflash": origin} if origin else {})
        write_atomically(path, json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")
        return Start(None, identity)
    remedy = "give another directory for a new run"
    earlier = read_object(path, ConfigError, remedy) if path.is_file() else {}
    earlier.pop("dflash", None)
    identity = earlier.pop("identity", None)
    differences = _differences(earlier, settings)
    if differences:
        raise ConfigError(
            f"{root} holds a run with other settings ({differences}): give those to resume it, or another directory "
            "for a new run (init_from starts from its draft)"
        )
    if read_object(latest / MARKER, WeightsError, remedy).get("identity") != identity:
        raise ConfigError(
            f"{latest} is no checkpoint of the run that was begun in {root}, though their settings are the same: move "
            "it away to resume from the one before it, or give another directory for a new run"
        )
    return Start(latest, identity)


def run_settings(config: TrainConfig, draft: DraftConfig, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that identify a run. Raises ConfigError for a draft that no checkpoint could hold."""
    return {"train": dataclasses.asdict(config), **json.loads(run_config(draft, "float32", provenance))["dflash"]}


def read_metrics(metrics: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, none if there is no file; a last line cut short by a kill is dropped.

    Raises TrainingError for a line that a run did not write.
    """
    texts = whole_lines(metrics)[0] if metrics.is_file() else []
    remedy = "remove that line"
    lines = []
    for number, text in enumerate(texts, 1):
        line = parse_object(text, f"{metrics}, line {number},", TrainingError, remedy)
        if type(line.get("step")) is not int:
            raise TrainingError(f"{metrics}, line {number}, must say its step, a whole number: {remedy}")
        lines.append(line)
    return lines


def open_metrics(root: Path, step: int) -> Path:
    """The run's metrics.jsonl, with its lines up to this step."""
    path = root / "metrics.jsonl"
    lines = [json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= step]
    write_atomically(path, "".join(lines))
    return path


def write_line(metrics: Path, line: Mapping[str, float]) -> None:
    with metrics.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite(line), allow_nan=False) + "\n")


def write_curves(metrics: Path, image: Path) -> None:
    """Plots the lines of metrics.jsonl as a PNG."""
    from matplotlib.figure import Figure  # takes a second that other commands need not spend

    lines = read_metrics(metrics)
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, 2), PANELS, strict=True):
        for key, title in ((name, "training"), (f"held_out_{name}", "held out")):
            points = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]
            if points:
                axes.plot(*zip(*points, strict=True), label=title, marker="o" if len(points) < 20 else "")
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    drawing = io.BytesIO()
    figure.savefig(drawing, format="png", dpi=120)
    write_atomically(image, drawing.getvalue())


def check_step(step: int, sums: Mapping[str, Any], batches: TrainingBatches, saved: Path | None) -> None:
    """Raises TrainingError, with the rows, when the loss or the gradient of a step was not finite."""
    if not bool(sums["finite"]):
        raise TrainingError(
            f"step {step} gave loss {means(dict(sums))['loss']} and gradient norm {float(sums['gradient_norm'])} on "
            f"rows {batches.rows(step - 1).tolist()}; the last good checkpoint is {saved or 'none'}: lower the "
            "learning rate, or look at those rows"
        )


class Run:
    """One run in one directory, which is this process's until it has trained.

    `held_out` batches are scored from time to time and train nothing. `provenance` is what it reads; a run that reads
    something else is another run. `origin` says where it was started (dflash/host/provenance.py); it is under `dflash`
    in run_config.json, and a run may be resumed elsewhere.
    """

    def __init__(
        self,
        trainer: Trainer,
        batches: TrainingBatches,
        held_out: list[Batch],
        config: RunConfig,
        provenance: Mapping[str, Any],
        origin: Mapping[str, Any] | None = None,
    ):
        self.trainer, self.batches, self.held_out, self.config = trainer, batches, held_out, config
        self.provenance = dict(provenance)
        self.step = 0
        settings = run_settings(trainer.config, trainer.draft_config, provenance)
        self._claim = claim_run(config.root)
        latest, self._identity = open_run(config.root, settings, origin)
        if latest is not None:
            draft = read_run(latest)
            self.step = int(latest.name.removeprefix("run-"))
            trainer.restore(draft, read_optimizer_state(latest, trainer.state[1]))
        self._metrics = open_metrics(config.root, self.step)
        self._tensorboard = _tensorboard(config.root)

    # ---- on disk

    def _save(self) -> Path:
        return write_run(
            self.trainer.draft(),
            self.config.root,
            self.step,
            optimizer_state=self.trainer.state[1],
            provenance=self.provenance,
            keep=self.config.keep,
            identity=self._identity,
        )

    # ---- the loop

    def train(self) -> Path:
        """Trains to the last step; returns the last checkpoint's directory. Raises TrainingError at NaN or infinity."""
        try:
            if self.step < self.trainer.config.steps:
                self._train()
            write_curves(self._metrics, self.config.root / "curves.png")
            saved = latest_run(self.config.root)
            assert saved is not None
            return saved
        finally:
            self._claim.release()

    def _train(self) -> None:
        config, trainer = self.config, self.trainer
        window = _Window(trainer)
        saved = latest_run(config.root)
        with tqdm(total=trainer.config.steps, initial=self.step, desc="train", unit="step") as bar:
            for step, batch, waited in ahead(self.batches, self.step, trainer.config.steps):
                sums = trainer.step(batch)
                self.step = step + 1
                window.add(self.step, batch, sums, waited)
                # Checked one step late: the host reads what the device has finished while the device works on the next
                # step.
                self._check(window.previous, saved)
                log, evaluate, save = (
                    self.step % every == 0 or self.step == trainer.config.steps
                    for every in (config.log_every, config.evaluate_every, config.save_every)
                )
                # Also a line at every checkpoint, so that a resumed run counts the same since its last line.
                if log or evaluate or save:
                    self._check((self.step, sums), saved)
                    line = window.figures()
                    if evaluate:
                        line |= self._score(saved)
                    self._log(line)
                    bar.set_postfix(loss=f"{line['loss']:.3f}", accept=f"{line['accept_len_mean']:.2f}", refresh=False)
                if save:
                    saved = self._save()
                bar.update()

    def _check(self, done: tuple[int, dict[str, Any]] | None, saved: Path | None) -> None:
        if done is not None:
            check_step(*done, self.batches, saved)

    def _score(self, saved: Path | None) -> dict[str, float]:
        if not self.held_out:
            return {}
        totals = dict.fromkeys(SUMS, 0.0)
        for i, batch in enumerate(self.held_out):
            sums = self.trainer.score(batch)
            totals = {name: totals[name] + float(sums[name]) for name in SUMS}
            if not np.isfinite(totals["weighted"] + totals["nll"]):
                raise TrainingError(
                    f"held-out batch {i} has loss {means(totals)['loss']} after step {self.step}; the last good "
                    f"checkpoint is {saved or 'none'}: look at the held-out rows of the cache"
                )
        return {f"held_out_{name}": value for name, value in means(totals).items()}

    def _log(self, line: dict[str, float]) -> None:
        write_line(self._metrics, line)
        if self._tensorboard is not None:
            for name, value in line.items():
                self._tensorboard.add_scalar(name, value, int(line["step"]))
            self._tensorboard.flush()


class _Window:
    """Figures since the last line: sums over its steps, and where the time went."""

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._rate = learning_rate(trainer.config)
        self._machine = matmul_rate(trainer.config.dtype) * trainer.config.dp * trainer.config.tp
        self.previous: tuple[int, dict[str, Any]] | None = None
        self._last: tuple[int, dict[str, Any]] | None = None
        self._clear()

    def _clear(self) -> None:
        self._sums: list[dict[str, Any]] = []
        self._flops, self._drafted, self._wait_s, self._start = 0.0, 0, 0.0, time.perf_counter()

    def add(self, step: int, batch: Batch, sums: dict[str, Any], waited: float) -> None:
        self.previous, self._last = self._last, (step, sums)
        self._sums.append(sums)
        self._flops += step_flops(self._trainer.draft_config, batch)
        self._drafted += int(np.prod(batch.labels.shape))
        self._wait_s += waited

    def figures(self) -> dict[str, float]:
        """One line of metrics.jsonl. matmul_fraction is relative to the machine's rate for one large product."""
        assert self._last is not None
        step, last = self._last
        jax.block_until_ready(last)
        seconds = time.perf_counter() - self._start
        totals = {name: sum(float(s[name]) for s in self._sums) for name in SUMS}
        line = {
            "step": step,
            **means(totals),
            "learning_rate": float(self._rate(step - 1)),
            "gradient_norm": float(last["gradient_norm"]),
            "draft_tokens_per_s": self._drafted / seconds,
            "matmul_fraction": self._flops / seconds / self._machine,
            "wait_fraction": self._wait_s / seconds,
        }
        self._clear()
        return line


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    def flat(x: Any, name: str = "") -> dict[str, Any]:
        if not isinstance(x, Mapping):
            return {name: x}
        return {k: v for key, value in x.items() for k, v in flat(value, f"{name}.{key}".lstrip(".")).items()}

    a, b = flat(old), flat(new)
    return ", ".join(
        f"{k} {a.get(k)!r} there, {b.get(k)!r} here" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)
    )


def _tensorboard(root: Path) -> Any:
    """A writer of event files if TensorBoard is installed, else None: metrics.jsonl has the same figures."""
    try:
        from tensorboard.summary import Writer
    except ImportError:
        return None
    return Writer(str(root / "tensorboard"))
