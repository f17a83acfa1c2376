"""decode(): the rules it refuses by, and the same tokens in every mode."""

import dataclasses
import gc
import os
import re
import subprocess
import sys
import textwrap
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dflash import ConfigError, RequestError, ScriptedDraft, decode, init_draft, load_prompts, load_target, stream
from dflash.decoding.decode import check_request, compiled_decoder, partial_results
from dflash.decoding.loop import DecodeShape
from dflash.decoding.sampling import Sampling
from dflash.models.draft import Draft
from dflash.weights.tiny import write_tiny_target

LAYERS = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
BLOCK = 4
# Ragged: lengths, budgets and stop tokens of a row are its own.
PROMPTS = [[5, 17, 3, 120, 88, 41, 9, 66, 7, 30, 2], [61], [90, 14, 14, 8]]
BUDGETS = [20, 9, 15]
CACHED = ("cached_sequential_verify", "cached_block_verify")


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decode")
    return {f: load_target(write_tiny_target(folder / f, f, **LAYERS)) for f in ("llama", "gpt_oss")}


@pytest.fixture(scope="module")
def target(targets):
    return targets["llama"]


def new_draft(target, **settings):
    return init_draft(target, **{"num_layers": 1, "block_size": BLOCK, "target_layer_ids": (0, 1)} | settings)


@pytest.fixture(scope="module")
def draft(target):
    return new_draft(target)


@pytest.fixture(scope="module")
def greedy(target):
    """Greedy tokens of PROMPTS, one block longer than any budget."""
    return decode(target, None, PROMPTS, mode="greedy", max_new_tokens=20 + BLOCK).tokens


def stops_of(greedy):
    """A stop token of each row, at a place where it is new; none for the last."""
    places = [next(i for i in range(5, 20) if greedy[r][i] not in greedy[r][:i]) for r in (0, 1)]
    return [[greedy[0][places[0]], 198], [greedy[1][places[1]]], []], places


# ---- requests


def check(target, draft, prompts=((1, 2, 3),), **settings):
    defaults = {
        "mode": "cached_block_verify",
        "block_size": None,
        "max_new_tokens": 8,
        "stop_token_ids": (),
        "allow_larger_block": False,
    }
    return check_request(target, draft, prompts, **defaults | settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "fast"}, r"^mode .*\['greedy', 'cached_block_verify', .*got 'fast'$"),
        ({"sampling": Sampling(temperature=-1)}, r"^temperature .*\b0, got -1$"),
        ({"sampling": Sampling(top_k=-1)}, r"^top_k .*\b0, got -1$"),
        ({"sampling": Sampling(top_k=1.5)}, r"^top_k .*integer, got 1\.5$"),
        ({"sampling": Sampling(temperature="hot")}, "^temperature .*number, got 'hot'$"),
        ({"sampling": Sampling(temperature=float("inf"))}, "^temperature .*1000000000, got inf$"),
        ({"sampling": Sampling(top_p=0.0)}, r"^top_p .*above 0, got 0\.0$"),
        ({"sampling": Sampling(min_p=2)}, r"^min_p .*\b1, got 2$"),
        ({"sampling": Sampling(seed=2**32)}, "^seed .*4294967295, got 4294967296$"),
        ({"mode": "greedy"}, r"^mode greedy .*got a draft: leave the draft out \(None in Python\)$"),
        ({"prompts": []}, "^prompts .*got none$"),
        ({"prompts": np.zeros((0, 4), int)}, "^prompts .*got none$"),
        ({"prompts": [[1], []]}, "prompt 1 is empty$"),
        ({"prompts": [[1], [5, 199]]}, r"^token ids .*0\.\.198; prompt 1 has 199: .*tokenizer"),
        ({"prompts": [[-1]]}, r"^token ids .*0\.\.198; prompt 0 has -1: .*tokenizer"),
        ({"prompts": ["text"]}, r"^text and messages need tokenizer=.*; prompt 0 is 'text'$"),
        ({"prompts": [1, 2]}, r"^token ids \(prompt 0\) .*integers, got 1$"),
        ({"prompts": [[1.5]]}, r"^token ids \(prompt 0\) .*integers, got \[1\.5\]$"),
        ({"block_size": 1}, r"^block_size .*\b2 .*got 1$"),
        ({"block_size": 2.0}, r"^block_size .*integer, got 2\.0$"),
        ({"block_size": 5}, r"^block_size 5 .*\b4\b.*trained.*allow_larger_block"),
        ({"max_new_tokens": 0}, r"^max_new_tokens .*\b1, got 0$"),
        ({"max_new_tokens": [3, -2], "prompts": [[1], [2]]}, r"^max_new_tokens .*\b1, got -2$"),
        ({"max_new_tokens": [3, 4]}, r"^max_new_tokens .*per prompt \(1\), got 2$"),
        ({"max_new_tokens": []}, r"^max_new_tokens .*per prompt \(1\), got 0$"),
        ({"max_new_tokens": 8.0}, r"^max_new_tokens .*integers, got 8\.0$"),
        ({"stop_token_ids": [[1], [2]]}, r"^stop_token_ids .*per prompt \(1\), got 2$"),
        ({"stop_token_ids": ["</s>"]}, "^stop_token_ids .*integers, got '</s>'$"),
        ({"stop_token_ids": "</s>"}, "^stop_token_ids .*integers, got '</s>'$"),
        ({"stop_token_ids": 2.5}, r"^stop_token_ids .*integers, got 2\.5$"),
        ({"stop_token_ids": [2, 2**31]}, "^stop_token_ids .*got 2147483648$"),
        ({"stop_token_ids": 10**30}, "^stop_token_ids .*got 10{30}$"),
        ({"mode": ["greedy"]}, r"^mode .*got \['greedy'\]$"),
        ({"prompts": [b"text"]}, r"^token ids \(prompt 0\) .*integers, got b'text'$"),
        ({"prompts": [np.array(5)]}, r"^token ids \(prompt 0\) .*integers, got array\(5\)$"),
        ({"stop_token_ids": range(9)}, r"\b8 stop tokens.*got 9$"),
        ({"stop_token_ids": [list(range(9))]}, r"\b8 stop tokens.*got 9$"),
    ],
)
def test_refused(target, draft, settings, message):
    with pytest.raises(RequestError, match=message):
        check(target, draft, **settings)


@pytest.mark.parametrize("mode", CACHED)
def test_cached_modes_need_a_draft(target, mode):
    with pytest.raises(
        RequestError, match=f"mode {mode} .*draft, got none: .*init_draft in Python, --draft in a command"
    ):
        check(target, None, mode=mode)


def test_decode_refuses_what_check_request_does(target, draft):
    with pytest.raises(RequestError, match=r"temperature .*got nan; top_k .*got 1\.5"):
        decode(target, draft, PROMPTS, temperature=float("nan"), top_k=1.5)


def abstract_draft(config):
    return nnx.eval_shape(lambda: Draft(config, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 32}, "hidden size .*32, .*target.* 64"),
        ({"vocab_size": 250}, "vocabulary .*250 .*target.* 199"),
        ({"target_layer_ids": (0, 2)}, r"layers \[2\] .*target .*0\.\.1"),
        ({"mask_token_id": 199}, "mask token 199 .*vocabulary of 199"),
    ],
)
def test_a_draft_that_does_not_fit_is_refused(target, draft, changes, message):
    unfit = abstract_draft(dataclasses.replace(draft.config, **changes))
    for mode in (*CACHED, "recompute"):
        with pytest.raises(ConfigError, match=f"draft does not fit.*{message}"):
            check(target, unfit, mode=mode)


def test_every_misfit_is_told_at_once(target, draft):
    unfit = abstract_draft(dataclasses.replace(draft.config, hidden_size=32, vocab_size=250, mask_token_id=249))
    with pytest.raises(ConfigError, match=r"hidden size .* vocabulary .* mask token"):
        check(target, unfit)


def test_position_limit(target, draft):
    small = abstract_draft(dataclasses.replace(draft.config, max_position=32))
    prompts = [[1] * 3, [1] * 20]
    check(target, small, prompts, max_new_tokens=8)
    with pytest.raises(RequestError, match=r"max_new_tokens .*within 32 positions; prompt 1 needs 20 \+ 9 \+ 4: "):
        check(target, small, prompts, max_new_tokens=[20, 9])
    # The target's own limit, without a draft.
    limit = target.config.max_position
    check(target, None, mode="greedy", max_new_tokens=limit - 4)
    with pytest.raises(RequestError, match=f"within {limit} positions; prompt 0 needs 3 "):
        check(target, None, mode="greedy", max_new_tokens=limit - 3)


def test_larger_blocks_when_told(target, draft):
    assert check(target, draft, block_size=BLOCK + 3, allow_larger_block=True).block_size == BLOCK + 3
    assert check(target, draft).block_size == BLOCK
    assert check(target, draft, block_size=2).block_size == 2


def test_a_scripted_draft_has_one_output_per_prompt(target, draft):
    script = ScriptedDraft(draft=draft, outputs=[[1, 2]], accept_len=1)
    with pytest.raises(RequestError, match=r"scripted draft .*per prompt \(2\), got 1"):
        check(target, script, [[1], [2]])
    with pytest.raises(ValueError, match=r"accept_len .*0\.\.1 .*blocks of 2, got 3"):
        check(target, dataclasses.replace(script, accept_len=3), block_size=2)
    for slip in ({"accept_len": "x"}, {"outputs": ["ab"]}, {"outputs": [[10**30]]}, {"outputs": 5}, {"draft": None}):
        with pytest.raises(RequestError):
            check(target, dataclasses.replace(script, **slip))


@pytest.mark.parametrize("kind", [list, tuple, np.array, jnp.array], ids=["list", "tuple", "numpy", "jax"])
def test_integers_of_any_kind(target, draft, kind):
    request = check(
        target,
        draft,
        kind([[1, 2], [3, 4]]),
        block_size=np.int64(3),
        max_new_tokens=kind([5, 6]),
        stop_token_ids=kind([[7], [8]]),
    )
    assert request.prompts == [[1, 2], [3, 4]]
    assert (request.budgets, request.stops, request.block_size) == ([5, 6], [[7], [8]], 3)
    plain = (request.block_size, *request.budgets, *request.prompts[0], *request.stops[0])
    assert {type(v) for v in plain} == {int}
    assert check(target, draft, [kind([1, 2]), kind([3])]).prompts == [[1, 2], [3]]


@pytest.mark.parametrize(
    ("given", "stops"),
    [
        ((), [[], []]),
        ([], [[], []]),
        (7, [[7], [7]]),
        (np.int32(7), [[7], [7]]),
        ([7, 8], [[7, 8], [7, 8]]),
        ((7,), [[7], [7]]),
        (np.array([7, 8]), [[7, 8], [7, 8]]),
        (frozenset([7]), [[7], [7]]),
        ([[7], []], [[7], []]),
        ([(), (7, 8)], [[], [7, 8]]),
        ([np.array([7]), [8, 9]], [[7], [8, 9]]),
    ],
)
def test_stop_tokens_for_all_or_per_row(target, draft, given, stops):
    assert check(target, draft, [[1], [2]], stop_token_ids=given).stops == stops


@pytest.mark.parametrize("kind", [int, np.int64, np.array, jnp.int32], ids=["int", "int64", "array", "jax"])
def test_one_budget_for_all(target, draft, kind):
    assert check(target, draft, [[1], [2]], max_new_tokens=kind(6)).budgets == [6, 6]


# ---- tokens


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_the_modes_agree_on_ragged_rows(targets, family):
    target = targets[family]
    draft = new_draft(target)
    trusted = decode(target, None, PROMPTS, mode="recompute", max_new_tokens=20 + BLOCK)
    assert len({t for row in trusted.tokens for t in row}) > 20, "a target that repeats itself proves nothing"
    stops, places = stops_of(trusted.tokens)
    ends = [min(b, p + 1) for b, p in zip(BUDGETS, [*places, 99], strict=True)]
    expected = [row[:n] for row, n in zip(trusted.tokens, ends, strict=True)]
    settings = {"max_new_tokens": BUDGETS, "stop_token_ids": stops}
    plain = decode(target, None, PROMPTS, mode="greedy", **settings)
    assert plain.tokens == expected
    assert plain.produced == [[1] * (n - 1) for n in ends]
    for proposer in (draft, ScriptedDraft(draft=draft, outputs=trusted.tokens, accept_len=2)):
        results = {m: decode(target, proposer, PROMPTS, mode=m, **settings) for m in (*CACHED, "recompute")}
        for mode, result in results.items():
            assert result.tokens == expected, mode
            assert result.accept_lens == results["recompute"].accept_lens, mode
            assert result.produced == results["recompute"].produced, mode
        for row, end in enumerate(ends):
            check_row(result.tokens[row], result.accept_lens[row], result.produced[row], end)


def check_row(tokens, accept_lens, produced, end):
    """What a row says of itself: blocks that add up, whole ones but the last."""
    assert len(tokens) == end == 1 + sum(produced)
    assert len(accept_lens) == len(produced)
    assert [a + 1 for a in accept_lens[:-1]] == produced[:-1]
    assert all(1 <= p <= a + 1 for a, p in zip(accept_lens, produced, strict=True))


@pytest.mark.parametrize("accept_len", range(BLOCK))
def test_scripted_drafts_are_accepted_exactly_so_far(target, draft, greedy, accept_len):
    result = decode(
        target,
        ScriptedDraft(draft=draft, outputs=greedy, accept_len=accept_len),
        PROMPTS,
        max_new_tokens=BUDGETS,
        stop_token_ids=(),
    )
    assert result.tokens == [row[:n] for row, n in zip(greedy, BUDGETS, strict=True)]
    assert {a for row in result.accept_lens for a in row} == {accept_len}
    assert [len(row) for row in result.accept_lens] == [-(-(n - 1) // (accept_len + 1)) for n in BUDGETS]
    assert result.metrics["accept_len_mean"] == accept_len


def test_larger_and_smaller_blocks_give_the_same_tokens(target, draft, greedy):
    for size in (2, 7):
        result = decode(target, draft, PROMPTS, block_size=size, max_new_tokens=20, allow_larger_block=True)
        assert result.tokens == [row[:20] for row in greedy]
        assert result.block_size == size


def test_the_first_token_can_be_the_last(target, draft, greedy):
    """By its budget in row 0, as a stop token in rows 1 and 2."""
    ends = {"max_new_tokens": [1, 20, 20], "stop_token_ids": [[], greedy[1][:1], greedy[2][:1]]}
    for mode, proposer in (("greedy", None), *((m, draft) for m in (*CACHED, "recompute"))):
        result = decode(target, proposer, PROMPTS, mode=mode, **ends)
        assert result.tokens == [row[:1] for row in greedy]
        assert result.produced == [[], [], []]
        assert result.metrics["num_output_tokens"] == 3
        assert result.metrics["tok_s_total"] is None


def test_a_long_prompt_takes_several_chunks(target, draft):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 199, 300), rng.integers(0, 199, 7), rng.integers(0, 199, 129)]
    expected = decode(target, None, prompts, mode="recompute", max_new_tokens=6).tokens
    assert decode(target, draft, prompts, max_new_tokens=6).tokens == expected


# ---- figures


def test_metrics_of_greedy_have_no_acceptance(target):
    m = decode(target, None, PROMPTS, mode="greedy", max_new_tokens=20 + BLOCK).metrics
    assert m["num_output_tokens"] == 3 * (20 + BLOCK)
    assert (m["num_drafts"], m["accept_rate"], m["acceptance_length"], m["accept_histogram"]) == (0, None, None, None)
    assert m["tok_s_total"] > 0
    assert m["ttft_ms"] > 0


def test_metrics_of_recompute_have_no_times(target, draft):
    m = decode(target, draft, PROMPTS[1:2], mode="recompute", max_new_tokens=5).metrics
    assert m["num_drafts"] > 0
    for name in ("tok_s_total", "ttft_ms", "tpot_ms", "compile_s"):
        assert m[name] is None, name


def test_asked_again_nothing_compiles(target, draft, caplog):
    prompts = [[9, 8, 7], [6]]
    for proposer, mode in ((None, "greedy"), (draft, "cached_block_verify")):
        first = decode(target, proposer, prompts, mode=mode, max_new_tokens=11)
        assert first.compile_s > 0
        with jax.log_compiles():
            # Other prompts and stop tokens of the same shape.
            again = decode(target, proposer, prompts[::-1], mode=mode, max_new_tokens=[11, 4], stop_token_ids=[198])
        assert again.compile_s == 0
        assert "Finished XLA compilation" not in caplog.text
        assert decode(target, proposer, prompts, mode=mode, max_new_tokens=11).tokens == first.tokens


def test_a_few_tokens_more_compile_nothing(target, draft, caplog):
    for proposer, mode in ((None, "greedy"), (draft, "cached_block_verify")):
        decode(target, proposer, [[4, 3]], mode=mode, max_new_tokens=48)
        with jax.log_compiles():
            more = decode(target, proposer, [[4, 3, 2]], mode=mode, max_new_tokens=50)
        assert more.compile_s == 0
        assert "Finished XLA compilation" not in caplog.text
        assert len(more.tokens[0]) == 50


def test_what_was_compiled_serves_every_network_of_the_form_and_keeps_none(tmp_path):
    """Eight targets of a model that fills the memory would not be eight in it."""
    one = load_target(write_tiny_target(tmp_path / "one", **LAYERS))
    decode(one, None, [[1, 2]], mode="greedy", max_new_tokens=5)
    other = load_target(write_tiny_target(tmp_path / "other", seed=8, **LAYERS))
    drafts = [new_draft(other, seed=s) for s in (1, 2)]
    held = [weakref.ref(network) for network in (one, other, *drafts)]
    weights = [weakref.ref(network.norm.weight[...]) for network in (one, other, *drafts)]
    again = decode(other, None, [[1, 2]], mode="greedy", max_new_tokens=5)
    assert again.compile_s == 0
    assert again.tokens == decode(other, None, [[1, 2]], mode="recompute", max_new_tokens=5).tokens
    seconds = [decode(other, d, [[1, 2]], mode="cached_block_verify", max_new_tokens=5).compile_s for d in drafts]
    assert seconds[1] == 0
    del one, other, drafts
    gc.collect()
    assert [ref() for ref in held + weights] == [None] * 8


def test_the_first_prefill_compiles_nothing(target, draft, caplog):
    """compile_s is all there is: what the first token waits for is prefill."""
    request = check(target, draft, [[1, 2], [3]], max_new_tokens=13)
    shape = DecodeShape(mode=request.mode, block_size=BLOCK, batch=2, max_prompt_len=32, max_new_tokens=13)
    decoder = compiled_decoder(target, draft, shape)
    with jax.log_compiles():
        state = decoder.prefill(request.prompts, budgets=request.budgets, stops=request.stops)
        decoder.steps(state)
        assert "Finished XLA compilation" not in caplog.text
        jax.jit(lambda x: x * 3.25)(jnp.ones(3))
        assert "Finished XLA compilation" in caplog.text, "the check can't see a compilation"


def test_changed_weights_are_used(tmp_path):
    """Training changes weights in place between two decodes."""
    target = load_target(write_tiny_target(tmp_path / "target", **LAYERS))
    other = load_target(write_tiny_target(tmp_path / "other", seed=8, **LAYERS))
    draft = new_draft(target)
    trained = new_draft(target, seed=4)
    settings = {"max_new_tokens": 20, "mode": "cached_block_verify"}
    before = decode(target, draft, PROMPTS, **settings)

    nnx.update(target, nnx.state(other))
    changed = decode(target, draft, PROMPTS, **settings)
    assert changed.compile_s == 0
    assert changed.tokens != before.tokens
    assert changed.tokens == decode(other, None, PROMPTS, mode="recompute", max_new_tokens=20).tokens

    # The tokens can't tell which draft proposed them, so the decoder is asked what it holds.
    nnx.update(draft, nnx.state(trained))
    decode(target, draft, PROMPTS, **settings)
    shape = DecodeShape(mode=settings["mode"], block_size=BLOCK, batch=3, max_prompt_len=32, max_new_tokens=20)
    held = compiled_decoder(target, draft, shape)._weights[1]
    wanted = dict(nnx.to_flat_state(nnx.state(trained)))
    for path, value in nnx.to_flat_state(held):
        assert np.array_equal(value.get_value(), wanted[path].get_value()), path


@pytest.mark.parametrize("every", [1, 3, 100])
def test_stream_gives_what_decode_gives(target, draft, greedy, every):
    request = check(target, draft, PROMPTS, max_new_tokens=BUDGETS, stop_token_ids=stops_of(greedy)[0])
    whole = decode(target, draft, PROMPTS, max_new_tokens=BUDGETS, stop_token_ids=stops_of(greedy)[0])
    seen = []
    for result in partial_results(target, request, every):
        if seen:
            assert all(now[: len(then)] == then for then, now in zip(seen[-1], result.tokens, strict=True))
        seen.append(result.tokens)
    assert seen[0] == [row[:1] for row in greedy]
    assert (result.tokens, result.accept_lens, result.produced) == (whole.tokens, whole.accept_lens, whole.produced)
    assert len(seen) == 1 + -(-max(map(len, result.produced)) // every)
    assert min(result.prefill_s, result.decode_s) > 0


# ---- several devices

SHARDED = """
import sys
import jax, numpy as np
from jax.sharding import Mesh
import dflash

folder, prompts = sys.argv[1], [[5, 17, 3, 120, 88], [61]]
assert len(jax.devices()) == 8
mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("dp", "tp"))
plain, split = dflash.load_target(folder), dflash.load_target(folder, mesh=mesh)
assert len(split.layers[0].attention.qkv.weight.get_value().sharding.device_set) == 8
draft = dflash.init_draft(plain, num_layers=1, block_size=4, target_layer_ids=(0,))
expected = dflash.decode(plain, draft, prompts, mode="recompute", max_new_tokens=12).tokens
# The same draft goes from one target to the other and back.
for target in (split, plain):
    for mode in ("greedy", "cached_sequential_verify", "cached_block_verify", "recompute"):
        if target is split or mode == "recompute":
            proposer = None if mode == "greedy" else draft
            got = dflash.decode(target, proposer, prompts, mode=mode, max_new_tokens=12)
            assert got.tokens == expected, (mode, got.tokens, expected)
print("same")
"""


@pytest.mark.slow
def test_a_target_split_over_devices_decodes_the_same(tmp_path):
    folder = write_tiny_target(tmp_path / "target", vocab_size=200, num_hidden_layers=1)
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SHARDED), str(folder)],
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "same"


# ---- text, streams, log-probabilities


class Letters:
    """A tokenizer: one id per character; a conversation is its contents, end to end."""

    stop_token_ids = (198,)

    def encode(self, text):
        return [ord(c) for c in text]

    def encode_chat(self, messages):
        return [1, *self.encode("".join(m["content"] for m in messages))]

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_text_and_messages_are_encoded(target, draft):
    prompts = ["hi", [{"role": "user", "content": "hi"}], [104, 105]]
    result = decode(target, draft, prompts, tokenizer=Letters(), max_new_tokens=8)
    ids = [[104, 105], [1, 104, 105], [104, 105]]
    assert result.tokens == decode(target, draft, ids, max_new_tokens=8, stop_token_ids=198).tokens
    assert result.texts == ["".join(map(chr, row)) for row in result.tokens]
    assert decode(target, draft, ids, max_new_tokens=8).texts is None
    stop = result.tokens[0][3]
    cut = decode(target, draft, prompts, tokenizer=Letters(), max_new_tokens=8, stop_token_ids=stop)
    assert cut.tokens[0] == result.tokens[0][: result.tokens[0].index(stop) + 1]


def test_slips_of_a_caller_are_one_sentence(target, draft):
    for prompts, said in (
        ("hello", "got one alone: put it into a list ('hello')"),
        ([{"role": "user", "content": "hi"}], "got one alone"),
        ([[5], "hello"], "need tokenizer=load_tokenizer(...); prompt 1 is 'hello'"),
        ([[{"role": "user", "content": "hi"}]], "prompt 0 is [{'role'"),
        (None, "got None"),
        (5, "got 5"),
        (b"hello", "got b'hello'"),
        ({"a": [1]}, "got {'a': [1]}"),
        (load_prompts("builtin"), "encode(tokenizer)"),
    ):
        with pytest.raises(RequestError, match=re.escape(said)):
            decode(target, draft, prompts)
    for networks, said in (
        ((None, None), "load_target(...) gives, got NoneType"),
        ((target.config, None), "got TargetConfig"),
        ((draft, None), "load_target(...) gives, got Draft"),
        ((target, target), "load_draft(..., target) gives, got Llama"),
    ):
        with pytest.raises(RequestError, match=re.escape(said)):
            decode(*networks, PROMPTS)
    with pytest.raises(RequestError, match=re.escape("pass load_tokenizer('some')")):
        decode(target, draft, ["hi"], tokenizer="some")
    with pytest.raises(RequestError, match=re.escape("pass load_draft('smollm2-135m', target)")):
        decode(target, "smollm2-135m", PROMPTS)
    with pytest.raises(RequestError, match=re.escape("pass load_target('some')")):
        stream("some", draft, PROMPTS)


def test_prompts_and_stop_tokens_come_from_any_iterable(target, draft, greedy):
    settings = {"max_new_tokens": 8, "stop_token_ids": (token for token in [greedy[0][3]] * 20)}
    got = decode(target, draft, ((t for t in prompt) for prompt in PROMPTS), **settings).tokens
    assert got[0] == greedy[0][: greedy[0].index(greedy[0][3]) + 1]
    assert [part for parts in stream(target, draft, PROMPTS[:1], max_new_tokens=8, every=10**30) for part in parts]


@pytest.mark.parametrize("every", [1, 3])
def test_a_stream_gives_the_tokens_as_they_are_committed(target, draft, every):
    settings = {"max_new_tokens": BUDGETS, "temperature": 1.0, "seed": 2}
    parts = list(stream(target, draft, PROMPTS, every=every, **settings))
    result = decode(target, draft, PROMPTS, **settings)
    assert [[t for part in parts for t in part[row]] for row in range(3)] == result.tokens
    assert [len(row) for row in parts[0]] == [1, 1, 1]
    assert [len(row) for row in parts[1]] == [sum(p[:every]) for p in result.produced]


def test_a_stream_refuses_before_it_runs(target, draft):
    for settings, said in (
        ({"mode": "recompute"}, "does not stream"),
        ({"every": 0}, "at least 1, got 0"),
        ({"every": "2"}, "at least 1, got '2'"),
        ({"every": 1.5}, "at least 1, got 1.5"),
        ({"logprobs": True}, "use decode"),
    ):
        with pytest.raises(RequestError, match=said):
            stream(target, draft, PROMPTS, **settings)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_log_probabilities_are_the_targets_own(target, draft, temperature):
    result = decode(target, draft, PROMPTS, max_new_tokens=BUDGETS, temperature=temperature, top_k=9, logprobs=True)
    for prompt, tokens, got in zip(PROMPTS, result.tokens, result.logprobs, strict=True):
        logits = np.asarray(target.forward([[*prompt, *tokens]])[0], np.float64)[0, len(prompt) - 1 : -1]
        expected = logits[np.arange(len(tokens)), tokens] - np.log(np.exp(logits).sum(axis=1))
        np.testing.assert_allclose(got, expected, atol=1e-4)
    assert decode(target, draft, PROMPTS, max_new_tokens=4).logprobs is None
