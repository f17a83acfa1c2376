"""Tables for people: columns line up, nothing is invented where there is no number."""

from dflash.report.text import category_table, speedup_table, step_table

CASE = {
    "case": "block-b8-n64-a7",
    "accept_len_mean": 7.0,
    "block_size": 8,
    "tok_s_total": 123.456,
    "baseline_tok_s_total": 30.0,
    "speedup_x": 4.1152,
    "speedup_x_ci95": [4.0, 4.25],
    "predicted_speedup_x": 4.3,
    "status": "ok",
    "lossless": True,
}
BARE = {
    "case": "seq",
    "accept_len_mean": None,
    "block_size": 16,
    "tok_s_total": None,
    "baseline_tok_s_total": None,
    "speedup_x": None,
    "speedup_x_ci95": None,
    "status": "no-baseline",
    "lossless": None,
}
STEP = {
    "step_ms": 30.0,
    "verify_ms": {"2": 31.5, "8": 42.0},
    "draft_ms": {"8": 15.0},
    "floor_ms": {"1": 20.0, "2": 20.0, "8": 21.0},
    "device_kind": "cpu",
    "dtype": "float32",
    "batch_size": 1,
    "context": 128,
    "bandwidth_gb_s": 31.04,
    "kernels": "XLA: no C++ compiler found",
}


def test_speedup_table():
    assert speedup_table([CASE, BARE]) == [
        "case             accepted  of  tok/s  greedy  speed-up  95% interval  predicted       verdict",
        "---------------  --------  --  -----  ------  --------  ------------  ---------  ------------",
        "block-b8-n64-a7      7.00   7  123.5    30.0     4.12x  4.00 to 4.25       4.30  ok, lossless",
        "seq                   n/a  15    n/a     n/a       n/a           n/a        n/a   no-baseline",
    ]


def test_a_case_that_differs_is_not_called_lossless():
    line = speedup_table([CASE | {"status": "invalid", "lossless": False}])[-1]
    assert line.endswith("  invalid")
    assert "lossless" not in line


def test_columns_widen_with_their_cells():
    lines = speedup_table([CASE | {"case": "x" * 40, "tok_s_total": 1234567.8}, BARE])
    assert len(set(map(len, lines))) == 1
    assert "1234567.8" in lines[2]


def test_step_table():
    assert step_table(STEP) == [
        "cpu, float32, batch 1, context 128; memory read at 31.0 GB/s; computed by XLA: no C++ compiler found",
        "step           ms  / T_1  floor ms  / floor  break-even acceptance_length",
        "-----------  ----  -----  --------  -------  ----------------------------",
        "T_1          30.0   1.00      20.0     1.50",
        "T_verify(2)  31.5   1.05      20.0     1.57",
        "T_verify(8)  42.0   1.40      21.0     2.00",
        "T_draft(8)   15.0   0.50                                             1.90",
    ]


def test_acceptance_has_a_line_for_each_category_and_one_for_all():
    code = {"num_prompts": 2, "num_drafts": 10, "acceptance_length": 2.5, "accept_rate_per_pos": [0.9, 0.6]}
    chat = {"num_prompts": 1, "num_drafts": 0, "acceptance_length": None, "accept_rate_per_pos": None}
    overall = {"num_drafts": 10, "acceptance_length": 2.5, "accept_rate_per_pos": [0.9, 0.6]}
    lines = category_table({**overall, "by_category": {"code": code, "chat": chat}})
    assert [line.split() for line in lines[2:]] == [
        ["code", "2", "10", "2.50", "0.90", "0.60"],
        ["chat", "1", "0", "n/a"],
        ["all", "3", "10", "2.50", "0.90", "0.60"],
    ]
