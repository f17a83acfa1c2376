"""Exported drafts in the programs that they are exported for: the reference decoder in torch, and speculators."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dflash import decode, load_draft, load_target, load_tokenizer
from dflash.config import RopeConfig
from dflash.text.prompts import load_prompts
from dflash.weights.build import named_weights
from dflash.weights.export import export_draft
from dflash.weights.load import read_any_draft, target_directory
from dflash.weights.snapshot import target_config
from dflash.weights.tiny import write_tiny_target

pytestmark = [pytest.mark.oracle, pytest.mark.slow]
HERE = Path(__file__).parents[1]
TARGET, BUDGET = "smollm2-135m", 48


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


def early(produced):
    """The blocks with room for a whole one: at the end of its budget the reference proposes fewer tokens at once."""
    starts = 1 + np.cumsum([0, *produced[:-1]])
    return [n for n, start in zip(produced, starts, strict=True) if start + 8 <= BUDGET]


@pytest.mark.model
@pytest.mark.parametrize(
    ("name", "dtype", "shard_bytes", "count"),
    [
        ("smollm2-135m", "float32", None, 10),
        ("smollm2-135m-plain", "float32", None, 10),
        # In several files, and rounded: read back alike by both sides.
        ("smollm2-135m-plain", "float16", 20_000_000, 2),
    ],
)
def test_the_reference_decodes_with_a_shipped_draft_block_by_block_as_we_do(
    reference, target, prompts, greedy, tmp_path, name, dtype, shard_bytes, count
):
    """Prompts of every kind, with the whole vocabulary, which other programs let a draft propose."""
    directory, stops = target_directory(TARGET), load_tokenizer(TARGET).stop_token_ids
    export_draft(
        load_draft(name, target), tmp_path / "draft", dtype=dtype, shard_bytes=shard_bytes, target_dir=directory
    )
    assert (tmp_path / "draft" / "model.safetensors").exists() == (shard_bytes is None)
    requests = [{"prompt": p, "max_new_tokens": BUDGET, "stops": list(stops)} for p in prompts[:count]]
    case = {"name": "all", "draft": "draft", "target": str(directory), "requests": requests}
    (tmp_path / "job.json").write_text(json.dumps({"blocks": [], "decodes": [case], "layer_ids": []}))
    ask("reference_draft.py", tmp_path)
    theirs = json.loads((tmp_path / "answer.json").read_text())["decodes"]["all"]
    exported = load_draft(tmp_path / "draft", target)
    ours, learned = (
        decode(target, exported, prompts[:count], max_new_tokens=BUDGET, stop_token_ids=stops, draft_vocab=size)
        for size in ("all", None)
    )
    assert ours.tokens == learned.tokens == greedy[:count] == [a["tokens"] for a in theirs]
    lengths = [early(row) for row in ours.produced]
    assert lengths == [early(a["produced"]) for a in theirs]
    assert sum(map(len, lengths)) > 8 * count
    assert ours.metrics["acceptance_length"] > 1.7
    if count == len(prompts):
        assert ours.produced != learned.produced, "the whole vocabulary changed nothing, so this proves little"


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


def test_speculators_reads_the_trained_plain_draft(tmp_path):
    if importlib.util.find_spec("speculators") is None:
        pytest.skip("needs speculators: pip install --no-deps speculators==0.9.0 hs-connectors==0.9.0 loguru openai")
    draft = read_any_draft("smollm2-135m-plain")
    directory = target_directory(TARGET)  # speculators opens its verifier
    export_draft(draft, tmp_path / "d", consumer="speculators", target_dir=directory, verifier=str(directory))
    answer = json.loads(ask("reference_speculators.py", tmp_path / "d").splitlines()[-1])
    assert (answer["unused"], answer["different"]) == ([], [])
    assert answer["aux_hidden_state_layer_ids"] == [i + 1 for i in draft.config.target_layer_ids]
    assert answer["block_size"] == draft.config.block_size


@pytest.mark.parametrize("consumer", ["z-lab", "sglang-jax", "speculators"])
def test_the_trained_plain_draft_comes_back_from_every_format(tmp_path, consumer):
    draft = read_any_draft("smollm2-135m-plain")
    verifier, directory = TARGET if consumer == "speculators" else None, target_directory(TARGET)
    export_draft(draft, tmp_path / "d", consumer=consumer, target_dir=directory, verifier=verifier)
    again = read_any_draft(tmp_path / "d", target=target_config(directory))
    back, expected = (named_weights(network) for network in (again, draft))
    assert back.keys() == expected.keys()
    assert all(np.array_equal(back[name], expected[name]) for name in expected)
