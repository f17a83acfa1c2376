"""A case over HTTP: what is compared, what is measured, what is unknown, and servers that fail half-way."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from stub_server import serving

import dflash
from dflash import init_draft, load_target, load_tokenizer, write_draft
from dflash.gate import Floors, failures, remark, status
from dflash.models.draft import pack_tokens
from dflash.report.page import write_report
from dflash.report.run import read_run
from dflash.report.text import speedup_table
from dflash.serving.adapters import ADAPTERS, Adapter, Installed, Launch
from dflash.serving.draft import Draft
from dflash.serving.plan import Plan, Request, make_plan
from dflash.serving.results import case_facts, results_of, write_results
from dflash.serving.run import _at_once, served_run
from dflash.serving.server import ServingError
from dflash.tiny import write_tiny_target, write_tiny_tokenizer
from dflash.weights import load, smollm2
from dflash.weights.load import new_draft

STUB = Path(__file__).with_name("stub_server.py")
BUDGET, SIZE = 6, 4


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "target"
    return write_tiny_tokenizer(write_tiny_target(directory, vocab_size=260, num_hidden_layers=5))


@pytest.fixture(scope="module")
def tokenizer(target):
    return load_tokenizer(target)


@pytest.fixture(scope="module")
def letters(tokenizer):
    return [tokenizer.encode(chr(97 + i))[0] for i in range(26)]


@pytest.fixture(scope="module")
def draft(target):
    config = init_draft(load_target(target), block_size=SIZE).config
    return Draft(directory=target, config=config, raw={}, block_size=SIZE)


@pytest.fixture
def plan(target, draft, tmp_path):
    """A plan for servers of a kind; whatever is not said is as if all were well."""

    def plan(kind="openai", adapter=None, no_draft=None, with_draft=True, **asked):
        return Plan(
            asked=Request(server=kind, target=str(target), log_dir=tmp_path / "logs", **asked),
            adapter=adapter or ADAPTERS.get(kind),
            launch=Launch(
                installed=Installed(version="1.0", directory=tmp_path), target=target, config={}, draft=draft
            ),
            target=target,
            draft=draft if with_draft else None,
            no_draft=no_draft,
        )

    return plan


@pytest.fixture
def measure(tokenizer):
    """The info of a case, and the seconds of its rounds."""

    def measure(plan, prompts=("one", "the second"), rounds=3, concurrency=2):
        ids = [tokenizer.encode(p) for p in prompts]
        with served_run(plan, tokenizer, ids, max_new_tokens=BUDGET, concurrency=concurrency, rounds=rounds) as run:
            for _ in range(rounds):
                run.baseline_round()
                run.round()
        info = run.info()
        return info | case_facts(plan, info) | {"prompts": "file", "prompts_sha256": None}, run.seconds

    return measure


@pytest.fixture
def compared(plan, measure, letters):
    """The info of two running stubs, the second with these settings."""

    def compared(kind="openai", first=None, **second):
        with serving(letters=letters, **(first or {})) as (a, _), serving(**({"letters": letters} | second)) as (b, _):
            return measure(plan(kind, base_url=a, draft_base_url=b))[0]

    return compared


def test_equal_answers_are_lossless_and_timed(compared):
    info = compared()
    assert info["lossless"] is True
    assert info["prompts_equal"] == 2
    assert info["first_divergence"] is None
    assert info["compared"] == "token ids"
    assert info["num_output_tokens"] == 2 * BUDGET
    assert info["rounds"] == 3
    assert info["speedup_x"] > 0
    assert info["tok_s_total"] > 0
    assert info["baseline_tok_s_total"] > 0
    low, high = info["speedup_x_ci95"]
    assert low <= info["speedup_x"] <= high
    assert info["ttft_ms"] > 0


def test_answers_that_run_over_are_cut_and_told(compared):
    info = compared(over=4)
    assert info["lossless"] is True
    assert info["num_output_tokens"] == 2 * BUDGET
    assert info["over_budget"] == 6


def test_a_wrong_token_is_found_and_placed(compared):
    info = compared(wrong_at=3)
    assert info["lossless"] is False
    assert info["first_divergence"] == {"prompt": 0, "token": 3}
    assert info["prompts_equal"] == 0
    assert info["status"] == "invalid"
    assert "prompt 0, token 3" in failures(info, Floors())[0]


def test_texts_are_compared_where_a_server_gives_no_ids(compared):
    no_ids = {"letters": [], "takes_ids": False, "gives_ids": False}
    assert compared(**no_ids)["compared"] == "texts, encoded again"
    assert compared(**no_ids)["lossless"] is True
    assert compared(**no_ids, wrong_at=2)["first_divergence"] == {"prompt": 0, "token": 2}


def test_an_unknown_acceptance_is_null_with_a_reason(compared):
    info = compared()
    assert info["acceptance_length"] is None
    assert info["num_drafts"] is None
    assert "an OpenAI API tells no acceptance" in info["acceptance_unknown"]
    assert "is unknown: an OpenAI" in failures(info | {"status": "ok"}, Floors(acceptance_length=2.0))[0]
    assert "what is accepted is unknown" in failures(info | {"status": "ok"}, Floors(speedup_x=1e6))[0]


def test_acceptance_is_taken_from_what_sglang_tells(compared):
    info = compared("sglang", told={"spec_verify_ct": 2, "spec_num_correct_drafts": 4})
    # Two prompts, three rounds; warm-up is not in it.
    assert info["num_drafts"] == 12
    assert info["acceptance_length"] == 3.0
    assert info["accept_rate"] == pytest.approx(4 / (2 * (SIZE - 1)))


def test_acceptance_is_taken_from_the_counters_of_vllm(compared):
    counters = {"drafts_total": 2, "draft_tokens_total": 6, "accepted_tokens_total": 3}
    info = compared("vllm", metrics=counters)
    assert info["num_drafts"] == 12
    assert info["accept_len_mean"] == 1.5


def test_sglang_jax_started_elsewhere_keeps_its_log(compared):
    assert "into its log alone" in compared("sglang-jax")["acceptance_unknown"]


def stub(**settings):
    """An adapter that starts the stub; what it is told with a draft comes from `drafting`."""
    drafting = settings.pop("drafting", {})

    def command(launch):
        return [str(STUB), json.dumps(settings | (drafting if launch.draft else {}))]

    return Adapter(
        package="",
        distribution="",
        api="sglang",
        health="/health",
        command=command,
    )


LINE = "Decode batch. #running-req: 1, #token: 9, accept-len 3.00, accept-ratio 0.75, gen throughput"


def test_both_servers_are_started_in_turn_and_the_log_is_read(plan, measure, letters, tmp_path):
    adapter = stub(letters=letters, log_line="no draft", drafting={"log_line": LINE})
    info, seconds = measure(plan("sglang-jax", adapter, python=sys.executable, arguments="--page-size 1"))
    assert info["lossless"] is True
    assert not info["interleaved"]
    assert info["num_drafts"] == 6
    assert info["acceptance_length"] == 3.0
    assert len(seconds) == 3
    assert [line.count("--page-size 1") for line in info["server_commands"]] == [1, 1]
    assert "no draft" in (tmp_path / "logs" / "target.log").read_text()
    assert LINE in (tmp_path / "logs" / "draft.log").read_text()


def test_a_server_that_dies_half_way_is_told_as_that(plan, measure, letters):
    # Prompts: one to learn, two to warm up; the next is cut.
    adapter = stub(letters=letters, drafting={"die_at": 4})
    with pytest.raises(ServingError) as caught:
        measure(plan("sglang-jax", adapter, python=sys.executable))
    assert "the server ended by itself with exit code 7" in str(caught.value)
    assert "out of memory, says the stub" in str(caught.value)
    assert "broke off an answer" in str(caught.value)


def test_without_a_draft_the_target_alone_is_measured_and_that_is_said(plan, measure, letters):
    why = "transformers 5 has no DFLASH"
    with serving(letters=letters) as (url, _):
        info, seconds = measure(plan(base_url=url, no_draft=why, with_draft=False))
    assert info["status"] == "no-draft"
    assert info["speedup_x"] is None
    assert info["lossless"] is None
    assert info["tok_s_total"] is None
    assert info["baseline_tok_s_total"] > 0
    assert len(seconds) == 3
    assert remark(info) == f"no-draft: the target alone was measured, since {why}"
    assert "no-draft" in speedup_table([info])[-1]
    assert why in failures(info, Floors(speedup_x=1.0))[0]


def test_a_target_that_does_not_repeat_itself_is_told(plan, measure, tokenizer):
    class Fickle(list):
        """Another letter each time that it is asked for the first."""

        def __getitem__(self, i):
            self.asked = getattr(self, "asked", 0) + 1
            return super().__getitem__((i + self.asked) % 26)

    letters = Fickle(tokenizer.encode(chr(97 + i))[0] for i in range(26))
    with serving(letters=letters) as (url, _):
        info, _ = measure(plan(base_url=url, no_draft="why", with_draft=False))
    assert not info["target_repeats_itself"]


def test_a_draft_is_not_blamed_for_a_target_that_does_not_repeat_itself(compared):
    info = compared(wrong_at=3) | {"target_repeats_itself": False}
    info["status"] = status(info)
    assert info["status"] == "invalid"
    assert "answers otherwise when it is asked again" in remark(info)


def test_the_first_failure_ends_a_round_and_nothing_more_is_asked():
    asked = []

    def ask(prompt):
        asked.append(prompt)
        if prompt == [1]:
            raise ServingError("no")
        time.sleep(0.05)
        return prompt

    with pytest.raises(ServingError, match="no"):
        _at_once(ask, [[i] for i in range(50)], 2)
    time.sleep(0.3)
    assert len(asked) < 10
    assert _at_once(lambda prompt: prompt, [[i] for i in range(7)], 3) == [[i] for i in range(7)]


@pytest.mark.parametrize("drafts", [True, False])
def test_the_file_is_as_its_schema_says_and_makes_a_report(plan, measure, letters, drafts, tmp_path):
    with serving(letters=letters) as (a, _), serving(letters=letters) as (b, _):
        asked = {"base_url": a, "draft_base_url": b} if drafts else {"base_url": a, "no_draft": "it has no DFLASH"}
        info, seconds = measure(plan(with_draft=drafts, **asked))
    command = ["dflash", "serve-bench", "--server-args", "--api-key hf_averysecretword"]
    results = results_of(info, seconds, command)
    write_results(tmp_path / "served.json", results)
    text = (tmp_path / "served.json").read_text()
    assert "hf_averysecretword" not in text
    run = read_run(tmp_path / "served.json")
    assert [c["case"] for c in run.decodes] == [info["case"]]
    page = write_report(tmp_path / "report", run)
    said = page.with_suffix(".md").read_text()
    assert ("lossless" if drafts else "the target alone was measured, since it has no DFLASH") in said
    schema = json.loads((Path(dflash.__file__).parent / "data" / "results.schema.json").read_text())
    pytest.importorskip("jsonschema").Draft202012Validator(schema).validate(json.loads(text))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"server": "tgi"}, "one of sglang-jax, sglang, vllm, transformers, openai, got 'tgi'"),
        ({"server": "openai"}, "give --base-url, or --server KIND"),
        ({"server": "vllm", "draft_base_url": "http://x"}, "give its --base-url too"),
        ({"server": "vllm", "base_url": "x:80"}, "starts with http:// or https://, got 'x:80'"),
        ({"server": "vllm", "base_url": "http://x", "arguments": "-a"}, "for servers that are started here"),
        ({"server": "vllm", "arguments": "'"}, "words as in a shell"),
        ({"server": "vllm", "key_variable": "DFLASH_NO_SUCH"}, "DFLASH_NO_SUCH is not set"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(asked, said, target):
    with pytest.raises(ServingError, match=said):
        make_plan(Request(**({"target": str(target)} | asked)))


def test_a_server_gets_no_draft_that_is_not_named(target, monkeypatch, tmp_path):
    """The target of that name comes with a draft, which no server could read; named, it is refused by what it is."""
    config = load_target(target).config
    few = new_draft(config, num_layers=1, block_size=SIZE, vocabulary=pack_tokens(np.arange(50), config.vocab_size))
    write_draft(few, tmp_path / "draft")
    monkeypatch.setattr(load, "SHIPPED_DRAFT", tmp_path / "draft")
    monkeypatch.setattr(smollm2, "snapshot_dir", lambda: target)
    asked = {"server": "openai", "target": "smollm2-135m"}
    asked |= {"base_url": "http://127.0.0.1:1", "draft_base_url": "http://127.0.0.1:2"}
    assert make_plan(Request(**asked)).draft is None
    with pytest.raises(ServingError, match="servers propose every token of the vocabulary"):
        make_plan(Request(draft="smollm2-135m", **asked))


def test_why_nothing_is_drafted(target, monkeypatch, tmp_path):
    (tmp_path / "sgl_jax").mkdir()
    (tmp_path / "sgl_jax" / "__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "--draft names one" in make_plan(Request(server="sglang-jax", target=str(target))).no_draft
    url = {"base_url": "http://127.0.0.1:1"}
    assert "--draft-base-url" in make_plan(Request(server="openai", target=str(target), **url)).no_draft
    both = url | {"draft_base_url": "http://127.0.0.1:2"}
    assert make_plan(Request(server="openai", target=str(target), **both)).no_draft is None
