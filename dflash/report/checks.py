"""What the page says of a run's checks: its baselines, case by case, and the audits of its device."""

from collections.abc import Sequence

from dflash.report.run import Info
from dflash.report.sections import Section, Table
from dflash.report.text import gate_line, number


def gate_section(gate: Info | None) -> Section:
    """How the cases stand to their baselines. Passes are counted; every other verdict has its sentence."""
    section = Section(key="gate", title="Held to the baselines")
    if gate is None:
        return section
    failed = "This fails the run." if gate["failed"] else "This does not fail the run."
    grouped: dict[tuple[str, str], list[str]] = {}
    for case in gate["cases"]:
        if case["verdict"] != "pass":
            grouped.setdefault((case["verdict"], case["sentence"]), []).append(case["case"])
    section.sentences = [gate_line(gate) + (f" {failed}" if grouped else "")]
    if grouped:
        rows = [[", ".join(names), verdict, said] for (verdict, said), names in grouped.items()]
        section.tables = [Table(header=["case", "verdict", "why"], rows=rows, verdict=1, prose=True)]
    return section


def audit_section(audits: Sequence[Info]) -> Section:
    """What one-token steps and blocks round differently on the device, and whether a token was lost over it."""
    section = Section(key="audit", title="The audit of decoding")
    if not audits:
        return section
    rows = []
    for info in audits:
        parity = info["parity"]
        differs = "none" if parity["first_layer"] is None else f"from layer {parity['first_layer']} on"
        logits = parity["logits"]
        ulps = f"{number(logits['ulps_p99'])}, largest {number(logits['ulps_max'])}"
        flips = f"{parity['flips']} of {parity['positions']}"
        rows.append([info["case"], str(info["tokens"]), differs, ulps, flips, str(info["near_ties"]), info["verdict"]])
    header = ["case", "tokens", "layers that differ", "ulps of logits, p99", "argmax flips", "near ties", "verdict"]
    section.tables = [Table(header=header, rows=rows, verdict=6)]
    section.sentences = [
        f"One-token steps beside blocks on {audits[0]['device_kind']}, at the same positions; ulps are units in the "
        "last place. A token that differs from greedy's must be a near tie: its margin within the rounding there."
    ]
    section.sentences += [f"DEFECT in {info['case']}: {said}" for info in audits for said in info["defects"]]
    return section
