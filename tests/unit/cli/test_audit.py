"""`python -m dflash audit`: a verdict in words or JSON, and exit code 1 for a defect."""

import dataclasses
import json
import re
import sys

import pytest

from dflash.cli import main as cli
from dflash.decoding.audit import DEFECT, NEAR_TIE, Audit, Divergence
from dflash.decoding.parity import ParityResult, Spread
from dflash.text.prompts import ids_sha256, load_prompts
from dflash.text.tokenizer import load_tokenizer
from dflash.weights.snapshot import snapshot_hash
from dflash.weights.tiny import write_tiny_target, write_tiny_tokenizer

SPREAD = Spread(ulps_max=2.5, ulps_p99=1.0)
PARITY = ParityResult(
    block_size=4,
    positions=100,
    bitwise_equal=False,
    first_layer=1,
    flips=2,
    flip_rate=0.02,
    defects=0,
    logits=SPREAD,
    layers=[Spread(ulps_max=0.0, ulps_p99=0.0), SPREAD],
)
TIE = Divergence(prompt=1, token=7, greedy_token=5, dflash_token=9, margin=0.1, noise=0.25, verdict=NEAR_TIE)
EARLY = Divergence(
    prompt=0, token=3, greedy_token=4, dflash_token=None, margin=None, noise=None, verdict=DEFECT, why="one ends"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("audit") / "target"
    return write_tiny_tokenizer(
        write_tiny_target(directory, vocab_size=260, num_hidden_layers=5, max_position_embeddings=512)
    )


@pytest.fixture
def run(folder, monkeypatch, capsys):
    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["dflash", "audit", "--target", str(folder), *arguments])
        try:
            code = cli.main()
        except SystemExit as error:
            code = error.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return command


@pytest.fixture
def canned(monkeypatch):
    """The command finds what it is given."""

    def find(divergences, faults, parity=PARITY):
        found = Audit(dtype="bfloat16", parity=parity, tokens=384, divergences=divergences, faults=faults)
        # In dflash.cli the name is the command's.
        monkeypatch.setattr(sys.modules["dflash.cli.audit"], "run_audit", lambda *_, **__: found)

    return find


def test_near_ties_are_told_and_pass(run, canned):
    canned({"cached_block_verify-own": [TIE]}, [])
    code, out, _ = run()
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("lossless up to near ties: 384 tokens of bfloat16 ")
    assert lines[0].endswith("1 near ties, 0 defects")
    assert re.search(r"not bitwise equal; layer 1 .*2 argmax flips \(2\.00%\)", lines[1])
    assert ["layer", "1", "1.00", "2.50"] in [line.split() for line in lines]
    tie = "cached_block_verify-own, prompt 1, token 7: greedy 5, DFlash 9, margin 0.1, noise 0.25: near tie"
    assert tie in lines


def test_defects_fail(run, canned, folder, check_provenance):
    canned({"cached_block_verify-own": [EARLY, TIE]}, ["greedy, prompt 0: target cache: layer 0"])
    code, out, _ = run("--json")
    assert code == 1
    found = json.loads(out)
    check_provenance(found["dflash"])
    assert found["dflash"]["read"]["target_sha256"] == snapshot_hash(folder)
    assert found["dflash"]["read"]["prompts_sha256"]
    assert found["dflash"]["seeds"] == {"draft": 0}
    assert (found["verdict"], found["near_ties"]) == ("defect", 1)
    assert found["defects"] == [
        "cached_block_verify-own: defect at prompt 0, token 3: greedy 4, DFlash None: one ends",
        "greedy, prompt 0: target cache: layer 0",
    ]
    code, out, _ = run()
    assert code == 1
    assert "DEFECT: greedy, prompt 0: target cache: layer 0" in out.splitlines()


def test_prompts_come_from_wherever_other_commands_take_them(run, canned, folder, tmp_path):
    canned({}, [])
    (tmp_path / "gsm8k.jsonl").write_text('{"question": "How many?", "answer": "#### 2"}')
    words = ("--prompts", "gsm8k", "--data-dir", str(tmp_path), "--num-prompts", "1")
    for more in (["--template-date", "2026-02-03"], ["--raw"]):
        found = json.loads(run(*words, *more, "--json")[1])["dflash"]["read"]
        rows = load_prompts("gsm8k", data_dir=tmp_path, raw="--raw" in more).encode(load_tokenizer(folder))
        assert (found["prompts"], found["prompts_sha256"]) == ("gsm8k", ids_sha256(rows))
        assert found["template_date"] == ("2026-01-01" if "--raw" in more else "2026-02-03")
    code, _, error = run("--prompts", "gsm8k", "--data-dir", str(tmp_path), "--prompt-template", "{question}")
    assert (code, len(error.splitlines())) == (2, 1)
    assert "a prompt template makes text of the fields of hf:NAME; the source is 'gsm8k'" in error


def test_an_untrained_draft_is_the_default_by_its_name(run, canned):
    canned({}, [])
    default, named = (json.loads(run(*words, "--json")[1])["dflash"] for words in ([], ["--draft", "untrained"]))
    assert named["read"] == default["read"]
    assert named["read"]["draft"] == "untrained"
    code, _, error = run("--draft", "/no/such/dir")
    assert (code, len(error.splitlines())) == (2, 1)
    assert "/no/such/dir holds no draft: name " in error
    assert " or untrained" in error


def test_flips_that_are_no_near_tie_fail(run, canned):
    canned({}, [], dataclasses.replace(PARITY, defects=1))
    code, out, _ = run()
    assert code == 1
    assert any(line.startswith("DEFECT: 1 of 100 ") for line in out.splitlines())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--num-prompts", "0"], "num_prompts must be at least 1, got 0"),
        (["--max-new-tokens", "3"], r"max_new_tokens .*\(8\) .*got 3"),
        (["--block-size", "1"], "block_size must be at least 2"),
        (["--block-size", "99"], "block_size 99 is above the 8"),
    ],
)
def test_requests_that_are_refused(run, more, said):
    code, _, error = run(*more)
    assert code == 2
    assert re.search(said, error)
    assert len(error.splitlines()) == 1


@pytest.mark.slow
def test_a_tiny_target_is_lossless(run):
    code, out, _ = run("--max-new-tokens", "24", "--json", "--num-prompts", "1", "--block-size", "4")
    found = json.loads(out)
    assert (code, found["defects"], found["tokens"], found["parity"]["positions"]) == (0, [], 6 * 24, 24)
