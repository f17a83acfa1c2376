"""What drawing costs: a step with Gumbel noise, and with filters, over the greedy step of the same size."""

import jax
import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from dflash.decoding.sampling import GREEDILY, Sampling
from dflash.measuring.interval import ratio_interval
from dflash.measuring.steps import in_turn, verify_step
from dflash.models.draft import Draft
from dflash.models.llama import Llama

# What the noise alone may add to a step, as a fraction.
MOST = {"cpu": 0.15, "gpu": 0.02, "tpu": 0.02}
RULES = {
    "greedy": GREEDILY,
    "noise": Sampling(temperature=1.0),
    "filtered": Sampling(temperature=0.6, top_k=20, top_p=0.95),
}


@pytest.mark.benchmark(group="sampling")
@pytest.mark.parametrize("tokens", [1, 8])
def test_noise_costs_little_of_a_step(
    benchmark: BenchmarkFixture,
    target: Llama,
    draft: Draft,
    device: jax.Device,
    tokens: int,
    pytestconfig: pytest.Config,
) -> None:
    ids = draft.config.target_layer_ids if tokens > 1 else ()
    steps = {
        name: verify_step(target, tokens=tokens, batch=1, context=128, layer_ids=ids, sampling=rule)
        for name, rule in RULES.items()
    }
    others = {name: step for name, step in steps.items() if name != "noise"}
    taken: list[dict[str, float]] = []

    def time_others() -> None:
        """Outside the benchmark's clock, beside each step with noise."""
        taken.append({name: float(s[0]) for name, s in in_turn(others, rounds=1, warmup=0).items()})

    rounds = 4 * pytestconfig.option.rounds
    benchmark.pedantic(steps["noise"], setup=time_others, rounds=rounds, warmup_rounds=2)
    if not benchmark.stats:
        return
    greedy, filtered = (np.array([t[name] for t in taken[-rounds:]]) for name in ("greedy", "filtered"))
    cost, low, high = ratio_interval(np.array(benchmark.stats.stats.data), greedy)
    of_filters = ratio_interval(filtered, greedy)
    benchmark.extra_info.update(case=f"noise-s{tokens}", noise=(cost, low, high), filtered=of_filters)
    most = MOST[device.platform]
    assert low <= 1 + most, f"noise makes a step of {tokens} tokens {cost:.3f} ({low:.3f} to {high:.3f}) times as long"
