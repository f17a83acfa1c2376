"""`python -m dflash serve-bench` against stubs that run: what it prints and writes, and its exit codes."""

import json
import re

import pytest
from hostile_server import event, head, hostile
from stub_server import serving

from dflash import init_draft, load_target, metrics, write_draft
from dflash.__main__ import main
from dflash.host import stopping
from dflash.weights.tiny import write_tiny_target, write_tiny_tokenizer


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    directory = tmp_path_factory.mktemp("serve") / "target"
    return write_tiny_tokenizer(write_tiny_target(directory, vocab_size=260))


@pytest.fixture
def serve_bench(target, monkeypatch, capsys, tmp_path):
    """Runs the command in an empty folder: (exit code, stdout, stderr)."""

    def serve_bench(*words):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(stopping, "_heed", lambda _: {})  # the handlers are all tests'
        sizes = ("--num-prompts", "2", "--max-new-tokens", "5", "--rounds", "3")
        monkeypatch.setattr("sys.argv", ["dflash", "serve-bench", f"--target={target}", *sizes, *words])
        try:
            code = main()
        except SystemExit as leaving:
            code = leaving.code
        return code, *capsys.readouterr()

    return serve_bench


@pytest.fixture
def compare(serve_bench):
    """The same with two stubs, the second with these settings."""

    def compare(*words, **second):
        plain = {"gives_ids": False}
        with serving(**plain) as (a, _), serving(**plain, **second) as (b, _):
            return serve_bench("--base-url", a, "--draft-base-url", b, *words)

    return compare


def test_equal_servers_give_a_line_a_file_and_a_report(compare, tmp_path):
    code, out, err = compare("--json", "new/served.json", "--report", "report")
    assert (code, err) == (0, "")
    assert "served-openai-c1-n5" in out
    assert "lossless" in out
    assert out.count("acceptance is unknown") == 1
    (benchmark,) = json.loads((tmp_path / "new" / "served.json").read_text())["benchmarks"]
    assert benchmark["extra_info"]["lossless"] is True
    assert len(benchmark["stats"]["data"]) == benchmark["extra_info"]["rounds"] == 3
    assert "served-openai-c1-n5" in (tmp_path / "report" / "report.md").read_text()


def test_all_turns_of_a_set_in_the_directory_of_sets_are_asked(compare, tmp_path):
    row = {"category": "writing", "prompt": ["Compose a post.", "Rewrite it."], "prompt_id": 81}
    (tmp_path / "mt-bench.jsonl").write_text(json.dumps(row))
    words = ("--prompts", "mt-bench", "--data-dir", str(tmp_path), "--num-prompts", "1", "--json", "served.json")
    assert compare(*words)[0] == 0
    info = json.loads((tmp_path / "served.json").read_text())["benchmarks"][0]["extra_info"]
    assert (info["prompts"], info["num_prompts"], info["prompts_equal"]) == ("mt-bench", 2, 2)
    code, _, err = compare(*words, "--raw")
    assert (code, err.count("\n")) == (2, 1)
    assert "81 has more" in err


def test_other_texts_are_exit_code_1_and_still_written(compare, tmp_path):
    code, _, err = compare("--json", "served.json", wrong_at=2)
    assert code == 1
    assert "prompt 0, token 2" in err
    assert (tmp_path / "served.json").is_file()


def test_a_speed_up_that_is_asked_for_and_missed_is_exit_code_1(compare):
    code, _, err = compare("--min-speedup", "1000000")
    assert code == 1
    assert "speedup_x" in err


def test_a_server_without_a_draft_is_said_to_have_none(serve_bench):
    with serving(gives_ids=False) as (url, _):
        code, out, _ = serve_bench("--base-url", url)
        assert code == 0
        assert re.search("no-draft: .*--draft-base-url", out)
        code, _, err = serve_bench("--base-url", url, "--min-speedup", "1")
        assert code == 1
        assert "no-draft" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "give --base-url, or --server KIND"),
        (("--server", "vllm"), "has no vllm to start"),
        (("--base-url", "http://127.0.0.1:1", "--rounds", "0"), "rounds must be at least 1, got 0"),
        (("--base-url", "http://127.0.0.1:1"), "http://127.0.0.1:1 does not answer"),
        (("--base-url", "http://127.0.0.1:1", "--min-speedup", "nan"), "min_speedup must be above 0, got nan"),
        (("--base-url", "http://127.0.0.1:1", "--min-speedup", "-1"), "min_speedup must be above 0"),
        (("--base-url", "http://127.0.0.1:1", "--request-timeout", "inf"), "request_timeout"),
        (("--base-url", "http://127.0.0.1:1", "--key-variable", "NO_SUCH_VARIABLE"), "no variable of the name"),
        (
            ("--base-url", "http://127.0.0.1:1", "--report", "/dev/null"),
            "directory; /dev/null",
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(serve_bench, words, said):
    code, _, err = serve_bench(*words)
    assert code == 2
    assert err.startswith("dflash: ")
    assert said in err
    assert "Traceback" not in err


def test_an_interrupt_is_exit_code_130(serve_bench, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("dflash.serving.deployment._check", interrupted)
    code, _, err = serve_bench("--base-url", "http://127.0.0.1:1")
    assert (code, err) == (130, "dflash: interrupted\n")


@pytest.fixture(scope="module")
def draft(target):
    network = init_draft(load_target(target), target_layer_ids=(0, 1), block_size=4)
    write_draft(network, target.parent / "draft")
    return str(target.parent / "draft")


def test_a_stop_while_the_prompts_are_decoded_here_keeps_what_was_measured(compare, draft, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        assert (tmp_path / "served.json").is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr("dflash.serving.run.conventions.own_figures", interrupted)
    words = ("--server", "vllm", f"--draft={draft}", "--offline", "--json", "served.json", "--served-model", "m")
    counted = {"drafts": 2, "draft_tokens": 6, "accepted_tokens": 3}
    code, out, err = compare(*words, metrics=counted)
    assert (code, err) == (130, "dflash: interrupted\n")
    assert "served-vllm-b4-c1-n5" in out
    assert "held to ours" not in out
    info = json.loads((tmp_path / "served.json").read_text())["benchmarks"][0]["extra_info"]
    assert info["accept_len_mean"] == 1.5
    assert "own" not in info
    assert "ended before its prompts were decoded here" in info["own_unknown"]


def test_acceptance_beside_ours_is_one_line_below_the_table(compare, draft, monkeypatch):
    words = ("--server", "vllm", f"--draft={draft}", "--offline", "--served-model", "m")
    ours = metrics.acceptance([[1, 2, 1, 2]], 4)
    monkeypatch.setattr("dflash.serving.run.conventions.own_figures", lambda *_, **__: lambda _: ours)
    code, out, err = compare(*words, metrics={"drafts": 2, "draft_tokens": 6, "accepted_tokens": 3})
    assert (code, err) == (0, "")
    assert out.count("no gap") == 1
    code, out, err = compare(*words, metrics={"drafts": 2, "draft_tokens": 6, "accepted_tokens": 0})
    assert code == 1
    assert err.count("a gap") == 1
    assert "a gap" not in out


def test_rounds_that_were_measured_are_kept_when_a_later_one_fails(serve_bench, tmp_path):
    done = head() + event(choices=[{"text": "a", "finish_reason": "length"}])
    # A page of models, one to learn, two to warm up, two rounds of two; then it breaks off.
    with hostile(lambda number, _: [head(404) if number == 0 else done if number < 8 else head()]) as server:
        code, out, err = serve_bench("--base-url", f"{server.url}/v1", "--json", "served.json", "--rounds", "4")
    assert code == 1
    assert "2 of 4 rounds were taken, since" in err
    assert "served-openai-c1-n5" in out
    (benchmark,) = json.loads((tmp_path / "served.json").read_text())["benchmarks"]
    assert len(benchmark["stats"]["data"]) == benchmark["extra_info"]["rounds"] == 2


def test_a_redirect_gives_no_key_away(serve_bench, monkeypatch):
    monkeypatch.setenv("MY_SERVER", "averysecretkey-0123456789")
    with hostile(head() + b"") as other, hostile(head(307, more=f"Location: {other.url}/\r\n")) as server:
        code, _, err = serve_bench("--base-url", server.url, "--key-variable", "MY_SERVER")
        assert other.requests == []
    assert code == 2
    assert "redirect" in err
    assert "averysecretkey" not in err
