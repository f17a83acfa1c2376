"""Every program of the harness at its real size, as the TPU's compiler makes it: memory, moves, collectives, cycles.

Bars are in millions of cycles of a step (sum over instructions of the larger of HBM bytes and matrix cycles;
collectives apart).
"""

import dataclasses
import itertools

import pytest
from compile_cases import Case, compiled, large_collectives, moved_inputs, networks, topology
from flax import nnx

from dflash.compiled.estimate import whole
from dflash.compiled.programs import device_bytes

QWEN, OSS, SMOL = "qwen3-8b", "gpt-oss-20b", "smollm2-135m"
ONE, HOST = "v6e:1x1", "v6e:2x4"

QWEN_1 = Case(target=QWEN, topology=ONE, program="greedy")
QWEN_1_BLOCK = Case(target=QWEN, topology=ONE, program="block", block_size=16)
QWEN_32 = Case(target=QWEN, topology=ONE, program="greedy", batch=32)
QWEN_32_BLOCK = Case(target=QWEN, topology=ONE, program="block", block_size=16, batch=32)
QWEN_TP = Case(target=QWEN, topology=HOST, tp=8, program="greedy")
QWEN_SECOND = Case(target=QWEN, topology=HOST, tp=8, program="block", second=True)
OSS_1 = Case(target=OSS, topology=HOST, tp=8, program="greedy")
OSS_1_BLOCK = Case(target=OSS, topology=HOST, tp=8, program="block", draft_layers=8)
OSS_1_FEW = dataclasses.replace(OSS_1_BLOCK, block_size=4)
OSS_32 = Case(target=OSS, topology=HOST, tp=8, program="greedy", batch=32)
OSS_32_BLOCK = Case(target=OSS, topology=HOST, tp=8, program="block", batch=32)
OSS_V5E = Case(target=OSS, topology="v5e:2x4", tp=8, program="block", batch=32, context=8192, draft_layers=8)
OSS_SEQUENTIAL = Case(target=OSS, topology=HOST, tp=8, program="sequential")
OSS_VOCABULARY = dataclasses.replace(OSS_SEQUENTIAL, draft_vocab=32000)
OSS_CHIP = Case(target=OSS, topology=ONE, program="greedy", experts="float8_e5m2")
OSS_CHIP_BLOCK = dataclasses.replace(OSS_CHIP, program="block")
TRAIN = Case(target=SMOL, topology="v5p:2x2x1", dp=4, program="train", batch=32, context=512, draft_layers=3)

# What .ci/run compiles: no more than its minutes allow. The nightly workflow compiles the others too.
FIRST = [QWEN_1, QWEN_1_BLOCK, QWEN_32, QWEN_TP, OSS_1, OSS_1_BLOCK, OSS_32, OSS_32_BLOCK, OSS_SEQUENTIAL]
FIRST += [OSS_CHIP, OSS_CHIP_BLOCK, TRAIN]
OTHERS = [QWEN_32_BLOCK, QWEN_SECOND, OSS_V5E, OSS_VOCABULARY, OSS_1_FEW]


def _grid() -> list[Case]:
    """All programs of all targets, where a mesh can be: what the nightly workflow compiles."""
    cases = []
    hosts = [("v6e:2x4", 8, 1), ("v5e:2x4", 8, 1), ("v5p:2x2x1", 4, 1), ("v6e:2x4", 4, 2)]
    # Nine heads could be split by 3, into parts that are no whole tiles: some are copied before each call. Hosts share
    # its rows.
    small = [("v6e:2x4", 1, 8), ("v5e:2x4", 1, 8), ("v5p:2x2x1", 1, 4)]
    meshes = {SMOL: [(ONE, 1, 1), *small], QWEN: [(ONE, 1, 1), *hosts], OSS: [(ONE, 1, 1), *hosts]}
    programs = [(p, b, 1280) for p in ("prefill", "greedy", "sequential", "block") for b in (1, 32)]
    programs += [("features", 8, 1024)]
    for target, places in meshes.items():
        for (name, tp, dp), (program, batch, context) in itertools.product(places, programs):
            # As a snapshot in MXFP4 is held; v5p and two rows of v6e as one in bfloat16 is.
            experts = "float8_e5m2" if target == OSS and name in (ONE, "v5e:2x4") else None
            case = Case(target=target, topology=name, tp=tp, dp=dp, program=program, experts=experts)
            if batch % dp == 0:
                cases.append(dataclasses.replace(case, batch=batch, context=context))
    cases += [
        Case(target=t, topology=name, dp=dp, program="train", batch=32, context=1024)
        for t, (name, dp) in itertools.product(meshes, (("v5p:2x2x1", 4), ("v6e:2x4", 8)))
    ]
    return [c for c in cases if c not in FIRST + OTHERS]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    test = metafunc.function.__name__
    barred = {
        "test_cycles_of_a_step": CYCLES,
        "test_a_verify_step_costs_little_more_than_a_step": RATIOS,
        "test_little_is_copied_before_the_loop_and_held_beside_it": COPIED,
    }
    cases = [*FIRST, *(OTHERS + _grid() if metafunc.config.option.aot_grid else [])]
    cases = [c for c in cases if test not in barred or c in barred[test]]
    # The scope brings all tests of a case together: few compiled programs are held at a time.
    metafunc.parametrize("case", [pytest.param(c, id=c.id) for c in cases], scope="module")


def test_it_fits(case: Case) -> None:
    assert compiled(case).hbm_bytes <= topology(case.topology).chip.hbm_bytes


def test_donated_state_is_aliased_whole(case: Case) -> None:
    """Caches, or what is trained and its moments; the features' program has none."""
    assert compiled(case).unaliased("state") == []


def test_no_weight_and_no_cache_is_moved(case: Case) -> None:
    assert moved_inputs(compiled(case)) == []


def test_collectives_are_those_of_the_layers(case: Case) -> None:
    """Two a layer, and two more: after the embedding, and for the likeliest token; of target and draft each."""
    if case.program == "train":
        found = whole(compiled(case).module, 1).collectives
        assert set(found) == ({"all-reduce"} if case.tp * case.dp > 1 else set())
        return
    assert large_collectives(compiled(case), case) == []
    found = compiled(case).step.collectives
    if case.tp * case.dp == 1:
        assert found == {}
    elif case.program in ("greedy", "block") and case.dp == 1:
        layers = [case.target_config.num_layers] + [case.draft_layers] * (case.program == "block")
        # The compiler sums the likeliest tokens of few rows and gathers those of many: pairs of numbers.
        assert set(found) <= {"all-reduce", "all-gather"}
        assert sum(count for count, _ in found.values()) == sum(2 * n + 2 for n in layers)
        assert found.get("all-gather", (0, 0.0))[0] <= len(layers)


CYCLES = {QWEN_1: 19.5, QWEN_32: 30, QWEN_32_BLOCK: 52, OSS_1: 3.5, OSS_32: 8.5, OSS_CHIP: 10}
RATIOS = {QWEN_1_BLOCK: (QWEN_1, 1.12), OSS_32_BLOCK: (OSS_32, 1.5), OSS_1_FEW: (OSS_1, 3.2)}
COPIED = {QWEN_32: (1e9, 2**30), OSS_1: (1e9, 0.1 * 2**30), OSS_32: (1e9, 0.1 * 2**30)}


def test_cycles_of_a_step(case: Case) -> None:
    per_cycle = topology(case.topology).chip.bytes_per_cycle
    assert compiled(case).step.cycles(per_cycle) / 1e6 <= CYCLES[case]


def test_a_verify_step_costs_little_more_than_a_step(case: Case) -> None:
    greedy, bar = RATIOS[case]
    per_cycle = topology(case.topology).chip.bytes_per_cycle
    step = compiled(greedy).step.cycles(per_cycle)
    verify = compiled(case).step.within("verify").cycles(per_cycle)
    assert 0.9 < verify / step <= bar  # below: what belongs to the verify was not found


def test_little_is_copied_before_the_loop_and_held_beside_it(case: Case) -> None:
    before, temporaries = COPIED[case]
    assert compiled(case).before_loop.hbm_bytes <= before
    assert compiled(case).temporary_bytes <= temporaries


def test_each_device_holds_its_part_of_the_draft() -> None:
    whole = networks(Case(target=OSS, topology=ONE, program="block", draft_layers=8))
    split = networks(OSS_1_BLOCK)
    share = device_bytes(nnx.state(split.draft)) / device_bytes(nnx.state(whole.draft))
    assert share == pytest.approx(1 / 8, rel=0.02)
