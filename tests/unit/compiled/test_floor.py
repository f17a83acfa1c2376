"""What a step must do at least, against sums by hand."""

import dataclasses

import jax
import pytest
from flax import nnx

from dflash.compiled.floor import Floor, draft_floor, target_floor
from dflash.compiled.programs import Networks, abstract_networks
from dflash.compiled.topology import CHIPS, Topology
from dflash.weights.load import new_draft
from dflash.weights.public import public_config


def _networks(name: str, draft_layers: int = 2) -> Networks:
    """A public target with two layers and an untrained draft, abstract, on this process's CPU."""
    whole = public_config(name)
    assert whole is not None
    target = dataclasses.replace(whole, windows=whole.windows[:4])
    draft = nnx.eval_shape(lambda: new_draft(target, num_layers=1, block_size=8)).config
    here = Topology(name="cpu", devices=tuple(jax.devices("cpu")), chip=CHIPS["TPU v6 lite"])
    return abstract_networks(here, target, draft)


def test_a_dense_step_reads_every_weight_but_the_embedding_and_every_key_and_value() -> None:
    networks = _networks("qwen3-8b")
    layer = 4096 * (6144 + 4096 + 3 * 12288) + 2 * 4096 + 2 * 128
    head = 151936 * 4096 + 4096
    caches = 4 * 2 * 1280 * 8 * 128
    found = target_floor(networks.target, batch=1, tokens=1, context=1280)
    assert found.hbm_bytes == pytest.approx(2 * (4 * layer + head + 4096 + caches))
    of_products = 2 * (4 * layer + head)
    assert found.flops == pytest.approx(of_products + 4 * 4 * 1280 * 32 * 128, rel=1e-3)


def test_of_experts_those_awake_are_read_and_the_chosen_ones_multiplied() -> None:
    networks = _networks("gpt-oss-20b")
    one, many = (target_floor(networks.target, batch=n, tokens=1, context=64) for n in (1, 64))
    expert = 3 * 2880 * 2880 + 3 * 2880  # weights and biases
    small = target_floor(networks.target, batch=1, tokens=1, context=0).hbm_bytes - 4 * 4 * 2 * expert
    assert 0 < small < 2 * (201088 * 2880 + 4 * 3e7)  # the head, and attention of four layers
    assert many.hbm_bytes - one.hbm_bytes == pytest.approx(2 * 4 * 28 * expert, rel=0.02)  # all but those of one token
    assert many.flops == pytest.approx(64 * one.flops)


def test_a_draft_step_reads_the_draft_and_the_targets_head() -> None:
    networks = _networks("qwen3-8b")
    assert networks.draft is not None
    found = draft_floor(networks.target, networks.draft, batch=1, tokens=8, context=0)
    layer = 4096 * (2 * 4096 + 2 * 1024 + 3 * 12288) + 2 * 4096 + 2 * 128
    assert found.hbm_bytes == pytest.approx(2 * (layer + 4096 * 4096 + 2 * 4096 + 151936 * 4096))


def test_cycles_are_those_of_whichever_takes_longer() -> None:
    chip = CHIPS["TPU v6 lite"]
    assert Floor(hbm_bytes=817e6, flops=0).cycles(chip) == 1e6
    assert Floor(hbm_bytes=817e6, flops=2e6 * chip.flops_per_cycle).cycles(chip) == 2e6
