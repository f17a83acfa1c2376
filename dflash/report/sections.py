"""What a run showed, in words and tables: one model of sections, which terminal, Markdown and HTML render."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from dflash.decoding.audit import NEAR_TIE
from dflash.decoding.modes import BLOCK, SEQUENTIAL
from dflash.measuring.cost_model import advice_line
from dflash.measuring.gate import UNBELIEVED, alarm_line, own_line, remark
from dflash.measuring.protocol import ZLAB
from dflash.measuring.result import (
    Acceptance,
    Accepted,
    AuditResult,
    Decode,
    GateResult,
    Offline,
    Peer,
    ResultFile,
    Results,
    Served,
    Step,
    Training,
    to_json,
)
from dflash.report.compare import Change, between_runs, commit, compare, other_facts

_ROWS = {"held_out": "held-out prompts", "train": "TRAINING rows: this says nothing of decoding", "all": "ALL rows"}


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

    def __bool__(self) -> bool:
        return bool(self.sentences or self.tables or self.plots)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Headline:
    """The figure to remember, what it measures, and whether to believe it. `tone` is good, bad or plain."""

    figure: str
    words: str
    verdict: str
    tone: str


def number(value: float | None, digits: int = 2) -> str:
    """A figure for people; n/a where there is none."""
    return "n/a" if value is None else f"{value:.{digits}f}"


def _times(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}×"


def _interval(ends: tuple[float, float] | None) -> str:
    return f"{ends[0]:.2f} to {ends[1]:.2f}" if ends else "n/a"


# ---- the headline


def headline(run: Results) -> Headline:
    """The fastest block case of the draft itself; without one, the fastest of the others, with a word on that."""
    verdict, tone = _verdict(run)
    if run.gate:
        # What fails a run comes first.
        sentences, failed = [verdict, gate_line(run.gate)], run.gate.failed
        verdict, tone = " ".join(sentences[::-1] if failed else sentences), "bad" if failed else tone
    if run.failed_tests:
        names = ", ".join(name.split("::")[-1] for name in run.failed_tests[:5])
        more = f" and {len(run.failed_tests) - 5} more" if len(run.failed_tests) > 5 else ""
        verdict, tone = f"FAILED: {len(run.failed_tests)} of this run's tests ({names}{more}). {verdict}", "bad"
    proven = [c for c in run.decodes if c.speedup_x is not None and c.lossless]
    if not proven:
        alone = (f"the target alone was measured, since {c.no_draft}" for c in run.decodes if c.no_draft)
        words = next(alone, "nothing was proven equal to greedy decoding")
        return Headline(figure="No speed-up", words=words, verdict=verdict, tone=tone)
    best = max(proven, key=_rank)
    who = f"the draft ({best.draft or best.case})" if best.is_own else f"a scripted draft ({best.proposer})"
    length = best.acceptance_length
    accepted = "" if length is None else f"acceptance length {length:.2f} in blocks of {best.block_size}, "
    words = (
        f"the speed of greedy decoding on {best.device_kind or 'this device'} with {who}: 95% interval "
        f"{_interval(best.speedup_x_ci95)}, {accepted}case {best.case}."
    )
    ceiling = max((c for c in proven if not c.is_own), key=_rank, default=best)
    if best.is_own and ceiling.block_size and (ceiling.speedup_x or 0) > (best.speedup_x or 0):
        words += (
            f" With {ceiling.accept_len_mean:.0f} of {ceiling.block_size - 1} drafted tokens right this machine "
            f"reaches {ceiling.speedup_x:.2f}×."
        )
    if best.status in UNBELIEVED:
        words += f" It is {best.status.replace('-', ' ')}: {best.too_noisy or 'not to be believed'}."
    return Headline(figure=_times(best.speedup_x), words=words, verdict=verdict, tone=tone)


def _rank(case: Decode) -> tuple[bool, bool, bool, float]:
    return case.is_own, case.mode == BLOCK.name, case.status not in UNBELIEVED, case.speedup_x or 0


def _verdict(run: Results) -> tuple[str, str]:
    cases = run.decodes
    if not cases and not run.failed:
        return "No case was decoded.", "bad"
    wrong = [c.case for c in cases if c.lossless is False]
    proven = sum(bool(c.lossless) for c in cases)
    words = f"Lossless in {proven} of {len(cases)} cases: every token equal to greedy's in every round."
    if wrong:
        words = f"NOT LOSSLESS in {', '.join(wrong)}: tokens differ from greedy's. " + words
    doubtful = [c for c in cases if c.status != "ok" and c.lossless is not False]
    if doubtful:
        words += f" Not ok: {_named_or_counted(doubtful)}."
    if run.failed:
        words += f" {len(run.failed)} more could not be measured."
    if wrong or run.failed or any(c.status in UNBELIEVED for c in doubtful):
        return words, "bad"
    return words, "plain" if doubtful else "good"


def _named_or_counted(cases: Sequence[Decode]) -> str:
    """Cases with their status; of many, how many have which."""
    if len(cases) <= 3:
        return ", ".join(f"{c.case} ({c.status})" for c in cases)
    states = [c.status for c in cases]
    return ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))


# ---- what was measured


def cost_section(run: Results) -> Section:
    """The steps beside the memory's floor, and the acceptance length that each block size needs."""
    section = Section(key="cost", title="What a step costs")
    for s in run.of(Step):
        one, floors = s.step_ms, s.floor_ms
        rows = [_step_row("T_1", one, one, floors.get(1))]
        rows += [_step_row(f"T_verify({n})", ms, one, floors.get(n)) for n, ms in s.verify_ms.items()]
        for n, ms in s.draft_ms.items():
            verify = s.verify_ms.get(n)
            needed = "n/a" if verify is None else number((verify + ms) / one)
            rows.append([f"T_draft({n})", number(ms, 1), number(ms / one), "", "", needed])
        header = ["step", "ms", "/ T_1", "floor ms", "/ floor", "break-even acceptance_length"]
        section.tables.append(Table(header=header, rows=rows))
        section.sentences += [
            f"a verify step of {n} tokens took {ms / one:.2f} of a one-token step: unless that is noise, greedy "
            "decoding is not as fast as it can be here, and no speed-up over it counts"
            for n, ms in s.verify_ms.items()
            if ms < one
        ]
        section.sentences.append(
            f"{s.device_kind}, {s.dtype}, batch {s.batch_size}, context {s.context}; memory read at "
            f"{s.bandwidth_gb_s:.1f} GB/s; computed by {s.kernels}"
        )
        if s.estimate_ms:
            steps = ", ".join(f"T_{n} {ms:.2f} ms" for n, ms in s.estimate_ms.items())
            section.sentences.append(f"estimated by the TPU's compiler, collectives apart: {steps}")
        if s.product_ms:
            plain, padded = s.product_ms["plain"], s.product_ms["padded"]
            section.sentences.append(
                f"the head times one column takes {plain:.3f} ms as a step computes it, {padded:.3f} ms padded to 8 "
                "columns"
            )
    return section


def _step_row(name: str, ms: float, one: float, floor: float | None) -> list[str]:
    over = "n/a" if floor is None else number(ms / floor)
    return [name, number(ms, 1), number(ms / one), number(floor, 1), over, ""]


def training_section(run: Results) -> Section:
    """A training step beside the machine's rate of matrix products, and what reading and writing a cache take."""
    sentences = []
    for t in run.of(Training):
        sentences += [
            f"{t.case}, {t.dtype}: {t.step_s:.2f} s a step, {t.draft_tokens_per_s:.0f} drafted tokens/s; "
            f"{t.gflop_s:.0f} GFLOP/s of {t.matmul_gflop_s:.0f} in one large product ({100 * t.matmul_fraction:.0f}%)",
            f"a batch is read in {1000 * t.read_s:.0f} ms; the cache is written at {t.cache_write_gb_s:.2f} GB/s, one "
            f"large file at {t.disk_write_gb_s:.2f}",
        ]
    return Section(key="training", title="What training a draft costs", sentences=sentences)


def peer_section(run: Results) -> Section:
    """Ours beside other implementations."""
    rows = [[p.case, _times(p.faster_x), _interval(p.faster_x_ci95)] for p in run.of(Peer)]
    tables = [Table(header=["case", "faster", "95% interval"], rows=rows)] if rows else []
    return Section(key="peers", title="Beside other implementations", tables=tables)


def acceptance_section(run: Results) -> Section:
    """Live acceptance by category of prompts, and what an offline evaluation scored."""
    section = Section(key="acceptance", title="What the target accepts of the draft")
    for live in run.of(Acceptance):
        prompts = sum(c.num_prompts for c in live.by_category.values())
        each: list[tuple[str, int, Accepted]] = [(name, c.num_prompts, c) for name, c in live.by_category.items()]
        rows = [
            [name, str(count), str(a.num_drafts), number(a.acceptance_length), _rates(a)]
            for name, count, a in [*each, ("all", prompts, live)]
        ]
        header = ["prompts", "number", "blocks", "acceptance_length", "accepted up to slot 1, 2, ..."]
        section.tables.append(Table(header=header, rows=rows))
    for offline in run.of(Offline):
        section.sentences += _offline_sentences(offline)
        rows = [
            [str(s), str(b.n), number(b.accept_len_mean), number(b.accept_len_p50, 0), number(b.tok_acc_mean, 3)]
            for s, b in offline.by_ctx_pos_start.items()
        ]
        header = ["ctx_pos_start", "blocks", "accept_len", "p50", "token accuracy"]
        section.tables.append(Table(header=header, rows=rows))
    return section


def _rates(accepted: Accepted) -> str:
    return " ".join(number(rate) for rate in accepted.accept_rate_per_pos or [])


def _offline_sentences(offline: Offline) -> list[str]:
    sentences = [
        f"{_ROWS[offline.rows]}, {offline.num_samples} blocks of {offline.block_size}: accept_len "
        f"{number(offline.accept_len_mean)} (p50 {offline.accept_len_p50:.0f}, p90 {offline.accept_len_p90:.0f}, p99 "
        f"{offline.accept_len_p99:.0f}) of {offline.block_size - 1}, token accuracy {offline.token_acc_mean:.3f}",
        "accepted up to slot 1, 2, ...: " + _rates(offline),
    ]
    if offline.live_acceptance_length is not None:
        sentences.append(
            f"as live decoding would walk them: acceptance_length {offline.live_acceptance_length:.2f} over "
            f"{offline.live_num_samples} blocks"
        )
    return sentences


def speedup_section(run: Results) -> Section:
    """A line a case: what was accepted, how fast both were, the speed-up, and what the terms predict."""
    section = Section(key="speedup", title="Speed-up over greedy decoding")
    if run.decodes:
        header = ["case", "accepted", "of", "tok/s", "greedy", "speed-up", "95% interval", "predicted", "verdict"]
        section.tables = [Table(header=header, rows=[_speedup_row(c) for c in run.decodes], verdict=8)]
    served = run.of(Served)
    if served:
        header = ["case", "TTFT ms", "without draft", "TPOT ms", "without draft"]
        rows = [
            [c.case, *(number(x, 1) for x in (c.ttft_ms, c.baseline_ttft_ms, c.tpot_ms, c.baseline_tpot_ms))]
            for c in served
        ]
        section.tables.append(Table(header=header, rows=rows))
    drafts = {c.proposer: _draft(c, run) for c in run.decodes if c.is_own and c.proposer and c.draft}
    if len(drafts) > 1:
        section.sentences.append("; ".join(f"{name} is {draft}" for name, draft in drafts.items()) + ".")
    remarks = [[c.case, text] for c in run.decodes for text in _remarks(c)]
    if remarks:
        section.tables.append(Table(header=["case", "remark"], rows=remarks, prose=True))
    return section


def sets_section(run: Results) -> Section:
    """Prompt sets by drafts, as papers have them: both means of the acceptance length, and the speed-up."""
    section = Section(key="sets", title="By prompt set")
    # Token-by-token cases decode fewer prompts, to show equality, so their mean differs.
    every = [c for c in run.decodes if c.is_own and c.proposer and c.acceptance_length_by_prompt is not None]
    own = [c for c in every if c.mode != SEQUENTIAL.name]
    theirs = sorted({c.protocol for c in own if c.protocol and c.protocol.startswith(ZLAB.name)})
    if len({(c.prompts, c.draft, c.draft_vocab_size) for c in own}) < 2 and not theirs:
        return section
    header = ["prompts", "number", "draft", "case"]
    header += ["acceptance_length over blocks", "95% interval", "by prompt", "95% interval", "speed-up", "95% interval"]
    rows = [
        [
            str(c.prompts),
            str(c.num_prompts),
            _draft(c, run),
            c.case,
            number(c.acceptance_length),
            _interval(c.acceptance_length_ci95),
            number(c.acceptance_length_by_prompt),
            _interval(c.acceptance_length_by_prompt_ci95),
            _times(c.speedup_x),
            _interval(c.speedup_x_ci95),
        ]
        for c in own
    ]
    section.tables = [Table(header=header, rows=rows)]
    section.sentences = [
        "z-lab's protocol: its published acceptance lengths are those by prompt."
        if protocol == ZLAB.name
        else f"The protocol is {protocol}: beside z-lab's published figures this is another measurement."
        for protocol in theirs
    ]
    return section


def _draft(case: Decode, run: Results) -> str:
    """A case's draft by name, with what it proposes where cases of a run differ in that."""
    sizes = {c.draft_vocab_size for c in run.decodes if c.is_own}
    return f"{case.draft}" + (f", {case.draft_vocab_size} tokens proposed" if len(sizes) > 1 else "")


def _speedup_row(case: Decode) -> list[str]:
    return [
        case.case,
        number(case.accept_len_mean),
        "n/a" if case.block_size is None else str(case.block_size - 1),
        number(case.tok_s_total, 1),
        number(case.baseline_tok_s_total, 1),
        _times(case.speedup_x),
        _interval(case.speedup_x_ci95),
        number(case.predicted_speedup_x),
        _status(case),
    ]


def _status(case: Decode) -> str:
    words: list[str] = [case.status]
    if case.lossless:
        ties = case.near_ties
        words.append(f"lossless up to {ties} near tie{'s' * (ties > 1)}" if ties else "lossless")
    return ", ".join(words if case.is_own else [*words, "scripted"])


def _remarks(case: Decode) -> list[str]:
    """What doubts a case, then what the cost model advises for a draft's own."""
    unknown = f"acceptance is unknown: {case.acceptance_unknown}" if case.acceptance_unknown else None
    texts = [remark(case), None if case.no_draft else unknown, advice_line(case) if case.is_own else None]
    texts += [alarm_line(case), own_line(case)] if isinstance(case, Served) else []
    return [text for text in texts if text]


def failed_section(run: Results) -> Section:
    """Cases that could not be measured."""
    rows = [[c.case, c.error] for c in run.failed]
    tables = [Table(header=["case", "why it has no figures"], rows=rows, prose=True)] if rows else []
    return Section(key="failed", title="Could not be measured", tables=tables)


# ---- checks


def gate_line(gate: GateResult) -> str:
    """How many cases have which verdict of the baselines."""
    verdicts = [case.verdict for case in gate.cases]
    return "Baselines: " + ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts)) + "."


def gate_section(gate: GateResult | None) -> Section:
    """How the cases stand to their baselines. Passes are counted; every other verdict has its sentence."""
    section = Section(key="gate", title="Held to the baselines")
    if gate is None:
        return section
    grouped: dict[tuple[str, str], list[str]] = {}
    for case in gate.cases:
        if case.verdict != "pass":
            grouped.setdefault((case.verdict, case.sentence), []).append(case.case)
    failed = "This fails the run." if gate.failed else "This does not fail the run."
    section.sentences = [gate_line(gate) + (f" {failed}" if grouped else "")]
    if grouped:
        rows = [[", ".join(names), verdict, sentence] for (verdict, sentence), names in grouped.items()]
        section.tables = [Table(header=["case", "verdict", "why"], rows=rows, verdict=1, prose=True)]
    return section


def audit_section(audits: Sequence[AuditResult]) -> Section:
    """What one-token steps and blocks round differently on the device, and whether a token was lost over it."""
    section = Section(key="audit", title="The audit of decoding")
    if not audits:
        return section
    rows = []
    for audit in audits:
        parity, logits = audit.parity, audit.parity.logits
        differs = "none" if parity.first_layer is None else f"from layer {parity.first_layer} on"
        ulps = f"{number(logits.ulps_p99)}, largest {number(logits.ulps_max)}"
        flips = f"{parity.flips} of {parity.positions}"
        rows.append([audit.case, str(audit.tokens), differs, ulps, flips, str(audit.near_ties), audit.verdict])
    header = ["case", "tokens", "layers that differ", "ulps of logits, p99", "argmax flips", "near ties", "verdict"]
    section.tables = [Table(header=header, rows=rows, verdict=6)]
    section.sentences = [
        f"One-token steps beside blocks on {audits[0].device_kind}, at the same positions; ulps are units in the "
        "last place. A token that differs from greedy's must be a near tie: its margin within the rounding there."
    ]
    section.sentences += [f"DEFECT in {audit.case}: {defect}" for audit in audits for defect in audit.defects]
    return section


def audit_details(audit: AuditResult) -> Section:
    """One audit: the verdict, what one-token steps and blocks round differently, every divergence and defect."""
    parity = audit.parity
    begins = "no layer differs"
    if parity.first_layer is not None:
        begins = f"layer {parity.first_layer} is the first whose output differs"
    sentences = [
        f"{audit.verdict}: {audit.tokens} tokens of {audit.dtype} decoding judged on {audit.device_kind}, "
        f"{audit.near_ties} near ties, {len(audit.defects)} defects",
        f"one-token steps against blocks of {parity.block_size} at {parity.positions} positions: "
        f"{'bitwise equal' if parity.bitwise_equal else 'not bitwise equal'}; {begins}; {parity.flips} argmax flips "
        f"({100 * parity.flip_rate:.2f}%)",
    ]
    sentences += [
        f"{case}, prompt {d.prompt}, token {d.token}: greedy {d.greedy_token}, DFlash {d.dflash_token}, margin "
        f"{d.margin:.3g}, noise {d.noise:.3g}: near tie"
        for case, divergences in audit.divergences.items()
        for d in divergences
        if d.verdict == NEAR_TIE
    ]
    sentences += [f"DEFECT: {defect}" for defect in audit.defects]
    spreads = [("logits", parity.logits), *((f"layer {i}", s) for i, s in enumerate(parity.layers))]
    rows = [[name, number(s.ulps_p99), number(s.ulps_max)] for name, s in spreads]
    table = Table(header=["difference", "p99 ulps", "largest"], rows=rows)
    return Section(key="audit", title="The audit of decoding", sentences=sentences, tables=[table])


# ---- what belongs to a file: changes, history, origin


def change_section(old: ResultFile, new: ResultFile) -> Section:
    """The difference to one older run."""
    section = Section(key="change", title=f"Change since {old.short_when} UTC")
    changes = compare(old, new)
    words = [c.verdict for c in changes]
    section.sentences = [
        f"Of {len(changes)} cases {words.count('faster')} are faster, {words.count('slower')} slower, "
        f"{words.count('no significant change')} without a significant change. Significant: p < 5% after Holm's "
        "correction. A speed-up is a ratio within its run, so a slower machine alone moves none."
    ]
    unknown = [c for c in changes if c.p is not None and c.old and c.new and not between_runs(c.old, c.new)]
    if unknown:
        section.sentences.append(
            f"How much {len(unknown)} of them change from run to run is unknown, so unchanged code may look changed; "
            "pytest's --repeat measures it."
        )
    header = [
        "case",
        "before",
        "now",
        "now / before",
        "95% interval",
        "acceptance_length",
        "block cost",
        "verdict",
    ]
    section.tables = [Table(header=header, rows=[_change_row(c) for c in changes], verdict=7)]
    facts = other_facts(old, new)
    if facts:
        rows = [list(fact) for fact in facts]
        section.tables.append(Table(header=["also different", "before", "now"], rows=rows, prose=True))
    return section


def _change_row(change: Change) -> list[str]:
    def pair(key: str) -> tuple[str, str]:
        before, now = (number(getattr(side, key, None)) for side in (change.old, change.new))
        return before, now

    def arrow(key: str) -> str:
        before, now = pair(key)
        return before if before == now else f"{before} → {now}"

    p = "" if change.p is None else f", p {change.p:.3f}" if change.p >= 0.001 else ", p < 0.001"
    return [
        change.case,
        *pair("speedup_x"),
        number(change.ratio, 3),
        _interval(change.interval),
        arrow("acceptance_length"),
        arrow("block_ratio"),
        change.verdict + p,
    ]


def history_section(left_out: Sequence[str]) -> Section:
    """`left_out` are sentences on runs that can't be drawn with the others."""
    return Section(key="history", title="Over the runs", sentences=list(left_out))


def origin_section(run: ResultFile) -> Section:
    """Environment, hashes, and the command that makes it again."""
    origin, machine = run.provenance, run.machine
    cpu = machine.get("cpu")
    facts: dict[str, Any] = {
        "measured": f"{run.short_when} UTC",
        "commit": commit(run),
        "command": " ".join(origin.command),
        **origin.device,
        "processor": cpu.get("brand_raw") if isinstance(cpu, dict) else None,
        "system": f"{machine.get('system', '')} {machine.get('release', '')}".strip(),
        **to_json(origin.read),
        "compile cache": origin.compile_cache,
        "seeds": origin.seeds,
        **origin.flags,
        "versions": ", ".join(f"{n} {v}" for n, v in origin.versions.items()),
        "python": machine.get("python_version"),
        "schema version": origin.schema_version,
    }
    rows = [
        [n if n.isupper() else n.replace("_", " "), _words(v)] for n, v in facts.items() if v not in (None, "", [], {})
    ]
    table = Table(header=["fact", "value"], rows=rows, prose=True)
    return Section(key="origin", title="Where this comes from", tables=[table])


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


# ---- the terminal

MEASURED: tuple[Callable[[Results], Section], ...] = (
    cost_section,
    training_section,
    acceptance_section,
    lambda run: audit_section(run.audits),
    peer_section,
    speedup_section,
    sets_section,
    failed_section,
)


def render(section: Section) -> list[str]:
    """The section as lines of text: sentences, tables whose columns line up; those of prose are sentences too."""
    lines = list(section.sentences)
    for table in section.tables:
        lines += [": ".join(row) for row in table.rows] if table.prose else _lined_up(table)
    return lines


def _lined_up(table: Table) -> list[str]:
    """Columns as wide as they must be; the first is flush left, the others right."""
    rows = [table.header, *table.rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.header))]

    def line(cells: Sequence[str]) -> str:
        rest = (c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))
        return "  ".join([cells[0].ljust(widths[0]), *rest]).rstrip()

    return [line(table.header), line(["-" * w for w in widths]), *map(line, table.rows)]
