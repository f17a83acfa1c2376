"""What changes between runs: the cases of a run measured again, each time in a fresh process.

An interval within a run holds what disturbs its rounds. Where a process's memory lies, what its compiler chose and what
else the machine did that minute are the same for all rounds, and differ in another run.
"""

import dataclasses
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import stdev

from dflash.measuring.result import Decode, ResultError, read_file

# Options that must not be passed on to a repeated run.
_WITHOUT = ("--update-baselines", "--require-baseline", "--resume")
# The last of an option counts.
_INSTEAD = ("--repeat=1", "-q")


def between_runs(speedups: Sequence[float]) -> float:
    """Standard deviation of the logarithm of a case's speed-up over two or more runs of it."""
    return stdev(math.log(x) for x in speedups)


def again(words: Sequence[str], paths: Sequence[str], tests: Sequence[str], times: int) -> list[dict[str, float]]:
    """Speed-ups by case, from further runs of pytest with a run's words and these tests instead of its paths.

    Raises ResultError when one of them wrote no results.
    """
    kept = [word for word in words if word not in (*_WITHOUT, *paths)]
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(times):
            file = Path(folder) / f"{number}.json"
            places = [f"--benchmark-json={file}", f"--report={folder}/report", f"--baselines={folder}/none"]
            command = [sys.executable, "-m", "pytest", *kept, *_INSTEAD, *places, *tests]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if not file.is_file():
                last = (done.stdout + done.stderr).strip().splitlines()[-1:]
                raise ResultError(f"a run that is repeated must give results; run {number + 2} said {''.join(last)!r}")
            runs.append({c.case: c.speedup_x for c in read_file(file).decodes if c.speedup_x is not None})
    return runs


def with_spread(case: Decode, runs: Sequence[dict[str, float]]) -> Decode:
    """The case with the spread between its runs, itself included; unchanged if there is only one."""
    figures = [case.speedup_x, *(run.get(case.case) for run in runs)]
    speedups = [x for x in figures if x is not None]
    if len(speedups) < 2:
        return case
    return dataclasses.replace(case, between_runs=between_runs(speedups), runs=len(speedups))
