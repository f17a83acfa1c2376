"""A whole plan with this process's CPU in the place of a TPU."""

import dataclasses

import jax
import pytest
from flax import nnx

from dflash.compiled.plan import Setting
from dflash.compiled.planner import Planner, meshes, training_case
from dflash.compiled.programs import Networks, abstract_networks
from dflash.compiled.topology import CHIPS, Topology
from dflash.training.trainer import TrainConfig
from dflash.weights.load import new_draft
from dflash.weights.public import public_config

CHIP = CHIPS["TPU v6 lite"]


def test_auto_tries_every_number_of_devices_beside_dp() -> None:
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
def test_a_case_on_this_cpu_has_every_program_and_its_bytes() -> None:
    kept: dict[str, str] = {}
    case = Planner(_networks(), kept.__setitem__).case(Setting(batch=2, context=128, block_size=4))
    assert set(kept) == {"greedy-n2-c128", "cached_block_verify-n2-c128-b4"}
    assert case.fits
    assert case.bytes["caches"] == 2 * 2 * 128 * 3 * 64 * 2 * (4 + 1)
    assert set(case.programs) == {"step", "verify", "draft"}
    layers = 2 * 4 * 576 * (576 + 384 + 576 + 3 * 1536)
    for name in ("step", "verify"):
        program = case.programs[name]
        assert program.hbm_bytes > layers
        assert program.cycles >= 0.999 * program.hbm_bytes / CHIP.bytes_per_cycle
    assert case.programs["draft"].hbm_bytes > 0
    assert case.gains is not None


@pytest.mark.slow
def test_a_training_step_on_this_cpu_has_the_figures_of_a_case() -> None:
    kept: dict[str, str] = {}
    setting = Setting(batch=2, context=64, block_size=4)
    case = training_case(_networks(), TrainConfig(batch_size=2, num_anchors=8), setting, kept.__setitem__)
    assert set(kept) == {"train-n2-c64-b4"}
    assert (case.batch, case.context, case.num_anchors, case.fits) == (2, 64, 8, True)
    # float32 weights and two moments of a layer and fc, and the head.
    layer = 576 * (576 + 384 + 576 + 3 * 1536) + 576 * 576
    assert (case.bytes["arguments"] or 0) > 4 * (3 * layer + 49152 * 576)
    program = case.programs["train"]
    products = 3 * 2 * 2 * 8 * 4 * layer + 2 * 2 * 2 * 8 * 3 * 49152 * 576
    assert 0.9 * products < program.floor.flops < 1.5 * products
    assert program.hbm_bytes > program.floor.hbm_bytes > 4 * 6 * layer
    # Every chunk of the head is read, however the compiler writes the loop.
    assert program.hbm_bytes > 2 * 4 * 49152 * 576
    assert program.before_loop_bytes == 0
    assert case.gains is None
