"""`python -m dflash plan`: what decoding would take on a TPU that is not here, by its own compiler. Estimates."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from flax import nnx
from tqdm import tqdm

from dflash.cli.option import refuse_unused
from dflash.compiled.plan import (
    ACCEPT_RATES,
    ESTIMATE,
    PlanFile,
    PlannedCase,
    PlannedProgram,
    Setting,
    TriedMeshes,
    best_block_sizes,
    write_plan,
)
from dflash.compiled.planner import Keep, Planner, hlo_writer, meshes, settings, training_case
from dflash.compiled.programs import Networks, abstract_networks, decode_shape
from dflash.compiled.topology import Chip, Topology, describe
from dflash.config import BlockSize, Checked, Computed, ConfigError, Count, DraftConfig, TargetConfig, fault_list
from dflash.decoding.modes import BLOCK
from dflash.host.disk import check_writable, nearest
from dflash.models.mesh import make_mesh
from dflash.training.trainer import TrainConfig
from dflash.weights.load import draft_config, held_experts, new_draft
from dflash.weights.public import CONFIGS, public_config
from dflash.weights.snapshot import target_config


def _numbers(words: list[str]) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in words[0].split(","))
    except ValueError:
        raise ValueError(f"it takes integers with commas between them, such as 1,8; got {words[0]!r}") from None


Held = Literal["float32", "bfloat16", "float8_e5m2"]

COMMAS = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="N,N",
    instance_from_str=_numbers,
    is_instance=lambda value: isinstance(value, tuple),
    str_from_instance=lambda value: [",".join(map(str, value))],
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PlanArguments(Checked):
    """What `plan` takes."""

    target: str
    """Snapshot directory of the target (its config.json is enough), or a name that needs no weights: gpt-oss-20b,
    gpt-oss-120b, qwen3-4b, qwen3-8b, llama-3.1-8b, smollm2-135m."""
    draft: str = ""
    """Directory of the draft, or smollm2-135m[-plain]; else an untrained one of --draft-layers layers."""
    draft_layers: Count = 5
    """Layers of an untrained draft."""
    topology: str = "v6e:2x4"
    """The TPU: v5e:2x4, v6e:2x4, v6e:1x1 (one chip), v5p:2x2x1, v4:2x2x1."""
    tp: Count | Literal["auto"] = 1
    """Devices that share the networks; `auto` tries every number and names the fewest that fit, and the fastest."""
    dp: Count = 1
    """Groups of devices that share the rows of a batch."""
    batch: Annotated[tuple[Count, ...], COMMAS] = (1,)
    """Rows, commas between several."""
    context: Annotated[tuple[Count, ...], COMMAS] = (1024,)
    """Tokens that the caches have room for, commas between several."""
    block_size: Annotated[tuple[BlockSize, ...], COMMAS] = (8,)
    """Block sizes, commas between several."""
    dtype: Computed = "bfloat16"
    """Dtype of computation, and of the weights but the experts."""
    experts: Held | Literal[""] = ""
    """Dtype in which routed experts are held; by default as they are when loaded: those of an MXFP4 snapshot in
    float8_e5m2 where the other weights are bfloat16."""
    training: bool = False
    """Instead of a decode plan a step of `train`: the draft learns from --batch rows of --context tokens, whole on each
    device; --dp splits the rows, --tp the vocabulary."""
    num_anchors: Count = 32
    """With --training: anchors drawn in each row."""
    json: Path | None = None
    """Write every figure to this file."""
    hlo: Path | None = None
    """Write each program's text (optimised HLO) into this directory."""


def _target(name: str) -> TargetConfig:
    known = public_config(name)
    if known is None and (not name.strip() or not Path(name).is_dir()):
        raise ConfigError(f"--target is a snapshot directory or one of {', '.join(sorted(CONFIGS))}; got {name!r}")
    return target_config(Path(name)) if known is None else known


def _draft(args: PlanArguments, target: TargetConfig, block_size: int) -> DraftConfig:
    if args.draft:
        config = draft_config(args.draft, target)
        if block_size > config.block_size:
            raise ConfigError(f"the draft {args.draft} proposes blocks of {config.block_size}, got {block_size}")
        return config
    made = nnx.eval_shape(lambda: new_draft(target, num_layers=args.draft_layers, block_size=block_size))
    return made.config


def _experts(args: PlanArguments, target: TargetConfig) -> Held:
    """The dtype in which routed experts are held."""
    if target.experts is not None:
        return args.experts or held_experts(args.target, args.dtype) or args.dtype
    if args.experts:
        raise ConfigError(f"--experts is for targets with routed experts, and {args.target} has none: leave it out")
    return args.dtype


def _check_unused(args: PlanArguments) -> None:
    """Raises ConfigError for options that this plan would ignore."""
    if args.draft:
        refuse_unused(args, ["draft_layers"], f"for an untrained draft, and --draft names {args.draft}")
    if not args.training:
        refuse_unused(args, ["num_anchors"], "for --training")


def plan(args: Annotated[PlanArguments, tyro.conf.arg(name="")]) -> None:
    """Compile the programs of a decode for a described TPU; estimate memory, cycles, collectives and gains."""
    _check_unused(args)
    if args.training and args.tp == "auto":
        raise ConfigError("--training takes a number for --tp, the devices that split the vocabulary; got auto")
    # Before minutes of compiling.
    if args.json is not None:
        check_writable(args.json)
    if args.hlo is not None:
        if not nearest(args.hlo).is_dir():
            raise ConfigError(f"--hlo names a directory, and {nearest(args.hlo)} is a file: name another")
        check_writable(nearest(args.hlo) / "probe")
    cases = list(settings(args.batch, args.context, args.block_size))
    _check_cases(args, cases)
    target = _target(args.target)
    draft = _draft(args, target, max(c.block_size for c in cases))
    args = dataclasses.replace(args, experts=_experts(args, target))
    topology = describe(args.topology)

    def networks(tp: int) -> Networks:
        return abstract_networks(topology, target, draft, dp=args.dp, tp=tp, dtype=args.dtype, experts=args.experts)

    made = _auto(args, topology, networks, cases) if args.tp == "auto" else _planned(args, networks(args.tp), cases)
    for line in _lines(made):
        print(line)
    if args.json is not None:
        write_plan(args.json, made)


def _check_cases(args: PlanArguments, cases: Sequence[Setting]) -> None:
    """Raises ConfigError with every size that no program can be made for."""
    faults = [
        f"a batch must be divisible by --dp {args.dp}, got {case.batch}" for case in cases if case.batch % args.dp
    ]
    for case in cases:
        if not args.training:
            try:
                decode_shape(BLOCK, **dataclasses.asdict(case))
            except ConfigError as error:
                faults.append(str(error))
        elif case.context <= case.block_size:
            faults.append(f"a row is longer than a block of {case.block_size}, got a context of {case.context}")
    if faults:
        raise ConfigError(fault_list(list(dict.fromkeys(faults))))


def _planned(args: PlanArguments, networks: Networks, cases: Sequence[Setting]) -> PlanFile:
    chip = networks.topology.chip
    keep = hlo_writer(args.hlo) if args.hlo else None
    planner = Planner(networks, keep)
    made = []
    for setting in tqdm(cases, desc="compiling", unit="case", leave=False, disable=None):
        made.append(_training(args, networks, setting, keep) if args.training else planner.case(setting))
    return PlanFile(
        estimate=ESTIMATE,
        target=args.target,
        topology=networks.topology.name,
        tp=networks.tp,
        dp=networks.dp,
        dtype=args.dtype,
        experts=args.experts,
        hbm_bytes=chip.hbm_bytes,
        chip=chip,
        cases=made,
    )


def _training(args: PlanArguments, networks: Networks, setting: Setting, keep: Keep | None) -> PlannedCase:
    config = TrainConfig(
        batch_size=setting.batch,
        num_anchors=args.num_anchors,
        dp=networks.dp,
        tp=networks.tp,
        dtype=args.dtype,
        remat=True,
    )
    return training_case(networks, config, setting, keep)


def _auto(
    args: PlanArguments, topology: Topology, networks: Callable[[int], Networks], cases: Sequence[Setting]
) -> PlanFile:
    """Plans for every tp that can be; the largest case decides which is the smallest and the fastest."""
    largest = [max(cases, key=lambda c: (c.batch * c.context, c.block_size))]
    make_mesh(topology.devices, dp=args.dp)  # refuses a dp for which there are too few
    step_ms: dict[int, float] = {}
    unfit: dict[int, str] = {}
    for tp in meshes(len(topology.devices), args.dp):
        try:
            case = _planned(args, networks(tp), largest).cases[0]
        except ConfigError as error:
            unfit[tp] = str(error)
            continue
        if case.fits:
            step_ms[tp] = 1000 * case.programs["step"].seconds(topology.chip)
        else:
            unfit[tp] = " ".join(case.refused) or "does not fit"
    if not step_ms:
        reasons = "; ".join(f"tp {tp}: {reason}" for tp, reason in unfit.items())
        raise ConfigError(f"no mesh of {topology.name} with dp {args.dp} holds the largest case: {reasons}")
    fastest = min(step_ms, key=lambda tp: step_ms[tp])
    chosen = TriedMeshes(fewest=min(step_ms), fastest=fastest, step_ms=step_ms, tried=sorted([*step_ms, *unfit]))
    return dataclasses.replace(_planned(args, networks(fastest), cases), auto=chosen)


def _lines(made: PlanFile) -> list[str]:
    """The plan for a reader. Bytes per device."""
    lines = [
        f"{made.target} on {made.topology}, tp {made.tp}, dp {made.dp}: estimates by the TPU's compiler, "
        f"nothing was run; per device, {made.hbm_bytes / 2**30:.2f} GiB"
    ]
    if made.experts != made.dtype:
        lines.append(f"routed experts are held in {made.experts}")
    if made.auto is not None:
        times = ", ".join(f"tp {tp} {ms:.2f} ms" for tp, ms in made.auto.step_ms.items())
        lines.append(f"fewest chips that fit: tp {made.auto.fewest}; fastest step: tp {made.auto.fastest} ({times})")
    for case in made.cases:
        lines += _case_lines(case, made.chip)
    gained = [c for c in made.cases if c.gains is not None]
    for batch, context in dict.fromkeys((c.batch, c.context) for c in gained):
        best = best_block_sizes(c for c in gained if (c.batch, c.context) == (batch, context))
        choice = ", ".join(f"{rate:g}: {size if size > 1 else 'greedy'}" for rate, size in best.items())
        lines.append(f"batch {batch}, context {context}: best block size by share of drafted tokens accepted: {choice}")
    return lines


def _case_lines(case: PlannedCase, chip: Chip) -> list[str]:
    held = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in case.bytes.items() if size is not None)
    lines = [
        f"batch {case.batch}, context {case.context}, block {case.block_size}: "
        f"{'fits' if case.fits else 'DOES NOT FIT'}; GiB: {held}"
    ]
    lines += [f"  {reason}" for reason in case.refused]
    lines += [_program_line(name, program, chip) for name, program in case.programs.items()]
    if case.gains is not None:
        speed = ", ".join(f"{rate:g}: {case.gains.speedup_x[rate]:.2f} x" for rate in ACCEPT_RATES)
        lines.append(
            f"  DFlash pays from an acceptance length of {case.gains.break_even_acceptance_length:.2f}; "
            f"speed-up by share accepted: {speed}"
        )
    return lines


def _program_line(name: str, program: PlannedProgram, chip: Chip) -> str:
    moved = ", ".join(f"{count} {kind} {size / 1e6:.2f} MB" for kind, (count, size) in program.collectives.items())
    blind = ", ".join(f"{n} x{count} {size / 1e6:.1f} MB" for n, (count, size) in program.unestimated.items())
    return (
        f"  {name:6} {program.cycles / 1e6:8.2f} M cycles (floor {program.floor_cycles / 1e6:.2f}), "
        f"{1000 * program.seconds(chip):.2f} ms, reads and writes {program.hbm_bytes / 1e9:.2f} GB, "
        f"{program.before_loop_bytes / 1e9:.2f} GB before the loop"
        + (f"; {moved}" if moved else "")
        + (f"; without an estimate: {blind}" if blind else "")
    )
