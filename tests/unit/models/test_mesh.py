"""A mesh: what lies where, what is refused, and that decoding on eight devices is decoding on one."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from dflash.config import ConfigError
from dflash.models.mesh import Part, Place, check_mesh, make_mesh, order_of
from dflash.weights.config_json import read_target_config
from dflash.weights.tiny import tiny_config


def on(tp, dp=1):
    return AbstractMesh((dp, tp), ("dp", "tp"))


def held(place, axis=0):
    """The entries of an array's axis that each device has, device by device."""
    size = place.shape[axis] // 4
    found = []
    for first in range(0, place.shape[axis], size):
        index = tuple(slice(first, first + size) if i == axis else slice(None) for i in range(len(place.shape)))
        entries = place.entries(index)[axis]
        found.append(np.arange(1000)[entries].tolist())
    return found


def test_a_weight_of_two_halves_is_split_half_by_half():
    half = Part("inner", 8)
    place = Place.of((16, 3), ((half, half), None), on(4))
    assert (place.shape, place.sharding.spec) == ((16, 3), P("tp", None))
    assert held(place) == [[0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15]]


def test_key_heads_fewer_than_the_devices_are_repeated_beside_their_queries():
    parts = (Part("heads", 8, 2), Part("kv_heads", 2, 2), Part("kv_heads", 2, 2))
    place = Place.of((24,), (parts,), on(4))
    assert place.shape == (4 * (4 + 2 + 2),)
    queries = [[4 * d, 4 * d + 1, 4 * d + 2, 4 * d + 3] for d in range(4)]
    keys = [[16, 17], [16, 17], [18, 19], [18, 19]]
    values = [[20, 21], [20, 21], [22, 23], [22, 23]]
    assert held(place) == [q + k + v for q, k, v in zip(queries, keys, values, strict=True)]


def test_a_vocabulary_that_does_not_divide_repeats_its_last_token():
    place = Place.of((10, 3), ((Part("vocab", 10),), None), on(4))
    assert place.shape == (12, 3)
    assert held(place) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 9, 9]]


def test_what_lies_in_one_piece_is_taken_as_a_slice():
    place = Place.of((3, 8), (None, (Part("heads", 4, 2),)), on(4))
    assert place.entries((slice(None), slice(2, 4))) == (slice(None), slice(2, 4))
    assert Place.of((5, 5), None, on(4)).sharding.spec == P(None, None)


@pytest.mark.parametrize(
    ("shape", "batched", "order"),
    [
        ((), False, ()),
        ((640,), False, (0,)),
        ((640, 2880), False, (0, 1)),  # least padding would turn it
        ((32, 5760, 2880), False, (0, 1, 2)),
        ((32, 2880, 360), True, (0, 2, 1)),
        ((1, 2880, 720), True, (0, 2, 1)),
        ((32, 2880, 2880), True, (0, 1, 2)),
        ((32, 2880, 384), True, (0, 1, 2)),
    ],
)
def test_a_weight_lies_as_its_products_read_it(shape, batched, order):
    assert order_of(shape, batched) == order


@pytest.mark.parametrize(
    ("tp", "changes", "rule"),
    [
        (3, {}, "tp must divide the 4 query heads"),
        (3, {"num_heads": 6, "num_kv_heads": 2}, "tp must divide the 2 key heads"),
        (4, {"intermediate_size": 98}, "tp must divide the inner width 98"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_with_the_rule(tp, changes, rule):
    config = dataclasses.replace(read_target_config(tiny_config("llama")), **changes)
    with pytest.raises(ConfigError, match=re.escape(rule)):
        check_mesh(config, on(tp))


def test_a_mesh_has_two_axes_and_no_more_devices_than_there_are():
    config = read_target_config(tiny_config("llama"))
    with pytest.raises(ConfigError, match=r"dp and tp, .*\['x'\]"):
        check_mesh(config, AbstractMesh((2,), ("x",)))
    with pytest.raises(ConfigError, match=r"got 2 x 64 with \d+ devices: lower dp or tp"):
        make_mesh(jax.devices(), dp=2, tp=64)
    check_mesh(config, None)


SPLIT = """
import sys
from pathlib import Path
import jax, numpy as np
from flax import nnx
import dflash
from dflash.decoding.decode import build_decoder, check_request, prefill, read_state
from dflash.decoding.sampling import Sampling
from dflash.models.mesh import gather, make_mesh, place
from dflash.weights.load import new_draft
from dflash.weights.tiny import write_tiny_target

family, kv_heads, meshes, vocabulary, folder = FAMILY, KV_HEADS, MESHES, VOCABULARY, Path(sys.argv[1]) / "target"
assert len(jax.devices()) == 8
shape = {"num_attention_heads": 8, "num_key_value_heads": kv_heads, "vocab_size": 199, "num_hidden_layers": 2}
windows = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
write_tiny_target(folder, family, **shape, **(windows if family == "gpt_oss" else {}))
prompts = [[5, 17, 3, 120, 88], [61] * 19, [7, 8], [198, 2, 2]]


def decoded(mesh, mode, **sampled):
    target = dflash.load_target(folder, mesh=mesh)
    draft = new_draft(
        target.config, num_layers=2, block_size=4, target_layer_ids=(0, 1), vocabulary=vocabulary
    )
    draft = place(draft, mesh)
    request = check_request(target, draft, prompts, mode=mode, block_size=4, max_new_tokens=10, stop_token_ids=(),
                            sampling=Sampling(**sampled))
    decoder = build_decoder(target, request)
    return target, decoder.steps(prefill(decoder, request))


def caches(state, repeat):
    # Of a ring and of what lies beyond the committed tokens, nothing is promised: rejected keys lie there.
    for cache in (state.cache, state.draft_cache):
        for keys, values, window in zip(cache.keys, cache.values, cache.windows, strict=True):
            rows = [slice(0, int(n)) if window is None else slice(0, 0) for n in cache.lengths]
            for b, row in enumerate(rows):
                yield np.repeat(np.asarray(keys)[b, :, :, row], repeat, axis=0)
                yield np.repeat(np.asarray(values)[b, :, row], repeat, axis=0)


for mode in ("cached_block_verify", "cached_sequential_verify"):
    plain, expected = decoded(None, mode)
    drawn = read_state(decoded(None, mode, temperature=1.0, top_k=50, top_p=0.9, seed=5)[1])
    assert drawn[0] != read_state(expected)[0]
    for dp, tp in meshes:
        mesh = make_mesh(jax.devices(), dp=dp, tp=tp)
        target, got = decoded(mesh, mode)
        assert read_state(got) == read_state(expected), (mode, dp, tp, read_state(got), read_state(expected))
        if mode == "cached_block_verify":
            assert read_state(decoded(mesh, mode, temperature=1.0, top_k=50, top_p=0.9, seed=5)[1]) == drawn, (dp, tp)
        pairs = zip(caches(got, 1), caches(expected, max(1, tp // kv_heads)), strict=True)
        assert all(a.shape == b.shape and np.allclose(a, b, atol=1e-4) for a, b in pairs), (mode, dp, tp)
        both = zip(jax.tree.leaves(nnx.state(gather(target))), jax.tree.leaves(nnx.state(plain)), strict=True)
        assert all(np.array_equal(a, b) for a, b in both), (dp, tp)
    # The others are one program more each, and every program takes a while to compile for eight devices.
    if vocabulary is not None:
        break
    meshes = meshes[:1]
tokens = np.asarray(prompts[1])[None]
assert np.allclose(target.forward(tokens)[0], plain.forward(tokens)[0], atol=1e-4)
print("same")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kv_heads", "meshes", "some_tokens"),
    [
        ("llama", 2, [(1, 8), (4, 1)], False),
        ("qwen3", 4, [(4, 2), (1, 4)], True),
        ("gpt_oss", 8, [(2, 4), (1, 8)], True),
    ],
)
def test_decoding_on_eight_devices_is_decoding_on_one(family, kv_heads, meshes, some_tokens, on_eight_devices):
    vocabulary = "b'\\x55' * 24 + b'\\x05'" if some_tokens else "None"
    names = {"FAMILY": repr(family), "KV_HEADS": str(kv_heads), "MESHES": repr(meshes), "VOCABULARY": vocabulary}
    script = SPLIT
    for name, value in names.items():
        script = script.replace(name, value)
    on_eight_devices(script)


TURNED = """
import sys
from pathlib import Path
import jax, numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding
import dflash
from flax import nnx
from dflash.models import mesh
from dflash.weights.load import new_draft
from dflash.weights.tiny import write_tiny_target

folder = Path(sys.argv[1]) / "target"
windows = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
write_tiny_target(folder, "gpt_oss", num_attention_heads=8, num_key_value_heads=4, vocab_size=199,
                  num_hidden_layers=2, **windows)
prompts = [[5, 17, 3, 120, 88], [61] * 19]
plain = dflash.load_target(folder)
some = b"\\x55" * 24 + b"\\x05"
draft = new_draft(plain.config, num_layers=2, block_size=4, target_layer_ids=(0, 1), vocabulary=some)


def decoded(target, draft):
    return dflash.decode(target, draft, prompts, block_size=4, max_new_tokens=10, stop_token_ids=()).tokens


expected = decoded(plain, draft)
# A CPU keeps what it is told of layouts, too: so each weight is turned.
mesh.in_order = lambda devices, split, order: Format(Layout(order[::-1]), NamedSharding(devices, split))
target = dflash.load_target(folder, mesh=mesh.make_mesh(jax.devices(), dp=2, tp=4))
assert target.layers[0].attention.qkv.weight[...].format.layout.major_to_minor == (1, 0)
assert target.layers[0].mlp.down[...].format.layout.major_to_minor != (0, 1, 2)
assert decoded(target, draft) == expected
tokens = np.asarray(prompts[1])[None]
assert np.allclose(target.forward(tokens)[0], plain.forward(tokens)[0], atol=1e-4)
pairs = zip(jax.tree.leaves(nnx.state(mesh.gather(target))), jax.tree.leaves(nnx.state(plain)), strict=True)
assert all(np.array_equal(a, b) for a, b in pairs)
print("same")
"""


@pytest.mark.slow
def test_weights_that_lie_in_another_order_are_the_same_weights(on_eight_devices):
    """As on a TPU: loaded into these layouts, taken by every program as they lie, and gathered."""
    on_eight_devices(TURNED)


COUNTED = """
import jax, jax.numpy as jnp
from flax import nnx
from dflash.config import DraftConfig
from dflash.decoding.loop import DecodeShape, Programs
from dflash.models.draft import Draft
from dflash.models.gpt_oss import GptOss
from dflash.models.mesh import make_mesh, place
from dflash.weights.config_json import read_target_config
from dflash.weights.tiny import tiny_config

config = read_target_config(tiny_config("gpt_oss", num_attention_heads=8, num_key_value_heads=2))
mesh = make_mesh(jax.devices(), tp=8)
target = place(nnx.eval_shape(lambda: GptOss(config, rngs=nnx.Rngs(0))), mesh)
text = Programs(target, None, DecodeShape(mode="greedy", block_size=1, batch=4, max_prompt_len=16,
                                         max_new_tokens=8)).loop.as_text()
reduces, gathers = text.count("stablehlo.all_reduce"), text.count("stablehlo.all_gather")
assert (reduces, gathers) == (2 * config.num_layers + 1, 1), (reduces, gathers)
assert "all_to_all" not in text and "collective_permute" not in text
for weight in jax.tree.leaves(nnx.state(target)):
    whole = weight.size == 1 or weight.sharding.is_fully_replicated
    assert not whole or weight.ndim == 1 or weight.shape[0] == config.experts.count, weight
print("same")
"""


@pytest.mark.slow
def test_a_step_exchanges_twice_a_layer_and_twice_more(on_eight_devices):
    on_eight_devices(COUNTED)
