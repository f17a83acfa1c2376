"""Is decoding lossless on this device? Every token and every cache of bfloat16 decoding, audited (docs/lossless.md)."""

import jax
import numpy as np
import pytest
from flax import nnx

from dflash import init_draft, load_target, load_tokenizer
from dflash.decoding.audit import audit
from dflash.host.device import device_facts
from dflash.measuring.result import AuditResult, from_json
from dflash.report.sections import audit_details, render
from dflash.text.prompts import load_prompts
from dflash.weights.tiny import write_tiny_target

# One prompt begins beyond GPT-OSS's tiny window of 16, one grows past it, one is a lone token.
PROMPT_LENGTHS = (40, 3, 1)


@pytest.fixture
def check(device, results):
    """No defect; what this device rounds differently goes into the results of the run."""

    def check(case, found):
        result = from_json(device_facts(device) | {"case": case} | found.figures(), AuditResult)
        results.audits.append(result)
        print(*render(audit_details(result)), sep="\n")
        assert found.defects == []

    return check


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_oss"])
def test_bfloat16_is_lossless_up_to_near_ties(family, tmp_path, check):
    target = load_target(write_tiny_target(tmp_path / "target", family), "bfloat16")
    draft = init_draft(target, num_layers=2, block_size=8, target_layer_ids=(1, 3))
    nnx.update(draft, jax.tree.map(lambda w: 30 * w if w.ndim == 2 else w, nnx.state(draft)))
    rng = np.random.default_rng(7)
    prompts = [rng.integers(0, target.config.vocab_size, length).tolist() for length in PROMPT_LENGTHS]
    found = audit(target, draft, prompts, max_new_tokens=40)
    assert found.tokens == 6 * len(prompts) * 40
    check(f"tiny {family}", found)


@pytest.mark.model
def test_smollm2_is_lossless_up_to_near_ties(check):
    target = load_target("smollm2-135m", "bfloat16")
    prompts = load_prompts("builtin").take(1).encode(load_tokenizer("smollm2-135m"))
    check("smollm2-135m", audit(target, init_draft(target, num_layers=1, block_size=8), prompts, max_new_tokens=48))
