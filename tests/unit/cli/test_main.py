"""The command line: the same text streamed or whole, one line of figures or of JSON, one sentence for a mistake."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from dflash import Tokenizer, decode, init_draft, load_target, load_tokenizer, write_draft
from dflash.cli import main as cli
from dflash.cli.generate import _print_new
from dflash.host import device
from dflash.weights import load, smollm2
from dflash.weights.load import draft_hash
from dflash.weights.snapshot import snapshot_hash
from dflash.weights.tiny import write_tiny_target, write_tiny_tokenizer

ROOT = Path(__file__).parents[3]
ASK = "Tell me more"
BUDGET = 24


def write_target(directory, **changes):
    """Bytes are all it knows: 4 special tokens and 256 more."""
    changes = {"vocab_size": 260, "num_hidden_layers": 5, "max_position_embeddings": 512} | changes
    return write_tiny_tokenizer(write_tiny_target(directory, seed=3, **changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("cli") / "target")


@pytest.fixture(scope="module")
def target(folder):
    return load_target(folder)


@pytest.fixture(scope="module")
def draft_folder(target, tmp_path_factory):
    directory = tmp_path_factory.mktemp("draft") / "draft"
    write_draft(init_draft(target, block_size=4), directory)
    return directory


@pytest.fixture(scope="module")
def expected(folder, target):
    """Tokens and text of greedy decoding, by the functions that the command line is made of."""
    tokenizer = load_tokenizer(folder)
    prompt = tokenizer.encode_chat([{"role": "user", "content": ASK}])
    stops = tokenizer.stop_token_ids
    tokens = decode(target, None, [prompt], mode="greedy", max_new_tokens=BUDGET, stop_token_ids=stops).tokens[0]
    return tokens, tokenizer.decode(tokens)


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs the command in an empty folder of its own: (exit code, stdout, stderr)."""
    work = tmp_path / "work"
    work.mkdir()

    def command(*arguments):
        monkeypatch.chdir(work)
        monkeypatch.setattr(sys, "argv", ["dflash", *map(str, arguments)])
        try:
            code = cli.main()
        except SystemExit as error:
            code = error.code
        said = capsys.readouterr()
        assert not any(work.iterdir())
        return code, said.out, said.err

    return command


def generate(run, folder, *more, prompt=ASK):
    return run("generate", prompt, "--target", folder, "--max-new-tokens", BUDGET, *more)


def split_figures(out):
    text, _, figures = out.rpartition("\n\n")
    return text, figures


# ---- what it prints


@pytest.mark.parametrize(
    ("more", "figures"),
    [
        ([], r"greedy · [\d.]+ tok/s · first token after \d+ ms"),
        (["--draft", "untrained"], r"cached_block_verify · .* · [\d.]+ tokens a block of 8"),
        (["--draft", "untrained", "--mode", "cached_sequential_verify", "--block-size", "3"], r".* a block of 3"),
    ],
    ids=["greedy", "block", "sequential"],
)
def test_streamed_text_is_the_text(run, folder, expected, more, figures):
    tokens, text = expected
    assert len(set(tokens)) > 4
    code, out, err = generate(run, folder, *more)
    assert (code, err) == (0, "")
    printed, closing = split_figures(out)
    assert printed == text
    assert re.fullmatch(rf"{len(tokens)} tokens · {figures}\n", closing)


def test_half_a_character_is_kept_back_until_it_is_whole(folder, capsys):
    """Token by token, as a stream may come: what was printed is never taken back, and nothing is lost."""
    tokenizer = load_tokenizer(folder)
    for text in ("naïve 日本 🎉!", "x🎉", "\ufffd ok \ufffd\ufffd"):
        ids, printed = tokenizer.encode(text), ""
        for end in range(len(ids) + 1):
            printed = _print_new(tokenizer.decode(ids[:end]), printed)
            assert text.startswith(printed)
        assert capsys.readouterr().out == printed == text.rstrip("\ufffd")


def test_an_answer_that_ends_in_half_a_character_is_printed_whole(run, folder, monkeypatch):
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids, **_: "ab\ufffd" if list(ids) else "")
    assert split_figures(generate(run, folder)[1])[0] == "ab\ufffd"


def test_a_draft_from_a_directory(run, folder, draft_folder, expected):
    code, out, err = generate(run, folder, "--draft", draft_folder)
    assert (code, err) == (0, "")
    assert split_figures(out)[0] == expected[1]
    assert "a block of 4" in out


@pytest.mark.slow
def test_json_is_one_line(run, folder, draft_folder, expected, check_provenance):
    code, out, err = generate(run, folder, "--draft", draft_folder, "--json")
    assert (code, err, out.count("\n")) == (0, "", 1)

    def refuse(constant):
        raise AssertionError(constant)

    found = json.loads(out, parse_constant=refuse)
    assert (found["tokens"], found["text"], found["mode"]) == (*expected, "cached_block_verify")
    assert found["num_output_tokens"] == len(expected[0])
    assert found["acceptance_length"] == found["accept_len_mean"] + 1
    assert found["tok_s_total"] > 0
    assert found["ttft_ms"] > 0
    told = found["dflash"]
    check_provenance(told)
    assert told["command"][:2] == ["dflash", "generate"]
    assert told["device"]["platform"] == "cpu"
    assert told["read"]["target_sha256"] == snapshot_hash(folder)
    assert told["read"]["draft_sha256"] == draft_hash(draft_folder)
    assert told["seeds"] is None
    untrained = json.loads(generate(run, folder, "--draft", "untrained", "--json")[1])["dflash"]
    assert untrained["seeds"] == {"draft": 0}
    assert "draft_sha256" not in untrained["read"]
    assert "draft" not in json.loads(generate(run, folder, "--json")[1])["dflash"]["read"]


@pytest.fixture
def built_in(folder, draft_folder, monkeypatch):
    """What smollm2-135m names, target and draft: tiny ones here."""
    monkeypatch.setattr(smollm2, "snapshot_dir", lambda: folder)
    monkeypatch.setitem(load.SHIPPED_DRAFTS, "smollm2-135m", draft_folder)
    return smollm2.NAME


@pytest.mark.parametrize(
    ("more", "figures"),
    [
        ([], r".* cached_block_verify .* tokens a block of 4"),
        (["--draft", "smollm2-135m", "--block-size", "3"], r".* cached_block_verify .* tokens a block of 3"),
        (["--mode", "cached_sequential_verify"], r".* cached_sequential_verify .* tokens a block of 4"),
        (["--mode", "greedy"], r".* greedy .*"),
        (["--draft", "untrained"], r".* cached_block_verify .* tokens a block of 8"),
    ],
    ids=["default", "named", "sequential", "greedy", "untrained"],
)
def test_the_built_in_target_is_decoded_with_its_draft(run, built_in, expected, more, figures):
    code, out, err = generate(run, built_in, *more)
    assert (code, err) == (0, "")
    printed, closing = split_figures(out)
    assert printed == expected[1]
    assert re.fullmatch(rf"{figures}\n", closing)


def test_what_decoded_the_built_in_target_is_told(run, built_in, draft_folder):
    told = json.loads(generate(run, built_in, "--json")[1])["dflash"]["read"]
    assert (told["draft"], told["draft_sha256"]) == ("smollm2-135m", draft_hash(draft_folder))
    assert "draft" not in json.loads(generate(run, built_in, "--json", "--mode", "greedy")[1])["dflash"]["read"]


def test_another_target_may_be_decoded_with_that_draft_by_name(run, folder, built_in, expected):
    code, out, _ = generate(run, folder, "--draft", built_in)
    assert (code, split_figures(out)[0]) == (0, expected[1])
    assert "a block of 4" in out


def test_an_answer_of_one_token_has_no_speed(run, folder, expected):
    code, out, _ = generate(run, folder, "--max-new-tokens", 1, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["tokens"] == expected[0][:1]
    assert found["tok_s_total"] is found["tpot_ms"] is None


def test_a_system_message_reaches_the_model(run, folder, expected):
    text = split_figures(generate(run, folder, "--system", "Brief")[1])[0]
    assert text != expected[1]


def test_from_a_shell(folder, expected):
    """A process of its own, with a secret in its environment that must stay there."""
    environment = {k: v for k, v in os.environ.items() if k != "CI"}
    environment |= {"HF_TOKEN": "hf_marker0", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "dflash", "generate", ASK, "--target", str(folder)]
    command += ["--max-new-tokens", str(BUDGET)]
    # As bytes: a text stream would turn the answer's own line ends into others.
    done = subprocess.run(command, env=environment, capture_output=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, b"")
    assert split_figures(done.stdout.decode())[0] == expected[1]
    bad = subprocess.run([*command, "--draft", "nowhere"], env=environment, capture_output=True, encoding="utf-8")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("dflash: ")
    assert "hf_marker0" not in done.stdout.decode() + bad.stderr


# ---- mistakes


def refused(result, *said):
    """Exit code 2, one sentence on stderr, nothing on stdout."""
    code, out, err = result
    assert (code, out) == (2, ""), err
    assert err.startswith("dflash: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    for words in said:
        assert words in err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--temperature", "-0.7"], ["temperature must be at least 0", "-0.7"]),
        (["--draft", "untrained", "--block-size", "1"], ["block_size must be at least 2", "got 1"]),
        (["--draft", "untrained", "--block-size", "9"], ["block_size 9 is above the 8"]),
        (["--max-new-tokens", "500"], ["within 512 positions", "500"]),
        (["--max-new-tokens", "0"], ["max_new_tokens must be at least 1"]),
        (["--mode", "cached_block_verify"], ["needs a draft"]),
        (["--draft", "untrained", "--mode", "greedy"], ["got a draft"]),
        (["--draft", "untrained", "--mode", "recompute"], ["recompute", "can't be streamed"]),
        (["--mode", "fast"], ["mode must be one of", "'fast'"]),
        (["--target", "/nowhere/at/all"], ["/nowhere/at/all"]),
        (["--draft", "/nowhere/at/all"], ["/nowhere/at/all"]),
    ],
    ids=[
        "temperature",
        "block1",
        "block9",
        "positions",
        "budget0",
        "no-draft",
        "draft",
        "recompute",
        "mode",
        "no-target",
        "no-draft-dir",
    ],
)
def test_requests_that_are_refused(run, folder, more, said):
    refused(generate(run, folder, *more), *said)


@pytest.mark.parametrize("prompt", ["", "  \n"], ids=["empty", "blank"])
def test_an_empty_prompt_is_refused(run, folder, prompt):
    refused(generate(run, folder, prompt=prompt), "must have some text")


def test_a_prompt_that_the_template_empties_is_refused(run, tmp_path):
    write_tiny_tokenizer(write_target(tmp_path / "target"), template="{{ messages[0].name }}")
    refused(generate(run, tmp_path / "target"), "at least one token")


def test_a_tokenizer_of_another_model_is_refused(run, tmp_path):
    write_tiny_tokenizer(write_target(tmp_path / "target"), extra=["Te"])
    refused(generate(run, tmp_path / "target"), "token ids must be 0..259", "has 260")


def test_a_directory_without_a_tokenizer_is_refused(run, tmp_path):
    refused(generate(run, write_tiny_target(tmp_path / "target")), "must hold a tokenizer")


def spoil_config(directory):
    (directory / "config.json").write_text("{")


def spoil_end(directory):
    os.truncate(directory / "model.safetensors", 5000)


def spoil_start(directory):
    (directory / "model.safetensors").write_bytes(b"\xff" * 4000)


def spoil_file(directory):
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").mkdir()


def spoil_all(directory):
    (directory / "model.safetensors").unlink()


SPOILERS = [spoil_config, spoil_end, spoil_start, spoil_file, spoil_all]


@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda f: f.__name__.removeprefix("spoil_"))
def test_a_spoilt_target_is_refused(run, tmp_path, spoil):
    directory = write_target(tmp_path / "target")
    spoil(directory)
    refused(generate(run, directory), str(directory))


@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda f: f.__name__.removeprefix("spoil_"))
def test_a_spoilt_draft_is_refused(run, folder, target, tmp_path, spoil):
    write_draft(init_draft(target), tmp_path / "draft")
    spoil(tmp_path / "draft")
    refused(generate(run, folder, "--draft", tmp_path / "draft"), str(tmp_path / "draft"))


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": 32, "head_dim": 16}, {"vocab_size": 270}, {"num_hidden_layers": 9}],
    ids=["hidden", "vocabulary", "layers"],
)
def test_a_draft_of_another_target_is_refused(run, folder, tmp_path, changes):
    other = load_target(write_target(tmp_path / "other", **changes))
    write_draft(init_draft(other), tmp_path / "draft")
    refused(generate(run, folder, "--draft", tmp_path / "draft"))


def test_a_mask_token_outside_the_vocabulary_is_refused(run, folder, draft_folder, tmp_path):
    directory = shutil.copytree(draft_folder, tmp_path / "draft")
    raw = json.loads((directory / "config.json").read_text())
    raw["dflash_config"]["mask_token_id"] = 260
    (directory / "config.json").write_text(json.dumps(raw))
    refused(generate(run, folder, "--draft", directory), "mask token 260", "260")


def test_an_installation_without_the_draft_is_told_and_decodes_without_it(run, built_in, monkeypatch, tmp_path):
    monkeypatch.setitem(load.SHIPPED_DRAFTS, "smollm2-135m", tmp_path / "gone")
    refused(generate(run, built_in), "comes with the project", "gone", "untrained")
    for more in (["--mode", "greedy"], ["--draft", "untrained"]):
        assert generate(run, built_in, *more)[0] == 0


def test_a_held_tpu_is_refused(run, folder, monkeypatch):
    """jax would go on with the CPU, and say nothing."""
    opened = jax.devices

    def devices(kind=None):
        if kind == "tpu":
            raise RuntimeError("Backend 'tpu' failed to initialize: ABORTED: The TPU is already in use by process 12.")
        return opened(kind)

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setattr(device, "_platforms", lambda: "")
    monkeypatch.setenv("TPU_NAME", "local")
    refused(generate(run, folder), "the TPU is held by another process", "end that process")


def test_a_word_that_is_no_command_is_refused_by_the_parser(run, folder):
    code, out, err = run("produce", ASK)
    assert (code, out) == (2, "")
    assert "generate" in err
    code, out, err = generate(run, folder, "--mode", "fast")
    assert (code, out) == (2, "")
    assert "cached_block_verify" in err


def test_a_terminal_that_knows_ascii_alone_ends_no_command(monkeypatch):
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="ascii") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    monkeypatch.setattr("sys.argv", ["dflash", "generate", "hi", "--block-size", "é"])
    assert cli.main() == 2
    print("é", flush=True)
    assert streams["stdout"].buffer.getvalue() == b"\\xe9\n"
    streams["stderr"].flush()
    said = streams["stderr"].buffer.getvalue().decode("ascii")
    assert said.startswith("dflash: Error parsing --block-size")
    assert not any(words in said for words in ("---- ", "Got errors", "helptext"))


def test_a_word_that_no_result_could_record_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["dflash", "report", "caf\udce9.json"])
    assert cli.main() == 2
    assert "'caf\\udce9.json' has other bytes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [MemoryError("Unable to allocate 954. GiB"), MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: 954 GiB")],
    ids=["numpy", "python", "jax"],
)
def test_too_little_memory_is_one_sentence(monkeypatch, capsys, error):
    def read_command(words):
        raise error

    monkeypatch.setattr(cli, "read_command", read_command)
    assert cli.main() == 2
    said = capsys.readouterr().err
    assert said.startswith("dflash: out of memory")
    assert said.count("\n") == 1
    error = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main()


@pytest.mark.parametrize(("closed", "code"), [("1", 2), ("2", 2), ("1 2", 2), ("0 1 2", 2)])
def test_closed_streams_end_no_command(closed, code, tmp_path):
    """As where a daemon starts it."""
    close = " ".join(f"{number}>&-" for number in closed.split())
    command = f"exec {sys.executable} -m dflash report {tmp_path}/none.json --nope {close}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code
    assert done.stdout == ""
    assert done.stderr.count("\n") == ("2" not in closed)


def test_help_names_every_option(run):
    code, out, _ = run("generate", "--help")
    assert code == 0
    options = ("target", "draft", "mode", "block-size", "max-new-tokens", "dtype", "temperature", "system", "json")
    assert all(f"--{name}" in out for name in options)
