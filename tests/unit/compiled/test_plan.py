"""The cost model of a plan, and a whole plan with this process's CPU in the place of a TPU."""

import dataclasses
import json

import jax
import pytest
from flax import nnx

from dflash.compiled.plan import COLLECTIVE_S, Plan, Setting, best_block_sizes, gains, meshes, seconds, training_case
from dflash.compiled.programs import Networks, abstract_networks
from dflash.compiled.topology import CHIPS, Topology
from dflash.training.trainer import TrainConfig
from dflash.weights.load import new_draft
from dflash.weights.public import public_config

CHIP = CHIPS["TPU v6 lite"]


def _program(cycles: float, **collectives: tuple[int, float]) -> dict:
    return {"cycles": cycles, "collectives": {kind: list(found) for kind, found in collectives.items()}}


def _case(step: float, verify: float, draft: float, size: int) -> dict:
    parts = {"step": step, "verify": verify, "draft": draft}
    case = {"block_size": size, "programs": {name: _program(cycles) for name, cycles in parts.items()}}
    return case | {"gains": gains(case, CHIP)}


def test_a_steps_time_is_its_cycles_and_its_collectives() -> None:
    program = _program(CHIP.clock_hz, reduce=(5, 10 * CHIP.link_bytes_per_s))
    assert seconds(program, CHIP) == pytest.approx(1 + 5 * COLLECTIVE_S + 10)


def test_gains_follow_the_cost_model() -> None:
    case = _case(1e6, 1.25e6, 0.25e6, 4)
    assert case["gains"]["break_even_acceptance_length"] == pytest.approx(1.5)
    assert case["gains"]["acceptance_length"]["0.5"] == pytest.approx(1 + 0.5 + 0.25 + 0.125)
    assert case["gains"]["speedup_x"]["0.5"] == pytest.approx(1.875 / 1.5)


def test_a_case_that_lacks_a_program_has_no_gains() -> None:
    assert gains({"block_size": 4, "programs": {"step": _program(1.0)}}, CHIP) is None


def test_the_best_block_size_grows_with_what_is_accepted_and_is_greedy_where_nothing_pays() -> None:
    cases = [_case(1e6, 1.5e6, 0.4e6, 4), _case(1e6, 3e6, 0.5e6, 16)]
    best = best_block_sizes(cases)
    assert (best["0.5"], best["0.7"], best["0.9"]) == (1, 4, 16)


def test_auto_tries_powers_of_two_that_fit_beside_dp() -> None:
    assert meshes(8, 1) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert meshes(8, 2) == [1, 2, 3, 4]
    assert meshes(8, 3) == [1, 2]
    assert meshes(4, 8) == []


def _networks() -> Networks:
    """Four layers of SmolLM2-135M and a draft of one, on this process's CPU."""
    whole = public_config("smollm2-135m")
    assert whole is not None
    target = dataclasses.replace(whole, windows=whole.windows[:4])
    draft = nnx.eval_shape(lambda: new_draft(target, num_layers=1, block_size=4)).config
    return abstract_networks(Topology(name="cpu", devices=tuple(jax.devices("cpu")), chip=CHIP), target, draft)


@pytest.mark.slow
def test_a_plan_on_this_cpu_has_every_figure_of_its_file() -> None:
    kept: dict[str, str] = {}
    plan = Plan(_networks(), kept.__setitem__)
    case = plan.case(Setting(batch=2, context=128, block_size=4))
    assert set(kept) == {"greedy-n2-c128", "cached_block_verify-n2-c128-b4"}
    assert case["fits"]
    assert case["bytes"]["caches"] == 2 * 2 * 128 * 3 * 64 * 2 * (4 + 1)
    assert set(case["programs"]) == {"step", "verify", "draft"}
    layers = 2 * 4 * 576 * (576 + 384 + 576 + 3 * 1536)
    for name in ("step", "verify"):
        program = case["programs"][name]
        assert set(program) == {
            "cycles",
            "floor",
            "floor_cycles",
            "hbm_bytes",
            "unestimated",
            "before_loop_bytes",
            "collectives",
        }
        assert program["hbm_bytes"] > layers
        assert program["cycles"] >= 0.999 * program["hbm_bytes"] / CHIP.bytes_per_cycle
    assert case["programs"]["draft"]["hbm_bytes"] > 0
    json.dumps(case, allow_nan=False)


@pytest.mark.slow
def test_a_training_step_on_this_cpu_has_the_figures_of_a_case() -> None:
    networks = _networks()
    kept: dict[str, str] = {}
    setting = Setting(batch=2, context=64, block_size=4)
    case = training_case(networks, TrainConfig(batch_size=2, num_anchors=8), setting, kept.__setitem__)
    assert set(kept) == {"train-n2-c64-b4"}
    assert (case["batch"], case["context"], case["num_anchors"], case["fits"]) == (2, 64, 8, True)
    # float32 weights and two moments of a layer and fc, and the head.
    layer = 576 * (576 + 384 + 576 + 3 * 1536) + 576 * 576
    assert case["bytes"]["arguments"] > 4 * (3 * layer + 49152 * 576)
    program = case["programs"]["train"]
    products = 3 * 2 * 2 * 8 * 4 * layer + 2 * 2 * 2 * 8 * 3 * 49152 * 576
    assert 0.9 * products < program["floor"]["flops"] < 1.5 * products
    assert program["hbm_bytes"] > program["floor"]["hbm_bytes"] > 4 * 6 * layer
    # Every chunk of the head is read, however the compiler writes the loop.
    assert program["hbm_bytes"] > 2 * 4 * 49152 * 576
    assert program["before_loop_bytes"] == 0
    assert gains(case, CHIP) is None
    json.dumps(case, allow_nan=False)
