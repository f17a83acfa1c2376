"""Tables for people: the speed-ups of a run, and the terms that explain them. Text only, no jax."""

from collections.abc import Sequence
from typing import Any


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as they must be; the first is flush left, the others right."""
    widths = [max(len(r[i]) for r in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        rest = (c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))
        return "  ".join([cells[0].ljust(widths[0]), *rest]).rstrip()

    return [line(header), line(["-" * w for w in widths]), *map(line, rows)]


def number(value: float | None, digits: int = 2) -> str:
    """A figure for people; n/a where there is none."""
    return "n/a" if value is None else f"{value:.{digits}f}"


def _lossless(case: dict[str, Any]) -> str:
    ties = case.get("near_ties")
    return f", lossless up to {ties} near tie{'s' * (ties > 1)}" if ties else ", lossless"


def speedup_table(cases: Sequence[dict[str, Any]]) -> list[str]:
    """One line a case: what was accepted, how fast both were, the speed-up and its interval, what the terms predict."""
    header = ["case", "accepted", "of", "tok/s", "greedy", "speed-up", "95% interval", "predicted", "verdict"]
    rows = []
    for c in cases:
        interval = c["speedup_x_ci95"]
        rows.append(
            [
                c["case"],
                number(c["accept_len_mean"]),
                "n/a" if c["block_size"] is None else str(c["block_size"] - 1),
                number(c["tok_s_total"], 1),
                number(c["baseline_tok_s_total"], 1),
                number(c["speedup_x"]) + ("x" if c["speedup_x"] is not None else ""),
                "n/a" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}",
                number(c.get("predicted_speedup_x")),
                c["status"] + (_lossless(c) if c["lossless"] else ""),
            ]
        )
    return _table(header, rows)


def step_table(info: dict[str, Any]) -> list[str]:
    """The terms beside the floor (bytes of weights over measured bandwidth), and what each block size needs."""
    one = info["step_ms"]
    rows = [["T_1", number(one, 1), "1.00", number(info["floor_ms"]["1"], 1), number(one / info["floor_ms"]["1"]), ""]]
    for size, ms in info["verify_ms"].items():
        floor = info["floor_ms"][size]
        rows.append([f"T_verify({size})", number(ms, 1), number(ms / one), number(floor, 1), number(ms / floor), ""])
    for size, ms in info["draft_ms"].items():
        need = (info["verify_ms"][size] + ms) / one
        rows.append([f"T_draft({size})", number(ms, 1), number(ms / one), "", "", number(need)])
    header = ["step", "ms", "/ T_1", "floor ms", "/ floor", "break-even acceptance_length"]
    facts = (
        f"{info['device_kind']}, {info['dtype']}, batch {info['batch_size']}, context {info['context']}; "
        f"memory read at {info['bandwidth_gb_s']:.1f} GB/s; "
        f"computed by {info['kernels']}"
    )
    return [facts, *_table(header, rows)]


def acceptance_table(summary: dict[str, Any]) -> list[str]:
    """An offline evaluation: what kind of rows, the means, acceptance by slot, and a line for each first position."""
    told = {"held_out": "held-out prompts", "train": "TRAINING rows: this says nothing of decoding", "all": "ALL rows"}
    facts = [
        f"{told[summary['rows']]}, {summary['num_samples']} blocks of {summary['block_size']}: accept_len "
        f"{summary['accept_len_mean']:.2f} (p50 {summary['accept_len_p50']:.0f}, p90 {summary['accept_len_p90']:.0f}, "
        f"p99 {summary['accept_len_p99']:.0f}) of {summary['block_size'] - 1}, token accuracy "
        f"{summary['token_acc_mean']:.3f}",
        "accepted up to slot 1, 2, ...: " + " ".join(f"{rate:.2f}" for rate in summary["accept_rate_per_pos"]),
    ]
    if "live_acceptance_length" in summary:
        facts.append(
            f"as live decoding would walk them: acceptance_length {summary['live_acceptance_length']:.2f} over "
            f"{summary['live_num_samples']} blocks"
        )
    rows = [
        [
            start,
            str(b["n"]),
            number(b["accept_len_mean"]),
            number(b["accept_len_p50"], 0),
            number(b["tok_acc_mean"], 3),
        ]
        for start, b in summary["by_ctx_pos_start"].items()
    ]
    return [*facts, *_table(["ctx_pos_start", "n", "accept_len", "p50", "token acc"], rows)]


def category_table(info: dict[str, Any]) -> list[str]:
    """Live acceptance for each category of prompts, and over all blocks of all of them."""
    rows = [
        [
            name,
            str(c["num_prompts"]),
            str(c["num_drafts"]),
            number(c["acceptance_length"]),
            " ".join(number(rate) for rate in c["accept_rate_per_pos"] or []),
        ]
        for name, c in [
            *info["by_category"].items(),
            ("all", info | {"num_prompts": sum(c["num_prompts"] for c in info["by_category"].values())}),
        ]
    ]
    return _table(["prompts", "number", "blocks", "acceptance_length", "accepted up to slot 1, 2, ..."], rows)


def training_lines(info: dict[str, Any]) -> list[str]:
    """A training step beside the machine's rate of matrix products, and what reading and writing a cache take."""
    return [
        f"{info['case']}, {info['dtype']}: {info['step_s']:.2f} s a step, {info['draft_tokens_per_s']:.0f} drafted "
        f"tokens/s; {info['gflop_s']:.0f} GFLOP/s of {info['matmul_gflop_s']:.0f} in one large product "
        f"({100 * info['matmul_fraction']:.0f}%)",
        f"a batch is read in {1000 * info['read_s']:.0f} ms; the cache is written at {info['cache_write_gb_s']:.2f} "
        f"GB/s, one large file at {info['disk_write_gb_s']:.2f}",
    ]


def gate_line(gate: dict[str, Any]) -> str:
    """How many cases have which verdict of the baselines."""
    verdicts = [case["verdict"] for case in gate["cases"]]
    return "Baselines: " + ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts)) + "."


def audit_lines(figures: dict[str, Any]) -> list[str]:
    """An audit: the verdict, what one-token steps and blocks round differently, and every divergence and defect."""
    parity = figures["parity"]
    size, layer = parity["block_size"], parity["first_layer"]
    begins = "no layer differs" if layer is None else f"layer {layer} is the first whose output differs"
    equal = "bitwise equal" if parity["bitwise_equal"] else "not bitwise equal"
    rows = [("logits", parity["logits"]), *((f"layer {i}", d) for i, d in enumerate(parity["layers"]))]
    sentences = [
        f"{case}, prompt {d['prompt']}, token {d['token']}: greedy {d['greedy_token']}, DFlash {d['dflash_token']}, "
        f"margin {d['margin']:.3g}, noise {d['noise']:.3g}: near tie"
        for case, divergences in figures["divergences"].items()
        for d in divergences
        if d["verdict"] == "near tie"
    ]
    return [
        f"{figures['verdict']}: {figures['tokens']} tokens of {figures['dtype']} decoding judged on "
        f"{figures['device_kind']}, {figures['near_ties']} near ties, {len(figures['defects'])} defects",
        f"one-token steps against blocks of {size} at {parity['positions']} positions: {equal}; {begins}; "
        f"{parity['flips']} argmax flips ({100 * parity['flip_rate']:.2f}%)",
        *_table(
            ["difference", "p99 ulps", "largest"],
            [[name, number(d["ulps_p99"]), number(d["ulps_max"])] for name, d in rows],
        ),
        *sentences,
        *(f"DEFECT: {said}" for said in figures["defects"]),
    ]
