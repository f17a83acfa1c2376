"""What every benchmark shares: target, drafts, prompts, and what identifies them in the results."""

import dataclasses
import functools
import itertools
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
from dflash.sweep import Case, Setting, cases, drafts, settings
from dflash.tokenizer import TokenizerError
from dflash.weights.load import UNTRAINED, draft_hash, target_directory
from dflash.weights.smollm2 import SnapshotError
from dflash.weights.snapshot import WeightsError, snapshot_hash


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        # Names, not cases: parameters go into the JSON file as they are.
        metafunc.parametrize("case", [c.id for c in cases(metafunc.config.option)], ids=str, indirect=True)


@pytest.fixture
def case(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> Case:
    return next(c for c in cases(pytestconfig.option) if c.id == request.param)


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
def draft_of(target: Llama, pytestconfig: pytest.Config) -> Callable[[str], Draft]:
    """A draft by what `drafts` calls it; loaded once."""
    options = pytestconfig.option

    @functools.cache
    def load(name: str) -> Draft:
        if name != UNTRAINED:
            return _or_usage_error(lambda: load_draft(name, target))
        largest = max(options.block_sizes)
        return _or_usage_error(lambda: init_draft(target, num_layers=options.draft_layers, block_size=largest))

    return load


@pytest.fixture(scope="session")
def draft(draft_of: Callable[[str], Draft], pytestconfig: pytest.Config) -> Draft:
    """The first of `drafts`. So with `workload` and `facts`: what is no case takes the first of every list."""
    return draft_of(drafts(pytestconfig.option)[0])


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


def _make_workload(target: Llama, setting: Setting, options: Any) -> Workload:
    count, source, length, batch = options.num_prompts, setting.prompts, setting.prompt_len, setting.batch_size
    if count % batch:
        pytest.exit(f"--num-prompts {count} must be a multiple of --batch-size {batch}", pytest.ExitCode.USAGE_ERROR)
    stops: tuple[int, ...] = ()
    facts: dict[str, Any] = {"prompts": source}
    if source == "random":
        rng = np.random.default_rng(0)
        prompts = rng.integers(0, target.config.vocab_size, (count, length or 64)).tolist()
    else:
        try:
            tokenizer = load_tokenizer(options.target)
            stops = tokenizer.stop_token_ids
            prompt_set = load_prompts(source).take(count)
            facts["prompts_sha256"] = prompt_set.sha256
            prompts = exact_length_prompts(tokenizer, length, count, 0) if length else prompt_set.encode(tokenizer)
        except (PromptError, TokenizerError) as error:
            pytest.exit(str(error), pytest.ExitCode.USAGE_ERROR)
    if len(prompts) < count:
        pytest.exit(f"{source} has {len(prompts)} prompts, --num-prompts asks {count}", pytest.ExitCode.USAGE_ERROR)
    groups = [prompts[i : i + batch] for i in range(0, count, batch)]
    return Workload(groups=groups, stop_token_ids=stops, facts=facts)


@pytest.fixture(scope="session")
def workload_of(
    target: Llama, draft_of: Callable[[str], Draft], pytestconfig: pytest.Config
) -> Callable[[Setting], Workload]:
    """The prompts of a setting. Before anything is measured all prompts of all cases are made and checked."""
    options = pytestconfig.option
    made = {setting: _make_workload(target, setting, options) for setting in settings(options)}
    # Greedy's block more is for the scripts.
    block, budget = max(options.block_sizes), max(options.max_new_tokens)
    proposers = [draft_of(name) for name in drafts(options)]
    plans = [(None, "greedy", budget + block), *((d, "cached_block_verify", budget) for d in proposers)]
    for workload, (proposer, mode, tokens) in itertools.product(made.values(), plans):
        _or_usage_error(
            lambda w=workload, d=proposer, m=mode, n=tokens: check_request(
                target,
                d,
                [prompt for group in w.groups for prompt in group],
                mode=m,
                block_size=block,
                max_new_tokens=n,
                stop_token_ids=w.stop_token_ids,
                temperature=0.0,
                allow_larger_block=False,
            )
        )
    return made.__getitem__


@pytest.fixture(scope="session")
def workload(workload_of: Callable[[Setting], Workload], pytestconfig: pytest.Config) -> Workload:
    return workload_of(settings(pytestconfig.option)[0])


@pytest.fixture(scope="session")
def facts_of(
    device: jax.Device, workload_of: Callable[[Setting], Workload], pytestconfig: pytest.Config
) -> Callable[[str, Setting], dict[str, Any]]:
    """What identifies a draft and a setting in the results: device, versions, hashes."""
    options = pytestconfig.option
    common = {
        **device_facts(device),
        "mesh": {"dp": 1, "tp": 1},  # decoding runs on one device
        "jax": jax.__version__,
        "kernels": native.status(),
        "target": options.target,
        "target_sha256": snapshot_hash(target_directory(options.target)),
        "run_name": options.run_name or None,
    }
    hash_of = functools.cache(draft_hash)

    def facts(draft: str, setting: Setting) -> dict[str, Any]:
        trained = draft != UNTRAINED
        return {
            **common,
            "seeds": {"prompts": 0, "bootstrap": 0} | ({} if trained else {"draft": 0}),
            "draft": draft if trained else f"{UNTRAINED}, {options.draft_layers} layers, seed 0",
            "draft_sha256": hash_of(draft) if trained else None,
            **workload_of(setting).facts,
        }

    return facts


@pytest.fixture(scope="session")
def facts(facts_of: Callable[[str, Setting], dict[str, Any]], pytestconfig: pytest.Config) -> dict[str, Any]:
    options = pytestconfig.option
    return facts_of(drafts(options)[0], settings(options)[0])


@pytest.fixture(scope="session")
def steps_of(
    target: Llama, draft_of: Callable[[str], Draft], workload_of: Callable[[Setting], Workload]
) -> Callable[[Case], StepTimes]:
    """The cost model's terms up to a case's block size, half-way through its decode; timed once each."""

    @functools.cache
    def steps(draft: str, block_size: int, setting: Setting, max_new_tokens: int) -> StepTimes:
        context = workload_of(setting).mean_len + max_new_tokens // 2
        sizes = sizes_to_time(block_size)
        return time_steps(target, draft_of(draft), sizes, batch=setting.batch_size, context=context)

    return lambda case: steps(case.draft, case.block_size, case.setting, case.max_new_tokens)
