"""A training run: batches through the trainer, figures to metrics.jsonl, checkpoints to run-<step>/, and on from there.

A run that was killed and is started again gives, bit by bit, the weights of one that was not: its state is all in the
checkpoint, and what a step reads follows from its number.
"""

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from dflash.ahead import ahead
from dflash.config import ConfigError, DraftConfig
from dflash.measure import matmul_rate
from dflash.metrics import finite
from dflash.teacher_cache.arrays import write_atomically
from dflash.training.batches import Batch, TrainingBatches
from dflash.training.curves import read_metrics, write_curves
from dflash.training.objective import SUMS, means
from dflash.training.trainer import TrainConfig, Trainer, learning_rate, step_flops
from dflash.weights.easydel import read_optimizer_state, read_run, run_config, write_run
from dflash.weights.runs import latest_run


class TrainingError(RuntimeError):
    """Training that can't go on: at which step, on which rows, and where the last good checkpoint is."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Where a run is kept and how often it says something, in steps; `keep` is how many checkpoints stay."""

    root: Path
    save_every: int = 500
    keep: int = 2
    log_every: int = 10
    evaluate_every: int = 200

    def __post_init__(self) -> None:
        counts = ("save_every", "keep", "log_every", "evaluate_every")
        faults = [f"{n} must be at least 1, got {getattr(self, n)}" for n in counts if getattr(self, n) < 1]
        if faults:
            raise ConfigError("; ".join(faults))


def open_run(root: Path, settings: Mapping[str, Any], origin: Mapping[str, Any] | None) -> Path | None:
    """The checkpoint that the run in `root` goes on from; None for a new run, whose settings are written down.

    Raises ConfigError when it was a run with other settings.
    """
    root.mkdir(parents=True, exist_ok=True)
    path, latest = root / "run_config.json", latest_run(root)
    if latest is None:
        whole = dict(settings) | ({"dflash": origin} if origin else {})
        write_atomically(path, json.dumps(whole, indent=2, sort_keys=True, allow_nan=False) + "\n")
        return None
    begun = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    begun.pop("dflash", None)
    differing = _differences(begun, settings)
    if differing:
        raise ConfigError(
            f"{root} holds a run with other settings ({differing}): give those to resume it, or another directory for "
            "a new run (init_from starts from its draft)"
        )
    return latest


def run_settings(config: TrainConfig, draft: DraftConfig, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What a run is known by. Raises ConfigError for a draft that no checkpoint could hold."""
    return {"train": dataclasses.asdict(config), **json.loads(run_config(draft, "float32", provenance))["dflash"]}


def open_metrics(root: Path, step: int) -> Path:
    """The run's metrics.jsonl, with its lines up to this step."""
    path = root / "metrics.jsonl"
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
    return path


def write_line(metrics: Path, line: Mapping[str, float]) -> None:
    with metrics.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite(line), allow_nan=False) + "\n")


def check_finite(step: int, sums: Mapping[str, Any], batches: TrainingBatches, saved: Path | None) -> None:
    """Raises TrainingError, with the rows, when the loss or the gradient of a step was not finite."""
    if not bool(sums["finite"]):
        raise TrainingError(
            f"step {step} gave loss {means(dict(sums))['loss']} and gradient norm {float(sums['gradient_norm'])} on "
            f"rows {batches.rows(step - 1).tolist()}; the last good checkpoint is {saved or 'none'}: lower the "
            "learning rate, or look at those rows"
        )


class Run:
    """One run in one directory. `held_out` batches are scored every so often; what they give trains nothing.

    `provenance` is what it reads, and a run that reads something else is another run. `origin` says where it was begun
    (dflash/provenance.py): it stands in run_config.json under `dflash`, and another one may resume.
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
        latest = open_run(config.root, run_settings(trainer.config, trainer.draft_config, provenance), origin)
        if latest is not None:
            draft = read_run(latest)
            self.step = int(latest.name.removeprefix("run-"))
            trainer.restore(draft, read_optimizer_state(latest, trainer.state[1]))
        self._metrics = open_metrics(config.root, self.step)
        self._tensorboard = _tensorboard(config.root)

    # ---- what is on disk

    def _save(self) -> Path:
        return write_run(
            self.trainer.draft(),
            self.config.root,
            self.step,
            optimizer_state=self.trainer.state[1],
            provenance=self.provenance,
            keep=self.config.keep,
        )

    # ---- the loop

    def train(self) -> Path:
        """To the last step; returns the last checkpoint's directory. Raises TrainingError at a NaN or infinity."""
        if self.step < self.trainer.config.steps:
            self._train()
        write_curves(self._metrics, self.config.root / "curves.png")
        saved = latest_run(self.config.root)
        assert saved is not None
        return saved

    def _train(self) -> None:
        config, trainer = self.config, self.trainer
        window = _Window(trainer)
        saved = latest_run(config.root)
        with tqdm(total=trainer.config.steps, initial=self.step, desc="train", unit="step") as bar:
            for step, batch, waited in ahead(self.batches, self.step, trainer.config.steps):
                sums = trainer.step(batch)
                self.step = step + 1
                window.add(self.step, batch, sums, waited)
                # Looked at one step late: the host reads what the device has finished while it works on the next.
                self._check(window.previous, saved)
                log, evaluate, save = (
                    self.step % every == 0 or self.step == trainer.config.steps
                    for every in (config.log_every, config.evaluate_every, config.save_every)
                )
                # A line at every checkpoint too: what a resumed run counts since its last line is then the same.
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
            check_finite(*done, self.batches, saved)

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
        """One line of metrics.jsonl. matmul_fraction is of the machine's rate for one large product in this dtype."""
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
