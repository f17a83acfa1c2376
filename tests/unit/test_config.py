"""What a draft reads of its target by default."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash.config import ConfigError, build_target_layer_ids, counted_faults, fault_list


@pytest.mark.parametrize(
    ("layers", "features", "ids"),
    [
        (24, 1, (12,)),
        (24, 4, (1, 8, 14, 21)),
        (24, 5, (1, 6, 11, 16, 21)),
        (36, 4, (1, 12, 22, 33)),
        (36, 5, (1, 9, 17, 25, 33)),
        (36, 1, (18,)),
        (1, 1, (0,)),
        (8, 5, (1, 2, 3, 4, 5)),
    ],
)
def test_target_layer_ids_of_published_models(layers, features, ids):
    assert build_target_layer_ids(layers, features) == ids


@pytest.mark.parametrize(("layers", "features"), [(2, 2), (4, 2), (5, 3), (8, 6), (24, 0)])
def test_layers_too_few_to_tell_the_features_apart(layers, features):
    with pytest.raises(ConfigError, match=rf"{features} .*{layers} layers .*target_layer_ids"):
        build_target_layer_ids(layers, features)


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 200), st.integers(1, 60))
def test_target_layer_ids_are_different_layers_of_the_target(layers, features):
    try:
        ids = build_target_layer_ids(layers, features)
    except ConfigError:
        assert layers - 3 < features
    else:
        assert len(set(ids)) == len(ids) == features
        assert set(ids) <= set(range(layers))


def test_many_faults_are_told_briefly():
    few = [f"missing layers.{i}.weight [4]" for i in range(10)]
    assert fault_list(few) == "; ".join(few)
    layers = [f"missing layers.{i}.{part}.weight [{i}]" for part in ("up", "down") for i in range(250)]
    other = [f"unexpected {chr(97 + i)}" for i in range(20)]
    said = fault_list(layers + other)
    first, second, third = said.split("; ")[:3]
    assert first == "missing layers.0.up.weight [0] and 249 like it"
    assert (second, third) == ("unexpected a", "missing layers.0.down.weight [0] and 249 like it")
    assert said.endswith("; and 12 more")
    assert said.count("; ") == 10
    assert len(fault_list(["x" * 10**6] * 3)) < 1000


def test_the_number_of_faults_is_said_as_one_says_it():
    assert counted_faults(["a is missing"]) == "(1 fault): a is missing"
    assert counted_faults(["a is 1", "b is 2"]) == "(2 faults): a is 1; b is 2"
    assert counted_faults([f"missing x.{i}" for i in range(30)]) == "(30 faults): missing x.0 and 29 like it"
