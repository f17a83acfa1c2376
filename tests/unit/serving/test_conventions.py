"""A server that breaks a convention is told from one that doesn't, and by the convention's name.

The server is the reference's own code behind HTTP (reference_server.py), with a draft that learned something.
"""

import asyncio
import dataclasses
import functools
import sys
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from learning import train, write_sequences
from safetensors.numpy import load_file, save_file

from dflash import decode, load_target, metrics, write_draft
from dflash.decoding.decode import RequestError
from dflash.measuring.gate import Floors
from dflash.models.draft import pack_tokens
from dflash.serving.adapters import ADAPTERS, Timed
from dflash.serving.connection import Connection
from dflash.serving.conventions import CONVENTIONS, LEVEL, chance, held_to_ours, own_figures
from dflash.serving.deployment import deployment
from dflash.serving.draft import served_draft
from dflash.serving.options import ServerOptions
from dflash.serving.run import _at_once, served_run
from dflash.serving.server import free_port, started
from dflash.text.prompts import Prompt, PromptSet
from dflash.weights.export import export_draft
from dflash.weights.load import new_draft
from dflash.weights.tiny import write_tiny_target

VOCAB, BLOCK, LAYERS, PROMPTS, BUDGET = 32, 8, (1, 2), 32, 40
SERVER = Path(__file__).parents[1] / "reference_server.py"
# Prompts here are ids; as text they are their digits.
TOKENIZER = SimpleNamespace(stop_token_ids=(), encode_raw=lambda text: [int(word) for word in text.split()])
# The draft has no window, and is not causal.
BROKEN = [c.name for c in CONVENTIONS if c.name not in ("the block not causal", "no sliding window")]


def figures(*lengths):
    return metrics.acceptance([lengths], BLOCK)


# ---- chance


ACCEPTED = [0] * 60 + [1] * 25 + [2] * 10 + [7] * 5


@pytest.mark.parametrize("per_slot", [True, False])
def test_the_same_acceptance_is_no_gap_and_another_is_one(per_slot):
    def reported(*lengths):
        told = figures(*lengths)
        return told if per_slot else told | {"accept_histogram": None, "accept_rate_per_pos": None}

    assert chance(figures(*ACCEPTED), reported(*ACCEPTED), 1) == 1
    assert chance(figures(*ACCEPTED), reported(*ACCEPTED[1:], 1), 1) > 0.5
    assert chance(figures(*ACCEPTED), reported(*[0] * 95, *[1] * 5), 1) < LEVEL


def test_the_same_prompts_again_prove_no_more():
    fewer = [0] * 68 + [1] * 20 + [2] * 8 + [7] * 4
    once = chance(figures(*ACCEPTED), figures(*fewer), 1)
    assert chance(figures(*ACCEPTED), figures(*fewer * 9), 9) == once > LEVEL


def test_rounds_that_share_no_accept_length_are_compared_by_their_mean():
    assert chance(figures(*ACCEPTED), figures(0, 1, 7), 3) > LEVEL


def test_slots_tell_what_the_mean_does_not():
    """The same mean, all of it in the first slot."""
    even = [1] * 50 + [0] * 50
    rare = [7] * 7 + [1] + [0] * 92
    assert sum(even) == sum(rare)
    assert chance(figures(*even), figures(*rare), 1) < LEVEL


def test_nothing_is_broken_without_a_gap():
    def own(convention):
        assert convention is None
        return figures(*ACCEPTED)

    held = held_to_ours(figures(*ACCEPTED), 1, own)
    assert (held.gap, held.broken, held.explained_by) == (False, {}, [])
    assert held.accept_len_mean == figures(*ACCEPTED)["accept_len_mean"]


def test_a_gap_that_nothing_explains_has_no_name():
    held = held_to_ours(figures(*[0] * 100), 1, lambda _: figures(*ACCEPTED))
    assert held.gap
    assert held.explained_by == []
    assert set(held.broken) == {c.name for c in CONVENTIONS}


def test_answers_without_a_block_are_refused(tmp_path):
    target_dir = write_tiny_target(tmp_path / "target")
    write_draft(new_draft(load_target(target_dir).config, num_layers=1, block_size=4), tmp_path / "draft")
    served = served_draft(tmp_path / "draft", target_dir)
    own = own_figures(target_dir, served, [[3, 4]], max_new_tokens=1, stop_token_ids=())
    with pytest.raises(RequestError, match="ask for more"):
        own(None)


def test_every_token_is_proposed_as_servers_let_a_draft_do(tmp_path):
    """Whatever vocabulary it learned: of one token that the target never says, none would be accepted."""
    target = load_target(write_tiny_target(tmp_path / "target", vocab_size=VOCAB))
    draft = draw_widely(new_draft(target.config, num_layers=1, block_size=4))
    prompts, settings = [[3, 4, 5], [9, 2]], {"max_new_tokens": 200, "stop_token_ids": ()}
    whole = decode(target, draft, prompts, **settings)
    unsaid = min(set(range(VOCAB)) - {token for row in whole.tokens for token in row})
    draft.config = dataclasses.replace(draft.config, vocabulary=pack_tokens(np.array([unsaid]), VOCAB))
    assert decode(target, draft, prompts, **settings).metrics["accept_len_mean"] == 0
    write_draft(draft, tmp_path / "draft")
    own = own_figures(tmp_path / "target", served_draft(tmp_path / "draft", tmp_path / "target"), prompts, **settings)
    assert own(None)["accept_histogram"] == whole.metrics["accept_histogram"]
    assert own(None)["accept_len_mean"] > 0


# ---- a server that breaks one


def draw_widely(draft):
    """Every part of the draft counts: at first its layers do next to nothing, and their norms are all the same."""
    rng = np.random.default_rng(1)
    for path, weight in nnx.to_flat_state(nnx.state(draft)):
        shape = weight.get_value().shape
        if path[-2] in ("q_norm", "k_norm"):
            weight.set_value(jnp.asarray(rng.uniform(0.5, 2.5, shape), jnp.float32))
        elif len(shape) == 2:
            weight.set_value(jnp.asarray(rng.normal(0, shape[1] ** -0.5, shape), jnp.float32))
    return draft


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Directories of a target and a draft that knows its very answers, and their prompts."""
    folder = tmp_path_factory.mktemp("conventions")
    # Of the last layer the reference would read what comes after the final norm.
    target_dir = write_tiny_target(folder / "target", vocab_size=VOCAB, num_hidden_layers=5)
    weights = load_file(target_dir / "model.safetensors")
    # Smaller, they make a text that a small draft can learn.
    softened = {
        n: w * np.float32(0.7 if n.startswith("model.layers") and w.ndim > 1 else 1) for n, w in weights.items()
    }
    save_file(softened, target_dir / "model.safetensors", metadata={"format": "pt"})
    target, rng = load_target(target_dir), np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB, rng.integers(3, 12)).tolist() for _ in range(PROMPTS)]
    answers = decode(target, None, prompts, mode="greedy", max_new_tokens=BUDGET + BLOCK).tokens
    cache = write_sequences(target, folder / "cache", prompts, answers, LAYERS)
    draft = new_draft(target.config, num_layers=2, block_size=BLOCK, target_layer_ids=LAYERS)
    draft.norm.weight[...] = target.norm.weight[...]
    draw_widely(draft)
    embedding, head = (np.asarray(w[...]) for w in (target.embedding.weight, target.head.weight))
    draft = train(draft, embedding, head, [cache], 200, learning_rate=3e-3, num_anchors=8, weights="dpace")
    export_draft(draft, folder / "draft", dtype="float32", target_dir=target_dir)
    served = served_draft(folder / "draft", target_dir)
    settings = {"max_new_tokens": BUDGET, "stop_token_ids": ()}
    own = functools.cache(own_figures(target_dir, served, prompts, **settings))
    return SimpleNamespace(target=target_dir, draft=folder / "draft", prompts=prompts, own=own)


@pytest.fixture(scope="module")
def start(reference, lab, tmp_path_factory):
    """Starts the server."""

    def start():
        port = free_port()
        words = [sys.executable, "-P", str(SERVER), str(lab.target), str(lab.draft), "--host", "127.0.0.1"]
        log = tmp_path_factory.mktemp("logs") / "server.log"
        url = f"http://127.0.0.1:{port}"
        return started([*words, "--port", str(port)], url, log=log, timeout_s=120)

    return start


@pytest.fixture(scope="module")
def ask(start, lab):
    """The acceptance that the server reports with a convention broken."""
    adapter = ADAPTERS["vllm"]

    def ask(broken):
        client = adapter.client(Connection(server.url, timeout_s=60), model=broken, tokenizer=TOKENIZER)
        mark = adapter.mark(server, client)
        completions = asyncio.run(_at_once(lambda p: client.ask(p, BUDGET), lab.prompts, 1))
        timed = Timed(server=server, client=client, completions=completions, mark=mark)
        return adapter.acceptance(timed, BLOCK)

    with start() as server:
        yield ask


@pytest.mark.oracle
@pytest.mark.slow
def test_a_server_that_breaks_none_accepts_what_we_do(lab, ask):
    served, own = ask("none"), lab.own(None)
    assert served["acceptance_unknown"] is None
    assert served["accept_histogram"] == own["accept_histogram"]
    assert own["accept_len_mean"] > 4
    assert own["accept_rate"] < 1
    assert not held_to_ours(served, 1, lab.own).gap


@pytest.mark.oracle
@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_the_convention_that_a_server_breaks_is_named(lab, ask, name):
    held = held_to_ours(ask(name), 1, lab.own)
    print(name, held.explained_by, {n: round(b.accept_len_mean, 2) for n, b in held.broken.items()})
    assert held.gap
    assert held.explained_by[0] == name
    assert held.broken[name].chance == 1


@pytest.mark.oracle
@pytest.mark.slow
def test_a_run_that_is_held_to_ours_names_it_too(lab, start):
    name = "the block one position late"
    with start() as plain, start() as drafting:
        urls = {"base_url": plain.url, "draft_base_url": drafting.url, "served_model": name}
        options = ServerOptions(server="vllm", target=str(lab.target), draft=str(lab.draft), offline=True, **urls)
        sizes = {"max_new_tokens": BUDGET, "concurrency": 1, "rounds": 2}
        texts = [" ".join(map(str, ids)) for ids in lab.prompts[:16]]
        prompts = tuple(Prompt(id=text, category="own", text=text) for text in texts)
        with served_run(deployment(options), TOKENIZER, PromptSet(name="own", prompts=prompts), **sizes) as run:
            run.measure(2)
    case = run.held_to_ours(run.result({"prompts": "random"}))
    assert case.lossless
    assert case.own.explained_by[0] == name
    assert name in run.failures(case, Floors(), 2)[0]
