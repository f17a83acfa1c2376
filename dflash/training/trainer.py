"""Teacher cache -> draft, over a dp x tp mesh: one compiled step, and the loop around it that saves and resumes.

The draft is replicated; the batch is split over `dp`; the target's frozen head is split over `tp` along the vocabulary.
No target runs here.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dflash.config import ConfigError, DraftConfig
from dflash.models.draft import Draft
from dflash.training.batches import Batch
from dflash.training.loss import pad_head
from dflash.training.objective import SUMS, Objective, block_sums, predict_blocks, trained_head
from dflash.weights.huggingface import DTYPES

SCHEDULES = ("constant", "linear", "cosine")

# Makes the draft that computes, in the dtype of computation, of what is trained.
Build = Callable[[Any], Draft]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """What a training run does. `warmup` is a share of the steps; `batch_size` counts rows over all devices.

    Master weights and optimizer state are float32 whatever `dtype` the networks compute in.
    """

    steps: int = 2000
    batch_size: int = 32
    num_anchors: int = 32
    accumulation: int = 1
    learning_rate: float = 6e-4
    warmup: float = 0.04
    schedule: str = "cosine"
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    dtype: str = "float32"
    remat: bool = False
    dp: int = 1
    tp: int = 1
    seed: int = 0
    objective: Objective = dataclasses.field(default_factory=Objective)

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "num_anchors", "accumulation", "dp", "tp")
        faults = [f"{n} must be at least 1, got {getattr(self, n)}" for n in counts if getattr(self, n) < 1]
        if self.schedule not in SCHEDULES:
            faults.append(f"schedule must be one of {list(SCHEDULES)}, got {self.schedule!r}")
        if self.dtype not in DTYPES:
            faults.append(f"dtype must be one of {sorted(DTYPES)}, got {self.dtype!r}")
        if not 0 < self.learning_rate < math.inf:
            faults.append(f"learning_rate must be a number above 0, got {self.learning_rate}")
        for name in ("weight_decay", "clip", "seed"):
            if not getattr(self, name) >= 0:
                faults.append(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                faults.append(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            faults.append(f"warmup is a share of the steps, 0 to 1, got {self.warmup}")
        parts = self.dp * self.accumulation
        if parts > 0 and self.batch_size % parts:
            faults.append(
                f"batch_size must divide by dp x accumulation, got {self.batch_size}, {self.dp} and {self.accumulation}"
            )
        if faults:
            raise ConfigError("; ".join(faults))


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up to `learning_rate`, then constant, or down to 0, which a step after the last would have."""
    warmup = round(config.warmup * config.steps)
    rest = max(config.steps - warmup, 1)
    after = {
        "constant": optax.constant_schedule(config.learning_rate),
        "linear": optax.linear_schedule(config.learning_rate, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(config.learning_rate, rest),
    }[config.schedule]
    # From 1, not 0: a first step at rate 0 is a step lost.
    rise = optax.linear_schedule(config.learning_rate / max(warmup, 1), config.learning_rate, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup]) if warmup else after


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW behind clipping by global norm. Norm weights don't decay."""

    def decays(params: Any) -> Any:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    adamw = optax.adamw(
        learning_rate(config), b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay, mask=decays
    )
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw) if config.clip else adamw


def _local_sums(
    build: Build, vocab_size: int, config: TrainConfig, params: Any, batch: Batch, head: Array, mask_embedding: Array
) -> dict[str, Array]:
    """`block_sums` of this device's rows."""
    predictions = predict_blocks(
        build(params),
        batch,
        mask_embedding,
        head,
        vocab_size=vocab_size,
        chunk=config.objective.chunk,
        axis="tp" if config.tp > 1 else None,
        remat=config.remat,
    )
    return block_sums(predictions, batch, config.objective)


def _local_gradient(
    build: Build, vocab_size: int, config: TrainConfig, params: Any, batch: Batch, head: Array, mask_embedding: Array
) -> tuple[Any, dict[str, Array]]:
    """Gradient and sums of this device's rows, summed over dp: what every device applies."""

    def loss(params: Any, part: Batch) -> tuple[Array, dict[str, Array]]:
        sums = _local_sums(build, vocab_size, config, params, part, head, mask_embedding)
        return sums["weighted"], sums

    def add(total: Any, part: Batch) -> tuple[Any, None]:
        (_, sums), gradient = jax.value_and_grad(loss, has_aux=True)(params, part)
        return jax.tree.map(jnp.add, total, (gradient, sums)), None

    parts = jax.tree.map(lambda x: x.reshape(config.accumulation, -1, *x.shape[1:]), batch)
    zeros = jax.tree.map(jnp.zeros_like, params), {name: jnp.float32(0) for name in SUMS}
    total, _ = jax.lax.scan(add, zeros, parts)
    gradient, sums = jax.lax.psum(total, "dp")
    # The weights are constants, so the loss's gradient is that of its numerator, divided at the very end.
    scale = 1 / jnp.where(sums["weight"] > 0, sums["weight"], 1)
    return jax.tree.map(lambda g: g * scale, gradient), sums


def train_step(
    build: Build,
    vocab_size: int,
    config: TrainConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    state: tuple[Any, Any],
    batch: Batch,
    head: Array,
    mask_embedding: Array,
) -> tuple[tuple[Any, Any], dict[str, Array]]:
    """One step of the optimizer, over a mesh with axes dp and tp; `state` is what is trained, and its moments.

    What is not finite changes nothing: the caller sees it in the sums and stops.
    """
    params, moments = state
    local = jax.shard_map(
        partial(_local_gradient, build, vocab_size, config),
        mesh=mesh,
        in_specs=(P(), P("dp"), P("tp"), P()),
        out_specs=(P(), P()),
        check_vma=False,  # every sum over devices is written out above
    )
    gradient, sums = local(params, batch, head, mask_embedding)
    norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(norm) & jnp.isfinite(sums["weighted"])
    updates, new_moments = optimizer.update(gradient, moments, params)
    new = optax.apply_updates(params, updates), new_moments
    kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
    return kept, sums | {"gradient_norm": norm, "finite": finite}


def _score(
    build: Build,
    vocab_size: int,
    config: TrainConfig,
    mesh: Mesh,
    params: Any,
    batch: Batch,
    head: Array,
    mask_embedding: Array,
) -> dict[str, Array]:
    def local(*inputs: Any) -> dict[str, Array]:
        return jax.lax.psum(_local_sums(build, vocab_size, config, *inputs), "dp")

    specs = (P(), P("dp"), P("tp"), P())
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)(
        params, batch, head, mask_embedding
    )


def _graph(config: DraftConfig, dtype: jnp.dtype) -> Any:
    """The structure of a draft that computes in `dtype`."""
    return nnx.graphdef(nnx.eval_shape(lambda: Draft(config, dtype=dtype, rngs=nnx.Rngs(0))))


def _built(graph: Any, dtype: jnp.dtype, params: Any) -> Draft:
    return nnx.merge(graph, jax.tree.map(lambda p: p.astype(dtype), params))


def place_target(
    mesh: Mesh, config: TrainConfig, head: Array | np.ndarray, mask_embedding: Array | np.ndarray
) -> tuple[Array, Array]:
    """The target's head, split over tp, and mask embedding, on every device; in the dtype of computation."""
    padded = pad_head(jnp.asarray(head, config.dtype), config.tp)
    mask = jnp.asarray(mask_embedding, config.dtype)
    return jax.device_put((padded, mask), (NamedSharding(mesh, P("tp")), NamedSharding(mesh, P())))


class Trainer:
    """A draft in training. `head` [V, H] and `mask_embedding` [H] are the target's, frozen.

    Of the head it keeps the rows of the tokens that the draft proposes.
    """

    def __init__(self, draft: Draft, head: Array | np.ndarray, mask_embedding: Array | np.ndarray, config: TrainConfig):
        if jax.device_count() < config.dp * config.tp:
            raise ConfigError(
                f"dp x tp must not exceed the devices here, {jax.device_count()}; got {config.dp} x {config.tp}"
            )
        self.config, self.draft_config = config, draft.config
        self.mesh = jax.make_mesh(
            (config.dp, config.tp),
            ("dp", "tp"),
            devices=jax.devices()[: config.dp * config.tp],
            axis_types=(jax.sharding.AxisType.Auto,) * 2,
        )
        self.optimizer = make_optimizer(config)
        params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), nnx.state(draft))
        self.state = self._own(params, self.optimizer.init(params))
        rows = trained_head(draft.config, head)
        self.head, self.mask_embedding = place_target(self.mesh, config, rows, mask_embedding)
        compute, vocab_size = jnp.dtype(config.dtype), rows.shape[0]
        build = partial(_built, _graph(draft.config, compute), compute)
        step = partial(train_step, build, vocab_size, config, self.optimizer, self.mesh)
        self._step = jax.jit(step, donate_argnums=0)
        self._score = jax.jit(partial(_score, build, vocab_size, config, self.mesh))
        self._batch_sharding = NamedSharding(self.mesh, P("dp"))

    def _own(self, params: Any, moments: Any) -> tuple[Any, Any]:
        """A state on every device; of copies, since a step gives its buffers away (`may_alias=False` may alias)."""
        return jax.device_put(jax.tree.map(jnp.array, (params, moments)), NamedSharding(self.mesh, P()))

    def step(self, batch: Batch) -> dict[str, Array]:
        """Trains on one batch. Returns its sums, `gradient_norm` and `finite`: device scalars, maybe not yet there."""
        batch = jax.device_put(batch, self._batch_sharding)
        self.state, sums = self._step(self.state, batch, self.head, self.mask_embedding)
        return sums

    def score(self, batch: Batch) -> dict[str, Array]:
        """The sums of a batch with the draft as it is now; changes nothing."""
        batch = jax.device_put(batch, self._batch_sharding)
        return self._score(self.state[0], batch, self.head, self.mask_embedding)

    def restore(self, draft: Draft, moments: Any) -> None:
        """Goes on from the weights and the optimizer state of a checkpoint."""
        self.state = self._own(nnx.state(draft), moments)

    def draft(self) -> Draft:
        """The draft as it is now, float32; further steps leave it alone."""
        params = jax.device_put(jax.tree.map(jnp.array, self.state[0]), self.mesh.devices.flat[0])
        return nnx.merge(_graph(self.draft_config, jnp.dtype("float32")), params)


def step_flops(draft: DraftConfig, batch: Batch) -> float:
    """Floating point operations of the matrix products that one step needs (recomputing them is not counted).

    Context: fc forward and weight gradient, keys and values of every layer. Blocks: every product of every layer, three
    times (forward and both gradients), attention over what a block may see at most. Head: logits and their gradient.
    """
    B, C, _ = batch.features.shape
    A, drafted = batch.labels.shape[1:]
    H, inner, kv = draft.hidden_size, draft.num_heads * draft.head_dim, 2 * draft.num_kv_heads * draft.head_dim
    context = B * C * (2 * 2 * draft.num_features * H * H + draft.num_layers * 3 * 2 * H * kv)
    per_layer = 2 * H * (2 * inner + kv + 3 * draft.intermediate_size) + 4 * inner * (C + drafted + 1)
    blocks = B * A * (drafted + 1) * draft.num_layers * 3 * per_layer
    # A selector's candidates take a product with the head more.
    products = 2 if draft.selector is None else 3
    head = B * A * drafted * products * 2 * H * draft.num_tokens
    return float(context + blocks + head)
