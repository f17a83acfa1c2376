"""What every benchmark shares: target, draft, prompts, and where results go."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from dflash import init_draft, load_draft, load_target, load_tokenizer, native
from dflash.config import ConfigError
from dflash.cost_model import StepTimes, sizes_to_time
from dflash.decoding.decode import RequestError, check_request
from dflash.device import device_facts
from dflash.measure import time_steps
from dflash.models.draft import Draft
from dflash.models.llama import Llama
from dflash.prompts import PromptError, exact_length_prompts, load_prompts
from dflash.tokenizer import TokenizerError
from dflash.weights.huggingface import WeightsError, snapshot_hash
from dflash.weights.load import UNTRAINED, draft_hash, target_directory
from dflash.weights.smollm2 import SnapshotError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One line of the speed-up table. `scripted` None decodes with the draft's own proposals."""

    mode: str
    block_size: int
    max_new_tokens: int
    proposer: str
    scripted: int | None

    @property
    def id(self) -> str:
        return f"{self.mode}-b{self.block_size}-n{self.max_new_tokens}-{self.proposer}"


def _cases(config: pytest.Config) -> list[Case]:
    """mode x block size x budget: the draft itself, and scripted acceptances, which show the machine's ceiling."""
    trained = config.option.draft != UNTRAINED
    own = "draft" if trained else UNTRAINED
    cases = []
    for block in config.option.block_sizes:
        scripts = [(f"a{a}", a) for a in ([block - 1] if trained else [(block - 1) // 2, block - 1])]
        plans = [("block", [(own, None), *scripts]), ("seq", [(own, None), scripts[-1]])]
        for budget in config.option.max_new_tokens:
            for mode, proposers in plans:
                cases += [
                    Case(mode=mode, block_size=block, max_new_tokens=budget, proposer=name, scripted=a)
                    for name, a in proposers
                ]
    return cases


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = _cases(metafunc.config)
        # Names, not cases: parameters go into the JSON file as they are.
        metafunc.parametrize("case", [c.id for c in cases], ids=str, indirect=True)


@pytest.fixture
def case(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> Case:
    return next(c for c in _cases(pytestconfig) if c.id == request.param)


def _or_usage_error(load: Callable[[], Any]) -> Any:
    """A user's mistake is one sentence, not a traceback."""
    try:
        return load()
    except (ConfigError, WeightsError, SnapshotError, RequestError) as error:
        pytest.exit(str(error), returncode=pytest.ExitCode.USAGE_ERROR)


@pytest.fixture(scope="session")
def target(device: jax.Device, pytestconfig: pytest.Config) -> Llama:
    options = pytestconfig.option
    return _or_usage_error(lambda: load_target(options.target, options.dtype))


@pytest.fixture(scope="session")
def draft(target: Llama, pytestconfig: pytest.Config) -> Draft:
    options = pytestconfig.option
    if options.draft != UNTRAINED:
        return _or_usage_error(lambda: load_draft(options.draft, target))
    largest = max(options.block_sizes)
    return _or_usage_error(lambda: init_draft(target, num_layers=options.draft_layers, block_size=largest))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Groups of prompts, a batch each, and what identifies them."""

    groups: list[list[list[int]]]
    stop_token_ids: tuple[int, ...]
    facts: dict[str, Any]

    @property
    def mean_len(self) -> int:
        lengths = [len(p) for g in self.groups for p in g]
        return sum(lengths) // len(lengths)


@pytest.fixture(scope="session")
def workload(target: Llama, draft: Draft, pytestconfig: pytest.Config) -> Workload:
    options = pytestconfig.option
    count, length, batch = options.num_prompts, options.prompt_len, options.batch_size
    if count % batch:
        pytest.exit(f"--num-prompts {count} must be a multiple of --batch-size {batch}", pytest.ExitCode.USAGE_ERROR)
    stops: tuple[int, ...] = ()
    facts: dict[str, Any] = {"prompts": options.prompts}
    if options.prompts == "random":
        rng = np.random.default_rng(0)
        prompts = rng.integers(0, target.config.vocab_size, (count, length or 64)).tolist()
    else:
        try:
            tokenizer = load_tokenizer(options.target)
            stops = tokenizer.stop_token_ids
            prompt_set = load_prompts(options.prompts).take(count)
            facts["prompts_sha256"] = prompt_set.sha256
            prompts = exact_length_prompts(tokenizer, length, count, 0) if length else prompt_set.encode(tokenizer)
        except (PromptError, TokenizerError, ImportError) as error:
            pytest.exit(str(error), pytest.ExitCode.USAGE_ERROR)
    if len(prompts) < count:
        pytest.exit(
            f"{options.prompts} has {len(prompts)} prompts, --num-prompts asks {count}", pytest.ExitCode.USAGE_ERROR
        )
    # Before anything is measured: all prompts of all cases, greedy's block more for the scripts included.
    block, budget = max(options.block_sizes), max(options.max_new_tokens)
    request = {"stop_token_ids": stops, "temperature": 0.0, "allow_larger_block": False}
    for proposer, mode, tokens in ((None, "greedy", budget + block), (draft, "cached_block_verify", budget)):
        _or_usage_error(
            lambda d=proposer, m=mode, n=tokens: check_request(
                target, d, prompts, mode=m, block_size=block, max_new_tokens=n, **request
            )
        )
    groups = [prompts[i : i + batch] for i in range(0, count, batch)]
    return Workload(groups=groups, stop_token_ids=stops, facts=facts)


@pytest.fixture(scope="session")
def facts(device: jax.Device, workload: Workload, pytestconfig: pytest.Config) -> dict[str, Any]:
    """What identifies a run in its results: device, versions, hashes."""
    options = pytestconfig.option
    trained = options.draft != UNTRAINED
    return {
        **device_facts(device),
        "mesh": {"dp": 1, "tp": 1},  # decoding runs on one device
        "seeds": {"prompts": 0, "bootstrap": 0} | ({} if trained else {"draft": 0}),
        "jax": jax.__version__,
        "kernels": native.status(),
        "target": options.target,
        "target_sha256": snapshot_hash(target_directory(options.target)),
        "draft": options.draft if trained else f"{UNTRAINED}, {options.draft_layers} layers, seed 0",
        "draft_sha256": draft_hash(options.draft) if trained else None,
        "run_name": options.run_name or None,
        **workload.facts,
    }


@pytest.fixture(scope="session")
def steps_of(target: Llama, draft: Draft, workload: Workload) -> Callable[[int, int], StepTimes]:
    """The cost model's terms up to a block size, half-way through a decode of that budget; timed once each."""

    @functools.cache
    def steps(block_size: int, max_new_tokens: int) -> StepTimes:
        context = workload.mean_len + max_new_tokens // 2
        return time_steps(target, draft, sizes_to_time(block_size), batch=len(workload.groups[0]), context=context)

    return steps
