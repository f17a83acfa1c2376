"""What DFlash gains in a server of another project, over HTTP: `--server KIND`, or `--base-url URL`.

The same as `python -m dflash serve-bench`, with the options of a benchmark run: the first of every list, `--batch-size`
requests at a time, the longest of `--max-new-tokens`. No device is opened for it here; on a TPU, which belongs to one
process, select this file alone.
"""

from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from dflash.config import ConfigError
from dflash.gate import Floors, failures
from dflash.prompts import PromptError, load_prompts
from dflash.report.summary import Results
from dflash.serving.plan import OPENAI, Plan, Request, make_plan
from dflash.serving.results import case_facts
from dflash.serving.run import served_run
from dflash.serving.server import ServingError
from dflash.tokenizer import TokenizerError, load_tokenizer
from dflash.weights.load import UNTRAINED
from dflash.weights.smollm2 import SnapshotError
from dflash.weights.snapshot import WeightsError


@pytest.fixture
def plan(pytestconfig: pytest.Config) -> Plan:
    options = pytestconfig.option
    if not options.server and not options.base_url:
        pytest.skip("no server: --server KIND starts one, --base-url URL names one that runs")
    # Only one that is named: servers can't read the draft that comes with a target.
    draft = options.draft[0] if options.draft else UNTRAINED
    asked = Request(
        server=options.server or OPENAI,
        target=options.target,
        draft="" if draft == UNTRAINED else draft,
        block_size=max(options.block_sizes) if draft != UNTRAINED else None,
        python=options.server_python,
        arguments=options.server_args,
        draft_arguments=options.draft_server_args,
        base_url=options.base_url,
        draft_base_url=options.draft_base_url,
        served_model=options.served_model,
        ready_timeout_s=options.ready_timeout,
        log_dir=Path(options.server_logs),
    )
    try:
        return make_plan(asked)
    except (ServingError, ConfigError, WeightsError, SnapshotError) as error:
        pytest.exit(str(error), pytest.ExitCode.USAGE_ERROR)


@pytest.mark.benchmark(group="serving")
def test_served(plan: Plan, benchmark: BenchmarkFixture, results: Results, pytestconfig: pytest.Config) -> None:
    options = pytestconfig.option
    try:
        tokenizer = load_tokenizer(options.target)
        prompt_set = load_prompts(options.prompts[0]).take(options.num_prompts)
        prompts = prompt_set.encode(tokenizer)
    except (PromptError, TokenizerError) as error:
        pytest.exit(str(error), pytest.ExitCode.USAGE_ERROR)
    sizes = {"max_new_tokens": max(options.max_new_tokens), "concurrency": options.batch_size[0]}
    try:
        with served_run(plan, tokenizer, prompts, **sizes, rounds=options.rounds) as run:
            benchmark.pedantic(run.round, setup=run.baseline_round, rounds=options.rounds)
    except ServingError as error:
        pytest.fail(str(error), pytrace=False)
    info = run.info()
    info |= case_facts(plan, info) | {"prompts": options.prompts[0], "prompts_sha256": prompt_set.sha256}
    info |= {"run_name": options.run_name or None}
    benchmark.extra_info.update(info)
    results.cases.append(info)
    acceptance = options.min_acceptance_length
    floors = Floors(
        speedup_x=float(options.min_speedup) if options.min_speedup else None,
        acceptance_length=float(acceptance) if acceptance else None,
    )
    if plan.no_draft is None or floors != Floors():
        said = failures(info, floors)
        assert not said, "; ".join(said)
