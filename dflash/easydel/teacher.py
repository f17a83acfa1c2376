"""EasyDeL's forward as a teacher, corrected where it deviates from the model, and how far it is off without that.

Each correction first checks what the installed version does, so a deviation that is fixed there is left alone.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from dflash import easydel
from dflash.config import TargetConfig
from dflash.easydel.door import VERSION
from dflash.models.layers import rope_tables
from dflash.models.llama import Llama
from dflash.training.cache.source import FeatureReader

# Above rounding in float32, and far below what each deviation does.
_SAME_TABLE = 1e-4
# The experts' bfloat16, another deviation, rounds a weight of up to 1 by less.
_SAME_WEIGHTS = 0.02
# Checking a window takes several masks of twice its length on both sides: 4 GiB each for a window of 32768.
_LONGEST_LOOK = 1024


def _rope_rows(config: TargetConfig, positions: Array) -> Array:
    """What EasyDeL's table should hold for positions int32 [B, T]: cos and sin, float32 [B * T, head_dim]."""
    cos, sin = rope_tables(config.rope, config.head_dim, positions)
    return jnp.concatenate([cos, sin]).reshape(config.head_dim, -1).T


def _table_is_off(model: Any, config: TargetConfig) -> bool:
    table = np.asarray(model.model.frequencies.get_value(), np.float32)
    positions = np.minimum([[1, 7, 63, 511]], len(table) - 1)
    table = table[positions[0]]
    return bool(np.abs(table - _rope_rows(config, jnp.asarray(positions))).max() > _SAME_TABLE)


def _routing_is_off(model: Any, config: TargetConfig) -> bool:
    """If each expert returns a one in its own place, the layer's output is the routing weights."""
    if config.experts is None:
        return False
    count, hidden = config.experts.count, config.hidden_size
    graph, weights = nnx.split(model.model.layers[0].mlp)
    x = np.random.default_rng(0).standard_normal((1, 16, hidden)).astype(np.float32)

    @jax.jit
    def outputs(weights: Any) -> tuple[Array, Array]:
        mlp = nnx.merge(graph, weights)
        down, router = mlp.experts.down_proj, mlp.router
        down.kernel.set_value(jnp.zeros_like(down.kernel.get_value()))
        down.bias.set_value(jnp.eye(count, hidden, dtype=down.bias.get_value().dtype))
        logits = jnp.asarray(x[0]) @ router.kernel.get_value() + router.bias.get_value()
        return mlp(jnp.asarray(x))[0][0, :, :count], logits

    given, logits = outputs(weights)
    top, chosen = jax.lax.top_k(logits.astype(jnp.float32), config.experts.per_token)
    wanted = jnp.zeros(logits.shape).at[jnp.arange(len(logits))[:, None], chosen].set(jax.nn.softmax(top))
    return bool(jnp.abs(given - wanted).max() > _SAME_WEIGHTS)


def _experts_round(model: Any, config: TargetConfig) -> bool:
    return config.experts is not None and jnp.dtype(model.model.layers[0].mlp.dtype) != jnp.dtype(model.dtype)


def _window_is_off(model: Any, config: TargetConfig) -> bool:
    """Whether the wrong layers have a window, or the last of many tokens sees more or fewer keys than the window."""
    attentions = [layer.self_attn for layer in model.model.layers]
    # True for a Qwen with `use_sliding_window: false`.
    if [a.sliding_window is None for a in attentions] != [window is None for window in config.windows]:
        return True
    layer = next((i for i, window in enumerate(config.windows) if window is not None), None)
    if layer is None:
        return False
    attention, window = attentions[layer], config.windows[layer]
    assert window is not None
    # The method takes the window as an argument and compares differences of positions with it, so a shorter window
    # shows the same error.
    theirs, shorter = attention.sliding_window, max(window - _LONGEST_LOOK, 0)
    left, right = theirs if isinstance(theirs, tuple) else (theirs, theirs)
    length = 2 * (window - shorter) + 2
    keys = jnp.zeros((1, length, 1, 1))
    causal = jnp.tril(jnp.ones((1, 1, length, length), bool))
    mask = SimpleNamespace(attention_mask=causal, replace=lambda **changes: SimpleNamespace(**changes))
    *_, seen, _ = attention._apply_sliding_window(
        key=keys,
        value=keys,
        mask_info=mask,
        mode="train",
        cache_view=None,
        sliding_window=(left - shorter, right),
        query_length=length,
        masking_details=None,
        cache_metadata=None,
    )
    return int(seen.attention_mask[0, 0, -1].sum()) != window - shorter


def _leave(_model: Any, _config: TargetConfig) -> None:
    """Changes nothing: rows of the table are passed with every call."""


def _unhook(model: Any, _config: TargetConfig) -> None:
    for layer in model.model.layers:
        layer.mlp.moe_hooks = layer.mlp.moe_hooks.replace(after_gate=None, refine_weights_hook=None)


def _compute_experts(model: Any, _config: TargetConfig) -> None:
    for layer in model.model.layers:
        layer.mlp.dtype = model.dtype


def _narrow_windows(model: Any, config: TargetConfig) -> None:
    for layer, window in zip(model.model.layers, config.windows, strict=True):
        layer.self_attn.sliding_window = None if window is None else (window - 1, 0)


@dataclasses.dataclass(frozen=True, slots=True)
class Correction:
    """One deviation from the model: whether it is present, its correction, and its effect on a draft in words."""

    name: str
    needed: Callable[[Any, TargetConfig], bool]
    apply: Callable[[Any, TargetConfig], None]
    harm: str


ROPE = Correction(
    "rotary table",
    _table_is_off,
    _leave,
    "cos and sin are kept in bfloat16 and YaRN's `truncate: false` is ignored, so positions blur more the "
    "further apart tokens are: the draft learns where things stand from features that no server gives it",
)
CORRECTIONS = (
    ROPE,
    Correction(
        "routing",
        _routing_is_off,
        _unhook,
        "routing weights go through softmax three times, so every expert that is chosen weighs nearly the same: the "
        "draft learns the features and the next tokens of another model",
    ),
    Correction(
        "expert dtype",
        _experts_round,
        _compute_experts,
        "experts compute in bfloat16 whatever is asked for: in float32 the features are noisier than the target's own",
    ),
    Correction(
        "sliding window",
        _window_is_off,
        _narrow_windows,
        "a window of W shows W + 1 keys: after the first W tokens every feature of a sliding layer mixes in one "
        "token that the target does not see there; and Qwen's `use_sliding_window: false` is passed over: a layer "
        "that should see everything sees a window",
    ),
)


class Teacher:
    """EasyDeL's model without a cache, with those of the requested corrections that it needs (`applied`).

    `model` is modified. Every call is jitted: run eagerly, it would search for kernels.
    """

    def __init__(self, model: Any, config: TargetConfig, corrections: Sequence[Correction] = CORRECTIONS):
        self.config = config
        self._mesh = model.mesh
        with easydel.isolated(), self._mesh:
            self.applied = tuple(c for c in corrections if c.needed(model, config))
            for correction in self.applied:
                correction.apply(model, config)
            self._table = None if ROPE in self.applied else model.model.frequencies.get_value()
        self.name = f"easydel {VERSION}, corrected: {', '.join(c.name for c in self.applied) or 'nothing'}"
        graph, self._weights = nnx.split(model)
        self._run = jax.jit(lambda *arguments: _run(graph, *arguments))

    def forward(self, tokens: Array, positions: Array | None = None) -> tuple[Array, list[Array]]:
        """The result of `Llama.forward` for tokens int32 [B, T]: logits [B, T, V] and L outputs of layers [B, T, H]."""
        tokens = jnp.asarray(tokens, jnp.int32)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        table, rows = self._table, jnp.asarray(positions, jnp.int32)
        if table is None:
            # Rows for exactly these positions: no table of 131072 rows, and no last row to clamp later positions to.
            table, rows = _rope_rows(self.config, rows), jnp.arange(tokens.size).reshape(tokens.shape)
        with easydel.isolated(), self._mesh:
            return self._run(self._weights, tokens, table, rows)


def _run(graph: Any, weights: Any, tokens: Array, table: Array, rows: Array) -> tuple[Array, list[Array]]:
    model = nnx.merge(graph, weights)
    base = model.model
    # The last layer's output is only available after the final norm, so the norm is disabled, in a copy.
    norm = base.norm
    vars(base).update(norm=lambda x: x, frequencies=table)
    out = base(
        input_ids=tokens,
        attention_mask=jnp.ones(tokens.shape, bool),
        position_ids=rows,
        output_hidden_states=True,
    )
    last = out.last_hidden_state
    logits = model.apply_lm_head(norm(last))
    # Entry i is the input of layer i; some families add one after the last.
    return logits.astype(jnp.float32), [*out.hidden_states[1 : len(base.layers)], last]


def load_teacher(target: Llama, directory: Path) -> Teacher:
    """EasyDeL's corrected forward with the weights of our target; `directory` has its config.json.

    Raises EasyDelError if EasyDeL is not installed.
    """
    return Teacher(easydel.from_target(target, directory), target.config)


class TeacherReader(FeatureReader):
    """Features for a cache from EasyDeL's forward."""

    def __init__(self, teacher: Teacher, layer_ids: Sequence[int]):
        self._teacher, self._layer_ids = teacher, tuple(layer_ids)

    def _bits(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        _, outputs = self._teacher.forward(jnp.asarray(tokens), jnp.asarray(positions))
        rows = jnp.concatenate([outputs[i] for i in self._layer_ids], axis=-1).astype(jnp.bfloat16)
        return np.asarray(jax.lax.bitcast_convert_type(rows, jnp.uint16))


@dataclasses.dataclass(frozen=True, slots=True)
class Deviation:
    """How far a teacher is from our forward: largest difference of logits and of features, share of equal argmax."""

    corrected: str
    logits: float
    argmax: float
    features: float


def audit_teacher(target: Llama, directory: Path, tokens: np.ndarray) -> tuple[list[Deviation], Teacher]:
    """EasyDeL unchanged, then with one more correction at a time, against our forward of tokens int [B, T].

    Corrections that this target and version don't need are left out. Returns the rows of the table, and the teacher
    with all corrections. `directory` has the target's config.json.
    """
    wanted, features = target.forward(jnp.asarray(tokens))
    best = wanted.argmax(axis=-1)
    rows = []
    teacher: Teacher | None = None
    for count in range(len(CORRECTIONS) + 1):
        teacher = None  # dropped before the next one is made, since each holds a model
        teacher = Teacher(easydel.from_target(target, directory), target.config, CORRECTIONS[:count])
        if count and CORRECTIONS[count - 1] not in teacher.applied:
            continue
        logits, outputs = teacher.forward(jnp.asarray(tokens))
        off = [float(jnp.abs(a - b).max()) for a, b in zip(outputs, features, strict=True)]
        name = CORRECTIONS[count - 1].name if count else ""
        share = float((logits.argmax(axis=-1) == best).mean())
        rows.append(Deviation(name, float(jnp.abs(logits - wanted).max()), share, max(off)))
    assert teacher is not None
    return rows, teacher
