"""Topologies by name: what is refused before libtpu is asked, and where there is none."""

import importlib.util

import pytest

from dflash.compiled.topology import CHIPS, TopologyError, describe


@pytest.mark.parametrize(
    "name", ["", "v6e", "v6e:8", "v6e:2x4x1", "v5p:2x2", "v9:2x2", "v6e:0x4", "v6e:2x-4", "6e:2x4"]
)
def test_a_name_that_is_none_is_refused_with_examples(name: str) -> None:
    with pytest.raises(TopologyError, match="v6e:1x1") as refused:
        describe(name)
    assert repr(name) in str(refused.value)


def test_without_libtpu_the_install_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TopologyError, match=r'pip install "jax\[tpu\]"'):
        describe("v6e:2x4")


def test_the_compilers_bandwidth_is_no_better_than_the_published_one() -> None:
    published = {"v4": 1228e9 / 2, "v5e": 819e9, "v5p": 2765e9, "v6e": 1640e9}
    for chip in CHIPS.values():
        assert 0.6 < chip.bytes_per_cycle * chip.clock_hz / published[chip.name] <= 1
