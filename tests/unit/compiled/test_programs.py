"""Bytes that are counted without weights are those that loading takes."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh
from weights import test_easydel_fork

from dflash import init_draft, load_target, write_draft
from dflash.compiled.programs import abstract_draft, abstract_target, device_bytes, held_bytes
from dflash.config import ConvConfig, SelectorConfig
from dflash.decoding.loop import DecodeShape
from dflash.models.draft import pack_tokens
from dflash.models.mesh import DP, TP
from dflash.weights.export import export_draft
from dflash.weights.load import draft_config, held_experts, new_draft, read_any_draft
from dflash.weights.runs.checkpoint import write_run
from dflash.weights.snapshot import target_config
from dflash.weights.tiny import write_tiny_target

ONE = AbstractMesh((1, 1), (DP, TP))


def taken(tree) -> int:
    return sum(array.nbytes for array in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("family", "dtype", "experts"),
    [("llama", "float32", None), ("qwen3", "bfloat16", None), ("gpt_oss", "bfloat16", "float8_e5m2")],
)
def test_what_is_held_is_what_loading_and_a_decode_allocate(tmp_path, family, dtype, experts):
    folder = write_tiny_target(tmp_path, family, mxfp4=family == "gpt_oss")
    target, draft = load_target(folder, dtype), init_draft(load_target(folder, dtype), num_layers=1)
    assert held_experts(folder, dtype) == experts
    assert held_experts(folder, "float32") is None
    shape = DecodeShape(mode="cached_block_verify", block_size=8, batch=2, max_prompt_len=40, max_new_tokens=30)
    state = shape.empty(target, draft)
    caches = [(cache.keys, cache.values) for cache in (state.cache, state.draft_cache)]
    allocated = {"weights": taken(nnx.state(target)), "draft": taken(nnx.state(draft)), "caches": taken(caches)}
    config = target_config(folder)
    counted = abstract_target(config, ONE, dtype=dtype, experts=experts)
    assert held_bytes(counted, abstract_draft(draft.config, ONE, dtype=dtype), shape) == allocated
    assert held_bytes(target, draft, shape) == allocated
    (folder / "model.safetensors").unlink()  # of a plan the config.json is enough
    assert held_experts(folder, dtype) == experts


def test_public_targets_are_held_as_they_are_published():
    assert held_experts("gpt-oss-20b", "bfloat16") == held_experts("gpt-oss-120b", "bfloat16") == "float8_e5m2"
    assert held_experts("gpt-oss-20b", "float32") is None
    assert held_experts("qwen3-8b", "bfloat16") is None


@pytest.mark.parametrize("tp", [2, 4])
def test_devices_hold_their_parts(tmp_path, tp):
    config = target_config(write_tiny_target(tmp_path, "llama", vocab_size=200))
    draft = nnx.eval_shape(lambda: new_draft(config, num_layers=1, block_size=4)).config
    draft = dataclasses.replace(draft, vocabulary=pack_tokens(np.arange(40), 200))
    shape = DecodeShape(mode="cached_block_verify", block_size=4, batch=1, max_prompt_len=16, max_new_tokens=16)

    def held(tp):
        mesh = AbstractMesh((1, tp), (DP, TP))
        networks = abstract_target(config, mesh, dtype="float32"), abstract_draft(draft, mesh, dtype="float32")
        return held_bytes(*networks, shape)

    one, each = held(1), held(tp)
    # Norms lie whole on each device, and so do key heads that are fewer than the devices.
    assert one["weights"] / tp < each["weights"] < 1.3 * one["weights"] / tp
    assert one["draft"] / tp < each["draft"] < 1.3 * one["draft"] / tp
    assert each["caches"] == one["caches"] / 2
    whole = held_bytes(*(make(c, ONE, dtype="float32") for make, c in (
        (abstract_target, config), (abstract_draft, dataclasses.replace(draft, vocabulary=None)))), shape)  # fmt: skip
    # The rows of the head that it reads are gathered.
    assert one["draft"] - whole["draft"] == 40 * config.hidden_size * 4


def write_drafts(folder):
    """A draft in each dialect, and the target that it is read for."""
    target = load_target(write_tiny_target(folder / "target", "llama"))
    draft = init_draft(target, num_layers=1, target_layer_ids=(0, 2), block_size=4)
    write_draft(draft, folder / "draft")
    parts = {"conv": ConvConfig(kernel_size=3, group_size=32), "selector": SelectorConfig(rank=4, top_k=4)}
    write_draft(new_draft(target.config, num_layers=1, block_size=4, **parts), folder / "second")
    export_draft(draft, folder / "speculators", consumer="speculators", dtype="float32", target_dir=folder / "target")
    write_run(draft, folder / "runs", 5, optimizer_state=None, provenance={}, keep=None)
    heads = {"num_attention_heads": test_easydel_fork.HEADS, "rms_norm_eps": test_easydel_fork.EPS}
    write_tiny_target(folder / "oss", "gpt_oss", vocab_size=260, **heads)
    arrays, ids = test_easydel_fork.draw(), test_easydel_fork.WITH_IDS
    test_easydel_fork.write_fork_run(folder / "fork-run", arrays, test_easydel_fork.CONFIG | ids)
    test_easydel_fork.write_fork_export(folder / "fork-export", arrays, notes=test_easydel_fork.NOTES, vocab_size=260)
    test_easydel_fork.write_linen(folder / "linen", arrays, ids | {"block_size": test_easydel_fork.BLOCK})
    ours = dict.fromkeys(("draft", "second", "speculators", "runs"), target.config)
    return ours | dict.fromkeys(("fork-run", "fork-export", "linen"), target_config(folder / "oss"))


def test_a_draft_of_any_form_takes_what_its_config_says(tmp_path):
    for name, target in write_drafts(tmp_path).items():
        config = draft_config(tmp_path / name, target)
        for dtype in ("float32", "bfloat16"):
            loaded = read_any_draft(tmp_path / name, dtype, target)
            assert config == loaded.config, name
            counted = device_bytes(nnx.state(abstract_draft(config, ONE, dtype=dtype)))
            assert counted == taken(nnx.state(loaded)), (name, dtype)
