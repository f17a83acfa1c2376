"""Exported drafts in the programs that they are exported for: the reference decoder in torch, and speculators."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from learning import train, write_sequences

from dflash import decode, init_draft, load_draft, load_target, load_tokenizer
from dflash.config import RopeConfig
from dflash.text.prompts import load_prompts
from dflash.training.start import start_from_layers
from dflash.weights.export import export_draft
from dflash.weights.load import read_borrowed, read_layers, target_directory
from dflash.weights.tiny import write_tiny_target

pytestmark = [pytest.mark.oracle, pytest.mark.slow]
HERE = Path(__file__).parents[1]
TARGET, LAYERS, BLOCK, BUDGET = "smollm2-135m", (1, 15, 28), 6, 32


def ask(script, *args):
    """What a script prints last, run in its own process."""
    call = [sys.executable, "-P", str(HERE / script), *map(str, args)]
    done = subprocess.run(call, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, f"{script} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def target():
    return load_target(TARGET)


@pytest.fixture(scope="module")
def prompts():
    return load_prompts("builtin").take(10).encode(load_tokenizer(TARGET))


@pytest.fixture(scope="module")
def greedy(target, prompts):
    stops = load_tokenizer(TARGET).stop_token_ids
    return decode(target, None, prompts, mode="greedy", max_new_tokens=BUDGET, stop_token_ids=stops).tokens


@pytest.fixture(scope="module")
def draft(target, prompts, greedy, tmp_path_factory):
    """A draft that has seen the very answers, for as many steps as make it right now and then."""
    draft = init_draft(target, num_layers=1, block_size=BLOCK, target_layer_ids=LAYERS)
    borrowed = read_borrowed(target_directory(TARGET))
    draft.norm.weight[...] = jnp.asarray(borrowed.norm, jnp.float32)
    start_from_layers(draft, read_layers(target_directory(TARGET), (29,)))
    cache = write_sequences(target, tmp_path_factory.mktemp("cache") / "c", prompts * 4, greedy * 4, LAYERS)
    embedding, head = (np.asarray(w, np.float32) for w in (borrowed.embedding, borrowed.head))
    return train(draft, embedding, head, [cache], 30, learning_rate=1.5e-3, num_anchors=2)


@pytest.mark.model
def test_the_reference_decodes_with_it_block_by_block_as_we_do(reference, target, prompts, greedy, draft, tmp_path):
    stops = list(load_tokenizer(TARGET).stop_token_ids)
    # In one file, in several, and rounded: every form is read back by both sides.
    forms = {"float32": (prompts, None), "float16": (prompts[:2], 2_000_000)}
    decodes = []
    for dtype, (asked, shard_bytes) in forms.items():
        directory = target_directory(TARGET)
        export_draft(draft, tmp_path / dtype, dtype=dtype, shard_bytes=shard_bytes, target_dir=directory)
        requests = [{"prompt": p, "max_new_tokens": BUDGET, "stops": stops} for p in asked]
        decodes.append({"name": dtype, "draft": dtype, "target": str(directory), "requests": requests})
    (tmp_path / "job.json").write_text(json.dumps({"blocks": [], "decodes": decodes, "layer_ids": []}))
    ask("reference_draft.py", tmp_path)
    answers = json.loads((tmp_path / "answer.json").read_text())["decodes"]
    assert not (tmp_path / "float16" / "model.safetensors").exists()
    for dtype, (asked, _) in forms.items():
        ours = decode(
            target,
            load_draft(tmp_path / dtype, target),
            asked,
            mode="cached_block_verify",
            max_new_tokens=BUDGET,
            stop_token_ids=stops,
        )
        assert ours.tokens == greedy[: len(asked)]
        assert ours.tokens == [a["tokens"] for a in answers[dtype]]
        assert ours.produced == [a["produced"] for a in answers[dtype]]
        accepted = [a for row in ours.accept_lens for a in row]
        assert sum(a > 0 for a in accepted) >= 3, f"accept lengths {accepted} prove little"


def early(produced):
    """The blocks with room for a whole one: at the end of its budget the reference proposes fewer tokens at once."""
    starts = 1 + np.cumsum([0, *produced[:-1]])
    return [n for n, start in zip(produced, starts, strict=True) if start + 8 <= BUDGET]


@pytest.mark.model
def test_the_reference_decodes_with_the_shipped_draft_as_we_do_with_the_whole_vocabulary(
    reference, target, prompts, greedy, tmp_path
):
    """Ten prompts of every kind: the same tokens, and block by block the same lengths. It is a DFlash 2 draft."""
    shipped, stops = load_draft(TARGET, target), load_tokenizer(TARGET).stop_token_ids
    export_draft(shipped, tmp_path / "draft", dtype="float32", target_dir=target_directory(TARGET))
    requests = [{"prompt": p, "max_new_tokens": BUDGET, "stops": list(stops)} for p in prompts]
    case = {"name": "all", "draft": "draft", "target": str(target_directory(TARGET)), "requests": requests}
    (tmp_path / "job.json").write_text(json.dumps({"blocks": [], "decodes": [case], "layer_ids": []}))
    ask("reference_draft.py", tmp_path)
    theirs = json.loads((tmp_path / "answer.json").read_text())["decodes"]["all"]
    ours, reduced = (
        decode(target, shipped, prompts, max_new_tokens=BUDGET, stop_token_ids=stops, draft_vocab=size)
        for size in ("all", None)
    )
    assert ours.tokens == reduced.tokens == greedy == [a["tokens"] for a in theirs]
    lengths = [early(row) for row in ours.produced]
    assert lengths == [early(a["produced"]) for a in theirs]
    assert sum(map(len, lengths)) > 60
    assert ours.metrics["acceptance_length"] > 2
    assert ours.produced != reduced.produced, "the whole vocabulary changed nothing, so this proves little"


@pytest.mark.parametrize("form", ["full", "sliding-yarn"])
def test_speculators_reads_the_config_and_every_weight(draw_draft, tmp_path, form):
    if importlib.util.find_spec("speculators") is None:
        pytest.skip("needs speculators: pip install --no-deps speculators==0.9.0 hs-connectors==0.9.0 loguru openai")
    changes = {"windows": (None, None), "causal": (False, False)}
    if form == "sliding-yarn":
        rope = RopeConfig(theta=5e4, kind="yarn", factor=4.0, original_max_position=32, truncate=False)
        changes = {"windows": (16, None), "causal": (True, False), "rope": rope, "attention_bias": True}
    draft = draw_draft(**changes | {"num_target_layers": 4, "target_layer_ids": (0, 2)})
    snapshot = write_tiny_target(tmp_path / "target", num_hidden_layers=4)
    export_draft(
        draft,
        tmp_path / "d",
        consumer="speculators",
        dtype="float32",
        shard_bytes=40_000,
        target_dir=snapshot,
        verifier=str(snapshot),
    )
    answer = json.loads(ask("reference_speculators.py", tmp_path / "d").splitlines()[-1])
    assert (answer["type"], answer["model"]) == ("DFlashSpeculatorConfig", "DFlashDraftModel")
    assert (answer["unused"], answer["different"]) == ([], [])
    borrowed = {"embed_tokens.weight", "lm_head.weight", "verifier_norm.weight", "verifier_lm_head.weight"}
    assert set(answer["not_stored"]) <= borrowed
    assert answer["aux_hidden_state_layer_ids"] == [1, 3]
    assert (answer["block_size"], answer["speculative_tokens"], answer["mask_token_id"]) == (8, 7, 5)
    assert answer["verifier"] == {"name_or_path": str(snapshot), "architectures": ["LlamaForCausalLM"]}
    assert answer["heads"] == [4, 2, 16]
    assert answer["sliding_window_non_causal"] is False
    if form == "full":
        assert answer["layer_types"] == ["full_attention"] * 2
        assert answer["rope"] == {"rope_theta": 10000.0, "rope_type": "default"}
    else:
        assert answer["layer_types"] == ["sliding_attention", "full_attention"]
        wanted = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e4, "truncate": False}
        assert answer["rope"].items() >= wanted.items()
