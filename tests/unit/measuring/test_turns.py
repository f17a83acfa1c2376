"""Cases in turn: who is paired with which greedy round, when rounds end, and what becomes of a case that fails."""

import re

import pytest

from dflash import RequestError
from dflash.measuring.paired import PairedRun
from dflash.measuring.turns import Failure, attempt, take_turns


class Greedy:
    """In the place of greedy decoding: counts its rounds."""

    def __init__(self, order=None, fails_at=None, groups=1):
        self.rounds, self.fails_at = 0, fails_at
        self.order, self.groups = [] if order is None else order, range(groups)

    def decode(self, group):
        self.rounds += group == 0
        self.order += ["-"]
        if self.rounds == self.fails_at:
            raise MemoryError


class Run(PairedRun):
    """In the place of a case: notes the greedy rounds it is paired with. `wide` are rounds to add, as it is asked."""

    def __init__(self, greedy, name, order, wide=(), fails_at=None):
        self.greedy, self.name, self.order = greedy, name, order
        self.beside, self.asked, self.wide, self.fails_at = [], [], list(wide), fails_at
        self.rounds, self.groups, self.brief = 0, len(greedy.groups), False

    def pair(self):
        self.beside.append(self.greedy.rounds)

    def decode(self, group):
        self.rounds += group == 0
        self.order.append(self.name)
        if self.rounds == self.fails_at:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.\nand much more")

    def rounds_to_add(self, rounds, precision):
        self.asked.append((rounds, precision))
        return self.wide.pop(0) if self.wide else 0


def turns(greedy, runs, **more):
    settings = {"rounds": 3, "precision": 0.05, "time_limit_s": 60} | more
    return take_turns(greedy, {run.name: lambda run=run: run for run in runs}, **settings)


def test_one_greedy_round_serves_every_case():
    order = []
    greedy = Greedy(order)
    a, b, c = runs = [Run(greedy, name, order) for name in "abc"]
    assert turns(greedy, runs) == {"a": a, "b": b, "c": c}
    assert greedy.rounds == 4  # one of warm-up
    assert a.beside == b.beside == c.beside == [2, 3, 4]
    # The first case is next to greedy decoding, before and after it by turns; the others stand around.
    assert "".join(order) == "ca-b" + "b-ac" + "ca-b" + "b-ac"


def test_each_group_has_its_turn_of_every_case():
    """So what is compared lies as close together as can be."""
    order = []
    greedy = Greedy(order, groups=2)
    runs = [Run(greedy, name, order) for name in "abc"]
    turns(greedy, runs, rounds=2)
    assert "".join(order) == "ca-b" + "b-acb-ac" + "ca-bca-b"
    assert runs[0].beside == [2, 3]


def test_a_case_of_fewer_groups_is_left_out_of_the_others():
    order = []
    greedy = Greedy(order, groups=3)
    whole, brief = runs = [Run(greedy, "w", order), Run(greedy, "b", order)]
    brief.groups = 1
    turns(greedy, runs, rounds=2)
    assert "".join(order) == "w-b" + "b-w-w-w" + "w-bw-w-"
    assert whole.beside == brief.beside == [2, 3]


def test_rounds_are_added_for_the_cases_that_need_them():
    greedy, order = Greedy(), []
    narrow, wide = runs = Run(greedy, "n", order), Run(greedy, "w", order, wide=[2, 1])
    turns(greedy, runs)
    assert narrow.beside == [2, 3, 4]
    assert wide.beside == [2, 3, 4, 5, 6, 7]
    assert wide.asked == [(3, 0.05), (5, 0.05), (6, 0.05)]


def test_time_ends_the_rounds(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("dflash.measuring.turns.time.monotonic", lambda: next(clock))
    greedy = Greedy()
    run = Run(greedy, "a", [], wide=[100])
    turns(greedy, [run], time_limit_s=4)
    assert len(run.beside) == 3 + 3
    patient = [Run(greedy, name, [], wide=[100]) for name in "ab"]
    turns(greedy, patient, time_limit_s=4)  # of each
    assert len(patient[0].beside) == 3 + 7
    none = Run(greedy, "a", [], wide=[100])
    turns(greedy, [none], time_limit_s=0)
    assert (len(none.beside), none.asked) == (3, [])


def test_without_a_baseline_nothing_is_decoded_greedily():
    greedy = Greedy()
    run = Run(greedy, "a", [])
    turns(greedy, [run], baseline=False)
    assert (greedy.rounds, run.rounds) == (0, 4)


@pytest.mark.parametrize("at", [1, 3])
def test_a_case_that_fails_leaves_and_the_others_go_on(at):
    greedy, order = Greedy(), []
    failing, other = runs = Run(greedy, "f", order, fails_at=at), Run(greedy, "o", order)
    outcome = turns(greedy, runs)
    assert isinstance(outcome["f"], Failure)
    assert re.match("out of memory: .*allocating 7 bytes", outcome["f"].sentence)
    assert failing.rounds == at
    assert len(failing.beside) == max(at - 2, 0)
    assert outcome["o"] is other
    assert other.beside == [2, 3, 4]


def test_a_case_that_can_not_be_made_fails_alone():
    greedy = Greedy()
    run = Run(greedy, "a", [])

    def refuse():
        raise RequestError("block_size 5 is above the 4")

    settings = {"rounds": 1, "precision": 0, "time_limit_s": 0}
    outcome = take_turns(greedy, {"b": refuse, "a": lambda: run}, **settings)
    assert outcome == {"b": Failure(sentence="RequestError: block_size 5 is above the 4"), "a": run}
    take_turns(greedy, {"b": refuse}, **settings)
    assert greedy.rounds == 2  # there was nothing to pair with the second time


def test_without_its_baseline_no_case_counts():
    greedy = Greedy(fails_at=2)
    outcome = turns(greedy, [Run(greedy, "a", []), Run(greedy, "b", [])])
    assert outcome == {name: Failure(sentence="its greedy baseline: out of memory") for name in "ab"}
    assert greedy.rounds == 2


def test_a_sentence_has_no_folder_and_a_bug_has_its_place():
    def wrong():
        raise KeyError("/home/somebody/models/x.safetensors\nis not there")

    failure = attempt(wrong)
    assert "somebody" not in failure.sentence
    assert failure.sentence.startswith("KeyError: ")
    assert "x.safetensors" in failure.sentence
    assert "in wrong" in failure.trace
    assert attempt(lambda: 7) == 7


def test_ctrl_c_is_no_failure():
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt(stop)
