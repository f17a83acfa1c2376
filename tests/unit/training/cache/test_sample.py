"""The target's own text, greedily and drawn, against its cacheless forward."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dflash.decoding.sampling import Sampling
from dflash.training.cache.sample import CHUNK, Sampler
from dflash.weights.load import load_target
from dflash.weights.tiny import write_tiny_target

BATCH, BUDGET, LONGEST = 4, 10, CHUNK + 30
LENGTHS = (1, 7, LONGEST)


@pytest.fixture(scope="module", params=["llama", "gpt_oss"])
def target(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("sample") / request.param
    return load_target(write_tiny_target(directory, request.param))


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 199, n).tolist() for n in LENGTHS]


def sampler(target, **changes):
    settings = {"batch": BATCH, "max_prompt_len": LONGEST, "max_new_tokens": BUDGET} | changes
    return Sampler(target, **settings)


def plain_greedy(target, prompt, offset=0):
    row = list(prompt)
    for _ in range(BUDGET):
        padded = np.zeros((1, LONGEST + BUDGET), np.int32)
        padded[0, : len(row)] = row
        logits, _ = target.forward(padded, positions=offset + np.arange(padded.shape[1])[None])
        row.append(int(np.asarray(logits)[0, len(row) - 1].argmax()))
    return row[len(prompt) :]


def test_without_a_temperature_it_is_greedy(target, prompts):
    offsets = [0, 70000, 500]
    rows = sampler(target).run(prompts, indices=range(3), offsets=offsets)
    assert rows == [plain_greedy(target, p, o) for p, o in zip(prompts, offsets, strict=True)]
    assert len(set(itertools.chain(*rows))) > 8


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bfloat16_target_chooses_among_float32_logits(temperature, prompts, tmp_path):
    low = load_target(write_tiny_target(tmp_path / "llama", "llama"), "bfloat16")
    x = jax.random.normal(jax.random.key(0), (low.config.hidden_size, 64), jnp.bfloat16)
    logits = low.logits(x, jnp.float32)
    assert logits.dtype == jnp.float32
    rounded = logits.astype(jnp.bfloat16)
    np.testing.assert_array_equal(rounded, low.logits(x))
    assert (logits.argmax(axis=0) != rounded.argmax(axis=0)).any()  # as rounded logits would have it
    rows = sampler(low, sampling=Sampling(temperature=temperature)).run(prompts, indices=range(3))
    assert [len(row) for row in rows] == [BUDGET] * 3


def test_a_stop_token_ends_a_row_and_no_other(target, prompts):
    whole = sampler(target).run(prompts, indices=range(3))
    stop = whole[1][4]
    rows = sampler(target, stop_token_ids=(stop,)).run(prompts, indices=range(3))
    assert rows == [row[: row.index(stop) + 1] if stop in row else row for row in whole]
    assert len(rows[1]) <= 5


def test_a_row_depends_on_the_seed_and_its_number_alone(target, prompts):
    drawn = sampler(target, sampling=Sampling(temperature=1.0, seed=3))
    rows = drawn.run(prompts, indices=[5, 6, 7])
    assert drawn.run(prompts, indices=[5, 6, 7]) == rows
    assert drawn.run([prompts[2], prompts[0]], indices=[7, 5]) == [rows[2], rows[0]]
    assert drawn.run(prompts, indices=[8, 9, 10]) != rows
    assert sampler(target, sampling=Sampling(temperature=1.0, seed=4)).run(prompts, indices=[5, 6, 7]) != rows


def test_least_share_of_one_leaves_only_the_likeliest(target, prompts):
    drawn = sampler(target, sampling=Sampling(temperature=2.0, min_p=1.0))
    assert drawn.run(prompts, indices=range(3)) == sampler(target).run(prompts, indices=range(3))


@pytest.mark.parametrize("min_p", [0.0, 0.3])
def test_tokens_come_as_often_as_they_are_likely(target, min_p):
    temperature, count = 1.5, 3000
    sampling = Sampling(temperature=temperature, min_p=min_p, seed=1)
    drawn = Sampler(target, batch=1000, max_prompt_len=3, max_new_tokens=1, sampling=sampling)
    rows = [drawn.run([[3, 1, 4]] * 1000, indices=range(i, i + 1000)) for i in range(0, count, 1000)]
    seen = np.bincount(np.array(rows).ravel(), minlength=199)
    logits, _ = target.forward(np.array([[3, 1, 4]]))
    scores = np.asarray(logits, np.float64)[0, -1] / temperature
    chances = np.exp(scores - scores.max())
    chances = np.where(chances >= min_p, chances, 0)
    chances /= chances.sum()
    assert seen[chances == 0].sum() == 0
    likely = chances * count >= 5
    got, expected = seen[likely], chances[likely] * count
    rest = count - got.sum(), count - expected.sum()
    if rest[1] > 5:
        got, expected = [*got, rest[0]], [*expected, rest[1]]
    else:
        expected *= got.sum() / expected.sum()
    assert stats.chisquare(got, expected).pvalue > 1e-3


def test_prompts_that_do_not_fit_are_a_callers_mistake(target):
    with pytest.raises(ValueError, match="1 to 4 prompts of 1 to"):
        sampler(target).run([[]], indices=[0])
