"""The cases of a sweep: which there are, what they are called, and that names stay."""

import itertools
from types import SimpleNamespace

import pytest

from dflash.measuring.cases import cases, chosen_drafts, drafts

FIRST = {
    "target": "smollm2-135m",
    "draft": ["untrained"],
    "draft_vocab_size": None,
    "prompts": ["builtin"],
    "prompt_len": [0],
    "batch_size": [1],
    "block_sizes": [8],
    "max_new_tokens": [64],
}


def sweep(**lists):
    return cases(SimpleNamespace(**(FIRST | lists)))


def ids(**lists):
    return [case.id for case in sweep(**lists)]


def test_one_value_in_each_list():
    every = ["block-b8-n64-untrained", "block-b8-n64-a3", "block-b8-n64-a7", "seq-b8-n64-untrained", "seq-b8-n64-a7"]
    assert ids() == every
    # Which one it is does not matter.
    assert ids(batch_size=[32], prompt_len=[512], prompts=["random"]) == every
    trained = ["block-b8-n64-draft", "block-b8-n64-a3", "block-b8-n64-a7", "seq-b8-n64-draft"]
    assert ids(draft=["runs/x"]) == trained


@pytest.mark.parametrize(
    ("target", "named", "decodes"),
    [
        ("smollm2-135m", None, ["smollm2-135m"]),
        ("some/target", None, ["untrained"]),
        ("smollm2-135m", ["untrained"], ["untrained"]),
        ("smollm2-135m", ["runs/x", "smollm2-135m"], ["runs/x", "smollm2-135m"]),
        ("some/target", ["runs/x"], ["runs/x"]),
    ],
)
def test_the_draft_that_comes_with_a_target_decodes_it_unless_another_is_named(target, named, decodes):
    assert drafts(SimpleNamespace(target=target, draft=named)) == decodes
    assert {case.draft.name for case in sweep(target=target, draft=named)} == set(decodes)


def test_the_draft_that_comes_with_a_target_is_a_trained_one():
    assert ids(draft=None) == ids(draft=["runs/x"])


@pytest.mark.parametrize(
    ("lists", "named"),
    [
        ({"batch_size": [1, 4]}, "block-b8-n64-k4-untrained"),
        ({"prompt_len": [512, 0]}, "block-b8-n64-p0-untrained"),
        ({"prompts": ["builtin", "folder/qa one.jsonl"]}, "block-b8-n64-qa-one-untrained"),
        ({"prompts": ["random", "builtin:code"]}, "block-b8-n64-builtin-code-untrained"),
        ({"prompts": ["random", "hf:openai/gsm8k"]}, "block-b8-n64-gsm8k-untrained"),
        ({"block_sizes": [8, 16]}, "seq-b16-n64-a15"),
        ({"max_new_tokens": [64, 256]}, "block-b8-n256-a7"),
        ({"draft": ["untrained", "runs/x", "runs/y"]}, "block-b8-n64-draft2"),
    ],
)
def test_a_value_that_is_added_changes_no_id(lists, named):
    assert named in ids(**lists)
    assert named not in ids(**{name: values[:1] for name, values in lists.items()})
    for longer in (lists, lists | {"batch_size": [1, 2, 4]}, lists | {"max_new_tokens": [64, 128, 256]}):
        assert set(ids(**{name: values[:1] for name, values in lists.items()})) <= set(ids(**longer))


def test_a_draft_with_several_vocabularies():
    """Sizes are named but the first; what is scripted costs what the first costs."""
    found = sweep(draft=["runs/x", "runs/y"], draft_vocab_size=[4096, "all"])
    own = {c.proposer: c.draft for c in found if c.scripted is None}
    assert own == {
        "draft": ("runs/x", 4096),
        "draft-vall": ("runs/x", "all"),
        "draft2": ("runs/y", 4096),
        "draft2-vall": ("runs/y", "all"),
    }
    assert {c.draft for c in found if c.scripted is not None} == {("runs/x", 4096)}
    assert len({c.id for c in found}) == len(found)
    assert chosen_drafts(SimpleNamespace(**FIRST)) == [("untrained", None)]


def test_sets_of_the_same_name_are_told_apart_and_the_earlier_one_keeps_its_id():
    prompts = ["a/qa.jsonl", "gsm8k", "b/qa.jsonl", "../c/qa.jsonl", "hf:openai/gsm8k"]
    found = [case.id for case in sweep(prompts=prompts) if case.proposer == "untrained" and case.mode.whole]
    named = ["", "-gsm8k", "-qa", "-..-c-qa.jsonl", "-hf-openai-gsm8k"]
    assert found == [f"block-b8-n64{name}-untrained" for name in named]
    assert set(ids(prompts=prompts[:3])) <= set(ids(prompts=prompts))


def test_every_combination_once():
    lists = {"batch_size": [1, 4], "prompt_len": [0, 512], "prompts": ["builtin", "random"]}
    found = sweep(**lists, block_sizes=[4, 8], max_new_tokens=[64, 256])
    assert len({case.id for case in found}) == len(found) == 2**5 * 5
    assert "block-b4-n256-k4-p512-random-a3" in {case.id for case in found}
    assert len({(c.mode.name, c.block_size, c.proposer, c.workload) for c in found}) == len(found)
    # Cases of one workload follow each other: they are measured together.
    changes = sum(a.workload != b.workload for a, b in itertools.pairwise(found))
    assert changes + 1 == len({case.workload for case in found}) == 2**4


def test_drafts_share_their_baseline_and_the_first_is_scripted():
    found = sweep(draft=["runs/x", "untrained", "runs/y"])
    assert len({case.workload for case in found}) == 1
    proposers = {(c.mode.short, c.proposer): (c.draft.name, c.scripted) for c in found}
    assert proposers == {
        ("block", "draft"): ("runs/x", None),
        ("block", "untrained"): ("untrained", None),
        ("block", "draft2"): ("runs/y", None),
        ("block", "a3"): ("runs/x", 3),
        ("block", "a7"): ("runs/x", 7),
        ("seq", "draft"): ("runs/x", None),
        ("seq", "untrained"): ("untrained", None),
        ("seq", "draft2"): ("runs/y", None),
    }
