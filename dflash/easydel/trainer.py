"""EasyDeL's `Trainer` with our loss, batches and optimizer, for its users: its loop and checkpoints, our step.

Its state holds the weights under the names of a run directory, so that what it saves is one. Three of its habits would
falsify a run and are prevented here: it reads rows in the order of the disk; it starts again from step 0 if it can't
read a checkpoint; an interruption between two steps ends it as if that step had been the last.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.traverse_util import unflatten_dict
from jax import Array
from jax.sharding import NamedSharding

from dflash import easydel
from dflash.config import ConfigError, DraftConfig
from dflash.host.ahead import ahead
from dflash.models.draft import Draft
from dflash.models.mesh import ROWS
from dflash.training.batches import Batch, TrainingBatches
from dflash.training.objective import SUMS, means, trained_head
from dflash.training.run import (
    RunConfig,
    TrainingError,
    check_step,
    claim_run,
    open_metrics,
    open_run,
    run_settings,
    write_curves,
    write_line,
)
from dflash.training.trainer import TrainConfig, TrainProgram, learning_rate, make_optimizer, place_target
from dflash.weights.config_json import read_draft_config
from dflash.weights.runs.arrays import add_hashes, read_arrays, read_index
from dflash.weights.runs.checkpoint import join_draft, read_run, run_arrays, run_config, split_draft
from dflash.weights.runs.directories import MARKER, check_run, completed_runs, latest_run, new_run, newest_run, step_of

# The model type in config.json by which EasyDeL recognises a draft.
_MODEL_TYPE = "dflash_draft"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Job:
    """What a run trains, on what, and where it resumes from."""

    draft: DraftConfig
    config: TrainConfig
    optimizer: optax.GradientTransformation
    head: Array | np.ndarray
    mask_embedding: Array | np.ndarray
    batches: TrainingBatches
    settings: RunConfig
    latest: Path | None
    identity: str | None


def train(
    draft: Draft,
    head: Array | np.ndarray,
    mask_embedding: Array | np.ndarray,
    config: TrainConfig,
    batches: TrainingBatches,
    settings: RunConfig,
    provenance: Mapping[str, Any],
    origin: Mapping[str, Any] | None = None,
) -> Path:
    """Trains in EasyDeL's loop, from the last checkpoint in `settings.root`; returns the directory of the newest one.

    Arguments as of `dflash.training`'s Trainer and Run; nothing is scored on held-out rows. Raises EasyDelError where
    EasyDeL is not installed, ConfigError for another run's directory, WeightsError for a damaged checkpoint, and
    TrainingError if EasyDeL can't resume from a checkpoint, at a NaN or infinity, or if it ended early.
    """
    package = easydel.load("easydel.trainers")
    if config.dp * config.tp != jax.device_count():
        raise ConfigError(
            f"EasyDeL's mesh has every device: dp x tp must be {jax.device_count()}, got {config.dp} x {config.tp}"
        )
    root = settings.root.absolute()
    with claim_run(root):
        latest = _checked(root)
        start = open_run(root, run_settings(config, draft.config, provenance) | {"trainer": "easydel"}, origin)
        job = _Job(
            draft=draft.config,
            config=config,
            optimizer=make_optimizer(config),
            head=trained_head(draft.config, head),
            mask_embedding=mask_embedding,
            batches=batches,
            settings=dataclasses.replace(settings, root=root),
            latest=latest,
            identity=start.identity,
        )
        with easydel.isolated():
            settings_of, weights_of = _module_classes(package)
            axes = {"sharding_axis_dims": (config.dp, 1, 1, config.tp, 1)}
            content = json.loads(run_config(draft.config, "float32", provenance))
            model = _filled(weights_of(settings_of(**content, **axes), rngs=nnx.Rngs(0)), draft)
            trainer = _trainer_class(package)(job, arguments=_arguments(package, job), model=model)
            ended = int(trainer.train().state.step)
        if trainer.raised is not None:
            raise trainer.raised
        saved = latest_run(root)
        if ended < config.steps:
            raise TrainingError(
                f"EasyDeL was interrupted after step {ended} of {config.steps}; the checkpoint is {saved}: start it "
                "again to go on"
            )
        write_curves(trainer.metrics, root / "curves.png")
        assert saved is not None
        return saved


def _checked(root: Path) -> Path | None:
    """The newest checkpoint, after reading every array. Raises WeightsError if it is incomplete or damaged."""
    newest = newest_run(root)
    if newest is not None:
        check_run(newest)
        read_run(newest)
        read_arrays(newest, read_index(newest).get("tx", {}).values())
    return newest


def _identify(folder: Path, identity: str | None) -> None:
    """Says in metadata.json, which EasyDeL wrote, of which run this checkpoint is."""
    marker = json.loads((folder / MARKER).read_text(encoding="utf-8")) | ({"identity": identity} if identity else {})
    (folder / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")


def _arguments(package: Any, job: _Job) -> Any:
    """EasyDeL's settings for a run without external reports; our step decides everything not named here."""
    root = job.settings.root
    arguments = package.TrainingArguments(
        save_directory=str(root.parent),
        model_name=root.name,
        max_training_steps=job.config.steps,
        num_train_epochs=1,
        total_batch_size=job.config.batch_size,
        learning_rate=job.config.learning_rate,
        resume_if_possible=True,
        do_last_save=True,
        do_eval=False,
        use_wandb=False,
        report_metrics=False,
        use_data_collator=False,
        track_memory=False,
        # It would silently end the run; `check_step` says which rows.
        loss_config=package.LossConfig(break_on_nan=False),
    )
    arguments.get_optimizer_and_scheduler = lambda steps=None: (job.optimizer, learning_rate(job.config))  # noqa: ARG005
    return arguments


def _node(tree: Any) -> Any:
    """Modules whose parameters have the paths of a nested dict's leaves; keys 0, 1, .. make a list."""
    if not isinstance(tree, dict):
        return nnx.Param(tree)
    if "0" in tree:
        return nnx.List([_node(tree[str(i)]) for i in range(len(tree))])
    return nnx.Dict({name: _node(value) for name, value in tree.items()})


def _named(state: Any) -> dict[str, nnx.Variable]:
    """The parameters by their paths in a run directory."""
    return {"/".join(map(str, ("model", *path))): variable for path, variable in nnx.to_flat_state(state)}


@functools.cache
def _module_classes(package: Any) -> tuple[Any, Any]:
    """EasyDeL's config and module for a draft, registered so that its resume finds them."""

    @package.register_config(_MODEL_TYPE)
    class DraftSettings(package.EasyDeLBaseConfig):
        """config.json of a run directory."""

        model_type = _MODEL_TYPE

        def __init__(self, **settings: Any):
            # Without its own __init__, transformers makes a dataclass of it.
            super().__init__(**settings)

    @package.register_module(task_type=package.TaskType.BASE_MODULE, config=DraftSettings, model_type=_MODEL_TYPE)
    class DraftWeights(package.EasyDeLBaseModule):
        """The arrays of a run directory; the step makes the computing draft from them."""

        def __init__(self, config: Any, rngs: Any, **dtypes: Any):
            float32 = {"dtype": jnp.float32, "param_dtype": jnp.float32, "precision": None}
            super().__init__(config=config, rngs=rngs, **float32 | dtypes)
            shapes = run_arrays(read_draft_config(config.dflash["draft"]))
            empty = {path: jnp.zeros(shape, jnp.float32) for path, shape in shapes.items()}
            for name, tree in unflatten_dict(empty, sep="/")["model"].items():
                setattr(self, name, _node(tree))

        @classmethod
        def can_generate(cls) -> bool:
            return False

        def flops_per_token(self, *_: Any, **__: Any) -> float:
            """Not used: the progress bar shows our figures."""
            return 1.0

    return DraftSettings, DraftWeights


def _filled(module: Any, draft: Draft) -> Any:
    """The module with copies of a draft's weights, since a step donates its buffers."""
    arrays, state = split_draft(draft), nnx.state(module, nnx.Param)
    for path, variable in _named(state).items():
        variable.set_value(jnp.array(arrays[path], jnp.float32))
    nnx.update(module, state)
    return module


def _step(job: _Job, mesh: Any, metrics: Any) -> Any:
    """Our step in EasyDeL's form: its state and a batch in, its state and `metrics` of our sums out."""

    def build(graphstate: Any) -> Draft:
        arrays = {path: variable.get_value() for path, variable in _named(graphstate).items()}
        return join_draft(job.draft, arrays, job.config.dtype)

    program = TrainProgram(build, job.draft.num_tokens, job.config, job.optimizer, mesh)

    def step(state: Any, batch: Batch, head: Array, mask_embedding: Array) -> tuple[Any, Any]:
        before = state.graphstate, state.opt_state
        (graphstate, opt_state), sums = program.step(before, batch, head, mask_embedding)
        state = state.replace(step=state.step + 1, graphstate=graphstate, opt_state=opt_state)
        return state, metrics(loss=sums["weighted"] / sums["weight"], other_metrics=sums)

    return step


def _kept(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of the trainer that keeps its exception: EasyDeL silently ends a run at a TypeError or Ctrl-C."""

    @functools.wraps(method)
    def call(self: Any, *arguments: Any, **settings: Any) -> Any:
        try:
            return method(self, *arguments, **settings)
        except BaseException as error:
            self.raised = error
            raise

    return call


@functools.cache
def _trainer_class(package: Any) -> Any:
    """EasyDeL's `Trainer`, with our batches, step, figures and checkpoints."""
    protocol = package.trainers.trainer_protocol

    class DraftTrainer(package.Trainer):
        def __init__(self, job: _Job, **settings: Any):
            self.job = job
            self.sums: list[dict[str, Any]] = []
            self.raised: BaseException | None = None
            super().__init__(**settings)

        # ---- batches: in the order given by the seed, from the state's step on

        def configure_dataloaders(self) -> Any:
            steps = self.job.config.steps
            batches = (batch for _, batch, _ in ahead(self.job.batches, int(self.model_state.step), steps))
            return protocol.TrainerConfigureDataloaderOutput(dataloader_train=batches, max_training_steps=steps)

        def _fast_forward_batches(self, data_iter: Any, *_: Any) -> Any:
            return data_iter

        def _preprocess_batch_input(self, state: Any, batch: Batch, is_train: bool) -> tuple[Batch, dict]:  # noqa: ARG002
            # Its own would drop bfloat16 arrays.
            return jax.device_put(batch, NamedSharding(self.mesh, ROWS)), {}

        # ---- the step

        def _configure_state(self) -> None:
            """Raises where EasyDeL only warns: that it can't resume, or only without the optimizer's moments."""
            state, latest = self.model_state, self.job.latest
            resumed = self._resumed_from_checkpoint and state.opt_state is not None
            if latest is not None and not (resumed and int(state.step) == step_of(latest)):
                raise TrainingError(
                    f"EasyDeL can't resume from {latest}, as its warning says, and would start again from step 0: move "
                    "that checkpoint away to resume from the one before it, or give another directory for a new run"
                )
            self.metrics = open_metrics(self.job.settings.root, int(state.step))
            super()._configure_state()

        def configure_functions(self) -> Any:
            job, metrics = self.job, package.infra.loss_utils.LossMetrics
            self._train_shared_fn_extra_args = place_target(self.mesh, job.config, job.head, job.mask_embedding)
            return protocol.TrainerConfigureFunctionOutput(
                sharded_training_step_function=jax.jit(_step(job, self.mesh, metrics), donate_argnums=0),
                mesh=self.mesh,
                checkpoint_manager=self.arguments.get_streaming_checkpointer(),
            )

        def _execute_train_step(self, *arguments: Any, **settings: Any) -> Any:
            state, metrics, stopped = super()._execute_train_step(*arguments, **settings)
            if stopped is not None:
                # The step has already donated the state's memory: there is nothing to save.
                raise stopped
            return state, metrics, None

        def _prepare_training_output(self, state: Any, run_exception: BaseException | None = None) -> Any:
            """Saves a checkpoint, also if waiting for a batch was interrupted."""
            self.raised = self.raised or run_exception
            return super()._prepare_training_output(state=state, run_exception=run_exception)

        # ---- what is saved

        @_kept
        def log_metrics(self, metrics: Mapping[str, Any], pbar: Any, step: int, **_: Any) -> None:
            """Writes a line of metrics.jsonl from time to time. Raises TrainingError if the step was not finite."""
            job = self.job
            sums = {name: metrics[f"train/{name}"] for name in (*SUMS, "gradient_norm", "finite")}
            check_step(step, sums, job.batches, latest_run(job.settings.root))
            self.sums.append(sums)
            pbar.update(1)
            if step % job.settings.log_every and not self._saves(step):
                return
            figures = means({name: sum(float(s[name]) for s in self.sums) for name in SUMS})
            self.sums.clear()
            line = {"step": step, **figures, "learning_rate": float(learning_rate(job.config)(step - 1))}
            write_line(self.metrics, line | {"gradient_norm": float(sums["gradient_norm"])})
            pbar.set_postfix(loss=f"{figures['loss']:.3f}", accept=f"{figures['accept_len_mean']:.2f}")

        def _saves(self, step: int) -> bool:
            return step % self.job.settings.save_every == 0 or step == self.job.config.steps

        @_kept
        def _save_checkpoint_for_step(self, state: Any, *, step: int, force: bool = False, **_: Any) -> str | None:
            """Writes EasyDeL's files atomically, with the SHA-256 of every array."""
            settings = self.job.settings
            if not force and not self._saves(step):
                return None
            if step not in completed_runs(settings.root):
                with new_run(settings.root, step, settings.keep) as folder:
                    self._save_state(state, save_directory=folder)
                    _identify(folder, self.job.identity)
                    add_hashes(folder)
            return str(settings.root / f"run-{step}")

    return DraftTrainer
