"""A case over HTTP: what is compared, what is measured, what is unknown, and servers that fail half-way."""

import asyncio
import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
from hostile_server import event, head, hostile
from stub_server import serving

import dflash
from dflash import init_draft, load_target, load_tokenizer, metrics
from dflash.config import ConfigError
from dflash.measuring.gate import Floors, failures, remark, status
from dflash.measuring.result import Results, TokenPlace, read_file
from dflash.report.page import write_report
from dflash.report.sections import render, speedup_section
from dflash.serving.adapters import ADAPTERS, Installed, Launch, SglangJax
from dflash.serving.connection import ServingError
from dflash.serving.deployment import Deployment
from dflash.serving.draft import ServedDraft
from dflash.serving.options import ServerOptions
from dflash.serving.results import results_of, write_results
from dflash.serving.run import _at_once, served_run
from dflash.text.prompts import Prompt, PromptSet, ids_sha256
from dflash.weights.tiny import write_tiny_target, write_tiny_tokenizer

STUB = Path(__file__).parents[1] / "stub_server.py"
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
    return ServedDraft(directory=target, config=config, raw={}, block_size=SIZE)


@pytest.fixture
def deployment(target, draft, tmp_path):
    """Servers of a kind; whatever is not said is as if all were well."""

    def deployment(kind="openai", adapter=None, no_draft=None, with_draft=True, **options):
        return Deployment(
            options=ServerOptions(server=kind, target=str(target), server_logs=tmp_path / "logs", **options),
            adapter=adapter or ADAPTERS[kind],
            launch=Launch(
                installed=Installed(version="1.0", directory=tmp_path), target=target, config={}, draft=draft
            ),
            target=target,
            target_sha256="0" * 64,
            draft=draft if with_draft else None,
            no_draft=no_draft,
        )

    return deployment


def talk(words):
    """Plain text, or a conversation whose turns these are."""
    if isinstance(words, str):
        return Prompt(id=words, category="own", text=words)
    first, *later = words
    return Prompt(id=first, category="own", messages=({"role": "user", "content": first},), later=tuple(later))


@pytest.fixture
def measure(tokenizer):
    """The run of a case, and its result."""

    def measure(servers, prompts=("one", "the second"), rounds=3, concurrency=2):
        asked = PromptSet(name="own", prompts=tuple(map(talk, prompts)))
        with served_run(
            servers, tokenizer, asked, max_new_tokens=BUDGET, concurrency=concurrency, rounds=rounds
        ) as run:
            run.measure(rounds)
        return run, run.held_to_ours(run.result({"prompts": "file"}))

    return measure


@pytest.fixture
def compared(deployment, measure, letters):
    """The result of two running stubs, the second with these settings."""

    def compared(kind="openai", first=None, options=None, **second):
        with serving(letters=letters, **(first or {})) as (a, _), serving(**({"letters": letters} | second)) as (b, _):
            return measure(deployment(kind, base_url=a, draft_base_url=b, **(options or {})))[1]

    return compared


def test_equal_answers_are_lossless_and_timed(compared):
    case = compared()
    assert case.lossless is True
    assert case.prompts_equal == 2
    assert case.first_divergence is None
    assert case.compared == "token ids"
    assert case.num_output_tokens == 2 * BUDGET
    assert case.rounds == 3
    assert case.speedup_x > 0
    assert case.tok_s_total > 0
    assert case.baseline_tok_s_total > 0
    low, high = case.speedup_x_ci95
    assert low <= case.speedup_x <= high
    assert case.ttft_ms > 0


def test_turns_follow_the_answers_of_the_server_without_a_draft(deployment, measure, letters, tokenizer):
    with serving(letters=letters) as (a, first), serving(letters=letters, wrong_at=3) as (b, second):
        run, case = measure(
            deployment(base_url=a, draft_base_url=b), prompts=[("one", "two", "three"), "alone"], rounds=3
        )
    messages, turns = [{"role": "user", "content": "one"}], []
    for turn in ("two", "three", None):
        turns.append(tokenizer.encode_chat(messages))
        answer = "".join(chr(97 + (len(turns[-1]) + i) % 26) for i in range(BUDGET))
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": turn}]
    rows = [*turns, talk("alone").encode(tokenizer)]
    assert run.prompts == rows
    assert (case.num_prompts, case.prompts_sha256) == (4, ids_sha256(rows))
    # The draft's server is asked the same, whatever it has answered before: one to learn, then four rounds of them all.
    assert sorted(request["prompt"] for request in second[1:]) == sorted(4 * rows)
    assert {tuple(request["prompt"]) for request in first} == {tuple(row) for row in rows}
    assert (case.prompts_equal, case.first_divergence) == (0, TokenPlace(prompt=0, token=3))
    assert case.target_repeats_itself


def test_the_next_turn_follows_an_answer_of_no_words_too(deployment, measure, tokenizer):
    nothing = head() + event(choices=[{"text": "", "finish_reason": "stop"}])
    with hostile(lambda number, _: [head(404) if number == 0 else nothing]) as server:
        run, _ = measure(deployment(base_url=server.url, no_draft="why", with_draft=False), prompts=[("one", "two")])
    assert [tokenizer.decode(row, skip_special_tokens=False) for row in run.prompts] == [
        "<|user|>one</s><|assistant|>", "<|user|>one</s><|assistant|></s><|user|>two</s><|assistant|>",
    ]  # fmt: skip


def test_drawn_texts_are_measured_and_not_compared(compared):
    case = compared(wrong_at=3, options={"temperature": 0.7, "seed": 2})
    assert (case.lossless, case.first_divergence) == (None, None)
    assert case.speedup_x > 0
    assert case.sampling == {"temperature": 0.7, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 2}
    assert case.compared == "nothing: texts are drawn"
    assert "noise of its own" in remark(case)


def test_answers_that_run_over_are_cut_and_told(compared):
    case = compared(over=4)
    assert case.lossless is True
    assert case.num_output_tokens == 2 * BUDGET
    assert case.over_budget == 6


def test_a_wrong_token_is_found_and_placed(compared):
    case = compared(wrong_at=3)
    assert case.lossless is False
    assert case.first_divergence == TokenPlace(prompt=0, token=3)
    assert case.prompts_equal == 0
    assert case.status == "invalid"
    assert "prompt 0, token 3" in failures(case, Floors())[0]


def test_texts_are_compared_where_a_server_gives_no_ids(compared):
    no_ids = {"letters": [], "takes_ids": False, "gives_ids": False}
    assert compared(**no_ids).compared == "texts, encoded again"
    assert compared(**no_ids).lossless is True
    assert compared(**no_ids, wrong_at=2).first_divergence == TokenPlace(prompt=0, token=2)


def test_an_unknown_acceptance_is_null_with_a_reason(compared):
    case = compared()
    assert case.acceptance_length is None
    assert case.num_drafts is None
    assert "an OpenAI API" in case.acceptance_unknown
    assert "is unknown: an OpenAI" in failures(dataclasses.replace(case, status="ok"), Floors(acceptance_length=2.0))[0]
    assert "what is accepted is unknown" in failures(dataclasses.replace(case, status="ok"), Floors(speedup_x=1e6))[0]


def test_acceptance_is_taken_from_what_sglang_tells(compared):
    case = compared("sglang", told={"spec_verify_ct": 2, "spec_num_correct_drafts": 4})
    # Two prompts, three rounds; warm-up is not in it.
    assert case.num_drafts == 12
    assert case.acceptance_length == 3.0
    assert case.accept_rate == pytest.approx(4 / (2 * (SIZE - 1)))


def test_acceptance_is_taken_from_the_counters_of_vllm(compared):
    counters = {"drafts_total": 2, "draft_tokens_total": 6, "accepted_tokens_total": 3}
    case = compared("vllm", metrics=counters)
    assert case.num_drafts == 12
    assert case.accept_len_mean == 1.5


def drafting(per_answer):
    """A stub that counts as vLLM does: two blocks an answer, of which so many tokens are accepted."""
    return {"metrics": {"drafts": 2, "draft_tokens": 2 * (SIZE - 1), "accepted_tokens": per_answer}}


@pytest.fixture
def accepted_here(monkeypatch):
    """Says what decoding here accepts in each block, whatever is broken."""

    def accepted_here(*lengths):
        own = metrics.acceptance([lengths], SIZE)
        monkeypatch.setattr("dflash.serving.run.conventions.own_figures", lambda *_, **__: lambda _: own)

    return accepted_here


def test_an_acceptance_next_to_nothing_is_an_alarm(compared):
    case = compared("vllm", **drafting(0))
    assert case.alarm == "hardly-accepted"
    assert case.own is None
    assert any("--offline tells which" in line for line in render(speedup_section(Results(measured=[case]))))
    assert compared("vllm", **drafting(3)).alarm is None
    assert compared().alarm is None


def test_a_gap_to_ours_fails_the_run(deployment, measure, letters, accepted_here):
    accepted_here(*[SIZE - 1] * 8)
    with serving(letters=letters) as (a, _), serving(letters=letters, **drafting(0)) as (b, _):
        run, case = measure(deployment("vllm", base_url=a, draft_base_url=b, offline=True))
    assert case.own.gap
    assert case.own.accept_len_mean == SIZE - 1
    (said,) = run.failures(case, Floors(), 3)
    assert said.startswith("0.00 of 3 accepted by the server, 3.00 here: a gap")
    assert any(said in line for line in render(speedup_section(Results(measured=[case]))))


def test_no_gap_to_ours_is_said_and_fails_nothing(deployment, measure, letters, accepted_here):
    accepted_here(*[1, 2] * 2)
    with serving(letters=letters) as (a, _), serving(letters=letters, **drafting(3)) as (b, _):
        run, case = measure(deployment("vllm", base_url=a, draft_base_url=b, offline=True))
    assert not case.own.gap
    assert case.own.broken == {}
    assert run.failures(case, Floors(), 3) == []
    assert any(line.endswith("no gap") for line in render(speedup_section(Results(measured=[case]))))


def test_what_can_not_be_held_to_ours_fails_the_run(deployment, measure, letters, monkeypatch):
    def refuse(*_, **__):
        raise ConfigError("no such draft")

    monkeypatch.setattr("dflash.serving.run.conventions.own_figures", refuse)
    for second, why in ((drafting(3), "no such draft"), ({}, "no growing vllm:spec_decode_num_drafts")):
        with serving(letters=letters) as (a, _), serving(letters=letters, **second) as (b, _):
            run, case = measure(deployment("vllm", base_url=a, draft_base_url=b, offline=True))
        assert why in case.own_unknown
        assert why in run.failures(case, Floors(), 3)[0]


def test_too_little_memory_to_decode_here_leaves_what_was_measured(deployment, measure, letters, monkeypatch):
    def exhausted(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 42 bytes.")

    monkeypatch.setattr("dflash.serving.run.conventions.own_figures", exhausted)
    with serving(letters=letters) as (a, _), serving(letters=letters, **drafting(3)) as (b, _):
        run, case = measure(deployment("vllm", base_url=a, draft_base_url=b, offline=True))
    assert case.accept_len_mean == 1.5
    assert case.own_unknown.startswith("out of memory")
    assert "out of memory" in run.failures(case, Floors(), 3)[0]


def test_sglang_jax_started_elsewhere_keeps_its_log(compared):
    assert "only to its log" in compared("sglang-jax").acceptance_unknown


class Stub(SglangJax):
    """Starts the stub; what it is told with a draft comes from `drafting`."""

    def __init__(self, drafting=None, **settings):
        self.settings, self.drafting = settings, drafting or {}

    def command(self, launch):
        return [str(STUB), json.dumps(self.settings | (self.drafting if launch.draft else {}))]


LINE = "Decode batch. #running-req: 1, #token: 9, accept-len 3.00, accept-ratio 0.75, gen throughput"
KEY = "averysecretkey"


def test_both_servers_are_started_in_turn_and_the_log_is_read(deployment, measure, letters, tmp_path):
    adapter = Stub(letters=letters, log_line="no draft", drafting={"log_line": f"{LINE} {KEY}"})
    servers = deployment(adapter=adapter, server_python=sys.executable, server_args=f"--page-size 1 --key={KEY}")
    run, case = measure(dataclasses.replace(servers, key=KEY))
    assert case.lossless is True
    assert not case.interleaved
    assert case.num_drafts == 6
    assert case.acceptance_length == 3.0
    assert len(run.seconds) == 3
    assert [line.count("--page-size 1") for line in case.server_commands] == [1, 1]
    logs = [(tmp_path / "logs" / name).read_text() for name in ("target.log", "draft.log")]
    assert "no draft" in logs[0]
    assert LINE in logs[1]
    assert all(KEY not in text for text in (*logs, *case.server_commands))


def test_a_server_that_dies_half_way_is_named_so(deployment, measure, letters):
    # Prompts: one to learn, two to warm up; the next is cut.
    adapter = Stub(letters=letters, drafting={"die_at": 4})
    with pytest.raises(ServingError) as caught:
        measure(deployment(adapter=adapter, server_python=sys.executable))
    assert "exit code 7" in str(caught.value)
    assert "out of memory, says the stub" in str(caught.value)
    assert "broke off an answer" in str(caught.value)


def test_rounds_before_a_death_are_kept(deployment, measure, letters):
    # One to learn, two to warm up, two rounds of two.
    adapter = Stub(letters=letters, log_line=LINE, drafting={"die_at": 7})
    run, case = measure(deployment(adapter=adapter, server_python=sys.executable), rounds=5)
    assert case.rounds == len(run.seconds) == 2
    assert "exit code 7" in run.cut_short
    assert case.lossless is True
    assert case.num_drafts == 4
    assert case.speedup_x > 0


def test_a_round_that_a_busy_server_cut_is_taken_anew(deployment, measure, monkeypatch):
    monkeypatch.setattr("dflash.serving.connection.time.sleep", lambda seconds: None)
    done = head() + event(choices=[{"text": "a", "finish_reason": "length"}])
    busy = head(503, more="Retry-After: 9\r\n") + b"loading"
    # A page of models, one to learn, two to warm up, then rounds of two.
    refused = {6}
    with hostile(lambda number, _: [head(404) if number == 0 else busy if number in refused else done]) as server:
        run, case = measure(deployment(base_url=server.url, no_draft="why", with_draft=False))
        assert run.cut_short is None
        assert case.rounds == 3
        refused |= set(range(20, 99))
        assert 12 <= len(server.requests) <= 13
    with hostile(lambda number, _: [head(404) if number == 0 else busy if number >= 8 else done]) as server:
        run, case = measure(deployment(base_url=server.url, no_draft="why", with_draft=False))
        assert "503" in run.cut_short
        assert case.rounds == 2


def test_without_a_draft_the_target_alone_is_measured_and_that_is_said(deployment, measure, letters):
    why = "transformers 5 has no DFLASH"
    with serving(letters=letters) as (url, _):
        run, case = measure(deployment(base_url=url, no_draft=why, with_draft=False))
    assert case.status == "no-draft"
    assert case.speedup_x is None
    assert case.lossless is None
    assert case.tok_s_total is None
    assert case.baseline_tok_s_total > 0
    assert len(run.seconds) == 3
    assert re.match(f"no-draft: .*{re.escape(why)}$", remark(case))
    lines = render(speedup_section(Results(measured=[case])))
    assert any(line.endswith("no-draft") for line in lines)
    assert why in failures(case, Floors(speedup_x=1.0))[0]


def test_a_target_that_does_not_repeat_itself_is_told(deployment, measure, tokenizer):
    class Fickle(list):
        """Another letter each time that it is asked for the first."""

        def __getitem__(self, i):
            self.asked = getattr(self, "asked", 0) + 1
            return super().__getitem__((i + self.asked) % 26)

    letters = Fickle(tokenizer.encode(chr(97 + i))[0] for i in range(26))
    with serving(letters=letters) as (url, _):
        _, case = measure(deployment(base_url=url, no_draft="why", with_draft=False))
    assert not case.target_repeats_itself


def test_a_draft_is_not_blamed_for_a_target_that_does_not_repeat_itself(compared):
    case = dataclasses.replace(compared(wrong_at=3), target_repeats_itself=False)
    case = dataclasses.replace(case, status=status(case))
    assert case.status == "invalid"
    assert "target's server answers otherwise" in remark(case)


def test_the_first_failure_ends_a_round_and_nothing_more_is_asked():
    begun, ended = [], []

    async def ask(prompt):
        begun.append(prompt)
        if prompt == [1]:
            raise ServingError("no")
        await asyncio.sleep(5)
        ended.append(prompt)

    with pytest.raises(ServingError, match="no"):
        asyncio.run(_at_once(ask, [[i] for i in range(50)], 2))
    assert len(begun) <= 3
    assert ended == []

    async def echo(prompt):
        await asyncio.sleep(0.001 * (7 - prompt[0]))
        return prompt

    assert asyncio.run(_at_once(echo, [[i] for i in range(7)], 3)) == [[i] for i in range(7)]


@pytest.mark.parametrize("drafts", [True, False])
def test_the_file_is_as_its_schema_says_and_makes_a_report(deployment, measure, letters, drafts, tmp_path):
    with serving(letters=letters) as (a, _), serving(letters=letters) as (b, _):
        options = {"base_url": a, "draft_base_url": b} if drafts else {"base_url": a, "no_draft": "it has no DFLASH"}
        run, case = measure(deployment(with_draft=drafts, **options))
    command = ["dflash", "serve-bench", "--server-args", "--api-key hf_averysecretword"]
    results = results_of(case, run.seconds, command)
    write_results(tmp_path / "served.json", results)
    text = (tmp_path / "served.json").read_text()
    assert "hf_averysecretword" not in text
    file = read_file(tmp_path / "served.json")
    assert [c.case for c in file.decodes] == [case.case]
    page = write_report(tmp_path / "report", file).with_suffix(".md").read_text()
    assert ("lossless" if drafts else "it has no DFLASH") in page
    schema = json.loads((Path(dflash.__file__).parent / "report" / "results.schema.json").read_text())
    pytest.importorskip("jsonschema").Draft202012Validator(schema).validate(json.loads(text))
