"""The cases of a sweep: every combination of mode, block size, token budget, batch size, prompts, draft, vocabulary.

A case's id names its mode, block size, budget and proposer, and from the other lists only values that are not the
first:

    block-b8-n64-draft               the first of every list
    block-b8-n64-k4-p512-qa-draft    batches of 4, prompts of 512 tokens (p0: as they are), from qa.jsonl
    block-b8-n64-b-qa.jsonl-draft    prompts from b/qa.jsonl, where an earlier set is called qa already
    block-b8-n64-draft2              the second trained draft; a7 is scripted: 7 tokens of every block are right
    block-b8-n64-draft-v4096         the draft proposing 4096 tokens (vnone: those that it was trained with)

So one value in each list gives the shortest ids, and a value added at the end of a list changes none.
"""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from dflash.config import DraftVocab
from dflash.decoding.modes import VERIFYING, Mode
from dflash.weights.load import UNTRAINED, default_draft


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PromptSetting:
    """Which prompts are decoded, and how many together."""

    prompts: str
    prompt_len: int
    batch_size: int


class ChosenDraft(NamedTuple):
    """A draft by name, and how many tokens it proposes: a number, all, or None for those it was trained with."""

    name: str
    vocab: DraftVocab | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One line of the speed-up table. `scripted` None decodes with the draft's own proposals.

    A `brief` case stands beside a trained draft's own, and shows the machine or the equality of its tokens: it takes
    fewer prompts.
    """

    id: str
    mode: Mode
    block_size: int
    max_new_tokens: int
    proposer: str
    scripted: int | None
    draft: ChosenDraft
    setting: PromptSetting
    brief: bool = False

    @property
    def workload(self) -> tuple[PromptSetting, int]:
        """Cases of one workload are paired with the same greedy baseline."""
        return self.setting, self.max_new_tokens


def drafts(options: Any) -> list[str]:
    """The named drafts; without any, the one that comes with the target, or else an untrained one."""
    return options.draft or [default_draft(options.target) or UNTRAINED]


def chosen_drafts(options: Any) -> list[ChosenDraft]:
    """Every named draft with every size of vocabulary; the size changes first."""
    return [ChosenDraft(*pair) for pair in itertools.product(drafts(options), options.draft_vocab_size or [None])]


def prompt_settings(options: Any) -> list[PromptSetting]:
    """Every combination, in the order of the lists; the batch size changes first."""
    return [
        PromptSetting(prompts=prompts, prompt_len=length, batch_size=batch)
        for prompts, length, batch in itertools.product(options.prompts, options.prompt_len, options.batch_size)
    ]


def _source_names(sources: Sequence[str]) -> dict[str, str]:
    """Each but the first by its file's name, or by the whole of it where an earlier one has that name."""
    names: dict[str, str] = {}
    for source in sources[1:]:
        short, whole = (re.sub(r"[^\w.]+", "-", text) for text in (PurePath(source).stem, source))
        names[source] = whole.strip("-") if short in names.values() else short
    return names


def _named(setting: PromptSetting, first: PromptSetting, names: dict[str, str]) -> str:
    """The part of an id for values that are not the first of their list."""
    parts = {
        "batch_size": f"k{setting.batch_size}",
        "prompt_len": f"p{setting.prompt_len}",
        "prompts": names.get(setting.prompts),
    }
    return "".join(f"-{text}" for name, text in parts.items() if getattr(setting, name) != getattr(first, name))


def _proposers(mode: Mode, drafts: Sequence[ChosenDraft], block_size: int) -> list[tuple[str, ChosenDraft, int | None]]:
    """Name, draft and script: each draft itself, and scripted acceptances, which show the machine's ceiling.

    A scripted case costs what the first draft costs.
    """
    trained = list(dict.fromkeys(d.name for d in drafts if d.name != UNTRAINED))
    names = {d: "draft" if i == 0 else f"draft{i + 1}" for i, d in enumerate(trained)} | {UNTRAINED: UNTRAINED}

    def named(draft: ChosenDraft) -> str:
        return names[draft.name] + ("" if draft.vocab == drafts[0].vocab else f"-v{draft.vocab}".lower())

    own: list[tuple[str, ChosenDraft, int | None]] = [(named(d), d, None) for d in drafts]
    lengths = (block_size - 1) // 2, block_size - 1
    scripts: list[tuple[str, ChosenDraft, int | None]] = [(f"a{a}", drafts[0], a) for a in lengths]
    if mode.whole:
        return [*own, *scripts]
    # Token by token is for correctness: a trained draft shows it, of an untrained one nothing would ever be accepted.
    return own if drafts[0].name != UNTRAINED else [*own, scripts[-1]]


def cases(options: Any) -> list[Case]:
    """Every case that the options ask for, with those of one workload side by side."""
    every, names = prompt_settings(options), _source_names(options.prompts)
    return [
        Case(
            id=f"{mode.short}-b{block}-n{budget}{_named(setting, every[0], names)}-{name}",
            mode=mode,
            block_size=block,
            max_new_tokens=budget,
            proposer=name,
            scripted=scripted,
            draft=draft,
            setting=setting,
            brief=drafts(options)[0] != UNTRAINED and (scripted is not None or not mode.whole),
        )
        for setting, budget, block in itertools.product(every, options.max_new_tokens, options.block_sizes)
        for mode in VERIFYING
        for name, draft, scripted in _proposers(mode, chosen_drafts(options), block)
    ]
