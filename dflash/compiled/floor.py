"""What a step must do at least on one device: the bytes that it has to read, and the products that it has to make."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dflash.compiled.topology import Chip
from dflash.config import DraftConfig
from dflash.metrics import expected_awake
from dflash.models.draft import Draft
from dflash.models.llama import Llama
from dflash.training.trainer import TrainConfig, abstract_batch, step_flops


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Floor:
    """Bytes and floating point operations of a step on one device."""

    hbm_bytes: float
    flops: float

    def cycles(self, chip: Chip) -> float:
        """Whichever takes longer: reading, or multiplying."""
        return max(self.hbm_bytes / chip.bytes_per_cycle, self.flops / chip.flops_per_cycle)

    def __add__(self, other: "Floor") -> "Floor":
        return Floor(hbm_bytes=self.hbm_bytes + other.hbm_bytes, flops=self.flops + other.flops)


def training_floor(draft: DraftConfig, config: TrainConfig, *, context: int) -> Floor:
    """A training step on rows of `context` tokens: its products, and master weights and moments, read and written."""
    network = nnx.eval_shape(lambda: Draft(draft, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    state = 3 * sum(nbytes for _, _, nbytes in _weights(network))
    head = draft.num_tokens * draft.hidden_size * jnp.dtype(config.dtype).itemsize / config.tp
    flops = step_flops(draft, abstract_batch(draft, config, context))
    return Floor(hbm_bytes=2 * state + head, flops=flops / (config.dp * config.tp))


def _weights(network: Llama | Draft) -> Iterator[tuple[tuple[Any, ...], float, float]]:
    """Path, elements and bytes of every weight on one device."""
    for path, weight in nnx.to_flat_state(nnx.state(network)):
        array = weight.get_value()
        shape = array.sharding.shard_shape(array.shape) if array.sharding is not None else array.shape
        count = float(np.prod(shape))
        yield path, count, count * array.dtype.itemsize


def _attention(network: Llama | Draft, rows: int, tokens: int, context: int, itemsize: int) -> Floor:
    """Keys and values of `rows` x `context` tokens, read once, and their products with `tokens` queries a row."""
    c, split = network.config, network.mesh.shape["tp"] if network.mesh is not None else 1
    kv_heads = max(c.num_kv_heads, split) / split
    seen = sum(min(context, w) if w is not None else context for w in c.windows)
    return Floor(
        hbm_bytes=2.0 * rows * seen * kv_heads * c.head_dim * itemsize,
        flops=4.0 * rows * tokens * seen * c.num_heads / split * c.head_dim,
    )


def target_floor(target: Llama, *, batch: int, tokens: int, context: int) -> Floor:
    """A forward of `tokens` tokens of each of `batch` rows behind `context` committed ones.

    Of an untied embedding only the tokens' rows are read; of routed experts those that are expected to be awake.
    """
    dp = 1 if target.mesh is None else target.mesh.shape["dp"]
    rows, experts = batch // dp, target.config.experts
    columns = rows * tokens
    read = flops = 0.0
    for path, count, nbytes in _weights(target):
        if path[0] == "embedding" and target.head is not None:
            read += nbytes * min(1.0, columns / target.config.vocab_size)
        elif experts is not None and str(path[-1]).startswith(("gate_up", "down")):
            read += nbytes * expected_awake(experts.count, experts.per_token, columns) / experts.count
            flops += 2 * count * columns * experts.per_token / experts.count
        else:
            read += nbytes
            flops += 2 * count * columns
    return Floor(hbm_bytes=read, flops=flops) + _attention(target, rows, tokens, context, target.dtype.itemsize)


def draft_floor(target: Llama, draft: Draft, *, batch: int, tokens: int, context: int) -> Floor:
    """Proposing a block of `tokens` for each of `batch` rows: the draft's weights, its context, the target's head."""
    dp = 1 if draft.mesh is None else draft.mesh.shape["dp"]
    rows = batch // dp
    columns = rows * tokens
    head = target.embedding if target.head is None else target.head
    weight = head.weight.get_value()
    shape = weight.sharding.shard_shape(weight.shape) if weight.sharding is not None else weight.shape
    proposed = float(np.prod(shape)) * draft.config.num_tokens / draft.config.vocab_size
    counts = [(count, nbytes) for _, count, nbytes in _weights(draft)]
    read = sum(nbytes for _, nbytes in counts) + proposed * weight.dtype.itemsize
    flops = 2 * columns * (sum(count for count, _ in counts) + proposed)
    return Floor(hbm_bytes=read, flops=flops) + _attention(draft, rows, tokens, context, draft.dtype.itemsize)
