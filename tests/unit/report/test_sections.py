"""Sections as the terminal shows them: columns line up, nothing is invented where there is no number."""

import re
from dataclasses import replace

import sample_runs

from dflash.measuring.result import (
    Acceptance,
    AuditResult,
    Category,
    Results,
    Served,
    Step,
    Training,
    from_json,
)
from dflash.metrics import acceptance
from dflash.report.sections import (
    acceptance_section,
    audit_details,
    cost_section,
    headline,
    render,
    sets_section,
    speedup_section,
    training_section,
)

CASE = sample_runs.case(
    case="block-b8-n64-a7",
    proposer="a7",
    scripted=7,
    advice=None,
    accept_len_mean=7.0,
    tok_s_total=123.456,
    baseline_tok_s_total=30.0,
    speedup_x=4.1152,
    speedup_x_ci95=(4.0, 4.25),
    predicted_speedup_x=4.3,
)
NONE = ("accept_len_mean", "tok_s_total", "baseline_tok_s_total", "speedup_x", "speedup_x_ci95", "predicted_speedup_x")
WITHOUT = sample_runs.case(case="seq", advice=None, block_size=16, status="no-baseline", lossless=None)
BARE = replace(WITHOUT, **dict.fromkeys(NONE))
STEP = Step(
    case="step",
    step_ms=30.0,
    verify_ms={2: 31.5, 8: 42.0},
    draft_ms={8: 15.0},
    floor_ms={1: 20.0, 2: 20.0, 8: 21.0},
    device_kind="cpu",
    dtype="float32",
    batch_size=1,
    context=128,
    bandwidth_gb_s=31.04,
    kernels="XLA: no C++ compiler found",
)


def lines(section, *measured):
    return render(section(Results(measured=list(measured))))


def test_speed_ups():
    table = [
        "case             accepted  of  tok/s  greedy  speed-up  95% interval  predicted                 verdict",
        "---------------  --------  --  -----  ------  --------  ------------  ---------  ----------------------",
        "block-b8-n64-a7      7.00   7  123.5    30.0     4.12×  4.00 to 4.25       4.30  ok, lossless, scripted",
        "seq                   n/a  15    n/a     n/a       n/a           n/a        n/a             no-baseline",
    ]
    remark = "seq: no-baseline: greedy decoding must run beside it, to compare with and to prove the tokens"
    assert lines(speedup_section, CASE, BARE) == [*table, remark]


def test_a_case_that_differs_is_not_called_lossless():
    line = lines(speedup_section, replace(CASE, status="invalid", lossless=False))[2]
    assert line.endswith("  invalid, scripted")
    assert "lossless" not in line


def test_sets_by_drafts_show_both_means_and_say_which():
    own = replace(
        CASE,
        proposer="draft",
        scripted=None,
        prompts="gsm8k",
        num_prompts=8,
        draft="d1",
        acceptance_length=5.2,
        acceptance_length_ci95=(5.0, 5.4),
        acceptance_length_by_prompt=5.5,
        acceptance_length_by_prompt_ci95=(5.25, 5.75),
    )
    assert lines(sets_section, CASE, own) == []  # one set, one draft: nothing to compare
    found = lines(sets_section, own, replace(own, prompts="mt-bench"), CASE)
    assert [word for word in found[0].split("  ") if word][4:7] == [
        "acceptance_length over blocks", "95% interval", "by prompt",
    ]  # fmt: skip
    assert re.search(r"gsm8k +8 +d1 .* 5\.20 +5\.00 to 5\.40 +5\.50 +5\.25 to 5\.75 +4\.12× +4\.00 to 4\.25", found[2])
    assert len(found) == 4
    brief = replace(own, case="seq-b8-n64-draft", mode="cached_sequential_verify", num_prompts=1)
    assert lines(sets_section, own, brief, replace(own, prompts="mt-bench"), CASE) == found
    said = "\n".join(lines(sets_section, replace(own, protocol="zlab")))
    assert "z-lab's protocol" in said
    assert "another measurement" not in said
    said = "\n".join(lines(sets_section, replace(own, protocol="zlab with num_prompts 4")))
    assert "zlab with num_prompts 4: beside z-lab's published figures this is another measurement" in said


def test_near_ties_are_counted():
    assert lines(speedup_section, replace(CASE, near_ties=2))[2].endswith("ok, lossless up to 2 near ties, scripted")


def test_columns_widen_with_their_cells():
    table = lines(speedup_section, replace(CASE, case="x" * 40, tok_s_total=1234567.8), CASE)
    assert len(set(map(len, table))) == 1
    assert "1234567.8" in table[2]


def test_a_served_case_shows_ttft_and_tpot_with_the_draft_and_without():
    served = Served(**vars(replace(CASE, mode="served", ttft_ms=190.0, tpot_ms=9.26, baseline_tpot_ms=20.0)))
    text = lines(speedup_section, replace(served, scripted=None, baseline_ttft_ms=200.0))
    place = next(i for i, line in enumerate(text) if "TTFT ms" in line)
    assert text[place].split("  ")[0] == "case"
    assert text[place + 2].split() == ["block-b8-n64-a7", "190.0", "200.0", "9.3", "20.0"]
    assert not any("TTFT" in line for line in lines(speedup_section, CASE))


def test_what_a_step_costs():
    assert lines(cost_section, STEP) == [
        "cpu, float32, batch 1, context 128; memory read at 31.0 GB/s; computed by XLA: no C++ compiler found",
        "step           ms  / T_1  floor ms  / floor  break-even acceptance_length",
        "-----------  ----  -----  --------  -------  ----------------------------",
        "T_1          30.0   1.00      20.0     1.50",
        "T_verify(2)  31.5   1.05      20.0     1.57",
        "T_verify(8)  42.0   1.40      21.0     2.00",
        "T_draft(8)   15.0   0.50                                             1.90",
    ]


def test_the_compilers_estimate_and_a_column_stand_beside_what_was_measured():
    asked = replace(STEP, estimate_ms={1: 0.0123, 8: 22.25}, product_ms={"plain": 1.25, "padded": 1.5})
    said = [line for line in lines(cost_section, asked) if line not in lines(cost_section, STEP)]
    assert len(said) == 2
    assert "T_1 0.01 ms, T_8 22.25 ms" in said[0]
    assert "1.250 ms" in said[1]
    assert "1.500 ms" in said[1]


def test_acceptance_has_a_line_for_each_category_and_one_for_all():
    code, chat = Category(num_prompts=2, **acceptance([[2, 1, 2]], 3)), Category(num_prompts=1, **acceptance([], 3))
    overall = {"case": "acceptance", "block_size": 3, "max_new_tokens": 8, "lossless": True}
    info = Acceptance(**overall, **acceptance([[2, 1, 2]], 3), by_category={"code": code, "chat": chat})
    assert [line.split() for line in lines(acceptance_section, info)[2:]] == [
        ["code", "2", "3", "2.67", "1.00", "0.67"],
        ["chat", "1", "0", "n/a"],
        ["all", "3", "3", "2.67", "1.00", "0.67"],
    ]


def test_training_says_what_reading_takes():
    record = from_json(sample_runs.training()["extra_info"], Training)
    assert "(78%)" in lines(training_section, record)[0]
    assert "read in 10 ms" in lines(training_section, record)[1]


def test_an_audit_begins_with_its_verdict_and_names_every_defect():
    text = render(audit_details(from_json(sample_runs.audit(defects=["own: defect at prompt 0"]), AuditResult)))
    assert text[0].startswith("defect: 288 tokens of bfloat16 ")
    assert "DEFECT: own: defect at prompt 0" in text
    assert text[-1].split() == ["layer", "1", "1.00", "2.50"]


def test_failed_tests_are_the_first_thing_said():
    names = [f"bench/test_decode.py::test_decode[{i}]" for i in range(7)]
    top = headline(Results(measured=[CASE], failed_tests=names))
    assert top.verdict.startswith("FAILED: 7 of this run's tests (test_decode[0], ")
    assert "and 2 more" in top.verdict
    assert top.tone == "bad"
    assert headline(Results(measured=[CASE])).tone == "good"
