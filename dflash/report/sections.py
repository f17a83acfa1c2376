"""What the page says of a run, in words and tables: one data model, from which HTML and Markdown are written."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from dflash.report.compare import Change, commit, compare, other_facts
from dflash.report.run import Info, Run, is_own
from dflash.report.text import gate_line, number


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Cells are text. `verdict` is the column whose cells are judged: HTML colours it. `prose`: words, no figures."""

    header: list[str]
    rows: list[list[str]]
    verdict: int | None = None
    prose: bool = False


@dataclasses.dataclass(kw_only=True, slots=True)
class Section:
    """A heading with sentences, tables and (filled in by the page) plots."""

    key: str
    title: str
    sentences: list[str] = dataclasses.field(default_factory=list)
    tables: list[Table] = dataclasses.field(default_factory=list)
    plots: list[Any] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Headline:
    """The figure to remember, what it is of, and whether to believe it. `tone` is good, bad or plain."""

    figure: str
    words: str
    verdict: str
    tone: str


def _interval(case: Info) -> str:
    ends = case.get("speedup_x_ci95")
    return f"{ends[0]:.2f} to {ends[1]:.2f}" if ends else "n/a"


def headline(run: Run) -> Headline:
    """The fastest block case of the draft itself; without one, the fastest of the others, which is said."""
    verdict, tone = _verdict(run)
    if run.gate:
        # What fails a run is said first.
        said, failed = [verdict, gate_line(run.gate)], run.gate["failed"]
        verdict, tone = " ".join(said[::-1] if failed else said), "bad" if failed else tone
    good = [c for c in run.decodes if c["speedup_x"] is not None and c["lossless"]]
    if not good:
        alone = (f"the target alone was measured, since {c['no_draft']}" for c in run.decodes if c.get("no_draft"))
        words = next(alone, "nothing was proven equal to greedy decoding")
        return Headline(figure="No speed-up", words=words, verdict=verdict, tone=tone)
    best = max(good, key=_rank)
    own, drafted = is_own(best), best.get("draft") or best["case"]
    who = f"the draft ({drafted})" if own else f"a scripted draft ({best['proposer']})"
    tokens = best["acceptance_length"]
    accepted = "" if tokens is None else f"{tokens:.2f} tokens a block of {best['block_size']}, "
    words = (
        f"the speed of greedy decoding on {best.get('device_kind', 'this device')} with {who}: 95% interval "
        f"{_interval(best)}, {accepted}case {best['case']}."
    )
    ceiling = max((c for c in good if not is_own(c)), key=_rank, default=best)
    if own and ceiling["speedup_x"] > best["speedup_x"]:
        words += (
            f" With {ceiling['accept_len_mean']:.0f} of {ceiling['block_size'] - 1} drafted tokens right this machine "
            f"reaches {ceiling['speedup_x']:.2f}×."
        )
    if best["status"] == "invalid":
        words += f" It is invalid: {best.get('too_noisy') or 'not to be believed'}."
    return Headline(figure=f"{best['speedup_x']:.2f}×", words=words, verdict=verdict, tone=tone)


def _rank(case: Info) -> tuple[bool, bool, bool, float]:
    return is_own(case), case["mode"] == "cached_block_verify", case["status"] != "invalid", case["speedup_x"]


def _verdict(run: Run) -> tuple[str, str]:
    cases = run.decodes
    if not cases and not run.failed:
        return "No case was decoded.", "bad"
    wrong = [c["case"] for c in cases if c["lossless"] is False]
    proven = sum(bool(c["lossless"]) for c in cases)
    said = f"Lossless in {proven} of {len(cases)} cases: every token equal to greedy's in every round."
    if wrong:
        said = f"NOT LOSSLESS in {', '.join(wrong)}: tokens differ from greedy's. " + said
    doubtful = [c for c in cases if c["status"] != "ok" and c["lossless"] is not False]
    if doubtful:
        said += f" Not ok: {_named_or_counted(doubtful)}."
    if run.failed:
        said += f" {len(run.failed)} more could not be measured."
    if wrong or run.failed or any(c["status"] == "invalid" for c in doubtful):
        return said, "bad"
    return said, "plain" if doubtful else "good"


def _named_or_counted(cases: Sequence[Info]) -> str:
    """Cases with their status; of many, how many have which."""
    if len(cases) <= 3:
        return ", ".join(f"{c['case']} ({c['status']})" for c in cases)
    states = [c["status"] for c in cases]
    return ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))


def _status(case: Info) -> str:
    return str(case["status"]) + (", lossless" if case["lossless"] else "")


def speedup_section(run: Run) -> Section:
    header = ["case", "accepted", "tok/s", "greedy", "speed-up", "95% interval", "predicted", "verdict"]
    rows = [
        [
            c["case"],
            "n/a" if c["block_size"] is None else f"{number(c['accept_len_mean'])} of {c['block_size'] - 1}",
            number(c["tok_s_total"], 1),
            number(c["baseline_tok_s_total"], 1),
            "n/a" if c["speedup_x"] is None else f"{c['speedup_x']:.2f}×",
            _interval(c),
            number(c.get("predicted_speedup_x")),
            _status(c),
        ]
        for c in run.decodes
    ]
    section = Section(key="speedup", title="Speed-up over greedy decoding")
    if rows:
        section.tables = [Table(header=header, rows=rows, verdict=7)]
        if any(c["mode"] != "served" for c in run.decodes):
            section.sentences = [
                "Greedy decoding and DFlash run in turn, round by round; both clocks start after prefill. A case named "
                "a3, a7, ... is scripted: it costs what the draft costs and is right for that many tokens, which shows "
                "the machine and no draft."
            ]
        if any(c["mode"] == "served" for c in run.decodes):
            section.sentences.append(
                "A case named served-... was asked of a server over HTTP, without a draft and with one: its clocks run "
                "over whole rounds, with prefill, queue and transport."
            )
        own = [c for c in run.decodes if is_own(c) and c.get("proposer") and c.get("draft")]
        drafts = {c["proposer"]: c["draft"] for c in own}
        if len(drafts) > 1:
            section.sentences.append("; ".join(f"{name} is {draft}" for name, draft in drafts.items()) + ".")
        section.sentences += [
            f"{c['case']}: {c['residual']}" for c in run.decodes if isinstance(c.get("residual"), str)
        ]
        remarks = [[c["case"], remark] for c in run.decodes if (remark := _remark(c))]
        if remarks:
            section.tables.append(Table(header=["case", "remark"], rows=remarks, prose=True))
    if run.failed:
        failed = [[c["case"], c["error"], c["status"]] for c in run.failed]
        section.tables.append(Table(header=["case", "why it has no figures", "verdict"], rows=failed, verdict=2))
    return section


def _remark(case: Info) -> str | None:
    """What doubts a case, then what the cost model advises for a draft's own."""
    said = []
    if case.get("no_draft"):
        said.append(f"the target alone was measured, since {case['no_draft']}")
    elif case.get("acceptance_unknown"):
        said.append(f"what is accepted is unknown: {case['acceptance_unknown']}")
    if case.get("too_noisy"):
        said.append(f"too noisy: {case['too_noisy']}")
    if case["status"] == "unexplained" and case.get("residual") is not None:
        said.append(f"{case['residual']:+.0%} off what its steps predict, which is unexplained")
    advice = case.get("advice")
    if advice and is_own(case):
        best, gain = advice["best_block_size"], advice["best_predicted_speedup_x"]
        said.append(
            f"on this device a block of {best} is best, {gain:.2f}× predicted"
            if best > 1
            else "no block size is predicted to beat greedy decoding here"
        )
    if case.get("experts_awake_verify") is not None:
        said.append(
            f"{case['experts_awake_verify']:.1f} of {case['experts']} experts awake in a verify step, "
            f"{case['experts_awake_verify_expected']:.1f} expected"
        )
    return "; ".join(said) or None


def acceptance_section(run: Run) -> Section:
    section = Section(key="acceptance", title="What is accepted")
    own = [c for c in run.decodes if is_own(c) and c["accept_len_mean"] is not None] + run.acceptances
    if own:
        rows = [
            [
                i["case"],
                number(i["acceptance_length"]),
                number(i["accept_len_mean"]),
                number(i["accept_rate"], 3),
                str(i["num_drafts"]),
            ]
            for i in own
            if i.get("acceptance_length") is not None
        ]
        header = ["case", "tokens a block", "drafted", "accept rate", "blocks"]
        section.tables = [Table(header=header, rows=rows)]
    for info in run.acceptances:
        if info.get("by_category"):
            section.tables.append(_by_category(info["by_category"]))
        if "live_acceptance_length" in info:
            section.sentences.append(
                f"{info['case']}: walked as live decoding walks, {info['live_acceptance_length']:.2f} tokens a block; "
                f"at every anchor, {info['acceptance_length']:.2f}."
            )
    return section


def _by_category(kinds: dict[str, Info]) -> Table:
    rows = [
        [n, number(b.get("acceptance_length")), number(b.get("accept_rate"), 3), f"{b.get('num_prompts', 'n/a')}"]
        for n, b in kinds.items()
    ]
    return Table(header=["kind of prompt", "tokens a block", "accept rate", "prompts"], rows=rows)


def cost_section(run: Run) -> Section:
    section = Section(key="cost", title="What a step costs")
    for s in run.steps:
        one, floors = s["step_ms"], s["floor_ms"]
        rows = [["T_1", number(one), "1.00", number(floors.get("1")), ""]]
        rows += [
            [f"T_verify({n})", number(ms), number(ms / one), number(floors.get(n)), ""]
            for n, ms in s["verify_ms"].items()
        ]
        for n, ms in s["draft_ms"].items():
            verify = s["verify_ms"].get(n)
            even = None if verify is None else (verify + ms) / one
            rows.append([f"T_draft({n})", number(ms), number(ms / one), "", number(even)])
        section.tables.append(Table(header=["step", "ms", "in T_1", "floor, ms", "breaks even at"], rows=rows))
        section.sentences.append(
            f"Batch {s['batch_size']}, context {s['context']}, {s['dtype']}; memory was read at "
            f"{s['bandwidth_gb_s']:.1f} GB/s. DFlash breaks even at the acceptance length in the last column."
        )
    for t in run.trainings:
        section.sentences.append(
            f"Training ({t['case']}, {t['dtype']}): {t['step_s']:.2f} s a step, {t['draft_tokens_per_s']:.0f} drafted "
            f"tokens a second, {100 * t['matmul_fraction']:.0f}% of the machine's rate of matrix products."
        )
    if run.peers:
        rows = [[p["case"], f"{p['faster_x']:.2f}×", "{:.2f} to {:.2f}".format(*p["faster_x_ci95"])] for p in run.peers]
        section.tables.append(Table(header=["beside other implementations", "faster", "95% interval"], rows=rows))
    return section


def change_section(old: Run, new: Run) -> Section:
    """The difference to one older run."""
    section = Section(key="change", title=f"Change since {old.short_when} UTC")
    changes = compare(old, new)
    words = [c.verdict for c in changes]
    section.sentences = [
        f"Of {len(changes)} cases {words.count('faster')} are faster, {words.count('slower')} slower, "
        f"{words.count('no significant change')} without a significant change. Significant: p < 5% after Holm's "
        "correction. A speed-up is a ratio within its run, so a slower machine alone moves none."
    ]
    header = ["case", "before", "now", "now / before", "95% interval", "tokens a block", "cost of a block", "verdict"]
    section.tables = [Table(header=header, rows=[_change_row(c) for c in changes], verdict=7)]
    facts = other_facts(old, new)
    if facts:
        section.tables.append(Table(header=["also different", "before", "now"], rows=[list(f) for f in facts]))
    return section


def _change_row(change: Change) -> list[str]:
    a, b = change.old or {}, change.new or {}
    interval = "{:.2f} to {:.2f}".format(*change.interval) if change.interval else "n/a"

    def pair(key: str) -> str:
        before, now = number(a.get(key)), number(b.get(key))
        return before if before == now else f"{before} → {now}"

    p = "" if change.p is None else f", p {change.p:.3f}" if change.p >= 0.001 else ", p < 0.001"
    return [
        change.case,
        number(a.get("speedup_x")),
        number(b.get("speedup_x")),
        number(change.ratio, 3),
        interval,
        pair("acceptance_length"),
        pair("block_ratio"),
        change.verdict + p,
    ]


def history_section(left_out: Sequence[str]) -> Section:
    """`left_out` are sentences on runs that can't be drawn with the others."""
    return Section(key="history", title="Over the runs", sentences=list(left_out))


def origin_section(run: Run) -> Section:
    """Environment, hashes, and the command that makes it again."""
    measured = run.decodes + run.steps + run.acceptances + run.trainings + run.peers
    told, first = run.provenance, (measured + run.failed)[0]
    cpu = (run.machine.get("cpu") or {}).get("brand_raw")
    facts: dict[str, Any] = {
        "measured": f"{run.short_when} UTC",
        "commit": commit(run),
        "command": " ".join(told.get("command") or []) or None,
    }
    facts |= told.get("device") or {k: first.get(k) for k in ("platform", "device_kind", "device_count", "kernels")}
    facts |= {"processor": cpu, "system": f"{run.machine.get('system', '')} {run.machine.get('release', '')}".strip()}
    facts |= told.get("read") or {
        k: first.get(k) for k in ("target", "target_sha256", "draft", "draft_sha256", "prompts", "prompts_sha256")
    }
    facts |= {"compile cache": told.get("compile_cache"), "seeds": told.get("seeds")} | (told.get("flags") or {})
    versions = told.get("versions") or {"jax": first.get("jax")}
    facts |= {"versions": ", ".join(f"{n} {v}" for n, v in versions.items() if v)}
    facts |= {"python": run.machine.get("python_version"), "schema version": told.get("schema_version")}
    rows = [
        [n if n.isupper() else n.replace("_", " "), _told(v)] for n, v in facts.items() if v not in (None, "", [], {})
    ]
    section = Section(
        key="origin", title="Where this comes from", tables=[Table(header=["fact", "value"], rows=rows, prose=True)]
    )
    if not told:
        section.sentences = ["The file is older than its provenance: what it does not say is not shown."]
    return section


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
