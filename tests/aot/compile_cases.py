"""Programs that are compiled for a described TPU, and what is asked of them."""

import dataclasses
import functools
from typing import Any

from flax import nnx

from dflash.compiled.estimate import collective_bytes
from dflash.compiled.programs import Compiled, Networks, TooLarge, abstract_networks, compile_program, lower_decode
from dflash.compiled.topology import Topology, describe
from dflash.compiled.traffic import collective_kind
from dflash.config import ConvConfig, DraftConfig, SelectorConfig, TargetConfig
from dflash.decoding.modes import BLOCK, GREEDY, SEQUENTIAL
from dflash.models.mesh import make_mesh
from dflash.training.cache.source import FeatureReader
from dflash.training.trainer import TrainConfig, lower_step
from dflash.weights.load import new_draft
from dflash.weights.public import public_config

# What may be copied or converted: norms' weights and the like. Anything of this size is a weight or a cache.
LARGE = 2**20

# What a DFlash 2 draft has.
SECOND = {"conv": ConvConfig(kernel_size=3, group_size=64), "selector": SelectorConfig(rank=256, top_k=16)}

WITH_DRAFT = ("block", "sequential", "prefill")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One program of one target. `program`: greedy, block, sequential, prefill, features or train."""

    target: str
    topology: str
    program: str
    tp: int = 1
    dp: int = 1
    batch: int = 1
    context: int = 1280
    block_size: int = 8
    draft_layers: int = 5
    draft_vocab: int | None = None
    second: bool = False
    experts: str | None = None
    layers: int | None = None

    @property
    def id(self) -> str:
        block = f"{self.block_size}" if self.program in ("block", "sequential") else ""
        mesh = f"-tp{self.tp}" * (self.tp > 1) + f"-dp{self.dp}" * (self.dp > 1)
        draft = f"-d{self.draft_layers}" * (self.program in (*WITH_DRAFT, "train"))
        draft += f"-v{self.draft_vocab}" * (self.draft_vocab is not None) + "-second" * self.second
        held = f"-{self.experts}" if self.experts else ""
        return f"{self.target}-{self.topology}{mesh}-{self.program}{block}-n{self.batch}-c{self.context}{draft}{held}"

    @property
    def target_config(self) -> TargetConfig:
        config = public_config(self.target)
        assert config is not None
        return config if self.layers is None else dataclasses.replace(config, windows=config.windows[: self.layers])

    @property
    def draft_config(self) -> DraftConfig:
        target, more = self.target_config, SECOND if self.second else {}
        sizes = {"num_layers": self.draft_layers, "block_size": self.block_size}
        new = nnx.eval_shape(lambda: new_draft(target, **sizes, **more)).config
        if self.draft_vocab is None:
            return new
        lowest = (2**self.draft_vocab - 1).to_bytes(-(-new.vocab_size // 8), "little")
        return dataclasses.replace(new, vocabulary=lowest)

    @property
    def columns(self) -> int:
        """Tokens that a step computes on one device: where it drafts, those of a block."""
        block = self.block_size
        tokens = {"greedy": 1, "block": block, "sequential": block}.get(self.program, self.context)
        return self.batch // self.dp * tokens


@functools.cache
def topology(name: str) -> Topology:
    return describe(name)


def networks(case: Case) -> Networks:
    """Target and draft of a case, abstract, on its mesh."""
    return abstract_networks(
        topology(case.topology),
        case.target_config,
        case.draft_config if case.program in WITH_DRAFT else None,
        dp=case.dp,
        tp=case.tp,
        experts=case.experts,
    )


def lowered(case: Case) -> Any:
    """The case's program, lowered for the devices of its topology."""
    sizes = {"batch": case.batch, "context": case.context, "block_size": case.block_size}
    match case.program:
        case "greedy":
            return lower_decode(networks(case), GREEDY, **sizes).loop
        case "block":
            return lower_decode(networks(case), BLOCK, **sizes).loop
        case "sequential":
            return lower_decode(networks(case), SEQUENTIAL, **sizes).loop
        case "prefill":
            return lower_decode(networks(case), BLOCK, **sizes).prefill
        case "features":
            layer_ids = case.draft_config.target_layer_ids
            return FeatureReader(networks(case).target, layer_ids).lower(case.batch, case.context)
        case "train":
            mesh = make_mesh(topology(case.topology).devices, dp=case.dp, tp=case.tp)
            config = TrainConfig(batch_size=case.batch, dtype="bfloat16", dp=case.dp, tp=case.tp, remat=True)
            return lower_step(case.draft_config, config, mesh, context=case.context)
    raise ValueError(f"no such program: {case.program}")


@functools.lru_cache(maxsize=2)
def compiled(case: Case) -> Compiled:
    """What the compiler makes of a case; fails where that does not fit the chip. A test needs one program or two."""
    made = compile_program(lowered(case))
    assert not isinstance(made, TooLarge), made.message
    return made


def moved_inputs(program: Compiled) -> list[str]:
    """Weights and caches that are copied, converted, turned, or sent to other devices, before the loop or in it."""
    return [
        f"{'in' if m.in_loop else 'before'} the loop: {m.kind} of {m.origin}, {m.nbytes / 1e6:.1f} MB"
        for m in program.moves
        if m.nbytes >= LARGE and m.origin.startswith(("weights", "state.cache", "state.draft_cache"))
    ]


def large_collectives(program: Compiled, case: Case) -> list[str]:
    """Collectives of more than activations: what every device gets is at most a float32 column per token."""
    most = 4 * case.target_config.hidden_size * case.columns
    costs = (*program.before_loop.costs, *program.step.costs)
    found = [(c.instruction.opcode, collective_bytes(c.instruction)) for c in costs if collective_kind(c.instruction)]
    return [f"{opcode} of {nbytes:.0f} bytes" for opcode, nbytes in found if nbytes > most]
