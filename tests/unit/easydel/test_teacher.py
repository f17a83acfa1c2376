"""EasyDeL itself: its models, directories, forward and RoPE against ours. Needs the easydel extra."""

import json
import re
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from dflash import load_target
from dflash.cli import audit_teacher as cli
from dflash.cli.main import main
from dflash.config import RopeConfig
from dflash.easydel import door as easydel
from dflash.easydel.teacher import CORRECTIONS, ROPE, TeacherReader, audit_teacher, load_teacher
from dflash.models.layers import rope_tables
from dflash.training.cache.sequences import open_sequences
from dflash.training.cache.source import FeatureReader
from dflash.training.cache.windows import from_bits
from dflash.weights.build import named_weights
from dflash.weights.tiny import write_tiny_target, write_tiny_tokenizer

pytestmark = [pytest.mark.oracle, pytest.mark.easydel, pytest.mark.slow]

LAYERS = {"num_hidden_layers": 2}
# As Qwen2.5-0.5B has them: a window, layers that it would hold for, and the word that it holds for none.
UNUSED = LAYERS | {"sliding_window": 16, "max_window_layers": 1, "use_sliding_window": False}
FAMILIES = {
    "llama": LAYERS,
    "tied llama": LAYERS | {"tie_word_embeddings": True},
    "qwen2": UNUSED,
    "qwen3": UNUSED,
    "gpt_oss": LAYERS | {"layer_types": ["sliding_attention", "full_attention"]},
}
TOKENS = np.random.default_rng(0).integers(0, 199, (2, 48))


@pytest.fixture(scope="module", autouse=True)
def installed():
    try:
        return easydel.load()
    except easydel.EasyDelError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=FAMILIES)
def snapshot(request, tmp_path_factory):
    family = request.param.split()[-1]
    return write_tiny_target(tmp_path_factory.mktemp(family), family, **FAMILIES[request.param])


@pytest.fixture(scope="module")
def target(snapshot):
    return load_target(snapshot)


@pytest.fixture(scope="module")
def teacher(target, snapshot):
    return load_teacher(target, snapshot)


def same_weights(one, other):
    # A tied head of theirs is a parameter without a value.
    a, b = ({path: v for path, v in named_weights(model).items() if v is not None} for model in (one, other))
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path])


def test_weights_go_in_and_out_bit_for_bit(snapshot, target, tmp_path):
    model = easydel.load_model(snapshot)
    ours = easydel.to_target(model)
    same_weights(ours, target)
    assert ours.embedding.weight.get_value() is model.model.embed_tokens.embedding.get_value()
    with easydel.isolated():
        model.save_pretrained(str(tmp_path / "theirs"))
    same_weights(load_target(tmp_path / "theirs"), target)
    same_weights(easydel.from_target(target, snapshot), model)


def test_what_a_target_was_saved_as_is_the_target_again(snapshot, target, tmp_path, installed):
    model, out = easydel.from_target(target, snapshot), tmp_path / "theirs"
    with easydel.isolated():
        model.save_pretrained(str(out))
        # Their own reading of it, which is only asked for the weights.
        again = installed.AutoEasyDeLModelForCausalLM.from_pretrained(
            str(out), dtype=jnp.float32, param_dtype=jnp.float32, auto_shard_model=False, verbose=False
        )
    same_weights(again, model)
    back = load_target(out)
    assert back.config == target.config
    same_weights(back, target)


def test_the_corrected_forward_is_ours(target, teacher):
    for positions in (None, np.broadcast_to(np.arange(48) + 4000, TOKENS.shape)):
        logits, outputs = teacher.forward(TOKENS, positions)
        wanted, features = target.forward(TOKENS, positions)
        np.testing.assert_array_equal(logits.argmax(-1), wanted.argmax(-1))
        assert len(outputs) == len(features)
        for got, expected in zip(outputs, features, strict=True):
            np.testing.assert_allclose(got, expected, atol=2e-2, rtol=0)


def test_each_correction_mends_what_it_looks_at(snapshot, target):
    model = easydel.from_target(target, snapshot)
    with easydel.isolated(), model.mesh:
        needed = [c for c in CORRECTIONS if c.needed(model, target.config)]
        windows = [CORRECTIONS[-1]] if target.config.family in ("qwen2", "qwen3") else []
        assert needed == (list(CORRECTIONS) if target.config.experts else [ROPE, *windows])
        for correction in needed:
            correction.apply(model, target.config)
        # The table is not changed but replaced, call by call.
        assert [c for c in CORRECTIONS if c.needed(model, target.config)] == [ROPE]


def test_what_it_looks_at_is_bounded(tmp_path, monkeypatch):
    """Windows of 32768 without masks of gigabytes, and tables of fewer rows than are looked at."""
    changes = {"use_sliding_window": True, "sliding_window": 32768, "max_position_embeddings": 64}
    folder = write_tiny_target(tmp_path, "qwen3", **UNUSED | changes)
    target = load_target(folder)
    model, rotary, window = easydel.from_target(target, folder), ROPE, CORRECTIONS[-1]
    kind, lengths = type(model.model.layers[1].self_attn), []
    real = kind._apply_sliding_window

    def look(self, **arguments):
        lengths.append(arguments["query_length"])
        return real(self, **arguments)

    monkeypatch.setattr(kind, "_apply_sliding_window", look)
    with easydel.isolated(), model.mesh:
        assert len(model.model.frequencies.get_value()) < 512
        assert rotary.needed(model, target.config)
        assert window.needed(model, target.config)
        window.apply(model, target.config)
        assert not window.needed(model, target.config)
        for off in (-1, 1):
            model.model.layers[1].self_attn.sliding_window = (32767 + off, 0)
            assert window.needed(model, target.config)
    assert max(lengths) < 4096


EIGHT = """
import sys
from pathlib import Path
import jax, numpy as np
from dflash import load_target
from dflash.easydel import door as easydel
from dflash.easydel.teacher import load_teacher

folder = Path(sys.argv[1]) / "target"
assert jax.device_count() == 8
target, tokens = load_target(folder), np.arange(24)[None]
wanted = target.forward(tokens)[0]
read = easydel.to_target(easydel.load_model(folder))
np.testing.assert_array_equal(read.forward(tokens)[0], wanted)
given, _ = load_teacher(target, folder).forward(tokens)
assert len(given.sharding.device_set) == 1
np.testing.assert_allclose(given, wanted, atol=1e-3)
print("same")
"""


def test_a_host_of_eight_devices_uses_one(on_eight_devices, tmp_path):
    write_tiny_target(tmp_path / "target", **LAYERS)
    on_eight_devices(EIGHT)


def test_the_audit_tells_what_each_deviation_is_worth(snapshot, target):
    rows, teacher = audit_teacher(target, snapshot, TOKENS)
    assert [row.corrected for row in rows] == ["", *(c.name for c in teacher.applied)]
    assert rows[0].features > 1e-2
    assert rows[-1].features < 1e-3
    if target.config.experts:
        assert rows[0].argmax < 0.9
        assert rows[-2].features > 1
    assert rows[-1].argmax == 1


def test_features_for_a_cache_are_those_of_our_forward(target, teacher):
    rows, starts = [TOKENS[0, :17], TOKENS[1]], [0, 300]
    found = TeacherReader(teacher, (1, 0))(rows, starts)
    wanted = FeatureReader(target, (1, 0))(rows, starts)
    for got, expected in zip(found, wanted, strict=True):
        # Of the same numbers, up to rounding, rounded to bfloat16.
        np.testing.assert_allclose(
            from_bits(got).astype(np.float32), from_bits(expected).astype(np.float32), rtol=2**-7, atol=1e-4
        )


def test_a_window_longer_than_what_was_read_is_told(tmp_path, monkeypatch, capsys):
    folder = write_tiny_target(tmp_path, "qwen3", **UNUSED | {"use_sliding_window": True})
    monkeypatch.setattr(cli, "_LONGEST", 16)
    monkeypatch.setattr(sys, "argv", ["dflash", "audit-teacher", "--target", str(folder)])
    assert main() == 0
    assert re.search("window of 16 .*16 tokens .*--num-tokens 48", capsys.readouterr().out)


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    folder = write_tiny_target(tmp_path / "target", vocab_size=260, **LAYERS)
    write_tiny_tokenizer(folder)
    monkeypatch.setattr(sys, "argv", ["dflash", "audit-teacher", "--target", str(folder), "--json"])
    assert main() == 0
    said = json.loads(capsys.readouterr().out)
    assert said["same"]
    assert said["window_not_reached"] is None
    assert [row["corrected"] for row in said["rows"]] == ["", "rotary table"]

    told = "--num-conversations 3 --max-new-tokens 16 --max-user-turn 16 --openings none --target-layer-ids 0 1"
    command = ["dflash", "build-cache", str(tmp_path / "cache"), "--target", str(folder), "--teacher", "easydel"]
    monkeypatch.setattr(sys, "argv", [*command, *told.split(), "--held-out", "0.4"])
    assert main() == 0
    assert open_sequences(tmp_path / "cache").meta["teacher"] == "easydel 0.3.0, corrected: rotary table"


# ---- RoPE: the function is ours, but for a key that it passes over

POSITIONS = np.arange(131073)
YARN = {"factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0}


def their_table(theta, scaling):
    """cos and sin of `get_rope`, [131073, 64]: what it makes of vectors whose first half is one."""
    with easydel.isolated():
        rope = sys.modules["easydel.layers.rotary"].get_rope(
            head_size=64, rotary_dim=64, max_position=131072, base=theta, rope_scaling=scaling, dtype=jnp.float32
        )
        unit = jnp.broadcast_to(jnp.repeat(jnp.array([1.0, 0.0]), 32), (1, len(POSITIONS), 1, 64))
        turned, _ = rope(positions=jnp.asarray(POSITIONS)[None], query=unit, key=unit)
    return np.asarray(turned)[0, :, 0]


def our_table(rope):
    return np.concatenate(rope_tables(rope, 64, jnp.asarray(POSITIONS)[None]))[:, 0].T


def yarn(truncate):
    scaling = {"rope_type": "yarn", "original_max_position_embeddings": 4096, "truncate": truncate, **YARN}
    return scaling, RopeConfig(theta=150000.0, kind="yarn", original_max_position=4096, truncate=truncate, **YARN)


def test_plain_rotary_is_ours_up_to_the_last_row_of_its_table():
    theirs, ours = their_table(10000.0, None), our_table(RopeConfig(theta=10000.0))
    np.testing.assert_allclose(theirs[:131072], ours[:131072], atol=1e-2)
    np.testing.assert_allclose(theirs[:4096], ours[:4096], atol=5e-4)
    # Beyond it positions are clamped without a word; ours has no table.
    np.testing.assert_array_equal(theirs[131072], theirs[131071])
    assert np.abs(ours[131072] - ours[131071]).max() > 0.1


def test_yarn_is_ours_where_its_range_is_rounded():
    scaling, rope = yarn(True)
    np.testing.assert_allclose(their_table(150000.0, scaling)[:131072], our_table(rope)[:131072], atol=1e-2)


def test_yarn_passes_over_truncate_false_which_gpt_oss_has():
    scaling, rope = yarn(False)
    off = np.abs(their_table(150000.0, scaling)[:131072] - our_table(rope)[:131072])
    wrong = off.max(axis=0) > 0.02
    # Cosines, then sines: 9 of 32 frequencies.
    assert np.flatnonzero(wrong[:32]).tolist() == np.flatnonzero(wrong[32:]).tolist() == list(range(9, 18))
    assert off[:1024].max() > 0.2
    assert off[:, ~wrong].max() < 1e-2
