"""Two runs side by side: noise is no change, a change is found, and what can't be compared is not."""

import dataclasses
import json

import numpy as np
import pytest
import sample_runs
from sample_runs import decode, file_of

from dflash.measuring.result import read_file
from dflash.report.compare import compare, other_facts


@pytest.fixture
def run(tmp_path):
    def read(benchmarks, **more):
        path = tmp_path / "run.json"
        path.write_text(json.dumps(file_of(benchmarks, **more)))
        return read_file(path)

    return read


def altered(benchmark, **changes):
    benchmark["extra_info"] |= changes
    return benchmark


def test_the_same_run_twice_is_no_change(run):
    changes = compare(run(sample_runs.sweep()), run(sample_runs.sweep()))
    assert len(changes) == 10
    assert {c.verdict for c in changes} == {"no significant change"}
    assert all(c.ratio == 1 and c.p == pytest.approx(1) and c.interval[0] < 1 < c.interval[1] for c in changes)


@pytest.mark.parametrize(("tilt", "verdict"), [(1.2, "faster"), (0.8, "slower"), (1.03, "no significant change")])
def test_a_change_beyond_the_noise_is_told(run, tilt, verdict):
    (change,) = compare(run([decode(spread=0.04)]), run([decode(spread=0.04, tilt=tilt)]))
    assert change.verdict == verdict
    assert change.ratio == pytest.approx(tilt)
    assert change.interval[0] < tilt < change.interval[1]


def test_many_cases_ask_for_more_evidence(run):
    """A change that one case shows at 3% is not believed when it is one of ten."""

    def cases(tilt):
        return [decode(8, batch, spread=0.05, tilt=tilt if batch == 1 else 1.0) for batch in range(1, 11)]

    one, many = (compare(run(cases(1.0)[:n]), run(cases(1.08)[:n])) for n in (1, 10))
    assert one[0].p == many[0].p < 0.05
    assert (one[0].verdict, many[0].verdict) == ("faster", "no significant change")


def test_equal_runs_are_seldom_called_different(run):
    """Intervals and speed-ups drawn from one truth: of 200 families of 5 equal cases at most 5% find a change."""
    rng, sigma, changed = np.random.default_rng(0), 0.03, 0
    plain = run([decode(8, batch) for batch in range(1, 6)])

    def drawn():
        cases = []
        for case, tilt in zip(plain.measured, np.exp(rng.normal(0, sigma, 5)), strict=True):
            x = case.speedup_x * tilt
            interval = (x * np.exp(-1.96 * sigma), x * np.exp(1.96 * sigma))
            cases.append(dataclasses.replace(case, speedup_x=x, speedup_x_ci95=interval))
        return dataclasses.replace(plain, measured=cases)

    for _ in range(200):
        changed += any(c.verdict in ("faster", "slower") for c in compare(drawn(), drawn()))
    assert changed <= 0.08 * 200  # 5% expected; three standard errors more would be 9.6%


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device_kind": "TPU v5e"}, "not comparable: other device_kind"),
        ({"prompts_sha256": "e" * 64, "dtype": "bfloat16"}, "not comparable: other prompts_sha256, dtype"),
        ({"cpu_model": "another"}, "not comparable: other cpu_model"),
        ({"status": "invalid", "lossless": False}, "not comparable: the newer is invalid"),
        ({"status": "no-baseline", "speedup_x": None}, "not comparable: the newer is no-baseline"),
    ],
)
def test_what_is_another_measurement_is_not_compared(run, changes, said):
    (change,) = compare(run([decode()]), run([altered(decode(), **changes)]))
    assert (change.verdict, change.ratio, change.p) == (said, None, None)


@pytest.mark.parametrize("changes", [{"rounds": 2}, {"speedup_x_ci95": None}, {"speedup_x_ci95": [2.0, 2.0]}])
def test_an_interval_that_is_none_judges_nothing(run, changes):
    (change,) = compare(run([decode()]), run([altered(decode(tilt=2.0), **changes)]))
    assert change.verdict.startswith("too few rounds")
    assert change.p is None
    assert change.ratio == pytest.approx(2.0)


def test_cases_of_one_run_only_are_named(run):
    changes = compare(run([decode(4), decode(8)]), run([decode(8), decode(16)]))
    assert {c.case: c.verdict for c in changes} == {
        "block-b8-n64-draft": "no significant change",
        "block-b16-n64-draft": "only in the newer run",
        "block-b4-n64-draft": "only in the older run",
    }


def test_a_case_that_failed_now_is_said(run):
    (change,) = compare(run([decode(batch_size=64)]), run([], failed=[sample_runs.failed()]))
    assert (change.case, change.verdict) == ("block-b8-n64-k64-draft", "failed")


def test_what_else_differs_is_told(run):
    git = {"commit": "f" * 40, "dirty": True}
    old, new = run([decode()]), run([decode()], git=git, versions={"jax": "0.9.2", "numpy": "2.4.0"})
    assert other_facts(old, old) == []
    assert other_facts(old, new) == [
        ("commit", "0123456789ab", "ffffffffffff and uncommitted changes"),
        ("version of jax", "0.10.2", "0.9.2"),
    ]
