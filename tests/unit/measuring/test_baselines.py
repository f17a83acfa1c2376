"""Cases held to baselines: each verdict, its sentence and the run's exit code, on canned figures and a real pytest."""

import json
import math
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import sample_runs

from dflash.measuring.baselines import (
    BaselineError,
    baseline_of,
    baseline_path,
    close_run,
    judge,
    read_baselines,
    updated,
    workload,
    write_baselines,
)
from dflash.measuring.result import AuditResult, CaseVerdict, Served, TokenPlace, from_json

pytest_plugins = ["pytester"]
ROOT = Path(__file__).parents[3]
DEVICE = "TPU v5e"
CASE = sample_runs.case(
    case="block-b8-n256-draft",
    device_kind=DEVICE,
    platform="tpu",
    workload_version=1,
    target_sha256="ab",
    prompts="builtin",
    prompts_sha256="cd",
    num_prompts=4,
    prompt_len=40,
    batch_size=1,
    dtype="bfloat16",
    mode="cached_block_verify",
    block_size=8,
    max_new_tokens=256,
    cpu_count=8,
    cpu_model="abacus",
    status="ok",
    lossless=True,
    first_divergence=None,
    speedup_x=3.1,
    speedup_x_ci95=(2.4, 4.0),
    speedup_x_timing_ci95=(3.07, 3.13),
    acceptance_length=5.9,
    accept_rate=0.7,
    verify_ratio=1.4,
    verify_ratio_ci95=(1.38, 1.42),
    draft_ratio=0.5,
)
HELD = {CASE.case: baseline_of(CASE)}


def figures(speedup=3.1, **others):
    changes = {"speedup_x": speedup, "speedup_x_timing_ci95": (speedup - 0.06, speedup + 0.07)}
    return replace(CASE, **changes | others)


# ---- one case


def test_a_case_passes_its_own_baseline():
    assert (judge(CASE, HELD).verdict, judge(CASE, HELD).sentence) == ("pass", "")


def test_floors_are_the_tolerance_or_the_interval_below_the_reference():
    held = baseline_of(CASE, 0.005)
    assert held["speedup_x"] == {"reference": 3.1, "floor": 3.07}
    assert held["acceptance_length"] == {"reference": 5.9, "floor": 5.8705}
    assert held["verify_ratio"] == {"reference": 1.4, "ceiling": 1.42}
    assert held["draft_ratio"] == {"reference": 0.5}
    wide = baseline_of(CASE, 0.1)
    assert (wide["speedup_x"]["floor"], wide["verify_ratio"]["ceiling"]) == pytest.approx((2.79, 1.54))


def test_a_slower_verify_step_is_named():
    now = figures(2.61, speedup_x_timing_ci95=[2.55, 2.68], verify_ratio=1.596, verify_ratio_ci95=[1.57, 1.62])
    held = {CASE.case: HELD[CASE.case] | {"speedup_x": {"reference": 3.1, "floor": 2.8}}}
    told = judge(now, held)
    assert told.verdict == "fail"
    assert re.match(
        r"speedup_x 2\.61 \(2\.55 to 2\.68\) < 2\.80, verify_ratio 1\.60 .*> 1\.42 on TPU v5e; ", told.sentence
    )
    assert re.search(r"acceptance unchanged, verify step \+14%, draft step unchanged$", told.sentence)


def test_a_worse_draft_is_named():
    told = judge(figures(2.7, acceptance_length=5.0, accept_rate=0.57), HELD)
    for part in ("speedup_x 2.70 (2.64 to 2.77) < 3.07", "acceptance_length 5.00 < 5.84", "accept_rate 0.57 < 0.69"):
        assert part in told.sentence
    assert re.search("acceptance -15%, verify step unchanged, draft step unchanged$", told.sentence)


def test_a_slower_draft_step_is_named():
    assert judge(figures(2.7, draft_ratio=0.8), HELD).sentence.endswith("verify step unchanged, draft step +60%")


def test_a_slower_loop_is_named():
    assert judge(figures(2.7), HELD).sentence.endswith("the loop around the steps moved")


def test_the_upper_end_is_judged():
    assert judge(figures(2.9, speedup_x_timing_ci95=[2.7, 3.08]), HELD).verdict == "pass"
    assert judge(figures(2.9, speedup_x_timing_ci95=[2.7, 3.06]), HELD).verdict == "fail"
    assert judge(figures(verify_ratio=1.5, verify_ratio_ci95=[1.41, 1.59]), HELD).verdict == "pass"


def test_other_prompts_widen_no_gate():
    """The interval by prompt is that of prompts like these; the baseline is of these."""
    assert judge(figures(2.7, speedup_x_ci95=[1.0, 9.0]), HELD).verdict == "fail"


def test_an_unexplained_speed_up_is_judged_all_the_same():
    far = {"status": "unexplained", "residual": -0.2, "predicted_speedup_x": 3.9}
    assert judge(figures(**far), HELD).verdict == "pass"
    assert judge(figures(2.7, **far), HELD).verdict == "fail"


def test_noise_hides_a_speed_up_and_not_what_is_counted_or_timed_by_itself():
    noisy = {"status": "too-noisy", "too_noisy": "its rounds differ by 30%"}
    assert judge(figures(0.5, **noisy), HELD).verdict == "invalid"
    worse = judge(figures(9.0, **noisy, acceptance_length=2.0), HELD)
    assert worse.verdict == "fail"
    assert "acceptance_length 2.00 <" in worse.sentence
    slower = judge(figures(9.0, **noisy, verify_ratio=9.0, verify_ratio_ci95=[8.0, 10.0]), HELD)
    assert (slower.verdict, "verify_ratio 9.00 (8.00 to 10.00) >" in slower.sentence) == ("fail", True)
    assert judge(figures(9.0, **noisy, acceptance_length=2.0), {}).verdict == "invalid"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"status": "too-noisy", "too_noisy": "its rounds differ by 30%"}, "its rounds differ by 30%"),
        ({"status": "quick", "speedup_x_ci95": None}, "speedup_x is without an interval"),
        ({"status": "no-baseline", "lossless": None}, "greedy decoding must run beside it"),
        (
            {"status": "invalid", "lossless": False, "first_divergence": TokenPlace(prompt=0, token=3)},
            "differ first at",
        ),
        ({"status": "invalid", "speedup_x": None}, "no block was needed"),
        ({"acceptance_length": None, "accept_rate": math.nan}, "acceptance_length, accept_rate must be measured"),
    ],
    ids=["noise", "quick", "greedy", "tokens", "nothing", "nan"],
)
def test_what_is_in_doubt_is_invalid_however_good(changes, said):
    told = judge(figures(9.0, **changes), HELD)
    assert told.verdict == "invalid"
    assert said in told.sentence


def test_missing_baselines():
    assert judge(CASE, None).verdict == judge(CASE, {}).verdict == "no-baseline"
    assert re.match("no baseline for any .*on TPU v5e: --update-baselines", judge(CASE, None).sentence)
    assert "for this case" in judge(CASE, {}).sentence


@pytest.mark.parametrize(("name", "value"), [("workload_version", 2), ("prompts_sha256", "ef"), ("batch_size", 8)])
def test_another_workload_is_no_baseline(name, value):
    told = judge(figures(0.1, **{name: value}), HELD)
    assert told.verdict == "no-baseline"
    assert f"{name} was {getattr(CASE, name)}, is {value}" in told.sentence


def test_each_mesh_has_a_baseline_of_its_own(tmp_path):
    cases = [figures(speed, mesh=mesh) for speed, mesh in ((3.1, {"dp": 1, "tp": 1}), (5.2, {"dp": 1, "tp": 8}))]
    cases.append(figures(4.1, mesh={"dp": 2, "tp": 4}))
    for case in cases:
        close_run([case], tmp_path, update=True)
    names = [CASE.case, f"{CASE.case}@dp2-tp4", f"{CASE.case}@tp8"]
    assert sorted(read_baselines(tmp_path, DEVICE)) == names
    gates = [close_run([case], tmp_path, require=True) for case in cases]
    assert [gate.failed for gate in gates] == [False] * 3
    assert close_run([figures(4.1, mesh={"dp": 1, "tp": 8})], tmp_path).verdicts[0].verdict == "fail"
    assert close_run([figures(mesh={"dp": 1, "tp": 2})], tmp_path).verdicts[0].verdict == "no-baseline"


def test_another_draft_is_the_same_workload():
    assert judge(figures(2.0, draft_sha256="other"), HELD).verdict == "fail"


def test_cpus_are_told_apart_by_their_number():
    assert "cpu_count" not in workload(CASE)
    on_cpu = workload(replace(CASE, platform="cpu"))
    assert (on_cpu["cpu_count"], on_cpu["cpu_model"]) == (8, "abacus")


# ---- the file


def test_a_file_is_read_as_it_was_written(tmp_path):
    path = write_baselines(tmp_path / "new", DEVICE, HELD)
    assert path == baseline_path(tmp_path / "new", DEVICE)
    assert path.name == "TPU-v5e.json"
    assert read_baselines(tmp_path / "new", DEVICE) == HELD
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert read_baselines(tmp_path / "new", "cpu") is None


def spoilt(**changes):
    return json.dumps({"schema_version": 1, "device_kind": DEVICE, "cases": HELD} | changes)


def with_figure(**figure):
    return spoilt(cases={"a": {"workload": {}, **figure}})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is no valid JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "must hold `cases`"),
        (spoilt(schema_version=2), "schema_version must be 1, got 2"),
        (spoilt(device_kind="TPU v4"), "device 'TPU v4', this run is on 'TPU v5e'"),
        (spoilt(cases={"a": {}}), "a: needs a `workload`"),
        (
            with_figure(speedup_x={"reference": math.nan, "floor": 2.0}),
            "NaN is no JSON",
        ),
        (with_figure(speedup_x={"reference": 3.0, "floor": "2"}), "a: speedup_x floor .*got '2'"),
        (with_figure(draft_ratio={"reference": 0}), "a: draft_ratio reference .*from 1e-09 .*got 0"),
        (with_figure(speedup_x={"reference": -1e300}), r"a: speedup_x reference .*got -1e\+300"),
        (
            with_figure(speedup_x={"reference": 3.0, "between_runs": -900.0, "runs": 3}),
            "between_runs .*got -900.0 from 3",
        ),
        (with_figure(speedup_x={"reference": 3.0, "between_runs": 0.1, "runs": 2.5}), "between_runs .*from 2.5"),
        (with_figure(speedup_x={"reference": 3.0, "ceiling": 2.0}), "a: speedup_x takes reference and floor"),
        (with_figure(verify_ratio={"ceiling": 2.0}), "a: verify_ratio takes reference and ceiling"),
        (with_figure(speed={"reference": 3.0}), "a: speed is none of speedup_x, "),
    ],
)
def test_spoilt_files_are_refused(tmp_path, text, said):
    baseline_path(tmp_path, DEVICE).write_text(text)
    with pytest.raises(BaselineError) as error:
        read_baselines(tmp_path, DEVICE)
    assert re.search(said, str(error.value))
    gate = close_run([CASE], tmp_path)
    assert (gate.lines, gate.failed) == ([str(error.value)], True)
    assert gate.result.cases == [CaseVerdict(case=CASE.case, verdict="invalid", sentence=str(error.value))]
    # Nothing is written over what can't be read.
    assert close_run([CASE], tmp_path, update=True).failed
    assert baseline_path(tmp_path, DEVICE).read_text() == text


def test_what_a_server_reached_is_held_to_nothing_and_written_nowhere(tmp_path):
    """Its device is unknown here."""
    served = Served(**vars(replace(CASE, mode="served", device_kind="vllm server")))
    assert close_run([served], tmp_path) == close_run([], tmp_path)
    assert close_run([served], tmp_path, require=True).failed
    assert close_run([served], tmp_path, update=True).failed
    assert not list(tmp_path.iterdir())
    close_run([served, CASE], tmp_path, update=True)
    assert [p.name for p in tmp_path.glob("*.json")] == [baseline_path(tmp_path, DEVICE).name]


def test_all_faults_of_a_file_are_in_one_error(tmp_path):
    baseline_path(tmp_path, DEVICE).write_text(spoilt(schema_version=2, cases={"a": {}, "b": {"workload": 1}}))
    with pytest.raises(BaselineError, match=r"schema_version .*got 2; a: .*workload.*; b: .*workload"):
        read_baselines(tmp_path, DEVICE)


def test_what_an_update_changes():
    new, said = updated([CASE], None)
    assert new == HELD
    (line,) = said
    assert line.startswith("block-b8-n256-draft: new, ")
    for part in ("speedup_x 3.10 (floor 3.07)", "verify_ratio 1.40 (ceiling 1.42)", "draft_ratio 0.50"):
        assert part in line
    slower = figures(2.7, batch_size=2, accept_rate=None)
    newer, said = updated([slower, replace(CASE, case="other", status="quick")], new | {"kept": new[CASE.case]})
    assert set(newer) == {CASE.case, "kept"}
    assert newer[CASE.case]["speedup_x"]["reference"] == 2.7
    assert "accept_rate" not in newer[CASE.case]
    assert said[0].startswith("block-b8-n256-draft: another workload, speedup_x 3.10 -> 2.70 (floor 2.64), ")
    assert re.match("other: not written, speedup_x .*without an interval.* 3 rounds", said[1])


def test_a_run_of_doubts_writes_nothing(tmp_path):
    gate = close_run([replace(CASE, status="quick")], tmp_path, update=True)
    assert not gate.failed
    assert gate.result is None  # nothing was held to a baseline
    assert "not written" in gate.lines[0]
    assert not any(tmp_path.glob("*.json"))


# ---- a run of pytest


RECORDS = """from dflash.decoding.audit import Divergence
from dflash.decoding.parity import Spread
from dflash.measuring.result import *"""
MEASURED = "def test_case(results, i):\n    CASES and results.measured.append(CASES[i])\n"


@pytest.fixture
def session(pytester, tmp_path, monkeypatch):
    """Runs pytest with this project's conftest.py on canned cases, held to these baselines: result and its text."""
    for name in ("conftest.py", "pytest.ini"):
        (pytester.path / name).write_text((ROOT / name).read_text())
    write_baselines(tmp_path / "held", DEVICE, HELD)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # it switches benchmarks off, also in a run of its own

    def run(cases, *options, before="", body=MEASURED):
        head = f"from math import nan\nimport pytest\n{RECORDS}\nCASES = {cases!r}\n"
        head += f"@pytest.mark.parametrize('i', range({max(1, len(cases))}))\n{before}\n"
        (pytester.path / "tests").mkdir(exist_ok=True)
        (pytester.path / "tests" / "test_canned.py").write_text(head + body)
        result = pytester.runpytest_inprocess("-p", "no:cacheprovider", f"--baselines={tmp_path / 'held'}", *options)
        text = result.stdout.str() + result.stderr.str()
        assert "Traceback" not in text
        assert "INTERNALERROR" not in text
        return result.ret, text

    return run


# What the summary's table asks of a case.
SHOWN = {"accept_len_mean": 4.9, "tok_s_total": 310.0, "baseline_tok_s_total": 100.0, "predicted_speedup_x": 3.1}


def shown(**changes):
    return replace(CASE, **SHOWN | changes)


def slow():
    return figures(2.7, **SHOWN)


@pytest.mark.parametrize(
    ("cases", "status", "strict", "said"),
    [
        ([shown()], 0, 0, "pass: 1 of 1 cases"),
        ([shown(), slow()], 1, 1, "fail: block-b8-n256-draft: speedup_x 2.70 (2.64 to 2.77) < 3.07"),
        ([shown(case="new")], 0, 1, "no-baseline: new: "),
        (
            [shown(case="a", device_kind="cpu"), shown(case="b", device_kind="cpu")],
            0,
            1,
            "no-baseline: a, b: ",
        ),
        ([shown(workload_version=2)], 0, 1, "workload_version was 1, is 2"),
        ([shown(acceptance_length=math.nan)], 0, 1, "invalid: block-b8-n256-draft: acceptance_length must be measured"),
        (
            [shown(status="too-noisy", too_noisy="it drifted")],
            0,
            1,
            "invalid: block-b8-n256-draft: speedup_x is too noisy: ",
        ),
        ([], 0, 1, ""),
    ],
    ids=["pass", "fail", "missing", "other-device", "other-workload", "nan", "noisy", "nothing-measured"],
)
def test_exit_codes(session, cases, status, strict, said):
    assert session(cases)[0] == status
    code, text = session(cases, "--require-baseline")
    assert (code, said in text) == (strict, True), text
    if not cases:
        assert "--require-baseline: no case was measured" in text


def test_nothing_selected_and_everything_skipped(session):
    assert session([shown()], "-k", "nowhere")[0] == 5
    code, text = session([shown()], "-k", "nowhere", "--require-baseline")
    assert (code, "--require-baseline: no case was measured" in text) == (1, True)
    skip = "@pytest.mark.skip(reason='no device')"
    assert session([shown()], before=skip)[0] == 0
    code, text = session([shown()], "--require-baseline", before=skip)
    assert (code, "--require-baseline: no case was measured" in text) == (1, True)


def test_listing_asks_for_no_baseline(session):
    assert session([slow()], "--co", "-q", "--require-baseline")[0] == 0


def test_an_update_is_what_the_next_run_is_held_to(session, tmp_path):
    code, text = session([slow()], "--update-baselines", "--tolerance=0.2")
    assert code == 0
    assert "block-b8-n256-draft: speedup_x 3.10 -> 2.70 (floor 2.16)" in text
    assert f"written: {baseline_path(tmp_path / 'held', DEVICE)}" in text
    assert session([slow()], "--require-baseline")[0] == 0
    assert session([], "--update-baselines")[0] == 1


AUDIT = from_json(sample_runs.audit(), AuditResult)
SAVED = f"""@pytest.mark.benchmark(group="decode")
def test_case(benchmark, results, i):
    benchmark.extra_info.update(to_json(CASES[i]))
    benchmark(int)
    results.measured.append(CASES[i])
    results.audits.append({AUDIT!r})
"""


def test_a_failed_gate_leaves_a_file_and_a_report_that_say_so(session, tmp_path):
    """The verdicts are known before pytest-benchmark writes its file, and stand in it."""
    case, out = sample_runs.case(proposer="a7", scripted=7), tmp_path / "out"
    code, text = session([case], "--require-baseline", f"--report={out}", body=SAVED)
    assert code == 1
    (audited,) = [line for line in text.splitlines() if line.startswith("smollm2-135m ")]
    assert "288" in audited
    assert audited.endswith("lossless up to near ties")
    told = json.loads((out / "latest.json").read_text())["dflash"]
    assert told["gate"]["failed"]
    assert [(v["case"], v["verdict"]) for v in told["gate"]["cases"]] == [(case.case, "no-baseline")]
    assert [from_json(audit, AuditResult) for audit in told["audits"]] == [AUDIT]
    page = (out / "report.md").read_text()
    assert "no baseline for any" in page
    assert "The audit of decoding" in page


def _add_cases(directory, start, number):
    start.wait()
    for i in range(10):
        close_run([replace(CASE, case=f"case-{number}-{i}")], directory, update=True)


def test_runs_that_write_at_once_lose_no_case_of_each_other(tmp_path):
    start = threading.Barrier(4)
    writers = [threading.Thread(target=_add_cases, args=(tmp_path, start, n)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(read_baselines(tmp_path, CASE.device_kind)) == 40


def test_a_directory_that_can_not_be_written_is_one_sentence(tmp_path):
    file = tmp_path / "file"
    file.touch()
    gate = close_run([CASE], file / "baselines", update=True)
    assert gate.failed
    assert "--baselines DIR" in gate.lines[0]
