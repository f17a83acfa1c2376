"""Our draft against the reference implementation (PyPI `dflash==0.1.0`, torch): the same weights, the same numbers."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dflash.config import ConfigError, ConvConfig, RopeConfig, SelectorConfig, build_target_layer_ids
from dflash.decoding.loop import Decoder, DecodeShape
from dflash.models.kv_cache import empty_cache
from dflash.weights.huggingface import write_draft
from dflash.weights.load import load_target, read_any_draft
from dflash.weights.tiny import write_tiny_target

pytestmark = pytest.mark.oracle
SCRIPT = Path(__file__).parents[1] / "reference_draft.py"
BLOCK, WINDOW, HIDDEN = 6, 16, 64
# Context tokens before each block: a prompt longer than the window, then what blocks gave (1 to 6 tokens each).
CONTEXTS = [37, 1, 6, 3, 2, 6, 6, 1, 4, 5]
SECOND = {
    "conv": ConvConfig(kernel_size=3, group_size=16),
    "selector": SelectorConfig(rank=8, top_k=5),
}
CASES = {
    "full-k1": {"windows": (None, None), "causal": (False, False), "target_layer_ids": (1,)},
    "full-k2": {"windows": (None, None), "causal": (False, False), "target_layer_ids": (0, 2)},
    "full-causal-k3": {"windows": (None, None), "causal": (True, True), "target_layer_ids": (0, 1, 3)},
    "sliding-k2": {"windows": (WINDOW, WINDOW), "causal": (True, True), "target_layer_ids": (1, 2)},
    "sliding-noncausal-k4": {"windows": (WINDOW, WINDOW), "causal": (False, False), "target_layer_ids": (0, 1, 2, 3)},
    "mixed-k5": {"windows": (None, WINDOW, WINDOW), "causal": (False, True, True), "target_layer_ids": range(5)},
    "mixed-noncausal-k6": {"windows": (WINDOW, None), "causal": (False, False), "target_layer_ids": range(6)},
    "mixed-bias-yarn": {
        "windows": (WINDOW, None),
        "causal": (True, False),
        "target_layer_ids": (2, 0),
        "attention_bias": True,
        "num_kv_heads": 1,
        "max_position": 128,
        "rope": RopeConfig(theta=5e4, kind="yarn", factor=4.0, original_max_position=32),
    },
    "second": {"windows": (None, WINDOW), "causal": (False, True), "target_layer_ids": (1, 3)} | SECOND,
}
# A small vocabulary and chosen seeds, so that an untrained draft is right now and then.
DECODES = {
    "full": {"windows": (None, None), "causal": (False, False)},
    "sliding": {"windows": (WINDOW, None), "causal": (True, False)},
    "second": {"windows": (None, None), "causal": (False, False)} | SECOND,
}
SMALL_VOCAB, BUDGET = 7, 48
LAYER_IDS = [(layers, features) for layers in range(1, 65) for features in range(1, 9)]


def decode_requests():
    rng = np.random.default_rng(11)
    prompts = [rng.integers(0, SMALL_VOCAB, n).tolist() for n in (3, 21, 50)]
    return [{"prompt": p, "max_new_tokens": BUDGET, "stops": []} for p in prompts]


@pytest.fixture(scope="module")
def job(tmp_path_factory, draw_draft, reference):
    """A directory with what the reference is asked and, when this returns, what it answered."""
    job, rng = tmp_path_factory.mktemp("reference"), np.random.default_rng(7)
    write_tiny_target(job / "target", "llama", num_hidden_layers=2)
    write_tiny_target(job / "small", "llama", num_hidden_layers=4, vocab_size=SMALL_VOCAB)
    request = {"blocks": [], "decodes": [], "layer_ids": LAYER_IDS}
    for seed, (name, changes) in enumerate(CASES.items()):
        ids = tuple(changes["target_layer_ids"])
        draft = draw_draft(seed, **(changes | {"target_layer_ids": ids, "num_target_layers": 8, "block_size": BLOCK}))
        write_draft(draft, job / name)
        features = rng.normal(size=(sum(CONTEXTS), len(ids) * HIDDEN)).astype(np.float32)
        # An anchor and masks, as in decoding.
        blocks = np.full((len(CONTEXTS), BLOCK), draft.config.mask_token_id)
        blocks[:, 0] = rng.integers(0, 199, len(CONTEXTS))
        np.savez(job / f"{name}-inputs.npz", features=features, blocks=blocks)
        inputs = {"draft": name, "target": "target", "inputs": f"{name}-inputs.npz", "contexts": CONTEXTS}
        request["blocks"].append({"name": name, **inputs})
    for seed, (name, changes) in enumerate(DECODES.items(), 10):
        config = {"vocab_size": SMALL_VOCAB, "target_layer_ids": (0, 2), "num_target_layers": 4, "block_size": BLOCK}
        write_draft(draw_draft(seed, **config, **changes), job / f"decode-{name}")
        decode = {"name": name, "draft": f"decode-{name}", "target": "small", "requests": decode_requests()}
        request["decodes"].append(decode)
    (job / "job.json").write_text(json.dumps(request))
    done = subprocess.run(
        [sys.executable, "-P", str(SCRIPT), str(job)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"the reference failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return job


@pytest.fixture(scope="module")
def answer(job):
    return json.loads((job / "answer.json").read_text())


def run_blocks(draft, target, inputs):
    """Hidden [T, H] and logits [T, V] of every block, through our caches."""
    graph, weights = nnx.split((draft, target))
    features, blocks = inputs["features"], inputs["blocks"].astype(np.int32)
    K = draft.config.num_features

    @jax.jit
    def propose(weights, cache, context, keep, block):
        draft, target = nnx.merge(graph, weights)
        cache = draft.append_context(list(context), cache).commit(keep)
        x, cache = draft.block(target.embed(block), cache)
        return cache, x.T, target.logits(x).T

    # Contexts come in pieces of one size, as the decode loop appends them; only the last keeps less than it appends.
    cache, known, outputs = empty_cache(draft, batch=1, capacity=128, block=BLOCK), 0, []
    for i, count in enumerate(CONTEXTS):
        for start in range(known, known + count, BLOCK):
            keep = min(BLOCK, known + count - start)
            rows = features[start : start + keep]
            rows = np.concatenate([rows, np.full((BLOCK - keep, rows.shape[1]), 9.0, np.float32)])
            context = rows.reshape(BLOCK, K, HIDDEN).transpose(1, 2, 0)
            cache, hidden, logits = propose(weights, cache, context, jnp.array([keep]), blocks[i][None])
        known += count
        outputs.append((np.asarray(hidden), np.asarray(logits)))
    return outputs


@pytest.mark.parametrize("name", CASES)
def test_hidden_states_and_logits_are_the_references(job, name):
    assert CONTEXTS[0] > WINDOW
    draft, target = read_any_draft(job / name), load_target(job / "target")
    theirs = np.load(job / f"{name}.npz")
    proposals = set()
    for i, (hidden, logits) in enumerate(run_blocks(draft, target, np.load(job / f"{name}-inputs.npz"))):
        np.testing.assert_allclose(hidden, theirs[f"hidden{i}"], atol=1e-4, err_msg=f"block {i}")
        np.testing.assert_allclose(logits, theirs[f"logits{i}"], atol=1e-4, err_msg=f"block {i}")
        proposals |= set(logits[1:].argmax(-1).tolist())
    assert len(proposals) >= 5, f"a draft that proposes {proposals} proves nothing"


def run_loop(decoder, requests):
    """Tokens, accept lengths and produced lengths of each request, one after the other."""
    for request in requests:
        state = decoder.prefill([request["prompt"]], budgets=[request["max_new_tokens"]], stops=[request["stops"]])
        state = decoder.steps(state)
        tokens = np.asarray(state.tokens)[0, : int(state.count[0])].tolist()
        accepted, produced = (np.asarray(x)[0] for x in (state.accepted, state.produced))
        yield tokens, accepted[accepted >= 0].tolist(), produced[produced >= 0].tolist()


@pytest.mark.parametrize("name", DECODES)
def test_a_whole_decode_is_the_references(job, answer, name):
    target, draft = load_target(job / "small"), read_any_draft(job / f"decode-{name}")
    shape = {"batch": 1, "max_prompt_len": 50, "max_new_tokens": BUDGET}
    greedy = Decoder(target, None, DecodeShape(mode="greedy", block_size=1, **shape))
    block = Decoder(target, draft, DecodeShape(mode="cached_block_verify", block_size=BLOCK, **shape))
    requests = decode_requests()
    accept_lens = []
    for ours, plain, theirs in zip(
        run_loop(block, requests), run_loop(greedy, requests), answer["decodes"][name], strict=True
    ):
        tokens, accepted, produced = ours
        assert tokens == plain[0] == theirs["tokens"]
        # The reference shortens a block that passes the budget, and a shorter block proposes otherwise.
        whole = int((np.cumsum([0, *produced])[:-1] + BLOCK <= BUDGET).sum())
        assert whole >= 8
        assert [a + 1 for a in accepted[:whole]] == produced[:whole] == theirs["produced"][:whole]
        accept_lens += accepted
    assert len(set(accept_lens)) >= 3, f"accept lengths {accept_lens} prove little"
    assert len(set(tokens)) >= 4


def test_target_layer_ids_are_the_references(answer):
    """Where theirs are different layers, ours are the same; where they are not, ours are refused."""
    equal = 0
    for (layers, features), theirs in zip(LAYER_IDS, answer["layer_ids"], strict=True):
        if len(set(theirs)) == features and all(0 <= i < layers for i in theirs):
            assert list(build_target_layer_ids(layers, features)) == theirs
            equal += 1
        else:
            with pytest.raises(ConfigError, match="different layers"):
                build_target_layer_ids(layers, features)
    assert equal > 300
