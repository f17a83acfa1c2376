"""The suite notices what it is there for: each known fault, put into a copy of the package, fails the tests named here.

A fault is one replacement in one file. Every one of them was made by somebody once.
"""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Fault:
    """`right` in `file` becomes `wrong`; `tests` (a file, and what -k selects in it) must fail then."""

    name: str
    file: str
    right: str
    wrong: str
    tests: str
    only: str
    oracle: bool = False


_LAYER = "            x, cache = layer(x, rope, masks, cache)\n"
_KEEP = "            if i in layer_ids:\n                outputs[i] = x\n"

FAULTS = [
    Fault(
        "one token too many is committed",
        "decoding/loop.py",
        "cache=cache.commit(produced),",
        "cache=cache.commit(produced + 1),",
        "decoding/test_loop.py",
        "tokens_are_the_targets_own and llama",
    ),
    Fault(
        "the draft's cache keeps what was refused",
        "decoding/loop.py",
        "draft_cache.commit(produced)",
        "draft_cache.commit(jnp.full_like(produced, predictions.shape[1]))",
        "decoding/test_loop.py",
        "cacheless_drafts",
    ),
    Fault(
        "the wrong mask token",
        "decoding/loop.py",
        "draft.config.mask_token_id, jnp.int32)",
        "draft.config.mask_token_id - 1, jnp.int32)",
        "decoding/test_loop.py",
        "cacheless_drafts",
    ),
    Fault(
        "a clock that does not wait for the device",
        "decoding/loop.py",
        "return jax.block_until_ready(self._loop(self._weights, state, last))",
        "return self._loop(self._weights, state, last)",
        "measuring/test_paired.py",
        "the_clock_waits",
    ),
    Fault(
        "a baseline through the verify kernel",
        "measuring/greedy.py",
        "compiled_decoder(self.target, None, shape)",
        "compiled_decoder(self.target, __import__('dflash').init_draft(self.target), "
        "dataclasses.replace(shape, mode='cached_block_verify', block_size=8))",
        "measuring/test_greedy.py",
        "baseline_is_the_one_token_step",
    ),
    Fault(
        "a ring that ends before its last tile",
        "models/kv_cache.py",
        "round_up(window + block - 1, _ROWS)",
        "(window + block - 1) // _ROWS * _ROWS",
        "models/test_kv_cache.py",
        "ring",
    ),
    Fault(
        "ragged rows that share a length",
        "models/kv_cache.py",
        "lengths=self.lengths + keep.astype(jnp.int32)",
        "lengths=self.lengths + keep.astype(jnp.int32).min()",
        "models/test_kv_cache.py",
        "sees_the_committed or any_history",
    ),
    Fault(
        "agreement that goes on after a wrong token",
        "decoding/accept.py",
        "jnp.cumprod(agree.astype(jnp.int32), axis=1).sum(axis=1)",
        "agree.astype(jnp.int32).sum(axis=1)",
        "decoding/test_accept.py",
        "",
    ),
    Fault(
        "a bonus token that is not emitted",
        "decoding/accept.py",
        "jnp.minimum(accepted + 1, budget)",
        "jnp.minimum(jnp.maximum(accepted, 1), budget)",
        "decoding/test_accept.py",
        "",
    ),
    Fault(
        "a stop token that is ignored",
        "decoding/accept.py",
        "produced = jnp.minimum(limit, first_stop + 1)",
        "produced = limit",
        "decoding/test_accept.py",
        "",
    ),
    Fault(
        "a bonus token that is not counted",
        "metrics.py",
        '"acceptance_length": accepted / count + 1,',
        '"acceptance_length": accepted / count,',
        "test_metrics.py",
        "",
    ),
    Fault(
        "a shifted histogram",
        "metrics.py",
        "lengths.count(a) for a in range(block_size)",
        "lengths.count(a + 1) for a in range(block_size)",
        "test_metrics.py",
        "",
    ),
    Fault(
        "a block whose positions begin at 0",
        "models/draft.py",
        "rope = self._rope(cache.positions(T))",
        "rope = self._rope(cache.positions(T) - cache.lengths[:, None])",
        "models/test_draft.py",
        "through_the_cache",
    ),
    Fault(
        "features one layer off",
        "models/llama.py",
        _LAYER + _KEEP,
        _KEEP + _LAYER,
        "models/test_llama.py",
        "",
        oracle=True,  # the comparison with transformers alone knows what a layer's output is
    ),
    Fault(
        "labels shifted by one",
        "training/batches.py",
        "labels=tokens[:, :, 1:],",
        "labels=tokens[:, :, :-1],",
        "training/test_batches.py",
        "a_batch_of_sequences",
    ),
    Fault(
        "a sink that takes no weight",
        "models/layers.py",
        "total += jnp.exp(sink - top)",
        "total += 0 * jnp.exp(sink - top)",
        "models/test_layers.py",
        "attention_is_the_plain_loop and xla and sinks",
    ),
    Fault(
        "a window one key too wide",
        "models/kv_cache.py",
        "(distance < window)",
        "(distance <= window)",
        "models/test_kv_cache.py",
        "attention_mask_is_its_definition",
    ),
    Fault(
        "the high nibble first",
        "weights/mxfp4.py",
        "[_FP4[blocks & 15], _FP4[blocks >> 4]]",
        "[_FP4[blocks >> 4], _FP4[blocks & 15]]",
        "weights/test_mxfp4.py",
        "mxfp4_is_its_definition",
    ),
    Fault(
        "other tokens than the target's pass",
        "measuring/gate.py",
        "if not case.lossless or case.speedup_x is None:",
        "if case.speedup_x is None:",
        "measuring/test_gate.py",
        "",
    ),
    Fault(
        "padding of the head that counts as tokens",
        "training/loss.py",
        "logits = jnp.where(fresh[:, None], ",
        "logits = jnp.where(fresh[:, None] | (tokens >= V)[:, None], ",
        "training/test_loss.py",
        "padded_rows",
    ),
    Fault(
        "a file that is written where it lies",
        "host/disk.py",
        "temporary = _beside(place)",
        "temporary = place.unlink(missing_ok=True) or place",
        "host/test_disk.py",
        "fails_leaves_what_was_there",
    ),
]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of what the tests need; the trained draft stays out of it."""
    folder = tmp_path_factory.mktemp("faults")
    ignore = shutil.ignore_patterns("__pycache__", "*-draft")
    shutil.copytree(ROOT / "dflash", folder / "dflash", ignore=ignore)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=ignore)
    for name in ("conftest.py", "pytest.ini"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_the_code_that_a_fault_replaces_is_there_once():
    """Known with each change, and not the night after it."""
    gone = [f.name for f in FAULTS if (ROOT / "dflash" / f.file).read_text(encoding="utf-8").count(f.right) != 1]
    assert not gone, "say again what these faults are"


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [pytest.param(f, id=f.name.replace(" ", "-"), marks=[pytest.mark.oracle] if f.oracle else []) for f in FAULTS],
)
def test_the_suite_notices(copy, quick_compiler, fault):
    if fault.oracle:
        pytest.importorskip("transformers")
    path = copy / "dflash" / fault.file
    source = path.read_text(encoding="utf-8")
    path.write_text(source.replace(fault.right, fault.wrong), encoding="utf-8")
    try:
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "cpu", "-k", fault.only]
        command = [sys.executable, "-m", "pytest", f"tests/unit/{fault.tests}", *options]
        environment = _environment() | quick_compiler
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    finally:
        path.write_text(source, encoding="utf-8")
    # 1: tests ran and failed. Nothing collected, or a copy that can't be imported, is no proof.
    assert done.returncode == 1, done.stdout + done.stderr
    assert " failed" in done.stdout, done.stdout


def _environment():
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"PYTHONDONTWRITEBYTECODE": "1"}
