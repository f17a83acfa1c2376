"""The audit: injected faults come out as defects whatever they do to the tokens, honest bfloat16 never does."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from dflash import ScriptedDraft, load_target
from dflash.decoding import modes
from dflash.decoding.audit import DEFECT, NEAR_TIE, Decoded, audit, audit_divergence, audit_rows
from dflash.decoding.decode import check_request, decode
from dflash.decoding.loop import Decoder, DecodeShape
from dflash.measuring.result import AuditResult, from_json
from dflash.models import kv_cache as caches
from dflash.models.draft import Draft
from dflash.models.kv_cache import KVCache
from dflash.models.llama import Llama
from dflash.weights.tiny import write_tiny_target

BLOCK, BUDGET, WINDOW = 8, 32, 16
SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}


def random_prompts(lengths, seed=7):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 199, n).tolist() for n in lengths]


PROMPTS = random_prompts((40, 3))


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """Full attention, then a window: a fault in either must be seen."""
    directory = write_tiny_target(tmp_path_factory.mktemp("audit") / "target", "qwen3", num_hidden_layers=3, **SLIDING)
    target = load_target(directory, "bfloat16")
    assert target.config.windows == (None, WINDOW, WINDOW)
    return target


@pytest.fixture(scope="module")
def draft(draw_draft):
    return draw_draft(dtype=jnp.bfloat16, num_target_layers=3, target_layer_ids=(0, 2))


@pytest.fixture(scope="module")
def outputs(target):
    """Greedy tokens, a block further than the budget."""
    return decode(target, None, PROMPTS, mode="greedy", max_new_tokens=BUDGET + BLOCK).tokens


@pytest.fixture(scope="module")
def run(target, draft, outputs):
    """Decodes with whatever is broken at the time, and audits: divergences, and faults of each row."""

    def run(mode="cached_block_verify", accept_len=3):
        request = check_request(
            target,
            draft if accept_len is None else ScriptedDraft(draft=draft, outputs=outputs, accept_len=accept_len),
            PROMPTS,
            mode=mode,
            block_size=BLOCK,
            max_new_tokens=BUDGET,
            stop_token_ids=(),
            allow_larger_block=False,
        )
        # What is broken is compiled in, so a decoder of its own.
        shape = DecodeShape(
            mode=mode,
            block_size=BLOCK,
            batch=len(PROMPTS),
            max_prompt_len=40,
            max_new_tokens=BUDGET,
        )
        decoded = Decoded.by(Decoder(target, draft, shape), request)
        faults = decoded.faults(target)
        return audit_rows(target, PROMPTS, [o[:BUDGET] for o in outputs], decoded.rows, faults), faults

    return run


def patched_append(change):
    """KVCache.append whose keys and values [G, D, B, T] at positions [B, T] go through `change` first."""
    append = KVCache.append

    def broken(self, layer, keys, values):
        return append(self, layer, *change(layer, keys, values, self.positions(keys.shape[3])))

    return broken


def corrupt_one_position(monkeypatch):
    def change(layer, keys, values, positions):
        return (jnp.where((positions == 30) & (layer == 1), -keys, keys), values)

    monkeypatch.setattr(KVCache, "append", patched_append(change))


def mix_up_rows(monkeypatch):
    def change(layer, keys, values, positions):
        return keys, jnp.roll(values, 1, axis=2) if layer == 2 else values

    monkeypatch.setattr(KVCache, "append", patched_append(change))


def move_blocks_by_one(monkeypatch):
    hidden = Llama.hidden

    def broken(self, tokens, *, cache=None, **rest):
        moved = cache.positions(BLOCK) + 1 if tokens.shape[1] == BLOCK else None
        return hidden(self, tokens, cache=cache, positions=moved, **rest)

    monkeypatch.setattr(Llama, "hidden", broken)


def change_window(by):
    def fault(monkeypatch):
        mask = caches.attention_mask

        def broken(queries, keys, *, window, causal):
            return mask(queries, keys, window=None if window is None else window + by, causal=causal)

        monkeypatch.setattr(caches, "attention_mask", broken)

    return fault


def forget_the_window(monkeypatch):
    mask = caches.attention_mask

    def broken(queries, keys, *, window, causal):
        return mask(queries, keys, window=None, causal=causal)

    monkeypatch.setattr(caches, "attention_mask", broken)


def commit_one_too_many(monkeypatch):
    commit = KVCache.commit
    monkeypatch.setattr(KVCache, "commit", lambda self, keep: commit(self, jnp.where(keep > 1, keep + 1, keep)))


def accept_one_too_many(monkeypatch):
    accept = modes.accept_length
    monkeypatch.setattr(modes, "accept_length", lambda c, p: jnp.minimum(accept(c, p) + 1, BLOCK - 1))


def keep_the_draft_cache_stale(monkeypatch):
    """Blocks leave the draft's cache as it was, while its length grows on."""
    append = Draft.append_context

    def broken(self, features, cache):
        batch = cache.lengths.shape[0]
        return cache if features[0].shape[1] == batch * BLOCK else append(self, features, cache)

    monkeypatch.setattr(Draft, "append_context", broken)


def swap_the_features(monkeypatch):
    append = Draft.append_context
    monkeypatch.setattr(Draft, "append_context", lambda self, features, cache: append(self, features[::-1], cache))


FAULTS = {
    "corrupted cache": (corrupt_one_position, "target cache: layer 1"),
    "values of another row": (mix_up_rows, "target cache: layer 2"),
    "positions off by one": (move_blocks_by_one, "target cache: layer 0"),
    "window one too wide": (change_window(1), "target cache: layer 2"),
    "window one too narrow": (change_window(-1), "target cache: layer 2"),
    "no window": (forget_the_window, "target cache: layer 2"),
    "one committed too many": (commit_one_too_many, "target cache: holds"),
    "one accepted too many": (accept_one_too_many, "below the target's"),
    "stale draft cache": (keep_the_draft_cache_stale, "draft cache: layer 0"),
    "features in another order": (swap_the_features, "draft cache: layer 0"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_a_defect(run, name):
    """By the caches or by the tokens, and never a near tie: not even where it parts two rows at one by luck."""
    inject, said = FAULTS[name]
    with pytest.MonkeyPatch.context() as patch:
        inject(patch)
        divergences, faults = run()
    assert any(said in fault for row in faults for fault in row), faults
    # The first row is past the window and the corrupted position, so every fault reaches it.
    assert faults[0], faults
    assert [d.verdict for d in divergences] == [DEFECT] * len(divergences)


@pytest.mark.parametrize("mode", ["cached_block_verify", "cached_sequential_verify"])
def test_honest_decoding_has_no_fault(run, mode):
    divergences, faults = run(mode, None)
    assert faults == [[]] * len(PROMPTS)
    assert [d.verdict for d in divergences] == [NEAR_TIE] * len(divergences)


@pytest.fixture(scope="module")
def close_call(target, outputs):
    """Greedy's tokens, and what it would have said had it taken its second choice at the place it was least sure."""
    prompt, greedy = PROMPTS[0], outputs[0][:BUDGET]
    logits = np.asarray(target.forward([[*prompt, *greedy]])[0])[0, len(prompt) - 1 : -1]
    ranked = np.argsort(-logits, axis=1)
    gaps = np.take_along_axis(logits, ranked[:, :1], 1) - np.take_along_axis(logits, ranked[:, 1:2], 1)
    place = int(np.argmin(gaps[1:-2, 0])) + 1
    second, hundredth = int(ranked[place, 1]), int(ranked[place, 99])

    def continued(token):
        known = [*prompt, *greedy[:place], token]
        rest = decode(target, None, [known], mode="greedy", max_new_tokens=BUDGET).tokens[0]
        return [*greedy[:place], token, *rest][:BUDGET]

    return greedy, place, continued(second), continued(hundredth)


def test_a_second_choice_within_the_noise_is_a_near_tie(target, close_call):
    greedy, place, second, _ = close_call
    divergence = audit_divergence(target, 3, PROMPTS[0], greedy, second)
    assert (divergence.prompt, divergence.token) == (3, place)
    assert (divergence.greedy_token, divergence.dflash_token) == (greedy[place], second[place])
    assert (divergence.verdict, divergence.why) == (NEAR_TIE, "")
    assert 0 <= divergence.margin <= divergence.noise
    assert f"near tie at prompt 3, token {place}: greedy {greedy[place]}" in divergence.sentence()


def test_a_choice_outside_the_noise_is_a_defect(target, close_call):
    greedy, place, _, hundredth = close_call
    divergence = audit_divergence(target, 0, PROMPTS[0], greedy, hundredth)
    assert (divergence.verdict, divergence.token) == (DEFECT, place)
    assert divergence.margin > divergence.noise
    assert divergence.why.startswith("the margin is above the noise")


def test_a_near_tie_does_not_hide_what_comes_behind_it(target, close_call):
    greedy, place, second, _ = close_call
    wrong = [*second[:-1], (second[-1] + 1) % 199]
    divergence = audit_divergence(target, 0, PROMPTS[0], greedy, wrong)
    assert (divergence.verdict, divergence.token) == (DEFECT, place)
    assert f"DFlash, token {BUDGET - 1} is {wrong[-1]}" in divergence.why
    # Greedy itself is held to the same.
    assert "greedy, token" in audit_divergence(target, 0, PROMPTS[0], wrong, greedy).why


def test_known_faults_of_a_row_leave_no_near_tie(target, close_call):
    greedy, _, second, _ = close_call
    divergence = audit_divergence(target, 0, PROMPTS[0], greedy, second, ["target cache: layer 1"])
    assert (divergence.verdict, divergence.why) == (DEFECT, "target cache: layer 1")


def test_a_row_that_ends_early_is_a_defect(target, outputs):
    greedy = outputs[1][:BUDGET]
    divergence = audit_divergence(target, 1, PROMPTS[1], greedy, greedy[:-3])
    assert (divergence.verdict, divergence.token, divergence.margin) == (DEFECT, BUDGET - 3, None)
    assert (divergence.greedy_token, divergence.dflash_token) == (greedy[-3], None)
    assert divergence.why == "one ends where the other continues"
    assert audit_divergence(target, 1, PROMPTS[1], greedy, greedy) is None


def test_float32_knows_no_near_tie(tmp_path):
    target = load_target(write_tiny_target(tmp_path / "target", num_hidden_layers=1))
    # Two tokens that can't be told apart: equal rows of the head.
    head = target.head.weight
    greedy = decode(target, None, [[5, 9]], mode="greedy", max_new_tokens=1).tokens[0]
    other = (greedy[0] + 1) % 199
    head.set_value(head.get_value().at[other].set(head.get_value()[greedy[0]]))
    divergence = audit_divergence(target, 0, [5, 9], greedy, [other])
    assert (divergence.margin, divergence.verdict, divergence.why) == (0, DEFECT, "float32 tokens must be equal")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_oss"])
def test_ten_thousand_honest_tokens(family, tmp_path, draw_draft):
    """3,600 tokens of each family in six decodes, every one and every cache judged: near ties at most."""
    changes = SLIDING if family == "qwen3" else {}
    target = load_target(write_tiny_target(tmp_path / family, family, **changes), "bfloat16")
    draft = draw_draft(dtype=jnp.bfloat16, num_target_layers=4, target_layer_ids=(1, 3))
    found = audit(target, draft, random_prompts((40, 3, 1, 17, 90)), max_new_tokens=120)
    assert found.defects == []
    assert found.tokens == 6 * 5 * 120
    figures = found.figures()
    assert figures["verdict"] == "lossless" + (" up to near ties" if found.near_ties else "")
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert from_json(figures | {"case": family}, AuditResult).tokens == found.tokens
