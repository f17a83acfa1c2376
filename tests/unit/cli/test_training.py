"""From a target to a draft that decodes, by the command line alone; and what it says to mistakes."""

import dataclasses
import json
import shutil
import sys

import pytest

from dflash.cli import main as cli
from dflash.weights import load
from dflash.weights.load import draft_hash, read_any_draft
from dflash.weights.tiny import write_tiny_target, write_tiny_tokenizer

pytestmark = pytest.mark.slow

SMALL = ("--max-prompt-len", 64, "--max-user-turn", 40, "--max-new-tokens", 24, "--batch-size", 16)
FEW = ("--num-conversations", 24, "--held-out", 0.25, "--num-context-features", 1)
SHORT = ("--steps", 4, "--batch-size", 8, "--num-anchors", 4, "--log-every", 2, "--save-every", 2)
KEYS = {
    "cache_dir",
    "draft_run_dir",
    "teacher_snapshot_dir",
    "ctx_len",
    "block_size",
    "num_samples",
    "accept_len_mean",
    "accept_len_p50",
    "accept_len_p90",
    "accept_len_p99",
    "accept_rate_tokens",
    "token_acc_mean",
    "token_acc_p50",
    "token_acc_p90",
    "by_ctx_pos_start",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A target whose turns end, now and then: of its 260 tokens 8 are stop tokens."""
    directory = tmp_path_factory.mktemp("cli") / "target"
    stops = [1, *range(100, 107)]
    return write_tiny_tokenizer(write_tiny_target(directory, vocab_size=260, num_hidden_layers=4, eos_token_id=stops))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture
def run(monkeypatch, capsys, work, folder):
    """Runs a command in the work directory: exit code, stdout, and what of stderr is no progress bar."""

    def run(command, *arguments):
        monkeypatch.chdir(work)
        # `train` takes the target that its cache names.
        target = [] if command in ("export", "train") or "--target" in arguments else ["--target", folder]
        monkeypatch.setattr(sys, "argv", ["dflash", command, *map(str, [*arguments, *target])])
        code = cli.main()
        out, err = capsys.readouterr()
        return code, out, "\n".join(line for line in err.splitlines() if line.startswith("dflash:"))

    return run


@pytest.fixture
def made(run, work):
    """The cache and the run, made once."""
    if not (work / "cache").exists():
        assert run("build-cache", "cache", *SMALL, *FEW, "--target-layer-ids", 0, 2)[0] == 0
        assert run("train", "cache", "runs", *SHORT)[0] == 0
    return work


def test_sequences_train_evaluate_and_generate(run, made, check_provenance):
    assert sorted(p.name for p in (made / "runs").glob("run-*")) == ["run-2", "run-4"]
    lines = [json.loads(line) for line in (made / "runs" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert "held_out_accept_len_mean" in lines[-1]
    code, out, _ = run("evaluate", "cache", "runs", "--out-json", "e.json")
    assert code == 0
    assert out.startswith("held-out prompts, ")
    result = json.loads((made / "e.json").read_text())
    assert result["summary"].keys() >= {*KEYS, "live_acceptance_length"}
    assert result["summary"]["rows"] == "held_out"
    assert len(result["accept_len"]) == len(result["token_acc"]) == len(result["ctx_pos_start"])
    told = result["dflash"]
    check_provenance(told)
    assert told["read"].keys() == {"target", "target_sha256", "draft", "draft_sha256", "cache_sha256"}
    assert (told["seeds"], told["command"][:3]) == ({"rows": 0}, ["dflash", "evaluate", "cache"])
    code, out, _ = run("evaluate", "cache", "runs/run-2", "--rows", "train")
    assert code == 0
    assert "TRAINING rows" in out
    code, out, _ = run("generate", "Why?", "--draft", "runs", "--max-new-tokens", 8)
    assert code == 0
    assert "tokens a block of 8" in out


def test_training_goes_on_and_is_refused_with_other_settings(run, made):
    code, out, _ = run("train", "cache", "runs", *SHORT)
    assert (code, out.strip()) == (0, "draft: runs/run-4")
    code, _, err = run("train", "cache", "runs", *SHORT, "--learning-rate", 1e-4)
    assert code == 2
    assert "learning_rate 0.0006 there, 0.0001 here" in err


def test_an_exported_draft_is_the_run_and_says_how_it_was_made(run, made, folder, check_provenance):
    assert run("export", "runs", "exported", "--dtype", "float32")[:2] == (0, "draft: exported\n")
    record = json.loads((made / "exported" / "training.json").read_text())
    assert record["draft_sha256"] == draft_hash(made / "exported")
    assert record["step"] == record["metrics"]["step"] == record["train"]["steps"] == 4
    check_provenance(record["dflash"])
    assert record["dflash"]["command"][:4] == ["dflash", "train", "cache", "runs"]
    assert record["dflash"]["seeds"] == {"training": 0}
    assert record["dflash"]["read"]["cache_sha256"] == record["provenance"]["cache_sha256"]
    text = (made / "exported" / "training.json").read_text()
    assert str(made) not in text
    assert str(folder) not in text
    figures = [run("evaluate", "cache", draft)[1] for draft in ("runs", "exported")]
    assert figures[0] == figures[1] != ""
    code, _, err = run("export", "runs", "exported")
    assert code == 2
    assert "exported exists" in err


def test_the_draft_that_comes_with_the_project_is_taken_by_its_name(run, made, monkeypatch):
    assert run("export", "runs", "shipped", "--dtype", "float32")[0] == 0
    monkeypatch.setitem(load.SHIPPED_DRAFTS, "smollm2-135m", made / "shipped")
    figures = [run("evaluate", "cache", draft)[1] for draft in ("shipped", "smollm2-135m")]
    assert figures[0] == figures[1] != ""
    assert run("export", "smollm2-135m", "again", "--dtype", "float32")[0] == 0
    assert draft_hash(made / "again") == draft_hash(made / "shipped")
    assert run("train", "cache", "onwards", *SHORT, "--init-from", "smollm2-135m")[0] == 0
    provenance = json.loads((made / "onwards" / "run-4" / "config.json").read_text())["dflash"]["provenance"]
    assert provenance["init_from_sha256"] == draft_hash(made / "shipped")


def test_what_is_undefined_in_a_run_is_null_in_its_export(run, made):
    shutil.copytree(made / "runs", made / "undefined")
    with (made / "undefined" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "accept_len_mean": null}\n')
    code, _, err = run("export", "undefined", "of-undefined")
    assert code == 0, err
    text = (made / "of-undefined" / "training.json").read_text()
    assert json.loads(text)["metrics"] == {"step": 4, "accept_len_mean": None}


def test_short_blocks_first_then_longer_ones_from_that_draft(run, made):
    start = ("--draft-layers", 2, "--init-layers", 3, 1, "--block-size", 3)
    assert run("train", "cache", "short", *SHORT, *start)[0] == 0
    assert run("train", "cache", "long", *SHORT, "--init-from", "short", "--block-size", 6)[0] == 0
    drafts = [read_any_draft(made / name) for name in ("short", "long")]
    assert [(d.config.block_size, d.config.num_layers) for d in drafts] == [(3, 2), (6, 2)]
    provenance = json.loads((made / "long" / "run-4" / "config.json").read_text())["dflash"]["provenance"]
    assert provenance["init_from_sha256"] == draft_hash(made / "short")


def test_a_dflash2_draft_is_trained_exported_and_decoded_with(run, made):
    second = ("--architecture", "dflash2", "--conv-group-size", 16, "--selector-rank", 8, "--selector-top-k", 4)
    assert run("train", "cache", "second", *SHORT, *second)[0] == 0
    assert run("export", "second", "second-hf", "--dtype", "float32")[0] == 0
    figures = [run("evaluate", "cache", draft)[1] for draft in ("second", "second-hf")]
    assert figures[0] == figures[1] != ""
    greedy = run("generate", "Why?", "--mode", "greedy", "--max-new-tokens", 8)[1].splitlines()[0]
    assert run("generate", "Why?", "--draft", "second", "--max-new-tokens", 8)[1].splitlines()[0] == greedy
    plain = ("--init-from", "second", "--architecture", "dflash")
    assert run("train", "cache", "plain", *SHORT, *plain)[0] == 0
    drafts = [read_any_draft(made / name).config for name in ("second", "plain")]
    assert drafts[1] == dataclasses.replace(drafts[0], conv=None, selector=None)
    code, _, err = run("train", "cache", "x", *SHORT, "--init-from", "plain", "--architecture", "dflash2")
    assert (code, "plain is a DFlash draft" in err) == (2, True)
    shaped = ("--init-from", "plain", "--draft-layers", 3, "--draft-rope", "default")
    code, _, err = run("train", "cache", "x", *SHORT, *shaped)
    assert (code, "--draft-layers, --draft-rope" in err, "plain" in err) == (2, True, True)
    assert not (made / "x").exists()


def test_a_draft_of_few_tokens_is_trained_exported_and_decoded_with(run, made):
    assert run("train", "cache", "few", *SHORT, "--draft-vocab-size", 40)[0] == 0
    assert run("export", "few", "few-hf", "--dtype", "float32")[0] == 0
    drafts = [read_any_draft(made / name).config for name in ("few", "few-hf")]
    assert drafts[0] == drafts[1]
    assert drafts[0].num_tokens == 40
    figures = [run("evaluate", "cache", draft)[1] for draft in ("few", "few-hf")]
    assert figures[0] == figures[1] != ""
    greedy = run("generate", "Why?", "--mode", "greedy", "--max-new-tokens", 8)[1].splitlines()[0]
    assert run("generate", "Why?", "--draft", "few", "--max-new-tokens", 8)[1].splitlines()[0] == greedy
    proposed = ("--draft-vocab-size", "all", "--json")
    answer = json.loads(run("generate", "Why?", "--draft", "few", "--max-new-tokens", 8, *proposed)[1])
    assert answer["text"] == greedy
    for name, size, tokens in (
        ("more", [], 40),
        ("fewer", ["--draft-vocab-size", 20], 20),
        ("some", ["--draft-vocab-size", 50], 50),
        ("most", proposed[:2], 260),
    ):
        assert run("train", "cache", name, *SHORT, "--init-from", "few", *size)[0] == 0
        assert read_any_draft(made / name).config.num_tokens == tokens
    of_new = [
        (run("train", "cache", f"fresh-{n}", *SHORT, "--draft-vocab-size", n)[0], read_any_draft(made / f"fresh-{n}"))
        for n in (20, 50)
    ]
    assert [code for code, _ in of_new] == [0, 0]
    # By the texts of the cache, as a new draft's.
    for name, (_, new) in zip(("fewer", "some"), of_new, strict=True):
        assert read_any_draft(made / name).config.vocabulary == new.config.vocabulary


def test_the_target_of_a_cache_is_found_from_any_directory_or_asked_for(run, made, folder, tmp_path, monkeypatch):
    here = tmp_path / "here"
    shutil.copytree(folder, here / "mine")
    monkeypatch.setattr(sys, "argv", ["dflash", "build-cache", "kept", *map(str, (*SMALL, *FEW)), "--target", "mine"])
    monkeypatch.chdir(here)
    assert cli.main() == 0
    assert run("train", here / "kept", tmp_path / "runs", *SHORT)[0] == 0
    (here / "mine").rename(here / "moved")
    code, _, err = run("train", here / "kept", tmp_path / "others", *SHORT)
    assert (code, err.count("\n"), "give --target" in err, str(here / "mine") in err) == (2, 0, True, True)
    assert run("train", here / "kept", tmp_path / "others", *SHORT, "--target", here / "moved")[0] == 0


def test_windows_train_from_a_draft_and_evaluate(run, made):
    windows = ("--form", "windows", "--ctx-len", 33, "--num-blocks", 6, "--rollout-steps", 3)
    windows += ("--rollout-accept-len-mode", "geometric", "--position-offsets", 0, 4096)
    assert run("build-cache", "windows", *SMALL, *FEW, *windows, "--target-layer-ids", 1, 2)[0] == 0
    code, _, err = run("train", "windows", "other", *SHORT, "--init-from", "runs")
    assert code == 2
    assert "reads the outputs of layers" in err
    assert run("train", "windows", "other", *SHORT)[0] == 0
    assert run("evaluate", "windows", "other", "--rows", "all", "--out-json", "w.json")[0] == 0
    summary = json.loads((made / "w.json").read_text())["summary"]
    assert (summary["ctx_len"], summary["num_samples"]) == (32, 18)
    assert len(summary["by_ctx_pos_start"]) > 2


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("train", "nowhere", "r"), "nowhere: build-cache"),
        (("train", "cache", "r", "--draft-vocab-size", 261), "draft_vocab_size must be 1 to 260"),
        (("train", "cache", "r", "--architecture", "dflash2", "--draft-vocab-size", 7), "must be 8 to 260"),
        (("evaluate", "nowhere", "r"), "there is none at nowhere"),
        (("build-cache", "cache", *SMALL, *FEW), "new directory; cache exists"),
        (("build-cache", "new", "--position-offsets", 131072, *FEW), "within 131072 positions; got [131072]"),
        (("build-cache", "new", "--target-layer-ids", 1, 9, *FEW), "different layers, 0..3, got [1, 9]"),
        (("build-cache", "new", "--prompts", "x.jsonl", *FEW), "there is none at x.jsonl"),
        (("build-cache", "new", "--openings", "x.jsonl", *FEW), "there is no file at x.jsonl"),
        (("train", "cache", "new", "--steps", 0), "steps must be at least 1, got 0"),
        (("train", "cache", "new", "--batch-size", 3, "--accumulation", 2), "batch_size must be divisible"),
        (("evaluate", "cache", "nowhere"), "nowhere"),
        (("export", "nowhere", "new"), "nowhere"),
        (("train", "cache", "new", "--init-layers", 1, 4), "one layer of the target, 0..3"),
        (("train", "cache", "new", "--block-size", 1), "block_size must be at least 2"),
        (("train", "cache", "new", "--block-size", 10**9), "131072 positions, got one of 1000000000"),
        (("train", "cache", "new", "--draft-layers", 10**9), "at most 10000 layers"),
        (
            ("train", "cache", "new", "--architecture", "dflash2", "--selector-rank", 65, "--conv-kernel-size", 10**9),
            "selector_rank is at most the hidden size 64, got 65; conv_kernel_size is at most 10000",
        ),
        (("train", "cache", "new", "--architecture", "dflash2", "--conv-group-size", 7), "must divide the hidden size"),
        (
            ("train", "cache", "new", "--architecture", "dflash2", "--selector-top-k", 0),
            "selector_top_k must be at least 1",
        ),
    ],
)
def test_mistakes_are_refused_in_a_sentence(run, made, command, said):
    code, out, err = run(*command)
    assert (code, out) == (2, "")
    assert said in err
    assert not list(made.glob("new*"))


def test_a_cache_of_another_target_is_refused(run, made, tmp_path):
    other = write_tiny_tokenizer(write_tiny_target(tmp_path / "other", vocab_size=260, num_hidden_layers=4, seed=9))
    for command in (("train", "cache", "new", *SHORT), ("evaluate", "cache", "runs")):
        code, _, err = run(*command, "--target", other)
        assert code == 2
        assert "their hashes differ" in err
