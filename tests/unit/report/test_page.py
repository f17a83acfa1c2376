"""The page of a run: what was measured is on it, what was not is not, and no text of a file becomes markup."""

import html
import html.parser
import json
import re

import pytest
import sample_runs
from sample_runs import decode, file_of

from dflash.measuring.result import read_file
from dflash.report.page import report_folder, write_report
from dflash.report.sections import headline

EVERY_PLOT = {
    "Speed-up of every case",
    "Speed-up against tokens per block",
    "What each block size would give",
    "Speed-up against block size",
    "Speed-up against batch size",
    "Acceptance by slot",
    "Accept length",
    "Acceptance by kind of prompt",
    "Acceptance by position",
    "What a step costs",
    "Where a block's time goes",
    "History",
}


class Elements(html.parser.HTMLParser):
    """Ids, addresses and open elements of a page."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.addresses, self.names, self.titles = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.names.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href"):
                self.addresses.append(value)

    def handle_data(self, data):
        if self.names and self.names[-1] == "h3" and data.strip():
            self.titles.append(data.strip())


@pytest.fixture
def run(tmp_path):
    def read(benchmarks, when="2026-01-02T03:04:05+00:00", **more):
        path = tmp_path / "run.json"
        path.write_text(json.dumps(file_of(benchmarks, when, **more)))
        return read_file(path)

    return read


@pytest.fixture
def pages(tmp_path):
    """Writes a report: the text of the page, and of the Markdown."""

    def write(*runs):
        page = write_report(tmp_path / "out", runs[0], runs[1:])
        assert sorted(p.name for p in page.parent.iterdir()) == ["report.html", "report.md"]
        return page.read_text(), (page.parent / "report.md").read_text()

    return write


@pytest.fixture(scope="module")
def sweep_page(tmp_path_factory):
    """The page of a sweep with an older one to compare with."""
    folder, runs = tmp_path_factory.mktemp("sweep"), []
    for day, tilt in ((2, 1.0), (1, 0.9)):
        path = folder / f"{day}.json"
        told = {"gate": sample_runs.gate(), "audits": [sample_runs.audit()]}
        path.write_text(json.dumps(file_of(sample_runs.sweep(tilt), f"2026-01-0{day}T00:00:00+00:00", **told)))
        runs.append(read_file(path))
    return write_report(folder, runs[0], runs[1:]).read_text()


def test_a_sweep_has_every_plot(sweep_page):
    assert set(Elements(sweep_page).titles) == EVERY_PLOT


def test_a_page_stands_alone(sweep_page):
    """No address but its own places, no script, ids once, and every place that is referred to is there."""
    page, found = sweep_page, Elements(sweep_page)
    assert "script" not in found.names
    assert len(set(found.ids)) == len(found.ids)
    places = {a for a in found.addresses if a != "data:,"} | set(re.findall(r"url\(([^)]*)\)", page))
    assert all(p.startswith("#") and p[1:] in found.ids for p in places)
    assert "@import" not in page


def test_plots_take_the_pages_colours(sweep_page):
    """Every colour of a plot is a variable, so that light and dark differ; a variable that is used is defined."""
    page = sweep_page
    plots = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert not re.findall(r"(?:fill|stroke): (?!none|var\()[^;\"]+", plots)
    dark = page[page.index("prefers-color-scheme: dark") :]
    for name in set(re.findall(r"var\((--[\w-]+)\)", page)):
        assert f"{name}: #" in page[: page.index("prefers-color-scheme: dark")], name
        assert f"{name}: #" in dark, name


def test_what_was_not_measured_is_not_there(run, pages):
    page, text = pages(run([decode()]))
    assert set(Elements(page).titles) == {
        "Speed-up of every case",
        "Speed-up against tokens per block",
        "What each block size would give",
        "Acceptance by slot",
        "Accept length",
    }
    for words in ("Change since", "What a step costs", "Training", "Over the runs"):
        assert words not in page + text
    assert "nan" not in text.lower()


@pytest.mark.parametrize("kind", ["step", "offline", "by_category", "training"])
def test_one_benchmark_alone_makes_a_page(run, pages, kind):
    page, text = pages(run([getattr(sample_runs, kind)()]))
    assert "No speed-up" in page
    assert "No speed-up" in text
    assert "**No case was decoded.**" in text


def test_undefined_figures_are_told_as_such(run, pages):
    none = ("speedup_x", "speedup_x_ci95", "accept_len_mean", "acceptance_length", "accept_rate", "accept_histogram")
    none += ("accept_rate_per_pos", "tok_s_total", "baseline_tok_s_total", "block_ratio", "lossless")
    case = decode()
    case["extra_info"] |= dict.fromkeys(none) | {"status": "no-baseline"}
    page, text = pages(run([case]))
    assert text.count("n/a") >= 5
    assert "Not ok: block-b8-n64-draft (no-baseline)" in page


def test_what_is_doubtful_is_said(run, pages):
    unexplained, noisy = decode(8), decode(4)
    shares = {"verify": 70.0, "draft": 25.0, "loop": 5.0}
    unexplained["extra_info"] |= {"status": "unexplained", "residual": 0.151}
    unexplained["extra_info"] |= {"time_shares": shares, "break_even_acceptance_length": 1.5}
    assert headline(run([unexplained])).tone == "plain"
    noisy["extra_info"] |= {"status": "too-noisy", "too_noisy": "the halves differ"}
    assert headline(run([unexplained, noisy])).tone == "bad"
    page, text = pages(run([unexplained, noisy]))
    assert '<span class="badge bad">too-noisy</span><span class="note">lossless</span>' in page
    for words in ("+15% off the", "too noisy: the halves differ", "(unexplained)", "(too-noisy)"):
        assert words in text
        assert words in page
    assert "best block size" in text  # the advice


def test_the_verdicts_of_the_baselines_are_said_first(run, pages):
    lost = {"fail": "speedup_x 2.61 < 2.80", "no-baseline": "no baseline for this case"}
    gated = run([decode()], gate=sample_runs.gate(**lost))
    assert headline(gated).tone == "bad"
    assert headline(gated).verdict.startswith("Baselines: 1 fail")
    page, text = pages(gated)
    assert Elements(page).ids[0] == "gate"
    for words in ("Baselines: 1 fail, 1 no-baseline, 1 pass.", "This fails the run.", *lost.values()):
        assert words.replace("<", "&lt;") in text
        assert words.replace("<", "&lt;") in page
    assert '<span class="badge bad">fail</span>' in page
    passed = run([decode()], gate=sample_runs.gate(failed=False, **{"no-baseline": "none"}))
    assert headline(passed).tone == "good"
    assert "This does not fail the run." in pages(passed)[1]
    assert "Held to the baselines" not in pages(run([decode()]))[1]
    # A noisy case is invalid with a baseline or without one.
    none = [{"case": name, "verdict": name, "sentence": "x"} for name in ("no-baseline", "invalid")]
    without = run([decode()], gate={"failed": False, "cases": none})
    assert Elements(pages(without)[0]).ids[-2:] == ["gate", "origin"]


def test_failed_tests_are_at_the_top(run, pages):
    for text in pages(run([decode()], failed_tests=["bench/test_step.py::test_step"])):
        assert "FAILED: 1 of this run's tests (test_step)" in html.unescape(text)


def test_one_word_is_used_for_what_is_accepted(sweep_page):
    """Tokens that a block emits are fewer where stops and budgets cut: they are called another name."""
    text = re.sub(r"<svg.*?</svg>|<[^>]+>", " ", sweep_page, flags=re.DOTALL)
    assert "tokens a block" not in text
    assert "drafted</th>" not in sweep_page


def test_audits_are_told_with_their_defects(run, pages):
    audits = [sample_runs.audit("one"), sample_runs.audit("two", ["own: defect at prompt 0, token 3"])]
    page, text = pages(run([decode()], audits=audits))
    assert "| one | 288 | from layer 1 on | 1.00, largest 2.50 | 1 of 96 | 1 | lossless up to near ties |" in text
    assert "DEFECT in two: own: " in text
    assert '<span class="badge bad">defect</span>' in page


def test_the_headline_is_the_drafts_own_block_case(run):
    cases = [decode(8), decode(8, mode="seq", tilt=3.0), decode(8, proposer="a7")]
    found = headline(run(cases))
    assert found.figure == f"{cases[0]['extra_info']['speedup_x']:.2f}×"
    assert "With 7 of 7 drafted tokens right" in found.words
    assert (found.tone, found.verdict[:22]) == ("good", "Lossless in 3 of 3 cas")
    assert "a scripted draft (a7)" in headline(run(cases[2:])).words


def test_a_noisy_case_is_the_headline_only_where_there_is_no_other_and_says_so(run):
    noisy, calm = decode(8), decode(4)
    noisy["extra_info"] |= {"status": "invalid", "too_noisy": "the halves differ"}
    assert re.search("block-b8-n64-draft.* invalid: the halves differ", headline(run([noisy])).words)
    found = headline(run([noisy, calm]))
    assert "block-b4-n64-draft" in found.words
    assert "invalid" not in found.words


def test_many_doubtful_cases_are_counted(run):
    cases = [decode(size) for size in (2, 4, 8, 16)]
    for case in cases:
        case["extra_info"]["status"] = "invalid"
    cases[0]["extra_info"]["status"] = "unexplained"
    assert headline(run(cases)).verdict.endswith(" Not ok: 1 unexplained, 3 invalid.")


def test_a_case_that_differs_from_greedy_is_the_first_thing_said(run, pages):
    fast = decode(8, tilt=9.0)
    fast["extra_info"] |= {"lossless": False, "status": "invalid"}
    found = headline(run([fast, decode(4)]))
    assert found.verdict.startswith("NOT LOSSLESS in block-b8-n64-draft")
    assert found.tone == "bad"
    assert "blocks of 4" in found.words
    page, _ = pages(run([fast, decode(4)]))
    plot = page[page.index("<h3>Speed-up of every case") :]
    assert "block-b8-n64-draft" not in plot[: plot.index("</figure>")]


def test_what_could_not_be_measured_is_said(run, pages):
    page, markdown = pages(run([decode()], failed=[sample_runs.failed()]))
    for text in (page, markdown):
        assert "1 more could not be measured." in text
        assert "block-b8-n64-k64-draft" in text
        assert "out of memory: allocating 7 GiB &lt;x" in text
    told = headline(run([decode()], failed=[sample_runs.failed()]))
    assert (told.figure[-1], told.tone) == ("×", "bad")


def test_a_run_of_which_every_case_failed_makes_a_page(run, pages):
    page, _ = pages(run([], failed=[sample_runs.failed()]))
    assert "No speed-up" in page
    assert "out of memory" in page


def test_prompt_lengths_and_drafts_of_a_sweep_are_told_apart(run, pages):
    cases = [decode(8), decode(8)]
    cases[1]["extra_info"] |= {"prompt_len": 512, "case": "block-b8-n64-p512-draft"}
    page, _ = pages(run(cases))
    assert "Speed-up against prompt length" in Elements(page).titles


def test_drafts_side_by_side_are_named(run, pages):
    cases = [decode(8), decode(8)]
    cases[0]["extra_info"] |= {"case": "block-b8-n64-draft", "proposer": "draft", "draft": "first"}
    cases[1]["extra_info"] |= {"case": "block-b8-n64-draft2", "proposer": "draft2", "draft": "second"}
    page, markdown = pages(run(cases))
    assert "draft is first; draft2 is second." in page
    assert "draft is first; draft2 is second." in markdown
    assert " is first" not in pages(run(cases[:1]))[0]


def test_sets_side_by_side_have_a_table_on_page_and_in_markdown(run, pages):
    first, second = decode(), decode(proposer="draft2")
    for benchmark, prompts in ((first, "gsm8k"), (second, "mt-bench")):
        info = benchmark["extra_info"]
        info |= {"prompts": prompts, "acceptance_length_by_prompt": 3.25}
    for text in pages(run([first, second])):
        assert "By prompt set" in text
        assert "mt-bench" in text
        assert "3.25" in text


def test_text_of_a_file_is_text_on_the_page(run, pages):
    case = decode()
    case["extra_info"] |= {"case": "<script>x</script>|$a_b$", "draft": "<b>&"}
    page, text = pages(run([case], command=["pytest", "--run-name=<i>"]))
    assert "script" not in Elements(page).names
    assert not {"b", "i"} & set(Elements(page).names)
    assert "<" not in text
    tables = [re.sub(r"\\\|", "", block).split("\n") for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)]
    for lines in tables:
        assert len({line.count("|") for line in lines if line}) == 1
    assert "$a_b$" in page


def test_long_names_and_many_cases_still_fit(run, pages):
    cases = []
    for i in range(40):
        case = decode(8, tilt=1 + i / 100)
        case["fullname"] += str(i)
        case["extra_info"] |= {"case": f"block-b8-n1024-k16-p2048-humaneval-draft-of-a-long-name-{i}"}
        cases.append(case)
    page, _ = pages(run(cases))
    assert page.count("draft-of-a-long-name-39") >= 2


def test_a_run_of_another_machine_is_no_history(run, pages):
    other = decode()
    other["extra_info"]["device_kind"] = "TPU v5e"
    page, _ = pages(run([decode()]), run([other], "2026-01-01T00:00:00+00:00"))
    assert "2026-01-01 00:00 is left out: other device_kind." in page
    assert "History" not in Elements(page).titles
    assert '<span class="badge plain">not comparable</span><span class="note">other device_kind' in page


def test_the_newest_of_the_older_runs_is_compared_with(run, pages):
    older = [run([decode()], f"2025-12-0{day}T00:00:00+00:00") for day in (2, 5, 3)]
    _, text = pages(run([decode()]), *older)
    assert "Change since 2025-12-05 00:00 UTC" in text


def test_a_folder_keeps_its_runs(tmp_path):
    """Each run is kept under its time and read as history by the next; the same file twice is one run."""
    json_file, folder = tmp_path / "x.json", tmp_path / "out"
    folder.mkdir()
    for day, tilt in ((1, 1.0), (2, 1.5), (2, 1.5)):
        json_file.write_text(json.dumps(file_of([decode(tilt=tilt)], f"2026-01-0{day}T00:00:00+00:00")))
        page = report_folder(folder, json_file)
        assert ("Change since 2026-01-01" in page.read_text()) == (day == 2)
    assert sorted(p.name for p in folder.glob("run-*")) == ["run-20260101T000000.json", "run-20260102T000000.json"]
    assert "faster" in (folder / "report.md").read_text()
