"""What several unit tests need: drafts whose proposals differ, caches to train them on, the schema of provenance."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import drawn

import dflash
from dflash.config import DraftConfig, RopeConfig
from dflash.models.draft import Draft
from dflash.training.cache.arrays import ArrayWriter
from dflash.training.cache.sequences import FORM, open_sequences, sequence_specs
from dflash.training.cache.windows import to_bits

# Fits the targets of dflash.weights.tiny.
TINY_DRAFT = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "max_position": 131072,
    "rms_norm_eps": 1e-5,
    "rope": RopeConfig(theta=10000.0),
    "windows": (None, 16),
    "causal": (False, True),
    "block_size": 8,
    "mask_token_id": 5,
    "target_layer_ids": (0, 1),
    "num_target_layers": 2,
}

# Two workers share the cache: with a limit to its size it locks its files.
CACHE = {
    "jax_persistent_cache_min_compile_time_secs": 0.1,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    "jax_compilation_cache_max_size": 2**31,
}

# The compiler's older emitters, and one piece a program: a third of the time for a program of a tiny network.
QUICK_COMPILER = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


@pytest.fixture(scope="session", autouse=True)
def compiler(request, tmp_path_factory):
    """No program is compiled twice, in this process or one that it starts; what this gives is set in the environment.

    Compiling is most of what `cpu` tests do, and not what they test: alone they do it with few optimisations. What the
    compiler makes of a program when it may do its best is run by `slow` tests, tests/tpu and bench.
    """
    marked = [{m.name for m in item.iter_markers()} for item in request.session.items]
    if any(names & {"tpu", "bench"} for names in marked):
        return {}
    settings = CACHE | {"jax_compilation_cache_dir": os.environ.get("JAX_COMPILATION_CACHE_DIR")}
    if settings["jax_compilation_cache_dir"] is None:
        folder = tmp_path_factory.getbasetemp()
        shared = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
        settings["jax_compilation_cache_dir"] = str(shared / "compiled")
    # Where every comparison with an outside reference is made, programs are compared as users run them.
    hurried = all("cpu" in names for names in marked) and not os.environ.get("DFLASH_REQUIRE_EXTRAS")
    settings["jax_disable_most_optimizations"] = hurried
    for name, value in settings.items():
        jax.config.update(name, value)
    environment = {name.upper(): str(value) for name, value in settings.items()}
    if hurried:
        # Read once, when the first backend opens, which no test module does while it is imported.
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_COMPILER}".strip()
    os.environ.update(environment)
    return environment


@pytest.fixture(scope="session")
def quick_compiler(compiler):
    """The environment of processes that compile much, and whose speed and last bits nobody looks at."""
    return compiler | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "True", "XLA_FLAGS": QUICK_COMPILER}


def _draw(rng, path, shape):
    if path == ("mask_embedding",):
        return rng.normal(0, 1, shape)
    if path[-2] == "q_norm":
        # Sharp attention: a mean over a long context is the same for every slot.
        return rng.uniform(1.5, 3.5, shape)
    if "norm" in str(path[-2]):
        return rng.uniform(0.5, 1.5, shape)
    if path[-1] == "bias":
        return rng.normal(0, 0.3, shape)
    return rng.normal(0, 1.6 * shape[-1] ** -0.5, shape)


@pytest.fixture(scope="session")
def draw_draft():
    """Makes a draft of a tiny config with changes. Its weights are wide: at 0.02 it proposes the mask token only."""

    def draw(seed=0, dtype=jnp.float32, **changes):
        config, rng = DraftConfig(**(TINY_DRAFT | changes)), np.random.default_rng(seed)
        return drawn(lambda: Draft(config, dtype=dtype, rngs=nnx.Rngs(0)), functools.partial(_draw, rng))

    return draw


@pytest.fixture(scope="session")
def write_sequences():
    """Makes a sequence cache for TINY_DRAFT: answers of 8 to 40 tokens behind prompts of 0 to 20.

    Random, but for what `tokens(rng, N)` and `features(rng, tokens)` give. The last `held_out` are held out.
    """

    def write(directory, *, sequences=24, held_out=4, seed=0, tokens=None, features=None):
        rng = np.random.default_rng(seed)
        layers = TINY_DRAFT["target_layer_ids"]
        width = len(layers) * TINY_DRAFT["hidden_size"]
        prompts, answers = rng.integers(0, 21, sequences), rng.integers(8, 41, sequences)
        bounds = np.concatenate([[0], np.cumsum(prompts + answers)])
        N = int(bounds[-1])
        writer = ArrayWriter(directory, {})
        writer.allocate(sequence_specs(N, sequences, width))
        ids = rng.integers(0, TINY_DRAFT["vocab_size"], N) if tokens is None else tokens(rng, N)
        writer.arrays["token_ids"][:] = ids
        drawn = rng.standard_normal((N, width), np.float32) if features is None else features(rng, ids)
        writer.arrays["features_u16"][:] = to_bits(drawn)
        lengths = np.stack([prompts, answers], axis=1).ravel()
        writer.arrays["loss_mask_u8"][:] = np.repeat(np.tile([0, 1], sequences), lengths)
        writer.arrays["sequence_start_i64"][:] = bounds
        writer.arrays["ctx_pos_start_i32"][:] = rng.integers(0, 500, sequences)
        writer.arrays["held_out_u8"][:] = np.arange(sequences) >= sequences - held_out
        writer.commit(sequences)
        meta = {"form": FORM, "hidden_size": TINY_DRAFT["hidden_size"], "num_tokens": N}
        writer.finish(meta | {"num_context_features": len(layers), "target_layer_ids": list(layers)})
        return open_sequences(directory)

    return write


@pytest.fixture(scope="session")
def check_provenance():
    """Raises for a `dflash` block that is not as report/results.schema.json says."""
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((Path(dflash.__file__).parent / "report" / "results.schema.json").read_text())
    return jsonschema.Draft202012Validator({"$ref": "#/$defs/Provenance", "$defs": schema["$defs"]}).validate


@pytest.fixture(scope="session")
def reference():
    """The reference draft and what it needs; skips, with a sentence, where one of them is missing."""
    for package in ("torch", "transformers"):
        pytest.importorskip(package)
    if not os.environ.get("DFLASH_REFERENCE_DIR"):
        pytest.skip(
            "DFLASH_REFERENCE_DIR must name a directory that holds the reference: "
            "pip install --no-deps --target DIR dflash==0.1.0"
        )


@pytest.fixture
def on_eight_devices(tmp_path):
    """Runs a script, given this test's folder, in a process that has eight CPU devices; it must say `same`."""

    def run(script):
        env = {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "JAX_PLATFORMS": "cpu",
            "TF_CPP_MIN_LOG_LEVEL": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)],
            env=os.environ | env,
            cwd=Path(dflash.__file__).parents[1],
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.strip() == "same"
        # What XLA says where an array's parts don't fit the next operation, and it gathers the whole of it.
        assert "rematerialization" not in done.stderr

    return run
