"""What DFlash gains in a server of another project, over HTTP: `--server KIND`, or `--base-url URL`.

The same as `python -m dflash serve-bench`, with the options of a benchmark run: the first of every list, `--batch-size`
requests at a time, the longest of `--max-new-tokens`. No device is opened for it here; on a TPU, which belongs to one
process, select this file alone.
"""

import dataclasses
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from dflash.cli.pytest_options import open_tokenizer, protocol_name, take_prompts
from dflash.config import UserError
from dflash.measuring.gate import Floors
from dflash.measuring.result import Results, to_json
from dflash.serving.connection import ServingError
from dflash.serving.deployment import Deployment, deployment
from dflash.serving.options import ServerOptions
from dflash.serving.run import served_run
from dflash.weights.load import UNTRAINED


@pytest.fixture
def servers(pytestconfig: pytest.Config) -> Deployment:
    options = pytestconfig.option
    if not options.server and not options.base_url:
        pytest.skip("no server: --server KIND starts one, --base-url URL names one that runs")
    # Only one that is named: servers can't read the draft that comes with a target.
    draft = options.draft[0] if options.draft else UNTRAINED
    names = {field.name for field in dataclasses.fields(ServerOptions)}
    given = {name: value for name, value in vars(options).items() if name in names}
    given |= {
        "server": options.server or "openai",
        "draft": "" if draft == UNTRAINED else draft,
        "block_size": max(options.block_sizes) if draft != UNTRAINED else None,
        "server_logs": Path(options.server_logs),
    }
    try:
        return deployment(ServerOptions(**given))
    except UserError as error:
        pytest.exit(str(error), pytest.ExitCode.USAGE_ERROR)


@pytest.mark.benchmark(group="serving")
def test_served(
    servers: Deployment, benchmark: BenchmarkFixture, results: Results, pytestconfig: pytest.Config
) -> None:
    options = pytestconfig.option
    sizes = {"max_new_tokens": max(options.max_new_tokens), "concurrency": options.batch_size[0]}
    try:
        tokenizer = open_tokenizer(options)
        prompts = take_prompts(options, options.prompts[0])
        with (
            served_run(servers, tokenizer, prompts, **sizes, rounds=options.rounds) as run,
            run.keeping(run.draft or run.target),
        ):
            benchmark.pedantic(run.round, setup=run.baseline_round, rounds=options.rounds)
    except ServingError as error:
        pytest.fail(str(error), pytrace=False)
    except UserError as error:
        pytest.exit(str(error), pytest.ExitCode.USAGE_ERROR)
    names = {"prompts": options.prompts[0], "run_name": options.run_name, "protocol": protocol_name(options)}
    result = run.result(names | tokenizer.facts)
    benchmark.extra_info.update(to_json(result))  # decoding here takes minutes, and may be stopped
    result = run.held_to_ours(result)
    benchmark.extra_info.update(to_json(result))
    results.measured.append(result)
    floors = Floors(speedup_x=options.min_speedup, acceptance_length=options.min_acceptance_length)
    if sentences := run.failures(result, floors, options.rounds):
        pytest.fail("; ".join(sentences), pytrace=False)
