"""Teacher cache -> draft over a dp x tp mesh, in one compiled step.

The draft is replicated; the batch is split over `dp`; the target's frozen head is split over `tp` along the vocabulary.
No target runs here.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding

from dflash.config import Checked, Computed, ConfigError, Count, DraftConfig, Fraction, Positive, Seed, Size
from dflash.metrics import round_up
from dflash.models.draft import Draft
from dflash.models.mesh import DP, ROWS, TP, WHOLE, gather, split_by, spread
from dflash.training.batches import Batch
from dflash.training.loss import pad_head
from dflash.training.objective import SUMS, Objective, block_sums, predict_blocks, trained_head

# Makes the draft that computes, in the dtype of computation, from the trained state.
Build = Callable[[Any], Draft]

# How the head is split, and what a program takes: weights, batch, head and mask embedding.
_VOCABULARY = split_by("vocab")
_SPLIT = (WHOLE, ROWS, _VOCABULARY, WHOLE)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(Checked):
    """What a training run does. Master weights and optimizer state are float32 whatever `dtype` says."""

    steps: Count = 2000
    """Steps of the optimizer."""
    batch_size: Count = 32
    """Rows (sequences or windows) per step, over all devices."""
    num_anchors: Count = 32
    """Anchors drawn in each sequence per step."""
    accumulation: Count = 1
    """Parts that a batch is split into, computed one after another."""
    learning_rate: Positive = 6e-4
    """Peak learning rate."""
    warmup: Fraction = 0.04
    """Share of the steps in which the rate rises."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the rate changes afterwards."""
    weight_decay: Size = 0.0
    """AdamW's weight decay; norms don't decay."""
    beta1: Fraction = 0.9
    """AdamW's decay of gradients."""
    beta2: Fraction = 0.95
    """AdamW's decay of squared gradients: closer to 1 averages over more steps, which small steps need."""
    clip: Size = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""
    dtype: Computed = "float32"
    """Dtype of computation; weights and optimizer state are float32."""
    remat: bool = False
    """Recompute layers for the gradient instead of keeping their activations."""
    dp: Count = 1
    """Devices that the batch is split over."""
    tp: Count = 1
    """Devices that the vocabulary is split over."""
    seed: Seed = 0
    """Seed of the weights, the order of rows and the anchors."""
    objective: tyro.conf.OmitArgPrefixes[Objective] = dataclasses.field(default_factory=Objective)

    def __post_init__(self) -> None:
        parts, fits = self.dp * self.accumulation, "batch_size must be divisible by dp x accumulation"
        uneven = parts > 0 and self.batch_size % parts
        self.check(*[f"{fits}, got {self.batch_size}, {self.dp} and {self.accumulation}"] if uneven else [])


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up to `learning_rate`, then constant, or falling to 0 one step after the last."""
    warmup = round(config.warmup * config.steps)
    rest = max(config.steps - warmup, 1)
    after = {
        "constant": optax.constant_schedule(config.learning_rate),
        "linear": optax.linear_schedule(config.learning_rate, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(config.learning_rate, rest),
    }[config.schedule]
    # From 1, not 0: a first step at rate 0 would be wasted.
    rise = optax.linear_schedule(config.learning_rate / max(warmup, 1), config.learning_rate, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup]) if warmup else after


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW. Norm weights don't decay."""

    def decays(params: Any) -> Any:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    adamw = optax.adamw(
        learning_rate(config), b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay, mask=decays
    )
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw) if config.clip else adamw


@dataclasses.dataclass(frozen=True)
class TrainProgram:
    """What is compiled to train a draft of `vocab_size` tokens, over a mesh with axes dp and tp.

    Of every method `params` are the trained weights, head [V, H] and mask_embedding [H] the target's.
    """

    build: Build
    vocab_size: int
    config: TrainConfig
    optimizer: optax.GradientTransformation
    mesh: Mesh

    def _sums(self, params: Any, batch: Batch, head: Array, mask_embedding: Array) -> dict[str, Array]:
        """`block_sums` of this device's rows."""
        predictions = predict_blocks(
            self.build(params),
            batch,
            mask_embedding,
            head,
            vocab_size=self.vocab_size,
            chunk=self.config.objective.chunk,
            axis=TP if self.config.tp > 1 else None,
            remat=self.config.remat,
        )
        return block_sums(predictions, batch, self.config.objective)

    def _gradient(self, params: Any, batch: Batch, head: Array, mask_embedding: Array) -> tuple[Any, dict[str, Array]]:
        """Gradient and sums of this device's rows, summed over dp, as every device applies them."""

        def loss(params: Any, part: Batch) -> tuple[Array, dict[str, Array]]:
            sums = self._sums(params, part, head, mask_embedding)
            return sums["weighted"], sums

        def add(total: Any, part: Batch) -> tuple[Any, None]:
            (_, sums), gradient = jax.value_and_grad(loss, has_aux=True)(params, part)
            return jax.tree.map(jnp.add, total, (gradient, sums)), None

        parts = jax.tree.map(lambda x: x.reshape(self.config.accumulation, -1, *x.shape[1:]), batch)
        zeros = jax.tree.map(jnp.zeros_like, params), {name: jnp.float32(0) for name in SUMS}
        total, _ = jax.lax.scan(add, zeros, parts)
        gradient, sums = jax.lax.psum(total, DP)
        # The weights are constants, so the loss's gradient is that of its numerator, divided at the end.
        scale = 1 / jnp.where(sums["weight"] > 0, sums["weight"], 1)
        return jax.tree.map(lambda g: g * scale, gradient), sums

    def step(
        self, state: tuple[Any, Any], batch: Batch, head: Array, mask_embedding: Array
    ) -> tuple[tuple[Any, Any], dict[str, Array]]:
        """One step of the optimizer; `state` is the trained weights and their moments.

        A step that is not finite changes nothing; the caller sees it in the sums and stops.
        """
        params, moments = state
        gradient, sums = spread(self._gradient, self.mesh, _SPLIT, WHOLE)(params, batch, head, mask_embedding)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(norm) & jnp.isfinite(sums["weighted"])
        updates, new_moments = self.optimizer.update(gradient, moments, params)
        new = optax.apply_updates(params, updates), new_moments
        kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        return kept, sums | {"gradient_norm": norm, "finite": finite}

    def score(self, params: Any, batch: Batch, head: Array, mask_embedding: Array) -> dict[str, Array]:
        """The sums of a batch, over all devices."""

        def local(*inputs: Any) -> dict[str, Array]:
            return jax.lax.psum(self._sums(*inputs), DP)

        return spread(local, self.mesh, _SPLIT, WHOLE)(params, batch, head, mask_embedding)


def _graph(config: DraftConfig, dtype: jnp.dtype) -> Any:
    """The structure of a draft that computes in `dtype`."""
    return nnx.graphdef(nnx.eval_shape(lambda: Draft(config, dtype=dtype, rngs=nnx.Rngs(0))))


def _program(
    draft: DraftConfig, config: TrainConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainProgram:
    dtype = jnp.dtype(config.dtype)
    graph = _graph(draft, dtype)

    def build(params: Any) -> Draft:
        return nnx.merge(graph, jax.tree.map(lambda p: p.astype(dtype), params))

    return TrainProgram(build, draft.num_tokens, config, optimizer, mesh)


def abstract_batch(
    draft: DraftConfig, config: TrainConfig, context: int, sharding: NamedSharding | None = None
) -> Batch:
    """The shapes and dtypes of a batch of rows of `context` tokens."""

    # It stands where arrays do.
    def at(*shape: int, dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((config.batch_size, *shape), dtype, sharding=sharding)

    A, S, H = config.num_anchors, draft.block_size, draft.hidden_size
    return Batch(
        features=at(context, draft.num_features * H, dtype=jnp.uint16),
        starts=at(dtype=jnp.int32),
        anchors=at(A, dtype=jnp.int32),
        anchor_ids=at(A, dtype=jnp.int32),
        anchor_embedding=at(A, H, dtype=config.dtype),
        labels=at(A, S - 1, dtype=jnp.int32),
        mask=at(A, S - 1, dtype=jnp.float32),
    )


def lower_step(draft: DraftConfig, config: TrainConfig, mesh: Mesh, *, context: int) -> jax.stages.Lowered:
    """A training step for rows of `context` tokens, lowered for the devices of a mesh that may only be described."""
    optimizer = make_optimizer(config)
    whole, rows, vocabulary = (NamedSharding(mesh, spec) for spec in (WHOLE, ROWS, _VOCABULARY))

    def at(sharding: NamedSharding, *shape: int, dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    params = nnx.state(nnx.eval_shape(lambda: Draft(draft, dtype=jnp.float32, rngs=nnx.Rngs(0))))
    state = jax.tree.map(lambda a: at(whole, *a.shape, dtype=a.dtype), (params, jax.eval_shape(optimizer.init, params)))
    head = at(vocabulary, round_up(draft.num_tokens, config.tp), draft.hidden_size, dtype=config.dtype)
    step = jax.jit(_program(draft, config, optimizer, mesh).step, donate_argnums=0)
    batch = abstract_batch(draft, config, context, rows)
    return step.lower(state, batch, head, at(whole, draft.hidden_size, dtype=config.dtype))


def place_target(
    mesh: Mesh, config: TrainConfig, head: Array | np.ndarray, mask_embedding: Array | np.ndarray
) -> tuple[Array, Array]:
    """The target's head, split over tp, and its mask embedding, replicated; in the dtype of computation."""
    padded = pad_head(jnp.asarray(head, config.dtype), config.tp)
    mask = jnp.asarray(mask_embedding, config.dtype)
    return jax.device_put((padded, mask), (NamedSharding(mesh, _VOCABULARY), NamedSharding(mesh, WHOLE)))


class Trainer:
    """A draft in training. `head` [V, H] and `mask_embedding` [H] are the target's, frozen.

    It keeps only the head's rows for tokens that the draft proposes.
    """

    def __init__(self, draft: Draft, head: Array | np.ndarray, mask_embedding: Array | np.ndarray, config: TrainConfig):
        if jax.device_count() < config.dp * config.tp:
            raise ConfigError(
                f"dp x tp must not exceed the devices here, {jax.device_count()}; got {config.dp} x {config.tp}"
            )
        self.config, self.draft_config = config, draft.config
        self.mesh = jax.make_mesh(
            (config.dp, config.tp),
            (DP, TP),
            devices=jax.devices()[: config.dp * config.tp],
            axis_types=(jax.sharding.AxisType.Auto,) * 2,
        )
        self.optimizer = make_optimizer(config)
        params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), nnx.state(gather(draft)))
        self.state = self._own(params, self.optimizer.init(params))
        rows = trained_head(draft.config, head)
        self.head, self.mask_embedding = place_target(self.mesh, config, rows, mask_embedding)
        program = _program(draft.config, config, self.optimizer, self.mesh)
        self._step, self._score = jax.jit(program.step, donate_argnums=0), jax.jit(program.score)
        self._batch_sharding = NamedSharding(self.mesh, ROWS)

    def _own(self, params: Any, moments: Any) -> tuple[Any, Any]:
        """A state on every device, copied, because a step donates its buffers (`may_alias=False` may still alias)."""
        return jax.device_put(jax.tree.map(jnp.array, (params, moments)), NamedSharding(self.mesh, WHOLE))

    def step(self, batch: Batch) -> dict[str, Array]:
        """Trains on one batch. Returns its sums, `gradient_norm` and `finite`: device scalars, maybe still pending."""
        batch = jax.device_put(batch, self._batch_sharding)
        self.state, sums = self._step(self.state, batch, self.head, self.mask_embedding)
        return sums

    def score(self, batch: Batch) -> dict[str, Array]:
        """The sums of a batch with the current draft; changes nothing."""
        batch = jax.device_put(batch, self._batch_sharding)
        return self._score(self.state[0], batch, self.head, self.mask_embedding)

    def restore(self, draft: Draft, moments: Any) -> None:
        """Continues from the weights and the optimizer state of a checkpoint."""
        self.state = self._own(nnx.state(gather(draft)), moments)

    def draft(self) -> Draft:
        """The current draft, float32; later steps don't change it."""
        params = jax.device_put(jax.tree.map(jnp.array, self.state[0]), self.mesh.devices.flat[0])
        return nnx.merge(_graph(self.draft_config, jnp.dtype("float32")), params)


def step_flops(draft: DraftConfig, batch: Batch) -> float:
    """Floating point operations of the matrix products that one step needs (recomputing them is not counted).

    Context: fc forward and weight gradient, keys and values of every layer. Blocks: every product of every layer, three
    times (forward and both gradients), with attention over the most that a block may see. Head: logits and their
    gradient.
    """
    B, C, _ = batch.features.shape
    A, drafted = batch.labels.shape[1:]
    H, inner, kv = draft.hidden_size, draft.num_heads * draft.head_dim, 2 * draft.num_kv_heads * draft.head_dim
    context = B * C * (2 * 2 * draft.num_features * H * H + draft.num_layers * 3 * 2 * H * kv)
    per_layer = 2 * H * (2 * inner + kv + 3 * draft.intermediate_size) + 4 * inner * (C + drafted + 1)
    blocks = B * A * (drafted + 1) * draft.num_layers * 3 * per_layer
    # A selector's candidates take one more product with the head.
    products = 2 if draft.selector is None else 3
    head = B * A * drafted * products * 2 * H * draft.num_tokens
    return float(context + blocks + head)
