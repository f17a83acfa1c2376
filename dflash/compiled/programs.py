"""Our programs compiled for a described TPU: the networks abstract, nothing loaded, nothing run."""

import dataclasses
import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.stages import Lowered

from dflash.compiled.estimate import Part, before_loop, step
from dflash.compiled.hlo import Module, parse
from dflash.compiled.movement import Move, moves
from dflash.compiled.topology import CHIPS, Topology
from dflash.config import ConfigError, DraftConfig, TargetConfig, check_draft
from dflash.decoding.loop import DecodeShape, Programs, draft_head
from dflash.decoding.modes import Mode
from dflash.models.draft import Draft
from dflash.models.families import build
from dflash.models.llama import Llama
from dflash.models.mesh import make_mesh, place

# Tokens that a decode may write; what is left of a context is the prompt.
NEW_TOKENS = 256


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Networks:
    """A target and its draft on a mesh of described devices: shapes and shardings, no weights."""

    topology: Topology
    target: Llama
    draft: Draft | None
    dp: int
    tp: int


def abstract_networks(
    topology: Topology,
    target: TargetConfig,
    draft: DraftConfig | None,
    *,
    dp: int = 1,
    tp: int = 1,
    dtype: str = "bfloat16",
    experts: str | None = None,
) -> Networks:
    """The networks of these configs over dp x tp devices; experts are held in the dtype `experts`, if that is another.

    Raises ConfigError for a mesh that can't be, and for a draft that is another target's.
    """
    mesh = make_mesh(topology.devices, dp=dp, tp=tp)
    if draft is not None:
        check_draft(draft, target)
    return Networks(
        topology=topology,
        target=abstract_target(target, mesh, dtype=dtype, experts=experts),
        draft=None if draft is None else abstract_draft(draft, mesh, dtype=dtype),
        dp=dp,
        tp=tp,
    )


def abstract_target(config: TargetConfig, mesh: Any, *, dtype: str, experts: str | None = None) -> Llama:
    """Shapes and shardings of a target on a mesh, which may be an AbstractMesh. Raises ConfigError."""
    held = None if experts is None else jnp.dtype(experts)
    return place(nnx.eval_shape(lambda: build(config, dtype=jnp.dtype(dtype), held=held, rngs=nnx.Rngs(0))), mesh)


def abstract_draft(config: DraftConfig, mesh: Any, *, dtype: str) -> Draft:
    """The same of a draft."""
    return place(nnx.eval_shape(lambda: Draft(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))), mesh)


def decode_shape(mode: Mode, *, batch: int, context: int, block_size: int) -> DecodeShape:
    """A decode whose caches have room for `context` tokens, the last block included. Raises ConfigError."""
    new = min(NEW_TOKENS, context // 4)
    block = block_size if mode.drafts else 1
    if context - new - block < 1:
        raise ConfigError(
            f"a context has room for a prompt, a block of {block} and {new} new tokens; got {context}: make it larger"
        )
    return DecodeShape(
        mode=mode.name, block_size=block, batch=batch, max_prompt_len=context - new - block, max_new_tokens=new
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler made of one program: its text, read, and its memory on one device in bytes."""

    text: str
    module: Module
    argument_bytes: float
    output_bytes: float
    temporary_bytes: float
    aliased_bytes: float

    @property
    def hbm_bytes(self) -> float:
        """All that the program holds at once."""
        return self.argument_bytes + self.output_bytes - self.aliased_bytes + self.temporary_bytes

    @functools.cached_property
    def step(self) -> Part:
        return step(self.module)

    @functools.cached_property
    def before_loop(self) -> Part:
        return before_loop(self.module)

    @functools.cached_property
    def moves(self) -> list[Move]:
        return moves(self.module)

    def unaliased(self, prefix: str) -> list[str]:
        """Entry parameters of that path (`state.cache`) whose memory the results don't take over."""
        given = set(self.module.aliased.values())
        parameters = self.module.entry.parameters
        return [p.op_name for n, p in parameters.items() if p.op_name.startswith(prefix) and n not in given]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TooLarge:
    """A program that the compiler refuses, because it needs more than the device has."""

    message: str


def compile_program(lowered: Lowered) -> Compiled | TooLarge:
    """Compiles for the described devices; takes seconds to minutes."""
    try:
        compiled: Any = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return TooLarge(message=" ".join(str(error).split())[:300])
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return Compiled(
        text=text,
        module=parse(text),
        argument_bytes=float(memory.argument_size_in_bytes),
        output_bytes=float(memory.output_size_in_bytes),
        temporary_bytes=float(memory.temp_size_in_bytes),
        aliased_bytes=float(memory.alias_size_in_bytes),
    )


def lower_decode(networks: Networks, mode: Mode, *, batch: int, context: int, block_size: int) -> Programs:
    """Prefill and loop of a decode, lowered: `.prefill`, `.loop`. Raises ConfigError."""
    shape = decode_shape(mode, batch=batch, context=context, block_size=block_size)
    return Programs(networks.target, networks.draft if mode.drafts else None, shape)


def device_size(array: Any) -> float:
    """Elements of an abstract array on one device."""
    return float(np.prod(array.shape if array.sharding is None else array.sharding.shard_shape(array.shape)))


def device_bytes(tree: Any) -> float:
    """Bytes of a pytree of abstract arrays on one device."""
    return sum(device_size(array) * array.dtype.itemsize for array in jax.tree.leaves(tree))


def held_bytes(target: Llama, draft: Draft, shape: DecodeShape) -> dict[str, float]:
    """Bytes that a decode holds on each device: `weights` of the target, `draft`, `caches` of both.

    The networks may be abstract, on a mesh of devices that are not here (`abstract_target`, `abstract_draft`).
    """
    state = jax.eval_shape(partial(shape.empty, target, draft))
    caches = device_bytes([(cache.keys, cache.values) for cache in (state.cache, state.draft_cache)])
    return {
        "weights": device_bytes(nnx.state(target)),
        "draft": device_bytes((nnx.state(draft), draft_head(target, draft))),
        # Rows over dp, key heads over tp.
        "caches": caches / (1 if target.mesh is None else target.mesh.size),
    }


def estimated_seconds(program: jax.stages.Compiled, device: jax.Device) -> float | None:
    """What the compiler's own figures make of a program that runs here; None on anything but a known TPU.

    Cycles by the chip's clock, without collectives.
    """
    chip = CHIPS.get(device.device_kind)
    text = None if chip is None else program.as_text()
    if chip is None or text is None:
        return None
    return step(parse(text)).cycles(chip.bytes_per_cycle) / chip.clock_hz
