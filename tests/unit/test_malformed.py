"""The corpus: whatever is in a file or an answer, it is refused in one sentence, or harmless."""

import collections
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from malformed.corpus import SAMPLE, cases
from malformed.specimens import SPECIMENS

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, quick_compiler):
    """What became of every case, by its name."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "unit")))
    # Programs of tiny networks: compiled once, and not well.
    quick = quick_compiler | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "malformed.corpus", str(tmp_path_factory.mktemp("corpus"))],
        env=os.environ | quick | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {row["name"]: row for row in rows}


@pytest.mark.parametrize("specimen", [specimen.name for specimen in SPECIMENS])
def test_it_is_refused_in_one_sentence_or_harmless(outcomes, specimen):
    own = [row for name, row in outcomes.items() if name.split(": ")[0] == specimen]
    # What is whole is read: a refusal says something of the damage.
    assert outcomes[specimen]["verdict"] == "harmless", outcomes[specimen]
    faults = [row for row in own if row["verdict"] not in ("refused", "harmless")]
    assert faults == []
    assert sum(row["verdict"] == "refused" for row in own) >= SAMPLE // 3


def test_the_corpus_is_as_large_as_the_docs_say(outcomes):
    counts = collections.Counter(row["verdict"] for row in outcomes.values())
    assert len(outcomes) == len(cases()) == sum(counts.values())
    said = re.search(r"(\d+) cases", (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8"))
    assert said is not None
    assert int(said[1]) == len(outcomes) >= 400
