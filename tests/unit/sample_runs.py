"""Benchmark files for the report's tests: what a sweep would write, from a formula. No figure here was measured."""

import copy
import dataclasses

from dflash.measuring.result import Decode, from_json
from dflash.metrics import acceptance

HASH = {name: letter * 64 for name, letter in (("target", "a"), ("draft", "b"), ("prompts", "c"), ("cache", "d"))}
FACTS = {
    "platform": "cpu",
    "device_kind": "cpu",
    "device_count": 1,
    "cpu_count": 2,
    "cpu_model": "abacus",
    "mesh": {"dp": 1, "tp": 1},
    "jax": "0.10.2",
    "kernels": "XLA",
    "target": "smollm2-135m",
    "target_sha256": HASH["target"],
    "draft": "runs/sample",
    "draft_sha256": HASH["draft"],
    "prompts": "builtin",
    "prompts_sha256": HASH["prompts"],
    "seeds": {"draft": 0, "prompts": 0, "bootstrap": 0},
    "run_name": None,
}
STEP_MS, DRAFT_MS = 20.0, 6.0
PROVENANCE = {
    "schema_version": 1,
    "git": {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False},
    "versions": {"jax": "0.10.2", "numpy": "2.4.0"},
    "device": {k: FACTS[k] for k in ("platform", "device_kind", "device_count", "mesh")},
    "read": {k: v for k, v in FACTS.items() if k.startswith(("target", "draft", "prompts"))},
    "seeds": FACTS["seeds"],
    "flags": {"JAX_PLATFORMS": "cpu"},
    "command": ["pytest", "bench", "--run-on", "cpu"],
    "compile_cache": "off",
}


def verify_ms(size, batch=1):
    return STEP_MS * (1 + 0.02 * size * batch)


def accept_lens(block_size, share):
    """Accept lengths of 100 blocks whose tokens are each accepted with this probability, without drawing any."""
    counts = [round(100 * share**a * (1 - share)) for a in range(block_size - 1)]
    return [a for a, n in enumerate(counts) for _ in range(n)] + [block_size - 1] * (100 - sum(counts))


def decode(block_size=8, batch_size=1, proposer="draft", mode="block", share=0.7, tilt=1.0, spread=0.05):
    """A decode benchmark; `tilt` is measured over predicted speed-up, `spread` the interval's half width."""
    scripted = int(proposer[1:]) if proposer[1:].isdigit() else None
    lengths = accept_lens(block_size, share) if scripted is None else [scripted] * 40
    figures = acceptance([lengths], block_size)
    ratio = verify_ms(block_size, batch_size) / STEP_MS + DRAFT_MS / STEP_MS
    if mode == "seq":
        ratio = figures["acceptance_length"] + DRAFT_MS / STEP_MS
    predicted = figures["acceptance_length"] / ratio
    speedup = predicted * tilt
    batch = "" if batch_size == 1 else f"-k{batch_size}"
    case = f"{mode}-b{block_size}-n64{batch}-{proposer}"
    info = {
        **FACTS,
        **figures,
        "case": case,
        "proposer": proposer,
        "scripted": scripted,
        "mode": {"block": "cached_block_verify", "seq": "cached_sequential_verify"}[mode],
        "block_size": block_size,
        "batch_size": batch_size,
        "num_prompts": 4,
        "prompt_len": 117,
        "prompt_len_mean": 79.25,
        "max_new_tokens": 64,
        "dtype": "float32",
        "rounds": 5,
        "num_output_tokens": 212,
        "tok_s_total": 50.0 * speedup * batch_size,
        "baseline_tok_s_total": 50.0 * batch_size,
        "ttft_ms": 190.0,
        "tpot_ms": STEP_MS / speedup,
        "baseline_tpot_ms": STEP_MS,
        "compile_s": 3.0,
        "speedup_x": speedup,
        "speedup_x_ci95": [speedup * (1 - spread), speedup * (1 + spread)],
        "block_ratio": ratio / tilt,
        "predicted_speedup_x": predicted,
        "predicted_block_ratio": ratio,
        "lossless": True,
        "first_divergence": None,
        "status": "ok",
    }
    if scripted is None and mode == "block":
        info["advice"] = advice(figures["accept_rate_per_pos"], batch_size)
    return benchmark(f"bench/test_decode.py::test_decode[{case}]", "decode", info)


def case(**changes):
    """A decoding case as a record, with these fields instead."""
    return dataclasses.replace(from_json(decode()["extra_info"], Decode), **changes)


def advice(rates, batch_size):
    """The cost model's speed-up for every block size, and the best."""
    lengths = {size: 1 + sum(rates[: size - 1]) for size in range(2, len(rates) + 2)}
    predicted = {s: n / (verify_ms(s, batch_size) / STEP_MS + DRAFT_MS / STEP_MS) for s, n in lengths.items()}
    best = max(predicted, key=predicted.get)
    rows = [
        {
            "block_size": s,
            "acceptance_length": lengths[s],
            "break_even_acceptance_length": lengths[s] / x,
            "predicted_speedup_x": x,
            "timed": True,
        }
        for s, x in predicted.items()
    ]
    return {"best_block_size": best, "best_predicted_speedup_x": predicted[best], "by_block_size": rows}


def failed(block_size=8, batch_size=64):
    """A case that could not be measured, as it stands under `failed`."""
    case = f"block-b{block_size}-n64-k{batch_size}-draft"
    asked = {"mode": "cached_block_verify", "block_size": block_size, "max_new_tokens": 64, "batch_size": batch_size}
    asked |= {"prompt_len": 0, "dtype": "float32"}
    told = {
        "case": case,
        "proposer": "draft",
        "scripted": None,
        "status": "failed",
        "error": "out of memory: allocating 7 GiB <x>",
    }
    return {**FACTS, **asked, **told, "name": f"bench/test_decode.py::test_decode[{case}]"}


def step():
    sizes = (2, 4, 8, 16, 32)
    info = {
        **FACTS,
        "case": "step-c111",
        "context": 111,
        "batch_size": 1,
        "dtype": "float32",
        "bandwidth_gb_s": 31.5,
        "step_ms": STEP_MS,
        "verify_ms": {str(s): verify_ms(s) for s in sizes},
        "draft_ms": {str(s): DRAFT_MS for s in (4, 8, 16)},
        "floor_ms": {str(s): 17.0 for s in (1, *sizes)},
    }
    return benchmark("bench/test_step.py::test_step", "step", info)


def offline():
    lengths = accept_lens(8, 0.75)
    buckets = {s: 3.2 - s / 400 for s in (0, 64, 128, 256)}
    starts = {str(s): {"n": 25, "accept_len_mean": mean, "accept_len_p50": 3.0} for s, mean in buckets.items()}
    info = {**FACTS, **acceptance([lengths], 8), "case": "offline", "by_ctx_pos_start": starts, "rows": "held_out"}
    info |= {
        "block_size": 8,
        "cache_sha256": HASH["cache"],
        "live_acceptance_length": 3.9,
        "num_samples": len(lengths),
        "live_num_samples": 40,
    }
    info |= {f"accept_len_{p}": 3.0 for p in ("p50", "p90", "p99")} | {"accept_rate_tokens": 0.4}
    info |= {f"token_acc_{p}": 0.6 for p in ("mean", "p50", "p90")}
    return benchmark("bench/test_evaluate.py::test_offline_acceptance", "evaluate", info)


def by_category():
    kinds = {"code": 0.85, "arithmetic": 0.8, "story": 0.5, "translation": 0.6}
    figures = {k: acceptance([accept_lens(8, s)], 8) | {"num_prompts": 8} for k, s in kinds.items()}
    every = acceptance([[a for s in kinds.values() for a in accept_lens(8, s)]], 8)
    info = {**FACTS, **every, "case": "acceptance", "block_size": 8, "by_category": figures}
    info |= {"lossless": True, "max_new_tokens": 64}
    return benchmark("bench/test_acceptance.py::test_acceptance", "acceptance", info)


def training():
    info = {"case": "train-b8-a32-s8", "dtype": "float32", "step_s": 2.0, "draft_tokens_per_s": 880.0}
    info |= {"gflop_s": 157.0, "matmul_gflop_s": 201.0, "matmul_fraction": 0.78, "read_s": 0.01}
    info |= {"cache_write_gb_s": 0.5, "disk_write_gb_s": 0.6}
    return benchmark("bench/test_training.py::test_training_step", "training", info)


def gate(failed=True, **sentences):
    """What baselines say: a case for each verdict, and one that passes."""
    slow = "speedup_x 1.61 (1.55 to 1.68) < 1.80 on cpu; acceptance unchanged, verify step +14%"
    told = [(f"block-b{4 + i}-n64-draft", *said) for i, said in enumerate((sentences or {"fail": slow}).items())]
    told.append(("seq-b8-n64-draft", "pass", ""))
    return {"failed": failed, "cases": [dict(zip(("case", "verdict", "sentence"), t, strict=True)) for t in told]}


def audit(case="smollm2-135m", defects=()):
    """Figures of an audit with one near tie."""
    spread = {"ulps_p99": 1.0, "ulps_max": 2.5}
    parity = {
        "block_size": 8,
        "positions": 96,
        "bitwise_equal": False,
        "first_layer": 1,
        "flips": 1,
        "flip_rate": 1 / 96,
    }
    parity |= {"defects": 0, "logits": spread, "layers": [spread] * 2}
    found = {k: FACTS[k] for k in ("platform", "device_kind", "device_count", "cpu_count")}
    found |= {"case": case, "dtype": "bfloat16", "tokens": 288, "near_ties": 1, "defects": list(defects)}
    verdict = "defect" if defects else "lossless up to near ties"
    return found | {"verdict": verdict, "parity": parity, "divergences": {}}


def benchmark(fullname, group, info):
    stats = {"median": 1.5, "mean": 1.5, "stddev": 0.02, "rounds": 5, "data": [1.5, 1.48, 1.52, 1.5, 1.53]}
    return {"group": group, "name": fullname.split("::")[1], "fullname": fullname, "extra_info": info, "stats": stats}


def file_of(benchmarks, when="2026-01-02T03:04:05+00:00", **provenance):
    """The whole file; `provenance` changes its facts."""
    return {
        "machine_info": {"system": "Linux", "release": "6.1", "python_version": "3.11.7", "cpu": {"brand_raw": "X"}},
        "commit_info": {"id": PROVENANCE["git"]["commit"], "dirty": False},
        "benchmarks": copy.deepcopy(benchmarks),
        "datetime": when,
        "version": "5.3.1",
        "dflash": PROVENANCE | provenance,
    }


def sweep(tilt=1.0):
    """Every kind of benchmark: three block sizes, two batches, scripts, both modes."""
    cases = [decode(size, batch, tilt=tilt * 0.97) for size in (4, 8, 16) for batch in (1, 4)]
    cases += [decode(size, proposer=f"a{size - 1}", tilt=tilt * 1.02) for size in (4, 8, 16)]
    return [*cases, decode(mode="seq", tilt=tilt), step(), offline(), by_category(), training()]


# In the place of a value: the key is taken out.
GONE = object()


def damaged(file, path, value):
    """A copy of a file's content with a value in the place that a path of keys names."""
    changed = inner = copy.deepcopy(file)
    for key in path[:-1]:
        inner = inner[key]
    if value is GONE:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return changed
