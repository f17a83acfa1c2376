"""What a step must do at least on one device: the bytes that it has to read, and the products that it has to make."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from dflash.compiled.programs import device_bytes, device_size
from dflash.compiled.topology import Chip
from dflash.config import DraftConfig
from dflash.measuring.steps import weights_of_step
from dflash.models.draft import Draft
from dflash.models.llama import Llama
from dflash.models.mesh import DP, TP, ways
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
    state = 3 * device_bytes(nnx.state(network))
    head = draft.num_tokens * draft.hidden_size * jnp.dtype(config.dtype).itemsize / config.tp
    flops = step_flops(draft, abstract_batch(draft, config, context))
    return Floor(hbm_bytes=2 * state + head, flops=flops / (config.dp * config.tp))


def _attention(network: Llama | Draft, rows: int, tokens: int, context: int, itemsize: int) -> Floor:
    """Keys and values of `rows` x `context` tokens, read once, and their products with `tokens` queries a row."""
    c, split = network.config, ways(network.mesh, TP)
    kv_heads = max(c.num_kv_heads, split) / split
    seen = sum(min(context, w) if w is not None else context for w in c.windows)
    return Floor(
        hbm_bytes=2.0 * rows * seen * kv_heads * c.head_dim * itemsize,
        flops=4.0 * rows * tokens * seen * c.num_heads / split * c.head_dim,
    )


def target_floor(target: Llama, *, batch: int, tokens: int, context: int) -> Floor:
    """A forward of `tokens` tokens of each of `batch` rows behind `context` committed ones."""
    rows = batch // ways(target.mesh, DP)
    columns = rows * tokens
    nbytes = flops = 0.0
    for array, read, multiplied in weights_of_step(target, columns):
        size = device_size(array)
        nbytes += read * size * array.dtype.itemsize
        flops += 2 * multiplied * size * columns
    return Floor(hbm_bytes=nbytes, flops=flops) + _attention(target, rows, tokens, context, target.dtype.itemsize)


def draft_floor(target: Llama, draft: Draft, *, batch: int, tokens: int, context: int) -> Floor:
    """Proposing a block of `tokens` for each of `batch` rows: the draft's weights, its context, the target's head."""
    rows = batch // ways(draft.mesh, DP)
    columns = rows * tokens
    head = (target.embedding if target.head is None else target.head).weight.get_value()
    proposed = device_size(head) * draft.config.num_tokens / draft.config.vocab_size
    weights = nnx.state(draft)
    read = device_bytes(weights) + proposed * head.dtype.itemsize
    flops = 2 * columns * (sum(device_size(array) for array in jax.tree.leaves(weights)) + proposed)
    return Floor(hbm_bytes=read, flops=flops) + _attention(draft, rows, tokens, context, draft.dtype.itemsize)
