"""What every benchmark shares: target, drafts, prompts, and what identifies them in the results."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
import pytest

from dflash import Tokenizer, decode, init_draft, load_draft, load_target
from dflash.cli.pytest_options import open_tokenizer, protocol_name, take_prompts
from dflash.config import UserError
from dflash.decoding.decode import check_request
from dflash.decoding.modes import BLOCK, GREEDY
from dflash.decoding.sampling import Sampling
from dflash.host.device import device_facts
from dflash.measuring.cases import Case, ChosenDraft, PromptSetting, cases, chosen_drafts, prompt_settings
from dflash.measuring.cost_model import StepTimes, sizes_to_time
from dflash.measuring.protocol import OURS
from dflash.measuring.steps import time_steps
from dflash.measuring.sweep import PromptGroups
from dflash.models import native
from dflash.models.draft import Draft, proposing
from dflash.models.llama import Llama
from dflash.models.mesh import open_mesh
from dflash.text.lengths import exact_length_prompts
from dflash.text.prompts import Prompt, ids_sha256
from dflash.weights.load import UNTRAINED, draft_hash, target_directory
from dflash.weights.snapshot import snapshot_hash

# What is said to each of some prompts.
Answers: TypeAlias = Callable[[Tokenizer, Sequence[Prompt]], list[str]]


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
    except UserError as error:
        pytest.exit(str(error), returncode=pytest.ExitCode.USAGE_ERROR)
    except OSError as error:
        pytest.exit(f"{error.filename}: {error.strerror}", returncode=pytest.ExitCode.USAGE_ERROR)


@pytest.fixture(scope="session")
def sampling(pytestconfig: pytest.Config) -> Sampling:
    """How tokens are drawn."""
    return Sampling.of(pytestconfig.option)


@pytest.fixture(scope="session")
def target(device: jax.Device, pytestconfig: pytest.Config) -> Llama:
    options = pytestconfig.option

    def load() -> Llama:
        return load_target(options.target, options.dtype, open_mesh(device, dp=options.dp, tp=options.tp))

    return _or_usage_error(load)


@pytest.fixture(scope="session")
def draft_of(target: Llama, pytestconfig: pytest.Config) -> Callable[[ChosenDraft], Draft]:
    """One of `chosen_drafts`; each draft is loaded once, whatever it proposes."""
    options = pytestconfig.option

    @functools.cache
    def load(name: str) -> Draft:
        if name != UNTRAINED:
            return _or_usage_error(lambda: load_draft(name, target))
        largest = max(options.block_sizes)
        return _or_usage_error(lambda: init_draft(target, num_layers=options.draft_layers, block_size=largest))

    return functools.cache(lambda chosen: _or_usage_error(lambda: proposing(load(chosen.name), chosen.vocab)))


@pytest.fixture(scope="session")
def draft(draft_of: Callable[[ChosenDraft], Draft], pytestconfig: pytest.Config) -> Draft:
    """The first of `drafts`: benchmarks without cases take the first of every list."""
    return draft_of(chosen_drafts(pytestconfig.option)[0])


@pytest.fixture(scope="session")
def answers(target: Llama, pytestconfig: pytest.Config) -> Answers:
    """The target's own answers: what a draft does not change is decoded once, before anything is measured."""
    budget = max(pytestconfig.option.max_new_tokens)

    def answers(tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> list[str]:
        spoken = []
        for prompt in prompts:
            row, stops = prompt.encode(tokenizer), tokenizer.stop_token_ids
            made = decode(target, None, [row], mode=GREEDY.name, max_new_tokens=budget, stop_token_ids=stops)
            spoken.append(tokenizer.decode(made.tokens[0]))
        return spoken

    return answers


def _make_workload(target: Llama, answers: Answers, setting: PromptSetting, options: Any) -> PromptGroups:
    count, source, length, batch = options.num_prompts, setting.prompts, setting.prompt_len, setting.batch_size
    if count % batch and options.protocol == OURS.name:
        pytest.exit(f"--num-prompts {count} must be a multiple of --batch-size {batch}", pytest.ExitCode.USAGE_ERROR)
    stops: tuple[int, ...] = ()
    facts: dict[str, Any] = {"prompts": source, "protocol": protocol_name(options)}
    if source == "random":
        rng = np.random.default_rng(0)
        prompts = rng.integers(0, target.config.vocab_size, (count, length or 64)).tolist()
    else:
        try:
            tokenizer = open_tokenizer(options)
            stops = tokenizer.stop_token_ids
            prompt_set = take_prompts(options, source)
            facts |= tokenizer.facts
            count = len(prompt_set.prompts)
            if length:
                prompts = exact_length_prompts(tokenizer, length, count, 0)
            else:
                prompts = prompt_set.turn_by_turn(functools.partial(answers, tokenizer)).encode(tokenizer)
        except UserError as error:
            pytest.exit(str(error), pytest.ExitCode.USAGE_ERROR)
    if len(prompts) % batch:
        reason = f"the turns of {source} are {len(prompts)} prompts, no multiple of --batch-size {batch}"
        pytest.exit(reason, pytest.ExitCode.USAGE_ERROR)
    facts["prompts_sha256"] = ids_sha256(prompts)
    groups = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
    return PromptGroups(groups=groups, stop_token_ids=stops, facts=facts)


@pytest.fixture(scope="session")
def workload_of(
    target: Llama,
    draft_of: Callable[[ChosenDraft], Draft],
    answers: Answers,
    sampling: Sampling,
    pytestconfig: pytest.Config,
) -> Callable[[PromptSetting], PromptGroups]:
    """The prompts of a setting. All prompts of all cases are made and checked before anything is measured."""
    options = pytestconfig.option
    made = {setting: _make_workload(target, answers, setting, options) for setting in prompt_settings(options)}
    # Greedy decoding goes one block further, for the scripts.
    block, budget = max(options.block_sizes), max(options.max_new_tokens)
    proposers = [draft_of(chosen) for chosen in chosen_drafts(options)]
    plans = [(None, GREEDY.name, budget + block), *((d, BLOCK.name, budget) for d in proposers)]
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
                sampling=sampling,
            )
        )
    return made.__getitem__


@pytest.fixture(scope="session")
def workload(workload_of: Callable[[PromptSetting], PromptGroups], pytestconfig: pytest.Config) -> PromptGroups:
    return workload_of(prompt_settings(pytestconfig.option)[0])


@pytest.fixture(scope="session")
def facts_of(
    device: jax.Device,
    draft_of: Callable[[ChosenDraft], Draft],
    workload_of: Callable[[PromptSetting], PromptGroups],
    sampling: Sampling,
    pytestconfig: pytest.Config,
) -> Callable[[ChosenDraft, PromptSetting], dict[str, Any]]:
    """What identifies a draft and a setting in the results: device, versions, hashes."""
    options = pytestconfig.option
    common = {
        **device_facts(device, dp=options.dp, tp=options.tp),
        "jax": jax.__version__,
        "kernels": _or_usage_error(lambda: native.status(device.platform, options.dp * options.tp)),
        "target": options.target,
        "target_sha256": snapshot_hash(target_directory(options.target)),
        "run_name": options.run_name,
        "sampling": sampling.facts,
    }
    hash_of = functools.cache(draft_hash)

    def facts(draft: ChosenDraft, setting: PromptSetting) -> dict[str, Any]:
        trained = draft.name != UNTRAINED
        return {
            **common,
            "seeds": {"prompts": 0, "bootstrap": 0} | ({} if trained else {"draft": 0}),
            "draft": draft.name if trained else f"{UNTRAINED}, {options.draft_layers} layers, seed 0",
            "draft_sha256": hash_of(draft.name) if trained else None,
            "draft_vocab_size": draft_of(draft).config.num_tokens,
            **workload_of(setting).facts,
        }

    return facts


@pytest.fixture(scope="session")
def facts(
    facts_of: Callable[[ChosenDraft, PromptSetting], dict[str, Any]], pytestconfig: pytest.Config
) -> dict[str, Any]:
    options = pytestconfig.option
    return facts_of(chosen_drafts(options)[0], prompt_settings(options)[0])


@pytest.fixture(scope="session")
def steps_of(
    target: Llama,
    draft_of: Callable[[ChosenDraft], Draft],
    workload_of: Callable[[PromptSetting], PromptGroups],
    sampling: Sampling,
) -> Callable[[Case], StepTimes]:
    """The cost model's terms up to a case's block size, halfway through its decode; timed once each."""

    @functools.cache
    def steps(draft: ChosenDraft, block_size: int, setting: PromptSetting, max_new_tokens: int) -> StepTimes:
        context = workload_of(setting).mean_len + max_new_tokens // 2
        sizes = sizes_to_time(block_size)
        terms = {"batch": setting.batch_size, "context": context, "sampling": sampling}
        return time_steps(target, draft_of(draft), sizes, **terms)

    return lambda case: steps(case.draft, case.block_size, case.setting, case.max_new_tokens)
